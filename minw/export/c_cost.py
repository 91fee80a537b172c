"""Estimates the instructions that exported C takes on a Cortex-M3, layer by layer.

The estimate counts what the C functions do for some images: how many words they search
for inputs to add, how many inputs they list and add, how many thresholds they compare,
and so on. Each of these steps takes a number of instructions that is nearly the same
everywhere. `_INSTRUCTIONS` holds these numbers. They were measured with QEMU on code of
gcc 12.2 with -O2. For channels in blocks of 32, QEMU logged every instruction, and the
instructions of each C function were fitted by the numbers of its steps, for digits,
`folder_convnet` and ConvNet D. For values that are computed element by element, the
instructions of 20 networks without such blocks were fitted.

The steps of `c_sliced` depend on the image, because it adds only inputs that are not
the commonest value. Therefore the estimate is of the given images.
"""

import collections
import math
from typing import Mapping, NamedTuple, Sequence

import numpy as np

from minw import packed
from minw.export import c_sliced
from minw.export import c_text

# Instructions for a multiply-accumulate of CMSIS-NN's int8 convolutions on Cortex-M4,
# M7 and M33, measured with QEMU for the layers of ConvNet D. Smaller layers take more.
CMSIS_NN = 1.73

_INSTRUCTIONS = {
    # The lists of inputs, in the C functions `gather` and `add`.
    "part": 90,  # A list of one bit of the inputs, in `sums` and `gather`.
    "row of a list": 45,
    "pixel of a list": 23,
    "word of a list": 21,  # It has one bit of 32 inputs, any of which may be set.
    "word of 3 bits": 40,  # It comes on top, because its bits are computed.
    "listed input": 5.7,
    "watched input": 5,  # It comes on top if the list might be full.
    "filler": 14,
    "addition": 57,  # A call of `add`.
    "block of an addition": 17,
    "sixteen": 130,  # The words of 16 inputs are added to a block of 32 channels.
    # What surrounds the lists, in `sums`, `inside` and `finish`.
    "pair": 72,  # One or two windows are computed together.
    "filled word": 4,
    "copied word": 5,
    "finished block": 38,
    "increased slice": 12,
    "edge slice": 34,
    # Sums of pixels, in `pixels`, `look_up` and `transpose`.
    "pixel": 21,
    "look-up": 245,
    "transposition": 593,
    # Thresholds of 32 channels, in `below` and `make`.
    "comparison": 15,
    "compared slice": 8,
    "block of a result": 8,
    # Values that are computed element by element.
    "element of a convolution": 19,
    "row of a window": 12,
    "product of pixel": 11,
    "product of sum": 8,
    "product of code of 1 bits": 26,
    "product of code of 2 bits": 28,
    "product of code of 3 bits": 41,
    "word of 1 and 1 bits": 19,  # It has 32 products of codes.
    "word of 2 and 1 bits": 35,
    "word of 2 and 2 bits": 39,
    "word of 3 and 1 bits": 110,
    "word of 3 and 2 bits": 119,
    "word of 3 and 3 bits": 195,
    "element of a pool": 8,
    "read pixel": 3,
    "read sum": 1,
    "read code of 1 bits": 12,
    "read code of 2 bits": 19,
    "read code of 3 bits": 24,
    "element of a threshold": 4,
    "threshold": 4,
    "term": 8,  # A sum, a concatenation or a shortcut reads a value.
    "store sum": 5,
    "store code of 1 bits": 6,
    "store code of 2 bits": 18,
    "store code of 3 bits": 41,
    "logit": 140,
}


class Steps(NamedTuple):
  """The steps of a convolution or dense layer, with what follows up to the next one.

  Attributes:
    name: Path of the layer.
    products: Multiply-accumulates for an image.
    steps: Number of steps of each kind for an image.
  """

  name: str
  products: int
  steps: Mapping[str, float]


class Layer(NamedTuple):
  """The cost of a convolution or dense layer, and of what follows up to the next one.

  Attributes:
    name: Path of the layer.
    products: Multiply-accumulates for an image.
    instructions: Estimate of the instructions for an image.
  """

  name: str
  products: int
  instructions: float


