// Bytes of five trits each, as a converted checkpoint stores them, to packed ones of four.

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "common.h"

namespace {

// quantize.from_base3, which explains the arithmetic, of n bytes, a multiple of 4; the largest one.
FOR_EVERY_PROCESSOR uint8_t FromBase3Bytes(const uint8_t* digits, int64_t n, uint8_t* packed) {
  constexpr int64_t some = 256;
  uint8_t low[some], fifth[some], largest = 0;
  for (int64_t i = 0; i < n; i += some, packed += some / 4 * 5) {
    const int64_t count = std::min(some, n - i);
    for (int64_t j = 0; j < count; ++j) {
      const uint8_t d = digits[i + j];
      largest = std::max(largest, d);
      fifth[j] = d / 81;
      low[j] = d + d / 3 + 4 * (d / 9) + 16 * (d / 27) + 64 * (d / 81);
    }
    for (int64_t g = 0; g < count / 4; ++g) {
      uint32_t four;
      std::memcpy(&four, fifth + 4 * g, 4);
      std::memcpy(packed + 5 * g, low + 4 * g, 4);
      packed[5 * g + 4] = (four * (1u << 24 | 1u << 18 | 1u << 12 | 1u << 6)) >> 24;
    }
  }
  return largest;
}

}  // namespace

// digits [rows, width] -> packed [rows, packed_width]; the largest digit, -1 if widths do not fit.
extern "C" int64_t FromBase3(const uint8_t* digits, int64_t rows, int64_t width, uint8_t* packed,
                             int64_t packed_width) {
  if (rows < 0 || width < 0 || width % 4 || packed_width != width / 4 * 5) return -1;
  return FromBase3Bytes(digits, rows * width, packed);
}
