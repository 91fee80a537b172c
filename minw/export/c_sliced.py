"""Writes convolutions in C that compute 32 output channels at once.

A word holds one bit of 32 output channels, and a number of such words, the slices,
holds one integer for each of these channels. Slice k has bit k of all 32 integers.

Let x be the inputs of a window and w the weights of an output channel. Let X and W be
their greatest levels. Write x = X - u and w = W - v, where u and v are not negative.
Then

    sum(w * x) = X * sum(w) - W * sum(u) + sum(v * u).

The first term is a constant of the channel, which the thresholds absorb. The second one
is the same for all channels. The third one is a sum of weights, each of which is a bit
of v for 32 channels: those words are added whose input has the bit k of u set, and they
count 2^k. Words whose bit is 0 are not even read. If most inputs of one bit are -1,
then the signs of all inputs and weights are changed, which changes no sum.

    codes of 1 bit   u is 2 for -1 and 0 for 1.
    codes of 2 bits  u is 2, 1 and 0 for -1, 0 and 1.
    codes of 3 bits  u is 8, 6, 5, 4, 3, 2 and 0 for -4, -2, -1, 0, 1, 2 and 4.
    pixels           u is 255 minus the pixel.

Two neighboring windows are computed together. Let S be the words that are added for
both windows, A those for the first one alone and B those for the second one alone. The
sums are S + A and S + B. If half of the bits are set, and a quarter of them in both
windows, then three words are added in place of four.

    number       0  1  2  3  4  5  6  7
    first        0  1  1  0  0  0  1  1
    second       0  1  0  0  1  0  1  1
    S: 1, 6, 7      A: 2      B: 4

The numbers of S are listed first, and the listed words are then added for one block of
32 channels after the other, and for each bit of the weights. Lists of A and B follow.
Finding a bit that is set costs as much as adding a word. As many blocks share a list
as their sums fit into the free part of the arena, beside the list. A full list is added
and begun again.

The words are added by carry-save adders, five operations for a word, 16 words before a
carry leaves the registers. Lists are filled up with the number of a word that is 0. The
words of up to four blocks are neighbors, and a vector of Helium adds them at once.
Inputs outside the image are not added one by one. Their sums are constants, and there
is one for each way in which a window overlaps the border.

Sums of pixels are looked up four at a time, in tables of all sums of four pixels, for
two windows in the halves of a word. They become slices afterwards. A threshold takes
five operations for a slice of 32 channels. The maximum over a pool is below a threshold
where all its values are. The word of a threshold is the one that is stored.
"""

import numpy as np

from minw import packed
from minw.export import c_slices

_LIST = 512  # Inputs in a list at most. The number is a multiple of 16.
# Inputs in a list for which the arena grows if it needs to: a tenth of its words, but
# at least and at most these numbers.
_SHORT = 32, 128
_STACK_OF_SIX = 192  # Bytes of stack that the words of six thresholds take at most.
_LANES = 4  # Blocks in a group at most, which a vector of Helium holds.
_BLOCKS = 2  # Blocks of 32 channels for which the arena grows if it needs to.
_LEVELS = {1: (1,), 2: (0, 1), 3: (0, 1, 2, 3)}  # Bits k of v for weights of 1-3 bits.
_GREATEST = {1: 1, 2: 1, 3: 4}  # Greatest level of codes of 1-3 bits.

# C lines that store codes of 1-3 bits at p. The word l0 has the channels below the
# first threshold, and so on.
_KEEP = {1: ["p[0] = l0;"], 2: ["p[0] = ~(l0 ^ l1);", "p[1] = l0 & l1;"],
         3: ["const uint32_t l[6] = {l0, l1, l2, l3, l4, l5};", "keep3(p, l);"]}


def helpers(writer) -> dict[str, str]:
  """Returns the C functions that a writer's network may need, by name."""
  sliced = [value for value in writer.sliced.values() if value.input]
  three_bits = any(writer.memory.bits(value.input) == 3 for value in sliced)
  word = c_slices.WORD3 if three_bits else c_slices.WORD
  helium = c_slices.HELIUM if any(value.lanes > 1 for value in sliced) else ""
  gather = c_slices.HELPERS["gather"].replace("@HELIUM@\n", helium)
  return c_slices.HELPERS | {"WORD": word, "gather": gather}


