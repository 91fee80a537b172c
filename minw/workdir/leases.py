"""Leases, which are the locks of workdirs on gs://, where the system has no locks.

The lease of a folder is its object `lease`. A process takes it by writing the object,
and writes it again every few seconds. Each write names the generation that it replaces,
so that only one of several processes succeeds. A lease whose generation does not change
for the time that it states belongs to nobody any more, and another process takes it.
No clocks are compared for that: the other process waits for this time itself.

A process that was suspended for longer finds on waking that it lost the lease. Its
writes fail from then on, see `cloud.Path.put`, and those of Orbax, which know nothing
of leases, end with the process if it is a command; see `Lease`.
"""

import json
import logging
import os
import secrets
import socket
import threading
import time
from typing import Any, Callable

from minw import cloud
from minw import errors
from minw import json_files

_log = logging.getLogger(__name__)

_SECONDS = "MINW_LEASE_SECONDS"  # Variable with the time to live of new leases.
_DEFAULT_SECONDS = 60.0
_INHERITED = "MINW_LEASE"  # Variable with the owner of an inherited lease.
_POLLS = 20  # Number of looks at a lease in its time to live.

_Found = tuple[dict[str, Any], int]  # Content of a lease and its generation.


class Lease:
  """A lease that this process holds until it is closed.

  Attributes:
    owner: Name of the owner. A process that knows it may renew the lease.
  """

  def __init__(self, path: cloud.Path, owner: str, generation: int, inherited: bool,
               lost: Callable[[], None] | None):
    self.owner = owner
    self._path, self._generation, self._inherited = path, generation, inherited
    self._lost = lost
    self._seconds = _time_to_live()
    self._closed = threading.Event()
    self._owning = cloud.owning(path.parent, self.is_held)
    self._owning.__enter__()
    self._thread = threading.Thread(target=self._renew, daemon=True)
    self._thread.start()

  def __enter__(self) -> "Lease":
    return self

  def __exit__(self, *_: Any) -> None:
    self.close()

  def is_held(self) -> bool:
    """Returns whether this process still holds the lease.

    Raises:
      OSError: The service cannot be reached.
    """
    found = _read(self._path)
    return found is not None and found[0]["owner"] == self.owner

  def close(self) -> None:
    """Releases the lease, unless another process passed it on to this one."""
    if self._closed.is_set():
      return
    self._closed.set()
    self._thread.join()
    self._owning.__exit__(None, None, None)
    if self._inherited:
      return
    try:
      found = _read(self._path)
      if found is not None and found[0]["owner"] == self.owner:
        self._path.replace_generation(_content("", 0.0), found[1])
    except OSError as error:
      _log.warning("%s: it is not released, and runs out in %.0f s (%s)", self._path,
                   self._seconds, error)

  def _renew(self) -> None:
    """Renews the lease until it is closed or lost."""
    renewed, pause = time.monotonic(), self._seconds / 3
    while not self._closed.wait(pause):
      try:
        # After a suspension, a look at the lease tells sooner than a refused write.
        suspended = time.monotonic() - renewed > self._seconds
        if suspended and not self.is_held() or not self._is_renewed():
          if self._lost:
            self._lost()
          _log.error("%s: another process has taken the lease", self._path)
          return
        renewed, pause = time.monotonic(), self._seconds / 3
      except OSError as error:
        _log.warning("%s: it was not renewed (%s)", self._path, error)
        pause = self._seconds / _POLLS

  def _is_renewed(self) -> bool:
    """Renews the lease. Returns False if another process has it."""
    written = self._path.replace_generation(
        _content(self.owner, self._seconds), self._generation,
        patience=self._seconds / 3)
    if written is None:  # It is lost, or a process that shares it has renewed it.
      found = _read(self._path)
      if found is None or found[0]["owner"] != self.owner:
        return False
      written = found[1]
    self._generation = written
    return True


def take(
    folder: cloud.Path, lost: Callable[[], None] | None = None) -> Lease | None:
  """Takes the lease of a folder for this process.

  If there is a lease that a dead process may have held, this waits until the lease is
  renewed or runs out.

  Args:
    folder: The folder.
    lost: Function that a thread calls if another process has taken the lease.

  Returns:
    The lease, or None if another process has it.

  Raises:
    OSError: The object cannot be read or written.
  """
  path = folder / "lease"
  found = _read(path)
  inherited = os.environ.get(_INHERITED, "")
  if found is not None and inherited and found[0]["owner"] == inherited:
    del os.environ[_INHERITED]
    return Lease(path, inherited, found[1], inherited=True, lost=lost)
  if found is not None and found[0]["owner"]:
    before, found = found, _after_waiting(path, found)
    if found is not None and found[0]["owner"] and found[1] != before[1]:
      return None
  owner = f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(8)}"
  written = path.replace_generation(
      _content(owner, _time_to_live()), found[1] if found else 0)
  if written is None:
    return None
  return Lease(path, owner, written, inherited=False, lost=lost)


def is_held(folder: cloud.Path) -> bool:
  """Returns whether a process seems to have the lease of a folder.

  The time of the last renewal, by the service's clock, is compared with the clock of
  this machine. `take` does not rely on it.

  Raises:
    OSError: The object cannot be read.
  """
  path = folder / "lease"
  found = _read(path)
  return (found is not None and bool(found[0]["owner"])
          and time.time() - path.stat().st_mtime < found[0]["seconds"])


def passed_on(lease: Lease) -> dict[str, str]:
  """Returns environment variables with which `take` in a child returns this lease too.

  Both processes renew the lease. The child does not release it.
  """
  return {_INHERITED: lease.owner}


def _after_waiting(path: cloud.Path, before: _Found) -> _Found | None:
  """Waits until a lease changes or its time runs out, and returns what it then is."""
  seconds = before[0]["seconds"]
  _log.info("%s: waiting up to %.0f s, because a process that may have ended has it",
            path, seconds)
  end = time.monotonic() + seconds
  while time.monotonic() < end:
    time.sleep(seconds / _POLLS)
    found = _read(path)
    if found is None or found[1] != before[1]:
      return found
  return before


def _read(path: cloud.Path) -> _Found | None:
  """Returns a lease, or None if there is none."""
  try:
    text, generation = path.read_generation()
  except FileNotFoundError:
    return None
  try:
    content = json.loads(text)
    if isinstance(content["owner"], str) and json_files.is_number(content["seconds"]):
      return content, generation
  except (ValueError, LookupError, TypeError):
    pass
  return {"owner": "", "seconds": 0.0}, generation  # It is damaged, and nobody's.


def _content(owner: str, seconds: float) -> bytes:
  return json.dumps({"owner": owner, "seconds": seconds}).encode() + b"\n"


def _time_to_live() -> float:
  """Returns the seconds after which a lease that is not renewed runs out."""
  text = os.environ.get(_SECONDS, "")
  try:
    seconds = float(text or _DEFAULT_SECONDS)
  except ValueError:
    seconds = 0.0
  errors.check(0 < seconds < float("inf"), _SECONDS, text, "a positive number")
  return seconds
