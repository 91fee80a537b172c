"""Figs 1 to 5 of the paper (arXiv 2003.04296), drawn from the records of runs."""

import pathlib
from typing import Any, NamedTuple, Sequence

import numpy as np

from minw import histograms
from minw import plots
from minw import titles
from minw.report import records
from minw.workdir import metrics

# For each figure, the bits of weights and activations, and which of them it shows.
_HISTOGRAMS = {1: (1, "weights"), 2: (1, "activations"),
               3: (2, "weights"), 4: (2, "activations")}
_PANELS = 4  # Largest number of panels in a row of Figs 1 to 4.

_STYLES = {"aqe": ("AQE", plots.BLUE), "ste": ("STE", plots.VERMILION)}


class Pair(NamedTuple):
  """Runs that differ only in estimator and seed. They make a row of Fig 5.

  Attributes:
    runs: Records by estimator, "aqe" and "ste", with one record for each seed.
    split: "train" if all runs recorded the hard network's results on the training
      split, else "validation".
    curves: Curves by estimator, float64 (seeds, epochs, 3). The last axis has epoch,
      accuracy and loss.
  """

  runs: dict[str, list[records.Record]]
  split: str
  curves: dict[str, np.ndarray]


def draw(
    runs: Sequence[records.Record], out: str, layer: str
) -> tuple[list[str], list[str]]:
  """Draws the records of runs to `out`/fig1.png and so on.

  Args:
    runs: Records, see `records.read`. Figs 1 to 4 show the first run that fits. Fig 5
      shows all runs that make a pair.
    out: Folder of the figures. It is created if it is missing.
    layer: Layer of Figs 1 to 4. Its activations are the output of "norm_" + layer.

  Returns:
    Two lists of lines. The first names each figure that was drawn, and its runs. The
    second names each one that was not drawn, and the reason.

  Raises:
    OSError: A figure cannot be written.
  """
  folder = pathlib.Path(out)
  folder.mkdir(parents=True, exist_ok=True)
  drawn, missing = [], []
  for number, (bits, kind) in _HISTOGRAMS.items():
    path = layer if kind == "weights" else f"norm_{layer}"
    run, lines = _first_with(runs, bits, path)
    if run is None:
      missing.append(f"Fig {number}: no run with AQE and W{bits}A{bits} has histograms "
                     f"of {path} (config.histogram_layers)")
      continue
    c = run["config"]
    plots.save(histogram_figure(
        lines, f"Fig {number}: {bits}-bit {kind} of {layer}, {titles.network(c)}, "
        f"{titles.dataset(c)}, seed {run['seed']}"), folder / f"fig{number}.png")
    drawn.append(f"{folder / f'fig{number}.png'}: {run['name']}")
  found, left_out = pairs(runs)
  missing += [f"Fig 5: {line}" for line in left_out]
  if found:
    plots.save(comparison_figure(found), folder / "fig5.png")
    names = [run["name"] for pair in found for group in pair.runs.values()
             for run in group]
    drawn.append(f"{folder / 'fig5.png'}: {', '.join(names)}")
  return drawn, missing


def _first_with(runs, bits, path):
  for run in runs:
    c = run["config"]
    if run["histograms"] and c["estimator"] == "aqe" and (
        c["input_bits"] == c["weight_bits"] == bits):
      lines = [line for line in metrics.read_histograms(run["histograms"])
               if line["layer"] == path]
      if lines:
        return run, lines
  return None, []


