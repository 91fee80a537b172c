"""Checkpoints of a run, written by Orbax and protected by a checksum.

If the newest checkpoint is damaged, an older one is read. `read_run` reads a run from
its workdir without training it.
"""

from concurrent import futures
import contextlib
import functools
import json
import logging
import os
import pathlib
import re
import shutil
import sys
import time
from typing import Any, Callable, Iterator, NamedTuple, Sequence
import weakref
import zlib

from absl import logging as absl_logging
import jax
import numpy as np
import orbax.checkpoint as ocp

from minw import cloud
from minw import config as config_lib
from minw import distributed
from minw import errors
from minw import json_files
from minw import paths
from minw.data import datasets
from minw.data import mirror
from minw.workdir import run_files

_log = logging.getLogger(__name__)

_CHECKSUM_THREADS = 4  # Number of threads that compute checksums of arrays.
_CLOSED = "Event loop is closed"  # Message of asyncio's RuntimeError.


class Restored(NamedTuple):
  """Content of a checkpoint.

  Attributes:
    step: Number of steps that were trained.
    tree: Arrays that were saved.
    run: Records of the run up to that step, see `save`. None if the checkpoint has no
      records.
  """

  step: int
  tree: dict[str, Any]
  run: dict[str, Any] | None = None


class Manager(ocp.CheckpointManager):
  """Orbax's manager of the checkpoints of a run.

  Attributes:
    folder: Folder of the checkpoints.
    read_only: Whether saving, deleting and moving checkpoints is forbidden.
  """

  def __init__(
      self, directory: Any, options: ocp.CheckpointManagerOptions, **arguments: Any
  ):
    super().__init__(directory, options=options, **arguments)
    self.folder = paths.at(self.directory)
    self.read_only = options.read_only
    if isinstance(self.folder, cloud.Path):
      self._checkpoint_deleter = _Remover(self.folder)


class _Remover:
  """Removes checkpoints on gs:// with one request for each object.

  Orbax's own class makes about 60 requests for a checkpoint. This one deletes first
  what says that a checkpoint is complete, and nothing that another process has written
  again.
  """

  def __init__(self, folder: cloud.Path):
    self._folder = folder

  def delete(self, step: int) -> None:
    """Removes the checkpoint of a step."""
    if distributed.is_main():
      cloud.check_owned(self._folder.parent)
      (self._folder / str(step)).remove(first=run_files.COMPLETE)

  def delete_steps(self, steps: Sequence[int]) -> None:
    """Removes the checkpoints of some steps."""
    for step in steps:
      self.delete(step)

  def close(self) -> None:
    """Does nothing. Orbax calls it at the end."""


def open_manager(workdir: str, read_only: bool = False) -> Manager:
  """Opens the checkpoints of a run.

  The manager keeps the checkpoints of the last two epochs, those that a preemption has
  saved since then (the two newest), and the one with the best accuracy.

  Args:
    workdir: Directory of the run.
    read_only: Whether the checkpoints must not be changed.

  Raises:
    errors.UsageError: Orbax cannot handle the path of `workdir` on this system, or may
      not ask for the properties of its bucket.
  """
  for name in ("absl", "concurrent.futures"):
    logging.getLogger(name).addFilter(_is_news)
  _silence_callbacks()
  folder, close = _plainly_named(paths.at(paths.real(workdir)))
  directory = folder / "checkpoints"
  if read_only:
    options = ocp.CheckpointManagerOptions(
        read_only=True, create=False, save_interval_steps=0)
  else:
    options = ocp.CheckpointManagerOptions(
        cleanup_tmp_directories=True, preservation_policy=_NewestAndBest(directory),
        temporary_path_class=(
            _owned(folder) if isinstance(folder, cloud.Path) else None))
  verbosity = absl_logging.get_verbosity()
  if read_only:  # Suppress the warning of Orbax that the manager is read-only.
    absl_logging.set_verbosity(absl_logging.ERROR)
  try:
    manager = Manager(
        str(directory), options,
        item_handlers={"tree": ocp.StandardCheckpointHandler(),
                       "record": ocp.JsonCheckpointHandler(),
                       "run": ocp.JsonCheckpointHandler()})
  finally:
    absl_logging.set_verbosity(verbosity)
  weakref.finalize(manager, close)
  return manager


