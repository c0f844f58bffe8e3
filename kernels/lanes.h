// Vectors of floats on any processor, and functions of them that depend on nothing but a lane.

#ifndef KERNELS_LANES_H_
#define KERNELS_LANES_H_

#include "memory.h"  // and not immintrin.h, which takes gcc longer than most of these files

namespace kernels {

// Floats in Lanes; and of Lanes, as many as half of the registers hold.
#if defined(__AVX512F__)
constexpr int64_t kWidth = 16;
#else
constexpr int64_t kWidth = 8;
#endif
typedef float Lanes __attribute__((vector_size(4 * kWidth)));
typedef int32_t IntLanes __attribute__((vector_size(4 * kWidth)));
typedef uint32_t BitLanes __attribute__((vector_size(4 * kWidth)));
typedef uint16_t HalfLanes __attribute__((vector_size(2 * kWidth)));

INLINE IntLanes Indices() {  // 0, 1, 2, ...
  IntLanes v;
#pragma GCC unroll 16
  for (int i = 0; i < kWidth; ++i) v[i] = i;
  return v;
}

INLINE Lanes Filled(float v) { return v - Lanes{}; }  // not added to 0, which changes -0

template <class Integer>
INLINE IntLanes LoadIntegers(const Integer* p) {
  typedef Integer Narrow __attribute__((vector_size(kWidth * sizeof(Integer))));
  Narrow v;
  std::memcpy(&v, p, sizeof v);
  return __builtin_convertvector(v, IntLanes);
}
#if defined(__AVX2__) && !defined(__AVX512F__) && !defined(__clang__)
INLINE IntLanes LoadIntegers(const int8_t* p) {  // of eight bytes gcc takes one by one
  typedef char Bytes __attribute__((vector_size(16)));
  typedef int64_t Two __attribute__((vector_size(16)));
  Two eight = {};
  std::memcpy(&eight, p, 8);
  return __builtin_ia32_pmovsxbd256(reinterpret_cast<Bytes>(eight));
}
#endif

INLINE Lanes LoadLanes(const float* p) {
  Lanes v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
INLINE Lanes LoadLanes(const uint16_t* p) {  // bfloat16
  HalfLanes half;
  std::memcpy(&half, p, sizeof half);
  const IntLanes bits = __builtin_convertvector(half, IntLanes) << 16;
  Lanes v;
  std::memcpy(&v, &bits, sizeof v);
  return v;
}

// a b + c, rounded once where the processor can. On x86 not left to a compiler: gcc rounds twice in
// some loops for AMD's, and results would depend on the loop.
INLINE Lanes MultiplyAdd(Lanes a, Lanes b, Lanes c) {
#if defined(__FMA__) && __has_builtin(__builtin_elementwise_fma)  // of clang 16
  return __builtin_elementwise_fma(a, b, c);
#elif defined(__AVX512F__)
  return __builtin_ia32_vfmaddps512_mask(a, b, c, -1, 4);  // as it is rounded everywhere
#elif defined(__FMA__)
  return __builtin_ia32_vfmaddps256(a, b, c);
#else
  return a * b + c;
#endif
}

// Floats of which the upper half, a bfloat16, is what `FromFloat` makes of them.
INLINE BitLanes HalvesAbove(Lanes v) {
  BitLanes bits;
  std::memcpy(&bits, &v, sizeof bits);
  return bits + 0x7fff + (bits >> 16 & 1);
}

INLINE void StoreLanes(Lanes v, float* p) { std::memcpy(p, &v, sizeof v); }
INLINE void StoreLanes(Lanes v, uint16_t* p) {
  const auto half = __builtin_convertvector(HalvesAbove(v) >> 16, HalfLanes);
  std::memcpy(p, &half, sizeof half);
}

// To nearest, halves to even, of numbers up to 2^22.
INLINE IntLanes Rounded(Lanes v) {
  constexpr float large = 3 << 22;  // added, what is too large for a fraction beside it rounds
  return __builtin_convertvector(v + large - large, IntLanes);
}

template <class Vector>
INLINE auto Total(Vector v) {
  auto total = v[0];
  for (int k = 1; k < kWidth; ++k) total += v[k];
  return total;
}

// exp of numbers from -87 to 87, by 2^n and a polynomial in what is left, to about one unit in the
// last place.
INLINE Lanes Exp(Lanes x) {
  const Lanes shifted = x * 1.44269504f + 12582912.f;  // rounds: no fraction fits beside 1.5 * 2^23
  const Lanes n = shifted - 12582912.f;
  const Lanes r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Lanes p = r * 1.98412698e-4f + 1.38888889e-3f;
  p = p * r + 8.33333333e-3f;
  p = p * r + 4.16666667e-2f;
  p = p * r + 1.66666667e-1f;
  p = p * r + 0.5f;
  p = p * r * r + r + 1.f;
  BitLanes bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits = (bits << 23) + 0x3f800000;  // n, which ends it, as an exponent
  Lanes power;
  std::memcpy(&power, &bits, sizeof power);
  return p * power;
}

INLINE Lanes Tanh(Lanes x) {
  const Lanes magnitude = x < 0 ? -x : x, square = x * x;
  const Lanes few = magnitude > 40.f ? Filled(40.f) : magnitude;
  const Lanes e = Exp(-2.f * few);
  const Lanes large = (1.f - e) / (1.f + e);
  // Near zero, where 1 - e loses digits: the first terms of its series.
  Lanes p = 2.1869489e-2f - square * 8.8632356e-3f;
  p = p * square - 5.3968254e-2f;
  p = p * square + 1.3333333e-1f;
  p = p * square - 3.3333333e-1f;
  const Lanes small = x + x * square * p;
  return magnitude < 0.25f ? small : (x < 0 ? -large : large);
}

}  // namespace kernels

#endif  // KERNELS_LANES_H_
