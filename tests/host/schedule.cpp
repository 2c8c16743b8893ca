// Schedules: every item once, a section's memory within L2, and the work of real shapes shared out evenly.
#include "../../csrc/tile/schedule.h"

#include <algorithm>
#include <cstdint>
#include <functional>
#include <numeric>
#include <queue>
#include <vector>

#include "../../csrc/limits.h"
#include "../../csrc/problem.h"
#include "../../csrc/work.h"
#include "check.h"

using namespace flash_attn_ext;

constexpr int kMultiprocessors = 132;

// ------------------------------------------------------------------------------------------------------- small sizes

static void check_every_item_once(const Schedule& schedule, const Schedule::Call& call, const std::string& name) {
  std::vector<int> visits(schedule.items());
  for (int index = 0; index < schedule.items(); ++index) {
    const WorkItem at = schedule.item(index);
    const bool inside = at.block >= 0 && at.block < call.blocks && at.head >= 0 && at.head < call.heads &&
                        at.sequence >= 0 && at.sequence < call.sequences;
    test::check(inside, name + ": item " + std::to_string(index) + " is outside");
    if (inside) ++visits[(at.sequence * call.heads + at.head) * call.blocks + at.block];
  }
  test::check(std::ranges::all_of(visits, [](int n) { return n == 1; }), name + ": an item is not handed out once");
  test::check(schedule.items() == call.blocks * call.heads * call.sequences, name + ": number of items");
}

// The sections of a schedule as ranges of items.
static std::vector<Range> sections(const Schedule& schedule) {
  std::vector<Range> found;
  for (int pair = 0; pair < schedule.pairs;) {
    const int end = pair < schedule.pairs - schedule.last_section ? pair + schedule.section : schedule.pairs;
    found.push_back({pair * schedule.blocks, end * schedule.blocks});
    pair = end;
  }
  return found;
}

// The last section may be larger than L2 where the longest items could not be evened out otherwise: it takes what that
// needs, and what is too little for a section of its own.
static void check_sections(const Schedule& schedule, const Schedule::Call& call, const std::string& name) {
  const int64_t groups_in_l2 = std::max<int64_t>(1, call.l2_bytes / call.bytes_together);
  const int tail = call.by_cost ? (4 * call.multiprocessors + call.blocks - 1) / call.blocks : 1;
  test::check(schedule.section <= groups_in_l2 * call.heads_together, name + ": a section is larger than L2");
  test::check(schedule.last_section < std::max(tail, schedule.section) + schedule.section, name + ": the last section");
  test::check(schedule.last_section >= std::min(tail, schedule.pairs), name + ": the last section is too short");
  for (const Range& section : sections(schedule)) {
    for (int index = section.begin + 1; call.by_cost && index < section.end; ++index) {
      test::check(schedule.item(index).block >= schedule.item(index - 1).block, name + ": the cost rises");
    }
  }
}