@contextlib.contextmanager
def reading(manager: Manager) -> Iterator[Manager]:
  """Context with a manager that can read what `manager` has saved.

  On gs://, Orbax's manager itself cannot, except in process 0: elsewhere it keeps
  taking the checkpoint for one that is being written. All processes call this.
  """
  if isinstance(manager.folder, cloud.Path) and distributed.several():
    with open_manager(str(manager.folder.parent), read_only=True) as reader:
      yield reader
  else:
    yield manager


@functools.cache  # Install the hook only once.
def _silence_callbacks() -> None:
  """Keeps TensorStore from printing tracebacks that follow from another error.

  When a write of TensorStore fails, Orbax raises that error and closes its event loop.
  The other writes then fail because the loop is closed, and nothing can catch their
  errors any more.
  """
  show = sys.unraisablehook

  def show_news(unraisable):
    if str(unraisable.exc_value) != _CLOSED:
      show(unraisable)

  sys.unraisablehook = show_news


def _is_news(entry: logging.LogRecord) -> bool:
  """Returns False for tracebacks of an error that Orbax raises as well."""
  error = entry.exc_info[1] if entry.exc_info else None
  return error is None or not (
      "orbax" in entry.pathname or str(error) == _CLOSED)


def _plainly_named(
    folder: paths.AnyPath,
) -> tuple[paths.AnyPath, Callable[[], None]]:
  """Returns a path of `folder` that Orbax and TensorStore take literally.

  Orbax finds files by shell-style patterns that begin with the path of the folder, and
  in a pattern "[0]" matches "0". TensorStore rejects backslashes, and treats a path
  that begins with "/gs/" as cloud storage. A folder with such a path is opened here and
  reached through Linux's name for open files, /proc/self/fd/NUMBER.

  Returns:
    The path, and a function to call when it is no longer needed.

  Raises:
    errors.UsageError: The system has no names for open files, or a right to the bucket
      is missing.
  """
  if isinstance(folder, cloud.Path):
    cloud.prepare_orbax()
    try:
      cloud.check_properties(folder.bucket)
    except PermissionError as error:
      raise errors.UsageError(f"{error.filename}: {error.strerror}") from error
    return folder, lambda: None
  if re.fullmatch(r"[\w./ =+,@-]*", str(folder), re.ASCII) and not re.match(
      "/(gs|s3|az|hf)(/|$)", str(folder)):
    return folder, lambda: None
  names = pathlib.Path("/proc/self/fd")
  errors.check(names.is_dir(), "workdir", str(folder),
               "a path of letters, digits, spaces"
               " and . / = + , @ - _ on systems other than Linux")
  number = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
  return names / str(number), lambda: os.close(number)


def _owned(workdir: cloud.Path) -> type[ocp.path.atomicity.CommitFileTemporaryPath]:
  """Returns Orbax's class of folders that are written, for those of the owner only.

  Orbax's writes do not name the generations that they replace. A process that was
  suspended amid a checkpoint, and has lost its workdir to a successor, must not declare
  parts of that checkpoint complete.
  """
  class Owned(ocp.path.atomicity.CommitFileTemporaryPath):
    async def finalize(self, *arguments: Any) -> None:
      cloud.check_owned(workdir)
      await super().finalize(*arguments)

  return Owned


class _NewestAndBest:
  """Policy that tells Orbax which checkpoints to keep.

  Orbax has such policies itself. But they rely on its record of metrics, which has no
  checksum, and they fail if that record is damaged.
  """

  def __init__(self, directory: paths.AnyPath):
    self._directory = directory

  def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
    del context
    # The newest checkpoint is still being written. Its accuracy is known from `metrics`
    # and not from the disk.
    return _are_kept([
        (info.metrics["accuracy"], info.step) if info.metrics
        else _rank(self._directory, info.step) for info in checkpoints])


def _are_kept(ranks: Sequence[tuple[float, int]]) -> list[bool]:
  """Returns which checkpoints are kept, as `open_manager` describes it.

  A checkpoint that a preemption saved amid an epoch has no accuracy. It is not kept
  after that epoch, so that a run which was preempted ends with the same checkpoints as
  one which was not.

  Args:
    ranks: (accuracy, step) of each checkpoint, see `_rank`.
  """
  ends = sorted(step for accuracy, step in ranks if accuracy >= 0)
  amid = sorted(step for accuracy, step in ranks
                if accuracy < 0 and step > max(ends, default=0))
  kept = {*ends[-2:], *amid[-2:], max(ranks)[1]} if ranks else set()
  return [step in kept for _, step in ranks]


