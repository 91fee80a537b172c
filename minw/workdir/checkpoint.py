"""Checkpoints of a run: Orbax, with a checksum, and a step back from a damaged one.

`read_run` reads a run from its workdir, for those who do not train it.
"""

import functools
import json
import logging
import os
import pathlib
import re
import shutil
import sys
import time
from typing import Any, Callable, NamedTuple, Sequence
import weakref
import zlib

from absl import logging as absl_logging
import jax
import numpy as np
import orbax.checkpoint as ocp

from minw import config as config_lib
from minw import distributed
from minw import errors
from minw import json_files
from minw.workdir import run_files

_log = logging.getLogger(__name__)

_CLOSED = "Event loop is closed"  # What asyncio says.


class Restored(NamedTuple):
  """The content of a checkpoint.

  Attributes:
    step: how many steps were trained.
    tree: what was saved.
    run: what the run had recorded until then, see `save`; None of a checkpoint without.
  """

  step: int
  tree: dict[str, Any]
  run: dict[str, Any] | None = None


class Manager(ocp.CheckpointManager):
  """The checkpoints of a run, and whether they may be changed.

  Attributes:
    folder: The folder of the checkpoints.
    read_only: Whether nothing is saved, deleted or moved.
  """

  def __init__(
      self, directory: Any, options: ocp.CheckpointManagerOptions, **arguments: Any
  ):
    super().__init__(directory, options=options, **arguments)
    self.folder = pathlib.Path(self.directory)
    self.read_only = options.read_only


def open_manager(workdir: str, read_only: bool = False) -> Manager:
  """The checkpoints of `workdir`: the two newest and that with the best accuracy.

  Raises:
    errors.UsageError: Orbax cannot handle the path of `workdir` on this system.
  """
  for name in ("absl", "concurrent.futures"):
    logging.getLogger(name).addFilter(_is_news)
  _silence_callbacks()
  folder, close = _plainly_named(pathlib.Path(workdir).resolve())
  directory = folder / "checkpoints"
  if read_only:
    options = ocp.CheckpointManagerOptions(
        read_only=True, create=False, save_interval_steps=0)
  else:
    options = ocp.CheckpointManagerOptions(
        cleanup_tmp_directories=True, preservation_policy=_NewestAndBest(directory))
  verbosity = absl_logging.get_verbosity()
  if read_only:  # Orbax warns that it is so.
    absl_logging.set_verbosity(absl_logging.ERROR)
  try:
    manager = Manager(
        directory, options,
        item_handlers={"tree": ocp.StandardCheckpointHandler(),
                       "record": ocp.JsonCheckpointHandler(),
                       "run": ocp.JsonCheckpointHandler()})
  finally:
    absl_logging.set_verbosity(verbosity)
  weakref.finalize(manager, close)
  return manager


@functools.cache  # Once.
def _silence_callbacks() -> None:
  """Keeps TensorStore from printing tracebacks that follow from another error.

  When one of its writes fails, Orbax raises that error and closes its event loop. The
  other writes then find the loop closed, which nobody can handle any more.
  """
  show = sys.unraisablehook

  def show_news(unraisable):
    if str(unraisable.exc_value) != _CLOSED:
      show(unraisable)

  sys.unraisablehook = show_news


def _is_news(entry: logging.LogRecord) -> bool:
  """False for tracebacks of an error that Orbax raises as well."""
  error = entry.exc_info[1] if entry.exc_info else None
  return error is None or not (
      "orbax" in entry.pathname or str(error) == _CLOSED)


