"""Benchmark of training several seeds at once: as processes, or as one program.

The processes are started as by `launch/sweep.py --jobs`, each on separate cores. The
single program applies `jax.vmap` over parameters and batches and uses the whole
machine. Images are random. All processes are started again in each round.

This was tried on CPUs. Its purpose is to find out which way is faster on GPUs.
"""

import statistics
import subprocess
import sys
import time
from typing import Any, Callable, Sequence

import jax
import jax.numpy as jnp

from minw import config as config_lib
from minw import errors
from minw import places
from minw import train_step
from minw.bench import timing
from minw.bench import train as bench_train
from minw.data import resident
from minw.experiment import Experiment


def work(config: Any, seeds: int, seconds: float) -> None:
  """Measures one process: compiles, waits for a line, and prints steps per second.

  Args:
    config: Config of the runs.
    seeds: Number of seeds in the program. The steps of all seeds are counted.
    seconds: Shortest duration of the measurement.
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


def _one_program(config: Any, seeds: int) -> Callable[[], None]:
  """Returns a function that trains ten steps of each seed and waits for them."""
  experiment = Experiment(config)
  data, _ = bench_train.random_batch(experiment)
  size = experiment.info.splits["train"]

  def one_step(state, seed, order, data):
    batch_key, noise_key = jax.random.split(
        jax.random.fold_in(jax.random.key(seed), state.step))
    batch = experiment.data.train_inputs(
        data, order, state.step % experiment.steps_per_epoch, batch_key)
    return train_step.update(experiment, state, *batch, noise_key)[0]

  numbers = jnp.arange(seeds)
  orders = jax.vmap(lambda seed: resident.epoch_order(seed, 0, size))(numbers)
  state = train_step.make_init_state(experiment)()
  if seeds > 1:
    state = jax.tree.map(lambda leaf: jnp.stack([leaf] * seeds), state)
    one_step = jax.vmap(one_step, in_axes=(0, 0, 0, None))
  else:  # A single seed is trained as in `minw.main`, without a vmapped dimension.
    numbers, orders = numbers[0], orders[0]
  step = experiment.jit(one_step, donate_argnums=0)

  def ten_steps():
    nonlocal state
    for _ in range(10):
      state = step(state, numbers, orders, data)
    jax.block_until_ready(state)

  return ten_steps


def measure(processes: int, seeds: int, arguments: Sequence[str]) -> float:
  """Measures the steps per second of several processes together.

  Args:
    processes: Number of processes.
    seeds: Number of seeds in each process.
    arguments: Arguments of the command that give its processes the config and the
      length of a measurement.

  Raises:
    errors.UsageError: A process ended before it trained.
  """
  command = [sys.executable, "-m", "minw.bench", "throughput", f"--work={seeds}",
             *arguments]
  started: list[Any] = [  # Any: their pipes are not None.
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


def bench_throughput(
    config: Any, seeds: Sequence[int], rounds: int, arguments: Sequence[str]
) -> dict[str, Any]:
  """Measures all numbers of seeds, in turn as processes and as one program.

  Args:
    config: See `config.default_config`.
    seeds: Numbers of seeds to compare.
    rounds: Number of measurements of each number of seeds and each way.
    arguments: Arguments of the command that give its processes the config and the
      length of a measurement.

  Returns:
    The object that --json writes. `steps_per_second` has for "processes" and "program"
    and for each number of seeds a list with one number for each round. The config and
    the machine are described, too.

  Raises:
    errors.UsageError: The config cannot be run.
  """
  config_lib.validate(config)
  ways = {"processes": lambda count: measure(count, 1, arguments),
          "program": lambda count: measure(1, count, arguments)}
  found = {way: {count: [] for count in seeds} for way in ways}
  for _ in range(rounds):
    for count in seeds:
      for way, run in ways.items():
        found[way][count].append(run(count))
  # The machine is asked last: a process that has looked at its GPU keeps most of its
  # memory.
  return {"steps_per_second": found, "config": config.to_dict(),
          "machine": timing.machine()}


def table(result: dict[str, Any]) -> str:
  """Formats the result: medians, and the median of each round's ratio of both ways."""
  found = result["steps_per_second"]
  lines = [f"{'seeds':>5}{'processes':>14}{'one program':>14}"
           f"{'processes / program':>22}",
           f"{'':5}{'steps/s':>14}{'steps/s':>14}"]
  for count, processes in found["processes"].items():
    program = found["program"][count]
    ratio = statistics.median(a / b for a, b in zip(processes, program))
    lines.append(f"{count:5}{statistics.median(processes):14.2f}"
                 f"{statistics.median(program):14.2f}{ratio:22.2f}")
  return "\n".join(lines)
