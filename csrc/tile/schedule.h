// The order in which work is handed out.
//
// A work item is one block of rows of one head of one sequence: query rows in the forward, keys in the backward. Packed
// sequences count as one here. All items of a (sequence, head) pair read the same memory, so pairs are taken in
// sections that find theirs in L2 together. Under a causal mask some blocks cost more than others: a section hands out
// its costliest blocks first, so that what is left for the end, when some multiprocessors have run dry, is short
// (longest processing time first, Graham 1969).
#pragma once

#include <cstdint>

#include "host_device.h"
#include "sequence.h"

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
  int whole;       // pairs in sections of that width; those behind them are the last section
  bool by_cost;    // every block costs more than the one before it

  // The pairs of a section: a whole number of `group` neighbours, which share their memory of so many bytes.
  static HOST_DEVICE int section_pairs(int64_t group_bytes, int group, int64_t l2_bytes) {
    const int64_t groups = l2_bytes / (group_bytes < 1 ? 1 : group_bytes), pairs = (groups < 1 ? 1 : groups) * group;
    return pairs < INT32_MAX ? static_cast<int>(pairs) : INT32_MAX;
  }

  // The same for so many pairs in as few sections, all of about one width: a narrow last one would have few items for
  // the end, and costly ones.
  static HOST_DEVICE int even_section(int pairs, int64_t group_bytes, int group, int64_t l2_bytes) {
    const int width = section_pairs(group_bytes, group, l2_bytes);
    if (pairs <= width) return width;
    const int groups = pairs / group, sections = (groups - 1) / (width / group) + 1;
    return ((groups - 1) / sections + 1) * group;
  }

  // How many pairs are in whole sections, so that the last one has at least `last`, and fewer than a section more.
  static HOST_DEVICE int whole_sections(int pairs, int section, int last) {
    return last < pairs ? quotient(pairs - last, section) * section : 0;
  }

  HOST_DEVICE int items() const { return blocks * pairs; }

  // The item that is handed out as number `index`.
  HOST_DEVICE WorkItem item(int index) const {
    // The first pair of the item's section, and how many pairs this section has.
    const int begin = index < whole * blocks ? quotient(index, section * blocks) * section : whole;
    const int width = begin < whole ? section : pairs - whole;
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
  int block;  // of keys
  int sequence, kv_head, first_head, end_head;
  bool coarse;
  int copy;       // which of the items that share the KV head's query heads
  int direction;  // 1: query rows are walked from the first to the last; -1: from the last to the first
  bool ascends;   // blocks of a head are handed out from the first to the last; otherwise from the last to the first
};

// Where blocks of keys add in turn to the sums of rows: how many do before this one, the `own`-th, of those that some
// of the rows row <= i < row + n see; -1 if it is none of them.
HOST_DEVICE int find_turn(const Sequence& sequence, int row, int n, int own, int block, bool ascends) {
  const Range blocks = sequence.blocks(row, n, block);
  if (own < blocks.begin || own >= blocks.end) return -1;
  return ascends ? own - blocks.begin : blocks.end - 1 - own;
}

// The backward's order of work. An item walks its query heads one after the other, so that dK and dV are summed in
// registers. These are the coarse items. Under a causal mask they have at most kMostHeads, since the blocks of a KV
// head drift apart with every head, until L2 no longer holds what they share. Where there are few of them beside the
// multiprocessors, the last KV heads' query heads are shared out, an item a query head: the fine items, which fill what
// would be idle at the end. Sharing costs float32 sums of dK and dV, so that it needs items that are long enough.
//
// In an ordered schedule the blocks of a head add to the sums of a Q block in turn, in the order in which they are
// handed out: whoever waits then waits for work that has begun, and there is always some that goes on. So that they
// hardly wait, blocks of many heads are handed out alternately, from the last one to the first, and walk up: under a
// causal mask a block's neighbour, which begins further up, is always ahead of it. But then the longest items come
// last. The last pairs, about one item for each multiprocessor, are fine items for this reason, which are handed out by
// cost after all, from the first block to the last. These walk down, from the rows that all of them meet first.
struct KeySchedule {
  static constexpr int kMostHeads = 4;
  static constexpr int kMostHeadsOfLong = 2;
  static constexpr int kLongSteps = 512;  // of a head from which on that is better
  static constexpr int kFewSteps = 3;     // an item of so few steps a head is not worth its sums of dK and dV
  // So many items for each multiprocessor are even enough as they are; and as many fine ones are the most.
  static constexpr int kManyItems = 20;
  static constexpr int kEnoughItems = 6;  // for each multiprocessor, to be even without fine ones
  // So many blocks of a head must run together for the direction of their walks to matter to L2.
  static constexpr int kTogether = 8;

