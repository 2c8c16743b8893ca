// What launches share on the host: error checks, the device's properties, shared memory.
#pragma once

#include <cuda_runtime_api.h>

#include <array>
#include <atomic>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace flash_attn_ext {

inline void check_cuda(cudaError_t error, const char* what) {
  if (error != cudaSuccess) {
    cudaGetLastError();  // an error of this call must not be reported by somebody's next one
    throw std::runtime_error(std::string(what) + " failed: " + cudaGetErrorString(error));
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

// The most that a thread block can have: 227 KB.
inline constexpr int kSharedMemoryBytes = 227 * 1024;

// Allows a kernel its shared memory, once for each device: it is a property of the device's copy of the kernel.
template <auto kKernel, int kBytes>
void allow_shared_memory(int device) {
  static_assert(kBytes <= kSharedMemoryBytes, "the plan needs more shared memory than a Hopper thread block can have");
  static std::array<std::atomic<bool>, 64> allowed{};
  if (device < 64 && allowed[device].load(std::memory_order_acquire)) return;
  check_cuda(cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes),
             "asking for shared memory");
  if (device < 64) allowed[device].store(true, std::memory_order_release);
}

}  // namespace flash_attn_ext
