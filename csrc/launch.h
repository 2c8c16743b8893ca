// What may be called without knowing the kernels. The launches enqueue work on `stream` of the current device and
// return at once; they throw std::runtime_error when CUDA or the driver refuses.
#pragma once

#include <cuda_runtime_api.h>

#include <atomic>
#include <cstdint>

#include "problem.h"

namespace flash_attn_ext {

// Strides of a (batch, seqlen, heads, head_dim) tensor in elements; head_dim's own stride is 1.
// The kernels need each stride that is used (its size is > 1) positive and a multiple of 16 bytes.
struct Strides {
  int64_t batch, row, head;
};

// A (batch, seqlen, heads, head_dim) tensor of the problem's type, 16-byte aligned. What a pass takes is only read.
// Packed sequences are one batch.
struct Tensor {
  void* data;
  Strides strides;
};

// Element (row, head, column) of a batch.
template <class T>
HOST_DEVICE T* element(const Tensor& tensor, int batch, int64_t row, int head, int column) {
  const Strides& strides = tensor.strides;
  return static_cast<T*>(tensor.data) + batch * strides.batch + row * strides.row + head * strides.head + column;
}

struct ForwardParams {
  Problem problem;
  Tensor q, k, v;
  Tensor out;
  float* lse;          // (batch, heads, seqlen_q), packed (heads, seqlen_q), contiguous; natural logarithm
  const float* sinks;  // (heads,): a logit that joins each row's sum of exponentials, and no value; null: none
  // kItemCounters, used by one launch at a time: two that are 0 when the kernel claims, and 0 again when it is done,
  // and one of the items that were handed out again, which only grows.
  int* item_counters;
  void* workspace;  // forward_workspace_bytes(), 16-byte aligned; what it holds does not matter
};

inline constexpr int kItemCounters = 3;

struct BackwardParams {
  Problem problem;
  Tensor dout, q, k, v, out;
  const float* lse;    // (batch, heads, seqlen_q), packed (heads, seqlen_q), contiguous; -inf: the row saw nothing
  const float* dlse;   // like lse: the loss's gradient by it, not read in rows that saw nothing; null: zeros
  const float* sinks;  // (heads,), as in the forward: lse has them in it; read where dsinks is needed
  Tensor dq, dk, dv;   // data is null: not needed
  float* dsinks;       // (heads,); null: not needed
  void* workspace;     // backward_workspace_bytes(), 16-byte aligned; what it holds does not matter
};

// Attention forward: writes params.out and params.lse. The head dim must have a forward plan in limits.h, and the
// current device must be of compute capability 9.0.
void launch_forward(const ForwardParams& params, cudaStream_t stream);

// Bytes of ForwardParams::workspace that launch_forward needs on the current device: none but where keys are shared out
// (work.h).
int64_t forward_workspace_bytes(const Problem& problem);

// Attention backward: writes those of params.dq, dk, dv and dsinks that are needed. The head dim must have a backward
// plan in limits.h, and the current device must be of compute capability 9.0.
void launch_backward(const BackwardParams& params, cudaStream_t stream);

// Bytes of params.workspace that launch_backward needs on the current device; reads the problem and which gradients are
// needed.
int64_t backward_workspace_bytes(const BackwardParams& params);

// Bytes of shared memory that a thread block takes at this head dim; 0 where the plan is not built.
int forward_shared_memory(int head_dim, bool short_forward);
int backward_shared_memory(int head_dim);

// Faults that tests inject, because no test machine shows them by itself.
struct TestFaults {
  std::atomic<bool> tensor_map_encode_fails{false};  // the driver refuses to encode a tensor map
  std::atomic<int> compute_capability{0};            // 80 stands for 8.0; 0: ask the device
  std::atomic<int> multiprocessors{0};               // that the order of work is made for; 0: the device's
};
inline TestFaults test_faults;

}  // namespace flash_attn_ext
