// How a call's work is ordered, for each pass: plain functions of sizes, which the launches and the tests call alike.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>

#include "limits.h"
#include "problem.h"
#include "tile/schedule.h"

namespace flash_attn_ext {

// How much of L2 a section's memory may take. Hoppers have 50 MB or 60 MB, and results pass through it as well.
// Sections of the deterministic backward may take more where that lets its items wait less.
inline constexpr int64_t kL2Bytes = int64_t{32} << 20, kMostL2Bytes = int64_t{48} << 20;

// How many items one after the other take as long as these do. They are of one length, so that rounds of them count;
// but in many rounds multiprocessors drift apart, so that it is their number: half of each.
inline double rounds_of_equal_items(int64_t items, int multiprocessors) {
  if (items <= multiprocessors) return 1;
  return ((items - 1) / multiprocessors + 1 + static_cast<double>(items) / multiprocessors) / 2;
}

// How the forward divides a call whose rows are few for its tiles, or its tiles for the multiprocessors. Query heads of
// a KV head share a tile of 64 rows. And thread blocks share out the keys of a tile; what each makes of its part is
// combined (forward_parts.cu).
struct Division {
  int heads = 1;           // that share a tile: a power of two
  int tile_rows_log2 = 6;  // of each
  int parts = 1;           // of the keys
  int part_keys = Sequence::kUnbounded;
  int64_t part_values = 0;  // rows of all heads and batches: results of a part
  double block_times = 0;   // an estimate of what the call takes, in the time of a block of keys; 0: there is none

