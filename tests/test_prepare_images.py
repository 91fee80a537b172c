"""minw.prepare on a user's own images, and training on them."""

import contextlib
import fcntl
import json
import os
import pathlib
import shutil

import numpy as np
import pytest
import tensorflow_datasets as tfds

from minw import config
from minw import config_flag
from minw import errors
from minw import evaluate
from minw import pack
from minw import packed
from minw import prepare
from minw import train
from minw import verify
from minw.data import collection
from minw.data import datasets
from own_images import picture
from own_images import png
from own_images import write_classes
from own_images import write_tfds
from short_runs import tiny_config


def refusal(*arguments, **options) -> str:
  with pytest.raises(errors.UsageError) as error:
    prepare.prepare_images(*arguments, **options)
  return str(error.value)


def test_tfds_reads_what_is_written(tmp_path):
  source = write_classes(tmp_path / "source", {"a": 10, "b": 12})
  directory = prepare.prepare_images("mine", tmp_path / "data", source)
  assert directory == tmp_path / "data" / "mine" / "1.0.0"
  assert os.listdir(tmp_path / "data" / "mine") == ["1.0.0"]
  builder = tfds.builder_from_directory(directory)
  assert builder.name == "mine" and builder.info.features["label"].names == ["a", "b"]
  assert builder.info.features["image"].shape == (10, 12, 3)
  sizes = {"train": 18, "validation": 2, "test": 2}
  assert {split: part.num_examples for split, part in builder.info.splits.items()} == (
      sizes)
  seen = set()
  for split in sizes:
    for record in builder.as_data_source(split):
      label, _, number = record["file_name"].decode()[:-4].partition("/")
      assert record["label"] == "ab".index(label)
      np.testing.assert_array_equal(
          record["image"], picture(int(number) + 10 * (label == "b")))
      seen.add((label, number))
  assert len(seen) == 22
  report = builder.info.metadata["report"]
  assert report["images"]["test"] == {"a": 1, "b": 1}

  info = datasets.info("mine", tmp_path / "data")
  assert info.label_names == ("a", "b") and info.splits == sizes
  images, labels = datasets.load("mine", "train", tmp_path / "data")
  assert images.shape == (18, 10, 12, 3) and sorted(labels) == [0] * 8 + [1] * 10
  assert info.mean == pytest.approx((images / 255).mean((0, 1, 2)), rel=1e-12)
  assert info.std == pytest.approx((images / 255).std((0, 1, 2)), rel=1e-12)


def test_preparing_twice_does_nothing(tmp_path, capsys):
  source = write_classes(tmp_path / "source", {"a": 3, "b": 3})
  directory = prepare.prepare_images("mine", tmp_path, source)
  shutil.rmtree(source)
  assert prepare.prepare_images("mine", tmp_path, source) == directory
  assert f"already prepared. To prepare it again, delete {directory}." in (
      capsys.readouterr().out)


@pytest.mark.parametrize("name", ["cifar10", "digits", "a-b", "../x", "", "1a", "é"])
def test_names_that_cannot_be_used(tmp_path, name):
  source = write_classes(tmp_path / "source", {"a": 3, "b": 3})
  assert f"dataset={name!r}: must be a new name" in refusal(name, tmp_path, source)
  assert os.listdir(tmp_path) == ["source"]


def test_the_name_of_another_data_set_is_refused(tmp_path):
  source = write_classes(tmp_path / "source", {"a": 3, "b": 3})
  other = write_tfds(tmp_path / "data", "mine", (8, 8, 3), {"train": 9})
  assert f"dataset='mine': must be another name: {other} holds" in refusal(
      "mine", tmp_path / "data", source)


@pytest.mark.parametrize("dataset, argument, allowed", [
    ("cifar10", "--grayscale", "left out except for your own images"),
    ("cifar10", "--seed=1", "left out except for your own images"),
    ("mine", "--partial", "left out for your own images")])
