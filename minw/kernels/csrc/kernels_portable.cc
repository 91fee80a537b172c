// The kernels for any CPU, by the compiler's vectors alone.
//
// Bits are counted within words: those of pairs of bits, of half bytes, then of bytes.
#include "kernels.h"

#if !defined(__wasm_simd128__)  // There is no WebAssembly of minw without vectors.

namespace minw {
namespace {

#include "swar.inc"

inline Words count(Words x) {
  x -= (x >> 1) & 0x55555555;
  x = (x & 0x33333333) + ((x >> 2) & 0x33333333);
  return (x + (x >> 4)) & 0x0f0f0f0f;
}

#include "kernels.inc"

}  // namespace

const Isa kPortable = {"portable", nullptr, false,  false, false, 0,         false,
                       kLane,      choose,  encode, pad,   conv,  threshold, maximum};

}  // namespace minw

#else
const minw::Isa minw::kPortable = {};
#endif
