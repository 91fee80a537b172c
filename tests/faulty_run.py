"""A run in which one file operation fails: FAULT AT WORKDIR COUNT.

The library that is made of faults.c, with which Python was started, makes operation AT
in WORKDIR fail. The number of operations is written to the file COUNT.
"""

import ctypes
import pathlib
import runpy
import sys


def main() -> None:
  fault, at, workdir, count = sys.argv[1:]
  faults = ctypes.CDLL(None)
  faults.faults_arm(workdir.encode(), fault.encode(), ctypes.c_long(int(at)))
  sys.argv = ["minw.main", "--config=config.py", f"--workdir={workdir}"]
  try:
    runpy.run_module("minw.main", run_name="__main__", alter_sys=True)
  finally:
    pathlib.Path(count).write_text(str(faults.faults_count()))


if __name__ == "__main__":
  main()
