"""The probe: what `minw.fold` knows of activations without data.

To fold a layer's batch norm, `fold` must know for each accumulator how large it can
be, of which power of two it is a multiple, and by which scale its levels were
multiplied in training. It finds that out by running the network itself (mode="fold")
on a batch of seven "images", the rows of the probe. Layers replace the rows by those
of their results. Between layers, the network's own pooling, reshaping, concatenation
and additions act on the rows as on any other batch, so that nothing needs to be known
about them.

    ROW_BOUND  the largest magnitude that there can be
    ROW_UNIT   a power of two of which all values are multiples, or 0
    ROW_BITS   the bits of an operand
    ROW_COUNT  1
    ROW_HIGH   the upper 12 binary digits of the scale
    ROW_LOW    the lower 12 binary digits of the scale
    ROW_MARK   a hash of the scale

Maxima, copies and concatenations of equal numbers leave all rows as they are. A sum
of n equal terms multiplies all rows by n, and a mean also divides them. ROW_COUNT
therefore holds the factor k, and the other rows are found by dividing by it: a sum of
n codes of b bits, for instance, has the rows n b and n, and takes b + log2(n) bits.
Two rows are used as they are. The bound of a sum is the sum of the bounds. The unit
of a sum may be too coarse, by up to the number of terms. It is compared with the bound
to decide whether float32 holds all sums, which ordinary networks leave much room for.
Channels that a network fills with zeros have a count of 0.

**The scale** is the factor that turns the hard network's values into the trained
network's. It must come out of sums bit for bit, and is a number of 24 binary digits
(`round_scale`). In one float32 a sum would round it. Its halves of 12 digits leave
room: sums of up to 2^12 halves are exact, and where a mean rounds, 12 digits of the
quotient by the count restore the half (`scale_of`).

**The mark** reveals sums of different scales, which do not fold. Without it, the sum
of values with the scales a and b would look like a sum of two values with the scale
(a + b) / 2. The mark is (1 + r) / scale, where r in [0, 1/2) is a hash of the scale.
The mean of 1/a and 1/b exceeds the inverse of the mean, unless a = b. But if a and b
differ by a small fraction d, it does so only by d^2 / 4, which float32 hides. This is
why there is a hash:

    digits  the scale's mantissa less 1/2, times 2^24: an integer below 2^23
    hash    (digits * 40503 mod 65521)^2 mod 65521
    r       hash / 131042, where 131042 = 2 * 65521

65521 is the largest prime below 2^16, and 40503 is 2^16 divided by the golden ratio,
which spreads neighboring digits far apart (Knuth's multiplicative hashing). The
product alone is linear: modulo the prime, the hash of a mean would be the mean of the
hashes, and the sum would often pass. The square is not linear. All of this is exact
in float64, as digits * 40503 is below 2^39. Marks are rounded in sums, so that a mark
counts as right within a relative 3e-5, about 500 roundings of float32. The mark of a
wrong sum of two is right by chance in about one channel of 5,000.

A power of two has no digits, and the mark 1 / scale. For the scale 1 the count, the
upper half and the mark are therefore equal in all sums, which tells cheaply that a
network has no scales at all (`has_scale`).
"""

import math
from typing import Any, NamedTuple, Sequence

import jax
import numpy as np

from minw import quantizers

Rows = np.ndarray | jax.Array  # Layers return rows of NumPy, pooling those of JAX.

ROW_BOUND, ROW_UNIT, ROW_BITS, ROW_COUNT, ROW_HIGH, ROW_LOW, ROW_MARK = range(7)
NUM_ROWS = 7

_HALF = 12  # Binary digits of a half of the scale.
_LEAST_SCALE = 2.0 ** -60  # Smaller scales count as 0.
_HASH_FACTOR, _HASH_PRIME = 40503, 65521
_MARK_TOLERANCE = 3e-5  # Relative error of a mark after sums in float32.


