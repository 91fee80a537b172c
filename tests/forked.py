"""Runs commands as `python -m` does, in forks of one process that has imported them.

Most of the seconds that a command takes go to imports; a fork takes 30 ms. Exit codes
and output are those of real processes. Warnings are errors.

As a program, this file is the process that forks. Each line of its input is a request,
and each line of its output says how that command ended.
"""

import contextlib
import importlib
import json
import os
import pathlib
import resource
import runpy
import signal
import subprocess
import sys
import tempfile
import traceback
from typing import Callable, Iterator, NamedTuple
import warnings

ROOT = pathlib.Path(__file__).parents[1]
TRAINING = 99  # Exit code of a run that would have started to train.
# What commands import, also where they first need it.
_MODULES = (
    "ml_collections.config_flags", "PIL.PngImagePlugin", "sklearn.datasets",
    "matplotlib.backends.backend_agg", "scipy.special", "scipy.stats", "minw.evaluate",
    "minw.export.c", "minw.plots", "minw.data.streamed", "minw.prepare",
    "minw.stopping", "minw.train")
_OPTIONAL = ("minw.export.onnx_graph", "minw.export.stablehlo")


class Ended(NamedTuple):
  """How a command ended: the code is minus the signal's number if one has ended it."""

  code: int
  out: str
  err: str


@contextlib.contextmanager
def commands(folder: pathlib.Path, **environment: str) -> Iterator[
    Callable[..., Ended]]:
  """Starts the process that forks; yields the function `run`.

  run(module, *argv) runs `python -m module argv`. Its options are

    folder   the working directory; by default it is that of `commands`
    env      more variables of the environment
    code     text of a program, which runs in the place of the module
    trains   if it is false, a run ends with code TRAINING before its first step
    seconds  time limit, after which SIGALRM ends the command
    memory   number of bytes that the command may take beside what Python has

  Args:
    folder: Working directory.
    **environment: More variables of the environment.
  """
  path = os.pathsep.join([str(ROOT), *filter(None, sys.path)])
  with subprocess.Popen(
      [sys.executable, __file__], cwd=folder, text=True, encoding="utf-8",
      env=os.environ | {"PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1",
                        "PYTHONIOENCODING": "utf-8"} | environment,
      stdin=subprocess.PIPE, stdout=subprocess.PIPE) as server:
    assert server.stdout.readline() == "ready\n"

    def run(module: str, *argv, folder=folder, env={}, code=None, trains=True,
            seconds=0, memory=None) -> Ended:
      request = dict(module=module, argv=[*map(str, argv)], folder=str(folder), env=env,
                     code=code, trains=trains, seconds=seconds, memory=memory)
      server.stdin.write(json.dumps(request) + "\n")
      server.stdin.flush()
      return Ended(*json.loads(server.stdout.readline()))

    yield run
    server.stdin.close()


# What the process that forks does, and its children.


def main() -> None:
  for name in _MODULES:
    importlib.import_module(name)
  for name in _OPTIONAL:
    with contextlib.suppress(ImportError):
      importlib.import_module(name)
  print("ready", flush=True)
  for line in sys.stdin:
    print(json.dumps(_fork(json.loads(line))), flush=True)


def _fork(request: dict) -> list:
  """The code, output and errors of a child that runs a command."""
  with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
    child = os.fork()
    if not child:
      os.dup2(out.fileno(), 1)
      os.dup2(err.fileno(), 2)
      code = _run(**request)
      sys.stdout.flush()
      sys.stderr.flush()
      os._exit(code)
    texts = []
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    for file in (out, err):
      file.seek(0)
      texts.append(file.read().decode(errors="replace"))
  return [code, *texts]


def _run(module: str, argv: list[str], folder: str, env: dict[str, str],
         code: str | None, trains: bool, seconds: int, memory: int | None) -> int:
  """Runs a command in this process, and returns its exit code."""
  os.chdir(folder)
  os.environ.update(env)
  signal.alarm(seconds)
  warnings.simplefilter("error")
  if memory is not None:
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(
        resource.RLIMIT_AS, (pages * resource.getpagesize() + memory,) * 2)
  if not trains:
    sys.modules["minw.train_step"].make_train_step = lambda _: os._exit(TRAINING)
  sys.argv = [module, *argv]
  try:
    if code is not None:
      exec(code, {"__name__": "__main__"})
    else:
      sys.modules.pop(module, None)  # Otherwise, runpy warns of it.
      runpy.run_module(module, run_name="__main__", alter_sys=True)
    return 0
  except SystemExit as error:
    if error.code is None or isinstance(error.code, int):
      return error.code or 0
    print(error.code, file=sys.stderr)
    return 1
  except BaseException:
    traceback.print_exc()
    return 1


if __name__ == "__main__":
  main()
