// What the kernels that XLA calls share: the arrays that it hands over, checks of them, threads,
// and the floats that they take.
//
// This is on the C interface of XLA's foreign functions, within the jaxlib that is compiled for:
// its C++ one is made of templates that take longer to compile than all kernels.

#ifndef KERNELS_COMMON_H_
#define KERNELS_COMMON_H_

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <string_view>
#include <type_traits>

#include "memory.h"
#include "xla/ffi/api/c_api.h"

namespace kernels {

using Dtype = XLA_FFI_DataType;
constexpr Dtype S8 = XLA_FFI_DataType_S8, S16 = XLA_FFI_DataType_S16, S32 = XLA_FFI_DataType_S32,
                U8 = XLA_FFI_DataType_U8, PRED = XLA_FFI_DataType_PRED, F32 = XLA_FFI_DataType_F32,
                BF16 = XLA_FFI_DataType_BF16;

template <class T>
constexpr Dtype kDtype = XLA_FFI_DataType_INVALID;
template <>
constexpr Dtype kDtype<int8_t> = S8;
template <>
constexpr Dtype kDtype<uint8_t> = U8;
template <>
constexpr Dtype kDtype<bool> = PRED;
template <>
constexpr Dtype kDtype<int32_t> = S32;
template <>
constexpr Dtype kDtype<float> = F32;

int64_t WidthOf(Dtype dtype);  // bytes of a number

// --- Errors --------------------------------------------------------------------------------------
//
// Each kernel checks all its arrays before it reads one, and throws what is wrong; `Run` makes an
// error of JAX of that. XLA calls none whose results have no elements.

using Array = XLA_FFI_Buffer;  // dtype, data, rank, dims

// Of the text of an error.
struct Part {
  Part(std::string_view text) : kind(kText), text(text) {}
  Part(int64_t number) : kind(kInteger), integer(number) {}
  Part(float number) : kind(kFloat), real(number) {}
  Part(Dtype dtype) : kind(kDtype), integer(dtype) {}
  Part(const Array& x) : kind(kSizes), sizes(&x) {}
  enum { kText, kInteger, kFloat, kDtype, kSizes } kind;
  union {
    std::string_view text;
    int64_t integer;
    float real;
    const Array* sizes;
  };
};

[[noreturn]] void Fail(std::initializer_list<Part> parts);

template <class... Parts>
void Check(bool right, const Parts&... parts) {
  if (!right) Fail({Part(parts)...});
}

// --- What a kernel takes -------------------------------------------------------------------------

// A call of a kernel: void Name(const Frame&).
class Frame {
 public:
  explicit Frame(const XLA_FFI_CallFrame& call) : call_(call) {}

  // All arrays of a kernel that has so many, first its arguments.
  template <int arguments, int results>
  std::array<Array, arguments + results> Arrays() const {
    std::array<Array, arguments + results> found;
    CheckNumbers(arguments, results);
    for (int i = 0; i < arguments; ++i) found[i] = Argument(i);
    for (int i = 0; i < results; ++i) found[arguments + i] = Result(i);
    return found;
  }
  int64_t arguments() const { return call_.args.size; }
  int64_t results() const { return call_.rets.size; }
  const Array& Argument(int64_t i) const { return *static_cast<Array*>(call_.args.args[i]); }
  const Array& Result(int64_t i) const { return *static_cast<Array*>(call_.rets.rets[i]); }
  int64_t Integer(std::string_view name) const {
    return *static_cast<const int64_t*>(Attribute(name, XLA_FFI_DataType_S64));
  }
  float Float(std::string_view name) const {
    return *static_cast<const float*>(Attribute(name, F32));
  }

  int64_t threads() const;
  void Schedule(XLA_FFI_Task* task, void* data) const;

 private:
  void CheckNumbers(int64_t arguments, int64_t results) const;
  const void* Attribute(std::string_view name, Dtype dtype) const;
  const XLA_FFI_CallFrame& call_;
};

// Sizes of the arrays of a call, by name. The first array that has a name gives it a size.
class Sizes {
 public:
  // what: the array and the names of its sizes, a literal such as "k [B, K, S, H]"
  void Match(std::string_view what, const Array& x);
  void Match(std::string_view what, const Array& x, Dtype dtype);
  template <class T>
  T* Match(std::string_view what, const Array& x) {
    Match(what, x, kDtype<T>);
    return static_cast<T*>(x.data);
  }
  int64_t operator[](std::string_view name) { return Known(name, 0); }

 private:
  int64_t Known(std::string_view name, int64_t size);  // the size of this name, from now on
  struct {
    std::string_view name;
    int64_t size;
  } sizes_[16];
  int count_ = 0;
};

inline void CheckFloats(const char* what, const Array& x) {
  Check(x.dtype == F32 || x.dtype == BF16, what, " is ", x.dtype, ", neither F32 nor BF16");
}

// Makes kernels handlers of XLA, which KERNEL(Name) exports as NameHandler.
XLA_FFI_Error* Run(XLA_FFI_CallFrame* call, void (*kernel)(const Frame&));

#define KERNEL(name) \
  extern "C" XLA_FFI_Error* name##Handler(XLA_FFI_CallFrame* call) { return Run(call, name); }

// --- Threads -------------------------------------------------------------------------------------

void RunAll(const Frame& frame, int64_t n, double bytes, void (*call)(const void*, int64_t),
            const void* f);

// Runs f(0) to f(n - 1) on XLA's threads and this one, each index once; returns when all are done.
// bytes: that all of it reads; a thread is not woken, which takes some 20 microseconds, for few.
template <class F>
void Parallel(const Frame& frame, int64_t n, double bytes, const F& f) {
  auto call = [](const void* f, int64_t i) { (*static_cast<const F*>(f))(i); };
  RunAll(frame, n, bytes, call, &f);
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

// x / step, to nearest. By itself, for vectors: a store of int8 may change whatever is read through
// a pointer.
template <class T, class Integer>
void RoundRow(const T* x, int64_t size, float step, Integer* to) {
  for (int64_t i = 0; i < size; ++i) to[i] = static_cast<Integer>(Rounded(ToFloat(x[i]) / step));
}

// Infinity if there is one, and NaN above all.
template <class T>
float LargestMagnitude(const T* x, int64_t size) {
  using Bits = std::conditional_t<sizeof(T) == 2, uint16_t, uint32_t>;
  Bits bits = 0;  // those of a NaN are last
  for (int64_t i = 0; i < size; ++i) {
    Bits own;
    std::memcpy(&own, x + i, sizeof own);
    bits = std::max<Bits>(bits, own & (static_cast<Bits>(-1) >> 1));
  }
  T largest;
  std::memcpy(&largest, &bits, sizeof bits);
  return ToFloat(largest);
}

}  // namespace kernels

#endif  // KERNELS_COMMON_H_
