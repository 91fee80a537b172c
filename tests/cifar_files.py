"""Small CIFAR data sets in every form a user may have them in, and their checks."""

import hashlib
import pathlib
import tarfile

import numpy as np
import pytest
import tensorflow_datasets as tfds

from minw import errors
from minw import prepare
from minw.data import cifar
from minw.data import datasets
from python2_pickles import dump
from python2_pickles import pickled

# Images in each original file; the last four of the training images validate.
COUNTS = {
    "cifar10": {f"data_batch_{i}": 3 for i in range(1, 6)} | {"test_batch": 4},
    "cifar100": {"train": 12, "test": 5},
}
FOLDERS = {
    "cifar10": {"binary": "cifar-10-batches-bin", "python": "cifar-10-batches-py"},
    "cifar100": {"binary": "cifar-100-binary", "python": "cifar-100-python"},
}
LABELS = {"cifar10": ["labels"], "cifar100": ["coarse_labels", "fine_labels"]}


def records(name: str) -> dict[str, np.ndarray]:
  """File -> rows as in the binary version: label bytes, then 3x32x32 pixels."""
  rng = np.random.default_rng(len(name))
  rows = {}
  for file, count in COUNTS[name].items():
    labels = [rng.integers(0, 10, (count, 1))]
    if name == "cifar100":
      labels = [rng.integers(0, 20, (count, 1)), rng.integers(0, 100, (count, 1))]
    pixels = rng.integers(0, 256, (count, 3072))
    rows[file] = np.concatenate([*labels, pixels], 1).astype(np.uint8)
  return rows


def is_test(file: str) -> bool:
  return file.startswith("test")


def original_files(name: str, version: str) -> dict[str, bytes]:
  """File name -> content."""
  files = {}
  for file, rows in records(name).items():
    keys = LABELS[name]
    if version == "binary":
      files[f"{file}.bin"] = rows.tobytes()
    else:
      content = {b"batch_label": b"some", b"data": rows[:, len(keys):]}
      for i, key in enumerate(keys):
        content[key.encode()] = rows[:, i].tolist()
      files[file] = pickled(dump(content))
  return files


def write_directory(path: pathlib.Path, name: str, version: str) -> pathlib.Path:
  """Writes the extracted archive below `path`; returns its one folder."""
  folder = path / FOLDERS[name][version]
  folder.mkdir(parents=True)
  (folder / "readme.html").write_text("hello")
  for file, content in original_files(name, version).items():
    (folder / file).write_bytes(content)
  return folder


def write_archive(path: pathlib.Path, name: str, version: str) -> pathlib.Path:
  folder = write_directory(path / "packed", name, version)
  with tarfile.open(path / f"{name}.tar.gz", "w:gz") as archive:
    archive.add(folder, folder.name)
  return path / f"{name}.tar.gz"


def small_tables():
  """`cifar.ORIGINALS` and `datasets._INFOS` for the small sources."""
  originals, infos = {}, {}
  for name in COUNTS:
    rows = records(name)
    md5s = {"train": {}, "test": {}}
    sizes = {"train": -4, "validation": 4, "test": 0}
    for file, part in rows.items():
      split = "test" if is_test(file) else "train"
      md5s[split][file] = hashlib.md5(part.tobytes()).hexdigest()
      sizes[split] += len(part)
    pickles = {file: hashlib.md5(content).hexdigest()
               for file, content in original_files(name, "python").items()}
    originals[name] = cifar.ORIGINALS[name]._replace(files=md5s, pickle_md5s=pickles)
    infos[name] = datasets._INFOS[name]._replace(splits=sizes)
  return originals, infos


def refusal(*arguments) -> str:
  """The message of the error that `prepare` must raise."""
  with pytest.raises(errors.UsageError) as error:
    prepare.prepare(*arguments)
  return str(error.value)


def check_prepared(name: str, directory: pathlib.Path) -> None:
  """Checks a TFDS directory against the source, read here by other means."""
  builder = tfds.builder_from_directory(directory)
  assert builder.name == name and str(builder.version) == "3.0.2"
  info = builder.info
  own = tfds.builder_cls(name)(data_dir="/nowhere").info  # TFDS's description.
  assert info.description == own.description and info.citation == own.citation
  assert repr(info.features) == repr(own.features)
  assert tuple(info.features["label"].names) == datasets.info(name).label_names
  if name == "cifar100":
    names = info.features["coarse_label"].names
    assert names == sorted(names) and len(names) == 20  # Alphabetical, too.
  for split in ("train", "test"):
    rows = np.concatenate([
        part for file, part in records(name).items()
        if is_test(file) == (split == "test")])
    assert info.splits[split].num_examples == len(rows)
    assert info.splits[split].shard_lengths == [len(rows)]
    file = directory / f"{name}-{split}.array_record-00000-of-00001"
    assert info.splits[split].filepaths == [file] and file.is_file()
    # TFDS orders records by the md5 of split and key, and the key is the index.
    order = sorted(
        range(len(rows)), key=lambda i: hashlib.md5(f"{split}{i}".encode()).digest())
    source = builder.as_data_source(split)
    assert len(source) == len(rows)
    label_count = len(LABELS[name])
    for index, record in zip(order, source):
      assert record.pop("id") == f"{split}_{index:05d}".encode()
      image = rows[index, label_count:].reshape(3, 1024).T.reshape(32, 32, 3)
      np.testing.assert_array_equal(record.pop("image"), image)
      assert record.pop("label") == rows[index, label_count - 1]
      if name == "cifar100":
        assert record.pop("coarse_label") == rows[index, 0]
      assert not record
