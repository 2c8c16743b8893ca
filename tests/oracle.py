"""Results held to the rule of flash_attn_ext/accuracy.py, and compared with each other.

The oracle is attention in float64 on the same rounded inputs. Options come as in a public function: in their order, or
by name; calls with lengths too.
"""

import math

import torch

from flash_attn_ext import accuracy, packed, reference
from flash_attn_ext.options import Options, lse_shape


def check(out, lse, q, k, v, *options, lse_slack=1.0, **options_by_name):
    """Holds the results of a call with rows and keys to the rule; lse_slack: see accuracy.compare_lse."""
    assert (out.shape, out.dtype, out.device) == (q.shape, q.dtype, q.device)
    assert (lse.shape, lse.dtype, lse.device) == (lse_shape(q), torch.float32, q.device)
    options = Options.of(*options, **options_by_name)

    exact, exact_lse = reference.forward(q.double(), k.double(), v.double(), options)
    plain, _ = accuracy.yardstick(q, k, v, options)
    assert_within(accuracy.compare_lse(lse, exact_lse, q, k, options, slack=lse_slack))
    assert_within(accuracy.compare("out", out, exact, plain, allowed_mean=luck_of_few_rows(exact, out.dtype)))


def check_gradients(gradients, dout, q, k, v, out, lse, *options, dlse=None, **options_by_name):
    """Holds dq, dk and dv, and dsinks if there are sinks, of a call with rows and keys to the rule; None stands for a
    gradient that is not needed.

    A backward pass takes out and lse as they are given, and two consequences of that are no error of its own:
    - out has been rounded. What that rounding alone changes in each gradient is computed exactly, and allowed.
    - dS = P (dP - delta) is 0 in a row that sees a single key, and next to nothing where one key has all but 2^-10 of
      the weight. Autograd takes the difference of a number and itself there, or nearly so; a kernel has the number from
      two sums in float32, over dout v and over dout out, and the noise of cancelled_sums is left.
    """
    options = Options.of(*options, **options_by_name)
    inputs = [x.detach() for x in (q, k, v, *options.differentiable().values())]
    low = [x.clone().requires_grad_() for x in inputs]
    plain_out, plain_lse = accuracy.yardstick(*low[:3], options._replace(sinks=low[3] if low[3:] else None))
    of_lse = 0 if dlse is None else (plain_lse.masked_fill(plain_lse == -torch.inf, 0) * dlse).sum()
    plain = torch.autograd.grad((plain_out.float() * dout.float()).sum() + of_lse, low)

    doubles = [x.detach().double() for x in (dout, q, k, v)]
    exact_out, exact_lse = reference.forward(*doubles[1:], options)
    exact = reference.backward(*doubles, exact_out, exact_lse, options, dlse)
    given = reference.backward(*doubles, out.detach(), lse, options, dlse)
    noise = cancelled_sums(*doubles, exact_out, exact_lse, options)
    names = ("dq", "dk", "dv", "dsinks")[: len(inputs)]
    for name, x, *of_x in zip(names, inputs, gradients, exact, plain, given, noise, strict=True):
        result, exact_x, plain_x, given_x, noise_x = of_x
        if result is None:
            continue
        assert (result.shape, result.dtype, result.device) == (x.shape, x.dtype, x.device), name
        allowed = (given_x - exact_x).abs() + noise_x
        luck = luck_of_few_rows(exact_x, x.dtype)
        assert_within(
            accuracy.compare(name, result, exact_x, plain_x, allowed=allowed.max(), allowed_mean=allowed.mean() + luck)
        )


def luck_of_few_rows(exact, dtype):
    """What the mean may be off besides: one mean rounding of the exact result, divided by the number of rows.

    Over a single row the yardstick's mean can be low by luck, since a row's errors share the rounding of its few
    probabilities. It is nothing in tensors of any size.
    """
    rows = exact.numel() // exact.shape[-1]
    return (exact.to(dtype).double() - exact).abs().mean() / rows


def cancelled_sums(dout, q, k, v, out, lse, options, _=None):
    """What float32 noise leaves in the gradients where one key has nearly all of a row's weight, and dS nearly cancels.

    dP and delta are sums over head_dim of nearly the same products there, each within 2^-20 of their magnitudes: the
    rounding that lse is allowed too. Rows' errors are independent of each other, so their squares add up in dk.
    Measured on an H100, in 2 of 60 draws of one fp16 row for each of 4 heads, softmax_scale 3: the mean of dq is off by
    2.0e-6 and 5.0e-6, where 1.2e-6 and 2.8e-6 are allowed without this.
    """
    if options.has_lengths():
        return packed.backward(cancelled_sums, dout, q, k, v, out, lse, options)
    (seqlen_q, heads, head_dim), (seqlen_k, kv_heads) = q.shape[1:], k.shape[1:3]
    dq, dk, dv = (torch.zeros_like(x) for x in (q, k, v))
    if seqlen_q > 0 and seqlen_k > 0:
        scores, _ = reference.scores_and_slopes(q, k, options)
        log_weight, key = (scores - lse.view(scores.shape[:-1]).unsqueeze(-1)).max(-1)
        dominated = log_weight > math.log1p(-(2.0**-10))
        dout, q = (x.unflatten(2, (kv_heads, heads // kv_heads)).permute(0, 2, 3, 1, 4) for x in (dout, q))
        of_key = [x.transpose(1, 2)[:, :, None].expand(*scores.shape[:-2], -1, -1) for x in (k, v)]
        index = key.unsqueeze(-1).expand(*key.shape, head_dim)
        own_k, own_v = (x.gather(-2, index).abs() for x in of_key)
        ds = options.scale(head_dim) * 2.0**-20 * dominated * (dout.abs() * own_v).sum(-1)
        dq = (ds.unsqueeze(-1) * own_k).permute(0, 3, 1, 2, 4).flatten(2, 3)
        of_rows = (ds.unsqueeze(-1) * q).square()
        squares = of_rows.new_zeros(*scores.shape[:-2], seqlen_k, head_dim).scatter_add_(-2, index, of_rows)
        dk = squares.sum(2).transpose(1, 2).sqrt()
    return dq, dk, dv, *(torch.zeros_like(x) for x in options.differentiable().values())


def assert_within(comparison):
    assert comparison.within, str(comparison)


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
