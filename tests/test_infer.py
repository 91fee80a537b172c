"""Inference from files: what it needs, what it says, what it refuses."""

import concurrent.futures
import copy
import gc
import json
import multiprocessing
import os
import pickle
import struct
import subprocess
import sys
import types
import weakref

import numpy as np
from PIL import Image
import pytest

from minw import errors
from minw import evaluate
from minw import infer
from minw import packed
from minw.data import datasets
from minw.data import streamed
from minw.infer import __main__ as infer_command
from minw.kernels import native
from packed_networks import digits_logits
from packed_networks import digits_network

BACKENDS = [
    pytest.param(name, marks=pytest.mark.skipif(
        name == "native" and not native.available(),
        reason="the native library was not built"))
    for name in infer.BACKENDS]


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
    (np.zeros((2, 8, 8), np.uint8), r"images\[..., None\] has an axis of channels"),
    (np.zeros((8, 8, 1), np.uint8), r"images\[None\] is a batch of one image"),
    (np.zeros((1, 28, 28, 1), np.uint8), "must be"),
    (np.zeros((1, 8, 8, 1), np.int64), "images of int64: must be uint8"),
    ([[[[0]] * 8] * 8], "images of int64: must be uint8"),
    ([np.zeros((8, 8, 1), np.uint8), np.zeros((8, 9, 1), np.uint8)],
     "different shapes"),
    ([], "images of float64"),
])
def test_wrong_images(model, images, message):
  network = infer.load(model, backend="reference")
  for function in (network.logits, network.values):
    with pytest.raises(ValueError, match=message):
      function(images)


def test_empty_batch(model):
  empty = np.zeros((0, 8, 8, 1), np.uint8)
  for backend in ("reference", "native" if native.available() else "xla"):
    network = infer.load(model, backend=backend)
    logits = network.logits(empty)
    assert logits.shape == (0, 10) and logits.dtype == np.float32
    assert network.predict(empty) == network.predict([]) == []
    with pytest.raises(ValueError, match="a batch of at least one"):
      network.values(empty)


@pytest.mark.parametrize("backend", BACKENDS)
def test_arrays_in_other_orders(model, backend):
  images = datasets.load("digits", "test", None)[0][:6]
  wanted = digits_logits(images)
  logits = infer.load(model, backend=backend).logits
  for same in (np.asfortranarray(images), images.repeat(2, 0)[::2], list(images),
               images[::-1][::-1], images.transpose(3, 2, 1, 0).copy().T):
    np.testing.assert_array_equal(logits(same), wanted)


def test_sources(model):
  """A path, its content or a program give the same network."""
  images = datasets.load("digits", "test", None)[0][:3]
  data = model.read_bytes()
  for source, name in ((model, "net"), (str(model), "net"), (data, None),
                       (bytearray(data), None), (memoryview(data), None),
                       (packed.from_bytes(data), None)):
    network = infer.Network(source, "reference")
    assert network.name == name and network.labels[3] == "three"
    np.testing.assert_array_equal(network.logits(images), digits_logits(images))
  assert infer.Network("digits_convnet", "reference").name == "digits_convnet"


def test_repr(model):
  assert repr(infer.load(model, backend="reference")) == (
      "Network('net', images=(8, 8, 1), classes=10, bits=W2, backend=reference)")
  network = infer.load("cifar10_convnet_a_quarter_2bit", backend="xla")
  assert repr(network) == (
      "Network('cifar10_convnet_a_quarter_2bit', images=(32, 32, 3), classes=10,"
      " bits=W2A2, backend=xla)")


@pytest.mark.skipif(not native.available(), reason="the native library was not built")
def test_repr_names_the_instruction_set(model, monkeypatch):
  monkeypatch.setenv("MINW_ISA", "portable")
  assert repr(infer.Network(model.read_bytes(), "native")) == (
      "Network(images=(8, 8, 1), classes=10, bits=W2, backend=native (portable))")


