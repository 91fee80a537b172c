"""What batches are made of, and the interface of the two classes that make them."""

from typing import Any, Iterator, NamedTuple, Protocol

import jax
import numpy as np

from minw.data import augment
from minw.data import datasets
from minw.data.pixels import Pixels

Array = jax.Array | np.ndarray


class Examples(NamedTuple):
  """Images and their labels: a batch, or a whole split.

  Attributes:
    images: uint8 (n, height, width, channels).
    labels: int32 (n,). An example with the label -1 is not counted.
  """

  images: Array
  labels: Array


class Batching(NamedTuple):
  """How batches are made of examples.

  Attributes:
    seed: Seed of the order of the examples, and of crops and flips of streamed ones.
    batch_size: Examples in a training batch.
    eval_batch_size: Examples in an evaluation batch.
    crop_size: Height and width of all crops.
    crop_padding: Pixels added on each side before an image in memory is cropped.
    crop_scale: Least and greatest area of the crops of streamed images, as fractions
      of the image's area.
    flip: Whether training images are flipped left to right, with probability 1/2.
    augmentation: What else is done to training images.
    pixels: Normalization of the images.
    replicated: Sharding of arrays that all devices hold as a whole.
    sharded: Sharding of a batch, along the examples.
  """

  seed: int
  batch_size: int
  eval_batch_size: int
  crop_size: int
  crop_padding: int
  crop_scale: tuple[float, float]
  flip: bool
  augmentation: augment.Augmentation
  pixels: Pixels
  replicated: jax.sharding.NamedSharding
  sharded: jax.sharding.NamedSharding


class Source(Protocol):
  """The splits of a data set and their batches, as an experiment uses them.

  `resident.Resident` and `streamed.Streamed` implement it. Batch t of training is a
  function of the seed and of t alone, whatever the number of devices, processes and
  workers, so that a run can resume from any step.

  The iterators run on the host. What they yield goes into a compiled step, where
  `train_inputs` and `eval_inputs` make the network's inputs of it.
  """

  info: datasets.Info

  def load(self, split: str) -> Any:
    """Returns a split, "train", "validation" or "test", for the other methods."""
    ...

  def train_batches(
      self, data: Any, start: int
  ) -> Iterator[tuple[Examples, jax.Array | None]]:
    """Yields (examples, order) for each training step from `start` on, without end.

    Args:
      data: The training split, from `load`.
      start: Number of the first step.
    """
    ...

  def train_inputs(
      self, examples: Examples, order: Array | None, position: Array | int,
      key: jax.Array,
  ) -> tuple[Array, Array | augment.MixedLabels]:
    """Makes a training batch of what `train_batches` yields, in a compiled step.

    Args:
      examples: From `train_batches`.
      order: Likewise.
      position: Number of the batch in its epoch, a scalar.
      key: Random key of the batch.

    Returns:
      images: float32 (batch_size, crop_size, crop_size, channels), normalized.
      labels: int32 (batch_size,), or `augment.MixedLabels` if images are mixed.
    """
    ...

  def eval_batches(self, data: Any) -> Iterator[tuple[Examples, int]]:
    """Yields (examples, start) for the evaluation batches of a split, in order.

    Args:
      data: The split, from `load`.
    """
    ...

  def eval_inputs(
      self, examples: Examples, start: Array | int
  ) -> tuple[Array, Array, Array]:
    """Makes an evaluation batch of what `eval_batches` yields, in a compiled step.

    Args:
      examples: From `eval_batches`.
      start: Number of the batch's first example in the split.

    Returns:
      images: float32 (eval_batch_size, crop_size, crop_size, channels), normalized.
      labels: int32 (eval_batch_size,).
      mask: bool (eval_batch_size,), false where an example is not to be counted.
    """
    ...

  def abstract_batch(self) -> tuple[Examples, Any]:
    """Returns the shapes, dtypes and shardings of what `train_batches` yields."""
    ...

  def source_images(self, split: str) -> np.ndarray:
    """Returns images of a split as a packed network takes them: uint8, not cropped."""
    ...

  def report(self, data: Any) -> dict[str, Any]:
    """Returns what was seen of a split's files so far, for records; may be empty.

    All processes must call this together.
    """
    ...
