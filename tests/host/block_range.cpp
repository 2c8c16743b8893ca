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

// From the keys' side: which rows see a key, which row blocks hold such a row, and which need no mask.
static void check_keys(const Sequence& s, int keys, int block_q) {
  const std::string name = "seqlen_q " + std::to_string(s.seqlen_q) + " seqlen_k " + std::to_string(s.seqlen_k) +
                           (s.causal ? " causal" : " full") + " keys " + std::to_string(keys) + " block " +
                           std::to_string(block_q);
  for (int first = 0; first < s.seqlen_k + keys; ++first) {
    // `seeing`: the first row that sees the first key. Row blocks from `partial` on see all keys.
    int seeing = s.seqlen_q, partial = 0;
    for (int row = s.seqlen_q - 1; row >= 0; --row) {
      const bool sees_first = first < s.seqlen_k && sees(s, row, first);
      if (sees_first) seeing = row;
      bool sees_all = true;
      for (int key = first; key < first + keys; ++key) sees_all &= key < s.seqlen_k && sees(s, row, key);
      if (!sees_all) partial = std::max(partial, row / block_q + 1);
    }
    const std::string at = name + " from key " + std::to_string(first);
    test::check(s.first_seeing_row(first) == seeing, at + ": first_seeing_row");
    test::check(s.first_row_block(first, block_q) == seeing / block_q, at + ": first_row_block");
    test::check(s.first_full_row_block(first, keys, block_q) == partial, at + ": first_full_row_block");
    if (first < s.seqlen_k) test::check(seeing < s.seqlen_q, at + ": the last row sees every key");
  }
}

int main() {
  for (int seqlen_q = 1; seqlen_q <= 21; ++seqlen_q) {
    for (int seqlen_k = 0; seqlen_k <= 21; ++seqlen_k) {
      for (bool causal : {false, true}) {
        for (int rows : {1, 4, 12}) {
          for (int block_kv : {1, 5, 8}) check_sequence({seqlen_q, seqlen_k, causal}, rows, block_kv);
          for (int block_q : {1, 5, 8}) check_keys({seqlen_q, seqlen_k, causal}, rows, block_q);
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
  test::check(Sequence{1, huge, true}.first_seeing_row(0) == 0, "one query sees the first of 2^30 - 1 keys");
  test::check(Sequence{huge, 1, true}.first_seeing_row(0) == huge - 1, "the last of 2^30 - 1 queries sees the key");
  test::check(Sequence{huge, huge, true}.first_full_row_block(huge - 64, 64, 128) == (huge + 126) / 128,
              "the last key block");
  return test::finish("block_range");
}
