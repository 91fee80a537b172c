"""minw.data.mirror: data sets on gs:// are copied whole, once, and checked."""

import collections
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest

import gcs
from minw import config as config_lib
from minw import errors
from minw import evaluate
from minw.data import datasets
from minw.data import mirror
from minw.data import tfds_directory
from minw.experiment import Experiment
from own_images import write_tfds
from short_runs import tiny_config

TRAIN, TEST = (f"mnist-{split}.array_record-00000-of-00001"
               for split in ("train", "test"))


@pytest.fixture(scope="module")
def local(tmp_path_factory):
  """A data_dir with stand-ins for MNIST and for images that differ in size."""
  folder = tmp_path_factory.mktemp("local")
  write_tfds(folder, "mnist", (28, 28, 1), {"train": 20, "test": 6})
  write_tfds(folder, "sizes", (None, None, 1), {"train": 9, "validation": 3, "test": 3})
  return folder


@pytest.fixture
def service(emulator):
  emulator.requests.clear()
  yield emulator
  emulator.before = lambda request: None


@pytest.fixture
def remote(service, local, request, tmp_path):
  """A `Mirror` of the data sets, which this test has for itself."""
  url = f"gs://bucket/{request.node.name.partition('[')[0]}"
  for path in local.rglob("*"):
    if path.is_file():
      service.write(f"{url.removeprefix('gs://bucket/')}/{path.relative_to(local)}",
                    path.read_bytes())
  service.requests.clear()
  return mirror.place(url, str(tmp_path / "cache"))


def forget(remote):
  """Moves the cache, and returns its place, for which the bucket is asked again."""
  moved = f"{remote.cache_dir}-moved"
  os.rename(remote.cache_dir, moved)
  return mirror.place(remote.url, moved)


def fetched(service):
  """Number of downloads by the name of the file."""
  return collections.Counter(request.name.rpartition("/")[2]
                             for request in service.requests if request.kind == "read")


def assert_same(found, data_dir, name="mnist", splits=("train", "validation", "test")):
  for split in splits:
    for a, b in zip(datasets.load(name, split, found),
                    datasets.load(name, split, data_dir), strict=True):
      np.testing.assert_array_equal(a, b)


def copies(remote):
  """The files of MNIST in the cache, by name."""
  return {path.name: path for path in pathlib.Path(remote.cache_dir).glob(
      "mnist-*/mnist/1.2.0/*")}


def test_a_place_on_this_machine_stays_as_it_is(tmp_path):
  for place in ("~/data", str(tmp_path), tmp_path, "a b"):
    assert mirror.place(place, "cache") is place
  with pytest.raises(errors.UsageError, match="^data_dir='s3://a': .*gs://BUCKET"):
    mirror.place("s3://a", "cache")


def test_what_is_needed_is_copied_once(service, remote, local):
  assert_same(remote, local, splits=["test"])
  assert datasets.info("mnist", remote)[1:] == datasets.info("mnist", local)[1:]
  described = {"dataset_info.json": 1, "features.json": 1, "label.labels.txt": 1}
  # Their mean is measured, for which the training images are needed.
  assert fetched(service) == {**described, TRAIN: 1, TEST: 1}
  for name, path in copies(remote).items():
    assert path.read_bytes() == (local / "mnist/1.2.0" / name).read_bytes()
  datasets.check_available("mnist", remote)
  assert_same(remote, local)
  labels = datasets.load("mnist", "train", local)[1]
  assert datasets.class_counts(datasets.info("mnist", remote), remote).tolist() == [
      (labels == i).sum() for i in range(3)]
  assert len(service.requests) < 20 and sum(fetched(service).values()) == 5
  again = forget(remote)
  service.requests.clear()
  assert_same(again, local)
  assert not fetched(service) and len(service.requests) <= 3


def test_only_the_split_that_is_opened_is_copied(service, remote):
  mirror.newest_version(remote, "mnist")
  assert TEST not in fetched(service) and TRAIN not in fetched(service)
  mirror.fetch(remote, "mnist", [TEST])
  assert TRAIN not in fetched(service) and copies(remote).keys() == {
      "dataset_info.json", "features.json", "label.labels.txt", TEST}


