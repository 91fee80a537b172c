// The layout of a convolution: which kernel runs it, and the memory that kernel reads.
//
// A dense layer is a convolution whose window is as large as its input. Kernels compute
//
//   acc[o] = base[o] + (what the kernel counts or adds over the steps of a window),
//
// where a step is a few input channels of one tap. This file chooses the form in which
// pixels and weights are stored, lists where the steps of a window lie, packs the
// weights in that order, and works out `base` so that acc is the exact sum of products.
#include <algorithm>
#include <cstring>
#include <utility>

#include "engine.h"

namespace minw {
namespace {

// Output channels of a group. Few of them keep a group's sums for a chunk of pixels in
// the cache.
constexpr int kInt16Width = 64, kInt32Width = 32;

// With fewer output pixels than this, tiles of 16 pixels would be nearly empty.
constexpr int kMinTilePixels = 24;

// Columns of lookups come in vectors of this many bytes.
constexpr int kLookupColumns = 32;

// The number of two codes of 0, which are digits of base 7, as pack_numbers stores it.
constexpr int kZeroNumber = 2 * (3 + 7 * 3);

// Swapped lookups hold pixels in the lanes of vectors. With at most this many output
// pixels, half of the lanes would be empty, and counting bits is faster.
constexpr int kMostUnswappedPixels = 16;

// Taps in the border are skipped if at most this part of all taps is inside.
constexpr double kMostInside = 0.93;

// Lookups count in uint16. An entry of a step is at most 4 (signs of 4 channels, or
// magnitudes of 4 codes of 2 bits), or 16 (magnitudes of 4 codes of 3 bits).
constexpr int kCountLimit = 65536;

// With fewer sums than this for a point and a result, computing the results from the
// sums of the points would take too long.
constexpr int kMinPointSums = 16;

// Most bytes of an image's sums of pixels.
constexpr int64_t kMostTransformed = int64_t{1} << 24;

constexpr int kMostEntry = 4, kMostEntry3 = 16;

// Sums and pixels below this limit fit an int16.
constexpr int64_t kInt16Limit = 32768;

int divided_up(int x, int by) { return (x + by - 1) / by; }

// The power of a point of winograd.h by which tap i of so many contributes to its U.
double point_power(int point, int i, int taps) {
  if (point == kFinite) return i == taps - 1;
  double power = 1;
  while (i--) power *= kFinitePoints[point];
  return power;
}

// Bit planes of codes or weights: signs, then a mask for each magnitude (1, 2, 4).
// With 1 bit all magnitudes are 1, and signs suffice.
int planes_of(int bits) { return bits == 3 ? 4 : bits; }

// Sums over weights of one output channel.
struct WeightSums {
  int64_t levels = 0;      // Sum of the weights.
  int64_t magnitudes = 0;  // Sum of their magnitudes.
  int64_t negative = 0;    // Count of the negative ones.

  void add(const Bits& b) {
    for (int m = 0; m < 3; m++) {
      if (!b.mask[m]) continue;  // Few planes have every magnitude.
      int all = __builtin_popcountll(b.mask[m]);
      int minus = __builtin_popcountll(b.mask[m] & ~b.positive);
      magnitudes += int64_t{all} << m;
      levels += int64_t{all - 2 * minus} * (1 << m);
      negative += minus;
    }
  }

  void add(const WeightSums& other) {
    levels += other.levels;
    magnitudes += other.magnitudes;
    negative += other.negative;
  }
};

// Output rows (or columns) in classes: rows of one class have the same taps inside the
// map. For a kernel of 3 rows, 4 input rows and a border of 1 on both sides there are
// three classes:
//
//   output row   taps that lie inside   class
//   0            1, 2                   [1, 3)
//   1, 2         0, 1, 2                [0, 3)
//   3            0, 1                   [0, 2)
struct TapClasses {
  std::vector<int> of;                      // Class of each output row.
  std::vector<std::pair<int, int>> inside;  // Taps [first, last) of each class.

