"""Accuracy of every row of the table on this GPU, at its largest head dim, against attention in float64.

The largest error may be twice that of plain PyTorch attention in the same low precision, plus the rounding of the
format; the mean error one and a half times its mean. Head dims that train are tested with their gradients. Options
(windows, softcap, sinks, a loss that uses lse, packed sequences, used lengths) are tested where the kernels have them,
and of the results of each the one that is nearest to its bound is shown.
Without a Hopper GPU or without kernels the CPU path is tested in their place, and the output says so.

Exit code: 0 every error is within its bound, 1 one is not, or the device that --device asks for cannot be tested,
2 wrong options.
"""

import argparse
import itertools
import math
import time

import torch

from .. import accuracy, flash_attn_func, flash_attn_varlen_func, limits
from ..accuracy import Comparison
from ..options import Options
from . import show, table
from .options import cpu_or_cuda

DTYPES = (torch.float16, torch.bfloat16)
PASSES = ("forward", "backward")
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
            label = result if result == worst.name else f"{result}: {worst.name}"
            shown.append([*name, label, *(f"{figure:.1e}" for figure in figures), state])
            wrong += not worst.within
        calls += len(results["out"]) + len(results.keys() & limits.OPTIONS)
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
    """out and lse, and the gradients where the row trains, of a call for each mask and length; and by the name of the
    option, all results of a call with each option that the row has."""
    block_q, block_kv = (row["forward"][size] if device.type == "cuda" else 64 for size in ("block_q", "block_kv"))
    if device.type == "cuda":
        # Whole blocks, ragged ones, and many turns of the kernels' pipelines.
        lengths = [(block_q, 2 * block_kv), (2 * block_q + 3, 2 * block_q + 3), (block_q + 1, 4099)]
    else:
        lengths = [(64, 64), (65, 131)]
    results: dict[str, list[Comparison]] = {}
    # In no call are there more queries than keys: every row sees one.
    for (seqlen_q, seqlen_k), causal in itertools.product(lengths, (False, True)):
        tensors = random_tensors((BATCH, seqlen_q), (BATCH, seqlen_k), row["head_dim"], dtype, device, seed)
        for comparison in compare(*tensors, {"causal": causal}, trains=bool(row["backward"])):
            results.setdefault(comparison.name, []).append(comparison)
    for name, (shape_q, shape_k, options) in option_calls(block_q, block_kv, device).items():
        has = {which: device.type == "cpu" or limits.has_option(name, which, row["head_dim"]) for which in PASSES}
        trains = bool(row["backward"]) and has["backward"]
        if has["forward"] and (trains or name != "dlse"):
            tensors = random_tensors(shape_q, shape_k, row["head_dim"], dtype, device, seed)
            results[name] = compare(*tensors, options, trains, uses_lse=name == "dlse")
    return results


def option_calls(block_q: int, block_kv: int, device: torch.device) -> dict[str, tuple]:
    """For each option the (..., rows) of q and the (..., keys) of k, and the options of a call."""

    def int32(*values):
        return torch.tensor(values, dtype=torch.int32, device=device)

    seqlen = 2 * max(block_q, block_kv) + 3
    dense, causal = ((BATCH, seqlen), (BATCH, seqlen)), {"causal": True}
    edges_q, edges_k = (0, 1, 1, block_q + 6, block_q + 70), (0, 5, 9, block_q + 40, block_q + 104)
    packed = (edges_q[-1:], edges_k[-1:]), {"cu_seqlens_q": int32(*edges_q), "cu_seqlens_k": int32(*edges_k)}
    used = {"seqused_q": int32(block_q + 5), "seqused_k": int32(seqlen - 9)}
    return {
        "window_size": (*dense, {"window_size": (block_kv + 1, 5)}),
        "softcap": (*dense, causal | {"softcap": 2.0}),
        "sinks": (*dense, causal | {"sinks": torch.linspace(-1, 4, HEADS, device=device)}),
        "dlse": (*dense, causal),
        "cu_seqlens": (*packed[0], causal | packed[1]),
        "seqused": (*dense, causal | used),
    }


def random_tensors(shape_q, shape_k, head_dim: int, dtype: torch.dtype, device: torch.device, seed: int):
    """q, k, v and dout."""
    generator = torch.Generator(device).manual_seed(seed)
    shapes = (*shape_q, HEADS), (*shape_k, KV_HEADS), (*shape_k, KV_HEADS), (*shape_q, HEADS)
    return [torch.randn(*shape, head_dim, generator=generator, device=device).to(dtype) for shape in shapes]


