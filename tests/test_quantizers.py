"""Quantizers against literals, and against NumPy float64 written from the paper."""

import hypothesis
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from minw import quantizers

pytestmark = pytest.mark.usefixtures("strict")

BITS = (1, 2, 3, 4, 5)
INF, NAN = np.inf, np.nan

# Eq 4, 21, 22 written out: the ascending positive levels.
LEVELS = {
    1: [1],
    2: [1],
    3: [1 / 4, 1 / 2, 1],
    4: [1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1],
    5: [1 / 16384, 1 / 8192, 1 / 4096, 1 / 2048, 1 / 1024, 1 / 512, 1 / 256, 1 / 128,
        1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1],
}
# 0.1 for two bits, else the midpoints between two levels.
DEFAULTS = {
    1: [],
    2: [0.1],
    3: [1 / 8, 3 / 8, 3 / 4],
    4: [1 / 128, 3 / 128, 3 / 64, 3 / 32, 3 / 16, 3 / 8, 3 / 4],
    5: [1 / 32768, 3 / 32768, 3 / 16384, 3 / 8192, 3 / 4096, 3 / 2048, 3 / 1024,
        3 / 512, 3 / 256, 3 / 128, 3 / 64, 3 / 32, 3 / 16, 3 / 8, 3 / 4],
}
CUSTOM = {
    1: [],
    2: [0.5],
    3: [0.2, 0.3, 0.9],
    4: [0.01, 0.02, 0.05, 0.1, 0.3, 0.6, 2.5],
    5: [0.07, 0.14, 0.21, 0.28, 0.35, 0.42, 0.49, 0.56, 0.63, 0.7, 0.77, 0.84, 0.91,
        0.98, 1.05],
}

quantize = jax.jit(quantizers.quantize)
encode = jax.jit(quantizers.encode)
decode = jax.jit(quantizers.decode)
round_to = jax.jit(quantizers.round_to, static_argnums=1)


def h(a, thresholds, levels) -> np.ndarray:
  """Eq 4, 21, 22 for 1-D `a`: the level whose number is that of thresholds passed."""
  a = np.asarray(a, np.float64)
  if not len(thresholds):
    return np.where(np.isnan(a), NAN, np.where(a > 0, 1.0, -1.0))
  thresholds = np.asarray(thresholds, np.float32).astype(np.float64)
  passed = (np.abs(a) > thresholds[:, None]).sum(axis=0)
  level = np.array([0.0, *levels])[passed] * np.where(a < 0, -1.0, 1.0) + 0.0
  return np.where(np.isnan(a), NAN, level)


def assert_bitwise(got, want) -> None:
  """Equal, NaN to NaN, and no zero is negative where `want`'s is not."""
  got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
  np.testing.assert_array_equal(got, want)
  np.testing.assert_array_equal(np.signbit(got[got == 0]),
                                np.signbit(want[want == 0]))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("given", [None, CUSTOM], ids=["default", "custom"])
def test_every_level_and_every_tie(bits, given):
  thresholds = np.asarray((given or DEFAULTS)[bits], np.float32)
  inputs, outputs = [2.0, INF, 3e38, -INF], [1.0, 1.0, 1.0, -1.0]
  for threshold, lower, upper in zip(thresholds, [0.0, *LEVELS[bits]], LEVELS[bits]):
    for sign in (1, -1):
      inputs += [sign * np.nextafter(threshold, np.float32(0)), sign * threshold,
                 sign * np.nextafter(threshold, np.float32(9))]
      outputs += [sign * lower or 0.0, sign * lower or 0.0, sign * upper]
  if thresholds.size and thresholds[-1] > 2:  # 2.0 is still below the last one.
    outputs[0] = LEVELS[bits][-2]
  grid = quantizers.grid(bits, given and given[bits])
  assert_bitwise(quantize(np.array(inputs, np.float32), grid), outputs)


