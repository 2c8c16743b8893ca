// Schedules: every item once, a section's memory within L2, and the work of real shapes shared out evenly.
#include "../../csrc/tile/schedule.h"

#include <algorithm>
#include <cstdint>
#include <functional>
#include <map>
#include <numeric>
#include <queue>
#include <vector>

#include "../../csrc/limits.h"
#include "../../csrc/problem.h"
#include "../../csrc/work.h"
#include "check.h"

using namespace flash_attn_ext;

constexpr int kMultiprocessors = 132;

// How many items of the backward are worked on at a time.
static int workers(const BackwardPlan& plan) { return plan.by_pairs ? kMultiprocessors / 2 : kMultiprocessors; }

// ------------------------------------------------------------------------------------------------------- small sizes

static void check_every_item_once(const Schedule& schedule, int sequences, const std::string& name) {
  std::vector<int> visits(sequences * schedule.heads * schedule.blocks);
  for (int index = 0; index < schedule.items(); ++index) {
    const WorkItem at = schedule.item(index);
    const bool inside = at.block >= 0 && at.block < schedule.blocks && at.head >= 0 && at.head < schedule.heads &&
                        at.sequence >= 0 && at.sequence < sequences;
    test::check(inside, name + ": item " + std::to_string(index) + " is outside");
    if (inside) ++visits[(at.sequence * schedule.heads + at.head) * schedule.blocks + at.block];
  }
  for (int i = 0; i < static_cast<int>(visits.size()); ++i) {
    const int pair = i / schedule.blocks - schedule.first_pair;
    const int expected = pair >= 0 && pair < schedule.pairs;
    test::check(visits[i] == expected, name + ": block " + std::to_string(i) + " is not handed out once");
  }
}

// Within a section the cost never rises.
static void check_order(const Schedule& schedule, const std::string& name) {
  for (int index = 1; schedule.by_cost && index < schedule.items(); ++index) {
    const bool begins = index % schedule.blocks == 0 && index / schedule.blocks % schedule.section == 0;
    if (begins && index / schedule.blocks <= schedule.whole) continue;
    test::check(schedule.item(index).block <= schedule.item(index - 1).block, name + ": the cost rises");
  }
}

static void check_small_sizes() {
  for (int blocks : {1, 2, 5}) {
    for (int heads : {1, 2, 6}) {
      for (int sequences : {1, 3}) {
        for (int section : {1, 2, 7, 100}) {
          for (bool by_cost : {false, true}) {
            const int all = heads * sequences;
            for (const Range pairs : {Range{0, all}, {0, all / 2}, {all / 2, all}}) {
              for (int last : {1, 2 * section}) {
                const int count = pairs.end - pairs.begin;
                const Schedule schedule{blocks, heads,   pairs.begin,
                                        count,  section, Schedule::whole_sections(count, section, last),
                                        by_cost};
                const std::string name = std::to_string(blocks) + " blocks, " + std::to_string(heads) + " heads, " +
                                         std::to_string(sequences) + " sequences, pairs " +
                                         std::to_string(pairs.begin) + " to " + std::to_string(pairs.end) +
                                         " in sections of " + std::to_string(section) + ", the last of at least " +
                                         std::to_string(last) + (by_cost ? ", by cost" : "");
                check_every_item_once(schedule, sequences, name);
                check_order(schedule, name);
              }
            }
          }
        }
      }
    }
  }
  test::check(Schedule::section_pairs(1000, 3, 2500) == 6, "two groups of three heads fit");
  test::check(Schedule::section_pairs(1000, 3, 999) == 3, "a group that does not fit is a section");
  test::check(Schedule::section_pairs(0, 1, 32 << 20) == 32 << 20, "nothing to read");
  test::check(Schedule::section_pairs(1, 100, int64_t{1} << 40) == INT32_MAX, "more than an int holds");
  test::check(Schedule::even_section(32, 1000, 1, 10000) == 8, "32 in sections of 10 at most: 8 in each of 4");
  test::check(Schedule::even_section(21, 1000, 3, 2500) == 6, "7 groups of 3, two a section");
  test::check(Schedule::even_section(9, 1000, 3, 2500) == 6, "3 groups: two sections, of one and two");
  test::check(Schedule::even_section(20, 1000, 5, 999) == 5, "a group that does not fit");
  test::check(Schedule::whole_sections(8, 3, 1) == 6 && Schedule::whole_sections(9, 3, 1) == 6, "the rest is last");
  test::check(Schedule::whole_sections(9, 3, 6) == 3 && Schedule::whole_sections(8, 3, 6) == 0, "two sections in one");
  test::check(Schedule::whole_sections(3, 3, 1) == 0 && Schedule::whole_sections(0, 3, 1) == 0, "one section");
  test::check(Schedule::even_section(0, 1000, 3, 2500) >= 1 && Schedule::even_section(4, 0, 2, 2500) >= 4,
              "one section");
}

