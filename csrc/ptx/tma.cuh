// Of the bulk tensor copies (TMA), what cuda::ptx does not have.
#pragma once

namespace flash_attn_ext::ptx {

// prefetch.tensormap: brings a tensor map (a kernel parameter) near before the first copy needs it.
__device__ __forceinline__ void prefetch_tensormap(const void* tensor_map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(tensor_map) : "memory");
}

}  // namespace flash_attn_ext::ptx
