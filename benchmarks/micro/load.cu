// How fast TMA brings tiles of 128 rows x 64 columns (16 KB) from L2 and from memory into a ring of stages, as the
// kernels load K and V.
#include "../../csrc/ptx/tma.cuh"
#include "../../csrc/tensor_map.h"
#include "../../csrc/tile/copy.cuh"
#include "../../csrc/tile/ring.cuh"
#include "../../csrc/tile/smem.cuh"
#include "micro.cuh"

namespace {

using flash_attn_ext::Ring;
using flash_attn_ext::RingPosition;
using flash_attn_ext::SmemTile;
using micro::DeviceArray;
using micro::Stamp;

constexpr int kTileRows = 128, kColumns = 64, kHeads = 32;
constexpr int kWordsPerRow = kColumns / 2;  // of 4 bytes
using Tile = SmemTile<__nv_bfloat16, kTileRows, kColumns>;

// A (1, rows, kHeads, 64) tensor of which every word is the hash of its place.
struct Tensor {
  int tiles;      // of a head: its rows / kTileRows
  bool by_token;  // rows of all heads side by side (B, S, H, D), else head after head (B, H, S, D)

  __host__ __device__ int64_t rows() const { return int64_t{tiles} * kTileRows; }
  __host__ __device__ int64_t words() const { return rows() * kHeads * kWordsPerRow; }
  // Below 2^32 words; `word` counts within the row of 64 columns.
  static __host__ __device__ uint32_t content(int64_t rows, int head, int64_t row, int word) {
    return micro::hash(static_cast<uint32_t>((head * rows + row) * kWordsPerRow + word));
  }
};

__global__ void fill(Tensor tensor, uint32_t* words) {
  const int64_t step = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < tensor.words(); i += step) {
    const int word = i % kWordsPerRow;
    const int64_t line = i / kWordsPerRow;  // in memory
    const int head = tensor.by_token ? line % kHeads : line / tensor.rows();
    const int64_t row = tensor.by_token ? line / kHeads : line % tensor.rows();
    words[i] = Tensor::content(tensor.rows(), head, row, word);
  }
}

// The way of a block through the tiles: along a head, then to the next head, and round.
struct Walk {
  int head, tile;
  __device__ __forceinline__ Walk(const Tensor& tensor, int64_t first)
      : head(first / tensor.tiles % kHeads), tile(first % tensor.tiles) {}
  __device__ __forceinline__ void next(const Tensor& tensor) {
    if (++tile == tensor.tiles) {
      tile = 0;
      if (++head == kHeads) head = 0;
    }
  }
};

template <int kStages>
struct Smem {
  Tile tiles[kStages];
  Ring<kStages> ring;
};

constexpr int kReaders = 128;

// Thread 128 copies; threads 0 to 127 check a word of every tile, each in a row of its own, and hand the stage back.
template <int kStages>
__global__ void __launch_bounds__(kReaders + 32, 1)
    load(const __grid_constant__ CUtensorMap map, Tensor tensor, bool together, int count, unsigned long long* errors,
         Stamp* intervals) {
  extern __shared__ __align__(1024) unsigned char dynamic_smem[];
  auto& smem = *reinterpret_cast<Smem<kStages>*>(dynamic_smem);
  if (threadIdx.x == 0) {
    smem.ring.init(kReaders / 32);
    cuda::ptx::fence_mbarrier_init(cuda::ptx::sem_release, cuda::ptx::scope_cluster);
    flash_attn_ext::ptx::prefetch_tensormap(&map);
  }
  __syncthreads();

  const int64_t total = int64_t{tensor.tiles} * kHeads;
  Walk walk(tensor, together ? 0 : blockIdx.x * total / gridDim.x);
  RingPosition<kStages> at;
  if (threadIdx.x == kReaders) {
    for (int i = 0; i < count; ++i, at.next(), walk.next(tensor)) {
      uint64_t* full = smem.ring.begin_fill(at, Tile::kBytes);
      flash_attn_ext::load_tile(smem.tiles[at.stage], map, walk.tile * kTileRows, walk.head, 0, full);
    }
  } else if (threadIdx.x < kReaders) {
    const int row = threadIdx.x, word = (threadIdx.x * 5) % kWordsPerRow;
    const Stamp start = Stamp::now();
    unsigned long long wrong = 0;
    for (int i = 0; i < count; ++i, at.next(), walk.next(tensor)) {
      const int64_t tensor_row = int64_t{walk.tile} * kTileRows + row;
      const uint32_t expected = Tensor::content(tensor.rows(), walk.head, tensor_row, word);
      const uint32_t address = smem.tiles[at.stage].chunk_address(0, row, word / 4) + word % 4 * 4;
      smem.ring.wait_full(at);
      wrong += *reinterpret_cast<const uint32_t*>(__cvta_shared_to_generic(address)) != expected;
      __syncwarp();
      smem.ring.release(at);
    }
    if (threadIdx.x == 0) intervals[blockIdx.x] = Stamp::now().since(start);
    atomicAdd(errors, wrong);
  }
}

struct Place {
  Tensor tensor;
  bool together;  // all blocks read the same tiles at the same time, else each starts at another
  bool from_memory;

