"""The peers of a comparison: a name -> a function that binds (q, k, v, dout, causal) to a call without arguments, for
each pass.

A call returns out, or dq, dk and dv. The forward that a backward needs is done while binding.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from screen import reason, say
from tables import PEER_NAMES
from torch.nn.attention import SDPBackend, sdpa_kernel

Call = Callable[[], tuple[torch.Tensor, ...]]


def bind_ours(q, k, v, dout, causal: bool) -> Call:
    from flash_attn_ext import flash_attn_func

    return lambda: (flash_attn_func(q, k, v, causal=causal),)


def bind_ours_backward(q, k, v, dout, causal: bool) -> Call:
    from flash_attn_ext import backward, forward

    out, lse = forward(q, k, v, causal=causal)
    return lambda: backward(dout, q, k, v, out, lse, causal=causal)


def bind_fa3(q, k, v, dout, causal: bool) -> Call:
    forward = torch.ops.flash_attn_3.fwd
    return lambda: (forward(q, k, v, is_causal=causal)[0],)


def bind_fa3_backward(q, k, v, dout, causal: bool) -> Call:
    out, lse, *_ = torch.ops.flash_attn_3.fwd(q, k, v, is_causal=causal)
    gradients = tuple(torch.empty_like(x) for x in (q, k, v))
    backward = torch.ops.flash_attn_3.bwd

    def call():
        backward(dout, q, k, v, out, lse, *gradients, is_causal=causal)
        return gradients

    return call


def sdpa_binders(backend: SDPBackend) -> dict[str, Callable[..., Call]]:
    """torch's attention, whose order is (batch, heads, seqlen, head_dim): it gets transposed views."""

    def attend(q, k, v, causal: bool) -> torch.Tensor:
        with sdpa_kernel(backend):
            grouped = q.shape[1] != k.shape[1]
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=grouped)

    def bind(q, k, v, dout, causal: bool) -> Call:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return lambda: (attend(q, k, v, causal).transpose(1, 2),)

    def bind_backward(q, k, v, dout, causal: bool) -> Call:
        inputs = [x.transpose(1, 2).requires_grad_() for x in (q, k, v)]
        dout = dout.transpose(1, 2)
        with torch.enable_grad():
            out = attend(*inputs, causal)
        gradients = partial(torch.autograd.grad, out, inputs, dout, retain_graph=True)
        return lambda: tuple(x.transpose(1, 2) for x in gradients())

    return {"forward": bind, "backward": bind_backward}


BINDERS = {
    "ours": {"forward": bind_ours, "backward": bind_ours_backward},
    "fa3": {"forward": bind_fa3, "backward": bind_fa3_backward},
    "cudnn": sdpa_binders(SDPBackend.CUDNN_ATTENTION),
    "fa2": sdpa_binders(SDPBackend.FLASH_ATTENTION),
}
assert list(BINDERS) == list(PEER_NAMES)


def load_fa3(library: Path | None) -> None:
    """Registers torch.ops.flash_attn_3, from a library file or else from the installed package."""
    if library is None:
        import flash_attn_interface  # noqa: F401

        return
    for runtime in library.resolve().parent.glob("libcudart.so.*"):  # one beside the library is the one it links
        ctypes.CDLL(str(runtime))
    torch.ops.load_library(str(library.resolve()))


def usable_peers(names: list[str], library: Path | None) -> list[str]:
    """The named peers that are installed; says why the others are not."""
    usable = []
    for name in names:
        try:
            if name == "ours":
                from flash_attn_ext.limits import why_unavailable

                if why := why_unavailable():
                    raise RuntimeError(why)
            elif name == "fa3":
                load_fa3(library)
            usable.append(name)
        except Exception as error:  # whatever an import may raise: the other peers still run
            say(f"{name} is left out: {reason(error)}")
    return usable
