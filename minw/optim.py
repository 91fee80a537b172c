"""Optimizers of the paper, Bop, and the clip of the latent weights."""

from typing import Any, Callable

import jax
import jax.numpy as jnp
import optax

from minw.schedules import Schedule


def optimizer(
    name: str,
    learning_rate: Schedule,
    *,
    adam_epsilon: float = 1e-8,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    bop_adaptivity_rate: float = 1e-4,
    bop_threshold: float = 1e-8,
    one_bit: Callable[[str], bool] = lambda path: False,
) -> optax.GradientTransformation:
  """Adam, SGD with momentum, or Bop with Adam for what it does not know.

  Args:
    name: "adam", "sgd" or "bop".
    learning_rate: a function of the step.
    adam_epsilon: of Adam.
    momentum: of SGD.
    weight_decay: L2 penalty, added to the gradient of all kernels (parameters with two
      or more axes) as in He et al.; not decoupled. Not of those that Bop flips.
    bop_adaptivity_rate, bop_threshold: see `bop`.
    one_bit: whether the layer at a path ("block1/conv2") has weights of one bit.
  """
  if name in ("adam", "bop"):
    update = optax.adam(learning_rate, eps=adam_epsilon)
  elif name == "sgd":
    update = optax.sgd(learning_rate, momentum=momentum)
  else:
    raise ValueError(f"name={name!r}: must be adam, sgd or bop")
  if weight_decay:
    kernels = lambda params: jax.tree.map(lambda p: p.ndim > 1, params)
    update = optax.chain(optax.add_decayed_weights(weight_decay, kernels), update)
  update = _with_standard_promotion(update)
  if name != "bop":
    return update

  def label(path, _):
    *layer, parameter = (part.key for part in path)
    return "bop" if parameter == "kernel" and one_bit("/".join(layer)) else "adam"

  return optax.partition(
      {"bop": bop(bop_adaptivity_rate, bop_threshold), "adam": update},
      lambda params: jax.tree_util.tree_map_with_path(label, params))


def _with_standard_promotion(
    transformation: optax.GradientTransformation,
) -> optax.GradientTransformation:
  """Lets optax mix its integer counts with floats where JAX's promotion is strict."""
  def update(*arguments: Any) -> Any:
    with jax.numpy_dtype_promotion("standard"):
      return transformation.update(*arguments)

  rule: Any = update  # It passes on whatever arguments it gets.
  return optax.GradientTransformation(transformation.init, rule)


def bop(adaptivity_rate: float, threshold: float) -> optax.GradientTransformation:
  """The binary optimizer (Helwegen et al., arXiv 1906.02107, Algorithm 1).

  With m <- (1 - adaptivity_rate) m + adaptivity_rate g, from m = 0, a weight of 1 or
  -1 is flipped where |m| > threshold and m has its sign: there are no latent weights.
  Weights that are neither become so at the first update, by their sign (-1 for 0).

  The gradient counts in full, unlike with Adam: what an estimator multiplies it by, as
  AQE by 2 alpha at each quantizer on the way, acts as a lower threshold.

  Args:
    adaptivity_rate: in [0, 1].
    threshold: at least 0.

  Returns:
    A transformation whose state is m, and whose `update` needs the parameters.
  """
  def init(params):
    return jax.tree.map(jnp.zeros_like, params)

  def update(gradients, means, params):
    means = jax.tree.map(
        lambda m, g: (1 - adaptivity_rate) * m + adaptivity_rate * g, means, gradients)

    def change(m, w):
      flips = (jnp.abs(w) == 1) & (jnp.abs(m) > threshold) & (m * w > 0)
      # At first w + (sign - w) must be the sign: exact where there is no flip.
      return jnp.where(flips, -2 * w, jnp.where(w > 0, 1, -1).astype(w.dtype) - w)

    return jax.tree.map(change, means, params), means

  rule: Any = update  # Optax declares that parameters may be missing.
  return optax.GradientTransformation(init, rule)


def clip_kernels(params: Any, quantized: Any) -> Any:
  """Clips latent weights to [-1, 1] (Algorithm 1, step 2).

  Args:
    params: a tree of arrays.
    quantized: the same tree of bools, true for the kernels that are on a grid.
  """
  return jax.tree.map(
      lambda p, clip: jnp.clip(p, -1.0, 1.0) if clip else p, params, quantized)
