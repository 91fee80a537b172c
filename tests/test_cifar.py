"""minw.data.cifar: sources that are incomplete, damaged or hostile are refused."""

import gzip
import os
import pathlib
import tarfile
import tracemalloc

import pytest
from tensorflow_datasets.image_classification import cifar as tfds_cifar

from archives import header
from archives import tar
from cifar_files import COUNTS
from cifar_files import refusal
from cifar_files import write_archive
from cifar_files import write_directory
from minw.data import cifar


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
    b"cnumpy\nload\n(V%s\ntR.",  # From NumPy, but no array.
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


def write_bomb(path: pathlib.Path, size: int) -> None:
  """An archive whose one file expands to `size` bytes, by a factor of 1000."""
  with gzip.open(path, "wb") as file:
    file.write(header("cifar-10-batches-bin/data_batch_1.bin", size))
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
    source.write_bytes(compress(tar(members)))
    message = refusal("cifar10", tmp_path / "data", source)
    assert message.startswith(f"source='{source}': ") and wanted in message
    assert not os.listdir(tmp_path / "data")


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


@pytest.mark.parametrize("name", COUNTS)
def test_archives_are_those_that_tfds_knows(name):
  ours = cifar.ORIGINALS[name]
  known = getattr(tfds_cifar, name.capitalize()).url_infos[ours.url]
  assert (ours.size, ours.sha256) == (known.size, known.checksum)
