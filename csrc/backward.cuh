// What the backward's files share: the config of a plan, and the workspace through which its kernels hand each other
// rows' statistics and float32 sums.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "device.h"
#include "launch.h"
#include "limits.h"
#include "tile/sequences.h"
#include "tile/smem.cuh"
#include "work.h"

namespace flash_attn_ext {

// ---------------------------------------------------------------------------------------------------------- config

template <int kRow, class Type, bool kCapped = false>
struct BackwardConfig {
  using T = Type;
  using Capped = BackwardConfig<kRow, Type, true>;  // of the products; what comes before and after them is the same
  static constexpr bool kSoftcap = kCapped;
  static constexpr BackwardPlan kPlan = kLimits[kRow].backward;
  static constexpr int kHeadDim = kLimits[kRow].head_dim;  // that of the tiles and of sums, filled up with zeros
  static constexpr int kBlockQ = kPlan.block_q;
  static constexpr int kBlockKv = kPlan.block_kv;
  static constexpr int kStages = kPlan.stages;
  static constexpr int kDsStages = kPlan.ds_stages;
  static constexpr bool kKvInRegisters = kPlan.kv_in_registers;
  static constexpr bool kVInRegisters = kKvInRegisters || kPlan.v_in_registers;
  static constexpr bool kByPairs = kPlan.by_pairs;
  static constexpr bool kOwnInRegisters = kPlan.own_in_registers;
  static constexpr int kTileColumns = kByPairs ? kHeadDim / 2 : kHeadDim;  // of tiles in shared memory
  static constexpr int kConsumers = 2;
  static constexpr int kThreads = 128 * (2 + kConsumers);

  // The SM's 65536 registers, shared out by setmaxnreg in multiples of 8: producer + 2 * consumer + dQ <= 512. To copy
  // tiles of three slabs the producer needs more than 32.
  static constexpr int kProducerRegisters = kHeadDim == 96 ? 40 : 32;
  static constexpr int consumer_registers(bool needs_dq) {
    return !needs_dq || kHeadDim > 96 ? 208 : kHeadDim == 96 ? 200 : 192;
  }
  static constexpr int dq_registers(bool needs_dq) {
    return 512 - kProducerRegisters - kConsumers * consumer_registers(needs_dq);
  }

  static_assert(kPlan.built() && kBlockQ == 64 && kBlockKv == 64 * kConsumers && kHeadDim % 32 == 0);
  static_assert(!kKvInRegisters || kHeadDim == 64, "K^T is one 64-row operand");
  static_assert(kByPairs || kStages > 2,
                "a consumer passes over a step that sees none of its keys while it still holds the last one");
};

// Calls f with the config of the problem's head dim and type.
template <class F>
void with_backward_config(const Problem& problem, F&& f) {
  const bool found = with_limits(problem.head_dim, [&]<std::size_t row>() {
    if constexpr (kLimits[row].backward.built()) {
      if (problem.dtype == DType::kFloat16) {
        f.template operator()<BackwardConfig<row, __half>>();
      } else {
        f.template operator()<BackwardConfig<row, __nv_bfloat16>>();
      }
    }
  });
  if (!found) throw std::runtime_error("no backward kernel for head_dim " + std::to_string(problem.head_dim));
}

// -------------------------------------------------------------------------------------------------------- workspace

// What the exponent and dS need of each query row of a Q block, as `prepare` leaves it.
template <int kBlockQ>
struct alignas(16) RowStats {
  float lse_log2[kBlockQ];  // lse * log2(e); +inf for rows past the end or that see nothing: their P is 0
  float delta[kBlockQ];     // sum of dO * O, less the gradient of lse
};

// 64 x 8 float32 sums in the order in which a consumer's threads hold them: a quad of registers of each of 128 threads,
// so that what a warp writes is contiguous. The quad of thread t is (row, column), (row, column + 1), (row + 8,
// column), (row + 8, column + 1) with row = 16 (t / 32) + t % 32 / 4 and column = 2 (t % 4). Where K is in registers,
// rows and columns of dQ's patches change places: they hold dQ^T.
struct SumPatch {
  float4 quad[128];
};

// Sums of a gradient, in the order in which Sequences counts its blocks; each block is several patches, row by row.
// Where a gradient is summed in several copies, these follow each other.
struct Sums {
  SumPatch* patches = nullptr;  // null: there are none
  int first_block = 0;          // of the gradient's blocks
  int blocks = 0;
  int copies = 1;
};

struct KvSums {
  Sums dk, dv;
};

// How many items are worked on at a time.
template <class Config>
int workers() {
  return Config::kByPairs ? std::max(multiprocessors_to_fill() / 2, 1) : multiprocessors_to_fill();
}

template <class Config>
struct Workspace {
  static constexpr int kQPatches = Config::kBlockQ / 64 * Config::kHeadDim / 8;    // patches of a Q block
  static constexpr int kKvPatches = Config::kBlockKv / 64 * Config::kHeadDim / 8;  // of a KV block
  static constexpr int kTurns = Config::kByPairs ? 2 : 1;                          // of a Q block
  using Stats = RowStats<Config::kBlockQ>;

