// Runs a plan: convolutions by the kernels, other operations by plain loops.
#include <algorithm>
#include <cfloat>
#include <chrono>
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

// Pieces of a layer that each thread takes on average. With several of them, threads
// that begin late or run slowly take fewer.
constexpr size_t kPiecesOfThread = 3;

// Smallest pieces, since handing one to another thread takes about a microsecond.
constexpr size_t kMinProducts = size_t{1} << 19;
constexpr size_t kMinBytes = size_t{1} << 14;

size_t divided_up(size_t x, size_t by) { return (x + by - 1) / by; }

// One run of a plan, for n images.
class Run {
 public:
  Run(const minw_network& net, const Plan& plan, const uint8_t* images, size_t n,
      char* scratch, float* logits, const Team::Lease& team)
      : net_(net),
        program_(net.program),
        plan_(plan),
        images_(images),
        n_(n),
        scratch_(scratch),
        logits_(logits),
        team_(team),
        places_(scratch_places(plan, n)) {}

  // Runs all steps. If `seconds` is not null, the time of each step is added to that of
  // its first operation.
  void all(double* seconds) {
    for (const Step& s : plan_.steps) {
      if (!seconds) {
        step(s);
        continue;
      }
      auto begin = std::chrono::steady_clock::now();
      step(s);
      std::chrono::duration<double> time = std::chrono::steady_clock::now() - begin;
      seconds[s.conv >= 0 ? s.conv : s.op] += time.count();
    }
  }

 private:
  void step(const Step& s) {
    if (s.conv >= 0) return convolve(s);
    const Op& op = program_.ops[s.op];
    if (!stored_ && std::count(op.inputs.begin(), op.inputs.end(), 0)) {
      store_images(net_, images_, n_, at(0));
      stored_ = true;
    }
    operation(op, s.op);
  }

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

  Work work(int thread) const { return work_in(scratch_, places_, thread, n_); }

  // Calls part(begin, end, thread) for ranges that cover 0, ..., count - 1, divided
  // among the team's threads. Ranges are not shorter than `least`.
  template <class Part>
  void divide(size_t count, size_t least, const Part& part) const {
    size_t most = team_.threads() > 1 ? team_.threads() * kPiecesOfThread : 1;
    size_t pieces = std::clamp<size_t>(count / least, 1, most);
    team_.loop(pieces, [&](size_t i, int thread) {
      part(count * i / pieces, count * (i + 1) / pieces, thread);
    });
  }

  // A convolution and what follows it, in one pass.
  void convolve(const Step& step) {
    int input = program_.ops[step.conv].inputs[0];
    int shortcut = step.threshold >= 0 ? program_.ops[step.op].shortcut : -1;
    const void* x = input ? static_cast<const void*>(at(input)) : images_;
    convolve(net_.layers[step.conv][0], step.finish, x,
             shortcut >= 0 ? codes(shortcut) : nullptr, at(step.op + 1));
  }

  // Converts the input and convolves it.
  void convolve(const Layer& layer, const Finish& f, const void* in,
                const int8_t* shortcut, void* out) const {
    const Conv& c = layer.conv;
    size_t row_bytes = size_t{1} * c.padded_w * c.pixel_bytes;
    divide(n_ * c.padded_h, kMinBytes / row_bytes + 1,
           [&](size_t begin, size_t end, int thread) {
             layer.isa->pad(c, in, begin, end, work(thread));
           });
    if (f.by_rows())
      convolve_rows(layer, f, shortcut, out);
    else
      convolve_chunks(layer, f, shortcut, out);
  }

  // Pieces of the result are chunks, and where there are few of them, chunks of some of
  // the channels.
  void convolve_chunks(const Layer& layer, const Finish& f, const int8_t* shortcut,
                       void* out) const {
    const Conv& c = layer.conv;
    // Units of a chunk: pooling windows, or rows of them in all images.
    bool rows = c.form == kTiles;
    size_t units = rows ? f.out.h : n_ * f.out.h * f.out.w;
    size_t pixels = rows ? n_ * c.out.w * f.pool_h : size_t{1} * f.pool_h * f.pool_w;
    // With wide groups of bit planes, fewer pixels have as many sums.
    size_t limit = c.form == kPlanes ? kChunk * kLane / c.width : kChunk;
    size_t chunk = std::max(limit / pixels, size_t{1});
    size_t chunks = divided_up(units, chunk);
    uint64_t most = units * pixels * c.products / kMinProducts;
    size_t wanted = std::min<uint64_t>(team_.threads() * kPiecesOfThread, most);
    size_t splits = 1;
    if (team_.threads() > 1 && wanted > chunks)
      splits = std::min<size_t>(divided_up(wanted, chunks), c.groups);
    auto piece = [&](size_t i, int thread) {
      size_t first = i / splits * chunk, split = i % splits;
      Piece p = {first, static_cast<int>(std::min(chunk, units - first)),
                 static_cast<int>(c.groups * split / splits),
                 static_cast<int>(c.groups * (split + 1) / splits)};
      layer.isa->conv(c, f, p, shortcut, work(thread), out);
    };
    divide(chunks * splits, wanted ? divided_up(chunks * splits, wanted) : chunks,
           [&](size_t begin, size_t end, int thread) {
             for (size_t i = begin; i < end; i++) piece(i, thread);
           });
  }

