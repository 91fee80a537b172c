"""Tables I to V: the paper's numbers, ours, and of how many runs ours are."""

import csv
import io
import itertools
import statistics
from typing import Any, Sequence

from minw.report import paper
from minw.report import records

Rows = list[dict[str, Any]]

_BITS = ("inputs", "weights")  # In every row; the rest of a place where it varies.
_PLACE = ("dataset", "network", "inputs", "weights", "estimator", "measure")
_RESULT = ("paper", "ours", "difference", "seeds", "standard deviation", "epochs")


def tables(runs: Sequence[records.Record]) -> tuple[dict[str, Rows],
                                                    list[records.LeftOut]]:
  """The rows of Tables I to V.

  Args:
    runs: see `records.read`.

  Returns:
    By table rows, one for a cell without runs, else one for each kind of run: configs
    that differ in more than the seed are never averaged. A row has the bits of inputs
    and weights, the other names of the cell's place that vary within the table, and

      paper: the number.
      ours, difference: the mean over the seeds; that minus the paper's.
      seeds, standard deviation: how many; over them (n - 1), None of one.
      epochs: of the run; "20 of 200" if the recipe has more.
      settings: by name, the fields that are not as by default and are no part of the
        place; weight bits are among them where a cell does not say which layers
        have them.
      commits: of the runs.

    And what is of no cell.
  """
  left_out, found = [], {}
  for run in runs:
    cells, why = paper.cells_of(run)
    if why:
      left_out.append(records.LeftOut(run["name"], why))
    for cell in cells:
      found.setdefault(cell, {}).setdefault(records.key(run["config"]), []).append(run)
  result = {}
  for table, cells in itertools.groupby(paper.CELLS, lambda cell: cell.table):
    cells = list(cells)
    place = [name for name in _PLACE
             if name in _BITS or len({getattr(c, name) for c in cells}) > 1]
    result[table] = [
        {**{name: getattr(cell, name) for name in place}, **_result(cell, group)}
        for cell in cells for group in found.get(cell, {"": []}).values()]
  return result, left_out


def _result(cell: paper.Cell, runs: list[records.Record]) -> dict[str, Any]:
  row = {name: None for name in _RESULT} | {
      "paper": cell.paper, "settings": {}, "commits": []}
  if not runs:
    return row
  values = [paper.measured(cell, run) for run in runs]
  config = runs[0]["config"]
  epochs = config["num_epochs"]
  row.update({
      "ours": statistics.mean(values),
      "difference": statistics.mean(values) - cell.paper,
      "seeds": len(values),
      "standard deviation": statistics.stdev(values) if len(values) > 1 else None,
      "epochs": f"{epochs} of {cell.epochs}" if epochs < cell.epochs else str(epochs),
      "settings": _settings(config),
      "commits": sorted({run["commit"] or "unknown" for run in runs})})
  return row


def _settings(config: dict[str, Any]) -> dict[str, Any]:
  """What is not as by default and not said by the cell."""
  said = ["dataset", "network", "conv_widths", "dense_widths", "estimator",
          "num_epochs"]
  # "16" may be either of two formats.
  said += [name for name in ("input_bits", "weight_bits")
           if config[name] not in ("bfloat16", "float16")]
  return records.settings(config, said)


def with_runs(rows: dict[str, Rows]) -> dict[str, Rows]:
  """The rows that have a run, of tables that have any."""
  ours = {table: [row for row in lines if row["ours"] is not None]
          for table, lines in rows.items()}
  return {table: lines for table, lines in ours.items() if lines}


def counts(rows: dict[str, Rows]) -> str:
  """How many cells of each table have runs: "Cells with runs, by table: I: 1 of 64"."""
  cells = {table: {tuple(row.get(name) for name in _PLACE): row["ours"] is not None
                   for row in lines} for table, lines in rows.items()}
  return "Cells with runs, by table: " + ", ".join(
      f"{table}: {sum(found.values())} of {len(found)}"
      for table, found in cells.items()) + "."


def markdown(rows: dict[str, Rows], left_out: Sequence[records.LeftOut]) -> str:
  """Tables for a reader; what is not there is empty."""
  parts = ["# The paper's results and ours\n", WHAT,
           sections(rows) if rows else "No run is of a cell of these tables.\n"]
  if left_out:
    parts.append("## Runs that are in no table\n")
    parts.append("".join(
        f"- {_together([name for name, _ in group])}: {why}\n"
        for (why, _), group in itertools.groupby(
            left_out, lambda run: (run.why, run.name.rpartition(":")[0]))))
  return "\n".join(parts)


def _together(names: list[str]) -> str:
  """Names of runs that follow each other and have one reason."""
  return names[0] if len(names) == 1 else (
      f"{len(names)} runs, {names[0]} to {names[-1]}")


WHAT = ("Paper: arXiv 2003.04296. Ours: mean over the seeds, of the hard network at"
        " the last checkpoint, on the test split (ImageNet: the validation images);"
        " sample standard deviation.\n")


def sections(rows: dict[str, Rows]) -> str:
  """The heading of each table, its rows, and the settings that all our runs share."""
  parts = []
  for table, lines in rows.items():
    digits = 4 if table in ("I", "II") else 2
    ours = [row for row in lines if row["ours"] is not None]
    shared = dict(set.intersection(*(_items(row["settings"]) for row in ours))
                  if len(ours) > 1 else ())
    own = ("settings",) * any(_items(row["settings"]) - shared.items() for row in ours)
    place = [name for name in lines[0] if name in _PLACE and name not in _BITS]
    parts.append(f"## Table {table}: {paper.CAPTIONS[table]}\n")
    parts.append(table_of([*place, "bits", *_RESULT, *own], [
        [*(row[name] for name in place), f"W{row['weights']}A{row['inputs']}",
         *(_text(row[name], name, digits) for name in _RESULT),
         *(_described(_items(row["settings"]) - shared.items()) for _ in own)]
        for row in lines]))
    if shared:
      parts.append(f"All of ours with {_described(shared.items())}.\n")
  return "\n".join(parts)


def _items(settings: dict[str, Any]) -> set[tuple[str, str]]:
  return {(name, records.described({name: value}))
          for name, value in settings.items()}


def _described(items: Any) -> str:
  return ", ".join(text for _, text in sorted(items))


def _text(value: Any, name: str, digits: int) -> str:
  if value is None:
    return ""
  if name == "difference":
    return f"{value:+.{digits}f}"
  if name in ("ours", "standard deviation"):
    return f"{value:.{digits}f}"
  if name == "paper":
    return f"{value:.{3 if digits == 4 else 2}f}"
  return str(value)


def table_of(names: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  """A table in Markdown, a line each."""
  lines = [names, ["---"] * len(names), *rows]
  return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def csv_of(rows: Rows) -> str:
  """Rows as CSV, with all digits; of what is not there, nothing between the commas."""
  file = io.StringIO()
  writer = csv.DictWriter(file, rows[0], lineterminator="\n")
  writer.writeheader()
  for row in rows:
    writer.writerow({**row, "settings": records.described(row["settings"]),
                     "commits": " ".join(row["commits"])})
  return file.getvalue()
