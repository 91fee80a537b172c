"""minw.metrics: what is kept of a record, and what TensorBoard is shown of it."""

import errno
import itertools
import json
import math
import re
import resource

import numpy as np
import pytest
from tensorboardX.proto import layout_pb2

from minw import cli
from minw import config as config_lib
from minw import metrics
from short_runs import events_of
from short_runs import values_of


def line_at(step, split="validation", mode="hard", **more):
  return {"step": step, "epoch": step // 10, "split": split, "mode": mode,
          "loss": step / 7, "accuracy": 0.5, **more}


def numbers_of(workdir):
  """The points of TensorBoard's charts."""
  return {key: value for key, value in events_of(workdir).items()
          if isinstance(value, float)}


def histograms_of(workdir):
  return [value.histo for path in sorted((workdir / "tensorboard").iterdir())[-1:]
          for _, value in values_of(path) if value and value.HasField("histo")]


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
    assert {tag for tag, _ in numbers_of(tmp_path)} == {
        "accuracy/validation", "alpha/0", "distance/conv2"}
    metrics.Writer(str(tmp_path), 1).close()


def test_tensorboard(record):
  expected = {}
  for step in (10, 20, 30):
    for curve in ("train", "validation"):
      expected[f"loss/{curve}", step] = np.float32(step / 7)
      expected[f"accuracy/{curve}", step] = 0.5
  assert numbers_of(record) == expected
  # Begun anew, within a second, it shows what the record keeps, and what is added.
  writer = metrics.Writer(str(record), 20)
  writer.write(line_at(30, loss=9.0))
  writer.close()
  kept = {key: value for key, value in expected.items() if key[1] <= 20}
  assert numbers_of(record) == kept | {
      ("loss/validation", 30): 9.0, ("accuracy/validation", 30): 0.5}


def test_tensorboard_has_a_curve_for_each_mode(tmp_path):
  writer = metrics.Writer(str(tmp_path), 0)
  for step, (split, mode) in enumerate(itertools.product(
      ("train", "validation"), ("mixed", "hard"))):
    writer.write(line_at(10, split, mode, loss=float(step), top5_accuracy=0.75))
  writer.close()
  shown = numbers_of(tmp_path)
  assert {tag: value for (tag, _), value in shown.items() if "loss" in tag} == {
      "loss/train": 0, "loss/train_hard": 1, "loss/validation_mixed": 2,
      "loss/validation": 3}
  assert shown["top5_accuracy/validation", 10] == 0.75


def test_tensorboard_joins_the_splits_in_one_chart(record):
  layout, = (value for (tag, _), value in events_of(record).items()
             if tag == "custom_scalars__config__")
  category, = layout_pb2.Layout.FromString(layout).category
  charts = {chart.title: [*chart.multiline.tag] for chart in category.chart}
  tags = [f"{name}/{split}" for name in ("loss", "accuracy", "top5_accuracy")
          for split in ("train", "validation")]
  # As TensorBoard does it: expressions that match from the start of a tag on.
  found = {name: [tag for tag in tags if any(re.match(p, tag) for p in patterns)]
           for name, patterns in charts.items()}
  assert found == {"loss": tags[:2], "accuracy": tags[2:]}


def test_tensorboard_shows_config_and_test_as_text(record):
  (record / "config.json").write_text('{\n  "seed": 7,\n  "network": "*a*"\n}\n')
  metrics.Writer(str(record), 30).close()
  text = events_of(record)["config/text_summary", 0].decode()
  assert text == '    {\n      "seed": 7,\n      "network": "*a*"\n    }\n'
  writer = metrics.Writer(str(record), 30)
  writer.write(line_at(30, "test", checkpoint="last", checkpoint_step=20))
  writer.close()
  shown = events_of(record)
  text = shown["test/last/text_summary", 30].decode()
  assert text.startswith("    {") and json.loads(text) == {
      "loss": 30 / 7, "accuracy": 0.5, "checkpoint": "last", "checkpoint_step": 20}
  assert not [tag for tag, _ in numbers_of(record) if "test" in tag]


def test_tensorboard_shows_histograms(record):
  """Those after the last checkpoint will be counted again."""
  line = {"epoch": 1, "layer": "block1/conv2", "kind": "weights", "alpha": 0.5,
          "counts": [3, 0, 0, 1, 5]}  # At -1, -0.5, 0, 0.5 and 1.
  lines = [line | {"step": 10}, line | {"step": 20, "kind": "activations"},
           line | {"step": 30}]
  (record / "histograms.jsonl").write_text(
      "".join(json.dumps(line) + "\n" for line in lines))
  writer = metrics.Writer(str(record), 20)
  writer.show_histograms([line | {"step": 30, "counts": [0, 2, 0, 0, 0]}])
  writer.close()
  shown = {key: value for key, value in events_of(record).items()
           if isinstance(value, tuple)}
  assert shown == {("weights/block1/conv2", 10): (3, 0, 0, 1, 5),
                   ("activations/block1/conv2", 20): (3, 0, 0, 1, 5),
                   ("weights/block1/conv2", 30): (0, 2, 0, 0, 0)}
  first, *_, last = histograms_of(record)
  assert (first.min, first.max, first.num, first.sum) == (-1, 1, 9, 2.5)
  assert first.sum_squares == 8.25 and [*first.bucket_limit] == [
      -0.75, -0.25, 0.25, 0.75, 1.25]
  assert (last.min, last.max) == (-0.5, -0.5)


