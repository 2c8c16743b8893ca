// Attention backward for Hopper: dQ, dK and dV of O = softmax(scale * Q K^T) V, from dO, O and the log-sum-exp.
//
// With P = exp(scale * Q K^T - lse), dP = dO V^T and delta = rowsum(dO * O), FlashAttention-2's five products are
//   S = Q K^T,  dP = dO V^T,  dV = P^T dO,  dS = P * (dP - delta),  dQ = scale * dS K,  dK = scale * dS^T Q.
// With a softcap, in kernels of its own, P = exp(softcap * t - lse) and dS = P * (1 - t^2) * (dP - delta), where
// t = tanh(scale * S / softcap).
// Three kernels run one after the other, overlapped at their edges, and a small fourth one where sinks have a gradient:
//   prepare   (backward_rows.cu) delta and lse of every row, and zeros where dQ will be summed
//   backward  thread blocks take item after item. An item has 128 keys, and walks the query blocks that see them. Each
//             of two consumer warpgroups owns 64 of the keys. S and dP are computed transposed (keys x queries), so
//             that P^T and dS^T are in registers already as the left operands of dV and dK. dQ needs the dS of both
//             consumers: that goes through shared memory to a warpgroup of its own, which adds dQ to float32 sums in
//             global memory, where all items of a head meet.
//   convert   (backward_rows.cu) float32 sums, scaled, as 16-bit gradients
// With grouped queries an item walks query heads of its KV head one after the other, and sums dK and dV in registers.
// Where an item has all of these heads it writes dK and dV; where several items share them (KeySchedule says when),
// `convert` adds what each has summed. Either way the order of additions is fixed: dK and dV are the same in every run.
// docs/backward.md has the order of work, the barriers, the layout of shared memory and the cycle budget.

#include <algorithm>
#include <cuda/ptx>
#include <type_traits>

#include "backward_products.cuh"
#include "backward_turns.cuh"
#include "ptx/reduce.cuh"
#include "ptx/tma.cuh"
#include "ptx/warpgroup.cuh"
#include "ptx/wgmma.cuh"
#include "tile/copy.cuh"
#include "tile/fragment.cuh"
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

// One step of the walk, as the producer tells all others: a Q block of one of the item's query heads.
struct alignas(16) Step {
  // kSeen, kWhole: a bit for each consumer, whose keys some of the queries see, or all of them see whole; kFirst,
  // kLast: of the item; kEnd: there is no item any more.
  enum Flags : uint32_t { kSeen = 1, kWhole = 4, kFirst = 16, kLast = 32, kEnd = 64 };

  uint32_t flags;
  int first_row;  // in its sequence
  int q_block;    // in the workspace

  static __device__ __forceinline__ bool is_seen(uint32_t flags, int consumer) { return flags >> consumer & kSeen; }
  static __device__ __forceinline__ bool is_shared(uint32_t flags) { return (flags & 3 * kSeen) == 3 * kSeen; }
};

template <class Config>
struct BackwardSmem {
  using T = typename Config::T;
  using KvTile = SmemTile<T, 64, Config::kHeadDim>;  // the keys of one consumer
  using QTile = SmemTile<T, Config::kBlockQ, Config::kHeadDim>;
  using DsTile = SmemTile<T, 64, Config::kBlockQ>;  // of one consumer, transposed: a row is a key
  using QRing = Ring<Config::kStages>;
  static constexpr int kDsStages = Config::kDsStages;

  KvTile k[Config::kConsumers];
  KvTile v[Config::kConsumers];
  QTile q[Config::kStages];
  QTile dout[Config::kStages];
  DsTile ds[kDsStages][Config::kConsumers];
  // dK and dV on their way out, while the next item begins. Where shared memory has no room for both, dV leaves through
  // V's place.
  KvTile out_dk[Config::kConsumers];
  static constexpr bool kOwnOutDv = 4 * sizeof(k) + 2 * sizeof(q) + sizeof(ds) + 4096 < kSharedMemoryBytes;
  static_assert(kOwnOutDv || !Config::kVInRegisters, "V is handed back before there is a dV");
  struct None {};
  struct OutBuffer {
    KvTile dv[Config::kConsumers];
  };
  [[no_unique_address]] std::conditional_t<kOwnOutDv, OutBuffer, None> out_buffer;
  RowStats<Config::kBlockQ> stats[Config::kStages];
  Step steps[Config::kStages];
  // For dQ, which is behind the consumers: a step is not written anew before dQ has read it.
  static constexpr int kDqSteps = 8;
  static_assert(kDqSteps > Config::kStages + kDsStages);
  Step dq_steps[kDqSteps];
  // The item at hand, those before and behind it, and one more so that numbers are taken modulo 4.
  static constexpr int kItems = 4;
  Item items[kItems];
  TurnRing turns;

