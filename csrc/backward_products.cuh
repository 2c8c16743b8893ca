// What both kernels of the backward's products share: the narrow one (backward.cu) and the wide one (backward_wide.cu).
// Their arguments, their work items, and what is done to a fragment of S or dP. Both compute these transposed, keys x
// queries: a thread's two rows are keys, and its columns are queries.
#pragma once

#include <climits>

#include "backward.cuh"
#include "ptx/warpgroup.cuh"
#include "tensor_map.h"
#include "tile/fragment.cuh"
#include "tile/mask.cuh"
#include "tile/softmax.cuh"

namespace flash_attn_ext {

// -------------------------------------------------------------------------------------------------------- arguments

template <class Config>
struct BackwardArguments {
  CUtensorMap q, k, v, dout, dk, dv;
  const RowStats<Config::kBlockQ>* stats;
  SumPatch* dq_sums;
  KvSums coarse_sums, fine_sums;
  int* item_counter;
  int *turns, *keeps_turns;
  KeySchedule schedule;
  Sequences sequences;
  struct Reach {
    int left, right;
  } reach;  // of all sequences
  int heads;
  float scale, scale_log2;  // scale_log2, with softcap: of the capped scores, which are at most 1
  bool needs_dk, needs_dv;
  float cap_log2;  // softmax_scale / softcap * 2 * log2(e)
};

template <class Config>
BackwardArguments<Config> make_arguments(const BackwardParams& params, const Workspace<Config>& workspace) {
  using T = typename Config::T;
  using QTile = SmemTile<T, Config::kBlockQ, Config::kTileColumns>;
  using KvTile = SmemTile<T, 64, Config::kTileColumns>;
  const Problem& problem = params.problem;
  const Shape q_shape = problem.q_shape(), k_shape = problem.k_shape();

  BackwardArguments<Config> args;
  const bool ragged_q = workspace.sequences.is_ragged(), ragged_k = workspace.sequences.transposed().is_ragged();
  args.q = make_sequence_map<QTile>("q", params.q, q_shape, ragged_q);
  args.dout = make_sequence_map<QTile>("dout", params.dout, q_shape, ragged_q);
  args.k = make_sequence_map<KvTile>("k", params.k, k_shape, ragged_k);
  args.v = make_sequence_map<KvTile>("v", params.v, k_shape, ragged_k);
  args.needs_dk = params.dk.data != nullptr;
  args.needs_dv = params.dv.data != nullptr;
  if (args.needs_dk) args.dk = make_sequence_map<KvTile>("dk", params.dk, k_shape, ragged_k);
  if (args.needs_dv) args.dv = make_sequence_map<KvTile>("dv", params.dv, k_shape, ragged_k);
  args.stats = workspace.stats;
  args.dq_sums = workspace.dq.patches;
  args.coarse_sums = workspace.coarse;
  args.fine_sums = workspace.fine;
  args.item_counter = workspace.item_counter;
  args.turns = workspace.turns;
  args.keeps_turns = workspace.keeps_turns;
  args.schedule = workspace.schedule;
  args.sequences = workspace.sequences;
  args.reach = {workspace.sequences.each.left, workspace.sequences.each.right};
  args.heads = static_cast<int>(problem.heads);
  const auto softcap = static_cast<float>(problem.options.softcap);
  args.scale = problem.softmax_scale();
  args.scale_log2 = (Config::kSoftcap ? softcap : problem.softmax_scale()) * kLog2E;
  args.cap_log2 = Config::kSoftcap ? problem.softmax_scale() / softcap * 2 * kLog2E : 0.f;
  return args;
}

// ------------------------------------------------------------------------------------------------------------ items

// A work item, a block of keys with query heads of its KV head: what the scheduler finds out about it for all others.
// Its size is a power of two: with another one, the consumers lack a register.
struct alignas(128) Item {
  static constexpr int kNone = -1;

