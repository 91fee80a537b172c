"""minw.train: the step, the loop, what a run leaves behind, and how it can end."""

import contextlib
import errno
import fcntl
import functools
import itertools
import json
import re
import resource
import runpy
import shutil
import time
import zlib

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import pytest

from float64_convnet import cross_entropy
from float64_convnet import network
from float64_convnet import sign
from minw import config as config_lib
from minw import errors
from minw import infer
from minw import pack
from minw import packed
from minw import progress
from minw import train
from minw import train_step
from minw import verify
from minw.data import augment
from minw.data import datasets
from minw.data import pixels as pixels_lib
from minw.data import resident
from minw.experiment import Experiment
from minw.workdir import checkpoint
from minw.workdir import locks
from minw.workdir import run_files
from resource_limits import limited
from short_runs import EPOCH
from short_runs import ROOT
from short_runs import Stop
from short_runs import busy_config
from short_runs import contents
from short_runs import ended
from short_runs import events_of
from short_runs import experiment_of
from short_runs import forget_experiments
from short_runs import fresh_state
from short_runs import lines_of
from short_runs import outcome
from short_runs import programs
from short_runs import run
from short_runs import run_with
from short_runs import shared_programs
from short_runs import start
from short_runs import stop_before
from short_runs import tiny_config
from short_runs import trees_of


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
  """A run of four epochs; its workdir."""
  workdir = tmp_path_factory.mktemp("train") / "made" / "by it"
  status = run(tiny_config(), workdir, draw=True)
  assert status == json.loads((workdir / "status.json").read_text())
  return workdir