  QRing q_ring;  // Q, stats and step
  QRing dout_ring;
  Ring<1> k_ring, v_ring;                           // of the item
  uint64_t item_found;                              // scheduler -> loader
  uint64_t next_item;                               // loader -> scheduler: the item comes to its end
  uint64_t ds_full[kDsStages][Config::kConsumers];  // a consumer -> dQ
  uint64_t ds_empty[kDsStages];                     // dQ -> consumers

  __device__ KvTile& out_dv(int consumer) {
    if constexpr (kOwnOutDv) {
      return out_buffer.dv[consumer];
    } else {
      return v[consumer];
    }
  }
};

// Named barriers; 0 is __syncthreads.
constexpr int kIssueTurnBarrier = 1;  // + consumer: the other one has issued its products
constexpr int kStoreBarrier = 3;      // + consumer: my four warps agree on the state of my dK and dV in shared memory

// --------------------------------------------------------------------------------------------------------- producer

// The scheduler, one warp. The first item is the thread block's own number, the others are claimed: each when the one
// before comes to its end, as late as the latency of claiming and finding stays hidden. Where items wait for each other
// all are claimed, so that none is left to a thread block that has not begun.
template <class Config>
__device__ __forceinline__ void find_items(const BackwardArguments<Config>& args, BackwardSmem<Config>& smem) {
  using Smem = BackwardSmem<Config>;
  int number = args.turns == nullptr ? static_cast<int>(blockIdx.x) : claim_item(args);
  for (int count = 0;; ++count) {
    Item& item = smem.items[count % Smem::kItems];
    while (number < args.schedule.items() && !find_item<Config>(args, number, item)) number = claim_item(args);
    const bool found = number < args.schedule.items();
    if (!found) item.first_head = Item::kNone;
    __syncwarp();
    if (threadIdx.x % 32 == 0) cuda::ptx::mbarrier_arrive(&smem.item_found);
    if (!found) break;
    wait_phase(&smem.next_item, count % 2);
    number = claim_item(args);
  }
}

// The loader, one warp. Each of its first four lanes works out one of the flags of a step that depend on what a
// consumer sees.
template <class Config>
__device__ __forceinline__ void load(const BackwardArguments<Config>& args, BackwardSmem<Config>& smem) {
  using Smem = BackwardSmem<Config>;
  using Stats = RowStats<Config::kBlockQ>;
  constexpr int kBlockQ = Config::kBlockQ;
  const int lane = threadIdx.x % 32;
  const bool leads = lane == 0;

  unsigned step_count = 0;
  RingPosition<Config::kStages> at;
  for (int count = 0;; ++count) {
    wait_phase(&smem.item_found, count % 2);
    const Item& item = smem.items[count % Smem::kItems];
    if (item.first_head == Item::kNone) break;
    const RingPosition<1> item_at = {0, count % 2u};
    const auto load_keys = [&](typename Smem::KvTile(&to)[Config::kConsumers], Ring<1>& ring, const CUtensorMap& from) {
      ring.wait_empty(item_at);
      if (!leads) return;
      uint64_t* full = ring.begin_fill(item_at, sizeof to);
      for (int i = 0; i < Config::kConsumers; ++i) {
        load_tile(to[i], from, item.kv, item.first_key + 64 * i, item.kv_head, full);
      }
    };
    load_keys(smem.k, smem.k_ring, args.k);
    load_keys(smem.v, smem.v_ring, args.v);
    if (count == 0) cudaGridDependencySynchronize();  // `prepare` has left the first step's stats
    __syncwarp();

    const Range own = item.ranges[lane % 4];
    const int first_block = item.first_block, last_block = item.last_block, end_head = item.end_head;
    int first_q_block = item.first_q_block;
    for (int head = item.first_head; head < end_head; ++head, first_q_block += item.head_blocks) {
      for (int block = first_block;; block += first_block <= last_block ? 1 : -1) {
        uint32_t flags =
            __ballot_sync(~0u, block >= own.begin && block < own.end) & (3 * Step::kSeen | 3 * Step::kWhole);
        if (block == first_block && head == item.first_head) flags |= Step::kFirst;
        if (block == last_block && head + 1 == end_head) flags |= Step::kLast;
        if (leads && block == item.claim_block && head + 1 == end_head) cuda::ptx::mbarrier_arrive(&smem.next_item);
        smem.q_ring.wait_empty(at);
        if (leads) {
          const Step step = {flags, block * kBlockQ, first_q_block + block};
          smem.steps[at.stage] = step;
          smem.dq_steps[step_count % Smem::kDqSteps] = step;
          uint64_t* full = smem.q_ring.begin_fill(at, Smem::QTile::kBytes + sizeof(Stats));
          load_tile(smem.q[at.stage], args.q, item.q, block * kBlockQ, head, full);
          cuda::ptx::cp_async_bulk(cuda::ptx::space_cluster, cuda::ptx::space_global, &smem.stats[at.stage],
                                   args.stats + first_q_block + block, sizeof(Stats), full);
          full = smem.dout_ring.begin_fill(at, Smem::QTile::kBytes);
          load_tile(smem.dout[at.stage], args.dout, item.q, block * kBlockQ, head, full);
        }
        if (args.turns != nullptr) {
          const auto turn_at = TurnRing::Position::of(step_count);
          if (leads) smem.turns.put(turn_at, first_q_block + block, block, count % Smem::kItems);
        }
        __syncwarp();
        at.next();
        ++step_count;
        if (block == last_block) break;
      }
    }
  }
  smem.q_ring.wait_empty(at);
  if (leads) {
    smem.steps[at.stage] = smem.dq_steps[step_count % Smem::kDqSteps] = {.flags = Step::kEnd};
    smem.q_ring.end_fill(at);
    if (args.turns != nullptr) smem.turns.put_end(TurnRing::Position::of(step_count));
  }
}

