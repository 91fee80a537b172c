"""minw.stragglers: the process that all wait for is named."""

from minw import stragglers


def test_the_slowest_process_is_named():
  assert stragglers.line([(0.1, 0.001), (0.1, 0.04), (0.13, 0.001), (0.1, 0.002)]) == (
      "a step: 107.5 ms on average, 130.0 ms on process 2;"
      " its batch: 11.0 ms on average, 40.0 ms on process 1")


def test_alone():
  assert stragglers.gather_line((0.5, 0.25)) == (
      "a step: 500.0 ms on average, 500.0 ms on process 0;"
      " its batch: 250.0 ms on average, 250.0 ms on process 0")
