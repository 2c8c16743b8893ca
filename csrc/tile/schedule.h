// The order in which work is handed out.
//
// A work item is one block of rows of one head of one sequence: query rows in the forward, keys in the backward. Items
// of a head, and of heads that share keys or queries, read the same memory, so heads are taken in sections that find
// theirs in L2 together. Under a causal mask some blocks cost more than others: a section hands out its costliest
// blocks first, so that what is left when multiprocessors run dry is short (longest processing time first, Graham
// 1969). That needs a last section that is large beside its longest item; the sections before it end while the next
// begins.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace flash_attn_ext {

struct WorkItem {
  int block, head, sequence;
};

struct Schedule {
  int blocks;        // of a head
  int heads;         // of a sequence
  int pairs;         // sequences * heads
  int section;       // pairs of each section but the last
  int last_section;  // pairs of the last
  bool by_cost;      // block 0 costs most, and every next one less

  struct Call {
    int blocks, heads, sequences;
    bool by_cost;
    int heads_together;      // so many neighbouring heads read the same memory
    int64_t bytes_together;  // which has so many bytes
    int64_t l2_bytes;
    int multiprocessors;
  };

  static HOST_DEVICE Schedule make(const Call& call) {
    const int64_t pairs = static_cast<int64_t>(call.sequences) * call.heads;
    const auto limited = [&](int64_t n) { return static_cast<int>(n < 1 ? 1 : n < pairs ? n : pairs); };
    const int64_t groups = call.bytes_together > 0 ? call.l2_bytes / call.bytes_together : 1;
    const int section = limited((groups < 1 ? 1 : groups) * call.heads_together);
    // The mean item costs half of the longest: with four of them a multiprocessor gets twice the longest.
    const int tail = call.by_cost ? limited((4 * call.multiprocessors - 1) / call.blocks + 1) : 1;
    const int last = tail > section ? tail : section;
    // What does not fill a section of its own goes to the last.
    const int before = (static_cast<int>(pairs) - last) / section * section;
    return {call.blocks, call.heads, static_cast<int>(pairs), section, static_cast<int>(pairs) - before, call.by_cost};
  }

  HOST_DEVICE int items() const { return blocks * pairs; }

  // The item that is handed out as number `index`.
  HOST_DEVICE WorkItem item(int index) const {
    const int before = pairs - last_section;  // pairs of the sections before the last
    const int items_before = before * blocks;
    int first_pair = before, width = last_section, rank = index - items_before;
    if (index < items_before) {
      const int number = quotient(index, section * blocks);
      first_pair = number * section;
      width = section;
      rank = index - first_pair * blocks;
    }
    const int inner = by_cost ? width : blocks;
    const int outer_rank = quotient(rank, inner), inner_rank = rank - outer_rank * inner;
    const int pair = first_pair + (by_cost ? inner_rank : outer_rank);
    const int block = by_cost ? outer_rank : inner_rank;
    const int sequence = quotient(pair, heads);
    return {block, pair - sequence * heads, sequence};
  }
};

// How many thread blocks share the query heads of a KV head in the backward, where there are fewer KV heads' blocks
// than keep the multiprocessors busy. `items` is their number; the longest takes `steps` steps for each of its `group`
// query heads and, where costs differ, the mean item half as many. Of the numbers of parts it is the one with the
// shortest estimated time, in steps, that a launch takes.
HOST_DEVICE int head_parts(int64_t items, int group, int64_t steps, bool by_cost, int multiprocessors) {
  int best = 1;
  int64_t best_time = INT64_MAX;
  for (int parts = 1; parts <= group; ++parts) {
    // An item also has a beginning and an end; parts of a sum are written in float32 and met afterwards.
    const int64_t fixed = parts == 1 ? 1 : 2, longest = fixed + (group - 1) / parts * steps + steps;
    const int64_t rounds = (items * parts - 1) / multiprocessors + 1;
    const int64_t share = items * (2 * parts * fixed + group * steps) / (2 * multiprocessors);
    const int64_t time = !by_cost ? rounds * longest : share > longest ? share : longest;
    if (time < best_time) {
      best = parts;
      best_time = time;
    }
  }
  return best;
}

}  // namespace flash_attn_ext