// Each block of keys meets each query head of its KV head once; the copies are numbered from 0, and an item that has a
// KV head to itself has all of its query heads.
static void check_keys(int blocks, int kv_heads, int sequences, int group, bool by_cost, int multiprocessors) {
  const KeySchedule schedule = KeySchedule::make({.blocks = blocks,
                                                  .kv_heads = kv_heads,
                                                  .sequences = sequences,
                                                  .group = group,
                                                  .steps = 10,
                                                  .by_cost = by_cost,
                                                  .falls = by_cost,
                                                  .head_bytes = 1000,
                                                  .l2_bytes = 5000,
                                                  .multiprocessors = multiprocessors});
  const std::string name = std::to_string(blocks) + " blocks, " + std::to_string(kv_heads) + " KV heads of " +
                           std::to_string(group) + " query heads, " + std::to_string(sequences) + " sequences, " +
                           std::to_string(multiprocessors) + " multiprocessors" + (by_cost ? ", by cost" : "");
  const int heads = kv_heads * group;
  std::vector<int> visits(sequences * heads * blocks);
  std::vector<std::vector<int>> copies(sequences * kv_heads * blocks);
  for (int index = 0; index < schedule.items(); ++index) {
    const KeyItem at = schedule.item(index);
    const int kv_block = (at.sequence * kv_heads + at.kv_head) * blocks + at.block;
    const int walked = at.end_head - at.first_head;
    const bool inside = at.block >= 0 && at.block < blocks && at.sequence >= 0 && at.sequence < sequences &&
                        at.kv_head >= 0 && at.kv_head < kv_heads && at.first_head >= at.kv_head * group &&
                        at.end_head <= (at.kv_head + 1) * group;
    test::check(inside && walked >= 1 && (!by_cost || walked <= KeySchedule::kMostHeads),
                name + ": an item is outside");
    if (!inside) continue;
    for (int head = at.first_head; head < at.end_head; ++head) {
      ++visits[(at.sequence * heads + head) * blocks + at.block];
    }
    copies[kv_block].push_back(at.copy);
    test::check(at.coarse || walked == 1, name + ": a fine item has one query head");
    test::check(!at.coarse || schedule.copies > 1 || walked == group, name + ": an item has its KV head to itself");
    // As the workspace counts them: coarse KV heads first, then fine ones.
    const int coarse_blocks = schedule.coarse.items() / schedule.copies;
    test::check(at.coarse == (kv_block / blocks < coarse_blocks / blocks), name + ": fine KV heads are the last");
  }
  test::check(std::ranges::all_of(visits, [](int n) { return n == 1; }), name + ": a head is not walked once");
  for (auto& of_block : copies) {
    std::ranges::sort(of_block);
    bool numbered = of_block.size() == static_cast<size_t>(schedule.copies) ||
                    of_block.size() == static_cast<size_t>(schedule.group);
    for (size_t i = 0; i < of_block.size(); ++i) numbered &= of_block[i] == static_cast<int>(i);
    test::check(numbered, name + ": copies are numbered");
  }
}

static void check_small_key_schedules() {
  for (int blocks : {1, 2, 5}) {
    for (int kv_heads : {1, 3}) {
      for (int sequences : {1, 2}) {
        for (int group : {1, 2, 4, 5, 7, 8, 9, 32}) {
          for (bool by_cost : {false, true}) {
            for (int multiprocessors : {1, 7, 132}) {
              check_keys(blocks, kv_heads, sequences, group, by_cost, multiprocessors);
            }
          }
        }
      }
    }
  }
}

// ------------------------------------------------------------------------------------------------------- real shapes

// What an item costs, in steps of its main loop, in the order in which items are handed out. Its beginning and end take
// about one more; with dK and dV in float32, two.
using Costs = std::vector<int64_t>;

static Costs forward_costs(const Problem& problem, const ForwardPlan& plan, const Schedule& schedule) {
  Costs costs;
  for (int index = 0; index < schedule.items(); ++index) {
    const WorkItem item = schedule.item(index);
    const Sequence sequence = problem.sequences().at(item.sequence);
    const Range blocks = sequence.blocks(item.block * plan.block_q, plan.block_q, plan.block_kv);
    costs.push_back(1 + blocks.end - blocks.begin);
  }
  return costs;
}

static Costs backward_costs(const Problem& problem, const BackwardPlan& plan, const KeySchedule& schedule) {
  Costs costs;
  for (int index = 0; index < schedule.items(); ++index) {
    const KeyItem item = schedule.item(index);
    const Sequence keys = problem.sequences().transposed().at(item.sequence);
    const Range blocks = keys.blocks(item.block * plan.block_kv, plan.block_kv, plan.block_q);
    const bool complete = item.end_head - item.first_head == schedule.group;
    costs.push_back((complete ? 1 : 2) + (item.end_head - item.first_head) * (blocks.end - blocks.begin));
  }
  return costs;
}

// The time until all is done, when each multiprocessor takes the next item as soon as it is done with one.
static int64_t makespan(const Costs& costs, int workers) {
  std::priority_queue<int64_t, Costs, std::greater<>> busy_until;
  for (int i = 0; i < workers; ++i) busy_until.push(0);
  int64_t end = 0;
  for (int64_t cost : costs) {
    const int64_t done = busy_until.top() + cost;
    busy_until.pop();
    busy_until.push(done);
    end = std::max(end, done);
  }
  return end;
}

