// Products of packed ternary matrices on a CPU, for JAX through XLA's foreign function interface.
//
// A packed matrix has a row of B bytes for each output, or groups of 64 outputs side by side, see
// ternary.h; quantize.py says what a byte holds. Here the activations are put in order, and each
// group goes to a path that the processor has; rows are first made a group. A product is
//
//     sum over bytes j and slabs r of (byte[j] >> 2 r & 3) * x[j, r]  -  sum of all activations
//
// in exact int32. Where groups of inputs have multipliers, and several planes of trits add up,
// codes are sums of trits times multipliers, within int8. All paths give the same integers.

#include "ternary.h"

#include <cmath>
#include <vector>

#include "common.h"
#include "lanes.h"

#if defined(TERNARY_AMX)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace kernels {
namespace {

constexpr int64_t kWidest = 1 << 20;     // bytes of an output: no int32 sum of any path is exceeded
constexpr int64_t kTaskBytes = 1 << 17;  // that a thread reads at a time, where there are many
constexpr int64_t kCacheLine = 64;
constexpr int64_t kFewRows = 8;     // in all groups that are multiplied before the other matrix is
constexpr int64_t kMostRows = 128;  // that stay in a cache while all groups are multiplied

// --- Paths ---------------------------------------------------------------------------------------

struct Path {
  const char* name;
  void (*multiply)(const Group&);
};

// Those that this library has, from the slowest to the fastest: building.py compiles what the
// processor takes.
const std::vector<Path>& Paths() {
  static const std::vector<Path> paths = [] {
    std::vector<Path> found = {{"plain", PlainGroup}};
#if defined(TERNARY_AVX2)
    found.push_back({"avx2", Avx2Group});
#endif
#if defined(TERNARY_AVXVNNI)
    found.push_back({"avxvnni", AvxVnniGroup});
#endif
#if defined(TERNARY_AVX512)
    found.push_back({"avx512", Avx512Group});
#endif
#if defined(TERNARY_AMX)
    if (syscall(SYS_arch_prctl, 0x1023, 18) == 0)  // the system has to be asked for tiles
      found.push_back({"amx", AmxGroup});
#endif
#if defined(TERNARY_NEON)
    found.push_back({"neon", NeonGroup});
#endif
    return found;
  }();
  return paths;
}

// --- Groups --------------------------------------------------------------------------------------

// Rows of `bytes` each as a group: [quads, 64, 4], zeros where there are no such rows.
void Interleave(const uint8_t* rows, int64_t count, int64_t bytes, uint8_t* to) {
  const int64_t whole = bytes / kCacheLine * kCacheLine;
  if (count < kLanes || whole < bytes) std::memset(to, 0, RoundUp(bytes, 4) * kLanes);
  for (int64_t begin = 0; begin < whole; begin += kCacheLine)
    for (int64_t o = 0; o < count; ++o) {
      const uint8_t* line = rows + o * bytes + begin;
      __builtin_prefetch(line + 4 * kCacheLine);  // of more rows than a processor foresees
#pragma GCC unroll 16
      for (int64_t j = 0; j < kCacheLine; j += 4)
        std::memcpy(to + (begin + j) * kLanes + 4 * o, line + j, 4);
    }
  for (int64_t j = whole; j < bytes; j += 4)
    for (int64_t o = 0; o < count; ++o)
      std::memcpy(to + j * kLanes + 4 * o, rows + o * bytes + j, std::min<int64_t>(4, bytes - j));
}

// --- What is multiplied --------------------------------------------------------------------------

struct Packing {
  bool grouped;
  int64_t all, planes, groups;  // packed bytes of an output, P, G
  bool operator==(const Packing& other) const {
    return grouped == other.grouped && all == other.all && planes == other.planes &&
           groups == other.groups;
  }
};

// A packed matrix of each expert.
struct Weight {
  Packing packing;
  const uint8_t* packed;
  const int8_t* multipliers;
  const float* scales;  // [E, 1, C]
  int64_t experts, outputs, columns;
};

// A weight that fits the sizes of x and its own result; throws what does not.
Weight WeightOf(Sizes sizes, const Array& packed, const Array& multipliers, const Array& scales,
                int64_t block) {
  const bool grouped = packed.rank == 5;
  Weight w;
  w.packed = sizes.Match<uint8_t>(grouped ? "packed [E, N, Q, 64, 4]" : "packed [E, O, B]", packed);
  w.multipliers = sizes.Match<int8_t>(
      grouped ? "multipliers [E, N, G, P, 64]" : "multipliers [E, O, G, P]", multipliers);
  w.scales = sizes.Match<float>("scales [E, 1, C]", scales);
  if (grouped) {
    Check(sizes["64"] == kLanes && sizes["4"] == 4, "groups of ", sizes["64"], " outputs with ",
          sizes["4"], " bytes each, which are 64 and 4");
    Check(sizes["O"] == sizes["N"] * kLanes, sizes["O"], " outputs are not ", sizes["N"],
          " groups of 64");
  }
  const int64_t columns = sizes["C"];
  Check(sizes["1"] == 1 && (columns == 1 || columns == sizes["O"]), "scales [E, 1, C] have ",
        sizes["1"], " rows and ", columns, " columns for ", sizes["O"], " outputs");
  const int64_t all = grouped ? 4 * sizes["Q"] : sizes["B"], groups = sizes["G"],
                planes = sizes["P"], bytes = all / std::max<int64_t>(1, planes);
  Check(planes == 1 || (planes == 2 && groups), planes, " planes with ", groups,
        " groups of multipliers; what there is are one, and two with multipliers");
  Check(all <= kWidest, all, " packed bytes of an output, more than ", kWidest);
  Check(sizes["I"] <= 4 * bytes, sizes["I"], " inputs do not fit ", bytes, " packed bytes");
  Check(block > 0 && bytes % block == 0 && all == planes * bytes, all,
        " packed bytes are no whole blocks of ", block, " for each of ", planes, " planes");
  const int64_t blocks = bytes / block;
  Check(groups < 2 || groups == blocks || groups == 2 * blocks || groups == 4 * blocks, groups,
        " groups are neither 1 nor 1, 2 or 4 for each of ", blocks, " blocks");
  Check(!groups || 4 * bytes * 127 * 127 < 1ll << 31, 4 * bytes,
        " inputs with multipliers, whose sums might exceed int32");
  w.packing = {grouped, all, planes, groups};
  w.experts = sizes["E"], w.outputs = sizes["O"], w.columns = columns;
  return w;
}

// What all groups of outputs have in common.
Group ProblemOf(const Packing& packing, int64_t block) {
  Group p{};
  p.planes = packing.planes, p.groups = packing.groups;
  p.bytes = packing.all / packing.planes;
  p.quads = RoundUp(p.bytes, 4) / 4;
  // Not a power of two, so that rows do not compete for the same lines of a cache.
  p.width = RoundUp(p.quads * kInputs, kCacheLine) + kCacheLine;
  p.block = std::max<int64_t>(1, block / 4), p.block_bytes = block;
  const int64_t blocks = p.bytes / block;
  p.of_block = std::max<int64_t>(1, p.groups / std::max<int64_t>(1, blocks));
  p.parts = p.groups ? blocks * p.of_block : 0;
  return p;
}

// A row of integers, as `Rows::Set` takes it: one, or as many as there are lanes.
struct GivenRow {
  const int8_t* x;
  int32_t One(int64_t i) const { return x[i]; }
  INLINE IntLanes Some(int64_t i) const { return LoadIntegers(x + i); }
};

// One of floats, rounded as quantize.quantize_rows does it: int8, or a half of int15.
enum Half { kWhole, kHigh, kLow };
template <class T, Half half>
struct RoundedRow {
  const T* x;
  float step;
  int32_t One(int64_t i) const { return Own(Rounded(ToFloat(x[i]) / step)); }
  INLINE IntLanes Some(int64_t i) const { return Own(Rounded(LoadLanes(x + i) / step)); }

