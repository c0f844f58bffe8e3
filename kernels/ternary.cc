// Products of packed ternary matrices on a CPU, for JAX through XLA's foreign function interface.
//
// A packed matrix has a row of B bytes for each output; byte j holds four codes trit + 1, at bits
// 0, 2, 4 and 6 (quantize.py draws which inputs they belong to). The activations come in the same
// order, four slabs of B int8 for each row, so that a product is
//
//     sum over slabs r and bytes j of (byte[j] >> 2 r & 3) * slab[r][j]  -  sum of all activations
//
// in exact int32. Where groups of activations have multipliers, and several planes of trits add up
// (their bytes lie side by side, a block of each in turn), codes are sums of trits times
// multipliers, within int8. Paths, chosen by what the processor has: AMX tiles for many rows,
// AVX-512 VNNI, which unpacks by AVX2 and takes it for few rows with multipliers, AVX2, and C++
// that any compiler takes. All give the same integers.

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
constexpr int64_t kWidest = 1 << 20;  // bytes of an output: no int32 sum of any path is exceeded

// One problem: R rows of activations times one matrix, for its outputs begin to end.
struct Problem {
  const uint8_t* packed;      // [O, P B], B bytes of each plane
  const int8_t* multipliers;  // [O, G, P], or null: all are 1
  const int8_t* slabs;        // [R, 4, width]; for AVX2 and VNNI see `Activations`
  const int32_t* sums;        // [R], of the activations of each row
  int32_t* out;               // [R, O]
  int64_t rows, bytes, width, outputs, begin, end;
  int64_t planes, groups, block;  // P, G and the bytes of a packing block of one plane
  int64_t of_block, of_chunk;     // groups in a block and in a chunk; also if all of them are one
  int64_t record, records;        // AVX2: bytes of a row in a chunk, and how many rows there are
  bool vnni;
};

// --- How AVX2 and VNNI have their activations ----------------------------------------------------

constexpr int64_t kStep = 32;           // bytes of a vector
constexpr int64_t kSteps = 16;          // of a chunk: 64 pairs of at most 2 * 2 * 127 fit 16 bits
constexpr int64_t kPart = 32 * kSteps;  // packed bytes of a plane in a chunk
constexpr int64_t kMost = kPart / 4;    // groups of a chunk

struct Activations {  // a row's, of a chunk
  int8_t slabs[4 * kSteps][kStep];
  int32_t sums[];  // of each group, in the lower 16 bits
};

// --- C++ of any compiler -------------------------------------------------------------------------

void PlainTrits(const Problem& p) {
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

// Adds a plane's trits of slab r, of a block, times their multiplier to codes.
template <int r>
void AddTrits(const uint8_t* from, int64_t block, int8_t by, int8_t* __restrict to) {
  for (int64_t i = 0; i < block; ++i) to[i] += static_cast<int8_t>((from[i] >> 2 * r & 3) - 1) * by;
}

// The codes of output o, int8 [4, width].
void Unpack(const Problem& p, int64_t o, int8_t* codes) {
  constexpr decltype(&AddTrits<0>) add[] = {AddTrits<0>, AddTrits<1>, AddTrits<2>, AddTrits<3>};
  const uint8_t* w = p.packed + o * p.planes * p.bytes;
  const int8_t* multipliers = p.multipliers + o * p.groups * p.planes;
  const int64_t blocks = p.bytes / p.block, of_block = p.of_block;
  std::memset(codes, 0, 4 * p.width);
  for (int64_t b = 0; b < blocks; ++b)
    for (int r = 0; r < 4; ++r) {
      const int64_t group = p.groups == 1 ? 0 : b * of_block + r * of_block / 4;
      for (int64_t q = 0; q < p.planes; ++q)
        add[r](w + (b * p.planes + q) * p.block, p.block, multipliers[group * p.planes + q],
               codes + r * p.width + b * p.block);
    }
}

void PlainPanel(const Problem& p) {
  if (!p.multipliers) return PlainTrits(p);
  static thread_local Aligned kept(0);
  auto* codes = reinterpret_cast<int8_t*>(Kept(kept, 4 * p.width));
  for (int64_t o = p.begin; o < p.end; ++o) {
    if (p.bytes) Unpack(p, o, codes);
    for (int64_t m = 0; m < p.rows; ++m) {
      const int8_t* x = p.slabs + m * 4 * p.width;
      int32_t sum = 0;
      for (int64_t j = 0; j < 4 * p.width; ++j) sum += codes[j] * x[j];
      p.out[m * p.outputs + o] = sum;
    }
  }
}

#if defined(__x86_64__)

// What a vector needs of a multiplier m: m as 16 bits, twice; or what it makes of the codes 0, 1
// and 2, a byte each: -m, 0 and m, or 127 more.
enum Form { kPair, kSigned, kUnsigned };

template <Form form>
INLINE int32_t Formed(int32_t m) {
  return form == kPair     ? m * 0x10001
         : form == kSigned ? m << 16 | (-m & 255)
                           : 0x7f7f7f + m * 0xffff;
}

// The multipliers of plane q for n groups from the first on, and zeros behind the last group.
template <Form form>
__attribute__((target("avx2"))) void Multipliers(const Problem& p, int64_t o, int64_t q,
                                                 int64_t first, int64_t n, int32_t* to) {
  const int8_t* from = p.multipliers + o * p.groups * p.planes + q;
  const int64_t there = p.groups == 1 ? n : std::min(n, p.groups - first);
  if (p.groups == 1) {
    std::fill(to, to + n, Formed<form>(from[0]));
  } else if (p.planes == 1) {
    for (int64_t g = 0; g < there; ++g) to[g] = Formed<form>(from[first + g]);
  } else {
    for (int64_t g = 0; g < there; ++g) to[g] = Formed<form>(from[2 * (first + g)]);
  }
  std::fill(to + there, to + n, 0);
}

// --- AVX2 ----------------------------------------------------------------------------------------
//
// Codes trit + 1 and activations multiply to 16 bits, which are summed as far as they fit, or as
// all have one multiplier; then they are widened, times the multiplier. What the codes count too
// much is the sum over groups of multiplier times the group's sum of activations.
//
// Of two planes and several rows, the trits are summed first, to codes of 8 bits with a sign.

#define AVX2 __attribute__((target("avx2")))

constexpr int64_t kTile = 8;                  // outputs whose codes of a chunk are unpacked, to L1
constexpr int64_t kVnniRows = 4;              // for VNNI; without multipliers, after it
constexpr int64_t kTileRows = 16;             // from here on codes are unpacked first
constexpr int64_t kFewActivations = 1 << 17;  // bytes of all rows
constexpr int64_t kAhead = 4096;              // packed bytes, to be prefetched

INLINE int64_t StepsOf(int64_t bytes, int64_t begin) {
  return std::min(kSteps, (bytes - begin + kStep - 1) / kStep);
}
AVX2 INLINE const Activations* RowOf(const Problem& p, int64_t chunk, int64_t m) {
  return reinterpret_cast<const Activations*>(p.slabs + (chunk * p.records + m) * p.record);
}

INLINE void Prefetch(const uint8_t* from) {
  _mm_prefetch(reinterpret_cast<const char*>(from), _MM_HINT_T0);
}

AVX2 INLINE __m256i Load(const void* from) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
}

