// Which keys a row sees and which blocks hold them, against a count of the pairs themselves, exhaustively on small
// sizes; and how the blocks of several sequences are counted.
#include "../../csrc/tile/sequence.h"

#include <algorithm>

#include "../../csrc/tile/sequences.h"
#include "check.h"

using flash_attn_ext::Block;
using flash_attn_ext::Range;
using flash_attn_ext::Sequence;
using flash_attn_ext::Sequences;

constexpr int kUnbounded = Sequence::kUnbounded;

// The definition, in the words of sequence.h.
static bool sees(const Sequence& s, int row, int key) {
  if (row < 0 || row >= s.rows || key < 0 || key >= s.keys) return false;
  const long long diagonal = static_cast<long long>(row) + s.keys - s.rows;
  return diagonal - s.left <= key && key <= diagonal + s.right;
}

static std::string bound(int width) { return width == kUnbounded ? "unbounded" : std::to_string(width); }

static std::string describe(const Sequence& s) {
  return std::to_string(s.rows) + " rows, " + std::to_string(s.keys) + " keys, left " + bound(s.left) + ", right " +
         bound(s.right);
}

static bool same(Range a, Range b) {
  return (a.begin >= a.end && b.begin >= b.end) || (a.begin == b.begin && a.end == b.end);
}

// Of all keys of a block: whether some row sees some of them, and whether all rows see all of them.
struct Sight {
  bool some, all;
};

static Sight sight(const Sequence& s, int row, int n, int block, int index) {
  Sight sight{false, true};
  for (int i = row; i < row + n; ++i) {
    for (int key = index * block; key < (index + 1) * block; ++key) {
      const bool seen = sees(s, i, key);
      sight.some |= seen;
      sight.all &= seen;
    }
  }
  return sight;
}

static void check_rows(const Sequence& s) {
  for (int row = 0; row < s.rows + 2; ++row) {
    for (int key = 0; key < s.keys; ++key) {
      const bool seen = s.first_key(row) <= key && key < s.end_key(row);
      test::check(seen == sees(s, row, key),
                  describe(s) + ": row " + std::to_string(row) + " and key " + std::to_string(key));
    }
  }
}

static void check_blocks(const Sequence& s, int n, int block) {
  for (int row = 0; row < s.rows + n; ++row) {
    Range blocks{0, 0}, full_blocks{0, 0};
    for (int index = 0; index * block < s.keys; ++index) {
      const Sight seen = sight(s, row, n, block, index);
      // The first that is found begins the range, the last ends it.
      if (seen.some) blocks = {blocks.end == 0 ? index : blocks.begin, index + 1};
      if (seen.all) full_blocks = {full_blocks.end == 0 ? index : full_blocks.begin, index + 1};
    }
    const std::string at = describe(s) + ": " + std::to_string(n) + " from row " + std::to_string(row) +
                           ", blocks of " + std::to_string(block);
    test::check(same(s.blocks(row, n, block), blocks), at + ": blocks");
    const Range seen = s.seen(row, n);
    const Range hull{seen.begin / block, (seen.end - 1) / block + 1};
    test::check(seen.begin >= seen.end ? blocks.begin >= blocks.end : same(hull, blocks), at + ": seen");
    test::check(same(s.full_blocks(row, n, block), full_blocks), at + ": full_blocks");
  }
}

static void check_transposed(const Sequence& s) {
  const Sequence t = s.transposed();
  for (int row = 0; row < s.rows; ++row) {
    for (int key = 0; key < s.keys; ++key) {
      const bool seen = t.first_key(key) <= row && row < t.end_key(key);
      test::check(seen == sees(s, row, key),
                  describe(s) + " transposed: row " + std::to_string(row) + " and key " + std::to_string(key));
    }
  }
}

static void check_small_sizes() {
  for (int rows = 0; rows <= 13; ++rows) {
    for (int keys = 0; keys <= 13; ++keys) {
      for (int left : {0, 1, 2, 5, kUnbounded}) {
        for (int right : {0, 1, 2, 5, kUnbounded}) {
          const Sequence sequence{rows, keys, left, right};
          check_rows(sequence);
          check_transposed(sequence);
          for (int n : {1, 3, 4, 8}) {
            for (int block : {1, 3, 4, 8}) check_blocks(sequence, n, block);
          }
        }
      }
    }
  }
}

