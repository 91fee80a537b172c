"""Benchmark of inference: the packed network beside float32 and int8 networks.

Each number of threads is measured in a separate process with as many cores. The
baselines have an advantage: their images are already cropped, normalized and in their
preferred layout.
"""

import concurrent.futures
import functools
import importlib.util
import math
import multiprocessing
import os
import subprocess
import sys
import tempfile
from typing import Any, Callable, Iterable, NamedTuple, Sequence

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from minw import config as config_lib
from minw import errors
from minw import layers as layers_lib
from minw import pack
from minw import packed
from minw import stopping
from minw import titles
from minw.bench import openvino_networks
from minw.bench import timing
from minw.experiment import Experiment
from minw.kernels import native
from minw.kernels import reference
from minw.kernels import xla

_PACKAGES = ("numpy", "onnx", "onnxruntime", "openvino", "torch")  # Recorded versions.
# Bits of the weights and the activations that --layers times.
_PAIRS = [(1, 1), (2, 1), (1, 2), (3, 1), (2, 2), (3, 3)]
# Height and width of their maps, and channels.
_SHAPES = [(24, 128), (12, 256), (6, 512)]
# A layer's time is the difference between networks of so many layers, divided by the
# difference in layers.
_DEPTHS = (2, 6)


class Linear(NamedTuple):
  """A convolution in float32. Dense layers are convolutions as large as their input.

  Attributes:
    kernel: Kernel, float32 (height, width, in, out), into which batch norm is folded.
    bias: Bias, float32 (out,).
    same: Whether padding keeps height and width.
    pool: Whether 2x2 max pooling follows.
    clip: Whether HardTanh follows.
  """

  kernel: np.ndarray
  bias: np.ndarray
  same: bool
  pool: bool
  clip: bool


class Case(NamedTuple):
  """A network and a batch of which an engine is timed.

  Attributes:
    program: The packed network.
    images: Its images, uint8 (batch, *program.source_shape).
    linear: A network of the same shapes in float32.
    x: Its images, float32 (batch, height, width, channels).
    threads: Number of threads.
  """

  program: packed.Program
  images: np.ndarray
  linear: Sequence[Linear]
  x: np.ndarray
  threads: int


class LeftOut(Exception):
  """An engine is not timed; the message is the reason."""


def bench_inference(
    config: Any, rounds: int, batches: Sequence[int], layers: bool = False
) -> dict[str, Any]:
  """Times inference engines side by side, with random weights and images.

  Args:
    config: Config of a ConvNet, see `config.default_config`.
    rounds: Number of measurements of each engine.
    batches: Batch sizes.
    layers: Whether to time single convolutions and not networks.

  Returns:
    The object that --json writes. `runs` has threads, batch, engines, ratios and the
    engines that were left out of each run. `left_out` at the top has the engines that
    were left out of all runs.

  Raises:
    errors.UsageError: The config cannot be run.
  """
  if not layers:
    random_network(config)  # An invalid config raises its error in this process.
  cores = len(os.sched_getaffinity(0))
  runs = []
  for threads in sorted({1, cores}):
    measure = functools.partial(
        _layers if layers else _networks, config.to_dict(), rounds, batches, threads)
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(
        1, context, stopping.end_with_parent) as pool:
      runs += pool.submit(measure).result()
    if layers:
      break
  return {
      "bench": "inference", "config": config.to_dict(), "rounds": rounds,
      "layers": layers, "machine": timing.machine(_PACKAGES), "isa": _isa(),
      "runs": runs, "left_out": _left_out_of_all(runs),
      "peak_bytes": {} if layers else native_memory(config),
  }


def _left_out_of_all(runs: Sequence[dict[str, Any]]) -> dict[str, str]:
  """Returns the engines that no run has, with the reason of the last run."""
  timed = {name for run in runs for name in run["engines"]}
  return {name: why for run in runs for name, why in run["left_out"].items()
          if name not in timed}


