"""The quantizers h of MINW-Nets, which are odd step functions onto a symmetric grid.

Equation numbers refer to Chen et al., "Propagating Asymptotic-Estimated Gradients
for Low Bitwidth Quantized Neural Networks" (arXiv 2003.04296).

An operand is either on a grid or in a float format. A grid is named by its number of
bits n = 1..5, and a float format by its dtype. A grid of n bits has these levels:

    n = 1:  -1, 1                                   (Eq 4)
    n = 2:  -1, 0, 1                                (Eq 21)
    n > 2:  0, +-2^-(q-1), ..., +-1/2, +-1          (Eq 22), q = 2^(n-1) - 1

All functions are pure. They work under jit, vmap, scan and sharding, and keep the dtype
of `x`. A magnitude below `SMALLEST` counts as 0 everywhere, because some devices flush
denormal numbers to zero and others do not. For example, h(1e-40) = -1 for one bit.
"""

import functools
from typing import Any, NamedTuple, Sequence

import jax
from jax import core
from jax import lax
import jax.numpy as jnp
import numpy as np

GRID_BITS = (1, 2, 3, 4, 5)
FLOAT_FORMATS = ("float8_e4m3fn", "bfloat16", "float16", "float32")
ALLOWED_BITS = (f"one of {', '.join(map(str, GRID_BITS))} or a float format named by"
                f" its dtype: {', '.join(FLOAT_FORMATS)}")  # Part of error messages.
THRESHOLD_RULES = ("layer_mean", "channel_mean", "fixed")
SMALLEST = 2.0 ** -126  # The smallest normal float32 number.

# The paper does not give its thresholds. These are this library's choices. For powers
# of two, thresholds are midpoints between levels. For ternary activations, the paper's
# figures show a gap of 0.05 to 0.1. For ternary weights, the factor is that of Ternary
# Weight Networks.
_TERNARY_THRESHOLD = 0.1
_TERNARY_FACTOR = 0.7
_POWERS_FACTOR = 2.5

# Smallest distance of learned thresholds, as a fraction of the sum of their widths, and
# what is added to this sum, which is not to be 0.
_LEAST_WIDTH = 2.0 ** -20
_NO_WIDTH = 2.0 ** -40

Thresholds = jax.Array | np.ndarray | Sequence[float]


class Grid(NamedTuple):
  """A symmetric grid with the thresholds between its levels, as a pytree.

  Attributes:
    thresholds: Float array (q, ...), positive and ascending along axis 0. The other
      axes broadcast against the trailing axes of the input. For one bit it is empty (q
      = 0).
    magnitudes: Float array (max(q, 1),) of the ascending positive levels.
  """

  thresholds: jax.Array
  magnitudes: jax.Array


def is_grid(bits: int | str) -> bool:
  """Whether `bits` names a grid (True) or a float format (False).

  Raises:
    ValueError: `bits` is neither one of `GRID_BITS` nor one of `FLOAT_FORMATS`.

  Examples:
    >>> quantizers.is_grid(2), quantizers.is_grid("bfloat16")
    (True, False)
  """
  if type(bits) is int and bits in GRID_BITS:
    return True
  if isinstance(bits, str) and bits in FLOAT_FORMATS:
    return False
  raise ValueError(f"bits={bits!r}: must be {ALLOWED_BITS}")


def num_thresholds(bits: int) -> int:
  """The number q of positive thresholds of a grid: 0, 1, 3, 7 or 15.

  Raises:
    ValueError: `bits` is not the number of bits of a grid.

  Examples:
    >>> [quantizers.num_thresholds(bits) for bits in (1, 2, 3)]
    [0, 1, 3]
  """
  if not is_grid(bits):
    raise ValueError(f"bits={bits!r} is a float format; a grid has 1 to 5 bits")
  return 2 ** (bits - 1) - 1


