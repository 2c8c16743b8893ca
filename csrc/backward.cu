// Attention backward for Hopper: dQ, dK and dV of O = softmax(scale * Q K^T) V, from dO, O and the log-sum-exp.
//
// With P = exp(scale * Q K^T - lse), dP = dO V^T and delta = rowsum(dO * O), FlashAttention-2's five products are
//   S = Q K^T,  dP = dO V^T,  dV = P^T dO,  dS = P * (dP - delta),  dQ = scale * dS K,  dK = scale * dS^T Q.
// Three kernels run one after the other:
//   prepare   delta and lse of every row, and zeros where dQ will be summed
//   backward  a thread block keeps 128 keys and walks the query blocks that see them; each of its two consumer
//             warpgroups owns 64 of the keys. S and dP are computed transposed (keys x queries), so that P^T and dS^T
//             are in registers already as the left operands of dV and dK. dQ needs the dS of both consumers: that goes
//             through shared memory, and dQ is added to float32 sums in global memory, where all blocks of a head meet.
//   convert   the sums of dQ, scaled, as 16-bit dQ
// With grouped queries a block walks the query heads of its KV head one after the other: dK and dV never leave its
// registers before they are complete, which makes them the same in every run. docs/backward.md has the barriers, the
// shared-memory plan and the cycle budget.

#include <cmath>
#include <cuda/ptx>
#include <stdexcept>
#include <string>

#include "launch.h"
#include "launch_utils.h"
#include "limits.h"
#include "params.h"
#include "ptx/reduce.cuh"
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

namespace flash_attn_ext {
namespace {

// ---------------------------------------------------------------------------------------------------------- config

template <int kRow, class Type>
struct BackwardConfig {
  using T = Type;
  static constexpr BackwardTile kTile = kLimits[kRow].backward;
  static constexpr int kHeadDim = kLimits[kRow].head_dim;
  static constexpr int kBlockQ = kTile.block_q;
  static constexpr int kBlockKv = kTile.block_kv;
  static constexpr int kStages = kTile.stages;
  static constexpr int kConsumers = 2;
  static constexpr int kThreads = 128 * (1 + kConsumers);

  // The SM's 65536 registers, shared out by setmaxnreg in multiples of 8: 24 + 2 * 240 <= 504.
  static constexpr int kProducerRegisters = 24;
  static constexpr int kConsumerRegisters = 240;

  static_assert(kTile.built() && kBlockKv == 64 * kConsumers && kHeadDim % kSlabColumns == 0);
  // The consumers share dQ's product by rows where there are 128 of them, else by halves of the head dim.
  static constexpr bool kDqByRows = kBlockQ == 128;
  static_assert(kBlockQ * kHeadDim == 2 * 64 * 64 && (kBlockQ == 64 || kDqByRows), "each consumer's dQ is 64 x 64");
};

// Which gradients a kernel computes, as a switch of its code: what is not asked for takes no product, no registers and
// no barrier. dK and dV share all but their last products, so they come together.
enum class Gradients { kAll, kDq, kDkv };

// What the exponent and dS need of each query row of a Q block, as `prepare` leaves it in the workspace.
template <class Config>
struct alignas(16) RowStats {
  float lse_log2[Config::kBlockQ];  // lse * log2(e); +inf for rows past the end or that see nothing: their P is 0
  float delta[Config::kBlockQ];     // sum of dO * O
};

// The float32 sums of one Q block of dQ in the workspace, in the order in which the threads hold them: of each consumer
// its 64 x 64 part as quads of registers, quad by quad for all 128 threads, so that what a warp adds is contiguous.
// Registers 4 q .. 4 q + 3 of thread t are (row, column), (row, column + 1), (row + 8, column), (row + 8, column + 1)
// with row = 16 (t / 32) + t % 32 / 4 and column = 8 q + 2 (t % 4).
struct DqSums {
  static constexpr int kQuads = 8;
  float4 quad[2][kQuads][128];
};

// ---------------------------------------------------------------------------------------------------- shared memory

template <class Config>
struct BackwardSmem {
  using T = typename Config::T;
  using KvTile = SmemTile<T, 64, Config::kHeadDim>;  // the keys of one consumer
  using QTile = SmemTile<T, Config::kBlockQ, Config::kHeadDim>;
  using DsTile = SmemTile<T, Config::kBlockKv, Config::kBlockQ>;  // transposed: a row is a key
  using QRing = Ring<Config::kStages>;

