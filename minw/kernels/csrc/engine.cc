#include <algorithm>
#include <atomic>
#include <cfloat>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <new>
#include <utility>

#include "minw.h"
#include "pool.h"
#include "program.h"

namespace minw {
namespace {

constexpr size_t kAlign = 64;
// Images go through the layers in groups, so that dense layers share their weights.
constexpr size_t kMaxGroup = 16, kGroupBytes = size_t{1} << 20;

size_t aligned(size_t bytes) { return (bytes + kAlign - 1) / kAlign * kAlign; }

// Aligned memory that keeps its size.
class Buffer {
 public:
  explicit Buffer(size_t bytes) : size_(bytes) {
    data_ = static_cast<char*>(::operator new(bytes + 1, std::align_val_t(kAlign)));
  }
  ~Buffer() { ::operator delete(data_, std::align_val_t(kAlign)); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  char* data() const { return data_; }
  size_t size() const { return size_; }

 private:
  char* data_;
  size_t size_;
};

// Scratch memory between calls: fresh memory costs page faults. Without a lock, so that
// in a fork's child no thread that is gone can hold it: each buffer is in one place, and
// those that calls had taken at the fork are lost to the child.
class Spare {
 public:
  ~Spare() {
    for (auto& place : places_) delete place.load();
  }

  std::unique_ptr<Buffer> take(size_t bytes) {
    for (auto& place : places_)
      if (place.load(std::memory_order_relaxed)) {
        std::unique_ptr<Buffer> buffer(place.exchange(nullptr));
        if (buffer && buffer->size() >= bytes) return buffer;
      }
    return std::make_unique<Buffer>(bytes);
  }

  void keep(std::unique_ptr<Buffer> buffer) {
    for (auto& place : places_) {
      Buffer* none = nullptr;
      if (place.compare_exchange_strong(none, buffer.get())) {
        buffer.release();
        return;
      }
    }
  }

 private:
  std::atomic<Buffer*> places_[64] = {};
};

bool runs(const Isa& isa) {
  if (!isa.name) return false;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (&isa == &kAvx2) return __builtin_cpu_supports("avx2");
  if (&isa == &kAvx512)
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512vpopcntdq") &&
           __builtin_cpu_supports("avx512vnni");
#endif
  return true;
}

const Isa* const kIsas[] = {&kAvx512, &kAvx2, &kNeon, &kPortable};  // Best first.

// Made when the library is loaded, as a fork during a first call would leave it half made.
const std::string isa_names = [] {
  std::string names;
  for (const Isa* isa : kIsas)
    if (runs(*isa)) names += (names.empty() ? "" : " ") + std::string(isa->name);
  return names;
}();

const Isa& best_isa() {
  const char* forced = std::getenv("MINW_ISA");
  std::string names;
  for (const Isa* isa : kIsas) {
    if (!runs(*isa)) continue;
    if (!forced || !*forced || !std::strcmp(forced, isa->name)) return *isa;
    names += std::string(" ") + isa->name;
  }
  throw Error(std::string("MINW_ISA=") + forced +
              " does not run on this CPU; these do:" + names);
}

// A convolution with the memory that its plain struct points into.
struct Layer {
  Conv conv = {};
  std::unique_ptr<Buffer> weights;
  std::vector<int32_t> base;
  std::vector<int32_t> offsets, channels;
  std::vector<int> row_class, col_class;
  std::vector<char> border;
  const char* kernel = "";
};

// Which of the taps 0..kernel - 1 lie inside the map, for each output row (or column).
struct Taps {
  std::vector<int> of;                     // Class of an output row.
  std::vector<std::pair<int, int>> range;  // [first, last) of a class.
};

Taps taps(int out, int in, int kernel, int stride, int step, int before) {
  Taps t;
  for (int y = 0; y < out; y++) {
    int top = y * stride - before;  // Tap k is at top + k * step.
    auto first_from = [&](int row) { return row <= top ? 0 : (row - top - 1) / step + 1; };
    std::pair<int, int> range(std::min(first_from(0), kernel),
                              std::min(first_from(in), kernel));
    auto at = std::find(t.range.begin(), t.range.end(), range);
    t.of.push_back(at - t.range.begin());
    if (at == t.range.end()) t.range.push_back(range);
  }
  return t;
}

// Sums over the weights of a run.
struct RunSums {
  int64_t levels = 0, magnitudes = 0, negative = 0;
  void add(const Bits& b) {
    for (int m = 0; m < 3; m++) {
      int all = __builtin_popcountll(b.mask[m]);
      int minus = __builtin_popcountll(b.mask[m] & ~b.positive);
      magnitudes += int64_t{all} << m;
      levels += int64_t{all - 2 * minus} * (1 << m);
      negative += minus;
    }
  }
};

// A group of a map's channels.
Map part_of(Map map, int parts) {
  map.c /= parts;
  map.stride = (map.c + kLane - 1) / kLane * kLane;
  return map;
}

// Builds a convolution: all of an op, or one of the `parts` into which it is split.
class LayerBuilder {
 public:
  LayerBuilder(const Program& program, const Op& op, const Map& out, const Isa& isa,
               int parts, int part)
      : op_(op), x_(program.values[op.inputs[0]]), isa_(isa), c_(layer_.conv) {
    c_.in = parts > 1 ? part_of(x_.map, parts) : x_.map;
    c_.out = parts > 1 ? part_of(out, parts) : out;
    c_.window = op.window;
    c_.source = op.inputs[0] == 0 && parts == 1 ? &program.source : nullptr;
    c_.unit = op.unit;
    inputs_ = x_.map.c / op.groups;
    first_weight_ = uint64_t{1} * part * c_.out.c * c_.window.h * c_.window.w * inputs_;
    c_.own = op.groups > parts;
    c_.w_bits = op.weights.grid() ? op.weights.format : 0;
    choose_form();
    geometry();
    weights();
    base();
    border();
    layer_.kernel = isa.choose(&c_);
  }

