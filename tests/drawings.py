"""What figures and pictures show."""

import numpy as np
from PIL import Image


def drawn(axes):
  """The points of a panel's lines, by label."""
  return {line.get_label(): (line.get_xdata(), line.get_ydata())
          for line in axes.get_lines()}


def check_picture(path, width, height):
  """Checks that a picture has this size, and ink in each of its three panels."""
  with Image.open(path) as image:
    assert image.format == "PNG" and image.size == (width, height)
    pixels = np.asarray(image.convert("L"))
  assert pixels[0, 0] == 255  # White paper,
  assert 0.01 < np.mean(pixels < 200) < 0.3  # some ink,
  thirds = np.array_split(pixels, 3, axis=1)
  assert all(np.mean(third < 200) > 0.01 for third in thirds)  # in every panel.
