"""Prepare a data set for training: download it, verify it and convert it.

  python -m minw.prepare --dataset=cifar10 --data_dir=DIR [--source=PATH]
  python -m minw.prepare --dataset=imagenet2012 --data_dir=DIR --source=DIR_WITH_TARS
  python -m minw.prepare --dataset=NAME --data_dir=DIR --source=IMAGES

With --source, nothing is downloaded. IMAGES are your own: a folder with a folder for
each class, a .csv or .jsonl file of paths and labels, or an .npz file. The result is a
TensorFlow Datasets directory of array_record files, with the records, keys and order
that TFDS itself would write. TensorFlow is not needed.
"""

import contextlib
import fcntl
import functools
import logging
import math
import os
import pathlib
import posixpath
import re
import shlex
import shutil
from typing import Any, Callable, Iterator

from absl import flags

from minw import cli
from minw import errors
from minw import files
from minw import paths
from minw import text
from minw.data import cifar
from minw.data import collection
from minw.data import datasets
from minw.data import download
from minw.data import imagenet
from minw.data import labeled
from minw.data import tfds_directory
from minw.data import tfds_writer

_log = logging.getLogger(__name__)

_BUILT = "tfds"  # Folder in the work directory that a data set is written to.
_NAMED = 10  # Largest number of files of a kind that are printed.
# Smallest side for which folder_convnet is proposed instead of digits_convnet.
_FOLDER_SIDE = 16
# Flags that only the user's own images have, and that they do not have, with defaults.
_OWN_FLAGS = {"image_size": None, "grayscale": False, "seed": 0, "skip_damaged": False}
_OTHER_FLAGS = {"partial": False}


def prepare(
    dataset: str,
    data_dir: str | os.PathLike,
    source: str | os.PathLike | None = None,
    partial: bool = False,
) -> pathlib.Path:
  """Prepares `dataset` in `data_dir`, unless it is there already.

  The result appears whole or not at all: it is made in a work directory beside its
  place and then renamed. After an interruption, the next call resumes the download and
  makes the rest anew.

  Args:
    dataset: 'cifar10', 'cifar100' or 'imagenet2012'.
    data_dir: Directory of prepared data sets, with `~` for the home directory. It is
      made where needed.
    source: Original archive, or the directory it was extracted to, in the binary or the
      Python version. It is only read. By default the archive of the binary version is
      downloaded. For ImageNet, which cannot be downloaded without an account, this is
      the folder of its archives.
    partial: Whether archives with a part of ImageNet are enough.

  Returns:
    The directory DATA_DIR/DATASET/VERSION, which was written or found.

  Raises:
    UsageError: There is no such data set, the source is not what it must be, the
      download failed, or `data_dir` cannot be written or has too little space.
  """
  if dataset not in datasets.NAMES:
    raise errors.unknown_name("dataset", dataset, datasets.NAMES)
  if dataset not in tfds_writer.NAMES:
    raise errors.bad_value(
        "dataset", dataset,
        f"one of {', '.join(tfds_writer.NAMES)}; {dataset} needs no preparation")
  build = _build_cifar
  if dataset == "imagenet2012":
    build = functools.partial(_build_imagenet, partial=partial)
  return _prepare(dataset, tfds_writer.version(dataset), data_dir,
                  lambda work: build(dataset, source, work))