  Layer take() { return std::move(layer_); }

 private:
  template <class Visit>  // visit(out, tap, first channel, Bits) for 64 channels each
  void each(const Visit& visit) const {
    int taps = c_.window.h * c_.window.w;
    uint64_t at = first_weight_;
    for (int o = 0; o < c_.out.c; o++)
      for (int tap = 0; tap < taps; tap++)
        for (int i = 0; i < inputs_; i += 64) {
          int n = std::min(64, inputs_ - i);
          visit(o, tap, i, op_.weights.bits(at, n));
          at += n;
        }
  }

  void choose_form() {
    bool codes = c_.in.kind == kCode;
    // A filled shortcut has zeros.
    c_.a_bits = codes ? (x_.zeros ? std::max(c_.in.bits, 2) : c_.in.bits) : 0;
    int a = c_.a_bits, w = c_.w_bits;
    c_.width = 32;
    if (!w || c_.in.kind == kFloat) {
      c_.form = kFloat32;
    } else if (codes && !c_.own && (a == 1 || w == 1 || (a == 2 && w == 2))) {
      c_.form = kPlanes;
      c_.width = kLane;
      c_.words = (c_.in.c + 63) / 64;
      c_.sums = w == 1 && a > 1;
      c_.fold = a == 2 && w == 2 ? 2 : 4;
      c_.swapped = a == 1 && w > 1;
      // Counts are uint16; for few pixels, vectors of them would be mostly empty.
      int64_t steps = int64_t{c_.window.h} * c_.window.w * (c_.in.c / c_.fold + 1);
      if (isa_.lookup && steps * (a == 3 || w == 3 ? 16 : 4) < 65536 &&
          (!c_.swapped || c_.out.h * c_.out.w > 16)) {
        c_.form = kLookup;
        c_.width = c_.swapped ? kRowBlock : std::min((c_.out.c + 31) / 32 * 32, 128);
        return;
      }
      c_.swapped = false;
      c_.paired = a == 1 && w == 1 && c_.words % 2 == 0;
    } else if (codes && !c_.own && isa_.dot) {
      c_.form = kBytes;
      c_.fold = 4;
    } else {
      std::vector<RunSums> sums(c_.out.c);
      each([&](int o, int, int, const Bits& b) { sums[o].add(b); });
      int64_t most = 0;
      for (const RunSums& sum : sums)
        most = std::max(most, sum.magnitudes * x_.most() + sum.negative);
      bool narrow = most < 32768 && x_.most() < 32768;
      c_.form = narrow ? kInt16 : kInt32;
      c_.width = narrow ? 64 : 32;
    }
  }

  // What pixels hold where they are not packed.
  void elements() {
    c_.elements = c_.own ? inputs_ * c_.out.stride : c_.in.c;
    if (!c_.own || (inputs_ == 1 && c_.in.c == c_.out.c)) return;
    layer_.channels.resize(c_.elements);
    int outputs = c_.out.c / (c_.in.c / inputs_);  // Output channels of a group.
    for (int i = 0; i < inputs_; i++)
      for (int o = 0; o < c_.out.c; o++)
        layer_.channels[i * c_.out.stride + o] = o / outputs * inputs_ + i;
    c_.channels = layer_.channels.data();
  }

  void geometry() {
    const Window& w = c_.window;
    int step = inputs_;  // Steps of a pixel.
    elements();
    switch (c_.form) {
      case kPlanes:
        step = c_.words;
        c_.pixel_bytes = c_.words * 8 * (c_.a_bits == 3 ? 4 : c_.a_bits);
        break;
      case kLookup:
        step = (c_.in.c + c_.fold - 1) / c_.fold;
        c_.pixel_bytes = c_.in.stride / (c_.a_bits == 3 ? 2 : c_.fold);
        break;
      case kBytes:
        step = (c_.in.c + 3) / 4;
        c_.pixel_bytes = c_.in.stride;
        break;
      case kInt16: c_.pixel_bytes = c_.elements * 2; break;
      case kInt32:
      case kFloat32: c_.pixel_bytes = c_.elements * 4; break;
    }
    if (c_.paired) step /= 2;
    c_.padded_h = c_.in.h + w.top + w.bottom;
    c_.padded_w = c_.in.w + w.left + w.right;
    int bytes = c_.form == kLookup  ? (c_.a_bits == 3 ? 2 : 1)
                : c_.form == kBytes ? 4
                                    : c_.pixel_bytes / step;
    for (int y = 0; y < w.h; y++)
      for (int x = 0; x < w.w; x++)
        for (int i = 0; i < step; i++)
          layer_.offsets.push_back(
              (y * w.step_h * c_.padded_w + x * w.step_w) * c_.pixel_bytes + i * bytes);
    c_.steps = static_cast<int>(layer_.offsets.size());
    c_.offsets = layer_.offsets.data();
    if (c_.form == kLookup) c_.row_bytes = c_.steps * bytes + kRowSlack;
    c_.groups = (c_.out.c + c_.width - 1) / c_.width;
  }

