// What operators.cpp has for python.cpp, and the options of a call as the operators take them.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>
#include <utility>

#include "../problem.h"

namespace flash_attn_ext {

using OptionalTensor = std::optional<at::Tensor>;

// The options of a call, as flash_attn_ext/options.py has them: the numbers that problem.h describes, then tensors.
// `Types` is their order in the operators' schema.
struct CallOptions {
  Options numbers;
  OptionalTensor sinks;  // (heads,), of any floating-point type

  using Types = decltype(std::tuple_cat(Options::Types(), std::tuple<OptionalTensor>()));
  static constexpr std::size_t kNumbers = std::tuple_size_v<Options::Types>;

  explicit CallOptions(const Types& values)
      : numbers([&]<std::size_t... i>(std::index_sequence<i...>) {
          return Options{std::get<i>(values)...};
        }(std::make_index_sequence<kNumbers>{})),
        sinks(std::get<kNumbers>(values)) {}
};

using ForwardResult = std::tuple<at::Tensor, at::Tensor>;  // out, lse

// The operator forward.
ForwardResult call_forward(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                           const CallOptions::Types& options);

// Its CUDA kernel.
ForwardResult forward_cuda(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                           const CallOptions::Types& options);

}  // namespace flash_attn_ext