def prepare_images(
    dataset: str,
    data_dir: str | os.PathLike,
    source: str | os.PathLike,
    *,
    image_size: tuple[int, int] | None = None,
    grayscale: bool = False,
    seed: int = 0,
    skip_damaged: bool = False,
) -> pathlib.Path:
  """Prepares a data set of your own images, unless it is there already.

  Args:
    dataset: A new name: letters, digits and underscores.
    data_dir: See `prepare`.
    source: The images; see `labeled.find`. They are only read.
    image_size: (height, width) that images are brought to; the commonest one if None.
    grayscale: Whether images are stored in gray instead of RGB.
    seed: Seed of the splits that the source does not name.
    skip_damaged: Whether images that cannot be read are left out.

  Returns:
    The directory DATA_DIR/DATASET/VERSION, which was written or found. Its
    metadata.json holds the report of `collection.collect`.

  Raises:
    UsageError: The name or the source cannot be used, or `data_dir` cannot be written
      or has too little space.
  """
  errors.check(
      tfds_directory.is_name(dataset) and dataset not in datasets.NAMES, "dataset",
      dataset, "a new name for these images: letters, digits and underscores")
  version, bars = tfds_writer.IMAGES_VERSION, _shows_bars()
  other = tfds_directory.newest_version(dataset, paths.expand(data_dir))
  errors.check(
      other is None or other.name == version, "dataset", dataset,
      f"another name: {other} holds a data set of this name")

  def build(work: pathlib.Path) -> pathlib.Path:
    examples = labeled.find(pathlib.Path(paths.expand(source)))
    found = collection.collect(
        examples, image_size=image_size, channels=1 if grayscale else 3, seed=seed,
        skip_damaged=skip_damaged, bars=bars)
    _check_space(work, len(examples) * math.prod(found.image_shape))
    return tfds_writer.write_images(
        dataset, found.image_shape, found.label_names,
        {split: collection.records(found, split) for split in found.splits},
        {"mean": found.mean, "std": found.std, "report": found.report},
        work / _BUILT, bars=bars)

  return _prepare(dataset, version, data_dir, build)


def _prepare(
    dataset: str, version: str, data_dir: str | os.PathLike,
    build: Callable[[pathlib.Path], pathlib.Path],
) -> pathlib.Path:
  """Prepares a data set unless it is there, and returns its directory.

  Args:
    dataset: Name of the data set.
    version: Version that is made.
    data_dir: Directory of prepared data sets.
    build: A function that writes the data set below the work directory it is given, and
      returns the directory that holds it.
  """
  if not data_dir:
    raise errors.bad_value("data_dir", data_dir, "the directory to prepare data in")
  root = pathlib.Path(paths.expand(data_dir))
  target = root / dataset / version
  work = root / dataset / "incomplete.minw"
  try:
    already = target.exists()
    if not already:
      with _work_directory(work):
        already = target.exists()  # Another run may have made it meanwhile.
        if not already:
          files.move_folder(build(work), target)
  except OSError as error:
    raise errors.UsageError(
        f"data_dir={str(root)!r}: must be a directory that can be written to "
        f"({error})") from error
  shutil.rmtree(work, ignore_errors=True)  # The download has served.
  if already:
    datasets.check_available(dataset, root)
    print(f"{dataset} is already prepared."
          + f" To prepare it again, delete {target}." * (dataset not in datasets.NAMES))
  return target


@contextlib.contextmanager
def _work_directory(path: pathlib.Path) -> Iterator[None]:
  """Makes `path` for this process alone, and leaves only downloads in it."""
  path.mkdir(parents=True, exist_ok=True)
  lock, built = path / "lock", path / _BUILT
  with open(lock, "w") as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      raise errors.UsageError(f"{path} is in use by another preparation") from None
    except OSError:
      pass  # Some file systems have no locks.
    shutil.rmtree(built, ignore_errors=True)  # A run that was killed left it.
    try:
      yield
    finally:
      shutil.rmtree(built, ignore_errors=True)
      lock.unlink(missing_ok=True)
      with contextlib.suppress(OSError):  # A download stays, to be resumed.
        path.rmdir()
        path.parent.rmdir()  # It is empty if nothing was prepared.


def _check_space(path: pathlib.Path, needed: int) -> None:
  """Raises OSError if fewer than `needed` bytes are free at `path`."""
  free = shutil.disk_usage(path).free
  if free < needed:
    raise OSError(
        f"{needed / 1e6:,.0f} MB of free space are needed and {free / 1e6:,.0f} MB "
        "are there")


