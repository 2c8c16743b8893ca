// Adding to dQ in turn: what makes it the same in every run.
//
// A float32 sum depends on the order of its terms. dK and dV are summed in a fixed order anyway; what different items
// add to the dQ of a Q block comes in any order, unless they take turns: in the order in which the blocks of keys that
// see the Q block are handed out (KeySchedule). Each Q block has a counter of those who have added, in global memory.
//
// To see that, and to say that one has added, take a way to L2 and back each, longer than the rest of a step. So two
// threads do it, one ahead of the warpgroup that adds, the other behind it. The turn of a step goes round: from the
// loader to the first, from there to the warpgroup, to the second, and back to the loader.
#pragma once

#include <cuda/atomic>
#include <cuda/ptx>

#include "backward_products.cuh"
#include "tile/ring.cuh"

namespace flash_attn_ext {

struct Turn {
  static constexpr int kEnd = -1;  // there are no more

  int counter;  // which, of those in global memory; or kEnd
  int block;    // of query rows, in its sequence
  int item;     // among those at hand
  bool adds;    // otherwise no row of the block sees the item's keys
};

struct TurnRing {
  static constexpr int kSlots = 8;
  using Position = RingPosition<kSlots>;

  Turn turns[kSlots];
  uint64_t known[kSlots];      // loader -> grant_turns
  uint64_t granted[kSlots];    // grant_turns -> the warpgroup: all have added that come before it
  uint64_t added[kSlots];      // the warpgroup -> announce_turns
  uint64_t announced[kSlots];  // announce_turns -> loader

  __device__ void init() {
    for (int i = 0; i < kSlots; ++i) {
      cuda::ptx::mbarrier_init(&known[i], 1);
      cuda::ptx::mbarrier_init(&granted[i], 1);
      cuda::ptx::mbarrier_init(&added[i], 4);
      cuda::ptx::mbarrier_init(&announced[i], 1);
    }
  }

  // One thread of the loader.
  __device__ __forceinline__ void put(Position at, int counter, int block, int item) {
    wait_phase(&announced[at.stage], at.phase ^ 1);
    turns[at.stage] = {counter, block, item, false};
    cuda::ptx::mbarrier_arrive(&known[at.stage]);
  }
  __device__ __forceinline__ void put_end(Position at) { put(at, Turn::kEnd, 0, 0); }

  // The warpgroup, before and after it adds.
  __device__ __forceinline__ void wait(Position at) { wait_phase(&granted[at.stage], at.phase); }
  __device__ __forceinline__ void finish(Position at) {
    __syncwarp();
    if (threadIdx.x % 32 == 0) cuda::ptx::mbarrier_arrive(&added[at.stage]);
  }
};

using TurnCounter = cuda::atomic_ref<int, cuda::thread_scope_device>;

// One thread: waits for each turn to come. `items` are those at hand.
template <class Config>
__device__ __forceinline__ void grant_turns(const BackwardArguments<Config>& args, TurnRing& ring, const Item* items) {
  cudaGridDependencySynchronize();  // `prepare` has left zeros in the counts
  const bool waits = *args.keeps_turns != 0;
  for (TurnRing::Position at;; at.next()) {
    wait_phase(&ring.known[at.stage], at.phase);
    Turn& turn = ring.turns[at.stage];
    const bool is_end = turn.counter == Turn::kEnd;
    if (!is_end) {
      const Item& item = items[turn.item];
      const Sequence sequence = {item.rows, item.keys, args.reach.left, args.reach.right};
      const int before = find_turn(sequence, turn.block * Config::kBlockQ, Config::kBlockQ,
                                   quotient(item.first_key, Config::kBlockKv), Config::kBlockKv, item.ascends);
      turn.adds = before >= 0;
      while (waits && turn.adds && TurnCounter(args.turns[turn.counter]).load(cuda::memory_order_acquire) != before) {
      }
    }
    cuda::ptx::mbarrier_arrive(&ring.granted[at.stage]);
    if (is_end) break;
  }
}

// Another thread: counts what has been added. Whoever sees the count sees that too: it is released with all that the
// barrier has shown to this thread.
template <class Config>
__device__ __forceinline__ void announce_turns(const BackwardArguments<Config>& args, TurnRing& ring) {
  for (TurnRing::Position at;; at.next()) {
    wait_phase(&ring.granted[at.stage], at.phase);
    const Turn turn = ring.turns[at.stage];
    if (turn.counter == Turn::kEnd) break;
    wait_phase(&ring.added[at.stage], at.phase);
    if (turn.adds) TurnCounter(args.turns[turn.counter]).fetch_add(1, cuda::memory_order_release);
    cuda::ptx::mbarrier_arrive(&ring.announced[at.stage]);
  }
}

}  // namespace flash_attn_ext
