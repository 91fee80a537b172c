"""Packed networks that tests build operation by operation, most of them random."""

from hypothesis import strategies as st
import numpy as np

from minw import packed
from minw.data import datasets

# Arguments of `groups_and_dilation`: all bits, and the codes that may pad.
GROUPS = [(1, 0), (1, -1), (2, 0), (2, -1), (3, 0), (3, -1), (3, 2)]


class Builder:
  """Adds operations with random weights and thresholds to a program."""

  def __init__(self, rng, shape, crop=None):
    self.rng, self.source, self.crop = rng, shape, crop or shape[:2]
    self.offset = rng.integers(0, 256, shape[2])
    self.ops = []
    self.values = [packed.image_value(shape, self.crop, self.offset)]

  def add(self, op):
    self.values.append(packed.infer_value(op, self.values))
    self.ops.append(op)
    return len(self.ops)

  def shape(self, value):
    return self.values[value].shape

  def kernel(self, bits, *shape):
    if isinstance(bits, str):
      kernel = self.rng.normal(size=shape)
      return kernel.astype(packed.float_dtype(bits)).astype(np.float32)
    q = packed.max_code(bits)
    codes = self.rng.integers(-q, q + 1, shape).astype(np.int8)
    return np.where(codes == 0, 1, codes).astype(np.int8) if bits == 1 else codes

  def conv(self, x, bits, out, size=(3, 3), strides=(1, 1), pads=(1, 1, 1, 1), pad=0,
           groups=1, dilation=(1, 1)):
    kernel = self.kernel(bits, out, *size, self.shape(x)[2] // groups)
    return self.add(packed.Conv("conv", x, bits, kernel, strides, pads, pad, 0.25, 0.5,
                                groups, dilation))

  def threshold(self, x, bits, shortcut=None):
    c = self.shape(x)[2]
    tables = 1 if shortcut is None else len(packed.LEVELS[self.values[shortcut].bits])
    spread = max(2, int(2 * self.values[x].bound.max() ** 0.5))
    t = self.rng.integers(-spread, spread, (tables, packed.num_thresholds(bits), c))
    return self.add(packed.Threshold(
        "norm", x, bits, self.rng.random(c) < 0.5, t.astype(np.int32), shortcut))

  def floats(self, n):
    return self.rng.normal(size=n).astype(np.float32)

  def norm(self, x, bits, shortcut=None):
    c = self.shape(x)[2]
    q = 0 if bits in (None, 1) or isinstance(bits, str) else packed.max_code(bits)
    grid = np.linspace(0.2, 0.8, q).astype(np.float32)
    unit = 0.5 if self.values[x].kind == "INT" else 1.0
    return self.add(packed.FloatNorm(
        "float_norm", x, bits, unit, self.floats(c), self.floats(c) / 16,
        self.floats(c), grid, shortcut, 0.25))

  def end(self, x, bits=1, classes=7):
    x = self.conv(x, bits, classes, self.shape(x)[:2], pads=(0,) * 4)
    if self.values[x].kind == "FLOAT":
      self.norm(x, None)
    else:
      self.add(packed.Logits("logits", x, 0.25, *(self.floats(classes),) * 2,
                             np.zeros(classes, np.float32)))
    return packed.Program(self.source, self.crop, self.offset.astype(np.uint8), classes,
                          tuple(self.ops), {"name": "é"})


def images(program, n, seed=0):
  shape = (n, *program.source_shape)
  return np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)


