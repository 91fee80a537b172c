"""Gradient estimators for quantizers: forward rule and backward rule in one function.

Equation numbers refer to Chen et al. (arXiv 2003.04296). All estimators are pure
functions of arrays or numbers. alpha and the grid are ordinary traced arguments with a
zero cotangent. Therefore one compilation serves a whole annealing schedule, and a sweep
over alpha can be vmapped.

Results keep the dtype of `x`. The mixture of `x` and h(x) is computed in float32, or in
float64 if `x` is float64. Below, h is the quantizer, g is the incoming gradient
(the cotangent), and 1[...] is 1 where the condition holds and 0 elsewhere.
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

# Backward rules of AQE, by name. The paper supports three readings. Each one multiplies
# the cotangent by a factor inside [-1, 1]. With Adam and a constant alpha, all of them
# train alike.
GRADIENTS = {
    "eq18": lambda alpha: 2 * alpha,  # Eq 18 and 19.
    "algorithm1": jnp.ones_like,  # Algorithm 1 leaves the cotangent unchanged.
    "eq15": lambda alpha: 1 - alpha,  # Eq 15 differentiates the mixture with h' = 0.
}

# The largest float32 number.
_LARGEST = float(np.finfo(np.float32).max)

# Estimators that are defined for one bit only.
ONE_BIT = ("approx_sign", "ede", "reste", "stochastic_aqe", "swish_sign")

# Estimators usable with Bop, which keeps weights at exactly 1 or -1: there, their
# gradient is a positive multiple of the incoming one. The gradient of other estimators
# almost vanishes there or has the opposite sign.
PASS_AT_ONE = ("aqe", "dsq", "ewgs", "parq", "reste", "ste", "stochastic_aqe",
               "stompp", "stompp_ste")


def ste(x: jax.Array, grid: Grid) -> jax.Array:
  """The straight-through estimator (Eq 4, 5).

  The forward pass computes h(x). The backward pass computes g * 1[|x| <= 1].

  Args:
    x: Float array of any shape.
    grid: Grid whose thresholds broadcast against the trailing axes of `x`.

  Returns:
    Array of the shape and dtype of `x`.

  Examples:
    >>> x, grid = jnp.array([-0.5, 0.25, 1.5]), quantizers.grid(1)
    >>> estimators.ste(x, grid)
    Array([-1.,  1.,  1.], dtype=float32)
    >>> jax.grad(lambda x: estimators.ste(x, grid).sum())(x)
    Array([1., 1., 0.], dtype=float32)
  """
  return _hard(_slope_ste, x, 0.0, grid)


def aqe(
    x: jax.Array, alpha: jax.Array | float, grid: Grid, *, gradient: str = "eq18"
) -> jax.Array:
  """The asymptotic-quantized estimator (Eq 6, 18, 19).

  The forward pass computes alpha * h(x) + (1 - alpha) * x. The backward pass computes
  2 * alpha * g * 1[|x| <= 1]. With alpha = 1 the forward pass is the hard quantizer,
  and with alpha = 0 it is the identity. With alpha = 1/2 the backward pass equals that
  of the straight-through estimator.

  Args:
    x: Float array of any shape.
    alpha: Numbers in [0, 1]: a scalar, or an array that broadcasts to the shape of
      `x`.
    grid: Grid whose thresholds broadcast against the trailing axes of `x`.
    gradient: Factor of the backward pass: "eq18" for 2 alpha, "algorithm1" for 1, or
      "eq15" for 1 - alpha.

  Returns:
    Array of the shape and dtype of `x`.

  Raises:
    ValueError: `gradient` is not one of these names.

  Examples:
    >>> x, grid = jnp.array([-0.5, 0.25, 1.5]), quantizers.grid(1)
    >>> estimators.aqe(x, 0.75, grid)  # 0.75 h(x) + 0.25 x
    Array([-0.875 ,  0.8125,  1.125 ], dtype=float32)
    >>> jax.grad(lambda x: estimators.aqe(x, 0.75, grid).sum())(x)
    Array([1.5, 1.5, 0. ], dtype=float32)
  """
  _check_gradient(gradient)
  return _aqe(_floats(x), _number("alpha", alpha, 0, 1), grid, gradient)


def stochastic_aqe(
    x: jax.Array, alpha: jax.Array | float, key: jax.Array, *, gradient: str = "eq18"
) -> jax.Array:
  """The stochastic AQE of one bit (Eq 7, 13).

  The forward pass computes alpha * sign(x - z) + (1 - alpha) * x, where z ~ U[-1, 1] is
  drawn independently for each element. The mean of the result is x for |x| <= 1. The
  backward pass is that of `aqe`.

  Args:
    x: Float array of any shape.
    alpha: Numbers in [0, 1]: a scalar, or an array that broadcasts to the shape of
      `x`.
    key: PRNG key.
    gradient: Factor of the backward pass, as in `aqe`.

  Returns:
    Array of the shape and dtype of `x`.

  Examples:
    >>> x = jnp.array([-2.0, 2.0])  # The random z lies between them.
    >>> estimators.stochastic_aqe(x, 0.75, jax.random.key(0))
    Array([-1.25,  1.25], dtype=float32)
  """
  _check_gradient(gradient)
  x = _floats(x)
  z = jax.random.uniform(key, x.shape, quantizers.compute_dtype(x), -1.0, 1.0)
  return _stochastic_aqe(x, _number("alpha", alpha, 0, 1), z, gradient)


# The estimators from here on come from other papers and serve for comparison. From
# `approx_sign` to `ewgs`, the forward pass is that of `ste`. If one of these takes
# alpha, alpha is the progress of annealing from 0 to 1 and shapes the backward pass.


def approx_sign(x: jax.Array, grid: Grid) -> jax.Array:
  """Bi-Real Net's estimator: a piecewise quadratic's derivative (arXiv 1808.00278).

  The backward pass computes g * max(2 - 2 |x|, 0).

  Args:
    x: Float array of any shape.
    grid: Grid of one bit.

  Returns:
    Array of the shape and dtype of `x`.

  Raises:
    ValueError: The grid has more than one bit.

  Examples:
    >>> x, grid = jnp.array([-0.5, 0.25, 1.5]), quantizers.grid(1)
    >>> jax.grad(lambda x: estimators.approx_sign(x, grid).sum())(x)
    Array([1. , 1.5, 0. ], dtype=float32)
  """
  return _hard(_slope_approx_sign, x, 0.0, _one_bit(grid))


def swish_sign(x: jax.Array, grid: Grid) -> jax.Array:
  """The derivative of sign-Swish, beta = 5 (Darabi et al., arXiv 1812.11800).

  The backward pass computes
  g * beta (2 - beta x tanh(beta x / 2)) / (1 + cosh(beta x)).

  Args:
    x: Float array of any shape.
    grid: Grid of one bit.

  Returns:
    Array of the shape and dtype of `x`.

  Raises:
    ValueError: The grid has more than one bit.

  Examples:
    >>> x, grid = jnp.array([0.0]), quantizers.grid(1)
    >>> jax.grad(lambda x: estimators.swish_sign(x, grid).sum())(x)  # 5 * 2 / (1 + 1)
    Array([5.], dtype=float32)
  """
  return _hard(_slope_swish_sign, x, 0.0, _one_bit(grid))


def ede(x: jax.Array, alpha: jax.Array | float, grid: Grid) -> jax.Array:
  """IR-Net's error decay estimator: the slope of a steepening tanh (arXiv 1909.10788).

  The backward pass computes g * k t (1 - tanh(t x)^2), where t = 10^(2 alpha - 1) and
  k = max(1 / t, 1).

  Args:
    x: Float array of any shape.
    alpha: Numbers in [0, 1]: a scalar, or an array that broadcasts to the shape of
      `x`. In IR-Net it is the fraction of the epochs that have passed.
    grid: Grid of one bit.

  Returns:
    Array of the shape and dtype of `x`.

  Raises:
    ValueError: The grid has more than one bit.

  Examples:
    >>> x, grid = jnp.array([0.0]), quantizers.grid(1)
    >>> jax.grad(lambda x: estimators.ede(x, 1.0, grid).sum())(x)  # t = 10, k = 1
    Array([10.], dtype=float32)
  """
  return _hard(_slope_ede, x, _number("alpha", alpha, 0, 1), _one_bit(grid))


def reste(x: jax.Array, alpha: jax.Array | float, grid: Grid) -> jax.Array:
  """The rectified straight-through estimator: sign(x) |x|^(1/o) (Wu et al., ICCV 2023).

  With o = 1 + 2 alpha, the backward pass multiplies g by |x|^(1/o - 1) / o where
  0.1 < |x| <= 1.5. Closer to zero the factor is the slope of the chord from -0.1 to
  0.1. Beyond 1.5 the factor is 0.

  Args:
    x: Float array of any shape.
    alpha: Numbers in [0, 1]: a scalar, or an array that broadcasts to the shape of
      `x`.
    grid: Grid of one bit.

  Returns:
    Array of the shape and dtype of `x`.

  Raises:
    ValueError: The grid has more than one bit.

  Examples:
    >>> x, grid = jnp.array([0.25, 2.0]), quantizers.grid(1)
    >>> jax.grad(lambda x: estimators.reste(x, 0.5, grid).sum())(x)  # o = 2
    Array([1., 0.], dtype=float32)
  """
  return _hard(_slope_reste, x, _number("alpha", alpha, 0, 1), _one_bit(grid))


def dsq(x: jax.Array, alpha: jax.Array | float, grid: Grid) -> jax.Array:
  """Differentiable soft quantization, a staircase of tanh (arXiv 1908.05033).

  Let D be the distance from one level to the next, s = 1 / (1 - a) and
  k = log(2 / a - 1). Between these levels the staircase rises as
  D / 2 (1 + s tanh(k (x - threshold) / D)). For |x| <= 1 the backward pass multiplies g
  by the slope of this curve, s k / 2 / cosh(k (x - threshold) / D)^2. For larger |x|
  the gradient is 0.

  The paper learns the parameter a. Here it follows alpha: a = 0.5 - 0.49 alpha falls
  from 1/2, where the staircase is almost a straight line, to 0.01, where it almost
  consists of steps.

  Args:
    x: Float array of any shape.
    alpha: Numbers in [0, 1]: a scalar, or an array that broadcasts to the shape of
      `x`.
    grid: Any grid. Its thresholds broadcast against the trailing axes of `x`.

  Returns:
    Array of the shape and dtype of `x`.

  Examples:
    >>> x, grid = jnp.array([0.0, 1.5]), quantizers.grid(1)
    >>> jax.grad(lambda x: estimators.dsq(x, 0.0, grid).sum())(x)  # s = 2, k = log(3)
    Array([1.0986123, 0.       ], dtype=float32)
  """
  return _hard(_slope_dsq, x, _number("alpha", alpha, 0, 1), grid)


def ewgs(x: jax.Array, grid: Grid, *, delta: float = 1e-3) -> jax.Array:
  """Element-wise gradient scaling (Lee et al., arXiv 2104.00903, Eq 4).

  The backward pass computes g * (1 + delta sign(g) (x - h(x))) * 1[|x| <= 1].

  Args:
    x: Float array of any shape.
    grid: Any grid. Its thresholds broadcast against the trailing axes of `x`.
    delta: Strength of the scaling, at least 0. With 0 the result is that of `ste`.

  Returns:
    Array of the shape and dtype of `x`.

  Examples:
    >>> x, grid = jnp.array([-0.5, 0.25, 1.5]), quantizers.grid(1)
    >>> jax.grad(lambda x: estimators.ewgs(x, grid, delta=0.5).sum())(x)
    Array([1.25 , 0.625, 0.   ], dtype=float32)
  """
  return _hard(_slope_ewgs, x, _number("delta", delta, 0, _LARGEST), grid)


def lsq(
    x: jax.Array, step: jax.Array | float, grid: Grid, *, count: int | None = None
) -> jax.Array:
  """Learned step size quantization (Esser et al., arXiv 1902.08153, Eq 1, 2, 3, 5).

  Let s be the step. The forward pass computes s h(x / s). The gradient of x is
  g * 1[|x| <= s]. The gradient of s is 1 / sqrt(count * q) times a sum over the
  elements, with the terms g * (h(x / s) - x / s) where |x| <= s and g * sign(x)
  elsewhere.

  In the paper, levels are whole numbers times s, which is the distance between two of
  them, and q is the largest whole number. Here all levels of h are at most 1. Therefore
  s is the largest level of the result, and q is the number of positive levels. For two
  bits both definitions agree, and the thresholds are +-s / 2.

  The paper has a step for each layer. With an array of steps, each channel (the last
  axis of `x`) has its own.

  Args:
    x: Float array of any shape.
    step: The step s > 0, a scalar or an array (channels,).
    grid: Grid in units of s. Its thresholds come from `quantizers.unit_thresholds`.
    count: Number of elements that share s. For activations this is the number of
      elements of one example. If None, it is the number in all of `x`, as for weights.

  Returns:
    Array of the shape and dtype of `x`.

  Examples:
    >>> x, grid = jnp.array([0.125, 0.375, 1.0]), quantizers.grid(2, [0.5])
    >>> estimators.lsq(x, 0.5, grid)  # x / s is 0.25, 0.75 and 2.
    Array([0. , 0.5, 0.5], dtype=float32)
  """
  x, step = _floats(x), _number("step", step, quantizers.SMALLEST, _LARGEST)
  if count is not None and (type(count) is not int or count < 1):
    raise ValueError(f"count={count!r}: must be an integer of at least 1")
  return _lsq(x, step, grid, x.size // step.size if count is None else count)


# The StoMPP estimators freeze single elements. alpha is the fraction that is frozen.


def stompp(
    x: jax.Array, alpha: jax.Array | float, key: jax.Array, grid: Grid
) -> jax.Array:
  """StoMPP without a straight-through estimator (arXiv 2601.22660, 2606.27759).

  Each element is frozen with probability alpha. The forward pass computes h(x) for
  frozen elements and clips the others to [-1, 1]. The backward pass computes 0 for
  frozen elements and g * 1[|x| <= 1] for the others.

  The papers prescribe hard frozen elements without gradient beside clipped ones. A
  random mask selects the frozen elements, and about 1 % of the mask is redrawn at each
  step. Layers freeze one after another, starting at the input. In each layer the frozen
  fraction grows as the third power of time.

  The papers' code is not public. This library draws a mask value for every element of a
  batch from `key` alone. A config follows the papers with alpha_per_layer=True,
  alpha_start=0, alpha_end=1, alpha_shape="cubic" and estimator_noise_steps=100. Then
  all masks are redrawn at every hundredth step, and grow with alpha in between.

  Args:
    x: Float array of any shape.
    alpha: Numbers in [0, 1]: a scalar, or an array that broadcasts to the shape of
      `x`.
    key: PRNG key.
    grid: Any grid. The papers use one bit.

  Returns:
    Array of the shape and dtype of `x`.

  Examples:
    >>> x, key, grid = jnp.array([0.5, 1.5]), jax.random.key(0), quantizers.grid(1)
    >>> estimators.stompp(x, 0.0, key, grid), estimators.stompp(x, 1.0, key, grid)
    (Array([0.5, 1. ], dtype=float32), Array([1., 1.], dtype=float32))
  """
  return _frozen(x, alpha, key, grid, False)


def stompp_ste(
    x: jax.Array, alpha: jax.Array | float, key: jax.Array, grid: Grid
) -> jax.Array:
  """StoMPP with the straight-through estimator at frozen elements (arXiv 2606.27759).

  The forward pass is that of `stompp`. The backward pass computes g * 1[|x| <= 1] for
  all elements.

  Args:
    x: Float array of any shape.
    alpha: Numbers in [0, 1]: a scalar, or an array that broadcasts to the shape of
      `x`.
    key: PRNG key.
    grid: Any grid. The paper uses one bit.

  Returns:
    Array of the shape and dtype of `x`.

  Examples:
    >>> x, key, grid = jnp.array([0.5, 1.5]), jax.random.key(0), quantizers.grid(1)
    >>> jax.grad(lambda x: estimators.stompp_ste(x, 1.0, key, grid).sum())(x)
    Array([1., 0.], dtype=float32)
  """
  return _frozen(x, alpha, key, grid, True)


def parq(x: jax.Array, alpha: jax.Array | float, grid: Grid) -> jax.Array:
  """The proximal map of PARQ, a staircase that steepens (Jin et al., arXiv 2503.15748).

  Between neighboring levels with the threshold t, the forward pass computes
  t + (x - t) / (1 - alpha), clipped to these levels. With alpha = 0 it clips x to the
  outermost levels, and with alpha = 1 it is h(x). The backward pass computes
  g * 1[|x| <= 1].

  The paper's thresholds are halfway between levels; here they are those of the grid. It
  quantizes weights alone, and its gradient is not masked, which makes no difference to
  weights in [-1, 1]. Its public code (torchao) lets 1 - alpha fall along a sigmoid, as
  alpha_shape="sigmoid" does with alpha_start=0.

  Args:
    x: Float array of any shape.
    alpha: Numbers in [0, 1]: a scalar, or an array that broadcasts to the shape of
      `x`.
    grid: Any grid. Its thresholds broadcast against the trailing axes of `x`.

  Returns:
    Array of the shape and dtype of `x`.

  Examples:
    >>> x, grid = jnp.array([-0.25, 0.75]), quantizers.grid(1)
    >>> estimators.parq(x, 0.5, grid)  # The slope is 2.
    Array([-0.5,  1. ], dtype=float32)
  """
  return _parq(_floats(x), _number("alpha", alpha, 0, 1), grid)


# What is done to weights before and after they are quantized follows.


def periodic(weights: jax.Array, frequency: float) -> jax.Array:
  """BiPer's periodic function of latent weights (Vargas et al., arXiv 2404.01278).

  The result is sin(frequency * weights), which an estimator then quantizes. With the
  straight-through estimator and one bit, the forward pass of both is BiPer's square
  wave, and the backward pass is the derivative of the sine:

      y = sign(sin(frequency * w)),   dL/dw = g * frequency * cos(frequency * w)

  This is the second stage of the authors' public code (edmav4/BiPer). Its first stage
  trains the sine itself as float weights. The code takes a frequency of 20, leaves the
  first and the last layer as they are, quantizes activations with `approx_sign`, and
  adds tau * mean(sin(frequency * w)^2) to the loss. This function is the quantizer of
  weights alone.

  Args:
    weights: Float array of any shape.
    frequency: Frequency, more than 0.

  Returns:
    Array of the shape and dtype of `weights`.

  Examples:
    >>> sine = estimators.periodic(jnp.array([0.1, 0.2]), 20.0)
    >>> estimators.ste(sine, quantizers.grid(1))  # The signs of sin(2) and sin(4).
    Array([ 1., -1.], dtype=float32)
  """
  weights = _floats(weights)
  wide = weights.astype(quantizers.compute_dtype(weights))
  return jnp.sin(_number("frequency", frequency, 0, _LARGEST).astype(wide.dtype)
                 * wide).astype(weights.dtype)


def layer_mean_scale(quantized: jax.Array, weights: jax.Array) -> jax.Array:
  """DoReFa-Net's scale of one-bit weights (Zhou et al., arXiv 1606.06160).

  The forward pass computes quantized * mean |W|, where the mean is over the layer. The
  backward pass hands g to `quantized` without scaling it, and nothing to the mean.
  (Ternary Weight Networks take the mean over the weights beyond the threshold only.)

  Args:
    quantized: Float array (..., output channels) that an estimator made of `weights`.
    weights: Float array of the same shape.

  Returns:
    Array of the same shape.

  Examples:
    >>> weights = jnp.array([[1.0, 2.0], [-3.0, -6.0]])  # The mean magnitude is 3.
    >>> estimators.layer_mean_scale(jnp.sign(weights), weights)
    Array([[ 3.,  3.],
           [-3., -3.]], dtype=float32)
  """
  return _scaled_straight(quantized, mean_magnitude(weights, "layer_mean"))


def channel_mean_scale(quantized: jax.Array, weights: jax.Array) -> jax.Array:
  """XNOR-Net's scale (Rastegari et al., arXiv 1603.05279, section 3.1).

  The forward pass computes quantized * mean |W|, where the mean is over the n weights
  of each output channel. The gradient of `quantized` is g * mean |W|. Each weight also
  gets g / n for its effect on the mean, as the paper prints it. (The exact derivative
  is sign(w) / n times the sum of g * quantized over the channel.)

  Args:
    quantized: Float array (..., output channels) that an estimator made of `weights`.
    weights: Float array of the same shape.

  Returns:
    Array of the same shape.

  Examples:
    >>> weights = jnp.array([[1.0, 2.0], [-3.0, -6.0]])  # Means of channels: 2 and 4.
    >>> estimators.channel_mean_scale(jnp.sign(weights), weights)
    Array([[ 2.,  4.],
           [-2., -4.]], dtype=float32)
  """
  scale = lax.stop_gradient(mean_magnitude(weights, "channel_mean"))
  scale = scale.reshape((1,) * (weights.ndim - 1) + (-1,))
  n = weights.size // weights.shape[-1]
  return quantized * scale + (weights - lax.stop_gradient(weights)) / n


WEIGHT_SCALES = {"none": lambda quantized, weights: quantized,
                 "layer_mean": layer_mean_scale, "channel_mean": channel_mean_scale}


def mean_magnitude(weights: jax.Array, rule: str) -> jax.Array:
  """The mean of |W| over a layer or over each of its output channels.

  Args:
    weights: Float array (..., output channels).
    rule: "channel_mean" for one mean per output channel. Any other name gives one mean
      for the layer.

  Returns:
    Array (output channels,) with "channel_mean", otherwise (), in the weights' dtype.

  Raises:
    TypeError: The weights are not a float array.

  Examples:
    >>> weights = jnp.array([[1.0, 2.0], [-3.0, -6.0]])
    >>> estimators.mean_magnitude(weights, "channel_mean")
    Array([2., 4.], dtype=float32)
  """
  quantizers.check_float("weights", weights)
  axes = tuple(range(weights.ndim - 1)) if rule == "channel_mean" else None
  return abs(weights).mean(axes)


def stochastic_neuron(
    x: jax.Array, key: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """The unbiased stochastic binary neuron (Eq 2, 3).

  The result is h = 1[z < sigmoid(x)] with z ~ U[0, 1]. (The paper prints
  z > sigmoid(x), under which Eq 3 would be biased.) Use `score_function_surrogate` to
  train through the neuron. The gradient of log P(h) is h - sigmoid(x), the factor of
  Eq 3.

  Args:
    x: Logits, a float array of any shape.
    key: PRNG key.

  Returns:
    h in {0, 1} and log P(h), both of the shape and dtype of `x`. h has no gradient.

  Examples:
    >>> h, log_prob = estimators.stochastic_neuron(jnp.zeros(1), jax.random.key(0))
    >>> jnp.exp(log_prob)  # Both values of h are as probable.
    Array([0.5], dtype=float32)
  """
  quantizers.check_float("x", x)
  z = jax.random.uniform(key, x.shape, quantizers.compute_dtype(x))
  on = lax.stop_gradient(z < jax.nn.sigmoid(x.astype(z.dtype)))
  log_prob = jnp.where(on, jax.nn.log_sigmoid(x), jax.nn.log_sigmoid(-x))
  return on.astype(x.dtype), log_prob


def score_function_surrogate(loss: jax.Array, log_prob: jax.Array) -> jax.Array:
  """`loss` with the score-function gradient added (Eq 3).

  Args:
    loss: Float array (...) with one value for each independent sample.
    log_prob: Float array (..., neurons...) with the log-probabilities of the neurons
      that each loss depends on.

  Returns:
    The values and shape of `loss`. The gradient is that of `loss` plus
    loss * d(sum of log_prob).

  Examples:
    >>> loss, log_prob = jnp.array(3.0), jnp.array([-0.5, -2.0])  # Two neurons.
    >>> jax.grad(estimators.score_function_surrogate, argnums=1)(loss, log_prob)
    Array([3., 3.], dtype=float32)
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
    "parq": parq,
    "reste": reste,
    "ste": ste,
    "stochastic_aqe": stochastic_aqe,
    "stompp": stompp,
    "stompp_ste": stompp_ste,
    "swish_sign": swish_sign,
}


