"""Gradient estimators for quantizers: forward rule and backward rule in one function.

Equation numbers refer to Chen et al. (arXiv 2003.04296). All are pure functions of
arrays or numbers: alpha and the grid are ordinary traced arguments with a zero
cotangent, so one compilation serves a whole annealing schedule, and a sweep over alpha
can be vmapped.
Results keep the dtype of `x`; the mixture is formed in float32 (float64 for float64).
"""

import functools
import inspect
from typing import Any, Callable

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from minw import quantizers
from minw.quantizers import Grid

# What the paper can be read to prescribe for AQE's backward, as a factor on the
# cotangent inside [-1, 1]. Under Adam and a constant alpha they train alike.
GRADIENTS = {
    "eq18": lambda alpha: 2 * alpha,  # Eq 18, 19
    "algorithm1": jnp.ones_like,  # Algorithm 1: g unchanged
    "eq15": lambda alpha: 1 - alpha,  # Eq 15: differentiate the mixture, h' = 0
}

# The largest float32 number.
_LARGEST = float(np.finfo(np.float32).max)

# Estimators that are defined for one bit only.
ONE_BIT = ("approx_sign", "ede", "reste", "stochastic_aqe", "swish_sign")

# Estimators usable with Bop, which keeps weights at exactly 1 or -1: there, their
# gradient is a positive multiple of the incoming one. Others pass next to nothing on,
# or the opposite.
PASS_AT_ONE = ("aqe", "dsq", "ewgs", "reste", "ste", "stochastic_aqe", "stompp",
               "stompp_ste")


def ste(x: jax.Array, grid: Grid) -> jax.Array:
  """The straight-through estimator (Eq 4, 5).

  Forward h(x); backward g * 1[|x| <= 1].

  Args:
    x: float, any shape.
    grid: thresholds broadcast against the trailing axes of `x`.

  Returns:
    The shape and dtype of `x`.
  """
  return _hard(_slope_ste, x, 0.0, grid)


def aqe(
    x: jax.Array, alpha: jax.Array | float, grid: Grid, *, gradient: str = "eq18"
) -> jax.Array:
  """The asymptotic-quantized estimator (Eq 6, 18, 19).

  Forward alpha * h(x) + (1 - alpha) * x; backward 2 * alpha * g * 1[|x| <= 1].
  alpha = 1 is the hard quantizer, alpha = 0 the identity; at alpha = 1/2 the backward
  is the straight-through estimator's.

  Args:
    x: float, any shape.
    alpha: in [0, 1]; a scalar, or broadcast to the shape of `x`.
    grid: thresholds broadcast against the trailing axes of `x`.
    gradient: the backward's factor: "eq18" 2 alpha, "algorithm1" 1, "eq15" 1 - alpha.

  Returns:
    The shape and dtype of `x`.

  Raises:
    ValueError: unknown `gradient`.
  """
  _check_gradient(gradient)
  return _aqe(_floats(x), _number("alpha", alpha, 0, 1), grid, gradient)


def stochastic_aqe(
    x: jax.Array, alpha: jax.Array | float, key: jax.Array, *, gradient: str = "eq18"
) -> jax.Array:
  """The stochastic AQE of one bit (Eq 7, 13).

  Forward alpha * sign(x - z) + (1 - alpha) * x with z ~ U[-1, 1], independent for each
  element, whose mean is x for |x| <= 1; backward as `aqe`.

  Args:
    x: float, any shape.
    alpha: in [0, 1]; a scalar, or broadcast to the shape of `x`.
    key: a PRNG key.
    gradient: as in `aqe`.

  Returns:
    The shape and dtype of `x`.
  """
  _check_gradient(gradient)
  x = _floats(x)
  z = jax.random.uniform(key, x.shape, quantizers.compute_dtype(x), -1.0, 1.0)
  return _stochastic_aqe(x, _number("alpha", alpha, 0, 1), z, gradient)


# Estimators of others, to compare with. Those down to `ewgs` have the forward of `ste`;
# alpha, where there is one, is how far annealing has gone, from 0 to 1, and shapes the
# backward.


