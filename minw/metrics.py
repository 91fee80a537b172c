"""The measurements of a run: metrics.jsonl, and TensorBoard's view of it.

TensorBoard shows loss and accuracy of the splits under tags that group them, loss/train,
loss/validation and so on. A chart has one tag, so the page "Custom Scalars" joins those
of a group in one. Writing the splits as runs of their own, with one tag, would join them
on the other pages too, but would make several runs of each workdir, and tags that do not
say which split they are of.
"""

import json
import math
import os
import pathlib
import time
from typing import Any

import numpy as np
import tensorboardX
from tensorboardX import event_file_writer
from tensorboardX.proto import event_pb2

from minw import cli
from minw import files


def read(workdir: str) -> list[dict[str, Any]]:
  """The lines of metrics.jsonl; a last line that was cut off is left out."""
  path = pathlib.Path(workdir) / "metrics.jsonl"
  return read_file(path) if path.exists() else []


def read_file(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
  """The lines of a file like metrics.jsonl, wherever it is."""
  return [json.loads(line) for line in pathlib.Path(path).read_text().split("\n")[:-1]]


def check_complete(workdir: str, config: Any, status: dict[str, Any]) -> None:
  """Checks that a run that is done recorded all that it measured.

  A copy of config.json and status.json alone passes: nothing in it is half there.

  Args:
    workdir: Directory of the run.
    config: Its config.
    status: Its status; the state is "done".

  Raises:
    cli.UsageError: naming the workdir and what is missing.
  """
  path = pathlib.Path(workdir)
  if not (path / "metrics.jsonl").exists() and not (path / "checkpoints").exists():
    return
  try:
    faults = _faults(read(workdir), config, status)
  except (ValueError, LookupError, TypeError, AttributeError) as error:
    faults = [f"metrics.jsonl is damaged ({error!r})"]
  cli.check(not faults, "workdir", workdir,
            f"that of a run whose record is complete, but {'; '.join(faults)}")


def _faults(lines, config, status) -> list[str]:
  """What the lines of a run that is done lack, in words."""
  faults = []
  every = config.eval_every_epochs
  wanted = [*range(every, config.num_epochs, every), config.num_epochs]
  found = [line["epoch"] for line in lines
           if (line["split"], line["mode"]) == ("validation", "hard")]
  if found != wanted:
    faults.append(f"the validations that metrics.jsonl holds are {len(found)} instead of"
                  f" {len(wanted)}" if len(found) != len(wanted) else
                  "metrics.jsonl holds validations of other epochs")
  for which, prefix in (("last", ""), ("best", "best_")):
    accuracy = [line["accuracy"] for line in lines
                if line["split"] == "test" and line["checkpoint"] == which]
    told = status.get(f"{prefix}test_accuracy")
    if len(accuracy) != 1:
      faults.append(f"metrics.jsonl has {len(accuracy)} lines of the test split for the"
                    f" {which} checkpoint instead of 1")
    elif accuracy != [told]:
      faults.append(f"the test accuracy of the {which} checkpoint is {accuracy[0]} in"
                    f" metrics.jsonl and {told} in status.json")
  return faults


# By split and mode, what TensorBoard calls it: without a remark, training as it is
# computed and validation as it is deployed.
_CURVES = {("train", "mixed"): "train", ("train", "hard"): "train_hard",
           ("validation", "hard"): "validation",
           ("validation", "mixed"): "validation_mixed"}

_BY_SPLIT = ("loss", "accuracy", "top5_accuracy")


class Writer:
  """Appends lines to metrics.jsonl, and shows them to TensorBoard."""

  def __init__(self, workdir: str, step: int):
    """Opens the records of a run that goes on after `step` steps.

    What an interrupted run recorded beyond its last checkpoint will be measured again,
    as will the test split, which ends a run: those lines go.
    """
    kept = [line for line in read(workdir)
            if line["step"] <= step and line["split"] != "test"]
    path = pathlib.Path(workdir) / "metrics.jsonl"
    files.write(path, "".join(json.dumps(line) + "\n" for line in kept))
    self._path = path
    self._file = path.open("ab", buffering=0)  # Nothing is left to write after an error.
    # Shown anew: a run that was killed may not have written all of it.
    self._board = _Board(os.path.join(os.path.abspath(workdir), "tensorboard"))
    self._board.add_custom_scalars({"train and validation": {
        "loss": ["Multiline", ["loss/"]],
        "accuracy": ["Multiline", ["(top5_)?accuracy/"]]}})  # Matched from the start.
    config = pathlib.Path(workdir) / "config.json"
    if config.exists():
      self._board.add_text("config", _as_code(config.read_text()), 0)
    for line in kept:
      self._show(line)
    counted = pathlib.Path(workdir) / "histograms.jsonl"
    self.show_histograms([line for line in read_file(counted) if line["step"] <= step]
                         if counted.exists() else [])

  def write(self, line: dict[str, Any]) -> None:
    """Writes a line: step, epoch, split, mode ("hard" or "mixed") and measurements.

    A measurement is a number, a list with one for each layer, or a dict by layer.

    Raises:
      OSError: naming the file that cannot be written.
    """
    line = _finite(line)
    with files.naming(self._path):
      text = json.dumps(line, allow_nan=False).encode() + b"\n"
      while text:  # A disk that gets full takes a part.
        text = text[self._file.write(text):]
    self._show(line)
    self._board.flush()

  def show_histograms(self, lines: list[dict[str, Any]]) -> None:
    """Shows lines of histograms.jsonl, which `histograms.write` returns."""
    for line in lines:
      counts = np.asarray(line["counts"])
      centres = np.linspace(-1, 1, len(counts))
      filled = centres[counts > 0]
      self._board.add_histogram_raw(
          f"{line['kind']}/{line['layer']}", min=filled.min(), max=filled.max(),
          num=counts.sum(), sum=counts @ centres, sum_squares=counts @ centres**2,
          bucket_limits=(centres + (centres[1] - centres[0]) / 2).tolist(),
          bucket_counts=counts.tolist(), global_step=line["step"])

  def _show(self, line):
    measured = {name: value for name, value in line.items()
                if name not in ("step", "epoch", "split", "mode")}
    if line["split"] == "test":  # Measured once: a chart would have a single point.
      self._board.add_text(
          f"test/{line['checkpoint']}", _as_code(json.dumps(measured, indent=2)),
          line["step"])
      return
    for name, value in measured.items():
      tag = (f"{name}/{_CURVES[line['split'], line['mode']]}" if name in _BY_SPLIT
             else name)
      for suffix, number in _numbers(value):
        self._board.add_scalar(tag + suffix, number, line["step"])

  def close(self) -> None:
    """Closes the files."""
    self._file.close()
    self._board.close()


class _Board(tensorboardX.SummaryWriter):
  """A SummaryWriter that writes in the thread that calls it, to `_Events`.

  The original has a thread for that, which ends at the first error, that of a full disk
  for example. Later calls would wait for it forever.
  """

  def _get_file_writer(self):
    if self.file_writer is None:
      self.file_writer = _Events(self.logdir)
      self.all_writers = {self.logdir: self.file_writer}
    return self.file_writer


class _Events:
  """A file of TensorBoard's; nothing counts any more that earlier files show."""

  def __init__(self, folder: str):
    self._folder = folder
    with files.naming(folder):
      os.makedirs(folder, exist_ok=True)
      # The suffix tells apart files begun in the same second, which would overwrite
      # each other.
      self._file = event_file_writer.EventsWriter(
          os.path.join(folder, "events"), f".{time.time_ns()}")
    self._add(event_pb2.Event(session_log=event_pb2.SessionLog(
        status=event_pb2.SessionLog.START)))

  def add_summary(self, summary: Any, step: int | None = None, _: Any = None) -> None:
    """Shows something at a step."""
    self._add(event_pb2.Event(summary=summary, step=step or 0))

  def flush(self) -> None:
    """Hands to the operating system what is buffered."""
    with files.naming(self._folder):
      self._file.flush()

  def close(self) -> None:
    """Closes the file."""
    with files.naming(self._folder):
      self._file.close()

  def _add(self, event: event_pb2.Event) -> None:
    event.wall_time = time.time()
    with files.naming(self._folder):
      self._file.write_event(event)


def _as_code(text: str) -> str:
  """Text that Markdown shows as it is."""
  return "".join(f"    {line}\n" for line in text.splitlines())


def _finite(value: Any) -> Any:
  """JSON has no infinities: what is not finite becomes null."""
  if isinstance(value, dict):
    return {name: _finite(part) for name, part in value.items()}
  if isinstance(value, list):
    return [_finite(part) for part in value]
  if isinstance(value, float) and not math.isfinite(value):
    return None
  return value


def _numbers(value: Any) -> list[tuple[str, float]]:
  if isinstance(value, (int, float)):
    return [("", value)]
  parts = (value.items() if isinstance(value, dict)
           else enumerate(value) if isinstance(value, list) else ())
  return [(f"/{name}", part) for name, part in parts if part is not None]
