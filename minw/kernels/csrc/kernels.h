// Structs that the engine shares with the kernels of each instruction set.
//
// The kernels' files must not use inline functions of the standard library. Each file
// is compiled for an instruction set of its own, and the linker keeps one copy of such
// a function for all files. It could keep one that not every CPU runs.
#ifndef MINW_KERNELS_H_
#define MINW_KERNELS_H_

#include <stddef.h>
#include <stdint.h>

#include "winograd.h"

namespace minw {

// Whether the machine code is to be small, where more of it would be faster: browsers
// load the module for WebAssembly.
#ifdef __wasm__
constexpr bool kSmallCode = true;
#else
constexpr bool kSmallCode = false;
#endif

// Stored pixels have a multiple of kLane channels, so that vectors need no tails.
constexpr int kLane = 16;

enum Kind : uint8_t { kInt, kCode, kFloat };

// The shape of one image's tensor of int32, of int8 codes, or of float32. Pixels are
// `stride` elements apart. The elements of a pixel beyond channel `c` are arbitrary.
struct Map {
  Kind kind;
  int bits;  // Bits of a code.
  int h, w, c, stride;
  int size() const { return kind == kCode ? 1 : 4; }  // Bytes of an element.
};

// A kernel's size, its strides, and the border around its input.
struct Window {
  int h, w, stride_h, stride_w, top, bottom, left, right;
  int step_h, step_w;  // Dilation: distance of its rows and columns, in pixels.
};

// How pixels are made from images of uint8: cropped, and less an offset per channel.
struct Source {
  int h, w, top, left;
  const uint8_t* offset;
};

// The form in which a convolution reads its input. The input is converted once,
// together with the border around it.
enum Form : uint8_t {
  kPlanes,    // Bits, uint32 [word][plane]: signs (1 is positive), masks of 1, 2, 4.
  kLookup,    // Numbers of `fold` channels, which select tables or entries of tables.
  kBytes,     // Levels + 4, as uint8.
  kTiles,     // Levels as int8, or pixels as uint8: rows of windows (kernels_amx.cc).
  kTables,    // Numbers of two channels, which select wide tables (kernels_vbmi.cc).
  kPairs,     // Levels as int16, whose products are summed in pairs.
  kInt16,     // Levels or pixels.
  kInt32,     // The same, where sums may exceed an int16.
  kFloat32,   // Levels, pixels or floats in their own unit.
  kWinograd,  // Sums of pixels, as floats; see winograd.h.
};

// Input channels of a word of bit planes.
constexpr int kWordBits = 32;

// Pixels that are convolved and then finished at a time. Their sums for one group of
// output channels stay in the cache.
constexpr int kChunk = 192;

// Counts of a block of table lookups, rows times columns. They stay in the cache, and
// all rows of a block look up the same weights while these are there.
constexpr int kLookupCounts = 12288;

// Rows of swapped lookups, which are output channels.
constexpr int kRowBlock = 32;

// Tiles of kTiles have at most 16 rows of 64 bytes. A group is two tiles wide, and two
// tiles of pixels are read at a time.
constexpr int kTileRows = 16, kTileBytes = 64, kTileWidth = 2 * kTileRows;
constexpr int kTilePixels = 2 * kTileRows;

// The output channels of a group of kPairs, and the bits below the weights of those
// that are in the upper part of an int16.
constexpr int kPairsWidth = 16, kPairsUpper = 12;

// The channels of a step of kTables, by the bits of the codes that select entries.
constexpr int table_channels(int bits) { return bits == 1 ? 6 : bits == 2 ? 4 : 2; }

// Output channels of a vector of kTables, and vectors of a group, unless swapped.
constexpr int kTableColumns = 64, kTableVectors = 4;

constexpr int kRowSlack = 32;      // Bytes that may be written past a gathered row.
constexpr int kPaddedSlack = 256;  // Bytes that may be read past the last padded pixel.

// The steps of the taps inside the map: runs of neighboring steps, one for each row of
// the kernel, or a single one if the rows are whole.
struct Taps {
  int runs, first, steps, distance;
};

// Classes of pixels by which taps are inside the map, if taps in the border are
// skipped.
constexpr int kMostClasses = 64;

// Scratch memory of one thread. The threads of a call share the first two arrays. The
// arrays `pixels`, `base`, `sums`, `kind` and `order` have an element for each output
// pixel of the chunk that is being convolved.
struct Work {
  char* padded;          // The input in the convolution's form, with its border.
  int32_t* magnitudes;   // Sums of magnitudes: of the row of a window at each pixel.
  const char** pixels;   // Begin of the window in `padded`.
  const int32_t** base;  // Initial values of the sums.
  int32_t* sums;         // Sum of the magnitudes in the window.
  int32_t* kind;         // kPlanes: its class, see Conv::taps; kWinograd: its power.
  int32_t* order;        // kPlanes: its place among the chunk's sums.
  int32_t* acc;          // The sums of one group, [pixel][width].
  int32_t* lines;        // Rows that overlapping windows pool.
  // Lookups: numbers in the windows; kTiles: weights; kWinograd: sums of the points.
  uint8_t* gathered;
  uint16_t* counts;  // Lookups: sums of the entries that were looked up.
  int images;        // Images of the call.
};

struct Conv;

// A piece of a convolution's result: `size` pooling windows of all images from window
// `first` on, or with kTiles as many rows of windows in each image; and the groups
// [begin, end) of output channels. With Finish::by_rows(), windows are counted in all
// rows of the convolution's result, and a piece lies in one row.
struct Piece {
  size_t first;
  int size, begin, end;
};

// Computes work.acc: the sums of `n` output pixels for the channels of one group.
using Group = void (*)(const Conv& conv, int group, const Work& work, int n);

// Runs steps of a kernel on registers alone. Returns how many products were summed.
using Peak = uint64_t (*)(uint64_t steps);

// A convolution laid out for a kernel; see layer.cc. A step is what a kernel processes
// at a time: a few input channels of one tap. A group is a block of `width` output
// channels.
struct Conv {
  Map in, out;
  Window window;
  const Source* source;  // Null unless it reads images.
  Form form;
  int a_bits, w_bits;  // Bits of activations and weights; 0 if they are no codes.
  float unit;          // Unit of the input (kFloat32).
  uint64_t products;   // Products of weights and activations for an output pixel.

