"""Exports a packed network as one C99 or C++11 file without heap, libm or libraries.

Each value of the network has a C function that computes one element of it. There are
three ways to keep a value:

    stored      The whole value is in a static arena. Codes are stored, and so are sums
                that several operations or a convolution read.
    plane       One channel at a time is in the arena. Overlapping windows of a pool
                would otherwise compute the same sums again, and long chains of sums
                would nest too many function calls for a small stack.
    computed    Each element is computed where it is read, and never kept in memory.
                This holds for all other sums.

Therefore a convolution, its pooling and its thresholds usually become one loop. Where
weights and inputs have one or two bits, `minw.export.c_sliced` writes this loop.
Buffers in the arena share memory if they are not needed at the same time. Codes and
weights are stored as bit-planes, in words of 32 bits along the channels:

    1 bit   a plane of signs (1 is minus)
    2 bits  a plane that marks values other than 0, then the signs
    3 bits  two planes with the bits of the magnitude code, which is 1, 2 or 3 for the
            levels 1, 2 and 4, then the signs
"""

import json
import math
import re
from typing import NamedTuple

import numpy as np

from minw import packed
from minw.export import c_cost
from minw.export import c_memory
from minw.export import c_sliced
from minw.export import c_text
from minw.export import common
from minw.kernels import reference

# The stack that a call takes at most is _STACK bytes, and _STACK_OF_FUNCTION bytes for
# each level of nested calls. Both are about 1.5 times what gcc and clang use on x86-64,
# with or without optimization. The functions of `c_sliced` take _STACK_OF_SLICED bytes
# beside what they state, about 1.2 times what the same compilers use.
_STACK = 256
_STACK_OF_FUNCTION = 128
_STACK_OF_SLICED = 880

_SAMPLE = 4  # Images that show which values are mostly -1, and how much is computed.

# C functions that are written if a network needs them. Each one follows those it calls.
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
/* The volatile y rounds each float32 step by itself, so that the compiler fuses none.
   The bits of floats order as integers do, if all but the sign of negative ones are
   inverted. */
static int32_t score(int32_t sum, int c) {
  union { float f; int32_t i; } bits;
  volatile float y = (float)sum;
  y = y * unit[0];
  y = y - center[c];
  y = y * scale[c];
  y = y + constant[c];
  bits.f = y + 0.0f;
  return bits.i < 0 ? bits.i ^ 0x7fffffff : bits.i;
}"""

# The arena, if `c_sliced` keeps lists of 16-bit numbers in it.
_ARENA = """\
static union {{
  uint32_t words[{words}];
  uint16_t halves[{halves}];
}} memory;
#define arena memory.words
"""

_DECLARATIONS = """\
#define {NAME}_CLASSES {classes}
#define {NAME}_HEIGHT {height}
#define {NAME}_WIDTH {width}
#define {NAME}_CHANNELS {channels}
#define {NAME}_STACK {stack} /* Bytes of stack that {name}_run takes at most. */

#ifdef __cplusplus
extern "C" {{
#endif
/* Returns the label of an image: the index of the first of the greatest scores.

   image: {height} x {width} x {channels} bytes: rows, pixels, channels.
   scores: {NAME}_CLASSES integers that are written, or a null pointer. They order as
   the logits, whose float32 bits they are (those of negative logits with all bits but
   the sign inverted).
   It works in static memory, so that only one call may run at a time. */
int {name}_run(const uint8_t *image, int32_t *scores);

/* The names of the labels, in UTF-8. */
extern const char *const {name}_labels[{NAME}_CLASSES];
#ifdef __cplusplus
}}
#endif
"""

_MAIN = """\
#ifdef MINW_MAIN
#include <stdio.h>

