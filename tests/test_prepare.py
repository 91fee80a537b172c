"""minw.prepare: small CIFAR sources, in every form a user may have them in."""

import contextlib
import errno
import fcntl
import hashlib
import os
import pathlib
import pickle
import resource
import shutil
import signal
import types

import numpy as np
import pytest
import tensorflow_datasets as tfds

from cifar_files import COUNTS
from cifar_files import LABELS
from cifar_files import check_prepared
from cifar_files import refusal
from cifar_files import small_tables
from cifar_files import write_archive
from cifar_files import write_directory
from minw import errors
from minw import prepare
from minw.data import cifar
from minw.data import datasets
from resource_limits import limited

REAL_FILES = {name: cifar.ORIGINALS[name].files for name in COUNTS}


def tree(path: pathlib.Path) -> dict[str, tuple[int, bytes]]:
  """Everything below `path`: time of change and content."""
  return {
      str(p.relative_to(path)): (p.stat().st_mtime_ns, p.read_bytes())
      for p in sorted(path.rglob("*")) if p.is_file()
  }


@pytest.mark.parametrize("name", COUNTS)
@pytest.mark.parametrize("version", ["binary", "python"])
@pytest.mark.parametrize("form", ["archive", "directory", "folder"])
def test_every_source_gives_the_same_records(small, name, version, form, tmp_path):
  if form == "archive":
    source = write_archive(tmp_path / "source", name, version)
  else:
    source = write_directory(tmp_path / "source", name, version)
    if form == "directory":
      source = source.parent
  before = tree(tmp_path / "source")
  directory = prepare.prepare(name, tmp_path / "data", source)
  assert tree(tmp_path / "source") == before
  assert directory == tmp_path / "data" / name / "3.0.2"
  assert os.listdir(tmp_path / "data") == [name]
  assert os.listdir(tmp_path / "data" / name) == ["3.0.2"]
  check_prepared(name, directory)
  for split, size in datasets.info(name).splits.items():
    images, labels = datasets.load(name, split, tmp_path / "data")
    assert len(images) == len(labels) == size


def test_preparing_twice_does_nothing(small, tmp_path, capsys):
  source = write_directory(tmp_path / "source", "cifar10", "binary")
  directory = prepare.prepare("cifar10", tmp_path / "data", source)
  before = tree(directory)
  (tmp_path / "data/cifar10/incomplete.minw").mkdir()  # As if killed at the very end.
  assert "already" not in capsys.readouterr().out
  shutil.rmtree(source)
  assert prepare.prepare("cifar10", tmp_path / "data", source) == directory
  assert "already prepared" in capsys.readouterr().out
  assert tree(directory) == before
  assert os.listdir(tmp_path / "data/cifar10") == ["3.0.2"]


def test_what_is_there_but_damaged_is_not_called_prepared(small, tmp_path):
  source = write_directory(tmp_path / "source", "cifar10", "binary")
  directory = prepare.prepare("cifar10", tmp_path / "data", source)
  file = directory / "cifar10-test.array_record-00000-of-00001"
  os.truncate(file, 1000)
  assert str(file) in refusal("cifar10", tmp_path / "data", source)


def test_names_that_can_not_be_prepared(tmp_path):
  assert "needs no preparation" in refusal("digits", tmp_path)
  assert "did you mean 'cifar100'" in refusal("cifar1000", tmp_path)
  assert "data_dir=''" in refusal("cifar10", "")
  assert not os.listdir(tmp_path)


def test_an_unwritable_data_dir_is_refused(small, tmp_path):
  source = write_directory(tmp_path / "source", "cifar10", "binary")
  (tmp_path / "file").touch()
  message = refusal("cifar10", tmp_path / "file" / "data", source)
  assert f"data_dir='{tmp_path}/file/data': must be a directory that can be" in message


def test_too_little_space_is_noticed_before_writing(small, tmp_path, monkeypatch):
  source = write_directory(tmp_path / "source", "cifar10", "binary")
  usage = shutil.disk_usage(tmp_path)._replace(free=19 * 3073 - 1)
  monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
  assert "free space" in refusal("cifar10", tmp_path / "data", source)
  assert not os.listdir(tmp_path / "data")
  usage = usage._replace(free=19 * 3073)
  prepare.prepare("cifar10", tmp_path / "data", source)