def test_flags_of_other_data_sets_are_refused(command, tmp_path, dataset, argument,
                                              allowed):
  code, out, err = command("minw.prepare", f"--dataset={dataset}", argument,
                           f"--data_dir={tmp_path}", "--source=x")
  assert (code, out) == (2, "") and err.endswith(f"must be {allowed}\n")


@pytest.mark.parametrize("counts", [{"a": 3}, {"a": 3, "b": 0}, {"a": 3, "b": 2}])
def test_a_source_that_is_refused_leaves_nothing(tmp_path, counts):
  source = write_classes(tmp_path / "source", counts)
  refusal("mine", tmp_path / "data", source)
  assert os.listdir(tmp_path / "data") == []


def test_two_at_once_are_refused(tmp_path):
  source = write_classes(tmp_path / "source", {"a": 3, "b": 3})
  work = tmp_path / "data" / "mine" / "incomplete.minw"
  work.mkdir(parents=True)
  with open(work / "lock", "w") as lock:
    fcntl.flock(lock, fcntl.LOCK_SH)
    assert "another preparation" in refusal("mine", tmp_path / "data", source)
  prepare.prepare_images("mine", tmp_path / "data", source)


def test_a_file_that_changes_meanwhile_leaves_nothing(tmp_path, monkeypatch):
  source = write_classes(tmp_path / "source", {"a": 3, "b": 3})
  collect = collection.collect

  def late(*arguments, **options):
    found = collect(*arguments, **options)
    found.splits["train"][0].content.write_bytes(b"")
    return found

  monkeypatch.setattr(collection, "collect", late)
  assert "cannot be read any more" in refusal("mine", tmp_path / "data", source)
  assert os.listdir(tmp_path / "data") == []


def test_the_command_reports(command, tmp_path):
  source = write_classes(tmp_path / "source", {"a": 10, "b": 10})
  (source / "a" / "bad.png").write_bytes(b"")
  (source / "b" / "again.png").write_bytes((source / "a" / "0.png").read_bytes())
  arguments = ("--dataset=mine", f"--data_dir={tmp_path}/data", f"--source={source}")
  code, out, err = command("minw.prepare", *arguments)
  assert code == 2 and out == "" and err.count("\n") == 1
  assert err.startswith("error: 1 of 22 images cannot be used (a/bad.png: cannot ident")
  code, out, err = command(
      "minw.prepare", *arguments, "--skip_damaged", "--image_size=8x11", "--grayscale")
  assert code == 0, err
  lines = out.splitlines()
  assert lines[0] == f"{tmp_path}/data/mine/1.0.0"
  assert lines[1] == (
      "  images of 11x8 pixels and 1 channel; in the source: 21 of 12x10")
  assert lines[2] == "  train: 17 images (made), 8 to 9 of each of 2 classes"
  assert lines[3] == "  validation: 2 images (made), 1 of each of 2 classes"
  assert "  left out: a/bad.png: cannot identify image file; these are read:" in out
  assert "  1 damaged images were left out" in lines
  assert "  1 images equal another one, " in out
  assert lines[-1] == (
      "Train with: python -m minw.main --config=digits_convnet --workdir=runs/mine "
      f"--config.data_dir={tmp_path}/data --config.dataset=mine --config.crop_size=8 "
      "--config.batch_size=16 --config.eval_batch_size=16")


