"""Training: the loop of `train_and_evaluate`, its pauses and what they save."""

import contextlib
import errno
import json
import logging
import os
import re
import shutil
import time
from typing import Any, Callable, Iterator, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from minw import cloud
from minw import config as config_lib
from minw import confusion
from minw import display
from minw import distributed
from minw import errors
from minw import evaluate
from minw import exit_codes
from minw import files
from minw import histograms
from minw import json_files
from minw import outbox
from minw import paths
from minw import plots
from minw import stopping
from minw import stragglers
from minw import traces
from minw import trackers
from minw import train_step
from minw.data import datasets
from minw.experiment import Experiment
from minw.progress import LINE_SECONDS
from minw.progress import Progress
from minw.train_step import Totals
from minw.train_step import TrainState
from minw.workdir import checkpoint
from minw.workdir import environment
from minw.workdir import metrics
from minw.workdir import run_files

_log = logging.getLogger(__name__)

MEETING_STEPS = 16  # Number of steps after which processes agree whether to stop.


class Interrupted(KeyboardInterrupt):
  """Error that is raised when SIGINT stopped a run and its state was saved.

  Attributes:
    status: Content of status.json. Its `state` is "preempted".
  """

  def __init__(self, status: dict[str, Any]):
    super().__init__(
        f"the run is saved at step {status['step']} and resumes from there")
    self.status = status


class StorageError(errors.UsageError):
  """A file of a run cannot be written or read. Earlier checkpoints are intact."""

  exit_code = exit_codes.IO_ERROR


def train_and_evaluate(
    config: Any, workdir: str | os.PathLike, profile: traces.Steps | None = None,
    tracker: str | None = None,
) -> dict[str, Any]:
  """Trains the network of `config`, or resumes from the last checkpoint in `workdir`.

  A run may be interrupted at any moment and started again. It ends with the same
  parameters and metrics as a run without interruption; only its rates differ. In the
  main thread, SIGTERM and SIGINT (Ctrl-C, or the interrupt of a notebook) end the run
  after its state is saved.

  Several processes (see `distributed.initialize`) all call this function and do the
  same steps together. Work of process 0 alone is guarded by `distributed.is_main`.

  Progress is shown as described in `display.shown`.

  Args:
    config: Config of the run, see `config.default_config`.
    workdir: Directory of the run. It is created if it is missing. It receives
      config.json, run.json, metrics.jsonl, status.json, confusion.json, confusion.png,
      curves.png, tensorboard/ and checkpoints/, and histograms.jsonl if the config asks
      for it. Its lock is held until this function returns.
    profile: First step, and the step after the last one, of which a trace is written to
      profile/. Steps are counted from 0.
    tracker: Service that also receives the measurements; see `trackers.SERVICES`.

  Returns:
    The final content of status.json: `state` ("done", "diverged" or "preempted"),
    `step` and, when done, the hard network's `test_accuracy` and `test_loss`.

  Raises:
    errors.UsageError: Before training starts: the config cannot be run, `workdir`
      belongs to another config, is in use or cannot be written to, or data are missing.
    StorageError: During training, a file cannot be written. The state is then
      "stopped".
    Interrupted: SIGINT arrived, and the state is saved. A second SIGINT raises
      KeyboardInterrupt at once. Then the steps since the last checkpoint are lost.
  """
  workdir = os.fspath(workdir)
  paths.at(workdir)  # Refuses URLs that cannot be used.
  together = distributed.together
  experiment = together(Experiment, config)
  together(traces.check_steps, profile, experiment.num_steps)
  distributed.on_main(trackers.check, tracker)
  together(datasets.check_available, config.dataset, config_lib.data_dir(config))
  source = together(read_source, config.init_from, experiment)
  together(lambda: experiment.teacher)
  with run_files.claimed(workdir, config):
    status = distributed.on_main(_ended, workdir, experiment)
    if status:
      _log.warning("%s: already %s at step %d; nothing to do",
                   workdir, status["state"], status["step"])
      return status
    with (_stopping(workdir, checkpoint_target(experiment)),
          stopping.StopSignal() as stop, outbox.used(workdir)):
      status = _train(experiment, source, workdir, stop, profile, tracker)
  if status["state"] == "preempted" and stop.interrupted:
    raise Interrupted(status)
  return status


