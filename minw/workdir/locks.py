"""The lock of a workdir. The process that trains in the workdir holds it.

The lock is an flock of the file `lock`. The operating system releases it whenever the
process ends, even if it is killed. On network file systems the lock depends on their
implementation of flock. NFS locks hold between machines, and Lustre locks do if the
file system is mounted with the option flock. Locks of gcsfuse do not. A workdir on
gs:// has a lease instead, see `minw.workdir.leases`.
"""

import contextlib
import fcntl
import os
import pathlib
import time
from typing import IO, Callable, Sequence

from minw import cloud
from minw import paths
from minw.workdir import leases

Lock = IO[str] | leases.Lease

_INHERITED = "MINW_LOCK"  # Variable with the file descriptor that holds the lock.
# `take` retries, because `is_held` in another process takes the lock for a moment.
_TRIES, _PAUSE = 10, 0.05


def take(workdir: str, lost: Callable[[], None] | None = None) -> Lock | None:
  """Takes the lock of a folder for this process.

  Args:
    workdir: Folder that exists. Its file `lock` is created if it is missing.
    lost: Function that a thread calls if the lock is a lease, and another process has
      taken it because this one was suspended.

  Returns:
    An open file or a lease that holds the lock until it is closed. None if another
    process, or another run in this process, has the lock.

  Raises:
    OSError: The file cannot be opened, or the file system has no locks.
  """
  folder = paths.at(workdir)
  if isinstance(folder, cloud.Path):
    return leases.take(folder, lost)
  path = folder / "lock"
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
  folder = paths.at(workdir)
  if isinstance(folder, cloud.Path):
    return leases.is_held(folder)
  try:
    with open(folder / "lock", opener=_without_waiting) as file:
      fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
  except FileNotFoundError:
    return False
  except BlockingIOError:
    return True
  return False


def _without_waiting(path: str, flags: int) -> int:
  """Opens a file without blocking, even if it is a pipe without a writer."""
  return os.open(path, flags | os.O_NONBLOCK)


def passed_on(lock: Lock) -> tuple[dict[str, str], Sequence[int]]:
  """Returns what a child process needs to hold the lock too.

  In the child, `take` returns the same open file or lease. The lock is therefore held
  until both processes have closed it or ended.

  Args:
    lock: Lock that `take` returned.

  Returns:
    Environment variables of the child, and file descriptors for `pass_fds`.
  """
  if isinstance(lock, leases.Lease):
    return leases.passed_on(lock), ()
  return {_INHERITED: str(lock.fileno())}, (lock.fileno(),)


def _inherited(path: pathlib.Path) -> IO[str] | None:
  """Returns the open file inherited for `path`, or None; see `passed_on`."""
  number = os.environ.get(_INHERITED, "")
  with contextlib.suppress(OSError, ValueError):
    if os.path.samestat(os.fstat(int(number)), path.stat()):
      os.set_inheritable(int(number), False)
      del os.environ[_INHERITED]
      return open(int(number), "a+")
  return None
