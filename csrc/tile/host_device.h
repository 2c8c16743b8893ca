// Lets one source of plain functions serve kernels and host tests. The only macro of the project: no function can
// stand for an attribute that a host compiler does not know.
#pragma once

#if defined(__CUDACC__)
#define HOST_DEVICE __host__ __device__ __forceinline__
#else
#define HOST_DEVICE inline
#endif