def _ended(workdir: str, experiment: Experiment) -> dict[str, Any] | None:
  """Returns the status of a run that has ended and whose record is complete.

  Returns:
    The status if the run is done or has diverged, else None. None is also returned,
    with a warning, if the files contradict the status. The run then resumes from its
    last checkpoint and completes its record.

  Raises:
    errors.UsageError: The record is not complete, and there is no checkpoint.
  """
  try:
    status = run_files.read_status(workdir)
  except json_files.Damaged as error:
    _log.warning("%s/status.json is damaged: %s; the checkpoints tell where the run is",
                 workdir, error.why)
    return None
  if not status or status["state"] not in ("done", "diverged"):
    return None
  last = experiment.num_steps
  whole = status["step"] == last if status["state"] == "done" else status["step"] < last
  faults = (metrics.faults(workdir, experiment.config, status) if whole else
            [f"status.json says {status['state']} at step {status['step']} of {last}"])
  if not faults:
    return status
  errors.check(checkpoint.newest_step(workdir) > 0, "workdir", workdir,
               "moved away to train the run again: its record is not complete"
               f" ({'; '.join(faults)}), and there is no checkpoint to make it from")
  _log.warning("%s: %s; the run resumes from its last checkpoint", workdir,
               "; ".join(faults))
  return None


@contextlib.contextmanager
def _stopping(workdir: str, target: Any) -> Iterator[None]:
  """Context that notes the state "stopped" if an interrupt or a file error ends a run.

  Args:
    workdir: Directory of the run.
    target: Shapes and dtypes of a checkpoint, for the message.

  Raises:
    StorageError: The file system failed. The message names the file.
  """
  try:
    yield
  except (Exception, KeyboardInterrupt) as error:
    failed = _storage_error(error, workdir)
    if not (failed or isinstance(error, KeyboardInterrupt)):
      raise
    with contextlib.suppress(OSError):
      if distributed.is_main():
        checkpoint.discard_unfinished(workdir)  # The save may have filled the disk.
      run_files.write_status(workdir, "stopped", checkpoint.newest_step(workdir))
    if not failed:
      raise
    need = ""
    if failed.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
      size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(target))
      need = f" ({size / 1e6:.1f} MB a checkpoint are needed"
      with contextlib.suppress(OSError):
        need += f", {shutil.disk_usage(workdir).free / 1e6:.1f} MB are free"
      need += ")"
    # When Python removes a folder, its errors name files without the folder.
    named = failed.filename and (
        os.path.isabs(failed.filename) or paths.is_url(failed.filename))
    raise StorageError(
        f"{failed.filename if named else workdir}: {failed.strerror}{need}; the run is"
        " stopped, and the same command resumes it from its last checkpoint") from error


def _storage_error(error: BaseException, workdir: str) -> OSError | None:
  """Returns the file system's error behind `error`, or None if there is none.

  TensorStore reports such an error in the text of an exception of its own.
  """
  folder = paths.at(workdir)
  if isinstance(folder, cloud.Path):
    found = cloud.as_os_error(error, folder / "checkpoints")
    if found is None and isinstance(error, Exception):
      try:
        cloud.check_owned(folder)  # A successor removes what this process was writing.
      except OSError as lost:
        return lost
    return found
  if not isinstance(error, OSError):
    number = re.search(r"os_error_code='(\d+)'", str(error))
    if not number:
      return None
    code = int(number.group(1))
    return OSError(code, os.strerror(code), os.path.join(workdir, "checkpoints"))
  return error if error.errno and not isinstance(error, ConnectionError) else None


class _Splits(NamedTuple):
  """The data of a run, as returned by `Experiment.data.load`."""

  train: Any
  validation: Any
  test: Any


class _Programs(NamedTuple):
  """The compiled functions of a run. The functions that make them describe them."""

  step: Callable[..., tuple[TrainState, jax.Array]]
  reestimate: Callable[..., Any]
  weight_report: Callable[[Any], tuple[dict, dict]]
  flip_rates: Callable[[dict, dict], dict]
  histogram: Callable[..., Any]
  no_totals: Callable[[], Totals]
  evaluator: evaluate.Evaluator


