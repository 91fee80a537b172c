"""Networks that reach all kernels of the engine, each built by a function.

`every` lists all of them. The native library and the module for WebAssembly are tested
with the same networks.
"""

import itertools
from typing import Iterator

import numpy as np

from minw import packed
import packed_networks
from packed_networks import Builder

BITS = (1, 2, 3)
FLOATS = ("float8_e4m3fn", "float16", "bfloat16", "float32")
CHANNELS = (1, 32, 63, 65, 96, 128, 130)
PADS = (-3, -1, 0, 1, 3)
GROUPS = (  # Groups, and the inputs and outputs of each.
    (1, 3, 5), (70, 1, 1), (33, 1, 3), (5, 3, 1), (3, 33, 5), (2, 5, 33), (2, 130, 64),
    (4, 1, 300))
IMAGES = (  # Size, window, stride and dilation.
    ((9, 8), (3, 3), (1, 1), (1, 1)), ((13, 17), (7, 7), (2, 2), (1, 1)),
    ((8, 9), (2, 4), (1, 2), (2, 1)), ((11, 9), (3, 2), (2, 1), (1, 3)),
    ((5, 6), (1, 1), (1, 1), (1, 1)), ((16, 16), (9, 11), (1, 1), (1, 1)))
STEMS = (  # Size, window, stride and border of images with float weights.
    ((29, 42, 3), (7, 7), (2, 2), (3, 3, 3, 3)),
    ((24, 39, 3), (7, 8), (1, 2), (0, 0, 0, 0)),
    ((40, 70, 4), (11, 11), (4, 4), (2, 1, 0, 2)),
    ((30, 21, 1), (16, 4), (1, 1), (1, 1, 1, 1)),
    ((13, 45, 3), (5, 5), (2, 2), (1, 4, 4, 1)),
    ((24, 30, 6), (3, 3), (1, 1), (1, 1, 1, 1)))
POOLS = (  # Size of the map, window, stride and border.
    ((17, 35), (3, 3), (2, 2), (1, 1, 1, 1)), ((19, 40), (3, 3), (2, 2), (0, 1, 0, 1)),
    ((9, 16), (2, 5), (1, 2), (0, 0, 4, 4)), ((13, 33), (4, 2), (3, 1), (3, 2, 1, 0)),
    ((8, 18), (2, 2), (2, 2), (1, 0, 0, 1)), ((5, 430), (3, 3), (1, 2), (2, 0, 2, 2)),
    ((6, 21), (6, 8), (1, 1), (0, 0, 0, 0)))


def channels(weights: int, activations: int, count: int) -> packed.Program:
  """Convolutions of `count` and 17 channels, pooling and thresholds."""
  b = Builder(np.random.default_rng(count), (6, 7, 3), (6, 5))
  x = b.threshold(b.conv(0, weights, count), activations)
  x = b.add(packed.Pool("pool", b.conv(x, weights, 17), "max", (2, 2), (2, 2)))
  x = b.threshold(x, activations)
  return b.end(x, weights)


def kernel_size(size: int) -> packed.Program:
  """Kernels of `size` rows or columns, with random borders."""
  rng = np.random.default_rng(size)
  b = Builder(rng, (13, 12, 2))
  x = b.threshold(b.conv(0, 1, 65, (size, 3), pads=(0, 0, 1, 1)), 1)
  pads = tuple(rng.integers(0, size + 1, 4).tolist())
  x = b.conv(x, 1, 20, (min(size, 3), size), (2, 1), pads)
  return b.end(b.threshold(x, 1))


def borders(bits: int, pad: int) -> packed.Program:
  """Wide borders of code `pad`, which codes of `bits` must have."""
  b = Builder(np.random.default_rng(0), (5, 5, 1))
  x = b.threshold(b.conv(0, 2, 70), bits)
  for weights in BITS:
    y = b.conv(x, weights, 9, (5, 4), (1, 2), (4, 2, 6, 3), pad)
  return b.end(b.threshold(y, bits))


