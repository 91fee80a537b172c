"""Writes convolutions in C that compute 32 output channels at once.

A word holds one bit of 32 output channels, and a number of such words, the slices,
holds one integer for each of these channels. Slice k has bit k of all 32 integers.

Let x be the inputs of a window and w the weights of an output channel, and write
x = most - u and w = 1 - v, where u and v are not negative. Then

    sum(w * x) = sum(w * most) - sum(u) + sum(v * u).

The first term is a constant of the channel, which the thresholds absorb. The second one
is the same for all channels. The third one is a sum of weights, each of which is a bit
of v for 32 channels: those words are added whose input has the bit k of u set, and they
count 2^k. About half of the bits of u are 0, and their words are not even read. If most
inputs are -1, then the signs of all inputs and weights are changed, which changes no
sum.

    codes of 1 bit   u is 2 for -1 and 0 for 1, and 1 for a border of zeros.
    codes of 2 bits  u is 2, 1 and 0 for -1, 0 and 1.
    pixels           u is 255 minus the pixel.

The words are added by carry-save adders, five operations for a word, 16 words before a
carry leaves the registers. Sums of pixels are looked up four at a time, in tables of
all sums of four pixels, and become slices afterwards. A maximum over a pool takes seven
operations for a slice of 32 channels, and a threshold four. The result of a threshold
is the word that is stored.
"""

import numpy as np

from minw import packed

CONSTANTS = 132  # Bytes of constants of the C function `more`.

_LEVELS = {1: (1,), 2: (0, 1)}  # Bits k of v for weights of 1 and 2 bits.
_MOST_PIXELS = 128  # The sums of more bytes, twice each, do not fit in 16 bits.

