// Every wgmma wrapper, through whole products with both kinds of operands, against a product on the CPU. Small
// integers: all sums are exact.
#include <cuda/ptx>

#include "../../csrc/ptx/wgmma.cuh"
#include "../../csrc/tile/fragment.cuh"
#include "../../csrc/tile/product.cuh"
#include "../../csrc/tile/smem.cuh"
#include "device.cuh"

using namespace flash_attn_ext;
using test::DeviceArray;
using test::launch;

constexpr int kRows = 64, kDepth = 128;  // two slabs, so that a step from one to the next is tested

template <class Tile, class T>
__device__ void fill(Tile& tile, const T* source) {
  for (int i = threadIdx.x; i < Tile::kRows * Tile::kColumns; i += blockDim.x) {
    const int row = i / Tile::kColumns, column = i % Tile::kColumns;
    const uint32_t address = tile.chunk_address(column / 64, row, column % 64 / 8) + column % 8 * 2;
    *reinterpret_cast<T*>(__cvta_shared_to_generic(address)) = source[i];
  }
}

// What was filled in is there for wgmma to read.
__device__ void end_fill() {
  cuda::ptx::fence_proxy_async(cuda::ptx::space_shared);
  __syncthreads();
}

// Where register i of the thread's fragment stands in a row-by-row matrix.
__device__ int place(int i, int columns) {
  return (own_row() + 8 * fragment_row(i)) * columns + own_column() + fragment_column(i);
}

template <int N>
__device__ void store(const float (&acc)[N / 2], float* d) {
#pragma unroll
  for (int i = 0; i < N / 2; ++i) d[place(i, N)] = acc[i];
}

template <int kRegisters>
__device__ void set(float (&acc)[kRegisters], float value) {
#pragma unroll
  for (int i = 0; i < kRegisters; ++i) acc[i] = value;
}

template <class T, int N>
struct SsSmem {
  SmemTile<T, kRows, kDepth> a;
  SmemTile<T, N, kDepth> b[2];
};

// d = a b^T, a (64 x 128) and b (N x 128), the second of two tiles, both K-major in shared memory.
template <class T, int N>
__global__ void multiply_ss(const T* a, const T* b, float* d) {
  extern __shared__ __align__(1024) unsigned char dynamic_smem[];
  auto& smem = *reinterpret_cast<SsSmem<T, N>*>(dynamic_smem);
  fill(smem.a, a);
  fill(smem.b[1], b);
  end_fill();
  float acc[N / 2];
  set(acc, 1000.f);  // the product must ignore it
  product_ss(acc, KMajor(smem.a), KMajor(smem.b[0]).at(1));
  ptx::wgmma_wait_group<0>(acc);
  store<N>(acc, d);
}

template <class T, int N>
struct RsSmem {
  SmemTile<T, kDepth, N> b[2];
};

// d = 1 + a b, a (64 x 128) from registers, b (128 x N), the second of two tiles, MN-major in shared memory.
template <class T, int N>
__global__ void multiply_rs(const T* a, const T* b, float* d) {
  extern __shared__ __align__(1024) unsigned char dynamic_smem[];
  auto& smem = *reinterpret_cast<RsSmem<T, N>*>(dynamic_smem);
  fill(smem.b[1], b);
  end_fill();
  float a_fragment[kDepth / 2], acc[N / 2];
#pragma unroll
  for (int i = 0; i < kDepth / 2; ++i) a_fragment[i] = static_cast<float>(a[place(i, kDepth)]);
  uint32_t operand[kDepth / 16][4];
  to_operand<T>(operand, a_fragment);
  set(acc, 1.f);  // the product must keep it
  product_rs(acc, operand, MnMajor(smem.b[0]).at(1));
  ptx::wgmma_wait_group<0>(acc);
  store<N>(acc, d);
}

// a is one tile of 128 rows, b two of 64 rows each: the product over a's rows goes on from one to the next, as dQ's
// does over the keys of two consumers.
template <class T>
struct TransposedSmem {
  SmemTile<T, kDepth, 2 * kSlabColumns> a;
  SmemTile<T, kDepth / 2, 2 * kSlabColumns> b[2];
};

// d = a^T b of the second slabs of a and b (128 x 128), both MN-major in shared memory.
template <class T>
__global__ void multiply_transposed(const T* a, const T* b, float* d) {
  extern __shared__ __align__(1024) unsigned char dynamic_smem[];
  auto& smem = *reinterpret_cast<TransposedSmem<T>*>(dynamic_smem);
  fill(smem.a, a);
  fill(smem.b[0], b);
  fill(smem.b[1], b + kDepth / 2 * 2 * kSlabColumns);
  end_fill();
  float acc[kSlabColumns / 2];
  set(acc, 1000.f);  // the product must ignore it
  product_ss(acc, MnMajor(smem.a, 1), MnMajor(smem.b[0], 1));
  ptx::wgmma_wait_group<0>(acc);
  store<kSlabColumns>(acc, d);
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
    launch(multiply_rs<T, N>, 1, 128, static_cast<int>(sizeof(RsSmem<T, N>)), (const T*)a_device.data,
           (const T*)b_device.data, d_device.data);
  } else {
    launch(multiply_ss<T, N>, 1, 128, static_cast<int>(sizeof(SsSmem<T, N>)), (const T*)a_device.data,
           (const T*)b_device.data, d_device.data);
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
  constexpr int kColumns = 2 * kSlabColumns, N = kSlabColumns;
  const auto a = small_integers<T>(kDepth * kColumns, 1), b = small_integers<T>(kDepth * kColumns, 2);
  DeviceArray<T> a_device(a), b_device(b);
  DeviceArray<float> d_device(kRows * N);
  launch(multiply_transposed<T>, 1, 128, static_cast<int>(sizeof(TransposedSmem<T>)), (const T*)a_device.data,
         (const T*)b_device.data, d_device.data);
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
