// A path of ternary products beside the plain one, on random problems of every kind: for paths of
// other processors, under an emulator. PATH names its function.

#include <cstdio>
#include <random>
#include <vector>

#include "../kernels/ternary.h"

using namespace kernels;

namespace {

std::mt19937 generator(0);
int64_t Below(int64_t n) { return static_cast<int64_t>(generator() % n); }

struct Kind {
  int64_t rows, blocks, block_bytes, planes, of_block;  // of_block: 0 without multipliers
  bool one_group;
};

// Whether the path gives the plain sums of one such problem; all that is read lies in the vectors.
bool Equal(const Kind& kind) {
  Group p{};
  p.rows = kind.rows, p.planes = kind.planes;
  p.block_bytes = kind.block_bytes, p.bytes = kind.blocks * kind.block_bytes;
  p.quads = (p.bytes + 3) / 4, p.block = kind.block_bytes / 4;
  p.of_block = kind.of_block ? kind.of_block : 1;
  p.groups = kind.of_block == 0 ? 0 : kind.one_group ? 1 : kind.blocks * kind.of_block;
  p.parts = kind.of_block ? kind.blocks * p.of_block : 0;
  p.width = (p.quads * kInputs + 63) / 64 * 64 + 64, p.stride = kLanes + 3;
  const int64_t tiled = (p.rows + kRowTile - 1) / kRowTile * kRowTile;
  std::vector<int8_t> x(tiled * p.width), multipliers(p.groups * p.planes * kLanes);
  std::vector<uint8_t> packed(p.quads * p.planes * kQuad);
  std::vector<int32_t> sums(p.rows), part_sums(p.rows * p.parts);
  std::vector<int32_t> found(p.rows * p.stride), wanted(found);
  for (auto& byte : packed)
    for (int r = 0; r < 4; ++r) byte |= Below(3) << 2 * r;
  for (size_t i = 0; i < multipliers.size(); ++i)  // at most 127 of both planes
    multipliers[i] = i / kLanes % p.planes ? Below(128 - multipliers[i - kLanes]) : Below(128);
  for (int64_t m = 0; m < p.rows; ++m)
    for (int64_t i = 0; i < 4 * p.bytes; ++i) {
      // Input i of a plane: byte, slab, and where `Group` has it.
      const int64_t block = i / (4 * p.block_bytes), r = i / p.block_bytes % 4;
      const int64_t byte = block * p.block_bytes + i % p.block_bytes;
      const auto value = static_cast<int8_t>(Below(256) - 128);
      x[m * p.width + byte / 4 * kInputs + 4 * r + byte % 4] = value;
      sums[m] += value;
      if (p.parts) part_sums[m * p.parts + block * p.of_block + r * p.of_block / 4] += value;
    }
  p.packed = packed.data(), p.x = x.data(), p.sums = sums.data(), p.part_sums = part_sums.data();
  p.multipliers = p.groups ? multipliers.data() : nullptr;
  p.out = wanted.data(), PlainGroup(p);
  p.out = found.data(), PATH(p);
  return found == wanted;
}

}  // namespace

int main() {
  int problems = 0;
  for (int64_t rows : {1, 2, 3, 4, 7, 8, 17, 40})
    for (int64_t block : {4, 16, 32, 64})
      for (int64_t blocks : {1, 3, 18})
        for (int64_t of_block : {0, 1, 2, 4})
          for (int64_t planes : {1, 2}) {
            const Kind kind{rows, blocks, block, planes, of_block, of_block == 1 && Below(2) == 0};
            if (planes == 2 && of_block == 0) continue;
            ++problems;
            if (Equal(kind)) continue;
            std::printf(
                "%ld rows, %ld blocks of %ld bytes, %ld planes, %ld groups of each: not the "
                "same integers\n",
                long(rows), long(blocks), long(block), long(planes), long(of_block));
            return 1;
          }
  std::printf("%d problems\n", problems);
}
