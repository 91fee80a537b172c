// AVX2: x86-64 since Haswell and Zen.
#include "kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>

namespace minw {
namespace {

constexpr int kVector = 32;
constexpr int kFlush = 31, kDotFlush = 256;
constexpr int kPairT = 2, kPlaneT = 3, kManyT = 2;
constexpr int kLaneT = 4, kLaneV = 2, kDotT = 4, kDotV = 2;
#define MINW_KEEP(x) asm volatile("" : "+x"(x))
#define MINW_LOOKUP 1
#define MINW_DOT 1

typedef uint64_t Words __attribute__((vector_size(32)));
typedef int32_t Lanes32 __attribute__((vector_size(32)));
typedef int16_t DotAcc __attribute__((vector_size(32)));  // Two for a channel.

inline Words count(Words x) {
  const __m256i table =
      _mm256_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4, 0, 1, 1, 2, 1, 2,
                       2, 3, 1, 2, 2, 3, 2, 3, 3, 4);
  const __m256i nibble = _mm256_set1_epi8(15);
  __m256i low = _mm256_and_si256((__m256i)x, nibble);
  __m256i high = _mm256_and_si256(_mm256_srli_epi16((__m256i)x, 4), nibble);
  return (Words)_mm256_add_epi8(_mm256_shuffle_epi8(table, low),
                                _mm256_shuffle_epi8(table, high));
}
inline Words total(Words x) {
  return (Words)_mm256_sad_epu8((__m256i)x, _mm256_setzero_si256());
}
inline Words low_halves(Words a, Words b) {
  __m256 mixed = _mm256_shuffle_ps((__m256)a, (__m256)b, 0x88);
  return (Words)_mm256_permute4x64_epi64((__m256i)mixed, 0xd8);
}
inline Words masked(Words a, Words b, Words m) { return (a ^ b) & m; }
inline Words parity(Words a, Words b, Words c) { return a ^ b ^ c; }
inline Words carry(Words a, Words b, Words sum) {
  return (a & b) | ((a ^ b) & ~sum);
}

template <class Bytes>
inline uint64_t signs(Bytes x) {
  return static_cast<uint32_t>(_mm256_movemask_epi8((__m256i)x));
}

template <class Ints>
inline int64_t narrow(Ints x) {
  __m256i shorts = _mm256_packs_epi32((__m256i)x, (__m256i)x);
  __m256i bytes = _mm256_packs_epi16(shorts, shorts);
  return _mm_cvtsi128_si64(_mm_unpacklo_epi32(_mm256_castsi256_si128(bytes),
                                              _mm256_extracti128_si256(bytes, 1)));
}

inline DotAcc dot(DotAcc acc, Lanes32 x, Lanes32 w) {
  return acc + (DotAcc)_mm256_maddubs_epi16((__m256i)x, (__m256i)w);
}
inline Lanes32 dot_total(DotAcc acc) {
  return (Lanes32)_mm256_madd_epi16((__m256i)acc, _mm256_set1_epi16(1));
}

#include "kernels.inc"

// ---- Sums of products by table lookups. In each step of a window, a row (a pixel)
// selects a table of 16 bytes, of which each of 32 columns (the weights of an output
// channel) takes an entry. Where pixels have 1 bit and weights more, they change roles.
// Entries are small counts. If they fit half a byte, a table serves two rows.

// How many of 4 signs differ.
struct Signs {
  alignas(64) uint8_t of[256][16];
  constexpr Signs() : of() {
    for (int row = 0; row < 256; row++)
      for (int w = 0; w < 16; w++)
        of[row][w] = static_cast<uint8_t>(bits(row >> 4 ^ w) << 4 |
                                          bits((row & 15) ^ w));
  }
  static constexpr int bits(int x) {
    return (x & 1) + (x >> 1 & 1) + (x >> 2 & 1) + (x >> 3 & 1);
  }
};

// 2 less 2 products of trits, so that none is negative.
struct Products {
  alignas(64) uint8_t of[9 * 16][16];
  constexpr Products() : of() {
    for (int row = 0; row < 9 * 16; row++)
      for (int w = 0; w < 9; w++)
        of[row][w] = static_cast<uint8_t>(rest(row >> 4, w) << 4 | rest(row & 15, w));
  }
  static constexpr int rest(int a, int w) {
    return 2 - (a % 3 - 1) * (w % 3 - 1) - (a / 3 - 1) * (w / 3 - 1);
  }
};

// The magnitudes of kDigits codes whose signs are not the column's: of all 4 channels,
// in the lower or the upper half of a byte; or of the first or the last 2.
template <int kBase, int kDigits, int kRows>
struct Magnitudes {
  alignas(64) uint8_t of[2][kRows][16];
  constexpr Magnitudes() : of() {
    for (int row = 0; row < kRows; row++)
      for (int w = 0; w < 16; w++) {
        of[0][row][w] = static_cast<uint8_t>(against(row, w));
        of[1][row][w] = static_cast<uint8_t>(
            kDigits == 4 ? against(row, w) << 4 : against(row, w >> 2));
      }
  }
  static constexpr int against(int row, int w) {
    int sum = 0;
    for (int i = 0; i < kDigits; i++, row /= kBase, w >>= 1) {
      int code = row % kBase - kBase / 2, size = code < 0 ? -code : code;
      if (code && (code > 0) != (w & 1)) sum += size == 3 ? 4 : size;
    }
    return sum;
  }
};

constexpr Signs kSigns;
constexpr Products kProducts;
constexpr Magnitudes<3, 4, 81> kTrits;
constexpr Magnitudes<7, 2, 49> kLevels;

using Bytes = Vec<uint8_t, 32>;
using Shorts = Vec<uint16_t, 32>;

MINW_INLINE Bytes both_halves(const uint8_t* from) {
  return (Bytes)_mm256_broadcastsi128_si256(load<__m128i>(from));
}

// How rows select tables: two by one byte, or each by bytes that are kStride apart and
// twice the place, as addresses can have 8 times a register.
template <class Table, const Table* kTable>
struct Joint {
  static constexpr int kRows = 2, kStep = 1, kPacked = true;
  static MINW_INLINE Bytes table(const uint8_t* high, const uint8_t*) {
    return both_halves(kTable->of[*high]);
  }
};
template <int kStride>
struct OfTrits {
  static constexpr int kRows = 1, kStep = kStride, kPacked = true;
  static MINW_INLINE Bytes table(const uint8_t* high, const uint8_t* low) {
    return both_halves(kTrits.of[1][0] + size_t{*high} * 8) |
           both_halves(kTrits.of[0][0] + size_t{*low} * 8);
  }
};
template <int kStride>
struct OfLevels {
  static constexpr int kRows = 1, kStep = 2 * kStride, kPacked = false;
  static MINW_INLINE Bytes table(const uint8_t* row) {
    return both_halves(kLevels.of[0][0] + size_t{row[0]} * 8) +
           both_halves(kLevels.of[1][0] + size_t{row[kStride]} * 8);
  }
};

struct Operands {
  const uint8_t* rows;  // Each kRows are row_stride apart.
  ptrdiff_t row_stride;
  const uint8_t* columns;  // [step][stride]
  ptrdiff_t stride;
};

struct LookupTile {
  int row, rows;  // One or two.
  int column;
  int begin, end;  // Steps.
  uint16_t* sums;
  int sum_stride;
};

// One or two rows by 32 V columns. Sums are kept as those of pairs of bytes, modulo
// 2^16, and of the upper ones.
template <class S, int V>
MINW_INLINE void look_up(const Operands& o, const LookupTile& tile) {
  constexpr int kStep = S::kStep;
  const uint8_t* high = o.rows + tile.row / S::kRows * o.row_stride +
                        tile.begin * kStep;
  const uint8_t* low = tile.rows > 1 && S::kRows == 1 ? high + o.row_stride : high;
  const uint8_t* w = o.columns + tile.begin * o.stride + tile.column;
  auto entries = [](Bytes table, Bytes x) __attribute__((always_inline)) {
    return (Bytes)_mm256_shuffle_epi8((__m256i)table, (__m256i)x);
  };
  auto look = [&](Bytes table, const uint8_t* at) __attribute__((always_inline)) {
    return entries(table, load<Bytes>(at));
  };
  Bytes counts[2][V] = {};
  int n = tile.end - tile.begin;
  if constexpr (S::kPacked) {
    // The lower row's are the sums of both, modulo 256, until the end.
    auto add = [&](int v, Bytes x) __attribute__((always_inline)) {
      counts[0][v] += (Bytes)((Shorts)x >> 4) & 15;
      counts[1][v] += x;
    };
    // Three counts of up to 4 fit half a byte.
    for (; n >= 3; n -= 3, high += 3 * kStep, low += 3 * kStep, w += 3 * o.stride) {
      Bytes a = S::table(high, low), b = S::table(high + kStep, low + kStep);
      Bytes d = S::table(high + 2 * kStep, low + 2 * kStep);
      const uint8_t *w1 = w + o.stride, *w2 = w1 + o.stride;
      MINW_UNROLL
      for (int v = 0; v < V; v++)
        add(v, look(a, w + v * 32) + look(b, w1 + v * 32) + look(d, w2 + v * 32));
    }
    for (; n > 0; n--, high += kStep, low += kStep, w += o.stride) {
      Bytes a = S::table(high, low);
      MINW_UNROLL
      for (int v = 0; v < V; v++) add(v, look(a, w + v * 32));
    }
    MINW_UNROLL
    for (int v = 0; v < V; v++) counts[1][v] -= counts[0][v] * 16;
  } else {
    _Pragma("GCC unroll 3")
    for (; n > 0; n--, high += kStep, low += kStep, w += o.stride) {
      Bytes a = S::table(high), b = S::table(low);
      MINW_UNROLL
      for (int v = 0; v < V; v++) {
        Bytes x = load<Bytes>(w + v * 32);
        MINW_KEEP(x);  // Or it would be loaded for each row.
        counts[0][v] += entries(a, x);
        counts[1][v] += entries(b, x);
      }
    }
  }
  MINW_UNROLL
  for (int t = 0; t < 2; t++)
    if (t < tile.rows) {
      uint16_t* to = tile.sums + t * tile.sum_stride;
      MINW_UNROLL
      for (int v = 0; v < V; v++, to += 32) {
        Shorts x = (Shorts)counts[t][v], upper = x >> 8;
        if (tile.begin) {
          x += load<Shorts>(to);
          upper += load<Shorts>(to + 16);
        }
        store(to, x);
        store(to + 16, upper);
      }
    }
}

// All rows and columns, in blocks of steps, of which columns stay in the cache and
// counts fit a byte; then `counts` is [row][width].
template <class S>
MINW_INLINE void look_up_all(const Operands& o, int steps, int rows, int columns,
                             int width, uint16_t* counts) {
  constexpr int kBlock = S::kPacked ? 63 : 15;
  for (int begin = 0; begin < steps; begin += kBlock) {
    const int end = smaller(begin + kBlock, steps);
    for (int row = 0; row < rows; row += 2) {
      for (int column = 0, size; column < columns; column += size) {
        const LookupTile tile = {row,   smaller(2, rows - row),        column, begin,
                                 end,   counts + row * width + column, width};
        size = columns - column >= 128 ? 128 : columns - column >= 64 ? 64 : 32;
        if (size == 128)
          look_up<S, 4>(o, tile);
        else if (size == 64)
          look_up<S, 2>(o, tile);
        else
          look_up<S, 1>(o, tile);
      }
    }
  }
  for (int row = 0; row < rows; row++)
    for (int column = 0; column < columns; column += 32) {
      uint16_t* at = counts + row * width + column;
      Shorts upper = load<Shorts>(at + 16);
      Shorts lower = load<Shorts>(at) - (upper << 8);
      __m256i first = _mm256_unpacklo_epi16((__m256i)lower, (__m256i)upper);
      __m256i last = _mm256_unpackhi_epi16((__m256i)lower, (__m256i)upper);
      store(at, _mm256_permute2x128_si256(first, last, 0x20));
      store(at + 16, _mm256_permute2x128_si256(first, last, 0x31));
    }
}

MINW_INLINE Lanes32 widened(__m128i x) { return (Lanes32)_mm256_cvtepu16_epi32(x); }

// Shorts: [8][8]. Bytes: [8][2][8] -> [8][8][2].
template <class E>
MINW_INLINE void transpose(__m128i* x) {
  MINW_UNROLL
  for (int round = 0; round < 3; round++) {  // Each interleaves the halves of x.
    __m128i y[8];
    MINW_UNROLL
    for (int k = 0; k < 4; k++)
      if constexpr (sizeof(E) == 1) {
        y[2 * k] = _mm_unpacklo_epi8(x[k], x[k + 4]);
        y[2 * k + 1] = _mm_unpackhi_epi8(x[k], x[k + 4]);
      } else {
        y[2 * k] = _mm_unpacklo_epi16(x[k], x[k + 4]);
        y[2 * k + 1] = _mm_unpackhi_epi16(x[k], x[k + 4]);
      }
    __builtin_memcpy(x, y, sizeof y);
  }
}

template <class S, int kTimes>
void lookup(const Conv& c, int group, const Work& work, int n) {
  const char* weights = c.weights + group * c.group_bytes;
  const ptrdiff_t row = c.row_bytes;
  for (int first = 0; first < n; first += kRowBlock) {
    const int rows = smaller(kRowBlock, n - first);
    look_up_all<S>({work.gathered + first / S::kRows * row, row,
                    reinterpret_cast<const uint8_t*>(weights), c.width},
                   c.steps, rows, c.width, c.width, work.counts);
    for (int p = 0; p < rows; p++)
      for (int i = 0; i < c.width; i += 8) {
        Lanes32 x = widened(load<__m128i>(work.counts + p * c.width + i)) * kTimes;
        Lanes32 base = load<Lanes32>(work.base[first + p] + group * c.width + i);
        store(work.acc + (first + p) * c.width + i, base + work.sums[first + p] - x);
      }
  }
}

// Rows are output channels, columns are pixels, of which all of 32 are made.
template <class S>
void swapped_lookup(const Conv& c, int group, const Work& work, int n) {
  const int channels = smaller(kRowBlock, c.out.stride - group * c.width);
  const char* weights = c.weights + group * c.group_bytes;
  look_up_all<S>({reinterpret_cast<const uint8_t*>(weights), 1, work.gathered, kChunk},
                 c.steps, channels, (n + 31) / 32 * 32, kChunk, work.counts);
  for (int p = 0; p < n; p += 8)
    for (int i = 0; i < channels; i += 8) {
      __m128i x[8];
      for (int k = 0; k < 8; k++)
        x[k] = load<__m128i>(work.counts + (i + k) * kChunk + p);
      transpose<uint16_t>(x);
      for (int k = 0; k < smaller(8, n - p); k++) {
        Lanes32 base = load<Lanes32>(work.base[p + k] + group * c.width + i);
        store(work.acc + (p + k) * c.width + i, base - widened(x[k]) * 2);
      }
    }
}

// What rows select tables with.
void gather_rows(const Conv& c, const Work& work, int n) {
  const int taps = c.window.h * c.window.w, steps = c.steps / taps;
  const int bytes = steps * (c.a_bits == 3 ? 2 : 1);
  const bool joint = c.a_bits == c.w_bits;
  uint8_t* row = work.gathered;
  for (int p = 0; p < n; p += joint ? 2 : 1, row += c.row_bytes) {
    const char* pixel = work.pixels[p];
    const char* other = work.pixels[smaller(p + 1, n - 1)];
    for (int tap = 0; tap < taps; tap++)
      for (int k = 0; k < bytes; k += 32) {  // What is past the last is written over.
        const ptrdiff_t offset = c.offsets[tap * steps] + k;
        Bytes x = load<Bytes>(pixel + offset);
        if (joint) x |= load<Bytes>(other + offset) >> 4;
        store(row + tap * bytes + k, x);
      }
  }
}

// The entries that columns take.
void gather_columns(const Conv& c, const Work& work, int n) {
  const int taps = c.window.h * c.window.w, steps = c.steps / taps;
  for (int tap = 0; tap < taps; tap++)
    for (int k = 0; k < steps; k += 8) {  // What is past the last is written over.
      const ptrdiff_t offset = c.offsets[tap * steps + k];
      uint8_t* to = work.gathered + (tap * steps + k) * kChunk;
      for (int p = 0; p < n; p += 16) {
        auto pixel = [&](int i) {
          return _mm_cvtsi64_si128(
              load<int64_t>(work.pixels[smaller(p + i, n - 1)] + offset));
        };
        __m128i x[8];
        for (int i = 0; i < 8; i++) x[i] = _mm_unpacklo_epi8(pixel(i), pixel(i + 8));
        transpose<uint8_t>(x);
        for (int i = 0; i < 8; i++) store(to + i * kChunk + p, x[i]);
      }
    }
}

void gather(const Conv& c, const Work& work, int n) {
  c.swapped ? gather_columns(c, work, n) : gather_rows(c, work, n);
}

Group lookups(const Conv& c) {
  if (c.swapped && c.w_bits == 2) return swapped_lookup<OfTrits<kRowBlock>>;
  if (c.swapped) return swapped_lookup<OfLevels<kRowBlock>>;
  if (c.a_bits == 1) return lookup<Joint<Signs, &kSigns>, 2>;
  if (c.a_bits == 3) return lookup<OfLevels<1>, 2>;
  if (c.w_bits == 1) return lookup<OfTrits<1>, 2>;
  return lookup<Joint<Products, &kProducts>, 1>;
}

// Codes are digits of numbers of 2 or 4 channels; those of `Joint` are times 16,
// those of single rows times 2.
void fold(const Conv& c, const int8_t* codes, int n, char* out, int32_t* magnitudes) {
  const int base = c.a_bits == 1 ? 2 : c.a_bits == 2 ? 3 : 7;
  const bool fours = c.a_bits < 3 && c.fold == 4;
  const int unit = c.swapped ? 1 : c.a_bits == c.w_bits ? 16 : 2;
  const __m128i twos = _mm_set1_epi16(static_cast<int16_t>(base * unit << 8 | unit));
  const __m128i pairs = _mm_set1_epi32(base * base << 16 | 1);
  const __m128i one = _mm_set1_epi8(1), zero = _mm_setzero_si128();
  const __m128i lane =
      _mm_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  for (int i = 0; i < n; i++, codes += c.in.stride) {
    __m128i sum = zero;
    for (int k = 0; k < c.in.stride; k += 16) {
      __m128i left = _mm_set1_epi8(static_cast<char>(smaller(c.in.c - k, 16)));
      __m128i x = _mm_and_si128(load<__m128i>(codes + k), _mm_cmpgt_epi8(left, lane));
      if (magnitudes) {  // A 3 is worth 4.
        __m128i size = _mm_abs_epi8(x);
        size = _mm_sub_epi8(size, _mm_cmpgt_epi8(size, _mm_set1_epi8(2)));
        sum = _mm_add_epi64(sum, _mm_sad_epu8(size, zero));
      }
      x = base == 2 ? _mm_and_si128(_mm_cmpgt_epi8(x, zero), one)
                    : _mm_add_epi8(x, _mm_set1_epi8(static_cast<char>(base / 2)));
      x = _mm_maddubs_epi16(x, twos);
      if (fours) x = _mm_packs_epi32(_mm_madd_epi16(x, pairs), zero);
      x = _mm_packus_epi16(x, zero);
      const int64_t digits = _mm_cvtsi128_si64(x);
      __builtin_memcpy(out, &digits, fours ? 4 : 8);
      out += fours ? 4 : 8;
    }
    if (magnitudes)
      magnitudes[i] = static_cast<int32_t>(
          _mm_cvtsi128_si64(sum) + _mm_extract_epi64(sum, 1));
  }
}

}  // namespace

const Isa kAvx2 = {"avx2", true, true, choose, encode, conv, threshold, peak};

}  // namespace minw

#else
const minw::Isa minw::kAvx2 = {};
#endif
