"""Copies data sets from gs:// to this machine, because their records are read singly.

A step of training reads records from all over the files. From gs://, each would be a
request of its own. Therefore the files of a split are copied when it is opened first.

The copy is in a folder of the cache that is named after the generations of all objects
of the data set. When the data change in the bucket, they are copied to another folder,
and a process that still reads the old copy is not disturbed. A file gets its name in
the cache after its checksum was found right, and the generation of its object as the
time of its last change. A file with another size is never used. One with another time
is used only if its checksum is right.
"""

import base64
from concurrent import futures
import contextlib
import errno
import fcntl
import functools
import hashlib
import json
import logging
import os
import pathlib
import shutil
from typing import Any, BinaryIO, Iterator, Mapping, NamedTuple, Sequence

from minw import cloud
from minw import errors
from minw import files
from minw import paths
from minw.data import tfds_directory

_log = logging.getLogger(__name__)

_AT_ONCE = 8  # Number of files that are copied at a time.
_BLOCK = 2**20  # Number of bytes that enter a checksum at a time.
_DESCRIPTIONS = (".json", ".txt")  # Endings of files that describe a data set.
_SOURCE = "source.txt"  # File with the URL of which a folder is a copy.


class Mirror(NamedTuple):
  """Directory of prepared data sets on gs://, with copies on this machine.

  Attributes:
    url: The directory, gs://BUCKET/NAME.
    cache_dir: Directory of the copies.
  """

  url: str
  cache_dir: str

  def __fspath__(self) -> str:
    return self.url

  def __repr__(self) -> str:
    return repr(self.url)


class _Copy(NamedTuple):
  """The copy of a version of a data set.

  Attributes:
    source: Its folder on gs://.
    directory: Its folder on this machine.
    objects: Objects in `source`, by name.
  """

  source: cloud.Path
  directory: pathlib.Path
  objects: Mapping[str, cloud.Listed]


def place(data_dir: str | os.PathLike[str], cache_dir: str) -> str | os.PathLike[str]:
  """Returns a `Mirror` if `data_dir` is on gs://, and otherwise `data_dir` itself.

  Args:
    data_dir: Directory of prepared data sets, as a user wrote it.
    cache_dir: Directory for copies, as a user wrote it.

  Raises:
    errors.UsageError: The path cannot be expanded.
  """
  try:
    expanded = paths.expand(data_dir, remote=True)
  except ValueError as error:
    raise errors.UsageError(f"data_dir={os.fspath(data_dir)!r}: {error}") from error
  if not paths.is_url(expanded):
    return data_dir
  return Mirror(expanded, os.path.abspath(paths.expand(cache_dir)))


def newest_version(mirror: Mirror, name: str) -> pathlib.Path | None:
  """Returns the local directory of the newest version of a data set.

  Its description is copied to this directory. The bucket is asked only once for each
  data set.

  Returns:
    The directory, or None if there is no such data set in the bucket.

  Raises:
    errors.UsageError: The bucket cannot be read, or the cache cannot be written.
  """
  if not tfds_directory.is_name(name):
    return None
  with contextlib.suppress(LookupError):
    return _described(mirror, name).directory
  return None


def fetch(mirror: Mirror, name: str, names: Sequence[str]) -> None:
  """Copies files of the newest version of a data set, unless they are there already.

  Args:
    mirror: Directory of the data set.
    name: Name of the data set, which is there.
    names: Names of the files.

  Raises:
    errors.UsageError: The bucket cannot be read, a file is not there, or the cache
      cannot be written or has too little space.
  """
  _fetch(mirror, _described(mirror, name), names)


def prepare_command(mirror: Mirror, name: str, command: str) -> str:
  """Returns the shell command that prepares a data set and copies it to the bucket.

  Args:
    mirror: Directory of the data set.
    name: Name of the data set.
    command: Command that prepares it in the folder DIR.
  """
  return f"{command} && gcloud storage cp --recursive DIR/{name} {mirror.url}/"


def source_of(directory: pathlib.Path) -> str | None:
  """Returns the URL of which the directory of a data set is a copy, or None."""
  try:
    return (directory.parent.parent / _SOURCE).read_text().strip()
  except (OSError, UnicodeDecodeError):
    return None


