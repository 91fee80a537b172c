"""The measurements of a run: metrics.jsonl, and TensorBoard's view of it."""

import json
import math
import os
import pathlib
import time
from typing import Any

import tensorboardX

from minw import workdir as workdir_lib


def read(workdir: str) -> list[dict[str, Any]]:
  """The lines of metrics.jsonl; a last line that was cut off is left out."""
  path = pathlib.Path(workdir) / "metrics.jsonl"
  return read_file(path) if path.exists() else []


def read_file(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
  """The lines of a file like metrics.jsonl, wherever it is."""
  return [json.loads(line) for line in pathlib.Path(path).read_text().split("\n")[:-1]]


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
    workdir_lib.write_file(path, "".join(json.dumps(line) + "\n" for line in kept))
    self._file = path.open("a")
    # Shown anew: a run that was killed may not have written all of it. The suffix
    # tells apart files begun in the same second, which would overwrite each other.
    self._board = tensorboardX.SummaryWriter(
        os.path.join(workdir, "tensorboard"), purge_step=0,
        filename_suffix=f".{time.time_ns()}")
    for line in kept:
      self._show(line)

  def write(self, line: dict[str, Any]) -> None:
    """Writes a line: step, epoch, split, mode ("hard" or "mixed") and measurements.

    A measurement is a number, a list with one for each layer, or a dict by layer.
    """
    line = _finite(line)
    self._file.write(json.dumps(line, allow_nan=False) + "\n")
    self._file.flush()
    self._show(line)

  def _show(self, line):
    prefix = f"{line['split']}/{line['mode']}"
    if "checkpoint" in line:  # The test split has lines of two, at the same step.
      prefix += f"_{line['checkpoint']}"
    for name, value in line.items():
      if name not in ("step", "epoch", "split", "mode"):
        for suffix, number in _numbers(value):
          self._board.add_scalar(f"{prefix}_{name}{suffix}", number, line["step"])

  def close(self) -> None:
    """Writes out what is buffered."""
    self._file.close()
    self._board.close()


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
