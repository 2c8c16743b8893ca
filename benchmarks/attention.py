#!/usr/bin/env python3
"""Speed of attention on one GPU beside its peers: the grid of the FlashAttention papers, shapes of models, packed
sequences, sliding windows, deterministic gradients, other head dims; and what options of a call cost.

    python benchmarks/attention.py --dry-run                      the cells, without a GPU
    python benchmarks/attention.py --name h200 --plots            the papers' grid, both passes, every peer
    python benchmarks/attention.py --name h200 --grid models      grouped-query shapes that people train; or packed, ...
    python benchmarks/attention.py --pass backward --peers ours fa3 --head-dims 80 128 --seqlens 16384
    python benchmarks/attention.py --overhead --no-grid           CPU time of one call

A GPU's clock moves with its temperature by up to 10 %, so a figure means little alone: in every cell the peers take
turns, round after round, and each figure is the median of its rounds. docs/performance.md has the whole method.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from peers import BINDERS, Call, Pattern, usable_peers
from screen import reason, say, show, with_progress
from tables import (
    GRID_NAMES,
    MASK_NAMES,
    OURS,
    PEER_NAMES,
    RESULTS,
    by_pass,
    csrc_sha256,
    grid_peers,
    ratio,
    remarks,
    shape,
    size,
    summary,
)
from torch.nn.attention import SDPBackend, sdpa_kernel

from flash_attn_ext.cli.options import positive_int  # `tables` put this checkout on the path
from flash_attn_ext.limits import has_pass

HIDDEN_SIZE, TOKENS = 2048, 16384  # batch = TOKENS / seqlen
PAPER_DIMS = (64, 128, 256)
HEAD_DIMS = {name: [dim for dim in PAPER_DIMS if has_pass(name, dim)] for name in ("forward", "backward")}  # of a grid
SEQLENS = (512, 1024, 2048, 4096, 8192, 16384)
TOKENS_8K = ((1, 8192), (2, 4096), (4, 2048))
# Shapes that people train, all causal: (heads, KV heads, head dim) -> (batch, seqlen) of each cell.
MODELS = {
    (32, 8, 128): ((1, 512), (1, 2048), *TOKENS_8K, (1, 32768)),  # Llama 3 8B; one short sequence may leave SMs idle
    (64, 8, 128): (*TOKENS_8K, (1, 32768)),  # Llama 3 70B
    (28, 4, 128): ((1, 8192),),  # Qwen2.5 7B
    (40, 8, 128): ((1, 8192),),  # Qwen2.5 14B and 32B
    (32, 1, 128): ((1, 8192),),  # multi-query: all heads on one KV head
    (64, 8, 64): TOKENS_8K,  # gpt-oss
    (8, 4, 256): ((1, 8192), (2, 4096)),  # Gemma 2 2B
    (16, 8, 256): ((1, 8192), (2, 4096)),  # Gemma 2 9B
}


def log_uniform(count: int, least: int, most: int, seed: int) -> tuple[int, ...]:
    """So many lengths, the same ones in every run, with a long tail: each doubling is as likely as any other."""
    draw = random.Random(seed).random
    return tuple(round(least * (most / least) ** draw()) for _ in range(count))


# The other grids have the heads of two models: Llama 3 8B and gpt-oss.
HEADS = ((32, 8, 128), (64, 8, 64))
# The lengths of packed sequences, 16384 to 65536 tokens in all, by their name in the tables.
PACKINGS = {
    "8 of 2048": (2048,) * 8,
    "24 of 64 to 8192": log_uniform(24, 64, 8192, seed=8),
    "1024 of about 64": log_uniform(1024, 48, 83, seed=0),
}
# On the grid of other head dims: of language models; and of vision towers, over packed images without a mask.
LANGUAGE_DIMS, VISION_DIMS, VISION_HEADS = (96, 192), (72, 80), 16
IMAGES = {"16 of 1024": (1024,) * 16, "4 of 4096": (4096,) * 4}
LENGTHS = PACKINGS | IMAGES
WINDOWS = (None, 4096, 1024)
# Of each grid but the papers', all causal: heads, KV heads, head dim, batch, seqlen, and what else a cell has.
LISTS = {
    "models": [(*heads, batch, s, {}) for heads, sizes in MODELS.items() for batch, s in sizes],
    "packed": [
        (*heads, len(lengths), max(lengths), {"packing": name}) for heads in HEADS for name, lengths in PACKINGS.items()
    ],
    "windows": [(*heads, 1, 32768, {"window": window}) for heads in HEADS for window in WINDOWS],
    "options": [(*heads, 2, 4096, {}) for heads in HEADS],
}
MASKS = {"full": False, "causal": True}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}

HEAT_SECONDS = 1.5  # of matrix products before the first cell, so that no cell has a cold chip to itself
MEASURE_MS = 7.0  # GPU time of one measurement: long beside an event's resolution, short beside a change of clock
MIN_ROUNDS = 3  # even where the time budget is used up
# Calls this short, so many to a measurement, may end before the CPU has queued the next ones. The GPU then waits ahead
# of the clock until all are queued, which are not too many for that: 2 million cycles are about a millisecond.
SHORT_CALLS = 35
MOST_CALLS = 100
WAIT_CYCLES = round(2 * MEASURE_MS * 2e6)
# Two right kernels differ by their roundings, 1 % or less in the worst of the parts that are compared: a row of out, or
# 64 rows of a gradient, since a single row of dq or dk can be all cancellation, and so all rounding.
MAX_ERROR = 0.03
COMPARED_ROWS = {"forward": 1, "backward": 64}
REPEATS = 10  # of a deterministic call, which have to agree bit for bit


@dataclass(frozen=True)
class Cell:
    """One point of a grid. The fields are the keys in the results file, with `pass` for pass_name and without None.

    Packed sequences have a batch of as many as there are, and the seqlen of the longest.
    """

    pass_name: str
    head_dim: int
    causal: bool
    batch: int
    seqlen_q: int
    seqlen_k: int
    heads: int
    kv_heads: int
    dtype: str
    window: int | None = None  # so many keys, the query's own the last of them
    packing: str | None = None  # a key of LENGTHS

    @property
    def pairs(self) -> float:
        """Of a query and a key that it sees, in one head.

        A causal mask leaves half of them: that is how the papers count. With windows and in packed causal sequences
        they are counted one by one.
        """
        if self.packing:
            return float(sum(visible_pairs(n) if self.causal else n * n for n in LENGTHS[self.packing]))
        if self.window:
            return float(self.batch * visible_pairs(self.seqlen_q, self.window))
        return self.batch * self.seqlen_q * self.seqlen_k / (2 if self.causal else 1)

    @property
    def flops(self) -> float:
        """Two products of two operations per pair and element of a head, five in the backward."""
        forward = 4.0 * self.heads * self.head_dim * self.pairs
        return forward * {"forward": 1, "backward": 2.5}[self.pass_name]

    def pattern(self) -> Pattern:
        if self.packing:
            return Pattern.packed(LENGTHS[self.packing], causal=self.causal)
        return Pattern(self.causal, self.window)

    def inputs(self) -> list[torch.Tensor]:
        """q, k, v and dout as (batch, seqlen, heads, head_dim), packed (total, heads, head_dim).

        On the papers' grid they have 64 MiB each: L2 never holds those of a whole call.
        """
        rows_q, rows_k = (self.batch, self.seqlen_q), (self.batch, self.seqlen_k)
        if self.packing:
            rows_q = rows_k = (sum(LENGTHS[self.packing]),)
        size_q = (*rows_q, self.heads, self.head_dim)
        size_kv = (*rows_k, self.kv_heads, self.head_dim)
        sizes = (size_q, size_kv, size_kv, size_q)
        return [torch.randn(size, device="cuda", dtype=DTYPES[self.dtype]) for size in sizes]

    def record(self) -> dict:
        fields = {name: value for name, value in asdict(self).items() if value is not None}
        return {"pass": fields.pop("pass_name"), **fields}


def visible_pairs(length: int, window: int | None = None) -> int:
    """Of a query and a key that it sees in a causal sequence: query i sees i + 1 keys, and at most the window."""
    growing = min(length, window or length)
    return growing * (growing + 1) // 2 + (length - growing) * growing


def paper_grid(
    pass_name: str,
    dtype: str,
    head_dims: Iterable[int] | None = None,
    seqlens: Iterable[int] | None = None,
    masks: Iterable[str] = tuple(MASKS),
) -> list[Cell]:
    """One pass on the papers' grid. Any head dim and sequence length will do: the rest of a shape follows from them.
    Heads are whole, and so the hidden size is about the papers' where the head dim does not divide it."""
    return [
        Cell(pass_name, dim, MASKS[mask], max(1, TOKENS // s), s, s, heads, heads, dtype)
        for dim in head_dims or HEAD_DIMS[pass_name]
        for heads in [max(1, round(HIDDEN_SIZE / dim))]
        for mask in masks
        for s in seqlens or SEQLENS
    ]


def listed_grid(
    grid: str,
    pass_name: str,
    dtype: str,
    head_dims: Iterable[int] | None = None,
    seqlens: Iterable[int] | None = None,
    masks: Iterable[str] = tuple(MASKS),
) -> list[Cell]:
    """One pass on another grid: those cells that have such a head dim, sequence length and mask."""
    return [
        Cell(pass_name, dim, True, batch, s, s, heads, kv_heads, dtype, **more)
        for heads, kv_heads, dim, batch, s, more in LISTS[grid]
        if has_pass(pass_name, dim) and dim in (head_dims or [dim]) and s in (seqlens or [s]) and "causal" in masks
    ]


def deterministic_grid(
    pass_name: str,
    dtype: str,
    head_dims: Iterable[int] | None = None,
    seqlens: Iterable[int] | None = None,
    masks: Iterable[str] = tuple(MASKS),
) -> list[Cell]:
    """The papers' shapes, where many thread blocks add to each row. Every forward is deterministic by itself."""
    return paper_grid(pass_name, dtype, head_dims, seqlens or (4096, 8192, 16384), masks) * (pass_name == "backward")


def dims_grid(
    pass_name: str,
    dtype: str,
    head_dims: Iterable[int] | None = None,
    seqlens: Iterable[int] | None = None,
    masks: Iterable[str] = tuple(MASKS),
) -> list[Cell]:
    """Those cells of one pass at other head dims that have such a head dim, sequence length and mask: the papers'
    shapes, and 16384 tokens of packed images."""
    cells = paper_grid(pass_name, dtype, LANGUAGE_DIMS)
    for dim in VISION_DIMS:
        for name, (length, *others) in IMAGES.items():
            sizes = 1 + len(others), length, length, VISION_HEADS, VISION_HEADS
            cells.append(Cell(pass_name, dim, False, *sizes, dtype, packing=name))
    return [
        cell
        for cell in cells
        if has_pass(pass_name, cell.head_dim)
        and cell.head_dim in (head_dims or [cell.head_dim])
        and cell.seqlen_q in (seqlens or [cell.seqlen_q])
        and MASK_NAMES[cell.causal] in masks
    ]


GRIDS = {"paper": paper_grid} | {grid: partial(listed_grid, grid) for grid in LISTS}
GRIDS |= {"deterministic": deterministic_grid, "dims": dims_grid}
assert list(GRIDS) == list(GRID_NAMES)


# ---- measuring ----


def milliseconds(call: Callable[[], object], calls: int, wait: bool = False) -> float:
    """GPU time of one call. One more goes ahead of the clock, so that the GPU is busy while the CPU queues the rest."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    if wait:
        torch.cuda._sleep(WAIT_CYCLES)
    call()
    start.record()
    for _ in range(calls):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / calls


def calls_per_measurement(call: Callable[[], object]) -> int:
    """By the GPU's time of a call, also where the CPU takes longer to queue it."""
    return max(1, min(MOST_CALLS, round(MEASURE_MS / milliseconds(call, 1, wait=True))))


def worst_error(result: torch.Tensor, expected: torch.Tensor, rows: int) -> float:
    """The largest relative error of so many neighbouring rows of one head; NaN if there is one."""

    def norms(x: torch.Tensor) -> torch.Tensor:
        squares = x.square().sum(-1)  # (..., seqlen, heads)
        squares = F.pad(squares, (0, 0, 0, -squares.shape[-2] % rows))
        return squares.unflatten(-2, (-1, rows)).sum(-2).sqrt()

    if result.shape != expected.shape:  # they might still broadcast: the gradient of a single KV head, for one
        raise ArithmeticError(f"wrong results: shape {tuple(result.shape)} in place of {tuple(expected.shape)}")
    expected = expected.float()
    return (norms(result.float() - expected) / norms(expected)).max().item()


def check_every_run(call: Call) -> None:
    """Raises if results differ from run to run: some versions of FA3 take `deterministic` and ignore it."""
    first = [x.clone() for x in call()]
    for _ in range(REPEATS):
        if not all(map(torch.equal, call(), first)):
            raise ArithmeticError("its results are not the same in every run")


class Ceiling:
    """cuBLAS on 8192^3, measured now and again through the run: what this chip gives at the run's temperature."""

    SIZE = 8192

    def __init__(self, dtype: str) -> None:
        a, b = (torch.randn(self.SIZE, self.SIZE, device="cuda", dtype=DTYPES[dtype]) for _ in range(2))
        out = torch.empty_like(a)
        self.call = lambda: torch.mm(a, b, out=out)
        self.times: list[float] = []
        self.call()
        self.calls = calls_per_measurement(self.call)

    def heat(self, seconds: float) -> None:
        stop = time.monotonic() + seconds
        while time.monotonic() < stop:
            milliseconds(self.call, self.calls)

    def measure(self) -> None:
        self.times.append(milliseconds(self.call, self.calls))

    @property
    def tflops(self) -> float:
        return 2 * self.SIZE**3 / statistics.median(self.times) / 1e9


def in_turn(peers: list[str], done: int) -> list[str]:
    """The order of the round after so many. In as many rounds as there are peers, or twice as many if their number is
    odd, each follows each other one equally often (Williams 1949): nobody profits from one that leaves the chip cool.
    """
    count = len(peers)
    zigzag = [(i + 1) // 2 if i % 2 else -i // 2 for i in range(count)]  # 0, 1, -1, 2, -2, ...
    order = [peers[(place + done) % count] for place in zigzag]
    return order[::-1] if done // count % 2 else order


def measure_cell(cell: Cell, peers: list[str], rounds: int, seconds: float) -> dict[str, list[float]]:
    """TFLOP/s of each peer, round by round. Says why a peer is missing: it raised, or its results are wrong or, of a
    deterministic one, not the same in every run."""
    stop = time.monotonic() + seconds
    inputs, pattern = cell.inputs(), cell.pattern()

    def bind(peer: str) -> Call:
        return BINDERS[peer][cell.pass_name](*(x.detach() for x in inputs), pattern)

    # One judge for all: torch's FA2, the oldest of them. A fast wrong kernel must not be timed silently.
    expected = bind("fa2")()
    rows = COMPARED_ROWS[cell.pass_name]
    calls, counts = {}, {}
    for peer in peers:
        try:
            call = bind(peer)
            errors = [worst_error(a, b, rows) for a, b in zip(call(), expected, strict=True)]
            if not all(error <= MAX_ERROR for error in errors):  # NaN included
                raise ArithmeticError(f"wrong results: relative errors {', '.join(f'{x:.3g}' for x in errors)}")
            if peer.endswith("deterministic"):
                check_every_run(call)
            counts[peer] = calls_per_measurement(call)
            calls[peer] = call
        except Exception as failure:  # a peer that cannot run this cell is a missing figure, not the end of the run
            say(f"{PEER_NAMES[peer]}, {label(cell)}: {reason(failure)}")
    wait = any(count > SHORT_CALLS for count in counts.values())  # all or none: a wait cools the chip
    speeds: dict[str, list[float]] = {peer: [] for peer in calls}
    for done in range(rounds):
        if done >= MIN_ROUNDS and time.monotonic() > stop:
            break
        for peer in in_turn(list(calls), done):
            speeds[peer].append(cell.flops / milliseconds(calls[peer], counts[peer], wait) / 1e9)
    return speeds


@contextlib.contextmanager
def circumstances(name: str) -> Iterator[None]:
    """Of a call of measure_overhead, by its name: flash is torch's own, sdpa_ours the same call on our kernels."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.set_grad_enabled(name.endswith("_grad")))
        if name.startswith(("sdpa_flash", "sdpa_ours")):
            stack.enter_context(sdpa_kernel(SDPBackend.FLASH_ATTENTION))
        if name.startswith("sdpa_ours"):
            from flash_attn_ext import sdpa

            stack.enter_context(sdpa())
        yield


def measure_overhead(peers: list[str], dtype: str, calls: int = 1000, turn: int = 50) -> dict[str, float]:
    """CPU time of a call in microseconds: median of `calls` calls on an idle GPU, the peers taking turns."""
    cell = Cell("forward", 128, False, 1, 128, 128, 8, 8, dtype)
    q, k, v, _ = cell.inputs()
    qt, kt, vt = (x.transpose(1, 2).contiguous() for x in (q, k, v))
    (qg, kg, vg), (qtg, ktg, vtg) = ([x.clone().requires_grad_() for x in xs] for xs in ((q, k, v), (qt, kt, vt)))
    bound: dict[str, Callable[[], object]] = {}
    for name in ("sdpa", "sdpa_flash", *(["sdpa_ours"] if "ours" in peers else [])):
        bound[name] = lambda: F.scaled_dot_product_attention(qt, kt, vt)
        bound[f"{name}_grad"] = lambda: F.scaled_dot_product_attention(qtg, ktg, vtg)
    if "fa3" in peers:
        bound["fa3"] = lambda forward=torch.ops.flash_attn_3.fwd: forward(q, k, v, is_causal=False)
    if "ours" in peers:
        from flash_attn_ext import _C, flash_attn_func
        from flash_attn_ext.options import Options

        options = Options(softmax_scale=cell.head_dim**-0.5)
        bound["ours"] = lambda: flash_attn_func(q, k, v)
        bound["ours_grad"] = lambda: flash_attn_func(qg, kg, vg)
        bound["ours_raw"] = lambda: _C.forward(q, k, v, options)
    times: dict[str, list[int]] = {}
    for name, call in bound.items():
        try:
            with circumstances(name):
                for _ in range(20):
                    call()
                torch.cuda.synchronize()
            times[name] = []
        except Exception as failure:
            say(f"{name}, CPU time of a call: {reason(failure)}")
    gc.disable()
    for _ in range(calls // turn):
        for name, samples in times.items():
            call = bound[name]
            with circumstances(name):
                for _ in range(turn):
                    torch.cuda.synchronize()
                    begin = time.perf_counter_ns()
                    out = call()
                    samples.append(time.perf_counter_ns() - begin)
                    del out  # after the clock: freeing is not part of the call
    gc.enable()
    return {name: round(statistics.median(samples) / 1000, 2) for name, samples in times.items()}


def environment() -> dict[str, str]:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        driver = "unknown"
    cudnn = torch.backends.cudnn.version() or 0
    return {
        "gpu": torch.cuda.get_device_name(),
        "driver": driver,
        "cuda": torch.version.cuda,
        "cudnn": f"{cudnn // 10000}.{cudnn // 100 % 100}.{cudnn % 100}",
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


# ---- showing ----


def label(cell: Cell) -> str:
    return f"{cell.pass_name}, {shape(cell.record())}, {MASK_NAMES[cell.causal]}"


def spread(of_rounds: list[float]) -> float:
    """The middle half of the rounds, in per cent of their median."""
    if len(of_rounds) < 2:
        return 0.0
    low, middle, high = statistics.quantiles(of_rounds, n=4, method="inclusive")
    return 100 * (high - low) / middle


def show_speeds(cells: list[dict], spreads: list[dict[str, float]], peers: list[str]) -> None:
    """TFLOP/s of every cell with the spread of its rounds, and our speed over FA3's."""
    rows = []
    for cell, of_peer in zip(cells, spreads, strict=True):
        figures = [
            f"{cell['tflops'][peer]:.0f} ({of_peer[peer]:.1f} %)" if cell["tflops"][peer] else "–" for peer in peers
        ]
        beside = f"{ratio(cell):.3f}" if ratio(cell) else "–"
        rows.append([cell["pass"], shape(cell), MASK_NAMES[cell["causal"]], *figures, beside])
    show(["pass", "shape", "mask", *(PEER_NAMES[peer] for peer in peers), "ours / FA3"], rows)
    for name, of_pass in by_pass(cells).items():
        with_remarks = {"fa3", "fa3_deterministic", *OURS}
        others = [line for peer in peers if peer not in with_remarks for line in summary(of_pass, peer)]
        for line in remarks(of_pass) + others:
            say(f"{name}, {line}")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, width=120)
    )
    option = parser.add_argument
    passes = list(HEAD_DIMS)
    option("--pass", dest="passes", nargs="+", choices=passes, default=passes, help="what to time (default: both)")
    option(
        "--grid",
        choices=list(GRIDS),
        default="paper",
        help="paper (default); models: shapes that people train; packed: packed sequences; windows: sliding windows; "
        "options: what sinks and a loss that uses lse cost; deterministic: gradients that are the same in every run; "
        "dims: other head dims than the papers'. On paper and deterministic the next three may name other head dims "
        "and lengths, with round(2048 / D) heads; elsewhere they only select cells",
    )
    option("--head-dims", nargs="+", type=positive_int, metavar="D", help="default: all of the grid")
    option("--seqlens", nargs="+", type=positive_int, metavar="S", help="default: all of the grid")
    option(
        "--masks",
        nargs="+",
        choices=list(MASKS),
        default=list(MASKS),
        help="default: both; models, packed, windows and options have causal only",
    )
    option(
        "--peers",
        dest="chosen_peers",
        nargs="+",
        choices=list(BINDERS),
        help="default: those of the grid. The first of them are ours; plain, dlse and sinks are those of `options`",
    )
    option("--dtype", choices=list(DTYPES), default="bf16")
    option("--fa3-library", type=Path, metavar="PATH", help="FA3's operators; else the package flash_attn_interface")
    option("--rounds", type=int, default=15, help=f"at most this many a cell, at least {MIN_ROUNDS} (default 15)")
    option("--time-budget", type=float, default=120, metavar="SECONDS", help="fewer rounds when it runs short (120)")
    option("--overhead", action="store_true", help="also the CPU time of one call")
    option("--no-grid", action="store_true", help="only --overhead")
    option("--name", default="gpu", help="of the machine, in the results file's name: NAME-GRID-DTYPE.json")
    option("--output", type=Path, help="the results file, in place of benchmarks/results/NAME-GRID-DTYPE.json")
    option("--plots", action="store_true", help="also PNG plots into docs/images/")
    option("--dry-run", action="store_true", help="print the cells and stop; needs no GPU")
    args = parser.parse_args()
    args.chosen_peers = args.chosen_peers or grid_peers(args.grid)
    return args


def results_path(args: argparse.Namespace, cells: list[Cell]) -> Path:
    """A part of the grid never overwrites the results of the whole."""
    every = {cell for name in HEAD_DIMS for cell in GRIDS[args.grid](name, args.dtype)}
    whole = set(cells) == every and set(args.chosen_peers) == set(grid_peers(args.grid))
    return args.output or RESULTS / f"{args.name}-{args.grid if whole else 'part'}-{args.dtype}.json"


def dry_run(cells: list[Cell], peers: list[str]) -> None:
    rows = [
        [
            *map(str, (c.pass_name, c.head_dim, MASK_NAMES[c.causal], size(c.record()))),
            f"{c.heads}/{c.kv_heads}",
            f"{c.flops / 1e12:.3f}",
        ]
        for c in cells
    ]
    show(["pass", "head dim", "mask", "sequences", "heads", "TFLOP"], rows)
    say(f"{len(cells)} cells, peers: {', '.join(peers)}")


@torch.no_grad()
def main() -> int:
    args = parse_args()
    cells = [
        cell
        for name in ([] if args.no_grid else dict.fromkeys(args.passes))
        for cell in GRIDS[args.grid](name, args.dtype, args.head_dims, args.seqlens, args.masks)
    ]
    if not cells and not args.no_grid:
        say(f"the grid has no such cell; --grid {args.grid} --dry-run shows all of them")
        return 2
    if args.dry_run:
        dry_run(cells, args.chosen_peers)
        return 0
    if not torch.cuda.is_available():
        say("no CUDA device; --dry-run shows what would be measured")
        return 1

    begin = time.monotonic()
    torch.manual_seed(0)
    peers = usable_peers(args.chosen_peers, args.fa3_library)
    results = {
        "grid": args.grid,
        "environment": environment(),
        "csrc_sha256": csrc_sha256(),
        "ceiling_tflops": None,
        "cells": [],
    }
    path = results_path(args, cells)

    def save() -> None:  # after every cell: a run that is cut short keeps what it has
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(results, indent=1) + "\n")

    say(", ".join(f"{key} {value}" for key, value in results["environment"].items()))
    if not OURS.isdisjoint(peers):
        say(f"ours is {sys.modules['flash_attn_ext'].__file__}")
    if args.overhead:
        results["overhead_us"] = measure_overhead(peers, args.dtype)
        for name, microseconds in results["overhead_us"].items():
            say(f"CPU time of a call, {name}: {microseconds:.1f} us")
        of_sdpa = (("sdpa_ours", "sdpa_flash"), ("sdpa_ours_grad", "sdpa_flash_grad"))
        for ours, theirs in (("ours", "fa3"), ("ours_grad", "sdpa_grad"), *of_sdpa):
            if results["overhead_us"].get(ours) and results["overhead_us"].get(theirs):
                say(f"{ours} / {theirs}: {results['overhead_us'][ours] / results['overhead_us'][theirs]:.2f}")
    if not cells:
        if args.output:
            save()
        return 0

    ceiling = Ceiling(args.dtype)
    ceiling.heat(HEAT_SECONDS)
    spreads = []
    for index, cell in enumerate(with_progress(cells, label)):
        left = args.time_budget - (time.monotonic() - begin)
        speeds = measure_cell(cell, peers, args.rounds, left / (len(cells) - index))
        ceiling.measure()
        tflops = {
            peer: round(statistics.median(speeds[peer]), 1) if peer in speeds else None for peer in args.chosen_peers
        }
        results["cells"].append({**cell.record(), "tflops": tflops})
        results["ceiling_tflops"] = round(ceiling.tflops, 1)
        spreads.append({peer: spread(rounds) for peer, rounds in speeds.items()})
        save()
        shown = ", ".join(f"{peer} {value or '–'}" for peer, value in tflops.items())
        say(f"{label(cell)}: {shown}; {max(map(len, speeds.values()), default=0)} rounds")

    show_speeds(results["cells"], spreads, args.chosen_peers)
    say(f"cuBLAS 8192^3: {ceiling.tflops:.0f} TFLOP/s; {time.monotonic() - begin:.0f} s in all; wrote {path}")
    if args.plots:
        from plot import plot

        for image in plot(path):
            say(f"wrote {image}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