@pytest.mark.parametrize("bits", BITS)
def test_zero_signs_and_not_a_number(bits):
  zero = -1.0 if bits == 1 else 0.0  # Eq 4: h(0) = -1.
  tiny = 1.0 if bits == 1 else 0.0
  x = np.array([0.0, -0.0, 6e-5, -6e-5, -1e-5, NAN, INF, -INF], np.float32)
  if bits == 5:  # Its first threshold is 2^-15.
    want = [zero, zero, 2**-14, -2**-14, 0.0, NAN, 1, -1]
  else:
    want = [zero, zero, tiny, -tiny or 0.0, -tiny or 0.0, NAN, 1, -1]
  grid = quantizers.grid(bits)
  assert_bitwise(quantize(x, grid), want)
  codes = np.asarray(encode(x, grid))
  assert codes[0] == codes[1] == codes[5] == zero  # NaN gets the code of 0.
  assert codes[6] == -codes[7] == len(LEVELS[bits])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_below_the_smallest_normal_is_zero(dtype):
  """Whether a device flushes denormals or not: the rule does not rely on it."""
  smallest = 2.0**-126 if dtype != jnp.float16 else 2.0**-24
  x = jnp.asarray([smallest, smallest / 2, 1e-40, 0, -1e-40, -smallest], dtype)
  np.testing.assert_array_equal(
      quantize(x, quantizers.grid(1)).astype(np.float32), [1, -1, -1, -1, -1, -1])
  np.testing.assert_array_equal(encode(x, quantizers.grid(1)), [1, -1, -1, -1, -1, -1])


def test_below_the_smallest_normal_is_zero_in_float64():
  """1e-40 is a normal number in float64: nothing is flushed on any device."""
  with jax.enable_x64(True):
    x = jnp.asarray([2.0**-126, 1e-40, -1e-40])
    np.testing.assert_array_equal(quantize(x, quantizers.grid(1)), [1, -1, -1])
    tiny = jnp.full((3, 2), 1e-40)
    for bits in (2, 3):
      got = jax.jit(lambda x, bits=bits: quantize(x, quantizers.weight_grid(x, bits)))(
          tiny)
      np.testing.assert_array_equal(got, jnp.zeros_like(tiny))


def test_numbers_of_a_grid():
  for bits in BITS:
    levels = quantizers.level_magnitudes(bits)
    assert levels.dtype == np.float32
    np.testing.assert_array_equal(levels, LEVELS[bits])
    np.testing.assert_array_equal(quantizers.fixed_thresholds(bits), DEFAULTS[bits])
    grid = quantizers.grid(bits)
    assert grid.thresholds.dtype == grid.magnitudes.dtype == jnp.float32
    np.testing.assert_array_equal(grid.magnitudes, LEVELS[bits])
  assert [quantizers.num_thresholds(bits) for bits in BITS] == [0, 1, 3, 7, 15]
  assert [quantizers.step_size(bits) for bits in BITS] == [
      1, 1, 1 / 4, 1 / 64, 1 / 16384]
  assert [quantizers.step_size(name) for name in quantizers.FLOAT_FORMATS] == [0] * 4
  np.testing.assert_array_equal(quantizers.mean_factors(1), np.zeros(0))
  np.testing.assert_array_equal(quantizers.mean_factors(2), [0.7])
  np.testing.assert_allclose(quantizers.mean_factors(3), [0.3125, 0.9375, 1.875])
  np.testing.assert_allclose(
      quantizers.mean_factors(4), [5 / 256, 15 / 256, 15 / 128, 15 / 64, 15 / 32,
                                   15 / 16, 15 / 8])


@pytest.mark.parametrize("bits", BITS)
def test_codes(bits):
  grid = quantizers.grid(bits)
  count = len(LEVELS[bits])
  codes = [-1, 1] if bits == 1 else list(range(-count, count + 1))
  levels = [-level for level in LEVELS[bits][::-1]] + [0.0] + LEVELS[bits]
  if bits == 1:
    levels = [-1.0, 1.0]
  got = encode(np.array(levels, np.float32), grid)
  assert got.dtype == jnp.int8
  np.testing.assert_array_equal(got, codes)
  decoded = decode(np.array([codes], np.int8), grid)
  assert decoded.dtype == jnp.float32 and decoded.shape == (1, len(codes))
  assert_bitwise(decoded, [levels])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_dtype_is_kept_and_thresholds_are_not_rounded_to_it(dtype):
  # The float16 nearest 0.3 is 0.30005, the bfloat16 0.30078: above the threshold
  # 0.3, but not above one rounded to their type. The float32 are 0.3 and the next.
  x = np.array([0.3, -0.3, 1 / 3], dtype)
  above = 0.0 if dtype == "float32" else 1.0
  two = quantize(x, quantizers.grid(2, [0.3]))
  assert two.dtype == dtype
  np.testing.assert_array_equal(two.astype(np.float32), [above, -above, 1])
  five = quantize(np.array([2**-14, -1, NAN], dtype), quantizers.grid(5))
  assert five.dtype == dtype
  np.testing.assert_array_equal(five.astype(np.float32), [2**-14, -1, NAN])
  one = quantize(np.array([0, 3, NAN], dtype), quantizers.grid(1))
  assert one.dtype == dtype
  np.testing.assert_array_equal(one.astype(np.float32), [-1, 1, NAN])


