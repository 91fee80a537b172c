"""The networks of the paper, made of `minw.layers`.

A model is called as model(images, alpha, mode). The images are float32 (batch, height,
width, channels), and the logits that it returns are float32 (batch, classes). alpha is
a scalar, or has one number for each layer with weights, or two: those of the weights of
all layers, followed by those of the activations of all layers.

The factories `conv`, `dense` and `norm` make the layers of a model. They decide about
bits, estimators and thresholds.
"""

import functools
import itertools
from typing import Any, Callable, Iterator, Sequence

import flax.linen as nn
import jax.numpy as jnp

from minw import errors
from minw import layers

# Widths of the convolutions and of the hidden dense layers of each ConvNet. In the
# paper's notation, A is 128C3 128C3 MP2 256C3 256C3 MP2 512C3 512C3 MP2 1024FC 1024FC
# 10FC.
CONVNETS = {
    "A": ((128, 128, 256, 256, 512, 512), (1024, 1024)),
    "B": ((64, 64, 128, 128, 256, 256), (1024, 1024)),
    "C": ((64, 64, 128, 128, 256, 256), (512, 512)),
    "D": ((64, 64, 128, 128, 256, 256), (256, 256)),
}


def convnet_widths(name: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
  """The widths of a ConvNet of the paper.

  Args:
    name: "A", "B", "C" or "D".

  Returns:
    The widths of the convolutions and those of the hidden dense layers.

  Raises:
    errors.UsageError: There is no ConvNet with this name.
  """
  if name not in CONVNETS:
    raise errors.unknown_name("ConvNet", str(name), CONVNETS)
  return CONVNETS[name]


def pooled_convs(num_convs: int, pool_layers: Sequence[int]) -> tuple[int, ...]:
  """The convolutions of a ConvNet that max pooling follows, counted from 1.

  Args:
    num_convs: Number of convolutions.
    pool_layers: The convolutions, or () for every second one.
  """
  return tuple(pool_layers) or tuple(range(2, num_convs + 1, 2))


def _alphas(alpha: Any, depth: int) -> Iterator[Any]:
  """The alphas of `depth` layers, from one number or from a vector of one or two each.

  A number is passed on as it is: parts of a vector would be operations of the network,
  which `minw.fold` computes one by one.
  """
  if jnp.ndim(alpha) == 0:
    return itertools.repeat(alpha, depth)
  if jnp.shape(alpha) == (2 * depth,):
    return map(layers.Alphas, alpha[:depth], alpha[depth:])
  return iter(jnp.broadcast_to(jnp.asarray(alpha), (depth,)))


class ConvNet(nn.Module):
  """A convolutional network with max pooling, followed by dense layers.

  Every second convolution, or those of `pool_layers`, are followed by 2x2 max pooling.
  The layers are named conv1, norm_conv1, ..., dense1, norm_dense1, .... The output of
  norm_conv1 is the input of conv2.

  Attributes:
    num_classes: Number of classes.
    conv_widths: Output channels of the 3x3 convolutions.
    dense_widths: Widths of the hidden dense layers.
    first_padding: Padding of the first convolution, "SAME" or "VALID".
    pool_layers: Convolutions that max pooling follows, counted from 1; () for every
      second one.
    global_pool: Whether the input of the dense layers is the sum over the pixels of the
      last feature map, of any size, instead of all its pixels. Batch norm absorbs the
      missing division.
    conv: Factory for convolutions, such as `layers.QuantConv`.
    dense: Factory for dense layers, such as `layers.QuantDense`.
    norm: Factory for batch norms, such as `layers.NormQuant`.
    pool: Function that maps (batch, h, w, channels) to (batch, h // 2, w // 2,
      channels).
  """

  num_classes: int
  conv_widths: Sequence[int]
  dense_widths: Sequence[int]
  first_padding: str = "SAME"
  pool_layers: Sequence[int] = ()
  global_pool: bool = False
  conv: Callable = layers.QuantConv
  dense: Callable = layers.QuantDense
  norm: Callable = layers.NormQuant
  pool: Callable = layers.max_pool

  @property
  def depth(self) -> int:
    """The number of alphas, one for each layer that has weights."""
    return len(self.conv_widths) + len(self.dense_widths) + 1

  @nn.compact
  def __call__(self, x, alpha=1.0, mode: str = "hard"):
    alphas = _alphas(alpha, self.depth)
    pooled = pooled_convs(len(self.conv_widths), self.pool_layers)

    for i, width in enumerate(self.conv_widths, start=1):
      alpha = next(alphas)
      # The image is always padded with 0, which is its mean. The pad value can only be
      # chosen for codes.
      border = {"padding": self.first_padding, "pad_value": 0.0} if i == 1 else {}
      x = self.conv(width, name=f"conv{i}", **border)(x, alpha, mode)
      if i in pooled:
        x = self.pool(x)
      x = self.norm(name=f"norm_conv{i}")(x, alpha, mode)

    x = x.sum((1, 2)) if self.global_pool else x.reshape(x.shape[0], -1)

    for i, width in enumerate(self.dense_widths, start=1):
      alpha = next(alphas)
      x = self.dense(width, name=f"dense{i}")(x, alpha, mode)
      x = self.norm(name=f"norm_dense{i}")(x, alpha, mode)

    i = len(self.dense_widths) + 1
    x = self.dense(self.num_classes, name=f"dense{i}")(x, next(alphas), mode)
    return self.norm(bits=None, name=f"norm_dense{i}")(x, mode=mode)


class ResNet(nn.Module):
  """A residual network (He et al. 2016) whose shortcuts are quantized block inputs.

  A basic block is conv -> batch norm -> quantize -> conv -> batch norm -> + shortcut ->
  HardTanh -> quantize. The same codes are the input of the first convolution and of the
  addition. If the shape changes, the shortcut is either a projection with batch norm
  and quantizer of its own, or every second pixel of the input with zero-filled
  channels. The input of the dense layer is the sum over the feature map instead of the
  mean. Batch norm absorbs the missing division.

  The layers are named stem, stage1_block1_conv1, ..., dense1 and norm_stem, ....

  Attributes:
    num_classes: Number of classes.
    stages: Number of blocks in each stage.
    widths: Channels of each stage. With `bottleneck`, channels of its 3x3 convolutions.
    bottleneck: Whether blocks have 1x1, 3x3 and 1x1 convolutions, the last of which is
      four times as wide.
    large_stem: Whether the network starts with a 7x7 convolution of stride 2 and 3x3
      max pooling, for ImageNet. Otherwise it starts with a 3x3 convolution.
    projection: Whether shortcuts that change shape are projections.
    conv: Factory for convolutions.
    dense: Factory for dense layers.
    norm: Factory for batch norms.
  """

  num_classes: int
  stages: Sequence[int]
  widths: Sequence[int]
  bottleneck: bool = False
  large_stem: bool = False
  projection: bool = True
  conv: Callable = layers.QuantConv
  dense: Callable = layers.QuantDense
  norm: Callable = layers.NormQuant

  @property
  def depth(self) -> int:
    """The number of alphas, one for each layer that has weights."""
    convs = (3 if self.bottleneck else 2) * sum(self.stages)
    changes = len(self.stages) - (not self.bottleneck)
    return 2 + convs + (changes if self.projection else 0)

  @nn.compact
  def __call__(self, x, alpha=1.0, mode: str = "hard"):
    alphas = _alphas(alpha, self.depth)

    def quantized(name, x, width, size, stride=1, shortcut=None):
      alpha = next(alphas)
      x = self.conv(width, (size, size), (stride, stride), name=name)(x, alpha, mode)
      return self.norm(name=f"norm_{name}")(x, alpha, mode, shortcut=shortcut)

    alpha = next(alphas)
    size, stride = (7, 2) if self.large_stem else (3, 1)
    x = self.conv(self.widths[0], (size, size), (stride, stride), pad_value=0.0,
                  name="stem")(x, alpha, mode)
    if self.large_stem:
      x = layers.overlapping_max_pool(x, 3, 2, ((1, 1), (1, 1)))
    x = self.norm(name="norm_stem")(x, alpha, mode)

    for i, (blocks, width) in enumerate(zip(self.stages, self.widths), start=1):
      for j in range(1, blocks + 1):
        name = f"stage{i}_block{j}"
        stride = 2 if i > 1 and j == 1 else 1
        features = 4 * width if self.bottleneck else width
        shortcut = x
        if stride > 1 or x.shape[-1] != features:
          if self.projection:
            shortcut = quantized(f"{name}_projection", x, features, 1, stride)
          else:
            shortcut = _thinned_and_filled(x, stride, features)
        if self.bottleneck:
          x = quantized(f"{name}_conv1", x, width, 1)
          x = quantized(f"{name}_conv2", x, width, 3, stride)
          x = quantized(f"{name}_conv3", x, features, 1, shortcut=shortcut)
        else:
          x = quantized(f"{name}_conv1", x, width, 3, stride)
          x = quantized(f"{name}_conv2", x, width, 3, shortcut=shortcut)

    return _classify(self, x.sum((1, 2)), next(alphas), mode)


def _thinned_and_filled(x, stride, features):
  """Takes every stride-th pixel and adds channels of zeros on both sides."""
  room = features - x.shape[-1]
  x = x[:, ::stride, ::stride]
  return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (room // 2, room - room // 2)))


def _classify(model, x, alpha, mode):
  x = model.dense(model.num_classes, name="dense1")(x, alpha, mode)
  return model.norm(bits=None, name="norm_dense1")(x, mode=mode)


class DenseNet(nn.Module):
  """DenseNet-BC (Huang et al. 2017), whose layers append channels to their input.

  The channels that are concatenated are sums. Each layer that reads them has a batch
  norm and quantizer of its own. A transition halves the number of channels, then
  averages 2x2 pixels.

  The layers are named stem, block1_layer1_conv1, ..., transition1, ..., dense1. The
  output of norm_block1_layer1_conv1 is the input of block1_layer1_conv1.

  Attributes:
    num_classes: Number of classes.
    blocks: Number of layers in each block. A layer has two convolutions.
    growth: Number of channels that a layer adds.
    conv: Factory for convolutions.
    dense: Factory for dense layers.
    norm: Factory for batch norms.
  """

  num_classes: int
  blocks: Sequence[int] = (16, 16, 16)
  growth: int = 12
  conv: Callable = layers.QuantConv
  dense: Callable = layers.QuantDense
  norm: Callable = layers.NormQuant

  @property
  def depth(self) -> int:
    """The number of alphas, one for each layer that has weights."""
    return 2 * sum(self.blocks) + len(self.blocks) + 1

  @nn.compact
  def __call__(self, x, alpha=1.0, mode: str = "hard"):
    alphas = _alphas(alpha, self.depth)

    def conv(name, x, width, size):
      alpha = next(alphas)
      x = self.norm(name=f"norm_{name}")(x, alpha, mode)
      return self.conv(width, (size, size), name=name)(x, alpha, mode)

    x = self.conv(2 * self.growth, (3, 3), pad_value=0.0, name="stem")(
        x, next(alphas), mode)
    for i, count in enumerate(self.blocks, start=1):
      if i > 1:
        x = conv(f"transition{i - 1}", x, x.shape[-1] // 2, 1)
        x = nn.avg_pool(x, (2, 2), (2, 2))
      for j in range(1, count + 1):
        y = conv(f"block{i}_layer{j}_conv1", x, 4 * self.growth, 1)
        y = conv(f"block{i}_layer{j}_conv2", y, self.growth, 3)
        x = jnp.concatenate([x, y], axis=-1)

    alpha = next(alphas)
    x = self.norm(name="norm_last")(x, alpha, mode)
    return _classify(self, x.sum((1, 2)), alpha, mode)


class AlexNet(nn.Module):
  """AlexNet (Krizhevsky 2014, one tower) with batch norm and without dropout.

  The layers are named conv1 to conv5, dense1 to dense3 and norm_conv1, ....

  Attributes:
    num_classes: Number of classes.
    conv_widths: Output channels of the five convolutions.
    dense_widths: Widths of the two hidden dense layers.
    conv: Factory for convolutions.
    dense: Factory for dense layers.
    norm: Factory for batch norms.
  """

  num_classes: int
  conv_widths: Sequence[int] = (64, 192, 384, 256, 256)
  dense_widths: Sequence[int] = (4096, 4096)
  conv: Callable = layers.QuantConv
  dense: Callable = layers.QuantDense
  norm: Callable = layers.NormQuant

  depth = 8  # The number of alphas, one for each layer that has weights.

  @nn.compact
  def __call__(self, x, alpha=1.0, mode: str = "hard"):
    alphas = _alphas(alpha, self.depth)
    sizes, pooled = (11, 5, 3, 3, 3), (1, 2, 5)
    for i, (width, size) in enumerate(zip(self.conv_widths, sizes), start=1):
      alpha = next(alphas)
      first = dict(strides=(4, 4), pad_value=0.0) if i == 1 else {}
      x = self.conv(width, (size, size), name=f"conv{i}", **first)(x, alpha, mode)
      if i in pooled:
        x = layers.overlapping_max_pool(x, 3, 2)
      x = self.norm(name=f"norm_conv{i}")(x, alpha, mode)
    x = x.reshape(x.shape[0], -1)
    for i, width in enumerate(self.dense_widths, start=1):
      alpha = next(alphas)
      x = self.dense(width, name=f"dense{i}")(x, alpha, mode)
      x = self.norm(name=f"norm_dense{i}")(x, alpha, mode)
    x = self.dense(self.num_classes, name="dense3")(x, next(alphas), mode)
    return self.norm(bits=None, name="norm_dense3")(x, mode=mode)


_WIDE = (64, 128, 256, 512)
_IMAGENET = dict(widths=_WIDE, large_stem=True)
_CIFAR = dict(widths=(16, 32, 64), projection=False)

# Smallest height and width of an image, by network. Smaller images leave nothing to
# pool.
SMALLEST_IMAGE = {"densenet100": 4, "alexnet": 57}

# Network constructors by name. Each takes `num_classes` and factories for its conv,
# dense and norm layers.
NETWORKS = {
    "resnet18": functools.partial(ResNet, stages=(2, 2, 2, 2), **_IMAGENET),
    "resnet34": functools.partial(ResNet, stages=(3, 4, 6, 3), **_IMAGENET),
    "resnet50": functools.partial(
        ResNet, stages=(3, 4, 6, 3), bottleneck=True, **_IMAGENET),
    "cifar_resnet18": functools.partial(ResNet, stages=(2, 2, 2, 2), widths=_WIDE),
    "resnet20": functools.partial(ResNet, stages=(3, 3, 3), **_CIFAR),
    "resnet110": functools.partial(ResNet, stages=(18, 18, 18), **_CIFAR),
    "densenet100": DenseNet,
    "alexnet": AlexNet,
}
