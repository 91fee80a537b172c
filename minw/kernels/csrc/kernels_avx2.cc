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

inline void nibbles(uint64_t word, char* out) {
  __m128i bytes = _mm_cvtsi64_si128(static_cast<int64_t>(word));
  __m128i both = _mm_unpacklo_epi8(_mm_slli_epi16(bytes, 4), bytes);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out),
                   _mm_and_si128(both, _mm_set1_epi8(static_cast<char>(0xf0))));
}

inline DotAcc dot(DotAcc acc, Lanes32 x, Lanes32 w) {
  return acc + (DotAcc)_mm256_maddubs_epi16((__m256i)x, (__m256i)w);
}
inline Lanes32 dot_total(DotAcc acc) {
  return (Lanes32)_mm256_madd_epi16((__m256i)acc, _mm256_set1_epi16(1));
}

#include "kernels.inc"

// How many of 4 channels differ in sign, by the signs of 4 weights: [pair of pixels'
// nibbles][nibble of weights], one pixel's count in each half of a byte.
struct Tables {
  alignas(64) uint8_t of[256][16];
  constexpr Tables() : of() {
    for (int a = 0; a < 256; a++)
      for (int w = 0; w < 16; w++)
        of[a][w] = static_cast<uint8_t>(bits(a >> 4 ^ w) << 4 | bits((a & 15) ^ w));
  }
  static constexpr int bits(int x) {
    return (x & 1) + (x >> 1 & 1) + (x >> 2 & 1) + (x >> 3 & 1);
  }
};
constexpr Tables kTables;

// Two pixels by 32 V channels. Weights are bytes of 4 input channels and shuffle the
// table that the pixels select; three counts of up to 4 fit half a byte.
template <int V>
void lookup(const Conv& c, int group, const char* const* pixels,
            const int32_t* const* base, const int32_t*, int n, int32_t* out) {
  typedef uint8_t Bytes __attribute__((vector_size(32)));
  typedef uint16_t Shorts __attribute__((vector_size(32)));
  constexpr int kMost = 63;  // Steps until a byte may overflow.
  for (int p = 0; p < n; p += 2) {
    const int other = p + 1 < n ? p + 1 : p;
    const char* pixel[2] = {pixels[p], pixels[other]};
    const char* w = c.weights + group * c.group_bytes;
    auto table = [&](int k) {
      const ptrdiff_t at = c.offsets[k];
      size_t high = static_cast<uint8_t>(pixel[0][at]);
      size_t low = static_cast<uint8_t>(pixel[1][at]);
      const auto* from = reinterpret_cast<const __m128i*>(
          &kTables.of[0][0] + (high << 4) + low);
      return _mm256_broadcastsi128_si256(_mm_load_si128(from));
    };
    auto look = [&](__m256i table, int at) {
      return (Bytes)_mm256_shuffle_epi8(table, load<__m256i>(w + at * 32));
    };
    Shorts sums[2][V][2] = {};
    for (int begin = 0; begin < c.steps; begin += kMost) {
      const int end = smaller(begin + kMost, c.steps);
      Bytes counts[2][V] = {};
      auto add = [&](int v, Bytes x) __attribute__((always_inline)) {
        counts[0][v] += (Bytes)((Shorts)x >> 4) & 15;
        counts[1][v] += x & 15;
      };
      int k = begin;
      for (; k + 3 <= end; k += 3, w += 3 * V * 32) {
        __m256i a = table(k), b = table(k + 1), d = table(k + 2);
        MINW_UNROLL
        for (int v = 0; v < V; v++)
          add(v, look(a, v) + look(b, V + v) + look(d, 2 * V + v));
      }
      for (; k < end; k++, w += V * 32) {
        __m256i a = table(k);
        MINW_UNROLL
        for (int v = 0; v < V; v++) add(v, look(a, v));
      }
      MINW_UNROLL
      for (int t = 0; t < 2; t++)
        MINW_UNROLL
        for (int v = 0; v < V; v++) {
          sums[t][v][0] += (Shorts)counts[t][v] & 255;
          sums[t][v][1] += (Shorts)counts[t][v] >> 8;
        }
    }
    for (int t = 0; t <= other - p; t++)
      for (int v = 0; v < V; v++) {
        int channel = v * 32;
        __m256i even = (__m256i)sums[t][v][0], odd = (__m256i)sums[t][v][1];
        __m256i halves[2] = {_mm256_unpacklo_epi16(even, odd),
                             _mm256_unpackhi_epi16(even, odd)};
        for (int i = 0; i < 4; i++, channel += 8) {
          __m128i part = i < 2 ? _mm256_castsi256_si128(halves[i])
                               : _mm256_extracti128_si256(halves[i - 2], 1);
          Lanes32 x = (Lanes32)_mm256_cvtepu16_epi32(part);
          store(out + (p + t) * c.width + channel,
                load<Lanes32>(base[p + t] + group * c.width + channel) - x - x);
        }
      }
  }
}

}  // namespace

const Isa kAvx2 = {"avx2", true, true, choose, encode, conv, threshold, peak};

}  // namespace minw

#else
const minw::Isa minw::kAvx2 = {};
#endif