def check_float(name: str, x: Any) -> None:
  """Checks that an argument is a float array. This also works under tracing.

  Args:
    name: Name of the argument, for the error message.
    x: The argument.

  Raises:
    TypeError: `x` is not an array of a real float dtype.

  Examples:
    >>> quantizers.check_float("x", 1)
    Traceback (most recent call last):
      ...
    TypeError: x=1: must be a float array
  """
  dtype = getattr(x, "dtype", None)
  if dtype is None:
    raise TypeError(f"{name}={x!r:.80}: must be a float array")
  if not jnp.issubdtype(dtype, jnp.floating):
    raise TypeError(f"{name} of dtype {dtype}: must be a float array")


def _check_grid(grid: Any) -> None:
  if not isinstance(grid, Grid):
    raise TypeError(f"grid={grid!r:.80}: must be a Grid, which `quantizers.grid` makes")
  check_float("grid.thresholds", grid.thresholds)


def _check_thresholds(name: str, thresholds: Any, bits: int) -> None:
  """Raises an error if thresholds, or factors that give them, do not fit `bits`."""
  q = num_thresholds(bits)
  traced = isinstance(thresholds, core.Tracer)
  values = thresholds if traced else np.asarray(thresholds)
  given = f"{name} of shape {values.shape}" if traced else f"{name}={thresholds!r}"
  if values.shape[:1] != (q,):
    raise ValueError(f"{given}: must be {q} for bits={bits}")
  if not any(jnp.issubdtype(values.dtype, kind) for kind in (np.floating, np.integer)):
    raise TypeError(f"{given} of dtype {values.dtype}: must be real numbers")
  if not traced:
    with np.errstate(over="ignore"):
      values = values.astype(jnp.result_type(float))
    steps = np.diff(values, axis=0, prepend=0)
    if not (np.isfinite(values) & (steps > 0)).all():
      raise ValueError(f"{given}: must be finite, positive and ascending")


def level_magnitudes(bits: int) -> np.ndarray:
  """The ascending positive levels of a grid (Eq 4, 21, 22), float32 (max(q, 1),).

  Examples:
    >>> quantizers.level_magnitudes(3)
    array([0.25, 0.5 , 1.  ], dtype=float32)
  """
  q = max(num_thresholds(bits), 1)
  return np.exp2(np.arange(1.0 - q, 1.0)).astype(np.float32)


def step_size(bits: int | str) -> float:
  """The largest number that divides all levels of a grid, or 0 for a float format.

  Examples:
    >>> quantizers.step_size(3)
    0.25
  """
  if not is_grid(bits) or isinstance(bits, str):
    return 0.0
  return float(level_magnitudes(bits)[0])


def fixed_thresholds(bits: int) -> np.ndarray:
  """The default fixed thresholds of a grid, float64 (q,).

  For two bits the threshold is 0.1. For more bits the thresholds are the midpoints
  between neighboring levels.

  Examples:
    >>> quantizers.fixed_thresholds(3)  # Levels are 0, 0.25, 0.5 and 1.
    array([0.125, 0.375, 0.75 ])
  """
  q = num_thresholds(bits)
  if bits <= 2:
    return np.full(q, _TERNARY_THRESHOLD)
  levels = level_magnitudes(bits).astype(np.float64)
  return (np.concatenate([[0.0], levels[:-1]]) + levels) / 2


def unit_thresholds(bits: int, thresholds: Sequence[float] = ()) -> np.ndarray:
  """The thresholds of a grid with a learned step, in units of the step: float64 (q,).

  The given `thresholds` are used if there are q of them. Otherwise the thresholds are
  the midpoints between levels, which is 0.5 for two bits. They round to the nearest
  level, as in LSQ.

  Examples:
    >>> quantizers.unit_thresholds(2)
    array([0.5])
  """
  if len(thresholds) == num_thresholds(bits):
    return np.asarray(thresholds, np.float64)
  return fixed_thresholds(bits) if bits > 2 else np.full(num_thresholds(bits), 0.5)


def positive_step(step: Any) -> Any:
  """Converts a parameter of any sign to a positive step, |step| + 2^-20 (float).

  Examples:
    >>> quantizers.positive_step(-0.5) == 0.5 + 2**-20
    True
  """
  return abs(step) + 2.0**-20