def test_float64():
  with jax.enable_x64(True):
    grid = quantizers.grid(2, [0.3])
    assert grid.thresholds.dtype == grid.magnitudes.dtype == jnp.float64
    # The float32 nearest 0.3 is 0.30000001.
    y = quantize(np.array([0.3, 0.3 + 1e-12, -0.3 - 1e-12]), grid)
    assert y.dtype == jnp.float64
    np.testing.assert_array_equal(y, [0, 1, -1])
    weights = np.array([[1 / 3, -1.0], [1 / 7, 2.0]])
    thresholds = jax.jit(
        lambda w: quantizers.mean_thresholds(w, 2, per_channel=True))(weights)
    assert thresholds.dtype == jnp.float64
    np.testing.assert_allclose(thresholds, [[0.7 * 5 / 21, 1.05]], rtol=1e-15)


def test_thresholds_per_channel():
  # Ascending for each channel, not from one channel to the next.
  thresholds = np.array([[0.2, 0.1, 0.5], [0.6, 0.3, 0.7], [0.7, 0.4, 2.0]], "f4")
  x = np.array([[0.2, 0.2, 0.2], [0.65, 0.35, 0.6], [-0.65, -0.35, -0.6],
                [1.0, 1.0, 1.0], [-9.0, -9.0, -9.0]], np.float32)
  want = np.array([[0, 0.25, 0], [0.5, 0.5, 0.25], [-0.5, -0.5, -0.25], [1, 1, 0.5],
                   [-1, -1, -1]])
  codes = np.array([[0, 1, 0], [2, 2, 1], [-2, -2, -1], [3, 3, 2], [-3, -3, -3]])
  grid = quantizers.grid(3, thresholds[:, None, :])
  np.testing.assert_array_equal(quantize(x, grid), want)
  np.testing.assert_array_equal(encode(x, grid), codes)
  with jax.numpy_rank_promotion("allow"):  # One axis against the last of three.
    flat = quantizers.grid(3, thresholds)
    np.testing.assert_array_equal(quantize(x[None], flat), want[None])
    one = quantizers.grid(1, np.zeros((0, 3)))
    np.testing.assert_array_equal(quantize(x, one), np.where(x > 0, 1, -1))


@pytest.mark.parametrize("bits", [1, 3])
def test_transformations_change_nothing(bits):
  x = np.linspace(-1.2, 1.2, 4 * 49, dtype=np.float32).reshape(4, 49)
  thresholds = np.array([0.11, 0.4, 0.8], np.float32)[:len(DEFAULTS[bits])]
  grid = quantizers.grid(bits, thresholds)
  want = h(x.ravel(), thresholds, LEVELS[bits]).reshape(x.shape)
  scan = jax.jit(lambda x, grid: jax.lax.scan(
      lambda carry, row: (carry, quantizers.quantize(row, grid)), None, x)[1])
  traced = jax.jit(lambda x, t: quantizers.quantize(x, quantizers.grid(bits, t)))
  np.testing.assert_array_equal(quantizers.quantize(x, grid), want)
  np.testing.assert_array_equal(quantize(x, grid), want)
  np.testing.assert_array_equal(jax.vmap(quantize, (0, None))(x, grid), want)
  np.testing.assert_array_equal(scan(x, grid), want)
  np.testing.assert_array_equal(traced(x, thresholds), want)
  # A grid for each row, as a sweep over thresholds has.
  grids = quantizers.Grid(np.stack([thresholds * s for s in (1, 2, 3, 4)]),
                          np.stack([np.asarray(grid.magnitudes)] * 4))
  want = [h(row, thresholds * s, LEVELS[bits]) for s, row in zip((1, 2, 3, 4), x)]
  np.testing.assert_array_equal(jax.vmap(quantize)(x, grids), want)


def test_mean_thresholds_break_idempotence():
  """h(level) = level needs D_i < level_i <= D_(i+1), which scaling can break."""
  levels = np.array(LEVELS[3], np.float32)
  np.testing.assert_array_equal(quantize(levels, quantizers.grid(3)), levels)
  for mean, want in [(0.05, [1, 1, 1]), (0.9, [0, 0.25, 0.5])]:
    # At mean 0.9 the thresholds are 0.281, 0.844, 1.688.
    weights = np.full((4, 2), mean, np.float32)
    grid = quantizers.grid(3, quantizers.mean_thresholds(weights, 3))
    np.testing.assert_array_equal(quantize(levels, grid), want)


