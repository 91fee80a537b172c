"""Figs 1 to 5 of the paper (arXiv 2003.04296), from what runs recorded."""

import pathlib
from typing import Any, Sequence

import numpy as np

from minw import histograms
from minw import metrics
from minw import models
from minw import plots
from minw.report import records

# Of what networks, inputs and weights, and what of a layer.
_HISTOGRAMS = {1: (1, "weights"), 2: (1, "activations"),
               3: (2, "weights"), 4: (2, "activations")}

_STYLES = {"aqe": ("AQE", plots.BLUE), "ste": ("STE", plots.VERMILION)}


def draw(runs: Sequence[records.Record], out: str, layer: str) -> tuple[list[str],
                                                                        list[str]]:
  """Draws what the runs have recorded, to `out`/fig1.png and so on.

  Args:
    runs: see `records.read`; the first that fits counts, for Fig 5 with all its seeds.
    out: a folder, made if missing.
    layer: of Figs 1 to 4; what counts as its activations is what "norm_" + layer made.

  Returns:
    What was drawn and of what runs, and what was not and why, a line each.

  Raises:
    OSError: it can not be written.
  """
  folder = pathlib.Path(out)
  folder.mkdir(parents=True, exist_ok=True)
  drawn, missing = [], []
  for number, (bits, kind) in _HISTOGRAMS.items():
    path = layer if kind == "weights" else f"norm_{layer}"
    run, lines = _first_with(runs, bits, path)
    if run is None:
      missing.append(f"Fig {number}: no run with AQE and {bits}/{bits} bits has "
                     f"histograms of {path} (config.histogram_layers)")
      continue
    plots.save(histogram_figure(
        lines, f"Fig {number}: {bits}-bit {kind} of {layer}, {_title(run)}"),
        folder / f"fig{number}.png")
    drawn.append(f"{folder / f'fig{number}.png'}: {run['name']}")
  pairs = _pairs(runs)
  if pairs:
    plots.save(comparison_figure(pairs), folder / "fig5.png")
    names = [run["name"] for groups in pairs for runs in groups.values()
             for run in runs]
    drawn.append(f"{folder / 'fig5.png'}: {', '.join(names)}")
  else:
    missing.append("Fig 5: no two runs with 1/1 bits, AQE and STE, are equal but for "
                   "seed and estimator")
  return drawn, missing


def _first_with(runs, bits, path):
  for run in runs:
    c = run["config"]
    if run["histograms"] and c["estimator"] == "aqe" and (
        c["input_bits"] == c["weight_bits"] == bits):
      lines = [line for line in histograms.read(pathlib.Path(run["histograms"]))
               if line["layer"] == path]
      if lines:
        return run, lines
  return None, []


def histogram_figure(lines: Sequence[dict[str, Any]], title: str) -> Any:
  """Figs 1 to 4: how training's weights or activations are spread, by epoch.

  Args:
    lines: of histograms.jsonl, of one layer, one for each epoch.
    title: of the figure.

  Returns:
    The matplotlib Figure; its axes are the epochs.
  """
  from matplotlib import figure

  fig = figure.Figure(figsize=(10, 3.4), dpi=150, layout="constrained")
  panels = fig.subplots(1, len(lines), sharey=True, squeeze=False)[0]
  kind = lines[0]["kind"]
  width = histograms.CENTRES[1] - histograms.CENTRES[0]
  edges = np.append(histograms.CENTRES - width / 2, 1 + width / 2)
  for axes, line in zip(panels, lines):
    counts = np.asarray(line["counts"])
    axes.stairs(100 * counts / counts.sum(), edges, fill=True, color=plots.BLUE)
    axes.set_xlim(-1.05, 1.05)
    axes.set_xticks((-1, -0.5, 0, 0.5, 1))
    # Of activations most are at the ends: what is between would not be seen.
    axes.set_yscale("log")
    axes.set_ylim(1e-3, 100)
    axes.yaxis.set_major_formatter("{x:g}")
    plots.decorate(
        axes, rf"epoch {line['epoch']}, $\alpha$ = {line['alpha']:.3f}",
        f"{kind[:-1]} as training computes with it")
  panels[0].set_ylabel(f"% of all {kind}, in bins of {width:.2f}")
  fig.suptitle(title, fontsize=11)
  return fig


