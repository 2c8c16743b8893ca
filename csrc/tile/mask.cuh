// Masks of a score fragment.
#pragma once

#include <cmath>

#include "fragment.cuh"

namespace flash_attn_ext {

// Sets to -inf the scores of keys that a row does not see. visible[r] is how many keys, counted from the block's first,
// the thread's row r sees (may be negative or beyond the block).
template <int kRegisters>
__device__ __forceinline__ void mask_scores(float (&scores)[kRegisters], const int (&visible)[2]) {
  int own_column = threadIdx.x % 4 * 2;
  int limit[2] = {visible[0] - own_column, visible[1] - own_column};
#pragma unroll
  for (int i = 0; i < kRegisters; ++i) {
    if (fragment_column(i) >= limit[fragment_row(i)]) scores[i] = -INFINITY;
  }
}

// The same for transposed scores: rows are keys, columns are queries. first_seeing[r] is the first query, counted from
// the block's first, that sees the thread's key r (may be negative or beyond the block).
template <int kRegisters>
__device__ __forceinline__ void mask_transposed_scores(float (&scores)[kRegisters], const int (&first_seeing)[2]) {
  int own_column = threadIdx.x % 4 * 2;
  int limit[2] = {first_seeing[0] - own_column, first_seeing[1] - own_column};
#pragma unroll
  for (int i = 0; i < kRegisters; ++i) {
    if (fragment_column(i) < limit[fragment_row(i)]) scores[i] = -INFINITY;
  }
}

}  // namespace flash_attn_ext