{images}
{wanted}
int main(void) {{
  int32_t scores[{NAME}_CLASSES];
  int i, c, wrong = 0;
  for (i = 0; i < {count}; i++) {{
    const int label = {name}_run(images + (long)i * {pixels}, scores);
    for (c = 0; c < {NAME}_CLASSES; c++)
      wrong += scores[c] != wanted[i * {NAME}_CLASSES + c];
    printf("image %d: %d %s\\n", i, label, {name}_labels[label]);
  }}
  if (wrong)
    printf("%d scores are wrong\\n", wrong);
  else
    printf("all scores are right\\n");
  return wrong != 0;
}}
#endif
"""


def scores(logits: np.ndarray) -> np.ndarray:
  """Returns the scores that the C function writes for logits.

  Args:
    logits: float32 of any shape.

  Returns:
    int32 of the same shape. They are ordered as the logits are.
  """
  bits = (np.asarray(logits, np.float32) + np.float32(0)).view(np.int32)
  return np.where(bits < 0, bits ^ 0x7fffffff, bits)


def source(program: packed.Program, images: np.ndarray, prefix: str = "minw") -> str:
  """Returns the text of the C file.

  Args:
    program: The network.
    images: Images for the test in its `main`, uint8 (batch, *program.source_shape).
    prefix: Beginning of all names that other files of a C program can see.

  Raises:
    ValueError: The network cannot be exported exactly, in which case the message names
      the layer, or the prefix does not make a C name.
  """
  return _Writer(program, prefix).text(images)


def header(program: packed.Program, prefix: str = "minw") -> str:
  """Returns the text of the header that declares the names defined by `source`."""
  writer = _Writer(program, prefix)
  return f"""\
/* {writer.title()} */
#ifndef MINW_{prefix.upper()}_H
#define MINW_{prefix.upper()}_H

#include <stdint.h>

