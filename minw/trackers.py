"""Sends the measurements of a run to Weights & Biases or MLflow, and never fails.

Where a service keeps runs is said by its own variables, such as WANDB_MODE and
MLFLOW_TRACKING_URI. The file tracker.json in the workdir has the run's name there, so
that a run that resumes is the same run.
"""

import importlib
import json
import logging
import os
import queue
import secrets
import threading
import time
from typing import Any, Callable, Protocol

from minw import dependencies
from minw import errors
from minw import files
from minw import json_files
from minw import paths

_log = logging.getLogger(__name__)

_CLOSE_SECONDS = 30.0  # Time that the end of a run waits for the service.


class Service(Protocol):
  """A run at a service."""

  def log(self, step: int, numbers: dict[str, float]) -> None:
    """Records numbers by name for a step."""

  def close(self) -> None:
    """Ends the run. It may be resumed."""


class Tracker:
  """Sends measurements to a service in a thread.

  The first error is logged as a warning, and nothing is sent after it. A service that
  does not answer delays the end of a run by half a minute, and nothing else.
  """

  def __init__(self, name: str, workdir: str, config: dict[str, Any]):
    """Opens the run at a service.

    Args:
      name: One of `SERVICES`.
      workdir: Directory of the run.
      config: Fields of the config.
    """
    self._name = name
    self._queue: queue.SimpleQueue = queue.SimpleQueue()
    self._thread = threading.Thread(
        target=self._run, args=(workdir, config), daemon=True)
    self._thread.start()

  def log(self, step: int, numbers: dict[str, float]) -> None:
    """Sends numbers by name for a step, now or later."""
    self._queue.put((step, numbers))

  def close(self) -> None:
    """Sends what is left, if that is possible within some seconds."""
    self._queue.put(None)
    self._thread.join(_CLOSE_SECONDS)
    if self._thread.is_alive():
      _log.warning("tracker=%s: the last measurements were not sent within %.0f s",
                   self._name, _CLOSE_SECONDS)

  def _run(self, workdir: str, config: dict[str, Any]) -> None:
    try:
      service = SERVICES[self._name](workdir, config)
      while (item := self._queue.get()) is not None:
        service.log(*item)
      service.close()
    except Exception as error:  # pylint: disable=broad-exception-caught
      _log.warning("tracker=%s: %s: %s; nothing more of this run is sent until it is"
                   " started again", self._name, type(error).__name__, error)


def check(name: str | None) -> None:
  """Checks that a service can be used; None stands for none.

  Raises:
    errors.UsageError: There is no such service, or its package is not installed.
  """
  if name is None:
    return
  errors.check(name in SERVICES, "tracker", name, "one of " + ", ".join(SERVICES))
  errors.check(dependencies.installed(name), "tracker", name,
               f"installed: pip install 'minw[{name}]'")


class _Wandb:
  """A run at Weights & Biases."""

  def __init__(self, workdir: str, config: dict[str, Any]):
    wandb = importlib.import_module("wandb")
    self._run = wandb.init(
        project=os.environ.get("WANDB_PROJECT", "minw"), name=_title(workdir),
        id=_remembered("wandb", workdir, lambda: secrets.token_hex(8)), resume="allow",
        config=config, settings=wandb.Settings(console="off"))

  def log(self, step: int, numbers: dict[str, float]) -> None:
    self._run.log(numbers, step=step)

  def close(self) -> None:
    self._run.finish()


class _Mlflow:
  """A run at MLflow."""

  def __init__(self, workdir: str, config: dict[str, Any]):
    self._entities = importlib.import_module("mlflow.entities")
    self._client = importlib.import_module("mlflow.tracking").MlflowClient()
    self._id = _remembered("mlflow", workdir, lambda: self._create(workdir, config))
    self._client.update_run(self._id, status="RUNNING")

  def _create(self, workdir: str, config: dict[str, Any]) -> str:
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "minw")
    found = self._client.get_experiment_by_name(name)
    experiment = found.experiment_id if found else self._client.create_experiment(name)
    run = self._client.create_run(experiment, run_name=_title(workdir)).info.run_id
    for name, value in config.items():
      self._client.log_param(run, name, str(value)[:500])
    return run

  def log(self, step: int, numbers: dict[str, float]) -> None:
    now = int(1000 * time.time())
    self._client.log_batch(self._id, metrics=[
        self._entities.Metric(name, value, now, step)
        for name, value in numbers.items()])

  def close(self) -> None:
    self._client.set_terminated(self._id)


# What opens a run at each service, from the workdir and the fields of the config.
SERVICES: dict[str, Callable[[str, dict[str, Any]], Service]] = {
    "wandb": _Wandb, "mlflow": _Mlflow}


def _title(workdir: str) -> str:
  return os.path.basename(paths.real(workdir).rstrip("/"))


def _remembered(service: str, workdir: str, make: Callable[[], str]) -> str:
  """Returns the name of the run at a service, which `make` makes the first time."""
  path = paths.at(workdir) / "tracker.json"
  known = json_files.read_object(path) or {}
  if service not in known:
    known[service] = make()
    files.write(path, json.dumps(known) + "\n")
  return known[service]
