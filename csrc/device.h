// What launches of kernels have in common on the host.
#pragma once

#include <cuda_runtime_api.h>

#include <array>
#include <atomic>
#include <climits>
#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string>

namespace flash_attn_ext {

inline void check_cuda(cudaError_t error, const char* what) {
  if (error != cudaSuccess) {
    cudaGetLastError();  // an error of this call must not be reported by somebody's next one
    throw std::runtime_error(std::string(what) + " failed: " + cudaGetErrorString(error));
  }
}

// What the blocks that run together want to find in L2: half of the 50 MB or 60 MB that Hoppers have.
inline constexpr int64_t kL2Bytes = int64_t{32} << 20;

// exp(x) = exp2(kLog2E * x)
inline constexpr float kLog2E = 1.4426950408889634f;

// Row and tile counts are int in the kernels (offsets are not), with room for one more round past the last.
inline void check_counts(std::initializer_list<int64_t> counts) {
  for (int64_t count : counts) {
    if (count > INT_MAX / 2) {
      throw std::runtime_error("more rows or tiles than 2^30 in one call: split the batch or the heads over several");
    }
  }
}

inline int current_device() {
  int device = 0;
  check_cuda(cudaGetDevice(&device), "asking for the current device");
  return device;
}

inline int multiprocessors(int device) {
  int count = 0;
  check_cuda(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), "counting multiprocessors");
  return count;
}

// Allows a kernel its shared memory, once for each device: it is a property of the device's copy of the kernel.
template <auto kKernel, int kBytes>
void allow_shared_memory(int device) {
  static_assert(kBytes <= 227 * 1024, "the tile needs more shared memory than a Hopper thread block can have");
  static std::array<std::atomic<bool>, 64> allowed{};
  if (device < 64 && allowed[device].load(std::memory_order_acquire)) return;
  check_cuda(cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes),
             "asking for shared memory");
  if (device < 64) allowed[device].store(true, std::memory_order_release);
}

}  // namespace flash_attn_ext
