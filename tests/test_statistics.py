"""minw.data.statistics: exact moments of many images."""

import numpy as np
import pytest

from minw.data import statistics
from own_images import picture


def test_they_are_those_of_all_pixels_together():
  # Images of different sizes: a large one counts for more.
  images = [picture(0, 30, 40), picture(1, 2, 3) // 4]
  mean, std = statistics.mean_and_std(sum(map(statistics.moments, images)))
  pixels = np.concatenate([image.reshape(-1, 3) for image in images]) / 255
  assert mean == pytest.approx(pixels.mean(0), rel=1e-12)
  assert std == pytest.approx(pixels.std(0), rel=1e-12)
  assert all(type(value) is float for value in mean + std)


def test_many_pixels_do_not_overflow():
  # 10^12 pixels: one quarter white, as if so many images had been added.
  image = np.array([[[255], [0], [0], [0]]], np.uint8)
  mean, std = statistics.mean_and_std(statistics.moments(image) * 25 * 10**10)
  assert mean == (0.25,) and std == pytest.approx((np.sqrt(3) / 4,), rel=1e-12)


def test_one_color_has_the_deviation_of_one_level():
  mean, std = statistics.mean_and_std(
      statistics.moments(np.full((3, 3, 1), 51, np.uint8)))
  assert mean == (0.2,) and std == (1 / 255,)
