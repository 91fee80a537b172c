"""The README's Python runs."""

import pathlib
import re

import numpy as np

from minw import infer

README = pathlib.Path(__file__).parents[1] / "README.md"


def blocks():
  return re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


def test_estimators():
  code = next(block for block in blocks() if "estimators.aqe" in block)
  exec(code, {})


def test_own_network(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  code = next(block for block in blocks() if "class Net" in block)
  exec(code, {"__name__": "readme"})
  logits = infer.load("net.minw").logits(np.zeros((2, 32, 32, 3), np.uint8))
  assert logits.shape == (2, 10)
  use = next(block for block in blocks() if "infer.load" in block)
  assert "digits.minw" in use and "(64, 8, 8, 1)" in use
  exec(use.replace("digits.minw", "net.minw").replace("(64, 8, 8, 1)",
                                                      "(1, 32, 32, 3)"), {})
