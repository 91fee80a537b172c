"""Divides the cores and GPUs of a machine among several processes."""

import contextlib
import os
import shutil
import subprocess
from typing import Any, NamedTuple, Sequence

# This setting of the GNU C library avoids most page faults of training on CPUs.
_HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}


class Place(NamedTuple):
  """The part of the machine that one process uses.

  Attributes:
    cores: Cores that the process is pinned to; empty if the system cannot pin
      processes.
    environment: Additional environment variables of the process.
  """

  cores: Sequence[int]
  environment: dict[str, str]


def split(count: int) -> list[Place]:
  """Returns places for `count` processes.

  The places share no cores if there are enough of them, and no GPUs if there are
  enough. XLA starts as many threads as its process may use cores, so that pinned
  processes do not slow each other down. A single process gets the whole machine.
  """
  cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
  gpus = _gpus()
  if count == 1:
    return [Place(cores, {})]
  environment = {}
  if gpus and "XLA_PYTHON_CLIENT_MEM_FRACTION" not in os.environ:
    sharing = -(-count // len(gpus))
    if sharing > 1:
      environment["XLA_PYTHON_CLIENT_MEM_FRACTION"] = f"{0.9 / sharing:.3f}"
  return [
      Place(_share(cores, count, i), environment | (
          {"CUDA_VISIBLE_DEVICES": ",".join(_share(gpus, count, i))} if gpus else {}))
      for i in range(count)]


def start(command: Sequence[str], place: Place, **options: Any) -> subprocess.Popen:
  """Starts `command` in its place. Signals of a terminal do not reach the process.

  Args:
    command: Program and arguments.
    place: Cores and environment variables of the process.
    **options: Other arguments of `subprocess.Popen`.
  """
  environment = _HUGE_PAGES | os.environ | place.environment
  process = subprocess.Popen(
      command, env=environment, start_new_session=True, **options)
  if place.cores:
    # The process has no threads yet, because starting Python takes longer than this.
    with contextlib.suppress(ProcessLookupError):
      os.sched_setaffinity(process.pid, place.cores)
  return process


def _gpus() -> list[str]:
  """Returns the NVIDIA GPUs of the machine, by their names in CUDA_VISIBLE_DEVICES."""
  visible = os.environ.get("CUDA_VISIBLE_DEVICES")
  if visible is not None:
    return [name for name in visible.split(",") if name]
  if not shutil.which("nvidia-smi"):
    return []
  listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True)
  return [str(i) for i, _ in enumerate(
      line for line in listed.stdout.splitlines() if line.startswith("GPU "))]


def _share(items: Sequence, count: int, i: int) -> Sequence:
  """Returns the i-th of `count` nearly equal parts; one item if there are too few."""
  if count > len(items):
    return items[i % len(items):][:1] if items else []
  return items[len(items) * i // count:len(items) * (i + 1) // count]
