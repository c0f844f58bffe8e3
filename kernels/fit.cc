// int8 codes to packed trits, by absmean and with the least squared error: conversion.py and
// formats.py, which explain the arithmetic, to the last bit.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#include "memory.h"

namespace {

constexpr int64_t kOutputs = 64;      // fitted at a time: a line of the cache from each row
constexpr int64_t kMagnitudes = 129;  // of int8, 0 to 128
constexpr int64_t kMaxBlock = 64;     // quantize.MAX_BLOCK
constexpr int kRounds = 12;           // formats.ROUNDS

// Sums of two trits, a first + b second, in the order in which formats.nearest tries them.
constexpr int kSums = 5, kA[kSums] = {0, 0, 1, 1, 1}, kB[kSums] = {0, 1, -1, 0, 1};

template <class T>
using Row = T[kOutputs];  // something of each output

struct Shape {
  int64_t inputs, parts, groups, planes, block;
};

struct Counts {
  Row<uint16_t> of[kMagnitudes];
  Row<int32_t> number[kMagnitudes + 1], total[kMagnitudes + 1];  // of m and all that are larger
};

struct Scales {  // of both planes
  double first, second;
  bool operator==(const Scales& other) const {
    return first == other.first && second == other.second;
  }
};

// --- Packing -------------------------------------------------------------------------------------

// Vectors of a byte of some outputs: of longer ones than its own, a compiler compares single bytes.
#if defined(__AVX512BW__)
constexpr int64_t kVector = 64;
#else
constexpr int64_t kVector = 32;
#endif
typedef int8_t Lanes __attribute__((vector_size(kVector)));
typedef uint8_t Bytes __attribute__((vector_size(kVector)));
typedef uint64_t Words __attribute__((vector_size(kOutputs)));  // eight bytes of each output

// Exchanges the bytes of eight rows of Words that lie `distance` off the diagonal.
template <int distance>
INLINE void Exchange(Words* x, uint64_t mask) {
  for (int k = 0; k < 8; ++k) {
    if (k & distance) continue;
    const Words differing = (x[k] >> 8 * distance ^ x[k + distance]) & mask;
    x[k + distance] ^= differing;
    x[k] ^= differing << 8 * distance;
  }
}

// Bytes [block, outputs], rows `pitch` apart, turned: of each output its `block`, `width` apart.
NOINLINE void Turn(const uint8_t* bytes, int64_t pitch, int64_t block, int64_t outputs,
                   uint8_t* out, int64_t width) {
  int64_t done = 0;  // outputs
  for (; block % 8 == 0 && outputs - done >= kOutputs; done += kOutputs, out += kOutputs * width) {
    uint8_t turned[kOutputs][kMaxBlock];
    for (int64_t o = 0; o < kOutputs; ++o) __builtin_prefetch(out + o * width, 1);
    for (int64_t j = 0; j < block; j += 8) {
      Words x[8];
      for (int k = 0; k < 8; ++k) std::memcpy(&x[k], bytes + (j + k) * pitch + done, kOutputs);
      Exchange<1>(x, 0x00ff00ff00ff00ff);
      Exchange<2>(x, 0x0000ffff0000ffff);
      Exchange<4>(x, 0x00000000ffffffff);
      for (int k = 0; k < 8; ++k)
        for (int c = 0; c < kOutputs / 8; ++c) {
          const uint64_t eight = x[k][c];
          std::memcpy(&turned[8 * c + k][j], &eight, 8);
        }
    }
    for (int64_t o = 0; o < kOutputs; ++o)  // whole lines of the cache, each once
      if (block == kMaxBlock)
        std::memcpy(out + o * width, turned[o], kMaxBlock);
      else
        std::memcpy(out + o * width, turned[o], block);
  }
  for (int64_t o = done; o < outputs; ++o, out += width)
    for (int64_t j = 0; j < block; ++j) out[j] = bytes[j * pitch + o];
}

// --- Absmean -------------------------------------------------------------------------------------

constexpr int64_t kColumns = 2048;  // of which a block's bytes stay in a core's cache
constexpr int64_t kRows = 256;      // whose magnitudes, up to 128, add up to 16 bits at most

// Adds the magnitudes of codes [rows, outputs] to sums [outputs].
void AddMagnitudes(const int8_t* codes, int64_t stride, int64_t rows, int64_t outputs,
                   int64_t* sums) {
  for (int64_t first = 0; first < rows; first += kRows)
    for (int64_t o = 0; o < outputs; o += kColumns) {
      const int64_t count = std::min(kColumns, outputs - o), last = std::min(first + kRows, rows);
      uint16_t some[kColumns] = {};
      for (int64_t i = first; i < last; ++i) {
        const int8_t* row = codes + i * stride + o;
        for (int64_t j = 0; j < count; ++j) some[j] += row[j] < 0 ? -row[j] : row[j];
      }
      for (int64_t j = 0; j < count; ++j) sums[o + j] += some[j];
    }
}

INLINE Lanes Load(const int8_t* from, int64_t count) {  // so many, and zeros
  Lanes lanes = {};
  if (count >= kVector)
    std::memcpy(&lanes, from, kVector);
  else
    std::memcpy(&lanes, from, count);
  return lanes;
}

constexpr int8_t kZeros[kColumns] = {};  // for rows that there are not: between 0 and 0

struct Codes {  // a row of codes, and the lowest and the highest that are 0 in each column
  const int8_t *row, *lowest, *highest;
};

// Puts trit + 1 of each code below the bits of packed bytes. next: the row that follows.
INLINE void Append(const Codes& codes, const int8_t* next, int64_t outputs, uint8_t* bytes) {
  for (int64_t o = 0; o < outputs; o += kVector) {
    __builtin_prefetch(next + o);
    const int64_t count = outputs - o;
    const Lanes row = Load(codes.row + o, count), above = row > Load(codes.highest + o, count),
                at_least = row >= Load(codes.lowest + o, count);  // -1 where it is so
    Bytes some;
    std::memcpy(&some, bytes + o, kVector);
    some = 4 * some - reinterpret_cast<Bytes>(above) - reinterpret_cast<Bytes>(at_least);
    std::memcpy(bytes + o, &some, kVector);
  }
}

// Packed bytes of a block of inputs [4 * block], each `width` apart for an output, of `outputs`.
void PackBlock(const Codes* inputs, int64_t block, int64_t outputs, uint8_t* packed,
               int64_t width) {
  uint8_t bytes[kMaxBlock][kColumns];
  for (int64_t i = 0; i < block; ++i) {
    std::memset(bytes[i], 0, kColumns);
    for (int slab = 3; slab >= 0; --slab) {
      const Codes* codes = inputs + slab * block + i;
      Append(*codes, codes[i + 1 < block].row, outputs, bytes[i]);
    }
  }
  Turn(bytes[0], kColumns, block, outputs, packed, width);
}

// --- Least squares -------------------------------------------------------------------------------

template <class T>
INLINE void SumsOfTrits(T first, T second, T* sums) {
  sums[0] = 0, sums[1] = second, sums[2] = first - second, sums[3] = first;
  sums[4] = first + second;
}

// --- Magnitudes that are multiples of one scale --------------------------------------------------

// How many codes [rows] of each magnitude there are.
INLINE void Count(const Row<int8_t>* codes, int64_t rows, Row<uint16_t>* counts) {
  std::memset(counts, 0, kMagnitudes * sizeof(*counts));
  for (int64_t i = 0; i < rows; ++i) {
    Row<uint8_t> magnitude;
    for (int o = 0; o < kOutputs; ++o) magnitude[o] = codes[i][o] < 0 ? -codes[i][o] : codes[i][o];
#pragma GCC unroll 64
    for (int o = 0; o < kOutputs; ++o) ++counts[magnitude[o]][o];
  }
}

// formats.best_prefix of magnitudes 0 to 128. Sums are integers, and exact.
INLINE void BestPrefix(Counts& counts, double* first) {
  Row<double> best = {}, at = {};
  std::memset(counts.number[kMagnitudes], 0, sizeof(Row<int32_t>));
  std::memset(counts.total[kMagnitudes], 0, sizeof(Row<int32_t>));
  for (int m = kMagnitudes - 1; m >= 0; --m) {
    Row<double> number, total;
    for (int o = 0; o < kOutputs; ++o) {
      number[o] = counts.number[m][o] = counts.number[m + 1][o] + counts.of[m][o];
      total[o] = counts.total[m][o] = counts.total[m + 1][o] + m * counts.of[m][o];
    }
    for (int o = 0; o < kOutputs; ++o) {
      const double gain = total[o] * total[o] / std::max(number[o], 1.);
      at[o] = gain >= best[o] ? m : at[o];
      best[o] = std::max(best[o], gain);
    }
  }
  for (int o = 0; o < kOutputs; ++o) {
    const int m = at[o];
    first[o] = 1. * counts.total[m][o] / std::max(counts.number[m][o], 1);
  }
}

// The magnitudes to which each sum of two trits is nearest: from begin[i] to below begin[i + 1].
struct Cells {
  int count = 0, sum[kSums], begin[kSums + 1];
};

// Cells of the different sums in rising order. Where two of them meet, formats.nearest decides.
INLINE Cells CellsOf(const Scales& scales) {
  Cells cells;
  double sums[kSums], level[kSums];
  SumsOfTrits(scales.first, scales.second, sums);
  for (int s = 0; s < kSums; ++s) {
    int at = cells.count;
    while (at > 0 && level[at - 1] > sums[s]) --at;
    if (at > 0 && level[at - 1] == sums[s]) continue;  // the one before is taken
    for (int i = cells.count++; i > at; --i) {
      level[i] = level[i - 1];
      cells.sum[i] = cells.sum[i - 1];
    }
    level[at] = sums[s], cells.sum[at] = s;
  }
  for (int i = 1; i < cells.count; ++i) {
    const bool earlier = cells.sum[i] < cells.sum[i - 1];
    const auto is_nearer = [&](int m) {
      const double below = fabs(m - level[i - 1]), above = fabs(m - level[i]);
      return (above < below) | ((above == below) & earlier);
    };
    const double middle = (level[i - 1] + level[i]) / 2;
    const int m = middle < 0 ? 0 : middle > 128 ? 128 : static_cast<int>(middle);
    const int begin = m + 2 - is_nearer(m) - is_nearer(m + 1);
    cells.begin[i] = begin < kMagnitudes ? begin : kMagnitudes;
  }
  cells.begin[0] = 0;
  cells.begin[cells.count] = kMagnitudes;
  return cells;
}

// The scales for which the squared error is least, with these sums over all weights of the products
// of their trits (a, b) and magnitudes x; as they were, if all weights have one pattern of trits.
template <class T>
INLINE Scales Solve(double aa, double ab, double bb, T ax, T bx, const Scales& old) {
  const double det = aa * bb - ab * ab;
  if (!(det > 0)) return old;
  return {(bb * ax - ab * bx) / det, (aa * bx - ab * ax) / det};
}

// formats.two_planes of magnitudes 0 to 128 of one output, from sums over whole cells.
INLINE Scales TwoPlanes(const Counts& counts, int o, double first) {
  Scales scales{first, 0.6 * first};
  for (int round = 0; round < kRounds; ++round) {
    const Cells cells = CellsOf(scales);
    int64_t aa = 0, ab = 0, bb = 0, ax = 0, bx = 0;
    for (int i = 0; i < cells.count; ++i) {
      const int begin = cells.begin[i], end = cells.begin[i + 1];
      const int a = kA[cells.sum[i]], b = kB[cells.sum[i]];
      const int64_t number = counts.number[begin][o] - counts.number[end][o];
      const int64_t total = counts.total[begin][o] - counts.total[end][o];
      aa += a * a * number, ab += a * b * number, bb += b * b * number;
      ax += a * total, bx += b * total;
    }
    const Scales next = Solve(aa, ab, bb, ax, bx, scales);
    if (next == scales) break;  // and so would all further ones
    scales = next;
  }
  return scales;
}

// --- Magnitudes of several scales ----------------------------------------------------------------

struct Some {  // `count` weights of magnitude x
  double x, count;
};

// Adds those of another scale to some in falling order, behind those that are alike.
void Merge(const Row<uint16_t>* counts, int o, double scale, std::vector<Some>& some) {
  const size_t middle = some.size();
  for (int m = kMagnitudes - 1; m >= 0; --m)
    if (counts[m][o]) some.push_back({m * scale, 1. * counts[m][o]});
  std::inplace_merge(some.begin(), some.begin() + middle, some.end(),
                     [](const Some& a, const Some& b) { return a.x > b.x; });
}

double BestPrefix(const std::vector<Some>& some) {
  double total = 0, number = 0, best = 0, first = 0;
  for (const Some& one : some) {
    total += one.x * one.count;
    number += one.count;
    const double gain = total * total / number;
    if (gain >= best) best = gain, first = total / number;
  }
  return first;
}

INLINE int Nearest(double x, const double* sums) {
  int nearest = 0;
  double smallest = x;
  for (int s = 1; s < kSums; ++s) {
    const double distance = fabs(x - sums[s]);
    nearest = distance < smallest ? s : nearest;
    smallest = distance < smallest ? distance : smallest;
  }
  return nearest;
}

Scales TwoPlanes(const std::vector<Some>& some, double first) {
  Scales scales{first, 0.6 * first};
  for (int round = 0; round < kRounds; ++round) {
    double sums[kSums], aa = 0, ab = 0, bb = 0, ax = 0, bx = 0;
    SumsOfTrits(scales.first, scales.second, sums);
    for (const Some& one : some) {
      const int nearest = Nearest(one.x, sums), a = kA[nearest], b = kB[nearest];
      aa += one.count * (a * a), ab += one.count * (a * b), bb += one.count * (b * b);
      ax += one.count * (a * one.x), bx += one.count * (b * one.x);
    }
    const Scales next = Solve(aa, ab, bb, ax, bx, scales);
    if (next == scales) break;
    scales = next;
  }
  return scales;
}

// --- A tile of outputs ---------------------------------------------------------------------------

// formats.fit_scales, [groups, planes], each group with one scale of the source.
void FitGroups(const Row<int8_t>* codes, const Row<float>* scales, const Shape& shape,
               Counts& counts, Row<double>* fitted) {
  const int64_t size = shape.inputs / shape.groups;
  for (int64_t g = 0; g < shape.groups; ++g) {
    const Row<float>& scale = scales[g * shape.parts / shape.groups];
    Row<double>* found = fitted + g * shape.planes;
    Count(codes + g * size, size, counts.of);
    BestPrefix(counts, found[0]);
    if (shape.planes == 2)
      for (int o = 0; o < kOutputs; ++o) {
        const Scales both = TwoPlanes(counts, o, found[0][o]);
        found[0][o] = both.first, found[1][o] = both.second;
      }
    for (int64_t p = 0; p < shape.planes; ++p)
      for (int o = 0; o < kOutputs; ++o) found[p][o] *= scale[o];
  }
}

// The same of one group with several scales of the source.
void FitParts(const Row<int8_t>* codes, const Row<float>* scales, const Shape& shape,
              Counts& counts, Row<double>* fitted) {
  std::vector<Some> some[kOutputs];
  const int64_t size = shape.inputs / shape.parts;
  for (int64_t part = 0; part < shape.parts; ++part) {
    Count(codes + part * size, size, counts.of);
    for (int o = 0; o < kOutputs; ++o) Merge(counts.of, o, scales[part][o], some[o]);
  }
  for (int o = 0; o < kOutputs; ++o) {
    fitted[0][o] = BestPrefix(some[o]);
    if (shape.planes == 1) continue;
    const Scales both = TwoPlanes(some[o], fitted[0][o]);
    fitted[0][o] = both.first, fitted[1][o] = both.second;
  }
}

// formats.as_multiples: scales become multipliers of the output's, which is returned in `unit`.
INLINE void AsMultiples(const Shape& shape, Row<double>* fitted, float* unit) {
  Row<double> largest = {};
  for (int64_t g = 0; g < shape.groups; ++g)
    for (int o = 0; o < kOutputs; ++o) {
      double sum = fitted[g * shape.planes][o];
      if (shape.planes == 2) sum += fitted[2 * g + 1][o];
      largest[o] = std::max(largest[o], sum);
    }
  for (int o = 0; o < kOutputs; ++o) unit[o] = largest[o] / (128 - shape.planes);
  for (int64_t i = 0; i < shape.groups * shape.planes; ++i)
    for (int o = 0; o < kOutputs; ++o)
      fitted[i][o] = rint(fitted[i][o] / std::max(unit[o], 1e-37f));
}

// The lowest and the highest code of each output whose nearest trit is 0. scale: of the source;
// value: of the trit 1, which is taken by what is nearer to it.
INLINE void ZeroRange(const float* scale, const float* value, int8_t* lowest, int8_t* highest) {
  for (int o = 0; o < kOutputs; ++o) {
    const float own = fabsf(scale[o]), middle = value[o] / (2 * own);
    const auto is_zero = [&](int m) { return !((2 * (m * own) > value[o]) & (value[o] > 0)); };
    int m = middle < 128 ? static_cast<int>(middle) : 128;  // may be one off, and is for NaN
    m = value[o] > 0 ? std::max(0, std::min(m, 128)) : 128;
    while (m > 0 && !is_zero(m)) --m;
    while (m < 128 && is_zero(m + 1)) ++m;
    lowest[o] = -m, highest[o] = std::min(m, 127);
  }
}

// Packed bytes [outputs, inputs / 4] of one plane of trits, see quantize.py; values [groups].
void PackOne(const Row<int8_t>* codes, const Row<float>* scales, const Row<float>* values,
             const Shape& shape, int64_t outputs, uint8_t* packed) {
  const int64_t block = shape.block, pieces = std::max(shape.groups, shape.parts);
  const int64_t size = shape.inputs / pieces;  // of a piece, with the same scales throughout
  std::vector<int8_t> bounds(2 * pieces * kOutputs);
  for (int64_t i = 0; i < pieces; ++i)
    ZeroRange(scales[i * shape.parts / pieces], values[i * shape.groups / pieces],
              &bounds[2 * i * kOutputs], &bounds[(2 * i + 1) * kOutputs]);
  Row<uint8_t> bytes[kMaxBlock];
  for (int64_t start = 0; start < shape.inputs; start += 4 * block) {
    std::memset(bytes, 0, block * sizeof *bytes);
    for (int64_t j = 0; j < block; ++j)
      for (int slab = 3; slab >= 0; --slab) {
        const int64_t i = start + slab * block + j;
        const int8_t* own = &bounds[2 * (i / size) * kOutputs];
        Append({codes[i], own, own + kOutputs}, codes[i], kOutputs, bytes[j]);
      }
    Turn(bytes[0], kOutputs, block, outputs, packed + start / 4, shape.inputs / 4);
  }
}

// The nearest trits of a code of each output: trit + 1 of the first plane, 4 (trit + 1) of the
// second. scale: of the source.
INLINE void NearestTrits(const int8_t* codes, const float* scale, const float* first,
                         const float* second, uint8_t* trits) {
  constexpr int zero = 1 + 4;
  for (int o = 0; o < kOutputs; ++o) {
    const float x = fabsf(codes[o] * scale[o]);
    int found = zero;
    float sums[kSums], smallest = x;
    SumsOfTrits(first[o], second[o], sums);
    for (int s = 1; s < kSums; ++s) {  // `Nearest`
      const float distance = fabsf(x - sums[s]);
      found = distance < smallest ? zero + kA[s] + 4 * kB[s] : found;
      smallest = distance < smallest ? distance : smallest;
    }
    trits[o] = codes[o] < 0 ? 2 * zero - found : found;
  }
}

// The same of two planes, [outputs, inputs / 2]; values: [groups, 2].
void PackTwo(const Row<int8_t>* codes, const Row<float>* scales, const Row<float>* values,
             const Shape& shape, int64_t outputs, uint8_t* packed) {
  const int64_t block = shape.block, width = shape.inputs / 2;
  const int64_t pieces = std::max(shape.groups, shape.parts);  // with the same scales throughout
  Row<uint8_t> trits[4 * kMaxBlock], bytes[kMaxBlock];
  for (int64_t start = 0; start < shape.inputs; start += 4 * block) {
    for (int64_t i = 0; i < 4 * block; ++i) {
      const int64_t piece = (start + i) / (shape.inputs / pieces);
      const Row<float>* planes = values + piece * shape.groups / pieces * 2;
      NearestTrits(codes[start + i], scales[piece * shape.parts / pieces], planes[0], planes[1],
                   trits[i]);
    }
    for (int64_t p = 0; p < 2; ++p) {
      for (int64_t j = 0; j < block; ++j)
        for (int o = 0; o < kOutputs; ++o) {
          uint8_t byte = 0;
          for (int slab = 3; slab >= 0; --slab)
            byte = byte * 4 + (trits[slab * block + j][o] >> 2 * p & 3);
          bytes[j][o] = byte;
        }
      Turn(bytes[0], kOutputs, block, outputs, packed + start / 2 + p * block, width);
    }
  }
}

// The fit of up to kOutputs outputs, whose arrays these are; scales [parts, all outputs].
void FitTile(const int8_t* codes, int64_t stride, const float* scales, int64_t all, int64_t outputs,
             const Shape& shape, uint8_t* packed, int8_t* multipliers, float* unit) {
  const int64_t count = shape.groups * shape.planes;
  static thread_local kernels::Aligned kept(0);
  auto* tile = reinterpret_cast<Row<int8_t>*>(kernels::Kept(kept, shape.inputs * kOutputs));
  if (outputs < kOutputs) std::memset(tile, 0, shape.inputs * kOutputs);
  const auto source = std::make_unique<Row<float>[]>(shape.parts);
  const auto fitted = std::make_unique<Row<double>[]>(count);
  const auto values = std::make_unique<Row<float>[]>(count);
  const auto counts = std::make_unique<Counts>();
  for (int64_t i = 0; i < shape.inputs; ++i) {
    __builtin_prefetch(codes + std::min(i + 24, shape.inputs - 1) * stride);  // another page each
    std::memcpy(tile[i], codes + i * stride, outputs);
  }
  for (int64_t i = 0; i < shape.parts; ++i)
    std::memcpy(source[i], scales + i * all, outputs * sizeof(float));
  const auto fit = shape.parts > shape.groups ? FitParts : FitGroups;
  fit(tile, source.get(), shape, *counts, fitted.get());

  Row<float> units;
  if (multipliers == nullptr) {
    for (int o = 0; o < kOutputs; ++o) units[o] = values[0][o] = fitted[0][o];
  } else {
    AsMultiples(shape, fitted.get(), units);
    for (int64_t i = 0; i < count; ++i)
      for (int o = 0; o < kOutputs; ++o) values[i][o] = static_cast<float>(fitted[i][o]) * units[o];
    for (int64_t o = 0; o < outputs; ++o)
      for (int64_t i = 0; i < count; ++i) multipliers[o * count + i] = fitted[i][o];
  }
  std::memcpy(unit, units, outputs * sizeof(float));
  const auto pack = shape.planes == 1 ? PackOne : PackTwo;
  pack(tile, source.get(), values.get(), shape, outputs, packed);
}

}  // namespace

