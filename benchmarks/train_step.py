#!/usr/bin/env python3
"""A training step of Llama-3-8B's layers with each attention: forward, backward and optimizer, on one GPU.

    python benchmarks/train_step.py --name h200 --fa3-library fa3.so    about half a minute
    python benchmarks/train_step.py --seqlen 32768 --layers 2
    python benchmarks/train_step.py --dry-run                           the sizes, without a GPU

The layers are those of the 8B model: 4096 wide, an MLP of 14336, 32 query and 8 KV heads of 128, rotary positions,
weights and activations in bf16, AdamW. Four of its 32 layers fit beside their optimizer state, and every layer costs
the same; embedding and output layer are left out. One set of weights serves all: the attentions take turns, step by
step, every other round in reverse. `none` passes q through in attention's place, so that a step's distance from it is
what attention costs.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from attention import environment, spread
from peers import usable_peers
from screen import reason, say, show
from tables import PEER_NAMES, RESULTS, csrc_sha256
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from flash_attn_ext.cli.options import positive_int  # `tables` put this checkout on the path

WARMUP_STEPS = 2  # of each attention: the first allocates, and chooses kernels
HEAT_SECONDS = 1.5
# The attentions differ by their roundings only; a wrong gradient is off by much more than a per cent or two.
MAX_GRADIENT_ERROR = 0.05

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]  # (batch, seqlen, heads, head_dim) in and out


@dataclass(frozen=True)
class Size:
    """The fields are keys in the results file."""

    layers: int
    batch: int
    seqlen: int
    width: int = 4096
    mlp: int = 14336
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128

    @property
    def layer_parameters(self) -> int:
        attention = 2 * self.width * (self.heads + self.kv_heads) * self.head_dim
        return attention + 3 * self.width * self.mlp

    @property
    def flops(self) -> float:
        """Of one step, as model FLOPs are counted: nothing for what a backward computes again."""
        products = 6 * self.layer_parameters * self.batch * self.seqlen
        attention = 3 * 2 * self.batch * self.heads * self.seqlen**2 * self.head_dim
        return float(self.layers * (products + attention))


# ---- the attentions ----


def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from flash_attn_ext import flash_attn_func

    return flash_attn_func(q, k, v, causal=True)


class FA3(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, lse, *_ = torch.ops.flash_attn_3.fwd(q, k, v, is_causal=True)
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    def backward(ctx, dout: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, out, lse = ctx.saved_tensors
        dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
        torch.ops.flash_attn_3.bwd(dout, q, k, v, out, lse, dq, dk, dv, is_causal=True)
        return dq, dk, dv


def sdpa(backend: SDPBackend) -> Attention:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)

    return attention


def none(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return q


ATTENTIONS: dict[str, Attention] = {
    "ours": ours,
    "fa3": FA3.apply,
    "cudnn": sdpa(SDPBackend.CUDNN_ATTENTION),
    "fa2": sdpa(SDPBackend.FLASH_ATTENTION),
    "none": none,
}
NAMES = PEER_NAMES | {"none": "none"}


# ---- the model ----


class Layer(nn.Module):
    def __init__(self, size: Size) -> None:
        super().__init__()
        self.heads, self.head_dim = (size.heads, size.kv_heads, size.kv_heads), size.head_dim
        self.norm1, self.norm2 = nn.RMSNorm(size.width), nn.RMSNorm(size.width)
        self.qkv = nn.Linear(size.width, sum(self.heads) * size.head_dim, bias=False)
        self.proj = nn.Linear(size.heads * size.head_dim, size.width, bias=False)
        self.up = nn.Linear(size.width, 2 * size.mlp, bias=False)  # gate and up in one product
        self.down = nn.Linear(size.mlp, size.width, bias=False)

    def before(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (-1, self.head_dim)).split(self.heads, dim=2)
        return rotate(q, cos, sin), rotate(k, cos, sin), v

    def after(self, x: Tensor, out: Tensor) -> Tensor:
        x = x + self.proj(out.flatten(2))
        gate, up = self.up(self.norm2(x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class Layers(nn.Module):
    def __init__(self, size: Size, compiled: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(size) for _ in range(size.layers))
        frequencies = 500000.0 ** -torch.linspace(0, 1, size.head_dim // 2 + 1)[:-1]
        angles = torch.arange(size.seqlen)[:, None, None] * frequencies
        dtype = next(self.parameters()).dtype
        self.register_buffer("cos", angles.cos().to(dtype))
        self.register_buffer("sin", angles.sin().to(dtype))
        # The parts round attention are compiled, never attention itself: so each peer gets the same layer.
        self.before, self.after = (
            (torch.compile(Layer.before), torch.compile(Layer.after)) if compiled else (Layer.before, Layer.after)
        )

    def forward(self, x: Tensor, attention: Attention) -> Tensor:
        for layer in self.layers:
            x = self.after(layer, x, attention(*self.before(layer, x, self.cos, self.sin)))
        return x


# ---- measuring ----


class Bench:
    def __init__(self, size: Size, compiled: bool) -> None:
        torch.manual_seed(0)
        torch.set_default_dtype(torch.bfloat16)
        with torch.device("cuda"):
            self.model = Layers(size, compiled)
            self.x = torch.randn(size.batch, size.seqlen, size.width)
        torch.set_default_dtype(torch.float32)
        # A step of size 0: all the work of an update, and every attention goes on seeing the same weights.
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.0, weight_decay=0.0, fused=True)

    def step(self, attention: Attention) -> None:
        self.model(self.x, attention).square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def seconds(self, attention: Attention) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        self.step(attention)
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000

    def peak_bytes(self, attention: Attention) -> int:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        self.step(attention)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()


def gradients(size: Size, attention: Attention) -> list[Tensor]:
    """Of q, k and v. Normally distributed, so that some keys matter: with the scores of untrained layers none would."""
    generator = torch.Generator("cuda").manual_seed(1)
    q, k, v, dout = (
        torch.randn(
            size.batch, size.seqlen, heads, size.head_dim, device="cuda", dtype=torch.bfloat16, generator=generator
        )
        for heads in (size.heads, size.kv_heads, size.kv_heads, size.heads)
    )
    inputs = [x.requires_grad_() for x in (q, k, v)]
    return [x.float() for x in torch.autograd.grad(attention(*inputs), inputs, dout)]


def runnable(bench: Bench, size: Size, peers: list[str]) -> list[str]:
    """The attentions that run and whose gradients are right; says why the others are left out."""
    expected, usable = None, []
    # FA2 judges: a fast wrong backward must not be timed silently.
    for peer in sorted(peers, key=lambda peer: peer != "fa2"):
        try:
            if peer == "fa2":
                expected = gradients(size, ATTENTIONS[peer])
            elif expected and peer != "none":
                for name, ours, right in zip("qkv", gradients(size, ATTENTIONS[peer]), expected, strict=True):
                    error = (torch.linalg.vector_norm(ours - right) / torch.linalg.vector_norm(right)).item()
                    if not error <= MAX_GRADIENT_ERROR:  # NaN included
                        raise ArithmeticError(f"wrong gradient of {name}: relative error {error:.3g}")
            for _ in range(WARMUP_STEPS):
                bench.step(ATTENTIONS[peer])
            usable.append(peer)
        except Exception as failure:  # the others still run
            say(f"{NAMES[peer]} is left out: {reason(failure)}")
            bench.optimizer.zero_grad()
    if expected is None:
        say("FA2 did not run, so no gradient was compared.")
    return [peer for peer in peers if peer in usable]


def measure(
    seconds: Callable[[str], float], peers: list[str], rounds: int, heat_seconds: float = HEAT_SECONDS
) -> dict[str, list[float]]:
    """The times of all rounds. seconds: takes a step with the peer of this name, and returns how long it took."""
    times: dict[str, list[float]] = {peer: [] for peer in peers}
    stop = time.monotonic() + heat_seconds
    while time.monotonic() < stop:  # so that nobody has the cold chip to itself
        for peer in peers:
            seconds(peer)
    for done in range(rounds):
        for peer in peers[:: -1 if done % 2 else 1]:
            times[peer].append(seconds(peer))
    return times


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, width=120)
    )
    option = parser.add_argument
    option(
        "--peers",
        dest="chosen_peers",
        nargs="+",
        choices=list(ATTENTIONS),
        default=list(ATTENTIONS),
        help="default: all of them",
    )
    option("--layers", type=positive_int, default=4)
    option("--batch", type=positive_int, default=1)
    option("--seqlen", type=positive_int, default=8192)
    option("--rounds", type=positive_int, default=15, help="steps of each attention that count (default 15)")
    option("--compile", action="store_true", help="torch.compile for the layer, attention excepted (a minute more)")
    option("--fa3-library", type=Path, metavar="PATH", help="FA3's operators; else the package flash_attn_interface")
    option("--name", default="gpu", help="of the machine, in the results file's name: NAME-train-step.json")
    option("--output", type=Path, help="the results file, in place of benchmarks/results/NAME-train-step.json")
    option("--dry-run", action="store_true", help="print the sizes and stop; needs no GPU")
    return parser.parse_args()


def main() -> int:
    args = parse_args()
    size = Size(args.layers, args.batch, args.seqlen)
    parameters = size.layers * size.layer_parameters
    say(
        f"{size.layers} layers of {size.layer_parameters / 1e6:.0f} M parameters, {size.batch} x {size.seqlen} tokens: "
        f"{size.flops / 1e12:.1f} TFLOP a step, {parameters * 8 / 2**30:.1f} GiB for weights, gradients and AdamW"
    )
    if args.dry_run:
        return 0
    if not torch.cuda.is_available():
        say("no CUDA device; --dry-run shows what would be measured")
        return 1

    begin = time.monotonic()
    facts = environment()
    say(", ".join(f"{key} {value}" for key, value in facts.items()))
    peers_with_attention = [peer for peer in args.chosen_peers if peer != "none"]
    usable = [*usable_peers(peers_with_attention, args.fa3_library), *(["none"] if "none" in args.chosen_peers else [])]
    bench = Bench(size, args.compile)
    peers = runnable(bench, size, usable)
    if not peers:
        say("No attention is left to measure.")
        return 1
    times = measure(lambda peer: bench.seconds(ATTENTIONS[peer]), peers, args.rounds)
    median = {peer: statistics.median(rounds) for peer, rounds in times.items()}
    memory = {peer: bench.peak_bytes(ATTENTIONS[peer]) for peer in peers}

    tokens = size.batch * size.seqlen
    bare = median.get("none", math.nan)
    results, rows = {}, []
    for peer in peers:
        seconds = median[peer]
        share = 1 - bare / seconds
        results[peer] = {
            "step_ms": round(1000 * seconds, 3),
            "spread_percent": round(spread(times[peer]), 2),
            "tokens_per_second": round(tokens / seconds),
            "attention_share": None if math.isnan(share) else round(share, 4),
            "peak_gib": round(memory[peer] / 2**30, 3),
        }
        rows.append(
            [
                NAMES[peer],
                f"{1000 * seconds:.2f} ({results[peer]['spread_percent']:.1f} %)",
                f"{tokens / seconds:,.0f}",
                f"{median['ours'] / seconds:.3f}" if "ours" in median and peer != "none" else "–",
                f"{share:.1%}" if not math.isnan(share) and peer != "none" else "–",
                f"{size.flops / seconds / 1e12:.0f}" if peer != "none" else "–",
                f"{memory[peer] / 2**30:.2f}",
            ]
        )
    show(["attention", "step, ms (spread)", "tokens/s", "speed / ours", "its share", "TFLOP/s", "peak GiB"], rows)
    path = args.output or RESULTS / f"{args.name}-train-step.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    everything = {
        "environment": facts,
        "csrc_sha256": csrc_sha256(),
        "size": asdict(size),
        "compiled": args.compile,
        "rounds": args.rounds,
        "attention": results,
    }
    path.write_text(json.dumps(everything, indent=1) + "\n")
    say(f"{time.monotonic() - begin:.0f} s in all; wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
