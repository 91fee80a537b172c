"""Decodes, flattens, resizes and crops images, with Pillow and NumPy only.

`flatten` brings an image of any Pillow mode to 8-bit gray or RGB. `centre` and
`random_crop` build on it: the first serves evaluation and `minw.infer`, the second
training. Color profiles are ignored: pixel values are taken to be sRGB.
"""

import io
import math
import re
from typing import Any, Iterator, Mapping

import numpy as np
from PIL import Image
from PIL import ImageChops
from PIL import JpegImagePlugin

Color = tuple[int, int, int]
BLACK: Color = (0, 0, 0)

# Pillow's modes by number of channels.
MODES = {1: "L", 3: "RGB"}

# Formats that are opened. Others are refused, among them those that run a program (EPS)
# and those that are recognized by next to nothing (TGA).
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")

# A JPEG decodes at a fraction of its size without ever holding all its pixels. Its
# limit is therefore this many times Pillow's limit: 268 million pixels, not 89 million.
_JPEG_LIMIT = 3
# A JPEG that comes in several scans is held as a whole, and each scan takes the time of
# an image. Largest number of pixels times scans.
_SCANNED_PIXELS = 2**31
# A larger JPEG is decoded at 1/2, 1/4 or 1/8 of its size, ...
_DRAFT_PIXELS = 2**23
# ... which must still be so many times as large as what is asked for.
_DRAFT_MARGIN = 4
# Most pixels and longest side of a BMP with run-length encoding, which Pillow decodes
# in Python.
_RUNS_PIXELS, _RUNS_SIDE = 2**24, 2**16
# Most pixels of a tile of a TIFF file, unless the image has as many: tiles are decoded
# as a whole.
_TILE_PIXELS = 2**24
# An image is resized as a whole before its centre is cut out, unless that would make
# more than so many times the pixels that are asked for, as for a long and narrow image.
_RESIZED = 64

# How an image is turned to be upright, by its EXIF orientation.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90}
_SWAPPED = (5, 6, 7, 8)  # Orientations that exchange height and width.
_ORIENTATION = 0x0112  # EXIF and TIFF tag.
_TILE_WIDTH, _TILE_LENGTH = 322, 323  # TIFF tags.
_BITS_PER_SAMPLE, _PHOTOMETRIC, _SAMPLE_FORMAT = 258, 262, 339  # TIFF tags.
_WHITE_IS_ZERO, _SIGNED = 0, 2  # Values of the last two.

_RATIO = (3 / 4, 4 / 3)  # Width to height of random crops.
_TRIES = 10


class ImageError(ValueError):
  """An image that cannot be read, or of a kind that is not accepted."""


def open_image(content: bytes) -> Image.Image:
  """Opens an image; the pixels are decoded when they are used.

  Args:
    content: The content of an image file.

  Raises:
    ImageError: The image has more pixels than are accepted, or several frames.
    Exception: The content is no image or is damaged; Pillow raises many kinds.
  """
  if content.startswith(b"\xff\xd8\xff"):
    # Image.open would refuse by the size of the whole JPEG, and would take a second
    # image that is attached to a photo for a second frame.
    image = JpegImagePlugin.JpegImageFile(io.BytesIO(content))
    _check_scans(image, content)
  else:
    Image.init()
    image = Image.open(io.BytesIO(content),
                       formats=[name for name in FORMATS if name in Image.OPEN])
    check_size(*image.size)
    _check_decoder(image)
  if getattr(image, "is_animated", False):
    raise ImageError("it has several frames or pages; save the one that is meant")
  return image


def _check_scans(image: JpegImagePlugin.JpegImageFile, content: bytes) -> None:
  """Raises `ImageError` where a JPEG would take too much memory or time."""
  scans = _scans(content)
  first = next(scans, b"\0")
  if first[0] == image.layers and "progressive" not in image.info:
    check_size(*image.size, _JPEG_LIMIT)  # All is in one scan.
    return
  check_size(*image.size)
  count = 1 + sum(1 for _ in scans)
  if count * image.width * image.height > _SCANNED_PIXELS:
    raise ImageError(f"it has {count:,} scans of {image.width} x {image.height} pixels;"
                     f" {_SCANNED_PIXELS:,} pixels are accepted in all scans together")


