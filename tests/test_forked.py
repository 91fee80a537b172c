"""The fixture `command`, on which the tests of all commands rely."""

import signal

import pytest

from forked import ROOT


def test_code_output_and_errors(command):
  code = "import os, sys; print(*sys.argv, os.getcwd(), os.environ['A']); sys.exit('é')"
  ended = command("name", "--x", 2, code=code, folder=ROOT, env={"A": "b"})
  assert ended == (1, f"name --x 2 {ROOT} b\n", "é\n")
  assert command("name", code="print(1)") == (0, "1\n", "")


@pytest.mark.parametrize("code, last", [
    ("import warnings; warnings.warn('old')", "UserWarning: old"),
    ("1 / 0", "ZeroDivisionError: division by zero")])
def test_warnings_are_errors(command, code, last):
  code, out, err = command("name", code=code)
  assert (code, out) == (1, "") and err.splitlines()[-1] == last


def test_limits(command):
  assert command("name", code="while True: pass", seconds=1).code == -signal.SIGALRM
  code = "print(len(bytes(2**30)))"
  assert command("name", code=code, memory=2**31).out == f"{2**30}\n"
  ended = command("name", code=code, memory=2**29)
  assert ended.code == 1 and ended.err.endswith("MemoryError\n")


def test_commands_do_not_change_each_other(command):
  command("name", code="import os, minw; minw.__version__ = os.environ['A'] = 'x'")
  code = "import os, minw; print(minw.__version__, 'A' in os.environ)"
  assert not command("name", code=code).out.startswith("x ")
  assert command("name", code=code).out.endswith(" False\n")