// No order is done before all multiprocessors have done their share, nor before the longest item is.
static double ideal(const Costs& costs, int workers) {
  const double share = static_cast<double>(std::accumulate(costs.begin(), costs.end(), int64_t{0})) / workers;
  return std::max(share, static_cast<double>(*std::ranges::max_element(costs)));
}

static void check_balance(const std::string& name, const Costs& costs, int workers = kMultiprocessors) {
  const auto [shortest, longest] = std::ranges::minmax(costs);
  if (shortest == longest) return;  // items that all cost the same take as many rounds in any order
  // Items are whole, and so are steps: few items a multiprocessor, or few steps an item, are a few percent by
  // themselves. When the last item, the shortest, is taken, all multiprocessors still do the others.
  const int64_t others = std::accumulate(costs.begin(), costs.end(), int64_t{0}) - shortest;
  const int64_t limit = std::max(static_cast<int64_t>(1.03 * ideal(costs, workers)), others / workers + shortest);
  const int64_t time = makespan(costs, workers);
  test::check(time <= limit,
              name + ": takes " + std::to_string(time) + " steps of " + std::to_string(ideal(costs, workers)));
}

// Any number of heads, not only the papers' powers of two: the last section must not leave one wave's longest items for
// the end.
static void check_numbers_of_heads() {
  for (const HeadDimLimits& row : kLimits) {
    for (int64_t seqlen : {2048, 4096, 8192, 16384}) {
      double loss = 0;
      int count = 0;
      for (int64_t heads = 8; heads <= 48; ++heads, ++count) {
        const Problem problem{1,     seqlen,       seqlen,           heads,
                              heads, row.head_dim, DType::kBFloat16, {.softmax_scale = {}, .causal = true}};
        const int pairs = workers(row.backward);
        const Costs costs = backward_costs(problem, row.backward, backward_schedule(problem, row.backward, pairs));
        const double took = static_cast<double>(makespan(costs, pairs)) / ideal(costs, pairs);
        test::check(took <= 1.2, std::to_string(heads) + " heads of " + std::to_string(row.head_dim) + ", " +
                                     std::to_string(seqlen) + ": takes " + std::to_string(took));
        loss += took - 1;
      }
      const double mean = loss / count, limit = seqlen < 8192 ? 0.06 : 0.02;
      test::check(mean <= limit, std::to_string(row.head_dim) + ", " + std::to_string(seqlen) + ": " +
                                     std::to_string(mean) + " is lost on the average");
    }
  }
}

// What sharing costs in memory: the float32 sums of dK and dV beside those of dQ, in bytes.
static int64_t shared_bytes(const Problem& problem, const BackwardPlan& plan) {
  const KeySchedule schedule = backward_schedule(problem, plan, kMultiprocessors);
  const int64_t coarse = schedule.copies == 1 ? 0 : schedule.coarse.items();
  return (coarse + schedule.fine.items()) * 2 * plan.block_kv * problem.head_dim * 4;
}

static void check_sharing_is_bounded() {
  const auto problem = [](int64_t heads, int64_t kv_heads, int64_t seqlen_q, int64_t seqlen_k, bool causal) {
    return Problem{1,        seqlen_q, seqlen_k,         heads,
                   kv_heads, 128,      DType::kBFloat16, {.softmax_scale = {}, .causal = causal}};
  };
  constexpr BackwardPlan kPlan = kLimits[1].backward;
  for (bool causal : {false, true}) {
    test::check(shared_bytes(problem(32, 1, 128, 32768, causal), kPlan) == 0, "few query rows are not worth sharing");
    test::check(shared_bytes(problem(64, 8, 1024, 131072, causal), kPlan) == 0, "nor a long past");
    test::check(shared_bytes(problem(64, 8, 8192, 8192, causal), kPlan) <= 8192 * 64 * 128 * 4, "at most dQ's sums");
  }
  test::check(shared_bytes(problem(32, 1, 8192, 8192, true), kPlan) == 16 * 2 * int64_t{8192} * 128 * 4,
              "a single KV head: a copy of dK and dV for every two query heads");
  test::check(shared_bytes(problem(32, 1, 2048, 2048, true), kPlan) == 32 * 2 * int64_t{2048} * 128 * 4,
              "for every one where there are few items");
  test::check(shared_bytes(problem(32, 1, 32768, 32768, true), kPlan) <= int64_t{32768} * 32 * 128 * 4,
              "at most dQ's sums, for a long sequence too");
}

// Of a causal call's waves of items the first walks down, the next up, and so on.
static void check_directions() {
  const Problem problem{1, 16384, 16384, 16, 16, 128, DType::kBFloat16, {.softmax_scale = {}, .causal = true}};
  const KeySchedule schedule = backward_schedule(problem, kLimits[1].backward, kMultiprocessors);
  for (int index = 0; index < schedule.items(); ++index) {
    const int expected = index / kMultiprocessors % 2 == 0 ? -1 : 1;
    test::check(schedule.item(index).direction == expected, "direction of item " + std::to_string(index));
  }
  Problem full = problem, brief = problem;
  full.options.causal = false;
  brief.batch = 32;
  brief.seqlen_q = brief.seqlen_k = 512;
  for (const Problem& up : {full, brief}) {
    const KeySchedule schedule = backward_schedule(up, kLimits[1].backward, kMultiprocessors);
    test::check(schedule.item(0).direction == 1, "where it does not matter to L2, rows are walked up");
  }
}

