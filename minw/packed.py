"""The packed network: an integer program, and the file (.minw) that holds it.

A program is a list of operations on values. Value 0 is the image; operation i makes
value i + 1. A value is a batch of

    INT    int32: pixels less their offset, sums of products, in units of their own
    CODE   int8: activations on a grid of 1, 2 or 3 bits, by the signed index of their
           level: -1, 1; -1..1; -3..3
    FLOAT  float32, where an operand is in a float format

Sums are of integer levels: -1, 1; -1, 0, 1; 0, +-1, +-2, +-4 for 1, 2 and 3 bits.
This module needs no packages but NumPy and ml_dtypes. A file is not trusted: `from_bytes`
checks all of it, by the rules in docs/format.md, which the native library follows as
well. Memory of a load stays below 32 times the size of the file, and 64 MB.
"""

import math
import os
import stat
import struct
from typing import Any, Iterable, Iterator, NamedTuple, Sequence
import zlib

import ml_dtypes
import numpy as np

from minw import files
from minw import metadata as metadata_lib
from minw import text

MAGIC = b"MINW\r\n\x1a\0"
# Version 2 adds groups and dilation to each convolution. A program that has neither is
# written in version 1, which older versions of minw read.
VERSIONS = (1, 2)

_HEAD = 32  # Bytes before the program: magic, version, checksum and sizes.

LEVELS = {1: (-1, 0, 1), 2: (-1, 0, 1), 3: (-4, -2, -1, 0, 1, 2, 4)}  # By code + q.
FLOAT_FORMATS = {
    "float8_e4m3fn": 8, "float16": 16, "bfloat16": 17, "float32": 32}
SMALLEST = np.float32(2.0 ** -126)  # A FLOAT below it has the one-bit code of 0.
_FORMAT_NAMES = {number: name for name, number in FLOAT_FORMATS.items()}

# Rules of the format that are numbers; csrc/program.cc has the same ones.
_MAX_FILE = 2 ** 30  # Bytes of a file.
_MAX_SIZE = 2 ** 16  # Largest dimension.
_MAX_STEP = 64  # Largest stride, dilation or border.
_MAX_SHIFT = 23
_MAX_OPS = 2 ** 12
_MAX_ELEMENTS = 2 ** 24  # Elements of an image or of another value.
_MAX_PADDED = 2 ** 26  # Elements of a value and the border around it.
_MAX_CHANNELS = 2 ** 22  # Channels of all values together.
_MAX_SUM = 2 ** 31 - 1  # Magnitude of an INT.
_MAX_LOGIT_SUM = 2 ** 24  # Magnitude of an INT that float32 must hold exactly.
# Magnitudes of float constants that are not 0: logits then never overflow, and no
# intermediate result is a subnormal number, which some backends take for 0.
_LEAST_CONSTANT, _MOST_CONSTANT = 2.0 ** -40, 2.0 ** 40
_LEAST_ADDED = 2.0 ** -100  # The constant that is added last may be smaller.
_MAX_EXPONENT = 40  # FLOATs stay below 2 ** 40.

# Operations that `cost` counts for an element that is read or made, besides products, ...
_OPERATIONS = 64
_STEP_OPERATIONS = 16  # ... for each number of a window and each threshold of it, ...
_FLOAT_OPERATIONS = 512  # ... and for an element that is rounded to a float format.
_FREE_PADDING = 4  # Padded weights that each weight of a file may cost.
_OWN_PRODUCTS = 256  # See `_has_own_inputs`.


class Limits(NamedTuple):
  """The most that a network may cost those who load and run it; see `cost`.

  The defaults leave ResNet-50 at 224 x 224 pixels room for 25 times its operations.

  Attributes:
    padding: Weights that padding adds, beyond 4 for each weight. Kernels keep up to 8
      bytes for each padded weight.
    memory: Bytes of the values that an image needs at the same time.
    operations: Multiplications and other operations for an image, with the padding.
  """

  padding: int = 2 ** 24
  memory: int = 2 ** 29
  operations: int = 2 ** 38


UNLIMITED = Limits(*[2 ** 63 - 1] * 3)


