// Decodes the weights of a parsed program, rounds to float formats, and names the
// subjects of errors.
#include "program.h"

#include <algorithm>
#include <cmath>
#include <utility>

namespace minw {
namespace {

thread_local const std::string* subject = nullptr;

// float8_e4m3fn: 4 bits of exponent with bias 7, 3 of mantissa. It has no infinities.
float float8(uint8_t x) {
  int exponent = x >> 3 & 15, mantissa = x & 7;
  if (exponent == 15 && mantissa == 7) return NAN;
  float magnitude = exponent ? std::ldexp(float(8 + mantissa), exponent - 10)
                             : std::ldexp(float(mantissa), -9);
  return x & 128 ? -magnitude : magnitude;
}

// float16: 5 bits of exponent with bias 15, 10 of mantissa.
float half(uint16_t x) {
  int exponent = x >> 10 & 31, mantissa = x & 1023;
  float magnitude = exponent ? std::ldexp(float(1024 + mantissa), exponent - 25)
                             : std::ldexp(float(mantissa), -24);
  if (exponent == 31) magnitude = mantissa ? NAN : INFINITY;
  return x & 0x8000 ? -magnitude : magnitude;
}

}  // namespace

Error::Error(const std::string& message)
    : std::runtime_error(subject ? *subject + ": " + message : message) {}

Subject::Subject(std::string name) : name_(std::move(name)) { subject = &name_; }
Subject::~Subject() { subject = nullptr; }

int64_t Value::most() const {
  return bound.empty() ? 0 : *std::max_element(bound.begin(), bound.end());
}

uint64_t Weights::bits_at(const uint8_t* plane, uint64_t bytes, uint64_t first, int n) {
  uint64_t byte = first / 8, low = 0;
  if (byte + 8 <= bytes)
    std::memcpy(&low, plane + byte, 8);  // An instruction, and no call.
  else
    std::memcpy(&low, plane + byte, bytes - byte);
  int shift = static_cast<int>(first % 8);
  low >>= shift;
  if (shift && byte + 8 < bytes) low |= uint64_t{plane[byte + 8]} << (64 - shift);
  return n == 64 ? low : low & ((uint64_t{1} << n) - 1);
}

Bits Weights::bits(uint64_t first, int n) const {
  uint64_t positive = plane(0, first, n);
  uint64_t all = n == 64 ? ~uint64_t{0} : (uint64_t{1} << n) - 1;
  if (format == 1) return {positive, {all, 0, 0}};
  uint64_t low = plane(1, first, n);
  if (format == 2) return {positive & low, {low, 0, 0}};
  uint64_t high = plane(2, first, n);
  return {positive & (low | high), {low & ~high, high & ~low, low & high}};
}

float Weights::value(uint64_t i) const {
  uint16_t two;
  float four;
  switch (format) {
    case kFloat8: return float8(data[i]);
    case kHalf: std::memcpy(&two, data + 2 * i, 2); return half(two);
    case kBfloat: {
      std::memcpy(&two, data + 2 * i, 2);
      uint32_t wide = uint32_t{two} << 16;
      std::memcpy(&four, &wide, 4);
      return four;
    }
    case kSingle: std::memcpy(&four, data + 4 * i, 4); return four;
    default: break;  // A grid.
  }
  Bits b = bits(i, 1);
  float magnitude = static_cast<float>(b.mask[0] + 2 * b.mask[1] + 4 * b.mask[2]);
  return b.positive ? magnitude : 0 - magnitude;
}

float rounded(float x, int format) {
  if (format == kSingle || x == 0 || !std::isfinite(x)) return x;
  // Bits of the mantissa, and the exponent of the smallest magnitude.
  int mantissa = 7, smallest = -133;  // bfloat16
  if (format == kFloat8) mantissa = 3, smallest = -9;
  if (format == kHalf) mantissa = 10, smallest = -24;
  int exponent = std::max(std::ilogb(x) - mantissa, smallest);
  if (std::ilogb(x) < -126) exponent = -126;  // XLA has no denormal bfloat16.
  return std::ldexp(std::nearbyint(std::ldexp(x, -exponent)), exponent);
}

}  // namespace minw