// ------------------------------------------------------------------------------------------------- deterministic calls

// A step of an item: which rows of which head it adds to, and which item must have added to them before; -1: none.
struct OrderedStep {
  int sums, before;
};

// The steps of every item of a dense call, walked as the kernels walk them. Whoever is waited for must have been handed
// out before, or the thread blocks could wait for each other forever.
static std::vector<std::vector<OrderedStep>> ordered_steps(const Problem& problem, const BackwardPlan& plan,
                                                           const KeySchedule& schedule, const std::string& name) {
  const Sequences rows = backward_sequences(problem), keys = rows.transposed();
  const int heads = static_cast<int>(problem.heads);
  std::vector<std::vector<int>> added(rows.block_count(heads, plan.block_q));  // by whom, turn by turn
  std::vector<std::vector<OrderedStep>> steps;
  for (int index = 0; index < schedule.items(); ++index) {
    const KeyItem item = schedule.item(index);
    const Range blocks = keys.at(item.sequence).blocks(item.block * plan.block_kv, plan.block_kv, plan.block_q);
    auto& of_item = steps.emplace_back();
    for (int head = item.first_head; head < item.end_head; ++head) {
      for (int i = 0; i < blocks.end - blocks.begin; ++i) {
        const int block = item.direction > 0 ? blocks.begin + i : blocks.end - 1 - i;
        const int turn = find_turn(rows.at(item.sequence), block * plan.block_q, plan.block_q, item.block,
                                   plan.block_kv, item.ascends);
        const int sums = rows.first_block(item.sequence, head, heads, plan.block_q) + block;
        const int turns = static_cast<int>(added[sums].size());
        test::check(turn == turns, name + ": an item is handed out before one that it must wait for");
        of_item.push_back({sums, turns > 0 ? added[sums].back() : -1});
        added[sums].push_back(index);
      }
    }
  }
  return steps;
}

// The time until all is done, where an item that adds sees what another has added so many steps later.
static double ordered_makespan(const std::vector<std::vector<OrderedStep>>& items, int workers, double delay) {
  struct Event {
    double time;
    int item, step;
    bool operator>(const Event& other) const { return time > other.time; }
  };
  std::priority_queue<Event, std::vector<Event>, std::greater<>> events;
  std::map<std::pair<int, int>, double> added;  // when, by item and sums
  std::map<std::pair<int, int>, Event> waiting;
  double end = 0;
  int next = 0;
  const auto start = [&](double time) {  // one more step for the item's beginning and end
    while (next < static_cast<int>(items.size()) && items[next].empty()) ++next;
    if (next < static_cast<int>(items.size())) events.push({time + 2, next++, 0});
  };
  for (int i = 0; i < workers; ++i) start(0);
  while (!events.empty()) {
    Event event = events.top();
    events.pop();
    const auto [sums, before] = items[event.item][event.step];
    if (before >= 0) {
      const auto seen = added.find({before, sums});
      if (seen == added.end()) {
        waiting.insert({{before, sums}, event});
        continue;
      }
      if (seen->second + delay > event.time) {
        events.push({seen->second + delay, event.item, event.step});
        continue;
      }
    }
    added[{event.item, sums}] = end = event.time;
    if (const auto waiter = waiting.find({event.item, sums}); waiter != waiting.end()) {
      events.push(waiter->second);
      waiting.erase(waiter);
    }
    if (event.step + 1 < static_cast<int>(items[event.item].size())) {
      events.push({event.time + 1, event.item, event.step + 1});
    } else {
      start(event.time);
    }
  }
  test::check(waiting.empty(), "thread blocks wait for each other");
  return end;
}

static void check_ordered(int64_t heads, int64_t kv_heads, int head_dim, int64_t batch, int64_t seqlen, bool causal,
                          double limit) {
  const std::string name = std::to_string(heads) + "/" + std::to_string(kv_heads) + " heads of " +
                           std::to_string(head_dim) + ", " + std::to_string(batch) + " x " + std::to_string(seqlen) +
                           (causal ? ", causal" : ", full") + ", deterministic";
  Problem problem{batch,    seqlen,   seqlen,           heads,
                  kv_heads, head_dim, DType::kBFloat16, {.softmax_scale = {}, .causal = causal}};
  with_limits(head_dim, [&]<std::size_t row>() {
    constexpr BackwardPlan kPlan = kLimits[row].backward;
    const Costs costs = backward_costs(problem, kPlan, backward_schedule(problem, kPlan, workers(kPlan)));
    problem.options.deterministic = true;
    const KeySchedule schedule = backward_schedule(problem, kPlan, workers(kPlan));
    const double time = ordered_makespan(ordered_steps(problem, kPlan, schedule, name), workers(kPlan), 1.5);
    const auto usual = static_cast<double>(makespan(costs, workers(kPlan)));
    test::check(time <= limit * usual, name + ": takes " + std::to_string(time / usual) + " of the usual time");
  });
}

