"""minw.workdir.metrics: what is kept of a record, and what is found missing in it."""

import errno
import json
import math
import resource

import pytest

from minw import config as config_lib
from minw import errors
from minw import json_files
from minw.workdir import metrics
from resource_limits import limited
from short_runs import line_at
from short_runs import numbers_of


def written(workdir):
  return [json.loads(line) for line in
          (workdir / "metrics.jsonl").read_text().splitlines()]


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


def test_records_that_cannot_be_written_are_named(tmp_path):
  writer = metrics.Writer(str(tmp_path), 0)
  with limited(resource.RLIMIT_FSIZE, 2000):
    with pytest.raises(OSError) as error:
      for step in range(100):
        writer.write(line_at(step, alpha=[0.5] * 10))
  assert (error.value.errno, error.value.filename) == (
      errno.EFBIG, str(tmp_path / "metrics.jsonl"))
  writer.close()


# The part of the records that a checkpoint has.


def copy_of(workdir, step):
  """The records that a run in `workdir` would save at `step`."""
  writer = metrics.Writer(str(workdir), step)
  writer.close()
  return json.loads(json.dumps(writer.lines))


LOSSES = {
    "half": lambda text: text[:len(text) // 2],
    "empty": lambda text: "",
    "zeros": lambda text: "\0" * len(text),
    "a line": lambda text: "".join(text.splitlines(True)[1:]),
    "order": lambda text: "".join(text.splitlines(True)[::-1]),
    "twice": lambda text: text * 2,
    "a digit": lambda text: text.replace("0.5", "0.6", 1),
    "a type": lambda text: text.replace("0.5", '"0.5"', 1),
    "not JSON": lambda text: text.replace("{", "[", 1),
    "deep": lambda text: "[" * 100_000 + "\n" + text,
}


@pytest.mark.parametrize("name", ["metrics.jsonl", "histograms.jsonl"])
@pytest.mark.parametrize("damage", LOSSES)
def test_what_is_lost_comes_from_the_checkpoint(name, damage, record, caplog):
  writer = metrics.Writer(str(record), 20)
  for step in (10, 20):
    writer.write_histograms(step, step // 10, [
        {"layer": "conv1", "kind": "weights", "alpha": 0.5, "counts": [1, 2, 3]}])
  writer.close()
  saved = copy_of(record, 20)
  assert [len(lines) for lines in saved.values()] == [4, 2]
  whole = {path.name: path.read_bytes() for path in record.glob("*.jsonl")}
  metrics.Writer(str(record), 20, saved).close()
  assert not caplog.records
  (record / name).write_text(LOSSES[damage](whole[name].decode()))
  metrics.Writer(str(record), 20, saved).close()
  assert {path.name: path.read_bytes() for path in record.glob("*.jsonl")} == whole
  warning, = caplog.records
  assert f"{record}/{name}: " in warning.getMessage()
  assert "replaced by the copy in the checkpoint of step 20" in warning.getMessage()


def test_a_damaged_record_without_a_copy_is_refused_and_left_as_it_is(record):
  text = (record / "metrics.jsonl").read_text()[1:]
  (record / "metrics.jsonl").write_text(text)
  with pytest.raises(json_files.Damaged, match="metrics.jsonl is damaged: line 1"):
    metrics.Writer(str(record), 20)
  assert (record / "metrics.jsonl").read_text() == text


def test_nothing_is_missed_of_a_run_that_begins_again(record, caplog):
  (record / "metrics.jsonl").write_text("damaged\n")
  metrics.Writer(str(record), 0).close()
  assert written(record) == []
  assert "it starts again empty" in caplog.text


# Records of runs that are done.

STATUS = {"state": "done", "step": 30, "test_accuracy": 0.5, "test_loss": 1.0,
          "best_test_accuracy": 0.25, "best_test_loss": 2.0, "best_step": 20}


def complete_lines():
  return [*(line_at(step, split, mode) for step in (10, 20, 30) for split, mode in (
              ("train", "mixed"), ("validation", "mixed"), ("validation", "hard"))),
          line_at(30, "test", checkpoint="last", loss=1.0),
          line_at(30, "test", checkpoint="best", checkpoint_step=20, loss=2.0,
                  accuracy=0.25)]


