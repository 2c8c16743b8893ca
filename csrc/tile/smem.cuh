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

template <class T, int kRows, int kColumns>
struct alignas(1024) SmemTile {
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

// wgmma's matrix descriptor (PTX ISA, "Asynchronous warpgroup matrix: shared memory matrix descriptor"): start address,
// leading and stride byte offsets, each in units of 16 bytes, and the 128-byte swizzle.
__device__ __forceinline__ uint64_t make_descriptor(uint32_t address, uint32_t leading_bytes, uint32_t stride_bytes) {
  constexpr uint64_t kSwizzle128B = 1;
  return (address >> 4) | static_cast<uint64_t>(leading_bytes >> 4) << 16 |
         static_cast<uint64_t>(stride_bytes >> 4) << 32 | kSwizzle128B << 62;
}

constexpr uint32_t kEightRows = 8 * kRowBytes;

// The tile as a K-major operand (rows are M or N, columns are K): A in Q K^T, and B in it.
template <class Tile>
__device__ __forceinline__ uint64_t k_major_descriptor(const Tile& tile) {
  return make_descriptor(smem_address(tile.data), 0, kEightRows);
}
// What to add to it for the k-th step of 16 columns: 32 bytes within a slab, then the next slab.
template <class Tile>
__device__ __forceinline__ constexpr uint64_t k_major_step(int k) {
  return (k / 4 * Tile::kSlabBytes + k % 4 * 32) >> 4;
}

// The tile as an MN-major operand (rows are K, columns are N): B in P V.
template <class Tile>
__device__ __forceinline__ uint64_t mn_major_descriptor(const Tile& tile) {
  return make_descriptor(smem_address(tile.data), Tile::kSlabBytes, kEightRows);
}
// What to add to it for the k-th step of 16 rows.
template <class Tile>
__device__ __forceinline__ constexpr uint64_t mn_major_step(int k) {
  return (k * 16 * kRowBytes) >> 4;
}

}  // namespace flash_attn_ext