def learned_thresholds(widths: Any) -> Any:
  """The thresholds of activations that learn the widths of their steps.

  The widths divide the interval from 0 to 1. Let a be their magnitudes plus 2^-20 of
  the sum of these. The i-th threshold is (a_1 + ... + a_i) / (a_1 + ... + a_(q+1)). For
  any widths, thresholds ascend from more than 0 to less than 1, and differ in float32.

  Args:
    widths: Widths (q + 1, ...) of any sign, a JAX or a NumPy array.

  Returns:
    Thresholds (q, ...), an array of the same kind.

  Examples:
    >>> quantizers.learned_thresholds(np.array([1.0, -1.0, 2.0])).round(3)
    array([0.25, 0.5 ])
  """
  sizes = abs(widths)
  least = _LEAST_WIDTH * (sizes.sum(0, keepdims=True) + _NO_WIDTH)
  ends = (sizes + least).cumsum(0)
  return ends[:-1] / ends[-1:]


def along_channels(thresholds: Any, ndim: int) -> Any:
  """Thresholds (q, channels) with axes for inputs of `ndim` axes, the last of channels.

  Examples:
    >>> quantizers.along_channels(np.ones((1, 8)), ndim=4).shape
    (1, 1, 1, 1, 8)
  """
  q, channels = thresholds.shape
  return thresholds.reshape(q, *(1,) * (ndim - 1), channels)


def threshold_widths(thresholds: np.ndarray) -> np.ndarray:
  """The widths from which `learned_thresholds` makes these thresholds.

  Raises:
    ValueError: A threshold is 1 or more.

  Examples:
    >>> quantizers.threshold_widths(np.array([0.25, 0.5])).round(3)
    array([0.25, 0.25, 0.5 ])
  """
  if not (np.asarray(thresholds) < 1).all():
    raise ValueError(f"thresholds={thresholds!r}: must be less than 1 to be learned")
  widths = np.diff(thresholds, prepend=0, append=1)
  return widths * (1 + len(widths) * _LEAST_WIDTH) - _LEAST_WIDTH


def stretch(x: jax.Array, thresholds: jax.Array, fixed: jax.Array) -> jax.Array:
  """Maps learned thresholds to fixed ones, along straight lines between them.

  The map is odd and piecewise linear, from 0 to 0, from each learned threshold to the
  fixed one, and from 1 to 1. It is monotone. Therefore h of the result, with the fixed
  thresholds, is h of `x` with the learned ones. The gradient is that of the map: with
  the straight-through estimator behind it, this is the generalized straight-through
  estimator of Liu et al. (arXiv 2111.14826), which passes g times the slope of each
  interval, and learns thresholds.

  Args:
    x: Float array (..., channels) of numbers in [-1, 1].
    thresholds: Learned thresholds (q, channels), ascending and inside (0, 1).
    fixed: Fixed thresholds (q,), ascending and inside (0, 1).

  Returns:
    Array of the shape and dtype of `x`.

  Examples:
    >>> x, learned = jnp.array([0.25, -0.5, 0.75]), jnp.array([[0.5] * 3])
    >>> quantizers.stretch(x, learned, jnp.array([0.25]))  # Slopes are 1/2 and 3/2.
    Array([ 0.125, -0.25 ,  0.625], dtype=float32)
  """
  thresholds = along_channels(thresholds, x.ndim)
  sign = jnp.where(x < 0, -1, 1).astype(x.dtype)
  size, y = sign * x, jnp.zeros_like(x)
  low, low_fixed = jnp.zeros_like(thresholds[0]), 0.0
  for high, high_fixed in zip([*thresholds, 1.0], [*fixed, 1.0]):
    slope = (high_fixed - low_fixed) / (high - low)
    y = jnp.where(size >= low, low_fixed + (size - low) * slope, y)
    low, low_fixed = high, high_fixed
  return (sign * y).astype(x.dtype)


def mean_factors(bits: int) -> np.ndarray:
  """The default factors of `mean_thresholds`, float64 (q,).

  For two bits the factor is 0.7, from Ternary Weight Networks, after which Eq 21 is
  modelled. For powers of two the factors are 2.5 times the midpoints between levels,
  for example (0.31, 0.94, 1.88) for three bits.

  Examples:
    >>> quantizers.mean_factors(2)
    array([0.7])
  """
  q = num_thresholds(bits)
  if bits <= 2:
    return np.full(q, _TERNARY_FACTOR)
  return _POWERS_FACTOR * fixed_thresholds(bits)