def find(writer) -> dict[int, "Sliced"]:
  """Finds the thresholds that can be computed for 32 channels at once.

  Args:
    writer: The `_Writer` of the file.

  Returns:
    By the value that it makes, each such threshold.
  """
  found, memory, ops = {}, writer.memory, writer.program.ops
  for i, op in enumerate(ops, start=1):
    if not isinstance(op, packed.Threshold):
      continue
    pool, conv = None, op.input
    inner = ops[conv - 1]
    if isinstance(inner, packed.Pool) and inner.kind == "max":
      pool, conv = conv, inner.input
    if any(j and (j in memory.stored or memory.is_plane(j)) for j in (pool, conv)):
      continue
    if conv and _is_sliced(ops[conv - 1], conv, writer.kinds):
      found[i] = Sliced(writer, i, conv, pool)
  for value in found.values():
    memory.make_room(value.index, value.least)
  for value in found.values():
    value.place(*memory.room(value.index))
  return found


def _is_sliced(op, i, kinds) -> bool:
  """Whether a value is a convolution whose constants take not much room in slices.

  They may take twice the room of the weights of the computation channel by channel.
  """
  if not isinstance(op, packed.Conv) or op.groups > 1 or op.bits not in _LEVELS:
    return False
  out, h, w, channels = op.kernel.shape
  levels, blocks = len(_LEVELS[int(op.bits)]), -(-out // 32)
  if op.input == 0:
    sums = 510 * _GREATEST[int(op.bits)] * op.kernel[0].size
    return sums < 2**16 and 4 * blocks * levels <= out
  if kinds[op.input].kind != "CODE" or (channels > 32 and channels % 32):
    return False
  height, width, _ = kinds[op.input].shape
  if max(height + sum(op.pads[:2]), width + sum(op.pads[2:])) >= 2**15:
    return False  # Positions have 16 bits.
  border = Border(op, kinds[op.input], kinds[i])
  words = blocks * (
      levels * (h * w * channels + 1) + (border.states - 1) * border.slices)
  return border.states < 256 and op.kernel[0].size < 2**16 and (
      words <= 2 * out * int(op.bits) * h * w * -(-channels // 32))


class Border:
  """Which parts of the windows of a convolution are outside its input.

  A window is in the state `rows[y] + columns[x]`. Windows inside are in state 0.

  Attributes:
    rows: int (height of the result,).
    columns: int (width of the result,).
    states: Number of states.
    slices: Number of bits of a sum over the inputs outside.
  """

  def __init__(self, op: packed.Conv, source: packed.Value, result: packed.Value):
    """Finds the states.

    Args:
      op: The convolution.
      source: Its input.
      result: Its result.
    """
    self._down, self.rows = _outside(
        op, 0, op.pads[0], source.shape[0], result.shape[0])
    self._right, self.columns = _outside(
        op, 1, op.pads[2], source.shape[1], result.shape[1])
    self.rows = self.rows * len(self._right)
    self.states = len(self._down) * len(self._right)
    most = _GREATEST[source.bits] + abs(_level(op.pad, source.bits))
    terms = self.outside().sum((1, 2)).max() * op.kernel.shape[-1]
    greatest = 2 * _GREATEST[int(op.bits)] >> _LEVELS[int(op.bits)][0]
    self.slices = int(terms * most * greatest).bit_length()

  def outside(self) -> np.ndarray:
    """Returns the weights whose inputs are outside, bool (states, height, width)."""
    outside = self._down[:, None, :, None] | self._right[None, :, None, :]
    return outside.reshape(self.states, *outside.shape[2:])


def _outside(op, axis, before, size, count):
  """Returns which rows or columns of a window are outside the input.

  Args:
    op: The convolution.
    axis: 0 for rows and 1 for columns.
    before: Size of the border above or before the input.
    size: Size of the input.
    count: Number of windows.

  Returns:
    Masks, bool (states, rows or columns of a window), the first of which is False, and
    the state of each window, int (count,).
  """
  at = np.arange(count)[:, None] * op.strides[axis] - before
  at = at + np.arange(op.kernel.shape[1 + axis]) * op.dilation[axis]
  outside = (at < 0) | (at >= size)
  masks = [np.zeros(outside.shape[1], bool)]
  for mask in outside:
    if not any((mask == other).all() for other in masks):
      masks.append(mask)
  masks = np.stack(masks)
  return masks, (outside[:, None] == masks).all(2).argmax(1)


def _level(code: int, bits: int) -> int:
  return int(packed.levels(np.array([code], np.int8), bits)[0])


class Sliced:
  """A threshold, with the pool and the convolution below it.

  Attributes:
    index: The value that the threshold makes.
    conv: The value that the convolution makes.
    pool: The value that the pool makes, or None.
    inlined: The values that are computed within its functions.
    input: The value that the convolution reads.
    most: Greatest level of an input, or 255 for pixels.
    levels: The bits k of the weights v.
    terms: Number of inputs of a window.
    blocks: Number of blocks of 32 channels.
    together: Number of blocks that are computed together.
    lanes: Number of blocks in a group: see the C structure Conv.
    step: Number of windows that are computed together.
    slices, kept: Words of a sum, and those of the array that it is computed in.
    listed: Number of inputs that a list has room for.
    room: Words of the arena that a block takes while it is computed.
    least: Words of the arena that the computation takes at least.
    stack: Bytes of stack that its arrays and thresholds take.
  """

  def __init__(self, writer, i: int, conv: int, pool: int | None):
    """Plans the functions.

    Args:
      writer: The `_Writer` of the file.
      i: The value that the threshold makes.
      conv: The value that the convolution makes.
      pool: The value that the pool makes, or None.
    """
    self._writer, self.index, self.conv, self.pool = writer, i, conv, pool
    self._op: packed.Conv = writer.program.ops[conv - 1]
    self.inlined, self.input = {conv, pool}, self._op.input
    self.levels = _LEVELS[int(self._op.bits)]
    self._scale = _GREATEST[int(self._op.bits)]
    self.terms = self._op.kernel[0].size
    self.blocks = -(-len(self._op.kernel) // 32)
    self.most = _GREATEST[writer.kinds[self.input].bits] if self.input else 255
    # The integers of the slices are sums of w * x plus a constant, from 0 on.
    self._most_u = self._scale * self.most * (2 if self.input else 1) * self.terms
    # One more than the greatest integer fits, so that a threshold can be above all.
    self.slices = (2 * self._most_u + 1).bit_length()
    # `column` reads four slices from its first one on.
    first = self.most.bit_length() + self.levels[-1]
    self.kept = max(self.slices, first + 4) if self.input else 16
    wide = writer.kinds[conv].shape[1] if pool is None else self._pooling.window[1]
    # The sums of pixels always fill two windows.
    self.step = 2 if wide > 1 or not self.input else 1
    self._span = self.kept * self.step
    thresholds = writer.program.ops[i - 1].thresholds.shape[1]
    self.room = self._span + (0 if pool is None else thresholds)
    self._at, self.together, self.lanes, self.listed = 0, 1, 1, 0
    # A list takes half of the inputs, rounded up to a multiple of 16.
    listed = min(-(-self.terms // 32) * 16, _LIST) if self.input else 0
    short = writer.memory.words // 160 * 16
    self._list = 0, listed // 2
    self._short = min(listed, max(_SHORT[0], min(short, _SHORT[1]))) // 2
    self.least = self.room * min(self.blocks, _BLOCKS) + self._short
    self.stack = 0 if self.input else 4 * self.terms + 76
    if writer.kinds[i].bits == 3:
      self.stack += _STACK_OF_SIX

  def place(self, at: int, words: int):
    """Places the blocks that are computed together in the arena.

    Args:
      at: Offset of the words that they may take.
      words: Number of these words.
    """
    _, listed = self._list
    self.together = min((words - self._short) // self.room, self.blocks)
    self._at = at
    if self.input:
      # A list has numbers of 16 bits.
      most = min(_LANES, self.together, 2**16 // (self.terms + 1))
      self.lanes = max(n for n in range(1, most + 1) if self.blocks % n == 0)
      self.together -= self.together % self.lanes
    taken = self.together * self.room
    self._list = at + taken, min(listed, (words - taken) // 8 * 8)
    self.listed = 2 * self._list[1]

  @property
  def _pooling(self) -> packed.Pool:
    assert self.pool is not None
    return self._writer.program.ops[self.pool - 1]

  def text(self, negate: bool) -> str:
    """Returns the C constants and functions, the last of which computes the value.

    Args:
      negate: Whether to change the signs of the convolution's inputs, which must be
        codes of 1 bit, and of its weights.
    """
    op: packed.Conv = self._writer.program.ops[self.conv - 1]
    self._negate = negate
    if negate:
      op = op._replace(kernel=-op.kernel, pad=-op.pad)
    self._op = op
    most = np.full(op.kernel.shape[-1], self.most, np.int64)
    if not self.input:
      most -= self._writer.program.offset
    weights = packed.levels(op.kernel, int(op.bits)).astype(np.int64)
    self._v = self._scale - weights
    # The integers of the slices are the sums plus these numbers.
    self._added = self._most_u - (weights * most).sum((1, 2, 3))
    sums = self._sums_of_codes() if self.input else self._sums_of_pixels()
    return f"{sums}\n{self._threshold()}"

  def _planes(self) -> np.ndarray:
    """Returns the bits of the weights v, int64 (blocks, planes, terms, 32)."""
    v = self._v.reshape(len(self._v), -1)
    v = np.pad(v, [(0, -len(v) % 32), (0, 0)]).reshape(self.blocks, 32, -1)
    return np.stack([v.swapaxes(1, 2) >> k & 1 for k in self.levels], 1)

  def _sums_of_codes(self) -> str:
    """Returns the C constants of a convolution of codes."""
    op, writer, conv = self._op, self._writer, self.conv
    source, result = writer.kinds[op.input], writer.kinds[conv]
    channels = op.kernel.shape[-1]
    size, planes = min(channels, 32), writer.memory.bits(op.input)
    pixel = channels // size * planes
    # The highest bit of a word is its last channel.
    bits = self._planes()
    bits = bits.reshape(*bits.shape[:2], -1, size, 32)[..., ::-1, :]
    weights = _pack(bits).reshape(-1, self.lanes, len(self.levels), self.terms)
    weights = np.pad(weights.transpose(0, 2, 3, 1), [(0, 0), (0, 0), (0, 1), (0, 0)])
    block, part = weights[0, ..., 0].size, weights[0, 0].size
    weights = weights.reshape(-1)
    if self.lanes > 1:  # A vector reads four words.
      weights = np.pad(weights, (0, _LANES - self.lanes))
    text = writer.array("uint32_t", f"w{conv}", weights)
    edges, border = "0", "0"
    outside = self.most - _level(op.pad, source.bits)
    states = Border(op, source, result)
    missing = states.outside().sum((1, 2)) * channels * outside
    text += writer.array(
        "int32_t", f"most{conv}", self._most_u - self._scale * missing)
    if states.states > 1:
      edges, border = f"edges{conv}", f"border{conv}"
      text += writer.array("uint32_t", edges, self._edges(states, outside))
      text += writer.array("uint8_t", border, [*states.rows, *states.columns])
    flip = 2**size - 1 if self._negate else 0
    members = [
        f"arena + {writer.memory.offsets[op.input]}", f"w{conv}", edges, border,
        f"most{conv}", f"arena + {self._at}", f"memory.halves + {2 * self._list[0]}",
        f"memory.halves + {2 * sum(self._list)}",
        *source.shape[:2], channels // size, planes, size,
        pixel, size * self.lanes, (32 - size) * self.lanes,
        (op.dilation[1] - 1) * pixel,
        *op.kernel.shape[1:3], *op.dilation, *op.strides, op.pads[0], op.pads[2],
        block, self.lanes, part, len(self.levels), self.levels[0], self._scale,
        self.kept, self._span, self.slices, states.slices, states.states - 1,
        result.shape[0], op.strides[1] * pixel, f"0x{2**size - 1:x}u", f"0x{flip:x}u"]
    writer.flash += 4 * len(members)
    return text + (f"static const Conv conv{conv} = {{\n"
                   f"  {', '.join(map(str, members))}\n}};\n")

  def _edges(self, states: "Border", outside: int) -> np.ndarray:
    """Returns sums over the weights outside, uint32 (blocks, states - 1, slices).

    Args:
      states: The parts of windows that are outside.
      outside: The inputs u outside.
    """
    v = self._v.sum(3) >> self.levels[0]
    v = np.pad(v, [(0, -len(v) % 32), (0, 0), (0, 0)])
    sums = np.einsum("ohw,shw->so", v * outside, states.outside()[1:])
    sums = sums.reshape(len(sums), self.blocks, 1, 32).swapaxes(0, 1)
    return _pack(sums >> np.arange(states.slices)[:, None] & 1)

  def _sums_of_pixels(self) -> str:
    """Returns the C constants and functions of a convolution of the image."""
    writer, conv = self._writer, self.conv
    fours, levels = -(-self.terms // 4), self.levels
    # A nibble has four terms of a channel.
    bits = self._planes().swapaxes(2, 3)
    bits = np.pad(bits, [(0, 0)] * 3 + [(0, 4 * fours - self.terms)])
    bits = bits.reshape(self.blocks, len(levels), 4, 8, fours, 4)
    bits = _pack(bits.transpose(0, 1, 4, 2, 3, 5).reshape(-1, 32))
    text = writer.array("uint32_t", f"w{conv}", bits)
    past = "".join(f"  u[{k}] = 0;\n" for k in range(self.terms, 4 * fours))
    look_up = "".join(
        f"      look_up(n, w + 4 * (k + {fours * i}), u + 4 * k, {level});\n"
        for i, level in enumerate(levels))
    return f"""\
{text}
{self._gather()}
APART static void sums{conv}(uint32_t *n, int y, int x, int b, int blocks, int two) {{
  const uint32_t *w = w{conv} + b * {4 * fours * len(levels)};
  uint32_t u[{4 * fours}], sum = pixels{conv}(u, y, x, 0);
  int k;
  if (two) sum += pixels{conv}(u, y, x + 1, 16);
{past}  for (; blocks > 0; blocks--, n += 32, w += {4 * fours * len(levels)}) {{
    fill(n, 32, 0);
    for (k = 0; k < {fours}; k++) {{
{look_up}    }}
    transpose(n);
    increase(n, {self.slices},
             {self._most_u} - {self._scale} * (int32_t)(sum & 0xffff));
    increase(n + 16, {self.slices},
             {self._most_u} - {self._scale} * (int32_t)(sum >> 16));
  }}
}}
"""

  def _gather(self) -> str:
    """Returns the C function that reads u of a window, and returns its sum."""
    op, writer = self._op, self._writer
    _, h, w, channels = op.kernel.shape
    height, width, _ = writer.kinds[0].shape
    return f"""\
/* Adds the pixels of a window to u, shifted to the left. Returns their sum, shifted. */
static uint32_t pixels{self.conv}(uint32_t *u, int y, int x, int shift) {{
  uint32_t sum = 0;
  int i, j, k;
  for (i = 0; i < {h}; i++) {{
    for (j = 0; j < {w}; j++) {{
      const int r = y * {op.strides[0]} - {op.pads[0]} + i * {op.dilation[0]};
      const int s = x * {op.strides[1]} - {op.pads[2]} + j * {op.dilation[1]};
      const int inside = r >= 0 && r < {height} && s >= 0 && s < {width};
      for (k = 0; k < {channels}; k++, u++) {{
        int32_t v = 255 - offset[k];
        if (inside) v -= {writer.get(0, 'r', 's', 'k')};
        if (shift)
          *u |= (uint32_t)v << shift;
        else
          *u = (uint32_t)v;
        sum += (uint32_t)v << shift;
      }}
    }}
  }}
  return sum;
}}
"""

  def _threshold(self) -> str:
    """Returns the C constants and the function that compute the value."""
    writer, i, slices = self._writer, self.index, self.slices
    op: packed.Threshold = writer.program.ops[i - 1]
    channels = writer.kinds[i].shape[2]
    count = op.thresholds.shape[1]
    # A channel that falls has sum <= t, which is the opposite of sum >= t + 1.
    t = op.thresholds.astype(np.int64) + op.falling + self._added
    t = np.pad(t.clip(0, 2**slices - 1), [(0, 0), (0, 0), (0, -channels % 32)])
    # Channels past the last one have the code 1 in one bit, and 0 in more bits.
    t[:, (count + 1) // 2:, channels:] = 2**slices - 1
    t = t.reshape(*t.shape[:2], self.blocks, 32).transpose(2, 0, 1, 3)[..., None, :]
    arrays = writer.array(
        "uint32_t", f"t{i}", _pack(t >> np.arange(slices)[:, None] & 1))
    tables = self._tables(op)
    n = f"n + k * {self._span}" + (f" + e * {self.kept}" if self.step > 1 else "")
    less = []
    for j in range(count):
      terms = []
      for k, mask in tables.items():
        table = f"((b + k) * {len(op.thresholds)} + {k}) * {count} + {j}"
        terms.append(
            f"(below({n}, t{i} + ({table}) * {slices}, {slices}){mask})")
      less.append(" | ".join(terms))
    falling = ""
    if op.falling.any():
      arrays += writer.array("uint32_t", f"falling{i}", _pack(np.pad(
          op.falling, (0, -channels % 32)).reshape(-1, 32)))
      falling = f" ^ falling{i}[b + k]"
    compute = self._compute_pool if self.pool else self._compute
    body = "".join(f"        {line}\n" for line in compute(less, falling))
    h, w, _ = writer.kinds[i].shape
    together, blocks = self.together, str(self.together)
    if self.blocks % together:
      blocks = f"{self.blocks} - b < {together} ? {self.blocks} - b : {together}"
    step = f"x += {self.step}" if self.step > 1 and not self.pool else "x++"
    return f"""\
{arrays}
static uint32_t *const v{i} = arena + {writer.memory.offsets[i]};

APART static void make{i}(void) {{
  uint32_t *const n = arena + {self._at};
  int y, x, b;
  for (y = 0; y < {h}; y++) {{
    for (x = 0; x < {w}; {step}) {{
      for (b = 0; b < {self.blocks}; b += {self.together}) {{
        const int blocks = {blocks};
{body}      }}
    }}
  }}
}}"""

  def _tables(self, op: packed.Threshold) -> dict[int, str]:
    """Returns the C text that masks the channels of each table of thresholds.

    There is one table for each code of the shortcut, or a single table without one.
    """
    if op.shortcut is None:
      return {0: ""}
    middle = len(op.thresholds) // 2
    bits = self._writer.memory.bits(op.shortcut)
    if bits == 1:
      return {middle - 1: " & q[0]", middle + 1: " & ~q[0]"}
    tables = {}
    for code in range(-packed.max_code(bits), packed.max_code(bits) + 1):
      planes = [f"{'' if abs(code) >> k & 1 else '~'}q[{k}]" for k in range(bits - 1)]
      if code:
        planes.append(f"{'' if code < 0 else '~'}q[{bits - 1}]")
      tables[middle + code] = "".join(f" & {plane}" for plane in planes)
    return tables

  def _compute(self, less: list[str], falling: str) -> list[str]:
    """Returns the C lines that compute some blocks of one pixel or two.

    Args:
      less: The C expressions of the channels of a block below each threshold.
      falling: The C text that inverts the channels that fall.
    """
    x = "(x + e)" if self.step > 1 else "x"
    keep = [f"const uint32_t l{j} = ({term}){falling};" for j, term in enumerate(less)]
    width = self._writer.kinds[self.index].shape[1]
    return ["int k;", *self._sums("y", "x", str(width)),
            *self._for_each([*self._shortcut(x), *keep, *self._keep(x)])]

  def _compute_pool(self, less: list[str], falling: str) -> list[str]:
    """Returns the C lines that compute some blocks of a pixel with a pool.

    The maximum is below a threshold where all values in the window are.

    Args:
      less: The C expressions of the channels of a block below each threshold.
      falling: The C text that inverts the channels that fall.
    """
    pool, lines = self._pooling, []
    height, width, _ = self._writer.kinds[self.conv].shape
    for k, v, axis, size in (("r", "y", 0, height), ("s", "x", 1, width)):
      first, last = f"{v} * {pool.strides[axis]}", pool.window[axis]
      if any(pool.pads[2 * axis:2 * axis + 2]):
        first = f"({first} - {pool.pads[2 * axis]})"
        lines.append(f"const int {k}0 = {first} < 0 ? 0 : {first};")
        lines.append(f"const int {k}1 = {first} + {last} > {size} ? {size} :"
                     f" {first} + {last};")
      else:
        lines.append(f"const int {k}0 = {first}, {k}1 = {k}0 + {last};")
    below = [f"less[k * {len(less)} + {j}]" for j in range(len(less))]
    each = [f"{word} &= {term};" for word, term in zip(below, less)]
    inner = [*self._sums("r", "s", "s1"),
             *self._for_each([*self._shortcut("x"), *each])]
    keep = [f"const uint32_t l{j} = {word}{falling};" for j, word in enumerate(below)]
    return [*lines, f"uint32_t *const less = n + {self.together * self._span};",
            "int r, s, k;",
            f"fill(less, {self.together * len(less)}, 0xffffffffu);",
            "for (r = r0; r < r1; r++) {",
            f"  for (s = s0; s < s1; s += {self.step}) {{",
            *(f"    {line}" for line in inner), "  }", "}",
            "for (k = 0; k < blocks; k++) {",
            *(f"  {line}" for line in [*keep, *self._keep("x")]), "}"]

  def _shortcut(self, x: str) -> list[str]:
    """Returns the C line that finds the codes q of a block's shortcut, if any."""
    shortcut = self._writer.program.ops[self.index - 1].shortcut
    if shortcut is None:
      return []
    return [f"const uint32_t *const q = {self._writer.at(shortcut, 'y', x)}"
            f" + (b + k) * {self._writer.memory.bits(shortcut)};"]

  def _keep(self, x: str) -> list[str]:
    """Returns the C lines that store the codes of a block."""
    bits = self._writer.kinds[self.index].bits
    return [f"uint32_t *const p = {self._writer.at(self.index, 'y', x)}"
            f" + (b + k) * {bits};", *_KEEP[bits]]

  def _sums(self, y: str, x: str, end: str) -> list[str]:
    """Returns C lines that compute the slices at a row and a column, or two columns."""
    call = f"sums(&conv{self.conv}" if self.input else f"sums{self.conv}(n"
    if self.step == 1:
      return [f"{call}, {y}, {x}, b, blocks, 0);"]
    return [f"const int two = {x} + 1 < {end};", "int e;",
            f"{call}, {y}, {x}, b, blocks, two);"]

  def _for_each(self, lines: list[str]) -> list[str]:
    """Returns C lines that are run for each block k of each pixel e of `_sums`."""
    head = "for (k = 0; k < blocks; k++) {"
    lines = [head, *(f"  {line}" for line in lines), "}"]
    if self.step == 1:
      return lines
    return ["for (e = 0; e <= two; e++) {", *(f"  {line}" for line in lines), "}"]


def _pack(bits: np.ndarray) -> np.ndarray:
  """Packs bits, (..., 32), into uint32 (...): channel c is bit c."""
  octets = np.packbits(bits.astype(bool), -1, "little")
  return np.ascontiguousarray(octets).view("<u4")[..., 0]
