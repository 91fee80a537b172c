"""Runs JavaScript of the package in Node, which tests skip without."""

import base64
import json
import pathlib
import re
import shutil
import subprocess
from typing import Any

import numpy as np
import pytest

WEB = pathlib.Path(__file__).parents[1] / "minw/web"
SCRIPTS = pathlib.Path(__file__).parent / "web"
_LEAST = 20  # Oldest version that the library supports.


def _version() -> int:
  """The first number of Node's version; 0 without Node."""
  if not shutil.which("node"):
    return 0
  said = subprocess.run(["node", "--version"], capture_output=True, text=True)
  found = re.match(r"v(\d+)", said.stdout)
  return int(found[1]) if found else 0


needs_node = pytest.mark.skipif(
    _version() < _LEAST, reason=f"Node {_LEAST} or newer is not installed")


def run(*arguments: Any, **options: Any) -> str:
  """The standard output of a program, which must succeed and print no error."""
  done = subprocess.run([str(argument) for argument in arguments], capture_output=True,
                        text=True, **options)
  assert done.returncode == 0, done.stdout + done.stderr
  return done.stdout


def calls(wanted: list, library: pathlib.Path = WEB / "minw.js") -> list[dict]:
  """What calls of the functions in web/call.mjs return: "result" or "error"."""
  said = run("node", SCRIPTS / "call.mjs", library, input=json.dumps(wanted))
  return json.loads(said)


def results(wanted: list, library: pathlib.Path = WEB / "minw.js") -> list:
  """The results of calls none of which may fail."""
  found = calls(wanted, library)
  assert not [entry for entry in found if "error" in entry], found
  return [entry.get("result") for entry in found]


def encoded(data: bytes | np.ndarray) -> str:
  return base64.b64encode(bytes(data)).decode()


def inline(data: bytes) -> str:
  """The content of a file as an argument of calls, in place of its path."""
  return f"data:{encoded(data)}"


def array(text: str, dtype: Any, *shape: int) -> np.ndarray:
  return np.frombuffer(base64.b64decode(text), dtype).reshape(shape)
