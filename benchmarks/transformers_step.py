#!/usr/bin/env python3
"""A training step of a Llama of 1B parameters in Hugging Face transformers, on packed documents, on one GPU.

    python benchmarks/transformers_step.py --name h200    about a minute
    python benchmarks/transformers_step.py --tiny         a toy on the CPU, to try the script: its times mean nothing

The model is shaped like Llama-3.2-1B: 2048 wide, 16 layers, 32 query and 8 KV heads of 64, an MLP of 8192, 128256
tokens; its weights are random, in bf16. Eight documents, 4096 tokens in all, are packed into one row, as transformers'
collator does it. A step is forward, loss, backward and AdamW. The model is one, and its attn_implementation changes
from step to step: the attentions take turns, every other round in reverse. `none` passes q through in attention's
place, so that a step's distance from it is what attention costs.

First each is compared with the documents by themselves, one by one with transformers' "sdpa", in float32: loss, logits
and the gradients of the projections to q, k and v. The yardstick is the error of just that in bf16. Beside them stand
the errors that documents would have which see each other.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import platform
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from attention import environment, spread
from screen import reason, say, show
from tables import RESULTS, csrc_sha256
from torch import Tensor
from train_step import HEAT_SECONDS, WARMUP_STEPS, measure
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from flash_attn_ext.adapters import transformers as adapter  # `tables` put this checkout on the path
from flash_attn_ext.cli.options import positive_int
from flash_attn_ext.limits import why_unavailable

MODEL = {
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 131072,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    "tie_word_embeddings": True,
}
TINY = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
TINY_TOKENS = 128
# Of the tokens, the first documents have these parts, the last one the rest.
PARTS = (0.374, 0.239, 0.147, 0.098, 0.071, 0.039, 0.024)
OURS = adapter.NAME
NAMES = (OURS, "flash_attention_3", "sdpa", "none")
# An attention whose errors are larger than this many times the yardstick's computes something else.
MAX_ERROR = 2.0

Batch = dict[str, Tensor]


@dataclass
class Outcome:
    """Of a forward and a backward; of several documents, with the logits one after the other."""

    loss: float
    logits: Tensor
    gradients: list[Tensor]

    def error(self, truth: Outcome) -> dict[str, float]:
        """How far it is from the truth, by the keys in the results file."""
        of_gradients = zip(self.gradients, truth.gradients, strict=True)
        squares = [(squared(x.float() - y.float()), squared(y.float())) for x, y in of_gradients]
        logits = squared(self.logits.float() - truth.logits.float()) / squared(truth.logits.float())
        gradients = sum(x for x, _ in squares) / sum(y for _, y in squares)
        return {"loss": abs(self.loss - truth.loss), "logits": math.sqrt(logits), "gradients": math.sqrt(gradients)}


def squared(x: Tensor) -> float:
    return torch.linalg.vector_norm(x).item() ** 2


def document_lengths(tokens: int) -> list[int]:
    """At least 2 each: a document of 1 has no token to predict."""
    lengths = [max(2, int(part * tokens)) for part in PARTS]
    return [*lengths, tokens - sum(lengths)]


def no_attention(module, query, key, value, attention_mask, **others):
    return query.transpose(1, 2).contiguous(), None


class Bench:
    def __init__(self, sizes: dict, tokens: int, device: str) -> None:
        adapter.register()
        ALL_ATTENTION_FUNCTIONS.register("none", no_attention)
        ALL_MASK_ATTENTION_FUNCTIONS.register("none", lambda *sizes, **others: None)
        torch.manual_seed(0)
        config = transformers.LlamaConfig(**sizes, use_cache=False)
        with torch.device(device):
            self.model = transformers.AutoModelForCausalLM.from_config(
                config, dtype=torch.bfloat16, attn_implementation="sdpa"
            ).train()
        self.documents = [torch.randint(config.vocab_size, (length,)) for length in document_lengths(tokens)]
        features = [{"input_ids": document.tolist()} for document in self.documents]
        collator = transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=True)
        packed = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in collator(features).items()}
        # "sdpa" makes its mask from the positions, the others read the lengths.
        self.packed = {name: packed if name != "sdpa" else without_lengths(packed) for name in NAMES}
        positions = torch.arange(tokens, device=device)[None]
        self.joined = without_lengths(packed) | {"position_ids": positions}
        self.on_gpu = device == "cuda"
        # A step of size 0: all the work of an update, and every attention goes on seeing the same weights.
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.0, weight_decay=0.0, fused=True)

    def alone(self, model) -> Outcome:
        """The documents one by one."""
        targets = sum(len(document) - 1 for document in self.documents)
        batches = [document[None].to(model.device) for document in self.documents]
        weights = [(len(document) - 1) / targets for document in self.documents]
        return outcome(model, [{"input_ids": x, "labels": x} for x in batches], weights)

    def step(self, name: str) -> None:
        self.model(**self.packed[name]).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def seconds(self, name: str) -> float:
        self.model.set_attn_implementation(name)
        if not self.on_gpu:
            begin = time.perf_counter()
            self.step(name)
            return time.perf_counter() - begin
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        self.step(name)
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000

    def peak_gib(self, name: str) -> float | None:
        if not self.on_gpu:
            return None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        self.seconds(name)
        return round(torch.cuda.max_memory_allocated() / 2**30, 3)


def without_lengths(batch: Batch) -> Batch:
    return {name: batch[name] for name in ("input_ids", "labels", "position_ids")}


def outcome(model, batches: list[Batch], weights: list[float]) -> Outcome:
    loss, logits = 0.0, []
    for batch, weight in zip(batches, weights, strict=True):
        result = model(**batch)
        (result.loss * weight).backward()
        loss += result.loss.item() * weight
        logits.append(result.logits.detach())
    projections = ("q_proj.weight", "k_proj.weight", "v_proj.weight")
    gradients = [x.grad for name, x in model.named_parameters() if name.endswith(projections)]
    model.zero_grad()
    return Outcome(loss, torch.cat(logits, 1), gradients)


def missing(name: str, on_gpu: bool) -> str | None:
    """Why an attention is not here; it must not be timed by what it would fall back to, nor be fetched."""
    if name == OURS and on_gpu:
        return why_unavailable()
    if name == "flash_attention_3" and not transformers.utils.is_flash_attn_3_available():
        return "transformers finds no distribution flash-attn-3 with the module flash_attn_interface, or no GPU"
    return None


def compare(bench: Bench, names: list[str]) -> tuple[list[str], dict[str, dict[str, float]], dict[str, float]]:
    """The attentions that run and compute the same, with a step or two of each; all errors by their names, "yardstick"
    and "joined" among them; and the losses."""
    model = bench.model
    exact = copy.deepcopy(model).float()
    truth = bench.alone(exact)
    del exact
    losses, errors = {"float32": truth.loss}, {}

    def enter(name: str, result: Outcome) -> None:
        losses[name], errors[name] = result.loss, result.error(truth)

    enter("yardstick", bench.alone(model))
    enter("joined", outcome(model, [bench.joined], [1.0]))
    usable = []
    for name in names:
        try:
            if why := missing(name, bench.on_gpu):
                raise ImportError(why)
            model.set_attn_implementation(name)
            if name != "none":
                enter(name, outcome(model, [bench.packed[name]], [1.0]))
                for what in ("logits", "gradients"):
                    ratio = errors[name][what] / errors["yardstick"][what]
                    if not ratio <= MAX_ERROR:  # NaN included
                        raise ArithmeticError(f"wrong {what}: {ratio:.1f} times the error of documents by themselves")
            for _ in range(WARMUP_STEPS):
                bench.step(name)
            usable.append(name)
        except Exception as failure:  # the others still run
            say(f"{name} is left out: {reason(failure)}")
            bench.optimizer.zero_grad()
    return usable, errors, losses


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, width=120)
    )
    option = parser.add_argument
    option("--attentions", nargs="+", choices=NAMES, default=list(NAMES), help="default: all of them")
    option("--tokens", type=positive_int, help=f"packed into one row (default 4096; tiny {TINY_TOKENS})")
    option("--layers", type=positive_int, help="default 16; tiny 2")
    option("--vocabulary", type=positive_int, help="default 128256; tiny 256")
    option("--rounds", type=positive_int, default=15, help="steps of each attention that count (default 15)")
    option("--tiny", action="store_true", help="a toy model on the CPU; its results are written for --output only")
    option("--name", default="gpu", help="of the machine, in the results file's name: NAME-transformers-step.json")
    option("--output", type=Path, help="the results file, in place of benchmarks/results/NAME-transformers-step.json")
    args = parser.parse_args()
    args.tokens = args.tokens or (TINY_TOKENS if args.tiny else 4096)
    if document_lengths(args.tokens)[-1] < 2:
        parser.error(f"argument --tokens: {args.tokens} are too few for {len(PARTS) + 1} documents")
    return args


def main() -> int:
    args = parse_args()
    begin = time.monotonic()
    if not args.tiny and not torch.cuda.is_available():
        say("no CUDA device; --tiny tries the script without one")
        return 1
    device = "cpu" if args.tiny else "cuda"
    facts = {"torch": torch.__version__, "python": platform.python_version()} if args.tiny else environment()
    facts |= {"transformers": transformers.__version__}
    say(", ".join(f"{key} {value}" for key, value in facts.items()))
    given = {"num_hidden_layers": args.layers, "vocab_size": args.vocabulary}
    sizes = (TINY if args.tiny else MODEL) | {key: value for key, value in given.items() if value}
    bench = Bench(sizes, args.tokens, device)
    say(
        f"{bench.model.num_parameters() / 1e6:,.1f} M parameters, {args.tokens} tokens in documents of "
        f"{', '.join(map(str, document_lengths(args.tokens)))}"
    )

    names, errors, losses = compare(bench, args.attentions)
    titles = {"yardstick": "sdpa, each document by itself", "joined": "sdpa, documents see each other"}
    show(
        ["in bf16", "loss", "error of loss", "of logits", "of gradients"],
        [
            [
                titles.get(name, name),
                f"{losses[name]:.5f}",
                *(f"{errors[name][what]:.2e}" for what in ("loss", "logits", "gradients")),
            ]
            for name in errors
        ],
    )
    equal = [name for name in names if name in errors]
    say(
        f"Loss of each document by itself in float32: {losses['float32']:.5f}. The same, to {MAX_ERROR:g} times the "
        f"errors of bf16: {', '.join(equal) or 'none'}."
    )
    if not names:
        say("No attention is left to measure.")
        return 1

    times = measure(bench.seconds, names, args.rounds, 0.0 if args.tiny else HEAT_SECONDS)
    median = {name: statistics.median(of_rounds) for name, of_rounds in times.items()}
    results, rows = {}, []
    for name in names:
        seconds, is_attention = median[name], name != "none"
        share = 1 - median["none"] / seconds if "none" in median else None
        results[name] = {
            "step_ms": round(1000 * seconds, 3),
            "spread_percent": round(spread(times[name]), 2),
            "tokens_per_second": round(args.tokens / seconds),
            "attention_share": None if share is None else round(share, 4),
            "peak_gib": bench.peak_gib(name),
        }
        peak = results[name]["peak_gib"]
        rows.append(
            [
                name,
                f"{1000 * seconds:.2f} ({results[name]['spread_percent']:.1f} %)",
                f"{args.tokens / seconds:,.0f}",
                f"{median[OURS] / seconds:.3f}" if OURS in median and is_attention else "–",
                f"{share:.1%}" if share is not None and is_attention else "–",
                "–" if peak is None else f"{peak:.2f}",
            ]
        )
    show(["attention", "step, ms (spread)", "tokens/s", f"speed / {OURS}", "its share", "peak GiB"], rows)

    path = args.output or (None if args.tiny else RESULTS / f"{args.name}-transformers-step.json")
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        everything = {
            "environment": facts,
            "csrc_sha256": csrc_sha256(),
            "model": sizes,
            "documents": document_lengths(args.tokens),
            "rounds": args.rounds,
            "losses": losses,
            "errors": errors,
            "equal": equal,
            "attention": results,
        }
        path.write_text(json.dumps(everything, indent=1) + "\n")
    say(f"{time.monotonic() - begin:.0f} s in all; " + (f"wrote {path}" if path else "wrote nothing"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
