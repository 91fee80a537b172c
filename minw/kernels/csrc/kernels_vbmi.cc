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
//
// Swapped. For W3A1 a step has 6 channels, too, if output channels select the tables
// and pixels the entries. An index is the bits of 6 activations:
//
//                       output pixels: index of an entry
//                       i0   i1   ...  i63
//   channel -> table    entries are added to the sums of the output channel
//
// An entry is the sum of the magnitudes of weights whose signs differ from those of the
// activations. As in lookup.inc, the sum of products is the sum of all magnitudes less
// twice the sum of the entries. Entries are not negative, so that more of them fit a
// byte. A bit cannot be 0: pixels of padding have that of -1, which `conv.base`
// corrects; see layer.cc.
#include "kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>

namespace minw {
namespace {

#include "avx512.inc"

// Swapped lookups gather what they read.
#undef MINW_LOOKUP
#define MINW_LOOKUP 1

// Vectors, and their transposition.
#include "vectors.inc"

#include "sixteen.inc"

#include "columns.inc"

// The intrinsic without a mask makes GCC 12 warn about its own header.
MINW_INLINE Bytes permuted(Bytes index, Bytes table) {
  return (Bytes)_mm512_maskz_permutexvar_epi8(~__mmask64{0}, (__m512i)index,
                                              (__m512i)table);
}

// Digits of what selects tables, and numbers of two of them.
constexpr int kBase = 7, kNumbers = kBase * kBase;

// The base of the digits of an index, whose codes have so many bits.
constexpr int base_of(int bits) { return bits == 1 ? 2 : bits == 2 ? 3 : kBase; }

// The tables of two neighboring channels. The first one has digit kPlace of the index.
template <int kBits, int kPlace, int kEntries>
struct Tables {
  alignas(64) int8_t of[kNumbers][kEntries];

  constexpr Tables() : of() {
    for (int number = 0; number < kNumbers; number++)
      for (int index = 0; index < kEntries; index++) {
        int digits = index;
        for (int i = 0; i < kPlace; i++) digits /= base_of(kBits);
        const int first = level(number % kBase - 3), second = level(number / kBase - 3);
        of[number][index] = static_cast<int8_t>(
            first * lowest(digits) + second * lowest(digits / base_of(kBits)));
      }
  }