@pytest.mark.parametrize("backend", BACKENDS)
def test_copies(model, backend):
  images = datasets.load("digits", "test", None)[0][:5]
  network = infer.load(model, backend=backend, threads=3)
  network.labels = tuple("abcdefghij")
  copies = [copy.copy(network)]
  if backend != "xla":  # Each of these would be compiled.
    copies += [copy.deepcopy([network])[0], pickle.loads(pickle.dumps(network)),
               copy.copy(copies[0])]
  if backend == "native":
    native_network = native.load(model.read_bytes())
    copies += [copy.copy(native_network), pickle.loads(pickle.dumps(native_network))]
    del native_network
  del network
  gc.collect(1)  # All generations would take long.
  while copies:  # Each ends by itself; the others still run.
    np.testing.assert_array_equal(copies[-1].logits(images), digits_logits(images))
    if isinstance(copies[-1], infer.Network):
      assert (copies[-1].name, copies[-1].backend, copies[-1].threads,
              copies[-1].labels[3]) == ("net", backend, 3, "d")
    copies.pop()
    gc.collect(1)


def test_copy_of_a_default_backend_takes_what_is_there(model, monkeypatch):
  data = pickle.dumps(infer.load(model))
  monkeypatch.setattr(infer, "default_backend", lambda: "reference")
  assert pickle.loads(data).backend == "reference"


def test_networks_end_with_their_references(model):
  network = infer.load(model)
  reference_to = weakref.ref(network)
  del network
  gc.collect()
  assert reference_to() is None


def test_other_processes(model):
  images = datasets.load("digits", "test", None)[0][:4]
  network = infer.load(model)
  with multiprocessing.get_context("spawn").Pool(1) as pool:
    found = pool.map(network.logits, [images[:2], images[2:]])
  np.testing.assert_array_equal(np.concatenate(found), digits_logits(images))


def test_predict(model, tmp_path):
  images = datasets.load("digits", "test", None)[0][:20]
  files = []
  for i, image in enumerate(images):
    files.append(tmp_path / f"{i}.png")
    Image.fromarray(image[..., 0]).save(files[-1])
  logits = digits_logits(images)
  powers = np.exp(logits - logits.max(-1, keepdims=True))
  scores = powers / powers.sum(-1, keepdims=True)
  network = infer.load(model)
  from_files = network.predict(files, top=3)
  assert from_files == network.predict(map(str, files), 3) == network.predict(images, 3)
  for found, logit, score in zip(from_files, logits, scores, strict=True):
    order = sorted(range(10), key=lambda k: (-logit[k], k))[:3]
    assert found.labels == tuple(network.labels[k] for k in order)
    np.testing.assert_allclose(found.scores, score[order], rtol=1e-5)
    assert (found.label, found.score) == (found.labels[0], found.scores[0])
  assert network.predict(files[0]) == network.predict(str(files[0])) == [
      infer.Prediction(from_files[0].labels[:1], from_files[0].scores[:1])]
  assert len(network.predict(images[:1], top=10)[0].labels) == 10


def test_predict_on_a_background(model, tmp_path):
  """Ink of any color that is drawn in transparency alone."""
  images = datasets.load("digits", "test", None)[0][:4]
  network = infer.load(model)
  for ink, background in ((255, "black"), (0, "#fff")):
    for i, image in enumerate(images):
      pixels = np.concatenate([np.full_like(image, ink), image], -1)
      Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    files = [tmp_path / f"{i}.png" for i in range(4)]
    wanted = images if background == "black" else 255 - images
    assert network.predict(files, background=background) == network.predict(wanted)


@pytest.mark.parametrize("arguments, error, message", [
    (("none.png",), ValueError, "'none.png': No such file or directory"),
    ((np.zeros((1, 8, 8, 1), np.uint8), 0), errors.UsageError,
     "top=0: must be 1 to 10"),
    ((np.zeros((1, 8, 8, 1), np.uint8), 11), errors.UsageError,
     "top=11: must be 1 to 10"),
    ((np.zeros((8, 8, 1), np.uint8),), ValueError, "must be"),
    (([np.zeros((8, 8), np.uint8)],), ValueError, "must be"),
])
def test_predict_refuses(model, arguments, error, message):
  network = infer.load(model, backend="reference")
  with pytest.raises(error, match=message):
    network.predict(*arguments)


