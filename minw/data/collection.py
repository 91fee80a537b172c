"""Makes a data set of a user's images: their size, splits, statistics, and a report.

Images are read twice: once to learn about all of them, before anything is written, and
once to write them. Therefore they need not fit into memory.
"""

import collections
import hashlib
import math
from typing import Any, Callable, Iterable, Iterator, NamedTuple, Sequence

import numpy as np
from PIL import Image
import tqdm

from minw import errors
from minw import text
from minw.data import cifar
from minw.data import image_files
from minw.data import images
from minw.data import labeled
from minw.data import statistics

SPLITS = ("train", "validation", "test")

_HELD_OUT = 10  # One image in so many validates, and one in so many tests.
_SIZES = 100  # Largest number of sizes in the report.
_NAMED = 5  # Largest number of damaged images that an error names.


class Collection(NamedTuple):
  """A data set that is ready to be written.

  Attributes:
    image_shape: (height, width, channels) of all images.
    label_names: One name per class, in the order of the labels.
    splits: The examples of "train", "validation" and "test".
    mean: Mean of each channel of the training images, of values in 0..1.
    std: Standard deviation of each channel, likewise.
    report: What was found, for JSON; see `collect`.
  """

  image_shape: tuple[int, int, int]
  label_names: tuple[str, ...]
  splits: dict[str, list[labeled.Example]]
  mean: tuple[float, ...]
  std: tuple[float, ...]
  report: dict[str, Any]


class _Seen(NamedTuple):
  """What is kept of an image that was read: a hash and the moments of its pixels."""

  digest: bytes
  moments: np.ndarray
  gray: bool


def collect(
    examples: Sequence[labeled.Example],
    *,
    image_size: tuple[int, int] | None = None,
    channels: int = 3,
    seed: int = 0,
    skip_damaged: bool = False,
    bars: bool = False,
) -> Collection:
  """Reads all images once, and decides on their size and splits.

  Images are turned upright, and scaled and cropped in the middle as `minw.infer` does.
  If the examples name no splits, a tenth of each class validates and a tenth tests. If
  they name no validation or no test split, that one is taken from the training images.
  Equal images of a class stay together.

  The report has these keys:

    images         number of images by split and class
    sizes          number of images by their size in the source, WIDTHxHEIGHT
    enlarged       how many are smaller than the size of the data set
    gray           whether all images are gray
    made_splits    the splits that the source did not have
    damaged        files that were left out, each with the reason
    duplicates     number of images whose pixels equal those of another one
    across_splits  such pairs whose images are in different splits

  Args:
    examples: The images; see `labeled.find`.
    image_size: (height, width) of the result; by default the commonest size.
    channels: 1 for gray or 3 for RGB.
    seed: Seed of the splits.
    skip_damaged: Whether images that cannot be read are left out.
    bars: Whether a bar shows the progress, where stderr is a terminal.

  Raises:
    UsageError: An image cannot be read, or a class has too few images.
  """
  damaged: dict[str, str] = {}
  sizes = _each(examples, _size, damaged, skip_damaged)
  height, width = image_size or _commonest(sizes.values())
  shape = (height, width, channels)
  readable = [example for example in examples if example.name in sizes]
  shown = tqdm.tqdm(
      readable, desc="images", unit=" images", disable=None if bars else True)
  seen = _each(shown, lambda example: _look(example, shape), damaged, skip_damaged)
  readable = [example for example in readable if example.name in seen]
  classes = labeled.class_names(examples)
  for label in sorted({*classes} - {example.label for example in readable}):
    raise errors.UsageError(f"class {text.quoted(label)} has only damaged images")
  splits, made = _split(readable, seen, seed)
  mean, std = statistics.mean_and_std(
      np.sum([seen[example.name].moments for example in splits["train"]], axis=0))
  found = [sizes[example.name] for example in readable]
  report = {
      "images": _counts(splits, classes),
      "sizes": {f"{w}x{h}": count for (h, w), count
                in collections.Counter(found).most_common(_SIZES)},
      "enlarged": sum(h < height or w < width for h, w in found),
      "gray": all(image.gray for image in seen.values()),
      "made_splits": made,
      "damaged": damaged,
      **_duplicates(splits, seen)}
  return Collection(shape, classes, splits, mean, std, report)


def records(
    collection: Collection, split: str
) -> Iterator[tuple[str, dict[str, Any]]]:
  """Yields the keys and records of a split, as TFDS stores them.

  Args:
    collection: The data set.
    split: "train", "validation" or "test".

  Raises:
    UsageError: A file has changed since it was read first.
  """
  for example in collection.splits[split]:
    name = text.printable(example.name)
    try:
      image = _read(example, collection.image_shape)
    except images.ImageError as error:
      raise errors.UsageError(f"{name} cannot be read any more ({error})") from error
    yield name, {"file_name": name, "label": example.label,
                 "image": cifar.encode_png(image[..., 0] if image.shape[-1] == 1
                                           else image)}


