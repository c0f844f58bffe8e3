// Products of a group with AVX-512 VNNI.

#include "avx512.h"

namespace kernels {

void Avx512Group(const Group& p) { Tile<Avx512>::Multiply(p); }

}  // namespace kernels
