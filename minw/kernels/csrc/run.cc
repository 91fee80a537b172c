// Runs a plan: convolutions by the kernels, other operations by plain loops.
#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstring>
#include <limits>

#include "engine.h"

namespace minw {
namespace {

// Levels of codes: the third one is worth 4.
int level(int code) { return code + (code == 3) - (code == -3); }

// Copies `count` channels of the pixels of n images.
void copy_channels(const char* from, const Map& in, int first_in, char* to,
                   const Map& out, int first_out, size_t n, int count) {
  size_t size = in.size(), pixels = n * in.h * in.w;
  from += first_in * size;
  to += first_out * size;
  for (size_t i = 0; i < pixels; i++)
    std::memcpy(to + i * out.stride * size, from + i * in.stride * size, count * size);
}

// Reduces the pixels of each window, without those of the border: a result begins with
// `start`, and becomes merge(result, x) for each pixel x.
template <class X, class R, class Merge>
void pool(const Window& w, const Map& in, const Map& out, const X* x, size_t n, R start,
          const Merge& merge, R* to) {
  // Copies that no store can change, so that the innermost loop is vectorized.
  const int channels = in.c;
  std::vector<R> results(channels);
  R* const result = results.data();
  for (size_t image = 0; image < n; image++)
    for (int y = 0; y < out.h; y++)
      for (int k = 0; k < out.w; k++, to += out.stride) {
        std::fill_n(result, channels, start);
        int top = y * w.stride_h - w.top, left = k * w.stride_w - w.left;
        for (int iy = std::max(top, 0); iy < std::min(top + w.h, in.h); iy++)
          for (int ix = std::max(left, 0); ix < std::min(left + w.w, in.w); ix++) {
            const X* from = x + ((image * in.h + iy) * in.w + ix) * in.stride;
            for (int c = 0; c < channels; c++) result[c] = merge(result[c], from[c]);
          }
        std::copy_n(result, channels, to);
      }
}

// The parts of scratch memory.
Work work_in(char* scratch, const Places& at) {
  Work work;
  work.padded = scratch + at.padded;
  work.magnitudes = reinterpret_cast<int32_t*>(scratch + at.magnitudes);
  work.acc = reinterpret_cast<int32_t*>(scratch + at.acc);
  work.pixels = reinterpret_cast<const char**>(scratch + at.pixels);
  work.base = reinterpret_cast<const int32_t**>(scratch + at.base);
  work.sums = reinterpret_cast<int32_t*>(scratch + at.sums);
  work.gathered = reinterpret_cast<uint8_t*>(scratch + at.gathered);
  work.counts = reinterpret_cast<uint16_t*>(scratch + at.counts);
  work.part_in = scratch + at.part_in;
  work.part_out = scratch + at.part_out;
  return work;
}

// One run of a plan, for n images.
class Run {
 public:
  Run(const minw_network& net, const Plan& plan, const uint8_t* images, size_t n,
      char* scratch, float* logits)
      : net_(net),
        program_(net.program),
        plan_(plan),
        images_(images),
        n_(n),
        scratch_(scratch),
        logits_(logits),
        work_(work_in(scratch, scratch_places(plan, net.needs, n))) {}

  void all() {
    bool stored = false;  // Whether value 0 was made.
    for (const Step& step : plan_.steps) {
      if (step.conv >= 0) {
        convolve(step);
        continue;
      }
      const Op& op = program_.ops[step.op];
      if (!stored && std::count(op.inputs.begin(), op.inputs.end(), 0)) {
        store_images(net_, images_, n_, at(0));
        stored = true;
      }
      operation(op, step.op);
    }
  }

 private:
  char* at(int value) const { return scratch_ + plan_.offset[value] * n_; }
  const Map& map(int value) const { return program_.values[value].map; }
  const int8_t* codes(int value) const {
    return reinterpret_cast<const int8_t*>(at(value));
  }
  const int32_t* ints(int value) const {
    return reinterpret_cast<const int32_t*>(at(value));
  }
  const float* floats(int value) const {
    return reinterpret_cast<const float*>(at(value));
  }
  size_t pixels(const Map& m) const { return n_ * m.h * m.w; }