def test_files_are_read_a_batch_at_a_time(model, tmp_path, monkeypatch):
  Image.new("L", (8, 8)).save(tmp_path / "a.png")
  monkeypatch.setattr(infer, "_BATCH", 3)
  taken = []
  files = (taken.append(i) or tmp_path / "a.png" for i in range(100))
  found = infer.predict_files(infer.load(model, backend="reference"), files)
  for _ in range(4):
    assert isinstance(next(found)[1], infer.Prediction)
  assert len(taken) == 6


def test_wrong_backend(model):
  with pytest.raises(errors.UsageError, match="backend='gpu': must be one of native"):
    infer.load(model, backend="gpu")


def test_without_the_library(model, monkeypatch, caplog):
  """Networks run all the same, and that is said once."""
  monkeypatch.setattr(native, "available", lambda: False)
  infer.default_backend.cache_clear()
  try:
    backends = [infer.load(model).backend for _ in range(2)]
  finally:
    infer.default_backend.cache_clear()
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


def test_command(command, model, tmp_path):
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
  done = command("minw.infer", f"--model={model}", "--backend=reference",
             f"--images={tmp_path / 'images'},{tmp_path / 'b.JPG'}", "--kernels")
  assert done.code == 0, done.err
  lines = done.out.splitlines()
  assert lines[:4] == wanted
  assert lines[4].startswith(f"{tmp_path / 'b.JPG'}\t")
  assert lines[5:] == ["fc\treference", "norm\treference"]


def test_command_predicts_in_spite_of_bad_images(command, model, tmp_path):
  folder = tmp_path / "images"
  folder.mkdir()
  for i in range(5):
    Image.new("L", (8, 8), 50 * i).save(folder / f"{i}.png")
  noise = np.random.default_rng(0).integers(0, 256, (64, 64), np.uint8)
  Image.fromarray(noise).save(folder / "1.png")
  (folder / "1.png").write_bytes((folder / "1.png").read_bytes()[:2000])
  (folder / "3.png").write_bytes(b"hello")
  os.mkfifo(folder / "4_pipe.png")
  Image.new("F", (8, 8)).save(folder / "5 tab\t.tif")
  Image.new("L", (8, 8)).save(folder / "6\n.png")
  (folder / "notes.txt").write_text("hello")
  done = command("minw.infer", f"--model={model}", "--backend=reference",
             f"--images={folder}", "--top=2", "--kernels")
  assert done.code == 1
  lines = [line.split("\t") for line in done.out.splitlines()]
  assert [line[0] for line in lines] == [
      f"{folder}/{name}" for name in ("0.png", "2.png", "4.png", "6\\n.png")
  ] + ["fc", "norm"]
  for file, *pairs in lines[:4]:
    image = np.full((1, 8, 8, 1), 50 * int(os.path.basename(file)[0]) % 300, np.uint8)
    logits = digits_logits(image)[0]
    powers = np.exp(logits - logits.max())
    order = sorted(range(10), key=lambda k: (-logits[k], k))[:2]
    names = infer.load(model, backend="reference").labels
    assert pairs == [text for k in order for text in
                     (names[k], f"{powers[k] / powers.sum():.4f}")]
  told = done.err.splitlines()
  for line, (name, reason) in zip(told[1:], (
      ("1.png", "truncated"), ("3.png", "cannot identify image file"),
      ("4_pipe.png", "not a regular file"), ("5 tab\\t.tif", "range"))):
    assert line.startswith(f"error: images='{folder}/{name}': ") and reason in line
  assert "hidden or not named as images are: 1" in told[0] and len(told) == 5


@pytest.mark.parametrize("bad, good, code",
                         [(0, 1, 0), (1, 0, 2), (1, 1, 1), (2, 0, 1)])
def test_exit_code(model, tmp_path, capsys, bad, good, code):
  files = [tmp_path / f"{i}.png" for i in range(bad + good)]
  for i, file in enumerate(files):
    file.write_bytes(b"") if i < bad else Image.new("L", (8, 8)).save(file)
  network = infer.load(model, backend="reference")
  assert infer_command.print_predictions(network, files, 1, "black") == code
  out, err = capsys.readouterr()
  assert out.count("\n") == good
  assert err.count("error: images=") == err.count("\n") == bad


