// What the kernels that XLA calls share: checks of what it hands over, threads, and the floats
// that they take.

#ifndef KERNELS_COMMON_H_
#define KERNELS_COMMON_H_

#include <algorithm>
#include <atomic>
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

#include "memory.h"
#include "xla/ffi/api/ffi.h"

namespace kernels {

namespace ffi = xla::ffi;

constexpr int64_t kWorthAThread = 1 << 18;

// --- What a kernel takes -------------------------------------------------------------------------
//
// Each kernel checks all its arrays before it reads one, and throws what is wrong; `Kernel` makes
// an error of JAX of that. XLA calls none whose results have no elements.

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
    for (const auto& [known, its] : sizes_)
      if (known == name) return its;
    sizes_.emplace_back(name, size);
    return size;
  }
  static std::string Text(ffi::Span<const int64_t> sizes) {
    std::string text;
    for (const int64_t size : sizes) text += (text.empty() ? "[" : ", ") + std::to_string(size);
    return text.empty() ? "[]" : text + "]";
  }
  std::vector<std::pair<std::string_view, int64_t>> sizes_;
};

inline void CheckFloats(const char* what, const ffi::AnyBuffer& x) {
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

// --- Threads and memory --------------------------------------------------------------------------

// Runs f(0) to f(n - 1) on the pool and this thread, each index once; returns when all are done.
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
  for (int64_t t = 1; t < threads; ++t) pool.Schedule([state] { state->Work(); });
  state->Work();
  while (state->done.load() < n) {
#if defined(__x86_64__)
    _mm_pause();
#endif
  }
  if (state->failed) throw std::bad_alloc();
}

// --- Floats --------------------------------------------------------------------------------------

// bfloat16 is the upper half of a float32.
inline float ToFloat(const uint16_t& v) {
  const uint32_t bits = static_cast<uint32_t>(v) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline float ToFloat(const float& v) { return v; }
inline float ToFloat(const int8_t& v) { return v; }

inline void FromFloat(float value, float* out) { *out = value; }
inline void FromFloat(float value, uint16_t* out) {  // to nearest, halves to even
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  *out = static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// To nearest, halves to even, of numbers up to 2^22; beyond it, some number as large.
inline int32_t Rounded(float value) {
  // Added, what is too large for a fraction beside it rounds.
  constexpr float limit = 4194304, large = 3 * limit;
  return static_cast<int32_t>(std::min(std::max(-limit, value), limit) + large - large);
}

}  // namespace kernels

#endif  // KERNELS_COMMON_H_
