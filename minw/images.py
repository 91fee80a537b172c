"""From image files to the pixels that networks see: Pillow and NumPy, no more.

Training's random crops, and the centre that evaluation and `minw.infer` take. A faster
decoder of JPEG would go in here, as what these functions open images with.
"""

import io
import math

import numpy as np
from PIL import Image

_RATIO = (3 / 4, 4 / 3)  # Width to height of random crops.
_TRIES = 10


def open_image(content: bytes) -> Image.Image:
  """Opens an image, of whatever format; the pixels are decoded when they are used."""
  return Image.open(io.BytesIO(content))


def centre(
    image: Image.Image, height: int, width: int, channels: int = 3, *,
    shrink: bool = True,
) -> np.ndarray:
  """The centre of an image, at the largest scale that fills it.

  Args:
    image: of any size and mode.
    height, width, channels: of the result; 1 channel is luma, 3 are RGB.
    shrink: whether an image that is larger is made smaller first (bilinear, with
      antialiasing), until its shorter side fits. One that is too small is enlarged
      in any case.

  Returns:
    uint8 (height, width, channels).
  """
  mode = {1: "L", 3: "RGB"}[channels]
  if image.mode != mode:  # It would copy.
    image = image.convert(mode)
  ratio = max(width / image.width, height / image.height)
  if ratio > 1 or shrink:
    size = (max(width, round(image.width * ratio)),
            max(height, round(image.height * ratio)))
    image = image.resize(size, Image.Resampling.BILINEAR)  # A copy, if as large.
  left, top = (image.width - width) // 2, (image.height - height) // 2
  image = image.crop((left, top, left + width, top + height))
  return np.asarray(image).reshape(height, width, channels)


def random_box(
    width: int, height: int, scale: tuple[float, float], rng: np.random.Generator
) -> tuple[int, int, int, int]:
  """A random part of an image: (left, top, right, bottom), as Inception's crops.

  Its area is uniform in `scale` times the image's, its ratio of width to height
  log-uniform in 3/4 to 4/3; where ten of these do not fit, the largest central part
  of an allowed ratio.
  """
  for _ in range(_TRIES):
    area = width * height * rng.uniform(*scale)
    ratio = math.exp(rng.uniform(*map(math.log, _RATIO)))
    w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
    if 0 < w <= width and 0 < h <= height:
      left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
      return left, top, left + w, top + h
  w = min(width, round(height * _RATIO[1]))
  h = min(height, round(width / _RATIO[0]))
  left, top = (width - w) // 2, (height - h) // 2
  return left, top, left + w, top + h


def random_crop(
    image: Image.Image,
    size: int,
    scale: tuple[float, float],
    flip: bool,
    rng: np.random.Generator,
) -> np.ndarray:
  """A random part of an image (`random_box`), resized bilinearly and maybe flipped.

  JPEG is decoded at half, a quarter or an eighth of its size where that is enough.

  Args:
    image: just opened, of any size and mode.
    size: of the result.
    scale: least and greatest area of the part, as fractions of the image's.
    flip: whether to flip left to right, with probability 1/2.
    rng: what all is drawn from.

  Returns:
    uint8 (size, size, 3).
  """
  width, height = image.size
  box = random_box(width, height, scale, rng)
  image.draft(None, (math.ceil(width * size / (box[2] - box[0])),
                     math.ceil(height * size / (box[3] - box[1]))))
  across, down = image.width / width, image.height / height
  box = (box[0] * across, box[1] * down, box[2] * across, box[3] * down)
  if image.mode != "RGB":
    image = image.convert("RGB")
  image = image.resize((size, size), Image.Resampling.BILINEAR, box=box)
  if flip and rng.random() < 0.5:
    image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
  return np.asarray(image)
