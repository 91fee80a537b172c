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

// Marks a lambda that is called for each block of weights. Browsers first compile a
// function without optimizations, and replace it between two calls. Slow code would
// pack a whole layer if one call did.
#define MINW_CALLED __attribute__((noinline))

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

// Shifts all bytes. What this moves from one byte to another must be masked. There is
// no instruction that shifts bytes, but one that shifts words.
MINW_INLINE Bytes shifted(Bytes x, int by) { return (Bytes)((Words)x >> by); }

// Bit i of the 64 weights of each output channel.
MINW_INLINE Bytes bit(const Block& plane, int i) {
  return shifted(plane.of[i / 8], i % 8) & 1;
}

// The numbers of the 8 channels of a byte of each plane, which have `digits` channels
// each. The first channel is the lowest digit.
//
//   bits   digit of a level                                     base
//   1      -1, 1 -> 0, 1                                        2
//   2      -1, 0, 1 -> 0, 1, 2                                  3
//   3      -4, -2, -1, 0, 1, 2, 4 -> 0, 1, 2, 3, 4, 5, 6        7
//
// With 2 and 3 bits the digit is the code plus the largest code, and the file has the
// magnitude of the code in binary.
void numbers(const Block* planes, int bits, int byte, int digits, Bytes (&to)[4]) {
  const Bytes positive = planes[0].of[byte];
  if (bits == 1) {  // 4 digits; the plane holds the numbers.
    to[0] = positive & 15;
    to[1] = shifted(positive, 4) & 15;
    return;
  }
  if (bits == 2) {
    // In binary, a digit is `two` and `one`. All bits of a number are summed in four
    // bits at once. One that has digits d and e, of which `one` has bits d0 and e0, and
    // `two` has d1 and e1, is
    //
    //   d + 3 e = (d0 + 2 e0) + e0 + 2 ((d1 + 2 e1) + e1).
    const Bytes one = ~planes[1].of[byte], two = positive & planes[1].of[byte];
    auto sum = [](Bytes x) MINW_LAMBDA { return (x & 0x33) + (shifted(x, 1) & 0x11); };
    Bytes pairs[2];  // Numbers 0 and 2, and numbers 1 and 3.
    MINW_UNROLLED(k, 2) {
      const Bytes high = sum(shifted(two, 2 * k));
      pairs[k] = sum(shifted(one, 2 * k)) + high + high;
    }
    MINW_UNROLLED(k, 4) to[k] = shifted(pairs[k % 2], k / 2 * 4) & 15;
    if (digits == 2) return;
    MINW_UNROLLED(k, 2) to[k] = to[2 * k] + 9 * to[2 * k + 1];
    return;
  }
  MINW_UNROLLED(k, 4) {  // 2 digits.
    auto digit = [&](int i) MINW_LAMBDA {
      const Bytes negative = bit(planes[0], 8 * byte + i) - 1;
      const Bytes magnitude =
          bit(planes[1], 8 * byte + i) + (bit(planes[2], 8 * byte + i) << 1);
      return (magnitude ^ negative) - negative + 3;
    };
    to[k] = digit(2 * k) + 7 * digit(2 * k + 1);
  }
}

// The place of an output channel's byte in the vectors of a block: its own, or in fours
// of the output channels k, k + 4, k + 8 and k + 12.
constexpr auto in_order = [](int k) { return k; };
constexpr auto in_fours = [](int k) { return k % 4 * 4 + k / 4; };

// Calls visit(output channel, tap, first channel, channels, planes) for each 64 weights
// of kVector output channels, whose first weight is weight `first`. Past the last
// channel, and past the last output channel, all bits are 0.
template <class Place, class Visit>
void each_block(const Conv& c, const Weights& weights, uint64_t first, int inputs,
                const Place& place, const Visit& visit) {
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
            words[place(k) % 8][place(k) / 8] = weights.plane(plane, at + k * row, n);
          planes[plane] = transposed(words);
        }
        visit(out, tap, i, n, planes);
      }
}

// The levels of the first n of the 8 channels of a byte of each plane. Vector i of `to`
// has channels i and i + 4 in the lower and the upper half of each byte. A level has
// four bits, in two's complement.
void levels(const Block* planes, int bits, int byte, int n, Bytes (&to)[4]) {
  const uint8_t first = (1 << n) - 1;
  Bytes low = Bytes{} + first, high = {};
  if (bits > 1) low = planes[1].of[byte];
  if (bits > 2) high = planes[2].of[byte];
  const Bytes negative = (low | high) & ~planes[0].of[byte];
  MINW_UNROLLED(i, 4) {
    auto halves = [&](Bytes x) MINW_LAMBDA { return shifted(x, i) & 0x11; };
    const Bytes l = halves(low), h = halves(high), minus = halves(negative);
    const Bytes magnitude = l + h + h + (l & h);  // A code of 3 is worth 4.
    // A half of `ones` is 15 if its level is negative: -m = (m ^ 15) + 1.
    const Bytes ones = (minus << 4) - minus;
    to[i] = (magnitude ^ ones) + minus;
  }
}

