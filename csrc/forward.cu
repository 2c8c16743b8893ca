// Attention forward for Hopper: O = softmax(scale * Q K^T) V and its log-sum-exp.
//
// FlashAttention-3 (Shah et al. 2024), sections 3.1 and 3.2. A thread block keeps 64 query rows per consumer warpgroup
// and walks the KV blocks from the last to the first. Roles: of warpgroup 0, the producer, one thread takes tiles and
// copies their K and V blocks into two rings, and one thread copies Q; each other warpgroup, a consumer, multiplies and
// does the softmax of its own rows. Blocks are persistent: they take tile after tile (tile/schedule.h), and the
// producer is already at the next tile while the consumers finish this one. docs/forward.md has the barriers, the
// shared-memory plan and the cycle budget.

#include <algorithm>
#include <cuda/ptx>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "launch.h"
#include "launch_utils.h"
#include "limits.h"
#include "params.h"
#include "ptx/tma.cuh"
#include "ptx/warpgroup.cuh"
#include "ptx/wgmma.cuh"
#include "tensor_map.h"
#include "tile/block_range.h"
#include "tile/copy.cuh"
#include "tile/fragment.cuh"
#include "tile/mask.cuh"
#include "tile/ring.cuh"
#include "tile/schedule.h"
#include "tile/smem.cuh"
#include "tile/softmax.cuh"

namespace flash_attn_ext {
namespace {

// ---------------------------------------------------------------------------------------------------------- config

template <int kRow, class Type>
struct ForwardConfig {
  using T = Type;
  static constexpr ForwardTile kTile = kLimits[kRow].forward;
  static constexpr int kHeadDim = kLimits[kRow].head_dim;
  static constexpr int kBlockQ = kTile.block_q;
  static constexpr int kBlockKv = kTile.block_kv;
  static constexpr int kStages = kTile.stages;
  static constexpr int kConsumers = kTile.consumers();
  static constexpr int kThreads = 128 * (1 + kConsumers);

  // The SM's 65536 registers, shared out by setmaxnreg in multiples of 8: 24 + 2 * 240 <= 504, 32 + 3 * 160 = 512.
  static constexpr int kProducerRegisters = kConsumers == 2 ? 24 : 32;
  static constexpr int kConsumerRegisters = kConsumers == 2 ? 240 : 160;

  // With a buffer of its own, O leaves while V of the next tile arrives. Where it does not fit, O leaves through V's.
  static constexpr bool kOwnOutBuffer = (2 * kBlockQ + 2 * kStages * kBlockKv) * kHeadDim * 2 < 226 * 1024;

  // Where the first block's later half is masked for all rows of a consumer, it is not computed. At head dim 128 this
  // was measured to cost more than it saves, since the consumers then fall into step (docs/tuning.md).
  static constexpr bool kHalfFirstBlock = kHeadDim == 64;

  static_assert(kTile.built() && kBlockQ == 64 * kConsumers && kBlockKv % 16 == 0 && kHeadDim % kSlabColumns == 0);
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
  Ring<1> tile_ring;  // KV loader -> Q loader and consumers: the number of the next tile
  int tile_index;
  uint64_t q_full[kConsumers];   // Q loader -> consumer: your rows of Q have arrived
  uint64_t q_empty[kConsumers];  // consumer -> Q loader: my last Q K^T of the tile is done
  uint64_t out_left;             // consumers -> KV loader: O has left V's buffers (without an own buffer)

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
  int* tile_counter;
  TileSchedule schedule;
  Sequence sequence;
  int heads, heads_per_kv_head;
  float scale_log2;
};

// One output tile: which rows of which head, and how many KV blocks they see.
template <class Config>
struct Tile {
  int first_row, head, batch, blocks;