{writer.declarations()}
#endif
"""


class Footprint(NamedTuple):
  """The memory that an exported network takes beside its code, in bytes.

  Attributes:
    constants: Weights, thresholds and tables, and the names of the labels.
    static: Static memory.
    stack: Upper bound of the stack that a call takes.
  """

  constants: int
  static: int
  stack: int


def footprint(program: packed.Program) -> Footprint:
  """Returns the memory that a network takes, as the C file states it.

  The names of the labels are included, each with a pointer of 32 bits.
  """
  writer = _Writer(program, "minw")
  writer.functions()
  labels = sum(len(str(label).encode()) + 1 + 4
               for label in common.metadata(program)["labels"])
  return Footprint(writer.flash + labels, writer.static(), writer.stack())


def steps(program: packed.Program, images: np.ndarray) -> list[c_cost.Steps]:
  """Counts what the C file does in each layer, from which its cost is estimated.

  Args:
    program: The network.
    images: Images, uint8 (batch, *program.source_shape). Numbers are the mean over the
      first four of them.
  """
  writer = _Writer(program, "minw")
  return c_cost.count(writer, writer.look_at(images))


class _Writer:
  """Writes the functions of a program's values."""

  def __init__(self, program: packed.Program, prefix: str):
    if not c_text.PREFIX.fullmatch(prefix):
      raise ValueError(f"prefix {prefix!r} must be made of {c_text.ALLOWED_PREFIX}")
    self.program, self.prefix = program, prefix
    self.kinds = common.values(program)
    plans = []
    for by_row in (False, True):
      self.memory = c_memory.Memory(program, self.kinds, by_row)
      plans.append((self.memory, c_sliced.find(self)))
    self.memory, self.sliced = min(plans, key=lambda plan: plan[0].words)
    most = packed.Limits().memory
    if 4 * self.memory.words > most:
      raise ValueError(f"the C code would keep {4 * self.memory.words} bytes of"
                       f" values; it may keep at most {most}")
    self.mostly_minus: set[int] = set()  # Values whose codes are mostly negative.
    self.flash = 0  # Bytes of constants.

  def title(self) -> str:
    """Returns the first line of both files."""
    return "A network with 1-3 bit weights and activations, made by minw."

  def stack(self) -> int:
    """Returns the largest number of bytes of stack that a call takes."""
    return max([_STACK + self.memory.depth * _STACK_OF_FUNCTION,
                *(_STACK_OF_SLICED + value.stack for value in self.sliced.values())])

  def declarations(self) -> str:
    """Returns the declarations for programs that call the network."""
    h, w, c = self.program.source_shape
    return _DECLARATIONS.format(
        name=self.prefix, NAME=self.prefix.upper(), height=h, width=w, channels=c,
        classes=self.program.num_classes, stack=self.stack())

  def text(self, images: np.ndarray) -> str:
    """Returns the text of the C file."""
    self.look_at(images)
    body, run = self.functions()
    helpers: list[str] = []
    for name, helper in reversed((_HELPERS | c_sliced.helpers(self)).items()):
      if any(f"{name}(" in text for text in (body, run, *helpers)):
        helpers.insert(0, helper)
    # The head comes last, because it states the size of the functions' constants.
    head = self._head(len(images))
    return "\n".join(
        [head, "\n\n".join([*helpers, body]), "", run, self._main(images)])

  def look_at(self, images: np.ndarray) -> list[np.ndarray]:
    """Finds values that are mostly negative for images. Returns all their values."""
    values = reference.run(self.program, images[:_SAMPLE])
    self.mostly_minus = {
        i for i, value in enumerate(values)
        if self.kinds[i].kind == "CODE" and np.mean(value < 0) > 0.5}
    return values

  def negates(self, i: int) -> bool:
    """Whether the signs of codes of 1 bit and of their weights are changed."""
    return i in self.mostly_minus and self.memory.bits(i) == 1

  def functions(self) -> tuple[str, str]:
    """Returns the functions of the values and the one that calls them.

    Their constants are added to `flash`.
    """
    inlined = {j for value in self.sliced.values() for j in value.inlined}
    values = [self._function(i) for i in range(1, len(self.kinds))
              if not self.memory.is_term(i) and i not in inlined]
    return "\n\n".join(values), self._run()

  def static(self) -> int:
    """Returns the number of bytes of static memory."""
    return 4 * self.memory.words + 8

  def _head(self, count):
    """Returns the text before the functions."""
    meta = common.metadata(self.program)
    words = self.memory.words
    labels = "\n".join(f"  {c_text.string(str(label))}," for label in meta["labels"])
    arena = f"static uint32_t arena[{words}];\n" if words else ""
    if any(value.input for value in self.sliced.values()):
      arena = _ARENA.format(words=words, halves=2 * words)
    offset = ", ".join(map(str, self.program.offset))
    return f"""\
/* {self.title()}

   Constants: {self.flash} bytes, and labels.
   Static memory: {self.static()} bytes, so that one call runs at a time.
   Stack: less than {self.stack()} bytes, unless a compiler uses vector instructions.
   No heap, no library.
   With -DMINW_MAIN there is a main that checks {count} images.

   {c_text.json_comment(json.dumps(meta))}
*/
#include <float.h>
#include <limits.h>
#include <stdint.h>

#if FLT_RADIX != 2 || FLT_MANT_DIG != 24 || INT_MAX < 0x7fffffff
#error "float must be IEEE single precision, and int have 32 bits"
#endif

/* Functions inlined into one another would take more stack together. */
#ifdef __GNUC__
#define APART __attribute__((noinline))
#else
#define APART
#endif

{self.declarations()}
const char *const {self.prefix}_labels[{self.prefix.upper()}_CLASSES] = {{
{labels}
}};

{arena}static const uint8_t *input;
static const uint8_t offset[] = {{{offset}}};
"""

  def _run(self):
    """Returns the C function that runs the network."""
    logits = self.program.ops[-1]
    assert isinstance(logits, packed.Logits)
    last = logits.input
    calls = "".join(f"  make{i}();\n" for i in self.memory.stored)
    planes = "".join(f"    {line}\n" for line in self._make_planes(len(self.kinds) - 1))
    return f"""\
/* Writes the scores, and returns the label. */
APART static int classify(int32_t *scores) {{
  int c, label = 0;
  int32_t best = INT32_MIN;
  for (c = 0; c < {self.prefix.upper()}_CLASSES; c++) {{
    int32_t s;
{planes}    s = score({self.get(last, '0', '0', 'c')}, c);
    if (s > best) {{
      best = s;
      label = c;
    }}
    if (scores) scores[c] = s;
  }}
  return label;
}}

int {self.prefix}_run(const uint8_t *image, int32_t *scores) {{
  input = image;
{calls}  return classify(scores);
}}
"""

  def _main(self, images):
    """Returns the test at the end of the file."""
    wanted = scores(reference.logits(self.program, images))
    return _MAIN.format(
        images=self.array("uint8_t", "images", images),
        wanted=self.array("int32_t", "wanted", wanted), count=len(images),
        pixels=math.prod(self.program.source_shape), name=self.prefix,
        NAME=self.prefix.upper())

  def at(self, i, y, x):
    """Returns the C address of pixel (y, x) of a value that is kept in the arena."""
    return f"v{i} + ({y} * {self.kinds[i].shape[1]} + {x}) * {self.memory.pixel(i)}"

  def get(self, i, y, x, c):
    """Returns the C expression of an element of value i: an integer or a code."""
    if i == 0:
      (h, w, channels), crop = self.program.source_shape, self.program.crop
      top, left = (h - crop[0]) // 2, (w - crop[1]) // 2
      return (f"input[(({y} + {top}) * {w} + {x} + {left}) * {channels} + {c}]"
              f" - offset[{c}]")
    if self.memory.is_plane(i):
      return f"v{i}[{y} * {self.kinds[i].shape[1]} + {x}]"
    if i not in self.memory.stored:
      return f"f{i}({y}, {x}, {c})"
    if self.kinds[i].kind == "INT":
      return f"({self.at(i, y, x)})[{c}]"
    return f"code{self.memory.bits(i)}({self.at(i, y, x)}, {c})"

  def level(self, i, *where):
    """Returns the C expression of an element of value i as an integer level."""
    return f"level3({self.get(i, *where)})" if self.kinds[i].bits == 3 else (
        self.get(i, *where))

  def array(self, dtype, name, values):
    """Returns the C definition of a constant array, and counts its bytes."""
    values = np.asarray(values, np.float32 if dtype == "float" else None).reshape(-1)
    if dtype == "float":
      text = "{:.8e}f".format  # 9 digits determine any float32.
    elif dtype == "uint32_t":
      text = "0x{:x}u".format
    else:
      text = lambda v: "INT32_MIN" if v == -2**31 else str(v)
    bits = {"uint8_t": 8, "int8_t": 8, "int16_t": 16}.get(dtype, 32)
    self.flash += len(values) * bits // 8
    # Images may have millions of numbers, so that their texts are joined line by line.
    lines = [", ".join(map(text, values[k:k + 12].tolist()))
             for k in range(0, len(values), 12)]
    return (f"static const {dtype} {name}[{len(values)}] = {{\n  "
            + ",\n  ".join(lines) + "\n};\n")

  def _function(self, i):
    """Returns the C function that computes an element of value i, and its constants."""
    op = self.program.ops[i - 1]
    if i in self.sliced:
      return self.sliced[i].text(self.negates(self.sliced[i].input))
    if isinstance(op, packed.Logits):
      return self.array("float", "unit", op.unit) + "".join(
          self.array("float", field, getattr(op, field))
          for field in ("center", "scale", "constant")) + _SCORE
    arrays, lines = _RULES[type(op)](self, i, op)
    unused = [f"(void){name};" for name in "yxc"
              if not re.search(rf"\b{name}\b", " ".join(lines))]
    text = "".join(arrays) + f"/* {c_text.comment(op.name)} */\n"
    text += (f"{'APART ' * self.memory.is_apart(i)}static int32_t"
             f" f{i}(int y, int x, int c) {{\n")
    text += "".join(f"  {line}\n" for line in [*lines[:-1], *unused, lines[-1]]) + "}"
    if self.memory.is_plane(i):
      text += f"\n{self._make_plane(i)}"
    return f"{text}\n{self._make(i)}" if i in self.memory.stored else text

  def _make_plane(self, i):
    """Returns the C function that computes one channel of a plane."""
    h, w, _ = self.kinds[i].shape
    return f"""
static int32_t *const v{i} = (int32_t *)arena + {self.memory.offsets[i]};

APART static void plane{i}(int c) {{
  int y, x;
  for (y = 0; y < {h}; y++) {{
    for (x = 0; x < {w}; x++) v{i}[y * {w} + x] = f{i}(y, x, c);
  }}
}}"""

  def _make_planes(self, i):
    """Returns C lines that compute the planes for channel c of value i."""
    lines = []
    for plane in self.memory.planes[i]:
      first, end = plane.first, plane.first + self.kinds[plane.value].shape[2]
      limits = [f"c >= {first}"] * (first > 0) + [f"c < {end}"] * (
          end < self.kinds[i].shape[2])
      condition = f"if ({' && '.join(limits)}) " if limits else ""
      channel = f"c - {first}" if first else "c"
      lines.append(f"{condition}plane{plane.value}({channel});")
    return lines

  def _make(self, i):
    """Returns the C function that computes a stored value."""
    kind, planes = self.kinds[i], self._make_planes(i)
    if kind.kind == "INT":
      dtype, keep = "int32_t", f"({self.at(i, 'y', 'x')})[c] = f{i}(y, x, c);"
    else:
      dtype = "uint32_t"
      keep = f"put{self.memory.bits(i)}({self.at(i, 'y', 'x')}, c, f{i}(y, x, c));"
    # If there are planes, the loop over channels is the outermost one, because the
    # planes are computed once for each channel.
    loops = [(f"for ({v} = 0; {v} < {n}; {v}++) {{", [])
             for v, n in zip("yxc", kind.shape)]
    if planes:
      loops = [(loops[2][0], planes), *loops[:2]]
    lines = []
    for depth, (loop, then) in enumerate(loops):
      lines += ["  " * depth + loop, *("  " * (depth + 1) + line for line in then)]
    lines += ["      " + keep, "    }", "  }", "}"]
    body = "\n".join(f"  {line}" for line in lines)
    return f"""
static {dtype} *const v{i} = ({dtype} *)arena + {self.memory.offsets[i]};

APART static void make{i}(void) {{
  int y, x, c;
{body}
}}"""


