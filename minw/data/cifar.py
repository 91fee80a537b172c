"""The original files of CIFAR-10 and CIFAR-100: their records, verified.

Neither an archive nor a pickle is trusted: sizes are limited, and checksums must be
those of the original files.
"""

import gzip
import hashlib
import io
import pathlib
import posixpath
import stat
import tarfile
from typing import Any, BinaryIO, Callable, Iterator, NamedTuple, Sequence, cast
import zlib

import numpy as np
from PIL import Image

from minw import errors
from minw.data import archives
from minw.data import datasets
from minw.data import unpickle


class Original(NamedTuple):
  """The original files of a CIFAR data set.

  The binary and the Python version hold the same records in the same order, and one
  table describes both: a binary file is NAME.bin, a pickle of the Python version NAME.

  Attributes:
    url: Address of the archive of the binary version.
    size: Bytes of that archive.
    sha256: Its checksum.
    binary_folder: Name of the folder in it.
    python_folder: Name of the folder in the archive of the Python version.
    label_keys: Names of the labels, in the order of a record's label bytes.
    python_label_keys: Names of the same labels in the pickles.
    files: md5 of each binary file, by split and name.
    pickle_md5s: md5 of each pickle, by name.
  """

  url: str
  size: int
  sha256: str
  binary_folder: str
  python_folder: str
  label_keys: tuple[str, ...]
  python_label_keys: tuple[str, ...]
  files: dict[str, dict[str, str]]
  pickle_md5s: dict[str, str]


_COARSE_NAMES = """
    aquatic_mammals fish flowers food_containers fruit_and_vegetables
    household_electrical_devices household_furniture insects large_carnivores
    large_man-made_outdoor_things large_natural_outdoor_scenes
    large_omnivores_and_herbivores medium_mammals non-insect_invertebrates people
    reptiles small_mammals trees vehicles_1 vehicles_2
"""

ORIGINALS = {
    "cifar10": Original(
        url="https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
        size=170_052_171,
        sha256="c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
        binary_folder="cifar-10-batches-bin",
        python_folder="cifar-10-batches-py",
        label_keys=("label",),
        python_label_keys=("labels",),
        files={
            "train": {
                "data_batch_1": "5dd7e06a14cb22eb9f671a540d1b7c25",
                "data_batch_2": "5ea93a67294ea407fff1d09f752e9692",
                "data_batch_3": "942cd6a4bcdd0dd3c604fbe906cb4421",
                "data_batch_4": "ae636b3ba5c66a11e91e8cb52e771fcb",
                "data_batch_5": "53f37980c15c3d472c316c40844f3f0d",
            },
            "test": {"test_batch": "803d5f7f4d78ea53de84dbe85f74fb6d"},
        },
        pickle_md5s={
            "data_batch_1": "c99cafc152244af753f735de768cd75f",
            "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
            "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
            "data_batch_4": "634d18415352ddfa80567beed471001a",
            "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
            "test_batch": "40351d587109b95175f43aff81a1287e",
        },
    ),
    "cifar100": Original(
        url="https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",
        size=168_513_733,
        sha256="58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec",
        binary_folder="cifar-100-binary",
        python_folder="cifar-100-python",
        label_keys=("coarse_label", "label"),
        python_label_keys=("coarse_labels", "fine_labels"),
        files={
            "train": {"train": "6172c7755cfe09b2fe270c85cebc1b15"},
            "test": {"test": "4499cfba6c016c1be1438163640a0898"},
        },
        pickle_md5s={
            "train": "16019d7e3df5f24257cddd939b257f8d",
            "test": "f0ef6b0ae62326f3e7ffdfab6717acfc",
        },
    ),
}

_PIXELS = 3 * 32 * 32  # Bytes of an image: all red, all green, all blue.
# Largest size of a pickle without its pixels and labels: bytes for each image, whose
# file name it has, and in all. The original files have 32 bytes for each image.
_PICKLED_IMAGE, _PICKLED_FILE = 64, 4096
# Largest size of an archive without the files of images, and most entries in it.
_OTHER_FILES, _ENTRIES = 2**20, 100


def label_names(dataset: str) -> dict[str, Sequence[str]]:
  """Returns the class names of a CIFAR data set, by the name of its label."""
  names = {"label": datasets.info(dataset).label_names,
           "coarse_label": _COARSE_NAMES.split()}
  return {key: names[key] for key in ORIGINALS[dataset].label_keys}


def read_source(dataset: str, source: pathlib.Path) -> dict[str, np.ndarray]:
  """Reads and verifies the original files.

  Args:
    dataset: 'cifar10' or 'cifar100'.
    source: Archive or directory, in the binary or the Python version.

  Returns:
    The records of 'train' and 'test' as in the binary version: uint8,
    (n, label bytes + 3072).

  Raises:
    errors.UsageError: The source is not that of the data set, incomplete or damaged.
  """
  original, counts = ORIGINALS[dataset], _image_counts(dataset)
  layouts = [
      {name: f"{prefix}{name}{suffix}" for name in counts}
      for folder, suffix in ((original.binary_folder, ".bin"),
                             (original.python_folder, ""))
      for prefix in (f"{folder}/", "")
  ]
  limits = {path: counts[name] * (len(original.label_keys) + _PIXELS + _PICKLED_IMAGE)
                  + _PICKLED_FILE
            for paths in layouts for name, path in paths.items()}
  contents = _contents(source, limits)
  layout = max(layouts, key=lambda paths: len(contents.keys() & paths.values()))
  missing = [path for path in layout.values() if path not in contents]
  if len(missing) == len(counts):
    raise errors.bad_value(
        "source", str(source),
        f"the archive of {dataset}, binary or Python version, or the directory it was "
        f"extracted to: with {original.binary_folder}/ or {original.python_folder}/")
  if missing:
    raise errors.UsageError(f"source={str(source)!r}: lacks {', '.join(missing)}")

  rows = {}
  for split, md5s in original.files.items():
    parts = []
    for name, md5 in md5s.items():
      path = layout[name]
      try:
        part = _parse(original, path, contents[path], counts[name])
        _check_md5(part, md5, "its records have")
      except Exception as error:  # The file is not trusted.
        raise errors.UsageError(
            f"source={str(source)!r}: {path} is damaged or not the original "
            f"({error})") from error
      parts.append(part)
    rows[split] = np.concatenate(parts)
  return rows


