"""The hard network against NumPy, written from its definition: bit for bit.

Sums are formed in float64, where they are exact; batch norm is folded with rational
numbers; what follows it is NumPy float32, one operation after the other.
"""

import fractions
import functools
import math

from flax import traverse_util
import hypothesis
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from float64_convnet import h
from minw import estimators
from minw import fold
from minw import fold_probe
from minw import layers
from minw import models
from minw.data import pixels as pixels_lib
from network_variables import variables_of

property_test = hypothesis.settings(deadline=None, derandomize=True, max_examples=200)

SMALLEST_NORMAL = 2.0**-126
# By bits: the ascending positive levels, thresholds of activations, factors on the
# mean magnitude for weights, and the step of which levels are multiples.
LEVELS = {1: [1.0], 2: [1.0], 3: [0.25, 0.5, 1.0]}
THRESHOLDS = {1: [], 2: [0.1], 3: [0.125, 0.375, 0.75]}
FACTORS = {1: [], 2: [0.7], 3: [0.3125, 0.9375, 1.875]}
STEP = {1: 1.0, 2: 1.0, 3: 0.25}

apply_norm = jax.jit(fold.apply_norm)


def same_pads(size, kernel, stride) -> tuple[int, int]:
  """The border of SAME padding, the odd pixel after the image."""
  total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
  return total // 2, total - total // 2


def convolve(x, kernel, strides=(1, 1), padding="SAME", pad_value=0.0) -> np.ndarray:
  """A direct convolution in float64."""
  x, kernel = np.asarray(x, np.float64), np.asarray(kernel, np.float64)
  if padding == "SAME":
    pads = map(same_pads, x.shape[1:3], kernel.shape[:2], strides)
    x = np.pad(x, [(0, 0), *pads, (0, 0)], constant_values=pad_value)
  windows = np.lib.stride_tricks.sliding_window_view(x, kernel.shape[:2], (1, 2))
  windows = windows[:, ::strides[0], ::strides[1]]
  return np.einsum("nhwcij,ijco->nhwo", windows, kernel)


def max_pool(x) -> np.ndarray:
  height, width = x.shape[1] // 2 * 2, x.shape[2] // 2 * 2
  return np.maximum.reduce(
      [x[:, i:height:2, j:width:2] for i in (0, 1) for j in (0, 1)])


def log2_ceil(x: fractions.Fraction) -> int:
  """The smallest k with 2^k >= x."""
  k = math.frexp(float(x))[1] + 1
  while fractions.Fraction(2) ** (k - 1) >= x:
    k -= 1
  return k


def fold_channel(mean, var, gamma, beta, epsilon, bound, unit):
  """Center, scale and constant of a channel whose accumulators are units."""
  beta = beta if abs(beta) >= SMALLEST_NORMAL else 0.0
  constant = (np.float32(0), np.float32(0), np.float32(beta))
  slope = float(gamma) / math.sqrt(float(var) + epsilon)
  if slope == 0:
    return constant
  quotient = float(beta) / slope
  if not abs(quotient) < 1e38:
    return constant
  center = fractions.Fraction(float(mean) - quotient)
  bound, unit = fractions.Fraction(float(bound)), fractions.Fraction(float(unit))
  tick = fractions.Fraction(2) ** (log2_ceil(max(abs(center) + bound, unit)) - 23)
  if tick > unit or abs(slope) * float(tick) < SMALLEST_NORMAL:
    return constant
  return np.float32(float(round(center / tick) * tick)), np.float32(slope), (
      np.float32(0))


def fold_channels(mean, var, gamma, beta, epsilon, bound, unit) -> fold.Norm:
  rows = [fold_channel(*row[:4], epsilon, *row[4:])
          for row in zip(mean, var, gamma, beta, bound, np.full(len(mean), unit))]
  return fold.Norm(*np.array(rows, np.float32).T)


def assert_bitwise(got, want) -> None:
  """Equal float32, the sign of zeros included."""
  got, want = np.asarray(got), np.asarray(want)
  assert got.dtype == want.dtype == np.float32 and got.shape == want.shape
  np.testing.assert_array_equal(got, want)
  np.testing.assert_array_equal(np.signbit(got), np.signbit(want))


def assert_clean(hard) -> None:
  """float32, finite, no -0 and nothing that flushes to zero."""
  leaves = jax.tree.leaves(hard)
  assert leaves
  for leaf in leaves:
    assert isinstance(leaf, np.ndarray) and leaf.dtype == np.float32
    assert np.isfinite(leaf).all()
    assert not np.signbit(leaf[leaf == 0]).any()
    assert ((leaf == 0) | (np.abs(leaf) >= SMALLEST_NORMAL)).all()


# Batch norm alone.

UNITS = (1.0, 0.25, 1 / 16, 1 / 64, 1 / 256)


@st.composite
def channels(draw):
  """The arguments of fold_norm for one channel, hostile ones often."""
  unit = draw(st.sampled_from(UNITS))
  bound = unit * draw(st.integers(0, 20_000))
  single = functools.partial(st.floats, width=32, allow_subnormal=False)
  gamma = draw(st.one_of(
      single(-4, 4), st.sampled_from([0.0, -0.0]),
      st.builds(lambda sign, power: float(np.float32(sign * 10.0**power)),
                st.sampled_from([1.0, -1.0]), st.floats(-38, -3))))
  beta = draw(st.one_of(single(-3, 3), st.sampled_from(
      [0.0, -0.0, 1e-40, 1e-30, -1e-5, 1.0, -1.0])))
  # Also exactly on an accumulator, half way to the next one, and beside either.
  on = unit * draw(st.integers(-40, 40)) / 2
  mean = draw(st.one_of(single(-5000, 5000), st.just(on), st.sampled_from(
      [float(np.nextafter(np.float32(on), np.float32(s))) for s in (-9999, 9999)])))
  var = draw(st.one_of(st.just(0.0), single(0, 1e6)))
  epsilon = draw(st.sampled_from([1e-4, 1e-3, 1e-5]))
  return mean, var, gamma, beta, epsilon, bound, unit


@property_test
@hypothesis.given(channels())
def test_the_rule_in_rational_numbers(channel):
  mean, var, gamma, beta, epsilon, bound, unit = channel
  one = lambda *values: [np.array([value]) for value in values]
  norm = fold.fold_norm(*one(mean, var, gamma, beta), epsilon, *one(bound, unit))
  want = fold_channels(*one(mean, var, gamma, beta), epsilon, *one(bound, unit))
  for got, expected in zip(norm, want):
    assert_bitwise(got, expected)
  assert_clean(norm)
  center, scale, constant = (float(field[0]) for field in norm)
  assert (scale == 0) or (constant == 0)
  assert (scale == 0) <= (center == 0)
  if scale:  # acc - center is exact: the same in float32 and in float64.
    near = np.round(center / unit) * unit
    acc = np.clip([-bound, bound, 0, near, near - unit, near + unit], -bound, bound)
    difference = acc.astype(np.float32) - norm.center
    np.testing.assert_array_equal(difference.astype(np.float64), acc - center)
    products = np.abs(difference * norm.scale)
    assert ((products == 0) | (products >= SMALLEST_NORMAL)).all()


