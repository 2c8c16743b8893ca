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

constexpr int kRows = 64;
// Two slabs of 64 columns, or three of 32, so that a step from one to the next is tested.
constexpr int kDepth = 128, kNarrowDepth = 96;

template <class Tile, class T>
__device__ void fill(Tile& tile, const T* source) {
  for (int i = threadIdx.x; i < Tile::kRows * Tile::kColumns; i += blockDim.x) {
    const int row = i / Tile::kColumns, column = i % Tile::kColumns;
    constexpr int kSlabColumns = Tile::kSlabColumns;
    const int chunk = column % kSlabColumns / 8;
    const uint32_t address = tile.chunk_address(column / kSlabColumns, row, chunk) + column % 8 * 2;
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

template <class T, int N, int kDepth>
struct SsSmem {
  SmemTile<T, kRows, kDepth> a;
  SmemTile<T, N, kDepth> b[2];
};

// d = a b^T, a (64 x kDepth) and b (N x kDepth), the second of two tiles, both K-major in shared memory.
template <class T, int N, int kDepth>
__global__ void multiply_ss(const T* a, const T* b, float* d) {
  extern __shared__ __align__(1024) unsigned char dynamic_smem[];
  auto& smem = *reinterpret_cast<SsSmem<T, N, kDepth>*>(dynamic_smem);
  fill(smem.a, a);
  fill(smem.b[1], b);
  end_fill();
  float acc[N / 2];
  set(acc, 1000.f);  // the product must ignore it
  product_ss(acc, KMajor(smem.a), KMajor(smem.b[0]).at(1));
  ptx::wgmma_wait_group<0>(acc);
  store<N>(acc, d);
}

// The same with a from registers.
template <class T, int N, int kDepth>
__global__ void multiply_rs(const T* a, const T* b, float* d) {
  extern __shared__ __align__(1024) unsigned char dynamic_smem[];
  auto& smem = *reinterpret_cast<SsSmem<T, N, kDepth>*>(dynamic_smem);
  fill(smem.a, a);
  fill(smem.b[1], b);
  end_fill();
  uint32_t operand[kDepth / 16][4];
  load_operand(operand, smem.a);
  float acc[N / 2];
  set(acc, 1000.f);  // the product must ignore it
  product_rs(acc, operand, KMajor(smem.b[0]).at(1), false);
  ptx::wgmma_wait_group<0>(acc);
  store<N>(acc, d);
}

template <class T, int N>
struct RsSmem {
  SmemTile<T, kDepth, N> b[2];
};

// d = 1 + a b, a (64 x 128) from registers, b (128 x N), the second of two tiles, MN-major in shared memory.
template <class T, int N>
__global__ void multiply_rs_mn(const T* a, const T* b, float* d) {
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
  product_rs(acc, operand, MnMajor(smem.b[0]).at(1), true);
  ptx::wgmma_wait_group<0>(acc);
  store<N>(acc, d);
}

template <class T, int N>
struct SsBMnSmem {
  SmemTile<T, kRows, kDepth> a;
  SmemTile<T, kDepth, N> b[2];
};

// d = 1 + a b, a (64 x 128) K-major and b (128 x N), the second of two tiles, MN-major, both in shared memory. In each
// thread block of a cluster of two, where the upper bits of addresses are no part of a descriptor.
template <class T, int N>
__cluster_dims__(2, 1, 1) __global__ void multiply_ss_b_mn(const T* a, const T* b, float* d) {
  extern __shared__ __align__(1024) unsigned char dynamic_smem[];
  auto& smem = *reinterpret_cast<SsBMnSmem<T, N>*>(dynamic_smem);
  fill(smem.a, a);
  fill(smem.b[1], b);
  end_fill();
  float acc[N / 2];
  set(acc, 1.f);  // the product must keep it
  product_ss(acc, KMajor(smem.a, kBitsInCluster), MnMajor(smem.b[0], 0, kBitsInCluster).at(1), true);
  ptx::wgmma_wait_group<0>(acc);
  store<N>(acc, d + blockIdx.x * kRows * N);
}

// Two tiles of 64 rows each: the products over their rows add up, as dQ's do over the keys of two consumers.
template <class T, int kBColumns>
struct TransposedSmem {
  SmemTile<T, kDepth / 2, 128> a[2];
  SmemTile<T, kDepth / 2, kBColumns> b[2];
  SmemTile<T, kDepth / 2, 64> a_slab[2];
};

// d = a^T b, b MN-major in shared memory, a likewise or from registers. Of a (128 x 128) it takes the second slab, of b
// (128 x kBColumns) the last N columns.
template <class T, int N, int kBColumns, bool kFromRegisters>
__global__ void multiply_transposed(const T* a, const T* b, float* d) {
  extern __shared__ __align__(1024) unsigned char dynamic_smem[];
  auto& smem = *reinterpret_cast<TransposedSmem<T, kBColumns>*>(dynamic_smem);
  for (int i = 0; i < 2; ++i) {
    fill(smem.a[i], a + i * kDepth / 2 * 128);
    fill(smem.b[i], b + i * kDepth / 2 * kBColumns);
  }
  end_fill();
  for (int i = threadIdx.x; i < kDepth * 64 / 2; i += blockDim.x) {
    for (int half = 0; half < 2; ++half) smem.a_slab[half].data[i] = smem.a[half].slab(1)[i];
  }
  __syncthreads();
  float acc[N / 2];
  set(acc, 1000.f);  // the first product must ignore it
  constexpr int kSlab = (kBColumns - N) / SmemTile<T, kDepth / 2, kBColumns>::kSlabColumns;
  for (int i = 0; i < 2; ++i) {
    if constexpr (kFromRegisters) {
      uint32_t operand[kDepth / 32][4];
      load_operand_transposed(operand, smem.a_slab[i]);
      product_rs(acc, operand, MnMajor(smem.b[i], kSlab), i > 0);
    } else {
      product_ss(acc, MnMajor(smem.a[i], 1), MnMajor(smem.b[i], kSlab), i > 0);
    }
    ptx::wgmma_wait_group<0>(acc);
  }
  store<N>(acc, d);
}

template <class T>
std::vector<T> small_integers(int count, int seed) {
  std::mt19937 generator(seed);
  std::vector<T> values(count);
  for (T& value : values) value = T(static_cast<float>(static_cast<int>(generator() % 9) - 4));
  return values;
}

enum class Form { kSs, kRs, kRsMn, kSsBMn };

template <class T, int N, Form kForm, int kDepth = ::kDepth>
void check_product(const std::string& name) {
  constexpr bool kMn = kForm == Form::kRsMn || kForm == Form::kSsBMn;
  constexpr int kBlocks = kForm == Form::kSsBMn ? 2 : 1;
  const auto a = small_integers<T>(kRows * kDepth, N), b = small_integers<T>(kDepth * N, N + 1);
  DeviceArray<T> a_device(a), b_device(b);
  DeviceArray<float> d_device(kBlocks * kRows * N);
  const auto run = [&](auto* kernel, std::size_t bytes) {
    launch(kernel, kBlocks, 128, static_cast<int>(bytes), (const T*)a_device.data, (const T*)b_device.data,
           d_device.data);
  };
  if constexpr (kForm == Form::kSs) run(multiply_ss<T, N, kDepth>, sizeof(SsSmem<T, N, kDepth>));
  if constexpr (kForm == Form::kRs) run(multiply_rs<T, N, kDepth>, sizeof(SsSmem<T, N, kDepth>));
  if constexpr (kForm == Form::kRsMn) run(multiply_rs_mn<T, N>, sizeof(RsSmem<T, N>));
  if constexpr (kForm == Form::kSsBMn) run(multiply_ss_b_mn<T, N>, sizeof(SsBMnSmem<T, N>));
  const std::vector<float> d = d_device.host();
  for (int row = 0; row < kRows; ++row) {
    for (int column = 0; column < N; ++column) {
      float expected = kMn ? 1.f : 0.f;
      for (int k = 0; k < kDepth; ++k) {
        expected += float(a[row * kDepth + k]) * float(kMn ? b[k * N + column] : b[column * kDepth + k]);
      }
      for (int block = 0; block < kBlocks; ++block) {
        test::check(d[(block * kRows + row) * N + column] == expected,
                    name + " N " + std::to_string(N) + " block " + std::to_string(block) + " row " +
                        std::to_string(row) + " column " + std::to_string(column));
      }
    }
  }
}

template <class T, int N, int kBColumns, bool kFromRegisters>
void check_transposed_product(const std::string& name) {
  const auto a = small_integers<T>(kDepth * 128, 1), b = small_integers<T>(kDepth * kBColumns, 2);
  DeviceArray<T> a_device(a), b_device(b);
  DeviceArray<float> d_device(kRows * N);
  launch(multiply_transposed<T, N, kBColumns, kFromRegisters>, 1, 128,
         static_cast<int>(sizeof(TransposedSmem<T, kBColumns>)), (const T*)a_device.data, (const T*)b_device.data,
         d_device.data);
  const std::vector<float> d = d_device.host();
  for (int row = 0; row < kRows; ++row) {
    for (int column = 0; column < N; ++column) {
      float expected = 0.f;
      for (int k = 0; k < kDepth; ++k) {
        expected += float(a[k * 128 + 64 + row]) * float(b[(k + 1) * kBColumns - N + column]);
      }
      test::check(d[row * N + column] == expected, name + " N " + std::to_string(N) + " row " + std::to_string(row) +
                                                       " column " + std::to_string(column));
    }
  }
}

template <class T>
void check_type(const std::string& type) {
  check_product<T, 64, Form::kSs>(type + " ss");
  check_product<T, 80, Form::kSs>(type + " ss");
  check_product<T, 96, Form::kSs>(type + " ss");
  check_product<T, 128, Form::kSs>(type + " ss");
  check_product<T, 64, Form::kSs, kNarrowDepth>(type + " ss, slabs of 32 columns,");
  check_product<T, 96, Form::kSs, kNarrowDepth>(type + " ss, slabs of 32 columns,");
  check_product<T, 64, Form::kRs>(type + " rs");
  check_product<T, 64, Form::kRs, kNarrowDepth>(type + " rs, slabs of 32 columns,");
  check_product<T, 64, Form::kRsMn>(type + " rs_mn");
  check_product<T, 96, Form::kRsMn>(type + " rs_mn");
  check_product<T, 128, Form::kRsMn>(type + " rs_mn");
  check_product<T, 192, Form::kRsMn>(type + " rs_mn");
  check_product<T, 256, Form::kRsMn>(type + " rs_mn");
  check_product<T, 96, Form::kSsBMn>(type + " ss_b_mn");
  check_product<T, 128, Form::kSsBMn>(type + " ss_b_mn");
  check_transposed_product<T, 64, 128, false>(type + " ss_mn");
  check_transposed_product<T, 64, 96, false>(type + " ss_mn, slabs of 32 columns,");
  check_transposed_product<T, 32, 96, false>(type + " ss_mn");
  check_transposed_product<T, 64, 128, true>(type + " rs_mn of a transposed operand");
}

int main() {
  test::require_hopper();
  check_type<__half>("fp16");
  check_type<__nv_bfloat16>("bf16");
  return test::finish("wgmma");
}
