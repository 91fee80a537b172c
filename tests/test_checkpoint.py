"""minw.workdir.checkpoint: what is saved, what is kept, and what comes of damage."""

import gc
import json
import random
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minw import errors
from minw import evaluate
from minw import train
from minw.workdir import checkpoint
from short_runs import EPOCH
from short_runs import Stop
from short_runs import array_file
from short_runs import contents
from short_runs import experiment_of
from short_runs import halve
from short_runs import outcome
from short_runs import run
from short_runs import run_with
from short_runs import stop_before
from short_runs import tiny_config
from short_runs import trees_of

# Orbax drops what else it was reading when one array cannot be read.
pytestmark = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning")

OLDER, NEWEST = EPOCH, 2 * EPOCH


def test_checksum():
  """It is the sum of the CRC-32 of "123456789", a published value, and of zeros."""
  digits = np.frombuffer(b"123456789", np.uint8).reshape(3, 3)
  tree = {"a": jnp.asarray(digits), "b": [digits.T.copy().T, np.float32(0)]}
  assert checkpoint.checksum(tree) == 2 * 0xCBF43926 + 0x2144DF1C


@pytest.fixture(autouse=True, scope="module")
def collected():
  """What Orbax dropped is found here, not in the tests of another file."""
  yield
  gc.collect()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
  """The workdir of a run that was stopped in its third epoch, and of a whole one."""
  folder = tmp_path_factory.mktemp("checkpoint")
  run(tiny_config(), folder / "whole")
  with pytest.raises(Stop):
    run_with(stop_before(NEWEST + 5), tiny_config(), folder / "cut")
  return folder / "cut", folder / "whole"


@pytest.fixture
def cut(runs, tmp_path):
  """A copy of the stopped run."""
  shutil.copytree(runs[0], tmp_path / "cut")
  return tmp_path / "cut"