def approx_sign(x: jax.Array, grid: Grid) -> jax.Array:
  """Bi-Real Net's, the derivative of a piecewise quadratic (arXiv 1808.00278).

  Backward g * max(2 - 2 |x|, 0).

  Args:
    x: float, any shape.
    grid: of one bit.

  Returns:
    The shape and dtype of `x`.

  Raises:
    ValueError: a grid of more bits.
  """
  return _hard(_slope_approx_sign, x, 0.0, _one_bit(grid))


def swish_sign(x: jax.Array, grid: Grid) -> jax.Array:
  """The derivative of sign-Swish, beta = 5 (Darabi et al., arXiv 1812.11800).

  Backward g * beta (2 - beta x tanh(beta x / 2)) / (1 + cosh(beta x)).

  Args, returns, raises: as `approx_sign`.
  """
  return _hard(_slope_swish_sign, x, 0.0, _one_bit(grid))


def ede(x: jax.Array, alpha: jax.Array | float, grid: Grid) -> jax.Array:
  """IR-Net's error decay estimator, a tanh that steepens (arXiv 1909.10788).

  Backward g * k t (1 - tanh(t x)^2), t = 10^(2 alpha - 1) and k = max(1 / t, 1).

  Args:
    x: float, any shape.
    alpha: in [0, 1], a scalar or broadcast to the shape of `x`; in IR-Net the share of
      the epochs that are over.
    grid: of one bit.

  Returns:
    The shape and dtype of `x`.

  Raises:
    ValueError: a grid of more bits.
  """
  return _hard(_slope_ede, x, _number("alpha", alpha, 0, 1), _one_bit(grid))


def reste(x: jax.Array, alpha: jax.Array | float, grid: Grid) -> jax.Array:
  """The rectified straight-through estimator: sign(x) |x|^(1/o) (Wu et al., ICCV 2023).

  Backward g * |x|^(1/o - 1) / o where 0.1 < |x| <= 1.5, with o = 1 + 2 alpha; nearer
  to zero the slope of the chord from -0.1 to 0.1, and 0 beyond 1.5.

  Args, returns, raises: as `ede`.
  """
  return _hard(_slope_reste, x, _number("alpha", alpha, 0, 1), _one_bit(grid))


def dsq(x: jax.Array, alpha: jax.Array | float, grid: Grid) -> jax.Array:
  """Differentiable soft quantization, a staircase of tanh (arXiv 1908.05033).

  With s = 1 / (1 - a) and k = log(2 / a - 1), from one level to the next, D above it,
  the staircase rises as D / 2 (1 + s tanh(k (x - threshold) / D)). Backward g * its
  slope, s k / 2 / cosh(k (x - threshold) / D)^2, for |x| <= 1. Here a, which the paper
  learns, falls from 1/2, nearly straight, to 0.01, nearly steps: a = 0.5 - 0.49 alpha.

  Args:
    x: float, any shape.
    alpha: in [0, 1], a scalar or broadcast to the shape of `x`.
    grid: any; thresholds broadcast against the trailing axes of `x`.

  Returns:
    The shape and dtype of `x`.
  """
  return _hard(_slope_dsq, x, _number("alpha", alpha, 0, 1), grid)


def ewgs(x: jax.Array, grid: Grid, *, delta: float = 1e-3) -> jax.Array:
  """Element-wise gradient scaling (Lee et al., arXiv 2104.00903, Eq 4).

  Backward g * (1 + delta sign(g) (x - h(x))) * 1[|x| <= 1].

  Args:
    x: float, any shape.
    grid: any; thresholds broadcast against the trailing axes of `x`.
    delta: at least 0, which is `ste`.

  Returns:
    The shape and dtype of `x`.
  """
  return _hard(_slope_ewgs, x, _number("delta", delta, 0, _LARGEST), grid)


