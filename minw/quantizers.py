"""The quantizers h of MINW-Nets: odd step functions onto a symmetric grid.

Equation numbers refer to Chen et al., "Propagating Asymptotic-Estimated Gradients
for Low Bitwidth Quantized Neural Networks" (arXiv 2003.04296).

An operand is either on a grid, named by its number of bits n = 1..5, or in a float
format, named by its dtype. A grid of n bits has the levels

    n = 1:  -1, 1                                   (Eq 4)
    n = 2:  -1, 0, 1                                (Eq 21)
    n > 2:  0, +-2^-(q-1), ..., +-1/2, +-1          (Eq 22), q = 2^(n-1) - 1

All functions are pure: they work under jit, vmap, scan and sharding, and keep the
dtype of `x`. A number smaller than `SMALLEST` counts as 0 everywhere, because some
devices flush denormal numbers to zero and others do not: h(1e-40) = -1 for one bit.
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
                f" its dtype: {', '.join(FLOAT_FORMATS)}")  # For errors.
THRESHOLD_RULES = ("layer_mean", "channel_mean", "fixed")
SMALLEST = 2.0 ** -126  # The smallest normal float32 number.

# Chosen, not from the paper, which does not give its thresholds: for the powers of
# two the midpoint between two levels; for ternary activations the paper's figures
# show a gap of 0.05 to 0.1; for ternary weights the rule of Ternary Weight Networks.
_TERNARY_THRESHOLD = 0.1
_TERNARY_FACTOR = 0.7
_POWERS_FACTOR = 2.5

Thresholds = jax.Array | np.ndarray | Sequence[float]


class Grid(NamedTuple):
  """A symmetric grid and where inputs fall onto it; a pytree.

  Attributes:
    thresholds: float (q, ...), positive and ascending along axis 0; the other axes
      broadcast against the trailing axes of the input. Empty (q = 0) for one bit.
    magnitudes: float (max(q, 1),), the ascending positive levels.
  """

  thresholds: jax.Array
  magnitudes: jax.Array


def is_grid(bits: int | str) -> bool:
  """Whether `bits` names a grid (True) or a float format (False).

  Raises:
    ValueError: `bits` is neither one of `GRID_BITS` nor one of `FLOAT_FORMATS`.
  """
  if type(bits) is int and bits in GRID_BITS:
    return True
  if isinstance(bits, str) and bits in FLOAT_FORMATS:
    return False
  raise ValueError(f"bits={bits!r}: must be {ALLOWED_BITS}")


def num_thresholds(bits: int) -> int:
  """q: how many positive thresholds a grid of `bits` has (0, 1, 3, 7, 15).

  Raises:
    ValueError: `bits` names no grid.
  """
  if not is_grid(bits):
    raise ValueError(f"bits={bits!r} is a float format; a grid has 1 to 5 bits")
  return 2 ** (bits - 1) - 1


def check_float(name: str, x: Any) -> None:
  """Checks the dtype of an argument, which is known under tracing too.

  Args:
    name: Name of the argument, for the error message.
    x: The argument.

  Raises:
    TypeError: `x` is not an array of a real float dtype.
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
  """Raises where thresholds, or factors that become some, are wrong for `bits`."""
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
  """The ascending positive levels of a grid: float32 (max(q, 1),) (Eq 4, 21, 22)."""
  q = max(num_thresholds(bits), 1)
  return np.exp2(np.arange(1.0 - q, 1.0)).astype(np.float32)


def step_size(bits: int | str) -> float:
  """The largest number of which all levels are multiples; 0 for a float format."""
  if not is_grid(bits) or isinstance(bits, str):
    return 0.0
  return float(level_magnitudes(bits)[0])


