// One problem of a ternary product as every path has it: 64 outputs side by side.
//
// A group is 64 outputs of a matrix. Its packed bytes (quantize.py says what a byte holds) lie in
// quads: four bytes of each of its outputs, then the next four of each. So a vector holds as many
// outputs as it has 32-bit lanes, a group is read from its first byte to its last, and a sum stays
// in its lane. Activations come in the order in which they are needed: for each quad of a plane
// four inputs for each slab, the two bits of a byte that a code lies in.
//
//     weights      quad 0: output 0, bytes 0 to 3; output 1, bytes 0 to 3; ...; output 63
//                  quad 1: output 0, bytes 4 to 7; ...
//     activations  quad 0: slab 0, the inputs of bytes 0 to 3; slab 1; slab 2; slab 3
//                  quad 1: ...
//
// Where there are two planes, a packing block has the quads of the first one, then of the second.

#ifndef KERNELS_TERNARY_H_
#define KERNELS_TERNARY_H_

#include <cstdint>

namespace kernels {

constexpr int64_t kLanes = 64;         // outputs of a group
constexpr int64_t kQuad = 4 * kLanes;  // packed bytes of a quad
constexpr int64_t kInputs = 16;        // of a quad of one plane
constexpr int64_t kRowTile = 16;       // rows of activations come in as many, for AMX

// R rows of activations times a group.
struct Group {
  const uint8_t* packed;      // [Q, 64, 4], Q quads of all planes
  const int8_t* multipliers;  // [G, P, 64], or null: one plane, and all are 1
  const int8_t* x;            // [R, width], of which 16 Q / P count; R rounded up to kRowTile
  const int32_t* sums;        // [R], of the activations of each row
  const int32_t* part_sums;   // [R, parts], of each group of inputs, or of each block if G is 1
  int32_t* out;               // [R, 64], rows `stride` apart
  int64_t rows, width, stride;
  int64_t quads, bytes;     // Q / P, and the packed bytes of a plane, which may end within one
  int64_t planes, groups;   // P, G
  int64_t block, of_block;  // quads of a plane in a packing block, and groups of inputs of a block
  int64_t block_bytes;      // of a plane; with multipliers, all paths but PlainGroup want
  int64_t parts;            // multiples of four, and 64 at most
};

// Calls f(tile, first row, rows) for tiles of up to `most` of some rows, of as many as the others
// or one more: none is left with few.
template <class F>
inline void ForTiles(int64_t rows, int64_t most, F f) {
  const int64_t tiles = (rows + most - 1) / most;
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t first = t * rows / tiles;
    f(t, first, (t + 1) * rows / tiles - first);
  }
}

// Write the sums of all rows and outputs, the same on every path.
void PlainGroup(const Group&);
void Avx2Group(const Group&);
void AvxVnniGroup(const Group&);
void Avx512Group(const Group&);
void AmxGroup(const Group&);
void NeonGroup(const Group&);

}  // namespace kernels

#endif  // KERNELS_TERNARY_H_