def _pairs(runs) -> list[dict[str, list[records.Record]]]:
  """For each data set the first runs, by estimator, that Fig 5 can be drawn of."""
  found = {}
  for run in runs:
    c = run["config"]
    if run["curve"] and c["estimator"] in _STYLES and (
        c["input_bits"] == c["weight_bits"] == 1):
      groups = found.setdefault(records.key(c, ["estimator"]), {})
      groups.setdefault(c["estimator"], []).append(run)
  pairs = {}
  for groups in found.values():
    if groups.keys() == _STYLES.keys():
      dataset = groups["aqe"][0]["config"]["dataset"]
      pairs.setdefault(dataset, {name: groups[name] for name in _STYLES})
  return list(pairs.values())


def comparison_figure(pairs: Sequence[dict[str, list[records.Record]]]) -> Any:
  """Fig 5: accuracy and loss of the hard network by epoch, AQE against STE.

  They are the training split's where all runs of a row recorded them
  (config.eval_train), else the validation split's, as the panel's title says. Thin
  lines are single seeds, thick ones their mean.

  Args:
    pairs: for each row of panels, runs with curves by estimator, "aqe" and "ste".

  Returns:
    The matplotlib Figure; its axes are, row by row, accuracy and loss.
  """
  from matplotlib import figure

  fig = figure.Figure(
      figsize=(10, 0.6 + 3.2 * len(pairs)), dpi=150, layout="constrained")
  panels = fig.subplots(len(pairs), 2, squeeze=False)
  for row, groups in zip(panels, pairs):
    lines = {name: [[line for line in metrics.read_file(run["curve"])
                     if line["mode"] == "hard"] for run in runs]
             for name, runs in groups.items()}
    split = "train" if all(
        any(line["split"] == "train" for line in curve)
        for curves in lines.values() for curve in curves) else "validation"
    config = groups["aqe"][0]["config"]
    for axes, name in zip(row, ("accuracy", "loss")):
      for estimator, (label, color) in _STYLES.items():
        curves = [[(line["epoch"], line[name]) for line in curve
                   if line["split"] == split] for curve in lines[estimator]]
        curves = np.array(curves, np.float64)  # Seeds, epochs, 2; null is NaN.
        epochs = curves[0, :, 0]
        if len(curves) > 1:
          label = f"{label}, mean of {len(curves)} seeds"
          axes.plot(epochs, curves[:, :, 1].T, color=color, linewidth=0.6, alpha=0.5)
        axes.plot(epochs, curves[:, :, 1].mean(0), color=color, linewidth=2,
                  label=label, marker="o" if len(epochs) == 1 else "")
      of = ("training split" if split == "train" else
            "validation split (training was not recorded)")
      plots.decorate(axes, f"{_title(groups['aqe'][0], seed=False)}\n{of}", "epoch")
      axes.set_ylabel(f"{name} of the hard network")
      axes.set_xlim(0, config["num_epochs"])
      axes.legend(frameon=False)
  fig.suptitle("Fig 5: AQE against STE, 1-bit weights and activations", fontsize=11)
  return fig


def _title(run: records.Record, seed: bool = True) -> str:
  c = run["config"]
  return f"{network(c)}, {c['dataset']}" + (f", seed {run['seed']}" if seed else "")


def network(config: dict[str, Any]) -> str:
  """Which network it is, so that a small one is not taken for the paper's."""
  if config["network"] != "convnet":
    return config["network"]
  widths = config["conv_widths"], config["dense_widths"]
  for name, known in models.CONVNETS.items():
    for part, of in ((1, ""), (4, " at a quarter of its widths")):
      if widths == tuple([width // part for width in some] for some in known):
        return f"ConvNet {name}{of}"
  return "ConvNet " + " + ".join("-".join(map(str, some)) for some in widths)
