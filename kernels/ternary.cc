// Products of packed ternary matrices on a CPU, for JAX through XLA's foreign function interface.
//
// A packed matrix has a row of B bytes for each output; byte j holds four codes trit + 1, at bits
// 0, 2, 4 and 6 (quantize.py draws which inputs they belong to). The activations come in the same
// order, four slabs of B int8 for each row, so that a product is
//
//     sum over slabs r and bytes j of (byte[j] >> 2 r & 3) * slab[r][j]  -  sum of all activations
//
// in exact int32. Paths, chosen by what the processor has: AMX tiles for many rows, AVX-512 VNNI,
// AVX2, and C++ that any compiler takes. All give the same integers.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <sstream>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "xla/ffi/api/ffi.h"

#if defined(__x86_64__)
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace ffi = xla::ffi;

namespace {

constexpr int64_t kVector = 64;      // bytes that are taken at a time; slabs are padded to whole ones
constexpr int64_t kPanel = 32;       // outputs that a thread takes at a time
constexpr int64_t kLargePanel = 128; // with many rows, which are then read from memory less often
constexpr int64_t kWorthAThread = 1 << 18;
constexpr int64_t kFewRows = 8;      // from here on AMX is faster
constexpr int64_t kChunk = 512;      // codes of an output unpacked at a time, so that they stay in L1
constexpr int64_t kTileBytes = 1024; // of an AMX tile, 16 rows of 64
constexpr int64_t kWidest = 1 << 21; // bytes of an output: no int32 sum of any path is exceeded

int64_t RoundUp(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// --- What a kernel takes --------------------------------------------------------------------------
//
// Each kernel checks all its arrays before it reads one, and throws what is wrong; `Kernel` makes an
// error of JAX of that. XLA calls none whose results have no elements.

template <class... Parts>
void Check(bool right, const Parts&... parts) {
  if (right) return;
  std::ostringstream text;
  (text << ... << parts);
  throw std::invalid_argument(text.str());
}

// Sizes of the arrays of a call, by name. The first array that has a name gives it a size.
class Sizes {
 public:
  // what: the array and the names of its sizes, a literal such as "k [B, K, S, H]"
  template <class Buffer>
  void Match(std::string_view what, const Buffer& x) {
    const auto found = x.dimensions();
    const size_t rank = std::count(what.begin(), what.end(), ',') + 1;
    if (found.size() != rank) Check(false, what, " is ", Text(found), ", not of rank ", rank);
    size_t begin = what.find('[') + 1;
    for (const int64_t size : found) {
      const size_t end = what.find_first_of(",]", begin);
      const std::string_view name = what.substr(begin, end - begin);
      const int64_t known = Known(name, size);
      if (size != known) Check(false, what, " is ", Text(found), ", but ", name, " is ", known);
      begin = end + 2;
    }
  }
  // The same for an array of any dtype, which must be this one.
  void Match(std::string_view what, const ffi::AnyBuffer& x, ffi::DataType dtype) {
    Check(x.element_type() == dtype, what, " is ", x.element_type(), ", not ", dtype);
    Match(what, x);
  }
  int64_t operator[](std::string_view name) { return Known(name, 0); }

 private:
  int64_t Known(std::string_view name, int64_t size) {  // the size of this name, from now on
    for (int i = 0; i < count_; ++i)
      if (sizes_[i].first == name) return sizes_[i].second;
    sizes_[count_++] = {name, size};
    return size;
  }
  static std::string Text(ffi::Span<const int64_t> sizes) {
    std::string text;
    for (const int64_t size : sizes) text += (text.empty() ? "[" : ", ") + std::to_string(size);
    return text.empty() ? "[]" : text + "]";
  }
  std::pair<std::string_view, int64_t> sizes_[8];
  int count_ = 0;
};

void CheckFloats(const char* what, const ffi::AnyBuffer& x) {
  const ffi::DataType dtype = x.element_type();
  Check(dtype == ffi::F32 || dtype == ffi::BF16, what, " is ", dtype, ", neither F32 nor BF16");
}

template <auto kernel>
struct Kernel;

template <class... Arguments, void (*kernel)(Arguments...)>
struct Kernel<kernel> {
  static ffi::Error Call(Arguments... arguments) {
    try {
      kernel(arguments...);
      return ffi::Error::Success();
    } catch (const std::invalid_argument& error) {
      return ffi::Error::InvalidArgument(error.what());
    } catch (const std::bad_alloc&) {
      return ffi::Error(ffi::ErrorCode::kResourceExhausted, "no memory left for a kernel");
    }
  }
};

// --- Threads and memory ---------------------------------------------------------------------------

// Runs f(0) to f(n - 1) on the pool and this thread, each index once, and returns when all are done.
// bytes: that all of it reads; a thread is not woken, which takes some 20 microseconds, for few.
template <class F>
void Parallel(ffi::ThreadPool& pool, int64_t n, double bytes, F f) {
  struct State {
    std::atomic<int64_t> next{0}, done{0};
    std::atomic<bool> failed{false};
    int64_t n;
    F f;
    State(int64_t n, F f) : n(n), f(std::move(f)) {}
    void Work() {
      for (int64_t i; (i = next.fetch_add(1)) < n; done.fetch_add(1)) {
        try {
          f(i);
        } catch (const std::bad_alloc&) {  // which would end the process in a thread of the pool
          failed = true;
        }
      }
    }
  };
  auto state = std::make_shared<State>(n, std::move(f));
  const int64_t threads = std::min({1. * pool.num_threads(), 1. * n, 1 + bytes / kWorthAThread});
  for (int64_t t = 1; t < threads; ++t)
    pool.Schedule([state] { state->Work(); });
  state->Work();
  while (state->done.load() < n) {
#if defined(__x86_64__)
    _mm_pause();
#endif
  }
  if (state->failed) throw std::bad_alloc();
}

struct Aligned {  // uninitialised memory at a multiple of 64 bytes
  explicit Aligned(int64_t size) : memory(new char[size + 64]), size(size) {
    data = memory.get() + (-reinterpret_cast<uintptr_t>(memory.get()) & 63);
  }
  std::unique_ptr<char[]> memory;
  int64_t size;
  char* data;
};

// As much memory, or more, as a thread keeps from one task to the next.
char* Kept(Aligned& memory, int64_t size) {
  if (memory.size < size) memory = Aligned(size);
  return memory.data;
}

// One problem: R rows of activations times one matrix, for its outputs begin to end.
struct Problem {
  const uint8_t* packed;  // [O, B]
  const int8_t* slabs;    // [R, 4, width]
  const int32_t* sums;    // [R], of the activations of each row
  int32_t* out;           // [R, O]
  int64_t rows, bytes, width, outputs, begin, end;
};

void PlainPanel(const Problem& p) {
  for (int64_t o = p.begin; o < p.end; ++o)
    for (int64_t m = 0; m < p.rows; ++m) {
      const uint8_t* w = p.packed + o * p.bytes;
      const int8_t* x = p.slabs + m * 4 * p.width;
      int32_t sum = 0;
      for (int r = 0; r < 4; ++r)
        for (int64_t j = 0; j < p.bytes; ++j) sum += (w[j] >> 2 * r & 3) * x[r * p.width + j];
      p.out[m * p.outputs + o] = sum - p.sums[m];
    }
}

#if defined(__x86_64__)

__attribute__((target("avx2"))) int32_t Total(__m256i v) {
  __m128i s = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1)));
}

