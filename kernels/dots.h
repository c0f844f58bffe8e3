// Products of bytes, of processors with VNNI.

#ifndef KERNELS_DOTS_H_
#define KERNELS_DOTS_H_

#include "memory.h"

namespace kernels {

// Adds unsigned bytes times signed ones, four to each lane. Not by the intrinsics: gcc 12 copies
// each sum to another register before and after.
template <class Vector>
INLINE void AddDots(Vector& sums, Vector bytes, Vector x) {
#if defined(EMULATED_VECTORS)
  emulated::AddDots(sums, bytes, x);
#elif defined(__AVX512VNNI__)
  __asm__("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(bytes), "v"(x));
#else  // the same instruction in another encoding
  __asm__("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sums) : "x"(bytes), "x"(x));
#endif
}

}  // namespace kernels

#endif  // KERNELS_DOTS_H_
