"""The notebooks of experiments/ablations run, and show what they made."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest

FOLDER = pathlib.Path(__file__).parents[1] / "experiments" / "ablations"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))

# Warnings of the notebooks' own libraries are not ours: in a process of its own.
EXECUTE = """
import sys, nbclient, nbformat
notebook = nbformat.read(sys.argv[1], 4)
nbclient.NotebookClient(
    notebook, timeout=600, resources={"metadata": {"path": sys.argv[2]}}).execute()
nbformat.write(notebook, sys.argv[3])
"""


def pictures(path):
  cells = json.loads(path.read_text())["cells"]
  outputs = [output for cell in cells for output in cell.get("outputs", ())]
  assert not [output for output in outputs if output["output_type"] == "error"]
  return sum("image/png" in output.get("data", {}) for output in outputs)


def test_there_are_notebooks():
  assert [path.stem for path in NOTEBOOKS] == ["estimators", "neuron", "open_choices"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_are_kept(path):
  code = [cell for cell in json.loads(path.read_text())["cells"]
          if cell["cell_type"] == "code"]
  assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
  assert pictures(path) >= 1


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs_at_reduced_size(path, tmp_path):
  if importlib.util.find_spec("nbclient") is None:
    pytest.skip("needs pip install 'minw[notebooks]'")
  out = tmp_path / path.name
  process = subprocess.run(
      [sys.executable, "-c", EXECUTE, path, FOLDER, out], text=True,
      capture_output=True, env={**os.environ, "MINW_NOTEBOOKS": "small"}, timeout=900)
  assert process.returncode == 0, process.stderr[-3000:]
  assert pictures(out) == pictures(path)