def random_network(config: Any) -> tuple[packed.Program, list[Linear]]:
  """Makes a config's network with random weights, packed and in float32."""
  experiment = Experiment(config)
  if any("/" in layer.path for layer in experiment.layers):
    raise errors.bad_value("config.network", config.network, "a ConvNet")
  generator = np.random.default_rng(config.seed)
  image = experiment.image_shape
  variables = jax.tree.map(np.array, jax.device_get(jax.jit(
      lambda: layers_lib.initialize(experiment.model, image))()))
  linear, size = [], image[:2]
  for layer, norm in zip(experiment.layers[::2], experiment.layers[1::2]):
    fan_in, out = math.prod(layer.kernel_shape[:-1]), layer.kernel_shape[-1]
    draw = lambda low, high: generator.uniform(low, high, out).astype(np.float32)  # noqa: B023
    statistics = variables["batch_stats"][norm.path]["batch_norm"]
    statistics.update(mean=draw(-1, 1) * fan_in ** 0.5 / 2, var=draw(0.5, 2) * fan_in)
    variables["params"][norm.path]["batch_norm"].update(
        scale=draw(0.5, 1) * generator.choice(np.array([-1, 1], np.float32), out),
        bias=draw(-0.5, 0.5))
    conv = layer.kind == "conv"
    window = layer.kernel_shape[:2] if conv else size
    kernel = generator.normal(0, fan_in ** -0.5, (fan_in, out)).astype(np.float32)
    same = conv and layer.output_shape[:2] == layer.input_shape[:2]
    pool = conv and norm.input_shape != layer.output_shape
    linear.append(Linear(kernel.reshape(*window, -1, out), draw(-0.5, 0.5), same, pool,
                         clip=norm.bits is not None))
    size = norm.output_shape[:2] if conv else (1, 1)
  try:
    program = pack.pack(
        experiment.model, variables, pixels=experiment.pixels,
        source_shape=experiment.info.image_shape, crop=image[:2])
  except ValueError as error:
    raise errors.UsageError(str(error)) from error
  return program, linear


def multiplications(program: packed.Program) -> int:
  """Returns the number of multiplications of an image."""
  return sum(math.prod(value.shape[:2]) * op.kernel.size
             for op, value in zip(program.ops, packed.infer_values(program)[1:])
             if isinstance(op, packed.Conv))


# The engines. Each takes a `Case` and returns a Run, or raises `LeftOut`.


def _times(call: Callable[[], Any]) -> timing.Run:
  def run(count):
    for _ in range(count):
      call()
  return run


def _native(case: Case) -> timing.Run:
  if not native.available():
    raise LeftOut("it was not built")
  network = native.load(packed.to_bytes(case.program))
  return _times(lambda: network.logits(case.images, threads=case.threads))


def _xla(case: Case) -> timing.Run:
  operands, function = xla.logits(case.program)
  function = jax.jit(function)
  return _times(lambda: function(operands, case.images).block_until_ready())


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
  return _times(call)


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
  one = np.abs(np.float32(last.unit) * last.scale)  # What a sum of 1 adds.
  if not (np.abs(logits[ends] - want) < one / 8).all():
    raise LeftOut("its sums are not those of the packed network")


