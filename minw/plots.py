"""Draw the forward and backward passes of the estimators.

`python -m minw.plots --out=docs/aqe.png` draws them. The curves of a run need no
command: training draws them to curves.png in the workdir.
"""

import io
import os
import pathlib
from typing import Any, Sequence
import warnings

from absl import flags
import jax
import numpy as np

from minw import cli
from minw import errors
from minw import estimators as estimators_lib
from minw import files
from minw import paths
from minw import quantizers
from minw import titles
from minw.workdir import metrics
from minw.workdir import run_files

# Colors of Okabe and Ito, which people with any kind of color vision can distinguish.
BLUE, VERMILION, GREY = "#0072B2", "#D55E00", "#999999"

_CURVES = (  # Split, mode and style. Later curves are drawn over earlier ones.
    ("train", "mixed", {"color": GREY}),
    ("train", "hard", {"color": "black", "linewidth": 1}),
    ("validation", "hard", {"color": VERMILION, "linewidth": 2.5}),
    ("validation", "mixed", {"color": BLUE, "linestyle": "--"}),
)

# Style of each alpha. Darker colors are nearer to the quantizer.
ALPHAS = {alpha: {"label": rf"$\alpha$ = {name}", "color": color, "linewidth": 2.5,
                  "solid_capstyle": "butt"}
          for alpha, name, color in ((0.0, "0, identity", "#BBBBBB"),
                                     (0.5, "0.5", "#6DBBEA"), (0.8, "0.8", BLUE),
                                     (1.0, "1, quantizer", "#10284B"))}
# Largest numbers of classes for which a confusion matrix has its counts and labels.
_COUNTED_CLASSES, _LABELED_CLASSES = 20, 100
_IMAGES_IN_A_ROW = 8

STE = {"label": "straight-through estimator", "color": VERMILION,
       "linestyle": (0, (3, 2)), "linewidth": 1.5}


def curves(workdir: str) -> None:
  """Draws `workdir`/curves.png, unless the run has recorded nothing."""
  lines = metrics.read(workdir)
  if lines:
    path = paths.at(workdir)
    title = (titles.run(run_files.read_config(workdir)) + "\n"
             if (path / "config.json").exists() else "")
    save(curves_figure(lines, title + _shortened(workdir)), path / "curves.png")


def _shortened(path: str, length: int = 90) -> str:
  """Returns a path in one line. Of a long path only the end is kept.

  The end tells the path from its neighbors.
  """
  path = " ".join(os.fsencode(path).decode(errors="replace").split())
  return path if len(path) <= length else f"...{path[-length:]}"


def curves_figure(lines: Sequence[dict[str, Any]], title: str = "") -> Any:
  """Plots loss, accuracy and schedules by epoch.

  A star marks the epoch of the best validation accuracy. Its checkpoint is kept.

  Args:
    lines: Lines of metrics.jsonl. A measurement that is missing or null leaves a gap.
    title: Title that names the run. Test accuracies are added to it.

  Returns:
    The matplotlib Figure. Its axes are loss, accuracy, alpha, learning rate.
  """
  import matplotlib
  from matplotlib import figure

  fig = figure.Figure(figsize=(10, 4), dpi=150, layout="constrained")
  loss, accuracy, alpha = fig.subplots(1, 3, width_ratios=(3, 3, 2))
  rate = alpha.twinx()
  # A short run may have a single point, and a line through one point is invisible.
  markers = {"marker": "o" if len(lines) < 100 else "", "markersize": 3}

  for split, mode, style in _CURVES:
    chosen = [line for line in lines if (line["split"], line["mode"]) == (split, mode)]
    if not chosen and (split, mode) == ("train", "hard"):  # Few runs record it.
      continue
    for axes, name in ((loss, "loss"), (accuracy, "accuracy")):
      axes.plot(_column(chosen, "epoch"), _column(chosen, name),
                label=f"{split}, {mode}", **markers, **style)

  _log_scale(loss, "loss ({scale} scale)")
  best = _best(lines)
  for axes, name in ((loss, "loss"), (accuracy, "accuracy")):
    if best is None or best.get(name) is None:
      continue
    axes.axvline(best["epoch"], color=VERMILION, linewidth=0.8, linestyle=":")
    axes.plot(_column([best], "epoch"), _column([best], name), color=VERMILION,
              linestyle="", marker="*", markersize=12, markeredgecolor="white",
              label=f"best epoch: {best['epoch']}", zorder=3)

  train = [line for line in lines if line["split"] == "train" and "alpha" in line]
  epochs = _column(train, "epoch")
  by_layer = np.array([np.atleast_1d(line["alpha"]) for line in train]).T
  shades = matplotlib.colormaps["cividis"](np.linspace(0, 0.9, len(by_layer)))
  for values, shade in zip(by_layer, shades):
    alpha.plot(epochs, values, color=shade, linewidth=1.5, **markers)
  rate.plot(epochs, _column(train, "learning_rate"), color=GREY, linestyle=":",
            linewidth=2, **markers)

  decorate(loss, "loss", "epoch")
  decorate(accuracy, "accuracy", "epoch")
  decorate(alpha, "alpha, first layer darkest" if len(by_layer) > 1 else "alpha",
            "epoch")
  _log_scale(rate, "learning rate (grey, {scale} scale)")
  for axes in (loss, accuracy, alpha):
    axes.set_xlim(left=0)
  alpha.set_ylim(-0.05, 1.05)
  rate.yaxis.label.set_color("#666666")
  rate.spines[["top", "left"]].set_visible(False)
  fig.legend(*loss.get_legend_handles_labels(), loc="outside lower center", ncols=5,
             frameon=False, columnspacing=1.5)
  tests = [f"{line['accuracy']:.4f} ({line['checkpoint']} checkpoint)"
           for line in lines if line["split"] == "test"]
  fig.suptitle("\n".join(filter(None, [
      title, "test accuracy " + ", ".join(tests) if tests else ""])),
      fontsize=11, parse_math=False)  # A path may contain dollar signs.
  return fig


