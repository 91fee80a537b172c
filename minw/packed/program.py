"""The program of a packed network: its operations, and what is known of their values.

A program is a list of operations on values. Value 0 is the image, and operation i makes
value i + 1. A value is a batch of one of three kinds:

    INT    int32: pixels less their offset, or sums of products. Each value counts in
           a unit of its own.
    CODE   int8: activations on a grid of 1, 2 or 3 bits. A code is the signed index of
           its level: -1, 1 for one bit, -1..1 for two, and -3..3 for three.
    FLOAT  float32, where an operand is in a float format

Sums are of integer levels, which are -1, 1 for one bit, -1, 0, 1 for two, and 0, +-1,
+-2, +-4 for three.
"""

import math
from typing import Any, Iterable, NamedTuple, Sequence

import ml_dtypes
import numpy as np

from minw.packed import rules
from minw.packed.rules import require

LEVELS = {1: (-1, 0, 1), 2: (-1, 0, 1), 3: (-4, -2, -1, 0, 1, 2, 4)}  # By code + q.
FLOAT_FORMATS = {  # The numbers of the formats in a file.
    "float8_e4m3fn": 8, "float16": 16, "bfloat16": 17, "float32": 32}
SMALLEST = np.float32(2.0 ** -126)  # A FLOAT below it has the one-bit code of 0.


class Conv(NamedTuple):
  """A convolution. A dense layer is one with a kernel of its input's size.

  Attributes:
    name: Path of the layer.
    input: Index of a value.
    bits: 1, 2, 3 or a float format.
    kernel: (output channels, height, width, input channels / groups), int8 codes, or
      float32 in the format's range.
    strides: (vertical, horizontal).
    pads: (top, bottom, left, right).
    pad: The code that the padding consists of.
    weight_unit, input_unit: The value of an integer level, for FLOAT results.
    groups: Input and output channels are split into this many equal groups, in order.
      An output channel sums over the input channels of its own group.
    dilation: (vertical, horizontal) distance between neighboring weights, in pixels.
  """

  name: str
  input: int
  bits: int | str
  kernel: np.ndarray
  strides: tuple[int, int] = (1, 1)
  pads: tuple[int, int, int, int] = (0, 0, 0, 0)
  pad: int = 0
  weight_unit: float = 1.0
  input_unit: float = 1.0
  groups: int = 1
  dilation: tuple[int, int] = (1, 1)

  @property
  def window(self) -> tuple[int, int]:
    """(height, width) of the pixels that the dilated kernel spans."""
    (h, w), (down, right) = self.kernel.shape[1:3], self.dilation
    return (h - 1) * down + 1, (w - 1) * right + 1


class Pool(NamedTuple):
  """The maximum ("max") or the sum ("sum") over windows. Padding never counts."""

  name: str
  input: int
  kind: str
  window: tuple[int, int]
  strides: tuple[int, int]
  pads: tuple[int, int, int, int] = (0, 0, 0, 0)


class Threshold(NamedTuple):
  """Batch norm, shortcut, HardTanh and quantizer, as integers.

  A channel counts for how many j acc >= thresholds[s, j, channel], or <= if the channel
  falls. The code is 2 count - 1 for one bit, and count - q otherwise.

  Attributes:
    name: Path of the layer.
    input: Index of an INT value.
    bits: Bits of the codes.
    falling: bool (channels,).
    thresholds: int32 (s, j, channels). The index s is 0, or a shortcut's code + its q.
    shortcut: Index of a CODE value, or None.
  """

  name: str
  input: int
  bits: int
  falling: np.ndarray
  thresholds: np.ndarray
  shortcut: int | None = None


class Logits(NamedTuple):
  """The last batch norm: (acc * unit - center) * scale + constant, in float32."""

  name: str
  input: int
  unit: float
  center: np.ndarray
  scale: np.ndarray
  constant: np.ndarray