  // The part of all taps of all rows that lies inside.
  double share(int kernel) const {
    double sum = 0;
    for (int i : of) sum += std::max(0, inside[i].second - inside[i].first);
    return sum / (static_cast<double>(kernel) * static_cast<double>(of.size()));
  }
};

TapClasses tap_classes(int out, int in, int kernel, int stride, int step, int before) {
  TapClasses classes;
  for (int y = 0; y < out; y++) {
    int top = y * stride - before;    // Tap k reads input row top + k * step.
    auto first_from = [&](int row) {  // The first tap at `row` or below it.
      int tap = row <= top ? 0 : divided_up(row - top, step);
      return std::min(tap, kernel);
    };
    std::pair<int, int> range(first_from(0), first_from(in));
    auto at = std::find(classes.inside.begin(), classes.inside.end(), range);
    classes.of.push_back(static_cast<int>(at - classes.inside.begin()));
    if (at == classes.inside.end()) classes.inside.push_back(range);
  }
  return classes;
}

// Sums over rectangles of taps in constant time. total(y, x) is the sum of all taps
// above row y and left of column x; a rectangle is a combination of four of them.
class TapTotals {
 public:
  TapTotals(int h, int w)
      : columns_(static_cast<size_t>(w) + 1), total_((h + size_t{1}) * columns_) {}

  // Sets the tap at (y, x). Taps must be set row by row.
  void set(int y, int x, int64_t value) {
    at(y + 1, x + 1) = at(y, x + 1) + at(y + 1, x) - at(y, x) + value;
  }

  int64_t sum(std::pair<int, int> rows, std::pair<int, int> columns) {
    auto [top, bottom] = rows;
    auto [left, right] = columns;
    if (top >= bottom || left >= right) return 0;
    return at(bottom, right) - at(top, right) - at(bottom, left) + at(top, left);
  }

 private:
  int64_t& at(int y, int x) { return total_[y * columns_ + x]; }
  size_t columns_;
  std::vector<int64_t> total_;
};

// One of the groups of a map's channels, as a map of its own.
Map part_of(Map map, int parts) {
  map.c /= parts;
  map.stride = divided_up(map.c, kLane) * kLane;
  return map;
}

// How a form stores pixels and weights.
struct Storage {
  int tap_steps;    // Steps of a tap.
  int step_bytes;   // Distance of steps in a pixel.
  int pixel_bytes;  // Distance of pixels.
  int planes;       // Elements of weights for each step and output channel.
  int size;         // Bytes of such an element.
};

// Builds one layer: a whole convolution, or one of the `parts` into which it is split.
class LayerBuilder {
 public:
  LayerBuilder(const Program& program, int op, const Isa& isa, int parts, int part)
      : op_(program.ops[op]),
        x_(program.values[op_.inputs[0]]),
        source_(program.source),
        inputs_(x_.map.c / op_.groups),
        isa_(&isa),
        c_(layer_.conv) {
    const Map& out = program.values[op + 1].map;
    c_.in = parts > 1 ? part_of(x_.map, parts) : x_.map;
    c_.out = parts > 1 ? part_of(out, parts) : out;
    c_.window = op_.window;
    c_.source = op_.inputs[0] == 0 && parts == 1 ? &program.source : nullptr;
    c_.unit = op_.unit;
    c_.products = uint64_t{1} * taps() * inputs_ * c_.out.c;
    first_weight_ = uint64_t{1} * part * c_.out.c * taps() * inputs_;
    c_.own = op_.groups > parts;
    c_.w_bits = op_.weights.grid() ? op_.weights.format : 0;
    while (!fits(*isa_)) isa_ = isa_->others;
    layer_.isa = isa_;
    choose_form();
    choose_elements();
    storage_ = storage();
    lay_out_steps();
    switch (c_.form) {
      case kFloat32: store_floats(); break;
      case kWinograd: store_transformed(); break;
      default: store_levels();
    }
    choose_base();
    encode_border();
    layer_.kernel = isa_->choose(&c_);
  }

  Layer take() { return std::move(layer_); }

 private:
  int taps() const { return c_.window.h * c_.window.w; }

  // Calls visit(tap, first channel, Bits) for each 64 weights of an output channel.
  template <class Visit>
  void each(int out, const Visit& visit) const {
    uint64_t at = first_weight_ + uint64_t{1} * out * taps() * inputs_;
    for (int tap = 0; tap < taps(); tap++)
      for (int i = 0; i < inputs_; i += 64) {
        int n = std::min(64, inputs_ - i);
        visit(tap, i, op_.weights.bits(at, n));
        at += n;
      }
  }

  // ---- The form.

