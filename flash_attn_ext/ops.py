"""The registered operators torch.ops.flash_attn_ext.forward and .backward, with which torch.compile, torch.export,
selective checkpointing, FakeTensor, autocast and tensor subclasses see an attention call.

Their schemas and their kernels for CPU, fake tensors, autograd and autocast are here. Their CUDA kernels are registered
by csrc/bindings.cpp where the package was built with it, and so is forward's autograd: C++ is faster there.
"""

import torch
from torch import library

from . import limits
from ._binary import _C
from .reference import attention_reference, attention_reference_backward

_library = library.Library("flash_attn_ext", "DEF")
_library.define(
    "forward(Tensor q, Tensor k, Tensor v, float? softmax_scale=None, bool causal=False) -> (Tensor out, Tensor lse)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, float? softmax_scale=None, "
    "bool causal=False, bool[3] needs=[True, True, True]) -> (Tensor dq, Tensor dk, Tensor dv)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
forward = torch.ops.flash_attn_ext.forward.default
backward = torch.ops.flash_attn_ext.backward.default
ALL = (True, True, True)


# CPU and fake tensors -------------------------------------------------------------------------------------------------


def _forward_reference(q, k, v, softmax_scale=None, causal=False):
    limits.check(q, k, v, softmax_scale, causal)
    limits.check_forward_mode(q, k, v)
    out, lse = attention_reference(q, k, v, softmax_scale, causal)
    return torch.empty_like(q).copy_(out), lse.to(torch.float32, memory_format=torch.contiguous_format)


def _forward_fake(q, k, v, softmax_scale=None, causal=False):
    limits.check(q, k, v, softmax_scale, causal, on_device=False)
    batch, seqlen_q, heads, _ = q.shape
    return torch.empty_like(q), q.new_empty((batch, heads, seqlen_q), dtype=torch.float32)


def _backward_reference(dout, q, k, v, out, lse, softmax_scale=None, causal=False, needs=ALL):
    limits.check_backward(dout, q, k, v, out, lse, softmax_scale, causal)
    if q.dtype == torch.float64:
        # A float32 lse is too coarse for these gradients. Where it is forward's, it is known exactly.
        _, exact = attention_reference(q, k, v, softmax_scale, causal)
        lse = torch.where(exact.float() == lse, exact, lse)
    with torch.autocast(q.device.type, enabled=False):  # it would compute the products in low precision
        gradients = attention_reference_backward(dout, q, k, v, out, lse, softmax_scale, causal)
    results = _empty_gradients(q, k, v, needs)
    for result, gradient, needed in zip(results, gradients, needs, strict=True):
        if needed:
            result.copy_(gradient)
    return results


def _backward_fake(dout, q, k, v, out, lse, softmax_scale=None, causal=False, needs=ALL):
    limits.check_backward(dout, q, k, v, out, lse, softmax_scale, causal, on_device=False)
    return _empty_gradients(q, k, v, needs)


def _empty_gradients(q, k, v, needs):
    """A gradient that is not needed has no elements: an operator returns tensors, never None."""
    pairs = zip((q, k, v), needs, strict=True)
    return tuple(torch.empty_like(x) if needed else x.new_empty((0, 0, 0, 0)) for x, needed in pairs)


# CompositeExplicitAutograd stands for every device without a kernel of its own: the CPU, and CUDA where the package was
# built without its kernels, which limits.check then refuses.
_library.impl("forward", _forward_reference, "CompositeExplicitAutograd")
_library.impl("backward", _backward_reference, "CompositeExplicitAutograd")
library.register_fake("flash_attn_ext::forward", _forward_fake, lib=_library)
library.register_fake("flash_attn_ext::backward", _backward_fake, lib=_library)


# Autograd -------------------------------------------------------------------------------------------------------------


def _save(ctx, inputs, output):
    q, k, v, ctx.softmax_scale, ctx.causal = inputs
    out, lse = output
    ctx.save_for_backward(q, k, v, out, lse)
    ctx.mark_non_differentiable(lse)


def _differentiate(ctx, dout, _):
    needs = ctx.needs_input_grad[:3]
    gradients = backward(dout, *ctx.saved_tensors, ctx.softmax_scale, ctx.causal, needs)
    return *(x if needed else None for x, needed in zip(gradients, needs, strict=True)), None, None


def _refuse_second_derivative(ctx, *_):
    raise RuntimeError(limits.NO_SECOND_DERIVATIVE)


if _C is None:  # else it is registered by csrc/bindings.cpp, and the same
    library.register_autograd("flash_attn_ext::forward", _differentiate, setup_context=_save, lib=_library)
# Without it a second derivative would vanish silently.
library.register_autograd("flash_attn_ext::backward", _refuse_second_derivative, lib=_library)


# Autocast -------------------------------------------------------------------------------------------------------------


def _autocast_kernel(device_type: str, key: torch._C.DispatchKey):
    def kernel(q, k, v, softmax_scale=None, causal=False):
        dtype = torch.get_autocast_dtype(device_type)
        casts = (t.to(dtype) if t.dtype in limits.AUTOCAST_DTYPES else t for t in (q, k, v))
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key)):
            return forward(*casts, softmax_scale, causal)

    return kernel


for _device_type, _key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
    _library.impl("forward", _autocast_kernel(_device_type, getattr(torch._C.DispatchKey, _key)), _key)