class FloatNorm(NamedTuple):
  """The counterpart of `Threshold` and `Logits` if an operand is in a float format.

  Attributes:
    name: Path of the layer.
    input: Index of an INT or FLOAT value.
    bits: Bits of the result: 1, 2, 3, a float format, or None for logits.
    unit: The value of 1 in an INT input.
    center, scale, constant: float32 (channels,).
    grid: float32 (q,), the thresholds of a grid.
    shortcut: Index of a CODE or FLOAT value, or None.
    shortcut_unit: The value of a level of the shortcut.
  """

  name: str
  input: int
  bits: int | str | None
  unit: float
  center: np.ndarray
  scale: np.ndarray
  constant: np.ndarray
  grid: np.ndarray = np.zeros(0, np.float32)
  shortcut: int | None = None
  shortcut_unit: float = 1.0


class Concat(NamedTuple):
  """Values side by side.

  INTs are multiplied by 2 ** shift, so that all have the same unit.
  """

  name: str
  inputs: tuple[int, ...]
  shifts: tuple[int, ...]


class Shortcut(NamedTuple):
  """Every stride-th pixel of a CODE value, between channels of level 0."""

  name: str
  input: int
  strides: tuple[int, int]
  before: int
  after: int


class Add(NamedTuple):
  """The INT a * 2 ** shift_a + b * 2 ** shift_b of two INT or two CODE values."""

  name: str
  a: int
  b: int
  shift_a: int = 0
  shift_b: int = 0


Op = Conv | Pool | Threshold | Logits | FloatNorm | Concat | Shortcut | Add


class Program(NamedTuple):
  """A packed network.

  Attributes:
    source_shape: (height, width, channels) of the images that it takes.
    crop: (height, width) that it cuts from their center.
    offset: uint8 (channels,), subtracted from pixels.
    num_classes: Number of the logits.
    ops: The operations. The last one makes the logits.
    metadata: What else the file says, such as "labels"; see `minw.packed.metadata`.
  """

  source_shape: tuple[int, int, int]
  crop: tuple[int, int]
  offset: np.ndarray
  num_classes: int
  ops: tuple[Op, ...]
  metadata: dict[str, Any]


class Value(NamedTuple):
  """What is known of a value without data.

  Attributes:
    shape: (height, width, channels).
    kind: "INT", "CODE" or "FLOAT".
    bits: Bits of a CODE; 0 for other kinds.
    bound: int64 (channels,), the largest magnitude of an INT or of a CODE's level.
    exponent: A FLOAT's magnitudes are below 2 ** exponent.
  """

  shape: tuple[int, int, int]
  kind: str
  bits: int = 0
  bound: np.ndarray = np.zeros(0, np.int64)
  exponent: int = 0


def num_thresholds(bits: int) -> int:
  """Returns how many comparisons make a code: 1, 2 or 6."""
  return (1, 2, 6)[bits - 1]


def max_code(bits: int) -> int:
  """Returns q, the largest code: 1, 1 or 3."""
  return len(LEVELS[bits]) // 2


def grid_bits(bits: Any, name: str) -> int:
  """Returns `bits` if a packed grid has that many.

  Raises:
    ValueError: No grid has. The message names the operation `name`.
  """
  require(bits in LEVELS, name, f"{bits!r} bits; a packed grid has 1, 2 or 3")
  return bits


def float_dtype(name: str) -> np.dtype:
  """Returns the dtype of a float format. ml_dtypes has those that NumPy lacks."""
  return np.dtype(getattr(ml_dtypes, name, name))


def levels(codes: np.ndarray, bits: int) -> np.ndarray:
  """Returns the integer levels of codes: int8 of the same shape.

  >>> levels(np.array([-3, -1, 0, 2]), bits=3).tolist()
  [-4, -1, 0, 2]
  """
  codes = np.asarray(codes, np.int8)
  if bits < 3:
    return codes
  # The codes 1, 2, 3 of 3 bits stand for the levels 1, 2, 4.
  return np.sign(codes) * (np.int8(1) << np.abs(codes) >> np.int8(1))


