"""What runs record for minw.report: run.json, histograms and lines; the commands."""

import hashlib
import json
import pathlib
import shutil
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minw import config as config_lib
from minw import errors
from minw import evaluate
from minw import histograms
from minw.experiment import Experiment
from minw.report import figures
from minw.report import paper
from minw.report import records
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


def test_journal_between_notes(tmp_path, monkeypatch):
  """A checkpoint knows the time that has passed since the file was written."""
  now = [100.0]
  monkeypatch.setattr(environment.time, "monotonic", lambda: now[0])
  journal = environment.Journal(str(tmp_path))
  seconds = []
  for moment in (104.0, 109.9, 110.0, 119.0):
    now[0] = moment
    journal.note(every=10.0)
    seconds.append(environment.read(str(tmp_path))["seconds"])
  assert seconds == [0.0, 0.0, 10.0, 10.0]
  saved = journal.content
  now[0] = 300.0  # Killed at once, and resumed from a checkpoint.
  assert environment.Journal(str(tmp_path), saved=saved).content["seconds"] == 19.0
  now[0] = 306.0  # Killed again, before another checkpoint.
  journal = environment.Journal(str(tmp_path), saved=saved)
  assert journal.content["seconds"] == 19.0


def test_commit_of_an_installed_package(monkeypatch, tmp_path):
  """Without git, a digest says whether two installations have the same code."""
  def none(*_, **__):
    raise FileNotFoundError("git")

  package = tmp_path / "minw"
  (package / "csrc").mkdir(parents=True)
  for name, content in (("__init__.py", b"x = 1\n"), ("csrc/a.cc", b"int a;"),
                        ("notes.txt", b"no code"), ("minw.wasm", b"built")):
    (package / name).write_bytes(content)
  monkeypatch.setattr(environment.subprocess, "run", none)
  monkeypatch.setattr(environment.minw, "__file__", str(package / "__init__.py"))
  code = b"__init__.py 6\nx = 1\ncsrc/a.cc 6\nint a;"
  assert environment.commit.__wrapped__() == (
      f"minw {environment.minw.__version__} {hashlib.sha256(code).hexdigest()[:40]}")


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


@pytest.mark.parametrize("arguments", [
    ("tables",), ("compare", "--by=estimator"), ("figures",)], ids=lambda a: a[0])
def test_a_folder_that_cannot_be_written_is_refused(arguments, command, runs, tmp_path):
  (tmp_path / "out").write_text("a file")
  code, _, err = command("minw.report", *arguments, f"--runs={runs}",
                         f"--out={tmp_path}/out")
  assert (code, err.count("\n")) == (2, 1)
  assert err.startswith(f"error: out='{tmp_path}/out' cannot be written: ")


def test_tables_are_printed_alone_without_a_folder(command, runs):
  code, out, err = command("minw.report", "tables", f"--runs={runs}")
  assert (code, err) == (0, "")
  assert out.endswith("--out=DIR writes all rows, also those without a run.\n")


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
