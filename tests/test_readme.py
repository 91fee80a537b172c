"""The README's Python runs."""

import pathlib
import re

import numpy as np

from minw import infer
from minw import pack
from minw.data import datasets
from minw.kernels import reference

README = pathlib.Path(__file__).parents[1] / "README.md"


def blocks():
  return re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


def test_estimators():
  code = next(block for block in blocks() if "estimators.aqe" in block)
  exec(code, {})


def test_train_and_evaluate(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  code = next(block for block in blocks() if "train.train_and_evaluate" in block)
  names = {}
  shorter = "num_epochs, c.conv_widths, c.dense_widths = 1, (8, 8), (16,)"
  assert "num_epochs = 10 " in code
  exec(code.replace("num_epochs = 10 ", shorter), names)
  assert names["status"]["state"] == "done"
  assert (tmp_path / "runs" / "python" / "status.json").exists()


def test_own_loop():
  """Its network is right on most test images once it is packed."""
  code = next(block for block in blocks() if "def step" in block)
  assert "(32, 32)" in code
  names = {}
  exec(code.replace("(32, 32)", "(16, 16)"), names)
  info = datasets.info("digits")
  program = pack.pack(names["net"], names["variables"], pixels=names["normalization"],
                      source_shape=info.image_shape)
  images, labels = datasets.load("digits", "test", None)
  found = reference.logits(program, images).argmax(-1)
  assert np.mean(found == labels) > 0.8


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
