"""What all exports share: names, metadata, and the refusal of what is not exact."""

import re
from typing import Any

import numpy as np

from minw import packed

_LONGEST = 100  # Characters of a layer's name that are kept.


def values(program: packed.Program) -> list[packed.Value]:
  """What is known of all values, of a program that can be exported exactly.

  Raises:
    ValueError: a sum is of floats, and so depends on its order; names the layer.
  """
  kinds = packed.infer_values(program)
  for op, kind in zip(program.ops, kinds[1:]):
    if kind.kind == "FLOAT" and not isinstance(op, packed.Logits):
      raise ValueError(
          f"{op.name} has operands in a float format; only layers of 1, 2 and 3 bits"
          " can be exported exactly")
  return kinds


def names(program: packed.Program) -> list[str]:
  """A name for each value, the same in all exports: "00_image", "01_conv1", ...

  Names of layers come from a file, and these names become names of files and tensors:
  they are made of letters, digits and `_`, they are short, and no two are equal.
  """
  titles = ["image", *(op.name for op in program.ops)]
  return [f"{i:02d}_{re.sub('[^0-9A-Za-z]+', '_', title)[:_LONGEST]}"
          for i, title in enumerate(titles)]


def metadata(program: packed.Program) -> dict[str, Any]:
  """The metadata of an exported file, as JSON text."""
  known = {key: program.metadata[key] for key in ("config_hash", "step")
           if key in program.metadata}
  return {
      "labels": list(program.metadata.get("labels") or map(
          str, range(program.num_classes))),
      "source_shape": list(program.source_shape), "crop": list(program.crop),
      "pixel_offset": np.asarray(program.offset).tolist(), **known}
