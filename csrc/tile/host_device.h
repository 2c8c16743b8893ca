// Lets one source of plain functions serve kernels and host tests. The only macro of the project: no function can
// stand for an attribute that a host compiler does not know.
#pragma once

#if defined(__CUDACC__)
#define HOST_DEVICE __host__ __device__ __forceinline__
#else
#define HOST_DEVICE inline
#endif

namespace flash_attn_ext {

// a / b of numbers that are not negative: a third of the instructions of a signed division.
HOST_DEVICE int quotient(int a, int b) { return static_cast<int>(static_cast<unsigned>(a) / static_cast<unsigned>(b)); }

}  // namespace flash_attn_ext