def test_mean_thresholds_by_hand():
  weights = np.array([[1, -3], [-2, 4]], np.float32)
  layer = quantizers.mean_thresholds(weights, 2)
  assert layer.shape == (1,) and layer.dtype == jnp.float32
  np.testing.assert_allclose(layer, [1.75], rtol=1e-6)
  channel = quantizers.mean_thresholds(weights, 2, per_channel=True)
  assert channel.shape == (1, 2)
  np.testing.assert_allclose(channel, [[1.05, 2.45]], rtol=1e-6)
  three = quantizers.mean_thresholds(weights, 3, factors=(0.1, 0.2, 2))
  np.testing.assert_allclose(three, [0.25, 0.5, 5], rtol=1e-6)
  assert quantizers.mean_thresholds(weights, 1).shape == (0,)
  assert quantizers.mean_thresholds(weights, 1, per_channel=True).shape == (0, 2)
  # 1 + 2^-8, the mean of these two, is no bfloat16.
  weights = np.array([[1], [1 + 2**-7]], ml_dtypes.bfloat16)
  for per_channel in (False, True):
    wide = quantizers.mean_thresholds(weights, 2, per_channel=per_channel)
    assert wide.dtype == jnp.float32
    np.testing.assert_allclose(wide.ravel(), [0.7 * (1 + 2**-8)], rtol=1e-6)


@pytest.mark.parametrize("per_channel", [False, True])
def test_mean_thresholds_against_numpy_and_without_gradient(per_channel):
  generator = np.random.default_rng(3)
  weights = generator.normal(0.1, [0.1, 0.5, 2, 7], (3, 3, 5, 4)).astype(np.float32)
  magnitude = np.abs(weights.astype(np.float64))
  mean = magnitude.mean(axis=(0, 1, 2)) if per_channel else magnitude.mean()
  want = np.multiply.outer([0.3125, 0.9375, 1.875], mean)

  @jax.jit
  def run(weights):
    return jax.vjp(
        lambda w: quantizers.mean_thresholds(w, 3, per_channel=per_channel), weights)

  got, pullback = run(weights)
  assert got.shape == want.shape
  np.testing.assert_allclose(got, want, rtol=2e-6)
  np.testing.assert_array_equal(pullback(jnp.ones_like(got))[0],
                                np.zeros_like(weights))


def test_grids_of_weights_and_inputs():
  weights = np.array([[1, -3], [-2, 4]], np.float32)  # Means 2.5; 1.5 and 3.5.
  for arguments, want in [
      ((2,), [1.75]),
      ((2, "layer_mean"), [1.75]),
      ((2, "channel_mean"), [[1.05, 2.45]]),
      ((2, "fixed"), [0.1]),
      ((2, "layer_mean", (0.4,)), [1]),
      ((2, "channel_mean", (0.4,)), [[0.6, 1.4]]),
      ((2, "fixed", (0.4,)), [0.4]),
      ((3, "fixed", (0.4,)), DEFAULTS[3]),  # Meant for the two-bit operands.
      ((3, "layer_mean", (0.1, 0.2, 0.4)), [0.25, 0.5, 1]),
      ((1, "layer_mean"), []),
      ((1, "fixed", (0.4,)), []),
  ]:
    grid = quantizers.weight_grid(weights, *arguments)
    assert grid.thresholds.shape == np.shape(want), arguments
    np.testing.assert_allclose(grid.thresholds, want, rtol=1e-6)
    np.testing.assert_array_equal(grid.magnitudes, LEVELS[arguments[0]])
  for arguments, want in [((3,), DEFAULTS[3]), ((2, (0.4,)), [0.4]),
                          ((3, (0.4,)), DEFAULTS[3]), ((1, (0.4,)), [])]:
    np.testing.assert_allclose(quantizers.input_grid(*arguments).thresholds, want)
  with pytest.raises(ValueError, match="rule='mean': must be one of layer_mean, cha"):
    quantizers.weight_factors(2, "mean")
  with pytest.raises(ValueError, match="positive and ascending"):
    quantizers.input_grid(3, (0.1, 0.3, 0.2))


@pytest.mark.parametrize("bits", [0, 6, 8, 16, -1, True, False, 2.0, None, "float64",
                                  "3", "int8", "bf16", (2,)])
def test_bits_that_nobody_has(bits):
  with pytest.raises(ValueError, match="must be one of 1, 2, 3, 4, 5 or a float"):
    quantizers.is_grid(bits)
  with pytest.raises(ValueError, match="must be one of"):
    quantizers.grid(bits)
  with pytest.raises(ValueError, match="must be one of"):
    quantizers.step_size(bits)


