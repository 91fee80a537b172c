"""Normalization: how the pixels of an image become the numbers that networks see."""

from typing import Any, NamedTuple, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from minw import fold


class Pixels(NamedTuple):
  """How a pixel becomes a number: (pixel - offset) / divisor, for each channel.

  Images are padded with the offset, so that padding becomes zero.
  """

  offset: tuple[float, ...]
  divisor: tuple[float, ...]

  @property
  def fill(self) -> tuple[int, ...]:
    """The pixel that pads images: the offset, as 8-bit values."""
    return tuple(int(round(value)) for value in self.offset)


def pixels(kind: str, mean: Sequence[float], std: Sequence[float]) -> Pixels:
  """Returns the normalization of a data set.

  Args:
    kind: "integer" or "standardized". The first gives multiples of 1/64, which are
      exact in float32 and bfloat16: the first layer is then as integer as the others.
      The second uses the exact mean and deviation, and the first layer is not integer.
    mean: Mean of each channel, of values in 0..1.
    std: Standard deviation of each channel, likewise.

  Raises:
    ValueError: `kind` is neither.
  """
  if kind == "integer":
    return Pixels(tuple(float(round(255 * m)) for m in mean), (64.0,) * len(mean))
  if kind == "standardized":
    return Pixels(tuple(255 * m for m in mean), tuple(255 * s for s in std))
  raise ValueError(f"kind={kind!r}: must be integer or standardized")


def normalize(images: jax.Array | np.ndarray, pixels: Pixels) -> jax.Array:
  """Normalizes uint8 images (..., channels) to float32 (..., channels)."""
  channels = (1,) * (images.ndim - 1) + (-1,)
  offset, divisor = (np.asarray(part, np.float32).reshape(channels) for part in pixels)
  numbers: Any = images.astype(jnp.float32)
  return (numbers - offset) / divisor


def probe(pixels: Pixels, image_shape: Sequence[int]) -> fold.Probe:
  """Returns what `fold.fold` needs to know about normalized images.

  Args:
    pixels: Normalization of the images.
    image_shape: (height, width, channels).
  """
  offset, divisor = (np.asarray(part) for part in pixels)
  exact = (offset == np.round(offset)).all() and (divisor == 64).all()
  return fold.Probe(
      bound=np.broadcast_to(np.maximum(offset, 255 - offset) / divisor, image_shape),
      unit=np.full(image_shape, 1 / 64 if exact else 0.0),
      bits=np.full(image_shape, 16.0))
