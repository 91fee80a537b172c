"""Augmentation of training images: rotation, brightness, contrast, erasing and mixing.

It runs in the compiled training step, on the devices, for data in memory and streamed
data alike. Results are rounded to 8-bit values, which are all that a network can see
once it is in use. Batches are images uint8 (batch, size, size, channels), and a box
holds the first and the last row and column plus one, int32 (batch,) each.
"""

import math
from typing import Any, NamedTuple, Sequence

import jax
import jax.numpy as jnp
from jax.scipy import ndimage
import numpy as np

# Each augmentation derives its own random key, so that none changes another. The keys 0
# and 1 are those of crops and flips; see `resident.random_crops`.
_ROTATION, _LIGHT, _ERASING, _MIXUP, _CUTMIX, _CENTERS, _CHOICE = range(2, 9)

# Area of an erased rectangle as a fraction of the image, and height to width.
_ERASED_AREA, _ERASED_RATIO = (0.02, 1 / 3), (0.3, 1 / 0.3)


_TABLE = 1024  # Length of the table of a distribution function.


class Augmentation(NamedTuple):
  """Amounts of all augmentations; 0 leaves one out.

  Attributes:
    rotation: Largest angle in degrees, in either direction.
    brightness: Largest change of all values, as a fraction of the full range.
    contrast: Largest relative change of the differences from the mean.
    random_erasing: Probability that a rectangle is erased.
    mixup: Parameter of the beta distribution of the shares of two images.
    cutmix: The same for the areas of two images.
  """

  rotation: float = 0.0
  brightness: float = 0.0
  contrast: float = 0.0
  random_erasing: float = 0.0
  mixup: float = 0.0
  cutmix: float = 0.0


NONE = Augmentation()


class MixedLabels(NamedTuple):
  """Labels of images that are mixed of two images each.

  Attributes:
    first: Label of one image, int32 (batch,).
    second: Label of the other one, likewise.
    share: Share of the first one, float32 (batch,) in 0..1.
  """

  first: jax.Array
  second: jax.Array
  share: jax.Array

  @property
  def larger(self) -> jax.Array:
    """The label that has the larger share; the first one if the shares are equal."""
    return jnp.where(self.share >= 0.5, self.first, self.second)


def angles(key: jax.Array, count: int, largest: float) -> jax.Array:
  """Draws angles in radians, uniform in -largest..largest degrees: float32 (count,)."""
  bound = math.radians(largest)
  return jax.random.uniform(
      jax.random.fold_in(key, _ROTATION), (count,), minval=-bound, maxval=bound)


def rotate(
    images: jax.Array, corners: jax.Array, size: int, angle: jax.Array,
    fill: Sequence[int],
) -> jax.Array:
  """Cuts crops that are rotated about their centers, with bilinear interpolation.

  Args:
    images: uint8 (batch, height, width, channels), of any height and width.
    corners: Upper left corners of the crops before rotation, int32 (batch, 2).
    size: Height and width of the crops.
    angle: Angles in radians, float32 (batch,). Content turns counterclockwise.
    fill: Value of each channel outside of the image.

  Returns:
    uint8 (batch, size, size, channels).
  """
  ground = _pixel(fill, jnp.float32)
  offset = np.arange(size, dtype=np.float32) - (size - 1) / 2

  def crop(image, corner, turn):
    middle = corner.astype(jnp.float32) + (size - 1) / 2
    cos, sin = jnp.cos(turn), jnp.sin(turn)
    rows, columns = jnp.asarray(offset[:, None]), jnp.asarray(offset[None, :])
    places = [middle[0] + cos * rows + sin * columns,
              middle[1] - sin * rows + cos * columns]
    sample = lambda channel: ndimage.map_coordinates(
        channel, places, order=1, mode="constant")
    return jax.vmap(sample, in_axes=-1, out_axes=-1)(image)

  above = images.astype(jnp.float32) - ground  # Outside of the image it is 0.
  return _rounded(jax.vmap(crop)(above, corners, angle) + ground)


def augment(
    images: jax.Array, labels: jax.Array, key: jax.Array, amounts: Augmentation,
    fill: Sequence[int],
) -> tuple[jax.Array, jax.Array | MixedLabels]:
  """Augments a batch in every way but by rotation, in the order of `Augmentation`.

  Args:
    images: The batch.
    labels: int32 (batch,).
    key: Random key of the batch.
    amounts: What is done.
    fill: The mean of each channel, for erased rectangles and as the center of contrast.

  Returns:
    The batch, and its labels. They are `MixedLabels` if images are mixed.
  """
  if amounts.brightness or amounts.contrast:
    images = _change_light(images, key, amounts, fill)
  if amounts.random_erasing:
    images = _erase(images, key, amounts.random_erasing, fill)
  if amounts.mixup or amounts.cutmix:
    return _mix(images, labels, key, amounts)
  return images, labels


def _change_light(
    images: jax.Array, key: jax.Array, amounts: Augmentation, fill: Sequence[int]
) -> jax.Array:
  """Changes brightness and contrast; see `augment` for the arguments."""
  keys = jax.random.split(jax.random.fold_in(key, _LIGHT))
  gain, shift = (
      jax.random.uniform(part, (len(images), 1, 1, 1), minval=-amount, maxval=amount)
      for part, amount in zip(keys, (amounts.contrast, amounts.brightness)))
  ground = _pixel(fill, jnp.float32)
  above = images.astype(jnp.float32) - ground
  return _rounded(ground + (1 + gain) * above + 255 * shift)


