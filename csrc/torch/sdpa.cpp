// How torch's attention operators are taken over. The kernels here are boxed: they find arguments by their names, since
// torch adds some from version to version, and hand a call that is not taken to the kernel before them as it came.
#include "sdpa.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "checks.h"
#include "operators.h"
#include "tensors.h"

namespace flash_attn_ext {
namespace {

struct TorchOperator {
  const char* name;
  bool is_backward;
  bool heads_first;  // (batch, heads, seqlen, head_dim), else as ours
  bool of_cudnn;     // its lse has a last dimension of 1, and its causal mask begins at the top left
};

constexpr TorchOperator kOperators[] = {
    {"aten::_scaled_dot_product_flash_attention", false, true, false},
    {"aten::_scaled_dot_product_flash_attention_backward", true, true, false},
    {"aten::_scaled_dot_product_cudnn_attention", false, true, true},
    {"aten::_scaled_dot_product_cudnn_attention_backward", true, true, true},
    {"aten::_flash_attention_forward", false, false, false},
    {"aten::_flash_attention_backward", true, false, false},
};

// The arguments that are read, and their names in torch's schemas.
enum Argument {
  kQ,
  kK,
  kV,
  kDout,
  kOut,
  kLse,
  kCuSeqlensQ,
  kCuSeqlensK,
  kDropout,
  kCausal,
  kDebug,
  kScale,
  kLeft,
  kRight
};
constexpr std::string_view kRead[] = {
    "query",     "key",       "value",     "grad_out",          "out",   "logsumexp",        "cum_seq_q",
    "cum_seq_k", "dropout_p", "is_causal", "return_debug_mask", "scale", "window_size_left", "window_size_right"};
static_assert(std::size(kRead) == kRight + 1);

// Those that may have any value. The largest lengths are not needed, and torch's context parallelism passes wrong ones
// to a backward; the others belong to dropout, or ask for an lse, which is always there. Any further one must be None.
constexpr std::string_view kIgnored[] = {"max_q",     "max_k",  "philox_seed",       "philox_offset",
                                         "rng_state", "unused", "compute_log_sumexp"};

// The place of a name, or -1.
template <std::size_t count>
int place_of(const std::string& name, const std::string_view (&names)[count]) {
  const auto found = std::find(names, names + count, name);
  return found == names + count ? -1 : static_cast<int>(found - names);
}

bool is_given(const c10::IValue& value) {
  return !value.isNone() && !(value.isTensor() && !value.toTensor().defined());
}

at::Tensor tensor_of(const c10::IValue& value) { return is_given(value) ? value.toTensor() : at::Tensor(); }

OptionalTensor optional_of(const c10::IValue& value) {
  return is_given(value) ? OptionalTensor(value.toTensor()) : std::nullopt;
}

// A call of ours: tensors are (batch, seqlen, heads, head_dim), or packed (total, heads, head_dim).
struct Call {
  at::Tensor q, k, v;
  at::Tensor dout, out, lse;  // of a backward
  CallOptions::Types options;
};

// Of dense tensors. On the CPU every such call runs.
bool is_taken(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const CallOptions& options) {
  if (q.is_cuda()) return is_plainly_fine(q, k, v, options) && limits_of(q.size(3)).backward.built();
  return fit_together(q, k, v) && at::isFloatingType(q.scalar_type()) && are_plainly_fine(options);
}

bool is_taken(const Call& call) {
  CallOptions options(call.options);
  const auto is_fine = [](const Call& call, const CallOptions& options) {
    return is_taken(call.q, call.k, call.v, options) &&
           (!call.dout.defined() || results_fit(call.dout, call.q, call.out, call.lse));
  };
  if (!options.has_lengths()) return is_fine(call, options);

  const OptionalTensor of_q = std::exchange(options.cu_seqlens_q, std::nullopt);
  const OptionalTensor of_k = std::exchange(options.cu_seqlens_k, std::nullopt);
  const auto are_lengths = [&](const OptionalTensor& t) {
    return t && t->dim() == 1 && t->size(0) > 0 && t->scalar_type() == at::kInt && t->is_contiguous() &&
           t->device() == call.q.device();
  };
  if (!are_lengths(of_q) || !are_lengths(of_k) || of_q->size(0) != of_k->size(0) || call.q.dim() != 3) return false;
  const auto as_one = [](const at::Tensor& t) { return t.defined() ? t.unsqueeze(0) : t; };
  return is_fine({as_one(call.q), as_one(call.k), as_one(call.v), as_one(call.dout), as_one(call.out), as_one(call.lse),
                  call.options},
                 options);
}

// What dropout would leave for the backward: memory of that size and type, and nothing in it.
at::Tensor nothing(at::IntArrayRef size, const at::Tensor& like, at::ScalarType type) {
  return like.is_cuda() ? allocate(size, like, type) : at::empty(size, like.options().dtype(type));
}

class Override : public c10::OperatorKernel {
 public:
  Override(const TorchOperator& op, c10::DispatchKey key) : op_(op) {
    const c10::OperatorHandle handle = c10::Dispatcher::singleton().findSchemaOrThrow(op.name, "");
    if (handle.hasComputedKernelForDispatchKey(key)) before_.emplace(handle.getComputedKernelForDispatchKey(key));
    places_.fill(-1);
    for (const c10::Argument& argument : handle.schema().arguments()) {
      const int place = place_of(argument.name(), kRead);
      const bool is_of_backward = place == kDout || place == kOut || place == kLse;
      if (place >= 0 && (op.is_backward || !is_of_backward)) {
        places_[place] = count_;
      } else if (place_of(argument.name(), kIgnored) < 0) {
        others_.push_back(count_);
      }
      ++count_;
    }
  }

