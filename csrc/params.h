// What a launch needs to know, without torch: pointers, sizes, strides. Shapes are in the comments.
#pragma once

#include <cstdint>

namespace flash_attn_ext {

enum class DType { kFloat16, kBFloat16 };

// Strides of a (batch, seqlen, heads, head_dim) tensor in elements; head_dim's own stride is 1.
// The kernels need each stride that is used (its size is > 1) positive and a multiple of 16 bytes.
struct Strides {
  int64_t batch;
  int64_t seqlen;
  int64_t heads;
};

struct ForwardParams {
  const void* q;  // (batch, seqlen_q, heads, head_dim), 16-byte aligned
  const void* k;  // (batch, seqlen_k, kv_heads, head_dim), 16-byte aligned
  const void* v;  // (batch, seqlen_k, kv_heads, head_dim), 16-byte aligned
  void* out;      // (batch, seqlen_q, heads, head_dim), 16-byte aligned
  float* lse;     // (batch, heads, seqlen_q), contiguous; natural logarithm

  int* tile_counter;  // 0 when the kernel starts, and 0 again when it is done; used by one launch at a time

  Strides q_strides, k_strides, v_strides, out_strides;

  int64_t batch, seqlen_q, seqlen_k, heads, kv_heads;  // all >= 1; heads % kv_heads == 0
  int head_dim;
  DType dtype;

  float softmax_scale;  // finite, > 0
  bool causal;          // key j is seen by query i iff j <= i + seqlen_k - seqlen_q
};

struct BackwardParams {
  const void* dout;  // (batch, seqlen_q, heads, head_dim), 16-byte aligned, like all tensors here
  const void* q;     // (batch, seqlen_q, heads, head_dim)
  const void* k;     // (batch, seqlen_k, kv_heads, head_dim)
  const void* v;     // (batch, seqlen_k, kv_heads, head_dim)
  const void* out;   // (batch, seqlen_q, heads, head_dim)
  const float* lse;  // (batch, heads, seqlen_q), contiguous; natural logarithm; -inf: the row saw nothing

  void* dq;  // (batch, seqlen_q, heads, head_dim), or null: not asked for
  void* dk;  // (batch, seqlen_k, kv_heads, head_dim), or null
  void* dv;  // (batch, seqlen_k, kv_heads, head_dim), or null

  void* workspace;  // backward_workspace_bytes(), 16-byte aligned; what it holds does not matter

  Strides dout_strides, q_strides, k_strides, v_strides, out_strides, dq_strides, dk_strides, dv_strides;

  int64_t batch, seqlen_q, seqlen_k, heads, kv_heads;  // all >= 1; heads % kv_heads == 0
  int head_dim;
  DType dtype;

  float softmax_scale;  // finite, > 0
  bool causal;          // key j is seen by query i iff j <= i + seqlen_k - seqlen_q
};

}  // namespace flash_attn_ext
