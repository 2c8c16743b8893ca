"""FlashAttention-3's module flash_attn_interface, on top of this package's public functions.

Names, order and defaults of the arguments are FlashAttention-3's; s_aux is an argument more, by name, for attention
sinks: vLLM's build of FlashAttention-3 has it, and transformers passes it where a function does. What the arguments
mean, which values pass and the words for the others are in interface.py and keywords.py. What is not here is in
docs/adapters.md.
"""

import functools
import inspect

import torch

import flash_attn_ext

__all__ = [
    "_flash_attn_backward",
    "_flash_attn_forward",
    "flash_attn_combine",
    "flash_attn_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_with_kvcache",
    "get_scheduler_metadata",
]


def _calls(ours):
    """Decorates the signature of a function of theirs: what is passed goes to ours, all by name."""

    def decorate(signature):
        parameters = inspect.signature(signature).parameters.values()
        names = [x.name for x in parameters if x.kind is not inspect.Parameter.KEYWORD_ONLY]

        @functools.wraps(signature)
        def call(*by_position, s_aux=None, **by_name):
            if len(by_position) > len(names):
                count = len(by_position)
                raise TypeError(f"{signature.__name__} takes {len(names)} arguments by position; {count} are given.")
            return ours(**dict(zip(names, by_position, strict=False)), sinks=s_aux, **by_name)

        return call

    return decorate


@_calls(flash_attn_ext.flash_attn_func)
def flash_attn_func(
    q,
    k,
    v,
    softmax_scale=None,
    causal=False,
    qv=None,
    q_descale=None,
    k_descale=None,
    v_descale=None,
    window_size=(-1, -1),
    attention_chunk=0,
    softcap=0.0,
    num_splits=1,
    pack_gqa=None,
    deterministic=False,
    sm_margin=0,
    return_attn_probs=False,
    *,
    s_aux=None,
):
    """`flash_attn_ext.flash_attn_func`; returns out, or (out, lse) if return_attn_probs. s_aux: its sinks."""


@_calls(flash_attn_ext.flash_attn_varlen_func)
def flash_attn_varlen_func(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    seqused_q=None,
    seqused_k=None,
    softmax_scale=None,
    causal=False,
    qv=None,
    q_descale=None,
    k_descale=None,
    v_descale=None,
    window_size=(-1, -1),
    attention_chunk=0,
    softcap=0.0,
    num_splits=1,
    pack_gqa=None,
    deterministic=False,
    sm_margin=0,
    return_attn_probs=False,
    *,
    s_aux=None,
):
    """`flash_attn_ext.flash_attn_varlen_func`; returns out, or (out, lse) if return_attn_probs. s_aux: its sinks."""


@_calls(flash_attn_ext.flash_attn_qkvpacked_func)
def flash_attn_qkvpacked_func(
    qkv,
    softmax_scale=None,
    causal=False,
    q_descale=None,
    k_descale=None,
    v_descale=None,
    window_size=(-1, -1),
    attention_chunk=0,
    softcap=0.0,
    deterministic=False,
    num_heads_q=None,
    sm_margin=0,
    return_attn_probs=False,
    *,
    s_aux=None,
):
    """`flash_attn_ext.flash_attn_qkvpacked_func`; returns out, or (out, lse) if return_attn_probs. s_aux: its sinks."""


# The kernels, for code that differentiates or merges results by itself ------------------------------------------------


def _flash_attn_forward(
    q,
    k,
    v,
    k_new=None,
    v_new=None,
    qv=None,
    out_=None,
    cu_seqlens_q=None,
    cu_seqlens_k=None,
    cu_seqlens_k_new=None,
    seqused_q=None,
    seqused_k=None,
    max_seqlen_q=None,
    max_seqlen_k=None,
    page_table=None,
    kv_batch_idx=None,
    leftpad_k=None,
    rotary_cos=None,
    rotary_sin=None,
    seqlens_rotary=None,
    q_descale=None,
    k_descale=None,
    v_descale=None,
    softmax_scale=None,
    causal=False,
    window_size_left=-1,
    window_size_right=-1,
    attention_chunk=0,
    softcap=0.0,
    rotary_interleaved=True,
    scheduler_metadata=None,
    num_splits=1,
    pack_gqa=None,
    sm_margin=0,
):
    """`flash_attn_ext.forward`: returns (out, lse, none, none). none has no elements: no call here splits the keys of a
    row and leaves partial results."""
    out, lse = flash_attn_ext.flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        seqused_q=seqused_q,
        seqused_k=seqused_k,
        softmax_scale=softmax_scale,
        causal=causal,
        window_size=(window_size_left, window_size_right),
        softcap=softcap,
        return_lse=True,
        k_new=k_new,
        v_new=v_new,
        qv=qv,
        out_=out_,
        cu_seqlens_k_new=cu_seqlens_k_new,
        page_table=page_table,
        kv_batch_idx=kv_batch_idx,
        leftpad_k=leftpad_k,
        rotary_cos=rotary_cos,
        rotary_sin=rotary_sin,
        seqlens_rotary=seqlens_rotary,
        q_descale=q_descale,
        k_descale=k_descale,
        v_descale=v_descale,
        attention_chunk=attention_chunk,
        rotary_interleaved=rotary_interleaved,
        scheduler_metadata=scheduler_metadata,
        num_splits=num_splits,
        pack_gqa=pack_gqa,
        sm_margin=sm_margin,
    )
    none = lse.new_empty(0)
    return out, lse, none, none