static void check_no_overflow() {
  constexpr int kHuge = kUnbounded - 1;
  constexpr int kBlocks = kHuge / 128 + 1;
  for (int left : {0, kHuge, kUnbounded}) {
    for (int right : {0, kHuge, kUnbounded}) {
      for (int keys : {1, kHuge}) {
        for (int rows : {1, kHuge}) {
          const Sequence s{rows, keys, left, right};
          for (int row : {0, rows / 2, rows - 1}) {
            const int first = s.first_key(row), end = s.end_key(row);
            const std::string at = describe(s) + ": row " + std::to_string(row);
            test::check(0 <= first && first <= keys && 0 <= end && end <= keys, at + " stays among the keys");
            if (first >= end) {
              // The key nearest to the row's place on the diagonal: a row that sees any key sees this one.
              const int nearest = static_cast<int>(std::clamp<int64_t>(int64_t{row} + keys - rows, 0, keys - 1));
              test::check(!sees(s, row, nearest), at + " sees nothing");
              continue;
            }
            test::check(sees(s, row, first) && sees(s, row, end - 1), at + " sees what it says");
            test::check(!sees(s, row, first - 1) && !sees(s, row, end), at + " sees no more");
          }
        }
      }
    }
  }
  const Sequence causal{kHuge, kHuge, kUnbounded, 0}, narrow{kHuge, kHuge, 0, 0};
  const std::string last = "the last rows of 2^30 - 1";
  test::check(same(causal.blocks(kHuge - 64, 192, 128), {0, kBlocks}), last + " see all blocks");
  test::check(same(causal.full_blocks(kHuge - 64, 64, 128), {0, kBlocks - 1}), last + " see all but one whole");
  test::check(same(causal.full_blocks(kHuge - 64, 192, 128), {0, 0}), last + " and more see none whole");
  test::check(same(narrow.blocks(kHuge - 64, 192, 128), {kBlocks - 1, kBlocks}), last + " see their own block");
  test::check(same(causal.transposed().blocks(0, 128, 128), {0, kBlocks}), "2^30 - 1 queries see the first keys");
}

// Without the rows that see nothing: the others see what they saw, and have their places in lse.
static void check_left_out(const Sequence& each) {
  const Sequences all{2, each}, some = all.without_unseeing_rows();
  const Sequence& rest = some.each;
  const std::string name = describe(each) + ", without rows that see nothing";
  test::check(some.left_out + rest.rows == each.rows && rest.keys == each.keys, name + ": sizes");
  test::check(some.place(1).row == some.left_out && some.place(1).key == 0, name + ": place");
  test::check(some.transposed().place(1).row == 0, name + ": place from the keys' side");
  for (int head = 0; head < 2; ++head) {
    test::check(some.first_value(1, head, 2) == all.first_value(1, head, 2) + some.left_out, name + ": first_value");
  }
  for (int row = 0; row < each.rows; ++row) {
    bool sees_any = false;
    for (int key = 0; key < each.keys; ++key) {
      const bool seen = sees(each, row, key);
      sees_any |= seen;
      test::check(seen == (row >= some.left_out && sees(rest, row - some.left_out, key)), name + ": pairs");
    }
    if (row >= some.left_out && each.left >= each.keys) test::check(sees_any, name + ": all see something");
  }
}

static void check_sequences() {
  for (int rows : {1, 5, 9}) {
    for (int keys : {1, 4, 9, 12}) {
      for (int left : {0, 3, kUnbounded}) {
        for (int right : {0, 2, kUnbounded}) check_left_out({rows, keys, left, right});
      }
    }
  }

  for (int count : {1, 3}) {
    for (int rows : {1, 7, 8, 9, 20}) {
      const Sequences all{count, {.rows = rows, .keys = 2 * rows + 1, .left = 5, .right = 0}};
      const std::string name = std::to_string(count) + " sequences of " + std::to_string(rows) + " rows";
      for (int heads : {1, 2, 3}) {
        for (int block : {1, 4, 8}) {
          const std::string at = name + ", " + std::to_string(heads) + " heads, blocks of " + std::to_string(block);
          int index = 0;
          for (int sequence = 0; sequence < count; ++sequence) {
            for (int head = 0; head < heads; ++head) {
              test::check(all.first_block(sequence, head, heads, block) == index, at + ": first_block");
              for (int row = 0; row < rows; row += block, ++index) {
                const Block found = all.locate(index, heads, block);
                test::check(found.sequence == sequence && found.head == head && found.index == row / block,
                            at + ": locate");
              }
            }
          }
          test::check(all.block_count(heads, block) == index, at + ": block_count");
        }
      }
      constexpr int kHeads = 2;
      int64_t value = 0;
      for (int sequence = 0; sequence < count; ++sequence) {
        for (int head = 0; head < kHeads; ++head, value += rows) {
          test::check(all.first_value(sequence, head, kHeads) == value, name + ": first_value");
        }
        test::check(all.at(sequence).rows == rows && all.at(sequence).right == 0, name + ": at");
        test::check(all.transposed().at(sequence).rows == 2 * rows + 1, name + ": rows from the keys' side");
        test::check(all.transposed().at(sequence).right == 5, name + ": the window from the keys' side");
      }
      test::check(all.transposed().count == count, name + ": as many from the keys' side");
    }
  }
  const Sequences huge{1 << 15, {.rows = 1 << 15, .keys = 1, .left = kUnbounded, .right = kUnbounded}};
  test::check(huge.block_count(32, 1) == int64_t{1} << 35, "2^35 blocks");
  test::check(huge.first_value(huge.count - 1, 31, 32) == (int64_t{1} << 35) - (1 << 15), "2^35 values of lse");
}

int main() {
  check_small_sizes();
  check_no_overflow();
  check_sequences();
  return test::finish("sequence");
}
