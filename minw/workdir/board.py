"""TensorBoard's view of a run.

Loss and accuracy of each split have a tag of their own: loss/train, loss/validation and
so on. TensorBoard draws one chart for each tag. The page "Custom Scalars" therefore has
charts that join the tags of a group.

The splits could also be written as separate runs with a common tag. The other pages
would then join them too. But each workdir would appear as several runs, and the tags
would not name the split.
"""

import contextlib
import json
import logging
import os
import pathlib
import re
import socket
import tempfile
import threading
import time
from typing import Any, Callable

import numpy as np
import tensorboardX
from tensorboardX import record_writer
from tensorboardX.proto import event_pb2

from minw import cloud
from minw import files
from minw import paths

_log = logging.getLogger(__name__)

# Its classes are made when it is imported, where a type checker does not see them.
_events: Any = event_pb2

# Names of curves by split and mode. The usual modes are not named: training uses the
# mixed network, and validation the hard network.
_CURVES = {("train", "mixed"): "train", ("train", "hard"): "train_hard",
           ("validation", "hard"): "validation",
           ("validation", "mixed"): "validation_mixed"}

_UPLOAD_SECONDS = 30.0  # Time that the end of a run waits for the last upload.

_BY_SPLIT = ("loss", "accuracy", "top5_accuracy")


class Board:
  """Writes the records of a run for TensorBoard, and never fails.

  Everything is written in the calling thread. The first error, for example that of a
  full disk, is logged as a warning, and nothing is written after it. The next start of
  the run writes everything again.

  If the workdir is on gs://, the file is a local one, which a thread uploads whenever
  it is flushed.
  """

  def __init__(self, workdir: str, config: str | None):
    """Starts a new file of events. TensorBoard drops what earlier files show.

    Args:
      workdir: Directory of the run. The events are written to its folder `tensorboard`.
      config: Text of the config to show, or None.
    """
    folder = paths.at(workdir) / "tensorboard"
    self._folder = os.path.abspath(folder) if isinstance(
        folder, pathlib.Path) else str(folder)
    self._writer: _Writer | None = None
    self._upload: _Upload | None = None
    try:
      if isinstance(folder, cloud.Path):
        self._upload = _Upload(folder)
      self._writer = _Writer(self._upload.local if self._upload else self._folder)
    except Exception as error:  # pylint: disable=broad-exception-caught
      self._drop(error)
    self._try(lambda writer: writer.add_custom_scalars({"train and validation": {
        "loss": ["Multiline", ["loss/"]],
        # TensorBoard matches these expressions at the start of a tag.
        "accuracy": ["Multiline", ["(top5_)?accuracy/"]]}}))
    if config is not None:
      self._try(lambda writer: writer.add_text("config", _as_code(config), 0))

  def show(self, line: dict[str, Any]) -> None:
    """Shows a line of metrics.jsonl."""
    self._try(lambda writer: _show(writer, line))

  def show_histogram(self, line: dict[str, Any]) -> None:
    """Shows a line of histograms.jsonl."""
    self._try(lambda writer: _show_histogram(writer, line))

  def flush(self) -> None:
    """Writes buffered events to the file."""
    self._try(lambda writer: writer.flush())
    if self._upload:
      self._upload.ask()

  def close(self) -> None:
    """Closes the file."""
    self._try(lambda writer: writer.close())
    if self._upload:
      self._upload.close()

  def _try(self, action: Callable[["_Writer"], None]) -> None:
    if self._writer is None:
      return
    try:
      action(self._writer)
    except Exception as error:  # pylint: disable=broad-exception-caught
      self._drop(error)

  def _drop(self, error: Exception) -> None:
    _log.warning("%s cannot be written (%s): TensorBoard shows nothing more of this run"
                 " until it is started again", self._folder, error)
    writer, self._writer = self._writer, None
    if writer is not None:
      writer.abandon()


