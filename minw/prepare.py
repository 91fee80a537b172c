"""Prepares a data set for training: download (or take), verify, convert.

  python -m minw.prepare --dataset=cifar10 --data_dir=DIR [--source=PATH]
  python -m minw.prepare --dataset=imagenet2012 --data_dir=DIR --source=DIR_WITH_TARS

The result is a TensorFlow Datasets directory of array_record files, with the
records, keys and order that TFDS itself would write; TensorFlow is not needed.
"""

import contextlib
import fcntl
import gzip
import hashlib
import http.client
import io
import logging
import os
import pathlib
import posixpath
import resource
import shlex
import shutil
import stat
import tarfile
import types
from typing import Any, BinaryIO, Callable, Iterator, NamedTuple, Sequence
from unittest import mock
import urllib.error
import urllib.request
import zlib

from absl import flags
import numpy as np
from PIL import Image
import tensorflow_datasets as tfds
from tensorflow_datasets.core import registered
from tensorflow_datasets.core import shuffle
from tensorflow_datasets.datasets.imagenet2012 import imagenet2012_dataset_builder
from tensorflow_datasets.image_classification import cifar as tfds_cifar
import tqdm

from minw import cli
from minw import errors
from minw import files
from minw import paths
from minw import text
from minw.data import archives
from minw.data import datasets
from minw.data import imagenet
from minw.data import unpickle

_log = logging.getLogger(__name__)


class _Cifar(NamedTuple):
  """The original files of a CIFAR data set.

  Both versions hold the same records in the same order, so one table describes
  them: a binary file is NAME.bin and a pickle of the Python version is NAME.
  """

  url: str  # Of the archive of the binary version, as are:
  size: int
  sha256: str
  binary_folder: str
  python_folder: str
  label_keys: tuple[str, ...]  # In the order of a record's label bytes.
  python_label_keys: tuple[str, ...]  # The same in the pickles.
  files: dict[str, dict[str, str]]  # Split -> name -> md5 of the binary file.
  pickle_md5s: dict[str, str]  # Name -> md5 of the pickle.


_COARSE_NAMES = """
    aquatic_mammals fish flowers food_containers fruit_and_vegetables
    household_electrical_devices household_furniture insects large_carnivores
    large_man-made_outdoor_things large_natural_outdoor_scenes
    large_omnivores_and_herbivores medium_mammals non-insect_invertebrates people
    reptiles small_mammals trees vehicles_1 vehicles_2
"""

