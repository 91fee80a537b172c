"""Small runs, tables and plots for the notebooks in this folder."""

import functools
import itertools
import os
from typing import Any, Mapping, Sequence

from IPython import display
import jax
import numpy as np

from minw import config as config_lib
from minw import evaluate
from minw import layers
from minw import plots
from minw import train_step
from minw.data import resident
from minw.experiment import Experiment
from minw.report import comparison
from minw.workdir import checkpoint

# Compilation takes most of the time of these runs. This setting halves it.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=1")

# With MINW_NOTEBOOKS=small, runs are just long enough to test the notebooks.
SMALL = os.environ.get("MINW_NOTEBOOKS") == "small"
SEEDS = range(2 if SMALL else 5)


def digits_config(**changes: Any) -> Any:
  """Returns the config of a W1A1 ConvNet on scikit-learn's digits.

  The network is too small to classify all digits correctly.
  """
  c = config_lib.default_config()
  c.update(dataset="digits", crop_size=8, random_flip=False, conv_widths=(8, 8, 16, 16),
           dense_widths=(32,), batch_size=64, num_epochs=2 if SMALL else 12,
           eval_batch_size=360)
  c.update(changes)
  return c


def accuracies(config: Any, seeds: Sequence[int] = SEEDS) -> dict[int, float]:
  """Trains a network for each seed and returns its test accuracy as hard network.

  All seeds share one compilation. Each run is trained as by `python -m minw.main`, but
  with other random numbers.
  """
  experiment = Experiment(config)
  step = experiment.jit(
      functools.partial(train_step.update, experiment), donate_argnums=0)
  batch = experiment.jit(experiment.data.train_inputs)
  epoch_order = experiment.jit(functools.partial(
      resident.epoch_order, size=experiment.info.splits["train"]))

  @experiment.jit
  def init(seed):
    variables = layers.initialize(experiment.model, experiment.image_shape, seed)
    return train_step.init_state(experiment)._replace(
        **variables, opt_state=experiment.optimizer.init(variables["params"]))

  reestimate = train_step.make_reestimate(experiment)
  evaluator = evaluate.Evaluator(experiment)
  data, test = experiment.data.load("train"), experiment.data.load("test")
  results = {}
  for seed in seeds:
    state = init(seed)
    keys = jax.random.split(jax.random.key(seed), (experiment.num_steps, 2))
    for i, (batch_key, estimator_key) in enumerate(keys):
      epoch, position = divmod(i, experiment.steps_per_epoch)
      if position == 0:
        order = epoch_order(seed, epoch)
      images, labels = batch(data, order, position, batch_key)
      state, _ = step(state, images, labels, estimator_key)
    tree = state._asdict()
    if config.reestimate_batches:
      tree["reestimated_batch_stats"] = reestimate(
          state.params, state.batch_stats, itertools.repeat((data, order)))
    variables = checkpoint.hard_variables(tree)
    results[seed] = evaluator.hard(variables, test)["accuracy"]
  return results


Results = Mapping[str, Mapping[int, float]]  # Accuracies by name and seed.


def differences(results: Results, name: str, baseline: str) -> list[float]:
  """Returns the accuracies of `name` minus those of `baseline`, for common seeds."""
  return [value - results[baseline][seed] for seed, value in results[name].items()
          if seed in results[baseline]]


def show_table(results: Results, baseline: str) -> None:
  """Shows means with their 95 % confidence intervals, and paired differences."""
  lines = [f"| | seeds | test accuracy | difference to {baseline}, paired |",
           "|---|---|---|---|"]
  for name, values in results.items():
    mean = comparison.estimate(list(values.values()))
    change = "" if name == baseline else comparison.described(
        comparison.estimate(differences(results, name, baseline)),
        comparison.DIFFERENCE, sign="+")
    lines.append(
        f"| {name} | {mean.count} | {comparison.described(mean)} | {change} |")
  display.display(display.Markdown("\n".join(lines)))


def plot_means(axes: Any, results: Results) -> None:
  """Plots accuracies by name with the first on top: seeds, mean and interval."""
  for row, values in enumerate(results.values()):
    _plot_row(axes, row, list(values.values()), comparison.ACCURACY)
  _name_rows(axes, list(results))


def plot_differences(
    axes: Any, results: Results, baseline: str, within: float = 1.0
) -> None:
  """Plots paired differences to `baseline`: seeds, mean and interval.

  Args:
    axes: Axes to draw on.
    results: Accuracies by name and seed.
    baseline: One of the names.
    within: Limit of the axis on both sides. Arrows stand for values beyond it. A mean
      beyond it is also written in numbers.
  """
  names = [name for name in results if name != baseline]
  for row, name in enumerate(names):
    _plot_row(axes, row, differences(results, name, baseline), comparison.DIFFERENCE,
              within)
  _name_rows(axes, names)
  axes.axvline(0, color="black", linewidth=0.8)
  axes.set_xlim(-within, within)


def _plot_row(axes, row, values, bounds, within=np.inf):
  of = comparison.estimate(values)
  low, high = (of.mean, of.mean) if of.margin is None else comparison.interval(
      of, bounds)
  axes.plot(values, np.full(len(values), row), ".", color=plots.GREY, zorder=1)
  axes.errorbar(of.mean, row, xerr=[[of.mean - low], [high - of.mean]], fmt="o",
                color=plots.BLUE, capsize=3, zorder=2)
  for sign, marker, align in ((-1, "<", "left"), (1, ">", "right")):
    if max(sign * value for value in (low, high, *values)) > within:
      axes.plot(sign * within, row, marker=marker, color=plots.BLUE, clip_on=False)
    if sign * of.mean > within:
      axes.annotate(comparison.described(of, bounds, sign="+"), (sign * within, row),
                    (-9 * sign, 0), textcoords="offset points", ha=align, va="center",
                    fontsize=9, color=plots.BLUE, bbox={"color": "white", "pad": 1})


def _name_rows(axes, names):
  axes.set_yticks(range(len(names)), names)
  axes.set_ylim(len(names) - 0.5, -0.5)