// --------------------------------------------------------------------------------------------------------- consumer

// A consumer warpgroup's registers and its place in the rings. All accumulators have its 64 keys as rows.
template <class Config, Gradients kGradients>
struct Consumer {
  using T = typename Config::T;
  using Smem = BackwardSmem<Config>;
  using KvTile = typename Smem::KvTile;
  using QTile = typename Smem::QTile;
  static constexpr int kHeadDim = Config::kHeadDim, kBlockQ = Config::kBlockQ;
  static constexpr bool kNeedsDq = kGradients != Gradients::kDkv, kNeedsDkv = kGradients != Gradients::kDq;
  static constexpr bool kKvInRegisters = Config::kKvInRegisters, kVInRegisters = Config::kVInRegisters;
  static constexpr bool kSoftcap = Config::kSoftcap;
  static constexpr bool kTwoAhead = kKvInRegisters && !kSoftcap;  // elsewhere it needs more registers than there are

  const BackwardArguments<Config>& args;
  Smem& smem;
  const int index;
  // Operands that sum over the head dim, for S and dP; over queries, for dK and dV.
  const KMajor<KvTile> k, v;
  const KMajor<QTile> q, dout;
  const MnMajor<QTile> q_rows, dout_rows;
  RingPosition<Config::kStages> at;  // in both rings: the step at hand
  RingPosition<Config::kDsStages> ds_at;
  uint32_t flags;  // of the step at hand
  const int thread = ptx::thread_in_register();
  // Of the flags. With softcap there is no register to keep it in.
  const uint32_t seen_bit = kSoftcap ? Step::kSeen << index : ptx::in_register(Step::kSeen << index);
  const uint32_t whole_bit = 4 * seen_bit;
  int item_count = 0;
  // The queries on the diagonal beside the thread's two keys; for keys past the end, beyond all that see anything.
  int diagonal[2];

  float dk[kHeadDim / 2], dv[kHeadDim / 2];
  uint32_t k_operand[kKvInRegisters ? kHeadDim / 16 : 1][4], v_operand[kVInRegisters ? kHeadDim / 16 : 1][4];

  __device__ __forceinline__ Consumer(const BackwardArguments<Config>& args, Smem& smem, int index)
      : args(args),
        smem(smem),
        index(index),
        k(smem.k[index]),
        v(smem.v[index]),
        q(smem.q[0]),
        dout(smem.dout[0]),
        q_rows(smem.q[0]),
        dout_rows(smem.dout[0]) {}

  // Consumers take turns at issuing products, so that one multiplies while the other works on P and dS. Steps in which
  // one sees nothing have no turns.
  __device__ __forceinline__ void await_issue_turn(bool shared) {
    if (shared) ptx::bar_sync(kIssueTurnBarrier + index, 256);
  }
  __device__ __forceinline__ void pass_issue_turn(bool shared) {
    if (shared) ptx::bar_arrive(kIssueTurnBarrier + 1 - index, 256);
  }

  // ---- the walk

  __device__ __forceinline__ void read_step() {
    smem.q_ring.wait_full(at);
    flags = __shfl_sync(~0u, smem.steps[at.stage].flags, 0);  // uniform, as the compiler sees
  }

