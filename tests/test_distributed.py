"""Runs of several real processes on this machine, over gloo.

Sums over a batch are made in another order there, so that runs differ as those of
other machines do; but those of equal numbers of devices are compared to the bit.
"""

import os
import re
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from imagenet_files import outcome as streamed_outcome
from imagenet_files import tiny_config as streamed_config
from minw import config as config_lib
from minw import distributed
from minw import errors
from minw import evaluate
from minw import train
from minw.experiment import Experiment
from minw.workdir import checkpoint
from minw.workdir import locks
from minw.workdir import run_files
from short_runs import EPOCH
from short_runs import ROOT
from short_runs import array_file
from short_runs import halve
from short_runs import lines_of
from short_runs import outcome
from short_runs import run
from short_runs import tiny_config
from short_runs import write_config

# What runs instead of `python -m minw.main`; {} is done before step `step` of process
# `process`.
COMMAND = '''
import os, runpy, signal, time
import jax
from minw import train_step
from minw.workdir import checkpoint

make, save = train_step.make_train_step, checkpoint.save

def make_train_step(experiment):
  program = make(experiment)
  def call(state, *batch):
    step, process = int(state.step), jax.process_index()
    {}
    return program(state, *batch)
  return call

train_step.make_train_step = make_train_step
runpy.run_module("minw.main", run_name="__main__", alter_sys=True)
'''


def small_config(**changes):
  """A network without convolutions, which take long to compile."""
  return tiny_config(conv_widths=(), **changes)


def free_port():
  with socket.socket() as found:
    found.bind(("localhost", 0))
    return found.getsockname()[1]


def environment(devices):
  kept = {name: value for name, value in os.environ.items()
          if not name.startswith(("SLURM_", "OMPI_", "JAX_"))}
  return kept | {
      "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)]),
      "JAX_PLATFORMS": "cpu",
      "JAX_NUM_CPU_DEVICES": str(devices)}


def start(count, config, workdir, *flags, before_step="pass", devices=1, configs=None):
  """Starts a run of `count` processes; `configs` are theirs, if they differ."""
  processes, port = [], free_port()
  for i, own in enumerate(configs or [config] * count):
    path = workdir.with_name(f"{workdir.name}_{i}.config.py")
    write_config(path, own)
    processes.append(subprocess.Popen(
        [sys.executable, "-c", COMMAND.format(before_step), f"--config={path}",
         f"--workdir={workdir}", "--distributed", f"--coordinator=localhost:{port}",
         f"--num_processes={count}", f"--process_id={i}", *flags],
        env=environment(devices), text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE))
  return processes


def ended(processes, timeout=300):
  """The exit codes, and what each wrote to stderr."""
  codes, said = [], []
  try:
    for process in processes:
      _, err = process.communicate(timeout=timeout)
      codes.append(process.returncode)
      said.append(err)
  finally:
    for process in processes:
      process.kill()
      process.wait()
  return codes, said


def train_on(count, config, workdir, *flags, **options):
  codes, said = ended(start(count, config, workdir, *flags, **options))
  assert codes == [0] * count, "\n".join(said)[-5000:]


@pytest.mark.slow
def test_two_processes_are_stopped_and_one_goes_on(tmp_path):
  config, workdir = small_config(num_epochs=2), tmp_path / "run"
  codes, said = ended(start(2, config, workdir, before_step=(
      "if step == 20 and process == 1: os.kill(os.getpid(), signal.SIGTERM)")))
  assert codes == [75, 75], said
  # Each epoch, process 0 tells the times of both.
  times = r"[\d.]+ ms on average, [\d.]+ ms on process [01]"
  assert re.search(rf"^\[process 0 of 2\] I.*\] a step: {times}; its batch: {times}$",
                   said[0], re.MULTILINE)
  assert not said[1]
  stopped = {"state": "preempted", "step": 2 * train.MEETING_STEPS}
  assert run_files.read_status(str(workdir)) == stopped
  lines = lines_of(workdir)
  assert [line["split"] for line in lines] == ["train", "validation", "validation"]
  # What they found, each example counted once.
  with checkpoint.open_manager(str(workdir), read_only=True) as manager:
    tree = checkpoint.restore(manager, EPOCH).tree
  experiment = Experiment(config)
  found = evaluate.Evaluator(experiment).hard(
      checkpoint.hard_variables(tree), experiment.data.load("validation"))
  assert found["accuracy"] == lines[2]["accuracy"]
  assert found["loss"] == pytest.approx(lines[2]["loss"], rel=1e-5)
  right = lines[0]["accuracy"] * 64 * EPOCH
  assert right == pytest.approx(round(right), abs=1e-3)

  assert train.train_and_evaluate(config, str(workdir))["state"] == "done"
  assert lines_of(workdir)[:3] == lines
  assert [line["step"] for line in lines_of(workdir, mode="hard")] == [19, 38, 38, 38]
  losses = [line["loss"] for line in lines_of(workdir, split="train")]
  assert losses[1] < losses[0] - 0.1  # It does learn on.