class Conv(NamedTuple):
  """A convolution; a dense layer is one with a kernel of its input's size.

  Attributes:
    name: the layer's path.
    input: a value.
    bits: 1, 2, 3 or a float format.
    kernel: (output channels, height, width, input channels / groups): int8 codes, or
      float32 in the format's range.
    strides: (vertical, horizontal).
    pads: (top, bottom, left, right).
    pad: the code that the border consists of.
    weight_unit, input_unit: what an integer level is worth, for FLOAT results.
    groups: input and output channels are split into this many equal groups, in order.
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
    return tuple((size - 1) * step + 1
                 for size, step in zip(self.kernel.shape[1:3], self.dilation))


class Pool(NamedTuple):
  """The maximum ("max") or the sum ("sum") over windows; borders never count."""

  name: str
  input: int
  kind: str
  window: tuple[int, int]
  strides: tuple[int, int]
  pads: tuple[int, int, int, int] = (0, 0, 0, 0)


class Threshold(NamedTuple):
  """Batch norm, shortcut, HardTanh and quantizer, as integers.

  count = how many j have acc >= thresholds[s, j, channel], or <= where the channel
  falls; the code is 2 count - 1 for one bit, else count - q.

  Attributes:
    name: the layer's path.
    input: an INT value.
    bits: of the codes.
    falling: bool (channels,).
    thresholds: int32 (s, j, channels), s = 1, or by a shortcut's code + its q.
    shortcut: a CODE value, or None.
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
  """What `Threshold` and `Logits` are where an operand is in a float format.

  Attributes:
    name: the layer's path.
    input: an INT or FLOAT value.
    bits: of the result: 1, 2, 3, a float format, or None for logits.
    unit: what an INT of the input is worth.
    center, scale, constant: float32 (channels,).
    grid: the thresholds of a grid, float32 (q,).
    shortcut: a CODE or FLOAT value, or None.
    shortcut_unit: what a level of it is worth.
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
  """Values side by side, INTs times 2 ** shift each so that they share a unit."""

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
  """a * 2 ** shift_a + b * 2 ** shift_b of two INT or two CODE values: an INT."""

  name: str
  a: int
  b: int
  shift_a: int = 0
  shift_b: int = 0


Op = Conv | Pool | Threshold | Logits | FloatNorm | Concat | Shortcut | Add


class Program(NamedTuple):
  """A packed network.

  Attributes:
    source_shape: (height, width, channels) of the images it takes.
    crop: (height, width) that it cuts from their centre.
    offset: uint8 (channels,), subtracted from pixels.
    num_classes: of the logits.
    ops: the operations; the last one makes the logits.
    metadata: What else the file says, such as "labels"; see `minw.metadata`.
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
    bits: of a CODE.
    bound: int64 (channels,), the largest magnitude of an INT or of a CODE's level.
    exponent: A FLOAT's magnitudes are below 2 ** exponent.
  """

  shape: tuple[int, int, int]
  kind: str
  bits: int = 0
  bound: np.ndarray = np.zeros(0, np.int64)
  exponent: int = 0


def num_thresholds(bits: int) -> int:
  """How many comparisons make a code: 1, 2, 6."""
  return (1, 2, 6)[bits - 1]


def max_code(bits: int) -> int:
  """q: 1, 1, 3."""
  return len(LEVELS[bits]) // 2


def float_dtype(name: str) -> np.dtype:
  """The dtype of a float format; ml_dtypes has those that NumPy has not."""
  return np.dtype(getattr(ml_dtypes, name, name))


def levels(codes: np.ndarray, bits: int) -> np.ndarray:
  """The integer levels of codes: int8 of the same shape."""
  codes = np.asarray(codes, np.int8)
  # Of 3 bits, the codes 1, 2, 3 are the levels 1, 2, 4.
  return codes if bits < 3 else np.sign(codes) * (np.int8(1) << np.abs(codes) >> np.int8(1))


def crop(program: Program, images: Any) -> Any:
  """The centre of images (batch, *program.source_shape) that the network sees."""
  (h, w, _), (crop_h, crop_w) = program.source_shape, program.crop
  top, left = (h - crop_h) // 2, (w - crop_w) // 2
  return images[:, top:top + crop_h, left:left + crop_w]


def inputs(op: Op) -> tuple[int, ...]:
  """The values that an operation reads."""
  if isinstance(op, Concat):
    return op.inputs
  if isinstance(op, Add):
    return op.a, op.b
  shortcut = getattr(op, "shortcut", None)
  return (op.input,) if shortcut is None else (op.input, shortcut)


def only_signs(program: Program) -> list[bool]:
  """Of each value whether its codes are -1 and 1, and never the level 0."""
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


def infer_values(program: Program) -> list[Value]:
  """The shape, kind and bound of every value, from the image on.

  Raises:
    ValueError: the program does not fit together, or is larger than allowed.
  """
  values = [_image(program.source_shape, program.crop, program.offset)]
  _append_values(values, program.ops)
  _check_logits(program, values[-1])
  return values


def _append_values(values: list[Value], ops: Iterable[Op]) -> None:
  """Appends the value of each operation."""
  channels = values[0].shape[2]
  for op in ops:
    values.append(infer_value(op, values))
    channels += values[-1].shape[2]
    _require(channels <= _MAX_CHANNELS, op.name, f"over {_MAX_CHANNELS} channels in all")


def _check_logits(program, last):
  p = program
  makes_logits = [
      isinstance(op, Logits) or isinstance(op, FloatNorm) and op.bits is None
      for op in p.ops]
  _require(len(p.ops) <= _MAX_OPS, "", f"{len(p.ops)} operations")
  _require(makes_logits == [False] * (len(p.ops) - 1) + [True], "",
           "logits are made by the last operation, and by no other")
  _require(last.shape == (1, 1, p.num_classes), p.ops[-1].name,
           f"logits of shape {last.shape} for {p.num_classes} classes")


def _image(source_shape, crop, offset):
  h, w, c = (_size(n, "image") for n in source_shape)
  for n, size in zip(crop, (h, w)):
    _require(1 <= n <= size, "", f"a crop of {n} from an image of {size}")
  offset = np.asarray(offset, np.int64)
  _require(offset.shape == (c,) and (offset.clip(0, 255) == offset).all(), "",
           "a pixel offset, 0 to 255, for each channel")
  shape = (*crop, c)
  _require(math.prod(source_shape) <= _MAX_ELEMENTS, "", f"an image of {source_shape}")
  return Value(shape, "INT", 0, np.maximum(offset, 255 - offset))


def infer_value(op: Op, values: Sequence[Value]) -> Value:
  """The value that `op` makes, after `values`."""
  for index in inputs(op):
    _require(0 <= index < len(values), op.name,
             f"input {index} of operation {len(values) - 1}")
  value = _result(op, [values[index] for index in inputs(op)])
  for n in value.shape:
    _size(n, op.name)
  _require(math.prod(value.shape) <= _MAX_ELEMENTS, op.name,
           f"a value of shape {value.shape}")
  if value.kind == "INT":
    _require(value.bound.max() <= _MAX_SUM, op.name, "sums beyond 32 bits")
  _require(value.exponent <= _MAX_EXPONENT, op.name,
           f"floats up to 2^{value.exponent}, beyond 2^{_MAX_EXPONENT}")
  return value


def _result(op, given):
  name, x = op.name, given[0]
  h, w, c = x.shape
  bound = x.bound
  if isinstance(op, Conv):
    out, _, _, channels = op.kernel.shape
    _require(op.groups >= 1 and channels * op.groups == c, name,
             f"{op.groups} groups of {channels} input channels, there are {c}")
    _require(out % op.groups == 0, name,
             f"{out} output channels in {op.groups} groups")
    for n in op.dilation:
      _require(1 <= n <= _MAX_STEP, name, f"a dilation of {n}")
    if x.kind == "CODE":
      _require(abs(op.pad) <= max_code(x.bits), name, f"a border of {op.pad}")
    else:
      _require(op.pad == 0, name, f"a border of {op.pad} around {x.kind}")
    shape = (*_windows(name, x.shape, op.window, op.strides, op.pads), out)
    _constants(op, "weight_unit", "input_unit")
    if isinstance(op.bits, str):
      _require(op.bits in FLOAT_FORMATS, name, f"weights of format {op.bits!r}")
      with np.errstate(all="ignore"):  # What is not finite is found below.
        kernel = op.kernel.astype(float_dtype(op.bits))
      _require(np.isfinite(kernel).all(), name, "weights that are not finite")
    else:
      q = max_code(_grid_bits(op.bits, name))
      _require(np.abs(op.kernel).max() <= q and (op.bits > 1 or op.kernel.all()), name,
               f"weights that are no codes of {op.bits} bits")
    if isinstance(op.bits, str) or x.kind == "FLOAT":
      return Value(shape, "FLOAT", exponent=_product_exponent(op, x))
    return Value(shape, "INT", 0, _sum_bounds(op, bound))
  if isinstance(op, Pool):
    _require(op.kind in ("max", "sum"), name, f"a pool of kind {op.kind!r}")
    shape = (*_windows(name, x.shape, op.window, op.strides, op.pads), c)
    for pad, size in zip(op.pads, (op.window[0],) * 2 + (op.window[1],) * 2):
      _require(pad < size, name, "a border as wide as the window")
    if op.kind == "max":
      return x._replace(shape=shape)
    terms = math.prod(op.window)
    if x.kind == "FLOAT":
      return Value(shape, "FLOAT", exponent=x.exponent + terms.bit_length())
    return Value(shape, "INT", 0, bound * terms)
  if isinstance(op, Threshold):
    _require(x.kind == "INT", name, f"thresholds over {x.kind}")
    _grid_bits(op.bits, name)
    tables = 1
    if op.shortcut is not None:
      _require(given[1].kind == "CODE" and given[1].shape == x.shape, name,
               f"a shortcut of shape {given[1].shape} and kind {given[1].kind}")
      tables = len(LEVELS[given[1].bits])
    _require(op.thresholds.shape == (tables, num_thresholds(op.bits), c), name,
             f"thresholds of shape {op.thresholds.shape}")
    _require(op.falling.shape == (c,), name, "one direction for each channel")
    return _codes(x.shape, op.bits)
  if isinstance(op, Logits):
    _require(x.kind == "INT", name, f"integer logits of {x.kind}")
    _require(x.bound.max() <= _MAX_LOGIT_SUM, name,
             "sums that float32 does not hold exactly")
    _norm(op, c)
    return Value(x.shape, "FLOAT")
  if isinstance(op, FloatNorm):
    _require(x.kind != "CODE", name, "batch norm of codes")
    _norm(op, c)
    if op.shortcut is not None:
      _require(given[1].kind != "INT" and given[1].shape == x.shape, name,
               f"a shortcut of shape {given[1].shape} and kind {given[1].kind}")
    _constants(op, "shortcut_unit", "grid")
    floats = op.bits is None or op.bits in FLOAT_FORMATS
    q = 0 if floats or _grid_bits(op.bits, name) == 1 else max_code(op.bits)
    _require(op.grid.shape == (q,), name, f"{len(op.grid)} thresholds of a grid")
    # What is rounded to a format is between -1 and 1.
    return Value(x.shape, "FLOAT", exponent=1) if floats else _codes(x.shape, op.bits)
  if isinstance(op, Concat):
    _require(len(op.shifts) == len(op.inputs), name, "one shift for each input")
    for value, shift in zip(given, op.shifts):
      _require(value.kind == x.kind and value.bits == x.bits
               and value.shape[:2] == (h, w), name,
               f"{value.kind} of shape {value.shape} beside {x.kind} of {x.shape}")
      _require(0 <= shift <= _MAX_SHIFT and (not shift or x.kind == "INT"), name,
               f"a shift of {shift}")
    bounds = [v.bound << shift for v, shift in zip(given, op.shifts)]
    return x._replace(shape=(h, w, sum(v.shape[2] for v in given)),
                      bound=np.concatenate(bounds),
                      exponent=max(v.exponent for v in given))
  if isinstance(op, Shortcut):
    _require(x.kind == "CODE", name, f"a shortcut of {x.kind}")
    for stride in op.strides:
      _require(1 <= stride <= _MAX_STEP, name, f"a stride of {stride}")
    for n in (op.before, op.after):
      _require(0 <= n <= _MAX_SIZE, name, f"{n} channels of zeros")
    sh, sw = op.strides
    return _codes((-(-h // sh), -(-w // sw), op.before + c + op.after), x.bits)
  assert isinstance(op, Add), op
  _require(x.kind == given[1].kind != "FLOAT" and x.shape == given[1].shape, name,
           f"{given[1].kind} of shape {given[1].shape} added to {x.kind} of {x.shape}")
  for shift in (op.shift_a, op.shift_b):
    _require(0 <= shift <= _MAX_SHIFT, name, f"a shift of {shift}")
  return Value(x.shape, "INT", 0,
               (x.bound << op.shift_a) + (given[1].bound << op.shift_b))


def _codes(shape, bits):
  return Value(shape, "CODE", bits, np.full(shape[2], LEVELS[bits][-1], np.int64))


def _norm(op, channels):
  for field in ("center", "scale", "constant"):
    _require(getattr(op, field).shape == (channels,), op.name, f"{field}'s shape")
  _constants(op, "unit", "center", "scale")
  _constants(op, "constant", least=_LEAST_ADDED)


def _constants(op, *fields, least=_LEAST_CONSTANT):
  """Checks that float constants are 0 or of a magnitude that the rules allow."""
  for field in fields:
    with np.errstate(all="ignore"):  # What is not finite is found below.
      size = np.abs(np.asarray(getattr(op, field), np.float64))
      allowed = (size == 0) | (least <= size) & (size <= _MOST_CONSTANT)
    _require(allowed.all(), op.name, f"{field}: a constant whose magnitude is"
             f" neither 0 nor between {least:.3g} and {_MOST_CONSTANT:.3g}")


def _sum_bounds(op: Conv, bound: np.ndarray) -> np.ndarray:
  """The largest magnitude of each output channel, of inputs up to `bound`."""
  out, *_, channels = op.kernel.shape
  bound = bound.reshape(op.groups, channels)
  results = np.empty(out, np.int64)
  step = max(1, 2 ** 18 // op.kernel[0].size)  # Few at a time, to bound the memory.
  for first in range(0, out, step):
    sizes = np.abs(levels(op.kernel[first:first + step], op.bits)).sum(
        (1, 2), dtype=np.int64)
    group = np.arange(first, first + len(sizes)) // (out // op.groups)
    results[first:first + step] = (sizes * bound[group]).sum(-1)
  return results


def _product_exponent(op: Conv, x: Value) -> int:
  """An exponent e: the FLOAT sums of a convolution are below 2 ** e in magnitude."""
  if isinstance(op.bits, str):
    weight = _exponent(np.abs(op.kernel).max())
  else:
    weight = LEVELS[op.bits][-1].bit_length() + _exponent(op.weight_unit)
  pixel = x.exponent
  if x.kind != "FLOAT":
    pixel = int(x.bound.max()).bit_length() + _exponent(op.input_unit)
  return weight + pixel + op.kernel[0].size.bit_length()


def _exponent(x: float) -> int:
  """An exponent e: the magnitude of x is below 2 ** e."""
  return math.frexp(x)[1]


def _windows(name, shape, window, strides, pads):
  """The number of windows, vertically and horizontally."""
  for n in window:
    _size(n, name)
  for n in strides:
    _require(1 <= n <= _MAX_STEP, name, f"a stride of {n}")
  for n in pads:
    _require(0 <= n <= _MAX_STEP, name, f"a border of {n}")
  height, width = _padded_size(shape, pads)
  room = (height - window[0], width - window[1])
  _require(min(room) >= 0, name, f"a window of {window} over {shape[:2]}")
  _require(height * width * shape[2] <= _MAX_PADDED, name,
           f"{height} x {width} x {shape[2]} elements with the border")
  return room[0] // strides[0] + 1, room[1] // strides[1] + 1


def _padded_size(shape, pads):
  return shape[0] + pads[0] + pads[1], shape[1] + pads[2] + pads[3]


def last_uses(program: Program) -> list[list[int]]:
  """For each operation, the values that no later one needs."""
  last = list(range(-1, len(program.ops)))  # What nothing needs ends where it is made.
  for i, op in enumerate(program.ops):
    for value in inputs(op):
      last[value] = i
  ends = [[] for _ in program.ops]
  for value, i in enumerate(last):
    if i >= 0:
      ends[i].append(value)
  return ends


def cost(program: Program, values: Sequence[Value] | None = None) -> Limits:
  """The cost of a network, in the terms of `Limits`; docs/format.md has the formulas.

  Args:
    program: the network.
    values: what `infer_values` gives for it, if that is at hand.
  """
  values = infer_values(program) if values is None else values
  ends = last_uses(program)
  padding = memory = operations = 0
  live = _bytes(values[0]) if any(0 in end for end in ends) else 0
  for i, op in enumerate(program.ops):
    x, result = values[inputs(op)[0]], values[i + 1]
    live += _bytes(result)
    work = 0
    if isinstance(op, Conv):
      weights = _padded_weights(op, x.shape)
      padding += max(0, weights - _FREE_PADDING * op.kernel.size)
      elements = math.prod(_padded_size(x.shape, op.pads)) * _pixel_elements(op, x.shape)
      work = 4 * elements
      operations += math.prod(result.shape[:2]) * weights + _OPERATIONS * elements
    operations += _stored(result.shape) * _element_operations(op)
    memory = max(memory, live + work)
    live -= sum(_bytes(values[value]) for value in ends[i])
  return Limits(padding, memory, operations)


def check_limits(
    program: Program, limits: Limits = Limits(), values: Sequence[Value] | None = None
) -> None:
  """Refuses a network that costs more than `limits` allow.

  Args:
    program: the network.
    limits: the most that it may cost.
    values: what `infer_values` gives for it, if that is at hand.

  Raises:
    ValueError: It costs more; the message names the limit.
  """
  for field, need, limit in zip(Limits._fields, cost(program, values), limits):
    _require(need <= limit, "", f"its {field}, {need}, exceeds the limit of {limit};"
             " higher limits are for files that you trust")


def _up(n, multiple):
  """n, rounded up to a multiple."""
  return -(-n // multiple) * multiple


def _stored(shape):
  """Elements of a value with its channels padded."""
  return shape[0] * shape[1] * _up(shape[2], 16)


def _bytes(value):
  return _stored(value.shape) * (1 if value.kind == "CODE" else 4)


def _has_own_inputs(op: Conv, shape: Sequence[int]) -> bool:
  """Whether kernels copy the inputs of each output channel beside one another, instead
  of running one group of a convolution after the other."""
  out, *_, channels = op.kernel.shape
  elements = math.prod(_padded_size(shape, op.pads)) * channels * _up(out, 16)
  return (op.groups > 1 and channels * (out // op.groups) <= _OWN_PRODUCTS
          and elements <= _MAX_PADDED)


def _pixel_elements(op: Conv, shape: Sequence[int]) -> int:
  """Elements of a pixel that a convolution reads."""
  out, *_, channels = op.kernel.shape
  return channels * _up(out, 16) if _has_own_inputs(op, shape) else shape[2]


def _padded_weights(op: Conv, shape: Sequence[int]) -> int:
  """Weights of a convolution with input and output channels padded, as in kernels."""
  out, *window, channels = op.kernel.shape
  if _has_own_inputs(op, shape):
    return math.prod(window) * channels * _up(out, 64)
  return op.groups * math.prod(window) * _up(channels, 8) * _up(out // op.groups, 64)


def _element_operations(op: Op) -> int:
  """Operations for an element of a result, without multiplications."""
  if isinstance(op, Pool):
    return _OPERATIONS + _STEP_OPERATIONS * math.prod(op.window)
  if isinstance(op, Threshold):
    return _OPERATIONS + _STEP_OPERATIONS * math.prod(op.thresholds.shape[:2])
  return _FLOAT_OPERATIONS if isinstance(op, FloatNorm) else _OPERATIONS


def _grid_bits(bits, name):
  _require(bits in LEVELS, name, f"{bits!r} bits; a packed grid has 1, 2 or 3")
  return bits


def _size(n, name):
  _require(1 <= n <= _MAX_SIZE, name, f"a size of {n}; it is 1 to {_MAX_SIZE}")
  return n


def _require(ok: bool, name: str, problem: str) -> None:
  if not ok:
    layer = f", layer {text.shortened(name)}" if name else ""
    raise ValueError(f"packed network{layer}: {problem}")


# The file. Little-endian throughout; weights ordered as in `Conv.kernel`.


def to_bytes(program: Program) -> bytes:
  """The file's content; `from_bytes` gives the program back."""
  infer_values(program)
  p = program
  version = 1 if all(map(_is_plain, p.ops)) else 2
  parts = [struct.pack("<5I", *p.source_shape, *p.crop),
           np.asarray(p.offset, np.uint8).tobytes(),
           struct.pack("<2I", p.num_classes, len(p.ops))]
  for op in p.ops:
    name = _name_bytes(op.name)
    kind, fields = _write_op(op, version)
    parts.append(struct.pack("<2B", kind, len(name)) + name + fields)
  body = b"".join(parts)
  metadata = metadata_lib.encode(p.metadata, p.num_classes)
  rest = struct.pack("<Q2I", _HEAD + len(body) + len(metadata), len(body),
                     len(metadata)) + body + metadata
  return MAGIC + struct.pack("<2I", version, zlib.crc32(rest)) + rest