def test_model_that_is_no_regular_file(tmp_path):
  os.mkfifo(tmp_path / "net.minw")
  for path in (tmp_path / "net.minw", "/dev/zero", tmp_path):
    with pytest.raises(OSError, match="it is not a regular file"):
      infer.load(path)


@pytest.fixture(name="costly")
def costly_model(tmp_path):
  """A network of 8 kB, whose weights are 500 times as many with their padding."""
  path = tmp_path / "costly.minw"
  kernel = np.ones((1, 128, 512, 1), np.int8)
  norm = packed.Logits("norm", 2, 1.0, *np.ones((3, 1), np.float32))
  ops = (packed.Conv("unused", 0, 1, kernel),
         packed.Pool("p", 0, "max", (128, 512), (1, 1)))
  packed.write(path, packed.Program(
      (128, 512, 1), (128, 512), np.zeros(1, np.uint8), 1, (*ops, norm), {}))
  return path


@pytest.mark.parametrize("backend", BACKENDS)
def test_limits(costly, backend):
  with pytest.raises(ValueError, match="its padding, .* exceeds the limit of 16777216"):
    infer.load(costly, backend=backend)
  need = packed.cost(packed.read(costly, packed.UNLIMITED))
  image = np.full((1, 128, 512, 1), 5, np.uint8)
  for limits in (need, packed.UNLIMITED):
    network = infer.load(costly, backend=backend, limits=limits)
    assert network.logits(image) == (5 - 1) * 1 + 1
  with pytest.raises(ValueError, match="its memory"):
    infer.load(costly, limits=need._replace(memory=need.memory - 1))
  if backend != "xla":
    assert pickle.loads(pickle.dumps(network)).logits(image) == 5  # With its limits.


@pytest.mark.skipif(not native.available(), reason="the native library was not built")
def test_limits_of_calls_from_jax(costly):
  data = costly.read_bytes()
  with pytest.raises(ValueError, match="its padding exceeds the limit"):
    native.ffi_logits(data)
  try:
    function = native.ffi_logits(data, limits=packed.UNLIMITED)
  except RuntimeError as error:
    pytest.skip(str(error))  # Built without jaxlib's headers.
  assert function(np.full((1, 128, 512, 1), 5, np.uint8)) == 5


def test_limits_of_the_command(command, costly, tmp_path):
  np.save(tmp_path / "a.npy", np.zeros((128, 512, 1), np.uint8))
  refused = command("minw.infer", f"--model={costly}", f"--images={tmp_path / 'a.npy'}")
  assert refused.code == 2 and refused.err.count("\n") == 1
  assert "its padding, " in refused.err
  taken = command("minw.infer", f"--model={costly}", "--nolimits",
              f"--images={tmp_path / 'a.npy'}")
  assert taken.out == f"{tmp_path / 'a.npy'}\t0\t1.0000\n"


def test_no_more_of_a_model_is_read_than_its_head_says(model, tmp_path):
  data = model.read_bytes()
  cases = [(data[:31], "less than its head"),
           (b"MINW" + data[4:8], "less than its head"),
           (data + b"\0", "where it says"), (data[:-1], "where it says")]
  # A file with a hole of 2 TB, and one whose head agrees with its size of 4 GB.
  for size, head, message in (
      (2**41, b"", "does not begin as one"), (2**41, data[:32], "where it says"),
      (32 + 2**32 - 2, data[:16] + struct.pack("<Q2I", 2**32 + 30, 2**32 - 4, 2),
       "at most 1073741824")):
    with open(tmp_path / "hole.minw", "wb") as file:
      file.write(head)
      file.truncate(size)
    with pytest.raises(ValueError, match=message):
      infer.load(tmp_path / "hole.minw")
  for bad, message in cases:
    (tmp_path / "bad.minw").write_bytes(bad)
    with pytest.raises(ValueError, match=message):
      packed.read(tmp_path / "bad.minw")


def test_command_on_a_background(command, model, tmp_path):
  Image.new("LA", (8, 8), (255, 0)).save(tmp_path / "a.png")
  lines = [command("minw.infer", f"--model={model}", f"--images={tmp_path}", *more).out
           for more in ((), ("--background=black",), ("--background=255,255,255",))]
  assert lines[0] == lines[1] != lines[2]
  network = infer.load(model)
  white = network.predict(np.full((1, 8, 8, 1), 255, np.uint8))[0]
  assert lines[2] == f"{tmp_path / 'a.png'}\t{white.label}\t{white.score:.4f}\n"


