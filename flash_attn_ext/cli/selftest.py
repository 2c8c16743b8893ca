"""Accuracy of every head dim of the table on this GPU, against attention in float64.

The largest error may be twice that of plain PyTorch attention in the same low precision, plus the rounding of the
format; the mean error one and a half times its mean. Head dims that train are tested with their gradients.
Without a Hopper GPU or without kernels the CPU path is tested in their place, and the output says so.

Exit code: 0 every error is within its bound, 1 one is not, or the device that --device asks for cannot be tested,
2 wrong options.
"""

import argparse
import itertools
import time
from dataclasses import dataclass

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from .. import attention_reference, flash_attn_func, limits
from . import show, table
from .options import cpu_or_cuda

DTYPES = (torch.float16, torch.bfloat16)
BATCH, HEADS, KV_HEADS = 1, 4, 2

HEADER = [">head dim", "dtype", "result", ">max error", ">at most", ">mean error", ">at most", ""]


@dataclass
class Errors:
    """The worst of one result over several calls. A share is an error divided by its bound."""

    share: float = 0.0
    largest: float = 0.0
    largest_bound: float = 0.0
    mean: float = 0.0
    mean_bound: float = 0.0
    calls: int = 0

    def add(self, error: torch.Tensor, bound: float, mean_bound: float) -> None:
        largest, mean = error.max().item(), error.mean().item()
        share = max(largest / bound, mean / mean_bound)
        self.calls += 1
        if not share <= self.share:  # NaN is worse than anything
            self.share, self.largest, self.largest_bound = share, largest, bound
            self.mean, self.mean_bound = mean, mean_bound

    @property
    def right(self) -> bool:
        return self.share <= 1


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device",
        type=cpu_or_cuda,
        metavar="D",
        help="cuda, cuda:1, cpu; default: cuda where the kernels run, else cpu",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the random inputs (default: 0)")


def run(options: argparse.Namespace) -> int:
    device = options.device or torch.device("cuda" if limits.is_available() else "cpu")
    on_gpu = device.type == "cuda"
    if on_gpu and (why_not := limits.why_unavailable(device)):
        show.error(f"selftest: {why_not}")
        return 1
    if on_gpu:
        show.say(f"The GPU kernels on {torch.cuda.get_device_name(device)} ({device}), against float64:", "bold")
        rows = limits.TABLE
    else:
        try:
            rows = [{"head_dim": row["head_dim"], "forward": row["forward"], "backward": True} for row in table.rows()]
        except table.NoTable as error:
            show.error(f"selftest: {error}")
            return 1
        if not options.device:
            show.say(f"The GPU kernels are not tested: {limits.why_unavailable()}", "yellow")
        show.say("The PyTorch reference for CPU tensors, against float64:", "bold")

    begin = time.monotonic()
    shown, raised, wrong, calls = [], [], 0, 0
    for row, dtype in itertools.product((row for row in rows if row["forward"]), DTYPES):
        name = [str(row["head_dim"]), str(dtype).removeprefix("torch.")]
        try:
            results = test_row(row, dtype, device, options.seed)
        except Exception as error:  # whatever a broken installation raises: the other rows still tell something
            shown.append([*name, "-", "-", "-", "-", "-", "WRONG"])
            raised.append(f"head dim {', '.join(name)}: {type(error).__name__}: {error}".split("\n")[0])
            wrong += 1
            continue
        for result, errors in results.items():
            figures = (errors.largest, errors.largest_bound, errors.mean, errors.mean_bound)
            state = "ok" if errors.right else "WRONG"
            shown.append([*name, result, *(f"{figure:.1e}" for figure in figures), state])
            wrong += not errors.right
        calls += results["out"].calls
    show.table(HEADER, shown)
    for what in raised:
        show.say(what, "red")
    took = f"{calls} calls in {time.monotonic() - begin:.1f} s"
    if wrong:
        show.say(f"{wrong} of {len(shown)} results are out of bounds ({took}).", "bold red")
        return 1
    show.say(f"All {len(shown)} results are within their bounds ({took}).", "bold green")
    return 0