  __device__ __forceinline__ void hand_over_ds() {
    __syncwarp();
    if (threadIdx.x % 32 == 0) cuda::ptx::mbarrier_arrive(&smem.ds_full[ds_at.stage][index]);
    ds_at.next();
  }
  __device__ __forceinline__ void wait_for_ds_stage() { wait_phase(&smem.ds_empty[ds_at.stage], ds_at.phase ^ 1); }

  // Passes over the item's steps whose queries see none of my keys. Returns whether there is another one.
  __device__ __forceinline__ bool find_seen_step() {
    while (!(flags & seen_bit)) {
      if constexpr (kNeedsDq) {
        wait_for_ds_stage();
        hand_over_ds();
      }
      smem.dout_ring.wait_full(at);
      smem.dout_ring.release(at);
      smem.q_ring.release(at);
      at.next();
      if (flags & Step::kLast) return false;
      read_step();
    }
    return true;
  }

  // The flags of the item's next step, once its Q has arrived.
  __device__ __forceinline__ uint32_t next_flags() {
    if (flags & Step::kLast) return 0;
    RingPosition<Config::kStages> next = at;
    next.next();
    smem.q_ring.wait_full(next);
    return __shfl_sync(~0u, smem.steps[next.stage].flags, 0);
  }

  __device__ __forceinline__ bool next_step(uint32_t next_flags) {
    at.next();
    if (flags & Step::kLast) return false;
    flags = next_flags;
    return find_seen_step();
  }

  // ---- P and dS

  // Scores of queries that do not see the thread's keys become -inf.
  __device__ __forceinline__ void mask(float (&scores)[kBlockQ / 2]) {
    if (!(flags & whole_bit)) [[unlikely]] {
      mask_queries(scores, diagonal, args.reach, smem.steps[at.stage].first_row,
                   smem.items[item_count % Smem::kItems].rows);
    }
  }

  // dS = P * (dP - delta), rounded, as an operand and in shared memory, where dQ's product reads it.
  template <class P>
  __device__ __forceinline__ void make_ds(uint32_t (&ds)[kBlockQ / 16][4], const P& p, const float (&dp)[kBlockQ / 2],
                                          const float2 (&deltas)[kBlockQ / 8]) {
    subtract_delta<T>(ds, p, dp, deltas);
    if constexpr (kNeedsDq) {
      const uint32_t address = own_columns_address(smem.ds[ds_at.stage][index]);
#pragma unroll
      for (int j = 0; j < kBlockQ / 16; ++j) store_columns<typename Smem::DsTile>(address, j, ds[j]);
    }
  }

  __device__ __forceinline__ void issue_scores(float (&scores)[kBlockQ / 2]) {
    if constexpr (kKvInRegisters) {
      product_rs(scores, k_operand, q.at(at.stage), false);
    } else {
      product_ss(scores, k, q.at(at.stage));
    }
  }
  __device__ __forceinline__ void issue_dp(float (&dp)[kBlockQ / 2]) {
    if constexpr (kVInRegisters) {
      product_rs(dp, v_operand, dout.at(at.stage), false);
    } else {
      product_ss(dp, v, dout.at(at.stage));
    }
  }

  // ---- the order of work with K and V in registers, without softcap: S and dP of a step under dV and dK of the step
  // before

  __device__ __forceinline__ void walk_two_ahead() {
    float scores[kBlockQ / 2], dp[kBlockQ / 2];
    float2 lse_log2[kBlockQ / 8], delta[kBlockQ / 8];

    load_queries(lse_log2, smem.stats[at.stage].lse_log2, thread);
    issue_scores(scores);
    smem.dout_ring.wait_full(at);
    issue_dp(dp);
    ptx::wgmma_wait_group<1>(scores);
    mask(scores);
    exponentiate(scores, args.scale_log2, lse_log2);
    if constexpr (kNeedsDq) wait_for_ds_stage();
    load_queries(delta, smem.stats[at.stage].delta, thread);
    ptx::wgmma_wait_group<0>(dp);
    for (;;) {
      uint32_t p[kBlockQ / 16][4], ds[kBlockQ / 16][4];
      to_operand<T>(p, scores);
      make_ds(ds, [&](int i) { return make_float2(scores[i], scores[i + 1]); }, dp, delta);
      if constexpr (kNeedsDkv) {
        product_rs(dv, p, dout_rows.at(at.stage), true);
        product_rs(dk, ds, q_rows.at(at.stage), true);
      }
      if constexpr (kNeedsDq) {
        cuda::ptx::fence_proxy_async(cuda::ptx::space_shared);
        hand_over_ds();
      }
      const RingPosition<Config::kStages> done = at;
      if (!next_step(next_flags())) {
        if constexpr (kNeedsDkv) ptx::wgmma_wait_group<0>(dv, dk);
        smem.dout_ring.release(done);
        smem.q_ring.release(done);
        break;
      }
      // Later, and ptxas puts it between products' instructions.
      load_queries(lse_log2, smem.stats[at.stage].lse_log2, thread);
      issue_scores(scores);
      if constexpr (kNeedsDkv) ptx::wgmma_wait_group<1>(dv, dk);
      smem.dout_ring.release(done);
      smem.q_ring.release(done);
      smem.dout_ring.wait_full(at);
      issue_dp(dp);
      ptx::wgmma_wait_group<1>(scores);
      mask(scores);
      exponentiate(scores, args.scale_log2, lse_log2);
      if constexpr (kNeedsDq) wait_for_ds_stage();
      if constexpr (kNeedsDq) load_queries(delta, smem.stats[at.stage].delta, thread);
      ptx::wgmma_wait_group<0>(dp);
      if constexpr (!kNeedsDq) load_queries(delta, smem.stats[at.stage].delta, thread);  // earlier, and ptxas spills
    }
  }

