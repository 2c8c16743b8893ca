// The CUDA kernels of the registered operators, and forward's autograd. The schemas are in flash_attn_ext/ops.py.
//
// A kernel checks the call, allocates its results, and launches. This folder includes only those of torch's headers
// that it needs: torch/extension.h costs half a minute more.
#include "operators.h"

#include <ATen/Context.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/searchsorted.h>
#include <ATen/ops/zeros_like.h>
#include <c10/core/GradMode.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <array>
#include <limits>
#include <optional>
#include <string>
#include <type_traits>

#include "checks.h"
#include "python.h"
#include "tensors.h"

namespace flash_attn_ext {
namespace {

// Torch takes every option by itself: the dispatcher as an argument, autograd as an entry of its dictionary. Our
// functions take them as one value.
template <class Types>
struct OneByOne;

template <class T>
constexpr bool is_tensor = std::is_same_v<T, OptionalTensor>;

template <class... Option>
struct OneByOne<std::tuple<Option...>> {
  template <auto function>
  static ForwardResult forward(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, Option... options) {
    return function(q, k, v, {options...});
  }

  template <auto function>
  static BackwardResult backward(const at::Tensor& dout, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                 const at::Tensor& out, const at::Tensor& lse, Option... options, OptionalTensor dlse,
                                 Needs needs) {
    return function(dout, q, k, v, out, lse, {options...}, dlse, needs);
  }

  // A number under its place: compiled autograd cannot look into a tuple of them. Tensors are saved as autograd does.
  using Dictionary = decltype(torch::autograd::AutogradContext::saved_data);

  static void save(const std::tuple<Option...>& options, Dictionary& numbers, torch::autograd::variable_list& tensors) {
    auto save_one = [&, i = 0](const auto& option) mutable {
      if constexpr (is_tensor<std::decay_t<decltype(option)>>) {
        tensors.push_back(option.value_or(at::Tensor()));
      } else {
        numbers[std::to_string(i++)] = option;
      }
    };
    std::apply([&](const Option&... option) { (save_one(option), ...); }, options);
  }

  static std::tuple<Option...> load(const Dictionary& numbers, const at::Tensor* tensors) {
    std::tuple<Option...> options;
    auto load_one = [&, i = 0]<class T>(T& option) mutable {
      if constexpr (is_tensor<T>) {
        if (const at::Tensor& tensor = *tensors++; tensor.defined()) option = tensor;
      } else {
        option = numbers.at(std::to_string(i++)).template to<T>();
      }
    };
    std::apply([&](Option&... option) { (load_one(option), ...); }, options);
    return options;
  }
};
using Flat = OneByOne<CallOptions::Types>;

constexpr float kOfNothing = -std::numeric_limits<float>::infinity();  // lse of a row that saw nothing

at::Tensor in_float32(const at::Tensor& sinks) { return contiguous_and_aligned(sinks.to(at::kFloat)); }

// What dsinks, of zeros, are where no row saw a key: the sum over the rows of exp(sink - lse) * dlse.
void add_rows_without_keys(const at::Tensor& dsinks, const at::Tensor& sinks, const at::Tensor& lse,
                           const at::Tensor& dlse) {
  const at::Tensor of_rows = sinks.unsqueeze(-1).sub(lse).exp_().mul_(dlse).masked_fill_(lse.eq(kOfNothing), 0);
  dsinks.add_(lse.dim() == 2 ? of_rows.sum(1) : of_rows.sum(at::IntArrayRef{0, 2}));
}

// (batch, 1, seqlen_q), packed (1, total_q): the rows that are not used, or belong to no sequence, where there may be
// such.
at::Tensor unused_rows(const at::Tensor& q, const CallOptions& options) {
  const at::Tensor row = at::arange(q.size(-3), q.options().dtype(at::kInt));
  if (!options.cu_seqlens_q) return row.ge(options.seqused_q->unsqueeze(-1)).unsqueeze(1);
  const at::Tensor begins = options.cu_seqlens_q->slice(0, 0, -1);
  const at::Tensor ends = options.seqused_q ? begins.add(*options.seqused_q) : options.cu_seqlens_q->slice(0, 1);
  const at::Tensor next = at::searchsorted(begins, row, /*out_int32=*/false, /*right=*/true);
  return row.ge(ends.index_select(0, next.sub_(1).clamp_min_(0))).unsqueeze(0);
}

template <class F>
auto find_operator(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<F>();
}

struct Attention : torch::autograd::Function<Attention> {
  static constexpr bool is_traceable = true;