// Adds the magnitudes of codes [rows, outputs], rows `stride` bytes apart, to sums [outputs]. 0; -1
// for sizes that do not fit.
extern "C" int64_t AbsoluteSums(const int8_t* codes, int64_t stride, int64_t rows, int64_t outputs,
                                int64_t* sums) {
  if (rows < 0 || outputs < 0) return -1;
  AddMagnitudes(codes, stride, rows, outputs, sums);
  return 0;
}

// codes [rows, outputs], rows `stride` bytes apart, to packed [outputs, columns], `width` apart.
// lowest and highest [groups, outputs]: the range of 0 of each group of `size` rows, of which the
// first row is number `first`. What packed bytes hold beyond the rows is zeros. 0; -1 for sizes
// that do not fit.
extern "C" int64_t PackInt8(const int8_t* codes, int64_t stride, int64_t rows, int64_t outputs,
                            const int8_t* lowest, const int8_t* highest, int64_t groups,
                            int64_t size, int64_t first, int64_t block, uint8_t* packed,
                            int64_t columns, int64_t width) {
  const bool fits = rows >= 0 && outputs >= 0 && size > 0 && first >= 0 &&
                    first + rows <= groups * size && block > 0 && block <= kMaxBlock &&
                    columns % block == 0 && rows <= 4 * columns && columns <= width;
  if (!fits) return -1;
  for (int64_t o = 0; o < outputs; o += kColumns) {
    const int64_t count = std::min(kColumns, outputs - o);
    for (int64_t start = 0; start < columns; start += block) {
      Codes inputs[4 * kMaxBlock];
      for (int64_t i = 0; i < 4 * block; ++i) {
        const int64_t row = 4 * start + i, group = (first + row) / size * outputs;
        inputs[i] = row < rows
                        ? Codes{codes + row * stride + o, lowest + group + o, highest + group + o}
                        : Codes{kZeros, kZeros, kZeros};
      }
      PackBlock(inputs, block, count, packed + o * width + start, width);
    }
  }
  return 0;
}

// codes [inputs, outputs], rows `stride` bytes apart, and scales [parts, outputs] of a source; to
// packed [outputs, planes * inputs / 4], multipliers [outputs, groups, planes], which is null for
// one plane and group, and scales [outputs]. The planes are one or two; sizes divide each other as
// conversion.fit_int8 says. 0; -1 without memory.
extern "C" int64_t FitInt8(const int8_t* codes, int64_t stride, int64_t inputs, int64_t outputs,
                           const float* scales, int64_t parts, int64_t groups, int64_t planes,
                           int64_t block, uint8_t* packed, int8_t* multipliers, float* unit) {
  const Shape shape{inputs, parts, groups, planes, block};
  try {
    for (int64_t o = 0; o < outputs; o += kOutputs)
      FitTile(codes + o, stride, scales + o, outputs, std::min(kOutputs, outputs - o), shape,
              packed + o * planes * inputs / 4,
              multipliers == nullptr ? nullptr : multipliers + o * groups * planes, unit + o);
  } catch (const std::bad_alloc&) {
    return -1;
  }
  return 0;
}
