// The kernels for WebAssembly with vectors of 128 bits (simd128).
#include "kernels.h"

#if defined(__wasm_simd128__)
#include <wasm_simd128.h>

namespace minw {
namespace {

constexpr int kVector = 16;
// A step adds at most 8 to a byte's count, and 31 * 8 < 256.
constexpr int kCountSteps = 31;

// Tiles whose sums and operands fit the 16 registers of most CPUs.
constexpr int kPairPixels = 2, kPlanePixels = 2, kMaskPixels = 2;
constexpr int kLanePixels = 4, kLaneVectors = 2;
// The compiler of a browser sees through MINW_KEEP, and would drop measured steps.
constexpr bool kPeaks = false;
#define MINW_KEEP(x) asm volatile("" : "+r"(x))
#define MINW_LOOKUP 1
#define MINW_DOT 0

typedef uint64_t Words __attribute__((vector_size(16)));

inline Words count(Words x) { return (Words)wasm_i8x16_popcnt((v128_t)x); }
inline Words total(Words x) {
  v128_t shorts = wasm_u16x8_extadd_pairwise_u8x16((v128_t)x);
  Words ints = (Words)wasm_u32x4_extadd_pairwise_u16x8(shorts);
  return (ints & 0xffffffff) + (ints >> 32);
}
inline Words low_halves(Words a, Words b) {
  return (Words)wasm_i32x4_shuffle((v128_t)a, (v128_t)b, 0, 2, 4, 6);
}
inline Words masked(Words a, Words b, Words m) { return (a ^ b) & m; }
inline Words parity(Words a, Words b, Words c) { return a ^ b ^ c; }
inline Words carry(Words a, Words b, Words sum) { return (a & b) | ((a ^ b) & ~sum); }

template <class Bytes>
inline uint64_t signs(Bytes x) {
  return wasm_i8x16_bitmask((v128_t)x);
}

template <class Ints>
inline int32_t narrow(Ints x) {
  v128_t shorts = wasm_i16x8_narrow_i32x4((v128_t)x, (v128_t)x);
  return wasm_i32x4_extract_lane(wasm_i8x16_narrow_i16x8(shorts, shorts), 0);
}

#include "kernels.inc"

#include "lookup_wasm.inc"

}  // namespace

const Isa kWasm = {"wasm", nullptr, false, false,     true,   choose,
                   encode, pad,     conv,  threshold, maximum};

}  // namespace minw

#else
const minw::Isa minw::kWasm = {};
#endif