  // A convolution and what follows it, in one pass.
  void convolve(const Step& step) {
    int input = program_.ops[step.conv].inputs[0];
    int shortcut = step.threshold >= 0 ? program_.ops[step.op].shortcut : -1;
    const void* x = input ? static_cast<const void*>(at(input)) : images_;
    net_.isa.conv(net_.layers[step.conv][0].conv, step.finish, static_cast<int>(n_), x,
                  shortcut >= 0 ? codes(shortcut) : nullptr, work_, at(step.op + 1));
  }

  void operation(const Op& op, int index) {
    int x = op.inputs[0];
    const Map& out = map(index + 1);
    char* to = at(index + 1);
    switch (op.kind) {
      case kConv: return split_conv(index, x, out, to);
      case kMaxPool: return max_pool(op, x, out, to);
      case kSumPool: return sum_pool(op, x, out, to);
      case kThreshold:
        return net_.isa.threshold(net_.thresholds[index], ints(x),
                                  op.shortcut >= 0 ? codes(op.shortcut) : nullptr,
                                  pixels(out), reinterpret_cast<int8_t*>(to));
      case kLogits: return make_logits(op, x);
      case kConcat: return concat(op, out, to);
      case kShortcut: return shortcut(op, x, out, to);
      case kFloatNorm: return float_norm(op, x, out, to);
      case kAdd: return add(op, reinterpret_cast<int32_t*>(to));
    }
  }

  // A convolution whose groups run one after another: the channels of each group are
  // copied out of the pixels, and its sums are copied into the result.
  void split_conv(int op, int x, const Map& out, char* to) {
    const auto& layers = net_.layers[op];
    for (int part = 0; part < static_cast<int>(layers.size()); part++) {
      const Conv& c = layers[part].conv;
      copy_channels(at(x), map(x), part * c.in.c, work_.part_in, c.in, 0, n_, c.in.c);
      net_.isa.conv(c, {1, 1, c.out, nullptr}, static_cast<int>(n_), work_.part_in,
                    nullptr, work_, work_.part_out);
      copy_channels(work_.part_out, c.out, 0, to, out, part * c.out.c, n_, c.out.c);
    }
  }

  void max_pool(const Op& op, int x, const Map& out, char* to) {
    const Map& in = map(x);
    auto run = [&](auto* from) {
      using X = std::decay_t<decltype(*from)>;
      pool(
          op.window, in, out, from, n_, std::numeric_limits<X>::lowest(),
          [](X a, X b) { return b > a ? b : a; }, reinterpret_cast<X*>(to));
    };
    if (in.kind == kCode)
      run(codes(x));
    else if (in.kind == kInt)
      run(ints(x));
    else
      run(floats(x));
  }

  // Sums levels of codes, integers or floats.
  void sum_pool(const Op& op, int x, const Map& out, char* to) {
    const Map& in = map(x);
    auto* sums = reinterpret_cast<int32_t*>(to);
    if (in.kind == kCode)
      pool(
          op.window, in, out, codes(x), n_, int32_t{0},
          [](int32_t a, int8_t b) { return a + level(b); }, sums);
    else if (in.kind == kInt)
      pool(
          op.window, in, out, ints(x), n_, int32_t{0},
          [](int32_t a, int32_t b) { return a + b; }, sums);
    else
      pool(
          op.window, in, out, floats(x), n_, 0.0f,
          [](float a, float b) { return a + b; }, reinterpret_cast<float*>(to));
  }

  // The logits of integers: normalized in the order of operations that training has.
  void make_logits(const Op& op, int x) {
    const Map& in = map(x);
    float* to = logits_;
    for (size_t i = 0; i < n_; i++)
      for (int p = 0; p < in.h * in.w; p++) {
        const int32_t* from = ints(x) + (i * in.h * in.w + p) * in.stride;
        for (int c = 0; c < in.c; c++) {
          int k = p * in.c + c;
          float v = static_cast<float>(from[c]);
          *to++ = (v * op.unit - op.center[k]) * op.scale[k] + op.constant[k];
        }
      }
  }

  // Joins channels. Integers of inputs with different units are shifted to one unit.
  void concat(const Op& op, const Map& out, char* to) {
    int first = 0;  // Channel.
    for (size_t k = 0; k < op.inputs.size(); k++) {
      int x = op.inputs[k];
      const Map& in = map(x);
      if (in.kind != kInt) {
        copy_channels(at(x), in, 0, to, out, first, n_, in.c);
      } else {
        auto* sums = reinterpret_cast<int32_t*>(to) + first;
        for (size_t i = 0; i < pixels(out); i++)
          for (int c = 0; c < in.c; c++)
            sums[i * out.stride + c] = ints(x)[i * in.stride + c] * (1 << op.shifts[k]);
      }
      first += in.c;
    }
  }

