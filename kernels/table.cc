// The embedding table as the output head, and the norm, whose sum of squares is such a product.

#include <cmath>
#include <vector>

#include "common.h"
#include "dots.h"
#include "lanes.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace kernels {
namespace {

constexpr int64_t kStep = 64;  // numbers of a row that are multiplied at a time
constexpr int64_t kSome = 64;  // rows of the table and, of x, rows that stay in a cache meanwhile
constexpr int64_t kAhead = 1024;      // numbers, to be prefetched
constexpr float kLevels = 127 * 128;  // of the integers that rows of x are rounded to

// A row of x as a kind of product takes it, and where its products with the table go.
struct Product {
  const void* x;  // null: zeros, as of slots without a request, are not multiplied
  float* out;
  float step;       // of integers
  int32_t less[2];  // what each half of them gives too much, with bytes from 0 on
};

// A kind of product has `Set`, which makes a row x [size] its own, in memory of so many `Bytes` for
// each number, and vectors:
//
//     kParts, kSums          vectors that 64 numbers have, and of sums that a product has
//     Table(t, k, mask)      part k of the 64 numbers at t, of which there are those of the mask
//     Row(x, size, k, mask)  what it is multiplied by of those at x, of a row of so many
//     Add(sum, t, x)         adds their products; Total(sums, row): the whole
//     kTables                rows of the table that are multiplied at once, where x has many
//
// The order of sums depends on the kind and the size only. Processors differ in whether a product
// of floats is rounded before it is added, and in which have `Pairs`; integers are the same on all.

// As many of `size` bytes at p as the mask has bits, and zeros.
NOINLINE void Copy(const void* p, uint64_t mask, size_t width, size_t size, void* to) {
  std::memset(to, 0, size);
  std::memcpy(to, p, std::min(size, width * __builtin_popcountll(mask)));
}

// The N numbers at p, or a copy where the mask has not all of them.
template <int64_t N, class T>
INLINE const T* There(const T* p, uint64_t mask, T (&some)[N]) {
  constexpr uint64_t all = (1ull << N) - 1;
  if ((mask & all) == all) return p;
  Copy(p, mask, sizeof(T), sizeof some, some);
  return some;
}

// float32 x and a table of float32 or bfloat16.
template <class T>
struct Floats {
  using Number = T;
  static constexpr int64_t Bytes(const float*) { return 0; }
  static constexpr int64_t Bytes(const uint16_t*) { return sizeof(float); }
  static void Set(const float* x, int64_t, float, char*, Product& row) { row.x = x; }
  static void Set(const uint16_t* x, int64_t size, float, char* memory, Product& row) {
    auto* wide = reinterpret_cast<float*>(memory);
    for (int64_t i = 0; i < size; ++i) wide[i] = ToFloat(x[i]);
    row.x = wide;
  }
  using Own = float;
#if defined(__AVX512BW__)
  using Vector = __m512;
  static constexpr int kParts = 4, kSums = 4, kTables = 2;
  static INLINE Vector Load(const float* p, __mmask16 mask) {
    return _mm512_maskz_loadu_ps(mask, p);
  }
  static INLINE Vector Load(const uint16_t* p, __mmask16 mask) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
  }
  static INLINE Vector Table(const T* t, int k, uint64_t mask) {
    return Load(t + 16 * k, mask >> 16 * k);
  }
  static INLINE Vector Row(const float* x, int64_t, int k, uint64_t mask) {
    return Load(x + 16 * k, mask >> 16 * k);
  }
  static INLINE void Add(Vector& sum, Vector t, Vector x) { sum = _mm512_fmadd_ps(t, x, sum); }
  static INLINE float Total(const Vector (&s)[kSums], const Product&) {
    const Vector a = _mm512_add_ps(s[0], s[2]), b = _mm512_add_ps(s[1], s[3]);
    return _mm512_reduce_add_ps(_mm512_add_ps(a, b));
  }
#else
  using Vector = Lanes;
  static constexpr int kParts = kStep / kWidth, kSums = 4, kTables = 1;
  template <class Some>
  static INLINE Vector Part(const Some* p, int k, uint64_t mask) {
    Some some[kWidth];
    return LoadLanes(There(p + k * kWidth, mask >> k * kWidth, some));
  }
  static INLINE Vector Table(const T* t, int k, uint64_t mask) { return Part(t, k, mask); }
  static INLINE Vector Row(const float* x, int64_t, int k, uint64_t mask) {
    return Part(x, k, mask);
  }
  static INLINE void Add(Vector& sum, Vector t, Vector x) { sum = MultiplyAdd(t, x, sum); }
  static INLINE float Total(const Vector (&s)[kSums], const Product&) {
    return kernels::Total((s[0] + s[2]) + (s[1] + s[3]));
  }
#endif
};