  void choose_form() {
    bool codes = c_.in.kind == kCode;
    c_.a_bits = codes ? code_bits() : 0;
    // Swapped lookups would leave lanes empty, and without bit planes there is no other
    // kernel for pixels of 1 bit. Codes of 1 bit are codes of 2 bits, too.
    if (codes && c_.w_bits > 1 && !isa_->masks && few_pixels())
      c_.a_bits = std::max(c_.a_bits, 2);
    int a = c_.a_bits, w = c_.w_bits;
    bool planes = a == 1 || w == 1 || (a == 2 && w == 2);
    if (isa_->tiles) {
      c_.form = kTiles;
      c_.width = kTileWidth;
    } else if (isa_->tables) {
      c_.form = kTables;
      c_.swapped = w == 3 && a == 1 && !few_pixels();
      c_.fold = table_channels(c_.swapped ? a : w);
      c_.numbers = c_.fold / 2;
      c_.width =
          kTableColumns * std::min(divided_up(c_.out.c, kTableColumns), kTableVectors);
      if (c_.swapped) c_.width = kRowBlock;
    } else if (!w || c_.in.kind == kFloat) {
      c_.form = choose_winograd() ? kWinograd : kFloat32;
      c_.width = kInt32Width;
      if (c_.form == kWinograd && c_.out.c > kInt32Width) c_.width = 2 * kInt32Width;
    } else if (codes && !c_.own && planes && choose_signs()) {
      return;
    } else if (codes && !c_.own && isa_->pairs) {
      c_.form = kPairs;
      c_.fold = 8;
      c_.width = kPairsWidth;
    } else if ((codes || c_.source) && !c_.own && isa_->dot) {
      c_.form = kBytes;
      c_.fold = 4;
      c_.width = kInt32Width;
    } else {
      bool narrow = fits_int16();
      c_.multiplied = w == 3 || !isa_->masks;
      c_.form = narrow ? kInt16 : kInt32;
      c_.width = narrow ? kInt16Width : kInt32Width;
    }
  }

  // Whether an instruction set has a kernel for this layer. Tiles need operands that
  // are bytes and many pixels. Wide tables are slower than counted bits where neither
  // activations nor weights have 3 bits.
  bool fits(const Isa& isa) const {
    if (isa.tables)
      return c_.w_bits && !c_.own && c_.in.kind == kCode &&
             (c_.w_bits == 3 || code_bits() == 3);
    return !isa.tiles || fills_tiles();
  }

  // Chooses the tiles of fast convolutions, if they are for this layer and take fewer
  // products.
  bool choose_winograd() {
    const Window& w = c_.window;
    const int taps = divided_up(w.w, w.stride_w);
    if (!c_.source || c_.own || w.step_w != 1 || taps < 3 || taps > 4) return false;
    const int elements = w.stride_w * c_.in.c;
    c_.results = kPoints - taps + 1;
    c_.tiles = divided_up(c_.out.w, c_.results);
    c_.line = (c_.tiles * c_.results + taps) * elements + kTileNumbers;
    // Numbers past the last tile of a point have a place, too.
    const int64_t row = int64_t{kPoints} * (c_.tiles + kTileNumbers);
    if (c_.tiles * kPoints > c_.out.w * taps || w.h * elements < kMinPointSums ||
        row * elements * 4 * (c_.in.h + w.top + w.bottom) > kMostTransformed)
      return false;
    c_.padded_w = static_cast<int>(row);
    return true;
  }

  // Bits of the activations, which are codes. A code of 1 bit cannot be 0.
  int code_bits() const { return x_.zeros ? std::max(c_.in.bits, 2) : c_.in.bits; }

  // Whether the operands are bytes, and there are enough pixels for tiles.
  bool fills_tiles() const {
    return c_.w_bits && !c_.own && (c_.in.kind == kCode || c_.source) &&
           c_.out.h * c_.out.w >= kMinTilePixels;
  }

  // Chooses the form for products that signs and masks decide: table lookups if the
  // instruction set has them and their counts fit, else bit planes. Returns false if it
  // has neither.
  bool choose_signs() {
    int a = c_.a_bits, w = c_.w_bits;
    c_.words = divided_up(c_.in.c, kWordBits);
    c_.sums = w == 1 && a > 1;
    c_.fold = a == 2 && w == 2 ? 2 : 4;
    bool swapped = a == 1 && w > 1;
    int64_t steps = int64_t{taps()} * (c_.in.c / c_.fold + 1);
    int most = a == 3 || w == 3 ? kMostEntry3 : kMostEntry;
    bool filled = !swapped || !few_pixels();
    if (isa_->lookup && steps * most < kCountLimit && filled) {
      c_.swapped = swapped;
      c_.joint = a == w;
      c_.numbers = a == 3 || w == 3 ? 2 : 1;
      choose_lookups();
      return true;
    }
    c_.sums = c_.sums && isa_->masks;
    if (!isa_->masks) return false;
    c_.form = kPlanes;
    c_.width = c_.out.stride % isa_->masks ? kLane : isa_->masks;
    c_.paired = a == 1 && w == 1 && c_.words % 2 == 0;
    return true;
  }

