// Packs the weights of table lookups, which are numbers of a few channels (lookup.inc),
// and those of pairs of products (tiles.inc).
//
// A file has the bits of an output channel next to each other, but a kernel reads the
// same numbers of neighboring output channels. The time to load a network is spent
// here. Work is therefore done on vectors of kVector output channels: their bytes are
// transposed, and then a few operations make a number of each of them.
#include <algorithm>
#include <cstring>

#include "engine.h"

namespace minw {
namespace {

constexpr int kVector = 16;
#include "vectors.inc"

using Words = Vec<uint64_t, kVector>;

// 64 weights of kVector output channels, in a plane of the file. Each vector has a byte
// of each output channel, that is, the bits of 8 of its weights.
struct Block {
  Bytes of[8];
};

// Transposes words. Those of output channels i and i + 8 share a vector.
//
// The lower halves of the vectors are a square of 8 x 8 bytes, and so are the upper
// halves. A square is transposed in three rounds: its two quarters beside the diagonal
// trade places, then those of each quarter, and then those of each quarter of these.
Block transposed(const uint64_t (&words)[8][2]) {
  Words x[8];
  std::memcpy(x, words, sizeof x);
  auto trade = [&](int size, uint64_t mask) MINW_LAMBDA {
    MINW_UNROLLED(i, 8) {
      if (i & size) continue;
      Words changed = ((x[i] >> 8 * size) ^ x[i + size]) & mask;
      x[i + size] ^= changed;
      x[i] ^= changed << 8 * size;
    }
  };
  trade(4, 0x00000000ffffffff);
  trade(2, 0x0000ffff0000ffff);
  trade(1, 0x00ff00ff00ff00ff);
  Block block;
  std::memcpy(&block, x, sizeof block);
  return block;
}

// Bit i of the 64 weights of each output channel.
MINW_INLINE Bytes bit(const Block& plane, int i) {
  return plane.of[i / 8] >> static_cast<uint8_t>(i % 8) & 1;
}

// The numbers that have `digits` channels from channel `first` of a block on. The first
// channel is the lowest digit.
//
//   bits   digit of a level                                     base
//   1      -1, 1 -> 0, 1                                        2
//   2      -1, 0, 1 -> 0, 1, 2                                  3
//   3      -4, -2, -1, 0, 1, 2, 4 -> 0, 1, 2, 3, 4, 5, 6        7
//
// With 2 and 3 bits the digit is the code plus the largest code, and the file has the
// magnitude of the code in binary.
Bytes numbers(const Block* planes, int bits, int first, int digits) {
  if (bits == 1) {  // All digits at once.
    const uint8_t low = first % 8, ones = (1 << digits) - 1;
    return planes[0].of[first / 8] >> low & ones;
  }
  Bytes sum = {};
  for (int i = first + digits - 1; i >= first; i--) {
    Bytes magnitude = bit(planes[1], i), negative = bit(planes[0], i) - 1;
    if (bits == 3) magnitude += bit(planes[2], i) << 1;
    sum = bits == 2 ? sum + sum + sum + 1 : (sum << 3) - sum + 3;
    sum += (magnitude ^ negative) - negative;
  }
  return sum;
}

// Calls visit(output channel, tap, first channel, channels, planes) for each 64 weights
// of kVector output channels, whose first weight is weight `first`. Past the last
// channel, and past the last output channel, all bits are 0.
template <class Visit>
void each_block(const Conv& c, const Weights& weights, uint64_t first, int inputs,
                const Visit& visit) {
  const int taps = c.window.h * c.window.w;
  const uint64_t row = uint64_t{1} * taps * inputs;  // Weights of an output channel.
  for (int out = 0; out < c.out.c; out += kVector)
    for (int tap = 0; tap < taps; tap++)
      for (int i = 0; i < inputs; i += 64) {
        const uint64_t at = first + out * row + uint64_t{1} * tap * inputs + i;
        const int n = std::min(64, inputs - i), rows = std::min(kVector, c.out.c - out);
        Block planes[3];
        for (int plane = 0; plane < c.w_bits; plane++) {
          uint64_t words[8][2] = {};
          for (int k = 0; k < rows; k++)
            words[k % 8][k / 8] = weights.plane(plane, at + k * row, n);
          planes[plane] = transposed(words);
        }
        visit(out, tap, i, n, planes);
      }
}

// The levels of channel i of a block.
Bytes levels(const Block* planes, int bits, int i) {
  Bytes magnitude = Bytes{} + 1, negative = bit(planes[0], i) - 1;
  if (bits > 1) magnitude = bit(planes[1], i);
  if (bits == 3) {  // A 3 is worth 4.
    Bytes high = bit(planes[2], i);
    magnitude += (high << 1) + (magnitude & high);
  }
  return (magnitude ^ negative) - negative;
}

// Weights of two channels for 8 output channels, from bytes in memory. Those of the
// second half of the output channels are the upper parts of int16.
Ints joined(const uint8_t* even, const uint8_t* odd) {
  auto both = [](const uint8_t* from) MINW_LAMBDA {
    Ints low = __builtin_convertvector(load<Codes>(from), Ints);
    Ints high = __builtin_convertvector(load<Codes>(from + kInts), Ints);
    return low + high * (1 << kPairsUpper);
  };
  return (both(even) & 0xffff) | both(odd) << 16;
}

}  // namespace

void pack_numbers(const Conv& c, const Weights& weights, uint64_t first, int inputs,
                  int digits, char* to) {
  const int taps = c.window.h * c.window.w;
  const int tap_numbers = static_cast<int>(c.group_bytes / c.width / taps);
  auto visit = [&](int out, int tap, int i, int, const Block* planes) {
    // Channels past the last one have the code 0, or the sign of their pixels.
    const int begin = tap * tap_numbers + i / digits;
    const int end = std::min(begin + 64 / digits, (tap + 1) * tap_numbers);
    char* number = to + out / c.width * c.group_bytes + out % c.width +
                   size_t{1} * begin * c.width;
    for (int k = 0; k < end - begin; k++, number += c.width) {
      Bytes x = numbers(planes, c.w_bits, k * digits, digits);
      // Tables that weights select have 16 bytes; an x86 address multiplies by 8.
      store(number, c.swapped ? x + x : x);
    }
  };
  each_block(c, weights, first, inputs, visit);
}

void pack_pairs(const Conv& c, const Weights& weights, uint64_t first, int inputs,
                char* to) {
  static_assert(kPairsWidth == kVector);
  const int tap_bytes = (inputs + 7) / 8 * 8 * kVector;
  auto visit = [&](int out, int tap, int i, int n, const Block* planes) {
    char* pair = to + out / kVector * c.group_bytes + size_t{1} * tap * tap_bytes +
                 size_t{1} * i * kVector;
    for (int k = 0; k < n; k += 2) {
      uint8_t even[kVector], odd[kVector] = {};
      store(even, levels(planes, c.w_bits, k));
      if (k + 1 < n) store(odd, levels(planes, c.w_bits, k + 1));
      for (int half = 0; half < kVector; half += kVector / 2, pair += kVector)
        store(pair, joined(even + half, odd + half));
    }
  };
  each_block(c, weights, first, inputs, visit);
}

}  // namespace minw
