"""The same run on four devices as on one.

XLA makes four of one CPU, in a process of their own; what they found is compared here.
Sums over a batch are made in another order there, so gradients differ in their last
bits: the tolerance is 1e-5 of a tensor's largest gradient.
"""

import os
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

from minw import config as config_lib
from minw import evaluate
from minw.data import resident
from minw.workdir import checkpoint
from short_runs import EPOCH
from short_runs import ROOT
from short_runs import Stop
from short_runs import busy_config
from short_runs import experiment_of
from short_runs import lines_of
from short_runs import run
from short_runs import run_with
from short_runs import shared_programs
from short_runs import tiny_config
from short_runs import trees_of

pytestmark = pytest.mark.slow

CONFIG = busy_config()
STEPS = (0, 5, 30)

# Run with a config and a folder.
FOUND = '''
import os, signal, sys
import jax, numpy as np
from minw import config as config_lib, errors, evaluate, train, train_step
from minw.experiment import Experiment

config, folder = config_lib.from_json(sys.argv[1]), sys.argv[2]
devices, found = 4, {}
assert len(jax.devices()) == devices

def whole(tree):
  "Each device has all of it, and the same."
  for leaf in jax.tree.leaves(tree):
    assert leaf.sharding.is_fully_replicated and len(leaf.devices()) == devices
    first, *others = (
        np.asarray(part.data).tobytes() for part in leaf.addressable_shards)
    assert len(others) == devices - 1 and all(other == first for other in others)

# A batch, as the step makes it.
experiment = Experiment(config)
data = experiment.data.load("train")
whole(data)
batch = jax.jit(lambda order, step: experiment.data.train_inputs(
    data, order, step % experiment.steps_per_epoch,
    jax.random.fold_in(jax.random.key(5), step)))
for step in (0, 5, 30):
  _, order = next(experiment.data.train_batches(data, step))
  images, labels = batch(order, step)
  assert len(images.sharding.device_set) == devices
  assert images.addressable_shards[0].data.shape[0] == config.batch_size // devices
  found[f"images{step}"], found[f"labels{step}"] = images, labels

# A run that ends before its step 30, and what it made its programs of.
steps, programs, evaluators = [], [], []
make_train_step, Evaluator = train_step.make_train_step, evaluate.Evaluator

def make(experiment):
  train_step = make_train_step(experiment)
  programs.append(train_step)
  def call(state, *arguments):
    whole(state)
    if len(steps) == 1:
      found.update({f"gradient{jax.tree_util.keystr(path)}": leaf / 0.1 for path, leaf
                    in jax.tree_util.tree_leaves_with_path(state.opt_state[0].mu)})
      found["loss"] = np.asarray(state.totals.loss)
    steps.append(int(state.step))
    if steps[-1] == 30:
      os.kill(os.getpid(), signal.SIGTERM)
    return train_step(state, *arguments)
  return call

def make_evaluator(experiment):
  evaluators.append(Evaluator(experiment))
  return evaluators[-1]

train_step.make_train_step, evaluate.Evaluator = make, make_evaluator
status = train.train_and_evaluate(config, f"{folder}/run")
assert status == {"state": "preempted", "step": 31}, status
assert [program._cache_size() for program in programs] == [1]
assert [evaluator._step._cache_size() for evaluator in evaluators] == [2]  # Two modes.

# A batch is cut in equal parts.
for field in ("batch_size", "eval_batch_size"):
  try:
    Experiment(config_lib.copy(config, **{field: 63}))
  except errors.UsageError as error:
    assert f"config.{field}=63: must be a multiple of 4" in str(error), error
  else:
    raise AssertionError(field)
np.savez(f"{folder}/found.npz", **found)
'''


def run_on_four(code, config, folder):
  done = subprocess.run(
      [sys.executable, "-c", code, config_lib.to_json(config), str(folder)],
      text=True, capture_output=True, timeout=600, env={
          **os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu",
          "JAX_NUM_CPU_DEVICES": "4"})
  assert done.returncode == 0, done.stderr[-5000:]


@pytest.fixture(scope="module")
def four(tmp_path_factory):
  """The folder that four devices filled."""
  folder = tmp_path_factory.mktemp("spmd")
  run_on_four(FOUND, CONFIG, folder)
  return folder