// However far apart neighbours should begin, a section's heads fit L2.
static void check_ordered_sections() {
  for (int head_dim = kHeadDimStep; head_dim <= 256; head_dim += kHeadDimStep) {
    for (int64_t seqlen : {1000, 4096, 10000, 16384, 24576, 65536}) {
      for (int64_t heads : {8, 10, 11, 14, 16, 21, 32}) {
        for (int64_t group : {int64_t{1}, heads % 2 == 0 ? 2 : heads}) {
          for (bool causal : {false, true}) {
            const Problem problem{1,
                                  seqlen,
                                  seqlen,
                                  heads,
                                  heads / group,
                                  head_dim,
                                  DType::kBFloat16,
                                  {.softmax_scale = {}, .causal = causal, .deterministic = true}};
            with_limits(head_dim, [&]<std::size_t row>() {
              constexpr BackwardPlan kPlan = kLimits[row].backward;
              const KeySchedule schedule = backward_schedule(problem, kPlan, workers(kPlan));
              const int64_t head_bytes = seqlen * (4 * head_dim + 4 * kLimits[row].head_dim);
              const auto fits = [&](const Schedule& part, int of_item) {
                const int section = std::min(part.section, part.pairs);
                return section <= 1 || section * of_item * head_bytes <= kMostL2Bytes;
              };
              test::check(fits(schedule.coarse, schedule.most_heads) && fits(schedule.fine, 1),
                          std::to_string(heads) + " heads of " + std::to_string(head_dim) + ", " +
                              std::to_string(seqlen) + ": a section is larger than L2");
            });
          }
        }
      }
    }
  }
}

static void check_ordered_schedules() {
  for (const HeadDimLimits& row : kLimits) {
    const int64_t heads = 2048 / row.head_dim;
    for (bool causal : {false, true}) {
      for (int64_t seqlen : {4096, 16384}) {
        check_ordered(heads, heads, row.head_dim, 16384 / seqlen, seqlen, causal, 1.06);
      }
    }
    check_ordered(2 * heads, heads / 2, row.head_dim, 1, 8192, true, 1.1);
  }
  // Lengths, masks and groups of all kinds: only the order matters.
  for (int64_t seqlen_q : {1, 64, 65, 300, 1000}) {
    for (int64_t seqlen_k : {1, 128, 129, 500, 1000}) {
      for (int64_t kv_heads : {1, 2, 6}) {
        for (int64_t window : {-1, 0, 100, 300}) {
          for (bool causal : {false, true}) {
            const Problem problem{
                2,
                seqlen_q,
                seqlen_k,
                6,
                kv_heads,
                128,
                DType::kBFloat16,
                {.softmax_scale = {}, .causal = causal, .window_left = window, .deterministic = true}};
            const BackwardPlan plan = kLimits[1].backward;
            for (int multiprocessors : {1, 7, 132}) {
              const KeySchedule schedule = backward_schedule(problem, plan, multiprocessors);
              const auto steps = ordered_steps(problem, plan, schedule, "a small call");
              ordered_makespan(steps, multiprocessors, 1);
            }
          }
        }
      }
    }
  }
}

static void check_shape(int64_t heads, int64_t kv_heads, int head_dim, int64_t batch, int64_t seqlen, bool causal) {
  const Problem problem{batch,    seqlen,   seqlen,           heads,
                        kv_heads, head_dim, DType::kBFloat16, {.softmax_scale = {}, .causal = causal}};
  const std::string name = std::to_string(heads) + "/" + std::to_string(kv_heads) + " heads of " +
                           std::to_string(head_dim) + ", " + std::to_string(batch) + " x " + std::to_string(seqlen) +
                           (causal ? ", causal" : ", full");
  const bool found = with_limits(head_dim, [&]<std::size_t row>() {
    constexpr ForwardPlan kForward = kLimits[row].forward;
    constexpr BackwardPlan kBackward = kLimits[row].backward;
    check_balance(name + ", forward", forward_costs(problem, kForward, forward_schedule(problem, kForward)));
    if constexpr (constexpr ForwardPlan kShort = kLimits[row].short_forward; kShort.built()) {
      if (has_short_forward(problem, kLimits[row], kMultiprocessors)) {
        check_balance(name + ", short forward", forward_costs(problem, kShort, forward_schedule(problem, kShort)));
      }
    }
    if constexpr (kBackward.built()) {
      const KeySchedule backward = backward_schedule(problem, kBackward, workers(kBackward));
      check_balance(name + ", backward", backward_costs(problem, kBackward, backward), workers(kBackward));
      test::check(heads != kv_heads || backward.fine.items() == 0, name + ": nothing to share out");
    }
  });
  test::check(found, name + ": no such head dim");
}

// Sliding windows: the forward's items cost what their rows see, and nothing for the rest.
static void check_window(const HeadDimLimits& row, int64_t batch, int64_t seqlen, int window) {
  const Problem problem{
      batch, seqlen,       seqlen,           32,
      8,     row.head_dim, DType::kBFloat16, {.softmax_scale = {}, .causal = true, .window_left = window}};
  const std::string name = "heads of " + std::to_string(row.head_dim) + ", " + std::to_string(batch) + " x " +
                           std::to_string(seqlen) + ", window " + std::to_string(window);
  const ForwardPlan& plan = row.forward;
  const Costs costs = forward_costs(problem, plan, forward_schedule(problem, plan));
  const int most = (plan.block_q + window - 1) / plan.block_kv + 2;  // blocks that so many keys can touch
  test::check(*std::ranges::max_element(costs) <= 1 + most, name + ": blocks outside are visited");
  if (window > 128) check_balance(name, costs);  // else items of few steps each, as whole as they are
}