def estimate(layers: Sequence[Steps]) -> list[Layer]:
  """Estimates the instructions of each layer from its steps."""
  return [
      Layer(layer.name, layer.products,
            sum(_INSTRUCTIONS[step] * n for step, n in layer.steps.items()))
      for layer in layers]


def report(layers: Sequence[Layer]) -> str:
  """Formats the layers and their sum, beside the cost of CMSIS-NN.

  Args:
    layers: One or more layers.
  """
  total = Layer("total", sum(layer.products for layer in layers),
                sum(layer.instructions for layer in layers))
  width = max(len(layer.name) for layer in [*layers, total])
  lines = ["estimated instructions for an image on a Cortex-M3, with gcc -O2:",
           f"{'layer':{width}}  multiply-accumulates  instructions     each"
           "  CMSIS-NN int8"]
  for name, products, instructions in [*layers, total]:
    lines.append(
        f"{name:{width}}  {products:20,}  {instructions:12,.0f}  "
        f"{instructions / products:7.2f}  {CMSIS_NN * products:13,.0f}")
  lines.append(f"CMSIS-NN int8: {CMSIS_NN} for a multiply-accumulate, as measured on"
               " Cortex-M4, M7 and M33")
  return "\n".join(lines)


def count(writer, values: Sequence[np.ndarray]) -> list[Steps]:
  """Counts the steps of each layer.

  Args:
    writer: The `_Writer` of the C file.
    values: Every value of the network for some images, from `reference.run`.

  Returns:
    The layers in their order. Numbers of steps are the mean over the images.
  """
  ops, kinds, sliced = writer.program.ops, writer.kinds, writer.sliced
  layers = {i: collections.Counter() for i, op in enumerate(ops, start=1)
            if isinstance(op, packed.Conv)}
  inlined = {i for value in sliced.values() for i in value.inlined}
  layer = min(layers, default=0)  # What comes before the first one belongs to it.
  for i in range(1, len(kinds)) if layers else ():
    layer = i if i in layers else layer
    if i in sliced:
      layers[sliced[i].conv].update(_sliced(writer, sliced[i], values))
    elif i not in inlined:
      layers[layer].update(_elements(writer, i))
  return [
      Steps(c_text.comment(ops[i - 1].name),
            ops[i - 1].kernel.size * math.prod(kinds[i].shape[:2]), steps)
      for i, steps in layers.items()]


class _Windows(NamedTuple):
  """The windows of a convolution or a pool.

  Attributes:
    down: int (windows, height of the input): how often a row of the input is in each
      row of windows.
    right: int (windows, width of the input): the same for columns.
  """

  down: np.ndarray
  right: np.ndarray

  def sums(self, numbers: np.ndarray) -> np.ndarray:
    """Returns sums over windows, (..., rows, columns), of (..., height, width)."""
    return self.down @ numbers @ self.right.T

  @property
  def rows(self) -> int:
    """Number of rows inside the input of all windows in a column."""
    return int(self.down.sum())

  @property
  def columns(self) -> int:
    """Number of columns inside the input of all windows in a row."""
    return int(self.right.sum())


def _windows(op, source, rows, columns) -> _Windows:
  """Finds the windows of a convolution or a pool.

  Args:
    op: The operation.
    source: Its input, a `packed.Value`.
    rows: Rows of the result, int (rows,).
    columns: Columns of the result, int (columns,).
  """
  size = op.kernel.shape[1:3] if isinstance(op, packed.Conv) else op.window
  dilation = op.dilation if isinstance(op, packed.Conv) else (1, 1)
  reads = []
  for axis, at in ((0, rows), (1, columns)):
    at = np.asarray(at)[:, None] * op.strides[axis] - op.pads[2 * axis]
    at = at + np.arange(size[axis]) * dilation[axis]
    reads.append((at[..., None] == np.arange(source.shape[axis])).sum(1))
  return _Windows(*reads)