def arrays_of(tree):
  """The bytes of the arrays, by path."""
  return {jax.tree_util.keystr(path, simple=True): np.asarray(leaf).tobytes()
          for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def newest_of(workdir):
  """What `restore_newest` reads for a run: the step and the arrays."""
  target = train.checkpoint_target(experiment_of(tiny_config()))
  with checkpoint.open_manager(str(workdir)) as manager:
    step, tree, _ = checkpoint.restore_newest(manager, target)
  return step, arrays_of(tree)


def flip(path, at, bit=4):
  data = bytearray(path.read_bytes())
  data[at] ^= 1 << bit
  path.write_bytes(bytes(data))


def change_record(folder, **changes):
  path = folder / "record" / "metadata"
  path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def empty(folder):
  shutil.rmtree(folder)
  folder.mkdir()


DAMAGES = {
    "arrays truncated": lambda folder: halve(array_file(folder)),
    "arrays emptied": lambda folder: array_file(folder).write_bytes(b""),
    "arrays missing": lambda folder: array_file(folder).unlink(),
    "metadata emptied": lambda folder: (folder / "tree" / "_METADATA").write_text(""),
    "metadata of nothing":
        lambda folder: (folder / "tree" / "_METADATA").write_text("{}"),
    "metadata missing": lambda folder: (folder / "tree" / "_METADATA").unlink(),
    "manifest truncated": lambda folder: halve(folder / "tree" / "manifest.ocdbt"),
    "tree missing": lambda folder: shutil.rmtree(folder / "tree"),
    "tree empty": lambda folder: empty(folder / "tree"),
    "record emptied": lambda folder: (folder / "record" / "metadata").write_text(""),
    "record truncated": lambda folder: halve(folder / "record" / "metadata"),
    "record of nothing":
        lambda folder: (folder / "record" / "metadata").write_text("{}"),
    "record a list": lambda folder: (folder / "record" / "metadata").write_text("[1]"),
    "record missing": lambda folder: shutil.rmtree(folder / "record"),
    "run emptied": lambda folder: (folder / "run" / "metadata").write_text(""),
    "run of nothing": lambda folder: (folder / "run" / "metadata").write_text("{}"),
    "run missing": lambda folder: shutil.rmtree(folder / "run"),
    "another run": lambda folder: (folder / "run" / "metadata").write_text(
        (folder / "run" / "metadata").read_text().replace('"step": 19', '"step": 18',
                                                          1)),
    "another checksum": lambda folder: change_record(folder, crc32=12345),
    "another accuracy": lambda folder: change_record(folder, accuracy=0.99),
    "no accuracy": lambda folder: change_record(folder, accuracy=None),
    "empty": empty,
}


# Damages of the fast test: one of each file and of each kind.
FAST = ("arrays truncated", "metadata missing", "manifest truncated", "tree missing",
        "record of nothing", "run emptied", "another run", "another checksum",
        "no accuracy", "empty")


@pytest.mark.parametrize("damage", [
    pytest.param(damage, marks=() if damage in FAST else pytest.mark.slow)
    for damage in DAMAGES])
def test_damaged_newest_is_not_used(damage, cut, caplog):
  DAMAGES[damage](cut / "checkpoints" / str(NEWEST))
  before = contents(cut)
  # A look at it changes nothing.
  saved = checkpoint.read_run(str(cut)).saved
  assert saved.step == OLDER
  assert contents(cut) == before
  assert f"checkpoint {NEWEST}" in caplog.text and "damaged" in caplog.text
  caplog.clear()
  step, arrays = newest_of(cut)
  assert step == OLDER
  assert arrays == arrays_of(saved.tree)
  said, = (record for record in caplog.records if "is damaged" in record.message)
  assert said.levelname == "WARNING"
  assert f"checkpoint {NEWEST}" in caplog.text
  # What was there of it is there still, out of the way.
  assert not (cut / "checkpoints" / str(NEWEST)).exists()
  aside, = (cut / "damaged_checkpoints").iterdir()
  assert aside.name.startswith(f"{NEWEST}.")
  place = f"checkpoints/{NEWEST}/"
  assert contents(aside) == {name.removeprefix(place): data
                             for name, data in before.items() if name.startswith(place)}


@pytest.mark.parametrize("damage", [
    "arrays truncated", pytest.param("no accuracy", marks=pytest.mark.slow)])
def test_run_with_damaged_newest_ends_alike(damage, runs, cut):
  DAMAGES[damage](cut / "checkpoints" / str(NEWEST))
  begun = []
  run_with(lambda step, _: begun.append(step), tiny_config(), cut)
  assert begun == list(range(OLDER, 4 * EPOCH))
  assert outcome(cut) == outcome(runs[1])


def test_damage_after_the_last_step(runs, tmp_path):
  """The newest may also be the last of all, or the best."""
  shutil.copytree(runs[1], tmp_path / "run")
  (tmp_path / "run" / "status.json").unlink()
  DAMAGES["arrays truncated"](tmp_path / "run" / "checkpoints" / str(4 * EPOCH))
  run(tiny_config(), tmp_path / "run")
  assert outcome(tmp_path / "run") == outcome(runs[1])


def test_damaged_twice(cut, caplog):
  """Two of three: the oldest is used; a step may be damaged more than once."""
  third = cut / "checkpoints" / str(NEWEST + 1)
  shutil.copytree(cut / "checkpoints" / str(NEWEST), third)
  for step in (NEWEST, NEWEST + 1):
    DAMAGES["tree missing"](cut / "checkpoints" / str(step))
  assert newest_of(cut)[0] == OLDER
  assert len([r for r in caplog.records if "is damaged" in r.message]) == 2
  shutil.copytree(cut / "checkpoints" / str(OLDER), third)
  DAMAGES["empty"](third)
  assert newest_of(cut)[0] == OLDER
  aside = [path.name.split(".")[0] for path in (cut / "damaged_checkpoints").iterdir()]
  assert sorted(aside) == [str(s) for s in (NEWEST, NEWEST + 1, NEWEST + 1)]


def test_all_damaged(cut):
  for step in (OLDER, NEWEST):
    DAMAGES["arrays truncated"](cut / "checkpoints" / str(step))
  before = contents(cut)
  for attempt in (lambda: run(tiny_config(), cut),
                  lambda: evaluate.evaluate_workdir(str(cut)),
                  lambda: evaluate.evaluate_workdir(str(cut), which="best")):
    with pytest.raises(errors.UsageError) as error:
      attempt()
    assert "\n" not in str(error.value)
    assert f"all are damaged ([{NEWEST}, {OLDER}])" in str(error.value)
    assert contents(cut) == before


def test_damaged_best(runs, tmp_path, caplog):
  """The run ends all the same, with the best of those that are whole."""
  accuracy = {step: json.loads(
      (runs[1] / "checkpoints" / str(step) / "record" / "metadata").read_text()
      )["accuracy"] for step in trees_of(runs[1])}
  best = json.loads((runs[1] / "status.json").read_text())["best_step"]
  workdir = tmp_path / "run"
  shutil.copytree(runs[1], workdir)
  (workdir / "status.json").unlink()
  # A better one, of which the arrays are lost.
  lost = workdir / "checkpoints" / "7"
  shutil.copytree(workdir / "checkpoints" / str(4 * EPOCH), lost)
  change_record(lost, accuracy=1.0)
  assert max(accuracy.values()) < 1.0
  status = run(tiny_config(), workdir)
  assert status["state"] == "done" and status["best_step"] == best
  assert "checkpoint 7" in caplog.text
  assert outcome(workdir) == outcome(runs[1])


@pytest.mark.slow
def test_no_flipped_bit_is_restored(runs, tmp_path):
  """It is noticed, or it is in none of the arrays and accuracies."""
  folder = runs[0] / "checkpoints" / str(NEWEST)
  workdir = tmp_path / "cut"
  shutil.copytree(runs[0], workdir)
  _, whole = newest_of(workdir)
  record = (folder / "record" / "metadata").read_text()
  files = [path for path in folder.rglob("*") if path.is_file() and path.stat().st_size]
  rng, noticed = random.Random(0), 0
  for i in range(200):
    shutil.rmtree(workdir)
    shutil.copytree(runs[0], workdir)
    path = files[i % len(files)]
    at, bit = rng.randrange(path.stat().st_size), rng.randrange(8)
    flip(workdir / path.relative_to(runs[0]), at, bit)
    step, arrays = newest_of(workdir)
    noticed += step == OLDER
    if step == NEWEST:
      assert arrays == whole, (path, at, bit)
      again = folder.relative_to(runs[0]) / "record" / "metadata"
      assert json.loads((workdir / again).read_text()) == json.loads(record)
  assert noticed > 20  # How many depends on the names of the files, which are random.


def test_arrays_come_back_to_the_bit(tmp_path):
  numbers = np.array([0.0, -0.0, np.nan, np.inf, 1e-45, 1 / 3], np.float32)
  tree = {"a": {"float": jnp.asarray(numbers),
                "half": jnp.asarray(numbers, jnp.bfloat16)},
          "b": [jnp.int32(-7), jnp.arange(6, dtype=jnp.uint8).reshape(2, 3)]}
  with checkpoint.open_manager(str(tmp_path)) as manager:
    checkpoint.save(manager, 5, tree, 0.25)
  with checkpoint.open_manager(str(tmp_path), read_only=True) as manager:
    for target in (None, jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), tree)):
      step, found, _ = checkpoint.restore_newest(manager, target)
      assert step == 5
      assert jax.tree.structure(found) == jax.tree.structure(tree)
      for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(tree)):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_saved_is_what_was_there_when_it_was_saved(tmp_path):
  """Though the writing goes on while the buffers are given away."""
  add = jax.jit(lambda tree: jax.tree.map(lambda a: a + 1, tree), donate_argnums=0)
  state = {f"a{i}": jnp.full((64, 1024), 1.0) for i in range(16)}
  with checkpoint.open_manager(str(tmp_path)) as manager:
    for step in (1, 2, 3):
      checkpoint.save(manager, step, state, None)
      for _ in range(5):
        state = add(state)
    manager.wait_until_finished()
    for step, value in ((2, 6.0), (3, 11.0)):
      found = checkpoint.restore(manager, step).tree
      assert all((leaf == value).all() for leaf in jax.tree.leaves(found))


