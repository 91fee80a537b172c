"""Training on disks that fail, processes that are killed, and clocks that jump.

`faults.c` makes one file operation of a run in its workdir fail. Whatever happens then,
the run ends soon, says why in one line, and the same command resumes it to the numbers
of a run that nothing happened to. By default some operations are tried with some
faults; MINW_FAULTS=N tries N pairs of them, and MINW_FAULTS=all tries all.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from typing import NamedTuple

import pytest

from c_programs import tool
import forked
from short_runs import ROOT
from short_runs import lines_of
from short_runs import tiny_config
from short_runs import trees_of
from short_runs import write_config

pytestmark = pytest.mark.slow

SECONDS = 150  # Longest time that a run may take, also on a busy machine.

# Exit codes that a run may end with, by fault. It ends with 0 if the fault did no harm
# or came at the very end, and with 2 if the workdir could not be claimed.
DISK = {0, 2, 74}
CODES = {
    "kill": {-9}, "torn": {-9}, "term": {0, 75}, "int": {0, 75, 130}, "past": {0},
    **dict.fromkeys(("full", "full1", "bad", "bad1", "locked", "locked1"), DISK)}


class Run(NamedTuple):
  """How a run ended: its exit code, and its output in the time that it took."""

  code: int
  output: str
  seconds: float

  @property
  def errors(self):
    return [line for line in self.output.splitlines() if line.startswith("error: ")]


@pytest.fixture(scope="module")
def count(tmp_path_factory):
  """The file with the number of operations of the last run that ended by itself."""
  return tmp_path_factory.mktemp("count") / "count"


@pytest.fixture(scope="module")
def train(tmp_path_factory, count):
  """train(workdir, fault="count", at=0): runs `minw.main`, and returns a `Run`."""
  if not sys.platform.startswith("linux"):
    pytest.skip("needs Linux")
  folder = tmp_path_factory.mktemp("faults")
  library = folder / "faults.so"
  subprocess.run([tool("cc", "gcc"), "-shared", "-fPIC", "-O1",
                  ROOT / "tests" / "faults.c", "-o", library, "-ldl"], check=True)
  write_config(folder / "config.py", tiny_config(
      conv_widths=(), dense_widths=(8,), num_epochs=3, train_examples=256,
      histogram_layers=("*",), histogram_epochs=(1, 2)))
  with forked.commands(
      folder, LD_PRELOAD=str(library), MPLBACKEND="agg",
      JAX_COMPILATION_CACHE_DIR=str(folder / "cache"),
      JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0",
      JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES="-1") as command:

    def train(workdir, fault="count", at=0):
      began = time.monotonic()
      code, out, err = command("faulty_run", fault, at, workdir, count, seconds=SECONDS)
      return Run(code, out + err, time.monotonic() - began)

    yield train


def outcome(workdir):
  """The results that a disturbed run must have in common with another one."""
  return {"status": json.loads((workdir / "status.json").read_text()),
          "lines": lines_of(workdir), "checkpoints": trees_of(workdir)}


def faults_of(ended, fault):
  """What is wrong with how a run ended that had this fault."""
  if ended.code == -signal.SIGALRM:
    yield "it did not end"
  elif ended.code not in CODES[fault]:
    yield f"exit code {ended.code}"
  if "Traceback" in ended.output:
    yield "a traceback"
  if len(ended.errors) != (ended.code in (2, 74)):
    yield f"{len(ended.errors)} lines of errors"


def pairs(count, wanted):
  """Pairs of a fault and the number of an operation: as many as the tests try."""
  every = [(fault, at) for at in range(1, count + 1) for fault in CODES]
  if wanted == "all":
    return every
  rng = random.Random(0)
  names = list(CODES)
  number = int(wanted)
  parts = [(count * i // number, count * (i + 1) // number) for i in range(number)]
  return [(names[i % len(names)], rng.randint(begin + 1, max(begin + 1, end)))
          for i, (begin, end) in enumerate(parts)]


def test_runs_resume_after_every_fault(train, count, tmp_path):
  whole = tmp_path / "whole"
  undisturbed = train(whole)
  assert undisturbed.code == 0, undisturbed.output
  expected = outcome(whole)
  assert expected["status"]["state"] == "done"
  operations = int(count.read_text())
  assert operations > 100  # Otherwise the operations are not seen.

  bad, codes, slowest = [], {}, 0.0
  tried = pairs(operations, os.environ.get("MINW_FAULTS", "8"))
  for fault, at in tried:
    workdir = tmp_path / "run"
    shutil.rmtree(workdir, ignore_errors=True)
    ended = train(workdir, fault, at)
    codes.setdefault(fault, []).append(ended.code)
    slowest = max(slowest, ended.seconds)
    wrong = list(faults_of(ended, fault))
    resumed = train(workdir)
    if resumed.code != 0 or resumed.errors or "Traceback" in resumed.output:
      wrong.append(f"resuming ends with {resumed.code}: {resumed.output[-500:]}")
    else:
      found = outcome(workdir)
      wrong += [f"other {name}" for name in expected if found[name] != expected[name]]
      if "other checkpoints" in wrong:
        wrong.append(f"checkpoints of {sorted(found['checkpoints'])} instead of"
                     f" {sorted(expected['checkpoints'])}")
    if wrong:
      bad.append((fault, at, wrong, ended.output[-500:]))
      print(*bad[-1], sep="\n  ", flush=True)
  print(f"{len(tried)} faults at {operations} operations; slowest end {slowest:.1f} s;"
        " codes",
        {fault: {code: found.count(code) for code in set(found)}
         for fault, found in codes.items()})
  assert not bad
