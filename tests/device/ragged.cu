// Ragged tensor maps: one map over packed rows clips loads and stores at the end of any sequence, whatever its
// neighbours hold, and beyond 2^31 elements.
#include <cmath>
#include <cuda/ptx>

#include "../../csrc/tensor_map.h"
#include "../../csrc/tile/copy.cuh"
#include "../../csrc/tile/ring.cuh"
#include "../../csrc/tile/sequences.h"
#include "../../csrc/tile/smem.cuh"
#include "device.cuh"

using namespace flash_attn_ext;
using test::DeviceArray;
using T = __nv_bfloat16;

constexpr int kColumns = 128, kTileRows = 64;
using Tile = SmemTile<T, kTileRows, kColumns>;
using HalfTile = SmemTile<T, kTileRows, kColumns / 2>;

// Loads the tile from `row` and `first_column` on, writes down what arrives, and stores all elements plus 1.
template <class Tile>
__global__ void copy_tile(const __grid_constant__ CUtensorMap from, const __grid_constant__ CUtensorMap to,
                          const __grid_constant__ Sequences sequences, int sequence, int row, int head,
                          int first_column, T* arrived) {
  extern __shared__ __align__(1024) unsigned char dynamic_smem[];
  auto& tile = *reinterpret_cast<Tile*>(dynamic_smem);
  __shared__ Ring<1> ring;
  if (threadIdx.x == 0) {
    ring.init(1);
    cuda::ptx::fence_mbarrier_init(cuda::ptx::sem_release, cuda::ptx::scope_cluster);
    load_tile(tile, from, sequences.origin_of_used(sequence), row, head, ring.begin_fill({}, Tile::kBytes),
              first_column);
  }
  __syncthreads();
  ring.wait_full({});
  for (int i = threadIdx.x; i < Tile::kRows * Tile::kColumns; i += blockDim.x) {
    const int r = i / Tile::kColumns, c = i % Tile::kColumns;
    T& element = tile.data[c / 64 * (Tile::kSlabBytes / 2) + r * 64 + ((c % 64 / 8) ^ (r % 8)) * 8 + c % 8];
    arrived[i] = element;
    element = T(float(element) + 1.f);
  }
  cuda::ptx::fence_proxy_async(cuda::ptx::space_shared);
  __syncthreads();
  if (threadIdx.x == 0) {
    store_tile(to, tile, sequences.origin_of_stored(sequence), row, head, first_column);
    cuda::ptx::cp_async_bulk_commit_group();
    cuda::ptx::cp_async_bulk_wait_group(cuda::ptx::n32_t<0>{});
  }
}

static float value(int row, int head, int column) {
  return static_cast<float>((row * 7 + head * 31 + column) % 200 - 100);
}

// A sequence of `size` rows from `begin` on, of which `used` are used; NaN everywhere else. The tile may have a part of
// the columns, as the tiles of thread blocks that share them out do.
template <class Part = Tile>
static void check_sequence(int begin, int size, int used, int head, int row, int first_column = 0) {
  constexpr int kRows = 3000, kHeads = 4;
  const Strides strides{.batch = kRows * kHeads * kColumns, .row = kHeads * kColumns, .head = kColumns};
  const auto offset = [&](int r, int h, int c) { return r * strides.row + h * strides.head + c; };
  std::vector<T> input(strides.batch, T(NAN));
  for (int r = begin; r < begin + used; ++r) {
    for (int h = 0; h < kHeads; ++h) {
      for (int c = 0; c < kColumns; ++c) input[offset(r, h, c)] = T(value(r, h, c));
    }
  }
  DeviceArray<T> in(input), out(input.size()), arrived_device(kTileRows * Part::kColumns);
  // Another one follows: the last has room for all rows that are left.
  const DeviceArray<int> cu_seqlens(std::vector<int>{begin, begin + size, kRows}), seqused(std::vector<int>{used, 0});
  const Sequences sequences{.count = 2,
                            .each = {.rows = kRows, .keys = 1, .left = Sequence::kUnbounded, .right = 0},
                            .lengths = {.cu_seqlens_q = cu_seqlens.data, .seqused_q = seqused.data}};
  const auto map = [&](const char* name, T* data) {
    return make_sequence_map<Tile>(name, {data, strides}, {1, kRows, kHeads, kColumns}, true);
  };
  test::launch(copy_tile<Part>, 1, 128, static_cast<int>(sizeof(Part)), map("in", in.data), map("out", out.data),
               sequences, 0, row, head, first_column, arrived_device.data);
  const std::vector<T> arrived = arrived_device.host(), output = out.host();

  const std::string name = std::to_string(used) + " of " + std::to_string(size) + " rows from " +
                           std::to_string(begin) + ", head " + std::to_string(head) + ", tile at " +
                           std::to_string(row) + ", column " + std::to_string(first_column);
  for (int r = 0; r < kTileRows; ++r) {
    for (int c = 0; c < Part::kColumns; ++c) {
      const float expected = row + r < used ? value(begin + row + r, head, first_column + c) : 0.f;
      test::check(float(arrived[r * Part::kColumns + c]) == expected, name + ": row " + std::to_string(r) + " arrives");
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int h = 0; h < kHeads; ++h) {
      for (int c = 0; c < kColumns; ++c) {
        const int in_tile = r - begin - row, column = c - first_column;
        const bool written = h == head && in_tile >= 0 && in_tile < kTileRows && r < begin + size && column >= 0 &&
                             column < Part::kColumns;
        const float got = float(output[offset(r, h, c)]);
        const float expected = written ? float(arrived[in_tile * Part::kColumns + column]) + 1.f : 0.f;
        test::check(written ? got == expected : std::isnan(got), name + ": row " + std::to_string(r) + " leaves");
      }
    }
  }
}

