"""The case tables: every shape the tests of both passes run, derived from the compiled table of limits.

A row of limits gives its plans; lengths are chosen around the edges of their blocks, so a new head dimension or a new
block size brings its own cases with it.
"""

import itertools
import math
import zlib
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import strategies as st

import flash_attn_ext
from flash_attn_ext._binary import _C
from flash_attn_ext.limits import TABLE, has_option, has_pass, row_of, supported
from flash_attn_ext.options import UNBOUNDED, Options

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
both_dtypes = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
both_masks = pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])

needs_kernels = pytest.mark.skipif(_C is None, reason="flash_attn_ext is installed without its GPU kernels")

# A row's cases have its largest head dim, which fills the tiles up: `between_cases` has the others.
ROWS = [row for row in TABLE if row["forward"]]
HEAD_DIMS = [row["head_dim"] for row in ROWS]
TRAINING_ROWS = [row for row in TABLE if row["backward"]]
TRAINING_HEAD_DIMS = [row["head_dim"] for row in TRAINING_ROWS]


def is_by_pairs(row):
    """Whether a pair of thread blocks shares out the head dim in the backward: by_pairs of csrc/limits.h."""
    return bool(row["backward"]) and "by_pairs" in row["backward"]


MHA, GQA, MQA = (3, 3), (6, 2), (5, 1)  # heads, kv_heads


@dataclass(frozen=True)
class Case:
    head_dim: int
    dtype: str
    seqlen_q: int
    seqlen_k: int
    causal: bool = False
    batch: int = 2
    heads: int = 3
    kv_heads: int = 3
    layout: str = "bshd"
    softmax_scale: float | None = None
    window_size: tuple[int, int] = (-1, -1)
    softcap: float = 0.0
    deterministic: bool = False
    sinks: bool = False
    dlse: bool = False  # of a backward: the loss uses lse

    def __str__(self):
        words = [f"d{self.head_dim}", self.dtype, "causal" if self.causal else "full"]
        words += [f"q{self.seqlen_q}k{self.seqlen_k}", f"b{self.batch}", f"h{self.heads}of{self.kv_heads}", self.layout]
        if self.softmax_scale is not None:
            words.append(f"scale{self.softmax_scale:g}")
        if self.window_size != (-1, -1):
            words.append("window{}to{}".format(*self.window_size))
        if self.softcap:
            words.append(f"softcap{self.softcap:g}")
        if self.deterministic:
            words.append("deterministic")
        if self.sinks:
            words.append("sinks")
        if self.dlse:
            words.append("dlse")
        return "-".join(words)

    def options(self, device="cpu"):
        """The options of the call by their names; sinks are normal values, the same at every call."""
        options = {"softmax_scale": self.softmax_scale, "causal": self.causal}
        if self.window_size != (-1, -1):
            options["window_size"] = self.window_size
        if self.softcap:
            options["softcap"] = self.softcap
        if self.deterministic:
            options["deterministic"] = True
        if self.sinks:
            generator = torch.Generator(device).manual_seed(self.heads)
            options["sinks"] = torch.randn(self.heads, generator=generator, device=device)
        return options

    def runs(self, *passes):
        """Whether the kernels of these passes have all that the case asks for."""
        asked = [*Options.of(**self.options()).asked(), *(["dlse"] if self.dlse and "backward" in passes else [])]
        return all(has_option(option, which, self.head_dim) for option in asked for which in passes)

    def inputs(self, device, seed=None):
        """q, k, v of the case's shapes, memory layout and dtype; normal values, the same at every call."""
        generator = torch.Generator(device).manual_seed(zlib.crc32(str(self).encode()) if seed is None else seed)
        q_shape = (self.batch, self.seqlen_q, self.heads, self.head_dim)
        kv_shape = (self.batch, self.seqlen_k, self.kv_heads, self.head_dim)

        def normal(*shape):
            return torch.randn(shape, generator=generator, device=device, dtype=torch.float32).to(DTYPES[self.dtype])

        return LAYOUTS[self.layout](normal, q_shape, kv_shape)


