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

#include <vector>

#include "common.h"

#if defined(TERNARY_AMX)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace kernels {
namespace {

constexpr int64_t kWidest = 1 << 20;     // bytes of an output: no int32 sum of any path is exceeded
constexpr int64_t kTaskBytes = 1 << 17;  // that a thread reads at a time, where there are many
constexpr int64_t kCacheLine = 64;

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

// The activations of a row in the order of `Group`. to: zeros, as many as there are and more
void Arrange(const int8_t* from, int64_t inputs, int64_t block_bytes, int8_t* to) {
  for (int64_t begin = 0, byte = 0; begin < inputs; begin += 4 * block_bytes, byte += block_bytes)
    for (int64_t r = 0; r < 4; ++r) {
      const int64_t at = begin + r * block_bytes, end = std::min(inputs - at, block_bytes);
      if (block_bytes % 4 == 0) {
        for (int64_t i = 0; i < end; i += 4)
          std::memcpy(to + (byte + i) * 4 + 4 * r, from + at + i, std::min<int64_t>(4, end - i));
      } else {
        for (int64_t i = 0; i < end; ++i)
          to[(byte + i) / 4 * kInputs + 4 * r + (byte + i) % 4] = from[at + i];
      }
    }
}

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

// --- The product ---------------------------------------------------------------------------------

// x int8 [blocks, R, I], packed uint8 [E, O, B], experts int32 [blocks], multipliers int8
// [E, O, G, P] -> int32 [blocks, R, O]; or of groups of 64 outputs packed [E, N, B / 4, 64, 4] and
// multipliers [E, N, G, P, 64].
// G: groups of inputs; 0 and P = 1 where all multipliers are 1. block: bytes in a packing block of
// one plane; path: the fastest one to take, -1 for all that there are.
void TernarySums(ffi::ThreadPool pool, ffi::Buffer<ffi::S8> x, ffi::Buffer<ffi::U8> packed,
                 ffi::Buffer<ffi::S32> experts, ffi::Buffer<ffi::S8> multipliers,
                 ffi::ResultBuffer<ffi::S32> out, int64_t block, int64_t path) {
  const bool grouped = packed.dimensions().size() == 5;
  Sizes sizes;
  sizes.Match("x [blocks, R, I]", x);
  sizes.Match("experts [blocks]", experts);
  sizes.Match("sums [blocks, R, O]", *out);
  if (grouped) {
    sizes.Match("packed [E, N, Q, 64, 4]", packed);
    sizes.Match("multipliers [E, N, G, P, 64]", multipliers);
    Check(sizes["64"] == kLanes && sizes["4"] == 4, "groups of ", sizes["64"], " outputs with ",
          sizes["4"], " bytes each, which are 64 and 4");
    Check(sizes["O"] == sizes["N"] * kLanes, sizes["O"], " outputs are not ", sizes["N"],
          " groups of 64");
  } else {
    sizes.Match("packed [E, O, B]", packed);
    sizes.Match("multipliers [E, O, G, P]", multipliers);
  }
  const int64_t blocks = sizes["blocks"], rows = sizes["R"], inputs = sizes["I"],
                count = sizes["E"], outputs = sizes["O"],
                all = grouped ? 4 * sizes["Q"] : sizes["B"], groups = sizes["G"],
                planes = sizes["P"], bytes = all / std::max<int64_t>(1, planes);
  Check(planes == 1 || (planes == 2 && groups), planes, " planes with ", groups,
        " groups of multipliers; what there is are one, and two with multipliers");
  Check(all <= kWidest, all, " packed bytes of an output, more than ", kWidest);
  Check(inputs <= 4 * bytes, inputs, " inputs do not fit ", bytes, " packed bytes");
  Check(block > 0 && bytes % block == 0 && all == planes * bytes, all,
        " packed bytes are no whole blocks of ", block, " for each of ", planes, " planes");
  const int64_t in_all = bytes / block;
  Check(groups < 2 || groups == in_all || groups == 2 * in_all || groups == 4 * in_all, groups,
        " groups are neither 1 nor 1, 2 or 4 for each of ", in_all, " blocks");
  Check(!groups || 4 * bytes * 127 * 127 < 1ll << 31, 4 * bytes,
        " inputs with multipliers, whose sums might exceed int32");

  const bool plain = groups && (block % 4 || block > kCacheLine);
  const int64_t last = Paths().size() - 1;
  const Path& chosen_path = Paths()[plain ? 0 : path < 0 ? last : std::min(path, last)];
  const int64_t quads = RoundUp(bytes, 4) / 4, tiled = RoundUp(rows, kRowTile);
  Group problem{};
  // Not a power of two, so that rows do not compete for the same lines of a cache.
  problem.width = RoundUp(quads * kInputs, kCacheLine) + kCacheLine;
  problem.quads = quads, problem.bytes = bytes;
  problem.planes = planes, problem.groups = groups;
  problem.block = std::max<int64_t>(1, block / 4), problem.block_bytes = block;
  problem.of_block = std::max<int64_t>(1, groups / std::max<int64_t>(1, in_all));
  problem.parts = groups ? in_all * problem.of_block : 0;

  // --- Activations in order, and their sums
  Aligned arranged(blocks * tiled * problem.width);
  std::vector<int32_t> sums(blocks * rows), part_sums(blocks * rows * problem.parts);
  std::vector<char> used(blocks * rows);  // not all zeros
  auto* xs = reinterpret_cast<int8_t*>(arranged.data);
  const int8_t* given = x.typed_data();
  Parallel(pool, blocks * tiled, 1. * blocks * rows * inputs,
           [=, &sums, &part_sums, &used](int64_t i) {
             const int64_t b = i / tiled, m = i % tiled, row = b * rows + m;
             int8_t* to = xs + i * problem.width;
             std::memset(to, 0, problem.width);
             if (m >= rows) return;
             const int8_t* from = given + row * inputs;
             int32_t sum = 0;
             int8_t any = 0;
             for (int64_t j = 0; j < inputs; ++j) sum += from[j], any |= from[j];
             sums[row] = sum, used[row] = any != 0;
             Arrange(from, inputs, block, to);
             const int64_t size = problem.parts ? 4 * bytes / problem.parts : 0;
             for (int64_t part = 0; part * size < (size ? inputs : 0); ++part) {
               int32_t some = 0;
               for (int64_t j = part * size; j < std::min(inputs, (part + 1) * size); ++j)
                 some += from[j];
               part_sums[row * problem.parts + part] = some;
             }
           });
  // Padding, rows of zeros behind the others, costs nothing.
  std::vector<int64_t> counts(blocks);
  for (int64_t b = 0; b < blocks; ++b)
    for (int64_t m = 0; m < rows; ++m)
      if (used[b * rows + m]) counts[b] = m + 1;

  // --- Groups of outputs
  const uint8_t* weights = packed.typed_data();
  const int8_t* all_multipliers = multipliers.typed_data();
  const int32_t* chosen = experts.typed_data();
  int32_t* result = out->typed_data();
  const int32_t *row_sums = sums.data(), *of_parts = part_sums.data();
  auto multiply = [=, &counts](int64_t b, int64_t first) {  // of the outputs from `first` on
    const int64_t expert = chosen[b], there = std::min(kLanes, outputs - first);
    int32_t* to = result + b * rows * outputs + first;
    Group p = problem;
    p.rows = expert < 0 || expert >= count ? 0 : counts[b];
    for (int64_t m = p.rows; m < rows; ++m) std::fill_n(to + m * outputs, there, 0);
    if (p.rows == 0) return;
    p.x = xs + b * tiled * problem.width;
    p.sums = row_sums + b * rows, p.part_sums = of_parts + b * rows * problem.parts;
    p.packed = weights + (expert * outputs + first) * all;
    if (groups) p.multipliers = all_multipliers + (expert * outputs + first) * groups * planes;
    p.out = to, p.stride = outputs;
    static thread_local Aligned kept(0), kept_multipliers(0), kept_sums(0);
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
    if (there < kLanes) {
      p.out = reinterpret_cast<int32_t*>(Kept(kept_sums, p.rows * kLanes * 4));
      p.stride = kLanes;
    }
    chosen_path.multiply(p);
    if (there < kLanes)
      for (int64_t m = 0; m < p.rows; ++m) std::copy_n(p.out + m * kLanes, there, to + m * outputs);
  };
  const int64_t in_outputs = RoundUp(outputs, kLanes) / kLanes, of_all = blocks * in_outputs;
  const int64_t wanted = std::max<int64_t>(1, of_all / (4 * pool.num_threads()));
  const int64_t task = std::min(wanted, 1 + kTaskBytes / (1 + kLanes * all));  // groups
  Parallel(pool, RoundUp(of_all, task) / task, 1. * blocks * outputs * all, [=](int64_t i) {
    for (int64_t g = i * task; g < std::min(of_all, (i + 1) * task); ++g)
      multiply(g / in_outputs, g % in_outputs * kLanes);
  });
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(TernarySumsHandler, Kernel<TernarySums>::Call,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::S8>>()
                                  .Arg<ffi::Buffer<ffi::U8>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S8>>()
                                  .Ret<ffi::Buffer<ffi::S32>>()
                                  .Attr<int64_t>("block")
                                  .Attr<int64_t>("path"));

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
