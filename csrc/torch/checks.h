// Whether a call is plainly fine: a fast yes, so that the usual call asks nobody else. A no is no refusal: it leaves
// the call to Python (python.h). tests/test_checks.py holds every yes to what Python says.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/GradMode.h>
#include <c10/cuda/CUDAException.h>

#include <array>
#include <atomic>

#include "../launch.h"
#include "../limits.h"
#include "operators.h"

namespace flash_attn_ext {

// 90 for compute capability 9.0.
inline int compute_capability(c10::DeviceIndex device) {
  if (const int injected = test_faults.compute_capability) return injected;
  static std::array<std::atomic<int>, C10_COMPILE_TIME_MAX_GPUS> known{};
  int capability = known.at(device);
  if (capability == 0) {
    int major, minor;
    C10_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
    C10_CUDA_CHECK(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
    known[device] = capability = 10 * major + minor;
  }
  return capability;
}

// The row of the table; an empty one where there is none.
inline HeadDimLimits limits_of(int64_t head_dim) {
  HeadDimLimits limits{};
  with_limits(head_dim, [&]<std::size_t row>() { limits = kLimits[row]; });
  return limits;
}

// Whether every kernel has what the options ask for, as every backward is deterministic where it is asked to be. Of the
// other options flash_attn_ext/limits.py has the table.
inline bool are_plainly_fine(const CallOptions& options) {
  return options.numbers.are_in_range() && !options.numbers.has_window() && options.numbers.softcap == 0 &&
         !options.sinks && !options.has_lengths();
}

// Whether the sizes of a dense call's tensors fit, and their types and devices are the same.
inline bool fit_together(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v) {
  if (q.dim() != 4 || k.dim() != 4 || v.dim() != 4) return false;
  const at::IntArrayRef q_size = q.sizes(), k_size = k.sizes();  // (batch, seqlen, heads, head_dim)
  const bool sizes_fit = k_size == v.sizes() && q_size[0] == k_size[0] && q_size[3] == k_size[3] && k_size[2] > 0 &&
                         q_size[2] % k_size[2] == 0;
  const auto is_counted = [](at::IntArrayRef size) {
    return size[0] <= kMaxCount && size[1] <= kMaxCount && size[2] <= kMaxCount;
  };
  const auto is_beside_q = [&](const at::Tensor& t) {
    return t.scalar_type() == q.scalar_type() && t.device() == q.device();
  };
  return sizes_fit && is_counted(q_size) && is_counted(k_size) && is_beside_q(k) && is_beside_q(v);
}

// Whether they do of what a backward takes besides, without a gradient of lse.
inline bool results_fit(const at::Tensor& dout, const at::Tensor& q, const at::Tensor& out, const at::Tensor& lse) {
  const auto is_like_q = [&](const at::Tensor& t) {
    return t.sizes() == q.sizes() && t.scalar_type() == q.scalar_type() && t.device() == q.device();
  };
  const std::array lse_size{q.size(0), q.size(2), q.size(1)};
  return is_like_q(dout) && is_like_q(out) && lse.sizes() == at::IntArrayRef(lse_size) &&
         lse.scalar_type() == at::kFloat && lse.device() == q.device();
}

// Of forward.
inline bool is_plainly_fine(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const CallOptions& options) {
  return fit_together(q, k, v) && limits_of(q.size(3)).forward.built() &&
         (q.scalar_type() == at::kHalf || q.scalar_type() == at::kBFloat16) && are_plainly_fine(options) &&
         q.is_cuda() && compute_capability(q.get_device()) == 90;
}

// Of backward without a gradient of lse.
inline bool is_plainly_fine(const at::Tensor& dout, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                            const at::Tensor& out, const at::Tensor& lse, const CallOptions& options) {
  return is_plainly_fine(q, k, v, options) && limits_of(q.size(3)).backward.built() && results_fit(dout, q, out, lse);
}

// Whether it holds for one of the tensors that a call can be differentiated by.
template <class F>
bool any_input(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const OptionalTensor& sinks, F&& holds) {
  return holds(q) || holds(k) || holds(v) || (sinks && holds(*sinks));
}

inline bool needs_gradient(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const OptionalTensor& sinks) {
  return c10::GradMode::is_enabled() &&
         any_input(q, k, v, sinks, [](const at::Tensor& input) { return input.requires_grad(); });
}

// Whether an input has a tangent, for forward-mode differentiation, which grad mode does not switch off.
inline bool has_tangent(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const OptionalTensor& sinks) {
  return any_input(q, k, v, sinks, [](const at::Tensor& input) { return input._fw_grad(0).defined(); });
}

// Whether the derivatives that this call needs can be computed. A head dim that is unknown while tracing is left to
// Python.
inline bool derivatives_are_plainly_fine(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                         const CallOptions& options) {
  const OptionalTensor& sinks = options.sinks;
  if (has_tangent(q, k, v, sinks)) return false;
  if (!needs_gradient(q, k, v, sinks)) return true;
  const auto is_special = [](const at::Tensor& input) {  // nested, or torch.func differentiates: grad, vjp, ...
    return input.is_nested() || input.key_set().has(c10::DispatchKey::FuncTorchGradWrapper);
  };
  if (any_input(q, k, v, sinks, is_special)) return false;
  return !q.is_cuda() || (are_plainly_fine(options) && q.dim() == 4 &&
                          limits_of(q.sym_size(3).maybe_as_int().value_or(0)).backward.built());
}

}  // namespace flash_attn_ext
