"""Train small networks that fit a microcontroller, and compare accuracy and costs.

  python -m minw.search --config=folder_convnet --dir=DIR --budget_flash=64k

--config names an experiment with a function `get_candidates()`, which yields a name and
an argument for each network to try: NAME:ARGUMENT is then its config. The experiment
folder_convnet, the default, has three sizes, each with three pairs of bits. Fields that
are overridden, --config.dataset=characters for example, hold for all candidates.

Candidates that exceed a budget are left out before training:

  flash  constants of the exported C code, and 7.5 kB for the code itself
  RAM    static memory and stack of the exported C code, and one image

The others are trained, each with --seeds seeds. The table, DIR/search.json and
DIR/search.png compare the mean validation accuracy with flash, RAM and the number of
one-bit XNOR operations. The candidates on the Pareto front are marked: no other one is
at least as good in all of these and better in one. Test accuracies are for information.

Runs are those of a sweep. The workdir of a run is DIR/CANDIDATE-seedN, and the same
command resumes the search. SIGTERM and SIGINT let the runs save their states, and end
the search with code 75. The exit code is 1 if some runs are not done.
"""

import json
import math
import pathlib
import re
from typing import Any, NamedTuple, Sequence

from minw import stopping

if __name__ == "__main__":  # The imports below take seconds.
  stopping.watch()

from absl import flags
import jax
import numpy as np

from minw import cli
from minw import config_flag
from minw import errors
from minw import exit_codes
from minw import experiment as experiment_lib
from minw import files
from minw import layers as layers_lib
from minw import pack
from minw import packed
from minw import plots
from minw import summary
from minw import sweeps
from minw.export import c
from minw.workdir import metrics

# Room for the code of an exported network. With -O2, gcc takes 4 to 7.5 kB on Cortex-M.
CODE = 7680

_PIXEL_BITS = 8
# Field of `Cost`, unit and title of each panel of the plot.
_AXES = (("flash", 1000, "flash in kB"), ("ram", 1000, "RAM in kB"),
         ("xnor", 1e6, "millions of one-bit XNOR operations"))
_UNITS = {"": 1, "k": 1024, "M": 1024 ** 2}


class Cost(NamedTuple):
  """The costs of a network on a microcontroller.

  Attributes:
    flash: Bytes of constants and code.
    ram: Bytes of static memory, stack and one image.
    xnor: One-bit operations for an image. A multiplication of n by m bits counts as
      n * m of them, and a pixel has 8 bits.
  """

  flash: int
  ram: int
  xnor: int


class Result(NamedTuple):
  """A candidate, its costs, and what training gave.

  Attributes:
    name: Name of the candidate.
    config: Its config, NAME:ARGUMENT.
    cost: Its costs: those of the untrained network if it was left out.
    left_out: Why it was left out or has no result, or "".
    validation: Validation accuracy at the end of each run.
    test: Test accuracy of each run.
  """

  name: str
  config: str
  cost: Cost
  left_out: str = ""
  validation: tuple[float, ...] = ()
  test: tuple[float, ...] = ()

  @property
  def accuracy(self) -> float:
    """Mean validation accuracy."""
    return sum(self.validation) / len(self.validation)


def candidates(config: str) -> list[tuple[str, str]]:
  """Lists the names and the configs of the candidates of an experiment.

  Args:
    config: Name of the experiment, or path of its file, without an argument.

  Raises:
    errors.UsageError: There is an argument, or the experiment has no candidates.
  """
  errors.check(":" not in config, "config", config,
               "without an argument, which the search chooses")
  found = config_flag.call(
      "config", config, config_flag.experiments(), "get_candidates",
      "yields (name, argument)",
      lambda pairs: [(name, f"{config}:{argument}") for name, argument in pairs])
  errors.check(bool(found), "config", config, "an experiment with candidates")
  return found


def cost(program: packed.Program, layers: Sequence[layers_lib.LayerInfo]) -> Cost:
  """Computes the costs of a packed network.

  Args:
    program: The network.
    layers: Its layers, from `layers.trace`.

  Raises:
    ValueError: The network cannot be exported as C.
  """
  footprint = c.footprint(program)
  rows = summary.summarize(layers).layers
  bits = [_PIXEL_BITS, *(row.input_bits for row in rows[1:])]
  return Cost(
      flash=footprint.constants + CODE,
      ram=footprint.static + footprint.stack + math.prod(program.source_shape),
      xnor=sum(row.macs * layers_lib.operand_bits(row.bits) * input_bits
               for row, input_bits in zip(rows, bits)))


