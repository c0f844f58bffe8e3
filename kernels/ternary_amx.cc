// Products of a group with AMX: 16 rows times 16 outputs in a tile.
//
// Codes, once they are unpacked, lie as the second operand wants them: a tile's row has four inputs
// of each of 16 outputs.

#include "avx512.h"

#if defined(EMULATED_TILES)
#include EMULATED_TILES
#endif

namespace kernels {
namespace {

constexpr int64_t kTileQuads = 4;   // of a plane: 64 inputs
constexpr int64_t kWideChunk = 64;  // quads of a plane that are unpacked at a time, to 64 KiB

struct alignas(64) TileConfig {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

#if !defined(EMULATED_TILES)
void ConfigureTiles() {
  TileConfig config;
  for (int i = 0; i < 8; ++i) config.row_bytes[i] = 64, config.rows[i] = 16;
  // Not _tile_loadconfig: that of gcc 12 tells the compiler of 8 bytes only, and loses the rest.
  __asm__ volatile("ldtilecfg %0" ::"m"(config));
}
#endif

// Sums of 32 rows and 32 outputs: adds those of `count` quads. x: of the first row and quad
void AddTiles(const int8_t* x, int64_t width, const uint8_t* codes, int64_t count, bool two,
              int32_t* sums) {
  int32_t* below = sums + kRowTile * kLanes;
  _tile_loadd(0, sums, 4 * kLanes);
  _tile_loadd(1, sums + 16, 4 * kLanes);
  if (two) {
    _tile_loadd(2, below, 4 * kLanes);
    _tile_loadd(3, below + 16, 4 * kLanes);
  }
  for (int64_t q = 0; q < count; q += kTileQuads, x += kTileQuads * kInputs) {
    const uint8_t* c = codes + q * 4 * kSlab;
    _tile_loadd(4, x, width);
    _tile_loadd(6, c, kSlab);
    _tile_loadd(7, c + 64, kSlab);
    _tile_dpbsud(0, 4, 6);
    _tile_dpbsud(1, 4, 7);
    if (two) {
      _tile_loadd(5, x + kRowTile * width, width);
      _tile_dpbsud(2, 5, 6);
      _tile_dpbsud(3, 5, 7);
    }
  }
  _tile_stored(0, sums, 4 * kLanes);
  _tile_stored(1, sums + 16, 4 * kLanes);
  if (two) {
    _tile_stored(2, below, 4 * kLanes);
    _tile_stored(3, below + 16, 4 * kLanes);
  }
}

template <int P>
void Multiply(const Group& p) {
  const int64_t rows = RoundUp(p.rows, kRowTile);
  static thread_local Aligned codes(kWideChunk * 4 * kSlab), kept(0);
  auto* unpacked = reinterpret_cast<uint8_t*>(codes.data);
  auto* sums = reinterpret_cast<int32_t*>(Kept(kept, rows * kLanes * 4));
  std::memset(sums, 0, rows * kLanes * 4);
  std::memset(unpacked, 0, codes.size);
  ConfigureTiles();
  for (int64_t begin = 0; begin < p.quads; begin += kWideChunk) {
    const int64_t count = std::min(kWideChunk, p.quads - begin);
    Tile<Avx512>::Unpack<P>(p, begin, count, unpacked);
    for (int64_t m = 0; m < rows; m += 2 * kRowTile)
      for (int64_t o = 0; o < kLanes; o += 32)
        AddTiles(p.x + m * p.width + begin * kInputs, p.width, unpacked + 4 * o, count,
                 m + kRowTile < rows, sums + m * kLanes + o);
  }
  constexpr uint32_t offset = P ? Avx512::kOffset : 1;
  for (int64_t m = 0; m < p.rows; ++m)
    for (int64_t o = 0; o < kLanes; ++o)
      p.out[m * p.stride + o] = sums[m * kLanes + o] - offset * p.sums[m];
}

constexpr int64_t kFewRows = 8;  // from here on tiles are faster

}  // namespace

void AmxGroup(const Group& p) {
  if (p.rows < kFewRows) return Avx512Group(p);
  p.multipliers == nullptr ? Multiply<0>(p) : p.planes == 1 ? Multiply<1>(p) : Multiply<2>(p);
}

}  // namespace kernels
