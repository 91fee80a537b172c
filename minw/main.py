"""Trains a network: `python -m minw.main --config=experiments/x.py --workdir=DIR`.

With --distributed it is one process of several, each of which is started so.
"""

import logging
import signal

from absl import flags

from minw import cli
from minw import config_flag

# Exit codes beside 0, done, and 2, bad input.
DIVERGED = 3
PREEMPTED = 75  # Start the same command again to go on.

if __name__ == "__main__":
  _CONFIG = config_flag.define()
  _WORKDIR = flags.DEFINE_string(
      "workdir", None, "Where the run is kept; one place for all processes.",
      required=True)
  _DISTRIBUTED = flags.DEFINE_bool(
      "distributed", False, "Whether this is one process of several; on TPU pods, "
      "under Slurm and Open MPI, nothing else is needed.")
  _COORDINATOR = flags.DEFINE_string(
      "coordinator", None, "HOST:PORT where process 0 listens.")
  _NUM_PROCESSES = flags.DEFINE_integer(
      "num_processes", None, "How many there are.", lower_bound=1)
  _PROCESS_ID = flags.DEFINE_integer(
      "process_id", None, "Of this one, from 0.", lower_bound=0)
  _HEARTBEAT_TIMEOUT = flags.DEFINE_integer(
      "heartbeat_timeout", 100, "Seconds after which a process that is not heard of "
      "counts as dead, which ends the others.", lower_bound=1)

  def check_flags() -> None:
    place = (_COORDINATOR, _NUM_PROCESSES, _PROCESS_ID)
    given = [flag for flag in place if flag.value is not None]
    for flag in (*given, *[_HEARTBEAT_TIMEOUT] * _HEARTBEAT_TIMEOUT.present):
      cli.check(_DISTRIBUTED.value, flag.name, flag.value,
                "left out without --distributed")
    if 0 < len(given) < len(place):
      missing = [flag.name for flag in place if flag.value is None]
      raise cli.UsageError(f"--{given[0].name} goes with --{' and --'.join(missing)}")
    if given:
      host, _, port = _COORDINATOR.value.rpartition(":")
      cli.check(host and port.isdecimal() and 0 < int(port) < 2**16, "coordinator",
                _COORDINATOR.value, "HOST:PORT")
      cli.check(_PROCESS_ID.value < _NUM_PROCESSES.value, "process_id",
                _PROCESS_ID.value, f"less than num_processes={_NUM_PROCESSES.value}")

  def main() -> int:
    check_flags()
    from minw import distributed  # Takes seconds: bad flags are reported before.
    from minw import train

    if _DISTRIBUTED.value:
      distributed.initialize(_COORDINATOR.value, _NUM_PROCESSES.value,
                             _PROCESS_ID.value, _HEARTBEAT_TIMEOUT.value)
    with distributed.ending_at_once():
      if distributed.is_main():
        logging.getLogger("minw").setLevel(logging.INFO)
      status = train.train_and_evaluate(_CONFIG.value, _WORKDIR.value)
    if status["state"] == "preempted":
      signal.signal(signal.SIGTERM, signal.SIG_IGN)  # Once more changes nothing.
    print(f"{_WORKDIR.value}: {status}")
    return {"done": 0, "diverged": DIVERGED, "preempted": PREEMPTED}[status["state"]]

  cli.run(main)