def _permuted(*order):
    """Memory in the order given, seen as (batch, seqlen, heads, head_dim)."""
    back = sorted(range(4), key=lambda i: order[i])

    def inputs(normal, q_shape, kv_shape):
        return [normal(*(shape[i] for i in order)).permute(back) for shape in (q_shape, kv_shape, kv_shape)]

    return inputs


def _qkv_packed(normal, q_shape, kv_shape):
    """Slices of one (batch, seqlen, heads + 2 kv_heads, head_dim) tensor, as one projection makes them."""
    batch, seqlen, heads, head_dim = q_shape
    kv_heads = kv_shape[2]
    assert kv_shape[1] == seqlen, "packed q, k, v have one length"
    return normal(batch, seqlen, heads + 2 * kv_heads, head_dim).split([heads, kv_heads, kv_heads], dim=2)


def _kv_packed(normal, q_shape, kv_shape):
    """k and v are slices of one (batch, seqlen, 2, kv_heads, head_dim) tensor."""
    batch, seqlen, kv_heads, head_dim = kv_shape
    return [normal(*q_shape), *normal(batch, seqlen, 2, kv_heads, head_dim).unbind(2)]


LAYOUTS = {
    "bshd": _permuted(0, 1, 2, 3),
    "bhsd": _permuted(0, 2, 1, 3),
    "sbhd": _permuted(1, 0, 2, 3),
    "qkvpacked": _qkv_packed,
    "kvpacked": _kv_packed,
}


def forward_plans(row):
    return [plan for plan in (row["forward"], row["short_forward"]) if plan]


def largest_q_block(row):
    """With as many rows a call may take any of the row's plans of the forward."""
    return max(plan["block_q"] for plan in forward_plans(row))


FEW_KEYS = 4096  # kFewKeys of csrc/work.h


def plan_taken(row, seqlen_q, seqlen_k, **options):
    """The plan that a forward of dense sequences takes if it has items enough: has_short_forward of csrc/work.h."""
    short, options = row["short_forward"], Options.of(**options)
    if not short or options.softcap or seqlen_q < short["block_q"]:
        return row["forward"]
    reach = math.inf if UNBOUNDED in options.window else sum(options.window)
    return short if seqlen_k <= FEW_KEYS or reach < FEW_KEYS else row["forward"]


FEWEST_BLOCKS = 2  # kFewestBlocks of csrc/work.h: of a part of the keys


def may_be_split(plan, seqlen_k, **options):
    """Whether a dense forward by this plan may have its keys shared out among thread blocks: divide of csrc/work.h."""
    return (
        Options.of(**options).window == (UNBOUNDED, UNBOUNDED) and seqlen_k > (2 * FEWEST_BLOCKS - 1) * plan["block_kv"]
    )


# All plans of the forward, by row, place in the row and dtype.
PLANS = [
    (row, which, dtype)
    for row in ROWS
    for which, dtype in itertools.product(("forward", "short_forward"), DTYPES)
    if row[which]
]
each_plan = pytest.mark.parametrize(
    "row, which, dtype", PLANS, ids=[f"d{row['head_dim']}-{which}-{dtype}" for row, which, dtype in PLANS]
)


def lengths_of_plan(row, which):
    """seqlen_q and seqlen_k of a dense call that takes the plan: some Q blocks, and KV blocks that lap its rings."""
    avoids_short = row["short_forward"] and which == "forward"
    return 3 * row[which]["block_q"] + 7, 9 * row["forward"]["block_kv"] + 3 + (FEW_KEYS if avoids_short else 0)


def forward_as_packed(q, k, v, **options):
    """out and lse of a dense call by the plan that packed calls take, and so their bits."""
    if q.device.type == "cpu":
        return flash_attn_ext.forward(q, k, v, **options)
    row, (seqlen_q, seqlen_k) = row_of(q.shape[-1]), (q.shape[1], k.shape[1])
    plan = plan_taken(row, seqlen_q, seqlen_k, **options)
    if plan is row["forward"] and not may_be_split(plan, seqlen_k, **options):
        return flash_attn_ext.forward(q, k, v, **options)
    for name, x in zip("qk", (q, k), strict=True):
        starts = torch.arange(x.shape[0] + 1, device=x.device, dtype=torch.int32)
        options[f"cu_seqlens_{name}"] = starts * x.shape[1]
    out, lse = flash_attn_ext.forward(*(x.flatten(0, 1) for x in (q, k, v)), **options)
    return out.unflatten(0, q.shape[:2]), lse.unflatten(1, q.shape[:2]).transpose(0, 1).contiguous()


