"""The networks of the paper, made of `minw.layers`.

A model is called as model(images, alpha, mode) with images float32 (batch, height,
width, channels) and returns logits float32 (batch, classes). `conv`, `dense` and `norm`
make its layers: everything that is a choice (bits, estimator, thresholds) is theirs.
"""

import functools
from typing import Any, Callable, Sequence

import flax.linen as nn
import jax.numpy as jnp

from minw import errors
from minw import layers

# Convolutional and hidden dense widths; A is 128C3 128C3 MP2 256C3 256C3 MP2 512C3
# 512C3 MP2 1024FC 1024FC 10FC.
CONVNETS = {
    "A": ((128, 128, 256, 256, 512, 512), (1024, 1024)),
    "B": ((64, 64, 128, 128, 256, 256), (1024, 1024)),
    "C": ((64, 64, 128, 128, 256, 256), (512, 512)),
    "D": ((64, 64, 128, 128, 256, 256), (256, 256)),
}


def convnet_widths(name: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
  """The convolutional and hidden dense widths of ConvNet "A", "B", "C" or "D".

  Raises:
    errors.UsageError: another name.
  """
  if name not in CONVNETS:
    raise errors.unknown_name("ConvNet", str(name), CONVNETS)
  return CONVNETS[name]


class ConvNet(nn.Module):
  """Convolutions, every second one followed by 2x2 max pooling, and dense layers.

  Layers are called conv1, norm_conv1, ..., dense1, norm_dense1, ...; `norm_conv1`
  makes the inputs of conv2.

  Attributes:
    num_classes: of the logits.
    conv_widths: output channels of the 3x3 convolutions.
    dense_widths: of the hidden dense layers.
    first_padding: of the first convolution, "SAME" or "VALID".
    conv, dense, norm: make the layers, `layers.QuantConv` and so on.
    pool: makes (batch, h // 2, w // 2, channels) of (batch, h, w, channels).
  """

  num_classes: int
  conv_widths: Sequence[int]
  dense_widths: Sequence[int]
  first_padding: str = "SAME"
  conv: Callable = layers.QuantConv
  dense: Callable = layers.QuantDense
  norm: Callable = layers.NormQuant
  pool: Callable = layers.max_pool

  @property
  def depth(self) -> int:
    """How many alphas there are: one for each layer that has weights."""
    return len(self.conv_widths) + len(self.dense_widths) + 1

  @nn.compact
  def __call__(self, x, alpha=1.0, mode: str = "hard"):
    alphas = iter(jnp.broadcast_to(jnp.asarray(alpha), (self.depth,)))

    for i, width in enumerate(self.conv_widths, start=1):
      alpha = next(alphas)
      # The image is padded with its mean, zero; only codes have a border to choose.
      border = {"padding": self.first_padding, "pad_value": 0.0} if i == 1 else {}
      x = self.conv(width, name=f"conv{i}", **border)(x, alpha, mode)
      if i % 2 == 0:
        x = self.pool(x)
      x = self.norm(name=f"norm_conv{i}")(x, alpha, mode)

    x = x.reshape(x.shape[0], -1)

    for i, width in enumerate(self.dense_widths, start=1):
      alpha = next(alphas)
      x = self.dense(width, name=f"dense{i}")(x, alpha, mode)
      x = self.norm(name=f"norm_dense{i}")(x, alpha, mode)

    i = len(self.dense_widths) + 1
    x = self.dense(self.num_classes, name=f"dense{i}")(x, next(alphas), mode)
    return self.norm(bits=None, name=f"norm_dense{i}")(x, mode=mode)


class ResNet(nn.Module):
  """Residual networks (He et al. 2016), with a block's quantized input as shortcut.

  conv -> batch norm -> quantize -> conv -> batch norm -> + shortcut -> HardTanh ->
  quantize: the same codes feed the first convolution and the addition. Where the
  shape changes, the shortcut is a projection with batch norm and quantizer of its own,
  or the input's every second pixel with zero-filled channels. The dense layer takes
  sums over the map, whose division batch norm absorbs.

  Layers are called stem, stage1_block1_conv1, ..., dense1; norm_stem, ....

  Attributes:
    num_classes: of the logits.
    stages: how many blocks each has.
    widths: channels of each stage; of its 3x3 convolutions if `bottleneck`.
    bottleneck: blocks of 1x1, 3x3, 1x1 convolutions, the last four times as wide.
    large_stem: 7x7 with stride 2 and 3x3 max pooling, for ImageNet; else 3x3.
    projection: whether shortcuts that change shape are projections.
    conv, dense, norm: make the layers.
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
    """How many alphas there are: one for each layer that has weights."""
    convs = (3 if self.bottleneck else 2) * sum(self.stages)
    changes = len(self.stages) - (not self.bottleneck)
    return 2 + convs + (changes if self.projection else 0)

  @nn.compact
  def __call__(self, x, alpha=1.0, mode: str = "hard"):
    alphas = iter(jnp.broadcast_to(jnp.asarray(alpha), (self.depth,)))

    def quantized(name, x, width, size, stride=1, shortcut=None):
      alpha = next(alphas)
      x = self.conv(width, (size, size), (stride, stride), name=name)(x, alpha, mode)
      return self.norm(name=f"norm_{name}")(x, alpha, mode, shortcut=shortcut)

    alpha = next(alphas)
    size, stride = (7, 2) if self.large_stem else (3, 1)
    x = self.conv(self.widths[0], (size, size), (stride, stride), pad_value=0.0,
                  name="stem")(x, alpha, mode)
    if self.large_stem:
      padding: Any = ((1, 1), (1, 1))  # Flax declares a string.
      x = nn.max_pool(x, (3, 3), (2, 2), padding)
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
  """Every stride-th pixel, between channels of zeros."""
  room = features - x.shape[-1]
  x = x[:, ::stride, ::stride]
  return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (room // 2, room - room // 2)))


def _classify(model, x, alpha, mode):
  x = model.dense(model.num_classes, name="dense1")(x, alpha, mode)
  return model.norm(bits=None, name="norm_dense1")(x, mode=mode)


class DenseNet(nn.Module):
  """DenseNet-BC (Huang et al. 2017): each layer adds channels to those before it.

  What is put side by side are sums; each layer that reads them has a batch norm and
  quantizer of its own. A transition halves channels, then averages 2x2 pixels.

  Layers are called stem, block1_layer1_conv1, ..., transition1, ..., dense1;
  norm_block1_layer1_conv1 makes the inputs of block1_layer1_conv1.

  Attributes:
    num_classes: of the logits.
    blocks: how many layers, of two convolutions, each has.
    growth: channels that a layer adds.
    conv, dense, norm: make the layers.
  """

  num_classes: int
  blocks: Sequence[int] = (16, 16, 16)
  growth: int = 12
  conv: Callable = layers.QuantConv
  dense: Callable = layers.QuantDense
  norm: Callable = layers.NormQuant

  @property
  def depth(self) -> int:
    """How many alphas there are: one for each layer that has weights."""
    return 2 * sum(self.blocks) + len(self.blocks) + 1

  @nn.compact
  def __call__(self, x, alpha=1.0, mode: str = "hard"):
    alphas = iter(jnp.broadcast_to(jnp.asarray(alpha), (self.depth,)))

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
  """AlexNet (Krizhevsky 2014, one tower) with batch norm, and no dropout.

  Layers are called conv1 to conv5 and dense1 to dense3; norm_conv1, ....

  Attributes:
    num_classes: of the logits.
    conv_widths, dense_widths: channels of the five convolutions, and hidden units.
    conv, dense, norm: make the layers.
  """

  num_classes: int
  conv_widths: Sequence[int] = (64, 192, 384, 256, 256)
  dense_widths: Sequence[int] = (4096, 4096)
  conv: Callable = layers.QuantConv
  dense: Callable = layers.QuantDense
  norm: Callable = layers.NormQuant

  depth = 8  # How many alphas there are: one for each layer that has weights.

  @nn.compact
  def __call__(self, x, alpha=1.0, mode: str = "hard"):
    alphas = iter(jnp.broadcast_to(jnp.asarray(alpha), (self.depth,)))
    sizes, pooled = (11, 5, 3, 3, 3), (1, 2, 5)
    for i, (width, size) in enumerate(zip(self.conv_widths, sizes), start=1):
      alpha = next(alphas)
      first = dict(strides=(4, 4), pad_value=0.0) if i == 1 else {}
      x = self.conv(width, (size, size), name=f"conv{i}", **first)(x, alpha, mode)
      if i in pooled:
        x = nn.max_pool(x, (3, 3), (2, 2))
      x = self.norm(name=f"norm_conv{i}")(x, alpha, mode)
    x = x.reshape(x.shape[0], -1)
    for i, width in enumerate(self.dense_widths, start=1):
      alpha = next(alphas)
      x = self.dense(width, name=f"dense{i}")(x, alpha, mode)
      x = self.norm(name=f"norm_dense{i}")(x, alpha, mode)
    x = self.dense(self.num_classes, name="dense3")(x, next(alphas), mode)
    return self.norm(bits=None, name="norm_dense3")(x, mode=mode)


_IMAGENET = dict(widths=(64, 128, 256, 512), large_stem=True)
_CIFAR = dict(widths=(16, 32, 64), projection=False)

# Height and width of what some need at least: smaller maps leave nothing to pool.
SMALLEST_IMAGE = {"densenet100": 4, "alexnet": 57}

# By name, what makes a network of the number of classes and of what makes its layers.
NETWORKS = {
    "resnet18": functools.partial(ResNet, stages=(2, 2, 2, 2), **_IMAGENET),
    "resnet34": functools.partial(ResNet, stages=(3, 4, 6, 3), **_IMAGENET),
    "resnet50": functools.partial(
        ResNet, stages=(3, 4, 6, 3), bottleneck=True, **_IMAGENET),
    "resnet20": functools.partial(ResNet, stages=(3, 3, 3), **_CIFAR),
    "resnet110": functools.partial(ResNet, stages=(18, 18, 18), **_CIFAR),
    "densenet100": DenseNet,
    "alexnet": AlexNet,
}