def one_channel(mean=0.0, var=1.0, gamma=1.0, beta=0.0, bound=8.0, unit=1.0, eps=0.0):
  row = [np.array([value], np.float64) for value in (mean, var, gamma, beta)]
  norm = fold.fold_norm(*row, eps, np.array([bound]), np.array([unit]))
  return tuple(float(field[0]) for field in norm)


def test_batch_norm_worked_by_hand():
  # Deviation 4, slope -1/2: zero at 3 + 1.5 / 0.5.
  assert one_channel(mean=3, var=15.75, gamma=-2, beta=1.5, eps=0.25) == (6, -0.5, 0)
  # 100 + 155 < 2^8: multiples of 2^-15; 100 + 157 has one bit less to spare.
  fine = 100 + 2.0**-15
  assert one_channel(mean=fine, bound=155) == (fine, 1, 0)
  assert one_channel(mean=fine, bound=157) == (100, 1, 0)
  assert one_channel(mean=fine - 200, bound=155) == (fine - 200, 1, 0)
  # Rounding never gives -0.
  norm = fold.fold_norm(*np.array([[-1e-9], [1], [1], [0]]), 0, [8.0], [1.0])
  assert not np.signbit(norm.center[0]) and norm.center[0] == 0


def test_a_tiny_center_of_floats_keeps_its_sign():
  # The mean of a channel that is always 0 tends to 0, and never is.
  for mean in (1e-20, -1e-20):
    assert one_channel(mean=mean, unit=0) == (np.copysign(2.0**-40, mean), 1, 0)
  assert one_channel(mean=2.0**-39, unit=0) == (2.0**-39, 1, 0)
  assert one_channel(mean=0, unit=0) == (0, 1, 0)


def test_where_batch_norm_is_constant():
  # gamma = 0: the output is beta, whatever the accumulator.
  assert one_channel(mean=3, gamma=0, beta=0.25) == (0, 0, 0.25)
  assert one_channel(mean=3, gamma=-0.0, beta=-0.25) == (0, 0, -0.25)
  # Steps of y below the smallest normal number: bound 8 has ticks of 2^-20.
  assert one_channel(gamma=2.0**-106) == (0, 2.0**-106, 0)
  assert one_channel(gamma=2.0**-107) == (0, 0, 0)
  assert one_channel(gamma=1e-38, beta=0.5) == (0, 0, 0.5)
  assert one_channel(gamma=-1e-38, mean=5, beta=1e-30)[:2] == (0, 0)
  # A beta that flushes to zero is zero.
  assert one_channel(gamma=0, beta=1e-40) == (0, 0, 0)
  # Zero so far away that center has no room for a unit: 2^23 units.
  far = 2.0**17 - 8
  assert one_channel(gamma=1 / far, beta=-1, unit=1 / 64) == (
      far, float(np.float32(1 / far)), 0)
  assert one_channel(gamma=1 / (far + 1), beta=-1, unit=1 / 64) == (0, 0, -1)
  # Floats, too, where slope times bound is less than half of the last bit of beta.
  assert one_channel(gamma=2.0**-28, beta=1, bound=16, unit=0) == (0, 0, 1)
  assert one_channel(gamma=2.0**-27, beta=1, bound=16, unit=0) == (
      -2.0**27, 2.0**-27, 0)
  assert one_channel(gamma=1e-30, mean=5, beta=-0.5, unit=0) == (0, 0, -0.5)
  # Then y is beta within bound / |center|, so no code of one bit depends on acc.
  # Without a variance, epsilon decides: slope 0.01 / sqrt(1e-4).
  assert one_channel(var=0, gamma=0.01, beta=2, eps=1e-4) == (-2, 1, 0)


@pytest.mark.parametrize("unit", UNITS)
def test_signs_for_every_accumulator(unit):
  rng = np.random.default_rng(round(1 / unit))
  count, reach = 512, 600
  bound = unit * reach
  gamma = rng.normal(size=count) * 10.0 ** rng.uniform(-9, 0, count)
  beta = rng.normal(size=count) * (rng.random(count) < 0.8)
  var = (unit * rng.uniform(0, 200, count)) ** 2 * (rng.random(count) < 0.9)
  on = unit * rng.integers(-reach, reach, count) / 2
  mean = np.where(beta == 0, on, rng.uniform(-bound, bound, count))
  mean, var, gamma, beta = np.array([mean, var, gamma, beta], np.float32)
  norm = fold.fold_norm(mean, var, gamma, beta, 1e-4, np.full(count, bound),
                        np.full(count, unit))
  assert_clean(norm)
  acc = (unit * np.arange(-reach, reach + 1)[:, None]) * np.ones(count)
  y = fold.apply_norm(acc.astype(np.float32), norm)
  assert_bitwise(apply_norm(acc.astype(np.float32), norm), y)

  slope = gamma / np.sqrt(var.astype(np.float64) + 1e-4)
  zero = mean - beta / slope  # Where batch norm is zero.
  tick = np.exp2(np.ceil(np.log2(np.abs(zero) + bound))) / 2**23
  constant = norm.scale == 0
  np.testing.assert_array_equal(constant, tick > unit)
  assert count / 20 < constant.sum() < count / 2
  np.testing.assert_array_equal(np.sign(y), np.where(
      constant, np.sign(beta),
      np.where(np.abs(acc - zero) <= tick / 2, 0, np.sign((acc - zero) * slope))))
  # Exactly on an accumulator: y is 0 there, the code -1, and its neighbours differ.
  exact = (beta == 0) & (np.round(on / unit) == on / unit) & ~constant
  assert exact.sum() > 20
  assert (y == 0)[:, exact].sum(0).tolist() == [1] * exact.sum()
  want = (acc - mean.astype(np.float64)) * slope + beta
  error = np.abs(y - want)
  assert (error <= np.abs(slope) * tick / 2 + 2.0**-22 * np.abs(want))[
      :, ~constant].all()
  # There beta is batch norm's value within (|acc| + |mean|) / |zero|.
  assert (error <= np.abs(beta) * 2 * reach / (2**23 - reach))[:, constant].all()


