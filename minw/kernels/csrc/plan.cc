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

// Shortest rows that are pooled one by one. Shorter ones would fill few tiles.
constexpr int kMinPooledRow = 16;

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

// Whether windows lie side by side, without a border.
bool tiles(const Window& w) {
  return !w.top && !w.bottom && !w.left && !w.right && w.h == w.stride_h &&
         w.w == w.stride_w;
}

// Whether there are no gaps between windows.
bool covers(const Window& w) { return w.stride_h <= w.h && w.stride_w <= w.w; }

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
    step.finish = {1, 1, net_.program.values[i + 1].map, nullptr, nullptr};
    if (join(&step, kMaxPool)) {
      const Window& w = net_.program.ops[step.op].window;
      step.finish.pool_h = tiles(w) ? w.h : 1;
      step.finish.pool_w = w.w;
      step.finish.windows = tiles(w) ? nullptr : &w;
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
    if (!fused_ || readers_.count[value] != 1) return false;
    int next = readers_.last[value];
    if (next > step->op + reach_) return false;
    const Op& op = net_.program.ops[next];
    if (op.kind != kind || op.inputs[0] != value) return false;
    if (kind == kMaxPool && !pools(net_.layers[step->conv][0].conv, op.window))
      return false;
    step->op = next;
    step->finish.out = net_.program.values[next + 1].map;
    joined_[next] = true;
    return true;
  }

  // Whether a convolution's pass is to pool its sums. The kernel of kTiles cannot pool
  // single rows.
  static bool pools(const Conv& c, const Window& w) {
    const bool rows = !kSmallCode && c.out.w >= kMinPooledRow && c.form != kTiles;
    return w.h * w.w <= kMaxFusedWindow && (tiles(w) || (rows && covers(w)));
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
  uint64_t place(uint64_t size, int now, int last) {
    pieces_.erase(std::remove_if(pieces_.begin(), pieces_.end(),
                                 [&](const Piece& x) { return x.last < now; }),
                  pieces_.end());
    uint64_t begin = 0;
    auto next = pieces_.begin();
    for (; next != pieces_.end() && next->begin < begin + size; ++next)
      begin = next->end;
    pieces_.insert(next, {begin, begin + size, std::max(last, now)});
    size_ = std::max(size_, begin + size);
    return begin;
  }

  uint64_t size() const { return size_; }

 private:
  struct Piece {
    uint64_t begin, end;
    int last;
  };
  std::vector<Piece> pieces_;  // Sorted by begin.
  uint64_t size_ = 0;
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
    uint64_t size = aligned(map_bytes(net.program.values[value].map));
    plan->offset[value] = arena.place(size, now, last[value]);
  };
  if (image) place(0, 0);
  for (int s = 0; s < count; s++) place(plan->steps[s].op + 1, s);
  plan->arena = arena.size();
}

uint64_t rounded_up(uint64_t x, uint64_t by) { return (x + by - 1) / by * by; }

// Makes room for a convolution whose pooling windows have `pool_h` rows.
void add(const Conv& c, int pool_h, Needs* needs) {
  auto need = [](uint64_t bytes, uint64_t* most) { *most = std::max(*most, bytes); };
  uint64_t pixels = uint64_t{1} * c.padded_h * c.padded_w;
  uint64_t width_bytes = c.width * sizeof(int32_t);
  need(kChunk * width_bytes, &needs->acc);
  need(kPaddedSlack, &needs->padded);
  need(uint64_t{1} * c.padded_w * c.in.c + kAlign, &needs->acc);  // A padded row.
  if (c.form == kTiles) {
    uint64_t rows = rounded_up(c.padded_h, c.window.stride_h);
    need(rows * c.out.w * c.pixel_bytes, &needs->image.padded);
    // The last tiles reach past the last pixel.
    need(uint64_t{kTilePixels} * c.pixel_bytes, &needs->padded);
    need((kChunk + kTilePixels) * width_bytes, &needs->acc);
    need(uint64_t{1} * pool_h * c.out.w * width_bytes, &needs->image.acc);
    need(c.expanded, &needs->gathered);
    return;
  }
  need(pixels * c.pixel_bytes, &needs->image.padded);
  if (c.form == kWinograd) {
    uint64_t line = uint64_t{1} * c.line + c.in.w * c.in.c;
    need(line * sizeof(float), &needs->acc);
    need(kPoints * kChunk * width_bytes, &needs->gathered);
  }
  if (c.sums) need(pixels * sizeof(int32_t), &needs->image.magnitudes);
  if (c.row_bytes) {
    uint64_t rows = c.joint ? kChunk / 2 : kChunk;
    need(rows * c.row_bytes, &needs->gathered);
    need(kLookupCounts * sizeof(uint16_t), &needs->counts);
  }
}