// 32 bytes of plane q of an output from byte j of the plane on; zeros behind the last.
// kBlock: bytes of a block, 16, 32 or 64; 0 for any, of one plane
template <int P, int kBlock>
AVX2 INLINE __m256i LoadPacked(const uint8_t* w, int64_t j, int q, int64_t bytes) {
  if (P == 2 && kBlock == 16) {  // of two blocks
    const auto* from = reinterpret_cast<const __m128i*>(w + 2 * j + 16 * q);
    const bool two = j + 16 < bytes;
    return _mm256_set_m128i(two ? _mm_loadu_si128(from + 2) : _mm_setzero_si128(),
                            _mm_loadu_si128(from));
  }
  if (P == 2) return Load(w + j + (j & -kBlock) + q * kBlock);
  if (kBlock >= kStep || j + kStep <= bytes) return Load(w + j);
  alignas(32) uint8_t tail[kStep] = {};
  std::memcpy(tail, w + j, bytes - j);
  return Load(tail);
}

// The codes trit + 1 of slab r.
AVX2 INLINE __m256i CodesOf(__m256i v, int r) {
  return _mm256_and_si256(_mm256_srli_epi16(v, 2 * r), _mm256_set1_epi8(3));
}

// What a block of a plane has, in all lanes of a vector; of two blocks, what each has in its half.
// of_block: how far the next block's is from it. Eight are read, so that as many lie behind all.
template <int kBlock>
AVX2 INLINE __m256i Broadcast(const int32_t* one, int of_block) {
  if (kBlock != 16) return _mm256_set1_epi32(*one);
  const __m128i first = _mm_setzero_si128(), next = _mm_set1_epi32(of_block);
  return _mm256_permutevar8x32_epi32(Load(one), _mm256_set_m128i(next, first));
}

AVX2 INLINE __m128i Totals(__m256i a, __m256i b, __m256i c, __m256i d) {
  const __m256i all = _mm256_hadd_epi32(_mm256_hadd_epi32(a, b), _mm256_hadd_epi32(c, d));
  return _mm_add_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1));
}

AVX2 INLINE int32_t Total(__m256i v) {
  const __m256i zero = _mm256_setzero_si256();
  return _mm_cvtsi128_si32(Totals(v, zero, zero, zero));
}

// Of one step four sums of 16 bits, of at most 2 * 2 * 127 each.
AVX2 INLINE __m256i TritsOfStep(__m256i v, const int8_t (*slabs)[kStep]) {
  __m256i few = _mm256_setzero_si256();
  for (int r = 0; r < 4; ++r)
    few = _mm256_add_epi16(few, _mm256_maddubs_epi16(CodesOf(v, r), Load(slabs[r])));
  return few;
}

AVX2 void TritsOfRow(const Problem& p, int64_t o, int64_t m) {
  const uint8_t* w = p.packed + o * p.bytes;
  const int64_t bytes = p.bytes, whole = bytes / kStep * kStep;
  __m256i sum = _mm256_setzero_si256();
  for (int64_t chunk = 0, begin = 0; begin < bytes; ++chunk, begin += kPart) {
    const Activations& x = *RowOf(p, chunk, m);
    __m256i few = _mm256_setzero_si256();
    int64_t j = begin;
    for (; j < std::min(whole, begin + kPart); j += kStep) {
      few = _mm256_add_epi16(few, TritsOfStep(Load(w + j), x.slabs + (j - begin) / kStep * 4));
      Prefetch(w + j + kAhead);
    }
    if (j < std::min(bytes, begin + kPart)) {
      const __m256i v = LoadPacked<1, 0>(w, j, 0, bytes);
      few = _mm256_add_epi16(few, TritsOfStep(v, x.slabs + (j - begin) / kStep * 4));
    }
    sum = _mm256_add_epi32(sum, _mm256_madd_epi16(few, _mm256_set1_epi16(1)));
  }
  p.out[m * p.outputs + o] = Total(sum) - p.sums[m];
}