  Schedule coarse, fine;
  int kv_heads;     // of a sequence
  int group;        // query heads of a KV head
  int copies;       // coarse items that share them
  int most_heads;   // of a coarse item
  bool alternates;  // items of every other wave of multiprocessors walk down
  bool ordered, falls;
  int multiprocessors;

  struct Call {
    int blocks, kv_heads, sequences;
    int group;           // query heads of a KV head
    int steps;           // of a block that all rows of a head see
    bool by_cost;        // the first keys cost most
    bool falls;          // and the last ones next to nothing
    bool ordered;        // blocks of a head add to the same sums in turn
    int64_t head_bytes;  // of a query head's rows and of what is added to for them
    int64_t l2_bytes;    // that a section's pairs may take
    int64_t most_bytes;  // the same where sections of an ordered schedule are better wider
    int multiprocessors;
  };

  static HOST_DEVICE KeySchedule make(const Call& call) {
    const int blocks = call.blocks, group = call.group, pairs = call.sequences * call.kv_heads;
    const bool shares = group > 1 && call.steps > kFewSteps;
    const int most = call.steps < kLongSteps ? kMostHeads : kMostHeadsOfLong;
    int copies = shares && call.falls ? (group - 1) / most + 1 : 1, most_heads = (group - 1) / copies + 1;
    const bool splits = shares || (call.ordered && call.falls && group == 1);
    int fine = splits ? pairs_to_split(call, copies, most_heads) : 0;
    // Where all would be shared out, as of a single KV head, items of two query heads need half the sums of dK and dV.
    const int64_t items_of_two = int64_t{blocks} * pairs * (group / 2);
    if (fine == pairs && call.falls && !call.ordered && group % 2 == 0 &&
        items_of_two >= int64_t{kEnoughItems} * call.multiprocessors) {
      copies = group / 2;
      most_heads = 2;
      fine = 0;
    }
    const int coarse_pairs = (pairs - fine) * copies, fine_pairs = fine * group;
    const int coarse_section = section(call, coarse_pairs, most_heads, call.ordered);
    const int fine_section = section(call, fine_pairs, 1, true);
    // A section that is about one wave of items begins with the longest, which may end last of all. So at the end there
    // are two in one, unless fine items come then.
    const int coarse_last = call.ordered || fine > 0 || coarse_section >= coarse_pairs ? 1 : 2 * coarse_section;
    const bool by_block = call.by_cost || call.ordered;
    return {.coarse = {blocks, call.kv_heads * copies, 0, coarse_pairs, coarse_section,
                       Schedule::whole_sections(coarse_pairs, coarse_section, coarse_last), by_block},
            .fine = {blocks, call.kv_heads * group, (pairs - fine) * group, fine_pairs, fine_section,
                     Schedule::whole_sections(fine_pairs, fine_section, 1), by_block},
            .kv_heads = call.kv_heads,
            .group = group,
            .copies = copies,
            .most_heads = most_heads,
            .alternates = !call.ordered && call.falls && blocks >= kTogether &&
                          kTogether * coarse_section <= call.multiprocessors,
            .ordered = call.ordered,
            .falls = call.falls,
            .multiprocessors = call.multiprocessors};
  }

  HOST_DEVICE int items() const { return coarse.items() + fine.items(); }

