"""TensorBoard's view of a run.

Loss and accuracy of each split have a tag of their own: loss/train, loss/validation and
so on. TensorBoard draws one chart for each tag. The page "Custom Scalars" therefore has
charts that join the tags of a group.

The splits could also be written as separate runs with a common tag. The other pages
would then join them too. But each workdir would appear as several runs, and the tags
would not name the split.
"""

import json
import logging
import os
import pathlib
import tempfile
import threading
from typing import TYPE_CHECKING, Any, Callable

import numpy as np

from minw import cloud
from minw import files
from minw import paths

if TYPE_CHECKING:
  from minw.workdir import events

_log = logging.getLogger(__name__)

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
    from minw.workdir import events  # Imports tensorboardX, which takes a while.

    folder = paths.at(workdir) / "tensorboard"
    self._folder = os.path.abspath(folder) if isinstance(
        folder, pathlib.Path) else str(folder)
    self._writer: events.Writer | None = None
    self._upload: _Upload | None = None
    try:
      if isinstance(folder, cloud.Path):
        self._upload = _Upload(folder)
      self._writer = events.Writer(self._upload.local if self._upload else self._folder)
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

  def _try(self, action: Callable[["events.Writer"], None]) -> None:
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
    local: The local folder, which the thread removes at its end. An empty file stands
      for the newest file of events that was uploaded before.
  """

  def __init__(self, folder: cloud.Path):
    self._folder = folder
    before = sorted(path.name for path in folder.iterdir())
    self._temporary = tempfile.TemporaryDirectory(prefix="minw-tensorboard-")
    self.local = self._temporary.name
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

  def _run(self) -> None:
    closed = False
    while not closed:
      self._asked.wait()
      self._asked.clear()
      closed = self._closed  # In this order, no request of `close` is cleared unseen.
      try:
        for path in pathlib.Path(self.local).iterdir():
          if path.name not in self._old:
            files.write(self._folder / path.name, path.read_bytes())
      except Exception as error:  # pylint: disable=broad-exception-caught
        _log.warning("%s cannot be written (%s): TensorBoard shows the last events"
                     " after the next upload", self._folder, error)
    self._temporary.cleanup()


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


def _show(writer: "events.Writer", line: dict[str, Any]) -> None:
  if line["split"] == "test":  # A chart would have a single point.
    writer.add_text(f"test/{line['checkpoint']}",
                    _as_code(json.dumps(_measured(line), indent=2)),
                    line["step"])
    return
  for tag, number in numbers(line).items():
    writer.add_scalar(tag, number, line["step"])


def _show_histogram(writer: "events.Writer", line: dict[str, Any]) -> None:
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
