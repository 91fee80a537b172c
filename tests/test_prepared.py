"""minw.data.datasets on directories that TFDS wrote and minw does not know by name."""

import json
import logging
import os
import pickle
import sys

import jax
import numpy as np
import pytest

from minw import config as config_lib
from minw import errors
from minw import evaluate
from minw import packed
from minw.data import datasets
from minw.data import resident
from minw.data import sources
from minw.data import streamed
from minw.data import tfds_directory
from minw.experiment import Experiment
import own_images
from own_images import write_tfds


def values(name, split, data_dir):
  """The value of each image of a split, which numbers it; checks labels, too."""
  images, labels = datasets.load(name, split, data_dir)
  found = images[:, 0, 0, 0] // 10
  assert (images == (10 * found)[:, None, None, None]).all()
  np.testing.assert_array_equal(labels, found % 3)
  return found.tolist()


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
  """Stand-ins for MNIST, SVHN, Tiny ImageNet, and data with training images alone."""
  folder = tmp_path_factory.mktemp("prepared")
  write_tfds(folder, "mnist", (28, 28, 1), {"train": 20, "test": 6})
  write_tfds(folder, "svhn_cropped", (32, 32, 3), {"train": 11, "test": 5, "extra": 4},
             keys=("picture", "digit"))
  write_tfds(folder, "tiny_imagenet", (64, 64, 3), {"train": 12, "validation": 7})
  write_tfds(folder, "alone", (8, 9, 3), {"train": 20})
  write_tfds(folder, "sizes", (None, None, 1), {"train": 9, "validation": 3, "test": 3})
  return folder


@pytest.mark.parametrize("name, shape, sizes", [
    ("mnist", (28, 28, 1), (18, 2, 6)), ("svhn_cropped", (32, 32, 3), (9, 2, 5)),
    ("tiny_imagenet", (64, 64, 3), (10, 2, 7)), ("alone", (8, 9, 3), (16, 2, 2))])