  // The number of an item's KV block among those of all KV heads.
  HOST_DEVICE int kv_block(const KeyItem& item) const {
    return (item.sequence * kv_heads + item.kv_head) * coarse.blocks + item.block;
  }

  HOST_DEVICE KeyItem item(int index) const {
    const bool is_coarse = index < coarse.items();
    const Schedule schedule = is_coarse ? coarse : fine;  // first, so that divisions are not compiled twice
    const WorkItem at = schedule.item(is_coarse ? index : index - coarse.items());
    const int shares = is_coarse ? copies : group, heads = is_coarse ? most_heads : 1;
    const int kv_head = shares == 1 ? at.head : quotient(at.head, shares), copy = at.head - kv_head * shares;
    const int first_head = kv_head * group + copy * heads, end_head = first_head + heads, end = (kv_head + 1) * group;
    const bool ascends = ordered ? falls && !is_coarse : schedule.by_cost;
    const bool walks_down = ordered ? ascends : alternates && quotient(index, multiprocessors) % 2 == 0;
    // A Schedule takes later blocks for the costlier ones, and hands them out first.
    return {.block = ordered && !ascends ? at.block : schedule.blocks - 1 - at.block,
            .sequence = at.sequence,
            .kv_head = kv_head,
            .first_head = first_head,
            .end_head = end_head < end ? end_head : end,
            .coarse = is_coarse,
            .copy = copy,
            .direction = walks_down ? -1 : 1,
            .ascends = ascends};
  }

 private:
  // How many pairs make a section, of items of so many query heads: as many as L2 allows, or all of one width, so that
  // the last is no smaller than the others.
  static HOST_DEVICE int section(const Call& call, int pairs, int heads, bool one_width) {
    const auto held = [&](int64_t bytes) { return Schedule::section_pairs(heads * call.head_bytes, 1, bytes); };
    int width = held(call.l2_bytes);
    const int most = call.ordered ? held(call.most_bytes) : INT32_MAX;
    if (call.ordered && heads == 1) {  // two items for each multiprocessor: neighbours begin far enough from each other
      const int enough = quotient(2 * call.multiprocessors, call.blocks) + 1;
      if (width < enough) width = enough < most ? enough : most;
    }
    if (!one_width) return width;
    const auto wide = [&](int sections) { return sections > 1 ? quotient(pairs - 1, sections) + 1 : pairs; };
    const int widest = wide(quotient(pairs, width));
    return widest <= most ? widest : wide(quotient(pairs - 1, width) + 1);
  }

  // How many of the last (sequence, KV head) pairs are shared out.
  static HOST_DEVICE int pairs_to_split(const Call& call, int copies, int most_heads) {
    const int64_t pairs = int64_t{call.sequences} * call.kv_heads, fine_items = int64_t{call.blocks} * call.group;
    const int64_t items = pairs * copies * call.blocks, many = int64_t{kManyItems} * call.multiprocessors;
    if (items > many && !call.ordered) return 0;  // what is lost at the end is little beside so many
    int64_t wanted;
    if (call.falls) {
      // The longest items of the last coarse pairs end while multiprocessors that took the short ones are idle: about
      // as much as one coarse item each. So many pairs become fine items, rounded up, from a fifth where the coarse
      // items that come last are not the longest, and at least one.
      const int64_t items_to_split = int64_t{call.multiprocessors} * most_heads;
      wanted = (5 * items_to_split + (call.ordered ? 5 * fine_items - 1 : 4 * fine_items)) / (5 * fine_items);
      if (wanted == 0) wanted = 1;
    } else {
      // Items cost about the same: a last round that leaves a tenth of the multiprocessors idle.
      const int64_t last_round = items % call.multiprocessors;
      if (last_round == 0 || 10 * last_round >= 9 * call.multiprocessors) return 0;
      wanted = (last_round - 1) / (int64_t{call.blocks} * copies) + 1;
    }
    if (wanted > pairs) wanted = pairs;
    return wanted * fine_items > many ? 0 : static_cast<int>(wanted);
  }
};

}  // namespace flash_attn_ext
