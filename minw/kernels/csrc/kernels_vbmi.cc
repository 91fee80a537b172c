// Lookups in tables of 64 and 128 bytes, for AVX-512 with VBMI: Ice Lake, Zen 4 and
// later. They are for activations or weights of 3 bits.
//
// The instructions vpermb and vpermi2b look up 64 bytes at once, in tables of 64 or 128
// bytes. A step takes a few input channels of a tap. The output pixel selects a table,
// which has an entry for each choice of weights that these channels can have: the sum
// of their products. Each output channel takes the entry of its own weights:
//
//                    output channels: index of an entry
//                    i0   i1   ...  i63
//   pixel -> table   entries are added to the sums of the pixel
//
// Numbers. The weights of a step are the digits of the index, and those of the first
// channel are the lowest digit. Bits are digits of base 2 (-1, 1 -> 0, 1), codes of 2
// bits are digits of base 3 (-1, 0, 1 -> 0, 1, 2), and codes of 3 bits are digits of
// base 7 (-3, ..., 3 -> 0, ..., 6). Activations of all bits are codes of 3 bits, too.
// Those of two channels are a number, which selects one of 49 tables for its part of
// the index. The table of a step is the sum of the tables of its pairs:
//
//   weights   channels   index     tables         steps that fit a byte
//   1 bit     6          0...63    49 + 49 + 49   5
//   2 bits    4          0...80    49 + 49        7
//   3 bits    2          0...48    49             3, or 15 if activations are 1 at most
//
// The digit of 0 stands for channels past the last one and for pixels of padding.
#include "kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>

namespace minw {
namespace {

#include "avx512.inc"

// Vectors.
#include "vectors.inc"

// The intrinsic without a mask makes GCC 12 warn about its own header.
MINW_INLINE Bytes permuted(Bytes index, Bytes table) {
  return (Bytes)_mm512_maskz_permutexvar_epi8(~__mmask64{0}, (__m512i)index,
                                              (__m512i)table);
}

// Digits of activations, and numbers of two of them.
constexpr int kBase = 7, kNumbers = kBase * kBase;

constexpr int base_of(int w_bits) { return w_bits == 1 ? 2 : w_bits == 2 ? 3 : kBase; }

// The tables of two neighboring channels. The first one has digit kPlace of the index.
template <int kWBits, int kPlace, int kEntries>
struct Tables {
  alignas(64) int8_t of[kNumbers][kEntries];

  constexpr Tables() : of() {
    for (int number = 0; number < kNumbers; number++)
      for (int index = 0; index < kEntries; index++) {
        int digits = index;
        for (int i = 0; i < kPlace; i++) digits /= base_of(kWBits);
        const int first = level(number % kBase - 3), second = level(number / kBase - 3);
        of[number][index] = static_cast<int8_t>(
            first * weight(digits) + second * weight(digits / base_of(kWBits)));
      }
  }

  // The level of the lowest digit.
  static constexpr int weight(int digits) {
    const int digit = digits % base_of(kWBits);
    return kWBits == 1 ? 2 * digit - 1 : level(digit - base_of(kWBits) / 2);
  }
};

// A table in registers.
template <int kEntries>
struct Table {
  static constexpr int kVectors = kEntries / kVector;
  Bytes of[kVectors];

  MINW_INLINE void add(const int8_t* from) {
    MINW_UNROLLED(i, kVectors) of[i] += load<Bytes>(from + i * kVector);
  }
  MINW_INLINE Bytes operator[](Bytes index) const {
    if constexpr (kVectors == 1)
      return permuted(index, of[0]);
    else
      return (Bytes)_mm512_permutex2var_epi8((__m512i)of[0], (__m512i)index,
                                             (__m512i)of[1]);
  }
};

// How the numbers of a pixel make the table of a step.
template <int kABits, int kWBits>
struct Scheme {
  static constexpr int kChannels = table_channels(kWBits), kParts = kChannels / 2;
  static constexpr int kEntries = kWBits == 2 ? 128 : 64;
  // Steps whose sums, and 128, fit a byte.
  static constexpr int kLargest =
      kChannels * (kABits == 3 ? 4 : 1) * (kWBits == 3 ? 4 : 1);
  static constexpr int kSteps = 127 / kLargest;

  template <int kPart>
  static constexpr Tables<kWBits, 2 * kPart, kEntries> kTables{};

