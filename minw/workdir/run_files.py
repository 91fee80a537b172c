"""config.json, status.json and the claim of a workdir.

Each file is replaced as a whole. Therefore it is complete at any moment.
"""

import contextlib
import errno
import json
import logging
from typing import Any, ContextManager, Iterator

from minw import cloud
from minw import config as config_lib
from minw import config_fields
from minw import distributed
from minw import errors
from minw import exit_codes
from minw import files
from minw import json_files
from minw import paths
from minw import stopping
from minw.workdir import locks

_log = logging.getLogger(__name__)

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)


@contextlib.contextmanager
def claimed(workdir: str, config: Any) -> Iterator[None]:
  """Context in which `workdir` belongs to a run of `config` and to no other process.

  If a run has several processes, process 0 takes the lock (see `minw.workdir.locks`).
  On a file system without locks a warning is logged instead.

  Args:
    workdir: Directory of the run. It is created if it is missing.
    config: Config of the run.

  Raises:
    errors.UsageError: The workdir cannot be written to, holds a run of another config,
      is in use, or is not the same for all processes. All processes raise it.
  """
  with contextlib.ExitStack() as stack:

    def take() -> None:
      # Check first, so that no lock file is left in the workdir of another run.
      check_free(workdir, config)
      stack.enter_context(_lock(workdir))
      claim(workdir, config)

    distributed.on_main(take)
    distributed.together(check_claimed, workdir, config)
    yield


def _lock(workdir: str) -> ContextManager:
  """Creates `workdir` and takes its lock. Leaving the context releases the lock."""
  with _refusing(workdir):
    folder = paths.at(workdir)
    if isinstance(folder, cloud.Path):
      cloud.check_properties(folder.bucket)
    folder.mkdir(parents=True, exist_ok=True)
    try:
      lock = locks.take(workdir, lambda: _give_up(workdir))
    except OSError as error:
      if error.errno not in _NO_LOCKS:
        raise
      _log.warning("%s: this file system has no locks (%s), so that nothing keeps a"
                   " second run out", workdir, error.strerror)
      return contextlib.nullcontext()
  if lock is None:
    raise errors.UsageError(
        f"workdir={workdir!r} is in use: another process is training there")
  return lock


def _give_up(workdir: str) -> None:
  """Ends this process, if it is a command, because another one trains in `workdir`.

  Orbax may be amid a checkpoint, and would damage the other process's. In a notebook,
  the next record or checkpoint fails.
  """
  stopping.end_command(
      f"error: {workdir}: another process has taken over the run, because this one was"
      " suspended or cut off", exit_codes.IO_ERROR)


def claim(workdir: str, config: Any) -> None:
  """Writes the config of a run to `workdir`, which is created if it is missing.

  Args:
    workdir: Directory of the run.
    config: Config of the run.

  Raises:
    errors.UsageError: The workdir cannot be written to, or it holds a run of another
      config.
  """
  path = paths.at(workdir)
  with _refusing(workdir):
    path.mkdir(parents=True, exist_ok=True)
    check_free(workdir, config)
    files.remove_parts(path)
    fields = json_files.sealed(config_lib.to_fields(config))
    files.write(path / "config.json",
                json.dumps(fields, indent=2, sort_keys=True) + "\n")


@contextlib.contextmanager
def _refusing(workdir: str) -> Iterator[None]:
  try:
    yield
  except OSError as error:
    raise errors.UsageError(
        f"workdir={workdir!r} cannot be written to: {error}") from error


def check_free(workdir: str, config: Any) -> None:
  """Checks that `workdir` holds no run, or a run of `config`.

  Raises:
    errors.UsageError: The workdir holds a run of another config, or config.json is
      damaged. The message names the fields that differ, and what to do instead.
  """
  if _has_config(workdir):
    check_same(workdir, read_config(workdir), config)


def _has_config(workdir: str) -> bool:
  try:
    return paths.exists(paths.at(workdir) / "config.json")
  except OSError as error:
    raise errors.UsageError(f"workdir={workdir!r} cannot be read: {error}") from error


