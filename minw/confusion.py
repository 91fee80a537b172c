"""Confusion matrices: how often each class is taken for each other one.

A matrix is int64 (classes, classes). Its rows are the labels, and its columns are the
classes that a network predicts.
"""

import collections
import json
import os
from typing import Any, Sequence

import numpy as np

from minw import display
from minw import files
from minw import paths
from minw import plots


def count(labels: np.ndarray, predicted: np.ndarray, num_classes: int) -> np.ndarray:
  """Counts the images of each label that are taken for each class.

  Args:
    labels: Labels, integers (n,). An image with the label -1 is not counted.
    predicted: Predicted classes, integers (n,).
    num_classes: Number of classes.

  Returns:
    The confusion matrix.
  """
  kept = labels >= 0
  pairs = num_classes * labels[kept].astype(np.int64) + predicted[kept]
  return np.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)


def results(matrix: np.ndarray, labels: Sequence[str]) -> dict[str, Any]:
  """Returns what a matrix says, as JSON has it.

  Args:
    matrix: The confusion matrix.
    labels: Names of the classes.

  Returns:
    {"class_accuracy", "confusion"}. The first is the fraction of each class's images
    that are predicted correctly, by name of the class. It is None for a class without
    images. Classes of equal names are told apart by their numbers. The second is the
    matrix as a list of rows.
  """
  repeated = {label for label, times in collections.Counter(labels).items()
              if times > 1}
  names = [f"{label} ({i})" if label in repeated else label
           for i, label in enumerate(labels)]
  return {"class_accuracy": {name: float(row[i] / row.sum()) if row.any() else None
                             for i, (name, row) in enumerate(zip(names, matrix))},
          "confusion": matrix.tolist()}


def write(path: str | os.PathLike, record: dict[str, Any]) -> None:
  """Writes an evaluation to a JSON file, and draws it beside the file as a PNG file.

  If the picture cannot be drawn, a warning is logged.

  Args:
    path: Path of the JSON file.
    record: The evaluation: "accuracy", the keys of `results`, and others.

  Raises:
    OSError: The file cannot be written.
  """
  target = paths.at(path)
  rows = ",\n  ".join(map(json.dumps, record["confusion"]))
  rest = {name: value for name, value in record.items() if name != "confusion"}
  files.write(target, json.dumps(rest, indent=1).removesuffix("\n}")
              + f',\n "confusion": [\n  {rows}]\n}}\n')
  picture = target.with_name(target.name.removesuffix(".json") + ".png")
  with display.harmless(f"{picture} cannot be drawn"):
    plots.save(plots.confusion_figure(
        np.array(record["confusion"]), list(record["class_accuracy"]),
        f"accuracy {record['accuracy']:.4f}"), picture)