  __device__ __forceinline__ Tile(const ForwardArguments& args, int index) {
    TileCoord at = args.schedule.tile(index);
    first_row = at.row_block * Config::kBlockQ;
    head = at.head;
    batch = at.batch;
    blocks = args.sequence.visible_blocks(first_row, Config::kBlockQ, Config::kBlockKv);
  }
};

// The first tile is the block's own number, the others are claimed. After the last claim of the launch, the tiles()-th
// (each block's last one fails), the counter is 0 again for the next launch.
__device__ __forceinline__ int claim_tile(const ForwardArguments& args) {
  const int claimed = atomicAdd(args.tile_counter, 1);
  if (claimed == args.schedule.tiles() - 1) atomicExch(args.tile_counter, 0);
  return gridDim.x + claimed;
}

// --------------------------------------------------------------------------------------------------------- producer

// K runs one block ahead of V, because the consumers multiply Q K^T of a block before P V of the block before it.
template <class Config>
__device__ __forceinline__ void load_kv(const ForwardArguments& args, ForwardSmem<Config>& smem) {
  using Smem = ForwardSmem<Config>;
  RingPosition<Config::kStages> k_at, v_at;
  RingPosition<1> tile_at;
  for (int index = blockIdx.x;; tile_at.next()) {
    wait_phase(&smem.tile_ring.empty[0], tile_at.phase ^ 1);
    smem.tile_index = index;
    cuda::ptx::mbarrier_arrive(&smem.tile_ring.full[0]);
    if (index >= args.schedule.tiles()) break;

    const Tile<Config> tile(args, index);
    const int kv_head = tile.head / args.heads_per_kv_head;
    for (int block = tile.blocks - 1; block >= -1; --block) {
      if (block >= 0) {
        uint64_t* full = smem.k_ring.begin_fill(k_at, Smem::KvTile::kBytes);
        load_tile(smem.k[k_at.stage], args.k, block * Config::kBlockKv, kv_head, tile.batch, full);
        k_at.next();
      } else {
        index = claim_tile(args);  // as late as its latency stays hidden behind the wait for the last V
      }
      if (!Config::kOwnOutBuffer && block == (tile.blocks > 0 ? tile.blocks : 1) - 2) {
        wait_phase(&smem.out_left, tile_at.phase ^ 1);  // O of the tile before; once a tile, or a phase would be missed
      }
      if (block + 1 < tile.blocks) {
        uint64_t* full = smem.v_ring.begin_fill(v_at, Smem::KvTile::kBytes);
        load_tile(smem.v[v_at.stage], args.v, (block + 1) * Config::kBlockKv, kv_head, tile.batch, full);
        v_at.next();
      }
    }
  }
}

template <class Config>
__device__ __forceinline__ void load_q(const ForwardArguments& args, ForwardSmem<Config>& smem) {
  using Smem = ForwardSmem<Config>;
  for (RingPosition<1> tile_at;; tile_at.next()) {
    smem.tile_ring.wait_full(tile_at);
    const int index = smem.tile_index;
    smem.tile_ring.release(tile_at);
    if (index >= args.schedule.tiles()) break;

    const Tile<Config> tile(args, index);
    for (int consumer = 0; consumer < Config::kConsumers; ++consumer) {
      wait_phase(&smem.q_empty[consumer], tile_at.phase ^ 1);
      cuda::ptx::mbarrier_arrive_expect_tx(cuda::ptx::sem_release, cuda::ptx::scope_cta, cuda::ptx::space_shared,
                                           &smem.q_full[consumer], Smem::QTile::kBytes);
      load_tile(smem.q[consumer], args.q, tile.first_row + 64 * consumer, tile.head, tile.batch,
                &smem.q_full[consumer]);
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
  const uint64_t q_descriptor, k_descriptor, v_descriptor;
  RingPosition<Config::kStages> k_at, v_at;
  RingPosition<1> tile_at;  // its phase is Q's as well: one Q a tile

  float out[kHeadDim / 2];
  float scores[kBlockKv / 2];
  uint32_t p[kBlockKv / 16][4];

  __device__ __forceinline__ Consumer(const ForwardArguments& args, Smem& smem, int index)
      : args(args),
        smem(smem),
        index(index),
        q_descriptor(k_major_descriptor(smem.q[index])),
        k_descriptor(k_major_descriptor(smem.k[0])),
        v_descriptor(mn_major_descriptor(smem.v[0])) {}

  // The first kColumns columns of the scores.
  template <int kColumns>
  __device__ __forceinline__ auto& first_scores() {
    return reinterpret_cast<float (&)[kColumns / 2]>(scores);
  }

  // Issues S = Q K^T of the K block at hand, of its first kColumns keys.
  template <int kColumns>
  __device__ __forceinline__ void issue_scores() {
    ptx::wgmma_fence();
    const uint64_t k = k_descriptor + k_at.stage * (Smem::KvTile::kBytes >> 4);
#pragma unroll
    for (int step = 0; step < kHeadDim / 16; ++step) {
      ptx::Wgmma<kColumns>::template ss<T>(first_scores<kColumns>(),
                                           q_descriptor + k_major_step<typename Smem::QTile>(step),
                                           k + k_major_step<typename Smem::KvTile>(step), step > 0);
    }
    ptx::wgmma_commit_group();
  }

  // Issues O += P V of the V block at hand.
  __device__ __forceinline__ void issue_output() {
    ptx::wgmma_fence();
    const uint64_t v = v_descriptor + v_at.stage * (Smem::KvTile::kBytes >> 4);
#pragma unroll
    for (int step = 0; step < kBlockKv / 16; ++step) {
      ptx::Wgmma<kHeadDim>::template rs<T>(out, p[step], v + mn_major_step<typename Smem::KvTile>(step), 1);
    }
    ptx::wgmma_commit_group();
  }

  __device__ __forceinline__ void release_q() {
    if (threadIdx.x % 32 == 0) cuda::ptx::mbarrier_arrive(&smem.q_empty[index]);
  }
  __device__ __forceinline__ void release_k() {
    smem.k_ring.release(k_at);
    k_at.next();
  }
  __device__ __forceinline__ void release_v() {
    smem.v_ring.release(v_at);
    v_at.next();
  }

  // Where the config says so, consumers take turns at issuing products, so that one multiplies while another does its
  // softmax. A tile of n blocks has n - 1 turns for each consumer, whether or not it has work in them.
  __device__ __forceinline__ void await_turn() {
    if constexpr (Config::kTile.turns) ptx::bar_sync(kTurnBarrier + index, 256);
  }
  __device__ __forceinline__ void pass_turn() {
    if constexpr (Config::kTile.turns) {
      ptx::bar_arrive(kTurnBarrier + (index + 1 == Config::kConsumers ? 0 : index + 1), 256);
    }
  }

  template <int kRegisters>
  __device__ __forceinline__ void mask(float (&part)[kRegisters], int first_row, int block) {
    const int row = first_row + threadIdx.x / 32 % 4 * 16 + threadIdx.x % 32 / 4;
    const int visible[2] = {args.sequence.visible_keys(row) - block * kBlockKv,
                            args.sequence.visible_keys(row + 8) - block * kBlockKv};
    mask_scores(part, visible);
  }

  // A block that rows of other consumers see, but none of this one's.
  __device__ __forceinline__ void skip_block(int block) {
    smem.k_ring.wait_full(k_at);
    release_k();
    if (block > 0) {
      await_turn();
      pass_turn();
    }
    smem.v_ring.wait_full(v_at);
    release_v();
  }

  // The tile's first block has no P V to hide its softmax behind. Of its keys only the first kColumns are seen.
  template <int kColumns>
  __device__ __forceinline__ void first_block(OnlineSoftmax& softmax, int first_row, int block, bool masked) {
    auto& seen = first_scores<kColumns>();
    float rescale[2];
    smem.k_ring.wait_full(k_at);
    issue_scores<kColumns>();
    ptx::wgmma_wait_group<0>(seen);
    release_k();
    if (block == 0) release_q();
    if (masked) mask(seen, first_row, block);
    softmax.update(seen, rescale);
#pragma unroll
    for (int i = kColumns / 2; i < kBlockKv / 2; ++i) scores[i] = 0.f;
    to_operand<T>(p, scores);
  }

  // S = Q K^T of this block is issued before O += P V of the one before it: the softmax of S runs under P V.
  template <bool kMasked>
  __device__ __forceinline__ void next_block(OnlineSoftmax& softmax, int first_row, int block) {
    float rescale[2];
    smem.k_ring.wait_full(k_at);
    await_turn();
    issue_scores<kBlockKv>();
    smem.v_ring.wait_full(v_at);
    issue_output();
    pass_turn();
    ptx::wgmma_wait_group<1>(scores);
    release_k();
    if (block == 0) release_q();
    if constexpr (kMasked) mask(scores, first_row, block);
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
    issue_output();
    ptx::wgmma_wait_group<0>(out);
    release_v();
  }

  // O / sum leaves through shared memory by TMA, which clips the rows past the end; lse leaves from registers.
  __device__ __forceinline__ void store(OnlineSoftmax& softmax, const Tile<Config>& tile, int first_row) {
    float row_scale[2], lse[2];
    softmax.finish(row_scale, lse);

    const bool leader = threadIdx.x % 128 == 0;
    if constexpr (Config::kOwnOutBuffer) {  // the tile before has left it
      if (leader) cuda::ptx::cp_async_bulk_wait_group_read(cuda::ptx::n32_t<0>{});
      ptx::bar_sync(kOutBarrier + index, 128);
    } else {
      ptx::bar_sync(kVDoneBarrier, 128 * Config::kConsumers);
    }
    store_fragment<T, kHeadDim>(smem.out(index), out, row_scale);
    cuda::ptx::fence_proxy_async(cuda::ptx::space_shared);
    ptx::bar_sync(kOutBarrier + index, 128);
    if (leader) {
      store_tile(args.out, smem.out(index), first_row, tile.head, tile.batch);
      cuda::ptx::cp_async_bulk_commit_group();
      if constexpr (!Config::kOwnOutBuffer) {
        cuda::ptx::cp_async_bulk_wait_group_read(cuda::ptx::n32_t<0>{});
        cuda::ptx::mbarrier_arrive(&smem.out_left);
      }
    }

    const int row = first_row + threadIdx.x / 32 % 4 * 16 + threadIdx.x % 32 / 4;
    float* head_lse = args.lse + (static_cast<int64_t>(tile.batch) * args.heads + tile.head) * args.sequence.seqlen_q;
    if (threadIdx.x % 4 == 0) {
      if (row < args.sequence.seqlen_q) head_lse[row] = lse[0];
      if (row + 8 < args.sequence.seqlen_q) head_lse[row + 8] = lse[1];
    }
  }

  // Through a shuffle, so that the compiler knows the number, and the loops that depend on it, to be the warp's.
  __device__ __forceinline__ int take_tile() {
    smem.tile_ring.wait_full(tile_at);
    const int tile_index = __shfl_sync(~0u, smem.tile_index, 0);
    smem.tile_ring.release(tile_at);
    return tile_index;
  }

  __device__ __forceinline__ void run_tile(const Tile<Config>& tile) {
    const int first_row = tile.first_row + 64 * index;
    const int own_blocks = args.sequence.visible_blocks(first_row, 64, kBlockKv);
    const int full_blocks = args.sequence.full_blocks(first_row, kBlockKv);
    OnlineSoftmax softmax(args.scale_log2);
#pragma unroll
    for (int i = 0; i < kHeadDim / 2; ++i) out[i] = 0.f;

    wait_phase(&smem.q_full[index], tile_at.phase);
    int block = tile.blocks - 1;
    for (; block >= own_blocks; --block) skip_block(block);
    if (own_blocks == 0) release_q();
    if (block >= 0) {
      const bool half = args.sequence.visible_keys(first_row + 63) <= block * kBlockKv + kBlockKv / 2;
      if (Config::kHalfFirstBlock && half) {
        first_block<Config::kHalfFirstBlock ? kBlockKv / 2 : kBlockKv>(softmax, first_row, block, true);
      } else {
        first_block<kBlockKv>(softmax, first_row, block, block >= full_blocks);
      }
    }
    for (--block; block >= full_blocks; --block) next_block<true>(softmax, first_row, block);
    for (; block >= 0; --block) next_block<false>(softmax, first_row, block);
    if (own_blocks > 0) last_output();
    store(softmax, tile, first_row);
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
    smem.tile_ring.init(kConsumerWarps + 1);  // and the Q loader
    for (int i = 0; i < Config::kConsumers; ++i) {
      cuda::ptx::mbarrier_init(&smem.q_full[i], 1);
      cuda::ptx::mbarrier_init(&smem.q_empty[i], 4);
    }
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
    for (;; consumer.tile_at.next()) {
      const int tile_index = consumer.take_tile();
      if (tile_index >= args.schedule.tiles()) break;
      consumer.run_tile(Tile<Config>(args, tile_index));
    }
    if (consumer.index == 0) consumer.await_turn();  // takes the last turn, so that no barrier is left half full
    if (threadIdx.x % 128 == 0) cuda::ptx::cp_async_bulk_wait_group_read(cuda::ptx::n32_t<0>{});
  }
}

// ----------------------------------------------------------------------------------------------------------- launch

template <class Config>
void launch(const ForwardParams& p, cudaStream_t stream) {
  const int64_t row_blocks = (p.seqlen_q + Config::kBlockQ - 1) / Config::kBlockQ;
  check_counts({p.seqlen_q, p.seqlen_k, row_blocks * p.batch * p.heads});
  ForwardArguments args;
  args.q = make_tensor_map("q", p.q, p.dtype, p.batch, p.seqlen_q, p.heads, p.head_dim, p.q_strides, 64);
  args.k =
      make_tensor_map("k", p.k, p.dtype, p.batch, p.seqlen_k, p.kv_heads, p.head_dim, p.k_strides, Config::kBlockKv);
  args.v =
      make_tensor_map("v", p.v, p.dtype, p.batch, p.seqlen_k, p.kv_heads, p.head_dim, p.v_strides, Config::kBlockKv);
  args.out = make_tensor_map("out", p.out, p.dtype, p.batch, p.seqlen_q, p.heads, p.head_dim, p.out_strides, 64);
  args.lse = p.lse;
  args.tile_counter = p.tile_counter;
  args.heads = static_cast<int>(p.heads);
  args.heads_per_kv_head = static_cast<int>(p.heads / p.kv_heads);
  args.schedule =
      TileSchedule::make(static_cast<int>(row_blocks), args.heads, static_cast<int>(p.batch), p.causal,
                         2 * p.seqlen_k * p.head_dim * sizeof(typename Config::T), args.heads_per_kv_head, kL2Bytes);
  args.sequence = {static_cast<int>(p.seqlen_q), static_cast<int>(p.seqlen_k), p.causal};
  args.scale_log2 = p.softmax_scale * kLog2E;

  constexpr int kBytes = sizeof(ForwardSmem<Config>);
  const int device = current_device();
  allow_shared_memory<forward_kernel<Config>, kBytes>(device);
  const int blocks = std::min(multiprocessors(device), args.schedule.tiles());
  forward_kernel<Config><<<blocks, Config::kThreads, kBytes, stream>>>(args);
  check_cuda(cudaGetLastError(), "launching the forward kernel");
}

}  // namespace

void launch_forward(const ForwardParams& params, cudaStream_t stream) {
  const bool found = with_limits(params.head_dim, [&]<std::size_t row>() {
    if constexpr (kLimits[row].forward.built()) {
      if (params.dtype == DType::kFloat16) {
        launch<ForwardConfig<row, __half>>(params, stream);
      } else {
        launch<ForwardConfig<row, __nv_bfloat16>>(params, stream);
      }
    }
  });
  if (!found) throw std::runtime_error("no forward kernel for head_dim " + std::to_string(params.head_dim));
}

}  // namespace flash_attn_ext
