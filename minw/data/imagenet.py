"""The original archives of ImageNet (ILSVRC 2012), read as the records of TFDS."""

import io
import os
import pathlib
import re
import tarfile
from typing import Any, BinaryIO, Iterator

from minw import errors
from minw import paths
from minw import text
from minw.data import archives
from minw.data import datasets
from minw.data import images

TRAIN, VALIDATION = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
CLASSES, VALIDATION_IMAGES = 1000, 50_000

# Most images of a class that are accepted, which ImageNet reaches.
_CLASS_IMAGES = 1300
# Largest image and largest archive of a class that are accepted, in bytes. The largest
# ones in ImageNet have about 15 MB and 300 MB.
_LARGEST_IMAGE, _LARGEST_CLASS = 2**26, 2**31


def check_source(source: str | os.PathLike | None, partial: bool) -> pathlib.Path:
  """Checks that the two archives are there and complete, and returns their folder.

  Args:
    source: Path of the folder.
    partial: Whether a part of the classes and validation images is enough.

  Raises:
    UsageError: The folder is not there, or an archive is missing, cut off, incomplete
      or holds something else.
  """
  folder = pathlib.Path(paths.expand(source or ""))
  errors.check(
      bool(source) and folder.is_dir(), "source", source and str(source),
      f"the folder that holds {TRAIN} and {VALIDATION}, from https://image-net.org")
  for name, wanted, what in ((TRAIN, CLASSES, "archives of a class"),
                             (VALIDATION, VALIDATION_IMAGES, "images")):
    path = folder / name
    errors.check(path.is_file(), "source", str(source), f"a folder that holds {name}")
    try:
      with open(path, "rb") as file:
        found = sum(1 for _ in _files(file, name))
    except (OSError, tarfile.TarError) as error:
      raise _unreadable(source, name, error) from error
    if not found or found != wanted and not partial:
      raise errors.UsageError(
          f"source={str(source)!r}: {name} holds {found:,} {what} and must hold"
          f" {wanted:,}" + "; --partial prepares what is there" * bool(found))
  return folder


def _files(file: BinaryIO, name: str) -> Iterator[tuple[str, int, int]]:
  """Yields the files in one of the two archives; see `_each_once`."""
  largest, count = ((_LARGEST_CLASS, CLASSES) if name == TRAIN
                    else (_LARGEST_IMAGE, VALIDATION_IMAGES))
  return _each_once(archives.files(file, largest=largest, most=2 * count))


def _each_once(
    found: Iterator[tuple[str, int, int]]) -> Iterator[tuple[str, int, int]]:
  """Yields what `found` does, with the names of folders removed from paths.

  Raises:
    tarfile.TarError: A name is there twice.
  """
  seen = set()
  for path, start, size in found:
    name = os.path.basename(path)
    if name in seen:
      raise tarfile.TarError(f"{text.printable(path)} is there twice")
    seen.add(name)
    yield name, start, size


def _unreadable(
    source: str | os.PathLike | None, name: str, error: Exception) -> errors.UsageError:
  """Returns the error for an archive that cannot be read."""
  return errors.UsageError(f"source={str(source)!r}: {name} cannot be read ({error})")


def examples(
    folder: pathlib.Path, split: str, unreadable: list[str]
) -> Iterator[tuple[str, dict[str, Any]]]:
  """Yields the keys and records of a split, in the order of the archive.

  Args:
    folder: Folder of the archives.
    split: "train" or "validation".
    unreadable: Receives the names of files that are no images. They are kept as they
      are, and training finds them again.

  Raises:
    UsageError: The archive is damaged, or holds other files or none.
  """
  path = folder / (TRAIN if split == "train" else VALIDATION)
  read = _train_images if split == "train" else _validation_images
  empty = True
  try:
    with open(path, "rb") as file:
      for name, label, content in read(file):
        empty = False
        try:
          content = as_jpeg(content)
        except Exception:  # Pillow has many kinds for damage.
          unreadable.append(name)
        yield name, {"file_name": name, "image": content, "label": label}
    if empty:
      raise tarfile.TarError("it holds no images")
  except (OSError, tarfile.TarError) as error:
    raise _unreadable(folder, path.name, error) from error


def _train_images(archive: BinaryIO) -> Iterator[tuple[str, str, bytes]]:
  """Yields the name, class and content of each training image."""
  known = {*datasets.info("imagenet2012").label_names}
  for name, start, size in _files(archive, TRAIN):
    label, suffix = os.path.splitext(name)
    if suffix != ".tar" or label not in known:
      raise tarfile.TarError(
          f"{text.printable(name)} is no archive of a class of ImageNet")
    found = archives.files(
        archive, largest=_LARGEST_IMAGE, most=2 * _CLASS_IMAGES, start=start, size=size)
    try:
      for image, start, size in _each_once(found):
        if not re.fullmatch(label + r"_[!-~]+\.JPEG", image):
          raise tarfile.TarError(
              f"{text.printable(image)} is no image of this class")
        yield image, label, _read(archive, start, size)
    except tarfile.TarError as error:
      raise tarfile.TarError(f"{name}: {error}") from error


def _validation_images(archive: BinaryIO) -> Iterator[tuple[str, str, bytes]]:
  """Yields the name, class and content of each validation image."""
  # The labels are listed by the number that the name of a file has.
  labels = datasets.tfds_file(
      "datasets/imagenet2012/validation_labels.txt").read_text().split()
  for name, start, size in _files(archive, VALIDATION):
    number = re.fullmatch(r"ILSVRC2012_val_(\d{8})\.JPEG", name, re.ASCII)
    if not number or not 1 <= int(number[1]) <= len(labels):
      raise tarfile.TarError(
          f"{text.printable(name)} is no validation image of ImageNet")
    yield name, labels[int(number[1]) - 1], _read(archive, start, size)


def _read(file: BinaryIO, start: int, size: int) -> bytes:
  """Reads `size` bytes from the position `start`."""
  file.seek(start)
  return file.read(size)


def as_jpeg(content: bytes) -> bytes:
  """Returns the bytes of an image file, converted to an RGB JPEG where necessary.

  Gray and RGB JPEG files are returned as they are. In ImageNet one image is a PNG and
  22 are CMYK; they become JPEG files of quality 100.
  """
  with images.open_image(content) as image:
    if image.format == "JPEG" and image.mode in ("RGB", "L"):
      return content
    file = io.BytesIO()
    images.flatten(image, "RGB").save(file, "jpeg", quality=100)
    return file.getvalue()
