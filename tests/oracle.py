"""What a result is compared with, and how close it has to be.

The oracle is attention in float64 on the same rounded inputs. The yardstick is plain attention in the inputs' own
precision: a result may be at most twice as far from the oracle as the yardstick is. Nothing here is a tolerance that
someone chose by looking at results.
"""

import math

import torch

from flash_attn_ext.reference import attention_reference


def check(out, lse, q, k, v, softmax_scale=None, causal=False, lse_slack=1.0):
    """Holds the results of a call with seqlens > 0 to the rule; lse_slack: see check_lse."""
    batch, seqlen_q, heads, head_dim = q.shape
    assert (out.shape, out.dtype, out.device) == (q.shape, q.dtype, q.device)
    assert (lse.shape, lse.dtype, lse.device) == ((batch, heads, seqlen_q), torch.float32, q.device)
    scale = head_dim**-0.5 if softmax_scale is None else softmax_scale

    exact, exact_lse = attention_reference(q.double(), k.double(), v.double(), scale, causal)
    plain, _ = attention_reference(q, k, v, scale, causal, compute_dtype=q.dtype)
    check_lse(lse, exact_lse, scale * largest_magnitude(q, k, causal), lse_slack)
    check_against(out, exact, plain, name="out")


def largest_magnitude(q, k, causal):
    """(batch, heads, seqlen_q): the largest sum of |q k| over head_dim among the keys that the row sees."""
    (batch, seqlen_q, heads, _), (seqlen_k, kv_heads) = q.shape, k.shape[1:3]
    q = q.double().abs().unflatten(2, (kv_heads, heads // kv_heads))
    sums = torch.einsum("bqhgd,bkhd->bhgqk", q, k.double().abs())
    if causal:
        sums = sums.tril(seqlen_k - seqlen_q)
    return sums.masked_fill(sums == math.inf, 0).amax(-1).view(batch, heads, seqlen_q)  # exp(-inf) adds nothing


def check_against(result, exact, plain, name):
    """The rule for out and for each gradient.

    The largest error is at most twice the yardstick's plus twice the format's rounding near 0.3, the mean error at most
    1.5 times the yardstick's. Over a single row the yardstick's mean can be low by luck, since a row's errors share
    the rounding of its few probabilities: one mean rounding of the exact result, divided by the number of rows, is
    allowed for that. It is nothing in tensors of any size.
    """
    assert bool(plain.isfinite().all()), f"{name}: the yardstick itself is not finite here; the case proves nothing"
    rounded = exact.to(result.dtype)
    error, plain_error = (result.double() - exact).abs(), (plain.double() - exact).abs()
    near_zero = ((rounded + 0.3 - 0.3) - rounded).double().abs().max()
    rows = result.numel() // result.shape[-1]
    luck = (rounded.double() - exact).abs().mean() / rows

    max_bound = 2 * plain_error.max() + 2 * near_zero
    mean_bound = 1.5 * plain_error.mean() + luck
    within = torch.stack([error.max() <= max_bound, error.mean() <= mean_bound])  # NaN is not within
    if not bool(within.all()):
        worst = _worst(error)
        raise AssertionError(
            f"{name}: max error {error.max():.3e} (at most {max_bound:.3e}), mean error {error.mean():.3e} (at most "
            f"{mean_bound:.3e}); worst at {worst}: {result[worst].item()!r} instead of {exact[worst].item()!r}; "
            f"{_spread(~(error <= max_bound))}"
        )


def check_lse(lse, exact, magnitude, slack=1.0):
    """Rounding of one score, which a sum of products of this magnitude has, and of the logarithm; -inf is exact.

    slack: how many times that rounding. 1, but where a test says why the hardware cannot hold to it.
    """
    empty = exact == -math.inf
    error = (lse.double() - exact).abs().masked_fill(empty & (lse == -math.inf), 0)
    bound = 1e-5 + slack * 2.0**-20 * torch.maximum(exact.abs().masked_fill(empty, 0), magnitude)
    outside = ~(error <= bound)
    if bool(outside.any()):
        worst = _worst((error / bound).nan_to_num(nan=math.inf))
        raise AssertionError(
            f"lse: {lse[worst].item()!r} instead of {exact[worst].item()!r} (within {bound[worst]:.3e}) at {worst}; "
            f"{_spread(outside)}"
        )


def _worst(error):
    """The coordinate of the largest error; NaN is larger than anything."""
    flat = error.nan_to_num(nan=math.inf).argmax()
    return tuple(i.item() for i in torch.unravel_index(flat, error.shape))


def _spread(wrong):
    """Where the wrong elements lie: what is needed to see which tile, head or batch broke."""
    count = int(wrong.sum())
    if count == 0:
        return "no single element is out of bounds"
    where = wrong.nonzero()
    ranges = ", ".join(f"{a}..{b}" for a, b in zip(where.amin(0).tolist(), where.amax(0).tolist(), strict=True))
    return f"{count} of {wrong.numel()} out of bounds, within [{ranges}]"


def same_bits(a, b):
    """Equal bit for bit, NaN included."""
    as_int = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    return torch.equal(a.contiguous().view(as_int[a.element_size()]), b.contiguous().view(as_int[b.element_size()]))
