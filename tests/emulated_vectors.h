// Instructions of AVX-512 in plain C++, for an x86 processor that has none of them: what the
// kernels use, under the names that it has in immintrin.h. To be included before all else.
//
// After Intel's "Intrinsics Guide". Vectors of 64 bytes are then what a compiler makes of shorter
// ones.

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace emulated {

typedef int8_t Bytes __attribute__((vector_size(64)));
typedef int32_t Integers __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(64)));
typedef float Floats __attribute__((vector_size(64)));

template <class To, class From>
To As(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

// What f(lane) gives, in each lane of a vector of T.
template <class Vector, class T, class F>
Vector Each(const F& f) {
  T lanes[sizeof(Vector) / sizeof(T)];
  for (size_t i = 0; i < sizeof(Vector) / sizeof(T); ++i) lanes[i] = f(i);
  return As<Vector>(lanes);
}

// Numbers of which the mask has a bit, zeros for others; those are not read.
template <class Vector, class T>
Vector Masked(uint64_t mask, const void* from) {
  return Each<Vector, T>([=](size_t i) {
    T one = 0;
    if (mask >> i & 1) std::memcpy(&one, static_cast<const T*>(from) + i, sizeof one);
    return one;
  });
}

template <class Vector>
Vector Loaded(const void* from) {
  Vector v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

template <class Total, class T, class Vector>
Total Sum(const Vector& v) {  // in the order of the intrinsic: halves are added
  T lanes[sizeof(Vector) / sizeof(T)];
  std::memcpy(lanes, &v, sizeof v);
  for (size_t n = sizeof(Vector) / sizeof(T) / 2; n; n /= 2)
    for (size_t i = 0; i < n; ++i) lanes[i] += lanes[i + n];
  return lanes[0];
}

// Adds unsigned bytes times signed ones, four to a lane. (vpdpbusd)
template <class Vector>
void AddDots(Vector& sums, const Vector& bytes, const Vector& x) {
  uint8_t a[sizeof(Vector)];
  int8_t b[sizeof(Vector)];
  std::memcpy(a, &bytes, sizeof a), std::memcpy(b, &x, sizeof b);
  int32_t lanes[sizeof(Vector) / 4];
  std::memcpy(lanes, &sums, sizeof sums);
  for (size_t i = 0; i < sizeof(Vector); ++i) lanes[i / 4] += a[i] * b[i];
  std::memcpy(&sums, lanes, sizeof sums);
}

template <class T>
__m512i Filled(T v) {
  return Each<__m512i, T>([=](size_t) { return v; });
}

inline __m512i Fours(int d, int c, int b, int a) {
  const int lanes[] = {a, b, c, d};
  return Each<__m512i, int32_t>([&](size_t i) { return lanes[i % 4]; });
}

// Numbers of T made wider.
template <class T, class Vector>
__m512i Widened(const Vector& v) {
  T narrow[16];
  static_assert(sizeof narrow == sizeof v);
  std::memcpy(narrow, &v, sizeof narrow);
  return Each<__m512i, int32_t>([&](size_t i) { return narrow[i]; });
}

inline void Store(void* to, const __m512i& v) { std::memcpy(to, &v, sizeof v); }

#define OPERATION(name, type, operation)                    \
  inline __m512i name(const __m512i& a, const __m512i& b) { \
    return As<__m512i>(As<type>(a) operation As<type>(b));  \
  }
OPERATION(And, Integers, &)
OPERATION(Or, Integers, |)
OPERATION(Xor, Integers, ^)
OPERATION(AddBytes, Bytes, +)
OPERATION(Add, Integers, +)
OPERATION(Subtract, Integers, -)
OPERATION(Multiply, Integers, *)
#undef OPERATION

inline __m512i ShiftedUp(const __m512i& v, int n) { return As<__m512i>(As<Integers>(v) << n); }
inline __m512i ShiftedDown(const __m512i& v, int n) { return As<__m512i>(As<Halves>(v) >> n); }
inline __m512 AddFloats(const __m512& a, const __m512& b) { return a + b; }

template <class Vector>
Vector MultiplyAdd(const Vector& a, const Vector& b, const Vector& c, int = 0, int = 0) {
  return Each<Vector, float>([&](size_t i) { return __builtin_fmaf(a[i], b[i], c[i]); });
}

inline __m512i Shuffled(const __m512i& table, const __m512i& at) {  // within each 16 bytes
  const auto from = As<Bytes>(table), index = As<Bytes>(at);
  return Each<__m512i, int8_t>(
      [&](size_t i) { return index[i] & 128 ? 0 : from[i / 16 * 16 + (index[i] & 15)]; });
}

// Of each bit that the table has for those of a, b and c.
inline __m512i Chosen(const __m512i& a, const __m512i& b, const __m512i& c, int table) {
  const auto x = As<Integers>(a), y = As<Integers>(b), z = As<Integers>(c);
  return Each<__m512i, int32_t>([&](size_t i) {
    uint32_t bits = 0;
    for (int k = 0; k < 32; ++k) {
      const int at = (x[i] >> k & 1) << 2 | (y[i] >> k & 1) << 1 | (z[i] >> k & 1);
      bits |= static_cast<uint32_t>(table >> at & 1) << k;
    }
    return static_cast<int32_t>(bits);
  });
}

}  // namespace emulated

#define EMULATED_VECTORS 1
#define __AVX512F__ 1
#define __AVX512BW__ 1
#define __AVX512VNNI__ 1

#define _mm512_set1_epi8 emulated::Filled<int8_t>
#define _mm512_set1_epi32 emulated::Filled<int32_t>
#define _mm512_set4_epi32 emulated::Fours
#define _mm512_loadu_si512 emulated::Loaded<__m512i>
#define _mm512_storeu_si512 emulated::Store
#define _mm512_maskz_loadu_ps emulated::Masked<__m512, float>
#define _mm512_maskz_loadu_epi8 emulated::Masked<__m512i, int8_t>
#define _mm512_maskz_loadu_epi16 emulated::Masked<__m512i, int16_t>
#define _mm256_maskz_loadu_epi16 emulated::Masked<__m256i, int16_t>
#define _mm512_cvtepi8_epi32 emulated::Widened<int8_t>
#define _mm512_cvtepu16_epi32 emulated::Widened<uint16_t>
#define _mm512_castsi512_ps emulated::As<__m512>
#define _mm512_slli_epi32 emulated::ShiftedUp
#define _mm512_srli_epi16 emulated::ShiftedDown
#define _mm512_and_si512 emulated::And
#define _mm512_or_si512 emulated::Or
#define _mm512_xor_si512 emulated::Xor
#define _mm512_add_epi8 emulated::AddBytes
#define _mm512_add_epi32 emulated::Add
#define _mm512_sub_epi32 emulated::Subtract
#define _mm512_mullo_epi32 emulated::Multiply
#define _mm512_add_ps emulated::AddFloats
#define _mm512_fmadd_ps emulated::MultiplyAdd<__m512>
#define __builtin_ia32_vfmaddps512_mask emulated::MultiplyAdd<__m512>
#define _mm512_shuffle_epi8 emulated::Shuffled
#define _mm512_ternarylogic_epi32 emulated::Chosen
#define _mm512_reduce_add_ps emulated::Sum<float, float>
#define _mm512_reduce_add_epi32 emulated::Sum<int32_t, int32_t>