 private:
  template <class Integer>
  static INLINE Integer Own(Integer v) {
    const Integer high = (v + 64) >> 7;
    return half == kWhole ? v : half == kHigh ? high : v - 128 * high;
  }
};

// Rows of activations, int8, as `Group` has them. Each is set by itself.
class Rows {
 public:
  Rows(const Group& problem, int64_t rows)
      : problem_(problem),
        memory_(Kept(kept_, (rows + kRowTile) * problem.width)),
        sums_(rows),
        part_sums_(rows * problem.parts),
        used_(rows) {}

  template <class Integers>
  void Set(int64_t row, const Integers& integers, int64_t inputs) {
    const int64_t size = problem_.block_bytes, of_block = problem_.of_block;
    int32_t* part_sums = part_sums_.data() + row * problem_.parts;
    int8_t* to = At(row);
    if (inputs < problem_.quads * kInputs) std::memset(to, 0, problem_.width);
    IntLanes sum = {};
    for (int64_t begin = 0; begin < inputs; begin += 4 * size) {
      auto part_sum = [&](int64_t r) -> int32_t& {
        return part_sums[begin / (4 * size) * of_block + r * of_block / 4];
      };
      if (size % kWidth == 0 && inputs - begin >= 4 * size) {
        IntLanes of_slab[4] = {};
        for (int64_t i = 0; i < size; i += kWidth) {
          BitLanes bytes = {};  // of an input of each slab
#pragma GCC unroll 4
          for (int r = 0; r < 4; ++r) {
            const IntLanes some = integers.Some(begin + r * size + i);
            of_slab[r] += some, bytes |= ((BitLanes)some & 255) << 8 * r;
          }
          Turn(bytes, to + begin + 4 * i);
        }
#pragma GCC unroll 4
        for (int r = 0; r < 4; ++r) {
          sum += of_slab[r];
          if (problem_.parts) part_sum(r) += Total(of_slab[r]);
        }
      } else {
        for (int64_t i = 0; i < std::min(4 * size, inputs - begin); ++i) {
          const int64_t r = i / size, byte = begin / 4 + i % size;
          const int32_t one = integers.One(begin + i);
          to[byte / 4 * kInputs + 4 * r + byte % 4] = one, sum[0] += one;
          if (problem_.parts) part_sum(r) += one;
        }
      }
    }
    sums_[row] = Total(sum), used_[row] = 1;
  }
  void SetZeros(int64_t row, bool used) {
    std::memset(At(row), 0, problem_.width);
    used_[row] = used;
  }

