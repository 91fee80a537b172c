// The kernels for AVX-512 (F, BW, DQ, VL, VPOPCNTDQ, VNNI): Ice Lake, Zen 4 and later.
#include "kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>

namespace minw {
namespace {

constexpr int kVector = 64;
// Counts are of words, and dot products are summed as int32.
constexpr int kCountSteps = 0, kDotSteps = 0;

// Tiles whose sums and operands fit the 32 registers.
constexpr int kPairPixels = 4, kPlanePixels = 6, kMaskPixels = 4;
constexpr int kLanePixels = 6, kLaneVectors = 2, kDotPixels = 6, kDotVectors = 2;
#define MINW_KEEP(x) asm volatile("" : "+v"(x))
#define MINW_LOOKUP 0
#define MINW_DOT 1

typedef uint64_t Words __attribute__((vector_size(64)));
typedef int32_t DotAcc __attribute__((vector_size(64)));

inline Words count(Words x) { return (Words)_mm512_popcnt_epi64((__m512i)x); }
inline Words total(Words x) { return x; }
inline Words low_halves(Words a, Words b) {
  const __m512i even =
      _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  return (Words)_mm512_permutex2var_epi32((__m512i)a, even, (__m512i)b);
}
// Any function of three bits in one instruction: bit 4 a + 2 b + c of kTable is its
// value.
template <int kTable>
inline Words ternary(Words a, Words b, Words c) {
  return (Words)_mm512_ternarylogic_epi64((__m512i)a, (__m512i)b, (__m512i)c, kTable);
}
inline Words masked(Words a, Words b, Words m) { return ternary<0x28>(a, b, m); }
inline Words parity(Words a, Words b, Words c) { return ternary<0x96>(a, b, c); }
inline Words carry(Words a, Words b, Words sum) { return ternary<0xd4>(a, b, sum); }

template <class Bytes>
inline uint64_t signs(Bytes x) {
  return _mm512_movepi8_mask((__m512i)x);
}

// The intrinsic for this makes GCC 12 warn about its own header.
typedef int8_t Narrow __attribute__((vector_size(16)));
inline Narrow narrow(DotAcc x) { return __builtin_convertvector(x, Narrow); }

inline DotAcc dot(DotAcc acc, DotAcc x, DotAcc w) {
  return (DotAcc)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)x, (__m512i)w);
}
inline DotAcc dot_total(DotAcc acc) { return acc; }

#include "kernels.inc"

}  // namespace

const Isa kAvx512 = {"avx512", true, false, choose, encode, conv, threshold, peak};

}  // namespace minw

#else
namespace minw {
const Isa kAvx512 = {};
}  // namespace minw
#endif
