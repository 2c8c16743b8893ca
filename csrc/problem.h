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
  bool causal = false;                  // key j is seen by query i iff j <= i + seqlen_k - seqlen_q

  using Types = std::tuple<std::optional<double>, bool>;

  // Whether the kernels take these values as they are. NaN is in no range.
  bool are_in_range() const {
    using Float = std::numeric_limits<float>;
    return !softmax_scale || (*softmax_scale >= Float::min() && *softmax_scale * kLog2E <= Float::max());
  }
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
  int64_t batch, seqlen_q, seqlen_k, heads, kv_heads, head_dim;  // all >= 1; heads % kv_heads == 0
  DType dtype;
  Options options;

  Shape q_shape() const { return {batch, seqlen_q, heads, head_dim}; }
  Shape k_shape() const { return {batch, seqlen_k, kv_heads, head_dim}; }

  int heads_per_kv_head() const { return static_cast<int>(heads / kv_heads); }

  float softmax_scale() const {
    return static_cast<float>(options.softmax_scale.value_or(1 / std::sqrt(static_cast<double>(head_dim))));
  }

  Sequences sequences() const {
    check_counts({batch, seqlen_q, seqlen_k, heads});
    return {static_cast<int>(batch),
            {.rows = static_cast<int>(seqlen_q),
             .keys = static_cast<int>(seqlen_k),
             .left = Sequence::kUnbounded,
             .right = options.causal ? 0 : Sequence::kUnbounded}};
  }
};

}  // namespace flash_attn_ext