def thin_borders(bits: int, pad: int) -> packed.Program:
  """A map with few pixels in the border, where kernels do not skip its taps."""
  b = Builder(np.random.default_rng(0), (32, 40, 1))
  x = b.threshold(b.conv(0, 2, 70), bits)
  for weights in BITS:
    y = b.conv(x, weights, 9, (3, 3), pads=(1, 1, 1, 1), pad=pad)
  return b.end(b.threshold(y, bits))


def groups(
    weights: int, activations: int, count: int, inputs: int, outputs: int
) -> packed.Program:
  """Convolutions in groups, of the image and of codes, with a shortcut."""
  b = Builder(np.random.default_rng(count), (6, 7, count))
  x = b.conv(0, weights, count * inputs, groups=count)  # Reads the image.
  x = b.threshold(x, activations)
  pad = -packed.max_code(activations)
  x = b.conv(x, weights, count * outputs, (3, 2), (1, 2), (2, 0, 1, 1), pad, count)
  x = b.add(packed.Pool("pool", x, "max", (2, 2), (2, 2)))
  y = b.threshold(x, activations)
  x = b.conv(y, weights, count * outputs, pads=(0, 1, 1, 1), groups=count)
  if b.shape(x) == b.shape(y):
    x = b.add(packed.Add("add", b.threshold(x, activations, y), y))
  return b.end(b.threshold(x, activations), weights)


def dilation(weights: int, activations: int, pad: int) -> packed.Program:
  """Dilated convolutions; `pad` is -1, 0 or 1 times the largest code."""
  b = Builder(np.random.default_rng(0), (7, 9, 1))
  x = b.threshold(b.conv(0, weights, 70, dilation=(2, 3)), activations)
  pad *= packed.max_code(activations)
  for count in (1, 2, 70):
    b.conv(x, weights, 70, (3, 4), (2, 1), (5, 3, 2, 6), pad, count, (3, 2))
    # Only the middle of the kernel meets the map.
    b.conv(x, weights, 70, (3, 3), (3, 2), (20, 20, 30, 30), pad, count, (20, 30))
  return b.end(b.threshold(len(b.ops), activations), weights)


def large_sums_of_groups() -> packed.Program:
  """Depthwise sums beyond 16 bits, of pixels and of integers."""
  b = Builder(np.random.default_rng(0), (16, 16, 40))
  x = b.conv(0, 3, 40, (9, 9), pads=(0,) * 4, groups=40)
  assert b.values[x].bound.max() > 2 ** 15
  x = b.conv(x, 2, 40, groups=40)
  x = b.conv(x, 1, 80, groups=20)
  return b.end(b.threshold(x, 2), 2)


def large_sums() -> packed.Program:
  """Sums that need wide thresholds."""
  b = Builder(np.random.default_rng(0), (16, 16, 40))
  x = b.conv(0, 3, 70, (9, 9), pads=(0,) * 4)
  assert b.values[x].bound.max() > 2 ** 17
  x = b.threshold(x, 3)
  x = b.conv(x, 3, 70, (5, 5))
  return b.end(b.threshold(x, 2), 2)


def largest_counts(weights: int, activations: int, sign: int) -> packed.Program:
  """All products are as large as can be, and all of one sign."""
  b = Builder(np.random.default_rng(0), (15, 15, 1))
  x = b.threshold(b.conv(0, 1, 90), activations)
  b.ops[-1].thresholds[:] = np.where(b.ops[-1].falling, 1, -1) * 2**20 * sign
  x = b.conv(x, weights, 37)
  b.ops[-1].kernel[:] = packed.max_code(weights)
  y = b.threshold(x, 1)
  return b.end(b.conv(y, 1, 3))


