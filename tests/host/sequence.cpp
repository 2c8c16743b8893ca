// Which keys a row sees and which blocks hold them, against a count of the pairs themselves, exhaustively on small
// sizes; and how the blocks of several sequences are counted.
#include "../../csrc/tile/sequence.h"

#include <algorithm>
#include <cstdint>
#include <vector>

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
  test::check(some.place(1).row == some.left_out, name + ": place");
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
          std::vector<int> of_head(heads);  // how many were met
          for (int sequence = 0; sequence < count; ++sequence) {
            for (int head = 0; head < heads; ++head) {
              test::check(all.first_block(sequence, head, heads, block) == index, at + ": first_block");
              for (int row = 0; row < rows; row += block, ++index) {
                const Block found = all.locate(index, heads, block);
                test::check(found.sequence == sequence && found.head == head && found.index == row / block,
                            at + ": locate");
                test::check(all.block_of_head(of_head[head]++, head, heads, block) == index, at + ": block_of_head");
              }
            }
          }
          test::check(all.block_count(heads, block) == index, at + ": block_count");
          test::check(all.block_count(1, block) == of_head[0], at + ": block_count of a head");
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

// ---------------------------------------------------------------------------------------------------------- packed

// Where the copy engine finds row r by an Origin, as an element offset: as tensor_map.h lays out a ragged map. -1: it
// is past the end.
static int64_t ragged_offset(const flash_attn_ext::Origin& origin, int r, uint64_t row_stride) {
  const uint64_t x = static_cast<uint64_t>(origin.row) + r, wrap = static_cast<uint64_t>(origin.wrap);
  if (x >= static_cast<uint64_t>(Sequences::kWrap)) return -1;
  const uint64_t wrapping = (uint64_t{1} << 34) - row_stride;
  const uint64_t bytes = 2 * (x * row_stride + static_cast<uint64_t>(origin.batch) * row_stride + wrap * wrapping);
  return static_cast<int64_t>(bytes / 2);
}

static void check_origin(const flash_attn_ext::Origin& origin, int offset, int size, const std::string& name) {
  for (uint64_t stride : {uint64_t{64}, uint64_t{4096}, uint64_t{1} << 22}) {
    for (int r = 0; r < size + 200; r += r < 3 || r >= size - 2 ? 1 : size) {
      const int64_t expected = r < size ? static_cast<int64_t>(stride) * (offset + r) : -1;
      test::check(ragged_offset(origin, r, stride) == expected, name + ": row " + std::to_string(r) + " is elsewhere");
    }
  }
}

// Packed sequences of these lengths, of which so much is used (null: all), with rows behind the last one.
static void check_packed(const std::vector<int>& sizes, bool use_part, int behind) {
  const int count = static_cast<int>(sizes.size());
  std::vector<int> begins{0}, used;
  std::string name = "packed";
  for (int size : sizes) {
    name += " " + std::to_string(size);
    begins.push_back(begins.back() + size);
    used.push_back(use_part ? size / 2 + size % 2 : size);
  }
  const int total = std::max(begins.back() + behind, 1);
  std::vector<int> room = sizes;  // the last one's has all rows that are left
  room.back() += total - begins.back();
  const Sequences all{.count = count,
                      .each = {.rows = total, .keys = 7, .left = kUnbounded, .right = 0},
                      .lengths = {.cu_seqlens_q = begins.data(), .seqused_q = use_part ? used.data() : nullptr}};
  for (int i = 0; i < count; ++i) {
    const std::string at = name + ", sequence " + std::to_string(i);
    test::check(all.stored(i).begin == begins[i] && all.stored(i).end == begins[i] + room[i], at + ": stored");
    test::check(all.at(i).rows == used[i] && all.at(i).keys == 7 && all.at(i).right == 0, at + ": at");
    test::check(all.transposed().at(i).keys == used[i], at + ": from the keys' side");
    test::check(all.first_value(i, 2, 3) == int64_t{2} * total + begins[i], at + ": first_value");
    check_origin(all.origin_of_used(i), begins[i], used[i], at + ", used");
    check_origin(all.origin_of_stored(i), begins[i], room[i], at + ", stored");
    const flash_attn_ext::Origin keys = all.transposed().origin_of_used(i);
    test::check(keys.row == 0 && keys.batch == i && keys.wrap == 0, at + ": dense keys");
  }
  constexpr int kHeads = 2;
  for (int block : {1, 4, 8}) {
    const std::string at = name + ", blocks of " + std::to_string(block);
    std::vector<int> rows(kHeads * total), of_head(kHeads);
    test::check(all.block_count(kHeads, block) <= int64_t{kHeads} * (total / block + count), at + ": bounded");
    for (int index = 0; index < all.block_count(kHeads, block); ++index) {
      const Block found = all.locate(index, kHeads, block);
      test::check(found.sequence >= 0 && found.sequence < count && found.head >= 0 && found.head < kHeads,
                  at + ": locate");
      test::check(all.block_of_head(of_head[found.head]++, found.head, kHeads, block) == index, at + ": block_of_head");
      test::check(all.first_block(found.sequence, found.head, kHeads, block) + found.index == index,
                  at + ": first_block");
      test::check(found.index >= 0, at + ": before its sequence");
      for (int r = found.index * block; r < std::min((found.index + 1) * block, room[found.sequence]); ++r) {
        ++rows[found.head * total + begins[found.sequence] + r];
      }
    }
    test::check(all.block_count(1, block) == of_head[0], at + ": block_count of a head");
    for (int i = 0; i < kHeads * total; ++i) {
      test::check(rows[i] == 1, at + ": row " + std::to_string(i) + " is not met once");
    }
  }
}

