"""Expands paths that users write: `~`, environment variables, wildcards and lists."""

import errno
import glob
import os
import re

# Begins with a scheme, or with what remains of one if slashes were merged.
_URL = re.compile(r"[A-Za-z][A-Za-z\d+.-]*://|(gs|s3):/")


def is_url(path: str | os.PathLike) -> bool:
  """Returns whether a path is a URL such as gs://bucket/name.

  Such a path must not reach functions for local files, because they would take it for a
  folder named "gs:".
  """
  return _URL.match(os.fspath(path)) is not None


def expand(path: str | os.PathLike) -> str:
  """Replaces a leading `~` or `~user`, and `$NAME` or `${NAME}` anywhere.

  Args:
    path: Path as a user wrote it.

  Returns:
    The path in which they are replaced by the home directory and the variables' values.

  Raises:
    ValueError: The user or a variable does not exist, and no file has exactly this
      name. Or no file can have this name, because it is too long or holds a null
      character. Or the path is a URL.
  """
  result = os.path.expandvars(os.path.expanduser(path))
  if is_url(result):
    raise ValueError("a URL is not a path on this machine")
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


def matching(pattern: str) -> list[str]:
  """Expands a path and its wildcards: `*`, `?`, `[...]`, and `**` for any folders.

  Args:
    pattern: Path as a user wrote it.

  Returns:
    The existing paths that match, sorted. If the path itself exists, its wildcards are
    ordinary characters, and it is the only result. If nothing matches, the result is
    the path as it is.

  Raises:
    ValueError: See `expand`.
  """
  path = expand(pattern)
  if os.path.lexists(path):
    return [path]
  return sorted(glob.glob(path, recursive=True)) or [path]


def several(text: str) -> list[str]:
  """Splits a list with commas, and expands each part as `matching` does.

  Args:
    text: Paths separated by commas. If the whole text is an existing path, its commas
      are ordinary characters, and it is the only result.

  Raises:
    ValueError: See `expand`.
  """
  if os.path.lexists(os.path.expandvars(os.path.expanduser(text))):
    return [expand(text)]
  return [path for part in text.split(",") if part for path in matching(part)]