  int words;     // Words of a pixel and plane (kPlanes).
  bool paired;   // W1A1 with two words in a step; the second one holds the XOR of both.
  bool sums;     // The sum of the window's magnitudes is added (weights of 1 bit).
  int fold;      // Channels of a step (kLookup, kBytes, kTables, kPairs).
  int numbers;   // Numbers of a step (kLookup, kTables).
  bool joint;    // A byte of a row has the numbers of two pixels (kLookup).
  bool swapped;  // Weights select the tables and pixels the entries, not vice versa.

  // Whether each output channel has inputs of its own. A pixel then holds an element
  // for every step and output channel. Otherwise all output channels share one for a
  // step.
  bool own;
  int elements;             // Elements of a pixel (kInt16, kInt32, kFloat32).
  bool multiplied;          // Weights are numbers, not masks (kInt16, kInt32).
  const int32_t* channels;  // Input channel of each element; null if in order.

  // Results of a row that are computed together, how many times a row has them, and
  // the floats of a padded row of the image that they read (kWinograd).
  int results, tiles, line;

  int row_bytes;      // Bytes of a pixel's window in work.gathered, or 0.
  uint64_t expanded;  // Bytes of a group's weights in work.gathered (kTiles).
  int pixel_bytes;    // Bytes of a pixel in `form`.
  // Size of the input with its border. With kWinograd, a row has elements for each
  // point and tile.
  int padded_h, padded_w;
  int steps;  // Steps of a window.
  // Bytes from a window's first pixel to each step. With kTiles, padded rows from its
  // first row to each row of the kernel.
  const int32_t* offsets;
  int width;             // Output channels of a group.
  int groups;            // Groups of output channels.
  uint64_t group_bytes;  // Bytes of a group's weights.
  const char* weights;   // [group][step][plane][channel]
  const int32_t* base;   // Initial sums, [row class][column class][channel].
  const int* row_class;  // Class of each output row ...
  const int* col_class;  // ... and column, by which taps lie in the border.
  int col_classes;       // Number of classes of columns.
  const Taps* taps;      // The taps of each class; null if all taps are summed.
  int tap_classes;       // Number of elements of `taps`.
  const char* border;    // A pixel of padding.
  int32_t border_sum;    // Its sum of magnitudes.
  Group group;           // The kernel.
  Peak peak;             // Its steps on registers alone, or null.
};

// Integer thresholds that turn sums into codes; see finish.inc.
struct Threshold {
  int bits;   // Bits of the codes that are made.
  int codes;  // Number of codes of a shortcut, each with thresholds of its own.
  int count;  // Thresholds of a channel.
  int stride;
  const int32_t* flip;        // [channel]: -1 where codes fall as sums grow, else 0.
  const int32_t* thresholds;  // [code][count][channel], XORed with `flip`.
};

// Operations after a convolution in the same pass: max pooling, then thresholds.
struct Finish {
  int pool_h, pool_w;  // 1 x 1 if there is no pooling.
  Map out;
  const Threshold* threshold;  // Null if there are none.
  // The windows if they overlap or reach into a border, else null. A kernel then pools
  // rows of 1 x pool_w, which run.cc joins. Small code has no such passes.
  const Window* windows;

