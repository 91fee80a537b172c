"""Timing of several functions side by side, and a description of the machine."""

import contextlib
from importlib import metadata
import math
import platform
import resource
import sys
import time
from typing import Any, Callable, Iterable, Mapping

import jax
import numpy as np

from minw.workdir import environment

_SECONDS = 0.2  # Shortest duration of a measurement, apart from compilation.

Run = Callable[[int], None]  # Runs a number of steps and waits for the last.


def measure(runs: Mapping[Any, Run], rounds: int) -> dict[Any, list[float]]:
  """Measures the seconds per step of several functions.

  The functions take turns, so that other load on the machine affects all of them alike.

  Args:
    runs: Functions by name.
    rounds: Number of measurements of each function.

  Returns:
    Seconds per step by name, one number for each round.
  """
  def seconds(run, count):
    start = time.perf_counter()
    run(count)
    return (time.perf_counter() - start) / count

  counts = {}
  for name, run in runs.items():
    run(2)  # Compile before timing.
    counts[name] = math.ceil(_SECONDS / seconds(run, 1))
  result = {name: [] for name in runs}
  for i in range(rounds):
    for name in list(runs)[::(-1) ** i]:  # Every second round has the reverse order.
      result[name].append(seconds(runs[name], counts[name]))
  return result


def summary(values: list[float]) -> dict[str, Any]:
  """Returns the values and their quartiles."""
  low, median, high = np.quantile(values, (0.25, 0.5, 0.75)).tolist()
  return {"low": low, "median": median, "high": high, "values": values}


def machine(packages: Iterable[str] = ()) -> dict[str, Any]:
  """Returns the names of the processors, and versions of Python and packages.

  Args:
    packages: Packages whose versions are added if they are installed.
  """
  versions = {"python": platform.python_version(), "jax": jax.__version__}
  for name in packages:
    with contextlib.suppress(metadata.PackageNotFoundError):
      versions[name] = metadata.version(name)
  if "torch" in sys.modules:
    versions["torch"] = sys.modules["torch"].__version__
  return {**environment.hardware(), "versions": versions}


def peak_bytes() -> dict[str, int]:
  """Returns the peak memory in bytes of this process and of the device.

  The device is left out if it does not count its memory.
  """
  unit = 1 if sys.platform == "darwin" else 1024
  result = {"process": unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}
  statistics = jax.local_devices()[0].memory_stats() or {}
  if "peak_bytes_in_use" in statistics:
    result["device"] = statistics["peak_bytes_in_use"]
  return result