def many_steps() -> packed.Program:
  """More steps than small counters hold."""
  b = Builder(np.random.default_rng(0), (9, 9, 1))
  for activations, weights in ((1, 3), (3, 1), (2, 2), (3, 3), (3, 2), (2, 3)):
    x = b.threshold(b.conv(0, 1, 210), activations)
    b.conv(x, weights, 3, (9, 9), pads=(2,) * 4)
  return b.end(0)


def many_inputs() -> packed.Program:
  """A dense layer of more inputs than lookups gather."""
  b = Builder(np.random.default_rng(0), (33, 32, 1))
  x = b.threshold(b.conv(0, 1, 64), 3)
  return b.end(x, 3, 2)


def image_operations() -> packed.Program:
  """The image is read by other operations than convolutions."""
  b = Builder(np.random.default_rng(0), (7, 9, 3), (6, 5))
  x = b.add(packed.Pool("sum", 0, "sum", (2, 2), (2, 2)))
  x = b.add(packed.Add("add", x, x, 2, 0))
  b.threshold(0, 2)
  return b.end(x, 2)


def image(
    size: tuple[int, int], window: tuple[int, int], stride: tuple[int, int],
    step: tuple[int, int], count: int
) -> packed.Program:
  """A convolution of an image of `count` channels with extreme offsets."""
  rng = np.random.default_rng(count)
  b = Builder(rng, (size[0] + 3, size[1] + 2, count), size)
  b.offset = rng.choice((0, 1, 128, 255), count)
  b.values = [packed.image_value(b.source, b.crop, b.offset)]
  x = b.conv(0, 3, 37, window, stride, (2, 3, 1, 4), 0, 1, step)
  b.ops[0].kernel[:2] = np.reshape((3, -3), (2, 1, 1, 1))
  return b.end(b.threshold(x, 2))


def stem(
    form: str, size: tuple[int, int, int], window: tuple[int, int],
    stride: tuple[int, int], border: tuple[int, int, int, int], pool: int
) -> packed.Program:
  """A wide convolution of a cropped image with float weights, which is then pooled."""
  b = Builder(np.random.default_rng(0), (size[0] + 2, size[1] + 3, size[2]), size[:2])
  x = b.conv(0, form, 37, window, stride, border)
  pad = (pool % 2,) * 4  # Windows lie side by side, or overlap.
  x = b.add(packed.Pool("max", x, "max", (pool, pool), (2, 2), pad))
  return b.end(b.norm(x, 2), 1)


def floats(form: str) -> tuple[packed.Program, list[packed.Value]]:
  """All operations on floats, and the values of the network."""
  b = Builder(np.random.default_rng(0), (8, 7, 3), (7, 6))
  x = b.norm(b.conv(0, form, 20), form)
  y = b.norm(b.conv(x, 2, 20), form, x)
  y = b.add(packed.Pool("max", y, "max", (2, 2), (2, 2)))
  y = b.add(packed.Pool("sum", y, "sum", (2, 2), (1, 1)))
  codes = [b.norm(y, bits) for bits in BITS]
  for code in codes:
    b.norm(b.conv(code, form, 20, pads=(1, 0, 0, 1), pad=1), 3)
  x = b.norm(b.conv(codes[2], 3, 20, (1, 1), pads=(0,) * 4), form, codes[0])
  for count, step in ((20, 2), (4, 1), (2, 2), (1, 2)):
    apart = dict(pads=(step, step, 1, 1), groups=count, dilation=(step, 1))
    b.norm(b.conv(codes[0], form, 60, **apart), 3)
    x = b.norm(b.conv(x, form, 20, **apart), form, x)
  return b.end(x, form), b.values