  static MINW_INLINE Table<kEntries> table(const uint8_t* numbers) {
    Table<kEntries> table = {};
    table.add(kTables<0>.of[numbers[0]]);
    if constexpr (kParts > 1) table.add(kTables<1>.of[numbers[1]]);
    if constexpr (kParts > 2) table.add(kTables<2>.of[numbers[2]]);
    return table;
  }
};

// Adds words, less a constant, to as many sums.
MINW_INLINE void add_words(Shorts words, int32_t less, const int32_t* from,
                           int32_t* to) {
  Vec<uint16_t, kVector / 2> halves[2];
  __builtin_memcpy(halves, &words, sizeof words);
  MINW_UNROLLED(i, 2)
    store(to + i * kInts, load<Ints>(from + i * kInts) +
                              __builtin_convertvector(halves[i], Ints) - less);
}

// Steps of a block, whose indices stay in the cache. At most 257 sums of bytes fit the
// words.
constexpr int kBlockSteps = 210;

// Adds the products of kPixels pixels and kColumns vectors of output channels to the
// sums, for the steps [begin, end).
//
// Entries are added in bytes, which begin at 128 so that they are not negative, and
// these are added in words. A pair of bytes read as one word is lower + 256 * upper.
// The sum of these words modulo 2^16, and that of `upper` alone, give both:
//
//   lower = (sum of lower + 256 * upper) - 256 * (sum of upper)    modulo 2^16
template <class S, int kPixels, int kColumns>
MINW_INLINE void tile(const Conv& c, const char* weights, int pixel, int begin, int end,
                      int group, const Work& work) {
  const uint8_t* rows[kPixels];
  MINW_UNROLLED(p, kPixels)
    rows[p] = reinterpret_cast<const uint8_t*>(work.pixels[pixel + p]);
  Shorts words[kPixels][kColumns] = {}, upper[kPixels][kColumns] = {};
  const char* index = weights + size_t{1} * begin * c.width;
  int flushes = 0;
  for (int step = begin; step < end; flushes++) {
    const int last = smaller(step + S::kSteps, end);
    Bytes sums[kPixels][kColumns];
    MINW_UNROLLED(p, kPixels)
      MINW_UNROLLED(v, kColumns) sums[p][v] = Bytes{} + 128;
    for (; step < last; step++, index += c.width) {
      const int32_t offset = c.offsets[step];
      Bytes indices[kColumns];
      MINW_UNROLLED(v, kColumns) {
        indices[v] = load<Bytes>(index + v * kVector);
        MINW_KEEP(indices[v]);
      }
      MINW_UNROLLED(p, kPixels) {
        const auto table = S::table(rows[p] + offset);
        MINW_UNROLLED(v, kColumns) sums[p][v] += table[indices[v]];
      }
    }
    MINW_UNROLLED(p, kPixels)
      MINW_UNROLLED(v, kColumns) {
        words[p][v] += (Shorts)sums[p][v];
        upper[p][v] += (Shorts)sums[p][v] >> 8;
      }
  }
  const int32_t less = 128 * flushes;
  MINW_UNROLLED(p, kPixels) {
    int32_t* to = work.acc + (pixel + p) * c.width;
    const int32_t* from = begin ? to : work.base[pixel + p] + group * c.width;
    MINW_UNROLLED(v, kColumns) {
      const Shorts lower = words[p][v] - (upper[p][v] << 8);
      add_words(lower, less, from + v * kVector, to + v * kVector);
      add_words(upper[p][v], less, from + v * kVector + kVector / 2,
                to + v * kVector + kVector / 2);
    }
  }
}

// All pixels of a chunk and all output channels of a group.
template <class S, int kPixels, int kColumns>
void lookup(const Conv& c, int group, const Work& work, int n) {
  const char* weights = c.weights + group * c.group_bytes;
  for (int begin = 0; begin < c.steps; begin += kBlockSteps) {
    const int end = smaller(begin + kBlockSteps, c.steps);
    int pixel = 0;
    for (; pixel + kPixels <= n; pixel += kPixels)
      tile<S, kPixels, kColumns>(c, weights, pixel, begin, end, group, work);
    for (; pixel < n; pixel++)
      tile<S, 1, kColumns>(c, weights, pixel, begin, end, group, work);
  }
}

// Turns the codes of each two channels into a number.
void encode(const Conv& c, const void* in, int n, char* out, int32_t*) {
  const auto* codes = static_cast<const int8_t*>(in);
  // The first n bits of a mask.
  auto first = [](int n) { return n < 64 ? (__mmask64{1} << n) - 1 : ~__mmask64{0}; };
  const __m512i factors = _mm512_set1_epi16(kBase << 8 | 1);
  for (int i = 0; i < n; i++, codes += c.in.stride, out += c.pixel_bytes)
    for (int k = 0; k < c.pixel_bytes; k += 32) {
      const int left = c.in.c > 2 * k ? c.in.c - 2 * k : 0;
      __m512i x = _mm512_maskz_loadu_epi8(first(left), codes + 2 * k);
      x = _mm512_maddubs_epi16(_mm512_add_epi8(x, _mm512_set1_epi8(3)), factors);
      const auto real = static_cast<__mmask32>(first(smaller(32, c.pixel_bytes - k)));
      _mm512_mask_cvtepi16_storeu_epi8(out + k, real, x);
    }
}

// The border.
#include "border.inc"

// The epilogue.
#include "finish.inc"

// The convolution of a chunk of pixels.
#include "chunks.inc"

template <class S>
Group by_columns(int columns) {
  switch (columns) {
    case 1: return lookup<S, 4, 1>;
    case 2: return lookup<S, 4, 2>;
    case 3: return lookup<S, 2, 3>;
    default: return lookup<S, 2, 4>;
  }
}

const char* choose(Conv* conv) {
  const int columns = conv->width / kVector;
  switch (10 * conv->w_bits + conv->a_bits) {
    case 13:
      conv->group = by_columns<Scheme<3, 1>>(columns);
      return "W1A3 wide table lookup";
    case 23:
      conv->group = by_columns<Scheme<3, 2>>(columns);
      return "W2A3 wide table lookup";
    case 31:
      conv->group = by_columns<Scheme<1, 3>>(columns);
      return "W3A1 wide table lookup";
    case 32:
      conv->group = by_columns<Scheme<1, 3>>(columns);
      return "W3A2 wide table lookup";
    default:
      conv->group = by_columns<Scheme<3, 3>>(columns);
      return "W3A3 wide table lookup";
  }
}

}  // namespace

const Isa kVbmi = {"vbmi", &kAvx512, false,  true,     false, 0,         false,
                   false,  choose,   encode, pad_rows, conv,  threshold, maximum};

}  // namespace minw

#else
const minw::Isa minw::kVbmi = {};
#endif
