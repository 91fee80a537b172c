"""Prepares a data set for training: download (or take), verify, convert.

  python -m minw.prepare --dataset=cifar10 --data_dir=DIR [--source=PATH]

The result is a TensorFlow Datasets directory of array_record files, with the
records, keys and order that TFDS itself would write; TensorFlow is not needed.
"""

import contextlib
import fcntl
import hashlib
import http.client
import io
import os
import pathlib
import pickle
import posixpath
import shlex
import shutil
import tarfile
from typing import Any, Iterator, NamedTuple
import urllib.error
import urllib.request
import zlib

from absl import flags
import numpy as np
from PIL import Image
import tensorflow_datasets as tfds
from tensorflow_datasets.core import registered
from tensorflow_datasets.image_classification import cifar as tfds_cifar
import tqdm

from minw import cli
from minw import datasets


class _Cifar(NamedTuple):
  """The original files of a CIFAR data set.

  Both versions hold the same records in the same order, so one table describes
  them: a binary file is NAME.bin, a pickle of the Python version is NAME, and
  the md5 is that of the binary file's bytes.
  """

  url: str  # Of the archive of the binary version, as are:
  size: int
  sha256: str
  binary_folder: str
  python_folder: str
  label_keys: tuple[str, ...]  # In the order of a record's label bytes.
  python_label_keys: tuple[str, ...]  # The same in the pickles.
  files: dict[str, dict[str, str]]  # Split -> name -> md5.


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
    ),
}

_TFDS_CLASS = {"cifar10": tfds_cifar.Cifar10, "cifar100": tfds_cifar.Cifar100}

_PIXELS = 3 * 32 * 32  # Bytes of an image: all red, all green, all blue.
_TIMEOUT = 30  # Seconds without a byte, after which a download is given up.


