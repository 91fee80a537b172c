"""The records of a run: metrics.jsonl and histograms.jsonl, an object on each line.

Each checkpoint holds a copy of both up to its step, with a checksum. What a disk or a
hand does to the files is found out by comparing them with that copy, and mended from it
at the next start of the run.
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
from minw.workdir import board
from minw.workdir import environment

_log = logging.getLogger(__name__)

Lines = list[dict[str, Any]]

_SPLITS = {("train", "mixed"), ("train", "hard"), ("validation", "mixed"),
           ("validation", "hard"), ("test", "hard")}
_NAMES = {"train": "training", "validation": "validation"}


def read(workdir: str) -> Lines:
  """Reads metrics.jsonl of a run; a last line that was cut off is left out.

  Raises:
    json_files.Damaged: Naming the file, and the line that cannot be right.
  """
  return read_file(pathlib.Path(workdir) / "metrics.jsonl")


def read_file(path: str | os.PathLike[str]) -> Lines:
  """Reads a file like metrics.jsonl, wherever it is; see `read`."""
  return json_files.read_lines(path, _check_line)


def read_histograms(path: str | os.PathLike[str]) -> Lines:
  """Reads a file like histograms.jsonl; no lines if there is no file.

  Raises:
    json_files.Damaged: Naming the file, and the line that cannot be right.
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
  """Checks that a run that is done recorded all that it measured.

  A copy of config.json and status.json alone passes: nothing in it is half there.

  Args:
    workdir: Directory of the run.
    config: Its config.
    status: Its status; the state is "done".

  Raises:
    errors.UsageError: Naming the workdir and what is missing.
  """
  found = faults(workdir, config, status)
  errors.check(not found, "workdir", workdir,
               f"that of a run whose record is complete, but {'; '.join(found)}")


def faults(workdir: str, config: Any, status: dict[str, Any]) -> list[str]:
  """Says what is missing or wrong in the record of a run that has ended.

  Args:
    workdir: Directory of the run.
    config: Its config.
    status: Its status; the state is "done" or "diverged".

  Returns:
    A clause for each fault; none of a complete record.
  """
  path = pathlib.Path(workdir)
  if not any(os.path.lexists(path / name) for name in ("metrics.jsonl", "checkpoints")):
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
  step, saved = _saved(path)
  measured = [line for line in lines if line["split"] != "test"]
  for name, here in (("metrics", measured), ("histograms", counted)):
    if [line for line in here if line["step"] <= step] != saved[name]:
      found.append(f"{name}.jsonl is not what the checkpoint of step {step} holds of"
                   " it")
  return found


def _missing(lines: Lines, counted: Lines, config: Any) -> list[str]:
  """The training and validation lines that a whole run of `config` has besides."""
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
  """What the lines of the test split and status.json do not agree on."""
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


def _saved(workdir: pathlib.Path) -> tuple[int, dict[str, Lines]]:
  """The newest copy of the records that is whole in a checkpoint, and its step.

  If there is none, that of step 0, which is empty.
  """
  folders = [path for path in (workdir / "checkpoints").glob("[0-9]*")
             if path.name.isdecimal()]
  for folder in sorted(folders, key=lambda path: -int(path.name)):
    with contextlib.suppress(json_files.Damaged):
      saved = json_files.read_object(folder / "run" / "metadata",
                                     json_files.check_sealed)
      if saved is not None:
        return int(folder.name), saved
  return 0, {"metrics": [], "histograms": []}