def _scans(content: bytes) -> Iterator[bytes]:
  """The headers of the scans of a JPEG: the number of channels comes first."""
  at = 2
  # Any marker but those that have no length, which may stand within a scan.
  while marker := re.compile(rb"\xff([\x02-\xcf\xd9-\xfe])").search(content, at):
    if marker[1] == b"\xd9":  # The end of the image.
      return
    start = marker.end() + 2
    at = start - 2 + int.from_bytes(content[start - 2:start], "big")
    if marker[1] == b"\xda" and content[start:at]:
      yield content[start:at]


def _check_decoder(image: Image.Image) -> None:
  """Raises `ImageError` where Pillow would decode more than the image has."""
  tiles: Any = getattr(image, "tile", ())  # Only images from files have them.
  decoders = {tile[0] for tile in tiles}
  if "bmp_rle" in decoders and (image.width * image.height > _RUNS_PIXELS
                                or max(image.size) > _RUNS_SIDE):
    raise ImageError(f"it has {image.width} x {image.height} pixels in run-length"
                     f" encoding; {_RUNS_PIXELS:,} are accepted")
  tags = getattr(image, "tag_v2", {})
  tile = [tags.get(tag, 1) for tag in (_TILE_WIDTH, _TILE_LENGTH)]
  if not all(type(size) is int and size > 0 for size in tile) or (
      math.prod(tile) > max(image.width * image.height, _TILE_PIXELS)):
    raise ImageError(f"its tiles have {tile[0]!r:.20} x {tile[1]!r:.20} pixels;"
                     f" {_TILE_PIXELS:,} are accepted")


def check_size(width: int, height: int, factor: int = 1) -> None:
  """Raises `ImageError` where an image has more pixels than Pillow's limit.

  Args:
    width: Width of the image.
    height: Height of the image.
    factor: How many times the limit is accepted.
  """
  limit = factor * (Image.MAX_IMAGE_PIXELS or math.inf)
  if not 0 < width * height <= limit:
    raise ImageError(f"it has {width} x {height} pixels; 1 to {limit:,} are accepted")


def flatten(image: Image.Image, mode: str, background: Color = BLACK) -> Image.Image:
  """Brings an image of any mode to 8-bit gray or RGB.

  Transparent parts show the background. 16-bit values are divided by 256. CMYK of a
  JPEG file is taken as inverted where the file has Adobe's marker, as programs that
  write it do.

  Args:
    image: A single frame, just opened.
    mode: "L" for luma or "RGB".
    background: RGB color behind transparent parts.

  Returns:
    An image of that mode and of the same size.

  Raises:
    ImageError: The range of its values is unknown: 32-bit integers, floats, signed
      integers; or which of its 16-bit colors is transparent.
  """
  stored = _stored_as(image)
  image.load()
  tags = getattr(image, "tag_v2", {})
  if image.mode in ("F", "I") or _SIGNED in tags.get(_SAMPLE_FORMAT, ()):
    raise ImageError(f"the range of its pixel values is unknown (Pillow mode"
                     f" {image.mode}); save it with 8 or 16 bits per channel")
  opacity = None
  if image.has_transparency_data:
    if image.mode in ("1", "L", "RGB") or image.mode.startswith("I;16"):
      opacity = _opacity_by_key(image, stored)
    else:
      if image.mode != "RGBA":
        image = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
      image, opacity = image.convert("RGB"), image.getchannel("A")
  if image.mode.startswith("I"):
    image = _high_byte(image, tags)
  elif image.mode == "CMYK" and image.format == "JPEG" and "adobe" not in image.info:
    image = ImageChops.invert(image)  # Pillow has inverted it without asking.
  if opacity is not None:
    ground = Image.new("RGB", image.size, background)
    ground.paste(_plain(image, "RGB"), mask=opacity)
    image = ground
  return _plain(image, mode)