def fixed_thresholds(bits: int) -> np.ndarray:
  """The default fixed thresholds: float64 (q,); 0.1 for two bits, else midpoints."""
  q = num_thresholds(bits)
  if bits <= 2:
    return np.full(q, _TERNARY_THRESHOLD)
  levels = level_magnitudes(bits).astype(np.float64)
  return (np.concatenate([[0.0], levels[:-1]]) + levels) / 2


def unit_thresholds(bits: int, thresholds: Sequence[float] = ()) -> np.ndarray:
  """The thresholds of a grid with a learned step, in units of it: float64 (q,).

  The given `thresholds` where they are as many as `bits` needs, else the midpoints
  between levels, 0.5 for two bits: rounding to the nearest, as in LSQ.
  """
  if len(thresholds) == num_thresholds(bits):
    return np.asarray(thresholds, np.float64)
  return fixed_thresholds(bits) if bits > 2 else np.full(num_thresholds(bits), 0.5)


def positive_step(step: Any) -> Any:
  """The step that a parameter of any sign stands for: |step| + 2^-20 (float)."""
  return abs(step) + 2.0**-20


def mean_factors(bits: int) -> np.ndarray:
  """The default factors of `mean_thresholds`: float64 (q,).

  0.7 for two bits (Ternary Weight Networks, after which Eq 21 is modelled); for the
  powers of two 2.5 times the midpoints, (0.31, 0.94, 1.88) for three bits.
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
    weights: float (..., channels).
    bits: the grid's bits.
    per_channel: one mean for each output channel (the last axis), else one in all.
    factors: (q,) ascending; `mean_factors(bits)` if None.

  Returns:
    float32 (or float64, as the weights) (q,), or (q, channels) if `per_channel`,
    with no gradient to the weights.

  Raises:
    TypeError: the weights are not float, or the factors are not real numbers.
    ValueError: the factors are not q numbers, finite, positive and ascending.
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
    bits: 1 to 5.
    thresholds: (q, ...) positive, ascending along axis 0, q = 2^(bits-1) - 1; may
      be traced. `fixed_thresholds(bits)` if None.

  Raises:
    ValueError: no such grid, the wrong number of thresholds, or (where they are
      concrete) thresholds that are not finite, positive and ascending.
    TypeError: the thresholds are not real numbers.
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
  """What `weight_grid` takes as thresholds, or as factors on the mean: float64 (q,).

  The given `thresholds` where they are as many as `bits` needs, else the defaults:
  a network with bits of several kinds has one setting.

  Raises:
    ValueError: unknown rule.
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
    weights: float (..., output channels).
    bits: 1 to 5.
    rule: "fixed", or thresholds proportional to the mean magnitude of the layer's
      weights ("layer_mean") or of each output channel's ("channel_mean").
    thresholds: see `weight_factors`.
    learned: whether the step is: the grid is in units of it then, see
      `unit_thresholds`, and there is no rule.
  """
  if learned:
    return grid(bits, unit_thresholds(bits, thresholds))
  factors = weight_factors(bits, rule, thresholds)
  if rule == "fixed":
    return grid(bits, factors)
  return grid(bits, mean_thresholds(
      weights, bits, per_channel=rule == "channel_mean", factors=factors))


def input_grid(bits: int, thresholds: Sequence[float] = ()) -> Grid:
  """The grid of activations: fixed thresholds, chosen as by `weight_factors`."""
  return grid(bits, weight_factors(bits, "fixed", thresholds))


def quantize(x: jax.Array, grid: Grid) -> jax.Array:
  """h(x): the level of `grid` that `x` falls on (Eq 4, 21, 22).

  h(0) = -1 for one bit; an |x| equal to a threshold falls to the lower level.

  Args:
    x: float, any shape.
    grid: its thresholds broadcast against the trailing axes of `x`.

  Returns:
    The shape and dtype of `x`; NaN where `x` is NaN.

  Raises:
    TypeError: `x` is not float, or `grid` is not a grid.
  """
  check_float("x", x)
  _check_grid(grid)
  levels = _staircase(x, grid, grid.magnitudes.astype(x.dtype))
  return jnp.where(jnp.isnan(x), x, levels)


def encode(x: jax.Array, grid: Grid) -> jax.Array:
  """The code of `quantize(x, grid)`: the signed index of its level.

  Returns:
    int8 of the shape of `x`: -1 or 1 for one bit, -q..q otherwise. NaN has no code;
    it gets that of 0.

  Raises:
    TypeError: `x` is not float, or `grid` is not a grid.
  """
  check_float("x", x)
  _check_grid(grid)
  count = grid.magnitudes.shape[0]
  return _staircase(x, grid, jnp.arange(1, count + 1, dtype=jnp.int8))


def decode(codes: jax.Array, grid: Grid) -> jax.Array:
  """The levels of int8 `codes`: the shape of `codes`, the dtype of the grid.

  Raises:
    TypeError: `codes` are not integers, or `grid` is not a grid.
  """
  _check_grid(grid)
  if not jnp.issubdtype(codes.dtype, jnp.integer):
    raise TypeError(f"codes of dtype {codes.dtype}: must be integers")
  levels = jnp.concatenate(
      [-grid.magnitudes[::-1], jnp.zeros(1, grid.magnitudes.dtype), grid.magnitudes])
  return levels[codes.astype(jnp.int32) + grid.magnitudes.shape[0]]


def round_to(x: jax.Array, dtype: str) -> jax.Array:
  """`x` rounded to a float format, saturating, in its own dtype (Tables I, II, IV).

  The gradient is not rounded: it passes unchanged where |x| is in the format's range.

  Args:
    x: float, any shape.
    dtype: one of `FLOAT_FORMATS`; "8 (float)" of Table IV is float8_e4m3fn.

  Raises:
    TypeError: `x` is not float.
    ValueError: unknown `dtype`.
  """
  check_float("x", x)
  if dtype not in FLOAT_FORMATS:
    raise ValueError(f"dtype={dtype!r}: must be one of {', '.join(FLOAT_FORMATS)}")
  return x if dtype == "float32" else _round_to(x, dtype)


def without_denormals(x: jax.Array) -> jax.Array:
  """`x` with 0 in place of magnitudes below `SMALLEST`, on every device."""
  return jnp.where(jnp.abs(x) < SMALLEST, jnp.zeros_like(x), x)


def compute_dtype(x: jax.Array) -> jnp.dtype:
  """The dtype in which `x` is compared with thresholds, and mixtures are formed.

  It is float64 for a float64 array and float32 otherwise, so that thresholds are never
  rounded to 16 bits.
  """
  return jnp.dtype(jnp.float64 if x.dtype == jnp.float64 else jnp.float32)


def _staircase(x: jax.Array, grid: Grid, heights: jax.Array) -> jax.Array:
  """Signed `heights[i]` for the last i with |x| > thresholds[i]; 0 if none."""
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
  # Not two casts: XLA may drop the pair on a GPU (openxla/xla#41605).
  info = jnp.finfo(dtype)
  limit = float(info.max)
  wide = jnp.clip(x.astype(compute_dtype(x)), -limit, limit)
  rounded = lax.reduce_precision(wide, exponent_bits=8, mantissa_bits=info.nmant)
  # Below the smallest normal the format is a fixed-point one.
  unit = max(float(info.smallest_subnormal), 2.0 ** -126)
  small = jnp.round(wide / unit) * unit
  return jnp.where(jnp.abs(wide) < float(info.smallest_normal), small,
                   rounded).astype(x.dtype)


def _round_to_backward(dtype, x, g):
  # As casts differentiate, g would be rounded too: float8 has nothing below 2^-10.
  inside = jnp.abs(x.astype(compute_dtype(x))) <= float(jnp.finfo(dtype).max)
  return (g * inside.astype(g.dtype),)


_round_to.defvjp(lambda x, dtype: (_round_to(x, dtype), x), _round_to_backward)
