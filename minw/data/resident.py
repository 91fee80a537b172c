"""Data sets in memory: devices hold them, and the compiled step cuts the batches."""

import itertools
import os
from typing import Any, Iterator

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from minw import distributed
from minw.data import augment
from minw.data import datasets
from minw.data.batches import Array
from minw.data.batches import Batching
from minw.data.batches import Examples
from minw.data.pixels import Pixels
from minw.data.pixels import normalize


class Resident:
  """The `batches.Source` of a data set whose splits all devices hold as a whole.

  A split is `Examples`. A training batch is cut from the whole split, given the order
  of the epoch's examples.
  """

  def __init__(
      self,
      info: datasets.Info,
      data_dir: str | os.PathLike | None,
      batching: Batching,
  ):
    """Reads nothing yet.

    Args:
      info: The data set. A split is cut after `info.splits` examples.
      data_dir: Directory of the prepared data sets.
      batching: How batches are made.
    """
    self.info = info
    self._data_dir, self._batching = data_dir, batching
    self._order = jax.jit(
        lambda epoch: epoch_order(batching.seed, epoch, info.splits["train"]),
        out_shardings=batching.replicated)

  def load(self, split: str) -> Examples:
    """Reads a split and puts it on all devices.

    Raises:
      errors.UsageError: There are no data, or processes read different ones.
    """
    arrays = datasets.load(self.info.name, split, self._data_dir)
    data = Examples(*(array[:self.info.splits[split]] for array in arrays))
    distributed.check_same(data, f"config.data_dir={self._data_dir!r}: {split}")
    return distributed.put(data, self._batching.replicated)

  def train_batches(
      self, data: Examples, start: int
  ) -> Iterator[tuple[Examples, jax.Array]]:
    """Yields the split and the order of the epoch that a step belongs to."""
    steps_per_epoch = self.info.splits["train"] // self._batching.batch_size
    first, position = divmod(start, steps_per_epoch)
    for epoch in itertools.count(first):
      order = self._order(epoch)
      for _ in range(position, steps_per_epoch):
        yield data, order
      position = 0

  def train_inputs(
      self, examples: Examples, order: Any, position: Array | int, key: jax.Array
  ) -> tuple[Array, Array | augment.MixedLabels]:
    """Cuts the batch at `position` of the epoch; see `random_crops`."""
    b = self._batching
    return random_crops(
        examples, order, position, key, batch_size=b.batch_size, crop_size=b.crop_size,
        crop_padding=b.crop_padding, flip=b.flip, pixels=b.pixels,
        augmentation=b.augmentation, sharding=b.sharded)

  def eval_batches(self, data: Examples) -> Iterator[tuple[Examples, int]]:
    """Yields the split and where in it each batch starts."""
    for start in range(0, data.labels.shape[0], self._batching.eval_batch_size):
      yield data, start

  def eval_inputs(
      self, examples: Examples, start: Array | int
  ) -> tuple[Array, Array, Array]:
    """Cuts the batch at `start`; see `centre_crops`."""
    b = self._batching
    return centre_crops(
        examples, start, batch_size=b.eval_batch_size, crop_size=b.crop_size,
        pixels=b.pixels, sharding=b.sharded)

  def abstract_batch(self) -> tuple[Examples, Any]:
    """Returns the shapes of the whole training split and of the order of an epoch."""
    size, sharding = self.info.splits["train"], self._batching.replicated
    images: Any = jax.ShapeDtypeStruct(
        (size, *self.info.image_shape), jnp.uint8, sharding=sharding)
    numbers: Any = jax.ShapeDtypeStruct((size,), jnp.int32, sharding=sharding)
    return Examples(images, numbers), numbers

  def source_images(self, split: str) -> np.ndarray:
    """Returns all images of a split."""
    return np.asarray(self.load(split).images)

  def report(self, data: Examples) -> dict[str, Any]:
    """Returns an empty dict: `load` raises an error where a file is damaged."""
    return {}


def epoch_order(seed: jax.Array | int, epoch: jax.Array | int, size: int) -> jax.Array:
  """Returns the order of the examples in an epoch: a permutation, int32 (size,)."""
  key = jax.random.fold_in(jax.random.key(seed), epoch)
  return jax.random.permutation(key, size)