  // ---- the order of work elsewhere: S of a step beside dK of the step before, then dP beside dV

  __device__ __forceinline__ void walk_one_ahead() {
    uint32_t p[kBlockQ / 16][4], sloped_p[kBlockQ / 16][4];  // sloped_p: with softcap
    const auto make_p = [&](float (&scores)[kBlockQ / 2], const float2(&lse_log2)[kBlockQ / 8]) {
      if constexpr (kSoftcap) {
        cap(scores, args.cap_log2);
        mask(scores);
        exponentiate_capped<T>(p, sloped_p, scores, args.scale_log2, lse_log2);
      } else {
        mask(scores);
        exponentiate(scores, args.scale_log2, lse_log2);
        to_operand<T>(p, scores);
      }
    };
    {
      float scores[kBlockQ / 2];
      float2 lse_log2[kBlockQ / 8];
      issue_scores(scores);
      load_queries(lse_log2, smem.stats[at.stage].lse_log2, thread);
      ptx::wgmma_wait_group<0>(scores);
      make_p(scores, lse_log2);
    }
    for (;;) {
      uint32_t ds[kBlockQ / 16][4], next;  // next: the flags of the item's next step
      const bool shared = Step::is_shared(flags);
      {
        float dp[kBlockQ / 2];
        float2 delta[kBlockQ / 8];
        smem.dout_ring.wait_full(at);
        // Additions to dQ hold up loads from shared memory, for hundreds of cycles. So these come before the turn, and
        // dS is handed over before the next: in its turn a consumer waits for no memory.
        if constexpr (!kSoftcap) {
          if constexpr (kNeedsDq) wait_for_ds_stage();
          load_queries(delta, smem.stats[at.stage].delta, thread);
        }
        await_issue_turn(shared);
        if constexpr (kNeedsDkv) product_rs(dv, p, dout_rows.at(at.stage), true);
        issue_dp(dp);
        pass_issue_turn(shared);
        next = next_flags();
        ptx::wgmma_wait_group<0>(dp, dv);
        smem.dout_ring.release(at);
        if constexpr (kSoftcap) {  // earlier, and ptxas spills
          if constexpr (kNeedsDq) wait_for_ds_stage();
          load_queries(delta, smem.stats[at.stage].delta, thread);
        }
        const auto& of_ds = kSoftcap ? sloped_p : p;
        make_ds(ds, [&](int i) { return unpack<T>(of_ds[i / 8][i % 8 / 2]); }, dp, delta);
      }
      if constexpr (kNeedsDq) {
        cuda::ptx::fence_proxy_async(cuda::ptx::space_shared);
        hand_over_ds();
      }
      float2 lse_log2[kBlockQ / 8];  // of the next step, if there is one
      RingPosition<Config::kStages> next_at = at;
      next_at.next();
      load_queries(lse_log2, smem.stats[next_at.stage].lse_log2, thread);
      await_issue_turn(shared);
      if constexpr (kNeedsDkv) product_rs(dk, ds, q_rows.at(at.stage), true);
      const RingPosition<Config::kStages> done = at;
      if (!next_step(next)) {
        pass_issue_turn(shared);
        if constexpr (kNeedsDkv) ptx::wgmma_wait_group<0>(dk);
        smem.q_ring.release(done);
        break;
      }
      if (!(next & seen_bit)) [[unlikely]]
        load_queries(lse_log2, smem.stats[at.stage].lse_log2, thread);
      float scores[kBlockQ / 2];
      issue_scores(scores);
      pass_issue_turn(shared);
      ptx::wgmma_wait_group<0>(scores, dk);
      smem.q_ring.release(done);
      make_p(scores, lse_log2);
    }
  }

