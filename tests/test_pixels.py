"""minw.data.pixels: normalized pixels are the multiples of 1/64 that they should be."""

import jax
import ml_dtypes
import numpy as np
import pytest

import minw
from minw.data import datasets
from minw.data import pixels as pixels_lib

# round(255 mean), by hand: 255 * 0.4914 = 125.307 and so on.
OFFSETS = {"digits": (78,), "cifar10": (125, 123, 114), "cifar100": (129, 124, 112),
           "imagenet2012": (124, 116, 104)}


def pixels_of(name, kind="integer"):
  info = datasets.info(name)
  return pixels_lib.pixels(kind, info.mean, info.std)


@pytest.mark.parametrize("name", OFFSETS)
def test_integer_pixels_are_exact_multiples_of_1_64(name):
  values = np.arange(256, dtype=np.uint8)
  images = np.stack([values] * len(OFFSETS[name]), axis=-1)
  pixels = pixels_of(name)
  assert pixels == (OFFSETS[name], (64,) * len(OFFSETS[name]))
  # The same in a compiled program, where XLA may divide in another way.
  compiled = jax.jit(pixels_lib.normalize, static_argnums=1)
  for normalize in (pixels_lib.normalize, compiled):
    got = np.asarray(normalize(images, pixels))
    assert got.dtype == np.float32
    for channel, offset in enumerate(OFFSETS[name]):
      exact = (np.arange(256) - offset) / 64
      np.testing.assert_array_equal(got[:, channel].astype(np.float64), exact)
      in_bfloat16 = got[:, channel].astype(ml_dtypes.bfloat16)
      np.testing.assert_array_equal(in_bfloat16.astype(np.float64), exact)


def test_standardized_pixels():
  images = np.arange(48, dtype=np.uint8).reshape(2, 4, 2, 3) * 5
  expected = (images / 255 - [0.4914, 0.4822, 0.4465]) / [0.2470, 0.2435, 0.2616]
  got = pixels_lib.normalize(images, pixels_of("cifar10", "standardized"))
  np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


def test_unknown_kind_of_pixels():
  with pytest.raises(ValueError, match="kind='raw': must be integer or standardized"):
    pixels_lib.pixels("raw", (0.5,), (0.5,))


@pytest.mark.parametrize("kind, unit", [("integer", 1 / 64), ("standardized", 0.0)])
def test_probe_bounds_what_normalize_gives(kind, unit):
  pixels = pixels_of("cifar10", kind)
  ends = pixels_lib.normalize(np.array([[0] * 3, [255] * 3], np.uint8), pixels)
  probe = pixels_lib.probe(pixels, (2, 5, 3))
  for field in probe:
    assert field.shape == (2, 5, 3)
  np.testing.assert_allclose(probe.bound[1, 4], np.abs(ends).max(axis=0), rtol=1e-6)
  if kind == "integer":
    assert (probe.bound[0, 0] * 64).tolist() == [130, 132, 141]  # 255 - (125, 123, 114)
  assert (probe.unit == unit).all() and (probe.bits == 16).all()


def test_names_of_version_0_1():
  from minw import pipeline

  assert pipeline is minw.pipeline is pixels_lib
  assert pipeline.pixels("integer", (0.5,), (0.5,)) == ((128.0,), (64.0,))
  image = np.array([[[192]]], np.uint8)
  normalized = pipeline.normalize(image, pipeline.Pixels((128.0,), (64.0,)))
  assert np.asarray(normalized).tolist() == [[[1.0]]]