def float_logits(linear: Sequence[Linear], weights: Any, x: jax.Array) -> jax.Array:
  """Computes the float network in XLA.

  Args:
    linear: Layers of the network.
    weights: Pairs of kernel and bias, one for each layer.
    x: Images, float32 (batch, height, width, channels).

  Returns:
    Logits, float32 (batch, classes).
  """
  for layer, (kernel, bias) in zip(linear, weights):
    x = lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME" if layer.same else "VALID",
        dimension_numbers=("NHWC", "HWIO", "NHWC")) + bias
    if layer.pool:
      n, h, w, c = x.shape
      x = x[:, :h // 2 * 2, :w // 2 * 2].reshape(n, h // 2, 2, w // 2, 2, c).max((2, 4))
    if layer.clip:
      x = jnp.clip(x, -1, 1)
  return x.reshape(len(x), -1)


def _xla_float(case: Case) -> timing.Run:
  linear = case.linear
  weights = jax.device_put([(layer.kernel, layer.bias) for layer in linear])
  function = jax.jit(functools.partial(float_logits, linear))
  x = jnp.asarray(case.x)
  return _times(lambda: function(weights, x).block_until_ready())


def onnx_float(linear: Sequence[Linear], shape: Sequence[int]) -> bytes:
  """Returns the float network as an ONNX file, for images (batch, channels, h, w).

  Args:
    linear: Layers of the network.
    shape: Channels, height and width of an image.
  """
  import onnx
  from onnx import helper
  from onnx import numpy_helper

  nodes, constants, x = [], [], "x"

  def constant(value):
    constants.append(numpy_helper.from_array(value, f"c{len(constants)}"))
    return constants[-1].name

  def node(kind, *inputs, **attributes):
    nodes.append(helper.make_node(kind, inputs, [f"y{len(nodes)}"], **attributes))
    return nodes[-1].output[0]

  low, high = constant(np.float32(-1)), constant(np.float32(1))
  for layer in linear:
    kernel = constant(layer.kernel.transpose(3, 2, 0, 1).copy())
    x = node("Conv", x, kernel, constant(layer.bias), pads=_pads(layer))
    if layer.pool:
      x = node("MaxPool", x, kernel_shape=[2, 2], strides=[2, 2])
    if layer.clip:
      x = node("Clip", x, low, high)
  return _onnx_model(nodes, constants, shape, x, onnx.TensorProto.FLOAT,
                     onnx.TensorProto.FLOAT)


def onnx_int8(linear: Sequence[Linear], shape: Sequence[int]) -> bytes:
  """Returns the network with uint8 activations and int8 weights as an ONNX file.

  All its operators are integer. Its scales are fixed such that saturation computes
  HardTanh.

  Args:
    linear: Layers of the network.
    shape: Channels, height and width of an image.
  """
  import onnx
  from onnx import helper
  from onnx import numpy_helper

  nodes, constants, x = [], [], "x"

  def constant(value):
    constants.append(numpy_helper.from_array(np.asarray(value), f"c{len(constants)}"))
    return constants[-1].name

  def node(kind, *inputs, **attributes):
    nodes.append(helper.make_node(kind, inputs, [f"y{len(nodes)}"], **attributes))
    return nodes[-1].output[0]

  scale, zero = np.float32(1 / 127), np.uint8(128)
  activation = constant(scale), constant(zero)
  for layer in linear:
    unit = np.float32(np.abs(layer.kernel).max() / 127)
    kernel = np.round(layer.kernel / unit).astype(np.int8).transpose(3, 2, 0, 1)
    bias = np.round(layer.bias / (scale * unit)).astype(np.int32)
    x = node("QLinearConv", x, *activation, constant(kernel.copy()), constant(unit),
             constant(np.int8(0)), *activation, constant(bias), pads=_pads(layer))
    if layer.pool:
      x = node("MaxPool", x, kernel_shape=[2, 2], strides=[2, 2])
  return _onnx_model(nodes, constants, shape, x, onnx.TensorProto.UINT8,
                     onnx.TensorProto.UINT8)


def _pads(layer):
  h, w = (size - 1 if layer.same else 0 for size in layer.kernel.shape[:2])
  return [h // 2, w // 2, h - h // 2, w - w // 2]


def _onnx_model(nodes, constants, shape, result, *kinds):
  from onnx import helper

  values = [helper.make_tensor_value_info(name, kind, dims) for name, kind, dims in zip(
      ("x", result), kinds, (["n", shape[2], *shape[:2]], ["n", None, None, None]))]
  graph = helper.make_graph(nodes, "network", values[:1], values[1:], constants)
  return helper.make_model(
      graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8
  ).SerializeToString()


def _onnx(make, dtype, case: Case) -> timing.Run:
  import onnxruntime

  options = onnxruntime.SessionOptions()
  options.intra_op_num_threads = case.threads
  options.inter_op_num_threads = 1
  session = onnxruntime.InferenceSession(
      make(case.linear, case.x.shape[1:]), options, providers=["CPUExecutionProvider"])
  x = case.x
  x = np.ascontiguousarray((x * 127 + 128 if dtype == np.uint8 else x).astype(
      dtype).transpose(0, 3, 1, 2))
  return _times(lambda: session.run(None, {"x": x}))


def torch_inference(linear: Sequence[Linear]) -> Any:
  """Returns the float network in PyTorch, for images (batch, channels, h, w)."""
  import torch
  from torch import nn

  parts = []
  for layer in linear:
    *window, channels, out = layer.kernel.shape
    conv = nn.Conv2d(channels, out, window, padding="same" if layer.same else "valid")
    conv.weight.data = torch.tensor(layer.kernel).permute(3, 2, 0, 1)
    conv.bias.data = torch.tensor(layer.bias)
    parts.append(conv)
    parts += [nn.MaxPool2d(2)] * layer.pool + [nn.Hardtanh()] * layer.clip
  return nn.Sequential(*parts).eval().to(memory_format=torch.channels_last)


def _torch(case: Case) -> timing.Run:
  import torch

  torch.set_num_threads(case.threads)
  network = torch_inference(case.linear)
  x = torch.tensor(case.x).permute(0, 3, 1, 2)

  def run(count):
    with torch.inference_mode():
      for _ in range(count):
        network(x)

  return run


# The engines by name, each with the modules that it needs.
_ENGINES: dict[str, tuple[Sequence[str], Callable[[Case], timing.Run]]] = {
    "native": ([], _native),
    "XLA packed": ([], _xla),
    "OpenVINO binary": (["openvino"], _openvino_binary),
    "XLA float32": ([], _xla_float),
    "ONNX Runtime float32": (
        ["onnxruntime", "onnx"], functools.partial(_onnx, onnx_float, np.float32)),
    "ONNX Runtime int8": (
        ["onnxruntime", "onnx"], functools.partial(_onnx, onnx_int8, np.uint8)),
    "PyTorch float32": (["torch"], _torch),
}


def start_engines(
    program: packed.Program,
    linear: Sequence[Linear],
    batch: int,
    threads: int,
    names: Iterable[str] = tuple(_ENGINES),
) -> tuple[dict[str, timing.Run], dict[str, str]]:
  """Starts the engines that can run a network.

  Args:
    program: The packed network.
    linear: A network of the same shapes in float32.
    batch: Number of images.
    threads: Number of threads.
    names: Names of the engines.

  Returns:
    The runs by name, and the reasons why other engines are left out.
  """
  generator = np.random.default_rng(0)
  images = generator.integers(0, 256, (batch, *program.source_shape), np.uint8)
  x = generator.uniform(
      -1, 1, (batch, *program.crop, program.source_shape[2])).astype(np.float32)
  case = Case(program, images, linear, x, threads)
  runs, left_out = {}, {}
  for name in names:
    modules, engine = _ENGINES[name]
    missing = [part for part in modules if importlib.util.find_spec(part) is None]
    try:
      if missing:
        raise LeftOut(f"{missing[0]} is not installed")
      runs[name] = engine(case)
    except LeftOut as error:
      left_out[name] = str(error)
  return runs, left_out


_PEAK, _PEAK_PRODUCTS = "W1A1 on registers", 10**9


def _peak(program):
  """Times the native kernels' W1A1 instructions on registers, if the program uses them.

  Returns:
    The run by its name, or an empty dict.
  """
  if not native.available():
    return {}
  network = native.load(packed.to_bytes(program))
  kernels = [kernel for _, kernel in network.layers()]
  if not any(k.startswith("W1A1") and k.endswith("popcount") for k in kernels):
    return {}
  steps = _PEAK_PRODUCTS // network.peak(1)
  return {_PEAK: _times(lambda: network.peak(steps))}


_CALL = "call of OpenVINO"


def _call_overhead(threads):
  """Returns a run of a model of one addition in OpenVINO, by its name."""
  compiled = openvino_networks.compile_model(
      openvino_networks.overhead_model(), threads)
  return {_CALL: _times(openvino_networks.prepare(
      compiled, np.zeros((1, 1), np.float32)))}


def _limit(threads):
  """Restricts this process to that many cores. Call it before JAX starts threads."""
  os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])


