// Host side of TMA: tensor maps of (batch, seqlen, heads, head_dim) tensors of 16-bit elements.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

#include "launch.h"
#include "launch_utils.h"
#include "params.h"

namespace flash_attn_ext {

// The driver's entry point, without linking to libcuda.
inline auto tensor_map_encoder() {
  static const auto encoder = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult result;
    check_cuda(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &result),
               "looking up cuTensorMapEncodeTiled");
    if (result != cudaDriverEntryPointSuccess || function == nullptr) {
      throw std::runtime_error("this NVIDIA driver has no cuTensorMapEncodeTiled: it is older than CUDA 12; update it");
    }
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
  }();
  return encoder;
}

// A map whose copies move `box_rows` rows of one head by 64 columns, swizzled as tile/smem.cuh expects. Coordinates are
// (column, row, head, batch). Rows past the end of a sequence are read as zeros and never written.
inline CUtensorMap make_tensor_map(const char* name, const void* data, DType dtype, int64_t batch, int64_t seqlen,
                                   int64_t heads, int head_dim, const Strides& strides, int box_rows) {
  constexpr int kElementBytes = 2;
  const cuuint64_t sizes[4] = {static_cast<cuuint64_t>(head_dim), static_cast<cuuint64_t>(seqlen),
                               static_cast<cuuint64_t>(heads), static_cast<cuuint64_t>(batch)};
  const cuuint64_t stride_bytes[3] = {static_cast<cuuint64_t>(strides.seqlen) * kElementBytes,
                                      static_cast<cuuint64_t>(strides.heads) * kElementBytes,
                                      static_cast<cuuint64_t>(strides.batch) * kElementBytes};
  const cuuint32_t box[4] = {64, static_cast<cuuint32_t>(box_rows), 1, 1};
  const cuuint32_t element_strides[4] = {1, 1, 1, 1};
  CUtensorMap map;
  CUresult result = tensor_map_encoder()(
      &map, dtype == DType::kFloat16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 4,
      const_cast<void*>(data), sizes, stride_bytes, box, element_strides, CU_TENSOR_MAP_INTERLEAVE_NONE,
      CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (test_faults.tensor_map_encode_fails) result = CUDA_ERROR_INVALID_VALUE;
  if (result != CUDA_SUCCESS) {
    std::string text = std::string("the driver cannot describe ") + name + " to the copy engine (CUresult " +
                       std::to_string(result) + "): batch " + std::to_string(batch) + ", seqlen " +
                       std::to_string(seqlen) + ", heads " + std::to_string(heads) + ", head_dim " +
                       std::to_string(head_dim) + ", strides in elements (" + std::to_string(strides.batch) + ", " +
                       std::to_string(strides.seqlen) + ", " + std::to_string(strides.heads) +
                       "). Strides must be below 2^40 bytes; a contiguous copy of the tensor always works.";
    throw std::runtime_error(text);
  }
  return map;
}

}  // namespace flash_attn_ext
