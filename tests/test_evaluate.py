"""minw.evaluate: every example once, and always the hard network."""

import json
import shutil

import jax
import numpy as np
import pytest

from float64_convnet import cross_entropy
from float64_convnet import network
from float64_convnet import sign
from minw import config as config_lib
from minw import errors
from minw import evaluate
from minw.data import pixels as pixels_lib
from minw.report import records
from minw.workdir import checkpoint
from minw.workdir import run_files
from short_runs import EPOCH
from short_runs import contents
from short_runs import experiment_of
from short_runs import lines_of
from short_runs import run
from short_runs import shared_programs
from short_runs import tiny_config

SPLITS = {"train": 1257, "validation": 180, "test": 360}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
  """The workdir of a run whose evaluation batch, 64, divides none of the splits."""
  workdir = tmp_path_factory.mktemp("evaluate")
  run(tiny_config(), workdir)
  return workdir


@pytest.fixture(scope="module")
def variables(plain):
  """What the run trained."""
  saved = checkpoint.read_run(str(plain)).saved
  return jax.device_get(checkpoint.trained_variables(saved.tree))


def reference(variables, split, alpha=1.0):
  """Logits in float64 NumPy, what batch norms received, and the labels."""
  experiment = experiment_of(tiny_config())
  data = experiment.data.load(split)
  images = np.asarray(pixels_lib.normalize(data.images, experiment.pixels))
  mix = lambda a, _: alpha * sign(a) + (1 - alpha) * a
  logits, received = network(
      variables["params"], images, mix, variables["batch_stats"])
  return logits, received, np.asarray(data.labels)


def measures(logits, labels):
  return {"loss": cross_entropy(logits, labels).mean(),
          "accuracy": np.mean(logits.argmax(-1) == labels)}


def classes(logits, labels):
  """What is measured of each digit."""
  matrix = np.zeros((10, 10), int)
  for label, predicted in zip(labels, logits.argmax(-1)):
    matrix[label, predicted] += 1
  return {"confusion": matrix.tolist(), "class_accuracy": {
      str(i): pytest.approx(matrix[i, i] / (labels == i).sum()) for i in range(10)}}


def without_classes(result):
  """A result without what is measured of each class."""
  return {name: value for name, value in result.items()
          if name not in ("class_accuracy", "confusion")}


@pytest.mark.gpu
@pytest.mark.parametrize("split", SPLITS)
def test_hard_is_the_paper_network(split, variables, plain):
  logits, _, labels = reference(variables, split)
  assert len(labels) == SPLITS[split]
  with shared_programs():
    found = evaluate.evaluate_workdir(str(plain), split)
  expected = measures(logits, labels)
  assert found == {"step": 4 * EPOCH, "accuracy": expected["accuracy"],
                   "loss": pytest.approx(expected["loss"], rel=1e-6),
                   **classes(logits, labels)}


@pytest.mark.gpu
def test_every_image_gets_the_label_of_the_paper_network(variables):
  logits, _, _ = reference(variables, "validation")
  experiment = experiment_of(tiny_config())
  images = pixels_lib.normalize(
      experiment.data.load("validation").images, experiment.pixels)
  found = jax.jit(lambda hard: experiment.model.apply(hard, images, mode="hard"))(
      experiment.fold(variables))
  np.testing.assert_array_equal(np.argmax(found, -1), logits.argmax(-1))
  np.testing.assert_allclose(found, logits, rtol=1e-4, atol=1e-5)


def test_accuracy_of_the_record_is_the_hard_networks(variables, plain):
  logits, _, labels = reference(variables, "validation")
  line = lines_of(plain, split="validation", mode="hard")[-1]
  assert line["accuracy"] == measures(logits, labels)["accuracy"]
  logits, _, labels = reference(variables, "test")
  line = lines_of(plain, split="test", checkpoint="last")[0]
  assert line["accuracy"] == measures(logits, labels)["accuracy"]


@pytest.mark.parametrize("alpha", [0.5, 0.0, 1.0])
def test_mixed_is_the_network_in_training(alpha, variables):
  logits, received, labels = reference(variables, "validation", alpha)
  experiment = experiment_of(tiny_config())
  with shared_programs():
    evaluator = evaluate.Evaluator(experiment)
  data = experiment.data.load("validation")
  found = evaluator.mixed(variables, data, alpha)
  expected = measures(logits, labels)
  assert found["loss"] == pytest.approx(expected["loss"], rel=1e-4)
  assert found["accuracy"] == pytest.approx(expected["accuracy"], abs=0.5 / 180)
  hard = evaluator.hard(variables, data)
  assert (abs(found["loss"] - hard["loss"]) < 1e-5) == (alpha == 1)
  # How far activations are from -1 and 1, before they are quantized.
  assert sorted(found["input_distance"]) == ["norm_conv1", "norm_conv2", "norm_dense1"]
  for name, distance in found["input_distance"].items():
    norm = {**variables["params"][name]["batch_norm"],
            **variables["batch_stats"][name]["batch_norm"]}
    y = ((received[name] - norm["mean"]) / np.sqrt(norm["var"] + np.float64(1e-4))
         * norm["scale"] + norm["bias"])
    y = np.clip(y, -1, 1)
    assert distance == pytest.approx(np.abs(y - sign(y)).mean(), rel=1e-4), name


@pytest.mark.parametrize("count", [1, 63, 64, 65])
def test_splits_of_any_size(count, variables):
  """Whatever the last batch is filled up with."""
  logits, _, labels = reference(variables, "validation")
  experiment = experiment_of(tiny_config())
  data = jax.tree.map(lambda a: a[:count], experiment.data.load("validation"))
  with shared_programs():
    found = evaluate.Evaluator(experiment).hard(variables, data)
  expected = measures(logits[:count], labels[:count])
  assert found["accuracy"] == expected["accuracy"]
  assert found["loss"] == pytest.approx(expected["loss"], rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 7, 60, 180, 1000])