@pytest.mark.gpu
@pytest.mark.parametrize("has_shortcut", [False, True])
def test_norm_is_the_same_in_eager_jit_and_numpy(has_shortcut):
  rng = np.random.default_rng(1)
  count = 128
  mean, var, gamma, beta = np.array(
      [rng.normal(0, 20, count), rng.uniform(1, 900, count), rng.normal(size=count),
       rng.normal(size=count)], np.float32)
  mean[:64], beta[:64] = rng.integers(-20, 20, 64) / 8, 0  # Some on an accumulator.
  gamma[::16], gamma[1::16] = 0, 1e-30
  unit, bound = 1 / 4, 500.0
  want = fold_channels(mean, var, gamma, beta, 1e-4, np.full(count, bound), unit)
  assert_clean(want)
  x = np.float32(unit) * rng.integers(-40, 40, (500, count)).astype(np.float32)
  shortcut = rng.choice(np.float32([-1, -0.5, -0.25, 0, 0.25, 0.5, 1]), x.shape)
  y = (x - want.center) * want.scale + want.constant
  assert (y[:, want.scale != 0] == 0).sum() > 100
  if has_shortcut:
    y = y + shortcut
  for bits in (None, 1, 2, 3):
    layer = layers.NormQuant(bits=bits, thresholds=(0.05,) if bits == 2 else ())
    hard = {"hard": want._asdict()}
    apply = functools.partial(layer.apply, mode="hard",
                              shortcut=shortcut if has_shortcut else None)
    codes = y if bits is None else h(
        np.clip(y, -1, 1), np.float32([0.05] if bits == 2 else THRESHOLDS[bits]),
        LEVELS[bits]).astype(np.float32) + np.float32(0)
    for call in (apply, jax.jit(apply)):
      assert_bitwise(call(hard, x), codes)


def test_more_units_than_float32_has_are_floats():
  # 5-bit weights over pixels: units of 2^-20, in float32 up to 16.
  unit = 2.0**-20
  assert one_channel(mean=1 / 3, bound=4.0, unit=unit)[0] == round(2**20 / 3) * unit
  # 1/3 + 4 < 8 has ticks of one unit. Beyond, center is rounded to float32 only.
  third = float(np.float32(1 / 3))
  assert one_channel(mean=1 / 3, bound=60.0, unit=unit) == (third, 1, 0)
  assert one_channel(mean=20, bound=60.0, unit=unit) == (20, 1, 0)
  assert one_channel(mean=3, bound=2304.0, unit=2.0**-12, gamma=-1) == (3, -1, 0)


# Weights.


@pytest.mark.parametrize("bits", [1, 2, 3])
@pytest.mark.parametrize("learned", [False, True])
def test_tiny_weights_are_zero_in_training_and_in_the_fold(bits, learned):
  """Below the smallest normal float32 a weight is 0, whatever the device flushes."""
  estimator = estimators.by_name("lsq" if learned else "ste")
  layer = layers.QuantDense(3, bits=bits, estimator=estimator)
  kernel = np.float32([[1e-40, -1e-40, 2e-38], [1e-45, 0.0, -2e-38]])
  params = {"kernel": kernel} | ({"step": np.float32(1e-6)} if learned else {})
  zero = -1.0 if bits == 1 else 0.0
  # In units of the step 1e-6 + 2^-20 the normal weights are 1e-32: no level but 0.
  edge = 1.0 if bits == 1 or not learned else 0.0
  want = np.float32([[zero, zero, edge], [zero, zero, -edge]])
  hard = layer.apply({"params": params}, probe_rows((2,), 1.0, 1.0), mode="fold",
                     mutable=["hard"])[1]["hard"]["kernel"]
  np.testing.assert_array_equal(hard, want)
  trained = jax.jit(functools.partial(layer.apply, mode="mixed"))(
      {"params": params}, jnp.eye(2), 1.0)
  np.testing.assert_array_equal(np.sign(trained), np.sign(want))


def test_weights_worked_by_hand():
  kernel = np.float32([[0.25, -0.25, 0, -0.0], [0.75, 0.5, -1.25, 1.0]])  # Mean 1/2.
  fold_kernel = functools.partial(fold.fold_kernel, kernel)
  assert_bitwise(fold_kernel(1), np.float32([[1, -1, -1, -1], [1, 1, -1, 1]]))
  # A magnitude on a threshold falls to the level below.
  assert_bitwise(fold_kernel(2, thresholds=(1.0,)),
                 np.float32([[0, 0, 0, 0], [1, 0, -1, 1]]))
  assert_bitwise(fold_kernel(2), np.float32([[0, 0, 0, 0], [1, 1, -1, 1]]))  # 0.35
  assert_bitwise(fold_kernel(3, thresholds=(0.25, 1.0, 2.0)), np.float32(
      [[0.25, -0.25, 0, 0], [0.5, 0.25, -1, 0.5]]))
  assert_bitwise(fold_kernel(3, rule="fixed"), np.float32(  # 1/8, 3/8, 3/4
      [[0.25, -0.25, 0, 0], [0.5, 0.5, -1, 1]]))
  assert_bitwise(fold_kernel(2, rule="fixed", thresholds=(0.5,)), np.float32(
      [[0, 0, 0, 0], [1, 0, -1, 1]]))
  # Means of the columns: 1/2, 3/8, 5/8, 1/2.
  assert_bitwise(fold_kernel(2, rule="channel_mean", thresholds=(0.5,)), np.float32(
      [[0, -1, 0, 0], [1, 1, -1, 1]]))
  with pytest.raises(ValueError, match="rule='sum'"):
    fold_kernel(2, rule="sum")


@pytest.mark.parametrize("bits, want", [
    (1, [[1, -1], [-1, -1]]), (2, [[1, -1], [-1, 0]]),
    (3, [[1, -0.5], [-0.25, 0]]), ("float32", None)])
def test_periodic_weights(bits, want):
  """sin(20 w) is 0.909, -0.757, -0.199 and 0; thresholds are 0.1, and 1/8 and so on."""
  kernel = np.float32([[0.1, 0.2], [-0.01, 0.0]])
  layer = layers.QuantDense(2, bits=bits, threshold_rule="fixed", frequency=20.0,
                            thresholds=() if bits != 3 else (0.125, 0.375, 0.8))
  hard = layer.apply({"params": {"kernel": kernel}}, probe_rows((2,), 1.0, 1.0),
                     mode="fold", mutable=["hard"])[1]["hard"]["kernel"]
  if bits == "float32":
    want = np.sin(20 * kernel.astype(np.float64)).astype(np.float32)
  assert_bitwise(hard, np.float32(want))
  trained = layer.apply({"params": {"kernel": kernel}}, jnp.eye(2), 1.0, mode="mixed")
  np.testing.assert_allclose(trained, want, rtol=1e-6)


