"""Mean and standard deviation of the pixels of many images, exactly."""

import math

import numpy as np

# Smallest deviation that is returned, that of one gray level. Images of one color would
# otherwise be divided by zero.
_LEAST = 1 / 255


def moments(image: np.ndarray) -> np.ndarray:
  """Returns what `mean_and_std` needs to know of an image. Moments of images add up.

  Args:
    image: uint8 (height, width, channels).

  Returns:
    int64 (3, channels): the number of pixels, their sum, and the sum of their squares.
  """
  pixels = image.reshape(-1, image.shape[-1]).astype(np.int64)
  return np.stack([np.full(pixels.shape[-1], len(pixels)), pixels.sum(0),
                   (pixels**2).sum(0)])


def mean_and_std(total: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
  """Returns the mean and the deviation of each channel, of values in 0..1.

  Args:
    total: Sum of the `moments` of one or more images.
  """
  mean, std = [], []
  for n, s, squares in total.T.tolist():  # Python's integers do not overflow.
    mean.append(s / n / 255)
    std.append(max(math.sqrt(n * squares - s * s) / n / 255, _LEAST))
  return tuple(mean), tuple(std)