def _build_cifar(
    dataset: str, source: str | os.PathLike | None, work: pathlib.Path
) -> pathlib.Path:
  """Writes the data set below `work` and returns the directory that holds it."""
  if source is None:
    source = _downloaded(dataset, work)
  rows = cifar.read_source(dataset, pathlib.Path(paths.expand(source)))
  # The files are smaller than the records: PNG saves a fifth.
  _check_space(work, sum(part.nbytes for part in rows.values()))
  label_names = cifar.label_names(dataset)
  splits = {split: cifar.records(split, part, tuple(label_names))
            for split, part in rows.items()}
  return tfds_writer.write(
      dataset, label_names, splits, work / _BUILT, bars=_shows_bars())


def _downloaded(dataset: str, work: pathlib.Path) -> pathlib.Path:
  """Downloads the archive of a CIFAR data set into `work` and returns its path."""
  original = cifar.ORIGINALS[dataset]
  part = work / (posixpath.basename(original.url) + ".part")
  _check_space(work, original.size - download.size_of(part))
  download.download(original.url, part, size=original.size, sha256=original.sha256,
                    bars=_shows_bars())
  return part


def _build_imagenet(
    dataset: str, source: str | os.PathLike | None, work: pathlib.Path, partial: bool
) -> pathlib.Path:
  """Writes ImageNet below `work` and returns the directory that holds it."""
  folder = imagenet.check_source(source, partial)
  # Once in the order of the archives, then in that of the records.
  _check_space(work, 2 * sum(
      (folder / name).stat().st_size for name in (imagenet.TRAIN, imagenet.VALIDATION)))
  unreadable, counts = [], {}

  def counted(split):
    for record in imagenet.examples(folder, split, unreadable):
      counts[split] = counts.get(split, 0) + 1
      yield record

  directory = tfds_writer.write(
      dataset, {}, {split: counted(split) for split in ("train", "validation")},
      work / _BUILT, bars=_shows_bars())
  for name in unreadable[:_NAMED]:
    print(f"no image, kept as it is: {text.printable(name)}")
  if unreadable:
    print(f"{len(unreadable):,} files are no images")
  splits = datasets.info(dataset).splits
  complete = {"train": splits["train"] + splits["validation"],
              "validation": splits["test"]}
  if counts != complete and not partial:
    raise errors.UsageError(
        f"source={str(source)!r}: its archives hold {counts} images and must hold"
        f" {complete}; --partial prepares what is there")
  return directory


def _shows_bars() -> bool:
  """Returns whether bars show the progress, which is unless warnings are hidden."""
  return _log.isEnabledFor(logging.WARNING)


def define_flags() -> None:
  """Defines the flags of the command."""
  flags.DEFINE_string(
      "dataset", None, "Data set to prepare: cifar10, cifar100 or imagenet2012, or a "
      "new name for your own images.")
  cli.DEFINE_path("data_dir", None, "Directory of prepared data sets.")
  cli.DEFINE_path(
      "source", None,
      "Original archive, or the directory that it was extracted to, if you have it. "
      "For imagenet2012 it is the directory with the two archives. For your own images "
      "it is a folder with a folder for each class, a .csv or .jsonl file of paths and "
      "labels, or an .npz file.")
  flags.DEFINE_bool(
      "partial", False,
      "Whether to accept archives that hold only a part of imagenet2012.")
  flags.DEFINE_string(
      "image_size", None, "Size that your own images are brought to: SIDE or "
      "HEIGHTxWIDTH. By default it is the commonest size among them.")
  flags.DEFINE_bool(
      "grayscale", False, "Whether to store your own images in gray instead of RGB.")
  flags.DEFINE_integer(
      "seed", 0, "Seed of the splits of your own images, where none are given.",
      lower_bound=0)
  flags.DEFINE_bool(
      "skip_damaged", False,
      "Whether to leave out those of your own images that cannot be read.")
  cli.require("dataset", "data_dir")


def main() -> None:
  """Prepares a data set, as the flags say, and prints what to do next."""
  f = flags.FLAGS
  dataset, data_dir = f.dataset, f.data_dir
  if dataset in datasets.NAMES or f.source is None:
    _check_unused(_OWN_FLAGS, "left out except for your own images")
    print(prepare(dataset, data_dir, f.source, f.partial))
    for split, count in datasets.info(dataset, data_dir).splits.items():
      print(f"  {split}: {count:,} images")
  else:
    _check_unused(_OTHER_FLAGS, "left out for your own images")
    directory = prepare_images(
        dataset, data_dir, f.source, image_size=_image_size(f.image_size),
        grayscale=f.grayscale, seed=f.seed, skip_damaged=f.skip_damaged)
    print(directory)
    for line in _summary(datasets.info(dataset, data_dir), directory):
      print(f"  {line}")
  print(f"Train with: {training_command(dataset, data_dir)}")


