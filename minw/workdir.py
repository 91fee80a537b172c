"""The files of a run beside its metrics and checkpoints, whole at any moment."""

import json
import os
import pathlib
from typing import Any

from minw import cli
from minw import config as config_lib
from minw import distributed


def write_file(path: pathlib.Path, text: str) -> None:
  """Replaces a file in one move, so that no reader sees half of it."""
  part = path.with_name(path.name + ".part")
  part.write_text(text)
  os.replace(part, path)


def claim(workdir: str, config: Any) -> None:
  """Makes `workdir` that of a run of `config`, unless it is so already.

  Raises:
    cli.UsageError: it can not be written to, or is another config's.
  """
  path = pathlib.Path(workdir)
  try:
    path.mkdir(parents=True, exist_ok=True)
    check_free(workdir, config)
    write_file(path / "config.json", config_lib.to_json(config))
  except OSError as error:
    raise cli.UsageError(
        f"workdir={workdir!r} can not be written to: {error}") from error


def check_free(workdir: str, config: Any) -> None:
  """Checks that `workdir` holds no run but one of `config`.

  Raises:
    cli.UsageError: naming the fields that differ.
  """
  if not (pathlib.Path(workdir) / "config.json").exists():
    return
  before = read_config(workdir)
  counts_nothing = not (before.histogram_layers or config.histogram_layers)
  for name in (*config_lib.FREE, *["histogram_epochs"] * counts_nothing):
    before[name] = config[name]
  different = config_lib.differing_fields(before, config)
  if different:
    raise cli.UsageError(
        f"workdir={workdir!r} holds a run of another config (field: there, here):"
        f" {'; '.join(different)}")


def check_claimed(workdir: str, config: Any) -> None:
  """Checks that a process sees the workdir that the first claimed for `config`.

  Raises:
    cli.UsageError: it does not, or its own `config` is another.
  """
  path = pathlib.Path(workdir)
  cli.check((path / "config.json").exists(), "workdir", workdir,
            "one place that all processes see")
  local = {name: config[name] for name in ("data_dir", "data_workers")}
  claimed = config_lib.copy(read_config(workdir), **local)
  different = config_lib.differing_fields(claimed, config)
  if different:
    raise cli.UsageError("the processes were started with different configs (field:"
                         f" first process, another): {'; '.join(different)}")


def read_config(workdir: str) -> Any:
  """The config of the run in `workdir`.

  Raises:
    cli.UsageError: there is none, or it is not one of this package.
  """
  path = pathlib.Path(workdir) / "config.json"
  cli.check(path.is_file(), "workdir", workdir,
            "the workdir of a run (there is no config.json)")
  try:
    return config_lib.from_json(path.read_text())
  except (UnicodeDecodeError, cli.UsageError) as error:
    raise cli.UsageError(f"workdir={workdir!r}: {error}") from error


def write_status(workdir: str, state: str, step: int, **more: Any) -> dict[str, Any]:
  """Writes status.json; `state` is running, done, diverged or preempted.

  Of several processes the first writes it, and all return what it says.
  """
  status = {"state": state, "step": step, **more}
  if distributed.is_main():
    write_file(pathlib.Path(workdir) / "status.json", json.dumps(status) + "\n")
  return status


def read_status(workdir: str) -> dict[str, Any] | None:
  """What `write_status` wrote; None if nothing."""
  path = pathlib.Path(workdir) / "status.json"
  return json.loads(path.read_text()) if path.exists() else None
