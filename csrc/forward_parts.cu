// O and lse of whole rows from what the forward made of parts of their keys: O = sum of exp(lse_i - lse) * O_i, with
// lse = log(sum of exp(lse_i)). FlashAttention's split over keys ("Flash-Decoding", Dao et al. 2023). Bound by memory.

#include <bit>
#include <cmath>
#include <cstdint>

#include "device.h"
#include "forward_parts.h"
#include "ptx/warpgroup.cuh"
#include "tile/fragment.cuh"

namespace flash_attn_ext {
namespace {

constexpr int kThreads = 256;
constexpr int kColumns = 8;   // of a thread: 16 bytes of the result
constexpr int kTogether = 8;  // parts that a thread reads together: one wait for memory, mostly

struct CombineArguments {
  const float *lse, *partial_out;  // of each part, one after the other
  Tensor out;
  float* out_lse;
  const float* sinks;
  int64_t values;  // rows of all heads and batches
  int parts, lanes, heads, rows, head_dim;
};

template <class T>
__global__ void __launch_bounds__(kThreads) combine_kernel(const __grid_constant__ CombineArguments args) {
  cudaTriggerProgrammaticLaunchCompletion();
  cudaGridDependencySynchronize();  // by all threads: when this kernel has ended the forward has
  const int64_t value = (int64_t{blockIdx.x} * kThreads + threadIdx.x) / args.lanes;
  const int column = threadIdx.x % args.lanes * kColumns;
  if (value >= args.values || column >= args.head_dim) return;
  const int64_t pair = value / args.rows;  // of a batch and a head
  const int row = static_cast<int>(value - pair * args.rows);
  const int batch = static_cast<int>(pair / args.heads), head = static_cast<int>(pair - int64_t{batch} * args.heads);

  // Relative to the largest lse so far. Before any finite one it is -inf, and 0 stands for it: -inf less -inf would be
  // NaN.
  float largest = args.sinks != nullptr ? args.sinks[head] : -INFINITY;
  float reference = largest == -INFINITY ? 0.f : largest;
  float total = ptx::ex2((largest - reference) * kLog2E), out[kColumns] = {};
  for (int first = 0; first < args.parts; first += kTogether) {
    float lse[kTogether];
    float4 low[kTogether], high[kTogether];
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      lse[i] = -INFINITY;
      low[i] = high[i] = float4{};
      if (first + i >= args.parts) continue;
      const int64_t at = (first + i) * args.values + value;
      const auto* from = reinterpret_cast<const float4*>(args.partial_out + at * args.head_dim + column);
      lse[i] = args.lse[at];
      low[i] = from[0];
      high[i] = from[1];
    }
    const float before = reference;
#pragma unroll
    for (int i = 0; i < kTogether; ++i) largest = fmaxf(largest, lse[i]);
    reference = largest == -INFINITY ? 0.f : largest;
    const float rescale = total == 0.f ? 1.f : ptx::ex2((before - reference) * kLog2E);
    total *= rescale;
#pragma unroll
    for (int c = 0; c < kColumns; ++c) out[c] *= rescale;
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      const float weight = ptx::ex2((lse[i] - reference) * kLog2E);
      const float columns[kColumns] = {low[i].x,  low[i].y,  low[i].z,  low[i].w,
                                       high[i].x, high[i].y, high[i].z, high[i].w};
      total += weight;
#pragma unroll
      for (int c = 0; c < kColumns; ++c) out[c] += weight * columns[c];
    }
  }
  const float scale = total == 0.f ? 0.f : 1 / total;
  uint4 packed;
  auto* words = reinterpret_cast<uint32_t*>(&packed);
#pragma unroll
  for (int i = 0; i < kColumns / 2; ++i) words[i] = pack<T>(out[2 * i] * scale, out[2 * i + 1] * scale);
  *reinterpret_cast<uint4*>(element<T>(args.out, batch, row, head, column)) = packed;
  if (column == 0) args.out_lse[value] = reference + logf(total);
}

}  // namespace

void launch_combine(const ForwardParams& params, const Division& division, cudaStream_t stream) {
  const Problem& problem = params.problem;
  const PartialResults partial(problem, division, params.workspace);
  const CombineArguments args{
      .lse = partial.lse,
      .partial_out = partial.out,
      .out = params.out,
      .out_lse = params.lse,
      .sinks = params.sinks,
      .values = division.part_values,
      .parts = division.parts,
      .lanes = static_cast<int>(std::bit_ceil(static_cast<uint64_t>(problem.head_dim) / kColumns)),
      .heads = static_cast<int>(problem.heads),
      .rows = static_cast<int>(problem.seqlen_q),
      .head_dim = static_cast<int>(problem.head_dim),
  };
  const int64_t blocks = (args.values * args.lanes - 1) / kThreads + 1;
  const bool is_half = problem.dtype == DType::kFloat16;
  launch_overlapped(is_half ? combine_kernel<__half> : combine_kernel<__nv_bfloat16>, static_cast<int>(blocks),
                    kThreads, 0, stream, args, "launching the kernel that combines parts");
}

}  // namespace flash_attn_ext