  // Pools windows that overlap or that reach into a border. A row of the convolution
  // becomes a line, which has the maximum of each window's part of this row. Lines are
  // kept while windows read them: line y lies at place y modulo the height of a window.
  //
  //   rows of the convolution   0 1 2 3 4 5 6     windows of 3 rows, stride 2
  //   first row of windows      * * *
  //   second row                    * * *         makes lines 3 and 4; line 2 is there
  //   third row                         * * *     makes lines 5 and 6
  void convolve_rows(const Layer& layer, const Finish& f, const int8_t* shortcut,
                     void* out) const {
    const Conv& c = layer.conv;
    const Window& w = *f.windows;
    const size_t line = size_t{1} * f.out.w * f.out.stride;
    uint64_t products = c.products * c.out.w * w.stride_h;  // Per row of windows.
    auto rows = [&](size_t begin, size_t end, int thread) {
      int32_t* lines = work(thread).lines;
      size_t next = 0;  // The row of the convolution after the last line.
      for (size_t row = begin; row < end; row++) {
        const size_t image = row / f.out.h * c.out.h;
        const int top = static_cast<int>(row % f.out.h) * w.stride_h - w.top;
        const size_t first = image + std::max(top, 0);
        const size_t last = image + std::min(top + w.h, c.out.h);
        for (next = std::max(next, first); next < last; next++)
          make_line(layer, f, next, thread, lines + next % w.h * line);
        int32_t* most =
            f.threshold ? lines + w.h * line : static_cast<int32_t*>(out) + row * line;
        std::copy_n(lines + first % w.h * line, line, most);
        for (size_t y = first + 1; y < last; y++)
          layer.isa->maximum(c.out.kind, lines + y % w.h * line, line, most);
        if (f.threshold)
          layer.isa->threshold(*f.threshold, most,
                               shortcut ? shortcut + row * line : nullptr, f.out.w,
                               static_cast<int8_t*>(out) + row * line);
      }
    };
    divide(n_ * f.out.h, kMinProducts / products + 1, rows);
  }

  // Convolves row `y` of all images and pools it horizontally.
  void make_line(const Layer& layer, const Finish& f, size_t y, int thread,
                 int32_t* line) const {
    Finish row = f;
    row.threshold = nullptr;
    row.out.kind = layer.conv.out.kind;
    const int windows = (kChunk - f.pool_w) / f.windows->stride_w + 1;  // In a chunk.
    for (int x = 0; x < f.out.w; x += windows) {
      const Piece piece = {y * f.out.w + x, std::min(windows, f.out.w - x), 0,
                           layer.conv.groups};
      layer.isa->conv(layer.conv, row, piece, nullptr, work(thread), line);
    }
  }

