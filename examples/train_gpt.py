#!/usr/bin/env python3
"""Trains a small GPT that writes Python, byte by byte, with flash_attn_func as its attention.

    python examples/train_gpt.py                               a minute or two on an H200, three on two CPU cores
    python examples/train_gpt.py --attention sdpa              the same run on torch's own attention
    python examples/train_gpt.py --packed                      no byte sees another file: docs/packed.md
    python examples/train_gpt.py --plot-compare runs/*         the curves of several runs, and how far apart they are
    python examples/train_gpt.py --data my_texts --compile     another text; the layers through torch.compile
    torchrun --nproc-per-node 8 examples/train_gpt.py --parallel fsdp2

The text is what every machine has: the source of Python's own standard library. Files held out of the training judge
it. A run lives in a folder, runs/ATTENTION-HEAD_DIM[-packed] unless --output names one: metrics.csv, loss.png,
checkpoint.pt. Ctrl-C stops it, a kill costs a minute at most, and the same command goes on where it was: the batch of
a step depends on the seed and the step alone, so the curve is the one of a run that was never stopped.

The seed also gives the same weights and batches to every --attention, so their curves should lie on each other. With
--packed the bytes are the same too; a file begins a sequence of its own.
"""

from __future__ import annotations

import argparse
import math
import os
import signal
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from training_run import BETWEEN_FILES, Display, RunFolder, compare, load_text, plot, refuse

# In a checkout the package need not be installed. At the end of the path: one that is installed goes first.
sys.path.append(str(Path(__file__).resolve().parents[1]))
import flash_attn_ext

VOCABULARY = 256  # the bytes
SAVE_SECONDS = 60  # of training between two checkpoints
TEMPERATURE = 0.7  # of the sample at the end

# ---- attention: (batch, seqlen, heads, head_dim) in and out, causal, fewer KV heads than heads. With cu_seqlens
# (tokens, heads, head_dim): documents one after the other, and cu_seqlens[i] is where document i begins ----

Attention = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


def ours(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
    if cu_seqlens is None:
        return flash_attn_ext.flash_attn_func(q, k, v, causal=True)
    return flash_attn_ext.flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, causal=True)


def sdpa(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: None = None) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


