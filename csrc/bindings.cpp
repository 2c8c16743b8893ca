// What Python sees of the kernels: the pybind11 module flash_attn_ext._C, and of the registered operators their CUDA
// side and forward's autograd. The only file that includes torch, and of torch only what it needs: torch/extension.h
// costs half a minute more.
//
// A call is checked, its results are allocated, the kernel is launched. What is wrong with a refused call is said by
// flash_attn_ext/limits.py, for calls with this module and without it; here is only whether a call is right.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/cuda/EmptyTensor.h>
#include <ATen/ops/empty_like.h>
#include <c10/core/GradMode.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>

#include <array>
#include <atomic>
#include <cmath>
#include <limits>
#include <map>
#include <mutex>
#include <optional>
#include <tuple>
#include <utility>

#include "launch.h"
#include "limits.h"

namespace at::autocast {
TORCH_API ScalarType get_autocast_dtype(DeviceType);  // ATen/autocast_mode.h, without its ATen/ATen.h
}

namespace flash_attn_ext {
namespace {

namespace py = pybind11;
using at::Tensor;

// 90 for compute capability 9.0.
int compute_capability(c10::DeviceIndex device) {
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
HeadDimLimits limits_of(int64_t head_dim) {
  for (const HeadDimLimits& row : kLimits) {
    if (row.head_dim == head_dim) return row;
  }
  return {};
}

// The kernels compute with a float. NaN is out of its range as well.
bool is_scale(double value) {
  return value >= std::numeric_limits<float>::min() && value <= std::numeric_limits<float>::max();
}

// Whether the kernels can run this forward call. limits.py gives the reasons when they cannot, and must agree.
bool is_valid(const Tensor& q, const Tensor& k, const Tensor& v, std::optional<double> softmax_scale) {
  if (q.dim() != 4 || k.dim() != 4 || v.dim() != 4) return false;
  const at::IntArrayRef q_size = q.sizes(), k_size = k.sizes();                      // (batch, seqlen, heads, head_dim)
  return k_size == v.sizes() && q_size[0] == k_size[0] && q_size[3] == k_size[3] &&  //
         k_size[2] > 0 && q_size[2] % k_size[2] == 0 &&                              //
         (q.scalar_type() == at::kHalf || q.scalar_type() == at::kBFloat16) &&       //
         k.scalar_type() == q.scalar_type() && v.scalar_type() == q.scalar_type() && q.is_cuda() &&
         k.device() == q.device() && v.device() == q.device() &&                         //
         limits_of(q_size[3]).forward.built() && is_scale(softmax_scale.value_or(1)) &&  //
         compute_capability(q.get_device()) == 90;
}

// The same for the backward.
bool is_valid_backward(const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
                       const Tensor& lse, std::optional<double> softmax_scale) {
  if (!is_valid(q, k, v, softmax_scale) || !limits_of(q.size(3)).backward.built()) return false;
  const auto is_like_q = [&](const Tensor& t) {
    return t.sizes() == q.sizes() && t.scalar_type() == q.scalar_type() && t.device() == q.device();
  };
  const std::array lse_size{q.size(0), q.size(2), q.size(1)};
  return is_like_q(dout) && is_like_q(out) && lse.sizes() == at::IntArrayRef(lse_size) &&
         lse.scalar_type() == at::kFloat && lse.device() == q.device();
}

// Raises what limits.py says against a call that is not valid.
template <class... Arguments>
[[noreturn]] void refuse(const char* check, const Arguments&... arguments) {
  const py::gil_scoped_acquire gil;
  py::module_::import("flash_attn_ext.limits").attr(check)(arguments...);
  TORCH_CHECK(false, "a bug in flash_attn_ext: csrc/bindings.cpp refuses a call that limits.py accepts");
}

bool is_aligned(const Tensor& t) { return reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0; }

// Whether tensor maps can address the tensor where it lies: 16-byte aligned, and so is every stride that is used.
bool is_addressable(const Tensor& t) {
  if (t.stride(3) != 1 || !is_aligned(t)) return false;
  for (int i = 0; i < 3; ++i) {
    if (t.size(i) > 1 && (t.stride(i) <= 0 || t.stride(i) * t.element_size() % 16 != 0)) return false;
  }
  return true;
}

Tensor addressable(const Tensor& t) { return is_addressable(t) ? t : t.clone(at::MemoryFormat::Contiguous); }

Strides strides_of(const Tensor& t) {
  // The stride of a dimension of size 1 may be anything and is never used; a tensor map wants it valid all the same.
  const auto stride = [&](int i) { return t.size(i) > 1 ? t.stride(i) : t.size(3); };
  return {.batch = stride(0), .seqlen = stride(1), .heads = stride(2)};
}

Tensor allocate_like(const Tensor& t) {
  // The usual case without the dispatcher, which costs as much as the allocation itself.
  return t.is_non_overlapping_and_dense() ? Tensor(at::detail::empty_strided_cuda(t.sizes(), t.strides(), t.options()))
                                          : at::empty_like(t);
}

// A result, and the memory that a kernel writes for it: its own, or a stand-in where tensor maps cannot address that.
// Without elements, and so with null for its memory, if it is not needed.
struct Result {
  Tensor tensor, written;

  explicit Result(const Tensor& like, bool is_needed = true)
      : tensor(is_needed ? allocate_like(like) : Tensor(at::detail::empty_cuda({0, 0, 0, 0}, like.options()))),
        written(is_addressable(tensor) ? tensor
                                       : at::empty_like(tensor, tensor.options(), at::MemoryFormat::Contiguous)) {}

  Tensor after_launch() const { return written.is_same(tensor) ? tensor : tensor.copy_(written); }
};

DType dtype_of(const Tensor& t) { return t.scalar_type() == at::kHalf ? DType::kFloat16 : DType::kBFloat16; }

float scale_or_default(std::optional<double> softmax_scale, const Tensor& q) {
  return static_cast<float>(softmax_scale.value_or(1 / std::sqrt(static_cast<double>(q.size(3)))));
}

// The kernels' tile counter: 0 before a launch and again after it. Launches of one stream follow each other, so each
// stream has its own, which nothing has to zero between launches. A captured launch may be replayed on any stream,
// beside anything: it gets a counter of its own, which the graph zeroes.
Tensor tile_counter(c10::cuda::CUDAStream stream, const Tensor& like) {
  const auto new_counter = [&] { return at::detail::empty_cuda({1}, like.options().dtype(at::kInt)).zero_(); };
  if (c10::cuda::currentStreamCaptureStatusMayInitCtx() != c10::cuda::CaptureStatus::None) return new_counter();
  unsigned long long id;  // not the handle, which may come back after the stream is gone
  C10_CUDA_CHECK(cudaStreamGetId(stream.stream(), &id));
  using Key = std::pair<c10::DeviceIndex, unsigned long long>;
  static std::mutex mutex;
  static auto& counters = *new std::map<Key, Tensor>;  // never freed: the driver may go first
  const std::lock_guard lock(mutex);
  auto [entry, is_new] = counters.try_emplace({stream.device_index(), id});
  if (is_new) entry->second = new_counter();
  return entry->second;
}

// The CUDA kernel of the operator forward.
std::tuple<Tensor, Tensor> forward_cuda(const Tensor& q, const Tensor& k, const Tensor& v,
                                        std::optional<double> softmax_scale, bool causal) {
  if (!is_valid(q, k, v, softmax_scale)) refuse("check", q, k, v, softmax_scale, causal);
  const c10::cuda::CUDAGuard guard(q.device());

  const Result out(q);
  Tensor lse = at::detail::empty_cuda({q.size(0), q.size(2), q.size(1)}, q.options().dtype(at::kFloat));
  if (q.numel() == 0) return {out.tensor, lse};
  if (k.numel() == 0) return {out.tensor.zero_(), lse.fill_(-std::numeric_limits<float>::infinity())};

  const Tensor q_in = addressable(q), k_in = addressable(k), v_in = addressable(v);
  const c10::cuda::CUDAStream stream = c10::cuda::getCurrentCUDAStream(q.get_device());
  const Tensor counter = tile_counter(stream, q);
  const ForwardParams params{
      .q = q_in.const_data_ptr(),
      .k = k_in.const_data_ptr(),
      .v = v_in.const_data_ptr(),
      .out = out.written.mutable_data_ptr(),
      .lse = lse.mutable_data_ptr<float>(),
      .tile_counter = counter.mutable_data_ptr<int>(),
      .q_strides = strides_of(q_in),
      .k_strides = strides_of(k_in),
      .v_strides = strides_of(v_in),
      .out_strides = strides_of(out.written),
      .batch = q.size(0),
      .seqlen_q = q.size(1),
      .seqlen_k = k.size(1),
      .heads = q.size(2),
      .kv_heads = k.size(2),
      .head_dim = static_cast<int>(q.size(3)),
      .dtype = dtype_of(q),
      .softmax_scale = scale_or_default(softmax_scale, q),
      .causal = causal,
  };
  launch_forward(params, stream.stream());
  return {out.after_launch(), lse};
}

// The CUDA kernel of the operator backward. Gradients that are not needed have no elements.
std::tuple<Tensor, Tensor, Tensor> backward_cuda(const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v,
                                                 const Tensor& out, const Tensor& lse,
                                                 std::optional<double> softmax_scale, bool causal,
                                                 std::array<bool, 3> needs) {
  if (!is_valid_backward(dout, q, k, v, out, lse, softmax_scale)) {
    refuse("check_backward", dout, q, k, v, out, lse, softmax_scale, causal);
  }
  const c10::cuda::CUDAGuard guard(q.device());

  const Result dq(q, needs[0]), dk(k, needs[1]), dv(v, needs[2]);
  if (q.numel() == 0 || k.numel() == 0) return {dq.tensor.zero_(), dk.tensor.zero_(), dv.tensor.zero_()};

  const Tensor dout_in = addressable(dout), q_in = addressable(q), k_in = addressable(k), v_in = addressable(v),
               out_in = addressable(out);
  const Tensor lse_in = lse.is_contiguous() && is_aligned(lse) ? lse : lse.clone(at::MemoryFormat::Contiguous);
  BackwardParams params{
      .dout = dout_in.const_data_ptr(),
      .q = q_in.const_data_ptr(),
      .k = k_in.const_data_ptr(),
      .v = v_in.const_data_ptr(),
      .out = out_in.const_data_ptr(),
      .lse = lse_in.const_data_ptr<float>(),
      .dq = dq.written.mutable_data_ptr(),
      .dk = dk.written.mutable_data_ptr(),
      .dv = dv.written.mutable_data_ptr(),
      .dout_strides = strides_of(dout_in),
      .q_strides = strides_of(q_in),
      .k_strides = strides_of(k_in),
      .v_strides = strides_of(v_in),
      .out_strides = strides_of(out_in),
      .dq_strides = strides_of(dq.written),
      .dk_strides = strides_of(dk.written),
      .dv_strides = strides_of(dv.written),
      .batch = q.size(0),
      .seqlen_q = q.size(1),
      .seqlen_k = k.size(1),
      .heads = q.size(2),
      .kv_heads = k.size(2),
      .head_dim = static_cast<int>(q.size(3)),
      .dtype = dtype_of(q),
      .softmax_scale = scale_or_default(softmax_scale, q),
      .causal = causal,
  };
  const Tensor workspace = at::detail::empty_cuda({backward_workspace_bytes(params)}, q.options().dtype(at::kByte));
  params.workspace = workspace.mutable_data_ptr();
  launch_backward(params, c10::cuda::getCurrentCUDAStream(q.get_device()).stream());
  return {dq.after_launch(), dk.after_launch(), dv.after_launch()};
}

// The registered operators, whose schemas are in flash_attn_ext/ops.py.
template <class F>
auto find_operator(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<F>();
}
const auto& forward_operator() {
  static const auto op = find_operator<decltype(forward_cuda)>("flash_attn_ext::forward");
  return op;
}
const auto& backward_operator() {
  static const auto op = find_operator<decltype(backward_cuda)>("flash_attn_ext::backward");
  return op;
}

bool needs_gradient(const Tensor& q, const Tensor& k, const Tensor& v) {
  return c10::GradMode::is_enabled() && (q.requires_grad() || k.requires_grad() || v.requires_grad());
}

// Whether forward-mode differentiation is asked for, which grad mode does not switch off.
bool has_tangent(const Tensor& q, const Tensor& k, const Tensor& v) {
  return q._fw_grad(0).defined() || k._fw_grad(0).defined() || v._fw_grad(0).defined();
}

// out as a function of q, k and v. lse passes it by: it is a result that has no gradient.
struct Attention : torch::autograd::Function<Attention> {
  static constexpr bool is_traceable = true;

  static Tensor forward(torch::autograd::AutogradContext* context, const Tensor& q, const Tensor& k, const Tensor& v,
                        std::optional<double> softmax_scale, bool causal, Tensor* lse) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    Tensor out;
    std::tie(out, *lse) = forward_operator().call(q, k, v, softmax_scale, causal);
    context->save_for_backward({q, k, v, out, *lse});
    context->saved_data["softmax_scale"] = softmax_scale;
    context->saved_data["causal"] = causal;
    return out;
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 const torch::autograd::variable_list& gradients) {
    const auto saved = context->get_saved_variables();
    const Tensor &q = saved[0], &k = saved[1], &v = saved[2], &out = saved[3], &lse = saved[4];
    const std::array needs{context->needs_input_grad(0), context->needs_input_grad(1), context->needs_input_grad(2)};
    // The operator's autograd only stands for second derivatives, and is Python's.
    std::optional<at::AutoDispatchBelowADInplaceOrView> below_autograd;
    if (!c10::GradMode::is_enabled()) below_autograd.emplace();
    const auto [dq, dk, dv] = backward_operator().call(gradients[0], q, k, v, out, lse,
                                                       context->saved_data["softmax_scale"].toOptional<double>(),
                                                       context->saved_data["causal"].toBool(), needs);
    const auto if_needed = [&](int i, const Tensor& gradient) { return needs[i] ? gradient : Tensor(); };
    return {if_needed(0, dq), if_needed(1, dk), if_needed(2, dv), {}, {}, {}};
  }
};

// The autograd kernel of the operator forward, for every device.
std::tuple<Tensor, Tensor> forward_autograd(const Tensor& q, const Tensor& k, const Tensor& v,
                                            std::optional<double> softmax_scale, bool causal) {
  if (has_tangent(q, k, v)) refuse("check_forward_mode", q, k, v);
  if (!needs_gradient(q, k, v)) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    return forward_operator().call(q, k, v, softmax_scale, causal);
  }
  if (q.is_cuda()) {
    // A head dim that is unknown while tracing (0 here) is Python's matter too.
    const int64_t head_dim = q.dim() == 4 ? q.sym_size(3).maybe_as_int().value_or(0) : 0;
    if (!limits_of(head_dim).backward.built()) {
      const py::gil_scoped_acquire gil;
      py::module_::import("flash_attn_ext.limits").attr("check_gradient")(q, k, v, softmax_scale, causal);
    }
  }
  Tensor lse;
  Tensor out = Attention::apply(q, k, v, softmax_scale, causal, &lse);
  return {out, lse};
}

// Whether autocast is on and has nothing to do.
bool autocast_changes_nothing(const Tensor& q, const Tensor& k, const Tensor& v) {
  if (c10::impl::tls_is_dispatch_key_excluded(c10::DispatchKey::AutocastCUDA)) return false;  // it is off
  const at::ScalarType dtype = at::autocast::get_autocast_dtype(at::kCUDA);
  return q.scalar_type() == dtype && k.scalar_type() == dtype && v.scalar_type() == dtype;
}

// Whether the dispatcher would do anything with this call but hand it to forward_cuda: autograd, autocast, a dispatch
// mode (FakeTensor, selective checkpointing, tracing), a tensor subclass, functorch, another device.
bool needs_dispatcher(const Tensor& q, const Tensor& k, const Tensor& v) {
  if (needs_gradient(q, k, v) || has_tangent(q, k, v)) return true;
  static constexpr c10::DispatchKeySet kPassedThrough{c10::DispatchKey::CUDA, c10::DispatchKey::AutogradCUDA,
                                                      c10::DispatchKey::ADInplaceOrView,
                                                      c10::DispatchKey::BackendSelect};
  const c10::impl::LocalDispatchKeySet local = c10::impl::tls_local_dispatch_key_set();
  const c10::DispatchKeySet keys = ((q.key_set() | k.key_set() | v.key_set()) | local.included_) - local.excluded_;
  return (keys.raw_repr() & ~kPassedThrough.raw_repr()) != 0;
}

// What flash_attn_ext.forward calls in eager mode. The registered operator does the same and costs several
// microseconds more, so it is called only when the dispatcher has work to do.
std::tuple<Tensor, Tensor> forward(py::handle q_object, py::handle k_object, py::handle v_object,
                                   py::handle scale_object, py::handle causal_object) {
  const auto is_tensor = [](py::handle object) { return THPVariable_Check(object.ptr()); };
  if (!is_tensor(q_object) || !is_tensor(k_object) || !is_tensor(v_object) || !PyBool_Check(causal_object.ptr()) ||
      !(scale_object.is_none() || PyFloat_Check(scale_object.ptr()))) {
    // Refused by Python, or seldom enough to be its matter: an int, or a SymFloat while tracing, as softmax_scale.
    return py::module_::import("flash_attn_ext.interface")
        .attr("forward_by_operator")(q_object, k_object, v_object, scale_object, causal_object)
        .cast<std::tuple<Tensor, Tensor>>();
  }
  const Tensor &q = THPVariable_Unpack(q_object.ptr()), &k = THPVariable_Unpack(k_object.ptr()),
               &v = THPVariable_Unpack(v_object.ptr());
  std::optional<double> softmax_scale;
  if (!scale_object.is_none()) softmax_scale = PyFloat_AS_DOUBLE(scale_object.ptr());
  const bool causal = causal_object.ptr() == Py_True;

  const py::gil_scoped_release no_gil;  // an allocation or a full launch queue can wait for the device
  // The operator's autocast is Python's: models that run under autocast mostly come with its dtype already.
  std::optional<c10::impl::ExcludeDispatchKeyGuard> no_autocast;
  if (autocast_changes_nothing(q, k, v)) no_autocast.emplace(c10::DispatchKey::AutocastCUDA);
  if (!needs_dispatcher(q, k, v)) return forward_cuda(q, k, v, softmax_scale, causal);
  return forward_operator().call(q, k, v, softmax_scale, causal);
}

// The table of limits.h.
py::list limits() {
  const auto tile = [](const auto& t) -> py::object {
    if (!t.built()) return py::none();
    return py::dict(py::arg("block_q") = t.block_q, py::arg("block_kv") = t.block_kv, py::arg("stages") = t.stages);
  };
  py::list rows;
  for (const HeadDimLimits& row : kLimits) {
    rows.append(py::dict(py::arg("head_dim") = row.head_dim, py::arg("forward") = tile(row.forward),
                         py::arg("backward") = tile(row.backward)));
  }
  return rows;
}

void set_test_faults(bool tensor_map_encode_fails, int capability) {
  test_faults.tensor_map_encode_fails = tensor_map_encode_fails;
  test_faults.compute_capability = capability;
}

PYBIND11_MODULE(_C, m) {
  m.def("forward", torch::wrap_pybind_function(forward),
        "forward(q, k, v, softmax_scale, causal) -> (out, lse), by position only; see flash_attn_ext.forward.");
  m.def("limits", limits, "The table of csrc/limits.h, a dict per head dimension; None stands for 'not built'.");
  m.def("compute_capability", torch::wrap_pybind_function(compute_capability), py::arg("device"),
        "Compute capability of the CUDA device with this index, 90 for 9.0.");
  m.def("set_test_faults", set_test_faults, py::kw_only(), py::arg("tensor_map_encode_fails") = false,
        py::arg("compute_capability") = 0,
        "For tests only: makes the driver seem to refuse tensor maps, and every GPU seem to be of this compute\n"
        "capability (80 for 8.0; 0: the real one). Called without arguments it ends both.");
}

TORCH_LIBRARY_IMPL(flash_attn_ext, CUDA, m) {
  m.impl("forward", forward_cuda);
  m.impl("backward", backward_cuda);
}
TORCH_LIBRARY_IMPL(flash_attn_ext, Autograd, m) { m.impl("forward", forward_autograd); }

}  // namespace
}  // namespace flash_attn_ext