  void weights() {
    size_t taps = static_cast<size_t>(c_.window.h) * c_.window.w, width = c_.width;
    int in = inputs_, w = c_.w_bits;
    // Elements of a tap and output channel.
    size_t planes = c_.form == kPlanes   ? (w == 3 ? 4 : w)
                    : c_.form == kLookup ? (w == 3 ? 2 : 1)
                    : w == 2 && (c_.form == kInt16 || c_.form == kInt32) ? 2
                                         : 1;
    bool folded = c_.form == kBytes || c_.form == kLookup;
    size_t steps = c_.form == kPlanes ? c_.words
                   : folded           ? (in + c_.fold - 1) / c_.fold
                                      : in;
    size_t size = c_.form == kPlanes    ? 8
                  : c_.form == kLookup  ? 1
                  : c_.form == kInt16   ? 2
                                        : 4;
    c_.group_bytes = taps * steps * planes * width * size;
    size_t bytes = c_.group_bytes * c_.groups;
    layer_.weights = std::make_unique<Buffer>(bytes);
    char* data = layer_.weights->data();
    std::memset(data, 0, bytes);
    c_.weights = data;
    auto at = [&](int o, size_t tap, size_t step) {
      size_t group = o / width;
      return data + group * c_.group_bytes +
             ((tap * steps + step) * planes * width + o % width) * size;
    };
    if (c_.form == kFloat32) {
      uint64_t next = first_weight_;
      for (int o = 0; o < c_.out.c; o++)
        for (size_t tap = 0; tap < taps; tap++)
          for (int i = 0; i < in; i++) {
            float x = op_.weights.value(next++) * (w ? op_.weight_unit : 1.0f);
            std::memcpy(at(o, tap, i), &x, sizeof x);
          }
      return;
    }
    each([&](int o, int tap, int first, const Bits& b) {
      if (c_.form == kPlanes) {
        auto* to = reinterpret_cast<uint64_t*>(at(o, tap, first / 64));
        to[0] = b.positive;
        for (size_t p = 1; p < planes; p++) to[p * width] = b.mask[p - 1];
        if (c_.paired && first / 64 % 2) to[0] ^= to[-static_cast<int>(width)];
        return;
      }
      if (c_.form == kLookup && w == 1) {
        for (int i = 0; i < 16 && first + i * 4 < in; i++)
          *at(o, tap, first / 4 + i) = b.positive >> (i * 4) & 15;
        return;
      }
      for (int i = 0; i < std::min(64, in - first); i++) {
        int magnitude = (b.mask[0] >> i & 1) | (b.mask[1] >> i & 1) << 1 |
                        (b.mask[2] >> i & 1) << 2;
        int level = b.positive >> i & 1 ? magnitude : -magnitude;
        if (c_.form == kLookup)
          fold(at(o, tap, 0), first + i, level);
        else if (c_.form == kBytes)
          at(o, tap, (first + i) / 4)[(first + i) % 4] =
              static_cast<char>(level);
        else if (c_.form == kInt16)
          lane<int16_t>(at(o, tap, first + i), level);
        else
          lane<int32_t>(at(o, tap, first + i), level);
      }
    });
  }

  // Adds a digit to the number of a few channels.
  void fold(char* tap, int channel, int level) {
    bool trits = c_.w_bits == 2;
    int base = trits ? 3 : 7, digit = trits ? level + 1 : level - level / 4 + 3;
    int shift = trits && c_.fold == 4 ? 2 : 1;  // Of the count of digits.
    for (int i = channel & ((1 << shift) - 1); i > 0; i--) digit *= base;
    tap[size_t(channel >> shift) * c_.width] += static_cast<char>(digit << c_.swapped);
  }

  template <class E>
  void lane(char* to, int level) {
    E sign = c_.w_bits == 3 ? level : level < 0 ? -1 : 0;
    E mask = level ? -1 : 0;
    std::memcpy(to, &sign, sizeof(E));
    if (c_.w_bits == 2) std::memcpy(to + c_.width * sizeof(E), &mask, sizeof(E));
  }

