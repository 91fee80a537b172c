// Plans: which operations share a pass, and where values lie in memory.
#include <algorithm>

#include "engine.h"

namespace minw {
namespace {

// A group of images runs through the steps together, so that dense layers read their
// weights once for all of them. Groups are limited to what stays in a core's cache.
constexpr size_t kMaxGroup = 16;
constexpr size_t kGroupBytes = size_t{1} << 20;

// Largest pooling window that is fused: a chunk then still holds several of them.
constexpr int kMaxFusedWindow = kChunk / 4;

// How many operations read each value, and which one reads it last.
struct Readers {
  explicit Readers(const std::vector<Op>& ops)
      : count(ops.size() + 1), last(ops.size() + 1, -1) {
    for (size_t i = 0; i < ops.size(); i++) {
      auto read = [&](int value) {
        count[value]++;
        last[value] = static_cast<int>(i);
      };
      for (int value : ops[i].inputs) read(value);
      if (ops[i].shortcut >= 0) read(ops[i].shortcut);
    }
  }
  std::vector<int> count, last;
};

// Whether a window's pixels are next to each other and windows do not overlap.
bool tiles(const Window& w) {
  return !w.top && !w.bottom && !w.left && !w.right && w.h == w.stride_h &&
         w.w == w.stride_w;
}

// Joins operations into steps.
class Fuser {
 public:
  Fuser(const minw_network& net, bool fused, int reach)
      : net_(net), readers_(net.program.ops), fused_(fused), reach_(reach) {}

  std::vector<Step> steps() {
    size_t n = net_.program.ops.size();
    std::vector<Step> at(n);  // By the last operation of the step.
    joined_.assign(n, false);
    for (size_t i = 0; i < n; i++) {
      if (joined_[i]) continue;
      Step step = from(static_cast<int>(i));
      at[step.op] = step;
    }
    at.erase(std::remove_if(at.begin(), at.end(),
                            [](const Step& step) { return step.op < 0; }),
             at.end());
    return at;
  }

 private:
  // The step that begins with operation i.
  Step from(int i) {
    Step step;
    step.op = i;
    if (net_.layers[i].size() != 1) return step;
    step.conv = i;
    step.finish = {1, 1, net_.program.values[i + 1].map, nullptr};
    if (join(&step, kMaxPool)) {
      const Window& w = net_.program.ops[step.op].window;
      step.finish.pool_h = w.h;
      step.finish.pool_w = w.w;
    }
    if (join(&step, kThreshold)) {
      step.threshold = step.op;
      step.finish.threshold = &net_.thresholds[step.op];
    }
    return step;
  }

  // Adds the operation that reads the step's result, if it is the only reader, of the
  // given kind and near enough.
  bool join(Step* step, OpKind kind) {
    int value = step->op + 1;
    if (!fused_ || readers_.count[value] != 1 ||
        net_.program.values[value].map.kind != kInt)
      return false;
    int next = readers_.last[value];
    if (next > step->op + reach_) return false;
    const Op& op = net_.program.ops[next];
    if (op.kind != kind || op.inputs[0] != value) return false;
    if (kind == kMaxPool &&
        (!tiles(op.window) || op.window.h * op.window.w > kMaxFusedWindow))
      return false;
    step->op = next;
    step->finish.out = net_.program.values[next + 1].map;
    joined_[next] = true;
    return true;
  }

  const minw_network& net_;
  const Readers readers_;
  const bool fused_;
  const int reach_;
  std::vector<bool> joined_;  // Operations that are part of an earlier one's step.
};

// Memory in which each value takes the first gap that is free while the value lives.
class Arena {
 public:
  // Places `size` bytes that are written by step `now` and last read by step `last`.
  size_t place(size_t size, int now, int last) {
    pieces_.erase(std::remove_if(pieces_.begin(), pieces_.end(),
                                 [&](const Piece& x) { return x.last < now; }),
                  pieces_.end());
    size_t begin = 0;
    auto next = pieces_.begin();
    for (; next != pieces_.end() && next->begin < begin + size; ++next)
      begin = next->end;
    pieces_.insert(next, {begin, begin + size, std::max(last, now)});
    size_ = std::max(size_, begin + size);
    return begin;
  }