@pytest.mark.parametrize("damage", ["cut", "flipped", "emptied", "longer", "gone"])
def test_a_damaged_copy_is_replaced(service, remote, local, damage):
  datasets.check_available("mnist", remote)
  path = copies(remote)[TRAIN]
  content, time = path.read_bytes(), path.stat().st_mtime_ns
  if damage == "gone":
    path.unlink()
  else:
    path.write_bytes({
        "cut": content[:-1], "emptied": b"", "longer": content + b"\0",
        "flipped": content[:900] + bytes([content[900] ^ 1]) + content[901:]}[damage])
  if damage == "cut":
    os.utime(path, ns=(time, time))
  service.requests.clear()
  assert_same(remote, local)
  assert fetched(service) == {TRAIN: 1} and path.read_bytes() == content


def test_a_copy_with_another_time_is_checked(service, remote, local):
  datasets.check_available("mnist", remote)
  path = copies(remote)[TRAIN]
  before = path.stat().st_mtime_ns
  os.utime(path)
  service.requests.clear()
  assert_same(remote, local)
  assert not fetched(service) and path.stat().st_mtime_ns == before


def test_changed_data_are_another_copy(service, remote, local):
  datasets.check_available("mnist", remote)
  before = {path: path.read_bytes() for path in copies(remote).values()}
  folder = remote.url.removeprefix("gs://bucket/")
  service.write(f"{folder}/mnist/1.2.0/{TRAIN}",
                (local / "mnist/1.2.0" / TRAIN).read_bytes())
  assert_same(remote, local)  # This process still uses the first copy.
  again = forget(remote)
  assert_same(again, local)
  assert fetched(service)[TRAIN] == 2
  folders = sorted(pathlib.Path(again.cache_dir).iterdir())
  assert len(folders) == 2
  for path, content in before.items():
    kept = again.cache_dir + str(path).removeprefix(remote.cache_dir)
    assert pathlib.Path(kept).read_bytes() == content
  for path in folders:
    assert (path / "source.txt").read_text() == f"{remote.url}/mnist/1.2.0\n"


def test_the_newest_version_is_copied(service, remote):
  folder = remote.url.removeprefix("gs://bucket/")
  for version in ("1.10.0", "1.9.0", "2.x"):
    service.write(f"{folder}/mnist/{version}/dataset_info.json", b"{}")
  assert mirror.newest_version(remote, "mnist").name == "1.10.0"


def test_what_was_received_is_checked(remote, monkeypatch):
  from minw import cloud

  download = cloud.Path.download

  def damaging(path, generation, file):
    download(path, generation, file)
    if path.name == TEST:
      file.seek(100)
      file.write(b"?")

  monkeypatch.setattr(cloud.Path, "download", damaging)
  with pytest.raises(errors.UsageError, match=f"^data_dir='{remote.url}' cannot be "
                     f"copied: .*another checksum.*{TEST}"):
    datasets.check_available("mnist", remote)
  assert TRAIN in copies(remote) and TEST not in copies(remote)
  assert not [name for name in copies(remote) if name.endswith(".part")]


_LOAD = """
import sys
from minw.data import datasets, mirror
images, labels = datasets.load("mnist", "train", mirror.place(*sys.argv[1:]))
print(images.sum(), labels.tolist())
"""


def start(remote):
  return subprocess.Popen(
      [sys.executable, "-c", _LOAD, remote.url, remote.cache_dir], text=True,
      env=os.environ | {"PYTHONPATH": str(gcs.ROOT)}, stdout=subprocess.PIPE)


def test_processes_share_a_copy(service, remote, local):
  images, labels = datasets.load("mnist", "train", local)
  processes = [start(remote) for _ in range(3)]
  outputs = {process.communicate(timeout=300)[0] for process in processes}
  assert outputs == {f"{images.sum()} {labels.tolist()}\n"}
  assert set(fetched(service).values()) == {1}


def test_a_killed_process_leaves_nothing_that_is_used(service, remote, local):
  process = start(remote)

  def kill(request):
    if request.kind == "read" and request.name.endswith(TRAIN):
      process.kill()
      return 503
    return None

  service.before = kill
  assert process.communicate(timeout=300)[0] == ""
  assert process.returncode == -signal.SIGKILL
  assert TRAIN not in copies(remote)
  assert [name for name in copies(remote) if name.startswith(TRAIN[:20])]
  service.before = lambda request: None
  assert_same(remote, local)
  assert not [name for name in copies(remote) if name.endswith(".part")]


