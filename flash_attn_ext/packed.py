"""Packed sequences, and sequences of which only a part is used, in plain PyTorch: a dense call for each sequence.

The tensors of all sequences are seen as rows here, (rows, heads, head_dim): packed ones are, of dense ones the batches
follow each other. Rows of no sequence, and rows that are not used, have an out of 0, an lse of -inf and gradients of 0.
"""

import itertools

import torch
from torch.nn.functional import pad

from .options import Options


def forward(dense, q, k, v, options: Options) -> tuple[torch.Tensor, torch.Tensor]:
    """dense: a function that takes (q, k, v, options) of sequences of one length, and returns out and lse."""
    rows, keys, values = map(_as_rows, (q, k, v))
    outs, lses, alone = [], [], options.dense()
    for of_q, of_k, after in _sequences(q, k, options):
        out, lse = dense(rows[None, of_q], keys[None, of_k], values[None, of_k], alone)
        outs.append(pad(out[0], (0, 0, 0, 0, 0, after[0])))
        lses.append(pad(lse[0], (0, after[0]), value=-torch.inf))
    return _like(q, outs), _lse_like(q, torch.cat(lses, 1))


def backward(dense, dout, q, k, v, out, lse, options: Options, dlse=None) -> tuple[torch.Tensor, ...]:
    """dense: a function that takes (dout, q, k, v, out, lse, options, dlse), and returns the gradients."""
    of_rows = [_as_rows(x) for x in (dout, q, out)]
    keys, values = _as_rows(k), _as_rows(v)
    of_lse = [x if q.dim() == 3 or x is None else x.transpose(0, 1).flatten(1, 2) for x in (lse, dlse)]
    alone, gradients, dsinks = options.dense(), ([], [], []), []
    if alone.sinks is not None:  # their gradient is a sum over the sequences
        alone = alone._replace(sinks=alone.sinks.to(torch.float64 if q.dtype == torch.float64 else torch.float32))
    for of_q, of_k, after in _sequences(q, k, options):
        dout, q_alone, out = (x[None, of_q] for x in of_rows)
        lse, dlse = (None if x is None else x[None, :, of_q] for x in of_lse)
        results = dense(dout, q_alone, keys[None, of_k], values[None, of_k], out, lse, alone, dlse)
        for parts, gradient, unused in zip(gradients, results, (after[0], after[1], after[1]), strict=False):
            parts.append(pad(gradient[0], (0, 0, 0, 0, 0, unused)))
        dsinks += results[3:]
    results = tuple(_like(x, parts) for x, parts in zip((q, k, v), gradients, strict=True))
    return (*results, torch.stack(dsinks).sum(0).to(options.sinks.dtype)) if dsinks else results


def spans(x, cu_seqlens, seqused) -> list[tuple[int, int, int]]:
    """Of each sequence of q or k: its first row, the end of what is used of it, and where the next one begins."""
    edges = [i * x.shape[1] for i in range(x.shape[0] + 1)] if cu_seqlens is None else cu_seqlens.tolist()
    bounds = list(itertools.pairwise(edges))
    used = [end - begin for begin, end in bounds] if seqused is None else seqused.tolist()
    return [(begin, begin + count, end) for (begin, end), count in zip(bounds, used, strict=True)]


def _sequences(q, k, options: Options):
    """For each sequence the slices of its rows and of its keys, and how many of each follow that nobody uses. The last
    one has no rows and no keys: it stands for all that belongs to no sequence."""
    of_q = spans(q, options.cu_seqlens_q, options.seqused_q)
    of_k = spans(k, options.cu_seqlens_k, options.seqused_k)
    for (row, rows_used, rows_end), (key, keys_used, keys_end) in zip(of_q, of_k, strict=True):
        yield slice(row, rows_used), slice(key, keys_used), (rows_end - rows_used, keys_end - keys_used)
    rows, keys = (_as_rows(x).shape[0] for x in (q, k))
    last_row, last_key = (spans[-1][2] if spans else 0 for spans in (of_q, of_k))
    yield slice(0), slice(0), (rows - last_row, keys - last_key)


def _as_rows(x):
    return x if x.dim() == 3 else x.flatten(0, 1)


def _like(x, parts):
    rows = torch.cat(parts)
    return rows if x.dim() == 3 else rows.unflatten(0, x.shape[:2])


def _lse_like(q, lse):
    return lse if q.dim() == 3 else lse.unflatten(1, q.shape[:2]).transpose(0, 1)
