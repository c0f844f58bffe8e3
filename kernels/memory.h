// What kernels need that know nothing of XLA: memory.

#ifndef KERNELS_MEMORY_H_
#define KERNELS_MEMORY_H_

#include <cstdint>
#include <cstring>
#include <memory>

#define INLINE inline __attribute__((always_inline))
#define NOINLINE __attribute__((noinline))

namespace kernels {

inline int64_t RoundUp(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

struct Aligned {  // uninitialised memory at a multiple of 64 bytes
  explicit Aligned(int64_t size) : memory(new char[size + 64]), size(size) {
    data = memory.get() + (-reinterpret_cast<uintptr_t>(memory.get()) & 63);
  }
  std::unique_ptr<char[]> memory;
  int64_t size;
  char* data;
};

// As much memory, or more, as a thread keeps from one task to the next.
inline char* Kept(Aligned& memory, int64_t size) {
  if (memory.size < size) memory = Aligned(size);
  return memory.data;
}

// Four activations, to be multiplied with four bytes of each lane.
INLINE int32_t FourOf(const int8_t* x) {
  int32_t four;
  std::memcpy(&four, x, 4);
  return four;
}

}  // namespace kernels

#endif  // KERNELS_MEMORY_H_
