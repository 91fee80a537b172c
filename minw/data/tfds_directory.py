"""Reads the description files of a TensorFlow Datasets directory.

The files are not trusted. They are read without TensorFlow Datasets itself, which takes
seconds to import.
"""

import json
import math
import os
import pathlib
import re
from typing import Any, Iterable, NamedTuple, TypeVar

from minw import paths

_Path = TypeVar("_Path", bound=paths.AnyPath)

# Names that a data set may have: those that TFDS accepts in the names of files.
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,63}")
_VERSION = re.compile(r"\d+\.\d+\.\d+")
# Largest description file that is read, in bytes.
_DESCRIPTION_BYTES = 2**24
# Keys under which such files name classes. Old versions of TFDS wrote the last one.
_CLASS_KEYS = ("pythonClassName", "python_class_name", "type")
# Largest number of classes that is accepted.
_MOST_CLASSES = 2**20
_FEATURES = "tensorflow_datasets.core.features."


class Contents(NamedTuple):
  """Content of a directory, by its description files.

  Attributes:
    image_key: Name of the feature that is the image.
    label_key: Name of the feature that is the class.
    image_shape: (height, width, channels). The first two are None where images differ
      in size.
    label_names: One name per class, in the order of the labels.
    sizes: Number of records of each split that the directory has.
    mean: Mean of each channel of the training images, of values in 0..1; None if the
      directory does not say it.
    std: Standard deviation of each channel, likewise.
  """

  image_key: str
  label_key: str
  image_shape: tuple[int | None, int | None, int]
  label_names: tuple[str, ...]
  sizes: dict[str, int]
  mean: tuple[float, ...] | None
  std: tuple[float, ...] | None


def is_name(name: str) -> bool:
  """Returns whether a data set may have this name: letters, digits and underscores."""
  return _NAME.fullmatch(name) is not None


def newest_version(
    name: str, data_dir: str | os.PathLike | None
) -> pathlib.Path | None:
  """Returns DATA_DIR/NAME/VERSION with the newest version, or None if there is none."""
  if not data_dir or not is_name(name):
    return None
  return newest(pathlib.Path(data_dir, name).glob("*"))


def newest(found: Iterable[_Path]) -> _Path | None:
  """Returns the path whose name is the newest version; None if none is a version."""
  return max((path for path in found if _VERSION.fullmatch(path.name)), default=None,
             key=lambda path: [int(n) for n in path.name.split(".")])


def names(data_dir: str | os.PathLike | None) -> list[str]:
  """Returns the names of the data sets that have a directory in `data_dir`."""
  try:
    found = sorted(os.listdir(data_dir)) if data_dir else []
  except OSError:
    return []
  return [name for name in found if newest_version(name, data_dir)]


def read_json(path: pathlib.Path) -> Any:
  """Reads a JSON file, which must be a regular file that is not too large.

  Raises:
    ValueError: It is not such a file, or is not JSON.
    OSError: It cannot be read.
  """
  return json.loads(_text(path))


def _text(path: pathlib.Path) -> str:
  if not path.is_file() or path.stat().st_size > _DESCRIPTION_BYTES:
    raise ValueError(
        f"{path.name} is not a file of at most {_DESCRIPTION_BYTES:,} bytes")
  return path.read_text()


def check_features(described: Any) -> None:
  """Raises ValueError where a class is not TFDS's own: TFDS would import its module."""
  if isinstance(described, dict):
    for key, value in described.items():
      if key in _CLASS_KEYS and isinstance(value, str) and not (
          re.fullmatch(re.escape(_FEATURES) + r"\w+\.\w+", value)):
        raise ValueError(f"it names {value!r}")
      check_features(value)
  elif isinstance(described, list):
    for value in described:
      check_features(value)


def sizes(directory: pathlib.Path) -> dict[str, int]:
  """Returns the number of records in each split of a directory.

  Raises:
    Exception: The description is missing or damaged, in any way.
  """
  described = read_json(directory / "dataset_info.json")
  return {split["name"]: sum(map(int, split["shardLengths"]))
          for split in described["splits"]}


def contents(directory: pathlib.Path) -> Contents:
  """Reads what a directory of images with one label each holds.

  Raises:
    Exception: The description is missing or damaged, in any way, or is that of other
      data.
  """
  described = read_json(directory / "features.json")
  check_features(described)
  features = described["featuresDict"]["features"]
  image_key = _only(features, "image_feature.Image")
  label_key = _only(features, "class_label_feature.ClassLabel")
  shape = _image_shape(features[image_key])
  count = int(features[label_key]["classLabel"]["numClasses"])
  if not 1 <= count <= _MOST_CLASSES:
    raise ValueError(f"it has {count} classes; 1 to {_MOST_CLASSES:,} are accepted")
  mean, std = _statistics(directory, shape[-1])
  return Contents(
      image_key, label_key, shape, _label_names(directory, label_key, count),
      sizes(directory), mean, std)


def _only(features: dict[str, Any], kind: str) -> str:
  """Returns the name of the only feature of a class of TFDS's."""
  found = [key for key, feature in features.items()
           if feature.get("pythonClassName") == _FEATURES + kind]
  if len(found) != 1:
    raise ValueError(f"it has {len(found)} features of the kind {kind.split('.')[1]} "
                     "and must have one")
  return found[0]


def _image_shape(feature: dict[str, Any]) -> tuple[int | None, int | None, int]:
  described = feature["image"]
  if described.get("dtype", "uint8") != "uint8":
    raise ValueError(f"its images are {described['dtype']} and must be uint8")
  height, width, channels = (
      int(size) for size in described["shape"]["dimensions"])
  if channels not in (1, 3):
    raise ValueError(f"its images have {channels} channels and must have 1 or 3")
  if height < 1 or width < 1:
    return None, None, channels
  return height, width, channels


def _label_names(
    directory: pathlib.Path, label_key: str, count: int
) -> tuple[str, ...]:
  """Returns the names of the classes, which are numbers where there are no names."""
  path = directory / f"{label_key}.labels.txt"
  names = _text(path).split("\n") if path.exists() else []
  names = [name for name in names if name]
  if not names:
    return tuple(map(str, range(count)))
  if len(names) != count:
    raise ValueError(f"{path.name} has {len(names)} names for {count} classes")
  return tuple(names)


def _statistics(directory: pathlib.Path, channels: int) -> tuple[Any, Any]:
  """Returns the mean and the deviation that `minw.prepare` noted, or None twice."""
  path = directory / "metadata.json"
  described = read_json(path) if path.exists() else {}
  if not isinstance(described, dict) or not {"mean", "std"} <= described.keys():
    return None, None
  mean, std = (tuple(map(float, described[key])) for key in ("mean", "std"))
  if len(mean) != channels or len(std) != channels or not all(
      0 <= m <= 1 and 0 < s <= 1 and math.isfinite(s) for m, s in zip(mean, std)):
    raise ValueError(f"{path.name} has mean={mean} and std={std} for {channels} "
                     "channels")
  return mean, std