def lsq(
    x: jax.Array, step: jax.Array | float, grid: Grid, *, count: int | None = None
) -> jax.Array:
  """Learned step size quantization (Esser et al., arXiv 1902.08153, Eq 1, 2, 3, 5).

  Forward s h(x / s). Backward to x: g * 1[|x| <= s]; to s, 1 / sqrt(count * q) times
  the sum of g * (h(x / s) - x / s) where |x| <= s, and of g * sign(x) elsewhere.

  In the paper s is the distance between two levels, whole numbers, and q the largest.
  Here, where levels are at most 1, s is the largest level, and q the number of positive
  ones: the same for two bits, whose thresholds are then +-s / 2.

  Args:
    x: float, any shape.
    step: s > 0, a scalar.
    grid: in units of s, with `quantizers.unit_thresholds`.
    count: how many numbers s serves, examples of a batch apart; the size of `x` if
      None, as for weights.

  Returns:
    The shape and dtype of `x`.
  """
  x, step = _floats(x), _number("step", step, quantizers.SMALLEST, _LARGEST)
  if count is not None and (type(count) is not int or count < 1):
    raise ValueError(f"count={count!r}: must be an integer of at least 1")
  return _lsq(x, step, grid, x.size if count is None else count)


# Freezing, element by element. alpha is the share that is frozen.


def stompp(
    x: jax.Array, alpha: jax.Array | float, key: jax.Array, grid: Grid
) -> jax.Array:
  """StoMPP without straight-through estimator (arXiv 2601.22660, 2606.27759).

  Each element is frozen with probability alpha. Forward h(x) where it is, else x
  clipped to [-1, 1]; backward g * 1[|x| <= 1] where it is not, else 0.

  Of the source: hard frozen elements without gradient beside clipped ones, a random
  mask of which about 1 % is drawn anew at each step, and layers frozen one after
  another from the input on, each with a share that grows as the third power of time.
  This library's reading, as no code of it is public: every element of a batch has a
  mask of its own, that follows from `key` alone. In a config: alpha_per_layer,
  alpha_start=0, alpha_end=1, alpha_shape="cubic" and estimator_noise_steps=100, for
  which all masks are drawn anew at each hundredth step, and grow with alpha in between.

  Args:
    x: float, any shape.
    alpha: in [0, 1]; a scalar, or broadcast to the shape of `x`.
    key: a PRNG key.
    grid: any; the source has one bit.

  Returns:
    The shape and dtype of `x`.
  """
  return _frozen(x, alpha, key, grid, False)


def stompp_ste(
    x: jax.Array, alpha: jax.Array | float, key: jax.Array, grid: Grid
) -> jax.Array:
  """StoMPP with the straight-through estimator at frozen elements (arXiv 2606.27759).

  Forward as `stompp`; backward g * 1[|x| <= 1] at all elements.

  Args, returns: as `stompp`.
  """
  return _frozen(x, alpha, key, grid, True)


# Scales of quantized weights.


def layer_mean_scale(quantized: jax.Array, weights: jax.Array) -> jax.Array:
  """DoReFa-Net's scale of one-bit weights (Zhou et al., arXiv 1606.06160).

  Forward quantized * mean |W| over the layer; backward g to `quantized`, unscaled, and
  nothing to the mean. (Ternary Weight Networks take the mean over weights beyond the
  threshold alone.)

  Args:
    quantized: float (..., output channels), made of `weights` by an estimator.
    weights: of that shape.
  """
  return _scaled_straight(quantized, mean_magnitude(weights, "layer_mean"))


def channel_mean_scale(quantized: jax.Array, weights: jax.Array) -> jax.Array:
  """XNOR-Net's scale (Rastegari et al., arXiv 1603.05279, section 3.1).

  Forward quantized * mean |W|, over the n weights of each output channel; backward
  g * mean |W| to `quantized` and, as the paper prints it, g / n to each weight for
  what it does to the mean (the derivative proper has the sum of g * sign(W) over the
  channel in place of g, and the sign of the weight as a factor).

  Args: as `layer_mean_scale`.
  """
  scale = lax.stop_gradient(mean_magnitude(weights, "channel_mean"))
  scale = scale.reshape((1,) * (weights.ndim - 1) + (-1,))
  n = weights.size // weights.shape[-1]
  return quantized * scale + (weights - lax.stop_gradient(weights)) / n


WEIGHT_SCALES = {"none": lambda quantized, weights: quantized,
                 "layer_mean": layer_mean_scale, "channel_mean": channel_mean_scale}


