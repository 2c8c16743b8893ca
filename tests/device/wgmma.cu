// Every wgmma wrapper and both operand layouts against a product on the CPU. Small integers: all sums are exact.
#include <cuda/ptx>

#include "../../csrc/ptx/wgmma.cuh"
#include "../../csrc/tile/fragment.cuh"
#include "../../csrc/tile/smem.cuh"
#include "device.cuh"

using namespace flash_attn_ext;
using test::DeviceArray;
using test::launch;

constexpr int kRows = 64, kDepth = 128;  // two slabs, so that a step from one to the next is tested

template <class Tile, class T>
__device__ void fill(Tile& tile, const T* source, int rows, int columns) {
  for (int i = threadIdx.x; i < rows * columns; i += blockDim.x) {
    const int row = i / columns, column = i % columns;
    const uint32_t address = tile.chunk_address(column / 64, row, column % 64 / 8) + column % 8 * 2;
    *reinterpret_cast<T*>(__cvta_shared_to_generic(address)) = source[i];
  }
}

// d = previous + a b^T, a (64 x 128), b (N x 128) both K-major in shared memory.
template <class T, int N>
__global__ void product_ss(const T* a, const T* b, float* d) {
  extern __shared__ __align__(1024) unsigned char raw[];
  auto& a_tile = *reinterpret_cast<SmemTile<T, kRows, kDepth>*>(raw);
  auto& b_tile = *reinterpret_cast<SmemTile<T, N, kDepth>*>(raw + sizeof a_tile);
  fill(a_tile, a, kRows, kDepth);
  fill(b_tile, b, N, kDepth);
  cuda::ptx::fence_proxy_async(cuda::ptx::space_shared);
  __syncthreads();
  float acc[N / 2];
#pragma unroll
  for (int i = 0; i < N / 2; ++i) acc[i] = 1000.f;  // the first step must ignore it
  const uint64_t a_descriptor = k_major_descriptor(a_tile), b_descriptor = k_major_descriptor(b_tile);
  ptx::wgmma_fence();
#pragma unroll
  for (int k = 0; k < kDepth / 16; ++k) {
    ptx::Wgmma<N>::template ss<T>(acc, a_descriptor + k_major_step<SmemTile<T, kRows, kDepth>>(k),
                                  b_descriptor + k_major_step<SmemTile<T, N, kDepth>>(k), k > 0);
  }
  ptx::wgmma_commit_group();
  ptx::wgmma_wait_group<0>(acc);
  const int row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4, column = threadIdx.x % 4 * 2;
#pragma unroll
  for (int i = 0; i < N / 2; ++i) d[(row + 8 * fragment_row(i)) * N + column + fragment_column(i)] = acc[i];
}

// d = 1 + a b, a (64 x 128) from registers, b (128 x N) MN-major in shared memory.
template <class T, int N>
__global__ void product_rs(const T* a, const T* b, float* d) {
  extern __shared__ __align__(1024) unsigned char raw[];
  auto& b_tile = *reinterpret_cast<SmemTile<T, kDepth, N>*>(raw);
  fill(b_tile, b, kDepth, N);
  cuda::ptx::fence_proxy_async(cuda::ptx::space_shared);
  __syncthreads();
  const int row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4, column = threadIdx.x % 4 * 2;
  float a_fragment[kDepth / 2], acc[N / 2];
#pragma unroll
  for (int i = 0; i < kDepth / 2; ++i) {
    a_fragment[i] = static_cast<float>(a[(row + 8 * fragment_row(i)) * kDepth + column + fragment_column(i)]);
  }
#pragma unroll
  for (int i = 0; i < N / 2; ++i) acc[i] = 1.f;  // every step must keep it
  uint32_t operand[kDepth / 16][4];
  to_operand<T>(operand, a_fragment);
  const uint64_t b_descriptor = mn_major_descriptor(b_tile);
  ptx::wgmma_fence();
#pragma unroll
  for (int k = 0; k < kDepth / 16; ++k) {
    ptx::Wgmma<N>::template rs<T>(acc, operand[k], b_descriptor + mn_major_step<SmemTile<T, kDepth, N>>(k), 1);
  }
  ptx::wgmma_commit_group();
  ptx::wgmma_wait_group<0>(acc);
#pragma unroll
  for (int i = 0; i < N / 2; ++i) d[(row + 8 * fragment_row(i)) * N + column + fragment_column(i)] = acc[i];
}

