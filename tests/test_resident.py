"""minw.data.resident: images whose pixels say where they come from, against NumPy."""

import hashlib
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minw import config as config_lib
from minw import train_step
from minw.data import batches
from minw.data import datasets
from minw.data import pixels as pixels_lib
from minw.data import resident
from minw.experiment import Experiment

RAW = pixels_lib.Pixels((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
IN_MEMORY = ("digits", "cifar10", "cifar100")


def coded_data(count, height, width):
  """Pixels are (row, column, example); labels 3 * example + 1."""
  example, row, column = np.indices((count, height, width))
  images = np.stack([row, column, example], axis=-1).astype(np.uint8)
  return on_device(images, np.arange(count, dtype=np.int32) * 3 + 1)


def on_device(images, labels):
  return batches.Examples(*jax.device_put((images, labels)))


def random_crops(data, order, position, key, **options):
  """`resident.random_crops` as one program, which compiles faster than its parts."""
  return jax.jit(lambda *arrays: resident.random_crops(*arrays, **options))(
      data, order, position, key)


def centre_crops(data, start, **options):
  """`resident.centre_crops` as one program."""
  return jax.jit(lambda *arrays: resident.centre_crops(*arrays, **options))(data, start)


def pixels_of(name, kind="integer"):
  info = datasets.info(name)
  return pixels_lib.pixels(kind, info.mean, info.std)


def test_epoch_order_is_a_permutation_of_its_own():
  orders = {(seed, epoch): np.asarray(resident.epoch_order(seed, epoch, 1_000))
            for seed in (0, 1, 2**32 - 1) for epoch in (0, 1, 199)}
  for one in orders.values():
    assert one.dtype == np.int32
    assert np.sort(one).tolist() == list(range(1_000))
  rows = [*orders.values(), np.arange(1_000)]
  for i, one in enumerate(rows):
    for other in rows[:i]:
      assert (one == other).mean() < 0.02  # One place in a thousand is expected.
  traced = jax.jit(lambda epoch: resident.epoch_order(2**32 - 1, epoch, 1_000))
  np.testing.assert_array_equal(traced(199), orders[2**32 - 1, 199])


def crops_of(padded, size):
  """Every crop of an image and its mirror image: {(top, left, flipped): crop}."""
  tops, lefts = (n - size + 1 for n in padded.shape[:2])
  result = {}
  for top in range(tops):
    for left in range(lefts):
      crop = padded[top:top + size, left:left + size]
      result[top, left, False], result[top, left, True] = crop, crop[:, ::-1]
  return result


def pad(image, amount, fill):
  padded = np.empty((image.shape[0] + 2 * amount, image.shape[1] + 2 * amount, 3))
  padded[...] = fill
  padded[amount:-amount or None, amount:-amount or None] = image
  return padded


def crop_taken(image, candidates):
  """Which of the crops `image` is; there must be one, and no other."""
  found = [where for where, crop in candidates.items() if (image == crop).all()]
  assert len(found) == 1
  return found[0]


@pytest.mark.parametrize("padding", [0, 2])
@pytest.mark.parametrize("flip", [False, True])
def test_random_crops_are_crops_and_flips_of_the_right_examples(padding, flip):
  data, size = coded_data(23, 5, 7), 4
  pixels = pixels_lib.Pixels((200.0, 201.0, 202.0), (2.0, 4.0, 8.0))
  order = jnp.asarray(np.random.default_rng(0).permutation(23), jnp.int32)
  step = jax.jit(lambda position, key: resident.random_crops(
      data, order, position, key, batch_size=6, crop_size=size, crop_padding=padding,
      flip=flip, pixels=pixels))
  candidates = [crops_of(pad(image, padding, pixels.offset), size)
                for image in np.asarray(data.images)]
  seen = set()
  for position in range(3):
    for seed in range(8):
      images, labels = step(position, jax.random.key(10 * position + seed))
      assert images.shape == (6, size, size, 3) and images.dtype == jnp.float32
      assert labels.shape == (6,) and labels.dtype == jnp.int32
      of = order[6 * position:6 * position + 6]
      np.testing.assert_array_equal(labels, 3 * of + 1)
      raw = np.asarray(images, np.float64) * pixels.divisor + pixels.offset
      seen |= {crop_taken(image, candidates[i]) for image, i in zip(raw, of)}
  assert {flipped for _, _, flipped in seen} == ({False, True} if flip else {False})
  assert len(seen) > 0.7 * (2 + 2 * padding) * (4 + 2 * padding) * (1 + flip)


def test_crops_and_flips_are_uniform():
  # 7 x 8 corners, flipped or not: 112 outcomes, each 100 times in 11,200.
  data, size, padding, count = coded_data(1, 6, 7), 4, 2, 11_200
  images, _ = random_crops(
      data, jnp.zeros(count, jnp.int32), 0, jax.random.key(0), batch_size=count,
      crop_size=size, crop_padding=padding, flip=True,
      pixels=pixels_lib.Pixels((50.0, 50.0, 50.0), (1.0, 1.0, 1.0)))
  raw = np.asarray(images, np.uint8) + np.uint8(50)
  keys = {crop.astype(np.uint8).tobytes(): where for where, crop in crops_of(
      pad(np.asarray(data.images[0]), padding, 50), size).items()}
  counts = np.zeros((7, 8, 2))
  for image in raw:
    top, left, flipped = keys[image.tobytes()]
    counts[top, left, int(flipped)] += 1
  assert len(keys) == counts.size == 112
  # Chi-squared, 111 degrees of freedom: over 175 in one of 10,000 cases.
  assert ((counts - 100)**2 / 100).sum() < 175
  # Half of them flipped, to five standard deviations of 53.
  assert abs(counts[..., 1].sum() - 5_600) < 265
  assert counts[[0, 0, -1, -1], [0, -1, 0, -1]].min() > 50  # The corners too.


@pytest.mark.parametrize("name", IN_MEMORY)
def test_padding_is_zero(name):
  height, width, channels = datasets.info(name).image_shape
  data = on_device(np.full((1, height, width, channels), 255, np.uint8),
                   np.zeros(1, np.int32))
  for kind, limit in (("integer", 0.0), ("standardized", 0.5 / (255 * 0.2435))):
    images, _ = resident.random_crops(
        data, jnp.zeros(64, jnp.int32), 0, jax.random.key(1), batch_size=64,
        crop_size=height, crop_padding=3, flip=True, pixels=pixels_of(name, kind))
    images = np.asarray(images)
    border = images[images < images.max(axis=(0, 1, 2)) * 0.9]
    assert 0.05 < border.size / images.size < 0.6
    assert np.abs(border).max() <= limit  # Standardized: to half a pixel's step.


def test_keys_decide():
  data, order = coded_data(16, 6, 6), jnp.arange(16, dtype=jnp.int32)
  crops = jax.jit(lambda key: resident.random_crops(
      data, order, 0, key, batch_size=16, crop_size=4, crop_padding=0, flip=True,
      pixels=RAW)[0])
  batch = lambda seed: np.asarray(crops(jax.random.key(seed)))
  np.testing.assert_array_equal(batch(3), batch(3))
  assert not (batch(3) == batch(4)).all()
  # Neither examples nor batches share their corners or flips.
  corners = {tuple(image[0, [0, -1], :2].ravel()) for image in batch(3)}
  assert len(corners) > 4
  flips = {tuple(batch(seed)[:, 0, 0, 1] > batch(seed)[:, 0, -1, 1]) for seed in (3, 4)}
  assert len(flips) == 2 and all(0 < sum(of_batch) < 16 for of_batch in flips)


@pytest.mark.parametrize("shape, size, top, left", [
    ((32, 32), 24, 4, 4), ((32, 32), 32, 0, 0), ((32, 32), 25, 3, 3), ((8, 8), 7, 0, 0),
    ((9, 6), 4, 2, 1), ((7, 10), 4, 1, 3), ((33, 32), 24, 4, 4)])
def test_the_centre_is_evaluated(shape, size, top, left):
  data = coded_data(2, *shape)
  images, labels, mask = centre_crops(
      data, 0, batch_size=2, crop_size=size, pixels=RAW)
  assert images.shape == (2, size, size, 3) and images.dtype == jnp.float32
  for i, image in enumerate(np.asarray(images)):
    assert image[0, 0].tolist() == [top, left, i]
    assert image[-1, -1].tolist() == [top + size - 1, left + size - 1, i]
    np.testing.assert_array_equal(
        image, data.images[i, top:top + size, left:left + size])
  assert labels.tolist() == [1, 4] and mask.tolist() == [True, True]


@pytest.mark.parametrize("count, size", [(10, 4), (8, 4), (3, 4), (1, 1), (9, 8)])
def test_every_example_is_evaluated_once(count, size):
  data = coded_data(count, 4, 4)
  step = jax.jit(lambda start: resident.centre_crops(
      data, start, batch_size=size, crop_size=2, pixels=pixels_of("cifar10")))
  seen = []
  for start in range(0, count, size):
    images, labels, mask = map(np.asarray, step(start))
    assert mask.dtype == bool and mask.shape == (size,)
    left = min(size, count - start)
    assert mask.tolist() == [True] * left + [False] * (size - left)
    examples = images[:, 0, 0, 2] * 64 + 114  # round(255 * 0.4465)
    np.testing.assert_array_equal(labels, 3 * examples + 1)
    seen += examples[mask].tolist()
  assert seen == list(range(count))


def small_config(**changes):
  c = config_lib.default_config()
  c.update(dataset="digits", crop_size=7, crop_padding=2, random_flip=True,
           conv_widths=(), dense_widths=(), batch_size=64, eval_batch_size=64, seed=5)
  c.update(changes)
  return c


def test_batch_t_is_a_function_of_seed_and_step(monkeypatch):
  experiment = Experiment(small_config())
  # What the step returns here is not the state that out_shardings describe.
  experiment.jit = lambda function, out_shardings=None, **options: jax.jit(
      function, **options)
  data = experiment.data.load("train")
  monkeypatch.setattr(train_step, "update", lambda experiment, state, *batch: (
      state._replace(step=state.step + 1), batch))
  step_and_batch = train_step.make_train_step(experiment)

  def batch_at(step, then=1):
    state = train_step.TrainState(jnp.int32(step), (), (), (), (), ())
    for t in range(step, step + then):
      # Each asks anew, in whatever place of an epoch it starts.
      place = next(experiment.data.train_batches(data, t))
      state, batch = step_and_batch(state, *place)
    assert int(state.step) == step + then
    return [np.asarray(part) for part in (*batch[:2], jax.random.key_data(batch[2]))]

  for got, want in zip(batch_at(0, then=22), batch_at(21)):
    np.testing.assert_array_equal(got, want)
  images, labels, key = batch_at(21)
  # The third batch of the second epoch of 19.
  of = np.asarray(resident.epoch_order(5, 1, 1_257))[128:192]
  digits = np.asarray(data.images)[of]
  np.testing.assert_array_equal(labels, np.asarray(data.labels)[of])
  assert images.shape == (64, 7, 7, 1)
  flips, digits = 0, (digits - 78.0) / 64
  for image, digit in zip(images, digits):
    found = [where for where, crop in crops_of(np.pad(
        digit, ((2, 2), (2, 2), (0, 0))), 7).items() if (image == crop).all()]
    assert found
    flips += found[0][2]
  assert 16 < flips < 48
  # The estimator's noise is another at each step, as are the batches.
  for step in (20, 22):
    other = batch_at(step)
    assert not (other[0] == images).all() and not (other[2] == key).all()
  assert not (batch_at(21 + 19)[1] == labels).all()  # Another epoch's order.


_ON_DEVICES = """
import hashlib, json, os
import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from minw.data import augment, batches, datasets, resident
from minw.data import pixels as pixels_lib

assert len(jax.devices()) == 4
data = batches.Examples(*datasets.load("digits", "train", None))
info = datasets.info("digits")
pixels = pixels_lib.pixels("integer", info.mean, info.std)
epoch_order = resident.epoch_order(3, 2, 1257)
augmentation = augment.Augmentation(*json.loads(os.environ["AUGMENTATION"]))
result = {}
for count in (1, 2, 4):
  mesh = jax.make_mesh((count,), ("data",), axis_types=(AxisType.Auto,),
                       devices=jax.devices()[:count])
  replicated = NamedSharding(mesh, PartitionSpec())
  sharded = NamedSharding(mesh, PartitionSpec("data"))
  here, order = jax.device_put((data, epoch_order), replicated)
  train = jax.jit(lambda data, order, position, key: resident.random_crops(
      data, order, position, key, batch_size=64, crop_size=6, crop_padding=1, flip=True,
      pixels=pixels, augmentation=augmentation, sharding=sharded))
  evaluate = jax.jit(lambda data, start: resident.centre_crops(
      data, start, batch_size=64, crop_size=6, pixels=pixels, sharding=sharded))
  batches = [train(here, order, t, jax.random.key(t)) for t in (0, 7)]
  batches.append(evaluate(here, 1216))
  for images, *_ in batches:
    assert len(images.sharding.device_set) == count, images.sharding
    assert images.addressable_shards[0].data.shape[0] == 64 // count
  result[count] = [hashlib.sha256(np.asarray(part).tobytes()).hexdigest()
                   for part in jax.tree.leaves(batches)]
print(json.dumps(result))
"""


def batches_on_devices(command, *amounts):
  """Checksums of augmented batches by the number of devices."""
  flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=4"
  code, out, err = command("on_devices", code=_ON_DEVICES, env={
      "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "AUGMENTATION": json.dumps(amounts)})
  assert code == 0, err
  return json.loads(out)


@pytest.mark.slow
def test_augmented_batches_are_the_same_on_any_number_of_devices(command):
  by_count = batches_on_devices(command, 10.0, 0.1, 0.1, 0.5, 0.2, 1.0)
  assert len(set(by_count["1"])) == 11  # Labels and shares of both batches, too.
  assert by_count["2"] == by_count["4"] == by_count["1"]


def test_batches_are_the_same_on_any_number_of_devices(command):
  by_count = batches_on_devices(command)
  data = on_device(*datasets.load("digits", "train", None))
  order = resident.epoch_order(3, 2, 1_257)
  batches = [random_crops(
      data, order, t, jax.random.key(t), batch_size=64, crop_size=6, crop_padding=1,
      flip=True, pixels=pixels_of("digits")) for t in (0, 7)]
  batches.append(centre_crops(
      data, 1_216, batch_size=64, crop_size=6, pixels=pixels_of("digits")))
  here = [hashlib.sha256(np.asarray(part).tobytes()).hexdigest()
          for batch in batches for part in batch]
  assert len(set(here)) == 7
  assert by_count == {"1": here, "2": here, "4": here}
