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

from minw import workdir as workdir_lib


def read(workdir: str) -> list[dict[str, Any]]:
  """The lines of metrics.jsonl; a last line that was cut off is left out."""
  path = pathlib.Path(workdir) / "metrics.jsonl"
  return read_file(path) if path.exists() else []


def read_file(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
  """The lines of a file like metrics.jsonl, wherever it is."""
  return [json.loads(line) for line in pathlib.Path(path).read_text().split("\n")[:-1]]


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
    workdir_lib.write_file(path, "".join(json.dumps(line) + "\n" for line in kept))
    self._file = path.open("a")
    # Shown anew: a run that was killed may not have written all of it. The suffix
    # tells apart files begun in the same second, which would overwrite each other.
    self._board = tensorboardX.SummaryWriter(
        os.path.join(workdir, "tensorboard"), purge_step=0,
        filename_suffix=f".{time.time_ns()}")
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
    """
    line = _finite(line)
    self._file.write(json.dumps(line, allow_nan=False) + "\n")
    self._file.flush()
    self._show(line)

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
    """Writes out what is buffered."""
    self._file.close()
    self._board.close()


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