def mean_thresholds(
    weights: jax.Array,
    bits: int,
    *,
    per_channel: bool = False,
    factors: np.ndarray | Sequence[float] | None = None,
) -> jax.Array:
  """Thresholds proportional to the mean magnitude of the weights (after TWN).

  Args:
    weights: Float array (..., channels).
    bits: Number of bits of the grid, 1 to 5.
    per_channel: Whether each output channel (the last axis) has a mean of its own,
      instead of one mean over all weights.
    factors: Ascending factors (q,) on the mean; `mean_factors(bits)` if None.

  Returns:
    Array (q,), or (q, channels) if `per_channel`. The dtype is float64 if the weights
    are float64, otherwise float32. There is no gradient to the weights.

  Raises:
    TypeError: The weights are not float, or the factors are not real numbers.
    ValueError: The factors are not q finite, positive and ascending numbers.

  Examples:
    >>> weights = jnp.array([[1.0, 2.0], [-3.0, -6.0]])  # The mean magnitude is 3.
    >>> quantizers.mean_thresholds(weights, bits=2, factors=[0.5])
    Array([1.5], dtype=float32)
  """
  check_float("weights", weights)
  values = mean_factors(bits) if factors is None else np.asarray(factors)
  _check_thresholds("factors", values, bits)
  wide = compute_dtype(weights)
  axes = tuple(range(weights.ndim - 1)) if per_channel else None
  mean = jnp.mean(jnp.abs(lax.stop_gradient(weights)).astype(wide), axis=axes)
  shape = (-1,) + (1,) * mean.ndim
  return mean[None] * values.astype(wide).reshape(shape)


def grid(bits: int, thresholds: Thresholds | None = None) -> Grid:
  """The grid of `bits` bits (Eq 4, 21, 22).

  Args:
    bits: Number of bits, 1 to 5.
    thresholds: Positive thresholds (q, ...), ascending along axis 0, with
      q = 2^(bits-1) - 1. They may be traced. If None, `fixed_thresholds(bits)` is used.

  Returns:
    The grid, in JAX's default float dtype.

  Raises:
    ValueError: There is no such grid, the number of thresholds is wrong, or concrete
      thresholds are not finite, positive and ascending.
    TypeError: The thresholds are not real numbers.

  Examples:
    >>> quantizers.grid(3).thresholds
    Array([0.125, 0.375, 0.75 ], dtype=float32)
  """
  if thresholds is None:
    thresholds = fixed_thresholds(bits)
  _check_thresholds("thresholds", thresholds, bits)
  dtype = jnp.result_type(float)
  return Grid(jnp.asarray(thresholds, dtype),
              jnp.asarray(level_magnitudes(bits), dtype))


def weight_factors(
    bits: int, rule: str, thresholds: Sequence[float] = ()
) -> np.ndarray:
  """The fixed thresholds of `weight_grid`, or its factors on the mean: float64 (q,).

  The given `thresholds` are used if there are q of them. Otherwise the defaults are
  used, because a network whose layers differ in bits has a single setting.

  Raises:
    ValueError: `rule` is not one of `THRESHOLD_RULES`.

  Examples:
    >>> [quantizers.weight_factors(2, rule) for rule in ("layer_mean", "fixed")]
    [array([0.7]), array([0.1])]
  """
  if rule not in THRESHOLD_RULES:
    raise ValueError(f"rule={rule!r}: must be one of {', '.join(THRESHOLD_RULES)}")
  if len(thresholds) == num_thresholds(bits):
    return np.asarray(thresholds, np.float64)
  return fixed_thresholds(bits) if rule == "fixed" else mean_factors(bits)