  KvTile k[Config::kConsumers];  // in the end dK leaves through it
  KvTile v[Config::kConsumers];  // dV
  QTile q[Config::kStages];
  QTile dout[Config::kStages];
  DsTile ds[2];  // two, so that one barrier a step suffices: see Consumer::step
  RowStats<Config> stats[Config::kStages];

  QRing q_ring;     // Q and stats, and with the first of them K
  QRing dout_ring;  // dO, and with the first of them V
};

// Named barriers; 0 is __syncthreads.
constexpr int kDsBarrier = 1;     // both consumers: dS is written
constexpr int kStoreBarrier = 2;  // + consumer: dK and dV are in shared memory

struct BackwardArguments {
  CUtensorMap q, k, v, dout, dk, dv;
  const void* stats;  // RowStats[batch * heads][q_blocks]
  DqSums* dq;         // [batch * heads][q_blocks]
  TileSchedule schedule;
  Sequence sequence;
  int q_blocks, heads, heads_per_kv_head;
  float scale, scale_log2;
  bool need_dk, need_dv;
};

// One thread block's work: a KV block, and for each query head of its KV head the Q blocks that see it.
template <class Config>
struct Tile {
  int first_key, kv_head, batch, first_head, last_head, first_block;

  __device__ __forceinline__ Tile(const BackwardArguments& args, int index) {
    TileCoord at = args.schedule.tile(index);
    // The schedule takes later blocks for the costlier ones; here the first keys are those that most queries see.
    first_key = (args.schedule.row_blocks - 1 - at.row_block) * Config::kBlockKv;
    kv_head = at.head;
    batch = at.batch;
    first_head = kv_head * args.heads_per_kv_head;
    last_head = first_head + args.heads_per_kv_head - 1;
    first_block = args.sequence.first_row_block(first_key, Config::kBlockQ);
  }

  // Where a head's Q blocks start among those of all heads of all batches, in which order the workspace is.
  __device__ __forceinline__ int64_t head_blocks(const BackwardArguments& args, int head) const {
    return (static_cast<int64_t>(batch) * args.heads + head) * args.q_blocks;
  }
};

// --------------------------------------------------------------------------------------------------------- producer

template <class Config>
__device__ __forceinline__ void load(const BackwardArguments& args, BackwardSmem<Config>& smem,
                                     const Tile<Config>& tile) {
  using Smem = BackwardSmem<Config>;
  auto load_keys = [&](typename Smem::KvTile(&to)[Config::kConsumers], const CUtensorMap& from, uint64_t* full) {
    for (int i = 0; i < Config::kConsumers; ++i) {
      load_tile(to[i], from, tile.first_key + 64 * i, tile.kv_head, tile.batch, full);
    }
  };

  uint32_t key_bytes = sizeof smem.k;  // of K, which comes with the first Q, and of V, which comes with the first dO
  RingPosition<Config::kStages> at;
  for (int head = tile.first_head; head <= tile.last_head; ++head) {
    const auto* stats = static_cast<const RowStats<Config>*>(args.stats) + tile.head_blocks(args, head);
    for (int block = tile.first_block; block < args.q_blocks; ++block) {
      const int row = block * Config::kBlockQ;
      uint64_t* full = smem.q_ring.begin_fill(at, Smem::QTile::kBytes + sizeof(RowStats<Config>) + key_bytes);
      if (key_bytes > 0) load_keys(smem.k, args.k, full);
      load_tile(smem.q[at.stage], args.q, row, head, tile.batch, full);
      cuda::ptx::cp_async_bulk(cuda::ptx::space_cluster, cuda::ptx::space_global, &smem.stats[at.stage], stats + block,
                               sizeof(RowStats<Config>), full);
      full = smem.dout_ring.begin_fill(at, Smem::QTile::kBytes + key_bytes);
      if (key_bytes > 0) load_keys(smem.v, args.v, full);
      load_tile(smem.dout[at.stage], args.dout, row, head, tile.batch, full);
      key_bytes = 0;
      at.next();
    }
  }
}

// --------------------------------------------------------------------------------------------------------- consumer

// A consumer warpgroup's registers and its place in the rings. All accumulators but dQ's have its 64 keys as rows.
template <class Config, Gradients kGradients>
struct Consumer {
  using T = typename Config::T;
  using Smem = BackwardSmem<Config>;
  using KvTile = typename Smem::KvTile;
  using QTile = typename Smem::QTile;
  using DsTile = typename Smem::DsTile;
  static constexpr int kHeadDim = Config::kHeadDim, kBlockQ = Config::kBlockQ;
  static constexpr bool kWantDq = kGradients != Gradients::kDkv, kWantDkv = kGradients != Gradients::kDq;

