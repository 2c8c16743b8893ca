"""Attention on CPU tensors, in memory that is linear in the sequence length: torch's own kernel where it computes the
same, else `reference` on blocks of rows.
"""

import torch

from . import packed, reference
from .options import FLOAT32, UNBOUNDED, Options

SCORES = 2**23  # of a block of rows: 32 MiB in float32. Smaller blocks are slower, since each reads all its keys again


def forward(q, k, v, options: Options) -> tuple[torch.Tensor, torch.Tensor]:
    """What `reference.forward` returns, up to rounding."""
    if options.has_lengths():
        return packed.forward(forward, q, k, v, options)
    if _torch_computes_the_same(q, k, options):
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *map(_for_torch, (q, k, v)), is_causal=_is_masked(q, options), scale=options.softmax_scale
        )
        return out.transpose(1, 2).to(q.dtype), lse
    return _forward_by_blocks(q, k, v, options)


def backward(dout, q, k, v, out, lse, options: Options, dlse=None) -> tuple[torch.Tensor, ...]:
    """What `reference.backward` returns, up to rounding."""
    if options.has_lengths():
        return packed.backward(backward, dout, q, k, v, out, lse, options, dlse)
    if dlse is None and _torch_computes_the_same(q, k, options):
        nothing_seen = lse == -torch.inf
        gradients = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *map(_for_torch, (dout, q, k, v, out)),
            lse.masked_fill(nothing_seen, torch.inf),  # so that exp(score - lse) is 0
            dropout_p=0.0,
            is_causal=_is_masked(q, options),
            scale=options.softmax_scale,
        )
        return tuple(x.transpose(1, 2).to(q.dtype) for x in gradients)
    return _backward_by_blocks(dout, q, k, v, out, lse, options, dlse)


def _is_masked(q, options: Options) -> bool:
    return options.causal and q.shape[1] > 1  # the last row sees every key


def _torch_computes_the_same(q, k, options: Options) -> bool:
    """Torch's kernel has no further options. Its causal mask is aligned to the top left, its lse is float32, too coarse
    for gradients in float64, and rows whose every score is NaN or -inf have an lse of 0."""
    if options.asked():
        return False
    aligned = not _is_masked(q, options) or q.shape[1] == k.shape[1]
    if not (aligned and q.is_cpu and q.dtype != torch.float64 and q.numel() > 0 and k.numel() > 0):
        return False
    q_size, k_size = (torch.linalg.vector_norm(x, torch.inf).item() for x in (q, k))
    return q_size * k_size * q.shape[-1] * max(options.scale(q.shape[-1]), 1) <= FLOAT32.max  # NaN is not


def _for_torch(x):
    """(batch, heads, seqlen, head_dim), in float32 as the reference computes; torch's kernel reads whole rows."""
    x = x.float().transpose(1, 2)
    return x if x.stride(-1) == 1 else x.contiguous()


def _blocks(q, k, options: Options):
    """Slices of rows, the slices of keys that they see, and where their diagonal begins among these keys."""
    (batch, seqlen_q, heads, _), seqlen_k = q.shape, k.shape[1]
    left, right = options.window
    step = max(SCORES // max(batch * heads * seqlen_k, 1), 1)
    for begin in range(0, seqlen_q, step):
        end = min(begin + step, seqlen_q)
        diagonal = begin + seqlen_k - seqlen_q
        first = 0 if left == UNBOUNDED else min(max(diagonal - left, 0), seqlen_k)
        last = seqlen_k if right == UNBOUNDED else min(max(diagonal + end - begin + right, first), seqlen_k)
        yield slice(begin, end), slice(first, last), diagonal - first


def _forward_by_blocks(q, k, v, options):
    (batch, seqlen_q, heads, _) = q.shape
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    out, lse = torch.empty_like(q), q.new_empty((batch, heads, seqlen_q), dtype=lse_dtype)
    for rows, keys, diagonal in _blocks(q, k, options):
        of_block = q[:, rows], k[:, keys], v[:, keys]
        out[:, rows], lse[:, :, rows] = reference.forward(*of_block, options, diagonal=diagonal)
    return out, lse


def _backward_by_blocks(dout, q, k, v, out, lse, options, dlse):
    inputs = q, k, v, *options.tensors().values()
    if q.dtype != torch.float64:  # the gradients of k, v and sinks are sums over blocks
        dout, q, k, v, out = (x.float() for x in (dout, q, k, v, out))
    if options.sinks is not None:
        options = options._replace(sinks=options.sinks.to(q.dtype))
    dq, *sums = (torch.zeros_like(x) for x in (q, k, v, *options.tensors().values()))
    for rows, keys, diagonal in _blocks(q, k, options):
        of_block = dout[:, rows], q[:, rows], k[:, keys], v[:, keys], out[:, rows], lse[:, :, rows]
        dlse_of_block = None if dlse is None else dlse[:, :, rows]
        dq[:, rows], *parts = reference.backward(*of_block, options, dlse_of_block, diagonal)
        for whole, part, of_part in zip(sums, parts, (keys, keys, None), strict=False):
            (whole if of_part is None else whole[:, of_part]).add_(part)
    return tuple(gradient.to(x.dtype) for gradient, x in zip((dq, *sums), inputs, strict=True))
