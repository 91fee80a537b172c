"""minw.data.sources: which class makes the batches, and what both have in common."""

import inspect

import jax
import numpy as np
import pytest

from image_records import records
from minw import config as config_lib
from minw.data import batches
from minw.data import datasets
from minw.data import resident
from minw.data import sources
from minw.data import streamed
from minw.experiment import Experiment

METHODS = [name for name in vars(batches.Source) if not name.startswith("_")]


def experiment(dataset):
  c = config_lib.default_config(dataset)
  c.update(dataset=dataset, crop_size=8, conv_widths=(4,), dense_widths=(),
           batch_size=4, eval_batch_size=4)
  if dataset == "imagenet2012":
    c.eval_resize = 10
  return Experiment(c)


@pytest.mark.parametrize("implementation", [resident.Resident, streamed.Streamed])
def test_both_classes_have_one_interface(implementation):
  assert METHODS == ["load", "train_batches", "train_inputs", "eval_batches",
                     "eval_inputs", "abstract_batch", "source_images", "report"]
  for name in METHODS:
    wanted = inspect.signature(getattr(batches.Source, name)).parameters
    found = inspect.signature(getattr(implementation, name)).parameters
    assert list(found) == list(wanted), name
  others = {name for name in vars(implementation) if not name.startswith("_")}
  assert others == set(METHODS)


def test_digits_stay_on_the_devices():
  source = experiment("digits").data
  assert type(source) is resident.Resident
  data = source.load("train")
  shapes = lambda tree: jax.tree.map(
      lambda leaf: (leaf.shape, leaf.dtype, leaf.sharding), tree)
  assert shapes(next(source.train_batches(data, 0))) == shapes(source.abstract_batch())
  assert source.report(data) == {}
  images, _ = datasets.load("digits", "test", None)
  np.testing.assert_array_equal(source.source_images("test"), images)


def test_imagenet_is_streamed(monkeypatch):
  files = records(9)
  monkeypatch.setattr(datasets, "open_records", lambda *_: files)
  source = experiment("imagenet2012").data
  assert type(source) is streamed.Streamed
  data = source.load("train")
  iterator = source.train_batches(data, 3)
  examples, order = next(iterator)
  iterator.close()
  abstract, _ = source.abstract_batch()
  assert order is None and abstract.images.shape == (4, 8, 8, 3)
  for array, wanted in zip(examples, abstract):
    assert (array.shape, array.dtype) == (wanted.shape, wanted.dtype)
    assert array.sharding == wanted.sharding
  # The same batch from the split itself, with the config's values.
  with_values = data.random_crops(
      3, seed=0, batch_size=4, crop_size=8, crop_scale=(0.08, 1.0), flip=True)
  expected = next(with_values)
  with_values.close()
  np.testing.assert_array_equal(examples.images, expected.images)
  inputs, labels = source.train_inputs(examples, None, 0, jax.random.key(0))
  np.testing.assert_array_equal(labels, expected.labels)
  np.testing.assert_array_equal(
      inputs, (expected.images - np.array([124.0, 116, 104])) / 64)
  assert source.report(data) == {"damaged": 0, "decode_rate": data.decode_rate}
  # Images of 20 x 16 with an edge in the middle, brought to 10 x 10.
  images = source.source_images("test")
  assert images.shape == (9, 10, 10, 3) and images.dtype == np.uint8
  assert (images[:, :, :4, 2] == 255).all() and (images[:, :, 6:, 2] == 0).all()


def test_packed_networks_see_every_example_in_order(monkeypatch):
  options = dict(shrink=True, workers=0, max_damaged=0.2)
  digits = list(sources.source_batches(
      datasets.info("digits"), "test", None, 256, image_shape=(8, 8, 1), **options))
  assert [len(batch.labels) for batch in digits] == [256, 360 - 256]
  for found, wanted in zip(zip(*digits), datasets.load("digits", "test", None)):
    np.testing.assert_array_equal(np.concatenate(found), wanted)

  files = records(6, damaged=(2,))
  monkeypatch.setattr(datasets, "open_records", lambda *_: files)
  info = datasets.info("imagenet2012")
  found = list(sources.source_batches(
      info, "test", None, 4, image_shape=(8, 10, 3), **options))
  assert [batch.images.shape for batch in found] == [(4, 8, 10, 3)] * 2
  assert np.concatenate([batch.labels for batch in found]).tolist() == [
      500, 501, -1, 503, 504, 505, -1, -1]