// bfloat16 x and table, on processors that multiply it: each of 32 lanes sums pairs of products.
#if defined(__AVX512BF16__)
struct Pairs {
  using Number = uint16_t;
  static constexpr int64_t Bytes(const uint16_t*) { return 0; }
  static void Set(const uint16_t* x, int64_t, float, char*, Product& row) { row.x = x; }
  using Own = uint16_t;
  using Vector = __m512;
  static constexpr int kParts = 2, kSums = 2, kTables = 4;
  static INLINE __m512i Table(const uint16_t* t, int k, uint64_t mask) {
    return _mm512_maskz_loadu_epi16(mask >> 32 * k, t + 32 * k);
  }
  static INLINE __m512i Row(const uint16_t* x, int64_t, int k, uint64_t mask) {
    return Table(x, k, mask);
  }
  // Not the intrinsic, as in dots.h.
  static INLINE void Add(Vector& sum, __m512i t, __m512i x) {
    __asm__("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(t), "v"(x));
  }
  static INLINE float Total(const Vector (&s)[kSums], const Product&) {
    return _mm512_reduce_add_ps(_mm512_add_ps(s[0], s[1]));
  }
};
#else
using Pairs = Floats<uint16_t>;
#endif

// A table of int8, and x rounded to integers of 15 bits, a high and a low half as
// quantize.high_and_low has them: exact sums of them.
struct Integers {
  using Number = int8_t;
  static constexpr int64_t Bytes(const void*) { return 2; }
  template <class T>
  static void Set(const T* x, int64_t size, float largest, char* memory, Product& row) {
    row.x = memory;
    row.step = std::max(largest, 1e-30f) * (1 / kLevels);
    std::memset(memory, 0, 2 * RoundUp(size, kStep));
    SetIntegers(x, size, row.step, reinterpret_cast<Own*>(memory), row);
  }
  static INLINE float Whole(int64_t sum, const Product& row) { return sum * row.step; }
#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
  using Own = int8_t;
  using Vector = __m512i;
  static constexpr int kParts = 2, kSums = 2, kTables = 4;
  template <class T>
  static void SetIntegers(const T* x, int64_t size, float step, int8_t* half, Product& row) {
    const int64_t width = RoundUp(size, kStep);
    for (int64_t i = 0; i < size; ++i) {
      const int32_t integer = Rounded(ToFloat(x[i]) / step), high = (integer + 64) >> 7;
      half[i] = static_cast<int8_t>(high);
      half[width + i] = static_cast<int8_t>(integer - 128 * high);
    }
    for (int k = 0; k < 2; ++k) {
      int32_t sum = 0;
      for (int64_t i = 0; i < size; ++i) sum += half[k * width + i];
      row.less[k] = 128 * sum;
    }
  }
  static INLINE Vector Table(const int8_t* t, int, uint64_t mask) {  // 128 more
    return _mm512_xor_si512(_mm512_maskz_loadu_epi8(mask, t), _mm512_set1_epi8(-128));
  }
  static INLINE Vector Row(const int8_t* x, int64_t size, int k, uint64_t) {
    return _mm512_loadu_si512(x + k * RoundUp(size, kStep));
  }
  static INLINE void Add(Vector& sum, Vector t, Vector x) { AddDots(sum, t, x); }
  static INLINE float Total(const Vector (&s)[kSums], const Product& row) {
    const int64_t high = _mm512_reduce_add_epi32(s[0]) - row.less[0];
    return Whole(128 * high + _mm512_reduce_add_epi32(s[1]) - row.less[1], row);
  }
#else
  using Own = int16_t;
  template <class T>
  static void SetIntegers(const T* x, int64_t size, float step, int16_t* integers, Product&) {
    RoundRow(x, size, step, integers);
  }
  typedef int32_t Vector __attribute__((vector_size(32)));
  static constexpr int kSums = 2, kTables = 1;
  static INLINE float Total(const Vector (&s)[kSums], const Product& row) {
    int64_t sum = 0;
    for (int i = 0; i < 8; ++i) sum += static_cast<int64_t>(s[0][i]) + s[1][i];
    return Whole(sum, row);
  }
#if defined(__AVX2__)
  static constexpr int kParts = 4;
  static INLINE __m256i Table(const int8_t* t, int k, uint64_t mask) {
    int8_t some[16];
    const auto* there = There(t + 16 * k, mask >> 16 * k, some);
    return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(there)));
  }
  static INLINE __m256i Row(const int16_t* x, int64_t, int k, uint64_t) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + 16 * k));
  }
  static INLINE void Add(Vector& sum, __m256i t, __m256i x) {
    sum += reinterpret_cast<Vector>(_mm256_madd_epi16(t, x));
  }