def crop(program: Program, images: Any) -> Any:
  """Returns the center of images (batch, *program.source_shape), as `crop` says."""
  (h, w, _), (crop_h, crop_w) = program.source_shape, program.crop
  top, left = (h - crop_h) // 2, (w - crop_w) // 2
  return images[:, top:top + crop_h, left:left + crop_w]


def inputs(op: Op) -> tuple[int, ...]:
  """Returns the indices of the values that an operation reads."""
  if isinstance(op, Concat):
    return op.inputs
  if isinstance(op, Add):
    return op.a, op.b
  shortcut = getattr(op, "shortcut", None)
  return (op.input,) if shortcut is None else (op.input, shortcut)


def last_uses(program: Program) -> list[list[int]]:
  """Returns for each operation the values that no later one needs."""
  last = list(range(-1, len(program.ops)))  # An unused value ends where it is made.
  for i, op in enumerate(program.ops):
    for value in inputs(op):
      last[value] = i
  ends: list[list[int]] = [[] for _ in program.ops]
  for value, i in enumerate(last):
    if i >= 0:
      ends[i].append(value)
  return ends


def only_signs(program: Program) -> list[bool]:
  """Returns for each value whether all its codes are -1 or 1, never the level 0."""
  signs = [False]
  for op in program.ops:
    given = all(signs[i] for i in inputs(op))
    if isinstance(op, (Threshold, FloatNorm)):
      given = op.bits == 1
    elif isinstance(op, Shortcut):
      given = given and not op.before + op.after
    elif not isinstance(op, Concat):
      given = given and isinstance(op, Pool) and op.kind == "max"
    signs.append(given)
  return signs


# Inference: the shape, kind and bound of every value.


def infer_values(program: Program) -> list[Value]:
  """Returns what is known of every value, the image first.

  Raises:
    ValueError: The operations do not fit together, or exceed a number in the rules.
  """
  values = [image_value(program.source_shape, program.crop, program.offset)]
  append_values(values, program.ops)
  check_logits(program, values[-1])
  return values


def image_value(
    source_shape: Sequence[int], crop: Sequence[int], offset: np.ndarray
) -> Value:
  """Returns what is known of the image; the arguments are those of `Program`.

  Raises:
    ValueError: They break a rule.
  """
  h, w, c = (rules.size(n, "image") for n in source_shape)
  for n, size in zip(crop, (h, w)):
    require(1 <= n <= size, "", f"a crop of {n} from an image of {size}")
  offset = np.asarray(offset, np.int64)
  require(offset.shape == (c,) and bool((offset.clip(0, 255) == offset).all()), "",
          "there must be a pixel offset, 0 to 255, for each channel")
  require(math.prod(source_shape) <= rules.MAX_ELEMENTS, "",
          f"an image of {source_shape}")
  height, width = crop
  return Value((height, width, c), "INT", 0, np.maximum(offset, 255 - offset))


def append_values(values: list[Value], ops: Iterable[Op]) -> None:
  """Appends the value of each operation to the values before it."""
  channels = values[0].shape[2]
  for op in ops:
    values.append(infer_value(op, values))
    channels += values[-1].shape[2]
    require(channels <= rules.MAX_CHANNELS, op.name,
            f"over {rules.MAX_CHANNELS} channels in all")


def check_logits(program: Program, last: Value) -> None:
  """Raises ValueError unless the last value alone is logits, one for each class."""
  ops = program.ops
  makes_logits = [
      isinstance(op, Logits) or isinstance(op, FloatNorm) and op.bits is None
      for op in ops]
  require(len(ops) <= rules.MAX_OPS, "", f"{len(ops)} operations")
  require(makes_logits == [False] * (len(ops) - 1) + [True], "",
          "logits are made by the last operation, and by no other")
  require(last.shape == (1, 1, program.num_classes), ops[-1].name,
          f"logits of shape {last.shape} for {program.num_classes} classes")