@pytest.mark.parametrize("rule", ["fixed", "layer_mean", "channel_mean"])
@pytest.mark.parametrize("bits", [1, 2, 3])
def test_weights(bits, rule):
  rng = np.random.default_rng(bits)
  kernel = rng.normal(0, [0.1, 0.5, 1, 0.3, 2], (3, 2, 40, 5)).astype(np.float32)
  kernel.ravel()[::7] = 0
  wide = kernel.astype(np.float64)
  mean = {"fixed": 1.0, "layer_mean": np.abs(wide).mean(),
          "channel_mean": np.abs(wide).mean((0, 1, 2))}[rule]
  custom = {1: (), 2: (0.5,), 3: (0.2, 0.7, 1.1)}[bits]
  for given in ((), custom, (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)):
    # Thresholds meant for other bits give way to the defaults.
    factors = custom if given == custom else (
        THRESHOLDS if rule == "fixed" else FACTORS)[bits]
    want = h(wide, [factor * mean for factor in factors], LEVELS[bits]) + 0.0
    got = fold.fold_kernel(kernel, bits, rule=rule, thresholds=given)
    assert_bitwise(got, want.astype(np.float32))
    assert len(np.unique(got)) == {1: 2, 2: 3, 3: 7}[bits]


@pytest.mark.parametrize("name", ["float8_e4m3fn", "bfloat16", "float16", "float32"])
def test_weights_in_a_float_format(name):
  kernel = np.random.default_rng(0).normal(0, 0.3, (3, 3, 4, 8)).astype(np.float32)
  dtype = np.dtype(getattr(ml_dtypes, name, name))
  np.testing.assert_array_equal(
      fold.fold_kernel(kernel, name), kernel.astype(dtype).astype(np.float32))


# Codes.


def test_codes_on_and_beside_thresholds():
  acc = np.arange(-8, 13, dtype=np.float32)
  three = np.repeat([-1, -0.5, -0.25, 0, 0.25, 0.5, 1], [4, 3, 2, 3, 2, 3, 4])
  for sign in (1, -1):
    # y = -10/8, -9/8, ..., 10/8, or falling.
    hard = {"hard": {"center": np.float32([2]), "scale": np.float32([sign / 8]),
                     "constant": np.float32([0])}}

    def codes(bits, thresholds=(), acc=acc):
      layer = layers.NormQuant(bits=bits, thresholds=thresholds)
      return np.asarray(layer.apply(hard, acc[:, None], mode="hard"))[:, 0]

    assert_bitwise(codes(3), np.float32(sign * three + 0))  # 1/8, 3/8, 3/4.
    assert_bitwise(codes(2, (0.5,)),
                   np.float32(sign * np.repeat([-1, 0, 1], [6, 9, 6]) + 0))
    # One bit: 0 falls to -1 on either side.
    assert_bitwise(codes(1), np.repeat(np.float32([-sign, -1, sign]), [10, 1, 10]))
    # The threshold 0.1 is its nearest float32; y is the float32 before, at, after it.
    tenth = np.nextafter(np.float32(0.1), np.float32([0, 0.1, 1]), dtype=np.float32)
    hard["hard"]["center"] *= 0
    assert_bitwise(codes(2, (), 8 * tenth), np.float32([0, 0, sign]))


# What is known without data.


def probe_rows(shape, bound, unit, bits=16.0, scale=1.0):
  """A probe as layers receive it; one bound for each channel."""
  bound = np.broadcast_to(np.float32(bound), shape)
  return np.asarray(fold_probe.make_rows(fold.Probe(bound, unit, bits), scale))


@pytest.mark.parametrize("size, kernel_size, strides, padding, pad", [
    ((7, 6), (3, 3), (1, 1), "SAME", 0.0),
    ((7, 6), (3, 3), (2, 2), "SAME", 1.0),
    ((6, 7), (2, 5), (1, 2), "SAME", -1.0),
    ((9, 8), (3, 2), (2, 3), "VALID", -1.0),  # Which has no border to pad.
    ((5, 5), (1, 1), (1, 1), "SAME", 1.0),
])
def test_bounds_of_a_convolution_are_attained(
    size, kernel_size, strides, padding, pad):
  rng = np.random.default_rng(sum(size))
  for weight_bits, input_bits in (
      (1, 3), (3, 2), (3, 3), (1, "image"), (2, "image")):
    image = input_bits == "image"
    bound = np.array([2.0, 1.5, 0.75]) if image else np.ones(3)
    unit = 1 / 64 if image else STEP[input_bits]
    kernel = rng.normal(size=(*kernel_size, 3, 4)).astype(np.float32)
    levels = h(kernel, np.array(FACTORS[weight_bits]) * np.abs(kernel).mean(),
               LEVELS[weight_bits])
    layer = layers.QuantConv(4, kernel_size, strides, padding, pad, bits=weight_bits)
    rows, _ = layer.apply({"params": {"kernel": kernel}},
                          probe_rows((*size, 3), bound, unit), mode="fold",
                          mutable=["hard"])
    grid = np.array(LEVELS[3 if image else input_bits])
    inputs = rng.choice(np.concatenate([-grid, grid]), (64, *size, 3)) * bound
    acc = convolve(inputs, levels, strides, padding, pad)
    assert rows.shape == (7, *acc.shape[1:]) and rows.dtype == jnp.float32
    bordered = padding == "SAME" and kernel_size != (1, 1)
    padded = np.maximum(bound, abs(pad)) if bordered else bound
    np.testing.assert_array_equal(
        rows[0], np.broadcast_to(
            (np.abs(levels) * padded[:, None]).sum((0, 1, 2)), acc.shape[1:]))
    np.testing.assert_array_equal(rows[1], unit * STEP[weight_bits])
    np.testing.assert_array_equal(rows[2], 32)
    assert (np.abs(acc) <= rows[0]).all()
    assert (np.mod(acc, rows[1]) == 0).all()
    if image and padding == "SAME":
      continue  # Then its border would exceed it.
    # A window inside the image that agrees with all weights' signs.
    place = [1 if padding == "SAME" and k > 1 else 0 for k in kernel_size]
    corner = [i * stride - (same_pads(n, k, stride)[0] if padding == "SAME" else 0)
              for i, stride, n, k in zip(place, strides, size, kernel_size)]
    assert min(corner) >= 0
    for channel in range(4):
      worst = inputs[:1].copy()
      worst[0, corner[0]:corner[0] + kernel_size[0],
            corner[1]:corner[1] + kernel_size[1]] = (
                np.where(levels[..., channel] < 0, -1, 1) * bound)
      for sign in (1, -1):
        acc = convolve(sign * worst, levels, strides, padding, pad)
        assert acc[0, place[0], place[1], channel] == sign * rows[
            0, 0, 0, channel]


