"""minw.data.datasets: the digits, and CIFAR from small TFDS directories."""

import hashlib
import io
import json
import os
import pathlib
import subprocess
import sys
import time

import numpy as np
from PIL import Image
import pytest
import tensorflow_datasets as tfds
from tensorflow_datasets.core import registered

from minw import errors
from minw.data import datasets

TRAIN, VALIDATION, TEST = 8, 4, 6


def tfds_order(split: str, count: int) -> list[int]:
  """The order in which TFDS keeps records of integer keys: by their salted md5."""
  return sorted(
      range(count), key=lambda i: hashlib.md5(f"{split}{i}".encode()).hexdigest())


def random_records(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
  rng = np.random.default_rng(seed)
  images = rng.integers(0, 256, (count, 32, 32, 3), np.uint8)
  return images, rng.integers(0, 10, count).astype(np.int32)


def write_tfds(data_dir: pathlib.Path, version: str, data: dict) -> pathlib.Path:
  """Writes {'train': (images, labels), ...} as TFDS's CIFAR-10 of a version."""

  def encode(image):
    file = io.BytesIO()
    Image.fromarray(image).save(file, "png")
    return file.getvalue()

  with registered.skip_registration():

    class Builder(tfds.core.GeneratorBasedBuilder):
      name = "cifar10"
      VERSION = tfds.core.Version(version)

      def _info(self):
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict({
                "id": tfds.features.Text(),
                "image": tfds.features.Image(shape=(32, 32, 3)),
                "label": tfds.features.ClassLabel(num_classes=10),
            }))

      def _split_generators(self, dl_manager):
        return {split: self._generate_examples(split) for split in data}

      def _generate_examples(self, split):
        for i, (image, label) in enumerate(zip(*data[split])):
          yield i, {
              "id": f"{split}_{i}", "image": encode(image), "label": int(label)
          }

  builder = Builder(data_dir=data_dir, file_format="array_record")
  builder.download_and_prepare()
  return pathlib.Path(builder.data_dir)


@pytest.fixture(autouse=True)
def small(monkeypatch):
  """CIFAR-10 of 18 images."""
  sizes = {"train": TRAIN, "validation": VALIDATION, "test": TEST}
  monkeypatch.setitem(
      datasets._INFOS, "cifar10", datasets.info("cifar10")._replace(splits=sizes))


@pytest.fixture
def data():
  return {
      "train": random_records(TRAIN + VALIDATION, 0), "test": random_records(TEST, 1)
  }


@pytest.fixture
def directory(tmp_path, data):
  """DATA_DIR/cifar10/3.0.2."""
  return write_tfds(tmp_path, "3.0.2", data)


def test_digits_are_scaled_and_split_by_index():
  splits = ("train", "validation", "test")
  loaded = {split: datasets.load("digits", split, None) for split in splits}
  for split, count in (("train", 1257), ("validation", 180), ("test", 360)):
    images, labels = loaded[split]
    assert images.shape == (count, 8, 8, 1) and images.dtype == np.uint8
    assert labels.shape == (count,) and labels.dtype == np.int32
    assert datasets.info("digits").splits[split] == count
  # The first thirty digits are 0 to 9, three times.
  assert loaded["test"][1][:6].tolist() == [0, 5, 0, 5, 0, 5]
  assert loaded["validation"][1][:3].tolist() == [1, 1, 1]
  assert loaded["train"][1][:14].tolist() == [2, 3, 4, 6, 7, 8, 9] * 2
  # The first row of the first digit is 0 0 5 13 9 1 0 0.
  first_row = [0, 0, 80, 207, 143, 16, 0, 0]
  assert loaded["test"][0][0, 0, :, 0].tolist() == first_row
  # v * 255 / 16 for v = 0..16, rounded.
  levels = [0, 16, 32, 48, 64, 80, 96, 112, 128, 143, 159, 175, 191, 207, 223, 239, 255]
  assert np.unique(loaded["train"][0]).tolist() == levels


def test_digits_statistics_are_those_of_the_training_images():
  images, _ = datasets.load("digits", "train", None)
  info = datasets.info("digits")
  assert info.image_shape == (8, 8, 1)
  assert info.mean == (round(np.mean(images / 255), 4),)
  assert info.std == (round(np.std(images / 255), 4),)


def test_info_needs_no_data():
  assert datasets.NAMES == ("digits", "cifar10", "cifar100", "imagenet2012")
  assert [datasets.info(n).num_classes for n in datasets.NAMES] == [10, 10, 100, 1000]
  names = datasets.info("cifar10").label_names
  assert names[::3] == ("airplane", "cat", "frog", "truck")
  names = datasets.info("cifar100").label_names
  assert names == tuple(sorted(set(names)))  # CIFAR-100's labels are alphabetical.
  assert names[0] == "apple" and names[19] == "cattle" and names[99] == "worm"
  names = datasets.info("imagenet2012").label_names
  assert names == tuple(sorted(set(names)))  # Those of tench, goldfish, toilet tissue.
  assert [names[i] for i in (0, 1, 999)] == ["n01440764", "n01443537", "n15075141"]
  assert datasets.info("imagenet2012", "nowhere").splits == {
      "train": 1_271_167, "validation": 10_000, "test": 50_000}
  for name in datasets.NAMES:
    info = datasets.info(name)
    assert info.name == name
    assert len(info.mean) == len(info.std) == info.image_shape[-1]


