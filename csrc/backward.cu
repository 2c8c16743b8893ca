// Attention backward for Hopper: dQ, dK and dV of O = softmax(scale * Q K^T) V, from dO, O and the log-sum-exp.
//
// With P = exp(scale * Q K^T - lse), dP = dO V^T and delta = rowsum(dO * O), FlashAttention-2's five products are
//   S = Q K^T,  dP = dO V^T,  dV = P^T dO,  dS = P * (dP - delta),  dQ = scale * dS K,  dK = scale * dS^T Q.
// Three kernels run one after the other:
//   prepare   (backward_rows.cu) delta and lse of every row, and zeros where dQ will be summed
//   backward  a thread block keeps 128 keys and walks the query blocks that see them; each of its two consumer
//             warpgroups owns 64 of the keys. S and dP are computed transposed (keys x queries), so that P^T and dS^T
//             are in registers already as the left operands of dV and dK. dQ needs the dS of both consumers: that goes
//             through shared memory, and dQ is added to float32 sums in global memory, where all blocks of a head meet.
//   convert   (backward_rows.cu) float32 sums, scaled, as 16-bit gradients
// With grouped queries a block walks query heads of its KV head one after the other, and sums dK and dV in its
// registers. Where a block has all of these heads it writes dK and dV; where several blocks share them (KeySchedule
// says when), `convert` adds what each has summed. Either way the order of additions is fixed: dK and dV are the same
// in every run. docs/backward.md has the order of work, the barriers, the layout of shared memory and the cycle budget.

#include <cuda/ptx>

#include "backward.cuh"
#include "ptx/reduce.cuh"
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
#include "tile/smem.cuh"

namespace flash_attn_ext {
namespace {

// Which gradients a kernel computes, as a switch of its code: what is not needed takes no product, no registers and
// no barrier. dK and dV share all but their last products, so they come together.
enum class Gradients { kAll, kDq, kDkv };

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
  RowStats<Config::kBlockQ> stats[Config::kStages];

  QRing q_ring;     // Q and stats, and with the first of them K
  QRing dout_ring;  // dO, and with the first of them V
};

// Named barriers; 0 is __syncthreads.
constexpr int kDsBarrier = 1;     // both consumers: dS is written
constexpr int kStoreBarrier = 2;  // + consumer: dK and dV are in shared memory

template <class Config>
struct BackwardArguments {
  CUtensorMap q, k, v, dout, dk, dv;
  const RowStats<Config::kBlockQ>* stats;
  SumPatch* dq_sums;
  KvSums coarse_sums, fine_sums;
  KeySchedule schedule;
  Sequences sequences;
  int heads;
  float scale, scale_log2;
  bool needs_dk, needs_dv;
};

// One thread block's work: a KV block, and for some query heads of its KV head the Q blocks that see it.
template <class Config>
struct Item : KeyItem {
  int first_key;
  // The Q blocks that see some of the keys; from `full_block` on they see all of them.
  Range q_blocks;
  int full_block;

  __device__ __forceinline__ Item(const BackwardArguments<Config>& args, int index)
      : KeyItem(args.schedule.item(index)) {
    first_key = block * Config::kBlockKv;
    // The same for both consumers, so that they meet at a barrier from the same place in the code. What rows past the
    // end would add is 0 by their lse, so that the last block needs no mask for them.
    q_blocks = keys(args).blocks(first_key, Config::kBlockKv, Config::kBlockQ);
    full_block = keys(args).full_blocks(first_key, Config::kBlockKv, Config::kBlockQ).begin;
  }

  // The sequence from the keys' side: keys are its rows, and query rows are what they see.
  __device__ __forceinline__ Sequence keys(const BackwardArguments<Config>& args) const {
    return args.sequences.at(sequence).transposed();
  }

  // The number of a head's first Q block in the workspace.
  __device__ __forceinline__ int64_t first_q_block(const BackwardArguments<Config>& args, int head) const {
    return args.sequences.first_block(sequence, head, args.heads, Config::kBlockQ);
  }