__attribute__((target("avx2"))) void Avx2Panel(const Problem& p) {
  const __m256i three = _mm256_set1_epi8(3), one = _mm256_set1_epi16(1);
  const int64_t whole = p.bytes / 32 * 32;
  for (int64_t o = p.begin; o < p.end; ++o)
    for (int64_t m = 0; m < p.rows; ++m) {
      const uint8_t* w = p.packed + o * p.bytes;
      const int8_t* x = p.slabs + m * 4 * p.width;
      __m256i sum = _mm256_setzero_si256();
      for (int64_t begin = 0; begin < whole; begin += 16 * 32) {
        // 16 steps of four pairs of at most 2 * 2 * 127 fit into 16 bits: 32512.
        __m256i few = _mm256_setzero_si256();
        for (int64_t j = begin; j < std::min(whole, begin + 16 * 32); j += 32) {
          __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w + j));
          for (int r = 0; r < 4; ++r) {
            __m256i codes = _mm256_and_si256(_mm256_srli_epi16(v, 2 * r), three);
            __m256i slab =
                _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + r * p.width + j));
            few = _mm256_add_epi16(few, _mm256_maddubs_epi16(codes, slab));
          }
        }
        sum = _mm256_add_epi32(sum, _mm256_madd_epi16(few, one));
      }
      int32_t total = Total(sum);
      for (int64_t j = whole; j < p.bytes; ++j)
        for (int r = 0; r < 4; ++r) total += (w[j] >> 2 * r & 3) * x[r * p.width + j];
      p.out[m * p.outputs + o] = total - p.sums[m];
    }
}

#define VNNI __attribute__((target("avx512f,avx512bw,avx512vnni")))

// The sums of the lanes of four vectors.
VNNI inline __m128i Totals(__m512i a, __m512i b, __m512i c, __m512i d) {
  const __m512i ab = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
  const __m512i cd = _mm512_add_epi32(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
  const __m512i all =
      _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
  const __m256i half =
      _mm256_add_epi32(_mm512_castsi512_si256(all), _mm512_extracti64x4_epi64(all, 1));
  return _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
}

// M rows times N outputs at once, M * N = 4. The codes of slab r are masked but not shifted, so they count 4^r
// times; each slab has a sum of its own, which is shifted back at the end, exactly.
template <int M, int N>
VNNI void VnniTile(const Problem& p, int64_t m0, int64_t o0) {
  __m512i sums[N][M][4];
  for (auto& a : sums)
    for (auto& b : a)
      for (auto& c : b) c = _mm512_setzero_si512();
  const uint8_t* w = p.packed + o0 * p.bytes;
  const int8_t* x = p.slabs + m0 * 4 * p.width;
  // What to prefetch: short rows are those of the next outputs, which lie right behind.
  const int64_t ahead = 2 * (p.bytes <= 2048 ? N * p.bytes : 1024);
  for (int64_t j = 0; j < p.bytes; j += kVector) {
    const int64_t left = p.bytes - j;
    const __mmask64 mask = left >= kVector ? ~0ull : (1ull << left) - 1;
    __m512i v[N];
    for (int n = 0; n < N; ++n) {
      const int64_t last = p.end - 1 - o0;  // the last output again, where there are no more
      v[n] = _mm512_maskz_loadu_epi8(mask, w + std::min<int64_t>(n, last) * p.bytes + j);
      _mm_prefetch(reinterpret_cast<const char*>(w + n * p.bytes + j + ahead), _MM_HINT_T0);
    }
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) {
      __m512i slab[M];
      for (int m = 0; m < M; ++m) slab[m] = _mm512_load_si512(x + (m * 4 + r) * p.width + j);
      for (int n = 0; n < N; ++n) {
        const __m512i codes = _mm512_and_si512(v[n], _mm512_set1_epi8(3 << 2 * r));
        for (int m = 0; m < M; ++m)
          sums[n][m][r] = _mm512_dpbusd_epi32(sums[n][m][r], codes, slab[m]);
      }
    }
  }
  __m512i total[4];
  for (int n = 0; n < N; ++n)
    for (int m = 0; m < M; ++m) {
      __m512i sum = sums[n][m][0];
      for (int r = 1; r < 4; ++r)
        sum = _mm512_add_epi32(sum, _mm512_srai_epi32(sums[n][m][r], 2 * r));
      total[m * N + n] = sum;
    }
  alignas(16) int32_t results[4];
  _mm_store_si128(reinterpret_cast<__m128i*>(results),
                  Totals(total[0], total[1], total[2], total[3]));
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < N; ++n)
      if (o0 + n < p.end)
        p.out[(m0 + m) * p.outputs + o0 + n] = results[m * N + n] - p.sums[m0 + m];
}

template <int M>
VNNI void VnniRows(const Problem& p, int64_t m0) {
  constexpr int N = 4 / M;
  for (int64_t o = p.begin; o < p.end; o += N) VnniTile<M, N>(p, m0, o);
}

VNNI void VnniPanel(const Problem& p) {
  int64_t m = 0;
  for (; m + 2 <= p.rows; m += 2) VnniRows<2>(p, m);
  for (; m < p.rows; ++m) VnniRows<1>(p, m);
}

// --- AMX: 16 outputs times 16 rows in a tile ------------------------------------------------------

#define AMX __attribute__((target("avx512f,avx512bw,amx-tile,amx-int8")))

