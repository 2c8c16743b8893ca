// All that sees Python: the pybind11 module flash_attn_ext._C, with the eager shortcut, and the calls of python.h.
#include "python.h"

#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/utils/pybind.h>

#include <optional>
#include <tuple>
#include <type_traits>

#include "../limits.h"
#include "checks.h"
#include "operators.h"
#include "sdpa.h"
#include "tensors.h"

namespace at::autocast {
TORCH_API ScalarType get_autocast_dtype(DeviceType);  // ATen/autocast_mode.h, without its ATen/ATen.h
}

namespace flash_attn_ext {
namespace {

namespace py = pybind11;

// What Python has registered.
struct Registered {
  py::object options;                                   // the class Options
  py::object forward;                                   // of a call whose arguments are not of the usual types
  py::object check, check_backward, check_derivatives;  // python.h
};

Registered& registered() {
  static auto& all = *new Registered;  // never freed: Python may go first
  return all;
}

// The arguments before the options, and those after them.
template <class... Before, class... After>
void ask(py::object Registered::* check, const std::tuple<Before...>& before, const CallOptions::Types& options,
         const After&... after) {
  const py::gil_scoped_acquire gil;
  const py::object as_one = registered().options(*py::tuple(py::cast(options)));
  std::apply([&](const Before&... tensors) { (registered().*check)(tensors..., as_one, after...); }, before);
}

// From Python objects ------------------------------------------------------------------------------------------------

// Unpacks what options are made of; false where the object is not of the type, nor of a subclass.
bool unpack(PyObject* from, bool& to) {
  to = from == Py_True;
  return PyBool_Check(from);
}

bool unpack(PyObject* from, double& to) {
  if (!PyFloat_Check(from)) return false;
  to = PyFloat_AS_DOUBLE(from);
  return true;
}

bool unpack(PyObject* from, int64_t& to) {
  if (!PyLong_CheckExact(from)) return false;
  int overflow;
  to = PyLong_AsLongLongAndOverflow(from, &overflow);
  return !overflow;
}

// By torch's caster: the header with its own check and access costs a second more of compilation.
bool unpack(PyObject* from, at::Tensor& to) {
  py::detail::make_caster<at::Tensor> caster;
  if (!caster.load(from, false)) return false;
  to = std::move(py::detail::cast_op<at::Tensor&>(caster));
  return true;
}

template <class T>
bool unpack(PyObject* from, std::optional<T>& to) {
  return from == Py_None || unpack(from, to.emplace());
}

template <class... Element>
bool unpack(PyObject* from, std::tuple<Element...>& to) {
  if (!PyTuple_Check(from) || PyTuple_GET_SIZE(from) != sizeof...(Element)) return false;
  Py_ssize_t i = 0;
  return std::apply([&](auto&... element) { return (unpack(PyTuple_GET_ITEM(from, i++), element) && ...); }, to);
}

// The eager shortcut -------------------------------------------------------------------------------------------------

// Whether autocast is on and has nothing to do.
bool autocast_changes_nothing(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v) {
  if (c10::impl::tls_is_dispatch_key_excluded(c10::DispatchKey::AutocastCUDA)) return false;  // it is off
  const at::ScalarType dtype = at::autocast::get_autocast_dtype(at::kCUDA);
  return q.scalar_type() == dtype && k.scalar_type() == dtype && v.scalar_type() == dtype;
}

// Whether the dispatcher would do anything with this call but hand it to forward_cuda: autograd, autocast, a dispatch
// mode (FakeTensor, selective checkpointing, tracing), a tensor subclass, functorch, another device.
bool needs_dispatcher(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                      const CallOptions::Types& options) {
  const OptionalTensor& sinks = std::get<CallOptions::kNumbers>(options);
  if (needs_gradient(q, k, v, sinks) || has_tangent(q, k, v, sinks)) return true;
  static constexpr c10::DispatchKeySet kPassedThrough{c10::DispatchKey::CUDA, c10::DispatchKey::AutogradCUDA,
                                                      c10::DispatchKey::ADInplaceOrView,
                                                      c10::DispatchKey::BackendSelect};
  const c10::impl::LocalDispatchKeySet local = c10::impl::tls_local_dispatch_key_set();
  c10::DispatchKeySet of_inputs = q.key_set() | k.key_set() | v.key_set();
  const auto add = [&]<class T>(const T& option) {
    if constexpr (std::is_same_v<T, OptionalTensor>) {
      if (option) of_inputs = of_inputs | option->key_set();
    }
  };
  std::apply([&](const auto&... option) { (add(option), ...); }, options);
  const c10::DispatchKeySet keys = (of_inputs | local.included_) - local.excluded_;
  return (keys.raw_repr() & ~kPassedThrough.raw_repr()) != 0;
}

// What flash_attn_ext.forward calls in eager mode. The registered operator does the same and costs several
// microseconds more, so it is called only when the dispatcher has work to do.
ForwardResult forward(py::handle q_object, py::handle k_object, py::handle v_object, py::handle options_object) {
  at::Tensor q, k, v;
  CallOptions::Types options;
  if (!unpack(q_object.ptr(), q) || !unpack(k_object.ptr(), k) || !unpack(v_object.ptr(), v) ||
      !unpack(options_object.ptr(), options)) {
    // Wrong, or rare, and then Python unpacks it: an int, or a SymFloat while tracing, as softmax_scale.
    return registered().forward(q_object, k_object, v_object, options_object).cast<ForwardResult>();
  }

  const py::gil_scoped_release no_gil;  // an allocation or a full launch queue can wait for the device
  // The operator's autocast is Python's: models that run under autocast mostly come with its dtype already.
  std::optional<c10::impl::ExcludeDispatchKeyGuard> no_autocast;
  if (autocast_changes_nothing(q, k, v)) no_autocast.emplace(c10::DispatchKey::AutocastCUDA);
  return needs_dispatcher(q, k, v, options) ? call_forward(q, k, v, options) : forward_cuda(q, k, v, options);
}

// For tests ----------------------------------------------------------------------------------------------------------

template <class... Tensors>
bool is_plainly_fine_call(const Tensors&... tensors, py::handle options_object) {
  CallOptions::Types options;
  return unpack(options_object.ptr(), options) && is_plainly_fine(tensors..., CallOptions(options));
}

void set_test_faults(bool tensor_map_encode_fails, int capability, int multiprocessors) {
  test_faults.tensor_map_encode_fails = tensor_map_encode_fails;
  test_faults.compute_capability = capability;
  test_faults.multiprocessors = multiprocessors;
}

int items_again(const at::Tensor& like) {
  return item_counters(c10::cuda::getCurrentCUDAStream(like.get_device()), like)[2].item<int>();
}

// The module ---------------------------------------------------------------------------------------------------------

// The table of limits.h.
py::list limits() {
  const auto plan = []<class Plan>(const Plan& p) -> py::object {
    if (!p.built()) return py::none();
    py::dict numbers(py::arg("block_q") = p.block_q, py::arg("block_kv") = p.block_kv, py::arg("stages") = p.stages);
    const auto flag = [&](const char* name, bool set) {  // the others are not there
      if (set) numbers[name] = true;
    };
    if constexpr (std::is_same_v<Plan, BackwardPlan>) {
      numbers["ds_stages"] = p.ds_stages;
      flag("kv_in_registers", p.kv_in_registers);
      flag("v_in_registers", p.v_in_registers);
      flag("by_pairs", p.by_pairs);
      flag("own_in_registers", p.own_in_registers);
      if (p.persistent_steps > 0) numbers["persistent_steps"] = p.persistent_steps;
    } else {
      flag("turns", p.turns);
      flag("keeps_offset", p.keeps_offset);
    }
    return numbers;
  };
  py::list rows;
  for (std::size_t i = 0; i < std::size(kLimits); ++i) {
    const HeadDimLimits& row = kLimits[i];
    rows.append(py::dict(py::arg("head_dim") = row.head_dim, py::arg("smallest") = smallest_head_dim(i),
                         py::arg("step") = kHeadDimStep, py::arg("forward") = plan(row.forward),
                         py::arg("short_forward") = plan(row.short_forward), py::arg("backward") = plan(row.backward)));
  }
  return rows;
}

void register_python(py::object options, py::object forward, py::object check, py::object check_backward,
                     py::object check_derivatives) {
  registered() = {options, forward, check, check_backward, check_derivatives};
}

PYBIND11_MODULE(_C, m) {
  m.def("forward", torch::wrap_pybind_function(forward),
        "forward(q, k, v, options) -> (out, lse), by position only; see flash_attn_ext.forward.");
  m.def("register", register_python, py::kw_only(), py::arg("options"), py::arg("forward"), py::arg("check"),
        py::arg("check_backward"), py::arg("check_derivatives"),
        "Registers Python's say in calls that are not plainly fine.");
  m.def("limits", limits,
        "The table of csrc/limits.h, a dict per row: of the head dims `smallest`, `smallest` + `step` ... `head_dim`.\n"
        "None stands for 'not built'.");
  m.def("compute_capability", torch::wrap_pybind_function(compute_capability), py::arg("device"),
        "Compute capability of the CUDA device with this index, 90 for 9.0.");
  py::class_<SdpaOverride>(
      m, "SdpaOverride",
      "While it is there, torch's flash and cuDNN attention operators are these kernels where they\n"
      "take the call; see flash_attn_ext/adapters/sdpa.py.")
      .def(py::init<>())
      .def("remove", &SdpaOverride::remove);
  using at::Tensor;
  const char* fine =
      "For tests: whether a call gets the fast yes; (q, k, v, options) of the forward, or (dout, q, k, v, out, lse,\n"
      "options) of the backward.";
  m.def("is_plainly_fine", is_plainly_fine_call<Tensor, Tensor, Tensor>, fine);
  m.def("is_plainly_fine", is_plainly_fine_call<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>, fine);
  const auto shared_memory = [](int d) {
    return std::tuple(forward_shared_memory(d, false), forward_shared_memory(d, true), backward_shared_memory(d));
  };
  m.def(
      "shared_memory", shared_memory, py::arg("head_dim"),
      "For tests: bytes of shared memory that a thread block takes, (forward, short_forward, backward). 0 stands for\n"
      "'not built'.");
  m.def("items_again", torch::wrap_pybind_function(items_again), py::arg("like"),
        "For tests: how many work items forwards have computed twice, on this tensor's device in its current stream.");
  m.def("set_test_faults", set_test_faults, py::kw_only(), py::arg("tensor_map_encode_fails") = false,
        py::arg("compute_capability") = 0, py::arg("multiprocessors") = 0,
        "For tests only: makes the driver seem to refuse tensor maps, every GPU seem to be of this compute capability\n"
        "(80 for 8.0; 0: the real one), and the backward order its work for so many multiprocessors (0: as many as\n"
        "there are). Called without arguments it ends all of them.");
}

}  // namespace

void python::check(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const CallOptions::Types& options) {
  ask(&Registered::check, std::tie(q, k, v), options);
}

void python::check_backward(const at::Tensor& dout, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                            const at::Tensor& out, const at::Tensor& lse, const CallOptions::Types& options,
                            const OptionalTensor& dlse) {
  ask(&Registered::check_backward, std::tie(dout, q, k, v, out, lse), options, dlse);
}

void python::check_derivatives(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                               const CallOptions::Types& options) {
  ask(&Registered::check_derivatives, std::tie(q, k, v), options);
}

}  // namespace flash_attn_ext