_CIFAR = {
    "cifar10": _Cifar(
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
    "cifar100": _Cifar(
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

_TFDS_CLASS = {
    "cifar10": tfds_cifar.Cifar10,
    "cifar100": tfds_cifar.Cifar100,
    "imagenet2012": imagenet2012_dataset_builder.Builder,
}

_PIXELS = 3 * 32 * 32  # Bytes of an image: all red, all green, all blue.
# Most bytes of a pickle beside the pixels: for each image, whose file name it has, and
# in all. The original files have 32 for each image.
_PICKLED_IMAGE, _PICKLED_FILE = 64, 4096
# Most bytes of an archive beside the files with images, and most entries in it.
_OTHER_FILES, _ENTRIES = 2**20, 100
_TIMEOUT = 30  # Seconds without a byte, after which a download is given up.


def prepare(
    dataset: str,
    data_dir: str | os.PathLike,
    source: str | os.PathLike | None = None,
    partial: bool = False,
) -> pathlib.Path:
  """Prepares `dataset` in `data_dir`, unless it is there already.

  The result appears whole or not at all: it is made in a work directory beside
  its place and then renamed. After an interruption, the next call resumes the
  download and makes the rest anew.

  Args:
    dataset: 'cifar10', 'cifar100' or 'imagenet2012'.
    data_dir: the directory of prepared data sets, with `~` for the home
      directory; made where needed.
    source: the original archive, or the directory it was extracted to, in the
      binary or the Python version; it is only read. By default the archive of
      the binary version is downloaded. For ImageNet, which can not be downloaded
      without an account, the folder of its archives.
    partial: whether archives with a part of ImageNet will do.

  Returns:
    The directory written, or found: DATA_DIR/DATASET/VERSION.

  Raises:
    UsageError: there is no such data set, the source is not what it must be, the
      download failed, or `data_dir` can not be written or has too little space.
  """
  datasets.info(dataset)  # Reports an unknown name.
  if dataset not in _TFDS_CLASS:
    raise errors.bad_value(
        "dataset", dataset,
        f"one of {', '.join(_TFDS_CLASS)}; {dataset} needs no preparation")
  if not data_dir:
    raise errors.bad_value("data_dir", data_dir, "the directory to prepare data in")
  root = pathlib.Path(paths.expand(data_dir))
  target = root / dataset / str(_TFDS_CLASS[dataset].VERSION)
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
  """Makes `path` for this process alone; leaves nothing in it but downloads."""
  path.mkdir(parents=True, exist_ok=True)
  lock, built = path / "lock", path / "tfds"
  with open(lock, "w") as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      raise errors.UsageError(f"{path} is in use by another preparation") from None
    except OSError:
      pass  # Some file systems have no locks.
    shutil.rmtree(built, ignore_errors=True)  # Of a run that was killed.
    try:
      yield
    finally:
      shutil.rmtree(built, ignore_errors=True)
      lock.unlink(missing_ok=True)
      with contextlib.suppress(OSError):  # A download stays, to be resumed.
        path.rmdir()


def _check_space(path: pathlib.Path, needed: int) -> None:
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
    source = _download(_CIFAR[dataset], work)
  path = pathlib.Path(paths.expand(source))
  rows = _read_source(dataset, path)
  # The files are smaller than the records: PNG saves a fifth.
  _check_space(work, sum(part.nbytes for part in rows.values()))
  names = {"label": datasets.info(dataset).label_names,
           "coarse_label": _COARSE_NAMES.split()}
  label_names = {key: names[key] for key in _CIFAR[dataset].label_keys}
  splits = {split: _cifar_records(split, part, tuple(label_names))
            for split, part in rows.items()}
  return _write(dataset, label_names, splits, work)


def _cifar_records(
    split: str, rows: np.ndarray, label_keys: tuple[str, ...]
) -> Iterator[tuple[int, dict[str, Any]]]:
  for index, row in enumerate(rows):
    labels, pixels = np.split(row, [len(label_keys)])
    yield index, {
        "id": f"{split}_{index:05d}",
        "image": _png(pixels.reshape(3, 32, 32).transpose(1, 2, 0)),
        **dict(zip(label_keys, labels.tolist())),
    }


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

  directory = _write(
      "imagenet2012", {}, {split: counted(split) for split in ("train", "validation")},
      work)
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


def _download(cifar: _Cifar, work: pathlib.Path) -> pathlib.Path:
  """Downloads the archive, or the rest of it, into `work` and verifies it."""
  part = work / (posixpath.basename(cifar.url) + ".part")
  done = part.stat().st_size if part.exists() else 0
  if done < cifar.size:
    _check_space(work, cifar.size - done)
    _fetch(cifar.url, cifar.size, part, done)
  with open(part, "rb") as file:
    found = hashlib.file_digest(file, "sha256").hexdigest()
  if found != cifar.sha256:
    part.unlink()  # To resume it would never end well.
    raise errors.UsageError(
        f"{cifar.url}: what was downloaded has sha256 {found} and not "
        f"{cifar.sha256}; run again, or give an archive with --source=PATH")
  return part


def _fetch(url: str, size: int, part: pathlib.Path, done: int) -> None:
  """Appends to `part`, which has `done` bytes, until it has `size` bytes."""

  def failed(why: Any) -> errors.UsageError:
    return errors.UsageError(
        f"{url}: download failed after {done:,} of {size:,} bytes ({why}); run again "
        "to resume it, or give an archive that you have with --source=PATH")

  headers = {"Range": f"bytes={done}-"} if done else {}
  try:
    response = urllib.request.urlopen(
        urllib.request.Request(url, headers=headers), timeout=_TIMEOUT)
  except urllib.error.HTTPError as error:  # An error page, which is open.
    error.close()
    raise failed(error) from error
  except (OSError, http.client.HTTPException) as error:
    raise failed(error) from error
  with response:
    if response.status != 206:  # The server sends all of it.
      done = 0
    with open(part, "ab") as file, tqdm.tqdm(
        total=size, initial=done, desc=posixpath.basename(url), unit="B",
        unit_scale=True, disable=_hides_bars()) as progress:
      file.truncate(done)
      while done < size:
        try:
          chunk = response.read1(min(1 << 20, size - done))
        except (OSError, http.client.HTTPException) as error:
          raise failed(error) from error
        if not chunk:
          raise failed("the connection was closed")
        file.write(chunk)
        done += len(chunk)
        progress.update(len(chunk))


def _read_source(dataset: str, source: pathlib.Path) -> dict[str, np.ndarray]:
  """Reads and verifies the original files.

  Args:
    dataset: 'cifar10' or 'cifar100'.
    source: archive or directory, in the binary or the Python version.

  Returns:
    The records of 'train' and 'test' as in the binary version: uint8,
    (n, label bytes + 3072).
  """
  cifar, counts = _CIFAR[dataset], _image_counts(dataset)
  layouts = [
      {name: f"{prefix}{name}{suffix}" for name in counts}
      for folder, suffix in ((cifar.binary_folder, ".bin"), (cifar.python_folder, ""))
      for prefix in (f"{folder}/", "")
  ]
  limits = {path: counts[name] * (len(cifar.label_keys) + _PIXELS + _PICKLED_IMAGE)
                  + _PICKLED_FILE
            for paths in layouts for name, path in paths.items()}
  contents = _contents(source, limits)
  layout = max(layouts, key=lambda paths: len(contents.keys() & paths.values()))
  missing = [path for path in layout.values() if path not in contents]
  if len(missing) == len(counts):
    raise errors.bad_value(
        "source", str(source),
        f"the archive of {dataset}, binary or Python version, or the directory it was "
        f"extracted to: with {cifar.binary_folder}/ or {cifar.python_folder}/")
  if missing:
    raise errors.UsageError(f"source={str(source)!r}: lacks {', '.join(missing)}")

  rows = {}
  for split, md5s in cifar.files.items():
    parts = []
    for name, md5 in md5s.items():
      path = layout[name]
      try:
        part = _parse(cifar, path, contents[path], counts[name])
        _check_md5(part, md5, "its records have")
      except Exception as error:  # The file is not trusted.
        raise errors.UsageError(
            f"source={str(source)!r}: {path} is damaged or not the original "
            f"({error})") from error
      parts.append(part)
    rows[split] = np.concatenate(parts)
  return rows


def _image_counts(dataset: str) -> dict[str, int]:
  """How many images each original file of a CIFAR data set holds, by its name."""
  splits = datasets.info(dataset).splits
  images = {"train": splits["train"] + splits["validation"], "test": splits["test"]}
  return {name: images[split] // len(md5s)
          for split, md5s in _CIFAR[dataset].files.items() for name in md5s}


def _contents(source: pathlib.Path, limits: dict[str, int]) -> dict[str, memoryview]:
  """The content of those files of a directory or tar archive that have limits.

  Args:
    source: The directory, or the archive, which gzip may have compressed.
    limits: Most bytes that a file may have, by its path in the source.

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
  """The content of a regular file of at most `limit` bytes, after `opened` if given."""
  if not stat.S_ISREG(path.stat().st_mode):
    raise OSError(f"{path.name} is not a regular file")
  with open(path, "rb") as file:
    content = (opened(file) if opened else file).read(limit + 1)
  if len(content) > limit:
    raise OSError(f"{path.name} holds more than the {limit:,} bytes that it may have")
  return memoryview(content)


def _opened_archive(file: BinaryIO) -> BinaryIO:
  """An archive that is read as it was before gzip compressed it, if it did."""
  compressed = file.read(2) == b"\x1f\x8b"
  file.seek(0)
  return gzip.GzipFile(fileobj=file) if compressed else file


def _check_md5(content: Any, md5: str, what: str) -> None:
  found = hashlib.md5(content).hexdigest()
  if found != md5:
    raise ValueError(f"{what} md5 {found} and not {md5}")


def _parse(cifar: _Cifar, path: str, content: memoryview, count: int) -> np.ndarray:
  """The records in a file of either version: uint8, (count, label bytes + 3072).

  A pickle must be the original before anything is made of it.
  """
  if path.endswith(".bin"):
    values = np.frombuffer(content, np.uint8)
    return values.reshape(count, len(cifar.label_keys) + _PIXELS)
  _check_md5(content, cifar.pickle_md5s[posixpath.basename(path)], "it has")
  pickled = unpickle.loads(bytes(content))
  labels = [np.array(pickled[key.encode()], np.uint8)
            for key in cifar.python_label_keys]
  return np.column_stack([*labels, pickled[b"data"].reshape(count, _PIXELS)])


def _write(
    dataset: str,
    label_names: dict[str, Sequence[str]],
    splits: dict[str, Iterator[tuple[int | str, dict[str, Any]]]],
    work: pathlib.Path,
) -> pathlib.Path:
  """Writes records as TFDS does, below `work`; returns their directory.

  Args:
    dataset: its name.
    label_names: by feature, where TFDS would read them from the source.
    splits: the keys and records of each.
    work: where to.
  """
  with registered.skip_registration():  # TFDS has a class of this name.

    class Builder(_TFDS_CLASS[dataset]):
      """TFDS's own, but for TensorFlow's part: to read files and encode images."""

      name = dataset
      __module__ = _TFDS_CLASS[dataset].__module__  # Where it looks for its texts.

      def _split_generators(self, dl_manager):
        for key, names in label_names.items():
          self.info.features[key].names = names
        return {split: self._generate_examples(split) for split in splits}

      def _generate_examples(self, split):
        return tqdm.tqdm(splits[split], desc=f"{dataset} {split}", unit=" records",
                         disable=_hides_bars())

  _allow_open_files(shuffle.BUCKETS_NUMBER + 100)
  builder = Builder(data_dir=work / "tfds", file_format="array_record")
  tfds.disable_progress_bar()  # For ours.
  try:
    with contextlib.redirect_stdout(io.StringIO()), \
        mock.patch.object(shuffle, "tf", _FILES):  # It tells of a download.
      builder.download_and_prepare()
  except RuntimeError as error:  # From array_record, where a write fails.
    raise OSError(str(error)) from error
  finally:
    tfds.enable_progress_bar()
  return pathlib.Path(builder.data_dir)


def _hides_bars() -> bool | None:
  """Whether there are no bars of progress; None, unless stderr is a terminal."""
  return None if _log.isEnabledFor(logging.WARNING) else True


def _allow_open_files(count: int) -> None:
  soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
  unlimited = resource.RLIM_INFINITY
  if soft != unlimited and soft < count:
    soft = count if hard == unlimited else min(count, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


# What TFDS needs of TensorFlow to sort more records than it keeps in memory.
_FILES = types.SimpleNamespace(
    io=types.SimpleNamespace(gfile=types.SimpleNamespace(
        GFile=lambda path, mode: open(path, mode),
        exists=os.path.exists, remove=os.remove)),
    errors=types.SimpleNamespace(ResourceExhaustedError=()))


def _png(image: np.ndarray) -> bytes:
  """Encodes an image: uint8, (height, width, 3)."""
  file = io.BytesIO()
  Image.fromarray(image).save(file, "png")
  return file.getvalue()


def define_flags() -> None:
  """Defines the flags of the command."""
  flags.DEFINE_string(
      "dataset", None, "Data set to prepare: cifar10, cifar100 or imagenet2012.")
  cli.DEFINE_path("data_dir", None, "Directory of prepared data sets.")
  cli.DEFINE_path(
      "source", None,
      "Original archive, or the directory it was extracted to, if you have it. For "
      "imagenet2012, the directory with its two archives.")
  flags.DEFINE_bool(
      "partial", False,
      "Whether archives with a part of imagenet2012 are enough.")
  cli.require("dataset", "data_dir")


def main() -> None:
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
  return (f"python -m minw.main --config={config} --workdir=runs/{dataset} --config.data_dir={shlex.quote(data_dir)}")


if __name__ == "__main__":
  cli.run(main, define_flags)
