"""minw.plots: what the figures hold, and that they come out as pictures."""

import json
import os

import matplotlib
import numpy as np
import pytest

from drawings import check_picture
from drawings import drawn
from minw import config as config_lib
from minw import plots


def run_lines(epochs=(4, 8, 12), alpha=lambda epoch: epoch / 12):
  """Lines as a run records them."""
  lines = []
  for epoch in epochs:
    line = {"step": 10 * epoch, "epoch": epoch}
    lines += [
        {**line, "split": "train", "mode": "mixed", "loss": 2 / epoch,
         "accuracy": 1 - 1 / epoch, "alpha": alpha(epoch), "learning_rate": 0.1 / epoch,
         "flip_rate": {"conv1": 0.1}},
        {**line, "split": "validation", "mode": "mixed", "loss": 3 / epoch,
         "accuracy": 1 - 2 / epoch, "input_distance": {"norm_conv1": 0.1}},
        {**line, "split": "validation", "mode": "hard", "loss": 4 / epoch,
         "accuracy": 1 - 3 / epoch}]
  return lines


TESTS = [{"step": 120, "epoch": 12, "split": "test", "mode": "hard", "loss": 0.3,
          "checkpoint": name, "checkpoint_step": step, "accuracy": accuracy}
         for name, step, accuracy in (("last", 120, 0.84411), ("best", 80, 0.85))]


def write(workdir, lines):
  (workdir / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))


def test_curves_hold_the_measurements():
  figure = plots.curves_figure(run_lines() + TESTS, "a run $of$ mine")
  loss, accuracy, alpha, rate = figure.axes
  epochs = np.array([4, 8, 12])
  for axes, values in (
      (loss, {"train, mixed": 2 / epochs, "validation, mixed": 3 / epochs,
              "validation, hard": 4 / epochs}),
      (accuracy, {"train, mixed": 1 - 1 / epochs, "validation, mixed": 1 - 2 / epochs,
                  "validation, hard": 1 - 3 / epochs})):
    lines = drawn(axes)
    assert values.keys() <= lines.keys()
    for label, (x, y) in ((label, lines[label]) for label in values):
      np.testing.assert_array_equal(x, epochs)
      np.testing.assert_allclose(y, values[label], rtol=1e-15)
  (line,), (rates,) = alpha.get_lines(), rate.get_lines()
  np.testing.assert_allclose(line.get_xydata(), np.stack([epochs, epochs / 12], 1))
  np.testing.assert_allclose(rates.get_xydata(), np.stack([epochs, 0.1 / epochs], 1))
  assert figure.get_suptitle() == (
      "a run $of$ mine\n"
      "test accuracy 0.8441 (last checkpoint), 0.8500 (best checkpoint)")
  assert loss.get_ylabel() == "loss (log scale)" and loss.get_yscale() == "log"
  assert "log scale" in rate.get_ylabel() and rate.get_yscale() == "log"


@pytest.mark.parametrize("accuracies, best", [
    ((0.5, 0.7, 0.6), 8), ((0.7, 0.5, 0.7), 12), ((None, 0.2, 0.1), 8),
    ((0.1, 0.2, 0.3), 12)])
def test_best_epoch_is_marked(accuracies, best):
  """That of the checkpoint that is kept as the best: of equals the last."""
  lines = run_lines()
  for line, accuracy in zip(lines[2::3], accuracies):
    assert (line["split"], line["mode"]) == ("validation", "hard")
    line["accuracy"] = accuracy
  loss, accuracy, *_ = plots.curves_figure(lines).axes
  for axes, value in ((loss, 4 / best), (accuracy, max(filter(None, accuracies)))):
    (x,), (y,) = drawn(axes)[f"best epoch: {best}"]
    assert (x, y) == (best, value)


def test_no_epoch_is_the_best_without_validation():
  loss, *_ = plots.curves_figure(run_lines()[:1]).axes
  assert not [label for label in drawn(loss) if "best" in label]


@pytest.mark.parametrize("name", [
    "digits", "costs $5", "a_{b}^c $x$", "数字", "line\nbreak", os.fsdecode(b"\xff"),
    "long" * 60])
def test_curves_name_their_run(tmp_path, name):
  workdir = tmp_path / name
  workdir.mkdir()
  write(workdir, run_lines())
  config = config_lib.copy(config_lib.default_config(), dataset="cifar100",
                           input_bits=3)
  (workdir / "config.json").write_text(config_lib.to_json(config))
  titles = []
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(plots, "curves_figure", lambda lines, title,
                  make=plots.curves_figure: (
        titles.append(title) or make(lines, title)))
    plots.curves(str(workdir))
  (title,) = titles
  run, path = title.split("\n")
  assert run == "ConvNet D, CIFAR-100, AQE, W1A3"
  assert path == str(workdir) or path.startswith("...") and path.endswith("long") or (
      name not in ("digits", "costs $5", "a_{b}^c $x$", "数字"))
  check_picture(workdir / "curves.png", 1500, 600)