def untrained_cost(config: Any) -> Cost:
  """Computes the costs of a config's network, with random weights.

  Raises:
    errors.UsageError: The config cannot be run, or its network cannot be exported.
  """
  experiment = experiment_lib.Experiment(config)
  shapes = jax.eval_shape(
      lambda: layers_lib.initialize(experiment.model, experiment.image_shape))
  random = np.random.default_rng(0)

  def values(path, shape):
    drawn = random.normal(size=shape.shape).astype(np.float32)
    # Variances and steps are positive. Batch norms of both signs take most memory.
    return drawn if path[-1].key in ("kernel", "scale", "bias") else np.abs(drawn)

  variables = jax.tree_util.tree_map_with_path(values, shapes)
  try:
    return cost(pack.pack_experiment(experiment, variables), experiment.layers)
  except ValueError as error:
    raise errors.UsageError(f"the network cannot be exported as C: {error}") from error


def over_budget(cost: Cost, flash: int | None, ram: int | None) -> str:
  """Says which budget a cost exceeds, or returns "". A budget of None has no limit."""
  parts = [f"{name} {value:,} > {most:,} bytes" for name, value, most in (
      ("flash", cost.flash, flash), ("RAM", cost.ram, ram))
      if most is not None and value > most]
  return ", ".join(parts)


def measured(
    result: Result, runs: Sequence[sweeps.Run], states: dict[str, sweeps.State]
) -> Result:
  """Adds accuracies and costs of a candidate's runs that are done.

  Args:
    result: The candidate.
    runs: Its runs.
    states: Progress of all runs.
  """
  done = [run for run in runs if states[run.name].name == "done"]
  if not done:
    return result._replace(left_out="no run is done")
  program = pack.pack_workdir(str(done[0].workdir))
  experiment = experiment_lib.Experiment(done[0].config)
  accuracies = (states[run.name].accuracy for run in done)
  return result._replace(
      cost=cost(program, experiment.layers),
      validation=tuple(_validation_accuracy(run) for run in done),
      test=tuple(accuracy for accuracy in accuracies if accuracy is not None))


def _validation_accuracy(run: sweeps.Run) -> float:
  """The last validation accuracy of a run's hard network."""
  return [line["accuracy"] for line in metrics.read(str(run.workdir))
          if (line["split"], line["mode"]) == ("validation", "hard")][-1]


def front(results: Sequence[Result]) -> list[Result]:
  """Returns the results that no other one dominates, in the order of their flash.

  A result dominates another one if it is at least as good in accuracy, flash, RAM and
  XNOR operations, and better in one of them.
  """
  found = [result for result in results if not result.left_out]
  marks = {result.name: (-result.accuracy, *result.cost) for result in found}

  def dominated(mark):
    return any(other != mark and all(a <= b for a, b in zip(other, mark))
               for other in marks.values())

  return sorted((result for result in found if not dominated(marks[result.name])),
                key=lambda result: result.cost.flash)


def table(results: Sequence[Result]) -> str:
  """Formats all results. A star marks the Pareto front."""
  best = front(results)
  width = max(len(result.name) for result in results)
  lines = [f"  {'candidate':{width}}  validation    test    flash      RAM  "
           "million XNOR"]
  for result in results:
    accuracies = (f"{result.accuracy:10.4f}  {np.mean(result.test):6.4f}"
                  if result.validation else f"{'-':>10}  {'-':>6}")
    lines.append(
        f"{'*' if result in best else ' '} {result.name:{width}}  {accuracies}  "
        f"{result.cost.flash:7,}  {result.cost.ram:7,}  "
        f"{result.cost.xnor / 1e6:12.2f}  {result.left_out}".rstrip())
  return "\n".join([*lines, "* on the Pareto front; flash and RAM in bytes"])


def figure(results: Sequence[Result]) -> Any:
  """Plots the validation accuracy against each cost, with the Pareto front named.

  Args:
    results: Results, of which one or more were trained.

  Returns:
    The matplotlib Figure. Its axes are flash, RAM and XNOR operations.
  """
  from matplotlib import figure as figure_lib
  fig = figure_lib.Figure(figsize=(11, 4), dpi=150, layout="constrained")
  all_axes = fig.subplots(1, 3, sharey=True)
  best = front(results)
  others = [r for r in results if not r.left_out and r not in best]
  for axes, (name, unit, title) in zip(all_axes, _AXES):
    for some, color in ((others, plots.GREY), (best, plots.VERMILION)):
      axes.plot([getattr(r.cost, name) / unit for r in some],
                [r.accuracy for r in some], color=color, marker="o", linestyle="")
    for r in best:
      axes.annotate(r.name, (getattr(r.cost, name) / unit, r.accuracy), fontsize=7,
                    xytext=(4, 4), textcoords="offset points", parse_math=False)
    plots.decorate(axes, "", title)
    axes.margins(x=0.2)
    axes.set_xlim(left=0)
  all_axes[0].set_ylabel("validation accuracy")
  return fig


def content(
    results: Sequence[Result], flash: int | None, ram: int | None
) -> dict[str, Any]:
  """Returns what search.json holds."""
  best = front(results)
  return {"budget": {"flash": flash, "ram": ram},
          "candidates": [
              result._asdict() | {"cost": result.cost._asdict(),
                                  "front": result in best} for result in results]}


