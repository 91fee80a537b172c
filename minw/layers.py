"""The layers of MINW-Nets: the only place where bits meet Flax.

A layer is called as layer(x, alpha, mode). The modes:

    "train"  quantizers through the estimator, batch norm with the batch's statistics
    "mixed"  the same with the running statistics
    "hard"   the network that is deployed, on the variables that `minw.fold` makes
    "fold"   makes those variables; x is made by `fold_probe.make_rows`

With alpha = 1 the first two use the hard quantizers of Eq 20. In "mixed" layers sow
what their estimator made, and its alpha, as "value" into the collection "quantized".
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

Bits = int | str  # 1 to 5, or a float format; `quantizers.is_grid` tells which.
BitsOf = Bits | Callable[[str], Bits]  # ... or a function of the layer's path

_aqe = estimators.by_name("aqe")


class LayerInfo(NamedTuple):
  """A layer as `trace` found it.

  Attributes:
    path: its name, with those of the modules around it: "block1/conv2".
    kind: "conv", "dense" or "norm".
    bits: of its weights; of its output for a norm, None if that is not quantized.
    input_bits: the bits of what it receives, 16 for an image, 32 for accumulators;
      those of a sum of n codes are log2(n) more.
    input_shape, output_shape: without the batch.
    kernel_shape: (..., inputs of a group, outputs); empty for a norm.
    channel_parameters: how many float32 numbers a norm keeps besides.
  """

  path: str
  kind: str
  bits: Bits | None
  input_bits: int
  input_shape: tuple[int, ...]
  output_shape: tuple[int, ...]
  kernel_shape: tuple[int, ...]
  channel_parameters: int


def bits_by_rule(default: Bits, rules: Sequence[tuple[str, Bits]]) -> BitsOf:
  """Bits that depend on the layer's path; the last rule that matches decides.

  Args:
    default: where no rule matches.
    rules: pairs of a path pattern ("conv1", "norm_*", "block?/*") and bits.
  """
  def bits(path: str) -> Bits:
    matching = [b for pattern, b in rules if matches(pattern, path)]
    return matching[-1] if matching else default

  return bits


def matches(pattern: str, path: str) -> bool:
  """Whether a layer's path fits a shell-style pattern: "norm_*", "block?/conv1"."""
  return fnmatch.fnmatchcase(path, pattern)


@structure.layer
class QuantConv(nn.Module):
  """A convolution with quantized weights, no bias, and float32 accumulators.

  Its input is expected on the grid that a `NormQuant` put it on.

  Attributes:
    features: output channels.
    kernel_size: (height, width).
    strides: (vertical, horizontal).
    padding: "SAME", "VALID", or the border in pixels, ((top, bottom), (left, right)).
    pad_value: the value of the border; 0 is a third value over -1 and 1.
    bits: of the weights.
    threshold_rule, thresholds: see `quantizers.weight_grid`.
    estimator: f(kernel, alpha, grid, make_key), see `estimators.by_name`. For one that
      learns its step the layer has a parameter "step", 2 sqrt(q) mean |W| at first, q
      the number of positive levels; `quantizers.positive_step` of it is used.
    weight_scale: "none", "layer_mean" or "channel_mean", see
      `estimators.WEIGHT_SCALES`; of weights in a float format none.
    dtype: of the operands in training; sums are float32 always.
    feature_group_count: into how many equal groups, in order, input and output channels
      are split. An output channel sums over the inputs of its own group; as many groups
      as input channels make a depthwise convolution.
    kernel_dilation: (vertical, horizontal) distance between neighboring weights, in
      pixels.

  Raises:
    ValueError: at construction, when an attribute is not one of these.
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
  weight_scale: str = "none"
  kernel_init: Callable = nn.initializers.glorot_uniform()
  dtype: Any = jnp.float32
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
    return _linear(
        self, x, shape, alpha, mode, pad_value,
        lambda x, kernel, **how: conv(
            x, kernel, self.strides, pads, pad_value, self.kernel_dilation, groups,
            **how))

  def pads(self, size: Sequence[int]) -> tuple[tuple[int, int], tuple[int, int]]:
    """The border around a map of `size`, ((top, bottom), (left, right)) in pixels.

    Args:
      size: (height, width) of the map.
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
    """Shapes of the variables that mode "fold" makes."""
    del input_shape, has_shortcut
    return {"kernel": params["kernel"].shape}


