"""Chooses between data that stay on the devices and data that are streamed."""

import os
from typing import Any, Iterator, Sequence

from minw.data import datasets
from minw.data import resident
from minw.data.batches import Batching
from minw.data.batches import Examples
from minw.data.batches import Source


def open_source(
    info: datasets.Info,
    data_dir: str | os.PathLike | None,
    batching: Batching,
    **options: Any,
) -> Source:
  """Returns the batches of a data set. Nothing is read yet.

  Args:
    info: The data set; `splits["train"]` limits the training examples.
    data_dir: Directory of the prepared data sets.
    batching: How batches are made.
    **options: `workers`, `max_damaged` and `shrink`; see `streamed.Streamed`.
  """
  if info.streamed:
    from minw.data import streamed  # Imports grain, which takes a while.

    return streamed.Streamed(info, data_dir, batching, **options)
  return resident.Resident(info, data_dir, batching)


def source_batches(
    info: datasets.Info,
    split: str,
    data_dir: str | os.PathLike | None,
    batch_size: int,
    *,
    image_shape: Sequence[int],
    shrink: bool,
    workers: int,
    max_damaged: float,
) -> Iterator[Examples]:
  """Yields a split as a packed network takes it, every example once, in order.

  Args:
    info: The data set.
    split: "train", "validation" or "test".
    data_dir: Directory of the prepared data sets.
    batch_size: Examples in a batch. The last one may be smaller, or may be filled up
      with examples that are not to be counted.
    image_shape: (height, width, channels) of the images, which the data set must
      provide: see `datasets.Info.provides`.
    shrink: Whether larger images are made smaller; see `images.centre`.
    workers: See `streamed.Split`.
    max_damaged: See `streamed.Split`.

  Raises:
    errors.UsageError: There are no data, or too many images are damaged.
  """
  if info.streamed:
    from minw.data import streamed

    size = (image_shape[0], image_shape[1])
    opened = streamed.open_split(
        info.name, split, data_dir, workers=workers, max_damaged=max_damaged,
        channels=image_shape[-1])
    yield from opened.centres(batch_size, source=size, crop=size, shrink=shrink)
  else:
    images, labels = datasets.load(info.name, split, data_dir)
    for start in range(0, len(images), batch_size):
      stop = start + batch_size
      yield Examples(images[start:stop], labels[start:stop])