def _pairs(writer, value) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Finds the windows of a convolution that are computed together.

  Args:
    writer: The `_Writer` of the C file.
    value: The `c_sliced.Sliced` that contains the convolution.

  Returns:
    The rows, the columns of the first windows, and whether there is a second window
    beside each of these.
  """
  height, width, _ = writer.kinds[value.conv].shape
  if value.pool is None:
    columns = np.arange(0, width, value.step)
    return np.arange(height), columns, (columns + 1 < width) & (value.step > 1)
  op = writer.program.ops[value.pool - 1]
  rows, columns, two = [], [], []
  for axis, size in enumerate((height, width)):
    for at in range(writer.kinds[value.pool].shape[axis]):
      first = at * op.strides[axis] - op.pads[2 * axis]
      first, last = max(first, 0), min(first + op.window[axis], size)
      if axis:
        columns += range(first, last, value.step)
        two += [s + 1 < last and value.step > 1
                for s in range(first, last, value.step)]
      else:
        rows += range(first, last)
  return np.array(rows), np.array(columns), np.array(two)


def _sliced(writer, value, values) -> Mapping[str, float]:
  """Counts the steps of a threshold of `c_sliced`, with its pool and convolution."""
  rows, columns, two = _pairs(writer, value)
  windows = len(rows) * int(len(two) + two.sum())
  op = writer.program.ops[value.index - 1]
  tables = len(op.thresholds) - (writer.kinds[op.shortcut].bits == 1 if op.shortcut
                                 else 0)
  compared = windows * value.blocks * op.thresholds.shape[1] * tables
  groups = -(-value.blocks // value.together)
  pixels = math.prod(writer.kinds[value.index].shape[:2])
  steps = (_sums_of_codes if value.input else _sums_of_pixels)(
      writer, value, values, rows, columns, two)
  return {
      **steps, "pair": len(rows) * len(columns) * groups,
      "comparison": compared, "compared slice": compared * value.slices,
      "block of a result": pixels * value.blocks}


def _sums_of_pixels(writer, value, values, rows, columns, two) -> Mapping[str, float]:
  """Counts the steps of the sums of a convolution of the image."""
  del values  # The steps are the same for all images.
  pairs, windows = len(rows) * len(columns), len(rows) * int(len(two) + two.sum())
  blocks, groups = pairs * value.blocks, -(-value.blocks // value.together)
  return {
      "pixel": windows * value.terms * groups,
      "look-up": blocks * -(-value.terms // 4) * len(value.levels),
      "transposition": blocks, "filled word": 32 * blocks,
      "increased slice": 2 * value.slices * blocks}


def _sums_of_codes(writer, value, values, rows, columns, two) -> Mapping[str, float]:
  """Counts the steps of the sums of a convolution of codes."""
  op = writer.program.ops[value.conv - 1]
  source = writer.kinds[value.input]
  first = _windows(op, source, rows, columns)
  second = _windows(op, source, rows, columns + 1)
  second = second._replace(right=second.right * two[:, None])
  # A column of the input is in both windows at the same place if the column that is a
  # stride further on is in the second window.
  step = op.strides[1]
  both = first._replace(right=first.right * np.pad(
      second.right, [(0, 0), (0, step)])[:, step:])
  inputs = _inputs(writer, value, values[value.input])
  numbers = inputs.sum(-1)
  shared = np.zeros_like(numbers)
  shared[..., :-step] = (inputs[..., :-step, :] & inputs[..., step:, :]).sum(-1)
  shared = both.sums(shared)
  lists = [(both, shared[..., two]), (first, first.sums(numbers) - shared),
           (second, (second.sums(numbers) - shared)[..., two])]
  groups, steps = -(-value.blocks // value.together), collections.Counter()
  parts, count, words = len(inputs), inputs.shape[1], -(-source.shape[2] // 32)
  for windows, listed in lists:
    sixteens = -(-listed // 16)
    scanned = parts * windows.rows * windows.columns * words
    # A list is added when it is full, and at the end.
    full, rest = np.divmod(listed, value.listed)
    added = listed[0, 0].size * parts + full.sum() / count
    # The end of a list is watched while 32 inputs might not fit.
    watched = full * min(value.listed, 32) + np.minimum(
        rest, (rest + 32 - value.listed).clip(0))
    steps.update({
        "row of a list": groups * parts * windows.rows * (windows.right.any(1)).sum(),
        "pixel of a list": groups * scanned // words,
        "word of a list": groups * scanned,
        "word of 3 bits": groups * scanned * (parts == 4),
        "listed input": groups * listed.sum() / count,
        "watched input": groups * watched.sum() / count,
        "filler": groups * (16 * sixteens - listed).sum() / count,
        "addition": groups * added,
        "block of an addition": added * value.blocks * len(value.levels),
        "sixteen": sixteens.sum() / count * value.blocks * len(value.levels)})
  border = c_sliced.Border(op, source, writer.kinds[value.conv])
  windows = np.concatenate([columns, columns[two] + 1])
  edges = int((border.rows[rows][:, None] + border.columns[windows] > 0).sum())
  pairs, twos = len(rows) * len(columns), len(rows) * int(two.sum())
  steps.update({
      "part": groups * parts * (pairs + 2 * twos),
      "filled word": value.kept * value.blocks * pairs,
      "copied word": value.kept * value.blocks * twos,
      "increased slice": value.slices * value.blocks * (pairs + twos),
      "finished block": value.blocks * (pairs + twos),
      "edge slice": value.blocks * edges * border.slices})
  return steps


def _inputs(writer, value, codes) -> np.ndarray:
  """Returns the inputs that are added, bool (bits, images, height, width, channels)."""
  bits = writer.memory.bits(value.input)
  u = value.most - packed.levels(codes, writer.kinds[value.input].bits).astype(int)
  if bits == 1:
    return ((u > 0) ^ writer.negates(value.input))[None]
  return np.stack([u >> k & 1 for k in range(2 if bits == 2 else 4)]).astype(bool)


def _elements(writer, i) -> Mapping[str, float]:
  """Counts the steps of a value that is computed element by element."""
  op, kind = writer.program.ops[i - 1], writer.kinds[i]
  elements = math.prod(kind.shape)
  steps = collections.Counter()
  if isinstance(op, packed.Conv):
    steps.update(_conv(writer, op, kind))
  elif isinstance(op, packed.Logits):
    return {"logit": elements}
  elif isinstance(op, packed.Pool):
    windows = _windows(op, writer.kinds[op.input], *map(np.arange, kind.shape[:2]))
    steps.update({
        "element of a pool": elements,
        f"read {_source(writer, op.input)}":
            windows.rows * windows.columns * kind.shape[2]})
  elif isinstance(op, packed.Threshold):
    steps.update({"element of a threshold": elements,
                  "threshold": elements * op.thresholds.shape[1]})
  else:
    steps["term"] = elements * len(packed.inputs(op))
  if i in writer.memory.stored:
    steps[f"store {_source(writer, i)}"] = elements
  elif writer.memory.is_plane(i):
    steps["store sum"] = elements
  return steps


def _source(writer, i) -> str:
  """Names how an element of a value is read or stored."""
  if i == 0:
    return "pixel"
  if i in writer.memory.stored and writer.kinds[i].kind == "CODE":
    return f"code of {writer.memory.bits(i)} bits"
  return "sum"


def _conv(writer, op, kind) -> Mapping[str, float]:
  """Counts the steps of a convolution that computes one channel after the other."""
  source, out = writer.kinds[op.input], kind.shape[2]
  windows = _windows(op, source, *map(np.arange, kind.shape[:2]))
  elements, channels = math.prod(kind.shape), op.kernel.shape[3]
  high, wide = windows.rows, windows.columns
  if op.pad and any(op.pads):  # The loops include the pixels outside.
    high, wide = (n * size for n, size in zip(kind.shape, op.kernel.shape[1:3]))
  steps = {"element of a convolution": elements,
           "row of a window": high * kind.shape[1] * out}
  pixels = high * wide * out
  if source.kind == "CODE" and (op.groups == 1 or channels % 32 == 0):
    bits = sorted((writer.memory.bits(op.input), int(op.bits)))
    return steps | {
        f"word of {bits[1]} and {bits[0]} bits": pixels * -(-channels // 32)}
  return steps | {f"product of {_source(writer, op.input)}": pixels * channels}
