"""Short runs on the digits, stopped where a test says, and what they leave behind."""

import contextlib
import functools
import json
import os
import pathlib
import struct
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from minw import config as config_lib
from minw import evaluate
from minw import files
from minw import paths
from minw import plots
from minw import train
from minw import train_step
from minw.experiment import Experiment
from minw.workdir import checkpoint
from minw.workdir import metrics

ROOT = pathlib.Path(__file__).parents[1]
RATES = ("examples_per_second", "decode_rate")  # They are of the machine.
EPOCH = 19  # Steps of 64 in the 1,257 digits to train on.


def tiny_config(**changes):
  """A network on the digits that trains in a second, once it is compiled."""
  c = config_lib.default_config()
  c.update(dataset="digits", crop_size=8, random_flip=False, conv_widths=(8, 8),
           dense_widths=(16,), batch_size=64, num_epochs=4, eval_batch_size=64)
  c.update(changes)
  return c


def busy_config(**changes):
  """The same with what could make a resumed run another one.

  But for estimator="stochastic_aqe", which takes four times as long to compile.
  """
  return tiny_config(
      alpha_per_layer=True, reestimate_batches=2, random_flip=True, crop_padding=1,
      bits_rules=(("conv1", "float32"),), alpha_end=0.9, **changes)


_experiment = functools.cache(lambda text: Experiment(config_lib.from_json(text)))
forget_experiments = _experiment.cache_clear
programs = {name: functools.cache(getattr(train_step, name)) for name in (
    "abstract_state", "make_train_step", "make_reestimate", "make_weight_report")}
_evaluator = functools.cache(evaluate.Evaluator)


def experiment_of(config):
  """The one Experiment of a config in this process; `init_from` is none of it."""
  return _experiment(config_lib.to_json(config_lib.copy(config, init_from="")))


@functools.cache
def fresh_state(seed=0, ema_decay=0.0):
  """`train_step.init_state` of the tiny network, in NumPy."""
  experiment = experiment_of(tiny_config(seed=seed, ema_decay=ema_decay))
  return jax.device_get(jax.jit(lambda: _init_state(experiment))())


_init_state = train_step.init_state


@contextlib.contextmanager
def shared_programs(draw=False):
  """Runs of equal configs compile their programs once in this process.

  They run under JAX's strict promotion. Without `draw`, curves.png and confusion.png
  are files of nothing.
  """
  with (pytest.MonkeyPatch.context() as patch, jax.numpy_dtype_promotion("strict"),
        jax.numpy_rank_promotion("raise")):
    if not draw:
      patch.setattr(plots, "curves", lambda workdir: files.write(
          paths.at(workdir) / "curves.png", ""))
      patch.setattr(plots, "confusion_figure", lambda *arguments: None)
      patch.setattr(plots, "save", lambda figure, path: files.write(path, ""))
    for module in (train, evaluate):
      patch.setattr(module, "Experiment", lambda c: fresh_state(c.seed, c.ema_decay)
                    and experiment_of(c))
    patch.setattr(train_step, "init_state", lambda experiment: jax.tree.map(
        jnp.asarray, fresh_state(experiment.config.seed, experiment.config.ema_decay)))
    for name, make in programs.items():
      patch.setattr(train_step, name, make)
    patch.setattr(evaluate, "Evaluator", _evaluator)
    writers, make_writer = [], metrics.Writer
    patch.setattr(metrics, "Writer", lambda *a: writers.append(make_writer(*a))
                  or writers[-1])
    try:
      yield patch
    finally:
      for writer in writers:  # A run that is stopped leaves its files open.
        with contextlib.suppress(OSError):  # On gs://, lines may be left to write.
          writer.close()


def run(config, workdir, draw=False):
  """`train_and_evaluate` with shared programs."""
  with shared_programs(draw):
    return train.train_and_evaluate(config, str(workdir))


def run_with(action, config, workdir):
  """`run` with `action(step, state)` before each training step.

  What it returns, if anything, is the state that the step starts from.
  """
  def make_train_step(experiment):
    step = programs["make_train_step"](experiment)
    return lambda state, *batch: step(
        action(int(state.step), state) or state, *batch)

  with shared_programs() as patch:
    patch.setattr(train_step, "make_train_step", make_train_step)
    return train.train_and_evaluate(config, str(workdir))


class Stop(Exception):
  """What tests end a run with."""


def stop_before(wanted):
  """For `run_with`: raises `Stop` before the step `wanted`."""
  def action(step, _):
    if step == wanted:
      raise Stop

  return action


def lines_of(workdir, **fields):
  """The lines of metrics.jsonl that have these fields, without their rates."""
  lines = list(map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines()))
  for line in lines:
    for rate in RATES:
      line.pop(rate, None)
  return [line for line in lines if fields.items() <= line.items()]


