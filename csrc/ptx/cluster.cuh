// Instructions by which the thread blocks of a cluster share memory, on shared-memory addresses of 32 bits: cuda::ptx
// takes pointers, which are two registers each.
#pragma once

#include <cstdint>

namespace flash_attn_ext::ptx {

// mapa: the address at which another thread block's shared memory has what stands at `address` in this one's.
__device__ __forceinline__ uint32_t mapa(uint32_t address, uint32_t rank) {
  uint32_t mapped;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(mapped) : "r"(address), "r"(rank));
  return mapped;
}

// barrier.cluster: all threads of the cluster meet, and see what the others wrote before.
__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// The same, for threads that have nothing to show: it waits for no write.
__device__ __forceinline__ void cluster_sync_relaxed() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
}

// mbarrier.arrive on another thread block's barrier, for what was only read: at this scope it orders no writes that the
// other one could see. `.release.cluster` would, and compiles to a fence that waits for the reductions under way too.
__device__ __forceinline__ void mbarrier_arrive_remote(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// st.async: stores 16 bytes in another thread block; they count down on its barrier.
__device__ __forceinline__ void st_async_v4(uint32_t address, const uint4& x, uint32_t barrier) {
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(address),
      "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w), "r"(barrier)
      : "memory");
}

// ld.shared: 16 bytes.
__device__ __forceinline__ uint4 ld_shared_v4(uint32_t address) {
  uint4 x;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "r"(address)
               : "memory");
  return x;
}

// cp.async.bulk: copies bytes to another thread block's shared memory; they count down on its barrier.
__device__ __forceinline__ void cp_async_bulk_remote(uint32_t to, uint32_t from, uint32_t bytes, uint32_t barrier) {
  asm volatile("cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
               "r"(from), "r"(bytes), "r"(barrier)
               : "memory");
}

}  // namespace flash_attn_ext::ptx