// The multipliers of all planes of an output, `stride` apart, as pairs; zeros behind.
AVX2 void Pairs(const Problem& p, int64_t o, int64_t stride, int32_t* to) {
  const int8_t* from = p.multipliers + o * p.groups * p.planes;
  int64_t done = 0;
  for (; p.groups > 1 && done + 8 <= p.groups; done += 8) {
    const auto* eight = reinterpret_cast<const __m128i*>(from + done * p.planes);
    auto* first = reinterpret_cast<__m256i*>(to + done);
    auto* second = reinterpret_cast<__m256i*>(to + stride + done);
    // In the lower 16 bits of each lane is the first plane's multiplier, above it the second's.
    const __m256i v = p.planes == 1 ? _mm256_cvtepi8_epi32(_mm_loadl_epi64(eight))
                                    : _mm256_cvtepi8_epi16(_mm_loadu_si128(eight));
    _mm256_storeu_si256(first, _mm256_blend_epi16(v, _mm256_slli_epi32(v, 16), 0xaa));
    if (p.planes == 2)
      _mm256_storeu_si256(second, _mm256_blend_epi16(_mm256_srli_epi32(v, 16), v, 0xaa));
  }
  for (int64_t q = 0; q < p.planes; ++q)
    Multipliers<kPair>(p, o, q, done, stride - done, to + q * stride + done);
}

// P planes, C groups in a block. The codes of slabs 2 and 3 are masked where they are and count 16
// times, which saves shifts; their sums are kept apart.
// multipliers: of the output, [P, stride]
template <int P, int C, int kBlock>
AVX2 void PlanesOfRow(const Problem& p, int64_t o, int64_t m, const int32_t* multipliers,
                      int64_t stride) {
  constexpr int V = kBlock == 64 ? 2 : 1;  // vectors with the same multipliers
  constexpr int K = C == 4 ? 4 : 2;        // sums of 16 bits
  const int64_t bytes = p.bytes, part = p.of_chunk;
  const __m256i low = _mm256_set1_epi8(3), high = _mm256_set1_epi8(0x30);
  const uint8_t* w = p.packed + o * P * bytes;
  __m256i sum = _mm256_setzero_si256();
  for (int64_t chunk = 0, begin = 0; begin < bytes; ++chunk, begin += kPart) {
    const Activations& x = *RowOf(p, chunk, m);
    const int64_t steps = StepsOf(bytes, begin);
    const int32_t* by = multipliers + chunk * part;
    __m256i sums[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()};
    for (int64_t s = 0; s < steps; s += V) {
#pragma GCC unroll 2
      for (int q = 0; q < P; ++q) {
        const int32_t* at = by + q * stride + s * kStep / kBlock * C;
        __m256i few[K];
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) {
          const __m256i even = LoadPacked<P, kBlock>(w, begin + (s + v) * kStep, q, bytes);
          const __m256i odd = _mm256_srli_epi16(even, 2);
          Prefetch(w + P * (begin + (s + v) * kStep) + q * kStep + kAhead);
#pragma GCC unroll 4
          for (int r = 0; r < 4; ++r) {
            const __m256i codes = _mm256_and_si256(r % 2 ? odd : even, r < 2 ? low : high);
            const __m256i product = _mm256_maddubs_epi16(codes, Load(x.slabs[4 * (s + v) + r]));
            const bool first = v == 0 && r * K % 4 == 0;
            few[r * K / 4] = first ? product : _mm256_add_epi16(few[r * K / 4], product);
          }
        }
#pragma GCC unroll 4
        for (int k = 0; k < K; ++k) {
          const int32_t* one = at + k * C / K;
          const __m256i wide = _mm256_madd_epi16(few[k], Broadcast<kBlock>(one, C));
          sums[k * 2 / K] = _mm256_add_epi32(sums[k * 2 / K], wide);
        }
      }
    }
    sum = _mm256_add_epi32(sum, _mm256_add_epi32(sums[0], _mm256_srai_epi32(sums[1], 4)));
    for (int q = 0; q < P; ++q)
      for (int64_t g = 0; g < part; g += 8) {
        const __m256i more = _mm256_madd_epi16(Load(by + q * stride + g), Load(x.sums + g));
        sum = _mm256_sub_epi32(sum, more);
      }
  }
  p.out[m * p.outputs + o] = Total(sum);
}

template <int P, int C, int kBlock>
void FewRows(const Problem& p) {
  static thread_local Aligned kept(0);
  const int64_t stride = RoundUp(p.bytes, kPart) / kPart * p.of_chunk;
  auto* multipliers = reinterpret_cast<int32_t*>(Kept(kept, (P * stride + 8) * 4));
  for (int64_t o = p.begin; o < p.end; ++o) {
    Pairs(p, o, stride, multipliers);
    for (int64_t m = 0; m < p.rows; ++m) PlanesOfRow<P, C, kBlock>(p, o, m, multipliers, stride);
  }
}

struct Codes {  // of kTile outputs and a chunk
  alignas(64) uint8_t codes[kTile][4 * kSteps][kStep];
  alignas(64) int32_t multipliers[kTile][kMost + 8];
};

// Sums of M rows times four outputs from n on, of a chunk. C: groups in a block; 0 for trits
// without multipliers, -1 for codes with a sign; for VNNI -2 for those plus 127.
//
// Loops over vectors are not unrolled: gcc would add up the products of several steps first, for
// want of registers.
template <int M, int C>
AVX2 INLINE void MultiplyCodes(const Codes& codes, const Activations* const* x, int n,
                               int64_t steps, __m256i (&out)[M][4]) {
  const __m256i one = _mm256_set1_epi16(1);
  __m256i sums[M][4];
  for (auto& row : sums)
    for (auto& sum : row) sum = _mm256_setzero_si256();
#pragma GCC unroll 1
  for (int64_t t = 0; t < 4 * steps; ++t) {
    __m256i slabs[M];
    for (int m = 0; m < M; ++m) slabs[m] = Load(x[m]->slabs[t]);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const __m256i code = Load(codes.codes[n + i][t]);
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) {
        if (C == 0) {
          sums[m][i] = _mm256_add_epi16(sums[m][i], _mm256_maddubs_epi16(code, slabs[m]));
        } else {  // |x| <= 128 times twice 127 fits 16 bits
          const __m256i two =
              _mm256_maddubs_epi16(_mm256_abs_epi8(slabs[m]), _mm256_sign_epi8(code, slabs[m]));
          sums[m][i] = _mm256_add_epi32(sums[m][i], _mm256_madd_epi16(two, one));
        }
      }
    }
  }
  for (int m = 0; m < M; ++m)
    for (int i = 0; i < 4; ++i)
      out[m][i] = C == 0 ? _mm256_madd_epi16(sums[m][i], one) : sums[m][i];
}