def infer_value(op: Op, values: Sequence[Value]) -> Value:
  """Returns what is known of the value that `op` makes, after `values`.

  Raises:
    ValueError: The operation breaks a rule.
  """
  for index in inputs(op):
    require(0 <= index < len(values), op.name,
            f"input {index} of operation {len(values) - 1}")
  value = _RESULTS[type(op)](op, *(values[index] for index in inputs(op)))
  for n in value.shape:
    rules.size(n, op.name)
  require(math.prod(value.shape) <= rules.MAX_ELEMENTS, op.name,
          f"a value of shape {value.shape}")
  if value.kind == "INT":
    require(value.bound.max() <= rules.MAX_SUM, op.name, "sums beyond 32 bits")
  require(value.exponent <= rules.MAX_EXPONENT, op.name,
          f"floats up to 2^{value.exponent}, beyond 2^{rules.MAX_EXPONENT}")
  return value


def _conv(op: Conv, x: Value) -> Value:
  name, c = op.name, x.shape[2]
  out, _, _, channels = op.kernel.shape
  require(op.groups >= 1 and channels * op.groups == c, name,
          f"{op.groups} groups of {channels} input channels, there are {c}")
  require(out % op.groups == 0, name, f"{out} output channels in {op.groups} groups")
  for n in op.dilation:
    require(1 <= n <= rules.MAX_STEP, name, f"a dilation of {n}")
  if x.kind == "CODE":
    require(abs(op.pad) <= max_code(x.bits), name, f"a border of {op.pad}")
  else:
    require(op.pad == 0, name, f"a border of {op.pad} around {x.kind}")
  shape = (*_count_windows(name, x.shape, op.window, op.strides, op.pads), out)
  _check_constants(op, "weight_unit", "input_unit")
  _check_weights(op)
  if isinstance(op.bits, str) or x.kind == "FLOAT":
    return Value(shape, "FLOAT", exponent=_product_exponent(op, x))
  return Value(shape, "INT", 0, _sum_bounds(op, x.bound))


def _check_weights(op: Conv) -> None:
  if isinstance(op.bits, str):
    require(op.bits in FLOAT_FORMATS, op.name, f"weights of format {op.bits!r}")
    with np.errstate(all="ignore"):  # The next line refuses what overflows.
      kernel = op.kernel.astype(float_dtype(op.bits))
    require(bool(np.isfinite(kernel).all()), op.name, "weights that are not finite")
  else:
    q = max_code(grid_bits(op.bits, op.name))
    require(bool(np.abs(op.kernel).max() <= q and (op.bits > 1 or op.kernel.all())),
            op.name,
            f"weights that are no codes of {op.bits} bits")


