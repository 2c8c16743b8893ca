// Instructions that Hopper's warp specialisation needs and cuda::ptx does not have.
#pragma once

#include <cstdint>

namespace flash_attn_ext::ptx {

// setmaxnreg.inc: the warpgroup asks for more registers a thread, and waits until others have given them back.
template <int kRegisters>
__device__ __forceinline__ void setmaxnreg_inc() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// setmaxnreg.dec: the warpgroup gives registers back.
template <int kRegisters>
__device__ __forceinline__ void setmaxnreg_dec() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// bar.sync: waits until `threads` threads have arrived at named barrier `id` (1..15; 0 is __syncthreads).
__device__ __forceinline__ void bar_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// bar.arrive: counts as arrived at named barrier `id` and goes on.
__device__ __forceinline__ void bar_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// stmatrix.x4: stores four 8x8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8.
__device__ __forceinline__ void stmatrix_x4(uint32_t address, uint32_t m0, uint32_t m1, uint32_t m2, uint32_t m3) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(m0), "r"(m1),
               "r"(m2), "r"(m3)
               : "memory");
}

// ldmatrix.x4: the reverse of stmatrix.x4; with `trans` each matrix arrives transposed.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&m)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
               : "r"(address)
               : "memory");
}
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&m)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
               : "r"(address)
               : "memory");
}

// mov: keeps a value, or the thread's number in its block, in a register. Where these run short, the compiler works it
// out anew at each use, and that may take longer than a step of a main loop has.
__device__ __forceinline__ uint32_t in_register(uint32_t x) {
  uint32_t y;
  asm volatile("mov.b32 %0, %1;" : "=r"(y) : "r"(x));
  return y;
}
__device__ __forceinline__ int thread_in_register() {
  int thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread;
}
// The number of thread blocks, read anew at each use: kept in a register, it is spilled where these run short.
__device__ __forceinline__ int block_count() {
  int count;
  asm volatile("mov.u32 %0, %%nctaid.x;" : "=r"(count));
  return count;
}

// No instruction: what is computed from the value is computed anew at each use, and not kept in registers.
template <class T>
__device__ __forceinline__ void forget_value(T& x) {
  static_assert(sizeof(T) == 8);
  asm volatile("" : "+l"(x));
}

// No instruction: what is in memory is read again behind it, and not kept in registers.
__device__ __forceinline__ void forget_memory() { asm volatile("" ::: "memory"); }

// ex2.approx.ftz: 2^x to 2 units in the last place of float32; 2^-inf = 0.
__device__ __forceinline__ float ex2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// rcp.approx.ftz: 1 / x to 1 unit in the last place of float32; 1 / inf = 0.
__device__ __forceinline__ float rcp(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace flash_attn_ext::ptx
