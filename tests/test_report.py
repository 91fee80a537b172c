"""minw.report, and what runs record for it: run.json, histograms, training lines."""

import csv
import importlib.util
import json
import math
import pathlib
import shutil
import subprocess

import jax
import jax.numpy as jnp
from matplotlib.backends import backend_agg
import numpy as np
import pytest

from drawings import drawn
from minw import config as config_lib
from minw import errors
from minw import evaluate
from minw import histograms
from minw.experiment import Experiment
from minw.report import comparison
from minw.report import figures
from minw.report import paper
from minw.report import records
from minw.report import results
from minw.report import tables
from minw.workdir import environment
from minw.workdir import metrics
from short_runs import EPOCH
from short_runs import ROOT
from short_runs import Stop
from short_runs import lines_of
from short_runs import run
from short_runs import run_with
from short_runs import stop_before
from short_runs import tiny_config

FOLDER = ROOT / "experiments"
EXAMPLES = {"cifar10": 45_000, "cifar100": 45_000, "digits": 1_257,
            "imagenet2012": 1_271_167}


# Records as `records.read` gives them, made by hand.


def made(accuracy=0.8, *, best=None, top5=None, config=None, **changes):
  c = config or config_lib.default_config()
  c.update(changes)
  steps = c.num_epochs * (EXAMPLES[c.dataset] // c.batch_size)
  return {
      "config": json.loads(config_lib.to_json(c)), "seed": c.seed, "commit": "abc",
      "hardware": None, "versions": None, "seconds": 1.0, "step": steps,
      "test_accuracy": accuracy, "test_loss": 1.0, "test_top5_accuracy": top5,
      "best_test_accuracy": accuracy if best is None else best, "best_test_loss": 1.0,
      "best_step": steps, "curve": None, "histograms": None, "name": f"run {c.seed}"}


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


# Comparisons.

# From Student's table: 0.975, 2 and 1 degrees.
T2, T1 = 4.302652729749, 12.706204736175


def test_estimate():
  assert comparison.estimate([0.5]) == (1, 0.5, None, None)
  n, mean, deviation, margin = comparison.estimate([1.0, 2.0, 6.0])
  assert (n, mean) == (3, 3.0)
  assert deviation == pytest.approx(math.sqrt(7))  # (4 + 1 + 9) / 2.
  assert margin == pytest.approx(T2 * math.sqrt(7 / 3), rel=1e-9)
  assert comparison.estimate([1.0, 3.0]).margin == pytest.approx(T1, rel=1e-9)


@pytest.mark.parametrize("values, bounds, expected, text", [
    # mean 0.9, deviation 0.1 sqrt(2): 12.7 * 0.1 on either side, beyond both ends.
    ([0.8, 1.0], (0, 1), (0.0, 1.0), "0.9000 (0.0000 to 1.0000)"),
    # mean 0.98, deviation 0.02: 4.3027 * 0.02 / sqrt(3) = 0.0497.
    ([0.96, 0.98, 1.0], (0, 1), (0.98 - 0.0496829, 1.0), "0.9800 (0.9303 to 1.0000)"),
    ([0.0, 0.02, 0.04], (0, 1), (0.0, 0.02 + 0.0496829), "0.0200 (0.0000 to 0.0697)"),
    ([0.48, 0.5, 0.52], (0, 1), (0.4503171, 0.5496829), "0.5000 ± 0.0497"),
    ([1.0, 1.0, 1.0], (0, 1), (1.0, 1.0), "1.0000 ± 0.0000"),
    ([0.0, 0.02, 0.04], (-1, 1), (-0.0296829, 0.0696829), "0.0200 ± 0.0497"),
    ([-0.9, 0.9], (-1, 1), (-1.0, 1.0), "0.0000 (-1.0000 to 1.0000)"),
])
def test_intervals_stay_where_values_can_be(values, bounds, expected, text):
  of = comparison.estimate(values)
  np.testing.assert_allclose(comparison.interval(of, bounds), expected, atol=1e-6)
  assert comparison.described(of, bounds) == text


def test_described_estimates():
  assert comparison.described(comparison.estimate([0.25])) == "0.2500"
  assert comparison.described(
      comparison.estimate([0.25]), comparison.DIFFERENCE, sign="+") == "+0.2500"


def test_cut_intervals_hold_the_mean_as_often():
  """5 seeds with 50 test images each: the part cut off never holds the mean."""
  generator = np.random.default_rng(0)
  for accuracy in (0.9, 0.98):
    draws = generator.binomial(50, accuracy, (2000, 5)) / 50
    held, cut = [], []
    for values in draws:
      of = comparison.estimate(values.tolist())
      low, high = comparison.interval(of)
      assert 0 <= low <= of.mean <= high <= 1
      held.append(low <= accuracy <= high)
      cut.append(abs(of.mean - accuracy) <= of.margin)
    assert held == cut and any(low < 1 for low in held)


def test_comparison():
  runs = [made(a, best=a + 0.01, seed=seed) for seed, a in
          zip((2, 0, 1), (0.86, 0.84, 0.85))]
  runs += [made(a, seed=seed, estimator="ste") for seed, a in
           zip((0, 1, 2, 7), (0.85, 0.87, 0.86, 0.1))]
  runs += [made(0.3, weight_bits=2, estimator="ste")]
  first, second = comparison.compare(runs, ["estimator"])
  assert (first.settings, second.settings) == ({}, {"weight_bits": 2})
  aqe, ste = first.groups
  assert (aqe.by, [*aqe.runs]) == ({"estimator": "aqe"}, [0, 1, 2])
  assert (ste.by, [*ste.runs]) == ({"estimator": "ste"}, [0, 1, 2, 7])
  np.testing.assert_allclose(
      aqe.estimates["test_accuracy"], (3, 0.85, 0.01, T2 * 0.01 / math.sqrt(3)))
  np.testing.assert_allclose(aqe.estimates["best_test_accuracy"].mean, 0.86)
  assert aqe.differences == {"test_accuracy": None, "best_test_accuracy": None}
  # 0.01, 0.02, 0, of seeds 0, 1, 2; seed 7 has no partner.
  np.testing.assert_allclose(
      ste.differences["test_accuracy"], (3, 0.01, 0.01, T2 * 0.01 / math.sqrt(3)))
  np.testing.assert_allclose(ste.differences["best_test_accuracy"].mean, 0.0, atol=1e-9)
  assert ste.estimates["test_accuracy"].mean == pytest.approx(0.67)
  group, = second.groups
  assert group.estimates["test_accuracy"] == (1, 0.3, None, None)

  text = comparison.markdown([first, second])
  assert ("| last checkpoint | aqe | 3 | 0.8500 | 0.0100 | 0.8252 to 0.8748 |  |  |  |"
          "\n") in text
  assert "| 3 | +0.0100 | -0.0148 to 0.0348 |\n" in text
  assert "## ConvNet D, CIFAR-10, W1A1\n" in text
  assert "## ConvNet D, CIFAR-10, W2A1\n" in text
  assert "| last checkpoint | ste | 1 | 0.3000 |  |  |  |  |  |\n" in text


def test_headings_of_comparisons():
  """They say what is shared, and nothing that is compared."""
  runs = [made(0.5, crop_size=30, bits_rules=(("conv1", 2),)), made(0.6, crop_size=30)]
  for by, expected in (
      (["bits_rules"], "ConvNet D, CIFAR-10, W1A1; crop_size=30"),
      (["bits_rules", "weight_bits"], "ConvNet D, CIFAR-10; crop_size=30"),
      (["bits_rules", "dataset", "network"], "W1A1; crop_size=30"),
      (["bits_rules", "dataset", "network", "input_bits", "crop_size"],
       "All of these")):
    compared, = comparison.compare(runs, by)
    assert comparison.heading(compared) == expected
  compared, *_ = comparison.compare(runs, ["estimator"])
  assert comparison.heading(compared) == (
      "ConvNet D, CIFAR-10, W1A1 (conv1=2); crop_size=30")


def test_comparison_by_several_fields_and_without_partners():
  runs = [made(0.5, seed=0), made(0.6, seed=1, alpha_end=1.0, alpha_start=0.0),
          made(0.7, seed=0, alpha_end=1.0)]
  compared, = comparison.compare(runs, ["alpha_end", "alpha_start"])
  assert [group.by for group in compared.groups] == [
      {"alpha_end": 0.465, "alpha_start": 0.5}, {"alpha_end": 1.0, "alpha_start": 0.0},
      {"alpha_end": 1.0, "alpha_start": 0.5}]
  assert compared.groups[1].differences["test_accuracy"] is None
  assert compared.groups[2].differences["test_accuracy"] == (
      1, pytest.approx(0.2), None, None)
  assert len(comparison.compare(runs, ["alpha_end"])) == 2


def test_estimators_of_float_networks_do_not_count():
  """Settings of an estimator that does not act tell no runs apart."""
  floats = dict(input_bits="bfloat16", weight_bits="float32")
  runs = [made(0.9, seed=0, estimator="ste", **floats),
          made(0.8, seed=1, alpha_start=0.0, estimator_gradient="algorithm1", **floats)]
  assert records.key(runs[0]["config"]) == records.key(runs[1]["config"])
  assert records.settings(runs[1]["config"]) == floats
  compared, = comparison.compare(runs, ["estimator"])
  group, = compared.groups
  assert group.by == {"estimator": "-"} and group.estimates["test_accuracy"].count == 2
  assert "| last checkpoint | - | 2 | 0.8500 |" in comparison.markdown([compared])
  # One quantized operand is enough, of any layer.
  for changes in (dict(weight_bits=1), dict(input_bits=3),
                  dict(bits_rules=(("conv2", 1),))):
    aqe, ste = (made(estimator=name, **{**floats, **changes})["config"]
                for name in ("aqe", "ste"))
    assert records.key(aqe) != records.key(ste)
    assert records.acting(ste)["estimator"] == "ste"


def test_p_value():
  # The p-value of Student's t with 2 degrees of freedom: 1 - t / sqrt(t^2 + 2), where
  # t^2 = 12.
  assert comparison.p_value([0.03, 0.01, 0.02]) == pytest.approx(1 - (12 / 14) ** 0.5)
  assert comparison.p_value([-1.0, 1.0]) == pytest.approx(1.0)
  assert comparison.p_value([0.5]) is None
  assert comparison.p_value([0.5, 0.5]) is None


def test_comparison_refuses():
  with pytest.raises(errors.UsageError, match="did you mean 'estimator'"):
    comparison.compare([], ["estimatr"])
  for name in ("seed", "data_dir"):
    with pytest.raises(errors.UsageError, match=f"by='{name}': must be a field that"):
      comparison.compare([], [name])


# Real runs.

LAYERS = ("conv2", "norm_conv2", "dense*")


def recording_config(**changes):
  return tiny_config(histogram_layers=LAYERS, histogram_epochs=(1, 3), eval_train=True,
                     alpha_end=0.9, **changes)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
  """Workdirs: aqe of W1A1 and W2A2; "ste" is the first one under that name."""
  folder = tmp_path_factory.mktemp("report")
  run(recording_config(), folder / "aqe")
  run(recording_config(input_bits=2, weight_bits=2), folder / "two")
  copied(folder / "aqe", folder / "ste", estimator="ste")
  for name in ("metrics.jsonl", "histograms.jsonl"):
    shutil.copy(folder / "aqe" / name, folder / "ste")
  return folder


def test_run_json(runs):
  content = json.loads((runs / "aqe" / "run.json").read_text())
  assert list(content) == ["seconds", "startup_seconds", "environments"]
  assert 0 < content["startup_seconds"] < content["seconds"]
  start, = content["environments"]
  assert start["versions"]["jax"] == jax.__version__
  assert start["hardware"]["num_devices"] == jax.local_device_count()
  root = pathlib.Path(environment.__file__).parents[2]
  git = subprocess.run(["git", "-C", root, "rev-parse", "HEAD"], capture_output=True,
                       text=True, check=False)
  if git.returncode == 0:
    assert start["commit"].removesuffix("-dirty") == git.stdout.strip()
  else:
    assert start["commit"].startswith("minw ")


def test_journal_of_several_starts(tmp_path, monkeypatch):
  now = [100.0]
  monkeypatch.setattr(environment.time, "monotonic", lambda: now[0])
  monkeypatch.setattr(environment, "commit", lambda: "one")
  journal = environment.Journal(str(tmp_path))
  now[0] = 103.0
  journal.trains()
  now[0] = 107.0
  journal.note()
  now[0] = 150.0  # Killed at once; then started twice on another machine.
  environment.Journal(str(tmp_path))
  monkeypatch.setattr(environment, "commit", lambda: "two")
  for _ in range(2):
    now[0] = 5.0
    journal = environment.Journal(str(tmp_path))
    now[0] = 5.5
    journal.trains()
    now[0] = 6.5
    journal.note()
  content = environment.read(str(tmp_path))
  assert content["seconds"] == 7.0 + 2 * 1.5
  assert content["startup_seconds"] == 3.0 + 2 * 0.5
  assert [start["commit"] for start in content["environments"]] == ["one", "two"]


def test_commit_of_an_installed_package(monkeypatch):
  def none(*_, **__):
    raise FileNotFoundError("git")

  monkeypatch.setattr(environment.subprocess, "run", none)
  assert environment.commit.__wrapped__() == f"minw {environment.minw.__version__}"


def test_hard_training_lines(runs):
  lines = lines_of(runs / "aqe")
  assert [(line["split"], line["mode"]) for line in lines[:4]] == [
      ("train", "mixed"), ("train", "hard"), ("validation", "mixed"),
      ("validation", "hard")]
  hard = [line for line in lines if (line["split"], line["mode"]) == ("train", "hard")]
  assert [line["epoch"] for line in hard] == [1, 2, 3, 4]
  found = evaluate.evaluate_workdir(str(runs / "aqe"), "train")
  assert (hard[-1]["accuracy"], hard[-1]["loss"]) == (found["accuracy"], found["loss"])


def test_histograms_of_a_run(runs):
  lines = metrics.read_histograms(runs / "aqe" / "histograms.jsonl")
  assert [(line["epoch"], line["step"], line["layer"], line["kind"]) for line in lines
          ] == [(epoch, epoch * EPOCH, layer, kind) for epoch in (1, 3)
                for layer, kind in (("conv2", "weights"), ("norm_conv2", "activations"),
                                    ("dense1", "weights"), ("dense2", "weights"))]
  for line in lines:
    # alpha goes from 0.5 to 1 in 0.9 of 4 epochs; the step before is counted.
    alpha = 0.5 + 0.5 * (line["step"] - 1) / (0.9 * 4 * EPOCH)
    assert line["alpha"] == pytest.approx(alpha, rel=1e-5)
    sizes = {"conv2": 9 * 8 * 8, "norm_conv2": 64 * 4 * 4 * 8, "dense1": 128 * 16,
             "dense2": 160}
    assert sum(line["counts"]) == sizes[line["layer"]]
    # Nothing of one bit is nearer to zero than alpha.
    centres = np.linspace(-1, 1, 201)[np.nonzero(line["counts"])]
    assert alpha - 0.0051 < np.abs(centres).min() < alpha + 0.1
    assert centres.min() < 0 < centres.max()


@pytest.mark.parametrize("changes", [
    dict(bits_rules=(("conv2", 3), ("norm_conv2", 2)), eval_batch_size=200),
    dict(alpha_per_layer=True, estimator="stochastic_aqe")])
def test_counts(changes):
  """Against NumPy's histograms of what Flax captures and of weights by hand."""
  experiment = Experiment(tiny_config(
      histogram_layers=("*conv2",), histogram_epochs=(1,), **changes))
  jitted = lambda f, **_: jax.jit(
      f, compiler_options={"xla_backend_optimization_level": 0})
  experiment.jit = jitted
  generator = np.random.default_rng(0)
  shapes = jax.eval_shape(lambda: experiment.model.init(
      dict(params=jax.random.key(0), estimator=jax.random.key(0)),
      jnp.zeros((1, 8, 8, 1)), mode="train"))
  variables = jax.tree.map(
      lambda leaf: generator.uniform(-1, 1, leaf.shape).astype(np.float32),
      {"params": shapes["params"], "batch_stats": shapes["batch_stats"]})
  for layer in variables["batch_stats"].values():
    layer["batch_norm"]["var"] = np.abs(layer["batch_norm"]["var"]) * 9
  data = experiment.data.load("validation")
  alpha = (np.linspace(0.6, 0.9, 4) if "alpha_per_layer" in changes else
           np.float32(0.7)).astype(np.float32)
  conv, norm = histograms.make_histograms(experiment)(variables, data, alpha)
  assert (conv["layer"], norm["layer"]) == ("conv2", "norm_conv2")
  own = float(alpha if alpha.ndim == 0 else alpha[1])
  assert conv["alpha"] == norm["alpha"] == pytest.approx(own)

  edges = np.linspace(-1.005, 1.005, 202)
  kernel = variables["params"]["conv2"]["kernel"].astype(np.float64)
  images = min(180, experiment.config.eval_batch_size)
  if "bits_rules" in changes:
    mean = np.abs(kernel).mean()
    levels = np.sign(kernel) * np.select(
        [np.abs(kernel) > f * mean for f in (1.875, 0.9375, 0.3125)], [1, 0.5, 0.25], 0)
    expected = np.histogram(own * levels + (1 - own) * kernel, edges)[0]
    np.testing.assert_array_equal(conv["counts"], expected)
    pixels, *_ = jax.jit(experiment.data.eval_inputs)(data, 0)
    _, sown = jax.jit(lambda v, x: experiment.model.apply(
        v, x, alpha, mode="mixed", capture_intermediates=True,
        mutable=["intermediates", "distance"]))(variables, pixels[:images])
    y, = sown["intermediates"]["norm_conv2"]["__call__"]
    expected = np.histogram(np.asarray(y, np.float64), edges)[0]
    assert np.abs(np.asarray(norm["counts"]) - expected).sum() <= 4  # At edges.
  else:
    assert sum(conv["counts"]) == kernel.size
    gap = np.abs(np.linspace(-1, 1, 201)) < 2 * own - 1 - 0.0051
    assert not np.asarray(conv["counts"])[gap].any()  # -alpha + (1 - alpha) x and so on
  # What the last batch is filled up with is not counted.
  assert sum(norm["counts"]) == images * 4 * 4 * 8


def test_records_of_an_interrupted_run(runs, tmp_path):
  for step in (EPOCH + 1, 3 * EPOCH + 2, 3 * EPOCH + 3):
    with pytest.raises(Stop):
      run_with(stop_before(step), recording_config(), tmp_path)
  # What the file has lost, the checkpoint has.
  path = tmp_path / "histograms.jsonl"
  whole = path.read_bytes()
  assert whole == (runs / "aqe" / "histograms.jsonl").read_bytes()
  path.write_bytes(whole.replace(b'"counts": [', b'"counts": [9, '))
  run(recording_config(), tmp_path)
  assert path.read_bytes() == whole
  assert lines_of(tmp_path) == lines_of(runs / "aqe")


@pytest.mark.parametrize("changes, message", [
    (dict(histogram_layers=("conv9",), histogram_epochs=(1,)),
     "config.histogram_layers='conv9': must be a pattern that matches one of conv1, "),
    (dict(histogram_layers=("conv1",), histogram_epochs=(1,),
          bits_rules=(("conv1", "float32"),)),
     "config.histogram_layers='conv1': must be a pattern that matches one of norm_con"),
    (dict(histogram_layers=(3,)), "config.histogram_layers=(3,): must be a tuple of "),
    (dict(histogram_layers=("conv1",), histogram_epochs=(5,)),
     "config.histogram_epochs=(5,): must be epochs up to num_epochs=4 that end with a"),
    (dict(histogram_layers=("conv1",), histogram_epochs=(0,)),
     "config.histogram_epochs=(0,)"),
    (dict(histogram_layers=("conv1",), histogram_epochs=(1.0,)),
     "config.histogram_epochs=(1.0,): must be a tuple of int"),
    (dict(histogram_layers=("conv1",), histogram_epochs=(1, 2), eval_every_epochs=2),
     "config.histogram_epochs=(1, 2): must be epochs up to num_epochs=4 that end with "
     "a validation, as every eval_every_epochs=2 do"),
])
def test_histograms_that_cannot_be(changes, message):
  with pytest.raises(errors.UsageError) as error:
    Experiment(tiny_config(**changes))
  assert str(error.value).startswith(message)


def test_epochs_do_not_count_without_layers():
  config_lib.validate(tiny_config(num_epochs=1))
  config_lib.validate(tiny_config(histogram_layers=("conv1",), histogram_epochs=(3, 5),
                                  num_epochs=5, eval_every_epochs=3))


def test_record_of_a_workdir(runs):
  status = json.loads((runs / "aqe" / "status.json").read_text())
  found = records.record(str(runs / "aqe"))
  assert found["config"]["estimator"] == "aqe" and found["seed"] == 0
  assert not {"data_dir", "data_workers"} & found["config"].keys()
  assert {k: found[k] for k in status if k != "state"} == {
      k: v for k, v in status.items() if k != "state"}
  start, = environment.read(str(runs / "aqe"))["environments"]
  assert start.items() <= found.items() and "earlier" not in found
  assert found["curve"] == str(runs / "aqe" / "metrics.jsonl")
  json.dumps(found, allow_nan=False)


def copied(source, target, status=None, **changes):
  """A workdir as `source`, but for fields of its config and its status."""
  target.mkdir(parents=True)
  config = json.loads((source / "config.json").read_text()) | changes
  del config["crc32"]  # As earlier versions wrote it, which is no other run.
  (target / "config.json").write_text(json.dumps(config))
  before = json.loads((source / "status.json").read_text())
  (target / "status.json").write_text(json.dumps(before | (status or {})))
  return target


def test_read(runs, tmp_path):
  source = runs / "aqe"
  copied(source, tmp_path / "b" / "seed1", seed=1)
  copied(source, tmp_path / "a", seed=2)
  copied(source, tmp_path / "diverged", status=dict(state="diverged", step=7), seed=3)
  copied(source, tmp_path / "newer", colour="red")
  copied(source, tmp_path / "other", data_dir="there", status=dict(test_accuracy=0.0))
  copied(source, tmp_path / "same", data_dir="there")
  (tmp_path / "nothing").mkdir()
  found, left_out = records.read([str(source), str(tmp_path)])
  assert [run["name"] for run in found] == [
      str(source), str(tmp_path / "a"), str(tmp_path / "b" / "seed1")]
  assert [run["seed"] for run in found] == [0, 2, 1]
  assert found[1]["commit"] is None and found[1]["curve"] is None
  reasons = {pathlib.Path(name).name: reason for name, reason in left_out}
  assert reasons.keys() == {"diverged", "newer", "other"}
  assert "it is diverged at step 7" in reasons["diverged"]
  assert "config field 'colour' does not exist" in reasons["newer"]
  assert f"those of {source}, whose result is another" in reasons["other"]
  for path in (tmp_path / "none", tmp_path / "a" / "config.json"):
    with pytest.raises(errors.UsageError, match="^runs="):
      records.read([str(path)])


def test_older_configs_have_the_new_fields(runs, tmp_path):
  copied(runs / "aqe", tmp_path / "old")
  path = tmp_path / "old" / "config.json"
  config = json.loads(path.read_text())
  for name in ("eval_train", "share_pool_gradient"):
    del config[name]
  path.write_text(json.dumps(config))
  (found,), _ = records.read([str(tmp_path)])
  assert found["config"]["share_pool_gradient"] is False


def test_changed_configs_are_not_believed(runs, tmp_path):
  copied(runs / "aqe", tmp_path / "run")
  text = (runs / "aqe" / "config.json").read_text()
  changed = text.replace('"learning_rate": 0.01', '"learning_rate": 0.03')
  assert changed != text
  (tmp_path / "run" / "config.json").write_text(changed)
  found, ((_, why),) = records.read([str(tmp_path)])
  assert not found and "config.json is damaged: the checksum differs" in why


def test_runs_from_other_runs_are_one_group(runs, tmp_path):
  for seed in (0, 1):
    source = copied(runs / "two", tmp_path / f"source{seed}", seed=seed)
    copied(runs / "aqe", tmp_path / f"run{seed}", seed=seed, init_from=str(source))
  copied(runs / "aqe", tmp_path / "run2", seed=2, init_from="gone")
  found, _ = records.read([str(tmp_path)])
  started = {run["config"]["init_from"] for run in found if run["config"]["init_from"]}
  assert len(started) == 2 and "gone" in started
  by_key = [records.key(run["config"]) for run in found if "run" in run["name"][-4:]]
  assert by_key[0] == by_key[1] != by_key[2]


def test_collect(runs, tmp_path):
  study = tmp_path / "results" / "digits.jsonl"
  added, left_out = records.collect([str(runs)], str(study))
  assert [pathlib.Path(name).name for name in added] == ["aqe", "ste", "two"]
  assert left_out == []
  files = lambda: {path: path.read_bytes() for path in study.parent.rglob("*")
                   if path.is_file()}
  before = files()
  assert len(before) == 1 + 3 * 2
  assert str(runs).encode() not in study.read_bytes()  # No paths of a machine.
  for _ in range(2):
    added, left_out = records.collect([str(runs), str(study)], str(study))
    assert added == [] and left_out == [
        (str(runs / name), f"{study}:{line} is the same run")
        for line, name in enumerate(("aqe", "ste", "two"), start=1)]
    assert files() == before

  copied(runs / "two", tmp_path / "more", seed=5)
  added, _ = records.collect([str(tmp_path / "more")], str(study))
  assert added == [str(tmp_path / "more")]
  assert study.read_bytes().startswith(before[study])
  from_study, left_out = records.read([str(study.parent)])
  from_workdirs, _ = records.read([str(runs), str(tmp_path / "more")])
  assert left_out == [] and len(from_study) == 4
  named = ("name", "curve", "histograms")
  for ours, theirs in zip(from_study, from_workdirs):
    assert {k: v for k, v in ours.items() if k not in named} == {
        k: v for k, v in theirs.items() if k not in named}
  assert from_study[3]["curve"] is None
  assert pathlib.Path(from_study[0]["histograms"]).read_bytes() == (
      runs / "aqe" / "histograms.jsonl").read_bytes()
  curve, whole = ([json.loads(line) for line in pathlib.Path(path).read_text(
      ).splitlines()] for path in (from_study[0]["curve"], runs / "aqe/metrics.jsonl"))
  dropped = {"flip_rate", "weight_distance", "input_distance", "examples_per_second"}
  assert curve == [
      {k: v for k, v in line.items() if k not in dropped} for line in whole]
  # Both at once are the same runs.
  assert len(records.read([str(study), str(runs)])[0]) == 4


def test_collect_names_what_it_drops(runs, tmp_path):
  """Each run that is found is added or named."""
  source = runs / "aqe"
  copied(source, tmp_path / "runs" / "a")
  copied(source, tmp_path / "runs" / "copy", data_dir="there")
  copied(source, tmp_path / "runs" / "other", status=dict(test_accuracy=0.0))
  copied(source, tmp_path / "runs" / "half", status=dict(state="running", step=7),
         seed=3)
  (copied(source, tmp_path / "runs" / "new", seed=4) / "status.json").unlink()
  (copied(source, tmp_path / "runs" / "torn",
          seed=5) / "status.json").write_text('{"sta')
  (copied(source, tmp_path / "runs" / "old", seed=6) / "status.json").write_text("{}")
  foreign = tmp_path / "runs" / "foreign"
  foreign.mkdir()
  (foreign / "config.json").write_text('{"model_type": "bert"}')
  added, left_out = records.collect([str(tmp_path / "runs")], str(tmp_path / "s.jsonl"))
  assert [pathlib.Path(name).name for name in added] == ["a"]
  reasons = {pathlib.Path(name).name: reason for name, reason in left_out}
  assert reasons.keys() == {"copy", "other", "half", "new", "torn", "old"}
  assert reasons["copy"] == f"{tmp_path / 'runs' / 'a'} is the same run"
  assert "it is not begun at step 0" in reasons["new"]
  assert "it is stopped at step 7" in reasons["half"]  # No process holds its lock.
  assert not any("\n" in reason for reason in reasons.values())


def test_collect_refuses(runs, tmp_path):
  (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
  for out, message in ((tmp_path / "study.json", "whose name ends in .jsonl"),
                       (tmp_path / "metrics.jsonl", "must be a study, or a new file"),
                       (tmp_path / "metrics.jsonl" / "s.jsonl", "cannot be written")):
    with pytest.raises(errors.UsageError, match=message):
      records.collect([str(runs)], str(out))
  assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n'


def test_damaged_study(runs, tmp_path):
  study = tmp_path / "s.jsonl"
  records.collect([str(runs)], str(study))
  first, second, third = study.read_text().splitlines()
  poor = json.loads(third)
  del poor["seconds"]
  study.write_text("\n".join([first, second[:50], json.dumps(poor)]) + "\n")
  found, left_out = records.read([str(study)])
  assert [run["name"] for run in found] == [f"{study}:1"]
  assert [name for name, _ in left_out] == [f"{study}:2", f"{study}:3"]
  assert "damaged" in left_out[0].why and "has no seconds" in left_out[1].why


def test_a_study_with_damaged_lines_loses_none_in_silence(runs, tmp_path):
  """Also where the first one is damaged, and where its folder is searched."""
  study = tmp_path / "found" / "s.jsonl"
  study.parent.mkdir()
  records.collect([str(runs)], str(study))
  lines = study.read_bytes().splitlines(True)
  whole = json.loads(lines[1])
  wrong = [{"seed": "1"}, {"test_accuracy": None}, {"seconds": []}, {"commit": 5},
           {"hardware": {"device": "cpu"}}, {"versions": {"jax": 1}}, {"config": []},
           {"curve": 3}]
  study.write_bytes(b"".join([
      b"\0" * 50 + b"\n", lines[1], b"\xff" + lines[2], b"[]\n", b"[" * 200_000 + b"\n",
      *(json.dumps(whole | change).encode() + b"\n" for change in wrong)]))
  found, left_out = records.read([str(study.parent)])
  assert [run["name"] for run in found] == [f"{study}:2"]
  assert [name for name, _ in left_out] == [
      f"{study}:{number}" for number in (1, *range(3, 6 + len(wrong)))]
  for name, data in (("zeros", bytes(500)), ("cut", lines[0][:200] + b"\n")):
    (tmp_path / name).mkdir()
    (tmp_path / name / "s.jsonl").write_bytes(data)
    found, left_out = records.read([str(tmp_path / name)])
    assert not found and [name for name, _ in left_out] in (
        [str(tmp_path / name / "s.jsonl")], [f"{tmp_path / name / 's.jsonl'}:1"])


def test_a_damaged_curve_is_left_out_by_name(runs, tmp_path):
  study = tmp_path / "s.jsonl"
  records.collect([str(runs)], str(study))
  first = json.loads(study.read_text().splitlines()[0])
  (tmp_path / first["curve"]).write_text("[]\n")
  found, left_out = records.read([str(study)])
  (name, why), = left_out
  assert name == f"{study}:1" and f"{first['curve']} is damaged" in why
  assert len(found) == len(study.read_text().splitlines()) - 1


def test_no_line_is_added_to_one_that_was_cut_off(runs, tmp_path):
  study = tmp_path / "s.jsonl"
  records.collect([str(runs)], str(study))
  lines = study.read_text().splitlines(True)
  study.write_text("".join(lines[:-2]) + lines[-2][:99])
  added, _ = records.collect([str(runs)], str(study))
  assert len(added) == 2
  found, left_out = records.read([str(study)])
  assert (len(found), len(left_out)) == (len(lines), 1)


def test_a_run_that_lost_its_config_is_named(runs, tmp_path):
  shutil.copytree(runs / "aqe", tmp_path / "runs" / "aqe")
  (tmp_path / "runs" / "aqe" / "config.json").unlink()
  found, left_out = records.read([str(tmp_path / "runs")])
  (name, why), = left_out
  assert not found and name == str(tmp_path / "runs" / "aqe")
  assert "there is no config.json" in why


# RESULTS.md.


def write_study(path, runs):
  path.with_suffix("").mkdir(parents=True)
  path.write_text("".join(json.dumps(run) + "\n" for run in runs))


def named(run, accuracy, **changes):
  return made(accuracy, **changes) | {"run": f"{run}-seed{changes['seed']}"}


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


def test_results_of_the_repository(tmp_path):
  """RESULTS.md is what the studies give."""
  shutil.copytree(FOLDER.parent / "results", tmp_path / "results")
  results.write(str(tmp_path / "results"), str(tmp_path))
  assert (tmp_path / "RESULTS.md").read_text() == (
      FOLDER.parent / "RESULTS.md").read_text()


# Figures.


def test_figures_of_histograms(runs):
  lines = [line for line in metrics.read_histograms(runs / "two" / "histograms.jsonl")
           if line["layer"] == "norm_conv2"]
  figure = figures.histogram_figure(lines, "Fig 4")
  assert len(figure.axes) == 2 and figure.get_suptitle() == "Fig 4"
  assert figure.get_supxlabel() == "activation as training computes with it"
  for axes, line in zip(figure.axes, lines):
    assert axes.get_title().startswith(f"epoch {line['epoch']}, ")
    stairs, = axes.patches
    heights, edges, _ = stairs.get_data()
    np.testing.assert_allclose(
        heights, 100 * np.array(line["counts"]) / sum(line["counts"]))
    np.testing.assert_allclose(edges, np.linspace(-1.005, 1.005, 202), atol=1e-9)


def test_labels_of_histograms_do_not_collide():
  """Whatever the number of epochs: no two labels of the picture overlap."""
  counts = [1] * 201
  for number in (1, 2, 3, 4, 5, 9):
    lines = [{"epoch": 100 + i, "alpha": 0.5, "kind": "weights", "counts": counts}
             for i in range(number)]
    figure = figures.histogram_figure(lines, "Fig 1")
    assert len(figure.axes) == number
    renderer = backend_agg.FigureCanvasAgg(figure).get_renderer()
    figure.draw(renderer)
    texts = []
    for axes in figure.axes:
      (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
      texts += [axes.title]
      texts += [label for label in axes.get_xticklabels()
                if left <= label.get_position()[0] <= right]
      texts += [label for label in axes.get_yticklabels()
                if low <= label.get_position()[1] <= high]
    boxes = [text.get_window_extent(renderer) for text in texts if text.get_text()]
    assert len(boxes) >= 6 * number
    for i, box in enumerate(boxes):
      assert not box.padded(1).count_overlaps(boxes[:i]), number


def curve_run(tmp_path, estimator, seed, losses, splits=("validation",), **changes):
  path = tmp_path / f"{estimator}{seed}.jsonl"
  path.write_text("".join(json.dumps(
      {"step": epoch, "epoch": epoch, "split": split, "mode": mode,
       "accuracy": 1 - loss,
       "loss": loss * (1 + (split == "train") + 4 * (mode == "mixed"))}) + "\n"
      for epoch, loss in enumerate(losses, start=1) for split in splits
      for mode in ("mixed", "hard")))
  return made(seed=seed, estimator=estimator, num_epochs=len(losses), **changes) | {
      "curve": str(path), "name": path.name}


def test_figure_of_estimators(tmp_path):
  both = ("train", "validation")
  found = [curve_run(tmp_path, "aqe", 0, (0.5, 0.25), both),
           curve_run(tmp_path, "ste", 0, (0.5, 0.4), both),
           curve_run(tmp_path, "aqe", 1, (0.3, 0.15), both),
           curve_run(tmp_path, "aqe", 2, (0.9, 0.9), dataset="cifar100"),
           curve_run(tmp_path, "ste", 2, (0.8, 0.7), both, dataset="cifar100"),
           curve_run(tmp_path, "ste", 3, (0.8, 0.7), weight_bits=2)]
  pairs, left_out = figures.pairs(found)
  assert left_out == []
  assert seeds_of(pairs) == [
      {"aqe": [0, 1], "ste": [0]}, {"aqe": [2], "ste": [2]}]
  accuracy, loss, accuracy100, loss100 = figures.comparison_figure(pairs).axes
  assert "training split" in accuracy.get_title()
  assert "validation split" in loss100.get_title()
  np.testing.assert_allclose(drawn(loss)["AQE, mean of 2 seeds"], [[1, 2], [0.8, 0.4]])
  np.testing.assert_allclose(drawn(loss)["STE"], [[1, 2], [1.0, 0.8]])
  np.testing.assert_allclose(drawn(accuracy)["STE"], [[1, 2], [0.5, 0.6]])
  np.testing.assert_allclose(drawn(loss100)["STE"], [[1, 2], [0.8, 0.7]])
  assert "CIFAR-100, W1A1" in accuracy100.get_title()


def seeds_of(pairs):
  return [{name: [run["seed"] for run in group] for name, group in pair.runs.items()}
          for pair in pairs]


def test_all_pairs_are_drawn(tmp_path):
  """For one data set too, all bits, and configs that differ in other fields."""
  found = []
  for changes in (dict(), dict(crop_size=30), dict(weight_bits=3),
                  dict(conv_widths=(8, 8), dense_widths=(4,))):
    folder = tmp_path / str(len(found))
    folder.mkdir()
    found += [curve_run(folder, name, seed, (0.5, 0.4), **changes)
              for name in ("ste", "aqe") for seed in (0, 1)]
  (tmp_path / "float").mkdir()
  found += [curve_run(tmp_path / "float", name, 0, (0.5, 0.4), input_bits="float32",
                      weight_bits="float32") for name in ("ste", "aqe")]
  pairs, left_out = figures.pairs(found)
  assert seeds_of(pairs) == [{"aqe": [0, 1], "ste": [0, 1]}] * 4 and left_out == []
  titles = [axes.get_title() for axes in figures.comparison_figure(pairs).axes]
  assert titles[0] == titles[1] == "ConvNet D\nCIFAR-10, W1A1, validation split"
  assert titles[2::2] == ["ConvNet D\nCIFAR-10, W1A1, crop_size=30, validation split",
                          "ConvNet D\nCIFAR-10, W3A1, validation split",
                          "ConvNet 8-8 + 4\nCIFAR-10, W1A1, validation split"]


def test_runs_that_are_in_no_figure_are_named(tmp_path):
  short = curve_run(tmp_path, "aqe", 1, (0.5, 0.4))
  short["config"]["num_epochs"] = 2
  path = pathlib.Path(short["curve"])
  path.write_text("".join(path.read_text().splitlines(keepends=True)[:2]))
  found = [curve_run(tmp_path, "aqe", 0, (0.5, 0.4)), short,
           curve_run(tmp_path, "ste", 2, (0.3, 0.2)),
           curve_run(tmp_path, "ste", 3, (0.3, 0.2)) | {"curve": None}]
  pairs, left_out = figures.pairs(found)
  assert seeds_of(pairs) == [{"aqe": [0], "ste": [2]}]
  assert left_out == [
      "aqe1.jsonl is not drawn: its curve does not have the 2 validations of its"
      " config",
      "ste3.jsonl is not drawn: it has no curve"]
  pairs, left_out = figures.pairs([found[0], found[3]])
  assert pairs == [] and left_out == [
      "ste3.jsonl is not drawn: it has no curve",
      "aqe0.jsonl is not drawn: no run of STE that matches it has a complete curve"]
  assert figures.pairs(found[:2])[1] == [
      "no runs of AQE and STE differ only in seed and estimator"]


def test_draw(runs, tmp_path):
  found, _ = records.read([str(runs)])
  done, missing = figures.draw(found, str(tmp_path / "a"), "conv2")
  assert len(done) == 5 and missing == []
  files = sorted(path.name for path in (tmp_path / "a").iterdir())
  assert files == [f"fig{i}.png" for i in range(1, 6)]
  for path in (tmp_path / "a").iterdir():
    assert path.read_bytes().startswith(b"\x89PNG")
  done, missing = figures.draw(found[1:], str(tmp_path / "b"), "dense1")
  assert [line.split()[1] for line in missing] == ["1:", "2:", "4:", "5:"]
  assert [path.name for path in (tmp_path / "b").iterdir()] == ["fig3.png"]


# Commands.


@pytest.mark.slow
def test_commands(command, runs, tmp_path):
  copied(runs / "aqe", tmp_path / "half", status=dict(state="running", step=1), seed=9)
  study, out = tmp_path / "study.jsonl", tmp_path / "out"
  both = f"--runs={runs},{tmp_path}"
  outputs = {}
  for arguments in (
      ("collect", both, f"--out={study}"),
      ("tables", f"--runs={study}", f"--out={out}"),
      ("compare", f"--runs={runs}", f"--runs={study}", "--by=estimator",
       f"--out={out}"), ("figures", f"--runs={study}", f"--out={out}")):
    code, outputs[arguments[0]], err = command("minw.report", *arguments)
    assert code == 0, err
  assert "3 added" in outputs["collect"]
  assert "not copied of any run: checkpoints, " in outputs["collect"]
  assert f"left out: {tmp_path / 'half'}: " in outputs["collect"]
  assert "No run belongs to a cell of these tables.\n" in outputs["tables"]
  assert "|" not in outputs["tables"]  # Rows without a run are in the files alone.
  assert (out / "tables.md").read_text().count("| W1A1 |") == 4 + 8 + 2 + 2
  for text in (outputs["tables"], (out / "tables.md").read_text()):
    assert f"- 3 runs, {study}:1 to {study}:3: no table has digits\n" in text
  assert "| last checkpoint | ste | 1 | " in outputs["compare"]
  assert outputs["compare"] == (out / "compare.md").read_text()
  assert sorted(path.name for path in out.iterdir()) == sorted(
      ["tables.md", "compare.md", *(f"table_{n}.csv" for n in paper.CAPTIONS),
       *(f"fig{i}.png" for i in range(1, 6))])


@pytest.mark.slow
def test_commands_refuse_in_one_line(command, tmp_path):
  runs = f"--runs={tmp_path}"
  wrong = {
      (runs,): "a subcommand is missing; known: tables, figures, compare, collect",
      ("table", runs): "subcommand 'table' does not exist; did you mean 'tables'?",
      ("tables",): "--runs",
      ("tables", runs): f"runs='{tmp_path}': must be folders that hold workdirs",
      ("tables", "--runs=none"): "runs='none': must be a folder or a file that exists",
      ("figures", runs): "--out is required",
      ("compare", runs): "--by is required",
      ("collect", runs, "--out=a.json"): "out='a.json': must be a file whose name",
      ("collect", runs, "--out=a.jsonl"): f"runs='{tmp_path}': must be folders that",
      ("results", runs, f"--out={tmp_path}"): "must be a folder with studies",
      ("results", runs, "--out=minw"): "must be a folder in out='minw'",
  }
  for arguments, message in wrong.items():
    code, out, err = command("minw.report", *arguments, folder=ROOT)
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and message in err, err
    assert err.count("\n") == 1
