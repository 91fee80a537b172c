"""Tables I to V: the paper's numbers, ours, and the number of our runs."""

import csv
import io
import itertools
import statistics
from typing import Any, Sequence

from minw.report import paper
from minw.report import records

Rows = list[dict[str, Any]]

# The place of a cell. Rows always have its bits, and the other names if they vary
# within the table.
_BITS = ("inputs", "weights")
_PLACE = ("dataset", "network", "inputs", "weights", "estimator", "measure")
_RESULT = ("paper", "ours", "difference", "seeds", "standard deviation", "epochs")


def tables(runs: Sequence[records.Record]) -> tuple[dict[str, Rows],
                                                    list[records.LeftOut]]:
  """Makes the rows of Tables I to V.

  Args:
    runs: Records, see `records.read`.

  Returns:
    The rows by table, and the runs that belong to no cell. A cell without runs has one
    row. Other cells have a row for each group of runs that differ only in the seed;
    other runs are never averaged. A row has the bits of inputs and weights, and the
    other names of the cell's place that vary within the table. It also has

      paper: Number in the paper.
      ours: Mean of our runs over the seeds.
      difference: Our mean minus the number in the paper.
      seeds: Number of seeds.
      standard deviation: Standard deviation over the seeds (n - 1). None for one seed.
      epochs: Number of epochs; "20 of 200" if the paper's recipe has more.
      settings: Fields that differ from the defaults and are not part of the place, by
        name. These include bits_rules, and bits of 16, which stand for two formats.
      commits: Commits of the runs.
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
  """Returns the settings that differ from the defaults and that no cell names."""
  said = ["dataset", "network", "conv_widths", "dense_widths", "estimator",
          "num_epochs"]
  # In a cell, 16 bits stand for either of two formats.
  said += [name for name in ("input_bits", "weight_bits")
           if config[name] not in ("bfloat16", "float16")]
  return records.settings(config, said)


def with_runs(rows: dict[str, Rows]) -> dict[str, Rows]:
  """Returns the rows that have a run. Tables without such rows are left out."""
  ours = {table: [row for row in lines if row["ours"] is not None]
          for table, lines in rows.items()}
  return {table: lines for table, lines in ours.items() if lines}


def counts(rows: dict[str, Rows]) -> str:
  """Counts cells that have runs: "Cells that have runs: 1 of 64 in Table I."."""
  cells = {table: {tuple(row.get(name) for name in _PLACE): row["ours"] is not None
                   for row in lines} for table, lines in rows.items()}
  return "Cells that have runs: " + ", ".join(
      f"{sum(found.values())} of {len(found)} in Table {table}"
      for table, found in cells.items()) + "."


def markdown(rows: dict[str, Rows], left_out: Sequence[records.LeftOut]) -> str:
  """Formats the tables and the runs that are left out as Markdown.

  Missing numbers leave empty cells.
  """
  parts = ["# The paper's results and ours\n", WHAT,
           sections(rows) if rows else "No run belongs to a cell of these tables.\n"]
  if left_out:
    parts.append("## Runs that are in no table\n")
    parts.append("".join(
        f"- {_together([name for name, _ in group])}: {why}\n"
        for (why, _), group in itertools.groupby(
            left_out, lambda run: (run.why, run.name.rpartition(":")[0]))))
  return "\n".join(parts)


def _together(names: list[str]) -> str:
  """Names consecutive runs that are left out for the same reason."""
  return names[0] if len(names) == 1 else (
      f"{len(names)} runs, {names[0]} to {names[-1]}")


WHAT = ("\"Paper\" is arXiv 2003.04296. \"Ours\" is the mean over the seeds of the hard"
        " network's result at the last checkpoint, on the test split (for ImageNet, on"
        " the validation images). The standard deviation is that of the sample.\n")


def sections(rows: dict[str, Rows]) -> str:
  """Formats each table: a heading, its rows, and the settings that all runs share."""
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
      parts.append(f"All of our runs have {_described(shared.items())}.\n")
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
  """Formats a table in Markdown, with a line for each row."""
  lines = [names, ["---"] * len(names), *rows]
  return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def csv_of(rows: Rows) -> str:
  """Formats rows as CSV with all digits. Missing values leave empty fields."""
  file = io.StringIO()
  writer = csv.DictWriter(file, rows[0], lineterminator="\n")
  writer.writeheader()
  for row in rows:
    writer.writerow({**row, "settings": records.described(row["settings"]),
                     "commits": " ".join(row["commits"])})
  return file.getvalue()