class Probe(NamedTuple):
  """What is known of an activation without data.

  Each field is an array of JAX or NumPy, or a number.

  Attributes:
    bound: (...), the largest magnitude that there can be.
    unit: (...), a power of two of which all values are multiples; 0 if there is none.
    bits: (...), the bits of an operand: a grid's, a float format's, or 16 for an image.
  """

  bound: Any
  unit: Any
  bits: Any


def make_rows(probe: Probe, scale: np.ndarray | float = 1.0) -> np.ndarray:
  """Returns the batch to run a network on: float32 (7, ...).

  Args:
    probe: What is known; its fields broadcast against each other.
    scale: The scale, as `round_scale` makes it; broadcasts against these fields.
  """
  high = _digits(scale, _HALF, np.floor)
  fields = (*probe, 1.0, high, scale - high, _mark(scale))
  rows = np.empty((NUM_ROWS, *np.broadcast_shapes(*map(np.shape, fields))), np.float32)
  for row, field in zip(range(NUM_ROWS), fields):
    rows[row] = field
  return rows


def probe_of(x: Rows) -> Probe:
  """Returns what is known of an activation that nothing was summed of.

  Args:
    x: The rows of the activation, float32 (7, ...).
  """
  rows = np.asarray(x)
  return Probe(rows[ROW_BOUND], rows[ROW_UNIT], rows[ROW_BITS])


def bound_and_unit(x: Rows) -> tuple[np.ndarray, np.ndarray]:
  """Returns the largest bound and the smallest unit of each channel: float32 each.

  Args:
    x: The rows of an activation, float32 (7, ..., channels).
  """
  rows = np.asarray(x).reshape(NUM_ROWS, -1, x.shape[-1])
  return rows[ROW_BOUND].max(0), rows[ROW_UNIT].min(0)


def bits_of(x: Rows) -> int:
  """Returns the bits that an activation takes, in the channel that takes the most.

  Args:
    x: The rows of the activation, float32 (7, ...).
  """
  rows = np.asarray(x)
  bits, terms = rows[ROW_BITS].max(), rows[ROW_COUNT].max()
  return int(np.ceil(bits / terms + np.log2(terms)))


def round_scale(scale: np.ndarray | float) -> np.ndarray:
  """Returns a scale with float32's precision, in float64; below 2^-60 it is 0."""
  scale = _digits(np.asarray(scale, np.float64), 2 * _HALF)
  return np.where(scale < _LEAST_SCALE, 0.0, scale)


def has_scale(x: Rows) -> bool:
  """Returns whether an activation has a scale other than 1.

  Args:
    x: The rows of the activation, float32 (7, ...).
  """
  rows = np.asarray(x)
  count = rows[ROW_COUNT]
  return not ((count == rows[ROW_HIGH]).all() and (count == rows[ROW_MARK]).all())


def scale_of(x: Rows) -> np.ndarray:
  """Returns the scale of each channel of an activation: float64 (channels,).

  It is 1 for channels that a network filled with zeros.

  Args:
    x: The rows of the activation, float32 (7, ..., channels).

  Raises:
    ValueError: Numbers of different scales were added, or are in one channel.
  """
  if not has_scale(x):
    return np.ones(x.shape[-1])
  rows = np.asarray(x).reshape(NUM_ROWS, -1, x.shape[-1])[ROW_COUNT:]
  if (rows == rows[:, :1]).all():  # Nearly always all places are alike.
    rows = rows[:, :1]
  count, high, low, mark = rows.astype(np.float64)
  zero = count == 0
  count = np.where(zero, 1.0, count)
  scale = round_scale(_digits(high / count, _HALF) + _digits(low / count, _HALF))
  of_channel = np.where(filled(x), 1.0, scale.max(0))
  pure = np.abs(mark / count - _mark(scale)) <= _MARK_TOLERANCE * _mark(scale)
  if not (zero | pure & (scale == of_channel)).all():
    raise ValueError("gets sums of different scales, which do not fold")
  return of_channel


def filled(x: Rows) -> np.ndarray:
  """Returns which channels of an activation hold only zeros: bool (channels,).

  Args:
    x: The rows of the activation, float32 (7, ..., channels).
  """
  return (np.asarray(x)[ROW_COUNT] == 0).reshape(-1, x.shape[-1]).all(0)