template <int M, int C, int kBlock>
AVX2 INLINE void MultiplyGroups(const Problem& p, const Codes& codes, const Activations* const* x,
                                int n, int64_t steps, __m256i (&out)[M][4]) {
  constexpr int S = 4 / C;  // slabs with one multiplier
  __m256i sums[M][4];
  for (auto& row : sums)
    for (auto& sum : row) sum = _mm256_setzero_si256();
#pragma GCC unroll 1
  for (int64_t t = 0; t < steps * C; ++t) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      __m256i few[M];
#pragma GCC unroll 4
      for (int r = 0; r < S; ++r) {
        const __m256i code = Load(codes.codes[n + i][t * S + r]);
#pragma GCC unroll 4
        for (int m = 0; m < M; ++m) {
          const __m256i product = _mm256_maddubs_epi16(code, Load(x[m]->slabs[t * S + r]));
          few[m] = r ? _mm256_add_epi16(few[m], product) : product;
        }
      }
      const int32_t* at = codes.multipliers[n + i] + t / C * kStep / kBlock * C + t % C;
      const __m256i by = Broadcast<kBlock>(at, C);
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m)
        sums[m][i] = _mm256_add_epi32(sums[m][i], _mm256_madd_epi16(few[m], by));
    }
  }
  const int64_t part = p.of_chunk;
  for (int m = 0; m < M; ++m)
    for (int i = 0; i < 4; ++i) {
      for (int64_t g = 0; g < part; g += 8) {
        const __m256i by = Load(codes.multipliers[n + i] + g);
        sums[m][i] = _mm256_sub_epi32(sums[m][i], _mm256_madd_epi16(by, Load(x[m]->sums + g)));
      }
      out[m][i] = sums[m][i];
    }
}

template <int M, int C, int kBlock>
AVX2 void MultiplyRows(const Problem& p, const Codes& codes, int64_t chunk, int64_t m0,
                       int64_t o0) {
  const Activations* x[M];
  for (int m = 0; m < M; ++m) x[m] = RowOf(p, chunk, m0 + m);
  for (int n = 0; n < kTile && o0 + n < p.end; n += 4) {
    __m256i sums[M][4];
    const int64_t steps = StepsOf(p.bytes, chunk * kPart);
    if constexpr (C > 0) {
      MultiplyGroups<M, C, kBlock>(p, codes, x, n, steps, sums);
    } else {
      MultiplyCodes<M, C>(codes, x, n, steps, sums);
    }
    for (int m = 0; m < M; ++m) {
      alignas(16) int32_t totals[4];
      const __m128i all = Totals(sums[m][0], sums[m][1], sums[m][2], sums[m][3]);
      _mm_store_si128(reinterpret_cast<__m128i*>(totals), all);
      int32_t* out = p.out + (m0 + m) * p.outputs + o0 + n;
      for (int i = 0; i < 4 && o0 + n + i < p.end; ++i)
        out[i] = (chunk ? out[i] : C ? 0 : -p.sums[m0 + m]) + totals[i];
    }
  }
}

// The codes of an output and a chunk: trit + 1, or sums of two trits times their multipliers.
template <int P, int C, int kBlock>
AVX2 void UnpackChunk(const Problem& p, int64_t o, int64_t chunk, Codes& all, int n) {
  const int64_t bytes = p.bytes, begin = chunk * kPart, steps = StepsOf(bytes, begin);
  const uint8_t* w = p.packed + o * P * bytes;
  const int64_t part = C ? p.of_chunk : 0, of_block = C ? p.of_block : 0;
  int32_t tables[2][kMost + 8];
  if (C > 0) Multipliers<kPair>(p, o, 0, chunk * part, part, all.multipliers[n]);
  for (int q = 0; q < (C < 0 ? P : 0); ++q)
    C == -2 && q == 0 ? Multipliers<kUnsigned>(p, o, q, chunk * part, part, tables[q])
                      : Multipliers<kSigned>(p, o, q, chunk * part, part, tables[q]);
  for (int64_t s = 0; s < steps; ++s) {
    const int64_t j = begin + s * kStep, first = s * kStep / std::max(1, kBlock) * of_block;
    __m256i codes[4];
#pragma GCC unroll 2
    for (int q = 0; q < P; ++q) {
      const __m256i v = LoadPacked<P, kBlock>(w, j, q, bytes);
#pragma GCC unroll 4
      for (int r = 0; r < 4; ++r) {
        __m256i code = CodesOf(v, r);
        if (C < 0) {
          const int32_t* at = tables[q] + first + r * of_block / 4;
          code = _mm256_shuffle_epi8(Broadcast<kBlock>(at, of_block), code);
        }
        codes[r] = q ? _mm256_add_epi8(codes[r], code) : code;
      }
    }
    for (int q = 0; q < P; ++q) Prefetch(w + P * (j + kPart) + q * kStep);
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r)
      _mm256_store_si256(reinterpret_cast<__m256i*>(all.codes[n][4 * s + r]), codes[r]);
  }
}

// --- AVX-512 VNNI --------------------------------------------------------------------------------
//
// AVX2's codes times many rows, in registers for a chunk of three rows and all outputs of a tile.
// With multipliers, codes are 127 + the sum of trits times them, without a sign; 127 times the sum
// of all activations is subtracted. (A sum that exceeds int32 until then comes back.)

