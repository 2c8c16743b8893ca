// Attention forward for Hopper: O = softmax(scale * Q K^T) V and its log-sum-exp.
//
// FlashAttention-3 (Shah et al. 2024), sections 3.1 and 3.2. A thread block keeps 64 query rows per consumer warpgroup
// and walks the KV blocks that they see from the last to the first. Roles: of warpgroup 0, the producer, one thread
// takes work items and copies their K and V blocks into two rings, and one thread copies Q; each other warpgroup, a
// consumer, multiplies and does the softmax of its own rows. Thread blocks are persistent: they take item after item
// (tile/schedule.h), and the producer is already at the next item while the consumers finish this one. docs/forward.md
// has the barriers, the layout of shared memory and the cycle budget.

#include <algorithm>
#include <cmath>
#include <cuda/ptx>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "device.h"
#include "launch.h"
#include "limits.h"
#include "ptx/tma.cuh"
#include "ptx/warpgroup.cuh"
#include "ptx/wgmma.cuh"
#include "tensor_map.h"
#include "tile/copy.cuh"
#include "tile/fragment.cuh"
#include "tile/mask.cuh"
#include "tile/product.cuh"
#include "tile/ring.cuh"
#include "tile/schedule.h"
#include "tile/sequences.h"
#include "tile/smem.cuh"
#include "tile/softmax.cuh"
#include "work.h"

namespace flash_attn_ext {
namespace {

// ---------------------------------------------------------------------------------------------------------- config

template <int kRow, class Type>
struct ForwardConfig {
  using T = Type;
  static constexpr ForwardPlan kPlan = kLimits[kRow].forward;
  static constexpr int kHeadDim = kLimits[kRow].head_dim;
  static constexpr int kBlockQ = kPlan.block_q;
  static constexpr int kBlockKv = kPlan.block_kv;
  static constexpr int kStages = kPlan.stages;
  static constexpr int kConsumers = kPlan.consumers();
  static constexpr int kThreads = 128 * (1 + kConsumers);

  // The SM's 65536 registers, shared out by setmaxnreg in multiples of 8: 24 + 2 * 240 <= 504, 32 + 3 * 160 = 512.
  static constexpr int kProducerRegisters = kConsumers == 2 ? 24 : 32;
  static constexpr int kConsumerRegisters = kConsumers == 2 ? 240 : 160;

  // With a buffer of its own, O leaves while V of the next item arrives. Where it does not fit beside Q, K, V and 1 KB
  // of barriers, O leaves through V's.
  static constexpr bool kOwnOutBuffer =
      (2 * kBlockQ + 2 * kStages * kBlockKv) * kHeadDim * sizeof(T) + 1024 < kSharedMemoryBytes;

  // Where the first block's later half is masked for all rows of a consumer, it is not computed. At head dim 128 this
  // was measured to cost more than it saves, since the consumers then fall into step (docs/tuning.md).
  static constexpr bool kHalfFirstBlock = kHeadDim == 64;

  static_assert(kPlan.built() && kBlockQ == 64 * kConsumers && kBlockKv % 16 == 0 && kHeadDim % kSlabColumns == 0);
  static_assert(kOwnOutBuffer || (kStages >= kConsumers && kBlockKv >= 64), "each consumer's O takes a stage of V");
  static_assert(kConsumers == 2 || kConsumers == 3, "register counts are chosen for two or three consumers");
};

// ---------------------------------------------------------------------------------------------------- shared memory

template <class Config>
struct ForwardSmem {
  static constexpr int kConsumers = Config::kConsumers;
  using QTile = SmemTile<typename Config::T, 64, Config::kHeadDim>;  // of one consumer; O has the same shape
  using KvTile = SmemTile<typename Config::T, Config::kBlockKv, Config::kHeadDim>;
  using KvRing = Ring<Config::kStages>;

