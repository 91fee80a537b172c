// The kernel for AMX, the int8 matrix unit of Intel's servers since Sapphire Rapids.
//
// The unit multiplies tiles of bytes. 16 output pixels by 64 inputs, and 64 inputs by
// 16 output channels, give 16 x 16 sums of int32. These 16,384 products take 16 cycles,
// for one bit as for eight. Codes are therefore stored as levels, and pixels of images
// as they are. Zero padding needs no correction.
//
// Inputs. The rows of a tile are output pixels, which must be at equal distances in
// memory. For each padded row and each output column, `pad` stores the row of a window:
// the channels of its taps, one tap after the other. For each row of the kernel, the
// windows of 16 neighboring output pixels are then 16 such rows of bytes, and the
// pixels of all images are neighbors:
//
//   [padded row][image][output column][tap of the row][channel]
//
// With strides, the padded rows that a row of the kernel reads are neighbors: rows 0,
// 2, 4, ... come first, then rows 1, 3, 5, ... for a stride of 2.
//
// Weights of 1 and 2 bits are stored as bits, because bytes would fill the cache. For
// each row of a tile a word says which bytes are 1, where the others are -1. With 2
// bits a second word says which are not 0. A piece turns the weights of a group into
// bytes before it uses them.
#include "kernels.h"

#if defined(__x86_64__) && defined(__AMX_INT8__)
#include <immintrin.h>

