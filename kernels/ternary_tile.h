// Products of a group on processors with a dot product of bytes, by their vectors `V`:
//
//     V::kLanes        outputs of a vector
//     V::kOffset       what a code with multipliers counts too much: 127, or 0 of signed ones
//     V::Type          a vector; Zero, Load and Store, at multiples of its size
//     V::Codes<r>(v)   the codes, trit + 1, of slab r
//     V::Table(m, p)   what plane p makes of the codes 0, 1 and 2, from the multipliers at m
//     V::Look<r>(t, v) the codes of slab r by such a table
//     V::Add(a, b)     bytes
//     V::AddDots(s, c, x)  s + codes times the four activations at x, in each lane
//
// Few rows are multiplied as codes are unpacked, with all sums in registers. For more, a chunk of
// codes is unpacked to L1 first.

#ifndef KERNELS_TERNARY_TILE_H_
#define KERNELS_TERNARY_TILE_H_

#include <algorithm>

#include "common.h"
#include "ternary.h"

namespace kernels {

constexpr int64_t kAhead = 4096;   // packed bytes, to be prefetched
constexpr int64_t kChunk = 16;     // quads of a plane that are unpacked at a time, to 16 KiB
constexpr int64_t kSlab = kQuad;   // bytes of the codes of a quad's slab

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
      for (int g = 0; g < G; ++g)
        v[q][g] = V::Load(w + q * block * kQuad + g * V::kLanes * 4);
  }

  // M rows times G vectors, of one slab.
  template <int M, int G>
  static INLINE void Add(const Type (&codes)[G], const int8_t* x, int64_t width, Type (&sums)[M][G]) {
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

  // Sums from which those of M rows start.
  template <int P, int M, int G>
  static INLINE void Start(const Group& p, int64_t m0, Type (&sums)[M][G]) {
    constexpr uint32_t offset = P ? V::kOffset : 1;
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      const Type less = V::Fill(-offset * static_cast<uint32_t>(p.sums[m0 + m]));
#pragma GCC unroll 16
      for (int g = 0; g < G; ++g) sums[m][g] = less;
    }
  }

  // M rows from m0 on, times all outputs, G vectors at a time.
  template <int P, int M, int G>
  static void Few(const Group& p, int64_t m0) {
    for (int first = 0; first < kVectors; first += G) {
      Type sums[M][G], v[2][G], codes[G];
      Start<P>(p, m0, sums);
      Tables<P, G> tables;
      const uint8_t* w = p.packed + first * V::kLanes * 4;
      const int8_t* x = p.x + m0 * p.width;
      if (P && p.groups == 1) tables.Set(p, 0, first);
      const int64_t block = P ? p.block : p.quads;
      for (int64_t b = 0; b * block < p.quads; ++b) {
        if (P && p.groups > 1) tables.Set(p, b, first);
#pragma GCC unroll 1
        for (int64_t q = 0; q < block; ++q, w += kQuad, x += kInputs) {
          Load<P>(w, block, v);
#pragma GCC unroll 16
          for (int i = 0; i < G * V::kLanes * 4; i += 64) __builtin_prefetch(w + kAhead + i);
          Codes<P, G, 0>(v, tables, codes), Add(codes, x, p.width, sums);
          Codes<P, G, 1>(v, tables, codes), Add(codes, x + 4, p.width, sums);
          Codes<P, G, 2>(v, tables, codes), Add(codes, x + 8, p.width, sums);
          Codes<P, G, 3>(v, tables, codes), Add(codes, x + 12, p.width, sums);
        }
        if (P > 1) w += block * kQuad;
      }
      Store(p, m0, first, sums);
    }
  }

  template <int P, int M, int G>
  static INLINE void FewUpTo(const Group& p) {
    if (p.rows == M) return Few<P, M, G>(p, 0);
    if constexpr (M > 1) FewUpTo<P, M - 1, G>(p);
  }

  // Rows from m0 on times a chunk of codes, M of them and G vectors at a time.
  template <int M, int G>
  static INLINE void Rows(const Group& p, const uint8_t* codes, int64_t begin, int64_t count,
                          int64_t m0) {
    for (int first = 0; first < kVectors; first += G) {
      Type sums[M][G];
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m)
#pragma GCC unroll 16
        for (int g = 0; g < G; ++g)
          sums[m][g] = V::Load(p.out + (m0 + m) * p.stride + (first + g) * V::kLanes);
      const uint8_t* c = codes + first * V::kLanes * 4;
      const int8_t* x = p.x + m0 * p.width + begin * kInputs;
#pragma GCC unroll 1
      for (int64_t t = 0; t < 4 * count; ++t, c += kSlab, x += 4) {
        Type some[G];
#pragma GCC unroll 16
        for (int g = 0; g < G; ++g) some[g] = V::Load(c + g * V::kLanes * 4);
        Add(some, x, p.width, sums);
      }
      Store(p, m0, first, sums);
    }
  }

 public:
  // The codes of `count` quads from `begin` on: [count, 4 slabs, 64, 4]. P: planes; 0 without
  // multipliers. They count V::kOffset too much, or 1 without.
  template <int P>
  static void Unpack(const Group& p, int64_t begin, int64_t count, uint8_t* to) {
    constexpr int G = V::kLanes < 16 ? 4 : kVectors;
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

  template <int P>
  static void Multiply(const Group& p) {
    constexpr int few = V::kFew;  // rows
    if (p.rows <= few) return FewUpTo<P, few, V::kFewVectors>(p);
    alignas(64) uint8_t codes[kChunk * 4 * kSlab];
    constexpr uint32_t offset = P ? V::kOffset : 1;
    for (int64_t m = 0; m < p.rows; ++m)
      std::fill_n(p.out + m * p.stride, kLanes, -offset * static_cast<uint32_t>(p.sums[m]));
    for (int64_t begin = 0; begin < p.quads; begin += kChunk) {
      const int64_t count = std::min(kChunk, p.quads - begin);
      Unpack<P>(p, begin, count, codes);
      int64_t m = 0;
      for (; m + V::kRows <= p.rows; m += V::kRows)
        Rows<V::kRows, V::kRowVectors>(p, codes, begin, count, m);
      for (; m + 4 <= p.rows; m += 4) Rows<4, V::kFourVectors>(p, codes, begin, count, m);
      for (; m < p.rows; ++m) Rows<1, V::kFewVectors>(p, codes, begin, count, m);
    }
  }

  static void Multiply(const Group& p) {
    p.multipliers == nullptr ? Multiply<0>(p) : p.planes == 1 ? Multiply<1>(p) : Multiply<2>(p);
  }
};

}  // namespace kernels

#endif  // KERNELS_TERNARY_TILE_H_
