"""Training on disks that fail, processes that are killed, and clocks that jump.

`faults.c` makes one file operation of a run in its workdir fail. Whatever happens then,
the run ends soon, says why in one line, and the same command resumes it to the numbers
of a run that nothing happened to. By default some operations are tried with some
faults; MINW_FAULTS=N tries N pairs of them, and MINW_FAULTS=all tries all.
"""

import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
import time
from typing import NamedTuple

import pytest

from minw import config as config_lib
from short_runs import ROOT
from short_runs import lines_of
from short_runs import tiny_config
from short_runs import trees_of

pytestmark = pytest.mark.slow

SECONDS = 150.0  # Longest time that a run may take, also on a busy machine.

# Exit codes that a run may end with, by fault. It ends with 0 if the fault did no harm
# or came at the very end, and with 2 if the workdir could not be claimed.
DISK = {0, 2, 74}
CODES = {
    "kill": {-9}, "torn": {-9}, "term": {0, 75}, "int": {0, 75, 130}, "past": {0},
    **dict.fromkeys(("full", "full1", "bad", "bad1", "locked", "locked1"), DISK)}

# Runs `minw.main` in processes that are forked from this one when it has imported
# everything, which saves most of their time. A line names the workdir and the fault.
_SERVER = """
import ctypes, json, os, runpy, signal, sys, time, traceback
from minw import train, stopping
from minw.data import datasets
import PIL.PngImagePlugin, matplotlib.backends.backend_agg, sklearn.datasets

faults = ctypes.CDLL(None)
seconds = float(sys.argv[1])

def child(workdir, fault, at, count):
  faults.faults_arm(workdir.encode(), fault.encode(), ctypes.c_long(at))
  sys.argv = ["minw.main", "--config=config.py", f"--workdir={workdir}"]
  sys.modules.pop("minw.main", None)
  try:
    runpy.run_module("minw.main", run_name="__main__", alter_sys=True)
  except SystemExit as error:
    code = error.code
  except BaseException:
    traceback.print_exc()
    code = 1
  with open(count, "w") as file:
    file.write(str(faults.faults_count()))
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(code or 0)

print("ready", flush=True)
for line in sys.stdin:
  case = json.loads(line)
  pid = os.fork()
  if not pid:
    log = os.open(case["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    child(case["workdir"], case["fault"], case["at"], case["count"])
  deadline, status = time.monotonic() + seconds, (0, 0)
  while status[0] == 0 and time.monotonic() < deadline:
    time.sleep(0.01)
    status = os.waitpid(pid, os.WNOHANG)
  if status[0] == 0:
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    print("hangs", flush=True)
  else:
    print(os.waitstatus_to_exitcode(status[1]), flush=True)
"""


class Ended(NamedTuple):
  """How a run ended: its exit code, None if it did not end in time, and its output."""

  code: int | None
  output: str
  seconds: float

  @property
  def errors(self):
    return [line for line in self.output.splitlines() if line.startswith("error: ")]


@pytest.fixture(scope="module")
def train(tmp_path_factory):
  with trainer(tmp_path_factory.mktemp("faults")) as train:
    yield train


@contextlib.contextmanager
def trainer(folder):
  """train(workdir, fault="count", at=0): runs `minw.main`, and returns `Ended`."""
  compiler = shutil.which("cc") or shutil.which("gcc")
  if not compiler or not sys.platform.startswith("linux"):
    pytest.skip("needs Linux and a C compiler")
  library = folder / "faults.so"
  subprocess.run([compiler, "-shared", "-fPIC", "-O1", ROOT / "tests" / "faults.c",
                  "-o",
                  library, "-ldl"], check=True)
  config = tiny_config(conv_widths=(), dense_widths=(8,), num_epochs=3,
                       train_examples=256, histogram_layers=("*",),
                       histogram_epochs=(1, 2))
  (folder / "config.py").write_text(
      "from minw import config\n"
      f"def get_config(): return config.from_json({config_lib.to_json(config)!r})\n")
  environment = os.environ | {
      "PYTHONPATH": str(ROOT), "LD_PRELOAD": str(library), "MPLBACKEND": "agg",
      "JAX_COMPILATION_CACHE_DIR": str(folder / "cache"),
      "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
      "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1"}
  with subprocess.Popen(
      [sys.executable, "-c", _SERVER, str(SECONDS)], cwd=folder, env=environment,
      text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as server:
    assert server.stdout.readline() == "ready\n"

    def train(workdir, fault="count", at=0):
      log = folder / "log"
      case = {"workdir": str(workdir), "fault": fault, "at": at, "log": str(log),
              "count": str(folder / "count")}
      began = time.monotonic()
      server.stdin.write(json.dumps(case) + "\n")
      server.stdin.flush()
      code = server.stdout.readline().strip()
      return Ended(None if code == "hangs" else int(code),
                   log.read_text(errors="replace"), time.monotonic() - began)

    train.count = folder / "count"
    yield train
    server.stdin.close()


def outcome(workdir):
  """The results that a disturbed run must have in common with another one."""
  return {"status": json.loads((workdir / "status.json").read_text()),
          "lines": lines_of(workdir), "checkpoints": trees_of(workdir)}


def faults_of(ended, fault):
  """What is wrong with how a run ended that had this fault."""
  if ended.code is None:
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


def test_runs_resume_after_every_fault(train, tmp_path):
  whole = tmp_path / "whole"
  undisturbed = train(whole)
  assert undisturbed.code == 0, undisturbed.output
  expected = outcome(whole)
  assert expected["status"]["state"] == "done"
  count = int(train.count.read_text())
  assert count > 100  # Otherwise the operations are not seen.

  bad, codes, slowest = [], {}, 0.0
  tried = pairs(count, os.environ.get("MINW_FAULTS", "8"))
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
  print(f"{len(tried)} faults at {count} operations; slowest end {slowest:.1f} s;"
        " codes",
        {fault: {code: found.count(code) for code in set(found)}
         for fault, found in codes.items()})
  assert not bad
