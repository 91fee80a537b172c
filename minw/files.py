"""Writes files atomically and durably.

A file is replaced as a whole or stays as it was, and it is on the disk when a function
returns. This module writes all files of minw except those that are appended to. It
needs only the standard library, and packages of `minw.cloud` for gs://.
"""

import contextlib
import errno
import os
import pathlib
import secrets
import stat
from typing import BinaryIO, Iterator

from minw import cloud
from minw import outbox
from minw import paths

# Error numbers of file systems that cannot sync folders, and of unreadable folders.
_CANNOT_SYNC = (errno.EACCES, errno.EBADF, errno.EINVAL, errno.ENOTSUP)


def write(path: str | os.PathLike[str] | cloud.Path, content: str | bytes) -> None:
  """Writes or replaces a file atomically.

  The content is first written to a temporary file in the same folder, whose name no
  other process uses. That file is synced to the disk and then renamed. No reader sees
  half of the content, and a full disk, an interrupt or a power failure leaves the file
  as it was. A process that is killed may leave the temporary file, whose name ends in
  ".part".

  A symbolic link to a file is followed, and a broken link is replaced. Content for a
  device or a pipe, such as /dev/stdout, is written directly into it.

  Args:
    path: Path of the file. Its folder must exist. For a file on gs://, see
      `cloud.Path.put` and `outbox.used`.
    content: Text, which is written in UTF-8, or bytes.

  Raises:
    OSError: The file cannot be written. The error names the file.
  """
  path = paths.at(path)
  data = content.encode() if isinstance(content, str) else content
  if isinstance(path, cloud.Path):
    outbox.put(path, data)
    return
  with naming(path):
    mode = _mode(path)
    if mode is not None and not stat.S_ISREG(mode):
      if stat.S_ISDIR(mode):
        raise IsADirectoryError(
            errno.EISDIR, "a folder is in the place of this file; move it away",
            str(path))
      _write_into(path, data)
      return
    with replacing(path if mode is None else path.resolve()) as file:
      if mode is not None:
        os.chmod(file.fileno(), stat.S_IMODE(mode))
      file.write(data)


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[BinaryIO]:
  """Context with a new file, which replaces `path` at the end as `write` does.

  An error in the context leaves `path` as it was.

  Args:
    path: Path of a file in an existing folder. A symbolic link is replaced.
  """
  part = path.with_name(f"{path.name[:50]}.{secrets.token_hex(8)}.part")
  try:
    with part.open("x+b") as file:
      yield file
      file.flush()
      os.fsync(file.fileno())
    os.replace(part, path)
  except BaseException:
    with contextlib.suppress(OSError):
      part.unlink()
    raise
  sync_folder(path.parent)


def _mode(path: pathlib.Path) -> int | None:
  """Returns the mode (type and permissions) of `path`, or None if it does not exist."""
  try:
    return path.stat().st_mode
  except FileNotFoundError:
    return None


def _write_into(path: pathlib.Path, data: bytes) -> None:
  """Writes to a device or a pipe. Raises OSError for a pipe that no process reads."""
  try:
    number = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
  except OSError as error:
    if error.errno == errno.ENXIO:
      error.strerror = ("a pipe that no process reads is in the place of this file;"
                        " move it away")
    raise
  os.set_blocking(number, True)
  with open(number, "wb") as file:
    file.write(data)


@contextlib.contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
  """Adds the name of `path` to an OSError in this context that names no file."""
  try:
    yield
  except OSError as error:
    error.filename = error.filename or os.fspath(path)
    raise


def sync_folder(path: str | os.PathLike[str]) -> None:
  """Syncs the names in a folder to the disk, if the file system can do that.

  Files on gs:// are durable as soon as they are written.

  Raises:
    OSError: The disk failed.
  """
  if paths.is_url(os.fspath(path)):
    return
  try:
    number = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
      os.fsync(number)
    finally:
      os.close(number)
  except OSError as error:
    if error.errno not in _CANNOT_SYNC:
      raise


def move_folder(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> None:
  """Syncs the files of a complete folder to the disk, and then renames the folder.

  Args:
    source: Path of the folder. No process may write to it.
    target: New path of the folder, on the same file system. It must not exist.

  Raises:
    OSError: A file cannot be synced, or the folder cannot be moved.
  """
  for folder, _, names in os.walk(source):
    for name in names:
      with open(os.path.join(folder, name), "rb") as file:
        os.fsync(file.fileno())
    sync_folder(folder)
  os.replace(source, target)
  sync_folder(pathlib.Path(target).parent)


def remove_parts(folder: str | os.PathLike[str] | cloud.Path) -> None:
  """Removes temporary files that killed processes have left in a folder.

  No process may write to the folder at the same time. On gs:// there are none.
  """
  if paths.is_url(folder):
    return
  for part in pathlib.Path(str(folder)).glob("*.????????????????.part"):
    with contextlib.suppress(OSError):
      part.unlink()
