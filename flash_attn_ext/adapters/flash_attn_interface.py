"""The public functions of FlashAttention-3's module flash_attn_interface, on top of this package's.

Names, order and defaults of the arguments are FlashAttention-3's. What the arguments mean, which values pass and the
words for the others are in interface.py and keywords.py. What is not here is in docs/adapters.md.
"""

import torch

import flash_attn_ext


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
):
    """`flash_attn_ext.flash_attn_func`; returns out, or (out, lse) if return_attn_probs."""
    return flash_attn_ext.flash_attn_func(
        q,
        k,
        v,
        softmax_scale,
        causal,
        window_size=window_size,
        softcap=softcap,
        deterministic=deterministic,
        qv=qv,
        q_descale=q_descale,
        k_descale=k_descale,
        v_descale=v_descale,
        attention_chunk=attention_chunk,
        num_splits=num_splits,
        pack_gqa=pack_gqa,
        sm_margin=sm_margin,
        return_attn_probs=return_attn_probs,
    )


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
):
    """`flash_attn_ext.flash_attn_varlen_func`; returns out, or (out, lse) if return_attn_probs."""
    return flash_attn_ext.flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        seqused_q=seqused_q,
        seqused_k=seqused_k,
        softmax_scale=softmax_scale,
        causal=causal,
        window_size=window_size,
        softcap=softcap,
        deterministic=deterministic,
        qv=qv,
        q_descale=q_descale,
        k_descale=k_descale,
        v_descale=v_descale,
        attention_chunk=attention_chunk,
        num_splits=num_splits,
        pack_gqa=pack_gqa,
        sm_margin=sm_margin,
        return_attn_probs=return_attn_probs,
    )


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
):
    """`flash_attn_ext.flash_attn_qkvpacked_func`; returns out, or (out, lse) if return_attn_probs."""
    return flash_attn_ext.flash_attn_qkvpacked_func(
        qkv,
        softmax_scale,
        causal,
        num_heads_q=num_heads_q,
        window_size=window_size,
        softcap=softcap,
        deterministic=deterministic,
        q_descale=q_descale,
        k_descale=k_descale,
        v_descale=v_descale,
        attention_chunk=attention_chunk,
        sm_margin=sm_margin,
        return_attn_probs=return_attn_probs,
    )


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
