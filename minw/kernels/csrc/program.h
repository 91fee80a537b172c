// A .minw file that was read and checked.
#ifndef MINW_PROGRAM_H_
#define MINW_PROGRAM_H_

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels.h"

namespace minw {

// An error with a message for users, which begins with the subject if there is one.
struct Error : std::runtime_error {
  explicit Error(const std::string& message);
};

// While it lives, errors that this thread throws begin with its name. Errors are not
// caught to add the name, because WebAssembly cannot catch them (wasm.cc).
class Subject {
 public:
  explicit Subject(std::string name);
  ~Subject();
  Subject(const Subject&) = delete;
  Subject& operator=(const Subject&) = delete;

 private:
  const std::string name_;
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

// Up to 64 neighboring weights on a grid. Bit i belongs to weight i.
struct Bits {
  uint64_t positive;  // Set where the weight is positive.
  uint64_t mask[3];   // Set where its magnitude is 1, 2 or 4.
};

// Weights in the file's bytes, ordered [out][kh][kw][in].
struct Weights {
  int format;
  const uint8_t* data;
  uint64_t count;

  bool grid() const { return format <= 3; }
  // The n <= 64 bits from weight `first` on, in plane i of the file: signs (1 is
  // positive), then the binary digits of the codes' magnitudes.
  uint64_t plane(int i, uint64_t first, int n) const {
    const uint64_t bytes = (count + 7) / 8, byte = first / 8;
    const uint8_t* from = data + i * bytes;
    if (n < 64 || first % 8 || byte + 8 > bytes) return bits_at(from, bytes, first, n);
    uint64_t word;  // Whole bytes are the common case: no call, and nothing to cut off.
    std::memcpy(&word, from + byte, sizeof word);
    return word;
  }
  Bits bits(uint64_t first, int n) const;
  float value(uint64_t i) const;  // The float, or the level of a grid.

 private:
  // The n <= 64 bits from bit `first` on, of a plane of `bytes` bytes.
  static uint64_t bits_at(const uint8_t* plane, uint64_t bytes, uint64_t first, int n);
};

struct Op {
  OpKind kind;
  std::string name;
  std::vector<int> inputs;  // Values that it reads, without the shortcut.
  std::vector<int> shifts;  // Shifts of the inputs, to the left.
  int shortcut = -1;
  Window window = {};
  Weights weights = {};
  int pad = 0;
  int groups = 1;  // Groups of a convolution's channels.
  float weight_unit = 1, unit = 1, shortcut_unit = 1;
  int bits = 0;    // Bits of the codes that it makes.
  int format = 0;  // Format of FLOAT_NORM; 0 for logits.
  int before = 0;  // Channels of zeros before a shortcut's own ones.
  std::vector<float> center, scale, constant, grid;
  std::vector<int32_t> flip, thresholds;  // [channel], [code][count][channel]
  int codes = 0, count = 0;
};

struct Value {
  Map map;
  bool zeros;                  // Whether some codes of 1 bit may be 0.
  std::vector<int64_t> bound;  // Bound of a channel's magnitudes: INTs, or levels.
  int exponent = 0;            // FLOATs are below 2^exponent in magnitude.
  int64_t most() const;        // The largest bound of a channel.
};

struct Program {
  Source source;
  std::vector<uint8_t> offset;
  int channels, classes;
  std::vector<Op> ops;
  std::vector<Value> values;  // The image, then the result of each operation.
  std::string metadata;
};

// The most that a network may cost; the formulas are those of docs/format.md.
struct Limits {
  uint64_t padding = uint64_t{1} << 24;     // Weights that padding adds.
  uint64_t memory = uint64_t{1} << 29;      // Bytes of an image's values at a time.
  uint64_t operations = uint64_t{1} << 38;  // Operations for an image.
};

// Throws Error if a network costs more than the limits allow.
void check_limits(const Program& program, const Limits& limits);

// Parses a file and checks it. The weights of the result point into the bytes. Throws
// Error before anything large is allocated.
Program parse(const uint8_t* bytes, size_t size, const Limits& limits);

// Whether a convolution in groups runs with inputs of their own for all output
// channels. This is for groups of few channels, such as depthwise convolutions: each
// output channel reads few inputs, and few others read the same ones. Output channels
// of all groups then lie in the lanes of vectors, and pixels hold an element for each
// of them and each input of its group. Other convolutions in groups are split.
bool has_own_inputs(const Op& op, const Map& in, const Map& out);

// Rounds to the nearest number of a float format, ties to even.
float rounded(float x, int format);

}  // namespace minw

#endif  // MINW_PROGRAM_H_