struct alignas(64) TileConfig {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

AMX void ConfigureTiles() {
  TileConfig config;
  for (int i = 0; i < 8; ++i) config.row_bytes[i] = 64, config.rows[i] = 16;
  // Not _tile_loadconfig: that of gcc 12 tells the compiler of 8 bytes only, and loses the rest.
  __asm__ volatile("ldtilecfg %0" ::"m"(config));
}

// Activations as the second operand: for each 16 rows, slab and vector of 64 bytes a tile whose row
// q holds bytes 4 q to 4 q + 3 of all 16.
void ArrangeTile(const int8_t* slabs, int64_t rows, int64_t width, int64_t m0, int8_t* out) {
  for (int r = 0; r < 4; ++r)
    for (int64_t j = 0; j < width; j += kVector)
      for (int64_t m = 0; m < 16; ++m) {
        int8_t* tile = out + (r * width + j) * 16 + 4 * m;
        if (m0 + m >= rows) {
          for (int q = 0; q < 16; ++q) std::memset(tile + 64 * q, 0, 4);
          continue;
        }
        const int8_t* x = slabs + ((m0 + m) * 4 + r) * width + j;
        for (int q = 0; q < 16; ++q) std::memcpy(tile + 64 * q, x + 4 * q, 4);
      }
}

AMX void AmxPanel(const Problem& p, const int8_t* tiles) {
  // tiles: [groups of 16 rows, 4, width / 64, 1024]; codes: [output / 16, 4, steps, 1024];
  // sums: [group, output / 16, 16 outputs, 16 rows]
  constexpr int64_t steps = kChunk / 4 / kVector, of_codes = 4 * steps * kTileBytes;
  const int64_t groups = RoundUp(p.rows, 16) / 16, halves = RoundUp(p.end - p.begin, 32) / 16;
  static thread_local Aligned codes(kLargePanel / 16 * of_codes), kept(0);
  char* sums = Kept(kept, groups * halves * kTileBytes);
  std::memset(sums, 0, groups * halves * kTileBytes);
  const __m512i three = _mm512_set1_epi8(3);
  for (int64_t j0 = 0; j0 < p.width; j0 += kChunk / 4) {
    const int64_t count = std::min(steps, (p.width - j0) / kVector);
    for (int64_t n = 0; n < halves * 16; ++n)
      for (int64_t s = 0; s < count; ++s) {
        const int64_t o = p.begin + n, j = j0 + s * kVector, left = p.bytes - j;
        __mmask64 mask = left >= kVector ? ~0ull : (1ull << left) - 1;
        if (o >= p.end) mask = 0;
        const __m512i v = _mm512_maskz_loadu_epi8(mask, p.packed + o * p.bytes + j);
        char* to = codes.data + n / 16 * of_codes + s * kTileBytes + n % 16 * 64;
        for (int r = 0; r < 4; ++r)
          _mm512_store_si512(to + r * steps * kTileBytes,
                             _mm512_and_si512(_mm512_srli_epi16(v, 2 * r), three));
      }
    for (int64_t g = 0; g < groups; g += 2) {
      const bool two = g + 1 < groups;
      const int8_t* a = tiles + (g * 4 * p.width + j0) * 16;
      const int8_t* b = a + 4 * p.width * 16;
      for (int64_t h = 0; h < halves; h += 2) {
        const char* first = codes.data + h * of_codes;
        const char* second = first + of_codes;
        char* c = sums + (g * halves + h) * kTileBytes;
        char* d = c + halves * kTileBytes;
        _tile_loadd(0, c, 64);
        _tile_loadd(1, c + kTileBytes, 64);
        if (two) {
          _tile_loadd(2, d, 64);
          _tile_loadd(3, d + kTileBytes, 64);
        }
        for (int r = 0; r < 4; ++r)
          for (int64_t s = 0; s < count; ++s) {
            const int64_t at = (r * steps + s) * kTileBytes, x = r * p.width * 16 + s * kTileBytes;
            _tile_loadd(4, first + at, 64);
            _tile_loadd(5, second + at, 64);
            _tile_loadd(6, a + x, 64);
            _tile_dpbusd(0, 4, 6);
            _tile_dpbusd(1, 5, 6);
            if (two) {
              _tile_loadd(7, b + x, 64);
              _tile_dpbusd(2, 4, 7);
              _tile_dpbusd(3, 5, 7);
            }
          }
        _tile_stored(0, c, 64);
        _tile_stored(1, c + kTileBytes, 64);
        if (two) {
          _tile_stored(2, d, 64);
          _tile_stored(3, d + kTileBytes, 64);
        }
      }
    }
  }
  for (int64_t m = 0; m < p.rows; ++m)
    for (int64_t n = 0; n < p.end - p.begin; ++n) {
      const char* tile = sums + (m / 16 * halves + n / 16) * kTileBytes;
      const auto* values = reinterpret_cast<const int32_t*>(tile);
      p.out[m * p.outputs + p.begin + n] = values[n % 16 * 16 + m % 16] - p.sums[m];
    }
}

bool HasAmx() {
  static const bool has = [] {
    if (!__builtin_cpu_supports("amx-int8") || !__builtin_cpu_supports("avx512bw")) return false;
    return syscall(SYS_arch_prctl, 0x1023, 18) == 0;  // ask the kernel for tile registers
  }();
  return has;
}

#endif

enum Path { kPlain = 0, kAvx2 = 1, kVnni = 2, kAmx = 3 };

int64_t BestPath() {  // that the processor has
#if defined(__x86_64__)
  if (HasAmx()) return kAmx;
  if (__builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw")) return kVnni;
  if (__builtin_cpu_supports("avx2")) return kAvx2;
#endif
  return kPlain;
}

// x int8 [blocks, R, I], packed uint8 [E, O, B], experts int32 [blocks] -> int32 [blocks, R, O].
// block: bytes in a packing block; path: the best one to take, -1 for all that the processor has.
void TernarySums(ffi::ThreadPool pool, ffi::Buffer<ffi::S8> x, ffi::Buffer<ffi::U8> packed,
                 ffi::Buffer<ffi::S32> experts, ffi::ResultBuffer<ffi::S32> out,
                 int64_t block, int64_t path) {
  Sizes sizes;
  sizes.Match("x [blocks, R, I]", x);
  sizes.Match("packed [E, O, B]", packed);
  sizes.Match("experts [blocks]", experts);
  sizes.Match("sums [blocks, R, O]", *out);
  const int64_t blocks = sizes["blocks"], rows = sizes["R"], inputs = sizes["I"],
                count = sizes["E"], outputs = sizes["O"], bytes = sizes["B"];
  Check(bytes <= kWidest, bytes, " packed bytes of an output, more than ", kWidest);
  Check(inputs <= 4 * bytes, inputs, " inputs do not fit ", bytes, " packed bytes");
  Check(block > 0 && bytes % block == 0, bytes, " packed bytes are no whole blocks of ", block);
  const int64_t best = path < 0 ? BestPath() : std::min(path, BestPath());
  const bool amx = best == kAmx && rows >= kFewRows;
  const int64_t width = RoundUp(bytes, kVector), groups = RoundUp(rows, 16) / 16;

  Aligned slabs(blocks * rows * 4 * width), tiles(amx ? blocks * groups * 64 * width : 0);
  std::vector<int32_t> sums(blocks * rows), used(blocks * rows);  // used: not all zeros
  auto* slab_data = reinterpret_cast<int8_t*>(slabs.data);
  auto* tile_data = reinterpret_cast<int8_t*>(tiles.data);
  const int8_t* xs = x.typed_data();
  auto arrange = [=, &sums, &used](int64_t row) {
    int8_t* to = slab_data + row * 4 * width;
    std::memset(to, 0, 4 * width);
    const int8_t* from = xs + row * inputs;
    int32_t sum = 0;
    int8_t any = 0;
    for (int64_t i = 0; i < inputs; ++i) sum += from[i], any |= from[i];
    used[row] = any != 0;
    for (int64_t j = 0; j < bytes; j += block)
      for (int r = 0; r < 4; ++r) {
        const int64_t at = 4 * j + r * block, size = std::min(block, inputs - at);
        if (size > 0) std::memcpy(to + r * width + j, from + at, size);
      }
    sums[row] = sum;
  };
  Parallel(pool, blocks * rows, 1. * blocks * rows * inputs, arrange);
  // Padding, rows of zeros behind the others, costs nothing.
  std::vector<int64_t> counts(blocks);
  for (int64_t b = 0; b < blocks; ++b)
    for (int64_t m = 0; m < rows; ++m)
      if (used[b * rows + m]) counts[b] = m + 1;
#if defined(__x86_64__)
  if (amx)
    Parallel(pool, blocks * groups, 1. * blocks * rows * inputs, [=](int64_t i) {
      const int64_t b = i / groups, g = i % groups;
      ArrangeTile(slab_data + b * rows * 4 * width, rows, width, 16 * g,
                  tile_data + i * 64 * width);
    });
#endif

  const bool large = amx && blocks * outputs >= 4 * kLargePanel * pool.num_threads();
  const int64_t panel = large ? kLargePanel : kPanel, panels = (outputs + panel - 1) / panel;
  const uint8_t* weights = packed.typed_data();
  const int32_t* chosen = experts.typed_data();
  int32_t* result = out->typed_data();
  const int32_t* row_sums = sums.data();
  Parallel(pool, blocks * panels, 1. * blocks * outputs * bytes, [=, &counts](int64_t i) {
    const int64_t b = i / panels, begin = i % panels * panel;
    Problem p{nullptr,
              slab_data + b * rows * 4 * width,
              row_sums + b * rows,
              result + b * rows * outputs,
              counts[b],
              bytes,
              width,
              outputs,
              begin,
              std::min(outputs, begin + panel)};
    const int64_t expert = chosen[b];
    if (expert < 0 || expert >= count) p.rows = 0;
    for (int64_t m = p.rows; m < rows; ++m)
      std::fill(p.out + m * outputs + p.begin, p.out + m * outputs + p.end, 0);
    if (p.rows == 0) return;
    p.packed = weights + expert * outputs * bytes;
#if defined(__x86_64__)
    if (amx && p.rows >= kFewRows) {
      ConfigureTiles();
      AmxPanel(p, tile_data + b * groups * 64 * width);
    } else if (best >= kVnni) {
      VnniPanel(p);
    } else if (best == kAvx2) {
      Avx2Panel(p);
    } else {
      PlainPanel(p);
    }
#else
    PlainPanel(p);
#endif
  });
}

// --- Five trits to a byte -------------------------------------------------------------------------

#if defined(__x86_64__) && defined(__gnu_linux__) && !defined(__clang__)
#define FOR_EVERY_PROCESSOR __attribute__((target_clones("arch=skylake-avx512", "avx2", "default")))
#else
#define FOR_EVERY_PROCESSOR
#endif

// quantize.from_base3, which explains the arithmetic, of n bytes, a multiple of 4; the largest one.
FOR_EVERY_PROCESSOR uint8_t FromBase3Bytes(const uint8_t* digits, int64_t n, uint8_t* packed) {
  constexpr int64_t some = 256;
  uint8_t low[some], fifth[some], largest = 0;
  for (int64_t i = 0; i < n; i += some, packed += some / 4 * 5) {
    const int64_t count = std::min(some, n - i);
    for (int64_t j = 0; j < count; ++j) {
      const uint8_t d = digits[i + j];
      largest = std::max(largest, d);
      fifth[j] = d / 81;
      low[j] = d + d / 3 + 4 * (d / 9) + 16 * (d / 27) + 64 * (d / 81);
    }
    for (int64_t g = 0; g < count / 4; ++g) {
      uint32_t four;
      std::memcpy(&four, fifth + 4 * g, 4);
      std::memcpy(packed + 5 * g, low + 4 * g, 4);
      packed[5 * g + 4] = (four * (1u << 24 | 1u << 18 | 1u << 12 | 1u << 6)) >> 24;
    }
  }
  return largest;
}

// --- The embedding table as the output head -------------------------------------------------------

constexpr int kLanes = 64;  // partial sums of a product, the same on every path

// bfloat16 is the upper half of a float32.
float ToFloat(const uint16_t& v) {
  const uint32_t bits = static_cast<uint32_t>(v) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
float ToFloat(const float& v) { return v; }
float ToFloat(const int8_t& v) { return v; }

// Lane i sums the products i, i + 64, ...; then the lanes are added in halves. The order depends on
// the size only; paths differ in whether a product is rounded before it is added.
template <class T>
inline __attribute__((always_inline)) void AnyRow(const T* table, const float* x, int64_t rows,
                                                  int64_t size, int64_t vocab, float* out) {
  for (int64_t m = 0; m < rows; ++m, x += size, out += vocab) {
    float lanes[kLanes] = {};
    int64_t i = 0;
    for (; i + kLanes <= size; i += kLanes)
      for (int k = 0; k < kLanes; ++k) lanes[k] += ToFloat(table[i + k]) * x[i + k];
    for (int k = 0; i + k < size; ++k) lanes[k] += ToFloat(table[i + k]) * x[i + k];
    for (int half = kLanes / 2; half; half /= 2)
      for (int k = 0; k < half; ++k) lanes[k] += lanes[k + half];
    *out = lanes[0];
  }
}

template <class T>
void PlainRow(const T* table, const float* x, int64_t rows, int64_t size, int64_t vocab,
              float* out) {
  AnyRow(table, x, rows, size, vocab, out);
}

#if defined(__x86_64__)

template <class T>
__attribute__((target("avx2,fma"), optimize("fp-contract=fast"))) void Avx2Row(
    const T* table, const float* x, int64_t rows, int64_t size, int64_t vocab, float* out) {
  AnyRow(table, x, rows, size, vocab, out);
}

#define AVX512 __attribute__((target("avx512f,avx512bw")))

AVX512 inline __m512 Load16(const float* p, __mmask16 mask) { return _mm512_maskz_loadu_ps(mask, p); }
AVX512 inline __m512 Load16(const uint16_t* p, __mmask16 mask) {
  const __m256i half = _mm512_castsi512_si256(_mm512_maskz_loadu_epi16(mask, p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}
AVX512 inline __m512 Load16(const int8_t* p, __mmask16 mask) {
  const __m128i quarter = _mm512_castsi512_si128(_mm512_maskz_loadu_epi8(mask, p));
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(quarter));
}

template <class T, int M>
AVX512 void Avx512Rows(const T* table, const float* x, int64_t size, int64_t vocab, float* out) {
  __m512 sums[M][4];
  for (auto& row : sums)
    for (auto& sum : row) sum = _mm512_setzero_ps();
  for (int64_t i = 0; i < size; i += kLanes) {
    const auto* ahead = reinterpret_cast<const char*>(table + i + 1024);
    for (size_t line = 0; line < kLanes * sizeof(T); line += 64)
      _mm_prefetch(ahead + line, _MM_HINT_T0);
    for (int k = 0; k < 4; ++k) {
      const int64_t left = size - i - 16 * k;
      const __mmask16 mask = left >= 16 ? 0xffff : left > 0 ? (1u << left) - 1 : 0;
      const __m512 w = Load16(table + i + 16 * k, mask);
      for (int m = 0; m < M; ++m)
        sums[m][k] =
            _mm512_fmadd_ps(w, _mm512_maskz_loadu_ps(mask, x + m * size + i + 16 * k), sums[m][k]);
    }
  }
  for (int m = 0; m < M; ++m) {
    alignas(64) float lanes[16];
    const __m512 a = _mm512_add_ps(sums[m][0], sums[m][2]), b = _mm512_add_ps(sums[m][1], sums[m][3]);
    _mm512_store_ps(lanes, _mm512_add_ps(a, b));
    for (int half = 8; half; half /= 2)
      for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
    out[m * vocab] = lanes[0];
  }
}

template <class T>
AVX512 void Avx512Row(const T* table, const float* x, int64_t rows, int64_t size, int64_t vocab,
                      float* out) {
  int64_t m = 0;
  for (; m + 4 <= rows; m += 4) Avx512Rows<T, 4>(table, x + m * size, size, vocab, out + m * vocab);
  for (; m + 2 <= rows; m += 2) Avx512Rows<T, 2>(table, x + m * size, size, vocab, out + m * vocab);
  for (; m < rows; ++m) Avx512Rows<T, 1>(table, x + m * size, size, vocab, out + m * vocab);
}

#endif

template <class T>
void TableRow(const T* table, const float* x, int64_t rows, int64_t size, int64_t vocab,
              float* out) {
#if defined(__x86_64__)
  if (BestPath() >= kVnni) return Avx512Row(table, x, rows, size, vocab, out);
  if (BestPath() == kAvx2 && __builtin_cpu_supports("fma"))
    return Avx2Row(table, x, rows, size, vocab, out);
#endif
  PlainRow(table, x, rows, size, vocab, out);
}

template <class T>
void TableRows(ffi::ThreadPool& pool, const T* table, const float* x, int64_t rows, int64_t size,
               int64_t vocab, float* out) {
  constexpr int64_t some = 64;  // rows of the table and, of x, rows that stay in a cache meanwhile
  const int64_t panels = (vocab + some - 1) / some, groups = (rows + some - 1) / some;
  const double bytes = 1. * vocab * size * sizeof(T) * std::max<int64_t>(1, rows / 8);
  Parallel(pool, panels * groups, bytes, [=](int64_t i) {
    const int64_t v0 = i % panels * some, m0 = i / panels * some;
    for (int64_t m = m0; m < std::min(rows, m0 + some); m += 4)
      for (int64_t v = v0; v < std::min(vocab, v0 + some); ++v)
        TableRow(table + v * size, x + m * size, std::min<int64_t>(4, rows - m), size, vocab,
                 out + m * vocab + v);
  });
}

// x float32 [R, D] times table float32, bfloat16 or int8 [V, D] -> float32 [R, V]
void TableDot(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::AnyBuffer table,
              ffi::ResultBuffer<ffi::F32> out) {
  Sizes sizes;
  sizes.Match("x [R, D]", x);
  sizes.Match("table [V, D]", table);
  sizes.Match("logits [R, V]", *out);
  auto rows_of = [&](const auto* data) {
    TableRows(pool, data, x.typed_data(), sizes["R"], sizes["D"], sizes["V"], out->typed_data());
  };
  const ffi::DataType dtype = table.element_type();
  if (dtype == ffi::BF16)
    rows_of(static_cast<const uint16_t*>(table.untyped_data()));
  else if (dtype == ffi::F32)
    rows_of(static_cast<const float*>(table.untyped_data()));
  else if (dtype == ffi::S8)
    rows_of(static_cast<const int8_t*>(table.untyped_data()));
  else
    Check(false, "table is ", dtype, ", neither F32, BF16 nor S8");
}

// --- Norm -----------------------------------------------------------------------------------------

void FromFloat(float value, float* out) { *out = value; }
void FromFloat(float value, uint16_t* out) {  // to nearest, halves to even
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  *out = static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

template <class T>
void NormRows(ffi::ThreadPool& pool, const T* x, const float* scale, int64_t rows, int64_t size,
              float eps, T* out) {
  Parallel(pool, rows, 1. * rows * size * sizeof(float), [=](int64_t m) {
    static thread_local Aligned kept(0);
    float* row = reinterpret_cast<float*>(Kept(kept, size * sizeof(float)));
    for (int64_t i = 0; i < size; ++i) row[i] = ToFloat(x[m * size + i]);
    float sum;
    TableRow(row, row, 1, size, 1, &sum);
    const float inverse = 1 / std::sqrt(sum / size + eps);
    for (int64_t i = 0; i < size; ++i) FromFloat(scale[i] * row[i] * inverse, out + m * size + i);
  });
}

// x [R, D], float32 or bfloat16, and scale float32 [D] -> as x: scale x / sqrt(mean square + eps).
void RmsNorm(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::Buffer<ffi::F32> scale,
             ffi::Result<ffi::AnyBuffer> out, float eps) {
  Sizes sizes;
  CheckFloats("x", x);
  sizes.Match("x [R, D]", x);
  sizes.Match("scale [D]", scale);
  sizes.Match("y [R, D]", *out, x.element_type());
  auto norm = [&](auto* y) {
    NormRows(pool, static_cast<decltype(y)>(x.untyped_data()), scale.typed_data(), sizes["R"],
             sizes["D"], eps, y);
  };
  if (x.element_type() == ffi::BF16)
    norm(static_cast<uint16_t*>(out->untyped_data()));
  else
    norm(static_cast<float*>(out->untyped_data()));
}

// --- Attention ------------------------------------------------------------------------------------
//
// Soft-capped attention that reads the cache as far as each query sees it. No logit is above the
// cap, so the softmax needs no maximum: sums of exp(logit - cap) and exp(logit - cap) v can just be
// added. They are made for each kPart slots by themselves, and added in order: so a result depends
// on its own query and slots only, not on other queries, rows or heads, nor on the threads.

typedef float Lanes __attribute__((vector_size(64)));
typedef int32_t IntLanes __attribute__((vector_size(64)));
constexpr int64_t kWidth = 16;   // floats in Lanes
constexpr int64_t kSlots = 32;   // that are turned into float32 and taken at a time
constexpr int64_t kPart = 256;   // slots
constexpr int64_t kQueries = 64; // rows of a task: queries of the heads that share keys and values
constexpr float kLargestCap = 40;  // exp(-2 * 40) is still a normal number

#define INLINE inline __attribute__((always_inline))

struct Attention {
  const void *q, *k, *v;     // [B, T, N, H], [B, K, S, H] twice; float32 or bfloat16
  const int32_t* positions;  // [B, T]
  void* out;                 // [B, T, N, H]
  int64_t batch, queries, heads, kv_heads, slots, size;
  float multiplier, cap;
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

INLINE Lanes LoadLanes(const float* p) {
  Lanes v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

// exp of numbers from -80 to 0, by 2^n and a polynomial in what is left, to about one unit in the
// last place.
INLINE Lanes Exp(Lanes x) {
  const Lanes shifted = x * 1.44269504f + 12582912.f;  // rounds: no fraction fits beside 1.5 * 2^23
  const Lanes n = shifted - 12582912.f;
  const Lanes r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Lanes p = r * 1.98412698e-4f + 1.38888889e-3f;
  p = p * r + 8.33333333e-3f;
  p = p * r + 4.16666667e-2f;
  p = p * r + 1.66666667e-1f;
  p = p * r + 0.5f;
  p = p * r * r + r + 1.f;
  const IntLanes bits = (__builtin_convertvector(n, IntLanes) + 127) << 23;
  Lanes power;
  std::memcpy(&power, &bits, sizeof power);
  return p * power;
}

INLINE Lanes Tanh(Lanes x) {
  const Lanes zero = {}, magnitude = x < 0 ? -x : x, square = x * x;
  const Lanes few = magnitude > 40.f ? zero + 40.f : magnitude;
  const Lanes e = Exp(-2.f * few);
  const Lanes large = (1.f - e) / (1.f + e);
  // Near zero, where 1 - e loses digits: the first terms of its series.
  Lanes p = 2.1869489e-2f - square * 8.8632356e-3f;
  p = p * square - 5.3968254e-2f;
  p = p * square + 1.3333333e-1f;
  p = p * square - 3.3333333e-1f;
  const Lanes small = x + x * square * p;
  return magnitude < 0.25f ? small : (x < 0 ? -large : large);
}
// Lane i of the result is the sum of the lanes of v[i].
INLINE Lanes Sums(Lanes v[kWidth]) {
  for (int n = kWidth / 2; n; n /= 2)
    for (int i = 0; i < n; ++i)
      v[i] = __builtin_shufflevector(v[2 * i], v[2 * i + 1], 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20,
                                     22, 24, 26, 28, 30) +
             __builtin_shufflevector(v[2 * i], v[2 * i + 1], 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21,
                                     23, 25, 27, 29, 31);
  return v[0];
}

template <class T>
INLINE void ToFloats(const T* from, int64_t count, int64_t size, int64_t padded, float* out) {
  for (int64_t s = 0; s < count; ++s) {
    for (int64_t h = 0; h < size; ++h) out[s * padded + h] = ToFloat(from[s * size + h]);
    for (int64_t h = size; h < padded; ++h) out[s * padded + h] = 0;
  }
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

// Products [R, kSlots] of R rows with the keys in scratch. R * S = 16 of them are made at a time, each
// in lanes over H that are added up at the end: R shows in no result.
template <int R>
INLINE void Products(const float* q, const float* k, int64_t padded, float* out) {
  constexpr int S = kWidth / R;
  for (int64_t s = 0; s < kSlots; s += S) {
    Lanes sums[kWidth] = {};
    for (int64_t h = 0; h < padded; h += kWidth) {
      Lanes x[R];
      for (int r = 0; r < R; ++r) x[r] = LoadLanes(q + r * padded + h);
      for (int i = 0; i < S; ++i) {
        const Lanes key = LoadLanes(k + (s + i) * padded + h);
        for (int r = 0; r < R; ++r) sums[r * S + i] += x[r] * key;
      }
    }
    const Lanes results = Sums(sums);
    const auto* bytes = reinterpret_cast<const char*>(&results);
    for (int r = 0; r < R; ++r)
      std::memcpy(out + r * kSlots + s, bytes + r * S * sizeof(float), S * sizeof(float));
  }
}

// Turns the products of one row into the weights of its slots, 0 beyond the last; adds these up.
INLINE Lanes Weights(const Attention& a, int64_t last, float* products) {
  constexpr IntLanes index = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  Lanes total = {};
  for (int64_t s = 0; s < kSlots; s += kWidth) {
    const Lanes logits = Tanh(LoadLanes(products + s) * (a.multiplier / a.cap)) * a.cap;
    const Lanes w = index > static_cast<int32_t>(last - s) ? Lanes{} : Exp(logits - a.cap);
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
      for (int r = 0; r < R; ++r) y[r][i] += weights[r * kSlots + s] * value;
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
  int64_t h = 0;
  for (; h + 4 * kWidth <= padded; h += 4 * kWidth)
    AddValues<R, 4>(scratch.weights, scratch.v + h, padded, sums + h);
  for (; h < padded; h += kWidth)
    AddValues<R, 1>(scratch.weights, scratch.v + h, padded, sums + h);
}

// Sums over the slots of one part, for the rows from first on, whose queries are in scratch:
// [rows, H] of weighted values and, behind, the sum of the weights, kWidth floats for each row.
template <class T>
INLINE void PartSums(const Attention& a, int64_t b, int64_t g, int64_t first, int64_t rows,
                     int64_t part, Scratch& scratch, float* sums) {
  const int64_t padded = a.padded(), at = (b * a.kv_heads + g) * a.slots;
  float* totals = sums + rows * padded;
  std::memset(sums, 0, rows * (padded + kWidth) * sizeof(float));
  const int64_t end = std::min((part + 1) * kPart, a.last(b, first, rows) + 1);
  for (int64_t s = part * kPart; s < end; s += kSlots) {
    const int64_t count = std::min(kSlots, end - s);  // what lies behind is not read
    ToFloats(static_cast<const T*>(a.k) + (at + s) * a.size, count, a.size, padded, scratch.k);
    ToFloats(static_cast<const T*>(a.v) + (at + s) * a.size, count, a.size, padded, scratch.v);
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
template <class T>
INLINE void PartsSums(const Attention& a, int64_t b, int64_t g, int64_t first, int64_t rows,
                      int64_t begin, int64_t end, float* sums) {
  static thread_local Aligned kept(0);
  const int64_t size = rows * (a.padded() + kWidth);
  float* more = reinterpret_cast<float*>(Kept(kept, size * sizeof(float)));
  Scratch scratch(a.padded());
  for (int64_t r = 0; r < rows; ++r)
    ToFloats(static_cast<const T*>(a.q) + a.offset(b, g, first + r), 1, a.size, a.padded(),
             scratch.q + r * a.padded());
  PartSums<T>(a, b, g, first, rows, begin, scratch, sums);
  for (int64_t part = begin + 1; part < end; ++part) {
    PartSums<T>(a, b, g, first, rows, part, scratch, more);
    for (int64_t i = 0; i < size; ++i) sums[i] += more[i];
  }
}

// Less optimised where vectors are emulated: that took most of the 23 seconds of compiling.
template <class T>
__attribute__((optimize("O1"))) void PlainParts(const Attention& a, int64_t b, int64_t g, int64_t first, int64_t rows,
                int64_t begin, int64_t end, float* sums) {
  PartsSums<T>(a, b, g, first, rows, begin, end, sums);
}

#if defined(__x86_64__)

template <class T>
__attribute__((target("avx2,fma"), optimize("O1", "fp-contract=fast"))) void Avx2Parts(
    const Attention& a, int64_t b, int64_t g, int64_t first, int64_t rows, int64_t begin,
    int64_t end, float* sums) {
  PartsSums<T>(a, b, g, first, rows, begin, end, sums);
}

template <class T>
AVX512 __attribute__((optimize("fp-contract=fast"))) void Avx512Parts(
    const Attention& a, int64_t b, int64_t g, int64_t first, int64_t rows, int64_t begin,
    int64_t end, float* sums) {
  PartsSums<T>(a, b, g, first, rows, begin, end, sums);
}

#endif

template <class T>
auto BestParts() {
#if defined(__x86_64__)
  if (BestPath() >= kVnni) return Avx512Parts<T>;
  if (BestPath() == kAvx2 && __builtin_cpu_supports("fma")) return Avx2Parts<T>;
#endif
  return PlainParts<T>;
}

// The output of the rows from first on, from their sums; zeros for one that sees no slot.
template <class T>
void Finish(const Attention& a, int64_t b, int64_t g, int64_t first, int64_t rows,
            const float* sums) {
  for (int64_t r = 0; r < rows; ++r) {
    const float* weights = sums + rows * a.padded() + r * kWidth;
    float total = 0;
    for (int i = 0; i < kWidth; ++i) total += weights[i];
    if (total == 0) total = 1;
    T* out = static_cast<T*>(a.out) + a.offset(b, g, first + r);
    for (int64_t h = 0; h < a.size; ++h) FromFloat(sums[r * a.padded() + h] / total, out + h);
  }
}

template <class T>
void AttendAll(ffi::ThreadPool& pool, const Attention& a) {
  const int64_t rows = a.rows(), tiles = (rows + kQueries - 1) / kQueries;
  const int64_t parts = (a.slots + kPart - 1) / kPart, tasks = a.batch * a.kv_heads * tiles;
  const bool split = tasks < 4 * pool.num_threads();  // then parts are tasks, added up at the end
  const int64_t splits = split ? parts : 1, size = kQueries * (a.padded() + kWidth);
  Aligned memory(split ? tasks * parts * size * sizeof(float) : 0);
  float* sums = reinterpret_cast<float*>(memory.data);
  double seen = 0;
  for (int64_t b = 0; b < a.batch; ++b) seen += a.last(b, 0, rows) + 1;
  const double bytes = seen * a.kv_heads * a.size * sizeof(T) * 2 * tiles;
  struct Task {
    int64_t b, g, first, rows, parts;
  };
  auto task = [=](int64_t i) {
    const int64_t b = i / tiles / a.kv_heads, g = i / tiles % a.kv_heads, first = i % tiles * kQueries;
    const int64_t count = std::min(kQueries, rows - first);
    return Task{b, g, first, count, a.last(b, first, count) / kPart + 1};
  };
  Parallel(pool, tasks * splits, bytes, [=](int64_t i) {
    static thread_local Aligned kept(0);
    const Task t = task(i / splits);
    const int64_t part = i % splits;
    if (part >= t.parts) return;
    float* to = split ? sums + i * size : reinterpret_cast<float*>(Kept(kept, size * sizeof(float)));
    BestParts<T>()(a, t.b, t.g, t.first, t.rows, part, split ? part + 1 : t.parts, to);
    if (!split) Finish<T>(a, t.b, t.g, t.first, t.rows, to);
  });
  if (!split) return;
  for (int64_t i = 0; i < tasks; ++i) {
    const Task t = task(i);
    float* to = sums + i * parts * size;
    for (int64_t part = 1; part < t.parts; ++part)
      for (int64_t j = 0; j < size; ++j) to[j] += to[part * size + j];
    Finish<T>(a, t.b, t.g, t.first, t.rows, to);
  }
}

// An attention whose arrays fit each other; throws what does not. Adds their sizes.
Attention AttentionOf(Sizes& sizes, const ffi::AnyBuffer& q, const ffi::AnyBuffer& k,
                      const ffi::AnyBuffer& v, const ffi::Buffer<ffi::S32>& positions,
                      const ffi::AnyBuffer& out, float multiplier, float cap) {
  CheckFloats("q", q);
  sizes.Match("q [B, T, N, H]", q);
  sizes.Match("k [B, K, S, H]", k, q.element_type());
  sizes.Match("v [B, K, S, H]", v, q.element_type());
  sizes.Match("positions [B, T]", positions);
  sizes.Match("result [B, T, N, H]", out, q.element_type());
  const int64_t heads = sizes["N"], kv_heads = sizes["K"], slots = sizes["S"];
  Check(kv_heads > 0 && heads % kv_heads == 0, heads, " query heads cannot share ", kv_heads,
        " key/value heads");
  Check(slots > 0, "a cache without slots");
  Check(cap > 0 && cap <= kLargestCap, "cap ", cap, " is not above 0 and at most ", kLargestCap);
  return {q.untyped_data(), k.untyped_data(), v.untyped_data(), positions.typed_data(),
          out.untyped_data(), sizes["B"], sizes["T"], heads, kv_heads, slots, sizes["H"],
          multiplier, cap};
}

// q [B, T, N, H] over k, v [B, K, S, H], all float32 or all bfloat16, and positions int32 [B, T]
// -> as q. A query sees the slots up to its position, and is zeros if that is negative.
void Attend(ffi::ThreadPool pool, ffi::AnyBuffer q, ffi::AnyBuffer k, ffi::AnyBuffer v,
            ffi::Buffer<ffi::S32> positions, ffi::Result<ffi::AnyBuffer> out, float multiplier,
            float cap) {
  Sizes sizes;
  const Attention a = AttentionOf(sizes, q, k, v, positions, *out, multiplier, cap);
  (q.element_type() == ffi::BF16 ? AttendAll<uint16_t> : AttendAll<float>)(pool, a);
}

constexpr int kGradientRows = 4;

// The gradient of one key/value head: four rows at a time, whose weights over all slots are made again
// and kept. All arrays are float32, and rows of H numbers are filled up to whole lanes.
struct GradientTask {
  const Attention& a;
  int64_t b, slots;          // slots: a multiple of kSlots
  const float *q, *y, *dy;   // [rows, H]
  const float *k;            // [slots, H]
  const float *keys, *values;  // [H, slots], transposed
  float *dq, *dk, *dv;       // zeros before
  float *capped, *weights;   // [slots / kSlots, kGradientRows, kSlots]
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
      for (int r = 0; r < R; ++r) sum += weights[r * kSlots + s] * x[r][i];
      std::memcpy(sums + s * padded + i * kWidth, &sum, sizeof sum);
    }
}

// Products [R, kSlots] of R rows [R, H] with columns of a transposed matrix [H, slots].
template <int R>
INLINE void ProductsWithColumns(const float* rows, int64_t padded, const float* columns,
                                int64_t slots, float* out) {
  constexpr int V = kSlots / kWidth;
  Lanes sums[R][V] = {};
  for (int64_t h = 0; h < padded; ++h)
    for (int i = 0; i < V; ++i) {
      const Lanes column = LoadLanes(columns + h * slots + i * kWidth);
      for (int r = 0; r < R; ++r) sums[r][i] += rows[r * padded + h] * column;
    }
  std::memcpy(out, sums, sizeof sums);
}

INLINE void Gradient(const GradientTask& t) {
  constexpr int R = kGradientRows;
  constexpr IntLanes index = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
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
      ProductsWithColumns<R>(t.q + at, padded, t.keys + s, t.slots, capped);
      for (int64_t r = 0; r < R; ++r) {
        const int64_t last = r < count ? a.last(t.b, first + r) : -1;
        for (int64_t i = 0; i < kSlots; i += kWidth) {
          const Lanes c = Tanh(LoadLanes(capped + r * kSlots + i) * (a.multiplier / a.cap));
          const Lanes w =
              index > static_cast<int32_t>(last - s - i) ? Lanes{} : Exp((c - 1.f) * a.cap);
          std::memcpy(capped + r * kSlots + i, &c, sizeof c);
          std::memcpy(weights + r * kSlots + i, &w, sizeof w);
          totals[r] += w;
        }
      }
    }
    for (int64_t r = 0; r < R; ++r) {
      float total = 0, product = 0;
      for (int i = 0; i < kWidth; ++i) total += totals[r][i];
      for (int64_t h = 0; h < padded; ++h)
        product += t.y[at + r * padded + h] * t.dy[at + r * padded + h];
      totals[r] = Lanes{} + (total > 0 ? 1 / total : 0);
      mean[r] = Lanes{} + product;
    }
    for (int64_t s = 0; s < end; s += kSlots) {
      const float* capped = t.capped + s / kSlots * tile;
      float* weights = t.weights + s / kSlots * tile;
      ProductsWithColumns<R>(t.dy + at, padded, t.values + s, t.slots, change);
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
      for (; h + 4 * kWidth <= padded; h += 4 * kWidth) {
        AddValues<R, 4>(change, t.k + there + h, padded, t.dq + at + h);
        AddOuter<R, 4>(change, t.q + at + h, padded, t.dk + there + h);
        AddOuter<R, 4>(weights, t.dy + at + h, padded, t.dv + there + h);
      }
      for (; h < padded; h += kWidth) {
        AddValues<R, 1>(change, t.k + there + h, padded, t.dq + at + h);
        AddOuter<R, 1>(change, t.q + at + h, padded, t.dk + there + h);
        AddOuter<R, 1>(weights, t.dy + at + h, padded, t.dv + there + h);
      }
    }
  }
}

__attribute__((optimize("O1"))) void PlainGradient(const GradientTask& t) { Gradient(t); }

#if defined(__x86_64__)

__attribute__((target("avx2,fma"), optimize("O1", "fp-contract=fast"))) void Avx2Gradient(
    const GradientTask& t) {
  Gradient(t);
}

AVX512 __attribute__((optimize("fp-contract=fast"))) void Avx512Gradient(const GradientTask& t) {
  Gradient(t);
}

#endif

auto BestGradient() {
#if defined(__x86_64__)
  if (BestPath() >= kVnni) return Avx512Gradient;
  if (BestPath() == kAvx2 && __builtin_cpu_supports("fma")) return Avx2Gradient;
#endif
  return PlainGradient;
}

template <class T>
void AttendGradients(ffi::ThreadPool& pool, const Attention& a, const void* y, const void* dy,
                     void* dk, void* dv) {
  const int64_t padded = a.padded(), slots = RoundUp(a.slots, kSlots);
  const int64_t rows = RoundUp(a.rows(), kGradientRows);
  const double flops = 1. * a.batch * a.heads * a.queries * slots * a.size;
  Parallel(pool, a.batch * a.kv_heads, flops, [=](int64_t i) {
    const int64_t b = i / a.kv_heads, g = i % a.kv_heads;
    static thread_local Aligned kept(0);
    const int64_t floats = 4 * rows * padded + 5 * slots * padded + 2 * kGradientRows * slots;
    float* next = reinterpret_cast<float*>(Kept(kept, floats * sizeof(float)));
    std::memset(next, 0, floats * sizeof(float));
    auto take = [&next](int64_t count) { return (next += count) - count; };
    auto rows_of = [=](const void* from, float* to) {
      for (int64_t r = 0; r < a.rows(); ++r)
        ToFloats(static_cast<const T*>(from) + a.offset(b, g, r), 1, a.size, padded, to + r * padded);
      return to;
    };
    auto transposed = [=](const void* from, float* to) {
      const T* x = static_cast<const T*>(from) + i * a.slots * a.size;
      for (int64_t s = 0; s < a.slots; ++s)
        for (int64_t h = 0; h < a.size; ++h) to[h * slots + s] = ToFloat(x[s * a.size + h]);
      return to;
    };
    const int64_t many = rows * padded, all = slots * padded;
    GradientTask t{a, b, slots};
    t.q = rows_of(a.q, take(many)), t.y = rows_of(y, take(many)), t.dy = rows_of(dy, take(many));
    float* k = take(all);
    ToFloats(static_cast<const T*>(a.k) + i * a.slots * a.size, a.slots, a.size, padded, k);
    t.k = k, t.keys = transposed(a.k, take(all)), t.values = transposed(a.v, take(all));
    t.dq = take(many), t.dk = take(all), t.dv = take(all);
    t.capped = take(kGradientRows * slots), t.weights = take(kGradientRows * slots);
    BestGradient()(t);
    for (int64_t r = 0; r < a.rows(); ++r)
      for (int64_t h = 0; h < a.size; ++h)
        FromFloat(t.dq[r * padded + h], static_cast<T*>(a.out) + a.offset(b, g, r) + h);
    for (int64_t s = 0; s < a.slots; ++s)
      for (int64_t h = 0; h < a.size; ++h) {
        const int64_t at = (i * a.slots + s) * a.size + h;
        FromFloat(t.dk[s * padded + h], static_cast<T*>(dk) + at);
        FromFloat(t.dv[s * padded + h], static_cast<T*>(dv) + at);
      }
  });
}

// What `Attend` takes, its output y and the gradient dy of that -> those of q, k and v.
void AttendGradient(ffi::ThreadPool pool, ffi::AnyBuffer q, ffi::AnyBuffer k, ffi::AnyBuffer v,
                    ffi::Buffer<ffi::S32> positions, ffi::AnyBuffer y, ffi::AnyBuffer dy,
                    ffi::Result<ffi::AnyBuffer> dq, ffi::Result<ffi::AnyBuffer> dk,
                    ffi::Result<ffi::AnyBuffer> dv, float multiplier, float cap) {
  Sizes sizes;
  const Attention a = AttentionOf(sizes, q, k, v, positions, *dq, multiplier, cap);
  sizes.Match("y [B, T, N, H]", y, q.element_type());
  sizes.Match("dy [B, T, N, H]", dy, q.element_type());
  sizes.Match("dk [B, K, S, H]", *dk, q.element_type());
  sizes.Match("dv [B, K, S, H]", *dv, q.element_type());
  auto gradients = q.element_type() == ffi::BF16 ? AttendGradients<uint16_t> : AttendGradients<float>;
  gradients(pool, a, y.untyped_data(), dy.untyped_data(), dk->untyped_data(), dv->untyped_data());
}

// new rows [B, T, K, H] into the slots int32 [B, T] of a cache [B, K, S, H], which is the output, too;
// those that it does not have are dropped.
void WriteSlots(ffi::AnyBuffer before, ffi::AnyBuffer rows, ffi::Buffer<ffi::S32> slots,
                ffi::Result<ffi::AnyBuffer> cache) {
  Sizes sizes;
  sizes.Match("cache [B, K, S, H]", *cache);
  sizes.Match("rows [B, T, K, H]", rows, cache->element_type());
  sizes.Match("slots [B, T]", slots);
  Check(before.untyped_data() == cache->untyped_data(), "the cache is not the output");
  const int64_t batch = sizes["B"], heads = sizes["K"], there = sizes["S"], count = sizes["T"];
  const int64_t size = sizes["H"] * ffi::ByteWidth(cache->element_type());
  const auto* from = static_cast<const char*>(rows.untyped_data());
  auto* to = static_cast<char*>(cache->untyped_data());
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t t = 0; t < count; ++t) {
      const int64_t slot = slots.typed_data()[b * count + t];
      for (int64_t k = 0; k < heads; ++k, from += size)
        if (slot >= 0 && slot < there)
          std::memcpy(to + ((b * heads + k) * there + slot) * size, from, size);
    }
}

// --- Rotary embedding and gated sums --------------------------------------------------------------
//
// Two products, added: XLA contracts the one or the other into a fused multiply-add, by the shape of
// its loop. Here both are rounded before they are added, on every processor.

#if defined(__clang__)
#pragma STDC FP_CONTRACT OFF
#define ROUNDED
#else
#define ROUNDED __attribute__((optimize("fp-contract=off")))
#endif

template <class T>
ROUNDED void RotateHeads(const T* x, const float* sin, const float* cos, int64_t heads, int64_t half,
                         T* out) {
  for (int64_t n = 0; n < heads; ++n, x += 2 * half, out += 2 * half)
    for (int64_t i = 0; i < half; ++i) {
      const float a = ToFloat(x[i]), b = ToFloat(x[i + half]);
      FromFloat(a * cos[i] - b * sin[i], out + i);
      FromFloat(b * cos[i] + a * sin[i], out + half + i);
    }
}

template <class T>
void RotateTokens(ffi::ThreadPool& pool, const void* x, const int32_t* positions,
                  const float* frequencies, int64_t tokens, int64_t heads, int64_t half, void* out) {
  const int64_t row = heads * 2 * half;
  Parallel(pool, tokens, 8. * tokens * row, [=](int64_t t) {
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

// x [B, T, N, H], float32 or bfloat16, positions int32 [B, T], frequencies float32 [H / 2] -> as x:
// pairs (i, i + H / 2) rotated by position times frequency.
void Rotate(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::Buffer<ffi::S32> positions,
            ffi::Buffer<ffi::F32> frequencies, ffi::Result<ffi::AnyBuffer> out) {
  Sizes sizes;
  CheckFloats("x", x);
  sizes.Match("x [B, T, N, H]", x);
  sizes.Match("positions [B, T]", positions);
  sizes.Match("frequencies [H / 2]", frequencies);
  sizes.Match("rotated [B, T, N, H]", *out, x.element_type());
  const int64_t half = sizes["H / 2"];
  Check(sizes["H"] == 2 * half, "heads of ", sizes["H"], " numbers, but ", half, " frequencies");
  auto rotate = x.element_type() == ffi::BF16 ? RotateTokens<uint16_t> : RotateTokens<float>;
  rotate(pool, x.untyped_data(), positions.typed_data(), frequencies.typed_data(),
         sizes["B"] * sizes["T"], sizes["N"], half, out->untyped_data());
}

template <class T>
ROUNDED void AddGated(const T* row, float gate, int64_t size, float* sum) {
  for (int64_t i = 0; i < size; ++i) sum[i] += gate * ToFloat(row[i]);
}

// rows [R, D], float32 or bfloat16, gates float32 [T, A], index int32 [T, A] -> float32 [T, D]: each
// token's rows, times its gates, summed in order; those that there are not are left out.
void GatedSums(ffi::ThreadPool pool, ffi::AnyBuffer rows, ffi::Buffer<ffi::F32> gates,
               ffi::Buffer<ffi::S32> index, ffi::ResultBuffer<ffi::F32> out) {
  Sizes sizes;
  CheckFloats("rows", rows);
  sizes.Match("rows [R, D]", rows);
  sizes.Match("gates [T, A]", gates);
  sizes.Match("index [T, A]", index);
  sizes.Match("sums [T, D]", *out);
  const int64_t count = sizes["R"], size = sizes["D"], tokens = sizes["T"], chosen = sizes["A"];
  const bool half = rows.element_type() == ffi::BF16;
  const void* from = rows.untyped_data();
  const float* gate = gates.typed_data();
  const int32_t* at = index.typed_data();
  float* to = out->typed_data();
  Parallel(pool, tokens, 4. * tokens * chosen * size, [=](int64_t t) {
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

// --- Transposition --------------------------------------------------------------------------------

typedef uint16_t Eight __attribute__((vector_size(16)));

// 8 rows of 8 numbers, rows `stride` apart, to as many columns. Each of three rounds interleaves the
// first half of the rows with the second.
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
void Transpose(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::Result<ffi::AnyBuffer> out) {
  Sizes sizes;
  sizes.Match("x [B, R, C]", x);
  sizes.Match("transposed [B, C, R]", *out, x.element_type());
  Check(ffi::ByteWidth(x.element_type()) == 2, "x is ", x.element_type(), ", not of two bytes");
  const int64_t rows = sizes["R"], columns = sizes["C"], strips = RoundUp(columns, 32) / 32;
  const auto* from = static_cast<const uint16_t*>(x.untyped_data());
  auto* to = static_cast<uint16_t*>(out->untyped_data());
  Parallel(pool, sizes["B"] * strips, x.size_bytes(), [=](int64_t i) {
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

XLA_FFI_DEFINE_HANDLER_SYMBOL(TransposeHandler, Kernel<Transpose>::Call,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(RotateHandler, Kernel<Rotate>::Call,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::AnyBuffer>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(GatedSumsHandler, Kernel<GatedSums>::Call,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(WriteSlotsHandler, Kernel<WriteSlots>::Call,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::AnyBuffer>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(AttendHandler, Kernel<Attend>::Call,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<float>("multiplier")
                                  .Attr<float>("cap"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(AttendGradientHandler, Kernel<AttendGradient>::Call,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<float>("multiplier")
                                  .Attr<float>("cap"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(TableDotHandler, Kernel<TableDot>::Call,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::Buffer<ffi::F32>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(RmsNormHandler, Kernel<RmsNorm>::Call,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<float>("eps"));

extern "C" int64_t BestTernaryPath() { return BestPath(); }

// digits [rows, width] -> packed [rows, packed_width]; the largest digit, or -1 if widths do not fit.
extern "C" int64_t FromBase3(const uint8_t* digits, int64_t rows, int64_t width, uint8_t* packed,
                             int64_t packed_width) {
  if (rows < 0 || width < 0 || width % 4 || packed_width != width / 4 * 5) return -1;
  return FromBase3Bytes(digits, rows * width, packed);
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(TernarySumsHandler, Kernel<TernarySums>::Call,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::S8>>()
                                  .Arg<ffi::Buffer<ffi::U8>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::Buffer<ffi::S32>>()
                                  .Attr<int64_t>("block")
                                  .Attr<int64_t>("path"));
