// The kernels for AVX2: x86-64 since Haswell and Zen.
#include "kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>

namespace minw {
namespace {

constexpr int kVector = 32;
// A step adds at most 8 to a byte's count, and 31 * 8 < 256. It adds at most 2 * 8 * 4
// to an int16 of a dot product, and 256 * 64 < 2^15; or with pixels of images at most
// 2 * 255 * 4, and 16 * 2040 < 2^15.
constexpr int kCountSteps = 31, kDotSteps = 256, kImageDotSteps = 16;

// Tiles whose sums and operands fit the 16 registers.
constexpr int kPairPixels = 2, kPlanePixels = 3, kMaskPixels = 2;
constexpr int kLanePixels = 4, kLaneVectors = 2, kDotPixels = 4, kDotVectors = 2;
#define MINW_KEEP(x) asm volatile("" : "+x"(x))
#define MINW_RELOAD(x)
#define MINW_IN_ORDER(x)
#define MINW_MASKS 1
#define MINW_LOOKUP 1
#define MINW_DOT 1
#define MINW_PAIRS 0

typedef uint32_t Words __attribute__((vector_size(32)));
typedef int32_t Lanes32 __attribute__((vector_size(32)));
typedef int16_t DotAcc __attribute__((vector_size(32)));  // Two sums for a channel.

inline Words in_all_lanes(const uint32_t* word) { return Words{} + *word; }
// Looks up the counts of half bytes.
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
  const __m256i halves = _mm256_maddubs_epi16((__m256i)x, _mm256_set1_epi8(1));
  return (Words)_mm256_madd_epi16(halves, _mm256_set1_epi16(1));
}
inline Words masked(Words a, Words b, Words m) { return (a ^ b) & m; }
inline Words parity(Words a, Words b, Words c) { return a ^ b ^ c; }
inline Words carry(Words a, Words b, Words sum) { return (a & b) | ((a ^ b) & ~sum); }

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

// GCC 12 converts vectors of bytes one by one.
inline Lanes32 widened(const int8_t* from) {
  return (Lanes32)_mm256_cvtepi8_epi32(_mm_loadu_si64(from));
}

inline DotAcc dot(DotAcc acc, Lanes32 x, Lanes32 w) {
  return acc + (DotAcc)_mm256_maddubs_epi16((__m256i)x, (__m256i)w);
}
inline Lanes32 dot_total(DotAcc acc) {
  return (Lanes32)_mm256_madd_epi16((__m256i)acc, _mm256_set1_epi16(1));
}

#include "kernels.inc"

#include "lookup_avx2.inc"

}  // namespace

const Isa kAvx2 = {"avx2",    nullptr, false,  false,  true, kLookupVectors * kVector,
                   false,     kLane,   choose, encode, pad,  conv,
                   threshold, maximum};

}  // namespace minw

#else
const minw::Isa minw::kAvx2 = {};
#endif
