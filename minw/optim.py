"""The optimizers of the paper, Bop, and the clipping of latent weights."""

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
    decoupled_weight_decay: bool = False,
    latent_weight_decay_factor: float = 1.0,
    norm_weight_decay_factor: float = 0.0,
    gradient_clip_norm: float = 0.0,
    bop_adaptivity_rate: float = 1e-4,
    bop_threshold: float = 1e-8,
    on_grid: Callable[[str], bool] = lambda path: False,
    one_bit: Callable[[str], bool] = lambda path: False,
) -> optax.GradientTransformation:
  """Makes Adam, SGD with momentum, or Bop combined with Adam.

  Bop flips one-bit weights. Adam updates all other parameters beside it.

  Args:
    name: "adam", "sgd" or "bop".
    learning_rate: Learning rate as a function of the step.
    adam_epsilon: Epsilon of Adam.
    momentum: Momentum of SGD.
    weight_decay: Coefficient of an L2 penalty on all kernels (parameters with two or
      more axes), except those that Bop flips. It is added to the gradient as in He et
      al.
    decoupled_weight_decay: Whether the decay is kept apart from the gradient. Each step
      then subtracts learning_rate * weight_decay * parameter, as in AdamW (Loshchilov
      and Hutter, arXiv 1711.05101).
    latent_weight_decay_factor: Factor on the decay of latent weights, which are the
      kernels of layers on a grid.
    norm_weight_decay_factor: Factor on the decay of parameters with one axis, which are
      batch norm's scales and shifts.
    gradient_clip_norm: Largest norm of all gradients together. Larger gradients are
      scaled to it. 0 for no limit.
    bop_adaptivity_rate: Adaptivity rate of Bop; see `bop`.
    bop_threshold: Threshold of Bop; see `bop`.
    on_grid: Function that tells whether the layer at a path ("block1/conv2") has
      weights on a grid.
    one_bit: Function that tells whether the layer at a path has one-bit weights.

  Returns:
    The optimizer.

  Raises:
    ValueError: `name` is none of these.
  """
  if name not in ("adam", "bop", "sgd"):
    raise ValueError(f"name={name!r}: must be adam, sgd or bop")
  decays = _weight_decays(
      weight_decay, latent_weight_decay_factor, norm_weight_decay_factor, on_grid)
  if name == "sgd":
    rule = optax.trace(momentum)
  else:
    rule = optax.scale_by_adam(eps=adam_epsilon)
  descent = optax.scale_by_learning_rate(learning_rate)
  if decoupled_weight_decay:
    update = optax.chain(rule, *decays, descent)
  else:
    update = optax.chain(rule, descent)
    if decays:
      update = optax.chain(*decays, update)
  update = _with_standard_promotion(update)
  if name == "bop":
    def label(path, _):
      layer, parameter = _split(path)
      return "bop" if parameter == "kernel" and one_bit(layer) else "adam"

    update = optax.partition(
        {"bop": bop(bop_adaptivity_rate, bop_threshold), "adam": update},
        lambda params: jax.tree_util.tree_map_with_path(label, params))
  if gradient_clip_norm:
    update = optax.chain(optax.clip_by_global_norm(gradient_clip_norm), update)
  return update


def _weight_decays(
    weight_decay: float, latent_factor: float, norm_factor: float,
    on_grid: Callable[[str], bool],
) -> list[optax.GradientTransformation]:
  """The decays of groups of parameters; see `optimizer`. Decays of 0 are left out."""
  def factor_of(path, parameter):
    layer, name = _split(path)
    if parameter.ndim > 1:
      return latent_factor if name == "kernel" and on_grid(layer) else 1.0
    return norm_factor if parameter.ndim else 0.0  # The steps of LSQ are scalars.

  def decay(factor):
    return optax.add_decayed_weights(
        weight_decay * factor, lambda params: jax.tree_util.tree_map_with_path(
            lambda path, parameter: factor_of(path, parameter) == factor, params))

  return [decay(factor) for factor in dict.fromkeys((1.0, latent_factor, norm_factor))
          if weight_decay * factor]


def _split(path: Any) -> tuple[str, str]:
  """The path of a layer ("block1/conv2"), and the name of its parameter."""
  *layer, parameter = (part.key for part in path)
  return "/".join(layer), parameter


def _with_standard_promotion(
    transformation: optax.GradientTransformation,
) -> optax.GradientTransformation:
  """Lets optax mix integer counts with floats even if JAX's promotion is strict."""
  def update(*arguments: Any) -> Any:
    with jax.numpy_dtype_promotion("standard"):
      return transformation.update(*arguments)

  rule: Any = update  # It passes on all its arguments.
  return optax.GradientTransformation(transformation.init, rule)


def bop(adaptivity_rate: float, threshold: float) -> optax.GradientTransformation:
  """The binary optimizer (Helwegen et al., arXiv 1906.02107, Algorithm 1).

  Bop has no latent weights. It keeps a moving average m of the gradient g for each
  weight, m <- (1 - adaptivity_rate) m + adaptivity_rate g, starting at m = 0. A weight
  of 1 or -1 is flipped if |m| > threshold and m has the sign of the weight. Other
  weights become 1 or -1 at the first update, by their sign (-1 for 0).

  Unlike with Adam, the size of the gradient matters. If an estimator multiplies the
  gradient by a factor, as AQE does by 2 alpha at each quantizer on the way, this acts
  like a threshold divided by the factor.

  Args:
    adaptivity_rate: Weight of the new gradient in the average, in [0, 1].
    threshold: Threshold on |m|, at least 0.

  Returns:
    A transformation with the state m. Its `update` needs the parameters.
  """
  def init(params):
    return jax.tree.map(jnp.zeros_like, params)

  def update(gradients, means, params):
    means = jax.tree.map(
        lambda m, g: (1 - adaptivity_rate) * m + adaptivity_rate * g, means, gradients)

    def change(m, w):
      flips = (jnp.abs(w) == 1) & (jnp.abs(m) > threshold) & (m * w > 0)
      # The first update changes a weight w to its sign, w + (sign - w). Later, without
      # a flip, the change is exactly 0.
      return jnp.where(flips, -2 * w, jnp.where(w > 0, 1, -1).astype(w.dtype) - w)

    return jax.tree.map(change, means, params), means

  rule: Any = update  # Optax declares that parameters may be missing.
  return optax.GradientTransformation(init, rule)


def clip_kernels(params: Any, quantized: Any) -> Any:
  """Clips latent weights to [-1, 1] (Algorithm 1, step 2).

  Args:
    params: Tree of arrays.
    quantized: Tree of the same structure with bools, true for kernels on a grid.

  Returns:
    The parameters, with these kernels clipped.
  """
  return jax.tree.map(
      lambda p, clip: jnp.clip(p, -1.0, 1.0) if clip else p, params, quantized)
