// The embedding table as the output head, and the norm, whose sum of squares is such a product.

#include <cmath>
#include <vector>

#include "common.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace kernels {
namespace {

constexpr int kLanes = 64;  // partial sums of a product, the same on every path

// A row of x, and where its products with the table go.
struct Product {
  const float* x;
  float* out;
};

// Lane i sums the products i, i + 64, ...; then the lanes are added in halves. The order depends on
// the size only; paths differ in whether a product is rounded before it is added.
template <class T>
void Row(const T* table, const Product* rows, int64_t count, int64_t size, int64_t v) {
  for (int64_t m = 0; m < count; ++m) {
    const float* x = rows[m].x;
    float lanes[kLanes] = {};
    int64_t i = 0;
    for (; i + kLanes <= size; i += kLanes)
      for (int k = 0; k < kLanes; ++k) lanes[k] += ToFloat(table[i + k]) * x[i + k];
    for (int k = 0; i + k < size; ++k) lanes[k] += ToFloat(table[i + k]) * x[i + k];
    for (int half = kLanes / 2; half; half /= 2)
      for (int k = 0; k < half; ++k) lanes[k] += lanes[k + half];
    rows[m].out[v] = lanes[0];
  }
}

#if defined(__AVX512BW__)

inline __m512 Load16(const float* p, __mmask16 mask) { return _mm512_maskz_loadu_ps(mask, p); }
inline __m512 Load16(const uint16_t* p, __mmask16 mask) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
inline __m512 Load16(const int8_t* p, __mmask16 mask) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(mask, p)));
}

// Adds the products of 64 numbers; mask: which of each 16 there are.
template <class T, int M, int N>
INLINE void AddLanes(const T* table, const float* const (&x)[M], int64_t i, int64_t size,
                     const __mmask16 (&mask)[4], __m512 (&sums)[M][N][4]) {
#pragma GCC unroll 4
  for (int k = 0; k < 4; ++k) {
    __m512 w[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) w[n] = Load16(table + n * size + i + 16 * k, mask[k]);
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) {
      const __m512 some = _mm512_maskz_loadu_ps(mask[k], x[m] + i + 16 * k);
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) sums[m][n][k] = _mm512_fmadd_ps(w[n], some, sums[m][n][k]);
    }
  }
}

// M rows of x times N rows of the table, from row v on.
template <class T, int M, int N>
void Avx512Tile(const T* table, const Product* rows, int64_t size, int64_t v) {
  const float* x[M];
#pragma GCC unroll 4
  for (int m = 0; m < M; ++m) x[m] = rows[m].x;
  __m512 sums[M][N][4];
#pragma GCC unroll 4
  for (auto& row : sums)
#pragma GCC unroll 4
    for (auto& pair : row)
#pragma GCC unroll 4
      for (auto& sum : pair) sum = _mm512_setzero_ps();
  int64_t i = 0;
#pragma GCC unroll 1
  for (; i + kLanes <= size; i += kLanes) {
    for (int n = 0; n < N; ++n) {
      const auto* ahead = reinterpret_cast<const char*>(table + n * size + i + 1024);
      for (size_t line = 0; line < kLanes * sizeof(T); line += 64)
        _mm_prefetch(ahead + line, _MM_HINT_T0);
    }
    AddLanes<T, M, N>(table, x, i, size, {0xffff, 0xffff, 0xffff, 0xffff}, sums);
  }
  if (i < size) {
    __mmask16 mask[4];
    for (int k = 0; k < 4; ++k) {
      const int64_t left = size - i - 16 * k;
      mask[k] = left >= 16 ? 0xffff : left > 0 ? (1u << left) - 1 : 0;
    }
    AddLanes<T, M, N>(table, x, i, size, mask, sums);
  }
#pragma GCC unroll 4
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      const __m512(&s)[4] = sums[m][n];
      alignas(64) float lanes[16];
      const __m512 a = _mm512_add_ps(s[0], s[2]), b = _mm512_add_ps(s[1], s[3]);
      _mm512_store_ps(lanes, _mm512_add_ps(a, b));
      for (int half = 8; half; half /= 2)
        for (int j = 0; j < half; ++j) lanes[j] += lanes[j + half];
      rows[m].out[v + n] = lanes[0];
    }
}

// As many rows of the table, in pairs, which load each activation once for both.
template <class T, int M>
void Avx512Rows(const T* table, int64_t begin, int64_t end, const Product* rows, int64_t size) {
  constexpr int N = M > 1 ? 2 : 1;  // one row waits for memory, and reads on and on
  int64_t v = begin;
  for (; v + N <= end; v += N) Avx512Tile<T, M, N>(table + v * size, rows, size, v);
  for (; v < end; ++v)
    for (int m = 0; m < M; ++m) Avx512Tile<T, 1, 1>(table + v * size, rows + m, size, v);
}

