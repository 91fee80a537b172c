// Counts what a network costs, as docs/format.md defines it, and refuses a network that
// costs too much.
#include <algorithm>

#include "program.h"
#include "rules.h"

namespace minw {
namespace {

// Costs in operations: for each element that is read or made, for each number of a
// window and each threshold of an element, and for rounding to a float format.
constexpr int kOperations = 64;
constexpr int kStepOperations = 16;
constexpr int kFloatOperations = 512;

// Padded weights that each weight of a file may cost.
constexpr int kFreePadding = 4;

// Largest product of the sizes of a group; see has_own_inputs.
constexpr int kOwnProducts = 256;

// The products of costs exceed 64 bits.
using Cost = unsigned __int128;

Cost up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

int64_t padded_pixels(const Map& in, const Window& w) {
  return int64_t{in.h + w.top + w.bottom} * (in.w + w.left + w.right);
}

// Elements of a value whose channels are padded.
Cost stored(const Map& m) { return Cost(m.h) * m.w * m.stride; }

// Elements of a convolution's input with its border.
Cost padded_elements(const Op& op, const Map& in, const Map& out) {
  bool own = has_own_inputs(op, in, out);
  int pixel = own ? in.c / op.groups * out.stride : in.c;
  return Cost(padded_pixels(in, op.window)) * pixel;
}

// Weights of a convolution whose channels are padded as the kernels need them.
Cost padded_weights(const Op& op, const Map& in, const Map& out) {
  Cost taps = Cost(op.window.h) * op.window.w, inputs = in.c / op.groups;
  if (has_own_inputs(op, in, out)) return taps * inputs * up(out.c, 64);
  return op.groups * taps * up(in.c / op.groups, 8) * up(out.c / op.groups, 64);
}

// Operations for an element of a result, besides a convolution's products.
int64_t element_operations(const Op& op) {
  switch (op.kind) {
    case kMaxPool:
    case kSumPool:
      return kOperations + kStepOperations * int64_t{op.window.h} * op.window.w;
    case kThreshold:
      return kOperations + kStepOperations * int64_t{op.codes} * op.count;
    case kFloatNorm: return kFloatOperations;
    default: return kOperations;
  }
}

}  // namespace

void check_limits(const Program& p, const Limits& limits) {
  int n = static_cast<int>(p.ops.size());
  std::vector<int> last(n + 1);  // The last operation that needs a value.
  for (int i = 0; i <= n; i++) last[i] = i - 1;
  for (int i = 0; i < n; i++) {
    for (int value : p.ops[i].inputs) last[value] = i;
    if (p.ops[i].shortcut >= 0) last[p.ops[i].shortcut] = i;
  }
  // Bytes of the values that each operation is the last one to need.
  std::vector<Cost> ending(n);
  auto bytes = [&](int value) {
    const Map& m = p.values[value].map;
    return stored(m) * m.size();
  };
  for (int value = 0; value <= n; value++)
    if (last[value] >= 0) ending[last[value]] += bytes(value);
  Cost padding = 0, memory = 0, operations = 0, live = last[0] < 0 ? 0 : bytes(0);
  for (int i = 0; i < n; i++) {
    const Op& op = p.ops[i];
    const Map &in = p.values[op.inputs[0]].map, &out = p.values[i + 1].map;
    Cost work = 0;
    live += bytes(i + 1);
    if (op.kind == kConv) {
      Cost weights = padded_weights(op, in, out);
      Cost elements = padded_elements(op, in, out);
      Cost free = Cost(op.weights.count) * kFreePadding;
      padding += weights > free ? weights - free : 0;
      work = 4 * elements;
      operations += Cost(out.h) * out.w * weights + kOperations * elements;
    }
    operations += stored(out) * element_operations(op);
    memory = std::max(memory, live + work);
    live -= ending[i];
  }
  auto check = [](const char* name, Cost need, uint64_t limit) {
    if (need > limit)
      throw Error(std::string("its ") + name + " exceeds the limit of " +
                  std::to_string(limit) +
                  "; higher limits are for files that you trust");
  };
  check("padding", padding, limits.padding);
  check("memory", memory, limits.memory);
  check("operations", operations, limits.operations);
}

bool has_own_inputs(const Op& op, const Map& in, const Map& out) {
  int64_t inputs = in.c / op.groups, outputs = out.c / op.groups;
  return op.groups > 1 && inputs * outputs <= kOwnProducts &&
         padded_pixels(in, op.window) * inputs * out.stride <= kMaxPadded;
}

}  // namespace minw