  const BackwardArguments& args;
  Smem& smem;
  const int index;
  // Each operand as its product reads it: Q and dO across (S, dP) and along (dK, dV), K along too for dQ.
  const uint64_t k_descriptor, v_descriptor, q_descriptor, dout_descriptor;
  const uint64_t q_mn_descriptor, dout_mn_descriptor, ds_mn_descriptor, k_mn_descriptor;
  RingPosition<Config::kStages> at;  // in both rings
  int ds_stage = 0;
  int first_seeing[2];  // the first query that sees the thread's two keys

  float dk[kHeadDim / 2], dv[kHeadDim / 2];

  __device__ __forceinline__ Consumer(const BackwardArguments& args, Smem& smem, int index)
      : args(args),
        smem(smem),
        index(index),
        k_descriptor(k_major_descriptor(smem.k[index])),
        v_descriptor(k_major_descriptor(smem.v[index])),
        q_descriptor(k_major_descriptor(smem.q[0])),
        dout_descriptor(k_major_descriptor(smem.dout[0])),
        q_mn_descriptor(mn_major_descriptor(smem.q[0])),
        dout_mn_descriptor(mn_major_descriptor(smem.dout[0])),
        // My part of dQ is a half of the rows, a slab of dS^T, or a half of the columns, a slab of K.
        ds_mn_descriptor(mn_major_descriptor(smem.ds[0]) + (Config::kDqByRows ? index * (DsTile::kSlabBytes >> 4) : 0)),
        k_mn_descriptor(mn_major_descriptor(smem.k[0]) + (Config::kDqByRows ? 0 : index * (KvTile::kSlabBytes >> 4))) {}

  // Issues S^T = K Q^T.
  __device__ __forceinline__ void issue_scores(float (&scores)[kBlockQ / 2]) {
    ptx::wgmma_fence();
    const uint64_t q = q_descriptor + at.stage * (QTile::kBytes >> 4);
#pragma unroll
    for (int step = 0; step < kHeadDim / 16; ++step) {
      ptx::Wgmma<kBlockQ>::template ss<T>(scores, k_descriptor + k_major_step<KvTile>(step),
                                          q + k_major_step<QTile>(step), step > 0);
    }
    ptx::wgmma_commit_group();
  }

  // Issues dP^T = V dO^T.
  __device__ __forceinline__ void issue_dp(float (&dp)[kBlockQ / 2]) {
    ptx::wgmma_fence();
    const uint64_t dout = dout_descriptor + at.stage * (QTile::kBytes >> 4);
#pragma unroll
    for (int step = 0; step < kHeadDim / 16; ++step) {
      ptx::Wgmma<kBlockQ>::template ss<T>(dp, v_descriptor + k_major_step<KvTile>(step),
                                          dout + k_major_step<QTile>(step), step > 0);
    }
    ptx::wgmma_commit_group();
  }

  // Issues dV += P^T dO.
  __device__ __forceinline__ void issue_dv(const uint32_t (&p)[kBlockQ / 16][4]) {
    ptx::wgmma_fence();
    const uint64_t dout = dout_mn_descriptor + at.stage * (QTile::kBytes >> 4);
#pragma unroll
    for (int step = 0; step < kBlockQ / 16; ++step) {
      ptx::Wgmma<kHeadDim>::template rs<T>(dv, p[step], dout + mn_major_step<QTile>(step), 1);
    }
    ptx::wgmma_commit_group();
  }

  // Issues dK += dS^T Q, not scaled yet.
  __device__ __forceinline__ void issue_dk(const uint32_t (&ds)[kBlockQ / 16][4]) {
    ptx::wgmma_fence();
    const uint64_t q = q_mn_descriptor + at.stage * (QTile::kBytes >> 4);
#pragma unroll
    for (int step = 0; step < kBlockQ / 16; ++step) {
      ptx::Wgmma<kHeadDim>::template rs<T>(dk, ds[step], q + mn_major_step<QTile>(step), 1);
    }
    ptx::wgmma_commit_group();
  }

