// The kernels for WebAssembly with vectors of 128 bits (simd128).
#include "kernels.h"

#if defined(__wasm_simd128__)
#include <wasm_simd128.h>

namespace minw {
namespace {

constexpr int kVector = 16;
// Tiles whose sums and operands fit the 16 registers of most CPUs.
constexpr int kLanePixels = 4, kLaneVectors = 2;
#define MINW_KEEP(x) asm volatile("" : "+r"(x))
constexpr int kPairsPixels = 4, kPairsVectors = 2;
// Lookups are faster than the instruction that counts bits, and kernels that are not
// needed would make the module larger.
#define MINW_RELOAD(x)
#define MINW_MASKS 0
#define MINW_LOOKUP 1
#define MINW_DOT 0
#define MINW_PAIRS 1

typedef int32_t Four __attribute__((vector_size(16)));
inline Four widened(const int8_t* from) {
  const v128_t shorts = wasm_i16x8_extend_low_i8x16(wasm_v128_load32_zero(from));
  return (Four)wasm_i32x4_extend_low_i16x8(shorts);
}

template <class Ints>
inline int32_t narrow(Ints x) {
  v128_t shorts = wasm_i16x8_narrow_i32x4((v128_t)x, (v128_t)x);
  return wasm_i32x4_extract_lane(wasm_i8x16_narrow_i16x8(shorts, shorts), 0);
}

template <class Ints>
inline Ints multiply_pairs(Ints x, Ints w) {
  return (Ints)wasm_i32x4_dot_i16x8((v128_t)x, (v128_t)w);
}

#include "kernels.inc"

#include "lookup_wasm.inc"

}  // namespace

const Isa kWasm = {"wasm",    nullptr, false,  false,  false, kLookupVectors * kVector,
                   true,      0,       choose, encode, pad,   conv,
                   threshold, maximum};

}  // namespace minw

#else
const minw::Isa minw::kWasm = {};
#endif