  void operation(const Op& op, int index) {
    int x = op.inputs[0];
    const Map& out = map(index + 1);
    char* to = at(index + 1);
    switch (op.kind) {
      case kConv: return split_conv(index, x, out, to);
      case kMaxPool: return max_pool(op, x, out, to);
      case kSumPool: return sum_pool(op, x, out, to);
      case kThreshold: return threshold(op, net_.thresholds[index], pixels(out), x, to);
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
    char* part_in = scratch_ + places_.part_in;
    char* part_out = scratch_ + places_.part_out;
    for (int part = 0; part < static_cast<int>(layers.size()); part++) {
      const Conv& c = layers[part].conv;
      copy_channels(at(x), map(x), part * c.in.c, part_in, c.in, 0, n_, c.in.c);
      convolve(layers[part], {1, 1, c.out, nullptr, nullptr}, part_in, nullptr,
               part_out);
      copy_channels(part_out, c.out, 0, to, out, part * c.out.c, n_, c.out.c);
    }
  }

  void threshold(const Op& op, const Threshold& t, size_t pixels, int x, char* to) {
    const int8_t* shortcut = op.shortcut >= 0 ? codes(op.shortcut) : nullptr;
    divide(pixels, kMinBytes / t.stride + 1, [&](size_t begin, size_t end, int) {
      size_t first = begin * t.stride;
      net_.choice.isa.threshold(t, ints(x) + first,
                                shortcut ? shortcut + first : nullptr, end - begin,
                                reinterpret_cast<int8_t*>(to) + first);
    });
  }

  void max_pool(const Op& op, int x, const Map& out, char* to) {
    const Map& in = map(x);
    if (in.kind != kCode)
      return max_pool(op.window, in, ints(x), out, reinterpret_cast<int32_t*>(to));
    pool(
        op.window, in, out, codes(x), n_, std::numeric_limits<int8_t>::lowest(),
        [](int8_t a, int8_t b) { return b > a ? b : a; },
        reinterpret_cast<int8_t*>(to));
  }

  // Integers or floats: the maximum of the rows of windows, then that of their pixels.
  void max_pool(const Window& w, const Map& in, const int32_t* x, const Map& out,
                int32_t* to) const {
    const size_t row_size = size_t{1} * in.w * in.stride, pixel = in.stride;
    std::vector<int32_t> lines(row_size * team_.threads());
    auto pool_row = [&](size_t row, int32_t* line) {
      int top = static_cast<int>(row % out.h) * w.stride_h - w.top;
      const int32_t* image = x + row / out.h * in.h * row_size;
      const int first = std::max(top, 0), end = std::min(top + w.h, in.h);
      std::copy_n(image + first * row_size, row_size, line);
      for (int y = first + 1; y < end; y++)
        net_.choice.isa.maximum(in.kind, image + y * row_size, row_size, line);
      int32_t* result = to + row * out.w * pixel;
      for (int k = 0; k < out.w; k++, result += pixel) {
        int left = k * w.stride_w - w.left;
        const int begin = std::max(left, 0), last = std::min(left + w.w, in.w);
        std::copy_n(line + begin * pixel, pixel, result);
        for (int i = begin + 1; i < last; i++)
          net_.choice.isa.maximum(in.kind, line + i * pixel, pixel, result);
      }
    };
    divide(n_ * out.h, kMinBytes / (row_size * sizeof(int32_t)) + 1,
           [&](size_t begin, size_t end, int thread) {
             for (size_t row = begin; row < end; row++)
               pool_row(row, lines.data() + thread * row_size);
           });
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
    std::vector<float> rows(size_t{1} * in.c * team_.threads());
    divide(pixels(in), kMinBytes / in.stride + 1,
           [&](size_t begin, size_t end, int thread) {
             float* y = rows.data() + size_t{1} * in.c * thread;
             for (size_t i = begin; i < end; i++) {
               size_t first = i * in.stride;
               normalize(op, x, first, in.c, y);
               if (!op.format) {
                 std::copy_n(y, in.c, logits_ + i * in.c);
               } else if (out.kind == kFloat) {
                 auto* result = reinterpret_cast<float*>(to) + first;
                 for (int c = 0; c < in.c; c++)
                   result[c] = rounded(clipped(y[c]), op.format);
               } else {
                 quantize(op, y, in.c, reinterpret_cast<int8_t*>(to) + first);
               }
             }
           });
  }

  // Batch norm of the channels of a pixel, whose first element is `first`.
  void normalize(const Op& op, int x, size_t first, int channels, float* y) const {
    auto norm = [&](auto* v) {
      for (int c = 0; c < channels; c++)
        y[c] = (static_cast<float>(v[c]) * op.unit - op.center[c]) * op.scale[c] +
               op.constant[c];
    };
    map(x).kind == kInt ? norm(ints(x) + first) : norm(floats(x) + first);
    if (op.shortcut >= 0)
      for (int c = 0; c < channels; c++)
        y[c] = y[c] + shortcut_at(op.shortcut, first + c) * op.shortcut_unit;
  }

  static float clipped(float y) { return std::min(std::max(y, -1.0f), 1.0f); }

  // The codes of floats: the count of thresholds that the magnitude exceeds, with its
  // sign. With 1 bit there is no code 0, and what is not positive becomes -1.
  static void quantize(const Op& op, const float* y, int channels, int8_t* to) {
    for (int c = 0; c < channels; c++) to[c] = op.bits == 1;
    for (const float t : op.grid)
      for (int c = 0; c < channels; c++)
        to[c] = static_cast<int8_t>(to[c] + (std::fabs(clipped(y[c])) > t));
    for (int c = 0; c < channels; c++)
      to[c] = static_cast<int8_t>(y[c] >= FLT_MIN ? to[c] : -to[c]);
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
  const Team::Lease& team_;
  const Places places_;
  bool stored_ = false;  // Whether value 0 was made.
};

}  // namespace

void run(const minw_network& net, const Plan& plan, const uint8_t* images, size_t n,
         char* scratch, float* logits, const Team::Lease& team, double* seconds) {
  Run(net, plan, images, n, scratch, logits, team).all(seconds);
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