def test_a_full_disk_is_reported(small, tmp_path):
  source = write_directory(tmp_path / "source", "cifar10", "binary")
  with limited(resource.RLIMIT_FSIZE, 10_000):  # Like a disk of 10 kB.
    message = refusal("cifar10", tmp_path / "data", source)
  assert "must be a directory that can be written to" in message
  assert "File too large" in message
  assert not os.listdir(tmp_path / "data")
  prepare.prepare("cifar10", tmp_path / "data", source)


def test_two_at_once_are_refused(small, tmp_path):
  source = write_directory(tmp_path / "source", "cifar10", "binary")
  work = tmp_path / "data/cifar10/incomplete.minw"
  work.mkdir(parents=True)
  with open(work / "lock", "w") as lock:
    fcntl.flock(lock, fcntl.LOCK_SH)  # Even so weak a lock keeps others out.
    assert "another preparation" in refusal("cifar10", tmp_path / "data", source)
  prepare.prepare("cifar10", tmp_path / "data", source)


def test_a_file_system_without_locks_will_do(small, tmp_path, monkeypatch):
  def flock(file, operation):
    raise OSError(errno.ENOLCK, "no locks")

  monkeypatch.setattr(fcntl, "flock", flock)
  source = write_directory(tmp_path / "source", "cifar10", "binary")
  target = prepare.prepare("cifar10", tmp_path / "data", source)
  assert (target / "dataset_info.json").is_file()
  assert os.listdir(tmp_path / "data/cifar10") == [target.name]


def test_what_another_run_finished_meanwhile_is_kept(small, tmp_path, monkeypatch):
  source = write_directory(tmp_path / "source", "cifar10", "binary")
  theirs = prepare.prepare("cifar10", tmp_path / "theirs", source)
  before = tree(theirs)
  own_directory = prepare._work_directory

  @contextlib.contextmanager
  def late(path):
    with own_directory(path):
      theirs.rename(path.parent / "3.0.2")
      yield

  monkeypatch.setattr(prepare, "_work_directory", late)
  directory = prepare.prepare("cifar10", tmp_path / "data", tmp_path / "no source")
  assert tree(directory) == before


def test_home_directory_is_expanded(small, tmp_path, monkeypatch):
  monkeypatch.setenv("HOME", str(tmp_path))
  monkeypatch.chdir(tmp_path)
  write_directory(tmp_path / "source", "cifar10", "binary")
  directory = prepare.prepare("cifar10", "~/data", "~/source")
  assert directory == tmp_path / "data/cifar10/3.0.2" and directory.is_dir()


KILLED = """
import os, pickle, signal, sys
from minw import prepare
from minw.data import cifar, datasets

data_dir, source, moment, tables = sys.argv[1:]
originals, infos = pickle.load(open(tables, "rb"))
cifar.ORIGINALS.update({k: cifar.Original(*v) for k, v in originals.items()})
datasets._INFOS.update({k: datasets.Info(*v) for k, v in infos.items()})

def kill(*_):
  os.kill(os.getpid(), signal.SIGKILL)

if moment == "record":
  png, images = cifar.encode_png, []
  cifar.encode_png = lambda image: kill() if len(images) == 16 else (
      images.append(0) or png(image))
elif moment == "before the rename":
  os.replace = kill
elif moment == "after the rename":
  replace = os.replace
  os.replace = lambda *paths: (replace(*paths), kill())
prepare.prepare("cifar10", data_dir, source)
"""


@pytest.mark.parametrize("moment", ["record", "before the rename", "after the rename"])
def test_a_killed_run_leaves_nothing_that_looks_finished(
    command, small, moment, tmp_path):
  source = write_directory(tmp_path / "source", "cifar10", "binary")
  tables = tmp_path / "tables"
  tables.write_bytes(pickle.dumps(
      [{k: tuple(v) for k, v in table.items()} for table in small_tables()]))
  data_dir = tmp_path / "data"
  ended = command("killed", data_dir, source, moment, tables, code=KILLED)
  assert ended.code == -signal.SIGKILL, ended.err
  assert (data_dir / "cifar10" / "incomplete.minw").exists()
  if moment == "after the rename":
    datasets.check_available("cifar10", data_dir)
  else:
    with pytest.raises(errors.UsageError):
      datasets.check_available("cifar10", data_dir)
    assert os.listdir(data_dir / "cifar10") == ["incomplete.minw"]
    for file in data_dir.glob("**/*.array_record-*"):
      os.truncate(file, 100)  # What is left of it must not be used.
  directory = prepare.prepare("cifar10", data_dir, source)
  assert os.listdir(data_dir / "cifar10") == ["3.0.2"]
  check_prepared("cifar10", directory)


