"""Data sets on disk: their descriptions, and reading them into memory or by record.

The digits come with scikit-learn. All others are read from a TensorFlow Datasets
directory of array_record files, without TensorFlow: CIFAR, ImageNet, and any data set
of images with one label each. `python -m minw.prepare` writes such a directory. Nothing
here downloads anything.
"""

import contextlib
import functools
import importlib.util
import logging
import math
import os
import pathlib
import shlex
from typing import Any, Iterator, NamedTuple, Sequence

import numpy as np

from minw import errors
from minw import paths
from minw.data import mirror
from minw.data import statistics
from minw.data import tfds_directory

_log = logging.getLogger(__name__)


class Info(NamedTuple):
  """The description of a data set, known without reading it.

  Attributes:
    name: Name for `info` and `load`, and of the directory of the prepared data.
    image_shape: (height, width, channels). Images that differ in size, as those of
      ImageNet, are brought to this shape.
    label_names: One name per class, in the order of the labels.
    mean: Mean of each channel over the training images, of values in 0..1.
    std: Standard deviation of each channel, likewise.
    splits: Number of images in 'train', 'validation' and 'test'.
    varies: Whether images differ in size.
    streamed: Whether images are not held in memory, but are decoded when needed.
  """

  name: str
  image_shape: tuple[int, int, int]
  label_names: tuple[str, ...]
  mean: tuple[float, ...]
  std: tuple[float, ...]
  splits: dict[str, int]
  varies: bool = False
  streamed: bool = False

  @property
  def num_classes(self) -> int:
    """Number of classes."""
    return len(self.label_names)

  def resized(self, side: int) -> "Info":
    """Returns this with images brought to `side` x `side`, if they are streamed."""
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


def _parts(sizes: dict[str, int]) -> dict[str, tuple[str, int, int]]:
  """Returns the splits of a data set, given the sizes of those that TFDS has.

  A data set without test images is tested on its validation images, on which then
  nothing is chosen. What is missing is cut off the end of the training images, whose
  order is random: a tenth, or 10,000 images if that is less.
  """
  parts, end = {}, sizes["train"]
  tests = "test" if "test" in sizes else "validation"
  held_out = min(10_000, -(-end // 10))
  for split, kept_in in (("test", tests),
                         ("validation", "validation" if tests == "test" else "")):
    if kept_in in sizes:
      parts[split] = kept_in, 0, sizes[kept_in]
    else:
      parts[split] = "train", end - held_out, end
      end -= held_out
  return {"train": ("train", 0, end), "validation": parts["validation"],
          "test": parts["test"]}


def _split_sizes(sizes: dict[str, int]) -> dict[str, int]:
  """Returns the sizes of the splits of `_parts`."""
  return {split: stop - start for split, (_, start, stop) in _parts(sizes).items()}


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
        splits=_split_sizes({"train": 1_281_167, "validation": 50_000}),
        varies=True,
    ),
}

NAMES = tuple(_INFOS)

# Splits of TFDS that are not used, of those data sets that come with minw.
_IGNORED = {"imagenet2012": ("test",)}  # These images have no labels.

# Values of `info`'s argument of this name.
IN_MEMORY = ("auto", "true", "false")
# Largest data set, in bytes of pixels, that is held in memory by itself.
_LARGEST_IN_MEMORY = 2**31
# Side that images of different sizes are brought to, unless a config names another.
_SIDE = 256
# Largest number of training images that are measured where nothing says their mean.
_MEASURED = 10_000
# Number of records whose labels are counted at a time.
_COUNTED = 1_000


class _Layout(NamedTuple):
  """Where the examples of a data set are in its TFDS directory.

  Attributes:
    parts: TFDS's split, first record and end of 'train', 'validation' and 'test'.
    image_key: Name of the feature that is the image.
    label_key: Name of the feature that is the class.
  """

  parts: dict[str, tuple[str, int, int]]
  image_key: str = "image"
  label_key: str = "label"


def exists(name: str, data_dir: str | os.PathLike | None) -> bool:
  """Returns whether a data set comes with minw, or has a directory in `data_dir`."""
  return name in _INFOS or _newest_version(name, data_dir) is not None


