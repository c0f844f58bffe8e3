// How fast a core multiplies and adds int8 on registers alone, and how fast it reads memory: no
// matrix product can be faster.
//
// All numbers are ones, so that the sums add up to the number of products; there are so many sums
// that no addition waits for the one before. Rounds come in groups of kFew, after which sums of 16
// bits are not yet full. The instructions are those of the paths of kernels/ternary.cc,
// and written out: a compiler would compute the same product once, or keep sums in memory.

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace {

constexpr int64_t kFew = 8192;

#define SIX(f) f(0) f(1) f(2) f(3) f(4) f(5)
#define TWELVE(f) SIX(f) f(6) f(7) f(8) f(9) f(10) f(11)

template <class T, class Vectors>
int64_t Total(const Vectors& sums) {
  T numbers[sizeof sums / sizeof(T)];
  std::memcpy(numbers, &sums, sizeof sums);
  int64_t total = 0;
  for (T number : numbers) total += number;
  return total;
}

int64_t Plain() {
  int8_t a[64], b[64];
  int32_t sums[64] = {};
  std::memset(a, 1, sizeof a), std::memset(b, 1, sizeof b);
  for (int64_t i = 0; i < kFew; ++i) {
    __asm__ volatile("" : "+m"(a));  // they might be others now
    for (int k = 0; k < 64; ++k) sums[k] += a[k] * b[k];
  }
  return Total<int32_t>(sums);
}

#if defined(__x86_64__)

__attribute__((target("avx2"))) int64_t Avx2() {
  __m256i ones = _mm256_set1_epi8(1), sums[12] = {}, pairs;
#define ADD(i)                      \
  __asm__ volatile(                 \
      "vpmaddubsw %2, %2, %1\n\t"   \
      "vpaddw %1, %0, %0"           \
      : "+x"(sums[i]), "=&x"(pairs) \
      : "x"(ones));
  for (int64_t i = 0; i < kFew; ++i) {
    TWELVE(ADD)
  }
#undef ADD
  return Total<int16_t>(sums);
}

__attribute__((target("avx2"))) int64_t AvxVnni() {
  __m256i ones = _mm256_set1_epi8(1), sums[12] = {};
#define ADD(i) __asm__ volatile("%{vex%} vpdpbusd %1, %1, %0" : "+x"(sums[i]) : "x"(ones));
  for (int64_t i = 0; i < kFew; ++i) {
    TWELVE(ADD)
  }
#undef ADD
  return Total<int32_t>(sums);
}

__attribute__((target("avx512f,avx512bw,avx512vnni"))) int64_t Avx512() {
  __m512i ones = _mm512_set1_epi8(1), sums[12] = {};
#define ADD(i) __asm__ volatile("vpdpbusd %1, %1, %0" : "+v"(sums[i]) : "v"(ones));
  for (int64_t i = 0; i < kFew; ++i) {
    TWELVE(ADD)
  }
#undef ADD
  return Total<int32_t>(sums);
}

struct alignas(64) TileConfig {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

__attribute__((target("amx-tile,amx-int8"))) int64_t Amx() {
  TileConfig config;
  for (int i = 0; i < 8; ++i) config.row_bytes[i] = 64, config.rows[i] = 16;
  int8_t ones[1024];
  int32_t sums[6][256];
  std::memset(ones, 1, sizeof ones);
  __asm__ volatile("ldtilecfg %0" ::"m"(config), "m"(ones));
#define ZERO(i) _tile_zero(i);
#define ADD(i) _tile_dpbusd(i, 6, 7);
#define STORE(i) _tile_stored(i, sums[i], 64);
  _tile_loadd(6, ones, 64);
  _tile_loadd(7, ones, 64);
  SIX(ZERO)
  for (int64_t i = 0; i < kFew / 16; ++i) {  // each takes 16 times as long
    SIX(ADD)
  }
  SIX(STORE)
  return Total<int32_t>(sums);
}

#elif defined(__aarch64__)

__attribute__((target("arch=armv8.2-a+dotprod"))) int64_t Neon() {
  int8x16_t ones = vdupq_n_s8(1);
  int32x4_t sums[12] = {};
#define ADD(i) __asm__ volatile("sdot %0.4s, %1.16b, %1.16b" : "+w"(sums[i]) : "w"(ones));
  for (int64_t i = 0; i < kFew; ++i) {
    TWELVE(ADD)
  }
#undef ADD
  return Total<int32_t>(sums);
}

#endif

// A compiler makes vectors of this loop, as wide as the target's.
inline __attribute__((always_inline)) int64_t Sum(const uint32_t* data, int64_t count) {
  uint32_t total = 0;
  for (int64_t i = 0; i < count; ++i) total += data[i];
  return total;
}

int64_t PlainSum(const uint32_t* data, int64_t count) { return Sum(data, count); }

#if defined(__x86_64__)
__attribute__((target("avx2"))) int64_t Avx2Sum(const uint32_t* data, int64_t count) {
  return Sum(data, count);
}

__attribute__((target("avx512f"))) int64_t Avx512Sum(const uint32_t* data, int64_t count) {
  return Sum(data, count);
}
#endif

}  // namespace

// The sum of numbers modulo 2^32, as fast as a core can read.
extern "C" int64_t SumRead(const uint32_t* data, int64_t count) {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f")) return Avx512Sum(data, count);
  if (__builtin_cpu_supports("avx2")) return Avx2Sum(data, count);
#endif
  return PlainSum(data, count);
}

// So many groups of rounds, on a path of kernels/ternary.cc; the number of products, 0 for a path
// that there is not. (Who asks for the names of the paths has asked Linux for AMX, too.)
extern "C" int64_t MultiplyAdds(const char* path, int64_t groups) {
  int64_t (*one)() = nullptr;
  if (!std::strcmp(path, "plain")) one = Plain;
#if defined(__x86_64__)
  if (!std::strcmp(path, "avx2")) one = Avx2;
  if (!std::strcmp(path, "avxvnni")) one = AvxVnni;
  if (!std::strcmp(path, "avx512")) one = Avx512;
  if (!std::strcmp(path, "amx")) one = Amx;
#elif defined(__aarch64__)
  if (!std::strcmp(path, "neon")) one = Neon;
#endif
  int64_t total = 0;
  for (int64_t i = 0; one && i < groups; ++i) total += one();
  return total;
}
