"""Durations as people read them."""


def duration(seconds: float) -> str:
  """Writes a duration with at most two units: "42 s", "59 min", "1 h 5 min", "2 d 11 h".

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
