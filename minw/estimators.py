"""Gradient estimators for quantizers: forward rule and backward rule in one function.

Equation numbers refer to Chen et al. (arXiv 2003.04296). All are pure functions of
arrays: alpha and the grid are ordinary traced arguments with a zero cotangent, so one
compilation serves a whole annealing schedule, and a sweep over alpha can be vmapped.
Results keep the dtype of `x`; the mixture is formed in float32 (float64 for float64).
"""

import functools
import inspect
from typing import Callable

import jax
from jax import lax
import jax.numpy as jnp

from minw import quantizers
from minw.quantizers import Grid

# What the paper can be read to prescribe for AQE's backward, as a factor on the
# cotangent inside [-1, 1]. Under Adam and a constant alpha they train alike.
GRADIENTS = {
    "eq18": lambda alpha: 2 * alpha,  # Eq 18, 19
    "algorithm1": jnp.ones_like,  # Algorithm 1: g unchanged
    "eq15": lambda alpha: 1 - alpha,  # Eq 15: differentiate the mixture, h' = 0
}


def ste(x: jax.Array, grid: Grid) -> jax.Array:
  """The straight-through estimator (Eq 4, 5).

  Forward h(x); backward g * 1[|x| <= 1].

  Args:
    x: float, any shape.
    grid: thresholds broadcast against the trailing axes of `x`.

  Returns:
    The shape and dtype of `x`.
  """
  return _ste(x, grid)


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
  return _aqe(x, jnp.asarray(alpha, jnp.result_type(float)), grid, gradient)


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
  z = jax.random.uniform(key, x.shape, quantizers._wide(x), -1.0, 1.0)
  return _stochastic_aqe(x, jnp.asarray(alpha, jnp.result_type(float)), z, gradient)


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
  z = jax.random.uniform(key, x.shape, quantizers._wide(x))
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


def by_name(name: str, *, gradient: str = "eq18") -> Callable[..., jax.Array]:
  """The estimator called `name`, with the one signature that networks use.

  Args:
    name: a function of this module whose arguments are among those below.
    gradient: bound, if the estimator has that argument.

  Returns:
    f(x, alpha, grid, make_key): passes on what the estimator takes; `make_key()` is
    called only if it takes a key.

  Raises:
    ValueError: no such estimator, or (when called) a grid it is not defined on.
  """
  usable = network_estimators()
  if name not in usable:
    raise ValueError(f"estimator={name!r}: must be one of {', '.join(usable)}")
  function = globals()[name]
  takes = inspect.signature(function).parameters
  if "gradient" in takes:
    _check_gradient(gradient)
    function = functools.partial(function, gradient=gradient)

  def estimator(x, alpha, grid, make_key):
    arguments = {}
    if "alpha" in takes:
      arguments["alpha"] = alpha
    if "grid" in takes:
      arguments["grid"] = grid
    elif grid.thresholds.shape[0]:
      raise ValueError(f"estimator {name!r} is defined for one bit only")
    if "key" in takes:
      arguments["key"] = make_key()
    return function(x, **arguments)

  return estimator


def network_estimators() -> tuple[str, ...]:
  """The names `by_name` takes: public functions of x and of an alpha or a grid."""
  def usable(function):
    takes = inspect.signature(function).parameters
    return "x" in takes and ("alpha" in takes or "grid" in takes)

  return tuple(name for name, value in sorted(globals().items())
               if inspect.isfunction(value) and name[0] != "_" and usable(value))


def _check_gradient(gradient: str) -> None:
  if gradient not in GRADIENTS:
    raise ValueError(f"gradient={gradient!r}: must be one of {', '.join(GRADIENTS)}")


def _inside(x: jax.Array) -> jax.Array:
  """1[|x| <= 1]: clipped weights sit at exactly +-1 and must be able to leave."""
  return (jnp.abs(x) <= 1).astype(x.dtype)


def _mix(x: jax.Array, alpha: jax.Array, h: jax.Array) -> jax.Array:
  # This form, not x + alpha * (h - x), is exactly h at 1 and exactly x at 0.
  wide = quantizers._wide(x)
  alpha = alpha.astype(wide)
  return (alpha * h.astype(wide) + (1 - alpha) * x.astype(wide)).astype(x.dtype)


def _scaled(g: jax.Array, x: jax.Array, alpha: jax.Array, gradient: str) -> jax.Array:
  wide = quantizers._wide(g)
  factor = GRADIENTS[gradient](alpha).astype(wide)
  return (factor * g.astype(wide)).astype(g.dtype) * _inside(x)


def _zeros(tree):
  return jax.tree.map(jnp.zeros_like, tree)


@jax.custom_vjp
def _ste(x, grid):
  return quantizers.quantize(x, grid)


_ste.defvjp(
    lambda x, grid: (_ste(x, grid), (x, grid)),
    lambda saved, g: (g * _inside(saved[0]), _zeros(saved[1])),
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _aqe(x, alpha, grid, gradient):
  return _mix(x, alpha, quantizers.quantize(x, grid))


_aqe.defvjp(
    lambda x, alpha, grid, gradient: (_aqe(x, alpha, grid, gradient),
                                      (x, alpha, grid)),
    lambda gradient, saved, g: (_scaled(g, *saved[:2], gradient),
                                *_zeros(saved[1:])),
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _stochastic_aqe(x, alpha, z, gradient):
  h = jnp.where(x.astype(z.dtype) > z, 1, -1)
  return _mix(x, alpha, h)


_stochastic_aqe.defvjp(
    lambda x, alpha, z, gradient: (_stochastic_aqe(x, alpha, z, gradient),
                                   (x, alpha, z)),
    lambda gradient, saved, g: (_scaled(g, *saved[:2], gradient),
                                *_zeros(saved[1:])),
)
