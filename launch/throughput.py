"""How several seeds train fastest on this machine: as processes, or as one program.

  python launch/throughput.py [--seeds=1,2,4,8] [--config=FILE] [--config.FIELD=VALUE]
      [--rounds=3] [--seconds=5] [--json=FILE]

counts the training steps of all seeds together in a second, on random images: with a
process for each seed, in places of their own as `sweep.py --jobs` gives them, and with
all seeds in one program (`jax.vmap` over parameters and batches), which has all of the
machine. The default is ConvNet A on CIFAR-10. Everything is started anew in each round.

Tried on CPUs; what GPUs prefer is what this is there to find out.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from typing import Any, Sequence

from absl import flags
import jax
import jax.numpy as jnp

from minw import cli
from minw import config as config_lib
from minw import config_flag
from minw import errors
from minw import files
from minw import models
from minw import train
from minw.bench import timing
from minw.bench import train as bench_train
from minw.data import pipeline
from minw.experiment import Experiment
import places


def get_config() -> Any:
  """The default of --config, which is this file."""
  c = config_lib.default_config()
  c.conv_widths, c.dense_widths = models.convnet_widths("A")
  return c


def work(config: Any, seeds: int, seconds: float) -> None:
  """One process: compiles, waits for a line, and prints the steps it did a second.

  Args:
    config: of the runs.
    seeds: how many are in its program; all count.
    seconds: how long to go on at least.
  """
  ten_steps = _one_program(config, seeds)
  ten_steps()
  print("ready", flush=True)
  sys.stdin.readline()
  start, count = time.perf_counter(), 0
  while time.perf_counter() - start < seconds:
    ten_steps()
    count += 10 * seeds
  print(count / (time.perf_counter() - start), flush=True)


def _one_program(config, seeds):
  """A function that does ten steps of each seed and waits for them."""
  experiment = Experiment(config)
  data = bench_train.random_data(experiment)
  size = experiment.info.splits["train"]

  def train_step(state, seed, order, data):
    batch_key, noise_key = jax.random.split(
        jax.random.fold_in(jax.random.key(seed), state.step))
    batch = experiment.train_batch(
        data, order, state.step % experiment.steps_per_epoch, batch_key)
    return train.update(experiment, state, *batch, noise_key)[0]

  numbers = jnp.arange(seeds)
  orders = jax.vmap(lambda seed: pipeline.epoch_order(seed, 0, size))(numbers)
  state = train.make_init_state(experiment)()
  if seeds > 1:
    state = jax.tree.map(lambda leaf: jnp.stack([leaf] * seeds), state)
    train_step = jax.vmap(train_step, in_axes=(0, 0, 0, None))
  else:  # As runs are trained, without a dimension more.
    numbers, orders = numbers[0], orders[0]
  step = experiment.jit(train_step, donate_argnums=0)

  def ten_steps():
    nonlocal state
    for _ in range(10):
      state = step(state, numbers, orders, data)
    jax.block_until_ready(state)

  return ten_steps


def measure(processes: int, seeds: int, arguments: Sequence[str]) -> float:
  """The steps a second of so many processes with so many seeds each, together."""
  command = [sys.executable, __file__, f"--work={seeds}", *arguments]
  started = [
      places.start(command, place, text=True, stdin=subprocess.PIPE,
                   stdout=subprocess.PIPE)
      for place in places.split(processes)]
  try:
    for process in started:
      if process.stdout.readline() != "ready\n":
        raise errors.UsageError(
            f"a process with seeds={seeds}, one of {processes}, ended before it "
            "trained: see above")
    for process in started:
      process.stdin.write("go\n")
      process.stdin.flush()
    return sum(float(process.stdout.readline()) for process in started)
  finally:
    for process in started:
      process.kill()
      process.communicate()


def bench(seeds: Sequence[int], rounds: int, arguments: Sequence[str]) -> dict[str, Any]:
  """Measures all numbers of seeds both ways, in turn.

  Args:
    seeds: how many at a time.
    rounds: how often.
    arguments: of this file, for the processes: the config, and seconds.

  Returns:
    Steps a second by "processes" and "program", each with a list for each number of
    seeds, of a number a round.
  """
  ways = {"processes": lambda count: measure(count, 1, arguments),
          "program": lambda count: measure(1, count, arguments)}
  found = {way: {count: [] for count in seeds} for way in ways}
  for _ in range(rounds):
    for count in seeds:
      for way, run in ways.items():
        found[way][count].append(run(count))
  return found


def table(found: dict[str, Any]) -> str:
  """Medians of `bench`, and both ways' ratio, taken round by round."""
  lines = [f"{'seeds':>5}{'processes':>14}{'one program':>14}{'processes / program':>22}",
           f"{'':5}{'steps/s':>14}{'steps/s':>14}"]
  for count, processes in found["processes"].items():
    program = found["program"][count]
    ratio = statistics.median(a / b for a, b in zip(processes, program))
    lines.append(f"{count:5}{statistics.median(processes):14.2f}"
                 f"{statistics.median(program):14.2f}{ratio:22.2f}")
  return "\n".join(lines)


def define_flags() -> None:
  """Defines the flags of the command."""
  config_flag.define(default=__file__)
  flags.DEFINE_list("seeds", ["1", "2", "4", "8"], "Numbers of seeds to compare.")
  flags.DEFINE_integer("rounds", 3, "Number of measurements of each.", lower_bound=1)
  flags.DEFINE_float("seconds", 5, "Length of a measurement.", lower_bound=0)
  cli.DEFINE_path("json", None, "File to write all measurements to.")
  flags.DEFINE_integer(
      "work", None, "For the processes that are measured: the seeds of each.")


def main() -> None:
  """Measures, as the flags say, or is one of the processes that are measured."""
  f = flags.FLAGS
  if f.work:
    work(f.config, f.work, f.seconds)
    return
  errors.check(f.seeds and all(n.isdigit() and int(n) for n in f.seeds),
               "seeds", ",".join(f.seeds), "positive integers, 1,2,4 for example")
  config_lib.validate(f.config)
  if f.json:
    errors.check(os.path.isdir(os.path.dirname(f.json) or "."), "json", f.json,
                 "a file in a directory that exists")
  found = bench([*map(int, f.seeds)], f.rounds, sys.argv[1:])
  print(table(found))
  if f.json:
    # Only now: a process that has looked at its GPU keeps most of its memory.
    result = {"steps_per_second": found, "config": f.config.to_dict(),
              "machine": timing.machine()}
    files.write(f.json, json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
  cli.run(main, define_flags)
