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

# The macro WORD, for networks without inputs of 3 bits and for those with some.
_WORD = "#define WORD(x) (*(x))"
_WORD3 = """\
/* Bit k of 4 - x for 32 codes x of 3 bits, where bit 2 is inverted. The word itself for
   codes of 1 or 2 bits, whose k is 4. */
static uint32_t part(const uint32_t *x, int k) {
  switch (k) {
    case 0: return x[0] & ~x[1];
    case 1: return (x[1] & ~x[0]) | (x[0] & ~x[1] & ~x[2]);
    case 2: return (x[0] | x[1]) & ~((x[0] ^ x[1]) & x[2]);
    case 3: return x[0] & x[1] & x[2];
    default: return x[0];
  }
}
#define WORD(x) part(x, s->of->planes < 3 ? 4 : s->bit)"""

# The part of the C file for Helium, if some layer has groups of several blocks.
_HELIUM = """\
/* Helium, the vector extension of Cortex-M55, adds to up to four blocks at once. A
   compiler that does not optimize would keep all vectors on the stack. */
#if defined(__ARM_FEATURE_MVE) && defined(__OPTIMIZE__)
#include <arm_mve.h>
#define HELIUM
#define GET4(p) vldrwq_gather_shifted_offset_z_u32(p, at, lanes)
#define PUT4(p, words) vstrwq_scatter_shifted_offset_p_u32(p, at, words, lanes)

/* Adds the listed weights to the slices n of `count` blocks, which are `span` words
   apart. */
static void columns(uint32_t *n, int count, int span, const uint32_t *w,
                    const uint16_t *list, const uint16_t *end) {
  const mve_pred16_t lanes = vctp32q((uint32_t)count);
  const uint32x4_t at = vmulq_n_u32(vidupq_n_u32(0, 1), (uint32_t)span);
  uint32x4_t ones1 = GET4(n), ones2 = GET4(n + 1), ones4 = GET4(n + 2);
  uint32x4_t ones8 = GET4(n + 3);
  uint32x4_t b1, b2, b4, b8, c1, c2, c4, c8, high;
  const uint16_t *x;
  for (x = list; x < end; x += 16) {
    uint32_t *p = n + 4;
    ADD8(vldrwq_u32, b8, 0)
    ADD8(vldrwq_u32, c8, 8)
    CARRY(high, ones8, b8, c8)
    for (; vmaxvq_p_u32(0, high, lanes); p++) {
      const uint32x4_t old = GET4(p);
      PUT4(p, old ^ high);
      high &= old;
    }
  }
  PUT4(n, ones1);
  PUT4(n + 1, ones2);
  PUT4(n + 2, ones4);
  PUT4(n + 3, ones8);
}
#endif

"""

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
    "ripple": """\
/* Adds a bit to each integer of some slices. */
static void ripple(uint32_t *n, uint32_t carry) {
  for (; carry; n++) {
    const uint32_t old = *n;
    *n = old ^ carry;
    carry &= old;
  }
}""",
    "WORD": _WORD,
    "gather": """\
/* A convolution of codes. A pixel of its input, map, has `words` times `size` channels
   in `planes` bit-planes, which are `pixel` words. There are `gap` words between two
   neighboring pixels of a window. A word of the weights has one bit of 32 output
   channels, which are a block. `lanes` blocks are a group, and have `block` words each.
   The words of a group are `levels` parts of `part` words, for the bits from 2^bit on.
   A part has `lanes` words for each input of a window, and then zeros for one more.

   A list has positions in a part. They grow by `pace` from a word of the map to the
   next one, and begin at -`ahead` for bits that a word of fewer channels does not
   have. A list is full at `full`, with a multiple of 16 positions. The sums are
   computed in n. A sum has `slices` words in an array of `kept` words. Those of the
   next block are `span` words further on. The state of a window is the sum of its row's
   and its column's number in border. Columns begin at `borders`. The sums of a state
   begin with the number in most. In each state but 0, edges have `edge` slices of the
   sum over the inputs outside. The words of the next window are `beside` further on.
   `all` has the bits of a word. */
typedef struct {
  const uint32_t *map, *weights, *edges;
  const uint8_t *border;
  const int32_t *most;
  uint32_t *n;
  uint16_t *list, *full;
  int height, width, words, planes, size, pixel, pace, ahead, gap;
  int rows, columns, down, right, stride, sideways, above, before;
  int block, lanes, part, levels, bit, scale, kept, span, slices, edge, states;
  int borders, beside;
  uint32_t all, flip;
} Conv;

/* Two windows, the first of which begins at `top` and `side`. The ranges of their rows
   and columns are inside the input, and they are in `states`. The weights of the inputs
   whose bit is set in the map, or clear if that bit of flip is set, are added to the
   slices n of some blocks from b on. Each one counts 2^bit in `found`. */
typedef struct {
  const volatile Conv *of;
  const uint32_t *map, *weights;
  uint32_t *n, flip;
  int32_t found;
  int16_t b, blocks, bit, top, side;
  int16_t rows[2], columns[2][2];
  uint8_t states[2];
} Window;

/* IN_ORDER keeps a compiler from reading more words at once than the registers can
   hold. AS_IT_IS keeps it from cutting all terms of a sum to 16 bits. */
#ifdef __GNUC__
#define IN_ORDER __asm__ volatile("" ::: "memory");
#define AS_IT_IS(x) __asm__("" : "+r"(x));
#else
#define IN_ORDER
#define AS_IT_IS(x)
#endif

/* Adds the bits of b and c to those of a. The carries are stored in high. */
#define CARRY(high, a, b, c) \\
  high = b ^ c; \\
  c &= b; \\
  b = high & a; \\
  a ^= high; \\
  high = b | c;
#define ADD2(load, high, k) \\
  b1 = load(w + x[k]); \\
  c1 = load(w + x[k + 1]); \\
  IN_ORDER \\
  CARRY(high, ones1, b1, c1)
#define ADD4(load, high, k) \\
  ADD2(load, b2, k) ADD2(load, c2, k + 2) CARRY(high, ones2, b2, c2)
#define ADD8(load, high, k) \\
  ADD4(load, b4, k) ADD4(load, c4, k + 4) CARRY(high, ones4, b4, c4)

/* Adds the listed weights to the slices n of a block. */
static void column(uint32_t *n, const uint32_t *w, const uint16_t *list,
                   const uint16_t *end) {
  uint32_t ones1 = n[0], ones2 = n[1], ones4 = n[2], ones8 = n[3], high;
  uint32_t b1, b2, b4, b8, c1, c2, c4, c8;
  const uint16_t *x;
  for (x = list; x < end; x += 16) {
    ADD8(*, b8, 0)
    ADD8(*, c8, 8)
    CARRY(high, ones8, b8, c8)
    ripple(n + 4, high);
  }
  n[0] = ones1;
  n[1] = ones2;
  n[2] = ones4;
  n[3] = ones8;
}

@HELIUM@
/* Adds the weights of the inputs that are listed before `end`, a multiple of 16. The
   window is volatile, so that it stays in memory and leaves registers to the sums. */
APART static void add(volatile Window *s, const uint16_t *end) {
  const uint32_t *w = s->weights;
  uint32_t *n = s->n;
  int b, level, k;
  for (b = s->blocks; b > 0; b -= s->of->lanes, n += s->of->lanes * s->of->span) {
    for (level = 0; level < s->of->levels; level++, w += s->of->part) {
#ifdef HELIUM
      if (s->of->lanes > 1) {
        columns(n + level, s->of->lanes, s->of->span, w, s->of->list, end);
        continue;
      }
#endif
      for (k = 0; k < s->of->lanes; k++)
        column(n + level + k * s->of->span, w + k, s->of->list, end);
    }
  }
  s->found = s->found + (int32_t)(end - s->of->list) * (1 << s->bit);
}

/* Lists the input of the highest bit that is set, and clears the bit. */
#define LIST \\
  const int zeros = first(bits); \\
  int number = next + zeros * lanes; \\
  AS_IT_IS(number) \\
  bits &= ~(0x80000000u >> zeros); \\
  *end++ = (uint16_t)number;

/* Lists inputs whose bit is set, and adds their weights whenever the list is full. If e
   is -1, they are those of both windows. Otherwise they are those of window e alone.
   The list is only compared with its end if it might become full within a word. */
APART static void gather(volatile Window *s, int e) {
  const volatile Conv *const of = s->of;
  const int second = e > 0, side = s->side + second * of->sideways;
  const int from = s->columns[second][0], to = s->columns[e < 0 ? 1 : second][1];
  uint16_t *end = of->list;
  int i, j, k;
  for (i = s->rows[0]; i < s->rows[1] && from < to; i++) {
    const int at = (s->top + i * of->down) * of->width + side + from * of->right;
    const uint32_t *x = s->map + at * of->pixel;
    int next = (i * of->columns + from) * of->words * of->pace - of->ahead;
    for (j = from; j < to; j++, x += of->gap) {
      const int both = j >= s->columns[0][0] && j < s->columns[1][1];
      const int other = both * (second ? -of->beside : of->beside);
      const uint32_t flop = both && e >= 0 ? s->flip ^ of->all : s->flip;
      for (k = of->words; k > 0; k--, x += of->planes, next += of->pace) {
        uint32_t bits = (WORD(x) ^ s->flip) & (WORD(x + other) ^ flop);
        const int lanes = of->lanes;
        if (of->full - end < 32) {
          while (bits) {
            LIST
            if (end == of->full) {
              add(s, end);
              end = of->list;
            }
          }
        }
        while (bits) {
          LIST
        }
      }
    }
  }
  while ((end - of->list) & 15) {
    *end++ = (uint16_t)(of->part - of->lanes);
    s->found = s->found - (1 << s->bit);
  }
  add(s, end);
}""",
    "fill": """\
/* The pointer is volatile, so that no compiler calls memset, which is in a library. */
static void fill(volatile uint32_t *n, int words, uint32_t word) {
  for (; words > 0; words--) *n++ = word;
}""",
    "copy": """\
/* Copies some slices to the words after them. */
static void copy(volatile uint32_t *n, int slices) {
  int k;
  for (k = 0; k < slices; k++) n[slices + k] = n[k];
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
    "sums": """\
