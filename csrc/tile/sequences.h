// All sequences of a call, and how their blocks are counted: for the order of work, for the workspace, for lse.
//
// Sequences are dense here: all of one length, each a batch of its tensor.
#pragma once

#include <cstdint>

#include "host_device.h"
#include "sequence.h"

namespace flash_attn_ext {

// Where a sequence lies in the tensors: the batch, and in it the first row of q and the first of k. The copy engine's
// coordinates are counted from there.
struct Place {
  int batch, row, key;
};

// A block of rows of a head of a sequence.
struct Block {
  int sequence, head, index;
};

struct Sequences {
  int count;
  Sequence each;
  int left_out = 0;  // rows ahead of each sequence's first one, which are not counted

  HOST_DEVICE Sequence at(int) const { return each; }
  HOST_DEVICE Place place(int sequence) const { return {sequence, left_out, 0}; }

  // The same without the first rows, as far as they see no key: where a mask hides all keys from them.
  HOST_DEVICE Sequences without_unseeing_rows() const {
    const int unseeing = each.rows - each.keys - each.right, rows = unseeing > 0 ? each.rows - unseeing : each.rows;
    return {count, {rows, each.keys, each.left, each.right}, each.rows - rows};
  }

  // The row blocks of all heads are counted sequence by sequence, and within a sequence head by head.
  HOST_DEVICE int blocks_each(int block) const { return (each.rows - 1) / block + 1; }
  HOST_DEVICE int64_t block_count(int heads, int block) const {
    return static_cast<int64_t>(count) * heads * blocks_each(block);
  }
  HOST_DEVICE int first_block(int sequence, int head, int heads, int block) const {
    return (sequence * heads + head) * blocks_each(block);
  }
  HOST_DEVICE Block locate(int index, int heads, int block) const {
    const int blocks = blocks_each(block), pair = quotient(index, blocks), sequence = quotient(pair, heads);
    return {sequence, pair - sequence * heads, index - pair * blocks};
  }

  // Where a sequence's first row stands in a (batch, heads, rows) array such as lse.
  HOST_DEVICE int64_t first_value(int sequence, int head, int heads) const {
    return (static_cast<int64_t>(sequence) * heads + head) * (left_out + each.rows) + left_out;
  }

  HOST_DEVICE Sequences transposed() const { return {count, each.transposed()}; }
};

}  // namespace flash_attn_ext