def test_batches_are_the_same(four):
  found = np.load(four / "found.npz")
  experiment = experiment_of(CONFIG)
  data = experiment.data.load("train")
  batch = jax.jit(lambda step: experiment.data.train_inputs(
      data, resident.epoch_order(0, step // EPOCH, 1257), step % EPOCH,
      jax.random.fold_in(jax.random.key(5), step)))
  for step in STEPS:
    images, labels = batch(step)
    np.testing.assert_array_equal(found[f"images{step}"], images)
    np.testing.assert_array_equal(found[f"labels{step}"], labels)


def test_first_gradient_is_the_same(four, tmp_path):
  found, ours = np.load(four / "found.npz"), {}

  def action(step, state):
    if step == 1:
      ours["loss"] = np.asarray(state.totals.loss)
      ours.update({
          f"gradient{jax.tree_util.keystr(path)}": np.asarray(leaf) / np.float32(0.1)
          for path, leaf in jax.tree_util.tree_leaves_with_path(state.opt_state[0].mu)})
      raise Stop

  with pytest.raises(Stop):
    run_with(action, CONFIG, tmp_path)
  assert len(ours) == 13  # Kernels, scales and biases of four layers.
  assert sorted(ours) == [name for name in sorted(found.files)
                          if name.startswith(("gradient", "loss"))]
  for name, value in ours.items():
    np.testing.assert_allclose(
        found[name], value, rtol=0, atol=1e-5 * np.abs(value).max(), err_msg=name)


def test_evaluation_is_the_same(four):
  experiment = experiment_of(CONFIG)
  with checkpoint.open_manager(str(four / "run"), read_only=True) as manager:
    tree = checkpoint.restore(manager, EPOCH).tree
  with shared_programs():
    evaluator = evaluate.Evaluator(experiment)
  data = experiment.data.load("validation")
  hard = evaluator.hard(checkpoint.hard_variables(tree), data)
  mixed = evaluator.mixed(
      checkpoint.trained_variables(tree), data, experiment.alpha(EPOCH - 1))
  distances = mixed.pop("input_distance")
  for mode, ours in (("hard", hard), ("mixed", mixed)):
    theirs, = lines_of(four / "run", split="validation", mode=mode)
    assert ours["accuracy"] == theirs["accuracy"]
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-6)
  assert distances == pytest.approx(theirs["input_distance"], rel=1e-6)


def test_one_device_goes_on(four, tmp_path):
  workdir = tmp_path / "run"
  shutil.copytree(four / "run", workdir)
  saved = trees_of(workdir)
  assert sorted(saved) == [EPOCH, 31]
  before, begun = lines_of(workdir), {}

  def action(step, state):
    begun[step] = None
    if step == 31:
      paths = jax.tree_util.tree_leaves_with_path(state._asdict())
      begun[step] = {jax.tree_util.keystr(path, simple=True, separator="/"):
                     np.asarray(leaf).tobytes() for path, leaf in paths}

  status = run_with(action, CONFIG, workdir)
  assert list(begun) == list(range(31, 4 * EPOCH))
  for path, content in begun[31].items():
    assert saved[31][path][2] == content, path
  assert status["state"] == "done"
  assert lines_of(workdir)[:3] == before
  # As if on one device all along, as far as rounding leaves runs alike.
  run(CONFIG, tmp_path / "one")
  pairs = zip(lines_of(workdir, split="train"),
              lines_of(tmp_path / "one", split="train"))
  for ours, theirs in pairs:
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=0.05)
  assert [line["step"] for line in lines_of(workdir, mode="hard")] == [
      19, 38, 57, 76, 76, 76]


# The optimizer's state in parts.

