"""Accuracy of every head dim of the table on this GPU, against attention in float64.

The largest error may be twice that of plain PyTorch attention in the same low precision, plus the rounding of the
format; the mean error one and a half times its mean. Head dims that train are tested with their gradients.
Without a Hopper GPU or without kernels the CPU path is tested in their place, and the output says so.

Exit code: 0 every error is within its bound, 1 one is not, or the device that --device asks for cannot be tested,
2 wrong options.
"""

import argparse
import itertools
import math
import time

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from .. import accuracy, flash_attn_func, limits
from ..accuracy import Comparison
from ..options import Options
from . import show, table
from .options import cpu_or_cuda

DTYPES = (torch.float16, torch.bfloat16)
BATCH, HEADS, KV_HEADS = 1, 4, 2

HEADER = [">head dim", "dtype", "result", ">max error", ">at most", ">mean error", ">at most", ""]


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
        for result, comparisons in results.items():
            worst = max(comparisons, key=share)
            figures = (worst.error, worst.bound, worst.mean_error, worst.mean_bound)
            state = "ok" if worst.within else "WRONG"
            shown.append([*name, result, *(f"{figure:.1e}" for figure in figures), state])
            wrong += not worst.within
        calls += len(results["out"])
    show.table(HEADER, shown)
    for what in raised:
        show.say(what, "red")
    took = f"{calls} calls in {time.monotonic() - begin:.1f} s"
    if wrong:
        show.say(f"{wrong} of {len(shown)} results are out of bounds ({took}).", "bold red")
        return 1
    show.say(f"All {len(shown)} results are within their bounds ({took}).", "bold green")
    return 0


def share(comparison: Comparison) -> float:
    """The error as a part of its bound; NaN is worse than anything."""
    parts = comparison.error / comparison.bound, comparison.mean_error / comparison.mean_bound
    return max(math.inf if math.isnan(part) else part for part in parts)


def test_row(row: dict, dtype: torch.dtype, device: torch.device, seed: int) -> dict[str, list[Comparison]]:
    """out and lse, and the gradients where the row trains, of a call for each mask and length."""
    if device.type == "cuda":
        block_q, block_kv = row["forward"]["block_q"], row["forward"]["block_kv"]
        # Whole blocks, ragged ones, and many turns of the kernels' pipelines.
        lengths = [(block_q, 2 * block_kv), (2 * block_q + 3, 2 * block_q + 3), (block_q + 1, 4099)]
    else:
        lengths = [(64, 64), (65, 131)]
    results: dict[str, list[Comparison]] = {}
    # Never more queries than keys: torch's attention has no result for the rows that would see nothing.
    for (seqlen_q, seqlen_k), causal in itertools.product(lengths, (False, True)):
        generator = torch.Generator(device).manual_seed(seed)
        shapes = [(seqlen_q, HEADS), (seqlen_k, KV_HEADS), (seqlen_k, KV_HEADS), (seqlen_q, HEADS)]
        q, k, v, dout = (
            torch.randn(BATCH, *shape, row["head_dim"], generator=generator, device=device).to(dtype)
            for shape in shapes
        )
        for comparison in compare(q, k, v, dout, Options(causal=causal), trains=bool(row["backward"])):
            results.setdefault(comparison.name, []).append(comparison)
    return results


def compare(q, k, v, dout, options: Options, trains: bool) -> list[Comparison]:
    def ours(q, k, v):
        return flash_attn_func(q, k, v, causal=options.causal, return_lse=True)

    def yardstick(q, k, v):
        return accuracy.yardstick(q, k, v, options)

    def exact(q, k, v):
        return exact_attention(q, k, v, options.causal)

    got = results_of(ours, (q, k, v), dout, trains)
    plain = results_of(yardstick, (q, k, v), dout, trains)
    truth = results_of(exact, [x.double() for x in (q, k, v)], dout.double(), trains)
    comparisons = []
    for name, right in truth.items():
        if name == "lse":
            comparisons.append(accuracy.compare_lse(got[name], right, q, k, options))
        else:
            comparisons.append(accuracy.compare(name, got[name], right, plain[name]))
    return comparisons


def results_of(attention, inputs, dout: torch.Tensor, trains: bool) -> dict[str, torch.Tensor]:
    inputs = [x.detach().requires_grad_(trains) for x in inputs]
    out, lse = attention(*inputs)
    results = {"out": out.detach(), "lse": lse.detach()}
    if trains:
        results |= zip(("dq", "dk", "dv"), torch.autograd.grad(out, inputs, dout), strict=True)
    return results


def exact_attention(q, k, v, causal: bool):
    """out and lse by torch's own attention in float64, bottom-right aligned.

    Nothing of this package is in it, its masks neither: `reference` is what runs on the CPU, and a mistake there would
    not show if it were the measure too.
    """
    visible = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool, device=q.device)
    if causal:
        visible = visible.tril(k.shape[1] - q.shape[1])
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    with sdpa_kernel(SDPBackend.MATH):
        out = scaled_dot_product_attention(q, k, v, attn_mask=visible, enable_gqa=True)
    scores = q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT * q.shape[-1] ** -0.5
    return out.transpose(1, 2), scores.masked_fill(~visible, -torch.inf).logsumexp(-1)
