// One warpgroup multiplying the same 64 x 128 and 128 x N operands again and again, as the kernels multiply.
#pragma once

#include <cuda/ptx>
#include <type_traits>

#include "../../csrc/ptx/wgmma.cuh"
#include "../../csrc/tile/fragment.cuh"
#include "../../csrc/tile/product.cuh"
#include "../../csrc/tile/smem.cuh"

namespace micro {

// From shared memory ("SS", like Q K^T) b is N x 128 and K-major; with a from registers ("RS", like P V) b is 128 x N
// and MN-major. The first of the 8 steps of a product ignores the sum before it, so that any number of products leaves
// the same d = a b, which can be checked, and sums stay small.
template <class Type, int kColumns, bool kARegisters>
struct Product {
  using T = Type;
  static constexpr int kN = kColumns, kDepth = 128, kSteps = kDepth / 16;
  static constexpr bool kFromRegisters = kARegisters;
  static constexpr double kFlops = 2. * 64 * kN * kDepth;
  using ATile = flash_attn_ext::SmemTile<T, 64, kDepth>;
  using BTile = std::conditional_t<kFromRegisters, flash_attn_ext::SmemTile<T, kDepth, kN>,
                                   flash_attn_ext::SmemTile<T, kN, kDepth>>;

  float d[kN / 2];
  uint32_t a_registers[kSteps][4];  // where a comes from registers
  const flash_attn_ext::KMajor<ATile> a;
  const std::conditional_t<kFromRegisters, flash_attn_ext::MnMajor<BTile>, flash_attn_ext::KMajor<BTile>> b;

  // `a_rows` row by row in global memory; the tiles have been filled and a barrier passed.
  __device__ __forceinline__ Product(const T* a_rows, const ATile& a_tile, const BTile& b_tile) : a(a_tile), b(b_tile) {
    if constexpr (kFromRegisters) {
      float fragment[kDepth / 2];
#pragma unroll
      for (int i = 0; i < kDepth / 2; ++i) fragment[i] = static_cast<float>(a_rows[place(i, kDepth)]);
      flash_attn_ext::to_operand<T>(a_registers, fragment);
    }
#pragma unroll
    for (int i = 0; i < kN / 2; ++i) d[i] = 0.f;
  }

  __device__ __forceinline__ void run(int iterations) {
    using namespace flash_attn_ext;
#pragma unroll 1
    for (int i = 0; i < iterations; ++i) {
      if constexpr (kFromRegisters) {
        ptx::wgmma_fence();
#pragma unroll
        for (int k = 0; k < kSteps; ++k) ptx::Wgmma<kN>::template rs_mn<T>(d, a_registers[k], b.step(k), k > 0);
        ptx::wgmma_commit_group();
      } else {
        product_ss(d, a, b);
      }
      // One product stays in flight, so that the tensor cores never wait for the loop. d is not readable yet: what is
      // named as readable is none of it.
      float none[1] = {0.f};
      ptx::wgmma_wait_group<1>(none);
    }
    ptx::wgmma_wait_group<0>(d);
  }

  // d (64 x N) row by row.
  __device__ __forceinline__ void store(float* to) const {
#pragma unroll
    for (int i = 0; i < kN / 2; ++i) to[place(i, kN)] = d[i];
  }

 private:
  // Where register i of the thread's fragment stands in a row-by-row matrix.
  static __device__ __forceinline__ int place(int i, int columns) {
    using namespace flash_attn_ext;
    return (own_row() + 8 * fragment_row(i)) * columns + own_column() + fragment_column(i);
  }
};

// Fills a swizzled tile from a row-by-row matrix, all threads of the block together.
template <class T, int kRows, int kColumns>
__device__ void fill(flash_attn_ext::SmemTile<T, kRows, kColumns>& tile, const T* source) {
  for (int i = threadIdx.x; i < kRows * kColumns; i += blockDim.x) {
    const int row = i / kColumns, column = i % kColumns;
    const uint32_t address = tile.chunk_address(column / 64, row, column % 64 / 8) + column % 8 * 2;
    *reinterpret_cast<T*>(__cvta_shared_to_generic(address)) = source[i];
  }
}

}  // namespace micro
