// All sequences of a call: their lengths, where they lie in the tensors, and how their blocks are counted, for the
// order of work, for the workspace and for lse.
//
// Dense sequences are all of one length, each a batch of its tensor. Packed ones lie behind each other in one batch;
// where each begins stands on the device, and no launch knows it. Their blocks are counted with holes: sequence i
// begins at block begin / block + i, where it is in nobody's way, so that all of them are known to be fewer than total
// / block + sequences, and a block's sequence is found by a search among the beginnings. Values that make no sense lead
// to wrong results, but nowhere outside the tensors.
#pragma once

#include <cstdint>

#include "host_device.h"
#include "sequence.h"

namespace flash_attn_ext {

// Lengths on the device, where they differ from sequence to sequence; null: they do not. Nobody has looked at the
// values.
struct Lengths {
  // (sequences + 1,): where each begins, packed in one batch.
  const int *cu_seqlens_q = nullptr, *cu_seqlens_k = nullptr;
  // (sequences,): how much of each is used.
  const int *seqused_q = nullptr, *seqused_k = nullptr;

  HOST_DEVICE bool any() const { return cu_seqlens_q || cu_seqlens_k || seqused_q || seqused_k; }
  HOST_DEVICE Lengths transposed() const { return {cu_seqlens_k, cu_seqlens_q, seqused_k, seqused_q}; }
};

// Where a sequence lies in a tensor: the batch, and in it the first row.
struct Place {
  int batch, row;
};

// The same as coordinates of a tensor map (tensor_map.h). The sequence's row r is at row + r.
struct Origin {
  int row, batch, wrap;
};

// A block of rows of a head of a sequence.
struct Block {
  int sequence, head, index;
};

struct Sequences {
  int count;
  Sequence each;      // packed: of all rows, or keys, together
  int left_out = 0;   // rows ahead of each sequence's first one, which are not counted; of dense sequences
  Lengths lengths{};  // where they differ

  // Of a ragged tensor map: more rows than any tensor has.
  static constexpr int kWrap = Sequence::kUnbounded;

  HOST_DEVICE Sequence at(int sequence) const {
    return {used_rows(sequence), transposed().used_rows(sequence), each.left, each.right};
  }
  HOST_DEVICE Place place(int sequence) const {
    return is_packed() ? Place{0, stored(sequence).begin} : Place{sequence, left_out};
  }

  // The rows that a sequence has room for, counted from the beginning of its batch. All of them are written. The last
  // one's room has all rows that are left.
  HOST_DEVICE Range stored(int sequence) const {
    if (!is_packed()) return {0, each.rows};
    const int begin = clamp(lengths.cu_seqlens_q[sequence], 0, each.rows);
    return {begin, sequence + 1 == count ? each.rows : end_of_packed(sequence, begin)};
  }

  HOST_DEVICE int stored_rows(int sequence) const {
    const auto [begin, end] = stored(sequence);
    return end - begin;
  }

  // Whether the rows' next sequence begins where this one ends, or behind it. Of values that make no sense some do not,
  // and then blocks of different sequences are counted as one.
  HOST_DEVICE bool is_followed(int sequence) const {
    return !is_packed() || clamp(lengths.cu_seqlens_q[sequence], 0, each.rows) <=
                               clamp(lengths.cu_seqlens_q[sequence + 1], 0, each.rows);
  }

  // What lies beyond the used rows, or the stored ones, arrives as zeros and is not written.
  HOST_DEVICE Origin origin_of_used(int sequence) const { return origin(sequence, used_rows(sequence)); }
  HOST_DEVICE Origin origin_of_stored(int sequence) const { return origin(sequence, stored_rows(sequence)); }

  // Whether the rows need a ragged tensor map, and whether they are packed.
  HOST_DEVICE bool is_ragged() const { return lengths.cu_seqlens_q != nullptr || lengths.seqused_q != nullptr; }
  HOST_DEVICE bool is_packed() const { return lengths.cu_seqlens_q != nullptr; }

