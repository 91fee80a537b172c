"""One training run on N processes of this machine.

  python launch/local_multiprocess.py --processes=2 -- --config=FILE --workdir=DIR

What follows `--` goes to `python -m minw.main`, with the flags that make the processes
one run. Each has its own cores, and its own GPUs where there are any; their lines are
prefixed with their numbers. SIGTERM and SIGINT are passed on. If one ends with another
code than 0, the others get SIGTERM, and SIGKILL after --grace seconds. The exit code is
that of the first to fail, or 75 if the run was preempted and goes on when started
again. If this launcher is killed, its processes get SIGTERM within a second.

Tried on Linux with two CPU processes (tests/test_launch.py); not on several GPUs.
"""

from minw import stopping

if __name__ == "__main__":  # Until `run` handles signals itself.
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
  """A port that no one listens on at the moment."""
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
  """Runs the commands side by side to the end of all.

  Args:
    commands: one a process.
    grace: seconds that the others have after one has ended with a code other than 0.

  Returns:
    The first code that is neither 0 nor 75, as a shell gives it; else 75 if there is
    one, else 0.
  """
  received = []  # Signals.
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

  codes = []  # In the order in which they end.
  running, passed_on, deadline = list(processes), 0, None
  while running:
    for process in [p for p in running if p.poll() is not None]:
      running.remove(process)
      code = process.returncode
      if code == -signal.SIGTERM and received:
        code = exit_codes.PREEMPTED  # Before it could note the signal: nothing is lost.
      codes.append(code if code >= 0 else 128 - code)
    failed = any(codes)
    if (failed or len(received) > 1) and deadline is None:
      deadline = time.monotonic() + grace
    signals = max(len(received), failed)  # Once; a second one may be deadly.
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
      "grace", 60, "Seconds that the others have to end after one has ended badly.",
      lower_bound=0)


def main(arguments: Sequence[str]) -> int:
  """Runs the processes of a run with these arguments; returns the exit code."""
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