@functools.lru_cache(maxsize=64)
def _described(mirror: Mirror, name: str) -> _Copy:
  """Copies the description of a data set. Raises LookupError if there is none."""
  with _refusing(mirror):
    source = tfds_directory.newest(
        (cloud.Path(mirror.url) / name).iterdir())
    if source is None:
      raise LookupError(name)
    objects = source.listed()
    generations = sorted((key, found.generation) for key, found in objects.items())
    digest = hashlib.sha256(json.dumps([str(source), generations]).encode())
    folder = pathlib.Path(mirror.cache_dir, f"{name}-{digest.hexdigest()[:16]}")
    directory = folder / name / source.name
    directory.mkdir(parents=True, exist_ok=True)
    if source_of(directory) != str(source):
      files.write(folder / _SOURCE, f"{source}\n")
  copy = _Copy(source, directory, objects)
  _fetch(mirror, copy, [key for key in objects if key.endswith(_DESCRIPTIONS)])
  return copy


def _fetch(mirror: Mirror, copy: _Copy, names: Sequence[str]) -> None:
  """Copies files; see `fetch`."""
  with _refusing(mirror):
    for name in names:
      if name not in copy.objects:
        raise errors.UsageError(
            f"data_dir={mirror.url!r}: there is no {copy.source / name}")
    if not _missing(copy, names):
      return
    with _locked(copy.directory.parent.parent):
      names = _missing(copy, names)  # Another process may have copied some meanwhile.
      files.remove_parts(copy.directory)
      size = sum(copy.objects[name].size for name in names)
      free = shutil.disk_usage(copy.directory).free
      errors.check(size <= free, "config.cache_dir", mirror.cache_dir,
                   f"a directory with {size / 1e6:,.1f} MB of free space for"
                   f" {copy.source}: {free / 1e6:,.1f} MB are there")
      _log.info("copying %d files, %.1f MB, from %s to %s", len(names), size / 1e6,
                copy.source, copy.directory)
      pool = futures.ThreadPoolExecutor(_AT_ONCE)
      try:
        for done in [pool.submit(_copy_file, copy, name) for name in names]:
          done.result()
      finally:
        pool.shutdown(cancel_futures=True)


def _missing(copy: _Copy, names: Sequence[str]) -> list[str]:
  """Returns the names of the files that are not copied, or are not as they were."""
  return [name for name in names
          if not _is_whole(copy.directory / name, copy.objects[name])]


def _is_whole(path: pathlib.Path, expected: cloud.Listed) -> bool:
  """Returns whether a file is the copy of an object."""
  try:
    found = path.stat()
    if found.st_size != expected.size:
      return False
    if found.st_mtime_ns == _time_of(expected):
      return True
    with path.open("rb") as file:
      if _crc32c(file) != expected.crc32c:
        return False
  except FileNotFoundError:
    return False
  with contextlib.suppress(OSError):  # The file may belong to another user.
    _mark(path, expected)
  return True


def _copy_file(copy: _Copy, name: str) -> None:
  """Copies an object to a file, which gets its name after its checksum was checked."""
  expected = copy.objects[name]
  with files.naming(copy.directory / name), files.replacing(
      copy.directory / name) as file:
    (copy.source / name).download(expected.generation, file)
    file.seek(0)
    if _crc32c(file) != expected.crc32c:
      raise OSError(errno.EIO, "what was received has another checksum than the object",
                    str(copy.source / name))
    file.flush()  # No later write changes the time.
    _mark(file.fileno(), expected)


def _mark(file: pathlib.Path | int, found: cloud.Listed) -> None:
  """Marks a file, of which this is the path or the number, as the copy of an object."""
  os.utime(file, ns=(_time_of(found), _time_of(found)))


def _time_of(found: cloud.Listed) -> int:
  """Returns the time in ns that marks a copy: a generation counts microseconds."""
  return 1000 * found.generation


def _crc32c(file: BinaryIO) -> str:
  """Returns the checksum of a file, from its position on, as the service writes it."""
  import google_crc32c  # It comes with google-cloud-storage.

  checksum: Any = google_crc32c.Checksum()
  while block := file.read(_BLOCK):
    checksum.update(block)
  return base64.b64encode(checksum.digest()).decode()


@contextlib.contextmanager
def _locked(folder: pathlib.Path) -> Iterator[None]:
  """Context in which no other process copies to a folder.

  On a file system without locks, several processes may copy the same files. Each file
  is nevertheless whole.
  """
  with open(folder / "lock", "a") as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      _log.info("waiting for another process, which copies data to %s", folder)
      fcntl.flock(file, fcntl.LOCK_EX)
    except OSError:
      pass
    yield


@contextlib.contextmanager
def _refusing(mirror: Mirror) -> Iterator[None]:
  """Turns errors of the bucket and of the cache into errors of the fields."""
  try:
    yield
  except OSError as error:
    if paths.is_url(error.filename or ""):
      raise errors.UsageError(
          f"data_dir={mirror.url!r} cannot be copied: {error}") from error
    raise errors.UsageError(f"config.cache_dir={mirror.cache_dir!r} cannot be written"
                            f" to: {error}") from error
