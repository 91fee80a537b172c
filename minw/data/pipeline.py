"""Input pipeline of data sets that live on the device: parts of the compiled step.

Batch t is a function of the seed and of t alone, whatever the number of devices.
"""

from typing import NamedTuple, Sequence

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from minw import fold


class Data(NamedTuple):
  """A split: images uint8 (n, height, width, channels), labels int32 (n,)."""

  images: jax.Array
  labels: jax.Array


class Pixels(NamedTuple):
  """How a pixel becomes a number: (pixel - offset) / divisor, for each channel.

  The offset also is what images are padded with, so that padding becomes zero.
  """

  offset: tuple[float, ...]
  divisor: tuple[float, ...]


def pixels(kind: str, mean: Sequence[float], std: Sequence[float]) -> Pixels:
  """How pixels are normalized.

  Args:
    kind: "integer": multiples of 1/64, exact in float32 and bfloat16, with which the
      first layer is as integer as the others; "standardized": exact mean and
      deviation, with which it is not.
    mean, std: of each channel, of values in 0..1.
  """
  if kind == "integer":
    return Pixels(tuple(float(round(255 * m)) for m in mean), (64.0,) * len(mean))
  if kind == "standardized":
    return Pixels(tuple(255 * m for m in mean), tuple(255 * s for s in std))
  raise ValueError(f"kind={kind!r}: must be integer or standardized")


def normalize(images: jax.Array, pixels: Pixels) -> jax.Array:
  """uint8 (..., channels) -> float32 (..., channels)."""
  channels = (1,) * (images.ndim - 1) + (-1,)
  offset, divisor = (np.asarray(part, np.float32).reshape(channels) for part in pixels)
  return (images.astype(jnp.float32) - offset) / divisor


def probe(pixels: Pixels, image_shape: Sequence[int]) -> fold.Probe:
  """What `fold.fold` has to know of normalized images (height, width, channels)."""
  offset, divisor = (np.asarray(part) for part in pixels)
  exact = (offset == np.round(offset)).all() and (divisor == 64).all()
  return fold.Probe(
      bound=np.broadcast_to(np.maximum(offset, 255 - offset) / divisor, image_shape),
      unit=np.full(image_shape, 1 / 64 if exact else 0.0),
      bits=np.full(image_shape, 16.0))


def epoch_order(seed: jax.Array | int, epoch: jax.Array | int, size: int) -> jax.Array:
  """The order of the examples in an epoch: a permutation, int32 (size,)."""
  key = jax.random.fold_in(jax.random.key(seed), epoch)
  return jax.random.permutation(key, size)


def train_batch(
    data: Data,
    order: jax.Array,
    position: jax.Array,
    key: jax.Array,
    *,
    batch_size: int,
    crop_size: int,
    crop_padding: int,
    flip: bool,
    pixels: Pixels,
    sharding: jax.sharding.NamedSharding | None = None,
) -> tuple[jax.Array, jax.Array]:
  """The augmented batch at `position` of an epoch.

  Args:
    data: the training split.
    order: of the epoch's examples, int32 (n,).
    position: which batch of the epoch; scalar.
    key: of the crops and flips.
    batch_size: examples; what an epoch has beyond a multiple of it is left out.
    crop_size: of the random crops, square.
    crop_padding: pixels of the offset's value added on each side before.
    flip: whether to flip left to right, with probability 1/2.
    pixels: their normalization.
    sharding: of the batch over devices.

  Returns:
    images float32 (batch_size, crop_size, crop_size, channels), labels int32.
  """
  index = lax.dynamic_slice_in_dim(order, position * batch_size, batch_size)
  if sharding is not None:
    index = lax.with_sharding_constraint(index, sharding)
  images = data.images[index]
  if crop_padding:
    fill = jnp.asarray(np.round(pixels.offset), jnp.uint8)
    n, h, w, c = images.shape
    frame = jnp.broadcast_to(fill, (n, h + 2 * crop_padding, w + 2 * crop_padding, c))
    images = lax.dynamic_update_slice(
        frame, images, (0, crop_padding, crop_padding, 0))
  crop_key, flip_key = jax.random.split(key)
  room = np.asarray(images.shape[1:3]) - crop_size
  corners = jax.random.randint(
      crop_key, (batch_size, 2), 0, np.broadcast_to(room + 1, (batch_size, 2)))
  size = (crop_size, crop_size, images.shape[-1])
  images = jax.vmap(
      lambda image, corner: lax.dynamic_slice(image, (*corner, 0), size)
  )(images, corners)
  if flip:
    flipped = jax.random.bernoulli(flip_key, shape=(batch_size, 1, 1, 1))
    images = jnp.where(flipped, images[:, :, ::-1], images)
  return normalize(images, pixels), data.labels[index]


def eval_batch(
    data: Data,
    start: jax.Array,
    *,
    batch_size: int,
    crop_size: int,
    pixels: Pixels,
    sharding: jax.sharding.NamedSharding | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Examples `start` to `start + batch_size` of a split, cropped at the centre.

  Returns:
    images, labels as in `train_batch`, and a mask bool (batch_size,), false where the
    split has ended (there an example is repeated).
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