  // Where the item's sums of dK or dV begin, in its copy of the KV block.
  __device__ __forceinline__ SumPatch* own_patches(const Sums& sums, const BackwardArguments<Config>& args) const {
    const int kv_heads = quotient(args.heads, args.schedule.group);
    const int first_block = args.sequences.transposed().first_block(sequence, kv_head, kv_heads, Config::kBlockKv);
    const int64_t number = int64_t{copy} * sums.blocks + first_block + block - sums.first_block;
    return sums.patches + number * Workspace<Config>::kKvPatches;
  }
};

// --------------------------------------------------------------------------------------------------------- producer

template <class Config>
__device__ __forceinline__ void load(const BackwardArguments<Config>& args, BackwardSmem<Config>& smem,
                                     const Item<Config>& item) {
  using Smem = BackwardSmem<Config>;
  using Stats = RowStats<Config::kBlockQ>;
  const Place place = args.sequences.place(item.sequence);
  auto load_keys = [&](typename Smem::KvTile(&to)[Config::kConsumers], const CUtensorMap& from, uint64_t* full) {
    for (int i = 0; i < Config::kConsumers; ++i) {
      load_tile(to[i], from, place.key + item.first_key + 64 * i, item.kv_head, place.batch, full);
    }
  };

  uint32_t key_bytes = sizeof smem.k;  // of K, which comes with the first Q, and of V, which comes with the first dO
  RingPosition<Config::kStages> at;
  for (int head = item.first_head; head < item.end_head; ++head) {
    const Stats* stats = args.stats + item.first_q_block(args, head);
    int block = item.direction > 0 ? item.q_blocks.begin : item.q_blocks.end - 1;
    for (int i = item.q_blocks.begin; i < item.q_blocks.end; ++i, block += item.direction) {
      const int row = place.row + block * Config::kBlockQ;
      uint64_t* full = smem.q_ring.begin_fill(at, Smem::QTile::kBytes + sizeof(Stats) + key_bytes);
      if (key_bytes > 0) load_keys(smem.k, args.k, full);
      load_tile(smem.q[at.stage], args.q, row, head, place.batch, full);
      cuda::ptx::cp_async_bulk(cuda::ptx::space_cluster, cuda::ptx::space_global, &smem.stats[at.stage], stats + block,
                               sizeof(Stats), full);
      full = smem.dout_ring.begin_fill(at, Smem::QTile::kBytes + key_bytes);
      if (key_bytes > 0) load_keys(smem.v, args.v, full);
      load_tile(smem.dout[at.stage], args.dout, row, head, place.batch, full);
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
  static constexpr bool kNeedsDq = kGradients != Gradients::kDkv, kNeedsDkv = kGradients != Gradients::kDq;

  const BackwardArguments<Config>& args;
  Smem& smem;
  const int index;
  // Operands that sum over the head dim, for S and dP; over queries, for dK and dV; over keys, for dQ.
  const KMajor<KvTile> k, v;
  const KMajor<QTile> q, dout;
  const MnMajor<QTile> q_rows, dout_rows;
  const MnMajor<DsTile> ds_rows;
  const MnMajor<KvTile> k_rows;
  RingPosition<Config::kStages> at;  // in both rings
  int ds_stage = 0;
  int first_seeing[2];  // the first query that sees the thread's two keys

  float dk[kHeadDim / 2], dv[kHeadDim / 2];

  __device__ __forceinline__ Consumer(const BackwardArguments<Config>& args, Smem& smem, int index)
      : args(args),
        smem(smem),
        index(index),
        k(smem.k[index]),
        v(smem.v[index]),
        q(smem.q[0]),
        dout(smem.dout[0]),
        q_rows(smem.q[0]),
        dout_rows(smem.dout[0]),
        // My part of dQ is a half of the rows, a slab of dS^T, or a half of the columns, a slab of K.
        ds_rows(smem.ds[0], Config::kDqByRows ? index : 0),
        k_rows(smem.k[0], Config::kDqByRows ? 0 : index) {}

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
#pragma unroll
    for (int j = 0; j < kBlockQ / 16; ++j) store_columns(smem.ds[ds_stage], 64 * index, j, ds[j]);
  }

  // Adds my part of dQ to the sums in global memory.
  __device__ __forceinline__ void add_dq(const float (&dq)[32], SumPatch* sums) {
#pragma unroll
    for (int i = 0; i < SumPatch::kQuads; ++i) {
      ptx::red_add_v4(reinterpret_cast<float*>(&sums[index].quad[i][threadIdx.x % 128]), dq[4 * i], dq[4 * i + 1],
                      dq[4 * i + 2], dq[4 * i + 3]);
    }
  }

  // Writes my 64 rows of dK or dV to sums in global memory.
  __device__ __forceinline__ void write_sums(const float (&rows)[kHeadDim / 2], SumPatch* sums) {
    sums += index * (kHeadDim / 64);
#pragma unroll
    for (int i = 0; i < kHeadDim / 8; ++i) {
      sums[i / SumPatch::kQuads].quad[i % SumPatch::kQuads][threadIdx.x % 128] =
          make_float4(rows[4 * i], rows[4 * i + 1], rows[4 * i + 2], rows[4 * i + 3]);
    }
  }

  // P and dS of one Q block. P is computed under dP's product.
  template <bool kMasked>
  __device__ __forceinline__ void compute_p_ds(uint32_t (&p)[kBlockQ / 16][4], uint32_t (&ds)[kBlockQ / 16][4],
                                               int first_row) {
    float scores[kBlockQ / 2], dp[kBlockQ / 2];
    float2 lse_log2[kBlockQ / 8], delta[kBlockQ / 8];
    smem.q_ring.wait_full(at);
    product_ss(scores, k, q.at(at.stage));
    smem.dout_ring.wait_full(at);
    product_ss(dp, v, dout.at(at.stage));
    load_queries(lse_log2, smem.stats[at.stage].lse_log2);
    ptx::wgmma_wait_group<1>(scores);
    if constexpr (kMasked) {
      const int from_block[2] = {first_seeing[0] - first_row, first_seeing[1] - first_row};
      mask_before(scores, from_block);
    }
    exponentiate(scores, lse_log2);
    to_operand<T>(p, scores);
    if constexpr (kNeedsDq) load_queries(delta, smem.stats[at.stage].delta);  // hidden behind dP's product
    ptx::wgmma_wait_group<0>(dp);
    if constexpr (!kNeedsDq) load_queries(delta, smem.stats[at.stage].delta);  // earlier, and ptxas spills
    make_ds(ds, scores, dp, delta);
  }

  // One Q block. dS has two buffers: before a consumer writes one again it passes the barrier of the step between, at
  // which the other consumer arrives when its dQ of the step before that is done.
  template <bool kMasked>
  __device__ __forceinline__ void step(int first_row, SumPatch* sums) {
    uint32_t p[kBlockQ / 16][4], ds[kBlockQ / 16][4];
    float dq[32];
    compute_p_ds<kMasked>(p, ds, first_row);
    if constexpr (kNeedsDq) share_ds(ds);
    if constexpr (kNeedsDkv) product_rs(dv, p, dout_rows.at(at.stage));
    if constexpr (kNeedsDq) {
      cuda::ptx::fence_proxy_async(cuda::ptx::space_shared);
      ptx::bar_sync(kDsBarrier, 128 * Config::kConsumers);
      product_ss(dq, ds_rows.at(ds_stage), k_rows);  // over the keys of both consumers
    }
    if constexpr (kNeedsDkv) ptx::wgmma_wait_group<kNeedsDq>(dv);
    smem.dout_ring.release(at);
    if constexpr (kNeedsDkv) product_rs(dk, ds, q_rows.at(at.stage));
    if constexpr (kNeedsDq) {
      ptx::wgmma_wait_group<kNeedsDkv>(dq);
      ds_stage ^= 1;
      add_dq(dq, sums);
    }
    if constexpr (kNeedsDkv) ptx::wgmma_wait_group<0>(dk);
    smem.q_ring.release(at);
    at.next();
  }

  // dK and dV leave through the shared memory of K and V by TMA, which clips the keys past the end.
  __device__ __forceinline__ void store(const Item<Config>& item) {
    ptx::bar_sync(kDsBarrier, 128 * Config::kConsumers);  // nobody reads K for dQ any more
    const float dk_scale[2] = {args.scale, args.scale}, dv_scale[2] = {1.f, 1.f};
    store_fragment<T, kHeadDim>(smem.v[index], dv, dv_scale);
    store_fragment<T, kHeadDim>(smem.k[index], dk, dk_scale);
    cuda::ptx::fence_proxy_async(cuda::ptx::space_shared);
    ptx::bar_sync(kStoreBarrier + index, 128);
    if (threadIdx.x % 128 == 0) {
      const Place place = args.sequences.place(item.sequence);
      const int row = place.key + item.first_key + 64 * index;
      if (args.needs_dv) store_tile(args.dv, smem.v[index], row, item.kv_head, place.batch);
      if (args.needs_dk) store_tile(args.dk, smem.k[index], row, item.kv_head, place.batch);
      cuda::ptx::cp_async_bulk_commit_group();
      cuda::ptx::cp_async_bulk_wait_group_read(cuda::ptx::n32_t<0>{});
    }
  }

  // Where other items share the KV head, dK and dV go to this item's copy of the float32 sums.
  __device__ __forceinline__ void store_share(const Item<Config>& item) {
    const KvSums& sums = item.coarse ? args.coarse_sums : args.fine_sums;
    if (args.needs_dv) write_sums(dv, item.own_patches(sums.dv, args));
    if (args.needs_dk) write_sums(dk, item.own_patches(sums.dk, args));
  }

  __device__ __forceinline__ void run(const Item<Config>& item) {
    const Sequence keys = item.keys(args);
    const int own_key = item.first_key + 64 * index + own_row();
#pragma unroll
    for (int r = 0; r < 2; ++r) first_seeing[r] = keys.first_key(own_key + 8 * r);
#pragma unroll
    for (int i = 0; i < kHeadDim / 2; ++i) dk[i] = dv[i] = 0.f;

    for (int head = item.first_head; head < item.end_head; ++head) {
      SumPatch* sums = args.dq_sums + item.first_q_block(args, head) * Workspace<Config>::kQPatches;
      int block = item.direction > 0 ? item.q_blocks.begin : item.q_blocks.end - 1;
      for (int i = item.q_blocks.begin; i < item.q_blocks.end; ++i, block += item.direction) {
        SumPatch* block_sums = sums + block * Workspace<Config>::kQPatches;
        if (block < item.full_block) [[unlikely]] {
          step<true>(block * kBlockQ, block_sums);
        } else {
          step<false>(block * kBlockQ, block_sums);
        }
      }
    }
    if constexpr (kNeedsDkv) {
      if (item.coarse && args.schedule.copies == 1) {
        store(item);
      } else {
        store_share(item);
      }
    }
  }
};

// ----------------------------------------------------------------------------------------------------------- kernel

template <class Config, Gradients kGradients>
__global__ void __launch_bounds__(Config::kThreads, 1)
    backward_kernel(const __grid_constant__ BackwardArguments<Config> args) {
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

  const Item<Config> item(args, blockIdx.x);
  if (warpgroup == 0) {
    ptx::setmaxnreg_dec<Config::kProducerRegisters>();
    if (threadIdx.x == 0) load(args, smem, item);
  } else {
    ptx::setmaxnreg_inc<Config::kConsumerRegisters>();
    Consumer<Config, kGradients>(args, smem, warpgroup - 1).run(item);
  }
}

// ----------------------------------------------------------------------------------------------------------- launch

template <class Config>
BackwardArguments<Config> make_arguments(const BackwardParams& params) {
  using Smem = BackwardSmem<Config>;
  const Problem& problem = params.problem;
  const Shape q_shape = problem.q_shape(), k_shape = problem.k_shape();
  const Workspace<Config> workspace(params);

  BackwardArguments<Config> args;
  args.q = make_tensor_map<typename Smem::QTile>("q", params.q, q_shape);
  args.dout = make_tensor_map<typename Smem::QTile>("dout", params.dout, q_shape);
  args.k = make_tensor_map<typename Smem::KvTile>("k", params.k, k_shape);
  args.v = make_tensor_map<typename Smem::KvTile>("v", params.v, k_shape);
  args.needs_dk = params.dk.data != nullptr;
  args.needs_dv = params.dv.data != nullptr;
  if (args.needs_dk) args.dk = make_tensor_map<typename Smem::KvTile>("dk", params.dk, k_shape);
  if (args.needs_dv) args.dv = make_tensor_map<typename Smem::KvTile>("dv", params.dv, k_shape);
  args.stats = workspace.stats;
  args.dq_sums = workspace.dq.patches;
  args.coarse_sums = workspace.coarse;
  args.fine_sums = workspace.fine;
  args.schedule = workspace.schedule;
  args.sequences = workspace.sequences;
  args.heads = static_cast<int>(problem.heads);
  args.scale = problem.softmax_scale();
  args.scale_log2 = problem.softmax_scale() * kLog2E;
  return args;
}

template <class Config, Gradients kGradients>
void launch_products(const BackwardArguments<Config>& args, cudaStream_t stream) {
  constexpr int kBytes = sizeof(BackwardSmem<Config>);
  allow_shared_memory<backward_kernel<Config, kGradients>, kBytes>(current_device());
  backward_kernel<Config, kGradients><<<args.schedule.items(), Config::kThreads, kBytes, stream>>>(args);
  check_cuda(cudaGetLastError(), "launching the backward kernel");
}

template <class Config>
void launch(const BackwardParams& params, cudaStream_t stream) {
  const bool needs_dq = params.dq.data != nullptr, needs_dkv = params.dk.data != nullptr || params.dv.data != nullptr;
  if (!needs_dq && !needs_dkv) return;

  // Before the tensor maps are encoded: the driver asks for a current context there, and a thread whose first call to
  // CUDA this is, such as autograd's, has one only after a call of the runtime.
  launch_prepare(params, stream);
  const BackwardArguments<Config> args = make_arguments<Config>(params);
  if (needs_dq && needs_dkv) {
    launch_products<Config, Gradients::kAll>(args, stream);
  } else if (needs_dq) {
    launch_products<Config, Gradients::kDq>(args, stream);
  } else {
    launch_products<Config, Gradients::kDkv>(args, stream);
  }
  launch_convert(params, stream);
}

}  // namespace

void launch_backward(const BackwardParams& params, cudaStream_t stream) {
  with_backward_config(params.problem, [&]<class Config>() { launch<Config>(params, stream); });
}

int64_t backward_workspace_bytes(const BackwardParams& params) {
  int64_t bytes = 0;
  with_backward_config(params.problem, [&]<class Config>() { bytes = Workspace<Config>(params).bytes; });
  return bytes;
}

int backward_shared_memory(int head_dim) {
  int bytes = 0;
  with_limits(head_dim, [&]<std::size_t row>() {
    if constexpr (kLimits[row].backward.built()) bytes = sizeof(BackwardSmem<BackwardConfig<row, __half>>);
  });
  return bytes;
}

}  // namespace flash_attn_ext
