"""minw.report.figures: what is drawn, and what is left out by name."""

import json
import pathlib

from matplotlib.backends import backend_agg
import numpy as np
import pytest

from drawings import drawn
from minw.report import figures
from report_records import made


@pytest.mark.parametrize("number", [
    1, 4, 9, *(pytest.param(slow, marks=pytest.mark.slow) for slow in (2, 3, 5))])
def test_labels_of_histograms_do_not_collide(number):
  """Whatever the number of epochs: no two labels of the picture overlap."""
  counts = [1] * 201
  lines = [{"epoch": 100 + i, "alpha": 0.5, "kind": "weights", "counts": counts}
           for i in range(number)]
  figure = figures.histogram_figure(lines, "Fig 1")
  assert len(figure.axes) == number
  renderer = backend_agg.FigureCanvasAgg(figure).get_renderer()
  figure.draw(renderer)
  texts = []
  for axes in figure.axes:
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    texts += [axes.title]
    texts += [label for label in axes.get_xticklabels()
              if left <= label.get_position()[0] <= right]
    texts += [label for label in axes.get_yticklabels()
              if low <= label.get_position()[1] <= high]
  boxes = [text.get_window_extent(renderer) for text in texts if text.get_text()]
  assert len(boxes) >= 6 * number
  for i, box in enumerate(boxes):
    assert not box.padded(1).count_overlaps(boxes[:i])


def curve_run(tmp_path, estimator, seed, losses, splits=("validation",), **changes):
  path = tmp_path / f"{estimator}{seed}.jsonl"
  path.write_text("".join(json.dumps(
      {"step": epoch, "epoch": epoch, "split": split, "mode": mode,
       "accuracy": 1 - loss,
       "loss": loss * (1 + (split == "train") + 4 * (mode == "mixed"))}) + "\n"
      for epoch, loss in enumerate(losses, start=1) for split in splits
      for mode in ("mixed", "hard")))
  return made(seed=seed, estimator=estimator, num_epochs=len(losses), **changes) | {
      "curve": str(path), "name": path.name}


def test_figure_of_estimators(tmp_path):
  both = ("train", "validation")
  found = [curve_run(tmp_path, "aqe", 0, (0.5, 0.25), both),
           curve_run(tmp_path, "ste", 0, (0.5, 0.4), both),
           curve_run(tmp_path, "aqe", 1, (0.3, 0.15), both),
           curve_run(tmp_path, "aqe", 2, (0.9, 0.9), dataset="cifar100"),
           curve_run(tmp_path, "ste", 2, (0.8, 0.7), both, dataset="cifar100"),
           curve_run(tmp_path, "ste", 3, (0.8, 0.7), weight_bits=2)]
  pairs, left_out = figures.pairs(found)
  assert left_out == []
  assert seeds_of(pairs) == [
      {"aqe": [0, 1], "ste": [0]}, {"aqe": [2], "ste": [2]}]
  accuracy, loss, accuracy100, loss100 = figures.comparison_figure(pairs).axes
  assert "training split" in accuracy.get_title()
  assert "validation split" in loss100.get_title()
  np.testing.assert_allclose(drawn(loss)["AQE, mean of 2 seeds"], [[1, 2], [0.8, 0.4]])
  np.testing.assert_allclose(drawn(loss)["STE"], [[1, 2], [1.0, 0.8]])
  np.testing.assert_allclose(drawn(accuracy)["STE"], [[1, 2], [0.5, 0.6]])
  np.testing.assert_allclose(drawn(loss100)["STE"], [[1, 2], [0.8, 0.7]])
  assert "CIFAR-100, W1A1" in accuracy100.get_title()


def seeds_of(pairs):
  return [{name: [run["seed"] for run in group] for name, group in pair.runs.items()}
          for pair in pairs]


def test_all_pairs_are_drawn(tmp_path):
  """For one data set too, all bits, and configs that differ in other fields."""
  found = []
  for changes in (dict(), dict(crop_size=30), dict(weight_bits=3),
                  dict(conv_widths=(8, 8), dense_widths=(4,))):
    folder = tmp_path / str(len(found))
    folder.mkdir()
    found += [curve_run(folder, name, seed, (0.5, 0.4), **changes)
              for name in ("ste", "aqe") for seed in (0, 1)]
  (tmp_path / "float").mkdir()
  found += [curve_run(tmp_path / "float", name, 0, (0.5, 0.4), input_bits="float32",
                      weight_bits="float32") for name in ("ste", "aqe")]
  pairs, left_out = figures.pairs(found)
  assert seeds_of(pairs) == [{"aqe": [0, 1], "ste": [0, 1]}] * 4 and left_out == []
  titles = [axes.get_title() for axes in figures.comparison_figure(pairs).axes]
  assert titles[0] == titles[1] == "ConvNet D\nCIFAR-10, W1A1, validation split"
  assert titles[2::2] == ["ConvNet D\nCIFAR-10, W1A1, crop_size=30, validation split",
                          "ConvNet D\nCIFAR-10, W3A1, validation split",
                          "ConvNet 8-8 + 4\nCIFAR-10, W1A1, validation split"]


def test_runs_that_are_in_no_figure_are_named(tmp_path):
  short = curve_run(tmp_path, "aqe", 1, (0.5, 0.4))
  short["config"]["num_epochs"] = 2
  path = pathlib.Path(short["curve"])
  path.write_text("".join(path.read_text().splitlines(keepends=True)[:2]))
  found = [curve_run(tmp_path, "aqe", 0, (0.5, 0.4)), short,
           curve_run(tmp_path, "ste", 2, (0.3, 0.2)),
           curve_run(tmp_path, "ste", 3, (0.3, 0.2)) | {"curve": None}]
  pairs, left_out = figures.pairs(found)
  assert seeds_of(pairs) == [{"aqe": [0], "ste": [2]}]
  assert left_out == [
      "aqe1.jsonl is not drawn: its curve does not have the 2 validations of its"
      " config",
      "ste3.jsonl is not drawn: it has no curve"]
  pairs, left_out = figures.pairs([found[0], found[3]])
  assert pairs == [] and left_out == [
      "ste3.jsonl is not drawn: it has no curve",
      "aqe0.jsonl is not drawn: no run of STE that matches it has a complete curve"]
  assert figures.pairs(found[:2])[1] == [
      "no runs of AQE and STE differ only in seed and estimator"]