// Packed sequences: every tile of 64 rows once, and the work of causal packings shared out evenly though the launch
// does not know the lengths. An item costs what its tiles see, sequence by sequence.
static void check_packing(const std::string& what, const std::vector<int>& sizes) {
  std::vector<int> cu_seqlens{0};
  for (int size : sizes) cu_seqlens.push_back(cu_seqlens.back() + size);
  const int64_t total = cu_seqlens.back(), heads = 32;
  for (const HeadDimLimits& row : kLimits) {
    const ForwardPlan& plan = row.forward;
    const Problem problem{static_cast<int64_t>(sizes.size()),
                          total,
                          total,
                          heads,
                          8,
                          row.head_dim,
                          DType::kBFloat16,
                          {.softmax_scale = {}, .causal = true},
                          {.cu_seqlens_q = cu_seqlens.data(), .cu_seqlens_k = cu_seqlens.data()}};
    const std::string name = what + " of " + std::to_string(total) + " rows, head dim " + std::to_string(row.head_dim);
    const Schedule schedule = forward_schedule(problem, plan);
    const Sequences sequences = problem.sequences();
    std::vector<int> visits(sequences.block_count(heads, 64));
    Costs costs;
    int tiles = 0;
    for (int index = 0; index < schedule.items(); ++index) {
      const WorkItem item = schedule.item(index);
      int cost = 0, sequence = -1, last_block = 0;
      for (int i = 0; i < plan.consumers(); ++i) {
        const Block at = sequences.locate_packed(item.block * plan.consumers() + i, item.head, 64);
        if (at.index < 0 || at.index * 64 >= sequences.stored_rows(at.sequence)) continue;  // a hole
        ++tiles;
        ++visits[sequences.first_block(at.sequence, at.head, heads, 64) + at.index];
        const Range blocks = sequences.at(at.sequence).blocks(at.index * 64, 64, plan.block_kv);
        cost += blocks.end - (at.sequence == sequence ? last_block : blocks.begin);
        sequence = at.sequence;
        last_block = blocks.end;
      }
      if (cost > 0) costs.push_back(1 + cost);
    }
    int64_t expected = 0;
    for (int size : sizes) expected += heads * ((size + 63) / 64);
    test::check(tiles == expected, name + ": as many tiles as there are");
    test::check(std::ranges::all_of(visits, [](int n) { return n <= 1; }), name + ": a tile is handed out twice");
    check_balance(name, costs);
  }
}

// A thread block claims several items at once where packed sequences are short.
static void check_claims() {
  constexpr ForwardPlan kPlan = {.block_q = 128, .block_kv = 128, .stages = 2};
  const int cu_seqlens[1] = {};
  const auto claims = [&](int64_t sequences, int64_t rows, const int* starts) {
    return most_claims({sequences,
                        sequences * rows,
                        sequences * rows,
                        4,
                        4,
                        128,
                        DType::kBFloat16,
                        {},
                        {.cu_seqlens_q = starts, .cu_seqlens_k = starts}},
                       kPlan);
  };
  for (int64_t rows : {1, 64, 127}) test::check(claims(1000, rows, cu_seqlens) == kMostClaims, "short sequences");
  for (int64_t rows : {128, 256}) test::check(claims(10, rows, cu_seqlens) < kMostClaims, "longer sequences");
  for (int64_t rows : {512, 100000}) test::check(claims(3, rows, cu_seqlens) == 1, "long sequences");
  test::check(claims(1000, 1, nullptr) == 1, "dense sequences");
}

static void check_packings() {
  for (int total : {16384, 65536}) {
    check_packing("equal sequences", std::vector<int>(total / 2048, 2048));
    check_packing("short sequences", std::vector<int>(total / 64, 64));
    std::vector<int> long_tailed;
    for (int left = total, i = 0; left > 0; ++i) {  // 64 to 8192, the longest last, first and in between
      long_tailed.push_back(std::min(left, 64 << (5 * i + 7) % 8));
      left -= long_tailed.back();
    }
    check_packing("a long tail", long_tailed);
    std::ranges::reverse(long_tailed);
    check_packing("a long tail from behind", long_tailed);
  }
}

