// The work of a pass and its order, from the problem and the pass's plan: what a launch tells its kernel, and
// tests/host/schedule.cpp plays through.
#pragma once

#include <cmath>
#include <cstdint>

#include "limits.h"
#include "problem.h"
#include "tile/schedule.h"
#include "tile/sequences.h"

namespace flash_attn_ext {

// What the blocks that run together want to find in L2: half of the 50 MB or 60 MB that Hoppers have.
inline constexpr int64_t kL2Bytes = int64_t{32} << 20;

// An item of the forward is a block of query rows of a head. The heads of a KV head read the same K and V.
inline Schedule forward_schedule(const Problem& problem, const ForwardPlan& plan, int multiprocessors) {
  constexpr int kBytes = 2 + 2;  // of K and V
  const Sequences queries = problem.sequences();
  check_counts({queries.block_count(plan.block_q) * problem.heads});
  return Schedule::make({.blocks = queries.blocks_each(plan.block_q),
                         .heads = static_cast<int>(problem.heads),
                         .sequences = queries.count,
                         .by_cost = problem.options.causal,
                         .heads_together = problem.heads_per_kv_head(),
                         .bytes_together = problem.seqlen_k * problem.head_dim * kBytes,
                         .l2_bytes = kL2Bytes,
                         .multiprocessors = multiprocessors});
}

// In how many parts the backward shares out the query heads of a KV head, where there are too few KV heads' blocks to
// keep the multiprocessors busy. It is the number with the shortest estimated time; but a split must save 1/32, since
// its float32 sums of dK and dV are memory traffic.
inline int backward_parts(const Problem& problem, const BackwardPlan& plan, int multiprocessors) {
  const Sequences queries = problem.sequences(), keys = queries.transposed();
  const int group = problem.heads_per_kv_head();
  const int64_t items = keys.block_count(plan.block_kv) * problem.kv_heads;
  check_counts({queries.block_count(plan.block_q) * problem.heads, items * group});

  int best = 1;
  double best_time = 0;  // in steps
  for (int parts = 1; parts <= group; ++parts) {
    const double fixed = parts == 1 ? 1 : 2;  // an item's beginning and end
    const double longest = static_cast<double>((group - 1) / parts + 1) * queries.blocks_each(plan.block_q);
    const double rounds = static_cast<double>(items) * parts / multiprocessors;
    // Under a causal mask costs fall evenly from `longest` to nothing. Of two rounds the second evens out the first,
    // long beside short; what comes after the last such pair takes as long as its first item.
    const double pairs = std::floor(rounds / 2);
    const double longests =
        problem.options.causal ? 2 * pairs + 1 - 2 * pairs * (pairs + 1) / rounds : std::ceil(rounds);
    const double time = std::ceil(rounds) * fixed + longests * longest;
    if (parts == 1 || time < best_time * 31 / 32) {
      best = parts;
      best_time = time;
    }
  }
  return best;
}

// An item of the backward is a block of keys with one part of their query heads: each part is a head of the schedule.
// The blocks of a part read the same Q and dO and add to the same sums of dQ.
inline Schedule backward_schedule(const Problem& problem, const BackwardPlan& plan, int parts, int multiprocessors) {
  constexpr int kBytes = 2 + 2 + 4;  // of Q, dO and the sums of dQ
  const Sequences keys = problem.sequences().transposed();
  return Schedule::make({.blocks = keys.blocks_each(plan.block_kv),
                         .heads = static_cast<int>(problem.kv_heads) * parts,
                         .sequences = keys.count,
                         .by_cost = problem.options.causal,
                         .heads_together = parts,
                         .bytes_together = problem.seqlen_q * problem.heads_per_kv_head() * problem.head_dim * kBytes,
                         .l2_bytes = kL2Bytes,
                         .multiprocessors = multiprocessors});
}

}  // namespace flash_attn_ext
