"""Timing things side by side, and where that was."""

import math
import platform
import resource
import sys
import time
from typing import Any, Callable

import jax
import numpy as np

from minw.workdir import environment

_SECONDS = 0.2  # What one measurement takes at least, compilers and caches apart.

Run = Callable[[int], None]  # Does that many steps, and waits for the last.


def measure(runs: dict[str, Run], rounds: int) -> dict[str, list[float]]:
  """The seconds that a step of each takes, once in each round.

  They take turns, so that whatever else the machine does meets all of them alike.
  """
  def seconds(run, count):
    start = time.perf_counter()
    run(count)
    return (time.perf_counter() - start) / count

  counts = {}
  for name, run in runs.items():
    run(2)  # Compiles.
    counts[name] = math.ceil(_SECONDS / seconds(run, 1))
  result = {name: [] for name in runs}
  for i in range(rounds):
    for name in list(runs)[::(-1) ** i]:  # Every second round goes backwards.
      result[name].append(seconds(runs[name], counts[name]))
  return result


def summary(values: list[float]) -> dict[str, Any]:
  """The values and their quartiles."""
  low, median, high = np.quantile(values, (0.25, 0.5, 0.75)).tolist()
  return {"low": low, "median": median, "high": high, "values": values}


def machine() -> dict[str, Any]:
  """Names of the processors, and versions."""
  versions = {"python": platform.python_version(), "jax": jax.__version__}
  if "torch" in sys.modules:
    versions["torch"] = sys.modules["torch"].__version__
  return {**environment.hardware(), "versions": versions}


def peak_bytes() -> dict[str, int]:
  """The most memory that this process had, and JAX on a device that counts it."""
  unit = 1 if sys.platform == "darwin" else 1024
  result = {"process": unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}
  statistics = jax.local_devices()[0].memory_stats() or {}
  if "peak_bytes_in_use" in statistics:
    result["device"] = statistics["peak_bytes_in_use"]
  return result