def test_the_command_says_what_may_be_wrong_with_images(command, tmp_path):
  """Gray images of six widths, of which one is in two splits."""
  for folder, widths in (("train/a", [12] * 4), ("train/b", [9, 14, 15, 16, 17]),
                         ("test/a", [12]), ("test/b", [12])):
    (tmp_path / "source" / folder).mkdir(parents=True)
    for i, width in enumerate(widths):
      image = picture(len(folder) + i + 10 * ("b" in folder), 10, width)[..., :1]
      (tmp_path / "source" / folder / f"{i}.png").write_bytes(png(image))
  (tmp_path / "source/test/a/0.png").write_bytes(
      (tmp_path / "source/train/a/0.png").read_bytes())

  def lines_of(*arguments):
    code, out, err = command("minw.prepare", f"--data_dir={tmp_path}/data",
                             f"--source={tmp_path}/source", *arguments)
    assert code == 0, err
    return out.splitlines()

  lines = lines_of("--dataset=mine")
  sizes = "6 of 12x10, 1 of 9x10, 1 of 14x10, 1 of 15x10, 1 of 16x10, ..."
  gray = "  all images are gray: --grayscale stores one channel"
  assert lines[1] == f"  images of 12x10 pixels and 3 channels; in the source: {sizes}"
  assert gray in lines
  assert "  1 images are smaller and were enlarged" in lines
  assert "  equal images in different splits: train/a/0.png, test/a/0.png" in lines
  assert "  1 images equal another one, 1 of them in another split" in lines
  assert gray not in lines_of("--dataset=gray", "--grayscale")


@pytest.mark.parametrize("value", ["0", "8x", "x8", "8x0", "12345", "8 x 8", "-1"])
def test_sizes_that_cannot_be_used(command, tmp_path, value):
  source = write_classes(tmp_path / "source", {"a": 3, "b": 3})
  code, out, err = command("minw.prepare", "--dataset=mine", f"--data_dir={tmp_path}",
                           f"--source={source}", f"--image_size={value}")
  assert (code, out) == (2, "") and f"image_size={value!r}: must be SIDE or" in err


@pytest.mark.slow  # The tests below train in this process, which takes less.
def test_from_a_folder_to_a_packed_network(command, tmp_path):
  """Both classes differ in their mean, so that a few steps are enough."""
  source = tmp_path / "source"
  write_classes(source, {"dark": 40, "light": 40})
  for i, path in enumerate(sorted(source.glob("*/*.png"))):
    image = picture(i) // 4 + (150 if path.parent.name == "light" else 0)
    path.write_bytes(png(image))
  run = lambda *arguments: command(*arguments, folder=tmp_path)
  done = run("minw.prepare", "--dataset=mine", "--data_dir=data", "--source=source")
  assert done.code == 0, done.err
  done = run("minw.main", "--config=digits_convnet", "--workdir=run",
             "--config.data_dir=data", "--config.dataset=mine", "--config.crop_size=8",
             "--config.batch_size=8", "--config.eval_batch_size=8",
             "--config.num_epochs=2", "--config.eval_every_epochs=1",
             "--config.conv_widths=(8,8)", "--config.dense_widths=()")
  assert done.code == 0, done.err
  trained = json.loads(done.out.splitlines()[-1])
  assert trained["test_accuracy"] == 1.0
  done = run("minw.pack", "--workdir=run", "--out=mine.minw", "--verify")
  assert done.code == 0 and "on 8 images (the test split of mine)" in done.out, done.err
  done = run("minw.infer", "--model=mine.minw", *(
      f"source/{label}/{i}.png" for i in range(3) for label in ("dark", "light")))
  assert done.code == 0, done.err
  assert [line.split("\t")[1] for line in done.out.splitlines()] == [
      "dark", "light"] * 3
  done = run("minw.evaluate", "--model=mine.minw", "--data_dir=data")
  assert done.code == 0 and json.loads(done.out)["accuracy"] == 1.0, done.err

  # The data may move after training.
  pathlib.Path(tmp_path, "data").rename(tmp_path / "moved")
  done = run("minw.evaluate", "--workdir=run")
  assert done.code == 2
  assert "run/config.json: config.dataset='mine': must be one of digits" in done.err
  done = run("minw.evaluate", "--workdir=run", "--data_dir=moved")
  assert done.code == 0 and json.loads(done.out)["accuracy"] == 1.0, done.err
  before = (tmp_path / "mine.minw").read_bytes()
  done = run("minw.pack", "--workdir=run", "--out=mine.minw", "--data_dir=moved")
  assert done.code == 0 and (tmp_path / "mine.minw").read_bytes() == before, done.err


