// How fast float32 sums go to L2, as the backward pass adds up dQ: by bulk copies that add (cp.reduce.async.bulk) and
// by vector reductions from registers (red.global.add.v4.f32), beside a bulk copy that only stores.
#include "micro.cuh"

namespace {

using micro::DeviceArray;
using micro::Stamp;

constexpr int kFloats = 16384 * 128;  // dQ of one head, 8 MB: L2 holds it
constexpr int kThreads = 256;

enum class Way { kBulkAdd, kVectorAdd, kBulkStore };

// red.global.add.v4.f32. The atomicAdd of a float4 becomes the slower form that returns the old value.
__device__ __forceinline__ void red_add(float* to, const float4& x) {
  asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to), "f"(x.x), "f"(x.y), "f"(x.z),
               "f"(x.w)
               : "memory");
}

// What is added, or stored, to each element of a piece. Small integers: every sum is exact.
__host__ __device__ inline float addend(int i) { return 1 + i % 7; }

// Each block goes round the whole buffer `rounds` times, by pieces of kBytes, all starting at other places or all at
// the same one.
template <Way kWay, int kBytes>
__global__ void __launch_bounds__(kThreads, 1) add(float* to, int rounds, bool together, Stamp* intervals) {
  extern __shared__ __align__(128) float piece[];
  constexpr int kPieceFloats = kBytes / 4, kPieces = kFloats / kPieceFloats;
  static_assert(kFloats % kPieceFloats == 0 && kPieceFloats % (4 * kThreads) == 0);
  const int first = together ? 0 : static_cast<int64_t>(blockIdx.x) * kPieces / gridDim.x;

  if constexpr (kWay == Way::kVectorAdd) {
    constexpr int kVectors = kPieceFloats / (4 * kThreads);
    const Stamp start = Stamp::now();
    float4 values[kVectors];
#pragma unroll
    for (int j = 0; j < kVectors; ++j) {
      const int i = 4 * (j * kThreads + threadIdx.x);
      values[j] = {addend(i), addend(i + 1), addend(i + 2), addend(i + 3)};
    }
    int at = first;
    for (int count = 0; count < rounds * kPieces; ++count) {
      float* piece_at = to + at * kPieceFloats + 4 * threadIdx.x;
#pragma unroll
      for (int j = 0; j < kVectors; ++j) red_add(piece_at + 4 * j * kThreads, values[j]);
      if (++at == kPieces) at = 0;
    }
    __threadfence();
    if (threadIdx.x == 0) intervals[blockIdx.x] = Stamp::now().since(start);
  } else {
    for (int i = threadIdx.x; i < kPieceFloats; i += kThreads) piece[i] = addend(i);
    cuda::ptx::fence_proxy_async(cuda::ptx::space_shared);
    __syncthreads();
    if (threadIdx.x == 0) {
      const Stamp start = Stamp::now();
      int at = first;
      for (int count = 0; count < rounds * kPieces; ++count) {
        if constexpr (kWay == Way::kBulkAdd) {
          cuda::ptx::cp_reduce_async_bulk(cuda::ptx::space_global, cuda::ptx::space_shared, cuda::ptx::op_add,
                                          to + at * kPieceFloats, piece, kBytes);
        } else {
          cuda::ptx::cp_async_bulk(cuda::ptx::space_global, cuda::ptx::space_shared, to + at * kPieceFloats, piece,
                                   kBytes);
        }
        cuda::ptx::cp_async_bulk_commit_group();
        cuda::ptx::cp_async_bulk_wait_group_read(cuda::ptx::n32_t<3>{});  // four pieces leave at a time
        if (++at == kPieces) at = 0;
      }
      cuda::ptx::cp_async_bulk_wait_group(cuda::ptx::n32_t<0>{});
      intervals[blockIdx.x] = Stamp::now().since(start);
    }
  }
}

template <Way kWay, int kBytes>
void measure_way(micro::Session& session, const std::string& name, bool together, double& store_rate) {
  double rate = NAN, clock = NAN;
  if (!session.dry_run) {
    constexpr int kRounds = 8;  // 2 ms and more
    const int blocks = session.multiprocessors;
    DeviceArray<float> to(kFloats);
    DeviceArray<Stamp> intervals(blocks);
    micro::Timer timer;
    std::vector<double> rates;
    for (int i = 0; i < 6; ++i) {
      to.zero();
      micro::hold();
      const double seconds = timer.seconds([&] {
        micro::launch(add<kWay, kBytes>, blocks, kThreads, kWay == Way::kVectorAdd ? 0 : kBytes, to.data, kRounds,
                      together, intervals.data);
      });
      if (i > 0) rates.push_back(4. * kFloats * kRounds * blocks / seconds);
    }
    rate = micro::median(rates);
    clock = micro::clock_of(intervals.host());
    const std::vector<float> sums = to.host();
    const float times = kWay == Way::kBulkStore ? 1 : kRounds * blocks;
    for (int i = 0; i < kFloats; ++i) {
      micro::require(sums[i] == times * addend(i % (kBytes / 4)), name + ", element " + std::to_string(i));
    }
    if (kWay == Way::kBulkStore) store_rate = rate;
  }
  session.add({name, together ? "the same" : "different", kBytes / 1024., rate / 1e12,
               rate / clock / session.multiprocessors, 100 * rate / store_rate, clock / 1e9});
}

void measure(micro::Session& session) {
  double store_rate = NAN;
  measure_way<Way::kBulkStore, 16384>(session, "bulk store", false, store_rate);
  measure_way<Way::kBulkAdd, 8192>(session, "bulk add", false, store_rate);
  measure_way<Way::kBulkAdd, 16384>(session, "bulk add", false, store_rate);
  measure_way<Way::kBulkAdd, 32768>(session, "bulk add", false, store_rate);
  measure_way<Way::kBulkAdd, 16384>(session, "bulk add", true, store_rate);
  measure_way<Way::kVectorAdd, 16384>(session, "red.v4", false, store_rate);
  measure_way<Way::kVectorAdd, 16384>(session, "red.v4", true, store_rate);
}

}  // namespace

int main(int argc, char** argv) {
  const micro::Description description{
      .name = "reduce",
      .text =
          "Bandwidth of float32 additions to L2 (8 MB, as much as dQ of a head of 16384 rows of 128): bulk copies\n"
          "that add against vector reductions from registers. No data sheet has a limit: shares are of what bulk\n"
          "copies store in the same run. Blocks start at different places or all at the same.",
      .columns = {{"way", "way"},
                  {"start", "blocks start at"},
                  {"piece_kb", "KB at once", 0},
                  {"tbytes_per_second", "TB/s", 2},
                  {"bytes_per_cycle", "B/cycle/SM", 1},
                  {"percent_of_store", "% of store", 1},
                  {"clock_ghz", "GHz", 3}}};
  return micro::run(description, argc, argv, measure);
}
