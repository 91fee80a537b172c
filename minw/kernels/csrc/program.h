// A .minw file, read and checked.
#ifndef MINW_PROGRAM_H_
#define MINW_PROGRAM_H_

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels.h"

namespace minw {

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

enum OpKind : uint8_t {
  kConv = 1,
  kMaxPool,
  kSumPool,
  kThreshold,
  kLogits,
  kConcat,
  kShortcut,
  kFloatNorm,
  kAdd = 10,
};

enum Format : uint8_t { kFloat8 = 8, kHalf = 16, kBfloat = 17, kSingle = 32 };

// Weights on a grid, 64 of a row at a time: bit i set where weight i ...
struct Bits {
  uint64_t positive;  // ... is positive,
  uint64_t mask[3];   // ... has the magnitude 1, 2, 4.
};

// Into the file's bytes, ordered [out][kh][kw][in].
struct Weights {
  int format;
  const uint8_t* data;
  uint64_t count;

  bool grid() const { return format <= 3; }
  Bits bits(uint64_t first, int n) const;
  float value(uint64_t i) const;  // Of a float format; of a grid, the level.
};

struct Op {
  OpKind kind;
  std::string name;
  std::vector<int> inputs;  // Value ids, without the shortcut.
  std::vector<int> shifts;  // Of inputs, to the left.
  int shortcut = -1;
  Window window = {};
  Weights weights = {};
  int pad = 0;
  int groups = 1;  // Groups of a convolution's channels.
  float weight_unit = 1, unit = 1, shortcut_unit = 1;
  int bits = 0;  // Of codes that it makes.
  int format = 0;  // Of FLOAT_NORM.
  int before = 0;  // Channels that a shortcut fills.
  std::vector<float> center, scale, constant, grid;
  std::vector<int32_t> flip, thresholds;  // [channel], [code][count][channel]
  int codes = 0, count = 0;
};

struct Value {
  Map map;
  bool zeros;  // 1-bit codes of which some may be 0.
  std::vector<int64_t> bound;  // Of the magnitudes of a channel's INTs or levels.
  int exponent = 0;  // FLOATs are below 2^exponent in magnitude.
  int64_t most() const;  // Of all channels.
};

struct Program {
  Source source;
  std::vector<uint8_t> offset;
  int channels, classes;
  std::vector<Op> ops;
  std::vector<Value> values;  // The image, then one for each op.
  std::string metadata;
};

// The most that a network may cost; the formulas are those of docs/format.md.
struct Limits {
  uint64_t padding = uint64_t{1} << 24;     // Weights that padding adds.
  uint64_t memory = uint64_t{1} << 29;      // Bytes of an image's values at a time.
  uint64_t operations = uint64_t{1} << 38;  // Operations for an image.
};

// The weights point into the bytes. Throws Error, before anything large is allocated.
Program parse(const uint8_t* bytes, size_t size, const Limits& limits);

// Whether the lanes of vectors are output channels with inputs of their own. That is for
// convolutions where each output channel reads few inputs and few others read the same
// ones. Pixels then hold an element for each output channel and input of its group.
bool has_own_inputs(const Op& op, const Map& in, const Map& out);

float rounded(float x, int format);  // To the nearest of a float format, ties to even.

}  // namespace minw

#endif  // MINW_PROGRAM_H_