  QTile q[kConsumers];
  KvTile k[Config::kStages];
  KvTile v[Config::kStages];
  struct None {};
  struct OutBuffer {
    QTile tile[kConsumers];
  };
  [[no_unique_address]] std::conditional_t<Config::kOwnOutBuffer, OutBuffer, None> out_buffer;

  KvRing k_ring;
  KvRing v_ring;
  Ring<1> q_ring[kConsumers];  // of each consumer; empty: its last Q K^T of the item is done
  Ring<1> item_ring;           // KV loader -> Q loader and consumers: the number of the next item
  int item_index;
  uint64_t out_left;  // consumers -> KV loader: O has left V's buffers (without an own buffer)

  __device__ QTile& out(int consumer) {
    if constexpr (Config::kOwnOutBuffer) {
      return out_buffer.tile[consumer];
    } else {
      return reinterpret_cast<QTile&>(v[consumer]);
    }
  }
};

// Named barriers; 0 is __syncthreads.
constexpr int kTurnBarrier = 1;   // + consumer: the one before me has issued its products, the tensor cores are mine
constexpr int kOutBarrier = 4;    // + consumer: my four warps agree on the state of my O buffer
constexpr int kVDoneBarrier = 7;  // no consumer multiplies with V any more

struct ForwardArguments {
  CUtensorMap q, k, v, out;
  float* lse;
  const float* sinks;  // of each head; null: none
  int* item_counter;
  Schedule schedule;
  Sequences sequences;
  int heads, heads_per_kv_head;
  float scale_log2;
};

// A work item: a block of query rows of a head, and the KV blocks that some of them see.
template <class Config>
struct Item {
  int sequence, head, first_row;
  Range blocks;

  __device__ __forceinline__ Item(const ForwardArguments& args, int index) {
    const WorkItem item = args.schedule.item(index);
    sequence = item.sequence;
    head = item.head;
    first_row = item.block * Config::kBlockQ;
    blocks = args.sequences.at(sequence).blocks(first_row, Config::kBlockQ, Config::kBlockKv);
  }
};

// The first item is the thread block's own number, the others are claimed. After the last claim of the launch, the
// items()-th (each thread block's last one fails), the counter is 0 again for the next launch.
__device__ __forceinline__ int claim_item(const ForwardArguments& args) {
  const int claimed = atomicAdd(args.item_counter, 1);
  if (claimed == args.schedule.items() - 1) atomicExch(args.item_counter, 0);
  return gridDim.x + claimed;
}

// --------------------------------------------------------------------------------------------------------- producer

// K runs one block ahead of V, because the consumers multiply Q K^T of a block before P V of the block before it.
template <class Config>
__device__ __forceinline__ void load_kv(const ForwardArguments& args, ForwardSmem<Config>& smem) {
  using Smem = ForwardSmem<Config>;
  RingPosition<Config::kStages> k_at, v_at;
  RingPosition<1> item_at;
  for (int index = blockIdx.x;; item_at.next()) {
    smem.item_ring.wait_empty(item_at);
    smem.item_index = index;
    smem.item_ring.end_fill(item_at);
    if (index >= args.schedule.items()) break;

    const Item<Config> item(args, index);
    const int kv_head = quotient(item.head, args.heads_per_kv_head);
    const Place place = args.sequences.place(item.sequence);
    const auto load = [&](typename Smem::KvTile& to, const CUtensorMap& from, int block, uint64_t* full) {
      load_tile(to, from, place.key + block * Config::kBlockKv, kv_head, place.batch, full);
    };
    const auto [begin, end] = item.blocks;
    for (int block = end - 1; block >= begin - 1; --block) {
      if (block >= begin) {
        load(smem.k[k_at.stage], args.k, block, smem.k_ring.begin_fill(k_at, Smem::KvTile::kBytes));
        k_at.next();
      } else {
        index = claim_item(args);  // as late as its latency stays hidden behind the wait for the last V
      }
      if (!Config::kOwnOutBuffer && block == (begin < end ? end : begin + 1) - 2) {
        wait_phase(&smem.out_left,
                   item_at.phase ^ 1);  // O of the item before; once an item, or a phase would be missed
      }
      if (block + 1 < end) {
        load(smem.v[v_at.stage], args.v, block + 1, smem.v_ring.begin_fill(v_at, Smem::KvTile::kBytes));
        v_at.next();
      }
    }
  }
}

template <class Config>
__device__ __forceinline__ void load_q(const ForwardArguments& args, ForwardSmem<Config>& smem) {
  using Smem = ForwardSmem<Config>;
  for (RingPosition<1> item_at;; item_at.next()) {
    smem.item_ring.wait_full(item_at);
    const int index = smem.item_index;
    smem.item_ring.release(item_at);
    if (index >= args.schedule.items()) break;

    const Item<Config> item(args, index);
    const Place place = args.sequences.place(item.sequence);
    for (int consumer = 0; consumer < Config::kConsumers; ++consumer) {
      uint64_t* full = smem.q_ring[consumer].begin_fill(item_at, Smem::QTile::kBytes);
      load_tile(smem.q[consumer], args.q, place.row + item.first_row + 64 * consumer, item.head, place.batch, full);
    }
  }
}

// --------------------------------------------------------------------------------------------------------- consumer

// A consumer warpgroup's registers and its place in the rings. `scores` is S, then P in float32; `p` is P as operand.
template <class Config>
struct Consumer {
  using T = typename Config::T;
  using Smem = ForwardSmem<Config>;
  static constexpr int kHeadDim = Config::kHeadDim, kBlockKv = Config::kBlockKv;

