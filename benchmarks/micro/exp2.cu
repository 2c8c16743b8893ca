// What the softmax's units do: exp2 (MUFU) and FFMA alone, mixed, and while a warpgroup keeps the tensor cores busy.
#include "../../csrc/tile/softmax.cuh"
#include "micro.cuh"
#include "product.cuh"

namespace {

using micro::DeviceArray;
using micro::Stamp;

// ------------------------------------------------------------------------------------------- what a thread calculates

// No calculation: the tensor cores alone.
struct Nothing {
  static constexpr const char* kName = "nothing";
  static constexpr int kExp2 = 0, kFma = 0;
};

// kFmaPerExp2 FFMAs to each exp2 (or no exp2), in chains long enough apart that no instruction waits for another's
// latency. The chains stay where they can be checked: x = 2^-x has one solution, and y = 1 - y comes back to y.
template <bool kWithExp2, int kFmaPerExp2>
struct Arithmetic {
  static constexpr int kChains = 16;
  static constexpr int kRounds = kFmaPerExp2 > 4 ? 2 : 8;  // even, so that y comes back
  static constexpr int kExp2 = kWithExp2 * kChains * kRounds, kFma = kFmaPerExp2 * kChains * kRounds;  // in a step

  float x[kChains], y[kChains], minus_one, one;

  // The constants come from memory, or the compiler would do the arithmetic itself.
  __device__ __forceinline__ explicit Arithmetic(const float* constants) : minus_one(constants[0]), one(constants[1]) {
#pragma unroll
    for (int i = 0; i < kChains; ++i) {
      x[i] = first(i);
      y[i] = first(i);
    }
  }

  __device__ __forceinline__ void step() {
#pragma unroll
    for (int round = 0; round < kRounds; ++round) {
#pragma unroll
      for (int i = 0; i < kChains; ++i) {
        if constexpr (kWithExp2) x[i] = flash_attn_ext::ptx::ex2(-x[i]);
#pragma unroll
        for (int j = 0; j < kFmaPerExp2; ++j) {
          float& chain = y[(i * kFmaPerExp2 + j) % kChains];
          chain = fmaf(chain, minus_one, one);
        }
      }
    }
  }

  // How far the chains ended from where they should.
  __device__ __forceinline__ float error() const {
    float worst = 0.f;
#pragma unroll
    for (int i = 0; i < kChains; ++i) {
      if constexpr (kWithExp2) worst += fabsf(x[i] - 0.64118574f);
      if constexpr (kFmaPerExp2 > 0) worst += fabsf(y[i] - first(i));
    }
    return worst;
  }

 private:
  static __device__ __forceinline__ float first(int i) { return (threadIdx.x * kChains + i) / 8192.f; }  // 1 - y exact
};

struct Exp2 : Arithmetic<true, 0> {
  static constexpr const char* kName = "exp2";
  using Arithmetic::Arithmetic;
};
struct Fma : Arithmetic<false, 4> {
  static constexpr const char* kName = "FFMA";
  using Arithmetic::Arithmetic;
};
struct Exp2AndFma : Arithmetic<true, 1> {
  static constexpr const char* kName = "exp2 + FFMA";
  using Arithmetic::Arithmetic;
};
struct Exp2And7Fma : Arithmetic<true, 7> {  // as many instructions as there are cycles in a warp's exp2
  static constexpr const char* kName = "exp2 + 7 FFMA";
  using Arithmetic::Arithmetic;
};

// The kernels' softmax of 128 keys: for each score also a maximum and a sum, for each row two shuffles.
struct Softmax {
  static constexpr const char* kName = "softmax";
  static constexpr int kScores = 64;
  static constexpr int kExp2 = kScores, kFma = kScores;

  float scores[kScores];
  flash_attn_ext::OnlineSoftmax softmax;
  bool grew = false;

  __device__ __forceinline__ explicit Softmax(const float* constants) : softmax(constants[2]) {
#pragma unroll
    for (int i = 0; i < kScores; ++i) scores[i] = micro::hash(threadIdx.x * kScores + i) * 0x1p-32f;
  }

