"""Train a network: `python -m minw.main --config=NAME --workdir=DIR`.

With --distributed, this is one of several processes that train one network together,
and each of them is started with this command. The exit code is 3 if the loss or the
weights became infinite or NaN. It is 75 if the run was preempted; the same command then
resumes it.
"""

import contextlib
import json
import re
import signal

from minw import stopping

if __name__ == "__main__":  # The imports below take seconds.
  stopping.watch()

from absl import flags

from minw import cli
from minw import config_flag
from minw import errors
from minw import exit_codes


def define_flags() -> None:
  """Defines the flags of the command."""
  config_flag.define()
  cli.DEFINE_path(
      "workdir", None,
      "Directory to write the run to, or of a run to resume. All processes share it. "
      "It may be gs://BUCKET/NAME.", remote=True)
  cli.DEFINE_path(
      "compilation_cache_dir", None,
      "Folder in which compiled programs are kept, so that the next start of a run "
      "with the same network does not compile them. It may be gs://BUCKET/NAME.",
      remote=True)
  flags.DEFINE_string(
      "profile", None,
      "Steps FIRST:LAST, 100:110 for example, of which a trace is written to profile "
      "in the workdir. Steps are counted from 0, and LAST is the first one that is not "
      "traced.")
  flags.DEFINE_enum(
      "tracker", None, ["wandb", "mlflow"],
      "Service that also receives the measurements: Weights & Biases or MLflow. A run "
      "does not depend on it.")
  flags.DEFINE_bool(
      "distributed", False,
      "Whether this is one process of several. On TPU pods, under "
      "Slurm and under Open MPI no other flag is needed.")
  flags.DEFINE_string("coordinator", None, "Address of process 0, as HOST:PORT.")
  flags.DEFINE_integer("num_processes", None, "Number of processes.", lower_bound=1)
  flags.DEFINE_integer(
      "process_id", None, "Number of this process, from 0.", lower_bound=0)
  flags.DEFINE_integer(
      "heartbeat_timeout", 100, "Seconds without a sign of life after which a process "
      "counts as dead and the others end.", lower_bound=1)
  cli.require("workdir")


def profiled_steps() -> tuple[int, int] | None:
  """Returns the steps that --profile names, or None.

  Raises:
    errors.UsageError: It is not FIRST:LAST.
  """
  text = flags.FLAGS.profile
  if text is None:
    return None
  match = re.fullmatch(r"(\d{1,10}):(\d{1,10})", text, re.ASCII)
  if match is None:
    raise errors.bad_value("profile", text, "FIRST:LAST, 100:110 for example")
  return int(match[1]), int(match[2])


def check_flags() -> None:
  """Checks the flags of distributed training.

  Raises:
    errors.UsageError: The flags do not fit together, or a value is not allowed.
  """
  f = flags.FLAGS
  place = [f[name] for name in ("coordinator", "num_processes", "process_id")]
  given = [flag for flag in place if flag.value is not None]
  heartbeat = f["heartbeat_timeout"]
  for flag in (*given, *[heartbeat] * bool(heartbeat.present)):
    errors.check(f.distributed, flag.name, flag.value, "left out without --distributed")
  if 0 < len(given) < len(place):
    missing = [flag.name for flag in place if flag.value is None]
    raise errors.UsageError(f"--{given[0].name} goes with --{' and --'.join(missing)}")
  if given:
    host, _, port = f.coordinator.rpartition(":")
    errors.check(host and port.isdecimal() and 0 < int(port) < 2**16, "coordinator",
                 f.coordinator, "HOST:PORT")
    errors.check(f.process_id < f.num_processes, "process_id", f.process_id,
                 f"less than num_processes={f.num_processes}")


def main() -> int:
  """Trains as the flags say; returns the exit code."""
  check_flags()
  profile = profiled_steps()
  from minw import compilation_cache  # It takes seconds. Bad flags are refused before.
  from minw import distributed
  from minw import train

  f = flags.FLAGS
  with contextlib.ExitStack() as stack:
    if f.distributed:
      stack.enter_context(distributed.explaining_sudden_ends(f.heartbeat_timeout))
      distributed.initialize(
          f.coordinator, f.num_processes, f.process_id, f.heartbeat_timeout)
    stack.enter_context(distributed.saying_who_ends())
    if distributed.several():
      cli.name_process("process {} of {}".format(*distributed.share()))
    if f.compilation_cache_dir:
      distributed.together(compilation_cache.use, f.compilation_cache_dir)
    if distributed.is_main():
      cli.show_progress()
    try:
      status = train.train_and_evaluate(f.config, f.workdir, profile, f.tracker)
    except train.Interrupted as interrupted:
      status = interrupted.status
  if status["state"] == "preempted":
    for number in (signal.SIGTERM, signal.SIGINT):
      signal.signal(number, signal.SIG_IGN)  # Further signals have no effect.
  print(json.dumps({"workdir": f.workdir, **status}))
  return {"done": 0, "diverged": exit_codes.DIVERGED,
          "preempted": exit_codes.PREEMPTED}[status["state"]]


if __name__ == "__main__":
  cli.run(main, define_flags)
