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
    batch, seqlen_q, heads, head_dim = q.shape
    seqlen_k, kv_heads = k.shape[1:3]
    if compute_dtype is None:
        compute_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    scale = head_dim**-0.5 if softmax_scale is None else softmax_scale

    # A group of query heads shares its key and value head as an extra dimension, so that nothing is repeated.
    grouped_q = q.to(compute_dtype).unflatten(2, (kv_heads, heads // kv_heads))
    scores = torch.einsum("bqhgd,bkhd->bhgqk", grouped_q, k.to(compute_dtype) * scale)
    if causal:
        query, key = torch.arange(seqlen_q, device=q.device), torch.arange(seqlen_k, device=q.device)
        scores = scores.masked_fill(key > query[:, None] + (seqlen_k - seqlen_q), -torch.inf)

    # softmax and logsumexp of a row of -inf would be NaN, and so would their gradients.
    sees_nothing = (scores == -torch.inf).all(-1, keepdim=True)
    scores = scores.masked_fill(sees_nothing, 0)
    probabilities = scores.softmax(-1).masked_fill(sees_nothing, 0)
    lse = scores.logsumexp(-1).masked_fill(sees_nothing.squeeze(-1), -torch.inf)

    out = torch.einsum("bhgqk,bkhd->bqhgd", probabilities, v.to(compute_dtype))
    lse_dtype = torch.float64 if compute_dtype == torch.float64 else torch.float32
    return out.flatten(2, 3).to(q.dtype), lse.flatten(1, 2).to(lse_dtype)
