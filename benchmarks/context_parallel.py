#!/usr/bin/env python3
"""One attention layer over several processes: torch's context parallelism, a ring of parts of the sequence, on the
kernels of flash_attn_ext.sdpa and on torch's own, beside one process that has the whole sequence.

    torchrun --standalone --nproc-per-node 4 benchmarks/context_parallel.py       on 4 GPUs
    torchrun --standalone --nproc-per-node 2 benchmarks/context_parallel.py --device cpu --seqlen 512    to try it

A time is that of forward and backward, from a barrier until the last process is done, the median of the rounds. The
memory is what a process takes at most besides its q, k, v and dout. The difference is the largest of out's and the
gradients' from those of one process, as a share of their size. Nothing is written to a file.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import sys
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from screen import reason, say, show
from tables import ROOT  # noqa: F401 (puts this checkout on the path)
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.experimental import context_parallel
from torch.distributed.tensor.experimental._attention import context_parallel_unshard, set_rotate_method
from torch.nn.attention import SDPBackend, sdpa_kernel

import flash_attn_ext
from flash_attn_ext.cli.options import positive_int

Tensors = list[torch.Tensor]
Attend = Callable[..., torch.Tensor]


def sdpa(mesh, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> torch.Tensor:
    """The call of a model, (batch, heads, seqlen, head_dim); inside of context_parallel the ring."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])


def flash_operator(mesh, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> torch.Tensor:
    """What `sdpa` comes to on a GPU. On CPU tensors it calls another operator, which has no ring."""
    parts = (DTensor.from_local(x, mesh, [Shard(2)]) for x in (q, k, v))
    return torch.ops.aten._scaled_dot_product_flash_attention(*parts, 0.0, causal)[0].to_local()


def both_passes(attend: Attend, tensors: Tensors, dout: torch.Tensor) -> Tensors:
    """out and the gradients of q, k and v."""
    inputs = [x.detach().requires_grad_() for x in tensors]
    out = attend(*inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, dout)]


def alone(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return flash_attn_ext.flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v)), causal=True).transpose(1, 2)


class Clock:
    """Times and memory of a call, of which every process does its part."""

    def __init__(self, device: torch.device, rounds: int) -> None:
        self.device, self.rounds = device, rounds

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def measure(self, call: Callable[[], object], together: bool) -> tuple[float, float]:
        """Milliseconds and MiB. together: the slowest process counts, and the one with most memory."""
        call()
        self.synchronize()
        before = torch.cuda.memory_allocated() if self.device.type == "cuda" else 0
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        times = []
        for _ in range(self.rounds):
            if together:
                dist.barrier()
            self.synchronize()
            begin = time.perf_counter()
            call()
            self.synchronize()
            times.append(1000 * (time.perf_counter() - begin))
        peak = torch.cuda.max_memory_allocated() - before if self.device.type == "cuda" else 0
        figures = torch.tensor([*times, peak / 2**20], dtype=torch.float64, device=self.device)
        if together:
            dist.all_reduce(figures, dist.ReduceOp.MAX)
        *times, peak = figures.tolist()
        return statistics.median(times), peak


def largest_difference(results: Tensors, expected: Tensors) -> float:
    norm = torch.linalg.vector_norm
    return max((norm(a.float() - b.float()) / norm(b.float())).item() for a, b in zip(results, expected, strict=True))


def measure_ring(mesh, attend: Attend, tensors: Tensors, clock: Clock) -> tuple[float, float, Tensors]:
    """Milliseconds, MiB, and the whole out and gradients."""
    buffers = [x.clone() for x in tensors]
    with context_parallel(mesh, buffers=buffers, buffer_seq_dims=[2] * 4):
        *parts, dout = (x.clone() for x in buffers)  # without the memory of the whole
        run = lambda: both_passes(lambda q, k, v: attend(mesh, q, k, v, True), parts, dout)  # noqa: E731
        figures = clock.measure(run, together=True)
        return *figures, context_parallel_unshard(mesh, run(), [2] * 4)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, width=120)
    )
    option = parser.add_argument
    option("--device", choices=["cuda", "cpu"], default="cuda", help="cuda: NCCL; cpu: gloo, in float32")
    option("--batch", type=positive_int, default=1)
    option("--seqlen", type=positive_int, default=32768, help="a multiple of twice the number of processes")
    option("--heads", type=positive_int, default=32)
    option("--kv-heads", type=positive_int, default=8)
    option("--head-dim", type=positive_int, default=128)
    option("--rounds", type=positive_int, default=10)
    return parser.parse_args()


def main() -> int:
    args = parse_args()
    on_gpu = args.device == "cuda"
    device = torch.device(args.device, int(os.environ["LOCAL_RANK"]) if on_gpu else None)
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpu else "gloo")
    mesh = dist.init_device_mesh(args.device, (dist.get_world_size(),))
    clock, is_first = Clock(device, args.rounds), dist.get_rank() == 0

    torch.manual_seed(0)  # the same tensors everywhere
    heads = (args.heads, args.kv_heads, args.kv_heads, args.heads)
    sizes = [(args.batch, count, args.seqlen, args.head_dim) for count in heads]
    tensors = [torch.randn(size, device=device, dtype=torch.bfloat16 if on_gpu else torch.float32) for size in sizes]
    flops = 3.5 * 4 * args.batch * args.heads * args.seqlen**2 * args.head_dim / 2

    def row(name: str, milliseconds: float, memory: float, difference: str) -> list[str]:
        shown = f"{memory:.0f}" if on_gpu else "–"
        return [name, f"{milliseconds:.2f}", f"{flops / milliseconds / 1e9:.3g}", shown, difference]

    rows, expected = [], []
    if is_first:
        expected = both_passes(alone, tensors[:3], tensors[3])
        rows.append(row("one process", *clock.measure(lambda: both_passes(alone, tensors[:3], tensors[3]), False), "–"))
    dist.barrier()

    ways = {"flash_attn_ext": [flash_attn_ext.sdpa]}
    if on_gpu:
        ways |= {"torch": [], "torch, flash": [lambda: sdpa_kernel(SDPBackend.FLASH_ATTENTION)]}
    for method in ("allgather", "alltoall"):
        set_rotate_method(method)
        for name, contexts in ways.items():
            with contextlib.ExitStack() as stack:
                for context in contexts:
                    stack.enter_context(context())
                try:
                    milliseconds, memory, results = measure_ring(
                        mesh, sdpa if on_gpu else flash_operator, tensors, clock
                    )
                except Exception as failure:  # torch's own ways may not run; in all processes alike
                    say(f"{name}, {method}: {reason(failure)}")
                    continue
            if is_first:
                difference = f"{largest_difference(results, expected):.1e}"
                rows.append(row(f"{name}, {method}", milliseconds, memory, difference))
    if is_first:
        say(
            f"{dist.get_world_size()} processes, B {args.batch}, S {args.seqlen}, H {args.heads}/{args.kv_heads}, "
            f"D {args.head_dim}, causal, torch {torch.__version__}"
        )
        show(["ring", "ms", "TFLOP/s", "MiB a process", "difference"], rows)
    dist.barrier()
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