def _name_bytes(name):
  """A layer's name as a file holds it."""
  _require("\0" not in name, name, "a name with a NUL")
  data = name.encode(errors="surrogatepass")
  _require(len(data) < 256, name, "a name longer than 255 bytes")
  _require(data == name.encode(errors="replace"), name, "a name with a lone surrogate")
  return data


def _is_plain(op):
  """Whether version 1 has all fields of an operation."""
  return not isinstance(op, Conv) or op.groups == 1 and tuple(op.dilation) == (1, 1)


def from_bytes(data: bytes, limits: Limits = Limits()) -> Program:
  """The program that a file holds.

  Args:
    data: the content of the file.
    limits: the most that loading and running the network may cost.

  Raises:
    ValueError: it is not such a file, of another version, damaged or impossible, or
      beyond `limits`.
  """
  version, crc, body_size = _head(data, len(data))
  if crc != zlib.crc32(data[16:]):
    raise ValueError("packed network: its checksum does not match: it is damaged")
  r = _Reader(data[_HEAD:_HEAD + body_size])
  source_shape, crop = r.unpack("3I"), r.unpack("2I")
  offset = r.array(np.uint8, source_shape[2])
  num_classes, num_ops = r.unpack("2I")
  _require(num_ops <= _MAX_OPS, "", f"{num_ops} operations")
  ops, values = [], [_image(source_shape, crop, offset)]
  _append_values(values, _read_ops(r, num_ops, version, ops, values))
  _require(r.done(), "", "bytes after the last operation")
  program = Program(source_shape, crop, offset, num_classes, tuple(ops), {})
  _check_logits(program, values[-1])
  check_limits(program, limits, values)
  metadata = metadata_lib.decode(data[_HEAD + body_size:], num_classes)
  return program._replace(metadata=metadata)