def weight_grid(
    weights: jax.Array,
    bits: int,
    rule: str = "layer_mean",
    thresholds: Sequence[float] = (),
    *,
    learned: bool = False,
) -> Grid:
  """The grid that weights are quantized on.

  Args:
    weights: Float array (..., output channels).
    bits: Number of bits, 1 to 5.
    rule: "fixed" for fixed thresholds. "layer_mean" and "channel_mean" make them
      proportional to the mean magnitude of all weights or of each output channel's.
    thresholds: Fixed thresholds or factors on the mean; see `weight_factors`.
    learned: Whether the step of the grid is learned. Then the grid is in units of the
      step, see `unit_thresholds`, and `rule` is ignored.

  Examples:
    >>> weights = jnp.array([[1.0, 2.0], [-3.0, -6.0]])  # Means of channels: 2 and 4.
    >>> quantizers.weight_grid(weights, 2, "channel_mean", thresholds=[0.5]).thresholds
    Array([[1., 2.]], dtype=float32)
  """
  if learned:
    return grid(bits, unit_thresholds(bits, thresholds))
  factors = weight_factors(bits, rule, thresholds)
  if rule == "fixed":
    return grid(bits, factors)
  return grid(bits, mean_thresholds(
      weights, bits, per_channel=rule == "channel_mean", factors=factors))


def input_grid(bits: int, thresholds: Sequence[float] = ()) -> Grid:
  """The grid of activations, with fixed thresholds chosen as by `weight_factors`.

  Examples:
    >>> quantizers.input_grid(2, thresholds=[0.25]).thresholds
    Array([0.25], dtype=float32)
  """
  return grid(bits, weight_factors(bits, "fixed", thresholds))


def quantize(x: jax.Array, grid: Grid) -> jax.Array:
  """Quantizes `x` to the levels of `grid`; this is h(x) of Eq 4, 21 and 22.

  For one bit h(0) = -1. If |x| equals a threshold, the result has the smaller of the
  two magnitudes.

  Args:
    x: Float array of any shape.
    grid: Grid whose thresholds broadcast against the trailing axes of `x`.

  Returns:
    Array of the shape and dtype of `x`. It is NaN where `x` is NaN.

  Raises:
    TypeError: `x` is not float, or `grid` is not a grid.

  Examples:
    >>> x = jnp.array([-0.6, 0.05, 0.3])
    >>> quantizers.quantize(x, quantizers.grid(2))  # The threshold is 0.1.
    Array([-1.,  0.,  1.], dtype=float32)
  """
  check_float("x", x)
  _check_grid(grid)
  levels = _staircase(x, grid, grid.magnitudes.astype(x.dtype))
  return jnp.where(jnp.isnan(x), x, levels)


def encode(x: jax.Array, grid: Grid) -> jax.Array:
  """Encodes `quantize(x, grid)` as the signed indices of its levels.

  Args:
    x: Float array of any shape.
    grid: Grid whose thresholds broadcast against the trailing axes of `x`.

  Returns:
    int8 array of the shape of `x`, with codes -1 and 1 for one bit and -q..q otherwise.
    NaN has no code of its own and gets that of 0.

  Raises:
    TypeError: `x` is not float, or `grid` is not a grid.

  Examples:
    >>> x = jnp.array([-0.6, 0.05, 0.3])
    >>> quantizers.encode(x, quantizers.grid(3))  # The nearest levels: -0.5, 0, 0.25.
    Array([-2,  0,  1], dtype=int8)
  """
  check_float("x", x)
  _check_grid(grid)
  count = grid.magnitudes.shape[0]
  return _staircase(x, grid, jnp.arange(1, count + 1, dtype=jnp.int8))


def decode(codes: jax.Array, grid: Grid) -> jax.Array:
  """Converts codes to the levels that they stand for.

  Args:
    codes: int8 array of any shape, as made by `encode`.
    grid: The grid of the codes.

  Returns:
    Array of the shape of `codes` and of the dtype of the grid.

  Raises:
    TypeError: `codes` are not integers, or `grid` is not a grid.

  Examples:
    >>> codes = jnp.array([-2, 0, 1], jnp.int8)
    >>> quantizers.decode(codes, quantizers.grid(3))
    Array([-0.5 ,  0.  ,  0.25], dtype=float32)
  """
  _check_grid(grid)
  if not jnp.issubdtype(codes.dtype, jnp.integer):
    raise TypeError(f"codes of dtype {codes.dtype}: must be integers")
  levels = jnp.concatenate(
      [-grid.magnitudes[::-1], jnp.zeros(1, grid.magnitudes.dtype), grid.magnitudes])
  return levels[codes.astype(jnp.int32) + grid.magnitudes.shape[0]]