def test_batches_of_any_size(size, variables):
  logits, _, labels = reference(variables, "validation")
  experiment = experiment_of(tiny_config(eval_batch_size=size))
  found = evaluate.Evaluator(experiment).hard(
      variables, experiment.data.load("validation"))
  expected = measures(logits, labels)
  assert found["accuracy"] == expected["accuracy"]
  assert found["loss"] == pytest.approx(expected["loss"], rel=1e-6)


def test_ties_go_to_the_lowest_label():
  """As in NumPy and in the packed network."""
  experiment = experiment_of(tiny_config())
  shapes = jax.eval_shape(lambda: experiment.model.init(
      {"params": jax.random.key(0), "estimator": jax.random.key(0)},
      np.zeros((1, *experiment.image_shape), np.float32), mode="train"))
  zeros = jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), shapes)
  with shared_programs():
    data = experiment.data.load("validation")
    found = evaluate.Evaluator(experiment).hard(zeros, data)
  labels = np.asarray(data.labels)
  assert found == {"accuracy": np.mean(labels == 0),
                   "loss": pytest.approx(np.log(10), rel=1e-6)}


@pytest.mark.parametrize("which", ["last", "best"])
def test_same_numbers_again(which, plain, tmp_path):
  """With programs of this process, and in another that calls the command."""
  line, = lines_of(plain, split="test", checkpoint=which)
  expected = {"step": line["checkpoint_step"], "loss": line["loss"],
              "accuracy": line["accuracy"]}
  with shared_programs():
    found = evaluate.evaluate_workdir(str(plain), which=which)
  assert without_classes(found) == expected
  line, = lines_of(plain, split="validation", mode="hard", step=line["checkpoint_step"])
  with shared_programs():
    found = evaluate.evaluate_workdir(str(plain), "validation", which)
  assert without_classes(found) == {
      name: line[name] for name in ("step", "loss", "accuracy")}


def test_command(command, plain, tmp_path):
  workdir = tmp_path / "moved"
  shutil.copytree(plain, workdir)
  # The best is another than the last.
  folder = workdir / "checkpoints" / str(4 * EPOCH)
  other = min(int(path.name) for path in folder.parent.iterdir())
  with checkpoint.open_manager(str(workdir), read_only=True) as manager:
    tree = checkpoint.restore(manager, other).tree
  shutil.rmtree(folder.parent)
  with checkpoint.open_manager(str(workdir)) as manager:
    checkpoint.save(manager, other, tree, 0.9)
    checkpoint.save(manager, 4 * EPOCH, tree, 0.8)
  before = contents(workdir)
  done = command("minw.evaluate", f"--workdir={workdir}", "--split=validation",
                 "--checkpoint=best", f"--confusion={tmp_path}/classes.json")
  assert done.code == 0, done.err
  line, = lines_of(plain, split="validation", mode="hard", step=other)
  printed = json.loads(done.out)
  assert without_classes(printed) == {
      "split": "validation", "mode": "hard", "step": other, "loss": line["loss"],
      "accuracy": line["accuracy"]}
  written = json.loads((tmp_path / "classes.json").read_text())
  matrix = np.array(written.pop("confusion"))
  assert written == printed and matrix.sum() == 180
  assert np.trace(matrix) == round(180 * line["accuracy"])
  assert (tmp_path / "classes.png").read_bytes().startswith(b"\x89PNG")
  assert "damaged" not in done.err
  assert contents(workdir) == before


@pytest.mark.slow
def test_command_by_default(command, plain):
  done = command("minw.evaluate", f"--workdir={plain}")
  assert done.code == 0, done.err
  line, = lines_of(plain, split="test", checkpoint="last")
  assert without_classes(json.loads(done.out)) == {
      "split": "test", "mode": "hard", "step": line["step"], "loss": line["loss"],
      "accuracy": line["accuracy"]}


def test_no_run_and_no_checkpoint(tmp_path):
  with pytest.raises(errors.UsageError, match="the workdir of a run"):
    evaluate.evaluate_workdir(str(tmp_path))
  run_files.claim(str(tmp_path), tiny_config())
  for _ in range(2):
    with pytest.raises(errors.UsageError, match="a run that has a checkpoint"):
      evaluate.evaluate_workdir(str(tmp_path))
    (tmp_path / "checkpoints").mkdir(exist_ok=True)


def test_unknown_split(plain):
  with pytest.raises(errors.UsageError, match="did you mean 'validation'"):
    evaluate.evaluate_workdir(str(plain), "valdation")


def test_reading_a_run_changes_nothing(plain):
  before = contents(plain)
  config, saved, _ = checkpoint.read_run(str(plain), "best")
  assert config_lib.to_json(config) == config_lib.to_json(tiny_config())
  assert saved.step == json.loads((plain / "status.json").read_text())["best_step"]
  assert contents(plain) == before


@pytest.mark.parametrize("read", [evaluate.evaluate_workdir, records.record])
def test_done_without_its_final_lines_is_refused(read, plain, tmp_path):
  workdir = tmp_path / "run"
  shutil.copytree(plain, workdir)
  path = workdir / "metrics.jsonl"
  lines = path.read_text().splitlines(keepends=True)
  path.write_text("".join(line for line in lines if '"split": "test"' not in line))
  with pytest.raises(errors.UsageError) as error:
    read(str(workdir))
  assert str(error.value).startswith(
      f"workdir='{workdir}': must be that of a run whose record is complete, but"
      " metrics.jsonl has 0 lines of the test split for the last checkpoint instead of"
      " 1")