def write(path: str, program: Program) -> int:
  """Writes the file; returns its size in bytes."""
  data = to_bytes(program)
  files.write(path, data)
  return len(data)


def read(path: str | os.PathLike, limits: Limits = Limits()) -> Program:
  """Reads a file; see `from_bytes` and `read_bytes`."""
  return from_bytes(read_bytes(path), limits)


def read_bytes(path: str | os.PathLike) -> bytes:
  """The content of a file that begins as a packed network.

  Reading ends, and no more is read than the file's head says. Otherwise a pipe could
  wait forever, a device have no end, and a file with holes be larger than memory.

  Raises:
    OSError: The file cannot be read, or it is not a regular file.
    ValueError: It does not begin as a packed network of its size, or is too large.
  """
  if not stat.S_ISREG(os.stat(path).st_mode):  # Opening a device may have effects.
    raise OSError("it is not a regular file")
  with open(path, "rb", opener=_open_at_once) as file:
    size = os.fstat(file.fileno()).st_size
    start = file.read(_HEAD)
    _head(start, size)
    return start + file.read(size - _HEAD)


def _open_at_once(path: str, flags: int) -> int:
  """Opens a file. A pipe that has just taken its place would wait for its writer."""
  return os.open(path, flags | os.O_NONBLOCK)


