// Copies of tiles between global and shared memory, by TMA. (row, head, batch) is where a tile's first row lies in the
// tensor.
#pragma once

#include <cuda.h>

#include <cuda/ptx>

#include "sequences.h"
#include "smem.cuh"

namespace flash_attn_ext {

// Starts the copy of a tile; its bytes count down on the mbarrier `full`. Rows past the end arrive as zeros.
template <class Tile>
__device__ __forceinline__ void load_tile(Tile& to, const CUtensorMap& from, int row, int head, int batch,
                                          uint64_t* full) {
#pragma unroll
  for (int slab = 0; slab < Tile::kSlabs; ++slab) {
    const int32_t at[4] = {slab * Tile::kSlabColumns, row, head, batch};
    cuda::ptx::cp_async_bulk_tensor(cuda::ptx::space_cluster, cuda::ptx::space_global, to.slab(slab), &from, at, full);
  }
}

// Starts the copy of a tile out of shared memory, in the thread's current bulk group. Rows past the end are not
// written.
template <class Tile>
__device__ __forceinline__ void store_tile(const CUtensorMap& to, Tile& from, int row, int head, int batch) {
#pragma unroll
  for (int slab = 0; slab < Tile::kSlabs; ++slab) {
    const int32_t at[4] = {slab * Tile::kSlabColumns, row, head, batch};
    cuda::ptx::cp_async_bulk_tensor(cuda::ptx::space_global, cuda::ptx::space_shared, &to, at, from.slab(slab));
  }
}

// The same by a map of sequences (tensor_map.h): rows past the end of the sequence that begins at `from` or `to` arrive
// as zeros, and are not written. A tile may have a part of the columns.
template <class Tile>
__device__ __forceinline__ void load_tile(Tile& to, const CUtensorMap& map, Origin from, int row, int head,
                                          uint64_t* full, int first_column = 0) {
#pragma unroll
  for (int slab = 0; slab < Tile::kSlabs; ++slab) {
    const int32_t at[5] = {first_column + slab * Tile::kSlabColumns, from.row + row, head, from.batch, from.wrap};
    cuda::ptx::cp_async_bulk_tensor(cuda::ptx::space_cluster, cuda::ptx::space_global, to.slab(slab), &map, at, full);
  }
}
template <class Tile>
__device__ __forceinline__ void store_tile(const CUtensorMap& map, Tile& from, Origin to, int row, int head,
                                           int first_column = 0) {
#pragma unroll
  for (int slab = 0; slab < Tile::kSlabs; ++slab) {
    const int32_t at[5] = {first_column + slab * Tile::kSlabColumns, to.row + row, head, to.batch, to.wrap};
    cuda::ptx::cp_async_bulk_tensor(cuda::ptx::space_global, cuda::ptx::space_shared, &map, at, from.slab(slab));
  }
}

}  // namespace flash_attn_ext