@pytest.mark.parametrize("name, config", [
    ("cifar10", "cifar_convnet"),
    ("cifar100", "cifar_convnet:dataset=cifar100")])
def test_the_command_says_what_to_do_next(
    small, name, config, tmp_path, monkeypatch, capsys):
  source = write_directory(tmp_path / "source", name, "binary")
  flags = types.SimpleNamespace(
      dataset=name, data_dir=str(tmp_path / "data"), source=str(source),
      partial=False, image_size=None, grayscale=False, seed=0, skip_damaged=False)
  monkeypatch.setattr(prepare.flags, "FLAGS", flags)
  assert not prepare.main()
  lines = capsys.readouterr().out.splitlines()
  train, test = {"cifar10": (11, 4), "cifar100": (8, 5)}[name]
  assert lines == [
      f"{tmp_path}/data/{name}/3.0.2",
      f"  train: {train} images",
      "  validation: 4 images",
      f"  test: {test} images",
      f"Train with: python -m minw.main --config={config} --workdir=runs/{name} "
      f"--config.data_dir={tmp_path}/data",
  ]


def test_the_command_names_a_source_that_is_missing(command, tmp_path):
  code, out, err = command("minw.prepare", "--dataset=cifar10", "--data_dir=x",
                           "--source=y", folder=tmp_path)
  assert (code, out) == (2, "")
  assert err.startswith("error: source='y': cannot be read") and err.count("\n") == 1


# The classes of eight superclasses, among the hundred.
KINDS = {
    "people": "baby boy girl man woman",
    "trees": "maple_tree oak_tree palm_tree pine_tree willow_tree",
    "fish": "aquarium_fish flatfish ray shark trout",
    "reptiles": "crocodile dinosaur lizard snake turtle",
    "vehicles_1": "bicycle bus motorcycle pickup_truck train",
    "vehicles_2": "lawn_mower rocket streetcar tank tractor",
    "insects": "bee beetle butterfly caterpillar cockroach",
    "food_containers": "bottle bowl can cup plate",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", COUNTS)
def test_the_real_data(name, original_data, tmp_path):
  source = original_data(name)
  directory = prepare.prepare(name, tmp_path, source)

  width = 3072 + len(LABELS[name])
  rows = {}
  for split, md5s in REAL_FILES[name].items():
    rows[split] = np.concatenate([
        np.fromfile(next(source.glob(f"**/{file}.bin")), np.uint8).reshape(-1, width)
        for file in md5s])
  order = {
      split: sorted(
          range(len(part)),
          key=lambda i: hashlib.md5(f"{split}{i}".encode()).digest())
      for split, part in rows.items()
  }
  # TFDS's CIFAR begins with this image.
  assert order["train"][0] == 16399
  first = tfds.builder_from_directory(directory).as_data_source("train")[0]
  assert first["id"] == b"train_16399"

  for split, chosen in (
      ("train", rows["train"][order["train"][:45_000]]),
      ("validation", rows["train"][order["train"][45_000:]]),
      ("test", rows["test"][order["test"]]),
  ):
    images, labels = datasets.load(name, split, tmp_path)
    pixels = chosen[:, -3072:].reshape(-1, 3, 32, 32)
    np.testing.assert_array_equal(images.transpose(0, 3, 1, 2), pixels)
    np.testing.assert_array_equal(labels, chosen[:, -3073])
    if split == "train":
      # The constants are those of all 50,000 images.
      info = datasets.info(name)
      scaled = pixels.transpose(1, 0, 2, 3).reshape(3, -1) / 255
      np.testing.assert_allclose(scaled.mean(1), info.mean, atol=5e-4)
      np.testing.assert_allclose(scaled.std(1), info.std, atol=5e-4)

  if name == "cifar100":
    names = tfds.builder_from_directory(directory).info.features["coarse_label"].names
    classes = datasets.info(name).label_names
    for kind, members in KINDS.items():
      of_kind = rows["train"][rows["train"][:, 0] == names.index(kind)]
      assert {classes[i] for i in set(of_kind[:, 1])} == set(members.split())