#else
  static constexpr int kParts = kStep / kWidth;
  static INLINE Vector Table(const int8_t* t, int k, uint64_t mask) {
    int8_t some[kWidth];
    return LoadIntegers(There(t + k * kWidth, mask >> k * kWidth, some));
  }
  static INLINE Vector Row(const int16_t* x, int64_t, int k, uint64_t) {
    return LoadIntegers(x + k * kWidth);
  }
  static INLINE void Add(Vector& sum, Vector t, Vector x) { sum += t * x; }
#endif
#endif
};

// --- Products ------------------------------------------------------------------------------------

// Adds the products of 64 numbers.
template <class Kind, int M, int N, class Own, class Vector>
INLINE void AddStep(const typename Kind::Number* table, const Own* const (&x)[M], int64_t i,
                    int64_t size, uint64_t mask, Vector (&sums)[M][N][Kind::kSums]) {
#pragma GCC unroll 8
  for (int k = 0; k < Kind::kParts; ++k) {
    decltype(Kind::Table(table, k, mask)) t[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) t[n] = Kind::Table(table + n * size + i, k, mask);
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) {
      const auto some = Kind::Row(x[m] + i, size, k, mask);
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) Kind::Add(sums[m][n][k % Kind::kSums], t[n], some);
    }
  }
}

// M rows of x times N rows of the table, from row v on.
template <class Kind, int M, int N>
void Tile(const typename Kind::Number* table, const Product* rows, int64_t size, int64_t v) {
  using Own = typename Kind::Own;
  const Own* x[M];
#pragma GCC unroll 4
  for (int m = 0; m < M; ++m) x[m] = static_cast<const Own*>(rows[m].x);
  typename Kind::Vector sums[M][N][Kind::kSums];
#pragma GCC unroll 4
  for (auto& row : sums)
#pragma GCC unroll 4
    for (auto& product : row)
#pragma GCC unroll 4
      for (auto& sum : product) sum = typename Kind::Vector{};
  int64_t i = 0;
#pragma GCC unroll 1
  for (; i + kStep <= size; i += kStep) {
    if constexpr (N == 1) {
      const auto* ahead = reinterpret_cast<const char*>(table + i + kAhead);
      for (size_t line = 0; line < kStep * sizeof(*table); line += 64)
        __builtin_prefetch(ahead + line);
    }
    AddStep<Kind, M, N>(table, x, i, size, ~0ull, sums);
  }
  if (i < size) AddStep<Kind, M, N>(table, x, i, size, (1ull << (size - i)) - 1, sums);
#pragma GCC unroll 4
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) rows[m].out[v + n] = Kind::Total(sums[m][n], rows[m]);
}

// As many rows of the table, N at once, which load each number of x once for all.
template <class Kind, int M, int N>
void Tiles(const typename Kind::Number* table, int64_t begin, int64_t end, const Product* rows,
           int64_t size) {
  int64_t v = begin;
  for (; v + N <= end; v += N) Tile<Kind, M, N>(table + v * size, rows, size, v);
  for (; v < end; ++v)
    for (int m = 0; m < M; ++m) Tile<Kind, 1, 1>(table + v * size, rows + m, size, v);
}

// Rows `begin` to `end` of the table times rows of x.
template <class Kind>
void Panel(const typename Kind::Number* table, int64_t begin, int64_t end, const Product* rows,
           int64_t count, int64_t size) {
  // The first rows wait for memory, and read on and on; to the others the table is in a cache.
  constexpr int N = Kind::kTables;
  count >= 3   ? Tiles<Kind, 3, 1>(table, begin, end, rows, size)
  : count == 2 ? Tiles<Kind, 2, 1>(table, begin, end, rows, size)
               : Tiles<Kind, 1, 1>(table, begin, end, rows, size);
  for (rows += 3, count -= 3; count > 0; rows += 3, count -= 3)
    count >= 3   ? Tiles<Kind, 3, N>(table, begin, end, rows, size)
    : count == 2 ? Tiles<Kind, 2, N>(table, begin, end, rows, size)
                 : Tiles<Kind, 1, N>(table, begin, end, rows, size);
}