  bool few_pixels() const { return c_.out.h * c_.out.w <= kMostUnswappedPixels; }

  void choose_lookups() {
    c_.form = kLookup;
    c_.width = kRowBlock;
    if (!c_.swapped)
      c_.width =
          std::min(divided_up(c_.out.c, kLookupColumns) * kLookupColumns, isa_->lookup);
  }

  // Whether pixels, and the largest sum of an output channel, fit an int16. A negative
  // weight lowers the kernel's sum by one more, which `base` adds back.
  bool fits_int16() const {
    int64_t most = 0;
    for (int o = 0; o < c_.out.c; o++) {
      WeightSums sums;
      each(o, [&](int, int, const Bits& b) { sums.add(b); });
      most = std::max(most, sums.magnitudes * x_.most() + sums.negative);
    }
    return most < kInt16Limit && x_.most() < kInt16Limit;
  }

  // ---- Where things lie.

  // Lists the channels that the elements of a pixel hold, for forms that are not
  // packed. If output channels have inputs of their own, element [i][o] is input i of
  // output o.
  void choose_elements() {
    c_.elements = c_.own ? inputs_ * c_.out.stride : c_.in.c;
    if (c_.form == kWinograd) c_.elements *= c_.window.stride_w;
    if (!c_.own || (inputs_ == 1 && c_.in.c == c_.out.c)) return;  // In order.
    layer_.channels.resize(c_.elements);
    int outputs = c_.out.c / (c_.in.c / inputs_);  // Output channels of a group.
    for (int i = 0; i < inputs_; i++)
      for (int o = 0; o < c_.out.c; o++)
        layer_.channels[i * c_.out.stride + o] = o / outputs * inputs_ + i;
    c_.channels = layer_.channels.data();
  }

  Storage storage() const {
    bool three = c_.a_bits == 3;
    int elements = c_.own ? c_.out.stride : 1;             // Elements of a step.
    int masks = c_.w_bits == 2 && !c_.multiplied ? 2 : 1;  // Signs, and a mask.
    switch (c_.form) {
      case kPlanes: {
        int bytes = 4 * planes_of(c_.a_bits);
        return {c_.words, bytes, c_.words * bytes, planes_of(c_.w_bits), 4};
      }
      case kLookup: {
        // Signs need one byte of weights a step, and numbers of pixels one each.
        int numbers = c_.w_bits == 3 ? c_.numbers : 1, pixel = three ? c_.numbers : 1;
        return {divided_up(inputs_, c_.fold), pixel, c_.in.stride / c_.fold * pixel,
                numbers, 1};
      }
      case kBytes: {
        // Pixels of images are rows of windows, since few channels would fill no step.
        int channels = c_.source ? c_.window.w * inputs_ : inputs_;
        int steps = divided_up(channels, 4);
        return {steps, 4, c_.source ? steps * 4 : c_.in.stride, 1, 4};
      }
      case kTiles: return {};  // See store_tiles.
      case kTables: {
        int steps = divided_up(inputs_, c_.fold);
        if (c_.swapped) return {steps, 1, steps, c_.numbers, 1};
        return {steps, c_.numbers, steps * c_.numbers, 1, 1};
      }
      case kPairs: return {divided_up(inputs_, 8), 16, c_.in.stride * 2, 8, 1};
      case kInt16: return {inputs_, elements * 2, c_.elements * 2, masks, 2};
      case kInt32: return {inputs_, elements * 4, c_.elements * 4, masks, 4};
      case kFloat32: return {inputs_, elements * 4, c_.elements * 4, 1, 4};
      case kWinograd: return {c_.elements, 4, c_.elements * 4, 1, 4};
    }
    return {};
  }