@pytest.mark.parametrize("options, size", [
    # A window of 3 weights in every second pixel covers 5 pixels.
    (dict(strides=(2, 2), kernel_dilation=(2, 2), padding="VALID"), (3, 2)),
    (dict(strides=(2, 2), padding="SAME"), (5, 4)),
    # 9 + 1 pixels hold 7 windows of 4, and 8 + 3 pixels 9 of 3, every third of which
    # counts.
    (dict(kernel_size=(2, 3), strides=(1, 3), kernel_dilation=(3, 1),
          padding=((1, 0), (2, 1))), (7, 3)),
])
def test_rows_of_a_convolution_have_the_shape_of_its_output(options, size):
  layer = layers.QuantConv(4, **options)
  kernel = np.ones((*layer.kernel_size, 3, 4), np.float32)
  rows = probe_rows((9, 8, 3), 1.0, 1.0)
  out, hard = layer.apply({"params": {"kernel": kernel}}, rows, mode="fold",
                          mutable=["hard"])
  assert out.shape == (7, *size, 4)
  assert layer.apply(hard, np.zeros((1, 9, 8, 3), np.float32)).shape == (1, *size, 4)


def test_a_kernel_of_another_shape_is_refused():
  with pytest.raises(ValueError, match=r"shape \(2, 5\): must be \(2, 4\)"):
    layers.QuantDense(4).apply(
        {"params": {"kernel": np.ones((2, 5), np.float32)}},
        probe_rows((2,), 1.0, 1.0), mode="fold", mutable=["hard"])


def test_a_traced_network_is_folded_without_tracing(monkeypatch):
  """Each validation folds, and tracing takes longer than the arithmetic."""
  net, variables, hard, _, _ = example("mixed")
  probe = fold.Probe(*np.broadcast_arrays(
      np.full(SHAPE, BOUND, np.float32), np.float32(1 / 64), np.float32(16)))
  traced = fold.trace(net, variables, probe)
  monkeypatch.setattr(jax, "eval_shape", None)
  monkeypatch.setattr(jax, "make_jaxpr", None)
  jax.tree.map(assert_bitwise, fold.fold(net, variables, probe, traced), hard)


def test_bounds_scales_and_units_of_groups():
  """An output channel is bounded by its own group's inputs, and has their scale."""
  rng = np.random.default_rng(0)
  kernel = rng.normal(size=(3, 3, 2, 6)).astype(np.float32)
  levels = h(kernel, np.array(FACTORS[3]) * np.abs(kernel).mean(), LEVELS[3])
  bound = np.float32([1, 2, 0.5, 0.25, 4, 3])
  unit, scale = np.repeat([1, 0.25, 0.5], 2), np.repeat([0.75, 1.0, 3.0], 2)
  layer = layers.QuantConv(6, bits=3, feature_group_count=3, kernel_dilation=(2, 1))
  probe = lambda scale: np.asarray(fold_probe.make_rows(
      fold.Probe(np.broadcast_to(bound, (5, 4, 6)), unit, 2.0), scale))
  apply = lambda rows: layer.apply(
      {"params": {"kernel": kernel}}, rows, mode="fold", mutable=["hard"])[0]
  rows = np.asarray(apply(probe(scale)))
  size = np.abs(levels).sum((0, 1))
  for channel in range(6):
    group = channel // 2
    inputs = bound[2 * group:2 * group + 2]
    np.testing.assert_array_equal(rows[0, ..., channel], inputs @ size[:, channel])
  np.testing.assert_array_equal(rows[1], np.broadcast_to(unit / 4, rows[1].shape))
  np.testing.assert_array_equal(fold_probe.scale_of(rows), scale)
  with pytest.raises(ValueError, match="gets channels of different scales"):
    apply(probe(np.float64([0.75, 1, 1, 1, 3, 3])))


def test_bounds_of_a_dense_layer():
  # Every input has its own bound: 1 and 2 come from two places of a 1x2 map.
  kernel = np.float32([[0.4, -0.6], [-0.8, 0.001]])
  layer = layers.QuantDense(2, bits=2)
  rows, hard = layer.apply(
      {"params": {"kernel": kernel}}, probe_rows((2,), [1.0, 2.0], [0.25, 0.5], 3),
      mode="fold", mutable=["hard"])
  np.testing.assert_array_equal(hard["hard"]["kernel"], [[1, -1], [-1, 0]])
  np.testing.assert_array_equal(rows[:3], [[3, 1], [0.25, 0.25], [32, 32]])
  # No unit in the input or the weights: none in the sums.
  for bits, unit in ((2, 0.0), ("float32", 0.25)):
    rows, _ = layers.QuantDense(2, bits=bits).apply(
        {"params": {"kernel": kernel}}, probe_rows((2,), 1.0, unit), mode="fold",
        mutable=["hard"])
    np.testing.assert_array_equal(rows[1], 0)


def test_what_is_known_may_differ_by_place():
  # The largest bound and the smallest unit of a map decide.
  kernel = np.float32([-0.5]).reshape(1, 1, 1, 1)
  place = lambda *values: np.reshape(np.float32(values), (1, 2, 1))
  probe = lambda *rows: fold_probe.make_rows(fold.Probe(*(place(*row) for row in rows)))
  rows = probe((2, 1), (0.25, 0.5), (3, 3))
  rows, _ = layers.QuantConv(1, (1, 1)).apply(
      {"params": {"kernel": kernel}}, rows, mode="fold", mutable=["hard"])
  np.testing.assert_array_equal(rows[:3, 0, :, 0], [[2, 2], [0.25, 0.25], [32, 32]])
  # Bounds and units as in the examples worked by hand.
  fine = 100 + 2.0**-15
  for bounds, units, mean, scale, want in (
      ((155, 157), (1, 1), fine, 1, (100, 1, 0)),
      ((157, 155), (1, 1), fine, 1, (100, 1, 0)),
      ((8, 8), (1, 1 / 64), 0, 2.0**-17, (0, 0, -1)),
      ((8, 8), (1, 1), 0, 2.0**-17, (2.0**17, 2.0**-17, 0))):
    params = {"scale": np.float32([scale]), "bias": np.float32([-(mean == 0)])}
    stats = {"mean": np.float32([mean]), "var": np.ones(1, np.float32)}
    _, hard = layers.NormQuant(epsilon=0.0).apply(
        {"params": {"batch_norm": params}, "batch_stats": {"batch_norm": stats}},
        probe(bounds, units, (32, 32)), mode="fold",
        mutable=["hard"])
    got = [float(hard["hard"][name][0]) for name in ("center", "scale", "constant")]
    assert tuple(got) == want


@pytest.mark.parametrize("bits, unit, count", [
    (1, 1, 1), (3, 0.25, 3), ("float8_e4m3fn", 0, 8), ("bfloat16", 0, 16),
    ("float32", 0, 32)])