  // ---- an item

  // dK and dV leave through shared memory by TMA, which clips the keys past the end.
  __device__ __forceinline__ void store(const Item& item) {
    const bool leads = threadIdx.x % 128 == 0;
    const float dk_scale[2] = {args.scale, args.scale}, dv_scale[2] = {1.f, 1.f};
    if (leads) cuda::ptx::cp_async_bulk_wait_group_read(cuda::ptx::n32_t<0>{});  // those of the item before have left
    ptx::bar_sync(kStoreBarrier + index, 128);
    store_fragment<T, kHeadDim>(smem.out_dv(index), dv, dv_scale);
    store_fragment<T, kHeadDim>(smem.out_dk[index], dk, dk_scale);
    cuda::ptx::fence_proxy_async(cuda::ptx::space_shared);
    ptx::bar_sync(kStoreBarrier + index, 128);
    if (leads) {
      const int row = item.first_key + 64 * index;
      if (args.needs_dv) store_tile(args.dv, smem.out_dv(index), item.out, row, item.kv_head);
      cuda::ptx::cp_async_bulk_commit_group();
      if (args.needs_dk) store_tile(args.dk, smem.out_dk[index], item.out, row, item.kv_head);
      cuda::ptx::cp_async_bulk_commit_group();
      if constexpr (!Smem::kOwnOutDv) cuda::ptx::cp_async_bulk_wait_group_read(cuda::ptx::n32_t<1>{});
    }
    __syncwarp();
  }

  // Where other items share the KV head, dK and dV go to this item's copy of the float32 sums.
  __device__ __forceinline__ void store_share(const Item& item) {
    const KvSums& sums = item.coarse ? args.coarse_sums : args.fine_sums;
    const int first_patch = index * (kHeadDim / 8);
    if (args.needs_dv) write_sums<Config>(dv, sums.dv, item, first_patch);
    if (args.needs_dk) write_sums<Config>(dk, sums.dk, item, first_patch);
  }

  __device__ __forceinline__ void run_item() {
    const RingPosition<1> item_at = {0, item_count % 2u};
    smem.k_ring.wait_full(item_at);
    {
      const Item& item = smem.items[item_count % Smem::kItems];
      find_diagonal(diagonal, item, item.first_key + 64 * index);
    }
#pragma unroll
    for (int i = 0; i < kHeadDim / 2; ++i) dk[i] = dv[i] = 0.f;
    smem.v_ring.wait_full(item_at);
    if constexpr (kKvInRegisters) load_operand(k_operand, smem.k[index]);
    if constexpr (kVInRegisters) {
      load_operand(v_operand, smem.v[index]);
      __syncwarp();
      if constexpr (kKvInRegisters) smem.k_ring.release(item_at);
      smem.v_ring.release(item_at);
    }
    if (find_seen_step()) {
      if constexpr (kTwoAhead) {
        walk_two_ahead();
      } else {
        walk_one_ahead();
      }
    }
    if constexpr (!kKvInRegisters) {
      smem.k_ring.release(item_at);
      if constexpr (Smem::kOwnOutDv && !kVInRegisters) smem.v_ring.release(item_at);
    }
    if constexpr (kNeedsDkv) {
      const Item& item = smem.items[item_count % Smem::kItems];
      if (item.complete) {
        store(item);
      } else {
        store_share(item);
      }
    }
    if constexpr (!Smem::kOwnOutDv) smem.v_ring.release(item_at);
    ++item_count;
  }

  __device__ __forceinline__ void run() {
    if (!kTwoAhead && index == 1) pass_issue_turn(true);  // the first turn is consumer 0's
    for (;;) {
      read_step();
      if (flags & Step::kEnd) break;
      run_item();
    }
    if constexpr (kNeedsDq) {
      wait_for_ds_stage();
      hand_over_ds();
    }
    if (threadIdx.x % 128 == 0) cuda::ptx::cp_async_bulk_wait_group_read(cuda::ptx::n32_t<0>{});
  }
};

// --------------------------------------------------------------------------------------------------------------- dQ

