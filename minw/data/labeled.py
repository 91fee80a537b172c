"""Images with labels as a user has them: in folders, in a table, or in an .npz file."""

import contextlib
import csv
import json
import os
import pathlib
from typing import Any, Iterable, Iterator, NamedTuple, Sequence

import numpy as np

from minw import errors
from minw import text
from minw.data import image_files

# Splits by the names that folders and tables may give them.
SPLITS = {"train": "train", "validation": "validation", "val": "validation",
          "valid": "validation", "test": "test"}

_MOST_CLASSES = 2**16
_LONGEST_LABEL = 200  # Characters.
_LISTED = 20  # Largest number of known classes in an error message.


class Example(NamedTuple):
  """An image that has not been read, or an array, and its label.

  Attributes:
    name: Name of the image, which no other example has.
    label: Name of its class.
    split: "train", "validation" or "test"; None if the source does not say it.
    content: Path of the file, or uint8 (height, width) or (height, width, channels).
  """

  name: str
  label: str
  split: str | None
  content: pathlib.Path | np.ndarray


def find(source: pathlib.Path) -> list[Example]:
  """Lists the images of a source, without reading files of images.

  Args:
    source: A folder with a folder of images for each class, or with such folders in
      train/, validation/ and test/. Or a .csv file with the columns path, label and
      perhaps split. Or a .jsonl file whose lines are objects with such keys. Or an .npz
      file with the arrays images and labels, or such a pair of arrays for each split,
      as train_images.

  Raises:
    UsageError: The source is something else, or its classes are not usable.
  """
  read = _in_folders if source.is_dir() else _READERS.get(source.suffix.lower())
  if read is None or not (source.is_dir() or source.is_file()):
    raise errors.bad_value(
        "source", str(source), "a folder with a folder of images for each class, or a"
        " .csv, .jsonl or .npz file")
  with _named("source", source):
    examples = list(read(source))
    _check(examples)
  return examples


def find_known(
    folder: pathlib.Path, label_names: Sequence[str], split: str | None
) -> list[Example]:
  """Lists the images of a folder whose classes are known, without reading them.

  Args:
    folder: A folder with a folder of images for each class, or with such folders in
      train/, validation/ and test/.
    label_names: Names of the known classes.
    split: The split that is listed. If None, it is "test", or all images of a folder
      without splits.

  Raises:
    UsageError: The folder is something else, or has an unknown class.
  """
  errors.check(folder.is_dir(), "images", str(folder),
               "a folder with a folder of images for each class")
  with _named("images", folder):
    examples = list(_in_folders(folder))
    if not examples:
      raise _Refusal("has no folders of classes")
    if examples[0].split is None:
      if split is not None:
        raise _Refusal(f"has classes and no splits, such as {split}")
    else:
      split = split or "test"
      examples = [example for example in examples if example.split == split]
      if not examples:
        raise _Refusal(f"has no images for {split}")
    for label in sorted({example.label for example in examples}):
      if label_names.count(label) != 1:
        known = ", ".join(map(text.quoted, label_names[:_LISTED]))
        raise _Refusal(
            f"has the class {text.quoted(label)}, which is not one of the network's"
            f" classes: {known}{', ...' * (len(label_names) > _LISTED)}")
  return examples


class _Refusal(Exception):
  """What is wrong with a source, which the message does not name."""


@contextlib.contextmanager
def _named(flag: str, source: pathlib.Path) -> Iterator[None]:
  """Turns errors in this context into a UsageError that names the source."""
  try:
    yield
  except _Refusal as error:
    raise errors.UsageError(f"{flag}={str(source)!r}: {error}") from error
  except Exception as error:  # Files are not trusted, and folders may be unreadable.
    raise errors.UsageError(
        f"{flag}={str(source)!r}: cannot be read ({error})") from error


def class_names(examples: Iterable[Example]) -> tuple[str, ...]:
  """Returns the names of the classes in order: as numbers if all are numbers."""
  names = {example.label for example in examples}
  if all(name.isascii() and name.isdigit() for name in names):
    return tuple(sorted(names, key=lambda name: (int(name), name)))
  return tuple(sorted(names))


def _check(examples: list[Example]) -> None:
  """Checks what every source must have: usable classes, each with training images."""
  names = class_names(examples)
  if len(names) < 2:
    raise _Refusal(f"has {len(names)} classes and must have at least 2")
  if len(names) > _MOST_CLASSES:
    raise _Refusal(
        f"has {len(names):,} classes; {_MOST_CLASSES:,} are accepted")
  for name in names:
    if not (name and name.isprintable() and name == name.strip()
            and len(name) <= _LONGEST_LABEL):
      raise _Refusal(f"has a class named {text.quoted(name)}: must be a"
                     f" printable name of at most {_LONGEST_LABEL} characters")
  seen = set()
  for example in examples:
    if example.name in seen:
      raise _Refusal(f"lists {text.printable(example.name)} twice")
    seen.add(example.name)
  without = [example.name for example in examples if example.split is None]
  if without and len(without) < len(examples):
    raise _Refusal(f"names a split of some images and none of others,"
                   f" {text.printable(without[0])} for example")
  trained = {example.label for example in examples if example.split in (None, "train")}
  for example in examples:
    if example.label not in trained:
      raise _Refusal(f"has images of class {text.quoted(example.label)} in"
                     f" {example.split} and none in train")