def _digits(x, count, rounded=np.round):
  """Returns `x` with that many binary digits."""
  mantissa, exponent = np.frexp(x)
  return np.ldexp(rounded(np.ldexp(mantissa, count)), exponent - count)


def _mark(scale):
  """Returns (1 + r) / scale with the hash r of the module's description."""
  digits = np.ldexp(np.frexp(scale)[0] - 0.5, 2 * _HALF)
  hashed = (digits * _HASH_FACTOR % _HASH_PRIME) ** 2 % _HASH_PRIME
  with np.errstate(divide="ignore"):
    return np.where(scale == 0, 0.0, (1 + hashed / (2 * _HASH_PRIME)) / scale)


def shortcut_scale(shortcut: Rows, step: float) -> np.ndarray | None:
  """Returns the factor of a shortcut's levels, in units of `step`.

  Args:
    shortcut: The rows of the shortcut, float32 (7, ..., channels).
    step: The scale of the layer that adds the shortcut.

  Returns:
    float32 (channels,), or None if all are 1.

  Raises:
    ValueError: A factor is not 1, and products with it would be rounded. Only levels,
      which are powers of two, have exact ones.
  """
  scale = np.where(filled(shortcut), 1.0, scale_of(shortcut) / step)
  if (scale == 1).all():
    return None
  if np.max(np.asarray(shortcut)[ROW_BITS]) not in quantizers.GRID_BITS:
    raise ValueError("gets a shortcut that is not quantized, of another scale")
  return scale.astype(np.float32)


def linear(
    x: Rows,
    kernel: np.ndarray,
    bits: int | str,
    pad_value: float,
    output_shape: Sequence[int],
    scale: np.ndarray | float = 1.0,
) -> np.ndarray:
  """Returns the rows that a convolution or dense layer makes of its input's.

  Args:
    x: The rows of the input, float32 (7, ..., input channels).
    kernel: (..., input channels, output channels), on its grid. For a convolution in
      groups, (..., input channels / groups, output channels).
    bits: Bits of the kernel.
    pad_value: Value of the convolution's padding; 0 if it has none.
    output_shape: (..., output channels).
    scale: Scale of the kernel, () or (output channels,).

  Returns:
    float32 (7, *output_shape).

  Raises:
    ValueError: The input channels of a group, or input and padding, have different
      scales.
  """
  inputs, outputs = kernel.shape[-2:]
  groups = x.shape[-1] // inputs
  of_output = lambda group: np.repeat(group, outputs // groups)
  input_scale = _scale_of_groups(x, groups)
  if pad_value and (input_scale != 1).any():
    raise ValueError(f"pad_value={pad_value} beside inputs that have a scale")
  bound, unit = (
      row.astype(np.float64).reshape(groups, inputs) for row in bound_and_unit(x))
  bound = np.maximum(bound, abs(pad_value))
  if bits == 1 and unit.all():  # All weights are 1 or -1, and the sums are exact.
    bound = of_output(bound.sum(1) * math.prod(kernel.shape[:-2]))
  else:
    fan_in = np.abs(kernel).reshape(-1, inputs, groups, outputs // groups).sum(
        0, dtype=np.float64)
    bound = np.einsum("gi,igo->go", bound, fan_in).reshape(-1)
  unit = quantizers.step_size(bits) * of_output(unit.min(1))
  return make_rows(Probe(np.broadcast_to(bound, output_shape), unit, 32.0),
                   round_scale(of_output(input_scale) * scale))


def _scale_of_groups(x: Rows, groups: int) -> np.ndarray:
  """Returns the scale that the channels of each group share: float64 (groups,)."""
  scales = scale_of(x).reshape(groups, -1)
  zeros = filled(x).reshape(groups, -1)
  scale = np.where(zeros, 0.0, scales).max(1)
  if (~zeros & (scales != scale[:, None])).any():
    raise ValueError("gets channels of different scales, which do not fold")
  return np.where(zeros.all(1), 1.0, scale)
