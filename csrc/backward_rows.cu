// What the backward does for every row by itself, before and after its products: delta and lse before them, and 16-bit
// gradients out of float32 sums after them. Both are bound by memory. The gradient of sinks, which needs no products.

#include <bit>
#include <climits>
#include <cmath>

#include "backward.cuh"
#include "ptx/warpgroup.cuh"
#include "tile/fragment.cuh"

namespace flash_attn_ext {
namespace {

constexpr int kRowThreads = 256;  // of a thread block, which handles one block of rows, or 64 of them

// Which block of rows is the thread block's: the last one first. What `prepare` touches last is what the products begin
// with, and what they add to last is what `convert` begins with: L2 still has it.
__device__ __forceinline__ int own_block() { return static_cast<int>(gridDim.x - 1 - blockIdx.x); }

// ---------------------------------------------------------------------------------------------------------- prepare

template <class Config>
struct PrepareArguments {
  Tensor dout, out;
  const float *lse, *dlse;
  RowStats<Config::kBlockQ>* stats;
  SumPatch* dq;  // null: dq is not needed
  int* item_counter;
  int *turns, *keeps_turns;
  int thread_blocks;  // of the products
  Sequences sequences;
  int heads, head_dim;
};

template <class Config>
__global__ void __launch_bounds__(kRowThreads) prepare_kernel(const __grid_constant__ PrepareArguments<Config> args) {
  cudaTriggerProgrammaticLaunchCompletion();
  using T = typename Config::T;
  constexpr int kLanes = std::bit_ceil(Config::kHeadDim / 8u);  // a row's threads, 16 bytes each; some may have none
  constexpr int kDqPatches = Workspace<Config>::kQPatches;
  const int number = own_block();
  const Block block = args.sequences.locate(number, args.heads, Config::kBlockQ);
  const Place place = args.sequences.place(block.sequence);
  const int rows = block.index < 0 ? INT_MIN : args.sequences.at(block.sequence).rows;  // none ahead of the first one
  auto& stats = args.stats[number];

#pragma unroll
  for (int first = 0; first < Config::kBlockQ; first += kRowThreads / kLanes) {
    const int index = first + threadIdx.x / kLanes, row = block.index * Config::kBlockQ + index;
    const int lane = threadIdx.x % kLanes;
    float delta = 0.f, dlse = 0.f, lse = -INFINITY;
    if (row < rows) {
      const auto load = [&](const Tensor& from) {
        const T* at = element<const T>(from, place.batch, place.row + row, block.head, 8 * lane);
        return 8 * lane < args.head_dim ? *reinterpret_cast<const uint4*>(at) : uint4{};
      };
      const uint4 a = load(args.dout), b = load(args.out);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 x = unpack<T>(reinterpret_cast<const uint32_t*>(&a)[i]),
                     y = unpack<T>(reinterpret_cast<const uint32_t*>(&b)[i]);
        delta += x.x * y.x + x.y * y.y;
      }
      const int64_t value = args.sequences.first_value(block.sequence, block.head, args.heads) + row;
      lse = args.lse[value];
      if (args.dlse != nullptr) dlse = args.dlse[value];
    }
#pragma unroll
    for (int distance = kLanes / 2; distance > 0; distance /= 2) delta += __shfl_xor_sync(~0u, delta, distance);
    if (lane == 0) {
      const bool empty = lse == -INFINITY;
      stats.lse_log2[index] = empty ? INFINITY : lse * kLog2E;
      stats.delta[index] = empty ? 0.f : delta - dlse;
    }
  }

  if (args.turns != nullptr && blockIdx.x == 0) {
    // Lengths that make no sense could leave somebody waiting forever: then sums are added to in any order.
    bool follow = true;
    for (int i = threadIdx.x; i < args.sequences.count; i += kRowThreads) {
      follow = follow && args.sequences.is_followed(i) && args.sequences.transposed().is_followed(i);
    }
    follow = __syncthreads_and(follow);
    if (threadIdx.x == 0) *args.keeps_turns = follow;
  }