def edge_lengths(block):
    return (1, block - 1, block, block + 1, 2 * block + 3)


def edges(plans, block):
    return sorted({length for plan in plans for length in edge_lengths(plan[block])})


def forward_cases(row):
    """All cases of one row of limits."""
    plans = forward_plans(row)
    yield from _cases(row, plans[0], edges(plans, "block_q"), edges(plans, "block_kv"))
    yield from divided_cases(row)
    if row["short_forward"]:  # rows that see too many keys for it, one by one and by a window
        seqlen_q, seqlen_k = 2 * row["short_forward"]["block_q"] + 37, FEW_KEYS + 133
        for causal in (False, True):
            yield Case(row["head_dim"], "bf16", seqlen_q, seqlen_k, causal, 2, *GQA)
            yield Case(row["head_dim"], "fp16", seqlen_q, seqlen_k, causal, 2, *GQA)
            yield Case(row["head_dim"], "bf16", seqlen_q, seqlen_k, causal, 1, *GQA, window_size=(FEW_KEYS - 1, 0))
            yield Case(row["head_dim"], "bf16", seqlen_q, seqlen_k, causal, 1, *GQA, window_size=(FEW_KEYS, 0))


SPLIT_BLOCKS = 24  # of keys: enough for many parts


def divided_cases(row):
    """Calls that are divided (divide of csrc/work.h), and some beside them: few rows of grouped heads in more items
    than any GPU has multiprocessors, few items that see many keys, and both."""
    head_dim, block_kv = row["head_dim"], row["forward"]["block_kv"]
    kinds = itertools.cycle(((16, 2), (12, 3), (6, 3), (16, 1), (24, 8)))
    layouts = itertools.cycle(("bshd", "bhsd", "sbhd"))
    for (seqlen_q, seqlen_k), dtype in itertools.product(
        ((1, 3), (9, 131), (33, 2 * block_kv), (65, block_kv + 1), (131, 131), (277, 2 * block_kv + 9)), DTYPES
    ):
        yield Case(head_dim, dtype, seqlen_q, seqlen_k, False, 40, *next(kinds), next(layouts), sinks=seqlen_q % 2 == 0)
    few, many = 2 * FEWEST_BLOCKS * block_kv, SPLIT_BLOCKS * block_kv
    for (seqlen_q, seqlen_k), dtype in itertools.product(
        ((1, many), (63, many + 1), (130, many + 7), (301, many - 1), (1000, 2 * many), (65, few), (257, few + 9)),
        DTYPES,
    ):
        yield Case(head_dim, dtype, seqlen_q, seqlen_k, False, 1, *next(kinds), next(layouts), sinks=seqlen_q % 2 == 0)
        yield Case(head_dim, dtype, seqlen_q, seqlen_k, False, 2, 2, 2, next(layouts), sinks=seqlen_q % 2 == 1)


def backward_cases(row):
    """The same around the plan of the backward pass, at the edges of both passes' blocks."""
    plan = row["backward"]
    plans = plan, row["forward"]
    yield from _cases(row, plan, edges(plans, "block_q"), edges(plans, "block_kv"))
    for dtype in DTYPES:  # more than 65535 queries
        yield Case(row["head_dim"], dtype, 70001, plan["block_kv"] + 1, False, 1, 1, 1)