def _check_unused(defaults: dict[str, Any], allowed: str) -> None:
  """Raises UsageError for a flag that was given and would have no effect."""
  for name, default in defaults.items():
    value = getattr(flags.FLAGS, name)
    errors.check(value == default, name, value, allowed)


def training_command(dataset: str, data_dir: str) -> str:
  """The shell command that trains on a prepared data set.

  Args:
    dataset: Name of the data set.
    data_dir: Directory that it was prepared in.
  """
  known = {"cifar10": "cifar_convnet",
           "cifar100": "cifar_convnet:dataset=cifar100",
           "imagenet2012": "imagenet_resnet18"}
  config, fields = known.get(dataset, ""), ""
  if not config:
    info = datasets.info(dataset, data_dir)
    small = min(info.image_shape[:2]) < _FOLDER_SIDE
    config = "digits_convnet" if small else "folder_convnet"
    # Powers of two suit any number of devices.
    most = 2**(info.splits["train"].bit_length() - 1)
    fields = (f" --config.dataset={dataset}"
              f" --config.crop_size={min(info.image_shape[:2])}"
              f" --config.batch_size={min(64, most)}"
              f" --config.eval_batch_size={min(256, most)}")
  return (f"python -m minw.main --config={config} --workdir=runs/{dataset}"
          f" --config.data_dir={shlex.quote(data_dir)}{fields}")


def _image_size(value: str | None) -> tuple[int, int] | None:
  """Reads the value of --image_size: a height and a width, or one side."""
  if value is None:
    return None
  match = re.fullmatch(r"(\d{1,4})(?:x(\d{1,4}))?", value, re.ASCII)
  height, width = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
  errors.check(height > 0 and width > 0, "image_size", value,
               "SIDE or HEIGHTxWIDTH in pixels, 32 or 24x48 for example")
  return height, width


def _summary(info: datasets.Info, directory: pathlib.Path) -> Iterator[str]:
  """Yields lines on a data set of the user's own images."""
  report: Any = tfds_directory.read_json(directory / "metadata.json")["report"]
  height, width, channels = info.image_shape
  sizes = report["sizes"]
  yield (f"images of {width}x{height} pixels and {channels} channel"
         f"{'s' * (channels > 1)}; in the source: "
         + ", ".join(f"{count:,} of {size}" for size, count in list(sizes.items())[:5])
         + ", ..." * (len(sizes) > 5))
  for split, counts in report["images"].items():
    made = " (made)" if split in report["made_splits"] else ""
    each = dict.fromkeys(f"{f(counts.values()):,}" for f in (min, max))
    yield (f"{split}: {sum(counts.values()):,} images{made}, {' to '.join(each)} of "
           f"each of {len(counts):,} classes")
  yield (f"mean {', '.join(f'{m:.4f}' for m in info.mean)}; deviation "
         f"{', '.join(f'{s:.4f}' for s in info.std)}")
  if report["gray"] and channels > 1:
    yield "all images are gray: --grayscale stores one channel"
  if report["enlarged"]:
    yield f"{report['enlarged']:,} images are smaller and were enlarged"
  for name, reason in list(report["damaged"].items())[:_NAMED]:
    yield f"left out: {name}: {reason}"
  if report["damaged"]:
    yield f"{len(report['damaged']):,} damaged images were left out"
  for first, second in report["across_splits"][:_NAMED]:
    yield f"equal images in different splits: {first}, {second}"
  if report["duplicates"]:
    yield (f"{report['duplicates']:,} images equal another one, "
           f"{len(report['across_splits']):,} of them in another split")


if __name__ == "__main__":
  cli.run(main, define_flags)
