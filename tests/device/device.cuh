// What the device tests share: memory, random data, and the exit code of a machine without a Hopper GPU.
#pragma once

#include <cuda_runtime.h>

#include <cstdlib>
#include <random>
#include <vector>

#include "../host/check.h"

namespace test {

inline void require(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::printf("FAILED: %s: %s\n", what, cudaGetErrorString(error));
  std::exit(1);
}

// ctest reads 77 as "skipped".
inline void require_hopper() {
  int devices = 0, major = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) devices = 0;
  if (devices > 0)
    require(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0), "asking for the device");
  if (major == 9) return;
  std::printf("skipped: no Hopper GPU\n");
  std::exit(77);
}

template <class T>
struct DeviceArray {
  T* data = nullptr;
  size_t size;

  explicit DeviceArray(size_t size) : size(size) {
    require(cudaMalloc(&data, size * sizeof(T)), "cudaMalloc");
    require(cudaMemset(data, 0xff, size * sizeof(T)), "cudaMemset");  // NaN, so that what nobody writes shows
  }
  explicit DeviceArray(const std::vector<T>& host) : DeviceArray(host.size()) {
    require(cudaMemcpy(data, host.data(), size * sizeof(T), cudaMemcpyHostToDevice), "cudaMemcpy");
  }
  DeviceArray(const DeviceArray&) = delete;
  ~DeviceArray() { cudaFree(data); }

  std::vector<T> host() const {
    std::vector<T> copy(size);
    require(cudaMemcpy(copy.data(), data, size * sizeof(T), cudaMemcpyDeviceToHost), "running the kernel");
    return copy;
  }
};

// Launches with as much dynamic shared memory as the kernel's tiles need.
template <class... Arguments>
void launch(void (*kernel)(Arguments...), int blocks, int threads, int shared_bytes, Arguments... arguments) {
  require(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes), "shared memory");
  kernel<<<blocks, threads, shared_bytes>>>(arguments...);
  require(cudaGetLastError(), "launch");
}

}  // namespace test