namespace minw {
namespace {

#include "avx512.inc"

// Vectors.
#include "vectors.inc"

// The epilogue.
#include "finish.inc"

// Rows of a tile, the bytes of a row, and the bytes of a tile.
constexpr int kRows = kTileRows, kRowBytes = kTileBytes, kTile = kRows * kRowBytes;
constexpr int kGroup = 2 * kRows;  // Output channels of a group.
static_assert(kGroup == kTileWidth);

// The shapes of all eight tiles, as the instruction reads them.
struct TileConfig {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t bytes[16] = {kRowBytes, kRowBytes, kRowBytes, kRowBytes,
                        kRowBytes, kRowBytes, kRowBytes, kRowBytes};
  uint8_t rows[16] = {kRows, kRows, kRows, kRows, kRows, kRows, kRows, kRows};
};
constexpr TileConfig kConfig;

// Levels of one pixel, for the border.
void encode(const Conv& c, const void* in, int n, char* out, int32_t*) {
  const int8_t* codes = static_cast<const int8_t*>(in);
  for (int i = 0; i < n; i++, codes += c.in.stride, out += c.in.c)
    for (int k = 0; k < c.in.c; k++) out[k] = static_cast<char>(level(codes[k]));
}

// Copies the channels of a row's pixels without the gaps between them, as levels.
void copy_row(const Conv& c, const char* from, char* to) {
  if (c.source) {
    __builtin_memcpy(to, from, size_t{1} * c.in.w * c.in.c);
    return;
  }
  using Bytes = Vec<int8_t, kLane>;
  for (int x = 0; x < c.in.w; x++, from += c.in.stride, to += c.in.c)
    for (int k = 0; k < c.in.stride; k += kLane) {
      Bytes b = load<Bytes>(from + k);
      if (c.a_bits == 3) b += Bytes(b == -3) - Bytes(b == 3);
      store(to + k, b);  // Past the last channel, the next pixel overwrites it.
    }
}

// Converts the rows [begin, end) of all images, with the border around them.
void pad(const Conv& c, const void* in, size_t begin, size_t end, const Work& work) {
  const Window& w = c.window;
  const int phase_rows = (c.padded_h + w.stride_h - 1) / w.stride_h;
  size_t in_row = static_cast<size_t>(c.in.w) * c.in.stride;
  size_t in_image = in_row * c.in.h;
  const char* images = static_cast<const char*>(in);
  if (c.source) {
    in_row = static_cast<size_t>(c.source->w) * c.in.c;
    in_image = in_row * c.source->h;
    images += c.source->top * in_row + c.source->left * c.in.c;
  }
  char* line = reinterpret_cast<char*>(work.acc);  // A padded row.
  auto fill = [&](int x, int end) {
    for (; x < end; x++) __builtin_memcpy(line + x * c.in.c, c.border, c.in.c);
  };
  const int taps = w.step_w == 1 ? 1 : w.w;  // Separate pieces of a window's row.
  const size_t size = size_t{1} * w.w * c.in.c / taps;
  const size_t rest = c.pixel_bytes - size_t{1} * w.w * c.in.c;
  for (size_t row = begin; row < end; row++) {
    int image = static_cast<int>(row / c.padded_h);
    int padded = static_cast<int>(row % c.padded_h), y = padded - w.top;
    bool inside = y >= 0 && y < c.in.h;
    fill(0, inside ? w.left : c.padded_w);
    if (inside) {
      copy_row(c, images + image * in_image + y * in_row, line + w.left * c.in.c);
      fill(w.left + c.in.w, c.padded_w);
    }
    size_t at = padded % w.stride_h * phase_rows + padded / w.stride_h;
    char* to = work.padded + (at * work.images + image) * c.out.w * c.pixel_bytes;
    for (int x = 0; x < c.out.w; x++) {
      const char* from = line + static_cast<size_t>(x) * w.stride_w * c.in.c;
      for (int k = 0; k < taps; k++, to += size)
        __builtin_memcpy(to, from + static_cast<size_t>(k) * w.step_w * c.in.c, size);
      __builtin_memset(to, 0, rest);
      to += rest;
    }
  }
}

// Makes bytes of a group's weights.
void expand(const Conv& c, const char* weights, char* to) {
  const size_t rows = c.expanded / kRowBytes;
  const __m512i one = _mm512_set1_epi8(1), minus = _mm512_set1_epi8(-1);
  for (size_t i = 0; i < rows; i++, to += kRowBytes) {
    uint64_t positive = load<uint64_t>(weights);
    weights += 8;
    __m512i x = _mm512_mask_blend_epi8(positive, minus, one);
    if (c.w_bits == 2) {
      x = _mm512_maskz_mov_epi8(load<uint64_t>(weights), x);
      weights += 8;
    }
    _mm512_storeu_si512(to, x);
  }
}

// The numbers of tiles are parts of the instructions, so that no function takes them.
#define MINW_TILE_DOT(acc, x, w) \
  do {                           \
    if constexpr (kUnsigned)     \
      _tile_dpbusd(acc, x, w);   \
    else                         \
      _tile_dpbssd(acc, x, w);   \
  } while (0)

// The sums of kTiles * 16 pixels and one group. `from` is the first pixel, and padded
// rows are `row` bytes long.
template <bool kUnsigned, int kTiles>
MINW_INLINE void tiles(const Conv& c, const char* from, size_t row, const char* weights,
                       int32_t* acc) {
  const ptrdiff_t next = c.pixel_bytes;
  _tile_zero(0);
  _tile_zero(1);
  if (kTiles == 2) {
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int y = 0; y < c.window.h; y++) {
    const char* x = from + c.offsets[y] * row;
    for (int k = 0; k < c.pixel_bytes; k += kRowBytes, weights += 2 * kTile) {
      _tile_loadd(4, x + k, next);
      _tile_loadd(6, weights, kRowBytes);
      MINW_TILE_DOT(0, 4, 6);
      _tile_loadd(7, weights + kTile, kRowBytes);
      MINW_TILE_DOT(1, 4, 7);
      if (kTiles == 2) {
        _tile_loadd(5, x + k + kRows * next, next);
        MINW_TILE_DOT(2, 5, 6);
        MINW_TILE_DOT(3, 5, 7);
      }
    }
  }
  const int stride = kGroup * 4;
  _tile_stored(0, acc, stride);
  _tile_stored(1, acc + kRows, stride);
  if (kTiles == 2) {
    _tile_stored(2, acc + kRows * kGroup, stride);
    _tile_stored(3, acc + kRows * kGroup + kRows, stride);
  }
}

// The sums of n pixels and one group. Sums past the last pixel may be written, up to a
// multiple of 16.
template <bool kUnsigned>
void group(const Conv& c, const char* from, size_t row, int n, const char* weights,
           int32_t* acc) {
  for (; n > kRows; n -= 2 * kRows) {
    tiles<kUnsigned, 2>(c, from, row, weights, acc);
    from += static_cast<size_t>(2) * kRows * c.pixel_bytes;
    acc += 2 * kRows * kGroup;
  }
  if (n > 0) tiles<kUnsigned, 1>(c, from, row, weights, acc);
}

// Adds what the kernel leaves out, if any.
void add_base(const Conv& c, int group, int n, int32_t* acc) {
  for (int i = 0; i < n * kGroup; i += kInts) {
    const int32_t* base = c.base + group * kGroup + i % kGroup;
    store(acc + i, load<Ints>(acc + i) + load<Ints>(base));
  }
}

// Convolves a piece: pooled rows of all images. Their pixels are neighbors.
void conv(const Conv& c, const Finish& f, const Piece& piece, const int8_t* shortcut,
          const Work& work, void* out) {
  const int images = work.images, row = images * c.out.w;  // Pixels of a row.
  const int rows = piece.size * f.pool_h, first = static_cast<int>(piece.first);
  const size_t row_bytes = static_cast<size_t>(row) * c.pixel_bytes;
  const char* from = work.padded + first * f.pool_h * row_bytes;
  _tile_loadconfig(&kConfig);
  for (int g = piece.begin; g < piece.end; g++) {
    const char* weights = c.weights + g * c.group_bytes;
    if (c.w_bits < 3) {
      expand(c, weights, reinterpret_cast<char*>(work.gathered));
      weights = reinterpret_cast<char*>(work.gathered);
    }
    (c.source ? group<true> : group<false>)(c, from, row_bytes, rows * row, weights,
                                            work.acc);
    if (c.source) add_base(c, g, rows * row, work.acc);
    const Steps steps = {f.pool_w * kGroup, row * kGroup};
    for (int y = 0; y < piece.size; y++)
      for (int image = 0; image < images; image++) {
        const int32_t* acc =
            work.acc + (y * f.pool_h * images + image) * c.out.w * kGroup;
        size_t to = (static_cast<size_t>(image) * f.out.h + first + y) * f.out.w;
        finish_group(f, g * kGroup, kGroup, to, f.out.w, acc, steps, shortcut, out);
      }
  }
  _tile_release();
}

// Multiplies tiles without loading any.
uint64_t peak(uint64_t steps) {
  _tile_loadconfig(&kConfig);
  for (uint64_t k = 0; k < steps; k++) {
    _tile_dpbssd(0, 4, 6);
    _tile_dpbssd(1, 4, 7);
    _tile_dpbssd(2, 5, 6);
    _tile_dpbssd(3, 5, 7);
  }
  _tile_release();
  return steps * 4 * kRows * kTile;
}

const char* choose(Conv* c) {
  static const char* const names[3][4] = {
      {"int8 tiles", "W1A1 int8 tiles", "W1A2 int8 tiles", "W1A3 int8 tiles"},
      {"int8 tiles", "W2A1 int8 tiles", "W2A2 int8 tiles", "W2A3 int8 tiles"},
      {"int8 tiles", "W3A1 int8 tiles", "W3A2 int8 tiles", "W3A3 int8 tiles"}};
  c->peak = peak;
  return names[c->w_bits - 1][c->a_bits];
}

}  // namespace

const Isa kAmx = {"amx", &kVbmi, true,   false, true, 0,         false,
                  0,     choose, encode, pad,   conv, threshold, maximum};

}  // namespace minw

#else
const minw::Isa minw::kAmx = {};
#endif