@functools.lru_cache
def by_name(name: str, *, gradient: str = "eq18") -> Callable[..., jax.Array]:
  """The estimator called `name`, with the one signature that networks use.

  Args:
    name: One of `network_estimators()`.
    gradient: Value for the estimator's argument of this name, if it has one.

  Returns:
    A function f(x, alpha, grid, make_key). It passes on the arguments that the
    estimator takes, and calls `make_key()` only if the estimator takes a key. If its
    attribute `learns_step` is true, step= must be given too, and count= may be given;
    see `lsq`.

  Raises:
    ValueError: There is no such estimator, or the returned function is called with a
      grid that the estimator is not defined on.

  Examples:
    >>> x, estimator = jnp.array([0.25]), estimators.by_name("aqe")
    >>> estimator(x, 0.75, quantizers.grid(1), lambda: jax.random.key(0))
    Array([0.8125], dtype=float32)
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
  """The names that `by_name` takes, in alphabetical order.

  Examples:
    >>> estimators.network_estimators()[:4]
    ('approx_sign', 'aqe', 'dsq', 'ede')
  """
  return tuple(_ESTIMATORS)


def _check_gradient(gradient: str) -> None:
  if gradient not in GRADIENTS:
    raise ValueError(f"gradient={gradient!r}: must be one of {', '.join(GRADIENTS)}")


def _floats(x: Any) -> jax.Array:
  """Converts `x` to an array and checks that it is float."""
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
  """Converts a parameter to a float array and checks its range.

  The range of JAX arrays is not checked, because they may be traced, and waiting for
  their values would take time.
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
  """1[|x| <= 1], which includes +-1: clipped weights there must be able to leave."""
  return (jnp.abs(x) <= 1).astype(x.dtype)


