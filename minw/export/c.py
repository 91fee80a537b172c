"""A packed network as one C99 file: no heap, no libm, and no library.

Each value has a function that computes one element of it. Codes, and sums that several
operations or a convolution read, are kept in a static arena in which they follow one
another; other sums never are in memory, so that a convolution, its pooling and its
thresholds come to one loop. Where windows of pooling overlap, sums are computed again:
memory is what small machines lack. Codes and weights are planes of bits, in words of 32
along channels:

    1 bit   the sign (1 is minus)
    2 bits  where it is not 0; the sign
    3 bits  the two bits of its size, 1, 2 and 3 for levels 1, 2 and 4; the sign
"""

import json
import math
import re

import numpy as np

from minw import packed
from minw.export import common
from minw.kernels import reference

STACK = 512  # Bytes, of all functions together.

# Functions that some networks need: each with what its text calls before it.
_HELPERS = {
    "ones": """\
static int32_t ones(uint32_t v) {
  v -= v >> 1 & 0x55555555u;
  v = (v & 0x33333333u) + (v >> 2 & 0x33333333u);
  return (int32_t)(((v + (v >> 4)) & 0x0f0f0f0fu) * 0x01010101u >> 24);
}""",
    "dot": """\
static int32_t dot(uint32_t mask, uint32_t minus) {
  return ones(mask) - 2 * ones(mask & minus);
}""",
    "bit": """\
static int32_t bit(const uint32_t *p, int i) {
  return (int32_t)(*p >> (i & 31) & 1);
}""",
    "code1": """\
static int32_t code1(const uint32_t *p, int c) {
  return 1 - 2 * bit(p + c / 32, c);
}""",
    "code2": """\
static int32_t code2(const uint32_t *p, int c) {
  p += c / 32 * 2;
  return bit(p, c) * (1 - 2 * bit(p + 1, c));
}""",
    "code3": """\
static int32_t code3(const uint32_t *p, int c) {
  p += c / 32 * 3;
  return (bit(p, c) + 2 * bit(p + 1, c)) * (1 - 2 * bit(p + 2, c));
}""",
    "level3": """\
static int32_t level3(int32_t code) {
  return code < 0 ? -(1 << -code >> 1) : 1 << code >> 1;
}""",
    "put": """\
static void put(uint32_t *p, int c, int32_t set) {
  if (c % 32 == 0) *p = 0;
  *p |= (uint32_t)set << c % 32;
}""",
    "put1": """\
static void put1(uint32_t *p, int c, int32_t code) {
  put(p + c / 32, c, code < 0);
}""",
    "put2": """\
static void put2(uint32_t *p, int c, int32_t code) {
  p += c / 32 * 2;
  put(p, c, code != 0);
  put(p + 1, c, code < 0);
}""",
    "put3": """\
static void put3(uint32_t *p, int c, int32_t code) {
  const int32_t size = code < 0 ? -code : code;
  p += c / 32 * 3;
  put(p, c, size & 1);
  put(p + 1, c, size >> 1);
  put(p + 2, c, code < 0);
}""",
}

_SCORE = """\
/* Its float32 steps are rounded one by one, whatever the compiler may fuse; the bits of
   a float order as integers do, but for those of negative ones. */
static int32_t score(int32_t sum, int c) {
  union { float f; int32_t i; } bits;
  volatile float y = (float)sum;
  y = y * UNIT;
  y = y - center[c];
  y = y * scale[c];
  y = y + constant[c];
  bits.f = y + 0.0f;
  return bits.i < 0 ? bits.i ^ 0x7fffffff : bits.i;
}"""

_MAIN = """\
#ifdef MINW_MAIN
#include <stdio.h>

%s
%s
int main(void) {
  int32_t scores[MINW_CLASSES];
  int i, c, wrong = 0;
  for (i = 0; i < %d; i++) {
    const int label = minw_run(images + (long)i * %d, scores);
    for (c = 0; c < MINW_CLASSES; c++) wrong += scores[c] != wanted[i * %d + c];
    printf("image %%d: %%d %%s\\n", i, label, minw_labels[label]);
  }
  printf(wrong ? "%%d scores are wrong\\n" : "all scores are right\\n", wrong);
  return wrong != 0;
}
#endif
"""


def scores(logits: np.ndarray) -> np.ndarray:
  """What the C function gives for float32 logits: int32 of the same order."""
  bits = (np.asarray(logits, np.float32) + np.float32(0)).view(np.int32)
  return np.where(bits < 0, bits ^ 0x7fffffff, bits)