SHARDED = '''
import os, signal, sys
import jax, numpy as np
from minw import config as config_lib, train, train_step
from minw.experiment import Experiment

config, folder = config_lib.from_json(sys.argv[1]), sys.argv[2]
found = {}
for name, shard in (("whole", False), ("parts", True)):
  experiment = Experiment(config_lib.copy(config, shard_optimizer=shard))
  state = train_step.make_init_state(experiment)()
  step = train_step.make_train_step(experiment)
  batches = experiment.data.train_batches(experiment.data.load("train"), 0)
  for _ in range(5):
    state, _ = step(state, *next(batches))
  assert step._cache_size() == 1
  program = step.lower(state, *next(batches)).compile().as_text()
  found[f"gathers {name}"] = program.count(" all-gather(")
  for path, leaf in jax.tree_util.tree_leaves_with_path(state):
    found[f"{name}{jax.tree_util.keystr(path)}"] = np.asarray(leaf)
    found[f"bytes {name}{jax.tree_util.keystr(path)}"] = [
        part.data.nbytes for part in leaf.addressable_shards]

# Whole to parts to whole.
make = train_step.make_train_step
def make_train_step(experiment):
  train_step = make(experiment)
  def call(state, *batch):
    if int(state.step) in stops:
      os.kill(os.getpid(), signal.SIGTERM)
    return train_step(state, *batch)
  return call
train_step.make_train_step = make_train_step
for shard, stops, step in ((False, [5], 6), (True, [20], 21), (False, [], 38)):
  status = train.train_and_evaluate(
      config_lib.copy(config, shard_optimizer=shard), f"{folder}/run")
  assert status["step"] == step, status
np.savez(f"{folder}/found.npz", **found)
'''


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
  """The folder that four devices filled, with parts of the optimizer's state each."""
  folder = tmp_path_factory.mktemp("sharded")
  run_on_four(SHARDED, tiny_config(num_epochs=2), folder)
  return folder


def test_parts_are_a_quarter(sharded):
  found = np.load(sharded / "found.npz")
  parts = 0
  for name in found.files:
    if name.startswith("bytes "):
      array = found[name.removeprefix("bytes ")]
      part = (name.startswith("bytes parts.opt_state") and array.ndim > 1
              and any(size % 4 == 0 for size in array.shape))
      assert found[name].tolist() == 4 * [array.nbytes // (4 if part else 1)], name
      parts += part
  assert parts == 2 * 4  # Adam keeps two numbers of each; there are four kernels.


def test_parts_train_as_the_whole(sharded):
  found = np.load(sharded / "found.npz")
  for name in found.files:
    if name.startswith("parts."):
      whole = found["whole" + name.removeprefix("parts")]
      np.testing.assert_allclose(
          found[name], whole, rtol=0, atol=1e-5 * np.abs(whole).max(), err_msg=name)


def test_only_new_kernels_are_gathered(sharded):
  found = np.load(sharded / "found.npz")
  assert (found["gathers whole"], found["gathers parts"]) == (0, 4)


def test_parts_and_whole_go_on_with_each_other(sharded, tmp_path):
  run(tiny_config(num_epochs=2), tmp_path)
  for ours, theirs in zip(lines_of(sharded / "run"), lines_of(tmp_path), strict=True):
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=0.05)


# Run with 256 virtual devices. It prints the number of devices, the examples of each in
# the largest array of a convolution, batch norm's sums over all devices, and what it
# took in seconds of processors and GiB.
AT_SCALE = '''
import re, resource
import jax
from minw import config as config_lib, train_step
from minw.experiment import Experiment

config = config_lib.default_config("imagenet2012")
config.update(batch_size=32 * 256, eval_batch_size=256)
experiment = Experiment(config)
step = train_step.make_train_step(experiment).lower(
    train_step.abstract_state(experiment), *experiment.data.abstract_batch())
text = step.compile().as_text()
examples = {int(found) for found in re.findall(r"f32\\[(\\d+),112,112,64\\]", text)}
everywhere = len(re.findall(
    r"all-reduce(?:-start)?\\(.*replica_groups=\\S*256\\b.*batch_norm", text))
used = resource.getrusage(resource.RUSAGE_SELF)
print(len(jax.devices()), max(examples), everywhere, used.ru_utime + used.ru_stime,
      used.ru_maxrss / 2**20)
'''


def test_a_step_on_256_devices_compiles_quickly():
  """That of ResNet-18 on ImageNet, with 32 images on each device."""
  done = subprocess.run(
      [sys.executable, "-c", AT_SCALE], text=True, capture_output=True,
      env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu",
           "JAX_ENABLE_COMPILATION_CACHE": "false",
           "XLA_FLAGS": "--xla_force_host_platform_device_count=256"})
  assert done.returncode == 0, done.stderr
  devices, examples, everywhere, seconds, gibibytes = map(float, done.stdout.split())
  assert (devices, examples) == (256, 32)
  # Batch norm has 21 layers, whose sums of a batch are those of all devices.
  assert everywhere >= 21
  assert seconds < 120 and gibibytes < 4
