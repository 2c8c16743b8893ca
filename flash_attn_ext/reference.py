"""Attention in plain PyTorch: what CPU tensors run on, and what the tests measure the kernels against."""

import torch


def attention_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    *,
    compute_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """softmax(softmax_scale * q k^T) v, with every score in memory (Vaswani et al. 2017, section 3.2.1).

    Args:
        q: (batch, seqlen_q, heads, head_dim).
        k, v: (batch, seqlen_k, kv_heads, head_dim). Query head h uses key and value head h // (heads // kv_heads).
        softmax_scale: factor of the scores, default 1/sqrt(head_dim).
        causal: query i sees key j iff j <= i + seqlen_k - seqlen_q (bottom-right aligned).
        compute_dtype: default float64 for float64 inputs, else float32. The inputs' own low precision gives what plain
            PyTorch attention in that precision would, which is the yardstick for a kernel's error.

    Returns:
        out: like q, in q's dtype. Rows that see no key, or only scores of -inf, are 0.
        lse: (batch, heads, seqlen_q), natural logarithm of the sum of exp(score); float32, or float64 for float64
            inputs or computations. -inf for the rows whose out is 0.

    Both are differentiable; the rows that are 0 contribute no gradient and no NaN.
    """
    compute_dtype = compute_dtype or _default_dtype(q)
    scores = _scores(q.to(compute_dtype), k.to(compute_dtype), _scale(q, softmax_scale), causal)

    # softmax and logsumexp of a row of -inf would be NaN, and so would their gradients.
    sees_nothing = (scores == -torch.inf).all(-1, keepdim=True)
    scores = scores.masked_fill(sees_nothing, 0)
    probabilities = scores.softmax(-1).masked_fill(sees_nothing, 0)
    lse = scores.logsumexp(-1).masked_fill(sees_nothing.squeeze(-1), -torch.inf)

    out = torch.einsum("bhgqk,bkhd->bqhgd", probabilities, v.to(compute_dtype))
    lse_dtype = torch.float64 if compute_dtype == torch.float64 else torch.float32
    return out.flatten(2, 3).to(q.dtype), lse.flatten(1, 2).to(lse_dtype)


def attention_reference_backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of `attention_reference`'s out from out and lse as they are given (FlashAttention-2, Dao 2023,
    section 3.1.2), with every score in memory: given those of a longer sequence of keys, of which k and v are a part,
    dk and dv are this part's gradients, and the dq of all parts add up to q's.

    Args:
        dout, out: like q.
        q, k, v, softmax_scale, causal: as in the forward.
        lse: (batch, heads, seqlen_q), natural logarithm. Rows of -inf saw nothing and contribute nothing.

    Returns:
        dq, dk, dv: shapes and dtypes of q, k and v. Computed in float64 for float64 inputs, else in float32.
    """
    dtypes, compute_dtype, scale = (q.dtype, k.dtype, v.dtype), _default_dtype(q), _scale(q, softmax_scale)
    dout, q, k, v, out, lse = (x.to(compute_dtype) for x in (dout, q, k, v, out, lse))
    q_groups, dout_groups, out_groups = (_by_kv_head(x, k, 2) for x in (q, dout, out))
    lse = _by_kv_head(lse, k, 1).unsqueeze(-1)

    probabilities = (_scores(q, k, scale, causal) - lse).exp().masked_fill(lse == -torch.inf, 0)
    dprobabilities = torch.einsum("bqhgd,bkhd->bhgqk", dout_groups, v)
    delta = torch.einsum("bqhgd,bqhgd->bhgq", dout_groups, out_groups).unsqueeze(-1)
    dscores = scale * probabilities * (dprobabilities - delta)

    dq = torch.einsum("bhgqk,bkhd->bqhgd", dscores, k).flatten(2, 3)
    dk = torch.einsum("bhgqk,bqhgd->bkhd", dscores, q_groups)
    dv = torch.einsum("bhgqk,bqhgd->bkhd", probabilities, dout_groups)
    return tuple(gradient.to(dtype) for gradient, dtype in zip((dq, dk, dv), dtypes, strict=True))


def _default_dtype(q):
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _scale(q, softmax_scale):
    return q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale


def _by_kv_head(x, k, dim):
    """The query heads in dimension dim as (kv_heads, heads // kv_heads): nothing has to be repeated for a group."""
    kv_heads = k.shape[2]
    return x.unflatten(dim, (kv_heads, x.shape[dim] // kv_heads))


def _scores(q, k, scale, causal):
    """(batch, kv_heads, heads // kv_heads, seqlen_q, seqlen_k); -inf where the mask hides the key."""
    scores = torch.einsum("bqhgd,bkhd->bhgqk", _by_kv_head(q, k, 2), k * scale)
    if causal:
        seqlen_q, seqlen_k = q.shape[1], k.shape[1]
        query, key = torch.arange(seqlen_q, device=q.device), torch.arange(seqlen_k, device=q.device)
        scores = scores.masked_fill(key > query[:, None] + (seqlen_k - seqlen_q), -torch.inf)
    return scores
