"""run.json of a workdir: where a run was trained, and how long it took."""

import functools
import hashlib
from importlib import metadata
import json
import logging
import math
import os
import pathlib
import platform
import subprocess
import time
from typing import Any

import jax

import minw
from minw import distributed
from minw import files
from minw import json_files
from minw import paths

_log = logging.getLogger(__name__)

_CODE = (".cc", ".h", ".inc", ".py")  # Endings of files with code.
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")


def hardware() -> dict[str, Any]:
  """Returns kinds and numbers of devices and cores.

  Returns:
    `device` and `cpu`, which are names, and `num_devices` and `cores`.
  """
  cpu = platform.processor() or platform.machine()
  if os.path.exists("/proc/cpuinfo"):
    with open("/proc/cpuinfo") as lines:
      cpu = next((line.split(":", 1)[1].strip() for line in lines
                  if line.startswith("model name")), cpu)
  linux = hasattr(os, "sched_getaffinity")
  cores = len(os.sched_getaffinity(0)) if linux else os.cpu_count()
  devices = jax.devices()
  return {"device": devices[0].device_kind, "num_devices": len(devices), "cpu": cpu,
          "cores": cores}


def versions() -> dict[str, str]:
  """Returns versions of Python and of the packages that affect numerical results."""
  return {"python": platform.python_version(),
          **{name: metadata.version(name) for name in _PACKAGES}}


@functools.cache  # The files may change while the code that was loaded runs.
def commit() -> str:
  """Returns the git commit of the code, with "-dirty" if files differ from it.

  If the package is not in a git checkout of its own, returns "minw", its version and
  `code_digest`.
  """
  def git(*arguments):
    # Without this option, `describe` locks the index, and a git command that the user
    # runs at the same time may fail.
    command = ["git", "--no-optional-locks", "-C", pathlib.Path(minw.__file__).parent]
    return subprocess.run(
        [*command, *arguments], capture_output=True, text=True,
        check=True).stdout.strip()

  try:
    # Fails if the package is installed inside the checkout of another project.
    git("ls-files", "--error-unmatch", "__init__.py")
    return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
  except (OSError, subprocess.CalledProcessError):
    return f"minw {minw.__version__} {code_digest()}"


def code_digest() -> str:
  """Returns the SHA-256 of the package's code, as 40 hexadecimal digits.

  It covers names and contents of all files of Python and C++ in the package's folder.
  Equal digests of two installations mean equal code.
  """
  folder = pathlib.Path(minw.__file__).parent
  found = hashlib.sha256()
  for path in sorted(folder.rglob("*")):
    if path.suffix in _CODE:
      content = path.read_bytes()
      found.update(f"{path.relative_to(folder).as_posix()} {len(content)}\n".encode())
      found.update(content)
  return found.hexdigest()[:40]


# Environment of a start of which nothing is known.
UNKNOWN = {"commit": None, "hardware": None, "versions": None}

_HARDWARE = {"device": str, "num_devices": int, "cpu": str, "cores": int}


def read(workdir: str) -> dict[str, Any]:
  """Reads run.json, which `Journal` wrote.

  Returns:
    A dict with three entries. `seconds` is the duration of the run, or None if there is
    no run.json. `startup_seconds` is the part of it before the first step of each start
    was done. `environments` lists the environments of the starts in order, each with
    `commit`, `hardware` and `versions`. Equal neighbors are listed once. An environment
    is `UNKNOWN` if a start found the file damaged and could not restore it. Then
    `seconds` lack the time before that start.

  Raises:
    json_files.Damaged: The file holds something else.
  """
  content = json_files.read_object(paths.at(workdir) / "run.json", _check)
  return {"seconds": None, "startup_seconds": 0.0, "environments": []} | (content or {})


