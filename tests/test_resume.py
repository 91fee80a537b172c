"""A run that is killed or told to stop, at whatever moment, and started again."""

import contextlib
import json
import os
import pathlib
import re
import shutil
import signal
import sys
import threading

import jax
import pytest

from minw import evaluate
from minw import stopping
from minw import train
from minw import train_step
from minw.workdir import checkpoint
import short_runs
from short_runs import EPOCH
from short_runs import Stop
from short_runs import busy_config
from short_runs import ended
from short_runs import lines_of
from short_runs import outcome
from short_runs import run
from short_runs import run_with
from short_runs import start
from short_runs import stop_before
from short_runs import tiny_config

# Python announces each opening, renaming and removal of a file before it is done.
# That is where runs are cut here: a checkpoint's write alone has twenty such moments.
EVENTS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree")


def moment_of(event, args, workdir):
  """"os.rename checkpoints/38.orbax-checkpoint-tmp"; None if nothing is changed.

  Of names that are drawn by chance, "status.json.0123456789abcdef.part",
  "status.json.part" is left.
  """
  if event not in EVENTS or not args or not isinstance(args[0], (str, os.PathLike)):
    return None
  path = os.fspath(args[0])
  if not isinstance(path, str) or not path.startswith(f"{workdir}/"):
    return None
  if event == "open" and not args[2] & (os.O_WRONLY | os.O_RDWR):
    return None
  name = path[len(str(workdir)) + 1:]
  return f"{event} {re.sub(r'[.][0-9a-f]{16}[.]part$', '.part', name)}"


class Copies:
  """Copies of a workdir from all moments of the run in it.

  A killed process leaves what it had given to the operating system, which is what a
  copy holds. Other threads of the run have to wait before they change another file.
  """

  def __init__(self, workdir, folder):
    self._workdir, self._folder = workdir, folder
    self._lock, self._inside = threading.RLock(), False
    self.at = {}  # By moment; where it recurs, "#2" and so on follow.
    self.active = True
    sys.addaudithook(self._notice)  # There is no way to remove it.

  def _notice(self, event, args):
    if self.active and (moment := moment_of(event, args, self._workdir)):
      self.make(moment)

  def make(self, moment):
    with self._lock:
      if self._inside:
        return
      self._inside = True
      # No thread of this process may find this half done.
      count = 1 + sum(name.split("#")[0] == moment for name in self.at)
      name = moment + f"#{count}" * (count > 1)
      target = self._folder / str(len(self.at))
      _copy(self._workdir, target)
      self.at[name] = target
      self._inside = False


def _copy(source, target):
  target.mkdir(parents=True)
  with contextlib.suppress(FileNotFoundError):  # What is in C++ does not wait.
    # Checkpoints before metrics: none may meet earlier ones.
    for path in sorted(source.iterdir()):
      if path.is_dir():
        _copy(path, target / path.name)
      else:
        with contextlib.suppress(FileNotFoundError):
          shutil.copy(path, target / path.name)


def run_with_copies(config, folder):
  """What comes of an uninterrupted run, and copies of its workdir."""
  copies = Copies(folder / "run", folder / "copies")

  def action(step, _):
    if step in (5, EPOCH + 6, 4 * EPOCH - 1):
      copies.make(f"step {step}")

  run_with(action, config, folder / "run")
  copies.active = False
  return outcome(folder / "run"), copies.at


@pytest.fixture(scope="module")
def busy(tmp_path_factory):
  return run_with_copies(busy_config(), tmp_path_factory.mktemp("resume"))


def assert_ends_like(workdir, expected, config):
  run(config, workdir)
  found = outcome(workdir)
  for name in expected:
    assert found[name] == expected[name], name


@pytest.mark.gpu
@pytest.mark.parametrize("moment", [
    "os.mkdir checkpoints/19.orbax-checkpoint-tmp",  # All lines, but no checkpoint.
    "os.rename checkpoints/38.orbax-checkpoint-tmp",
    "os.rename status.json.part#6",  # Nothing is left to do but to say so.
    *(pytest.param(slow, marks=pytest.mark.slow) for slow in (
        "step 5", "step 25", "step 75", "os.rename curves.png.part"))])
def test_killed_run_goes_on(moment, busy, tmp_path):
  expected, copies = busy
  shutil.copytree(copies[moment], tmp_path / "run")
  assert_ends_like(tmp_path / "run", expected, busy_config())


