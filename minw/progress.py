"""Progress of a run: its rate, and durations in words."""

import collections
import time
from typing import Any, Iterator

_STEPS_IN_FLIGHT = 4  # Number of steps that the loop may be ahead of the device.
LINE_SECONDS = 10.0  # Seconds between two lines of progress.


def duration(seconds: float) -> str:
  """Writes a duration with at most two units: "42 s", "1 h 5 min", "2 d 11 h".

  Args:
    seconds: Duration in seconds, at least 0.
  """
  minutes, hours = round(seconds / 60), round(seconds / 3600)
  if round(seconds) < 60:
    return f"{round(seconds)} s"
  if minutes < 24 * 60:
    return _two(minutes // 60, "h", minutes % 60, "min")
  return _two(hours // 24, "d", hours % 24, "h")


def _two(large: int, large_unit: str, small: int, small_unit: str) -> str:
  parts = [(large, large_unit), (small, small_unit)]
  return " ".join(f"{count} {unit}" for count, unit in parts if count)


class Progress:
  """Keeps the training loop a few steps ahead of the device, and measures its rate."""

  def __init__(self, step: int, num_steps: int, batch_size: int):
    self._left = num_steps - step
    self._batch_size = batch_size
    self._in_flight = collections.deque()
    self._steps = 0  # Number of steps since the clock was started.
    self._batch_seconds = 0.0  # Time in `next_batch` since the clock was started.
    self._since: Any = None  # The clock starts after the first step, which compiles.
    self._next_line = time.monotonic() + LINE_SECONDS

  def next_batch(self, batches: Iterator[Any]) -> Any:
    """Returns the next batch, and measures how long it takes."""
    begun = time.monotonic()
    batch = next(batches)
    self._batch_seconds += time.monotonic() - begun
    return batch

  def seconds_per_step(self) -> tuple[float, float]:
    """Returns the time of a step and of `next_batch`, means since the last pause.

    Steps of several processes wait for each other, and their batches do not.
    """
    if not self._steps:
      return 0.0, 0.0
    return ((time.monotonic() - self._since) / self._steps,
            self._batch_seconds / self._steps)

  def stepped(self, loss: Any) -> bool:
    """Counts a step that was dispatched, and waits if the device is far behind.

    Args:
      loss: Array that the step computes.

    Returns:
      Whether this was the first step. It includes compilation and is not timed.
    """
    self._left -= 1
    self._in_flight.append(loss)
    if self._since is None:
      loss.block_until_ready()
      self.resume()
      return True
    self._steps += 1
    if len(self._in_flight) > _STEPS_IN_FLIGHT:
      self._in_flight.popleft().block_until_ready()
    return False

  def due(self) -> bool:
    """Returns whether the next line of progress is due."""
    return time.monotonic() >= self._next_line

  def line(self) -> str:
    """Returns rate and time left. The next line is due after `LINE_SECONDS`."""
    self._next_line = time.monotonic() + LINE_SECONDS
    rate = self._rate()
    if not rate:
      return "measuring the rate"
    left = duration(self._left * self._batch_size / rate)
    return f"{rate:.0f} examples/s, {left} left"

  def pause(self) -> float | None:
    """Waits for the device. Returns the examples per second since the last pause."""
    if self._in_flight:
      self._in_flight[-1].block_until_ready()
    return self._rate()

  def resume(self) -> None:
    """Starts the clock again."""
    self._steps, self._batch_seconds, self._since = 0, 0.0, time.monotonic()

  def _rate(self) -> float | None:
    if not self._steps:
      return None
    return self._steps * self._batch_size / (time.monotonic() - self._since)