def test_what_is_known_after_batch_norm(bits, unit, count):
  ones = np.ones(4, np.float32)
  rows, hard = layers.NormQuant(bits=bits, use_scale=False, epsilon=3.0).apply(
      {"params": {"batch_norm": {"bias": ones}},
       "batch_stats": {"batch_norm": {"mean": 5 * ones, "var": ones}}},
      probe_rows((2, 2, 4), 100.0, 1.0), mode="fold", mutable=["hard"])
  np.testing.assert_array_equal(
      rows[:3],
      np.broadcast_to(np.reshape([1, unit, count], (3, 1, 1, 1)), (3, 2, 2, 4)))
  for name, value in (("center", 3), ("scale", 0.5), ("constant", 0)):
    np.testing.assert_array_equal(hard["hard"][name], value * ones)


# Scales.


def test_scales_in_batch_norm():
  """Against float64 batch norm of scaled sums, in units of the step."""
  rng = np.random.default_rng(1)
  n, step = 6, 0.37
  mean, bias, scale = rng.normal(0, 2, n), rng.normal(0, 1, n), rng.normal(0, 1, n)
  var = rng.uniform(0.1, 5, n)
  of_input = fold_probe.round_scale(rng.uniform(0.01, 3, n))
  of_input[2] = 0.0
  norm = fold.fold_norm(mean, var, scale, bias, 1e-4, np.full(n, 300), np.ones(n),
                        input_scale=of_input, output_scale=step)
  acc = np.arange(-300, 301, dtype=np.float32)[:, None]
  want = ((of_input * acc - mean) * scale / np.sqrt(var + 1e-4) + bias) / step
  got = (acc - norm.center) * norm.scale + norm.constant
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-3)
  assert norm.scale[2] == 0 != norm.constant[2]


def test_scales_of_kernels():
  kernel = np.float32([[0.5, -0.25], [-1.5, 0.75]])
  assert fold.kernel_scale(kernel, 1, "none") == 1
  assert fold.kernel_scale(kernel, 2, "layer_mean") == 0.75
  assert fold.kernel_scale(kernel, 1, "channel_mean").tolist() == [1, 0.5]
  assert fold.kernel_scale(kernel, "bfloat16", "channel_mean") == 1
  assert fold.kernel_scale(kernel, 2, "none", 0.375) == 0.375
  assert fold.kernel_scale(0 * kernel, 1, "layer_mean") == 0
  levels = lambda bits, step, *t: fold.fold_kernel(
      kernel, bits, thresholds=t, step=step).tolist()
  assert levels(1, 0.2) == [[1, -1], [-1, 1]]
  assert levels(2, 1.0) == [[0, 0], [-1, 1]]  # At 1/2 still 0.
  assert levels(2, 1.0, 0.8) == [[0, 0], [-1, 0]]
  assert levels(3, 2.0) == [[0.25, 0], [-0.5, 0.25]]  # 1/4, 1/8, 3/4, 3/8.


# Networks.

SHAPE, CONVS, DENSES, CLASSES = (7, 9, 2), (8, 12, 12), (12,), 5
BATCH, BOUND = 8, 3.0
NAMES = ["conv1", "conv2", "conv3", "dense1", "dense2"]


def network(bits, rule="layer_mean", pad=0.0, strides=(1, 1), kernel_size=(3, 3),
            first_padding="SAME") -> models.ConvNet:
  weights = dict(bits=bits.__getitem__, threshold_rule=rule)
  return models.ConvNet(
      CLASSES, CONVS, DENSES, first_padding=first_padding,
      conv=functools.partial(layers.QuantConv, kernel_size=kernel_size,
                             strides=strides, pad_value=pad, **weights),
      dense=functools.partial(layers.QuantDense, **weights),
      norm=functools.partial(layers.NormQuant, bits=bits.__getitem__))


def bits_table(weights, inputs):
  """Bits by layer from those of 5 layers' weights and 4 layers' outputs."""
  return {**dict(zip(NAMES, weights)),
          **{f"norm_{name}": bits for name, bits in zip(NAMES, inputs)}}


NETWORKS = {  # Bits, and arguments of `network`.
    "1/1": (bits_table([1] * 5, [1] * 4), dict(pad=1.0)),
    "2/2": (bits_table([2] * 5, [2] * 4), dict(rule="fixed")),
    "3/3": (bits_table([3] * 5, [3] * 4), dict(rule="channel_mean", pad=-1.0)),
    "mixed": (bits_table([3, 1, 2, 3, 1], [2, 3, 1, 3]), dict(pad=-1.0)),
    "strides": (bits_table([1, 3, 2, 2, 3], [3, 1, 2, 1]),
                dict(strides=(2, 1), kernel_size=(2, 3), first_padding="VALID")),
}


def hostile_variables(net, seed):
  """Variables whose channels are of all kinds, hostile ones among them.

  Where bias is 0, `numpy_hard_network` moves a threshold onto an accumulator.
  """
  rng = np.random.default_rng(seed)
  shapes = jax.eval_shape(lambda: layers.initialize(net, SHAPE))
  out = {}
  for path, leaf in traverse_util.flatten_dict(shapes, sep="/").items():
    values = rng.normal(size=leaf.shape)
    if path.endswith("var"):
      values = np.abs(values) * 20 * (rng.random(leaf.shape) < 0.8)
    elif path.endswith("mean"):
      values *= 4
    out[path] = values
  for name in NAMES:
    norm = f"params/norm_{name}/batch_norm"
    scale, bias = out[f"{norm}/scale"], out[f"{norm}/bias"]
    if name == NAMES[-1]:
      scale[:3] = 0, 1e-30, -1e-3
    else:
      scale[:4] = 0, -np.abs(scale[1]), 1e-38, 10.0 ** -rng.uniform(3, 30)
      bias[2:] = 0
  return traverse_util.unflatten_dict(
      {path: np.float32(values) for path, values in out.items()}, sep="/")


def norm_arguments(variables, name):
  params = variables["params"][name]["batch_norm"]
  stats = variables["batch_stats"][name]["batch_norm"]
  return stats["mean"], stats["var"], params["scale"], params["bias"], 1e-4