@pytest.mark.slow
def test_run_killed_at_any_moment_goes_on(tmp_path):
  """With all features that a resumed run might compute otherwise.

  `test_faults.py` kills a simpler run at finer moments. By default every tenth copy is
  resumed here; MINW_MOMENTS=all resumes all of them.
  """
  config = busy_config(estimator="stochastic_aqe")
  expected, copies = run_with_copies(config, tmp_path)
  assert len(copies) > 80
  every = 1 if os.environ.get("MINW_MOMENTS") == "all" else 10
  for moment, copy in list(copies.items())[::every]:
    try:
      assert_ends_like(copy, expected, config)
    except BaseException as error:
      error.add_note(moment)
      raise


def test_cut_line_of_metrics(busy, tmp_path):
  """The operating system may have got a part of a line."""
  expected, copies = busy
  for i, tail in enumerate(('{"step": 38, "epoch": 2, "spl', '{"step": 38}', "{")):
    workdir = tmp_path / str(i)
    shutil.copytree(copies["step 25"], workdir)
    with (workdir / "metrics.jsonl").open("a") as file:
      file.write(tail)
    with pytest.raises(Stop):
      run_with(stop_before(EPOCH + 7), busy_config(), workdir)
    assert lines_of(workdir) == [line for line in expected["lines"]
                                 if line["step"] <= EPOCH]


