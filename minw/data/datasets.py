"""Data sets on disk: their descriptions, and reading them into memory or by record.

The digits come with scikit-learn. CIFAR and ImageNet are read from a TensorFlow
Datasets directory of array_record files, without TensorFlow. `python -m minw.prepare`
writes such a directory. Nothing here downloads anything.
"""

import contextlib
import importlib.util
import json
import os
import pathlib
import re
import shlex
from typing import Any, Iterator, NamedTuple, Sequence

import numpy as np

from minw import errors
from minw import paths


class Info(NamedTuple):
  """The description of a data set, known without reading it.

  Attributes:
    name: Name for `info` and `load`, and of the directory of the prepared data.
    image_shape: (height, width, channels). ImageNet's images differ in size and are
      brought to this shape.
    label_names: One name per class, in the order of the labels.
    mean: Mean of each channel over the training images, of values in 0..1.
    std: Standard deviation of each channel, likewise.
    splits: Number of images in 'train', 'validation' and 'test'.
    streamed: Whether the data set is too large for memory. `open_records` reads it
      then, and `load` does not.
  """

  name: str
  image_shape: tuple[int, int, int]
  label_names: tuple[str, ...]
  mean: tuple[float, ...]
  std: tuple[float, ...]
  splits: dict[str, int]
  streamed: bool = False

  @property
  def num_classes(self) -> int:
    """Number of classes."""
    return len(self.label_names)

  def resized(self, side: int) -> "Info":
    """Returns this with images brought to `side` x `side`, if their sizes differ."""
    if not self.streamed:
      return self
    return self._replace(image_shape=(side, side, self.image_shape[-1]))

  def provides(self, image_shape: tuple[int, int, int]) -> bool:
    """Returns whether the images have this shape, or can be brought to it."""
    if self.streamed:
      return image_shape[-1] == self.image_shape[-1]
    return image_shape == self.image_shape


_CIFAR10_NAMES = """
    airplane automobile bird cat deer dog frog horse ship truck
"""

_CIFAR100_NAMES = """
    apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy
    bridge bus butterfly camel can castle caterpillar cattle chair chimpanzee
    clock cloud cockroach couch crab crocodile cup dinosaur dolphin elephant
    flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower
    leopard lion lizard lobster man maple_tree motorcycle mountain mouse mushroom
    oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate
    poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark
    shrew skunk skyscraper snail snake spider squirrel streetcar sunflower
    sweet_pepper table tank telephone television tiger tractor train trout tulip
    turtle wardrobe whale willow_tree wolf woman worm
"""


def tfds_file(name: str) -> pathlib.Path:
  """Returns the path of a file of TFDS, without importing it, which takes seconds."""
  spec = importlib.util.find_spec("tensorflow_datasets")
  assert spec is not None and spec.origin is not None
  return pathlib.Path(spec.origin).parent / name


