"""What each of several processes on one machine gets of its cores and GPUs."""

import contextlib
import os
import shutil
import subprocess
from typing import Any, NamedTuple, Sequence

# A setting of the GNU C library that spares training on CPUs most of its page faults.
_HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}


class Place(NamedTuple):
  """Where one of the processes runs.

  Attributes:
    cores: it is pinned to; empty where the system does not pin.
    environment: variables that it gets besides.
  """

  cores: Sequence[int]
  environment: dict[str, str]


def split(count: int) -> list[Place]:
  """Places for `count` processes, which share nothing where there is enough.

  XLA makes as many threads as its process may use cores, so pinned processes do not
  get into each other's way. A single process gets the machine as it is.
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
  """Starts `command` in its place; signals of a terminal do not reach it."""
  environment = _HUGE_PAGES | os.environ | place.environment
  process = subprocess.Popen(
      command, env=environment, start_new_session=True, **options)
  if place.cores:
    # Before it has threads: Python alone takes longer to start than this.
    with contextlib.suppress(ProcessLookupError):
      os.sched_setaffinity(process.pid, place.cores)
  return process


def _gpus() -> list[str]:
  """The NVIDIA GPUs of the machine, as CUDA_VISIBLE_DEVICES names them."""
  visible = os.environ.get("CUDA_VISIBLE_DEVICES")
  if visible is not None:
    return [name for name in visible.split(",") if name]
  if not shutil.which("nvidia-smi"):
    return []
  listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True)
  return [str(i) for i, _ in enumerate(
      line for line in listed.stdout.splitlines() if line.startswith("GPU "))]


def _share(items: Sequence, count: int, i: int) -> Sequence:
  """The i-th of `count` nearly equal parts; with too few items, one of them."""
  if count > len(items):
    return items[i % len(items):][:1] if items else []
  return items[len(items) * i // count:len(items) * (i + 1) // count]
