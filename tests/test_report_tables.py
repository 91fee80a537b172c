"""minw.report.tables: which runs are of which cells of the paper, and their means."""

import csv
import importlib.util
import math

import numpy as np
import pytest

from minw.report import paper
from minw.report import tables
from report_records import made
from short_runs import ROOT

FOLDER = ROOT / "experiments"


def experiment(name, argument):
  spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.get_config(argument)


def ours(rows, **place):
  return [row for row in rows if row["ours"] is not None and all(
      row[name] == value for name, value in place.items())]


def why(**changes):
  rows, left_out = tables.tables([made(**changes)])
  assert not any(ours(lines) for lines in rows.values())
  (name, reason), = left_out
  assert name == "run 0"
  return reason


def test_all_cells_are_there():
  rows, left_out = tables.tables([])
  assert {name: len(lines) for name, lines in rows.items()} == {
      "I": 16 * 4, "II": 17 * 4, "III": 8, "IV": 7 * 2, "V": 5 * 2}
  assert not left_out and len(set(paper.CELLS)) == 164
  for lines in rows.values():
    assert all(row["paper"] is not None and row["ours"] is None for row in lines)
  # Some of the paper's numbers, from the text around its tables.
  find = lambda table, **place: [row["paper"] for row in rows[table] if all(
      row[name] == value for name, value in place.items())]
  assert find("I", network="A", estimator="-") == [0.918]  # Nothing is estimated there.
  assert find("III", estimator="-") == [6.61, 35.87, 4.51, 22.27]
  assert find("I", network="D", inputs=1, weights=1) == [0.844]
  assert find("I", network="C", inputs=16, weights=3) == [0.904]
  assert find("II", network="D", inputs=1, weights=1) == [0.530, 0.515]
  assert find("II", network="D", estimator="ste") == [0.515]
  assert find("III", network="densenet100", dataset="cifar100", weights=3) == [23.70]
  assert find("IV", inputs=8, weights=2) == [3.2, 2.9]
  assert find("V", inputs=2, weights=1) == [42.16, 18.90]


@pytest.mark.parametrize("name, argument, table, place", [
    ("cifar_convnet", "", "I", dict(network="D", inputs=1, weights=1)),
    ("cifar_convnet", "network=A,weight_bits=bfloat16,input_bits=3", "I",
     dict(network="A", inputs=3, weights=16)),
    ("cifar_convnet", "network=C,input_bits=float16,weight_bits=2,geometry=valid32",
     "I", dict(network="C", inputs=16, weights=2)),
    ("cifar_convnet", "network=B,input_bits=float32,weight_bits=float32,estimator=ste",
     "I", dict(network="B", inputs=32, weights=32)),
    ("cifar_convnet", "dataset=cifar100,estimator=ste", "II",
     dict(network="D", inputs=1, weights=1, estimator="ste")),
    ("cifar_convnet", "dataset=cifar100", "II",
     dict(network="D", inputs=1, weights=1, estimator="aqe")),
    ("cifar_resnet110", "", "III", dict(network="resnet110", dataset="cifar10",
                                        weights=3)),
    ("cifar_densenet100", "dataset=cifar100,weight_bits=float32", "III",
     dict(network="densenet100", dataset="cifar100", weights=32)),
    ("imagenet_alexnet", "weight_bits=2,input_bits=float8_e4m3fn", "IV",
     dict(inputs=8, weights=2)),
    ("imagenet_alexnet", "weight_bits=1,input_bits=float16,first=1,last=1", "IV",
     dict(inputs=16, weights=1)),
    ("imagenet_resnet18", "", "V", dict(inputs=2, weights=1)),
    ("imagenet_resnet18", "input_bits=1,last=1", "V", dict(inputs=1, weights=1)),
    ("imagenet_resnet18", "input_bits=float32,weight_bits=float32", "V",
     dict(inputs=32, weights=32)),
])
def test_experiments_are_of_their_cells(name, argument, table, place):
  config = experiment(name, argument)
  rows, left_out = tables.tables([made(0.5, top5=0.75, config=config)])
  assert left_out == []
  found = ours(rows[table])
  assert len(found) == 1 + (table in ("IV", "V"))
  for row in found:
    assert place.items() <= row.items()
    assert row["epochs"] == str(config.num_epochs)  # The recipe's: not "20 of 200".
    assert row["seeds"] == 1 and row["standard deviation"] is None
  assert sum(len(ours(lines)) for lines in rows.values()) == len(found)
  expected = {"I": [0.5], "II": [0.5], "III": [50.0], "IV": [6.6, 5.2],
              "V": [50.0, 25.0]}[table]
  np.testing.assert_allclose([row["ours"] for row in found], expected)
  for row in found:
    np.testing.assert_allclose(row["difference"], row["ours"] - row["paper"])


def test_means_over_seeds():
  runs = [made(accuracy, seed=seed) for seed, accuracy in
          enumerate((0.84, 0.85, 0.86))] + [made(0.5, network="resnet20")]
  rows, _ = tables.tables(runs)
  row, = ours(rows["I"])
  assert row["seeds"] == 3
  np.testing.assert_allclose(
      [row["ours"], row["difference"], row["standard deviation"]], [0.85, 0.006, 0.01])
  assert row["settings"] == {} and row["commits"] == ["abc"]


