"""What tests of gradients on a GPU share: both passes, one after the other, and when two results are the same.

dk and dv come out of registers, the same in every run. dq is added up in memory by the thread blocks of all keys, in
the order in which they come: its bits are certain only where all keys are in one block, or with deterministic=True
(test_deterministic.py).
"""

import math

import gpu
import torch
from cases import TRAINING_ROWS
from oracle import check_gradients, same_bits, same_but_for_order

import flash_attn_ext
from flash_attn_ext import limits

ONE_BLOCK = min((row["backward"]["block_kv"] for row in TRAINING_ROWS), default=64)  # keys: dq has certain bits


def differentiate(dout, q, k, v, out, lse, *options, **options_by_name):
    """dq, dk and dv, in memory that held NaN before; so did the workspace."""
    gpu.poison(q, k, v, workspace(q, k))
    return flash_attn_ext.backward(dout, q, k, v, out, lse, *options, **options_by_name)


def workspace(q, k):
    """A tensor of the bytes that the backward pass needs at most besides its results, without memory of its own.

    A float32 sum of dq for each element of q, and lse and delta for each row. Where query heads share a KV head, also
    sums of dk and dv for each key: up to one of both for each query head, as the order of work will have it; where they
    do not, none, and then this is what the pass needs exactly. Rows and keys in whole blocks, head dims filled up to
    the largest of their row. Packed sequences, each of which is whole blocks, need more than what is counted here.
    """
    q, k = (x if x.dim() == 4 else x[None] for x in (q, k))
    (batch, seqlen_q, heads, head_dim), (seqlen_k, kv_heads) = q.shape, k.shape[1:3]
    row = limits.row_of(head_dim)
    plan, columns = row["backward"], row["head_dim"]
    rows = math.ceil(seqlen_q / plan["block_q"]) * plan["block_q"]
    keys = math.ceil(seqlen_k / plan["block_kv"]) * plan["block_kv"]
    numbers = rows * (columns + 2) + (keys * 2 * columns if heads > kv_heads else 0)
    return torch.empty(batch * heads * numbers, dtype=torch.float32, device="meta")


def both_passes(q, k, v, *options, dout=None, dlse=None, **options_by_name):
    """(dout, q, k, v, out, lse), the arguments of the backward pass, and its gradients."""
    dout = torch.randn_like(q) if dout is None else dout
    arguments = dout, q, k, v, *flash_attn_ext.forward(q, k, v, *options, **options_by_name)
    return arguments, differentiate(*arguments, *options, dlse=dlse, **options_by_name)


def both_passes_and_check(q, k, v, *options, dout=None, dlse=None, **options_by_name):
    arguments, gradients = both_passes(q, k, v, *options, dout=dout, dlse=dlse, **options_by_name)
    check_gradients(gradients, *arguments, *options, dlse=dlse, **options_by_name)
    return arguments, gradients


def by_autograd(function, dout, *inputs):
    """The gradients of function(q, k, v)."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    function(*leaves).backward(dout)
    return [x.grad for x in leaves]


def assert_same(results, expected, what="", keys=ONE_BLOCK):
    """dk and dv to the bit; dq too, unless more keys than one block has are summed in it."""
    for name, a, b in zip(("dq", "dk", "dv"), results, expected, strict=True):
        if a is None or b is None:
            assert a is b, f"{name} is needed in one case only {what}"
        elif name == "dq" and keys > ONE_BLOCK:
            assert same_but_for_order(a, b), f"dq differs by more than the order of its sum {what}"
        else:
            assert same_bits(a, b), f"{name} differs {what}"
