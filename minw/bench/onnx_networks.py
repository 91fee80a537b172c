"""Networks as ONNX files, from the layers in `minw.bench.networks`."""

from typing import Any, Sequence

import numpy as np

from minw.bench.networks import Layer

# The steps of activations in int8 networks. Saturation computes HardTanh.
INT8_SCALE, INT8_ZERO = np.float32(1 / 127), np.uint8(128)
# The steps where a shortcut is added later. A shortcut is at most 1, so that it does
# not matter by how much a sum exceeds 2.
_SUMMAND_SCALE = np.float32(2 / 127)


class _Graph:
  """Nodes and constants of an ONNX graph, with names in the order of their making."""

  def __init__(self):
    self.nodes: list[Any] = []
    self.constants: list[Any] = []

  def constant(self, value: Any) -> str:
    """Adds a constant and returns its name."""
    from onnx import numpy_helper

    self.constants.append(numpy_helper.from_array(
        np.ascontiguousarray(value).reshape(np.shape(value)),
        f"c{len(self.constants)}"))
    return self.constants[-1].name

  def node(self, kind: str, *inputs: str, **attributes: Any) -> str:
    """Adds a node and returns the name of its result."""
    from onnx import helper

    self.nodes.append(helper.make_node(
        kind, inputs, [f"y{len(self.nodes)}"], **attributes))
    return self.nodes[-1].output[0]

  def file(self, shape: Sequence[Any], result: str, dtype: Any) -> bytes:
    """Returns the file of the network from "x" to a result, both of a dtype.

    Args:
      shape: Shape of "x", whose dimensions may be names.
      result: Name of the result, which has as many dimensions.
      dtype: Type of their elements.
    """
    from onnx import helper

    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    values = [helper.make_tensor_value_info(name, kind, dims) for name, dims in (
        ("x", shape), (result, ["n"] + [None] * (len(shape) - 1)))]
    graph = helper.make_graph(
        self.nodes, "network", values[:1], values[1:], self.constants)
    opsets = [helper.make_opsetid("", 13), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(
        graph, opset_imports=opsets, ir_version=8).SerializeToString()


def float_network(layers: Sequence[Layer], shape: Sequence[int]) -> bytes:
  """Returns the float network as an ONNX file, for images (batch, channels, h, w).

  Args:
    layers: Layers of the network.
    shape: Height, width and channels of an image.
  """
  graph = _Graph()
  low, high = graph.constant(np.float32(-1)), graph.constant(np.float32(1))
  values = ["x"]
  for layer in layers:
    y = values[layer.input]
    if layer.mean:
      y = graph.node("GlobalAveragePool", y)
    y = graph.node("Conv", y, graph.constant(layer.kernel.transpose(3, 2, 0, 1)),
                   graph.constant(layer.bias), **_conv_attributes(layer))
    y = _pool(graph, layer, y)
    if layer.shortcut is not None:
      y = graph.node("Add", y, values[layer.shortcut])
    values.append(graph.node("Clip", y, low, high) if layer.clip else y)
  return graph.file(_image(shape), values[-1], np.float32)


def int8_network(layers: Sequence[Layer], shape: Sequence[int]) -> bytes:
  """Returns the network with uint8 activations and int8 weights as an ONNX file.

  All its operators are integer. Its scales are fixed such that saturation computes
  HardTanh.

  Args:
    layers: Layers of the network.
    shape: Height, width and channels of an image.
  """
  graph = _Graph()
  zero, weight_zero = graph.constant(INT8_ZERO), graph.constant(np.int8(0))
  activation = graph.constant(INT8_SCALE), zero
  values = ["x"]
  for layer in layers:
    y = values[layer.input]
    if layer.mean:
      y = graph.node("QLinearGlobalAveragePool", y, *activation, *activation,
                     domain="com.microsoft", channels_last=0)
    kernel, unit = int8_kernel(layer)
    bias = np.round(layer.bias / (INT8_SCALE * unit)).astype(np.int32)
    result = activation
    if layer.shortcut is not None:
      result = graph.constant(_SUMMAND_SCALE), zero
    y = graph.node("QLinearConv", y, *activation, graph.constant(kernel),
                   graph.constant(unit), weight_zero, *result, graph.constant(bias),
                   **_conv_attributes(layer))
    y = _pool(graph, layer, y)
    if layer.shortcut is not None:
      y = graph.node("QLinearAdd", y, *result, values[layer.shortcut], *activation,
                     *activation, domain="com.microsoft")
    values.append(y)
  return graph.file(_image(shape), values[-1], np.uint8)


def int8_kernel(layer: Layer) -> tuple[np.ndarray, np.float32]:
  """Returns a kernel, int8 (out, in, height, width), and what 1 stands for in it."""
  unit = np.float32(np.abs(layer.kernel).max() / 127)
  return np.round(layer.kernel / unit).astype(np.int8).transpose(3, 2, 0, 1), unit


def _image(shape: Sequence[int]) -> list[Any]:
  """Returns (batch, channels, height, width) of (height, width, channels)."""
  return ["n", shape[2], *shape[:2]]


def _conv_attributes(layer: Layer) -> dict[str, Any]:
  return {"pads": _pads(layer.pads), "strides": list(layer.strides)}


def _pads(pads: Sequence[int]) -> list[int]:
  """Returns (top, left, bottom, right) of (top, bottom, left, right)."""
  top, bottom, left, right = pads
  return [top, left, bottom, right]


def _pool(graph: _Graph, layer: Layer, x: str) -> str:
  """Adds the max pooling of a layer, if it has one."""
  if not layer.pool:
    return x
  return graph.node(
      "MaxPool", x, kernel_shape=list(layer.pool.window),
      strides=list(layer.pool.strides), pads=_pads(layer.pool.pads))


TWO_BIT_BLOCK = 32  # Number of products that share a scale.


def two_bit_network(kernels: Sequence[np.ndarray]) -> bytes:
  """Returns dense layers of 2-bit weights, each followed by HardTanh, as an ONNX file.

  They are MatMulNBits with int8 activations. ONNX Runtime quantizes its float32 inputs
  by itself, in blocks. The codes -1, 0 and 1 are exact.

  Args:
    kernels: Weights -1, 0 or 1, int8 (out, in). The number of inputs is a multiple of
      `TWO_BIT_BLOCK`.
  """
  graph = _Graph()
  low, high, x = graph.constant(np.float32(-1)), graph.constant(np.float32(1)), "x"
  for kernel in kernels:
    out, inputs = kernel.shape
    blocks = inputs // TWO_BIT_BLOCK
    codes = _two_bits(kernel + 1).reshape(out, blocks, -1)
    x = graph.node(
        "MatMulNBits", x, graph.constant(codes),
        graph.constant(np.ones((out, blocks), np.float32)),
        graph.constant(_two_bits(np.ones((out, blocks), np.int8))),
        domain="com.microsoft", K=inputs, N=out, bits=2, block_size=TWO_BIT_BLOCK,
        accuracy_level=4)
    x = graph.node("Clip", x, low, high)
  return graph.file(["n", kernels[0].shape[1]], x, np.float32)


def _two_bits(values: np.ndarray) -> np.ndarray:
  """Returns rows of numbers 0 to 3, four in a byte, the first in the lowest bits."""
  rows = np.pad(values.astype(np.uint8), [(0, 0), (0, -values.shape[1] % 4)])
  quads = rows.reshape(len(rows), -1, 4)
  return np.bitwise_or.reduce(quads << np.array([0, 2, 4, 6], np.uint8), 2)