@pytest.mark.parametrize("function", [
    datasets.info,
    lambda name: datasets.load(name, "train", "x"),
    lambda name: datasets.check_available(name, "x"),
])
def test_unknown_dataset_is_named(function):
  with pytest.raises(errors.UsageError, match="'cifra10'.*did you mean 'cifar10'"):
    function("cifra10")


def test_unknown_split_is_named():
  with pytest.raises(errors.UsageError, match="'valid'.*did you mean 'validation'"):
    datasets.load("digits", "valid", None)


def test_cifar_is_read_in_order(directory, data, tmp_path):
  datasets.check_available("cifar10", tmp_path)
  images, labels = data["train"]
  order = tfds_order("train", TRAIN + VALIDATION)
  assert order != sorted(order)
  for split, rows in (("train", order[:TRAIN]), ("validation", order[TRAIN:])):
    got_images, got_labels = datasets.load("cifar10", split, str(tmp_path))
    assert got_images.dtype == np.uint8 and got_labels.dtype == np.int32
    np.testing.assert_array_equal(got_images, images[rows])
    np.testing.assert_array_equal(got_labels, labels[rows])
  images, labels = datasets.load("cifar10", "test", tmp_path)
  order = tfds_order("test", TEST)
  np.testing.assert_array_equal(images, data["test"][0][order])
  np.testing.assert_array_equal(labels, data["test"][1][order])


def test_home_directory_is_expanded(directory, tmp_path, monkeypatch):
  monkeypatch.setenv("HOME", str(tmp_path.parent))
  assert len(datasets.load("cifar10", "test", f"~/{tmp_path.name}")[0]) == TEST


def test_newest_version_is_read(directory, data, tmp_path):
  newer = data | {"test": random_records(TEST, 2)}
  write_tfds(tmp_path, "3.0.10", newer)
  images, _ = datasets.load("cifar10", "test", tmp_path)
  np.testing.assert_array_equal(images, newer["test"][0][tfds_order("test", TEST)])


@pytest.mark.parametrize("function", [
    lambda path: datasets.check_available("cifar10", path),
    lambda path: datasets.load("cifar10", "test", path),
])
@pytest.mark.parametrize("made", ["", "cifar10", "cifar10/incomplete.minw"])
def test_missing_data_is_reported_at_once(function, made, tmp_path):
  path = tmp_path / "some data"
  if made:
    (path / made).mkdir(parents=True)
  start = time.monotonic()
  with pytest.raises(errors.UsageError) as error:
    function(path)
  assert time.monotonic() - start < 2
  command = f"python -m minw.prepare --dataset=cifar10 --data_dir='{path}'"
  assert f"data_dir='{path}'" in str(error.value)
  assert str(error.value).endswith(command)


@pytest.mark.parametrize("data_dir, problem", [
    (None, "python -m minw.prepare --dataset=cifar10"),
    ("", "python -m minw.prepare --dataset=cifar10"),
    ("~nobody-has-this-name/data", "'~nobody-has-this-name' is no user's home")])
def test_a_data_dir_that_names_nothing_is_refused(data_dir, problem):
  with pytest.raises(errors.UsageError) as error:
    datasets.check_available("cifar10", data_dir)
  assert f"data_dir={data_dir!r}" in str(error.value)
  assert problem in str(error.value)