def info(
    name: str, data_dir: str | os.PathLike | None = None, in_memory: str = "auto"
) -> Info:
  """Returns the description of a data set.

  Images are read only if neither minw nor the directory knows their mean and deviation.
  Those of at most 10,000 training images, evenly spaced, then stand for all.

  Args:
    name: 'digits', 'cifar10', 'cifar100' or 'imagenet2012', or the name of a data set
      in `data_dir`.
    data_dir: Directory of prepared data sets. If it holds a part of ImageNet, the
      splits have the sizes of that part. For gs://, it is what `mirror.place` returns.
    in_memory: Whether images are held in memory: "true", "false", or "auto" if they
      have one size and their pixels take at most 2 GiB.

  Raises:
    UsageError: There is no such data set, its description is damaged or that of other
      data, or it cannot be held in memory or streamed as `in_memory` says.
  """
  found = _described(name, data_dir)
  size = math.prod(found.image_shape) * sum(found.splits.values())
  small = not found.varies and size <= _LARGEST_IN_MEMORY
  errors.check(in_memory != "true" or not found.varies, "config.in_memory", in_memory,
               f"auto or false: the images of {name} differ in size")
  errors.check(in_memory != "false" or name != "digits", "config.in_memory", in_memory,
               "auto or true: the digits are in no file that could be streamed")
  room = available_memory() if in_memory == "true" else None
  errors.check(room is None or size <= room, "config.in_memory", in_memory,
               f"auto or false: the images of {name} take {size} bytes, and {room}"
               " bytes of memory are available")
  streamed = {"auto": not small, "true": False, "false": True}[in_memory]
  return found._replace(streamed=streamed)


def available_memory() -> int | None:
  """Returns how many bytes Linux can give to a process without swapping.

  A limit of the control group, as containers have it, counts too. None elsewhere.
  """
  try:
    lines = pathlib.Path("/proc/meminfo").read_text().splitlines()
    available = dict(line.split(":") for line in lines)["MemAvailable"]
    room = 1024 * int(available.split()[0])
  except (OSError, KeyError, ValueError):
    return None
  for limit in ("memory.max", "memory/memory.limit_in_bytes"):
    try:
      room = min(room, int(pathlib.Path("/sys/fs/cgroup", limit).read_text()))
    except (OSError, ValueError):
      pass  # There is no such limit.
  return room


def _described(name: str, data_dir: str | os.PathLike | None) -> Info:
  """Returns the description of a data set, whether it is streamed or not."""
  if name not in _INFOS:
    return _prepared_info(name, data_dir)
  found = _INFOS[name]
  if name == "imagenet2012":
    wordnet_ids = tfds_file("datasets/imagenet2012/labels.txt").read_text().split()
    found = found._replace(label_names=tuple(wordnet_ids))
    try:
      sizes = tfds_directory.sizes(_directory(name, data_dir))
      found = found._replace(
          splits=_split_sizes({part: sizes[part] for part in ("train", "validation")}))
    except Exception:  # The file is not trusted.
      pass  # `check_available` reports what is wrong.
  return found


def facts(found: Info) -> dict[str, Any] | None:
  """Returns what the networks that are trained on a data set depend on.

  Args:
    found: Description of the data set, from `info`.

  Returns:
    The shape of the images, the labels, the mean, the deviation and the sizes of the
    splits, as JSON has them. None for a data set that comes with minw: it is the same
    everywhere.
  """
  if found.name in _INFOS:
    return None
  return {"image_shape": list(found.image_shape), "labels": list(found.label_names),
          "mean": list(found.mean), "std": list(found.std), "splits": found.splits}


def _prepared_info(name: str, data_dir: str | os.PathLike | None) -> Info:
  """Returns the description of a data set that minw does not know by name."""
  contents = _contents(name, data_dir)
  height, width, channels = contents.image_shape
  splits = _split_sizes(contents.sizes)
  mean, std = contents.mean, contents.std
  if mean is None or std is None:
    directory = _directory(name, data_dir)
    changed = (directory / "dataset_info.json").stat().st_mtime_ns
    mean, std = _measured(name, data_dir if isinstance(data_dir, mirror.Mirror)
                          else str(directory.parent.parent), changed)
  shape = (height or _SIDE, width or _SIDE, channels)
  return Info(name, shape, contents.label_names, mean, std, splits,
              varies=height is None)


