"""The original archives of ImageNet (ILSVRC 2012): their images, as TFDS keeps them."""

import io
import os
import pathlib
import re
import tarfile
from typing import Any, Iterator

from minw import cli
from minw import datasets
from minw import images
from minw import paths

TRAIN, VALIDATION = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
CLASSES, VALIDATION_IMAGES = 1000, 50_000


def check_source(source: str | os.PathLike | None, partial: bool) -> pathlib.Path:
  """The folder of the two archives, after a look at how complete they are.

  Args:
    source: the folder.
    partial: whether less than all classes and validation images will do.

  Raises:
    UsageError: it is not there, or an archive is missing, cut off or incomplete.
  """
  folder = pathlib.Path(paths.expand(source or ""))
  cli.check(
      bool(source) and folder.is_dir(), "source", source and str(source),
      f"the folder that holds {TRAIN} and {VALIDATION}, from https://image-net.org")
  for name, wanted, what in ((TRAIN, CLASSES, "archives of a class"),
                             (VALIDATION, VALIDATION_IMAGES, "images")):
    path = folder / name
    cli.check(path.is_file(), "source", str(source), f"a folder that holds {name}")
    try:
      with tarfile.open(path) as archive:
        members = [member for member in archive if member.isfile()]
    except (OSError, EOFError, tarfile.TarError) as error:
      raise cli.UsageError(f"source={str(source)!r}: {name} can not be read ({error})"
                           ) from error
    found = len(members)
    end = members[-1].offset_data + members[-1].size if members else 1
    if end > path.stat().st_size:
      raise cli.UsageError(f"source={str(source)!r}: {name} is cut off: it has"
                           f" {path.stat().st_size:,} bytes of {end:,} or more")
    if found != wanted and not partial:
      raise cli.UsageError(
          f"source={str(source)!r}: {name} holds {found:,} {what} and must hold"
          f" {wanted:,}; --partial prepares what is there")
  return folder


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
    UsageError: the archive is damaged, or holds other files.
  """
  path = folder / (TRAIN if split == "train" else VALIDATION)
  files = _train_files if split == "train" else _validation_files
  try:
    with tarfile.open(path) as archive:
      for name, label, content in files(archive):
        try:
          content = as_jpeg(content)
        except Exception:  # Pillow has many kinds for damage.
          unreadable.append(name)
        yield name, {"file_name": name, "image": content, "label": label}
  except (OSError, EOFError, tarfile.TarError) as error:
    raise cli.UsageError(
        f"source={str(folder)!r}: {path.name} can not be read ({error})") from error


def _train_files(archive):
  known = {*datasets.info("imagenet2012").label_names}
  for member in archive:
    label, suffix = os.path.splitext(os.path.basename(member.name))
    if not member.isfile():
      continue
    if suffix != ".tar" or label not in known:
      raise tarfile.TarError(f"{member.name} is no archive of a class of ImageNet")
    with tarfile.open(fileobj=archive.extractfile(member)) as images_of_class:
      for image in images_of_class:
        if image.isfile():
          content = images_of_class.extractfile(image).read()
          yield os.path.basename(image.name), label, content


def _validation_files(archive):
  # By number, which the names of the files have.
  labels = datasets.tfds_file(
      "datasets/imagenet2012/validation_labels.txt").read_text().split()
  for member in archive:
    if member.isfile():
      name = os.path.basename(member.name)
      number = re.fullmatch(r"ILSVRC2012_val_(\d{8})\.JPEG", name)
      if not number or not 1 <= int(number[1]) <= len(labels):
        raise tarfile.TarError(f"{member.name} is no validation image of ImageNet")
      yield name, labels[int(number[1]) - 1], archive.extractfile(member).read()


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