def test_workdir_is_complete(plain):
  config = json.loads((plain / "config.json").read_text())
  fields = json.loads(config_lib.to_json(tiny_config()))
  crc32 = zlib.crc32(json.dumps(fields, sort_keys=True).encode())
  assert config == {**fields, "crc32": crc32}
  last, best = lines_of(plain, split="test")
  assert json.loads((plain / "status.json").read_text()) == {
      "state": "done", "step": 4 * EPOCH,
      "test_accuracy": last["accuracy"], "test_loss": last["loss"],
      "best_step": best["checkpoint_step"],
      "best_test_accuracy": best["accuracy"], "best_test_loss": best["loss"]}
  assert (plain / "curves.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
  assert sorted(path.name for path in plain.iterdir()) == [
      "checkpoints", "config.json", "confusion.json", "confusion.png", "curves.png",
      "lock", "metrics.jsonl", "run.json", "status.json", "tensorboard"]


def test_confusion_matrix_is_of_the_last_checkpoint(plain):
  found = json.loads((plain / "confusion.json").read_text())
  last = lines_of(plain, split="test", checkpoint="last")[0]
  assert {name: found[name] for name in ("split", "mode", "step", "loss", "accuracy")
          } == {name: last[name] for name in ("split", "mode", "step", "loss",
                                              "accuracy")}
  matrix = np.array(found["confusion"])
  _, labels = datasets.load("digits", "test", None)
  np.testing.assert_array_equal(matrix.sum(1), np.bincount(labels))
  assert np.trace(matrix) == round(360 * last["accuracy"])
  assert list(found["class_accuracy"].values()) == pytest.approx(
      np.diag(matrix) / matrix.sum(1))
  assert (plain / "confusion.png").read_bytes().startswith(b"\x89PNG")


def test_lines(plain):
  text = (plain / "metrics.jsonl").read_text()
  assert text.endswith("\n")
  raw = [json.loads(line) for line in text.splitlines()]
  kinds = [(line["step"], line["epoch"], line["split"], line["mode"]) for line in raw]
  assert kinds == [
      (EPOCH * epoch, epoch, *kind) for epoch in range(1, 5)
      for kind in (("train", "mixed"), ("validation", "mixed"), ("validation", "hard"))
  ] + 2 * [(4 * EPOCH, 4, "test", "hard")]
  for line in raw:
    assert 0 < line["loss"] < 10 and 0 <= line["accuracy"] <= 1
    count = {"train": 64 * EPOCH, "validation": 180, "test": 360}[line["split"]]
    right = line["accuracy"] * count
    assert right == pytest.approx(round(right), abs=1e-3)
  for line in raw:
    if line["split"] == "train":
      step = line["step"] - 1  # The last one that was made.
      alpha = min(1.0, 0.5 + 0.5 * step / (0.465 * 4 * EPOCH))
      assert line["alpha"] == pytest.approx(alpha, rel=1e-6)
      stairs = step // (4 * EPOCH / 35)
      assert line["learning_rate"] == pytest.approx(0.01 * 0.9 ** stairs, rel=1e-5)
      assert line["examples_per_second"] > 0
  assert raw[-1]["accuracy"] > 0.65  # It does learn: chance is 0.1.
  assert [line["checkpoint"] for line in raw[-2:]] == ["last", "best"]
  assert raw[-2]["checkpoint_step"] == 4 * EPOCH


def test_train_line_is_the_mean_over_the_epoch(tmp_path):
  losses, correct = [], []

  def make_train_step(experiment):
    step = programs["make_train_step"](experiment)

    def spy(state, data, order):
      if int(state.totals.count) == 0 and losses:
        losses.append([])
      elif not losses:
        losses.append([])
      state, loss = step(state, data, order)
      losses[-1].append(float(loss))
      correct.append(float(state.totals.correct))
      return state, loss

    return spy

  with shared_programs() as patch:
    patch.setattr(train_step, "make_train_step", make_train_step)
    train.train_and_evaluate(tiny_config(), str(tmp_path))
  assert [len(epoch) for epoch in losses] == 4 * [EPOCH]
  for line, epoch, right in zip(
      lines_of(tmp_path, split="train"), losses, correct[EPOCH - 1::EPOCH]):
    assert line["loss"] == pytest.approx(np.mean(epoch), rel=1e-5)
    assert line["accuracy"] == pytest.approx(right / (64 * EPOCH), rel=1e-6)


def test_tensorboard_shows_the_lines(plain):
  expected = {}
  for line in lines_of(plain):
    curve = {"train/mixed": "/train", "validation/hard": "/validation",
             "validation/mixed": "/validation_mixed", "test/hard": None}[
                 f"{line['split']}/{line['mode']}"]
    for name, value in line.items() if curve else ():
      parts = value if isinstance(value, dict) else {"": value}
      for part, number in parts.items():
        if isinstance(number, (int, float)) and name not in ("step", "epoch"):
          tag = name + (curve if name in ("loss",
                                          "accuracy") else f"/{part}" * bool(part))
          expected[tag, line["step"]] = number
  shown = events_of(plain)
  numbers = {key: value for key, value in shown.items() if isinstance(value, float)}
  assert numbers.keys() == expected.keys()
  for key, number in expected.items():
    assert numbers[key] == np.float32(number), key
  # No chart has a single point.
  assert all(sum(tag == other for other, _ in numbers) == 4 for tag, _ in numbers)
  texts = {tag: value.decode() for (tag, _), value in shown.items()
           if isinstance(value, bytes) and "custom_scalars" not in tag}
  last, best = lines_of(plain, split="test")
  assert texts.keys() == {f"{name}/text_summary" for name in (
      "config", "test/last", "test/best")}
  assert f'"accuracy": {last["accuracy"]}' in texts["test/last/text_summary"]
  assert f'"checkpoint_step": {best["checkpoint_step"]}' in texts[
      "test/best/text_summary"]
  assert '"dataset": "digits"' in texts["config/text_summary"]


def test_flips_and_distances(plain, tmp_path):
  before, after = {}, {}

  def action(step, state):
    kept = jax.device_get(state.params)
    (before if step == EPOCH - 1 else after)[step] = kept
    if step == EPOCH:
      raise Stop

  with pytest.raises(Stop):
    run_with(action, tiny_config(), tmp_path)
  line, = lines_of(plain, split="train", epoch=1)
  for name in ("conv1", "conv2", "dense1", "dense2"):
    old, new = (np.float64(p[name]["kernel"])
                for p in (before[EPOCH - 1], after[EPOCH]))
    flips = np.mean(sign(old) != sign(new))
    assert line["flip_rate"][name] == pytest.approx(flips, rel=1e-6)
    distance = np.abs(new - sign(new)).mean()
    assert line["weight_distance"][name] == pytest.approx(distance, rel=1e-5)
  assert any(line["flip_rate"].values())


def test_mixed_and_hard_agree_at_alpha_one_only(plain):
  pairs = zip(lines_of(plain, split="validation", mode="mixed"),
              lines_of(plain, split="validation", mode="hard"))
  differences = [abs(mixed["loss"] - hard["loss"]) for mixed, hard in pairs]
  alphas = [line["alpha"] for line in lines_of(plain, split="train")]
  assert alphas[0] < 0.8 and alphas[1:] == [1.0, 1.0, 1.0]
  assert differences[0] > 0.01
  assert max(differences[1:]) < 1e-5


@pytest.mark.gpu
def test_same_seed_same_bits(plain, tmp_path, monkeypatch):
  # With a look at the device after every step, which must not matter.
  monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
  run(tiny_config(), tmp_path)
  assert outcome(tmp_path) == outcome(plain)


@pytest.mark.gpu
@pytest.mark.slow
def test_same_seed_same_bits_compiled_anew(plain, tmp_path):
  code, _, err = ended(start(
      tiny_config(), tmp_path / "run", JAX_ENABLE_COMPILATION_CACHE="false"))
  assert code == 0, err
  assert outcome(tmp_path / "run") == outcome(plain)


@pytest.mark.slow
def test_other_seed_other_numbers(plain, tmp_path):
  run(tiny_config(seed=1), tmp_path)
  ours, theirs = lines_of(tmp_path), lines_of(plain)
  for a, b in zip(ours, theirs, strict=True):
    assert a["loss"] != b["loss"]


@pytest.mark.slow
def test_seed_reaches_initialization_order_and_noise():
  seen = {}
  for seed in (0, 1):
    experiment = experiment_of(tiny_config(seed=seed))
    state = fresh_state(seed)
    data = experiment.data.load("train")
    order, following = (next(experiment.data.train_batches(data, step))[1].tolist()
                        for step in (EPOCH - 1, EPOCH))
    assert sorted(order) == list(range(1257))
    seen[seed] = {"order": order, "next": following,
                  **{name: state.params[name]["kernel"].tolist()
                     for name in ("conv1", "conv2", "dense1", "dense2")}}
  for name in seen[0]:
    assert seen[0][name] != seen[1][name], name
  assert seen[0]["order"] != seen[0]["next"]


@pytest.mark.parametrize("poisoned, kept", [(5, []), (EPOCH + 3, [EPOCH]),
                                            (4 * EPOCH - 1, [2 * EPOCH, 3 * EPOCH])])
def test_not_finite_ends_as_diverged(poisoned, kept, plain, tmp_path):
  def action(step, state):
    if step == poisoned:
      return state._replace(params=jax.tree.map(lambda p: p * jnp.nan, state.params))

  expected = {"state": "diverged", "step": poisoned}
  assert run_with(action, tiny_config(), tmp_path) == expected
  assert json.loads((tmp_path / "status.json").read_text()) == expected
  trees = trees_of(tmp_path)
  best = json.loads((plain / "status.json").read_text())["best_step"]
  assert [step for step in trees if step in kept or step != best] == kept
  complete = lines_of(plain)
  assert lines_of(tmp_path) == [
      line for line in complete if line["step"] <= poisoned and line["split"] != "test"]
  # The same command again leaves it at that.
  before = contents(tmp_path)
  assert run_with(stop_before(0), tiny_config(), tmp_path) == expected
  assert contents(tmp_path) == before


def test_divergence_is_found_between_reports(tmp_path, monkeypatch):
  monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
  made = []

  def action(step, state):
    made.append(step)
    if step == 3:
      return state._replace(params=jax.tree.map(lambda p: p * jnp.inf, state.params))

  status = run_with(action, tiny_config(), tmp_path)
  assert status == {"state": "diverged", "step": 3}
  assert made == [0, 1, 2, 3]


def test_finished_run_is_left_alone(plain, caplog):
  before = contents(plain)
  status = run_with(stop_before(0), tiny_config(), plain)
  assert status["state"] == "done"
  assert contents(plain) == before
  assert "already done" in caplog.text


def test_workdir_of_another_config_is_refused(plain):
  before = contents(plain)
  changes = {"learning_rate": 0.02, "conv_widths": (8, 16)}
  with pytest.raises(errors.UsageError) as error:
    run_with(stop_before(0), tiny_config(**changes), plain)
  assert "learning_rate: 0.01, 0.02" in str(error.value)
  assert "conv_widths: (8, 8), (8, 16)" in str(error.value)
  assert "seed" not in str(error.value) and "\n" not in str(error.value)
  assert contents(plain) == before


def test_workdir_that_can_not_be_written(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(errors.UsageError, match="cannot be written to"):
    run(tiny_config(), tmp_path / "file" / "run")


def test_workdir_in_use_is_refused(plain, tmp_path):
  shutil.copytree(plain, tmp_path / "run")
  status = tmp_path / "run" / "status.json"
  status.write_text('{"state": "running", "step": 19}')
  before = contents(tmp_path)
  with locks.take(str(tmp_path / "run")):
    assert run_files.read_status(str(tmp_path / "run"))["state"] == "running"
    with pytest.raises(errors.UsageError) as error:
      run_with(stop_before(0), tiny_config(), tmp_path / "run")
    assert str(error.value) == (
        f"workdir='{tmp_path}/run' is in use: another process is training there")
    assert contents(tmp_path) == before
  assert run_files.read_status(str(tmp_path / "run")) == {
      "state": "stopped", "step": 19}


def test_workdir_is_given_back_however_a_run_ends(tmp_path):
  for _ in range(2):
    with pytest.raises(Stop):
      run_with(stop_before(1), tiny_config(), tmp_path)
    assert not locks.is_held(str(tmp_path))
  for _ in range(2):
    assert run(tiny_config(), tmp_path)["state"] == "done"
    assert not locks.is_held(str(tmp_path))


def test_without_locks_a_run_is_warned(tmp_path, monkeypatch, caplog):
  def flock(*_):
    raise OSError(errno.ENOLCK, "No locks available")

  monkeypatch.setattr(fcntl, "flock", flock)
  assert run(tiny_config(), tmp_path)["state"] == "done"
  assert "this file system has no locks (No locks available)" in caplog.text


def test_more_epochs_are_another_run(plain):
  with pytest.raises(errors.UsageError) as error:
    run_with(stop_before(0), tiny_config(num_epochs=8), plain)
  assert "num_epochs: 4, 8. Give this run another --workdir" in str(error.value)
  assert f"--config.init_from={plain} it starts from" in str(error.value)


# Files that cannot be written.

TENSORSTORE = (
    'RESOURCE_EXHAUSTED: Error writing "a/0" in OCDBT database at local file "/x/":'
    " Failed to write 4 bytes to file 4: No space left on device"
    " [os_error_code=\'28\']")


@pytest.mark.parametrize("error, file, reason", [
    (OSError(errno.ENOSPC, "No space left on device", "/a/file"), "/a/file",
     r"No space left on device \(0\.0 MB a checkpoint are needed, [\d.]+ MB are"
     r" free\)"),
    (OSError(errno.EROFS, "Read-only file system"), "{workdir}",
     "Read-only file system"),
    (ValueError(TENSORSTORE), "{workdir}/checkpoints", r"No space left on device \(.*"),
])
def test_error_of_a_file_stops_a_run(error, file, reason, tmp_path):
  def action(step, _):
    if step == 3:
      raise error

  with pytest.raises(train.StorageError) as stopped:
    run_with(action, tiny_config(), tmp_path)
  assert re.fullmatch(
      re.escape(file.format(workdir=tmp_path)) + f": {reason}; the run is stopped, and"
      " the same command resumes it from its last checkpoint", str(stopped.value))
  assert stopped.value.exit_code == 74
  assert json.loads((tmp_path / "status.json").read_text()) == {
      "state": "stopped", "step": 0}


@pytest.mark.parametrize("error", [
    ConnectionResetError(errno.ECONNRESET, "Connection reset"), OSError("no number"),
    ValueError("28")])
def test_other_errors_stay_what_they_are(error, tmp_path):
  def action(step, _):
    raise error

  with pytest.raises(type(error)) as raised:
    run_with(action, tiny_config(), tmp_path)
  assert raised.value is error


def test_cut_line_of_metrics_is_written_again(plain, tmp_path):
  path = tmp_path / "metrics.jsonl"
  with contextlib.ExitStack() as stack:

    def action(step, _):
      if step == EPOCH + 3:
        while list((tmp_path / "checkpoints").glob("*tmp")):
          time.sleep(0.01)
        # As on a full disk, what fits is written, and the rest fails.
        size = path.stat().st_size + 100
        stack.enter_context(limited(resource.RLIMIT_FSIZE, size))

    with pytest.raises(train.StorageError, match=f"^{path}: File too large"):
      run_with(action, tiny_config(), tmp_path)
  *whole, part = path.read_text().split("\n")
  assert len(whole) == 3 and len(part) == 100
  assert json.loads((tmp_path / "status.json").read_text()) == {
      "state": "stopped", "step": EPOCH}
  run(tiny_config(), tmp_path)
  assert outcome(tmp_path) == outcome(plain)


# One step, against the method's definition.


@pytest.fixture(scope="module")
def steps():
  """{"aqe", "ste"}: an experiment and its compiled update."""
  fields = dict(learning_rate_schedule="constant", learning_rate=0.003,
                adam_epsilon=1e-30)
  configs = {
      "aqe": tiny_config(**fields, alpha_start=0.7, alpha_end=1.0,
                         alpha_per_layer=True),
      "ste": tiny_config(**fields, estimator="ste")}
  return {name: (experiment_of(c),
                 jax.jit(functools.partial(train_step.update, experiment_of(c))))
          for name, c in configs.items()}


def state_at(step, experiment):
  """A fresh state on the devices of an experiment, as if it were at another step."""
  return jax.device_put(
      fresh_state()._replace(step=np.int32(step)), experiment.replicated)


def tiny_batch(experiment):
  """32 normalized images and their labels."""
  data = jax.tree.map(lambda a: a[:32], experiment.data.load("train"))
  return pixels_lib.normalize(data.images, experiment.pixels), data.labels


@functools.cache
def reference_step():
  """The compiled f(params, images, labels, alphas, factors), in float64.

  alphas and factors: of the forward and of the backward of each quantizer, by name.
  Gives the loss, the logits, what each batch norm received, and the gradient.
  """
  def loss_of(params, images, labels, alphas, factors):
    def quantize(a, name):
      mixed = alphas[name] * jnp.where(a > 0, 1.0, -1.0) + (1 - alphas[name]) * a
      surrogate = factors[name] * jnp.where(jnp.abs(a) <= 1, a, 0.0)
      return surrogate + lax.stop_gradient(mixed - surrogate)

    pool = lambda x: lax.reduce_window(
        x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    logits, received = network(params, images, quantize, pool=pool, xp=jnp)
    return cross_entropy(logits, labels, jnp).mean(), (logits, received)

  step = jax.jit(jax.value_and_grad(loss_of, has_aux=True))

  def call(*arguments):
    with jax.enable_x64(True):
      wide = jax.tree.map(
          lambda a: np.asarray(a, np.float64 if a.dtype.kind == "f" else a.dtype),
          jax.tree.map(np.asarray, arguments))
      (loss, (logits, received)), gradient = jax.device_get(step(*wide))
    return loss, logits, received, gradient

  return call


@pytest.mark.gpu
@pytest.mark.parametrize("name, at, alphas", [
    ("aqe", 0, (0.7, 0.7, 0.7, 0.7)),
    # A run of 76 steps anneals its four layers in 19 steps each.
    ("aqe", 19 + 10, (1.0, 0.7 + 0.3 * 10 / 19, 0.7, 0.7)),
    ("ste", 0, None)])
def test_one_step_is_that_of_the_paper(name, at, alphas, steps):
  experiment, step = steps[name]
  images, labels = tiny_batch(experiment)
  state = state_at(at, experiment)
  after, loss = jax.device_get(step(state, images, labels, jax.random.key(0)))

  # Eq 4, 5: h and g; Eq 6, 18, 19: the mixture and 2 alpha g.
  alpha, factor = {}, {}
  for i, layer in enumerate(("conv1", "conv2", "dense1", "dense2")):
    for kind in (layer, f"norm_{layer}"):
      alpha[kind] = alphas[i] if alphas else 1.0
      factor[kind] = 2 * alphas[i] if alphas else 1.0
  expected, logits, received, gradient = reference_step()(
      state.params, images, labels, alpha, factor)

  assert loss == pytest.approx(expected, rel=2e-5)
  assert after.step == at + 1
  assert after.totals.loss == pytest.approx(32 * expected, rel=2e-5)
  assert after.totals.correct == np.sum(logits.argmax(-1) == labels)
  assert after.totals.count == 32 and after.totals.diverged_at == -1
  for norm, x in received.items():
    axes = tuple(range(x.ndim - 1))
    stats = after.batch_stats[norm]["batch_norm"]
    np.testing.assert_allclose(stats["mean"], 0.1 * x.mean(axes), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        stats["var"], 0.9 + 0.1 * x.var(axes), rtol=1e-4, atol=1e-5)

  def compare(path, g, mu, nu, old, new):
    # Adam's first moment after a step from zero is a tenth of the gradient.
    scale = np.abs(g).max()
    np.testing.assert_allclose(mu / 0.1, g, rtol=0, atol=1e-4 * scale)
    np.testing.assert_allclose(nu, 0.001 * (mu / 0.1) ** 2, rtol=1e-5)
    # Its first step is the learning rate, against the gradient's sign.
    new_one = old - 0.003 * np.sign(g)
    if "kernel" in jax.tree_util.keystr(path):
      new_one = np.clip(new_one, -1, 1)
    clear = np.abs(g) > 1e-3 * scale  # Other signs may be rounding.
    assert clear.mean() > 0.7
    np.testing.assert_allclose(new[clear], new_one[clear], rtol=0, atol=1e-6)

  adam = after.opt_state[0]
  jax.tree_util.tree_map_with_path(
      compare, gradient, adam.mu, adam.nu, state.params, after.params)


def test_alpha_one_trains_as_ste_does(steps):
  """Adam does not see the factor 2 of each quantizer (section 9 of the method)."""
  images, labels = tiny_batch(steps["aqe"][0])
  losses, last = {}, {}
  for case, name, at in (("one", "aqe", 76), ("ste", "ste", 76), ("less", "aqe", 0)):
    experiment, step = steps[name]
    state = state_at(at, experiment)
    losses[case] = []
    for _ in range(8):
      state, loss = step(state, images, labels, jax.random.key(0))
      losses[case].append(float(loss))
    last[case] = jax.device_get(state.params)
  np.testing.assert_allclose(losses["one"], losses["ste"], rtol=1e-5)
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-5),
               last["one"], last["ste"])
  assert min(np.abs(np.subtract(losses["less"], losses["ste"]))) > 1e-3
  assert losses["ste"][-1] < losses["ste"][0] - 0.1


def test_kernels_on_a_grid_are_clipped_and_nothing_else(tmp_path):
  seen = []

  def action(step, state):
    if step == 1:
      seen.append(jax.device_get(state))
      raise Stop
    edge = lambda p: 0.999 * jnp.sign(p) if p.ndim > 1 else p
    return state._replace(params=jax.tree.map(edge, state.params))

  with pytest.raises(Stop):
    run_with(action, busy_config(), tmp_path)
  after, = seen
  before = fresh_state().params
  # Adam's first step is the learning rate, 0.01, whatever the gradient.
  for name in ("conv1", "conv2", "dense1", "dense2"):
    new, mu = after.params[name]["kernel"], after.opt_state[0].mu[name]["kernel"]
    moved = 0.999 * np.sign(before[name]["kernel"]) - 0.01 * np.sign(mu)
    clear = np.abs(mu) > 1e-3 * np.abs(mu).max()
    assert np.abs(moved[clear]).max() > 1.008
    expected = moved if name == "conv1" else np.clip(moved, -1, 1)  # conv1: float32.
    np.testing.assert_allclose(new[clear], expected[clear], rtol=0, atol=1e-4)
    assert (np.abs(new).max() == 1) == (name != "conv1")
  scales = np.concatenate([
      norm["batch_norm"]["scale"] for name, norm in after.params.items()
      if name.startswith("norm_")])
  assert scales.max() == pytest.approx(1.01, abs=1e-4)


# Batch norm's statistics of the hard network.


def busy_sign(a, name):
  return a if name == "conv1" else sign(a)


@pytest.fixture(scope="module")
def busy(tmp_path_factory):
  """The workdir of a run that was stopped after its first epoch, and its checkpoint."""
  workdir = tmp_path_factory.mktemp("busy")
  with pytest.raises(Stop):
    run_with(stop_before(EPOCH + 1), busy_config(), workdir)
  with checkpoint.open_manager(str(workdir), read_only=True) as manager:
    return workdir, jax.device_get(checkpoint.restore(manager, EPOCH).tree)


def test_reestimated_statistics_are_the_hard_networks(busy):
  _, tree = busy
  experiment = experiment_of(busy_config())
  data, order = experiment.data.load("train"), resident.epoch_order(0, 0, 1257)
  sums = {}
  inputs = jax.jit(lambda data, order, i: experiment.data.train_inputs(
      data, order, i, jax.random.fold_in(jax.random.key(0), i)))
  for i in range(2):
    images, _ = inputs(data, order, i)
    _, received = network(tree["params"], np.asarray(images), busy_sign)
    for norm, x in received.items():
      axes = tuple(range(x.ndim - 1))
      mean, var = sums.get(norm, (0.0, 0.0))
      sums[norm] = mean + x.mean(axes) / 2, var + x.var(axes) / 2
  for norm, (mean, var) in sums.items():
    saved = tree["reestimated_batch_stats"][norm]["batch_norm"]
    np.testing.assert_allclose(saved["mean"], mean, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(saved["var"], var, rtol=1e-4)
    running = tree["batch_stats"][norm]["batch_norm"]
    assert np.abs(running["mean"] - mean).max() > 0.01


def test_reestimated_statistics_count_in_evaluation(busy):
  workdir, tree = busy
  data = experiment_of(busy_config()).data.load("validation")
  images = pixels_lib.normalize(data.images, experiment_of(busy_config()).pixels)
  losses = {}
  for name in ("reestimated_batch_stats", "batch_stats"):
    logits, _ = network(tree["params"], images, busy_sign, tree[name])
    losses[name] = cross_entropy(logits, np.asarray(data.labels)).mean()
  hard, = lines_of(workdir, split="validation", mode="hard")
  assert hard["loss"] == pytest.approx(losses["reestimated_batch_stats"], rel=1e-5)
  assert abs(losses["batch_stats"] - hard["loss"]) > 1e-3


def test_training_on_the_first_examples():
  experiment = Experiment(tiny_config(train_examples=200))
  assert (experiment.steps_per_epoch, experiment.num_steps) == (200 // 64, 4 * 3)
  _, order = next(experiment.data.train_batches(experiment.data.load("train"), 0))
  assert sorted(order.tolist()) == list(range(200))
  for split, count in (("train", 200), ("validation", 180), ("test", 360)):
    images, labels = datasets.load("digits", split, None)
    found = experiment.data.load(split)
    np.testing.assert_array_equal(found.images, images[:count])
    np.testing.assert_array_equal(found.labels, labels[:count])
    assert experiment.info.splits[split] == len(found.labels) == count


def test_no_batch_is_reestimated_on_twice(busy, monkeypatch):
  experiment = Experiment(tiny_config(reestimate_batches=10**6))
  asked = []
  note = lambda params, batch_stats, data, order, i: asked.append(i) or batch_stats
  monkeypatch.setattr(experiment, "jit", lambda _: note)
  batches = itertools.repeat((None, None))
  train_step.make_reestimate(experiment)({}, {"mean": jnp.zeros(2)}, batches)
  assert asked == list(range(EPOCH))


# The moving average of the variables.


@pytest.fixture(scope="module")
def averaged(tmp_path_factory):
  """A run with a moving average, stopped amid its second epoch; what it had seen."""
  workdir = tmp_path_factory.mktemp("averaged")
  seen = []

  def action(step, state):
    seen.append(jax.device_get((state.params, state.batch_stats, state.ema)))
    if step == EPOCH + 3:
      raise Stop

  config = busy_config(ema_decay=0.9)
  with pytest.raises(Stop):
    run_with(action, config, workdir)
  with checkpoint.open_manager(str(workdir), read_only=True) as manager:
    tree = jax.device_get(checkpoint.restore(manager, EPOCH).tree)
  return config, workdir, seen, tree


def test_moving_average(averaged):
  _, _, seen, _ = averaged
  average = seen[0][:2]
  for step, (params, stats, ema) in enumerate(seen):
    if step:
      # Step t has the weight (1 + t) / (10 + t), up to 0.9 at step 80.
      decay = min(0.9, step / (9 + step))
      average = jax.tree.map(
          lambda a, v: decay * np.float64(a) + (1 - decay) * v, average,
          (params, stats))
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=2e-4, atol=2e-5),
        (ema["params"], ema["batch_stats"]), average)
  distance = np.abs(ema["params"]["conv2"]["kernel"] - params["conv2"]["kernel"]).max()
  assert distance > 1e-3


def test_decay_of_the_moving_average_is_reached():
  for step, decay in ((0, 0.1), (1, 2 / 11), (79, 80 / 89), (80, 0.9), (10**6, 0.9)):
    got = train_step.update_ema({"w": jnp.float32(1)}, {"w": jnp.float32(0)},
                           jnp.int32(step), 0.9)
    assert got["w"] == pytest.approx(decay, rel=1e-6)


def test_hard_network_is_made_of_the_moving_average(averaged):
  """With re-estimated statistics, which are those of the average, too."""
  config, workdir, _, tree = averaged
  experiment = experiment_of(config)
  data, order = experiment.data.load("train"), resident.epoch_order(0, 0, 1257)
  means = []
  for i in range(2):
    images, _ = experiment.data.train_inputs(
        data, order, i, jax.random.fold_in(jax.random.key(0), i))
    _, received = network(tree["ema"]["params"], np.asarray(images), busy_sign)
    means.append(received["norm_conv1"].mean((0, 1, 2)))
  np.testing.assert_allclose(
      tree["reestimated_batch_stats"]["norm_conv1"]["batch_norm"]["mean"],
      np.mean(means, axis=0), rtol=1e-4, atol=1e-4)
  data = experiment.data.load("validation")
  images = pixels_lib.normalize(data.images, experiment.pixels)
  losses = [cross_entropy(network(params, images, busy_sign,
                                  tree["reestimated_batch_stats"])[0],
                          np.asarray(data.labels)).mean()
            for params in (tree["ema"]["params"], tree["params"])]
  hard, = lines_of(workdir, split="validation", mode="hard")
  assert hard["loss"] == pytest.approx(losses[0], rel=1e-4)
  assert abs(losses[1] - hard["loss"]) > 1e-3


def test_resumed_moving_average(averaged, tmp_path):
  config, workdir, _, _ = averaged
  shutil.copytree(workdir, tmp_path / "cut")
  run(config, tmp_path / "cut")
  run(config, tmp_path / "whole")
  assert outcome(tmp_path / "cut") == outcome(tmp_path / "whole")


def test_no_moving_average_unless_asked_for(busy):
  assert "ema" not in busy[1]


# Starting from another run.


def save_run(config, workdir):
  """A workdir with a checkpoint of random numbers; these."""
  run_files.claim(str(workdir), config)
  shapes = programs["abstract_state"](experiment_of(config))
  rng = np.random.default_rng(0)
  state = jax.tree_util.tree_map_with_path(
      lambda path, s: np.asarray(rng.uniform(
          0.1 if "var" in jax.tree_util.keystr(path) else -2, 2, s.shape), s.dtype),
      shapes)
  with checkpoint.open_manager(str(workdir)) as manager:
    checkpoint.save(manager, 100, state._asdict(), 0.5)
  return state


def test_init_from(tmp_path):
  source = save_run(tiny_config(weight_bits="float32", input_bits="float32"),
                    tmp_path / "float")
  seen = []

  def action(_, state):
    seen.append(jax.device_get(state))
    raise Stop

  config = tiny_config(init_from=str(tmp_path / "float"))
  with pytest.raises(Stop):
    run_with(action, config, tmp_path / "run")
  state, = seen
  jax.tree.map(np.testing.assert_array_equal, state.params, source.params)
  jax.tree.map(np.testing.assert_array_equal, state.batch_stats, source.batch_stats)
  assert state.step == 0 and state.totals.count == 0
  assert not any(np.any(m) for m in jax.tree.leaves(state.opt_state))
  assert np.abs(state.params["conv1"]["kernel"]).max() > 1
  assert state.ema == {}


def test_init_from_starts_the_moving_average(tmp_path):
  source = save_run(tiny_config(), tmp_path / "source")
  config = tiny_config(init_from=str(tmp_path / "source"), ema_decay=0.5)
  experiment = Experiment(config)
  run_files.claim(str(tmp_path / "run"), config)
  with checkpoint.open_manager(str(tmp_path / "run")) as manager:
    state, _ = train._first_state(
        experiment, train.read_source(config.init_from, experiment),
        str(tmp_path / "run"), manager)
  jax.tree.map(np.testing.assert_array_equal, state.ema,
               {"params": source.params, "batch_stats": source.batch_stats})


def test_init_from_is_for_the_start_alone(tmp_path):
  save_run(tiny_config(), tmp_path / "source")
  config = tiny_config(init_from=str(tmp_path / "source"), num_epochs=4)
  run(config, tmp_path / "whole")
  with pytest.raises(Stop):
    run_with(stop_before(EPOCH + 5), config, tmp_path / "cut")
  run(config, tmp_path / "cut")
  assert outcome(tmp_path / "cut") == outcome(tmp_path / "whole")


@pytest.mark.parametrize("source, named", [
    ({"conv_widths": (8, 16)},
     "params/conv2/kernel (3, 3, 8, 16) there, (3, 3, 8, 8) here"),
    ({"norm_scale": False},
     "params/norm_conv1/batch_norm/scale missing there, (8,) here")])
def test_init_from_other_shapes_is_refused(source, named, tmp_path):
  save_run(tiny_config(**source), tmp_path / "source")
  with pytest.raises(errors.UsageError) as error:
    run(tiny_config(init_from=str(tmp_path / "source")), tmp_path / "run")
  assert "init_from" in str(error.value) and named in str(error.value)
  assert not (tmp_path / "run").exists()


def test_init_from_no_run_is_refused(tmp_path):
  for source in (tmp_path / "nothing", tmp_path):
    with pytest.raises(errors.UsageError, match="the workdir of a run"):
      run(tiny_config(init_from=str(source)), tmp_path / "run")
  run_files.claim(str(tmp_path / "fresh"), tiny_config())
  with pytest.raises(errors.UsageError, match="a run that has a checkpoint"):
    run(tiny_config(init_from=str(tmp_path / "fresh")), tmp_path / "run")
  assert not (tmp_path / "run").exists()


# Learning from another run.


def with_teacher(workdir):
  """The config of a run with a teacher of random weights; the teacher's arrays."""
  tree = save_run(tiny_config(seed=5), workdir)
  return tiny_config(
      teacher=str(workdir), teacher_weight=0.75, teacher_temperature=2.0,
      label_smoothing=0.1, estimator="ste", num_epochs=2), tree


@pytest.fixture(scope="module")
def teaching(tmp_path_factory):
  return with_teacher(tmp_path_factory.mktemp("teacher"))


def test_loss_with_a_teacher(teaching):
  """The loss of the first step. Batch norms have the statistics of the batch."""
  config, teacher = teaching
  experiment = experiment_of(config)
  data, order = next(experiment.data.train_batches(experiment.data.load("train"), 0))
  images, labels = map(np.asarray, experiment.data.train_inputs(
      data, order, 0, jax.random.key(0)))
  state = train_step.make_init_state(experiment)()
  every_sign = lambda values, name: sign(values)
  learned, _ = network(jax.device_get(state.params), images, every_sign)
  taught, _ = network(teacher.params, images, every_sign, teacher.batch_stats)
  log_softmax = lambda logits: logits - np.log(
      np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True)
  ) - logits.max(-1, keepdims=True)
  smoothed = 0.9 * np.eye(10)[labels] + 0.01
  hard = -(smoothed * log_softmax(learned)).sum(-1).mean()
  p, q = log_softmax(taught / 2), log_softmax(learned / 2)
  soft = 4 * (np.exp(p) * (p - q)).sum(-1).mean()
  assert soft > 0.01
  _, loss = programs["make_train_step"](experiment)(state, data, order)
  assert float(loss) == pytest.approx(0.25 * hard + 0.75 * soft, rel=1e-4)