  // Lists the steps of a window, in bytes from its first pixel.
  void lay_out_steps() {
    const Window& w = c_.window;
    c_.padded_h = c_.in.h + w.top + w.bottom;
    if (c_.form != kWinograd) c_.padded_w = c_.in.w + w.left + w.right;
    if (c_.form == kTiles) return lay_out_tiles();
    c_.pixel_bytes = storage_.pixel_bytes;
    int words = c_.paired ? 2 : 1;  // Words of a step.
    for (int y = 0; y < w.h; y++)
      for (int x = 0; x < stored_columns(); x++) {
        int pixel = (y * w.step_h * c_.padded_w + x * w.step_w) * c_.pixel_bytes;
        for (int i = 0; i < storage_.tap_steps; i += words)
          layer_.offsets.push_back(pixel + i * storage_.step_bytes);
      }
    c_.steps = static_cast<int>(layer_.offsets.size());
    c_.offsets = layer_.offsets.data();
    if (c_.form == kLookup || c_.swapped)
      c_.row_bytes = c_.steps * storage_.step_bytes + kRowSlack;
    c_.groups = divided_up(c_.out.c, c_.width);
    c_.group_bytes = uint64_t{1} * w.h * stored_columns() * storage_.tap_steps *
                     storage_.planes * c_.width * storage_.size;
    if (c_.form == kWinograd) c_.group_bytes *= kPoints;
  }

  // Columns of the kernel whose steps are apart. If pixels are rows of windows or sums
  // over them, all columns are in the steps of the first one.
  int stored_columns() const {
    const bool joined = (c_.form == kBytes && c_.source) || c_.form == kWinograd;
    return joined ? 1 : c_.window.w;
  }

  // The same for tiles, whose pixels are rows of windows; see kernels_amx.cc.
  void lay_out_tiles() {
    const Window& w = c_.window;
    int row_steps = divided_up(w.w * c_.in.c, kTileBytes);
    int phase_rows = divided_up(c_.padded_h, w.stride_h);
    for (int y = 0; y < w.h; y++) {
      int row = y * w.step_h;
      layer_.offsets.push_back(row % w.stride_h * phase_rows + row / w.stride_h);
    }
    c_.offsets = layer_.offsets.data();
    c_.pixel_bytes = row_steps * kTileBytes;
    c_.steps = w.h * row_steps;
    c_.groups = divided_up(c_.out.c, c_.width);
    c_.expanded = uint64_t{2} * c_.steps * kTileRows * kTileBytes;
    c_.group_bytes = c_.w_bits == 3 ? c_.expanded : c_.expanded / 8 * c_.w_bits;
  }

  // ---- Weights: [group][tap][step][plane][channel].

  void allocate_weights() {
    uint64_t bytes = c_.group_bytes * c_.groups;
    layer_.weights = std::make_unique<Buffer>(bytes);
    std::memset(layer_.weights->data(), 0, bytes);
    c_.weights = layer_.weights->data();
  }

  // The place of the first plane of a step's weight.
  char* weight(int out, int tap, int step) {
    const Storage& s = storage_;
    size_t row = (size_t{1} * tap * s.tap_steps + step) * s.planes * c_.width;
    return layer_.weights->data() + out / c_.width * c_.group_bytes +
           (row + out % c_.width) * s.size;
  }

  void store_floats() {
    allocate_weights();
    float unit = c_.w_bits ? op_.weight_unit : 1.0f;
    uint64_t next = first_weight_;
    for (int o = 0; o < c_.out.c; o++)
      for (int tap = 0; tap < taps(); tap++)
        for (int i = 0; i < inputs_; i++) {
          float x = op_.weights.value(next++) * unit;
          std::memcpy(weight(o, tap, i), &x, sizeof x);
        }
  }

  // The weights U of winograd.h: [group][point][row][element][channel].
  void store_transformed() {
    allocate_weights();
    const Window& w = c_.window;
    const int taps = kPoints - c_.results + 1;
    uint64_t next = first_weight_;
    for (int row = 0; row < c_.out.c * w.h; row++) {
      std::vector<double> sums(size_t{1} * kPoints * c_.elements);
      for (int x = 0; x < w.w; x++)
        for (int i = 0; i < inputs_; i++) {
          const double weight = op_.weights.value(next++);
          double* sum = sums.data() + x % w.stride_w * inputs_ + i;
          for (int p = 0; p < kPoints; p++)
            sum[p * c_.elements] += point_power(p, x / w.stride_w, taps) * weight;
        }
      const int o = row / w.h, y = row % w.h;
      for (int p = 0; p < kPoints; p++)
        for (int e = 0; e < c_.elements; e++) {
          const double sum = sums[p * c_.elements + e] / kProducts[p].value;
          const auto x = static_cast<float>(sum * c_.unit);
          std::memcpy(weight(o, p * w.h + y, e), &x, sizeof x);
        }
    }
  }

