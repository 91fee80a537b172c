"""minw.images: crops with values that are known without it."""

import io

import numpy as np
from PIL import Image
import pytest

from minw import images


def coordinates(width, height):
  """(column, row, 77) of each pixel."""
  row, column = np.indices((height, width))
  pixels = np.stack([column, row, np.full_like(row, 77)], -1).astype(np.uint8)
  return Image.fromarray(pixels)


def opened(image, kind="jpeg", **options):
  file = io.BytesIO()
  image.save(file, kind, **options)
  return images.open_image(file.getvalue())


def test_centre_of_an_image_that_fits():
  for width, height, left, top in ((8, 6, 0, 0), (20, 6, 6, 0), (8, 11, 0, 2)):
    got = images.centre(coordinates(width, height), 6, 8)
    assert got.shape == (6, 8, 3) and got.dtype == np.uint8
    assert got[0, 0].tolist() == [left, top, 77]
    assert got[5, 7].tolist() == [left + 7, top + 5, 77]


def test_centre_of_a_larger_image():
  # At half of its size, then two columns off each side.
  got = images.centre(coordinates(24, 16), 8, 8)
  for i in (1, 3, 6):  # The edges have less to average.
    # Pixel i of the smaller image lies between 2i and 2i + 1 of the larger.
    assert got[i, i].tolist() == pytest.approx([2 * (i + 2) + 0.5, 2 * i + 0.5, 77],
                                               abs=0.5)
  got = images.centre(coordinates(24, 16), 8, 8, shrink=False)
  assert got[0, 0].tolist() == [8, 4, 77] and got[7, 7].tolist() == [15, 11, 77]


@pytest.mark.parametrize("shrink", [True, False])
def test_centre_of_a_smaller_image(shrink):
  got = images.centre(coordinates(4, 30), 8, 8, shrink=shrink)
  # Twice as large: its rows 26 to 33 of 60.
  assert got[0, 0].tolist() == [0, 13, 77]
  assert got[7, 7].tolist() == [3, 16, 77]


@pytest.mark.parametrize("mode", ["L", "CMYK", "P", "RGBA", "1"])
def test_other_modes(mode):
  gray = Image.new("RGB", (20, 20), (255, 255, 255)).convert(mode)
  assert (images.centre(gray, 8, 8) == 255).all()
  crop = images.random_crop(gray, 8, (0.5, 1.0), True, np.random.default_rng(0))
  assert crop.shape == (8, 8, 3) and (crop == 255).all()
  assert images.centre(gray, 8, 8, 1).shape == (8, 8, 1)


def test_random_boxes():
  rng = np.random.default_rng(0)
  boxes = np.array([images.random_box(300, 200, (0.08, 0.5), rng)
                    for _ in range(2000)])
  left, top, right, bottom = boxes.T
  assert left.min() == top.min() == 0 and right.max() == 300 and bottom.max() == 200
  width, height = right - left, bottom - top
  area, ratio = width * height / 60_000, np.log(width / height)
  assert area.min() > 0.078 and area.max() < 0.505
  assert abs(area.mean() - 0.29) < 0.01  # Five standard deviations.
  assert np.abs(ratio).max() < np.log(4 / 3) + 0.03 and abs(ratio.mean()) < 0.02


def test_boxes_that_do_not_fit_are_central():
  rng = np.random.default_rng(0)
  assert images.random_box(90, 10, (1.0, 1.0), rng) == (38, 0, 51, 10)
  assert images.random_box(10, 90, (1.0, 1.0), rng) == (0, 38, 10, 51)


def test_random_crops_are_parts_of_the_image():
  flips = 0
  for seed in range(100):
    rng = np.random.default_rng(seed)
    box = images.random_box(200, 160, (0.3, 1.0), np.random.default_rng(seed))
    crop = images.random_crop(coordinates(200, 160), 50, (0.3, 1.0), True, rng)
    crop = crop.astype(float)
    if crop[0, 0, 0] > crop[0, -1, 0]:
      flips += 1
      crop = crop[:, ::-1]
    # Centres of the outermost pixels, to a rounding.
    assert np.abs(crop[0, 0, :2] - box[:2]).max() < 3.5
    assert np.abs(crop[-1, -1, :2] - box[2:]).max() < 4.5
    assert (crop[..., 2] == 77).all()
    assert (np.diff(crop[..., 0], axis=1) >= 0).all()
  assert 25 < flips < 75  # Five standard deviations.
  same = [images.random_crop(coordinates(200, 160), 50, (0.3, 1.0), False,
                             np.random.default_rng(seed)) for seed in (0, 0, 1)]
  assert (same[0] == same[1]).all() and (same[0] != same[2]).any()
  assert (np.diff(same[2][..., 0].astype(int), axis=1) >= 0).all()


def test_large_jpeg_is_decoded_at_a_fraction_of_its_size():
  image = coordinates(200, 160).resize((1600, 1280), Image.Resampling.BICUBIC)
  for seed in range(5):
    arguments = 50, (0.5, 1.0), True
    file = opened(image, quality=95)
    crop = images.random_crop(file, *arguments, np.random.default_rng(seed))
    assert file.size in ((200, 160), (400, 320), (800, 640))
    exact = images.random_crop(image, *arguments, np.random.default_rng(seed))
    assert np.abs(crop.astype(int) - exact).mean() < 1.5
  file = opened(image, quality=95)  # A small part of it needs all pixels.
  images.random_crop(file, 900, (0.5, 1.0), True, np.random.default_rng(0))
  assert file.size == (1600, 1280)