@pytest.mark.parametrize("accuracies, best, kept", [
    ((0.9, 0.2, 0.3, 0.4, 0.5), 1, {1, 4, 5}),
    ((0.1, 0.9, 0.3, 0.4, 0.5), 2, {2, 4, 5}),
    ((0.9, 0.9, 0.3, 0.4, 0.5), 2, {2, 4, 5}),
    ((0.9, 0.1, 0.9, 0.2, 0.3), 3, {3, 4, 5}),
    ((0.1, 0.2, 0.3, 0.4, 0.5), 5, {4, 5}),
    ((0.5, 0.1, 0.1, 0.1, 0.5), 5, {4, 5}),
    ((0.0, 0.0, 0.0, 0.0, 0.0), 5, {4, 5}),
    # None stands for a checkpoint that a preemption saved amid an epoch.
    ((0.1, 0.2, None, 0.3, 0.4), 5, {4, 5}),
    ((0.1, 0.2, None, None, 0.3), 5, {2, 5}),
    ((0.9, None, 0.1, None, 0.2), 1, {1, 3, 5}),
    ((0.5, None, 0.4, None, None), 1, {1, 3, 4, 5}),
    ((0.1, 0.3, None, None, None), 2, {1, 2, 4, 5}),
    ((None, 0.0, None, None, None), 2, {2, 4, 5}),
    ((None, None, None, None, None), 5, {4, 5})])