  // The items that the thread blocks of the products begin with are not to be claimed; with turns all are.
  if (blockIdx.x == 0 && threadIdx.x == 0) *args.item_counter = args.turns == nullptr ? args.thread_blocks : 0;
  if (args.dq != nullptr) {
    auto* quads = reinterpret_cast<float4*>(args.dq + int64_t{number} * kDqPatches);
    constexpr int kQuads = kDqPatches * sizeof(SumPatch) / sizeof(float4);
    for (int i = threadIdx.x; i < kQuads; i += kRowThreads) quads[i] = float4{};
    constexpr int kTurns = Workspace<Config>::kTurns;
    if (args.turns != nullptr && threadIdx.x < kTurns) args.turns[number * kTurns + threadIdx.x] = 0;
  }
}

// ---------------------------------------------------------------------------------------------------------- convert

constexpr int kStripRows = 64;  // of a strip, a row of a block's patches: what a thread block converts

// Of a thread block; all have as many of a strip's pieces.
constexpr int convert_threads(int head_dim) { return head_dim % 96 == 0 ? 2 * head_dim : kRowThreads; }

struct ConvertPart {
  Sums from;
  Tensor to;
  float scale;
  int strips;  // 0: there are no such sums
};

struct ConvertArguments {
  ConvertPart dq;
  ConvertPart dkv[4];  // dk and dv of coarse sums, and of fine ones
  Sequences queries, keys;
  int heads, kv_heads, head_dim;
};

// 8 columns of two rows of a strip. Pieces of neighbouring numbers have neighbouring columns, so that rows are written
// whole.
template <int kHeadDim, bool kTransposed>
struct SumPiece {
  static constexpr int kRowDistance = kTransposed ? 1 : 8;
  static constexpr int kCount = 32 * kHeadDim / 8;  // of a strip

  unsigned patch, thread;  // of the first four sums
  unsigned half;           // transposed: which two of each four
  int row, column;         // in the strip; the other row is kRowDistance further

  __device__ __forceinline__ explicit SumPiece(unsigned number) {
    if constexpr (kTransposed) {  // a patch's rows are columns: 8 threads that are 4 apart hold 8 of them, of two rows
      const unsigned chunk = number % 8, row_pair = number / 8 % 4, slab = number / 256;
      patch = 8 * slab + number / 32 % 8;
      thread = 32 * (chunk / 2) + row_pair;
      half = chunk % 2;
      row = 8 * (patch % 8) + 2 * row_pair;
      column = 64 * slab + 8 * chunk;
    } else {  // four neighbouring threads hold 8 columns of two rows
      constexpr int kPatches = slab_columns(kHeadDim) / 8;
      const unsigned group = number / kPatches % 32;
      patch = number / (kPatches * 32) * kPatches + number % kPatches;
      thread = 4 * group;
      half = 0;
      row = group / 8 * 16 + group % 8;
      column = 8 * patch;
    }
  }

  // The i-th two columns: (row, column), (row, column + 1), and those of the other row.
  __device__ __forceinline__ float4 load(const SumPatch* patches, int i) const {
    const float4(&sums)[128] = patches[patch].quad;
    if constexpr (kTransposed) {
      const auto pair = [&](int j) { return reinterpret_cast<const float2*>(&sums[thread + 4 * j])[half]; };
      const float2 a = pair(2 * i), b = pair(2 * i + 1);
      return make_float4(a.x, b.x, a.y, b.y);
    } else {
      return sums[thread + i];
    }
  }

  // Writes them, scaled, to a strip of so many rows and columns. sum(i) are the i-th two columns.
  template <class T, class Sum>
  __device__ __forceinline__ void write(T* strip, int64_t row_stride, int rows, int columns, const Sum& sum,
                                        float scale) const {
    uint32_t bits[2][4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float4 x = sum(i);
      bits[0][i] = pack<T>(x.x * scale, x.y * scale);
      bits[1][i] = pack<T>(x.z * scale, x.w * scale);
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if (row + kRowDistance * r < rows && column < columns) {
        *reinterpret_cast<uint4*>(strip + (row + kRowDistance * r) * row_stride + column) =
            make_uint4(bits[r][0], bits[r][1], bits[r][2], bits[r][3]);
      }
    }
  }
};

// The part's last strip but `number`, as in own_block. Its blocks have kBlockRows rows.
template <class T, int kHeadDim, int kBlockRows, bool kTransposed>
__device__ __forceinline__ void convert_strip(const ConvertPart& part, int number, const Sequences& sequences,
                                              int heads, int head_dim) {
  using Piece = SumPiece<kHeadDim, kTransposed>;
  constexpr int kThreads = convert_threads(kHeadDim), kPatches = kHeadDim / 8;
  constexpr int kPieces = Piece::kCount / kThreads;  // of a thread
  constexpr int kStrips = kBlockRows / kStripRows;   // of a block
  static_assert(Piece::kCount % kThreads == 0);
  const Sums& from = part.from;
  const int strip = part.strips - 1 - number;
  const Block block = sequences.locate(from.first_block + strip / kStrips, heads, kBlockRows);
  const Place place = sequences.place(block.sequence);
  const int first_row = block.index * kBlockRows + strip % kStrips * kStripRows;
  const int rows = sequences.stored_rows(block.sequence) - first_row;
  const SumPatch* patches = from.patches + int64_t{strip} * kPatches;
  const auto own = [](int piece) { return Piece(piece * kThreads + threadIdx.x); };

  cudaGridDependencySynchronize();  // what is above goes beside the end of the products

  if (block.index < 0 || rows <= 0) return;  // a hole, or past the end

  float4 sums[kPieces][4];  // all loads are under way before the first is needed
#pragma unroll
  for (int piece = 0; piece < kPieces; ++piece) {
#pragma unroll
    for (int i = 0; i < 4; ++i) sums[piece][i] = own(piece).load(patches, i);
  }
  // In this order, so that the sum is the same in every run. Unrolled, the loads of head dim 64 would spill.
#pragma unroll 1
  for (int copy = 1; copy < from.copies; ++copy) {
    patches += int64_t{part.strips} * kPatches;
#pragma unroll
    for (int piece = 0; piece < kPieces; ++piece) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float4 x = own(piece).load(patches, i);
        float4& sum = sums[piece][i];
        sum = make_float4(sum.x + x.x, sum.y + x.y, sum.z + x.z, sum.w + x.w);
      }
    }
  }

  T* to = element<T>(part.to, place.batch, place.row + first_row, block.head, 0);