  int first_head, end_head;     // kNone: there is no item any more
  int first_block, last_block;  // of each head's walk over Q blocks, up or down
  int claim_block;              // where the last head's walk comes to it, the next item is claimed
  Range ranges[4];              // Q blocks that some of the first and of the last 64 keys see, and that all of them see
  int first_q_block, head_blocks;  // in the workspace: of the first head, and from head to head
  int first_key;                   // in its sequence
  int rows, keys;                  // of the sequence: those that are used
  int kv_head;
  Origin q, kv, out;  // of rows and keys, and of dk and dv
  bool complete;      // the item has all of the KV head's query heads; otherwise:
  bool coarse;        // which sums
  bool ascends;       // the sequence's first keys were handed out first
  int copy, kv_block;
};

// With so many steps to go an item's successor is claimed: to claim and to find it takes as long as two or three.
// Claimed much earlier, items would leave thread blocks to end unevenly.
constexpr int kClaimSteps = 3;

// Finds the item with this number; false if that is a hole among the blocks of packed sequences. All lanes of the warp
// find the same, but for the ranges: each of the first four works out one of them.
template <class Config>
__device__ __forceinline__ bool find_item(const BackwardArguments<Config>& args, int number, Item& item) {
  constexpr int kBlockQ = Config::kBlockQ, kBlockKv = Config::kBlockKv;
  const Sequences &of_rows = args.sequences, of_keys = of_rows.transposed();
  const KeyItem work = args.schedule.item(number);
  item.first_head = work.first_head;
  item.end_head = work.end_head;
  item.kv_head = work.kv_head;
  item.complete = work.end_head - work.first_head == args.schedule.group;
  item.coarse = work.coarse;
  item.ascends = work.ascends;
  item.copy = work.copy;
  item.kv_block = args.schedule.kv_block(work);

  const Block at =
      of_keys.is_packed() ? of_keys.locate_packed(work.block, 0, kBlockKv) : Block{work.sequence, 0, work.block};
  const int stored = of_keys.stored_rows(at.sequence), first_key = at.index * kBlockKv;
  if (at.index < 0 || stored == 0 || at.index > (stored - 1) / kBlockKv) return false;
  item.first_key = first_key;
  item.first_q_block = of_rows.first_block(at.sequence, work.first_head, args.heads, kBlockQ);
  item.head_blocks = of_rows.blocks_each(kBlockQ);

  ptx::forget_memory();  // what is read again below takes no registers above
  const Sequence keys = of_rows.at(at.sequence).transposed();
  item.rows = keys.keys;
  item.keys = keys.rows;
  Range blocks = keys.blocks(first_key, kBlockKv, kBlockQ);
  if (blocks.begin >= blocks.end) blocks = {0, 1};  // nobody sees the keys: one step, for the zeros in dK and dV
  item.first_block = work.direction > 0 ? blocks.begin : blocks.end - 1;
  item.last_block = work.direction > 0 ? blocks.end - 1 : blocks.begin;
  const int claim_steps = min(kClaimSteps, blocks.end - blocks.begin);
  item.claim_block = work.direction > 0 ? blocks.end - claim_steps : blocks.begin + claim_steps - 1;
  const int lane = threadIdx.x % 32, own_key = first_key + 64 * (lane % 2);
  item.ranges[lane % 4] =
      lane / 2 % 2 == 0 ? keys.blocks(own_key, 64, kBlockQ) : keys.full_blocks(own_key, 64, kBlockQ);

  ptx::forget_memory();
  item.q = of_rows.origin_of_used(at.sequence);
  item.kv = of_keys.origin_of_used(at.sequence);
  item.out = of_keys.origin_of_stored(at.sequence);
  return true;
}

template <class Config>
__device__ __forceinline__ int claim_item(const BackwardArguments<Config>& args) {
  cudaGridDependencySynchronize();  // `prepare` has set the counter
  int claimed = 0;
  if (threadIdx.x % 32 == 0) claimed = atomicAdd(args.item_counter, 1);
  return __shfl_sync(~0u, claimed, 0);
}

// ---------------------------------------------------------------------------------------------------------- P and dS

// In place of a query on the diagonal.
constexpr int kPastEnd = INT_MAX;

// The queries on the diagonal beside the thread's two keys, the first of which is `first_key` + own_row(); for keys
// past the end, beyond all that see anything.
__device__ __forceinline__ void find_diagonal(int (&diagonal)[2], const Item& item, int first_key) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int key = first_key + own_row() + 8 * r;
    diagonal[r] = key < item.keys ? key + item.rows - item.keys : kPastEnd;
  }
}