  // P becomes the next scores. With a scale of 1/2 they stay in (0, 2], and the first maximum stays the offset.
  __device__ __forceinline__ void step() {
    float rescale[2];
    grew |= softmax.update(scores, rescale);
  }

  __device__ __forceinline__ float error() const {
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < kScores; ++i) sum += scores[i];
    const bool right = sum > 0.f && sum <= 2.f * kScores && softmax.sum[0] > 0.f && softmax.sum[1] > 0.f && grew;
    return right ? 0.f : 1.f;
  }
};

// ------------------------------------------------------------------------------------------------------------ kernel

enum class Beside { kNothing, kFromShared, kFromRegisters };

template <Beside kBeside>
using ProductBeside = micro::Product<__nv_bfloat16, 128, kBeside == Beside::kFromRegisters>;

constexpr int kWarpgroups = 2;  // that calculate: two warps to a scheduler, as at head dim 128
constexpr int kWarps = 4 * kWarpgroups;
constexpr int kThreads = 128 * (1 + kWarpgroups);

template <Beside kBeside>
struct Smem {
  typename ProductBeside<kBeside>::ATile a;
  typename ProductBeside<kBeside>::BTile b;
  volatile int done;  // warpgroup 0 has ended, and so shall the others
};

struct WarpCount {
  long long steps, cycles;
};

// Warpgroup 0 multiplies (or waits for about as long), the others calculate until it has ended: all that is measured of
// one happens while the other is at work.
template <class Work, Beside kBeside>
__global__ void __launch_bounds__(kThreads, 1)
    calculate(const __nv_bfloat16* operands, const float* constants, int products, Stamp* intervals, WarpCount* counts,
              float* errors, float* d) {
  using Product = ProductBeside<kBeside>;
  extern __shared__ __align__(1024) unsigned char dynamic_smem[];
  auto& smem = *reinterpret_cast<Smem<kBeside>*>(dynamic_smem);
  const int warpgroup = __shfl_sync(~0u, threadIdx.x / 128, 0);
  micro::fill(smem.a, operands);
  micro::fill(smem.b, operands);
  if (threadIdx.x == 0) smem.done = 0;
  cuda::ptx::fence_proxy_async(cuda::ptx::space_shared);
  __syncthreads();

  if (warpgroup == 0) {
    const Stamp start = Stamp::now();
    if constexpr (kBeside == Beside::kNothing) {
      if (threadIdx.x == 0) {
        const long long cycles = static_cast<long long>(products) * Product::kN / 2 * Product::kSteps;
        while (clock64() - start.cycles < cycles) __nanosleep(1000);
      }
    } else {
      Product product(operands, smem.a, smem.b);
      product.run(products);
      if (blockIdx.x == 0) product.store(d);
    }
    if (threadIdx.x == 0) {
      intervals[blockIdx.x] = Stamp::now().since(start);
      smem.done = 1;
    }
  } else if constexpr (Work::kExp2 + Work::kFma > 0) {
    Work work(constants);
    long long steps = 0;
    const long long start = clock64();
    while (!smem.done) {
      work.step();
      ++steps;
    }
    const long long cycles = clock64() - start;
    if (threadIdx.x % 32 == 0) counts[blockIdx.x * kWarps + threadIdx.x / 32 - 4] = {steps, cycles};
    errors[blockIdx.x * 128 * kWarpgroups + threadIdx.x - 128] = work.error();
  }
}

// ------------------------------------------------------------------------------------------------------------ measure

template <Beside kBeside>
void check_product(const std::vector<__nv_bfloat16>& operands, const std::vector<float>& d) {
  using Product = ProductBeside<kBeside>;
  for (int row = 0; row < 64; ++row) {
    for (int column = 0; column < Product::kN; ++column) {
      double expected = 0;
      for (int k = 0; k < Product::kDepth; ++k) {
        const int b = Product::kFromRegisters ? k * Product::kN + column : column * Product::kDepth + k;
        expected += double(float(operands[row * Product::kDepth + k])) * float(operands[b]);
      }
      micro::require(std::abs(d[row * Product::kN + column] - expected) < 1e-2, "the product beside the work");
    }
  }
}