template <class Kind, class T>
void TableRows(const Frame& frame, const void* table, const T* x, int64_t rows, int64_t size,
               int64_t vocab, float* out) {
  static thread_local Aligned kept(0);
  const int64_t own = Kind::Bytes(x) * RoundUp(size, kStep);
  char* memory = Kept(kept, rows * own);
  std::vector<Product> products(rows);
  Parallel(frame, rows, 1. * rows * size * sizeof(T), [&](int64_t m) {
    Product& row = products[m];
    row.out = out + m * vocab;
    if (const float largest = LargestMagnitude(x + m * size, size); largest != 0)
      Kind::Set(x + m * size, size, largest, memory + m * own, row);
    else
      std::fill_n(row.out, vocab, 0.f);
  });
  products.erase(std::remove_if(products.begin(), products.end(), [](auto& p) { return !p.x; }),
                 products.end());
  const auto* numbers = static_cast<const typename Kind::Number*>(table);
  const int64_t count = products.size();
  const int64_t panels = RoundUp(vocab, kSome) / kSome, groups = RoundUp(count, kSome) / kSome;
  const double bytes = 1. * vocab * size * sizeof(*numbers) * std::max<int64_t>(1, count / 8);
  Parallel(frame, panels * groups, bytes, [&](int64_t i) {
    const int64_t v = i % panels * kSome, m = i / panels * kSome;
    Panel<Kind>(numbers, v, std::min(v + kSome, vocab), &products[m], std::min(kSome, count - m),
                size);
  });
}

// x float32 or bfloat16 [R, D] times table float32, bfloat16 or int8 [V, D] -> float32 [R, V]
void TableDot(const Frame& frame) {
  const auto [x, table, out] = frame.Arrays<2, 1>();
  Sizes sizes;
  CheckFloats("x", x);
  sizes.Match("x [R, D]", x);
  sizes.Match("table [V, D]", table);
  auto* to = sizes.Match<float>("logits [R, V]", out);
  const bool half = x.dtype == BF16;
  auto rows_of = [&](auto of_floats, auto of_halves) {
    const int64_t rows = sizes["R"], size = sizes["D"], vocab = sizes["V"];
    half ? of_halves(frame, table.data, static_cast<const uint16_t*>(x.data), rows, size, vocab, to)
         : of_floats(frame, table.data, static_cast<const float*>(x.data), rows, size, vocab, to);
  };
  const Dtype dtype = table.dtype;
  if (dtype == BF16) {
    rows_of(TableRows<Floats<uint16_t>, float>, TableRows<Pairs, uint16_t>);
  } else if (dtype == F32) {
    rows_of(TableRows<Floats<float>, float>, TableRows<Floats<float>, uint16_t>);
  } else if (dtype == S8) {
    Check(sizes["D"] <= 1 << 14, "rows of ", sizes["D"],
          " integers, more than 16384, whose sums might exceed int32");
    rows_of(TableRows<Integers, float>, TableRows<Integers, uint16_t>);
  } else {
    Check(false, "table is ", dtype, ", neither F32, BF16 nor S8");
  }
}

// --- Norm ----------------------------------------------------------------------------------------

// The norm of rows, added to others where there are any.
template <class T>
void NormRows(const Frame& frame, const void* added_to, const void* from, const float* scale,
              int64_t rows, int64_t size, float eps, void* to) {
  const T *h = static_cast<const T*>(added_to), *x = static_cast<const T*>(from);
  T* out = static_cast<T*>(to);
  Parallel(frame, rows, 1. * rows * size * sizeof(float), [=](int64_t m) {
    static thread_local Aligned kept(0);
    float* row = reinterpret_cast<float*>(Kept(kept, size * sizeof(float)));
    for (int64_t i = 0; i < size; ++i) row[i] = ToFloat(x[m * size + i]);
    float sum;
    const Product square = {row, &sum};
    Panel<Floats<float>>(row, 0, 1, &square, 1, size);
    const float inverse = 1 / std::sqrt(sum / size + eps);
    T* y = out + m * size;
    for (int64_t i = 0; i < size; ++i) FromFloat(scale[i] * row[i] * inverse, y + i);
    for (int64_t i = 0; h && i < size; ++i)
      FromFloat(ToFloat(h[m * size + i]) + ToFloat(y[i]), y + i);
  });
}