def mean_magnitude(weights: jax.Array, rule: str) -> jax.Array:
  """mean |W|: () of the "layer_mean", (output channels,) of the "channel_mean"."""
  quantizers.check_float("weights", weights)
  axes = tuple(range(weights.ndim - 1)) if rule == "channel_mean" else None
  return abs(weights).mean(axes)


def stochastic_neuron(
    x: jax.Array, key: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """The unbiased stochastic binary neuron (Eq 2, 3).

  h = 1[z < sigmoid(x)], z ~ U[0, 1]. (The paper prints z > sigmoid(x), under which
  Eq 3 would be biased.) Use `score_function_surrogate` to train through it: the
  gradient of `log_prob` is h - sigmoid(x), the factor of Eq 3.

  Args:
    x: float, any shape: the logits.
    key: a PRNG key.

  Returns:
    h in {0, 1} and log P(h), both of the shape and dtype of `x`; h has no gradient.
  """
  quantizers.check_float("x", x)
  z = jax.random.uniform(key, x.shape, quantizers.compute_dtype(x))
  on = lax.stop_gradient(z < jax.nn.sigmoid(x.astype(z.dtype)))
  log_prob = jnp.where(on, jax.nn.log_sigmoid(x), jax.nn.log_sigmoid(-x))
  return on.astype(x.dtype), log_prob


def score_function_surrogate(loss: jax.Array, log_prob: jax.Array) -> jax.Array:
  """`loss` with the score-function gradient added (Eq 3).

  Args:
    loss: float (...): one for each independent sample.
    log_prob: float (..., neurons...): of the neurons that each loss depends on.

  Returns:
    The values and shape of `loss`; its gradient is that of `loss` plus
    loss * d(sum of log_prob).
  """
  total = jnp.sum(log_prob, axis=tuple(range(loss.ndim, log_prob.ndim)))
  return loss + lax.stop_gradient(loss) * (total - lax.stop_gradient(total))


# The estimators that a config may name, in alphabetical order. A new one is added here.
_ESTIMATORS: dict[str, Callable[..., jax.Array]] = {
    "approx_sign": approx_sign,
    "aqe": aqe,
    "dsq": dsq,
    "ede": ede,
    "ewgs": ewgs,
    "lsq": lsq,
    "reste": reste,
    "ste": ste,
    "stochastic_aqe": stochastic_aqe,
    "stompp": stompp,
    "stompp_ste": stompp_ste,
    "swish_sign": swish_sign,
}


def by_name(name: str, *, gradient: str = "eq18") -> Callable[..., jax.Array]:
  """The estimator called `name`, with the one signature that networks use.

  Args:
    name: One of `network_estimators()`.
    gradient: bound, if the estimator has that argument.

  Returns:
    f(x, alpha, grid, make_key): passes on what the estimator takes; `make_key()` is
    called only if it takes a key. Where its attribute `learns_step` is true, step=
    must be given too, and count= may: see `lsq`.

  Raises:
    ValueError: no such estimator, or (when called) a grid it is not defined on.
  """
  if name not in _ESTIMATORS:
    raise ValueError(f"estimator={name!r}: must be one of {', '.join(_ESTIMATORS)}")
  function = _ESTIMATORS[name]
  takes = inspect.signature(function).parameters
  if "gradient" in takes:
    _check_gradient(gradient)
    function = functools.partial(function, gradient=gradient)

  def estimator(x, alpha, grid, make_key, **arguments):
    if "alpha" in takes:
      arguments["alpha"] = alpha
    if "grid" in takes:
      arguments["grid"] = grid
    elif grid.thresholds.shape[0]:
      raise ValueError(f"estimator {name!r} is defined for one bit only")
    if "key" in takes:
      arguments["key"] = make_key()
    return function(x, **arguments)

  estimator.learns_step = "step" in takes
  return estimator


def network_estimators() -> tuple[str, ...]:
  """The names that `by_name` takes, in alphabetical order."""
  return tuple(_ESTIMATORS)


def _check_gradient(gradient: str) -> None:
  if gradient not in GRADIENTS:
    raise ValueError(f"gradient={gradient!r}: must be one of {', '.join(GRADIENTS)}")


def _floats(x: Any) -> jax.Array:
  """`x` as an array, which must be float; see `quantizers.check_float`."""
  x = _array("x", x)
  quantizers.check_float("x", x)
  return x


def _array(name: str, value: Any) -> jax.Array:
  try:
    if not isinstance(value, (str, bytes)):  # JAX would take them for names of dtypes.
      return jnp.asarray(value)
  except (TypeError, ValueError):
    pass
  raise TypeError(f"{name}={value!r:.80}: must be an array or a number")


def _number(name: str, value: Any, least: float, most: float) -> jax.Array:
  """A parameter as a float array, in a range where it is not an array of JAX.

  The values of JAX's arrays are not looked at: they may be traced, and to wait for
  them would take time.
  """
  dtype = _array(name, value).dtype
  if not any(jnp.issubdtype(dtype, kind) for kind in (jnp.floating, jnp.integer)):
    raise TypeError(f"{name} of dtype {dtype}: must be real numbers")
  if not isinstance(value, jax.Array):
    values = np.asarray(value)
    if not ((least <= values) & (values <= most)).all():
      raise ValueError(f"{name}={value!r}: must be in [{least}, {most}]")
  return jnp.asarray(value, jnp.result_type(float))


def _inside(x: jax.Array) -> jax.Array:
  """1[|x| <= 1]: clipped weights sit at exactly +-1 and must be able to leave."""
  return (jnp.abs(x) <= 1).astype(x.dtype)


def _mix(x: jax.Array, alpha: jax.Array, h: jax.Array) -> jax.Array:
  # This form, not x + alpha * (h - x), is exactly h at 1 and exactly x at 0.
  wide = quantizers.compute_dtype(x)
  alpha = alpha.astype(wide)
  return (alpha * h.astype(wide) + (1 - alpha) * x.astype(wide)).astype(x.dtype)


def _scaled(g: jax.Array, x: jax.Array, alpha: jax.Array, gradient: str) -> jax.Array:
  wide = quantizers.compute_dtype(g)
  factor = GRADIENTS[gradient](alpha).astype(wide)
  return (factor * g.astype(wide)).astype(g.dtype) * _inside(x)


def _zeros(tree):
  return jax.tree.map(jnp.zeros_like, tree)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _aqe(x, alpha, grid, gradient):
  return _mix(x, alpha, quantizers.quantize(x, grid))


_aqe.defvjp(
    lambda x, alpha, grid, gradient: (_aqe(x, alpha, grid, gradient),
                                      (x, alpha, grid)),
    lambda gradient, saved, g: (_scaled(g, saved[0], saved[1], gradient),
                                *_zeros(saved[1:])),
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _stochastic_aqe(x, alpha, z, gradient):
  h = jnp.where(x.astype(z.dtype) > z, 1, -1)
  return _mix(x, alpha, h)


_stochastic_aqe.defvjp(
    lambda x, alpha, z, gradient: (_stochastic_aqe(x, alpha, z, gradient),
                                   (x, alpha, z)),
    lambda gradient, saved, g: (_scaled(g, saved[0], saved[1], gradient),
                                *_zeros(saved[1:])),
)


def _one_bit(grid: Grid) -> Grid:
  if grid.thresholds.shape[0]:
    raise ValueError("this estimator is defined for one bit only")
  return grid


def _hard(slope, x, shape, grid):
  """Forward h(x); backward g * slope(x, shape, grid, g), `shape` a scalar or array."""
  shape = jnp.asarray(shape, jnp.result_type(float))
  return _hard_forward(slope, _floats(x), shape, grid)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _hard_forward(slope, x, shape, grid):
  return quantizers.quantize(x, grid)


def _hard_backward(slope, saved, g):
  x, shape, grid = saved
  wide = quantizers.compute_dtype(x)
  factor = slope(x.astype(wide), shape.astype(wide), grid, g.astype(wide))
  return (g.astype(wide) * factor).astype(g.dtype), *_zeros((shape, grid))


_hard_forward.defvjp(
    lambda slope, x, shape, grid: (_hard_forward(slope, x, shape, grid),
                                   (x, shape, grid)),
    _hard_backward)


def _slope_ste(x, _, grid, g):
  return _inside(x)


def _slope_ewgs(x, delta, grid, g):
  return (1 + delta * jnp.sign(g) * (x - quantizers.quantize(x, grid))) * _inside(x)


def _slope_approx_sign(x, alpha, grid, g):
  return jnp.maximum(2 - 2 * jnp.abs(x), 0)


def _slope_swish_sign(x, alpha, grid, g):
  y = jnp.clip(5 * x, -80, 80)  # cosh is finite there, and the slope 0.
  return 5 * (2 - y * jnp.tanh(y / 2)) / (1 + jnp.cosh(y))


def _slope_ede(x, alpha, grid, g):
  t = 10 ** (2 * alpha - 1)
  # 1 - tanh^2, of which little would be left in the tails.
  return jnp.maximum(1 / t, 1) * t / jnp.cosh(jnp.clip(t * x, -40, 40)) ** 2


def _slope_reste(x, alpha, grid, g):
  o, size = 1 + 2 * alpha, jnp.abs(x)
  power = jnp.maximum(size, 0.1) ** (1 / o - 1)
  return jnp.where(size > 1.5, 0, jnp.where(size > 0.1, power / o, power))


def _slope_dsq(x, alpha, grid, g):
  a = 0.5 - 0.49 * alpha
  s, k = 1 / (1 - a), jnp.log(2 / a - 1)
  size = jnp.abs(x)
  levels = grid.magnitudes.astype(x.dtype)
  if grid.thresholds.shape[0]:
    below = jnp.concatenate([jnp.zeros(1, x.dtype), levels[:-1]])
    thresholds = grid.thresholds.astype(x.dtype)
  else:  # One step, from -1 to 1.
    below, thresholds = -levels, jnp.zeros(1, x.dtype)
  slope = jnp.zeros_like(x)
  for low, high, threshold in zip(below, levels, thresholds):
    y = k * (size - threshold) / (high - low)
    slope = jnp.where(size >= jnp.maximum(low, 0), s * k / 2 / jnp.cosh(y) ** 2, slope)
  return slope * _inside(x)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _lsq(x, step, grid, count):
  wide = quantizers.compute_dtype(x)
  step = step.astype(wide)
  y = quantizers.without_denormals(x.astype(wide)) / step
  return (step * quantizers.quantize(y, grid)).astype(x.dtype)


def _lsq_backward(count, saved, g):
  x, step, grid = saved
  wide = quantizers.compute_dtype(x)
  y = quantizers.without_denormals(x.astype(wide)) / step.astype(wide)
  inside = jnp.abs(y) <= 1
  slope = jnp.where(inside, quantizers.quantize(y, grid) - y, jnp.sign(y))
  balance = (count * grid.magnitudes.shape[0]) ** -0.5
  to_step = balance * jnp.sum(g.astype(wide) * slope)
  return g * inside.astype(g.dtype), to_step.astype(step.dtype), _zeros(grid)


_lsq.defvjp(lambda x, step, grid, count: (_lsq(x, step, grid, count), (x, step, grid)),
            _lsq_backward)


def _frozen(x, alpha, key, grid, straight):
  x = _floats(x)
  alpha = _number("alpha", alpha, 0, 1).astype(quantizers.compute_dtype(x))
  mask = jax.random.uniform(key, x.shape, alpha.dtype) < alpha
  return _stompp(x, mask, grid, straight)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _stompp(x, mask, grid, straight):
  return jnp.where(mask, quantizers.quantize(x, grid), jax.nn.hard_tanh(x))


def _stompp_backward(straight, saved, g):
  x, mask, grid = saved
  passes = _inside(x) if straight else _inside(x) * (~mask).astype(x.dtype)
  no_mask = np.zeros(mask.shape, jax.dtypes.float0)
  return g * passes, no_mask, _zeros(grid)


_stompp.defvjp(
    lambda x, mask, grid, straight: (_stompp(x, mask, grid, straight), (x, mask, grid)),
    _stompp_backward)


@jax.custom_vjp
def _scaled_straight(quantized, scale):
  return quantized * scale


_scaled_straight.defvjp(
    lambda quantized, scale: (_scaled_straight(quantized, scale), scale),
    lambda scale, g: (g, jnp.zeros_like(scale)))
