"""A step of training on many chips, on paper: from what XLA compiles for eight.

The step is compiled for eight virtual CPU devices. Its floating-point operations, and
what its collectives send, are read from the compiled program; how long these take on
other chips follows from stated rates:

    computation     operations of a chip / (peak * utilization)
    all-reduce      2 (n - 1) / n * bytes / bandwidth + hops * latency

with hops = 3 n^(1/3), those of a ring around each axis of a three-dimensional torus in
both directions at once. Nothing is taken to overlap: a bound from above.
"""

import math
import re
from typing import Any, NamedTuple, Sequence

import jax

from minw import errors
from minw import train
from minw.experiment import Experiment

DEVICES = 8

_OPERATION = re.compile(
    r"= (?P<shape>.*?) (?P<kind>all-reduce|all-gather|reduce-scatter|all-to-all|"
    r"collective-permute|collective-broadcast)(?:-start)?\(")
_ARRAY = re.compile(r"\b(pred|(?:s|u|f|bf)\d+)\[([\d,]*)\]")


class Collective(NamedTuple):
  """A collective of a compiled program.

  Attributes:
    kind: "all-reduce", ....
    arrays: dtype and shape of each of its results.
    bytes: of all of them.
  """

  kind: str
  arrays: tuple[tuple[str, tuple[int, ...]], ...]
  bytes: int


class Rates(NamedTuple):
  """The rates of a chip.

  Attributes:
    teraflops: its peak, 10^12 floating-point operations a second.
    utilization: the share of it that training reaches.
    gigabytes: 10^9 bytes that it sends a second, over all its links.
    microseconds: from one chip to the next.
  """

  teraflops: float
  utilization: float
  gigabytes: float
  microseconds: float


def collectives(hlo: str) -> list[Collective]:
  """The collectives in the text of a compiled program."""
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
  """Whether it holds gradients of kernels, which alone have more than one axis."""
  return any(len(shape) > 1 for _, shape in reduction.arrays)


def compile_step(config: Any) -> tuple[int, float, list[Collective]]:
  """Compiles a step of training for all devices, without data.

  Args:
    config: see `config.default_config`.

  Returns:
    The number of parameters, floating-point operations of an example, and collectives.

  Raises:
    errors.UsageError: the config cannot be run.
  """
  experiment = Experiment(config)
  target = train.checkpoint_target(experiment)
  shapes: list[Any] = [target[name] for name in train.TrainState._fields]
  state = train.TrainState(*shapes)
  lowered = train.make_train_step(experiment).lower(
      state, *experiment.data.abstract_batch())
  # Before it is compiled: what XLA counts after depends on how it fuses.
  operations = lowered.cost_analysis()["flops"] / config.batch_size
  parameters = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(state.params))
  return parameters, operations, collectives(lowered.compile().as_text())


def reduction_seconds(size: float, chips: int, rates: Rates) -> float:
  """How long an all-reduce of `size` bytes takes on that many chips."""
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
  """How long a step takes.

  Args:
    operations: of an example.
    found: the all-reduces of a step.
    batches: pairs of a number of chips and how many examples each has.
    rates: of a chip.

  Returns:
    One for each of `batches`: chips, batch_per_chip, and seconds: compute, gradients,
    statistics, their sum `step`, and what it would be with half as many bytes of
    gradients, `bfloat16`; efficiency: the share of a step that is computation.
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
  """Computes the time of a step on numbers of chips, with a batch that grows or stays.

  Args:
    config: see `config.default_config`; its batch is the one that stays.
    chips: numbers of them.
    batch_per_chip: of the batch that grows.
    rates: of a chip.

  Returns:
    What --json writes: the compiled step's `parameters`, `operations` of an example
    and `collectives`; `weak` and `strong`, see `step_times`; config and rates.

  Raises:
    errors.UsageError: the config cannot be run, or JAX has other devices already.
  """
  jax.config.update("jax_platforms", "cpu")
  jax.config.update("jax_num_cpu_devices", DEVICES)
  errors.check(len(jax.devices()) == DEVICES, "devices", len(jax.devices()),
               f"{DEVICES} virtual ones; XLA_FLAGS says otherwise")
  parameters, operations, found = compile_step(config)
  others = {each.kind for each in found} - {"all-reduce"}
  if others:
    raise ValueError(f"the step holds {', '.join(sorted(others))}: not accounted for")
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
  """The result of `bench_scaling` for a reader."""
  c, rates = result["config"], result["rates"]
  found = [Collective(**each) for each in result["collectives"]]
  kernels = [each.bytes for each in found if of_kernels(each)]
  others = [each.bytes for each in found if not of_kernels(each)]
  operations = result["operations"]
  lines = [
      f"One step of training: {c['network']}, {c['dataset']}, crop {c['crop_size']},"
      f" {c['compute_dtype']}, compiled by jax {result['jax']} for {DEVICES} devices",
      f"{result['parameters'] / 1e6:.2f} M parameters; {operations / 1e9:.3g} GFLOP an"
      f" example; all-reduces: {len(kernels)} of gradients, {sum(kernels) / 1e6:.2f}"
      f" MB; {len(others)} of batch norm's statistics, {sum(others) / 1e3:.1f} kB",
      f"On paper: {rates['teraflops']:g} TFLOP/s at {rates['utilization']:.0%},"
      f" {rates['gigabytes']:g} GB/s, {rates['microseconds']:g} us a hop;"
      " nothing overlaps"]
  for name, title in (("weak", "The batch grows with the chips"),
                      ("strong", f"The batch stays {c['batch_size']}")):
    rows = result[name]
    lines += [
        "", f"{title}:", "",
        "| chips | a chip's batch | compute ms | gradients ms | batch norm ms | step ms"
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
    lines += ["", f"Communication takes more than half from {dominated[0]} chips on."
              if dominated else "Communication takes less than half throughout."]
  return "\n".join(lines)


def _bytes(array: tuple[str, tuple[int, ...]]) -> int:
  dtype, shape = array
  bits = 8 if dtype == "pred" else int(re.sub(r"\D", "", dtype))
  return math.prod(shape) * bits // 8
