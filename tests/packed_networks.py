"""Random packed networks, operation by operation."""

import numpy as np

from minw import packed


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