def line_at(step, split="validation", mode="hard", **more):
  """A line of metrics.jsonl as a run might write it."""
  return {"step": step, "epoch": step // 10, "split": split, "mode": mode,
          "loss": step / 7, "accuracy": 0.5, **more}


def write_record(workdir):
  """Writes lines at steps 10, 20, 30 and of the test split."""
  writer = metrics.Writer(str(workdir), 0)
  for step in (10, 20, 30):
    writer.write(line_at(step, "train", "mixed"))
    writer.write(line_at(step))
  writer.write(line_at(30, "test", checkpoint="last", checkpoint_step=30))
  writer.write(line_at(30, "test", checkpoint="best", checkpoint_step=20))
  writer.close()


def trees_of(workdir):
  """The arrays of all checkpoints: {step: {path: (dtype, shape, bytes)}}."""
  trees = {}
  with checkpoint.open_manager(str(workdir), read_only=True) as manager:
    for step in sorted(manager.all_steps()):
      tree = checkpoint.restore(manager, step).tree
      trees[step] = {
          jax.tree_util.keystr(path, simple=True, separator="/"):
          (str(leaf.dtype), leaf.shape, np.asarray(leaf).tobytes())
          for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
  return trees


def events_of(workdir):
  """What TensorBoard shows, without rates: {(tag, step): value}.

  A value is a number, the counts of a histogram, or the bytes of a text. An event that
  says START takes back all that is of its step or a later one.
  """
  shown = {}
  for path in sorted((workdir / "tensorboard").iterdir()):
    for event, value in values_of(path):
      if value is None:
        if event.session_log.status == event.session_log.START:
          shown = {key: old for key, old in shown.items() if key[1] < event.step}
        continue
      assert (value.tag, event.step) not in shown, "shown twice"
      kind = value.WhichOneof("value")
      shown[value.tag, event.step] = (
          tuple(value.histo.bucket) if kind == "histo" else
          value.tensor.string_val[0] if kind == "tensor" else value.simple_value)
  return {key: value for key, value in shown.items()
          if key[0] not in RATES}


def numbers_of(workdir):
  """The points of TensorBoard's charts."""
  return {key: value for key, value in events_of(workdir).items()
          if isinstance(value, float)}


def values_of(path):
  """Events and their values, one after another; of an event without values None.

  Read from the file's records: a length, a checksum of it, an event, a checksum of
  that.
  """
  def masked(data):
    crc = _crc32c(data)
    return (((crc >> 15) | (crc << 17)) + 0xa282ead8) % 2**32

  data, at = path.read_bytes(), 0
  while at + 12 <= len(data):
    length, crc = struct.unpack_from("<QI", data, at)
    assert crc == masked(data[at:at + 8])
    record = data[at + 12:at + 12 + length]
    if at + 16 + length > len(data):
      break  # The run was killed.
    assert struct.unpack_from("<I", data, at + 12 + length)[0] == masked(record)
    at += 16 + length
    event = event_pb2.Event.FromString(record)
    for value in event.summary.value or [None]:
      yield event, value


@functools.cache
def _crc32c_table():
  table = []
  for byte in range(256):
    for _ in range(8):
      byte = (byte >> 1) ^ (0x82f63b78 if byte & 1 else 0)
    table.append(byte)
  return table


def _crc32c(data):
  crc, table = 2**32 - 1, _crc32c_table()
  for byte in data:
    crc = table[(crc ^ byte) & 255] ^ (crc >> 8)
  return crc ^ (2**32 - 1)


def outcome(workdir):
  """All that two runs must have in common to be the same run."""
  return {
      "status": json.loads((workdir / "status.json").read_text()),
      "lines": lines_of(workdir),
      "checkpoints": trees_of(workdir),
      "events": events_of(workdir)}


def contents(workdir):
  """All files below, by path."""
  return {str(path.relative_to(workdir)): path.read_bytes()
          for path in sorted(workdir.rglob("*")) if path.is_file()}


def write_config(path, config):
  """Writes an experiment file that holds `config`."""
  path.write_text(
      "from minw import config\n"
      f"def get_config(): return config.from_json({config_lib.to_json(config)!r})\n")


def start(config, workdir, *arguments, **environment):
  """Starts `python -m minw.main` on a config file that holds `config`."""
  path = pathlib.Path(f"{workdir}.config.py")
  write_config(path, config)
  return subprocess.Popen(
      [sys.executable, "-m", "minw.main", f"--config={path}", f"--workdir={workdir}",
       *arguments],
      env={**os.environ, "PYTHONPATH": str(ROOT), **environment}, text=True,
      stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def ended(process):
  """The exit code, stdout and stderr of what `start` started."""
  with process:
    out, err = process.communicate(timeout=600)
  return process.returncode, out, err


def array_file(folder):
  """The file that holds most of the arrays."""
  return max((path for path in (folder / "tree").rglob("*") if path.is_file()),
             key=lambda path: path.stat().st_size)


def halve(path):
  path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])