  // Of so many from `begin` on, those up to the last that is used: padding costs nothing.
  int64_t Used(int64_t begin, int64_t count) const {
    while (count > 0 && !used_[begin + count - 1]) --count;
    return count;
  }
  Group Of(int64_t begin, int64_t count) const {
    Group p = problem_;
    p.x = At(begin), p.rows = count;
    p.sums = sums_.data() + begin;
    p.part_sums = part_sums_.data() + begin * problem_.parts;
    return p;
  }

 private:
  // In each quad, the bytes of four lanes: those of a slab side by side.
  static INLINE void Turn(BitLanes lanes, int8_t* to) {
    typedef int8_t Quad __attribute__((vector_size(kInputs)));
#pragma GCC unroll 4
    for (int j = 0; j < kWidth / 4; ++j) {
      Quad v;
      std::memcpy(&v, reinterpret_cast<const char*>(&lanes) + j * sizeof v, sizeof v);
      v = __builtin_shufflevector(v, v, 0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
      std::memcpy(to + j * sizeof v, &v, sizeof v);
    }
  }
  int8_t* At(int64_t row) const {
    return reinterpret_cast<int8_t*>(memory_) + row * problem_.width;
  }
  Group problem_;
  char* memory_;  // of this thread, which waits for the others
  static thread_local Aligned kept_;
  std::vector<int32_t> sums_, part_sums_;
  std::vector<char> used_;
};

thread_local Aligned Rows::kept_(0);

// The sums of 64 outputs of an expert from `first` on; zeros, or anything, beyond the last.
void Multiply(const Path& path, Group p, const Weight& weight, int64_t expert, int64_t first,
              int32_t* sums) {
  const auto& [grouped, all, planes, groups] = weight.packing;
  const int64_t there = std::min(kLanes, weight.outputs - first);
  const int64_t output = expert * weight.outputs + first;
  p.packed = weight.packed + output * all;
  if (groups) p.multipliers = weight.multipliers + output * groups * planes;
  p.out = sums, p.stride = kLanes;
  static thread_local Aligned kept(0), kept_multipliers(0);
  if (!grouped) {
    auto* quad = reinterpret_cast<uint8_t*>(Kept(kept, RoundUp(all, 4) * kLanes));
    Interleave(p.packed, there, all, quad);
    p.packed = quad;
    if (groups) {
      char* side_by_side = Kept(kept_multipliers, groups * planes * kLanes);
      for (int64_t i = 0; i < groups * planes; ++i)
        for (int64_t o = 0; o < kLanes; ++o)
          side_by_side[i * kLanes + o] = o < there ? p.multipliers[o * groups * planes + i] : 0;
      p.multipliers = reinterpret_cast<int8_t*>(side_by_side);
    }
  }
  path.multiply(p);
}

// --- What becomes of the sums --------------------------------------------------------------------

// Floats as the dtype of the activations holds them.
INLINE Lanes RoundedTo(Lanes x, const float*) { return x; }
INLINE Lanes RoundedTo(Lanes x, const uint16_t*) {
  const BitLanes bits = HalvesAbove(x) & 0xffff0000u;
  std::memcpy(&x, &bits, sizeof bits);
  return x;
}

// 16 sums of a row, or of its two halves, times scales and step. (128 of one sum is exact.)
template <class T>
INLINE Lanes Scaled(const int32_t* sums, bool halves, bool trits, const float* scales, float step) {
  IntLanes high, low = {};
  std::memcpy(&high, sums, sizeof high);
  if (halves) std::memcpy(&low, sums + kLanes, sizeof low);
  if (halves && trits) high = 128 * high + low;
  Lanes sum = __builtin_convertvector(high, Lanes);
  if (halves && !trits) sum = 128.f * sum + __builtin_convertvector(low, Lanes);
  return RoundedTo(sum * (LoadLanes(scales) * step), static_cast<T*>(nullptr));
}

// jax.nn.gelu, x (1 + tanh(y)) / 2, which is x / (1 + exp(-2 y)).
INLINE Lanes Gelu(Lanes x) {
  const Lanes limit = Filled(80.f);  // of what has an exponential, and the other way around
  Lanes z = -1.59576912f * x * (0.044715f * x * x + 1.f);
  z = z > limit ? limit : z < -limit ? -limit : z;
  return x / (1.f + Exp(z));
}

// --- The products --------------------------------------------------------------------------------

struct Call {
  const Path* path;
  Group problem;
  std::vector<Weight> weights;
  std::vector<void*> out;  // of each weight, or gated of both
  const int32_t* experts;  // [blocks]
  int64_t blocks, rows, inputs, levels;
  bool gated;
};

// Rows side by side that are multiplied at once, with one expert's matrix: those that are used, and
// with padding.
struct Stretch {
  int64_t expert, begin, used, rows;
};

// All rows of a call: blocks that follow each other and have one expert are joined, then divided
// into equal parts of up to `kMostRows` that are used. rows: `halves` of them for each of the call
std::vector<Stretch> StretchesOf(const Call& call, const Rows& rows, int64_t halves) {
  std::vector<Stretch> stretches;
  for (int64_t b = 0, end; b < call.blocks; b = end) {
    const int64_t expert = call.experts[b], begin = b * call.rows;
    for (end = b; end < call.blocks && call.experts[end] == expert;) ++end;
    const int64_t all = (end - b) * call.rows;
    const bool there = 0 <= expert && expert < call.weights[0].experts;
    const int64_t used = there ? rows.Used(halves * begin, halves * all) / halves : 0;
    const int64_t parts = std::max<int64_t>(1, (used + kMostRows - 1) / kMostRows);
    for (int64_t i = 0; i < parts; ++i) {
      const int64_t first = i * used / parts, last = (i + 1) * used / parts;
      const int64_t next = i + 1 < parts ? last : all;
      stretches.push_back({expert, begin + first, last - first, next - first});
    }
  }
  return stretches;
}

// Calls f(weight, stretch, first, groups) until all groups of 64 outputs were given out, of each
// stretch and each weight, or of the first of two gated ones: as many at a time, from the output
// `first` on, as have `few` rows in all, or one, or fewer where a stretch or a task ends.
template <class F>
void ForGroups(const Frame& frame, const Call& call, const std::vector<Stretch>& stretches,
               int64_t few, F f) {
  const int64_t weights = call.gated ? 1 : call.weights.size(), all = call.weights[0].packing.all;
  std::vector<int64_t> ends(weights);  // of the groups of each, all stretches
  int64_t count = 0;
  for (int64_t i = 0; i < weights; ++i)
    ends[i] = count += stretches.size() * (RoundUp(call.weights[i].outputs, kLanes) / kLanes);
  const int64_t wanted = std::max<int64_t>(1, count / (4 * frame.threads()));
  const int64_t task = std::min(wanted, 1 + kTaskBytes / (1 + kLanes * all));
  const double bytes = 1. * count * kLanes * all * (1 + call.gated);
  Parallel(frame, RoundUp(count, task) / task, bytes, [=, &call, &stretches](int64_t i) {
    for (int64_t g = i * task, some; g < std::min(count, (i + 1) * task); g += some) {
      const int64_t w = std::upper_bound(ends.begin(), ends.end(), g) - ends.begin();
      const int64_t own = g - (w ? ends[w - 1] : 0);
      const int64_t groups = RoundUp(call.weights[w].outputs, kLanes) / kLanes;
      const Stretch& part = stretches[own / groups];
      const int64_t most = std::max<int64_t>(1, few / std::max<int64_t>(1, part.used));
      some = std::min({most, std::min(count, (i + 1) * task) - g, groups - own % groups});
      f(w, part, own % groups * kLanes, some);
    }
  });
}

// The sums themselves, of int8 rows.
void Sums(const Frame& frame, const Call& call, const int8_t* x) {
  const int64_t all = call.blocks * call.rows;
  Rows rows(call.problem, all);
  Parallel(frame, all, 1. * all * call.inputs, [&](int64_t row) {
    const int8_t* from = x + row * call.inputs;
    const bool used = std::any_of(from, from + call.inputs, [](int8_t v) { return v != 0; });
    used ? rows.Set(row, GivenRow{from}, call.inputs) : rows.SetZeros(row, false);
  });
  const std::vector<Stretch> stretches = StretchesOf(call, rows, 1);
  ForGroups(frame, call, stretches, 1, [&](int64_t w, const Stretch& part, int64_t first, int64_t) {
    const Weight& weight = call.weights[w];
    const int64_t outputs = weight.outputs, there = std::min(kLanes, outputs - first);
    int32_t* to = static_cast<int32_t*>(call.out[w]) + part.begin * outputs + first;
    const Group p = rows.Of(part.begin, part.used);
    static thread_local Aligned kept(0);
    auto* sums = reinterpret_cast<int32_t*>(Kept(kept, p.rows * kLanes * sizeof(int32_t)));
    if (p.rows) Multiply(*call.path, p, weight, part.expert, first, sums);
    for (int64_t m = 0; m < part.rows; ++m, to += outputs)
      m < p.rows ? std::copy_n(sums + m * kLanes, there, to) : std::fill_n(to, there, 0);
  });
}

// What becomes of the sums of 64 outputs from `first` on, of weight w, and the next one if gated.
//
// sums: [weights, halves of used rows, 64]; steps: of all rows
template <class T>
void WriteProducts(const Call& call, int64_t w, const Stretch& part, int64_t first,
                   const int32_t* sums, int64_t halves, const float* steps) {
  const int64_t outputs = call.weights[w].outputs, there = std::min(kLanes, outputs - first);
  T* to = static_cast<T*>(call.out[w]) + part.begin * outputs + first;
  float scales[2][kLanes] = {};
  for (int i = 0; part.used && i < 1 + call.gated; ++i) {
    const Weight& weight = call.weights[w + i];
    const float* own = weight.scales + part.expert * weight.columns;
    for (int64_t o = 0; o < there; ++o) scales[i][o] = weight.columns > 1 ? own[first + o] : *own;
  }
  const bool trits = !call.problem.groups;
  for (int64_t m = 0; m < part.rows; ++m, to += outputs) {
    if (m >= part.used) {
      std::fill_n(to, there, T{});
      continue;
    }
    T y[kLanes];
    for (int64_t o = 0; o < kLanes; o += kWidth) {
      auto scaled = [&](int i) {
        const int32_t* own = sums + (i * part.used + m) * halves * kLanes + o;
        return Scaled<T>(own, halves > 1, trits, scales[i] + o, steps[part.begin + m]);
      };
      Lanes v = scaled(0);
      if (call.gated) v = RoundedTo(Gelu(v), to) * scaled(1);
      StoreLanes(v, there == kLanes ? to + o : y + o);
    }
    if (there < kLanes) std::copy_n(y, there, to);
  }
}

// Products of rows of floats that are rounded first; or two, the first of which is a gate.
template <class T>
void Dots(const Frame& frame, const Call& call, const void* x) {
  const int64_t halves = call.levels > 127 ? 2 : 1;
  const int64_t all = call.blocks * call.rows;
  Rows rows(call.problem, halves * all);
  std::vector<float> steps(all);
  Parallel(frame, all, 1. * all * call.inputs * sizeof(T), [&](int64_t row) {
    const T* from = static_cast<const T*>(x) + row * call.inputs;
    const float largest = LargestMagnitude(from, call.inputs);
    steps[row] = std::max(largest, 1e-30f) * (1 / static_cast<float>(call.levels));
    // Zeros: a row that pads a block, or of a slot without a request. Or one that is not finite,
    // and becomes NaN by its step.
    if (largest == 0 || !std::isfinite(largest)) {
      for (int64_t half = 0; half < halves; ++half)
        rows.SetZeros(halves * row + half, largest != 0);
      return;
    }
    if (halves == 1) return rows.Set(row, RoundedRow<T, kWhole>{from, steps[row]}, call.inputs);
    rows.Set(2 * row, RoundedRow<T, kHigh>{from, steps[row]}, call.inputs);
    rows.Set(2 * row + 1, RoundedRow<T, kLow>{from, steps[row]}, call.inputs);
  });
  // Of two matrices, each is multiplied for some groups before the other: memory is read fastest
  // where it is read on. Many rows take longer than reading, and their sums more of the cache.
  const int64_t few = call.gated ? kFewRows / halves : 1;
  const std::vector<Stretch> stretches = StretchesOf(call, rows, halves);
  auto multiply = [&](int64_t w, const Stretch& part, int64_t first, int64_t groups) {
    const int64_t weights = 1 + call.gated;
    const Group p = rows.Of(halves * part.begin, halves * part.used);
    static thread_local Aligned kept(0);
    const int64_t size = p.rows * kLanes;
    auto* sums = reinterpret_cast<int32_t*>(Kept(kept, groups * weights * size * sizeof(int32_t)));
    for (int64_t i = 0; p.rows && i < weights; ++i)
      for (int64_t g = 0; g < groups; ++g)
        Multiply(*call.path, p, call.weights[w + i], part.expert, first + g * kLanes,
                 sums + (g * weights + i) * size);
    for (int64_t g = 0; g < groups; ++g)
      WriteProducts<T>(call, w, part, first + g * kLanes, sums + g * weights * size, halves,
                       steps.data());
  };
  ForGroups(frame, call, stretches, few, multiply);
}

// x [blocks, R, I], experts int32 [blocks], and of each weight: packed uint8 [E, O, B], multipliers
// int8 [E, O, G, P], scales float32 [E, 1, C] -> [blocks, R, O] for each. Or of groups of 64
// outputs, packed [E, N, B / 4, 64, 4] and multipliers [E, N, G, P, 64].
// x int8: the sums, int32. x float32 or bfloat16: rounded first, to `levels`, and the products, as
// x. gated: of two weights gelu(first) * second alone.
// G: groups of inputs; 0 and P = 1 where all multipliers are 1. block: bytes in a packing block of
// one plane; path: the fastest one to take, -1 for all that there are.
void TernaryDots(const Frame& frame) {
  const int64_t count = frame.arguments() / 3;  // of weights
  Check(count > 0 && frame.arguments() == 2 + 3 * count, frame.arguments(),
        " arguments, not two and three of each weight");
  const Array &x = frame.Argument(0), &experts = frame.Argument(1);
  const int64_t block = frame.Integer("block"), path = frame.Integer("path");
  const int64_t levels = frame.Integer("levels");
  const bool gated = frame.Integer("gated");
  const Dtype dtype = x.dtype;
  const bool integers = dtype == S8;
  if (!integers) CheckFloats("x", x);
  Check(integers || levels == 127 || levels == 127 * 128, levels, " levels");
  Sizes sizes;
  sizes.Match("x [blocks, R, I]", x);
  const auto* expert = sizes.Match<int32_t>("experts [blocks]", experts);
  const int64_t results = frame.results();
  Check(gated ? !integers && count == 2 && results == 1 : results == count, count, " weights, but ",
        results, " results");
  Call call{nullptr, {}, {}, {}, expert, sizes["blocks"], sizes["R"], sizes["I"], levels, gated};
  for (int64_t i = 0; i < count; ++i) {
    Sizes own = sizes;
    const Array& result = frame.Result(gated ? 0 : i);
    own.Match("sums [blocks, R, O]", result, integers ? S32 : dtype);
    call.weights.push_back(WeightOf(own, frame.Argument(3 * i + 2), frame.Argument(3 * i + 3),
                                    frame.Argument(3 * i + 4), block));
    Check(call.weights[i].packing == call.weights[0].packing, "weights are packed differently");
    Check(call.weights[i].experts == call.weights[0].experts, "weights of ",
          call.weights[i].experts, " and ", call.weights[0].experts, " experts");
    call.out.push_back(result.data);
  }
  const bool plain = call.weights[0].packing.groups && (block % 4 || block > kCacheLine);
  const int64_t last = Paths().size() - 1;
  call.path = &Paths()[plain ? 0 : path < 0 ? last : std::min(path, last)];
  call.problem = ProblemOf(call.weights[0].packing, block);
  if (integers)
    Sums(frame, call, static_cast<const int8_t*>(x.data));
  else if (dtype == BF16)
    Dots<uint16_t>(frame, call, x.data);
  else
    Dots<float>(frame, call, x.data);
}

}  // namespace

KERNEL(TernaryDots)

}  // namespace kernels

// The names of the paths that there are, in their order, or null.
extern "C" const char* TernaryPath(int64_t path) {
  const auto& paths = kernels::Paths();
  return path < static_cast<int64_t>(paths.size()) ? paths[path].name : nullptr;
}

// Groups of 64 rows, [n, 64, bytes], in place as [n, bytes / 4, 64, 4]. 0; 1 without memory, -1 for
// rows of no whole quads.
extern "C" int64_t InterleaveGroups(uint8_t* rows, int64_t n, int64_t bytes) {
  if (n < 0 || bytes < 0 || bytes % 4) return -1;
  try {
    static thread_local kernels::Aligned kept(0);
    const int64_t size = kernels::kLanes * bytes;
    auto* group = reinterpret_cast<uint8_t*>(kernels::Kept(kept, size));
    for (int64_t i = 0; i < n; ++i, rows += size) {
      kernels::Interleave(rows, kernels::kLanes, bytes, group);
      std::memcpy(rows, group, size);
    }
    return 0;
  } catch (const std::bad_alloc&) {
    return 1;
  }
}
