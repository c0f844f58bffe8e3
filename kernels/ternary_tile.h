// Products of a group on processors with a dot product of bytes, by their vectors `V`:
//
//     V::Type                a vector, with Fill, and Load and Store anywhere
//     V::Codes<r>(v)         the codes, trit + 1, of slab r
//     V::Table(m, q)         what plane q makes of the codes 0, 1 and 2, by the multipliers at m
//     V::Look<r>(t, v)       the codes of slab r by such a table; V::Add adds those of planes
//     V::AddDots(s, c, x)    s + codes times the four activations at x, in each lane
//     V::Multipliers(m)      int8 at m, as lanes; V::MultiplyAdd(t, s, m)  t + s m
//
//     V::kLanes              outputs of a vector
//     V::kOffset             what a code by tables counts too much: 127, or 0 of signed ones
//     V::kFew                up to so many rows are few; kFewOfGroups: with multipliers
//     V::kSums, kMostVectors their sums that fit the registers, and vectors that are read at a time
//     V::kRows, kRowVectors  rows and vectors of a tile of many rows
//
// Few rows are multiplied as codes are unpacked, with all sums in registers; those of inputs with
// one multiplier are multiplied by it. For more rows, a chunk of codes is unpacked to L1: with
// their multipliers first, without by the first of these rows.

#ifndef KERNELS_TERNARY_TILE_H_
#define KERNELS_TERNARY_TILE_H_

#include <algorithm>

#include "memory.h"
#include "ternary.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace kernels {

constexpr int64_t kAhead = 4096;  // packed bytes, to be prefetched
constexpr int64_t kChunk = 16;    // quads of a plane that are unpacked at a time, to 16 KiB
constexpr int64_t kSlab = kQuad;  // bytes of the codes of a quad's slab

template <class V>
class Tile {
  using Type = typename V::Type;
  static constexpr int kVectors = kLanes / V::kLanes;

  // The tables of G vectors from `first` on, of a block of P planes: [P, 4 slabs, G].
  template <int P, int G>
  struct Tables {
    Type of[P ? P : 1][4][G];

    INLINE void Set(const Group& p, int64_t block, int first) {
      for (int q = 0; q < P; ++q)
        for (int64_t part = 0; part < p.of_block; ++part) {
          const int64_t group = p.groups == 1 ? 0 : block * p.of_block + part;
          const int8_t* m = p.multipliers + (group * P + q) * kLanes + first * V::kLanes;
          for (int g = 0; g < G; ++g) {
            const Type table = V::Table(m + g * V::kLanes, q);
            for (int64_t r = part * 4 / p.of_block; r < (part + 1) * 4 / p.of_block; ++r)
              of[q][r][g] = table;
          }
        }
    }
  };

  // The codes of slab r of G vectors; v: those of each plane
  template <int P, int G, int r>
  static INLINE void Codes(const Type (&v)[2][G], const Tables<P, G>& tables, Type (&codes)[G]) {
#pragma GCC unroll 16
    for (int g = 0; g < G; ++g) {
      if constexpr (P == 0) codes[g] = V::template Codes<r>(v[0][g]);
      if constexpr (P > 0) codes[g] = V::template Look<r>(tables.of[0][r][g], v[0][g]);
      if constexpr (P > 1)
        codes[g] = V::Add(codes[g], V::template Look<r>(tables.of[1][r][g], v[1][g]));
    }
  }

  template <int P, int G>
  static INLINE void Load(const uint8_t* w, int64_t block, Type (&v)[2][G]) {
#pragma GCC unroll 2
    for (int q = 0; q < (P > 1 ? 2 : 1); ++q)
#pragma GCC unroll 16
      for (int g = 0; g < G; ++g) v[q][g] = V::Load(w + q * block * kQuad + g * V::kLanes * 4);
  }

  // M rows times G vectors, of one slab.
  template <int M, int G>
  static INLINE void Add(const Type (&codes)[G], const int8_t* x, int64_t width,
                         Type (&sums)[M][G]) {
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 16
      for (int g = 0; g < G; ++g) V::AddDots(sums[m][g], codes[g], x + m * width);
  }

  template <int M, int G>
  static INLINE void Store(const Group& p, int64_t m0, int first, const Type (&sums)[M][G]) {
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 16
      for (int g = 0; g < G; ++g)
        V::Store(p.out + (m0 + m) * p.stride + (first + g) * V::kLanes, sums[m][g]);
  }

