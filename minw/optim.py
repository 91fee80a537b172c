"""The optimizers of the paper, Bop, OvSW, and the clipping of latent weights."""

from typing import Any, Callable, NamedTuple

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
    ovsw_scaling: float = 0.0,
    ovsw_decay: float = 0.0,
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
      batch norm's scales and shifts and those of RPReLU. Learned steps and thresholds
      do not decay.
    gradient_clip_norm: Largest norm of all gradients together. Larger gradients are
      scaled to it. 0 for no limit.
    ovsw_scaling: Scaling of the gradient of one-bit weights; see `ovsw`.
    ovsw_decay: Decay of one-bit weights that do not change their sign; see `ovsw`.
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
  def is_one_bit(path, _):
    layer, parameter = _split(path)
    return parameter == "kernel" and one_bit(layer)

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
    def label(path, leaf):
      return "bop" if is_one_bit(path, leaf) else "adam"

    update = optax.partition(
        {"bop": bop(bop_adaptivity_rate, bop_threshold), "adam": update},
        lambda params: jax.tree_util.tree_map_with_path(label, params))
  if ovsw_scaling or ovsw_decay:
    update = optax.chain(optax.masked(
        ovsw(ovsw_scaling, ovsw_decay),
        lambda params: jax.tree_util.tree_map_with_path(is_one_bit, params)), update)
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
    if name in ("step", "threshold_widths"):
      return 0.0
    if parameter.ndim > 1:
      return latent_factor if name == "kernel" and on_grid(layer) else 1.0
    return norm_factor

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


class OvswState(NamedTuple):
  """The state of `ovsw`.

  Attributes:
    flips: For each weight, the moving average of its changes of sign.
    positive: Whether each weight was positive at the previous update.
  """

  flips: Any
  positive: Any


def ovsw(
    scaling: float, decay: float, *, momentum: float = 0.999, threshold: float = 1e-4
) -> optax.GradientTransformation:
  """The gradients of OvSW, which wakes silent weights (Xiang et al., arXiv 2407.05257).

  Silent weights are one-bit weights that keep their sign in training. Let w be the
  latent weights of an output channel and g their gradient, with Euclidean norms |w| and
  |g|. Adaptive gradient scaling raises small gradients:

      g <- scaling * |w| / |g| * g    where |g| / |w| < scaling

  Silence awareness decaying keeps a moving average f of the changes of sign for each
  weight, starting at 0, and lets weights that seldom change decay towards 0:

      f <- momentum * f + (1 - momentum) * 1[the sign has changed]
      g <- g + decay * w              where f < threshold

  This follows the authors' public code (JingyangXiang/OvSW), in this order and with its
  lower limits of 1e-6 for |g| and 1e-3 for |w|. One thing differs: A weight of 0 counts
  as negative here, as for the quantizer, while the code gives 0 a sign of its own. The
  code takes the momentum and the threshold that are the defaults here, and for
  ResNet-20 on CIFAR-10 a scaling of 0.04 and a decay of 0.0009, with SGD. Adam divides
  gradients by their own size and therefore cancels most of the scaling.

  Args:
    scaling: Smallest ratio of the norm of a channel's gradient to that of its weights,
      at least 0. 0 leaves gradients as they are.
    decay: Coefficient of the decay, at least 0.
    momentum: Weight of the past in the moving average, in [0, 1].
    threshold: Averages below it mark silent weights.

  Returns:
    A transformation of gradients. Its `update` needs the parameters, arrays (...,
    output channels).
  """
  def init(params):
    return OvswState(jax.tree.map(jnp.zeros_like, params),
                     jax.tree.map(lambda w: w > 0, params))

  def scaled(g, w):
    axes = tuple(range(w.ndim - 1))
    of_gradient = jnp.maximum(jnp.sqrt(jnp.sum(g**2, axes, keepdims=True)), 1e-6)
    of_weights = jnp.maximum(jnp.sqrt(jnp.sum(w**2, axes, keepdims=True)), 1e-3)
    small = of_gradient / of_weights < scaling
    return jnp.where(small, scaling * of_weights / of_gradient, 1) * g

  def update(gradients, state, params):
    gradients = jax.tree.map(scaled, gradients, params)
    positive = jax.tree.map(lambda w: w > 0, params)
    flips = jax.tree.map(
        lambda f, now, before: momentum * f + jnp.where(now != before, 1 - momentum, 0),
        state.flips, positive, state.positive)
    gradients = jax.tree.map(
        lambda g, f, w: g + jnp.where(f < threshold, decay * w, 0),
        gradients, flips, params)
    return gradients, OvswState(flips, positive)

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