def random_crops(
    data: Examples,
    order: Array,
    position: Array | int,
    key: jax.Array,
    *,
    batch_size: int,
    crop_size: int,
    crop_padding: int,
    flip: bool,
    pixels: Pixels,
    augmentation: augment.Augmentation = augment.NONE,
    sharding: jax.sharding.NamedSharding | None = None,
) -> tuple[Array, Array | augment.MixedLabels]:
  """Cuts the training batch at `position` of an epoch out of a split.

  Args:
    data: The training split.
    order: Order of the epoch's examples, int32 (n,).
    position: Number of the batch in the epoch, a scalar.
    key: Random key of the crops, flips and augmentation.
    batch_size: Examples in the batch. What is left of an epoch after its last whole
      batch is not used.
    crop_size: Height and width of the crops.
    crop_padding: Pixels of the offset's value added on each side before cropping.
    flip: Whether to flip left to right, with probability 1/2.
    pixels: Normalization of the images.
    augmentation: What else is done to the images. A crop is rotated before it is
      flipped, and everything else follows.
    sharding: Sharding of the batch over devices.

  Returns:
    images: float32 (batch_size, crop_size, crop_size, channels), normalized.
    labels: int32 (batch_size,), or what `augment.augment` returns.
  """
  index = lax.dynamic_slice_in_dim(order, position * batch_size, batch_size)
  if sharding is not None:
    index = lax.with_sharding_constraint(index, sharding)
  images = data.images[index]
  if crop_padding:
    fill = jnp.asarray(pixels.fill, jnp.uint8)
    n, h, w, c = images.shape
    frame = jnp.broadcast_to(fill, (n, h + 2 * crop_padding, w + 2 * crop_padding, c))
    images = lax.dynamic_update_slice(
        frame, images, (0, crop_padding, crop_padding, 0))
  crop_key, flip_key = jax.random.split(key)
  room = np.asarray(images.shape[1:3]) - crop_size
  corners = jax.random.randint(
      crop_key, (batch_size, 2), 0, np.broadcast_to(room + 1, (batch_size, 2)))
  size = (crop_size, crop_size, images.shape[-1])
  if augmentation.rotation:
    angles = augment.angles(key, batch_size, augmentation.rotation)
    images = augment.rotate(images, corners, crop_size, angles, pixels.fill)
  else:
    images = jax.vmap(
        lambda image, corner: lax.dynamic_slice(image, (*corner, 0), size)
    )(images, corners)
  if flip:
    flipped = jax.random.bernoulli(flip_key, shape=(batch_size, 1, 1, 1))
    images = jnp.where(flipped, images[:, :, ::-1], images)
  images, labels = augment.augment(
      images, data.labels[index], key, augmentation, pixels.fill)
  return normalize(images, pixels), labels


def centre_crops(
    data: Examples,
    start: Array | int,
    *,
    batch_size: int,
    crop_size: int,
    pixels: Pixels,
    sharding: jax.sharding.NamedSharding | None = None,
) -> tuple[Array, Array, Array]:
  """Cuts the centres of the examples `start` to `start + batch_size` of a split.

  Args:
    data: The split.
    start: Number of the first example, a scalar.
    batch_size: Examples in the batch.
    crop_size: Height and width of the crops.
    pixels: Normalization of the images.
    sharding: Sharding of the batch over devices.

  Returns:
    images: float32 (batch_size, crop_size, crop_size, channels), normalized.
    labels: int32 (batch_size,).
    mask: bool (batch_size,), false where the split has ended. There the first example
      is repeated.
  """
  index = start + jnp.arange(batch_size, dtype=jnp.int32)
  if sharding is not None:
    index = lax.with_sharding_constraint(index, sharding)
  mask = index < data.labels.shape[0]
  index = jnp.where(mask, index, 0)
  h, w = data.images.shape[1:3]
  top, left = (h - crop_size) // 2, (w - crop_size) // 2
  images = data.images[index]
  images = images[:, top:top + crop_size, left:left + crop_size]
  return normalize(images, pixels), data.labels[index], mask
