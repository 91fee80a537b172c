"""Float32 networks in XLA and PyTorch, from the layers in `minw.bench.networks`."""

from typing import Any, Sequence

import jax
from jax import lax
import jax.numpy as jnp

from minw.bench.networks import Layer


def logits(
    layers: Sequence[Layer], weights: Any, x: jax.Array, matrices: bool = False
) -> jax.Array:
  """Computes the float network in XLA, in the dtype of its operands.

  Args:
    layers: Layers of the network.
    weights: Pairs of kernel and bias, one for each layer.
    x: Images, float32 or bfloat16 (batch, height, width, channels).
    matrices: Whether dense layers are products of matrices, and not convolutions.

  Returns:
    Logits (batch, classes).
  """
  values = [x]
  for layer, (kernel, bias) in zip(layers, weights):
    y = values[layer.input]
    if layer.mean:
      y = y.mean((1, 2), keepdims=True)
    top, bottom, left, right = layer.pads
    if matrices and kernel.shape[:3] == y.shape[1:] and not any(layer.pads):
      product = y.reshape(len(y), -1) @ kernel.reshape(-1, kernel.shape[3])
      y = product[:, None, None] + bias
    else:
      y = lax.conv_general_dilated(
          y, kernel, layer.strides, [(top, bottom), (left, right)],
          dimension_numbers=("NHWC", "HWIO", "NHWC")) + bias
    if layer.pool:
      top, bottom, left, right = layer.pool.pads
      y = lax.reduce_window(
          y, -jnp.inf, lax.max, (1, *layer.pool.window, 1), (1, *layer.pool.strides, 1),
          [(0, 0), (top, bottom), (left, right), (0, 0)])
    if layer.shortcut is not None:
      y = y + values[layer.shortcut]
    values.append(jnp.clip(y, -1, 1) if layer.clip else y)
  return values[-1].reshape(len(x), -1)


def torch_network(layers: Sequence[Layer]) -> Any:
  """Returns the float network in PyTorch, for images (batch, channels, h, w)."""
  import torch
  from torch import nn
  from torch.nn import functional

  class Network(nn.Module):
    def __init__(self):
      super().__init__()
      self.convolutions = nn.ModuleList(map(_torch_convolution, layers))

    def forward(self, x):
      values = [x]
      for layer, convolution in zip(layers, self.convolutions):
        y = values[layer.input]
        if layer.mean:
          y = y.mean((2, 3), keepdim=True)
        y = convolution(y)
        if layer.pool:
          pads = _torch_pads(layer.pool.pads)
          y = functional.pad(y, pads, value=-torch.inf) if any(pads) else y
          y = functional.max_pool2d(y, layer.pool.window, layer.pool.strides)
        if layer.shortcut is not None:
          y = y + values[layer.shortcut]
        values.append(functional.hardtanh(y) if layer.clip else y)
      return values[-1]

  return Network().eval().to(memory_format=torch.channels_last)


def _torch_pads(pads: Sequence[int]) -> list[int]:
  """Returns (left, right, top, bottom) of (top, bottom, left, right)."""
  return [*pads[2:], *pads[:2]]


def _torch_convolution(layer: Layer) -> Any:
  """Returns the convolution of a layer, with its padding."""
  import torch
  from torch import nn

  *window, channels, out = layer.kernel.shape
  top, bottom, left, right = layer.pads
  even = top == bottom and left == right
  convolution = nn.Conv2d(
      channels, out, window, layer.strides, (top, left) if even else 0)
  convolution.weight.data = torch.tensor(layer.kernel).permute(3, 2, 0, 1)
  convolution.bias.data = torch.tensor(layer.bias)
  if even:
    return convolution
  return nn.Sequential(nn.ZeroPad2d(_torch_pads(layer.pads)), convolution)
