// Parses .minw files: reads the operations, infers the shapes and bounds of all values
// and checks every rule of docs/format.md.
#include <algorithm>
#include <cmath>
#include <utility>

#include "program.h"
#include "reader.h"
#include "rules.h"

namespace minw {
namespace {

// The exponent e for which the magnitude of x is below 2^e.
int exponent_of(float x) {
  int e;
  std::frexp(x, &e);
  return e;
}

// The number of bits of x, which is at least 0.
int bit_length(int64_t x) {
  int n = 0;
  for (; x; x >>= 1) n++;
  return n;
}

// Tables for a checksum of 8 bytes at a time. Table k has what a byte adds to the
// checksum when k more bytes follow it.
using CrcTables = uint32_t[8][256];

void fill_crc_tables(CrcTables& table) {
  for (uint32_t i = 0; i < 256; i++) {
    table[0][i] = i;
    for (int k = 0; k < 8; k++)
      table[0][i] = (table[0][i] >> 1) ^ (table[0][i] & 1 ? 0xedb88320u : 0);
  }
  for (int k = 1; k < 8; k++)
    for (int i = 0; i < 256; i++)
      table[k][i] = (table[k - 1][i] >> 8) ^ table[0][table[k - 1][i] & 255];
}

// Continues a checksum. Browsers first compile a function quickly and without
// optimizations, and replace it only between two calls. A file is therefore read in
// pieces, each by a call.
__attribute__((noinline)) uint32_t crc32_of_piece(const CrcTables& table, uint32_t crc,
                                                  const uint8_t* bytes, size_t size) {
  for (; size >= 8; size -= 8, bytes += 8) {
    uint32_t low, high;
    std::memcpy(&low, bytes, 4);
    std::memcpy(&high, bytes + 4, 4);
    low ^= crc;
    crc = table[7][low & 255] ^ table[6][low >> 8 & 255] ^ table[5][low >> 16 & 255] ^
          table[4][low >> 24] ^ table[3][high & 255] ^ table[2][high >> 8 & 255] ^
          table[1][high >> 16 & 255] ^ table[0][high >> 24];
  }
  for (; size; size--, bytes++) crc = table[0][(crc ^ *bytes) & 255] ^ (crc >> 8);
  return crc;
}

// The checksum of zlib and PNG.
uint32_t crc32(const uint8_t* bytes, size_t size) {
  constexpr size_t kPiece = 16384;
  CrcTables table;
  fill_crc_tables(table);
  uint32_t crc = ~0u;
  for (size_t at = 0; at < size; at += kPiece)
    crc = crc32_of_piece(table, crc, bytes + at, std::min(kPiece, size - at));
  return ~crc;
}

// The shape of a value, whose channels are padded to whole vectors.
Map make_map(Kind kind, int bits, int64_t h, int64_t w, int64_t c) {
  for (int64_t x : {h, w, c})
    if (x < 1 || x > kMaxSize)
      throw Error("a value of " + str(h) + " x " + str(w) + " x " + str(c));
  if (h * w * c > kMaxElements)
    throw Error("a value of " + str(h) + " x " + str(w) + " x " + str(c) +
                " has over 2^24 elements");
  int64_t stride = (c + kLane - 1) / kLane * kLane;
  return {kind, bits, int(h), int(w), int(c), static_cast<int>(stride)};
}

// The largest code.
int levels_of(int bits) { return bits == 3 ? 3 : 1; }

// Parses the program of a file. The value of an operation is inferred as soon as the
// operation is read, because the sizes of the next operation's fields depend on it.
class Parser {
 public:
  Parser(Reader reader, uint32_t version, Program* program)
      : in_(reader), version_(version), p_(*program) {}