def _networks(fields, rounds, batches, threads):
  """Measures networks for `bench_inference` in a separate process."""
  _limit(threads)
  config = config_lib.default_config()
  config.update(fields)
  program, linear = random_network(config)
  work = multiplications(program)
  found = []
  for batch in batches:
    runs, left_out = start_engines(program, linear, batch, threads)
    if threads == 1:
      runs.update(_peak(program))
    if "OpenVINO binary" in runs:
      runs.update(_call_overhead(threads))
    seconds = timing.measure(runs, rounds)
    peak, overhead = seconds.pop(_PEAK, None), seconds.pop(_CALL, None)
    found.append(_result(
        seconds, work * batch, threads=threads, batch=batch, left_out=left_out))
    if peak:
      found[-1]["peak_per_second"] = _PEAK_PRODUCTS / np.median(peak)
    if overhead:
      found[-1]["openvino_call_seconds"] = np.median(overhead)
  return found


def _layers(fields, rounds, batches, threads):
  """Measures single convolutions with their thresholds, as differences of networks."""
  del fields
  _limit(threads)
  found = []
  low, high = _DEPTHS
  names = "native", "XLA packed", "OpenVINO binary", "ONNX Runtime int8"
  for batch in batches:
    for size, width in _SHAPES:
      for weights, inputs in _PAIRS:
        runs, left_out = {}, {}
        for depth in _DEPTHS:
          program, linear = stack(depth, size, width, weights, inputs)
          made, without = start_engines(program, linear, batch, threads, names)
          left_out.update(without)
          runs.update({(name, depth): run for name, run in made.items()
                       if name not in left_out})
        whole: Any = timing.measure(runs, rounds)
        seconds = {
            name: [max(b - a, 1e-9) / (high - low)
                   for a, b in zip(whole[name, low], whole[name, high])]
            for name in made if name not in left_out}
        found.append(_result(
            seconds, size * size * 9 * width * width * batch, threads=threads,
            batch=batch, left_out=left_out, layer=f"W{weights}A{inputs} {width} ->"
            f" {width}, 3x3, {size}x{size}"))
  return found