def round_to(x: jax.Array, dtype: str) -> jax.Array:
  """Rounds `x` to a float format, keeping its own dtype (Tables I, II, IV).

  Values beyond the format's range saturate. The gradient is not rounded. It passes
  unchanged where |x| is in the format's range, and is 0 elsewhere.

  Args:
    x: Float array of any shape.
    dtype: One of `FLOAT_FORMATS`. The paper's "8 (float)" in Table IV is float8_e4m3fn.

  Returns:
    Array of the shape and dtype of `x`.

  Raises:
    TypeError: `x` is not float.
    ValueError: `dtype` is not one of `FLOAT_FORMATS`.

  Examples:
    >>> x = jnp.array([1.1, 500.0])
    >>> quantizers.round_to(x, "float8_e4m3fn")  # Eighths from 1 to 2; 448 at most.
    Array([  1.125, 448.   ], dtype=float32)
  """
  check_float("x", x)
  if dtype not in FLOAT_FORMATS:
    raise ValueError(f"dtype={dtype!r}: must be one of {', '.join(FLOAT_FORMATS)}")
  return x if dtype == "float32" else _round_to(x, dtype)


def without_denormals(x: jax.Array) -> jax.Array:
  """Replaces magnitudes below `SMALLEST` by 0, on every device.

  Examples:
    >>> quantizers.without_denormals(jnp.array([1e-40, 1.0]))
    Array([0., 1.], dtype=float32)
  """
  return jnp.where(jnp.abs(x) < SMALLEST, jnp.zeros_like(x), x)


def compute_dtype(x: jax.Array) -> jnp.dtype:
  """The dtype in which `x` is compared with thresholds and mixtures are computed.

  It is float64 for a float64 array and float32 otherwise, so that thresholds are never
  rounded to 16 bits.

  Examples:
    >>> quantizers.compute_dtype(jnp.ones(1, jnp.bfloat16))
    dtype('float32')
  """
  return jnp.dtype(jnp.float64 if x.dtype == jnp.float64 else jnp.float32)


def _staircase(x: jax.Array, grid: Grid, heights: jax.Array) -> jax.Array:
  """Signed `heights[i]` for the last i with |x| > thresholds[i], or 0 if there is none.

  A grid of one bit has no thresholds. There the result is `heights[0]` with the sign of
  `x`, which is negative for 0.
  """
  wide = without_denormals(x.astype(compute_dtype(x)))
  if not grid.thresholds.shape[0]:
    return jnp.where(wide > 0, heights[0], -heights[0])
  out = jnp.zeros(x.shape, heights.dtype)
  for threshold, height in zip(grid.thresholds.astype(wide.dtype), heights):
    out = jnp.where(wide > threshold, height,
                    jnp.where(wide < -threshold, -height, out))
  return out


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _round_to(x: jax.Array, dtype: str) -> jax.Array:
  # A cast to the format and back would not do: XLA may drop the pair of casts on a GPU
  # (openxla/xla#41605).
  info = jnp.finfo(dtype)
  limit = float(info.max)
  wide = jnp.clip(x.astype(compute_dtype(x)), -limit, limit)
  rounded = lax.reduce_precision(wide, exponent_bits=8, mantissa_bits=info.nmant)
  # Below its smallest normal number the format has evenly spaced values.
  unit = max(float(info.smallest_subnormal), 2.0 ** -126)
  small = jnp.round(wide / unit) * unit
  return jnp.where(jnp.abs(wide) < float(info.smallest_normal), small,
                   rounded).astype(x.dtype)


def _round_to_backward(dtype, x, g):
  # The derivative of a cast would round g too, and float8 rounds below 2^-10 to 0.
  inside = jnp.abs(x.astype(compute_dtype(x))) <= float(jnp.finfo(dtype).max)
  return (g * inside.astype(g.dtype),)


_round_to.defvjp(lambda x, dtype: (_round_to(x, dtype), x), _round_to_backward)