def check_same(workdir: str, before: Any, config: Any) -> None:
  """Checks that a run of the config `before` can resume with `config`.

  Raises:
    errors.UsageError: The configs differ in other fields than those that a run may
      change. The message names the fields that differ, and what to do instead.
  """
  before = config_lib.copy(before)
  counts_nothing = not (before.histogram_layers or config.histogram_layers)
  for name in (*config_lib.FREE, *["histogram_epochs"] * counts_nothing):
    before[name] = config[name]
  different = config_lib.differing_fields(before, config)
  if different:
    raise errors.UsageError(
        f"workdir={workdir!r} holds a run of another config (field: there, here):"
        f" {'; '.join(different)}. Give this run another --workdir; with"
        f" --config.init_from={workdir} it starts from the weights trained there")


def check_claimed(workdir: str, config: Any) -> None:
  """Checks that this process sees the workdir that process 0 claimed for `config`.

  Raises:
    errors.UsageError: This process does not see it, or its own `config` differs.
  """
  errors.check(_has_config(workdir), "workdir", workdir,
               "one place that all processes see")
  local = {name: config[name] for name in config_fields.MACHINE}
  claimed = config_lib.copy(read_config(workdir), **local)
  different = config_lib.differing_fields(claimed, config)
  if different:
    raise errors.UsageError("the processes were started with different configs (field:"
                            f" first process, another): {'; '.join(different)}")


def read_config(workdir: str) -> Any:
  """Reads the config of the run in `workdir`.

  Raises:
    errors.UsageError: There is no config.json, or it is not a config of this package.
    json_files.Damaged: The file is damaged.
  """
  path = paths.at(workdir) / "config.json"
  errors.check(_has_config(workdir), "workdir", workdir,
               "the workdir of a run (there is no config.json)")
  try:
    json_files.read_object(path)
    return config_lib.from_json(path.read_text())
  except json_files.Damaged as error:
    error.add(REMEDY)
    raise
  except errors.UsageError as error:
    raise errors.UsageError(
        f"{path} is damaged, or of another version of minw: {error}; {REMEDY}"
    ) from error


# Advice in messages about a damaged config.json.
REMEDY = "move it away, and the next start of the run writes it again"


# Orbax writes a checkpoint on gs:// in its place, and this file when it is complete.
COMPLETE = "commit_success.txt"


def checkpoints(workdir: str) -> dict[int, paths.AnyPath]:
  """Returns the folders of all checkpoints by their steps."""
  folder = paths.at(workdir) / "checkpoints"
  if not paths.is_dir(folder):
    return {}
  found = {int(path.name): path for path in folder.iterdir() if path.name.isdecimal()}
  if paths.is_url(folder):
    found = {step: path for step, path in found.items()
             if paths.is_file(path / COMPLETE)}
  return found


STATES = ("running", "done", "diverged", "preempted", "stopped")
# Further fields in the status of a run that is done.
RESULTS = ("test_accuracy", "test_loss", "best_step", "best_test_accuracy",
           "best_test_loss")


def write_status(workdir: str, state: str, step: int, **more: Any) -> dict[str, Any]:
  """Writes status.json. If a run has several processes, only process 0 writes it.

  Args:
    workdir: Directory of the run.
    state: One of `STATES`.
    step: Number of training steps that are saved. If the run diverged, the number of
      steps before the first one that was not finite.
    **more: Results of a run that is done, see `RESULTS`.

  Returns:
    The content of the file.
  """
  status = {"state": state, "step": step, **more}
  if distributed.is_main():
    files.write(paths.at(workdir) / "status.json", json.dumps(status) + "\n")
  return status


def read_status(workdir: str) -> dict[str, Any] | None:
  """Returns what `write_status` wrote, or None if there is no status.json.

  If a run was killed, the file still says "running". The returned state is then
  "stopped". It stays "running" if a process has the lock of the workdir, or if the
  lock cannot be checked.

  Raises:
    json_files.Damaged: The file holds something else.
  """
  try:
    status = json_files.read_object(paths.at(workdir) / "status.json",
                                    _check_status)
  except json_files.Damaged as error:
    error.add("the next start of the run writes it again")
    raise
  if status is not None and status["state"] == "running":
    with contextlib.suppress(OSError):
      if not locks.is_held(workdir):
        status["state"] = "stopped"
  return status


def _check_status(status: dict[str, Any]) -> None:
  """Raises ValueError for what `write_status` cannot have written."""
  if status.get("state") not in STATES:
    raise ValueError(f"state={status.get('state')!r} is not one of {', '.join(STATES)}")
  if not json_files.is_count(status.get("step")):
    raise ValueError("step is not a number of steps")
  for name in RESULTS:
    if name in status and type(status[name]) not in (int, float):
      raise ValueError(f"{name} is not a number")