template <class Work, Beside kBeside>
void measure_pair(micro::Session& session) {
  using Product = ProductBeside<kBeside>;
  constexpr bool kMultiplies = kBeside != Beside::kNothing;
  constexpr const char* kBesideName = kBeside == Beside::kNothing      ? "nothing"
                                      : kBeside == Beside::kFromShared ? "SS 64x128x16"
                                                                       : "RS 64x128x16";
  double exp2 = NAN, fma = NAN, tensor_percent = NAN, clock = NAN;
  if (!session.dry_run) {
    const int blocks = session.multiprocessors;
    const auto operands = micro::values<__nv_bfloat16>(Product::kN * Product::kDepth, true, 1);
    DeviceArray<__nv_bfloat16> operands_device(operands);
    DeviceArray<float> constants(std::vector<float>{-1.f, 1.f, 0.5f}), d(64 * Product::kN);
    DeviceArray<float> errors(blocks * 128 * kWarpgroups);
    DeviceArray<Stamp> intervals(blocks);
    DeviceArray<WarpCount> counts(blocks * kWarps);
    for (const int products : {200, 8000}) {  // the first run loads the kernel; the second takes 2 ms or more
      micro::launch(calculate<Work, kBeside>, blocks, kThreads, sizeof(Smem<kBeside>), operands_device.data,
                    constants.data, products, intervals.data, counts.data, errors.data, d.data);
      const auto measured = intervals.host();
      clock = micro::clock_of(measured);
      std::vector<double> shares;
      for (const Stamp& interval : measured) {
        shares.push_back(100 * products * Product::kFlops / (micro::kTensorFlops * interval.cycles));
      }
      if (kMultiplies) tensor_percent = micro::median(shares);
    }
    if (kMultiplies) check_product<kBeside>(operands, d.host());
    if constexpr (Work::kExp2 + Work::kFma > 0) {
      double steps_per_cycle = 0;  // of all warps of all blocks
      for (const WarpCount& warp : counts.host()) steps_per_cycle += double(warp.steps) / warp.cycles;
      exp2 = steps_per_cycle / blocks * 32 * Work::kExp2;
      fma = steps_per_cycle / blocks * 32 * Work::kFma;
      for (const float error : errors.host()) {
        micro::require(error < 1e-4f, std::string(Work::kName) + " ended off by " + std::to_string(error));
      }
    }
  }
  session.add({Work::kName, kBesideName, exp2, 100 * exp2 / micro::kExp2, fma, 100 * fma / micro::kFma, tensor_percent,
               clock / 1e9});
}

template <class Work>
void measure_work(micro::Session& session) {
  measure_pair<Work, Beside::kNothing>(session);
  measure_pair<Work, Beside::kFromShared>(session);
  measure_pair<Work, Beside::kFromRegisters>(session);
}

void measure(micro::Session& session) {
  measure_pair<Nothing, Beside::kFromShared>(session);
  measure_pair<Nothing, Beside::kFromRegisters>(session);
  measure_work<Exp2>(session);
  measure_work<Fma>(session);
  measure_work<Exp2AndFma>(session);
  measure_work<Exp2And7Fma>(session);
  measure_work<Softmax>(session);
}

}  // namespace

int main(int argc, char** argv) {
  const micro::Description description{
      .name = "exp2",
      .text =
          "Rate of exp2 (MUFU) and FFMA, alone, mixed and beside a warpgroup of wgmma, a multiprocessor and cycle,\n"
          "and what is left of the tensor cores' rate (random data, bursts of 2 ms and more).",
      .columns = {{"work", "work"},
                  {"beside", "beside"},
                  {"exp2_per_cycle", "exp2/cycle", 2},
                  {"exp2_percent", "% of 16", 1},
                  {"ffma_per_cycle", "FFMA/cycle", 2},
                  {"ffma_percent", "% of 128", 1},
                  {"tensor_percent", "tensor cores %", 1},
                  {"clock_ghz", "GHz", 3}}};
  return micro::run(description, argc, argv, measure);
}