  static torch::autograd::variable_list forward(torch::autograd::AutogradContext* context, const at::Tensor& q,
                                                const at::Tensor& k, const at::Tensor& v, const OptionalTensor&,
                                                const CallOptions::Types& options) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    const auto [out, lse] = call_forward(q, k, v, options);
    torch::autograd::variable_list tensors{q, k, v, out, lse};
    Flat::save(options, context->saved_data, tensors);
    context->save_for_backward(tensors);
    context->set_materialize_grads(false);  // nothing is computed for an lse that no loss uses
    return {out, lse};
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 const torch::autograd::variable_list& gradients) {
    if (!gradients[0].defined() && !gradients[1].defined()) return torch::autograd::variable_list(5);
    const auto saved = context->get_saved_variables();
    const at::Tensor &q = saved[0], &k = saved[1], &v = saved[2], &out = saved[3], &lse = saved[4];
    CallOptions::Types options = Flat::load(context->saved_data, &saved[5]);
    const Needs needs{context->needs_input_grad(0), context->needs_input_grad(1), context->needs_input_grad(2)};
    OptionalTensor& sinks = std::get<CallOptions::kNumbers>(options);
    if (sinks && !context->needs_input_grad(3)) sinks.reset();
    const OptionalTensor dlse = gradients[1].defined() ? OptionalTensor(gradients[1]) : std::nullopt;
    const at::Tensor dout = gradients[0].defined() ? gradients[0] : at::zeros_like(out);
    // The autograd of the operator backward, in ops.py, does nothing but refuse second derivatives.
    std::optional<at::AutoDispatchBelowADInplaceOrView> below_autograd;
    if (!c10::GradMode::is_enabled()) below_autograd.emplace();
    const auto [dq, dk, dv, dsinks] = call_backward(dout, q, k, v, out, lse, options, dlse, needs);
    const auto if_needed = [](bool need, const at::Tensor& gradient) { return need ? gradient : at::Tensor(); };
    return {if_needed(needs[0], dq),
            if_needed(needs[1], dk),
            if_needed(needs[2], dv),
            if_needed(sinks.has_value(), dsinks),
            {}};
  }
};

// The autograd kernel of the operator forward, for every device.
ForwardResult forward_autograd(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                               const CallOptions::Types& options) {
  const CallOptions call(options);
  if (!derivatives_are_plainly_fine(q, k, v, call)) python::check_derivatives(q, k, v, options);
  if (!needs_gradient(q, k, v, call.sinks)) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    return call_forward(q, k, v, options);
  }
  const torch::autograd::variable_list results = Attention::apply(q, k, v, call.sinks, options);
  return {results[0], results[1]};
}

TORCH_LIBRARY_IMPL(flash_attn_ext, CUDA, m) {
  m.impl("forward", Flat::forward<forward_cuda>);
  m.impl("backward", Flat::backward<backward_cuda>);
}
TORCH_LIBRARY_IMPL(flash_attn_ext, Autograd, m) { m.impl("forward", Flat::forward<forward_autograd>); }

}  // namespace

ForwardResult call_forward(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                           const CallOptions::Types& options) {
  static const auto op = find_operator<decltype(Flat::forward<forward_cuda>)>("flash_attn_ext::forward");
  return std::apply([&](const auto&... option) { return op.call(q, k, v, option...); }, options);
}

ForwardResult forward_cuda(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                           const CallOptions::Types& values) {
  const CallOptions options(values);
  if (!is_plainly_fine(q, k, v, options)) python::check(q, k, v, values);
  const c10::cuda::CUDAGuard guard(q.device());

  const bool part_of_q = options.seqused_q.has_value(), part_of_k = options.seqused_k.has_value();
  const Result out(q, true, part_of_q);
  const at::Tensor lse = allocate(lse_size(q), q, at::kFloat);
  if (q.numel() == 0) return {out.tensor, lse};
  if (options.is_without_sequences()) {
    return {out.tensor.zero_(), lse.fill_(kOfNothing)};
  }
  const at::Tensor sinks = options.sinks ? in_float32(*options.sinks) : at::Tensor();
  if (k.numel() == 0) {
    if (!options.sinks) return {out.tensor.zero_(), lse.fill_(kOfNothing)};
    lse.copy_(sinks.unsqueeze(-1));
    if (options.cu_seqlens_q || options.seqused_q) lse.masked_fill_(unused_rows(q, options), kOfNothing);
    return {out.tensor.zero_(), lse};
  }

  const Input q_in(q, part_of_q), k_in(k, part_of_k), v_in(v, part_of_k);
  const c10::cuda::CUDAStream stream = c10::cuda::getCurrentCUDAStream(q.get_device());
  const at::Tensor counters = item_counters(stream, q);
  ForwardParams params{
      .problem = problem_of(q, k, options),
      .q = q_in,
      .k = k_in,
      .v = v_in,
      .out = out,
      .lse = lse.mutable_data_ptr<float>(),
      .sinks = options.sinks ? sinks.const_data_ptr<float>() : nullptr,
      .item_counters = counters.mutable_data_ptr<int>(),
  };
  at::Tensor workspace;
  if (const int64_t bytes = forward_workspace_bytes(params.problem); bytes > 0) {
    workspace = allocate({bytes}, q, at::kByte);
    params.workspace = workspace.mutable_data_ptr();
  }
  launch_forward(params, stream.stream());
  return {out.finish(), lse};
}

