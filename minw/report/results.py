"""RESULTS.md: all studies of a folder, the paper's tables, and results of others."""

import itertools
import json
import pathlib
from typing import Sequence

from minw import errors
from minw import files
from minw import titles
from minw.progress import duration
from minw.report import comparison
from minw.report import figures
from minw.report import paper
from minw.report import records
from minw.report import tables
from minw.workdir import metrics

# Fields that define the problem. Studies compare runs in the other fields that differ.
_PROBLEM = ("dataset", "network", "conv_widths", "dense_widths", "input_bits",
            "weight_bits")

_HEAD = """# Results

`python -m minw.report results` makes this file from the studies in `results`. A study
holds the config, seed, commit, hardware, versions, wall time and curve of each run.
There are three sections: our results by study, the paper's results beside ours, and
published results of others.
"""

_COLUMNS = f"""\
W1A2 stands for weights of 1 bit and activations of 2 bits. Accuracies are those of the
hard network. They are means over the seeds, with half the width of their
{comparison.CONFIDENCE:.0%} confidence interval (Student's t). An interval that would
leave [0, 1] is cut off there and written in full. The column "validation" has
accuracies on images that are not trained on; all choices are based on them. The column
"test" has test accuracies of the last checkpoint, and "best" those of the checkpoint
with the best validation accuracy. The column "paired" is the difference of "test" to
the first row, seed by seed, and "p" is the probability of a difference at least as
large if there were none (two-sided t test, not corrected for the number of rows).
"""


def write(folder: str, out: str) -> list[str]:
  """Writes `out`/RESULTS.md, and the figures of studies into their folders.

  Args:
    folder: Folder of the studies, inside `out`.
    out: Folder of RESULTS.md.

  Returns:
    Lines that name each file that was written, and each run and figure that was left
    out, with the reason.

  Raises:
    errors.UsageError: There is no study, or `folder` is not inside `out`.
    OSError: A file cannot be written.
  """
  root = pathlib.Path(out).resolve()
  errors.check(pathlib.Path(folder).resolve().is_relative_to(root), "runs", folder,
               f"a folder in out={out!r}, from where RESULTS.md links to it")
  studies = [path for path in sorted(pathlib.Path(folder).glob("*.jsonl"))
             if records.is_study(path)]
  errors.check(bool(studies), "runs", folder,
               "a folder with studies, which `collect` makes")
  parts, everything, log = [_HEAD, "## Our results by study\n", _COLUMNS], [], []
  for path in studies:
    runs, left_out = records.read([str(path)])
    log += [f"left out: {name}: {why}" for name, why in left_out]
    everything += runs
    curves = [run for run in runs
              if run["config"]["eval_every_epochs"] < run["config"]["num_epochs"]]
    drawn, missing = figures.draw(curves, str(path.with_suffix("")), "conv2")
    log += [*drawn, *(f"not drawn of {path}: {line}" for line in missing)]
    parts.append(study(path.resolve().relative_to(root), _title(path), runs))
    parts += [f"![{file.stem}]({file.resolve().relative_to(root)})\n"
              for file in sorted(path.with_suffix("").glob("fig*.png"))]
  parts.append(_paper(everything))
  parts.append(_published())
  target = root / "RESULTS.md"
  files.write(target, "\n".join(parts))
  return [*log, str(target)]


def study(path: pathlib.Path, title: str, runs: Sequence[records.Record]) -> str:
  """Formats the section of one study.

  Runs from which other runs of the study started have no row.

  Args:
    path: Path of the study, relative to the folder of RESULTS.md.
    title: Title of the section, in one line.
    runs: Records of the study, at least one.
  """
  sources = {run["config"]["init_from"] for run in runs}
  counted = [run for run in runs if records.as_source(run["config"]) not in sources]
  varied = _varied(counted)
  by = [name for name in varied if name not in _PROBLEM]
  # The first row is the straight-through estimator. If there is none, it is the run
  # with the fewest settings that differ from the defaults.
  counted.sort(key=lambda run: (records.method(run) != "ste",
                                len(records.settings(run["config"]))))
  compared = comparison.compare(counted, by)
  seconds = [run["seconds"] for run in runs if run["seconds"] is not None]
  times = (f"of {duration(min(seconds))} to {duration(max(seconds))}" if seconds
           else "of unknown length")
  names = lambda values: ", ".join(sorted({str(value) for value in values}))
  lines = [
      f"### {title}\n",
      f"[{path}]({path}) holds {len(runs)} runs {times} "
      f"on {names(_device(run) for run in runs)}, from commits "
      f"{names((run['commit'] or 'unknown').split()[-1][:7] for run in runs)}. Its "
      f"[README]({path.with_suffix('')}/README.md) says how they were made.\n"]
  for each in compared:
    run = _any_run(each)
    lines.append(f"**{_problem(run['config'])}**; {records.described(_shared(each))}\n")
    _, why = paper.cells_of(run)
    if why:
      lines.append(
          f"This experiment belongs to no cell of the paper's tables: {why}.\n")
    lines.append(_table(each.groups, by))
  lines += [_pooled(dataset, list(several), by) for dataset, several in
            itertools.groupby(sorted(compared, key=_dataset), _dataset)]
  return "\n".join(filter(None, lines))


