"""The peers of a comparison: a name -> a function that binds (q, k, v, dout, pattern) to a call without arguments, for
each pass.

A call returns out, or dq, dk and dv. The forward that a backward needs is done while binding.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path

import torch
import torch.nn.functional as F
from screen import reason, say
from tables import OURS, PEER_NAMES
from torch.nn.attention import SDPBackend, sdpa_kernel

Call = Callable[[], tuple[torch.Tensor, ...]]


@dataclass(frozen=True)
class Pattern:
    """Which keys a query sees. q, k and v are (batch, seqlen, heads, head_dim), packed (total, heads, head_dim)."""

    causal: bool
    window: int | None = None  # so many keys, the query's own the last of them: causal patterns only
    cu_seqlens: torch.Tensor | None = None  # (sequences + 1,), int32: q, k and v are packed
    max_seqlen: int | None = None
    is_even: bool = False  # all packed sequences are of one length

    @classmethod
    def packed(
        cls,
        lengths: Sequence[int],
        window: int | None = None,
        device: torch.device | str = "cuda",
        causal: bool = True,
    ) -> Pattern:
        """Sequences of these lengths."""
        cu_seqlens = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
        return cls(causal, window, cu_seqlens, max(lengths), len(set(lengths)) == 1)

    @property
    def window_size(self) -> tuple[int, int]:
        """As our function and FA3's have it: how many keys before the query's own, and after it; -1: all."""
        return (-1, -1) if self.window is None else (self.window - 1, 0)


def autograd_binders(attend: Callable, learned: Callable = lambda q: ()) -> dict[str, Callable[..., Call]]:
    """Both passes of a differentiable function attend(pattern, q, k, v, *learned) -> (out, ...).

    learned: makes the inputs beside q, k and v that a model would train, from q. Their gradients are computed too.
    What attend returns beside out has a gradient of 0: the work is done, and the results are those of everyone.
    """

    def bind(q, k, v, dout, pattern: Pattern) -> Call:
        call = partial(attend, pattern, q, k, v, *learned(q))
        return lambda: call()[:1]

    def bind_backward(q, k, v, dout, pattern: Pattern) -> Call:
        inputs = [x.detach().requires_grad_() for x in (q, k, v, *learned(q))]
        with torch.enable_grad():
            results = attend(pattern, *inputs)
        gradients = [dout, *map(torch.zeros_like, results[1:])]
        return lambda: torch.autograd.grad(results, inputs, gradients, retain_graph=True)[:3]

    return {"forward": bind, "backward": bind_backward}


# ---- ours ----


def our_options(pattern: Pattern) -> dict:
    options = {"causal": pattern.causal, "window_size": pattern.window_size}
    if pattern.cu_seqlens is not None:
        options |= {"cu_seqlens_q": pattern.cu_seqlens, "cu_seqlens_k": pattern.cu_seqlens}
    return options


def attend_ours(pattern: Pattern, q, k, v, sinks=None, return_lse: bool = False) -> tuple[torch.Tensor, ...]:
    from flash_attn_ext import flash_attn_func, flash_attn_varlen_func

    attend = flash_attn_func if pattern.cu_seqlens is None else flash_attn_varlen_func
    results = attend(q, k, v, **our_options(pattern), sinks=sinks, return_lse=return_lse)
    return results if return_lse else (results,)


def bind_ours_backward(q, k, v, dout, pattern: Pattern, **asked) -> Call:
    from flash_attn_ext import backward, forward

    options = our_options(pattern) | asked
    out, lse = forward(q, k, v, **options)
    return partial(backward, dout, q, k, v, out, lse, **options)


def weightless_sinks(q) -> tuple[torch.Tensor]:
    """Sinks that change no result, so that they are judged like everyone; no work is saved by that."""
    return (torch.full(q.shape[-2:-1], -1e4, device=q.device, dtype=q.dtype),)


# ---- FlashAttention-3 ----


def fa3_options(pattern: Pattern) -> dict:
    left, right = pattern.window_size
    options = {"is_causal": pattern.causal, "window_size_left": left, "window_size_right": right}
    if pattern.cu_seqlens is not None:
        options |= {"cu_seqlens_q": pattern.cu_seqlens, "cu_seqlens_k": pattern.cu_seqlens}
        options |= {"max_seqlen_q": pattern.max_seqlen, "max_seqlen_k": pattern.max_seqlen}
    return options


def fa3_forward(q, k, v, pattern: Pattern) -> Callable:
    # One split is what FA3's own function for packed sequences asks for; its operator would choose as for decoding.
    splits = {} if pattern.cu_seqlens is None else {"num_splits": 1}
    return partial(torch.ops.flash_attn_3.fwd, q, k, v, **fa3_options(pattern), **splits)


def bind_fa3(q, k, v, dout, pattern: Pattern) -> Call:
    forward = fa3_forward(q, k, v, pattern)
    return lambda: forward()[:1]


def bind_fa3_backward(q, k, v, dout, pattern: Pattern, **asked) -> Call:
    out, lse, *_ = fa3_forward(q, k, v, pattern)()
    gradients = tuple(torch.empty_like(x) for x in (q, k, v))
    options = fa3_options(pattern) | asked
    backward = partial(torch.ops.flash_attn_3.bwd, dout, q, k, v, out, lse, *gradients, **options)

    def call():
        backward()
        return gradients

    return call


# ---- torch ----


def attend_torch(backend: SDPBackend, pattern: Pattern, q, k, v) -> tuple[torch.Tensor]:
    """torch's attention, whose order is (batch, heads, seqlen, head_dim): it gets transposed views. Packed sequences of
    one length are the same work as a dense batch of them."""
    if pattern.cu_seqlens is not None or pattern.window is not None:
        if backend == SDPBackend.FLASH_ATTENTION:
            return (attend_varlen(pattern, q, k, v),)
        if pattern.window is not None or not pattern.is_even:
            raise NotImplementedError("scaled_dot_product_attention has neither windows nor packed sequences")
        dense = (x.unflatten(0, (-1, pattern.max_seqlen)) for x in (q, k, v))
        (out,) = attend_torch(backend, Pattern(pattern.causal), *dense)
        return (out.flatten(0, 1),)
    with sdpa_kernel(backend):
        grouped = q.shape[2] != k.shape[2]
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=pattern.causal, enable_gqa=grouped)
    return (out.transpose(1, 2),)


def attend_varlen(pattern: Pattern, q, k, v) -> torch.Tensor:
    """torch's FlashAttention-2 through its function for packed sequences, which has windows since torch 2.11."""
    from torch.nn.attention.varlen import varlen_attn

    if pattern.cu_seqlens is None:
        packed = Pattern.packed((q.shape[1],) * q.shape[0], pattern.window, q.device)
        return attend_varlen(packed, *(x.flatten(0, 1) for x in (q, k, v))).view_as(q)
    window_size = (pattern.window_size[0], 0 if pattern.causal else -1)  # it has no other word for causal
    cu_seqlens, longest = pattern.cu_seqlens, pattern.max_seqlen
    return varlen_attn(q, k, v, cu_seqlens, cu_seqlens, longest, longest, window_size=window_size)