def test_resumed_run_with_a_teacher(teaching, tmp_path):
  config, _ = teaching
  run(config, tmp_path / "whole")
  with pytest.raises(Stop):
    run_with(stop_before(EPOCH + 5), config, tmp_path / "cut")
  run(config, tmp_path / "cut")
  assert outcome(tmp_path / "cut") == outcome(tmp_path / "whole")
  record = json.loads((tmp_path / "cut" / "run.json").read_text())["teacher"]
  assert (record["workdir"], record["step"]) == (config.teacher, 100)


def test_another_teacher_in_the_same_place(tmp_path):
  config, _ = with_teacher(tmp_path / "teacher")
  with pytest.raises(Stop):
    run_with(stop_before(EPOCH + 5), config, tmp_path / "run")
  shutil.rmtree(tmp_path / "teacher")
  save_run(tiny_config(seed=6), tmp_path / "teacher")  # The same arrays.
  forget_experiments()
  with pytest.raises(errors.UsageError, match="another one is there now"):
    run(config, tmp_path / "run")


@pytest.mark.parametrize("change, message", [
    ({"crop_size": 7}, "a run with crop_size=8, as this one: it has 7"),
    ({"pixels": "standardized"}, "a run with pixels='integer', as this one: it has"),
])
def test_teacher_that_sees_other_images(change, message, tmp_path):
  save_run(tiny_config(**change), tmp_path / "teacher")
  config = tiny_config(teacher=str(tmp_path / "teacher"))
  with pytest.raises(errors.UsageError) as error:
    train.train_and_evaluate(config, str(tmp_path / "run"))
  assert str(error.value).startswith("config.teacher=") and message in str(error.value)
  assert not (tmp_path / "run").exists()