  const char* name() const { return from_memory ? "memory" : "L2"; }
  const char* layout() const { return tensor.by_token ? "(B, S, H, D)" : "(B, H, S, D)"; }
};

// 16 MB stay in L2; of 2 GB nothing is left there when it is read again.
constexpr int kTilesL2 = 32, kTilesMemory = 4096;
constexpr Place kPlaces[] = {
    {.tensor = {kTilesL2, true}, .together = false, .from_memory = false},
    {.tensor = {kTilesL2, false}, .together = false, .from_memory = false},
    {.tensor = {kTilesL2, true}, .together = true, .from_memory = false},
    {.tensor = {kTilesMemory, true}, .together = false, .from_memory = true},
    {.tensor = {kTilesMemory, false}, .together = false, .from_memory = true},
};

template <int kStages>
void measure_stages(micro::Session& session, const Place& place, const CUtensorMap& map, double memory_bytes) {
  double rate = NAN, limit = NAN, clock = NAN;
  if (!session.dry_run) {
    const int blocks = session.multiprocessors;
    const int64_t total = int64_t{place.tensor.tiles} * kHeads;
    // Memory: the whole tensor, twice. L2: 4000 tiles a block, 2 ms and more.
    const int count = static_cast<int>(place.from_memory ? 2 * total / blocks : 4000);
    DeviceArray<unsigned long long> errors(1);
    errors.zero();
    DeviceArray<Stamp> intervals(blocks);
    micro::Timer timer;
    std::vector<double> rates;
    for (int i = 0; i < 6; ++i) {
      micro::hold();
      const double seconds = timer.seconds([&] {
        micro::launch(load<kStages>, blocks, kReaders + 32, sizeof(Smem<kStages>), map, place.tensor, place.together,
                      count, errors.data, intervals.data);
      });
      if (i > 0) rates.push_back(double(blocks) * count * Tile::kBytes / seconds);  // the first fills L2
    }
    rate = micro::median(rates);
    clock = micro::clock_of(intervals.host());
    limit = place.from_memory ? memory_bytes : micro::kLoadBytes * clock * blocks;
    micro::require(errors.host()[0] == 0, std::to_string(errors.host()[0]) + " words from " + place.name());
  }
  session.add({place.name(), place.layout(), place.together ? "the same" : "different", double(kStages), rate / 1e12,
               rate / clock / session.multiprocessors, limit / 1e12, 100 * rate / limit, clock / 1e9});
}

void measure(micro::Session& session) {
  double memory_bytes = NAN;  // a second, by the memory's clock (two transfers a cycle) and width
  if (!session.dry_run) {
    int kilohertz = 0, bits = 0;
    micro::check(cudaDeviceGetAttribute(&kilohertz, cudaDevAttrMemoryClockRate, 0), "asking the device");
    micro::check(cudaDeviceGetAttribute(&bits, cudaDevAttrGlobalMemoryBusWidth, 0), "asking the device");
    memory_bytes = 2. * kilohertz * 1e3 * bits / 8;
  }
  for (const Place& place : kPlaces) {
    const size_t words = session.dry_run ? 1 : place.tensor.words();
    CUtensorMap map{};
    uint32_t* data = nullptr;
    if (!session.dry_run) {
      micro::check(cudaMalloc(&data, words * sizeof(uint32_t)), "cudaMalloc");
      fill<<<1024, 256>>>(place.tensor, data);
      micro::check(cudaGetLastError(), "launching a kernel");
      const int64_t rows = place.tensor.rows();
      const flash_attn_ext::Strides strides{.batch = rows * kHeads * kColumns,
                                            .row = place.tensor.by_token ? kHeads * kColumns : kColumns,
                                            .head = place.tensor.by_token ? kColumns : rows * kColumns};
      map = flash_attn_ext::make_tensor_map<Tile>("the tensor", {data, strides}, {1, rows, kHeads, kColumns});
    }
    measure_stages<2>(session, place, map, memory_bytes);
    measure_stages<4>(session, place, map, memory_bytes);
    measure_stages<8>(session, place, map, memory_bytes);
    measure_stages<12>(session, place, map, memory_bytes);
    micro::check(data ? cudaFree(data) : cudaSuccess, "cudaFree");
  }
}

}  // namespace

int main(int argc, char** argv) {
  const micro::Description description{
      .name = "load",
      .text =
          "Bandwidth of TMA loads, tiles of 128 x 64 elements (16 KB) into a ring of 2 to 12 of them a\n"
          "multiprocessor: of a tensor that L2 holds (16 MB) and of one that it does not (2 GB), in (B, S, H, D)\n"
          "memory and head by head. Limits: 64 bytes a cycle and multiprocessor; the memory's clock and width.",
      .columns = {{"from", "from"},
                  {"layout", "layout"},
                  {"tiles", "blocks read"},
                  {"stages", "tiles in flight", 0},
                  {"tbytes_per_second", "TB/s", 2},
                  {"bytes_per_cycle", "B/cycle/SM", 1},
                  {"limit_tbytes_per_second", "limit TB/s", 2},
                  {"percent", "% of limit", 1},
                  {"clock_ghz", "GHz", 3}}};
  return micro::run(description, argc, argv, measure);
}
