// Schedules: every tile once, K and V of a section within L2, and the load of a causal grid balanced.
#include "../../csrc/tile/schedule.h"

#include <algorithm>
#include <vector>

#include "../../csrc/tile/block_range.h"
#include "check.h"

using flash_attn_ext::Sequence;
using flash_attn_ext::TileCoord;
using flash_attn_ext::TileSchedule;
using flash_attn_ext::TileWalk;

static std::string describe(const TileSchedule& s, int blocks) {
  return std::to_string(s.row_blocks) + " row blocks, " + std::to_string(s.heads) + " heads, " +
         std::to_string(s.pairs) + " pairs in sections of " + std::to_string(s.section_pairs) +
         (s.by_cost ? " by cost" : "") + ", " + std::to_string(blocks) + " blocks";
}

static void check_every_tile_once(const TileSchedule& schedule, int blocks) {
  const std::string name = describe(schedule, blocks);
  std::vector<int> visits(schedule.tiles());
  for (int block = 0; block < blocks; ++block) {
    int taken = 0;
    for (TileWalk walk(schedule, block, blocks); walk.valid(); walk.next(), ++taken) {
      const TileCoord at = schedule.tile(walk.tile);
      const bool inside = at.row_block >= 0 && at.row_block < schedule.row_blocks && at.head >= 0 &&
                          at.head < schedule.heads && at.batch >= 0 && at.batch * schedule.heads < schedule.pairs;
      test::check(inside, name + ": tile " + std::to_string(walk.tile) + " is outside");
      if (inside) ++visits[(at.batch * schedule.heads + at.head) * schedule.row_blocks + at.row_block];
    }
    const int rounds = (schedule.tiles() + blocks - 1) / blocks;
    test::check(taken == rounds || taken == rounds - 1, name + ": a block's share of tiles");
  }
  test::check(std::ranges::all_of(visits, [](int n) { return n == 1; }), name + ": a tile is not visited once");
}

static void check_small_sizes() {
  for (int row_blocks = 1; row_blocks <= 5; ++row_blocks) {
    for (int heads : {1, 2, 6}) {
      for (int batch : {1, 3}) {
        for (bool causal : {false, true}) {
          for (int group : {1, 2}) {
            for (long long kv_heads_in_l2 : {0, 1, 2, 100}) {
              const auto schedule = TileSchedule::make(row_blocks, heads, batch, causal, 1000, group,
                                                       kv_heads_in_l2 * 1000);
              test::check(schedule.section_pairs <= std::max(1ll, kv_heads_in_l2) * group, "a section fits L2");
              const int tiles = schedule.tiles();
              for (int blocks : {1, 2, 3, 7, 132}) {
                if (blocks <= tiles) check_every_tile_once(schedule, blocks);
              }
            }
          }
        }
      }
    }
  }
}

// The paper's grid at head dim 128 on 132 multiprocessors: the block with the most KV blocks has little more than its
// share. One block's overhead stands for what a tile costs beside its KV blocks.
static void check_balance() {
  constexpr int kBlocks = 132, kHeadDim = 128, kBlockQ = 128, kBlockKv = 128;
  for (int seqlen = 512; seqlen <= 16384; seqlen *= 2) {
    const int batch = 16384 / seqlen, heads = 2048 / kHeadDim;
    const Sequence sequence{seqlen, seqlen, true};
    const auto schedule = TileSchedule::make(seqlen / kBlockQ, heads, batch, true, 4ll * seqlen * kHeadDim, 1, 32 << 20);
    long long total = 0, most = 0;
    for (int block = 0; block < kBlocks; ++block) {
      long long load = 0;
      for (TileWalk walk(schedule, block, kBlocks); walk.valid(); walk.next()) {
        load += 1 + sequence.visible_blocks(schedule.tile(walk.tile).row_block * kBlockQ, kBlockQ, kBlockKv);
      }
      total += load;
      most = std::max(most, load);
    }
    const double efficiency = static_cast<double>(total) / kBlocks / most;
    test::check(efficiency > 0.965, "seqlen " + std::to_string(seqlen) + ": balanced to " + std::to_string(efficiency));
  }
}

int main() {
  check_small_sizes();
  check_balance();
  return test::finish("schedule");
}
