// The online softmax (Milakov & Gimelshein 2018; FlashAttention 2, section 3.1) on score fragments.
#pragma once

#include <cmath>

#include "../ptx/warpgroup.cuh"
#include "fragment.cuh"

namespace flash_attn_ext {

// Caps scores: each becomes tanh(score * factor), where `factor_log2` is factor * 2 * log2(e). As 1 - 2 / (1 + exp(2
// x)), which is right to 3e-7; tanh.approx is only to 5e-4, too little for lse.
template <int kRegisters>
__device__ __forceinline__ void cap(float (&scores)[kRegisters], float factor_log2) {
#pragma unroll
  for (int i = 0; i < kRegisters; ++i) {
    scores[i] = fmaf(-2.f, ptx::rcp(1.f + ptx::ex2(scores[i] * factor_log2)), 1.f);
  }
}

// Per thread: two rows, each shared by the four threads of a quad. The maximum is the quad's, the sum the thread's own.
//
// The offset that is subtracted from the scores need not be the maximum: any value serves as long as sum and O share it
// and nothing overflows. So sum and O are rescaled only when the maximum has grown by more than kSlack over the offset,
// which after the first blocks it hardly ever does. P is then at most 2^kSlack, in range for fp16 too, and no less
// precise.
struct OnlineSoftmax {
  static constexpr float kSlack = 8.f;  // in powers of two
  // At an offset that stays: from where on a thread's sum over a block raises it, and how far its sum allows that.
  static constexpr float kLargeSum = 0x1.0p10f, kMostSum = 0x1.0p120f;

  float scale_log2;  // softmax_scale * log2(e): exp(scale * s) = exp2(scale_log2 * s), one FFMA and one EX2
  float offset[2] = {-INFINITY, -INFINITY};
  float sum[2] = {0.f, 0.f};

  __device__ __forceinline__ explicit OnlineSoftmax(float scale_log2) : scale_log2(scale_log2) {}

  // Turns scores into P = exp2(scale_log2 * (score - offset)) and adds them to the sum. Returns, for the whole warp
  // alike, whether O must be multiplied by `rescale` before P V is added to it.
  template <int kRegisters>
  __device__ __forceinline__ bool update(float (&scores)[kRegisters], float (&rescale)[2]) {
    // Two chains a row: the latency of a maximum is longer than its turn at issue.
    float maximum[2][2] = {{scores[0], scores[4]}, {scores[2], scores[6]}};
#pragma unroll
    for (int i = 0; i < kRegisters; ++i) {
      float& m = maximum[fragment_row(i)][i / 4 % 2];
      m = fmaxf(m, scores[i]);
    }
    float row_max[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      row_max[r] = fmaxf(maximum[r][0], maximum[r][1]);
      row_max[r] = fmaxf(row_max[r], __shfl_xor_sync(~0u, row_max[r], 1));
      row_max[r] = fmaxf(row_max[r], __shfl_xor_sync(~0u, row_max[r], 2));
    }

    // Where both are -inf (or +inf) the difference is NaN, the comparison false, and the offset stays.
    // A row's offset is raised for itself alone: what its neighbours see changes no bit of it.
    const auto grows = [&](int r) { return (row_max[r] - offset[r]) * scale_log2 > kSlack; };
    const bool grew = __any_sync(~0u, grows(0) || grows(1));
    if (grew) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float raised = grows(r) ? row_max[r] : offset[r];
        rescale[r] = raised == offset[r] ? 1.f : ptx::ex2((offset[r] - raised) * scale_log2);
        offset[r] = raised;
        sum[r] *= rescale[r];
      }
    }

