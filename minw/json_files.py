"""Reads JSON files that minw has written, and reports damage in one line.

A disk, another program or a person may have truncated, overwritten or replaced a file
since it was written. Whatever a file holds, reading it raises no error other than
`Damaged`. Devices and pipes, which may never end, are not read.
"""

import json
import os
import pathlib
import stat
import sys
from typing import Any, Callable
import zlib

from minw import cloud
from minw import errors
from minw import paths

Path = str | os.PathLike[str] | cloud.Path


class Damaged(errors.UsageError):
  """A file that minw has written is damaged.

  Attributes:
    why: A clause that describes the damage.
  """

  def __init__(self, path: Path, why: str):
    super().__init__(f"{path} is damaged: {why}")
    self.why = why

  def add(self, remedy: str) -> None:
    """Adds a remedy to the message."""
    self.args = (f"{self}; {remedy}",)


def read_object(
    path: Path, check: Callable[[dict[str, Any]], None] | None = None
) -> dict[str, Any] | None:
  """Reads a file that holds one JSON object.

  Args:
    path: Path of the file.
    check: Function that raises ValueError with a reason if an object is not valid.

  Returns:
    The object, or None if there is no file.

  Raises:
    Damaged: The path is not that of a regular file, or the file does not hold a valid
      object.
  """
  text = read_text(path)
  if text is None:
    return None
  try:
    return _checked(text, check)
  except ValueError as error:
    raise Damaged(path, str(error)) from error


def read_lines(
    path: Path, check: Callable[[dict[str, Any]], None] | None = None
) -> list[dict[str, Any]]:
  """Reads a file with a JSON object on each line.

  A last line without a line break is ignored: the process that wrote it was killed.

  Args:
    path: Path of the file.
    check: Function that raises ValueError with a reason if the object of a line is not
      valid.

  Returns:
    The objects. The list is empty if there is no file.

  Raises:
    Damaged: The path is not that of a regular file, or a line does not hold a valid
      object.
  """
  lines = []
  for number, line in enumerate((read_text(path) or "").split("\n")[:-1], start=1):
    try:
      lines.append(_checked(line, check))
    except ValueError as error:
      raise Damaged(path, f"line {number}: {error}") from error
  return lines


def read_text(path: Path) -> str | None:
  """Reads a text file in UTF-8.

  Returns:
    The text, or None if there is no file or a broken link.

  Raises:
    Damaged: The path is that of a folder or a device, or the file cannot be read.
    OSError: The file is on gs://, and that cannot be reached.
  """
  path = paths.at(path)
  try:
    if isinstance(path, pathlib.Path):
      mode = path.stat().st_mode
      if not stat.S_ISREG(mode):
        raise Damaged(path,
                      "it is a folder" if stat.S_ISDIR(mode) else "it is not a file")
    return path.read_bytes().decode()
  except (FileNotFoundError, NotADirectoryError):
    return None
  except OSError as error:
    if isinstance(path, cloud.Path):
      raise  # That the service fails says nothing about the file.
    raise Damaged(path, error.strerror or str(error)) from error
  except UnicodeDecodeError as error:
    raise Damaged(path, "it is not text in UTF-8") from error


def _checked(
    text: str, check: Callable[[dict[str, Any]], None] | None
) -> dict[str, Any]:
  if not text.strip("\0 \r\n\t"):
    raise ValueError("it is empty")
  try:
    value = json.loads(text)
  except (ValueError, RecursionError) as error:
    raise ValueError(f"it is not JSON: {error}") from error
  if not isinstance(value, dict):
    raise ValueError("it is not a JSON object")
  if check:
    check(value)
  return value


SEAL = "crc32"  # Key of the checksum in a sealed object.


def sealed(value: dict[str, Any]) -> dict[str, Any]:
  """Returns the object with a checksum of its fields, which `check_sealed` checks."""
  return {**value, SEAL: _crc32(value)}


def check_sealed(value: dict[str, Any]) -> None:
  """Checks that an object is as `sealed` made it.

  Raises:
    ValueError: The checksum is missing or does not match.
  """
  rest = {name: part for name, part in value.items() if name != SEAL}
  if value.get(SEAL) != _crc32(rest):
    raise ValueError("the checksum differs")


def _crc32(value: dict[str, Any]) -> int:
  return zlib.crc32(json.dumps(value, sort_keys=True).encode())


def is_count(value: Any) -> bool:
  """Whether a value read from JSON is an integer of at least 0."""
  return type(value) is int and value >= 0


def is_number(value: Any) -> bool:
  """Whether a value read from JSON is a finite number."""
  return type(value) in (int, float) and abs(value) <= sys.float_info.max
