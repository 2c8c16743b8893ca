// What operators.cpp has for python.cpp.
#pragma once

#include <ATen/core/Tensor.h>

#include <tuple>

#include "../problem.h"

namespace flash_attn_ext {

using ForwardResult = std::tuple<at::Tensor, at::Tensor>;  // out, lse

// The operator forward.
ForwardResult call_forward(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                           const Options::Types& options);

// Its CUDA kernel.
ForwardResult forward_cuda(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                           const Options::Types& options);

}  // namespace flash_attn_ext
