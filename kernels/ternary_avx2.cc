// Products of a group with AVX2.
//
// Codes trit + 1 and activations multiply to pairs of 16 bits, which are summed as far as they fit,
// or as all have one multiplier; then they are widened, times the multiplier. What the codes count
// too much is the sum over groups of inputs of multiplier times the sum of their activations.

#include <immintrin.h>

#include "memory.h"
#include "ternary.h"

namespace kernels {
namespace {

constexpr int64_t kQuads = 16;  // 64 products of at most 2 * 2 * 128 fit 16 bits
constexpr int64_t kVector = 32;
constexpr int64_t kAhead = 4096;  // packed bytes, to be prefetched

__m256i Load(const void* from) { return _mm256_loadu_si256(static_cast<const __m256i*>(from)); }

// Sums of 16 bits of M rows times G vectors, of `count` quads, slabs `first` to first + S - 1.
template <int M, int G, int S>
INLINE void Products(const uint8_t* w, const int8_t* x, int64_t width, int64_t count, int first,
                     __m256i (&few)[M][G]) {
  const __m256i three = _mm256_set1_epi8(3);
  const __m128i shift = _mm_cvtsi32_si128(2 * first);
#pragma GCC unroll 8
  for (auto& row : few)
#pragma GCC unroll 8
    for (auto& sum : row) sum = _mm256_setzero_si256();
#pragma GCC unroll 1
  for (int64_t q = 0; q < count; ++q, w += kQuad, x += kInputs) {
#pragma GCC unroll 8
    for (int g = 0; g < G; ++g) {
      __m256i v = Load(w + g * kVector);
      if (S < 4) v = _mm256_srl_epi16(v, shift);
      if (g % 2 == 0) __builtin_prefetch(w + g * kVector + kAhead);
#pragma GCC unroll 4
      for (int r = 0; r < S; ++r) {
        const __m256i codes = _mm256_and_si256(_mm256_srli_epi16(v, 2 * r), three);
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m)
          few[m][g] = _mm256_add_epi16(
              few[m][g], _mm256_maddubs_epi16(
                             codes, _mm256_set1_epi32(FourOf(x + m * width + 4 * (first + r)))));
      }
    }
  }
}

// M rows from m0 on, G vectors at a time. C: groups of inputs in a block, each of 4 / C slabs
template <int M, int G, int C>
void Rows(const Group& p, int64_t m0) {
  const int64_t block = p.multipliers ? p.block : kQuads;
  for (int64_t first = 0; first < kLanes; first += 8 * G) {
    alignas(32) __m256i sums[M][G];
    for (int m = 0; m < M; ++m)
      for (auto& sum : sums[m])
        sum = _mm256_set1_epi32(p.multipliers ? 0 : -static_cast<uint32_t>(p.sums[m0 + m]));
    for (int64_t b = 0; b * block < p.quads; ++b)
      for (int64_t q = 0; q < p.planes; ++q) {
        const int64_t count = std::min(block, p.quads - b * block);
        const uint8_t* w = p.packed + (b * p.planes + q) * block * kQuad + 4 * first;
        const int8_t* x = p.x + m0 * p.width + b * block * kInputs;
        for (int c = 0; c < C; ++c) {
          __m256i few[M][G];
          Products<M, G, 4 / C>(w, x, p.width, count, c * 4 / C, few);
          const int64_t part = b * C + c, group = p.groups == 1 ? 0 : part;
          for (int g = 0; g < G; ++g) {
            __m256i by = _mm256_set1_epi16(1);
            if (p.multipliers) {
              const int8_t* from = p.multipliers + (group * p.planes + q) * kLanes + first + 8 * g;
              const __m128i eight = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
              const __m256i m = _mm256_cvtepi8_epi32(eight);
              by = _mm256_or_si256(m, _mm256_slli_epi32(m, 16));
            }
            for (int m = 0; m < M; ++m) {
              sums[m][g] = _mm256_add_epi32(sums[m][g], _mm256_madd_epi16(few[m][g], by));
              if (!p.multipliers) continue;
              const int32_t all = p.part_sums[(m0 + m) * p.parts + part] & 0xffff;
              const __m256i more = _mm256_madd_epi16(_mm256_set1_epi32(all), by);
              sums[m][g] = _mm256_sub_epi32(sums[m][g], more);
            }
          }
        }
      }
    for (int m = 0; m < M; ++m)
      for (int g = 0; g < G; ++g)
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p.out + (m0 + m) * p.stride + first + 8 * g),
                            sums[m][g]);
  }
}

template <int C>
void AllRows(const Group& p) {
  int64_t m = 0;
  for (; m + 4 <= p.rows; m += 4) Rows<4, 2, C>(p, m);
  for (; m + 2 <= p.rows; m += 2) Rows<2, 4, C>(p, m);
  if (m < p.rows) Rows<1, 8, C>(p, m);
}

}  // namespace

void Avx2Group(const Group& p) {
  const int64_t groups = p.multipliers ? p.of_block : 1;
  groups == 1 ? AllRows<1>(p) : groups == 2 ? AllRows<2>(p) : AllRows<4>(p);
}

}  // namespace kernels
