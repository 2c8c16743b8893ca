// The CUDA kernels of the registered operators, and forward's autograd. The schemas are in flash_attn_ext/ops.py.
//
// A kernel checks the call, allocates its results, and launches. This folder includes only those of torch's headers
// that it needs: torch/extension.h costs half a minute more.
#include "operators.h"

#include <ATen/Context.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/GradMode.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <array>
#include <limits>
#include <optional>
#include <string>

#include "checks.h"
#include "python.h"
#include "tensors.h"

namespace flash_attn_ext {
namespace {

using BackwardResult = std::tuple<at::Tensor, at::Tensor, at::Tensor>;  // dq, dk, dv
using Needs = std::array<bool, 3>;                                      // which of them

// Torch takes every option by itself: the dispatcher as an argument, autograd as an entry of its dictionary. Our
// functions take them as one value.
template <class Types>
struct OneByOne;

template <class... Option>
struct OneByOne<std::tuple<Option...>> {
  template <auto function>
  static ForwardResult forward(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, Option... options) {
    return function(q, k, v, {options...});
  }

  template <auto function>
  static BackwardResult backward(const at::Tensor& dout, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                 const at::Tensor& out, const at::Tensor& lse, Option... options, Needs needs) {
    return function(dout, q, k, v, out, lse, {options...}, needs);
  }

  // Under its number: compiled autograd cannot look into a tuple of them.
  using Dictionary = decltype(torch::autograd::AutogradContext::saved_data);

  static void save(const std::tuple<Option...>& options, Dictionary& to) {
    int i = 0;
    std::apply([&](const auto&... option) { ((to[std::to_string(i++)] = option), ...); }, options);
  }

  static std::tuple<Option...> load(const Dictionary& from) {
    std::tuple<Option...> options;
    int i = 0;
    std::apply([&](Option&... option) { ((option = from.at(std::to_string(i++)).template to<Option>()), ...); },
               options);
    return options;
  }
};
using Flat = OneByOne<Options::Types>;

// Gradients that are not needed have no elements.
BackwardResult backward_cuda(const at::Tensor& dout, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                             const at::Tensor& out, const at::Tensor& lse, const Options::Types& values, Needs needs) {
  const auto options = std::make_from_tuple<Options>(values);
  if (!is_plainly_fine(dout, q, k, v, out, lse, options)) python::check_backward(dout, q, k, v, out, lse, values);
  // The thread blocks add to dq in the order in which they come.
  if (needs[0]) at::globalContext().alertNotDeterministic("The gradient of q in flash_attn_ext");
  const c10::cuda::CUDAGuard guard(q.device());

  const Result dq(q, needs[0]), dk(k, needs[1]), dv(v, needs[2]);
  if (q.numel() == 0 || k.numel() == 0) return {dq.tensor.zero_(), dk.tensor.zero_(), dv.tensor.zero_()};

  const Input dout_in(dout), q_in(q), k_in(k), v_in(v), out_in(out);
  const at::Tensor lse_in = contiguous_and_aligned(lse);
  BackwardParams params{
      .problem = problem_of(q, k, options),
      .dout = dout_in,
      .q = q_in,
      .k = k_in,
      .v = v_in,
      .out = out_in,
      .lse = lse_in.const_data_ptr<float>(),
      .dq = dq,
      .dk = dk,
      .dv = dv,
  };
  const at::Tensor workspace = allocate({backward_workspace_bytes(params)}, q, at::kByte);
  params.workspace = workspace.mutable_data_ptr();
  launch_backward(params, c10::cuda::getCurrentCUDAStream(q.get_device()).stream());
  return {dq.finish(), dk.finish(), dv.finish()};
}

template <class F>
auto find_operator(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<F>();
}

BackwardResult call_backward(const at::Tensor& dout, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                             const at::Tensor& out, const at::Tensor& lse, const Options::Types& options, Needs needs) {
  static const auto op = find_operator<decltype(Flat::backward<backward_cuda>)>("flash_attn_ext::backward");
  return std::apply([&](const auto&... option) { return op.call(dout, q, k, v, out, lse, option..., needs); }, options);
}

// Until lse has a gradient, a loss that uses it is refused.
struct Attention : torch::autograd::Function<Attention> {
  static constexpr bool is_traceable = true;

