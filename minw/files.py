"""Writing of files: whole or not at all, and on the disk when it returns.

Every file that minw leaves is written here, except those that grow by being appended
to. This module needs the standard library alone.
"""

import contextlib
import errno
import os
import pathlib
import secrets
import stat
from typing import Iterator

# Errors of file systems that cannot sync folders, and of folders that may not be read.
_CANNOT_SYNC = (errno.EACCES, errno.EBADF, errno.EINVAL, errno.ENOTSUP)


def write(path: str | os.PathLike[str], content: str | bytes) -> None:
  """Writes or replaces a file in one move.

  The content is written to a file beside it of a name that no other process uses,
  synced to the disk, and renamed. No reader sees half of it, and a full disk, an
  interrupt or a power failure leaves the file as it was. A process that is killed may
  leave the other file, whose name ends in ".part".

  A symbolic link to a file is followed; one that leads nowhere is replaced. What is
  neither file nor link, such as /dev/stdout or a pipe, is written to as it is.

  Args:
    path: Path of the file. Its folder exists.
    content: Text, which is written in UTF-8, or bytes.

  Raises:
    OSError: The file cannot be written. The error names it.
  """
  path = pathlib.Path(path)
  data = content.encode() if isinstance(content, str) else content
  with naming(path):
    mode = _mode(path)
    if mode is not None and not stat.S_ISREG(mode):
      if stat.S_ISDIR(mode):
        raise IsADirectoryError(
            errno.EISDIR, "a folder is in the place of this file; move it away",
            str(path))
      _write_into(path, data)
      return
    target = path if mode is None else path.resolve()
    part = target.with_name(f"{target.name[:50]}.{secrets.token_hex(8)}.part")
    try:
      with part.open("xb") as file:
        if mode is not None:
          os.chmod(file.fileno(), stat.S_IMODE(mode))
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
      os.replace(part, target)
    except BaseException:
      with contextlib.suppress(OSError):
        part.unlink()
      raise
    sync_folder(target.parent)


def _mode(path: pathlib.Path) -> int | None:
  """The kind and permissions of what is at `path`; None if there is nothing."""
  try:
    return path.stat().st_mode
  except FileNotFoundError:
    return None


def _write_into(path: pathlib.Path, data: bytes) -> None:
  """Writes to a device or pipe; a pipe that no process reads is an error."""
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
  """Inside this context, an OSError that names no file gets the name of `path`."""
  try:
    yield
  except OSError as error:
    error.filename = error.filename or os.fspath(path)
    raise


def sync_folder(path: str | os.PathLike[str]) -> None:
  """Brings the names in a folder to the disk, where the file system can do that.

  Raises:
    OSError: The disk failed.
  """
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
  """Gives a finished folder its name, after all that is in it is on the disk.

  Args:
    source: Folder that is complete and that nothing writes to any more.
    target: Its new path, on the same file system, where nothing is yet.

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


def remove_parts(folder: str | os.PathLike[str]) -> None:
  """Removes what killed processes left of `write`; no process may be writing there."""
  for part in pathlib.Path(folder).glob("*.????????????????.part"):
    with contextlib.suppress(OSError):
      part.unlink()