  size_t size() const { return size_; }

 private:
  struct Piece {
    size_t begin, end;
    int last;
  };
  std::vector<Piece> pieces_;  // Sorted by begin.
  size_t size_ = 0;
};

// Places all values of a plan whose steps are complete.
void place_values(const minw_network& net, bool fused, Plan* plan) {
  const auto& ops = net.program.ops;
  int count = static_cast<int>(plan->steps.size());
  // Without fusion each value is kept to the end, so that a caller can read it.
  std::vector<int> last(ops.size() + 1, fused ? -1 : count);
  // Convolutions read the pixels of images themselves. Other operations need value 0.
  bool image = !fused;
  for (int s = 0; s < count; s++) {
    const Step& step = plan->steps[s];
    auto read = [&](int value) { last[value] = std::max(last[value], s); };
    for (int value : ops[step.conv >= 0 ? step.conv : step.op].inputs) {
      read(value);
      image = image || (value == 0 && step.conv < 0);
    }
    int shortcut = ops[step.threshold >= 0 ? step.threshold : step.op].shortcut;
    if (shortcut >= 0) read(shortcut);
  }
  Arena arena;
  plan->offset.resize(ops.size() + 1);
  auto place = [&](int value, int now) {
    size_t size = aligned(map_bytes(net.program.values[value].map));
    plan->offset[value] = arena.place(size, now, last[value]);
  };
  if (image) place(0, 0);
  for (int s = 0; s < count; s++) place(plan->steps[s].op + 1, s);
  plan->arena = arena.size();
}

// Makes room for a convolution.
void add(const Conv& c, Needs* needs) {
  size_t pixels = static_cast<size_t>(c.padded_h) * c.padded_w;
  needs->padded = std::max(needs->padded, pixels * c.pixel_bytes);
  if (c.sums) needs->magnitudes = std::max(needs->magnitudes, pixels * sizeof(int32_t));
  needs->acc = std::max(needs->acc, size_t{kChunk} * c.width * sizeof(int32_t));
  if (c.form == kLookup) {
    // With equal bits, one row of bytes serves two pixels.
    size_t rows = c.a_bits == c.w_bits ? kChunk / 2 : kChunk;
    needs->gathered = std::max(needs->gathered, rows * c.row_bytes);
    needs->counts = kRowBlock * kChunk * sizeof(uint16_t);
  }
}

}  // namespace

Needs scratch_needs(const std::vector<std::vector<Layer>>& layers) {
  Needs needs;
  for (const auto& parts : layers) {
    if (parts.size() > 1) {
      needs.part_in = std::max(needs.part_in, map_bytes(parts[0].conv.in));
      needs.part_out = std::max(needs.part_out, map_bytes(parts[0].conv.out));
    }
    for (const Layer& layer : parts) add(layer.conv, &needs);
  }
  return needs;
}

Places scratch_places(const Plan& plan, const Needs& needs, size_t images) {
  // Vectors may read past the last pixel of the arena and of a part's input.
  size_t end = plan.arena * images + kAlign;
  auto part = [&](size_t bytes) {
    size_t begin = end;
    end += aligned(bytes);
    return begin;
  };
  Places p = {};
  p.padded = part(needs.padded * images + kPaddedSlack);
  p.magnitudes = part(needs.magnitudes * images);
  p.acc = part(needs.acc);
  p.pixels = part(kChunk * sizeof(void*));
  p.base = part(kChunk * sizeof(void*));
  p.sums = part(kChunk * sizeof(int32_t));
  p.gathered = part(needs.gathered);
  p.counts = part(needs.counts);
  p.part_in = part(needs.part_in * images + kAlign);
  p.part_out = part(needs.part_out * images);
  p.end = end;
  return p;
}

Plan make_plan(const minw_network& net, bool fused, int reach) {
  Plan plan;
  plan.steps = Fuser(net, fused, reach).steps();
  place_values(net, fused, &plan);
  if (fused) {
    size_t image = net.scratch_bytes(plan, 2) - net.scratch_bytes(plan, 1) + 1;
    plan.group = std::clamp<size_t>(kGroupBytes / image, 1, kMaxGroup);
  }
  return plan;
}

}  // namespace minw
