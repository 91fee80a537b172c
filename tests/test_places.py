"""minw.places: cores and GPUs of several processes on one machine."""

import os
import subprocess
import sys

import pytest

from minw import places


@pytest.fixture
def machine(monkeypatch):
  """Sets the cores and GPUs there are."""
  def make(cores, gpus=None, **environment):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(cores))
    for name in ("CUDA_VISIBLE_DEVICES", "XLA_PYTHON_CLIENT_MEM_FRACTION"):
      monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", "/nowhere")
    if gpus is not None:
      monkeypatch.setenv("CUDA_VISIBLE_DEVICES", gpus)
    for name, value in environment.items():
      monkeypatch.setenv(name, value)
  return make


@pytest.mark.parametrize("cores, count, expected", [
    ([0, 1], 2, [[0], [1]]),
    ([3, 5, 6, 7, 9], 2, [[3, 5], [6, 7, 9]]),
    ([4], 3, [[4], [4], [4]]),
    ([1, 2], 3, [[1], [2], [1]]),
    ([2, 8], 1, [[2, 8]]),
])
def test_cores_are_shared_out(machine, cores, count, expected):
  machine(cores)
  assert [list(place.cores) for place in places.split(count)] == expected
  assert all(place.environment == {} for place in places.split(count))


@pytest.mark.parametrize("gpus, count, expected", [
    ("0,1,2,3", 2, ["0,1", "2,3"]),
    ("GPU-a,GPU-b", 2, ["GPU-a", "GPU-b"]),
    ("6", 2, ["6", "6"]),
])
def test_gpus_are_shared_out(machine, gpus, count, expected):
  machine(range(8), gpus)
  found = places.split(count)
  assert [place.environment["CUDA_VISIBLE_DEVICES"] for place in found] == expected


def test_memory_of_a_gpu_is_shared(machine):
  machine(range(8), "0,1")
  fractions = [place.environment.get("XLA_PYTHON_CLIENT_MEM_FRACTION")
               for place in places.split(6)]
  assert fractions == ["0.300"] * 6
  assert "XLA_PYTHON_CLIENT_MEM_FRACTION" not in places.split(2)[0].environment
  machine(range(8), "0", XLA_PYTHON_CLIENT_MEM_FRACTION="0.1")
  assert "XLA_PYTHON_CLIENT_MEM_FRACTION" not in places.split(2)[0].environment


def test_one_process_has_all(machine):
  machine(range(8), "0,1,2")
  assert places.split(1) == [places.Place(list(range(8)), {})]


def test_gpus_are_those_of_nvidia_smi(machine, tmp_path, monkeypatch):
  machine(range(4))
  stub = tmp_path / "nvidia-smi"
  stub.write_text("#!/bin/sh\n"
                  "echo 'GPU 0: NVIDIA H100 (UUID: GPU-1)'\n"
                  "echo '  MIG 1g.10gb Device 0: (UUID: MIG-2)'\n"
                  "echo 'GPU 1: NVIDIA H100 (UUID: GPU-3)'\n")
  stub.chmod(0o755)
  monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
  found = [place.environment["CUDA_VISIBLE_DEVICES"] for place in places.split(2)]
  assert found == ["0", "1"]


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="no pinning here")
def test_process_is_pinned():
  core = max(os.sched_getaffinity(0))
  process = places.start(
      [sys.executable, "-c", "import os; input(); print(os.sched_getaffinity(0))"],
      places.Place([core], {}), text=True, stdin=subprocess.PIPE,
      stdout=subprocess.PIPE)
  assert process.communicate("\n")[0] == f"{{{core}}}\n"


@pytest.mark.parametrize("given", [None, "glibc.malloc.check=1"])
def test_huge_pages_unless_told_otherwise(monkeypatch, given):
  monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
  if given:
    monkeypatch.setenv("GLIBC_TUNABLES", given)
  process = places.start(
      [sys.executable, "-c", "import os; print(os.environ['GLIBC_TUNABLES'])"],
      places.Place([], {}), text=True, stdout=subprocess.PIPE)
  assert process.communicate()[0] == f"{given or 'glibc.malloc.hugetlb=1'}\n"
