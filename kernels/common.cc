// XLA's calls, checks of what it hands over, and its threads.

#include "common.h"

#include <atomic>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>

namespace kernels {

// --- Errors --------------------------------------------------------------------------------------

namespace {

struct About {
  const char* name;
  int64_t width;
};

About AboutDtype(Dtype dtype) {
  switch (dtype) {
#define DTYPE(name, width)      \
  case XLA_FFI_DataType_##name: \
    return {#name, width};
    DTYPE(PRED, 1)
    DTYPE(S8, 1)
    DTYPE(S16, 2)
    DTYPE(S32, 4)
    DTYPE(S64, 8)
    DTYPE(U8, 1)
    DTYPE(U16, 2)
    DTYPE(U32, 4)
    DTYPE(U64, 8)
    DTYPE(F16, 2)
    DTYPE(F32, 4)
    DTYPE(F64, 8)
    DTYPE(BF16, 2)
    DTYPE(C64, 8)
    DTYPE(C128, 16)
#undef DTYPE
    default:
      return {"of another dtype", 0};
  }
}

std::string TextOf(const Part& part) {
  char number[32];
  std::string text;
  switch (part.kind) {
    case Part::kText:
      return std::string(part.text);
    case Part::kInteger:
      return std::to_string(part.integer);
    case Part::kFloat:
      std::snprintf(number, sizeof number, "%g", part.real);
      return number;
    case Part::kDtype:
      return AboutDtype(static_cast<Dtype>(part.integer)).name;
    case Part::kSizes:
      for (int64_t i = 0; i < part.sizes->rank; ++i)
        text += (i ? ", " : "") + std::to_string(part.sizes->dims[i]);
      return "[" + text + "]";
  }
  return text;
}

XLA_FFI_Error* ErrorOf(const XLA_FFI_CallFrame& call, const char* message,
                       XLA_FFI_Error_Code code) {
  XLA_FFI_Error_Create_Args args{XLA_FFI_Error_Create_Args_STRUCT_SIZE, nullptr, message, code};
  return call.api->XLA_FFI_Error_Create(&args);
}

// Whether XLA did what it was asked for.
bool Done(const XLA_FFI_Api* api, XLA_FFI_Error* error) {
  if (!error) return true;
  XLA_FFI_Error_Destroy_Args args{XLA_FFI_Error_Destroy_Args_STRUCT_SIZE, nullptr, error};
  api->XLA_FFI_Error_Destroy(&args);
  return false;
}

}  // namespace

int64_t WidthOf(Dtype dtype) { return AboutDtype(dtype).width; }

void Fail(std::initializer_list<Part> parts) {
  std::string text;
  for (const Part& part : parts) text += TextOf(part);
  throw std::invalid_argument(text);
}

XLA_FFI_Error* Run(XLA_FFI_CallFrame* call, void (*kernel)(const Frame&)) {
  auto* asked = reinterpret_cast<XLA_FFI_Metadata_Extension*>(call->extension_start);
  if (asked && asked->extension_base.type == XLA_FFI_Extension_Metadata) {
    XLA_FFI_Metadata& about = *asked->metadata;
    about.api_version = {XLA_FFI_Api_Version_STRUCT_SIZE, nullptr, XLA_FFI_API_MAJOR,
                         XLA_FFI_API_MINOR};
    about.traits = 0;
    about.state_type_id = XLA_FFI_UNKNOWN_TYPE_ID;
    return nullptr;
  }
  try {
    Check(call->stage == XLA_FFI_ExecutionStage_EXECUTE, "a kernel is only executed");
    kernel(Frame(*call));
    return nullptr;
  } catch (const std::invalid_argument& error) {
    return ErrorOf(*call, error.what(), XLA_FFI_Error_Code_INVALID_ARGUMENT);
  } catch (const std::bad_alloc&) {
    return ErrorOf(*call, "no memory left for a kernel", XLA_FFI_Error_Code_RESOURCE_EXHAUSTED);
  }
}

// --- What a kernel takes -------------------------------------------------------------------------

void Frame::CheckNumbers(int64_t arguments, int64_t results) const {
  Check(this->arguments() == arguments, this->arguments(), " arguments, not ", arguments);
  Check(this->results() == results, this->results(), " results, not ", results);
}

const void* Frame::Attribute(std::string_view name, Dtype dtype) const {
  const XLA_FFI_Attrs& all = call_.attrs;
  for (int64_t i = 0; i < all.size; ++i) {
    if (std::string_view(all.names[i]->ptr, all.names[i]->len) != name) continue;
    Check(all.types[i] == XLA_FFI_AttrType_SCALAR, name, " is no number");
    const auto& found = *static_cast<const XLA_FFI_Scalar*>(all.attrs[i]);
    Check(found.dtype == dtype, name, " is ", found.dtype, ", not ", dtype);
    return found.value;
  }
  Fail({name, std::string_view(" is not given")});
}

void Sizes::Match(std::string_view what, const Array& x) {
  const int64_t rank = std::count(what.begin(), what.end(), ',') + 1;
  Check(x.rank == rank, what, " is ", x, ", not of rank ", rank);
  size_t begin = what.find('[') + 1;
  for (int64_t i = 0; i < rank; ++i) {
    const size_t end = what.find_first_of(",]", begin);
    const std::string_view name = what.substr(begin, end - begin);
    const int64_t known = Known(name, x.dims[i]);
    Check(x.dims[i] == known, what, " is ", x, ", but ", name, " is ", known);
    begin = end + 2;
  }
}

void Sizes::Match(std::string_view what, const Array& x, Dtype dtype) {
  Check(x.dtype == dtype, what, " is ", x.dtype, ", not ", dtype);
  Match(what, x);
}

int64_t Sizes::Known(std::string_view name, int64_t size) {
  for (int i = 0; i < count_; ++i)
    if (sizes_[i].name == name) return sizes_[i].size;
  Check(count_ < static_cast<int>(std::size(sizes_)), "too many names of sizes");
  sizes_[count_++] = {name, size};
  return size;
}

// --- Threads -------------------------------------------------------------------------------------

int64_t Frame::threads() const {
  int64_t count = 0;
  XLA_FFI_ThreadPool_NumThreads_Args args{XLA_FFI_ThreadPool_NumThreads_Args_STRUCT_SIZE, nullptr,
                                          call_.ctx, &count};
  return Done(call_.api, call_.api->XLA_FFI_ThreadPool_NumThreads(&args)) ? count : 1;
}

void Frame::Schedule(XLA_FFI_Task* task, void* data) const {
  XLA_FFI_ThreadPool_Schedule_Args args{XLA_FFI_ThreadPool_Schedule_Args_STRUCT_SIZE, nullptr,
                                        call_.ctx, task, data};
  if (!Done(call_.api, call_.api->XLA_FFI_ThreadPool_Schedule(&args))) task(data);
}

namespace {

// What threads share, which the last of them frees: one may come when all is done.
struct Shared {
  std::atomic<int64_t> next{0}, done{0};
  std::atomic<bool> failed{false};
  int64_t n;
  void (*call)(const void*, int64_t);
  const void* f;
  void Work() {
    for (int64_t i; (i = next.fetch_add(1)) < n; done.fetch_add(1)) {
      try {
        call(f, i);
      } catch (const std::bad_alloc&) {  // which would end the process in a thread of the pool
        failed = true;
      }
    }
  }
};

}  // namespace

void RunAll(const Frame& frame, int64_t n, double bytes, void (*call)(const void*, int64_t),
            const void* f) {
  constexpr int64_t worth_a_thread = 1 << 18;
  using Pointer = std::shared_ptr<Shared>;
  const Pointer shared(new Shared);
  shared->n = n, shared->call = call, shared->f = f;
  const int64_t threads = std::min({1. * frame.threads(), 1. * n, 1 + bytes / worth_a_thread});
  auto work = [](void* data) {
    std::unique_ptr<Pointer>(static_cast<Pointer*>(data))->get()->Work();
  };
  for (int64_t t = 1; t < threads; ++t) frame.Schedule(work, new Pointer(shared));
  shared->Work();
  while (shared->done.load() < n) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }
  if (shared->failed) throw std::bad_alloc();
}

}  // namespace kernels