@pytest.mark.slow  # Half a minute each, most of it to compile.
@pytest.mark.parametrize(
    "size, side, gray", [("tiny", 16, True), ("small", 128, False)])
def test_folder_convnets(tmp_path, size, side, gray):
  """Two steps on the smallest and largest images; the packed network is equal."""
  write_classes(tmp_path / "source", {"cat": 6, "dog": 6})
  prepare.prepare_images("mine", tmp_path, tmp_path / "source", grayscale=gray,
                         image_size=(side, side))
  c = config.copy(config_flag.load(f"folder_convnet:size={size}"))
  c.update(dataset="mine", data_dir=str(tmp_path), crop_size=side, batch_size=4,
           eval_batch_size=4, num_epochs=1, random_flip=False)
  status = train.train_and_evaluate(c, tmp_path / "run")
  assert status["step"] == 2  # Eight images train.
  program = pack.pack_workdir(tmp_path / "run")
  assert program.source_shape == (side, side, 1 if gray else 3)
  packed.write(tmp_path / "mine.minw", program)
  assert verify.verify_workdir(tmp_path / "run", tmp_path / "mine.minw") == 0


CONFIG = tiny_config(  # Its data are in the working directory.
    dataset="mine", data_dir="data", crop_size=8, batch_size=8, eval_batch_size=4,
    num_epochs=1, conv_widths=(), dense_widths=(8,))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  """A folder with data, a run on them, and its packed network."""
  folder = tmp_path_factory.mktemp("trained")
  write_classes(folder / "source", {"cat": 20, "dog": 20})
  prepare.prepare_images("mine", folder / "data", folder / "source")
  with contextlib.chdir(folder):
    train.train_and_evaluate(CONFIG, "run")
    packed.write("mine.minw", pack.pack_workdir("run"))
  return folder


@pytest.mark.parametrize("counts, change, differing", [
    ({"cat": 20, "hen": 20}, lambda x: x, ["labels"]),
    *(pytest.param(*slow, marks=pytest.mark.slow) for slow in (
        ({"cat": 20, "dog": 20}, lambda x: x // 2, ["mean", "std"]),
        ({"cat": 20, "dog": 30}, lambda x: x, ["mean", "std", "splits"])))])
def test_other_data_in_the_same_place_are_refused(
    trained, tmp_path, monkeypatch, counts, change, differing):
  """The mean is folded into a packed network, and labels are only numbers in it."""
  write_classes(tmp_path / "source", counts)
  for i, path in enumerate(sorted((tmp_path / "source").glob("*/*.png"))):
    path.write_bytes(png(change(picture(i))))
  prepare.prepare_images("mine", tmp_path / "data", tmp_path / "source")
  shutil.copytree(trained / "run", tmp_path / "run")
  shutil.copy(trained / "mine.minw", tmp_path)
  monkeypatch.chdir(tmp_path)
  os.remove("run/status.json")  # Otherwise the run has nothing to resume.
  for refused in (lambda: pack.pack_workdir("run"),
                  lambda: verify.verify_workdir("run", "mine.minw"),
                  lambda: evaluate.evaluate_workdir("run"),
                  lambda: train.train_and_evaluate(CONFIG, "run")):
    with pytest.raises(errors.UsageError, match="is not the data set that") as error:
      refused()
    assert all(name in str(error.value) for name in differing)
  place = str(trained / "data")
  assert pack.pack_workdir("run", data_dir=place).num_classes == 2
  if "labels" in differing:
    with pytest.raises(errors.UsageError, match="labels that the network has"):
      evaluate.evaluate_model("mine.minw", "test", data_dir="data")