// The last rows of a tensor of more than 2^31 elements, and a head far from its first.
static void check_large() {
  constexpr int kRows = 40000, kHeads = 512, kBegin = kRows - 37, kHead = kHeads - 1;
  const Strides strides{.batch = int64_t{kRows} * kHeads * kColumns, .row = kHeads * kColumns, .head = kColumns};
  static_assert(int64_t{kBegin} * kHeads * kColumns > int64_t{1} << 31);
  DeviceArray<T> tensor(strides.batch), arrived_device(kTileRows * kColumns);  // NaN
  const std::vector<T> row(kColumns, T(3.f));
  T* first = tensor.data + kBegin * strides.row + kHead * strides.head;
  for (int r = kBegin; r < kRows; ++r) {
    test::require(
        cudaMemcpy(first + (r - kBegin) * strides.row, row.data(), kColumns * sizeof(T), cudaMemcpyHostToDevice),
        "cudaMemcpy");
  }
  const DeviceArray<int> cu_seqlens(std::vector<int>{kBegin, kRows});
  const Sequences sequences{.count = 1,
                            .each = {.rows = kRows, .keys = 1, .left = Sequence::kUnbounded, .right = 0},
                            .lengths = {.cu_seqlens_q = cu_seqlens.data}};
  const CUtensorMap map = make_sequence_map<Tile>("tensor", {tensor.data, strides}, {1, kRows, kHeads, kColumns}, true);
  test::launch(copy_tile<Tile>, 1, 128, static_cast<int>(sizeof(Tile)), map, map, sequences, 0, 0, kHead, 0,
               arrived_device.data);
  const std::vector<T> arrived = arrived_device.host();
  for (int r = 0; r < kTileRows; ++r) {
    const float expected = kBegin + r < kRows ? 3.f : 0.f;
    test::check(float(arrived[r * kColumns]) == expected,
                "beyond 2^31 elements: row " + std::to_string(r) + " arrives");
  }
  for (int r = kBegin; r < kRows; ++r) {
    std::vector<T> got(2 * kColumns);  // of the head before as well
    test::require(cudaMemcpy(got.data(), first + (r - kBegin) * strides.row - kColumns, got.size() * sizeof(T),
                             cudaMemcpyDeviceToHost),
                  "cudaMemcpy");
    test::check(std::isnan(float(got[kColumns - 1])) && float(got[kColumns]) == 4.f && float(got.back()) == 4.f,
                "beyond 2^31 elements: row " + std::to_string(r) + " leaves");
  }
}

int main() {
  test::require_hopper();
  for (int head : {0, 3}) {
    check_sequence(100, 37, 37, head, 0);
    check_sequence(0, 1, 1, head, 0);
    check_sequence(2936, 64, 64, head, 0);  // the last rows of all
    check_sequence(2999, 1, 1, head, 0);
    check_sequence(500, 200, 200, head, 192);
    check_sequence(500, 200, 200, head, 128);
    check_sequence(500, 200, 150, head, 128);  // stored but not used
    check_sequence(500, 200, 0, head, 64);
    check_sequence(700, 64, 64, head, 64);  // a tile past the end
    check_sequence(10, 0, 0, head, 0);
    for (int first_column : {0, kColumns / 2}) {
      check_sequence<HalfTile>(500, 200, 150, head, 128, first_column);
      check_sequence<HalfTile>(700, 64, 64, head, 64, first_column);
    }
  }
  size_t free = 0, total = 0;
  test::require(cudaMemGetInfo(&free, &total), "asking for memory");
  if (free > size_t{6} << 30) check_large();
  return test::finish("ragged");
}
