"""The records of a run, metrics.jsonl and histograms.jsonl: an object on each line.

Each checkpoint holds a copy of both files up to its step, with a checksum. A comparison
with this copy reveals files that a disk has damaged or a user has edited. The next
start of the run restores them from the copy.
"""

import contextlib
import json
import logging
import math
import os
import pathlib
from typing import Any

from minw import config as config_lib
from minw import errors
from minw import files
from minw import json_files
from minw import paths
from minw import trackers
from minw.workdir import board
from minw.workdir import environment
from minw.workdir import run_files

_log = logging.getLogger(__name__)

Lines = list[dict[str, Any]]

_SPLITS = {("train", "mixed"), ("train", "hard"), ("validation", "mixed"),
           ("validation", "hard"), ("test", "hard")}
_NAMES = {"train": "training", "validation": "validation"}


def read(workdir: str) -> Lines:
  """Reads metrics.jsonl of a run. A last line that was cut off is left out.

  Raises:
    json_files.Damaged: A line is invalid. The message names the file and the line.
  """
  return read_file(paths.at(workdir) / "metrics.jsonl")


def read_file(path: json_files.Path) -> Lines:
  """Reads a file like metrics.jsonl at any path; see `read`."""
  return json_files.read_lines(path, _check_line)


def read_histograms(path: json_files.Path) -> Lines:
  """Reads a file like histograms.jsonl. A missing file has no lines.

  Raises:
    json_files.Damaged: A line is invalid. The message names the file and the line.
  """
  return json_files.read_lines(path, _check_histogram)


def _check_line(line: dict[str, Any]) -> None:
  _check_place(line)
  split, mode = line.get("split"), line.get("mode")
  if not (isinstance(split, str) and isinstance(mode, str)
          and (split, mode) in _SPLITS):
    raise ValueError(f"split={split!r}, mode={mode!r} is not what is measured")
  if "accuracy" not in line:
    raise ValueError("it has no accuracy")
  for name, value in line.items():
    parts = (value.values() if isinstance(value, dict) else
             value if isinstance(value, list) else [value])
    if name not in ("split", "mode", "checkpoint") and not all(
        part is None or json_files.is_number(part) for part in parts):
      raise ValueError(f"{name} is neither a number nor numbers")
  if split == "test" and line.get("checkpoint") not in ("last", "best"):
    raise ValueError("it does not say which checkpoint was tested")


def _check_histogram(line: dict[str, Any]) -> None:
  _check_place(line)
  if not (isinstance(line.get("layer"), str)
          and line.get("kind") in ("weights", "activations")
          and json_files.is_number(line.get("alpha"))
          and isinstance(line.get("counts"), list)
          and len(line["counts"]) > 1
          and all(map(json_files.is_count, line["counts"]))):
    raise ValueError("it is not a histogram of a layer")


def _check_place(line: dict[str, Any]) -> None:
  for name in ("step", "epoch"):
    if not json_files.is_count(line.get(name)):
      raise ValueError(f"{name} is not a number of {name}s")


def check_complete(workdir: str, config: Any, status: dict[str, Any]) -> None:
  """Checks that the record of a run that is done is complete.

  A workdir with neither metrics.jsonl nor checkpoints passes. It is a copy of
  config.json and status.json alone, and no part of a record is missing there.

  Args:
    workdir: Directory of the run.
    config: Config of the run.
    status: Status of the run; its state is "done".

  Raises:
    errors.UsageError: The record is not complete. The message names the workdir and
      what is missing.
  """
  found = faults(workdir, config, status)
  errors.check(not found, "workdir", workdir,
               f"that of a run whose record is complete, but {'; '.join(found)}")


def faults(workdir: str, config: Any, status: dict[str, Any]) -> list[str]:
  """Lists what is missing or wrong in the record of a run that has ended.

  Args:
    workdir: Directory of the run.
    config: Config of the run.
    status: Status of the run; its state is "done" or "diverged".

  Returns:
    A clause for each fault. The list is empty if the record is complete.
  """
  path = paths.at(workdir)
  if not any(map(_is_there, (path / "metrics.jsonl", path / "checkpoints"))):
    return []
  try:
    lines = read(workdir)
    counted = read_histograms(path / "histograms.jsonl")
    environment.read(workdir)
  except json_files.Damaged as error:
    return [str(error)]
  found = []
  if status["state"] == "done":
    found = [*_missing(lines, counted, config), *_contradictions(lines, status)]
  if found:
    return found
  step, saved = _saved(workdir)
  measured = [line for line in lines if line["split"] != "test"]
  for name, here in (("metrics", measured), ("histograms", counted)):
    if [line for line in here if line["step"] <= step] != saved[name]:
      found.append(
          f"{name}.jsonl differs from its copy in the checkpoint of step {step}")
  return found