class Writer:
  """Appends lines to metrics.jsonl and histograms.jsonl, and to TensorBoard's files."""

  def __init__(self, workdir: str, step: int, saved: dict[str, Any] | None = None):
    """Opens the records of a run that resumes after `step` steps.

    What an interrupted run recorded beyond its last checkpoint will be measured again,
    as will the test split, which ends a run: those lines are dropped.

    Args:
      workdir: Directory of the run.
      step: Number of steps that are trained.
      saved: Copy of the records in the checkpoint of that step. Files that differ from
        it are replaced, with a warning. None if the run begins, or if the checkpoint
        was written by a version of minw without such copies.

    Raises:
      json_files.Damaged: A file is damaged, and there is no copy of what it held.
      OSError: Naming the file that cannot be written.
    """
    path = pathlib.Path(workdir)
    self._metrics = _Log(path / "metrics.jsonl", _check_line)
    self._histograms = _Log(path / "histograms.jsonl", _check_histogram)
    for log, name in ((self._metrics, "metrics"), (self._histograms, "histograms")):
      log.open(step, None if saved is None else saved[name])
    self._metrics.begin()  # histograms.jsonl is made with its first line.
    # Shown anew: a run that was killed may not have written all of it.
    config = path / "config.json"
    self._board = board.Board(workdir, config.read_text() if config.exists() else None)
    for line in self._metrics.lines:
      self._board.show(line)
    for line in self._histograms.lines:
      self._board.show_histogram(line)

  @property
  def lines(self) -> dict[str, Lines]:
    """The records so far, for a checkpoint to keep."""
    return {"metrics": [*self._metrics.lines], "histograms": [*self._histograms.lines]}

  def write(self, line: dict[str, Any]) -> None:
    """Writes a line of metrics.jsonl.

    Args:
      line: step, epoch, split, mode ("hard" or "mixed") and measurements. A measurement
        is a number, a list with one for each layer, or a dict by layer.

    Raises:
      OSError: Naming the file that cannot be written.
    """
    self._board.show(self._metrics.append(line))

  def write_histograms(self, step: int, epoch: int, histograms: Lines) -> None:
    """Writes what `histograms.make_histograms` counts to histograms.jsonl.

    Raises:
      OSError: Naming the file that cannot be written.
    """
    for line in histograms:
      self._board.show_histogram(
          self._histograms.append({"step": step, "epoch": epoch, **line}))

  def sync(self) -> None:
    """Brings the records to the disk.

    Raises:
      OSError: Naming the file for which the disk failed.
    """
    self._metrics.sync()
    self._histograms.sync()
    self._board.flush()

  def close(self) -> None:
    """Closes the files."""
    self._metrics.close()
    self._histograms.close()
    self._board.close()


class _Log:
  """A file of lines that is appended to, and what it holds.

  Attributes:
    lines: The lines of the file.
  """

  def __init__(self, path: pathlib.Path, check: Any):
    self.lines: Lines = []
    self._path, self._check = path, check
    self._file: Any = None

  def open(self, step: int, saved: Lines | None) -> None:
    """Keeps what was recorded up to `step`, by `saved` if it is given."""
    if step == 0:
      saved = []  # All will be measured again, whatever is there.
    try:
      found = [line for line in json_files.read_lines(self._path, self._check)
               if line["step"] <= step and line.get("split") != "test"]
      fault = "" if saved is None else _difference(found, saved)
    except json_files.Damaged as error:
      if saved is None:
        raise
      found, fault = [], error.why
    if fault:
      _log.warning("%s: %s; it is %s", self._path, fault,
                   "written anew as the checkpoint"
                   f" of step {step} has it" if step else "begun anew")
    self.lines = found if saved is None else saved
    if self.lines or os.path.lexists(self._path):
      self.begin()

  def append(self, line: dict[str, Any]) -> dict[str, Any]:
    """Appends a line, and returns it as it was written."""
    self.begin()
    line = _finite(line)
    with files.naming(self._path):
      text = json.dumps(line, allow_nan=False).encode() + b"\n"
      while text:  # A disk that gets full takes a part.
        text = text[self._file.write(text):]
    self.lines.append(line)
    return line

  def sync(self) -> None:
    """Brings the file to the disk."""
    if self._file is not None:
      with files.naming(self._path):
        os.fsync(self._file.fileno())

  def close(self) -> None:
    """Closes the file."""
    if self._file is not None:
      self._file.close()

  def begin(self) -> None:
    """Makes the file, unless it was made already."""
    if self._file is not None:
      return
    files.write(self._path, "".join(json.dumps(line) + "\n" for line in self.lines))
    # Unbuffered: nothing is left to write after an error.
    self._file = self._path.open("ab", buffering=0)


def _difference(found: Lines, saved: Lines) -> str:
  """Says how many lines of a file are not what they were; "" if none."""
  if found == saved:
    return ""
  right = sum(line in found for line in saved)
  if right < len(saved):
    return f"{len(saved) - right} of {len(saved)} lines are missing or differ"
  return f"there are {len(found)} lines instead of {len(saved)}, or their order differs"


def _finite(value: Any) -> Any:
  """JSON has no infinities: what is not finite becomes null."""
  if isinstance(value, dict):
    return {name: _finite(part) for name, part in value.items()}
  if isinstance(value, list):
    return [_finite(part) for part in value]
  if isinstance(value, float) and not math.isfinite(value):
    return None
  return value