  void base() {
    const Window& w = c_.window;
    size_t stride = static_cast<size_t>(c_.groups) * c_.width;
    // Where a bit is 0.
    bool minus = (c_.form == kPlanes || c_.form == kLookup) && c_.a_bits == 1;
    Taps rows = {std::vector<int>(c_.out.h), {{0, w.h}}};
    Taps cols = {std::vector<int>(c_.out.w), {{0, w.w}}};
    // Padding by 0 has no 1-bit code: it counts as -1, which is added back here.
    if (minus && !op_.pad) {
      rows = taps(c_.out.h, c_.in.h, w.h, w.stride_h, w.step_h, w.top);
      cols = taps(c_.out.w, c_.in.w, w.w, w.stride_w, w.step_w, w.left);
    }
    layer_.base.resize(rows.range.size() * cols.range.size() * stride);
    if (c_.form != kFloat32) {
      // inside[y][x]: the sum of the levels of the taps above and left of (y, x).
      std::vector<int64_t> inside((w.h + 1) * size_t(w.w + 1));
      auto at = [&](int y, int x) -> int64_t& {
        return inside[y * size_t(w.w + 1) + x];
      };
      uint64_t next = first_weight_;
      for (int o = 0; o < c_.out.c; o++) {
        RunSums all;
        for (int y = 0; y < w.h; y++)
          for (int x = 0; x < w.w; x++) {
            int64_t before = all.levels;
            for (int i = 0; i < inputs_; i += 64) {
              int n = std::min(64, inputs_ - i);
              all.add(op_.weights.bits(next, n));
              next += n;
            }
            at(y + 1, x + 1) =
                at(y, x + 1) + at(y + 1, x) - at(y, x) + all.levels - before;
          }
        int64_t start = minus                  ? all.magnitudes
                        : c_.form == kPlanes   ? 0
                        : c_.form == kLookup   ? (c_.sums ? 0 : 2 * c_.steps)
                        : c_.form == kBytes    ? -4 * all.levels
                        : c_.w_bits < 3        ? all.negative
                                               : 0;
        for (size_t r = 0; r < rows.range.size(); r++)
          for (size_t k = 0; k < cols.range.size(); k++) {
            auto [top, bottom] = rows.range[r];
            auto [left, right] = cols.range[k];
            int64_t here = top < bottom && left < right
                               ? at(bottom, right) - at(top, right) - at(bottom, left) +
                                     at(top, left)
                               : 0;
            layer_.base[(r * cols.range.size() + k) * stride + o] =
                static_cast<int32_t>(start + all.levels - here);
          }
        if (!minus || op_.pad)  // One class, with all taps.
          layer_.base[o] = static_cast<int32_t>(start);
      }
    }
    layer_.row_class = std::move(rows.of);
    layer_.col_class = std::move(cols.of);
    c_.base = layer_.base.data();
    c_.row_class = layer_.row_class.data();
    c_.col_class = layer_.col_class.data();
    c_.col_classes = static_cast<int>(cols.range.size());
  }

  void border() {
    layer_.border.resize(c_.pixel_bytes);
    if (c_.in.kind == kCode) {
      std::vector<int8_t> codes(c_.in.stride + kAlign, static_cast<int8_t>(op_.pad));
      isa_.encode(c_, codes.data(), 1, layer_.border.data(),
                  c_.sums ? &c_.border_sum : nullptr);
      if (c_.a_bits == 1 && !op_.pad && c_.form != kFloat32)
        std::fill(layer_.border.begin(), layer_.border.end(), 0);
    }
    c_.border = layer_.border.data();
  }

  const Op& op_;
  const Value& x_;
  const Isa& isa_;
  int inputs_;  // Channels that an output channel reads.
  uint64_t first_weight_;
  Layer layer_;
  Conv& c_;
};

// What runs at a time: an operation, or a convolution with what follows it.
struct Step {
  int op;             // The last one.
  int conv = -1;      // The op that is the convolution, unless it is split.
  int threshold = -1;
  Finish finish = {};
};

struct Plan {
  std::vector<Step> steps;
  std::vector<size_t> offset;  // Of a value in the arena, for one image.
  size_t arena = 0;            // Bytes for an image.
  size_t group = 1;            // Images at a time.
};

}  // namespace
}  // namespace minw

using namespace minw;

struct minw_network {
  minw_network(const uint8_t* bytes, size_t size, const Limits& limits)
      : program(parse(bytes, size, limits)), isa(best_isa()) {
    program.source.offset = program.offset.data();
    size_t n = program.ops.size();
    layers.resize(n);
    thresholds.resize(n);
    for (size_t i = 0; i < n; i++) {
      Op& op = program.ops[i];
      const Map& out = program.values[i + 1].map;
      if (op.kind == kConv) {
        const Map& in = program.values[op.inputs[0]].map;
        int parts = has_own_inputs(op, in, out) ? 1 : op.groups;
        for (int part = 0; part < parts; part++)
          layers[i].push_back(LayerBuilder(program, op, out, isa, parts, part).take());
        op.weights = {};
      } else if (op.kind == kThreshold) {
        thresholds[i] = {op.bits,        op.codes, op.count, out.stride, op.flip.data(),
                         op.thresholds.data()};
      }
    }
    plain = plan(false, 0);
    fast = plan(true, static_cast<int>(n));
    // The convolution of a pass runs as late as its last operation. Where that is far
    // away, inputs of many convolutions could have to wait.
    if (fast.arena > limits.memory) fast = plan(true, 1);
  }

  Plan plan(bool fused, int reach) const;
  size_t work_bytes(const Plan& plan, size_t images) const;
  void run(const Plan& plan, const uint8_t* images, size_t n, char* scratch,
           float* logits) const;
  size_t image_bytes() const {
    return static_cast<size_t>(program.source.h) * program.source.w * program.channels;
  }

  Program program;
  const Isa& isa;
  // Those of each op: none unless it is a convolution, several if it is split.
  std::vector<std::vector<Layer>> layers;
  std::vector<Threshold> thresholds;
  Plan fast, plain;
  mutable Spare spare;