def test_curves_of_alpha_by_layer():
  figure = plots.curves_figure(run_lines(alpha=lambda epoch: [1.0, epoch / 12, 0.0]))
  lines = figure.axes[2].get_lines()
  np.testing.assert_allclose([line.get_ydata() for line in lines],
                             [[1, 1, 1], [1 / 3, 2 / 3, 1], [0, 0, 0]])
  assert len({tuple(line.get_color()) for line in lines}) == 3
  assert figure.get_suptitle() == ""


def test_a_null_loss_leaves_a_gap():
  lines = run_lines()
  lines[3]["loss"] = None
  loss = plots.curves_figure(lines).axes[0]
  np.testing.assert_array_equal(drawn(loss)["train, mixed"][1], [0.5, np.nan, 1 / 6])


@pytest.mark.parametrize("lines", [
    run_lines() + TESTS,
    run_lines(range(1, 201), alpha=lambda epoch: [epoch / 200] * 9),
    run_lines((1,)),
], ids=["run", "long run by layer", "one epoch"])
def test_curves_file(tmp_path, lines):
  write(tmp_path, lines)
  plots.curves(str(tmp_path))
  assert {path.name for path in tmp_path.iterdir()} == {"metrics.jsonl", "curves.png"}
  check_picture(tmp_path / "curves.png", 1500, 600)


@pytest.mark.parametrize("lines", [
    run_lines((1,))[:1], run_lines((1,))[1:], TESTS,
    [{**line, "loss": None, "accuracy": 0.0} for line in run_lines()],
    [{**line, "loss": 0.0, "learning_rate": 0.0} for line in run_lines()],
], ids=["training", "validation", "test", "null losses", "zeros"])
def test_curves_of_little(tmp_path, lines):
  write(tmp_path, lines)
  plots.curves(str(tmp_path))
  assert (tmp_path / "curves.png").stat().st_size > 1000


@pytest.mark.parametrize("text", [None, "", '{"step": 1, "ep'])
def test_no_curves_of_nothing(tmp_path, text):
  if text is not None:
    (tmp_path / "metrics.jsonl").write_text(text)
  plots.curves(str(tmp_path))
  assert not list(tmp_path.glob("curves*"))


def test_curves_replace_the_older(tmp_path):
  (tmp_path / "curves.png").write_text("older")
  write(tmp_path, run_lines())
  plots.curves(str(tmp_path))
  check_picture(tmp_path / "curves.png", 1500, 600)


# Points between the thresholds, and their levels: 1 bit, 3 bits.
POINTS = np.array([-1, -0.9, -0.6, -0.2, -0.05, 0.05, 0.2, 0.6, 0.9, 1])
LEVELS = (np.sign(POINTS),
          np.array([-1, -1, -0.5, -0.25, 0, 0, 0.25, 0.5, 1, 1]))
LABELS = {0: r"$\alpha$ = 0, identity", 0.5: r"$\alpha$ = 0.5",
          0.8: r"$\alpha$ = 0.8", 1: r"$\alpha$ = 1, quantizer"}
STE = "straight-through estimator"


def at(curve, points):
  """The values of a drawn line at points that it was sampled at."""
  x, y = curve
  nearest = [np.nanargmin(np.abs(x - point)) for point in points]
  np.testing.assert_allclose(x[nearest], points, atol=1e-6)
  return y[nearest]


def test_forward_in_the_picture_of_the_estimators():
  for axes, levels in zip(plots.estimators_figure().axes, LEVELS):
    lines = drawn(axes)
    assert list(lines) == [*LABELS.values(), STE]
    for alpha, label in LABELS.items():
      np.testing.assert_allclose(
          at(lines[label], POINTS), alpha * levels + (1 - alpha) * POINTS, atol=1e-6)
    np.testing.assert_allclose(at(lines[STE], POINTS), levels)


def test_backward_in_the_picture_of_the_estimators():
  lines = drawn(plots.estimators_figure().axes[2])
  points = np.array([-1.5, -1.05, -0.9, -0.6, 0, 0.3, 0.9, 1.05, 1.5])
  inside = np.abs(points) <= 1
  assert list(lines) == [*LABELS.values(), STE]
  for alpha, label in LABELS.items():
    np.testing.assert_allclose(at(lines[label], points), 2 * alpha * inside, rtol=1e-6)
  np.testing.assert_array_equal(at(lines[STE], points), inside)


def test_jumps_in_the_picture_of_the_estimators_are_gaps():
  one_bit, three_bits, backward = plots.estimators_figure().axes
  for axes, jumps in ((one_bit, 1), (three_bits, 6), (backward, 2)):
    x, y = drawn(axes)[LABELS[1]]
    assert np.isnan(x).sum() == np.isnan(y).sum() == jumps


def test_estimators_file(tmp_path):
  plots.estimators(str(tmp_path / "aqe.png"))
  check_picture(tmp_path / "aqe.png", 1800, 720)
  assert [path.name for path in tmp_path.iterdir()] == ["aqe.png"]


def test_global_settings_are_left_alone():
  before = dict(matplotlib.rcParams)
  plots.curves_figure(run_lines())
  plots.estimators_figure()
  assert dict(matplotlib.rcParams) == before