def test_bits_are_a_grid_or_a_float_format():
  assert [quantizers.is_grid(bits) for bits in BITS] == [True] * 5
  formats = ["float8_e4m3fn", "bfloat16", "float16", "float32"]
  assert [quantizers.is_grid(bits) for bits in formats] == [False] * 4
  with pytest.raises(ValueError, match="'float16' is a float format"):
    quantizers.grid("float16")


@pytest.mark.parametrize("bits, thresholds, message", [
    (1, [0.1], "must be 0 for bits=1"),
    (2, [], "must be 1 for bits=2"),
    (2, 0.1, "must be 1 for bits=2"),
    (3, [0.1, 0.2], "must be 3 for bits=3"),
    (3, [0.1, 0.2, 0.3, 0.4], "must be 3 for bits=3"),
    (3, np.ones((1, 3)), "must be 3 for bits=3"),
    (2, [0.0], "positive and ascending"),
    (2, [-0.1], "positive and ascending"),
    (2, [NAN], "positive and ascending"),
    (3, [0.1, 0.3, 0.2], "positive and ascending"),
    (3, [0.1, 0.1, 0.2], "positive and ascending"),
    (3, [0.1, NAN, 0.2], "positive and ascending"),
    (3, [-0.1, 0.1, 0.2], "positive and ascending"),
    # The first of two channels is the wrong one.
    (3, [[0.1, 0.2], [0.3, 0.4], [0.2, 0.5]], "positive and ascending"),
    (2, [[0.1, 0.0]], "positive and ascending"),
    (2, [np.inf], "thresholds=.*inf.*: must be finite, positive and ascending"),
    (2, [-np.inf], "finite, positive and ascending"),
    (3, [0.1, 0.2, np.inf], "finite, positive and ascending"),
    # In float32 the first is infinite, the next 0, and the last two are the same.
    (2, [1e39], "finite, positive and ascending"),
    (2, [1e-50], "finite, positive and ascending"),
    (3, [0.1, 0.2, 0.2 + 1e-12], "finite, positive and ascending"),
])
def test_thresholds_that_are_wrong(bits, thresholds, message):
  with pytest.raises(ValueError, match=message):
    quantizers.grid(bits, thresholds)


@pytest.mark.parametrize("thresholds", [
    [True], [0.1j], ["0.1"], [None], np.array([0.1], complex), np.array([1], object)])
def test_thresholds_that_are_no_real_numbers(thresholds):
  with pytest.raises(TypeError, match="thresholds=.*: must be real numbers"):
    quantizers.grid(2, thresholds)


def test_thresholds_may_be_whole_numbers():
  np.testing.assert_array_equal(quantizers.grid(3, [1, 2, 3]).thresholds, [1, 2, 3])


@pytest.mark.parametrize("factors, error", [
    ([np.inf], ValueError), ([NAN], ValueError), ([-0.7], ValueError),
    ([0.7, 0.8], ValueError), ([0.7j], TypeError), ([True], TypeError)])
def test_factors_that_are_wrong(factors, error):
  with pytest.raises(error, match="factors=.*: must be"):
    quantizers.mean_thresholds(np.ones((3, 4), np.float32), 2, factors=factors)


GRID = quantizers.grid(2)


@pytest.mark.parametrize("dtype", ["int32", "uint8", "bool", "complex64"])
@pytest.mark.parametrize("name, function", [
    ("x", lambda x: quantizers.quantize(x, GRID)),
    ("x", lambda x: quantizers.encode(x, GRID)),
    ("x", lambda x: quantizers.round_to(x, "bfloat16")),
    ("x", lambda x: quantizers.round_to(x, "float32")),
    ("weights", lambda x: quantizers.mean_thresholds(x, 2)),
    ("weights", lambda x: quantizers.weight_grid(x, 3, "channel_mean"))])
def test_what_is_not_float_is_refused(dtype, name, function):
  """Under tracing too, where dtypes are known."""
  x = jnp.zeros((2, 3), dtype)
  for call in (function, jax.jit(function)):
    with pytest.raises(TypeError,
                       match=f"{name} of dtype {dtype}: must be a float arr"):
      call(x)


@pytest.mark.parametrize("dtype", ["float32", "bool", "complex64"])
def test_codes_that_are_no_integers_are_refused(dtype):
  with pytest.raises(TypeError, match=f"codes of dtype {dtype}: must be integers"):
    quantizers.decode(jnp.zeros(3, dtype), GRID)


