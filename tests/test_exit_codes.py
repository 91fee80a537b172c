"""minw.exit_codes: the codes and their meanings, which no other file contradicts."""

import ast
import pathlib
import re

import pytest

from minw import exit_codes

ROOT = pathlib.Path(__file__).parents[1]
SOURCES = sorted([*ROOT.glob("minw/**/*.py"), *ROOT.glob("launch/*.py")])


def test_values():
  """Scripts of users and schedulers compare with these numbers."""
  assert {name: int(value) for name, value in vars(exit_codes).items()
          if isinstance(value, int)} == {
      "FAILURE": 1, "BAD_INPUT": 2, "DIVERGED": 3, "IO_ERROR": 74, "PREEMPTED": 75,
      "INTERRUPTED": 130, "BROKEN_PIPE": 141}


def test_documented_meanings():
  text = (ROOT / "docs" / "reference" / "commands.md").read_text()
  rows = re.findall(r"^\| (\d+) \| (.*) \| (.*) \|$", text, re.MULTILINE)
  assert [int(code) for code, _, _ in rows] == [*exit_codes.MEANINGS]
  for code, commands, meaning in rows:
    assert meaning.startswith(exit_codes.MEANINGS[int(code)])
    assert (commands == "all") == (int(code) in exit_codes.COMMON)


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_literal_codes(path):
  """Python files end a process with a named code; 0 needs no name."""
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Call) and ast.unparse(node.func) in (
        "sys.exit", "exit", "os._exit", "SystemExit", "_end"):
      for argument in node.args:
        assert not isinstance(argument, ast.Constant) or argument.value == 0, (
            f"{path}:{node.lineno}: {ast.unparse(node)}")


@pytest.mark.parametrize("name, pattern", [
    ("slurm.sbatch", r'"\$code" = (\d+) \]'), ("tpu_vm.sh", r"^ +(\d+)\) failures=0"),
    ("jobset.yaml", r"values: \[(\d+)\]")])
def test_scripts_resume_what_was_preempted(name, pattern):
  """Shell and YAML files cannot import the code, and state its number."""
  found = re.findall(pattern, (ROOT / "launch" / name).read_text(), re.MULTILINE)
  assert found == [str(int(exit_codes.PREEMPTED))]