def numpy_hard_network(bits, variables, x, rule="layer_mean", pad=0.0, strides=(1, 1),
                       first_padding="SAME"):
  """The outputs of all layers, by name.

  Where a channel has no bias, its mean is set first, so that the commonest accumulator,
  or half a unit beside it, is on a threshold or within an ulp of it.
  """
  outputs = {}
  rng = np.random.default_rng(7)
  bound, unit = np.full(x.shape[-1], BOUND), 1 / 64
  for i, name in enumerate(NAMES):
    if name == "dense1":
      x = x.reshape(len(x), -1)
      bound = np.ones(x.shape[-1])
    kernel = variables["params"][name]["kernel"].astype(np.float64)
    axes = tuple(range(kernel.ndim - 1)) if rule == "channel_mean" else None
    factors = np.array((THRESHOLDS if rule == "fixed" else FACTORS)[bits[name]])
    mean = 1.0 if rule == "fixed" else np.abs(kernel).mean(axes)
    kernel = h(kernel, [factor * mean for factor in factors], LEVELS[bits[name]])
    if name.startswith("conv"):
      border = 0.0 if i == 0 else pad
      padding = first_padding if i == 0 else "SAME"
      x = convolve(x, kernel, strides, padding, border)
      if padding == "SAME":
        bound = np.maximum(bound, abs(border))
      bound = bound @ np.abs(kernel).sum((0, 1))
    else:
      x = x @ kernel
      bound = bound @ np.abs(kernel)
    unit *= STEP[bits[name]]
    assert (np.mod(x, unit) == 0).all() and (np.abs(x).max() < 2**20 * unit)
    outputs[name] = x.astype(np.float32)
    if i == 1:
      x = max_pool(x)
    norm = f"norm_{name}"
    mean, var, scale, bias, epsilon = norm_arguments(variables, norm)
    for channel in np.flatnonzero(bias == 0):
      values, counts = np.unique(x[..., channel], return_counts=True)
      occurs = values[counts.argmax()] + rng.choice([0, 0, unit / 2])
      slope = scale[channel] / np.sqrt(np.float64(var[channel]) + epsilon)
      if abs(slope) > 1e-3 and bits.get(norm, 1) > 1:
        occurs -= rng.choice([-1, 1]) * rng.choice(THRESHOLDS[bits[norm]]) / slope
      mean[channel] = np.nextafter(
          np.float32(occurs), np.float32(occurs + rng.choice([-1, 0, 0, 1])))
    center, scale, constant = fold_channels(
        *norm_arguments(variables, norm), bound, unit)
    y = (x.astype(np.float32) - center) * scale + constant
    if name != NAMES[-1]:
      x = h(np.clip(y, -1, 1), np.float32(THRESHOLDS[bits[norm]]), LEVELS[bits[norm]])
      y = x.astype(np.float32) + np.float32(0)
      bound, unit = np.ones(x.shape[-1]), STEP[bits[norm]]
    outputs[norm] = y
  return outputs


def random_images(count):
  """Multiples of 1/64, the largest of them 3."""
  pixels = np.random.default_rng(3).integers(-192, 193, (count, *SHAPE))
  return pixels.astype(np.float32) / 64


def captured(net, mode, variables, x):
  """The outputs of all layers, by name."""
  _, state = net.apply(
      variables, x, 1.0, mode, capture_intermediates=True,
      mutable=["intermediates", "hard" if mode == "fold" else "distance"])
  return {path[0]: value[0] for path, value in
          traverse_util.flatten_dict(state["intermediates"]).items() if len(path) == 2}


def fold_network(net, variables):
  return fold.fold(net, variables, fold.Probe(
      *(np.full(SHAPE, row) for row in (BOUND, 1 / 64, 16.0))))


@functools.cache
def example(name):
  """A hostile network, its hard variables, images, and what NumPy makes of them."""
  bits, options = NETWORKS[name]
  net = network(bits, **options)
  variables = hostile_variables(net, len(name))
  images = random_images(BATCH)
  how = {key: value for key, value in options.items() if key != "kernel_size"}
  want = numpy_hard_network(bits, variables, images, **how)
  return net, variables, fold_network(net, variables), images, want


@pytest.mark.gpu
@pytest.mark.parametrize("name", [
    pytest.param(name, marks=pytest.mark.slow if name == "strides" else ())
    for name in NETWORKS])
def test_hard_network_is_the_same_in_eager_jit_and_numpy(name):
  net, _, hard, images, want = example(name)
  assert_clean(hard)
  run = functools.partial(captured, net, "hard")
  # Two networks are enough for eager operations, of which each is compiled by itself.
  eager = [run] if name in ("mixed", "strides") else []
  for call in (*eager, jax.jit(run)):
    outputs = call(hard, images)
    assert len(want) == 10
    for layer, value in want.items():
      assert_bitwise(outputs[layer], value)
  # Not vacuous: codes vary, some channels are constant.
  for layer in NAMES[:4]:
    scale = hard["hard"][f"norm_{layer}"]["scale"]
    assert 0 < (scale == 0).sum() < len(scale) / 2 and (scale < 0).any()
    assert len(np.unique(want[f"norm_{layer}"][..., scale != 0])) >= 2
  assert len(np.unique(want["norm_dense2"])) > CLASSES


@pytest.mark.parametrize("name", NETWORKS)
def test_bounds_and_units_hold_in_networks(name):
  net, variables, _, _, want = example(name)
  rows = jax.tree.map(np.asarray, captured(
      net, "fold", variables, probe_rows(SHAPE, BOUND, 1 / 64)))
  bits = NETWORKS[name][0]
  units = [1 / 64] + [STEP[bits[f"norm_{layer}"]] for layer in NAMES[:4]]
  for layer, unit in zip(NAMES, units):
    bound, got_unit = rows[layer][:2]
    assert bound.shape == want[layer].shape[1:]
    assert (np.abs(want[layer]) <= bound).all()
    np.testing.assert_array_equal(got_unit, unit * STEP[bits[layer]])
    assert (np.mod(want[layer], got_unit) == 0).all()


def ordinary_variables(net, seed):
  """Variables such that batch norm's outputs are about normal."""
  return variables_of(
      net, SHAPE, seed, kernel=lambda rng, n: rng.normal(0, 0.3, n),
      scale=lambda rng, n: rng.choice([-1, 1], n) * rng.uniform(0.5, 1, n),
      var=lambda rng, n: 20 * rng.uniform(0.5, 2, n))


def batch_norm(acc, mean, var, scale, bias, epsilon) -> np.ndarray:
  mean, var, scale, bias = (np.float64(a) for a in (mean, var, scale, bias))
  return (np.float64(acc) - mean) * scale / np.sqrt(var + epsilon) + bias


def close_to_threshold(acc, variables, norm, bits) -> np.ndarray:
  """Where float64 batch norm is so near to a threshold that float32 may pass it."""
  mean, var, scale, bias, epsilon = norm_arguments(variables, norm)
  y = batch_norm(acc, mean, var, scale, bias, epsilon)
  gap = np.abs(np.abs(y)[..., None] - np.array(THRESHOLDS[bits] or [0.0])).min(-1)
  slope = np.abs(scale) / np.sqrt(np.float64(var) + epsilon)
  return gap <= 1e-6 * (slope * (np.abs(acc) + np.abs(mean)) + np.abs(bias)) + 1e-30