def damage(file: pathlib.Path, how: str) -> None:
  if how == "gone":
    file.unlink()
  elif how == "one byte changed":
    content = bytearray(file.read_bytes())
    content[10_000] ^= 1  # Within the images: the file ends in padding.
    file.write_bytes(content)
  else:
    size = file.stat().st_size
    os.truncate(file, {"empty": 0, "half": size // 2, "one byte short": size - 1}[how])


@pytest.mark.parametrize("how", ["gone", "empty", "half", "one byte short"])
@pytest.mark.parametrize("split", ["train", "test"])
def test_a_damaged_file_is_named(directory, tmp_path, how, split):
  file = directory / f"cifar10-{split}.array_record-00000-of-00001"
  damage(file, how)
  for function in (
      lambda: datasets.check_available("cifar10", tmp_path),
      lambda: datasets.load("cifar10", split, tmp_path),
  ):
    with pytest.raises(errors.UsageError) as error:
      function()
    assert f"{file} cannot be read" in str(error.value)
    assert "python -m minw.prepare --dataset=cifar10" in str(error.value)


def test_a_changed_byte_is_found(directory, tmp_path):
  file = directory / "cifar10-test.array_record-00000-of-00001"
  damage(file, "one byte changed")
  with pytest.raises(errors.UsageError, match="cannot be read") as error:
    datasets.load("cifar10", "test", tmp_path)
  assert str(file) in str(error.value)


@pytest.mark.parametrize("file", ["dataset_info.json", "features.json"])
@pytest.mark.parametrize("how", ["gone", "empty", "half"])
def test_a_damaged_description_is_reported(directory, tmp_path, file, how):
  damage(directory / file, how)
  with pytest.raises(errors.UsageError) as error:
    datasets.check_available("cifar10", tmp_path)
  assert str(directory) in str(error.value)


@pytest.mark.parametrize("key", ["pythonClassName", "python_class_name", "type"])
def test_a_description_imports_no_module(directory, tmp_path, monkeypatch, key):
  """TFDS would import it, and with it run what lies in the working directory."""
  monkeypatch.chdir(tmp_path)
  monkeypatch.syspath_prepend(tmp_path)
  (tmp_path / "hostile_module.py").write_text("open('trace', 'w')")
  description = directory / "features.json"
  features = json.loads(description.read_text())
  features["featuresDict"]["features"]["label"] = {
      key: "hostile_module.Feature", "content": {}}
  description.write_text(json.dumps(features))
  with pytest.raises(errors.UsageError, match="cannot be read .it names 'hostile_mod"):
    datasets.load("cifar10", "test", tmp_path)
  assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize("file", [
    "features.json", "dataset_info.json", "cifar10-test.array_record-00000-of-00001"])
@pytest.mark.parametrize("kind", ["pipe", "sparse"])
def test_files_that_never_end_are_refused(directory, tmp_path, file, kind):
  path, = directory.glob(file)
  path.unlink()
  if kind == "pipe":
    os.mkfifo(path)
  else:
    with open(path, "wb") as sparse:
      sparse.truncate(2**40)
  with pytest.raises(errors.UsageError, match=file):
    datasets.load("cifar10", "test", tmp_path)


@pytest.mark.parametrize("shape", [(1, 1, 3), (32, 32), (33, 32, 3), (32, 32, 4)])
def test_images_of_another_shape_are_refused(tmp_path, data, shape):
  images, labels = data["test"]
  others = [*images[1:], np.zeros(shape, np.uint8)]
  directory = write_tfds(tmp_path, "3.0.2", data | {"test": (others, labels)})
  with pytest.raises(errors.UsageError,
                     match="an image has .* pixels of mode") as error:
    datasets.load("cifar10", "test", tmp_path)
  assert str(directory / "cifar10-test.array_record") in str(error.value)


def test_tfrecord_files_are_refused(directory, tmp_path):
  description = directory / "dataset_info.json"
  content = json.loads(description.read_text())
  assert content["fileFormat"] == "array_record"
  description.write_text(json.dumps(content | {"fileFormat": "tfrecord"}))
  for file in directory.glob("*.array_record-*"):
    file.rename(str(file).replace("array_record", "tfrecord"))
  with pytest.raises(errors.UsageError, match="are tfrecord.*must be array_record"):
    datasets.check_available("cifar10", tmp_path)


def test_other_numbers_of_records_are_refused(tmp_path, data):
  data["train"] = random_records(5, 0)
  write_tfds(tmp_path, "3.0.2", data)
  with pytest.raises(errors.UsageError, match="'train': 5.*'train': 12"):
    datasets.check_available("cifar10", tmp_path)


def test_nothing_costly_is_imported(directory, tmp_path):
  # A TensorFlow that can be imported, so that it would be if anything tried to.
  (tmp_path / "path" / "tensorflow").mkdir(parents=True)
  (tmp_path / "path" / "tensorflow" / "__init__.py").touch()
  program = f"""
import sys
from minw.data import datasets
costly = {{"jax", "sklearn", "tensorflow_datasets", "PIL", "tensorflow"}}
assert not costly & sys.modules.keys(), costly & sys.modules.keys()
sizes = {{"train": {TRAIN}, "validation": {VALIDATION}, "test": {TEST}}}
datasets._INFOS["cifar10"] = datasets.info("cifar10")._replace(splits=sizes)
datasets.check_available("cifar10", {str(tmp_path)!r})
for split in sizes:
  datasets.load("cifar10", split, {str(tmp_path)!r})
assert not {{"jax", "tensorflow"}} & sys.modules.keys()
import tensorflow
"""
  path = os.pathsep.join([str(tmp_path / "path"), *filter(None, sys.path)])
  subprocess.run(
      [sys.executable, "-c", program], check=True,
      env=os.environ | {"PYTHONPATH": path})


def test_shapes_that_a_data_set_provides():
  digits, imagenet = datasets.info("digits"), datasets.info("imagenet2012")
  assert digits.provides((8, 8, 1)) and not digits.provides((7, 8, 1))
  assert imagenet.provides((64, 48, 3)) and not imagenet.provides((64, 48, 1))
  assert digits.resized(5) == digits
  assert imagenet.resized(5) == imagenet._replace(image_shape=(5, 5, 3))
