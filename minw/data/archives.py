"""Tar archives of unknown origin: what they may hold, and how much is read of them."""

import tarfile
from typing import Any, BinaryIO, Iterator

from minw import text

# Most bytes that tarfile may read at once: extended headers are as long as they claim.
_LARGEST_HEADER = 2**20


class _Window:
  """A part of a file as a file of its own, of which little is read at once."""

  def __init__(self, file: BinaryIO, start: int, size: int):
    self._file, self._start, self._end = file, start, start + size
    self.seek(0)

  def tell(self) -> int:
    return self._file.tell() - self._start

  def seek(self, position: int) -> None:
    self._file.seek(self._start + position)

  def read(self, size: int) -> bytes:
    if not 0 <= size <= _LARGEST_HEADER:
      raise tarfile.ReadError(f"it has a header of {size:,} bytes")
    return self._file.read(max(0, min(size, self._end - self._file.tell())))


def files(
    file: BinaryIO,
    *,
    largest: int,
    most: int,
    start: int = 0,
    size: int | None = None,
) -> Iterator[tuple[str, int, int]]:
  """The regular files in a tar archive that is not compressed.

  Directories are passed over. Links and devices are, too: they are never followed.
  All checks of a file precede the first use of its content.

  Args:
    file: The file with the archive, open for reading.
    largest: Most bytes that one file in the archive may have.
    most: Most entries that the archive may have, of any kind.
    start: Position of the archive in the file.
    size: Bytes of the archive; all from `start` on if None.

  Returns:
    An iterator of (name, position of the content in `file`, size in bytes).

  Raises:
    tarfile.TarError: The archive is damaged or has too many entries, or a file in it is
      too large, sparse or cut off. The message names the file in the archive.
  """
  if size is None:
    size = file.seek(0, 2) - start
  window: Any = _Window(file, start, size)  # It has what tarfile uses of a file.
  try:
    with tarfile.open(fileobj=window, mode="r:") as archive:
      for number, member in enumerate(archive):
        if number >= most:
          raise tarfile.TarError(f"it holds more than {most:,} entries")
        _check(member, largest, size)
        if member.isfile():
          yield member.name, start + member.offset_data, member.size
      window.seek(archive.offset)
      if window.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.TarError("it is damaged, or cut off: its end is not marked")
  except tarfile.TarError:
    raise
  except Exception as error:  # From fields that tarfile does not expect.
    raise tarfile.ReadError(str(error) or type(error).__name__) from error


def _check(member: tarfile.TarInfo, largest: int, total: int) -> None:
  name = text.printable(member.name)
  if member.issparse():
    raise tarfile.TarError(f"{name} is sparse")
  if not 0 <= member.size <= largest:
    raise tarfile.TarError(
        f"{name} has {member.size:,} bytes and may have {largest:,} at most")
  if member.isfile() and member.offset_data + member.size > total:
    raise tarfile.TarError(f"{name} is cut off")