def _contents(
    name: str, data_dir: str | os.PathLike | None
) -> tfds_directory.Contents:
  """Returns what the directory of a data set says that it holds."""
  if not exists(name, data_dir):
    prepared = [] if isinstance(data_dir, mirror.Mirror) else tfds_directory.names(
        data_dir and _expanded(data_dir))
    raise errors.unknown_name("dataset", name, [*_INFOS, *prepared])
  directory = _directory(name, data_dir)
  try:
    found = tfds_directory.contents(directory)
    for split, (_, start, stop) in _parts(found.sizes).items():
      if start >= stop:
        raise ValueError(f"there are no images for {split}: it holds {found.sizes}")
  except Exception as error:  # The files are not trusted.
    raise _refusal(directory, f"its description cannot be read ({error})") from error
  return found


def _layout(name: str, data_dir: str | os.PathLike | None) -> _Layout:
  """Returns where the examples of a data set are in its TFDS directory."""
  if name not in _INFOS:
    contents = _contents(name, data_dir)
    return _Layout(_parts(contents.sizes), contents.image_key, contents.label_key)
  sizes = info(name, data_dir).splits
  train, whole = sizes["train"], sizes["train"] + sizes["validation"]
  tests = "validation" if name == "imagenet2012" else "test"
  return _Layout({"train": ("train", 0, train), "validation": ("train", train, whole),
                  "test": (tests, 0, sizes["test"])})


