"""Expands paths that users write: `~`, environment variables, wildcards and lists.

`at` turns the result into a path object: `pathlib.Path` for a path on this machine, and
`cloud.Path` for gs://BUCKET/NAME. Other URLs are refused, so that no function for local
files takes them for a folder named "gs:".
"""

import errno
import glob
import os
import pathlib
import re
from typing import Iterator

from minw import cloud
from minw import dependencies
from minw import errors

AnyPath = pathlib.Path | cloud.Path

# Begins with a scheme, or with what remains of one if slashes were merged.
_URL = re.compile(r"[A-Za-z][A-Za-z\d+.-]*://|(gs|s3):/")

_SPECIAL = re.compile(r"[#*?\[\]\x00-\x1f\x7f]")


def is_url(path: str | os.PathLike | cloud.Path) -> bool:
  """Returns whether a path is a URL such as gs://bucket/name."""
  return _URL.match(str(path)) is not None


def at(path: str | os.PathLike | cloud.Path) -> AnyPath:
  """Returns the path object of a path that `expand` has returned.

  Raises:
    errors.UsageError: The path is a URL that minw cannot use.
  """
  if not is_url(path):
    return pathlib.Path(str(path))
  try:
    return _remote(str(path))
  except ValueError as error:
    raise errors.UsageError(f"{path}: {error}") from error


def _remote(url: str) -> cloud.Path:
  """Returns the path object of a URL. Raises ValueError if minw cannot use it."""
  if not url.startswith("gs://"):
    raise ValueError("the only URLs that minw reads and writes are gs://BUCKET/NAME")
  if _SPECIAL.search(url):
    raise ValueError("a name on gs:// must not contain # * ? [ ] or control"
                     " characters, which Orbax and others take for patterns")
  if not all(map(dependencies.installed, ("gcsfs", "google.cloud.storage"))):
    raise ValueError("gs:// needs other packages: pip install 'minw[gcs]'")
  return cloud.Path(url)


def exists(path: str | os.PathLike | cloud.Path) -> bool:
  """Returns whether there is a file or a folder, like `os.path.exists`.

  Raises:
    OSError: The path is on gs://, and the service denies access or cannot be reached.
  """
  found = at(path)
  return os.path.exists(found) if isinstance(found, pathlib.Path) else found.exists()


def is_dir(path: str | os.PathLike | cloud.Path) -> bool:
  """Returns whether there is a folder, like `os.path.isdir`; see `exists`."""
  found = at(path)
  return os.path.isdir(found) if isinstance(found, pathlib.Path) else found.is_dir()


def is_file(path: str | os.PathLike | cloud.Path) -> bool:
  """Returns whether there is a file, like `os.path.isfile`; see `exists`."""
  found = at(path)
  return os.path.isfile(found) if isinstance(found, pathlib.Path) else found.is_file()


def walk(path: str) -> Iterator[tuple[str, list[str], list[str]]]:
  """Yields (folder, names of folders, names of files), like `os.walk`."""
  found = at(path)
  if isinstance(found, pathlib.Path):
    yield from os.walk(path)
  else:
    for folder, folders, names in found.walk():
      yield str(folder), folders, names


def real(path: str | os.PathLike) -> str:
  """Returns a path without symbolic links. A URL stays as it is."""
  return str(path) if is_url(path) else os.path.realpath(path)


def expand(path: str | os.PathLike, remote: bool = False) -> str:
  """Replaces a leading `~` or `~user`, and `$NAME` or `${NAME}` anywhere.

  Args:
    path: Path as a user wrote it.
    remote: Whether the path may be gs://BUCKET/NAME.

  Returns:
    The path in which they are replaced by the home directory and the variables' values.

  Raises:
    ValueError: The user or a variable does not exist, and no file has exactly this
      name. Or no file can have this name, because it is too long or holds a null
      character. Or the path is a URL that is not allowed here.
  """
  result = os.path.expandvars(os.path.expanduser(path))
  if is_url(result):
    if not remote:
      raise ValueError("a URL is not a path on this machine" + (
          "; `gcloud storage cp --recursive FROM TO` copies from and to gs://"
          if result.startswith("gs:") else ""))
    return str(_remote(result))
  try:
    os.lstat(result)
  except OSError as error:
    if error.errno == errno.ENAMETOOLONG:
      raise ValueError("the name of a file or the path is too long for this system"
                       ) from error
  if not os.path.lexists(result):
    if result.startswith("~"):
      name = result.split("/")[0]
      raise ValueError(f"{name!r} is no user's home directory; './{result}' names a "
                       "file that begins with '~'")
    variable = re.search(r"\$([A-Za-z_]\w*|\{[^}]*\})", result)
    if variable:
      raise ValueError(f"the environment variable {variable[1].strip('{}')!r} is not "
                       "set")
  return result


def matching(pattern: str, remote: bool = False) -> list[str]:
  """Expands a path and its wildcards: `*`, `?`, `[...]`, and `**` for any folders.

  Args:
    pattern: Path as a user wrote it. A URL has no wildcards.
    remote: See `expand`.

  Returns:
    The existing paths that match, sorted. If the path itself exists, its wildcards are
    ordinary characters, and it is the only result. If nothing matches, the result is
    the path as it is.

  Raises:
    ValueError: See `expand`.
  """
  path = expand(pattern, remote)
  if is_url(path) or os.path.lexists(path):
    return [path]
  return sorted(glob.glob(path, recursive=True)) or [path]


def several(text: str, remote: bool = False) -> list[str]:
  """Splits a list with commas, and expands each part as `matching` does.

  Args:
    text: Paths separated by commas. If the whole text is an existing path, its commas
      are ordinary characters, and it is the only result.
    remote: See `expand`.

  Raises:
    ValueError: See `expand`.
  """
  if os.path.lexists(os.path.expandvars(os.path.expanduser(text))):
    return [expand(text, remote)]
  return [path for part in text.split(",") if part for path in matching(part, remote)]