  // Issues my part of dQ = dS K, not scaled yet, over the keys of both consumers.
  __device__ __forceinline__ void issue_dq(float (&dq)[32]) {
    ptx::wgmma_fence();
    const uint64_t ds = ds_mn_descriptor + ds_stage * (DsTile::kBytes >> 4);
#pragma unroll
    for (int step = 0; step < Config::kBlockKv / 16; ++step) {
      const uint64_t k = k_mn_descriptor + step / 4 * (KvTile::kBytes >> 4);
      ptx::Wgmma<64>::template ss_mn<T>(dq, ds + mn_major_step<DsTile>(step), k + mn_major_step<KvTile>(step % 4),
                                        step > 0);
    }
    ptx::wgmma_commit_group();
  }

  // The values of the queries that are the columns of the thread's fragment: of every 8, two neighbours.
  static __device__ __forceinline__ void load_queries(float2 (&to)[kBlockQ / 8], const float (&of_row)[kBlockQ]) {
#pragma unroll
    for (int j = 0; j < kBlockQ / 8; ++j) to[j] = reinterpret_cast<const float2*>(of_row)[4 * j + threadIdx.x % 4];
  }

  // P = exp(scale * S - lse), in place.
  __device__ __forceinline__ void exponentiate(float (&scores)[kBlockQ / 2], const float2 (&lse_log2)[kBlockQ / 8]) {
#pragma unroll
    for (int i = 0; i < kBlockQ / 2; i += 2) {
      const float2 lse = lse_log2[i / 4];
      scores[i] = ptx::ex2(fmaf(scores[i], args.scale_log2, -lse.x));
      scores[i + 1] = ptx::ex2(fmaf(scores[i + 1], args.scale_log2, -lse.y));
    }
  }

  // dS = P * (dP - delta), rounded, as an operand.
  __device__ __forceinline__ void make_ds(uint32_t (&ds)[kBlockQ / 16][4], const float (&p)[kBlockQ / 2],
                                          const float (&dp)[kBlockQ / 2], const float2 (&deltas)[kBlockQ / 8]) {
#pragma unroll
    for (int i = 0; i < kBlockQ / 2; i += 2) {
      const float2 delta = deltas[i / 4];
      ds[i / 8][i % 8 / 2] = pack<T>(p[i] * (dp[i] - delta.x), p[i + 1] * (dp[i + 1] - delta.y));
    }
  }

  // dS^T into shared memory, where dQ's product reads it.
  __device__ __forceinline__ void share_ds(const uint32_t (&ds)[kBlockQ / 16][4]) {
    const int lane = threadIdx.x % 32, row = 64 * index + threadIdx.x / 32 % 4 * 16 + lane % 16;
#pragma unroll
    for (int j = 0; j < kBlockQ / 16; ++j) {
      ptx::stmatrix_x4(smem.ds[ds_stage].chunk_address(j / 4, row, j % 4 * 2 + lane / 16), ds[j][0], ds[j][1], ds[j][2],
                       ds[j][3]);
    }
  }

  // Adds my part of dQ to the sums in global memory.
  __device__ __forceinline__ void add_dq(const float (&dq)[32], DqSums* sums) {
#pragma unroll
    for (int q = 0; q < DqSums::kQuads; ++q) {
      ptx::red_add_v4(reinterpret_cast<float*>(&sums->quad[index][q][threadIdx.x % 128]), dq[4 * q], dq[4 * q + 1],
                      dq[4 * q + 2], dq[4 * q + 3]);
    }
  }

