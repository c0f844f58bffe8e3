// Products of a group with NEON's dot products of bytes.

#include <arm_neon.h>

#include "ternary_tile.h"

namespace kernels {
namespace {

struct Neon {
  using Type = int8x16_t;
  static constexpr int kLanes = 4, kMostVectors = 8, kFew = 2, kFewOfGroups = 2, kSums = 16,
                       kRows = 6, kRowVectors = 4;
  static constexpr uint32_t kOffset = 0;

  static INLINE Type Fill(int32_t v) { return vreinterpretq_s8_s32(vdupq_n_s32(v)); }
  static INLINE Type Load(const void* from) { return vld1q_s8(static_cast<const int8_t*>(from)); }
  static INLINE void Store(void* to, Type v) { vst1q_s8(static_cast<int8_t*>(to), v); }
  template <int r>
  static INLINE Type Codes(Type v) {
    const uint8x16_t bytes = vreinterpretq_u8_s8(v);
    uint8x16_t shifted = bytes;
    if constexpr (r > 0) shifted = vshrq_n_u8(bytes, 2 * r);
    return vreinterpretq_s8_u8(vandq_u8(shifted, vdupq_n_u8(3)));
  }
  // In each lane -m, 0 and m.
  static INLINE Type Table(const int8_t* multipliers, int plane) {
    int32_t lanes[4];
    for (int i = 0; i < 4; ++i) lanes[i] = multipliers[i] << 16 | (-multipliers[i] & 255);
    return vreinterpretq_s8_s32(vld1q_s32(lanes));
  }
  template <int r>
  static INLINE Type Look(Type table, Type v) {
    const uint32x4_t own = {0, 0x04040404, 0x08080808, 0x0c0c0c0c};  // bytes of a lane
    const uint8x16_t codes = vreinterpretq_u8_s8(Codes<r>(v));
    return vqtbl1q_s8(table, vorrq_u8(codes, vreinterpretq_u8_u32(own)));
  }
  static INLINE Type Multipliers(const int8_t* from) {
    const int32_t lanes[4] = {from[0], from[1], from[2], from[3]};
    return vreinterpretq_s8_s32(vld1q_s32(lanes));
  }
  static INLINE void MultiplyAdd(Type& total, Type sums, Type by) {
    const int32x4_t s = vreinterpretq_s32_s8(sums), m = vreinterpretq_s32_s8(by);
    total = vreinterpretq_s8_s32(vmlaq_s32(vreinterpretq_s32_s8(total), s, m));
  }
  static INLINE Type Add(Type a, Type b) { return vaddq_s8(a, b); }
  static INLINE void AddDots(Type& sums, Type codes, const int8_t* x) {
    const int32x4_t all = vdotq_s32(vreinterpretq_s32_s8(sums), codes, Fill(FourOf(x)));
    sums = vreinterpretq_s8_s32(all);
  }
};

}  // namespace

void NeonGroup(const Group& p) { Tile<Neon>::Multiply(p); }

}  // namespace kernels