def _cases(row, plan, lengths_q, lengths_k):
    block_q, block_kv = plan["block_q"], plan["block_kv"]
    shapes = []  # seqlen_q, seqlen_k, batch, heads, kv_heads, layout

    # Block edges of queries against block edges of keys, with the head layouts taking turns.
    heads = itertools.cycle((MHA, GQA, MQA))
    for seqlen_q, seqlen_k in itertools.product(lengths_q, lengths_k):
        shapes.append((seqlen_q, seqlen_k, 2, *next(heads), "bshd"))

    # Primes, q longer and shorter than k, the edges of a warpgroup's 64 rows, and enough keys to lap the pipeline.
    for seqlen_q, seqlen_k in [(113, 113), (509, 509), (113, 1031), (1031, 113), (997, 1009), (3, 799), (799, 3)]:
        shapes.append((seqlen_q, seqlen_k, 2, *next(heads), "bshd"))
    for seqlen_q in (63, 64, 65):
        shapes.append((seqlen_q, 7 * block_kv + 1, 3, *next(heads), "bshd"))
        shapes.append((2 * block_q + seqlen_q, 2 * block_q + seqlen_q, 1, *next(heads), "bshd"))

    # Layouts, each with every kind of head sharing.
    for layout in LAYOUTS:
        seqlen_k = block_q + 37 if layout == "qkvpacked" else block_kv + 29
        shapes += [(block_q + 37, seqlen_k, 2, *kind, layout) for kind in (MHA, GQA, MQA)]

    # Other ratios of heads, and one head of one batch.
    for kind in ((1, 1), (4, 2), (12, 4), (16, 1)):
        shapes.append((block_q + 5, 2 * block_kv + 5, 1, *kind, "bshd"))

    # More items than any GPU has multiprocessors, so that a persistent thread block takes several.
    shapes.append((3 * block_q + 5, 5 * block_kv + 7, 3, 40, 8, "bshd"))
    shapes.append((2 * block_q, 2 * block_q, 9, 24, 24, "bhsd"))

    # Long: training's square, a query against a long past, more than 65535 keys.
    shapes.append((4096, 4096, 1, 2, 1, "bshd"))
    shapes.append((1, 8191, 3, *GQA, "bshd"))
    shapes.append((block_q + 1, 70001, 1, 1, 1, "bshd"))

    # Each with both masks, for which the dtypes take turns.
    for i, (seqlen_q, seqlen_k, batch, heads, kv_heads, layout) in enumerate(shapes):
        for causal in (False, True):
            dtype = list(DTYPES)[(i + causal) % 2]
            yield Case(row["head_dim"], dtype, seqlen_q, seqlen_k, causal, batch, heads, kv_heads, layout)


def smoke_cases(row, which="forward"):
    """A handful per row: each dtype, causal or not, whole blocks and ragged ones, q longer and shorter than k."""
    block_q, block_kv = row[which]["block_q"], row[which]["block_kv"]
    lengths = [(block_q, block_kv), (2 * block_q + 3, 2 * block_kv + 3), (block_q + 1, 5 * block_kv + 1)]
    for (seqlen_q, seqlen_k), causal, dtype in itertools.product(lengths, (False, True), DTYPES):
        yield Case(row["head_dim"], dtype, seqlen_q, seqlen_k, causal, 2, *GQA)