def _head(data: bytes, size: int) -> tuple[int, int, int]:
  """Reads the head of a file that has `size` bytes.

  Returns:
    The version, the checksum, and the size of the program. The rest are the metadata.
  """
  if data[:8] != MAGIC:
    raise ValueError("not a packed network: it does not begin as one")
  if len(data) < _HEAD:
    raise ValueError(f"packed network: {len(data)} bytes are less than its head")
  version, crc, said, body, metadata = struct.unpack_from("<2IQ2I", data, 8)
  if version not in VERSIONS:
    raise ValueError(
        f"packed network of format version {version}; this minw reads the versions"
        f" {' and '.join(map(str, VERSIONS))}: pack it again, or install a newer minw")
  if size != said or size != _HEAD + body + metadata:
    raise ValueError(f"packed network: {size} bytes where it says {said}")
  _require(size <= _MAX_FILE, "", f"{size} bytes; a file has at most {_MAX_FILE}")
  return version, crc, body


class _Reader:
  """Reads a program's bytes from the front, and never beyond the end."""

  def __init__(self, data):
    self._data = data
    self._at = 0

  def take(self, size):
    _require(size <= len(self._data) - self._at, "", "it ends inside an operation")
    self._at += size
    return self._data[self._at - size:self._at]

  def unpack(self, layout):
    return struct.unpack("<" + layout, self.take(struct.calcsize("<" + layout)))

  def array(self, dtype, *shape):
    dtype = np.dtype(dtype).newbyteorder("<")
    data = self.take(math.prod(shape) * dtype.itemsize)
    return np.frombuffer(data, dtype).reshape(shape).astype(dtype.newbyteorder("="))

  def done(self):
    return self._at == len(self._data)


