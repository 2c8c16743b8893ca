// Shared-memory tiles of 16-bit elements, laid out as TMA writes them with a swizzle and as wgmma reads them.
//
// A tile of R rows and C columns is slabs of R rows and 64 columns (128 bytes a row), or 32 columns (64 bytes) where C
// is no multiple of 64. Within each group of 8 rows the 16-byte chunk c of row r stands at chunk position c ^ (r % 8),
// or c ^ (r / 2 % 4), which spreads both a row and a column over all banks. Tiles are aligned to 1024 bytes.
#pragma once

#include <cstdint>

namespace flash_attn_ext {

// Of the slabs of a tile with so many columns.
constexpr int slab_columns(int columns) { return columns % 64 == 0 ? 64 : 32; }

__device__ __forceinline__ uint32_t smem_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

template <class T, int kTileRows, int kTileColumns>
struct alignas(1024) SmemTile {
  using Element = T;
  static constexpr int kRows = kTileRows, kColumns = kTileColumns;
  static constexpr int kSlabColumns = slab_columns(kColumns);
  static_assert(sizeof(T) == 2 && kRows % 8 == 0 && kColumns % kSlabColumns == 0);
  static constexpr int kSlabs = kColumns / kSlabColumns;
  static constexpr int kRowBytes = kSlabColumns * 2;  // in a slab
  static constexpr int kRowChunks = kRowBytes / 16;
  static constexpr int kSlabBytes = kRows * kRowBytes;
  static constexpr int kBytes = kSlabs * kSlabBytes;
  static_assert(kBytes % 1024 == 0, "others of the type follow it in memory");

  T data[kRows * kColumns];

  __device__ __forceinline__ T* slab(int i) { return data + i * (kSlabBytes / 2); }

  // Shared-memory address of the 16-byte chunk `chunk` (8 columns) of a row, counted within a slab.
  __device__ __forceinline__ uint32_t chunk_address(int slab_index, int row, int chunk) const {
    constexpr int kRowsInTurn = 8 / kRowChunks;  // rows that fill the banks once: their chunks are not exchanged
    return smem_address(data) + slab_index * kSlabBytes + row * kRowBytes +
           ((chunk ^ (row / kRowsInTurn % kRowChunks)) << 4);
  }
};

}  // namespace flash_attn_ext