def prepare(
    dataset: str,
    data_dir: str | os.PathLike,
    source: str | os.PathLike | None = None,
) -> pathlib.Path:
  """Prepares `dataset` in `data_dir`, unless it is there already.

  The result appears whole or not at all: it is made in a work directory beside
  its place and then renamed. After an interruption, the next call resumes the
  download and makes the rest anew.

  Args:
    dataset: 'cifar10' or 'cifar100'.
    data_dir: the directory of prepared data sets, with `~` for the home
      directory; made where needed.
    source: the original archive, or the directory it was extracted to, in the
      binary or the Python version; it is only read. By default the archive of
      the binary version is downloaded.

  Returns:
    The directory written, or found: DATA_DIR/DATASET/VERSION.

  Raises:
    UsageError: there is no such data set, the source is not what it must be, the
      download failed, or `data_dir` can not be written or has too little space.
  """
  datasets.info(dataset)  # Reports an unknown name.
  if dataset not in _TFDS_CLASS:
    raise cli.bad_value(
        "dataset", dataset,
        f"one of {', '.join(_TFDS_CLASS)}; {dataset} needs no preparation")
  if not data_dir:
    raise cli.bad_value("data_dir", data_dir, "the directory to prepare data in")
  root = pathlib.Path(os.path.expanduser(data_dir))
  target = root / dataset / str(_TFDS_CLASS[dataset].VERSION)
  work = root / dataset / "incomplete.minw"
  try:
    already = target.exists()
    if not already:
      with _work_directory(work):
        already = target.exists()  # Another run may have made it meanwhile.
        if not already:
          os.replace(_build_cifar(dataset, source, work), target)
  except OSError as error:
    raise cli.UsageError(
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
      raise cli.UsageError(f"{path} is in use by another preparation") from None
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
  path = pathlib.Path(os.path.expanduser(source))
  return _write(dataset, _read_source(dataset, path), work)


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
    raise cli.UsageError(
        f"{cifar.url}: what was downloaded has sha256 {found} and not "
        f"{cifar.sha256}; run again, or give an archive with --source=PATH")
  return part


def _fetch(url: str, size: int, part: pathlib.Path, done: int) -> None:
  """Appends to `part`, which has `done` bytes, until it has `size` bytes."""

  def failed(why: Any) -> cli.UsageError:
    return cli.UsageError(
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
        unit_scale=True, disable=None) as progress:
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
  cifar = _CIFAR[dataset]
  names = [name for md5s in cifar.files.values() for name in md5s]
  layouts = [
      {name: f"{prefix}{name}{suffix}" for name in names}
      for folder, suffix in ((cifar.binary_folder, ".bin"), (cifar.python_folder, ""))
      for prefix in (f"{folder}/", "")
  ]
  contents = _contents(source, {path for paths in layouts for path in paths.values()})
  layout = max(layouts, key=lambda paths: len(contents.keys() & paths.values()))
  missing = [path for path in layout.values() if path not in contents]
  if len(missing) == len(names):
    raise cli.bad_value(
        "source", str(source),
        f"the archive of {dataset}, binary or Python version, or the directory it was "
        f"extracted to: with {cifar.binary_folder}/ or {cifar.python_folder}/")
  if missing:
    raise cli.UsageError(f"source={str(source)!r}: lacks {', '.join(missing)}")

  splits = datasets.info(dataset).splits
  counts = {"train": splits["train"] + splits["validation"], "test": splits["test"]}
  rows = {}
  for split, md5s in cifar.files.items():
    parts = []
    for name, md5 in md5s.items():
      path = layout[name]
      try:
        part = _parse(cifar, path, contents[path], counts[split] // len(md5s))
        found = hashlib.md5(part).hexdigest()
        if found != md5:
          raise ValueError(f"its records have md5 {found} and not {md5}")
      except Exception as error:  # An unpickler may raise whatever the file says.
        raise cli.UsageError(
            f"source={str(source)!r}: {path} is damaged or not the original "
            f"({error})") from error
      parts.append(part)
    rows[split] = np.concatenate(parts)
  return rows


def _contents(source: pathlib.Path, wanted: set[str]) -> dict[str, bytes]:
  """The content of those files of a directory or tar archive that are `wanted`."""
  try:
    if source.is_dir():
      return {
          path: (source / path).read_bytes()
          for path in wanted if (source / path).is_file()
      }
    contents = {}
    with tarfile.open(source) as archive:
      for member in archive:
        path = posixpath.normpath(member.name)
        if path in wanted and member.isfile():
          contents[path] = archive.extractfile(member).read()
    return contents
  except (OSError, EOFError, tarfile.TarError, zlib.error) as error:
    raise cli.UsageError(
        f"source={str(source)!r}: can not be read as a directory or tar archive "
        f"({error})") from error


def _parse(cifar: _Cifar, path: str, content: bytes, count: int) -> np.ndarray:
  """The records in a file of either version: uint8, (count, label bytes + 3072)."""
  if path.endswith(".bin"):
    values = np.frombuffer(content, np.uint8)
    return values.reshape(count, len(cifar.label_keys) + _PIXELS)
  pickled = _Unpickler(io.BytesIO(content), encoding="bytes").load()
  labels = [pickled[key.encode()] for key in cifar.python_label_keys]
  return np.concatenate(
      [np.array(labels, np.uint8).T, pickled[b"data"].reshape(count, _PIXELS)], axis=1)


class _Unpickler(pickle.Unpickler):
  """Reads the numbers, strings, lists, dicts and arrays that Python 2 pickled.

  It refuses all else, since a pickle can call any function that it can name.
  """

  _ALLOWED = {
      ("numpy.core.multiarray", "_reconstruct"): np.zeros(0).__reduce__()[0],
      ("numpy", "ndarray"): np.ndarray,
      # Python 2 wrote the flags as integers, which NumPy 2.4 warns of.
      ("numpy", "dtype"): lambda code, *flags_: np.dtype(code, *map(bool, flags_)),
  }

  def find_class(self, module: str, name: str) -> Any:
    if (module, name) not in self._ALLOWED:
      raise pickle.UnpicklingError(f"it names {module}.{name}")
    return self._ALLOWED[module, name]


def _write(
    dataset: str, rows: dict[str, np.ndarray], work: pathlib.Path
) -> pathlib.Path:
  """Writes the records as TFDS does, below `work`; returns their directory."""
  keys = _CIFAR[dataset].label_keys
  label_names = {
      "label": datasets.info(dataset).label_names,
      "coarse_label": _COARSE_NAMES.split(),
  }

  with registered.skip_registration():  # TFDS has a class of this name.

    class Builder(_TFDS_CLASS[dataset]):
      """TFDS's own, but for TensorFlow's part: to read files and encode PNG."""

      name = dataset

      def _split_generators(self, dl_manager):
        for key in keys:
          self.info.features[key].names = label_names[key]
        return {split: self._generate_examples(split, rows[split]) for split in rows}

      def _generate_examples(self, split, rows_of_split):
        progress = tqdm.tqdm(
            rows_of_split, desc=f"{dataset} {split}", unit=" records", disable=None)
        for index, row in enumerate(progress):
          labels, pixels = np.split(row, [len(keys)])
          yield index, {
              "id": f"{split}_{index:05d}",
              "image": _png(pixels.reshape(3, 32, 32).transpose(1, 2, 0)),
              **dict(zip(keys, labels.tolist())),
          }

  # The files are smaller than the records: PNG saves a fifth.
  _check_space(work, sum(part.nbytes for part in rows.values()))
  builder = Builder(data_dir=work / "tfds", file_format="array_record")
  tfds.disable_progress_bar()  # For ours.
  try:
    with contextlib.redirect_stdout(io.StringIO()):  # It tells of a download.
      builder.download_and_prepare()
  except RuntimeError as error:  # From array_record, where a write fails.
    raise OSError(str(error)) from error
  finally:
    tfds.enable_progress_bar()
  return pathlib.Path(builder.data_dir)


def _png(image: np.ndarray) -> bytes:
  """Encodes an image: uint8, (height, width, 3)."""
  file = io.BytesIO()
  Image.fromarray(image).save(file, "png")
  return file.getvalue()


def main() -> None:
  dataset, data_dir = flags.FLAGS.dataset, flags.FLAGS.data_dir
  print(prepare(dataset, data_dir, flags.FLAGS.source))
  for split, count in datasets.info(dataset).splits.items():
    print(f"  {split}: {count:,} images")
  which = "" if dataset == "cifar10" else f" --config.dataset={dataset}"
  print("Train with: python -m minw.main --config=experiments/cifar_convnet.py"
        f"{which} --config.data_dir={shlex.quote(os.path.expanduser(data_dir))}")


if __name__ == "__main__":
  flags.DEFINE_string("dataset", None, "Data set to prepare: cifar10 or cifar100.")
  flags.DEFINE_string("data_dir", None, "Directory of prepared data sets.")
  flags.DEFINE_string(
      "source", None,
      "Original archive, or the directory it was extracted to, if you have it.")
  flags.mark_flags_as_required(["dataset", "data_dir"])
  cli.run(main)
