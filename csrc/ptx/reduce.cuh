// Of the reductions into global memory, what cuda::ptx does not have.
#pragma once

namespace flash_attn_ext::ptx {

// red.global.add.v4.f32: adds four floats to 16 aligned bytes, each of the four atomically.
__device__ __forceinline__ void red_add_v4(float* address, float x, float y, float z, float w) {
  asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(address), "f"(x), "f"(y), "f"(z), "f"(w)
               : "memory");
}

}  // namespace flash_attn_ext::ptx