  // P and dS of one Q block. P is computed under dP's product.
  template <bool kMasked>
  __device__ __forceinline__ void compute_p_ds(uint32_t (&p)[kBlockQ / 16][4], uint32_t (&ds)[kBlockQ / 16][4],
                                               int first_row) {
    float scores[kBlockQ / 2], dp[kBlockQ / 2];
    float2 lse_log2[kBlockQ / 8], delta[kBlockQ / 8];
    smem.q_ring.wait_full(at);
    issue_scores(scores);
    smem.dout_ring.wait_full(at);
    issue_dp(dp);
    load_queries(lse_log2, smem.stats[at.stage].lse_log2);
    ptx::wgmma_wait_group<1>(scores);
    if constexpr (kMasked) {
      const int from_block[2] = {first_seeing[0] - first_row, first_seeing[1] - first_row};
      mask_transposed_scores(scores, from_block);
    }
    exponentiate(scores, lse_log2);
    to_operand<T>(p, scores);
    if constexpr (kWantDq) load_queries(delta, smem.stats[at.stage].delta);  // hidden behind dP's product
    ptx::wgmma_wait_group<0>(dp);
    if constexpr (!kWantDq) load_queries(delta, smem.stats[at.stage].delta);  // earlier, and ptxas spills
    make_ds(ds, scores, dp, delta);
  }

  // One Q block. dS has two buffers: before a consumer writes one again it passes the barrier of the step between, at
  // which the other consumer arrives when its dQ of the step before that is done.
  template <bool kMasked>
  __device__ __forceinline__ void step(int first_row, DqSums* sums) {
    uint32_t p[kBlockQ / 16][4], ds[kBlockQ / 16][4];
    float dq[32];
    compute_p_ds<kMasked>(p, ds, first_row);
    if constexpr (kWantDq) share_ds(ds);
    if constexpr (kWantDkv) issue_dv(p);
    if constexpr (kWantDq) {
      cuda::ptx::fence_proxy_async(cuda::ptx::space_shared);
      ptx::bar_sync(kDsBarrier, 128 * Config::kConsumers);
      issue_dq(dq);
    }
    if constexpr (kWantDkv) ptx::wgmma_wait_group<kWantDq>(dv);
    smem.dout_ring.release(at);
    if constexpr (kWantDkv) issue_dk(ds);
    if constexpr (kWantDq) {
      ptx::wgmma_wait_group<kWantDkv>(dq);
      ds_stage ^= 1;
      add_dq(dq, sums);
    }
    if constexpr (kWantDkv) ptx::wgmma_wait_group<0>(dk);
    smem.q_ring.release(at);
    at.next();
  }

  // dK and dV leave through the shared memory of K and V by TMA, which clips the keys past the end.
  __device__ __forceinline__ void store(const Tile<Config>& tile) {
    ptx::bar_sync(kDsBarrier, 128 * Config::kConsumers);  // nobody reads K for dQ any more
    const float dk_scale[2] = {args.scale, args.scale}, dv_scale[2] = {1.f, 1.f};
    store_fragment<T, kHeadDim>(smem.v[index], dv, dv_scale);
    store_fragment<T, kHeadDim>(smem.k[index], dk, dk_scale);
    cuda::ptx::fence_proxy_async(cuda::ptx::space_shared);
    ptx::bar_sync(kStoreBarrier + index, 128);
    if (threadIdx.x % 128 == 0) {
      const int row = tile.first_key + 64 * index;
      if (args.need_dv) store_tile(args.dv, smem.v[index], row, tile.kv_head, tile.batch);
      if (args.need_dk) store_tile(args.dk, smem.k[index], row, tile.kv_head, tile.batch);
      cuda::ptx::cp_async_bulk_commit_group();
      cuda::ptx::cp_async_bulk_wait_group_read(cuda::ptx::n32_t<0>{});
    }
  }

