"""Attention on CPU tensors, in memory that is linear in the sequence length: torch's own kernel where it computes the
same, else `reference` on blocks of rows.
"""

import torch

from . import reference
from .options import FLOAT32, Options

SCORES = 2**23  # of a block of rows: 32 MiB in float32. Smaller blocks are slower, since each reads all its keys again


def forward(q, k, v, options: Options) -> tuple[torch.Tensor, torch.Tensor]:
    """What `reference.forward` returns, up to rounding."""
    if _torch_computes_the_same(q, k, options):
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *map(_for_torch, (q, k, v)), is_causal=_is_masked(q, options), scale=options.softmax_scale
        )
        return out.transpose(1, 2).to(q.dtype), lse
    return _forward_by_blocks(q, k, v, options)


def backward(dout, q, k, v, out, lse, options: Options) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What `reference.backward` returns, up to rounding."""
    if _torch_computes_the_same(q, k, options):
        nothing_seen = lse == -torch.inf
        gradients = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *map(_for_torch, (dout, q, k, v, out)),
            lse.masked_fill(nothing_seen, torch.inf),  # so that exp(score - lse) is 0
            dropout_p=0.0,
            is_causal=_is_masked(q, options),
            scale=options.softmax_scale,
        )
        return tuple(x.transpose(1, 2).to(q.dtype) for x in gradients)
    return _backward_by_blocks(dout, q, k, v, out, lse, options)


def _is_masked(q, options: Options) -> bool:
    return options.causal and q.shape[1] > 1  # the last row sees every key


def _torch_computes_the_same(q, k, options: Options) -> bool:
    """Torch's causal mask is aligned to the top left, its lse is float32, which is too coarse for gradients in float64,
    and rows whose every score is NaN or -inf have an lse of 0."""
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
    """Pairs of slices: rows, and the keys that they see. The last row of a block ends at its last key, so that the mask
    of a block is that of a whole call."""
    (batch, seqlen_q, heads, _), seqlen_k = q.shape, k.shape[1]
    step = max(SCORES // max(batch * heads * seqlen_k, 1), 1)
    for begin in range(0, seqlen_q, step):
        end = min(begin + step, seqlen_q)
        yield slice(begin, end), slice(max(end + seqlen_k - seqlen_q, 0) if options.causal else seqlen_k)


def _forward_by_blocks(q, k, v, options):
    (batch, seqlen_q, heads, _) = q.shape
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    out, lse = torch.empty_like(q), q.new_empty((batch, heads, seqlen_q), dtype=lse_dtype)
    for rows, keys in _blocks(q, k, options):
        out[:, rows], lse[:, :, rows] = reference.forward(q[:, rows], k[:, keys], v[:, keys], options)
    return out, lse


def _backward_by_blocks(dout, q, k, v, out, lse, options):
    dtype = q.dtype
    if dtype != torch.float64:  # dk and dv are sums over blocks
        dout, q, k, v, out = (x.float() for x in (dout, q, k, v, out))
    dq, dk, dv = (torch.zeros_like(x) for x in (q, k, v))
    for rows, keys in _blocks(q, k, options):
        of_block = dout[:, rows], q[:, rows], k[:, keys], v[:, keys], out[:, rows], lse[:, :, rows]
        dq[:, rows], dk_part, dv_part = reference.backward(*of_block, options)
        dk[:, keys] += dk_part
        dv[:, keys] += dv_part
    return tuple(x.to(dtype) for x in (dq, dk, dv))
