"""minw.prepare: small CIFAR sources, in every form a user may have them in."""

import contextlib
import fcntl
import gzip
import hashlib
import http.server
import os
import pathlib
import pickle
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import time
import tracemalloc
import types

import numpy as np
import pytest
import tensorflow_datasets as tfds
from tensorflow_datasets.image_classification import cifar as tfds_cifar

from minw import errors
from minw import prepare
from minw.data import datasets
from python2_pickles import dump
from python2_pickles import pickled

# Images in each original file; the last four of the training images validate.
COUNTS = {
    "cifar10": {f"data_batch_{i}": 3 for i in range(1, 6)} | {"test_batch": 4},
    "cifar100": {"train": 12, "test": 5},
}
FOLDERS = {
    "cifar10": {"binary": "cifar-10-batches-bin", "python": "cifar-10-batches-py"},
    "cifar100": {"binary": "cifar-100-binary", "python": "cifar-100-python"},
}
LABELS = {"cifar10": ["labels"], "cifar100": ["coarse_labels", "fine_labels"]}


def records(name: str) -> dict[str, np.ndarray]:
  """File -> rows as in the binary version: label bytes, then 3x32x32 pixels."""
  rng = np.random.default_rng(len(name))
  rows = {}
  for file, count in COUNTS[name].items():
    labels = [rng.integers(0, 10, (count, 1))]
    if name == "cifar100":
      labels = [rng.integers(0, 20, (count, 1)), rng.integers(0, 100, (count, 1))]
    pixels = rng.integers(0, 256, (count, 3072))
    rows[file] = np.concatenate([*labels, pixels], 1).astype(np.uint8)
  return rows


def is_test(file: str) -> bool:
  return file.startswith("test")


def original_files(name: str, version: str) -> dict[str, bytes]:
  """File name -> content."""
  files = {}
  for file, rows in records(name).items():
    keys = LABELS[name]
    if version == "binary":
      files[f"{file}.bin"] = rows.tobytes()
    else:
      content = {b"batch_label": b"some", b"data": rows[:, len(keys):]}
      for i, key in enumerate(keys):
        content[key.encode()] = rows[:, i].tolist()
      files[file] = pickled(dump(content))
  return files


def write_directory(path: pathlib.Path, name: str, version: str) -> pathlib.Path:
  """Writes the extracted archive below `path`; returns its one folder."""
  folder = path / FOLDERS[name][version]
  folder.mkdir(parents=True)
  (folder / "readme.html").write_text("hello")
  for file, content in original_files(name, version).items():
    (folder / file).write_bytes(content)
  return folder


def write_archive(path: pathlib.Path, name: str, version: str) -> pathlib.Path:
  folder = write_directory(path / "packed", name, version)
  with tarfile.open(path / f"{name}.tar.gz", "w:gz") as archive:
    archive.add(folder, folder.name)
  return path / f"{name}.tar.gz"


def small_tables():
  """`prepare._CIFAR` and `datasets._INFOS` for the small sources."""
  originals, infos = {}, {}
  for name in COUNTS:
    rows = records(name)
    md5s = {"train": {}, "test": {}}
    sizes = {"train": -4, "validation": 4, "test": 0}
    for file, part in rows.items():
      split = "test" if is_test(file) else "train"
      md5s[split][file] = hashlib.md5(part.tobytes()).hexdigest()
      sizes[split] += len(part)
    pickles = {file: hashlib.md5(content).hexdigest()
               for file, content in original_files(name, "python").items()}
    originals[name] = prepare._CIFAR[name]._replace(files=md5s, pickle_md5s=pickles)
    infos[name] = datasets._INFOS[name]._replace(splits=sizes)
  return originals, infos


REAL_FILES = {name: prepare._CIFAR[name].files for name in COUNTS}


@pytest.fixture
def small(monkeypatch):
  originals, infos = small_tables()
  for name in COUNTS:
    monkeypatch.setitem(prepare._CIFAR, name, originals[name])
    monkeypatch.setitem(datasets._INFOS, name, infos[name])