def test_tensorboard_after_a_kill(tmp_path):
  """Nothing is missing of a run whose events were not all written."""
  writer = metrics.Writer(str(tmp_path), 0)
  for step in (10, 20):
    writer.write(line_at(step))
  writer.close()
  for path in (tmp_path / "tensorboard").iterdir():
    path.write_bytes(path.read_bytes()[:-30])
  metrics.Writer(str(tmp_path), 20).close()
  assert {step for _, step in numbers_of(tmp_path)} == {10, 20}


# A full disk.


def test_a_board_that_cannot_be_written_is_named(tmp_path):
  """tensorboardX's own writer would wait forever for a thread that has ended."""
  writer = metrics.Writer(str(tmp_path), 0)
  before = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
  try:
    with pytest.raises(OSError) as error:
      for step in range(100):  # In metrics.jsonl they take 400 bytes.
        writer.show_histograms([{"kind": "weights", "layer": "conv1", "step": step,
                                 "counts": [1] * 201}])
        writer.write({"step": step, "split": "validation", "mode": "hard"})
    with pytest.raises(OSError):
      writer.close()
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
  assert (error.value.errno, error.value.filename) == (
      errno.EFBIG, str(tmp_path / "tensorboard"))
  assert step < 5
  writer.close()


# Records of runs that are done.

STATUS = {"state": "done", "step": 30, "test_accuracy": 0.5, "test_loss": 1.0,
          "best_test_accuracy": 0.25, "best_test_loss": 1.0, "best_step": 20}


def complete_lines():
  return [line_at(10), line_at(20), line_at(30, "train", "mixed"), line_at(30),
          line_at(30, "test", checkpoint="last"),
          line_at(30, "test", checkpoint="best", accuracy=0.25)]


def check(workdir, lines, status=STATUS, **fields):
  (workdir / "metrics.jsonl").write_text(
      "".join(json.dumps(line) + "\n" for line in lines))
  config = config_lib.default_config()
  config.update({"num_epochs": 3} | fields)
  metrics.check_complete(str(workdir), config, status)


def test_a_complete_record(tmp_path):
  check(tmp_path, complete_lines())
  every = complete_lines()
  del every[0]
  check(tmp_path, every, eval_every_epochs=2)  # Epoch 2, and 3, which is the last.


@pytest.mark.parametrize("change, message", [
    (lambda lines: lines.pop(), "has 0 lines of the test split for the best checkpoint"),
    (lambda lines: lines.pop(4), "has 0 lines of the test split for the last checkpoint"),
    (lambda lines: lines.append(lines[5]), "has 2 lines of the test split for the best"),
    (lambda lines: lines.pop(0), "holds are 2 instead of 3"),
    (lambda lines: lines.insert(1, lines[1]), "holds are 4 instead of 3"),
    (lambda lines: lines[0].update(epoch=2), "holds validations of other epochs"),
    (lambda lines: lines[4].update(accuracy=0.75),
     "last checkpoint is 0.75 in metrics.jsonl and 0.5 in status.json"),
    (lambda lines: lines[0].pop("epoch"), "metrics.jsonl is damaged (KeyError('epoch'))"),
    (lambda lines: lines.clear(), "holds are 0 instead of 3"),
])
def test_what_a_record_lacks_is_named(change, message, tmp_path):
  lines = complete_lines()
  change(lines)
  with pytest.raises(cli.UsageError) as error:
    check(tmp_path, lines)
  assert str(error.value).startswith(f"workdir='{tmp_path}': must be that of a run whose")
  assert message in str(error.value)


def test_a_status_without_results(tmp_path):
  with pytest.raises(cli.UsageError, match="0.5 in metrics.jsonl and None in status"):
    check(tmp_path, complete_lines(), {"state": "done", "step": 30})


def test_no_lines_at_all(tmp_path):
  config = config_lib.default_config()
  metrics.check_complete(str(tmp_path), config, STATUS)  # A copy of two files.
  (tmp_path / "checkpoints").mkdir()
  with pytest.raises(cli.UsageError, match="holds are 0 instead of 200"):
    metrics.check_complete(str(tmp_path), config, STATUS)