def _missing(lines: Lines, counted: Lines, config: Any) -> list[str]:
  """Lists the training, validation and histogram lines that a whole run would have.

  Returns:
    A clause for each kind of lines that are missing or belong to other epochs.
  """
  found = []
  every, last = config.eval_every_epochs, config.num_epochs
  wanted = [*range(every, last, every), last]
  for split, mode in sorted(_SPLITS):
    if split == "test" or (split, mode) == ("train", "hard") and not config.eval_train:
      continue
    epochs = [line["epoch"] for line in lines
              if (line["split"], line["mode"]) == (split, mode)]
    kind = f"{_NAMES[split]} lines of the {mode} network"
    if len(epochs) != len(wanted):
      found.append(f"metrics.jsonl has {len(epochs)} {kind} instead of {len(wanted)}")
    elif epochs != wanted:
      found.append(f"metrics.jsonl has {kind} after other epochs")
  if config.histogram_layers:
    epochs = sorted({line["epoch"] for line in counted})
    if epochs != sorted(config_lib.histogram_epochs(config)):
      found.append(f"histograms.jsonl has those after the epochs {epochs}")
  return found


def _contradictions(lines: Lines, status: dict[str, Any]) -> list[str]:
  """Lists the differences between the lines of the test split and status.json."""
  found = []
  if lines and lines[-1]["step"] != status["step"]:
    found.append(f"the last line of metrics.jsonl is of step {lines[-1]['step']}, not"
                 f" of step {status['step']} as status.json says")
  for which, prefix in (("last", ""), ("best", "best_")):
    tests = [line for line in lines
             if line["split"] == "test" and line["checkpoint"] == which]
    if len(tests) != 1:
      found.append(f"metrics.jsonl has {len(tests)} lines of the test split for the"
                   f" {which} checkpoint instead of 1")
      continue
    for name in ("accuracy", "loss"):
      told = status.get(f"{prefix}test_{name}")
      if tests[0].get(name) != _finite(told):
        found.append(f"the test {name} of the {which} checkpoint is"
                     f" {tests[0].get(name)} in metrics.jsonl and {told} in"
                     " status.json")
    step, told = tests[0].get("checkpoint_step"), status.get("best_step")
    if which == "best" and step != told:
      found.append(f"the step of the best checkpoint is {step} in metrics.jsonl and"
                   f" {told} in status.json")
  return found


def _is_there(path: paths.AnyPath) -> bool:
  """Returns whether there is a file, a folder, or a link that leads nowhere."""
  return os.path.lexists(path) if isinstance(path, pathlib.Path) else path.exists()


def _saved(workdir: str) -> tuple[int, dict[str, Lines]]:
  """Returns the newest undamaged copy of the records in a checkpoint, and its step.

  If there is no such copy, the step is 0 and the records are empty.
  """
  for step, folder in sorted(run_files.checkpoints(workdir).items(), reverse=True):
    with contextlib.suppress(json_files.Damaged):
      saved = json_files.read_object(folder / "run" / "metadata",
                                     json_files.check_sealed)
      if saved is not None:
        return step, saved
  return 0, {"metrics": [], "histograms": []}


class Writer:
  """Appends lines to metrics.jsonl and histograms.jsonl, and to TensorBoard's files."""

  def __init__(self, workdir: str, step: int, saved: dict[str, Any] | None = None,
               tracker: trackers.Tracker | None = None):
    """Opens the records of a run that resumes after `step` steps.

    Lines beyond the last checkpoint and lines of the test split are dropped, because
    the run will measure them again.

    Args:
      workdir: Directory of the run.
      step: Number of steps that are trained.
      saved: Copy of the records in the checkpoint of that step. Files that differ from
        it are replaced, with a warning. None if the run begins, or if the checkpoint
        was written by a version of minw without such copies.
      tracker: Receives the measurements of new lines, too.

    Raises:
      json_files.Damaged: A file is damaged, and there is no copy of its content.
      OSError: A file cannot be written. The error names it.
    """
    self._tracker = tracker
    path = paths.at(workdir)
    make = _Log if isinstance(path, pathlib.Path) else _RemoteLog
    self._metrics = make(path / "metrics.jsonl", _check_line)
    self._histograms = make(path / "histograms.jsonl", _check_histogram)
    for log, name in ((self._metrics, "metrics"), (self._histograms, "histograms")):
      log.open(step, None if saved is None else saved[name])
    self._metrics.begin()  # histograms.jsonl is created with its first line.
    # TensorBoard gets all lines again, because a run that was killed may not have
    # written all of them.
    config = path / "config.json"
    self._board = board.Board(workdir, config.read_text() if config.exists() else None)
    for line in self._metrics.lines:
      self._board.show(line)
    for line in self._histograms.lines:
      self._board.show_histogram(line)

  @property
  def lines(self) -> dict[str, Lines]:
    """Copy of the records so far, to be saved in a checkpoint."""
    return {"metrics": [*self._metrics.lines], "histograms": [*self._histograms.lines]}

  def write(self, line: dict[str, Any]) -> None:
    """Writes a line of metrics.jsonl.

    Args:
      line: The entries step, epoch, split, mode ("hard" or "mixed") and measurements. A
        measurement is a number, a list with a number for each layer, or a dict of
        numbers by layer.

    Raises:
      OSError: The file cannot be written. The error names it.
    """
    line = self._metrics.append(line)
    self._board.show(line)
    if self._tracker:
      self._tracker.log(line["step"], board.numbers(line))

  def write_histograms(self, step: int, epoch: int, histograms: Lines) -> None:
    """Writes the counts of `histograms.make_histograms` to histograms.jsonl.

    Raises:
      OSError: The file cannot be written. The error names it.
    """
    for line in histograms:
      self._board.show_histogram(
          self._histograms.append({"step": step, "epoch": epoch, **line}))

  def sync(self) -> None:
    """Flushes the records to the disk.

    Raises:
      OSError: The disk failed. The error names the file.
    """
    self._metrics.sync()
    self._histograms.sync()
    self._board.flush()

  def close(self) -> None:
    """Closes the files."""
    self._metrics.close()
    self._histograms.close()
    self._board.close()
    if self._tracker:
      self._tracker.close()