@structure.layer
class QuantDense(nn.Module):
  """A dense layer with quantized weights, no bias, and float32 accumulators.

  Attributes: as those of `QuantConv`.
  """

  features: int
  bits: BitsOf = 1
  threshold_rule: str = "layer_mean"
  thresholds: Sequence[float] = ()
  estimator: Callable = _aqe
  weight_scale: str = "none"
  kernel_init: Callable = nn.initializers.glorot_uniform()
  dtype: Any = jnp.float32

  def __post_init__(self):
    _check_features(self.features)
    super().__post_init__()

  @nn.compact
  def __call__(self, x, alpha=1.0, mode: str = "hard"):
    shape = (x.shape[-1], self.features)
    return _linear(self, x, shape, alpha, mode, 0.0, dense)

  def hard_shapes(self, params, input_shape, has_shortcut):
    """Shapes of the variables that mode "fold" makes."""
    del input_shape, has_shortcut
    return {"kernel": params["kernel"].shape}


@structure.layer
class NormQuant(nn.Module):
  """Batch norm (-> + shortcut) (-> RPReLU) -> HardTanh -> quantize.

  The result is the input of the next layer.

  With `rprelu` the activation of ReActNet (Liu et al. 2020) stands before HardTanh:

      y -> y - gamma + zeta             where y > gamma
           |beta| (y - gamma) + zeta    elsewhere

  with parameters "rprelu_gamma", "rprelu_beta" and "rprelu_zeta" for each channel, 0,
  0.25 and 0 at first. The magnitude of beta keeps the layer monotone, so that it packs
  into thresholds whatever was learned. ReActNet's learned shift before the sign, RSign,
  needs no parameter of its own: zeta is one, and without RPReLU batch norm's bias is.

  Attributes:
    bits: of the output; None for logits, which get batch norm alone.
    thresholds: fixed, see `quantizers.input_grid`; in units of a learned step.
    estimator: f(x, alpha, grid, make_key), see `estimators.by_name`. For one that
      learns its step the layer has a parameter "step", 1 at first, and no HardTanh;
      `quantizers.positive_step` of it is used.
    momentum, epsilon, use_scale: batch norm's.
    group_size: examples that batch norm takes its statistics of in training, one after
      another of the batch; 0: the whole batch, on all devices.
    rprelu: whether the activation of ReActNet is applied; logits have none.
  """

  bits: BitsOf | None = 1
  thresholds: Sequence[float] = ()
  estimator: Callable = _aqe
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
      raise ValueError(f"{path}: rprelu=True; logits have none")
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
    """Batch norm of `x`; in mode "hard" the exact one that folding left."""
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
    """The shortcut in units of this layer's step, which is exact: levels are 2^-n."""
    if mode != "hard" or not self.has_variable("hard", "shortcut_scale"):
      return shortcut
    scale = self.get_variable("hard", "shortcut_scale")
    return shortcut * lax.broadcast_to_rank(scale, shortcut.ndim)

  def _quantized(self, y, alpha, mode, bits):
    """HardTanh, unless a step is learned, and the estimator or the quantizer."""
    learns_step = _learns_step(self)
    if mode == "hard" or not learns_step:
      y = jax.nn.hard_tanh(y)
    if not quantizers.is_grid(bits):
      return quantizers.round_to(y, bits)
    grid = input_grid(self)
    if mode == "hard":
      return quantizers.quantize(y, grid)
    learned, step = {}, 1.0
    if learns_step:
      step = quantizers.positive_step(
          self.param("step", nn.initializers.ones, ()))
      learned = dict(step=step, count=y[0].size)
    if mode == "mixed":  # One number an example: padding can be left out of the mean.
      distance = jnp.abs(y - step * quantizers.quantize(y / step, grid))
      self.sow("distance", "mean", jnp.mean(distance, axis=tuple(range(1, y.ndim))))
    y = self.estimator(y, alpha, grid, lambda: self.make_rng("estimator"), **learned)
    if mode == "mixed":
      self.sow("quantized", "value", (y, alpha))
    return y

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
    # What parameters of the network's own do to x, see `fold.fold`.
    factor = self.get_variable("affine", "factor", 1.0)
    summand = self.get_variable("affine", "summand", 0.0)
    hard = fold.fold_norm(
        stats["mean"] - summand, stats["var"],
        params["scale"] if self.use_scale else np.ones_like(params["bias"]),
        params["bias"], self.epsilon, *fold_probe.bound_and_unit(x),
        input_scale=factor * fold_probe.scale_of(x), output_scale=step)._asdict()
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
    """Shapes of the variables that mode "fold" makes; "shortcut_scale" where needed."""
    del params
    names = [*fold.Norm._fields]
    if self.rprelu:
      names += [f"rprelu_{name}" for name in fold.Rprelu._fields]
    if has_shortcut:
      names.append("shortcut_scale")
    return dict.fromkeys(names, input_shape[-1:])


