"""Data sets too large for memory: images are decoded when a batch needs them.

Threads or worker processes make the batches of pixels on the host. The compiled step
augments and normalizes them.
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
import jax
import jax.numpy as jnp
import numpy as np

from minw import distributed
from minw import errors
from minw import stopping
from minw import text
from minw.data import augment
from minw.data import datasets
from minw.data import images
from minw.data.batches import Array
from minw.data.batches import Batching
from minw.data.batches import Examples
from minw.data.pixels import normalize

_log = logging.getLogger(__name__)

_REDRAWS = 10  # Largest number of images that are tried in place of a damaged one.
_NAMES = 10  # Largest number of damaged images of a split that are logged by name.
_SOURCE_IMAGES = 1000  # Largest number of images that `source_images` decodes.


class Streamed:
  """The `batches.Source` of a data set whose images are decoded when needed.

  A split is a `Split`. Batches arrive with their examples cropped and flipped, and the
  compiled step does the rest; there is no order of an epoch.
  """

  def __init__(
      self,
      info: datasets.Info,
      data_dir: str | os.PathLike | None,
      batching: Batching,
      *,
      workers: int,
      max_damaged: float,
      shrink: bool,
  ):
    """Reads nothing yet.

    Args:
      info: The data set. `info.image_shape` is the size that images are brought to for
        evaluation, before the centre is cropped.
      data_dir: Directory of the prepared data sets.
      batching: How batches are made.
      workers: See `Split`.
      max_damaged: See `Split`.
      shrink: Whether evaluation makes larger images smaller first; see `images.centre`.
    """
    self.info = info
    self._data_dir, self._batching = data_dir, batching
    self._workers, self._max_damaged, self._shrink = workers, max_damaged, shrink

  def load(self, split: str) -> "Split":
    """Opens a split; see `open_split`."""
    return open_split(self.info.name, split, self._data_dir, workers=self._workers,
                      max_damaged=self._max_damaged,
                      channels=self.info.image_shape[-1])

  def train_batches(
      self, data: "Split", start: int
  ) -> Iterator[tuple[Examples, None]]:
    """Yields batches of random crops, of which each process decodes its share."""
    b = self._batching
    for batch in data.random_crops(
        start, seed=b.seed, batch_size=b.batch_size, crop_size=b.crop_size,
        crop_scale=b.crop_scale, flip=b.flip, share=distributed.share()):
      yield distributed.put_rows(batch, b.sharded), None

  def train_inputs(
      self, examples: Examples, order: Array | None, position: Array | int,
      key: jax.Array
  ) -> tuple[Array, Array | augment.MixedLabels]:
    """Augments and normalizes the batch, whose crops may be flipped already."""
    b = self._batching
    images: Any = examples.images
    labels: Any = examples.labels
    if b.augmentation.rotation:
      angles = augment.angles(key, b.batch_size, b.augmentation.rotation)
      corners = jnp.zeros((b.batch_size, 2), jnp.int32)
      images = augment.rotate(images, corners, b.crop_size, angles, b.pixels.fill)
    images, labels = augment.augment(
        images, labels, key, b.augmentation, b.pixels.fill)
    return normalize(images, b.pixels), labels

  def eval_batches(self, data: "Split") -> Iterator[tuple[Examples, int]]:
    """Yields batches of centres, of which each process decodes its share.

    Raises:
      errors.UsageError: Too many images are damaged, on all processes together.
    """
    b = self._batching
    for i, batch in enumerate(data.centres(
        b.eval_batch_size, source=self.info.image_shape[:2],
        crop=(b.crop_size, b.crop_size), shrink=self._shrink,
        share=distributed.share())):
      yield distributed.put_rows(batch, b.sharded), i * b.eval_batch_size
    data.report()  # Each process may have seen only some of too many damaged images.

  def eval_inputs(
      self, examples: Examples, start: Array | int
  ) -> tuple[Array, Array, Array]:
    """Normalizes the batch, and masks the examples without a label."""
    mask = examples.labels >= 0
    labels = jnp.where(mask, examples.labels, 0)
    return normalize(examples.images, self._batching.pixels), labels, mask

  def abstract_batch(self) -> tuple[Examples, None]:
    """Returns the shapes of a batch of crops."""
    b = self._batching
    shape = (b.batch_size, b.crop_size, b.crop_size, self.info.image_shape[-1])
    images: Any = jax.ShapeDtypeStruct(shape, jnp.uint8, sharding=b.sharded)
    labels: Any = jax.ShapeDtypeStruct((b.batch_size,), jnp.int32, sharding=b.sharded)
    return Examples(images, labels), None

  def source_images(self, split: str) -> np.ndarray:
    """Returns the first images of a split, at most 1,000, which are decoded at once."""
    data = self.load(split)
    shape = self.info.image_shape[:2]
    return np.asarray(next(data.centres(
        min(_SOURCE_IMAGES, len(data)), source=shape, crop=shape, shrink=self._shrink,
    )).images)

  def report(self, data: "Split") -> dict[str, Any]:
    """Returns {"damaged", "decode_rate"}; see `Split.report`."""
    return data.report()


class Split:
  """A split of a streamed data set.

  Attributes:
    damaged: How many different images could not be decoded so far.
    decode_rate: Images that were read, decoded and cropped in a second of one core,
      in the batch that was taken last; None before the first.
  """

  def __init__(
      self,
      records: Sequence[dict[str, Any]],
      name: str,
      *,
      workers: int = 0,
      max_damaged: float = 0.0,
      channels: int = 3,
  ):
    """Reads nothing yet.

    Args:
      records: Records from `datasets.open_records`, which can be pickled.
      name: Name of the split in messages.
      workers: Number of processes that decode. If 0, threads of this process do.
      max_damaged: Share of the images that may be damaged. If more are, reading raises
        `errors.UsageError`.
      channels: Channels that images are brought to: 1 for gray or 3 for RGB.
    """
    self._channels = channels
    self._records, self._name, self._workers = records, name, workers
    self._max_damaged = max_damaged
    self._seen = set()
    self.decode_rate = None

  def __len__(self) -> int:
    return len(self._records)

  def report(self) -> dict[str, Any]:
    """Returns what was seen of the files so far: {"damaged", "decode_rate"}.

    Damaged images that any process has seen are counted. All processes must call this
    together.
    """
    seen = distributed.gather(json.dumps(sorted(self._seen)))
    self._seen.update(*map(json.loads, seen))
    distributed.together(self._check)
    return {"damaged": self.damaged, "decode_rate": self.decode_rate}

  @property
  def damaged(self) -> int:
    """How many different images could not be decoded so far."""
    return len(self._seen)

  def random_crops(
      self,
      start: int,
      *,
      seed: int,
      batch_size: int,
      crop_size: int,
      crop_scale: tuple[float, float],
      flip: bool,
      share: tuple[int, int] = (0, 1),
  ) -> Iterator[Examples]:
    """Yields batches of random crops without end; an epoch has every image once.

    A damaged image is replaced by another one, drawn at random.

    Args:
      start: Number of the first batch.
      seed: Seed of order, crops and flips.
      batch_size: Examples in a batch, which may reach into the next epoch.
      crop_size: Height and width of the crops.
      crop_scale: See `images.random_crop`.
      flip: See `images.random_crop`.
      share: (i, n) for the i-th of n equal parts of each batch.
    """
    crop = _RandomCrop(self._records, crop_size, crop_scale, flip, self._channels)
    examples = grain.MapDataset.range(len(self)).seed(seed).shuffle().repeat()
    i, n = share
    parts = examples.random_map(crop).batch(batch_size // n)
    return self._read(parts[start * n + i::n])

  def centres(
      self,
      batch_size: int,
      *,
      source: tuple[int, int],
      crop: tuple[int, int],
      shrink: bool,
      share: tuple[int, int] = (0, 1),
  ) -> Iterator[Examples]:
    """Yields batches of the centres of all images, in order; the last is filled up.

    Damaged images and the examples that fill the last batch have the label -1.

    Args:
      batch_size: Examples in a batch.
      source: Height and width that an image is brought to first; see `images.centre`.
      crop: Height and width of the crop from the middle of that.
      shrink: See `images.centre`.
      share: (i, n) for the i-th of n equal parts of each batch.
    """
    size = -len(self) % batch_size + len(self)
    centre = _Centre(self._records, source, crop, shrink, self._channels)
    i, n = share
    parts = grain.MapDataset.range(size).map(centre).batch(batch_size // n)
    return self._read(parts[i::n])

  def _read(self, batches: grain.MapDataset) -> Iterator[Examples]:
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
        yield Examples(element["image"], element["label"])

  def _note(self, damaged: np.ndarray) -> None:
    """Reports damaged images once, and raises `errors.UsageError` if too many are."""
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


def open_split(
    name: str,
    split: str,
    data_dir: str | os.PathLike | None,
    *,
    workers: int,
    max_damaged: float,
    channels: int = 3,
) -> Split:
  """Opens a split of a prepared data set.

  Args:
    name: Name of the data set.
    split: "train", "validation" or "test".
    data_dir: Directory of the prepared data sets.
    workers: See `Split`.
    max_damaged: See `Split`.
    channels: See `Split`.

  Raises:
    errors.UsageError: The files are not there, or in another format.
  """
  records = datasets.open_records(name, split, data_dir)
  return Split(records, f"{name}, {split}", workers=workers, max_damaged=max_damaged,
               channels=channels)


@contextlib.contextmanager
def _signals_blocked() -> Iterator[None]:
  """Blocks SIGTERM and SIGINT in this thread and in the processes that it starts."""
  before = signal.pthread_sigmask(
      signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
  try:
    yield
  finally:
    signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _begin_worker(*_: Any) -> None:
  """Lets a worker ignore signals, and end soon after the process that it works for."""
  signal.signal(signal.SIGTERM, signal.SIG_IGN)
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  stopping.end_with_parent()


class _RandomCrop(NamedTuple):
  """Makes a training example of an index, in a worker."""

  records: Any
  size: int
  scale: tuple[float, float]
  flip: bool
  channels: int

  def __call__(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
    start = time.thread_time()
    damaged = -1
    for _ in range(_REDRAWS):
      try:
        record = self.records[index]
        with images.open_image(record["image"]) as image:
          pixels = images.random_crop(image, self.size, self.scale, self.flip, rng,
                                      self.channels)
        label = record["label"]
        break
      except Exception:  # Pillow and array_record have many kinds for damage.
        damaged = index
        index = int(rng.integers(len(self.records)))
    else:
      pixels, label = np.zeros((self.size, self.size, self.channels), np.uint8), 0
    return _element(pixels, label, damaged, start)


class _Centre(NamedTuple):
  """Makes an evaluation example of an index, in a worker."""

  records: Any
  source: tuple[int, int]
  crop: tuple[int, int]
  shrink: bool
  channels: int

  def __call__(self, index: int) -> dict[str, Any]:
    start = time.thread_time()
    pixels = np.zeros((*self.crop, self.channels), np.uint8)
    label, damaged = -1, -1
    if index < len(self.records):
      try:
        record = self.records[index]
        with images.open_image(record["image"]) as image:
          pixels = images.centre(
              image, *self.source, self.channels, shrink=self.shrink)
        (h, w), (height, width) = self.source, self.crop
        top, left = (h - height) // 2, (w - width) // 2
        pixels = pixels[top:top + height, left:left + width]
        label = record["label"]
      except Exception:
        damaged = index
    return _element(pixels, label, damaged, start)


def _element(
    pixels: np.ndarray, label: int, damaged: int, start: float) -> dict[str, Any]:
  return {"image": pixels, "label": np.int32(label), "damaged": np.int64(damaged),
          "seconds": time.thread_time() - start}