#define VNNI __attribute__((target("avx512f,avx512bw,avx512vnni")))

// The sums of the lanes of four vectors.
VNNI INLINE __m128i Totals(__m512i a, __m512i b, __m512i c, __m512i d) {
  const __m512i ab = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
  const __m512i cd = _mm512_add_epi32(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
  const __m512i all =
      _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
  const __m256i half =
      _mm256_add_epi32(_mm512_castsi512_si256(all), _mm512_extracti64x4_epi64(all, 1));
  return _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
}

AVX512 INLINE __mmask64 First(int64_t n) { return n >= 64 ? ~0ull : n <= 0 ? 0 : (1ull << n) - 1; }

// Not _mm512_dpbusd_epi32: gcc 12 copies each sum to another register before and after it.
VNNI INLINE void AddDots(__m512i& sums, __m512i codes, __m512i x) {
  __asm__("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(codes), "vm"(x));
}

// M rows times N outputs from o0 on, M * N <= 4. In the lower half of a vector are codes of one
// slab, above it those of the next. They are masked where they are, so that they count 4^r times,
// which is shifted back at the end, exactly.
template <int M, int N>
VNNI void TritsOfRows(const Problem& p, int64_t o0) {
  const uint8_t* w[N];
  for (int n = 0; n < N; ++n) w[n] = p.packed + std::min(o0 + n, p.end - 1) * p.bytes;
  // What to prefetch of short rows: the next outputs, which lie right behind.
  const int64_t ahead = p.bytes <= 2048 ? 2 * N * p.bytes : kAhead;
  const __m512i three = _mm512_set1_epi8(3);
  const __m512i shifts[2] = {_mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi32(2), 1),
                             _mm512_inserti64x4(_mm512_set1_epi32(4), _mm256_set1_epi32(6), 1)};
  __m512i sums[4][2] = {};
  for (int64_t chunk = 0, begin = 0; begin < p.bytes; ++chunk, begin += kPart) {
    const __m512i* x[M];
    for (int m = 0; m < M; ++m) x[m] = reinterpret_cast<const __m512i*>(RowOf(p, chunk, m)->slabs);
    const int64_t steps = StepsOf(p.bytes, begin);
#pragma GCC unroll 1
    for (int64_t s = 0; s < steps; ++s) {
      const int64_t j = begin + s * kStep;
      const __mmask64 there = First(std::min(kStep, p.bytes - j));
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) {
        const __m512i one = _mm512_maskz_loadu_epi8(there, w[n] + j);
        const __m512i v = _mm512_shuffle_i64x2(one, one, 0x44);
        Prefetch(w[n] + j + ahead);
#pragma GCC unroll 2
        for (int t = 0; t < 2; ++t) {
          const __m512i codes = _mm512_and_si512(v, _mm512_sllv_epi32(three, shifts[t]));
#pragma GCC unroll 4
          for (int m = 0; m < M; ++m) AddDots(sums[m * N + n][t], codes, x[m][2 * s + t]);
        }
      }
    }
  }
#pragma GCC unroll 4
  for (auto& [low, high] : sums)
    low = _mm512_add_epi32(_mm512_srav_epi32(low, shifts[0]), _mm512_srav_epi32(high, shifts[1]));
  alignas(16) int32_t totals[4];
  _mm_store_si128(reinterpret_cast<__m128i*>(totals),
                  Totals(sums[0][0], sums[1][0], sums[2][0], sums[3][0]));
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < N && o0 + n < p.end; ++n)
      p.out[m * p.outputs + o0 + n] = totals[m * N + n] - p.sums[m];
}

template <int M>
void FewRowsOfTrits(const Problem& p) {
  if (p.rows < M) return FewRowsOfTrits<std::max(1, M - 1)>(p);
  for (int64_t o = p.begin; o < p.end; o += 4 / M) TritsOfRows<M, 4 / M>(p, o);
}

// M rows times the outputs of a tile.
template <int M, int C>
VNNI void MultiplyWide(const Problem& p, const Codes& codes, int64_t chunk, int64_t m0, int64_t o) {
  const int64_t vectors = 2 * StepsOf(p.bytes, chunk * kPart);
  const __m512i* x[M];
  for (int m = 0; m < M; ++m)
    x[m] = reinterpret_cast<const __m512i*>(RowOf(p, chunk, m0 + m)->slabs);
  const auto* c = reinterpret_cast<const __m512i*>(codes.codes);
  __m512i sums[M][kTile];
#pragma GCC unroll 4
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
    for (int n = 0; n < kTile; ++n) sums[m][n] = _mm512_setzero_si512();
#pragma GCC unroll 1
  for (int64_t t = 0; t < vectors; ++t) {
    __m512i slabs[M];
    for (int m = 0; m < M; ++m) slabs[m] = _mm512_load_si512(x[m] + t);
#pragma GCC unroll 8
    for (int n = 0; n < kTile; ++n) {
      const __m512i code = _mm512_load_si512(c + 2 * kSteps * n + t);
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) AddDots(sums[m][n], code, slabs[m]);
    }
  }
  const __mmask16 there = First(std::min(kTile, p.end - o));
#pragma GCC unroll 4
  for (int m = 0; m < M; ++m) {
    int32_t* out = p.out + (m0 + m) * p.outputs + o;
    const __m512i(&s)[kTile] = sums[m];
    const __m256i all =
        _mm256_set_m128i(Totals(s[4], s[5], s[6], s[7]), Totals(s[0], s[1], s[2], s[3]));
    const __m512i before = chunk ? _mm512_maskz_loadu_epi32(there, out)
                                 : _mm512_set1_epi32((C ? -127u : -1u) * p.sums[m0 + m]);
    _mm512_mask_storeu_epi32(out, there, _mm512_add_epi32(before, _mm512_zextsi256_si512(all)));
  }
}