static void check_small_sizes() {
  for (int blocks : {1, 2, 5}) {
    for (int heads : {1, 2, 6}) {
      for (int sequences : {1, 3}) {
        for (bool by_cost : {false, true}) {
          for (int together : {1, 2}) {
            for (int groups_in_l2 : {0, 1, 2, 100}) {
              for (int multiprocessors : {1, 4, 1000}) {
                const Schedule::Call call{blocks,   heads, sequences,           by_cost,
                                          together, 1000,  1000 * groups_in_l2, multiprocessors};
                const std::string name = std::to_string(blocks) + " blocks, " + std::to_string(heads) + " heads, " +
                                         std::to_string(sequences) + " sequences, " + std::to_string(together) +
                                         " heads together, " + std::to_string(groups_in_l2) + " of them in L2, " +
                                         std::to_string(multiprocessors) + " multiprocessors" +
                                         (by_cost ? ", by cost" : "");
                const Schedule schedule = Schedule::make(call);
                check_every_item_once(schedule, call, name);
                check_sections(schedule, call, name);
              }
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
    const int first_row = (schedule.blocks - 1 - item.block) * plan.block_q;  // the last rows cost most
    costs.push_back(1 + problem.sequences().at(item.sequence).blocks(first_row, plan.block_q, plan.block_kv).end);
  }
  return costs;
}

static Costs backward_costs(const Problem& problem, const BackwardPlan& plan, int parts, const Schedule& schedule) {
  Costs costs;
  const int group = problem.heads_per_kv_head();
  for (int index = 0; index < schedule.items(); ++index) {
    const WorkItem item = schedule.item(index);
    const int part = item.head % parts, heads = (part + 1) * group / parts - part * group / parts;
    const Sequence keys = problem.sequences().transposed().at(item.sequence);
    const Range blocks = keys.blocks(item.block * plan.block_kv, plan.block_kv, plan.block_q);
    costs.push_back((parts == 1 ? 1 : 2) + heads * (blocks.end - blocks.begin));
  }
  return costs;
}

// The time until all is done, when each multiprocessor takes the next item as soon as it is done with one.
static int64_t makespan(const Costs& costs) {
  std::priority_queue<int64_t, Costs, std::greater<>> busy_until;
  for (int i = 0; i < kMultiprocessors; ++i) busy_until.push(0);
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
static double ideal(const Costs& costs) {
  const double share = static_cast<double>(std::accumulate(costs.begin(), costs.end(), int64_t{0})) / kMultiprocessors;
  return std::max(share, static_cast<double>(*std::ranges::max_element(costs)));
}

static void check_balance(const std::string& name, const Costs& costs) {
  const auto [shortest, longest] = std::ranges::minmax(costs);
  const int64_t items = static_cast<int64_t>(costs.size()), time = makespan(costs);
  int64_t limit = static_cast<int64_t>(1.03 * ideal(costs));
  if (shortest == longest) {
    // Items that all cost the same take so many rounds in any order.
    limit = ((items - 1) / kMultiprocessors + 1) * longest;
  } else {
    // Items are whole, and so are steps: few items a multiprocessor, or few steps an item, are a few percent by
    // themselves. When the last item, the shortest, is taken, all multiprocessors still do the others.
    const int64_t others = std::accumulate(costs.begin(), costs.end(), int64_t{0}) - shortest;
    limit = std::max(limit, others / kMultiprocessors + shortest);
  }
  test::check(time <= limit, name + ": takes " + std::to_string(time) + " steps of " + std::to_string(ideal(costs)));
}

static void check_order(const std::string& name, const Schedule& schedule, const Costs& costs) {
  for (const Range& section : sections(schedule)) {
    test::check(std::is_sorted(costs.begin() + section.begin, costs.begin() + section.end, std::greater<>()),
                name + ": the cost rises within a section");
  }
}

// The query heads of a KV head are shared out where that saves a thirty-second of the time, and to no more than that.
static void check_parts(const std::string& name, const Problem& problem, const BackwardPlan& plan, int parts) {
  const auto time = [&](int parts) {
    return makespan(backward_costs(problem, plan, parts, backward_schedule(problem, plan, parts, kMultiprocessors)));
  };
  const int64_t chosen = time(parts);
  for (int other = 1; other <= problem.heads_per_kv_head(); ++other) {
    const std::string at = name + ": " + std::to_string(parts) + " parts, not " + std::to_string(other);
    test::check(31 * chosen <= 32 * time(other), at + ", take longer");
    if (other < parts) test::check(32 * chosen < 31 * time(other), at + ", save little");
  }
  if (problem.heads == problem.kv_heads) test::check(parts == 1, name + ": nothing to split");
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
    const Schedule forward = forward_schedule(problem, kForward, kMultiprocessors);
    const Costs costs = forward_costs(problem, kForward, forward);
    check_order(name + ", forward", forward, costs);
    check_balance(name + ", forward", costs);
    if constexpr (kBackward.built()) {
      const int parts = backward_parts(problem, kBackward, kMultiprocessors);
      const Schedule backward = backward_schedule(problem, kBackward, parts, kMultiprocessors);
      const Costs costs = backward_costs(problem, kBackward, parts, backward);
      check_order(name + ", backward", backward, costs);
      check_balance(name + ", backward", costs);
      check_parts(name + ", backward", problem, kBackward, parts);
    }
  });
  test::check(found, name + ": no such head dim");
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
  // The papers' grid.
  for (const HeadDimLimits& row : kLimits) {
    for (int64_t seqlen = 512; seqlen <= 16384; seqlen *= 2) {
      for (bool causal : {false, true}) {
        check_shape(2048 / row.head_dim, 2048 / row.head_dim, row.head_dim, 16384 / seqlen, seqlen, causal);
      }
    }
  }
}

int main() {
  check_small_sizes();
  check_real_shapes();
  return test::finish("schedule");
}
