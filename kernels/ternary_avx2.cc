// Products of a group with AVX2.
//
// Codes trit + 1 and activations multiply to pairs of 16 bits, which are summed over a chunk of
// codes, as many as fit; then they are widened, times the multiplier of their group of inputs. The
// first rows unpack a chunk, and where there are more, keep its codes for them.

#include <immintrin.h>

#include <algorithm>

#include "memory.h"
#include "ternary.h"

namespace kernels {
namespace {

constexpr int64_t kChunk = 16;    // quads: sums of 64 products of at most 2 * 2 * 128 fit 16 bits
constexpr int64_t kSlab = kQuad;  // bytes of the codes of a quad's slab
constexpr int64_t kVector = 32;
constexpr int kVectors = 8;     // of a group's outputs
constexpr int kRows = 6;        // of a tile, two vectors of each, whose sums fit the registers
constexpr int kDirectRows = 2;  // up to so many are all, and read packed bytes on and on

using Type = __m256i;

INLINE Type Load(const void* from) { return _mm256_loadu_si256(static_cast<const Type*>(from)); }
INLINE void Store(void* to, Type v) { _mm256_storeu_si256(static_cast<Type*>(to), v); }

// Not intrinsics: gcc 12 adds many products to each other first, for which it has no registers.
INLINE void AddPairs(Type& sums, Type codes, const int8_t* x) {
  Type pairs;
  __asm__("vpmaddubsw %3, %2, %1\n\tvpaddw %1, %0, %0"
          : "+x"(sums), "=&x"(pairs)
          : "x"(codes), "x"(_mm256_set1_epi32(FourOf(x))));
}

// A chunk of one plane, and what it is multiplied by.
struct Chunk {
  const uint8_t* packed;      // [count, 64, 4]
  uint8_t* codes;             // [count, 4 slabs, 64, 4]
  const int8_t* x;            // the inputs of the first of all rows
  int64_t count;              // quads
  int parts, slabs;           // groups of inputs, and slabs of each; 1 and 4 without multipliers
  const int32_t* sums;        // of activations, [rows, parts]; null: all multipliers are 1
  const int8_t* multipliers;  // [64] for each group, `next` apart
  int64_t next;
};

// Adds M rows times G vectors of S slabs from `slab` on. kFirst: of packed bytes
template <int M, int G, int S, bool kFirst>
INLINE void AddSlabs(const Chunk& chunk, int64_t width, int first, int slab, Type (&few)[M][G]) {
  constexpr bool kDirect = kFirst && M <= kDirectRows;
  const Type three = _mm256_set1_epi8(3);
  const __m128i shift = _mm_cvtsi32_si128(2 * slab);
  const uint8_t* w = chunk.packed + first * kVector;
  uint8_t* c = chunk.codes + slab * kSlab + first * kVector;
  const int8_t* x = chunk.x + 4 * slab;
  // Codes of slab `slab` + r.
  auto unpacked = [&](Type v, int r) {
    if (r) v = _mm256_srli_epi16(v, 2 * r);
    return _mm256_and_si256(v, three);
  };
  auto packed = [&](int g) {
    const Type v = Load(w + g * kVector);
    return S < 4 ? _mm256_srl_epi16(v, shift) : v;
  };
#pragma GCC unroll 1
  for (int64_t q = 0; q < chunk.count; ++q, w += kQuad, c += 4 * kSlab, x += kInputs) {
    for (int64_t i = 0; kFirst && i < G * kVector; i += 64)
      __builtin_prefetch(w + kChunk * kQuad + i);
    if constexpr (kDirect) {
#pragma GCC unroll 8
      for (int g = 0; g < G; ++g) {
        const Type v = packed(g);
#pragma GCC unroll 4
        for (int r = 0; r < S; ++r) {
          const Type codes = unpacked(v, r);
#pragma GCC unroll 2
          for (int m = 0; m < M; ++m) AddPairs(few[m][g], codes, x + m * width + 4 * r);
        }
      }
    } else {
#pragma GCC unroll 4
      for (int r = 0; r < S; ++r) {
        Type codes[G];
#pragma GCC unroll 2
        for (int g = 0; g < G; ++g) {
          uint8_t* own = c + r * kSlab + g * kVector;
          codes[g] = kFirst ? unpacked(packed(g), r) : Load(own);
          if (kFirst) Store(own, codes[g]);
        }
#pragma GCC unroll 6
        for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
          for (int g = 0; g < G; ++g) AddPairs(few[m][g], codes[g], x + m * width + 4 * r);
      }
    }
  }
}

// Adds M rows from m0 on times a chunk to their sums.
template <int M, int S, bool kFirst>
NOINLINE void Rows(const Group& p, Chunk chunk, int64_t m0) {
  constexpr int G = kFirst && M <= kDirectRows ? kVectors / M : 2;
  chunk.x += m0 * p.width;
  for (int first = 0; first < kVectors; first += G)
    for (int part = 0; part < chunk.parts; ++part) {
      Type few[M][G], by[G];
#pragma GCC unroll 6
      for (int m = 0; m < M; ++m) {
        // What codes, trit + 1, count too much, half of it in each pair: so sums of up to 256
        // inputs fit 16 bits again, at most 128 (1.5 * 127 + 0.5 * 128).
        Type start = _mm256_setzero_si256();
        if (chunk.sums) {
          const int32_t sum = chunk.sums[(m0 + m) * p.parts + part], half = sum >> 1;
          start = _mm256_set1_epi32((-half & 0xffff) | static_cast<uint32_t>(half - sum) << 16);
        }
#pragma GCC unroll 8
        for (int g = 0; g < G; ++g) few[m][g] = start;
      }
#pragma GCC unroll 1
      for (int slab = 0; slab < chunk.slabs; slab += S)
        AddSlabs<M, G, S, kFirst>(chunk, p.width, first, part * chunk.slabs + slab, few);
#pragma GCC unroll 8
      for (int g = 0; g < G; ++g) {
        by[g] = _mm256_set1_epi16(1);
        if (!chunk.sums) continue;
        const int8_t* from = chunk.multipliers + part * chunk.next + (first + g) * 8;
        const __m128i eight = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
        const Type m = _mm256_cvtepi8_epi32(eight);
        by[g] = _mm256_blend_epi16(m, _mm256_slli_epi32(m, 16), 0xaa);
      }
#pragma GCC unroll 6
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
  const bool multiplied = p.multipliers;
  for (int64_t m = 0; m < p.rows; ++m)
    std::fill_n(p.out + m * p.stride, kLanes, multiplied ? 0 : -static_cast<uint32_t>(p.sums[m]));
  const int64_t block = multiplied ? p.block : kChunk;
  const uint8_t* w = p.packed;
  Chunk chunk{};
  chunk.codes = codes, chunk.parts = multiplied ? p.of_block : 1, chunk.slabs = 4 / chunk.parts;
  for (int64_t b = 0; b * block < p.quads; ++b)
    for (int64_t q = 0; q < p.planes; ++q, w += chunk.count * kQuad) {
      chunk.packed = w, chunk.x = p.x + b * block * kInputs;
      chunk.count = std::min(block, p.quads - b * block);
      if (multiplied) {
        const int64_t part = b * p.of_block, group = p.groups == 1 ? 0 : part;
        chunk.sums = p.part_sums + part;
        chunk.multipliers = p.multipliers + (group * p.planes + q) * kLanes;
        chunk.next = p.groups == 1 ? 0 : p.planes * kLanes;
      }
      ForTiles(p.rows, kRows, [&](int64_t t, int64_t m0, int64_t rows) {
        t ? RowsUpTo<kRows, S, false>(p, chunk, m0, rows)
          : RowsUpTo<kRows, S, true>(p, chunk, m0, rows);
      });
    }
}

}  // namespace

void Avx2Group(const Group& p) {
  const bool parts = p.multipliers != nullptr && p.of_block > 1;
  parts ? Multiply<1>(p) : Multiply<4>(p);
}

}  // namespace kernels
