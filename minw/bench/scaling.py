"""Estimate of the time of a training step on many chips, from the compiled program.

The step is compiled for eight virtual CPU devices. Its floating-point operations and
the bytes that its collectives send are read from the compiled program. The times on n
chips follow from stated rates:

    computation     operations of a chip / (peak * utilization)
    all-reduce      2 (n - 1) / n * bytes / bandwidth + hops * latency

A ring all-reduce has n - 1 steps that sum and n - 1 steps that distribute the sums. In
each step, a chip sends one n-th of the bytes. The number of hops is 3 n^(1/3): the ring
along each of the three axes of a torus has n^(1/3) chips and is used in both directions
at once. The estimate assumes that nothing overlaps. Therefore it is an upper bound.
"""

import math
import re
from typing import Any, NamedTuple, Sequence

import jax

from minw import errors
from minw import train_step
from minw.experiment import Experiment

DEVICES = 8

_OPERATION = re.compile(
    r"= (?P<shape>.*?) (?P<kind>all-reduce|all-gather|reduce-scatter|all-to-all|"
    r"collective-permute|collective-broadcast)(?:-start)?\(")
_ARRAY = re.compile(r"\b(pred|(?:s|u|f|bf)\d+)\[([\d,]*)\]")


class Collective(NamedTuple):
  """A collective of a compiled program.

  Attributes:
    kind: Name of the operation, "all-reduce" for example.
    arrays: Dtype and shape of each of its results.
    bytes: Size of all results in bytes.
  """

  kind: str
  arrays: tuple[tuple[str, tuple[int, ...]], ...]
  bytes: int


class Rates(NamedTuple):
  """Rates of a chip.

  Attributes:
    teraflops: Peak in 10^12 floating-point operations per second.
    utilization: Share of the peak that training reaches.
    gigabytes: Bandwidth over all links of the chip in 10^9 bytes per second.
    microseconds: Latency from one chip to the next in microseconds.
  """

  teraflops: float
  utilization: float
  gigabytes: float
  microseconds: float


def collectives(hlo: str) -> list[Collective]:
  """Finds the collectives in the text of a compiled program."""
  found = []
  for line in hlo.splitlines():
    match = _OPERATION.search(line)
    if match:
      arrays = tuple(
          (dtype, tuple(int(n) for n in shape.split(",") if n))
          for dtype, shape in _ARRAY.findall(match["shape"]))
      found.append(Collective(match["kind"], arrays, sum(map(_bytes, arrays))))
  return found


def of_kernels(reduction: Collective) -> bool:
  """Returns whether a collective has gradients of kernels.

  No other arrays in a training step's collectives have more than one axis.
  """
  return any(len(shape) > 1 for _, shape in reduction.arrays)


def compile_step(config: Any) -> tuple[int, float, list[Collective]]:
  """Compiles a training step for all devices, without data.

  Args:
    config: Config of the run, see `config.default_config`.

  Returns:
    The number of parameters, the floating-point operations per example, and the
    collectives.

  Raises:
    errors.UsageError: The config cannot be run.
  """
  experiment = Experiment(config)
  state = train_step.abstract_state(experiment)
  lowered = train_step.make_train_step(experiment).lower(
      state, *experiment.data.abstract_batch())
  # Operations are counted before compilation. Later counts depend on XLA's fusions.
  operations = lowered.cost_analysis()["flops"] / config.batch_size
  parameters = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(state.params))
  return parameters, operations, collectives(lowered.compile().as_text())


def reduction_seconds(size: float, chips: int, rates: Rates) -> float:
  """Estimates the seconds of an all-reduce of `size` bytes on that many chips."""
  if chips == 1:
    return 0.0
  sent = 2 * (chips - 1) / chips * size
  hops = 3 * chips ** (1 / 3)
  return sent / (rates.gigabytes * 1e9) + hops * rates.microseconds * 1e-6


def step_times(
    operations: float,
    found: Sequence[Collective],
    batches: Sequence[tuple[int, float]],
    rates: Rates,
) -> list[dict[str, float]]:
  """Estimates the time of a step.

  Args:
    operations: Floating-point operations per example.
    found: All-reduces of a step.
    batches: Pairs of a number of chips and the number of examples per chip.
    rates: Rates of a chip.

  Returns:
    A dict for each of `batches` with `chips` and `batch_per_chip`. `compute`,
    `gradients` and `statistics` are times in seconds, and `step` is their sum.
    `bfloat16` is the time of a step with half as many bytes of gradients. `efficiency`
    is the share of computation in the time of a step.
  """
  kernels = [each.bytes for each in found if of_kernels(each)]
  others = [each.bytes for each in found if not of_kernels(each)]
  rows = []
  for chips, batch in batches:
    total = lambda sizes: sum(
        reduction_seconds(size, chips, rates) for size in sizes)  # noqa: B023
    compute = operations * batch / (rates.teraflops * 1e12 * rates.utilization)
    gradients, statistics = total(kernels), total(others)
    half = total([size / 2 for size in kernels])
    step = compute + gradients + statistics
    rows.append(dict(
        chips=chips, batch_per_chip=batch, compute=compute, gradients=gradients,
        statistics=statistics, step=step, bfloat16=step - gradients + half,
        efficiency=compute / step))
  return rows


