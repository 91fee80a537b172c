"""Compare runs with the paper's results and with each other.

Folders in --runs are searched for the workdirs of runs and for studies. A study is a
file NAME.jsonl with the records of runs, which `collect` writes.
"""

import pathlib
from typing import Any, Sequence

from absl import flags

from minw import cli
from minw import errors
from minw import files
from minw.report import comparison
from minw.report import figures
from minw.report import records
from minw.report import results
from minw.report import tables


def _read() -> tuple[list[records.Record], list[records.LeftOut]]:
  runs, left_out = records.read(flags.FLAGS.runs)
  _check_found([*runs, *left_out])
  return runs, left_out


def _check_found(runs: Sequence[Any]) -> None:
  errors.check(bool(runs), "runs", ",".join(flags.FLAGS.runs),
               "folders that hold workdirs of runs, or studies")


def _say(left_out: Sequence[records.LeftOut]) -> None:
  for name, why in left_out:
    print(f"left out: {name}: {why}")


def _write(name: str, text: str) -> None:
  out = flags.FLAGS.out
  if out is None:
    return
  try:
    pathlib.Path(out).mkdir(parents=True, exist_ok=True)
    files.write(pathlib.Path(out) / name, text)
  except OSError as error:
    raise errors.UsageError(f"out={out!r} cannot be written: {error}") from error


def main_tables() -> None:
  """Print the rows of Tables I to V that have a run.

    python -m minw.report tables --runs=DIR_OR_STUDY [--out=DIR]

  A row has the paper's number, ours, their difference, the number of seeds and the
  standard deviation. With --out, all rows are written to DIR/tables.md, and each table
  to a CSV file.
  """
  runs, left_out = _read()
  rows, elsewhere = tables.tables(runs)
  nowhere = [*left_out, *elsewhere]
  print(tables.markdown(tables.with_runs(rows), nowhere))
  print(tables.counts(rows))
  if flags.FLAGS.out is None:
    print("--out=DIR writes all rows, also those without a run.")
  _write("tables.md", tables.markdown(rows, nowhere))
  for name, lines in rows.items():
    _write(f"table_{name}.csv", tables.csv_of(lines))


def main_figures() -> None:
  """Draw Figs 1 to 5 of the paper for runs.

    python -m minw.report figures --runs=DIR_OR_STUDY --out=DIR [--layer=conv2]

  Figs 1 to 4 are histograms of runs with config.histogram_layers. Fig 5 has the curves
  of runs that differ only in their estimator, AQE or STE. They are the curves of the
  training split if the runs had config.eval_train.
  """
  out = flags.FLAGS.out
  runs, left_out = _read()
  try:
    drawn, missing = figures.draw(runs, out, flags.FLAGS.layer)
  except OSError as error:
    raise errors.UsageError(f"out={out!r} cannot be written: {error}") from error
  print("\n".join([*drawn, *(f"not drawn: {line}" for line in missing)]))
  _say(left_out)


def main_compare() -> None:
  """Compare runs that differ only in the fields of --by.

    python -m minw.report compare --runs=DIR_OR_STUDY --by=estimator[,FIELD] [--out=DIR]

  The result has means, confidence intervals and differences to the first row, seed by
  seed. With --out, it is also written to DIR/compare.md.
  """
  runs, left_out = _read()
  text = comparison.markdown(comparison.compare(runs, flags.FLAGS.by))
  print(text, end="")
  _say(left_out)
  _write("compare.md", text)


def main_collect() -> None:
  """Add the records of runs to a study.

    python -m minw.report collect --runs=DIR_OR_STUDY --out=results/STUDY.jsonl

  Each record is a line of the file, and its curve is copied to a folder beside the
  file. The command names each run that it does not add, with the reason.
  """
  out = flags.FLAGS.out
  added, left_out = records.collect(flags.FLAGS.runs, out)
  _check_found([*added, *left_out])
  print("\n".join([*(f"added: {name}" for name in added),
                   f"{out}: {len(added)} added"]))
  _say(left_out)
  if added:
    print(f"not copied of any run: {records.NOT_COPIED}")


def main_results() -> None:
  """Write RESULTS.md and the figures of all studies in a folder.

    python -m minw.report results [--runs=results] [--out=.]

  RESULTS.md has the studies, the paper's tables and published results of others. The
  figures of a study are drawn into its folder.
  """
  out = flags.FLAGS.out or "."
  folders = flags.FLAGS.runs or ["results"]
  errors.check(len(folders) == 1, "runs", ",".join(folders), "one folder with studies")
  try:
    print("\n".join(results.write(folders[0], out)))
  except OSError as error:
    raise errors.UsageError(f"out={out!r} cannot be written: {error}") from error


SUBCOMMANDS = {
    "tables": main_tables,
    "figures": main_figures,
    "compare": main_compare,
    "collect": main_collect,
    "results": main_results,
}


def define_flags(subcommand: str) -> None:
  """Defines the flags of a subcommand."""
  cli.DEFINE_paths(
      "runs", "Studies, and folders with workdirs or studies.", positional=True,
      remote=subcommand != "results")
  cli.DEFINE_path(
      "out", None,
      "File of the study, which is created if it is missing."
      if subcommand == "collect" else "Folder to write to.")
  if subcommand != "results":
    cli.require("runs")
  if subcommand in ("figures", "collect"):
    cli.require("out")
  if subcommand == "compare":
    cli.require("by")
    flags.DEFINE_list("by", [], "Fields in which the compared runs differ.")
  if subcommand == "figures":
    flags.DEFINE_string("layer", "conv2", "Layer whose histograms are drawn.")


if __name__ == "__main__":
  cli.run(SUBCOMMANDS, define_flags)
