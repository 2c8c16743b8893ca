"""What a result is compared with, and how close it has to be.

The oracle is attention in float64 on the same rounded inputs. The yardstick is plain attention in the inputs' own
precision, and autograd through it: a result may be at most twice as far from the oracle as the yardstick is. Nothing
here is a tolerance that someone chose by looking at results.
"""

import math

import torch

from flash_attn_ext.reference import attention_reference, attention_reference_backward


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


def check_gradients(gradients, dout, q, k, v, out, lse, softmax_scale=None, causal=False):
    """Holds dq, dk and dv of a call with seqlens > 0 to the rule; None stands for a gradient that was not asked for.

    A backward pass takes out and lse as they are given, and two consequences of that are no error of its own:
    - out has been rounded. What that rounding alone changes in each gradient is computed exactly, and allowed.
    - dS = P (dP - delta) is exactly 0 in a row that sees a single key. Autograd takes the difference of a number and
      itself there; a kernel has the number from two sums in float32, over dout v and over dout out, and the noise of
      cancelled_sums is left.
    """
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    low = [x.detach().requires_grad_() for x in (q, k, v)]
    plain = torch.autograd.grad(attention_reference(*low, scale, causal, compute_dtype=q.dtype)[0], low, dout)

    doubles = [x.detach().double() for x in (dout, q, k, v)]
    exact_out, exact_lse = attention_reference(*doubles[1:], scale, causal)
    exact = attention_reference_backward(*doubles, exact_out, exact_lse, scale, causal)
    given = attention_reference_backward(*doubles, out.detach(), lse, scale, causal)
    noise = cancelled_sums(*doubles, scale, causal)
    for name, x, *of_x in zip(("dq", "dk", "dv"), (q, k, v), gradients, exact, plain, given, noise, strict=True):
        result, exact_x, plain_x, given_x, noise_x = of_x
        if result is not None:
            assert (result.shape, result.dtype, result.device) == (x.shape, x.dtype, x.device), name
            check_against(result, exact_x, plain_x, name, allowed=(given_x - exact_x).abs() + noise_x)


def cancelled_sums(dout, q, k, v, scale, causal):
    """What float32 noise leaves in dq, dk and dv where rows that see key 0 alone have a dS of exactly 0.

    dP and delta are sums over head_dim of the same products there, each within 2^-20 of the products' magnitudes: the
    rounding that lse is allowed too. Rows' errors are independent of each other, so their squares add up in dk.
    """
    (seqlen_q, heads), (seqlen_k, kv_heads) = q.shape[1:3], k.shape[1:3]
    dout, q = (x.unflatten(2, (kv_heads, heads // kv_heads)) for x in (dout, q))
    row = torch.arange(seqlen_q, device=q.device)
    last_seen = row + (seqlen_k - seqlen_q) if causal else torch.full_like(row, seqlen_k - 1)
    ds = scale * 2.0**-20 * torch.einsum("bqhgd,bkhd->bqhg", dout.abs(), v[:, :1].abs())
    ds = ds * (last_seen == 0)[:, None, None]
    dq = ds.unsqueeze(-1) * k[:, :1].unsqueeze(3).abs()
    dk = torch.zeros_like(k)
    dk[:, 0] = torch.einsum("bqhg,bqhgd->bhd", ds.square(), q.square()).sqrt()
    return dq.flatten(2, 3), dk, torch.zeros_like(v)


def check_against(result, exact, plain, name, allowed=None):
    """The rule for out and for each gradient.

    The largest error is at most twice the yardstick's plus twice the format's rounding near 0.3, the mean error at most
    1.5 times the yardstick's. Over a single row the yardstick's mean can be low by luck, since a row's errors share
    the rounding of its few probabilities: one mean rounding of the exact result, divided by the number of rows, is
    allowed for that. It is nothing in tensors of any size. Element by element, allowed is what the result may differ by
    besides.
    """
    assert bool(plain.isfinite().all()), f"{name}: the yardstick itself is not finite here; the case proves nothing"
    rounded = exact.to(result.dtype)
    error, plain_error = (result.double() - exact).abs(), (plain.double() - exact).abs()
    near_zero = ((rounded + 0.3 - 0.3) - rounded).double().abs().max()
    rows = result.numel() // result.shape[-1]
    luck = (rounded.double() - exact).abs().mean() / rows

    max_bound = 2 * plain_error.max() + 2 * near_zero
    mean_bound = 1.5 * plain_error.mean() + luck
    if allowed is not None:
        max_bound, mean_bound = max_bound + allowed.max(), mean_bound + allowed.mean()
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


def same_but_for_order(a, b):
    """Equal but for the order of a float32 sum: a rounding of the format, or a rounding of the sum's largest terms."""
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    a, b, eps = a.double(), b.double(), torch.finfo(a.dtype).eps
    return bool(((a - b).abs() <= eps * b.abs() + 2.0**-16 * b.abs().max()).all()) if b.numel() else True


def same_bits(a, b):
    """Equal bit for bit, NaN included."""
    as_int = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    return torch.equal(a.contiguous().view(as_int[a.element_size()]), b.contiguous().view(as_int[b.element_size()]))
