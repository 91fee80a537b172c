"""The networks of the paper, made of `minw.layers`.

A model is called as model(images, alpha, mode) with images float32 (batch, height,
width, channels) and returns logits float32 (batch, classes). `conv`, `dense` and `norm`
make its layers: everything that is a choice (bits, estimator, thresholds) is theirs.
"""

from typing import Callable, Sequence

import flax.linen as nn
import jax.numpy as jnp

from minw import cli
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
    cli.UsageError: another name.
  """
  if name not in CONVNETS:
    raise cli.unknown_name("ConvNet", str(name), CONVNETS)
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