  void store_levels() {
    allocate_weights();
    if (c_.form == kLookup)
      return pack_numbers(c_, op_.weights, first_weight_, inputs_, channels_of_number(),
                          layer_.weights->data());
#ifndef __wasm__  // It has no wide tables, and its module is to be small.
    if (c_.form == kTables && c_.swapped) {
      // The last steps have numbers past the last channel.
      std::memset(layer_.weights->data(), kZeroNumber, c_.group_bytes * c_.groups);
      return pack_numbers(c_, op_.weights, first_weight_, inputs_, 2,
                          layer_.weights->data());
    }
    if (c_.form == kTables)
      return pack_indices(c_, op_.weights, first_weight_, inputs_,
                          layer_.weights->data());
#endif
    if (c_.form == kPairs)
      return pack_pairs(c_, op_.weights, first_weight_, inputs_,
                        layer_.weights->data());
    for (int o = 0; o < c_.out.c; o++)
      each(o, [&](int tap, int first, const Bits& b) {
        if (c_.form == kTiles)
          store_tiles(o, tap, first, b);
        else if (c_.form == kPlanes)
          store_planes(o, tap, first, b);
        else
          for (int i = 0; i < std::min(64, inputs_ - first); i++)
            store_level(o, tap, first + i, level_of(b, i));
      });
  }

  // Tiles: [group][row of the kernel][64 inputs][tile][4 inputs][channel][input]. Four
  // inputs of 16 channels are a row of a tile. With 1 and 2 bits it is a word for each
  // plane: which weights are positive, and which are not 0.
  void store_tiles(int out, int tap, int first, const Bits& b) {
    const Window& w = c_.window;
    char* group = layer_.weights->data() + out / c_.width * c_.group_bytes;
    int tile = out % c_.width / kTileRows, column = out % kTileRows * 4;
    const int step = tap / w.w * (c_.pixel_bytes / kTileBytes);
    for (int i = 0; i < std::min(64, inputs_ - first);) {
      int input = tap % w.w * inputs_ + first + i;
      size_t row = size_t{2} * (step + input / kTileBytes) + tile;
      row = row * kTileRows + input % kTileBytes / 4;
      // The inputs up to the end of the row's four. Bits past the last channel are 0.
      int at = input % 4, n = 4 - at;
      for (int k = 0; c_.w_bits == 3 && k < std::min(n, inputs_ - first - i); k++)
        group[row * kTileBytes + column + at + k] =
            static_cast<char>(level_of(b, i + k));
      if (c_.w_bits < 3) {
        char* word = group + row * c_.w_bits * sizeof(uint64_t) + column / 8;
        const unsigned shift = column % 8 + at, four = (1u << n) - 1;
        auto set = [&](char* to, uint64_t bits) {
          unsigned old = static_cast<uint8_t>(*to), all = (bits >> i & four) << shift;
          *to = static_cast<char>(old | all);
        };
        set(word, b.positive);
        if (c_.w_bits == 2) set(word + sizeof(uint64_t), b.mask[0]);
      }
      i += n;
    }
  }

  static int level_of(const Bits& b, int i) {
    int magnitude = 0;
    for (int m = 0; m < 3; m++) magnitude |= static_cast<int>(b.mask[m] >> i & 1) << m;
    return b.positive >> i & 1 ? magnitude : -magnitude;
  }

  // Two words of each plane, or the last one. Of two words that are paired, the second
  // one's signs are stored as the XOR of both (see PairStep in tiles.inc).
  void store_planes(int o, int tap, int first, const Bits& b) {
    const uint64_t signs =
        c_.paired ? b.positive ^ b.positive << kWordBits : b.positive;
    for (int k = 0; k < std::min(64, inputs_ - first); k += kWordBits) {
      char* to = weight(o, tap, (first + k) / kWordBits);
      for (int p = 0; p < storage_.planes; p++) {
        const auto word = static_cast<uint32_t>((p ? b.mask[p - 1] : signs) >> k);
        std::memcpy(to + sizeof word * p * c_.width, &word, sizeof word);
      }
    }
  }