def stack(
    depth: int, size: int, width: int, weights: int, inputs: int
) -> tuple[packed.Program, list[Linear]]:
  """Makes a network of 3x3 convolutions one after another, packed and in float32.

  Args:
    depth: Number of convolutions.
    size: Height and width of their maps.
    width: Number of their channels.
    weights: Bits of the weights.
    inputs: Bits of the activations.
  """
  generator = np.random.default_rng(0)
  shape = (size, size, width)
  codes = {1: [-1, 1], 2: [-1, 0, 1], 3: range(-3, 4)}[weights]
  ops: list[packed.Op] = []

  def threshold(scale):
    t = generator.normal(0, scale, (1, packed.num_thresholds(inputs), width))
    ops.append(packed.Threshold(
        "norm", len(ops), inputs, np.zeros(width, bool),
        np.sort(t.round().astype(np.int32), 1)))

  def conv(out, window, pads):
    ops.append(packed.Conv(
        "conv", len(ops), weights,
        generator.choice(np.int8(codes), (out, *window, width)), pads=pads))

  threshold(30)
  for _ in range(depth):
    conv(width, (3, 3), (1, 1, 1, 1))
    threshold((9 * width) ** 0.5)
  # Every code of the last threshold counts in the logits.
  ops.append(packed.Pool("pool", len(ops), "sum", (size, size), (size, size)))
  ops.append(packed.Logits("logits", len(ops), 1.0, *np.ones((3, width), np.float32)))
  program = packed.Program(
      shape, shape[:2], np.full(width, 128, np.uint8), width, tuple(ops), {})
  linear = [Linear(
      generator.normal(0, (9 * width) ** -0.5, (3, 3, width, width)).astype(np.float32),
      np.zeros(width, np.float32), True, False, True)] * depth
  return program, linear


def _result(seconds, work, **about):
  """Summarizes the times of engines, and their ratios to the packed network's times."""
  engines = {name: {**timing.summary(values), "per_second": work / np.median(values)}
             for name, values in seconds.items()}
  ratios = {
      f"{a} / {b}": timing.summary([x / y for x, y in zip(seconds[a], seconds[b])])
      for b in ("native", "XLA packed") for a in seconds
      if b in seconds and a not in ("native", b)}
  return {**about, "engines": engines, "ratios": ratios}


