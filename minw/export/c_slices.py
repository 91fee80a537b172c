"""C functions that compute with slices, which `minw.export.c_sliced` calls.

`minw.export.c_sliced` says what slices are, and how they are added and compared.
"""

# The macro WORD, for networks without inputs of 3 bits and for those with some.
WORD = "#define WORD(x) (*(x))"
WORD3 = """\
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
HELIUM = """\
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
    "WORD": WORD,
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
