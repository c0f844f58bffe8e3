// What is chosen: the likeliest tokens, and the experts of a token. Of equals the first is taken.

#include <cmath>
#include <limits>

#include "common.h"
#include "lanes.h"

namespace kernels {
namespace {

// The `count` largest of x [size], largest first, and where they are; with NaN, some of them.
void Largest(const float* x, int64_t size, int64_t count, float* values, int32_t* index) {
  int64_t found = 0;
  auto insert = [&](int64_t i) {
    if (found == count && !(x[i] > values[count - 1])) return;
    int64_t at = found < count ? found++ : count - 1;
    for (; at > 0 && x[i] > values[at - 1]; --at)
      values[at] = values[at - 1], index[at] = index[at - 1];
    values[at] = x[i], index[at] = static_cast<int32_t>(i);
  };
  int64_t i = 0;
  for (; i < count; ++i) insert(i);
  for (constexpr int64_t some = 64; i + some <= size; i += some) {
    const float least = values[count - 1];
    int32_t more = 0;
    for (int64_t j = 0; j < some; ++j) more |= x[i + j] > least;
    for (int64_t j = 0; more && j < some; ++j) insert(i + j);
  }
  for (; i < size; ++i) insert(i);
}

// log of the sum of exp(x - largest), x [size]. Not finite if the largest is not, and with any NaN:
// where the largest is not known then, nothing becomes of NaN but NaN.
float LogTotal(const float* x, int64_t size, float largest) {
  constexpr float least = -87;  // what is smaller adds nothing to the largest, which adds 1
  Lanes sums[4] = {};
  int64_t i = 0;
  auto add = [&](Lanes v, Lanes& sum) {
    v -= largest;
    sum += Exp(v < least ? Filled(least) : v);
  };
  for (; i + 4 * kWidth <= size; i += 4 * kWidth)
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) add(LoadLanes(x + i + k * kWidth), sums[k]);
  for (; i < size; i += kWidth) {
    Lanes v = Lanes{} - std::numeric_limits<float>::infinity();
    std::memcpy(&v, x + i, std::min(kWidth, size - i) * sizeof(float));
    add(v, sums[0]);
  }
  return std::log(Total((sums[0] + sums[2]) + (sums[1] + sums[3])));
}

// x float32 [R, V] -> the K largest of each row, float32, and their places, int32 [R, K]; and the
// log of the sum of exp(x - largest), float32 [R]
void Likeliest(const Frame& frame) {
  const auto [x, values, index, totals] = frame.Arrays<1, 3>();
  Sizes sizes;
  const auto* rows = sizes.Match<float>("x [R, V]", x);
  auto* largest = sizes.Match<float>("values [R, K]", values);
  auto* at = sizes.Match<int32_t>("index [R, K]", index);
  auto* total = sizes.Match<float>("total [R]", totals);
  const int64_t size = sizes["V"], count = sizes["K"];
  Check(0 < count && count <= size, "the ", count, " largest of ", size);
  Parallel(frame, sizes["R"], 16. * sizes["R"] * size, [=](int64_t r) {
    const float* row = rows + r * size;
    Largest(row, size, count, largest + r * count, at + r * count);
    total[r] = LogTotal(row, size, largest[r * count]);
  });
}

// --- Experts -------------------------------------------------------------------------------------

typedef float Eight __attribute__((vector_size(32)));

// The logits of one token for `count` experts, eight at most: x [D] times columns of a router whose
// rows are `stride` apart, in four sums. (`TableDot` would want it turned, in each step.)
template <class T>
INLINE void SomeLogits(const T* x, const float* w, int64_t size, int64_t stride, int64_t count,
                       float* logits) {
  Eight sums[4] = {};
  auto add = [&](int64_t d, int i) {
    Eight some = {};
    std::memcpy(&some, w + d * stride, count * sizeof(float));
    sums[i] += ToFloat(x[d]) * some;
  };
  int64_t d = 0;
  for (; d + 4 <= size; d += 4) add(d, 0), add(d + 1, 1), add(d + 2, 2), add(d + 3, 3);
  for (int i = 0; d < size; ++d, ++i) add(d, i);
  const Eight all = (sums[0] + sums[2]) + (sums[1] + sums[3]);
  std::memcpy(logits, &all, count * sizeof(float));
}

template <class T>
void Logits(const T* x, const float* w, int64_t size, int64_t experts, float* logits) {
  int64_t e = 0;
  for (; e + 8 <= experts; e += 8) SomeLogits(x, w + e, size, experts, 8, logits + e);
  if (e < experts) SomeLogits(x, w + e, size, experts, experts - e, logits + e);
}

// What a router makes of its logits: probabilities, float32 [R, E], and of the A most likely
// experts probability and index [R, A], -1 where not valid, bool [R].
struct Choices {
  const bool* valid;
  float *probs, *gates;
  int32_t* index;
  int64_t experts, count;

  Choices(Sizes& sizes, const Array& is_valid, const Array& of_all, const Array& of_chosen,
          const Array& at) {
    valid = sizes.Match<bool>("valid [R]", is_valid);
    probs = sizes.Match<float>("probabilities [R, E]", of_all);
    gates = sizes.Match<float>("gates [R, A]", of_chosen);
    index = sizes.Match<int32_t>("index [R, A]", at);
    experts = sizes["E"], count = sizes["A"];
    Check(0 < count && count <= experts, "the ", count, " most likely of ", experts, " experts");
  }

  void Set(int64_t r, const float* logits) const {
    float *p = probs + r * experts, largest = logits[0], total = 0;
    for (int64_t e = 1; e < experts; ++e) largest = std::max(largest, logits[e]);
    for (int64_t e = 0; e < experts; ++e) total += p[e] = std::exp(logits[e] - largest);
    for (int64_t e = 0; e < experts; ++e) p[e] /= total;
    Largest(p, experts, count, gates + r * count, index + r * count);
    if (!valid[r]) std::fill_n(index + r * count, count, -1);
  }
};

// logits float32 [R, E] and valid -> `Choices`
void Choose(const Frame& frame) {
  const auto [logits, valid, probs, gates, index] = frame.Arrays<2, 3>();
  Sizes sizes;
  const auto* of_all = sizes.Match<float>("logits [R, E]", logits);
  const Choices choices(sizes, valid, probs, gates, index);
  for (int64_t r = 0; r < sizes["R"]; ++r) choices.Set(r, of_all + r * choices.experts);
}

// x [R, D], float32 or bfloat16, a router float32 [D, E] and valid -> logits float32 [R, E] and
// `Choices`
void Route(const Frame& frame) {
  const auto [x, router, valid, logits, probs, gates, index] = frame.Arrays<3, 4>();
  Sizes sizes;
  CheckFloats("x", x);
  sizes.Match("x [R, D]", x);
  const auto* w = sizes.Match<float>("router [D, E]", router);
  auto* of_all = sizes.Match<float>("logits [R, E]", logits);
  const Choices choices(sizes, valid, probs, gates, index);
  const int64_t rows = sizes["R"], size = sizes["D"], experts = sizes["E"];
  const bool half = x.dtype == BF16;
  const void* from = x.data;
  Parallel(frame, rows, 4. * rows * size, [=](int64_t r) {
    float* own = of_all + r * experts;
    if (half)
      Logits(static_cast<const uint16_t*>(from) + r * size, w, size, experts, own);
    else
      Logits(static_cast<const float*>(from) + r * size, w, size, experts, own);
    choices.Set(r, own);
  });
}

}  // namespace

KERNEL(Likeliest)
KERNEL(Choose)
KERNEL(Route)

}  // namespace kernels