  void run() {
    Source& s = p_.source;
    s.h = in_.size("source height");
    s.w = in_.size("source width");
    p_.channels = in_.size("channels");
    int h = in_.limited("crop height", 1, s.h), w = in_.limited("crop width", 1, s.w);
    s.top = (s.h - h) / 2;
    s.left = (s.w - w) / 2;
    const uint8_t* offset = in_.take(p_.channels);
    if (int64_t{s.h} * s.w * p_.channels > kMaxElements)
      throw Error("an image of over 2^24 elements");
    Map image = make_map(kInt, 0, h, w, p_.channels);
    p_.offset.assign(offset, offset + p_.channels);
    std::vector<int64_t> bound(p_.channels);
    for (int c = 0; c < p_.channels; c++)
      bound[c] = std::max<int64_t>(offset[c], 255 - offset[c]);
    p_.values.push_back({image, false, std::move(bound)});
    channels_ = p_.channels;
    p_.classes = in_.size("number of classes");
    int ops = in_.limited("number of operations", 1, kMaxOps);
    for (int i = 0; i < ops; i++) {
      std::string where = "operation " + str(i);
      if (ended_) throw Error(where + " follows the logits");
      const Subject subject(std::move(where));
      Op op;
      int kind = in_.get<uint8_t>();
      op.kind = static_cast<OpKind>(kind);
      op.name = in_.name();
      p_.values.push_back(fields(&op, kind));
      channels_ += p_.values.back().map.c;
      if (channels_ > kMaxChannels) throw Error("over 2^22 channels in all");
      p_.ops.push_back(std::move(op));
    }
    if (!ended_) throw Error("the last operation does not make logits");
    if (!in_.done()) throw Error("data after the last operation");
  }

 private:
  Value fields(Op* op, int kind) {
    switch (kind) {
      case kConv: return conv(op);
      case kMaxPool:
      case kSumPool: return pool(op);
      case kThreshold: return threshold(op);
      case kLogits: return logits(op);
      case kConcat: return concat(op);
      case kShortcut: return shortcut(op);
      case kFloatNorm: return float_norm(op);
      case kAdd: return add(op);
      default: throw Error("unknown kind " + str(kind));
    }
  }

  const Value& input(Op* op) {
    op->inputs.push_back(in_.limited("input", 0, int64_t(p_.values.size()) - 1));
    return p_.values[op->inputs.back()];
  }

  const Value& input(Op* op, Kind kind, const char* name) {
    const Value& value = input(op);
    if (value.map.kind != kind) throw Error(std::string("its input is not ") + name);
    return value;
  }

  // The value of an operation's shortcut, or null if it has none.
  const Value* shortcut_of(Op* op, const Map& like) {
    op->shortcut = std::max(in_.get<int32_t>(), -1);
    if (op->shortcut == -1) return nullptr;
    if (op->shortcut >= static_cast<int64_t>(p_.values.size()))
      throw Error("shortcut " + str(op->shortcut) + " does not exist");
    const Value& value = p_.values[op->shortcut];
    const Map& m = value.map;
    if (m.h != like.h || m.w != like.w || m.c != like.c)
      throw Error("its shortcut has another shape");
    return &value;
  }

  int pad(const char* what) { return in_.limited(what, 0, kMaxPad); }

  Window window(int kh, int kw) {
    Window w = {};
    w.h = kh;
    w.w = kw;
    w.stride_h = in_.limited("stride", 1, kMaxStride);
    w.stride_w = in_.limited("stride", 1, kMaxStride);
    w.top = pad("padding");
    w.bottom = pad("padding");
    w.left = pad("padding");
    w.right = pad("padding");
    w.step_h = w.step_w = 1;
    return w;
  }

  // Pixels that a window spans.
  static int rows(const Window& w) { return (w.h - 1) * w.step_h + 1; }
  static int columns(const Window& w) { return (w.w - 1) * w.step_w + 1; }

  static void check_window(const Map& map, const Window& w) {
    int64_t h = map.h + w.top + w.bottom, width = map.w + w.left + w.right;
    if (rows(w) > std::min(h, kMaxSize) || columns(w) > std::min(width, kMaxSize))
      throw Error("its window is larger than the padded input");
    if (h * width * map.c > kMaxPadded)
      throw Error("its padded input has over 2^26 elements");
  }

  static int out_h(const Map& m, const Window& w) {
    return (m.h + w.top + w.bottom - rows(w)) / w.stride_h + 1;
  }
  static int out_w(const Map& m, const Window& w) {
    return (m.w + w.left + w.right - columns(w)) / w.stride_w + 1;
  }

  static int64_t checked(int64_t bound) {
    if (bound >= kMaxBound) throw Error("its sums may reach " + str(bound));
    return bound;
  }

  int shift(Op* op, const Value& x) {
    int shift = in_.get<uint8_t>();
    if (shift > kMaxShift) throw Error("a shift of " + str(shift));
    op->shifts.push_back(shift);
    for (int64_t bound : x.bound) checked(bound << shift);
    return shift;
  }

