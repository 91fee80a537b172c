"""Writes files on gs:// in a thread, so that training does not wait for the service.

A request takes tens of milliseconds, and up to two minutes while the service is not
available. Within the context `used`, a write of a file in the folder therefore only
hands the content to a thread, which writes the files in the same order. If a file is
written again before its turn has come, the older content is dropped.

Each write of the thread names the generation that it replaces, see `cloud.Path.put`. A
process that has lost the folder to a successor thus cannot overwrite its files.
"""

import contextlib
import os
import threading
from typing import Iterator

from minw import cloud
from minw import paths


class _Outbox:
  """Contents of files that a thread writes."""

  def __init__(self):
    self._waiting: dict[cloud.Path, bytes] = {}  # In the order of writing.
    self._error: Exception | None = None
    self._busy = self._closed = False
    self._changed = threading.Condition()
    self._thread = threading.Thread(target=self._run, daemon=True)
    self._thread.start()

  def put(self, path: cloud.Path, content: bytes) -> None:
    """Hands a content to the thread. Raises the error that an earlier write met."""
    with self._changed:
      if self._error:
        raise self._error
      self._waiting.pop(path, None)
      self._waiting[path] = content
      self._changed.notify_all()

  def wait(self) -> None:
    """Waits until all is written. Raises the error that a write met."""
    with self._changed:
      self._changed.wait_for(lambda: not (self._waiting or self._busy))
      if self._error:
        raise self._error

  def close(self) -> None:
    """Ends the thread. What still waits is not written."""
    with self._changed:
      self._waiting.clear()
      self._closed = True
      self._changed.notify_all()

  def _run(self) -> None:
    while True:
      with self._changed:
        self._changed.wait_for(lambda: self._waiting or self._closed)
        if self._closed:
          return
        path = next(iter(self._waiting))
        content = self._waiting.pop(path)
        self._busy = True
      error = None
      try:
        path.put(content)
      except Exception as raised:  # pylint: disable=broad-exception-caught
        error = raised  # The thread that trains raises it.
      with self._changed:
        if error:
          self._error = error
          self._waiting.clear()  # They may rely on the file that was not written.
        self._busy = False
        self._changed.notify_all()


_outboxes: dict[cloud.Path, _Outbox] = {}  # By the folder of the files.


@contextlib.contextmanager
def used(folder: str | os.PathLike[str]) -> Iterator[None]:
  """Context in which `files.write` does not wait for files in a folder on gs://.

  The end of the context waits for them. On this machine, files are written as always.

  Args:
    folder: The folder. Files in folders in it are written as always.

  Raises:
    OSError: A file cannot be written. The next write of a file in the folder raises
      it, or the end of the context. Nothing is written after it.
  """
  path = paths.at(folder)
  if not isinstance(path, cloud.Path):
    yield
    return
  outbox = _outboxes[path] = _Outbox()
  try:
    yield
    outbox.wait()
  except BaseException:
    with contextlib.suppress(Exception):  # What was raised before says more.
      outbox.wait()
    raise
  finally:
    del _outboxes[path]
    outbox.close()


def put(path: cloud.Path, content: bytes) -> None:
  """Writes a file, or hands it to the thread of its folder; see `used`."""
  outbox = _outboxes.get(path.parent)
  if outbox is None:
    path.put(content)
  else:
    outbox.put(path, content)


def wait(folder: str | os.PathLike[str]) -> None:
  """Waits until the thread of a folder, if it has one, has written all files."""
  path = paths.at(folder)
  if isinstance(path, cloud.Path) and path in _outboxes:
    _outboxes[path].wait()
