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

#include <vector>

#include "common.h"

namespace kernels {
namespace {

constexpr int64_t kVector = 64;       // bytes taken at a time; slabs are padded to whole ones
constexpr int64_t kPanel = 32;        // outputs that a thread takes at a time
constexpr int64_t kLargePanel = 128;  // with many rows, which are then read less often
constexpr int64_t kFewRows = 8;       // from here on AMX is faster
constexpr int64_t kChunk = 512;       // codes of an output unpacked at a time, to stay in L1
constexpr int64_t kTileBytes = 1024;  // of an AMX tile, 16 rows of 64
constexpr int64_t kWidest = 1 << 21;  // bytes of an output: no int32 sum of any path is exceeded

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

// M rows times N outputs at once, M * N = 4. The codes of slab r are masked but not shifted, so
// they count 4^r times; each slab has a sum of its own, which is shifted back at the end, exactly.
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

// --- AMX: 16 outputs times 16 rows in a tile -----------------------------------------------------

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

#endif

// x int8 [blocks, R, I], packed uint8 [E, O, B], experts int32 [blocks] -> int32 [blocks, R, O].
// block: bytes in a packing block; path: the best one to take, -1 for all that the processor has.
void TernarySums(ffi::ThreadPool pool, ffi::Buffer<ffi::S8> x, ffi::Buffer<ffi::U8> packed,
                 ffi::Buffer<ffi::S32> experts, ffi::ResultBuffer<ffi::S32> out, int64_t block,
                 int64_t path) {
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

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(TernarySumsHandler, Kernel<TernarySums>::Call,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::S8>>()
                                  .Arg<ffi::Buffer<ffi::U8>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::Buffer<ffi::S32>>()
                                  .Attr<int64_t>("block")
                                  .Attr<int64_t>("path"));

}  // namespace kernels

extern "C" int64_t BestTernaryPath() { return kernels::BestPath(); }