  Value conv(Op* op) {
    const Value& x = input(op);
    int format = in_.get<uint8_t>();
    int size[4];
    for (int& s : size) s = in_.size("size");
    auto [kh, kw, in, out] = size;
    op->window = window(kh, kw);
    op->pad = int{in_.get<int8_t>()};
    op->weight_unit = in_.constant("weight unit");
    op->unit = in_.constant("input unit");
    if (version_ > 1) {
      op->groups = in_.size("number of groups");
      op->window.step_h = in_.limited("dilation", 1, kMaxStride);
      op->window.step_w = in_.limited("dilation", 1, kMaxStride);
    }
    check_window(x.map, op->window);
    if (int64_t{in} * op->groups != x.map.c)
      throw Error(str(op->groups) + " groups of " + str(in) +
                  " input channels, but its input has " + str(x.map.c));
    if (out % op->groups)
      throw Error(str(out) + " output channels in " + str(op->groups) + " groups");
    int edge = x.map.kind == kCode ? levels_of(x.map.bits) : 0;
    if (std::abs(op->pad) > edge) throw Error("padding by code " + str(op->pad));
    int64_t row = int64_t{1} * kh * kw * in;  // At most kMaxPadded.
    uint64_t count = uint64_t{1} * row * out;
    uint64_t bytes;
    switch (format) {
      case 1:
      case 2:
      case 3: bytes = (count + 7) / 8 * format; break;
      case kFloat8: bytes = count; break;
      case kHalf:
      case kBfloat: bytes = count * 2; break;
      case kSingle: bytes = count * 4; break;
      default: throw Error("unknown weight format " + str(format));
    }
    op->weights = {format, in_.take(bytes), count};
    bool exact = format <= 3 && x.map.kind != kFloat;
    Map map = make_map(exact ? kInt : kFloat, 0, out_h(x.map, op->window),
                       out_w(x.map, op->window), out);
    Value value = {map, false, {}};
    float largest = format > 3 ? largest_weight(op->weights) : 0;
    if (!exact)
      value.exponent = checked_exponent(exponent_of_products(*op, x, row, largest));
    const int outputs = out / op->groups;  // In each group.
    for (int group = 0; exact && group < op->groups; group++) {
      const int64_t* bound = x.bound.data() + int64_t{group} * in;
      const bool even = std::equal(bound + 1, bound + in, bound);
      for (int o = group * outputs; o < (group + 1) * outputs; o++)
        value.bound.push_back(
            checked(even ? bound[0] * magnitudes(op->weights, o * row, row)
                         : sum_bound(op->weights, o * row, row, bound, in)));
    }
    return value;
  }

  // The sum of the magnitudes of `count` weights.
  static int64_t magnitudes(const Weights& weights, int64_t first, int64_t count) {
    if (weights.format == 1) return count;
    int64_t sum = 0;
    for (int64_t end = first + count; first < end; first += 64) {
      const int n = static_cast<int>(std::min<int64_t>(64, end - first));
      const uint64_t low = weights.plane(1, first, n);
      const uint64_t high = weights.format == 3 ? weights.plane(2, first, n) : 0;
      // A code of 3 has the magnitude 4.
      sum += __builtin_popcountll(low) + 2 * __builtin_popcountll(high) +
             __builtin_popcountll(low & high);
    }
    return sum;
  }

  // Bounds the sum of an output channel, whose `row` weights begin at `first`: the sum
  // over them of magnitude times the bound of the input channel.
  static int64_t sum_bound(const Weights& weights, int64_t first, int64_t row,
                           const int64_t* bound, int64_t in) {
    int64_t sum = 0;
    for (int64_t tap = 0; tap < row; tap += in)
      for (int64_t i = 0; i < in; i += 64) {
        int n = static_cast<int>(std::min<int64_t>(64, in - i));
        Bits b = weights.bits(first + tap + i, n);
        for (int m = 0; m < 3; m++)
          for (int k = 0; k < n; k++)
            if (b.mask[m] >> k & 1) sum += bound[i + k] << m;
      }
    return sum;
  }

  static float largest_weight(const Weights& weights) {
    float largest = 0;
    for (uint64_t i = 0; i < weights.count; i++) {
      float x = std::fabs(weights.value(i));
      if (!std::isfinite(x)) throw Error("a weight is not finite");
      largest = std::max(largest, x);
    }
    return largest;
  }

  // Bounds the exponent of FLOAT sums of `row` products.
  static int exponent_of_products(const Op& op, const Value& x, int64_t row,
                                  float largest) {
    int weight = exponent_of(largest);
    if (op.weights.grid())
      weight = bit_length(op.weights.format == 3 ? 4 : 1) + exponent_of(op.weight_unit);
    int pixel =
        x.map.kind == kFloat ? x.exponent : bit_length(x.most()) + exponent_of(op.unit);
    return weight + pixel + bit_length(row);
  }