  __device__ __forceinline__ void run(const Tile<Config>& tile) {
    const int thread_key = tile.first_key + 64 * index + threadIdx.x / 32 % 4 * 16 + threadIdx.x % 32 / 4;
    // The same for both consumers, so that they meet at a barrier from the same place in the code.
    const int first_full_block = args.sequence.first_full_row_block(tile.first_key, Config::kBlockKv, kBlockQ);
#pragma unroll
    for (int r = 0; r < 2; ++r) first_seeing[r] = args.sequence.first_seeing_row(thread_key + 8 * r);
#pragma unroll
    for (int i = 0; i < kHeadDim / 2; ++i) dk[i] = dv[i] = 0.f;

    for (int head = tile.first_head; head <= tile.last_head; ++head) {
      DqSums* sums = args.dq + tile.head_blocks(args, head);
      int block = tile.first_block;
      for (; block < first_full_block; ++block) step<true>(block * kBlockQ, sums + block);
      for (; block < args.q_blocks; ++block) step<false>(block * kBlockQ, sums + block);
    }
    if constexpr (kWantDkv) store(tile);
  }
};

// ---------------------------------------------------------------------------------------------------------- kernels

template <class Config, Gradients kGradients>
__global__ void __launch_bounds__(Config::kThreads, 1) backward_kernel(const __grid_constant__ BackwardArguments args) {
  extern __shared__ __align__(1024) unsigned char dynamic_smem[];
  auto& smem = *reinterpret_cast<BackwardSmem<Config>*>(dynamic_smem);
  // Through a shuffle, so that the compiler knows it is the same for the whole warp.
  const int warpgroup = __shfl_sync(~0u, threadIdx.x / 128, 0);

  if (threadIdx.x == 0) {
    smem.q_ring.init(4 * Config::kConsumers);
    smem.dout_ring.init(4 * Config::kConsumers);
    cuda::ptx::fence_mbarrier_init(cuda::ptx::sem_release, cuda::ptx::scope_cluster);
    for (const CUtensorMap* map : {&args.q, &args.k, &args.v, &args.dout}) ptx::prefetch_tensormap(map);
  }
  __syncthreads();

  const Tile<Config> tile(args, blockIdx.x);
  if (warpgroup == 0) {
    ptx::setmaxnreg_dec<Config::kProducerRegisters>();
    if (threadIdx.x == 0) load(args, smem, tile);
  } else {
    ptx::setmaxnreg_inc<Config::kConsumerRegisters>();
    Consumer<Config, kGradients>(args, smem, warpgroup - 1).run(tile);
  }
}

// Element (batch, row, head, column) of a tensor.
template <class T>
__device__ __forceinline__ T* element(T* data, const Strides& strides, int batch, int row, int head, int column) {
  return data + batch * strides.batch + row * strides.seqlen + head * strides.heads + column;
}

constexpr int kRowThreads = 256;  // of a block of prepare_kernel and convert_kernel, which handles one Q block

struct RowArguments {
  const void *dout, *out;
  void* dq;
  const float* lse;
  void* stats;
  DqSums* sums;  // null: dq is not asked for
  Strides dout_strides, out_strides, dq_strides;
  int q_blocks, heads, seqlen_q;
  float scale;
};

template <class Config>
__global__ void __launch_bounds__(kRowThreads) prepare_kernel(const __grid_constant__ RowArguments args) {
  using T = typename Config::T;
  constexpr int kLanes = Config::kHeadDim / 8;  // a row's threads, 16 bytes each
  const int block = blockIdx.x % args.q_blocks, pair = blockIdx.x / args.q_blocks;
  const int head = pair % args.heads, batch = pair / args.heads;
  auto& stats = static_cast<RowStats<Config>*>(args.stats)[blockIdx.x];

#pragma unroll
  for (int first = 0; first < Config::kBlockQ; first += kRowThreads / kLanes) {
    const int index = first + threadIdx.x / kLanes, row = block * Config::kBlockQ + index;
    const int lane = threadIdx.x % kLanes;
    float delta = 0.f, lse = -INFINITY;
    if (row < args.seqlen_q) {
      const auto* dout = static_cast<const T*>(args.dout);
      const auto* out = static_cast<const T*>(args.out);
      const uint4 a = *reinterpret_cast<const uint4*>(element(dout, args.dout_strides, batch, row, head, 8 * lane));
      const uint4 b = *reinterpret_cast<const uint4*>(element(out, args.out_strides, batch, row, head, 8 * lane));
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 x = unpack<T>(reinterpret_cast<const uint32_t*>(&a)[i]),
                     y = unpack<T>(reinterpret_cast<const uint32_t*>(&b)[i]);
        delta += x.x * y.x + x.y * y.y;
      }
      lse = args.lse[static_cast<int64_t>(pair) * args.seqlen_q + row];
    }
#pragma unroll
    for (int distance = kLanes / 2; distance > 0; distance /= 2) delta += __shfl_xor_sync(~0u, delta, distance);
    if (lane == 0) {
      const bool empty = lse == -INFINITY;
      stats.lse_log2[index] = empty ? INFINITY : lse * kLog2E;
      stats.delta[index] = empty ? 0.f : delta;
    }
  }

