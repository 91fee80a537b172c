"""Examples in docstrings give what they show, and every public function has one."""

import ast
import doctest
import inspect
import pathlib
import re

import pytest

from minw import estimators
from minw import infer
from minw import pack
from minw import quantizers
from minw.workdir import checkpoint
from minw.workdir import run_files
from short_runs import fresh_state
from short_runs import tiny_config

PAGE = pathlib.Path(__file__).parents[1] / "docs" / "reference" / "python.md"
MODULES = (estimators, infer, pack, quantizers)
# Parts of the commands, which are no part of the Python interface.
COMMANDS = ("define_flags", "load_for_command", "main")


def names():
  """What the examples use without an import: the imports on the page of the docs."""
  imports, = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
  assert all(isinstance(node, (ast.Import, ast.ImportFrom))
             for node in ast.parse(imports).body)
  found = {}
  exec(imports, found)
  return found


EXAMPLES = {test.name: test for module in MODULES
            for test in doctest.DocTestFinder().find(module, globs=names())
            if test.examples}


def save_run(workdir):
  """The workdir of a run whose network has not learned anything."""
  run_files.claim(workdir, tiny_config())
  with checkpoint.open_manager(workdir) as manager:
    checkpoint.save(manager, 1, fresh_state()._asdict(), 0.5)


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_public_functions_have_examples(module):
  public = {f"{module.__name__}.{name}" for name, value in vars(module).items()
            if inspect.isfunction(value) and value.__module__ == module.__name__
            and not name.startswith("_") and name not in COMMANDS}
  assert len(public) > 1 and public <= {*EXAMPLES}


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples(name, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  if name == "minw.pack.pack_workdir":
    save_run("runs/digits")
  lines = []
  results = doctest.DocTestRunner(verbose=False).run(EXAMPLES[name], out=lines.append)
  assert results.attempted and not results.failed, "".join(lines)
