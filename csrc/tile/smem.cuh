// Shared-memory tiles of 16-bit elements, laid out as TMA writes them with 128-byte swizzle and as wgmma reads them.
//
// A tile of R rows and C columns is C / 64 slabs; a slab is R rows of 64 elements (128 bytes). Within each group of 8
// rows (1024 bytes) the 16-byte chunk c of row r stands at chunk position c ^ (r % 8), which spreads both a row and a
// column over all banks. Tiles are aligned to 1024 bytes.
#pragma once

#include <cstdint>

namespace flash_attn_ext {

constexpr int kSlabColumns = 64;
constexpr int kRowBytes = 128;

__device__ __forceinline__ uint32_t smem_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

template <class T, int kTileRows, int kTileColumns>
struct alignas(1024) SmemTile {
  using Element = T;
  static constexpr int kRows = kTileRows, kColumns = kTileColumns;
  static_assert(sizeof(T) == 2 && kRows % 8 == 0 && kColumns % kSlabColumns == 0);
  static constexpr int kSlabs = kColumns / kSlabColumns;
  static constexpr int kSlabBytes = kRows * kRowBytes;
  static constexpr int kBytes = kSlabs * kSlabBytes;

  T data[kRows * kColumns];

  __device__ __forceinline__ T* slab(int i) { return data + i * (kSlabBytes / 2); }

  // Shared-memory address of the 16-byte chunk `chunk` (8 columns) of a row, counted within a slab.
  __device__ __forceinline__ uint32_t chunk_address(int slab_index, int row, int chunk) const {
    return smem_address(data) + slab_index * kSlabBytes + row * kRowBytes + ((chunk ^ (row % 8)) << 4);
  }
};

}  // namespace flash_attn_ext
