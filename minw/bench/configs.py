"""All experiment files: what networks they have, and what a step of training takes."""

import functools
from typing import Any, Sequence

import jax

from minw import config as config_lib
from minw import config_flag
from minw import summary
from minw import train
from minw.bench import timing
from minw.bench import train as bench_train
from minw.experiment import Experiment


def bench_configs(
    configs: Sequence[str], rounds: int, batch_size: int | None
) -> dict[str, Any]:
  """Times a step of training of each config, one after another, on random images.

  Args:
    configs: experiments, as --config takes them: NAME or NAME:ARGUMENT.
    rounds: how often each is measured.
    batch_size: images in a step; None: each config's own.

  Returns:
    What --json writes: `configs` by name, each with what it is and `step`, a summary
    of the seconds; and the machine.

  Raises:
    errors.UsageError: a config cannot be run; before any is timed.
  """
  experiments = {name: _experiment(config_flag.load(name), batch_size)
                 for name in configs}
  return {"bench": "configs", "rounds": rounds,
          "configs": {name: _measure(experiment, rounds)
                      for name, experiment in experiments.items()},
          "machine": timing.machine()}


def _experiment(config: Any, batch_size: int | None) -> Experiment:
  changes = {} if batch_size is None else {"batch_size": batch_size}
  return Experiment(config_lib.copy(config, **changes))


def _measure(experiment: Experiment, rounds: int) -> dict[str, Any]:
  c = experiment.config
  key = jax.random.key(c.seed)
  batch = experiment.jit(experiment.data.train_inputs)(
      *bench_train.random_batch(experiment), 0, key)
  # Compiles as long as the step does where it is not told not to optimize.
  state = experiment.jit(
      lambda: train.init_state(experiment),
      compiler_options={"xla_backend_optimization_level": 0})()
  step = experiment.jit(functools.partial(train.update, experiment), donate_argnums=0)
  run = bench_train.run_of(step, state, *batch, key)
  seconds = timing.measure({"step": run}, rounds)
  network = summary.summarize(experiment.layers)
  return {
      "network": c.network, "dataset": c.dataset, "crop_size": c.crop_size,
      "weights": network.weights,
      "norm_parameters": network.norm_parameters,
      "weights_by_bits": {str(bits): count
                          for bits, count in network.weights_by_bits.items()},
      "input_bits": c.input_bits, "packed_bytes": network.packed_bytes,
      "macs": network.macs, "batch_size": c.batch_size,
      "step": timing.summary(seconds["step"])}


def table(result: dict[str, Any]) -> str:
  """The result of `bench_configs` for a reader, in Markdown."""
  m = result["machine"]
  lines = [
      "One step of training on a batch of random images; medians and quartiles of "
      f"{result['rounds']} rounds, on {m['num_devices']} x {m['device']}; "
      f"CPU: {m['cores']} x {m['cpu']}; "
      + ", ".join(f"{name} {version}" for name, version in m["versions"].items()) + ".",
      "",
      "| config | network | crop | weights | of bits | inputs | packed, MiB | batch | "
      "step, ms | quartiles | images/s |",
      "|---|---|---|---|---|---|---|---|---|---|---|"]
  for name, c in result["configs"].items():
    bits = ", ".join(
        f"{bits}: {count:,}" for bits, count in c["weights_by_bits"].items())
    ms = {part: 1e3 * c["step"][part] for part in ("low", "median", "high")}
    lines.append("| " + " | ".join([
        name, f"{c['network']}, {c['dataset']}", str(c["crop_size"]),
        f"{c['weights']:,}", bits, str(c["input_bits"]),
        f"{c['packed_bytes'] / 2**20:.2f}", str(c["batch_size"]), f"{ms['median']:.1f}",
        f"{ms['low']:.1f} - {ms['high']:.1f}",
        f"{c['batch_size'] / c['step']['median']:.1f}"]) + " |")
  return "\n".join(lines)