# Each rule takes (writer, index of the value, operation). It returns the C constants of
# the value, and the lines in the body of the function that computes an element.


def _window(writer, op, window, row, pixel=(), border=False, dilation=(1, 1)):
  """Returns C lines that loop over the pixels of a window.

  Args:
    writer: The `_Writer`.
    op: The operation, a convolution or a pool.
    window: (height, width) of the window.
    row: C lines for each row i of the window, which is row r of the input. The pixels
      of the row that are in the window are in columns left + j * dilation of the input,
      for j0 <= j < j1.
    pixel: C lines for each of these pixels, which is in column s of the input.
    border: Whether the loops include pixels outside the input.
    dilation: Vertical and horizontal distance of neighbors in the window.
  """
  lines, (h, w, _) = [], writer.kinds[op.input].shape
  (sh, sw), (top, bottom, left, right) = op.strides, op.pads
  for k, at, size, n, step, before, after in (
      ("i", "top", h, window[0], dilation[0], top, bottom),
      ("j", "left", w, window[1], dilation[1], left, right)):
    # Index i of the window reads the input at `at` + i * `step`. `first` is the first
    # index whose position is not negative, and `last` is the first one past the input.
    first = f"{at} < 0 ? {_steps(f'-{at}', step)} : 0"
    last = (f"{at} > {size - 1 - (n - 1) * step} ?"
            f" {_steps(f'{size} - {at}', step)} : {n}")
    lines.append(f"const int {k}0 = {first if before and not border else 0};")
    lines.append(f"const int {k}1 = {last if after and not border else n};")
  if pixel:
    row = [*row, "for (j = j0; j < j1; j++) {",
           f"  const int s = left + {_times('j', dilation[1])};",
           *(f"  {line}" for line in pixel), "}"]
  return [f"const int top = y * {sh} - {top}, left = x * {sw} - {left};", *lines,
          f"int i{', j' if pixel else ''};", "for (i = i0; i < i1; i++) {",
          f"  const int r = top + {_times('i', dilation[0])};",
          *(f"  {line}" for line in row), "}"]