  static torch::autograd::variable_list forward(torch::autograd::AutogradContext* context, const at::Tensor& q,
                                                const at::Tensor& k, const at::Tensor& v,
                                                const Options::Types& options) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    const auto [out, lse] = call_forward(q, k, v, options);
    context->save_for_backward({q, k, v, out, lse});
    context->set_materialize_grads(false);  // a gradient of lse is one that a loss has asked for
    Flat::save(options, context->saved_data);
    return {out, lse};
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 const torch::autograd::variable_list& gradients) {
    if (gradients[1].defined()) python::refuse_gradient_of_lse();
    if (!gradients[0].defined()) return torch::autograd::variable_list(4);
    const auto saved = context->get_saved_variables();
    const at::Tensor &q = saved[0], &k = saved[1], &v = saved[2], &out = saved[3], &lse = saved[4];
    const Options::Types options = Flat::load(context->saved_data);
    const Needs needs{context->needs_input_grad(0), context->needs_input_grad(1), context->needs_input_grad(2)};
    // The autograd of the operator backward, in ops.py, does nothing but refuse second derivatives.
    std::optional<at::AutoDispatchBelowADInplaceOrView> below_autograd;
    if (!c10::GradMode::is_enabled()) below_autograd.emplace();
    const auto [dq, dk, dv] = call_backward(gradients[0], q, k, v, out, lse, options, needs);
    const auto if_needed = [&](int i, const at::Tensor& gradient) { return needs[i] ? gradient : at::Tensor(); };
    return {if_needed(0, dq), if_needed(1, dk), if_needed(2, dv), {}};
  }
};

// The autograd kernel of the operator forward, for every device.
ForwardResult forward_autograd(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                               const Options::Types& options) {
  if (!derivatives_are_plainly_fine(q, k, v)) python::check_derivatives(q, k, v, options);
  if (!needs_gradient(q, k, v)) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    return call_forward(q, k, v, options);
  }
  const torch::autograd::variable_list results = Attention::apply(q, k, v, options);
  return {results[0], results[1]};
}

TORCH_LIBRARY_IMPL(flash_attn_ext, CUDA, m) {
  m.impl("forward", Flat::forward<forward_cuda>);
  m.impl("backward", Flat::backward<backward_cuda>);
}
TORCH_LIBRARY_IMPL(flash_attn_ext, Autograd, m) { m.impl("forward", Flat::forward<forward_autograd>); }

}  // namespace

ForwardResult call_forward(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                           const Options::Types& options) {
  static const auto op = find_operator<decltype(Flat::forward<forward_cuda>)>("flash_attn_ext::forward");
  return std::apply([&](const auto&... option) { return op.call(q, k, v, option...); }, options);
}

ForwardResult forward_cuda(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                           const Options::Types& values) {
  const auto options = std::make_from_tuple<Options>(values);
  if (!is_plainly_fine(q, k, v, options)) python::check(q, k, v, values);
  const c10::cuda::CUDAGuard guard(q.device());

  const Result out(q);
  const at::Tensor lse = allocate({q.size(0), q.size(2), q.size(1)}, q, at::kFloat);
  if (q.numel() == 0) return {out.tensor, lse};
  if (k.numel() == 0) return {out.tensor.zero_(), lse.fill_(-std::numeric_limits<float>::infinity())};

  const Input q_in(q), k_in(k), v_in(v);
  const c10::cuda::CUDAStream stream = c10::cuda::getCurrentCUDAStream(q.get_device());
  const at::Tensor counter = item_counter(stream, q);
  const ForwardParams params{
      .problem = problem_of(q, k, options),
      .q = q_in,
      .k = k_in,
      .v = v_in,
      .out = out,
      .lse = lse.mutable_data_ptr<float>(),
      .item_counter = counter.mutable_data_ptr<int>(),
  };
  launch_forward(params, stream.stream());
  return {out.finish(), lse};
}

}  // namespace flash_attn_ext
