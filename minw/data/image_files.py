"""Image files by path: which files a list of paths names, and the pixels of each."""

import contextlib
import io
import logging
import os
import pathlib
import stat
from typing import Any, Iterable, Iterator, Sequence
import warnings

import numpy as np
from PIL import Image
from PIL import ImageColor
from PIL import UnidentifiedImageError

from minw import errors
from minw import text
from minw.data import images

_log = logging.getLogger(__name__)

# Suffixes of files in folders that are taken for images. Any other file can be given by
# its path.
SUFFIXES = frozenset((
    ".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".gif", ".bmp", ".dib",
    ".tif", ".tiff", ".npy"))

# Largest file that is read, in bytes: 32 bits for each of the most pixels that are
# accepted.
_LARGEST = 3 * 2**27


def find(paths: Iterable[str | os.PathLike]) -> Iterator[pathlib.Path]:
  """The image files among `paths` and in the folders among them, in order.

  Folders are searched to any depth, through links, each folder once. What is hidden or
  does not end as an image's name is left out; how much that is, is logged.

  Args:
    paths: Files and folders.

  Returns:
    An iterator that lists folders only as far as it is used.

  Raises:
    errors.UsageError: A path does not exist, or is a folder without image files.
  """
  paths = [pathlib.Path(path) for path in paths]
  for path in paths:
    errors.check(os.path.exists(path), "images", str(path),
                 "a file or folder that exists")
    errors.check(any(wanted for _, wanted in _walk(path)), "images", str(path),
                 "a folder with .png or .jpg files, or others that are images")
  return _find(paths)


def _find(paths: list[pathlib.Path]) -> Iterator[pathlib.Path]:
  for path in paths:
    left_out = 0
    for file, wanted in _walk(path):
      if wanted:
        yield file
      left_out += not wanted
    if left_out:
      _log.warning("%s: files left out, hidden or not named as images are: %d",
                   path, left_out)


def _walk(root: pathlib.Path) -> Iterator[tuple[pathlib.Path, bool]]:
  """A file, or all files of a folder by name; with each, whether to read it."""
  if not os.path.isdir(root):
    yield root, True
    return
  waiting, seen = [root], set()
  while waiting:
    path = waiting.pop()
    hidden = path is not root and path.name.startswith(".")
    if hidden or not os.path.isdir(path):
      yield path, not hidden and path.suffix.lower() in SUFFIXES
      continue
    status = os.stat(path)
    if (status.st_dev, status.st_ino) in seen:  # Reached by another link before.
      continue
    seen.add((status.st_dev, status.st_ino))
    try:
      waiting += [path / name for name in sorted(os.listdir(path), reverse=True)]
    except OSError:
      yield path, True  # Reading it says what is wrong.


def silence_pillow() -> None:
  """Hides Pillow's warnings from the user of a command.

  Pillow warns about damaged metadata and about large images. Metadata do not matter
  here. A large image becomes an error.
  """
  warnings.filterwarnings("ignore", module="PIL")
  warnings.simplefilter("error", Image.DecompressionBombWarning)


def color(name: str) -> images.Color:
  """The RGB values of a color that is given as a name, #rrggbb or R,G,B.

  Raises:
    errors.UsageError: It is not such a color, or not opaque.
  """
  try:
    parts: Any = tuple(map(int, name.split(",")))
  except ValueError:
    try:
      parts = ImageColor.getrgb(name)
    except ValueError:
      parts = ()
  errors.check(len(parts) == 3 and all(0 <= part <= 255 for part in parts),
               "background", name, "a color: a name, #rrggbb or R,G,B from 0 to 255")
  return parts


def read(
    path: str | os.PathLike,
    shape: Sequence[int],
    *,
    shrink: bool = True,
    background: images.Color = images.BLACK,
) -> np.ndarray:
  """Reads an image file: upright, opaque, and of the shape that is asked for.

  An .npy file holds uint8 (height, width, channels), with any number of channels. For
  all other files see `images.centre`.

  Args:
    path: Path of the file.
    shape: (height, width, channels) of the result.
    shrink: Whether a larger image is made smaller first; see `images.centre`.
    background: RGB color behind transparent parts.

  Returns:
    uint8, of that shape.

  Raises:
    images.ImageError: The file cannot be read, is not an image, or is of a kind that is
      not accepted. The message does not name the file.
  """
  with _explained():
    return _read(path, shape, shrink, background)


def size(path: str | os.PathLike) -> tuple[int, int]:
  """Returns the height and width of the image in a file, once it is turned upright.

  Raises:
    images.ImageError: See `read`. The pixels are not decoded, and may still be damaged.
  """
  with _explained():
    content = _content(path)
    if os.fspath(path).lower().endswith(".npy"):
      height, width, _ = _array(content).shape
      return height, width
    with images.open_image(content) as image:
      return images.upright_size(image)


@contextlib.contextmanager
def _explained() -> Iterator[None]:
  """Turns errors in this context into an ImageError that says what is wrong."""
  try:
    yield
  except images.ImageError:
    raise
  except UnidentifiedImageError as error:
    raise images.ImageError("cannot identify image file; these are read: .npy, "
                            + ", ".join(images.FORMATS)) from error
  except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
    raise images.ImageError(
        f"it has more than {Image.MAX_IMAGE_PIXELS:,} pixels") from error
  except Exception as error:  # Pillow has many kinds for damage.
    reason = getattr(error, "strerror", None) or str(error)
    raise images.ImageError(
        text.printable(reason) or f"it ends in {type(error).__name__}") from error


def _read(
    path: str | os.PathLike,
    shape: Sequence[int],
    shrink: bool,
    background: images.Color,
) -> np.ndarray:
  height, width, channels = shape
  content = _content(path)
  if os.fspath(path).lower().endswith(".npy"):
    return images.fit(_planes(_array(content), channels), height, width, shrink)
  with images.open_image(content) as image:
    return images.centre(image, height, width, channels, shrink=shrink, upright=True,
                         background=background)


def _content(path: str | os.PathLike) -> bytes:
  """All of a regular file, if it is not too large."""
  status = os.stat(path)
  if stat.S_ISDIR(status.st_mode):
    os.listdir(path)  # Says why `find` could not list it.
    raise images.ImageError("it is a folder")
  if not stat.S_ISREG(status.st_mode):  # Opening a pipe could take forever.
    raise images.ImageError("it is not a regular file")
  if status.st_size > _LARGEST:
    raise images.ImageError(
        f"it has {status.st_size:,} bytes; {_LARGEST:,} are accepted")
  with open(path, "rb") as file:
    return file.read(status.st_size)


def _array(content: bytes) -> np.ndarray:
  """The array in an .npy file."""
  return np.lib.format.read_array(io.BytesIO(content), allow_pickle=False)


def _planes(array: np.ndarray, channels: int) -> list[Image.Image]:
  """The channels of what an .npy file holds, as images."""
  if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != channels:
    raise images.ImageError(f"it holds {array.dtype} {array.shape}; the network takes"
                            f" uint8 (height, width, {channels})")
  images.check_size(array.shape[1], array.shape[0])
  return [Image.fromarray(np.ascontiguousarray(array[..., i]))
          for i in range(channels)]