def test_what_tfds_wrote_is_a_data_set(data_dir, name, shape, sizes):
  info = datasets.info(name, data_dir)
  assert info.name == name and info.image_shape == shape and not info.streamed
  assert info.label_names == ("class 0", "class 1", "class 2")
  assert tuple(info.splits.values()) == sizes
  datasets.check_available(name, data_dir)
  found = {split: values(name, split, data_dir) for split in info.splits}
  assert tuple(map(len, found.values())) == sizes
  # Nothing is in two splits that come from the same records.
  cut = found["train"] + found["validation"] + (
      found["test"] if name == "alone" else [])
  assert sorted(cut) == list(range(len(cut)))
  # Validation is the end of TFDS's order.
  import tensorflow_datasets as tfds
  source = tfds.builder_from_directory(
      tfds_directory.newest_version(name, data_dir)).as_data_source("train")
  key = "picture" if name == "svhn_cropped" else "image"
  assert [record[key][0, 0, 0] // 10 for record in source] == cut
  # The mean is that of the training images.
  expected = np.repeat(np.array(found["train"]) * 10 / 255, 2)
  assert info.mean == pytest.approx([expected.mean()] * shape[-1])
  assert info.std == pytest.approx([expected.std()] * shape[-1])


def test_splits_that_are_made_are_said(data_dir, caplog):
  caplog.set_level(logging.INFO, logger="minw")
  datasets.check_available("alone", data_dir)
  datasets.check_available("sizes", data_dir)
  assert [record.getMessage() for record in caplog.records] == [
      "alone has no split named validation: records 16 to 17 of its split train are"
      " used", "alone has no split named test: records 18 to 19 of its split train are"
      " used"]


def test_images_with_alpha_are_put_on_black(tmp_path, monkeypatch):
  """TFDS keeps the files of some data sets as they are."""
  pixels = np.full((8, 8, 4), (200, 100, 50, 255), np.uint8)
  pixels[0, 0, 3] = 0
  png = own_images.png
  monkeypatch.setattr(own_images, "png", lambda _: png(pixels))
  write_tfds(tmp_path, "some", (8, 8, 3), {"train": 9})
  images, _ = datasets.load("some", "train", tmp_path)
  assert images[0, 0, 0].tolist() == [0, 0, 0]
  assert images[6, 5, 4].tolist() == [200, 100, 50]


def experiment(data_dir, name, **changes):
  c = config_lib.default_config("digits")
  c.update(dataset=name, data_dir=str(data_dir), conv_widths=(4,), dense_widths=(),
           batch_size=4, eval_batch_size=4, **changes)
  return Experiment(c)


def test_small_data_are_in_memory_and_large_ones_are_streamed(data_dir, monkeypatch):
  assert type(experiment(data_dir, "mnist").data) is resident.Resident
  monkeypatch.setattr(datasets, "_LARGEST_IN_MEMORY", 26 * 28 * 28)
  assert not datasets.info("mnist", data_dir).streamed
  monkeypatch.setattr(datasets, "_LARGEST_IN_MEMORY", 26 * 28 * 28 - 1)
  source = experiment(data_dir, "mnist", eval_resize=28, crop_size=20).data
  assert type(source) is streamed.Streamed
  data = source.load("train")
  batches = source.train_batches(data, 0)
  examples, order = next(batches)
  batches.close()
  assert examples.images.shape == (4, 20, 20, 1) and order is None
  images, labels, mask = source.eval_inputs(
      next(source.eval_batches(source.load("test")))[0], 0)
  assert images.shape == (4, 20, 20, 1) and mask.all()
  assert len(np.unique(images)) == 4  # One value in each.


def test_a_config_says_what_is_in_memory(data_dir, tmp_path):
  held = experiment(data_dir, "mnist", in_memory="true")
  assert type(held.data) is resident.Resident
  found = experiment(
      data_dir, "mnist", in_memory="false", crop_size=20, eval_resize=0)
  assert type(found.data) is streamed.Streamed and found.info.image_shape == (20, 20, 1)
  # Both evaluate the same centers.
  test = found.data.load("test")
  images, labels, _ = found.data.eval_inputs(next(found.data.eval_batches(test))[0], 0)
  held = experiment(data_dir, "mnist", in_memory="auto", crop_size=20)
  expected = held.data.eval_inputs(held.data.load("test"), 0)
  np.testing.assert_array_equal(images, expected[0])
  np.testing.assert_array_equal(labels, expected[1])

  for name, changes, message in [
      ("sizes", dict(in_memory="true"), "in_memory='true': must be auto or false: "
       "the images of sizes differ in size"),
      ("digits", dict(in_memory="false"), "in_memory='false': must be auto or true: "
       "the digits are in no file that could be streamed"),
      ("mnist", dict(in_memory="false", eval_resize=29),
       "eval_resize=29: must be at most 28, the image of mnist; 0 keeps its size"),
      ("mnist", dict(in_memory="false", eval_resize=0, crop_size=29),
       "crop_size=29: must be at most 28, the image of mnist"),
      ("mnist", dict(in_memory="false", train_examples=4), "train_examples=4: must")]:
    with pytest.raises(errors.UsageError) as error:
      experiment(data_dir, name, **changes)
    assert str(error.value).startswith(f"config.{message}")


def test_data_in_memory_must_fit(data_dir, monkeypatch):
  monkeypatch.setattr(datasets, "available_memory", lambda: 26 * 28 * 28)
  assert not datasets.info("mnist", data_dir, "true").streamed
  monkeypatch.setattr(datasets, "available_memory", lambda: 26 * 28 * 28 - 1)
  with pytest.raises(errors.UsageError) as error:
    experiment(data_dir, "mnist", in_memory="true")
  assert str(error.value) == (
      "config.in_memory='true': must be auto or false: the images of mnist take 20384"
      " bytes, and 20383 bytes of memory are available")
  assert not datasets.info("mnist", data_dir, "auto").streamed


@pytest.mark.skipif(sys.platform != "linux", reason="Linux says what is available")
def test_available_memory_is_a_part_of_all():
  room = datasets.available_memory()
  assert room is not None
  assert 0 < room <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def test_a_packed_network_takes_images_as_it_was_trained(data_dir, tmp_path):
  """If its data were streamed, they were brought to another size."""
  weights = np.random.default_rng(0).choice([-1, 1], (3, 20, 20, 1)).astype(np.int8)
  for in_memory in ("false", "auto", "everywhere"):
    packed.write(tmp_path / f"{in_memory}.minw", packed.Program(
        (20, 20, 1), (20, 20), np.zeros(1, np.uint8), 3,
        (packed.Conv("fc", 0, 1, weights),
         packed.Logits("norm", 1, 1.0, *np.ones((3, 3), np.float32))),
        {"config": {"dataset": "mnist", "in_memory": in_memory, "eval_resize": 0}}))
  found = evaluate.evaluate_model(str(tmp_path / "false.minw"), data_dir=str(data_dir))
  sums = weights.sum((1, 2, 3)) * (10 * np.arange(6))[:, None]
  assert found["accuracy"] == np.mean(sums.argmax(1) == np.arange(6) % 3)
  for in_memory in ("auto", "everywhere"):
    with pytest.raises(errors.UsageError, match="one of images of shape"):
      evaluate.evaluate_model(
          str(tmp_path / f"{in_memory}.minw"), data_dir=str(data_dir))


def test_other_splits_of_data_sets_that_come_with_minw(tmp_path, monkeypatch):
  """They are of another data set, except for ImageNet's images without labels."""
  monkeypatch.setitem(datasets._INFOS, "cifar10", datasets.info("cifar10")._replace(
      splits={"train": 8, "validation": 2, "test": 3}))
  write_tfds(tmp_path / "a", "cifar10", (32, 32, 3), {"train": 10, "test": 3})
  assert len(datasets.open_records("cifar10", "train", tmp_path / "a")) == 8
  write_tfds(tmp_path / "b", "cifar10", (32, 32, 3), {
      "train": 10, "test": 3, "extra": 4})
  with pytest.raises(errors.UsageError, match="'extra': 4.* and must hold"):
    datasets.open_records("cifar10", "train", tmp_path / "b")
  write_tfds(tmp_path, "imagenet2012", (None, None, 3), {
      "train": 20, "validation": 5, "test": 3})
  assert datasets.info("imagenet2012", tmp_path).splits == {
      "train": 18, "validation": 2, "test": 5}
  assert len(datasets.open_records("imagenet2012", "test", tmp_path)) == 5


def test_images_of_different_sizes_are_streamed(data_dir):
  info = datasets.info("sizes", data_dir)
  assert info.streamed and info.image_shape == (256, 256, 1)
  # Larger images count for more: the i-th has (5 + 2i)^2 pixels of 10i.
  pixels = np.concatenate([np.full((5 + 2 * i)**2, 10 * i) for i in range(9)]) / 255
  assert info.mean == pytest.approx([pixels.mean()])
  source = experiment(data_dir, "sizes", eval_resize=6, crop_size=4).data
  found = source.source_images("test")
  assert found.shape == (3, 6, 6, 1) and sorted(found[:, 0, 0, 0]) == [0, 10, 20]
  packed = list(sources.source_batches(
      info, "test", data_dir, 2, image_shape=(6, 7, 1), shrink=True, workers=0,
      max_damaged=0))
  assert [batch.images.shape for batch in packed] == [(2, 6, 7, 1)] * 2


def test_a_batch_in_memory_is_normalized_by_the_mean(data_dir):
  source = experiment(data_dir, "tiny_imagenet", crop_size=64, random_flip=False).data
  data = source.load("train")
  examples, order = next(source.train_batches(data, 0))
  images, labels = source.train_inputs(examples, order, 0, jax.random.key(0))
  mean = round(255 * source.info.mean[0])
  found = np.asarray(images)[:, 0, 0, 0] * 64 + mean
  np.testing.assert_array_equal(found // 10 % 3, labels)


def test_classes_are_counted(data_dir, monkeypatch):
  """In memory and streamed, in parts, and up to the training images that are used."""
  monkeypatch.setattr(datasets, "_COUNTED", 4)
  assert experiment(data_dir, "mnist").class_weights is None
  for name in ("mnist", "svhn_cropped", "sizes"):
    info = datasets.info(name, data_dir)
    records = datasets.open_records(name, "train", data_dir)
    labels = [records[i]["label"] for i in range(len(records))]
    for size in (5, info.splits["train"]):
      part = info._replace(splits=info.splits | {"train": size})
      expected = [labels[:size].count(i) for i in range(3)]
      assert datasets.class_counts(part, data_dir).tolist() == expected
  found = experiment(data_dir, "mnist", train_examples=5, class_weights="balanced")
  labels = datasets.load("mnist", "train", data_dir)[1][:5]
  assert np.mean([found.class_weights[label] for label in labels]) == pytest.approx(1)


def test_records_travel_to_workers(data_dir):
  records = datasets.open_records("svhn_cropped", "test", data_dir)
  copy = pickle.loads(pickle.dumps(records))
  assert len(copy) == 5 and copy[2] == records[2] and records[2].keys() == {
      "image", "label"}
  assert copy.__getitems__([4, 1]) == [records[4], records[1]]


def test_an_unknown_name_is_compared_with_all(data_dir):
  with pytest.raises(errors.UsageError, match="'mnits'.*did you mean 'mnist'"):
    datasets.info("mnits", data_dir)
  assert datasets.exists("mnist", data_dir) and not datasets.exists("mnist", None)
  assert not datasets.exists("../prepared/mnist", data_dir)
  assert tfds_directory.names(data_dir) == [
      "alone", "mnist", "sizes", "svhn_cropped", "tiny_imagenet"]
  assert tfds_directory.names(data_dir / "nowhere") == []


def test_a_config_names_it(data_dir):
  c = config_lib.default_config("digits")
  c.update(dataset="mnist", data_dir=str(data_dir), crop_size=29)
  with pytest.raises(errors.UsageError, match="crop_size=29: must be at most 28, the "
                                              "image of mnist"):
    config_lib.validate(c)
  c.update(crop_size=28, train_examples=19)
  with pytest.raises(errors.UsageError, match="at most 18, the training examples of"):
    config_lib.validate(c)
  c.update(train_examples=0, dataset="mnits")
  with pytest.raises(errors.UsageError, match="config.dataset='mnits': must be one of"):
    config_lib.validate(c)


def changed(directory, file, change):
  described = json.loads((directory / file).read_text())
  change(described)
  (directory / file).write_text(json.dumps(described))


def feature(described, key):
  return described["featuresDict"]["features"][key]


@pytest.mark.parametrize("change, message", [
    (lambda d: d["featuresDict"]["features"].pop("label"), "it has 0 features of the "
     "kind ClassLabel and must have one"),
    (lambda d: d["featuresDict"]["features"].update(more=feature(d, "image")),
     "it has 2 features of the kind Image"),
    (lambda d: feature(d, "image")["image"].update(dtype="uint16"), "are uint16"),
    (lambda d: feature(d, "image")["image"]["shape"].update(dimensions=["8", "8", "4"]),
     "have 4 channels"),
    (lambda d: feature(d, "image").update(pythonClassName="os.path"), "'os.path'"),
    (lambda d: feature(d, "label")["classLabel"].update(numClasses="4"),
     "label.labels.txt has 3 names for 4 classes"),
    (lambda d: feature(d, "label")["classLabel"].update(numClasses=str(10**12)),
     "it has 1000000000000 classes"),
    (lambda d: d.clear(), "cannot be read"),
])
def test_other_features_are_refused(tmp_path, change, message):
  directory = write_tfds(tmp_path, "some", (8, 8, 3), {"train": 9})
  changed(directory, "features.json", change)
  with pytest.raises(errors.UsageError) as error:
    datasets.info("some", tmp_path)
  assert f"{directory} is unusable: " in str(error.value)
  assert message in str(error.value) and "--source=FOLDER" in str(error.value)


@pytest.mark.parametrize("sizes, message", [
    ({"train": 1}, "no images for train"), ({"train": 9, "test": 0}, "for test"),
    ({"test": 9}, "'train'")])
def test_too_few_records_are_refused(tmp_path, sizes, message):
  # TFDS does not write empty splits: the description is changed.
  directory = write_tfds(tmp_path, "some", (8, 8, 3), {"train": 9, "test": 1})
  changed(directory, "dataset_info.json", lambda described: described.update(splits=[
      split | {"name": name, "shardLengths": [str(count)]} for split, (name, count)
      in zip(described["splits"], sizes.items())]))
  with pytest.raises(errors.UsageError, match=message):
    datasets.info("some", tmp_path)


@pytest.mark.parametrize("metadata", [
    {"mean": [0.5], "std": [0.5]}, {"mean": [0.5] * 3, "std": [0.0] * 3},
    {"mean": [2.0] * 3, "std": [0.5] * 3}, {"mean": ["x"] * 3, "std": [0.5] * 3}])
def test_statistics_that_cannot_be_are_refused(tmp_path, metadata):
  directory = write_tfds(tmp_path, "some", (8, 8, 3), {"train": 9})
  (directory / "metadata.json").write_text(json.dumps(metadata))
  with pytest.raises(errors.UsageError, match="its description cannot be read"):
    datasets.info("some", tmp_path)
  (directory / "metadata.json").write_text('{"else": 1}')
  assert datasets.info("some", tmp_path).splits["train"] == 7


def test_labels_beyond_the_classes_are_refused(tmp_path):
  directory = write_tfds(tmp_path, "some", (8, 8, 3), {"train": 9})
  changed(directory, "features.json",
          lambda d: feature(d, "label")["classLabel"].update(numClasses="2"))
  (directory / "label.labels.txt").write_text("a\nb\n")
  with pytest.raises(errors.UsageError, match="has labels from 0 to 2 of 2 classes"):
    datasets.load("some", "train", tmp_path)