  bool by_rows() const { return !kSmallCode && windows; }
};

// The kernels of an instruction set.
struct Isa {
  const char* name;
  const Isa* others;  // Runs the layers that these kernels do not, or null.
  bool tiles;         // Has int8 tiles (kTiles), and no other form.
  bool tables;        // Has lookups in wide tables (kTables), and no other form.
  bool dot;           // Has int8 dot products (kBytes).
  int lookup;         // Columns of a tile of table lookups (kLookup), or 0.
  bool pairs;         // Has sums of pairs of products (kPairs).
  // The largest groups of bit planes, in output channels; a multiple of kLane. It is 0
  // if there are no kernels in which weights are signs and masks: bit planes, and lanes
  // without multiplications. Without them, all bits are looked up or multiplied.
  int masks;
  // Sets conv->group and conv->peak, and returns the name of the kernel.
  const char* (*choose)(Conv* conv);
  // Converts `n` pixels to conv.form. `magnitudes` may be null.
  void (*encode)(const Conv& conv, const void* in, int n, char* out,
                 int32_t* magnitudes);
  // Converts the rows [begin, end) of all images, with the border around them.
  void (*pad)(const Conv& conv, const void* in, size_t begin, size_t end,
              const Work& work);
  // Convolves and finishes a piece that is not larger than a chunk.
  void (*conv)(const Conv& conv, const Finish& finish, const Piece& piece,
               const int8_t* shortcut, const Work& work, void* out);
  // Turns the sums of `pixels` pixels into codes.
  void (*threshold)(const Threshold& threshold, const int32_t* in,
                    const int8_t* shortcut, size_t pixels, int8_t* out);
  // Replaces `n` integers or floats, a multiple of kLane, by the maximum of both.
  void (*maximum)(Kind kind, const int32_t* from, size_t n, int32_t* to);
};

// The name is null where the library was built for another architecture. These are
// constants because a function in their files might use what the CPU lacks.
extern const Isa kPortable, kAvx2, kAvx512, kVbmi, kAmx, kNeon, kWasm;

}  // namespace minw

#endif  // MINW_KERNELS_H_
