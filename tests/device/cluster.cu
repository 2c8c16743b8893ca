// What a pair of thread blocks sends into each other's shared memory: 16 bytes at a time, in bulk, and arrivals.
#include <cuda/ptx>

#include "../../csrc/ptx/cluster.cuh"
#include "../../csrc/tile/ring.cuh"
#include "../../csrc/tile/smem.cuh"
#include "device.cuh"

using namespace flash_attn_ext;

constexpr int kThreads = 128, kWarps = kThreads / 32, kPairs = 3;

struct alignas(128) Smem {
  uint4 own[kThreads], stored[kThreads], copied[kThreads];
  uint64_t stored_full, copied_full, told;
};

__host__ __device__ constexpr uint32_t value(int block, int i) { return 1000 * block + i + 1; }

// Each thread block sends what it has, writes down what arrives, and goes on when its peer has done so.
__cluster_dims__(2, 1, 1) __global__ void exchange(uint4* stored, uint4* copied, uint32_t* ranks) {
  __shared__ Smem smem;
  const int thread = threadIdx.x;
  const uint32_t rank = cuda::ptx::get_sreg_cluster_ctarank();
  const uint32_t distance = ptx::mapa(smem_address(&smem), rank ^ 1) - smem_address(&smem);
  const auto peers = [&](const void* own) { return smem_address(own) + distance; };

  smem.own[thread] = make_uint4(value(blockIdx.x, 4 * thread), value(blockIdx.x, 4 * thread + 1),
                                value(blockIdx.x, 4 * thread + 2), value(blockIdx.x, 4 * thread + 3));
  if (thread == 0) {
    ranks[blockIdx.x] = rank;
    cuda::ptx::mbarrier_init(&smem.stored_full, 1);
    cuda::ptx::mbarrier_init(&smem.copied_full, 1);
    cuda::ptx::mbarrier_init(&smem.told, kWarps);
    cuda::ptx::fence_mbarrier_init(cuda::ptx::sem_release, cuda::ptx::scope_cluster);
    expect_bytes(&smem.stored_full, sizeof smem.own);
    expect_bytes(&smem.copied_full, sizeof smem.own);
  }
  cuda::ptx::fence_proxy_async(cuda::ptx::space_shared);
  __syncthreads();
  ptx::cluster_sync();

  ptx::st_async_v4(peers(&smem.stored[thread]), ptx::ld_shared_v4(smem_address(&smem.own[thread])),
                   peers(&smem.stored_full));
  if (thread % 32 == 0) {
    ptx::cp_async_bulk_remote(peers(&smem.copied[thread]), smem_address(&smem.own[thread]), 32 * sizeof(uint4),
                              peers(&smem.copied_full));
  }
  wait_phase(&smem.stored_full, 0);
  wait_phase(&smem.copied_full, 0);
  stored[blockIdx.x * kThreads + thread] = smem.stored[thread];
  copied[blockIdx.x * kThreads + thread] = smem.copied[thread];
  __syncwarp();
  if (thread % 32 == 0) ptx::mbarrier_arrive_remote(peers(&smem.told));
  wait_phase(&smem.told, 0);
  __syncwarp();
  ptx::cluster_sync_relaxed();
}

int main() {
  test::require_hopper();
  constexpr int kBlocks = 2 * kPairs;
  test::DeviceArray<uint4> stored(kBlocks * kThreads), copied(kBlocks * kThreads);
  test::DeviceArray<uint32_t> ranks(kBlocks);
  test::launch(exchange, kBlocks, kThreads, 0, stored.data, copied.data, ranks.data);
  const std::vector<uint32_t> rank = ranks.host();
  for (int block = 0; block < kBlocks; ++block) {
    test::check(rank[block] == block % 2u, "rank of block " + std::to_string(block));
  }
  for (const auto& [name, arrived] : {std::pair("stored", stored.host()), std::pair("copied", copied.host())}) {
    for (int block = 0; block < kBlocks; ++block) {
      for (int thread = 0; thread < kThreads; ++thread) {
        const uint4 x = arrived[block * kThreads + thread];
        const int peer = block ^ 1, first = 4 * thread;
        test::check(x.x == value(peer, first) && x.y == value(peer, first + 1) && x.z == value(peer, first + 2) &&
                        x.w == value(peer, first + 3),
                    name + (", block " + std::to_string(block)) + ", thread " + std::to_string(thread));
      }
    }
  }
  return test::finish("cluster");
}
