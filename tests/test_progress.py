"""minw.progress."""

import types

import pytest

from minw import progress

MINUTE, HOUR, DAY = 60, 3600, 86400


@pytest.mark.parametrize("seconds, text", [
    (0, "0 s"), (0.4, "0 s"), (41.6, "42 s"), (59.4, "59 s"), (59.6, "1 min"),
    (90 * MINUTE, "1 h 30 min"), (59 * MINUTE + 29, "59 min"), (HOUR - 1, "1 h"),
    (HOUR, "1 h"), (DAY - 31, "23 h 59 min"), (DAY - 29, "1 d"), (DAY, "1 d"),
    (2 * DAY + 11 * HOUR + 17 * MINUTE, "2 d 11 h"),  # Earlier: 3557.0 minutes.
    (3557 * MINUTE, "2 d 11 h"), (100 * DAY, "100 d"),
])
def test_duration(seconds, text):
  assert progress.duration(seconds) == text


def test_times_of_steps_and_batches(monkeypatch):
  clock = [100.0]
  monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])

  def batches():
    while True:
      clock[0] += 3
      yield "a batch"

  def do(steps):
    for _ in range(steps):
      assert measured.next_batch(source) == "a batch"
      clock[0] += 4
      measured.stepped(types.SimpleNamespace(block_until_ready=int))

  source, measured = batches(), progress.Progress(0, 9, 32)
  do(1)  # It compiles and is not timed.
  assert measured.seconds_per_step() == (0, 0)
  do(2)
  assert measured.seconds_per_step() == (7, 3)
  measured.resume()
  assert measured.seconds_per_step() == (0, 0)
  do(1)
  assert measured.seconds_per_step() == (7, 3)