def check(workdir, lines, status=STATUS, **fields):
  (workdir / "metrics.jsonl").write_text(
      "".join(json.dumps(line) + "\n" for line in lines))
  config = config_lib.default_config()
  config.update({"num_epochs": 3} | fields)
  metrics.check_complete(str(workdir), config, status)


def test_a_complete_record(tmp_path):
  check(tmp_path, complete_lines())
  # Epoch 2, and 3, which is the last.
  check(tmp_path, complete_lines()[3:], eval_every_epochs=2)


@pytest.mark.parametrize("change, message", [
    (lambda lines: lines.pop(),
     "has 0 lines of the test split for the best checkpoint"),
    (lambda lines: lines.pop(9),
     "has 0 lines of the test split for the last checkpoint"),
    (lambda lines: lines.append(lines[10]),
     "has 2 lines of the test split for the best"),
    (lambda lines: lines.pop(0),
     "has 2 training lines of the mixed network instead of 3"),
    (lambda lines: lines.pop(1),
     "has 2 validation lines of the mixed network instead of"),
    (lambda lines: lines.pop(2),
     "has 2 validation lines of the hard network instead of 3"),
    (lambda lines: lines.insert(1, lines[2]),
     "has 4 validation lines of the hard network"),
    (lambda lines: lines[2].update(epoch=2),
     "validation lines of the hard network after"),
    (lambda lines: lines[9].update(accuracy=0.75),
     "accuracy of the last checkpoint is 0.75 in metrics.jsonl and 0.5 in status.json"),
    (lambda lines: lines[10].update(loss=3.0),
     "loss of the best checkpoint is 3.0 in metrics.jsonl and 2.0 in status.json"),
    (lambda lines: lines[10].update(checkpoint_step=10),
     "step of the best checkpoint is 10 in metrics.jsonl and 20 in status.json"),
    (lambda lines: lines[0].pop("epoch"),
     "metrics.jsonl is damaged: line 1: epoch is not a number of epochs"),
    (lambda lines: lines[1].pop("accuracy"),
     "metrics.jsonl is damaged: line 2: it has no accuracy"),
    (lambda lines: lines[2].update(split="dev"),
     "metrics.jsonl is damaged: line 3: split='dev', mode='hard' is not what is"),
    (lambda lines: lines[2].update(mode=["hard"]),
     "metrics.jsonl is damaged: line 3: split='validation', mode=['hard'] is not what"),
    (lambda lines: lines[9].update(checkpoint="first"),
     "metrics.jsonl is damaged: line 10: it does not say which checkpoint was tested"),
    (lambda lines: lines.clear(),
     "has 0 validation lines of the hard network instead of 3"),
])
def test_what_a_record_lacks_is_named(change, message, tmp_path):
  lines = complete_lines()
  change(lines)
  with pytest.raises(errors.UsageError) as error:
    check(tmp_path, lines)
  assert str(error.value).startswith(f"workdir='{tmp_path}': must be that of a run"
                                     " whose")
  assert message in str(error.value)


def test_missing_histograms_are_named(tmp_path):
  (tmp_path / "histograms.jsonl").write_text("".join(json.dumps({
      "step": step, "epoch": step // 10, "layer": "conv1", "kind": "weights",
      "alpha": 0.5, "counts": [1, 2, 3]}) + "\n" for step in (10, 30)))
  with pytest.raises(errors.UsageError, match=(
      r"histograms.jsonl has those after the epochs \[1, 3\]")):
    check(tmp_path, complete_lines(), histogram_layers=("conv1",))


def test_a_status_without_results(tmp_path):
  with pytest.raises(errors.UsageError,
                     match="0.5 in metrics.jsonl and None in status"):
    check(tmp_path, complete_lines(), {"state": "done", "step": 30})


def test_no_lines_at_all(tmp_path):
  config = config_lib.default_config()
  metrics.check_complete(str(tmp_path), config, STATUS)  # A copy of two files.
  (tmp_path / "checkpoints").mkdir()
  message = "0 validation lines of the hard network instead of 200"
  with pytest.raises(errors.UsageError, match=message):
    metrics.check_complete(str(tmp_path), config, STATUS)
