"""Attention in plain PyTorch, with every score in memory: what the tests measure the kernels against, and what the CPU
path is made of. What the functions take and return: `attention_reference` and `attention_reference_backward`.
"""

from functools import partial

import torch

from . import packed
from .options import UNBOUNDED, Options


def visible(
    rows: int, keys: int, options: Options, device: torch.device | str = "cpu", diagonal: int | None = None
) -> torch.Tensor | None:
    """(rows, keys): whether the row's query sees the key; None: no option masks. The one place for masks in Python.

    diagonal: the key at which row 0 stands. Default: keys - rows, so that the last row stands at the last key.
    """
    left, right = options.window
    if (left, right) == (UNBOUNDED, UNBOUNDED):
        return None
    place = torch.arange(rows, device=device)[:, None] + (keys - rows if diagonal is None else diagonal)
    key = torch.arange(keys, device=device)
    seen = torch.ones((rows, keys), dtype=torch.bool, device=device)
    if left != UNBOUNDED:
        seen &= key - place >= -left
    if right != UNBOUNDED:
        seen &= key - place <= right
    return seen


def forward(q, k, v, options: Options, compute_dtype: torch.dtype | None = None, diagonal: int | None = None):
    if options.has_lengths():
        return packed.forward(partial(forward, compute_dtype=compute_dtype), q, k, v, options)
    compute_dtype = compute_dtype or _default_dtype(q)
    scores, _ = scores_and_slopes(q.to(compute_dtype), k.to(compute_dtype), options, diagonal)
    if options.sinks is not None:  # as the score of one more key, which has no value
        sinks = _by_kv_head(options.sinks.to(compute_dtype), k, 0)[..., None, None]
        scores = torch.cat([scores, sinks.expand(*scores.shape[:-1], 1)], -1)

    # softmax and logsumexp of a row of -inf would be NaN, and so would their gradients.
    sees_nothing = (scores == -torch.inf).all(-1, keepdim=True)
    scores = scores.masked_fill(sees_nothing, 0)
    probabilities = scores.softmax(-1).masked_fill(sees_nothing, 0)
    lse = scores.logsumexp(-1).masked_fill(sees_nothing.squeeze(-1), -torch.inf)

    out = torch.einsum("bhgqk,bkhd->bqhgd", probabilities[..., : k.shape[1]], v.to(compute_dtype))
    lse_dtype = torch.float64 if compute_dtype == torch.float64 else torch.float32
    return out.flatten(2, 3).to(q.dtype), lse.flatten(1, 2).to(lse_dtype)


def backward(dout, q, k, v, out, lse, options: Options, dlse=None, diagonal: int | None = None):
    if options.has_lengths():
        return packed.backward(backward, dout, q, k, v, out, lse, options, dlse)
    dtypes, compute_dtype = (q.dtype, k.dtype, v.dtype), _default_dtype(q)
    dout, q, k, v, out, lse = (x.to(compute_dtype) for x in (dout, q, k, v, out, lse))
    q_groups, dout_groups, out_groups = (_by_kv_head(x, k, 2) for x in (q, dout, out))
    lse = _by_kv_head(lse, k, 1).unsqueeze(-1)
    saw_nothing = lse == -torch.inf

    scores, slopes = scores_and_slopes(q, k, options, diagonal)
    probabilities = (scores - lse).exp().masked_fill(saw_nothing, 0)
    dprobabilities = torch.einsum("bqhgd,bkhd->bhgqk", dout_groups, v)
    delta = torch.einsum("bqhgd,bqhgd->bhgq", dout_groups, out_groups).unsqueeze(-1)
    if dlse is not None:
        delta = delta - _by_kv_head(dlse.to(compute_dtype), k, 1).unsqueeze(-1).masked_fill(saw_nothing, 0)
    dscores = options.scale(q.shape[-1]) * slopes * probabilities * (dprobabilities - delta)

    dq = torch.einsum("bhgqk,bkhd->bqhgd", dscores, k).flatten(2, 3)
    dk = torch.einsum("bhgqk,bqhgd->bkhd", dscores, q_groups)
    dv = torch.einsum("bhgqk,bqhgd->bkhd", probabilities, dout_groups)
    gradients = tuple(gradient.to(dtype) for gradient, dtype in zip((dq, dk, dv), dtypes, strict=True))
    if options.sinks is None:
        return gradients
    sinks = _by_kv_head(options.sinks.to(compute_dtype), k, 0)[..., None, None]
    of_rows = (sinks - lse).exp().mul(delta).masked_fill(saw_nothing, 0)
    return *gradients, -of_rows.sum((0, 3, 4)).flatten().to(options.sinks.dtype)


def _default_dtype(q):
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _by_kv_head(x, k, dim):
    """The query heads in dimension dim as (kv_heads, heads // kv_heads): nothing has to be repeated for a group."""
    kv_heads = k.shape[2]
    return x.unflatten(dim, (kv_heads, x.shape[dim] // kv_heads))


def scores_and_slopes(q, k, options: Options, diagonal: int | None = None):
    """(batch, kv_heads, heads // kv_heads, seqlen_q, seqlen_k), -inf where the mask hides the key; and their derivative
    by what they are without softcap."""
    scores, slopes = torch.einsum("bqhgd,bkhd->bhgqk", _by_kv_head(q, k, 2), k * options.scale(q.shape[-1])), 1
    if options.softcap:
        capped = torch.tanh(scores / options.softcap)
        scores, slopes = options.softcap * capped, 1 - capped.square()
    seen = visible(q.shape[1], k.shape[1], options, q.device, diagonal)
    return scores if seen is None else scores.masked_fill(~seen, -torch.inf), slopes
