"""minw.confusion: counts by hand, and what the files hold."""

import json
import logging

from matplotlib import colors
import numpy as np
from PIL import Image

from minw import confusion
from minw import plots

LABELS = ("cat", "dog", "o$l", "dog")
MATRIX = np.array([[3, 1, 0, 0], [0, 0, 2, 0], [0, 0, 0, 0], [1, 0, 0, 1]])


def test_count():
  labels = np.array([2, 0, 0, -1, 1, 2, 0], np.int32)
  predicted = np.array([2, 0, 1, 1, 1, 0, 1], np.int64)
  np.testing.assert_array_equal(
      confusion.count(labels, predicted, 3), [[1, 2, 0], [0, 1, 0], [1, 0, 1]])
  none = np.zeros(0, np.int32)
  np.testing.assert_array_equal(confusion.count(none, none, 2), np.zeros((2, 2)))


def test_results():
  assert confusion.results(MATRIX, LABELS) == {
      "class_accuracy": {"cat": 0.75, "dog (1)": 0.0, "o$l": None, "dog (3)": 0.5},
      "confusion": MATRIX.tolist()}


def test_files(tmp_path):
  record = {"split": "test", "accuracy": 0.5, **confusion.results(MATRIX, LABELS)}
  confusion.write(tmp_path / "a.json", record)
  text = (tmp_path / "a.json").read_text()
  assert json.loads(text) == record and "\n  [3, 1, 0, 0],\n  [0, 0, 2, 0],\n" in text
  with Image.open(tmp_path / "a.png") as image:
    assert image.format == "PNG" and image.width == 600 and image.height == 480
  assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "a.png"]


def test_a_picture_that_fails_is_a_warning(tmp_path, caplog):
  (tmp_path / "a.png").mkdir()
  with caplog.at_level(logging.WARNING, "minw"):
    confusion.write(tmp_path / "a.json",
                    {"accuracy": 0.5, **confusion.results(MATRIX, LABELS)})
  assert "a.png cannot be drawn" in caplog.text
  assert json.loads((tmp_path / "a.json").read_text())["accuracy"] == 0.5


def test_figure():
  axes, = plots.confusion_figure(MATRIX, LABELS, "accuracy 0.5").axes
  shares = axes.get_images()[0].get_array()
  np.testing.assert_array_equal(
      shares, [[.75, .25, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0], [.5, 0, 0, .5]])
  assert [label.get_text() for label in axes.get_yticklabels()] == list(LABELS)
  texts = {text.get_position(): text for text in axes.texts}
  assert {at: text.get_text() for at, text in texts.items() if text.get_text()} == {
      (0, 0): "3", (1, 0): "1", (2, 1): "2", (0, 3): "1", (3, 3): "1"}
  assert colors.to_hex(texts[0, 0].get_color()) == "#ffffff"  # On a dark cell.
  assert colors.to_hex(texts[1, 0].get_color()) == "#000000"


def test_figure_of_many_classes():
  axes, = plots.confusion_figure(np.eye(21), ["a"] * 21).axes
  assert not axes.texts and len(axes.get_xticklabels()) == 21
  axes, = plots.confusion_figure(np.eye(101), ["a"] * 101).axes
  assert "a" not in [label.get_text() for label in axes.get_xticklabels()]