def remove_old(manager: Manager) -> None:
  """Removes the checkpoints that `save` would have removed.

  If a process is killed after a save, an old checkpoint stays, whole or in part.
  """
  def old() -> list[int]:
    ranks = [_rank(manager.folder, step) for step in sorted(manager.all_steps())]
    return [step for (_, step), kept in zip(ranks, _are_kept(ranks)) if not kept]

  for step in distributed.on_main(old):
    manager.delete(step)


def save(
    manager: Manager,
    step: int,
    tree: dict[str, Any],
    accuracy: float | None,
    run: dict[str, Any] | None = None,
    arrays_checksum: int | None = None,
) -> None:
  """Saves a checkpoint in the background.

  If a run has several processes, each writes a part of it.

  Args:
    manager: Manager of the workdir, see `open_manager`.
    step: Number of steps that were trained.
    tree: Arrays to save.
    accuracy: Accuracy on the validation split, by which the best checkpoint is chosen.
      None if it is unknown.
    run: Records of the run as JSON. Files of the workdir that are lost or damaged are
      restored from it.
    arrays_checksum: The `checksum` of `tree`, if it is known.

  Raises:
    OSError: The workdir is on gs://, and another process has taken it over.
  """
  if isinstance(manager.folder, cloud.Path):
    cloud.check_owned(manager.folder.parent)
  if arrays_checksum is None:
    arrays_checksum = checksum(tree)
  manager.save(
      step,
      args=ocp.args.Composite(
          tree=ocp.args.StandardSave(tree),
          record=ocp.args.JsonSave(
              {"accuracy": accuracy, "crc32": _crc32(arrays_checksum, accuracy),
               "run": run is not None}),
          **({} if run is None
             else {"run": ocp.args.JsonSave(json_files.sealed(run))})),
      metrics=None if accuracy is None else {"accuracy": accuracy})


def restore(
    manager: Manager, step: int, target: Any = None
) -> Restored:
  """Reads one checkpoint.

  Each process reads the whole checkpoint. Therefore all get the same result.

  Args:
    manager: Manager of the workdir, see `open_manager`.
    step: One of `manager.all_steps()`.
    target: Tree of jax.ShapeDtypeStruct with shardings. If None, the result has nested
      dicts and lists of arrays on one device.

  Raises:
    Exception: The checkpoint is damaged. The type depends on the damage. It is
      ValueError if the checksum differs.
  """
  # The metadata are read even if a target is given. Then every reader finds the same
  # faults.
  described = manager.item_metadata(step)["tree"]
  wanted = described if target is None else target
  on_host = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), wanted)
  # Checkpoints of earlier versions of minw have no such part.
  has_run = paths.is_dir(manager.folder / str(step) / "run")
  saved: Any = manager.restore(
      step,
      args=ocp.args.Composite(
          tree=ocp.args.StandardRestore(on_host), record=ocp.args.JsonRestore(),
          **({"run": ocp.args.JsonRestore()} if has_run else {})))
  if _crc32(checksum(saved.tree), saved.record["accuracy"]) != saved.record["crc32"]:
    raise ValueError("the checksum differs")
  if has_run != saved.record.get("run", False):
    raise ValueError("a part is missing")
  run = None
  if has_run:
    json_files.check_sealed(saved.run)
    run = saved.run
  if target is None:
    return Restored(step, jax.device_put(saved.tree, jax.local_devices()[0]), run)
  shardings = jax.tree.map(lambda leaf: leaf.sharding, target)
  return Restored(step, distributed.put(saved.tree, shardings), run)


def restore_newest(
    manager: Manager, target: Any = None
) -> Restored | None:
  """Reads the newest checkpoint that is whole.

  Damaged checkpoints are moved to `damaged_checkpoints`, so that the run can save those
  steps again. A read-only manager moves nothing.

  Args:
    manager: Manager of the workdir, see `open_manager`.
    target: See `restore`.

  Returns:
    The checkpoint, or None if none was ever saved.

  Raises:
    errors.UsageError: There are checkpoints, and none of them can be read.
  """
  steps = distributed.on_main(lambda: sorted(manager.all_steps(), reverse=True))
  return _restore_first(manager, steps, target)