@pytest.mark.parametrize("name", NETWORKS)
def test_batch_norms_agree_with_mixed_mode_but_at_thresholds(name):
  # Hostile networks: thresholds are on accumulators.
  _, variables, _, _, want = example(name)
  bits, near = NETWORKS[name][0], 0
  for layer in NAMES[:4]:
    norm = f"norm_{layer}"
    acc = max_pool(want[layer]) if layer == "conv2" else want[layer]
    close = close_to_threshold(acc, variables, norm, bits[norm])
    apply = jax.jit(functools.partial(
        layers.NormQuant(bits=bits[norm]).apply, mode="mixed"))
    mixed = apply({kind: variables[kind][norm] for kind in variables}, acc, 1.0)
    assert not ((np.asarray(mixed) != want[norm]) & ~close).any()
    near += close[..., 4:].sum()
  assert near > 30


@pytest.mark.parametrize("name", ["1/1", "2/2", "mixed"])
def test_networks_agree_with_mixed_mode_but_at_thresholds(name):
  bits, options = NETWORKS[name]
  net = network(bits, **options)
  variables = ordinary_variables(net, 5)
  images = random_images(40)
  outputs = jax.device_get(jax.jit(functools.partial(captured, net, "hard"))(
      fold_network(net, variables), images))
  mixed = jax.device_get(jax.jit(functools.partial(captured, net, "mixed"))(
      variables, images))
  agree = np.ones(len(images), bool)
  for layer in NAMES:
    axes = tuple(range(1, outputs[layer].ndim))
    assert ((outputs[layer] == mixed[layer]).all(axes) >= agree).all()
    norm = f"norm_{layer}"
    if layer == NAMES[-1]:
      break
    acc = outputs[layer]
    acc = max_pool(acc) if layer == "conv2" else acc
    close = close_to_threshold(acc, variables, norm, bits[norm])
    differ = outputs[norm] != mixed[norm]
    axes = tuple(range(1, differ.ndim))
    assert not (differ & ~close)[agree].any()
    agree &= ~differ.any(axes)
    assert len(np.unique(outputs[norm])) == {1: 2, 2: 3, 3: 7}[bits[norm]]
  assert agree.sum() >= 35
  np.testing.assert_allclose(outputs["norm_dense2"][agree],
                             mixed["norm_dense2"][agree], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name, mantissa, smallest", [
    ("float32", 23, 0), ("float16", 10, 2.0**-24), ("bfloat16", 7, 0),
    ("float8_e4m3fn", 3, 2.0**-9)])
def test_float_formats_against_float64(name, mantissa, smallest):
  dtype = np.dtype(getattr(ml_dtypes, name, name))
  as_format = lambda a: np.asarray(a, np.float32).astype(dtype).astype(np.float64)
  net = network(bits_table([name] * 5, [name] * 4))
  variables = ordinary_variables(net, 6)
  for layer in NAMES:
    scale = variables["params"][f"norm_{layer}"]["batch_norm"]["scale"]
    scale[0], scale[1] = 0, 1e-3
  hard = fold_network(net, variables)
  x = random_images(BATCH)
  outputs = jax.jit(functools.partial(captured, net, "hard"))(hard, x)
  for layer in NAMES:  # Each with the inputs that it got.
    kernel = as_format(variables["params"][layer]["kernel"])
    np.testing.assert_array_equal(hard["hard"][layer]["kernel"], kernel)
    x = x.reshape(len(x), -1) if layer == "dense1" else x
    acc = convolve(x, kernel) if layer.startswith("conv") else x @ kernel
    np.testing.assert_allclose(outputs[layer], acc, rtol=1e-5, atol=1e-5)
    acc = max_pool(acc) if layer == "conv2" else acc
    norm = f"norm_{layer}"
    y = batch_norm(acc, *norm_arguments(variables, norm))
    x = np.float64(outputs[norm])
    if layer == NAMES[-1]:
      np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)
    else:
      y = np.clip(y, -1, 1)
      half = np.maximum(np.abs(y) * 2.0 ** -(mantissa + 1), smallest / 2)
      assert (np.abs(x - y) <= half + 1e-5).all()
      np.testing.assert_array_equal(as_format(x), x)
      assert len(np.unique(x)) > 20 and (np.abs(x) == 1).mean() < 0.8


def test_pixels_that_are_not_multiples_of_1_64():
  # The probe says so, and then center is not rounded; later layers are as ever.
  bits = NETWORKS["3/3"][0]
  net = network(bits)
  variables = ordinary_variables(net, 8)
  hard = {}
  for kind in ("integer", "standardized"):
    pixels = pixels_lib.pixels(kind, (0.5, 0.4), (0.25, 0.2))
    hard[kind] = fold.fold(net, variables, pixels_lib.probe(pixels, SHAPE))["hard"]
  assert_clean(hard)
  mean, var, scale, bias, epsilon = norm_arguments(variables, "norm_conv1")
  center = mean - bias * np.sqrt(var.astype(np.float64) + epsilon) / scale
  got = hard["standardized"].pop("norm_conv1")["center"]
  assert_bitwise(got, center.astype(np.float32))
  rounded = hard["integer"].pop("norm_conv1")["center"]
  assert (rounded != got).any()
  np.testing.assert_allclose(rounded, got, atol=2.0**-16)  # Below 128: 2^(7 - 23) / 2.
  jax.tree.map(assert_bitwise, hard["integer"], hard["standardized"])


def test_constants_do_not_change_the_sum_with_a_shortcut():
  """As an exported network has them: XLA may drop + 0 and fuse what it then sees."""
  generator = np.random.default_rng(0)
  size = 4096
  norm = fold.Norm(*(np.asarray(part, np.float32) for part in (
      np.round(generator.normal(0, 20, size) * 1024) / 1024,
      generator.normal(0, 0.1, size), np.zeros(size))))
  acc = np.round(generator.normal(0, 40, (32, size))).astype(np.float32)
  shortcut = generator.choice(np.float32([-1, -0.5, 0.25, 1]), acc.shape)
  want = (acc - norm.center) * norm.scale + shortcut
  got = jax.jit(lambda acc, shortcut: fold.apply_norm(acc, norm) + shortcut)(
      acc, shortcut)
  assert_bitwise(got, want)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("leaf", [("params", "dense1", "kernel"),
                                  ("batch_stats", "norm_dense1", "batch_norm", "mean")])
def test_variables_that_are_not_finite_are_refused(leaf, value):
  net = models.ConvNet(3, (), ())
  variables = jax.device_get(layers.initialize(net, (2, 2, 1)))
  broken = traverse_util.flatten_dict(variables)
  broken[leaf] = np.full_like(broken[leaf], value)
  probe = pixels_lib.probe(pixels_lib.pixels("integer", [0.5], [0.2]), (2, 2, 1))
  with pytest.raises(ValueError, match=f"{leaf[-1]}.* is not finite"):
    fold.fold(net, traverse_util.unflatten_dict(broken), probe)