def _flash_attn_backward(
    dout,
    q,
    k,
    v,
    out,
    softmax_lse,
    cu_seqlens_q=None,
    cu_seqlens_k=None,
    sequed_q=None,
    sequed_k=None,
    max_seqlen_q=None,
    max_seqlen_k=None,
    dq=None,
    dk=None,
    dv=None,
    softmax_scale=None,
    is_causal=False,
    window_size_left=-1,
    window_size_right=-1,
    softcap=0.0,
    deterministic=False,
    sm_margin=0,
):
    """`flash_attn_ext.backward`, copied into dq, dk and dv as far as they are given: shapes, dtypes and devices of q, k
    and v, any strides. Returns a tensor without elements in the place of softmax_d, FlashAttention-3's workspace.

    Raises:
        ValueError: dq, dk or dv do not fit. Others as `flash_attn_ext.backward`.
    """
    given = {"dq": (dq, q), "dk": (dk, k), "dv": (dv, v)}
    for name, (gradient, x) in given.items():
        if gradient is not None and not _alike(gradient, x):
            raise ValueError(f"{name} is {_shown(gradient)}; it must be as {name[1]}, {_shown(x)}, or None.")
    gradients = flash_attn_ext.backward(
        dout,
        q,
        k,
        v,
        out,
        softmax_lse,
        softmax_scale,
        is_causal,
        window_size=(window_size_left, window_size_right),
        softcap=softcap,
        deterministic=deterministic,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        seqused_q=sequed_q,
        seqused_k=sequed_k,
    )
    for (into, _), gradient in zip(given.values(), gradients, strict=True):
        if into is not None:
            into.copy_(gradient)
    return softmax_lse.new_empty(0)


def _alike(x, y):
    return (x.shape, x.dtype, x.device) == (y.shape, y.dtype, y.device)


def _shown(x):
    return f"{tuple(x.shape)} {x.dtype} on {x.device}"


# Refused --------------------------------------------------------------------------------------------------------------


def flash_attn_with_kvcache(
    q,
    k_cache,
    v_cache,
    k=None,
    v=None,
    qv=None,
    rotary_cos=None,
    rotary_sin=None,
    cache_seqlens=None,
    cache_batch_idx=None,
    cache_leftpad=None,
    page_table=None,
    cu_seqlens_q=None,
    cu_seqlens_k_new=None,
    max_seqlen_q=None,
    rotary_seqlens=None,
    q_descale=None,
    k_descale=None,
    v_descale=None,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    attention_chunk=0,
    softcap=0.0,
    rotary_interleaved=True,
    scheduler_metadata=None,
    num_splits=0,
    pack_gqa=None,
    sm_margin=0,
    return_softmax_lse=False,
):
    """Raises NotImplementedError, with what to use instead."""
    raise NotImplementedError(
        "flash_attn_with_kvcache is not there: no call here appends to a KV cache, rotates keys or reads pages. Ways "
        "out: FlashAttention-3; or, for a cache that is one tensor and holds the new keys already, "
        "flash_attn_varlen_func(q, k_cache, v_cache, None, None, None, None, seqused_k=cache_seqlens, causal=True)."
    )


def flash_attn_combine(out_partial, lse_partial, out=None, out_dtype=None):
    """Raises NotImplementedError, with what to use instead."""
    raise NotImplementedError(
        "flash_attn_combine is not there: no call here splits the keys of a row and leaves partial results. Ways out: "
        "FlashAttention-3; or, for the same results, torch.logsumexp(lse_partial, 0) and "
        "(torch.softmax(lse_partial, 0).unsqueeze(-1) * out_partial).sum(0), which are (lse, out) of all keys."
    )


def get_scheduler_metadata(
    batch_size,
    max_seqlen_q,
    max_seqlen_k,
    num_heads_q,
    num_heads_kv,
    headdim,
    cache_seqlens,
    qkv_dtype=torch.bfloat16,
    headdim_v=None,
    cu_seqlens_q=None,
    cu_seqlens_k_new=None,
    cache_leftpad=None,
    page_size=None,
    max_seqlen_k_new=0,
    causal=False,
    window_size=(-1, -1),
    attention_chunk=0,
    has_softcap=False,
    num_splits=0,
    pack_gqa=None,
    sm_margin=0,
):
    """Raises NotImplementedError, with what to use instead."""
    raise NotImplementedError(
        "get_scheduler_metadata is not there: every call here plans its own order of work, and none takes "
        "scheduler_metadata. Ways out: leave it out; or, for flash_attn_with_kvcache, FlashAttention-3."
    )
