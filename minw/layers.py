"""The layers of MINW-Nets, which are Flax modules with quantized weights and outputs.

A layer is called as layer(x, alpha, mode), with one of these modes:

    "train"  The layer quantizes with its estimator. Batch norm uses the statistics of
             the batch.
    "mixed"  The layer quantizes with its estimator. Batch norm uses the running
             statistics.
    "hard"   The layer computes as in the deployed network, on the variables that
             `minw.fold` makes.
    "fold"   The layer makes these variables. x is made by `fold_probe.make_rows`.

alpha is a number, or `Alphas`.

With alpha = 1, "train" and "mixed" use the hard quantizers of Eq 20. In mode "mixed",
layers sow the pair (output of their estimator, alpha) under the name "value" into the
collection "quantized".
"""

import fnmatch
import functools
import math
from typing import Any, Callable, NamedTuple, Sequence

import flax.linen as nn
import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from minw import estimators
from minw import fold
from minw import fold_probe
from minw import quantizers
from minw import structure

# Bits are 1 to 5 or the name of a float format; `quantizers.is_grid` tells which.
Bits = int | str
# Bits may also be a function of the layer's path.
BitsOf = Bits | Callable[[str], Bits]

_aqe = estimators.by_name("aqe")


class LayerInfo(NamedTuple):
  """The description of a layer that `trace` found.

  Attributes:
    path: Name of the layer after the names of the modules around it: "block1/conv2".
    kind: "conv", "dense" or "norm".
    bits: Bits of the weights. For a norm, bits of the output, or None if the output is
      not quantized.
    input_bits: Bits of the input: 16 for an image and 32 for accumulators. A sum of n
      codes has log2(n) bits more than a code.
    input_shape: Shape of the input, without the batch.
    output_shape: Shape of the output, without the batch.
    kernel_shape: Shape (..., inputs of a group, outputs) of the weights. It is empty
      for a norm.
    channel_parameters: Number of float32 parameters of a norm, 0 for other layers.
  """

  path: str
  kind: str
  bits: Bits | None
  input_bits: int
  input_shape: tuple[int, ...]
  output_shape: tuple[int, ...]
  kernel_shape: tuple[int, ...]
  channel_parameters: int


class Alphas(NamedTuple):
  """The alpha of a layer, where those of weights and activations differ.

  Attributes:
    weights: Alpha of the weights.
    activations: Alpha of the activations.
  """

  weights: Any
  activations: Any


def bits_by_rule(default: Bits, rules: Sequence[tuple[str, Bits]]) -> BitsOf:
  """Makes bits depend on the layer's path. The last rule that matches decides.

  Args:
    default: Bits of the layers that no rule matches.
    rules: Pairs of a path pattern ("conv1", "norm_*", "block?/*") and bits.

  Returns:
    Function from a layer's path to its bits.
  """
  def bits(path: str) -> Bits:
    matching = [b for pattern, b in rules if matches(pattern, path)]
    return matching[-1] if matching else default

  return bits


def matches(pattern: str, path: str) -> bool:
  """Whether a layer's path matches a shell pattern such as "norm_*" or "block?/*"."""
  return fnmatch.fnmatchcase(path, pattern)


