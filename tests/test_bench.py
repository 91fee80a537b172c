"""minw.bench: what it says of a tiny network; others' networks compute the same."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
from PIL import Image
import pytest

from minw import config as config_lib
from minw import errors
from minw import packed
from minw import train
from minw.bench import data
from minw.bench import inference
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
      f"--json={path}").stdout
  result = json.loads(path.read_text())

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
  state = jax.jit(lambda: train.init_state(experiment))()
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
@pytest.mark.parametrize("layers", [False, True])
def test_inference_command(tmp_path, layers):
  path = tmp_path / "result.json"
  output = completed(
      "inference", *(f"--config.{name}={value}" for name, value in TINY.items()),
      "--batches=1" if layers else "--batches=1,3", "--rounds=2", f"--json={path}",
      *["--layers"] * layers).stdout
  result = json.loads(path.read_text())
  threads = {1} if layers else {1, len(os.sched_getaffinity(0))}
  batches = {1} if layers else {1, 3}
  assert {(run["threads"], run["batch"]) for run in result["runs"]} == {
      (t, b) for t in threads for b in batches}
  for run in result["runs"]:
    engines = run["engines"]
    assert ("native" in engines) == native.available()
    assert not set(engines) & {*result["left_out"], *run["left_out"]}
    assert {*result["left_out"]} <= {*run["left_out"]}
    assert all(why in output for why in run["left_out"].values())
    binary = importlib.util.find_spec("openvino") and layers and "W1A1" in run["layer"]
    assert ("OpenVINO binary" in engines) == bool(binary)
    for name, engine in engines.items():
      assert len(engine["values"]) == 2 and min(engine["values"]) > 0
      assert name in output
    for name, ratio in run["ratios"].items():
      above, below = (np.array(engines[part]["values"]) for part in name.split(" / "))
      np.testing.assert_allclose(ratio["values"], above / below)
  for why in result["left_out"].values():
    assert why in output
  if native.available() and not layers:
    peak = result["peak_bytes"]
    assert 0 < peak["file"] < peak["process"] < 2**28 and 0 <= peak["network"]


def test_random_networks_are_not_degenerate():
  program, linear = inference.random_network(tiny_config())
  convolutions = [op.kernel for op in program.ops if hasattr(op, "kernel")]
  assert [layer.kernel.shape for layer in linear] == [
      (*kernel.shape[1:], len(kernel)) for kernel in convolutions]
  assert [layer.pool for layer in linear] == [False, True, False, False]
  assert [layer.clip for layer in linear] == [True, True, True, False]
  assert inference.multiplications(program) == (
      64 * 9 * 4 + 64 * 9 * 4 * 6 + 16 * 6 * 8 + 8 * 10)
  images = np.random.default_rng(0).integers(0, 256, (9, 8, 8, 1), np.uint8)
  for op, value in zip(program.ops, reference.run(program, images)[1:]):
    if hasattr(op, "thresholds"):
      assert 0.1 < (value > 0).mean() < 0.9 and value.std((0, 1, 2)).any()


def float_example(**changes):
  _, linear = inference.random_network(tiny_config(**changes))
  x = np.random.default_rng(0).uniform(-1, 1, (5, 8, 8, 1)).astype(np.float32)
  weights = [(layer.kernel, layer.bias) for layer in linear]
  want = jax.jit(lambda w, x: inference.float_logits(linear, w, x))(weights, x)
  return linear, x, np.asarray(want)


def test_float_network_in_xla():
  linear, x, got = float_example()
  for layer in linear:
    h, w = layer.kernel.shape[:2]
    if layer.same:
      x = np.pad(x, [(0, 0), (1, 1), (1, 1), (0, 0)])
    windows = np.lib.stride_tricks.sliding_window_view(x, (h, w), (1, 2))
    x = np.einsum("nyxchw,hwco->nyxo", windows, layer.kernel) + layer.bias
    if layer.pool:
      x = np.maximum(np.maximum(x[:, ::2, ::2], x[:, 1::2, ::2]),
                     np.maximum(x[:, ::2, 1::2], x[:, 1::2, 1::2]))
    x = x.clip(-1, 1) if layer.clip else x
  np.testing.assert_allclose(got, x.reshape(got.shape), atol=1e-4)


def test_float_network_in_onnx():
  onnxruntime = pytest.importorskip("onnxruntime", reason="needs minw[bench]")
  linear, x, want = float_example(first_padding="VALID")
  session = onnxruntime.InferenceSession(
      inference.onnx_float(linear, x.shape[1:]), providers=["CPUExecutionProvider"])
  got, = session.run(None, {"x": x.transpose(0, 3, 1, 2)})
  np.testing.assert_allclose(got.reshape(want.shape), want, atol=1e-4)


def test_int8_network_in_onnx():
  onnxruntime = pytest.importorskip("onnxruntime", reason="needs minw[bench]")
  onnx = pytest.importorskip("onnx", reason="needs minw[bench]")
  linear, x, want = float_example()
  data = inference.onnx_int8(linear, x.shape[1:])
  kinds = {node.op_type for node in onnx.load_from_string(data).graph.node}
  assert kinds == {"QLinearConv", "MaxPool"}  # No float kernel is among them.
  session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
  x = np.round(x * 127 + 128).astype(np.uint8).transpose(0, 3, 1, 2)
  got, = session.run(None, {"x": x})
  got = (got.reshape(want.shape).astype(np.float32) - 128) / 127
  np.testing.assert_allclose(got, want.clip(-1, 1), atol=0.06)


def test_float_network_in_torch():
  torch = pytest.importorskip("torch", reason="PyTorch is not installed")
  linear, x, want = float_example()
  with torch.inference_mode():
    got = inference.torch_inference(linear)(torch.tensor(x).permute(0, 3, 1, 2))
  np.testing.assert_allclose(got.reshape(want.shape), want, atol=1e-4)


def test_stacks_are_packed():
  program, linear = inference.stack(2, 4, 32, 3, 2)
  assert len(linear) == 2 and linear[0].kernel.shape == (3, 3, 32, 32)
  values = reference.run(program, np.random.default_rng(0).integers(
      0, 256, (2, 4, 4, 32), np.uint8))
  assert [len(np.unique(values[x])) for x in (1, 3, 5)] == [3, 3, 3]
  # Each code counts in a logit.
  np.testing.assert_array_equal(
      values[-1][:, 0, 0], values[5].sum((1, 2), dtype=np.float32))


# OpenVINO's binary network.


def binary_logits(program, images):
  pytest.importorskip("openvino", reason="needs minw[bench]")
  compiled = openvino_networks.compile_model(
      openvino_networks.binary_model(program, len(images)), threads=1)
  x = packed.crop(program, images).astype(np.float32) - program.offset
  call = openvino_networks.prepare(compiled, x.transpose(0, 3, 1, 2))
  return call().reshape(len(images), -1)


def integer_conv(x, kernel, pad):
  """Sums of a 3x3 convolution over codes (batch, h, w, channels), one by one."""
  n, h, w, _ = x.shape
  x = np.pad(x.astype(int), [(0, 0), (1, 1), (1, 1), (0, 0)], constant_values=pad)
  sums = np.zeros((n, h, w, len(kernel)), int)
  for i in range(3):
    for j in range(3):
      sums += np.einsum("nyxc,oc->nyxo", x[:, i:i + h, j:j + w], kernel[:, i, j])
  return sums


@pytest.mark.parametrize("pad", [0, -1, 1])
@pytest.mark.parametrize("size,width", [(5, 32), (7, 64), (3, 128)])
def test_binary_convolutions_in_openvino(size, width, pad):
  """Codes of two convolutions, of which a third falls, are the same."""
  generator = np.random.default_rng(0)
  program, _ = inference.stack(2, size, width, 1, 1)
  falling = generator.random(width) < 0.3
  program = program._replace(ops=tuple(
      op._replace(pad=pad) if isinstance(op, packed.Conv) else
      op._replace(falling=falling) if isinstance(op, packed.Threshold) else op
      for op in program.ops))
  images = generator.integers(0, 256, (3, size, size, width), np.uint8)
  x = images.astype(int) - 128
  for op in program.ops[:5]:
    if isinstance(op, packed.Conv):
      x = integer_conv(x, op.kernel, pad)
    else:
      threshold = op.thresholds[0, 0]
      x = np.where(np.where(falling, x <= threshold, x >= threshold), 1, -1)
  np.testing.assert_array_equal(binary_logits(program, images), x.sum((1, 2)))


@pytest.mark.parametrize("changes", [
    dict(pad_value=-1.0), dict(conv_widths=(32, 64, 32, 32), first_padding="VALID")])
def test_binary_network_in_openvino(changes):
  program, _ = inference.random_network(tiny_config(**{
      "weight_bits": 1, "conv_widths": (32, 64), "dense_widths": (40,), **changes}))
  assert any(op.falling.any() for op in program.ops if hasattr(op, "falling"))
  images = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 1), np.uint8)
  got, want = binary_logits(program, images), reference.logits(program, images)
  np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)
  inference.check_sums(program, images, got)


def test_engines_that_cannot_run_are_left_out():
  pytest.importorskip("openvino", reason="needs minw[bench]")
  for bits, words in (((1, 1), "its sums are not those"),  # OpenVINO is wrong here.
                      ((2, 1), "weights of 1 bit"), ((1, 2), "activations of 1 bit")):
    program, linear = inference.stack(1, 3, 33, *bits)
    runs, left_out = inference.start_engines(
        program, linear, 2, 1, ["OpenVINO binary", "XLA packed"])
    assert list(runs) == ["XLA packed"]
    assert words in left_out["OpenVINO binary"]


def test_sums_are_checked():
  program, _ = inference.random_network(tiny_config())
  images = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 1), np.uint8)
  logits = reference.logits(program, images)
  inference.check_sums(program, images, logits * (1 + 1e-6))
  last = program.ops[-1]
  for image in (0, 3):
    wrong = logits.copy()
    wrong[image, 1] += last.unit * last.scale[1]
    with pytest.raises(inference.LeftOut, match="its sums are not those"):
      inference.check_sums(program, images, wrong)


def test_refuses_networks_that_are_not_convnets():
  with pytest.raises(errors.UsageError, match="config.weight_bits|does not pack|bits"):
    inference.random_network(tiny_config(weight_bits=4))


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
