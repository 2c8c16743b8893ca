"""Attention in plain PyTorch, with every score in memory: what the tests measure the kernels against, and what the CPU
path is made of. What the functions take and return: `attention_reference` and `attention_reference_backward`.
"""

import torch

from .options import Options


def visible(rows: int, keys: int, options: Options, device: torch.device | str = "cpu") -> torch.Tensor | None:
    """(rows, keys): whether the row's query sees the key; None: no option masks. The one place for masks in Python."""
    if not options.causal:
        return None
    diagonal = torch.arange(rows, device=device)[:, None] + (keys - rows)  # the last row's ends at the last key
    return torch.arange(keys, device=device) <= diagonal


def forward(q, k, v, options: Options, compute_dtype: torch.dtype | None = None):
    compute_dtype = compute_dtype or _default_dtype(q)
    scores = _scores(q.to(compute_dtype), k.to(compute_dtype), options)

    # softmax and logsumexp of a row of -inf would be NaN, and so would their gradients.
    sees_nothing = (scores == -torch.inf).all(-1, keepdim=True)
    scores = scores.masked_fill(sees_nothing, 0)
    probabilities = scores.softmax(-1).masked_fill(sees_nothing, 0)
    lse = scores.logsumexp(-1).masked_fill(sees_nothing.squeeze(-1), -torch.inf)

    out = torch.einsum("bhgqk,bkhd->bqhgd", probabilities, v.to(compute_dtype))
    lse_dtype = torch.float64 if compute_dtype == torch.float64 else torch.float32
    return out.flatten(2, 3).to(q.dtype), lse.flatten(1, 2).to(lse_dtype)


def backward(dout, q, k, v, out, lse, options: Options):
    dtypes, compute_dtype = (q.dtype, k.dtype, v.dtype), _default_dtype(q)
    dout, q, k, v, out, lse = (x.to(compute_dtype) for x in (dout, q, k, v, out, lse))
    q_groups, dout_groups, out_groups = (_by_kv_head(x, k, 2) for x in (q, dout, out))
    lse = _by_kv_head(lse, k, 1).unsqueeze(-1)

    probabilities = (_scores(q, k, options) - lse).exp().masked_fill(lse == -torch.inf, 0)
    dprobabilities = torch.einsum("bqhgd,bkhd->bhgqk", dout_groups, v)
    delta = torch.einsum("bqhgd,bqhgd->bhgq", dout_groups, out_groups).unsqueeze(-1)
    dscores = options.scale(q.shape[-1]) * probabilities * (dprobabilities - delta)

    dq = torch.einsum("bhgqk,bkhd->bqhgd", dscores, k).flatten(2, 3)
    dk = torch.einsum("bhgqk,bqhgd->bkhd", dscores, q_groups)
    dv = torch.einsum("bhgqk,bqhgd->bkhd", probabilities, dout_groups)
    return tuple(gradient.to(dtype) for gradient, dtype in zip((dq, dk, dv), dtypes, strict=True))


def _default_dtype(q):
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _by_kv_head(x, k, dim):
    """The query heads in dimension dim as (kv_heads, heads // kv_heads): nothing has to be repeated for a group."""
    kv_heads = k.shape[2]
    return x.unflatten(dim, (kv_heads, x.shape[dim] // kv_heads))


def _scores(q, k, options):
    """(batch, kv_heads, heads // kv_heads, seqlen_q, seqlen_k); -inf where the mask hides the key."""
    scores = torch.einsum("bqhgd,bkhd->bhgqk", _by_kv_head(q, k, 2), k * options.scale(q.shape[-1]))
    seen = visible(q.shape[1], k.shape[1], options, q.device)
    return scores if seen is None else scores.masked_fill(~seen, -torch.inf)