def _plainly_named(
    folder: pathlib.Path,
) -> tuple[pathlib.Path, Callable[[], None]]:
  """A path of `folder` that Orbax and TensorStore take literally.

  Orbax looks for files by shell-style patterns that begin with the folder's path, where
  "[0]" stands for "0". TensorStore refuses backslashes, and "/gs/" at the beginning
  stands for cloud storage. A folder with such a path is opened here and reached through
  Linux's name for open files, /proc/self/fd/NUMBER.

  Returns:
    The path, and a function to call when it is no longer needed.

  Raises:
    errors.UsageError: the system has no names for open files.
  """
  if re.fullmatch(r"[\w./ =+,@-]*", str(folder), re.ASCII) and not re.match(
      "/(gs|s3|az|hf)(/|$)", str(folder)):
    return folder, lambda: None
  names = pathlib.Path("/proc/self/fd")
  errors.check(names.is_dir(), "workdir", str(folder),
               "a path of letters, digits, spaces"
               " and . / = + , @ - _ on systems other than Linux")
  number = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
  return names / str(number), lambda: os.close(number)


class _NewestAndBest:
  """Tells Orbax what to keep.

  Orbax has such policies, but they rely on a record of metrics that it neither protects
  nor can do without once it is damaged.
  """

  def __init__(self, directory: pathlib.Path):
    self._directory = directory

  def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
    del context
    return _are_kept([  # The newest is still being written.
        (info.metrics["accuracy"], info.step) if info.metrics
        else _rank(self._directory, info.step) for info in checkpoints])


def _are_kept(ranks: Sequence[tuple[float, int]]) -> list[bool]:
  """Which checkpoints stay: the two newest and the best, each given by its rank."""
  newest = sorted(step for _, step in ranks)[-2:]
  return [rank == max(ranks) or rank[1] in newest for rank in ranks]


def remove_old(manager: Manager) -> None:
  """Removes the checkpoints that `save` would have removed.

  A process that is killed after a save leaves one of them, whole or in part.
  """
  def old() -> list[int]:
    ranks = [_rank(manager.folder, step) for step in sorted(manager.all_steps())]
    return [step for (_, step), kept in zip(ranks, _are_kept(ranks)) if not kept]

  for step in distributed.on_main(old):
    manager.delete(step)


def save(
    manager: ocp.CheckpointManager,
    step: int,
    tree: dict[str, Any],
    accuracy: float | None,
    run: dict[str, Any] | None = None,
) -> None:
  """Saves in the background; of several processes each writes a part.

  Args:
    manager: of the workdir.
    step: how many steps were trained.
    tree: arrays.
    accuracy: of the validation split, by which the best is chosen; None if unknown.
    run: what the files of the workdir hold that the run would lose with them, as JSON.
  """
  manager.save(
      step,
      args=ocp.args.Composite(
          tree=ocp.args.StandardSave(tree),
          record=ocp.args.JsonSave(
              {"accuracy": accuracy, "crc32": _crc32(tree, accuracy),
               "run": run is not None}),
          **({} if run is None
             else {"run": ocp.args.JsonSave(json_files.sealed(run))})),
      metrics=None if accuracy is None else {"accuracy": accuracy})


def restore(
    manager: ocp.CheckpointManager, step: int, target: Any = None
) -> Restored:
  """Reads one checkpoint.

  Each process reads all of it, and so comes to the same result.

  Args:
    manager: of the workdir.
    step: one of `manager.all_steps()`.
    target: tree of jax.ShapeDtypeStruct with shardings; if None, nested dicts and lists
      of arrays on one device.

  Raises:
    Exception: whatever the damage leads to; ValueError if the checksum differs.
  """
  # Also where a target is given: whoever reads a checkpoint finds the same faults in
  # it.
  described = manager.item_metadata(step)["tree"]
  wanted = described if target is None else target
  on_host = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), wanted)
  # Earlier versions of minw have not saved it.
  has_run = (pathlib.Path(manager.directory) / str(step) / "run").exists()
  saved: Any = manager.restore(
      step,
      args=ocp.args.Composite(
          tree=ocp.args.StandardRestore(on_host), record=ocp.args.JsonRestore(),
          **({"run": ocp.args.JsonRestore()} if has_run else {})))
  if _crc32(saved.tree, saved.record["accuracy"]) != saved.record["crc32"]:
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
  """Reads the newest checkpoint that is whole; None if none was ever saved.

  Damaged ones are moved aside, unless the manager is read-only, so that the run can
  save those steps again.

  Raises:
    errors.UsageError: there are checkpoints, and none of them can be read.
  """
  steps = distributed.on_main(lambda: sorted(manager.all_steps(), reverse=True))
  return _restore_first(manager, steps, target)