class _Upload:
  """Uploads the files of a local folder in a thread, which never fails.

  Attributes:
    local: The local folder, which is removed at the end. An empty file stands for the
      newest file of events that was uploaded before.
  """

  def __init__(self, folder: cloud.Path):
    self._folder = folder
    self._temporary = tempfile.TemporaryDirectory(prefix="minw-tensorboard-")
    self.local = self._temporary.name
    before = sorted(path.name for path in folder.iterdir())
    if before:
      pathlib.Path(self.local, before[-1]).touch()
    self._old = {*before}
    self._asked, self._closed = threading.Event(), False
    self._thread = threading.Thread(target=self._run, daemon=True)
    self._thread.start()

  def ask(self) -> None:
    """Makes the thread upload the files as they are now or later."""
    self._asked.set()

  def close(self) -> None:
    """Uploads the files a last time, if that is possible within some seconds."""
    self._closed = True
    self.ask()
    self._thread.join(_UPLOAD_SECONDS)
    if self._thread.is_alive():
      _log.warning("%s: the last events were not uploaded within %.0f s", self._folder,
                   _UPLOAD_SECONDS)
      return  # The thread still reads the files.
    self._temporary.cleanup()

  def _run(self) -> None:
    closed = False
    while not closed:
      self._asked.wait()
      closed = self._closed
      self._asked.clear()
      try:
        for path in pathlib.Path(self.local).iterdir():
          if path.name not in self._old:
            files.write(self._folder / path.name, path.read_bytes())
      except Exception as error:  # pylint: disable=broad-exception-caught
        _log.warning("%s cannot be written (%s): TensorBoard shows the last events"
                     " after the next upload", self._folder, error)


class _Writer(tensorboardX.SummaryWriter):
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


def numbers(line: dict[str, Any]) -> dict[str, float]:
  """Returns the measurements in a line of metrics.jsonl, by the names of their curves.

  Lines of the test split are no curves. Their names say which checkpoint was tested.
  """
  if line["split"] == "test":
    curve = f"test_{line['checkpoint']}"
  else:
    curve = _CURVES[line["split"], line["mode"]]
  return {(f"{name}/{curve}" if name in _BY_SPLIT else name) + suffix: number
          for name, value in _measured(line).items()
          for suffix, number in _parts(value)}


def _measured(line: dict[str, Any]) -> dict[str, Any]:
  return {name: value for name, value in line.items()
          if name not in ("step", "epoch", "split", "mode")}


def _show(writer: _Writer, line: dict[str, Any]) -> None:
  if line["split"] == "test":  # A chart would have a single point.
    writer.add_text(f"test/{line['checkpoint']}",
                    _as_code(json.dumps(_measured(line), indent=2)),
                    line["step"])
    return
  for tag, number in numbers(line).items():
    writer.add_scalar(tag, number, line["step"])


def _show_histogram(writer: _Writer, line: dict[str, Any]) -> None:
  counts = np.asarray(line["counts"])
  centres = np.linspace(-1, 1, len(counts))
  filled = centres[counts > 0]
  writer.add_histogram_raw(
      f"{line['kind']}/{line['layer']}", min=filled.min(), max=filled.max(),
      num=counts.sum(), sum=counts @ centres, sum_squares=counts @ centres**2,
      bucket_limits=(centres + (centres[1] - centres[0]) / 2).tolist(),
      bucket_counts=counts.tolist(), global_step=line["step"])


def _as_code(text: str) -> str:
  """Indents text so that Markdown shows it verbatim."""
  return "".join(f"    {line}\n" for line in text.splitlines())


def _parts(value: Any) -> list[tuple[str, float]]:
  if isinstance(value, (int, float)):
    return [("", value)]
  parts = (value.items() if isinstance(value, dict)
           else enumerate(value) if isinstance(value, list) else ())
  return [(f"/{name}", part) for name, part in parts if part is not None]