def floats(bits: int, form: int | str) -> packed.Program:
  """A small network of all operations but `Logits`; the last weights are of `form`."""
  b = Builder(np.random.default_rng(bits), (6, 5, 2), (5, 5))
  x = b.threshold(b.conv(0, bits, 128, strides=(2, 1)), bits)
  short = b.add(packed.Shortcut("short", x, (1, 1), 1, 2))
  x = b.threshold(b.conv(x, bits, 131, (1, 2), pads=(0, 0, 1, 0)), bits, short)
  x = b.add(packed.Concat("cat", (x, short), (0, 0)))
  x = b.conv(x, bits, 10)
  x = b.threshold(b.add(packed.Pool("max", x, "max", (2, 2), (2, 2))), bits)
  x = b.norm(b.add(packed.Add("add", x, x, 0, 1)), "float8_e4m3fn", x)
  x = b.add(packed.Concat("cat", (x, x), (0, 0)))
  x = b.norm(b.add(packed.Pool("sum", x, "sum", (1, 2), (1, 1))), bits)
  x = b.norm(b.conv(x, bits, 20, (2, 1), pads=(1, 1, 0, 0), groups=10,
                    dilation=(2, 1)), bits)
  x = b.norm(b.conv(x, bits, 40, (1, 1), pads=(1, 0, 0, 0), groups=2), bits)
  return b.end(x, form)


def integers(bits: int, seed: int) -> packed.Program:
  """A small network of all operations but `FloatNorm`: its logits are exact."""
  b = Builder(np.random.default_rng(seed), (7, 6, 2), (6, 5))
  x = b.threshold(b.conv(0, bits, 18, (3, 2), (2, 1)), bits)
  short = b.add(packed.Shortcut("short", x, (1, 1), 1, 2))
  y = b.conv(short, bits, 21, pads=(1, 1, 1, 1), pad=packed.max_code(bits))
  x = b.threshold(y, bits, short)
  y = b.add(packed.Concat("sums", (y, b.add(packed.Add("add", x, short, 1, 2))),
                          (0, 3)))
  x = b.add(packed.Concat("codes", (b.threshold(y, bits), short), (0, 0)))
  x = b.conv(x, bits, 9, (2, 2), pads=(1, 2, 1, 0), groups=9, dilation=(1, 2))
  x = b.threshold(b.add(packed.Pool("max", x, "max", (2, 2), (2, 2), (0, 1, 1, 0))),
                  bits)
  x = b.conv(b.threshold(b.conv(x, 3, 70, (1, 1), pads=(0,) * 4), bits), bits, 5)
  x = b.threshold(b.add(packed.Pool("sum", x, "sum", (2, 2), (1, 1))), bits)
  return b.end(b.add(packed.Pool("sum", x, "sum", b.shape(x)[:2], (1, 1))), bits)


def seeds() -> list[bytes]:
  """Small networks, each a file; all operations and formats are among them."""
  forms = 1, 2, 3, "float8_e4m3fn", "float16", "bfloat16", "float32"
  programs = [floats(1 + i % 3, form) for i, form in enumerate(forms)]
  programs += [integers(bits, seed) for bits in (1, 2, 3) for seed in range(3)]
  return [packed.to_bytes(program) for program in programs]


def small(bits=1) -> packed.Program:
  """A 2x2 image of one channel, one dense layer of two classes."""
  kernel = np.array([[[[1], [-1]], [[-1], [-1]]], [[[1], [1]], [[1], [-1]]]], np.int8)
  ops = (
      packed.Conv("fc", 0, bits, kernel),
      packed.Logits("norm", 1, 0.5, np.float32([1, 2]), np.float32([3, -4]),
                    np.float32([0, 0])))
  return packed.Program((4, 3, 1), (2, 2), np.array([7], np.uint8), 2, ops,
                        {"labels": ["no", "yes"]})


def small_image():
  """An image for `small`; its crop is 10 20 / 30 47."""
  image = np.zeros((1, 4, 3, 1), np.uint8)
  image[0, 1:3, :2, 0] = [[10, 20], [30, 47]]
  return image


def digits_network(metadata=None) -> packed.Program:
  """A linear classifier of the digits, of ternary weights: templates' signs."""
  images, labels = datasets.load("digits", "train", None)
  means = np.stack([images[labels == k].mean(0) for k in range(10)])
  kernel = np.sign(np.round((means - means.mean(0)) / 40)).astype(np.int8)
  ops = (packed.Conv("fc", 0, 2, kernel),
         packed.Logits("norm", 1, 2.0**-6, np.zeros(10, np.float32),
                       np.full(10, 0.25, np.float32), np.zeros(10, np.float32)))
  return packed.Program((8, 8, 1), (8, 8), np.array([78], np.uint8), 10, ops,
                        metadata or {})


