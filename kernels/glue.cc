// What lies between products and attention: rotary embedding, gated sums, rounding, transposition.

#include <cmath>

#include "common.h"
#include "rotate.h"

namespace kernels {
namespace {

// --- Rotary embedding and gated sums -------------------------------------------------------------
//
// Two products, added: XLA contracts the one or the other into a fused multiply-add, by the shape
// of its loop. Here both are rounded before they are added, on every processor.

template <class T>
void RotateHeads(const T* x, const float* sin, const float* cos, int64_t heads, int64_t half,
                 T* out) {
  for (int64_t n = 0; n < heads; ++n, x += 2 * half, out += 2 * half)
    for (int64_t i = 0; i < half; ++i) {
      const float a = ToFloat(x[i]), b = ToFloat(x[i + half]);
      FromFloat(a * cos[i] - b * sin[i], out + i);
      FromFloat(b * cos[i] + a * sin[i], out + half + i);
    }
}

template <class T>
void RotateAll(const Frame& frame, const void* x, const int32_t* positions,
               const float* frequencies, int64_t tokens, int64_t heads, int64_t half, void* out) {
  const int64_t row = heads * 2 * half;
  Parallel(frame, tokens, 8. * tokens * row, [=](int64_t t) {
    static thread_local Aligned kept(0);
    float* sin = reinterpret_cast<float*>(Kept(kept, 2 * half * sizeof(float)));
    float* cos = sin + half;
    for (int64_t i = 0; i < half; ++i) {
      const float angle = static_cast<float>(positions[t]) * frequencies[i];
      sin[i] = std::sin(angle), cos[i] = std::cos(angle);
    }
    RotateHeads(static_cast<const T*>(x) + t * row, sin, cos, heads, half,
                static_cast<T*>(out) + t * row);
  });
}

}  // namespace

void RotateTokens(const Frame& frame, Dtype dtype, const void* x, const int32_t* positions,
                  const float* frequencies, int64_t tokens, int64_t heads, int64_t half,
                  void* out) {
  auto rotate = dtype == BF16 ? RotateAll<uint16_t> : RotateAll<float>;
  rotate(frame, x, positions, frequencies, tokens, heads, half, out);
}

namespace {

// x [B, T, N, H], float32 or bfloat16, positions int32 [B, T], frequencies float32 [H / 2] -> as x:
// pairs (i, i + H / 2) rotated by position times frequency.
void Rotate(const Frame& frame) {
  const auto [x, positions, frequencies, out] = frame.Arrays<3, 1>();
  Sizes sizes;
  CheckFloats("x", x);
  sizes.Match("x [B, T, N, H]", x);
  const auto* position = sizes.Match<int32_t>("positions [B, T]", positions);
  const auto* frequency = sizes.Match<float>("frequencies [H / 2]", frequencies);
  sizes.Match("rotated [B, T, N, H]", out, x.dtype);
  const int64_t half = sizes["H / 2"];
  Check(sizes["H"] == 2 * half, "heads of ", sizes["H"], " numbers, but ", half, " frequencies");
  RotateTokens(frame, x.dtype, x.data, position, frequency, sizes["B"] * sizes["T"], sizes["N"],
               half, out.data);
}

template <class T>
void AddGated(const T* row, float gate, int64_t size, float* sum) {
  for (int64_t i = 0; i < size; ++i) sum[i] += gate * ToFloat(row[i]);
}

// rows [R, D], float32 or bfloat16, gates float32 [T, A], index int32 [T, A] -> float32 [T, D]:
// each token's rows, times its gates, summed in order; those that there are not are left out.
void GatedSums(const Frame& frame) {
  const auto [rows, gates, index, out] = frame.Arrays<3, 1>();
  Sizes sizes;
  CheckFloats("rows", rows);
  sizes.Match("rows [R, D]", rows);
  const auto* gate = sizes.Match<float>("gates [T, A]", gates);
  const auto* at = sizes.Match<int32_t>("index [T, A]", index);
  auto* to = sizes.Match<float>("sums [T, D]", out);
  const int64_t count = sizes["R"], size = sizes["D"], tokens = sizes["T"], chosen = sizes["A"];
  const bool half = rows.dtype == BF16;
  const void* from = rows.data;
  Parallel(frame, tokens, 4. * tokens * chosen * size, [=](int64_t t) {
    float* sum = to + t * size;
    std::fill(sum, sum + size, 0.f);
    for (int64_t a = t * chosen; a < (t + 1) * chosen; ++a) {
      const int64_t row = at[a];
      if (row < 0 || row >= count) continue;
      if (half)
        AddGated(static_cast<const uint16_t*>(from) + row * size, gate[a], size, sum);
      else
        AddGated(static_cast<const float*>(from) + row * size, gate[a], size, sum);
    }
  });
}

// --- Rounding rows to integers -------------------------------------------------------------------
//
// XLA makes what it reads again for each loop that reads it, GELU among it, and not always to the
// same last bit. A kernel reads what is in memory.

template <class T>
void Maxima(const Frame& frame, const void* x, int64_t rows, int64_t size, float* out) {
  Parallel(frame, rows, 1. * rows * size * sizeof(T), [=](int64_t r) {
    out[r] = LargestMagnitude(static_cast<const T*>(x) + r * size, size);
  });
}

// x [R, I], float32 or bfloat16 -> the largest magnitude of each row, float32 [R, 1].
void RowMaxima(const Frame& frame) {
  const auto [x, out] = frame.Arrays<1, 1>();
  Sizes sizes;
  CheckFloats("x", x);
  sizes.Match("x [R, I]", x);
  auto* to = sizes.Match<float>("maxima [R, 1]", out);
  Check(sizes["1"] == 1, "maxima [R, 1] have ", sizes["1"], " columns");
  auto maxima = x.dtype == BF16 ? Maxima<uint16_t> : Maxima<float>;
  maxima(frame, x.data, sizes["R"], sizes["I"], to);
}

template <class T, class Integer>
void Round(const Frame& frame, const void* x, const float* steps, int64_t rows, int64_t size,
           void* out) {
  Parallel(frame, rows, 1. * rows * size * sizeof(T), [=](int64_t r) {
    RoundRow(static_cast<const T*>(x) + r * size, size, steps[r],
             static_cast<Integer*>(out) + r * size);
  });
}

// x [R, I], float32 or bfloat16, and steps float32 [R, 1] -> x / step, int8 or int16 [R, I].
void RoundRows(const Frame& frame) {
  const auto [x, steps, out] = frame.Arrays<2, 1>();
  Sizes sizes;
  CheckFloats("x", x);
  sizes.Match("x [R, I]", x);
  const auto* step = sizes.Match<float>("steps [R, 1]", steps);
  sizes.Match("integers [R, I]", out);
  Check(sizes["1"] == 1, "steps [R, 1] have ", sizes["1"], " columns");
  const Dtype dtype = out.dtype;
  Check(dtype == S8 || dtype == S16, "integers are ", dtype, ", neither S8 nor S16");
  auto round = x.dtype == BF16 ? (dtype == S8 ? Round<uint16_t, int8_t> : Round<uint16_t, int16_t>)
                               : (dtype == S8 ? Round<float, int8_t> : Round<float, int16_t>);
  round(frame, x.data, step, sizes["R"], sizes["I"], out.data);
}

// --- Transposition -------------------------------------------------------------------------------

typedef uint16_t Eight __attribute__((vector_size(16)));

// 8 rows of 8 numbers, rows `stride` apart, to as many columns. Each of three rounds interleaves
// the first half of the rows with the second.
INLINE void TransposeEight(const uint16_t* from, int64_t stride, uint16_t* to, int64_t to_stride) {
  Eight v[8], w[8];
  for (int i = 0; i < 8; ++i) std::memcpy(&v[i], from + i * stride, 16);
  for (int round = 0; round < 3; ++round) {
    for (int i = 0; i < 4; ++i) {
      w[2 * i] = __builtin_shufflevector(v[i], v[i + 4], 0, 8, 1, 9, 2, 10, 3, 11);
      w[2 * i + 1] = __builtin_shufflevector(v[i], v[i + 4], 4, 12, 5, 13, 6, 14, 7, 15);
    }
    std::memcpy(v, w, sizeof v);
  }
  for (int i = 0; i < 8; ++i) std::memcpy(to + i * to_stride, &v[i], 16);
}

// x [B, R, C] of two bytes each -> [B, C, R]
void Transpose(const Frame& frame) {
  const auto [x, out] = frame.Arrays<1, 1>();
  Sizes sizes;
  sizes.Match("x [B, R, C]", x);
  sizes.Match("transposed [B, C, R]", out, x.dtype);
  Check(WidthOf(x.dtype) == 2, "x is ", x.dtype, ", not of two bytes");
  const int64_t rows = sizes["R"], columns = sizes["C"], strips = RoundUp(columns, 32) / 32;
  const auto* from = static_cast<const uint16_t*>(x.data);
  auto* to = static_cast<uint16_t*>(out.data);
  Parallel(frame, sizes["B"] * strips, 2. * sizes["B"] * rows * columns, [=](int64_t i) {
    const int64_t b = i / strips, first = i % strips * 32;
    const int64_t last = std::min(columns, first + 32);
    const uint16_t* matrix = from + b * rows * columns;
    uint16_t* turned = to + b * rows * columns;
    for (int64_t r = 0; r < rows; r += 8)
      for (int64_t c = first; c < last; c += 8) {
        if (r + 8 <= rows && c + 8 <= last) {
          TransposeEight(matrix + r * columns + c, columns, turned + c * rows + r, rows);
          continue;
        }
        for (int64_t j = r; j < std::min(rows, r + 8); ++j)
          for (int64_t k = c; k < std::min(last, c + 8); ++k)
            turned[k * rows + j] = matrix[j * columns + k];
      }
  });
}

}  // namespace

KERNEL(Rotate)
KERNEL(GatedSums)
KERNEL(RowMaxima)
KERNEL(RoundRows)
KERNEL(Transpose)

}  // namespace kernels