#endif

// Rows `begin` to `end` of the table times rows of x.
template <class T>
void Panel(const T* table, int64_t begin, int64_t end, const Product* rows, int64_t count,
           int64_t size) {
#if defined(__AVX512BW__)
  for (int64_t left = count; left > 0; rows += 3, left -= 3)
    left >= 3   ? Avx512Rows<T, 3>(table, begin, end, rows, size)
    : left == 2 ? Avx512Rows<T, 2>(table, begin, end, rows, size)
                : Avx512Rows<T, 1>(table, begin, end, rows, size);
#else
  for (int64_t v = begin; v < end; ++v) Row(table + v * size, rows, count, size, v);
#endif
}

// Rows of zeros, as of slots without a request, are not multiplied.
template <class T>
void TableRows(const Frame& frame, const T* table, const float* x, int64_t rows, int64_t size,
               int64_t vocab, float* out) {
  std::vector<Product> products;
  for (int64_t m = 0; m < rows; ++m, x += size, out += vocab)
    if (std::any_of(x, x + size, [](float value) { return value != 0; }))
      products.push_back({x, out});
    else
      std::fill_n(out, vocab, 0.f);
  constexpr int64_t some = 64;  // rows of the table and, of x, rows that stay in a cache meanwhile
  const int64_t count = products.size();
  const int64_t panels = (vocab + some - 1) / some, groups = (count + some - 1) / some;
  const double bytes = 1. * vocab * size * sizeof(T) * std::max<int64_t>(1, count / 8);
  Parallel(frame, panels * groups, bytes, [&](int64_t i) {
    const int64_t v = i % panels * some, m = i / panels * some;
    Panel(table, v, std::min(v + some, vocab), &products[m], std::min(some, count - m), size);
  });
}

// x float32 [R, D] times table float32, bfloat16 or int8 [V, D] -> float32 [R, V]
void TableDot(const Frame& frame) {
  const auto [x, table, out] = frame.Arrays<2, 1>();
  Sizes sizes;
  const auto* rows = sizes.Match<float>("x [R, D]", x);
  sizes.Match("table [V, D]", table);
  auto* to = sizes.Match<float>("logits [R, V]", out);
  auto rows_of = [&](const auto* data) {
    TableRows(frame, data, rows, sizes["R"], sizes["D"], sizes["V"], to);
  };
  const Dtype dtype = table.dtype;
  if (dtype == BF16)
    rows_of(static_cast<const uint16_t*>(table.data));
  else if (dtype == F32)
    rows_of(static_cast<const float*>(table.data));
  else if (dtype == S8)
    rows_of(static_cast<const int8_t*>(table.data));
  else
    Check(false, "table is ", dtype, ", neither F32, BF16 nor S8");
}

// --- Norm ----------------------------------------------------------------------------------------

template <class T>
void NormRows(const Frame& frame, const void* from, const float* scale, int64_t rows, int64_t size,
              float eps, void* to) {
  const T* x = static_cast<const T*>(from);
  T* out = static_cast<T*>(to);
  Parallel(frame, rows, 1. * rows * size * sizeof(float), [=](int64_t m) {
    static thread_local Aligned kept(0);
    float* row = reinterpret_cast<float*>(Kept(kept, size * sizeof(float)));
    for (int64_t i = 0; i < size; ++i) row[i] = ToFloat(x[m * size + i]);
    float sum;
    const Product square = {row, &sum};
    Panel(row, 0, 1, &square, 1, size);
    const float inverse = 1 / std::sqrt(sum / size + eps);
    for (int64_t i = 0; i < size; ++i) FromFloat(scale[i] * row[i] * inverse, out + m * size + i);
  });
}

// x [R, D], float32 or bfloat16, and scale float32 [D] -> as x: scale x / sqrt(mean square + eps).
void RmsNorm(const Frame& frame) {
  const auto [x, scale, out] = frame.Arrays<2, 1>();
  Sizes sizes;
  CheckFloats("x", x);
  sizes.Match("x [R, D]", x);
  const auto* factors = sizes.Match<float>("scale [D]", scale);
  sizes.Match("y [R, D]", out, x.dtype);
  auto norm = x.dtype == BF16 ? NormRows<uint16_t> : NormRows<float>;
  norm(frame, x.data, factors, sizes["R"], sizes["D"], frame.Float("eps"), out.data);
}

}  // namespace

KERNEL(TableDot)
KERNEL(RmsNorm)

}  // namespace kernels