// The warpgroup that owns dQ: of every step it multiplies both consumers' dS with K, and adds the product to the sums
// in global memory. With K^T in registers it is dQ^T.
template <class Config>
__device__ __forceinline__ void sum_dq(const BackwardArguments<Config>& args, BackwardSmem<Config>& smem) {
  using Smem = BackwardSmem<Config>;
  constexpr int kConsumers = Config::kConsumers;
  constexpr int kHeadDim = Config::kHeadDim, kParts = (kHeadDim + 63) / 64;
  static_assert(kParts <= 2);
  const MnMajor<typename Smem::DsTile> ds(smem.ds[0][0]);
  const bool leads = threadIdx.x % 32 == 0;
  uint32_t k_operand[kConsumers][Config::kKvInRegisters ? 4 : 1][4];

  RingPosition<Config::kDsStages> at;
  int count = 0, q_block;
  uint32_t flags;
  const bool in_turn = args.turns != nullptr;
  TurnRing::Position turn_at;
  const auto await_step = [&] {
    wait_phase(&smem.ds_full[at.stage][0], at.phase);
    const Step step = smem.dq_steps[count];
    flags = __shfl_sync(~0u, step.flags, 0);  // uniform, as the compiler sees
    q_block = __shfl_sync(~0u, step.q_block, 0);
    count = (count + 1) % Smem::kDqSteps;
  };
  for (await_step(); !(flags & Step::kEnd);) {
    if constexpr (Config::kKvInRegisters) {
      if (flags & Step::kFirst) {
#pragma unroll
        for (int i = 0; i < kConsumers; ++i) load_operand_transposed(k_operand[i], smem.k[i]);
        __syncwarp();
        smem.k_ring.release({});
      }
    }
    SumPatch* sums = args.dq_sums + int64_t{q_block} * Workspace<Config>::kQPatches;
    // 64 columns of dQ, or what is left of them.
    const auto sum_part = [&]<int kPart>() {
      constexpr int kColumns = std::min(64, kHeadDim - 64 * kPart);
      float dq[kColumns / 2];
      const auto product = [&](int consumer, bool accumulate) {
        const auto ds_rows = ds.at(kConsumers * at.stage + consumer);
        if constexpr (Config::kKvInRegisters) {
          product_rs(dq, k_operand[consumer], ds_rows, accumulate);
        } else {
          constexpr int kSlab = 64 / Smem::KvTile::kSlabColumns * kPart;
          product_ss(dq, ds_rows, MnMajor(smem.k[consumer], kSlab), accumulate);
        }
      };
      if (Step::is_shared(flags)) {
        product(0, false);
        if (kPart == 0) wait_phase(&smem.ds_full[at.stage][1], at.phase);
        product(1, true);
        ptx::wgmma_wait_group<0>(dq);
      } else {
        if (kPart == 0) wait_phase(&smem.ds_full[at.stage][1], at.phase);
        if (Step::is_seen(flags, 0)) {
          product(0, false);
          ptx::wgmma_wait_group<0>(dq);
        } else if (Step::is_seen(flags, 1)) {
          product(1, false);
          ptx::wgmma_wait_group<0>(dq);
        } else {
#pragma unroll
          for (float& x : dq) x = 0.f;
        }
      }
      if (kPart + 1 == kParts) {
        if (leads) cuda::ptx::mbarrier_arrive(&smem.ds_empty[at.stage]);
        if constexpr (!Config::kKvInRegisters) {
          if (flags & Step::kLast) smem.k_ring.release({});
        }
        at.next();
        await_step();  // before the last sums leave, which takes long: the next product is behind them
      }
      if (in_turn && kPart == 0) smem.turns.wait(turn_at);
#pragma unroll
      for (int i = 0; i < kColumns / 8; ++i) {
        SumPatch& to = sums[8 * kPart + i];
        ptx::red_add_v4(&to.quad[threadIdx.x % 128].x, dq[4 * i], dq[4 * i + 1], dq[4 * i + 2], dq[4 * i + 3]);
      }
    };
    sum_part.template operator()<0>();
    if constexpr (kParts == 2) sum_part.template operator()<1>();
    if (in_turn) {
      smem.turns.finish(turn_at);
      turn_at.next();
    }
  }
}

// ----------------------------------------------------------------------------------------------------------- kernel

