// Vectors of AVX-512 for `Tile`.

#ifndef KERNELS_AVX512_H_
#define KERNELS_AVX512_H_

#include "dots.h"
#include "ternary_tile.h"

namespace kernels {

struct Avx512 {
  using Type = __m512i;
  static constexpr int kLanes = 16, kMostVectors = 4, kFew = 8, kFewOfGroups = 4, kSums = 24,
                       kRows = 6, kRowVectors = 4;
  static constexpr uint32_t kOffset = 127;

  static INLINE Type Fill(int32_t v) { return _mm512_set1_epi32(v); }
  static INLINE Type Load(const void* from) { return _mm512_loadu_si512(from); }
  static INLINE void Store(void* to, Type v) { _mm512_storeu_si512(to, v); }
  template <int r>
  static INLINE Type Shifted(Type v) {
    return r ? _mm512_srli_epi16(v, 2 * r) : v;
  }
  template <int r>
  static INLINE Type Codes(Type v) {
    return _mm512_and_si512(Shifted<r>(v), _mm512_set1_epi8(3));
  }
  // In each lane -m, 0 and m, of the first plane 127 more.
  static INLINE Type Table(const int8_t* multipliers, int plane) {
    const Type m = Multipliers(multipliers), high = _mm512_slli_epi32(m, 16);
    if (plane)
      return _mm512_or_si512(high, _mm512_and_si512(_mm512_sub_epi32(Fill(0), m), Fill(255)));
    return _mm512_add_epi32(_mm512_sub_epi32(high, m), Fill(0x7f7f7f));
  }
  template <int r>
  static INLINE Type Look(Type table, Type v) {
    const Type own = _mm512_set4_epi32(0x0c0c0c0c, 0x08080808, 0x04040404, 0);  // bytes of a lane
    const Type at = _mm512_ternarylogic_epi32(Shifted<r>(v), _mm512_set1_epi8(3), own, 0xea);
    return _mm512_shuffle_epi8(table, at);
  }
  static INLINE Type Multipliers(const int8_t* from) {
    return _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  }
  static INLINE void MultiplyAdd(Type& total, Type sums, Type by) {
    total = _mm512_add_epi32(total, _mm512_mullo_epi32(sums, by));
  }
  static INLINE Type Add(Type a, Type b) { return _mm512_add_epi8(a, b); }
  static INLINE void AddDots(Type& sums, Type codes, const int8_t* x) {
    kernels::AddDots(sums, codes, Fill(FourOf(x)));
  }
};

}  // namespace kernels

#endif  // KERNELS_AVX512_H_