def refusal(*arguments) -> str:
  """The message of the error that `prepare` must raise."""
  with pytest.raises(errors.UsageError) as error:
    prepare.prepare(*arguments)
  return str(error.value)


def tree(path: pathlib.Path) -> dict[str, tuple[int, bytes]]:
  """Everything below `path`: time of change and content."""
  return {
      str(p.relative_to(path)): (p.stat().st_mtime_ns, p.read_bytes())
      for p in sorted(path.rglob("*")) if p.is_file()
  }


def check_prepared(name: str, directory: pathlib.Path) -> None:
  """Checks a TFDS directory against the source, read here by other means."""
  builder = tfds.builder_from_directory(directory)
  assert builder.name == name and str(builder.version) == "3.0.2"
  info = builder.info
  own = tfds.builder_cls(name)(data_dir="/nowhere").info  # TFDS's description.
  assert info.description == own.description and info.citation == own.citation
  assert repr(info.features) == repr(own.features)
  assert tuple(info.features["label"].names) == datasets.info(name).label_names
  if name == "cifar100":
    names = info.features["coarse_label"].names
    assert names == sorted(names) and len(names) == 20  # Alphabetical, too.
  for split in ("train", "test"):
    rows = np.concatenate([
        part for file, part in records(name).items()
        if is_test(file) == (split == "test")])
    assert info.splits[split].num_examples == len(rows)
    assert info.splits[split].shard_lengths == [len(rows)]
    file = directory / f"{name}-{split}.array_record-00000-of-00001"
    assert info.splits[split].filepaths == [file] and file.is_file()
    # TFDS orders records by the md5 of split and key, and the key is the index.
    order = sorted(
        range(len(rows)), key=lambda i: hashlib.md5(f"{split}{i}".encode()).digest())
    source = builder.as_data_source(split)
    assert len(source) == len(rows)
    label_count = len(LABELS[name])
    for index, record in zip(order, source):
      assert record.pop("id") == f"{split}_{index:05d}".encode()
      image = rows[index, label_count:].reshape(3, 1024).T.reshape(32, 32, 3)
      np.testing.assert_array_equal(record.pop("image"), image)
      assert record.pop("label") == rows[index, label_count - 1]
      if name == "cifar100":
        assert record.pop("coarse_label") == rows[index, 0]
      assert not record


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


@pytest.mark.parametrize(
    "source", ["missing", "empty directory", "text", "other archive"])
def test_a_wrong_source_is_refused(small, source, tmp_path):
  path = tmp_path / source
  if source == "empty directory":
    path.mkdir()
  elif source == "text":
    path.write_text("no archive")
  elif source == "other archive":
    path = write_archive(tmp_path / "source", "cifar100", "binary")
  message = refusal("cifar10", tmp_path / "data", path)
  assert message.startswith(f"source='{path}'")
  assert not list((tmp_path / "data").rglob("*.*"))


def test_a_missing_file_is_named(small, tmp_path):
  source = write_directory(tmp_path / "source", "cifar10", "binary")
  (source / "data_batch_4.bin").unlink()
  assert refusal("cifar10", tmp_path / "data", source).endswith(
      f"source='{source}': lacks data_batch_4.bin")
  message = refusal("cifar10", tmp_path / "data", source.parent)
  assert message.endswith("lacks cifar-10-batches-bin/data_batch_4.bin")


@pytest.mark.parametrize("version, file", [
    ("binary", "data_batch_3.bin"), ("python", "data_batch_3")])
@pytest.mark.parametrize("how", ["a byte less", "a record less", "another pixel"])
def test_a_damaged_file_is_named(small, version, file, how, tmp_path):
  source = write_directory(tmp_path / "source", "cifar10", version)
  content = bytearray((source / file).read_bytes())
  if how == "another pixel":
    content[5000] ^= 1
  else:
    del content[-1 if how == "a byte less" else -3073:]
  (source / file).write_bytes(content)
  message = refusal("cifar10", tmp_path / "data", source)
  assert f"source='{source}'" in message
  assert f"{file} is damaged or not the original" in message
  assert not list((tmp_path / "data").rglob("*.*"))


