// The choice of an instruction set for a layer, by measurement.
//
// CPUs with the same instructions differ in the kernels that are fastest for some bits:
// int8 tiles or counted bits, counted bits or table lookups. All kernels give the same
// sums. Therefore each instruction set runs a small convolution with the layer's bits,
// and the fastest one is chosen. Kernels with pixels in the lanes of vectors are slow
// on small maps, for which there is another measurement. This takes a few milliseconds,
// once for each pair of bits and size in a process.
#include <algorithm>
#include <atomic>
#include <chrono>

#include "engine.h"

namespace minw {
namespace {

// The measured convolution: a map of 16 x 12 or 6 x 6 pixels, from 128 to 128 channels,
// 3 x 3.
struct Size {
  int height, width;
};
constexpr Size kLarge = {16, 12}, kSmall = {6, 6};
constexpr int kInputs = 128, kOutputs = 128, kWindow = 3;
constexpr int kImageChannels = 3;

// Maps of at most this many pixels are small.
constexpr int kFewPixels = 64;

// Runs of each candidate. The shortest one counts, as it was disturbed least.
constexpr int kRuns = 5;

// A convolution with the given bits. Activations of 0 bits are an image.
Program probe(int w_bits, int a_bits, const Size& size,
              const std::vector<uint8_t>& weights) {
  const int inputs = a_bits ? kInputs : kImageChannels;
  Program p;
  p.offset.resize(kImageChannels);
  p.source = {size.height, size.width, 0, 0, p.offset.data()};
  p.channels = kImageChannels;
  auto map = [&](Kind kind, int bits, int c) {
    return Map{kind, bits, size.height, size.width, c, (c + kLane - 1) / kLane * kLane};
  };
  const int64_t most = a_bits == 0 ? 255 : a_bits == 3 ? 4 : 1;
  p.values.resize(3);
  p.values[0].map = map(kInt, 0, kImageChannels);
  p.values[1].map = map(kCode, a_bits, inputs);
  p.values[2].map = map(kInt, 0, kOutputs);
  for (int i = 0; i < 2; i++) p.values[i].bound.assign(inputs, most);
  Op conv;
  conv.kind = kConv;
  conv.inputs = {a_bits ? 1 : 0};
  conv.window = {kWindow, kWindow, 1, 1, 1, 1, 1, 1, 1, 1};
  conv.weights = {w_bits, weights.data(), weights.size()};
  p.ops = {conv, conv};  // The second one is measured.
  return p;
}

// Seconds of the fastest of a few runs.
double seconds(const Layer& layer, const std::vector<uint8_t>& input) {
  const Conv& c = layer.conv;
  const Finish finish = {1, 1, c.out, nullptr, nullptr};
  Plan plan;
  plan.needs = needs_of(c, 1);
  const Places places = scratch_places(plan, 1);
  Buffer scratch(places.own + places.own_bytes), out(map_bytes(c.out));
  const Work work = work_in(scratch.data(), places, 0, 1);
  const bool rows = c.form == kTiles;
  const int units = rows ? c.out.h : c.out.h * c.out.w;
  static_assert(kLarge.height * kLarge.width <= kChunk, "one piece");
  double least = 1;
  for (int i = 0; i < kRuns; i++) {
    auto begin = std::chrono::steady_clock::now();
    layer.isa->pad(c, input.data(), 0, c.padded_h, work);
    layer.isa->conv(c, finish, {0, units, 0, c.groups}, nullptr, work, out.data());
    std::chrono::duration<double> time = std::chrono::steady_clock::now() - begin;
    least = std::min(least, time.count());
  }
  return least;
}

}  // namespace

const Isa* fastest_isa(const Isa* best, int w_bits, int a_bits, int pixels) {
  // By the bits and the size; null until they were measured. Two threads may both
  // measure.
  static std::atomic<const Isa*> known[4][4][2] = {};
  const bool small = pixels <= kFewPixels;
  std::atomic<const Isa*>& place = known[w_bits][a_bits][small];
  const Isa* fastest = place.load();
  if (fastest || !best->others) return fastest ? fastest : best;
  const Size& size = small ? kSmall : kLarge;
  const std::vector<uint8_t> weights(kWindow * kWindow * kInputs * kOutputs);
  const std::vector<uint8_t> input(size.height * size.width * kInputs + kAlign);
  const Program program = probe(w_bits, a_bits, size, weights);
  double least = 0;
  for (const Isa* isa = best; isa; isa = isa->others) {
    double time = seconds(make_layers(program, 1, *isa)[0], input);
    if (fastest && time >= least) continue;
    fastest = isa;
    least = time;
  }
  place.store(fastest);
  return fastest;
}

}  // namespace minw
