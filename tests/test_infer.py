"""Inference from files: what it needs, what it says, what it refuses."""

import concurrent.futures
import json
import subprocess
import sys
import types

import numpy as np
from PIL import Image
import pytest

from minw import cli
from minw import datasets
from minw import evaluate
from minw import infer
from minw import packed
from minw.kernels import native

BACKENDS = [
    pytest.param(name, marks=pytest.mark.skipif(
        name == "native" and not native.available(),
        reason="the native library was not built"))
    for name in infer.BACKENDS]


def digits_network(metadata=None) -> packed.Program:
  """A linear classifier of the digits, of ternary weights: templates' signs."""
  images, labels = datasets.load("digits", "train", None)
  means = np.stack([images[labels == k].mean(0) for k in range(10)])
  kernel = np.sign(np.round((means - means.mean(0)) / 40)).astype(np.int8)
  ops = (packed.Conv("fc", 0, 2, kernel),
         packed.Logits("norm", 1, 2.0**-6, np.zeros(10, np.float32),
                       np.full(10, 0.25, np.float32), np.zeros(10, np.float32)))
  return packed.Program((8, 8, 1), (8, 8), np.array([78], np.uint8), 10, ops,
                        metadata or {})


def digits_logits(images):
  """The same in float64."""
  kernel = digits_network().ops[0].kernel.reshape(10, -1).astype(np.float64)
  return (images.reshape(len(images), -1) - 78.0) @ kernel.T / 64 * 0.25


@pytest.fixture(name="model")
def model_file(tmp_path):
  path = tmp_path / "net.minw"
  labels = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight",
            "nine"]
  metadata = {"labels": labels, "config": {"dataset": "digits"}}
  packed.write(path, digits_network(metadata))
  return path


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("count", [1, 2, 7, 360])
def test_logits(model, backend, count):
  images = datasets.load("digits", "test", None)[0][:count]
  logits = infer.load(model, backend=backend).logits(images)
  assert logits.dtype == np.float32
  np.testing.assert_array_equal(logits, digits_logits(images))  # Exact in both.


@pytest.mark.parametrize("backend", BACKENDS)
def test_many_threads_at_once(model, backend):
  network = infer.load(model, backend=backend, threads=2)
  images = datasets.load("digits", "test", None)[0]
  with concurrent.futures.ThreadPoolExecutor(4) as pool:
    parts = list(pool.map(network.logits, np.array_split(images, 12)))
  np.testing.assert_array_equal(np.concatenate(parts), digits_logits(images))


@pytest.mark.parametrize("backend", BACKENDS)
def test_kernels_are_listed(model, backend):
  network = infer.load(model, backend=backend)
  assert [name for name, _ in network.kernels()] == ["fc", "norm"]
  assert all(kernel for _, kernel in network.kernels())


def test_needs_nothing_of_training(model):
  code = f"""
import sys
import numpy as np
from minw import infer
infer.load({str(model)!r}, backend="reference").logits(np.zeros((1, 8, 8, 1), np.uint8))
found = set(sys.modules) & {{"flax", "optax", "jax", "tensorflow_datasets", "orbax"}}
assert not found, found
"""
  subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("images, message", [
    (np.zeros((1, 8, 8, 1), np.float32), "images of float32: must be uint8"),
    (np.zeros((8, 8, 1), np.uint8), r"shape \(8, 8, 1\): must be \(batch, 8, 8, 1\)"),
    (np.zeros((1, 8, 9, 1), np.uint8), "must be"),
    (np.zeros((1, 8, 8, 3), np.uint8), "must be"),
    (np.zeros((0, 8, 8, 1), np.uint8), "a batch of at least one"),
])
def test_wrong_images(model, images, message):
  network = infer.load(model, backend="reference")
  for function in (network.logits, network.values):
    with pytest.raises(ValueError, match=message):
      function(images)


def test_wrong_backend(model):
  with pytest.raises(cli.UsageError, match="backend='gpu': must be one of native"):
    infer.load(model, backend="gpu")


def test_without_the_library(model, monkeypatch, caplog):
  """Networks run all the same, and that is said once."""
  monkeypatch.setattr(native, "available", lambda: False)
  infer._default_backend.cache_clear()
  try:
    backends = [infer.load(model).backend for _ in range(2)]
  finally:
    infer._default_backend.cache_clear()
  assert backends == ["xla", "xla"]
  assert [record.getMessage().split(" (")[0] for record in caplog.records
          if record.name == "minw.infer"] == ["the native library was not built"]


def test_probabilities():
  rows = infer.probabilities(np.float32([[0, np.log(3)], [1000, 0], [-1000, -1000]]))
  np.testing.assert_allclose(rows, [[0.25, 0.75], [1, 0], [0.5, 0.5]], rtol=1e-6)


def test_image_of_another_size(tmp_path):
  """The shorter side is scaled, the centre taken."""
  image = np.zeros((16, 40, 3), np.uint8)
  image[:, 12:28] = (200, 100, 50)  # The square in the middle.
  Image.fromarray(image).save(tmp_path / "a.png")
  read = infer.read_image(tmp_path / "a.png", (8, 8, 3))
  assert read.shape == (8, 8, 3) and read.dtype == np.uint8
  np.testing.assert_array_equal(read[:, 1:-1], np.broadcast_to(
      np.uint8([200, 100, 50]), (8, 6, 3)))
  assert infer.read_image(tmp_path / "a.png", (16, 40, 3)).tolist() == image.tolist()
  gray = infer.read_image(tmp_path / "a.png", (16, 16, 1))
  assert gray.shape == (16, 16, 1) and abs(int(gray[8, 8, 0]) - 124) <= 1