def _check(content: dict[str, Any]) -> None:
  """Raises ValueError if `Journal` cannot have written this content."""
  for name in ("seconds", "startup_seconds"):
    value = content.get(name, 0.0)
    if not json_files.is_number(value) or value < 0:
      raise ValueError(f"{name} is not a number of seconds")
  environments = content.get("environments")
  if "seconds" not in content or not isinstance(environments, list) or not all(
      map(is_environment, environments)):
    raise ValueError("it does not say where the run was made")


def is_environment(value: Any) -> bool:
  """Returns whether a value from JSON has the form of an environment, see `read`."""
  if not isinstance(value, dict) or value.keys() != UNKNOWN.keys():
    return False
  where, made_of = value["hardware"], value["versions"]
  return (
      isinstance(value["commit"], str | None)
      and (where is None or isinstance(where, dict) and all(
          type(where.get(name)) is kind for name, kind in _HARDWARE.items()))
      and (made_of is None or isinstance(made_of, dict) and all(
          isinstance(version, str) for version in made_of.values())))


class Journal:
  """Updates run.json during a run, across all its starts."""

  def __init__(self, workdir: str, begun: float | None = None,
               saved: dict[str, Any] | None = None, step: int = 0,
               teacher: dict[str, Any] | None = None):
    """Notes where a run is started.

    Args:
      workdir: Directory of the run.
      begun: Time of the start by `time.monotonic`. None stands for now.
      saved: Copy of `content` in the checkpoint from which the run resumes, or None.
      step: Number of steps that earlier starts trained. If it is positive and nothing
        tells where they were trained, an `UNKNOWN` environment is noted.
      teacher: Description of the run's teacher, or None if it has none.
    """
    self._teacher = teacher
    self._workdir = workdir
    before = _before(workdir, saved, step)
    self._environments = before["environments"]
    self._here = time.monotonic() if begun is None else begun  # When this start began.
    self._began = self._here - (before["seconds"] or 0.0)
    self._startup = before["startup_seconds"]
    self._noted = -math.inf  # Time of the last note.
    here = {"commit": commit(), "hardware": hardware(), "versions": versions()}
    if self._environments[-1:] != [here]:
      self._environments.append(here)
    self.note()

  @property
  def content(self) -> dict[str, Any]:
    """Current content of run.json."""
    return {"seconds": round(time.monotonic() - self._began, 1),
            "startup_seconds": round(self._startup, 1),
            "environments": [*self._environments],
            **({"teacher": self._teacher} if self._teacher else {})}

  def trains(self) -> None:
    """Notes that compilation and the first step of this start are done."""
    self._startup += time.monotonic() - self._here
    self.note()

  def note(self, every: float = 0.0) -> None:
    """Writes run.json, unless it was written less than `every` seconds ago.

    If a run is killed, the time since the last note or checkpoint is lost.
    """
    if distributed.is_main() and time.monotonic() - self._noted >= every:
      self._noted = time.monotonic()
      files.write(paths.at(self._workdir) / "run.json",
                  json.dumps(self.content, indent=2) + "\n")


def _before(workdir: str, saved: dict[str, Any] | None, step: int) -> dict[str, Any]:
  """Returns what is known of earlier starts.

  It is read from run.json. If that file is missing or damaged, the copy in a checkpoint
  is returned. The copy may also have been made after the file was last written.
  """
  try:
    found = read(workdir)
    fault = "it is missing" if step and found["seconds"] is None else ""
  except json_files.Damaged as error:
    found = {"seconds": None, "startup_seconds": 0.0, "environments": []}
    fault = error.why
  if not fault:
    seconds = [each["seconds"] for each in (found, saved or found)]
    return {**found, "seconds": max(filter(None, seconds), default=None)}
  if saved is not None:
    found = {**saved, "environments": [*saved["environments"]]}
  elif step:
    found["environments"] = [UNKNOWN]
  if distributed.is_main():
    _log.warning(
        "%s: %s; it %s", os.path.join(workdir, "run.json"), fault,
        "is replaced by the copy in the checkpoint" if saved is not None else
        "starts again without the time and place of earlier starts")
  return found