def _sum_bounds(op: Conv, bound: np.ndarray) -> np.ndarray:
  """Returns the largest magnitude of each output channel.

  That is the sum over the weights of |level| times the bound of the input channel.
  """
  out, *_, channels = op.kernel.shape
  bound = bound.reshape(op.groups, channels)
  results = np.empty(out, np.int64)
  step = max(1, 2 ** 18 // op.kernel[0].size)  # Few at a time, to bound the memory.
  for first in range(0, out, step):
    sizes = np.abs(levels(op.kernel[first:first + step], int(op.bits))).sum(
        (1, 2), dtype=np.int64)
    group = np.arange(first, first + len(sizes)) // (out // op.groups)
    results[first:first + step] = (sizes * bound[group]).sum(-1)
  return results


def _product_exponent(op: Conv, x: Value) -> int:
  """Returns an exponent e: the FLOAT sums of a convolution are below 2 ** e.

  A sum of n products is below n times the largest weight times the largest input.
  """
  if isinstance(op.bits, str):
    weight = _exponent(np.abs(op.kernel).max())
  else:
    weight = LEVELS[op.bits][-1].bit_length() + _exponent(op.weight_unit)
  pixel = x.exponent
  if x.kind != "FLOAT":
    pixel = int(x.bound.max()).bit_length() + _exponent(op.input_unit)
  return weight + pixel + op.kernel[0].size.bit_length()


def _exponent(x: float) -> int:
  """Returns the least exponent e for which the magnitude of x is below 2 ** e."""
  return math.frexp(x)[1]


def _pool(op: Pool, x: Value) -> Value:
  require(op.kind in ("max", "sum"), op.name, f"a pool of kind {op.kind!r}")
  windows = _count_windows(op.name, x.shape, op.window, op.strides, op.pads)
  shape = (*windows, x.shape[2])
  for pad, size in zip(op.pads, (op.window[0],) * 2 + (op.window[1],) * 2):
    require(pad < size, op.name, "a border as wide as the window")
  if op.kind == "max":
    return x._replace(shape=shape)
  terms = math.prod(op.window)
  if x.kind == "FLOAT":
    return Value(shape, "FLOAT", exponent=x.exponent + terms.bit_length())
  return Value(shape, "INT", 0, x.bound * terms)


def _threshold(op: Threshold, x: Value, shortcut: Value | None = None) -> Value:
  name, c = op.name, x.shape[2]
  require(x.kind == "INT", name, f"thresholds over {x.kind}")
  grid_bits(op.bits, name)
  tables = 1
  if shortcut is not None:
    require(shortcut.kind == "CODE" and shortcut.shape == x.shape, name,
            f"a shortcut of shape {shortcut.shape} and kind {shortcut.kind}")
    tables = len(LEVELS[shortcut.bits])
  require(op.thresholds.shape == (tables, num_thresholds(op.bits), c), name,
          f"thresholds of shape {op.thresholds.shape}")
  require(op.falling.shape == (c,), name, "one direction for each channel")
  return _codes(x.shape, op.bits)


def _logits(op: Logits, x: Value) -> Value:
  require(x.kind == "INT", op.name, f"integer logits of {x.kind}")
  require(x.bound.max() <= rules.MAX_LOGIT_SUM, op.name,
          "sums that float32 does not hold exactly")
  _check_norm(op, x.shape[2])
  return Value(x.shape, "FLOAT")


def _float_norm(op: FloatNorm, x: Value, shortcut: Value | None = None) -> Value:
  name = op.name
  require(x.kind != "CODE", name, "batch norm of codes")
  _check_norm(op, x.shape[2])
  if shortcut is not None:
    require(shortcut.kind != "INT" and shortcut.shape == x.shape, name,
            f"a shortcut of shape {shortcut.shape} and kind {shortcut.kind}")
  _check_constants(op, "shortcut_unit", "grid")
  floats = op.bits is None or op.bits in FLOAT_FORMATS
  bits = 0 if floats else grid_bits(op.bits, name)
  q = 0 if bits < 2 else max_code(bits)
  require(op.grid.shape == (q,), name, f"{len(op.grid)} thresholds of a grid")
  if floats:  # HardTanh leaves magnitudes of at most 1 to round to a format.
    return Value(x.shape, "FLOAT", exponent=1)
  return _codes(x.shape, bits)


def _concat(op: Concat, *given: Value) -> Value:
  require(len(given) > 0, op.name, "nothing to put side by side")
  x = given[0]
  require(len(op.shifts) == len(op.inputs), op.name, "one shift for each input")
  for value, shift in zip(given, op.shifts):
    require(value.kind == x.kind and value.bits == x.bits
            and value.shape[:2] == x.shape[:2], op.name,
            f"{value.kind} of shape {value.shape} beside {x.kind} of {x.shape}")
    require(0 <= shift <= rules.MAX_SHIFT and (not shift or x.kind == "INT"), op.name,
            f"a shift of {shift}")
  bounds = [value.bound << shift for value, shift in zip(given, op.shifts)]
  channels = sum(value.shape[2] for value in given)
  return x._replace(shape=(*x.shape[:2], channels), bound=np.concatenate(bounds),
                    exponent=max(value.exponent for value in given))


def _shortcut(op: Shortcut, x: Value) -> Value:
  require(x.kind == "CODE", op.name, f"a shortcut of {x.kind}")
  for stride in op.strides:
    require(1 <= stride <= rules.MAX_STEP, op.name, f"a stride of {stride}")
  for n in (op.before, op.after):
    require(0 <= n <= rules.MAX_SIZE, op.name, f"{n} channels of zeros")
  (h, w, c), (down, right) = x.shape, op.strides
  return _codes((-(-h // down), -(-w // right), op.before + c + op.after), x.bits)


def _add(op: Add, a: Value, b: Value) -> Value:
  require(a.kind == b.kind != "FLOAT" and a.shape == b.shape, op.name,
          f"{b.kind} of shape {b.shape} added to {a.kind} of {a.shape}")
  for shift in (op.shift_a, op.shift_b):
    require(0 <= shift <= rules.MAX_SHIFT, op.name, f"a shift of {shift}")
  return Value(a.shape, "INT", 0, (a.bound << op.shift_a) + (b.bound << op.shift_b))


_RESULTS: dict[type, Any] = {
    Conv: _conv,
    Pool: _pool,
    Threshold: _threshold,
    Logits: _logits,
    FloatNorm: _float_norm,
    Concat: _concat,
    Shortcut: _shortcut,
    Add: _add,
}


def _codes(shape: tuple[int, int, int], bits: int) -> Value:
  return Value(shape, "CODE", bits, np.full(shape[2], LEVELS[bits][-1], np.int64))


def _check_norm(op: Logits | FloatNorm, channels: int) -> None:
  for field in ("center", "scale", "constant"):
    require(getattr(op, field).shape == (channels,), op.name, f"{field}'s shape")
  _check_constants(op, "unit", "center", "scale")
  _check_constants(op, "constant", least=rules.LEAST_ADDED)


def _check_constants(
    op: Op, *fields: str, least: float = rules.LEAST_CONSTANT
) -> None:
  """Checks that float constants are 0 or of a magnitude that the rules allow."""
  for field in fields:
    with np.errstate(all="ignore"):  # The comparison refuses what is not finite.
      size = np.abs(np.asarray(getattr(op, field), np.float64))
      allowed = (size == 0) | (least <= size) & (size <= rules.MOST_CONSTANT)
    require(allowed.all(), op.name, f"{field}: a constant whose magnitude is"
            f" neither 0 nor between {least:.3g} and {rules.MOST_CONSTANT:.3g}")


def _count_windows(
    name: str,
    shape: Sequence[int],
    window: Sequence[int],
    strides: Sequence[int],
    pads: Sequence[int],
) -> tuple[int, int]:
  """Returns the number of windows, vertically and horizontally."""
  for n in window:
    rules.size(n, name)
  for n in strides:
    require(1 <= n <= rules.MAX_STEP, name, f"a stride of {n}")
  for n in pads:
    require(0 <= n <= rules.MAX_STEP, name, f"a border of {n}")
  height, width = padded_size(shape, pads)
  room = (height - window[0], width - window[1])
  require(min(room) >= 0, name, f"a window of {tuple(window)} over {tuple(shape[:2])}")
  require(height * width * shape[2] <= rules.MAX_PADDED, name,
          f"{height} x {width} x {shape[2]} elements with the border")
  return room[0] // strides[0] + 1, room[1] // strides[1] + 1


def padded_size(shape: Sequence[int], pads: Sequence[int]) -> tuple[int, int]:
  """Returns height and width of a value of a shape with its padding."""
  return shape[0] + pads[0] + pads[1], shape[1] + pads[2] + pads[3]