  if (args.sums != nullptr) {
    auto* quads = reinterpret_cast<float4*>(args.sums + blockIdx.x);
    for (int i = threadIdx.x; i < sizeof(DqSums) / sizeof(float4); i += kRowThreads) quads[i] = float4{};
  }
}

template <class Config>
__global__ void __launch_bounds__(kRowThreads) convert_kernel(const __grid_constant__ RowArguments args) {
  using T = typename Config::T;
  const int block = blockIdx.x % args.q_blocks, pair = blockIdx.x / args.q_blocks;
  const int head = pair % args.heads, batch = pair / args.heads;
  const DqSums& sums = args.sums[blockIdx.x];

  // Four neighbouring threads of the product hold 8 columns of two rows: 16 bytes of each. Neighbouring threads here
  // take neighbouring columns, so that rows are written whole.
#pragma unroll
  for (int item = threadIdx.x; item < 2 * DqSums::kQuads * 32; item += kRowThreads) {
    const int quad = item % DqSums::kQuads, group = item / DqSums::kQuads % 32, part = item / (DqSums::kQuads * 32);
    uint32_t bits[2][4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float4 x = sums.quad[part][quad][4 * group + i];
      bits[0][i] = pack<T>(x.x * args.scale, x.y * args.scale);
      bits[1][i] = pack<T>(x.z * args.scale, x.w * args.scale);
    }
    const int column = 8 * quad + (Config::kDqByRows ? 0 : 64 * part);
    const int first_row = block * Config::kBlockQ + (Config::kDqByRows ? 64 * part : 0) + group / 8 * 16 + group % 8;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = first_row + 8 * r;
      if (row < args.seqlen_q) {
        *reinterpret_cast<uint4*>(element(static_cast<T*>(args.dq), args.dq_strides, batch, row, head, column)) =
            make_uint4(bits[r][0], bits[r][1], bits[r][2], bits[r][3]);
      }
    }
  }
}

// ----------------------------------------------------------------------------------------------------------- launch

// The workspace: the sums of dQ, then the rows' stats, each for every Q block of every (batch, head).
template <class Config>
struct Workspace {
  int64_t q_blocks;  // of one (batch, head)
  int64_t all_blocks;

  explicit Workspace(const BackwardParams& p)
      : q_blocks((p.seqlen_q + Config::kBlockQ - 1) / Config::kBlockQ), all_blocks(q_blocks * p.batch * p.heads) {}

  DqSums* sums(const BackwardParams& p) const { return static_cast<DqSums*>(p.workspace); }
  void* stats(const BackwardParams& p) const { return sums(p) + all_blocks; }
  int64_t bytes() const { return all_blocks * static_cast<int64_t>(sizeof(DqSums) + sizeof(RowStats<Config>)); }
};

template <class Config>
RowArguments row_arguments(const BackwardParams& p, const Workspace<Config>& workspace) {
  RowArguments args;
  args.dout = p.dout;
  args.out = p.out;
  args.dq = p.dq;
  args.lse = p.lse;
  args.stats = workspace.stats(p);
  args.sums = p.dq != nullptr ? workspace.sums(p) : nullptr;
  args.dout_strides = p.dout_strides;
  args.out_strides = p.out_strides;
  args.dq_strides = p.dq_strides;
  args.q_blocks = static_cast<int>(workspace.q_blocks);
  args.heads = static_cast<int>(p.heads);
  args.seqlen_q = static_cast<int>(p.seqlen_q);
  args.scale = p.softmax_scale;
  return args;
}

