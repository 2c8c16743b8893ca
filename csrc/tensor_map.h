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
#include "tile/sequences.h"
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

// The dimensions of a map, the innermost first. Their strides are in elements; that of the first is 1.
struct MapDimensions {
  cuuint32_t rank;
  cuuint64_t sizes[5];
  int64_t strides[4];
};

// A map of 16-bit elements whose copies move boxes of so many rows of each of some heads by one slab's columns.
inline CUtensorMap encode_tensor_map(const char* name, const Tensor& tensor, const Shape& shape,
                                     const MapDimensions& dimensions, CUtensorMapDataType type, cuuint32_t rows,
                                     cuuint32_t columns, cuuint32_t heads) {
  constexpr int kElementBytes = 2;
  const auto& strides = tensor.strides;
  cuuint64_t stride_bytes[4];
  for (int i = 0; i < 4; ++i) stride_bytes[i] = static_cast<cuuint64_t>(dimensions.strides[i]) * kElementBytes;
  const auto swizzle = columns == 64 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B;
  const cuuint32_t box[5] = {columns, rows, heads, 1, 1};
  const cuuint32_t element_strides[5] = {1, 1, 1, 1, 1};
  CUtensorMap map;
  CUresult result = tensor_map_encoder()(&map, type, dimensions.rank, tensor.data, dimensions.sizes, stride_bytes, box,
                                         element_strides, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle,
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

template <class Tile>
CUtensorMap make_tensor_map(const char* name, const Tensor& tensor, const Shape& shape, const MapDimensions& dimensions,
                            int heads = 1) {
  constexpr bool kIsHalf = std::is_same_v<typename Tile::Element, __half>;
  constexpr auto kType = kIsHalf ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  return encode_tensor_map(name, tensor, shape, dimensions, kType, Tile::kRows / heads, Tile::kSlabColumns, heads);
}

inline MapDimensions dense_dimensions(const Tensor& tensor, const Shape& shape) {
  const auto& strides = tensor.strides;
  const auto size = [](int64_t n) { return static_cast<cuuint64_t>(n); };
  return {.rank = 4,
          .sizes = {size(shape.head_dim), size(shape.seqlen), size(shape.heads), size(shape.batch), 1},
          .strides = {strides.row, strides.head, strides.batch, strides.batch}};
}

// A map whose copies move one slab of a shared-memory tile of this type. Coordinates are (column, row, head, batch).
// Rows past the end of a batch are read as zeros and never written.
template <class Tile>
CUtensorMap make_tensor_map(const char* name, const Tensor& tensor, const Shape& shape) {
  return make_tensor_map<Tile>(name, tensor, shape, dense_dimensions(tensor, shape));
}

// The same for sequences that an Origin locates (tile/sequences.h). Coordinates are (column, row, head, batch, wrap).
//
// Where all are of one length, the last is 0. Otherwise the map is ragged: one map clips at the end of any sequence.
// Its batches are rows as well, and a sequence's row r stands at kWrap - size + r, so that row `size` is past the end,
// from batch offset + size on. The last dimension's step is so long that kWrap of them, less kWrap rows, are 2^64 bytes
// or a multiple, which an address does not show. Triton's tools/ragged_tma.py has the trick. Dense batches must follow
// each other like rows.
//
// A tile may have the rows of several heads, head by head: so many times fewer of each.
template <class Tile>
CUtensorMap make_sequence_map(const char* name, const Tensor& tensor, const Shape& shape, bool is_ragged,
                              int heads = 1) {
  MapDimensions dimensions = dense_dimensions(tensor, shape);
  dimensions.rank = 5;
  if (is_ragged) {
    constexpr int64_t kWrappingStride = int64_t{1} << 34;  // times kWrap and 2 bytes: 2^65
    constexpr cuuint64_t kMost = 0x7fff0000;               // sizes may be 2^32, but coordinates are signed
    const Strides& strides = tensor.strides;
    const int64_t row_stride = shape.seqlen > 1 ? strides.row : strides.batch;
    if (shape.batch > 1 && strides.batch != shape.seqlen * row_stride) {
      throw std::runtime_error(std::string(name) +
                               " has batches of which only a part is used, and they do not follow " +
                               "each other like rows; a contiguous copy of the tensor works");
    }
    dimensions.sizes[1] = Sequences::kWrap;
    dimensions.sizes[3] = dimensions.sizes[4] = kMost;
    dimensions.strides[0] = dimensions.strides[2] = row_stride;
    dimensions.strides[3] = kWrappingStride - row_stride;
  }
  return make_tensor_map<Tile>(name, tensor, shape, dimensions, heads);
}

}  // namespace flash_attn_ext