  static int checked_exponent(int exponent) {
    if (exponent > kMaxExponent) throw Error("its floats may reach 2^" + str(exponent));
    return exponent;
  }

  Value pool(Op* op) {
    const Value& x = input(op);
    int h = in_.size("window"), w = in_.size("window");
    op->window = window(h, w);
    const Window& win = op->window;
    check_window(x.map, win);
    // A window of nothing but padding has no maximum.
    if (std::max(win.top, win.bottom) >= h || std::max(win.left, win.right) >= w)
      throw Error("its padding is as large as its window");
    Value value = x;
    bool sum = op->kind == kSumPool;
    Kind kind = sum && x.map.kind == kCode ? kInt : x.map.kind;
    value.map = make_map(kind, kind == kCode ? x.map.bits : 0, out_h(x.map, win),
                         out_w(x.map, win), x.map.c);
    if (sum)
      for (int64_t& bound : value.bound) bound = checked(bound * h * w);
    if (sum && kind == kFloat)
      value.exponent = checked_exponent(x.exponent + bit_length(int64_t{h} * w));
    return value;
  }

  Value threshold(Op* op) {
    const Value& x = input(op, kInt, "INT");
    const Value* shortcut = shortcut_of(op, x.map);
    if (shortcut && shortcut->map.kind != kCode)
      throw Error("its shortcut is not CODE");
    op->bits = in_.get<uint8_t>();
    int width = in_.get<uint8_t>();
    if (op->bits < 1 || op->bits > 3)
      throw Error("codes of " + str(op->bits) + " bits");
    if (width != 2 && width != 4) throw Error("thresholds of " + str(width) + " bytes");
    op->codes = shortcut ? 2 * levels_of(shortcut->map.bits) + 1 : 1;
    op->count = op->bits == 3 ? 6 : op->bits;
    int c = x.map.c, stride = x.map.stride, rows = op->codes * op->count;
    const uint8_t* falling = in_.take((c + 7) / 8);
    const uint8_t* from = in_.take(uint64_t{1} * rows * c * width);
    op->flip.resize(stride);
    for (int i = 0; i < c; i++) op->flip[i] = -(falling[i / 8] >> i % 8 & 1);
    op->thresholds.resize(static_cast<size_t>(rows) * stride);
    for (int row = 0; row < rows; row++)
      for (int i = 0; i < c; i++, from += width) {
        int32_t wide;
        int16_t narrow;
        if (width == 4)
          std::memcpy(&wide, from, 4);
        else
          std::memcpy(&narrow, from, 2), wide = narrow;
        // For falling channels, x <= t is computed as ~x >= ~t; see finish.inc.
        op->thresholds[static_cast<size_t>(row) * stride + i] = wide ^ op->flip[i];
      }
    return code(x.map, op->bits);
  }

  static Value code(const Map& like, int bits, bool zeros = false) {
    return {make_map(kCode, bits, like.h, like.w, like.c), zeros,
            std::vector<int64_t>(like.c, bits == 3 ? 4 : 1)};
  }

  void norm(Op* op, int c) {
    op->center = in_.constants("center", c);
    op->scale = in_.constants("scale", c);
    op->constant = in_.constants("constant", c, kLeastAdded);
  }

  Value finish(const Map& map) {
    if (map.h != 1 || map.w != 1 || map.c != p_.classes)
      throw Error("its input has not one element a class");
    ended_ = true;
    return {make_map(kFloat, 0, 1, 1, p_.classes), false, {}};
  }

  Value logits(Op* op) {
    const Value& x = input(op, kInt, "INT");
    if (x.most() > kMaxLogits) throw Error("its input may reach " + str(x.most()));
    op->unit = in_.constant("unit");
    Value out = finish(x.map);
    norm(op, p_.classes);
    return out;
  }

  Value concat(Op* op) {
    int count = in_.size("number of inputs");
    int64_t channels = 0;
    Value value = {};
    for (int i = 0; i < count; i++) {
      const Value& x = input(op);
      const Map& first = p_.values[op->inputs[0]].map;
      if (x.map.kind != first.kind || x.map.bits != first.bits)
        throw Error("its inputs are of different kinds");
      if (x.map.h != first.h || x.map.w != first.w)
        throw Error("its inputs have different sizes");
      int by = shift(op, x);
      if (by && x.map.kind != kInt) throw Error("a shift of what is not INT");
      channels += x.map.c;
      value.map = make_map(first.kind, first.bits, first.h, first.w, channels);
      value.zeros |= x.zeros;
      value.exponent = i ? std::max(value.exponent, x.exponent) : x.exponent;
      for (int64_t bound : x.bound) value.bound.push_back(bound << by);
    }
    return value;
  }

