// A ring of stages between a producer, which fills them, by bulk copies or stores, and consumers, which hand them back.
#pragma once

#include <cstdint>
#include <cuda/ptx>

namespace flash_attn_ext {

// Which stage is at hand, and the parity of its barriers' phase. They change together.
template <int kStages>
struct RingPosition {
  int stage = 0;
  uint32_t phase = 0;

  // After so many stages.
  static __device__ __forceinline__ RingPosition of(unsigned count) {
    return {static_cast<int>(count % kStages), count / kStages % 2};
  }
  __device__ __forceinline__ void next() {
    if (++stage == kStages) {
      stage = 0;
      phase ^= 1;
    }
  }
  // By at most kStages.
  __device__ __forceinline__ void advance(int stages) {
    stage += stages;
    if (stage >= kStages) {
      stage -= kStages;
      phase ^= 1;
    }
  }
};

// Returns once the phase of this parity has completed. A barrier that was never completed counts as if the phase
// before its first one, of parity 1, had: a producer's first wait with parity 1 passes.
__device__ __forceinline__ void wait_phase(uint64_t* barrier, uint32_t parity) {
  // A thread that is put to sleep for long costs the multiplying warps neither issue slots nor power.
  constexpr uint32_t kSuspendNanoseconds = 10'000'000;
  while (!cuda::ptx::mbarrier_try_wait_parity(barrier, parity, kSuspendNanoseconds)) {
  }
}

// Arrives at a barrier of one arrival, and announces how many bytes will be copied before its phase completes.
__device__ __forceinline__ void expect_bytes(uint64_t* barrier, uint32_t bytes) {
  cuda::ptx::mbarrier_arrive_expect_tx(cuda::ptx::sem_release, cuda::ptx::scope_cta, cuda::ptx::space_shared, barrier,
                                       bytes);
}

template <int kStages>
struct Ring {
  uint64_t full[kStages];   // producer -> consumers: the stage's bytes have arrived
  uint64_t empty[kStages];  // consumers -> producer: nobody reads the stage any more

  __device__ void init(int consumer_arrivals, int producer_arrivals = 1) {
    for (int i = 0; i < kStages; ++i) {
      cuda::ptx::mbarrier_init(&full[i], producer_arrivals);
      cuda::ptx::mbarrier_init(&empty[i], consumer_arrivals);
    }
  }

  // Producer: waits until the stage is free.
  __device__ __forceinline__ void wait_empty(RingPosition<kStages> at) { wait_phase(&empty[at.stage], at.phase ^ 1); }

  // Producer: waits until the stage is free and announces how many bytes will be copied into it.
  __device__ __forceinline__ uint64_t* begin_fill(RingPosition<kStages> at, uint32_t bytes) {
    wait_empty(at);
    expect_bytes(&full[at.stage], bytes);
    return &full[at.stage];
  }

  // Producer: says that what it wrote by ordinary stores is there.
  __device__ __forceinline__ void end_fill(RingPosition<kStages> at) { cuda::ptx::mbarrier_arrive(&full[at.stage]); }

  // Consumers: wait for the bytes; hand the stage back (one thread of each warp counts for the warp).
  __device__ __forceinline__ void wait_full(RingPosition<kStages> at) { wait_phase(&full[at.stage], at.phase); }
  __device__ __forceinline__ void release(RingPosition<kStages> at) {
    if (threadIdx.x % 32 == 0) cuda::ptx::mbarrier_arrive(&empty[at.stage]);
  }
};

}  // namespace flash_attn_ext
