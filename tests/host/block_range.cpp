// Block ranges against a count of the pairs themselves, exhaustively on small sizes.
#include "../../csrc/tile/block_range.h"

#include <algorithm>

#include "check.h"

using flash_attn_ext::Sequence;

static bool sees(const Sequence& s, int row, int key) { return !s.causal || key <= row + s.seqlen_k - s.seqlen_q; }

static void check_sequence(const Sequence& s, int rows, int block_kv) {
  const std::string name = "seqlen_q " + std::to_string(s.seqlen_q) + " seqlen_k " + std::to_string(s.seqlen_k) +
                           (s.causal ? " causal" : " full") + " rows " + std::to_string(rows) + " block " +
                           std::to_string(block_kv);
  for (int first = 0; first < s.seqlen_q + rows; ++first) {
    int visible = 0, full = s.seqlen_k / block_kv;
    for (int row = first; row < std::min(first + rows, s.seqlen_q); ++row) {
      int keys = 0;
      for (int key = 0; key < s.seqlen_k; ++key) {
        if (sees(s, row, key)) {
          ++keys;
          visible = std::max(visible, key / block_kv + 1);
        } else {
          full = std::min(full, key / block_kv);
        }
      }
      test::check(s.visible_keys(row) == keys, name + " visible_keys of row " + std::to_string(row));
    }
    const std::string at = name + " from row " + std::to_string(first);
    test::check(s.visible_blocks(first, rows, block_kv) == visible, at + ": visible_blocks");
    if (first < s.seqlen_q) test::check(s.full_blocks(first, block_kv) == full, at + ": full_blocks");
  }
}

int main() {
  for (int seqlen_q = 1; seqlen_q <= 21; ++seqlen_q) {
    for (int seqlen_k = 0; seqlen_k <= 21; ++seqlen_k) {
      for (bool causal : {false, true}) {
        for (int rows : {1, 4, 12}) {
          for (int block_kv : {1, 5, 8}) check_sequence({seqlen_q, seqlen_k, causal}, rows, block_kv);
        }
      }
    }
  }
  // Near the largest lengths nothing overflows.
  const int huge = (1 << 30) - 1;
  test::check(Sequence{1, huge, true}.visible_keys(0) == huge, "one query sees 2^30 - 1 keys");
  test::check(Sequence{huge, 1, true}.visible_keys(0) == 0, "the first of 2^30 - 1 queries sees nothing of one key");
  test::check(Sequence{huge, huge, true}.visible_blocks(huge - 64, 192, 128) == (huge + 127) / 128,
              "the last row block");
  return test::finish("block_range");
}
