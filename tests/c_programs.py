"""C and C++ that tests compile: the tools, the flags, and the scores of exported C."""

import ast
import pathlib
import shutil
import struct
import sys

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parents[1]
CSRC = ROOT / "minw" / "kernels" / "csrc"


def setup_flags():
  """What setup.py compiles files with, by instruction set."""
  names: dict = {}
  for statement in ast.parse((ROOT / "setup.py").read_text()).body:
    if isinstance(statement, ast.Assign):
      exec(ast.unparse(statement), names)
  return names["_X86_FLAGS"]


def tool(*names):
  """The path of the first of these programs that is installed; skips without one."""
  beside = str(pathlib.Path(sys.executable).parent)
  for name in names:
    path = shutil.which(name, path=beside) or shutil.which(name)
    if path:
      return path
  pytest.skip(f"{' or '.join(names)} is not installed")


def order(logits):
  """What C is to return for logits, from their bytes."""
  bits = [struct.unpack("<i", struct.pack("<f", v + 0.0))[0]
          for v in np.ravel(logits).tolist()]
  return np.reshape([v if v >= 0 else -(v & 0x7fffffff) - 1 for v in bits],
                    np.shape(logits))