PLAIN = autograd_binders(attend_ours)
BINDERS = {
    "ours": {"forward": PLAIN["forward"], "backward": bind_ours_backward},
    "plain": PLAIN,
    "dlse": autograd_binders(partial(attend_ours, return_lse=True)),
    "sinks": autograd_binders(attend_ours, weightless_sinks),
    "ours_deterministic": {"forward": PLAIN["forward"], "backward": partial(bind_ours_backward, deterministic=True)},
    "fa3": {"forward": bind_fa3, "backward": bind_fa3_backward},
    "fa3_deterministic": {"forward": bind_fa3, "backward": partial(bind_fa3_backward, deterministic=True)},
    "cudnn": autograd_binders(partial(attend_torch, SDPBackend.CUDNN_ATTENTION)),
    "fa2": autograd_binders(partial(attend_torch, SDPBackend.FLASH_ATTENTION)),
}
assert list(BINDERS) == list(PEER_NAMES)


def load_fa3(library: Path | None) -> None:
    """Registers torch.ops.flash_attn_3, from a library file or else from the installed package."""
    if library is None:
        import flash_attn_interface  # noqa: F401

        torch.ops.flash_attn_3.fwd  # noqa: B018 (tools/shim has the module's names, and no operators)
        return
    for runtime in library.resolve().parent.glob("libcudart.so.*"):  # one beside the library is the one it links
        ctypes.CDLL(str(runtime))
    torch.ops.load_library(str(library.resolve()))


def usable_peers(names: list[str], library: Path | None) -> list[str]:
    """The named peers that are installed; says why the others are not."""
    usable = []
    for name in names:
        try:
            if name in OURS:
                from flash_attn_ext.limits import why_unavailable

                if why := why_unavailable():
                    raise RuntimeError(why)
            elif name in ("fa3", "fa3_deterministic"):
                load_fa3(library)
            usable.append(name)
        except Exception as error:  # whatever an import may raise: the other peers still run
            say(f"{name} is left out: {reason(error)}")
    return usable