/* Sets the range of positions in a window that are inside an input of some size. There
   are range[1] of them, and position i is at + i * step. */
APART static void inside(volatile int16_t *range, int at, int step, int size) {
  int i = 0, j = range[1];
  while (i < j && at + i * step < 0) i++;
  while (j > i && at + (j - 1) * step >= size) j--;
  range[0] = (int16_t)i;
  range[1] = (int16_t)j;
}

/* Completes the slices n of the blocks of a window, which is in some state. */
APART static void finish(const volatile Window *s, uint32_t *n, int state) {
  const volatile Conv *const of = s->of;
  int b, k;
  for (b = s->b; b < s->b + s->blocks; b++, n += of->span) {
    if (state) {
      const uint32_t *const edge = of->edges + (b * of->states + state - 1) * of->edge;
      for (k = 0; k < of->edge; k++) ripple(n + of->bit + k, edge[k]);
    }
    increase(n, of->slices, of->most[state] - of->scale * s->found);
  }
}

/* Computes the slices of 32 sums for the window of (y, x), and those for (y, x + 1) if
   there are two, for each of some blocks of channels from b on. The inputs that apply
   to both windows come first and are added once. Then come those of each window
   alone. */
APART static void sums(const volatile Conv *of, int y, int x, int b, int blocks,
                       int two) {
  const uint8_t *const border = of->border;
  volatile Window s;
  int32_t shared = 0;
  int e, k, part;
  s.of = of;
  s.weights = of->weights + b * of->block;
  s.b = (int16_t)b;
  s.blocks = (int16_t)blocks;
  s.top = (int16_t)(y * of->stride - of->above);
  s.side = (int16_t)(x * of->sideways - of->before);
  s.rows[1] = (int16_t)of->rows;
  inside(s.rows, s.top, of->down, of->height);
  s.columns[1][1] = 0;
  for (e = 0; e <= two; e++) {
    s.columns[e][1] = (int16_t)of->columns;
    inside(s.columns[e], s.side + e * of->sideways, of->right, of->width);
    s.states[e] = 0;
    if (border) s.states[e] = (uint8_t)(border[y] + border[of->borders + x + e]);
  }
  for (k = 0; k < blocks; k++) fill(of->n + k * of->span, of->kept, 0);
  for (e = -two; e <= two; e++) {
    s.found = shared;
    for (part = 0; part < (of->planes < 3 ? of->planes : 4); part++) {
      s.bit = (int16_t)(part + (of->planes == 1));
      s.map = of->map + (of->planes < 3 ? part : 0);
      s.n = of->n + (e > 0) * of->kept + s.bit + of->bit;
      s.flip = of->planes == 1 ? of->flip : part == 2 * (of->planes - 2) ? of->all : 0;
      gather(&s, e);
    }
    if (e < 0) {
      shared = s.found;
      for (k = 0; k < blocks; k++) copy(of->n + k * of->span, of->kept);
    } else {
      finish(&s, of->n + e * of->kept, s.states[e]);
    }
  }
}""",
    "look_up": """\
