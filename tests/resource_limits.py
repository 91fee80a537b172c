"""Limits of this process, such as a disk of a few bytes."""

import contextlib
import resource
from typing import Iterator


@contextlib.contextmanager
def limited(kind: int, most: int) -> Iterator[None]:
  """Lowers a limit, such as that of resource.RLIMIT_FSIZE, inside this context."""
  before = resource.getrlimit(kind)
  resource.setrlimit(kind, (most, before[1]))
  try:
    yield
  finally:
    resource.setrlimit(kind, before)
