"""Files of events, which TensorBoard reads.

Importing this module takes up to a second, because tensorboardX imports packages of
cloud services. Only a run that starts to write events imports it.
"""

import contextlib
import os
import re
import socket
import time
from typing import Any

import tensorboardX
from tensorboardX import record_writer
from tensorboardX.proto import event_pb2

# Its classes are made when it is imported, where a type checker does not see them.
_events: Any = event_pb2


class Writer(tensorboardX.SummaryWriter):
  """A SummaryWriter that writes to `_Events` in the calling thread.

  The original writes in a separate thread, which ends at the first error. Later calls
  would wait for that thread forever.
  """

  def _get_file_writer(self):
    if self.file_writer is None:
      self.file_writer = _Events(self.logdir)
      self.all_writers = {self.logdir: self.file_writer}
    return self.file_writer

  def abandon(self) -> None:
    """Closes the file, even if buffered events cannot be written."""
    if self.file_writer is not None:
      self.file_writer.abandon()


class _Events:
  """A file of events that replaces the events of earlier files.

  TensorBoard reads files in the order of their names, which contain the time in
  seconds. A new file must have a later time than all others. If the clock does not give
  one, the new file is named after the second that follows the newest file.
  """

  def __init__(self, folder: str):
    os.makedirs(folder, exist_ok=True)
    matches = (re.match(r"events\.out\.tfevents\.(\d{10})\.", name)
               for name in os.listdir(folder))
    newest = max((int(match[1]) for match in matches if match), default=0)
    second = max(int(time.time()), newest + 1)
    self._file = record_writer.RecordWriter(os.path.join(
        folder, f"events.out.tfevents.{second:010d}.{socket.gethostname()}"))
    try:
      self._add(_events.Event(file_version="brain.Event:2"))
      self._add(_events.Event(session_log=_events.SessionLog(
          status=_events.SessionLog.START)))
    except OSError:
      self.abandon()
      raise

  def add_summary(self, summary: Any, step: int | None = None, _: Any = None) -> None:
    """Writes a summary for a step."""
    self._add(_events.Event(summary=summary, step=step or 0))

  def flush(self) -> None:
    """Writes buffered events to the file."""
    self._file.flush()

  def close(self) -> None:
    """Closes the file."""
    self._file.close()

  def abandon(self) -> None:
    """Closes the file, even if buffered events cannot be written."""
    with contextlib.suppress(OSError):
      self._file.close()

  def _add(self, event: Any) -> None:
    event.wall_time = time.time()
    self._file.write(event.SerializeToString())