  // Sums that start from what the codes, trit + 1, will count too much: less[m * stride].
  template <int M, int G>
  static INLINE void Start(const int32_t* less, int64_t stride, Type (&sums)[M][G]) {
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      const Type all = V::Fill(-static_cast<uint32_t>(less[m * stride]));
#pragma GCC unroll 16
      for (int g = 0; g < G; ++g) sums[m][g] = all;
    }
  }

  template <int r, int G>
  static INLINE void Trits(const Type (&v)[G], Type (&codes)[G]) {
#pragma GCC unroll 16
    for (int g = 0; g < G; ++g) codes[g] = V::template Codes<r>(v[g]);
  }

  // M rows times the vectors that there are registers for.
  template <int C, int M>
  static constexpr int VectorsOf() {
    int g = V::kMostVectors;
    while (g > 1 && std::max(C, 1) * M * g > V::kSums) g /= 2;
    return g;
  }

  // Adds M rows times G vectors of `count` quads to the sums of each of C groups of slabs.
  template <int C, int M, int G>
  static INLINE void Quads(const uint8_t* w, const int8_t* x, int64_t width, int64_t count,
                           Type (&sums)[C][M][G]) {
#pragma GCC unroll 1
    for (int64_t q = 0; q < count; ++q, w += kQuad, x += kInputs) {
      Type v[G], codes[G];
#pragma GCC unroll 16
      for (int g = 0; g < G; ++g) v[g] = V::Load(w + g * V::kLanes * 4);
#pragma GCC unroll 16
      for (int i = 0; i < G * V::kLanes * 4; i += 64) __builtin_prefetch(w + kAhead + i);
      Trits<0>(v, codes), Add(codes, x, width, sums[0]);
      Trits<1>(v, codes), Add(codes, x + 4, width, sums[C / 4]);
      Trits<2>(v, codes), Add(codes, x + 8, width, sums[C / 2]);
      Trits<3>(v, codes), Add(codes, x + 12, width, sums[C - 1]);
    }
  }

  // M rows from m0 on. C: groups of inputs in a block that have multipliers; 0 without
  template <int C, int M>
  static void Few(const Group& p, int64_t m0) {
    constexpr int G = VectorsOf<C, M>(), S = std::max(C, 1);
    for (int first = 0; first < kVectors; first += G) {
      const uint8_t* w = p.packed + first * V::kLanes * 4;
      const int8_t* x = p.x + m0 * p.width;
      Type sums[S][M][G], totals[M][G];
      if constexpr (C == 0) {
        Start(p.sums + m0, 1, sums[0]);
        Quads(w, x, p.width, p.quads, sums);
        Store(p, m0, first, sums[0]);
      } else {
        for (auto& row : totals) std::fill_n(row, G, V::Fill(0));
        for (int64_t b = 0; b * p.block < p.quads; ++b, x += p.block * kInputs)
          for (int64_t q = 0; q < p.planes; ++q, w += p.block * kQuad) {
            const int32_t* less = p.part_sums + m0 * p.parts + b * C;
            for (int c = 0; c < C; ++c) Start(less + c, p.parts, sums[c]);
            Quads(w, x, p.width, p.block, sums);
#pragma GCC unroll 4
            for (int c = 0; c < C; ++c)
#pragma GCC unroll 16
              for (int g = 0; g < G; ++g) {
                const int64_t group = p.groups == 1 ? 0 : b * C + c;
                const Type by = V::Multipliers(p.multipliers + (group * p.planes + q) * kLanes +
                                               (first + g) * V::kLanes);
#pragma GCC unroll 16
                for (int m = 0; m < M; ++m) V::MultiplyAdd(totals[m][g], sums[c][m][g], by);
              }
          }
        Store(p, m0, first, totals);
      }
    }
  }

  template <int C, int M>
  static INLINE void FewUpTo(const Group& p) {
    if (p.rows == M) return Few<C, M>(p, 0);
    if constexpr (M > 1) FewUpTo<C, M - 1>(p);
  }

  // The codes of slab r: from packed bytes w, and kept at c, or those that are there.
  template <int r, bool kUnpacks, int G>
  static INLINE void Slab(const uint8_t* w, uint8_t* c, Type (&codes)[G]) {
#pragma GCC unroll 16
    for (int g = 0; g < G; ++g) {
      uint8_t* own = c + r * kSlab + g * V::kLanes * 4;
      codes[g] = kUnpacks ? V::template Codes<r>(V::Load(w + g * V::kLanes * 4)) : V::Load(own);
      if (kUnpacks) V::Store(own, codes[g]);
    }
  }

  // Rows from m0 on times a chunk of codes, M of them and G vectors at a time. The first ones fetch
  // the next chunk meanwhile and, of codes without multipliers, unpack this one: beside products
  // that takes next to no time.
  template <int M, int G, bool kFirst, bool kUnpacks>
  static void Rows(const Group& p, uint8_t* codes, int64_t begin, int64_t count, int64_t m0) {
    const int64_t bytes = p.planes * kQuad;
    for (int first = 0; first < kVectors; first += G) {
      Type sums[M][G], some[G];
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m)
#pragma GCC unroll 16
        for (int g = 0; g < G; ++g)
          sums[m][g] = V::Load(p.out + (m0 + m) * p.stride + (first + g) * V::kLanes);
      const uint8_t* w = p.packed + begin * bytes + first * V::kLanes * 4;
      uint8_t* c = codes + first * V::kLanes * 4;
      const int8_t* x = p.x + m0 * p.width + begin * kInputs;
#pragma GCC unroll 1
      for (int64_t q = 1; q < count; ++q, w += bytes, c += 4 * kSlab, x += kInputs) {
        for (int64_t i = 0; kFirst && first == 0 && i < bytes; i += 64)
          __builtin_prefetch(w + kChunk * bytes + i);
        Slab<0, kUnpacks>(w, c, some), Add(some, x, p.width, sums);
        Slab<1, kUnpacks>(w, c, some), Add(some, x + 4, p.width, sums);
        Slab<2, kUnpacks>(w, c, some), Add(some, x + 8, p.width, sums);
        Slab<3, kUnpacks>(w, c, some), Add(some, x + 12, p.width, sums);
      }
      // The last quad row by row: products would wait while all sums are stored at once.
      if (kUnpacks) {
        Slab<0, true>(w, c, some), Slab<1, true>(w, c, some);
        Slab<2, true>(w, c, some), Slab<3, true>(w, c, some);
      }
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
        for (int r = 0; r < 4; ++r)
#pragma GCC unroll 16
          for (int g = 0; g < G; ++g)
            V::AddDots(sums[m][g], V::Load(c + r * kSlab + g * V::kLanes * 4),
                       x + m * p.width + 4 * r);
#pragma GCC unroll 16
        for (int g = 0; g < G; ++g)
          V::Store(p.out + (m0 + m) * p.stride + (first + g) * V::kLanes, sums[m][g]);
      }
    }
  }

  template <int M, bool kFirst, bool kUnpacks>
  static INLINE void RowsUpTo(const Group& p, uint8_t* codes, int64_t begin, int64_t count,
                              int64_t m0, int64_t rows) {
    if (rows == M) return Rows<M, V::kRowVectors, kFirst, kUnpacks>(p, codes, begin, count, m0);
    if constexpr (2 * M > V::kRows)
      RowsUpTo<M - 1, kFirst, kUnpacks>(p, codes, begin, count, m0, rows);
  }

 public:
  // The codes of `count` quads from `begin` on: [count, 4 slabs, 64, 4]. P: planes; 0 without
  // multipliers. They count V::kOffset too much, or 1 without.
  template <int P>
  static void Unpack(const Group& p, int64_t begin, int64_t count, uint8_t* to) {
    constexpr int G = 4;
    for (int first = 0; first < kVectors; first += G) {
      Type v[2][G], codes[G];
      Tables<P, G> tables;
      if (P && p.groups == 1) tables.Set(p, 0, first);
      uint8_t* c = to + first * V::kLanes * 4;
      auto store = [&](int r) {
#pragma GCC unroll 16
        for (int g = 0; g < G; ++g) V::Store(c + r * kSlab + g * V::kLanes * 4, codes[g]);
      };
      const int64_t block = P ? p.block : p.quads;
      for (int64_t q = begin; q < begin + count; ++q, c += 4 * kSlab) {
        const int64_t b = q / block;
        if (P && p.groups > 1 && (q == begin || q % block == 0)) tables.Set(p, b, first);
        const uint8_t* w = p.packed + (q + (P > 1 ? b * block : 0)) * kQuad;
        Load<P>(w + first * V::kLanes * 4, block, v);
        Codes<P, G, 0>(v, tables, codes), store(0);
        Codes<P, G, 1>(v, tables, codes), store(1);
        Codes<P, G, 2>(v, tables, codes), store(2);
        Codes<P, G, 3>(v, tables, codes), store(3);
      }
    }
  }

  template <bool kMultiplied>
  static void Many(const Group& p) {
    alignas(64) uint8_t codes[kChunk * 4 * kSlab];
    constexpr uint32_t offset = kMultiplied ? V::kOffset : 1;
    for (int64_t m = 0; m < p.rows; ++m)
      std::fill_n(p.out + m * p.stride, kLanes, -offset * static_cast<uint32_t>(p.sums[m]));
    for (int64_t begin = 0; begin < p.quads; begin += kChunk) {
      const int64_t count = std::min(kChunk, p.quads - begin);
      if constexpr (kMultiplied)
        p.planes == 1 ? Unpack<1>(p, begin, count, codes) : Unpack<2>(p, begin, count, codes);
      ForTiles(p.rows, V::kRows, [&](int64_t t, int64_t m0, int64_t rows) {
        t ? RowsUpTo<V::kRows, false, false>(p, codes, begin, count, m0, rows)
          : RowsUpTo<V::kRows, true, !kMultiplied>(p, codes, begin, count, m0, rows);
      });
    }
  }

  static void Multiply(const Group& p) {
    const int64_t parts = p.multipliers ? p.of_block : 0;
    if (p.rows > (parts ? V::kFewOfGroups : V::kFew)) return parts ? Many<true>(p) : Many<false>(p);
    parts == 0   ? FewUpTo<0, V::kFew>(p)
    : parts == 1 ? FewUpTo<1, V::kFewOfGroups>(p)
    : parts == 2 ? FewUpTo<2, V::kFewOfGroups>(p)
                 : FewUpTo<4, V::kFewOfGroups>(p);
  }
};

}  // namespace kernels

#endif  // KERNELS_TERNARY_TILE_H_
