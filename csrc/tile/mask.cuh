// Masks of a score fragment: the scores that a row does not see become -inf.
#pragma once

#include <cmath>

#include "fragment.cuh"

namespace flash_attn_ext {

// Hides from the thread's row r the columns from end[r] on, which may be negative or beyond the block.
template <int kRegisters>
__device__ __forceinline__ void mask_from(float (&scores)[kRegisters], const int (&end)[2]) {
  const int limit[2] = {end[0] - own_column(), end[1] - own_column()};
#pragma unroll
  for (int i = 0; i < kRegisters; ++i) {
    if (fragment_column(i) >= limit[fragment_row(i)]) scores[i] = -INFINITY;
  }
}

// The other edge: hides from the thread's row r the columns before first[r].
template <int kRegisters>
__device__ __forceinline__ void mask_before(float (&scores)[kRegisters], const int (&first)[2]) {
  const int limit[2] = {first[0] - own_column(), first[1] - own_column()};
#pragma unroll
  for (int i = 0; i < kRegisters; ++i) {
    if (fragment_column(i) < limit[fragment_row(i)]) scores[i] = -INFINITY;
  }
}

}  // namespace flash_attn_ext