def restore_best(
    manager: Manager, target: Any = None
) -> Restored | None:
  """Reads the checkpoint with the best validation accuracy.

  Of several checkpoints with that accuracy it reads the latest. Damaged checkpoints,
  the result and errors are as described for `restore_newest`.
  """
  rank = lambda step: _rank(manager.folder, step)
  steps = distributed.on_main(
      lambda: sorted(manager.all_steps(), key=rank, reverse=True))
  return _restore_first(manager, steps, target)


def _restore_first(manager, steps, target):
  damaged = []
  for step in steps:
    restored = None
    try:
      restored = restore(manager, step, target)
    except Exception as error:  # pylint: disable=broad-exception-caught
      reason = str(error).strip().split("\n")[0]
      _log.warning("checkpoint %d in %s is damaged (%s); trying another",
                   step, _real(manager), reason)
    if not distributed.any_of(restored is None):
      break
    damaged.append(step)
  else:
    if damaged:
      raise errors.UsageError(
          f"checkpoints in {_real(manager)}: all are damaged ({damaged}); move them"
          " away to start from the beginning")
    return None
  if damaged and not manager.read_only:
    distributed.on_main(_move_aside, manager.folder, damaged)
    manager.reload()
  return restored


def trained_variables(tree: dict[str, Any]) -> dict[str, Any]:
  """Returns a checkpoint's variables with the running statistics of batch norm."""
  return {"params": tree["params"], "batch_stats": tree["batch_stats"]}


def hard_variables(tree: dict[str, Any]) -> dict[str, Any]:
  """Returns a checkpoint's variables from which the hard network is folded.

  If the checkpoint has a moving average of the variables, that is what is folded. If
  batch norm's statistics were re-estimated, these replace the running statistics.
  """
  variables = tree.get("ema") or tree
  stats = tree.get("reestimated_batch_stats", variables["batch_stats"])
  return {"params": variables["params"], "batch_stats": stats}


class Run(NamedTuple):
  """A run that `read_run` has read.

  Attributes:
    config: Config of the run.
    saved: One of its checkpoints.
    status: Status of the run, or None if it has no status.json.
  """

  config: config_lib.Config
  saved: Restored
  status: dict[str, Any] | None


def read_run(
    workdir: str, which: str = "last", data_dir: str | None = None) -> Run:
  """Reads the config, a checkpoint and the status of a run.

  Args:
    workdir: Directory of the run.
    which: "last" for the newest checkpoint, or "best" for the one with the best
      validation accuracy.
    data_dir: Directory of the prepared data sets that the config is checked with, if
      it is another one than the config names.

  Raises:
    errors.UsageError: There is no run, its config cannot be used, it has no checkpoint,
      its status is damaged, or its data set has changed.
  """
  config = run_files.read_config(workdir)
  try:
    config_lib.validate(config if data_dir is None else config_lib.copy(
        config, data_dir=data_dir))
  except errors.UsageError as error:
    path = paths.at(workdir) / "config.json"
    raise errors.UsageError(f"{path}: {error}") from error
  saved = None
  if paths.is_dir(paths.at(workdir) / "checkpoints"):
    with open_manager(workdir, read_only=True) as manager:
      saved = (restore_best if which == "best" else restore_newest)(manager)
  if saved is None:
    raise errors.bad_value("workdir", workdir, "a run that has a checkpoint")
  check_same_data(workdir, saved.run, config, data_dir)
  status = run_files.read_status(workdir)
  expected = _expected_step(status, which)
  done = status is not None and status["state"] == "done"
  # If a run is not done, its last save may be ahead of its status.
  if expected is not None and (
      expected != saved.step if done else expected > saved.step):
    _log.warning("%s: the checkpoint of step %d is missing; that of step %d is used",
                 workdir, expected, saved.step)
  return Run(config, saved, status)


def read_named(field: str, workdir: str, data_dir: str | None = None) -> Run:
  """Reads the last checkpoint of the run that a field of a config names.

  Args:
    field: Name of the field.
    workdir: Its value, a path as a user wrote it.
    data_dir: See `read_run`.

  Raises:
    errors.UsageError: See `read_run`. The message names the field and its value.
  """
  try:
    return read_run(paths.expand(workdir, remote=True), data_dir=data_dir)
  except errors.UsageError as error:
    raise errors.UsageError(
        f"config.{field}={errors.shown(workdir)}: {error}") from error


