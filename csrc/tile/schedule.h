// The order in which output tiles are handed out.
//
// All tiles of one (batch, head) pair read the same K and V, so pairs are taken in sections whose K and V stay in L2
// together. Under a causal mask later row blocks cost more: a section hands out its costliest tiles first, so that
// what is left for the end, when some blocks have run dry, is short (longest processing time first, Graham 1969).
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

  // The tile that is handed out as number `index`.
  HOST_DEVICE TileCoord tile(int index) const {
    int section_tiles = section_pairs * row_blocks;
    int section = index / section_tiles;
    int first_pair = section * section_pairs;
    int rank = index - section * section_tiles;
    int row_block, pair;
    if (by_cost) {
      int width = pairs - first_pair < section_pairs ? pairs - first_pair : section_pairs;
      int level = rank / width;
      pair = first_pair + rank - level * width;
      row_block = row_blocks - 1 - level;
    } else {
      pair = first_pair + rank / row_blocks;
      row_block = rank % row_blocks;
    }
    return {row_block, pair % heads, pair / heads};
  }
};

}  // namespace flash_attn_ext
