// Products of a group with AVX2.
//
// Codes trit + 1 and activations multiply to pairs of 16 bits, which are summed over a chunk of
// codes, or over those with one multiplier; then they are widened, times the multiplier.

#include <immintrin.h>

#include <algorithm>

#include "memory.h"
#include "ternary.h"

namespace kernels {
namespace {

constexpr int64_t kChunk = 16;    // quads: sums of 64 products of at most 2 * 2 * 128 fit 16 bits
constexpr int64_t kSlab = kQuad;  // bytes of the codes of a quad's slab
constexpr int64_t kVector = 32;
constexpr int64_t kRows = 6;  // of a tile of many rows, whose sums fit the registers

using Type = __m256i;

INLINE Type Load(const void* from) { return _mm256_loadu_si256(static_cast<const Type*>(from)); }
INLINE void Store(void* to, Type v) { _mm256_storeu_si256(static_cast<Type*>(to), v); }

// Not intrinsics: gcc 12 adds many products to each other first, for which it has no registers.
INLINE void AddPairs(Type& sums, Type codes, Type x) {
  Type pairs;
  __asm__("vpmaddubsw %3, %2, %1\n\tvpaddw %1, %0, %0" : "+x"(sums), "=&x"(pairs) : "x"(codes), "x"(x));
}

// Rows of activations, their sums, and a chunk of packed bytes of one plane, to be kept as codes.
struct Chunk {
  const uint8_t* packed;
  uint8_t* codes;
  const int8_t* x;
  int64_t count;          // quads
  const int32_t* parts;   // sums of activations of the first of the rows
  const int8_t* by;       // 64 multipliers for each part, `next` apart
  int64_t next;
};

// Sums of 16 bits of M rows times G vectors, of S slabs from `slab` on.
template <int M, int G, int S, bool kFirst>
INLINE void Products(const Chunk& chunk, int64_t width, int first, int slab, Type (&few)[M][G]) {
  const Type three = _mm256_set1_epi8(3);
  const __m128i shift = _mm_cvtsi32_si128(2 * slab);
  const uint8_t* w = chunk.packed + first * kVector;
  uint8_t* c = chunk.codes + first * kVector + slab * kSlab;
  const int8_t* x = chunk.x + 4 * slab;
#pragma GCC unroll 1
  for (int64_t q = 0; q < chunk.count; ++q, w += kQuad, c += 4 * kSlab, x += kInputs) {
    if (kFirst && M < 3) {
#pragma GCC unroll 8
      for (int g = 0; g < G; ++g) {
        Type v = Load(w + g * kVector);
        if (S < 4) v = _mm256_srl_epi16(v, shift);
        if (g % 2 == 0) __builtin_prefetch(w + g * kVector + kChunk * kQuad);
#pragma GCC unroll 4
        for (int r = 0; r < S; ++r) {
          const Type codes = _mm256_and_si256(r ? _mm256_srli_epi16(v, 2 * r) : v, three);
#pragma GCC unroll 8
          for (int m = 0; m < M; ++m) AddPairs(few[m][g], codes, _mm256_set1_epi32(FourOf(x + m * width + 4 * r)));
        }
      }
      continue;
    }
#pragma GCC unroll 4
    for (int r = 0; r < S; ++r) {
      Type codes[G];
#pragma GCC unroll 8
      for (int g = 0; g < G; ++g) {
        if (kFirst) {
          codes[g] = Load(w + g * kVector);
          codes[g] = _mm256_and_si256(S < 4 ? _mm256_srl_epi16(codes[g], _mm_cvtsi32_si128(2 * (slab + r))) : r ? _mm256_srli_epi16(codes[g], 2 * r) : codes[g], three);
          if (r == 0 && g % 2 == 0) __builtin_prefetch(w + g * kVector + kChunk * kQuad);
        }
        else
          codes[g] = Load(c + r * kSlab + g * kVector);
        if (kFirst) Store(c + r * kSlab + g * kVector, codes[g]);
      }
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) {
        const Type all = _mm256_set1_epi32(FourOf(x + m * width + 4 * r));
#pragma GCC unroll 8
        for (int g = 0; g < G; ++g)
          AddPairs(few[m][g], codes[g], all);
      }
    }
  }
}

// M rows from m0 on times a chunk, G vectors at a time, S slabs with one multiplier.
template <int M, int S, bool kFirst>
NOINLINE void Rows(const Group& p, const Chunk& chunk, int64_t m0) {
  constexpr int G = M == 1 ? 8 : M == 2 ? 4 : 2;
  const int64_t width = p.width;
  Chunk own = chunk;
  own.x += m0 * width;
  for (int first = 0; first < 8; first += G)
    for (int c = 0; c < 4 / S; ++c) {
      Type few[M][G], by[G];
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) {
        Type start = _mm256_setzero_si256();
        if (chunk.parts) {
          const int32_t sum = chunk.parts[(m0 + m) * p.parts + c], half = sum >> 1;
          start = _mm256_set1_epi32((-half & 0xffff) | static_cast<uint32_t>(half - sum) << 16);
        }
#pragma GCC unroll 8
        for (int g = 0; g < G; ++g) few[m][g] = start;
      }
      Products<M, G, S, kFirst>(own, width, first, c * S, few);
#pragma GCC unroll 8
      for (int g = 0; g < G; ++g) {
        by[g] = _mm256_set1_epi16(1);
        if (chunk.by) {
          const int8_t* from = chunk.by + c * chunk.next + (first + g) * 8;
          const Type m = _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
          by[g] = _mm256_or_si256(m, _mm256_slli_epi32(m, 16));
        }
      }
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
        for (int g = 0; g < G; ++g) {
          int32_t* out = p.out + (m0 + m) * p.stride + (first + g) * 8;
          Store(out, _mm256_add_epi32(Load(out), _mm256_madd_epi16(few[m][g], by[g])));
        }
    }
}