@functools.lru_cache(maxsize=16)
def _measured(
    name: str, data_dir: str | mirror.Mirror, changed: int
) -> tuple[tuple[float, ...], tuple[float, ...]]:
  """Returns the mean and deviation of training images; see `info`.

  Args:
    name: Name of the data set.
    data_dir: Directory of prepared data sets.
    changed: When the data set was written, so that no other result is remembered.
  """
  from minw.data import images as decoding

  channels = _contents(name, data_dir).image_shape[-1]
  records: Any = open_records(name, "train", data_dir)
  count = min(len(records), _MEASURED)
  total = np.zeros((3, channels), np.int64)
  with _reading(records):
    for i in range(count):
      with decoding.open_image(records[i * len(records) // count]["image"]) as opened:
        image = decoding.flatten(opened, decoding.MODES[channels])
      total += statistics.moments(
          np.asarray(image).reshape(image.height, image.width, channels))
  return statistics.mean_and_std(total)


def load(
    name: str, split: str, data_dir: str | os.PathLike | None
) -> tuple[np.ndarray, np.ndarray]:
  """Reads one split of a data set into memory.

  The digits are split by their index i: 'test' where i % 5 == 0, 'validation' where
  i % 10 == 1, and 'train' elsewhere. Their values 0..16 are scaled to 0..255 and
  rounded. All others are read in the order of TensorFlow Datasets, from the newest
  version that is there. Of CIFAR, 'validation' is the last 5,000 of the 50,000 training
  images.

  Args:
    name: Name of a data set that is not streamed; see `info`.
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
  wanted = info(name, data_dir)
  if split not in wanted.splits:
    raise errors.unknown_name("split", split, wanted.splits)
  if name == "digits":
    return _digits(split)
  from minw.data import images as decoding

  records: Any = open_records(name, split, data_dir)
  mode = decoding.MODES[wanted.image_shape[-1]]
  with _reading(records):
    encoded = records.__getitems__(range(len(records)))
    images = np.empty((len(records), *wanted.image_shape), np.uint8)
    # More threads would not help: Python takes most of the time of a small image.
    for image, record in zip(images, encoded):
      with decoding.open_image(record["image"]) as opened:
        if opened.size != image.shape[1::-1] or (
            opened.mode != mode and name in _INFOS):
          raise ValueError(f"an image has {opened.size} pixels of mode {opened.mode}")
        image[...] = np.asarray(decoding.flatten(opened, mode)).reshape(image.shape)
    labels = np.array([record["label"] for record in encoded], np.int32)
    if len(labels) and not 0 <= labels.min() <= labels.max() < wanted.num_classes:
      raise ValueError(_wrong_labels(labels, wanted))
  return images, labels


def class_counts(found: Info, data_dir: str | os.PathLike | None) -> np.ndarray:
  """Counts the training images of each class, without decoding them.

  Args:
    found: Description of the data set. The first `found.splits["train"]` images count.
    data_dir: Directory of prepared data sets.

  Returns:
    int64 (classes,).

  Raises:
    UsageError: See `load`.
  """
  size = found.splits["train"]
  if found.name == "digits":
    labels = _digits("train")[1][:size]
  else:
    records: Any = open_records(found.name, "train", data_dir)
    with _reading(records):
      labels = np.concatenate([
          [record["label"] for record in records.__getitems__(
              range(start, min(start + _COUNTED, size)))]
          for start in range(0, size, _COUNTED)])
      if not 0 <= labels.min() <= labels.max() < found.num_classes:
        raise ValueError(_wrong_labels(labels, found))
  return np.bincount(labels, minlength=found.num_classes)


def _wrong_labels(labels: np.ndarray, found: Info) -> str:
  return (f"it has labels from {labels.min()} to {labels.max()} of "
          f"{found.num_classes} classes")


def check_available(name: str, data_dir: str | os.PathLike | None) -> None:
  """Checks, within a second, that `load` or `open_records` will find the data.

  If the data are on gs://, this copies them first.

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
      with _reading(records):
        if size and records[0]["image"] is None:
          raise ValueError("the file was cut off")
  if name not in _INFOS:
    for split, (kept_in, start, stop) in _layout(name, data_dir).parts.items():
      if split != kept_in:
        _log.info("%s has no split named %s: records %d to %d of its split %s are used",
                  name, split, start, stop - 1, kept_in)


def prepare_command(name: str, data_dir: str | os.PathLike | None) -> str:
  """Returns the shell command that prepares the data set in `data_dir`."""
  remote = isinstance(data_dir, mirror.Mirror)
  where = shlex.quote(_expanded(data_dir)) if data_dir and not remote else "DIR"
  source = "" if name in _INFOS else " --source=FOLDER"
  command = f"python -m minw.prepare --dataset={name} --data_dir={where}{source}"
  return mirror.prepare_command(data_dir, name, command) if remote else command


@functools.cache  # The package reads them from a text, which takes long.
def _all_digits() -> tuple[np.ndarray, np.ndarray]:
  """Returns the images and the labels of all digits."""
  from sklearn import datasets as sklearn_datasets

  digits: Any = sklearn_datasets.load_digits()
  images = np.round(digits.images * 255 / 16).astype(np.uint8)
  return images[..., None], digits.target.astype(np.int32)


def _digits(split: str) -> tuple[np.ndarray, np.ndarray]:
  """Returns the images and labels of a split of the digits; see `load`."""
  images, labels = _all_digits()
  index = np.arange(len(labels))
  test = index % 5 == 0
  validation = index % 10 == 1
  chosen = {
      "train": ~(test | validation), "validation": validation, "test": test
  }[split]
  return images[chosen], labels[chosen]


def open_records(
    name: str, split: str, data_dir: str | os.PathLike | None
) -> Sequence[dict[str, Any]]:
  """Opens a split of a TFDS directory, whose records are then read one by one.

  Args:
    name: Name of any data set but 'digits'.
    split: 'train', 'validation' or 'test'. For ImageNet, 'validation' is the last
      10,000 of its training records, whose order is random, or the last tenth of a part
      of ImageNet. 'test' is its 50,000 validation records. Any other data set that
      lacks a split is divided in the same way.
    data_dir: Directory of prepared data sets.

  Returns:
    A sequence of {"image": bytes of a file, "label": int, ...}. Its attribute
    `dataset_info` is TFDS's.

  Raises:
    UsageError: There is no such data set, or its files are not there, or in another
      format.
  """
  layout = _layout(name, data_dir)
  directory = _directory(name, data_dir)

  import tensorflow_datasets as tfds

  kept_in, start, stop = layout.parts[split]
  expected = {}
  for part, _, end in layout.parts.values():
    expected[part] = max(end, expected.get(part, 0))
  try:
    tfds_directory.read_json(directory / "dataset_info.json")
    tfds_directory.check_features(
        tfds_directory.read_json(directory / "features.json"))
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
  ignored = _IGNORED.get(name, ()) if name in _INFOS else found.keys() - expected
  found = {key: count for key, count in found.items() if key not in ignored}
  if found != expected:
    raise _refusal(directory, f"it holds {found} records and must hold {expected}")
  if isinstance(data_dir, mirror.Mirror):
    mirror.fetch(data_dir, name, [
        os.path.basename(file) for file in builder.info.splits[kept_in].filepaths])
  with _named(builder.info, kept_in):
    for file in builder.info.splits[kept_in].filepaths:
      if os.path.exists(file) and not os.path.isfile(file):  # A pipe would not end.
        raise OSError(f"{file} is not a regular file")
    as_data_source: Any = builder.as_data_source  # TFDS declares no arguments.
    records = as_data_source(
        f"{kept_in}[{start}:{stop}]",
        decoders={layout.image_key: tfds.decode.SkipDecoding()},
        file_format="array_record",
    )
  if (layout.image_key, layout.label_key) == ("image", "label"):
    return records
  return _Renamed(records, layout)


class _Renamed(Sequence):
  """Records whose features of the image and the class have other names."""

  def __init__(self, records: Any, layout: _Layout):
    self._records, self._layout = records, layout
    self.dataset_info, self.split = records.dataset_info, records.split

  def __len__(self) -> int:
    return len(self._records)

  def __getitem__(self, index: Any) -> dict[str, Any]:
    return self._rename(self._records[index])

  def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
    return [self._rename(record) for record in self._records.__getitems__(indices)]

  def _rename(self, record: dict[str, Any]) -> dict[str, Any]:
    return {"image": record[self._layout.image_key],
            "label": record[self._layout.label_key]}


@contextlib.contextmanager
def _reading(records: Any) -> Iterator[None]:
  """Reports errors in this context as damage of the files of opened records."""
  with _named(records.dataset_info, records.split.partition("[")[0]):
    yield


@contextlib.contextmanager
def _named(tfds_info: Any, kept_in: str) -> Iterator[None]:
  """Reports errors in this context as damage of the files of a split of TFDS's."""
  try:
    yield
  except Exception as error:  # array_record, TFDS and Pillow have no common base.
    files = ", ".join(map(str, tfds_info.splits[kept_in].filepaths))
    raise _refusal(pathlib.Path(tfds_info.data_dir),
                   f"{files} cannot be read ({error})") from error


def _refusal(directory: pathlib.Path, what: str) -> errors.UsageError:
  """Returns the error for a `directory` (DATA_DIR/name/version) that is unusable."""
  name, data_dir = directory.parent.name, directory.parent.parent
  source = mirror.source_of(directory)
  if source is not None:
    return errors.UsageError(
        f"data_dir: {source}, of which {directory} is a copy, is unusable: {what};"
        f" delete it, prepare {name} again on one machine, and copy it there")
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
) -> pathlib.Path | None:
  """Returns the directory of the newest version of a data set, if there is one."""
  if isinstance(data_dir, mirror.Mirror):
    return mirror.newest_version(data_dir, name)
  return tfds_directory.newest_version(name, data_dir and _expanded(data_dir))


def _directory(name: str, data_dir: str | os.PathLike | None) -> pathlib.Path:
  """Returns the directory of the newest version of a data set below `data_dir`.

  Raises:
    UsageError: There is none.
  """
  found = _newest_version(name, data_dir)
  if found is None:
    raise errors.bad_value(
        "data_dir", data_dir and os.fspath(data_dir),
        f"a directory that holds {name}, which this command prepares: "
        + prepare_command(name, data_dir))
  return found