  const ForwardArguments& args;
  Smem& smem;
  const int index;
  const KMajor<typename Smem::QTile> q;
  const KMajor<typename Smem::KvTile> k;
  const MnMajor<typename Smem::KvTile> v;
  RingPosition<Config::kStages> k_at, v_at;
  RingPosition<1> item_at;  // Q's as well: one Q an item

  float out[kHeadDim / 2];
  float scores[kBlockKv / 2];
  uint32_t p[kBlockKv / 16][4];

  __device__ __forceinline__ Consumer(const ForwardArguments& args, Smem& smem, int index)
      : args(args), smem(smem), index(index), q(smem.q[index]), k(smem.k[0]), v(smem.v[0]) {}

  // The first kColumns columns of the scores.
  template <int kColumns>
  __device__ __forceinline__ auto& first_scores() {
    return reinterpret_cast<float (&)[kColumns / 2]>(scores);
  }

  __device__ __forceinline__ void release_q() { smem.q_ring[index].release(item_at); }
  __device__ __forceinline__ void release_k() {
    smem.k_ring.release(k_at);
    k_at.next();
  }
  __device__ __forceinline__ void release_v() {
    smem.v_ring.release(v_at);
    v_at.next();
  }

  // Where the config says so, consumers take turns at issuing products, so that one multiplies while another does its
  // softmax. An item of n blocks has n - 1 turns for each consumer, whether or not it has work in them.
  __device__ __forceinline__ void await_turn() {
    if constexpr (Config::kPlan.turns) ptx::bar_sync(kTurnBarrier + index, 256);
  }
  __device__ __forceinline__ void pass_turn() {
    if constexpr (Config::kPlan.turns) {
      ptx::bar_arrive(kTurnBarrier + (index + 1 == Config::kConsumers ? 0 : index + 1), 256);
    }
  }

  // The blocks that need no mask. What rows past the end see is never stored.
  __device__ __forceinline__ Range full_blocks(const Sequence& sequence, int first_row) {
    return sequence.full_blocks(first_row, min(64, sequence.rows - first_row), kBlockKv);
  }

