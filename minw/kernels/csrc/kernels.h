// Between the engine and the kernels of each instruction set: plain structs only. No
// inline function of the standard library may be used in the kernels' files: compiled
// with the flags of an instruction set, the linker might take that copy for everyone.
#ifndef MINW_KERNELS_H_
#define MINW_KERNELS_H_

#include <stddef.h>
#include <stdint.h>

namespace minw {

// Stored pixels have a multiple of kLane channels, so that vectors need no tails.
constexpr int kLane = 16;

enum Kind : uint8_t { kInt, kCode, kFloat };

// A tensor of an image: int32, int8 codes or float32; pixels are `stride` elements
// apart, what is beyond `c` is arbitrary.
struct Map {
  Kind kind;
  int bits;  // Of codes.
  int h, w, c, stride;
  int size() const { return kind == kCode ? 1 : 4; }  // Bytes of an element.
};

struct Window {
  int h, w, stride_h, stride_w, top, bottom, left, right;
  int step_h, step_w;  // Dilation: the distance of its rows and columns in pixels.
};

// Where images come from: uint8, cropped, less an offset per channel.
struct Source {
  int h, w, top, left;
  const uint8_t* offset;
};

// What a convolution reads, made from its input with the border around it.
enum Form : uint8_t {
  kPlanes,   // uint64 [word][plane]: is > 0, then masks of the magnitudes 1, 2, 4.
  kLookup,   // What looks up products of `fold` channels in tables.
  kBytes,    // uint8: level + 4.
  kInt16,    // Levels or pixels.
  kInt32,
  kFloat32,
};

// Scratch memory of a call. Of the output pixels that are convolved at a time: where
// the window begins, what sums begin with (by its border), its sum of magnitudes.
struct Work {
  char* padded;
  int32_t* magnitudes;
  const char** pixels;
  const int32_t** base;
  int32_t* sums;
  int32_t* acc;
  uint8_t* gathered;  // What lookups read of the pixels, and
  uint16_t* counts;   // what they count.
  char *part_in, *part_out;  // Channels of one group of a convolution that is split.
};

struct Conv;

// Sums of `n` output pixels and the channels of one group: work.acc is (n, width).
using Group = void (*)(const Conv& conv, int group, const Work& work, int n);

struct Conv {
  Map in, out;
  Window window;
  const Source* source;  // If it reads images.
  Form form;
  int a_bits, w_bits;  // Of planes and grids; w_bits is 0 for float weights.
  bool paired;         // 1/1: of two words, the second is the XOR of both.
  float unit;          // Of the input, for kFloat32.
  int words;           // Of a pixel and plane (kPlanes).
  int fold;            // Channels of a step (kLookup, kBytes).
  // Whether each output channel has inputs of its own: a pixel then holds, for each
  // step, an element for every output channel. Elsewhere all output channels share one.
  bool own;
  int elements;  // Elements of a pixel (kInt16 and what follows), and the input channel of
  const int32_t* channels;  // each; null if they are in order.
  int row_bytes;       // Of a pixel's window in work.gathered.
  bool swapped;        // Weights select the tables, and pixels index them.
  int pixel_bytes;     // Of a pixel in `form`.
  int padded_h, padded_w;
  int steps;           // Of a window; where they are, in bytes from its first pixel:
  const int32_t* offsets;
  int width, groups;   // Output channels of a group.
  size_t group_bytes;  // Of weights.
  const char* weights;  // [group][step][plane][channel]
  // What sums begin with, [row class][column class][channel]: depends on which taps
  // lie in the border.
  const int32_t* base;
  const int* row_class;
  const int* col_class;
  int col_classes;
  const char* border;  // A pixel of padding, and its sum of magnitudes.
  int32_t border_sum;
  bool sums;  // Sums of magnitudes of the window are added (1-bit weights).
  Group group;
};

struct Threshold {
  int bits, codes, count;        // `codes` sets, for each code of a shortcut.
  int stride;
  const int32_t* flip;           // -1 where a channel falls, [channel].
  const int32_t* thresholds;     // [code][count][channel], flipped.
};

// What follows a convolution in the same pass: max pool (1 x 1 if none), thresholds.
struct Finish {
  int pool_h, pool_w;
  Map out;
  const Threshold* threshold;  // Or null.
};

constexpr int kChunk = 192;  // Pixels that are convolved, then finished, at a time.
constexpr int kRowBlock = 32;  // Rows of lookups whose counts stay in the cache.
constexpr int kRowSlack = 32;  // Bytes that may be written past a gathered row,
constexpr int kPaddedSlack = 256;  // or read past the last padded pixel.

struct Isa {
  const char* name;
  bool dot;     // Has int8 dot products.
  bool lookup;  // Has table lookups.
  // Sets conv.group; returns its name.
  const char* (*choose)(Conv* conv);
  // Makes `n` pixels of conv.form; magnitudes may be null.
  void (*encode)(const Conv& conv, const void* in, int n, char* out,
                 int32_t* magnitudes);
  void (*conv)(const Conv& conv, const Finish& finish, int n, const void* in,
               const int8_t* shortcut, const Work& work, void* out);
  void (*threshold)(const Threshold& threshold, const int32_t* in,
                    const int8_t* shortcut, size_t pixels, int8_t* out);
  uint64_t (*peak)(uint64_t steps);
};

// The name is null where the compiler's target is another architecture. Constants, as
// a function in their files might already use what the CPU lacks.
extern const Isa kPortable, kAvx2, kAvx512, kNeon;

}  // namespace minw

#endif  // MINW_KERNELS_H_
