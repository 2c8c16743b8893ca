"""The registered operators torch.ops.flash_attn_ext.forward and .backward, with which torch.compile, torch.export,
selective checkpointing, FakeTensor, autocast and tensor subclasses see an attention call.

Their schemas and their kernels for CPU, fake tensors, autograd and autocast are here. Their CUDA kernels are registered
by csrc/torch/ where the package was built with it, and so is forward's autograd: C++ is faster there.
"""

import itertools

import torch
from torch import library

from . import cpu, limits, refusals
from ._binary import _C
from .options import TENSORS, Options, lse_shape, schema

_library = library.Library("flash_attn_ext", "DEF")
_library.define(
    f"forward(Tensor q, Tensor k, Tensor v, {schema()}) -> (Tensor out, Tensor lse)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    f"backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {schema()}, "
    "Tensor? dlse=None, bool[3] needs=[True, True, True]) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dsinks)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
forward = torch.ops.flash_attn_ext.forward.default
backward = torch.ops.flash_attn_ext.backward.default


# CPU and fake tensors -------------------------------------------------------------------------------------------------


# The dispatcher hands the options over one by one, without trailing ones that are the defaults.


def _forward_cpu(q, k, v, *options):
    options = Options(*options)
    refusals.check(q, k, v, options)
    refusals.check_forward_mode(q, k, v, options)
    out, lse = cpu.forward(q, k, v, options)
    empty_out, empty_lse = _empty_results(q)
    return _with_strides_of(empty_out, out), _with_strides_of(empty_lse, lse.float())


def _forward_fake(q, k, v, *options):
    refusals.check(q, k, v, Options(*options), on_device=False)
    return _empty_results(q)


def _backward_cpu(dout, q, k, v, out, lse, *others):
    options, dlse, needs = _split(others)
    refusals.check_backward(dout, q, k, v, out, lse, options, dlse)
    if q.dtype == torch.float64:
        # A float32 lse is too coarse for these gradients. Where it is forward's, it is known exactly.
        _, exact = cpu.forward(q, k, v, options)
        lse = torch.where(exact.float() == lse, exact, lse)
    with torch.autocast(q.device.type, enabled=False):  # it would compute the products in low precision
        gradients = cpu.backward(dout, q, k, v, out, lse, options, dlse)
    empty, needs = _empty_gradients(q, k, v, options, needs), (*needs, options.sinks is not None)
    results = itertools.zip_longest(empty, gradients, needs)
    return tuple(_with_strides_of(empty, gradient) if needed else empty for empty, gradient, needed in results)


def _with_strides_of(empty, result):
    """The result, copied only where its strides are others."""
    return result if result.stride() == empty.stride() else empty.copy_(result)


def _backward_fake(dout, q, k, v, out, lse, *others):
    options, dlse, needs = _split(others)
    refusals.check_backward(dout, q, k, v, out, lse, options, dlse, on_device=False)
    return _empty_gradients(q, k, v, options, needs)


def _split(others):
    """The options, and what the backward takes after them."""
    count = len(Options._fields)
    rest = others[count:]
    dlse, needs = *rest, *(None, (True, True, True))[len(rest) :]
    return Options(*others[:count]), dlse, needs


def _empty_results(q):
    return torch.empty_like(q), q.new_empty(lse_shape(q), dtype=torch.float32)


def _empty_gradients(q, k, v, options, needs):
    """A gradient that is not needed has no elements: an operator returns tensors, never None. That of sinks is needed
    where they are given: the backward has no other use for them."""
    pairs = zip((q, k, v), needs, strict=True)
    dsinks = q.new_empty(0, dtype=torch.float32) if options.sinks is None else torch.empty_like(options.sinks)
    return *(torch.empty_like(x) if needed else x.new_empty((0,) * x.dim()) for x, needed in pairs), dsinks


# CompositeExplicitAutograd stands for every device without a kernel of its own: the CPU, and CUDA where the package was
# built without its kernels, which refusals.check then refuses.
_library.impl("forward", _forward_cpu, "CompositeExplicitAutograd")
_library.impl("backward", _backward_cpu, "CompositeExplicitAutograd")
for _key in ("NestedTensorCPU", "NestedTensorCUDA"):  # to be refused
    _library.impl("forward", _forward_cpu, _key)
library.register_fake("flash_attn_ext::forward", _forward_fake, lib=_library)
library.register_fake("flash_attn_ext::backward", _backward_fake, lib=_library)


# Autograd -------------------------------------------------------------------------------------------------------------


def _save(ctx, inputs, output):
    q, k, v, *options = inputs
    options = Options(*options)
    refusals.check_gradients(q, k, v, options)
    ctx.save_for_backward(q, k, v, *output, *(getattr(options, name) for name in TENSORS))
    ctx.options = options.without_tensors()
    ctx.set_materialize_grads(False)  # nothing is computed for an lse that no loss uses


def _differentiate(ctx, dout, dlse):
    needs = dict(zip(("q", "k", "v", *Options._fields), ctx.needs_input_grad, strict=False))
    gradients = dict.fromkeys(needs)
    if dout is not None or dlse is not None:
        q, k, v, out, lse, *tensors = ctx.saved_tensors
        options = ctx.options._replace(**dict(zip(TENSORS, tensors, strict=True)))
        options = options if needs.get("sinks") else options._replace(sinks=None)
        dout = torch.zeros_like(out) if dout is None else dout
        results = backward(dout, q, k, v, out, lse, *options, dlse, [needs[name] for name in "qkv"])
        of_inputs = zip(("q", "k", "v", "sinks"), results, strict=True)
        gradients |= {name: gradient for name, gradient in of_inputs if needs.get(name)}
    return tuple(gradients.values())


def _refuse_second_derivative(ctx, *_):
    raise RuntimeError(refusals.NO_SECOND_DERIVATIVE)


if _C is None:  # else it is registered by csrc/torch/operators.cpp, and the same
    library.register_autograd("flash_attn_ext::forward", _differentiate, setup_context=_save, lib=_library)
# Without it a second derivative would vanish silently.
library.register_autograd("flash_attn_ext::backward", _refuse_second_derivative, lib=_library)


# Autocast -------------------------------------------------------------------------------------------------------------


def _autocast_kernel(device_type: str, key: torch._C.DispatchKey):
    def kernel(q, k, v, *options):
        dtype = torch.get_autocast_dtype(device_type)
        casts = (t.to(dtype) if t.dtype in limits.AUTOCAST_DTYPES else t for t in (q, k, v))
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key)):
            return forward(*casts, *options)

    return kernel


for _device_type, _key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
    _library.impl("forward", _autocast_kernel(_device_type, getattr(torch._C.DispatchKey, _key)), _key)