# The numbers of operations in the file.
_CONV, _MAX_POOL, _SUM_POOL, _THRESHOLD, _LOGITS = 1, 2, 3, 4, 5
_CONCAT, _SHORTCUT, _FLOAT_NORM, _ADD = 6, 7, 8, 10


def _write_op(op, version):
  if isinstance(op, Conv):
    out, kh, kw, channels = op.kernel.shape
    floats = isinstance(op.bits, str)
    form = FLOAT_FORMATS[op.bits] if floats else op.bits
    weights = (op.kernel.astype(float_dtype(op.bits)).tobytes() if floats
               else _planes(op))
    return _CONV, struct.pack(
        "<IB10Ib2f", op.input, form, kh, kw, channels, out, *op.strides, *op.pads,
        op.pad, op.weight_unit, op.input_unit) + (
            b"" if version == 1 else struct.pack("<3I", op.groups, *op.dilation)
        ) + weights
  if isinstance(op, Pool):
    return _MAX_POOL if op.kind == "max" else _SUM_POOL, struct.pack(
        "<9I", op.input, *op.window, *op.strides, *op.pads)
  if isinstance(op, Threshold):
    width = 2 if (op.thresholds.astype(np.int16) == op.thresholds).all() else 4
    return _THRESHOLD, struct.pack(
        "<Ii2B", op.input, _or_none(op.shortcut), op.bits, width
    ) + np.packbits(op.falling, bitorder="little").tobytes() + op.thresholds.astype(
        f"<i{width}").tobytes()
  if isinstance(op, Logits):
    return _LOGITS, struct.pack("<If", op.input, op.unit) + _floats(
        op.center, op.scale, op.constant)
  if isinstance(op, FloatNorm):
    form = 0 if op.bits is None else FLOAT_FORMATS.get(op.bits, op.bits)
    return _FLOAT_NORM, struct.pack(
        "<IiB2f", op.input, _or_none(op.shortcut), form, op.unit, op.shortcut_unit
    ) + _floats(op.center, op.scale, op.constant) + struct.pack(
        "<B", len(op.grid)) + _floats(op.grid)
  if isinstance(op, Concat):
    return _CONCAT, struct.pack("<I", len(op.inputs)) + b"".join(
        struct.pack("<IB", *pair) for pair in zip(op.inputs, op.shifts))
  if isinstance(op, Shortcut):
    return _SHORTCUT, struct.pack("<5I", op.input, *op.strides, op.before, op.after)
  return _ADD, struct.pack("<2I2B", op.a, op.b, op.shift_a, op.shift_b)


