// The kernels for NEON: all 64-bit ARM.
#include "kernels.h"

#if defined(__aarch64__)
#include <arm_neon.h>

namespace minw {
namespace {

#include "swar.inc"

inline Words count(Words x) { return (Words)vcntq_u8((uint8x16_t)x); }

#include "kernels.inc"

}  // namespace

const Isa kNeon = {"neon", nullptr, false,  false, false, 0,         false,
                   kLane,  choose,  encode, pad,   conv,  threshold, maximum};

}  // namespace minw

#else
const minw::Isa minw::kNeon = {};
#endif
