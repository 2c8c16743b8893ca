// How fast the tensor cores are, for the shapes that attention uses, and how much of it the power limit leaves.
#include <chrono>
#include <thread>

#include "micro.cuh"
#include "product.cuh"

namespace {

using micro::DeviceArray;
using micro::Stamp;

constexpr int kWarpgroups = 2;

template <class P>
struct Smem {
  typename P::ATile a[kWarpgroups];
  typename P::BTile b;
};

template <class P>
__global__ void __launch_bounds__(128 * kWarpgroups, 1)
    multiply(const typename P::T* a, const typename P::T* b, int iterations, float* d, Stamp* intervals) {
  extern __shared__ __align__(1024) unsigned char dynamic_smem[];
  auto& smem = *reinterpret_cast<Smem<P>*>(dynamic_smem);
  const int warpgroup = __shfl_sync(~0u, threadIdx.x / 128, 0);
  for (int i = 0; i < kWarpgroups; ++i) micro::fill(smem.a[i], a + i * 64 * P::kDepth);
  micro::fill(smem.b, b);
  cuda::ptx::fence_proxy_async(cuda::ptx::space_shared);
  __syncthreads();

  P product(a + warpgroup * 64 * P::kDepth, smem.a[warpgroup], smem.b);
  const Stamp start = Stamp::now();
  product.run(iterations);
  const Stamp interval = Stamp::now().since(start);
  if (threadIdx.x == 0) intervals[blockIdx.x] = interval;
  if (blockIdx.x == 0) product.store(d + warpgroup * 64 * P::kN);
}

struct Rate {
  double tflops = NAN, clock_ghz = NAN, percent = NAN;
};

template <class P>
void check(const std::vector<typename P::T>& a, const std::vector<typename P::T>& b, const std::vector<float>& d,
           const std::string& name) {
  for (int row = 0; row < 64 * kWarpgroups; ++row) {
    for (int column = 0; column < P::kN; ++column) {
      double expected = 0;
      for (int k = 0; k < P::kDepth; ++k) {
        const auto b_element = b[P::kFromRegisters ? k * P::kN + column : column * P::kDepth + k];
        expected += double(float(a[row * P::kDepth + k])) * float(b_element);
      }
      micro::require(std::abs(d[row * P::kN + column] - expected) < 1e-2,
                     name + " row " + std::to_string(row) + " column " + std::to_string(column));
    }
  }
}

template <class T, int kN, bool kFromRegisters>
void measure_product(micro::Session& session, bool random) {
  using P = micro::Product<T, kN, kFromRegisters>;
  const std::string name = std::string(kFromRegisters ? "RS" : "SS") + " 64x" + std::to_string(kN) + "x16";
  Rate burst, sustained;
  if (!session.dry_run) {
    const auto a = micro::values<T>(64 * kWarpgroups * P::kDepth, random, 1);
    const auto b = micro::values<T>(P::kDepth * kN, random, 2);
    DeviceArray<T> a_device(a), b_device(b);
    DeviceArray<float> d_device(64 * kWarpgroups * kN);
    DeviceArray<Stamp> intervals(session.multiprocessors);
    micro::Timer timer;

    const double flops = P::kFlops * kWarpgroups * session.multiprocessors;  // of one iteration
    const auto rate = [&](double for_seconds) {
      const int iterations = static_cast<int>(for_seconds * 800e12 / flops) + 1;
      micro::hold();
      const double seconds = timer.seconds([&] {
        micro::launch(multiply<P>, session.multiprocessors, 128 * kWarpgroups, sizeof(Smem<P>), a_device.data,
                      b_device.data, iterations, d_device.data, intervals.data);
      });
      const double clock = micro::clock_of(intervals.host()), tflops = flops * iterations / seconds / 1e12;
      return Rate{tflops, clock / 1e9, 100 * tflops * 1e12 / (micro::kTensorFlops * clock * session.multiprocessors)};
    };

    rate(1e-4);  // loads the kernel
    std::this_thread::sleep_for(std::chrono::milliseconds(80));
    burst = rate(3e-3);
    constexpr double kLaunchSeconds = 0.02;
    std::vector<Rate> rates;
    for (int i = 0; i * kLaunchSeconds < session.seconds; ++i) rates.push_back(rate(kLaunchSeconds));
    // Of the last third: the clock has settled. The launch in the middle of its rates.
    rates.erase(rates.begin(), rates.begin() + rates.size() * 2 / 3);
    std::sort(rates.begin(), rates.end(), [](const Rate& x, const Rate& y) { return x.tflops < y.tflops; });
    sustained = rates[rates.size() / 2];
    check<P>(a, b, d_device.host(), name);
  }
  session.add({name, micro::type_name<T>(), random ? "random" : "zeros", burst.tflops, burst.clock_ghz, burst.percent,
               sustained.tflops, sustained.clock_ghz, sustained.percent});
}

template <class T>
void measure_type(micro::Session& session, bool random) {
  measure_product<T, 64, false>(session, random);   // Q K^T of 64 keys
  measure_product<T, 80, false>(session, random);   // Q K^T, head dim 256
  measure_product<T, 128, false>(session, random);  // Q K^T, head dims 64 and 128
  measure_product<T, 64, true>(session, random);    // P V, head dim 64
  measure_product<T, 128, true>(session, random);   // P V, head dim 128
  measure_product<T, 256, true>(session, random);   // P V, head dim 256
}

void measure(micro::Session& session) {
  measure_type<__nv_bfloat16>(session, true);
  measure_type<__half>(session, true);
  measure_type<__nv_bfloat16>(session, false);
}

}  // namespace

int main(int argc, char** argv) {
  const micro::Description description{
      .name = "wgmma",
      .text =
          "Rate of the tensor cores: wgmma from shared memory (SS) and from registers (RS), in a burst of 3 ms\n"
          "after a pause and sustained, with the share of the limit at the clock that ran.",
      .seconds = 0.4,
      .columns = {{"product", "product"},
                  {"dtype", "dtype"},
                  {"data", "data"},
                  {"burst_tflops", "burst TFLOP/s", 0},
                  {"burst_clock_ghz", "GHz", 3},
                  {"burst_percent", "% of limit", 1},
                  {"sustained_tflops", "sustained TFLOP/s", 0},
                  {"sustained_clock_ghz", "GHz", 3},
                  {"sustained_percent", "% of limit", 1}}};
  return micro::run(description, argc, argv, measure);
}