def histogram_figure(lines: Sequence[dict[str, Any]], title: str) -> Any:
  """Plots the distribution of weights or activations in training (Figs 1 to 4).

  Args:
    lines: Lines of histograms.jsonl for one layer, one for each epoch.
    title: Title of the figure.

  Returns:
    The matplotlib Figure. It has axes for each epoch.
  """
  from matplotlib import figure

  columns = min(len(lines), _PANELS)
  rows = -(-len(lines) // columns)
  fig = figure.Figure(figsize=(10, 0.8 + 2.6 * rows), dpi=150, layout="constrained")
  panels = fig.subplots(
      rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
  kind = lines[0]["kind"]
  width = histograms.CENTRES[1] - histograms.CENTRES[0]
  edges = np.append(histograms.CENTRES - width / 2, 1 + width / 2)
  for axes, line in zip(panels, lines):
    counts = np.asarray(line["counts"])
    axes.stairs(100 * counts / counts.sum(), edges, fill=True, color=plots.BLUE)
    axes.set_xlim(-1.1, 1.1)
    axes.set_xticks((-1, -0.5, 0, 0.5, 1))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_tick_params(labelbottom=True)
    # Most activations are at the ends. On a linear axis the others would be invisible.
    axes.set_yscale("log")
    axes.set_ylim(1e-3, 100)
    axes.yaxis.set_major_formatter("{x:g}")
    plots.decorate(
        axes, rf"epoch {line['epoch']}, $\alpha$ = {line['alpha']:.3f}", "")
  for axes in panels[len(lines):]:
    axes.remove()
  fig.supxlabel(f"{kind[:-1]} as training computes with it", fontsize=10)
  fig.supylabel(f"% of all {kind}, in bins of {width:.2f}", fontsize=10)
  fig.suptitle(title, fontsize=11)
  return fig


def pairs(runs: Sequence[records.Record]) -> tuple[list[Pair], list[str]]:
  """Finds runs that differ only in seed and in estimator, AQE or STE.

  Returns:
    The pairs in the order of `runs`, and a line for each run that has a partner and is
    still in no pair, with the reason.
  """
  groups: dict[str, dict[str, list[records.Record]]] = {}
  for run in runs:
    name = titles.estimator(run["config"])
    if name in _STYLES:
      key = records.key(run["config"], ["estimator"])
      groups.setdefault(key, {}).setdefault(name, []).append(run)
  both = [group for group in groups.values() if group.keys() == _STYLES.keys()]
  found, left_out = [], []
  if not both:
    left_out.append("no runs of AQE and STE differ only in seed and estimator")
  for group in both:
    curves = {name: [(run, _curve(run)) for run in group[name]] for name in _STYLES}
    left_out += [f"{run['name']} is not drawn: {why}" for some in curves.values()
                 for run, (_, why) in some if why]
    whole = {name: [(run, lines) for run, (lines, why) in some if not why]
             for name, some in curves.items()}
    if all(whole.values()):
      found.append(_pair(whole))
    else:
      left_out += [f"{run['name']} is not drawn: no run of {_STYLES[other][0]} that "
                   "matches it has a complete curve" for name, other in
                   zip(_STYLES, reversed(_STYLES)) for run, _ in whole[name]]
  return found, left_out


def _curve(run: records.Record) -> tuple[dict[str, list[tuple]], str]:
  """Reads the curves of a run: (epoch, accuracy, loss) of the hard network by split.

  Returns:
    The curves by split and "", or an empty dict and the reason.
  """
  if not run["curve"]:
    return {}, "it has no curve"
  points: dict[str, list[tuple]] = {"train": [], "validation": []}
  for line in metrics.read_file(run["curve"]):
    if line["mode"] == "hard" and line["split"] in points:
      points[line["split"]].append((line["epoch"], line["accuracy"],
                                   line.get("loss")))
  epochs, every = run["config"]["num_epochs"], run["config"]["eval_every_epochs"]
  reports = sorted({*range(every, epochs, every), epochs})
  points = {split: lines for split, lines in points.items()
            if [epoch for epoch, *_ in lines] == reports}
  if "validation" not in points:
    return {}, f"its curve does not have the {len(reports)} validations of its config"
  return points, ""


def _pair(whole):
  split = "train" if all("train" in lines for some in whole.values()
                         for _, lines in some) else "validation"
  return Pair({name: [run for run, _ in some] for name, some in whole.items()}, split,
              {name: np.array([lines[split] for _, lines in some], np.float64)
               for name, some in whole.items()})  # A loss of None becomes NaN.


def comparison_figure(pairs: Sequence[Pair]) -> Any:
  """Plots accuracy and loss of the hard network by epoch, AQE against STE (Fig 5).

  Thin lines are single seeds, and thick lines are their mean. The titles of the panels
  name the split.

  Args:
    pairs: Pairs of runs, one for each row of panels.

  Returns:
    The matplotlib Figure. Each row has axes for accuracy and loss.
  """
  from matplotlib import figure

  fig = figure.Figure(
      figsize=(10, 0.6 + 2.9 * len(pairs)), dpi=150, layout="constrained")
  panels = fig.subplots(len(pairs), 2, squeeze=False)
  for row, pair, differing in zip(panels, pairs, _differing(pairs)):
    config = pair.runs["aqe"][0]["config"]
    split = {"train": "training split", "validation": "validation split"}[pair.split]
    heading = f"{titles.network(config)}\n" + ", ".join(
        [titles.dataset(config), titles.bits(config), *differing, split])
    for column, (axes, name) in enumerate(zip(row, ("accuracy", "loss")), start=1):
      for estimator, (label, color) in _STYLES.items():
        _draw_seeds(axes, pair.curves[estimator], column, label, color)
      plots.decorate(axes, heading, "epoch")
      axes.set_ylabel(f"{name} of the hard network")
      axes.set_xlim(0, config["num_epochs"])
      axes.legend(frameon=False)
  fig.suptitle("Fig 5: AQE against STE", fontsize=11)
  return fig


def _differing(pairs):
  """Describes the settings in which pairs differ, except those that titles name.

  Returns:
    A list of descriptions for each pair.
  """
  said = ("estimator", "dataset", "network", "conv_widths", "dense_widths",
          "input_bits", "weight_bits", "bits_rules")
  settings = [records.settings(pair.runs["aqe"][0]["config"], said) for pair in pairs]
  return [[records.described({name: value}) for name, value in each.items()
           if any(other.get(name) != value for other in settings)] for each in settings]


def _draw_seeds(axes, curves, column, label, color):
  epochs, values = curves[0, :, 0], curves[:, :, column]
  if len(curves) > 1:
    label = f"{label}, mean of {len(curves)} seeds"
    axes.plot(epochs, values.T, color=color, linewidth=0.6, alpha=0.5)
  axes.plot(epochs, values.mean(0), color=color, linewidth=2, label=label,
            marker="o" if len(epochs) == 1 else "")
