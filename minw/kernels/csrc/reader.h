// Reads numbers, constants and names from the bytes of a .minw file.
#ifndef MINW_READER_H_
#define MINW_READER_H_

#include <cmath>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "program.h"
#include "rules.h"

namespace minw {

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "little-endian only"
#endif

inline std::string str(int64_t x) { return std::to_string(x); }

// Whether a name is UTF-8 without a NUL, which would end a string in C. As by Python's
// decoder, surrogates and codes that are longer than necessary are refused.
inline bool is_name(const uint8_t* at, const uint8_t* end) {
  while (at < end) {
    uint32_t first = *at++;
    if (first == 0) return false;
    if (first < 0x80) continue;
    int more = 1;  // Bytes that follow.
    if (first >= 0xe0) more = first >= 0xf0 ? 3 : 2;
    if (first < 0xc2 || first > 0xf4 || end - at < more) return false;
    uint32_t code = first & (0x3f >> more);
    for (int i = 0; i < more; i++, at++) {
      if ((*at & 0xc0) != 0x80) return false;
      code = code << 6 | (*at & 0x3f);
    }
    if (more == 2 && (code < 0x800 || (code >= 0xd800 && code < 0xe000))) return false;
    if (more == 3 && (code < 0x10000 || code > 0x10ffff)) return false;
  }
  return true;
}

// Reads a part of a file from its beginning. Methods throw Error if the part ends
// before what they read, or if what they read is not allowed.
class Reader {
 public:
  Reader(const uint8_t* begin, const uint8_t* end) : at_(begin), end_(end) {}

  const uint8_t* take(uint64_t size) {
    if (size > static_cast<uint64_t>(end_ - at_))
      throw Error("the program ends before its data");
    const uint8_t* from = at_;
    at_ += size;
    return from;
  }

  template <class T>
  T get() {
    T x;
    std::memcpy(&x, take(sizeof x), sizeof x);
    return x;
  }

  int limited(const char* what, int64_t low, int64_t high) {
    int64_t x = get<uint32_t>();
    if (x < low || x > high)
      throw Error(std::string(what) + " " + str(x) + " is not in " + str(low) + ".." +
                  str(high));
    return static_cast<int>(x);
  }

  int size(const char* what) { return limited(what, 1, kMaxSize); }

  // Float constants, each of which is 0 or neither tiny nor huge in magnitude.
  std::vector<float> constants(const char* what, size_t n,
                               float least = kLeastConstant) {
    const uint8_t* from = take(n * sizeof(float));
    std::vector<float> x(n);
    if (n) std::memcpy(x.data(), from, n * sizeof(float));
    for (float value : x) check(what, value, least);
    return x;
  }

  // One such constant.
  float constant(const char* what) {
    float x = get<float>();
    check(what, x, kLeastConstant);
    return x;
  }

  // A name, which follows the number of its bytes.
  std::string name() {
    size_t length = get<uint8_t>();
    const uint8_t* from = take(length);
    if (!is_name(from, from + length)) throw Error("its name is not UTF-8");
    return {from, from + length};
  }

  bool done() const { return at_ == end_; }

 private:
  static void check(const char* what, float x, float least) {
    float size = std::fabs(x);
    if (x != 0 && !(least <= size && size <= kMostConstant))
      throw Error(std::string(what) + " is neither 0 nor between " +
                  (least == kLeastAdded ? "2^-100" : "2^-40") +
                  " and 2^40 in magnitude");
  }

  const uint8_t *at_, *end_;
};

}  // namespace minw

#endif  // MINW_READER_H_