  Value shortcut(Op* op) {
    const Value& x = input(op, kCode, "CODE");
    Window& w = op->window;
    w.h = w.w = 1;
    w.stride_h = in_.limited("stride", 1, kMaxStride);
    w.stride_w = in_.limited("stride", 1, kMaxStride);
    op->before = in_.limited("channels", 0, kMaxSize);
    int after = in_.limited("channels", 0, kMaxSize);
    Map map = make_map(kCode, x.map.bits, out_h(x.map, w), out_w(x.map, w),
                       int64_t{x.map.c} + op->before + after);
    return code(map, x.map.bits, x.zeros || op->before || after);
  }

  Value float_norm(Op* op) {
    const Value& x = input(op);
    if (x.map.kind == kCode) throw Error("its input is CODE");
    const Value* shortcut = shortcut_of(op, x.map);
    if (shortcut && shortcut->map.kind == kInt) throw Error("its shortcut is INT");
    op->format = in_.get<uint8_t>();
    op->unit = in_.constant("unit");
    op->shortcut_unit = in_.constant("shortcut unit");
    norm(op, x.map.c);
    op->bits = op->format <= 3 ? op->format : 0;
    int q = in_.get<uint8_t>();
    if (q != (op->bits < 2 ? 0 : levels_of(op->bits)))
      throw Error(str(q) + " thresholds for format " + str(op->format));
    op->grid = in_.constants("grid", q);
    if (op->bits) return code(x.map, op->bits);
    if (op->format == 0) return finish(x.map);
    if (op->format != kFloat8 && op->format != kHalf && op->format != kBfloat &&
        op->format != kSingle)
      throw Error("unknown format " + str(op->format));
    // Values that are rounded to a format are between -1 and 1.
    return {make_map(kFloat, 0, x.map.h, x.map.w, x.map.c), false, {}, 1};
  }

  Value add(Op* op) {
    const Value& a = input(op);
    const Value& b = input(op);
    if (a.map.kind != b.map.kind || a.map.kind == kFloat)
      throw Error("its inputs are of different kinds");
    if (a.map.h != b.map.h || a.map.w != b.map.w || a.map.c != b.map.c)
      throw Error("its inputs have different shapes");
    int shift_a = shift(op, a), shift_b = shift(op, b);
    Value value = {make_map(kInt, 0, a.map.h, a.map.w, a.map.c), false, {}};
    for (int c = 0; c < a.map.c; c++)
      value.bound.push_back(checked((a.bound[c] << shift_a) + (b.bound[c] << shift_b)));
    return value;
  }

  Reader in_;
  const uint32_t version_;
  Program& p_;
  int64_t channels_ = 0;
  bool ended_ = false;
};

}  // namespace

Program parse(const uint8_t* bytes, size_t size, const Limits& limits) {
  static const uint8_t kMagic[8] = {'M', 'I', 'N', 'W', 0x0d, 0x0a, 0x1a, 0};
  if (size < kHeader) throw Error("too short for a packed network");
  if (std::memcmp(bytes, kMagic, 8) != 0) throw Error("not a packed network");
  Reader header(bytes + 8, bytes + kHeader);
  uint32_t version = header.get<uint32_t>();
  if (version != 1 && version != 2)
    throw Error("version " + str(version) +
                " of the format is not known (1 and 2 are)");
  if (size > kMaxFile) throw Error("the file has over 2^30 bytes");
  uint32_t crc = header.get<uint32_t>();
  if (header.get<uint64_t>() != size) throw Error("the file is cut short or too long");
  uint64_t program = header.get<uint32_t>(), metadata = header.get<uint32_t>();
  if (kHeader + program + metadata != size)
    throw Error("the sizes of its parts do not add up");
  if (crc32(bytes + 16, size - 16) != crc) throw Error("the checksum is wrong");
  Program p;
  const uint8_t* end = bytes + kHeader + program;
  Parser(Reader(bytes + kHeader, end), version, &p).run();
  check_limits(p, limits);
  p.metadata.assign(end, end + metadata);
  return p;
}

}  // namespace minw