# What one process has to do as well.


def test_alone_nothing_is_exchanged():
  assert distributed.is_main() and not distributed.several()
  assert distributed.gather("words") == ["words"]
  assert distributed.any_of(True) is True and distributed.any_of(False) is False
  assert distributed.together(int, "3") == distributed.on_main(int, "3") == 3
  assert distributed.share() == (0, 1)
  refusal = errors.UsageError("no")

  def refuse():
    raise refusal

  for how in (distributed.together, distributed.on_main):
    with pytest.raises(errors.UsageError) as error:
      how(refuse)
    assert error.value is refusal
  with pytest.raises(ZeroDivisionError), distributed.saying_who_ends():
    1 / 0


def test_a_claimed_workdir_is_seen(tmp_path):
  config = tiny_config()
  run_files.claim(str(tmp_path), config)
  run_files.check_claimed(str(tmp_path), config)
  run_files.check_claimed(
      str(tmp_path), tiny_config(data_dir="elsewhere", data_workers=3))
  with pytest.raises(errors.UsageError, match=r"different configs .*: seed: 0, 1$"):
    run_files.check_claimed(str(tmp_path), tiny_config(seed=1))
  with pytest.raises(errors.UsageError, match="one place that all processes see"):
    run_files.check_claimed(str(tmp_path / "nothing"), config)


def test_nothing_is_found_where_nothing_is():
  clean = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
  done = subprocess.run(
      [sys.executable, "-c",
       "from minw import cli, distributed; cli.guarded(distributed.initialize)"],
      env=clean | {"PYTHONPATH": environment(1)["PYTHONPATH"], "JAX_PLATFORMS": "cpu"},
      text=True, capture_output=True, timeout=60)
  assert done.returncode == 2
  assert "error: --distributed: coordinator_address should be defined" in done.stderr
  assert "--coordinator, --num_processes and --process_id are needed" in done.stderr
  assert "Traceback" not in done.stderr


# Batches and gradients. In float64 what differs is an error, in float32 it may be
# chaos: a sum that is rounded to the other side of a threshold.

FOUND = '''
import sys
import jax, jax.numpy as jnp, numpy as np
kind, coordinator, count, process, path, text = sys.argv[1:]
if kind == "float64":  # All that asks for float32.
  jax.config.update("jax_enable_x64", True)
  jnp.float32 = jnp.float64
from minw import config as config_lib, distributed, train_step
from minw.experiment import Experiment
if int(count) > 1:
  distributed.initialize(coordinator, int(count), int(process))
config, found = config_lib.from_json(text), {}
experiment = Experiment(config)
data = experiment.data.load("train")
batch = experiment.jit(experiment.data.train_inputs)
for step in (0, 30):
  place = next(experiment.data.train_batches(data, step))
  parts = batch(*place, step % experiment.steps_per_epoch, jax.random.key(step))
  for name, part in zip(("images", "labels"), parts):
    assert len(part.sharding.device_set) == len(jax.devices())
    assert part.addressable_shards[0].data.shape[0] * len(jax.devices()) == len(part)
    found[f"{name}{step}"] = distributed.whole(part)
state = train_step.make_init_state(experiment)()
take_step = train_step.make_train_step(experiment)
batches = experiment.data.train_batches(data, 0)
for step in range(5):
  state, loss = take_step(state, *next(batches))
  found[f"loss{step}"] = np.asarray(loss)
  if step in (0, 4):
    tree = state.opt_state[0].trace if step == 0 else state.params
    for place, leaf in jax.tree_util.tree_leaves_with_path(tree):
      found[f"tree{step}{jax.tree_util.keystr(place)}"] = np.asarray(leaf)
if distributed.is_main():
  np.savez(path, **found)
'''


