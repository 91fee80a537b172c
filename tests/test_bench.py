"""minw.bench: what it says of a tiny network; others' networks compute the same."""

import functools
import gzip
from importlib import metadata
import importlib.util
import io
import itertools
import json
import os
import pathlib
import subprocess
import sys
import types

import jax
import numpy as np
from PIL import Image
import pytest

from minw import config as config_lib
from minw import errors
from minw import packed
from minw import train_step
from minw.bench import data
from minw.bench import engines
from minw.bench import float_networks
from minw.bench import inference
from minw.bench import networks
from minw.bench import onnx_networks
from minw.bench import openvino_networks
from minw.bench import throughput
from minw.bench import train as bench
from minw.data import pixels as pixels_lib
from minw.experiment import Experiment
from minw.kernels import native
from minw.kernels import reference

EXPERIMENT = pathlib.Path(__file__).parents[1] / "experiments" / "digits_convnet.py"
OURS = ["float32", "ste", "aqe", "aqe with data"]
PYTORCH = ["torch eager", "torch compiled"]
HAS_TORCH = importlib.util.find_spec("torch") is not None


def completed(*arguments) -> subprocess.CompletedProcess:
  """`minw.bench` in a process of its own, whose times and memory are measured."""
  ended = subprocess.run(
      [sys.executable, "-m", "minw.bench", *arguments], text=True,
      # PyTorch's compiler takes a minute; without it the step runs as it is.
      env={**os.environ, "TORCHDYNAMO_DISABLE": "1"}, capture_output=True)
  assert ended.returncode == 0, ended.stderr
  return ended


def float_experiment(**changes) -> Experiment:
  c = config_lib.default_config()
  c.update(dataset="digits", crop_size=8, conv_widths=(4, 6), dense_widths=(8,),
           batch_size=16, eval_batch_size=16, input_bits="float32",
           weight_bits="float32")
  c.update(changes)
  return Experiment(c)


@pytest.mark.slow
def test_train_command(tmp_path):
  path = tmp_path / "result.json"
  output = completed(
      "train", f"--config={EXPERIMENT}", "--config.conv_widths=(4,4)",
      "--config.dense_widths=()", "--config.batch_size=16", "--rounds=3",
      f"--json={path}", f"--trace={tmp_path / 'trace'}").stdout
  result = json.loads(path.read_text())
  traced, = (tmp_path / "trace").glob("plugins/profile/*/*.trace.json.gz")
  names = [event.get("name") for event in json.loads(
      gzip.decompress(traced.read_bytes()))["traceEvents"]]
  assert [names.count(name) for name in OURS] == [3] * len(OURS)

  steps = result["steps"]
  assert list(steps) == OURS + PYTORCH * HAS_TORCH
  for step in steps.values():
    values = step["values"]
    assert len(values) == result["rounds"] == 3 and min(values) > 0
    assert step["median"] == np.median(values)
    assert min(values) <= step["low"] <= step["median"] <= step["high"] <= max(values)
    np.testing.assert_allclose(step["examples_per_second"], 16 / step["median"])

  ratios = result["ratios"]
  assert ratios["aqe / float32"]["at_most"] == 1.10
  assert ratios["aqe with data / aqe"]["at_most"] == 1.05
  assert ("float32 / torch eager" in ratios) == HAS_TORCH
  for name, ratio in ratios.items():
    above, below = (np.array(steps[part]["values"]) for part in name.split(" / "))
    np.testing.assert_allclose(ratio["values"], above / below)
    assert ratio["median"] == np.median(ratio["values"])

  assert list(result["left_out"]) == PYTORCH * (not HAS_TORCH)
  assert result["config"]["conv_widths"] == [4, 4]
  assert result["config"]["input_bits"] == 1
  assert result["machine"]["versions"]["jax"] == jax.__version__
  assert result["peak_bytes"]["process"] > 2**26
  for word in (*OURS, *PYTORCH, *ratios, "random images", result["machine"]["cpu"],
               "W1A1", "Peak memory", *result["left_out"].values()):
    assert word in output


def test_refuses_in_one_line(command):
  wrong = {
      (): "a subcommand is missing; known: train, inference",
      ("trian",): "subcommand 'trian' does not exist; did you mean 'train'?",
      ("train", "--config.batchsize=8"): "config field 'batchsize' does not exist",
      ("train", f"--trace={__file__}"): f"trace={__file__!r}: must be a folder",
      ("configs", "--configs=none.py"): "config='none.py': must be a name or",
      ("configs", "--config=x.py"): "there is no flag --config; did you mean"
                                    " --configs?",
      ("inference", "--batches=1,x"): "batches='1,x': must be positive integers",
      ("data", "--config.dataset=cifar10", "--config.crop_size=24"):
          "config.dataset='cifar10': must be a data set that is streamed: imagenet2012",
      ("throughput", "--seeds=0"): "seeds='0': must be positive integers",
  }
  for arguments, message in wrong.items():
    code, out, err = command("minw.bench", *arguments)
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {message}") and err.count("\n") == 1


