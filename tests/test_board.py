"""minw.workdir.board: what TensorBoard is shown; it never stands in a run's way."""

import errno
import itertools
import json
import os
import re
import resource
import tempfile
import threading
import time

import numpy as np
import pytest
from tensorboardX.proto import layout_pb2

from minw import cloud
from minw import dependencies
from minw.workdir import board
from minw.workdir import metrics
from resource_limits import limited
from short_runs import events_of
from short_runs import line_at
from short_runs import numbers_of
from short_runs import values_of


def histograms_of(workdir):
  return [value.histo for path in sorted((workdir / "tensorboard").iterdir())[-1:]
          for _, value in values_of(path) if value and value.HasField("histo")]


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
  writer.write_histograms(30, 3, [{
      "layer": "block1/conv2", "kind": "weights", "alpha": 0.5,
      "counts": [0, 2, 0, 0, 0]}])
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


# What goes wrong.


def warnings_in(caplog):
  return [entry.getMessage() for entry in caplog.records
          if entry.levelname == "WARNING"]


def test_a_full_disk_ends_the_board_and_not_the_run(tmp_path, caplog):
  """tensorboardX's own writer would wait forever for a thread that has ended."""
  writer = metrics.Writer(str(tmp_path), 0)
  with limited(resource.RLIMIT_FSIZE, 2000):
    for step in range(14):  # In metrics.jsonl they take 1,600 bytes.
      writer.write(line_at(step, weights=step))
      writer.sync()
    writer.close()
  assert metrics.read(str(tmp_path)) == [line_at(step, weights=step)
                                         for step in range(14)]
  warning, = warnings_in(caplog)
  assert f"{tmp_path}/tensorboard cannot be written" in warning
  assert os.strerror(errno.EFBIG) in warning
  caplog.clear()
  metrics.Writer(str(tmp_path), 13).close()  # The next start shows all of it.
  assert {step for _, step in numbers_of(tmp_path)} == {*range(14)}
  assert not warnings_in(caplog)


@pytest.mark.parametrize("spoil", [
    lambda path: path.write_text(""), lambda path: path.symlink_to("/nonexistent/x"),
    os.mkfifo])
def test_a_folder_that_cannot_be_made(spoil, tmp_path, caplog):
  spoil(tmp_path / "tensorboard")
  writer = metrics.Writer(str(tmp_path), 0)
  for step in (10, 20):
    writer.write(line_at(step))
    writer.sync()
  writer.close()
  assert metrics.read(str(tmp_path)) == [line_at(10), line_at(20)]
  warning, = warnings_in(caplog)
  assert f"{tmp_path}/tensorboard cannot be written" in warning


def test_what_cannot_be_shown(tmp_path, caplog):
  shown = board.Board(str(tmp_path), "{}")
  shown.show({"split": "validation", "mode": "hard", "step": 2**100, "loss": 0.5})
  shown.show_histogram({"counts": []})
  shown.flush()
  shown.close()
  assert len(warnings_in(caplog)) == 1


def test_a_clock_that_is_set_back(tmp_path, monkeypatch):
  """TensorBoard reads files by name: the last start has the last name."""
  for now in (1_700_000_000.5, 1_600_000_000.5, 5.0, 1_600_000_000.5):
    monkeypatch.setattr(time, "time", lambda: now)
    writer = metrics.Writer(str(tmp_path), 0)
    writer.write(line_at(10, loss=now))
    writer.close()
    assert numbers_of(tmp_path)["loss/validation", 10] == np.float32(now)
  names = sorted(os.listdir(tmp_path / "tensorboard"))
  assert [int(name.split(".")[3]) for name in names] == [
      1_700_000_000 + start for start in range(4)]


# Events of workdirs on gs://.

RUN = "gs://bucket/run"


class Bucket:
  """A stand-in for the service: it keeps what is written below `RUN`.

  Attributes:
    files: Contents by name in the run's folder `tensorboard`.
    writes: Names in the order in which they were written.
    error: Error of each request, if any.
    open: Event without which writes wait.
  """

  def __init__(self):
    self.files, self.writes, self.error = {}, [], None
    self.open = threading.Event()
    self.open.set()

  def put(self, path, content):
    assert self.open.wait(20)
    self._answer(path.parent)
    self.writes.append(path.name)
    self.files[path.name] = content

  def list(self, folder):
    self._answer(folder)
    return (folder / name for name in sorted(self.files))

  def numbers(self, target):
    """Returns the points of the charts, from a download to the folder `target`."""
    (target / "tensorboard").mkdir(exist_ok=True)
    for name, content in self.files.items():
      (target / "tensorboard" / name).write_bytes(content)
    return numbers_of(target)

  def _answer(self, folder):
    assert str(folder) == f"{RUN}/tensorboard"
    if self.error:
      raise self.error


