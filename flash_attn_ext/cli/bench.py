"""Speed of attention at one shape on this GPU, beside torch's own.

    python -m flash_attn_ext bench --head-dim 128 --seqlen 8192 --causal

A first look: the implementations take turns, and each figure is the median of its rounds. The whole grid with more
peers is benchmarks/attention.py in the sources.

Exit code: 0 our kernels were timed, 1 they were not, 2 wrong options.
"""

import argparse
import json
import statistics
from collections.abc import Callable

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from .. import flash_attn_func, limits
from . import show
from .options import positive_int

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
HEAT_ROUNDS = 3  # not counted: the chip's clock is highest while it is cold
MEASURE_MS = 10.0  # GPU time of one measurement: long beside an event's resolution


def add_options(parser: argparse.ArgumentParser) -> None:
    option = parser.add_argument
    option("--head-dim", type=positive_int, default=128, metavar="D", help="default: 128")
    option("--seqlen", type=positive_int, default=4096, metavar="S", help="of queries and keys (default: 4096)")
    option("--batch", type=positive_int, metavar="B", help="default: 16384 tokens in all")
    option("--heads", type=positive_int, metavar="H", help="default: 2048 / head dim, rounded")
    option("--kv-heads", type=positive_int, metavar="H", help="default: as many as heads")
    option("--causal", action="store_true", help="with a causal mask, which counts half the FLOPs")
    option("--dtype", choices=list(DTYPES), default="bf16", help="default: bf16")
    option("--rounds", type=positive_int, default=11, metavar="N", help="default: 11")
    option("--json", action="store_true", help="the figures as JSON")


def run(options: argparse.Namespace) -> int:
    head_dim, seqlen = options.head_dim, options.seqlen
    batch = options.batch or max(1, 16384 // seqlen)
    heads = options.heads or options.kv_heads or max(1, round(2048 / head_dim))
    kv_heads = options.kv_heads or heads
    if heads % kv_heads != 0:
        show.error(f"bench: --heads {heads} is no multiple of --kv-heads {kv_heads}.")
        return 2
    if not torch.cuda.is_available():
        show.error("bench: it needs a GPU, and torch finds no CUDA device.")
        return 1
    shapes = [(batch, seqlen, n, head_dim) for n in (heads, kv_heads, kv_heads)]
    flops = {"forward": 4.0 * batch * heads * seqlen * seqlen * head_dim / (2 if options.causal else 1)}
    flops["backward"] = 2.5 * flops["forward"]

    try:
        q, k, v = (torch.randn(shape, device="cuda", dtype=DTYPES[options.dtype]) for shape in shapes)
        calls, reasons = bind(q, k, v, options.causal)
        times = measure(calls, options.rounds)
    except torch.OutOfMemoryError:
        show.error(
            f"bench: batch {batch}, {seqlen} tokens, {heads} heads ({kv_heads} KV heads) of {head_dim} do not fit into "
            "the GPU's memory. Make --batch, --seqlen or --heads smaller."
        )
        return 1
    figures = [
        {"implementation": name, "pass": which, "ms": ms, "tflops": flops[which] / ms / 1e9}
        for (name, which), ms in times.items()
    ]
    settings = {
        "gpu": torch.cuda.get_device_name(),
        "batch": batch,
        "seqlen": seqlen,
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "causal": options.causal,
        "dtype": options.dtype,
    }
    if options.json:
        print(json.dumps({**settings, "torch": torch.__version__, "figures": figures, "missing": reasons}, indent=2))
    else:
        print_figures(settings, times, flops, reasons)
    return 0 if ("flash_attn_ext", "forward") in times else 1


# ---- what is timed ----


def ours(q, k, v, causal):
    return flash_attn_func(q, k, v, causal=causal)


def sdpa(backend: SDPBackend) -> Callable:
    def call(q, k, v, causal):
        with sdpa_kernel(backend):
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # a view: (batch, heads, seqlen, head_dim)
            grouped = q.shape[1] != k.shape[1]
            return scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=grouped).transpose(1, 2)

    return call


IMPLEMENTATIONS = {
    "flash_attn_ext": ours,
    "SDPA, cuDNN": sdpa(SDPBackend.CUDNN_ATTENTION),
    "SDPA, FlashAttention-2": sdpa(SDPBackend.FLASH_ATTENTION),
}


def bind(q, k, v, causal: bool) -> tuple[dict[tuple[str, str], Callable], dict[str, str]]:
    """A call for each implementation and pass; and why one is missing."""
    calls, reasons = {}, {}
    dout = torch.randn_like(q)
    for name, attention in IMPLEMENTATIONS.items():
        which = "forward"
        try:
            with torch.no_grad():
                attention(q, k, v, causal)
            calls[name, which] = torch.no_grad()(lambda attention=attention: attention(q, k, v, causal))
            which = "backward"
            inputs = [x.detach().requires_grad_() for x in (q, k, v)]
            out = attention(*inputs, causal)

            def backward(out=out, inputs=inputs):
                return torch.autograd.grad(out, inputs, dout, retain_graph=True)

            backward()
            calls[name, which] = backward
        except Exception as error:  # an implementation that cannot run this shape is a missing figure
            reasons[f"{name}, {which}"] = str(error).strip().split("\n")[0]
    return calls, reasons


# ---- the clock ----


def milliseconds(call: Callable, repeat: int) -> float:
    """GPU time of one call. One more goes ahead of the clock, so that the GPU is busy while the CPU queues the rest."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    call()
    start.record()
    for _ in range(repeat):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / repeat


def measure(calls: dict[tuple[str, str], Callable], rounds: int) -> dict[tuple[str, str], float]:
    """Median milliseconds of each call; they take turns, every other round in reverse, for equal temperatures."""
    repeats = {key: max(1, round(MEASURE_MS / milliseconds(call, 1))) for key, call in calls.items()}
    samples: dict[tuple[str, str], list[float]] = {key: [] for key in calls}
    for done in range(HEAT_ROUNDS + rounds):
        for key in list(calls)[:: -1 if done % 2 else 1]:
            sample = milliseconds(calls[key], repeats[key])
            if done >= HEAT_ROUNDS:
                samples[key].append(sample)
    return {key: statistics.median(of_call) for key, of_call in samples.items()}


# ---- output ----


def print_figures(settings: dict, times: dict, flops: dict[str, float], reasons: dict[str, str]) -> None:
    mask = "causal" if settings["causal"] else "full"
    grouped = f" ({settings['kv_heads']} KV heads)" if settings["kv_heads"] != settings["heads"] else ""
    show.say(
        f"{settings['gpu']}: batch {settings['batch']}, {settings['seqlen']} tokens, {settings['heads']} heads{grouped}"
        f" of {settings['head_dim']}, {mask}, {settings['dtype']}",
        "bold",
    )
    rows = []
    for name in IMPLEMENTATIONS:
        row = [name]
        for which in ("forward", "backward"):
            ms = times.get((name, which))
            row += [f"{ms:.3f}", f"{flops[which] / ms / 1e9:.0f}"] if ms else ["-", "-"]
        rows.append(row)
    show.table(["", ">forward ms", ">TFLOP/s", ">backward ms", ">TFLOP/s"], rows)
    for what, why in reasons.items():
        show.say(f"{what}: {why}", "yellow")
    if why := limits.why_unavailable():
        show.say(f"flash_attn_ext: {why}", "yellow")