class _Log:
  """A file of JSON lines, to which lines are appended.

  Attributes:
    lines: Lines of the file.
  """

  def __init__(self, path: Any, check: Any):
    self.lines: Lines = []
    self._path, self._check = path, check
    self._file: Any = None

  def open(self, step: int, saved: Lines | None) -> None:
    """Keeps the lines up to `step`. If `saved` is given, it replaces them."""
    if step == 0:
      saved = []  # The run begins again and measures everything again.
    try:
      found = [line for line in json_files.read_lines(self._path, self._check)
               if line["step"] <= step and line.get("split") != "test"]
      fault = "" if saved is None else _difference(found, saved)
    except json_files.Damaged as error:
      if saved is None:
        raise
      found, fault = [], error.why
    if fault:
      _log.warning("%s: %s; it %s", self._path, fault,
                   f"is replaced by the copy in the checkpoint of step {step}" if step
                   else "starts again empty")
    self.lines = found if saved is None else saved
    if self.lines or _is_there(self._path):
      self.begin()

  def append(self, line: dict[str, Any]) -> dict[str, Any]:
    """Appends a line, and returns it as it was written."""
    self.begin()
    line = _finite(line)
    self._write(json.dumps(line, allow_nan=False).encode() + b"\n")
    self.lines.append(line)
    return line

  def _write(self, text: bytes) -> None:
    with files.naming(self._path):
      while text:  # On a disk that is almost full, a part may be written.
        text = text[self._file.write(text):]

  def sync(self) -> None:
    """Flushes the file to the disk."""
    if self._file is not None:
      with files.naming(self._path):
        os.fsync(self._file.fileno())

  def close(self) -> None:
    """Closes the file."""
    if self._file is not None:
      self._file.close()

  def begin(self) -> None:
    """Creates the file, unless this object has created it already."""
    if self._file is not None:
      return
    files.write(self._path, self._text())
    # Without a buffer, no data are left to write after an error.
    self._file = self._path.open("ab", buffering=0)

  def _text(self) -> str:
    return "".join(json.dumps(line) + "\n" for line in self.lines)


class _RemoteLog(_Log):
  """A `_Log` on gs://, where nothing can be appended: `sync` writes the whole file.

  In training it does not wait until the file is there, see `outbox.used`. Checkpoints
  hold a copy of the lines, from which a file is mended that was not written in time.
  """

  _synced = -1  # Number of lines in the file; -1 if this object has not written it.

  def begin(self) -> None:
    if self._synced < 0:
      self._put()

  def sync(self) -> None:
    if 0 <= self._synced < len(self.lines):
      self._put()

  def close(self) -> None:
    self.sync()

  def _write(self, text: bytes) -> None:
    """Leaves the line to `sync`."""

  def _put(self) -> None:
    files.write(self._path, self._text())
    self._synced = len(self.lines)


def _difference(found: Lines, saved: Lines) -> str:
  """Describes how a file differs from its copy; "" if it does not."""
  if found == saved:
    return ""
  right = sum(line in found for line in saved)
  if right < len(saved):
    return f"{len(saved) - right} of {len(saved)} lines are missing or differ"
  return f"there are {len(found)} lines instead of {len(saved)}, or their order differs"


def _finite(value: Any) -> Any:
  """Replaces numbers that are not finite by None, since JSON has no such numbers."""
  if isinstance(value, dict):
    return {name: _finite(part) for name, part in value.items()}
  if isinstance(value, list):
    return [_finite(part) for part in value]
  if isinstance(value, float) and not math.isfinite(value):
    return None
  return value