// Joins the levels of two channels for kVector output channels, which are in fours. The
// levels are in the lower (0) or the upper half (4) of each byte. An int16 has two
// output channels, the second one in its upper bits. Bytes 0 and 1 of the four go to
// the first half of the result, and bytes 2 and 3 to the second one:
//
//   (even 0 + even 1 << kPairsUpper) | (odd 0 + odd 1 << kPairsUpper) << 16
MINW_INLINE void store_pairs(char* to, Bytes even, Bytes odd, int half) {
  static_assert(kPairsUpper == 12, "the upper bits are the upper half of a byte");
  using Fours = Vec<uint32_t, kVector>;
  auto both = [half](Bytes x) MINW_LAMBDA {
    const Shorts up = (Shorts)x << (4 - half);  // Byte 1's half is in the upper bits.
    const auto low = (Vec<int16_t, kVector>)(up << 8) >> 12;  // With its sign.
    return (Fours)((Shorts)low + (up & 0xf000));
  };
  const Fours e = both(even), o = both(odd);
  store(to, (e & 0xffff) | o << 16);
  store(to + kVector, e >> 16 | (o & 0xffff0000));
}

}  // namespace

void pack_numbers(const Conv& c, const Weights& weights, uint64_t first, int inputs,
                  int digits, char* to) {
  const int taps = c.window.h * c.window.w;
  const int tap_numbers = static_cast<int>(c.group_bytes / c.width / taps);
  auto visit = [&](int out, int tap, int i, int, const Block* planes) MINW_CALLED {
    // Channels past the last one have the code 0, or the sign of their pixels.
    const int begin = tap * tap_numbers + i / digits;
    const int end = std::min(begin + 64 / digits, (tap + 1) * tap_numbers);
    char* number = to + out / c.width * c.group_bytes + out % c.width +
                   size_t{1} * begin * c.width;
    const int of_byte = 8 / digits;
    for (int byte = 0; begin + byte * of_byte < end; byte++) {
      Bytes x[4];
      numbers(planes, c.w_bits, byte, digits, x);
      for (int k = 0; k < std::min(of_byte, end - begin - byte * of_byte); k++) {
        // Tables that weights select have 16 bytes; an x86 address multiplies by 8.
        store(number, c.swapped ? x[k] + x[k] : x[k]);
        number += c.width;
      }
    }
  };
  each_block(c, weights, first, inputs, in_order, visit);
}

void pack_indices(const Conv& c, const Weights& weights, uint64_t first, int inputs,
                  char* to) {
  const int taps = c.window.h * c.window.w, digits = c.fold, bits = c.w_bits;
  const int tap_steps = c.steps / taps;
  // The index of a step by the bits of its weights, one plane after the other.
  uint8_t index[256];
  for (int planes = 0; planes < 1 << digits * bits; planes++) {
    int number = 0;
    for (int i = digits - 1; i >= 0; i--) {
      auto bit = [&](int plane) { return planes >> (plane * digits + i) & 1; };
      int code = bits == 1 ? 1 : bit(1) + (bits == 3 ? 2 * bit(2) : 0);
      if (!bit(0)) code = -code;
      number = bits == 1 ? 2 * number + bit(0)
                         : number * (bits == 2 ? 3 : 7) + code + (bits == 2 ? 1 : 3);
    }
    index[planes] = static_cast<uint8_t>(number);
  }
  const int of_word = 64 / digits;  // Steps of a word.
  const uint64_t mask = (uint64_t{1} << digits) - 1;
  uint64_t at = first;
  for (int out = 0; out < c.out.c; out++) {
    // Channels i and i + kTableColumns / 2 of a vector are neighbors.
    const int column = out % kTableColumns, half = kTableColumns / 2;
    char* channel = to + out / c.width * c.group_bytes +
                    out % c.width / kTableColumns * kTableColumns + column % half * 2 +
                    column / half;
    for (int tap = 0; tap < taps; tap++)
      for (int step = 0; step < tap_steps; step += of_word) {
        const int n = std::min(of_word * digits, inputs - step * digits);
        uint64_t planes[3];
        for (int p = 0; p < bits; p++) planes[p] = weights.plane(p, at, n);
        at += n;
        char* byte = channel + (size_t{1} * tap * tap_steps + step) * c.width;
        for (int k = 0; k * digits < n; k++, byte += c.width) {
          uint64_t all = 0;
          for (int p = 0; p < bits; p++)
            all |= (planes[p] >> k * digits & mask) << p * digits;
          *byte = static_cast<char>(index[all]);
        }
      }
  }
}

void pack_pairs(const Conv& c, const Weights& weights, uint64_t first, int inputs,
                char* to) {
  static_assert(kPairsWidth == kVector);
  const int tap_bytes = (inputs + 7) / 8 * 8 * kVector;
  auto visit = [&](int out, int tap, int i, int n, const Block* planes) MINW_CALLED {
    char* pair = to + out / kVector * c.group_bytes + size_t{1} * tap * tap_bytes +
                 size_t{1} * i * kVector;
    for (int byte = 0; 8 * byte < n; byte++) {
      const int channels = std::min(8, n - 8 * byte);
      Bytes x[4];
      levels(planes, c.w_bits, byte, channels, x);
      for (int k = 0; k < channels; k += 2, pair += size_t{2} * kVector)
        store_pairs(pair, x[k % 4], x[k % 4 + 1], k / 4 * 4);
    }
  };
  each_block(c, weights, first, inputs, in_fours, visit);
}

}  // namespace minw