  constexpr bool is_any() const { return heads > 1 || parts > 1; }
};

// Only calls without a mask, and of sequences of one length: a row's result is then the same, bit for bit, whichever
// heads share its tile, unless the tile is lost. Kernels with softcap cannot.
inline Division divide(const Problem& problem, const ForwardPlan& plan, int multiprocessors) {
  const Sequences sequences = problem.sequences();
  const Sequence& each = sequences.each;
  const bool is_masked = each.left < each.keys - 1 || each.right < each.rows - 1;
  Division best;
  if (!plan.built() || is_masked || problem.lengths.any() || problem.options.softcap != 0) return best;

  constexpr int kMostHeads = 8, kMostParts = 16;
  constexpr int kFewestBlocks = 2;  // of a part: fewer are not worth combining
  // The estimate is a rough one: what gains less than this is left as it is. Parts are likelier to disappoint.
  constexpr double kWorthHeads = 0.97, kWorthParts = 0.93;
  const int group = problem.heads_per_kv_head();
  const int64_t values = problem.batch * problem.heads * problem.seqlen_q;
  const int64_t blocks = (problem.seqlen_k - 1) / plan.block_kv + 1, block_scores = plan.block_q * plan.block_kv;
  // Of the kernel that combines, and its launch: some 4 us, in which a block of 128 x 128 at head dim 128 is done 3
  // times.
  const double combining_begins = 3.0 * 128 * 128 * 128 / static_cast<double>(block_scores * problem.head_dim);
  for (int heads = 1; heads <= kMostHeads && group % heads == 0; heads *= 2) {
    const int64_t rows = plan.block_q / heads;
    const int64_t tiles = ((problem.seqlen_q - 1) / rows + 1) * (problem.heads / heads) * problem.batch;
    const int64_t most_parts =
        tiles < 2 * multiprocessors ? std::clamp<int64_t>(blocks / kFewestBlocks, 1, kMostParts) : 1;
    for (int64_t asked = 1; asked <= most_parts; ++asked) {
      const int64_t part_blocks = (blocks - 1) / asked + 1, parts = (blocks - 1) / part_blocks + 1;
      // In the time that a block of keys takes. Items take one more. Combining has float32 results that are written and
      // read again.
      const double of_items = rounds_of_equal_items(tiles * parts, multiprocessors) * (part_blocks + 1);
      const double of_combining = combining_begins + 1.5 * parts * values / block_scores;
      const double time = of_items + (parts > 1 ? of_combining : 0);
      const double worth = (parts > best.parts ? kWorthParts : kWorthHeads) * best.block_times;
      if (best.block_times > 0 && time > worth) continue;
      best = {.heads = heads,
              .tile_rows_log2 = std::countr_zero(64u / heads),
              .parts = static_cast<int>(parts),
              .part_keys = parts == 1 ? Sequence::kUnbounded : static_cast<int>(part_blocks) * plan.block_kv,
              .part_values = values,
              .block_times = time};
    }
  }
  return best;
}

// An estimate of what a dense call takes by a plan of the forward: elements of scores that a multiprocessor computes
// one after the other.
inline double forward_time(const Problem& problem, const ForwardPlan& plan, int multiprocessors) {
  const Division division = divide(problem, plan, multiprocessors);
  if (division.block_times > 0) return division.block_times * plan.block_q * plan.block_kv;
  // Masks: the costliest item comes first, and cheaper ones even out what it leaves. Half of a causal square is masked.
  const double rows = static_cast<double>(problem.batch * problem.heads * problem.seqlen_q) / multiprocessors;
  return std::max<double>(plan.block_q, rows / 2) * static_cast<double>(problem.seqlen_k);
}

// Whether the forward takes the plan that its row of the table has for rows that see few keys: without softcap, as its
// blocks keep their offset. Not packed sequences, which fill large Q blocks badly where they are short, and a few rows
// neither. Nor where its Q blocks are so few that multiprocessors are idle for longer than by the other plan.
inline bool has_short_forward(const Problem& problem, const HeadDimLimits& limits, int multiprocessors) {
  constexpr int64_t kFewKeys = 4096;
  constexpr double kWorth = 1.05;  // its beginnings and ends of items are hidden better
  const ForwardPlan& plan = limits.short_forward;
  const Sequences sequences = problem.sequences();
  const Sequence& each = sequences.each;
  const bool has_few_keys = each.keys <= kFewKeys || int64_t{each.left} + each.right < kFewKeys;
  return plan.built() && problem.options.softcap == 0 && !sequences.is_packed() && each.rows >= plan.block_q &&
         has_few_keys &&
         forward_time(problem, plan, multiprocessors) <=
             kWorth * forward_time(problem, limits.forward, multiprocessors);
}

// The plan that a call takes; not built where the table has none for its head dim.
inline ForwardPlan forward_plan(const Problem& problem, int multiprocessors) {
  ForwardPlan plan;
  with_limits(problem.head_dim, [&]<std::size_t row>() {
    const HeadDimLimits& limits = kLimits[row];
    plan = has_short_forward(problem, limits, multiprocessors) ? limits.short_forward : limits.forward;
  });
  return plan;
}

// Blocks of query rows. The query heads of a KV head read the same K and V.
inline Schedule forward_schedule(const Problem& problem, const ForwardPlan& plan, const Division& division = {}) {
  constexpr int kElementBytes = 2;
  const Sequences sequences = problem.sequences();
  const int heads = static_cast<int>(problem.heads) / division.heads, tile_rows = 1 << division.tile_rows_log2;
  // Packed sequences are taken as one, since their lengths are not known here: from the last block to the first. Under
  // a causal mask a costly block has all its sequence's cheaper ones behind it, which even out what it leaves. A block
  // has a tile of 64 rows for each consumer, of any sequences.
  const bool packed = sequences.is_packed();
  const int blocks = quotient(sequences.blocks_each(tile_rows) - 1, plan.consumers()) + 1;
  check_counts({division.parts * sequences.block_count(heads, tile_rows)});
  const int pairs = (packed ? 1 : sequences.count * division.parts) * heads;
  const int group = problem.heads_per_kv_head() / division.heads;
  const int64_t keys = std::min(problem.seqlen_k, int64_t{division.part_keys});
  const int section = Schedule::even_section(pairs, 2 * keys * problem.head_dim * kElementBytes, group, kL2Bytes);
  const bool by_cost =
      packed || sequences.each.right != Sequence::kUnbounded;  // later rows see more, until a window is full
  // A section's costliest blocks load all its K and V together. Where keys are few, heads were measured to be faster
  // one by one, but for the last section, which ends evenly (docs/tuning.md).
  constexpr int kKeysByHead = 1024;
  const bool by_head = by_cost && !packed && sequences.each.keys <= kKeysByHead;
  const int narrow = by_head ? group : section;
  return {.blocks = blocks,
          .heads = heads,
          .first_pair = 0,
          .pairs = pairs,
          .section = narrow,
          .whole = Schedule::whole_sections(pairs, narrow, by_head ? section : 1),
          .by_cost = by_cost};
}

// How many items a thread block claims at once. Items of short packed sequences are done before the next one is found.
inline constexpr int kMostClaims = 4;

inline int most_claims(const Problem& problem, const ForwardPlan& plan) {
  if (!problem.lengths.cu_seqlens_q) return 1;
  const int64_t rows = problem.seqlen_q / problem.batch + 1, claims = kMostClaims * plan.block_q / rows;
  return claims < 1 ? 1 : claims < kMostClaims ? static_cast<int>(claims) : kMostClaims;
}

// Without rows that see nothing: what dO has there, NaN too, must not reach dK and dV.
inline Sequences backward_sequences(const Problem& problem) { return problem.sequences().without_unseeing_rows(); }

// The steps of a query head that a block of keys walks: as many as an average sequence has, or a window lets it see.
inline int backward_steps(const Problem& problem, const BackwardPlan& plan) {
  const Sequences sequences = backward_sequences(problem);
  const Sequence& each = sequences.each;
  const int rows = sequences.is_packed() ? quotient(each.rows, sequences.count) + 1 : each.rows;
  const int64_t reach = int64_t{each.left} + each.right + plan.block_kv;
  return quotient(rows < reach ? rows - 1 : static_cast<int>(reach), plan.block_q) + 1;
}

// Blocks of keys. They read Q and dO of each query head, and add to its float32 dQ. Sections are smaller where an item
// has one query head, which was measured to be better (docs/tuning.md).
inline KeySchedule backward_schedule(const Problem& problem, const BackwardPlan& plan, int multiprocessors) {
  const Sequences sequences = backward_sequences(problem), keys = sequences.transposed();
  const Sequence& each = sequences.each;
  const int heads = static_cast<int>(problem.heads), kv_heads = static_cast<int>(problem.kv_heads);
  check_counts({sequences.block_count(heads, plan.block_q), keys.block_count(kv_heads, plan.block_kv)});
  const bool is_causal = each.right == 0 && each.left == Sequence::kUnbounded;
  int64_t sum_columns = problem.head_dim;  // of the sums, filled up with zeros
  with_limits(problem.head_dim, [&]<std::size_t row>() { sum_columns = kLimits[row].head_dim; });
  return KeySchedule::make({.blocks = keys.blocks_each(plan.block_kv),
                            .kv_heads = kv_heads,
                            .sequences = keys.is_packed() ? 1 : keys.count,
                            .group = problem.heads_per_kv_head(),
                            .steps = backward_steps(problem, plan),
                            .by_cost = is_causal || keys.is_packed(),
                            .falls = is_causal && each.keys <= 2 * each.rows,
                            .ordered = problem.options.deterministic,
                            .head_bytes = each.rows * ((2 + 2) * problem.head_dim + 4 * sum_columns),
                            .l2_bytes = heads == kv_heads ? kL2Bytes / 2 : kL2Bytes,
                            .most_bytes = kMostL2Bytes,
                            .multiprocessors = multiprocessors});
}

// Whether pairs of thread blocks take item after item. Where items may have to wait for each other, each has a pair.
inline bool is_persistent(const Problem& problem, const BackwardPlan& plan, const KeySchedule& schedule) {
  const int64_t steps = int64_t{backward_steps(problem, plan)} * schedule.most_heads;  // of an item
  return steps <= plan.persistent_steps && !problem.options.deterministic;
}

}  // namespace flash_attn_ext