def digits_logits(images):
  """The logits of `digits_network`, in float64."""
  kernel = digits_network().ops[0].kernel.reshape(10, -1).astype(np.float64)
  return (images.reshape(len(images), -1) - 78.0) @ kernel.T / 64 * 0.25


def residual_and_dense(bits):
  """Every operation, also with level 0 among signs."""
  b = Builder(np.random.default_rng(bits), (9, 8, 3), (8, 8))
  x = b.threshold(b.conv(0, bits, 20), bits)
  b.ops[-1].thresholds[:, :, :4] = [10**5, -10**5, 2**31 - 1, -2**31]
  short = b.add(packed.Shortcut("short", x, (2, 2), 7, 6))
  y = b.threshold(b.conv(x, bits, 33, strides=(2, 2)), bits, short)
  y = b.add(packed.Concat("cat", (y, short, y), (0, 0, 0)))
  z = b.conv(y, bits, 18)
  wide = b.add(packed.Concat("cat", (z, z), (0, 3)))
  both = b.add(packed.Add("add", wide, wide, 0, 1))
  level = b.add(packed.Add("add", y, y, 1, 0))
  level = b.add(packed.Pool("sum", level, "sum", (3, 2), (1, 2), (1, 2, 1, 0)))
  pool = b.add(packed.Pool("max", both, "max", (3, 3), (2, 1), (1, 1, 2, 0)))
  codes = b.add(packed.Pool("max", b.threshold(pool, bits), "max", (2, 2), (1, 1)))
  codes = b.add(packed.Pool("sum", codes, "sum", b.shape(codes)[:2], (1, 1)))
  b.threshold(level, 3)
  return b.end(codes, bits)


def sum_of_many(bits=2, count=32):
  """A network with a sum of `count` convolutions."""
  b = Builder(np.random.default_rng(0), (8, 8, 3))
  x = b.threshold(b.conv(0, 1, 16), bits)
  y = b.conv(x, 1, 16)
  for k in range(count - 1):
    y = b.add(packed.Add("add", y, b.conv(x, bits, 16), 0, k % 2))
  return b.end(b.threshold(y, bits))


def chained_pools(kind, count):
  """A network with a chain of pools whose windows overlap, over a convolution."""
  b = Builder(np.random.default_rng(1), (10, 11, 2))
  x = b.threshold(b.conv(0, 1, 33), 2)
  y = b.conv(x, 1, 12)
  for _ in range(count):
    y = b.add(packed.Pool(f"{kind} pool", y, kind, (3, 2), (1, 1), (1, 1, 0, 1)))
  return b.end(b.threshold(y, 1))


def tree(bits=3):
  """A network that pools, concatenates and adds in turns, before any threshold."""
  b = Builder(np.random.default_rng(2), (9, 9, 3))
  x = b.threshold(b.conv(0, bits, 16), bits)

  def grow(height):
    if not height:
      return b.conv(x, bits, 5)
    left, right = grow(height - 1), grow(height - 1)
    y = b.add(packed.Concat("both", (left, right), (0, 1)))
    y = b.add(packed.Add("add", y, b.conv(x, 2, b.shape(y)[2])))
    return b.add(packed.Pool("pool", y, "max", (3, 3), (1, 1), (1, 1, 1, 1)))

  return b.end(b.threshold(grow(2), bits), bits)


