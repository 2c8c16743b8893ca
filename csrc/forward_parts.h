// Where the forward leaves its results for parts of the keys, and what makes one result of them.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "launch.h"
#include "work.h"

namespace flash_attn_ext {

// In params.workspace, of each part: lse (batch, heads, rows), and behind all of these O (batch, heads, rows,
// head_dim), in float32.
struct PartialResults {
  float *lse = nullptr, *out = nullptr;  // null: keys are not shared out
  int64_t bytes = 0;

  PartialResults(const Problem& problem, const Division& division, void* workspace) {
    if (division.parts == 1) return;
    const int64_t floats = division.parts * division.part_values, before_out = (floats + 3) / 4 * 4;
    lse = static_cast<float*>(workspace);
    out = lse + before_out;
    bytes = (before_out + floats * problem.head_dim) * static_cast<int64_t>(sizeof(float));
  }
};

// Writes params.out and params.lse. Sinks join here.
void launch_combine(const ForwardParams& params, const Division& division, cudaStream_t stream);

}  // namespace flash_attn_ext
