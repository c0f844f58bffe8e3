// Products of a group in C++ that any compiler takes, of every kind of weight.

#include <algorithm>

#include "memory.h"
#include "ternary.h"

namespace kernels {
namespace {

// Adds plane q's trits of the 16 inputs of a quad, times their multipliers, to codes [16, 64].
void AddTrits(const Group& p, int64_t quad, int64_t q, int8_t (&codes)[kInputs][kLanes]) {
  for (int64_t k = 0; k < 4 && 4 * quad + k < p.bytes; ++k) {
    const int64_t byte = 4 * quad + k, block = byte / p.block_bytes;
    const int64_t at = (block * p.planes + q) * p.block_bytes + byte % p.block_bytes;
    const uint8_t* w = p.packed + at / 4 * kQuad + at % 4;
    for (int64_t r = 0; r < 4; ++r) {
      const int64_t group = p.groups == 1 ? 0 : block * p.of_block + r * p.of_block / 4;
      const int8_t* by = p.multipliers ? p.multipliers + (group * p.planes + q) * kLanes : nullptr;
      for (int64_t o = 0; o < kLanes; ++o)
        codes[4 * r + k][o] += ((w[4 * o] >> 2 * r & 3) - 1) * (by ? by[o] : 1);
    }
  }
}

}  // namespace

void PlainGroup(const Group& p) {
  for (int64_t m = 0; m < p.rows; ++m) std::fill_n(p.out + m * p.stride, kLanes, 0);
  for (int64_t quad = 0; quad < p.quads; ++quad) {
    int8_t codes[kInputs][kLanes] = {};
    for (int64_t q = 0; q < p.planes; ++q) AddTrits(p, quad, q, codes);
    for (int64_t m = 0; m < p.rows; ++m) {
      const int8_t* x = p.x + m * p.width + quad * kInputs;
      int32_t* out = p.out + m * p.stride;
      for (int64_t t = 0; t < kInputs; ++t)
        for (int64_t o = 0; o < kLanes; ++o) out[o] += codes[t][o] * x[t];
    }
  }
}

}  // namespace kernels
