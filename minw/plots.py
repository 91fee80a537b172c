"""Pictures: of a run, and of what the estimators are.

`python -m minw.plots --out=docs/aqe.png` draws the latter.
"""

import os
import pathlib
from typing import Any, Sequence

from absl import flags
import jax
import numpy as np

from minw import cli
from minw import estimators as estimators_lib
from minw import metrics
from minw import quantizers

# Of Okabe and Ito, for all kinds of colour vision.
BLUE, VERMILION, GREY = "#0072B2", "#D55E00", "#999999"

_CURVES = (  # Split, mode and style, the later over the earlier.
    ("train", "mixed", {"color": GREY}),
    ("train", "hard", {"color": "black", "linewidth": 1}),
    ("validation", "hard", {"color": VERMILION, "linewidth": 2.5}),
    ("validation", "mixed", {"color": BLUE, "linestyle": "--"}),
)

_ALPHAS = {  # Label and colour, the darker the nearer to the quantizer.
    0.0: (r"$\alpha$ = 0, identity", "#BBBBBB"),
    0.5: (r"$\alpha$ = 0.5", "#6DBBEA"),
    0.8: (r"$\alpha$ = 0.8", BLUE),
    1.0: (r"$\alpha$ = 1, quantizer", "#10284B"),
}


def curves(workdir: str) -> None:
  """Draws `workdir`/curves.png; nothing if the run has recorded nothing."""
  lines = metrics.read(workdir)
  if lines:
    save(curves_figure(lines), pathlib.Path(workdir) / "curves.png")


def curves_figure(lines: Sequence[dict[str, Any]]) -> Any:
  """Loss, accuracy and schedules by epoch, with the test accuracies as the title.

  Args:
    lines: of metrics.jsonl; a measurement that is missing or null leaves a gap.

  Returns:
    The matplotlib Figure; its axes are loss, accuracy, alpha, learning rate.
  """
  import matplotlib
  from matplotlib import figure

  fig = figure.Figure(figsize=(10, 3.6), dpi=150, layout="constrained")
  loss, accuracy, alpha = fig.subplots(1, 3, width_ratios=(3, 3, 2))
  rate = alpha.twinx()
  # A short run may have a single point, which is no line.
  markers = {"marker": "o" if len(lines) < 100 else "", "markersize": 3}

  for split, mode, style in _CURVES:
    chosen = [line for line in lines if (line["split"], line["mode"]) == (split, mode)]
    if not chosen and (split, mode) == ("train", "hard"):  # It is few runs' alone.
      continue
    for axes, name in ((loss, "loss"), (accuracy, "accuracy")):
      axes.plot(_column(chosen, "epoch"), _column(chosen, name),
                label=f"{split}, {mode}", **markers, **style)

  train = [line for line in lines if line["split"] == "train" and "alpha" in line]
  epochs = _column(train, "epoch")
  by_layer = np.array([np.atleast_1d(line["alpha"]) for line in train]).T
  shades = matplotlib.colormaps["cividis"](np.linspace(0, 0.9, len(by_layer)))
  for values, shade in zip(by_layer, shades):
    alpha.plot(epochs, values, color=shade, linewidth=1.5, **markers)
  rate.plot(epochs, _column(train, "learning_rate"), color=GREY, linestyle=":",
            linewidth=2)

  decorate(loss, "loss", "epoch")
  decorate(accuracy, "accuracy", "epoch")
  decorate(alpha, "alpha, first layer darkest" if len(by_layer) > 1 else "alpha",
            "epoch")
  for axes in (loss, rate):
    _log_scale(axes)
  for axes in (loss, accuracy, alpha):
    axes.set_xlim(left=0)
  alpha.set_ylim(-0.05, 1.05)
  rate.set_ylabel("learning rate (dotted)", color="#666666")
  rate.spines[["top", "left"]].set_visible(False)
  fig.legend(*loss.get_legend_handles_labels(), loc="outside lower center", ncols=4,
             frameon=False)
  tests = [f"{line['accuracy']:.4f} ({line['checkpoint']} checkpoint)"
           for line in lines if line["split"] == "test"]
  if tests:
    fig.suptitle("test accuracy " + ", ".join(tests), fontsize=11)
  return fig


def estimators(path: str) -> None:
  """Draws the picture of `estimators_figure` to the PNG `path`.

  Raises:
    OSError: it can not be written.
  """
  save(estimators_figure(), pathlib.Path(path))


def estimators_figure() -> Any:
  """AQE for some alpha beside the STE: forward for 1 and 3 bits, and backward.

  Returns:
    The matplotlib Figure; its axes are the three panels.
  """
  from matplotlib import figure

  fig = figure.Figure(figsize=(10, 4), dpi=180, layout="constrained")
  *forward, backward = fig.subplots(1, 3)

  def draw(axes, x, transform, grid):
    for alpha, (label, color) in _ALPHAS.items():
      y = transform(lambda x: estimators_lib.aqe(x, alpha, grid))(x)
      axes.plot(*_pieces(x, y), label=label, color=color, linewidth=2.5,
                solid_capstyle="butt")
    y = transform(lambda x: estimators_lib.ste(x, grid))(x)
    axes.plot(*_pieces(x, y), label="straight-through estimator",
              color=VERMILION, linestyle=(0, (3, 2)), linewidth=1.5)

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


def _pieces(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """A densely sampled curve with gaps, instead of vertical lines, where it jumps."""
  jumps = np.flatnonzero(np.abs(np.diff(y)) > 0.05) + 1
  return np.insert(x, jumps, np.nan), np.insert(y, jumps, np.nan)


def _column(lines: Sequence[dict[str, Any]], name: str) -> np.ndarray:
  return np.asarray([line.get(name) for line in lines], np.float64)  # None is NaN.


def decorate(axes: Any, title: str, xlabel: str) -> None:
  """What all panels have: a title, a name for x, a grid, and no frame."""
  axes.set_title(title, fontsize=11)
  axes.set_xlabel(xlabel)
  axes.grid(color="#E5E5E5", linewidth=0.8)
  axes.set_axisbelow(True)
  axes.spines[["top", "right"]].set_visible(False)


def _log_scale(axes: Any) -> None:
  from matplotlib import ticker

  axes.set_yscale("log")
  axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
  axes.yaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
  axes.yaxis.set_minor_locator(ticker.NullLocator())


def save(fig: Any, path: pathlib.Path) -> None:
  """Writes a figure in one move, so that no reader sees half of it."""
  part = path.with_name(path.name + ".part")
  fig.savefig(part, format="png")
  os.replace(part, path)


def define_flags() -> None:
  """Defines the flags of the command."""
  flags.DEFINE_string("out", None, "The PNG to write.", required=True)


def main() -> None:
  """Draws forward and backward of the estimators."""
  out = flags.FLAGS.out
  cli.check(not os.path.isdir(out), "out", out, "a file")
  try:
    estimators(out)
  except OSError as error:
    raise cli.UsageError(f"out={out!r} can not be written: {error}") from error


if __name__ == "__main__":
  cli.run(main, define_flags)
