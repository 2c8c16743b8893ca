// What operators.cpp has for python.cpp, and the options of a call as the operators take them.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
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
  OptionalTensor sinks;                       // (heads,), of any floating-point type
  OptionalTensor cu_seqlens_q, cu_seqlens_k;  // (sequences + 1,), int32
  OptionalTensor seqused_q, seqused_k;        // (sequences,), int32

  using Tensors = std::tuple<OptionalTensor, OptionalTensor, OptionalTensor, OptionalTensor, OptionalTensor>;
  using Types = decltype(std::tuple_cat(Options::Types(), Tensors()));
  static constexpr std::size_t kNumbers = std::tuple_size_v<Options::Types>;  // the tensors come after them

  explicit CallOptions(const Types& values)
      : numbers([&]<std::size_t... i>(std::index_sequence<i...>) {
          return Options{std::get<i>(values)...};
        }(std::make_index_sequence<kNumbers>{})),
        sinks(std::get<kNumbers>(values)),
        cu_seqlens_q(std::get<kNumbers + 1>(values)),
        cu_seqlens_k(std::get<kNumbers + 2>(values)),
        seqused_q(std::get<kNumbers + 3>(values)),
        seqused_k(std::get<kNumbers + 4>(values)) {}

  bool is_without_sequences() const {
    return (cu_seqlens_q && cu_seqlens_q->size(0) == 1) || (cu_seqlens_k && cu_seqlens_k->size(0) == 1);
  }
  bool has_lengths() const { return cu_seqlens_q || cu_seqlens_k || seqused_q || seqused_k; }
};

using ForwardResult = std::tuple<at::Tensor, at::Tensor>;  // out, lse

using BackwardResult = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;  // dq, dk, dv, dsinks
using Needs = std::array<bool, 3>;  // which of the first three; dsinks are needed where sinks are given

// The operator forward.
ForwardResult call_forward(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                           const CallOptions::Types& options);

// Its CUDA kernel.
ForwardResult forward_cuda(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                           const CallOptions::Types& options);

// The operator backward. Gradients that are not needed have no elements.
BackwardResult call_backward(const at::Tensor& dout, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                             const at::Tensor& out, const at::Tensor& lse, const CallOptions::Types& options,
                             const OptionalTensor& dlse, Needs needs);

// Its CUDA kernel.
BackwardResult backward_cuda(const at::Tensor& dout, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                             const at::Tensor& out, const at::Tensor& lse, const CallOptions::Types& options,
                             const OptionalTensor& dlse, Needs needs);

}  // namespace flash_attn_ext