@pytest.mark.parametrize("channels", [2, 4, 5])
def test_command_with_other_channels(command, tmp_path, channels):
  """Files that have exactly these channels; others are refused in a line."""
  rng = np.random.default_rng(0)
  kernel = rng.choice([-1, 1], (3, 4, 4, channels)).astype(np.int8)
  ops = (packed.Conv("fc", 0, 1, kernel),
         packed.Logits("norm", 1, 2.0**-6, np.zeros(3, np.float32),
                       np.full(3, 0.25, np.float32), np.zeros(3, np.float32)))
  model = tmp_path / "net.minw"
  packed.write(model, packed.Program(
      (4, 4, channels), (4, 4), np.full(channels, 99, np.uint8), 3, ops, {}))
  image = rng.integers(0, 256, (4, 4, channels), np.uint8)
  wanted = ((image - 99.0) * kernel).sum((1, 2, 3)).argmax()
  np.save(tmp_path / "a.npy", image)
  good = ["a.npy"]
  if channels != 5:
    Image.fromarray(image).save(tmp_path / "a.png")
    good.append("a.png")
  for name in good:
    done = command("minw.infer", f"--model={model}", f"--images={tmp_path / name}")
    assert done.code == 0, done.err
    assert done.out.split("\t")[1] == str(wanted)
  Image.new("RGB", (4, 4)).save(tmp_path / "b.png")
  done = command("minw.infer", f"--model={model}", f"--images={tmp_path}/b.png")
  assert done.code == 2 and done.err.count("\n") == 1
  assert f"Pillow mode RGB; the network takes {channels}" in done.err