template <int P, int C, int kBlock, bool kVnni>
void Tiles(const Problem& p) {
  static thread_local Aligned kept(sizeof(Codes));
  Codes& codes = *reinterpret_cast<Codes*>(kept.data);
  const int64_t chunks = (p.bytes + kPart - 1) / kPart;
  const int64_t tiles = (p.end - p.begin + kTile - 1) / kTile;
  // What is reused lies in L2: the activations of a chunk, or, of few rows, those of all chunks.
  const bool few = p.rows * 4 * p.bytes <= kFewActivations;
  for (int64_t i = 0; i < chunks * tiles; ++i) {
    const int64_t chunk = few ? i % chunks : i / tiles;
    const int64_t o = p.begin + (few ? i / chunks : i % tiles) * kTile;
    for (int n = 0; n < kTile; ++n)
      UnpackChunk<P, C, kBlock>(p, std::min(o + n, p.end - 1), chunk, codes, n);
    int64_t m = 0;
    if constexpr (kVnni) {
      for (; m + 3 <= p.rows && m + 4 != p.rows; m += 3) MultiplyWide<3, C>(p, codes, chunk, m, o);
      for (; m + 2 <= p.rows; m += 2) MultiplyWide<2, C>(p, codes, chunk, m, o);
      if (m < p.rows) MultiplyWide<1, C>(p, codes, chunk, m, o);
    } else {
      for (; m + 2 <= p.rows; m += 2) MultiplyRows<2, C, kBlock>(p, codes, chunk, m, o);
      if (m < p.rows) MultiplyRows<1, C, kBlock>(p, codes, chunk, m, o);
    }
  }
}

template <int P, int C, int kBlock>
void Planes(const Problem& p) {
  if (p.rows < (p.vnni ? kVnniRows : kTileRows)) return FewRows<P, C, kBlock>(p);
  p.vnni ? Tiles<P, -2, kBlock, true>(p) : Tiles<P, P == 1 ? C : -1, kBlock, false>(p);
}

template <int P, int kBlock>
void PlanesOfBlocks(const Problem& p) {
  const int64_t groups = p.of_block;
  groups == 1   ? Planes<P, 1, kBlock>(p)
  : groups == 2 ? Planes<P, 2, kBlock>(p)
                : Planes<P, 4, kBlock>(p);
}

template <int P>
void PlanesPanel(const Problem& p) {
  p.block == 16   ? PlanesOfBlocks<P, 16>(p)
  : p.block == 32 ? PlanesOfBlocks<P, 32>(p)
                  : PlanesOfBlocks<P, 64>(p);
}

void Avx2Panel(const Problem& p) {
  if (p.multipliers) return p.planes == 1 ? PlanesPanel<1>(p) : PlanesPanel<2>(p);
  if (p.vnni && p.rows > kVnniRows) return Tiles<1, 0, 0, true>(p);
  if (!p.vnni && p.rows >= kTileRows) return Tiles<1, 0, 0, false>(p);
  if (p.vnni) return FewRowsOfTrits<kVnniRows>(p);
  for (int64_t o = p.begin; o < p.end; ++o)
    for (int64_t m = 0; m < p.rows; ++m) TritsOfRow(p, o, m);
}

// --- AMX: 16 outputs times 16 rows in a tile -----------------------------------------------------
//
// Codes with multipliers are those of VNNI.

struct Tables {  // of a chunk of an output
  alignas(64) int32_t of[2][kMost + 16];
  __m512i lanes[4];  // for each slab the group that each 16 bytes of a vector belong to
};

template <int P>
AVX512 void Prepare(const Problem& p, int64_t o, int64_t begin, int64_t bytes, Tables& tables) {
  const int64_t of_block = p.of_block, n = bytes / p.block * of_block;
  Multipliers<kUnsigned>(p, o, 0, begin / p.block * of_block, n, tables.of[0]);
  if (P == 2) Multipliers<kSigned>(p, o, 1, begin / p.block * of_block, n, tables.of[1]);
  alignas(64) int32_t lanes[16];
  for (int r = 0; r < 4; ++r) {
    for (int i = 0; i < 16; ++i) lanes[i] = i / 4 * 16 / p.block * of_block + r * of_block / 4;
    tables.lanes[r] = _mm512_load_si512(lanes);
  }
}

// The codes of 64 bytes of each plane from byte j on, a vector for each slab.
// group: the first one there, in the tables
template <int P>
AVX512 INLINE void CodesOf(const Problem& p, const uint8_t* w, int64_t j, const Tables& tables,
                           int64_t group, __m512i* codes) {
  const int64_t left = P * (p.bytes - j);
  __m512i v[2] = {_mm512_maskz_loadu_epi8(First(left), w + P * j), _mm512_setzero_si512()};
  if (P == 2) {
    const __m512i a = v[0], b = _mm512_maskz_loadu_epi8(First(left - 64), w + P * j + 64);
    v[0] = p.block == 64   ? a
           : p.block == 32 ? _mm512_shuffle_i64x2(a, b, 0x44)
                           : _mm512_shuffle_i64x2(a, b, 0x88);
    v[1] = p.block == 64   ? b
           : p.block == 32 ? _mm512_shuffle_i64x2(a, b, 0xee)
                           : _mm512_shuffle_i64x2(a, b, 0xdd);
  }
  for (int r = 0; r < 4; ++r)
    for (int q = 0; q < P; ++q) {
      const __m512i all = _mm512_loadu_si512(tables.of[q] + group);
      const __m512i table = _mm512_permutexvar_epi32(tables.lanes[r], all);
      const __m512i trits = _mm512_and_si512(_mm512_srli_epi16(v[q], 2 * r), _mm512_set1_epi8(3));
      const __m512i code = _mm512_shuffle_epi8(table, trits);
      codes[r] = q ? _mm512_add_epi8(codes[r], code) : code;
    }
}

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

