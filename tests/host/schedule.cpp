// Schedules: every tile once, K and V of a section within L2, and the load of a causal grid balanced.
#include "../../csrc/tile/schedule.h"

#include <algorithm>
#include <queue>
#include <vector>

#include "../../csrc/tile/block_range.h"
#include "check.h"

using flash_attn_ext::Sequence;
using flash_attn_ext::TileCoord;
using flash_attn_ext::TileSchedule;

static std::string describe(const TileSchedule& s) {
  return std::to_string(s.row_blocks) + " row blocks, " + std::to_string(s.heads) + " heads, " +
         std::to_string(s.pairs) + " pairs in sections of " + std::to_string(s.section_pairs) +
         (s.by_cost ? " by cost" : "");
}

static void check_every_tile_once(const TileSchedule& schedule) {
  const std::string name = describe(schedule);
  std::vector<int> visits(schedule.tiles());
  for (int index = 0; index < schedule.tiles(); ++index) {
    const TileCoord at = schedule.tile(index);
    const bool inside = at.row_block >= 0 && at.row_block < schedule.row_blocks && at.head >= 0 &&
                        at.head < schedule.heads && at.batch >= 0 && at.batch * schedule.heads < schedule.pairs;
    test::check(inside, name + ": tile " + std::to_string(index) + " is outside");
    if (inside) ++visits[(at.batch * schedule.heads + at.head) * schedule.row_blocks + at.row_block];
  }
  test::check(std::ranges::all_of(visits, [](int n) { return n == 1; }), name + ": a tile is not visited once");
}

// Within a section of a causal schedule the cost never rises.
static void check_order(const TileSchedule& schedule) {
  const int section_tiles = schedule.section_pairs * schedule.row_blocks;
  for (int index = 1; index < schedule.tiles(); ++index) {
    if (index % section_tiles == 0) continue;
    const bool falls = schedule.tile(index).row_block <= schedule.tile(index - 1).row_block;
    test::check(falls, describe(schedule) + ": tile " + std::to_string(index) + " costs more than the one before");
  }
}

static void check_small_sizes() {
  for (int row_blocks = 1; row_blocks <= 5; ++row_blocks) {
    for (int heads : {1, 2, 6}) {
      for (int batch : {1, 3}) {
        for (bool causal : {false, true}) {
          for (int group : {1, 2}) {
            for (long long kv_heads_in_l2 : {0, 1, 2, 100}) {
              const auto schedule =
                  TileSchedule::make(row_blocks, heads, batch, causal, 1000, group, kv_heads_in_l2 * 1000);
              test::check(schedule.section_pairs <= std::max(1ll, kv_heads_in_l2) * group, "a section fits L2");
              check_every_tile_once(schedule);
              if (causal) check_order(schedule);
            }
          }
        }
      }
    }
  }
}

// The paper's grid at head dim 128 on 132 multiprocessors, each taking the next tile when it is done with one: the last
// to finish has little more than its share. A tile costs its KV blocks and one block's worth of prologue and epilogue.
static void check_balance() {
  constexpr int kMultiprocessors = 132, kHeadDim = 128, kBlockQ = 128, kBlockKv = 128;
  for (int seqlen = 512; seqlen <= 16384; seqlen *= 2) {
    const int batch = 16384 / seqlen, heads = 2048 / kHeadDim;
    const Sequence sequence{seqlen, seqlen, true};
    const auto schedule =
        TileSchedule::make(seqlen / kBlockQ, heads, batch, true, 4ll * seqlen * kHeadDim, 1, 32 << 20);
    std::priority_queue<long long, std::vector<long long>, std::greater<>> busy_until;
    for (int i = 0; i < kMultiprocessors; ++i) busy_until.push(0);
    long long total = 0, end = 0;
    for (int index = 0; index < schedule.tiles(); ++index) {
      const int row = schedule.tile(index).row_block * kBlockQ;
      const int cost = 1 + sequence.visible_blocks(row, kBlockQ, kBlockKv);
      const long long done = busy_until.top() + cost;
      busy_until.pop();
      busy_until.push(done);
      total += cost;
      end = std::max(end, done);
    }
    const double efficiency = static_cast<double>(total) / kMultiprocessors / end;
    test::check(efficiency > 0.98, "seqlen " + std::to_string(seqlen) + ": balanced to " + std::to_string(efficiency));
  }
}

int main() {
  check_small_sizes();
  check_balance();
  return test::finish("schedule");
}