def _read_ops(r, count, version, ops, values) -> Iterator[Op]:
  """Reads operations, and appends each to `ops` before its value is asked for."""
  for _ in range(count):
    kind, length = r.unpack("2B")
    try:
      name = r.take(length).decode()
    except UnicodeDecodeError as error:
      raise ValueError("packed network: a layer's name is not UTF-8") from error
    _require("\0" not in name, name, "a name with a NUL")
    ops.append(_read_op(r, kind, name, values, version))
    yield ops[-1]


def _read_op(r, kind, name, values, version):
  """Reads an operation; `values` are those before it, of which channels are asked."""
  def value(index):
    _require(index < len(values), name, f"input {index} of operation {len(values) - 1}")
    return values[index]

  if kind == _CONV:
    (source, form, kh, kw, channels, out, sh, sw, *pads, pad, weight_unit,
     input_unit) = r.unpack("IB10Ib2f")
    groups, *dilation = (1, 1, 1) if version == 1 else r.unpack("3I")
    shape = tuple(_size(n, name) for n in (out, kh, kw, channels))
    if form in _FORMAT_NAMES:
      bits = _FORMAT_NAMES[form]
      kernel = r.array(float_dtype(bits), *shape).astype(np.float32)
    else:
      bits = _grid_bits(form, name)
      kernel = _unplanes(r, bits, shape)
    return Conv(name, source, bits, kernel, (sh, sw), tuple(pads), pad, weight_unit,
                input_unit, groups, tuple(dilation))
  if kind in (_MAX_POOL, _SUM_POOL):
    source, *n = r.unpack("9I")
    return Pool(name, source, "max" if kind == _MAX_POOL else "sum",
                tuple(n[:2]), tuple(n[2:4]), tuple(n[4:]))
  if kind == _THRESHOLD:
    source, shortcut, bits, width = r.unpack("Ii2B")
    _grid_bits(bits, name)
    _require(width in (2, 4), name, f"thresholds of {width} bytes")
    channels = value(source).shape[2]
    tables = 1
    if shortcut >= 0:
      tables = len(LEVELS[_grid_bits(value(shortcut).bits, name)])
    falling = np.unpackbits(r.array(np.uint8, -(-channels // 8)), count=channels,
                            bitorder="little").astype(bool)
    thresholds = r.array(f"i{width}", tables, num_thresholds(bits), channels)
    return Threshold(name, source, bits, falling, thresholds.astype(np.int32),
                     _from_none(shortcut))
  if kind == _LOGITS:
    source, unit = r.unpack("If")
    channels = value(source).shape[2]
    return Logits(name, source, unit, *r.array(np.float32, 3, channels))
  if kind == _FLOAT_NORM:
    source, shortcut, form, unit, shortcut_unit = r.unpack("IiB2f")
    channels = value(source).shape[2]
    norm = r.array(np.float32, 3, channels)
    grid = r.array(np.float32, *r.unpack("B"))
    bits = _FORMAT_NAMES.get(form, form) or None
    return FloatNorm(name, source, bits, unit, *norm, grid, _from_none(shortcut),
                     shortcut_unit)
  if kind == _CONCAT:
    count, = r.unpack("I")
    _require(count >= 1, name, "nothing to put side by side")
    pairs = [r.unpack("IB") for _ in range(min(count, _MAX_SIZE + 1))]
    return Concat(name, *map(tuple, zip(*pairs)))
  if kind == _SHORTCUT:
    source, sh, sw, before, after = r.unpack("5I")
    return Shortcut(name, source, (sh, sw), before, after)
  _require(kind == _ADD, name, f"an operation of kind {kind}")
  return Add(name, *r.unpack("2I2B"))


def _planes(op):
  """Codes as bit planes, each a whole number of bytes."""
  codes = op.kernel
  planes = [codes > 0]
  if op.bits == 2:
    planes.append(codes != 0)
  if op.bits == 3:
    planes += [np.abs(codes) & 1 != 0, np.abs(codes) & 2 != 0]
  return b"".join(np.packbits(p, bitorder="little").tobytes() for p in planes)


def _unplanes(r, bits, shape):
  n = math.prod(shape)
  sign, *size = (
      np.unpackbits(r.array(np.uint8, -(-n // 8)), count=n, bitorder="little")
      .view(np.int8) for _ in range(bits))
  sign += sign
  sign -= 1
  for i, plane in enumerate(size[1:], 1):
    size[0] += plane << i
  return (sign * size[0] if size else sign).reshape(shape)


def _floats(*arrays):
  return np.concatenate(arrays).astype("<f4").tobytes()


def _or_none(index):
  return -1 if index is None else index


def _from_none(index):
  return None if index < 0 else index