// d = a^T b, a and b (128 x 64) both MN-major in shared memory: each the second slab of a tile of two.
template <class T>
__global__ void product_ss_mn(const T* a, const T* b, float* d) {
  constexpr int N = 64;
  using Tile = SmemTile<T, kDepth, 2 * kSlabColumns>;
  extern __shared__ __align__(1024) unsigned char raw[];
  auto& a_tile = *reinterpret_cast<Tile*>(raw);
  auto& b_tile = *reinterpret_cast<Tile*>(raw + sizeof a_tile);
  fill(a_tile, a, kDepth, 2 * kSlabColumns);
  fill(b_tile, b, kDepth, 2 * kSlabColumns);
  cuda::ptx::fence_proxy_async(cuda::ptx::space_shared);
  __syncthreads();
  float acc[N / 2];
#pragma unroll
  for (int i = 0; i < N / 2; ++i) acc[i] = 1000.f;  // the first step must ignore it
  const uint64_t a_descriptor = mn_major_descriptor(a_tile) + (Tile::kSlabBytes >> 4);
  const uint64_t b_descriptor = mn_major_descriptor(b_tile) + (Tile::kSlabBytes >> 4);
  ptx::wgmma_fence();
#pragma unroll
  for (int k = 0; k < kDepth / 16; ++k) {
    ptx::Wgmma<N>::template ss_mn<T>(acc, a_descriptor + mn_major_step<Tile>(k), b_descriptor + mn_major_step<Tile>(k),
                                     k > 0);
  }
  ptx::wgmma_commit_group();
  ptx::wgmma_wait_group<0>(acc);
  const int row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4, column = threadIdx.x % 4 * 2;
#pragma unroll
  for (int i = 0; i < N / 2; ++i) d[(row + 8 * fragment_row(i)) * N + column + fragment_column(i)] = acc[i];
}

template <class T>
std::vector<T> small_integers(int count, int seed) {
  std::mt19937 generator(seed);
  std::vector<T> values(count);
  for (T& value : values) value = T(static_cast<float>(static_cast<int>(generator() % 9) - 4));
  return values;
}

template <class T, int N, bool kFromRegisters>
void check_product(const char* name) {
  const auto a = small_integers<T>(kRows * kDepth, N), b = small_integers<T>(kDepth * N, N + 1);
  DeviceArray<T> a_device(a), b_device(b);
  DeviceArray<float> d_device(kRows * N);
  if constexpr (kFromRegisters) {
    launch(product_rs<T, N>, 1, 128, kDepth * N * 2, (const T*)a_device.data, (const T*)b_device.data, d_device.data);
  } else {
    launch(product_ss<T, N>, 1, 128, (kRows + N) * kDepth * 2, (const T*)a_device.data, (const T*)b_device.data,
           d_device.data);
  }
  const std::vector<float> d = d_device.host();
  for (int row = 0; row < kRows; ++row) {
    for (int column = 0; column < N; ++column) {
      float expected = kFromRegisters ? 1.f : 0.f;
      for (int k = 0; k < kDepth; ++k) {
        expected += float(a[row * kDepth + k]) * float(kFromRegisters ? b[k * N + column] : b[column * kDepth + k]);
      }
      test::check(d[row * N + column] == expected, std::string(name) + " N " + std::to_string(N) + " row " +
                                                       std::to_string(row) + " column " + std::to_string(column));
    }
  }
}

template <class T>
void check_transposed_product(const char* name) {
  constexpr int kColumns = 2 * kSlabColumns, N = 64;
  const auto a = small_integers<T>(kDepth * kColumns, 1), b = small_integers<T>(kDepth * kColumns, 2);
  DeviceArray<T> a_device(a), b_device(b);
  DeviceArray<float> d_device(kRows * N);
  launch(product_ss_mn<T>, 1, 128, 2 * kDepth * kColumns * 2, (const T*)a_device.data, (const T*)b_device.data,
         d_device.data);
  const std::vector<float> d = d_device.host();
  for (int row = 0; row < kRows; ++row) {
    for (int column = 0; column < N; ++column) {
      float expected = 0.f;
      for (int k = 0; k < kDepth; ++k) {
        expected += float(a[k * kColumns + kSlabColumns + row]) * float(b[k * kColumns + kSlabColumns + column]);
      }
      test::check(d[row * N + column] == expected,
                  std::string(name) + " row " + std::to_string(row) + " column " + std::to_string(column));
    }
  }
}

template <class T>
void check_type(const std::string& type) {
  check_product<T, 64, false>((type + " ss").c_str());
  check_product<T, 80, false>((type + " ss").c_str());
  check_product<T, 128, false>((type + " ss").c_str());
  check_transposed_product<T>((type + " ss_mn").c_str());
  check_product<T, 64, true>((type + " rs").c_str());
  check_product<T, 128, true>((type + " rs").c_str());
  check_product<T, 256, true>((type + " rs").c_str());
}

int main() {
  test::require_hopper();
  check_type<__half>("fp16");
  check_type<__nv_bfloat16>("bf16");
  return test::finish("wgmma");
}
