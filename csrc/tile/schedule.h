// The order in which persistent blocks work through the output tiles.
//
// Every block takes one tile a round. All tiles of one (batch, head) pair read the same K and V, so pairs are taken in
// sections whose K and V stay in L2 together. Under a causal mask later row blocks cost more: a section runs through
// them by cost, and the rounds alternate direction (0 1 2 .. n-1, n-1 .. 2 1 0, ...), so that a block which got the
// costliest tile of one round gets the cheapest of the next. Sections alternate between falling and rising cost, which
// leaves no jump between them, and the last one falls: the tiles that end the work are the short ones.
#pragma once

#include "host_device.h"

namespace flash_attn_ext {

struct TileCoord {
  int row_block;
  int head;
  int batch;
};

struct TileSchedule {
  int row_blocks;     // per (batch, head)
  int heads;          // query heads
  int pairs;          // batch * heads
  int section_pairs;  // pairs of a section
  bool by_cost;       // causal: later row blocks cost more

  static HOST_DEVICE TileSchedule make(int row_blocks, int heads, int batch, bool causal, long long kv_bytes_per_head,
                                       int heads_per_kv_head, long long l2_bytes) {
    long long kv_heads = kv_bytes_per_head > 0 ? l2_bytes / kv_bytes_per_head : 1;
    long long section = (kv_heads < 1 ? 1 : kv_heads) * heads_per_kv_head;
    int pairs = batch * heads;
    return {row_blocks, heads, pairs, section < pairs ? static_cast<int>(section) : pairs, causal};
  }

  HOST_DEVICE int tiles() const { return row_blocks * pairs; }

  HOST_DEVICE TileCoord tile(int index) const {
    int section_tiles = section_pairs * row_blocks;
    int section = index / section_tiles;
    int sections = (pairs + section_pairs - 1) / section_pairs;
    int first_pair = section * section_pairs;
    int rank = index - section * section_tiles;
    int row_block, pair;
    if (by_cost) {
      int width = pairs - first_pair < section_pairs ? pairs - first_pair : section_pairs;
      row_block = rank / width;
      pair = first_pair + rank - row_block * width;
      if ((sections - 1 - section) % 2 == 0) row_block = row_blocks - 1 - row_block;
    } else {
      pair = first_pair + rank / row_blocks;
      row_block = rank % row_blocks;
    }
    return {row_block, pair % heads, pair / heads};
  }
};

// One block's walk through the schedule: for (TileWalk walk(schedule, block, blocks); walk.valid(); walk.next()) ...
struct TileWalk {
  int tiles, block, blocks;
  int tile;  // in the schedule's order
  int round = 0;

  HOST_DEVICE TileWalk(const TileSchedule& schedule, int block, int blocks)
      : tiles(schedule.tiles()), block(block), blocks(blocks), tile(block) {}

  HOST_DEVICE bool valid() const { return tile < tiles; }

  HOST_DEVICE void next() {
    ++round;
    tile = round * blocks + (round % 2 ? blocks - 1 - block : block);
  }
};

}  // namespace flash_attn_ext