def find(count, devices, kind, config, path):
  """What so many processes of so many devices find, by name."""
  port, text = free_port(), config_lib.to_json(config)
  processes = [
      subprocess.Popen(
          [sys.executable, "-c", FOUND, kind, f"localhost:{port}", str(count), str(i),
           str(path), text], env=environment(devices), text=True,
          stdout=subprocess.PIPE, stderr=subprocess.PIPE) for i in range(count)]
  codes, said = ended(processes)
  assert codes == [0] * count, "\n".join(said)[-5000:]
  return dict(np.load(path))


LAYOUTS = ((1, 2), (2, 1), (4, 1))


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"norm_group_size": 16}])
def test_a_batch_gives_the_same_step(changes, tmp_path):
  config = tiny_config(optimizer="sgd", random_flip=True, crop_padding=1,
                       crop_size=7, learning_rate=0.1, **changes)
  one = find(1, 1, "float64", config, tmp_path / "1.npz")
  assert len(one) == 4 + 5 + 2 * 12  # Four layers: kernel, scale, bias.
  assert all(np.abs(value).max() > 0 for value in one.values())
  for count, devices in LAYOUTS:
    several = find(count, devices, "float64", config, tmp_path / "several.npz")
    assert several.keys() == one.keys()
    for name, value in one.items():
      if name.startswith(("images", "labels")):
        np.testing.assert_array_equal(several[name], value)
      else:
        within = 1e-6 if name.startswith(("loss0", "tree0")) else 1e-4
        np.testing.assert_allclose(several[name], value, rtol=0,
                                   atol=within * np.abs(value).max(), err_msg=name)


@pytest.mark.slow
def test_five_steps_of_float32(tmp_path):
  config = tiny_config(optimizer="sgd", input_bits="float32", weight_bits="float32")
  one = find(1, 1, "float32", config, tmp_path / "1.npz")
  for count, devices in LAYOUTS[:2]:
    several = find(count, devices, "float32", config, tmp_path / "several.npz")
    for name, value in one.items():
      np.testing.assert_allclose(several[name], value, rtol=0,
                                 atol=1e-4 * np.abs(value).max(), err_msg=name)


@pytest.mark.slow
def test_a_whole_run_is_one_of_its_seeds(tmp_path):
  def last(workdir):
    return lines_of(workdir, split="test", checkpoint="last")[0]["accuracy"]

  alone = []
  for seed in range(4):
    run(tiny_config(seed=seed, num_epochs=12), tmp_path / str(seed))
    alone.append(last(tmp_path / str(seed)))
  train_on(2, tiny_config(num_epochs=12), tmp_path / "two")
  spread = max(alone) - min(alone)
  assert min(alone) - spread <= last(tmp_path / "two") <= max(alone) + spread


# Other numbers of processes, and their ends.


@pytest.mark.slow
def test_processes_come_and_go(tmp_path):
  """Two, one, four, two; of devices always four, so that all is equal to the bit."""
  config = small_config(reestimate_batches=2, eval_batch_size=100)
  train_on(1, config, tmp_path / "whole", devices=4)
  workdir = tmp_path / "run"
  terminate = "if step == {} and process == 0: os.kill(os.getpid(), signal.SIGTERM)"
  for count, step, saved in ((2, 5, 16), (1, 22, 23), (4, 30, 32)):
    codes, said = ended(start(count, config, workdir, devices=4 // count,
                                before_step=terminate.format(step)))
    assert codes == [75] * count, said
    status = run_files.read_status(str(workdir))
    assert status == {"state": "preempted", "step": saved}
  # What cannot be read is left out by all.
  halve(array_file(workdir / "checkpoints" / "32"))
  train_on(2, config, workdir, devices=2)
  assert os.listdir(workdir / "damaged_checkpoints")[0].startswith("32.")
  ours, theirs = outcome(workdir), outcome(tmp_path / "whole")
  for name in theirs:
    assert ours[name] == theirs[name], name


