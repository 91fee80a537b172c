"""Trains a network: `python -m minw.main --config=experiments/x.py --workdir=DIR`."""

import logging

from absl import flags

from minw import cli
from minw import config_flag

# Exit codes beside 0, done, and 2, bad input.
DIVERGED = 3
PREEMPTED = 75  # Start the same command again to go on.

if __name__ == "__main__":
  _CONFIG = config_flag.define()
  _WORKDIR = flags.DEFINE_string(
      "workdir", None, "Where the run is kept.", required=True)

  def main() -> int:
    from minw import train  # Takes seconds: bad flags are reported before.

    logging.getLogger("minw").setLevel(logging.INFO)
    status = train.train_and_evaluate(_CONFIG.value, _WORKDIR.value)
    print(f"{_WORKDIR.value}: {status}")
    return {"done": 0, "diverged": DIVERGED, "preempted": PREEMPTED}[status["state"]]

  cli.run(main)
