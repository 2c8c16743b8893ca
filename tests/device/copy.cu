// Tensor maps, the ring, swizzled tiles and the fragment store: a tensor travels through shared memory and back. It may
// have fewer columns than the tiles, which are filled up with zeros then.
#include <algorithm>
#include <cmath>
#include <cuda/ptx>

#include "../../csrc/tensor_map.h"
#include "../../csrc/tile/copy.cuh"
#include "../../csrc/tile/fragment.cuh"
#include "../../csrc/tile/ring.cuh"
#include "../../csrc/tile/smem.cuh"
#include "device.cuh"

using namespace flash_attn_ext;
using test::DeviceArray;
using T = __nv_bfloat16;

constexpr int kTileRows = 64, kStages = 2;
constexpr int kBatch = 2, kSeqlen = 150, kHeads = 3;  // 150 rows: the third tile is ragged

template <class Tile>
struct Smem {
  Tile in[kStages], out;
  Ring<kStages> ring;
};

// Warp 0 copies the tiles of a sequence into the ring; warps 4 to 7 read them by address, double each element and store
// them as a fragment would be stored.
template <class Tile>
__global__ void round_trip(const __grid_constant__ CUtensorMap from, const __grid_constant__ CUtensorMap to,
                           float* raw) {
  constexpr int kColumns = Tile::kColumns;
  extern __shared__ __align__(1024) unsigned char dynamic_smem[];
  auto& smem = *reinterpret_cast<Smem<Tile>*>(dynamic_smem);
  const int head = blockIdx.x % kHeads, batch = blockIdx.x / kHeads, tiles = (kSeqlen + kTileRows - 1) / kTileRows;
  if (threadIdx.x == 0) {
    smem.ring.init(4);
    cuda::ptx::fence_mbarrier_init(cuda::ptx::sem_release, cuda::ptx::scope_cluster);
  }
  __syncthreads();
  RingPosition<kStages> at;
  if (threadIdx.x == 0) {
    for (int tile = 0; tile < tiles; ++tile, at.next()) {
      uint64_t* full = smem.ring.begin_fill(at, Tile::kBytes);
      load_tile(smem.in[at.stage], from, tile * kTileRows, head, batch, full);
    }
  } else if (threadIdx.x >= 128) {
    for (int tile = 0; tile < tiles; ++tile, at.next()) {
      smem.ring.wait_full(at);
      float x[kColumns / 2];
#pragma unroll
      for (int i = 0; i < kColumns / 2; ++i) {
        const int r = own_row() + 8 * fragment_row(i), c = own_column() + fragment_column(i);
        const uint32_t address = smem.in[at.stage].chunk_address(c / 64, r, c % 64 / 8) + c % 8 * 2;
        x[i] = static_cast<float>(*reinterpret_cast<const T*>(__cvta_shared_to_generic(address)));
        raw[((blockIdx.x * tiles + tile) * kTileRows + r) * kColumns + c] = x[i];
      }
      __syncwarp();
      smem.ring.release(at);
      const float twice[2] = {2.f, 2.f};
      store_fragment<T, kColumns>(smem.out, x, twice);
      cuda::ptx::fence_proxy_async(cuda::ptx::space_shared);
      ptx::bar_sync(1, 128);
      if (threadIdx.x == 128) {
        store_tile(to, smem.out, tile * kTileRows, head, batch);
        cuda::ptx::cp_async_bulk_commit_group();
        cuda::ptx::cp_async_bulk_wait_group_read(cuda::ptx::n32_t<0>{});
      }
      ptx::bar_sync(1, 128);
    }
  }
}

// Rows beyond the sequence and columns beyond a head's belong to guards that must neither be read nor written.
template <int kColumns>
static void check_columns(int head_dim) {
  using Tile = SmemTile<T, kTileRows, kColumns>;
  constexpr int kGuard = 7, kRows = kSeqlen + kGuard;
  const int64_t width = head_dim + 8;
  const Strides strides{.batch = kRows * kHeads * width, .row = kHeads * width, .head = width};
  const auto offset = [&](int batch, int row, int head) {
    return batch * strides.batch + row * strides.row + head * strides.head;
  };
  std::mt19937 generator(1);
  std::vector<T> input(kBatch * strides.batch, T(NAN));
  for (int batch = 0; batch < kBatch; ++batch) {
    for (int row = 0; row < kSeqlen; ++row) {
      for (int head = 0; head < kHeads; ++head) {
        for (int c = 0; c < head_dim; ++c) {
          input[offset(batch, row, head) + c] = T(static_cast<float>(static_cast<int>(generator() % 200) - 100));
        }
      }
    }
  }
  const int tiles = (kSeqlen + kTileRows - 1) / kTileRows;
  DeviceArray<T> in_device(input), out_device(input.size());
  DeviceArray<float> raw_device(kBatch * kHeads * tiles * kTileRows * kColumns);
  const auto map = [&](const char* name, T* data) {
    return make_tensor_map<Tile>(name, {data, strides}, {kBatch, kSeqlen, kHeads, head_dim});
  };
  test::launch(round_trip<Tile>, kBatch * kHeads, 256, static_cast<int>(sizeof(Smem<Tile>)), map("in", in_device.data),
               map("out", out_device.data), raw_device.data);
  const std::vector<T> output = out_device.host();
  const std::vector<float> raw = raw_device.host();

  for (int batch = 0; batch < kBatch; ++batch) {
    for (int head = 0; head < kHeads; ++head) {
      for (int row = 0; row < tiles * kTileRows; ++row) {
        for (int c = 0; c < std::max<int64_t>(kColumns, width); ++c) {
          const std::string name = std::to_string(head_dim) + " of " + std::to_string(kColumns) + " columns, row " +
                                   std::to_string(row) + " column " + std::to_string(c);
          const bool is_inside = row < kSeqlen && c < head_dim;
          const float expected = is_inside ? float(input[offset(batch, row, head) + c]) : 0.f;
          if (c < kColumns) {
            const float read = raw[((batch * kHeads + head) * tiles * kTileRows + row) * kColumns + c];
            test::check(read == expected, name + " arrives (zero past the end)");
          }
          if (row >= kRows || c >= width) continue;
          const auto written = float(output[offset(batch, row, head) + c]);
          if (is_inside) {
            test::check(written == 2 * expected, name + " leaves doubled");
          } else {
            test::check(std::isnan(written), name + " past the end is not written");
          }
        }
      }
    }
  }
}

int main() {
  test::require_hopper();
  for (int head_dim : {8, 24, 40, 56, 64}) check_columns<64>(head_dim);
  for (int head_dim : {8, 24, 64, 72, 80, 96, 120, 128}) check_columns<128>(head_dim);
  return test::finish("copy");
}
