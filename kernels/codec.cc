// Packed bytes of four trits to bytes of five, as a converted checkpoint stores them, and back.

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "memory.h"

namespace {

constexpr int64_t kSome = 256;  // bytes of five trits at a time

// shards.to_base3, which explains the arithmetic, of n bytes, a multiple of 5.
void ToBase3Bytes(const uint8_t* packed, int64_t n, uint8_t* digits) {
  uint8_t four[kSome], fifth[kSome];
  for (int64_t left = n / 5; left > 0; left -= kSome / 4, digits += kSome) {
    const int64_t count = std::min(kSome / 4, left);
    for (int64_t g = 0; g < count; ++g, packed += 5) {
      const uint32_t p = packed[4], trits = (p | p << 6 | p << 12 | p << 18) & 0x03030303;
      std::memcpy(four + 4 * g, packed, 4);
      std::memcpy(fifth + 4 * g, &trits, 4);
    }
    for (int64_t j = 0; j < 4 * count; ++j) {
      const uint8_t p = four[j];
      digits[j] = p - (p >> 2) - 3 * (p >> 4) - 9 * (p >> 6) + 81 * fifth[j];
    }
  }
}

// shards.from_base3, which explains the arithmetic, of n bytes, a multiple of 4; the largest one.
uint8_t FromBase3Bytes(const uint8_t* digits, int64_t n, uint8_t* packed) {
  uint8_t low[kSome], fifth[kSome], largest = 0;
  for (int64_t i = 0; i < n; i += kSome, packed += kSome / 4 * 5) {
    const int64_t count = std::min(kSome, n - i);
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

// Copies n packed bytes; whether a code of 3, which no trit has, is among theirs.
bool CopyBytes(const uint8_t* __restrict packed, int64_t n, uint8_t* __restrict out) {
  uint8_t threes = 0;
  for (int64_t i = 0; i < n; ++i) {
    threes |= packed[i] & packed[i] >> 1;
    out[i] = packed[i];
  }
  return threes & 0b01010101;
}

}  // namespace

// Copies packed [n] to out [out_n]; 1 if it has a code of 3, else 0; -1 if sizes do not fit.
extern "C" int64_t CopyTrits(const uint8_t* packed, int64_t n, uint8_t* out, int64_t out_n) {
  return n < 0 || n != out_n ? -1 : CopyBytes(packed, n, out);
}

// packed [rows, packed_width] -> digits [rows, width], zeros (trits) where five bytes are not full;
// 0, -1 if widths do not fit.
extern "C" int64_t ToBase3(const uint8_t* packed, int64_t rows, int64_t packed_width,
                           uint8_t* digits, int64_t width) {
  if (rows < 0 || packed_width < 0 || width != (packed_width + 4) / 5 * 4) return -1;
  const int64_t whole = packed_width / 5 * 5, rest = packed_width - whole;
  if (rest == 0) {
    ToBase3Bytes(packed, rows * packed_width, digits);
    return 0;
  }
  for (int64_t i = 0; i < rows; ++i, packed += packed_width, digits += width) {
    uint8_t last[5];
    std::memset(last, 0b01010101, 5);
    std::memcpy(last, packed + whole, rest);
    ToBase3Bytes(packed, whole, digits);
    ToBase3Bytes(last, 5, digits + width - 4);
  }
  return 0;
}

// digits [rows, width] -> packed [rows, packed_width]; the largest digit, -1 if widths do not fit.
extern "C" int64_t FromBase3(const uint8_t* digits, int64_t rows, int64_t width, uint8_t* packed,
                             int64_t packed_width) {
  if (rows < 0 || width < 0 || width % 4 || packed_width != width / 4 * 5) return -1;
  return FromBase3Bytes(digits, rows * width, packed);
}