@pytest.mark.slow
def test_parts_of_the_optimizers_state_on_two_processes(tmp_path):
  """A run starts from another one, and one process resumes it."""
  config = small_config(num_epochs=2)
  train_on(1, config, tmp_path / "source")
  config.init_from = str(tmp_path / "source")
  parts = config_lib.copy(config, shard_optimizer=True)
  codes, said = ended(start(2, parts, tmp_path / "run", devices=2, before_step=(
      "if step == 20 and process == 1: os.kill(os.getpid(), signal.SIGTERM)")))
  assert codes == [75, 75], said
  train_on(1, config, tmp_path / "run", devices=4)
  train_on(1, config, tmp_path / "whole", devices=4)
  for ours, theirs in zip(lines_of(tmp_path / "run"), lines_of(tmp_path / "whole"),
                          strict=True):
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=0.05)
  first, last = lines_of(tmp_path / "run")[0], lines_of(tmp_path / "source")[-1]
  assert first["loss"] < 1.2 * last["loss"]  # It did start from there.


@pytest.mark.slow
@pytest.mark.parametrize("told", [0, 1])
def test_a_stop_of_one_stops_all_at_a_step(told, tmp_path):
  """And told again while it saves, it still does."""
  config, workdir = small_config(), tmp_path / "run"
  codes, said = ended(start(2, config, workdir, before_step=f'''
    if process == {told} and step == {EPOCH + 3}:
      os.kill(os.getpid(), signal.SIGTERM)
      def save_and_terminate(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        save(*arguments)
        os.kill(os.getpid(), signal.SIGTERM)
      checkpoint.save = save_and_terminate
'''))
  assert codes == [75, 75], said
  assert run_files.read_status(str(workdir)) == {"state": "preempted", "step": 32}
  train_on(2, config, workdir)
  train_on(2, config, tmp_path / "whole")
  assert outcome(workdir) == outcome(tmp_path / "whole")


# Last lines of a process that has lost the other: an error of JAX, or an abort by JAX.
_RESUMES = r".* The same commands resume the run from its last checkpoint\n\Z"
LOST = re.compile(r"^error: the processes have lost each other \(.*\); process [01] of"
                  r" 2 ends here" + _RESUMES, re.MULTILINE)
KILLED = re.compile(r"^error: this process was killed, or JAX ended it" + _RESUMES,
                    re.MULTILINE)


@pytest.mark.slow
def test_a_process_that_hangs_ends_the_others(tmp_path):
  processes = start(
      2, small_config(), tmp_path / "run", "--heartbeat_timeout=10", before_step=(
          "if process == 1 and step == 3: os.kill(os.getpid(), signal.SIGSTOP)"))
  try:
    _, said = processes[0].communicate(timeout=300)
  finally:
    for process in processes:
      process.kill()
      process.communicate()
  assert processes[0].returncode not in (0, 2, 3, 75)
  assert KILLED.search(said) or LOST.search(said)


@pytest.mark.slow
@pytest.mark.parametrize("dead", [0, 1])
def test_a_dead_process_ends_the_others(dead, tmp_path):
  config, workdir = small_config(), tmp_path / "run"
  processes = start(2, config, workdir, "--heartbeat_timeout=10", before_step=(
      f"if process == {dead} and step == {EPOCH + 9}: os.kill(os.getpid(), 9)"))
  processes[dead].wait(timeout=300)
  since = time.monotonic()
  processes[1 - dead].wait(timeout=300)
  assert time.monotonic() - since < 10 + 15  # A slow machine's time to end.
  codes, said = ended(processes)
  assert codes[dead] == -signal.SIGKILL
  assert codes[1 - dead] not in (0, 2, 3, 75), said
  assert KILLED.search(said[dead])
  assert LOST.search(said[1 - dead]) or KILLED.search(said[1 - dead])
  assert "Traceback" not in said[1 - dead]
  train_on(2, config, workdir)
  assert [line["step"] for line in lines_of(workdir, mode="hard")] == [
      19, 38, 57, 76, 76, 76]
  status = run_files.read_status(str(workdir))
  assert (status["state"], status["step"]) == ("done", 4 * EPOCH)