@pytest.mark.parametrize("keep", [0.9, 0.2, 0.0])
def test_a_truncated_archive_is_refused(small, keep, tmp_path):
  source = write_archive(tmp_path / "source", "cifar10", "binary")
  os.truncate(source, int(source.stat().st_size * keep))
  assert f"source='{source}'" in refusal("cifar10", tmp_path / "data", source)


@pytest.mark.parametrize("call", [
    b"cos\nsystem\n(V%s\ntR.",
    b"cnumpy\nload\n(V%s\ntR.",  # Of NumPy, but no array.
    b"cbuiltins\nopen\n(V%s\nVw\ntR.",
])
def test_a_pickle_that_calls_functions_is_refused(small, call, tmp_path):
  source = write_directory(tmp_path / "source", "cifar10", "python")
  trace = tmp_path / "trace"
  argument = f"touch {trace}" if b"system" in call else str(trace)
  (source / "data_batch_1").write_bytes(call % argument.encode())
  message = refusal("cifar10", tmp_path / "data", source)
  assert "data_batch_1 is damaged" in message and "it has md5" in message
  assert not trace.exists()


def test_members_of_an_archive_can_not_point_elsewhere(small, tmp_path):
  folder = write_directory(tmp_path / "packed", "cifar10", "binary")
  original = folder / "test_batch.bin"
  original.rename(tmp_path / "elsewhere.bin")
  original.symlink_to(tmp_path / "elsewhere.bin")
  with tarfile.open(tmp_path / "source.tar", "w") as archive:
    archive.add(folder, folder.name)
  message = refusal("cifar10", tmp_path / "data", tmp_path / "source.tar")
  assert message.endswith("lacks cifar-10-batches-bin/test_batch.bin")


def tar_of(members: dict[str, bytes | int]) -> bytes:
  """An archive of files; those given by a size are empty but claim to have it."""
  content = b""
  for name, data in members.items():
    member = tarfile.TarInfo(name)
    member.size = data if isinstance(data, int) else len(data)
    content += member.tobuf()
    if not isinstance(data, int):
      content += data + bytes(-len(data) % 512)
  return content + bytes(1024)


def write_bomb(path: pathlib.Path, size: int) -> None:
  """An archive whose one file expands to `size` bytes, by a factor of 1000."""
  with gzip.open(path, "wb") as file:
    file.write(tar_of({"cifar-10-batches-bin/data_batch_1.bin": size})[:512])
    for _ in range(size >> 20):
      file.write(bytes(1 << 20))


@pytest.mark.parametrize("members, wanted", [
    ({"data_batch_1.bin": 2**34}, "data_batch_1.bin has 17,179,869,184 bytes and may"),
    ({"readme.html": 2**34}, "readme.html has 17,179,869,184 bytes and may"),
    ({"../data_batch_1.bin": b"1"}, "must be the archive of cifar10"),
    ({"/data_batch_1.bin": b"1"}, "must be the archive of cifar10"),
    ({f"{i}": b"" for i in range(101)}, "it holds more than 100 entries"),
    ({f"{i}": bytes(50_000) for i in range(50)}, "source.tar holds more than the"),
    ({"data_batch_1.bin": b"1", "./data_batch_1.bin": b"1"},
     "data_batch_1.bin is there twice"),
    ({"a\x1b[2J": 2**34}, r"a\x1b[2J has"),
])
def test_hostile_archives_are_refused(small, members, wanted, tmp_path):
  for compress in (bytes, gzip.compress):
    source = tmp_path / "source.tar"
    source.write_bytes(compress(tar_of(members)))
    message = refusal("cifar10", tmp_path / "data", source)
    assert message.startswith(f"source='{source}': ") and wanted in message
    assert not os.listdir(tmp_path / "data/cifar10")