def _stored_as(image: Image.Image) -> str:
  """How Pillow's decoder names the layout of pixels in the file, such as "RGB;16B"."""
  tiles: Any = getattr(image, "tile", None)
  layout = tiles[0][3] if tiles else ""
  return layout if isinstance(layout, str) else str(layout and layout[0])


def _opacity_by_key(image: Image.Image, stored: str) -> Image.Image:
  """A mask that is 0 where a pixel has the one value that is transparent, else 255."""
  key = image.info["transparency"]
  if image.mode == "RGB":
    if stored.endswith("16B"):
      raise ImageError("one of its 16-bit colors is transparent, of which Pillow reads"
                       " 8 bits; save it with an alpha channel")
    same = np.equal(np.asarray(image), key).all(-1)
  else:
    # The key of a PNG has as many bits as the file; the pixels have been scaled.
    key = {"1": 255 * bool(key), "L;2": key * 85, "L;4": key * 17}.get(stored, key)
    same = np.asarray(image.convert("L") if image.mode == "1" else image) == key
  return Image.fromarray(np.where(same, np.uint8(0), np.uint8(255)))


def _high_byte(image: Image.Image, tags: Mapping[int, Any]) -> Image.Image:
  """Gray of more than 8 bits as 8 bits; `tags` are a TIFF file's."""
  bits = tags.get(_BITS_PER_SAMPLE, (16,))[0]
  values = (np.asarray(image) >> (bits - 8)).astype(np.uint8)
  if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
    values = 255 - values  # Pillow does this itself for 8 bits and less.
  return Image.fromarray(values)


def _plain(image: Image.Image, mode: str) -> Image.Image:
  """An opaque 8-bit image as gray or RGB."""
  if image.mode == mode:
    return image
  if image.mode not in ("1", "L", "RGB"):
    image = image.convert("RGB")
  if "transparency" in image.info:  # Pillow would convert that, too.
    image = image.copy()
    del image.info["transparency"]
  return image.convert(mode)


def centre(
    image: Image.Image, height: int, width: int, channels: int = 3, *,
    shrink: bool = True, upright: bool = False, background: Color = BLACK,
) -> np.ndarray:
  """The centre of an image, at the largest scale that fills it.

  A JPEG of more than 8 million pixels is decoded at a fraction of its size if that is
  still four times the size asked for.

  Args:
    image: A single frame of any size and mode, just opened.
    height: Height of the result.
    width: Width of the result.
    channels: Channels of the result. 1 channel is luma and 3 are RGB, of any image; 2
      and 4 channels are those of a file with gray and alpha, or RGB and alpha.
    shrink: Whether a larger image is made smaller first (bilinear, with antialiasing),
      until its shorter side fits. A smaller one is enlarged in any case.
    upright: Whether to turn the image as its EXIF orientation says.
    background: RGB color behind transparent parts.

  Returns:
    uint8 (height, width, channels).

  Raises:
    ImageError: See `flatten`; or the image is too large or has other channels.
  """
  if shrink and image.format == "JPEG" and image.width * image.height > _DRAFT_PIXELS:
    side = _DRAFT_MARGIN * max(height, width)
    image.draft(None, (side, side))
  check_size(*image.size)
  if channels in (1, 3):
    parts = [flatten(image, MODES[channels], background)]
  else:
    parts = _channels(image, channels)
  turn = _UPRIGHT.get(_orientation(image)) if upright else None
  if turn is not None:
    parts = [part.transpose(turn) for part in parts]
  return fit(parts, height, width, shrink)


def fit(
    parts: list[Image.Image], height: int, width: int, shrink: bool = True
) -> np.ndarray:
  """Scales and crops images of one size, and stacks their channels.

  Args:
    parts: Images of mode "L" or "RGB".
    height: Height of the result.
    width: Width of the result.
    shrink: See `centre`.

  Returns:
    uint8 (height, width, channels).
  """
  return np.concatenate([np.asarray(_fit(part, height, width, shrink)).reshape(
      height, width, -1) for part in parts], axis=-1)


