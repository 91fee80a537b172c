"""minw.report.results: RESULTS.md."""

import json
import math
import pathlib
import shutil

import pytest

from minw.report import records
from minw.report import results
from report_records import T2
from report_records import made
from report_records import named
from short_runs import ROOT


def write_study(path, runs):
  path.with_suffix("").mkdir(parents=True)
  path.write_text("".join(json.dumps(run) + "\n" for run in runs))


def test_results(tmp_path):
  """Two networks, of which one is of a cell; the numbers are by hand."""
  small = dict(conv_widths=(8, 8), dense_widths=(4,))
  runs = [named("aqe", a, seed=seed, **small)
          for seed, a in enumerate((0.53, 0.51, 0.52))]
  runs += [named("ste", 0.5, seed=seed, estimator="ste", **small)
           for seed in range(3)]
  runs += [named("aqe", 0.85, seed=0),
           named("ste", 0.8, seed=0, estimator="ste")]
  curve = tmp_path / "results" / "s" / "curve.jsonl"
  runs[6] |= {"curve": "s/curve.jsonl", "hardware": {
      "device": "TPU v4", "num_devices": 8, "cpu": "x", "cores": 2}}
  write_study(tmp_path / "results" / "s.jsonl", runs)
  curve.write_text("".join(json.dumps(
      {"step": epoch, "epoch": epoch, "split": split, "mode": mode,
       "accuracy": accuracy}) + "\n"
      for epoch, split, mode, accuracy in (
          (1, "validation", "hard", 0.1), (2, "validation", "hard", 0.875),
          (2, "validation", "mixed", 0.2), (2, "train", "hard", 0.3))))
  (tmp_path / "results" / "s" / "README.md").write_text("# A study\n\nMore.\n")
  log = results.write(str(tmp_path / "results"), str(tmp_path))
  assert log[-1] == str(tmp_path / "RESULTS.md")
  text = (tmp_path / "RESULTS.md").read_text()
  assert "### A study\n" in text and "(results/s/README.md)" in text
  # Against the STE, wherever it stands.
  assert "| ste | 3 |  | 0.5000 ± 0.0000 | 0.5000 ± 0.0000 |  |  |\n" in text
  margin = T2 * 0.01 / math.sqrt(3)
  assert (f"| aqe | 3 |  | 0.5200 ± {margin:.4f} | 0.5200 ± {margin:.4f} | "
          f"+0.0200 ± {margin:.4f} | 0.074 |\n") in text
  assert "| aqe | 1 | 0.8750 | 0.8500 | 0.8500 | +0.0500 |  |\n" in text
  # Together: 0.03, 0.01, 0.02, 0.05.
  assert "**All networks on CIFAR-10 together**" in text
  assert f"| aqe | 4 | +0.0275 ± {3.182446305 * math.sqrt(7 / 24e3 / 4):.4f} | " in text
  assert "8 x TPU v4" in text and "unknown hardware" in text
  assert "paper's tables: its widths differ from those of ConvNets A to D." in text
  assert "| D | aqe | W1A1 | 0.844 | 0.8500 | +0.0060 | 1 |" in text
  assert "1 of 64 in Table I, 0 of 68 in Table II" in text


def test_networks_without_pairs_have_no_table_together():
  runs = [made(0.8, seed=0) | {"run": "a"},
          made(0.7, seed=0, conv_widths=(8, 8), dense_widths=(4,)) | {"run": "b"}]
  text = results.study(pathlib.Path("results/s.jsonl"), "A study", runs)
  assert "| a | 1 |  | 0.8000 |" in text and "| b | 1 |  | 0.7000 |" in text
  assert "together" not in text


def test_data_sets_are_not_pooled():
  runs = [named("ste", 0.5, seed=0, estimator="ste", dataset=dataset)
          for dataset in ("cifar10", "cifar100")]
  runs += [named("aqe", accuracy, seed=0, dataset=dataset)
           for dataset, accuracy in (("cifar10", 0.6), ("cifar100", 0.75))]
  text = results.study(pathlib.Path("results/s.jsonl"), "A study", runs)
  assert "| +0.1000 |" in text and "| +0.2500 |" in text
  assert "together" not in text


def test_heading_says_what_all_rows_share():
  runs = [named(name, 0.5, seed=0, num_epochs=3, estimator=name)
          for name in ("aqe", "ste")]
  runs += [named(f"{epochs}", 0.5, seed=0, num_epochs=epochs, dataset="cifar100",
                 crop_size=30) for epochs in (4, 5)]
  text = results.study(pathlib.Path("results/s.jsonl"), "A study", runs)
  assert "CIFAR-10, W1A1**; num_epochs=3\n" in text
  assert "CIFAR-100, W1A1**; crop_size=30\n" in text


def test_runs_that_others_went_on_from_have_no_row():
  first = named("first", 0.3, seed=0, num_epochs=1)
  then = named("then", 0.6, seed=0, init_from=records.as_source(first["config"]))
  text = results.study(pathlib.Path("results/s.jsonl"), "A study", [first, then])
  assert "| then | 1 |" in text and "| first |" not in text
  assert "2 runs of" in text


@pytest.mark.slow  # It reads the records of all studies.
def test_results_of_the_repository(tmp_path):
  """RESULTS.md is what the studies give."""
  shutil.copytree(ROOT / "results", tmp_path / "results")
  results.write(str(tmp_path / "results"), str(tmp_path))
  assert (tmp_path / "RESULTS.md").read_text() == (
      ROOT / "RESULTS.md").read_text()