def reference(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
    lengths = {"cu_seqlens_q": cu_seqlens, "cu_seqlens_k": cu_seqlens}
    with torch.autocast(q.device.type, enabled=False):  # its scores are float32, whatever the inputs are
        return flash_attn_ext.attention_reference(q, k, v, causal=True, **lengths)[0]


ATTENTIONS: dict[str, Attention] = {"flash_attn_ext": ours, "sdpa": sdpa, "reference": reference}
PACKED = ("flash_attn_ext", "reference")  # those that take cu_seqlens

# ---- the model ----


@dataclass(frozen=True)
class Shape:
    width: int
    layers: int
    head_dim: int
    seqlen: int

    @property
    def heads(self) -> int:
        return max(1, self.width // self.head_dim)

    @property
    def kv_heads(self) -> int:
        return self.heads // 2 if self.heads % 2 == 0 else 1

    @property
    def mlp(self) -> int:
        return self.width * 8 // 3 // 64 * 64  # three matrices of this cost what two of four times the width would

    def attention_flops(self, lengths: list[int]) -> int:
        """Of these sequences in one layer, forward: two products, half of them behind the causal mask."""
        return 2 * sum(length**2 for length in lengths) * self.heads * self.head_dim


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions (Su et al. 2021): each pair of channels turns by an angle that grows with the position."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


class Block(nn.Module):
    def __init__(self, shape: Shape, attention: Attention) -> None:
        super().__init__()
        self.attention, self.head_dim = attention, shape.head_dim
        self.heads = (shape.heads, shape.kv_heads, shape.kv_heads)
        self.norm1 = nn.RMSNorm(shape.width)
        self.qkv = nn.Linear(shape.width, sum(self.heads) * shape.head_dim, bias=False)
        self.proj = nn.Linear(shape.heads * shape.head_dim, shape.width, bias=False)
        self.norm2 = nn.RMSNorm(shape.width)
        self.up = nn.Linear(shape.width, 2 * shape.mlp, bias=False)
        self.down = nn.Linear(shape.mlp, shape.width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        # (..., heads, head_dim). v stays a slice of what the projection made: no copy is needed for attention.
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (-1, self.head_dim)).split(self.heads, dim=-2)
        out = self.attention(rotate(q, cos, sin), rotate(k, cos, sin), v, cu_seqlens)
        x = x + self.proj(out.flatten(-2))
        gate, up = self.up(self.norm2(x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)


def positions(tokens: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Of each token in its sequence; those of packed documents begin anew with each."""
    if cu_seqlens is None:
        return torch.arange(tokens.shape[1], device=tokens.device)
    place = torch.arange(len(tokens), device=tokens.device, dtype=cu_seqlens.dtype)
    return place - cu_seqlens[torch.searchsorted(cu_seqlens, place, right=True) - 1]


class GPT(nn.Module):
    def __init__(self, shape: Shape, attention: Attention) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, shape.width)
        self.blocks = nn.ModuleList(Block(shape, attention) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(shape.width)
        self.head = nn.Linear(shape.width, VOCABULARY, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                # What adds to the residual stream starts smaller, so that its sum over the layers does not grow.
                into_stream = name.endswith(("proj.weight", "down.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * shape.layers) if into_stream else 0.02)
        frequencies = 10000.0 ** -(torch.arange(0, shape.head_dim, 2) / shape.head_dim)
        angles = torch.arange(shape.seqlen)[:, None, None] * frequencies  # (seqlen, 1 for all heads, head_dim / 2)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, tokens: Tensor, targets: Tensor | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
        """The mean loss in nats per byte; without targets the logits after the last position.

        tokens and targets are (batch, seqlen), or with cu_seqlens (tokens,). A target of -100 does not count.
        """
        x = self.embedding(tokens)
        place = positions(tokens, cu_seqlens)
        cos, sin = self.cos[place], self.sin[place]
        for block in self.blocks:
            x = block(x, cos, sin, cu_seqlens)
        if targets is None:
            return self.head(self.norm(x[:, -1])).float()
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, -2).float(), targets.flatten())


# ---- several GPUs: each takes its rows of the batch, so that their number changes the speed and nothing else ----


@dataclass(frozen=True)
class World:
    rank: int
    size: int
    device: torch.device

    def rows(self, tensor: Tensor) -> Tensor:
        return tensor.chunk(self.size)[self.rank]

    def mean(self, *values: float) -> list[float]:
        if self.size == 1:
            return list(values)
        tensor = torch.tensor(values, device=self.device, dtype=torch.float32)
        dist.all_reduce(tensor)
        return (tensor / self.size).tolist()


def join_world(options: Namespace) -> World:
    if "WORLD_SIZE" not in os.environ:
        if options.parallel:
            refuse(f"--parallel {options.parallel} runs under torchrun: torchrun --nproc-per-node 8 {sys.argv[0]} ...")
        return World(0, 1, torch.device(options.device))
    if options.device == "cpu":
        device = torch.device("cpu")
    else:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        if device.index >= torch.cuda.device_count():
            refuse(f"torchrun started more processes than there are GPUs: {torch.cuda.device_count()}.")
        torch.cuda.set_device(device)
    dist.init_process_group("gloo" if options.device == "cpu" else "nccl")
    return World(dist.get_rank(), dist.get_world_size(), device)


def spread(model: GPT, parallel: str | None, world: World) -> nn.Module:
    if parallel == "fsdp2":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(world.device.type, (world.size,))
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        return fully_shard(model, mesh=mesh)
    if world.size > 1:
        # The buffers are constants, and need no broadcast at every step.
        return nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)
    return model


def exchange_gradients(model: nn.Module, on: bool) -> None:
    """While gradients accumulate, only the last backward exchanges them."""
    if isinstance(model, nn.parallel.DistributedDataParallel):
        model.require_backward_grad_sync = on  # what its no_sync() sets
    elif hasattr(model, "set_requires_gradient_sync"):
        model.set_requires_gradient_sync(on)


# ---- one step ----


def autocast(device: torch.device):
    """bf16 on a GPU; the weights, and the stream between the layers, stay float32."""
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext()


def learning_rate(step: int, peak: float, steps: int) -> float:
    """A linear warm-up, then half a cosine down to a tenth."""
    warmup = max(1, steps // 12)
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (0.55 + 0.45 * math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


class Text:
    """Bytes on the device of the model, and on the host where a file begins: nothing has to wait for that."""

    def __init__(self, text: Tensor, device: torch.device) -> None:
        self.bytes, self.begins_file = text.to(device), text == BETWEEN_FILES[0]

    def __len__(self) -> int:
        return len(self.bytes)

    def windows(self, starts: Tensor, seqlen: int, packed: bool) -> tuple[Tensor, ...]:
        """Tokens, and the byte that follows each of them; packed, in one row, and with the cu_seqlens of the files."""
        index = starts.to(self.bytes.device)[:, None] + torch.arange(seqlen + 1, device=self.bytes.device)
        piece = self.bytes[index].long()
        tokens, targets = piece[:, :-1], piece[:, 1:]
        return (tokens.flatten(), targets.flatten(), self.cu_seqlens(starts, seqlen)) if packed else (tokens, targets)

    def cu_seqlens(self, starts: Tensor, seqlen: int) -> Tensor:
        """A sequence begins with each window, and with each file in it."""
        begins = self.begins_file[starts[:, None] + torch.arange(seqlen)]
        begins[:, 0] = True
        edges = F.pad(begins.flatten().nonzero().flatten(), (0, 1), value=begins.numel())
        return edges.to(self.bytes.device, torch.int32, non_blocking=True)


def micro_batches(text: Text, step: int, options: Namespace, world: World) -> Iterator:
    """What this process reads in this step: a function of the seed and the step, and of nothing else."""
    generator = torch.Generator().manual_seed(options.seed * 1_000_003 + step)
    starts = torch.randint(len(text) - options.seqlen, (options.batch,), generator=generator)
    for some in world.rows(starts).chunk(options.accumulate):
        yield text.windows(some, options.seqlen, options.packed)


def take_step(
    model: nn.Module,
    optimizer: Optimizer,
    text: Text,
    step: int,
    options: Namespace,
    world: World,
) -> Tensor:
    """The loss of the batch, still on its device: nothing here waits for the GPU."""
    total = torch.zeros((), device=world.device)
    for index, batch in enumerate(micro_batches(text, step, options, world)):
        exchange_gradients(model, index == options.accumulate - 1)
        with autocast(world.device):
            loss = model(*batch) / options.accumulate
        loss.backward()
        total += loss.detach()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, options.lr, options.steps)
    optimizer.step()
    optimizer.zero_grad()
    return total


# ---- judging and measuring ----


@torch.no_grad()
def held_out_loss(model: nn.Module, text: Text, options: Namespace, world: World) -> float:
    """Over windows spread evenly over the held-out text, the same ones every time."""
    starts = world.rows(torch.linspace(0, len(text) - options.seqlen - 1, options.held_out, dtype=torch.float64).long())
    total = torch.zeros((), device=world.device)
    for some in starts.split(options.batch // world.size // options.accumulate):
        with autocast(world.device):
            total += model(*text.windows(some, options.seqlen, options.packed)) * len(some)
    return world.mean(total.item() / len(starts))[0]


@torch.no_grad()
def sample(model: nn.Module, options: Namespace, device: torch.device) -> str:
    """Byte by byte, each from the whole context again: this is about training, and has no cache of keys and values."""
    generator = torch.Generator().manual_seed(options.seed)
    written = list(BETWEEN_FILES + os.fsencode(options.prompt))  # the bytes that were typed, whatever they are
    with torch.compiler.set_stance("force_eager"):  # every length would be compiled anew
        for _ in range(options.sample):
            with autocast(device):
                logits = model(torch.tensor([written[-options.seqlen :]], device=device))
            probabilities = (logits[0].cpu() / TEMPERATURE).softmax(-1)
            written.append(int(torch.multinomial(probabilities, 1, generator=generator)))
            if written[-1] == BETWEEN_FILES[0]:
                break
    text = bytes(written).strip(BETWEEN_FILES).decode(errors="replace")
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)  # no control codes to a terminal


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def attention_seconds(attention: Attention, shape: Shape, tokens: Tensor, cu_seqlens: Tensor | None = None) -> float:
    """Forward and backward of one layer's attention by itself, for a batch like this one."""
    device = tokens.device
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    q, k, v = (
        torch.randn(*tokens.shape, heads, shape.head_dim, device=device, dtype=dtype, requires_grad=True)
        for heads in (shape.heads, shape.kv_heads, shape.kv_heads)
    )
    dout = torch.randn_like(q)
    calls = 10 if device.type == "cuda" else 1
    times = []
    for _ in range(3):  # the best of them: the first warms up, and a busy machine may disturb another
        synchronise(device)
        begin = time.perf_counter()
        for _ in range(calls):
            torch.autograd.grad(attention(q, k, v, cu_seqlens), (q, k, v), dout)
        synchronise(device)
        times.append((time.perf_counter() - begin) / calls)
    return min(times)


def amount(text: Text | Tensor) -> str:
    return f"{len(text) / 1e6:.1f} MB" if len(text) >= 1e6 else f"{len(text) / 1e3:.1f} kB"


def flops_a_second(speed: float) -> str:
    return f"{speed / 1e12:.0f} TFLOP/s" if speed > 1e13 else f"{speed / 1e9:.0f} GFLOP/s"


class Meter:
    """Speed of the run, and attention's part in it."""

    def __init__(
        self, options: Namespace, shape: Shape, parameters: int, batch: tuple[Tensor, ...], world: World
    ) -> None:
        """batch: of one call. Packed ones are not alike, and this one stands for all."""
        self.attention, self.shape, self.world = ATTENTIONS[options.attention], shape, world
        self.tokens = options.batch * shape.seqlen  # a step
        self.calls = options.accumulate * shape.layers  # of attention, a step
        tokens, _, *cu_seqlens = batch
        self.batch = tokens, *cu_seqlens
        lengths = cu_seqlens[0].diff().tolist() if cu_seqlens else [shape.seqlen] * len(tokens)
        self.attention_flops = shape.attention_flops(lengths)  # a call
        # A weight costs a token 2 operations forward and 4 backward, and attention's backward counts twice its forward:
        # what it computes a second time is no merit of the model.
        self.flops = 6 * parameters * self.tokens + 3 * self.attention_flops * self.calls * world.size
        self.attention_seconds = None
        self.begin = self.last_lap = time.perf_counter()

    def lap(self) -> float:
        synchronise(self.world.device)
        lap = time.perf_counter() - self.last_lap
        self.last_lap += lap
        return lap

    def measure_attention(self) -> None:
        self.attention_seconds = attention_seconds(self.attention, self.shape, *self.batch)

    def speeds(self, steps_per_second: float) -> tuple[dict, str]:
        """As columns of metrics.csv, and in words."""
        tokens, model = self.tokens * steps_per_second, self.flops * steps_per_second / self.world.size
        columns = {"tokens_per_second": f"{tokens:.0f}", "model_tflops": f"{model / 1e12:.4g}"}
        words = f"{tokens / 1000:,.0f}k tokens/s  model {flops_a_second(model)}"
        if self.attention_seconds:
            share = self.attention_seconds * self.calls * steps_per_second
            # The papers' count for a kernel: the backward is 2.5 times the forward.
            speed = 3.5 * self.attention_flops / self.attention_seconds
            columns |= {"attention_share": f"{share:.3f}", "attention_tflops": f"{speed / 1e12:.4g}"}
            words += f"  attention {share:.0%} of the time, {flops_a_second(speed)}"
        return columns, words

    def seconds_left(self, done: int, left: int) -> float:
        return (time.perf_counter() - self.begin) / done * left


class StopRequest:
    """Ctrl-C or SIGTERM while this is entered: noted, to be looked at between steps. A second one interrupts."""

    def __enter__(self) -> StopRequest:
        self.made = False
        self.before = {number: signal.signal(number, self._make) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _make(self, number, frame) -> None:
        self.made = True
        for each in self.before:  # as an exception, so that the display gives the terminal its cursor back
            signal.signal(each, signal.default_int_handler)

    def __exit__(self, *error) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


# ---- a run ----


def build(options: Namespace, shape: Shape, world: World) -> tuple[nn.Module, Optimizer, int]:
    torch.manual_seed(options.seed)
    model = GPT(shape, ATTENTIONS[options.attention]).to(world.device)  # drawn on the CPU: alike on every device
    parameters = sum(parameter.numel() for parameter in model.blocks.parameters())
    if options.compile:
        for block in model.blocks:
            block.compile()
    model = spread(model, options.parallel, world)
    matrices = [parameter for parameter in model.parameters() if parameter.dim() == 2]
    scales = [parameter for parameter in model.parameters() if parameter.dim() != 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": scales, "weight_decay": 0.0}]
    return model, torch.optim.AdamW(groups, lr=options.lr, betas=(0.9, 0.95), fused=True), parameters


def train(options: Namespace, shape: Shape, world: World) -> None:
    device, shown = world.device, world.rank == 0

    def say(text: str) -> None:
        if shown:
            print(text, flush=True)

    text, held_out_text = (Text(part, device) for part in load_text(options.data))
    if min(len(text), len(held_out_text)) <= options.seqlen:
        refuse(
            f"The text is too short: {len(text)} bytes to train on, {len(held_out_text)} held out, and a sequence has "
            f"{options.seqlen}. Give more text, or a smaller --seqlen."
        )
    model, optimizer, parameters = build(options, shape, world)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    how = f"{options.attention}{' packed' if options.packed else ''}"
    title = f"{how}, head dim {shape.head_dim}, {parameters / 1e6:.1f} M parameters, {where}"
    title += f" x {world.size}" if world.size > 1 else ""
    say(title)
    say(
        f"{amount(text)} to train on, {amount(held_out_text)} held out; "
        f"{options.steps} steps of {options.batch} x {options.seqlen} bytes"
    )

    # What makes the curve: a checkpoint that differs in it is not continued.
    run = asdict(shape) | {key: getattr(options, key) for key in ("attention", "batch", "steps", "lr", "seed")}
    run["text"] = f"{len(text)} bytes with sum {text.bytes.sum().item()}"
    run["text"] += ", packed by files" if options.packed else ""
    folder = RunFolder(options.output, writes=shown)
    step, seconds, losses = (0, 0.0, []) if options.restart else folder.load(model, optimizer, run)
    losses = [torch.tensor(loss, device=device) for loss in losses]
    folder.begin_after(step)
    if step:
        say(f"goes on after step {step}, from {folder.checkpoint}")
        held_out = folder.last_held_out_loss()
    else:
        held_out = held_out_loss(model, held_out_text, options, world)
        folder.add({"step": 0, "tokens": 0, "held_out_loss": f"{held_out:.5f}"})

    def save() -> None:
        unreported = world.mean(*(loss.item() for loss in losses)) if losses else []
        folder.save(model, optimizer, {"step": step, "seconds": seconds, "losses": unreported, "run": run})
        if shown:
            plot({title: folder.metrics}, folder.path / "loss.png")

    meter = Meter(options, shape, parameters, next(micro_batches(text, 0, options, world)), world)
    end = min(options.steps, options.stop_at or options.steps)
    first_step, reported, last_save, stopped = step, step, seconds, False
    with StopRequest() as stop, Display(options.steps, shown) as display:
        while step < end and not stopped:
            losses.append(take_step(model, optimizer, text, step, options, world))
            step += 1
            last = step == options.steps
            if step % options.report_every and not last:
                if stop.made:
                    display.announce("stopping at the next report, with a checkpoint; a second Ctrl-C ends it at once")
                continue

            mine = torch.stack(losses).mean().item()  # waits for the GPU, so the clock is read after it
            interval = meter.lap()
            seconds += interval
            # All processes save together, and stop together.
            loss, stopped, save_due = world.mean(mine, stop.made, seconds - last_save > SAVE_SECONDS)
            if not math.isfinite(loss):
                refuse(f"The loss is {loss} at step {step}. Try an --lr below {options.lr}.")
            judged = step % options.judge_every < options.report_every or last
            if judged:
                held_out = held_out_loss(model, held_out_text, options, world)
                meter.measure_attention()
            row = {
                "step": step,
                "tokens": step * meter.tokens,
                "loss": f"{loss:.5f}",
                "held_out_loss": f"{held_out:.5f}" if judged else "",
                "learning_rate": f"{learning_rate(step - 1, options.lr, options.steps):.3g}",
                "seconds": f"{seconds:.2f}",
            }
            speeds, words = meter.speeds((step - reported) / interval)
            folder.add(row | speeds)
            words = f"loss {loss:.3f}  held-out {held_out:.3f}  {words}"
            lasting = judged or stopped or step == end
            display.update(step, words, meter.seconds_left(step - first_step, options.steps - step), lasting)
            reported = step
            losses.clear()
            if save_due:
                last_save = seconds
                save()
            meter.lap()
        if step > first_step:
            seconds += meter.lap() if step > reported else 0  # --stop-at may lie between two reports
            save()

    if step < options.steps:
        say(f"stopped after step {step} of {options.steps}; the same command goes on from {folder.checkpoint}")
        return
    if first_step == options.steps:
        say("this run was complete already; --restart trains anew")
    after = f" after {options.prompt!r}" if options.prompt else ""
    say(f"---- what it writes{after} ----\n{sample(model, options, device)}\n----")
    say(f"held-out loss {held_out:.3f} nats per byte after {seconds:.0f} s of training; all of it is in {folder.path}")


# ---- options ----

# About 50 M parameters on a GPU, that read 39 MB, four times the text; under 1 M on a CPU, that read 1.6 MB.
DEFAULTS = {
    "cuda": dict(width=768, layers=8, head_dim=128, seqlen=2048, batch=16, steps=1200, lr=6e-4),
    "cpu": dict(width=128, layers=4, head_dim=64, seqlen=256, batch=8, steps=800, lr=3e-3),
}


def parse_options() -> Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, width=120)
    )
    option = parser.add_argument
    option("--attention", choices=list(ATTENTIONS), help="default: flash_attn_ext; sdpa on a GPU that is not Hopper")
    option("--head-dim", type=int, choices=[64, 128, 256], help="default: 128 on a GPU, 64 on a CPU")
    option("--data", type=Path, metavar="PATH", help="a text file or a folder of them; default: Python's own source")
    option("--packed", action="store_true", help="files are documents, packed: no byte sees another file")
    option("--output", type=Path, metavar="FOLDER", help="default: runs/ATTENTION-HEAD_DIM[-packed]")
    option("--restart", action="store_true", help="begin anew where the folder has a checkpoint")
    option("--compile", action="store_true", help="the layers through torch.compile")
    option("--parallel", choices=["ddp", "fsdp2"], help="under torchrun; default: ddp")
    option("--accumulate", type=int, default=1, metavar="N", help="the batch in N parts, one by one: less memory")
    option("--device", choices=["cuda", "cpu"], help="default: cuda where there is one")
    option("--seed", type=int, default=0)
    option("--stop-at", type=int, metavar="STEP", help="stop there with a checkpoint, as Ctrl-C does")
    option("--prompt", help="what the sample at the end begins with; default: 'def ' for Python's source")
    option("--sample", type=int, default=400, metavar="BYTES", help="its length (400)")
    option("--plot-compare", type=Path, nargs="+", metavar="RUN", help="draw these runs into compare.png, and stop")
    size = parser.add_argument_group("size; the defaults depend on the device").add_argument
    for name in ("width", "layers", "seqlen", "steps"):
        size(f"--{name}", type=int)
    size("--batch", type=int, help="sequences a step, over all processes")
    size("--lr", type=float)
    option("--report-every", type=int, default=10, metavar="STEPS")
    option("--judge-every", type=int, default=50, metavar="STEPS", help="by the held-out text")
    option("--held-out", type=int, default=64, metavar="N", help="sequences of it")
    options = parser.parse_args()
    if options.device is None:
        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    for name, value in DEFAULTS[options.device].items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    if options.prompt is None:
        options.prompt = "" if options.data else "def "
    return options


def check(options: Namespace, shape: Shape, world: World) -> None:
    """Refuses what would not train, before anything is loaded."""
    names = "width layers seqlen batch steps accumulate report_every judge_every held_out sample lr stop_at".split()
    for name in names:
        value = getattr(options, name)
        if value is not None and not 0 < value < math.inf:
            refuse(f"--{name.replace('_', '-')} is {value}; it must be greater than 0, and finite.")
    if options.width % 64:
        refuse(
            f"--width is {options.width}; it must be a multiple of 64, as every --head-dim is: "
            f"{options.width // 64 * 64 or 64} or {(options.width // 64 + 1) * 64}."
        )
    if options.batch % (world.size * options.accumulate):
        refuse(
            f"--batch {options.batch} cannot be dealt to {world.size} process(es) in {options.accumulate} part(s) "
            f"each: it must be a multiple of {world.size * options.accumulate}."
        )
    if options.held_out % world.size:
        refuse(f"--held-out {options.held_out} must be a multiple of the {world.size} processes.")
    if options.packed and options.attention not in PACKED:
        refuse(f"--packed: {options.attention} takes no packed documents. --attention {' or '.join(PACKED)} does.")
    if options.attention == "flash_attn_ext":
        one = (1,) if options.packed else (1, 1)
        q, k = (
            torch.empty(*one, heads, shape.head_dim, device=world.device, requires_grad=True)
            for heads in (shape.heads, shape.kv_heads)
        )
        edges = torch.tensor([0, 1], dtype=torch.int32, device=world.device) if options.packed else None
        with autocast(world.device):
            if why := flash_attn_ext.explain(q, k, k, causal=True, cu_seqlens_q=edges, cu_seqlens_k=edges):
                way_out = "no --packed, or --attention reference" if options.packed else "--attention sdpa"
                refuse(f"{why} In this script: {way_out}, or another --head-dim.")


def main() -> None:
    options = parse_options()
    if options.plot_compare:
        compare(options.plot_compare, Path("compare.png"))
        return
    if options.device == "cuda" and not torch.cuda.is_available():
        refuse("--device cuda: torch finds no CUDA device here. --device cpu runs everywhere.")
    world = join_world(options)
    if options.attention is None:
        options.attention = "flash_attn_ext"
        if options.device == "cuda" and torch.cuda.get_device_capability(world.device) != (9, 0):
            options.attention = "sdpa"
            if world.rank == 0:
                print(f"{torch.cuda.get_device_name(world.device)} is not a Hopper GPU; --attention sdpa is used.")
    name = f"{options.attention}-{options.head_dim}{'-packed' if options.packed else ''}"
    options.output = options.output or Path("runs") / name
    shape = Shape(options.width, options.layers, options.head_dim, options.seqlen)
    check(options, shape, world)
    try:
        train(options, shape, world)
    except torch.OutOfMemoryError:
        refuse(f"{world.device} has too little memory. --accumulate {2 * options.accumulate} needs about half of it.")
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)  # as a shell counts it; where the program was is of no interest
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
