// Host side of TMA: tensor maps of (batch, seqlen, heads, head_dim) tensors of 16-bit elements.
#pragma once

#include <cuda.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>
#include <type_traits>

#include "device.h"
#include "launch.h"
#include "tile/smem.cuh"

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

// A map whose copies move one slab of a shared-memory tile of this type: its rows, of one head, by 64 columns.
// Coordinates are (column, row, head, batch). Rows past the end of a sequence are read as zeros and never written.
template <class Tile>
CUtensorMap make_tensor_map(const char* name, const Tensor& tensor, const Shape& shape) {
  constexpr int kElementBytes = sizeof(typename Tile::Element);
  const auto& strides = tensor.strides;
  const cuuint64_t sizes[4] = {static_cast<cuuint64_t>(shape.head_dim), static_cast<cuuint64_t>(shape.seqlen),
                               static_cast<cuuint64_t>(shape.heads), static_cast<cuuint64_t>(shape.batch)};
  const cuuint64_t stride_bytes[3] = {static_cast<cuuint64_t>(strides.row) * kElementBytes,
                                      static_cast<cuuint64_t>(strides.head) * kElementBytes,
                                      static_cast<cuuint64_t>(strides.batch) * kElementBytes};
  const cuuint32_t box[4] = {kSlabColumns, Tile::kRows, 1, 1};
  const cuuint32_t element_strides[4] = {1, 1, 1, 1};
  constexpr CUtensorMapDataType kType = std::is_same_v<typename Tile::Element, __half>
                                            ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                            : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  CUtensorMap map;
  CUresult result = tensor_map_encoder()(&map, kType, 4, tensor.data, sizes, stride_bytes, box, element_strides,
                                         CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                         CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (test_faults.tensor_map_encode_fails) result = CUDA_ERROR_INVALID_VALUE;
  if (result != CUDA_SUCCESS) {
    std::string text = std::string("the driver cannot describe ") + name + " to the copy engine (CUresult " +
                       std::to_string(result) + "): batch " + std::to_string(shape.batch) + ", seqlen " +
                       std::to_string(shape.seqlen) + ", heads " + std::to_string(shape.heads) + ", head_dim " +
                       std::to_string(shape.head_dim) + ", strides in elements (" + std::to_string(strides.batch) +
                       ", " + std::to_string(strides.row) + ", " + std::to_string(strides.head) +
                       "). Strides must be below 2^40 bytes; a contiguous copy of the tensor always works.";
    throw std::runtime_error(text);
  }
  return map;
}

}  // namespace flash_attn_ext
