// Which keys a query row sees, and so which KV blocks a range of rows visits and which of those need a mask.
// Causal is bottom-right aligned: query i sees key j iff j <= i + seqlen_k - seqlen_q.
#pragma once

#include "host_device.h"

namespace flash_attn_ext {

struct Sequence {
  int seqlen_q;
  int seqlen_k;
  bool causal;

  // Query `row` sees the keys 0 <= j < visible_keys(row).
  HOST_DEVICE int visible_keys(int row) const {
    if (!causal) return seqlen_k;
    long long keys = static_cast<long long>(row) + seqlen_k - seqlen_q + 1;
    return keys < 0 ? 0 : keys < seqlen_k ? static_cast<int>(keys) : seqlen_k;
  }

  // Blocks 0 <= b < visible_blocks hold a key that some row of first_row <= row < first_row + rows sees. Rows past the
  // end of the sequence see nothing.
  HOST_DEVICE int visible_blocks(int first_row, int rows, int block_kv) const {
    if (first_row >= seqlen_q) return 0;
    int last_row = first_row + rows <= seqlen_q ? first_row + rows - 1 : seqlen_q - 1;
    return (visible_keys(last_row) + block_kv - 1) / block_kv;
  }

  // Blocks 0 <= b < full_blocks are seen whole by `first_row`, and so by every row after it: they need no mask.
  HOST_DEVICE int full_blocks(int first_row, int block_kv) const { return visible_keys(first_row) / block_kv; }

  // The same from the keys' side: the rows first_seeing_row <= i < seqlen_q see `key`. Keys past the end nobody sees.
  HOST_DEVICE int first_seeing_row(int key) const {
    if (key >= seqlen_k) return seqlen_q;
    if (!causal) return 0;
    long long row = static_cast<long long>(key) - seqlen_k + seqlen_q;
    return row < 0 ? 0 : static_cast<int>(row);
  }

  // Row blocks b >= first_row_block hold a row that sees first_key.
  HOST_DEVICE int first_row_block(int first_key, int block_q) const { return first_seeing_row(first_key) / block_q; }

  // All rows of the row blocks b >= first_full_row_block see all keys first_key <= j < first_key + keys: no mask there.
  HOST_DEVICE int first_full_row_block(int first_key, int keys, int block_q) const {
    return (first_seeing_row(first_key + keys - 1) + block_q - 1) / block_q;
  }
};

}  // namespace flash_attn_ext
