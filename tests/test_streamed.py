"""minw.data.streamed: which images come when, whoever decodes them."""

import itertools
import logging
import multiprocessing
import os
import pathlib
import select
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from image_records import CENTRES
from image_records import TRAINING
from image_records import records
from minw import errors
from minw.data import streamed
from minw.data.batches import Examples


def take(split, start, count, **changes):
  batches = split.random_crops(start, **TRAINING | changes)
  taken = list(itertools.islice(batches, count))
  batches.close()
  return taken


def assert_equal(ours, theirs):
  for a, b in zip(ours, theirs, strict=True):
    np.testing.assert_array_equal(a.images, b.images)
    np.testing.assert_array_equal(a.labels, b.labels)


def test_every_epoch_has_every_image_once():
  split = streamed.Split(records(23), "some")
  batches = take(split, 0, 23)
  labels = np.concatenate([batch.labels for batch in batches])
  assert labels.dtype == np.int32
  orders = labels.reshape(5, 23)
  for order in orders:
    assert sorted(order) == list(range(500, 523))
  assert len({tuple(order) for order in orders}) == 5
  for images, labels in batches:
    assert images.shape == (5, 8, 8, 3) and images.dtype == np.uint8
    expected = np.stack([labels - 500, 2 * (labels - 500)], -1)
    np.testing.assert_array_equal(
        images[..., :2], np.broadcast_to(expected[:, None, None], (5, 8, 8, 2)))
  # Each side is the left one about as often.
  left = np.concatenate([batch.images[:, 4, 0, 2] > batch.images[:, 4, -1, 2]
                         for batch in batches])
  right = np.concatenate([batch.images[:, 4, 0, 2] < batch.images[:, 4, -1, 2]
                          for batch in batches])
  assert left.sum() + right.sum() > 60
  assert abs(left.sum() - right.sum()) < 5 * 115**0.5  # Standard deviations.
  assert split.damaged == 0 and split.decode_rate > 0


def test_batches_are_functions_of_seed_and_number():
  split = streamed.Split(records(23), "some")
  batches = take(split, 0, 12)
  assert_equal(take(split, 0, 12), batches)
  assert_equal(take(split, 7, 5), batches[7:])
  other = take(split, 0, 12, seed=4)
  assert [b.labels.tolist() for b in other] != [b.labels.tolist() for b in batches]
  # The same image is cropped in another way in the next epoch.
  crops = [image for batch in take(split, 0, 23, flip=False, crop_scale=(0.1, 0.5))
           for image, label in zip(*batch) if label == 500]
  assert len(crops) == 5 and len({crop.tobytes() for crop in crops}) > 1


@pytest.mark.parametrize("workers", [
    1, *(pytest.param(count, marks=pytest.mark.slow) for count in (2, 3))])
def test_workers_make_the_same_batches(workers):
  files = records(23, damaged=(4, 9))
  expected = take(streamed.Split(files, "some", max_damaged=0.5), 2, 8)
  split = streamed.Split(files, "some", workers=workers, max_damaged=0.5)
  batches = split.random_crops(2, **TRAINING)
  found = list(itertools.islice(batches, 4))
  # A stop that reaches the whole group of processes does not end the workers.
  children = multiprocessing.active_children()
  assert len(children) == workers
  for child in children:
    os.kill(child.pid, signal.SIGTERM)
  found += itertools.islice(batches, 4)
  assert_equal(found, expected)
  assert split.damaged == 2
  batches.close()
  assert not multiprocessing.active_children()


_STARTED_AND_KILLED = """
import multiprocessing, signal, sys, time
from minw.data import streamed
import image_records

if __name__ == "__main__":
  for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda *_: None)
  split = streamed.Split(image_records.records(8), "some", workers=1)
  batches = split.random_crops(0, **image_records.TRAINING)
  print("starting", flush=True)
  next(batches)
  print(*[child.pid for child in multiprocessing.active_children()], flush=True)
  time.sleep(60)
"""


@pytest.mark.slow  # Python and what trains start twice in it.
def test_workers_end_with_a_killed_process_and_not_with_signals_as_they_start(tmp_path):
  script = tmp_path / "script.py"
  script.write_text(_STARTED_AND_KILLED)
  root = pathlib.Path(streamed.__file__).parents[2]
  process = subprocess.Popen(
      [sys.executable, str(script)], start_new_session=True, text=True,
      stdout=subprocess.PIPE,
      env={**os.environ, "PYTHONPATH": f"{root}:{root / 'tests'}"})
  with process:
    assert process.stdout.readline() == "starting\n"
    while not select.select([process.stdout], [], [], 0.05)[0]:
      os.killpg(process.pid, signal.SIGINT)
      os.killpg(process.pid, signal.SIGTERM)
    workers = [int(pid) for pid in process.stdout.readline().split()]
    assert len(workers) == 1
    process.kill()
  running = lambda: [pid for pid in workers if pathlib.Path(f"/proc/{pid}").exists()]
  deadline = time.monotonic() + 10
  while running() and time.monotonic() < deadline:
    time.sleep(0.05)
  assert not running()