def _each(
    examples: Iterable[labeled.Example], function: Callable[[labeled.Example], Any],
    damaged: dict[str, str], skip_damaged: bool,
) -> dict[str, Any]:
  """Returns the results of a function by the name of the example.

  Args:
    examples: The examples.
    function: A function that raises ImageError for a damaged image.
    damaged: Receives the reason for each damaged image, by its name.
    skip_damaged: Whether damaged images are left out.

  Raises:
    UsageError: There are damaged images, and they are not left out.
  """
  results = {}
  for example in examples:
    try:
      results[example.name] = function(example)
    except images.ImageError as error:
      damaged[text.printable(example.name)] = str(error)
  if damaged and not (skip_damaged and results):
    some = "; ".join(f"{name}: {why}" for name, why in list(damaged.items())[:_NAMED])
    raise errors.UsageError(
        f"{len(damaged)} of {len(damaged) + len(results)} images cannot be used"
        f" ({some}); --skip_damaged leaves them out")
  return results


def _size(example: labeled.Example) -> tuple[int, int]:
  """Returns the height and width of an image that is turned upright."""
  if isinstance(example.content, np.ndarray):
    return example.content.shape[0], example.content.shape[1]
  return image_files.size(example.content)


def _commonest(sizes: Iterable[tuple[int, int]]) -> tuple[int, int]:
  """Returns the commonest size, and the largest one of several."""
  counts = collections.Counter(sizes)
  return max(counts, key=lambda size: (counts[size], math.prod(size), size))


def _read(example: labeled.Example, shape: tuple[int, int, int]) -> np.ndarray:
  """Returns the pixels of an example: uint8 of that shape."""
  if not isinstance(example.content, np.ndarray):
    return image_files.read(example.content, shape)
  image = np.squeeze(example.content, axis=tuple(
      axis for axis in (2,) if example.content.shape[2:] == (1,)))
  part = images.flatten(Image.fromarray(image), images.MODES[shape[-1]])
  return images.fit([part], *shape[:2])


def _look(example: labeled.Example, shape: tuple[int, int, int]) -> _Seen:
  """Reads an example and returns what is kept of it."""
  image = _read(example, shape)
  return _Seen(hashlib.sha256(image.tobytes()).digest(), statistics.moments(image),
               bool((image == image[..., :1]).all()))


def _split(
    examples: Sequence[labeled.Example], seen: dict[str, _Seen], seed: int
) -> tuple[dict[str, list[labeled.Example]], list[str]]:
  """Returns the examples of each split, and which splits were made.

  Within a class, the order of the hashes of pixels and seed is a random one that
  depends on nothing else, such as names and other classes.
  """
  given = {example.split for example in examples}
  made = [split for split in SPLITS[1:] if split not in given]
  splits = {split: [e for e in examples if e.split == split] for split in SPLITS}
  classes = collections.defaultdict(lambda: collections.defaultdict(list))
  for example in examples:
    if made and example.split in (None, "train"):
      digest = seen[example.name].digest
      order = hashlib.sha256(f"{seed}".encode() + digest).digest()
      classes[example.label][order].append(example)
  if made:
    splits["train"] = []
  for label, groups in classes.items():
    if len(groups) <= len(made):
      raise errors.UsageError(
          f"class {text.quoted(label)} has {len(groups)} different images, from which"
          f" train, {' and '.join(made)} cannot be made: at least {len(made) + 1} are"
          " needed")
    part = max(1, round(len(groups) / _HELD_OUT))
    for i, order in enumerate(sorted(groups)):
      name = made[i // part] if i < part * len(made) else "train"
      splits[name] += groups[order]
  return splits, made if None not in given else list(SPLITS)


def _counts(
    splits: dict[str, list[labeled.Example]], classes: Sequence[str]
) -> dict[str, dict[str, int]]:
  """Returns the number of images by split and class."""
  result = {}
  for split, examples in splits.items():
    counts = collections.Counter(example.label for example in examples)
    result[split] = {label: counts[label] for label in classes}
  return result


def _duplicates(
    splits: dict[str, list[labeled.Example]], seen: dict[str, _Seen]
) -> dict[str, Any]:
  """Returns the part of the report on images of equal pixels; see `collect`."""
  first: dict[bytes, tuple[str, str]] = {}
  across, count = [], 0
  for split, examples in splits.items():
    for example in examples:
      name = text.printable(example.name)
      other, where = first.setdefault(seen[example.name].digest, (name, split))
      count += other != name
      if where != split:
        across.append([other, name])
  return {"duplicates": count, "across_splits": across}