  // Masks the edges that the block has.
  template <int kRegisters>
  __device__ __forceinline__ void mask(float (&part)[kRegisters], const Sequence& sequence, int first_row, int block) {
    const Range full = full_blocks(sequence, first_row);  // again, since no registers are left to keep it
    const int row = first_row + own_row(), first_key = block * kBlockKv;
    if (block >= full.end) {
      const int end[2] = {sequence.end_key(row) - first_key, sequence.end_key(row + 8) - first_key};
      mask_from(part, end);
    }
    if (block < full.begin) {
      const int first[2] = {sequence.first_key(row) - first_key, sequence.first_key(row + 8) - first_key};
      mask_before(part, first);
    }
  }

  // A block that rows of other consumers see, but none of this one's.
  __device__ __forceinline__ void skip_block(bool has_turn) {
    smem.k_ring.wait_full(k_at);
    release_k();
    if (has_turn) {
      await_turn();
      pass_turn();
    }
    smem.v_ring.wait_full(v_at);
    release_v();
  }

  // The item's first block has no P V to hide its softmax behind. Of its keys only the first kColumns are seen.
  template <int kColumns>
  __device__ __forceinline__ void first_block(OnlineSoftmax& softmax, const Sequence& sequence, int first_row,
                                              int block, bool last) {
    auto& seen = first_scores<kColumns>();
    float rescale[2];
    smem.k_ring.wait_full(k_at);
    product_ss(seen, q, k.at(k_at.stage));
    ptx::wgmma_wait_group<0>(seen);
    release_k();
    if (last) release_q();
    mask(seen, sequence, first_row, block);
    softmax.update(seen, rescale);
#pragma unroll
    for (int i = kColumns / 2; i < kBlockKv / 2; ++i) scores[i] = 0.f;
    to_operand<T>(p, scores);
  }

  // S = Q K^T of this block is issued before O += P V of the one before it: the softmax of S runs under P V.
  template <bool kMasked>
  __device__ __forceinline__ void next_block(OnlineSoftmax& softmax, const Sequence& sequence, int first_row, int block,
                                             bool last) {
    float rescale[2];
    smem.k_ring.wait_full(k_at);
    await_turn();
    product_ss(scores, q, k.at(k_at.stage));
    smem.v_ring.wait_full(v_at);
    product_rs(out, p, v.at(v_at.stage), true);
    pass_turn();
    ptx::wgmma_wait_group<1>(scores);
    release_k();
    if (last) release_q();
    if constexpr (kMasked) mask(scores, sequence, first_row, block);
    const bool grew = softmax.update(scores, rescale);
    ptx::wgmma_wait_group<0>(out);
    release_v();
    to_operand<T>(p, scores);
    if (grew) {
#pragma unroll
      for (int i = 0; i < kHeadDim / 2; ++i) out[i] *= rescale[fragment_row(i)];
    }
  }

  __device__ __forceinline__ void last_output() {
    smem.v_ring.wait_full(v_at);
    product_rs(out, p, v.at(v_at.stage), true);
    ptx::wgmma_wait_group<0>(out);
    release_v();
  }

  // O / sum leaves through shared memory by TMA, which clips the rows past the end; lse leaves from registers.
  __device__ __forceinline__ void store(OnlineSoftmax& softmax, const Item<Config>& item, int first_row) {
    const float sink_log2 = args.sinks != nullptr ? args.sinks[item.head] * kLog2E : -INFINITY;
    float row_scale[2], lse[2];
    softmax.finish(sink_log2, row_scale, lse);

    const bool leader = threadIdx.x % 128 == 0;
    if constexpr (Config::kOwnOutBuffer) {  // the item before has left it
      if (leader) cuda::ptx::cp_async_bulk_wait_group_read(cuda::ptx::n32_t<0>{});
      ptx::bar_sync(kOutBarrier + index, 128);
    } else {
      ptx::bar_sync(kVDoneBarrier, 128 * Config::kConsumers);
    }
    store_fragment<T, kHeadDim>(smem.out(index), out, row_scale);
    cuda::ptx::fence_proxy_async(cuda::ptx::space_shared);
    ptx::bar_sync(kOutBarrier + index, 128);
    if (leader) {
      const Place place = args.sequences.place(item.sequence);
      store_tile(args.out, smem.out(index), place.row + first_row, item.head, place.batch);
      cuda::ptx::cp_async_bulk_commit_group();
      if constexpr (!Config::kOwnOutBuffer) {
        cuda::ptx::cp_async_bulk_wait_group_read(cuda::ptx::n32_t<0>{});
        cuda::ptx::mbarrier_arrive(&smem.out_left);
      }
    }

    const int row = first_row + own_row();
    const int rows = args.sequences.at(item.sequence).rows;
    float* head_lse = args.lse + args.sequences.first_value(item.sequence, item.head, args.heads);
    if (own_column() == 0) {
      if (row < rows) head_lse[row] = lse[0];
      if (row + 8 < rows) head_lse[row + 8] = lse[1];
    }
  }

