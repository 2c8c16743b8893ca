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
  bool by_cost;    // block 0 costs most, and every next one less

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
    return {by_cost ? outer_rank : inner_rank, pair - sequence * heads, sequence};
  }
};

// The backward's items: KV blocks, each with all query heads of its KV head; but the last KV heads' query heads are
// shared out, an item a query head, where whole items would leave multiprocessors idle at the end.
struct SharedSchedule {
  Schedule whole;   // of KV heads
  Schedule shared;  // of query heads

  // `group` query heads of each of `kv_heads` read and add to `head_bytes` each.
  static HOST_DEVICE SharedSchedule make(int blocks, int kv_heads, int sequences, int group, bool by_cost,
                                         int64_t head_bytes, int64_t l2_bytes, int multiprocessors) {
    const int pairs = sequences * kv_heads,
              whole = pairs - shared_pairs(blocks, pairs, group, by_cost, multiprocessors);
    return {{blocks, kv_heads, 0, whole, Schedule::section_pairs(group * head_bytes, 1, l2_bytes), by_cost},
            {blocks, kv_heads * group, whole * group, (pairs - whole) * group,
             Schedule::section_pairs(head_bytes, 1, l2_bytes), by_cost}};
  }

  HOST_DEVICE int items() const { return whole.items() + shared.items(); }
  HOST_DEVICE bool is_whole(int index) const { return index < whole.items(); }
  HOST_DEVICE WorkItem item(int index) const {
    return is_whole(index) ? whole.item(index) : shared.item(index - whole.items());
  }

 private:
  // How many of the last KV heads are shared out. Where all items cost the same, those of a last round that is far from
  // full. Where they do not, the last KV heads' longest items begin while the KV heads before end: as many blocks as
  // there are multiprocessors, in pieces, fill what these leave idle.
  static HOST_DEVICE int shared_pairs(int blocks, int pairs, int group, bool by_cost, int multiprocessors) {
    if (group == 1) return 0;
    const int last_round = blocks * pairs % multiprocessors;
    const int wanted = by_cost                                 ? (multiprocessors + blocks / 2) / blocks
                       : 10 * last_round < 9 * multiprocessors ? (last_round + blocks - 1) / blocks
                                                               : 0;
    return wanted < pairs ? wanted : pairs;
  }
};

}  // namespace flash_attn_ext