def test_an_archive_that_expands_is_not_read_further_than_it_may(small, tmp_path):
  write_bomb(tmp_path / "bomb.tar.gz", 1 << 26)
  tracemalloc.start()
  try:
    message = refusal("cifar10", tmp_path / "data", tmp_path / "bomb.tar.gz")
    assert tracemalloc.get_traced_memory()[1] < 1 << 23
  finally:
    tracemalloc.stop()
  assert "bomb.tar.gz holds more than the" in message


def test_a_directory_with_a_large_file_is_refused(small, tmp_path):
  source = write_directory(tmp_path / "source", "cifar10", "binary")
  os.truncate(source / "data_batch_2.bin", 1 << 40)  # Sparse.
  message = refusal("cifar10", tmp_path / "data", source)
  assert message.startswith(f"source='{source}'")
  assert "data_batch_2.bin holds more than the" in message


def test_a_source_that_never_ends_is_refused(small, tmp_path):
  os.mkfifo(tmp_path / "pipe")
  for path in (tmp_path / "pipe", "/dev/zero"):
    assert "is not a regular file" in refusal("cifar10", tmp_path / "data", path)
  source = write_directory(tmp_path / "source", "cifar10", "binary")
  (source / "data_batch_1.bin").unlink()
  (source / "data_batch_1.bin").symlink_to("/dev/zero")
  assert "lacks data_batch_1.bin" in refusal("cifar10", tmp_path / "data", source)


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
  assert not os.listdir(tmp_path / "data/cifar10")
  usage = usage._replace(free=19 * 3073)
  prepare.prepare("cifar10", tmp_path / "data", source)


def test_a_full_disk_is_reported(small, tmp_path):
  source = write_directory(tmp_path / "source", "cifar10", "binary")
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))  # Like a disk of 10 kB.
  try:
    message = refusal("cifar10", tmp_path / "data", source)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
  assert "must be a directory that can be written to" in message
  assert "File too large" in message
  assert not os.listdir(tmp_path / "data/cifar10")
  prepare.prepare("cifar10", tmp_path / "data", source)


def test_two_at_once_are_refused(small, tmp_path):
  source = write_directory(tmp_path / "source", "cifar10", "binary")
  work = tmp_path / "data/cifar10/incomplete.minw"
  work.mkdir(parents=True)
  with open(work / "lock", "w") as lock:
    fcntl.flock(lock, fcntl.LOCK_SH)  # Even so weak a lock keeps others out.
    assert "another preparation" in refusal("cifar10", tmp_path / "data", source)
  prepare.prepare("cifar10", tmp_path / "data", source)


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
from minw.data import datasets

data_dir, source, moment, tables = sys.argv[1:]
originals, infos = pickle.load(open(tables, "rb"))
prepare._CIFAR.update({k: prepare._Cifar(*v) for k, v in originals.items()})
datasets._INFOS.update({k: datasets.Info(*v) for k, v in infos.items()})

def kill(*_):
  os.kill(os.getpid(), signal.SIGKILL)

if moment == "record":
  png, images = prepare._png, []
  prepare._png = lambda image: kill() if len(images) == 16 else (
      images.append(0) or png(image))
elif moment == "before the rename":
  os.replace = kill
elif moment == "after the rename":
  replace = os.replace
  os.replace = lambda *paths: (replace(*paths), kill())