# C functions by name. Each one follows those it calls.
HELPERS = {
    "first": """\
/* The number of zeros above the first one of a word that is not 0. */
static int first(uint32_t v) {
#ifdef __GNUC__
  return __builtin_clz(v);
#else
  int n = 0;
  if (!(v >> 16)) n += 16, v <<= 16;
  if (!(v >> 24)) n += 8, v <<= 8;
  if (!(v >> 28)) n += 4, v <<= 4;
  if (!(v >> 30)) n += 2, v <<= 2;
  return n + !(v >> 31);
#endif
}""",
    "more": """\
/* The input of a convolution, with bit-planes for each word of channels, and the window
   that reads it. A word has the weights of `size` channels. */
typedef struct {
  int height, width, words, planes, size, rows, columns, down, right;
} Shape;

/* The words of one plane of a window that are inside the input, inverted if flip is
   set, or else the words of ones that are outside. The window has its columns from
   begin to end inside the input. */
typedef struct {
  const Shape *of;
  const uint32_t *map, *weights, *x, *next, *w;
  int top, side, begin, end, i, j, left, plane, inside;
  uint32_t flip;
} Window;

static const uint32_t none[32] = {0};
static const uint32_t all = 0xffffffffu;

/* Puts a window at a row and a column of the input. */
static void place(Window *s, const Shape *of, int top, int side) {
  s->of = of;
  s->top = top;
  s->side = side;
  s->begin = 0;
  while (s->begin < of->columns && side + s->begin * of->right < 0) s->begin++;
  s->end = of->columns;
  while (s->end > s->begin && side + (s->end - 1) * of->right >= of->width) s->end--;
}

/* Moves to the next words that are contiguous, and returns whether there are any. */
APART static int move(Window *s) {
  const Shape *const of = s->of;
  for (;;) {
    int first, y, inside;
    if (s->j == of->columns) {
      s->j = 0;
      s->i++;
    }
    if (s->i >= of->rows) return 0;
    first = s->j;
    y = s->top + s->i * of->down;
    inside = y >= 0 && y < of->height && first >= s->begin && first < s->end;
    s->j = of->columns;
    if (inside)
      s->j = of->right == 1 ? s->end : first + 1;
    else if (y >= 0 && y < of->height && first < s->begin)
      s->j = s->begin;
    if (inside == s->inside) {
      s->left = (s->j - first) * of->words;
      s->next = s->weights + (s->i * of->columns + first) * of->words * of->size;
      s->x = &all;
      if (inside)
        s->x = s->map + s->plane +
               (y * of->width + s->side + first * of->right) * of->words * of->planes;
      return 1;
    }
  }
}

/* Moves to the next word, and returns its bits. The first channel, whose weights are
   w[0], is the highest bit. After the last word there are weights of 0. */
APART static uint32_t more(Window *s) {
  uint32_t bits;
  if (s->left == 0 && !move(s)) {
    s->w = none;
    return all;
  }
  s->left--;
  s->w = s->next;
  s->next += s->of->size;
  bits = (*s->x ^ s->flip) << (32 - s->of->size);
  if (s->inside) s->x += s->of->planes;
  return bits;
}""",
    "count": """\
/* Reads the weights of the next channel whose bit is set. */
#define NEXT(v) \\
  do { \\
    int k; \\
    while (!bits) { \\
      bits = more(s); \\
      w = s->w; \\
    } \\
    k = first(bits); \\
    bits &= ~(0x80000000u >> k); \\
    v = w[k]; \\
  } while (0)
/* Adds the bits of b and c to those of a. The carries are stored in high. */
#define CARRY(high, a, b, c) \\
  do { \\
    const uint32_t differ = b ^ c; \\
    high = (b & c) | (differ & a); \\
    a ^= differ; \\
  } while (0)
#define NEXT2(high) \\
  do { \\
    uint32_t b, c; \\
    NEXT(b); \\
    NEXT(c); \\
    CARRY(high, ones1, b, c); \\
  } while (0)
#define NEXT4(high) \\
  do { \\
    uint32_t b2, c2; \\
    NEXT2(b2); \\
    NEXT2(c2); \\
    CARRY(high, ones2, b2, c2); \\
  } while (0)
#define NEXT8(high) \\
  do { \\
    uint32_t b4, c4; \\
    NEXT4(b4); \\
    NEXT4(c4); \\
    CARRY(high, ones4, b4, c4); \\
  } while (0)

/* Adds the weights of all channels whose bit is set in a window to the slices n.
   Returns how many channels these are. */
APART static int32_t count(uint32_t *n, Window *s, const uint32_t *w) {
  uint32_t ones1 = n[0], ones2 = n[1], ones4 = n[2], ones8 = n[3], bits = 0;
  int32_t total = 0;
  s->weights = w;
  s->i = s->j = s->left = 0;
  do {
    uint32_t b8, c8, carry, *p = n + 4;
    NEXT8(b8);
    NEXT8(c8);
    CARRY(carry, ones8, b8, c8);
    for (; carry; p++) {
      const uint32_t old = *p;
      *p = old ^ carry;
      carry &= old;
    }
    total += 16;
  } while (w != none);
  n[0] = ones1;
  n[1] = ones2;
  n[2] = ones4;
  n[3] = ones8;
  return total - 32 + ones(bits);
}""",
    "clear": """\
/* The pointer is volatile, so that no compiler calls memset, which is in a library. */
static void clear(volatile uint32_t *n, int slices) {
  for (; slices > 0; slices--) *n++ = 0;
}""",
    "look_up": """\
#define LOOK_UP(shift) \\
  *sums++ += table[v >> shift & 15] + ((uint32_t)table[v >> (shift + 4) & 15] << 16)
/* Adds sums over four bytes u, times 2^k, to 32 integers of 16 bits. A word of sums
   has those of two channels, 16 channels apart. A nibble of the weights says which of
   the bytes a channel adds. */
static void look_up(uint32_t *sums, const uint32_t *w, const uint8_t *u, int k) {
  uint16_t table[16];
  int i, j;
  table[0] = 0;
  for (i = 1; i < 16; i *= 2) {
    const int term = *u++ << k;
    for (j = 0; j < i; j++) table[i + j] = (uint16_t)(table[j] + term);
  }
  for (i = 0; i < 4; i++) {
    const uint32_t v = w[i];
    LOOK_UP(0);
    LOOK_UP(8);
    LOOK_UP(16);
    LOOK_UP(24);
  }
}""",
    "transpose": """\
/* Turns the integers that look_up makes into slices. Bit 2^k of the number of a word is
   swapped with bit 2^k of the number of a bit within 16 bits, for each k. */
static void transpose(uint32_t *n) {
  uint32_t mask = 0x00ff00ffu;
  int j, k;
  for (j = 8; j; j /= 2, mask ^= mask << j) {
    for (k = 0; k < 16; k = (k + j + 1) & ~j) {
      const uint32_t differ = ((n[k] >> j) ^ n[k + j]) & mask;
      n[k + j] ^= differ;
      n[k] ^= differ << j;
    }
  }
}""",
    "increase": """\
/* Adds the same number to all integers of some slices. */
static void increase(uint32_t *n, int slices, int32_t number) {
  uint32_t carry = 0;
  for (; slices > 0; slices--, n++, number >>= 1) {
    const uint32_t bit = 0u - ((uint32_t)number & 1), differ = *n ^ bit;
    const uint32_t next = (*n & bit) | (differ & carry);
    *n = differ ^ carry;
    carry = next;
  }
}""",
    "below": """\
/* Returns the channels whose integer is less in a than in b. */
static uint32_t below(const uint32_t *a, const uint32_t *b, int slices) {
  uint32_t less = 0;
  for (; slices > 0; slices--, a++, b++) less ^= (*a ^ *b) & (less ^ *b);
  return less;
}""",
    "maximum": """\
/* Replaces the integers a by those of b where these are greater. */
static void maximum(uint32_t *a, const uint32_t *b, int slices) {
  const uint32_t less = below(a, b, slices);
  for (; slices > 0; slices--, a++, b++) *a ^= (*a ^ *b) & less;
}""",
}