template <class Config, Gradients kGradients>
__global__ void __launch_bounds__(Config::kThreads, 1)
    backward_kernel(const __grid_constant__ BackwardArguments<Config> args) {
  extern __shared__ __align__(1024) unsigned char dynamic_smem[];
  auto& smem = *reinterpret_cast<BackwardSmem<Config>*>(dynamic_smem);
  // Through a shuffle, so that the compiler knows it is the same for the whole warp.
  const int warpgroup = __shfl_sync(~0u, threadIdx.x / 128, 0);
  constexpr bool kNeedsDq = kGradients != Gradients::kDkv;

  if (threadIdx.x == 0) {
    constexpr int kConsumerWarps = 4 * Config::kConsumers;
    smem.q_ring.init(kConsumerWarps);
    smem.dout_ring.init(kConsumerWarps);
    smem.k_ring.init(kConsumerWarps + (kNeedsDq ? 4 : 0));
    smem.v_ring.init(kConsumerWarps);
    cuda::ptx::mbarrier_init(&smem.item_found, 1);
    cuda::ptx::mbarrier_init(&smem.next_item, 1);
    smem.turns.init();
    for (int i = 0; i < Config::kDsStages; ++i) {
      for (uint64_t& full : smem.ds_full[i]) cuda::ptx::mbarrier_init(&full, 4);
      cuda::ptx::mbarrier_init(&smem.ds_empty[i], 4);
    }
    cuda::ptx::fence_mbarrier_init(cuda::ptx::sem_release, cuda::ptx::scope_cluster);
    for (const CUtensorMap* map : {&args.q, &args.k, &args.v, &args.dout}) ptx::prefetch_tensormap(map);
  }
  __syncthreads();
  // Each role waits for `prepare` where it needs what that has written: items are found, and keys loaded, beside it.
  if (warpgroup == 0) {
    ptx::setmaxnreg_dec<Config::kProducerRegisters>();
    if (threadIdx.x < 32) load(args, smem);
    if (threadIdx.x / 32 == 1) find_items(args, smem);
    if (args.turns != nullptr) {
      if (threadIdx.x == 2 * 32) grant_turns(args, smem.turns, smem.items);
      if (threadIdx.x == 3 * 32) announce_turns(args, smem.turns);
    }
  } else if (warpgroup <= Config::kConsumers) {
    ptx::setmaxnreg_inc<Config::consumer_registers(kNeedsDq)>();
    Consumer<Config, kGradients>(args, smem, warpgroup - 1).run();
  } else {
    ptx::setmaxnreg_dec<Config::dq_registers(kNeedsDq)>();
    cudaGridDependencySynchronize();  // `prepare` has left zeros in dQ's sums
    cudaTriggerProgrammaticLaunchCompletion();
    if constexpr (kNeedsDq) sum_dq(args, smem);
  }
}

// ----------------------------------------------------------------------------------------------------------- launch

template <class Config, Gradients kGradients>
void launch_products(const BackwardArguments<Config>& args, int thread_blocks, cudaStream_t stream) {
  constexpr int kBytes = sizeof(BackwardSmem<Config>);
  allow_shared_memory<backward_kernel<Config, kGradients>, kBytes>(current_device());
  launch_overlapped(backward_kernel<Config, kGradients>, thread_blocks, Config::kThreads, kBytes, stream, args,
                    "launching the backward kernel");
}

template <class Config>
void launch(const BackwardParams& params, cudaStream_t stream) {
  const bool needs_dq = params.dq.data != nullptr, needs_dkv = params.dk.data != nullptr || params.dv.data != nullptr;
  if (!needs_dq && !needs_dkv && params.dsinks == nullptr) return;

  // Before the tensor maps are encoded: the driver asks for a current context there, and a thread whose first call to
  // CUDA this is, such as autograd's, has one only after a call of the runtime.
  launch_prepare(params, stream);
  if constexpr (Config::kByPairs) {
    if (needs_dq || needs_dkv) launch_wide_products(params, stream);
  } else {
    const Workspace<Config> workspace(params);
    const BackwardArguments<Config> args = make_arguments(params, workspace);
    if (needs_dq && needs_dkv) {
      launch_products<Config, Gradients::kAll>(args, workspace.thread_blocks, stream);
    } else if (needs_dq) {
      launch_products<Config, Gradients::kDq>(args, workspace.thread_blocks, stream);
    } else if (needs_dkv) {
      launch_products<Config, Gradients::kDkv>(args, workspace.thread_blocks, stream);
    }
  }
  launch_convert(params, stream);
}

}  // namespace

void launch_backward(const BackwardParams& params, cudaStream_t stream) {
  with_backward_config(params.problem, [&]<class Config>() {
    if (params.problem.options.softcap == 0) {
      launch<Config>(params, stream);
    } else {
      launch<typename Config::Capped>(params, stream);
    }
  });
}

int64_t backward_workspace_bytes(const BackwardParams& params) {
  int64_t bytes = 0;
  with_backward_config(params.problem, [&]<class Config>() { bytes = Workspace<Config>(params).bytes; });
  return bytes;
}

int backward_shared_memory(int head_dim) {
  int bytes = wide_shared_memory(head_dim);
  with_limits(head_dim, [&]<std::size_t row>() {
    constexpr BackwardPlan plan = kLimits[row].backward;
    if constexpr (plan.built() && !plan.by_pairs) bytes = sizeof(BackwardSmem<BackwardConfig<row, __half>>);
  });
  return bytes;
}

}  // namespace flash_attn_ext
