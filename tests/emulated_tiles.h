// AMX's tiles in plain C++, for a processor that has none: 16 rows of 64 bytes each.
//
// After the descriptions of TILELOADD, TDPBSUD and TILESTORED in Intel's "Architecture Instruction
// Set Extensions Programming Reference". All tiles are as large as they can be.

#include <cstdint>
#include <cstring>

namespace emulated {

struct Tile {
  uint8_t bytes[16][64];
};
inline thread_local Tile tiles[8];

inline void Load(int to, const void* from, int64_t stride) {
  for (int i = 0; i < 16; ++i)
    std::memcpy(tiles[to].bytes[i], static_cast<const char*>(from) + i * stride, 64);
}

inline void Store(int from, void* to, int64_t stride) {
  for (int i = 0; i < 16; ++i)
    std::memcpy(static_cast<char*>(to) + i * stride, tiles[from].bytes[i], 64);
}

// Adds signed bytes of a row of a times unsigned bytes of a column of b, four at a time.
inline void AddDots(int sums, int a, int b) {
  for (int m = 0; m < 16; ++m)
    for (int k = 0; k < 16; ++k)
      for (int n = 0; n < 16; ++n) {
        int32_t sum;
        std::memcpy(&sum, tiles[sums].bytes[m] + 4 * n, 4);
        for (int i = 0; i < 4; ++i)
          sum += static_cast<int8_t>(tiles[a].bytes[m][4 * k + i]) * tiles[b].bytes[k][4 * n + i];
        std::memcpy(tiles[sums].bytes[m] + 4 * n, &sum, 4);
      }
}

}  // namespace emulated

#define _tile_loadd emulated::Load
#define _tile_stored emulated::Store
#define _tile_dpbsud emulated::AddDots
#define ConfigureTiles()