  void store_level(int o, int tap, int channel, int level) {
    switch (c_.form) {
      case kBytes:
        if (c_.source) {
          channel += tap % c_.window.w * inputs_;
          tap /= c_.window.w;
        }
        weight(o, tap, channel / 4)[channel % 4] = static_cast<char>(level);
        return;
      case kInt16: return store_lane<int16_t>(weight(o, tap, channel), level);
      default: return store_lane<int32_t>(weight(o, tap, channel), level);
    }
  }

  // Channels of each number of weights (kLookup).
  int channels_of_number() const {
    return c_.w_bits == 3 ? c_.fold / c_.numbers : c_.fold;
  }

  // Lanes hold a sign mask (0 or -1), with 2 bits also a mask of what is not 0, or else
  // the level itself, to be multiplied.
  template <class E>
  void store_lane(char* to, int level) {
    E first = static_cast<E>(level < 0 ? -1 : 0);
    E mask = static_cast<E>(level ? -1 : 0);
    if (c_.multiplied) first = static_cast<E>(level);
    std::memcpy(to, &first, sizeof(E));
    if (c_.w_bits == 2 && !c_.multiplied)
      std::memcpy(to + c_.width * sizeof(E), &mask, sizeof(E));
  }

  // ---- What sums begin with.

  // The part of an output channel's sum that its kernel leaves out. The derivations are
  // at the kernels, in tiles.inc and lookup.inc.
  int64_t left_out(const WeightSums& all) const {
    switch (c_.form) {
      case kPlanes:
      case kLookup:
        if (c_.a_bits == 1) return all.magnitudes;
        if (c_.sums || c_.form == kPlanes) return 0;
        return int64_t{c_.fold} * c_.steps;  // Entries are less the sums of products.
      case kBytes:                           // Codes are stored as level + 4.
        return c_.source ? 0 : -4 * all.levels;
      case kTables: return c_.swapped ? all.magnitudes : 0;
      case kTiles:
      case kPairs: return 0;
      case kInt16:
      case kInt32:
        return c_.multiplied ? 0 : all.negative;  // -x is computed as ~x = -x - 1.
      case kFloat32:
      case kWinograd: return 0;
    }
    return 0;
  }

  // Whether left_out depends on the weights.
  bool leaves_out() const {
    switch (c_.form) {
      case kPlanes:
      case kLookup: return c_.a_bits == 1;
      case kTables: return c_.swapped;
      case kBytes: return !c_.source;
      case kInt16:
      case kInt32: return !c_.multiplied;
      default: return false;
    }
  }

  // The sum of the offsets of an image's pixels for an output channel, if its kernel
  // does not subtract them.
  int64_t offsets(int out) const {
    int64_t sum = 0;
    if ((c_.form == kTiles || c_.form == kBytes) && c_.source)
      each(out, [&](int, int first, const Bits& b) {
        for (int i = 0; i < std::min(64, inputs_ - first); i++)
          sum += source_.offset[first + i] * level_of(b, i);
      });
    return sum;
  }