@pytest.mark.parametrize("grid", [2, None, "grid", (0.1,), jnp.zeros(1)])
def test_what_is_no_grid_is_refused(grid):
  for call in (lambda: quantizers.quantize(jnp.zeros(3), grid),
               lambda: quantizers.encode(jnp.zeros(3), grid),
               lambda: quantizers.decode(jnp.zeros(3, jnp.int8), grid)):
    with pytest.raises(TypeError, match="grid=.*: must be a Grid, which"):
      call()


@pytest.mark.parametrize("x", [0.5, 1, "a", None, [0.5], b"1"])
def test_what_is_no_array_is_refused(x):
  with pytest.raises(TypeError, match="x=.*: must be a float array"):
    quantizers.quantize(x, quantizers.grid(1))


def test_float_formats_that_nobody_has():
  for dtype in ("int8", "float64", "bf16", 3):
    with pytest.raises(ValueError, match="dtype=.*: must be one of float8_e4m3fn, bfl"):
      quantizers.round_to(jnp.zeros(3), dtype)


@pytest.mark.parametrize("function", [
    quantizers.num_thresholds, quantizers.level_magnitudes, quantizers.fixed_thresholds,
    quantizers.mean_factors, quantizers.unit_thresholds, quantizers.input_grid])
@pytest.mark.parametrize("bits", [0, 6, 64, -1, True, 2.0, None, "3", "float16"])
def test_bits_are_checked_everywhere(function, bits):
  with pytest.raises(ValueError, match="bits=.*(must be one of|is a float format)"):
    function(bits)


def test_thresholds_that_are_wrong_under_tracing():
  with pytest.raises(TypeError, match=r"shape \(1,\) of dtype complex64: must be real"):
    jax.jit(lambda t: quantizers.grid(2, t))(np.array([0.1], np.complex64))
  with pytest.raises(ValueError, match=r"shape \(2,\): must be 3 for bits=3"):
    jax.jit(lambda t: quantizers.grid(3, t))(np.array([0.1, 0.2], np.float32))


NARROW = {"float8_e4m3fn": ml_dtypes.float8_e4m3fn, "bfloat16": ml_dtypes.bfloat16,
          "float16": np.float16}
LIMITS = {"float8_e4m3fn": 448.0, "bfloat16": (2 - 2**-7) * 2.0**127,
          "float16": 65504.0}


def rounded(x: np.ndarray, name: str) -> np.ndarray:
  """x to a format and back, by ml_dtypes; float32."""
  limit = np.float32(LIMITS[name])
  return np.clip(x, -limit, limit).astype(NARROW[name]).astype(np.float32)


@pytest.mark.parametrize("name", NARROW)
def test_round_to_at_every_value_and_every_tie(name):
  size = np.dtype(NARROW[name]).itemsize
  patterns = np.arange(256**size, dtype=f"u{size}").view(NARROW[name])
  values = np.unique(patterns.astype(np.float32))
  values = values[np.isfinite(values)]
  ties = values[:-1] / 2 + values[1:] / 2
  beyond = [min(LIMITS[name] * factor, 3.4e38) for factor in (1.001, 1.04, 100)]
  x = np.concatenate([
      values, ties, np.nextafter(ties, np.float32(INF)),
      np.nextafter(ties, -np.float32(INF)),
      np.array([*beyond, -beyond[0], -beyond[1], INF, -INF, NAN], np.float32)])
  # XLA flushes what is denormal in float32, and so in bfloat16.
  x = x[(np.abs(x) >= 2**-126) | (x == 0) | np.isnan(x)]
  got = round_to(x, name)
  assert got.dtype == jnp.float32
  np.testing.assert_array_equal(got, rounded(x, name))
  np.testing.assert_array_equal(round_to(x, "float32"), x)


@pytest.mark.parametrize("name", ["float8_e4m3fn", "float16"])
def test_round_to_of_bfloat16_saturates(name):
  # 65504 is no bfloat16: it must not round up to what float16 calls infinity.
  x = np.array([65280, 65536, 1e5, -1e30, INF, -INF, 0.3, 1e-7], ml_dtypes.bfloat16)
  got = round_to(x, name)
  assert got.dtype == jnp.bfloat16
  want = rounded(x.astype(np.float32), name).astype(ml_dtypes.bfloat16)
  assert np.isfinite(want.astype(np.float32)).all()
  np.testing.assert_array_equal(got.astype(np.float32), want.astype(np.float32))
  assert round_to(x[:2].astype(np.float16), name).dtype == jnp.float16


