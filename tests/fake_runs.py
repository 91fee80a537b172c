"""Runs of a sweep that do not train: each behaves as its arguments say.

As a program, it drives a sweep of such runs: FOLDER JOBS BEHAVIOUR...
"""

import pathlib
import sys

from minw import sweeps

# What stands in for minw.main: a program that starts quickly.
FAKE = """
import json, os, pathlib, signal, sys, time
workdir, behaviour = pathlib.Path(sys.argv[1]), sys.argv[2]
with (workdir / "starts").open("a") as file:
  file.write("x")
starts = (workdir / "starts").stat().st_size

def status(state, step, **more):
  part = workdir / "status.json.part"
  part.write_text(json.dumps({"state": state, "step": step, **more}))
  part.rename(workdir / "status.json")

def spans(kind):
  with (workdir.parent / "spans").open("a") as file:
    cores = sorted(os.sched_getaffinity(0))
    file.write(json.dumps([kind, workdir.name, cores]) + "\\n")

def preempted(*_):
  status("preempted", 3)
  sys.exit(75)

signal.signal(
    signal.SIGTERM, signal.SIG_IGN if behaviour == "deaf" else preempted)
spans("begin")
if behaviour == "deaf" or behaviour == "long" and starts == 1:
  status("running", 3)
  time.sleep(60)
if behaviour == "second":
  status("running", 1)
  time.sleep(1)
if behaviour == "fail" or behaviour == "fail-once" and starts == 1:
  print("first line")
  print("ValueError: it went wrong\\n", flush=True)
  sys.exit(1)
if behaviour == "refuse":
  print("error: config.data_dir: no data", flush=True)
  sys.exit(2)
if behaviour == "diverge":
  status("diverged", 4)
  sys.exit(3)
if behaviour == "killed":
  os.kill(os.getpid(), signal.SIGKILL)
if behaviour == "silent":
  sys.exit(5)
if behaviour == "stopped-once" and starts == 1:
  preempted()
time.sleep(0.1)
spans("end")
if behaviour != "lie":
  status("done", 10, test_accuracy=0.75)
"""


def fakes(folder, behaviours):
  """Runs r0, r1, ..., each of which behaves as it is told."""
  (folder / "fake.py").write_text(FAKE)
  return [sweeps.Run(f"r{i}", folder / f"r{i}", (behaviour,), None, "")
          for i, behaviour in enumerate(behaviours)]


def fake_command(run):
  """The command that starts a run, for `sweeps.run_all`."""
  return [sys.executable, "-S", str(run.workdir.parent / "fake.py"), str(run.workdir),
          *run.arguments]


def main():
  folder, jobs, *behaviours = sys.argv[1:]
  ended = sweeps.run_all(
      fakes(pathlib.Path(folder), behaviours), jobs=int(jobs), retries=1, steps={},
      say=lambda line: print(line, flush=True), command=fake_command)
  sys.exit(0 if ended else 75)


if __name__ == "__main__":
  main()