#pragma unroll
  for (int piece = 0; piece < kPieces; ++piece) {
    own(piece).write(to, part.to.strides.row, rows, head_dim, [&](int i) { return sums[piece][i]; }, part.scale);
  }
}

// How many thread blocks of a multiprocessor have registers for all their loads, and spill none.
constexpr int convert_blocks(int head_dim) { return head_dim > 128 ? 2 : head_dim > 96 ? 3 : 4; }

// All gradients that have sums, in one launch: in a short call, launches take longer than the work.
template <class Config>
__global__ void __launch_bounds__(convert_threads(Config::kHeadDim), convert_blocks(Config::kHeadDim))
    convert_kernel(const __grid_constant__ ConvertArguments args) {
  using T = typename Config::T;
  int number = static_cast<int>(blockIdx.x);
  if (number < args.dq.strips) {
    convert_strip<T, Config::kHeadDim, Config::kBlockQ, Config::kKvInRegisters>(args.dq, number, args.queries,
                                                                                args.heads, args.head_dim);
    return;
  }
  number -= args.dq.strips;
  const ConvertPart* part = args.dkv;
  for (; number >= part->strips; ++part) number -= part->strips;
  convert_strip<T, Config::kHeadDim, Config::kBlockKv, false>(*part, number, args.keys, args.kv_heads, args.head_dim);
}

// ------------------------------------------------------------------------------------------------------ rows left out

// Zeros in the first rows of each sequence, which see nothing.
template <class T>
__global__ void __launch_bounds__(kRowThreads)
    zero_kernel(Tensor to, int sequences, int rows, int heads, int head_dim) {
  const int chunks = head_dim / 8;
  const int64_t count = int64_t{sequences} * rows * heads * chunks;
  for (int64_t i = int64_t{blockIdx.x} * kRowThreads + threadIdx.x; i < count; i += int64_t{gridDim.x} * kRowThreads) {
    const int chunk = static_cast<int>(i % chunks), head = static_cast<int>(i / chunks % heads);
    const int64_t row = i / chunks / heads;
    *reinterpret_cast<uint4*>(element<T>(to, static_cast<int>(row / rows), row % rows, head, 8 * chunk)) = uint4{};
  }
}

// -------------------------------------------------------------------------------------------------------------- sinks

template <int kBlockQ>
struct SinksArguments {
  const RowStats<kBlockQ>* stats;
  const float *sinks, *lse, *dlse;
  float* dsinks;
  Sequences sequences;
  int heads;
};

constexpr int kSinksThreads = 1024;