def wide_groups(weights: int, activations: int, inputs: int) -> packed.Program:
  """Channels that fill groups of 32, with few and many pixels."""
  b = Builder(np.random.default_rng(inputs), (33, 40, 3))
  x = b.threshold(b.conv(0, 1, inputs), activations)
  x = b.conv(x, weights, 64)  # Taps in the border are not skipped.
  x = b.conv(b.threshold(x, activations), weights, 64)
  x = b.add(packed.Pool("max", x, "max", (3, 3), (1, 1), (1, 1, 1, 1)))
  x = b.threshold(x, activations)  # Pooled in the pass of its convolution.
  x = b.add(packed.Pool("max", x, "max", (5, 5), (5, 5)))
  y = b.threshold(b.conv(x, weights, 96), 2)
  x = b.conv(y, weights, 96, (5, 2), (1, 1), (2, 2, 1, 0))
  return b.end(b.threshold(x, 1, y))


def pools(
    weights: int | str, activations: int, size: tuple[int, int],
    window: tuple[int, int], stride: tuple[int, int], border: tuple[int, int, int, int]
) -> packed.Program:
  """Maxima over windows that overlap or reach into a border, then with a shortcut."""
  b = Builder(np.random.default_rng(0), (*size, 3))
  encoded = b.norm if isinstance(weights, str) else b.threshold
  x = b.add(packed.Pool("max", b.conv(0, weights, 37), "max", window, stride, border))
  x = encoded(x, activations)
  y = b.add(packed.Pool("max", b.conv(x, weights, 37), "max", (3, 2), (1, 1),
                        (1, 1, 0, 1)))
  return b.end(encoded(y, activations, x), weights)


def small() -> packed.Program:
  """Two convolutions with codes of 1 bit."""
  b = Builder(np.random.default_rng(0), (8, 8, 3))
  x = b.threshold(b.conv(0, 1, 64), 1)
  return b.end(b.threshold(b.conv(x, 1, 40), 1))


def large() -> packed.Program:
  """A network whose layers are large enough to be divided among threads."""
  b = Builder(np.random.default_rng(0), (16, 16, 3))
  x = b.threshold(b.conv(0, 1, 64), 1)
  x = b.add(packed.Pool("max", b.conv(x, 2, 96), "max", (3, 3), (2, 2), (1, 1, 1, 1)))
  y = b.threshold(x, 2)
  return b.end(b.threshold(b.conv(y, 1, 96), 2, y))


def every() -> Iterator[tuple[str, packed.Program]]:
  """All networks of this file, with names for messages."""
  makers = [small, large, large_sums_of_groups, large_sums, many_steps,
            many_inputs, image_operations]
  calls: list[tuple] = [(make,) for make in makers]
  for weights, activations in itertools.product(BITS, BITS):
    both = weights, activations
    calls += [(channels, *both, count) for count in CHANNELS]
    calls += [(groups, *both, *sizes) for sizes in GROUPS]
    calls += [(dilation, *both, pad) for pad in (-1, 0, 1)]
    calls += [(largest_counts, *both, sign) for sign in (-1, 1)]
  calls += [(kernel_size, size) for size in range(1, 12)]
  calls += [(make, bits, pad) for make in (borders, thin_borders) for bits in BITS
            for pad in PADS if abs(pad) <= packed.max_code(bits)]
  calls += [(packed_networks.residual_and_dense, bits) for bits in BITS]
  calls += [(image, *sizes, count) for sizes in IMAGES for count in (1, 3, 4, 5)]
  calls += [(wide_groups, weights, activations, inputs) for weights in BITS
            for activations in BITS for inputs in (64, 128)]
  calls += [(pools, weights, activations, *POOLS[0]) for weights in BITS
            for activations in BITS]
  calls += [(pools, 1, 2, *case) for case in POOLS]
  for make, *arguments in calls:
    yield f"{make.__name__}{tuple(arguments)}", make(*arguments)
  calls = [(form, *STEMS[0], 3) for form in FLOATS]
  calls += [("float32", *case, pool) for case in STEMS for pool in (2, 3)]
  for arguments in calls:
    yield f"stem{arguments}", stem(*arguments)
  for form in FLOATS:
    yield f"floats({form!r})", floats(form)[0]
