"""Records of small images whose colors name them, and how tests cut them out."""

import io

import numpy as np
from PIL import Image

# Arguments of `streamed.Split.random_crops` and of `centres`.
TRAINING = dict(seed=3, batch_size=5, crop_size=8, crop_scale=(0.5, 1.0), flip=True)
CENTRES = dict(source=(8, 10), crop=(8, 6), shrink=True)


def records(count, damaged=()):
  """Image i is of the color (i, 2i, 255) on its left, (i, 2i, 0) on its right."""
  result = []
  for i in range(count):
    pixels = np.full((16, 20, 3), (i, 2 * i, 0), np.uint8)
    pixels[:, :10, 2] = 255
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    content = file.getvalue()[:30 if i in damaged else None]
    result.append({"image": content, "label": 500 + i, "file_name": b"%d.png" % i})
  return result