@pytest.mark.slow
def test_data_command(imagenet_data, tmp_path):
  path = tmp_path / "result.json"
  output = completed(
      "data", f"--config.data_dir={imagenet_data}", "--config.crop_size=8",
      "--config.batch_size=4", "--rounds=2", f"--json={path}").stdout
  result = json.loads(path.read_text())
  pytorch = ["torch, normalized floats", "torch, bytes"]
  assert list(result["images_per_second"]) == ["minw"] + pytorch * HAS_TORCH
  assert list(result["left_out"]) == pytorch * (not HAS_TORCH)
  rates = {name: part["values"] for name, part in result["images_per_second"].items()}
  for name, values in rates.items():
    assert len(values) == 2 and min(values) > 0 and name in output
  for name in pytorch * HAS_TORCH:
    np.testing.assert_allclose(result["ratios"][f"minw / {name}"]["values"],
                               np.divide(rates["minw"], rates[name]))
  assert result["images"] == 21


@pytest.mark.slow
def test_configs_command(tmp_path):
  path = tmp_path / "result.json"
  output = completed("configs", f"--configs={EXPERIMENT}", "--batch_size=16",
                     "--rounds=3", f"--json={path}").stdout
  (name, found), = json.loads(path.read_text())["configs"].items()
  weights = 9 * (1 * 32 + 32 * 32 + 32 * 64 + 64 * 64) + 2 * 2 * 64 * 128 + 128 * 10
  assert name == str(EXPERIMENT) and found["weights"] == weights
  assert found["weights_by_bits"] == {"1": weights} and found["input_bits"] == 1
  values = found["step"]["values"]
  assert len(values) == 3 and min(values) > 0 and found["batch_size"] == 16
  row, = (line for line in output.splitlines() if name in line)
  median = found["step"]["median"]
  assert median == np.median(values)
  for text in ("convnet, digits", f"{weights:,}", f"{1e3 * median:.1f}",
               f"{16 / median:.1f}"):
    assert f" {text} |" in row


@pytest.mark.skipif(not HAS_TORCH, reason="PyTorch is not installed")
def test_torch_crops_as_we_do(tmp_path):
  left, right = (250, 120, 10), (20, 130, 240)
  pixels = np.full((40, 60, 3), left, np.uint8)
  pixels[:, 30:] = right
  Image.fromarray(pixels).save(tmp_path / "a.png")
  normalization = pixels_lib.Pixels((10.0, 20.0, 30.0), (50.0, 60.0, 70.0))
  plain, floats = (data.TorchFiles([tmp_path / "a.png"], 16, (0.9, 1.0), part)
                   for part in (None, normalization))
  seen = set()
  for _ in range(20):
    image, _ = plain[0]
    assert tuple(image.shape) == (16, 16, 3)
    ends = tuple(map(tuple, image[8, [0, -1]].tolist()))
    assert ends in ((left, right), (right, left))
    seen.add(ends)
    image, _ = floats[0]
    assert tuple(image.shape) == (3, 16, 16)
    ends = {tuple(np.round(image[:, 8, i].numpy(), 3).tolist()) for i in (0, -1)}
    assert ends == {tuple(np.round((np.array(part) - (10, 20, 30)) / (50, 60, 70), 3)
                          .astype(np.float32).tolist()) for part in (left, right)}
  assert len(seen) == 2


# PyTorch's network is ours: with equal parameters it computes the same.


@pytest.mark.parametrize("changes", [
    {}, dict(conv_widths=(4, 4, 6, 6), dense_widths=(8, 8), first_padding="VALID",
             pad_value=-1.0, norm_epsilon=0.1, norm_momentum=0.5)])