def _check_group(path: str, shape: Sequence[int], group_size: int) -> None:
  """Raises ValueError if batch norm would see a single value of each channel.

  That value less its mean is 0, whatever the input is.
  """
  if (group_size or shape[0]) * math.prod(shape[1:-1]) == 1:
    raise ValueError(
        f"{path}: batch norm of one example of shape {tuple(shape[1:])} sees one value"
        " of each channel, which teaches it nothing: train with at least 2 examples")


class _GroupedBatchNorm(nn.Module):
  """In training: nn.BatchNorm of each group of a batch's examples, one after another.

  Its variables are those of nn.BatchNorm; the running statistics follow the groups'
  mean.
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
  """Maximum over windows, with a stride of one window.

  Borders that do not fill a window are dropped.

  Args:
    x: (batch, height, width, channels).
    window: its height and width.
    share_gradient: where values of a window tie, which integers often do, share the
      gradient among them instead of giving it to the first, as TensorFlow and PyTorch
      do: another network.
  """
  if share_gradient:
    return _windows(x, window).max((2, 4))
  return _max_pool_first(x, window)


def _windows(x, window):
  n, h, w, c = x.shape
  h, w = h // window, w // window
  return x[:, :h * window, :w * window].reshape(n, h, window, w, window, c)


# The gradient of `nn.max_pool`, which XLA computes by a slow scatter.
@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _max_pool_first(x, window):
  return _windows(x, window).max((2, 4))


def _max_pool_first_backward(window, x, g):
  parts = _windows(x, window).transpose(0, 1, 3, 5, 2, 4)
  first = jnp.argmax(parts.reshape(*g.shape, -1), axis=-1)[:, :, None, :, None]
  place = jnp.arange(window**2).reshape(1, 1, window, 1, window, 1)
  spread = jnp.where(first == place, g[:, :, None, :, None], 0)
  n, h, w, c = x.shape
  spread = spread.reshape(n, h // window * window, w // window * window, c)
  return (jnp.pad(spread, [(0, 0), (0, h % window), (0, w % window), (0, 0)]),)


_max_pool_first.defvjp(
    lambda x, window: (_max_pool_first(x, window), x), _max_pool_first_backward)


def conv(x, kernel, strides, pads, pad_value, dilation=(1, 1), groups=1, *, dtype,
         precision=None):
  """A convolution (NHWC, HWIO) with a border of `pad_value` and float32 sums.

  Args:
    x: (batch, height, width, input channels).
    kernel: (height, width, input channels / groups, output channels).
    strides: (vertical, horizontal).
    pads: ((top, bottom), (left, right)) in pixels.
    pad_value: the value of the border.
    dilation: (vertical, horizontal) distance between neighboring weights, in pixels.
    groups: how many groups input and output channels are split into.
    dtype: of the operands.
    precision: see `lax.conv_general_dilated`.

  Returns:
    float32 (batch, height, width, output channels).
  """
  if pad_value:
    x = jnp.pad(x, [(0, 0), *pads, (0, 0)], constant_values=pad_value)
    pads = ((0, 0), (0, 0))
  return lax.conv_general_dilated(
      x.astype(dtype), kernel.astype(dtype), strides, pads, rhs_dilation=dilation,
      feature_group_count=groups, dimension_numbers=("NHWC", "HWIO", "NHWC"),
      precision=precision, preferred_element_type=jnp.float32)


def dense(x, kernel, *, dtype, precision=None):
  """A matrix product with float32 sums."""
  return jnp.matmul(x.astype(dtype), kernel.astype(dtype), precision=precision,
                    preferred_element_type=jnp.float32)


bits_of = structure.bits_of


def operand_bits(bits: Bits) -> int:
  """The number of bits that `bits`, a count or a dtype's name, comes to."""
  if quantizers.is_grid(bits) and not isinstance(bits, str):
    return bits
  return 8 * jnp.dtype(str(bits)).itemsize