  // The level of the lowest digit.
  static constexpr int lowest(int digits) {
    const int digit = digits % base_of(kBits);
    return kBits == 1 ? 2 * digit - 1 : level(digit - base_of(kBits) / 2);
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

// How numbers make the table of a step: codes of kBits select it, and codes of
// kIndexBits the entries.
template <int kBits, int kIndexBits>
struct Scheme {
  static constexpr int kChannels = table_channels(kIndexBits), kParts = kChannels / 2;
  static constexpr int kEntries = kIndexBits == 2 ? 128 : 64;
  // Steps whose sums, and 128, fit a byte.
  static constexpr int kLargest =
      kChannels * (kBits == 3 ? 4 : 1) * (kIndexBits == 3 ? 4 : 1);
  static constexpr int kSteps = 127 / kLargest;

  template <int kPart>
  static constexpr Tables<kIndexBits, 2 * kPart, kEntries> kTables{};

  static MINW_INLINE Table<kEntries> table(const uint8_t* numbers) {
    Table<kEntries> table = {};
    table.add(kTables<0>.of[numbers[0]]);
    if constexpr (kParts > 1) table.add(kTables<1>.of[numbers[1]]);
    if constexpr (kParts > 2) table.add(kTables<2>.of[numbers[2]]);
    return table;
  }
};

// The sums of a vector of columns. Entries are added in bytes, and these are added in
// words. A pair of bytes read as one word is lower + 256 * upper. The sum of these
// words modulo 2^16, and that of `upper` alone, give both:
//
//   lower = (sum of lower + 256 * upper) - 256 * (sum of upper)    modulo 2^16
struct Sums {
  Shorts words = {}, upper = {};

  MINW_INLINE void add(Bytes sums) {
    words += (Shorts)sums;
    upper += (Shorts)sums >> 8;
  }
  MINW_INLINE Shorts lower() const { return words - (upper << 8); }
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
template <class S, int kPixels, int kColumns>
MINW_INLINE void tile(const Conv& c, const char* weights, int pixel, int begin, int end,
                      int group, const Work& work) {
  const uint8_t* rows[kPixels];
  MINW_UNROLLED(p, kPixels)
    rows[p] = reinterpret_cast<const uint8_t*>(work.pixels[pixel + p]);
  Sums all[kPixels][kColumns];
  const char* index = weights + size_t{1} * begin * c.width;
  int flushes = 0;
  for (int step = begin; step < end; flushes++) {
    const int last = smaller(step + S::kSteps, end);
    Bytes sums[kPixels][kColumns];  // They begin at 128, so as not to be negative.
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
      MINW_UNROLLED(v, kColumns) all[p][v].add(sums[p][v]);
  }
  const int32_t less = 128 * flushes;
  MINW_UNROLLED(p, kPixels) {
    int32_t* to = work.acc + (pixel + p) * c.width;
    const int32_t* from = begin ? to : work.base[pixel + p] + group * c.width;
    MINW_UNROLLED(v, kColumns) {
      add_words(all[p][v].lower(), less, from + v * kVector, to + v * kVector);
      add_words(all[p][v].upper, less, from + v * kVector + kVector / 2,
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

// ---- Swapped.

// The sums of the magnitudes of two weights whose signs differ from those of their
// activations, by the number of the weights. The first activation is bit kPlace of the
// index.
template <int kPlace>
struct Against {
  alignas(64) uint8_t of[kNumbers][64];

  constexpr Against() : of() {
    for (int number = 0; number < kNumbers; number++)
      for (int index = 0; index < 64; index++)
        of[number][index] = static_cast<uint8_t>(
            against(number % kBase - 3, index >> kPlace & 1) +
            against(number / kBase - 3, index >> (kPlace + 1) & 1));
  }

  static constexpr int against(int code, int positive) {
    const int magnitude = level(code < 0 ? -code : code);
    return (code > 0) == positive ? 0 : magnitude;
  }
};
constexpr Against<0> kAgainst0;
constexpr Against<2> kAgainst2;
constexpr Against<4> kAgainst4;

// The order of words that interleaves two vectors: its first and its last half.
template <int kHalf>
struct Zipped {
  uint16_t of[kVector / 2];
  constexpr Zipped() : of() {
    for (int i = 0; i < kVector / 2; i++)
      of[i] = static_cast<uint16_t>(kHalf * kVector / 4 + i / 2 + i % 2 * kVector / 2);
  }
};
constexpr Zipped<0> kFirstZipped;
constexpr Zipped<1> kLastZipped;

// Numbers of a step, and steps whose sums fit a byte: 10 * 6 * 4 < 256.
constexpr int kParts = 3, kSwappedSteps = 10;

// Steps of a block. The indices of a chunk stay in the second cache, and the sums fit a
// uint16: 480 * 24 < 65536.
constexpr int kSwappedBlock = 480;

// The table of an output channel. Numbers are stored doubled; see pack_numbers.
MINW_INLINE Bytes against(const uint8_t* numbers) {
  auto part = [&](const uint8_t* tables, int i) MINW_LAMBDA {
    return load<Bytes>(tables + size_t{numbers[i * kRowBlock]} * (kVector / 2));
  };
  return part(kAgainst0.of[0], 0) + part(kAgainst2.of[0], 1) + part(kAgainst4.of[0], 2);
}

// The tables of kRows output channels look up the indices of kColumns vectors of
// pixels.
template <int kRows, int kColumns>
MINW_INLINE void look_up(const uint8_t* numbers, const uint8_t* index,
                         Bytes (&sums)[kRows][kColumns]) {
  Bytes indices[kColumns];
  MINW_UNROLLED(v, kColumns) {
    indices[v] = load<Bytes>(index + v * kVector);
    MINW_KEEP(indices[v]);
  }
  MINW_UNROLLED(r, kRows) {
    const Bytes table = against(numbers + r);
    MINW_UNROLLED(v, kColumns) sums[r][v] += permuted(indices[v], table);
  }
}

// Computes the sums of kRows output channels and kColumns vectors of pixels for the
// steps [begin, end). They are stored as uint16, [channel][pixel].
template <int kRows, int kColumns>
MINW_INLINE void swapped_tile(const char* weights, int row, int begin, int end,
                              const Work& work) {
  const auto* numbers = reinterpret_cast<const uint8_t*>(weights) +
                        size_t{1} * begin * kParts * kRowBlock + row;
  const uint8_t* index = work.gathered + begin * kChunk;
  Sums all[kRows][kColumns];
  int left = end - begin;
  for (; left >= kSwappedSteps; left -= kSwappedSteps) {
    Bytes sums[kRows][kColumns] = {};
    for (int i = 0; i < kSwappedSteps; i++) {
      look_up(numbers, index, sums);
      numbers += kParts * kRowBlock;
      index += kChunk;
    }
    MINW_UNROLLED(r, kRows)
      MINW_UNROLLED(v, kColumns) all[r][v].add(sums[r][v]);
  }
  Bytes sums[kRows][kColumns] = {};
  for (; left; left--, numbers += kParts * kRowBlock, index += kChunk)
    look_up(numbers, index, sums);
  const __m512i first = _mm512_loadu_si512(kFirstZipped.of);
  const __m512i last = _mm512_loadu_si512(kLastZipped.of);
  MINW_UNROLLED(r, kRows)
    MINW_UNROLLED(v, kColumns) {
      all[r][v].add(sums[r][v]);
      const auto lower = (__m512i)all[r][v].lower(), upper = (__m512i)all[r][v].upper;
      uint16_t* to = work.counts + (row + r) * kChunk + v * kVector;
      store(to, _mm512_permutex2var_epi16(lower, first, upper));
      store(to + kVector / 2, _mm512_permutex2var_epi16(lower, last, upper));
    }
}

// Takes twice the sums of a block from those of the chunk, [pixel][channel].
MINW_INLINE void subtract_transposed(int group, int channels, bool begins,
                                     const Work& work, int n) {
  using Eight = Vec<int32_t, 32>;
  for (int p = 0; p < n; p += 8)
    for (int i = 0; i < channels; i += 8) {
      Sixteen x[8];
      for (int k = 0; k < 8; k++)
        x[k] = load<Sixteen>(work.counts + (i + k) * kChunk + p);
      transpose<uint16_t>(x);
      for (int k = 0; k < smaller(8, n - p); k++) {
        int32_t* to = work.acc + (p + k) * kRowBlock + i;
        const int32_t* from = begins ? work.base[p + k] + group * kRowBlock + i : to;
        const auto sums = __builtin_convertvector((Vec<uint16_t, 16>)x[k], Eight);
        store(to, load<Eight>(from) - sums * 2);
      }
    }
}

// All pixels of a chunk and all output channels of a group.
void swapped_lookup(const Conv& c, int group, const Work& work, int n) {
  const int channels = smaller(kRowBlock, c.out.stride - group * kRowBlock);
  const char* weights = c.weights + group * c.group_bytes;
  for (int begin = 0; begin < c.steps; begin += kSwappedBlock) {
    const int end = smaller(begin + kSwappedBlock, c.steps);
    for (int row = 0; row < channels; row += 2)
      if (n <= kVector)
        swapped_tile<2, 1>(weights, row, begin, end, work);
      else if (n <= 2 * kVector)
        swapped_tile<2, 2>(weights, row, begin, end, work);
      else
        swapped_tile<2, 3>(weights, row, begin, end, work);
    subtract_transposed(group, channels, !begin, work, n);
  }
}

void gather(const Conv& c, const Work& work, int n) { gather_columns(c, work, n); }

// ---- Codes.

// The first n bits of a mask.
MINW_INLINE __mmask64 first(int n) {
  return n < 64 ? (__mmask64{1} << n) - 1 : ~__mmask64{0};
}

// Turns the bits of each step into an index.
void encode_bits(const Conv& c, const int8_t* codes, int n, char* out) {
  constexpr int kBits = 48, kBytes = 8;  // Those of whole steps.
  for (int i = 0; i < n; i++, codes += c.in.stride, out += c.pixel_bytes)
    for (int k = 0; k * kBytes < c.pixel_bytes; k++) {
      const int left = smaller(kBits, c.in.c - k * kBits);
      const __m512i x = _mm512_maskz_loadu_epi8(first(left), codes + k * kBits);
      uint64_t bits = _mm512_cmpgt_epi8_mask(x, _mm512_setzero_si512());
      for (int j = 0; j < smaller(kBytes, c.pixel_bytes - k * kBytes); j++, bits >>= 6)
        out[k * kBytes + j] = static_cast<char>(bits & 63);
    }
}

// Turns the codes of each two channels into a number, or those of a step into an index.
void encode(const Conv& c, const void* in, int n, char* out, int32_t*) {
  const auto* codes = static_cast<const int8_t*>(in);
  if (c.swapped) return encode_bits(c, codes, n, out);
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
  if (conv->swapped) {
    conv->group = swapped_lookup;
    return "W3A1 wide table lookup";
  }
  switch (10 * conv->w_bits + conv->a_bits) {
    case 13:
      conv->group = by_columns<Scheme<3, 1>>(columns);
      return "W1A3 wide table lookup";
    case 23:
      conv->group = by_columns<Scheme<3, 2>>(columns);
      return "W2A3 wide table lookup";
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
                   0,      choose,   encode, pad_rows, conv,  threshold, maximum};

}  // namespace minw

#else
const minw::Isa minw::kVbmi = {};
#endif
