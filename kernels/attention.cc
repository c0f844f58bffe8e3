// Soft-capped attention that reads the cache as far as each query sees it. No logit is above the
// cap, so the softmax needs no maximum: sums of exp(logit - cap) and exp(logit - cap) v can just be
// added. They are made for each kPart slots by themselves, and added in order: so a result depends
// on its own query and slots only, not on other queries, rows or heads, nor on the threads.

#include <cmath>
#include <limits>
#include <utility>

#include "common.h"
#include "lanes.h"
#include "rotate.h"

namespace kernels {
namespace {

constexpr int64_t kSlots = 32;    // that are turned into float32 and taken at a time
constexpr int64_t kPart = 256;    // slots
constexpr int64_t kQueries = 64;  // rows of a task: queries of the heads that share keys and values

struct Attention {
  const void *q, *k, *v;     // [B, T, N, H], [B, K, S, H] twice; float32 or bfloat16
  const int32_t* positions;  // [B, T]
  void* out;                 // [B, T, N, H]
  int64_t batch, queries, heads, kv_heads, slots, size;
  float multiplier, cap;
  bool half;  // bfloat16
  int64_t group() const { return heads / kv_heads; }
  int64_t padded() const { return RoundUp(size, kWidth); }
  int64_t rows() const { return queries * group(); }  // of one key/value head: row = query, head
  int64_t offset(int64_t b, int64_t g, int64_t row) const {  // of a row in q and out
    return ((b * queries + row / group()) * heads + g * group() + row % group()) * size;
  }
  int64_t last(int64_t b, int64_t row) const {  // the last slot that a row sees; -1 for none
    return std::clamp<int64_t>(positions[b * queries + row / group()], -1, slots - 1);
  }
  int64_t last(int64_t b, int64_t first, int64_t count) const {  // that any of several rows sees
    int64_t largest = -1;
    for (int64_t i = 0; i < count; ++i) largest = std::max(largest, last(b, first + i));
    return largest;
  }
};

// Where the first (k = 0) or second (k = 1) of two that are added lies in two vectors: neighbours
// within fours, or neighbouring fours.
constexpr int Within(int i, int k) { return i / 4 * 4 + i % 4 / 2 * kWidth + 2 * (i % 2) + k; }
constexpr int Fours(int i, int k) { return (i / 4 * 2 + k) * 4 + i % 4; }

template <int (*At)(int, int), int... I>
INLINE Lanes AddedPairs(Lanes a, Lanes b, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(a, b, At(I, 0)...) + __builtin_shufflevector(a, b, At(I, 1)...);
}

// Lane i of the result is the sum of the lanes of v[i], where there are as many as lanes: what two
// vectors add becomes one, of all of them in each round.
template <int N>
INLINE Lanes Sums(const Lanes (&v)[N]) {
  if constexpr (N > 1) {
    constexpr auto at = N > kWidth / 4 ? Within : Fours;
    Lanes pairs[N / 2];
#pragma GCC unroll 8
    for (int i = 0; i < N / 2; ++i)
      pairs[i] = AddedPairs<at>(v[2 * i], v[2 * i + 1], std::make_integer_sequence<int, kWidth>());
    return Sums(pairs);
  }
  return v[0];
}

template <class T>
INLINE void Widen(const T* from, int64_t count, int64_t size, int64_t padded, float* out) {
  for (int64_t s = 0; s < count; ++s) {
    for (int64_t h = 0; h < size; ++h) out[s * padded + h] = ToFloat(from[s * size + h]);
    for (int64_t h = size; h < padded; ++h) out[s * padded + h] = 0;
  }
}

// Rows of H floats from the one at `at` on, of q, k, v or what is like them, filled up with zeros.
INLINE void ToFloats(const Attention& a, const void* from, int64_t at, int64_t count, float* out) {
  if (a.half)
    Widen(static_cast<const uint16_t*>(from) + at, count, a.size, a.padded(), out);
  else
    Widen(static_cast<const float*>(from) + at, count, a.size, a.padded(), out);
}

// A row of H floats to its place in an array like q, k and v.
INLINE void FromFloats(const Attention& a, const float* from, void* to, int64_t at) {
  for (int64_t h = 0; h < a.size; ++h)
    if (a.half)
      FromFloat(from[h], static_cast<uint16_t*>(to) + at + h);
    else
      FromFloat(from[h], static_cast<float*>(to) + at + h);
}

// What a thread has at hand, in float32.
struct Scratch {
  explicit Scratch(int64_t padded) {
    static thread_local Aligned kept(0);
    const int64_t floats = (kQueries + 2 * kSlots) * padded + 4 * kSlots;
    q = reinterpret_cast<float*>(Kept(kept, floats * sizeof(float)));
    k = q + kQueries * padded;
    v = k + kSlots * padded;
    weights = v + kSlots * padded;
  }
  float *q, *k, *v, *weights;  // [kQueries, H], [kSlots, H] twice, [4, kSlots]
};

// Products [R, kSlots] of R rows with the keys in scratch. As many as there are lanes are made at a
// time, each in lanes over H that are added up at the end: R shows in no result. A function of its
// own, whose vectors gcc 12 keeps in registers.
template <int R>
NOINLINE void Products(const float* q, const float* k, int64_t padded, float* out) {
  constexpr int S = kWidth / R;
  for (int64_t s = 0; s < kSlots; s += S) {
    Lanes sums[kWidth] = {};
    for (int64_t h = 0; h < padded; h += kWidth) {
      Lanes x[R];
      for (int r = 0; r < R; ++r) x[r] = LoadLanes(q + r * padded + h);
      for (int i = 0; i < S; ++i) {
        const Lanes key = LoadLanes(k + (s + i) * padded + h);
        for (int r = 0; r < R; ++r) sums[r * S + i] = MultiplyAdd(x[r], key, sums[r * S + i]);
      }
    }
    const Lanes results = Sums(sums);
    const auto* bytes = reinterpret_cast<const char*>(&results);
    for (int r = 0; r < R; ++r)
      std::memcpy(out + r * kSlots + s, bytes + r * S * sizeof(float), S * sizeof(float));
  }
}

// Turns the products of one row into the weights of its slots, 0 beyond the last; adds these up. A
// function of its own, whose multiply-adds are the same for every caller.
NOINLINE Lanes Weights(const Attention& a, int64_t last, float* products) {
  Lanes total = {};
  for (int64_t s = 0; s < kSlots; s += kWidth) {
    const Lanes logits = Tanh(LoadLanes(products + s) * (a.multiplier / a.cap)) * a.cap;
    const Lanes w = Indices() > static_cast<int32_t>(last - s) ? Lanes{} : Exp(logits - a.cap);
    std::memcpy(products + s, &w, sizeof w);
    total += w;
  }
  return total;
}

// Adds the values in scratch, times the weights [R, kSlots], to sums [R, H], V vectors of H.
template <int R, int V>
INLINE void AddValues(const float* weights, const float* v, int64_t padded, float* sums) {
  Lanes y[R][V];
  for (int r = 0; r < R; ++r)
    for (int i = 0; i < V; ++i) y[r][i] = LoadLanes(sums + r * padded + i * kWidth);
  for (int64_t s = 0; s < kSlots; ++s)
    for (int i = 0; i < V; ++i) {
      const Lanes value = LoadLanes(v + s * padded + i * kWidth);
      for (int r = 0; r < R; ++r)
        y[r][i] = MultiplyAdd(Filled(weights[r * kSlots + s]), value, y[r][i]);
    }
  for (int r = 0; r < R; ++r)
    for (int i = 0; i < V; ++i)
      std::memcpy(sums + r * padded + i * kWidth, &y[r][i], sizeof(Lanes));
}

// What the slots in scratch, s and those after it, give R rows: into their sums and totals.
template <int R>
INLINE void AddSlots(const Attention& a, int64_t b, int64_t row, int64_t s, const Scratch& scratch,
                     const float* q, float* sums, float* totals) {
  const int64_t padded = a.padded();
  Products<R>(q, scratch.k, padded, scratch.weights);
  for (int r = 0; r < R; ++r) {
    const Lanes more = Weights(a, a.last(b, row + r) - s, scratch.weights + r * kSlots);
    const Lanes total = LoadLanes(totals + r * kWidth) + more;
    std::memcpy(totals + r * kWidth, &total, sizeof total);
  }
  constexpr int V = std::min<int64_t>(4, kWidth / R);
  int64_t h = 0;
  for (; h + V * kWidth <= padded; h += V * kWidth)
    AddValues<R, V>(scratch.weights, scratch.v + h, padded, sums + h);
  for (; h < padded; h += kWidth) AddValues<R, 1>(scratch.weights, scratch.v + h, padded, sums + h);
}

// Sums over the slots of one part, for the rows from first on, whose queries are in scratch:
// [rows, H] of weighted values and, behind, the sum of the weights, kWidth floats for each row.
INLINE void PartSums(const Attention& a, int64_t b, int64_t g, int64_t first, int64_t rows,
                     int64_t part, Scratch& scratch, float* sums) {
  const int64_t padded = a.padded(), at = (b * a.kv_heads + g) * a.slots;
  float* totals = sums + rows * padded;
  std::memset(sums, 0, rows * (padded + kWidth) * sizeof(float));
  const int64_t end = std::min((part + 1) * kPart, a.last(b, first, rows) + 1);
  for (int64_t s = part * kPart; s < end; s += kSlots) {
    const int64_t count = std::min(kSlots, end - s);  // what lies behind is not read
    ToFloats(a, a.k, (at + s) * a.size, count, scratch.k);
    ToFloats(a, a.v, (at + s) * a.size, count, scratch.v);
    for (int64_t i = count * padded; i < kSlots * padded; ++i) scratch.k[i] = scratch.v[i] = 0;
    int64_t r = 0;
    for (; r + 4 <= rows; r += 4)
      AddSlots<4>(a, b, first + r, s, scratch, scratch.q + r * padded, sums + r * padded,
                  totals + r * kWidth);
    for (; r < rows; ++r)
      AddSlots<1>(a, b, first + r, s, scratch, scratch.q + r * padded, sums + r * padded,
                  totals + r * kWidth);
  }
}

// The sums of parts from begin to end, added in order, of the rows from first on.
void PartsSums(const Attention& a, int64_t b, int64_t g, int64_t first, int64_t rows, int64_t begin,
               int64_t end, float* sums) {
  static thread_local Aligned kept(0);
  const int64_t size = rows * (a.padded() + kWidth);
  float* more = reinterpret_cast<float*>(Kept(kept, size * sizeof(float)));
  Scratch scratch(a.padded());
  for (int64_t r = 0; r < rows; ++r)
    ToFloats(a, a.q, a.offset(b, g, first + r), 1, scratch.q + r * a.padded());
  PartSums(a, b, g, first, rows, begin, scratch, sums);
  for (int64_t part = begin + 1; part < end; ++part) {
    PartSums(a, b, g, first, rows, part, scratch, more);
    for (int64_t i = 0; i < size; ++i) sums[i] += more[i];
  }
}

// The output of the rows from first on, from their sums; zeros for one that sees no slot.
void Finish(const Attention& a, int64_t b, int64_t g, int64_t first, int64_t rows, float* sums) {
  for (int64_t r = 0; r < rows; ++r) {
    const float* weights = sums + rows * a.padded() + r * kWidth;
    float total = Total(LoadLanes(weights));
    if (total == 0) total = 1;
    float* row = sums + r * a.padded();
    for (int64_t h = 0; h < a.size; ++h) row[h] /= total;
    FromFloats(a, row, a.out, a.offset(b, g, first + r));
  }
}

void AttendAll(const Frame& frame, const Attention& a) {
  const int64_t rows = a.rows(), tiles = (rows + kQueries - 1) / kQueries;
  const int64_t parts = (a.slots + kPart - 1) / kPart, tasks = a.batch * a.kv_heads * tiles;
  const bool split = tasks < 4 * frame.threads();  // then parts are tasks, added up at the end
  const int64_t splits = split ? parts : 1, size = kQueries * (a.padded() + kWidth);
  Aligned memory(split ? tasks * parts * size * sizeof(float) : 0);
  float* sums = reinterpret_cast<float*>(memory.data);
  double seen = 0;
  for (int64_t b = 0; b < a.batch; ++b) seen += a.last(b, 0, rows) + 1;
  const double work = 4 * seen * a.kv_heads * rows * a.size;  // takes as long as to read so much
  struct Task {
    int64_t b, g, first, rows, parts;
  };
  auto task = [=](int64_t i) {
    const int64_t b = i / tiles / a.kv_heads, g = i / tiles % a.kv_heads;
    const int64_t first = i % tiles * kQueries;
    const int64_t count = std::min(kQueries, rows - first);
    return Task{b, g, first, count, a.last(b, first, count) / kPart + 1};
  };
  Parallel(frame, tasks * splits, work, [=](int64_t i) {
    static thread_local Aligned kept(0);
    const Task t = task(i / splits);
    const int64_t part = i % splits;
    if (part >= t.parts) return;
    float* to =
        split ? sums + i * size : reinterpret_cast<float*>(Kept(kept, size * sizeof(float)));
    PartsSums(a, t.b, t.g, t.first, t.rows, part, split ? part + 1 : t.parts, to);
    if (!split) Finish(a, t.b, t.g, t.first, t.rows, to);
  });
  if (!split) return;
  for (int64_t i = 0; i < tasks; ++i) {
    const Task t = task(i);
    float* to = sums + i * parts * size;
    for (int64_t part = 1; part < t.parts; ++part)
      for (int64_t j = 0; j < size; ++j) to[j] += to[part * size + j];
    Finish(a, t.b, t.g, t.first, t.rows, to);
  }
}

// An attention whose arrays fit each other; throws what does not. Adds their sizes.
Attention AttentionOf(const Frame& frame, Sizes& sizes, const Array& q, const Array& k,
                      const Array& v, const Array& positions, const Array& out) {
  const float multiplier = frame.Float("multiplier"), cap = frame.Float("cap");
  CheckFloats("q", q);
  sizes.Match("q [B, T, N, H]", q);
  sizes.Match("k [B, K, S, H]", k, q.dtype);
  sizes.Match("v [B, K, S, H]", v, q.dtype);
  const auto* position = sizes.Match<int32_t>("positions [B, T]", positions);
  sizes.Match("result [B, T, N, H]", out, q.dtype);
  const int64_t heads = sizes["N"], kv_heads = sizes["K"], slots = sizes["S"];
  Check(kv_heads > 0 && heads % kv_heads == 0, heads, " query heads cannot share ", kv_heads,
        " key/value heads");
  Check(slots > 0, "a cache without slots");
  Check(cap > 0 && std::exp(-2 * cap) >= std::numeric_limits<float>::min(), "cap ", cap,
        " is not above 0, or exp(-2 cap) is no normal float32");
  return {q.data, k.data,   v.data, position,   out.data,   sizes["B"], sizes["T"],
          heads,  kv_heads, slots,  sizes["H"], multiplier, cap,        q.dtype == BF16};
}

// q [B, T, N, H] over k, v [B, K, S, H], all float32 or all bfloat16, and positions int32 [B, T]
// -> as q. A query sees the slots up to its position, and is zeros if that is negative.
void Attend(const Frame& frame) {
  const auto [q, k, v, positions, out] = frame.Arrays<4, 1>();
  Sizes sizes;
  AttendAll(frame, AttentionOf(frame, sizes, q, k, v, positions, out));
}

// --- The gradient --------------------------------------------------------------------------------

constexpr int kGradientRows = kWidth / 2;  // two vectors of each stay in registers

// The gradient of one key/value head: some rows at a time, whose weights over all slots are made
// again and kept. All arrays are float32, and rows of H numbers are filled up to whole lanes.
struct GradientTask {
  const Attention& a;
  int64_t b, stride;           // of transposed rows
  const float *q, *y, *dy;     // [rows, H]
  const float* k;              // [slots, H]; slots: a multiple of kSlots
  const float *keys, *values;  // [H, stride], transposed
  float *dq, *dk, *dv;         // zeros before
  float *capped, *weights;     // [slots / kSlots, kGradientRows, kSlots]
};

// Adds weights [R, kSlots], transposed, times rows [R, H] to sums [kSlots, H], V vectors of H.
template <int R, int V>
INLINE void AddOuter(const float* weights, const float* rows, int64_t padded, float* sums) {
  Lanes x[R][V];
  for (int r = 0; r < R; ++r)
    for (int i = 0; i < V; ++i) x[r][i] = LoadLanes(rows + r * padded + i * kWidth);
  for (int64_t s = 0; s < kSlots; ++s)
    for (int i = 0; i < V; ++i) {
      Lanes sum = LoadLanes(sums + s * padded + i * kWidth);
      for (int r = 0; r < R; ++r) sum = MultiplyAdd(Filled(weights[r * kSlots + s]), x[r][i], sum);
      std::memcpy(sums + s * padded + i * kWidth, &sum, sizeof sum);
    }
}

// Products [R, kSlots] of R rows [R, H] with columns of a transposed matrix [H, stride].
template <int R>
INLINE void ProductsWithColumns(const float* rows, int64_t padded, const float* columns,
                                int64_t stride, float* out) {
  constexpr int V = kWidth / R;
  for (int64_t s = 0; s < kSlots; s += V * kWidth) {
    Lanes sums[R][V] = {};
    for (int64_t h = 0; h < padded; ++h)
      for (int i = 0; i < V; ++i) {
        const Lanes column = LoadLanes(columns + h * stride + s + i * kWidth);
        for (int r = 0; r < R; ++r)
          sums[r][i] = MultiplyAdd(Filled(rows[r * padded + h]), column, sums[r][i]);
      }
    for (int r = 0; r < R; ++r) std::memcpy(out + r * kSlots + s, sums[r], sizeof sums[r]);
  }
}

void Gradient(const GradientTask& t) {
  constexpr int R = kGradientRows, V = kWidth / R;  // of sums that stay in registers
  const Attention& a = t.a;
  const int64_t padded = a.padded(), tile = R * kSlots;
  float change[R * kSlots];
  for (int64_t first = 0; first < RoundUp(a.rows(), R); first += R) {
    const int64_t count = std::min<int64_t>(R, a.rows() - first), at = first * padded;
    const int64_t end = a.last(t.b, first, count) + 1;
    Lanes totals[R] = {}, mean[R] = {};
    for (int64_t s = 0; s < end; s += kSlots) {
      float* capped = t.capped + s / kSlots * tile;
      float* weights = t.weights + s / kSlots * tile;
      ProductsWithColumns<R>(t.q + at, padded, t.keys + s, t.stride, capped);
      for (int64_t r = 0; r < R; ++r) {
        const int64_t last = r < count ? a.last(t.b, first + r) : -1;
        for (int64_t i = 0; i < kSlots; i += kWidth) {
          const Lanes c = Tanh(LoadLanes(capped + r * kSlots + i) * (a.multiplier / a.cap));
          const Lanes w =
              Indices() > static_cast<int32_t>(last - s - i) ? Lanes{} : Exp((c - 1.f) * a.cap);
          std::memcpy(capped + r * kSlots + i, &c, sizeof c);
          std::memcpy(weights + r * kSlots + i, &w, sizeof w);
          totals[r] += w;
        }
      }
    }
    for (int64_t r = 0; r < R; ++r) {
      const float total = Total(totals[r]);
      float product = 0;
      for (int64_t h = 0; h < padded; ++h)
        product += t.y[at + r * padded + h] * t.dy[at + r * padded + h];
      totals[r] = Filled(total > 0 ? 1 / total : 0);
      mean[r] = Filled(product);
    }
    for (int64_t s = 0; s < end; s += kSlots) {
      const float* capped = t.capped + s / kSlots * tile;
      float* weights = t.weights + s / kSlots * tile;
      ProductsWithColumns<R>(t.dy + at, padded, t.values + s, t.stride, change);
      for (int64_t r = 0; r < R; ++r)
        for (int64_t i = 0; i < kSlots; i += kWidth) {
          const int64_t j = r * kSlots + i;
          const Lanes c = LoadLanes(capped + j), w = LoadLanes(weights + j) * totals[r];
          const Lanes d = w * (LoadLanes(change + j) - mean[r]) * (1.f - c * c) * a.multiplier;
          std::memcpy(weights + j, &w, sizeof w);
          std::memcpy(change + j, &d, sizeof d);
        }
      const int64_t there = s * padded;
      int64_t h = 0;
      for (; h + V * kWidth <= padded; h += V * kWidth) {
        AddValues<R, V>(change, t.k + there + h, padded, t.dq + at + h);
        AddOuter<R, V>(change, t.q + at + h, padded, t.dk + there + h);
        AddOuter<R, V>(weights, t.dy + at + h, padded, t.dv + there + h);
      }
      for (; h < padded; h += kWidth) {
        AddValues<R, 1>(change, t.k + there + h, padded, t.dq + at + h);
        AddOuter<R, 1>(change, t.q + at + h, padded, t.dk + there + h);
        AddOuter<R, 1>(weights, t.dy + at + h, padded, t.dv + there + h);
      }
    }
  }
}

void AttendGradients(const Frame& frame, const Attention& a, const void* y, const void* dy,
                     void* dk, void* dv) {
  const int64_t padded = a.padded(), slots = RoundUp(a.slots, kSlots);
  // Not a power of two, so that rows do not compete for the same lines of a cache.
  const int64_t stride = slots + kSlots / 2;
  const int64_t rows = RoundUp(a.rows(), kGradientRows);
  const double flops = 1. * a.batch * a.heads * a.queries * slots * a.size;
  Parallel(frame, a.batch * a.kv_heads, flops, [=](int64_t i) {
    const int64_t b = i / a.kv_heads, g = i % a.kv_heads;
    static thread_local Aligned kept(0);
    const int64_t floats = (4 * rows + 4 * slots + 2 * stride) * padded + 2 * kGradientRows * slots;
    float* next = reinterpret_cast<float*>(Kept(kept, floats * sizeof(float)));
    std::memset(next, 0, floats * sizeof(float));
    auto take = [&next](int64_t count) { return (next += count) - count; };
    auto rows_of = [=](const void* from, float* to) {
      for (int64_t r = 0; r < a.rows(); ++r)
        ToFloats(a, from, a.offset(b, g, r), 1, to + r * padded);
      return to;
    };
    auto transposed = [=](const float* from, float* to) {
      for (int64_t s = 0; s < a.slots; ++s)
        for (int64_t h = 0; h < a.size; ++h) to[h * stride + s] = from[s * padded + h];
      return to;
    };
    const int64_t many = rows * padded, all = slots * padded, turned = stride * padded;
    GradientTask t{a, b, stride};
    t.q = rows_of(a.q, take(many)), t.y = rows_of(y, take(many)), t.dy = rows_of(dy, take(many));
    float *k = take(all), *v = take(all);
    ToFloats(a, a.k, i * a.slots * a.size, a.slots, k);
    ToFloats(a, a.v, i * a.slots * a.size, a.slots, v);
    t.k = k, t.keys = transposed(k, take(turned)), t.values = transposed(v, take(turned));
    t.dq = take(many), t.dk = take(all), t.dv = take(all);
    t.capped = take(kGradientRows * slots), t.weights = take(kGradientRows * slots);
    Gradient(t);
    for (int64_t r = 0; r < a.rows(); ++r)
      FromFloats(a, t.dq + r * padded, a.out, a.offset(b, g, r));
    for (int64_t s = 0; s < a.slots; ++s) {
      FromFloats(a, t.dk + s * padded, dk, (i * a.slots + s) * a.size);
      FromFloats(a, t.dv + s * padded, dv, (i * a.slots + s) * a.size);
    }
  });
}

// What `Attend` takes, its output y and the gradient dy of that -> those of q, k and v.
void AttendGradient(const Frame& frame) {
  const auto [q, k, v, positions, y, dy, dq, dk, dv] = frame.Arrays<6, 3>();
  Sizes sizes;
  const Attention a = AttentionOf(frame, sizes, q, k, v, positions, dq);
  sizes.Match("y [B, T, N, H]", y, q.dtype);
  sizes.Match("dy [B, T, N, H]", dy, q.dtype);
  sizes.Match("dk [B, K, S, H]", dk, q.dtype);
  sizes.Match("dv [B, K, S, H]", dv, q.dtype);
  AttendGradients(frame, a, y.data, dy.data, dk.data, dv.data);
}

// --- Writing the cache ---------------------------------------------------------------------------

// Rows [B, T, K], of so many bytes each, into the slots [B, T] of a cache [B, K, S]; those that it
// does not have are dropped.
void Write(const void* rows, const int32_t* slot_of, int64_t batch, int64_t count, int64_t heads,
           int64_t there, int64_t bytes, void* cache) {
  const auto* from = static_cast<const char*>(rows);
  auto* to = static_cast<char*>(cache);
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t t = 0; t < count; ++t) {
      const int64_t slot = slot_of[b * count + t];
      for (int64_t k = 0; k < heads; ++k, from += bytes)
        if (slot >= 0 && slot < there)
          std::memcpy(to + ((b * heads + k) * there + slot) * bytes, from, bytes);
    }
}

// new rows [B, T, K, H] into the slots int32 [B, T] of a cache [B, K, S, H], which is the output,
// too; those that it does not have are dropped.
void WriteSlots(const Frame& frame) {
  const auto [before, rows, slots, cache] = frame.Arrays<3, 1>();
  Sizes sizes;
  sizes.Match("cache [B, K, S, H]", cache);
  sizes.Match("rows [B, T, K, H]", rows, cache.dtype);
  const auto* slot_of = sizes.Match<int32_t>("slots [B, T]", slots);
  Check(before.data == cache.data, "the cache is not the output");
  const int64_t width = WidthOf(cache.dtype);
  Check(width > 0, "the cache is ", cache.dtype, ", whose numbers have no known size");
  Write(rows.data, slot_of, sizes["B"], sizes["T"], sizes["K"], sizes["S"], sizes["H"] * width,
        cache.data);
}

// q [B, T, N, H], new keys and values [B, T, K, H], caches [B, K, S, H] of both, which are outputs,
// too, positions int32 [B, T], frequencies float32 [H / 2] -> what `Attend` gives, after q and the
// new keys were rotated as by `Rotate`, and they and the new values written to the slots that their
// positions are.
void AttendAndWrite(const Frame& frame) {
  const auto [q, k, v, old_keys, old_values, positions, frequencies, out, keys, values] =
      frame.Arrays<7, 3>();
  Sizes sizes;
  Attention a = AttentionOf(frame, sizes, q, keys, values, positions, out);
  sizes.Match("new keys [B, T, K, H]", k, q.dtype);
  sizes.Match("new values [B, T, K, H]", v, q.dtype);
  const auto* frequency = sizes.Match<float>("frequencies [H / 2]", frequencies);
  const int64_t half = sizes["H / 2"], tokens = a.batch * a.queries;
  Check(a.size == 2 * half, "heads of ", a.size, " numbers, but ", half, " frequencies");
  Check(old_keys.data == keys.data && old_values.data == values.data, "a cache is not an output");
  const int64_t bytes = a.size * WidthOf(q.dtype);
  static thread_local Aligned kept(0);
  char* rotated = Kept(kept, tokens * (a.heads + a.kv_heads) * bytes);
  char* new_keys = rotated + tokens * a.heads * bytes;
  auto rotate = [&](const Array& x, int64_t heads, char* to) {
    RotateTokens(frame, q.dtype, x.data, a.positions, frequency, tokens, heads, half, to);
  };
  rotate(q, a.heads, rotated), rotate(k, a.kv_heads, new_keys);
  auto write = [&](const void* rows, void* cache) {
    Write(rows, a.positions, a.batch, a.queries, a.kv_heads, a.slots, bytes, cache);
  };
  write(new_keys, keys.data), write(v.data, values.data);
  a.q = rotated;
  AttendAll(frame, a);
}

}  // namespace

KERNEL(Attend)
KERNEL(AttendGradient)
KERNEL(WriteSlots)
KERNEL(AttendAndWrite)

}  // namespace kernels
