// What the backward does for every row by itself, before and after its products: delta and lse before them, and 16-bit
// gradients out of float32 sums after them. Both are bound by memory.

#include <cmath>

#include "backward.cuh"
#include "tile/fragment.cuh"

namespace flash_attn_ext {
namespace {

constexpr int kRowThreads = 256;  // of a thread block, which handles one block of rows

// Element (row, head, column) of a sequence whose rows begin at (batch, first_row) of a tensor.
template <class T>
__device__ __forceinline__ T* element(const Tensor& tensor, int batch, int64_t row, int head, int column) {
  const Strides& strides = tensor.strides;
  return static_cast<T*>(tensor.data) + batch * strides.batch + row * strides.row + head * strides.head + column;
}

// ---------------------------------------------------------------------------------------------------------- prepare

template <class Config>
struct PrepareArguments {
  Tensor dout, out;
  const float* lse;
  RowStats<Config::kBlockQ>* stats;
  SumPatch* dq;  // null: dq is not needed
  Sequences sequences;
  int heads;
};

template <class Config>
__global__ void __launch_bounds__(kRowThreads) prepare_kernel(const __grid_constant__ PrepareArguments<Config> args) {
  using T = typename Config::T;
  constexpr int kLanes = Config::kHeadDim / 8;  // a row's threads, 16 bytes each
  constexpr int kDqPatches = Workspace<Config>::kQPatches;
  const Block block = args.sequences.locate(blockIdx.x, args.heads, Config::kBlockQ);
  const Place place = args.sequences.place(block.sequence);
  const int rows = args.sequences.at(block.sequence).rows;
  auto& stats = args.stats[blockIdx.x];

#pragma unroll
  for (int first = 0; first < Config::kBlockQ; first += kRowThreads / kLanes) {
    const int index = first + threadIdx.x / kLanes, row = block.index * Config::kBlockQ + index;
    const int lane = threadIdx.x % kLanes;
    float delta = 0.f, lse = -INFINITY;
    if (row < rows) {
      const auto load = [&](const Tensor& from) {
        return *reinterpret_cast<const uint4*>(
            element<const T>(from, place.batch, place.row + row, block.head, 8 * lane));
      };
      const uint4 a = load(args.dout), b = load(args.out);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 x = unpack<T>(reinterpret_cast<const uint32_t*>(&a)[i]),
                     y = unpack<T>(reinterpret_cast<const uint32_t*>(&b)[i]);
        delta += x.x * y.x + x.y * y.y;
      }
      lse = args.lse[args.sequences.first_value(block.sequence, block.head, args.heads) + row];
    }
#pragma unroll
    for (int distance = kLanes / 2; distance > 0; distance /= 2) delta += __shfl_xor_sync(~0u, delta, distance);
    if (lane == 0) {
      const bool empty = lse == -INFINITY;
      stats.lse_log2[index] = empty ? INFINITY : lse * kLog2E;
      stats.delta[index] = empty ? 0.f : delta;
    }
  }

  if (args.dq != nullptr) {
    auto* quads = reinterpret_cast<float4*>(args.dq + int64_t{blockIdx.x} * kDqPatches);
    constexpr int kQuads = kDqPatches * sizeof(SumPatch) / sizeof(float4);
    for (int i = threadIdx.x; i < kQuads; i += kRowThreads) quads[i] = float4{};
  }
}

// ---------------------------------------------------------------------------------------------------------- convert

struct ConvertArguments {
  Sums from;
  Tensor to;
  Sequences sequences;  // whose rows are the gradient's
  int heads;
  float scale;
};

template <class T, int kHeadDim, int kBlockRows>
__global__ void __launch_bounds__(kRowThreads) convert_kernel(const __grid_constant__ ConvertArguments args) {
  constexpr int kColumnPatches = kHeadDim / 64, kPatches = kBlockRows / 64 * kColumnPatches;
  const Block block = args.sequences.locate(args.from.first_block + blockIdx.x, args.heads, kBlockRows);
  const Place place = args.sequences.place(block.sequence);
  const int rows = args.sequences.at(block.sequence).rows;
  const SumPatch* patches = args.from.patches + int64_t{blockIdx.x} * kPatches;

  // Four neighbouring threads of the product hold 8 columns of two rows: 16 bytes of each. Such a piece is a thread's
  // here; neighbouring threads take neighbouring columns, so that rows are written whole.
  constexpr int kPieces = kPatches * SumPatch::kQuads * 32 / kRowThreads;
  const auto quad = [](int piece) { return (piece * kRowThreads + threadIdx.x) % SumPatch::kQuads; };
  const auto group = [](int piece) { return (piece * kRowThreads + threadIdx.x) / SumPatch::kQuads % 32; };
  const auto patch = [](int piece) { return (piece * kRowThreads + threadIdx.x) / (SumPatch::kQuads * 32); };
  const auto load = [&](int copy, int piece, int i) {
    const SumPatch& from = patches[int64_t{copy} * args.from.blocks * kPatches + patch(piece)];
    return from.quad[quad(piece)][4 * group(piece) + i];
  };

  float4 sums[kPieces][4];  // all loads are under way before the first is needed
#pragma unroll
  for (int piece = 0; piece < kPieces; ++piece) {
#pragma unroll
    for (int i = 0; i < 4; ++i) sums[piece][i] = load(0, piece, i);
  }
  for (int copy = 1; copy < args.from.copies; ++copy) {  // in this order, so that the sum is the same in every run
#pragma unroll
    for (int piece = 0; piece < kPieces; ++piece) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float4 x = load(copy, piece, i);
        float4& sum = sums[piece][i];
        sum = make_float4(sum.x + x.x, sum.y + x.y, sum.z + x.z, sum.w + x.w);
      }
    }
  }