  void operator()(const c10::OperatorHandle& handle, c10::DispatchKeySet keys, torch::jit::Stack* stack) {
    const std::optional<Call> call = read(torch::jit::last(*stack, count_));
    if (!call || !is_taken(*call)) {
      TORCH_CHECK_NOT_IMPLEMENTED(before_, op_.name,
                                  ": torch has none for this device, and flash_attn_ext has it only ",
                                  "without dropout, windows and other options, for tensors that fit together.");
      return before_->callBoxed(handle, keys, stack);
    }
    torch::jit::drop(*stack, count_);
    if (call->q.is_cuda()) {
      return op_.is_backward ? backward<backward_cuda>(*call, *stack) : forward<forward_cuda>(*call, *stack);
    }
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    op_.is_backward ? backward<call_backward>(*call, *stack) : forward<call_forward>(*call, *stack);
  }

 private:
  // None if an option asks for what is not taken.
  std::optional<Call> read(at::ArrayRef<c10::IValue> arguments) const {
    const c10::IValue none;
    const auto at = [&](Argument name) -> const c10::IValue& {
      return places_[name] < 0 ? none : arguments[places_[name]];
    };
    const auto is_true = [&](Argument name) { return !at(name).isNone() && at(name).toBool(); };
    const auto reach = [&](Argument name) { return at(name).isNone() ? -1 : at(name).toInt(); };
    const bool causal = is_true(kCausal);
    // varlen_attn says causal by a window of (-1, 0) too.
    const bool has_window = reach(kLeft) != -1 || !(reach(kRight) == -1 || (causal && reach(kRight) == 0));
    const auto is_asked = [&](int place) { return is_given(arguments[place]); };
    if (has_window || at(kDropout).toDouble() != 0 || is_true(kDebug) || std::ranges::any_of(others_, is_asked)) {
      return std::nullopt;
    }
    Call call{.q = tensor_of(at(kQ)),
              .k = tensor_of(at(kK)),
              .v = tensor_of(at(kV)),
              .dout = tensor_of(at(kDout)),
              .out = tensor_of(at(kOut)),
              .lse = tensor_of(at(kLse)),
              .options = {at(kScale).toOptional<double>(), causal, -1, -1, 0.0, false, std::nullopt,
                          optional_of(at(kCuSeqlensQ)), optional_of(at(kCuSeqlensK)), std::nullopt, std::nullopt}};
    if (!is_complete(call)) return std::nullopt;
    if (op_.of_cudnn) {
      const auto is_expanded = [](const at::Tensor& t) { return std::ranges::count(t.strides(), 0) > 0; };
      // Of an expanded tensor torch promises a gradient with strides that ours does not have.
      if (is_expanded(call.q) || is_expanded(call.k) || is_expanded(call.v)) return std::nullopt;
      if (causal && call.q.size(2) != call.k.size(2)) return std::nullopt;
      if (op_.is_backward) call.lse = call.lse.squeeze(-1);
    }
    return op_.heads_first ? with_heads_swapped(std::move(call)) : call;
  }

