"""Benchmark of all experiment files: their networks and the time of a training step."""

import functools
from typing import Any, Sequence

import jax

from minw import config as config_lib
from minw import config_flag
from minw import summary
from minw import train_step
from minw.bench import timing
from minw.bench import train as bench_train
from minw.experiment import Experiment


def bench_configs(
    configs: Sequence[str], rounds: int, batch_size: int | None
) -> dict[str, Any]:
  """Times a training step of each config, one after another, on random images.

  Args:
    configs: Experiments as --config takes them: NAME or NAME:ARGUMENT.
    rounds: Number of measurements of each config.
    batch_size: Batch size of all configs. If None, each config has its own.

  Returns:
    The object that --json writes. `configs` has for each name a description of the
    network and `step`, a summary of the seconds. The machine is described, too.

  Raises:
    errors.UsageError: A config cannot be run. It is raised before any is timed.
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
  # With optimization, compiling the initialization would take as long as compiling the
  # step.
  state = experiment.jit(
      lambda: train_step.init_state(experiment),
      compiler_options={"xla_backend_optimization_level": 0})()
  step = experiment.jit(
      functools.partial(train_step.update, experiment), donate_argnums=0)
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
  """Formats the result of `bench_configs` as Markdown."""
  m = result["machine"]
  lines = [
      "Time of a training step on a batch of random images. Medians and quartiles of "
      f"{result['rounds']} rounds on {m['num_devices']} x {m['device']}; "
      f"CPU: {m['cores']} x {m['cpu']}; "
      + ", ".join(f"{name} {version}" for name, version in m["versions"].items()) + ".",
      "",
      "| config | network | crop | weights | by bits | inputs | packed, MiB | batch | "
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
