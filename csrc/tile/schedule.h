// The order in which work is handed out.
//
// A work item is one block of rows of one head of one sequence: query rows in the forward, keys in the backward. All
// items of a (sequence, head) pair read the same memory, so pairs are taken in sections that find theirs in L2
// together. Under a causal mask some blocks cost more than others: a section hands out its costliest blocks first, so
// that what is left for the end, when some multiprocessors have run dry, is short (longest processing time first,
// Graham 1969).
#pragma once

#include <cstdint>

#include "host_device.h"

namespace flash_attn_ext {

struct WorkItem {
  int block, head, sequence;
};

struct Schedule {
  int blocks;      // of a pair
  int heads;       // of a sequence
  int first_pair;  // pairs are counted sequence by sequence
  int pairs;       // from the first on
  int section;     // pairs of a section
  bool by_cost;    // every block costs more than the one before it

  // The pairs of a section: a whole number of `group` neighbours, which share their memory of so many bytes.
  static HOST_DEVICE int section_pairs(int64_t group_bytes, int group, int64_t l2_bytes) {
    const int64_t groups = l2_bytes / (group_bytes < 1 ? 1 : group_bytes), pairs = (groups < 1 ? 1 : groups) * group;
    return pairs < INT32_MAX ? static_cast<int>(pairs) : INT32_MAX;
  }

  HOST_DEVICE int items() const { return blocks * pairs; }

  // The item that is handed out as number `index`.
  HOST_DEVICE WorkItem item(int index) const {
    // The first pair of the item's section, and how many pairs this section has: the last may have fewer.
    const int begin = section < pairs ? quotient(index, section * blocks) * section : 0;
    const int width = section < pairs - begin ? section : pairs - begin;
    const int rank = index - begin * blocks;
    const int inner = by_cost ? width : blocks, outer_rank = quotient(rank, inner),
              inner_rank = rank - outer_rank * inner;
    const int pair = first_pair + begin + (by_cost ? inner_rank : outer_rank);
    const int sequence = quotient(pair, heads);
    return {by_cost ? blocks - 1 - outer_rank : inner_rank, pair - sequence * heads, sequence};
  }
};

// A work item of the backward: a block of keys with some of the query heads of its KV head.
struct KeyItem {
  int block, sequence, kv_head, first_head, end_head;
  bool coarse;
  int copy;    // which of the items that share the KV head's query heads
  int stride;  // 1: query rows are walked from the first to the last; -1: from the last to the first
};

// The backward's order of work (docs/backward.md says why). A coarse item walks up to kMostHeads query heads of a KV
// head one after the other, and sums dK and dV in registers; not more of them, since under a causal mask the blocks of
// a KV head drift apart with every head, until L2 no longer holds what they share. Where the multiprocessors have few
// coarse items each, the query heads of the last KV heads are shared out, an item a query head: these fine items fill
// what would be idle at the end.
struct KeySchedule {
  static constexpr int kMostHeads = 4;
  // Waves alternate only where at least so many blocks of a head run together: with fewer, L2 gains nothing by it.
  static constexpr int kTogether = 8;

  Schedule coarse, fine;
  int group;        // query heads of a KV head
  int copies;       // coarse items that share them
  int most_heads;   // of a coarse item
  bool alternates;  // waves of items, one to a multiprocessor, walk query rows in alternating directions
  int multiprocessors;

  // A query head's rows, and what is added to for them, are `head_bytes`.
  static HOST_DEVICE KeySchedule make(int blocks, int kv_heads, int sequences, int group, bool by_cost,
                                      int64_t head_bytes, int64_t l2_bytes, int multiprocessors) {
    const int copies = (group - 1) / kMostHeads + 1, most_heads = (group - 1) / copies + 1;
    const int pairs = sequences * kv_heads;
    const int fine = fine_pairs(blocks, pairs, group, most_heads, copies, by_cost, multiprocessors);
    const int coarse_section = Schedule::section_pairs(most_heads * head_bytes, 1, l2_bytes);
    // Sections of one width, so that the last one is no smaller than the others.
    const int fine_sections = quotient(fine * group, Schedule::section_pairs(head_bytes, 1, l2_bytes));
    const int fine_section = fine_sections > 1 ? quotient(fine * group - 1, fine_sections) + 1 : fine * group;
    return {.coarse = {blocks, kv_heads * copies, 0, (pairs - fine) * copies, coarse_section, by_cost},
            .fine = {blocks, kv_heads * group, (pairs - fine) * group, fine * group, fine_section, by_cost},
            .group = group,
            .copies = copies,
            .most_heads = most_heads,
            .alternates = by_cost && blocks >= kTogether && kTogether * coarse_section <= multiprocessors,
            .multiprocessors = multiprocessors};
  }

  HOST_DEVICE int items() const { return coarse.items() + fine.items(); }

  HOST_DEVICE KeyItem item(int index) const {
    const bool is_coarse = index < coarse.items();
    const Schedule schedule = is_coarse ? coarse : fine;  // first, so that divisions are not compiled twice
    const WorkItem at = schedule.item(is_coarse ? index : index - coarse.items());
    const int shares = is_coarse ? copies : group, heads = is_coarse ? most_heads : 1;
    const int kv_head = shares == 1 ? at.head : quotient(at.head, shares), copy = at.head - kv_head * shares;
    const int first_head = kv_head * group + copy * heads, end_head = first_head + heads, end = (kv_head + 1) * group;
    const bool walks_down = alternates && quotient(index, multiprocessors) % 2 == 0;
    return {.block = at.block,
            .sequence = at.sequence,
            .kv_head = kv_head,
            .first_head = first_head,
            .end_head = end_head < end ? end_head : end,
            .coarse = is_coarse,
            .copy = copy,
            .stride = walks_down ? -1 : 1};
  }

 private:
  // How many of the last (sequence, KV head) pairs are shared out.
  static HOST_DEVICE int fine_pairs(int blocks, int pairs, int group, int most_heads, int copies, bool by_cost,
                                    int multiprocessors) {
    const int64_t items = int64_t{pairs} * copies * blocks;
    if (group == 1 || items > 20 * multiprocessors) return 0;  // what is lost at the end is little beside so many
    int64_t wanted;
    if (by_cost) {
      // The longest items of the last coarse pairs end while multiprocessors that took the short ones are idle: about
      // as much as one coarse item each. So many pairs become fine items, rounded up from a fifth, and at least one.
      wanted = (int64_t{5} * multiprocessors * most_heads + 4 * blocks * group) / (int64_t{5} * blocks * group);
      if (wanted == 0) wanted = 1;
    } else {
      // Items cost the same: a last round that leaves a tenth of the multiprocessors idle.
      const int64_t last_round = items % multiprocessors;
      wanted = 10 * last_round < 9 * multiprocessors ? (last_round - 1) / (int64_t{blocks} * copies) + 1 : 0;
      if (last_round == 0) wanted = 0;
    }
    return wanted < pairs ? static_cast<int>(wanted) : pairs;
  }
};

}  // namespace flash_attn_ext
