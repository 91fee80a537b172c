"""minw.kernels.xla, against the NumPy reference and convolutions of decoded floats."""

import functools
import itertools
import time

from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import jax
import numpy as np
import pytest

from minw import fold
from minw import layers
from minw import models
from minw import pack
from minw import packed
from minw.data import pixels as pixels_lib
from minw.kernels import reference
from minw.kernels import xla
from packed_models import randomized

PRODUCTS = ["popcount", "dot"]
LEVELS = {1: [-1, 1], 2: [-1, 0, 1], 3: [-4, -2, -1, 0, 1, 2, 4]}


@pytest.fixture(autouse=True, scope="module")
def small_blocks():
  """Loops over words and channels even where there are few; also compiles faster."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(xla, "_TERMS", 6)
    patch.setattr(xla, "_LANES", 24)
    yield


class Network:
  """Writes a program of random operations; the image is random, too."""

  def __init__(self, seed, size, channels):
    self.rng = np.random.default_rng(seed)
    self.shape = (*size, channels)
    offset = self.rng.integers(0, 256, channels).astype(np.uint8)
    self.empty = packed.Program(self.shape, size, offset, 1, (), {})
    self.values = [packed.image_value(self.shape, size, offset)]
    self.ops = []

  def add(self, kind, *arguments, **fields):
    op = kind(f"op{len(self.ops)}", *arguments, **fields)
    self.values.append(packed.infer_value(op, self.values))
    self.ops.append(op)
    return len(self.ops)

  def conv(self, x, out, bits, window=(1, 1), **fields):
    shape = (out, *window, self.values[x].shape[2] // fields.get("groups", 1))
    if isinstance(bits, str):
      kernel = self.rng.normal(0, 0.3, shape).astype(packed.float_dtype(bits))
      return self.add(packed.Conv, x, bits, kernel.astype(np.float32), **fields)
    codes = {1: [-1, 1], 2: [-1, 0, 1], 3: range(-3, 4)}[bits]
    kernel = self.rng.choice(np.int8(codes), shape)
    return self.add(packed.Conv, x, bits, kernel, **fields)

  def threshold(self, x, bits, shortcut=None):
    c = self.values[x].shape[2]
    tables = 1 if shortcut is None else len(
        packed.LEVELS[self.values[shortcut].bits])
    scale = np.sqrt(self.values[x].bound.max()) + 1
    if x == 0:
      scale *= 8
    t = self.rng.normal(0, scale, (tables, packed.num_thresholds(bits), c))
    t = np.sort(t.round().astype(np.int32), 1)
    falling = self.rng.random(c) < 0.5
    t[..., falling] = t[:, ::-1, falling]
    return self.add(packed.Threshold, x, bits, falling, t, shortcut)

  def norm(self, x):
    c = self.values[x].shape[2]
    return [self.rng.normal(0, 1, c).astype(np.float32) for _ in range(3)]

  def float_norm(self, x, bits, **fields):
    q = {1: 0, 2: 1, 3: 3}.get(bits, 0)
    grid = np.float32([0.1, 0.4, 0.8])[:q]
    return self.add(packed.FloatNorm, x, bits, 0.25, *self.norm(x), grid, **fields)

  def program(self, x, bits=1):
    """Ends with classes, from a value that it flattens by a dense layer."""
    x = self.conv(x, 7, bits, self.values[x].shape[:2])
    if self.values[x].kind == "FLOAT":
      self.float_norm(x, None)
    else:
      self.add(packed.Logits, x, 2.0 ** -5, *self.norm(x))
    return self.empty._replace(num_classes=7, ops=tuple(self.ops))

  def images(self, batch):
    return self.rng.integers(0, 256, (batch, *self.shape), np.uint8)


def assert_as_reference(program, products, images, **tolerance):
  want = reference.run(program, images)
  operands, function = xla.values(program, products)
  got = jax.jit(function)(operands, images)
  assert len(got) == len(want)
  for a, b in zip(got, want):
    assert a.dtype == b.dtype
    if tolerance and b.dtype == np.float32:
      np.testing.assert_allclose(a, b, **tolerance)
    else:
      np.testing.assert_array_equal(a, b)
  return want, got


def levels(codes, bits):
  codes = np.asarray(codes, int)
  size = np.array([0, 1, 2, 4] if bits == 3 else [0, 1])[np.abs(codes)]
  return np.float32(np.sign(codes) * size)


@pytest.mark.gpu
@pytest.mark.parametrize("products", PRODUCTS)
@settings(max_examples=8)
@given(data=st.data())
def test_convolutions(products, data):
  draw = lambda *values: data.draw(st.sampled_from(values))
  weights, inputs = draw(1, 2, 3), draw(1, 2, 3)
  window = draw(1, 2, 3, 5, 11), draw(1, 2, 3, 4, 7)
  strides = draw(1, 1, 2, 3), draw(1, 1, 2, 3)
  channels, out = draw(1, 3, 31, 33, 65), draw(1, 10, 33)
  pads = tuple(draw(0, 0, 1, n - 1, 4) for n in window for _ in range(2))
  pad = draw(-3, -1, 0, 0, 1, 3) if inputs == 3 else draw(-1, 0, 0, 1)
  size = tuple(n + draw(0, 1, 3) for n in window)
  net = Network(data.draw(st.integers(0, 99)), size, channels)
  codes = net.threshold(0, inputs)
  x = net.conv(codes, out, weights, window, strides=strides, pads=pads, pad=pad)
  program = net.program(net.threshold(x, draw(1, 2, 3)), weights)
  want, got = assert_as_reference(program, products, net.images(draw(1, 2, 3, 5)))

  padded = np.pad(got[codes], [(0, 0), pads[:2], pads[2:], (0, 0)], constant_values=pad)
  np.testing.assert_array_equal(got[x], plain_conv(
      levels(padded, inputs), levels(program.ops[x - 1].kernel, weights), strides))


def plain_conv(x, kernel, strides, dilation=(1, 1), groups=1):
  """A convolution without a border, of float64 (n, h, w, c) and (o, kh, kw, c / g)."""
  out, kh, kw, channels = kernel.shape
  h = (x.shape[1] - (kh - 1) * dilation[0] - 1) // strides[0] + 1
  w = (x.shape[2] - (kw - 1) * dilation[1] - 1) // strides[1] + 1
  acc = np.zeros((len(x), h, w, out))
  for o in range(out):
    first = o // (out // groups) * channels
    for i in range(kh):
      for j in range(kw):
        pixels = x[:, i * dilation[0]:, j * dilation[1]:, first:first + channels]
        pixels = pixels[:, ::strides[0], ::strides[1]][:, :h, :w]
        acc[..., o] += pixels @ kernel[o, i, j].astype(np.float64)
  return acc


@pytest.mark.parametrize("products", PRODUCTS + ["portable"])
@settings(max_examples=6)
@given(data=st.data())
def test_groups_and_dilation(products, data):
  draw = lambda *values: data.draw(st.sampled_from(values))
  weights, inputs = draw(1, 2, 3), draw(1, 2, 3)
  groups, channels, out = draw(1, 2, 3, 34), draw(1, 3, 33), draw(1, 2, 5)
  window, strides = (draw(1, 2, 3), draw(1, 3)), (draw(1, 2), draw(1, 3))
  dilation = draw(1, 2, 4), draw(1, 3)
  pads = tuple(draw(0, 1, 5) for _ in range(4))
  pad = draw(-1, 0, 1)
  spans = [(n - 1) * step + 1 for n, step in zip(window, dilation)]
  size = tuple(max(1, n - sum(draw_pads) + draw(0, 3))
               for n, draw_pads in zip(spans, (pads[:2], pads[2:])))
  net = Network(data.draw(st.integers(0, 99)), size, groups)
  apart = dict(strides=strides, pads=pads, groups=groups, dilation=dilation)
  codes = net.threshold(
      net.conv(0, groups * channels, weights, groups=groups), inputs)
  x = net.conv(codes, groups * out, weights, window, pad=pad, **apart)
  program = net.program(net.threshold(x, draw(1, 2, 3)), weights)
  want, got = assert_as_reference(program, products, net.images(draw(1, 5)))
  padded = np.pad(got[codes], [(0, 0), pads[:2], pads[2:], (0, 0)], constant_values=pad)
  np.testing.assert_array_equal(got[x], plain_conv(
      levels(padded, inputs), levels(program.ops[x - 1].kernel, weights), strides,
      dilation, groups))


@pytest.mark.parametrize("products", PRODUCTS)
def test_all_bits_over_many_words(products):
  """All pairs of bits, over whole maps too: one program compiles faster than nine."""
  net = Network(1, (5, 4), 64)
  codes = {bits: net.threshold(0, bits) for bits in (1, 2, 3)}
  for inputs, weights in itertools.product(codes, codes):
    net.conv(codes[inputs], 50, weights, (3, 3), pads=(1, 1, 1, 1))
    net.conv(codes[inputs], 3, weights, (5, 4))
  want, _ = assert_as_reference(net.program(codes[1]), products, net.images(2))
  for bits, x in codes.items():
    assert len(np.unique(want[x])) == len(LEVELS[bits])


@pytest.mark.gpu
@pytest.mark.parametrize("products, bits", [
    ("popcount", 1), ("dot", 3), *(
        pytest.param("popcount", slow, marks=pytest.mark.slow) for slow in (2, 3))])
def test_everything_between_convolutions(products, bits):
  net = Network(bits, (11, 10), 5)
  a = net.threshold(0, bits)
  b = net.conv(a, 6, bits, (3, 3), pads=(1, 1, 1, 1), strides=(2, 2))
  short = net.add(packed.Shortcut, a, (2, 2), 1, 0)  # Has zeros, at one bit, too.
  c = net.threshold(b, bits, short)
  d = net.conv(short, 6, bits, (3, 3), pads=(1, 1, 1, 1))
  e = net.add(packed.Add, b, d, 2, 1)
  f = net.add(packed.Add, c, short, 0, 3)
  g = net.add(packed.Concat, (e, f, d), (0, 2, 1))
  h = net.add(packed.Pool, g, "max", (3, 2), (2, 1), (2, 1, 0, 1))
  i = net.add(packed.Pool, net.add(packed.Concat, (c, short), (0, 0)), "max", (2, 2),
              (2, 2), (0, 0, 1, 1))
  j = net.add(packed.Pool, i, "sum", (3, 3), (1, 1), (1, 1, 1, 1))
  k = net.add(packed.Pool, net.threshold(h, bits), "sum", (4, 4), (1, 1))
  maximum = net.add(packed.Pool, h, "max", net.values[h].shape[:2], (1, 1))
  for x in (j, k, maximum, 0):  # Convolutions of integers.
    x = net.conv(x, 4, bits, net.values[x].shape[:2])
    net.threshold(x, bits)
  program = net.program(i, bits)
  want, _ = assert_as_reference(program, products, net.images(3))
  assert (want[short][..., 0] == 0).all() and (want[short][..., 1:] != 0).any()
  assert len(np.unique(want[c])) == len(LEVELS[bits])


@pytest.mark.parametrize("products", PRODUCTS)
def test_sums_that_float32_does_not_hold(products):
  net = Network(0, (4, 4), 70)
  x = net.add(packed.Pool, 0, "sum", (4, 4), (1, 1))
  big = net.add(packed.Concat, (x, x), (11, 3))
  for bits in (1, 2, 3):
    net.conv(big, 5, bits)
  program = net.program(net.threshold(net.conv(0, 3, 1), 1))
  want, _ = assert_as_reference(program, products, net.images(4))
  assert np.abs(want[big + 1]).max() > 2 ** 24


@pytest.mark.parametrize("name, products", [
    ("float8_e4m3fn", "popcount"), ("float16", "dot"), ("bfloat16", "popcount"),
    ("float32", "dot")])
def test_float_formats(name, products):
  """Both ways to compute products of floats, each with a narrow and a wide format."""
  net = Network(4, (6, 7), 3)
  a = net.conv(0, 6, name, (3, 3), pads=(1, 1, 1, 1), input_unit=1 / 64)
  b = net.float_norm(a, name)
  b = net.float_norm(net.conv(b, 6, name, (3, 1), pads=(1, 1, 0, 0), groups=6), name)
  b = net.float_norm(net.conv(
      b, 6, name, (3, 3), pads=(2, 2, 1, 1), groups=2, dilation=(2, 1)), name)
  c = net.conv(b, 6, 2, (3, 3), pads=(1, 1, 1, 1), weight_unit=0.5)
  d = net.float_norm(c, name, shortcut=b)
  e = net.add(packed.Concat, (b, d), (0, 0))
  f = net.add(packed.Pool, e, "max", (2, 2), (2, 2), (0, 0, 1, 0))
  g = net.add(packed.Pool, f, "sum", (2, 2), (1, 1))
  h = [net.float_norm(g, bits) for bits in (1, 2, 3)]
  i = net.conv(h[2], 12, name, pad=0, input_unit=0.25)
  j = net.float_norm(i, 2, shortcut=h[1], shortcut_unit=0.5)
  k = net.conv(j, 12, 1)
  net.float_norm(k, 3, shortcut=h[0])  # It normalizes integers.
  program = net.program(net.float_norm(k, name, shortcut=g), name)
  # A float that rounds to another neighbour in the format would differ by more.
  want, _ = assert_as_reference(program, products, net.images(3), rtol=1e-4, atol=1e-4)
  assert all(len(np.unique(want[x])) > 1 for x in h)


def test_batches_and_crops():
  net = Network(3, (9, 8), 3)
  program = net.program(net.threshold(net.conv(0, 40, 1, (3, 3)), 1))
  program = program._replace(source_shape=(12, 11, 3))
  images = np.random.default_rng(0).integers(0, 256, (11, 12, 11, 3), np.uint8)
  want = reference.logits(program, images)
  for products, batch in (("popcount", 4), ("popcount", 11), ("dot", 11)):
    operands, function = xla.logits(program, products)
    got = jax.jit(function)(operands, images[:batch])
    np.testing.assert_array_equal(got, want[:batch])


@pytest.mark.gpu
@pytest.mark.parametrize("bits, pad, products", [
    (3, -1.0, "popcount"), *(pytest.param(*slow, marks=pytest.mark.slow) for slow in (
        (1, 0.0, "popcount"), (2, 1.0, "dot")))])
def test_trained_networks(bits, pad, products):
  net = models.ConvNet(
      10, (8, 33), (20,),
      conv=functools.partial(layers.QuantConv, bits=bits, pad_value=pad),
      dense=functools.partial(layers.QuantDense, bits=bits),
      norm=functools.partial(layers.NormQuant, bits=bits))
  rng = np.random.default_rng(0)
  shape = (13, 13, 3)
  variables = randomized(net, shape)
  pixels = pixels_lib.pixels("integer", (0.49, 0.48, 0.44), (0.2, 0.2, 0.2))
  program = packed.from_bytes(packed.to_bytes(pack.pack(
      net, variables, pixels=pixels, source_shape=(16, 16, 3), crop=shape[:2])))
  images = rng.integers(0, 256, (5, 16, 16, 3), np.uint8)
  hard = fold.fold(net, variables, pixels_lib.probe(pixels, shape))
  want = jax.jit(lambda hard, images: net.apply(
      hard, pixels_lib.normalize(images, pixels), mode="hard"))(
          hard, images[:, 1:14, 1:14])
  operands, function = xla.logits(program, products)
  np.testing.assert_array_equal(jax.jit(function)(operands, images), want)
  assert len(np.unique(want)) > 10


@pytest.mark.parametrize("products", PRODUCTS)
def test_windows_of_many_pixels(products):
  """They are not put together pixel by pixel, which would take minutes to compile."""
  net = Network(0, (60, 80), 1)
  codes = net.threshold(0, 1)
  for strides, pads in (((1, 1), (0, 0, 0, 0)), ((64, 64), (60, 50, 0, 1))):
    net.conv(codes, 3, 2, (60, 79), strides=strides, pads=pads, pad=1)
  net.conv(codes, 2, 1, (30, 80), dilation=(2, 1), pads=(0, 0, 0, 0))
  program = net.program(codes)
  start = time.monotonic()
  assert_as_reference(program, products, net.images(2))
  assert time.monotonic() - start < 60


@pytest.mark.parametrize("products", PRODUCTS)
def test_weights_are_packed_operands(products):
  net = Network(0, (3, 3), 256)
  program = net.program(net.threshold(
      net.conv(net.threshold(0, 2), 256, 2, (3, 3)), 1))
  operands, function = xla.logits(program, products)
  images = net.images(1)
  size = sum(a.nbytes for a in jax.tree.leaves(operands))
  assert 2 * 256 * 256 * 9 / 8 < size < 1.2 * 2 * 256 * 256 * 9 / 8
  constants = jax.make_jaxpr(function)(operands, images).consts
  assert sum(np.asarray(c).nbytes for c in constants) < 5000


def test_refuses_other_products():
  program = Network(0, (2, 2), 1).program(0)
  with pytest.raises(ValueError, match="products='dots': must be 'popcount', 'dot' or"):
    xla.logits(program, "dots")