// P: planes; 0 without multipliers
template <int P>
AMX void AmxTiles(const Problem& p, const int8_t* tiles) {
  // tiles: [groups of 16 rows, 4, width / 64, 1024]; codes: [output / 16, 4, steps, 1024];
  // sums: [group, output / 16, 16 outputs, 16 rows]
  constexpr int64_t steps = kChunk / 4 / kVector, of_codes = 4 * steps * kTileBytes;
  const int64_t groups = RoundUp(p.rows, 16) / 16, halves = RoundUp(p.end - p.begin, 32) / 16;
  static thread_local Aligned codes(kLargePanel / 16 * of_codes), kept(0);
  char* sums = Kept(kept, groups * halves * kTileBytes);
  std::memset(sums, 0, groups * halves * kTileBytes);
  const __m512i three = _mm512_set1_epi8(3);
  Tables tables;
  for (int64_t j0 = 0; j0 < p.width; j0 += kChunk / 4) {
    const int64_t count = std::min(steps, (p.width - j0) / kVector);
    for (int64_t n = 0; n < halves * 16; ++n) {
      const int64_t o = std::min(p.begin + n, p.end - 1);
      const uint8_t* w = p.packed + o * std::max(P, 1) * p.bytes;
      if constexpr (P > 0) Prepare<P>(p, o, j0, kChunk / 4, tables);
      for (int64_t s = 0; s < count; ++s) {
        const int64_t j = j0 + s * kVector;
        char* to = codes.data + n / 16 * of_codes + s * kTileBytes + n % 16 * 64;
        __m512i of_slabs[4];
        if constexpr (P > 0) {
          CodesOf<P>(p, w, j, tables, s * kVector / p.block * p.of_block, of_slabs);
        } else {
          const __m512i v = _mm512_maskz_loadu_epi8(First(p.bytes - j), w + j);
          for (int r = 0; r < 4; ++r)
            of_slabs[r] = _mm512_and_si512(_mm512_srli_epi16(v, 2 * r), three);
        }
        for (int r = 0; r < 4; ++r) _mm512_store_si512(to + r * steps * kTileBytes, of_slabs[r]);
      }
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
      const uint32_t value = values[n % 16 * 16 + m % 16];
      p.out[m * p.outputs + p.begin + n] = value - (P ? 127u : 1u) * p.sums[m];
    }
}

void AmxPanel(const Problem& p, const int8_t* tiles) {
  if (!p.multipliers) return AmxTiles<0>(p, tiles);
  p.planes == 1 ? AmxTiles<1>(p, tiles) : AmxTiles<2>(p, tiles);
}

#endif

// Where a path wants the activations: [blocks, R, 4, width], or as `Activations`.
struct Layout {
  int64_t rows, bytes, width;
  int64_t record = 0, step = width;  // bytes of a row in a chunk, or 0; bytes of a slab in a piece

  int64_t Chunks() const { return RoundUp(bytes, kPart) / kPart; }
  int64_t Size() const { return rows * (record ? Chunks() * record : 4 * width); }
  int64_t Row(int64_t m, int64_t chunk) const {
    return record ? (chunk * rows + m) * record : m * 4 * width;
  }
  int64_t At(int64_t m, int64_t j, int64_t r) const {  // of byte j of slab r
    if (!record) return Row(m, 0) + r * width + j;
    return Row(m, j / kPart) + (j % kPart / step * 4 + r) * step + j % step;
  }
};

#if defined(__x86_64__)

// Activations as AMX's second operand: for each 16 rows, slab and vector of 64 bytes a tile whose
// row q holds bytes 4 q to 4 q + 3 of all 16. slabs: arranged, in steps of kStep
void ArrangeTile(const int8_t* slabs, const Layout& layout, int64_t m0, int8_t* out) {
  for (int r = 0; r < 4; ++r)
    for (int64_t j = 0; j < layout.width; j += kStep)
      for (int64_t m = 0; m < 16; ++m) {
        int8_t* to = out + (r * layout.width + j) * 16 + 4 * m;
        if (m0 + m >= layout.rows) {
          for (int q = 0; q < kStep / 4; ++q) std::memset(to + 64 * q, 0, 4);
          continue;
        }
        const int8_t* x = slabs + layout.At(m0 + m, j, r);
        for (int q = 0; q < kStep / 4; ++q) std::memcpy(to + 64 * q, x + 4 * q, 4);
      }
}

#endif

// Puts the activations of a row in place; to: those of all rows, zeros.
void Arrange(const Problem& p, const Layout& layout, int64_t m, const int8_t* from, int64_t inputs,
             int8_t* to) {
  for (int64_t j = 0; j < p.bytes; j += p.block)
    for (int r = 0; r < 4; ++r) {
      const int64_t at = 4 * j + r * p.block, end = std::min(p.block, inputs - at);
      for (int64_t i = 0, size; i < end; i += size) {
        size = std::min(end - i, layout.step - (j + i) % layout.step);
        std::memcpy(to + layout.At(m, j + i, r), from + at + i, size);
      }
    }
  if (!layout.record || !p.groups) return;
  const int64_t size = 4 * p.block / p.of_block, part = p.of_chunk;
  for (int64_t g = 0; g * size < inputs; ++g) {
    int32_t sum = 0;
    for (int64_t i = g * size; i < std::min(inputs, (g + 1) * size); ++i) sum += from[i];
    auto* sums = reinterpret_cast<int32_t*>(to + layout.Row(m, g / part) + sizeof(Activations));
    sums[g % part] = sum & 0xffff;
  }
}

// x int8 [blocks, R, I], packed uint8 [E, O, B], experts int32 [blocks], multipliers int8
// [E, O, G, P] -> int32 [blocks, R, O].
// G: groups of inputs; 0 and P = 1 where all multipliers are 1. block: bytes in a packing block of
// one plane; path: the best one to take, -1 for all that the processor has.
void TernarySums(ffi::ThreadPool pool, ffi::Buffer<ffi::S8> x, ffi::Buffer<ffi::U8> packed,
                 ffi::Buffer<ffi::S32> experts, ffi::Buffer<ffi::S8> multipliers,
                 ffi::ResultBuffer<ffi::S32> out, int64_t block, int64_t path) {
  Sizes sizes;
  sizes.Match("x [blocks, R, I]", x);
  sizes.Match("packed [E, O, B]", packed);
  sizes.Match("experts [blocks]", experts);
  sizes.Match("multipliers [E, O, G, P]", multipliers);
  sizes.Match("sums [blocks, R, O]", *out);
  const int64_t blocks = sizes["blocks"], rows = sizes["R"], inputs = sizes["I"],
                count = sizes["E"], outputs = sizes["O"], all = sizes["B"], groups = sizes["G"],
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

  int64_t best = path < 0 ? BestPath() : std::min(path, BestPath());
  const bool fits = block == 16 || block == 32 || block == 64;
  if (groups && (!bytes || !fits)) best = kPlain;
  const bool amx = best == kAmx && rows >= kFewRows;
  const int64_t width = RoundUp(bytes, kVector), tiled = RoundUp(rows, 16) / 16;
  Problem problem{};
  problem.bytes = bytes, problem.width = width, problem.outputs = outputs;
  problem.planes = planes, problem.groups = groups, problem.block = block;
  problem.of_block = std::max<int64_t>(1, groups / std::max<int64_t>(1, in_all));
  problem.of_chunk = kPart / block * problem.of_block;
  Layout layout{rows, bytes, width};
#if defined(__x86_64__)
  if (best >= kAvx2) {
    layout.step = kStep;
    layout.record = sizeof(Activations);
    if (groups) layout.record = RoundUp(layout.record + 4 * problem.of_chunk, kVector);
  }
#endif
  problem.vnni = best >= kVnni;
  problem.record = layout.record, problem.records = rows;

  Aligned slabs(blocks * layout.Size()), tiles(amx ? blocks * tiled * 64 * width : 0);
  std::vector<int32_t> sums(blocks * rows), used(blocks * rows);  // used: not all zeros
  auto* slab_data = reinterpret_cast<int8_t*>(slabs.data);
  auto* tile_data = reinterpret_cast<int8_t*>(tiles.data);
  const int8_t* xs = x.typed_data();
  auto arrange = [=, &sums, &used](int64_t row) {
    const int8_t* from = xs + row * inputs;
    int32_t sum = 0;
    int8_t any = 0;
    for (int64_t i = 0; i < inputs; ++i) sum += from[i], any |= from[i];
    sums[row] = sum, used[row] = any != 0;
    int8_t* to = slab_data + row / rows * layout.Size();
    for (int64_t chunk = 0; chunk < (layout.record ? layout.Chunks() : 1); ++chunk)
      std::memset(to + layout.Row(row % rows, chunk), 0, layout.record ? layout.record : 4 * width);
    Arrange(problem, layout, row % rows, from, inputs, to);
  };
  Parallel(pool, blocks * rows, 1. * blocks * rows * inputs, arrange);
  // Padding, rows of zeros behind the others, costs nothing.
  std::vector<int64_t> counts(blocks);
  for (int64_t b = 0; b < blocks; ++b)
    for (int64_t m = 0; m < rows; ++m)
      if (used[b * rows + m]) counts[b] = m + 1;
#if defined(__x86_64__)
  if (amx)
    Parallel(pool, blocks * tiled, 1. * blocks * rows * inputs, [=](int64_t i) {
      const int64_t b = i / tiled, g = i % tiled;
      ArrangeTile(slab_data + b * layout.Size(), layout, 16 * g, tile_data + i * 64 * width);
    });
#endif

  const bool large = amx && blocks * outputs >= 4 * kLargePanel * pool.num_threads();
  const int64_t panel = large ? kLargePanel : kPanel, panels = (outputs + panel - 1) / panel;
  const uint8_t* weights = packed.typed_data();
  const int8_t* all_multipliers = multipliers.typed_data();
  const int32_t* chosen = experts.typed_data();
  int32_t* result = out->typed_data();
  const int32_t* row_sums = sums.data();
  Parallel(pool, blocks * panels, 1. * blocks * outputs * all, [=, &counts](int64_t i) {
    const int64_t b = i / panels, expert = chosen[b];
    Problem p = problem;
    p.slabs = slab_data + b * layout.Size();
    p.sums = row_sums + b * rows;
    p.out = result + b * rows * outputs;
    p.rows = expert < 0 || expert >= count ? 0 : counts[b];
    p.begin = i % panels * panel;
    p.end = std::min(outputs, p.begin + panel);
    for (int64_t m = p.rows; m < rows; ++m)
      std::fill(p.out + m * outputs + p.begin, p.out + m * outputs + p.end, 0);
    if (p.rows == 0) return;
    p.packed = weights + expert * outputs * all;
    if (groups) p.multipliers = all_multipliers + expert * outputs * groups * planes;
#if defined(__x86_64__)
    if (amx && p.rows >= kFewRows) {
      ConfigureTiles();
      AmxPanel(p, tile_data + b * tiled * 64 * width);
    } else if (best >= kAvx2) {
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
                                  .Arg<ffi::Buffer<ffi::S8>>()
                                  .Ret<ffi::Buffer<ffi::S32>>()
                                  .Attr<int64_t>("block")
                                  .Attr<int64_t>("path"));

}  // namespace kernels

extern "C" int64_t BestTernaryPath() { return kernels::BestPath(); }