def find(writer) -> dict[int, "Sliced"]:
  """Finds the thresholds that can be computed for 32 channels at once.

  Args:
    writer: The `_Writer` of the file.

  Returns:
    By the value that it makes, each such threshold.
  """
  found, memory, ops = {}, writer.memory, writer.program.ops
  for i, op in enumerate(ops, start=1):
    if not isinstance(op, packed.Threshold) or op.bits > 2 or (
        op.shortcut is not None and memory.bits(op.shortcut) > 2):
      continue
    pool, conv = None, op.input
    inner = ops[conv - 1]
    if isinstance(inner, packed.Pool) and inner.kind == "max":
      pool, conv = conv, inner.input
    if any(j and (j in memory.stored or memory.is_plane(j)) for j in (pool, conv)):
      continue
    if conv and _is_sliced(ops[conv - 1], writer.kinds, memory):
      found[i] = Sliced(writer, i, conv, pool)
  return found


def _is_sliced(op, kinds, memory) -> bool:
  """Whether a value is a convolution whose weights do not take more room in slices."""
  if not isinstance(op, packed.Conv) or op.groups > 1 or op.bits not in _LEVELS:
    return False
  blocks, channels = -(-op.kernel.shape[0] // 32), op.kernel.shape[-1]
  if op.input == 0:
    return (op.kernel[0].size <= _MOST_PIXELS
            and 4 * blocks * len(_LEVELS[int(op.bits)]) <= op.kernel.shape[0])
  return (kinds[op.input].kind == "CODE" and memory.bits(op.input) <= 2
          and (channels < 32 or channels % 32 == 0)
          and blocks * min(channels, 32) <= op.kernel.shape[0])


class Sliced:
  """A threshold, with the pool and the convolution below it.

  Attributes:
    inlined: The values that are computed within its functions.
    input: The value that the convolution reads.
    stack: Bytes of stack that its arrays take.
  """

  def __init__(self, writer, i: int, conv: int, pool: int | None):
    """Plans the functions.

    Args:
      writer: The `_Writer` of the file.
      i: The value that the threshold makes.
      conv: The value that the convolution makes.
      pool: The value that the pool makes, or None.
    """
    self._writer, self._i, self._conv, self._pool = writer, i, conv, pool
    self._op: packed.Conv = writer.program.ops[conv - 1]
    self.inlined, self.input = {conv, pool}, self._op.input
    out, h, w, channels = self._op.kernel.shape
    self._words = -(-h * w * channels // 4)  # Words of four pixels' bytes in a window.
    self._levels = _LEVELS[int(self._op.bits)]
    self._blocks, terms = -(-out // 32), h * w * channels
    self._most_u = (2 if self.input else 255) * terms
    # One more than the greatest integer fits, so that a threshold can be above all.
    self._slices = (2 * self._most_u + 1).bit_length()
    # The last pass of `count` uses slices 2 to 5, and `transpose` makes 16 slices.
    self._kept = max(self._slices, 6 if self.input else 16)
    self.stack = 4 * (self._kept + self._slices * (pool is not None))
    if not self.input:
      self.stack += 4 * self._words + 32

  def text(self, negate: bool) -> str:
    """Returns the C constants and functions, the last of which computes the value.

    Args:
      negate: Whether to change the signs of the convolution's inputs, which must be
        codes of 1 bit, and of its weights.
    """
    op: packed.Conv = self._writer.program.ops[self._conv - 1]
    self._negate = negate
    if negate:
      op = op._replace(kernel=-op.kernel, pad=-op.pad)
    self._op = op
    most = np.ones(op.kernel.shape[-1], np.int64)
    if not self.input:
      most = 255 - self._writer.program.offset.astype(np.int64)
    weights = packed.levels(op.kernel, int(op.bits)).astype(np.int64)
    # The integers of the slices are the sums plus these numbers.
    self._added = self._most_u - (weights * most).sum((1, 2, 3))
    return f"{self._sums()}\n\n{self._threshold()}"

  def _planes(self) -> np.ndarray:
    """Returns the bits of 1 - w, int64 (blocks, planes, 32, terms)."""
    v = 1 - self._op.kernel.reshape(len(self._op.kernel), -1).astype(np.int64)
    v = np.pad(v, [(0, -len(v) % 32), (0, 0)]).reshape(self._blocks, 32, -1)
    return np.stack([v >> k & 1 for k in self._levels], 1)

  def _sums(self) -> str:
    """Returns the C function that computes the slices of 32 sums."""
    constants, lines = self._sums_of_codes() if self.input else self._sums_of_pixels()
    body = "".join(f"  {line}\n" for line in lines)
    return f"""\
{constants}
APART static void sums{self._conv}(uint32_t *n, int y, int x, int b) {{
  int32_t rest = {self._most_u};
{body}  increase(n, {self._slices}, rest);
}}"""

  def _sums_of_codes(self) -> tuple[str, list[str]]:
    """Returns C constants, and C lines that add up an input of codes."""
    op, writer = self._op, self._writer
    channels = op.kernel.shape[-1]
    size, (h, w, _) = min(channels, 32), writer.kinds[op.input].shape
    planes = writer.memory.bits(op.input)
    shape = (h, w, channels // size, planes, size, *op.kernel.shape[1:3], *op.dilation)
    writer.flash += 4 * len(shape)
    # The highest bit of a word is its first channel.
    bits = self._planes()
    bits = bits.reshape(*bits.shape[:3], -1, size)[..., ::-1].reshape(bits.shape)
    constants = writer.array("uint32_t", f"w{self._conv}", _pack(bits.swapaxes(2, 3)))
    constants += f"static const Shape shape{self._conv} = {{{str(shape)[1:-1]}}};\n"
    rows = op.kernel[0].size
    lines = ["Window s;",
             f"const uint32_t *const w = w{self._conv}"
             f" + b * {len(self._levels) * rows};",
             f"clear(n, {self._kept});",
             f"place(&s, &shape{self._conv}, y * {op.strides[0]} - {op.pads[0]},"
             f" x * {op.strides[1]} - {op.pads[2]});", f"s.map = v{op.input};"]
    # Each pass has a level, whether it is inside the input, a plane and its inversion.
    passes = [(0, 1, 0, "all")] * (planes == 2) + [
        (1, 1, planes - 1, "all" if self._negate else "0")]
    if any(op.pads) and op.pad <= 0:
      passes.append((-op.pad, 0, 0, "0"))
    for level, inside, plane, flip in passes:
      run = [f"s.inside = {inside};", f"s.plane = {plane};", f"s.flip = {flip};"]
      for k, bit in enumerate(self._levels):
        call = f"count(n + {level + bit}, &s, w + {k * rows})"
        run.append(f"{call};" if k else f"rest -= {call} * {1 << level};")
      if not inside:
        run = [f"if (s.top < 0 || s.top > {h - op.window[0]} || s.begin > 0"
               f" || s.end < {op.kernel.shape[2]}) {{",
               *(f"  {line}" for line in run), "}"]
      lines += run
    return constants, lines

  def _sums_of_pixels(self) -> tuple[str, list[str]]:
    """Returns C constants and a function, and C lines that add up the image."""
    words, bits = self._words, self._planes()
    bits = np.pad(bits, [(0, 0)] * 3 + [(0, 4 * words - bits.shape[-1])])
    # A byte has four terms of a channel, and four of the channel 16 channels on.
    bits = bits.reshape(self._blocks, -1, 2, 16, words, 4)
    bits = bits.transpose(0, 1, 4, 3, 2, 5).reshape(self._blocks, -1, words, 4, 32)
    packed_bits = _pack(bits)
    constants = self._writer.array("uint32_t", f"w{self._conv}", packed_bits)
    past = [f"bytes[{k}] = 0;" for k in range(self._op.kernel[0].size, 4 * words)]
    lines = [f"uint8_t bytes[{4 * words}];",
             f"const uint32_t *w = w{self._conv} + b * {packed_bits[0].size};",
             "int k;", f"rest -= pixels{self._conv}(bytes, y, x);", *past,
             f"clear(n, {self._kept});"]
    for bit in self._levels:
      lines.append(f"for (k = 0; k < {words}; k++, w += 4)"
                   f" look_up(n, w, bytes + 4 * k, {bit});")
    return f"{constants}\n{self._gather()}", [*lines, "transpose(n);"]

  def _gather(self) -> str:
    """Returns the C function that reads u of a window in bytes, and returns its sum."""
    op, writer = self._op, self._writer
    _, h, w, channels = op.kernel.shape
    height, width, _ = writer.kinds[0].shape
    return f"""\
static int32_t pixels{self._conv}(uint8_t *bytes, int y, int x) {{
  int32_t sum = 0;
  int i, j, k;
  for (i = 0; i < {h}; i++) {{
    for (j = 0; j < {w}; j++) {{
      const int r = y * {op.strides[0]} - {op.pads[0]} + i * {op.dilation[0]};
      const int s = x * {op.strides[1]} - {op.pads[2]} + j * {op.dilation[1]};
      const int inside = r >= 0 && r < {height} && s >= 0 && s < {width};
      for (k = 0; k < {channels}; k++) {{
        int32_t u = 255 - offset[k];
        if (inside) u -= {writer.get(0, 'r', 's', 'k')};
        *bytes++ = (uint8_t)u;
        sum += u;
      }}
    }}
  }}
  return sum;
}}
"""

  def _threshold(self) -> str:
    """Returns the C constants and the function that compute the value."""
    writer, i, slices = self._writer, self._i, self._slices
    op: packed.Threshold = writer.program.ops[i - 1]
    h, w, channels = writer.kinds[i].shape
    bits = writer.memory.bits(i)
    # A channel that falls has sum <= t, which is the opposite of sum >= t + 1.
    t = op.thresholds.astype(np.int64) + op.falling + self._added
    t = np.pad(t.clip(0, 2**slices - 1), [(0, 0), (0, 0), (0, -channels % 32)])
    # Channels past the last one have the code 1 in one bit, and 0 in two bits.
    t[:, 1:, channels:] = 2**slices - 1
    t = t.reshape(*t.shape[:2], self._blocks, 32).transpose(2, 0, 1, 3)[..., None, :]
    arrays = writer.array(
        "uint32_t", f"t{i}", _pack(t >> np.arange(slices)[:, None] & 1))
    sums, compute = self._compute()
    tables = self._tables(op)
    less = []
    for j in range(bits):
      terms = []
      for k, mask in tables.items():
        table = f"(b * {len(op.thresholds)} + {k}) * {bits} + {j}"
        terms.append(f"(below({sums}, t{i} + ({table}) * {slices}, {slices}){mask})")
      less.append(f"({' | '.join(terms)})")
    if op.falling.any():
      arrays += writer.array("uint32_t", f"falling{i}", _pack(np.pad(
          op.falling, (0, -channels % 32)).reshape(-1, 32)))
      less = [f"{term} ^ falling{i}[b]" for term in less]
    keep = [f"p[b] = {less[0]};"]
    if bits == 2:
      keep = [f"const uint32_t low = {less[0]};", f"const uint32_t high = {less[1]};",
              "p[2 * b] = ~(low ^ high);", "p[2 * b + 1] = low & high;"]
    if op.shortcut is not None:
      compute.insert(0, "const uint32_t *const q ="
                     f" {writer.at(op.shortcut, 'y', 'x')}"
                     f" + b * {writer.memory.bits(op.shortcut)};")
    body = "\n".join(f"        {line}" for line in [*compute, *keep])
    return f"""\
{arrays}
static uint32_t *const v{i} = arena + {writer.memory.offsets[i]};

APART static void make{i}(void) {{
  int y, x, b;
  for (y = 0; y < {h}; y++) {{
    for (x = 0; x < {w}; x++) {{
      uint32_t *const p = {writer.at(i, 'y', 'x')};
      for (b = 0; b < {self._blocks}; b++) {{
{body}
      }}
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
    if self._writer.memory.bits(op.shortcut) == 1:
      return {middle - 1: " & q[0]", middle + 1: " & ~q[0]"}
    return {middle - 1: " & q[1]", middle: " & ~q[0]", middle + 1: " & q[0] & ~q[1]"}

  def _compute(self) -> tuple[str, list[str]]:
    """Returns the C array of slices to compare, and the lines that compute it."""
    writer, conv = self._writer, self._conv
    if self._pool is None:
      return "n", [f"uint32_t n[{self._kept}];", f"sums{conv}(n, y, x, b);"]
    op: packed.Pool = writer.program.ops[self._pool - 1]
    h, w, _ = writer.kinds[conv].shape
    inside = f"if (r >= 0 && r < {h} && s >= 0 && s < {w}) "
    return "most", [
        f"uint32_t n[{self._kept}], most[{self._slices}];", "int i, j;",
        f"clear(most, {self._slices});",
        f"for (i = 0; i < {op.window[0]}; i++) {{",
        f"  for (j = 0; j < {op.window[1]}; j++) {{",
        f"    const int r = y * {op.strides[0]} - {op.pads[0]} + i;",
        f"    const int s = x * {op.strides[1]} - {op.pads[2]} + j;",
        f"    {inside if any(op.pads) else ''}{{",
        f"      sums{conv}(n, r, s, b);",
        f"      maximum(most, n, {self._slices});", "    }", "  }", "}"]


def _pack(bits: np.ndarray) -> np.ndarray:
  """Packs bits, (..., 32), into uint32 (...): channel c is bit c."""
  octets = np.packbits(bits.astype(bool), -1, "little")
  return np.ascontiguousarray(octets).view("<u4")[..., 0]