def test_torch_network_is_ours(changes):
  torch = pytest.importorskip("torch", reason="PyTorch is not installed")
  experiment = float_experiment(**changes)
  state = jax.jit(lambda: train_step.init_state(experiment))()
  generator = np.random.default_rng(0)
  images = generator.normal(0, 1, (16, *experiment.image_shape)).astype(np.float32)
  logits, changed = jax.jit(lambda: experiment.model.apply(
      {"params": state.params, "batch_stats": state.batch_stats}, images, mode="train",
      mutable=["batch_stats"]))()

  network = bench.torch_network(experiment)
  size = lambda arrays: sum(int(np.prod(array.shape)) for array in arrays)
  assert size(network.parameters()) == size(jax.tree.leaves(state.params))
  weighted = [part for part in network if isinstance(
      part, (torch.nn.Conv2d, torch.nn.Linear))]
  layers = [layer for layer in experiment.layers if layer.kernel_shape]
  shape = ()  # Shape of one example where the convolutions end.
  for part, layer in zip(weighted, layers, strict=True):
    kernel = np.asarray(state.params[layer.path]["kernel"])
    if layer.kind == "conv":
      kernel = kernel.transpose(3, 2, 0, 1)
      shape = (*(s // 2 for s in layer.output_shape[:2]), layer.output_shape[2])
    else:
      if layer.path == "dense1":  # Channels come first there.
        kernel = kernel.reshape(*shape, -1).transpose(2, 0, 1, 3)
      kernel = kernel.reshape(-1, layer.kernel_shape[-1]).T
    assert part.weight.shape == kernel.shape
    part.weight.data = torch.tensor(kernel)

  got = network(torch.tensor(images).permute(0, 3, 1, 2)).detach().numpy()
  np.testing.assert_allclose(got, logits, atol=1e-3)
  last = changed["batch_stats"][experiment.layers[-1].path]["batch_norm"]
  np.testing.assert_allclose(network[-1].running_mean, last["mean"], atol=1e-4)


def test_torch_step_that_fails_is_left_out(monkeypatch):
  torch = pytest.importorskip("torch", reason="PyTorch is not installed")

  def compile(_):
    raise RuntimeError("no compiler\nmore of it")

  monkeypatch.setattr(torch, "compile", compile)
  experiment = float_experiment(optimizer="sgd")
  runs, left_out = bench.torch_runs(
      experiment, np.zeros((16, *experiment.image_shape), np.float32),
      np.zeros(16, np.int32))
  assert list(runs) == ["torch eager"]
  assert left_out == {"torch compiled": "RuntimeError: no compiler more of it"}
  runs["torch eager"](2)


# Inference.

TINY = dict(dataset="digits", crop_size=8, conv_widths=(4, 6), dense_widths=(8,),
            input_bits=1, weight_bits=2)


def tiny_config(**changes):
  c = config_lib.default_config()
  c.update(TINY)
  c.update(changes)
  return c


@pytest.mark.slow
def test_inference_command(tmp_path):
  path = tmp_path / "result.json"
  output = completed(
      "inference", *(f"--config.{name}={value}" for name, value in TINY.items()),
      "--batches=1,3", "--rounds=2", f"--json={path}").stdout
  result = json.loads(path.read_text())
  assert {(run["threads"], run["batch"]) for run in result["runs"]} == {
      (t, b) for t in {1, len(os.sched_getaffinity(0))} for b in (1, 3)}
  for run in result["runs"]:
    check_run(run, result, output)
    assert {*run["engines"], *run["left_out"]} == {*engines.OF_NETWORKS}
    assert "OpenVINO binary" in run["left_out"]  # The weights have 2 bits.
  flags = pathlib.Path("/proc/cpuinfo").read_text().split()
  assert {*result["core"]["extensions"]} == {*flags} & {
      "avx2", "avx_vnni", "avx512bw", "avx512_vnni", "avx512_vpopcntdq", "amx_int8",
      "asimddp", "i8mm"}
  for name in ("onnxruntime", "openvino"):
    if importlib.util.find_spec(name):
      assert result["machine"]["versions"][name] == metadata.version(name)
  if native.available():
    peak = result["peak_bytes"]
    assert 0 < peak["file"] < peak["process"] < 2**28 and 0 <= peak["network"]


def check_run(run, result, output):
  timed = run["engines"]
  assert ("native" in timed) == native.available() and "XLA packed" in timed
  assert not {*timed} & {*run["left_out"]}
  assert {*result["left_out"]} <= {*run["left_out"]}
  for name, engine in timed.items():
    assert len(engine["values"]) == 2 and min(engine["values"]) > 0
    assert name in output
  for name, ratio in run["ratios"].items():
    above, below = (np.array(timed[part]["values"]) for part in name.split(" / "))
    np.testing.assert_allclose(ratio["values"], above / below)
  for name, why in run["left_out"].items():
    assert f"{name:22} left out: {why}" in output


@pytest.mark.slow
def test_layers_are_timed():
  blocks = networks.Block(3, 32), networks.Block(1, 64, 1)
  result = inference.bench_inference(tiny_config(), 2, [1], blocks)
  output = inference.table(result)
  runs = {run["layer"]: run for run in result["runs"]}
  assert len(runs) == 12
  for name, run in runs.items():
    check_run(run, result, output)
    assert run["threads"] == run["batch"] == 1 and f"\n{name}, batch 1" in output
    if importlib.util.find_spec("openvino"):
      assert ("OpenVINO binary" in run["engines"]) == name.startswith("W1A1")
    if importlib.util.find_spec("onnxruntime") and importlib.util.find_spec("onnx"):
      assert ("ONNX Runtime W2A8" in run["engines"]) == (
          name.endswith("dense") and not name.startswith("W3"))
  work = {name: run["engines"]["XLA packed"]["per_second"]
          * run["engines"]["XLA packed"]["median"] for name, run in runs.items()}
  np.testing.assert_allclose(work["W2A1 32 -> 32, 3x3, 3x3"], 9 * 9 * 32 * 32)
  np.testing.assert_allclose(work["W2A1 64 -> 64, dense"], 64 * 64)


RESNET = dict(network="resnet18", dataset="cifar10", crop_size=32)


def test_random_networks_are_not_degenerate():
  program = networks.random_network(tiny_config())
  layers = networks.float_layers(program)
  convolutions = [op.kernel for op in program.ops if isinstance(op, packed.Conv)]
  assert [layer.kernel.shape for layer in layers] == [
      (*kernel.shape[1:], len(kernel)) for kernel in convolutions]
  assert [layer.pool is not None for layer in layers] == [False, True, False, False]
  assert [layer.clip for layer in layers] == [True, True, True, False]
  assert networks.multiplications(program) == (
      64 * 9 * 4 + 64 * 9 * 4 * 6 + 16 * 6 * 8 + 8 * 10)
  assert_alive(program, (8, 8, 1))


def assert_alive(program, shape):
  """Every threshold makes both signs, and no map is constant."""
  images = np.random.default_rng(0).integers(0, 256, (9, *shape), np.uint8)
  for op, value in zip(program.ops, reference.run(program, images)[1:]):
    if isinstance(op, (packed.Threshold, packed.FloatNorm)) and op.bits is not None:
      assert 0.1 < (value > 0).mean() < 0.9 and value.std((0, 1, 2)).any()


@pytest.mark.parametrize("rules", [
    (), pytest.param((("stem", "float32"), ("dense1", "float32")),
                     marks=pytest.mark.slow)])
def test_residual_networks_have_float_layers(rules):
  program = networks.random_network(
      tiny_config(**RESNET, input_bits=2, weight_bits=1, bits_rules=rules))
  assert_alive(program, (32, 32, 3))
  layers = networks.float_layers(program)
  # The stem, 4 stages of 2 blocks of 2, 3 projections, the dense layer.
  assert len(layers) == 1 + 16 + 3 + 1
  assert sum(layer.kernel.size for layer in layers) == (
      7 * 7 * 3 * 64 + 4 * 9 * 64 * 64
      + sum(9 * c * c // 2 + 3 * 9 * c * c + c * c // 2 for c in (128, 256, 512))
      + 512 * 10)
  assert [i for i, layer in enumerate(layers) if layer.mean] == [20]
  assert [(i, layer.pool.window) for i, layer in enumerate(layers) if layer.pool] == [
      (0, (3, 3))]
  # Values: the image, the stem, two blocks of a stage, then a projection comes first.
  assert [(i, layer.input, layer.shortcut) for i, layer in enumerate(layers, 1)
          if layer.shortcut is not None] == [
      (3, 2, 1), (5, 4, 3), (8, 7, 6), (10, 9, 8), (13, 12, 11), (15, 14, 13),
      (18, 17, 16), (20, 19, 18)]
  assert [layers[i].input for i in (5, 6)] == [5, 5]
  assert [layer.clip for layer in layers] == [True] * 20 + [False]


@functools.cache  # Packing a ResNet takes seconds.
def random_network(**changes):
  return networks.random_network(tiny_config(**changes))


@functools.cache
def float_example(**changes):
  program = random_network(**changes)
  layers = networks.float_layers(program)
  shape = (*program.crop, program.source_shape[2])
  x = np.random.default_rng(0).uniform(-1, 1, (5, *shape)).astype(np.float32)
  return layers, x, float_logits(layers, x)


def float_logits(layers, x):
  """The float network in NumPy."""
  values = [x]
  for layer in layers:
    y = values[layer.input]
    y = y.mean((1, 2), keepdims=True) if layer.mean else y
    y = np.einsum("nyxchw,hwco->nyxo",
                  windows(y, layer.kernel.shape[:2], layer.strides, layer.pads, 0),
                  layer.kernel, optimize=True) + layer.bias
    if layer.pool:
      y = windows(y, layer.pool.window, layer.pool.strides, layer.pool.pads,
                  -np.inf).max((-2, -1))
    if layer.shortcut is not None:
      y = y + values[layer.shortcut]
    values.append(y.clip(-1, 1) if layer.clip else y)
  return values[-1].reshape(len(x), -1)


def windows(x, window, strides, pads, fill):
  x = np.pad(x, [(0, 0), pads[:2], pads[2:], (0, 0)], constant_values=fill)
  return np.lib.stride_tricks.sliding_window_view(x, window, (1, 2))[
      :, ::strides[0], ::strides[1]]


FLOAT_NETWORKS = pytest.mark.parametrize(
    "changes", [{}, dict(first_padding="VALID"), pytest.param(
        {**RESNET, "weight_bits": 1}, marks=pytest.mark.slow)],
    ids=["convnet", "valid", "resnet"])


@FLOAT_NETWORKS
@pytest.mark.parametrize("matrices", [False, True])
def test_float_network_in_xla(changes, matrices):
  layers, x, want = float_example(**changes)
  weights = [(layer.kernel, layer.bias) for layer in layers]
  function = jax.jit(
      lambda w, x: float_networks.logits(layers, w, x, matrices=matrices))
  np.testing.assert_allclose(function(weights, x), want, atol=1e-4)
  text = function.lower(weights, x).as_text()
  dense = 1 if "network" in changes else 2  # A ResNet has one dense layer.
  assert text.count("stablehlo.dot_general") == dense * matrices


@FLOAT_NETWORKS
def test_float_network_in_onnx(changes):
  onnxruntime = pytest.importorskip("onnxruntime", reason="needs minw[bench]")
  layers, x, want = float_example(**changes)
  session = onnxruntime.InferenceSession(
      onnx_networks.float_network(layers, x.shape[1:]),
      providers=["CPUExecutionProvider"])
  got, = session.run(None, {"x": x.transpose(0, 3, 1, 2)})
  np.testing.assert_allclose(got.reshape(want.shape), want, atol=1e-4)


def steps(x):
  """Images as the int8 networks take them."""
  return np.round(x * 127 + 128).astype(np.uint8).transpose(0, 3, 1, 2)


@FLOAT_NETWORKS
def test_int8_network_in_onnx(changes):
  onnxruntime = pytest.importorskip("onnxruntime", reason="needs minw[bench]")
  onnx = pytest.importorskip("onnx", reason="needs minw[bench]")
  layers, x, want = float_example(**changes)
  data = onnx_networks.int8_network(layers, x.shape[1:])
  kinds = {node.op_type for node in onnx.load_from_string(data).graph.node}
  # No float kernel is among them.
  assert kinds - {"QLinearAdd", "QLinearGlobalAveragePool"} == {
      "QLinearConv", "MaxPool"}
  session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
  got, = session.run(None, {"x": steps(x)})
  got = (got.reshape(want.shape).astype(np.float32) - 128) / 127
  np.testing.assert_allclose(got, want.clip(-1, 1), atol=0.06)


@FLOAT_NETWORKS
def test_int8_network_in_openvino(changes):
  pytest.importorskip("openvino", reason="needs minw[bench]")
  layers, x, want = float_example(**changes)
  compiled = openvino_networks.compile_model(
      openvino_networks.int8_model(layers, x.shape[1:], len(x)), threads=1)
  assert openvino_networks.convolution_types(compiled) <= {"i8", "u8"}
  got = openvino_networks.prepare(compiled, steps(x))().reshape(want.shape)
  np.testing.assert_allclose(got, want, atol=0.06)
  assert np.abs(got - want).max() > 1e-4  # It does round.


def test_openvino_in_floats_is_noticed():
  openvino = pytest.importorskip("openvino", reason="needs minw[bench]")
  opset = openvino.opset13
  x = opset.parameter([1, 8, 5, 5], np.float32)
  kernel = np.ones((8, 8, 3, 3), np.float32)
  y = opset.convolution(x, kernel, [1, 1], [0, 0], [0, 0], [1, 1])
  compiled = openvino_networks.compile_model(openvino.Model([y], [x]), threads=1)
  assert openvino_networks.convolution_types(compiled) == {"f32"}


@FLOAT_NETWORKS
def test_float_network_in_torch(changes):
  torch = pytest.importorskip("torch", reason="PyTorch is not installed")
  layers, x, want = float_example(**changes)
  with torch.inference_mode():
    got = float_networks.torch_network(layers)(torch.tensor(x).permute(0, 3, 1, 2))
  np.testing.assert_allclose(got.reshape(want.shape), want, atol=1e-4)


def test_stacks_are_packed():
  program = networks.stack(2, networks.Block(4, 32), 3, 2)
  layers = networks.float_layers(program)
  assert [layer.kernel.shape for layer in layers] == [(3, 3, 32, 32)] * 2
  assert all(layer.clip for layer in layers)
  values = reference.run(program, np.random.default_rng(0).integers(
      0, 256, (2, 4, 4, 32), np.uint8))
  assert [len(np.unique(values[x])) for x in (1, 3, 5)] == [3, 3, 3]
  # Each code counts in a logit.
  np.testing.assert_array_equal(
      values[-1][:, 0, 0], values[5].sum((1, 2), dtype=np.float32))
  dense = networks.float_layers(networks.stack(3, networks.Block(1, 16, 1), 2, 2))
  assert [layer.kernel.shape for layer in dense] == [(1, 1, 16, 16)] * 3


# OpenVINO's binary network.


def binary_logits(program, images):
  pytest.importorskip("openvino", reason="needs minw[bench]")
  compiled = openvino_networks.compile_model(
      openvino_networks.binary_model(program, len(images)), threads=1)
  x = packed.crop(program, images).astype(np.float32) - program.offset
  call = openvino_networks.prepare(compiled, x.transpose(0, 3, 1, 2))
  return call().reshape(len(images), -1)


@pytest.mark.parametrize("pad", [0, -1, 1])
@pytest.mark.parametrize("block", [(5, 32), (7, 64), (3, 128), (1, 64, 1)])
def test_binary_convolutions_in_openvino(block, pad):
  """Codes of two convolutions, a third of whose channels fall, are the same."""
  block = networks.Block(*block)
  generator = np.random.default_rng(0)
  program = networks.stack(2, block, 1, 1)
  falling = generator.random(block.width) < 0.3
  program = program._replace(ops=tuple(
      op._replace(pad=pad) if isinstance(op, packed.Conv) else
      op._replace(falling=falling) if isinstance(op, packed.Threshold) else op
      for op in program.ops))
  images = generator.integers(
      0, 256, (3, block.size, block.size, block.width), np.uint8)
  x = images.astype(int) - 128
  for op in program.ops[:5]:
    if isinstance(op, packed.Conv):
      x = np.einsum("nyxchw,ohwc->nyxo",
                    windows(x, (block.window,) * 2, (1, 1), op.pads, pad),
                    op.kernel.astype(int), optimize=True)
    else:
      threshold = op.thresholds[0, 0]
      x = np.where(np.where(falling, x <= threshold, x >= threshold), 1, -1)
  np.testing.assert_array_equal(binary_logits(program, images), x.sum((1, 2)))


@pytest.mark.parametrize("changes", [
    dict(pad_value=-1.0, conv_widths=(32, 64), dense_widths=(40,)),
    dict(first_padding="VALID", conv_widths=(32, 64, 32, 32), dense_widths=()),
    pytest.param(RESNET, marks=pytest.mark.slow)])
def test_binary_network_in_openvino(changes):
  program = random_network(weight_bits=1, **changes)
  assert any(op.falling.any() for op in program.ops if hasattr(op, "falling"))
  images = np.random.default_rng(0).integers(
      0, 256, (5, *program.source_shape), np.uint8)
  got, want = binary_logits(program, images), reference.logits(program, images)
  np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-5)
  engines.check_sums(program, images, got)


@pytest.mark.parametrize("width,weights,inputs,words", [
    (33, 1, 1, "its sums are not those"),  # OpenVINO is wrong for 33 channels.
    (32, 2, 1, "weights of 1 bit"), (32, 1, 2, "activations of 1 bit")])
def test_engines_that_cannot_run_are_left_out(width, weights, inputs, words):
  pytest.importorskip("openvino", reason="needs minw[bench]")
  program = networks.stack(1, networks.Block(3, width), weights, inputs)
  runs, left_out = engines.start(
      program, networks.float_layers(program), 2, 1, ["OpenVINO binary", "XLA packed"])
  assert list(runs) == ["XLA packed"]
  assert words in left_out["OpenVINO binary"]


def test_engines_that_are_not_installed_are_left_out(monkeypatch):
  program = networks.stack(1, networks.Block(3, 8), 1, 1)
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  names = ["OpenVINO binary", "ONNX Runtime int8", "PyTorch float32"]
  assert engines.start(program, [], 1, 1, names) == ({}, {
      "OpenVINO binary": "openvino is not installed",
      "ONNX Runtime int8": "onnxruntime is not installed",
      "PyTorch float32": "torch is not installed"})


def test_openvino_does_not_report():
  pytest.importorskip("openvino", reason="needs minw[bench]")
  code = ("import os; os.register_at_fork(before=lambda: print('fork'))\n"
          "from minw.bench import openvino_networks\n"
          "import openvino, sys, time; time.sleep(1)\n"
          "print([name for name in sys.modules if 'telemetry' in name"
          " and sys.modules[name] and 'stub' not in name and 'ovc' not in name])")
  output = subprocess.run(
      [sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
  assert output == "[]\n"


@pytest.mark.slow
def test_openvino_is_held_to_forced_kernels():
  """In a process of its own, because OpenVINO reads the variables only once."""
  pytest.importorskip("openvino", reason="needs minw[bench]")
  if "avx512" not in native.isas():
    pytest.skip("needs AVX-512")
  code = (
      "from minw.bench import networks, openvino_networks as o\n"
      "program = networks.stack(2, networks.Block(5, 32), 1, 1)\n"
      "layers = networks.float_layers(program)\n"
      "for model in o.binary_model(program, 1), o.int8_model(layers, (5, 5, 32), 1):\n"
      "  for node in o.compile_model(model, 1).get_runtime_model().get_ops():\n"
      "    info = node.get_rt_info()\n"
      "    if 'Convolution' in info['layerType'].value:\n"
      "      print(info['primitiveType'].value)\n")
  for forced in (False, True):
    output = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True,
        env={**os.environ, **(openvino_networks.AVX2 if forced else {})}).stdout
    kernels = output.split()
    assert len(kernels) == 4 and any("u1" in kernel for kernel in kernels)
    assert all(("avx512" in kernel) != forced for kernel in kernels), kernels


def test_sums_are_checked():
  program = networks.random_network(tiny_config())
  images = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 1), np.uint8)
  logits = reference.logits(program, images)
  engines.check_sums(program, images, logits * (1 + 1e-6))
  last = program.ops[-1]
  for image in (0, 3):
    wrong = logits.copy()
    wrong[image, 1] += last.unit * last.scale[1]
    with pytest.raises(engines.LeftOut, match="its sums are not those"):
      engines.check_sums(program, images, wrong)


# ONNX Runtime's weights of 2 bits.


def test_two_bit_network_in_onnx():
  onnxruntime = pytest.importorskip("onnxruntime", reason="needs minw[bench]")
  pytest.importorskip("onnx", reason="needs minw[bench]")
  generator = np.random.default_rng(0)
  first, second = (generator.integers(-1, 2, shape, np.int8)
                   for shape in ((96, 160), (7, 96)))
  x = generator.integers(-1, 2, (3, 160)).astype(np.float32)
  session = onnxruntime.InferenceSession(
      onnx_networks.two_bit_network([first, second]),
      providers=["CPUExecutionProvider"])
  hidden = (x.astype(int) @ first.T).clip(-1, 1)
  np.testing.assert_array_equal(
      session.run(None, {"x": x})[0], (hidden @ second.T).clip(-1, 1))


@pytest.mark.parametrize("width,weights,words", [
    (64, 3, "its weights have 2 bits"), (33, 2, "blocks of 32")])
def test_two_bit_networks_that_cannot_run_are_left_out(width, weights, words):
  pytest.importorskip("onnxruntime", reason="needs minw[bench]")
  pytest.importorskip("onnx", reason="needs minw[bench]")
  program = networks.stack(1, networks.Block(1, width, 1), weights, 1)
  runs, left_out = engines.start(
      program, networks.float_layers(program), 2, 1, ["ONNX Runtime W2A8"])
  assert not runs and words in left_out["ONNX Runtime W2A8"]


def test_refuses_networks_that_do_not_pack():
  with pytest.raises(errors.UsageError, match="config.weight_bits|does not pack|bits"):
    networks.random_network(tiny_config(weight_bits=4))


@pytest.mark.slow
@pytest.mark.parametrize("network", ["resnet20", "densenet100"])
def test_refuses_networks_without_a_float_counterpart(network):
  c = tiny_config(network=network, dataset="cifar10", crop_size=32)
  with pytest.raises(errors.UsageError, match=f"config.network='{network}': must be"):
    inference.checked_network(c)


@pytest.mark.parametrize("op", [
    packed.Conv("conv", 0, 1, np.ones((4, 1, 1, 2), np.int8), groups=2),
    packed.Shortcut("shortcut", 1, (2, 2), 0, 0), packed.Add("add", 1, 1)])
def test_operations_without_a_float_counterpart(op):
  program = networks.stack(1, networks.Block(3, 4), 1, 1)
  with pytest.raises(ValueError, match=f"{op.name} has no counterpart in float32"):
    networks.float_layers(program._replace(ops=(*program.ops[:1], op)))


def test_throughput_takes_turns(monkeypatch):
  """Steps a second are those of all processes; medians, and ratios within a round."""
  calls = []

  def measure(processes, seeds, arguments):
    calls.append((processes, seeds, arguments))
    return {(1, 1): 10.0, (4, 1): 30.0, (1, 4): 24.0 if len(calls) < 5 else 10.0}[
        processes, seeds]

  monkeypatch.setattr(throughput, "measure", measure)
  config = config_lib.default_config(dataset="digits")
  result = throughput.bench_throughput(config, [1, 4], 2, ["a"])
  assert calls == 2 * [(1, 1, ["a"]), (1, 1, ["a"]), (4, 1, ["a"]), (1, 4, ["a"])]
  assert result["steps_per_second"] == {"processes": {1: [10.0, 10.0], 4: [30.0, 30.0]},
                   "program": {1: [10.0, 10.0], 4: [24.0, 10.0]}}
  lines = [line.split() for line in throughput.table(result).splitlines()]
  assert lines[2:] == [["1", "10.00", "10.00", "1.00"],
                       ["4", "30.00", "17.00", "2.12"]]  # The median of 1.25 and 3.


@pytest.mark.parametrize("seeds", [1, 2])
def test_throughput_counts_the_steps_of_all_seeds(seeds, monkeypatch, capsys):
  """A process trains ten steps of each seed at a time, for three seconds here."""
  steps, seconds = [], itertools.count()
  update = train_step.update

  def counted(experiment, state, *batch):
    jax.debug.callback(lambda step: steps.append(int(step)), state.step)
    return update(experiment, state, *batch)

  monkeypatch.setattr(train_step, "update", counted)
  monkeypatch.setattr(throughput, "time", types.SimpleNamespace(
      perf_counter=lambda: float(next(seconds))))  # Each look takes a second.
  monkeypatch.setattr(sys, "stdin", io.StringIO("go\n"))
  throughput.work(tiny_config(conv_widths=(2, 2), dense_widths=(), batch_size=8),
                  seeds, 3.0)
  jax.effects_barrier()
  # Ten steps compile the program. Looks at the seconds 0, 1, 2, 3 time two times ten
  # steps, and the last one ends them at second 4.
  assert sorted(steps) == sorted([*range(30)] * seeds)
  assert capsys.readouterr().out == f"ready\n{20 * seeds / 4}\n"
  assert sys.stdin.read() == ""


def test_throughput_is_the_sum_of_processes_that_begin_together(monkeypatch, tmp_path):
  code = ("import pathlib, sys; path = pathlib.Path(sys.argv[1]); print('ready', "
          "flush=True); go = sys.stdin.readline(); path.write_text(go); print(2.5)")
  started = []

  def start(command, place, **pipes):
    started.append((command, place))
    argument = str(tmp_path / str(len(started)))
    return subprocess.Popen([sys.executable, "-S", "-c", code, argument], **pipes)

  monkeypatch.setattr(throughput.places, "split", lambda count: ["a", "b", "c"][:count])
  monkeypatch.setattr(throughput.places, "start", start)
  assert throughput.measure(3, 2, ["--seconds=1"]) == 7.5
  assert started == [([sys.executable, "-m", "minw.bench", "throughput", "--work=2",
                       "--seconds=1"], place) for place in "abc"]
  assert [path.read_text() for path in tmp_path.iterdir()] == ["go\n"] * 3
  code = "pass"
  with pytest.raises(errors.UsageError, match=(
      "a process with seeds=2, one of 3, ended before it trained: see above")):
    throughput.measure(3, 2, [])


@pytest.mark.slow
def test_throughput_measures(tmp_path):
  path = tmp_path / "result.json"
  arguments = ("throughput", "--seeds=1,2", "--rounds=1", "--seconds=0.1",
               f"--json={path}", f"--config={EXPERIMENT}",
               "--config.conv_widths=(2,2)", "--config.dense_widths=(3,)")
  assert completed(*arguments).stderr == ""
  result = json.loads(path.read_text())
  assert result["config"]["conv_widths"] == [2, 2]
  for way in ("processes", "program"):
    assert {*result["steps_per_second"][way]} == {"1", "2"}
    assert all(rate > 0 for rates in result["steps_per_second"][way].values()
               for rate in rates)