def restore_best(
    manager: Manager, target: Any = None
) -> Restored | None:
  """Reads the checkpoint of the best validation accuracy, the latest of equals.

  Damaged ones, None and errors: as `restore_newest`.
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
    distributed.on_main(_move_aside, pathlib.Path(manager.directory), damaged)
    manager.reload()
  return restored


def trained_variables(tree: dict[str, Any]) -> dict[str, Any]:
  """The variables of a checkpoint's tree, with batch norm's running statistics."""
  return {"params": tree["params"], "batch_stats": tree["batch_stats"]}


def hard_variables(tree: dict[str, Any]) -> dict[str, Any]:
  """The variables of a checkpoint's tree that the hard network is folded from.

  Where batch norm's statistics were re-estimated, those count.
  """
  stats = tree.get("reestimated_batch_stats", tree["batch_stats"])
  return {"params": tree["params"], "batch_stats": stats}


def read_run(workdir: str, which: str = "last") -> tuple[Any, Restored]:
  """The config and a checkpoint of a run.

  Args:
    workdir: of the run.
    which: "last", or "best" in validation accuracy.

  Raises:
    errors.UsageError: there is no run, its config cannot be used, or no checkpoint.
  """
  config = run_files.read_config(workdir)
  try:
    config_lib.validate(config)
  except errors.UsageError as error:
    path = pathlib.Path(workdir) / "config.json"
    raise errors.UsageError(f"{path}: {error}") from error
  saved = None
  if (pathlib.Path(workdir) / "checkpoints").is_dir():
    with open_manager(workdir, read_only=True) as manager:
      saved = (restore_best if which == "best" else restore_newest)(manager)
  if saved is None:
    raise errors.bad_value("workdir", workdir, "a run that has a checkpoint")
  return config, saved


def newest_step(workdir: str) -> int:
  """The step of the newest checkpoint, without opening it; 0 if there is none."""
  directory = pathlib.Path(workdir) / "checkpoints"
  names = os.listdir(directory) if directory.is_dir() else []
  return max((int(name) for name in names if name.isdecimal()), default=0)


def discard_unfinished(workdir: str) -> None:
  """Removes what a failed save left, which frees the disk; no save may be going on."""
  for path in (pathlib.Path(workdir) / "checkpoints").glob("*.orbax-checkpoint-tmp"):
    shutil.rmtree(path, ignore_errors=True)


def _real(manager):
  """The directory of the checkpoints by its own name, for messages."""
  return os.path.realpath(manager.directory)


def _move_aside(directory: pathlib.Path, steps: Sequence[int]) -> None:
  aside = directory.with_name("damaged_checkpoints")
  aside.mkdir(exist_ok=True)
  for step in steps:
    (directory / str(step)).rename(aside / f"{step}.{time.time_ns()}")


def _rank(directory: pathlib.Path, step: int) -> tuple[float, int]:
  """What checkpoints are ordered by: accuracy, -1 if it is not known, and step."""
  try:
    record = (pathlib.Path(directory) / str(step) / "record" / "metadata").read_text()
    return float(json.loads(record)["accuracy"]), step
  except (OSError, ValueError, LookupError, TypeError):
    return -1.0, step


def _crc32(tree: Any, accuracy: float | None) -> int:
  """A checksum of all arrays, in any order: Orbax does not notice every flipped bit."""
  arrays = map(distributed.whole, jax.tree.leaves(tree))
  parts = (np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
           for array in arrays)
  return (sum(map(zlib.crc32, parts)) + zlib.crc32(repr(accuracy).encode())) % 2**32