    float scaled[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) scaled[r] = scaled_offset(r);
    float partial[2][2] = {{sum[0], -0.f}, {sum[1], -0.f}};  // adding to -0 costs nothing
#pragma unroll
    for (int i = 0; i < kRegisters; ++i) {
      int r = fragment_row(i);
      scores[i] = ptx::ex2(fmaf(scores[i], scale_log2, -scaled[r]));
      partial[r][i / 4 % 2] += scores[i];
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) sum[r] = partial[r][0] + partial[r][1];
    return grew;
  }

  // Before the first call of update_at_offset. A row that is NaN already, or not used, gets an offset of +inf: whatever
  // it sees, it is never large and never lost.
  __device__ __forceinline__ void keep_offset(const bool (&is_used)[2]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float total = sum[r];
      total += __shfl_xor_sync(~0u, total, 1);
      total += __shfl_xor_sync(~0u, total, 2);
      if (isnan(total) || !is_used[r]) offset[r] = INFINITY;
    }
  }

  // The same as `update`, at the offset as it is: that spares the maximum. P may be as large as float32 allows. Returns
  // whether it is large in one of the thread's rows. If so in a thread of the warp, `raise_offset` comes next. If not,
  // P is in range for fp16 too.
  template <int kRegisters>
  __device__ __forceinline__ bool update_at_offset(float (&scores)[kRegisters]) {
    // Before any finite score the offset is -inf, and all is lost.
    const float scaled[2] = {offset[0] * scale_log2, offset[1] * scale_log2};
#pragma unroll
    for (int i = 0; i < kRegisters; ++i) {
      const int r = fragment_row(i);
      scores[i] = ptx::ex2(fmaf(scores[i], scale_log2, -scaled[r]));
    }
    const float2 block = sum_of(scores);
    sum[0] += block.x;
    sum[1] += block.y;
    return block.x >= kLargeSum || block.y >= kLargeSum;
  }

  // Raises the offsets of rows where P is large, and multiplies it down. O must be multiplied by `rescale` before P V
  // is added to it. A sum that is too large for that becomes infinite, and stays so: its row is lost.
  template <int kRegisters>
  __device__ __forceinline__ void raise_offset(float (&p)[kRegisters], float (&rescale)[2]) {
    const float2 block = sum_of(p);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float largest = r == 0 ? block.x : block.y;  // of the row's threads; a NaN stays in the sum
      largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 1));
      largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 2));
      // A row is raised for itself alone, and by the block's sum, so that a key that dominates it has a P of 1, which
      // rounding leaves alone; by the sum of all blocks P might end below fp16's range. At the smallest scales the
      // offset cannot be raised, and need not, since a sum counts keys and no more.
      const float raised = offset[r] + log2f(largest) / scale_log2;
      const bool raises = largest >= kLargeSum && largest < kMostSum && raised < INFINITY;
      rescale[r] = raises ? ptx::rcp(largest) : 1.f;
      if (raises) offset[r] = raised;
      sum[r] *= largest < kMostSum ? rescale[r] : INFINITY;
    }
#pragma unroll
    for (int i = 0; i < kRegisters; ++i) p[i] *= rescale[fragment_row(i)];
  }

  // After the last call of update_at_offset: whether the row is lost. What was NaN before the first one is not.
  __device__ __forceinline__ bool is_lost(int r) const { return !(sum[r] < kMostSum) && offset[r] < INFINITY; }

  // After the last block: what O must be multiplied by, and the log-sum-exp of the scaled scores and of the sink, a
  // logit that joins the sum but not O. It is given in powers of two; -inf: none. A row that saw nothing, or only
  // scores of -inf, has O 0 and the lse that the sink has. NaN stays NaN. There is no branch, so that a product may run
  // meanwhile.
  __device__ __forceinline__ void finish(const float (&sink_log2)[2], float (&row_scale)[2], float (&lse)[2]) {
    constexpr float kLn2 = 0.6931471805599453f;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      sum[r] += __shfl_xor_sync(~0u, sum[r], 1);
      sum[r] += __shfl_xor_sync(~0u, sum[r], 2);
      // From the offset to the larger of both, so that nothing overflows: by exactly 1 where that is the offset.
      const float scaled = offset[r] * scale_log2, larger = fmaxf(scaled, sink_log2[r]);
      const float reference = larger == -INFINITY ? 0.f : larger;
      const float rescale = ptx::ex2(scaled - reference), total = sum[r] * rescale + ptx::ex2(sink_log2[r] - reference);
      row_scale[r] = total == 0.f ? 0.f : rescale * ptx::rcp(total);
      lse[r] = (reference + log2f(total)) * kLn2;
    }
  }

 private:
  // Of the thread's two rows.
  template <int kRegisters>
  static __device__ __forceinline__ float2 sum_of(const float (&p)[kRegisters]) {
    float partial[2][2] = {{-0.f, -0.f}, {-0.f, -0.f}};  // two chains a row
#pragma unroll
    for (int i = 0; i < kRegisters; ++i) partial[fragment_row(i)][i / 4 % 2] += p[i];
    return {partial[0][0] + partial[0][1], partial[1][0] + partial[1][1]};
  }

  // An offset of -inf means that no finite score was seen: 0 makes P = exp2(-inf) = 0, where -inf would make it NaN.
  __device__ __forceinline__ float scaled_offset(int r) const {
    float scaled = offset[r] * scale_log2;
    return scaled == -INFINITY ? 0.f : scaled;
  }
};

}  // namespace flash_attn_ext