def _steps(distance, step):
  """Returns the C expression of a distance divided by a step, rounded up."""
  return distance if step == 1 else f"({distance} + {step - 1}) / {step}"


def _times(value, factor):
  return value if factor == 1 else f"{value} * {factor}"


def _conv(writer, i, op):
  channels = op.kernel.shape[-1]
  words = writer.kinds[op.input].kind == "CODE" and (
      op.groups == 1 or channels % 32 == 0)
  return (_conv_of_words if words else _conv_of_elements)(writer, i, op)


def _start(op, j):
  """Returns the C index of the weights for output channel c, row i and column j."""
  _, h, w, _ = op.kernel.shape
  return f"((c * {h} + i) * {w} + {j})"


def _inside(writer, op):
  """Returns the C condition that pixel (r, s) is inside the input of a convolution."""
  h, w, _ = writer.kinds[op.input].shape
  return f"r >= 0 && r < {h} && s >= 0 && s < {w}"


def _conv_of_elements(writer, i, op):
  """The rule of convolutions that multiply one pair of elements at a time.

  It serves inputs that are integers, and groups whose channels do not fill whole words.
  """
  out, *window, channels = op.kernel.shape
  kind = writer.kinds[op.input]
  weights = writer.array("int8_t", f"w{i}", packed.levels(op.kernel, op.bits))
  k = "k" if op.groups == 1 else f"(c / {out // op.groups} * {channels} + k)"
  value = writer.level(op.input, "r", "s", k)
  border = bool(op.pad and any(op.pads))
  if border:
    level = packed.levels(np.array([op.pad], np.int8), kind.bits)[0]
    value = f"{_inside(writer, op)} ? {value} : {level}"
  return [weights], ["int32_t sum = 0;", "int k;", *_window(writer, op, window, [], [
      f"const int8_t *w = w{i} + {_start(op, 'j')} * {channels};",
      f"for (k = 0; k < {channels}; k++)",
      f"  sum += w[k] * ({value});"], border, op.dilation), "return sum;"]