  // Through a shuffle, so that the compiler knows the number, and the loops that depend on it, to be the warp's.
  __device__ __forceinline__ int take_item() {
    smem.item_ring.wait_full(item_at);
    const int item_index = __shfl_sync(~0u, smem.item_index, 0);
    smem.item_ring.release(item_at);
    return item_index;
  }

  __device__ __forceinline__ void run(const Item<Config>& item) {
    const Sequence sequence = args.sequences.at(item.sequence);
    const int first_row = item.first_row + 64 * index;
    const Range own = sequence.blocks(first_row, 64, kBlockKv);
    const Range full = full_blocks(sequence, first_row);
    const bool sees = own.begin < own.end;
    OnlineSoftmax softmax(args.scale_log2);
#pragma unroll
    for (int i = 0; i < kHeadDim / 2; ++i) out[i] = 0.f;

    smem.q_ring[index].wait_full(item_at);
    int block = item.blocks.end - 1;
    for (; block >= (sees ? own.end : item.blocks.begin); --block) skip_block(sees || block > item.blocks.begin);
    if (sees) {
      const bool half = sequence.seen(first_row, 64).end <= block * kBlockKv + kBlockKv / 2;
      if (Config::kHalfFirstBlock && half) {
        first_block<Config::kHalfFirstBlock ? kBlockKv / 2 : kBlockKv>(softmax, sequence, first_row, block,
                                                                       block == own.begin);
      } else {
        first_block<kBlockKv>(softmax, sequence, first_row, block, block == own.begin);
      }
      // Masked blocks, those that need no mask, and masked ones again at the window's other edge. As two loops in a
      // third they need more registers than there are (C7511 at head dim 64).
      for (--block; block >= max(full.end, own.begin); --block) {
        next_block<true>(softmax, sequence, first_row, block, block == own.begin);
      }
      for (; block >= full.begin; --block) next_block<false>(softmax, sequence, first_row, block, block == own.begin);
      for (; block >= own.begin; --block) next_block<true>(softmax, sequence, first_row, block, block == own.begin);
      last_output();
      for (; block >= item.blocks.begin; --block) skip_block(true);
    } else {
      release_q();
    }
    store(softmax, item, first_row);
  }
};

// ----------------------------------------------------------------------------------------------------------- kernel

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, 1) forward_kernel(const __grid_constant__ ForwardArguments args) {
  extern __shared__ __align__(1024) unsigned char dynamic_smem[];
  auto& smem = *reinterpret_cast<ForwardSmem<Config>*>(dynamic_smem);
  // Through a shuffle, so that the compiler knows it is the same for the whole warp.
  const int warpgroup = __shfl_sync(~0u, threadIdx.x / 128, 0);

  if (threadIdx.x == 0) {
    constexpr int kConsumerWarps = 4 * Config::kConsumers;
    smem.k_ring.init(kConsumerWarps);
    smem.v_ring.init(kConsumerWarps);
    for (auto& ring : smem.q_ring) ring.init(4);
    smem.item_ring.init(kConsumerWarps + 1);  // and the Q loader
    cuda::ptx::mbarrier_init(&smem.out_left, Config::kConsumers);
    cuda::ptx::fence_mbarrier_init(cuda::ptx::sem_release, cuda::ptx::scope_cluster);
    for (const CUtensorMap* map : {&args.q, &args.k, &args.v, &args.out}) ptx::prefetch_tensormap(map);
  }
  __syncthreads();

  if (warpgroup == 0) {
    ptx::setmaxnreg_dec<Config::kProducerRegisters>();
    if (threadIdx.x == 0) load_kv<Config>(args, smem);
    if (threadIdx.x == 32) load_q<Config>(args, smem);
  } else {
    ptx::setmaxnreg_inc<Config::kConsumerRegisters>();
    Consumer<Config> consumer(args, smem, warpgroup - 1);
    if (consumer.index == Config::kConsumers - 1) consumer.pass_turn();  // the first turn is consumer 0's
    for (;; consumer.item_at.next()) {
      const int item_index = consumer.take_item();
      if (item_index >= args.schedule.items()) break;
      consumer.run(Item<Config>(args, item_index));
    }
    if (consumer.index == 0) consumer.await_turn();  // takes the last turn, so that no barrier is left half full
    if (threadIdx.x % 128 == 0) cuda::ptx::cp_async_bulk_wait_group_read(cuda::ptx::n32_t<0>{});
  }
}

// ----------------------------------------------------------------------------------------------------------- launch

template <class Config>
void launch(const ForwardParams& params, cudaStream_t stream) {
  using Smem = ForwardSmem<Config>;
  const Problem& problem = params.problem;
  const Shape q_shape = problem.q_shape(), k_shape = problem.k_shape();

  ForwardArguments args;
  args.q = make_tensor_map<typename Smem::QTile>("q", params.q, q_shape);
  args.k = make_tensor_map<typename Smem::KvTile>("k", params.k, k_shape);
  args.v = make_tensor_map<typename Smem::KvTile>("v", params.v, k_shape);
  args.out = make_tensor_map<typename Smem::QTile>("out", params.out, q_shape);
  args.lse = params.lse;
  args.sinks = params.sinks;
  args.item_counter = params.item_counter;
  args.sequences = problem.sequences();
  args.heads = static_cast<int>(problem.heads);
  args.heads_per_kv_head = problem.heads_per_kv_head();
  args.scale_log2 = problem.softmax_scale() * kLog2E;
  args.schedule = forward_schedule(problem, Config::kPlan);

  constexpr int kBytes = sizeof(Smem);
  const int device = current_device();
  allow_shared_memory<forward_kernel<Config>, kBytes>(device);
  const int blocks = std::min(multiprocessors(device), args.schedule.items());
  forward_kernel<Config><<<blocks, Config::kThreads, kBytes, stream>>>(args);
  check_cuda(cudaGetLastError(), "launching the forward kernel");
}

}  // namespace

void launch_forward(const ForwardParams& params, cudaStream_t stream) {
  const bool found = with_limits(params.problem.head_dim, [&]<std::size_t row>() {
    if constexpr (kLimits[row].forward.built()) {
      if (params.problem.dtype == DType::kFloat16) {
        launch<ForwardConfig<row, __half>>(params, stream);
      } else {
        launch<ForwardConfig<row, __nv_bfloat16>>(params, stream);
      }
    }
  });
  if (!found) throw std::runtime_error("no forward kernel for head_dim " + std::to_string(params.problem.head_dim));
}

int forward_shared_memory(int head_dim) {
  int bytes = 0;
  with_limits(head_dim, [&]<std::size_t row>() {
    if constexpr (kLimits[row].forward.built()) bytes = sizeof(ForwardSmem<ForwardConfig<row, __half>>);
  });
  return bytes;
}

}  // namespace flash_attn_ext