def test_no_teacher_is_there(tmp_path):
  with pytest.raises(errors.UsageError, match="config.teacher='.*': .*the workdir of"):
    train.train_and_evaluate(
        tiny_config(teacher=str(tmp_path / "none")), str(tmp_path / "run"))
  assert not (tmp_path / "run").exists()


# What the codebase is for.


def digits_config(**changes):
  """That of the experiment on the digits."""
  c = runpy.run_path(str(ROOT / "experiments" / "digits_convnet.py"))["get_config"]()
  c.update(changes)
  return c


@pytest.mark.slow  # Each run compiles for 20 s; test_lines holds that a network learns.
def test_digits_learn_in_a_short_run(tmp_path):
  status = train.train_and_evaluate(
      digits_config(num_epochs=4, eval_every_epochs=4), str(tmp_path))
  assert status["test_accuracy"] > 0.9


@pytest.mark.slow
def test_digits_over_three_seeds(tmp_path):
  for seed in range(3):
    workdir = tmp_path / str(seed)
    status = train.train_and_evaluate(digits_config(seed=seed), str(workdir))
    assert status["state"] == "done" and status["test_accuracy"] >= 0.95


# The command.


@pytest.mark.slow
def test_main_says_how_a_run_ended(tmp_path):
  code, out, err = ended(
      start(tiny_config(num_epochs=1), tmp_path / "run", "--config.learning_rate=1e30"))
  assert code == 3, err
  assert json.loads(out)["state"] == "diverged"
  status = json.loads((tmp_path / "run" / "status.json").read_text())
  assert status in ({"state": "diverged", "step": step} for step in (0, 1))
  code, out, err = ended(start(tiny_config(num_epochs=2), tmp_path / "run"))
  assert code == 2
  assert err.startswith("error: ") and err.count("\n") == 1
  assert "learning_rate: 1e+30, 0.01" in err and "num_epochs: 1, 2" in err