template <class Config>
BackwardArguments backward_arguments(const BackwardParams& p, const Workspace<Config>& workspace, int64_t kv_blocks) {
  constexpr int64_t kRowBytesPerColumn = 2 + 2 + 4;  // Q, dO and the sums of dQ

  auto q_map = [&](const char* name, const void* data, const Strides& strides) {
    return make_tensor_map(name, data, p.dtype, p.batch, p.seqlen_q, p.heads, p.head_dim, strides, Config::kBlockQ);
  };
  auto k_map = [&](const char* name, const void* data, const Strides& strides) {
    return make_tensor_map(name, data, p.dtype, p.batch, p.seqlen_k, p.kv_heads, p.head_dim, strides, 64);
  };
  BackwardArguments args;
  args.q = q_map("q", p.q, p.q_strides);
  args.dout = q_map("dout", p.dout, p.dout_strides);
  args.k = k_map("k", p.k, p.k_strides);
  args.v = k_map("v", p.v, p.v_strides);
  args.need_dk = p.dk != nullptr;
  args.need_dv = p.dv != nullptr;
  if (args.need_dk) args.dk = k_map("dk", p.dk, p.dk_strides);
  if (args.need_dv) args.dv = k_map("dv", p.dv, p.dv_strides);
  args.stats = workspace.stats(p);
  args.dq = workspace.sums(p);
  args.q_blocks = static_cast<int>(workspace.q_blocks);
  args.heads = static_cast<int>(p.heads);
  args.heads_per_kv_head = static_cast<int>(p.heads / p.kv_heads);
  const int64_t group_bytes = p.seqlen_q * args.heads_per_kv_head * p.head_dim * kRowBytesPerColumn;
  args.schedule = TileSchedule::make(static_cast<int>(kv_blocks), static_cast<int>(p.kv_heads),
                                     static_cast<int>(p.batch), p.causal, group_bytes, 1, kL2Bytes);
  args.sequence = {static_cast<int>(p.seqlen_q), static_cast<int>(p.seqlen_k), p.causal};
  args.scale = p.softmax_scale;
  args.scale_log2 = p.softmax_scale * kLog2E;
  return args;
}

template <class Config, Gradients kGradients>
void launch_products(const BackwardArguments& args, cudaStream_t stream) {
  constexpr int kBytes = sizeof(BackwardSmem<Config>);
  allow_shared_memory<backward_kernel<Config, kGradients>, kBytes>(current_device());
  backward_kernel<Config, kGradients><<<args.schedule.tiles(), Config::kThreads, kBytes, stream>>>(args);
  check_cuda(cudaGetLastError(), "launching the backward kernel");
}

template <class Config>
void launch(const BackwardParams& p, cudaStream_t stream) {
  const bool want_dq = p.dq != nullptr, want_dkv = p.dk != nullptr || p.dv != nullptr;
  if (!want_dq && !want_dkv) return;

  const Workspace<Config> workspace(p);
  const int64_t kv_blocks = (p.seqlen_k + Config::kBlockKv - 1) / Config::kBlockKv;
  check_counts({p.seqlen_q, p.seqlen_k, workspace.all_blocks, kv_blocks * p.batch * p.kv_heads});
  const RowArguments row_args = row_arguments<Config>(p, workspace);
  const int q_grid = static_cast<int>(workspace.all_blocks);

  // Before the tensor maps are encoded: the driver asks for a current context there, and a thread whose first call to
  // CUDA this is, such as autograd's, has one only after a call of the runtime.
  prepare_kernel<Config><<<q_grid, kRowThreads, 0, stream>>>(row_args);
  check_cuda(cudaGetLastError(), "launching the kernel before the backward's");
  const BackwardArguments args = backward_arguments<Config>(p, workspace, kv_blocks);
  if (want_dq && want_dkv) {
    launch_products<Config, Gradients::kAll>(args, stream);
  } else if (want_dq) {
    launch_products<Config, Gradients::kDq>(args, stream);
  } else {
    launch_products<Config, Gradients::kDkv>(args, stream);
  }
  if (want_dq) {
    convert_kernel<Config><<<q_grid, kRowThreads, 0, stream>>>(row_args);
    check_cuda(cudaGetLastError(), "launching the kernel after the backward's");
  }
}

// Calls f with the config of the head dim and the dtype.
template <class F>
void with_config(const BackwardParams& params, F&& f) {
  const bool found = with_limits(params.head_dim, [&]<std::size_t row>() {
    if constexpr (kLimits[row].backward.built()) {
      if (params.dtype == DType::kFloat16) {
        f.template operator()<BackwardConfig<row, __half>>();
      } else {
        f.template operator()<BackwardConfig<row, __nv_bfloat16>>();
      }
    }
  });
  if (!found) throw std::runtime_error("no backward kernel for head_dim " + std::to_string(params.head_dim));
}

}  // namespace

void launch_backward(const BackwardParams& params, cudaStream_t stream) {
  with_config(params, [&]<class Config>() { launch<Config>(params, stream); });
}

int64_t backward_workspace_bytes(const BackwardParams& params) {
  int64_t bytes = 0;
  with_config(params, [&]<class Config>() { bytes = Workspace<Config>(params).bytes(); });
  return bytes;
}

}  // namespace flash_attn_ext
