"""The lock of a workdir, which the process that trains there holds.

It is an flock of the file `lock`. The operating system gives it back when the process
dies, however it dies. On network file systems this is as good as their flock: that of
NFS holds between machines, that of Lustre if mounted with the option flock, and that of
gcsfuse does not.
"""

import contextlib
import fcntl
import os
import pathlib
import time
from typing import IO

_INHERITED = "MINW_LOCK"  # The number of an open file that has the lock already.
_TRIES, _PAUSE = 10, 0.05  # `is_held` takes the lock for a moment.


def take(workdir: str) -> IO[str] | None:
  """Takes the lock of a folder for this process.

  Args:
    workdir: Folder that exists. Its file `lock` is created if it is missing.

  Returns:
    An open file that holds the lock until it is closed; None if another process, or
    another run in this one, has the lock.

  Raises:
    OSError: The file cannot be opened, or the file system has no locks.
  """
  path = pathlib.Path(workdir) / "lock"
  file = _inherited(path) or path.open("a+")
  for _ in range(_TRIES):
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
      return file
    except BlockingIOError:
      time.sleep(_PAUSE)
    except OSError:
      file.close()
      raise
  file.close()
  return None


def is_held(workdir: str) -> bool:
  """Whether a process has the lock of a folder.

  Raises:
    OSError: The file cannot be opened, or the file system has no locks.
  """
  try:
    with open(pathlib.Path(workdir) / "lock", opener=_without_waiting) as file:
      fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
  except FileNotFoundError:
    return False
  except BlockingIOError:
    return True
  return False


def _without_waiting(path: str, flags: int) -> int:
  """Opens a file; one that is a pipe nobody writes to is opened as well."""
  return os.open(path, flags | os.O_NONBLOCK)


def passed_on(file: IO[str]) -> dict[str, str]:
  """Environment variables that tell a child process of a lock that it inherits.

  The child is started with `pass_fds=[file.fileno()]`. What `take` returns there is the
  same open file, so that the lock is held until both processes closed it or ended.

  Args:
    file: What `take` returned.
  """
  return {_INHERITED: str(file.fileno())}


def _inherited(path: pathlib.Path) -> IO[str] | None:
  """The open file that this process inherited for `path`, if any; see `passed_on`."""
  number = os.environ.get(_INHERITED, "")
  with contextlib.suppress(OSError, ValueError):
    if os.path.samestat(os.fstat(int(number)), path.stat()):
      os.set_inheritable(int(number), False)
      del os.environ[_INHERITED]
      return open(int(number), "a+")
  return None
