"""The engines whose inference is timed: minw's own, and others as baselines.

An engine that computes the packed network is timed only if its sums are equal to those
of `minw.kernels.reference`. The baselines in float32 and int8 compute networks of the
same shapes. Their images are already cropped, normalized and in their preferred layout.
"""

import functools
import importlib.util
from typing import Any, Callable, Iterable, NamedTuple, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from minw import packed
from minw.bench import float_networks
from minw.bench import networks
from minw.bench import onnx_networks
from minw.bench import openvino_networks
from minw.bench import timing
from minw.kernels import native
from minw.kernels import reference
from minw.kernels import xla


class Case(NamedTuple):
  """A network and a batch with which an engine is timed.

  Attributes:
    program: The packed network.
    images: Its images, uint8 (batch, *program.source_shape).
    layers: A network of the same shapes in float32.
    x: Its images, float32 (batch, height, width, channels) between -1 and 1.
    threads: Number of threads.
  """

  program: packed.Program
  images: np.ndarray
  layers: Sequence[networks.Layer]
  x: np.ndarray
  threads: int


class LeftOut(Exception):
  """An engine is not timed; the message is the reason."""


def start(
    program: packed.Program,
    layers: Sequence[networks.Layer],
    batch: int,
    threads: int,
    names: Iterable[str],
) -> tuple[dict[str, timing.Run], dict[str, str]]:
  """Starts the engines that can run a network.

  Args:
    program: The packed network.
    layers: A network of the same shapes in float32.
    batch: Number of images.
    threads: Number of threads.
    names: Names in `ENGINES`.

  Returns:
    The runs by name, and the reasons why other engines are left out.
  """
  generator = np.random.default_rng(0)
  images = generator.integers(0, 256, (batch, *program.source_shape), np.uint8)
  shape = (batch, *program.crop, program.source_shape[2])
  x = generator.uniform(-1, 1, shape).astype(np.float32)
  case = Case(program, images, layers, x, threads)
  runs, left_out = {}, {}
  for name in names:
    modules, engine = ENGINES[name]
    missing = [part for part in modules if importlib.util.find_spec(part) is None]
    try:
      if missing:
        raise LeftOut(f"{missing[0]} is not installed")
      runs[name] = engine(case)
    except LeftOut as error:
      left_out[name] = str(error)
  return runs, left_out


def check_sums(
    program: packed.Program, images: np.ndarray, logits: np.ndarray
) -> None:
  """Checks that an engine computes the packed network.

  The sums of the last layer must be equal to those of `minw.kernels.reference`. The
  engine may round the affine function that makes logits of them in its own way.

  Args:
    program: The packed network.
    images: The batch. Its first and its last image are checked.
    logits: What the engine computed, float32 (batch, classes).

  Raises:
    LeftOut: The sums differ.
  """
  ends = [0, -1]
  want, last = reference.logits(program, images[ends]), program.ops[-1]
  assert isinstance(last, packed.Logits)
  one = np.abs(np.float32(last.unit) * last.scale)  # A sum of 1 adds this much.
  if not (np.abs(logits[ends] - want) < one / 8).all():
    raise LeftOut(_WRONG)


_WRONG = "its sums are not those of the packed network"


def repeat(call: Callable[[], Any]) -> timing.Run:
  """Returns a run that calls a function once for each step."""
  def run(count: int) -> None:
    for _ in range(count):
      call()
  return run


# Each engine takes a `Case` and returns a run, or raises `LeftOut`.


def _native(case: Case) -> timing.Run:
  if not native.available():
    raise LeftOut("it was not built")
  network = native.load(packed.to_bytes(case.program))
  return repeat(lambda: network.logits(case.images, threads=case.threads))


def _xla(case: Case) -> timing.Run:
  operands, function = xla.logits(case.program)
  function = jax.jit(function)
  return repeat(lambda: function(operands, case.images).block_until_ready())


def _openvino_binary(case: Case) -> timing.Run:
  program = case.program
  pixels = packed.crop(program, case.images).astype(np.float32) - program.offset
  try:
    model = openvino_networks.binary_model(program, len(pixels))
  except ValueError as error:
    raise LeftOut(str(error)) from error
  call = openvino_networks.prepare(
      openvino_networks.compile_model(model, case.threads),
      pixels.transpose(0, 3, 1, 2))
  check_sums(program, case.images, call().reshape(len(pixels), -1))
  return repeat(call)