def _fit(image: Image.Image, height: int, width: int, shrink: bool) -> Image.Image:
  ratio = max(width / image.width, height / image.height)
  columns, rows = image.size
  if ratio > 1 or shrink:
    columns, rows = max(width, round(columns * ratio)), max(height, round(rows * ratio))
  left, top = (columns - width) // 2, (rows - height) // 2
  box = left, top, left + width, top + height
  if (columns, rows) == image.size:
    return image.crop(box)
  if columns * rows <= _RESIZED * width * height:
    return image.resize((columns, rows), Image.Resampling.BILINEAR).crop(box)
  part: Any = tuple(at * old / new for at, old, new in zip(
      box, 2 * image.size, 2 * (columns, rows)))
  return image.resize((width, height), Image.Resampling.BILINEAR, box=part)


def _channels(image: Image.Image, count: int) -> list[Image.Image]:
  """The channels of an image that has exactly so many, as they are."""
  stored = _stored_as(image)
  image.load()
  mode = "LA" if stored == "LA;16B" else image.mode  # Pillow makes it RGBA.
  if mode != {2: "LA", 4: "RGBA"}.get(count):
    raise ImageError(
        f"it has the channels of Pillow mode {mode}; the network takes {count}"
        f" channels: {'gray and alpha, or ' if count == 2 else ''}"
        f"{'RGB and alpha, or ' if count == 4 else ''}"
        f"an .npy file of uint8 (height, width, {count})")
  return list(image.split())


def upright_size(image: Image.Image) -> tuple[int, int]:
  """The height and width of an image once it is turned as its EXIF orientation says."""
  swapped = _orientation(image) in _SWAPPED
  return (image.width, image.height) if swapped else (image.height, image.width)


def _orientation(image: Image.Image) -> int:
  """The EXIF orientation: 1 to 8, of which 1 is upright."""
  try:
    return image.getexif().get(_ORIENTATION, 1)
  except Exception:  # Damaged EXIF data say nothing.
    return 1


def random_box(
    width: int, height: int, scale: tuple[float, float], rng: np.random.Generator
) -> tuple[int, int, int, int]:
  """Draws a random part of an image: (left, top, right, bottom), as Inception does.

  The area is uniform in `scale` times the image's area, and the ratio of width to
  height is log-uniform in 3/4 to 4/3. If ten draws do not fit into the image, the
  result is the largest central part of an allowed ratio.
  """
  for _ in range(_TRIES):
    area = width * height * rng.uniform(*scale)
    least, most = map(math.log, _RATIO)
    ratio = math.exp(rng.uniform(least, most))
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
    channels: int = 3,
) -> np.ndarray:
  """Returns a random part of an image (`random_box`), resized and maybe flipped.

  Resizing is bilinear. A JPEG is decoded at half, a quarter or an eighth of its size
  where that is enough.

  Args:
    image: A single frame of any size and mode, just opened.
    size: Height and width of the result.
    scale: Least and greatest area of the part, as fractions of the image's area.
    flip: Whether to flip left to right, with probability 1/2.
    rng: Generator of all random numbers.
    channels: Channels of the result: 1 for luma or 3 for RGB.

  Returns:
    uint8 (size, size, channels).
  """
  width, height = image.size
  box = random_box(width, height, scale, rng)
  image.draft(None, (math.ceil(width * size / (box[2] - box[0])),
                     math.ceil(height * size / (box[3] - box[1]))))
  across, down = image.width / width, image.height / height
  box = (box[0] * across, box[1] * down, box[2] * across, box[3] * down)
  image = flatten(image, MODES[channels])
  image = image.resize((size, size), Image.Resampling.BILINEAR, box=box)
  if flip and rng.random() < 0.5:
    image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
  return np.asarray(image).reshape(size, size, channels)
