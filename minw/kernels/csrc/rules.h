// The limits of the .minw format, which docs/format.md states and minw/packed/rules.py
// holds, too.
#ifndef MINW_RULES_H_
#define MINW_RULES_H_

#include <cstdint>

namespace minw {

constexpr int64_t kMaxFile = int64_t{1} << 30;      // Bytes of a file.
constexpr int64_t kMaxSize = 65536;                 // Largest dimension.
constexpr int64_t kMaxPad = 64;                     // Largest border on one side.
constexpr int64_t kMaxStride = 64;                  // Largest stride or dilation.
constexpr int64_t kMaxElements = int64_t{1} << 24;  // Elements of a value.
constexpr int64_t kMaxPadded = int64_t{1} << 26;    // Elements of a padded input.
constexpr int64_t kMaxChannels = int64_t{1} << 22;  // Channels of all values together.
constexpr int64_t kMaxBound = int64_t{1} << 31;     // Integers stay below this.
constexpr int64_t kMaxLogits = int64_t{1} << 24;    // Integers that float32 holds.
constexpr int kMaxOps = 4096;                       // Operations of a program.
constexpr int kMaxShift = 23;                       // Largest shift of an integer.
constexpr int kMaxExponent = 40;                    // Floats stay below 2^40.

// Magnitudes of float constants that are not 0. Only the constant that is added last
// may be as small as kLeastAdded.
constexpr float kLeastConstant = 0x1p-40f;
constexpr float kMostConstant = 0x1p40f;
constexpr float kLeastAdded = 0x1p-100f;

constexpr int kHeader = 32;  // Bytes before the program.

}  // namespace minw

#endif  // MINW_RULES_H_