@structure.layer
class QuantConv(nn.Module):
  """A convolution with quantized weights, no bias, and float32 accumulators.

  The input is expected to be on the grid that a `NormQuant` put it on.

  Attributes:
    features: Number of output channels.
    kernel_size: Size of the kernel, (height, width).
    strides: Strides, (vertical, horizontal).
    padding: "SAME", "VALID", or the padding in pixels, ((top, bottom), (left, right)).
    pad_value: Value of the padding. Beside inputs of -1 and 1, 0 is a third value.
    bits: Bits of the weights.
    threshold_rule: Rule for the thresholds of the weights; see
      `quantizers.weight_grid`.
    thresholds: Thresholds of the weights or factors on their mean; see
      `quantizers.weight_grid`.
    estimator: Function f(kernel, alpha, grid, make_key); see `estimators.by_name`. If
      it learns its step, the layer has a parameter "step" and uses
      `quantizers.positive_step` of it. The initial value is 2 sqrt(q) mean |W|, where q
      is the number of positive levels.
    step_per_channel: Whether an estimator that learns its step has one for each output
      channel, with the mean over the channel's weights.
    weight_scale: "none", "layer_mean" or "channel_mean"; see
      `estimators.WEIGHT_SCALES`. Weights in a float format are never scaled.
    frequency: Frequency of BiPer's periodic function of the weights, see
      `estimators.periodic`, or 0 for none.
    kernel_init: Initializer of the weights.
    dtype: Dtype of the operands in training.
    sum_dtype: Dtype to which sums are rounded in mode "train". Otherwise they are
      float32.
    feature_group_count: Number of equal groups into which input and output channels are
      split, in order. An output channel sums over the inputs of its own group. As many
      groups as input channels make a depthwise convolution.
    kernel_dilation: Distance between neighboring weights in pixels, (vertical,
      horizontal).

  Raises:
    ValueError: An attribute has a value that is not allowed. The constructor raises
      this.
  """

  features: int
  kernel_size: Sequence[int] = (3, 3)
  strides: Sequence[int] = (1, 1)
  padding: str | Sequence[tuple[int, int]] = "SAME"
  pad_value: float = 0.0
  bits: BitsOf = 1
  threshold_rule: str = "layer_mean"
  thresholds: Sequence[float] = ()
  estimator: Callable = _aqe
  step_per_channel: bool = False
  weight_scale: str = "none"
  frequency: float = 0.0
  kernel_init: Callable = nn.initializers.glorot_uniform()
  dtype: Any = jnp.float32
  sum_dtype: Any = jnp.float32
  feature_group_count: int = 1
  kernel_dilation: Sequence[int] = (1, 1)

  def __post_init__(self):
    _check_features(self.features)
    _check_pair("kernel_size", self.kernel_size)
    _check_pair("strides", self.strides)
    _check_pair("kernel_dilation", self.kernel_dilation)
    _check_padding(self.padding)
    groups = self.feature_group_count
    if not _is_count(groups, 1) or self.features % groups:
      raise ValueError(f"feature_group_count={groups!r}: must be a positive integer"
                       f" that divides features={self.features}")
    super().__post_init__()

  @nn.compact
  def __call__(self, x, alpha=1.0, mode: str = "hard"):
    if x.ndim != 4:
      raise ValueError(f"{'/'.join(self.path)}: gets an input of shape {x.shape}; a"
                       " convolution takes (batch, height, width, channels)")
    groups, channels = self.feature_group_count, x.shape[-1]
    if channels % groups:
      raise ValueError(
          f"{'/'.join(self.path)}: feature_group_count={groups} must divide both the"
          f" {channels} input channels and features={self.features}")
    shape = (*self.kernel_size, channels // groups, self.features)
    pads = self.pads(x.shape[1:3])
    pad_value = self.pad_value if any(map(any, pads)) else 0.0
    if mode == "fold":
      size = [(n + sum(pad) - (k - 1) * dilation - 1) // stride + 1
              for n, pad, k, dilation, stride in zip(
                  x.shape[1:3], pads, self.kernel_size, self.kernel_dilation,
                  self.strides)]
      return _fold_linear(self, x, shape, pad_value, size)
    return _linear(
        self, x, shape, alpha, mode,
        lambda x, kernel, **how: conv(
            x, kernel, self.strides, pads, pad_value, self.kernel_dilation, groups,
            **how))

  def pads(self, size: Sequence[int]) -> tuple[tuple[int, int], tuple[int, int]]:
    """The padding of a feature map in pixels, ((top, bottom), (left, right)).

    Args:
      size: Size of the feature map, (height, width).
    """
    if not isinstance(self.padding, str):
      (top, bottom), (left, right) = self.padding
      return (int(top), int(bottom)), (int(left), int(right))
    window = tuple((n - 1) * step + 1
                   for n, step in zip(self.kernel_size, self.kernel_dilation))
    rows, columns = lax.padtype_to_pads(
        tuple(size), window, tuple(self.strides), self.padding)
    return rows, columns

  def hard_shapes(self, params, input_shape, has_shortcut):
    """The shapes of the variables that mode "fold" makes."""
    del input_shape, has_shortcut
    return {"kernel": params["kernel"].shape}


@structure.layer
class QuantDense(nn.Module):
  """A dense layer with quantized weights, no bias, and float32 accumulators.

  Attributes:
    features: Number of outputs.
    bits: Bits of the weights.
    threshold_rule: Rule for the thresholds of the weights; see
      `quantizers.weight_grid`.
    thresholds: Thresholds of the weights or factors on their mean; see
      `quantizers.weight_grid`.
    estimator: Estimator of the weights, as in `QuantConv`.
    step_per_channel: Whether each output has a learned step, as in `QuantConv`.
    weight_scale: "none", "layer_mean" or "channel_mean", as in `QuantConv`.
    frequency: Frequency of a periodic function of the weights, as in `QuantConv`.
    kernel_init: Initializer of the weights.
    dtype: Dtype of the operands in training.
    sum_dtype: Dtype to which sums are rounded in mode "train". Otherwise they are
      float32.

  Raises:
    ValueError: `features` is not a positive integer. The constructor raises this.
  """

  features: int
  bits: BitsOf = 1
  threshold_rule: str = "layer_mean"
  thresholds: Sequence[float] = ()
  estimator: Callable = _aqe
  step_per_channel: bool = False
  weight_scale: str = "none"
  frequency: float = 0.0
  kernel_init: Callable = nn.initializers.glorot_uniform()
  dtype: Any = jnp.float32
  sum_dtype: Any = jnp.float32

  def __post_init__(self):
    _check_features(self.features)
    super().__post_init__()

  @nn.compact
  def __call__(self, x, alpha=1.0, mode: str = "hard"):
    shape = (x.shape[-1], self.features)
    if mode == "fold":
      return _fold_linear(self, x, shape, 0.0, x.shape[1:-1])
    return _linear(self, x, shape, alpha, mode, dense)

  def hard_shapes(self, params, input_shape, has_shortcut):
    """The shapes of the variables that mode "fold" makes."""
    del input_shape, has_shortcut
    return {"kernel": params["kernel"].shape}


@structure.layer
class NormQuant(nn.Module):
  """Batch norm and quantization, which turn sums into the inputs of the next layer.

  The layer computes batch norm, adds the shortcut if there is one, applies RPReLU if it
  is chosen, applies HardTanh, and quantizes.

  RPReLU is the activation of ReActNet (Liu et al. 2020):

      y -> y - gamma + zeta             where y > gamma
           |beta| (y - gamma) + zeta    elsewhere

  It has the parameters "rprelu_gamma", "rprelu_beta" and "rprelu_zeta" for each
  channel, with initial values 0, 0.25 and 0. The magnitude of beta keeps the layer
  monotone, so that it packs into thresholds for any learned values. ReActNet also
  learns a shift before the sign (RSign). It needs no parameter of its own here: zeta is
  this shift, and without RPReLU the bias of batch norm is.

  Attributes:
    bits: Bits of the output. None is for logits, to which only batch norm is applied.
    thresholds: Fixed thresholds; see `quantizers.input_grid`. If the step is learned,
      they are in units of it.
    estimator: Function f(x, alpha, grid, make_key); see `estimators.by_name`. If it
      learns its step, the layer has a parameter "step" with initial value 1, uses
      `quantizers.positive_step` of it, and has no HardTanh.
    learn_thresholds: Whether each channel learns thresholds of its own, of which
      `thresholds` are the initial values. The layer then has a parameter
      "threshold_widths"; see `quantizers.learned_thresholds` and `quantizers.stretch`.
      It has no effect on outputs of one bit or in a float format.
    momentum: Momentum of batch norm's running statistics.
    epsilon: Epsilon of batch norm.
    use_scale: Whether batch norm has a scale besides its bias.
    group_size: Number of consecutive examples of a batch over which batch norm takes
      its statistics in training. 0 is for the whole batch, on all devices.
    rprelu: Whether RPReLU is applied. Logits cannot have it.
  """

  bits: BitsOf | None = 1
  thresholds: Sequence[float] = ()
  estimator: Callable = _aqe
  learn_thresholds: bool = False
  momentum: float = 0.9
  epsilon: float = 1e-4
  use_scale: bool = True
  group_size: int = 0
  rprelu: bool = False

  @nn.compact
  def __call__(self, x, alpha=1.0, mode: str = "hard", shortcut=None):
    bits = bits_of(self)
    path = "/".join(self.path)
    if mode == "train" and not self.is_initializing():
      _check_group(path, x.shape, self.group_size)
    if self.rprelu and bits is None:
      raise ValueError(f"{path}: rprelu=True: must be False for logits")
    if self.learn_thresholds and _learns_step(self):
      raise ValueError(f"{path}: learn_thresholds=True: must be False with an estimator"
                       " that learns its step")
    if mode == "fold":
      return self._fold(x, bits, shortcut)
    y = self._normalized(x, mode)
    if shortcut is not None:
      y = y + self._scaled_shortcut(shortcut, mode)
    if bits is None:
      return y
    if self.rprelu:
      y = fold.apply_rprelu(y, self._rprelu(mode, x.shape[-1]))
    return self._quantized(y, alpha, mode, bits)

  def _normalized(self, x, mode):
    """Applies batch norm to `x`; in mode "hard", the exact one that folding made."""
    if mode == "hard":
      return fold.apply_norm(
          x, fold.Norm(*(self.get_variable("hard", n) for n in fold.Norm._fields)))
    if mode == "train" and self.group_size and not self.is_initializing():
      return _GroupedBatchNorm(
          self.group_size, self.momentum, self.epsilon, self.use_scale,
          name="batch_norm")(x)
    return nn.BatchNorm(
        use_running_average=mode == "mixed", momentum=self.momentum,
        epsilon=self.epsilon, use_scale=self.use_scale, dtype=jnp.float32,
        name="batch_norm")(x)

  def _scaled_shortcut(self, shortcut, mode):
    """The shortcut in units of this layer's step.

    The product is exact, because the levels of the shortcut are 0 or +-2^-n.
    """
    if mode != "hard" or not self.has_variable("hard", "shortcut_scale"):
      return shortcut
    scale = self.get_variable("hard", "shortcut_scale")
    return shortcut * lax.broadcast_to_rank(scale, shortcut.ndim)

  def _quantized(self, y, alpha, mode, bits):
    """Applies HardTanh, unless a step is learned, and the estimator or quantizer."""
    learns_step = _learns_step(self)
    if mode == "hard" or not learns_step:
      y = jax.nn.hard_tanh(y)
    if not quantizers.is_grid(bits):
      return quantizers.round_to(y, bits)
    grid = input_grid(self)
    if mode == "hard":
      if self.has_variable("hard", "thresholds"):
        grid = grid._replace(thresholds=quantizers.along_channels(
            self.get_variable("hard", "thresholds"), y.ndim))
      return quantizers.quantize(y, grid)
    if _learns_thresholds(self):
      y = self._stretched(y, grid)
    learned, step = {}, 1.0
    if isinstance(alpha, Alphas):
      alpha = alpha.activations
    if learns_step:
      step = quantizers.positive_step(
          self.param("step", nn.initializers.ones, ()))
      learned = dict(step=step, count=y[0].size)
    if mode == "mixed":
      # The layer sows one number per example, so that a mean can leave out the examples
      # that only pad a batch.
      distance = jnp.abs(y - step * quantizers.quantize(y / step, grid))
      self.sow("distance", "mean", jnp.mean(distance, axis=tuple(range(1, y.ndim))))
    y = self.estimator(y, alpha, grid, lambda: self.make_rng("estimator"), **learned)
    if mode == "mixed":
      self.sow("quantized", "value", (y, alpha))
    return y

  def _stretched(self, y, grid):
    """Maps the learned thresholds of each channel to those of the grid."""
    channels, fixed = y.shape[-1], quantizers.weight_factors(
        bits_of(self), "fixed", self.thresholds)
    widths = self.param("threshold_widths", lambda _: jnp.tile(
        jnp.float32(quantizers.threshold_widths(fixed))[:, None], (1, channels)))
    return quantizers.stretch(
        y, quantizers.learned_thresholds(widths), grid.thresholds)

  def _rprelu(self, mode, channels):
    if mode == "hard":
      return fold.Rprelu(*(
          self.get_variable("hard", f"rprelu_{n}") for n in fold.Rprelu._fields))
    first = fold.Rprelu(gamma=0.0, beta=0.25, zeta=0.0)
    gamma, beta, zeta = (
        self.param(f"rprelu_{name}", nn.initializers.constant(value), (channels,))
        for name, value in first._asdict().items())
    return fold.Rprelu(gamma, jnp.abs(beta), zeta)

  def _fold(self, x, bits, shortcut):
    params = self.variables["params"]["batch_norm"]
    stats = self.variables["batch_stats"]["batch_norm"]
    step = 1.0
    if _learns_step(self):
      step = float(fold_probe.round_scale(
          quantizers.positive_step(self.variables["params"]["step"])))
    # The network's own parameters map x to factor * x + summand; see `fold.fold`.
    factor = self.get_variable("affine", "factor", 1.0)
    summand = self.get_variable("affine", "summand", 0.0)
    hard = fold.fold_norm(
        stats["mean"] - summand, stats["var"],
        params["scale"] if self.use_scale else np.ones_like(params["bias"]),
        params["bias"], self.epsilon, *fold_probe.bound_and_unit(x),
        input_scale=factor * fold_probe.scale_of(x), output_scale=step)._asdict()
    if _learns_thresholds(self):
      hard["thresholds"] = fold.fold_thresholds(
          self.variables["params"]["threshold_widths"])
    if self.rprelu:
      learned = (self.variables["params"][f"rprelu_{n}"] for n in fold.Rprelu._fields)
      hard |= {f"rprelu_{name}": value for name, value in fold.fold_rprelu(
          fold.Rprelu(*learned), step)._asdict().items()}
    scale = None if shortcut is None else fold_probe.shortcut_scale(shortcut, step)
    if scale is not None:
      hard["shortcut_scale"] = scale
    for name, value in hard.items():
      self.put_variable("hard", name, value)
    if bits is None:
      return fold_probe.make_rows(fold_probe.probe_of(x))
    bound = np.ones(x.shape[1:], np.float32)
    return fold_probe.make_rows(
        fold_probe.Probe(bound, quantizers.step_size(bits), operand_bits(bits)), step)

  def hard_shapes(self, params, input_shape, has_shortcut):
    """The shapes of the variables that mode "fold" makes.

    They include "shortcut_scale" if the layer has a shortcut.
    """
    names = [*fold.Norm._fields]
    if self.rprelu:
      names += [f"rprelu_{name}" for name in fold.Rprelu._fields]
    if has_shortcut:
      names.append("shortcut_scale")
    shapes = dict.fromkeys(names, input_shape[-1:])
    if "threshold_widths" in params:
      count, channels = params["threshold_widths"].shape
      shapes["thresholds"] = (count - 1, channels)
    return shapes


def _check_group(path: str, shape: Sequence[int], group_size: int) -> None:
  """Raises ValueError if batch norm would see a single value of each channel.

  The difference of a single value and its mean is 0 for any input.
  """
  if (group_size or shape[0]) * math.prod(shape[1:-1]) == 1:
    raise ValueError(
        f"{path}: batch norm of one example of shape {tuple(shape[1:])} sees one value"
        " of each channel, which teaches it nothing: train with at least 2 examples")


class _GroupedBatchNorm(nn.Module):
  """Batch norm in training, for each group of consecutive examples of a batch.

  The variables are those of nn.BatchNorm. The running statistics are updated with the
  mean of the groups' statistics.

  Attributes:
    size: Number of examples in a group.
    momentum: Momentum of the running statistics.
    epsilon: Number added to the variance.
    use_scale: Whether there is a learned scale.
  """

  size: int
  momentum: float
  epsilon: float
  use_scale: bool

  @nn.compact
  def __call__(self, x):
    groups = x.reshape(-1, self.size, *x.shape[1:])
    axes = tuple(range(1, groups.ndim - 1))
    mean = groups.mean(axes, keepdims=True)
    var = jnp.maximum(jnp.square(groups).mean(axes, keepdims=True) - mean**2, 0)
    for name, value in (("mean", mean), ("var", var)):
      running: Any = self.variable("batch_stats", name, lambda: None)
      now = value.mean(tuple(range(groups.ndim - 1)))
      running.value = self.momentum * running.value + (1 - self.momentum) * now
    scale = lax.rsqrt(var + self.epsilon)
    if self.use_scale:
      learned = self.param("scale", nn.initializers.ones, x.shape[-1:])
      scale *= lax.broadcast_to_rank(learned, groups.ndim)
    bias = self.param("bias", nn.initializers.zeros, x.shape[-1:])
    bias = lax.broadcast_to_rank(bias, groups.ndim)
    return ((groups - mean) * scale + bias).reshape(x.shape)


def _is_count(value, least):
  return (isinstance(value, (int, np.integer)) and not isinstance(value, bool)
          and value >= least)


def _check_features(value):
  if not _is_count(value, 1):
    raise ValueError(f"features={value!r}: must be a positive integer")


def _check_pair(name, value):
  if not (isinstance(value, Sequence) and len(value) == 2
          and all(_is_count(n, 1) for n in value)):
    raise ValueError(f"{name}={value!r}: must be two positive integers")


def _check_padding(value):
  explicit = (
      isinstance(value, Sequence) and not isinstance(value, str) and len(value) == 2
      and all(isinstance(pair, Sequence) and len(pair) == 2
              and all(_is_count(n, 0) for n in pair) for pair in value))
  if not explicit and value not in ("SAME", "VALID"):
    raise ValueError(f"padding={value!r}: must be 'SAME', 'VALID', or the border in"
                     " pixels, ((top, bottom), (left, right))")


def max_pool(x, window: int = 2, share_gradient: bool = False):
  """Takes the maximum over windows that do not overlap.

  Rows and columns at the border that do not fill a window are dropped.

  Args:
    x: Array (batch, height, width, channels).
    window: Height and width of a window, which are also the strides.
    share_gradient: Whether tied values of a window share the gradient. Integers often
      tie. By default the first of them gets the whole gradient, as in TensorFlow and
      PyTorch. The two choices train different networks.

  Returns:
    Array (batch, height // window, width // window, channels) of the dtype of `x`.
  """
  if share_gradient:
    return _windows(x, window).max((2, 4))
  return _max_pool_first(x, window)


def _windows(x, window):
  n, h, w, c = x.shape
  h, w = h // window, w // window
  return x[:, :h * window, :w * window].reshape(n, h, window, w, window, c)


# Its gradient equals that of `nn.max_pool`, which XLA computes by a slow scatter.
@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _max_pool_first(x, window):
  return _windows(x, window).max((2, 4))


def _max_pool_first_backward(window, x, g):
  # `first` is the position of the first maximum in each window, row by row, and `place`
  # is the position of each pixel in its window. Where they agree, the pixel gets the
  # gradient of the window. The dropped border gets 0.
  parts = _windows(x, window).transpose(0, 1, 3, 5, 2, 4)
  first = jnp.argmax(parts.reshape(*g.shape, -1), axis=-1)[:, :, None, :, None]
  place = jnp.arange(window**2).reshape(1, 1, window, 1, window, 1)
  spread = jnp.where(first == place, g[:, :, None, :, None], 0)
  n, h, w, c = x.shape
  spread = spread.reshape(n, h // window * window, w // window * window, c)
  return (jnp.pad(spread, [(0, 0), (0, h % window), (0, w % window), (0, 0)]),)


_max_pool_first.defvjp(
    lambda x, window: (_max_pool_first(x, window), x), _max_pool_first_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def overlapping_max_pool(x, window: int, stride: int, pads=((0, 0), (0, 0))):
  """Takes the maximum over windows that may overlap, like `nn.max_pool`.

  The gradient is that of `nn.max_pool`, to the bit: the first maximum of a window gets
  the gradient of the window. XLA would compute it by a scatter, which is slow, and on
  GPUs a sort of the whole gradient where sums must have a fixed order. Here each pixel
  adds up the gradients of the windows in which it is first.

  Args:
    x: Array (batch, height, width, channels).
    window: Height and width of a window.
    stride: Vertical and horizontal distance of windows.
    pads: Border in pixels, ((top, bottom), (left, right)). It is never a maximum.

  Returns:
    Array of the dtype of `x`: (batch, rows of windows, columns of windows, channels).
  """
  padding: Any = pads  # Flax's type hint is str.
  return nn.max_pool(x, (window, window), (stride, stride), padding)


def _overlapping_max_pool_backward(window, stride, pads, residuals, g):
  x, pooled = residuals
  padded = jnp.pad(x, [(0, 0), *pads, (0, 0)], constant_values=-jnp.inf)
  # In a window, the places of a row are neighbors. A place of all windows is a slice.
  ends = [stride * (count - 1) + 1 for count in g.shape[1:3]]
  taken = jnp.zeros(g.shape, bool)
  parts = []
  for row, column in np.ndindex(window, window):
    values = lax.slice(
        padded, (0, row, column, 0),
        (x.shape[0], row + ends[0], column + ends[1], x.shape[3]),
        (1, stride, stride, 1))
    first = (values == pooled) & ~taken
    taken |= first
    beside = [(start, padded.shape[axis] - start - end, stride - 1) for axis, start, end
              in ((1, row, ends[0]), (2, column, ends[1]))]
    parts.append(lax.pad(jnp.where(first, g, 0), jnp.zeros((), g.dtype),
                         [(0, 0, 0), *beside, (0, 0, 0)]))
  # The last place belongs to the first window that holds a pixel.
  total = functools.reduce(jnp.add, reversed(parts))
  (top, _), (left, _) = pads
  return (total[:, top:top + x.shape[1], left:left + x.shape[2]],)


def _overlapping_max_pool_forward(x, window, stride, pads):
  pooled = overlapping_max_pool(x, window, stride, pads)
  return pooled, (x, pooled)


overlapping_max_pool.defvjp(
    _overlapping_max_pool_forward, _overlapping_max_pool_backward)


def conv(x, kernel, strides, pads, pad_value, dilation=(1, 1), groups=1, *, dtype,
         sum_dtype=jnp.float32, precision=None):
  """Computes a convolution (NHWC, HWIO) with constant padding.

  Args:
    x: Input (batch, height, width, input channels).
    kernel: Weights (height, width, input channels / groups, output channels).
    strides: Strides, (vertical, horizontal).
    pads: Padding in pixels, ((top, bottom), (left, right)).
    pad_value: Value of the padding.
    dilation: Distance between neighboring weights in pixels, (vertical, horizontal).
    groups: Number of groups into which input and output channels are split.
    dtype: Dtype to which the operands are converted.
    sum_dtype: Dtype to which the sums are rounded.
    precision: Precision of the products; see `lax.conv_general_dilated`. With
      `lax.Precision.HIGHEST`, sums that are integers, and that float32 holds, are
      exact. On GPUs the library chooses among algorithms, and some of them transform
      the operands and round (Winograd, FFT). There, these sums are of matrix products.

  Returns:
    float32 array (batch, height, width, output channels).
  """
  if pad_value:
    x = jnp.pad(x, [(0, 0), *pads, (0, 0)], constant_values=pad_value)
    pads = ((0, 0), (0, 0))
  x, kernel = x.astype(dtype), kernel.astype(dtype)
  if precision != lax.Precision.HIGHEST:
    sums = _convolution(
        x, kernel, strides, pads, dilation, groups, precision, sum_dtype)
    return sums.astype(jnp.float32)
  strides, pads, dilation = tuple(strides), tuple(map(tuple, pads)), tuple(dilation)
  return _exact_convolution(x, kernel, strides, pads, dilation, groups)


@functools.partial(jax.jit, static_argnums=(2, 3, 4, 5), inline=True)
def _exact_convolution(x, kernel, strides, pads, dilation, groups):
  # It is jitted so that layers of the same shape are traced once.
  products = functools.partial(
      _matrix_products, strides=strides, pads=pads, dilation=dilation, groups=groups)
  return lax.platform_dependent(
      x, kernel, cuda=products, rocm=products,
      default=lambda x, kernel: _convolution(
          x, kernel, strides, pads, dilation, groups, lax.Precision.HIGHEST))


def _convolution(x, kernel, strides, pads, dilation, groups, precision,
                 sum_dtype=jnp.float32):
  return lax.conv_general_dilated(
      x, kernel, strides, pads, rhs_dilation=dilation,
      feature_group_count=groups, dimension_numbers=("NHWC", "HWIO", "NHWC"),
      precision=precision, preferred_element_type=sum_dtype)


def _matrix_products(x, kernel, strides, pads, dilation, groups):
  """Computes a convolution as the sum of a matrix product for each weight's place."""
  height, width, inputs, outputs = kernel.shape
  x = jnp.pad(x, [(0, 0), *pads, (0, 0)])
  rows, columns = (
      stride * ((size - step * (taps - 1) - 1) // stride) + 1
      for size, taps, stride, step in zip(
          x.shape[1:3], (height, width), strides, dilation))
  acc: Any = 0
  for i, j in np.ndindex(height, width):
    top, left = i * dilation[0], j * dilation[1]
    part = lax.slice(x, (0, top, left, 0),
                     (x.shape[0], top + rows, left + columns, x.shape[3]),
                     (1, *strides, 1))
    acc += jnp.einsum(
        "nhwgi,igo->nhwgo", part.reshape(*part.shape[:3], groups, inputs),
        kernel[i, j].reshape(inputs, groups, outputs // groups),
        precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
  return acc.reshape(*acc.shape[:3], outputs)


def dense(x, kernel, *, dtype, sum_dtype=jnp.float32, precision=None):
  """Computes a matrix product, of operands converted to `dtype`, as float32.

  The sums are rounded to `sum_dtype`. For `precision`, see `conv`.
  """
  sums = jnp.matmul(x.astype(dtype), kernel.astype(dtype),
                    precision=precision, preferred_element_type=sum_dtype)
  return sums.astype(jnp.float32)


bits_of = structure.bits_of


def operand_bits(bits: Bits) -> int:
  """Converts `bits`, a number of bits or the name of a dtype, to a number of bits."""
  if quantizers.is_grid(bits) and not isinstance(bits, str):
    return bits
  return 8 * jnp.dtype(str(bits)).itemsize


def input_grid(layer: NormQuant) -> quantizers.Grid:
  """The grid of a layer's output. If the layer learns a step, it is in units of it."""
  bits = bits_of(layer)
  if _learns_step(layer):
    return quantizers.grid(bits, quantizers.unit_thresholds(bits, layer.thresholds))
  return quantizers.input_grid(bits, layer.thresholds)


def _learns_step(layer):
  bits = bits_of(layer)
  return (getattr(layer.estimator, "learns_step", False) and bits is not None
          and quantizers.is_grid(bits))


def _learns_thresholds(layer):
  bits = bits_of(layer)
  return (layer.learn_thresholds and bits is not None and quantizers.is_grid(bits)
          and bits > 1)


def _linear(layer, x, shape, alpha, mode, apply):
  """Computes a QuantConv or QuantDense, which differ in shapes and operation only.

  The kernel depends on the mode. In mode "hard" it is the folded one. In the other
  modes the latent kernel goes through the estimator.

  Args:
    layer: The layer.
    x: Input of the layer.
    shape: Shape of the kernel.
    alpha: The estimator's alpha.
    mode: Mode of the call; see the module.
    apply: Function apply(x, kernel, dtype=, precision=) that computes the sums, and
      which also takes sum_dtype= if the layer has one that is not float32.
  """
  bits = bits_of(layer)
  if mode == "hard":  # The operands are exact. Their float32 sums must be exact, too.
    return apply(x, layer.get_variable("hard", "kernel"), dtype=jnp.float32,
                 precision=lax.Precision.HIGHEST)
  kernel = layer.param("kernel", layer.kernel_init, shape)
  if layer.frequency:
    kernel = estimators.periodic(kernel, layer.frequency)
  step = None
  if _learns_step(layer):
    first = 2 * max(quantizers.num_thresholds(bits), 1) ** 0.5
    rule = "channel_mean" if layer.step_per_channel else "layer_mean"
    step = quantizers.positive_step(layer.param(
        "step", lambda _: first * estimators.mean_magnitude(kernel, rule)))
  if quantizers.is_grid(bits):
    learned = {} if step is None else {"step": step}
    if isinstance(alpha, Alphas):
      alpha = alpha.weights
    grid = quantizers.weight_grid(
        kernel, bits, layer.threshold_rule, layer.thresholds, learned=step is not None)
    quantized = layer.estimator(
        kernel, alpha, grid, lambda: layer.make_rng("estimator"), **learned)
    if mode == "mixed":
      layer.sow("quantized", "value", (quantized, alpha))
    kernel = estimators.WEIGHT_SCALES[layer.weight_scale](quantized, kernel)
  else:
    kernel = quantizers.round_to(kernel, bits)
  rounds = mode == "train" and layer.sum_dtype != jnp.float32
  return apply(x, kernel, dtype=layer.dtype,
               **{"sum_dtype": layer.sum_dtype} if rounds else {})


def _fold_linear(layer, x, shape, pad_value, size):
  """Folds the latent kernel of a QuantConv or QuantDense in mode "fold".

  Nothing is traced here, because each validation folds the whole network.

  Args:
    layer: The layer.
    x: Rows of the probe at its input.
    shape: Shape of the kernel.
    pad_value: Value of the padding, 0 if there is none.
    size: Shape of the output without examples and channels.

  Returns:
    Rows of the probe at the output.
  """
  bits, params = bits_of(layer), layer.variables["params"]
  kernel = params["kernel"]
  if kernel.shape != shape:
    raise ValueError(f"its kernel has the shape {kernel.shape}: must be {shape}")
  if layer.frequency:
    kernel = fold.periodic(kernel, layer.frequency)
  step = quantizers.positive_step(params["step"]) if _learns_step(layer) else None
  levels = fold.fold_kernel(
      kernel, bits, rule=layer.threshold_rule, thresholds=layer.thresholds, step=step)
  scale = fold.kernel_scale(kernel, bits, layer.weight_scale, step)
  layer.put_variable("hard", "kernel", levels)
  return fold_probe.linear(x, levels, bits, pad_value, (*size, shape[-1]), scale)


def initialize(model: nn.Module, image_shape: Sequence[int], seed: int = 0) -> Any:
  """Initializes the variables of a network.

  Args:
    model: Network made of these layers.
    image_shape: Shape of its input, (height, width, channels).
    seed: Seed of the initializers.

  Returns:
    The variables, {"params", "batch_stats"}.
  """
  @jax.jit  # One by one, the operations would take several times as long to compile.
  def make():
    keys: Any = dict(
        zip(("params", "estimator"), jax.random.split(jax.random.key(seed))))
    return model.init(keys, jnp.zeros((1, *image_shape)), mode="train")

  return make()


def trace(model: nn.Module, image_shape: Sequence[int]) -> list[LayerInfo]:
  """Lists the layers of a network in the order of their calls, without training it.

  A layer inside nn.scan is listed once for each iteration.

  Args:
    model: Network made of these layers.
    image_shape: Shape of its input, (height, width, channels).

  Returns:
    The layers' descriptions.
  """
  def info(folded):
    call, params = folded.call, folded.variables["params"]
    is_norm = isinstance(call.layer, NormQuant)
    return LayerInfo(
        path=call.path,
        kind={QuantConv: "conv", QuantDense: "dense", NormQuant: "norm"}[
            call.layer.layer_class],
        bits=call.layer.bits,
        input_bits=fold_probe.bits_of(folded.rows),
        input_shape=folded.rows.shape[1:],
        output_shape=folded.output_rows.shape[1:],
        kernel_shape=() if is_norm else params["kernel"].shape,
        channel_parameters=sum(map(np.size, jax.tree.leaves(params)))
        if is_norm else 0)

  shapes = jax.eval_shape(lambda: initialize(model, image_shape))
  ones = jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), shapes)
  probe = fold.Probe(*(np.full(image_shape, row) for row in (1.0, 1.0, 16.0)))
  return [info(folded) for folded in fold.fold_layers(model, ones, probe).layers]
