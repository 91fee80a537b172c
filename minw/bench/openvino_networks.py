"""OpenVINO as a peer: the packed network, made of OpenVINO's BinaryConvolutions.

BinaryConvolution sums products of weights and inputs that are -1 or 1, as the packed
network's W1A1 convolutions do. A FakeQuantize of two levels before it makes its inputs,
which are the bits 0 and 1. The kernels of OpenVINO's CPU plugin keep the activations as
bits between layers.
"""

from typing import Any, Callable, NamedTuple

import numpy as np

from minw import packed

# All threads belong to one stream. Float32 holds the sums exactly, whereas the default
# is bfloat16 on some CPUs.
_SETTINGS = {"NUM_STREAMS": 1, "PERFORMANCE_HINT": "LATENCY",
             "ENABLE_CPU_PINNING": False, "INFERENCE_PRECISION_HINT": "f32"}


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

  def levels(self) -> Any:
    """Returns the node of the value in numbers, -1 and 1 for a CODE."""
    from openvino import opset13

    if self.edge is None:
      return self.node
    # Sums are an integer from each other, and at least 0.5 from the edge. Between low
    # and high are none of them.
    edge, falling = _channels(self.edge), _channels(self.falling)
    low, high = edge - np.float32(0.25), edge + np.float32(0.25)
    return opset13.fake_quantize(
        self.node, low, high, 2 * falling - 1, 1 - 2 * falling, 2)


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
    half = _channels((last - first) / 2)
    node = opset13.subtract(node, opset13.multiply(shortcut.levels(), half))
  edge = (first + last) / 2 + np.where(op.falling, 0.5, -0.5)
  return _Value(node, edge, op.falling)


def _pool(op: packed.Pool, x: _Value) -> _Value:
  from openvino import opset13

  top, bottom, left, right = op.pads
  if op.kind == "max":
    return _Value(opset13.max_pool(
        x.levels(), list(op.strides), [1, 1], [top, left], [bottom, right],
        list(op.window)).output(0))
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
