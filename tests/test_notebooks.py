"""The notebooks of experiments/ablations run, and show what they made."""

import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys

from matplotlib import figure
import numpy as np
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
  assert [path.stem for path in NOTEBOOKS] == [
      "estimators", "neuron", "open_choices", "recipes"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_are_kept(path):
  code = [cell for cell in json.loads(path.read_text())["cells"]
          if cell["cell_type"] == "code"]
  assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
  assert pictures(path) >= 1


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_style(path):
  """Panels have the style of docs/aqe.png; bits are written as W1A2."""
  cells = json.loads(path.read_text())["cells"]
  source = "\n".join("".join(cell["source"]) for cell in cells)
  assert "plots.decorate(" in source and ".set_title(" not in source
  assert not re.search(r"\b([1-3])/\1\b", source)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_text_is_sentences(path):
  """Each paragraph and item ends like a sentence, and none begins like a fragment."""
  cells = json.loads(path.read_text())["cells"]
  texts = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown"]
  parts = [part for text in texts for part in re.split(r"\n\n|\n(?=- )", text)
           if not part.startswith("#")]
  assert len(parts) > 4
  for part in parts:
    assert re.search(r"[.:]\)?$", part), part
    assert not re.match(r"(- )?(Of|Whose|Where|What an?|Not|But) ", part), part


@pytest.fixture
def small_runs(monkeypatch):
  """The module beside the notebooks; what it sets for them is taken back."""
  pytest.importorskip("IPython", reason="needs pip install 'minw[notebooks]'")
  monkeypatch.setenv("XLA_FLAGS", os.environ.get("XLA_FLAGS", ""))
  monkeypatch.syspath_prepend(FOLDER)
  return importlib.import_module("small_runs")


def row_of(axes, row):
  """Markers, interval and texts in a row of `plot_means` or `plot_differences`."""
  lines = [line for line in axes.get_lines()
           if {*np.atleast_1d(line.get_ydata())} == {row}]
  bars = [path for collection in axes.collections for path in collection.get_segments()
          if path[0, 1] == row]
  texts = [text.get_text() for text in axes.texts if text.xy[1] == row]
  (bar,) = bars
  return {line.get_marker(): [*np.atleast_1d(line.get_xdata())] for line in lines}, (
      bar[0, 0], bar[1, 0]), texts


def test_intervals_of_accuracies_end_at_1(small_runs):
  axes = figure.Figure().subplots()
  small_runs.plot_means(axes, {"a": {0: 0.96, 1: 0.98, 2: 1.0}, "b": {0: 0.5, 1: 0.5}})
  markers, (low, high), _ = row_of(axes, 0)
  # 4.3027 * 0.02 / sqrt(3), of Student's table.
  assert (low, high) == (pytest.approx(0.98 - 0.0496829), 1.0)
  assert markers["."] == [0.96, 0.98, 1.0] and markers["o"] == [pytest.approx(0.98)]
  assert row_of(axes, 1)[1] == (0.5, 0.5)
  assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b"]


def test_outliers_do_not_squeeze_the_other_rows(small_runs):
  results = {"default": {0: 0.8, 1: 0.9}, "near": {0: 0.81, 1: 0.91},
             "far": {0: 0.5, 1: 0.6}, "wide": {0: 0.85, 1: 0.99}}
  axes = figure.Figure().subplots()
  small_runs.plot_differences(axes, results, "default", within=0.2)
  assert axes.get_xlim() == (-0.2, 0.2)
  markers, _, texts = row_of(axes, 0)
  assert not {"<", ">"} & markers.keys() and texts == []
  np.testing.assert_allclose(markers["."], [0.01, 0.01])
  markers, _, texts = row_of(axes, 1)
  assert markers["<"] == [-0.2] and ">" not in markers
  assert texts == ["-0.3000 ± 0.0000"]
  # 0.05 and 0.09: the interval reaches 0.07 + 12.7 * 0.02, beyond the axis.
  markers, _, texts = row_of(axes, 2)
  assert markers[">"] == [0.2] and "<" not in markers and texts == []


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