  // The same without the first rows, as far as they see no key: where a mask hides all keys from them. Of sequences of
  // one length.
  HOST_DEVICE Sequences without_unseeing_rows() const {
    if (lengths.any()) return *this;
    const int unseeing = each.rows - each.keys - each.right, rows = unseeing > 0 ? each.rows - unseeing : each.rows;
    return {count, {rows, each.keys, each.left, each.right}, each.rows - rows};
  }

  // The row blocks of all heads are counted sequence by sequence, and within a sequence head by head; packed, they are
  // counted head by head, and for a head sequence by sequence, with holes.
  HOST_DEVICE int blocks_each(int block) const {
    return is_packed() ? each.rows / block + count : (each.rows - 1) / block + 1;
  }
  HOST_DEVICE int64_t block_count(int heads, int block) const {
    return static_cast<int64_t>(is_packed() ? 1 : count) * heads * blocks_each(block);
  }
  HOST_DEVICE int first_block(int sequence, int head, int heads, int block) const {
    if (is_packed()) return head * blocks_each(block) + first_packed_block(sequence, block);
    return (sequence * heads + head) * blocks_each(block);
  }
  // The index-th block of a head: it has block_count(1, block) of them, over all sequences.
  HOST_DEVICE int block_of_head(int index, int head, int heads, int block) const {
    const int blocks = blocks_each(block), sequence = quotient(index, blocks);  // packed, all are counted as one
    return (sequence * heads + head) * blocks + index - sequence * blocks;
  }
  // Whoever asks for a hole gets a block without rows: before the first or past the last stored one.
  HOST_DEVICE Block locate(int index, int heads, int block) const {
    const int blocks = blocks_each(block), pair = quotient(index, blocks);
    if (is_packed()) return locate_packed(index - pair * blocks, pair, block);
    const int sequence = quotient(pair, heads);
    return {sequence, pair - sequence * heads, index - pair * blocks};
  }
  // Of the index-th block of a head.
  HOST_DEVICE Block locate_packed(int index, int head, int block) const {
    int sequence = 0, end = count;
    while (end - sequence > 1) {
      const int middle = sequence + (end - sequence) / 2;
      (first_packed_block(middle, block) <= index ? sequence : end) = middle;
    }
    return {sequence, head, index - first_packed_block(sequence, block)};
  }

  // Where a sequence's first row stands in a (batch, heads, rows) array such as lse; packed, in a (heads, rows) array.
  HOST_DEVICE int64_t first_value(int sequence, int head, int heads) const {
    if (is_packed()) return static_cast<int64_t>(head) * each.rows + stored(sequence).begin;
    return (static_cast<int64_t>(sequence) * heads + head) * (left_out + each.rows) + left_out;
  }

  HOST_DEVICE Sequences transposed() const { return {count, each.transposed(), 0, lengths.transposed()}; }

 private:
  static HOST_DEVICE int clamp(int x, int low, int high) { return x < low ? low : x > high ? high : x; }

  HOST_DEVICE int end_of_packed(int sequence, int begin) const {
    return clamp(lengths.cu_seqlens_q[sequence + 1], begin, each.rows);
  }

  HOST_DEVICE int used_rows(int sequence) const {
    int rows = each.rows;
    if (is_packed()) {
      const int begin = stored(sequence).begin;
      rows = end_of_packed(sequence, begin) - begin;
    }
    return lengths.seqused_q != nullptr ? clamp(lengths.seqused_q[sequence], 0, rows) : rows;
  }

  HOST_DEVICE int first_packed_block(int sequence, int block) const {
    return clamp(lengths.cu_seqlens_q[sequence], 0, each.rows) / block + sequence;
  }

  // In a ragged map row r lies at -size + r, from offset + size on: r = size is past the end of the first of these
  // dimensions.
  HOST_DEVICE Origin origin(int sequence, int size) const {
    if (!is_ragged()) return {left_out, sequence, 0};
    const int offset = is_packed() ? stored(sequence).begin : sequence * each.rows;
    return {kWrap - size, offset + size, kWrap};
  }
};

}  // namespace flash_attn_ext
