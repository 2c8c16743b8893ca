// THE TABLE: which head dimensions run, which train, and their plans: sizes of blocks, and how many are in flight.
//
// A row per head dimension that kernels are compiled for. Those between two rows run on the larger one's: the copy
// engine fills a row up with zeros on its way into shared memory, and clips what leaves. Everything that needs to know
// a limit reads it from here: the kernels' dispatch and static_asserts, _C.limits() and through it Python's checks and
// every refusal's text, the test cases, and the support table in README.md. A head dimension that the kernels'
// structure fits is added by its row (and a wgmma wrapper in ptx/wgmma.cuh if its shape is new). The structure does not
// fit all of them: where dK and dV of a consumer's 64 keys would not fit its registers, another kernel has the backward
// (backward_wide.cu).
#pragma once

#include <cstddef>
#include <cstdint>
#include <iterator>
#include <utility>

namespace flash_attn_ext {

// {} means "not built".
struct ForwardPlan {
  int block_q = 0;     // query rows of one work item: 64 per consumer warpgroup
  int block_kv = 0;    // keys of one step of the main loop
  int stages = 0;      // K blocks, and as many V blocks, in flight
  bool turns = false;  // consumers take turns at issuing products ("ping-pong")
  // Without softcap, blocks without a mask take no maximum: scores stay relative to that of the blocks before
  // (softmax.cuh). Consumers then take turns.
  bool keeps_offset = false;
  constexpr bool built() const { return block_q > 0; }
  constexpr int consumers() const { return block_q / 64; }  // warpgroups; wgmma's M is 64
};

struct BackwardPlan {
  int block_q = 0;    // query rows of one step of the main loop
  int block_kv = 0;   // keys of one work item: 64 per consumer warpgroup
  int stages = 0;     // Q blocks, and as many dO blocks, in flight
  int ds_stages = 0;  // dS blocks in flight, from the consumers to the warpgroup that computes dQ
  // K and V stay in registers as the left operands of S, dP and dQ^T. Otherwise they are read from shared memory.
  bool kv_in_registers = false;
  bool v_in_registers = false;    // V alone does, as the left operand of dP
  bool by_pairs = false;          // a pair of thread blocks shares out the head dim (backward_wide.cu)
  bool own_in_registers = false;  // and each keeps its own columns of K and V in registers, as those of S and dP
  int persistent_steps = 0;       // pairs take item after item where items have at most so many steps
  constexpr bool built() const { return block_q > 0; }
};

struct HeadDimLimits {
  int head_dim;  // the largest of the row
  ForwardPlan forward;
  ForwardPlan short_forward = {};  // of calls whose rows see few keys (work.h); not built: as any other
  BackwardPlan backward;
};

inline constexpr HeadDimLimits kLimits[] = {
    // Bound by exp2 as much as by the products: three warpgroups share the units best, and without turns they fall into
    // step and use one unit at a time. With four, beginnings and ends of items are hidden better, but blocks are of 64
    // keys, and products of 64 columns read as much shared memory as there is time for. So that plan wins where items
    // are short.
    {.head_dim = 64,
     .forward = {.block_q = 192, .block_kv = 128, .stages = 3, .turns = true, .keeps_offset = true},
     .short_forward = {.block_q = 256, .block_kv = 64, .stages = 8, .keeps_offset = true},
     .backward = {.block_q = 64, .block_kv = 128, .stages = 4, .ds_stages = 3, .kv_in_registers = true}},
    // Three warpgroups, since two fall behind on long sequences. With 112 keys a block softcap spills.
    // Backward: V takes 24 registers a thread, which K's would not find beside them. It is for shared memory that the
    // products wait.
    {.head_dim = 96,
     .forward = {.block_q = 192, .block_kv = 96, .stages = 4, .turns = true, .keeps_offset = true},
     .backward = {.block_q = 64, .block_kv = 128, .stages = 3, .ds_stages = 2, .v_in_registers = true}},
    // Without turns where each block takes a maximum: two warpgroups then keep out of step by themselves
    // (docs/tuning.md).
    // Backward: dK and dV take 128 registers a thread, which leaves room for one of S and dP at a time.
    {.head_dim = 128,
     .forward = {.block_q = 128, .block_kv = 128, .stages = 2, .keeps_offset = true},
     .backward = {.block_q = 64, .block_kv = 128, .stages = 3, .ds_stages = 2}},
    // As 256; the backward has registers for what it reads of K and V most often, and pairs are always persistent.
    {.head_dim = 192,
     .forward = {.block_q = 128, .block_kv = 96, .stages = 2, .turns = true},
     .backward = {.block_q = 64,
                  .block_kv = 128,
                  .stages = 2,
                  .ds_stages = 2,
                  .by_pairs = true,
                  .own_in_registers = true,
                  .persistent_steps = 1048576}},
    // O takes 128 registers a thread, so that there are two warpgroups, and beside Q's 64 KB shared memory holds two
    // blocks of 80 keys of K and of V.
    // Backward: dK and dV of 64 keys alone would take 256 registers a thread. Persistent pairs have a slower main loop
    // here, which pays where items are short.
    {.head_dim = 256,
     .forward = {.block_q = 128, .block_kv = 80, .stages = 2, .turns = true},
     .backward =
         {.block_q = 64, .block_kv = 128, .stages = 2, .ds_stages = 2, .by_pairs = true, .persistent_steps = 16}},
};

inline constexpr int kHeadDimStep = 8;  // head dims are multiples of it: the copy engine moves 16 bytes at a time

// The smallest head dim of a row.
constexpr int smallest_head_dim(std::size_t row) { return (row == 0 ? 0 : kLimits[row - 1].head_dim) + kHeadDimStep; }

// Whether the head dim is one of the row's.
constexpr bool has_head_dim(std::size_t row, int64_t head_dim) {
  return head_dim >= smallest_head_dim(row) && head_dim <= kLimits[row].head_dim && head_dim % kHeadDimStep == 0;
}

// Calls f.template operator()<row>() for the row of kLimits with this head dim; false if there is none.
template <class F>
bool with_limits(int64_t head_dim, F&& f) {
  return [&]<std::size_t... row>(std::index_sequence<row...>) {
    return ((has_head_dim(row, head_dim) && (f.template operator()<row>(), true)) || ...);
  }(std::make_index_sequence<std::size(kLimits)>{});
}

}  // namespace flash_attn_ext