  // Whether the tensors can be read at all. What torch's kernel refuses, it is to refuse in its own words.
  bool is_complete(const Call& call) const {
    const auto is_fine = [&](const at::Tensor& t) { return t.defined() && (!op_.heads_first || t.dim() == 4); };
    const bool are_fine = is_fine(call.q) && is_fine(call.k) && is_fine(call.v);
    return are_fine && (!op_.is_backward || (is_fine(call.dout) && is_fine(call.out) && call.lse.defined()));
  }

  static Call with_heads_swapped(Call call) {
    for (at::Tensor* t : {&call.q, &call.k, &call.v, &call.dout, &call.out}) {
      if (t->defined()) *t = t->transpose(1, 2);
    }
    return call;
  }

  template <auto function>
  void forward(const Call& call, torch::jit::Stack& stack) const {
    auto [out, lse] = function(call.q, call.k, call.v, call.options);
    const at::Tensor none;
    const int64_t max_q = call.q.size(1), max_k = call.k.size(1);
    const auto of_dropout = [&](at::IntArrayRef size, at::ScalarType type) { return nothing(size, call.q, type); };
    if (op_.of_cudnn) {
      torch::jit::push(stack, out.transpose(1, 2), lse.unsqueeze(-1), none, none, max_q, max_k,
                       of_dropout({}, at::kLong), of_dropout({}, at::kLong), none);
      return;
    }
    const at::Tensor seed = of_dropout({2}, at::kUInt64), offset = of_dropout({}, at::kUInt64);
    const at::Tensor debug = of_dropout({0}, call.q.scalar_type());
    if (op_.heads_first) {
      torch::jit::push(stack, out.transpose(1, 2), lse, none, none, max_q, max_k, seed, offset, debug);
    } else {
      torch::jit::push(stack, out, lse, seed, offset, debug);
    }
  }

  template <auto function>
  void backward(const Call& call, torch::jit::Stack& stack) const {
    const auto [dq, dk, dv, dsinks] =
        function(call.dout, call.q, call.k, call.v, call.out, call.lse, call.options, std::nullopt, {true, true, true});
    for (const at::Tensor& gradient : {dq, dk, dv}) {
      torch::jit::push(stack, op_.heads_first ? gradient.transpose(1, 2) : gradient);
    }
  }

  TorchOperator op_;
  std::optional<c10::SafeKernelFunction> before_;
  std::array<int, std::size(kRead)> places_;  // of what is read among the arguments, -1: the operator has no such
  std::vector<int> others_;                   // the places of those that must be None
  int count_ = 0;
};

struct Silence : c10::WarningHandler {
  void process(const c10::Warning&) override {}
};

}  // namespace

SdpaOverride::SdpaOverride() {
  Silence silence;  // about kernels that are overridden
  const c10::WarningUtils::WarningHandlerGuard guard(&silence);
  auto libraries = std::make_shared<std::vector<torch::Library>>();
  for (const c10::DispatchKey key : {c10::DispatchKey::CUDA, c10::DispatchKey::CPU}) {
    torch::Library& library = libraries->emplace_back(torch::Library::IMPL, "aten", key, "csrc/torch/sdpa.cpp", 0);
    for (const TorchOperator& op : kOperators) {
      library.impl(op.name, torch::CppFunction::makeFromBoxedFunctor(std::make_unique<Override>(op, key)));
    }
  }
  libraries_ = libraries;
}

}  // namespace flash_attn_ext
