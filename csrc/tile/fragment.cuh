// What a thread does with its part of a 64-row accumulator (the layout is described in ptx/wgmma.cuh).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>

#include "../ptx/warpgroup.cuh"
#include "smem.cuh"

namespace flash_attn_ext {

// The first of the thread's two rows; the other one is 8 below.
__device__ __forceinline__ int own_row() { return threadIdx.x / 32 % 4 * 16 + threadIdx.x % 32 / 4; }

// The first of the thread's columns: of every 8 it has this one and the next.
__device__ __forceinline__ int own_column() { return threadIdx.x % 4 * 2; }

// Row of accumulator register i among the thread's two: 0 for own_row(), 1 for own_row() + 8.
__device__ __forceinline__ constexpr int fragment_row(int i) { return i % 4 / 2; }

// Column of accumulator register i, counted from own_column().
__device__ __forceinline__ constexpr int fragment_column(int i) { return i / 4 * 8 + i % 2; }

// Two floats rounded to nearest and packed, the first in the lower half.
template <class T>
__device__ __forceinline__ uint32_t pack(float low, float high);
template <>
__device__ __forceinline__ uint32_t pack<__half>(float low, float high) {
  __half2 pair = __floats2half2_rn(low, high);
  uint32_t bits;
  memcpy(&bits, &pair, sizeof bits);
  return bits;
}
template <>
__device__ __forceinline__ uint32_t pack<__nv_bfloat16>(float low, float high) {
  __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  uint32_t bits;
  memcpy(&bits, &pair, sizeof bits);
  return bits;
}

// The two floats of packed bits, the lower half's first.
template <class T>
__device__ __forceinline__ float2 unpack(uint32_t bits);
template <>
__device__ __forceinline__ float2 unpack<__half>(uint32_t bits) {
  __half2 pair;
  memcpy(&pair, &bits, sizeof bits);
  return __half22float2(pair);
}
template <>
__device__ __forceinline__ float2 unpack<__nv_bfloat16>(uint32_t bits) {
  return make_float2(__uint_as_float(bits << 16), __uint_as_float(bits & 0xffff0000u));
}

// An accumulator of 16 * kSteps columns as the A operands of kSteps products: for 16-bit types both layouts agree, so
// that registers pair up in order and nothing is exchanged between threads.
template <class T, int kSteps>
__device__ __forceinline__ void to_operand(uint32_t (&a)[kSteps][4], const float (&acc)[8 * kSteps]) {
#pragma unroll
  for (int k = 0; k < kSteps; ++k) {
#pragma unroll
    for (int i = 0; i < 4; ++i) a[k][i] = pack<T>(acc[8 * k + 2 * i], acc[8 * k + 2 * i + 1]);
  }
}

// Loads a tile of 64 rows as an A operand.
template <class T, int kColumns>
__device__ __forceinline__ void load_operand(uint32_t (&a)[kColumns / 16][4], const SmemTile<T, 64, kColumns>& tile) {
  constexpr int kStepsOfSlab = slab_columns(kColumns) / 16;
  const int lane = threadIdx.x % 32, row = threadIdx.x / 32 % 4 * 16 + lane % 16;
#pragma unroll
  for (int k = 0; k < kColumns / 16; ++k) {
    ptx::ldmatrix_x4(a[k], tile.chunk_address(k / kStepsOfSlab, row, k % kStepsOfSlab * 2 + lane / 16));
  }
}

// Loads the transposed tile as an A operand.
template <class T, int kRows>
__device__ __forceinline__ void load_operand_transposed(uint32_t (&a)[kRows / 16][4],
                                                        const SmemTile<T, kRows, 64>& tile) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int k = 0; k < kRows / 16; ++k) {
    const int row = 16 * k + lane / 16 * 8 + lane % 8, chunk = threadIdx.x / 32 % 4 * 2 + lane / 8 % 2;
    ptx::ldmatrix_x4_trans(a[k], tile.chunk_address(0, row, chunk));
  }
}

// Where the thread stores its part of a 64-row operand in a swizzled tile.
template <class Tile>
__device__ __forceinline__ uint32_t own_columns_address(const Tile& tile) {
  const int lane = threadIdx.x % 32;
  return tile.chunk_address(0, threadIdx.x / 32 % 4 * 16 + lane % 16, lane / 16);
}

// Stores columns 16 j .. 16 j + 15 of 64 rows, given as an A operand. The swizzle is an exclusive or.
template <class Tile>
__device__ __forceinline__ void store_columns(uint32_t own_address, int j, const uint32_t (&a)[4]) {
  constexpr int kStepsOfSlab = Tile::kSlabColumns / 16;
  ptx::stmatrix_x4((own_address ^ (j % kStepsOfSlab * 32)) + j / kStepsOfSlab * Tile::kSlabBytes, a[0], a[1], a[2],
                   a[3]);
}

// Stores a 64-row accumulator, each of the thread's two rows scaled, as T into a swizzled tile.
template <class T, int kColumns>
__device__ __forceinline__ void store_fragment(SmemTile<T, 64, kColumns>& tile, const float (&acc)[kColumns / 2],
                                               const float (&row_scale)[2]) {
  const uint32_t address = own_columns_address(tile);
#pragma unroll
  for (int j = 0; j < kColumns / 16; ++j) {
    const float* x = acc + 8 * j;
    const uint32_t a[4] = {
        pack<T>(x[0] * row_scale[0], x[1] * row_scale[0]), pack<T>(x[2] * row_scale[1], x[3] * row_scale[1]),
        pack<T>(x[4] * row_scale[0], x[5] * row_scale[0]), pack<T>(x[6] * row_scale[1], x[7] * row_scale[1])};
    store_columns<SmemTile<T, 64, kColumns>>(address, j, a);
  }
}

}  // namespace flash_attn_ext