def groups_and_dilation(bits, pad=0):
  """Depthwise and grouped convolutions of odd sizes, dilated ones among them."""
  b = Builder(np.random.default_rng(bits), (11, 9, 3))
  x = b.threshold(b.conv(0, bits, 9, groups=3, dilation=(2, 1)), bits)  # The image.
  x = b.threshold(b.conv(x, bits, 9, groups=9, pad=pad), bits)  # Depthwise.
  x = b.threshold(b.conv(x, bits, 35, (1, 1), pads=(0,) * 4), bits)
  short = x
  y = b.conv(x, bits, 35, (3, 3), (1, 1), (2, 2, 2, 2), pad, 35, (2, 2))
  x = b.threshold(y, bits, short)
  x = b.threshold(b.conv(x, bits, 70, (3, 2), (2, 1), (3, 3, 2, 1), pad, 7, (3, 3)),
                  bits)
  x = b.threshold(b.conv(x, bits, 96, (2, 3), (1, 2), (9, 1, 0, 7), pad, 1, (1, 3)),
                  bits)
  x = b.threshold(b.conv(x, bits, 64, (3, 3), (1, 1), (1, 1, 1, 1), pad, 1, (2, 1)),
                  bits)
  x = b.conv(x, bits, 66, (3, 3), (1, 1), (2, 0, 1, 3), pad, 2, (1, 2))  # Whole words.
  x = b.threshold(b.add(packed.Pool("sum", x, "sum", (2, 2), (1, 1))), bits)
  x = b.threshold(b.conv(x, bits, 33, b.shape(x)[:2], pads=(0,) * 4, groups=33), bits)
  return b.end(x, bits)


def assert_same(a: packed.Program, b: packed.Program) -> None:
  assert a._replace(ops=(), offset=0, metadata=0) == b._replace(
      ops=(), offset=0, metadata=0)
  np.testing.assert_array_equal(a.offset, b.offset)
  for x, y in zip(a.ops, b.ops, strict=True):
    assert type(x) is type(y)
    for field in x._fields:
      np.testing.assert_array_equal(getattr(x, field), getattr(y, field), strict=True)


# Networks of random structure.


def _apart(draw, channels, out, h, w):
  """Groups, and a number of output channels near `out`, and dilation for 1x1 to 3x3."""
  divisors = [n for n in range(1, channels + 1) if channels % n == 0]
  groups = draw(st.sampled_from(divisors))
  size = tuple(draw(st.integers(1, 3)) for _ in range(2))
  dilation = tuple(draw(st.integers(1, 4)) for _ in range(2))
  pads = tuple(draw(st.integers(0, 3)) for _ in range(4))
  spans = [(n - 1) * step + 1 for n, step in zip(size, dilation)]
  if spans[0] > h + pads[0] + pads[1] or spans[1] > w + pads[2] + pads[3]:
    size = (1, 1)
  return max(out // groups, 1) * groups, size, pads, groups, dilation


def _windows(draw, h, w, largest):
  size = tuple(draw(st.integers(1, min(n + 2, largest))) for n in (h, w))
  pads = tuple(draw(st.integers(0, size[i // 2] - 1)) for i in range(4))
  if size[0] > h + pads[0] + pads[1] or size[1] > w + pads[2] + pads[3]:
    size, pads = (1, 1), (0,) * 4
  return size, (draw(st.integers(1, 3)), draw(st.integers(1, 3))), pads


@st.composite
def programs(draw):
  """Networks of a few random operations."""
  shape = tuple(draw(st.integers(1, n)) for n in (9, 9, 4))
  b = Builder(np.random.default_rng(draw(st.integers(0, 2**32))), shape)
  bits = st.integers(1, 3)
  x = b.conv(0, draw(bits), draw(st.integers(1, 70)), *_windows(draw, *b.crop, 11))
  for _ in range(draw(st.integers(0, 3))):
    if draw(st.booleans()):
      x = b.add(packed.Pool("pool", x, draw(st.sampled_from(("max", "sum"))),
                            *_windows(draw, *b.shape(x)[:2], 3)))
    x = b.threshold(x, draw(bits))
    pad = draw(st.integers(-1, 1)) * packed.max_code(b.values[x].bits)
    x = b.conv(x, draw(bits), draw(st.integers(1, 140)),
               *_windows(draw, *b.shape(x)[:2], 5), pad)
    if draw(st.booleans()):
      h, w, channels = b.shape(x)
      out, size, pads, groups, dilation = _apart(
          draw, channels, draw(st.integers(1, 140)), h, w)
      x = b.conv(b.threshold(x, draw(bits)), draw(bits), out, size,
                 (draw(st.integers(1, 2)), 1), pads, 0, groups, dilation)
  return b.end(b.threshold(x, draw(bits)), draw(bits))