// Bytes of a row of pooled sums.
uint64_t line_bytes(const Finish& f) {
  return sizeof(int32_t) * f.out.w * f.out.stride;
}

Needs needs_of(const minw_network& net, const std::vector<Step>& steps) {
  Needs needs;
  for (const Step& step : steps) {
    if (step.conv >= 0) {
      const Finish& f = step.finish;
      add(net.layers[step.conv][0].conv, f.pool_h, &needs);
      if (f.by_rows())
        needs.lines = std::max(needs.lines, line_bytes(f) * (f.windows->h + 1));
      continue;
    }
    for (const Layer& part : net.layers[step.op]) {
      needs.image.part_in = std::max(needs.image.part_in, map_bytes(part.conv.in));
      needs.image.part_out = std::max(needs.image.part_out, map_bytes(part.conv.out));
      add(part.conv, 1, &needs);
    }
  }
  return needs;
}

}  // namespace

Needs needs_of(const Conv& conv, int pool_h) {
  Needs needs;
  add(conv, pool_h, &needs);
  return needs;
}

Places scratch_places(const Plan& plan, size_t images) {
  const Needs& needs = plan.needs;
  uint64_t end = 0;
  auto part = [&](uint64_t bytes) {
    uint64_t begin = end;
    end += aligned(bytes);
    return begin;
  };
  Places p = {};
  // Vectors may read past the last pixel of the arena and of a part's input.
  part(plan.arena * images + kAlign);
  p.padded = part(needs.image.padded * images + needs.padded);
  p.magnitudes = part(needs.image.magnitudes * images);
  p.part_in = part(needs.image.part_in * images + kAlign);
  p.part_out = part(needs.image.part_out * images);
  p.own = end;
  end = 0;
  p.pixels = part(kChunk * sizeof(void*));
  p.base = part(kChunk * sizeof(void*));
  p.sums = part(kChunk * sizeof(int32_t));
  p.kind = part(kChunk * sizeof(int32_t));
  p.order = part(kChunk * sizeof(int32_t));
  p.acc = part(needs.image.acc * images + needs.acc);
  p.lines = part(needs.lines);
  p.gathered = part(needs.gathered);
  p.counts = part(needs.counts);
  p.own_bytes = end;
  return p;
}

Work work_in(char* scratch, const Places& places, int thread, size_t images) {
  char* own = scratch + places.own + thread * places.own_bytes;
  Work work;
  work.padded = scratch + places.padded;
  work.magnitudes = reinterpret_cast<int32_t*>(scratch + places.magnitudes);
  work.acc = reinterpret_cast<int32_t*>(own + places.acc);
  work.lines = reinterpret_cast<int32_t*>(own + places.lines);
  work.pixels = reinterpret_cast<const char**>(own + places.pixels);
  work.base = reinterpret_cast<const int32_t**>(own + places.base);
  work.sums = reinterpret_cast<int32_t*>(own + places.sums);
  work.kind = reinterpret_cast<int32_t*>(own + places.kind);
  work.order = reinterpret_cast<int32_t*>(own + places.order);
  work.gathered = reinterpret_cast<uint8_t*>(own + places.gathered);
  work.counts = reinterpret_cast<uint16_t*>(own + places.counts);
  work.images = static_cast<int>(images);
  return work;
}

Plan make_plan(const minw_network& net, bool fused, int reach) {
  Plan plan;
  plan.steps = Fuser(net, fused, reach).steps();
  place_values(net, fused, &plan);
  plan.needs = needs_of(net, plan.steps);
  if (fused) {
    uint64_t image = net.scratch_bytes(plan, 2, 1) - net.scratch_bytes(plan, 1, 1) + 1;
    plan.group = std::clamp<uint64_t>(kGroupBytes / image, 1, kMaxGroup);
  }
  return plan;
}

}  // namespace minw
