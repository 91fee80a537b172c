// The kernels for AVX-512 (F, BW, DQ, VL, VPOPCNTDQ, VNNI): Ice Lake, Zen 4 and later.
#include "kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>

namespace minw {
namespace {

#include "avx512.inc"
#include "kernels.inc"

}  // namespace

const Isa kAvx512 = {"avx512",  &kAvx2, false,  false, true, 0,         false,
                     2 * kLane, choose, encode, pad,   conv, threshold, maximum};

}  // namespace minw

#else
namespace minw {
const Isa kAvx512 = {};
}  // namespace minw
#endif