#pragma unroll
  for (int piece = 0; piece < kPieces; ++piece) {
    uint32_t bits[2][4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float4& sum = sums[piece][i];
      bits[0][i] = pack<T>(sum.x * args.scale, sum.y * args.scale);
      bits[1][i] = pack<T>(sum.z * args.scale, sum.w * args.scale);
    }
    const int column = 64 * (patch(piece) % kColumnPatches) + 8 * quad(piece);
    const int first_row =
        block.index * kBlockRows + 64 * (patch(piece) / kColumnPatches) + group(piece) / 8 * 16 + group(piece) % 8;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = first_row + 8 * r;
      if (row < rows) {
        *reinterpret_cast<uint4*>(element<T>(args.to, place.batch, place.row + row, block.head, column)) =
            make_uint4(bits[r][0], bits[r][1], bits[r][2], bits[r][3]);
      }
    }
  }
}

template <class T, int kHeadDim, int kBlockRows>
void convert(const Sums& from, const Tensor& to, const Sequences& sequences, int64_t heads, float scale,
             cudaStream_t stream) {
  if (from.patches == nullptr) return;
  convert_kernel<T, kHeadDim, kBlockRows>
      <<<from.blocks, kRowThreads, 0, stream>>>({from, to, sequences, static_cast<int>(heads), scale});
  check_cuda(cudaGetLastError(), "launching the kernel after the backward's");
}

template <class Config>
void prepare(const BackwardParams& params, cudaStream_t stream) {
  const Workspace<Config> workspace(params);
  prepare_kernel<Config>
      <<<workspace.q_blocks, kRowThreads, 0, stream>>>({.dout = params.dout,
                                                        .out = params.out,
                                                        .lse = params.lse,
                                                        .stats = workspace.stats,
                                                        .dq = workspace.dq.patches,
                                                        .sequences = workspace.sequences,
                                                        .heads = static_cast<int>(params.problem.heads)});
  check_cuda(cudaGetLastError(), "launching the kernel before the backward's");
}

template <class Config>
void convert_all(const BackwardParams& params, cudaStream_t stream) {
  using T = typename Config::T;
  const Workspace<Config> workspace(params);
  const Problem& problem = params.problem;
  const float scale = problem.softmax_scale();
  const Sequences queries = workspace.sequences, keys = queries.transposed();
  convert<T, Config::kHeadDim, Config::kBlockQ>(workspace.dq, params.dq, queries, problem.heads, scale, stream);
  for (const KvSums* sums : {&workspace.coarse, &workspace.fine}) {
    convert<T, Config::kHeadDim, Config::kBlockKv>(sums->dk, params.dk, keys, problem.kv_heads, scale, stream);
    convert<T, Config::kHeadDim, Config::kBlockKv>(sums->dv, params.dv, keys, problem.kv_heads, 1.f, stream);
  }
}

}  // namespace

// ----------------------------------------------------------------------------------------------------------- launch

void launch_prepare(const BackwardParams& params, cudaStream_t stream) {
  with_backward_config(params.problem, [&]<class Config>() { prepare<Config>(params, stream); });
}

void launch_convert(const BackwardParams& params, cudaStream_t stream) {
  with_backward_config(params.problem, [&]<class Config>() { convert_all<Config>(params, stream); });
}

}  // namespace flash_attn_ext