/* Adds sums over four inputs u, times 2^k, to 32 integers. A nibble of the weights says
   which of the inputs an output channel adds. Each input and each integer is a pair of
   16 bits, for two windows. */
APART static void look_up(uint32_t *sums, const uint32_t *w, const uint32_t *u, int k) {
  const uint32_t a = u[0] << k, b = u[1] << k, c = u[2] << k, d = u[3] << k;
  const uint32_t ab = a + b, cd = c + d;
  const uint32_t table[16] = {0,  a,      b,      ab,
                              c,  a + c,  b + c,  ab + c,
                              d,  a + d,  b + d,  ab + d,
                              cd, a + cd, b + cd, ab + cd};
  int i;
  for (i = 0; i < 4; i++, sums += 8) {
    const uint32_t v = w[i];
    sums[0] += table[v & 15];
    sums[1] += table[v >> 4 & 15];
    sums[2] += table[v >> 8 & 15];
    sums[3] += table[v >> 12 & 15];
    sums[4] += table[v >> 16 & 15];
    sums[5] += table[v >> 20 & 15];
    sums[6] += table[v >> 24 & 15];
    sums[7] += table[v >> 28];
  }
}""",
    "transpose": """\
/* Swaps the bits of a in the mask, shifted to the left, with those of b in the mask. */
#define SWAP(a, b, shift, mask) { \\
  const uint32_t differ = ((a >> shift) ^ b) & mask; \\
  b ^= differ; \\
  a ^= differ << shift; \\
}
/* Swaps bits of words that are 2 * step apart, then those that are step apart. */
#define SWAP_FOUR(p, step, wide, narrow) { \\
  uint32_t a = (p)[0], b = (p)[step], c = (p)[2 * step], d = (p)[3 * step]; \\
  SWAP(a, c, 2 * step, wide) \\
  SWAP(b, d, 2 * step, wide) \\
  SWAP(a, b, step, narrow) \\
  SWAP(c, d, step, narrow) \\
  (p)[0] = a; \\
  (p)[step] = b; \\
  (p)[2 * step] = c; \\
  (p)[3 * step] = d; \\
}