class _Run(NamedTuple):
  """Objects that all steps of a run share.

  Attributes:
    experiment: Network, schedules and optimizer.
    workdir: Directory of the run.
    stop: Signal handler that knows whether the run shall stop.
    splits: Training, validation and test data.
    programs: Compiled functions.
    manager: Manager of the checkpoints.
    journal: Writer of run.json.
    writer: Writer of metrics.jsonl and histograms.jsonl. It is None except on
      process 0.
    progress: Clock that measures the rate of training.
    show: Function that shows the number of steps done, and a text.
  """

  experiment: Experiment
  workdir: str
  stop: stopping.StopSignal
  splits: _Splits
  programs: _Programs
  manager: Any
  journal: environment.Journal
  writer: metrics.Writer | None
  progress: Progress
  show: Callable[..., None]


def _train(
    experiment: Experiment, source: dict[str, Any], workdir: str,
    stop: stopping.StopSignal, profile: traces.Steps | None, tracker: str | None,
) -> dict[str, Any]:
  """Trains the remaining steps of a run, tests its network, and returns its status."""
  begun = time.monotonic()
  splits = _Splits(*(distributed.together(experiment.data.load, split)
                     for split in _Splits._fields))
  # The weights are constants of the training step, which all processes compile alike.
  weights = distributed.together(lambda: experiment.class_weights)
  distributed.check_same(np.array(weights or ()), "the weights of the classes")
  programs = _Programs(
      step=train_step.make_train_step(experiment),
      reestimate=train_step.make_reestimate(experiment),
      weight_report=train_step.make_weight_report(experiment),
      flip_rates=experiment.jit(train_step.flip_rates),
      histogram=histograms.make_histograms(experiment),
      no_totals=experiment.jit(
          train_step.no_totals, out_shardings=experiment.replicated),
      evaluator=evaluate.Evaluator(experiment))

  with (checkpoint.open_manager(workdir) as manager,
        display.shown(workdir, experiment.num_steps) as show):
    state, saved = _first_state(experiment, source, workdir, manager)
    step = int(state.step)
    journal = environment.Journal(
        workdir, begun, saved and saved["journal"], step,
        teacher=experiment.teacher and experiment.teacher.record)
    _log.info("%s: starting from step %d of %d", workdir, step, experiment.num_steps)
    run_files.write_status(workdir, "running", step)
    writer = None
    if distributed.is_main():
      fields = config_lib.to_fields(experiment.config)
      writer = metrics.Writer(
          workdir, step, saved, trackers.Tracker(tracker, workdir, fields)
          if tracker else None)
    if distributed.several():
      stop.hold()  # No process can stop alone. All agree on a step at which they stop.
    progress = Progress(step, experiment.num_steps, experiment.config.batch_size)
    run = _Run(experiment, workdir, stop, splits, programs, manager, journal, writer,
               progress, show)

    try:
      status = _train_steps(run, state, profile)
      results = _test(run) if status["state"] == "running" else {}
    except BaseException:
      if writer:
        with contextlib.suppress(OSError):  # What failed before says more.
          writer.close()
      raise
    journal.note()
    if writer:
      writer.sync()
      writer.close()
      outbox.wait(workdir)  # The curves are drawn from files that were just written.
      with display.harmless("curves.png cannot be drawn"):
        plots.curves(workdir)
    if status["state"] == "running":
      status = run_files.write_status(workdir, "done", status["step"], **results)
  _log.info("%s: %s at step %d", workdir, status["state"], status["step"])
  return status


def _first_state(
    experiment: Experiment, source: dict[str, Any], workdir: str, manager: Any
) -> tuple[TrainState, dict[str, Any] | None]:
  """Restores the newest checkpoint, or makes the state before the first step.

  Returns:
    The state, and the copy of the run's records in the checkpoint. The copy is None if
    there is no checkpoint or it has no copy.
  """
  together = distributed.together
  restored = together(
      checkpoint.restore_newest, manager, checkpoint_target(experiment))
  checkpoint.remove_old(manager)
  if not restored:
    state = train_step.make_init_state(experiment)()
    source = distributed.put(source, experiment.replicated)
    if source and experiment.config.ema_decay:
      state = state._replace(ema=jax.tree.map(jnp.copy, source))
    return state._replace(**source), None
  if restored.run:
    before = config_lib.from_json(json.dumps(restored.run["config"]))
    together(run_files.check_same, workdir, before, experiment.config)
    together(checkpoint.check_same_data, workdir, restored.run, experiment.config)
    together(_check_same_teacher, workdir, restored.run, experiment)
  state = TrainState(*(restored.tree.get(name, {}) for name in TrainState._fields))
  return state, restored.run