def _mix(x: jax.Array, alpha: jax.Array, h: jax.Array) -> jax.Array:
  # Unlike x + alpha * (h - x), this form is exactly h for alpha = 1 and x for alpha =
  # 0.
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
  """Computes h(x), with the gradient g * slope(x, shape, grid, g).

  `shape` is the parameter of the slope, a scalar or an array.
  """
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
  y = jnp.clip(5 * x, -80, 80)  # cosh(80) is finite, and the slope there is about 0.
  return 5 * (2 - y * jnp.tanh(y / 2)) / (1 + jnp.cosh(y))


def _slope_ede(x, alpha, grid, g):
  t = 10 ** (2 * alpha - 1)
  # 1 - tanh(t x)^2 is computed as 1 / cosh(t x)^2. The difference would cancel to 0 in
  # the tails, where tanh rounds to 1.
  return jnp.maximum(1 / t, 1) * t / jnp.cosh(jnp.clip(t * x, -40, 40)) ** 2


def _slope_reste(x, alpha, grid, g):
  o, size = 1 + 2 * alpha, jnp.abs(x)
  power = jnp.maximum(size, 0.1) ** (1 / o - 1)
  return jnp.where(size > 1.5, 0, jnp.where(size > 0.1, power / o, power))


def _steps(grid, dtype):
  """Yields (lower level, upper level, threshold) of each step to a positive level."""
  levels = grid.magnitudes.astype(dtype)
  if grid.thresholds.shape[0]:
    below = jnp.concatenate([jnp.zeros(1, dtype), levels[:-1]])
    thresholds = grid.thresholds.astype(dtype)
  else:  # One bit has a single step, from -1 to 1.
    below, thresholds = -levels, jnp.zeros(1, dtype)
  return zip(below, levels, thresholds)