// The sum over a head's rows of exp(sink - lse) * -delta: a sink has a probability like a key's, and no value. A thread
// block takes a head and adds in an order that is the same in every run.
template <int kBlockQ>
__global__ void __launch_bounds__(kSinksThreads, 1) sinks_kernel(const __grid_constant__ SinksArguments<kBlockQ> args) {
  cudaGridDependencySynchronize();
  constexpr int kQuads = kBlockQ / 4;  // of rows
  const Sequences& sequences = args.sequences;
  const int head = static_cast<int>(blockIdx.x);
  // Rounded as lse is, and not fused with the difference: where lse is the sink, the probability is exactly 1.
  const float sink_log2 = __fmul_rn(args.sinks[head], kLog2E);
  const auto probability = [&](float lse_log2) { return ptx::ex2(sink_log2 - lse_log2); };
  float sum = 0.f;

  const int blocks = static_cast<int>(sequences.block_count(1, kBlockQ)), quad = threadIdx.x % kQuads;
#pragma unroll 4
  for (int i = threadIdx.x / kQuads; i < blocks; i += kSinksThreads / kQuads) {
    const auto& stats = args.stats[sequences.block_of_head(i, head, args.heads, kBlockQ)];
    const float4 lse_log2 = reinterpret_cast<const float4*>(stats.lse_log2)[quad];
    const float4 delta = reinterpret_cast<const float4*>(stats.delta)[quad];
    sum -= probability(lse_log2.x) * delta.x + probability(lse_log2.y) * delta.y + probability(lse_log2.z) * delta.z +
           probability(lse_log2.w) * delta.w;
  }

  // Rows that are left out have no stats. Their out is 0, and so delta is -dlse.
  if (args.dlse != nullptr && sequences.left_out > 0) {
    const int64_t rows = int64_t{sequences.count} * sequences.left_out;
    for (int64_t i = threadIdx.x; i < rows; i += kSinksThreads) {
      const int sequence = static_cast<int>(i / sequences.left_out), row = static_cast<int>(i % sequences.left_out);
      const int64_t value = sequences.first_value(sequence, head, args.heads) - sequences.left_out + row;
      const float lse = args.lse[value];
      if (lse != -INFINITY) sum += probability(__fmul_rn(lse, kLog2E)) * args.dlse[value];
    }
  }

  __shared__ float of_warps[kSinksThreads / 32];
  const auto sum_of_warp = [](float x) {
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) x += __shfl_xor_sync(~0u, x, distance);
    return x;
  };
  sum = sum_of_warp(sum);
  if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x < 32) {
    static_assert(kSinksThreads == 32 * 32);
    sum = sum_of_warp(of_warps[threadIdx.x]);
    if (threadIdx.x == 0) args.dsinks[head] = sum;
  }
}

// ----------------------------------------------------------------------------------------------------------- launches

template <class Config>
void prepare(const BackwardParams& params, cudaStream_t stream) {
  const Workspace<Config> workspace(params);
  prepare_kernel<Config>
      <<<workspace.q_blocks, kRowThreads, 0, stream>>>({.dout = params.dout,
                                                        .out = params.out,
                                                        .lse = params.lse,
                                                        .dlse = params.dlse,
                                                        .stats = workspace.stats,
                                                        .dq = workspace.dq.patches,
                                                        .item_counter = workspace.item_counter,
                                                        .turns = workspace.turns,
                                                        .keeps_turns = workspace.keeps_turns,
                                                        .thread_blocks = workspace.thread_blocks,
                                                        .sequences = workspace.sequences,
                                                        .heads = static_cast<int>(params.problem.heads),
                                                        .head_dim = static_cast<int>(params.problem.head_dim)});
  check_cuda(cudaGetLastError(), "launching the kernel before the backward's");
}

template <class Config>
void convert_all(const BackwardParams& params, cudaStream_t stream) {
  using T = typename Config::T;
  const Workspace<Config> workspace(params);
  const Problem& problem = params.problem;
  const float scale = problem.softmax_scale();
  const int heads = static_cast<int>(problem.heads);
  const Sequences queries = workspace.sequences;
  const auto part = [](const Sums& from, const Tensor& to, float scale, int block_rows) -> ConvertPart {
    return {from, to, scale, from.blocks * (block_rows / kStripRows)};
  };
  const KvSums &coarse = workspace.coarse, &fine = workspace.fine;
  const ConvertArguments args{
      .dq = part(workspace.dq, params.dq, scale, Config::kBlockQ),
      .dkv = {part(coarse.dk, params.dk, scale, Config::kBlockKv), part(coarse.dv, params.dv, 1.f, Config::kBlockKv),
              part(fine.dk, params.dk, scale, Config::kBlockKv), part(fine.dv, params.dv, 1.f, Config::kBlockKv)},
      .queries = queries,
      .keys = queries.transposed(),
      .heads = heads,
      .kv_heads = static_cast<int>(problem.kv_heads),
      .head_dim = static_cast<int>(problem.head_dim)};
  int strips = args.dq.strips;
  for (const ConvertPart& dkv : args.dkv) strips += dkv.strips;
  if (strips > 0) {
    launch_overlapped(convert_kernel<Config>, strips, convert_threads(Config::kHeadDim), 0, stream, args,
                      "launching the kernel after the backward's");
  }
  if (params.dq.data != nullptr && queries.left_out > 0) {
    zero_kernel<T><<<1024, kRowThreads, 0, stream>>>(params.dq, queries.count, queries.left_out, heads, args.head_dim);
    check_cuda(cudaGetLastError(), "launching the kernel for rows that see nothing");
  }
  if (params.dsinks != nullptr) {  // last: between `prepare` and the products it would keep them from overlapping
    launch_overlapped(sinks_kernel<Config::kBlockQ>, heads, kSinksThreads, 0, stream,
                      SinksArguments<Config::kBlockQ>{.stats = workspace.stats,
                                                      .sinks = params.sinks,
                                                      .lse = params.lse,
                                                      .dlse = params.dlse,
                                                      .dsinks = params.dsinks,
                                                      .sequences = queries,
                                                      .heads = heads},
                      "launching the kernel of the gradient of sinks");
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