void Norm(const Frame& frame, const Array* h, const Array& x, const Array& scale,
          const Array& out) {
  Sizes sizes;
  CheckFloats("x", x);
  sizes.Match("x [R, D]", x);
  if (h) sizes.Match("h [R, D]", *h, x.dtype);
  const auto* factors = sizes.Match<float>("scale [D]", scale);
  sizes.Match("y [R, D]", out, x.dtype);
  auto norm = x.dtype == BF16 ? NormRows<uint16_t> : NormRows<float>;
  norm(frame, h ? h->data : nullptr, x.data, factors, sizes["R"], sizes["D"], frame.Float("eps"),
       out.data);
}

// x [R, D], float32 or bfloat16, and scale float32 [D] -> as x: scale x / sqrt(mean square + eps).
void RmsNorm(const Frame& frame) {
  const auto [x, scale, out] = frame.Arrays<2, 1>();
  Norm(frame, nullptr, x, scale, out);
}

// h and x [R, D], both float32 or bfloat16, and scale float32 [D] -> h and what RmsNorm makes of x.
void AddedNorm(const Frame& frame) {
  const auto [h, x, scale, out] = frame.Arrays<3, 1>();
  Norm(frame, &h, x, scale, out);
}

// Of n rows, the gradients of x, and added up, in their order, those of scale [D].
template <class T>
void NormGradients(const T* x, const float* scale, const T* dy, int64_t n, int64_t size, float eps,
                   T* dx, float* d_scale) {
  static thread_local Aligned kept(0);
  const int64_t width = RoundUp(size, kWidth);
  float* row = reinterpret_cast<float*>(Kept(kept, 3 * width * sizeof(float)));
  float *change = row + width, *factors = change + width;
  std::memset(row, 0, 3 * width * sizeof(float));
  std::copy_n(scale, size, factors);
  std::fill_n(d_scale, size, 0.f);
  for (int64_t m = 0; m < n; ++m, x += size, dy += size, dx += size) {
    for (int64_t i = 0; i < size; ++i) row[i] = ToFloat(x[i]), change[i] = ToFloat(dy[i]);
    Lanes squares = {}, products = {};
    for (int64_t i = 0; i < width; i += kWidth) {
      const Lanes v = LoadLanes(row + i);
      squares += v * v;
      products += v * (LoadLanes(factors + i) * LoadLanes(change + i));
    }
    const float inverse = 1 / std::sqrt(Total(squares) / size + eps);
    const float less = inverse * inverse * inverse / size * Total(products);
    for (int64_t i = 0; i < size; ++i) {
      d_scale[i] += change[i] * row[i] * inverse;
      FromFloat(factors[i] * change[i] * inverse - row[i] * less, dx + i);
    }
  }
}

template <class T>
void AllNormGradients(const Frame& frame, const void* x, const float* scale, const void* dy,
                      int64_t rows, int64_t size, float eps, void* dx, float* d_scale) {
  const int64_t parts = RoundUp(rows, kSome) / kSome;
  static thread_local Aligned kept(0);
  float* sums = reinterpret_cast<float*>(Kept(kept, parts * size * sizeof(float)));
  Parallel(frame, parts, 3. * rows * size * sizeof(T), [=](int64_t i) {
    const int64_t first = i * kSome, at = first * size;
    NormGradients(static_cast<const T*>(x) + at, scale, static_cast<const T*>(dy) + at,
                  std::min(kSome, rows - first), size, eps, static_cast<T*>(dx) + at,
                  sums + i * size);
  });
  std::fill_n(d_scale, size, 0.f);
  for (int64_t i = 0; i < parts; ++i)
    for (int64_t d = 0; d < size; ++d) d_scale[d] += sums[i * size + d];
}

// What RmsNorm takes, and the gradient dy of its output -> those of x and scale.
void RmsNormGradient(const Frame& frame) {
  const auto [x, scale, dy, dx, d_scale] = frame.Arrays<3, 2>();
  Sizes sizes;
  CheckFloats("x", x);
  sizes.Match("x [R, D]", x);
  const auto* factors = sizes.Match<float>("scale [D]", scale);
  sizes.Match("dy [R, D]", dy, x.dtype);
  sizes.Match("dx [R, D]", dx, x.dtype);
  auto* sums = sizes.Match<float>("dscale [D]", d_scale);
  auto gradients = x.dtype == BF16 ? AllNormGradients<uint16_t> : AllNormGradients<float>;
  gradients(frame, x.data, factors, dy.data, sizes["R"], sizes["D"], frame.Float("eps"), dx.data,
            sums);
}

}  // namespace

KERNEL(TableDot)
KERNEL(RmsNorm)
KERNEL(AddedNorm)
KERNEL(RmsNormGradient)

}  // namespace kernels
