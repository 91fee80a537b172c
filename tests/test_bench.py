"""minw.bench: what it says of a tiny network, and PyTorch's network beside ours."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from minw import bench
from minw import config as config_lib
from minw import train
from minw.experiment import Experiment

EXPERIMENT = pathlib.Path(__file__).parents[1] / "experiments" / "digits_convnet.py"
OURS = ["float32", "ste", "aqe", "aqe with data"]
PYTORCH = ["torch eager", "torch compiled"]
HAS_TORCH = importlib.util.find_spec("torch") is not None


def command(*arguments) -> subprocess.Popen:
  return subprocess.Popen(
      [sys.executable, "-m", "minw.bench", *arguments], text=True,
      # PyTorch's compiler takes a minute; without it the step runs as it is.
      env={**os.environ, "TORCHDYNAMO_DISABLE": "1"},
      stdout=subprocess.PIPE, stderr=subprocess.PIPE)


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
  process = command(
      "train", f"--config={EXPERIMENT}", "--config.conv_widths=(4,4)",
      "--config.dense_widths=()", "--config.batch_size=16", "--rounds=3",
      f"--json={path}")
  output, errors = process.communicate()
  assert process.returncode == 0, errors
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
               "1/1 bits", "Peak memory", *result["left_out"].values()):
    assert word in output


def test_refuses_in_one_line():
  wrong = {
      (): "a subcommand is missing; known: train",
      ("trian",): "subcommand 'trian' does not exist; did you mean 'train'?",
      ("train", "--config.batchsize=8"): "config field 'batchsize' does not exist",
  }
  processes = [command(*arguments) for arguments in wrong]
  for process, message in zip(processes, wrong.values()):
    output, errors = process.communicate()
    assert (process.returncode, output) == (2, "")
    assert errors.startswith(f"error: {message}") and errors.count("\n") == 1


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
  shape = ()  # Of one example where the convolutions end.
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
  runs, left_out = bench._torch_runs(
      experiment, np.zeros((16, *experiment.image_shape), np.float32),
      np.zeros(16, np.int32))
  assert list(runs) == ["torch eager"]
  assert left_out == {"torch compiled": "RuntimeError: no compiler more of it"}
  runs["torch eager"](2)
