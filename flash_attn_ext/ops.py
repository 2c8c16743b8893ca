"""The registered operator torch.ops.flash_attn_ext.forward, with which torch.compile, torch.export, selective
checkpointing, FakeTensor, autocast and tensor subclasses see an attention call.

Its schema and its kernels for CPU, fake tensors, autograd and autocast are here. The CUDA kernel is registered by
csrc/bindings.cpp, where the package was built with it.
"""

import torch

from . import limits
from .reference import attention_reference

_library = torch.library.Library("flash_attn_ext", "DEF")
_library.define(
    "forward(Tensor q, Tensor k, Tensor v, float? softmax_scale=None, bool causal=False) -> (Tensor out, Tensor lse)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
forward = torch.ops.flash_attn_ext.forward.default


def _forward_reference(q, k, v, softmax_scale=None, causal=False):
    limits.check(q, k, v, softmax_scale, causal)
    out, lse = attention_reference(q, k, v, softmax_scale, causal)
    return torch.empty_like(q).copy_(out), lse.to(torch.float32, memory_format=torch.contiguous_format)


def _forward_fake(q, k, v, softmax_scale=None, causal=False):
    limits.check(q, k, v, softmax_scale, causal, on_device=False)
    batch, seqlen_q, heads, _ = q.shape
    return torch.empty_like(q), q.new_empty((batch, heads, seqlen_q), dtype=torch.float32)


def _setup_context(ctx, inputs, output):
    q, k, v, ctx.softmax_scale, ctx.causal = inputs
    limits.check_gradient(q, k, v)
    ctx.save_for_backward(q, k, v)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, dout, dlse):
    # once_differentiable refuses a second derivative only where dout requires grad, and would let that of out.sum()
    # vanish silently.
    if torch.is_grad_enabled() and not dout.requires_grad:
        dout = dout.detach().requires_grad_()
    return _backward_reference(ctx, dout, dlse)


@torch.autograd.function.once_differentiable
def _backward_reference(ctx, dout, _):
    needed = ctx.needs_input_grad[:3]
    inputs = [tensor.detach().requires_grad_(need) for tensor, need in zip(ctx.saved_tensors, needed, strict=True)]
    with torch.enable_grad():
        out, _ = attention_reference(*inputs, ctx.softmax_scale, ctx.causal)
    wanted = [tensor for tensor in inputs if tensor.requires_grad]
    gradients = iter(torch.autograd.grad(out, wanted, dout))
    return *(next(gradients) if need else None for need in needed), None, None


def _autocast_kernel(device_type: str, key: torch._C.DispatchKey):
    def kernel(q, k, v, softmax_scale=None, causal=False):
        dtype = torch.get_autocast_dtype(device_type)
        casts = (t.to(dtype) if t.dtype in limits.AUTOCAST_DTYPES else t for t in (q, k, v))
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key)):
            return forward(*casts, softmax_scale, causal)

    return kernel


# CompositeExplicitAutograd stands for every device without a kernel of its own: the CPU, and CUDA where the package was
# built without its kernels, which limits.check then refuses.
_library.impl("forward", _forward_reference, "CompositeExplicitAutograd")
torch.library.register_fake("flash_attn_ext::forward", _forward_fake, lib=_library)
torch.library.register_autograd("flash_attn_ext::forward", _backward, setup_context=_setup_context, lib=_library)
for _device_type, _key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
    _library.impl("forward", _autocast_kernel(_device_type, getattr(torch._C.DispatchKey, _key)), _key)