// Scores of queries that do not see the thread's keys become -inf. The first column is the query `first_row`.
template <class Reach, int kRegisters>
__device__ __forceinline__ void mask_queries(float (&scores)[kRegisters], const int (&diagonal)[2], const Reach& reach,
                                             int first_row, int rows) {
  int first[2], end[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    first[r] = diagonal[r] - reach.right - first_row;
    end[r] = min(static_cast<int>(diagonal[r] + 1u + reach.left), rows) - first_row;  // kPastEnd wraps around: none
  }
  mask_before(scores, first);
  mask_from(scores, end);
}

// The values of the queries that are the columns of the thread's fragment: of every 8, two neighbours.
template <int kQueries>
__device__ __forceinline__ void load_queries(float2 (&to)[kQueries / 8], const float (&of_row)[kQueries],
                                             int thread = threadIdx.x) {
#pragma unroll
  for (int j = 0; j < kQueries / 8; ++j) to[j] = reinterpret_cast<const float2*>(of_row)[4 * j + thread % 4];
}

// P = exp(scale * S - lse), in place.
template <int kRegisters>
__device__ __forceinline__ void exponentiate(float (&scores)[kRegisters], float scale_log2,
                                             const float2 (&lse_log2)[kRegisters / 4]) {
#pragma unroll
  for (int i = 0; i < kRegisters; i += 2) {
    const float2 lse = lse_log2[i / 4];
    scores[i] = ptx::ex2(fmaf(scores[i], scale_log2, -lse.x));
    scores[i + 1] = ptx::ex2(fmaf(scores[i + 1], scale_log2, -lse.y));
  }
}

// With softcap: P = exp(softcap * t - lse) of t = tanh(scale * S / softcap), masked, and P times t's slope, 1 - t^2,
// which takes the place of P in dS. Both rounded, as operands: t cannot be had back from P.
template <class T, int kSteps>
__device__ __forceinline__ void exponentiate_capped(uint32_t (&p)[kSteps][4], uint32_t (&sloped_p)[kSteps][4],
                                                    const float (&t)[8 * kSteps], float scale_log2,
                                                    const float2 (&lse_log2)[2 * kSteps]) {
  const auto slope = [](float t) { return fmaxf(fmaf(-t, t, 1.f), 0.f); };  // 0 for a masked t of -inf
#pragma unroll
  for (int i = 0; i < 8 * kSteps; i += 2) {
    const float2 lse = lse_log2[i / 4];
    const float2 x =
        make_float2(ptx::ex2(fmaf(t[i], scale_log2, -lse.x)), ptx::ex2(fmaf(t[i + 1], scale_log2, -lse.y)));
    p[i / 8][i % 8 / 2] = pack<T>(x.x, x.y);
    sloped_p[i / 8][i % 8 / 2] = pack<T>(x.x * slope(t[i]), x.y * slope(t[i + 1]));
  }
}

// dS = P * (dP - delta), rounded, as an operand. p(i) are elements i and i + 1 of P.
template <class T, int kSteps, class P>
__device__ __forceinline__ void subtract_delta(uint32_t (&ds)[kSteps][4], const P& p, const float (&dp)[8 * kSteps],
                                               const float2 (&deltas)[2 * kSteps]) {
#pragma unroll
  for (int i = 0; i < 8 * kSteps; i += 2) {
    const float2 delta = deltas[i / 4], x = p(i);
    ds[i / 8][i % 8 / 2] = pack<T>(x.x * (dp[i] - delta.x), x.y * (dp[i + 1] - delta.y));
  }
}

// ---------------------------------------------------------------------------------------------------------- dK and dV

// Writes 64 rows of dK or dV to the item's sums in global memory, from this patch of its block on.
template <class Config, int kRegisters>
__device__ __forceinline__ void write_sums(const float (&rows)[kRegisters], const Sums& to, const Item& item,
                                           int first_patch) {
  const int64_t number = int64_t{item.copy} * to.blocks + item.kv_block - to.first_block;
  SumPatch* const sums = to.patches + number * Workspace<Config>::kKvPatches + first_patch;
#pragma unroll
  for (int i = 0; i < kRegisters / 4; ++i) {
    sums[i].quad[threadIdx.x % 128] = make_float4(rows[4 * i], rows[4 * i + 1], rows[4 * i + 2], rows[4 * i + 3]);
  }
}

}  // namespace flash_attn_ext
