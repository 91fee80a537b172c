"""minw.fold_probe: scales survive sums, and sums of different scales are noticed."""

import numpy as np
import pytest

from minw import fold_probe


def probe_rows(shape, bound, unit, scale=1.0):
  """A probe as layers receive it; one bound for each channel."""
  bound = np.broadcast_to(np.float32(bound), shape)
  return np.asarray(fold_probe.make_rows(fold_probe.Probe(bound, unit, 16.0), scale))


def test_rows_by_name():
  rows = probe_rows((2,), (3.0, 4.0), 0.5, 0.75 + 2.0**-20)
  want = {"BOUND": (3, 4), "UNIT": 0.5, "BITS": 16, "COUNT": 1, "HIGH": 0.75,
          "LOW": 2.0**-20}
  for name, value in want.items():
    row = rows[getattr(fold_probe, f"ROW_{name}")]
    np.testing.assert_array_equal(row, np.broadcast_to(value, 2), name)
  assert len(rows) == fold_probe.NUM_ROWS == len(want) + 1
  # The digits of the scale are 2^22 + 16: its mantissa is 0.75 + 2^-20.
  hashed = ((2**22 + 16) * 40503 % 65521) ** 2 % 65521
  np.testing.assert_allclose(
      rows[fold_probe.ROW_MARK], (1 + hashed / 131042) / (0.75 + 2.0**-20), rtol=1e-7)


def test_what_rows_tell():
  rows = probe_rows((2, 3, 2), (3.0, 4.0), 0.5)
  bound, unit = fold_probe.bound_and_unit(rows)
  assert (bound.tolist(), unit.tolist()) == ([3, 4], [0.5, 0.5])
  assert fold_probe.bits_of(rows) == 16
  assert fold_probe.bits_of(rows.sum((1, 2))) == 16 + 3  # Sums of 6 terms.
  known = fold_probe.probe_of(rows)
  np.testing.assert_array_equal(known.bound[0, 0], [3, 4])
  assert known.unit[0, 0].tolist() == [0.5, 0.5]
  assert known.bits[0, 0].tolist() == [16, 16]


def test_whether_there_is_a_scale():
  for scale, has in ((1.0, False), (2.0, True), (0.3, True), (0.0, True)):
    rows = probe_rows((2, 3, 2), 3.0, 0.5, fold_probe.round_scale(scale))
    for image in (rows, rows.sum(1), rows.mean((1, 2))):
      assert fold_probe.has_scale(image) is has


def test_scales_survive_what_stands_between_layers():
  rng = np.random.default_rng(0)
  scales = fold_probe.round_scale(2.0 ** rng.uniform(-40, 3, 50))
  np.testing.assert_allclose(scales, np.float32(scales), rtol=0)
  for scale in (scales, 1.0, 0.0):
    rows = probe_rows((6, 7, 50), 3.0, 0.5, scale)
    for image in (rows, rows.sum((1, 2), keepdims=True), rows[:, ::2, :3] / 4,
                  rows.reshape(7, 2, 3, 7, 50).max((1, 2)), rows + 7 * rows,
                  rows.mean((1, 2), dtype=np.float32)):
      np.testing.assert_array_equal(
          fold_probe.scale_of(image), np.broadcast_to(scale, 50))
  filled = np.pad(rows, [(0, 0)] * 3 + [(1, 2)])
  np.testing.assert_array_equal(np.flatnonzero(fold_probe.filled(filled)), [0, 51, 52])
  assert fold_probe.scale_of(filled).tolist() == [1] + [0] * 50 + [1, 1]


@pytest.mark.parametrize("a, b", [
    (1.0, 2.0), (0.3, 0.300001), (0.5, 0.0), (1.0, 1 + 2**-20), (3e-5, 7.0),
    (0.5, 1.5), (0.71, 0.7100001)])
def test_sums_of_different_scales_are_refused(a, b):
  a, b = (probe_rows((3, 3, 1), 1.0, 1.0, fold_probe.round_scale(s)) for s in (a, b))
  beside = np.concatenate([a, b], 1)
  for rows in (a + b, a + b / 4, (3 * a + b).sum(1), beside,
               beside[:, ::3].mean((1, 2)), b + 1):
    with pytest.raises(ValueError, match="gets sums of different scales"):
      fold_probe.scale_of(rows)


def test_without_scales_nothing_is_refused():
  rows = probe_rows((3, 3, 2), 1.0, 1.0)
  for image in (rows + 1, rows * rows, np.sin(rows), rows * 0):
    np.testing.assert_array_equal(fold_probe.scale_of(image), [1, 1])


def test_nearly_all_sums_of_close_scales_are_refused():
  """By the hash: the marks of the inverses alone differ by d^2 / 4."""
  rng = np.random.default_rng(2)
  a = fold_probe.round_scale(rng.uniform(0.01, 3, 20_000))
  b = fold_probe.round_scale(a * (1 + 10.0 ** rng.uniform(-6, -1, a.size)))
  a, b = a[a != b], b[a != b]
  both = sum(probe_rows(a.shape, 1.0, 1.0, scale) for scale in (a, b))
  refused = 0
  for channel in range(a.size):
    try:
      fold_probe.scale_of(both[:, channel:channel + 1])
    except ValueError:
      refused += 1
  assert refused > 0.999 * a.size