def _expected_step(status: dict[str, Any] | None, which: str) -> int | None:
  """Returns the step whose checkpoint `read_run` should find, or None if unknown."""
  if status is None or status["state"] == "diverged":  # Its step has no checkpoint.
    return None
  if which == "best":
    return status.get("best_step") if status["state"] == "done" else None
  return status["step"]


def check_same_data(
    workdir: str, run: dict[str, Any] | None, config: config_lib.Config,
    data_dir: str | None = None,
) -> None:
  """Checks that the data set of a run is still the one that it was trained on.

  A network folds the mean of its training images, and its labels are those of the data
  set. Other data in the same place would make another network of the same weights.

  Args:
    workdir: Directory of the run.
    run: Records of the run in its checkpoint, see `save`.
    config: Config of the run.
    data_dir: Directory of the prepared data sets, if the config names another one.

  Raises:
    errors.UsageError: The data set differs. The message says in what.
  """
  recorded = (run or {}).get("data")
  if recorded is None:
    return
  place = config.data_dir if data_dir is None else data_dir
  found = datasets.facts(datasets.info(
      config.dataset, mirror.place(place, config.cache_dir))) or {}
  different = [name for name, value in recorded.items() if found.get(name) != value]
  if different:
    raise errors.UsageError(
        f"workdir={workdir!r}: {config.dataset} in data_dir={place!r} is not the data"
        f" set that the run was trained on ({', '.join(different)} differ)")


def newest_step(workdir: str) -> int:
  """Returns the step of the newest checkpoint, or 0 if there is none.

  Only the names of folders are read.
  """
  return max(run_files.checkpoints(workdir), default=0)


def discard_unfinished(workdir: str) -> None:
  """Removes the files of failed saves to free the disk.

  The caller ensures that no save is in progress.
  """
  folder = paths.at(workdir) / "checkpoints"
  if isinstance(folder, pathlib.Path):  # On gs://, the next start removes them.
    for path in folder.glob("*.orbax-checkpoint-tmp"):
      shutil.rmtree(path, ignore_errors=True)


def _real(manager):
  """Returns the real path of the checkpoints, for messages; see `_plainly_named`."""
  return paths.real(manager.directory)


def _move_aside(directory: paths.AnyPath, steps: Sequence[int]) -> None:
  aside = directory.with_name("damaged_checkpoints")
  aside.mkdir(exist_ok=True)
  for step in steps:
    source: Any = directory / str(step)
    source.rename(aside / f"{step}.{time.time_ns()}")


def _rank(directory: paths.AnyPath, step: int) -> tuple[float, int]:
  """Returns the sort key of a checkpoint: its accuracy and its step.

  The accuracy is -1 if it is unknown.

  Raises:
    OSError: The checkpoint is on gs://, and that cannot be reached.
  """
  try:
    record = (directory / str(step) / "record" / "metadata").read_text()
    return float(json.loads(record)["accuracy"]), step
  except (OSError, ValueError, LookupError, TypeError) as error:
    if isinstance(directory, cloud.Path) and isinstance(
        error, OSError) and not isinstance(error, FileNotFoundError):
      raise  # An unknown accuracy would let the best checkpoint be removed.
    return -1.0, step


def checksum(tree: Any) -> int:
  """Computes a checksum of all arrays. Orbax itself does not notice every flipped bit.

  The checksums of the arrays are added. Therefore their order does not matter. Threads
  compute them while this one fetches the next array from the device.
  """
  leaves = jax.tree.leaves(tree)
  for leaf in leaves:
    if isinstance(leaf, jax.Array) and leaf.is_fully_addressable:
      leaf.copy_to_host_async()
  parts = (np.ascontiguousarray(distributed.whole(leaf)).reshape(-1).view(np.uint8).data
           for leaf in leaves)
  with futures.ThreadPoolExecutor(_CHECKSUM_THREADS) as pool:
    return sum(pool.map(zlib.crc32, parts))


def _crc32(arrays_checksum: int, accuracy: float | None) -> int:
  """Returns the checksum in a checkpoint's record, of its arrays and its accuracy."""
  return (arrays_checksum + zlib.crc32(repr(accuracy).encode())) % 2**32