def _any_run(compared):
  return next(iter(compared.groups[0].runs.values()))


def _dataset(compared):
  return _any_run(compared)["config"]["dataset"]


def _varied(runs):
  values = {}
  for run in runs:
    for name, value in records.acting(run["config"]).items():
      values.setdefault(name, set()).add(json.dumps(value))
  return [name for name, found in values.items()
          if len(found) > 1 and name not in records.NO_MATTER]


def _table(groups, by):
  rows = []
  for group in groups:
    test, best = group.estimates.values()
    pairs = [] if group is groups[0] else comparison.paired(
        group, groups[0], "test_accuracy")
    rows.append([_label(group, by), str(test.count), _validation(group),
                 comparison.described(test), comparison.described(best),
                 *_difference(pairs)])
  return tables.table_of(
      ["run", "seeds", "validation", "test", "best", "paired", "p"], rows)


def _pooled(dataset, compared, by):
  """Formats the differences to the first row, over all networks and seeds together."""
  pairs: dict[str, list[float]] = {}
  for each in compared:
    for group in each.groups[1:]:
      if found := comparison.paired(group, each.groups[0], "test_accuracy"):
        pairs.setdefault(_label(group, by), []).extend(found)
  if len(compared) == 1 or not pairs:
    return ""
  title = titles.dataset({"dataset": dataset})
  return f"**All networks on {title} together**\n\n" + tables.table_of(
      ["run", "pairs", "paired", "p"],
      [[name, str(len(values)), *_difference(values)]
       for name, values in pairs.items()])


def _label(group, by):
  names = {records.method(run) for run in group.runs.values()}
  return names.pop() if len(names) == 1 and "" not in names else records.described(
      group.by)


def _validation(group):
  values = []
  for run in group.runs.values():
    hard = [line["accuracy"] for line in metrics.read_file(run["curve"])
            if (line["split"], line["mode"]) == ("validation", "hard")
            ] if run["curve"] else []
    if not hard:
      return ""
    values.append(hard[-1])
  return f"{comparison.estimate(values).mean:.4f}"


def _difference(pairs):
  if not pairs:
    return "", ""
  found, p = comparison.estimate(pairs), comparison.p_value(pairs)
  return (comparison.described(found, comparison.DIFFERENCE, sign="+"),
          "" if p is None else f"{p:.2g}")


def _problem(config):
  config = config | {"bits_rules": []}  # Settings or rows name the rules.
  return ", ".join(name(config) for name in (titles.network, titles.dataset,
                                             titles.bits))


def _shared(compared):
  """Returns the settings that all rows share, except those that `_problem` names."""
  settings = records.settings(_any_run(compared)["config"], _PROBLEM)
  return {name: value for name, value in settings.items()
          if all(group.by.get(name, value) == value for group in compared.groups)}


def _device(run: records.Record) -> str:
  hardware = run["hardware"]
  if not hardware:
    return "unknown hardware"
  if hardware["device"] != "cpu":
    return f"{hardware['num_devices']} x {hardware['device']}"
  cores = hardware["cores"]
  return f"{cores} core{'s' * (cores != 1)} of {hardware['cpu']}"


def _title(path):
  readme = path.with_suffix("") / "README.md"
  if not readme.exists():
    return path.stem
  return readme.read_text().splitlines()[0].lstrip("# ")


def _paper(runs):
  found, _ = tables.tables(runs)
  return "\n".join([
      "## The paper's results and ours at full size\n", tables.WHAT,
      tables.sections(tables.with_runs(found)),
      f"{tables.counts(found)} `python -m minw.report tables --runs=results"
      " --out=tables` writes all of the paper's numbers.\n"])


def _published() -> str:
  head = ("## Published by others\n\n"
          "These numbers are for orientation. None of these networks was run here."
          "\n\n")
  return head + tables.table_of(
      ["network", "data", "test accuracy", "policy", "source"],
      [list(row) for row in paper.PUBLISHED])
