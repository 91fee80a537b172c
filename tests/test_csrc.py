"""The style of the C++ sources; .clang-format and .clang-tidy hold most of it.

The two tools come with `pip install minw[lint]`, which the gate installs before it runs
the slow tests.
"""

import platform
import re
import subprocess

import pytest

from c_programs import CSRC
from c_programs import ROOT
from c_programs import setup_flags
from c_programs import tool

SOURCES = sorted([*CSRC.iterdir(), *(ROOT / "tests" / "native").iterdir()])


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_prose(path):
  """A file's first line says its job; comments are sentences; bits read W1A2."""
  text = path.read_text()
  assert re.match(r"(//|/\*) [A-Z].{20}", text)
  for number, line in enumerate(text.splitlines(), 1):
    assert len(line) <= 88, number
    assert not re.search(r"(?<![\w/.])[1-3]/[1-3](?![\w/.])", line), number
    assert not re.search(r"(//|/\*) (Of|Whose|What|Where|Which) |can not", line), number


def test_functions_fit_a_screen():
  """No function has over 60 lines, from its first brace to its last."""
  found = 0
  for path in SOURCES:
    depth = begin = 0
    for number, line in enumerate(path.read_text().splitlines(), 1):
      if not depth and re.search(r"\)( const| noexcept)? \{", line):
        begin = number
      elif not depth:
        continue
      depth += line.count("{") - line.count("}")
      if not depth:
        found += 1
        assert number - begin < 60, f"{path.name}:{begin}"
  assert found > 150


@pytest.mark.slow
def test_format():
  done = subprocess.run([tool("clang-format"), "--dry-run", "-Werror", *SOURCES],
                        capture_output=True, text=True)
  assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    "path", sorted(set(CSRC.glob("*.cc")) - {CSRC / "ffi.cc"}), ids=lambda p: p.name)
def test_tidy(path):
  x86 = platform.machine() == "x86_64"
  flags = setup_flags().get(path.stem, []) if x86 else []
  done = subprocess.run([tool("clang-tidy"), "-quiet", path, "--", "-std=c++17",
                         *flags],
                        capture_output=True, text=True)
  assert done.returncode == 0, done.stdout