def confusion_figure(
    matrix: np.ndarray, labels: Sequence[str], title: str = ""
) -> Any:
  """Draws a confusion matrix; darker cells have a larger share of their row's images.

  Up to 20 classes, cells also have their counts. Up to 100 classes, rows and columns
  have their labels.

  Args:
    matrix: Number of images of each label (row) that are taken for each class (column).
    labels: Names of the classes.
    title: Title of the figure.

  Returns:
    The matplotlib Figure. Its axes are the matrix.
  """
  from matplotlib import figure

  size = len(labels)
  side = min(max(4.0, 0.45 * size), 14.0)
  fig = figure.Figure(figsize=(side + 1, side), dpi=120, layout="constrained")
  axes = fig.subplots()
  share = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
  axes.imshow(share, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
  if size <= _COUNTED_CLASSES:
    for (i, j), number in np.ndenumerate(matrix):
      axes.text(j, i, f"{number}" if number else "", ha="center", va="center",
                fontsize=8, color="white" if share[i, j] > 0.5 else "black")
  if size <= _LABELED_CLASSES:
    font = min(9.0, 600 / (8 * size))
    shown = [_shortened(label, 20) for label in labels]
    axes.set_xticks(range(size), shown, rotation=90, fontsize=font, parse_math=False)
    axes.set_yticks(range(size), shown, fontsize=font, parse_math=False)
  axes.set_xlabel("predicted class")
  axes.set_ylabel("label")
  axes.set_title(title, fontsize=10, parse_math=False)
  return fig


def images_figure(images: np.ndarray, titles: Sequence[str]) -> Any:
  """Draws images in rows of up to 8, each pixel as a square.

  Args:
    images: uint8 (n, height, width, channels), with 1 or 3 channels.
    titles: Text above each image.

  Returns:
    The matplotlib Figure. Each of its axes is an image.
  """
  from matplotlib import figure

  columns = min(len(images), _IMAGES_IN_A_ROW)
  rows = -(-len(images) // columns)
  fig = figure.Figure(figsize=(1.6 * columns, 1.9 * rows), dpi=120,
                      layout="constrained")
  for i, (image, text) in enumerate(zip(images, titles)):
    axes = fig.add_subplot(rows, columns, i + 1)
    axes.imshow(image, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    axes.set_axis_off()
    axes.set_title(text, fontsize=7, parse_math=False)
  return fig


def _best(lines):
  """Returns the validation line of the best checkpoint.

  Of several lines with that accuracy it returns the last.
  """
  hard = [line for line in lines if (line["split"], line["mode"]) == (
      "validation", "hard") and line.get("accuracy") is not None]
  return max(hard, key=lambda line: (line["accuracy"], line["epoch"]), default=None)


def estimators(path: str) -> None:
  """Draws `estimators_figure` to the PNG file `path`.

  Raises:
    OSError: The file cannot be written.
  """
  save(estimators_figure(), pathlib.Path(path))


def estimators_figure() -> Any:
  """Plots AQE for several alpha beside the straight-through estimator.

  Two panels show the forward pass for 1 and 3 bits, and one the backward pass.

  Returns:
    The matplotlib Figure. Its axes are the three panels.
  """
  from matplotlib import figure

  fig = figure.Figure(figsize=(10, 4), dpi=180, layout="constrained")
  *forward, backward = fig.subplots(1, 3)

  def draw(axes, x, transform, grid):
    for alpha, style in ALPHAS.items():
      y = transform(lambda x: estimators_lib.aqe(x, alpha, grid))(x)  # noqa: B023
      axes.plot(*pieces(x, y), **style)
    y = transform(lambda x: estimators_lib.ste(x, grid))(x)
    axes.plot(*pieces(x, y), **STE)

  inside = np.linspace(-1, 1, 4001, dtype=np.float32)
  for axes, bits in zip(forward, (1, 3)):
    grid = quantizers.input_grid(bits)
    draw(axes, inside, lambda f: f, grid)
    axes.set_xticks((-1, -0.5, 0, 0.5, 1))
    axes.set_yticks(np.unique([0, *grid.magnitudes, *-grid.magnitudes]))
    decorate(axes, f"forward, {bits} bit{'s' * (bits > 1)}", "x")
  draw(backward, 1.5 * inside, lambda f: jax.grad(lambda x: f(x).sum()),
       quantizers.input_grid(1))
  backward.set_xticks((-1, 0, 1))
  backward.set_yticks((0, 0.5, 1, 1.5, 2))
  decorate(backward, "backward, all bits", "x")
  forward[0].set_ylabel(r"$\alpha\, h(x) + (1 - \alpha)\, x$")
  backward.set_ylabel(r"gradient, $2 \alpha$ where $|x| \leq 1$")
  for axis in (axis for axes in fig.axes for axis in (axes.xaxis, axes.yaxis)):
    axis.set_major_formatter("{x:g}")
  fig.legend(*backward.get_legend_handles_labels(), loc="outside lower center",
             ncols=5, frameon=False, columnspacing=1.5)
  return fig


def pieces(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Inserts gaps into a densely sampled curve where it jumps.

  Without the gaps, matplotlib would draw vertical lines there.

  Args:
    x: Ascending positions, a few thousandths apart.
    y: Samples at these positions. The curve jumps where neighbors differ by more than
      0.05.

  Returns:
    x and y with NaN at each jump.
  """
  jumps = np.flatnonzero(np.abs(np.diff(y)) > 0.05) + 1
  return np.insert(x, jumps, np.nan), np.insert(y, jumps, np.nan)


def _column(lines: Sequence[dict[str, Any]], name: str) -> np.ndarray:
  return np.asarray([line.get(name) for line in lines], np.float64)  # None is NaN.


def decorate(axes: Any, title: str, xlabel: str) -> None:
  """Adds what all panels have: a title, a label of the x axis and a grid.

  The top and the right side of the frame are removed.
  """
  axes.set_title(title, fontsize=11)
  axes.set_xlabel(xlabel)
  axes.grid(color="#E5E5E5", linewidth=0.8)
  axes.set_axisbelow(True)
  axes.spines[["top", "right"]].set_visible(False)


def _log_scale(axes: Any, label: str) -> None:
  """Makes the y axis logarithmic if a line has positive values, and labels it.

  Args:
    axes: Axes that have all their lines.
    label: Label of the axis. "{scale}" in it stands for "log" or "linear".
  """
  from matplotlib import ticker

  positive = any(np.any(line.get_ydata() > 0) for line in axes.get_lines())
  axes.set_ylabel(label.format(scale="log" if positive else "linear"))
  if not positive:
    return
  axes.set_yscale("log")
  axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
  axes.yaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
  axes.yaxis.set_minor_locator(ticker.NullLocator())


def save(fig: Any, path: paths.AnyPath) -> None:
  """Writes a figure to a file, which is replaced at once and never half written."""
  image = io.BytesIO()
  with warnings.catch_warnings():  # A path may have characters that the font lacks.
    warnings.filterwarnings("ignore", message="Glyph .* missing from font")
    fig.savefig(image, format="png")
  files.write(path, image.getvalue())


def define_flags() -> None:
  """Defines the flags of the command."""
  cli.DEFINE_path("out", None, "PNG file to write.")
  cli.require("out")


def main() -> None:
  """Draws the forward and backward passes of the estimators."""
  out = flags.FLAGS.out
  errors.check(not os.path.isdir(out), "out", out, "a file")
  try:
    estimators(out)
  except OSError as error:
    raise errors.UsageError(f"out={out!r} cannot be written: {error}") from error


if __name__ == "__main__":
  cli.run(main, define_flags)
