// Products of rows of floats that lie expert by expert, and of what trains the experts' matrices.

#include <vector>

#include "common.h"
#include "lanes.h"

namespace kernels {
namespace {

constexpr int64_t kTileRows = 6, kTileColumns = 2 * kWidth;  // sums that stay in registers
constexpr int64_t kDepth = 256;  // products added up there, and rows of a task
constexpr int64_t kTaskInputs = 22 * kTileRows, kTaskOutputs = 256;  // of a task's sums

// Rows of a matrix: element (r, k) is data[r * row + k * step].
struct Operand {
  const float* data;
  int64_t row, step;
  Operand From(int64_t r, int64_t k) const { return {data + r * row + k * step, row, step}; }
};

// The products of some rows with b [depth, kTileColumns]; added to c, whose rows are `stride`
// apart, unless it is the first part of their sums. `columns` of c are there.
template <int64_t rows>
void Tile(const Operand& a, const float* b, int64_t depth, bool first, int64_t columns, float* c,
          int64_t stride) {
  Lanes sums[rows][2] = {};
  for (int64_t k = 0; k < depth; ++k) {
    const Lanes left = LoadLanes(b + k * kTileColumns),
                right = LoadLanes(b + k * kTileColumns + kWidth);
#pragma GCC unroll 6
    for (int64_t r = 0; r < rows; ++r) {
      const Lanes one = Filled(a.data[r * a.row + k * a.step]);
      sums[r][0] = MultiplyAdd(one, left, sums[r][0]);
      sums[r][1] = MultiplyAdd(one, right, sums[r][1]);
    }
  }
#pragma GCC unroll 6
  for (int64_t r = 0; r < rows; ++r) {
    float own[kTileColumns], *to = c + r * stride;
    float* y = columns == kTileColumns ? to : own;
    if (!first && y == own) std::memcpy(own, to, columns * sizeof(float));
    for (int half = 0; half < 2; ++half) {
      float* part = y + half * kWidth;
      StoreLanes(first ? sums[r][half] : LoadLanes(part) + sums[r][half], part);
    }
    if (y == own) std::memcpy(to, own, columns * sizeof(float));
  }
}

using TileOf = void (*)(const Operand&, const float*, int64_t, bool, int64_t, float*, int64_t);
constexpr TileOf kTiles[] = {nullptr, Tile<1>, Tile<2>, Tile<3>, Tile<4>, Tile<5>, Tile<6>};

// b [depth, columns] as [depth, kTileColumns]; zeros beyond the last.
void Panel(const Operand& b, int64_t columns, int64_t depth, float* to) {
  if (columns < kTileColumns) std::memset(to, 0, depth * kTileColumns * sizeof(float));
  for (int64_t k = 0; k < depth; ++k)
    for (int64_t i = 0; i < columns; ++i) to[k * kTileColumns + i] = *b.From(k, i).data;
}

// A row of numbers, `some` of them to each of panels of [kDepth, some]; zeros after the last.
template <int64_t some>
void Spread(const float* row, int64_t size, float* to) {
  for (; size >= some; size -= some, row += some, to += some * kDepth)
    std::memcpy(to, row, some * sizeof(float));
  if (size <= 0) return;
  std::memset(to, 0, some * sizeof(float));
  std::copy_n(row, size, to);
}

// Rows side by side of one expert.
struct Stretch {
  int64_t expert, begin, count;
};

// Of all blocks, those that follow each other joined, and then cut into equal parts of up to
// kDepth rows.
std::vector<Stretch> StretchesOf(const int32_t* experts, int64_t blocks, int64_t rows) {
  std::vector<Stretch> stretches;
  for (int64_t b = 0, end; b < blocks; b = end) {
    for (end = b; end < blocks && experts[end] == experts[b];) ++end;
    const int64_t count = (end - b) * rows, parts = RoundUp(count, kDepth) / kDepth;
    for (int64_t i = 0; i < parts; ++i) {
      const int64_t first = i * count / parts, last = (i + 1) * count / parts;
      stretches.push_back({experts[b], b * rows + first, last - first});
    }
  }
  return stretches;
}

// x float32 [blocks, R, K], w float32 [E, K, N], or [E, N, K] if `turned`, experts int32 [blocks]
// -> x times the matrix of each block's expert, [blocks, R, N]; zeros for one that there is not.
void GroupedProduct(const Frame& frame) {
  const auto [x, w, experts, y] = frame.Arrays<3, 1>();
  const bool turned = frame.Integer("turned");
  Sizes sizes;
  const auto* rows = sizes.Match<float>("x [blocks, R, K]", x);
  const auto* weights = sizes.Match<float>(turned ? "w [E, N, K]" : "w [E, K, N]", w);
  const auto* expert = sizes.Match<int32_t>("experts [blocks]", experts);
  auto* out = sizes.Match<float>("y [blocks, R, N]", y);
  const int64_t depth = sizes["K"], columns = sizes["N"], count = sizes["E"];
  const auto stretches = StretchesOf(expert, sizes["blocks"], sizes["R"]);
  const double bytes = sizeof(float) * 1. * (sizes["blocks"] * sizes["R"] + count) * depth;
  Parallel(frame, stretches.size(), bytes, [=, &stretches](int64_t i) {
    const Stretch& part = stretches[i];
    float* to = out + part.begin * columns;
    if (!depth || part.expert < 0 || part.expert >= count) {
      std::fill_n(to, part.count * columns, 0.f);
      return;
    }
    const Operand a{rows + part.begin * depth, depth, 1};
    const float* own = weights + part.expert * depth * columns;
    const Operand b = turned ? Operand{own, 1, depth} : Operand{own, columns, 1};
    float panel[kDepth * kTileColumns];
    for (int64_t k = 0; k < depth; k += kDepth)
      for (int64_t n = 0; n < columns; n += kTileColumns) {
        const int64_t some = std::min(kDepth, depth - k);
        const int64_t there = std::min(kTileColumns, columns - n);
        Panel(b.From(k, n), there, some, panel);
        for (int64_t r = 0; r < part.count; r += kTileRows)
          kTiles[std::min(kTileRows, part.count - r)](a.From(r, k), panel, some, k == 0, there,
                                                      to + r * columns + n, columns);
      }
  });
}

// x float32 [blocks, R, I], y float32 [blocks, R, O], experts int32 [blocks] -> of each expert the
// sum over its rows of x times y, float32 [E, I, O].
void GroupedSums(const Frame& frame) {
  const auto [x, y, experts, sums] = frame.Arrays<3, 1>();
  Sizes sizes;
  const auto* left = sizes.Match<float>("x [blocks, R, I]", x);
  const auto* right = sizes.Match<float>("y [blocks, R, O]", y);
  const auto* expert = sizes.Match<int32_t>("experts [blocks]", experts);
  auto* out = sizes.Match<float>("sums [E, I, O]", sums);
  const int64_t inputs = sizes["I"], outputs = sizes["O"], count = sizes["E"];
  const auto stretches = StretchesOf(expert, sizes["blocks"], sizes["R"]);
  const int64_t across = RoundUp(outputs, kTaskOutputs) / kTaskOutputs;
  const int64_t parts = RoundUp(inputs, kTaskInputs) / kTaskInputs * across;
  const double bytes = sizeof(float) * 1. * sizes["blocks"] * sizes["R"] * (inputs + outputs);
  Parallel(frame, count * parts, bytes, [=, &stretches](int64_t task) {
    const int64_t i = task % parts / across * kTaskInputs, o = task % across * kTaskOutputs;
    const int64_t rows = std::min(kTaskInputs, inputs - i);
    const int64_t columns = std::min(kTaskOutputs, outputs - o);
    float* to = out + (task / parts * inputs + i) * outputs + o;
    static thread_local Aligned kept((kTaskInputs + kTaskOutputs) * kDepth * sizeof(float));
    auto* a = reinterpret_cast<float*>(kept.data);  // panels of both, side by side
    float* b = a + kTaskInputs * kDepth;
    bool first = true;
    for (const Stretch& part : stretches) {
      if (part.expert != task / parts) continue;
      for (int64_t k = 0; k < part.count; ++k) {
        const int64_t row = part.begin + k;
        Spread<kTileRows>(left + row * inputs + i, rows, a + k * kTileRows);
        Spread<kTileColumns>(right + row * outputs + o, columns, b + k * kTileColumns);
      }
      for (int64_t n = 0; n < columns; n += kTileColumns)
        for (int64_t r = 0; r < rows; r += kTileRows)
          kTiles[std::min(kTileRows, rows - r)](
              {a + r * kDepth, 1, kTileRows}, b + n * kDepth, part.count, first,
              std::min(kTileColumns, columns - n), to + r * outputs + n, outputs);
      first = false;
    }
    for (int64_t r = 0; first && r < rows; ++r) std::fill_n(to + r * outputs, columns, 0.f);
  });
}

}  // namespace

KERNEL(GroupedProduct)
KERNEL(GroupedSums)

}  // namespace kernels
