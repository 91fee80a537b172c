"""Networks for OpenVINO: the packed network of binary convolutions, and int8.

BinaryConvolution sums products of weights and inputs that are -1 or 1, as the packed
network's W1A1 convolutions do. A FakeQuantize of two levels before it makes its inputs,
which are the bits 0 and 1. The kernels of OpenVINO's CPU plugin keep the activations as
bits between layers.
"""

import sys
from typing import Any, Callable, NamedTuple, Sequence

import numpy as np

from minw import packed
from minw.bench import onnx_networks
from minw.bench.networks import Layer

# Importing OpenVINO would report the import to its makers, from a forked process. It
# does without this package if the package cannot be imported.
sys.modules.setdefault("openvino_telemetry", None)  # pyright: ignore

# All threads belong to one stream. Float32 holds the sums exactly, whereas the default
# is bfloat16 on some CPUs.
_SETTINGS = {"NUM_STREAMS": 1, "PERFORMANCE_HINT": "LATENCY",
             "ENABLE_CPU_PINNING": False, "INFERENCE_PRECISION_HINT": "f32"}

# Environment variables that keep OpenVINO and its oneDNN from newer extensions.
AVX2 = {"OV_CPU_MAX_ISA": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2"}


def compile_model(model: Any, threads: int) -> Any:
  """Compiles an OpenVINO model for the CPU, for a short latency of single calls.

  Args:
    model: An `openvino.Model`.
    threads: Number of threads.
  """
  import openvino

  return openvino.Core().compile_model(
      model, "CPU", {**_SETTINGS, "INFERENCE_NUM_THREADS": threads})


def prepare(compiled: Any, x: np.ndarray) -> Callable[[], np.ndarray]:
  """Makes the call of a compiled model whose overhead in Python is the smallest.

  The request, its input and its output are made once.

  Args:
    compiled: The result of `compile_model`.
    x: The only input.

  Returns:
    A function that computes the only output. Its next call overwrites the array.
  """
  import openvino

  request = compiled.create_infer_request()
  # The request does not keep the arrays alive, but the function does.
  arrays = np.ascontiguousarray(x), np.empty(compiled.output(0).shape, np.float32)
  tensors = [openvino.Tensor(array, shared_memory=True) for array in arrays]
  request.set_input_tensor(tensors[0])
  request.set_output_tensor(tensors[1])

  def call() -> np.ndarray:
    request.infer(share_inputs=True, share_outputs=True)
    return arrays[1]

  return call


def overhead_model() -> Any:
  """Returns a model of a single addition, whose time is the overhead of a call."""
  from openvino import opset13

  x = opset13.parameter([1, 1], np.float32)
  return _model(x, opset13.add(x, np.ones((1, 1), np.float32)))


def _model(x: Any, result: Any) -> Any:
  """Returns the model from one parameter to one result."""
  import openvino

  make: Any = openvino.Model  # Pyright cannot bind its constructor.
  return make([result], [x])


def binary_model(program: packed.Program, batch: int) -> Any:
  """Translates a packed W1A1 network, operation by operation.

  All sums are equal to those of the packed network:

  - A convolution of codes is a BinaryConvolution. Its pad_value of 0 stands for zeros
    as padding, which no sum counts, and a pad_value of -1 or 1 for such codes.
  - A convolution of pixels or sums is a float32 convolution whose weights are -1 and 1.
  - A threshold is a FakeQuantize with a range for each channel.
  - Max pooling stands where it does in the packed network.

  Args:
    program: The packed network.
    batch: Number of images.

  Returns:
    An `openvino.Model` from the images' crops less the program's offset, float32
    (batch, channels, height, width), to the logits, float32 (batch, classes, 1, 1).

  Raises:
    ValueError: OpenVINO has no counterpart of an operation.
  """
  from openvino import opset13

  values = packed.infer_values(program)
  h, w, c = values[0].shape
  results = [_Value(opset13.parameter([batch, c, h, w], np.float32))]
  for op in program.ops:
    if type(op) not in _TRANSLATIONS:
      raise ValueError(f"{op.name}: it has no counterpart of {type(op).__name__}")
    given = (results[i] for i in packed.inputs(op))
    results.append(_TRANSLATIONS[type(op)](op, *given))
  return _model(results[0].node, results[-1].node)


class _Value(NamedTuple):
  """A value of the packed network in an OpenVINO model.

  A CODE is represented by the sums of which it is made, because its consumers need it
  in two forms. BinaryConvolution takes bits, which crash or confuse anything else.

  Attributes:
    node: The node that computes the value, or a CODE's sums.
    edge: A CODE is 1 where its sums are larger, and -1 elsewhere, float32 (channels,).
    falling: Channels in which a CODE is 1 where they are smaller, bool (channels,).
  """

  node: Any
  edge: np.ndarray | None = None
  falling: np.ndarray | None = None

  def bits(self) -> Any:
    """Returns the node of a CODE's bits, 0 and 1, for BinaryConvolution."""
    from openvino import opset13

    edge, falling = _channels(self.edge), _channels(self.falling)
    return opset13.fake_quantize(self.node, edge, edge, falling, 1 - falling, 2)

  def levels(self, scale: np.ndarray | float = 1) -> Any:
    """Returns the node of the value in numbers, -scale and scale for a CODE."""
    from openvino import opset13

    if self.edge is None:
      return self.node
    # Sums are an integer from each other, and at least 0.5 from the edge. Between low
    # and high are none of them.
    edge, rising = _channels(self.edge), scale * (1 - 2 * _channels(self.falling))
    low, high = edge - np.float32(0.25), edge + np.float32(0.25)
    return opset13.fake_quantize(self.node, low, high, -rising, rising, 2)


def _channels(values: Any) -> np.ndarray:
  """Returns one number for each channel, such that they broadcast over a map."""
  return np.asarray(values, np.float32).reshape(1, -1, 1, 1)


def _conv(op: packed.Conv, x: _Value) -> _Value:
  from openvino import opset13

  if op.bits != 1:
    raise ValueError(f"{op.name}: BinaryConvolution takes weights of 1 bit")
  if op.groups > 1:
    raise ValueError(f"{op.name}: BinaryConvolution takes no groups")
  top, bottom, left, right = op.pads
  window: list[Any] = [list(op.strides), [top, left], [bottom, right],
                       list(op.dilation)]
  kernel = op.kernel.transpose(0, 3, 1, 2)
  if x.edge is None:
    return _Value(opset13.convolution(x.node, kernel.astype(np.float32), *window))
  return _Value(opset13.binary_convolution(
      x.bits(), _bit_constant(kernel > 0), *window, "xnor-popcount", float(op.pad)))


def _bit_constant(values: np.ndarray) -> Any:
  """Returns a constant of type u1, the first bits in the lowest places of its bytes."""
  import openvino
  from openvino import opset13

  data = np.packbits(values.reshape(-1), bitorder="little")
  tensor = openvino.Tensor(data, openvino.Shape(values.shape), openvino.Type.u1)
  # The constant gets a copy, because the tensor does not keep `data` alive.
  return opset13.constant(tensor, shared_memory=False)


def _threshold(
    op: packed.Threshold, x: _Value, shortcut: _Value | None = None
) -> _Value:
  from openvino import opset13

  if op.bits != 1:
    raise ValueError(f"{op.name}: BinaryConvolution takes activations of 1 bit")
  node, first, last = x.node, op.thresholds[0, 0], op.thresholds[-1, 0]
  if shortcut:
    # A level s of the shortcut selects one of two thresholds, middle + s * half. Sums
    # less s * half are compared with the middle.
    # The maximum with a number below all sums changes nothing. Without it, OpenVINO
    # fuses the addition and the threshold into the convolution, and is wrong.
    half = _channels((last - first) / 2)
    node = opset13.maximum(
        opset13.add(node, shortcut.levels(-half)), np.float32(-2**30))
  edge = (first + last) / 2 + np.where(op.falling, 0.5, -0.5)
  return _Value(node, edge, op.falling)


def _pool(op: packed.Pool, x: _Value) -> _Value:
  from openvino import opset13

  if op.kind == "max":
    return _Value(_max_pool(op, x.levels()))
  if any(op.pads) or tuple(op.window) != tuple(x.node.shape)[2:]:
    raise ValueError(f"{op.name}: it has no counterpart of sums over windows")
  return _Value(opset13.reduce_sum(x.levels(), np.array([2, 3]), keep_dims=True))


def _logits(op: packed.Logits, x: _Value) -> _Value:
  from openvino import opset13

  y = opset13.multiply(x.levels(), np.float32(op.unit))
  y = opset13.multiply(opset13.subtract(y, _channels(op.center)), _channels(op.scale))
  return _Value(opset13.add(y, _channels(op.constant)))


_TRANSLATIONS: dict[type, Callable[..., _Value]] = {
    packed.Conv: _conv,
    packed.Threshold: _threshold,
    packed.Pool: _pool,
    packed.Logits: _logits,
}


def int8_model(layers: Sequence[Layer], shape: Sequence[int], batch: int) -> Any:
  """Returns the network of `onnx_networks.int8_network` with FakeQuantize.

  OpenVINO turns FakeQuantizes of 256 levels and the convolutions between them into
  integer kernels.

  Args:
    layers: Layers of the network.
    shape: Height, width and channels of an image.
    batch: Number of images.

  Returns:
    An `openvino.Model` from images, uint8 (batch, channels, height, width), to logits,
    float32 (batch, classes, 1, 1).
  """
  from openvino import opset13

  h, w, c = shape
  image = opset13.parameter([batch, c, h, w], np.uint8)
  centered = opset13.subtract(
      opset13.convert(image, "f32"), np.float32(onnx_networks.INT8_ZERO))
  values = [opset13.multiply(centered, onnx_networks.INT8_SCALE)]
  for layer in layers:
    y = values[layer.input]
    if layer.mean:
      y = _fake_int8(opset13.reduce_mean(y, np.array([2, 3]), keep_dims=True))
    top, bottom, left, right = layer.pads
    y = opset13.add(opset13.convolution(
        y, _int8_constant(layer), list(layer.strides), [top, left], [bottom, right],
        [1, 1]), _channels(layer.bias))
    if layer.shortcut is not None:
      y = opset13.add(y, values[layer.shortcut])
    # Bytes are pooled faster than floats, with the same results.
    y = _fake_int8(y) if layer.clip else y
    values.append(_max_pool(layer.pool, y) if layer.pool else y)
  return _model(image, values[-1])


def _int8_constant(layer: Layer) -> Any:
  """Returns a layer's kernel as int8 weights times a scale."""
  from openvino import opset13

  kernel, unit = onnx_networks.int8_kernel(layer)
  constant = opset13.constant(np.ascontiguousarray(kernel))
  return opset13.multiply(opset13.convert(constant, "f32"), unit)


def _fake_int8(x: Any) -> Any:
  """Returns HardTanh of a node, rounded to the activations of int8 networks."""
  from openvino import opset13

  low, high = (np.float32(n * onnx_networks.INT8_SCALE) for n in (-128, 127))
  return opset13.fake_quantize(x, low, high, low, high, 256)


def _max_pool(op: packed.Pool, x: Any) -> Any:
  from openvino import opset13

  top, bottom, left, right = op.pads
  return opset13.max_pool(
      x, list(op.strides), [1, 1], [top, left], [bottom, right],
      list(op.window)).output(0)


def convolution_types(compiled: Any) -> set[str]:
  """Returns the types in which a compiled model's convolutions compute."""
  return {node.get_rt_info()["runtimePrecision"].value
          for node in compiled.get_runtime_model().get_ops()
          if node.get_rt_info()["layerType"].value == "Convolution"}
