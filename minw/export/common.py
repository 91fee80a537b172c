"""Helpers that all exports share: checks of exactness, names of values, metadata."""

import re
from typing import Any

import numpy as np

from minw import packed

_LONGEST = 100  # Largest number of characters kept of a layer's name.


def values(program: packed.Program) -> list[packed.Value]:
  """Returns shape, kind, bits and bound of each value of a program.

  Raises:
    ValueError: The program cannot be exported exactly, because a sum of floats depends
      on the order of its terms. The message names the layer.
  """
  kinds = packed.infer_values(program)
  for op, kind in zip(program.ops, kinds[1:]):
    if kind.kind == "FLOAT" and not isinstance(op, packed.Logits):
      raise ValueError(
          f"{op.name} has operands in a float format; only layers of 1, 2 and 3 bits"
          " can be exported exactly")
  return kinds


def names(program: packed.Program) -> list[str]:
  """Returns a name for each value: "00_image", "01_conv1", ...

  All exports use the same names, for files and tensors. Names of layers come from a
  file that may not be trusted. Therefore these names consist of letters, digits and
  "_", are short, and differ from one another.
  """
  titles = ["image", *(op.name for op in program.ops)]
  return [f"{i:02d}_{re.sub('[^0-9A-Za-z]+', '_', title)[:_LONGEST]}"
          for i, title in enumerate(titles)]


def metadata(program: packed.Program) -> dict[str, Any]:
  """Returns the metadata of an exported file, as values that JSON can hold."""
  known = {key: program.metadata[key] for key in ("config_hash", "step")
           if key in program.metadata}
  return {
      "labels": list(program.metadata.get("labels") or map(
          str, range(program.num_classes))),
      "source_shape": list(program.source_shape), "crop": list(program.crop),
      "pixel_offset": np.asarray(program.offset).tolist(), **known}
