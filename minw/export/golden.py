"""Writes every value of a packed network for a few images.

Other implementations can be checked against these files. The folder holds one array
NAME.npy for each value, with axes (batch, height, width, channels):

  input        the images, uint8
  NN_image     the pixels minus their offset, int32
  NN_layer     accumulators (int32), codes (int8) or logits (float32)

The file index.json lists the inputs and the result of each operation. For codes it also
lists the integer level that each code stands for.
"""

import io
import json
import os
import pathlib

import numpy as np

from minw import files
from minw import packed
from minw.export import common
from minw.kernels import reference


def write(path: str | os.PathLike, program: packed.Program, images: np.ndarray) -> None:
  """Writes the folder.

  Args:
    path: Path of the folder, which is created if it does not exist.
    program: The network.
    images: Images, uint8 (batch, *program.source_shape).
  """
  kinds, names = common.values(program), common.names(program)
  folder = pathlib.Path(path)
  folder.mkdir(parents=True, exist_ok=True)
  _save(folder / "input.npy", images)
  for name, value in zip(names, reference.run(program, images)):
    _save(folder / f"{name}.npy", value)
  values = [{"name": name, "kind": kind.kind, "shape": list(kind.shape)}
            | ({"levels": packed.LEVELS[kind.bits]} if kind.bits else {})
            for name, kind in zip(names, kinds)]
  for value, op in zip(values[1:], program.ops):
    value["operation"] = type(op).__name__
    value["inputs"] = [names[i] for i in packed.inputs(op)]
  files.write(folder / "index.json", json.dumps(
      {**common.metadata(program), "values": values}, indent=1) + "\n")


def _save(path: pathlib.Path, array: np.ndarray) -> None:
  data = io.BytesIO()
  np.save(data, array)
  files.write(path, data.getvalue())