def parse_bytes(name: str, text: str | None) -> int | None:
  """Reads the value of a budget: a number of bytes, with k or M for 1024 or 1024^2."""
  if text is None:
    return None
  match = re.fullmatch(r"(\d{1,9})([kM]?)", text, re.ASCII)
  errors.check(match is not None, name, text,
               "a number of bytes, with k or M for 1024 or 1024^2 bytes: 64k")
  assert match
  return int(match[1]) * _UNITS[match[2]]


def define_flags() -> None:
  """Defines the flags of the command."""
  config_flag.define("folder_convnet")
  cli.DEFINE_path("dir", None, "Directory that holds a workdir for each run.")
  for name, example in (("flash", "64k"), ("RAM", "16k")):
    flags.DEFINE_string(
        f"budget_{name.lower()}", None,
        f"Largest number of bytes of {name}, {example} for example; no limit by "
        "default.")
  flags.DEFINE_integer(
      "seeds", 1, "Number of runs of each candidate. Their seeds count up from "
      "config.seed.", lower_bound=1)
  flags.DEFINE_list("only", [], "Names of the candidates to try; all by default.")
  flags.DEFINE_integer("jobs", 1, "Number of runs at a time.", lower_bound=1)
  flags.DEFINE_integer(
      "retries", 2, "Number of times that a failed run is started again.",
      lower_bound=0)
  cli.require("dir")


def check_flags() -> tuple[int | None, int | None, list[tuple[str, str]]]:
  """Checks the flags.

  Returns:
    The budgets of flash and RAM, and the names and configs of the candidates.
  """
  f = flags.FLAGS
  flash = parse_bytes("budget_flash", f.budget_flash)
  ram = parse_bytes("budget_ram", f.budget_ram)
  holder: Any = f["config"]
  found = candidates(holder.config_filename)
  names = [name for name, _ in found]
  for name in f.only:
    if name not in names:
      raise errors.unknown_name("candidate", name, names)
  return flash, ram, [pair for pair in found if pair[0] in (f.only or names)]


def _runs(chosen: Sequence[tuple[str, str]]) -> dict[str, list[sweeps.Run]]:
  """Makes the runs of each candidate, by its name.

  Raises:
    errors.UsageError: A field is overridden that differs among the candidates.
  """
  f = flags.FLAGS
  holder: Any = f["config"]
  fields = {name: f.config[name] for name in holder.override_values}
  listed = [(f"{name}-seed{seed}", config, fields | {"seed": seed})
            for name, config in chosen
            for seed in range(f.config.seed, f.config.seed + f.seeds)]
  configs = [config_flag.load(config) for _, config in chosen]
  for name in fields:
    errors.check(all(config[name] == configs[0][name] for config in configs),
                 f"config.{name}", fields[name], "left out: the search chooses it")
  runs = sweeps.make_runs(listed, f.dir)
  return {name: runs[i * f.seeds:(i + 1) * f.seeds]
          for i, (name, _) in enumerate(chosen)}


def main() -> int:
  """Searches as the flags say, and returns the exit code."""
  f = flags.FLAGS
  jax.config.update("jax_platforms", "cpu")  # Leave the GPUs to the runs.
  flash, ram, chosen = check_flags()
  runs = _runs(chosen)
  results = []
  for name, config in chosen:
    found = untrained_cost(runs[name][0].config)
    results.append(Result(name, config, found, over_budget(found, flash, ram)))
  wanted = [run for result in results if not result.left_out
            for run in runs[result.name]]
  if not wanted:
    raise errors.UsageError("no candidate is within the budgets (" + "; ".join(
        f"{result.name}: {result.left_out}" for result in results) + ")")
  for result in results:
    if result.left_out:
      cli.note(f"{result.name}: left out, {result.left_out}")
  sweeps.make_folder(f.dir)
  ended = sweeps.run_all(wanted, jobs=f.jobs, retries=f.retries,
                         steps=sweeps.check(wanted), say=cli.note)
  if not ended:
    return exit_codes.PREEMPTED
  states = sweeps.states(wanted, f.retries)
  results = [result if result.left_out else measured(result, runs[result.name], states)
             for result in results]
  _write(results, pathlib.Path(f.dir), flash, ram)
  print(table(results))
  for run in wanted:
    if states[run.name].name != "done":
      print(f"{run.name}: {states[run.name].name}, {states[run.name].reason}")
  return int(any(state.name != "done" for state in states.values()))


def _write(
    results: Sequence[Result], folder: pathlib.Path, flash: int | None, ram: int | None
) -> None:
  """Writes search.json and search.png."""
  try:
    files.write(folder / "search.json",
                json.dumps(content(results, flash, ram), indent=2) + "\n")
    plots.save(figure(results), folder / "search.png")
  except OSError as error:
    raise errors.bad_value(
        "dir", str(folder), f"a folder to write in ({error})") from error


if __name__ == "__main__":
  cli.run(main, define_flags)