def test_damaged_images_are_replaced_and_reported(caplog):
  split = streamed.Split(records(23, damaged=(4, 9)), "cats, train", max_damaged=0.1)
  with caplog.at_level(logging.WARNING, "minw.data.streamed"):
    batches = take(split, 0, 23)
  assert split.report() == {"damaged": 2, "decode_rate": split.decode_rate}
  assert sorted(caplog.messages) == [
      f"cats, train: {i}.png is damaged and left out" for i in (4, 9)]
  labels = np.concatenate([batch.labels for batch in batches])
  assert not {504, 509} & set(labels)
  assert_equal(take(split, 0, 23), batches)
  # The others stay where they were.
  whole = take(streamed.Split(records(23), "cats"), 0, 23)
  others = np.concatenate([batch.labels for batch in whole])
  kept = ~np.isin(others, (504, 509))
  np.testing.assert_array_equal(labels[kept], others[kept])


def test_too_many_damaged_images_end_a_run():
  files = records(20, damaged=(4, 9))
  with pytest.raises(errors.UsageError, match=(
      r"config.max_damaged=0.05: of the 20 images of cats, train, 2 are damaged by now,"
      r" 9.png for example")):
    take(streamed.Split(files, "cats, train", max_damaged=0.05), 0, 20)
  take(streamed.Split(files, "cats, train", max_damaged=0.1), 0, 20)
  for count in (1, 30):
    with pytest.raises(errors.UsageError, match="config.max_damaged=0.9"):
      files = records(count, damaged=range(count))
      take(streamed.Split(files, "cats", max_damaged=0.9), 0, 20)


def test_records_that_can_not_be_read_are_damaged(caplog):
  files = records(10)
  files[3] = {"image": None, "label": None, "file_name": None}  # A file cut off.
  take(streamed.Split(files, "cats", max_damaged=0.1), 0, 4)
  assert caplog.messages == ["cats: record 3 is damaged and left out"]


@pytest.mark.parametrize("count, size, workers", [(10, 4, 0), (8, 4, 0), (10, 4, 1)])
def test_evaluation_sees_every_image_once_in_order(count, size, workers):
  split = streamed.Split(records(count, damaged=(2,)), "some", workers=workers,
                          max_damaged=0.2)
  batches = list(split.centres(size, **CENTRES))
  assert [batch.images.shape for batch in batches] == [(size, 8, 6, 3)] * (
      -(-count // size))
  labels = np.concatenate([batch.labels for batch in batches])
  expected = [500 + i for i in range(count)] + [-1] * (-count % size)
  expected[2] = -1
  assert labels.tolist() == expected and split.damaged == 1
  images = np.concatenate([batch.images for batch in batches])
  for i in (0, 1, 3, count - 1):
    assert (images[i, ..., :2] == (i, 2 * i)).all()
    # The left half is 255; at half of its size the edge is where it was.
    assert (images[i, :, :2, 2] == 255).all() and (images[i, :, 4:, 2] == 0).all()


@pytest.mark.parametrize("count", [2, 4])
def test_processes_share_each_batch(count):
  split = streamed.Split(records(23, damaged=(2,)), "some", max_damaged=0.1)
  batches = take(split, 3, 7, batch_size=8)
  parts = [take(split, 3, 7, batch_size=8, share=(i, count)) for i in range(count)]
  centres = list(split.centres(8, **CENTRES))
  parts_of_centres = [list(split.centres(8, **CENTRES, share=(i, count)))
                      for i in range(count)]
  for whole, shares in ((batches, parts), (centres, parts_of_centres)):
    assert {len(batch.labels) for part in shares for batch in part} == {8 // count}
    assert_equal([Examples(*map(np.concatenate, zip(*same)))
                  for same in zip(*shares, strict=True)], whole)


def test_names_of_damaged_images_are_printed_escaped(caplog):
  files = records(4, damaged=(1,))
  files[1]["file_name"] = "é\n\x1b[2J.png".encode()
  split = streamed.Split(files, "some", max_damaged=0.2)
  with pytest.raises(errors.UsageError, match=r"é\\n\\x1b\[2J.png for example"):
    list(split.centres(4, **CENTRES))
  assert [record.getMessage() for record in caplog.records] == [
      "some: é\\n\\x1b[2J.png is damaged and left out"]