template <int M, int S, bool kFirst>
INLINE void RowsUpTo(const Group& p, const Chunk& chunk, int64_t m0, int64_t rows) {
  if (rows == M) return Rows<M, S, kFirst>(p, chunk, m0);
  if constexpr (M > (kFirst ? 1 : kRows / 2)) RowsUpTo<M - 1, S, kFirst>(p, chunk, m0, rows);
}

template <int S>
void Multiply(const Group& p) {
  alignas(64) uint8_t codes[kChunk * 4 * kSlab];
  for (int64_t m = 0; m < p.rows; ++m)
    std::fill_n(p.out + m * p.stride, kLanes, p.multipliers ? 0 : -static_cast<uint32_t>(p.sums[m]));
  const int64_t block = p.multipliers ? p.block : kChunk, tiles = (p.rows + kRows - 1) / kRows;
  const uint8_t* w = p.packed;
  for (int64_t b = 0; b * block < p.quads; ++b)
    for (int64_t q = 0; q < p.planes; ++q) {
      const int64_t count = std::min(block, p.quads - b * block), part = b * p.of_block;
      Chunk chunk = {w, codes, p.x + b * block * kInputs, count, nullptr, nullptr, 0};
      if (p.multipliers) {
        chunk.parts = p.part_sums + part;
        chunk.by = p.multipliers + ((p.groups == 1 ? 0 : part) * p.planes + q) * kLanes;
        chunk.next = p.groups == 1 ? 0 : p.planes * kLanes;
      }
      w += count * kQuad;
      for (int64_t t = 0; t < tiles; ++t) {
        const int64_t m0 = t * p.rows / tiles, rows = (t + 1) * p.rows / tiles - m0;
        t ? RowsUpTo<kRows, S, false>(p, chunk, m0, rows)
          : RowsUpTo<kRows, S, true>(p, chunk, m0, rows);
      }
    }
}

}  // namespace

void Avx2Group(const Group& p) {
  const int64_t parts = p.multipliers ? p.of_block : 1;
  parts == 1 ? Multiply<4>(p) : parts == 2 ? Multiply<2>(p) : Multiply<1>(p);
}

}  // namespace kernels