def source(program: packed.Program, images: np.ndarray) -> str:
  """The C file.

  Args:
    program: the network.
    images: uint8 (batch, *program.source_shape), for the test in its `main`.

  Raises:
    ValueError: the network can not be exported exactly; names the layer.
  """
  return _Writer(program).text(images)


class _Writer:
  """Writes the functions of a program's values."""

  def __init__(self, program: packed.Program):
    self.program = program
    self.kinds = common.values(program)
    self.signs = packed.only_signs(program)
    self.stored = [i for i in range(1, len(program.ops)) if self._is_stored(i)]
    self.offsets, self.words = self._arena()
    self.flash = 0  # Bytes of constants.

  def text(self, images: np.ndarray) -> str:
    p = self.program
    body = [self._function(i) for i in range(1, len(self.kinds))]
    flash = self.flash
    calls = "".join(f"  make{i}();\n" for i in self.stored)
    pixels = math.prod(p.source_shape)
    wanted = scores(reference.logits(p, images))
    meta = common.metadata(p)
    arena = f"static uint32_t arena[{self.words}];\n" if self.stored else ""
    head = f"""\
/* A network with 1-3 bit weights and activations, made by minw.

   int minw_run(const uint8_t *image, int32_t *scores);

   image: {' x '.join(map(str, p.source_shape))} bytes: rows, pixels, channels.
   scores: {p.num_classes}, or a null pointer; they order as the logits, whose float32
   bits they are (of negative ones with all bits but the sign inverted).
   Returns the label, the first of the greatest scores.

   Constants: {flash} bytes, and labels.
   Static memory: {4 * self.words + 8} bytes, so that one call runs at a time.
   Stack: less than {STACK} bytes. No heap, no library.
   With -DMINW_MAIN there is a main that checks {len(images)} images.

   {json.dumps(meta).replace('*/', '*' + chr(92) + '/')}
*/
#include <float.h>
#include <limits.h>
#include <stdint.h>

#if FLT_RADIX != 2 || FLT_MANT_DIG != 24 || INT_MAX < 0x7fffffff
#error "float must be IEEE single precision, and int have 32 bits"
#endif

#define MINW_CLASSES {p.num_classes}
int minw_run(const uint8_t *image, int32_t *scores);
const char *const minw_labels[MINW_CLASSES] = {{
{chr(10).join('  ' + _string(label) + ',' for label in meta['labels'])}
}};

{arena}static const uint8_t *input;
static const uint8_t offset[] = {{{', '.join(map(str, p.offset))}}};
"""
    body = "\n\n".join(body)
    helpers = []
    for name, helper in reversed(_HELPERS.items()):
      if f"{name}(" in body or any(f"{name}(" in text for text in helpers):
        helpers.insert(0, helper)
    run = f"""\
int minw_run(const uint8_t *image, int32_t *scores) {{
  int c, label = 0;
  int32_t best = INT32_MIN;
  input = image;
{calls}  for (c = 0; c < MINW_CLASSES; c++) {{
    const int32_t s = score({self.get(p.ops[-1].input, '0', '0', 'c')}, c);
    if (s > best) {{
      best = s;
      label = c;
    }}
    if (scores) scores[c] = s;
  }}
  return label;
}}
"""
    main = _MAIN % (self.array("uint8_t", "images", images),
                    self.array("int32_t", "wanted", wanted),
                    len(images), pixels, p.num_classes)
    return "\n".join([head, "\n\n".join([*helpers, body]), "", run, main])

  def _is_stored(self, i):
    """Whether a value is kept, rather than computed where it is read."""
    kind, ops = self.kinds[i], self.program.ops
    readers = [op for op in ops for j in packed.inputs(op) if j == i]
    return kind.kind == "CODE" or len(readers) != 1 or isinstance(
        readers[0], packed.Conv)

  def _reads(self, i):
    """The kept values that one is computed from."""
    found = set()
    for j in packed.inputs(self.program.ops[i - 1]) if i else ():
      found |= {j} if j in self.stored else self._reads(j)
    return found

  def _arena(self):
    """Where kept values are, in words: each in the first gap of its lifetime."""
    last = {i: i for i in self.stored}
    for i in [*self.stored, len(self.program.ops)]:
      for j in self._reads(i):
        last[j] = i
    placed = []
    for i in self.stored:
      h, w, c = self.kinds[i].shape
      size, at = h * w * self._pixel(i), 0
      for start, end, j in sorted(placed):
        if last[j] >= i and start < at + size and at < end:
          at = end
      placed.append((at, at + size, i))
    return {i: start for start, _, i in placed}, max(
        (end for _, end, _ in placed), default=0)

  def planes(self, i):
    """Bits of a code; one more than its grid has where there is a 0 among signs."""
    return 2 if self.kinds[i].bits == 1 and not self.signs[i] else self.kinds[i].bits

  def _pixel(self, i):
    """Words that a pixel of a kept value takes."""
    c = self.kinds[i].shape[2]
    return c if self.kinds[i].kind == "INT" else -(-c // 32) * self.planes(i)

  def at(self, i, y, x):
    """The address of a kept value's pixel."""
    return f"v{i} + ({y} * {self.kinds[i].shape[1]} + {x}) * {self._pixel(i)}"

  def get(self, i, y, x, c):
    """An element: an integer, or a code."""
    if i == 0:
      (h, w, channels), crop = self.program.source_shape, self.program.crop
      top, left = (h - crop[0]) // 2, (w - crop[1]) // 2
      return (f"input[(({y} + {top}) * {w} + {x} + {left}) * {channels} + {c}]"
              f" - offset[{c}]")
    if i not in self.stored:
      return f"f{i}({y}, {x}, {c})"
    if self.kinds[i].kind == "INT":
      return f"({self.at(i, y, x)})[{c}]"
    return f"code{self.planes(i)}({self.at(i, y, x)}, {c})"

  def level(self, i, *where):
    """An element as an integer."""
    return f"level3({self.get(i, *where)})" if self.kinds[i].bits == 3 else (
        self.get(i, *where))

  def array(self, dtype, name, values):
    values = np.asarray(values).reshape(-1)
    if dtype == "float":
      items = [float(v).hex() + "f" for v in values]
    elif dtype == "uint32_t":
      items = [f"0x{v:x}u" for v in values.tolist()]
    else:
      items = ["INT32_MIN" if v == -2**31 else str(v) for v in values.tolist()]
    bits = {"uint8_t": 8, "int8_t": 8, "int16_t": 16}.get(dtype, 32)
    self.flash += len(items) * bits // 8
    lines = [", ".join(items[k:k + 12]) for k in range(0, len(items), 12)]
    return (f"static const {dtype} {name}[{len(items)}] = {{\n  "
            + ",\n  ".join(lines) + "\n};\n")

  def _function(self, i):
    """The function of value i, with its constants."""
    op = self.program.ops[i - 1]
    if isinstance(op, packed.Logits):
      unit = float(op.unit).hex() + "f"
      return "".join(
          self.array("float", field, getattr(op, field))
          for field in ("center", "scale", "constant")) + _SCORE.replace(
              "UNIT", unit)
    arrays, lines = _RULES[type(op)](self, i, op)
    unused = [f"(void){name};" for name in "yxc"
              if not re.search(rf"\b{name}\b", " ".join(lines))]
    text = "".join(arrays) + f"/* {_comment(op.name)} */\n"
    text += f"static int32_t f{i}(int y, int x, int c) {{\n"
    text += "".join(f"  {line}\n" for line in [*lines[:-1], *unused, lines[-1]]) + "}"
    return f"{text}\n{self._make(i)}" if i in self.stored else text

  def _make(self, i):
    """What keeps a value."""
    kind = self.kinds[i]
    h, w, c = kind.shape
    if kind.kind == "INT":
      dtype, keep = "int32_t", f"p[c] = f{i}(y, x, c)"
    else:
      dtype, keep = "uint32_t", f"put{self.planes(i)}(p, c, f{i}(y, x, c))"
    return f"""
static {dtype} *const v{i} = ({dtype} *)arena + {self.offsets[i]};

static void make{i}(void) {{
  int y, x, c;
  for (y = 0; y < {h}; y++) {{
    for (x = 0; x < {w}; x++) {{
      {dtype} *p = {self.at(i, "y", "x")};
      for (c = 0; c < {c}; c++) {keep};
    }}
  }}
}}"""


def _string(text):
  """A string literal; all that could be misread in it as its bytes."""
  return '"' + "".join(
      chr(b) if chr(b).isalnum() and b < 128 or b in b" _-.,:/()+"
      else f"\\{b:03o}" for b in str(text).encode()) + '"'


def _comment(name):
  return "".join(c if c.isprintable() and c.isascii() else "?" for c in name).replace(
      "*/", "* /").replace("/*", "/ *")


# Each rule gives a value's constants, and the body of the function of its elements.


def _window(writer, op, window, row, pixel=(), border=False):
  """Lines that go through a window, but for its border, which may be asked for, too.

  Args:
    row: what is done for each row i of it, that is r of the input, whose pixels in the
      window are left + j, j0 <= j < j1.
    pixel: what is done then for each of these pixels, s.
    border: whether those outside of the input are among them.
  """
  lines, (h, w, _) = [], writer.kinds[op.input].shape
  (sh, sw), (top, bottom, left, right) = op.strides, op.pads
  for k, at, size, n, before, after in (
      ("i", "top", h, window[0], top, bottom),
      ("j", "left", w, window[1], left, right)):
    first, last = f"{at} < 0 ? -{at} : 0", f"{at} > {size - n} ? {size} - {at} : {n}"
    lines.append(f"const int {k}0 = {first if before and not border else 0};")
    lines.append(f"const int {k}1 = {last if after and not border else n};")
  if pixel:
    row = [*row, "for (j = j0; j < j1; j++) {", "  const int s = left + j;",
           *(f"  {line}" for line in pixel), "}"]
  return [f"const int top = y * {sh} - {top}, left = x * {sw} - {left};", *lines,
          f"int i{', j' if pixel else ''};", "for (i = i0; i < i1; i++) {",
          "  const int r = top + i;", *(f"  {line}" for line in row), "}"]


def _conv(writer, i, op):
  out, *window, channels = op.kernel.shape
  kind = writer.kinds[op.input]
  start = f"((c * {window[0]} + i) * {window[1]} + {{}})"  # Of a pixel's weights.
  if kind.kind == "INT":
    weights = writer.array("int8_t", f"w{i}", packed.levels(op.kernel, op.bits))
    return [weights], ["int32_t sum = 0;", "int k;", *_window(writer, op, window, [], [
        f"const int8_t *w = w{i} + {start.format('j')} * {channels};",
        f"for (k = 0; k < {channels}; k++)",
        f"  sum += w[k] * ({writer.get(op.input, 'r', 's', 'k')});"]), "return sum;"]
  planes, words = writer.planes(op.input), -(-channels // 32)
  arrays = [writer.array("uint32_t", f"w{i}", _planes(op.kernel, op.bits))]
  ones = channels if planes == op.bits == 1 else 0  # A sum of signs counts from it.
  border = bool(op.pad and any(op.pads))

  def run(p, j, count):
    """Goes through words side by side."""
    lines = [f"const uint32_t *p = {p};",
             f"const uint32_t *w = w{i} + {start.format(j)} * {words * op.bits};"]
    if ones:
      lines.append(f"sum += {count} * {ones};")
    return [*lines, f"for (k = {count} * {words}; k > 0; k--) {{",
            *(f"  {line}" for line in _products(planes, op.bits)),
            f"  p += {planes};", f"  w += {op.bits};", "}"]

  if border:
    codes = np.full((1, 1, 1, channels), op.pad, np.int8)
    arrays.append(writer.array("uint32_t", f"pad{i}", _planes(codes, planes)))
    h, w, _ = kind.shape
    inside = f"r >= 0 && r < {h} && s >= 0 && s < {w}"
    loops = _window(writer, op, window, [], run(
        f"{inside} ? {writer.at(op.input, 'r', 's')} : pad{i}", "j", "1"), border=True)
  else:
    row = run(writer.at(op.input, "r", "(left + j0)"), "j0", "(j1 - j0)")
    if max(op.pads[2:]) >= window[1]:
      row.insert(0, "if (j1 <= j0) continue;")
    loops = _window(writer, op, window, row)
  return arrays, ["int32_t sum = 0;", "int k;", *loops, "return sum;"]


def _planes(codes, bits):
  """Codes (..., channels) as planes: uint32 (..., words, bits)."""
  channels = codes.shape[-1]
  codes = np.pad(codes, [(0, 0)] * 3 + [(0, -channels % 32)])
  size = np.abs(codes)
  planes = [[], [size & 1], [size & 1, size >> 1]][bits - 1] + [codes < 0]
  planes = np.stack([plane.reshape(*codes.shape[:-1], -1, 32) for plane in planes], -2)
  return np.packbits(planes.astype(bool), -1, "little").view("<u4")[..., 0]


def _products(x_bits, w_bits):
  """Lines that add the products of a word of codes p and one of weights w."""
  sizes = lambda bits, v: [
      {1: None}, {1: f"{v}[0]"},
      {1: f"{v}[0] & ~{v}[1]", 2: f"{v}[1] & ~{v}[0]", 4: f"{v}[0] & {v}[1]"}][bits - 1]
  masks = {}  # Of no two sizes at once, so products of the same size are united.
  for a, x in sizes(x_bits, "p").items():
    for b, w in sizes(w_bits, "w").items():
      masks.setdefault(a * b, []).append(" & ".join(filter(None, (x, w))))
  signs = f"p[{x_bits - 1}] ^ w[{w_bits - 1}]"
  if x_bits == w_bits == 1:
    return [f"sum -= 2 * ones({signs});"]
  lines = [f"const uint32_t minus = {signs};"]
  for size, terms in masks.items():
    mask = " | ".join(f"({t})" for t in terms) if len(terms) > 1 else terms[0]
    lines.append(f"sum += {f'{size} * ' if size > 1 else ''}dot({mask}, minus);")
  return lines


def _pool(writer, i, op):
  if op.kind == "sum":
    value = writer.level(op.input, "r", "s", "c")
    return [], ["int32_t sum = 0;", *_window(
        writer, op, op.window, [], [f"sum += {value};"]), "return sum;"]
  value = writer.get(op.input, "r", "s", "c")
  return [], ["int32_t most = INT32_MIN;", *_window(writer, op, op.window, [], [
      f"const int32_t v = {value};", "if (v > most) most = v;"]), "return most;"]


def _threshold(writer, i, op):
  tables, count, channels = op.thresholds.shape
  # sum <= t is ~sum >= ~t.
  thresholds = op.thresholds ^ -op.falling.astype(np.int32)
  small = (thresholds.astype(np.int16) == thresholds).all()
  arrays = [writer.array("int16_t" if small else "int32_t", f"t{i}",
                         thresholds.transpose(2, 0, 1))]
  table = "c"
  if op.shortcut is not None:
    code = writer.get(op.shortcut, "y", "x", "c")
    table = f"(c * {tables} + {code} + {tables // 2})"
  lines = [f"const {'int16_t' if small else 'int32_t'} *t = t{i} + {table} * {count};",
           f"int32_t sum = {writer.get(op.input, 'y', 'x', 'c')};"]
  if op.falling.any():
    arrays.append(writer.array("uint32_t", f"falling{i}", np.packbits(
        np.pad(op.falling, (0, -channels % 32)), bitorder="little").view("<u4")))
    lines.append(f"if (bit(falling{i} + c / 32, c)) sum = ~sum;")
  reached = " + ".join(f"(sum >= t[{j}])" for j in range(count))
  return arrays, [*lines, f"return 2 * {reached} - 1;" if op.bits == 1 else
                  f"return {reached} - {packed.max_code(op.bits)};"]


def _concat(writer, i, op):
  lines, end = [], 0
  for j, shift in zip(op.inputs, op.shifts):
    start, end = end, end + writer.kinds[j].shape[2]
    value = writer.get(j, "y", "x", f"(c - {start})")
    lines.append(f"if (c < {end}) return {_shifted(value, shift)};")
  return [], [*lines[:-1], lines[-1].split(") ", 1)[1]]


def _shortcut(writer, i, op):
  h, w, c = writer.kinds[op.input].shape
  value = writer.get(op.input, f"(y * {op.strides[0]})", f"(x * {op.strides[1]})",
                     f"(c - {op.before})")
  outside = [f"if (c < {op.before} || c >= {op.before + c}) return 0;"]
  return [], [*(outside if op.before + op.after else []), f"return {value};"]


def _add(writer, i, op):
  a, b = (_shifted(writer.level(j, "y", "x", "c"), shift)
          for j, shift in ((op.a, op.shift_a), (op.b, op.shift_b)))
  return [], [f"return {a} + {b};"]


def _shifted(value, shift):
  return f"({value}) * {1 << shift}" if shift else f"({value})"


_RULES = {
    packed.Conv: _conv, packed.Pool: _pool, packed.Threshold: _threshold,
    packed.Concat: _concat, packed.Shortcut: _shortcut, packed.Add: _add}