def _slope_dsq(x, alpha, grid, g):
  a = 0.5 - 0.49 * alpha
  s, k = 1 / (1 - a), jnp.log(2 / a - 1)
  size = jnp.abs(x)
  slope = jnp.zeros_like(x)
  for low, high, threshold in _steps(grid, x.dtype):
    y = k * (size - threshold) / (high - low)
    slope = jnp.where(size >= jnp.maximum(low, 0), s * k / 2 / jnp.cosh(y) ** 2, slope)
  return slope * _inside(x)


@jax.custom_vjp
def _parq(x, alpha, grid):
  wide = quantizers.compute_dtype(x)
  alpha, size = alpha.astype(wide), jnp.abs(x.astype(wide))
  # At alpha = 1, where the result is not used, the division must not fail.
  flatness = jnp.where(alpha < 1, 1 - alpha, 1)
  y = jnp.zeros_like(size)
  for low, high, threshold in _steps(grid, wide):
    step = jnp.clip(threshold + (size - threshold) / flatness, low, high)
    y = jnp.where(size >= jnp.maximum(low, 0), step, y)
  soft = (jnp.sign(x).astype(wide) * y).astype(x.dtype)
  return jnp.where(alpha < 1, soft, quantizers.quantize(x, grid))


_parq.defvjp(
    lambda x, alpha, grid: (_parq(x, alpha, grid), (x, alpha, grid)),
    lambda saved, g: (g * _inside(saved[0]), *_zeros(saved[1:])))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _lsq(x, step, grid, count):
  wide = quantizers.compute_dtype(x)
  step = lax.broadcast_to_rank(step.astype(wide), x.ndim)
  y = quantizers.without_denormals(x.astype(wide)) / step
  return (step * quantizers.quantize(y, grid)).astype(x.dtype)


def _lsq_backward(count, saved, g):
  x, step, grid = saved
  wide = quantizers.compute_dtype(x)
  y = quantizers.without_denormals(x.astype(wide)) / lax.broadcast_to_rank(
      step.astype(wide), x.ndim)
  inside = jnp.abs(y) <= 1
  slope = jnp.where(inside, quantizers.quantize(y, grid) - y, jnp.sign(y))
  balance = (count * grid.magnitudes.shape[0]) ** -0.5
  to_step = balance * jnp.sum(
      g.astype(wide) * slope, axis=tuple(range(g.ndim - step.ndim)))
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
