// Rotary embedding, which attention's own kernel needs, too.

#ifndef KERNELS_ROTATE_H_
#define KERNELS_ROTATE_H_

#include "common.h"

namespace kernels {

// x [tokens, heads, H], float32 or bfloat16, rotated by positions [tokens] times frequencies
// [H / 2], to out.
void RotateTokens(const Frame& frame, Dtype dtype, const void* x, const int32_t* positions,
                  const float* frequencies, int64_t tokens, int64_t heads, int64_t half, void* out);

}  // namespace kernels

#endif  // KERNELS_ROTATE_H_
