// Products of a group with AVX2 and dot products of bytes in vectors of 256 bits.

#include "dots.h"
#include "ternary_tile.h"

namespace kernels {
namespace {

struct AvxVnni {
  using Type = __m256i;
  static constexpr int kLanes = 8, kMostVectors = 4, kFew = 2, kFewOfGroups = 2, kSums = 8,
                       kRows = 6, kRowVectors = 2;
  static constexpr uint32_t kOffset = 127;

  static INLINE Type Fill(int32_t v) { return _mm256_set1_epi32(v); }
  static INLINE Type Load(const void* from) {
    return _mm256_loadu_si256(static_cast<const Type*>(from));
  }
  static INLINE void Store(void* to, Type v) { _mm256_storeu_si256(static_cast<Type*>(to), v); }
  template <int r>
  static INLINE Type Codes(Type v) {
    return _mm256_and_si256(r ? _mm256_srli_epi16(v, 2 * r) : v, _mm256_set1_epi8(3));
  }
  // In each lane -m, 0 and m, of the first plane 127 more.
  static INLINE Type Table(const int8_t* multipliers, int plane) {
    const Type m = Multipliers(multipliers), high = _mm256_slli_epi32(m, 16);
    const Type less = _mm256_sub_epi32(Fill(0), m);
    return plane ? _mm256_or_si256(high, _mm256_and_si256(less, Fill(255)))
                 : _mm256_add_epi32(_mm256_add_epi32(high, less), Fill(0x7f7f7f));
  }
  template <int r>
  static INLINE Type Look(Type table, Type v) {
    const Type own = _mm256_set1_epi64x(0x0404040400000000);  // bytes of a lane
    const Type four = _mm256_set_epi64x(0x0808080808080808, 0, 0x0808080808080808, 0);
    return _mm256_shuffle_epi8(table, _mm256_or_si256(Codes<r>(v), _mm256_or_si256(own, four)));
  }
  static INLINE Type Multipliers(const int8_t* from) {
    return _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
  }
  static INLINE void MultiplyAdd(Type& total, Type sums, Type by) {
    total = _mm256_add_epi32(total, _mm256_mullo_epi32(sums, by));
  }
  static INLINE Type Add(Type a, Type b) { return _mm256_add_epi8(a, b); }
  static INLINE void AddDots(Type& sums, Type codes, const int8_t* x) {
    kernels::AddDots(sums, codes, Fill(FourOf(x)));
  }
};

}  // namespace

void AvxVnniGroup(const Group& p) { Tile<AvxVnni>::Multiply(p); }

}  // namespace kernels