def test_other_configs_are_not_averaged():
  rows, _ = tables.tables([
      made(0.80), made(0.82, seed=1), made(0.70, num_epochs=20),
      made(0.60, batch_size=128), made(0.9, weight_bits="float16"),
      made(0.91, weight_bits="bfloat16", data_dir="elsewhere", data_workers=3)])
  found = [(row["ours"], row["epochs"], row["settings"]) for row in ours(
      rows["I"], inputs=1, weights=1)]
  assert found == [(pytest.approx(0.81), "200", {}), (0.7, "20 of 200", {}),
                   (0.6, "200", {"batch_size": 128})]
  assert [row["settings"] for row in ours(rows["I"], weights=16)] == [
      {"weight_bits": "float16"}, {"weight_bits": "bfloat16"}]
  text = tables.markdown(rows, [])
  assert (
      "| D | aqe | W1A1 | 0.844 | 0.7000 | -0.1440 | 1 |  | 20 of 200 |  |\n") in text
  assert "| 200 | batch_size=128 |\n" in text
  assert "| A | aqe | W1A1 | 0.884 |  |  |  |  |  |  |\n" in text
  assert "| A | aqe | W3A2 | 0.903 |  |  |  |  |  |  |\n" in text
  assert "| A | - | W32A32 | 0.918 |  |  |  |  |  |  |\n" in text


def test_rows_without_a_run_can_be_left_out():
  rows, _ = tables.tables([made(0.80), made(0.70, num_epochs=20),
                           made(0.6, dataset="cifar100", weight_bits=2)])
  found = tables.with_runs(rows)
  assert {name: [row["ours"] for row in lines] for name, lines in found.items()} == {
      "I": [0.80, 0.70], "II": [0.6]}
  text = tables.markdown(found, [])
  assert sum(line.startswith("| D |") for line in text.splitlines()) == 3
  assert "## Table III" not in text and "| A |" not in text
  # Two kinds of runs of one cell are one cell.
  assert tables.counts(rows) == (
      "Cells that have runs: 1 of 64 in Table I, 1 of 68 in Table II, 0 of 8 in Table "
      "III, 0 of 14 in Table IV, 0 of 10 in Table V.")
  nothing = tables.markdown(tables.with_runs(tables.tables([])[0]), [])
  assert "No run belongs to a cell of these tables.\n" in nothing and "|" not in nothing


def test_shared_settings_are_said_once():
  rows, _ = tables.tables([made(crop_size=30, pad_value=1.0),
                           made(crop_size=30, weight_bits=2)])
  text = tables.markdown(rows, [])
  assert text.count("crop_size=30") == 1 and text.count("pad_value=1.0") == 1
  assert "All of our runs have crop_size=30.\n" in text


@pytest.mark.parametrize("changes, reason", [
    (dict(conv_widths=(16, 16, 32, 32, 64, 64)), "widths differ from those of"),
    (dict(dense_widths=(128, 128)), "widths differ from those of"),
    (dict(global_pool=True), "it pools elsewhere than ConvNets A to D"),
    (dict(pool_layers=(1, 3, 5)), "it pools elsewhere than ConvNets A to D"),
    (dict(dataset="digits"), "no table has digits"),
    (dict(network="resnet20"), "no table has resnet20 on cifar10"),
    (dict(network="resnet18"), "no table has resnet18 on cifar10"),
    (dict(crop_size=16), "a last map of 2x2, not 3x3 pixels"),
    (dict(crop_size=32), "a last map of 4x4, not 3x3 pixels"),
    (dict(network="resnet110", crop_size=24), "crop_size=24, not 32"),
    (dict(weight_bits=4), "no cell has inputs of 1 and weights of 4 bits"),
    (dict(weight_bits="float32"), "no cell has inputs of 1 and weights of float32"),
    (dict(estimator="ste"), "no cell has the estimator ste"),
    (dict(dataset="cifar100", estimator="ewgs"), "no cell has the estimator ewgs"),
    (dict(bits_rules=(("conv1", "float32"),)), "no cell has the bits_rules"),
])
def test_what_is_in_no_table(changes, reason):
  assert reason in why(**changes)


@pytest.mark.parametrize("rules, kept", [
    ((), "none"), ((("stem", 1),), "none"), ((("stem", "float32"),), "first"),
    ((("stem", "float32"), ("dense1", "float32")), "first and last"),
    ((("stem", "float32"), ("stem", 1)), "none"), ((("dense1", "float32"),), None),
    ((("stem", 2),), None), ((("stage1*", "float32"),), None), ((("*", 1),), None)])
def test_layers_that_are_kept(rules, kept):
  assert paper.kept_layers("resnet18", 1, rules) == kept
  c = experiment("imagenet_resnet18", "input_bits=1")
  found, _ = paper.cells_of(made(config=c, bits_rules=rules))
  assert len(found) == 2 * (kept == "first")


def test_part_of_the_data_is_another_experiment():
  part = made()
  part["step"] = 200 * 10
  rows, ((_, reason),) = tables.tables([part])
  assert reason == ("it has 2000 steps: 200 epochs of all 45000 training examples have "
                    "35000")
  assert not ours(rows["I"])


def test_csv():
  rows, _ = tables.tables([made(0.84), made(0.86, seed=1), made(0.5, crop_size=30)])
  text = tables.csv_of(rows["I"])
  lines = list(csv.DictReader(text.splitlines()))
  assert len(lines) == 65 and list(lines[0]) == [
      "network", "inputs", "weights", "estimator", "paper", "ours", "difference",
      "seeds", "standard deviation", "epochs", "settings", "commits"]
  assert lines[0]["ours"] == lines[0]["standard deviation"] == lines[0]["commits"] == ""
  first, second = (line for line in lines if line["ours"])
  assert float(first["ours"]) == pytest.approx(0.85)
  assert float(first["standard deviation"]) == pytest.approx(0.02 / math.sqrt(2))
  assert (second["settings"], second["standard deviation"]) == ("crop_size=30", "")