@pytest.fixture
def bucket(monkeypatch, tmp_path):
  """A `Bucket`. Temporary folders are made in the folder `temporary` of the test."""
  bucket = Bucket()
  monkeypatch.setattr(cloud.Path, "put", lambda path, data: bucket.put(path, data))
  monkeypatch.setattr(cloud.Path, "iterdir", lambda path: bucket.list(path))
  monkeypatch.setattr(dependencies, "installed", lambda package: True)
  (tmp_path / "temporary").mkdir()
  monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
  return bucket


def wait_until(happened):
  end = time.monotonic() + 20
  while not happened():
    assert time.monotonic() < end
    time.sleep(0.01)


def test_events_are_uploaded_when_they_are_flushed(bucket, tmp_path):
  shown = board.Board(RUN, "{}")
  shown.show(line_at(10))
  assert bucket.files == {}
  shown.flush()
  wait_until(lambda: bucket.files)
  assert bucket.numbers(tmp_path) == {
      ("loss/validation", 10): np.float32(10 / 7), ("accuracy/validation", 10): 0.5}
  shown.show(line_at(20))
  shown.close()
  assert bucket.numbers(tmp_path) == {
      (f"{name}/validation", step): value for step in (10, 20)
      for name, value in (("loss", np.float32(step / 7)), ("accuracy", 0.5))}
  assert len(bucket.files) == 1 and not any((tmp_path / "temporary").iterdir())


def test_a_start_leaves_the_events_in_the_bucket_as_they_are(
    bucket, tmp_path, monkeypatch):
  monkeypatch.setattr(time, "time", lambda: 1_700_000_000.5)  # All in one second.
  for start, loss in enumerate((0.25, 0.5, 0.75)):
    before = dict(bucket.files)
    shown = board.Board(RUN, None)
    shown.show(line_at(10, loss=loss))
    shown.close()
    assert bucket.numbers(tmp_path)["loss/validation", 10] == loss
    assert [int(name.split(".")[3]) for name in sorted(bucket.files)] == [
        1_700_000_000 + number for number in range(start + 1)]
    assert before.items() <= bucket.files.items()
    assert not {*before} & {*bucket.writes[start:]}  # They are not written again.


def test_a_folder_that_cannot_be_listed_ends_the_board_alone(bucket, tmp_path, caplog):
  bucket.error = OSError(errno.EIO, "no answer")
  shown = board.Board(RUN, None)
  bucket.error = None
  shown.show(line_at(10))
  shown.flush()
  shown.close()
  warning, = warnings_in(caplog)
  assert f"{RUN}/tensorboard cannot be written" in warning and "no answer" in warning
  assert bucket.files == {} and not any((tmp_path / "temporary").iterdir())


def test_events_that_cannot_be_uploaded_come_with_the_next_upload(
    bucket, tmp_path, caplog):
  shown = board.Board(RUN, None)
  bucket.error = OSError(errno.EIO, "no answer")
  shown.show(line_at(10))
  shown.flush()
  wait_until(lambda: caplog.records)
  warning, = warnings_in(caplog)
  assert f"{RUN}/tensorboard cannot be written" in warning and "no answer" in warning
  assert bucket.files == {}
  bucket.error = None
  shown.show(line_at(20))
  shown.close()
  assert {step for _, step in bucket.numbers(tmp_path)} == {10, 20}
  assert len(warnings_in(caplog)) == 1


def test_a_service_that_does_not_answer_delays_the_end_only(
    bucket, tmp_path, monkeypatch, caplog):
  monkeypatch.setattr(board, "_UPLOAD_SECONDS", 0.1)
  bucket.open.clear()
  shown = board.Board(RUN, None)
  shown.show(line_at(10))
  shown.close()
  assert warnings_in(caplog) == [
      f"{RUN}/tensorboard: the last events were not uploaded within 0 s"]
  bucket.open.set()  # The thread can still read the file, and removes it then.
  wait_until(lambda: not any((tmp_path / "temporary").iterdir()))
  assert bucket.numbers(tmp_path)["loss/validation", 10] == np.float32(10 / 7)


def test_the_end_is_noticed_while_the_thread_begins_an_upload(
    bucket, tmp_path, monkeypatch, caplog):
  """The board is closed between the thread's steps before an upload."""
  monkeypatch.setattr(board, "_UPLOAD_SECONDS", 5.0)
  closed = []

  class Slow(threading.Event):
    def clear(self):
      if not closed:
        closed.append(threading.Thread(target=shown.close))
        closed[0].start()
        time.sleep(0.3)  # The other thread asks for the last upload.
      super().clear()

  with monkeypatch.context() as patch:
    patch.setattr(threading, "Event", Slow)
    shown = board.Board(RUN, None)
  shown.show(line_at(10))
  shown.flush()
  wait_until(lambda: closed)
  closed[0].join()
  assert warnings_in(caplog) == []
  assert {step for _, step in bucket.numbers(tmp_path)} == {10}