def _conv_of_words(writer, i, op):
  """The rule of convolutions of codes, which multiply 32 channels at a time.

  A sum of W1A1 has the terms +1 and -1. It is the number of channels minus twice the
  number of differing signs, so that each pixel first adds its number of channels. For
  other bits see `_products`.
  """
  out, *window, channels = op.kernel.shape
  planes, words = writer.memory.bits(op.input), -(-channels // 32)
  arrays = [writer.array("uint32_t", f"w{i}", _planes(op.kernel, op.bits))]
  ones = channels if planes == op.bits == 1 else 0
  border = bool(op.pad and any(op.pads))
  group = "" if op.groups == 1 else f" + c / {out // op.groups} * {words * planes}"

  def run(p, j, count):
    """Returns C lines that add the products of `count` pixels from address p on."""
    lines = [f"const uint32_t *p = {p};",
             f"const uint32_t *w = w{i} + {_start(op, j)} * {words * op.bits};"]
    if ones:
      lines.append(f"sum += {count} * {ones};")
    return [*lines, f"for (k = {count} * {words}; k > 0; k--) {{",
            *(f"  {line}" for line in _products(planes, op.bits)),
            f"  p += {planes};", f"  w += {op.bits};", "}"]

  pixel = writer.at(op.input, "r", "s") + group
  if border:
    codes = np.full((1, 1, 1, channels), op.pad, np.int8)
    arrays.append(writer.array("uint32_t", f"pad{i}", _planes(codes, planes)))
    pixel = f"{_inside(writer, op)} ? {pixel} : pad{i}"
  if border or group or op.dilation[1] > 1:
    loops = _window(writer, op, window, [], run(pixel, "j", "1"), border, op.dilation)
  else:  # The words of a row of pixels are contiguous: one loop handles the whole row.
    row = run(writer.at(op.input, "r", "(left + j0)"), "j0", "(j1 - j0)")
    if max(op.pads[2:]) >= window[1]:
      row.insert(0, "if (j1 <= j0) continue;")
    loops = _window(writer, op, window, row, dilation=op.dilation)
  return arrays, ["int32_t sum = 0;", "int k;", *loops, "return sum;"]


def _planes(codes, bits):
  """Converts codes, int8 (n, h, w, channels), to bit-planes.

  Returns:
    uint32 (n, h, w, words, bits): the planes of the module's docstring.
  """
  channels = codes.shape[-1]
  codes = np.pad(codes, [(0, 0)] * 3 + [(0, -channels % 32)])
  size = np.abs(codes)
  planes = [[], [size & 1], [size & 1, size >> 1]][bits - 1] + [codes < 0]
  planes = np.stack([plane.reshape(*codes.shape[:-1], -1, 32) for plane in planes], -2)
  return np.packbits(planes.astype(bool), -1, "little").view("<u4")[..., 0]


def _products(x_bits, w_bits):
  """Returns C lines that add the products of a word of codes p and of weights w.

  A level is a sign times a size of 1, 2 or 4, or it is 0. For each pair of sizes, a
  mask marks the channels in which the code has the first size and the weight has the
  second one. All masks whose pairs have the same product of sizes are united. They do
  not overlap, because each level has one size. A mask M and the signs S of the products
  (1 is minus) contribute size * (popcount(M) - 2 * popcount(M & S)), which the C
  function `dot` computes.

  In W1A1 every channel is marked. The caller has added popcount(M), which is the number
  of channels, and -2 * popcount(S) remains.
  """
  sizes = lambda bits, v: [
      {1: None}, {1: f"{v}[0]"},
      {1: f"{v}[0] & ~{v}[1]", 2: f"{v}[1] & ~{v}[0]", 4: f"{v}[0] & {v}[1]"}][bits - 1]
  masks = {}  # Terms of the mask of each product of sizes.
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
  # Channels that fall compare sum <= t, which is the same as ~sum >= ~t. Therefore
  # their thresholds are stored inverted, and their sums are inverted before the
  # comparison.
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
  terms = [_shifted(writer.level(j, "y", "x", "c"), shift)
           for j, shift in writer.memory.terms(i)]
  return [], [f"int32_t sum = {terms[0]};", *(f"sum += {term};" for term in terms[1:]),
              "return sum;"]


def _shifted(value, shift):
  return f"({value}) * {1 << shift}" if shift else f"({value})"


_RULES = {
    packed.Conv: _conv, packed.Pool: _pool, packed.Threshold: _threshold,
    packed.Concat: _concat, packed.Shortcut: _shortcut, packed.Add: _add}
