// What launches share on the host: error checks, the device's properties, shared memory.
#pragma once

#include <cuda_runtime_api.h>

#include <array>
#include <atomic>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "launch.h"

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

// How many of the current device's are to be filled: the order of work depends on it, and so do tests of that.
inline int multiprocessors_to_fill() {
  const int injected = test_faults.multiprocessors;
  return injected > 0 ? injected : multiprocessors(current_device());
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

// Launches a kernel that may begin before the one ahead of it in the stream has ended: what it does until it calls
// cudaGridDependencySynchronize() overlaps with that one's end (programmatic dependent launch). The one ahead says from
// when on by cudaTriggerProgrammaticLaunchCompletion().
template <class Arguments>
void launch_overlapped(void (*kernel)(Arguments), int blocks, int threads, int shared_bytes, cudaStream_t stream,
                       const Arguments& args, const char* what) {
  cudaLaunchAttribute overlap{};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &overlap;
  config.numAttrs = 1;
  check_cuda(cudaLaunchKernelEx(&config, kernel, args), what);
}

}  // namespace flash_attn_ext