@pytest.mark.parametrize("arguments, message", [
    ("--model=none.minw --images=.", "error: model='none.minw': "),
    ("--model={tmp}/bad.minw --images=.", "not a packed network"),
    ("--model={model} --images={tmp}/none.png", "none.png': must be a file or folder"),
    ("--model={model} --images={tmp}/empty", "must be a folder with .png or .jpg"),
    ("--model={model} --images={tmp}/bad.minw", "cannot identify image file"),
    ("--model={model} --images={tmp}/cut.png", "cut.png'"),
    ("--model={model} --images=. --threads=0", "threads"),
    ("--model={model} --images={tmp}/whole.png --background=blak",
     "background='blak': must be a color: a name, #rrggbb or R,G,B"),
    ("--model={model} --images={tmp}/whole.png --top=11", "top=11: must be 1 to 10"),
    ("--model={model} --images={tmp}/bad.minw --top=11", "top=11: must be 1 to 10"),
])
def test_command_refuses_in_one_line(command, model, tmp_path, arguments, message):
  (tmp_path / "empty").mkdir()
  (tmp_path / "bad.minw").write_bytes(b"no network, and no image")
  Image.fromarray(np.zeros((64, 64), np.uint8)).save(tmp_path / "whole.png")
  data = (tmp_path / "whole.png").read_bytes()
  (tmp_path / "cut.png").write_bytes(data[:len(data) // 2])
  done = command("minw.infer", *arguments.format(model=model, tmp=tmp_path).split())
  assert done.code == 2
  assert message in done.err and done.err.count("\n") == 1, done.err


def forged_network(path):
  """A network whose layers have names that look like lines of others."""
  program = digits_network({"labels": ["a b\u0020é"] * 10})
  names = "fc\tnative\nnorm", "\x1b[2J\x9b\u202e??/\\"
  packed.write(path, program._replace(ops=tuple(
      op._replace(name=name) for op, name in zip(program.ops, names))))


def test_command_prints_foreign_text_escaped(command, tmp_path):
  forged_network(tmp_path / "net.minw")
  image = tmp_path / "a\n\t\x1b.png"
  Image.new("L", (8, 8)).save(image)
  arguments = ["minw.infer", f"--model={tmp_path}/net.minw", "--kernels",
               "--backend=reference", str(image), str(tmp_path / "net.minw")]
  done = command(*arguments)
  first, *kernels = done.out.split("\n")
  assert first.split("\t")[:2] == [f"{tmp_path}/a\\n\\t\\x1b.png", "a b é"]
  assert kernels == ["fc\\tnative\\nnorm\treference",
                     "\\x1b[2J\\x9b\\u202e??/\\\treference", ""]


def test_output_in_an_encoding_that_lacks_characters(tmp_path):
  forged_network(tmp_path / "net.minw")
  Image.new("L", (8, 8)).save(tmp_path / "a.png")
  done = subprocess.run(
      [sys.executable, "-W", "error", "-m", "minw.infer", "--backend=reference",
       f"--model={tmp_path}/net.minw", tmp_path / "a.png", tmp_path / "net.minw"],
      env=os.environ | {"PYTHONIOENCODING": "ascii"}, capture_output=True, text=True)
  assert done.returncode == 1 and done.stdout.split("\t")[1] == r"a b \xe9"
  assert done.stderr.count("\n") == 1  # The network is no image.


def test_evaluate_command(command, model):
  done = command("minw.evaluate", f"--model={model}", "--split=validation")
  assert done.code == 0, done.err
  result = json.loads(done.out)
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
  with pytest.raises(errors.UsageError, match=message):
    evaluate.evaluate_model(model, **changes)


@pytest.mark.parametrize("arguments, message", [
    (("--model={model}", "--workdir=x"), "one of --workdir and --model"),
    (("--workdir=x", "--dataset=digits"), "dataset='digits': must be left out"),
    (("--model={model}", "--checkpoint=best"), "checkpoint='best': must be left out"),
    (("--workdir=x", "--images=x"), "images='x': must be left out"),
    (("--model={model}", "--images=x", "--dataset=digits"), "dataset='digits': must"),
    (("--model={model}", "--images=x", "--data_dir=x"), "data_dir='x': must be left"),
    (("--model={model}", "--confusion=x.png"), "confusion='x.png': must be a file"),
])
def test_evaluate_takes_a_run_or_a_file(command, model, arguments, message):
  done = command("minw.evaluate", *(a.format(model=model) for a in arguments))
  assert done.code == 2 and message in done.err
  assert done.err.count("\n") == 1


NAMES = "zero one two three four five six seven eight nine".split()


def write_digits(folder, images, labels):
  """Writes FOLDER/LABEL/i.png of the images of the digits."""
  for i, (image, label) in enumerate(zip(images, labels)):
    (folder / NAMES[label]).mkdir(parents=True, exist_ok=True)
    Image.fromarray(image[..., 0]).save(folder / NAMES[label] / f"{i}.png")
  return folder


def test_evaluate_a_folder(command, model, tmp_path, monkeypatch):
  images, labels = (part[:40] for part in datasets.load("digits", "test", None))
  folder = write_digits(tmp_path / "images", images, labels)
  (folder / NAMES[labels[7]] / "7.png").write_bytes(b"no image")
  done = command("minw.evaluate", f"--model={model}", f"--images={folder}",
                 f"--confusion={tmp_path}/classes.json")
  assert done.code == 1
  damaged, = done.err.splitlines()
  name = f"{folder}/{NAMES[labels[7]]}/7.png"
  assert damaged.startswith(f"error: images='{name}': cannot identify image file")
  kept = np.arange(40) != 7
  logits, labels = digits_logits(images)[kept], labels[kept]
  shifted = logits - logits.max(-1, keepdims=True)
  log_probabilities = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
  matrix = np.zeros((10, 10), int)
  np.add.at(matrix, (labels, logits.argmax(-1)), 1)
  written = json.loads((tmp_path / "classes.json").read_text())
  assert written == {
      "images": str(folder), "mode": "hard", "damaged": 1,
      "accuracy": (logits.argmax(-1) == labels).mean(),
      "loss": pytest.approx(-log_probabilities[np.arange(39), labels].mean()),
      "class_accuracy": {name: pytest.approx(row[i] / row.sum()) if row.any() else None
                         for i, (name, row) in enumerate(zip(NAMES, matrix))},
      "confusion": matrix.tolist()}
  del written["confusion"]
  assert json.loads(done.out) == written


def test_evaluate_a_folder_of_splits(model, tmp_path):
  images, labels = datasets.load("digits", "test", None)
  parts = {"train": slice(0, 4), "val": slice(4, 9), "test": slice(9, 16)}
  for split, part in parts.items():
    write_digits(tmp_path / split, images[part], labels[part])
  for split, part in ((None, "test"), ("test", "test"), ("validation", "val")):
    found, damaged = evaluate.evaluate_images(str(model), tmp_path, split)
    right = digits_logits(images[parts[part]]).argmax(-1) == labels[parts[part]]
    assert found["accuracy"] == right.mean() and damaged == {} and not found["damaged"]
  with pytest.raises(errors.UsageError,
                     match="has classes and no splits, such as validation"):
    evaluate.evaluate_images(str(model), tmp_path / "test", "validation")


@pytest.mark.parametrize("label, content, message", [
    ("ten", True, "has the class 'ten', which is not one of the network's classes: "
     "'zero', 'one'"),
    ("", True, "holds 0.png outside of the folders of the classes"),
    ("zero", False, r"none of its images can be read, .*0.png for example \(cannot"),
    (None, False, "has no folders of classes"),
])
def test_evaluate_refuses_a_folder(model, tmp_path, label, content, message):
  folder = tmp_path / "images"
  folder.mkdir()
  if label is not None:
    (folder / label).mkdir(exist_ok=True)
    (folder / label / "0.png").write_bytes(b"")
    if content:
      Image.new("L", (8, 8)).save(folder / label / "0.png")
  with pytest.raises(errors.UsageError, match=f"images='{folder}': {message}"):
    evaluate.evaluate_images(str(model), folder)
  with pytest.raises(errors.UsageError, match="must be a folder with a folder of"):
    evaluate.evaluate_images(str(model), folder / "nowhere")


def test_evaluate_takes_no_paths_and_workers_of_a_file(tmp_path, monkeypatch):
  rng = np.random.default_rng(0)
  ops = (packed.Conv("fc", 0, 1, rng.choice([-1, 1], (1000, 8, 8, 3)).astype(np.int8)),
         packed.Logits("norm", 1, 1.0, *np.ones((3, 1000), np.float32)))
  config = {"dataset": "imagenet2012", "data_dir": str(tmp_path / "theirs"),
            "data_workers": 64, "max_damaged": 1.0}
  packed.write(tmp_path / "net.minw", packed.Program(
      (8, 8, 3), (8, 8), np.zeros(3, np.uint8), 1000, ops, {"config": config}))
  asked = []

  class Split:

    def __init__(self, records, name, *, workers, max_damaged, channels):
      assert channels == 3
      asked.append((records, workers, max_damaged))

    def centres(self, *arguments, **options):
      yield np.zeros((1, 8, 8, 3), np.uint8), np.int32([0])

  monkeypatch.setattr(streamed, "Split", Split)
  monkeypatch.setattr(
      datasets, "open_records", lambda name, split, data_dir: (name, data_dir))
  evaluate.evaluate_model(tmp_path / "net.minw")
  evaluate.evaluate_model(tmp_path / "net.minw", data_dir="mine", data_workers=3)
  assert asked == [(("imagenet2012", "~/tensorflow_datasets"), 0, 0.001),
                   (("imagenet2012", "mine"), 3, 0.001)]


@pytest.mark.parametrize("name", ["mnist", "", "x\nerror: y", "\x1b[2J", "a" * 10**4])
def test_a_data_set_that_a_file_invents_is_refused(tmp_path, name):
  packed.write(tmp_path / "net.minw", digits_network({"config": {"dataset": name}}))
  with pytest.raises(errors.UsageError,
                     match="--dataset must be given, one of") as caught:
    evaluate.evaluate_model(tmp_path / "net.minw")
  assert str(caught.value).isprintable() and len(str(caught.value)) < 400


def test_dataset_must_be_known(tmp_path):
  packed.write(tmp_path / "net.minw", digits_network())
  with pytest.raises(errors.UsageError, match="does not say what it was trained on"):
    evaluate.evaluate_model(tmp_path / "net.minw")
