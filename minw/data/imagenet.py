"""The original archives of ImageNet (ILSVRC 2012): their images, as TFDS keeps them."""

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

# Most images of a class and most bytes of an image or of the archive of a class that are
# accepted. The largest in ImageNet are 1,300 images, some 15 MB and some 300 MB.
_CLASS_IMAGES = 1300
_LARGEST_IMAGE, _LARGEST_CLASS = 2**26, 2**31


def check_source(source: str | os.PathLike | None, partial: bool) -> pathlib.Path:
  """The folder of the two archives, after a look at how complete they are.

  Args:
    source: the folder.
    partial: whether less than all classes and validation images will do.

  Raises:
    UsageError: it is not there, or an archive is missing, cut off or incomplete, or
      holds what it may not hold.
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
  """The files in one of the two archives; see `_each_once`."""
  largest, count = ((_LARGEST_CLASS, CLASSES) if name == TRAIN
                    else (_LARGEST_IMAGE, VALIDATION_IMAGES))
  return _each_once(archives.files(file, largest=largest, most=2 * count))


def _each_once(
    found: Iterator[tuple[str, int, int]]) -> Iterator[tuple[str, int, int]]:
  """`found` with names without folders, none of which may be there twice."""
  seen = set()
  for path, start, size in found:
    name = os.path.basename(path)
    if name in seen:
      raise tarfile.TarError(f"{text.printable(path)} is there twice")
    seen.add(name)
    yield name, start, size


def _unreadable(
    source: str | os.PathLike | None, name: str, error: Exception) -> errors.UsageError:
  return errors.UsageError(f"source={str(source)!r}: {name} can not be read ({error})")


def examples(
    folder: pathlib.Path, split: str, unreadable: list[str]
) -> Iterator[tuple[str, dict[str, Any]]]:
  """The records of a split, with their keys, in the order of the archive.

  Args:
    folder: of the archives.
    split: "train" or "validation".
    unreadable: receives the names of files that are no images; they are kept as they
      are, and found again in training.

  Raises:
    UsageError: the archive is damaged, holds other files, or none.
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
  """The name, class and content of each training image."""
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
  """The name, class and content of each validation image."""
  # By number, which the names of the files have.
  labels = datasets.tfds_file(
      "datasets/imagenet2012/validation_labels.txt").read_text().split()
  for name, start, size in _files(archive, VALIDATION):
    number = re.fullmatch(r"ILSVRC2012_val_(\d{8})\.JPEG", name, re.ASCII)
    if not number or not 1 <= int(number[1]) <= len(labels):
      raise tarfile.TarError(
          f"{text.printable(name)} is no validation image of ImageNet")
    yield name, labels[int(number[1]) - 1], _read(archive, start, size)


def _read(file: BinaryIO, start: int, size: int) -> bytes:
  file.seek(start)
  return file.read(size)


def as_jpeg(content: bytes) -> bytes:
  """The bytes of an image file, made RGB JPEG of quality 100 if they are another.

  In ImageNet one is PNG, and 22 are CMYK. Grayscale JPEG stays what it is.
  """
  with images.open_image(content) as image:
    if image.format == "JPEG" and image.mode in ("RGB", "L"):
      return content
    file = io.BytesIO()
    images.flatten(image, "RGB").save(file, "jpeg", quality=100)
    return file.getvalue()
