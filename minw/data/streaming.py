"""Input pipeline of data sets too large for memory: images are decoded when needed.

Batch t of training is a function of the seed and of t alone, whatever the number of
workers and processes, so that a run can go on from any step. What a batch holds are the
pixels; they are normalized inside the compiled step.
"""

import contextlib
import itertools
import json
import logging
from multiprocessing import resource_tracker
import os
import signal
import time
from typing import Any, Iterator, NamedTuple, Sequence

from absl import flags
import grain
import numpy as np

from minw import distributed
from minw import errors
from minw import stopping
from minw import text
from minw.data import images

_log = logging.getLogger(__name__)

_REDRAWS = 10  # For an image that is damaged.
_NAMES = 10  # Of damaged images that are logged, of each split.


class Batch(NamedTuple):
  """Images uint8 (n, height, width, 3), labels int32 (n,); -1: not to be counted."""

  images: np.ndarray
  labels: np.ndarray


class Split:
  """A split of a streamed data set.

  Attributes:
    damaged: how many different images could not be decoded so far.
    decode_rate: images that were read, decoded and cropped in a second of one core,
      in the batch that was taken last; None before the first.
  """

  def __init__(
      self,
      records: Sequence[dict[str, Any]],
      name: str,
      *,
      workers: int = 0,
      max_damaged: float = 0.0,
  ):
    """Reads nothing yet.

    Args:
      records: see `datasets.open_records`; they can be pickled.
      name: of the split, for what is reported of it.
      workers: processes that decode; 0: threads of this one.
      max_damaged: share of the images that may be damaged; if more are, what is
        reading raises `errors.UsageError`.
    """
    self._records, self._name, self._workers = records, name, workers
    self._max_damaged = max_damaged
    self._seen = set()
    self.decode_rate = None

  def __len__(self) -> int:
    return len(self._records)

  def report(self) -> dict[str, float]:
    """What has been seen of the files so far: {"damaged", "decode_rate"}.

    Damaged images are those that any process has seen; all must ask for them.
    """
    seen = distributed.gather(json.dumps(sorted(self._seen)))
    self._seen.update(*map(json.loads, seen))
    distributed.together(self._check)
    return {"damaged": self.damaged, "decode_rate": self.decode_rate}

  @property
  def damaged(self) -> int:
    return len(self._seen)

  def train_batches(
      self,
      start: int,
      *,
      seed: int,
      batch_size: int,
      crop_size: int,
      crop_scale: tuple[float, float],
      flip: bool,
      share: tuple[int, int] = (0, 1),
  ) -> Iterator[Batch]:
    """Batches of random crops without end; in each epoch every image is drawn once.

    A damaged image is replaced by another one, drawn at random.

    Args:
      start: the first batch's number.
      seed: of order, crops and flips.
      batch_size: examples; a batch may reach into the next epoch.
      crop_size, crop_scale, flip: see `images.random_crop`.
      share: (i, n): the i-th of n equal parts of each batch.
    """
    crop = _RandomCrop(self._records, crop_size, crop_scale, flip)
    examples = grain.MapDataset.range(len(self)).seed(seed).shuffle().repeat()
    i, n = share
    parts = examples.random_map(crop).batch(batch_size // n)
    return self._read(parts[start * n + i::n])

  def eval_batches(
      self,
      batch_size: int,
      *,
      source: tuple[int, int],
      crop: tuple[int, int],
      shrink: bool,
      share: tuple[int, int] = (0, 1),
  ) -> Iterator[Batch]:
    """Batches of the centres of all images, in order; the last is filled up.

    Damaged images and what the last batch is filled up with have the label -1.

    Args:
      batch_size: examples.
      source: height and width that an image is brought to first; see `images.centre`.
      crop: height and width of what is taken from the middle of that.
      shrink: see `images.centre`.
      share: (i, n): the i-th of n equal parts of each batch.
    """
    size = -len(self) % batch_size + len(self)
    centre = _Centre(self._records, source, crop, shrink)
    i, n = share
    parts = grain.MapDataset.range(size).map(centre).batch(batch_size // n)
    return self._read(parts[i::n])

  def _read(self, batches: grain.MapDataset) -> Iterator[Batch]:
    # Elements are batches: few are kept, and each is made by one thread or process.
    if not flags.FLAGS.is_parsed():  # Not in a command: grain asks for its own.
      flags.FLAGS.mark_as_parsed()
    threads = 0 if self._workers else len(os.sched_getaffinity(0))
    dataset = batches.to_iter_dataset(
        grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads)
    ).mp_prefetch(
        grain.MultiprocessingOptions(self._workers, per_worker_buffer_size=2),
        worker_init_fn=_begin_worker)
    if self._workers:
      resource_tracker.ensure_running()  # It unblocks signals when it starts.
    # Workers start with the first element. From their first moment on they leave a stop
    # to the run, which needs them for another step.
    with contextlib.ExitStack() as stack:
      with _signals_blocked():
        elements = iter(dataset)
        stack.callback(elements.close)
        first = next(elements, None)
      for element in itertools.chain([] if first is None else [first], elements):
        self._note(element["damaged"])
        self.decode_rate = len(element["label"]) / float(element["seconds"].sum())
        yield Batch(element["image"], element["label"])

  def _note(self, damaged: np.ndarray) -> None:
    """Reports damaged images once; refuses to go on with too many."""
    for index in set(damaged[damaged >= 0].tolist()) - self._seen:
      self._seen.add(index)
      if len(self._seen) <= _NAMES:
        _log.warning("%s: %s is damaged and left out", self._name,
                     self._file_name(index))
    self._check()

  def _check(self) -> None:
    if len(self._seen) > self._max_damaged * len(self):
      raise errors.UsageError(
          f"config.max_damaged={self._max_damaged}: of the {len(self)} images of"
          f" {self._name}, {self.damaged} are damaged by now,"
          f" {self._file_name(max(self._seen))} for example")

  def _file_name(self, index: int) -> str:
    try:
      return text.printable(self._records[index]["file_name"].decode())
    except Exception:  # The record itself is damaged.
      return f"record {index}"


@contextlib.contextmanager
def _signals_blocked() -> Iterator[None]:
  """Inside, SIGTERM and SIGINT pass this thread, and are blocked in what it starts."""
  before = signal.pthread_sigmask(
      signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
  try:
    yield
  finally:
    signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _begin_worker(*_: Any) -> None:
  """Makes a worker deaf to signals, and end soon after the process that it works for."""
  signal.signal(signal.SIGTERM, signal.SIG_IGN)
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  stopping.end_with_parent()


class _RandomCrop(NamedTuple):
  """From an index to an example, in a worker."""

  records: Any
  size: int
  scale: tuple[float, float]
  flip: bool

  def __call__(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
    start = time.thread_time()
    damaged = -1
    for _ in range(_REDRAWS):
      try:
        record = self.records[index]
        with images.open_image(record["image"]) as image:
          pixels = images.random_crop(image, self.size, self.scale, self.flip, rng)
        label = record["label"]
        break
      except Exception:  # Pillow and array_record have many kinds for damage.
        damaged = index
        index = int(rng.integers(len(self.records)))
    else:
      pixels, label = np.zeros((self.size, self.size, 3), np.uint8), 0
    return _element(pixels, label, damaged, start)


class _Centre(NamedTuple):
  """Likewise, for evaluation."""

  records: Any
  source: tuple[int, int]
  crop: tuple[int, int]
  shrink: bool

  def __call__(self, index: int) -> dict[str, Any]:
    start = time.thread_time()
    pixels, label, damaged = np.zeros((*self.crop, 3), np.uint8), -1, -1
    if index < len(self.records):
      try:
        record = self.records[index]
        with images.open_image(record["image"]) as image:
          pixels = images.centre(image, *self.source, shrink=self.shrink)
        (h, w), (height, width) = self.source, self.crop
        top, left = (h - height) // 2, (w - width) // 2
        pixels = pixels[top:top + height, left:left + width]
        label = record["label"]
      except Exception:
        damaged = index
    return _element(pixels, label, damaged, start)


def _element(pixels, label, damaged, start):
  return {"image": pixels, "label": np.int32(label), "damaged": np.int64(damaged),
          "seconds": time.thread_time() - start}