def _isa():
  """Returns the instruction set of the native kernels, or extensions of the CPU."""
  if native.available():
    return native.isas()[0]
  flags = ""
  if os.path.exists("/proc/cpuinfo"):
    with open("/proc/cpuinfo") as lines:
      flags = next((line for line in lines if line.startswith("flags")), "")
  known = [name for name in ("avx512_vpopcntdq", "avx512_vnni", "avx512bw", "avx2")
           if name in flags.split()]
  return " ".join(known) or "unknown"


def native_memory(config: Any) -> dict[str, int]:
  """Measures the peak memory of a process that loads the network and runs one image."""
  if not native.available() or not os.path.exists("/proc/self/status"):
    return {}
  program, _ = random_network(config)
  code = (
      "import re, sys, numpy as np; from minw.kernels import native\n"
      "status = lambda: open('/proc/self/status').read()\n"
      "peak = lambda: 1024 * int(re.search(r'VmHWM:\\s+(\\d+)', status())[1])\n"
      "before = peak(); network = native.load(open(sys.argv[1], 'rb').read())\n"
      "network.logits(np.zeros((1, *network.shape), np.uint8)); print(before, peak())")
  with tempfile.TemporaryDirectory() as folder:
    path = os.path.join(folder, "net.minw")
    size = packed.write(path, program)
    output = subprocess.run([sys.executable, "-c", code, path], check=True,
                            capture_output=True, text=True).stdout
  before, after = map(int, output.split())
  return {"file": size, "process": after, "network": after - before}


def table(result: dict[str, Any]) -> str:
  """Formats the result of `bench_inference` as text."""
  c, m = result["config"], result["machine"]
  widths = "-".join(map(str, (*c["conv_widths"], *c["dense_widths"])))
  what = "one convolution" if result["layers"] else (
      f"ConvNet {widths}, crop {c['crop_size']}, {titles.bits(c)}")
  lines = [
      f"Inference: {what}; random weights",
      f"on {m['cores']} x {m['cpu']}, {result['isa']}; "
      + ", ".join(f"{name} {version}" for name, version in m["versions"].items()),
      f"Medians and quartiles of {result['rounds']} rounds; ratios of times are"
      " medians of each round's."]
  for run in result["runs"]:
    lines += ["", f"{run.get('layer', 'network')}, batch {run['batch']}, "
              f"{run['threads']} thread{'s' * (run['threads'] > 1)}",
              f"{'':22}{'ms':>10}{'quartiles':>22}{'GMAC/s':>9}{'/ native':>10}"
              f"{'/ XLA':>8}"]
    for name, e in run["engines"].items():
      spread = f"{1e3 * e['low']:.3f} - {1e3 * e['high']:.3f}"
      line = (f"{name:22}{1e3 * e['median']:10.3f}{spread:>22}"
              f"{e['per_second'] / 1e9:9.0f}")
      for base, width in (("native", 10), ("XLA packed", 8)):
        ratio = run["ratios"].get(f"{name} / {base}")
        line += f"{ratio['median']:{width}.2f}" if ratio else " " * width
      lines.append(line.rstrip())
    lines += [f"{name:22} left out: {why}" for name, why in run["left_out"].items()
              if name not in result["left_out"]]
    if "peak_per_second" in run:
      peak = run["peak_per_second"]
      share = run["engines"]["native"]["per_second"] / peak
      lines.append(f"native: {100 * share:.0f} % of the {peak / 1e9:.0f} GMAC/s of its"
                   " W1A1 instructions on registers alone")
    if "openvino_call_seconds" in run:
      lines.append(f"A call of OpenVINO takes {1e6 * run['openvino_call_seconds']:.0f}"
                   " us of its time, whatever the network")
  lines += [f"{name:22} left out: {why}" for name, why in result["left_out"].items()]
  if result["peak_bytes"]:
    sizes = (f"{name} {size / 2**20:.1f} MiB"
             for name, size in result["peak_bytes"].items())
    lines += ["", "Native path, peak memory at batch 1: " + ", ".join(sizes)]
  return "\n".join(lines)