# What came after AQE: a few steps, and the packed network against the trained one.


@pytest.mark.slow
@pytest.mark.parametrize("changes", [
    dict(estimator="lsq", input_bits=2),
    dict(estimator="ste", optimizer="bop", bop_adaptivity_rate=1e-2,
         bop_threshold=1e-6),
    dict(estimator="ste", weight_scale="layer_mean"),
    dict(estimator="ste", weight_scale="channel_mean"),
    dict(estimator="ste", weight_frequency=20.0),
    dict(ovsw_scaling=0.04, ovsw_decay=0.0009, optimizer="sgd", learning_rate=0.1),
    dict(estimator="stompp", alpha_start=0.0, alpha_end=1.0, alpha_shape="cubic",
         alpha_per_layer=True, estimator_noise_steps=5),
    dict(estimator="stompp_ste", alpha_start=0.0),
], ids=lambda changes: "-".join(str(v) for v in list(changes.values())[:2]))
def test_methods_that_came_after(changes):
  experiment = Experiment(tiny_config(dense_widths=(), **changes))
  state = jax.jit(lambda: train_step.init_state(experiment))()
  first = jax.device_get(state.params)
  step = train_step.make_train_step(experiment)
  batches = experiment.data.train_batches(experiment.data.load("train"), 0)
  losses = []
  for _ in range(30):
    state, loss = step(state, *next(batches))
    losses.append(float(loss))
  assert np.mean(losses[-5:]) < 0.75 * losses[0] and int(state.totals.diverged_at) < 0
  changed = jax.tree.map(lambda a, b: bool((a != b).any()), first, state.params)
  assert all(jax.tree.leaves(changed))
  if changes.get("optimizer") == "bop":
    for path in experiment.grid_layers:
      assert (jnp.abs(state.params[path]["kernel"]) == 1).all()
  codes, distance = train_step.make_weight_report(experiment)(state.params)
  assert all(set(np.unique(code)) == {-1, 1} for code in codes.values())
  assert all(0 <= value < 1.5 for value in distance.values())

  variables = {"params": state.params, "batch_stats": state.batch_stats}
  program = pack.pack(experiment.model, variables, pixels=experiment.pixels,
                      source_shape=experiment.info.image_shape)
  hard = experiment.fold(variables)
  assert set(np.unique(hard["hard"]["conv2"]["kernel"])) == {-1, 1}
  images = experiment.data.source_images("test")[:32]
  network = infer.Network(packed.to_bytes(program), "reference", 1)
  assert not list(verify.differences(
      program, experiment.model, hard, experiment.pixels, images, [network]))
  logits = experiment.model.apply(
      variables, pixels_lib.normalize(images, experiment.pixels), 1.0, mode="mixed",
      rngs={"estimator": jax.random.key(0)})
  np.testing.assert_array_equal(network.logits(images).argmax(-1), logits.argmax(-1))