def run(module, *arguments):
  return subprocess.run(
      [sys.executable, "-W", "error", "-m", module, *arguments],
      capture_output=True, text=True, check=False)


def test_images_may_be_taken_as_they_are(tmp_path):
  pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
  Image.fromarray(pixels).save(tmp_path / "a.png")
  read = infer.read_image(tmp_path / "a.png", (8, 8, 3), shrink=False)
  np.testing.assert_array_equal(read, pixels[6:14, 11:19])
  program = types.SimpleNamespace(metadata={})
  assert infer.shrinks(program)
  for size in (0, 256):
    program.metadata["config"] = {"eval_resize": size}
    assert infer.shrinks(program) == (size > 0)


def test_command(model, tmp_path):
  images, _ = datasets.load("digits", "test", None)
  folder = tmp_path / "images" / "more"
  folder.mkdir(parents=True)
  wanted = []
  for i, image in enumerate(images[:4]):
    file = folder / f"{i}.png"
    Image.fromarray(image[..., 0]).save(file)
    logits = digits_logits(images[i:i + 1])[0]
    powers = np.exp(logits - logits.max())
    label = infer.load(model).labels[logits.argmax()]
    wanted.append(f"{file}\t{label}\t{powers.max() / powers.sum():.4f}")
  Image.fromarray(images[5][..., 0]).convert("RGB").save(tmp_path / "b.JPG", quality=95)
  done = run("minw.infer", f"--model={model}", "--backend=reference",
             f"--images={tmp_path / 'images'},{tmp_path / 'b.JPG'}", "--kernels")
  assert done.returncode == 0, done.stderr
  lines = done.stdout.splitlines()
  assert lines[:4] == wanted
  assert lines[4].startswith(f"{tmp_path / 'b.JPG'}\t")
  assert lines[5:] == ["fc\treference", "norm\treference"]


@pytest.mark.parametrize("arguments, message", [
    ("--model=none.minw --images=.", "error: model='none.minw': "),
    ("--model={tmp}/bad.minw --images=.", "not a packed network"),
    ("--model={model} --images={tmp}/none.png", "none.png': must be a file or folder"),
    ("--model={model} --images={tmp}/empty", "must be a folder with .png or .jpg"),
    ("--model={model} --images={tmp}/bad.minw", "cannot identify image file"),
    ("--model={model} --images={tmp}/cut.png", "cut.png'"),
    ("--model={model} --images=. --threads=0", "threads"),
])
def test_command_refuses_in_one_line(model, tmp_path, arguments, message):
  (tmp_path / "empty").mkdir()
  (tmp_path / "bad.minw").write_bytes(b"no network, and no image")
  Image.fromarray(np.zeros((64, 64), np.uint8)).save(tmp_path / "whole.png")
  data = (tmp_path / "whole.png").read_bytes()
  (tmp_path / "cut.png").write_bytes(data[:len(data) // 2])
  done = run("minw.infer", *arguments.format(model=model, tmp=tmp_path).split())
  assert done.returncode == 2
  assert message in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_evaluate_command(model):
  done = run("minw.evaluate", f"--model={model}", "--split=validation")
  assert done.returncode == 0, done.stderr
  result = json.loads(done.stdout)
  images, labels = datasets.load("digits", "validation", None)
  logits = digits_logits(images)
  shifted = logits - logits.max(-1, keepdims=True)
  log_probabilities = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
  assert result["accuracy"] == (logits.argmax(-1) == labels).mean()
  assert result["loss"] == pytest.approx(
      -log_probabilities[np.arange(len(labels)), labels].mean(), rel=1e-12)


@pytest.mark.parametrize("changes, message", [
    (dict(dataset="cifar10"), "dataset='cifar10': must be one of images of shape"),
    (dict(dataset="cifar"), "'cifar'"),
    (dict(split="half"), "half"),
])
def test_evaluate_refuses(model, changes, message):
  with pytest.raises(cli.UsageError, match=message):
    evaluate.evaluate_model(model, **changes)


@pytest.mark.parametrize("arguments, message", [
    ((), "one of --workdir and --model"),
    (("--model={model}", "--workdir=x"), "one of --workdir and --model"),
    (("--workdir=x", "--dataset=digits"), "dataset='digits': must be left out"),
    (("--model={model}", "--checkpoint=best"), "checkpoint='best': must be left out"),
])
def test_evaluate_takes_a_run_or_a_file(model, arguments, message):
  done = run("minw.evaluate", *(a.format(model=model) for a in arguments))
  assert done.returncode == 2 and message in done.stderr
  assert done.stderr.count("\n") == 1


def test_dataset_must_be_known(tmp_path):
  packed.write(tmp_path / "net.minw", digits_network())
  with pytest.raises(cli.UsageError, match="does not say what it was trained on"):
    evaluate.evaluate_model(tmp_path / "net.minw")