static void check_small_packings() {
  for (int a : {0, 1, 3, 4, 5, 9}) {
    for (int b : {0, 1, 4, 7, 8}) {
      for (int c : {0, 2, 8, 17}) {
        for (bool use_part : {false, true}) {
          for (int behind : {0, 5}) check_packed({a, b, c}, use_part, behind);
        }
      }
    }
  }
  check_packed({5}, false, 0);
  check_packed({0}, false, 0);
  check_packed(std::vector<int>(100, 0), false, 3);
  std::vector<int> tiny(300, 1);
  tiny[150] = 5000;
  check_packed(tiny, false, 0);
}

// Whatever stands on the device, nothing is outside the tensors.
static void check_nonsense() {
  constexpr int kCount = 3, kTotal = 20, kMost = INT32_MAX, kLeast = INT32_MIN;
  const int values[] = {kLeast, -1, 0, 7, 20, 21, kMost};
  for (int a : values) {
    for (int b : values) {
      for (int c : values) {
        for (int d : {kLeast, 5, kMost}) {
          const int begins[] = {a, b, c, d}, used[] = {d, c, a};
          const Sequences all{.count = kCount,
                              .each = {.rows = kTotal, .keys = kTotal, .left = 3, .right = 0},
                              .lengths = {begins, begins, used, used}};
          for (int i = 0; i < kCount; ++i) {
            const Range stored = all.stored(i);
            const Sequence sequence = all.at(i);
            test::check(0 <= stored.begin && stored.begin <= stored.end && stored.end <= kTotal, "nonsense: stored");
            test::check(0 <= sequence.rows && sequence.rows <= stored.end - stored.begin, "nonsense: used rows");
            test::check(0 <= sequence.keys && sequence.keys <= stored.end - stored.begin, "nonsense: used keys");
          }
          for (int block : {1, 8}) {
            for (int index = 0; index < all.block_count(2, block); ++index) {
              const Block found = all.locate(index, 2, block);
              test::check(found.sequence >= 0 && found.sequence < kCount && found.head >= 0 && found.head < 2,
                          "nonsense: locate");
            }
          }
        }
      }
    }
  }
  // Dense sequences of which a part is used.
  const int used[] = {0, 13, 99};
  const Sequences dense{
      .count = 3, .each = {.rows = 20, .keys = 9, .left = kUnbounded, .right = 0}, .lengths = {.seqused_q = used}};
  for (int i = 0; i < 3; ++i) {
    const int rows = std::min(used[i], 20);
    test::check(dense.at(i).rows == rows && dense.at(i).keys == 9, "dense, a part used: at");
    test::check(dense.first_value(i, 1, 2) == (2 * i + 1) * 20 && dense.blocks_each(8) == 3, "dense, a part used");
    check_origin(dense.origin_of_used(i), 20 * i, rows, "dense, a part used");
    check_origin(dense.origin_of_stored(i), 20 * i, 20, "dense, a part used, stored");
  }
}

int main() {
  check_small_sizes();
  check_no_overflow();
  check_sequences();
  check_small_packings();
  check_nonsense();
  return test::finish("sequence");
}