def _check_same_teacher(
    workdir: str, before: dict[str, Any], experiment: Experiment
) -> None:
  """Checks that the teacher of a run is still the network that it was.

  Raises:
    errors.UsageError: It is another one.
  """
  now, then = (experiment.teacher and experiment.teacher.record), before.get("teacher")
  same = lambda name: (now or {}).get(name) == (then or {}).get(name)
  errors.check(all(map(same, ("config", "variables"))), "config.teacher",
               experiment.config.teacher, f"the network from which {workdir} learned"
               " when it was begun: another one is there now")


def _train_steps(
    run: _Run, state: TrainState, profile: traces.Steps | None
) -> dict[str, Any]:
  """Trains until the last step, or until the run diverges or must stop.

  Args:
    run: Objects that all steps share.
    state: State to train from.
    profile: Steps that are traced.

  Returns:
    The status of the run. Its state is "running" after the last step.
  """
  experiment, programs, step = run.experiment, run.programs, int(state.step)
  status = {"state": "running", "step": step}
  run.show(step)
  source: Any = experiment.data.train_batches(run.splits.train, step)
  with (contextlib.closing(source) as batches,
        traces.step_traced(run.workdir, profile) as trace):
    while status["state"] == "running" and step < experiment.num_steps:
      epoch = _validated_epoch(experiment, step + 1)
      codes = programs.weight_report(state.params)[0] if epoch else {}
      with trace.step(step):
        state, loss = programs.step(
            state, *run.progress.next_batch(batches))
      step += 1
      trace.stepped(step, loss)
      if run.progress.stepped(loss):
        run.journal.trains()
        run.stop.hold()
      run.show(step)
      if epoch or _is_pause(run, step):
        state, status = _pause(run, step, state, epoch, codes)
  return status


def _validated_epoch(experiment: Experiment, step: int) -> int:
  """Returns the number of the epoch that ends with this step and a validation.

  Epochs are counted from 1. The result is 0 if no such epoch ends with this step.
  """
  epoch, rest = divmod(step, experiment.steps_per_epoch)
  return epoch if rest == 0 and config_lib.is_validated(experiment.config, epoch) else 0


def _is_pause(run: _Run, step: int) -> bool:
  """Returns whether the loop pauses after this step although no epoch ends.

  A pause of several processes waits for all of them. Therefore they pause at the same
  steps.
  """
  if distributed.several():
    return step % MEETING_STEPS == 0
  return run.stop.requested or run.progress.due()


def _pause(
    run: _Run, step: int, state: TrainState, epoch: int, codes: dict[str, jax.Array]
) -> tuple[TrainState, dict[str, Any]]:
  """Ends the run, validates and saves it, or prints a line, whichever is due.

  Args:
    run: Objects that all steps share.
    step: Number of steps done.
    state: State after these steps.
    epoch: Number of the epoch that ends here with a validation; 0 if none does.
    codes: Codes of the weights before the last step, by layer. They are empty unless an
      epoch ends here.

  Returns:
    The state to train from, and the status of the run.
  """
  stops = distributed.any_of(run.stop.requested)
  totals = jax.device_get(state.totals)
  if totals.diverged_at >= 0:
    return state, run_files.write_status(
        run.workdir, "diverged", int(totals.diverged_at))
  if not (epoch or stops):
    if run.progress.due():
      _log.info("step %d/%d: loss %.4f; %s", step, run.experiment.num_steps,
                totals.loss / totals.count, run.progress.line())
    return state, {"state": "running", "step": step}

  rate = run.progress.pause()
  if distributed.several():
    _log.info("%s", stragglers.gather_line(run.progress.seconds_per_step()))
  if epoch:
    state = state._replace(totals=run.programs.no_totals())
  tree = _saved(state)
  if run.experiment.config.reestimate_batches:
    tree["reestimated_batch_stats"] = run.programs.reestimate(
        **checkpoint.hard_variables(tree),
        batches=run.experiment.data.train_batches(run.splits.train, 0))
  finish = lambda: None
  if epoch:
    trained = _train_line(run, step, totals, rate, codes, state.params)
    finish = _start_evaluation(run, step, epoch, trained, tree)
  checksum = checkpoint.checksum(tree)  # Meanwhile, the devices evaluate.
  return state, _save(run, step, tree, finish(), checksum)