@pytest.mark.parametrize("name", NARROW)
def test_round_to_keeps_the_gradient(name):
  # A gradient of 1.2345e-5 is 0 in float8, and is no number of the other two.
  top = np.float32(LIMITS[name])
  x = np.array([0.3, -0.3, 0.0, top, -top, np.nextafter(top, np.float32(INF)), INF],
               np.float32)
  g = np.full(x.shape, 1.2345e-5, np.float32)
  backward = jax.jit(lambda x, g: jax.vjp(
      lambda x: quantizers.round_to(x, name), x)[1](g)[0])
  np.testing.assert_array_equal(backward(x, g), g * [1, 1, 1, 1, 1, 0, 0])
  assert backward(x[:3].astype(np.float16), g[:3].astype(np.float16)).dtype == "f2"


@pytest.mark.parametrize("name", NARROW)
def test_round_to_holds_no_cast_that_a_compiler_may_drop(name):
  """On a GPU, XLA takes a cast to 16 bits and back for no cast (openxla/xla#41605)."""
  text = str(jax.make_jaxpr(lambda x: quantizers.round_to(x, name))(np.float32(1)))
  assert "reduce_precision" in text
  assert f"new_dtype={name}" not in text


@jax.jit
def everything(x, grid):
  levels = quantizers.quantize(x, grid)
  codes = quantizers.encode(x, grid)
  return {
      "levels": levels,
      "mirrored": quantizers.quantize(-x, grid),
      "twice": quantizers.quantize(levels, grid),
      "narrow": quantizers.quantize(x.astype(jnp.bfloat16), grid),
      "codes": codes,
      "decoded": quantizers.decode(codes, grid),
  }


@st.composite
def grids_and_inputs(draw):
  bits = draw(st.sampled_from(BITS))
  levels = LEVELS[bits]
  thresholds = st.floats(2**-16, 4, width=32)
  thresholds = sorted(draw(st.lists(
      thresholds, min_size=len(DEFAULTS[bits]), max_size=len(DEFAULTS[bits]),
      unique=True)))
  # One in two is a grid that keeps its levels: thresholds close below them.
  if draw(st.booleans()) and bits > 1:
    share = draw(st.floats(0.5, 1, exclude_max=True, width=16))
    thresholds = [share * level for level in levels]
  ties = np.array([0.0, *thresholds], np.float32)
  ties = np.concatenate([ties, np.nextafter(ties[1:], np.float32(9)), levels])
  numbers = dict(width=32, allow_subnormal=False)
  element = st.one_of(
      st.floats(**numbers), st.floats(-1.5, 1.5, **numbers),
      st.sampled_from([*ties.tolist(), *(-ties).tolist()]))
  x = draw(st.lists(element, min_size=24, max_size=24))
  return bits, np.array(thresholds, np.float32), np.array(x, np.float32)


@hypothesis.given(grids_and_inputs())
@hypothesis.settings(max_examples=100)
def test_any_grid(case):
  bits, thresholds, x = case
  levels = np.array(LEVELS[bits])
  # All levels are fed too, so that h h = h on these inputs only if on all.
  x = np.concatenate([x, np.resize(levels, 15).astype(np.float32)])
  got = {name: np.asarray(value) for name, value in everything(
      x, quantizers.grid(bits, thresholds)).items()}
  want = h(x, thresholds, levels)
  assert_bitwise(got["levels"], want)
  number = ~np.isnan(x)
  narrow = x.astype(ml_dtypes.bfloat16)
  assert got["narrow"].dtype == ml_dtypes.bfloat16
  assert_bitwise(got["narrow"], h(narrow, thresholds, levels))

  odd = number & (x != 0) if bits == 1 else number
  np.testing.assert_array_equal(got["mirrored"][odd], -got["levels"][odd])
  np.testing.assert_array_equal(got["mirrored"][x == 0], -1.0 if bits == 1 else 0.0)

  assert got["codes"].dtype == np.int8
  count = len(levels)
  assert np.abs(got["codes"]).max() <= count
  assert bits > 1 or (got["codes"] != 0).all()
  signed = np.concatenate([-levels[::-1], [0.0], levels])
  assert_bitwise(got["decoded"][number], want[number])
  np.testing.assert_array_equal(signed[got["codes"][number] + count], want[number])

  # Theorem 3 and h(level) = level rest on D_i < level_i <= D_(i+1).
  if bits > 1:
    keeps = ((thresholds < levels) & (levels <= [*thresholds[1:], INF])).all()
    same = got["twice"][number] == got["levels"][number]
    kept = got["levels"][-15:] == x[-15:]
    assert kept.all() == keeps
    assert same.all() or not keeps


