"""Checkpoints of a run: Orbax, with a checksum, and a step back from a damaged one."""

import logging
import pathlib
import time
from typing import Any, NamedTuple
import zlib

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from minw import cli

_log = logging.getLogger(__name__)


class Restored(NamedTuple):
  """What a checkpoint holds.

  Attributes:
    step: how many steps were trained.
    tree: what was saved.
  """

  step: int
  tree: dict[str, Any]


def open_manager(workdir: str, read_only: bool = False) -> ocp.CheckpointManager:
  """The checkpoints of `workdir`: the two newest and that with the best accuracy."""
  accuracy = lambda metrics: metrics["accuracy"]
  if read_only:
    options = ocp.CheckpointManagerOptions(
        best_fn=accuracy, read_only=True, create=False, save_interval_steps=0)
  else:
    options = ocp.CheckpointManagerOptions(
        best_fn=accuracy, cleanup_tmp_directories=True,
        preservation_policy=policies.AnyPreservationPolicy([
            policies.LatestN(2),
            policies.BestN(get_metric_fn=accuracy, n=1,
                           keep_checkpoints_without_metrics=False)]))
  return ocp.CheckpointManager(
      pathlib.Path(workdir).resolve() / "checkpoints", options=options,
      item_handlers={"tree": ocp.StandardCheckpointHandler(),
                     "checksum": ocp.JsonCheckpointHandler()})


def save(
    manager: ocp.CheckpointManager,
    step: int,
    tree: dict[str, Any],
    accuracy: float | None,
) -> None:
  """Saves in the background.

  Args:
    manager: of the workdir.
    step: how many steps were trained.
    tree: arrays.
    accuracy: of the validation split, by which the best is chosen; None if unknown.
  """
  manager.save(
      step,
      args=ocp.args.Composite(
          tree=ocp.args.StandardSave(tree),
          checksum=ocp.args.JsonSave({"crc32": _crc32(tree)})),
      metrics=None if accuracy is None else {"accuracy": accuracy})


def restore(
    manager: ocp.CheckpointManager, step: int, target: Any = None
) -> Restored:
  """Reads one checkpoint.

  Args:
    manager: of the workdir.
    step: one of `manager.all_steps()`.
    target: tree of jax.ShapeDtypeStruct with shardings; if None, nested dicts and lists
      of arrays on one device.

  Raises:
    Exception: whatever the damage leads to; ValueError if the checksum differs.
  """
  if target is None:
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    target = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device),
        manager.item_metadata(step)["tree"])
  saved = manager.restore(
      step,
      args=ocp.args.Composite(
          tree=ocp.args.StandardRestore(target), checksum=ocp.args.JsonRestore()))
  if _crc32(saved.tree) != saved.checksum["crc32"]:
    raise ValueError("the checksum differs")
  return Restored(step, saved.tree)


def restore_newest(
    manager: ocp.CheckpointManager, target: Any = None
) -> Restored | None:
  """Reads the newest checkpoint that is whole; None if none was ever saved.

  Damaged ones are moved aside, unless the manager is read-only, so that the run can
  save those steps again.

  Raises:
    cli.UsageError: there are checkpoints, and none of them can be read.
  """
  damaged = []
  for step in sorted(manager.all_steps(), reverse=True):
    try:
      restored = restore(manager, step, target)
    except Exception as error:  # pylint: disable=broad-exception-caught
      reason = str(error).strip().split("\n")[0]
      _log.warning("checkpoint %d in %s is damaged (%s); trying the one before",
                      step, manager.directory, reason)
      damaged.append(step)
    else:
      break
  else:
    if damaged:
      raise cli.UsageError(
          f"checkpoints in {manager.directory}: all are damaged ({damaged}); move them"
          " away to start from the beginning")
    return None
  if damaged and not manager._options.read_only:
    aside = pathlib.Path(manager.directory).with_name("damaged_checkpoints")
    aside.mkdir(exist_ok=True)
    for step in damaged:
      (pathlib.Path(manager.directory) / str(step)).rename(
          aside / f"{step}.{time.time_ns()}")
    manager.reload()
  return restored


def best_step(manager: ocp.CheckpointManager) -> int | None:
  """The step of the best validation accuracy, the latest of equals; None if none."""
  scored = [(metrics["accuracy"], step) for step in manager.all_steps()
            if (metrics := manager.metrics(step))]
  return max(scored)[1] if scored else None


def _crc32(tree: Any) -> int:
  """A checksum of all arrays, in any order: Orbax does not notice every flipped bit."""
  leaves = jax.tree.leaves(jax.device_get(tree))
  return sum(zlib.crc32(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8))
             for leaf in leaves) % 2**32