@pytest.mark.slow
@pytest.mark.parametrize("failing, action, code, message", [
    (1, "raise OSError('the disk is full')", 1, "OSError: the disk is full\n"),
    (0, "raise OSError(5, 'Broken disk', '/a/b')", 74,
     "error: /a/b: Broken disk; the run is stopped, and the same command resumes it"
     " from its last checkpoint; "),
    (0, "[os.kill(os.getpid(), signal.SIGINT) for _ in range(2)]", 130,
     "interrupted; "),
])
def test_an_error_of_one_ends_all(failing, action, code, message, tmp_path):
  processes = start(
      2, small_config(), tmp_path / "run", "--heartbeat_timeout=10",
      before_step=f"if process == {failing} and step == 9: {action}")
  processes[failing].wait(timeout=300)
  since = time.monotonic()
  processes[1 - failing].wait(timeout=300)
  assert time.monotonic() - since < 10 + 15  # A slow machine's time to end.
  codes, said = ended(processes)
  assert codes[failing] == code and codes[1 - failing] not in (0, 2, 3, 75)
  assert f"{message}process {failing} of 2 ends here" in said[failing]
  assert ("Traceback" in said[failing]) == (code == 1)


@pytest.mark.slow
def test_divergence_ends_all(tmp_path):
  # Between reports: an epoch has 19 steps, and they meet after 16.
  codes, said = ended(start(
      2, small_config(learning_rate=1e30), tmp_path / "run"))
  assert codes == [3, 3], said
  status = run_files.read_status(str(tmp_path / "run"))
  assert status["state"] == "diverged" and status["step"] <= 1


@pytest.mark.slow
def test_bad_input_ends_all_alike(tmp_path):
  def refusals(configs, workdir, *flags):
    codes, said = ended(start(len(configs), None, workdir, *flags, configs=configs))
    assert codes == [2] * len(configs), said
    lines = {line for err in said for line in err.splitlines()
             if line.startswith("error: ")}
    assert not any("Traceback" in err for err in said)
    return lines

  config, workdir = tiny_config(), tmp_path / "run"
  run_files.claim(str(workdir), config)
  other = tiny_config(seed=1)
  assert refusals([other, other], workdir) == {
      f"error: workdir='{workdir}' holds a run of another config (field: there, here):"
      f" seed: 0, 1. Give this run another --workdir; with"
      f" --config.init_from={workdir} it"
      " starts from the weights trained there"}
  assert refusals([config, other], workdir) == {
      "error: the processes were started with different configs (field: first process,"
      " another): seed: 0, 1"}
  # What one finds out by itself.
  line, = refusals([config, tiny_config(bits_rules=(("x", 2),))], workdir)
  assert line.startswith("error: config.bits_rules='x': must be a pattern that matches")
  assert sorted(os.listdir(workdir)) == ["config.json", "lock"]
  with locks.take(str(workdir)):
    assert refusals([config, config], workdir) == {
        f"error: workdir='{workdir}' is in use: another process is training there"}


# Data that are streamed.


DAMAGED = """
import sys
from minw import distributed
from minw.data import streamed
from image_records import CENTRES, records
coordinator, count, process = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
distributed.initialize(coordinator, count, process)
split = streamed.Split(records(20, damaged=(1, 2)), "cats", max_damaged=0.1)
for batch in split.centres(4, **CENTRES, share=distributed.share()):
  assert len(batch.labels) == 2
assert split.damaged == 1
assert split.report()["damaged"] == split.damaged == 2
split = streamed.Split(records(20, damaged=(1, 2)), "cats", max_damaged=0.05)
list(split.centres(4, **CENTRES, share=distributed.share()))
try:
  split.report()
except distributed.Agreed as error:
  assert "of the 20 images of cats, 2 are damaged" in str(error)
else:
  raise AssertionError
"""


@pytest.mark.slow
def test_damaged_images_of_all_count():
  place = f"localhost:{free_port()}"
  codes, said = ended([
      subprocess.Popen(
          [sys.executable, "-c", DAMAGED, place, "2", str(i)], env=environment(1),
          text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
      for i in range(2)])
  assert codes == [0, 0], said


@pytest.mark.slow
def test_streamed_run(imagenet_data, tmp_path):
  """Two processes read what one does; a few images remain to evaluate."""
  config = streamed_config(imagenet_data)
  train_on(1, config, tmp_path / "whole", devices=2)
  workdir = tmp_path / "run"
  codes, said = ended(start(2, config, workdir, before_step=(
      "if step == 4 and process == 1: os.kill(os.getpid(), signal.SIGTERM)")))
  assert codes == [75, 75], said  # They ask each other after the epoch's five steps.
  train_on(2, config, workdir)
  lines, status = streamed_outcome(workdir)
  whole_lines, whole_status = streamed_outcome(tmp_path / "whole")
  assert lines == whole_lines and status == whole_status