def _erase(
    images: jax.Array, key: jax.Array, probability: float, fill: Sequence[int]
) -> jax.Array:
  """Fills a rectangle of some images; see `augment` for the other arguments.

  References:
    Zhong et al., 2017: Random Erasing Data Augmentation.
  """
  count, size = images.shape[:2]
  keys = jax.random.split(jax.random.fold_in(key, _ERASING), 5)
  chosen = jax.random.bernoulli(keys[0], probability, (count, 1, 1, 1))
  least, most = _ERASED_AREA
  area = jax.random.uniform(keys[1], (count,), minval=least, maxval=most)
  least, most = map(math.log, _ERASED_RATIO)
  ratio = jnp.exp(jax.random.uniform(keys[2], (count,), minval=least, maxval=most))
  sides = [jnp.clip(jnp.round(size * jnp.sqrt(part)).astype(jnp.int32), 1, size)
           for part in (area * ratio, area / ratio)]
  starts = [jax.random.randint(part, (count,), 0, size - side + 1)
            for part, side in zip(keys[3:], sides)]
  (top, left), (height, width) = starts, sides
  box = inside(size, top, top + height, left, left + width)
  return jnp.where(chosen & box, _pixel(fill, jnp.uint8), images)


def _mix(
    images: jax.Array, labels: jax.Array, key: jax.Array, amounts: Augmentation
) -> tuple[jax.Array, MixedLabels]:
  """Mixes each image of a batch with the one at the same place from the end."""
  count = len(images)
  draw = lambda which, alpha: shares(jax.random.fold_in(key, which), count, alpha)
  mixed = []
  if amounts.mixup:
    mixed.append(mixup(images, draw(_MIXUP, amounts.mixup)))
  if amounts.cutmix:
    centers = jax.random.uniform(jax.random.fold_in(key, _CENTERS), (2, count))
    mixed.append(cutmix(images, draw(_CUTMIX, amounts.cutmix), centers))
  images, share = mixed[0]
  if len(mixed) == 2:
    other_images, other_share = mixed[1]
    chosen = jax.random.bernoulli(jax.random.fold_in(key, _CHOICE), shape=(count,))
    images = jnp.where(chosen[:, None, None, None], images, other_images)
    share = jnp.where(chosen, share, other_share)
  return images, MixedLabels(labels, labels[::-1], share)


def shares(key: jax.Array, count: int, alpha: float) -> jax.Array:
  """Draws shares from the beta distribution with both parameters `alpha`.

  Uniform numbers are mapped by the inverse of the distribution function, which is a
  table with linear interpolation, cut off at its ends. `jax.random.beta` would take
  seconds to compile.

  Returns:
    float32 (count,) in 0..1.
  """
  from scipy import special  # This import takes half a second.

  places = (np.arange(_TABLE) + 0.5) / _TABLE
  table = special.betaincinv(alpha, alpha, places)
  return jnp.interp(jax.random.uniform(key, (count,)), *(
      jnp.asarray(part, jnp.float32) for part in (places, table)))


def mixup(images: jax.Array, share: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Averages each image with the one at the same place from the end of the batch.

  Args:
    images: The batch.
    share: Weight of the image itself, float32 (batch,) in 0..1.

  Returns:
    The batch and the shares.

  References:
    Zhang et al., 2018: mixup: Beyond Empirical Risk Minimization.
  """
  weight = share[:, None, None, None]
  values = images.astype(jnp.float32)
  return _rounded(weight * values + (1 - weight) * values[::-1]), share


def cutmix(
    images: jax.Array, share: jax.Array, centers: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Pastes a square of another image into each image.

  The other image is the one at the same place from the end of the batch. The square is
  cut off at the borders of the image.

  Args:
    images: The batch.
    share: Share of the area that the image itself keeps, float32 (batch,) in 0..1. The
      area of the whole square is 1 less this.
    centers: Rows and columns of the centers, as fractions of the size: float32
      (2, batch) in 0..1.

  Returns:
    The batch, and the shares of the area that the images do keep.

  References:
    Yun et al., 2019: CutMix: Regularization Strategy to Train Strong Classifiers.
  """
  size = images.shape[1]
  side = jnp.round(size * jnp.sqrt(1 - share)).astype(jnp.int32)
  first = jnp.floor(size * centers).astype(jnp.int32) - side[None] // 2
  (top, left), (bottom, right) = (
      jnp.clip(edge, 0, size) for edge in (first, first + side[None]))
  box = inside(size, top, bottom, left, right)
  pasted = (bottom - top) * (right - left)
  return jnp.where(box, images[::-1], images), 1 - pasted / size**2


def inside(
    size: int, top: jax.Array, bottom: jax.Array, left: jax.Array, right: jax.Array
) -> jax.Array:
  """Returns which pixels are inside of boxes: bool (batch, size, size, 1).

  Args:
    size: Height and width of the images.
    top: First rows, int32 (batch,).
    bottom: Last rows plus one, likewise.
    left: First columns, likewise.
    right: Last columns plus one, likewise.
  """
  places = jnp.arange(size, dtype=jnp.int32)[None, :]
  rows = (places >= top[:, None]) & (places < bottom[:, None])
  columns = (places >= left[:, None]) & (places < right[:, None])
  return (rows[:, :, None] & columns[:, None, :])[..., None]


def _pixel(values: Sequence[int], dtype: Any) -> jax.Array:
  """Returns a pixel that broadcasts to a batch: (1, 1, 1, channels)."""
  return jnp.asarray(values, dtype)[None, None, None]


def _rounded(values: jax.Array) -> jax.Array:
  """Rounds and clips values to 8 bits."""
  return jnp.clip(jnp.round(values), 0, 255).astype(jnp.uint8)