BackwardResult call_backward(const at::Tensor& dout, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                             const at::Tensor& out, const at::Tensor& lse, const CallOptions::Types& options,
                             const OptionalTensor& dlse, Needs needs) {
  static const auto op = find_operator<decltype(Flat::backward<backward_cuda>)>("flash_attn_ext::backward");
  const auto call = [&](const auto&... option) { return op.call(dout, q, k, v, out, lse, option..., dlse, needs); };
  return std::apply(call, options);
}

BackwardResult backward_cuda(const at::Tensor& dout, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                             const at::Tensor& out, const at::Tensor& lse, const CallOptions::Types& values,
                             const OptionalTensor& dlse, Needs needs) {
  CallOptions options(values);
  if (dlse || !is_plainly_fine(dout, q, k, v, out, lse, options)) {
    python::check_backward(dout, q, k, v, out, lse, values, dlse);
  }
  // torch.use_deterministic_algorithms(True) is read here, by every backward on a GPU that runs: autograd's and
  // compiled autograd's, a graph of torch.compile and a call from Python all end in this kernel. So what holds is the
  // setting at the time of the backward, as with torch's own operators, and no traced graph has one of its own in it.
  options.numbers.deterministic = options.numbers.deterministic || at::globalContext().deterministicAlgorithms();
  const c10::cuda::CUDAGuard guard(q.device());

  const bool part_of_q = options.seqused_q.has_value(), part_of_k = options.seqused_k.has_value();
  const Result dq(q, needs[0], part_of_q), dk(k, needs[1], part_of_k), dv(v, needs[2], part_of_k);
  const at::Tensor sinks = options.sinks ? in_float32(*options.sinks) : at::Tensor();
  const at::Tensor dsinks = allocate({options.sinks ? sinks.size(0) : 0}, q, at::kFloat);
  const auto results = [&](const at::Tensor& dq, const at::Tensor& dk, const at::Tensor& dv) -> BackwardResult {
    return {dq, dk, dv, options.sinks ? dsinks.to(options.sinks->scalar_type()) : dsinks};
  };
  if (q.numel() == 0 || k.numel() == 0 || options.is_without_sequences()) {
    dsinks.zero_();
    if (options.sinks && dlse) add_rows_without_keys(dsinks, sinks, lse, *dlse);
    return results(dq.tensor.zero_(), dk.tensor.zero_(), dv.tensor.zero_());
  }

  const Input dout_in(dout, part_of_q), q_in(q, part_of_q), k_in(k, part_of_k), v_in(v, part_of_k), out_in(out);
  const at::Tensor lse_in = contiguous_and_aligned(lse);
  const at::Tensor dlse_in = dlse ? contiguous_and_aligned(*dlse) : at::Tensor();
  BackwardParams params{
      .problem = problem_of(q, k, options),
      .dout = dout_in,
      .q = q_in,
      .k = k_in,
      .v = v_in,
      .out = out_in,
      .lse = lse_in.const_data_ptr<float>(),
      .dlse = dlse ? dlse_in.const_data_ptr<float>() : nullptr,
      .sinks = options.sinks ? sinks.const_data_ptr<float>() : nullptr,
      .dq = dq,
      .dk = dk,
      .dv = dv,
      .dsinks = options.sinks ? dsinks.mutable_data_ptr<float>() : nullptr,
  };
  const at::Tensor workspace = allocate({backward_workspace_bytes(params)}, q, at::kByte);
  params.workspace = workspace.mutable_data_ptr();
  launch_backward(params, c10::cuda::getCurrentCUDAStream(q.get_device()).stream());
  return results(dq.finish(), dk.finish(), dv.finish());
}

}  // namespace flash_attn_ext
