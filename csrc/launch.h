// What the bindings may call. The launches below enqueue work on `stream` of the current device and return at once;
// they throw std::runtime_error when CUDA or the driver refuses.
#pragma once

#include <cuda_runtime_api.h>

#include <atomic>

#include "params.h"

namespace flash_attn_ext {

// Attention forward: writes params.out and params.lse. The head dim must have a forward tile in limits.h, and the
// current device must be of compute capability 9.0.
void launch_forward(const ForwardParams& params, cudaStream_t stream);

// Attention backward: writes those of params.dq, dk and dv that are not null. The head dim must have a backward tile in
// limits.h, and the current device must be of compute capability 9.0.
void launch_backward(const BackwardParams& params, cudaStream_t stream);

// Bytes of params.workspace that launch_backward needs; reads the sizes and the head dim only.
int64_t backward_workspace_bytes(const BackwardParams& params);

// Faults that tests inject, because no test machine shows them by itself.
struct TestFaults {
  std::atomic<bool> tensor_map_encode_fails{false};  // the driver refuses to encode a tensor map
  std::atomic<int> compute_capability{0};            // 80 stands for 8.0; 0: ask the device
};
inline TestFaults test_faults;

}  // namespace flash_attn_ext
