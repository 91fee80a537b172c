"""Start, watch, resume and retry many training runs.

  python launch/sweep.py --sweep=estimators:seeds=3 --dir=runs/estimators --jobs=2
  python launch/sweep.py --sweep=... --dir=... --status
  python launch/sweep.py --sweep=... --dir=... --emit=slurm --out=estimators.sbatch

A sweep is a Python file with a function `get_runs(argument="")`. It yields a tuple
(name, config, overrides) for each run. The config is given as for --config, NAME or
NAME:ARGUMENT, and the overrides are a dict of fields. Sweeps in experiments/sweeps are
given by name, and others by path.

If `init_from` or `teacher` is the name of another run of the sweep, that run is done
first. The workdir of a run is DIR/NAME. It also contains log.txt and sweep.json, the
record of all tries.

The number of runs at a time is --jobs. Each run has its own cores, and its own GPUs if
there are any. On CPUs, a sweep is fastest with one run per core. If the sweep is
started again, it skips runs that are done and resumes interrupted runs. It starts runs
that failed again, up to --retries times each. Runs that diverged are not repeated. Runs
that rejected their input are repeated only when the sweep is started again.

SIGTERM and SIGINT let the runs save their states, and end the sweep with code 75. A
second signal kills the runs. Otherwise the exit code is 0 if all runs are done, 1 if
some are not, and 2 for bad input.

Several sweeps may work on one directory, because a run belongs to the process that
holds the lock of its workdir. `minw.workdir.locks` describes this lock, which
`minw.main` takes as well. If the lock does not hold between machines, give each machine
different runs with --only. The files written by --emit do so.

This was tried on Linux with CPUs and a local file system. It was not tried with GPUs or
network file systems.
"""

from minw import stopping

if __name__ == "__main__":  # The other imports take seconds.
  stopping.watch()

from typing import Sequence

from absl import flags

from minw import cli
from minw import errors
from minw import exit_codes
from minw import files
from minw import sweeps


def define_flags() -> None:
  """Defines the flags of the command."""
  cli.DEFINE_path(
      "sweep", None, "Name or file of a sweep; NAME:ARGUMENT passes it an argument.")
  cli.DEFINE_path(
      "dir", None, "Directory that holds a workdir for each run. It may be "
      "gs://BUCKET/NAME.", remote=True)
  cli.DEFINE_path(
      "data_dir", None,
      "Directory of the prepared data sets, if not where the configs say. It may be "
      "gs://BUCKET/NAME.", remote=True)
  flags.DEFINE_integer("jobs", 1, "Number of runs at a time.", lower_bound=1)
  flags.DEFINE_integer(
      "retries", 2, "Number of times that a failed run is started again.",
      lower_bound=0)
  flags.DEFINE_list("only", [], "Names of the runs to do; all by default.")
  flags.DEFINE_bool(
      "status", False, "Whether to print the progress of all runs and start none.")
  flags.DEFINE_enum(
      "emit", None, ["slurm", "jobset"], "Write only a Slurm array or a JobSet.")
  cli.DEFINE_path("out", None, "File for --emit.")
  cli.require("sweep", "dir")


def main() -> int:
  """Runs a sweep according to the flags, and returns the exit code."""
  f = flags.FLAGS
  errors.check((f.emit is None) == (f.out is None), "out", f.out,
               "given with --emit, and only then")
  runs = sweeps.select(sweeps.read(f.sweep, f.dir, f.data_dir), f.only)
  if f.emit:
    _emit(runs)
    return 0
  show = lambda: print(
      sweeps.table(f.dir, sweeps.states(runs, f.retries), f.jobs), flush=True)
  if f.status:
    show()
    return 0
  sweeps.make_folder(f.dir)
  ended = sweeps.run_all(
      runs, jobs=f.jobs, retries=f.retries, steps=sweeps.check(runs), say=cli.note)
  show()
  if not ended:
    return exit_codes.PREEMPTED
  return int(any(s.name != "done" for s in sweeps.states(runs, f.retries).values()))


def _emit(runs: Sequence[sweeps.Run]) -> None:
  import emit
  f = flags.FLAGS
  text = getattr(emit, f.emit)(
      [run.name for run in runs], jobs=f.jobs, command=[
          "python", "launch/sweep.py", f"--sweep={f.sweep}", f"--dir={f.dir}",
          f"--retries={f.retries}",
          *([f"--data_dir={f.data_dir}"] if f.data_dir else [])])
  try:
    files.write(f.out, text)
  except OSError as error:
    raise errors.bad_value("out", f.out, f"a file to write ({error})") from error


if __name__ == "__main__":
  cli.run(main, define_flags)
