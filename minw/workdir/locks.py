"""The lock of a workdir. The process that trains in the workdir holds it.

The lock is an flock of the file `lock`. The operating system releases it whenever the
process ends, even if it is killed. On network file systems the lock depends on their
implementation of flock. NFS locks hold between machines, and Lustre locks do if the
file system is mounted with the option flock. Locks of gcsfuse do not.
"""

import contextlib
import fcntl
import os
import pathlib
import time
from typing import IO

_INHERITED = "MINW_LOCK"  # Variable with the file descriptor that holds the lock.
# `take` retries, because `is_held` in another process takes the lock for a moment.
_TRIES, _PAUSE = 10, 0.05


def take(workdir: str) -> IO[str] | None:
  """Takes the lock of a folder for this process.

  Args:
    workdir: Folder that exists. Its file `lock` is created if it is missing.

  Returns:
    An open file that holds the lock until it is closed. None if another process, or
    another run in this process, has the lock.

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
  """Returns whether a process has the lock of a folder.

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
  """Opens a file without blocking, even if it is a pipe without a writer."""
  return os.open(path, flags | os.O_NONBLOCK)


def passed_on(file: IO[str]) -> dict[str, str]:
  """Returns environment variables that tell a child process about an inherited lock.

  Start the child with `pass_fds=[file.fileno()]`. There, `take` returns the same open
  file. The lock is therefore held until both processes have closed the file or ended.

  Args:
    file: Open file that `take` returned.
  """
  return {_INHERITED: str(file.fileno())}


def _inherited(path: pathlib.Path) -> IO[str] | None:
  """Returns the open file inherited for `path`, or None; see `passed_on`."""
  number = os.environ.get(_INHERITED, "")
  with contextlib.suppress(OSError, ValueError):
    if os.path.samestat(os.fstat(int(number)), path.stat()):
      os.set_inheritable(int(number), False)
      del os.environ[_INHERITED]
      return open(int(number), "a+")
  return None