// Every row of every head meets every key once, in a tile of its KV head.
static void check_division(const Problem& problem, const ForwardPlan& plan) {
  const Division division = divide(problem, plan, kMultiprocessors);
  const Schedule schedule = forward_schedule(problem, plan, division);
  const int heads = static_cast<int>(problem.heads), batch = static_cast<int>(problem.batch);
  const int rows = static_cast<int>(problem.seqlen_q), keys = static_cast<int>(problem.seqlen_k);
  const int tile_rows = 1 << division.tile_rows_log2, parts = division.parts;
  const std::string name = std::to_string(heads) + "/" + std::to_string(problem.kv_heads) + " heads of " +
                           std::to_string(problem.head_dim) + ", " + std::to_string(batch) + " x " +
                           std::to_string(rows) + " rows, " + std::to_string(keys) + " keys";
  test::check(division.heads * tile_rows == 64, name + ": a tile has 64 rows");
  test::check(problem.heads_per_kv_head() % division.heads == 0, name + ": the heads of a tile have one KV head");
  if (parts > 1) {
    const int part_keys = division.part_keys;
    test::check(part_keys % plan.block_kv == 0 && (parts - 1) * part_keys < keys && parts * int64_t{part_keys} >= keys,
                name + ": the parts are no blocks of keys, or not all keys");
    test::check(division.part_values == int64_t{batch} * heads * rows, name + ": a part's values");
  }
  std::vector<int> visits(int64_t{batch} * parts * heads * rows);
  for (int index = 0; index < schedule.items(); ++index) {
    const WorkItem at = schedule.item(index);
    for (int row = at.block * plan.consumers() * tile_rows; row < (at.block + 1) * plan.consumers() * tile_rows;
         ++row) {
      for (int head = at.head * division.heads; row < rows && head < (at.head + 1) * division.heads; ++head) {
        ++visits[(int64_t{at.sequence} * heads + head) * rows + row];
      }
    }
  }
  test::check(std::count(visits.begin(), visits.end(), 1) == std::ssize(visits),
              name + ": a row's keys are not met once");
}

static void check_divisions() {
  for (const HeadDimLimits& row : kLimits) {
    for (const ForwardPlan& plan : {row.forward, row.short_forward}) {
      if (!plan.built()) continue;
      for (int64_t seqlen_q : {1, 17, 64, 131, 300, 2000}) {
        for (int64_t seqlen_k : {1, 131, 500, 2049, 8192, 70001}) {
          for (auto [heads, kv_heads] : {std::pair{1, 1}, {6, 2}, {12, 3}, {16, 2}, {32, 2}}) {
            for (int64_t batch : {1, 3, 32}) {
              check_division({.batch = batch,
                              .seqlen_q = seqlen_q,
                              .seqlen_k = seqlen_k,
                              .heads = heads,
                              .kv_heads = kv_heads,
                              .head_dim = row.head_dim,
                              .dtype = DType::kBFloat16},
                             plan);
            }
          }
        }
      }
    }
  }

  const auto division = [](int64_t batch, int64_t rows, int64_t keys, int64_t heads, int64_t kv_heads,
                           Options options = {}, Lengths lengths = {}) {
    const Problem problem{.batch = batch,
                          .seqlen_q = rows,
                          .seqlen_k = keys,
                          .heads = heads,
                          .kv_heads = kv_heads,
                          .head_dim = 128,
                          .dtype = DType::kBFloat16,
                          .options = options,
                          .lengths = lengths};
    return divide(problem, forward_plan(problem, kMultiprocessors), kMultiprocessors);
  };
  test::check(division(32, 131, 131, 16, 2).heads == 8, "few rows of a large group share tiles");
  test::check(division(32, 131, 131, 16, 16).heads == 1, "heads with K and V of their own do not");
  const Problem wide{1, 997, 3001, 4, 2, 256, DType::kBFloat16, {}};
  test::check(divide(wide, forward_plan(wide, kMultiprocessors), kMultiprocessors).parts == 4, "until none is idle");
  test::check(division(1, 512, 8192, 16, 16).parts == 2, "keys are shared out where multiprocessors are idle");
  test::check(division(1, 300, 1500, 4, 4).parts == 6, "and not only many keys");
  const int most = division(1, 64, 70001, 1, 1).parts;
  test::check(most > 8 && most <= 16, "but not into more parts than pay");
  const int lengths[2] = {0, 131};
  for (const Division& none :
       {division(32, 512, 512, 16, 16), division(4, 4096, 4096, 32, 8), division(1, 8192, 8192, 32, 8),
        division(32, 131, 131, 16, 2, {.causal = true}), division(32, 131, 131, 16, 2, {.window_left = 7}),
        division(32, 131, 131, 16, 2, {.softcap = 30}),
        division(1, 131, 131, 16, 2, {}, {.cu_seqlens_q = lengths, .cu_seqlens_k = lengths}),
        division(1, 131, 131, 16, 2, {}, {.seqused_k = lengths})}) {
    test::check(!none.is_any(), "a call is divided that need not be, or must not");
  }
}

// The plan for few keys, where there is one, is taken where it fills multiprocessors. All of these were measured.
static void check_short_plans() {
  struct Call {
    int64_t batch, rows, heads;
    bool causal, is_short;
  };
  constexpr Call kCalls[] = {
      {1, 1301, 16, false, false}, {1, 512, 32, false, false}, {1, 1024, 16, false, false}, {1, 3001, 8, false, false},
      {1, 2048, 16, false, true},  {4, 1021, 32, false, true}, {32, 512, 32, false, true},  {4, 4096, 32, false, true},
      {1, 1301, 16, true, false},  {1, 512, 32, true, false},  {1, 1024, 32, true, false},  {1, 2053, 16, true, false},
      {1, 4096, 8, true, false},   {1, 2048, 32, true, true},  {2, 2053, 64, true, true},   {4, 2048, 64, true, true},
      {1, 8192, 64, true, false},
  };
  for (const auto& [batch, rows, heads, causal, is_short] : kCalls) {
    const Problem problem{batch, rows, rows, heads, heads, 64, DType::kFloat16, {.causal = causal}};
    const ForwardPlan plan = forward_plan(problem, kMultiprocessors);
    const int block_q = is_short ? kLimits[0].short_forward.block_q : kLimits[0].forward.block_q;
    test::check(plan.block_q == block_q, std::to_string(batch) + " x " + std::to_string(heads) + " heads of " +
                                             std::to_string(rows) + " rows: another plan is faster");
  }
}

