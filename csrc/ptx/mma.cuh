// Matrix products of a single warp (PTX ISA: mma.sync), for what is too rare to be worth a warpgroup's.
#pragma once

#include <cstdint>

#include "wgmma.cuh"

namespace flash_attn_ext::ptx {

// mma.m16n8k8 and m16n8k16: d (16 x 8, float32) += a (16 x 8 kHalves) * b (8 kHalves x 8, K-major). The fragment of d
// is that of 8 columns of a warp's 16 rows of a wgmma accumulator; those of a and b are two registers and one for every
// 8 of what is summed over.
template <class T, int kHalves>
__device__ __forceinline__ void mma_m16n8(float* d, const uint32_t (&a)[kHalves][2], const uint32_t (&b)[kHalves]) {
  static_assert(kHalves == 1 || kHalves == 2);
  if constexpr (kHalves == 1) {
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.%7.%7.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0][0]), "r"(a[0][1]), "r"(b[0]), "C"(WgmmaType<T>::name));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.%10.%10.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
        "%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0][0]), "r"(a[0][1]), "r"(a[1][0]), "r"(a[1][1]), "r"(b[0]), "r"(b[1]), "C"(WgmmaType<T>::name));
  }
}

}  // namespace flash_attn_ext::ptx