def test_cut_again_and_again(busy, tmp_path):
  expected, _ = busy
  for step in (3, EPOCH + 1, EPOCH + 1, 2 * EPOCH, 3 * EPOCH + 18):
    with pytest.raises(Stop):
      run_with(stop_before(step), busy_config(), tmp_path)
    status = json.loads((tmp_path / "status.json").read_text())
    assert status == {"state": "running", "step": step // EPOCH * EPOCH}
    steps = [line["step"] for line in lines_of(tmp_path)]
    assert sorted(steps) == steps and len(steps) == step // EPOCH * 3
  assert_ends_like(tmp_path, expected, busy_config())


def test_deleting_what_is_too_old_may_be_cut(busy, tmp_path):
  expected, copies = busy
  removals = [name for name in copies if name.startswith("shutil.rmtree checkpoints")]
  assert removals
  workdir = tmp_path / "run"
  shutil.copytree(copies[removals[-1]], workdir)
  old = workdir / removals[-1].split()[1]
  for path in sorted(path for path in old.rglob("*") if path.is_file())[::2]:
    path.unlink()
  run(busy_config(), workdir)
  assert not old.exists()
  assert outcome(workdir) == expected


# SIGTERM.


def send_at(wanted, *numbers):
  def action(step, _):
    if step == wanted:
      for number in numbers:
        os.kill(os.getpid(), number)

  return action


def terminate_at(wanted):
  return send_at(wanted, signal.SIGTERM)


@pytest.mark.parametrize("step", [
    EPOCH - 1, pytest.param(EPOCH + 6, marks=pytest.mark.slow)])
def test_terminated_run_stops_and_goes_on(step, busy, tmp_path):
  expected, _ = busy
  handler = signal.getsignal(signal.SIGTERM)
  status = run_with(terminate_at(step), busy_config(), tmp_path)
  # The step is finished and saved.
  assert status == {"state": "preempted", "step": step + 1}
  assert json.loads((tmp_path / "status.json").read_text()) == status
  assert signal.getsignal(signal.SIGTERM) == handler
  with checkpoint.open_manager(str(tmp_path), read_only=True) as manager:
    assert manager.latest_step() == step + 1
  assert (tmp_path / "curves.png").exists() == (step >= EPOCH - 1)
  assert len(lines_of(tmp_path)) == (step + 1) // EPOCH * 3
  begun = []
  run_with(lambda step, _: begun.append(step), busy_config(), tmp_path)
  assert begun == list(range(step + 1, 4 * EPOCH))
  assert outcome(tmp_path) == expected


def test_terminated_while_it_evaluates(busy, tmp_path, monkeypatch):
  expected, _ = busy
  start_hard = evaluate.Evaluator.start_hard
  counted = []

  def terminated(*args):
    counted.append(1)
    if len(counted) == 2:
      os.kill(os.getpid(), signal.SIGTERM)
    return start_hard(*args)

  monkeypatch.setattr(evaluate.Evaluator, "start_hard", terminated)
  assert run(busy_config(), tmp_path) == {"state": "preempted", "step": 2 * EPOCH}
  assert_ends_like(tmp_path, expected, busy_config())


def test_terminated_at_the_end_is_done(busy, tmp_path):
  expected, _ = busy
  run_with(terminate_at(4 * EPOCH - 1), busy_config(), tmp_path)
  assert outcome(tmp_path) == expected


# SIGINT.


@pytest.mark.parametrize("step", [
    pytest.param(EPOCH - 1, marks=pytest.mark.slow), EPOCH + 6])
def test_interrupted_run_stops_and_goes_on(step, busy, tmp_path):
  expected, _ = busy
  handler = signal.getsignal(signal.SIGINT)
  with pytest.raises(train.Interrupted) as interrupt:
    # A signal that a launcher passes on beside it is no second interrupt.
    run_with(send_at(step, signal.SIGTERM, signal.SIGINT, signal.SIGTERM),
             busy_config(), tmp_path)
  assert interrupt.value.status == {"state": "preempted", "step": step + 1}
  assert str(interrupt.value) == (
      f"the run is saved at step {step + 1} and resumes from there")
  assert json.loads((tmp_path / "status.json").read_text()) == interrupt.value.status
  assert signal.getsignal(signal.SIGINT) == handler
  assert_ends_like(tmp_path, expected, busy_config())


def test_second_interrupt_stops_at_once(busy, tmp_path):
  expected, _ = busy
  begun = []

  def action(step, state):
    begun.append(step)
    send_at(EPOCH + 6, signal.SIGINT, signal.SIGINT)(step, state)

  with pytest.raises(KeyboardInterrupt) as interrupt:
    run_with(action, busy_config(), tmp_path)
  assert not isinstance(interrupt.value, train.Interrupted)
  assert begun == list(range(EPOCH + 7))
  assert json.loads((tmp_path / "status.json").read_text()) == {
      "state": "stopped", "step": EPOCH}
  assert_ends_like(tmp_path, expected, busy_config())


def test_interrupted_at_the_end_is_done(busy, tmp_path):
  expected, _ = busy
  run_with(send_at(4 * EPOCH - 1, signal.SIGINT), busy_config(), tmp_path)
  assert outcome(tmp_path) == expected


def test_ignored_interrupt_stays_ignored():
  before = signal.signal(signal.SIGINT, signal.SIG_IGN)
  try:
    with stopping.StopSignal() as stop:
      os.kill(os.getpid(), signal.SIGINT)
      assert not stop.requested
    assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
  finally:
    signal.signal(signal.SIGINT, before)


# The best checkpoint.


def run_with_accuracies(accuracies, workdir, action=lambda *_: None):
  """A run whose validation has these accuracies, one for each epoch."""
  start_hard = evaluate.Evaluator.start_hard

  def invented(self, variables, data):
    result = start_hard(self, variables, data)()
    if data.labels.shape[0] == 180:
      result["accuracy"] = accuracies[int(now[0]) // EPOCH]
    return lambda: result

  now = [0]

  def note(step, state):
    now[0] = step
    return action(step, state)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(evaluate.Evaluator, "start_hard", invented)
    return run_with(note, busy_config(), workdir)


def test_best_survives_resumes(tmp_path):
  accuracies = (0.9, 0.9, 0.3, 0.4)
  whole = run_with_accuracies(accuracies, tmp_path / "whole")
  assert whole["best_step"] == 2 * EPOCH
  assert [line["checkpoint_step"] for line in lines_of(
      tmp_path / "whole", split="test")] == [4 * EPOCH, 2 * EPOCH]
  with pytest.raises(Stop):
    run_with_accuracies(accuracies, tmp_path / "cut", stop_before(2 * EPOCH + 3))
  # A preemption saves what has no accuracy.
  run_with_accuracies(accuracies, tmp_path / "cut", terminate_at(2 * EPOCH + 7))
  with pytest.raises(Stop):
    run_with_accuracies(accuracies, tmp_path / "cut", stop_before(4 * EPOCH - 1))
  run_with_accuracies(accuracies, tmp_path / "cut")
  assert outcome(tmp_path / "cut") == outcome(tmp_path / "whole")


# Real processes, really killed.

KILLER = '''
import glob, os, re, sys, time
number, moment, workdir = os.environ["END_AT"].split(":")
end = lambda: os.kill(os.getpid(), int(number))
if moment.startswith("step "):
  from minw import train_step
  make = train_step.make_train_step
  def make_train_step(experiment):
    step = make(experiment)
    def wrapped(state, *batch):
      if int(state.step) == int(moment[5:]):
        while glob.glob(f"{workdir}/checkpoints/*tmp"):
          time.sleep(0.01)
        end()
      return step(state, *batch)
    return wrapped
  train_step.make_train_step = make_train_step
else:
  moment, _, count = moment.partition("#")
  event, path = moment.split()
  times = []
  def notice(event_, args):
    if event_ == event and re.sub("[.][0-9a-f]{16}[.]part$", ".part",
                                  str(args[0])) == f"{workdir}/{path}":
      times.append(1)
      if len(times) == int(count or 1):
        end()
  sys.addaudithook(notice)
'''


@pytest.fixture
def start_to_end(tmp_path):
  """f(config, workdir, signal, moment): a process that gets the signal then."""
  (tmp_path / "killer").mkdir()
  (tmp_path / "killer" / "sitecustomize.py").write_text(KILLER)
  root = pathlib.Path(train.__file__).parents[1]

  def start_(config, workdir, number, moment, **environment):
    return start(config, workdir, END_AT=f"{int(number)}:{moment}:{workdir}",
                 PYTHONPATH=f"{tmp_path / 'killer'}:{root}", **environment)

  return start_


def compiled_in(folder):
  """The environment in which a process need not compile what one before it did."""
  return {"JAX_COMPILATION_CACHE_DIR": str(folder),
          "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
          "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1"}


@pytest.mark.slow
def test_really_killed_at_many_moments(start_to_end, tmp_path):
  cache = compiled_in(tmp_path / "cache")
  workdir, config = tmp_path / "run", busy_config(estimator="stochastic_aqe")
  kill, terminate = signal.SIGKILL, signal.SIGTERM
  for number, moment, goes_on_from in (
      (kill, "os.mkdir checkpoints/19.orbax-checkpoint-tmp", 0),
      (terminate, "step 29", 0),
      (kill, "os.rename checkpoints/38.orbax-checkpoint-tmp/tree.orbax-checkpoint-tmp",
       30),
      (kill, "step 75", 30),
      # Written at the start, after the one checkpoint, and when all is done.
      (kill, "os.rename status.json.part#3", 57)):
    code, _, err = ended(start_to_end(config, workdir, number, moment, **cache))
    assert code == (75 if number == terminate else -kill), (moment, err)
    assert f"starting from step {goes_on_from} of 76" in err, (moment, err)
    status = json.loads((workdir / "status.json").read_text())
    if number == terminate:
      assert status == {"state": "preempted", "step": 30}
    else:
      assert status["state"] == "running"
  # The last two without what others compiled.
  code, out, err = ended(start(config, workdir))
  assert code == 0 and "starting from step 76 of 76" in err, err
  assert '"state": "done", "step": 76' in out
  run(config, tmp_path / "whole")
  assert outcome(workdir) == outcome(tmp_path / "whole")
  before = (workdir / "metrics.jsonl").read_bytes()
  code, _, err = ended(start(config, workdir))
  assert code == 0 and "already done" in err
  assert (workdir / "metrics.jsonl").read_bytes() == before


@pytest.mark.slow
def test_recipes_that_learn_more_are_resumed(tmp_path, monkeypatch):
  """With the state of OvSW, and alphas of weights beside those of activations."""
  config = tiny_config(
      ovsw_scaling=0.1, ovsw_decay=0.1, alpha_weights="after", rprelu=True,
      learn_input_thresholds=True, bits_rules=(("norm_conv2", 2),), ema_decay=0.9,
      num_epochs=2)
  experiment = short_runs.experiment_of(config)
  state = jax.device_get(jax.jit(lambda: train_step.init_state(experiment))())
  monkeypatch.setattr(short_runs, "fresh_state", lambda *_: state)
  run(config, tmp_path / "whole")
  with pytest.raises(Stop):
    run_with(stop_before(EPOCH + 5), config, tmp_path / "cut")
  run(config, tmp_path / "cut")
  assert outcome(tmp_path / "cut") == outcome(tmp_path / "whole")
  alphas = [line["alpha"] for line in lines_of(tmp_path / "cut", split="train")
            if "alpha" in line]
  assert [len(alpha) for alpha in alphas] == [8, 8]