def test_batches_of_streamed_data(remote, local):
  def batches(data_dir, **changes):
    config = config_lib.default_config()
    config.update(
        dataset="sizes", data_dir=str(data_dir), crop_size=8, eval_resize=8,
        conv_widths=(8,), dense_widths=(), batch_size=2, eval_batch_size=2,
        **changes)
    data = Experiment(config).data
    found = data.train_batches(data.load("train"), 0)
    return [jax.device_get(next(found)[0]) for _ in range(6)]

  for workers in (0, 1):
    found = batches(remote.url, cache_dir=remote.cache_dir, data_workers=workers)
    jax.tree.map(np.testing.assert_array_equal, found, batches(local))


def test_refusals(service, remote, tmp_path, monkeypatch):
  def refused(name="mnist", place=remote):
    with pytest.raises(errors.UsageError) as error:
      datasets.check_available(name, place)
    assert "\n" not in str(error.value)
    return str(error.value)

  cache = str(tmp_path / "x")
  assert "there is no such bucket: 'gs://absent'" in refused(
      "cifar10", mirror.place("gs://absent/data", cache))
  assert refused("cifar10") == (
      f"data_dir='{remote.url}': must be a directory that holds cifar10, which this"
      " command prepares: python -m minw.prepare --dataset=cifar10 --data_dir=DIR &&"
      f" gcloud storage cp --recursive DIR/cifar10 {remote.url}/")
  assert "'absent' does not exist" in refused("absent")
  (tmp_path / "file").touch()
  assert f"config.cache_dir='{tmp_path}/file/x' cannot be written to: " in refused(
      place=mirror.place(remote.url, str(tmp_path / "file/x")))
  service.before = lambda request: 403
  assert "denies access" in refused(place=mirror.place(remote.url, cache))
  service.before = lambda request: None
  datasets.info("mnist", remote)
  monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(
      10**6, 10**6 - 10, 10))
  assert "free space" in refused(place=mirror.place(remote.url, cache))
  monkeypatch.undo()
  folder = remote.url.removeprefix("gs://bucket/")
  described = json.loads(service.read(f"{folder}/mnist/1.2.0/dataset_info.json"))
  described["splits"][0]["shardLengths"].append("1")
  service.write(f"{folder}/mnist/1.2.0/dataset_info.json",
                json.dumps(described).encode())
  assert "there is no gs://bucket/" in refused(place=mirror.place(remote.url, cache))


def test_damage_in_the_bucket_is_told_of_the_bucket(service, remote):
  folder = f"{remote.url.removeprefix('gs://bucket/')}/mnist/1.2.0"
  service.write(f"{folder}/{TEST}", service.read(f"{folder}/{TEST}")[:-100])
  with pytest.raises(errors.UsageError, match=(
      f"^data_dir: {remote.url}/mnist/1.2.0, of which .* is a copy, is unusable: .*"
      " prepare mnist again on one machine")):
    datasets.load("mnist", "test", remote)


def test_commands(service, remote, command, tmp_path):
  """The config of a run keeps the place in the bucket."""
  from short_runs import write_config

  write_config(tmp_path / "config.py", tiny_config(
      dataset="mnist", data_dir=remote.url, cache_dir=remote.cache_dir, crop_size=24,
      batch_size=6, eval_batch_size=2, num_epochs=1))
  run = lambda *argv: command(*argv, folder=tmp_path, env=service.environment)
  found = run("minw.main", "--config=config.py", "--workdir=run", "--quiet")
  assert found.code == 0, found.err
  status = json.loads(found.out)
  assert json.loads((tmp_path / "run/config.json").read_text())["data_dir"] == (
      remote.url)
  assert set(fetched(service).values()) == {1}
  result = evaluate.evaluate_workdir(str(tmp_path / "run"))
  assert result["accuracy"] == status["test_accuracy"]
  other = run("minw.main", "--config=config.py", "--workdir=run2",
              "--config.data_dir=gs://absent/data")
  assert other.code == 2 and other.err.count("\n") == 1 and not other.out
  assert "there is no such bucket: 'gs://absent'" in other.err
  assert not (tmp_path / "run2").exists()


def test_newest():
  names = ("1.9.0", "1.10.0", "1.2.0", "x", "1.10", "incomplete.2.0.0")
  assert tfds_directory.newest(map(pathlib.Path, names)) == pathlib.Path("1.10.0")
  assert tfds_directory.newest([pathlib.Path("x")]) is None
