// Products of 64 rows by wgmma, over whole operands: acc = A B or, with `accumulate`, acc += A B. They are issued here,
// and run until ptx::wgmma_wait_group says that they are done.
#pragma once

#include <cstdint>

#include "../ptx/warpgroup.cuh"
#include "../ptx/wgmma.cuh"
#include "smem.cuh"

namespace flash_attn_ext {

// wgmma's matrix descriptor (PTX ISA, "Asynchronous warpgroup matrix: shared memory matrix descriptor"): start address,
// leading and stride byte offsets, each in units of 16 bytes, and the swizzle of 128 or 64 bytes.
template <class Tile>
__device__ __forceinline__ uint64_t make_descriptor(uint32_t address, uint32_t leading_bytes) {
  constexpr uint64_t kSwizzle = Tile::kRowBytes == 128 ? 1 : 2;
  constexpr uint64_t kEightRows = 8 * Tile::kRowBytes;
  return (address >> 4) | static_cast<uint64_t>(leading_bytes >> 4) << 16 | (kEightRows >> 4) << 32 | kSwizzle << 62;
}

// The bits of a shared-memory address that count in a descriptor. Those above number the thread block in its cluster:
// kernels that have clusters must leave them out, others need no instruction for it.
constexpr uint32_t kAllBits = ~0u, kBitsInCluster = 0x3ffff;

// What an offset in bytes adds to a descriptor.
__device__ __forceinline__ constexpr uint32_t descriptor_offset(int bytes) { return bytes >> 4; }

// A tile as an operand whose columns are summed over: Q and K in Q K^T. Others of its type may follow it in memory.
template <class Tile>
struct KMajor {
  using Element = typename Tile::Element;
  static constexpr bool kMnMajor = false;
  static constexpr int kSteps = Tile::kColumns / 16;

  uint64_t descriptor;

  __device__ __forceinline__ explicit KMajor(const Tile& tile, uint32_t address_bits = kAllBits)
      : descriptor(make_descriptor<Tile>(smem_address(tile.data) & address_bits, 0)) {}

  // The operand of the i-th tile behind this one.
  __device__ __forceinline__ KMajor at(int i) const { return KMajor(descriptor + i * descriptor_offset(Tile::kBytes)); }

  // The operand of another tile, where `own` is this one's: a constant apart, so that it takes no registers.
  __device__ __forceinline__ KMajor of(const Tile& other, const Tile& own) const { return at(&other - &own); }

  // The same, but worked out anew wherever it is used: where registers run short, the compiler must not keep it in one.
  __device__ __forceinline__ KMajor anew() const {
    uint64_t same = descriptor;
    ptx::forget_value(same);
    return KMajor(same);
  }

  // The descriptor of the k-th 16 columns: 32 bytes within a slab, then the next slab.
  __device__ __forceinline__ uint64_t step(int k) const {
    constexpr int kStepsOfSlab = Tile::kSlabColumns / 16;
    return descriptor + descriptor_offset(k / kStepsOfSlab * Tile::kSlabBytes + k % kStepsOfSlab * 32);
  }

 private:
  __device__ __forceinline__ explicit KMajor(uint64_t descriptor) : descriptor(descriptor) {}
};

// A tile as an operand whose rows are summed over: V in P V.
template <class Tile>
struct MnMajor {
  using Element = typename Tile::Element;
  static constexpr bool kMnMajor = true;
  static constexpr int kSteps = Tile::kRows / 16;

  uint64_t descriptor;

  // From the tile's slab with this number on.
  __device__ __forceinline__ explicit MnMajor(const Tile& tile, int slab = 0, uint32_t address_bits = kAllBits)
      : descriptor(make_descriptor<Tile>(smem_address(tile.data) & address_bits, Tile::kSlabBytes) +
                   slab * descriptor_offset(Tile::kSlabBytes)) {}

  __device__ __forceinline__ MnMajor at(int i) const {
    return MnMajor(descriptor + i * descriptor_offset(Tile::kBytes));
  }
  __device__ __forceinline__ MnMajor of(const Tile& other, const Tile& own) const { return at(&other - &own); }

  // The descriptor of the k-th 16 rows.
  __device__ __forceinline__ uint64_t step(int k) const {
    return descriptor + descriptor_offset(k * 16 * Tile::kRowBytes);
  }

 private:
  __device__ __forceinline__ explicit MnMajor(uint64_t descriptor) : descriptor(descriptor) {}
};

// Issues the product of A and B from shared memory.
template <class A, class B, int kRegisters>
__device__ __forceinline__ void product_ss(float (&acc)[kRegisters], const A& a, const B& b, bool accumulate = false) {
  using Product = ptx::Wgmma<2 * kRegisters>;
  static_assert(B::kMnMajor || !A::kMnMajor);
  ptx::wgmma_fence();
#pragma unroll
  for (int k = 0; k < A::kSteps; ++k) {
    if constexpr (A::kMnMajor) {
      Product::template ss_mn<typename A::Element>(acc, a.step(k), b.step(k), k > 0 || accumulate);
    } else if constexpr (B::kMnMajor) {
      Product::template ss_b_mn<typename A::Element>(acc, a.step(k), b.step(k), k > 0 || accumulate);
    } else {
      Product::template ss<typename A::Element>(acc, a.step(k), b.step(k), k > 0 || accumulate);
    }
  }
  ptx::wgmma_commit_group();
}

// Issues the product of A from registers and B from shared memory.
template <class B, int kRegisters, int kSteps>
__device__ __forceinline__ void product_rs(float (&acc)[kRegisters], const uint32_t (&a)[kSteps][4], const B& b,
                                           bool accumulate) {
  using Product = ptx::Wgmma<2 * kRegisters>;
  static_assert(kSteps == B::kSteps);
  ptx::wgmma_fence();
#pragma unroll
  for (int k = 0; k < kSteps; ++k) {
    if constexpr (B::kMnMajor) {
      Product::template rs_mn<typename B::Element>(acc, a[k], b.step(k), k > 0 || accumulate);
    } else {
      Product::template rs<typename B::Element>(acc, a[k], b.step(k), k > 0 || accumulate);
    }
  }
  ptx::wgmma_commit_group();
}

}  // namespace flash_attn_ext
