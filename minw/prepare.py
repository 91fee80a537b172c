"""Prepare a data set for training: download it, verify it and convert it.

  python -m minw.prepare --dataset=cifar10 --data_dir=DIR [--source=PATH]
  python -m minw.prepare --dataset=imagenet2012 --data_dir=DIR --source=DIR_WITH_TARS

With --source, nothing is downloaded. The result is a TensorFlow Datasets directory of
array_record files, with the records, keys and order that TFDS itself would write.
TensorFlow is not needed.
"""

import contextlib
import fcntl
import logging
import os
import pathlib
import posixpath
import shlex
import shutil
from typing import Iterator

from absl import flags

from minw import cli
from minw import errors
from minw import files
from minw import paths
from minw import text
from minw.data import cifar
from minw.data import datasets
from minw.data import download
from minw.data import imagenet
from minw.data import tfds_writer

_log = logging.getLogger(__name__)

_BUILT = "tfds"  # Folder in the work directory that a data set is written to.


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
  datasets.info(dataset)  # Reports an unknown name.
  if dataset not in tfds_writer.NAMES:
    raise errors.bad_value(
        "dataset", dataset,
        f"one of {', '.join(tfds_writer.NAMES)}; {dataset} needs no preparation")
  if not data_dir:
    raise errors.bad_value("data_dir", data_dir, "the directory to prepare data in")
  root = pathlib.Path(paths.expand(data_dir))
  target = root / dataset / tfds_writer.version(dataset)
  work = root / dataset / "incomplete.minw"
  try:
    already = target.exists()
    if not already:
      with _work_directory(work):
        already = target.exists()  # Another run may have made it meanwhile.
        if not already:
          if dataset == "imagenet2012":
            built = _build_imagenet(source, work, partial)
          else:
            built = _build_cifar(dataset, source, work)
          files.move_folder(built, target)
  except OSError as error:
    raise errors.UsageError(
        f"data_dir={str(root)!r}: must be a directory that can be written to "
        f"({error})") from error
  shutil.rmtree(work, ignore_errors=True)  # The download has served.
  if already:
    datasets.check_available(dataset, root)
    print(f"{dataset} is already prepared.")
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
    source: str | os.PathLike | None, work: pathlib.Path, partial: bool
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
      "imagenet2012", {}, {split: counted(split) for split in ("train", "validation")},
      work / _BUILT, bars=_shows_bars())
  for name in unreadable[:10]:
    print(f"no image, kept as it is: {text.printable(name)}")
  if unreadable:
    print(f"{len(unreadable):,} files are no images")
  splits = datasets.info("imagenet2012").splits
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
      "dataset", None, "Data set to prepare: cifar10, cifar100 or imagenet2012.")
  cli.DEFINE_path("data_dir", None, "Directory of prepared data sets.")
  cli.DEFINE_path(
      "source", None,
      "Original archive, or the directory that it was extracted to, if you have it. "
      "For imagenet2012 it is the directory with the two archives.")
  flags.DEFINE_bool(
      "partial", False,
      "Whether to accept archives that hold only a part of imagenet2012.")
  cli.require("dataset", "data_dir")


def main() -> None:
  """Prepares a data set, as the flags say, and prints what to do next."""
  dataset, data_dir = flags.FLAGS.dataset, flags.FLAGS.data_dir
  print(prepare(dataset, data_dir, flags.FLAGS.source, flags.FLAGS.partial))
  for split, count in datasets.info(dataset, data_dir).splits.items():
    print(f"  {split}: {count:,} images")
  print(f"Train with: {training_command(dataset, data_dir)}")


def training_command(dataset: str, data_dir: str) -> str:
  """The shell command that trains on a prepared data set.

  Args:
    dataset: Name of the data set.
    data_dir: Directory that it was prepared in.
  """
  config = {"cifar10": "cifar_convnet",
            "cifar100": "cifar_convnet:dataset=cifar100",
            "imagenet2012": "imagenet_resnet18"}[dataset]
  return (f"python -m minw.main --config={config} --workdir=runs/{dataset}"
          f" --config.data_dir={shlex.quote(data_dir)}")


if __name__ == "__main__":
  cli.run(main, define_flags)
