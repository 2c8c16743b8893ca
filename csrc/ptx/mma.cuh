// Matrix products of a single warp (PTX ISA: mma.sync), for what is too rare to be worth a warpgroup's.
#pragma once

#include <cstdint>

#include "wgmma.cuh"

namespace flash_attn_ext::ptx {

// mma.m16n8k8: d (16 x 8, float32) += a (16 x 8) * b (8 x 8, K-major). The fragment of d is that of 8 columns of a
// warp's 16 rows of a wgmma accumulator.
template <class T>
__device__ __forceinline__ void mma_m16n8k8(float* d, const uint32_t (&a)[2], uint32_t b) {
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.%7.%7.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(b), "C"(WgmmaType<T>::name));
}

}  // namespace flash_attn_ext::ptx