  // Corrects 1-bit codes for zero padding. A pixel of padding counts as 0, but a bit
  // can only say 1 or -1. The kernel reads its bits as 0, which is -1, so that each tap
  // in the border contributes minus its weights instead of nothing:
  //
  //   what the kernel sums = (taps inside) - (sum of the weights of taps in the border)
  //
  // The sum of the weights in the border is added back here. It depends on the output
  // pixel only through the class of its row and the class of its column:
  //
  //   border = all taps - taps inside = total - rectangle [top, bottom) x [left, right)
  //
  // Other forms and other paddings need no correction. If the kernel skips the taps in
  // the border, sums begin with the part of the taps inside.
  void choose_base() {
    const Window& w = c_.window;
    bool signs = c_.form == kPlanes || c_.form == kLookup || c_.swapped;
    bool bits = signs && c_.a_bits == 1;
    TapClasses rows = {std::vector<int>(c_.out.h), {{0, w.h}}};
    TapClasses cols = {std::vector<int>(c_.out.w), {{0, w.w}}};
    if ((bits || c_.form == kPlanes) && !op_.pad) {
      rows = tap_classes(c_.out.h, c_.in.h, w.h, w.stride_h, w.step_h, w.top);
      cols = tap_classes(c_.out.w, c_.in.w, w.w, w.stride_w, w.step_w, w.left);
    }
    choose_taps(rows, cols);
    size_t stride = size_t{1} * c_.groups * c_.width;
    layer_.base.resize(rows.inside.size() * cols.inside.size() * stride);
    const bool summed = leaves_out();  // Otherwise no weights are needed.
    if (c_.form != kFloat32 && c_.form != kWinograd)
      for (int o = 0; o < c_.out.c; o++) {
        std::vector<WeightSums> of_tap(taps());
        if (summed) each(o, [&](int tap, int, const Bits& b) { of_tap[tap].add(b); });
        WeightSums all;
        TapTotals totals(w.h, w.w), magnitudes(w.h, w.w);
        for (int tap = 0; tap < taps(); tap++) {
          totals.set(tap / w.w, tap % w.w, of_tap[tap].levels);
          magnitudes.set(tap / w.w, tap % w.w, of_tap[tap].magnitudes);
          all.add(of_tap[tap]);
        }
        const int64_t whole = left_out(all) - offsets(o);
        size_t at = o;
        for (const auto& r : rows.inside)
          for (const auto& k : cols.inside) {
            int64_t base = whole;
            if (bits && c_.taps)
              base = magnitudes.sum(r, k);
            else if (bits)
              base += all.levels - totals.sum(r, k);
            layer_.base[at] = static_cast<int32_t>(base);
            at += stride;
          }
      }
    layer_.row_class = std::move(rows.of);
    layer_.col_class = std::move(cols.of);
    c_.base = layer_.base.data();
    c_.row_class = layer_.row_class.data();
    c_.col_class = layer_.col_class.data();
    c_.col_classes = static_cast<int>(cols.inside.size());
  }

  // Lists the steps of each class of pixels if kPlanes skips the others, which are in
  // the border. It does not if only few are, because tiles of pixels of one class need
  // an order of their own, and if there are too many classes.
  void choose_taps(const TapClasses& rows, const TapClasses& cols) {
    const Window& w = c_.window;
    const size_t classes = rows.inside.size() * cols.inside.size();
    if (c_.form != kPlanes || classes > kMostClasses ||
        rows.share(w.h) * cols.share(w.w) > kMostInside)
      return;
    const int tap = c_.steps / taps(), row = w.w * tap;
    layer_.taps.resize(classes);
    Taps* to = layer_.taps.data();
    for (const auto& y : rows.inside)
      for (const auto& x : cols.inside) {
        const int height = std::max(0, y.second - y.first);
        const int width = std::max(0, x.second - x.first);
        Taps steps = {height, y.first * row + x.first * tap, width * tap, row};
        if (width == w.w) steps = {1, steps.first, height * row, row};
        if (!width || !height) steps.runs = 0;
        *to++ = steps;
      }
    c_.taps = layer_.taps.data();
    c_.tap_classes = static_cast<int>(classes);
  }

  // A pixel of padding in the form of the layer. Pixels that are no codes are padded by
  // zeros.
  void encode_border() {
    layer_.border.resize(c_.pixel_bytes);
    if (c_.in.kind == kCode) {
      std::vector<int8_t> codes(c_.in.stride + kAlign, static_cast<int8_t>(op_.pad));
      isa_->encode(c_, codes.data(), 1, layer_.border.data(),
                   c_.sums ? &c_.border_sum : nullptr);
    }
    if ((c_.form == kTiles || c_.form == kBytes) && c_.source)
      std::memcpy(layer_.border.data(), source_.offset, c_.in.c);
    c_.border = layer_.border.data();
  }

  const Op& op_;
  const Value& x_;
  const Source& source_;
  const int inputs_;  // Channels that an output channel reads.
  const Isa* isa_;
  uint64_t first_weight_;  // The part's first weight in the file.
  Storage storage_ = {};
  Layer layer_;
  Conv& c_;
};

}  // namespace

std::vector<Layer> make_layers(const Program& program, int op, const Isa& isa) {
  const Op& conv = program.ops[op];
  const Map& in = program.values[conv.inputs[0]].map;
  const Map& out = program.values[op + 1].map;
  int parts = has_own_inputs(conv, in, out) ? 1 : conv.groups;
  std::vector<Layer> layers;
  layers.reserve(parts);
  for (int part = 0; part < parts; part++)
    layers.push_back(LayerBuilder(program, op, isa, parts, part).take());
  return layers;
}

}  // namespace minw