def _openvino_int8(case: Case) -> timing.Run:
  model = openvino_networks.int8_model(case.layers, case.x.shape[1:], len(case.x))
  compiled = openvino_networks.compile_model(model, case.threads)
  floats = openvino_networks.convolution_types(compiled) - {"i8", "u8"}
  if floats:
    raise LeftOut(f"it computes convolutions in {', '.join(sorted(floats))}")
  return repeat(openvino_networks.prepare(compiled, _channels_first(case.x, np.uint8)))


def _xla_float(case: Case) -> timing.Run:
  weights = jax.device_put([(layer.kernel, layer.bias) for layer in case.layers])
  function = jax.jit(functools.partial(float_networks.logits, case.layers))
  x = jnp.asarray(case.x)
  return repeat(lambda: function(weights, x).block_until_ready())


def _channels_first(x: np.ndarray, dtype: Any) -> np.ndarray:
  """Returns images (batch, channels, height, width), as float32 or in steps."""
  if dtype == np.uint8:
    x = np.round(x / onnx_networks.INT8_SCALE + onnx_networks.INT8_ZERO)
  return np.ascontiguousarray(x.astype(dtype).transpose(0, 3, 1, 2))


def _onnx_session(file: bytes, threads: int) -> Any:
  import onnxruntime

  options = onnxruntime.SessionOptions()
  options.intra_op_num_threads = threads
  options.inter_op_num_threads = 1
  return onnxruntime.InferenceSession(
      file, options, providers=["CPUExecutionProvider"])


def _onnx(make: Callable[..., bytes], dtype: Any, case: Case) -> timing.Run:
  session = _onnx_session(make(case.layers, case.x.shape[1:]), case.threads)
  x = _channels_first(case.x, dtype)
  return repeat(lambda: session.run(None, {"x": x}))


def _onnx_two_bits(case: Case) -> timing.Run:
  convolutions = [op for op in case.program.ops if isinstance(op, packed.Conv)]
  if any(op.bits not in (1, 2) for op in convolutions):
    raise LeftOut("its weights have 2 bits")
  kernels = [op.kernel.reshape(len(op.kernel), -1) for op in convolutions]
  if any(kernel.shape[1] % onnx_networks.TWO_BIT_BLOCK for kernel in kernels):
    raise LeftOut(f"it sums blocks of {onnx_networks.TWO_BIT_BLOCK} products")
  few = case.images[[0, -1]]
  codes, sums = (value.reshape(len(few), -1).astype(np.float32)
                 for value in reference.run(case.program, few)[1:3])
  first = _onnx_session(onnx_networks.two_bit_network(kernels[:1]), case.threads)
  if not np.array_equal(first.run(None, {"x": codes})[0], sums.clip(-1, 1)):
    raise LeftOut(_WRONG)
  session = _onnx_session(onnx_networks.two_bit_network(kernels), case.threads)
  x = case.x.reshape(len(case.x), -1)
  return repeat(lambda: session.run(None, {"x": x}))


def _torch(case: Case) -> timing.Run:
  import torch

  torch.set_num_threads(case.threads)
  network = float_networks.torch_network(case.layers)
  x = torch.tensor(case.x).permute(0, 3, 1, 2)

  def run(count: int) -> None:
    with torch.inference_mode():
      for _ in range(count):
        network(x)

  return run


_ONNX = ("onnxruntime", "onnx")

# The engines by name, each with the modules that it needs.
ENGINES: dict[str, tuple[Sequence[str], Callable[[Case], timing.Run]]] = {
    "native": ((), _native),
    "XLA packed": ((), _xla),
    "OpenVINO binary": (("openvino",), _openvino_binary),
    "XLA float32": ((), _xla_float),
    "ONNX Runtime float32": (
        _ONNX, functools.partial(_onnx, onnx_networks.float_network, np.float32)),
    "ONNX Runtime int8": (
        _ONNX, functools.partial(_onnx, onnx_networks.int8_network, np.uint8)),
    "ONNX Runtime W2A8": (_ONNX, _onnx_two_bits),
    "OpenVINO int8": (("openvino",), _openvino_int8),
    "PyTorch float32": (("torch",), _torch),
}
# Engines of whole networks, of convolutions alone, and of dense layers alone.
OF_NETWORKS = tuple(name for name in ENGINES if name != "ONNX Runtime W2A8")
OF_CONVOLUTIONS = (
    "native", "XLA packed", "OpenVINO binary", "ONNX Runtime int8", "OpenVINO int8")
OF_DENSE_LAYERS = (*OF_CONVOLUTIONS, "ONNX Runtime W2A8")