def input_grid(layer: NormQuant) -> quantizers.Grid:
  """The grid that a layer's output falls on; in units of its step if it learns one."""
  bits = bits_of(layer)
  if _learns_step(layer):
    return quantizers.grid(bits, quantizers.unit_thresholds(bits, layer.thresholds))
  return quantizers.input_grid(bits, layer.thresholds)


def _learns_step(layer):
  bits = bits_of(layer)
  return (getattr(layer.estimator, "learns_step", False) and bits is not None
          and quantizers.is_grid(bits))


def _linear(layer, x, shape, alpha, mode, pad_value, apply):
  """What QuantConv and QuantDense share: the kernel of each mode."""
  bits = bits_of(layer)
  if mode == "hard":  # Operands are exact; float32 sums of them must be, too.
    return apply(x, layer.get_variable("hard", "kernel"), dtype=jnp.float32,
                 precision=lax.Precision.HIGHEST)
  kernel = layer.param("kernel", layer.kernel_init, shape)
  step = None
  if _learns_step(layer):
    first = 2 * max(quantizers.num_thresholds(bits), 1) ** 0.5
    step = quantizers.positive_step(
        layer.param("step", lambda _: first * jnp.abs(kernel).mean()))
  if mode == "fold":
    levels = fold.fold_kernel(
        kernel, bits, rule=layer.threshold_rule, thresholds=layer.thresholds, step=step)
    scale = fold.kernel_scale(kernel, bits, layer.weight_scale, step)
    layer.put_variable("hard", "kernel", levels)
    output = jax.eval_shape(lambda x: apply(x, levels, dtype=jnp.float32), x)
    return fold_probe.linear(x, levels, bits, pad_value, output.shape[1:], scale)
  if quantizers.is_grid(bits):
    learned = {} if step is None else {"step": step}
    grid = quantizers.weight_grid(
        kernel, bits, layer.threshold_rule, layer.thresholds, learned=step is not None)
    quantized = layer.estimator(
        kernel, alpha, grid, lambda: layer.make_rng("estimator"), **learned)
    if mode == "mixed":
      layer.sow("quantized", "value", (quantized, alpha))
    kernel = estimators.WEIGHT_SCALES[layer.weight_scale](quantized, kernel)
  else:
    kernel = quantizers.round_to(kernel, bits)
  return apply(x, kernel, dtype=layer.dtype)


def initialize(model: nn.Module, image_shape: Sequence[int], seed: int = 0) -> Any:
  """Fresh variables {"params", "batch_stats"} for images (height, width, channels)."""
  keys: Any = dict(zip(("params", "estimator"), jax.random.split(jax.random.key(seed))))
  return model.init(keys, jnp.zeros((1, *image_shape)), mode="train")


def trace(model: nn.Module, image_shape: Sequence[int]) -> list[LayerInfo]:
  """The layers of a network in the order of their calls, without training it.

  A layer inside nn.scan is there once for each iteration.
  """
  def info(folded):
    call, params = folded.call, folded.variables["params"]
    is_norm = isinstance(call.layer, NormQuant)
    return LayerInfo(
        path=call.path,
        kind={QuantConv: "conv", QuantDense: "dense", NormQuant: "norm"}[
            type(call.layer)],
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