def _train_line(
    run: _Run, step: int, totals: Totals, rate: float | None,
    codes: dict[str, jax.Array], params: Any
) -> dict[str, Any]:
  """Makes the line of the training split: means since the last line, and rates.

  The flip rate compares the codes before and after the last step only.
  """
  experiment = run.experiment
  new_codes, distance = run.programs.weight_report(params)
  flip_rates, distance = jax.device_get(
      (run.programs.flip_rates(codes, new_codes), distance))
  return {
      "split": "train",
      "mode": "mixed",
      "loss": float(totals.loss / totals.count),
      "accuracy": float(totals.correct / totals.count),
      "alpha": np.asarray(experiment.alpha(step - 1)).tolist(),
      "learning_rate": float(experiment.learning_rate(step - 1)),
      "examples_per_second": rate,
      "flip_rate": {path: float(flip_rates[path]) for path in codes},
      "weight_distance": {path: float(value) for path, value in distance.items()},
      **experiment.data.report(run.splits.train),
  }


def _start_evaluation(
    run: _Run, step: int, epoch: int, trained: dict[str, Any], tree: dict[str, Any]
) -> Callable[[], float]:
  """Starts to evaluate the networks after an epoch.

  The hard network is folded on the host while the devices evaluate the mixed one.

  Args:
    run: Objects that all steps share.
    step: Number of steps done.
    epoch: Number of epochs done.
    trained: Line of the training split.
    tree: Arrays that the checkpoint of this step will hold.

  Returns:
    A function that waits for the results, records and shows them, and returns the hard
    network's accuracy on the validation split.
  """
  config, evaluator, splits = run.experiment.config, run.programs.evaluator, run.splits
  mixed_variables = checkpoint.trained_variables(tree)
  hard_variables = checkpoint.hard_variables(tree)
  alpha: Any = np.asarray(run.experiment.alpha(step - 1))
  wait_mixed = evaluator.start_mixed(mixed_variables, splits.validation, alpha)
  wait_hard = evaluator.start_hard(hard_variables, splits.validation)

  def finish() -> float:
    mixed, hard = wait_mixed(), wait_hard()
    lines = [trained]
    if config.eval_train:
      lines.append({"split": "train", "mode": "hard",
                    **evaluator.hard(hard_variables, splits.train)})
    lines += [{"split": "validation", "mode": "mixed", **mixed},
              {"split": "validation", "mode": "hard", **hard}]
    counted = None
    if config.histogram_layers and epoch in config_lib.histogram_epochs(config):
      counted = run.programs.histogram(mixed_variables, splits.validation, alpha)
    _record(run, step, epoch, lines, counted)
    text = f"loss {trained['loss']:.4f}, validation accuracy {hard['accuracy']:.4f}"
    _log.info("epoch %d/%d: %s; %s", epoch, config.num_epochs, text,
              run.progress.line())
    run.show(step, text)
    return hard["accuracy"]

  return finish


def _record(
    run: _Run, step: int, epoch: int, lines: list[dict[str, Any]],
    counted: list[dict[str, Any]] | None,
) -> None:
  """Writes the measurements after an epoch, and histograms if there are any."""
  if run.writer:
    for line in lines:
      run.writer.write({"step": step, "epoch": epoch, **line})
    if counted is not None:
      run.writer.write_histograms(step, epoch, counted)