  Sequences sequences;
  KeySchedule schedule;
  int thread_blocks;  // of the products, or pairs of them: as many as run at once, or fewer
  int q_blocks;       // of all heads
  Sums dq;
  KvSums coarse, fine;  // of dK and dV, where several items share a KV head's query heads: a copy for each
  Stats* stats;         // of every Q block
  int* item_counter;
  // A counter of every Q block, for each thread block of a pair (backward_turns.cuh); null: dQ is added to in any
  // order.
  int* turns;
  int* keeps_turns;  // whether anybody waits for a turn
  int64_t bytes;

  explicit Workspace(const BackwardParams& p)
      : sequences(backward_sequences(p.problem)),
        schedule(backward_schedule(p.problem, Config::kPlan, workers<Config>())),
        thread_blocks(std::min(schedule.items(), workers<Config>())),
        q_blocks(static_cast<int>(sequences.block_count(static_cast<int>(p.problem.heads), Config::kBlockQ))) {
    bytes = 0;
    const auto take = [&](int64_t size) -> void* {  // null while only the bytes are asked for
      const int64_t begin = bytes;
      bytes += size;
      return p.workspace == nullptr ? nullptr : static_cast<char*>(p.workspace) + begin;
    };
    const auto take_sums = [&](const Tensor& gradient, Sums sums, int patches) {
      const int64_t size = int64_t{sums.blocks} * sums.copies * patches * sizeof(SumPatch);
      if (gradient.data == nullptr || size == 0) return Sums{};
      sums.patches = static_cast<SumPatch*>(take(size));
      return sums;
    };
    const auto take_kv_sums = [&](Sums sums) -> KvSums {
      return {take_sums(p.dk, sums, kKvPatches), take_sums(p.dv, sums, kKvPatches)};
    };
    const int coarse_blocks = schedule.copies == 1 ? 0 : schedule.coarse.items() / schedule.copies;
    const int fine_blocks = schedule.group == 1 ? 0 : schedule.fine.items() / schedule.group;
    dq = take_sums(p.dq, {nullptr, 0, q_blocks, 1}, kQPatches);
    coarse = take_kv_sums({nullptr, 0, coarse_blocks, schedule.copies});
    fine = take_kv_sums({nullptr, schedule.coarse.items() / schedule.copies, fine_blocks, schedule.group});
    stats = static_cast<Stats*>(take(int64_t{q_blocks} * sizeof(Stats)));
    item_counter = static_cast<int*>(take(sizeof(int)));
    const bool in_turn = p.problem.options.deterministic && p.dq.data != nullptr;
    turns = in_turn ? static_cast<int*>(take(int64_t{q_blocks} * kTurns * sizeof(int))) : nullptr;
    keeps_turns = in_turn ? static_cast<int*>(take(sizeof(int))) : nullptr;
  }
};

// ----------------------------------------------------------------------------- the products, and before and after them

// The products where a pair of thread blocks shares out the head dim, and a thread block's bytes of shared memory.
void launch_wide_products(const BackwardParams& params, cudaStream_t stream);
int wide_shared_memory(int head_dim);

// delta and lse of every row into the workspace, and zeros where dQ will be summed.
void launch_prepare(const BackwardParams& params, cudaStream_t stream);

// What was summed in the workspace, scaled, as 16-bit gradients; and dsinks, from delta and lse.
void launch_convert(const BackwardParams& params, cudaStream_t stream);

}  // namespace flash_attn_ext