def compare(q, k, v, dout, by_name: dict, trains: bool, uses_lse: bool = False) -> list[Comparison]:
    """by_name: the options of the call."""
    has_lengths = any(name.startswith(("cu_seqlens", "seqused")) for name in by_name)

    def ours(q, k, v, **options):
        return (flash_attn_varlen_func if has_lengths else flash_attn_func)(q, k, v, **options, return_lse=True)

    def yardstick(q, k, v, **options):
        return accuracy.yardstick(q, k, v, Options.of(**options))

    dlse = dout[..., 0].transpose(-1, -2).float().contiguous() if uses_lse else None  # as good as any
    got = results_of(ours, (q, k, v), by_name, dout, dlse, trains)
    plain = results_of(yardstick, (q, k, v), by_name, dout, dlse, trains)
    truth = results_of(exact_attention, [x.double() for x in (q, k, v)], by_name, dout.double(), dlse, trains)
    comparisons = []
    for name, right in truth.items():
        if name == "lse":
            comparisons.append(accuracy.compare_lse(got[name], right, q, k, Options.of(**by_name)))
            continue
        allowances = {}
        if name == "dsinks":  # a backward takes out as it was rounded, and the mean over few heads does not hide that
            change = (dout.double() * (got["out"].double() - truth["out"])).sum(-1).transpose(-1, -2)
            weights = (by_name["sinks"].double()[:, None] - truth["lse"]).exp()
            change = (weights * change).sum((0, -1)).abs()
            allowances = {"allowed": change.max(), "allowed_mean": change.mean()}
        comparisons.append(accuracy.compare(name, got[name], right, plain[name], **allowances))
    return comparisons


def results_of(attention, inputs, options: dict, dout, dlse, trains: bool) -> dict[str, torch.Tensor]:
    inputs = dict(zip(("q", "k", "v"), inputs, strict=True))
    if "sinks" in options:
        inputs["sinks"] = options["sinks"]
    inputs = {name: x.detach().requires_grad_(trains) for name, x in inputs.items()}
    out, lse = attention(**(options | inputs))
    results = {"out": out.detach(), "lse": lse.detach()}
    if trains:
        through = ([out], [dout]) if dlse is None else ([out, lse], [dout, dlse.to(lse.dtype)])
        gradients = torch.autograd.grad(through[0], list(inputs.values()), through[1])
        results |= zip((f"d{name}" for name in inputs), gradients, strict=True)
    return results


def exact_attention(q, k, v, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, seqused_k=None, **options):
    """out and lse of float64 tensors; dense ones have a batch of one.

    Nothing of this package is in it, its masks neither: `reference` is what runs on the CPU, and a mistake there would
    not show if it were the measure too.
    """

    def sequences(x, cu_seqlens, seqused):
        begins, ends = (
            ([0], [x.shape[1]]) if cu_seqlens is None else (cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist())
        )
        if seqused is not None:
            ends = [begin + used for begin, used in zip(begins, seqused.tolist(), strict=True)]
        return [slice(*span) for span in zip(begins, ends, strict=True)]

    rows, keys, values = (x.view(-1, *x.shape[-2:]) for x in (q, k, v))
    out, lse = torch.zeros_like(rows), q.new_full(rows.shape[1::-1], -torch.inf)
    for of_q, of_k in zip(sequences(q, cu_seqlens_q, seqused_q), sequences(k, cu_seqlens_k, seqused_k), strict=True):
        out[of_q], lse[:, of_q] = exact_sequence(rows[of_q], keys[of_k], values[of_k], **options)
    return out.view_as(q), lse if q.dim() == 3 else lse[None]


def exact_sequence(q, k, v, causal=False, window_size=(-1, -1), softcap=0.0, sinks=None):
    """Of (rows, heads, head_dim)."""
    k, v = (x.repeat_interleave(HEADS // KV_HEADS, 1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) * q.shape[-1] ** -0.5
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    (left, right), (rows, keys) = window_size, scores.shape[1:]
    row, key = torch.arange(rows, device=q.device)[:, None], torch.arange(keys, device=q.device)
    ahead = key - (row + keys - rows)  # of the row's place, which is bottom-right aligned
    hidden = (ahead > 0) & causal
    hidden |= ((ahead < -left) & (left >= 0)) | ((ahead > right) & (right >= 0))
    scores = scores.masked_fill(hidden, -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.double()[:, None, None].expand(-1, rows, 1)], -1)
    lse = scores.logsumexp(-1)
    probabilities = (scores - lse[..., None]).exp()[..., :keys]
    return torch.einsum("hqk,khd->qhd", probabilities, v), lse