  void image(const uint8_t* images, size_t n, char* out) const;
  void split_conv(int op, const char* x, size_t n, const Work& work, char* to) const;
  template <class T>
  void pool(const Op& op, const Map& in, const Map& out, const T* x, size_t n,
            char* to) const;
  void float_norm(const Op& op, const Map& in, const void* x, const void* shortcut,
                  size_t n, const Map& out, void* to) const;
};

// What follows a convolution in its pass is at most `reach` operations after the one
// before it.
Plan minw_network::plan(bool fused, int reach) const {
  const auto& ops = program.ops;
  int n = static_cast<int>(ops.size());
  std::vector<int> uses(n + 1), consumer(n + 1, -1);
  for (int i = 0; i < n; i++) {
    auto use = [&](int value) { uses[value]++, consumer[value] = i; };
    for (int value : ops[i].inputs) use(value);
    if (ops[i].shortcut >= 0) use(ops[i].shortcut);
  }
  Plan p;
  std::vector<Step> at(n, Step{-1});  // A convolution's is where its last op was.
  std::vector<bool> taken(n);
  for (int i = 0; i < n; i++) {
    if (taken[i]) continue;
    Step step = {i};
    if (layers[i].size() == 1) {
      step.conv = i;
      step.finish = {1, 1, program.values[i + 1].map, nullptr};
      auto next = [&](OpKind kind) {
        int value = step.op + 1;
        if (!fused || uses[value] != 1 || program.values[value].map.kind != kInt)
          return false;
        if (consumer[value] > step.op + reach) return false;
        const Op& op = ops[consumer[value]];
        const Window& w = op.window;
        if (op.kind != kind || op.inputs[0] != value) return false;
        if (kind == kMaxPool &&
            (w.top || w.bottom || w.left || w.right || w.h != w.stride_h ||
             w.w != w.stride_w || w.h * w.w > kChunk / 4))
          return false;
        step.op = consumer[value];
        taken[step.op] = true;
        step.finish.out = program.values[step.op + 1].map;
        return true;
      };
      if (next(kMaxPool)) {
        step.finish.pool_h = ops[step.op].window.h;
        step.finish.pool_w = ops[step.op].window.w;
      }
      if (next(kThreshold)) step.finish.threshold = &thresholds[step.op];
      if (step.finish.threshold) step.threshold = step.op;
    }
    at[step.op] = step;
  }
  for (const Step& step : at)
    if (step.op >= 0) p.steps.push_back(step);

  // Where values lie: the first gap that is free while the value lives.
  int count = static_cast<int>(p.steps.size());
  std::vector<int> last(n + 1, fused ? -1 : count);
  auto reads = [&](const Step& step, auto visit) {
    for (int value : ops[step.conv >= 0 ? step.conv : step.op].inputs) visit(value);
    int tail = step.threshold >= 0 ? step.threshold : step.op;
    if (ops[tail].shortcut >= 0) visit(ops[tail].shortcut);
  };
  for (int s = 0; s < count; s++)
    reads(p.steps[s], [&](int value) { last[value] = std::max(last[value], s); });
  struct Piece {
    size_t begin, end;
    int last;
  };
  std::vector<Piece> pieces;  // Sorted by begin.
  p.offset.resize(n + 1);
  auto place = [&](int value, int now) {
    const Map& m = program.values[value].map;
    size_t size = aligned(static_cast<size_t>(m.h) * m.w * m.stride * m.size());
    pieces.erase(std::remove_if(pieces.begin(), pieces.end(),
                                [&](const Piece& x) { return x.last < now; }),
                 pieces.end());
    size_t begin = 0;
    auto before = pieces.begin();
    for (; before != pieces.end() && before->begin < begin + size; ++before)
      begin = before->end;
    pieces.insert(before, {begin, begin + size, std::max(last[value], now)});
    p.offset[value] = begin;
    p.arena = std::max(p.arena, begin + size);
  };
  // The image is stored only for what is not a convolution, or if all values are.
  if (!fused) place(0, 0);
  for (const Step& step : p.steps)
    if (step.conv < 0)
      for (int value : ops[step.op].inputs)
        if (value == 0 && p.offset[0] == 0 && pieces.empty()) place(0, 0);
  for (int s = 0; s < count; s++) place(p.steps[s].op + 1, s);
  size_t one = work_bytes(p, 2) - work_bytes(p, 1) + 1;
  p.group = fused ? std::clamp<size_t>(kGroupBytes / one, 1, kMaxGroup) : 1;
  return p;
}

namespace {

// The parts of scratch memory after the arena.
struct Layout {
  size_t padded = 0, magnitudes = 0, acc = 0, gathered = 0, counts = 0;
  size_t part_in = 0, part_out = 0;
  size_t bytes(size_t images) const {
    return aligned(padded * images + kPaddedSlack) + aligned(magnitudes * images) +
           aligned(acc) + aligned(gathered) + aligned(counts) +
           3 * aligned(kChunk * sizeof(void*)) +
           aligned(part_in * images + kAlign) + aligned(part_out * images);
  }
};

// Makes room for a convolution.
void add(const Conv& c, Layout* l) {
  size_t pixels = static_cast<size_t>(c.padded_h) * c.padded_w;
  l->padded = std::max(l->padded, pixels * c.pixel_bytes);
  if (c.sums) l->magnitudes = std::max(l->magnitudes, pixels * sizeof(int32_t));
  l->acc = std::max(l->acc, size_t{kChunk} * c.width * sizeof(int32_t));
  if (c.form == kLookup) {
    size_t rows = c.a_bits == c.w_bits ? kChunk / 2 : kChunk;  // Two in one, or not.
    l->gathered = std::max(l->gathered, rows * c.row_bytes);
    l->counts = kRowBlock * kChunk * sizeof(uint16_t);
  }
}

size_t map_bytes(const Map& m) {
  return static_cast<size_t>(m.h) * m.w * m.stride * m.size();
}

Layout layout(const std::vector<std::vector<Layer>>& layers) {
  Layout l;
  for (const auto& parts : layers) {
    if (parts.empty()) continue;
    if (parts.size() > 1) {
      l.part_in = std::max(l.part_in, map_bytes(parts[0].conv.in));
      l.part_out = std::max(l.part_out, map_bytes(parts[0].conv.out));
    }
    for (const Layer& layer : parts) add(layer.conv, &l);
  }
  return l;
}

// Copies `count` channels of the pixels of n images.
void copy_channels(const char* from, const Map& in, int first_in, char* to,
                   const Map& out, int first_out, size_t n, int count) {
  size_t size = in.size(), pixels = n * in.h * in.w;
  from += first_in * size;
  to += first_out * size;
  for (size_t i = 0; i < pixels; i++)
    std::memcpy(to + i * out.stride * size, from + i * in.stride * size, count * size);
}

}  // namespace

// The arena ends with room for vectors that read past the last pixel, as the inputs of
// a part do.
size_t minw_network::work_bytes(const Plan& plan, size_t images) const {
  return plan.arena * images + kAlign + layout(layers).bytes(images);
}

// A convolution in groups, one after another: the channels of each are copied out of
// the pixels, and its sums into them.
void minw_network::split_conv(int op, const char* x, size_t n, const Work& work,
                              char* to) const {
  const Map& in = program.values[program.ops[op].inputs[0]].map;
  const Map& out = program.values[op + 1].map;
  for (size_t part = 0; part < layers[op].size(); part++) {
    const Conv& c = layers[op][part].conv;
    copy_channels(x, in, part * c.in.c, work.part_in, c.in, 0, n, c.in.c);
    isa.conv(c, {1, 1, c.out, nullptr}, static_cast<int>(n), work.part_in, nullptr,
             work, work.part_out);
    copy_channels(work.part_out, c.out, 0, to, out, part * c.out.c, n, c.out.c);
  }
}

template <class T>
void minw_network::pool(const Op& op, const Map& in, const Map& out, const T* x,
                        size_t n, char* to) const {
  const Window& w = op.window;
  bool sum = op.kind == kSumPool;
  auto level = [&](T v) {
    return sum && in.kind == kCode ? v + (v == 3) - (v == -3) : v;
  };
  std::vector<decltype(level(T{}))> acc(in.c);
  for (size_t image = 0; image < n; image++)
    for (int y = 0; y < out.h; y++)
      for (int k = 0; k < out.w; k++) {
        bool first = true;
        std::fill(acc.begin(), acc.end(), 0);
        int top = y * w.stride_h - w.top, left = k * w.stride_w - w.left;
        for (int iy = std::max(top, 0); iy < std::min(top + w.h, in.h); iy++)
          for (int ix = std::max(left, 0); ix < std::min(left + w.w, in.w); ix++) {
            const T* from = x + ((image * in.h + iy) * in.w + ix) * in.stride;
            for (int c = 0; c < in.c; c++) {
              auto v = level(from[c]);
              acc[c] = sum ? acc[c] + v : first || v > acc[c] ? v : acc[c];
            }
            first = false;
          }
        size_t at = ((image * out.h + y) * out.w + k) * out.stride;
        for (int c = 0; c < in.c; c++) {
          if (sum)
            reinterpret_cast<decltype(level(T{}))*>(to)[at + c] = acc[c];
          else
            reinterpret_cast<T*>(to)[at + c] = static_cast<T>(acc[c]);
        }
      }
}

namespace {

int level(int code) { return code + (code == 3) - (code == -3); }

}  // namespace

void minw_network::float_norm(const Op& op, const Map& in, const void* x,
                              const void* shortcut, size_t n, const Map& out,
                              void* to) const {
  size_t pixels = n * in.h * in.w;
  const Map* other = op.shortcut >= 0 ? &program.values[op.shortcut].map : nullptr;
  for (size_t i = 0; i < pixels; i++)
    for (int c = 0; c < in.c; c++) {
      size_t at = i * in.stride + c;
      float v = in.kind == kInt ? static_cast<float>(static_cast<const int32_t*>(x)[at])
                                : static_cast<const float*>(x)[at];
      float y = (v * op.unit - op.center[c]) * op.scale[c] + op.constant[c];
      if (other) {
        float s = other->kind == kCode ? level(static_cast<const int8_t*>(shortcut)[at])
                                       : static_cast<const float*>(shortcut)[at];
        y = y + s * op.shortcut_unit;
      }
      if (!op.format) {
        static_cast<float*>(to)[i * in.c + c] = y;
        continue;
      }
      y = std::min(std::max(y, -1.0f), 1.0f);
      if (out.kind == kFloat) {
        static_cast<float*>(to)[at] = rounded(y, op.format);
        continue;
      }
      int code = 0;
      for (float t : op.grid) code += std::fabs(y) > t;
      if (op.bits == 1) code = 1;
      static_cast<int8_t*>(to)[at] = static_cast<int8_t>(y >= FLT_MIN ? code : -code);
    }
}

// Value 0.
void minw_network::image(const uint8_t* images, size_t n, char* out) const {
  const Map& m = program.values[0].map;
  const Source& s = program.source;
  int32_t* to = reinterpret_cast<int32_t*>(out);
  for (size_t i = 0; i < n; i++)
    for (int y = 0; y < m.h; y++) {
      size_t first = (i * s.h + y + s.top) * s.w + s.left;
      const uint8_t* row = images + first * m.c;
      for (int x = 0; x < m.w; x++, to += m.stride)
        for (int c = 0; c < m.c; c++) to[c] = *row++ - s.offset[c];
    }
}

void minw_network::run(const Plan& plan, const uint8_t* images, size_t n, char* scratch,
                       float* logits) const {
  auto at = [&](int value) { return scratch + plan.offset[value] * n; };
  Layout l = layout(layers);
  char* next = scratch + plan.arena * n + kAlign;
  auto part = [&](size_t bytes) {
    char* begin = next;
    next += aligned(bytes);
    return begin;
  };
  Work work;
  work.padded = part(l.padded * n + kPaddedSlack);
  work.magnitudes = reinterpret_cast<int32_t*>(part(l.magnitudes * n));
  work.acc = reinterpret_cast<int32_t*>(part(l.acc));
  work.pixels = reinterpret_cast<const char**>(part(kChunk * sizeof(void*)));
  work.base = reinterpret_cast<const int32_t**>(part(kChunk * sizeof(void*)));
  work.sums = reinterpret_cast<int32_t*>(part(kChunk * sizeof(int32_t)));
  work.gathered = reinterpret_cast<uint8_t*>(part(l.gathered));
  work.counts = reinterpret_cast<uint16_t*>(part(l.counts));
  work.part_in = part(l.part_in * n + kAlign);
  work.part_out = part(l.part_out * n);

  bool stored = false;
  auto store_image = [&] {
    if (!std::exchange(stored, true)) image(images, n, at(0));
  };

  for (const Step& step : plan.steps) {
    const Op& op = program.ops[step.op];
    const Map& out = program.values[step.op + 1].map;
    char* to = at(step.op + 1);
    if (step.conv >= 0) {
      int input = program.ops[step.conv].inputs[0];
      int shortcut = step.threshold >= 0 ? op.shortcut : -1;
      isa.conv(layers[step.conv][0].conv, step.finish, static_cast<int>(n),
               input ? static_cast<const void*>(at(input)) : images,
               shortcut >= 0 ? reinterpret_cast<const int8_t*>(at(shortcut)) : nullptr,
               work, to);
      continue;
    }
    for (int value : op.inputs)
      if (value == 0) store_image();
    const Map& in = program.values[op.inputs[0]].map;
    const char* x = at(op.inputs[0]);
    const char* shortcut = op.shortcut >= 0 ? at(op.shortcut) : nullptr;
    auto* codes = reinterpret_cast<const int8_t*>(x);
    auto* ints = reinterpret_cast<const int32_t*>(x);
    size_t pixels = n * out.h * out.w;
    switch (op.kind) {
      case kConv:
        split_conv(step.op, x, n, work, to);
        break;
      case kMaxPool:
      case kSumPool:
        if (in.kind == kCode)
          pool(op, in, out, codes, n, to);
        else if (in.kind == kInt)
          pool(op, in, out, ints, n, to);
        else
          pool(op, in, out, reinterpret_cast<const float*>(x), n, to);
        break;
      case kThreshold:
        isa.threshold(thresholds[step.op], ints,
                      reinterpret_cast<const int8_t*>(shortcut), pixels,
                      reinterpret_cast<int8_t*>(to));
        break;
      case kLogits:
        for (size_t i = 0; i < n * in.h * in.w; i++)
          for (int c = 0; c < in.c; c++) {
            int k = static_cast<int>(i % (in.h * in.w)) * in.c + c;
            float v = static_cast<float>(ints[i * in.stride + c]);
            *logits++ = (v * op.unit - op.center[k]) * op.scale[k] + op.constant[k];
          }
        break;
      case kConcat: {
        size_t from = 0;  // Channel.
        for (size_t k = 0; k < op.inputs.size(); k++) {
          const Map& m = program.values[op.inputs[k]].map;
          const char* v = at(op.inputs[k]);
          for (size_t i = 0; i < pixels; i++)
            if (m.kind != kInt)
              std::memcpy(to + (i * out.stride + from) * m.size(),
                          v + i * m.stride * m.size(), m.c * m.size());
            else
              for (int c = 0; c < m.c; c++)
                reinterpret_cast<int32_t*>(to)[i * out.stride + from + c] =
                    reinterpret_cast<const int32_t*>(v)[i * m.stride + c] *
                    (1 << op.shifts[k]);
          from += m.c;
        }
        break;
      }
      case kShortcut:
        for (size_t i = 0; i < n; i++)
          for (int y = 0; y < out.h; y++)
            for (int k = 0; k < out.w; k++, to += out.stride) {
              std::memset(to, 0, out.c);
              std::memcpy(to + op.before,
                          codes + ((i * in.h + y * op.window.stride_h) * in.w +
                                   k * op.window.stride_w) * in.stride,
                          in.c);
            }
        break;
      case kFloatNorm:
        float_norm(op, in, x, shortcut, n, out,
                   op.format ? static_cast<void*>(to) : logits);
        break;
      case kAdd:
        for (size_t i = 0; i < pixels; i++)
          for (int c = 0; c < in.c; c++) {
            size_t k = i * in.stride + c;
            const char* y = at(op.inputs[1]);
            int a = in.kind == kCode ? level(codes[k]) : ints[k];
            int b = in.kind == kCode ? level(reinterpret_cast<const int8_t*>(y)[k])
                                     : reinterpret_cast<const int32_t*>(y)[k];
            reinterpret_cast<int32_t*>(to)[k] =
                a * (1 << op.shifts[0]) + b * (1 << op.shifts[1]);
          }
        break;
    }
  }
}

// ---- The C interface.

namespace {

template <class Body>
bool guarded(char* error, size_t size, const Body& body) {
  const char* message = nullptr;
  std::string text;
  try {
    body();
    return true;
  } catch (const std::bad_alloc&) {
    message = "out of memory";
  } catch (const std::exception& e) {
    try {
      text = e.what();
      message = text.c_str();
    } catch (...) {
      message = "out of memory";
    }
  }
  if (error && size) std::snprintf(error, size, "%s", message);
  return false;
}

minw_shape shape(const Map& m) {
  return {static_cast<uint32_t>(m.h), static_cast<uint32_t>(m.w),
          static_cast<uint32_t>(m.c), m.kind, static_cast<uint32_t>(m.bits)};
}

}  // namespace

minw_network* minw_load(const void* bytes, size_t size, char* error,
                        size_t error_size) {
  return minw_load_within(bytes, size, nullptr, error, error_size);
}

minw_network* minw_load_within(const void* bytes, size_t size, const minw_limits* limits,
                               char* error, size_t error_size) {
  minw_network* network = nullptr;
  guarded(error, error_size, [&] {
    Limits most;
    if (limits) most = {limits->padding, limits->memory, limits->operations};
    network = new minw_network(static_cast<const uint8_t*>(bytes), size, most);
  });
  return network;
}

void minw_free(minw_network* network) { delete network; }

minw_shape minw_source(const minw_network* network) {
  const Program& p = network->program;
  return {static_cast<uint32_t>(p.source.h), static_cast<uint32_t>(p.source.w),
          static_cast<uint32_t>(p.channels), MINW_INT, 0};
}

uint32_t minw_classes(const minw_network* network) { return network->program.classes; }

const char* minw_metadata(const minw_network* network, size_t* size) {
  if (size) *size = network->program.metadata.size();
  return network->program.metadata.data();
}

int minw_logits(const minw_network* network, const uint8_t* images, size_t batch,
                float* logits, int threads, char* error, size_t error_size) {
  const minw_network& net = *network;
  bool done = guarded(error, error_size, [&] {
    if (!batch) return;
    size_t workers = std::max(threads, 1);
    size_t group = std::min(net.fast.group, (batch + workers - 1) / workers);
    size_t bytes = net.work_bytes(net.fast, group);
    std::atomic<bool> failed{false};
    Pool::shared().run((batch + group - 1) / group, threads, [&](size_t i) {
      size_t first = i * group, n = std::min(group, batch - first);
      try {
        auto scratch = net.spare.take(bytes);
        net.run(net.fast, images + first * net.image_bytes(), n, scratch->data(),
                logits + first * net.program.classes);
        net.spare.keep(std::move(scratch));
      } catch (const std::bad_alloc&) {
        failed = true;
      }
    });
    if (failed) throw std::bad_alloc();
  });
  return done ? 0 : -1;
}

uint32_t minw_num_ops(const minw_network* network) {
  return static_cast<uint32_t>(network->program.ops.size());
}

minw_shape minw_value_shape(const minw_network* network, uint32_t value) {
  return shape(network->program.values[value].map);
}

const char* minw_op_name(const minw_network* network, uint32_t op) {
  return network->program.ops[op].name.c_str();
}

const char* minw_op_kernel(const minw_network* network, uint32_t op) {
  const auto& layers = network->layers[op];
  if (!layers.empty()) return layers[0].kernel;
  for (const Step& step : network->fast.steps)
    if (step.op == static_cast<int>(op) && step.conv < 0)
      return network->program.ops[op].kind == kThreshold ? "thresholds" : "plain loops";
  return "in the pass of its convolution";
}

int minw_values(const minw_network* network, const uint8_t* images, size_t batch,
                void* const* values, char* error, size_t error_size) {
  const minw_network& net = *network;
  bool done = guarded(error, error_size, [&] {
    Buffer scratch(net.work_bytes(net.plain, 1));
    std::vector<float> logits(net.program.classes);
    size_t count = net.program.values.size();
    for (size_t i = 0; i < batch; i++) {
      const uint8_t* image = images + i * net.image_bytes();
      net.run(net.plain, image, 1, scratch.data(), logits.data());
      if (values[0]) net.image(image, 1, scratch.data() + net.plain.offset[0]);
      for (size_t v = 0; v < count; v++) {
        if (!values[v]) continue;
        const Map& m = net.program.values[v].map;
        size_t pixels = static_cast<size_t>(m.h) * m.w;
        char* to = static_cast<char*>(values[v]) + i * pixels * m.c * 4;
        const char* from = scratch.data() + net.plain.offset[v];
        if (v + 1 == count) {
          std::memcpy(to, logits.data(), logits.size() * 4);
          continue;
        }
        for (size_t p = 0; p < pixels; p++, to += m.c * size_t{4})
          for (int c = 0; c < m.c; c++) {
            size_t k = p * m.stride + c;
            int32_t wide;
            if (m.kind == kCode)
              wide = reinterpret_cast<const int8_t*>(from)[k];
            else
              std::memcpy(&wide, from + k * 4, 4);
            std::memcpy(to + c * 4, &wide, 4);
          }
      }
    }
  });
  return done ? 0 : -1;
}

const char* minw_isa(const minw_network* network) {
  if (network) return network->isa.name;
  const char* name = "";
  guarded(nullptr, 0, [&] { name = best_isa().name; });
  return name;
}

const char* minw_isas(void) { return isa_names.c_str(); }

uint64_t minw_peak(const minw_network* network, uint64_t steps) {
  return network->isa.peak(steps);
}

uint64_t minw_hash(const void* bytes, size_t size) {
  uint64_t hash = 0xcbf29ce484222325;
  for (size_t i = 0; i < size; i++)
    hash = (hash ^ static_cast<const uint8_t*>(bytes)[i]) * 0x100000001b3;
  return hash;
}