static void check_real_shapes() {
  struct Heads {
    int64_t heads, kv_heads;
  };
  struct Tokens {
    int64_t batch, seqlen;
  };
  constexpr Tokens kOneLong{1, 8192}, kTwo{2, 4096}, kFour{4, 2048}, kLongest{1, 32768};
  for (const auto& [heads, kv_heads] : {Heads{32, 8}, {64, 8}, {28, 4}, {40, 8}, {32, 1}}) {
    for (const auto& [batch, seqlen] : {kOneLong, kTwo, kFour, kLongest}) {
      check_shape(heads, kv_heads, 128, batch, seqlen, true);
    }
  }
  check_shape(32, 8, 128, 1, 2048, true);
  check_shape(40, 10, 128, 1, 4096, true);  // 2.4 rounds of items: a split evens them out
  for (const auto& [batch, seqlen] : {kOneLong, kTwo, kFour}) check_shape(64, 8, 64, batch, seqlen, true);
  for (const auto& [heads, kv_heads] : {Heads{8, 4}, {16, 8}}) {
    for (const auto& [batch, seqlen] : {kOneLong, kTwo}) check_shape(heads, kv_heads, 256, batch, seqlen, true);
  }
  for (const auto& [batch, seqlen] : {kOneLong, kTwo, kFour, kLongest}) {
    for (int window : {128, 1024, 4096}) {
      for (const HeadDimLimits& row : kLimits) check_window(row, batch, seqlen, window);
    }
  }
  for (const auto& [batch, seqlen] : {kOneLong, kTwo, kFour}) {
    check_shape(32, 8, 96, batch, seqlen, true);
    check_shape(16, 4, 192, batch, seqlen, true);
  }
  // The papers' grid.
  for (int head_dim : {64, 128, 256}) {
    for (int64_t seqlen = 512; seqlen <= 16384; seqlen *= 2) {
      for (bool causal : {false, true}) {
        check_shape(2048 / head_dim, 2048 / head_dim, head_dim, 16384 / seqlen, seqlen, causal);
      }
    }
  }
}

// Each head dim belongs to the first row that is as large, if it is a multiple of the step.
static void check_rows() {
  for (int64_t head_dim = -8; head_dim <= kLimits[std::size(kLimits) - 1].head_dim + 16; ++head_dim) {
    std::size_t expected = 0;
    while (expected < std::size(kLimits) && kLimits[expected].head_dim < head_dim) ++expected;
    std::size_t found = std::size(kLimits);
    int rows = 0;
    with_limits(head_dim, [&]<std::size_t row>() { found = row, ++rows; });
    const bool runs = head_dim > 0 && head_dim % kHeadDimStep == 0 && expected < std::size(kLimits);
    test::check(rows == (runs ? 1 : 0) && (!runs || found == expected), "the row of " + std::to_string(head_dim));
  }
}

// Pairs of thread blocks take item after item where these have few steps, and never where they wait for each other.
static void check_persistent_pairs() {
  for (const HeadDimLimits& row : kLimits) {
    const BackwardPlan& plan = row.backward;
    const int64_t most_rows = int64_t{plan.block_q} * std::min(plan.persistent_steps, 2048);
    const auto persists = [&](int64_t seqlen, int64_t group, bool deterministic) {
      const Problem problem{2,
                            seqlen,
                            seqlen,
                            4,
                            4 / group,
                            row.head_dim,
                            DType::kBFloat16,
                            {.softmax_scale = {}, .causal = true, .deterministic = deterministic}};
      return is_persistent(problem, plan, backward_schedule(problem, plan, workers(plan)));
    };
    const std::string name = "head dim " + std::to_string(row.head_dim) + ": pairs that take item after item";
    test::check(persists(1, 1, false) == plan.by_pairs, name);
    test::check(!persists(1, 1, true), name + ", in turn");
    if (most_rows > 100000) test::check(persists(131072, 4, false), name + " of any number of steps");
    if (!plan.by_pairs || most_rows > 100000) continue;
    test::check(persists(most_rows, 1, false) && persists(most_rows / 2, 2, false), name + " of few steps");
    test::check(!persists(most_rows + 1, 1, false) && !persists(most_rows, 2, false), name + " of many steps");
  }
}

int main() {
  check_rows();
  check_small_sizes();
  check_small_key_schedules();
  check_divisions();
  check_short_plans();
  check_real_shapes();
  check_numbers_of_heads();
  check_claims();
  check_packings();
  check_sharing_is_bounded();
  check_directions();
  check_ordered_sections();
  check_ordered_schedules();
  check_persistent_pairs();
  return test::finish("schedule");
}
