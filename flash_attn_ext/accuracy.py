"""The rule for a result: how far from the exact one it may be. The tests and `selftest` hold results to it.

The yardstick is plain attention in the inputs' own precision, and autograd through it: a result may be at most twice as
far from the exact one as the yardstick is. Nothing here is a tolerance that someone chose by looking at results.
"""

import math
from dataclasses import dataclass

import torch
from torch.nn.functional import pad

from . import packed, reference
from .options import Options


@dataclass(frozen=True)
class Comparison:
    """A result beside the exact one: the element whose error is largest for its bound, and the mean of all."""

    name: str
    error: float
    bound: float
    mean_error: float
    mean_bound: float
    where: str  # the elements that are out of bounds: what is needed to see which block, head or batch broke

    @property
    def within(self) -> bool:
        return self.error <= self.bound and self.mean_error <= self.mean_bound  # NaN is not within

    def __str__(self) -> str:
        return (
            f"{self.name}: max error {self.error:.3e} (at most {self.bound:.3e}), "
            f"mean error {self.mean_error:.3e} (at most {self.mean_bound:.3e}); {self.where}"
        )


def yardstick(q, k, v, options: Options) -> tuple[torch.Tensor, torch.Tensor]:
    return reference.forward(q, k, v, options, compute_dtype=q.dtype)


def compare(name: str, result, exact, plain, *, allowed=0.0, allowed_mean=0.0) -> Comparison:
    """The rule for out and for each gradient; plain is the yardstick's.

    The largest error is at most twice the yardstick's plus twice the format's rounding near 0.3, the mean error at most
    1.5 times the yardstick's. A caller that knows of errors that are not the result's own passes what it allows for
    them besides, to every element and to the mean.
    """
    if not plain.isfinite().all():
        raise ValueError(f"{name}: the yardstick itself is not finite here; the case proves nothing")
    rounded = exact.to(result.dtype)
    near_zero = ((rounded + 0.3 - 0.3) - rounded).double().abs().max()
    plain_error = (plain.double() - exact).abs()
    bound = 2 * plain_error.max() + 2 * near_zero + allowed
    mean_bound = 1.5 * plain_error.mean() + allowed_mean
    return _compare(name, result, exact, (result.double() - exact).abs(), bound, mean_bound)


def compare_lse(lse, exact, q, k, options: Options, *, slack: float = 1.0) -> Comparison:
    """The rule for lse: the rounding of one score, which a sum of products of that size has, and of the logarithm.

    -inf is exact. slack: how many times that rounding. 1, but where a test says why the hardware cannot hold to it.
    """
    empty = exact == -math.inf
    size = torch.maximum(exact.abs(), options.scale(q.shape[-1]) * largest_magnitude(q, k, options))
    bound = 1e-5 + slack * 2.0**-20 * size.masked_fill(empty, 0)
    error = (lse.double() - exact).abs().masked_fill(empty & (lse == -math.inf), 0)
    return _compare("lse", lse, exact, error, bound, bound.mean())


def largest_magnitude(q, k, options: Options) -> torch.Tensor:
    """Like lse: the largest sum of |q k| over head_dim among the keys that the row sees, 0 if it sees none. -inf for
    rows that are not used or belong to no sequence."""
    if options.has_lengths():
        _, of_rows = packed.forward(lambda q, k, _, alone: (q, largest_magnitude(q, k, alone)), q, k, k, options)
        return of_rows
    (batch, seqlen_q, heads, _), (seqlen_k, kv_heads) = q.shape, k.shape[1:3]
    q = q.double().abs().unflatten(2, (kv_heads, heads // kv_heads))
    sums = torch.einsum("bqhgd,bkhd->bhgqk", q, k.double().abs())
    sums = sums.masked_fill(sums == math.inf, 0)  # exp(-inf) adds 0
    seen = reference.visible(seqlen_q, seqlen_k, options, q.device)
    sums = sums if seen is None else sums.masked_fill(~seen, 0)
    return pad(sums, (0, 1)).amax(-1).view(batch, heads, seqlen_q)  # there may be no key


def _compare(name, result, exact, error, bound, mean_bound) -> Comparison:
    share = (error / bound).nan_to_num_(nan=0.0, posinf=math.inf)  # 0 / 0 is 0,
    worst = share.masked_fill_(error.isnan(), math.inf).argmax()  # and an error of NaN is the largest
    at_worst = [x.expand_as(error).take(worst) for x in (error, bound)]
    figures = torch.stack([*at_worst, error.mean(), mean_bound]).tolist()
    comparison = Comparison(name, *figures, where="")
    if comparison.within:
        return comparison
    place = tuple(i.item() for i in torch.unravel_index(worst, error.shape))
    values = f"{result[place].item()!r} instead of {exact[place].item()!r}"
    return Comparison(name, *figures, f"worst at {place}: {values}; {_spread(~(error <= bound))}")


def _spread(wrong) -> str:
    count = int(wrong.sum())
    if count == 0:
        return "no single element is out of bounds"
    places = wrong.nonzero()
    ranges = ", ".join(f"{a}..{b}" for a, b in zip(places.amin(0).tolist(), places.amax(0).tolist(), strict=True))
    return f"{count} of {wrong.numel()} out of bounds, within [{ranges}]"