def _imagenet_splits(train: int, validation: int) -> dict[str, int]:
  """Returns the sizes of the splits, given those of ImageNet's two parts.

  ImageNet's own validation images are the test split, on which nothing is chosen.
  """
  held_out = min(10_000, -(-train // 10))  # A part of ImageNet gives up a tenth.
  return {"train": train - held_out, "validation": held_out, "test": validation}


# The means and deviations of CIFAR are those in common use, which cover all 50,000
# training images. Those of the 45,000 that train here differ by less than 0.0005.
_INFOS = {
    "digits": Info(
        name="digits",
        image_shape=(8, 8, 1),
        label_names=tuple("0123456789"),
        mean=(0.3055,),
        std=(0.3761,),
        splits={"train": 1257, "validation": 180, "test": 360},
    ),
    "cifar10": Info(
        name="cifar10",
        image_shape=(32, 32, 3),
        label_names=tuple(_CIFAR10_NAMES.split()),
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2470, 0.2435, 0.2616),
        splits={"train": 45_000, "validation": 5_000, "test": 10_000},
    ),
    "cifar100": Info(
        name="cifar100",
        image_shape=(32, 32, 3),
        label_names=tuple(_CIFAR100_NAMES.split()),
        mean=(0.5071, 0.4865, 0.4409),
        std=(0.2673, 0.2564, 0.2762),
        splits={"train": 45_000, "validation": 5_000, "test": 10_000},
    ),
    "imagenet2012": Info(
        name="imagenet2012",
        image_shape=(256, 256, 3),
        label_names=(),  # `info` reads them.
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        splits=_imagenet_splits(train=1_281_167, validation=50_000),
        streamed=True,
    ),
}

NAMES = tuple(_INFOS)

# Largest JSON file of a prepared data set that is read, in bytes.
_DESCRIPTION_BYTES = 2**24
# Keys under which such files name classes. Old versions of TFDS wrote the last one.
_CLASS_KEYS = ("pythonClassName", "python_class_name", "type")


def info(name: str, data_dir: str | os.PathLike | None = None) -> Info:
  """Returns the description of a data set, without reading its images.

  Args:
    name: 'digits', 'cifar10', 'cifar100' or 'imagenet2012'.
    data_dir: Directory of prepared data sets. If it holds a part of ImageNet, the
      splits have the sizes of that part.

  Raises:
    UsageError: There is no such data set.
  """
  if name not in _INFOS:
    raise errors.unknown_name("dataset", name, _INFOS)
  found = _INFOS[name]
  if found.streamed:
    wordnet_ids = tfds_file("datasets/imagenet2012/labels.txt").read_text().split()
    found = found._replace(label_names=tuple(wordnet_ids))
    try:
      described = _description(_newest_version(name, data_dir) / "dataset_info.json")
      sizes = {split["name"]: sum(map(int, split["shardLengths"]))
               for split in described["splits"]}
      found = found._replace(
          splits=_imagenet_splits(sizes["train"], sizes["validation"]))
    except Exception:  # The file is not trusted.
      pass  # `check_available` reports what is wrong.
  return found


def load(
    name: str, split: str, data_dir: str | os.PathLike | None
) -> tuple[np.ndarray, np.ndarray]:
  """Reads one split of a data set into memory.

  The digits are split by their index i: 'test' where i % 5 == 0, 'validation' where
  i % 10 == 1, and 'train' elsewhere. Their values 0..16 are scaled to 0..255 and
  rounded. CIFAR is read in the order of TensorFlow Datasets, from the newest version
  that is there; 'validation' is the last 5,000 of the 50,000 training images.

  Args:
    name: 'digits', 'cifar10' or 'cifar100'.
    split: 'train', 'validation' or 'test'.
    data_dir: Directory of prepared data sets, with `~` for the home directory. The
      digits do not need it.

  Returns:
    images: uint8, (n, height, width, channels), 0..255.
    labels: int32, (n,).

  Raises:
    UsageError: There is no such data set or split, or its files are not there,
      damaged, or in another format.
  """
  wanted = info(name)
  if split not in wanted.splits:
    raise errors.unknown_name("split", split, wanted.splits)
  if name == "digits":
    return _digits(split)
  from minw.data import images as decoding

  records: Any = open_records(name, split, data_dir)
  with _reading(records.dataset_info, name, split):
    encoded = records.__getitems__(range(len(records)))
    images = np.empty((len(records), *wanted.image_shape), np.uint8)
    # More threads would not help: Python takes most of the time of a small image.
    for image, record in zip(images, encoded):
      with decoding.open_image(record["image"]) as opened:
        if opened.size != image.shape[1::-1] or opened.mode != "RGB":
          raise ValueError(f"an image has {opened.size} pixels of mode {opened.mode}")
        image[...] = np.asarray(opened)
    labels = np.array([record["label"] for record in encoded], np.int32)
  return images, labels


def check_available(name: str, data_dir: str | os.PathLike | None) -> None:
  """Checks, within a second, that `load` or `open_records` will find the data.

  Args:
    name: Name of the data set.
    data_dir: Directory of prepared data sets.

  Raises:
    UsageError: There is no such data set, or its files are not there, in another
      format, or do not open. `load` finds damage further inside a file.
  """
  splits = info(name, data_dir).splits
  if name != "digits":
    for split, size in splits.items():
      records: Any = open_records(name, split, data_dir)
      with _reading(records.dataset_info, name, split):
        if size and records[0]["image"] is None:
          raise ValueError("the file was cut off")


def prepare_command(name: str, data_dir: str | os.PathLike | None) -> str:
  """Returns the shell command that prepares the data set in `data_dir`."""
  where = shlex.quote(_expanded(data_dir)) if data_dir else "DIR"
  return f"python -m minw.prepare --dataset={name} --data_dir={where}"


def _digits(split: str) -> tuple[np.ndarray, np.ndarray]:
  """Returns the images and labels of a split of the digits; see `load`."""
  from sklearn import datasets as sklearn_datasets

  digits: Any = sklearn_datasets.load_digits()
  index = np.arange(len(digits.target))
  test = index % 5 == 0
  validation = index % 10 == 1
  chosen = {
      "train": ~(test | validation), "validation": validation, "test": test
  }[split]
  images = np.round(digits.images[chosen] * 255 / 16).astype(np.uint8)
  return images[..., None], digits.target[chosen].astype(np.int32)


def open_records(
    name: str, split: str, data_dir: str | os.PathLike | None
) -> Sequence[dict[str, Any]]:
  """Opens a split of a TFDS directory, whose records are then read one by one.

  Args:
    name: Name of any data set but 'digits'.
    split: 'train', 'validation' or 'test'. For ImageNet, 'validation' is the last
      10,000 of its training records, whose order is random, or the last tenth of a part
      of ImageNet. 'test' is its 50,000 validation records.
    data_dir: Directory of prepared data sets.

  Returns:
    A sequence of {"image": bytes of a file, "label": int, ...}.

  Raises:
    UsageError: There is no such data set, or its files are not there, or in another
      format.
  """
  directory = _newest_version(name, data_dir)

  import tensorflow_datasets as tfds

  wanted, tests = info(name, data_dir), _kept_in(name, "test")
  sizes = wanted.splits
  expected = {"train": sizes["train"] + sizes["validation"], tests: sizes["test"]}
  part = {
      "train": f"train[:{sizes['train']}]",
      "validation": f"train[{sizes['train']}:]",
      "test": tests,
  }[split]

  try:
    _description(directory / "dataset_info.json")
    _check_features(_description(directory / "features.json"))
    builder = tfds.builder_from_directory(directory)
    found = {key: value.num_examples for key, value in builder.info.splits.items()}
    formats = {format_.value for format_ in builder.info.available_file_formats()}
  except Exception as error:  # Errors of TFDS, JSON and protobuf have no common base.
    raise _refusal(directory, f"its description cannot be read ({error})") from error
  if "array_record" not in formats:
    raise _refusal(
        directory,
        f"its files are {' and '.join(sorted(formats))}, which TensorFlow would have "
        "to read, and must be array_record")
  if wanted.streamed:
    found.pop("test", None)  # ImageNet's own test split has no labels.
  if found != expected:
    raise _refusal(directory, f"it holds {found} records and must hold {expected}")
  with _reading(builder.info, name, split):
    for file in builder.info.splits[_kept_in(name, split)].filepaths:
      if os.path.exists(file) and not os.path.isfile(file):  # A pipe would not end.
        raise OSError(f"{file} is not a regular file")
    as_data_source: Any = builder.as_data_source  # TFDS declares no arguments.
    return as_data_source(
        part,
        decoders={"image": tfds.decode.SkipDecoding()},
        file_format="array_record",
    )


def _description(path: pathlib.Path) -> Any:
  """Reads a JSON file, which must be a regular file that is not too large."""
  if not path.is_file() or path.stat().st_size > _DESCRIPTION_BYTES:
    raise ValueError(
        f"{path.name} is not a file of at most {_DESCRIPTION_BYTES:,} bytes")
  return json.loads(path.read_text())


def _check_features(described: Any) -> None:
  """Raises ValueError where a class is not TFDS's own: TFDS would import its module."""
  if isinstance(described, dict):
    for key, value in described.items():
      if key in _CLASS_KEYS and isinstance(value, str) and not (
          re.fullmatch(r"tensorflow_datasets\.core\.features\.\w+\.\w+", value)):
        raise ValueError(f"it names {value!r}")
      _check_features(value)
  elif isinstance(described, list):
    for value in described:
      _check_features(value)


def _kept_in(name: str, split: str) -> str:
  """Returns TFDS's name of the split that holds `split`, as a whole or as a part."""
  if split == "test":
    return "validation" if info(name).streamed else "test"
  return "train"


@contextlib.contextmanager
def _reading(tfds_info: Any, name: str, split: str) -> Iterator[None]:
  """Reports errors in this context as damage of the files of a split."""
  try:
    yield
  except Exception as error:  # array_record, TFDS and Pillow have no common base.
    files = ", ".join(map(str, tfds_info.splits[_kept_in(name, split)].filepaths))
    raise _refusal(pathlib.Path(tfds_info.data_dir),
                   f"{files} cannot be read ({error})") from error


def _refusal(directory: pathlib.Path, what: str) -> errors.UsageError:
  """Returns the error for a `directory` (DATA_DIR/name/version) that is unusable."""
  name, data_dir = directory.parent.name, directory.parent.parent
  return errors.UsageError(
      f"data_dir={str(data_dir)!r}: {directory} is unusable: {what}; delete it, or "
      f"choose another data_dir, and run: {prepare_command(name, data_dir)}")


def _expanded(data_dir: str | os.PathLike) -> str:
  """Returns `data_dir` with `~` expanded."""
  try:
    return paths.expand(data_dir)
  except ValueError as error:
    raise errors.UsageError(f"data_dir={os.fspath(data_dir)!r}: {error}") from error


def _newest_version(
    name: str, data_dir: str | os.PathLike | None
) -> pathlib.Path:
  """Returns the directory of the newest version of a data set below `data_dir`."""
  versions = []
  if data_dir:
    for path in pathlib.Path(_expanded(data_dir), name).glob("*"):
      if re.fullmatch(r"\d+\.\d+\.\d+", path.name):
        versions.append(path)
  if not versions:
    raise errors.bad_value(
        "data_dir", data_dir and os.fspath(data_dir),
        f"a directory that holds {name}, which this command prepares: "
        + prepare_command(name, data_dir))
  return max(versions, key=lambda path: [int(n) for n in path.name.split(".")])