/* Turns 32 integers into slices: for each k, bit 2^k of the number of a word is swapped
   with bit 2^k of the number of a bit. */
APART static void transpose(uint32_t *n) {
  uint32_t *const end = n + 32, *p;
  for (p = n; p < n + 8; p++) SWAP_FOUR(p, 8, 0x0000ffffu, 0x00ff00ffu)
  for (p = n; p < end; p += 8) {
    SWAP_FOUR(p, 2, 0x0f0f0f0fu, 0x33333333u)
    SWAP_FOUR(p + 1, 2, 0x0f0f0f0fu, 0x33333333u)
  }
  for (p = n; p < end; p += 2) SWAP(p[0], p[1], 1, 0x55555555u)
}""",
    "keep3": """\
/* Stores codes of 3 bits, which are 3 minus the number of words whose bit is set. */
static void keep3(uint32_t *p, const uint32_t *l) {
  const uint32_t ab = l[0] ^ l[1], de = l[3] ^ l[4], abc = ab ^ l[2], def = de ^ l[5];
  const uint32_t high = (l[0] & l[1]) | (ab & l[2]);
  const uint32_t high2 = (l[3] & l[4]) | (de & l[5]);
  const uint32_t carry = abc & def, differ = high ^ high2;
  const uint32_t one = abc ^ def, two = differ ^ carry;
  const uint32_t four = (high & high2) | (differ & carry);
  p[0] = ~one;
  p[1] = (four & (one | two)) | ~(four | two);
  p[2] = four;
}""",
    "below": """\
/* Returns the channels whose integer is less in a than in b. */
APART static uint32_t below(const uint32_t *a, const uint32_t *b, int slices) {
  uint32_t less = 0;
  for (; slices > 0; slices--, a++, b++) less ^= (*a ^ *b) & (less ^ *b);
  return less;
}""",
}


def helpers(writer) -> dict[str, str]:
  """Returns the C functions that a writer's network may need, by name."""
  sliced = [value for value in writer.sliced.values() if value.input]
  word = _WORD3 if any(writer.memory.bits(v.input) == 3 for v in sliced) else _WORD
  helium = _HELIUM if any(value.lanes > 1 for value in sliced) else ""
  gather = HELPERS["gather"].replace("@HELIUM@\n", helium)
  return HELPERS | {"WORD": word, "gather": gather}


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