def test_row(row: dict, dtype: torch.dtype, device: torch.device, seed: int) -> dict[str, Errors]:
    """The worst errors of out and lse, and of the gradients where the row trains, over masks and lengths."""
    if device.type == "cuda":
        tile_q, tile_kv = row["forward"]["block_q"], row["forward"]["block_kv"]
        # Whole tiles, ragged ones, and many turns of the kernels' pipelines.
        lengths = [(tile_q, 2 * tile_kv), (2 * tile_q + 3, 2 * tile_q + 3), (tile_q + 1, 4099)]
    else:
        lengths = [(64, 64), (65, 131)]
    errors: dict[str, Errors] = {}
    # Never more queries than keys: torch's attention has no result for the rows that would see nothing.
    for (seqlen_q, seqlen_k), causal in itertools.product(lengths, (False, True)):
        generator = torch.Generator(device).manual_seed(seed)
        shapes = [(seqlen_q, HEADS), (seqlen_k, KV_HEADS), (seqlen_k, KV_HEADS), (seqlen_q, HEADS)]
        q, k, v, dout = (
            torch.randn(BATCH, *shape, row["head_dim"], generator=generator, device=device).to(dtype)
            for shape in shapes
        )
        compare(errors, q, k, v, dout, causal, trains=bool(row["backward"]))
    return errors


def compare(errors: dict[str, Errors], q, k, v, dout, causal: bool, trains: bool) -> None:
    def ours(q, k, v):
        return flash_attn_func(q, k, v, causal=causal, return_lse=True)

    def plain(q, k, v):
        return attention_reference(q, k, v, causal=causal, compute_dtype=q.dtype)

    def exact(q, k, v):
        return exact_attention(q, k, v, causal)

    got = results_of(ours, (q, k, v), dout, trains)
    yardstick = results_of(plain, (q, k, v), dout, trains)
    truth = results_of(exact, [x.double() for x in (q, k, v)], dout.double(), trains)
    for name, right in truth.items():
        error = (got[name].double() - right).abs()
        if name == "lse":
            # A float32 that sums products of float32: the rounding of scores of this size.
            bound = 1e-5 + 2.0**-20 * max(right.abs().max().item(), largest_score(q, k))
            mean_bound = bound
        else:
            rounded = right.to(q.dtype)
            near_zero = ((rounded + 0.3 - 0.3) - rounded).double().abs().max()
            plain_error = (yardstick[name].double() - right).abs()
            bound = (2 * plain_error.max() + 2 * near_zero).item()
            mean_bound = 1.5 * plain_error.mean().item()
        errors.setdefault(name, Errors()).add(error, bound, mean_bound)


def results_of(attention, inputs, dout: torch.Tensor, trains: bool) -> dict[str, torch.Tensor]:
    inputs = [x.detach().requires_grad_(trains) for x in inputs]
    out, lse = attention(*inputs)
    results = {"out": out.detach(), "lse": lse.detach()}
    if trains:
        results |= zip(("dq", "dk", "dv"), torch.autograd.grad(out, inputs, dout), strict=True)
    return results


def exact_attention(q, k, v, causal: bool):
    """out and lse by torch's own attention in float64, bottom-right aligned; nothing of this package is in it."""
    visible = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool, device=q.device)
    if causal:
        visible = visible.tril(k.shape[1] - q.shape[1])
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    with sdpa_kernel(SDPBackend.MATH):
        out = scaled_dot_product_attention(q, k, v, attn_mask=visible, enable_gqa=True)
    scores = q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT * q.shape[-1] ** -0.5
    return out.transpose(1, 2), scores.masked_fill(~visible, -torch.inf).logsumexp(-1)


def largest_score(q: torch.Tensor, k: torch.Tensor) -> float:
    """At least the largest scaled sum of |q k| over the head dim: Cauchy and Schwarz."""
    norms = [torch.linalg.vector_norm(x.double(), dim=-1).max().item() for x in (q, k)]
    return norms[0] * norms[1] * q.shape[-1] ** -0.5