def _in_folders(source: pathlib.Path) -> Iterator[Example]:
  """Yields the images in FOLDER/CLASS/* or FOLDER/SPLIT/CLASS/*."""
  names = _folders(source)
  splits = [name for name in names if name in SPLITS]
  if not splits:
    yield from _classes(source, source, names, None)
    return
  if "train" not in splits or len(splits) < len(names):
    raise _Refusal(
        f"has the folders {', '.join(map(text.quoted, names[:5]))}: must be"
        " classes, or splits: train, validation and test")
  if len({SPLITS[split] for split in splits}) < len(splits):
    raise _Refusal("has several folders of validation images")
  for split in splits:
    folder = source / split
    yield from _classes(source, folder, _folders(folder), SPLITS[split])


def _folders(folder: pathlib.Path) -> list[str]:
  """Returns the names of the folders in a folder, which must hold no other images."""
  names = []
  for path in sorted(folder.iterdir()):
    if path.name.startswith("."):
      continue
    if path.is_dir():
      names.append(path.name)
    elif path.suffix.lower() in image_files.SUFFIXES:
      raise _Refusal(f"holds {text.printable(path.name)} outside of the folders"
                     " of the classes")
  return names


def _classes(
    source: pathlib.Path, folder: pathlib.Path, names: list[str], split: str | None
) -> Iterator[Example]:
  """Yields the images in the folders of classes in `folder`."""
  for label in names:
    try:
      for path in image_files.find([folder / label]):
        yield Example(os.fspath(path.relative_to(source)), label, split, path)
    except errors.UsageError as error:
      where = text.quoted(os.fspath((folder / label).relative_to(source)))
      raise _Refusal(f"has no images in the folder {where}") from error


def _csv(source: pathlib.Path) -> Iterator[Example]:
  with open(source, newline="", encoding="utf-8-sig") as file:
    reader = csv.DictReader(file)
    for row in reader:
      yield _row(source, reader.line_num, row)


def _jsonl(source: pathlib.Path) -> Iterator[Example]:
  with open(source, encoding="utf-8-sig") as file:
    for number, line in enumerate(file, start=1):
      if line.strip():
        yield _row(source, number, json.loads(line))


def _row(source: pathlib.Path, line: int, row: Any) -> Example:
  """Returns the example of a line of a table; paths are relative to the table."""
  fields = row if isinstance(row, dict) else {}
  path, label, split = (fields.get(key) for key in ("path", "label", "split"))
  if type(label) is int:
    label = str(label)
  if not (isinstance(path, str) and path and isinstance(label, str) and label):
    raise _Refusal(f"line {line} has no path or no label")
  if split and split not in SPLITS:
    raise _Refusal(f"line {line} has split={text.quoted(split)}: must be one of"
                   f" {', '.join(SPLITS)}")
  if not (source.parent / path).is_file():
    raise _Refusal(
        f"line {line} names {text.printable(path)}, which is not a file")
  return Example(path, label, SPLITS[split] if split else None, source.parent / path)


def _npz(source: pathlib.Path) -> Iterator[Example]:
  with np.load(source, allow_pickle=False) as arrays:
    pairs: dict[str | None, tuple[str, str]] = {
        split: (f"{name}_images", f"{name}_labels") for name, split in SPLITS.items()
        if f"{name}_images" in arrays.files}
    for split, (images, labels) in (pairs or {None: ("images", "labels")}).items():
      for key in (images, labels):
        if key not in arrays.files:
          raise _Refusal(f"has no array {key!r}; it has"
                         f" {', '.join(arrays.files) or 'none'}")
      yield from _array_rows(split, images, arrays[images], arrays[labels])


def _array_rows(
    split: str | None, key: str, images: np.ndarray, labels: np.ndarray
) -> Iterator[Example]:
  """Yields the examples of a pair of arrays."""
  if labels.ndim == 2 and labels.shape[1] == 1:
    labels = labels[:, 0]
  if labels.ndim != 1 or labels.dtype.kind not in "iuU" or len(labels) != len(images):
    raise _Refusal(f"has {labels.dtype} labels of shape {labels.shape} for"
                   f" {len(images)} images: must be one integer or string each")
  if images.dtype != np.uint8 or images.ndim not in (3, 4) or (
      images.shape[3:] not in ((), (1,), (3,))) or 0 in images.shape:
    raise _Refusal(f"has {key} of {images.dtype} {images.shape}: must be uint8"
                   " (n, height, width), or that with 1 or 3 channels")
  for i, (image, label) in enumerate(zip(images, labels.tolist())):
    yield Example(f"{key}[{i}]", str(label), split, image)


_READERS = {".csv": _csv, ".jsonl": _jsonl, ".npz": _npz}