def _image_counts(dataset: str) -> dict[str, int]:
  """Returns how many images each original file holds, by its name."""
  splits = datasets.info(dataset).splits
  images = {"train": splits["train"] + splits["validation"], "test": splits["test"]}
  return {name: images[split] // len(md5s)
          for split, md5s in ORIGINALS[dataset].files.items() for name in md5s}


def _contents(source: pathlib.Path, limits: dict[str, int]) -> dict[str, memoryview]:
  """Reads those files of a directory or tar archive that have limits.

  Args:
    source: The directory, or the archive, which gzip may have compressed.
    limits: Largest size of each file in bytes, by its path in the source.

  Raises:
    UsageError: The source cannot be read, or holds more than it may.
  """
  try:
    if source.is_dir():
      return {path: _read(source / path, limit)
              for path, limit in limits.items() if (source / path).is_file()}
    # The four layouts have the same files, and an archive has one layout.
    content = _read(source, sum(limits.values()) // 4 + _OTHER_FILES, _opened_archive)
    found = archives.files(
        io.BytesIO(content), largest=max(limits.values()), most=_ENTRIES)
    contents = {}
    for name, start, size in found:
      path = posixpath.normpath(name)
      if path in contents:
        raise tarfile.TarError(f"{path} is there twice")
      if path in limits:
        contents[path] = content[start:start + size]
    return contents
  except (OSError, EOFError, ValueError, tarfile.TarError, zlib.error) as error:
    raise errors.UsageError(
        f"source={str(source)!r}: cannot be read as a directory or tar archive "
        f"({error})") from error


def _read(
    path: pathlib.Path, limit: int, opened: Callable[[BinaryIO], BinaryIO] | None = None
) -> memoryview:
  """Reads a regular file of at most `limit` bytes, as `opened` opens it if given."""
  if not stat.S_ISREG(path.stat().st_mode):
    raise OSError(f"{path.name} is not a regular file")
  with open(path, "rb") as file:
    content = (opened(file) if opened else file).read(limit + 1)
  if len(content) > limit:
    raise OSError(f"{path.name} holds more than the {limit:,} bytes that it may have")
  return memoryview(content)


def _opened_archive(file: BinaryIO) -> BinaryIO:
  """Returns an archive that is decompressed as it is read, if gzip compressed it."""
  compressed = file.read(2) == b"\x1f\x8b"
  file.seek(0)
  return cast(BinaryIO, gzip.GzipFile(fileobj=file)) if compressed else file


def _check_md5(content: Any, md5: str, what: str) -> None:
  """Raises ValueError, which says `what` has another md5, if `content` has."""
  found = hashlib.md5(content).hexdigest()
  if found != md5:
    raise ValueError(f"{what} md5 {found} and not {md5}")


def _parse(
    original: Original, path: str, content: memoryview, count: int
) -> np.ndarray:
  """Returns the records in a file of either version.

  The bytes of a pickle must be those of the original file before it is read.

  Returns:
    uint8 (count, label bytes + 3072).
  """
  if path.endswith(".bin"):
    values = np.frombuffer(content, np.uint8)
    return values.reshape(count, len(original.label_keys) + _PIXELS)
  _check_md5(content, original.pickle_md5s[posixpath.basename(path)], "it has")
  pickled = unpickle.loads(bytes(content))
  labels = [np.array(pickled[key.encode()], np.uint8)
            for key in original.python_label_keys]
  return np.column_stack([*labels, pickled[b"data"].reshape(count, _PIXELS)])


def records(
    split: str, rows: np.ndarray, label_keys: tuple[str, ...]
) -> Iterator[tuple[int, dict[str, Any]]]:
  """Yields the keys and records of a split, as TFDS stores them.

  Args:
    split: 'train' or 'test'.
    rows: The split's records from `read_source`.
    label_keys: Names of the labels, in the order of their bytes.
  """
  for index, row in enumerate(rows):
    labels, pixels = np.split(row, [len(label_keys)])
    yield index, {
        "id": f"{split}_{index:05d}",
        "image": encode_png(pixels.reshape(3, 32, 32).transpose(1, 2, 0)),
        **dict(zip(label_keys, labels.tolist())),
    }


def encode_png(image: np.ndarray) -> bytes:
  """Encodes an image, uint8 (height, width, 3) or gray (height, width), as PNG."""
  file = io.BytesIO()
  Image.fromarray(image).save(file, "png")
  return file.getvalue()
