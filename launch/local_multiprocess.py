"""Train one network with several processes on this machine.

  python launch/local_multiprocess.py --processes=2 -- --config=FILE --workdir=DIR

The arguments after `--` are passed to `python -m minw.main`, with the flags that join
the processes to one run. Each process has its own cores, and its own GPUs if there are
any. The number of the process precedes each of its lines.

SIGTERM and SIGINT are passed on to the processes. If one process ends with a code other
than 0, the others get SIGTERM, and SIGKILL after --grace seconds. The exit code is that
of the first process that failed. It is 75 if the run was preempted; the same command
then resumes it. If this launcher is killed, its processes get SIGTERM within a second.

This was tried on Linux with two CPU processes (tests/test_launch.py), and not with
several GPUs.
"""

from minw import stopping

if __name__ == "__main__":  # Later, `run` handles signals itself.
  stopping.watch()

import functools
import signal
import socket
import subprocess
import sys
import threading
import time
from typing import Sequence

from absl import flags

from minw import cli
from minw import errors
from minw import exit_codes
from minw import places

_POLL_SECONDS = 0.05


def free_port() -> int:
  """Returns a port on which no process listens at the moment."""
  with socket.socket() as server:
    server.bind(("localhost", 0))
    return server.getsockname()[1]


def _prefixed(number: int, process: subprocess.Popen) -> None:
  assert process.stdout is not None
  for line in process.stdout:
    sys.stdout.write(f"[{number}] {line}" if line.endswith("\n")
                     else f"[{number}] {line}\n")
    sys.stdout.flush()


def run(commands: Sequence[Sequence[str]], grace: float) -> int:
  """Runs the commands side by side until all have ended.

  Args:
    commands: Commands, one for each process.
    grace: Seconds that the other processes have to end after one has ended with a code
      other than 0.

  Returns:
    The first exit code other than 0 and 75. It is 128 plus the number of the signal if
    a signal killed the process. If there is none, 75 if a process ended with 75, else
    0.
  """
  received = []  # Signals that arrived.
  for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda number, _: received.append(number))
  processes = [
      places.start(
          command,
          place._replace(environment=place.environment | stopping.following()),
          stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
          text=True, errors="replace")
      for command, place in zip(commands, places.split(len(commands)))]
  readers = [threading.Thread(target=_prefixed, args=(i, process), daemon=True)
             for i, process in enumerate(processes)]
  for reader in readers:
    reader.start()

  codes = []  # Exit codes in the order in which the processes end.
  running, passed_on, deadline = list(processes), 0, None
  while running:
    for process in [p for p in running if p.poll() is not None]:
      running.remove(process)
      code = process.returncode
      if code == -signal.SIGTERM and received:
        # The signal came before the process could note it. Nothing is lost.
        code = exit_codes.PREEMPTED
      codes.append(code if code >= 0 else 128 - code)
    failed = any(codes)
    if (failed or len(received) > 1) and deadline is None:
      deadline = time.monotonic() + grace
    # A failure sends one signal. A second signal might kill a process that is saving.
    signals = max(len(received), failed)
    if signals > passed_on:
      passed_on = signals
      for process in running:
        process.send_signal(signal.SIGTERM)
    if running and deadline is not None and time.monotonic() > deadline:
      print(f"{len(running)} did not end within {grace:g} s: killed", file=sys.stderr)
      for process in running:
        process.kill()
        process.wait()
      break
    time.sleep(_POLL_SECONDS)
  for reader in readers:
    reader.join(timeout=1)  # A child of a process may hold its output open.
  failures = [code for code in codes if code not in (0, exit_codes.PREEMPTED)]
  return (failures + [code for code in codes if code] + [0])[0]


def define_flags() -> None:
  """Defines the flags of the command."""
  flags.DEFINE_integer("processes", 2, "Number of processes.", lower_bound=1)
  flags.DEFINE_string("module", "minw.main", "Module that `python -m` runs.")
  flags.DEFINE_float(
      "grace", 60, "Seconds that the other processes have to end after one has failed.",
      lower_bound=0)


def main(arguments: Sequence[str]) -> int:
  """Runs the processes of a run with these arguments, and returns the exit code."""
  errors.check(bool(arguments), "arguments", "", "given after --: those of minw.main")
  f = flags.FLAGS
  command = [sys.executable, "-m", f.module, *arguments, "--distributed",
             f"--coordinator=localhost:{free_port()}",
             f"--num_processes={f.processes}"]
  return run([[*command, f"--process_id={i}"] for i in range(f.processes)], f.grace)


def _split_arguments() -> list[str]:
  """Removes `--` and what follows it from `sys.argv`, and returns the latter."""
  split = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
  arguments = sys.argv[split + 1:]
  del sys.argv[split:]
  return arguments


if __name__ == "__main__":
  cli.run(functools.partial(main, _split_arguments()), define_flags)