@pytest.mark.parametrize("reopened", [
    pytest.param(False, marks=pytest.mark.slow), True])
def test_last_epochs_and_best_are_kept(accuracies, best, kept, reopened, tmp_path):
  manager = checkpoint.open_manager(str(tmp_path))
  for step, accuracy in enumerate(accuracies, start=1):
    checkpoint.save(manager, step, {"a": jnp.full(3, step)}, accuracy)
    if reopened:
      manager.close()
      manager = checkpoint.open_manager(str(tmp_path))
  manager.wait_until_finished()
  assert set(manager.all_steps()) == kept
  step, tree, _ = checkpoint.restore_best(manager)
  assert step == best and (tree["a"] == best).all()
  step, tree, _ = checkpoint.restore_newest(manager)
  assert step == 5 and (tree["a"] == 5).all()
  manager.close()


def test_no_checkpoint_yet(tmp_path):
  with checkpoint.open_manager(str(tmp_path)) as manager:
    assert checkpoint.restore_newest(manager) is None
    assert checkpoint.restore_best(manager) is None


def test_best_of_none_known_is_the_newest(tmp_path):
  with checkpoint.open_manager(str(tmp_path)) as manager:
    for step in (1, 2):
      checkpoint.save(manager, step, {"a": jnp.ones(3)}, None)
    manager.wait_until_finished()
    assert checkpoint.restore_best(manager).step == 2
    checkpoint.save(manager, 3, {"a": jnp.ones(3)}, 0.0)
    checkpoint.save(manager, 4, {"a": jnp.ones(3)}, None)
    manager.wait_until_finished()
    assert checkpoint.restore_best(manager).step == 3
    assert sorted(manager.all_steps()) == [3, 4]


@pytest.mark.parametrize("name", [
    "lr=[0.1]", "**", "a?", "\\[", "gs:", "a\nb", "\udc80", "{a}", "12",
    *(pytest.param(slow, marks=pytest.mark.slow) for slow in (
        "[!a]", "[", "]", "a*b", "a\\b", "\\", "s3:x", " ", "a b",
        "Zahl-\u00e9\U0001f389", "~", "%41", "#x", "$HOME", "'\"", "checkpoints",
        "x.orbax-checkpoint-tmp"))])
def test_workdirs_of_any_name(name, tmp_path):
  """Orbax looks for files by patterns, and TensorStore refuses backslashes."""
  workdir = tmp_path / name
  workdir.mkdir()
  with checkpoint.open_manager(str(workdir)) as manager:
    for step, accuracy in ((1, 0.5), (2, 0.25), (3, 0.5)):
      checkpoint.save(manager, step, {"a": jnp.full(3, step)}, accuracy)
  with checkpoint.open_manager(str(workdir)) as manager:
    assert checkpoint.restore_newest(manager).step == 3
    checkpoint.save(manager, 4, {"a": jnp.full(3, 4)}, 0.25)
  with checkpoint.open_manager(str(workdir), read_only=True) as manager:
    assert sorted(manager.all_steps()) == [3, 4]
    assert checkpoint.restore_best(manager).tree["a"].tolist() == [3, 3, 3]
  assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == ["3", "4"]
  assert [path.name for path in tmp_path.iterdir()] == [name]


def test_damage_is_reported_by_the_workdirs_own_name(tmp_path):
  workdir = tmp_path / "[a]"
  workdir.mkdir()
  with checkpoint.open_manager(str(workdir)) as manager:
    checkpoint.save(manager, 1, {"a": jnp.ones(3)}, 0.5)
  (workdir / "checkpoints" / "1" / "record" / "metadata").write_text("{")
  with checkpoint.open_manager(str(workdir), read_only=True) as manager:
    with pytest.raises(errors.UsageError) as refusal:
      checkpoint.restore_newest(manager)
  assert f"checkpoints in {workdir}/checkpoints: all" in str(refusal.value)