def _save(
    run: _Run, step: int, tree: dict[str, Any], accuracy: float | None, checksum: int
) -> dict[str, Any]:
  """Saves a checkpoint, and returns the status: "preempted" if the run must stop."""
  if run.writer:
    # A disk must have the records before the checkpoint. For gs://, see `outbox`.
    run.writer.sync()
  checkpoint.save(run.manager, step, tree, accuracy, {
      "config": config_lib.to_fields(run.experiment.config),
      "data": run.experiment.data_facts,
      "teacher": run.experiment.teacher and run.experiment.teacher.record,
      "journal": run.journal.content,
      **(run.writer.lines if run.writer else {})}, checksum)
  run.journal.note(LINE_SECONDS)
  status = run_files.write_status(run.workdir, "running", step)
  if distributed.any_of(run.stop.requested) and step < run.experiment.num_steps:
    run.manager.wait_until_finished()
    return run_files.write_status(run.workdir, "preempted", step)
  run.progress.resume()
  return status


def _test(run: _Run) -> dict[str, Any]:
  """Evaluates the last and the best checkpoint on the test split.

  The results are recorded in metrics.jsonl. The confusion matrix of the last
  checkpoint, which `minw.pack` takes, is written to confusion.json.

  Returns:
    The results for status.json.
  """
  experiment, manager = run.experiment, run.manager
  # On gs://, a process can see the checkpoint before process 0 has completed it.
  distributed.together(manager.wait_until_finished)
  # The status "done" relies on the checkpoints. They must be on the disk before it.
  files.sync_folder(manager.directory)
  target = checkpoint_target(experiment)
  with checkpoint.reading(manager) as reader:
    last = checkpoint.restore(reader, experiment.num_steps, target)
    best = checkpoint.restore_best(reader, target)
  assert best is not None  # The last checkpoint was read above.
  status = {"best_step": best.step}
  for which, prefix, saved in (("last", "test", last), ("best", "best_test", best)):
    result, matrix = run.programs.evaluator.confused(
        checkpoint.hard_variables(saved.tree), run.splits.test)
    status |= {f"{prefix}_{name}": value for name, value in result.items()}
    if run.writer:
      run.writer.write({
          "step": experiment.num_steps, "epoch": experiment.config.num_epochs,
          "split": "test", "mode": "hard", "checkpoint": which,
          "checkpoint_step": saved.step, **result})
      if which == "last":
        confusion.write(
            os.path.join(run.workdir, "confusion.json"),
            {"split": "test", "mode": "hard", "step": saved.step, **result,
             **confusion.results(matrix, experiment.info.label_names)})
  return status


def checkpoint_target(experiment: Experiment) -> dict[str, jax.ShapeDtypeStruct]:
  """Returns shapes, dtypes and shardings of the arrays in a checkpoint of the run."""
  state = train_step.abstract_state(experiment)
  tree = _saved(state)
  if experiment.config.reestimate_batches:
    tree["reestimated_batch_stats"] = state.batch_stats
  return tree


def _saved(state: TrainState) -> dict[str, Any]:
  """The parts of the state that are in a checkpoint."""
  tree = state._asdict()
  if not state.ema:
    del tree["ema"]
  return tree


def read_source(workdir: str, experiment: Experiment) -> dict[str, Any]:
  """Reads the trained variables of another run, from which this run starts.

  Args:
    workdir: Directory of the other run, or "" for none. Its network has the same shapes
      as that of this run. Its bits may differ.
    experiment: Experiment of this run.

  Returns:
    A dict with "params" and "batch_stats". It is empty if `workdir` is "".

  Raises:
    errors.UsageError: There is no such run, or the shapes differ.
  """
  if not workdir:
    return {}
  saved = checkpoint.read_named("init_from", workdir).saved
  source = checkpoint.trained_variables(saved.tree)
  shapes = lambda tree: {
      jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape
      for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
  theirs = shapes(source)
  ours = shapes(checkpoint.trained_variables(
      jax.eval_shape(lambda: train_step.init_state(experiment))._asdict()))
  different = [f"{path} {theirs.get(path, 'missing')} there, "
               f"{ours.get(path, 'missing')} here"
               for path in sorted({*theirs, *ours})
               if theirs.get(path) != ours.get(path)]
  errors.check(not different, "config.init_from", workdir,
               "a run of the same shapes: " + "; ".join(different[:3]))
  return source