def test_classes_have_weights_in_the_loss():
  experiment = Experiment(tiny_config(
      conv_widths=(), dense_widths=(), train_examples=100, class_weights="balanced"))
  labels = datasets.load("digits", "train", None)[1][:100]
  counts = np.bincount(labels, minlength=10)
  weights = 100 / (10 * counts)
  assert weights[labels].mean() == pytest.approx(1) and weights.std() > 0.1
  assert experiment.class_weights == pytest.approx(weights)

  state = train_step.make_init_state(experiment)()
  update = jax.jit(functools.partial(train_step.update, experiment))
  data, order = next(experiment.data.train_batches(experiment.data.load("train"), 0))
  images, labels = experiment.data.train_inputs(data, order, 0, jax.random.key(0))
  variables = {"params": state.params, "batch_stats": state.batch_stats}
  logits, _ = jax.jit(lambda variables, images: experiment.model.apply(
      variables, images, 0.5, mode="train", mutable=["batch_stats"],
      rngs={"estimator": jax.random.key(0)}))(variables, images)
  losses = cross_entropy(np.asarray(logits, np.float64), np.asarray(labels))
  after, loss = update(state, images, labels, jax.random.key(0))
  assert float(loss) == pytest.approx((weights[labels] * losses).mean(), rel=1e-5)
  assert float(loss) != pytest.approx(losses.mean(), rel=1e-3)
  # The accuracy in the record has no weights.
  assert after.totals.correct == (np.argmax(logits, -1) == labels).sum()

  # A mixed image has the losses of two labels, each with its own weight.
  share = np.linspace(0, 1, 64, dtype=np.float32)
  mixed = augment.MixedLabels(labels, labels[::-1], share)
  after, loss = update(state, images, mixed, jax.random.key(0))
  other = np.asarray(labels)[::-1]
  expected = share * weights[labels] * losses + (1 - share) * weights[
      other] * cross_entropy(np.asarray(logits, np.float64), other)
  assert float(loss) == pytest.approx(expected.mean(), rel=1e-5)
  wanted = np.where(share >= 0.5, labels, other)
  assert after.totals.correct == (np.argmax(logits, -1) == wanted).sum()
  assert after.totals.count == 64


