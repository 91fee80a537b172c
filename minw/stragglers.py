"""Times of the steps of each process, which show the process that all wait for."""

from typing import Sequence

import numpy as np

from minw import distributed


def gather_line(seconds_per_step: tuple[float, float]) -> str:
  """Describes the times of all processes, which must all call this function.

  Args:
    seconds_per_step: Those of this process; see `Progress.seconds_per_step`.
  """
  return line(distributed.gather_numbers(seconds_per_step))


def line(times: Sequence[Sequence[float]] | np.ndarray) -> str:
  """Describes times of steps and of batches in seconds, (processes, 2)."""
  return "; ".join(
      f"{name}: {1e3 * column.mean():.1f} ms on average, {1e3 * column.max():.1f} ms on"
      f" process {column.argmax()}"
      for name, column in zip(("a step", "its batch"), np.asarray(times).T))