def stretched(x, learned, fixed):
  """np.interp channel after channel, and the slope of its part at each number."""
  y, slope = np.empty(x.shape), np.empty(x.shape)
  part = np.empty(x.shape, int)
  for c in range(x.shape[-1]):
    ends, images = [0, *learned[:, c], 1], [0, *fixed, 1]
    size = np.abs(x[..., c])
    y[..., c] = np.sign(x[..., c]) * np.interp(size, ends, images)
    part[..., c] = np.clip(np.searchsorted(ends, size, "right") - 1, 0, len(fixed))
    slope[..., c] = (np.diff(images) / np.diff(ends))[part[..., c]]
  return y, slope, part


@pytest.mark.parametrize("bits", [2, 3])
def test_learned_thresholds(bits):
  """h after the map is h with the learned thresholds; both gradients are the map's."""
  rng = np.random.default_rng(bits)
  grid, q = quantizers.input_grid(bits), quantizers.num_thresholds(bits)
  fixed = np.float64(grid.thresholds)
  widths = np.float32(rng.normal(0, 1, (q + 1, 5)))
  sizes = np.abs(np.float64(widths))
  sizes = sizes + 2**-20 * sizes.sum(0)
  learned = np.stack([sizes[:i].sum(0) / sizes.sum(0) for i in range(1, q + 1)])
  np.testing.assert_allclose(quantizers.learned_thresholds(widths), learned, rtol=1e-6)
  x = np.float32(rng.uniform(-1, 1, (400, 5)))
  x[0], x[1], g = 1, -1, np.float32(rng.normal(size=x.shape))
  got, pullback = jax.vjp(
      lambda x, learned: quantizers.stretch(x, learned, grid.thresholds),
      jnp.asarray(x), jnp.float32(learned))
  want, slope, part = stretched(np.float64(x), learned, fixed)
  near = np.abs(np.abs(np.float64(x))[..., None] - learned.T).min(-1) < 1e-5
  np.testing.assert_allclose(got, want, atol=2e-6)
  levels = np.array([0, *quantizers.level_magnitudes(bits)])
  size = (np.abs(x)[..., None] > learned.T).sum(-1)
  np.testing.assert_array_equal(
      np.asarray(quantizers.quantize(got, grid))[~near],
      (np.sign(x) * levels[size])[~near])
  to_x, to_learned = pullback(jnp.asarray(g))
  np.testing.assert_allclose(
      np.asarray(to_x)[~near], (g * slope)[~near], rtol=1e-4)
  # By moving one threshold at a time, where no number passes it.
  keep = ~near
  for i in range(q):
    step = np.zeros((q, 1))
    step[i] = 1e-7
    change = (stretched(np.float64(x), learned + step, fixed)[0]
              - stretched(np.float64(x), learned - step, fixed)[0]) / 2e-7
    np.testing.assert_allclose(
        to_learned[i], (g * change * keep).sum(0), rtol=2e-3, atol=0.1 * near.sum()
        + 1e-3)


@pytest.mark.parametrize("bits", [2, 3, 5])
def test_widths_of_thresholds(bits):
  fixed = quantizers.fixed_thresholds(bits)
  widths = quantizers.threshold_widths(fixed)
  assert widths.shape == (len(fixed) + 1,)
  np.testing.assert_allclose(quantizers.learned_thresholds(widths), fixed, rtol=1e-6)


@pytest.mark.parametrize("widths", [
    [0, 0, 0, 0], [50, 0, 0, 50], [0, 1e30, 0, 1e-30], [0, 0, 1e-30, 0]])
def test_thresholds_differ_for_any_widths(widths):
  """And gradients are finite on the thresholds and elsewhere."""
  widths = np.float32(widths)[:, None]
  learned = np.asarray(quantizers.learned_thresholds(jnp.asarray(widths)))
  steps = np.diff(learned[:, 0], prepend=0, append=1)
  assert (steps > 2.0**-21).all()
  x = jnp.float32([0, 1, -1, 0.3, *learned[:, 0]])[:, None]
  grid = quantizers.input_grid(3)
  gradients = jax.grad(lambda x, widths: quantizers.stretch(
      x, quantizers.learned_thresholds(widths), grid.thresholds).sum(), (0, 1))(
          x, jnp.asarray(widths))
  assert all(np.isfinite(leaf).all() for leaf in gradients)


def test_thresholds_of_1_cannot_be_learned():
  with pytest.raises(ValueError, match="must be less than 1 to be learned"):
    quantizers.threshold_widths(np.array([0.5, 1.0]))