prepare.prepare("cifar10", data_dir, source)
"""


@pytest.mark.parametrize("moment", ["record", "before the rename", "after the rename"])
def test_a_killed_run_leaves_nothing_that_looks_finished(small, moment, tmp_path):
  source = write_directory(tmp_path / "source", "cifar10", "binary")
  tables = tmp_path / "tables"
  tables.write_bytes(pickle.dumps(
      [{k: tuple(v) for k, v in table.items()} for table in small_tables()]))
  data_dir = tmp_path / "data"
  ended = subprocess.run(
      [sys.executable, "-c", KILLED, data_dir, source, moment, tables], check=False)
  assert ended.returncode == -signal.SIGKILL
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


class Server:
  """A web server on this machine that can fail in several ways.

  Attributes:
    content: what every address has.
    url: an address.
    ranges: the Range header of each request so far, or None.
    break_at: if given, the connection is closed before this byte.
    stall_at: if given, nothing more is sent from this byte on.
    knows_ranges: whether Range headers are honoured.
    status: if given, an error that every request gets.
  """

  def __init__(self, content: bytes):
    self.content = content
    self.ranges = []
    self.break_at = self.stall_at = self.status = None
    self.knows_ranges = True
    self.release = threading.Event()
    outer = self

    class Handler(http.server.BaseHTTPRequestHandler):

      def do_GET(self):
        outer.answer(self)

      def log_message(self, *arguments):
        pass

    self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    self.url = f"http://127.0.0.1:{self.server.server_port}/data/archive.tar.gz"
    self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,))
    self.thread.start()

  def answer(self, request) -> None:
    header = request.headers["Range"]
    self.ranges.append(header)
    if self.status:
      request.send_error(self.status)
      return
    begin = 0
    if header and self.knows_ranges:
      begin = int(header.removeprefix("bytes=").removesuffix("-"))
    end = min(filter(None, (len(self.content), self.break_at, self.stall_at)))
    request.send_response(206 if begin else 200)
    request.send_header("Content-Length", str(len(self.content) - begin))
    request.end_headers()
    request.wfile.write(self.content[begin:end])
    if self.stall_at:
      request.wfile.flush()
      self.release.wait(30)

  def close(self) -> None:
    self.release.set()
    self.server.shutdown()
    self.thread.join()
    self.server.server_close()


@pytest.fixture
def server(small, tmp_path, monkeypatch):
  """The archive of the binary version, which `prepare` will look for there."""
  content = write_archive(tmp_path / "original", "cifar10", "binary").read_bytes()
  served = Server(content)
  monkeypatch.setitem(
      prepare._CIFAR, "cifar10", prepare._CIFAR["cifar10"]._replace(
          url=served.url, size=len(content),
          sha256=hashlib.sha256(content).hexdigest()))
  yield served
  served.close()


def part(tmp_path) -> pathlib.Path:
  return tmp_path / "data/cifar10/incomplete.minw/archive.tar.gz.part"


def test_downloads(server, tmp_path):
  check_prepared("cifar10", prepare.prepare("cifar10", tmp_path / "data"))
  assert server.ranges == [None]
  assert os.listdir(tmp_path / "data/cifar10") == ["3.0.2"]


def test_an_interrupted_download_is_resumed(server, tmp_path):
  half = len(server.content) // 2
  server.break_at = half
  message = refusal("cifar10", tmp_path / "data")
  assert f"{server.url}: download failed after {half:,} of" in message
  assert "--source=PATH" in message
  assert part(tmp_path).read_bytes() == server.content[:half]
  assert "is in use" not in refusal("cifar10", tmp_path / "data")  # No byte more.
  server.break_at = None
  check_prepared("cifar10", prepare.prepare("cifar10", tmp_path / "data"))
  assert server.ranges == [None, f"bytes={half}-", f"bytes={half}-"]
  assert os.listdir(tmp_path / "data/cifar10") == ["3.0.2"]


def test_a_server_without_ranges_is_read_from_the_start(server, tmp_path):
  server.break_at = len(server.content) // 2
  refusal("cifar10", tmp_path / "data")
  server.break_at, server.knows_ranges = None, False
  check_prepared("cifar10", prepare.prepare("cifar10", tmp_path / "data"))


def test_a_finished_download_is_not_fetched_again(server, tmp_path):
  part(tmp_path).parent.mkdir(parents=True)
  part(tmp_path).write_bytes(server.content)
  check_prepared("cifar10", prepare.prepare("cifar10", tmp_path / "data"))
  assert not server.ranges


def test_a_wrong_checksum_is_refused_and_forgotten(server, tmp_path):
  good = server.content
  server.content = good[:-1] + bytes([good[-1] ^ 1])
  message = refusal("cifar10", tmp_path / "data")
  assert hashlib.sha256(server.content).hexdigest() in message
  assert not os.listdir(tmp_path / "data/cifar10")
  server.content = good
  check_prepared("cifar10", prepare.prepare("cifar10", tmp_path / "data"))
  assert server.ranges == [None, None]


def test_a_longer_file_is_not_read_to_its_end(server, tmp_path):
  server.content += bytes(1 << 20)
  check_prepared("cifar10", prepare.prepare("cifar10", tmp_path / "data"))


def test_an_error_of_the_server_is_reported(server, tmp_path):
  server.status = 404
  message = refusal("cifar10", tmp_path / "data")
  assert server.url in message and "404" in message and "--source=PATH" in message
  assert not os.listdir(tmp_path / "data/cifar10")


def test_a_server_that_stalls_is_given_up(server, tmp_path, monkeypatch):
  monkeypatch.setattr(prepare, "_TIMEOUT", 0.2)
  server.stall_at = 1000
  start = time.monotonic()
  assert "timed out" in refusal("cifar10", tmp_path / "data")
  assert time.monotonic() - start < 15
  assert part(tmp_path).read_bytes() == server.content[:1000]


def test_no_network_is_reported(small, tmp_path, monkeypatch):
  with socket.create_server(("127.0.0.1", 0)) as free:
    port = free.getsockname()[1]  # Nobody listens there, once closed.
  monkeypatch.setitem(
      prepare._CIFAR, "cifar10",
      prepare._CIFAR["cifar10"]._replace(url=f"http://127.0.0.1:{port}/a.tar.gz"))
  message = refusal("cifar10", tmp_path / "data")
  assert "refused" in message and "--source=PATH" in message


def test_a_full_disk_is_reported_in_a_download(server, tmp_path):
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
  try:
    message = refusal("cifar10", tmp_path / "data")
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
  assert message.startswith(f"data_dir='{tmp_path}/data'")


@pytest.mark.parametrize("name", COUNTS)
def test_archives_are_those_that_tfds_knows(name):
  ours = prepare._CIFAR[name]
  known = getattr(tfds_cifar, name.capitalize()).url_infos[ours.url]
  assert (ours.size, ours.sha256) == (known.size, known.checksum)


@pytest.mark.parametrize("name, config", [
    ("cifar10", "cifar_convnet"),
    ("cifar100", "cifar_convnet:dataset=cifar100")])
def test_the_command_says_what_to_do_next(
    small, name, config, tmp_path, monkeypatch, capsys):
  source = write_directory(tmp_path / "source", name, "binary")
  flags = types.SimpleNamespace(
      dataset=name, data_dir=str(tmp_path / "data"), source=str(source),
      partial=False)
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


@pytest.mark.parametrize("arguments, expected", [
    ([], "dataset"),
    (["--dataset=digits", "--data_dir=x"], "dataset='digits'"),
    (["--dataset=cifar10", "--data_dir=x", "--source=x"], "source='x'"),
    (["--dataset=cifar10", "--datadir=x"], "datadir"),
])
def test_the_command_reports_errors_in_one_line(arguments, expected, tmp_path):
  ended = subprocess.run(
      [sys.executable, "-m", "minw.prepare", *arguments], cwd=tmp_path,
      capture_output=True, text=True, check=False)
  assert ended.returncode == 2
  assert expected in ended.stderr and ended.stderr.startswith("error: ")
  assert len(ended.stderr.splitlines()) == 1 and not ended.stdout


# Of the hundred classes, those of eight superclasses.
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