def bench_scaling(
    config: Any, chips: Sequence[int], batch_per_chip: int, rates: Rates
) -> dict[str, Any]:
  """Estimates the time of a step on several numbers of chips.

  In weak scaling the batch grows with the number of chips. In strong scaling it stays.

  Args:
    config: Config of the run, see `config.default_config`. Its batch size is used for
      strong scaling.
    chips: Numbers of chips.
    batch_per_chip: Batch size per chip for weak scaling.
    rates: Rates of a chip.

  Returns:
    The object that --json writes. It has `parameters`, `operations` per example and
    `collectives` of the compiled step, and the results of `step_times` for `weak` and
    `strong` scaling. It also has config and rates.

  Raises:
    errors.UsageError: The config cannot be run, or JAX already has other devices.
  """
  jax.config.update("jax_platforms", "cpu")
  jax.config.update("jax_num_cpu_devices", DEVICES)
  errors.check(len(jax.devices()) == DEVICES, "devices", len(jax.devices()),
               f"{DEVICES} virtual ones; XLA_FLAGS says otherwise")
  parameters, operations, found = compile_step(config)
  others = {each.kind for each in found} - {"all-reduce"}
  if others:
    raise ValueError(f"the step has {', '.join(sorted(others))}, which the estimate"
                     " does not include")
  weak = [(n, batch_per_chip) for n in chips]
  strong = [(n, config.batch_size / n) for n in chips if n <= config.batch_size]
  return {
      "bench": "scaling",
      "config": config.to_dict(),
      "rates": rates._asdict(),
      "jax": jax.__version__,
      "parameters": parameters,
      "operations": operations,
      "collectives": [each._asdict() for each in found],
      "weak": step_times(operations, found, weak, rates),
      "strong": step_times(operations, found, strong, rates),
  }


def table(result: dict[str, Any]) -> str:
  """Formats the result of `bench_scaling` as Markdown."""
  c, rates = result["config"], result["rates"]
  found = [Collective(**each) for each in result["collectives"]]
  kernels = [each.bytes for each in found if of_kernels(each)]
  others = [each.bytes for each in found if not of_kernels(each)]
  operations = result["operations"]
  lines = [
      f"Training step: {c['network']}, {c['dataset']}, crop {c['crop_size']},"
      f" {c['compute_dtype']}, compiled by jax {result['jax']} for {DEVICES} devices",
      f"{result['parameters'] / 1e6:.2f} M parameters; {operations / 1e9:.3g} GFLOP per"
      f" example; all-reduces: {len(kernels)} of gradients, {sum(kernels) / 1e6:.2f}"
      f" MB; {len(others)} of batch norm's statistics, {sum(others) / 1e3:.1f} kB",
      f"Estimate for {rates['teraflops']:g} TFLOP/s at {rates['utilization']:.0%},"
      f" {rates['gigabytes']:g} GB/s and {rates['microseconds']:g} us per hop;"
      " nothing overlaps"]
  for name, title in (("weak", "The batch grows with the chips"),
                      ("strong", f"The batch stays {c['batch_size']}")):
    rows = result[name]
    lines += [
        "", f"{title}:", "",
        "| chips | batch per chip | compute ms | gradients ms | batch norm ms | step ms"
        " | efficiency | examples/s | step with bfloat16 gradients |",
        "|---|---|---|---|---|---|---|---|---|"]
    for row in rows:
      rate = row["chips"] * row["batch_per_chip"] / row["step"]
      lines.append("| {chips} | {batch_per_chip:g} |".format(**row) + "".join(
          f" {1e3 * row[part]:.3f} |"
          for part in ("compute", "gradients", "statistics", "step"))
          + f" {row['efficiency']:.1%} | {rate:.3g} |"
          f" {row['bfloat16'] / row['step'] - 1:+.1%} |")
    dominated = [row["chips"] for row in rows if row["efficiency"] < 0.5]
    lines += ["", f"From {dominated[0]} chips on, communication takes more than half"
              " of a step." if dominated else
              "Communication always takes less than half of a step."]
  return "\n".join(lines)


def _bytes(array: tuple[str, tuple[int, ...]]) -> int:
  dtype, shape = array
  bits = 8 if dtype == "pred" else int(re.sub(r"\D", "", dtype))
  return math.prod(shape) * bits // 8
