// What a call asks, without torch and CUDA: sizes, type and options. Both passes get the same.
#pragma once

#include <climits>
#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <limits>
#include <optional>
#include <stdexcept>
#include <tuple>

#include "tile/sequences.h"

namespace flash_attn_ext {

enum class DType { kFloat16, kBFloat16 };

// exp(x) = exp2(kLog2E * x)
inline constexpr float kLog2E = 1.4426950408889634f;

// The options of a call, as flash_attn_ext/options.py has them; `Types` is their order in the operators' schema.
struct Options {
  std::optional<double> softmax_scale;  // positive; the kernels multiply by it * kLog2E; none: 1/sqrt(head_dim)
  bool causal = false;                  // no key right of the diagonal, which ends in the bottom right corner
  int64_t window_left = -1;             // how many keys a query sees left of the diagonal; -1: all
  int64_t window_right = -1;            // and right of it; causal: none
  double softcap = 0;                   // scores become softcap * tanh(score / softcap) before the mask; 0: they do not
  bool deterministic = false;           // gradients are the same in every run, bit for bit; nothing to the forward

  using Types = std::tuple<std::optional<double>, bool, int64_t, int64_t, double, bool>;

  // Whether the kernels take these values as they are. NaN is in no range.
  bool are_in_range() const {
    const auto is_factor = [](double x) {
      using Float = std::numeric_limits<float>;
      return x >= Float::min() && x * kLog2E <= Float::max();
    };
    return (!softmax_scale || is_factor(*softmax_scale)) && (softcap == 0 || is_factor(softcap)) && window_left >= -1 &&
           window_right >= -1;
  }

  bool has_window() const { return window_left >= 0 || (!causal && window_right >= 0); }
};

// Of a (batch, seqlen, heads, head_dim) tensor.
struct Shape {
  int64_t batch, seqlen, heads, head_dim;
};

// Row and block counts are int in the kernels (offsets are not), with room for one more round past the last.
inline constexpr int64_t kMaxCount = INT_MAX / 2;

inline void check_counts(std::initializer_list<int64_t> counts) {
  for (int64_t count : counts) {
    if (count > kMaxCount) {
      throw std::runtime_error("a call has 2^30 rows or blocks or more: split the batch or the heads over several");
    }
  }
}

struct Problem {
  // All >= 1; heads % kv_heads == 0. batch: of sequences. A seqlen of packed ones is the sum of theirs, and more if
  // rows after the last one belong to none.
  int64_t batch, seqlen_q, seqlen_k, heads, kv_heads, head_dim;
  DType dtype;
  Options options;
  Lengths lengths = {};

  Shape q_shape() const { return {lengths.cu_seqlens_q ? 1 : batch, seqlen_q, heads, head_dim}; }
  Shape k_shape() const { return {lengths.cu_seqlens_k ? 1 : batch, seqlen_k, kv_heads, head_dim}; }

  int heads_per_kv_head() const { return static_cast<int>(heads / kv_heads); }

  float softmax_scale() const {
    return static_cast<float>(options.softmax_scale.value_or(1 / std::sqrt(static_cast<double>(head_dim))));
  }

  Sequences sequences() const {
    check_counts({batch, seqlen_q, seqlen_k, heads});
    // Where only so much of them is used, the sequences of a batch are addressed like packed ones.
    if (lengths.seqused_q) check_counts({q_shape().batch * seqlen_q});
    if (lengths.seqused_k) check_counts({k_shape().batch * seqlen_k});
    const auto reach = [](int64_t keys) {
      return keys < 0 || keys > Sequence::kUnbounded ? Sequence::kUnbounded : static_cast<int>(keys);
    };
    return {static_cast<int>(batch),
            {.rows = static_cast<int>(seqlen_q),
             .keys = static_cast<int>(seqlen_k),
             .left = reach(options.window_left),
             .right = reach(options.causal ? 0 : options.window_right)},
            0,
            lengths};
  }
};

}  // namespace flash_attn_ext
