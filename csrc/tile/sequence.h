// One sequence of a call: its lengths, and which keys a query row sees.
//
// Query i sees key j iff i + keys - rows - left <= j <= i + keys - rows + right: the mask is aligned to the bottom
// right. A causal mask has right = 0; a sliding window limits left as well. A kernel asks about blocks: which of them
// hold a key that some of its rows see, and which of those need no mask. The backward asks the same from the keys'
// side, by `transposed()`: which row blocks hold a row that sees some of its keys.
#pragma once

#include "host_device.h"

namespace flash_attn_ext {

// begin <= i < end; empty where begin >= end.
struct Range {
  int begin, end;
};

struct Sequence {
  // More than any length, and no sum below leaves an int.
  static constexpr int kUnbounded = 1 << 30;

  int rows, keys;   // < kUnbounded
  int left, right;  // 0 ... kUnbounded; how far a row sees to either side of its place on the diagonal

  // Query `row` sees the keys first_key(row) <= j < end_key(row), none if the first is not below the second. Both grow
  // with the row, which is never negative. Rows past the end of the sequence see nothing.
  HOST_DEVICE int first_key(int row) const { return row < rows ? clamp(row - rows + keys - left) : keys; }
  HOST_DEVICE int end_key(int row) const { return row < rows ? clamp(row - rows + keys + right + 1) : 0; }

  // The keys that some of the rows row <= i < row + n see.
  HOST_DEVICE Range seen(int row, int n) const {
    return {first_key(row), end_key(row + n <= rows ? row + n - 1 : rows - 1)};
  }

  // The blocks of so many keys that hold one of them.
  HOST_DEVICE Range blocks(int row, int n, int block) const {
    const auto [first, end] = seen(row, n);
    return first < end ? Range{first / block, (end - 1) / block + 1} : Range{0, 0};
  }

  // Of these blocks, those that all of the rows row <= i < row + n see whole: they need no mask.
  HOST_DEVICE Range full_blocks(int row, int n, int block) const {
    const int first = first_key(row + n - 1), end = end_key(row);
    return {first / block + (first % block != 0), end / block};
  }

  // The same sequence from the keys' side: row i sees key j here iff row j sees key i there.
  HOST_DEVICE Sequence transposed() const { return {keys, rows, right, left}; }

 private:
  HOST_DEVICE int clamp(int key) const { return key < 0 ? 0 : key < keys ? key : keys; }
};

}  // namespace flash_attn_ext
