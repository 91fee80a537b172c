"""minw.metrics: what is kept of a record, and what TensorBoard is shown of it."""

import json
import math

import numpy as np
import pytest

from minw import metrics
from short_runs import events_of


def line_at(step, split="validation", mode="hard", **more):
  return {"step": step, "epoch": step // 10, "split": split, "mode": mode,
          "loss": step / 7, "accuracy": 0.5, **more}


def written(workdir):
  return [json.loads(line) for line in
          (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def record(tmp_path):
  """A workdir with lines at steps 10, 20, 30 and of the test split."""
  writer = metrics.Writer(str(tmp_path), 0)
  for step in (10, 20, 30):
    writer.write(line_at(step, "train", "mixed"))
    writer.write(line_at(step))
  writer.write(line_at(30, "test", checkpoint="last", checkpoint_step=30))
  writer.write(line_at(30, "test", checkpoint="best", checkpoint_step=20))
  writer.close()
  return tmp_path


def test_lines_are_appended_at_once(tmp_path):
  writer = metrics.Writer(str(tmp_path), 0)
  path = tmp_path / "metrics.jsonl"
  assert path.read_bytes() == b""
  before = b""
  for step in (10, 20, 30):
    writer.write(line_at(step))
    now = path.read_bytes()
    assert now.startswith(before) and now.endswith(b"\n")
    assert now.count(b"\n") == step // 10
    before = now
  writer.close()
  assert path.read_bytes() == before
  assert metrics.read(str(tmp_path)) == [line_at(step) for step in (10, 20, 30)]


def test_read_of_nothing(tmp_path):
  assert metrics.read(str(tmp_path)) == []


@pytest.mark.parametrize("tail", ['{"step": 40, "epo', "{", '{"step": 40}'])
def test_cut_off_line_is_dropped(tail, record):
  whole = metrics.read(str(record))
  with (record / "metrics.jsonl").open("a") as file:
    file.write(tail)
  assert metrics.read(str(record)) == whole
  metrics.Writer(str(record), 40).close()
  assert written(record) == [line for line in whole if line["split"] != "test"]


@pytest.mark.parametrize("step, kept", [
    (0, []), (9, []), (10, [10]), (29, [10, 20]), (30, [10, 20, 30]),
    (99, [10, 20, 30])])
def test_what_will_be_measured_again_is_dropped(step, kept, record):
  metrics.Writer(str(record), step).close()
  assert written(record) == [
      line for at in kept for line in (line_at(at, "train", "mixed"), line_at(at))]


def test_going_on(record):
  writer = metrics.Writer(str(record), 20)
  writer.write(line_at(30, loss=9.0))
  writer.close()
  lines = written(record)
  assert [line["step"] for line in lines] == [10, 10, 20, 20, 30]
  assert lines[-1] == line_at(30, loss=9.0)


def test_numbers_are_kept_to_the_bit(tmp_path):
  numbers = [0.1, 1 / 3, 5e-324, 1.7976931348623157e308, -0.0, 123456789.12345679]
  writer = metrics.Writer(str(tmp_path), 0)
  writer.write(line_at(1, values=numbers))
  writer.close()
  found = metrics.read(str(tmp_path))[0]["values"]
  assert [n.hex() for n in found] == [n.hex() for n in numbers]


def test_what_is_not_finite_becomes_null(tmp_path):
  line = line_at(1, loss=math.nan, alpha=[0.5, math.inf],
                 distance={"conv1": -math.inf, "conv2": 2.0})
  writer = metrics.Writer(str(tmp_path), 0)
  writer.write(line)
  writer.close()
  text = (tmp_path / "metrics.jsonl").read_text()
  strict = json.loads(text, parse_constant=lambda name: pytest.fail(name))
  assert strict == line_at(1, loss=None, alpha=[0.5, None],
                           distance={"conv1": None, "conv2": 2.0})
  for _ in range(2):  # Shown once when written, once when the record is read again.
    assert {tag for tag, _ in events_of(tmp_path)} == {
        "validation/hard_accuracy", "validation/hard_alpha/0",
        "validation/hard_distance/conv2"}
    metrics.Writer(str(tmp_path), 1).close()


def test_tensorboard(record):
  expected = {}
  for step in (10, 20, 30):
    for kind in ("train/mixed", "validation/hard"):
      expected[f"{kind}_loss", step] = np.float32(step / 7)
      expected[f"{kind}_accuracy", step] = 0.5
  test = {}
  for which, step in (("last", 30), ("best", 20)):
    test[f"test/hard_{which}_loss", 30] = np.float32(30 / 7)
    test[f"test/hard_{which}_accuracy", 30] = 0.5
    test[f"test/hard_{which}_checkpoint_step", 30] = step
  assert events_of(record) == expected | test
  # Begun anew, within a second, it shows what the record keeps, and what is added.
  writer = metrics.Writer(str(record), 20)
  writer.write(line_at(30, loss=9.0))
  writer.close()
  kept = {key: value for key, value in expected.items() if key[1] <= 20}
  assert events_of(record) == kept | {
      ("validation/hard_loss", 30): 9.0, ("validation/hard_accuracy", 30): 0.5}


def test_tensorboard_after_a_kill(tmp_path):
  """Nothing is missing of a run whose events were not all written."""
  writer = metrics.Writer(str(tmp_path), 0)
  for step in (10, 20):
    writer.write(line_at(step))
  writer.close()
  for path in (tmp_path / "tensorboard").iterdir():
    path.write_bytes(path.read_bytes()[:-30])
  metrics.Writer(str(tmp_path), 20).close()
  assert {step for _, step in events_of(tmp_path)} == {10, 20}