def test_noise_is_kept_for_so_many_steps():
  keys = []
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(train_step, "update", lambda _, state, images, labels, key, __: (
        keys.append(jax.random.key_data(key)) or state, images.sum()))
    experiment = Experiment(tiny_config(estimator_noise_steps=3))
    patch.setattr(experiment, "jit", lambda function, **options: function)
    state = jax.eval_shape(lambda: train_step.init_state(experiment))
    step, data = train_step.make_train_step(experiment), experiment.data.load("train")
    data, order = next(experiment.data.train_batches(data, 0))
    sums = [step(state._replace(step=i), data, order)[1] for i in range(7)]
  same = [(a == b).all() for a, b in zip(keys, keys[1:])]
  assert same == [True, True, False, True, True, False]
  assert len(set(map(float, sums))) == 7  # Batches are others at each step.


def test_bop_needs_weights_of_one_bit():
  with pytest.raises(
      errors.UsageError, match="bop.: must be another optimizer: it flips"):
    Experiment(tiny_config(optimizer="bop", weight_bits=2))


def test_ovsw_needs_weights_of_one_bit():
  with pytest.raises(errors.UsageError, match="config.ovsw_decay=0.1: must be 0.0"):
    Experiment(tiny_config(ovsw_decay=0.1, weight_bits=2))


@pytest.mark.slow
def test_statistics_are_of_the_learned_steps():
  experiment = Experiment(tiny_config(estimator="lsq", reestimate_batches=1))
  state = train_step.init_state(experiment)
  params = dict(state.params)
  params["conv1"] = params["conv1"] | {"step": 2 * params["conv1"]["step"]}
  data = experiment.data.load("train")
  run = lambda params: train_step.make_reestimate(experiment)(
      params, state.batch_stats, experiment.data.train_batches(data, 0))
  a, b = (run(p)["norm_conv1"]["batch_norm"]["var"] for p in (state.params, params))
  np.testing.assert_allclose(b, 4 * a, rtol=1e-4)
