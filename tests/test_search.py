"""minw.search: candidates, their costs and budgets, and the Pareto front."""

import json

import numpy as np
from PIL import Image
import pytest

from minw import config_flag
from minw import errors
from minw import search
from minw import sweeps
from minw.export import c
from packed_models import digits_convnet
from short_runs import tiny_config

# An experiment on the digits that trains for a moment.
EXPERIMENT = """
from minw import config

def get_candidates():
  yield "narrow", "8"
  yield "wide", "64"

def get_config(argument="8"):
  c = config.default_config("digits")
  c.conv_widths, c.dense_widths, c.num_epochs = (int(argument),) * 2, (), 1
  return c
"""


@pytest.fixture
def experiment(tmp_path):
  (tmp_path / "mine.py").write_text(EXPERIMENT)
  return str(tmp_path / "mine.py")


def test_candidates(experiment):
  assert search.candidates(experiment) == [
      ("narrow", f"{experiment}:8"), ("wide", f"{experiment}:64")]
  found = dict(search.candidates("folder_convnet"))
  assert len(found) == 9
  config = config_flag.load(found["medium_w1a2"])
  assert (config.weight_bits, config.input_bits, max(config.conv_widths)) == (1, 2, 256)


@pytest.mark.parametrize("config, message", [
    ("folder_convnet:size=tiny", "must be without an argument"),
    ("digits_convnet", "whose get_candidates yields"),
    ("nothing", "config 'nothing' does not exist; known: ")])
def test_experiments_without_candidates(config, message):
  with pytest.raises(errors.UsageError, match=message):
    search.candidates(config)


def test_numbers_of_bytes():
  values = {None: None, "0": 0, "999": 999, "64k": 65_536, "2M": 2_097_152}
  for text, value in values.items():
    assert search.parse_bytes("budget_ram", text) == value
  for text in ("", "k", "64 k", "64K", "1.5k", "-1", "9999999999", "64kB"):
    with pytest.raises(errors.UsageError, match="budget_ram='.*': must be a number of"):
      search.parse_bytes("budget_ram", text)


def test_budgets():
  cost = search.Cost(flash=1000, ram=500, xnor=1)
  for flash, ram in ((None, None), (1000, 500), (None, 500), (1000, None)):
    assert search.over_budget(cost, flash, ram) == ""
  assert search.over_budget(cost, 999, 499) == (
      "flash 1,000 > 999 bytes, RAM 500 > 499 bytes")
  assert search.over_budget(cost, None, 499) == "RAM 500 > 499 bytes"


def test_footprint():
  """It is what the C file states, with the labels "number 0" to "number 9"."""
  program = digits_convnet()
  text = c.source(program, np.zeros((1, 8, 8, 1), np.uint8))
  found = c.footprint(program)
  assert f"Constants: {found.constants - 10 * (9 + 4)} bytes, and labels." in text
  assert f"Static memory: {found.static} bytes" in text
  assert f"#define MINW_STACK {found.stack} " in text


def test_cost():
  """Convolutions of 8 and 8 channels on 8x8 pixels, and 4x4x8 codes to 10 classes."""
  xnor = lambda weights, inputs: weights * (
      64 * 9 * 8 * 8 + 64 * 9 * 8 * 8 * inputs + 128 * 10 * inputs)
  found = {}
  for bits in ((1, 1), (1, 2), (2, 2)):
    cost = search.untrained_cost(tiny_config(
        dense_widths=(), weight_bits=bits[0], input_bits=bits[1]))
    assert cost.xnor == xnor(*bits)
    found[bits] = cost
  # One word for each pixel of the first map, for the two of the second map that precede
  # it, and for each threshold of that one. The image has 64 bytes, and the stack more
  # than 256.
  words = 64 + 2 + 1
  assert found[1, 1].ram == found[1, 2].ram - 4 * words > 4 * words + 64 + 256
  assert found[1, 1].flash > search.CODE + (9 * 8 + 9 * 8 * 8 + 128 * 10) / 8
  assert found[2, 2].flash > found[1, 2].flash >= found[1, 1].flash


def test_a_network_that_c_cannot_have():
  with pytest.raises(errors.UsageError, match="the network cannot be exported as C: "):
    search.untrained_cost(tiny_config(bits_rules=(("conv1", "float32"),)))


