"""minw.data.augment: against values worked out by hand and in NumPy."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minw.data import augment
from minw.data import batches
from minw.data import datasets
from minw.data import pixels as pixels_lib
from minw.data import resident
from minw.data import streamed
from minw.data.augment import Augmentation

FILL = (100, 120, 140)
pytestmark = pytest.mark.usefixtures("strict")


def images_of(count, size=8, seed=0):
  return np.random.default_rng(seed).integers(
      0, 256, (count, size, size, 3), np.uint8)


def augmented(images, seed=0, **amounts):
  """`augment.augment` of these images, whose labels count from 0."""
  labels = jnp.arange(len(images), dtype=jnp.int32)
  return jax.tree.map(np.asarray, jax.jit(lambda images, key: augment.augment(
      images, labels, key, Augmentation(**amounts), FILL))(
          jnp.asarray(images), jax.random.key(seed)))


def rotated(images, corners, size, degrees):
  return np.asarray(jax.jit(lambda *arrays: augment.rotate(
      arrays[0], arrays[1], size, arrays[2], FILL))(
          jnp.asarray(images), jnp.asarray(corners, jnp.int32),
          jnp.radians(jnp.asarray(degrees, jnp.float32))))


def test_quarter_turns():
  images, corners = images_of(4, 5), np.zeros((4, 2))
  found = rotated(images, corners, 5, [0, 90, 180, -90])
  for turns, image, result in zip((0, 1, 2, 3), images, found):
    np.testing.assert_array_equal(result, np.rot90(image, turns))


def bilinear(image, row, column):
  """The value at a place between pixels, in float64; outside are those of `FILL`."""
  total = np.zeros(3)
  for i in (math.floor(row), math.floor(row) + 1):
    for j in (math.floor(column), math.floor(column) + 1):
      inside = 0 <= i < image.shape[0] and 0 <= j < image.shape[1]
      value = image[i, j] if inside else np.array(FILL)
      total += (1 - abs(row - i)) * (1 - abs(column - j)) * value
  return total


def test_rotated_crops():
  images = images_of(3, 9)[:, :, :7]
  corners, degrees = [(0, 0), (3, 2), (1, 1)], [30, -100, 7.5]
  found = rotated(images, corners, 5, degrees)
  assert found.dtype == np.uint8
  for image, corner, angle, result in zip(images, corners, np.radians(degrees), found):
    for i in range(5):
      for j in range(5):
        # A turn by the angle brings the place of the source here.
        y, x = i - 2, j - 2
        row = corner[0] + 2 + math.cos(angle) * y + math.sin(angle) * x
        column = corner[1] + 2 - math.sin(angle) * y + math.cos(angle) * x
        assert result[i, j] == pytest.approx(bilinear(image, row, column), abs=0.51)
  assert (rotated(images[:1], [(20, 20)], 5, [45]) == FILL).all()


def test_angles():
  found = np.degrees(augment.angles(jax.random.key(0), 2000, 30.0))
  counts, _ = np.histogram(found, 10, (-30, 30))
  assert counts.sum() == 2000 and counts.min() > 150 and counts.max() < 250


def test_light():
  """Two pixels tell the change of an image, and others follow from it."""
  values = np.array([0, 40, 100, 120, 180, 255])
  images = np.broadcast_to(values[:, None], (300, 6, 6))[..., None].repeat(3, -1)
  found, labels = augmented(images.astype(np.uint8), brightness=0.1, contrast=0.3)
  np.testing.assert_array_equal(labels, np.arange(300))
  found = found[:, :, 0, 0].astype(float)  # The mean of this channel is 100.
  shift, gain = (found[:, 2] - 100) / 255, (found[:, 3] - found[:, 1]) / 80
  assert -0.1 - 1 / 255 <= shift.min() < -0.08 and 0.08 < shift.max() <= 0.1 + 1 / 255
  assert 0.7 - 1 / 80 <= gain.min() < 0.75 and 1.25 < gain.max() <= 1.3 + 1 / 80
  assert abs(np.corrcoef(shift, gain)[0, 1]) < 0.2
  expected = 100 + gain[:, None] * (values - 100) + 255 * shift[:, None]
  assert np.abs(found - np.clip(expected, 0, 255)).max() < 3  # Two were rounded.
  only = augmented(images.astype(np.uint8), brightness=0.1)[0][:, :, 0, 0].astype(int)
  assert np.ptp(np.diff(only[:, 1:5], axis=1), axis=0).max() <= 1  # Contrast stays.


def test_erasing():
  images = images_of(400, 20)
  images[images == np.uint8(FILL)] = 1
  found, _ = augmented(images, random_erasing=0.75)
  erased = (found == np.uint8(FILL)).all(-1)
  np.testing.assert_array_equal(found[~erased], images[~erased])
  number = erased.any((1, 2)).sum()
  assert abs(number - 300) < 4 * math.sqrt(400 * 0.75 * 0.25)
  areas, ratios = [], []
  for mask in erased[erased.any((1, 2))]:
    height, width = mask.any(1).sum(), mask.any(0).sum()
    assert mask.sum() == height * width  # It is one rectangle.
    areas.append(height * width / 400)
    ratios.append(height / width)
  # To the rounding of sides, the shortest of which are 1.5 pixels.
  assert 0.01 < min(areas) < 0.05 and 0.3 < max(areas) < 0.37
  assert 0.2 < min(ratios) < 0.4 and 2.5 < max(ratios) < 5
  assert np.median(ratios) == pytest.approx(1, abs=0.2)


def test_mixup():
  images = np.repeat(np.uint8([10, 20, 31]), 4).reshape(3, 2, 2, 1)
  found, share = jax.jit(augment.mixup)(
      jnp.asarray(images), jnp.float32([0.25, 0.6, 1]))
  # 0.25 * 10 + 0.75 * 31 = 25.75; the middle is mixed with itself; all of the last.
  assert np.asarray(found)[:, 1, 0, 0].tolist() == [26, 20, 31]
  np.testing.assert_array_equal(share, np.float32([0.25, 0.6, 1]))


@pytest.mark.parametrize("share, center, box, kept", [
    (0.75, (0.5, 0.5), (slice(1, 3), slice(1, 3)), 12 / 16),
    (0.75, (0.0, 0.99), (slice(0, 1), slice(2, 4)), 14 / 16),
    (0.0, (0.5, 0.5), (slice(0, 4), slice(0, 4)), 0),
    (1.0, (0.5, 0.5), (slice(0, 0), slice(0, 0)), 1),
    (0.9, (0.25, 0.75), (slice(1, 2), slice(3, 4)), 15 / 16)])
def test_cutmix(share, center, box, kept):
  images = np.stack([np.zeros((4, 4, 1), np.uint8), np.ones((4, 4, 1), np.uint8)])
  found, shares = jax.jit(augment.cutmix)(
      jnp.asarray(images), jnp.float32([share] * 2), jnp.float32([center] * 2).T)
  expected = np.zeros((4, 4, 1), np.uint8)
  expected[box] = 1
  np.testing.assert_array_equal(found, [expected, 1 - expected])
  assert np.asarray(shares).tolist() == [kept, kept]


@pytest.mark.parametrize("alpha", [0.01, 0.2, 1.0, 100.0])
def test_shares_have_a_beta_distribution(alpha):
  found = np.asarray(augment.shares(jax.random.key(0), 20_000, alpha))
  assert found.dtype == np.float32 and found.min() >= 0 and found.max() <= 1
  expected = np.random.default_rng(0).beta(alpha, alpha, 20_000)
  for quantile in (0.02, 0.2, 0.4, 0.5, 0.6, 0.8, 0.98):
    near = [np.quantile(expected, quantile + step) for step in (-0.02, 0.02)]
    assert near[0] - 0.01 <= np.quantile(found, quantile) <= near[1] + 0.01
  assert found.mean() == pytest.approx(0.5, abs=0.015)
  assert found.var() == pytest.approx(1 / (8 * alpha + 4), rel=0.05)


def test_larger_share():
  labels = augment.MixedLabels(jnp.int32([1, 2, 3]), jnp.int32([4, 5, 6]),
                               jnp.float32([0.4, 0.5, 0.6]))
  assert labels.larger.tolist() == [4, 2, 3]


@pytest.mark.parametrize("amounts, moments", [
    (dict(mixup=0.5), (1 / 2, 1 / 8)),  # Beta(1/2, 1/2): mean and variance.
    (dict(mixup=2.0), (1 / 2, 1 / 20))])
def test_mixed_images_and_their_labels(amounts, moments):
  images = np.zeros((400, 1, 1, 1), np.uint8)
  images[200:] = 200
  found, labels = augmented(images, **amounts)
  np.testing.assert_array_equal(labels.first, np.arange(400))
  np.testing.assert_array_equal(labels.second, 399 - np.arange(400))
  other = images[::-1, 0, 0, 0].astype(float)
  expected = labels.share * images[:, 0, 0, 0] + (1 - labels.share) * other
  assert np.abs(found[:, 0, 0, 0] - expected).max() < 0.501
  assert labels.share.mean() == pytest.approx(moments[0], abs=0.06)
  assert labels.share.var() == pytest.approx(moments[1], rel=0.25)


def test_mixup_and_cutmix_share_a_batch():
  images = np.zeros((400, 8, 8, 1), np.uint8)
  images[200:] = 200
  found, labels = augmented(images, mixup=1.0, cutmix=1.0)
  flat = found.reshape(400, 64).astype(float)
  pasted = np.isin(flat, [0, 200]).all(1) & (flat.std(1) > 0)
  averaged = (flat.std(1) == 0)
  assert (pasted | averaged).all() and 120 < pasted.sum() < 220
  own = images[:, 0, 0, 0]
  kept = (flat == own[:, None]).mean(1)
  np.testing.assert_allclose(kept[pasted], labels.share[pasted], rtol=1e-6)
  expected = labels.share * own + (1 - labels.share) * own[::-1]
  whole = averaged & ~np.isin(flat[:, 0], [0, 200])
  assert np.abs(flat[whole, 0] - expected[whole]).max() < 0.501


def test_keys_decide():
  images = images_of(16)
  amounts = dict(brightness=0.2, random_erasing=0.5, mixup=1.0)
  one, again, other = (augmented(images, seed, **amounts) for seed in (0, 0, 1))
  np.testing.assert_array_equal(one[0], again[0])
  assert not (one[0] == other[0]).all() and not (one[1].share == other[1].share).all()
  # One augmentation draws the same whatever else is on.
  alone = augmented(images, 0, mixup=1.0)
  np.testing.assert_array_equal(one[1].share, alone[1].share)


def test_crops_stay_where_they_are():
  """Augmentation draws nothing from the random stream of crops and flips."""
  pixels = pixels_lib.Pixels((1.0,) * 3, (1.0,) * 3)
  data = batches.Examples(jnp.asarray(images_of(8, 6)), jnp.arange(8, dtype=jnp.int32))
  found = [np.asarray(jax.jit(lambda key: resident.random_crops(
      data, data.labels, 0, key, batch_size=8, crop_size=4, crop_padding=1, flip=True,
      pixels=pixels, augmentation=Augmentation(**amounts)))(jax.random.key(5))[0])
      for amounts in ({}, dict(random_erasing=1.0), dict(rotation=1e-6))]  # noqa: B023
  same = (found[0] == found[1]).all(-1)
  assert 0.6 < same.mean() < 1 and (found[1][~same] == 0).all()
  np.testing.assert_array_equal(found[0], found[2])


def test_streamed_batches_are_augmented():
  amounts = Augmentation(rotation=90.0, contrast=0.5, mixup=1.0)
  info = datasets.info("imagenet2012")
  device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  pixels = pixels_lib.Pixels(tuple(map(float, FILL)), (64.0,) * 3)
  source = streamed.Streamed(
      info, None, batches.Batching(
          seed=0, batch_size=6, eval_batch_size=6, crop_size=8, crop_padding=0,
          crop_scale=(0.5, 1.0), flip=True, augmentation=amounts, pixels=pixels,
          replicated=device, sharded=device),
      workers=0, max_damaged=0.0, shrink=True)
  images, key = jnp.asarray(images_of(6)), jax.random.key(3)
  labels = jnp.arange(6, dtype=jnp.int32)
  found, mixed = jax.jit(lambda *arrays: source.train_inputs(
      batches.Examples(*arrays), None, 0, key))(images, labels)
  turned = rotated(images, np.zeros((6, 2)), 8,
                   np.degrees(augment.angles(key, 6, 90.0)))
  expected, shares = augmented(turned, seed=3, contrast=0.5, mixup=1.0)
  raw = np.asarray(found) * 64 + np.float32(FILL)
  assert np.abs(raw - expected).max() <= 1 and (raw == expected).mean() > 0.99
  np.testing.assert_array_equal(mixed.share, shares.share)
  np.testing.assert_array_equal(mixed.second, labels[::-1])
