"""Where a run was made, and how long it took: run.json of a workdir."""

import functools
from importlib import metadata
import json
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

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")


def hardware() -> dict[str, Any]:
  """The kinds and numbers of devices and cores: device, num_devices, cpu, cores."""
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
  """Of Python and of what decides numbers, by name."""
  return {"python": platform.python_version(),
          **{name: metadata.version(name) for name in _PACKAGES}}


@functools.cache  # Of what runs, not of what the files are by the end of it.
def commit() -> str:
  """The git commit of the code, with "-dirty" if files differ from it.

  "minw 0.1.0" if the package is not in a git checkout of its own.
  """
  def git(*arguments):
    # Otherwise `describe` would lock the index, and a command of the user might fail.
    command = ["git", "--no-optional-locks", "-C", pathlib.Path(minw.__file__).parent]
    return subprocess.run(
        [*command, *arguments], capture_output=True, text=True,
        check=True).stdout.strip()

  try:
    git("ls-files", "--error-unmatch", "__init__.py")  # Or it is installed in another.
    return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
  except (OSError, subprocess.CalledProcessError):
    return f"minw {minw.__version__}"


def read(workdir: str) -> dict[str, Any]:
  """What `Journal` wrote; nothing is known of a run that has none.

  Returns:
    `seconds`; `startup_seconds`, the part of them until the first step of each start was
      done; and `environments`, those of the run's starts in order, each with `commit`,
      `hardware` and `versions`; where two in a row are the same, once.
  """
  path = pathlib.Path(workdir) / "run.json"
  return json.loads(path.read_text()) if path.exists() else {
      "seconds": None, "startup_seconds": 0.0, "environments": []}


class Journal:
  """Keeps run.json while a run goes on, over all its starts."""

  def __init__(self, workdir: str):
    """Notes where the run is started, now."""
    self._workdir = workdir
    content = read(workdir)
    self._environments = content["environments"]
    self._here = time.monotonic()  # When this start began.
    self._began = self._here - (content["seconds"] or 0.0)
    self._startup = content.get("startup_seconds", 0.0)
    here = {"commit": commit(), "hardware": hardware(), "versions": versions()}
    if self._environments[-1:] != [here]:
      self._environments.append(here)
    self.note()

  def trains(self) -> None:
    """Notes that the first step of this start, which was compiled for, is done."""
    self._startup += time.monotonic() - self._here
    self.note()

  def note(self) -> None:
    """Notes the time; what a killed run did after its last note is not counted."""
    content = {"seconds": round(time.monotonic() - self._began, 1),
               "startup_seconds": round(self._startup, 1),
               "environments": self._environments}
    if distributed.is_main():
      files.write(pathlib.Path(self._workdir) / "run.json",
                  json.dumps(content, indent=2) + "\n")