  // Takes pixels by strides, and fills channels before and after with zeros.
  void shortcut(const Op& op, int x, const Map& out, char* to) {
    const Map& in = map(x);
    for (size_t i = 0; i < n_; i++)
      for (int y = 0; y < out.h; y++)
        for (int k = 0; k < out.w; k++, to += out.stride) {
          size_t row = i * in.h + y * op.window.stride_h;
          size_t pixel = row * in.w + k * op.window.stride_w;
          std::memset(to, 0, out.c);
          std::memcpy(to + op.before, codes(x) + pixel * in.stride, in.c);
        }
  }

  // A value of a shortcut, in its own unit.
  float shortcut_at(int value, size_t i) const {
    return map(value).kind == kCode ? static_cast<float>(level(codes(value)[i]))
                                    : floats(value)[i];
  }

  // Batch norm, an optional shortcut, HardTanh and a quantizer, all in float32 and in
  // the order of operations that training has. Format 0 gives logits, without the last
  // two.
  void float_norm(const Op& op, int x, const Map& out, char* to) {
    const Map& in = map(x);
    for (size_t i = 0; i < pixels(in); i++)
      for (int c = 0; c < in.c; c++) {
        size_t k = i * in.stride + c;
        float v = in.kind == kInt ? static_cast<float>(ints(x)[k]) : floats(x)[k];
        float y = (v * op.unit - op.center[c]) * op.scale[c] + op.constant[c];
        if (op.shortcut >= 0) y = y + shortcut_at(op.shortcut, k) * op.shortcut_unit;
        if (!op.format) {
          logits_[i * in.c + c] = y;
          continue;
        }
        y = std::min(std::max(y, -1.0f), 1.0f);
        if (out.kind == kFloat)
          reinterpret_cast<float*>(to)[k] = rounded(y, op.format);
        else
          reinterpret_cast<int8_t*>(to)[k] = quantized(op, y);
      }
  }

  // The code of a float: the count of thresholds that its magnitude exceeds, with its
  // sign. With 1 bit there is no code 0, and what is not positive becomes -1.
  static int8_t quantized(const Op& op, float y) {
    int code = op.bits == 1;
    for (float t : op.grid) code += std::fabs(y) > t;
    return static_cast<int8_t>(y >= FLT_MIN ? code : -code);
  }

  // Adds two values. Each is shifted, so that both have the unit of the result.
  void add(const Op& op, int32_t* to) {
    int x = op.inputs[0], y = op.inputs[1];
    const Map& in = map(x);
    for (size_t i = 0; i < pixels(in); i++)
      for (int c = 0; c < in.c; c++) {
        size_t k = i * in.stride + c;
        int a = in.kind == kCode ? level(codes(x)[k]) : ints(x)[k];
        int b = in.kind == kCode ? level(codes(y)[k]) : ints(y)[k];
        to[k] = a * (1 << op.shifts[0]) + b * (1 << op.shifts[1]);
      }
  }

  const minw_network& net_;
  const Program& program_;
  const Plan& plan_;
  const uint8_t* images_;
  const size_t n_;
  char* const scratch_;
  float* const logits_;
  const Work work_;
};

}  // namespace

void run(const minw_network& net, const Plan& plan, const uint8_t* images, size_t n,
         char* scratch, float* logits) {
  Run(net, plan, images, n, scratch, logits).all();
}

void store_images(const minw_network& net, const uint8_t* images, size_t n, char* out) {
  const Map& m = net.program.values[0].map;
  const Source& s = net.program.source;
  int32_t* to = reinterpret_cast<int32_t*>(out);
  for (size_t i = 0; i < n; i++)
    for (int y = 0; y < m.h; y++) {
      size_t first = (i * s.h + y + s.top) * s.w + s.left;
      const uint8_t* row = images + first * m.c;
      for (int x = 0; x < m.w; x++, to += m.stride)
        for (int c = 0; c < m.c; c++) to[c] = *row++ - s.offset[c];
    }
}

}  // namespace minw