def between_cases(head_dim):
    """Both passes where the tiles are filled up with zeros: over ragged lengths masks, layouts, kinds of heads and
    options take turns. Rows that see no key are among them."""
    row = row_of(head_dim)
    plan, rows = row["forward"], largest_q_block(row)
    square, long, short = (rows + 37,) * 2, (67, 2 * plan["block_kv"] + 9), (plan["block_q"] + 70, 45)
    window, learned = (plan["block_kv"] // 2, 17), {"sinks": True, "dlse": True}
    yield Case(head_dim, "bf16", *square, True, 2, *MHA)
    yield Case(head_dim, "fp16", *long, False, 2, *GQA, "bhsd")
    yield Case(head_dim, "fp16", *short, True, 2, *MQA, "kvpacked", deterministic=True)
    yield Case(head_dim, "bf16", *long, False, 2, *GQA, "sbhd", window_size=window, softcap=2.0, **learned)
    yield Case(head_dim, "bf16", *square, True, 2, *GQA, "qkvpacked", window_size=(40, 0), deterministic=True)
    yield Case(head_dim, "fp16", *short, True, 2, *MHA, softmax_scale=0.3, softcap=30.0, **learned)


def extreme_logits(kind, row, dtype):
    """q, k, v on the GPU whose scores are hard for an online softmax."""
    head_dim = row["head_dim"]
    seqlen_q, seqlen_k = row["forward"]["block_q"] + 33, 4 * row["forward"]["block_kv"] + 7
    q, k, v = (
        torch.randn((1, seqlen, 2, head_dim), device="cuda", dtype=torch.float32).to(dtype)
        for seqlen in (seqlen_q, seqlen_k, seqlen_k)
    )
    ramp = torch.linspace(0, 1, seqlen_k, device="cuda").view(1, -1, 1, 1)
    direction = torch.ones(head_dim, device="cuda")
    if kind in ("growing", "falling"):  # every block raises the maximum; only the first one does
        q = (0.1 * q + direction).to(dtype)
        k = (0.1 * k + 6 * direction * (ramp if kind == "growing" else 1 - ramp)).to(dtype)
    elif kind == "all equal":
        k = k[:, :1].expand_as(k).contiguous()
    elif kind == "all zero":
        q = torch.zeros_like(q)
    elif kind == "all very negative":
        q, k = (0.1 * q + 8).to(dtype), (0.1 * k - 8).to(dtype)
    elif kind == "all very positive":
        q, k = (0.1 * q + 8).to(dtype), (0.1 * k + 8).to(dtype)
    elif kind == "huge first key":
        k[:, 0] *= 100
    elif kind == "huge last key":
        k[:, -1] *= 100
    elif kind == "huge v":  # sums of seqlen_k such values still fit the accumulator
        v = (v.sign() * (torch.finfo(torch.float16).max * 0.9 if dtype == torch.float16 else 2.0**116)).to(dtype)
    elif kind == "tiny v":
        v = v * 2.0**-14
    else:
        raise ValueError(kind)
    return q, k, v


# Scores, in nats, that are hard for a softmax whose offset stays as it is, by the number of blocks that the forward has
# walked before it comes to the key, counted from the last key on, and by the key.
WALKS = {
    **{f"growing by {by} a block": lambda walked, key, by=by: by * walked for by in (10, 40, 90, 130, 1000)},
    **{f"steps of {by} a block": lambda walked, key, by=by: by * walked.floor() for by in (10, 20, 60, 130)},
    **{f"a late step of {by}": lambda walked, key, by=by: by * (key < len(key) // 20) for by in (3, 6, 12, 60)},
    "falling": lambda walked, key: -40 * walked,
    "a saw": lambda walked, key: 60 * (walked / 1.5 % 1),
    "spikes": lambda walked, key: 20.0 * (key % 97 % 5 == 0) + 100 * (key % 331 == 7),
    **{
        f"one key of {size}, the {place}": lambda walked, key, size=size, at=at: size * (key == at(len(key)))
        for size in (30, 100, 3000)
        for place, at in {
            "first": lambda keys: 0,
            "sixth": lambda keys: 5,
            "middle": lambda keys: keys // 2,
            "last": lambda keys: keys - 1,
        }.items()
    },
}


def along_the_walk(kind, row, seqlen_q, seqlen_k, heads, kv_heads, dtype=torch.bfloat16, packed=False):
    """q, k, v with those scores and little noise. Every third query hardly sees them: a warp's rows differ.
    Blocks are those of the call's plan, as one of packed sequences or alone.

    The largest score is 0: the yardstick, which rounds scores to the dtype, is precise there. A score is the sum of two
    numbers, one in each of two columns.
    """
    head_dim, size = row["head_dim"], math.sqrt(row["head_dim"])
    shapes = (seqlen_q, heads), (seqlen_k, kv_heads), (seqlen_k, kv_heads)
    q, k, v = (torch.randn(1, *shape, head_dim, device="cuda").to(dtype) for shape in shapes)
    key = torch.arange(seqlen_k, device="cuda")
    plan = row["forward"] if packed else plan_taken(row, seqlen_q, seqlen_k)
    scores = WALKS[kind]((seqlen_k - 1 - key) / plan["block_kv"], key).float()
    scores = (scores - scores.max())[:, None]
    q, k = q / 2, k / 2
    q[..., :2] = size
    q[:, ::3, :, :2] = size * 2**-10
    k[..., 0] = scores
    k[..., 1] = scores - scores.to(dtype).float()
    return q, k, v


def option_cases(row, which="forward"):
    """Windows at the edges of the row's blocks, then every option with every other one, whatever the kernels have."""
    block_q, block_kv = row[which]["block_q"], row[which]["block_kv"]
    square, short = (2 * block_q + 3, 2 * block_q + 3), (2 * block_q + 65, block_kv + 5)
    long = (block_q + 1, 5 * block_kv + 1)
    edges = (0, 1, block_q - 1, block_q, block_kv - 1, block_kv, block_kv + 1, 2 * block_kv, 10**6)
    windows = [(left, -1) for left in edges] + [(-1, right) for right in edges] + [(size, size) for size in edges]
    windows += [(0, block_kv), (block_kv, 0), (3, 2**62), (1, block_q + block_kv)]
    # Five, two and three take turns: each kind of heads meets both masks and all lengths, and each window both masks.
    heads, masks = itertools.cycle((GQA, MHA, MQA, GQA, MHA)), itertools.cycle((False, True))
    for window, lengths in itertools.product(windows, (square, short, long)):
        yield Case(row["head_dim"], "bf16", *lengths, next(masks), 2, *next(heads), window_size=window)

    windows = ((-1, -1), (block_kv // 2, -1), (block_kv, 0), (17, 33))
    others = itertools.product(windows, (0.0, 1.0, 30.0), (False, True), (False, True), (False, True), DTYPES)
    shapes = itertools.cycle([(*lengths, *kind) for lengths in (square, short, long) for kind in (GQA, MHA, MQA)])
    for window, softcap, sinks, dlse, causal, dtype in others:
        seqlen_q, seqlen_k, *kind = next(shapes)
        if (window, softcap, sinks, dlse) != ((-1, -1), 0.0, False, False) and (which == "backward" or not dlse):
            options = {"window_size": window, "softcap": softcap, "sinks": sinks, "dlse": dlse}
            yield Case(row["head_dim"], dtype, seqlen_q, seqlen_k, causal, 2, *kind, **options)


FORWARD_OPTIONS = [case for row in ROWS for case in option_cases(row) if case.runs("forward")]
BACKWARD_OPTIONS = [
    case for row in TRAINING_ROWS for case in option_cases(row, "backward") if case.runs("forward", "backward")
]
# The same for CPU tensors, where every option runs: small blocks, and a head dim that no kernel has.
SMALL_ROW = {"head_dim": 16, "backward": {"block_q": 16, "block_kv": 24}}
CPU_OPTIONS = [replace(case, batch=1) for case in option_cases(SMALL_ROW, "backward")]

FORWARD = list(dict.fromkeys(case for row in ROWS for case in forward_cases(row)))
SMOKE = [case for row in ROWS for case in smoke_cases(row)]
BACKWARD = list(dict.fromkeys(case for row in TRAINING_ROWS for case in backward_cases(row)))
BACKWARD_SMOKE = [case for row in TRAINING_ROWS for case in smoke_cases(row, "backward")]

# Of each row the smallest and the one before its largest, and among the others 24 and those that models have.
OF_ROWS = {head_dim for row in TRAINING_ROWS for head_dim in (row["smallest"], row["head_dim"] - row["step"])}
OF_MODELS = {40, 72, 80, 96, 160, 192}
BETWEEN = sorted(d for d in OF_ROWS | OF_MODELS | {24} if d not in HEAD_DIMS and has_pass("backward", d))
BETWEEN_CASES = [case for head_dim in BETWEEN for case in between_cases(head_dim) if case.runs("forward", "backward")]


@st.composite
def random_cases(draw, which):
    """Cases of any lengths, heads and layout that have a pass, for hypothesis. Half of them fill a row's tiles up."""
    filling = [row["head_dim"] for row in TABLE if row[which]] or [0]
    layout = draw(st.sampled_from(list(LAYOUTS)))
    kv_heads, seqlen_q = draw(st.integers(1, 4)), draw(st.integers(1, 700))
    return Case(
        head_dim=draw(st.sampled_from(filling) | st.sampled_from(supported()[which] or (0,))),
        dtype=draw(st.sampled_from(list(DTYPES))),
        seqlen_q=seqlen_q,
        seqlen_k=seqlen_q if layout == "qkvpacked" else draw(st.integers(1, 900)),
        causal=draw(st.booleans()),
        batch=draw(st.integers(1, 4)),
        heads=kv_heads * draw(st.integers(1, 6)),
        kv_heads=kv_heads,
        layout=layout,
        softmax_scale=draw(st.none() | st.floats(1e-3, 4.0)),
    )