def result(name, accuracies, flash, ram, xnor=1, left_out=""):
  return search.Result(name, f"x:{name}", search.Cost(flash, ram, xnor), left_out,
                       accuracies, accuracies)


RESULTS = [
    result("large", (0.9,), 300, 30), result("small", (0.6, 0.8), 100, 10),
    result("poor", (0.6,), 200, 20), result("out", (), 900, 9, 1, "flash 900 > 500"),
    result("equal", (0.7,), 100, 10), result("little RAM", (0.5,), 200, 5)]


def test_front():
  """A network is on it unless another one is at least as good everywhere."""
  assert [r.name for r in search.front(RESULTS)] == [
      "small", "equal", "little RAM", "large"]
  assert search.front([RESULTS[3]]) == []


def test_table_and_content():
  lines = search.table(RESULTS).splitlines()
  assert lines[1] == "* large           0.9000  0.9000      300       30          0.00"
  assert lines[2].startswith("* small           0.7000  0.7000 ")
  assert lines[3].startswith("  poor  ") and lines[4].endswith("  flash 900 > 500")
  content = json.loads(json.dumps(search.content(RESULTS, 500, None)))
  assert content["budget"] == {"flash": 500, "ram": None}
  assert [c["front"] for c in content["candidates"]] == [
      True, True, False, False, True, True]
  assert content["candidates"][1] == {
      "name": "small", "config": "x:small", "left_out": "", "front": True,
      "cost": {"flash": 100, "ram": 10, "xnor": 1}, "validation": [0.6, 0.8],
      "test": [0.6, 0.8]}


@pytest.mark.parametrize("results", [RESULTS, [RESULTS[3]]])
def test_figure(results):
  flash, ram, _ = search.figure(results).axes
  assert flash.get_xlabel() == "flash in kB"
  front = search.front(results)
  assert flash.lines[1].get_xdata().tolist() == [
      r.cost.flash / 1000 for r in front]
  assert ram.lines[1].get_ydata().tolist() == [r.accuracy for r in front]
  assert [text.get_text() for text in ram.texts] == [r.name for r in front]


def test_a_candidate_without_a_finished_run(tmp_path):
  run = sweeps.Run("a-seed0", tmp_path, (), None, ())
  found = search.measured(RESULTS[0], [run], {"a-seed0": sweeps.State("diverged")})
  assert found.left_out == "no run is done"


@pytest.mark.parametrize("arguments, message", [
    (("--budget_ram=1",), "error: no candidate is within the budgets (narrow: RAM "),
    (("--budget_flash=64kB",), "error: budget_flash='64kB': must be a number of bytes"),
    (("--only=narow",), "error: candidate 'narow' does not exist; did you mean"),
    (("--config.conv_widths=(4,4)",),
     "error: config.conv_widths=(4, 4): must be left out: the search chooses it"),
    (("--config.num_epochs=0",), "error: run 'narrow-seed0': config.num_epochs=0: mu"),
    (("--seeds=0",), "error: seeds='0': must be ")])
def test_refused(command, experiment, tmp_path, arguments, message):
  code, out, err = command(
      "minw.search", f"--config={experiment}", f"--dir={tmp_path}/dir", *arguments)
  assert (code, out) == (2, "") and err.startswith(message) and err.count("\n") == 1
  assert not (tmp_path / "dir").exists()


@pytest.mark.slow
def test_search(command, experiment, tmp_path):
  """One candidate is left out, the other is trained twice, and then not again."""
  arguments = ("minw.search", f"--config={experiment}", f"--dir={tmp_path}/dir",
               "--budget_flash=10k", "--seeds=2", "--jobs=2",
               "--config.eval_every_epochs=1")
  done = command(*arguments)
  assert done.code == 0, done.err
  assert "wide: left out, flash " in done.err
  lines = done.out.splitlines()
  assert lines[1].startswith("* narrow ") and " > 10,240 bytes" in lines[2]
  content = json.loads((tmp_path / "dir" / "search.json").read_text())
  narrow, wide = content["candidates"]
  assert len(narrow["test"]) == 2 and wide["validation"] == [] and narrow["front"]
  status = json.loads((tmp_path / "dir/narrow-seed1/status.json").read_text())
  assert narrow["test"][1] == status["test_accuracy"]
  with Image.open(tmp_path / "dir" / "search.png") as image:
    assert image.width > image.height
  again = command(*arguments)
  assert again.code == 0 and again.out == done.out and "started" not in again.err
