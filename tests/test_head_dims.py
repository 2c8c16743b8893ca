"""Both passes on the GPU at head dims between two rows of the table: the copy engine fills the tiles of the next row up
with zeros, clips what leaves them, and no other access reaches beyond a query's or key's columns.

What lies there in memory is the next head, or the next row: here it is NaN wherever that can be.
"""

import itertools

import gpu
import pytest
import torch
from cases import (
    BETWEEN,
    BETWEEN_CASES,
    DTYPES,
    Case,
    along_the_walk,
    both_masks,
    forward_plans,
    largest_q_block,
)
from gpu import attend, attend_by_each_plan, normal
from gradients import ONE_BLOCK, both_passes, both_passes_and_check, differentiate
from oracle import check, same_bits
from views import VIEWS, odd_strides_where_size_is_one

from flash_attn_ext import limits

pytestmark = gpu.needs_hopper

each_head_dim = pytest.mark.parametrize("head_dim", BETWEEN)
backward_operator = torch.ops.flash_attn_ext.backward.default


def among_nan(x, before, after):
    """x in columns of a wider tensor that holds NaN before and after them; both are multiples of 8 columns."""
    buffer = torch.nn.functional.pad(x, (before, after), value=torch.nan)
    view = buffer[..., before : before + x.shape[-1]]
    assert view.stride(-1) == 1 and view.storage_offset() == before and before % 8 == after % 8 == 0
    return view


def assert_same(results, expected, what):
    assert len(results) == len(expected)
    for i, (a, b) in enumerate(zip(results, expected, strict=True)):
        assert same_bits(a, b), f"result {i} differs {what}"


@pytest.mark.parametrize("case", BETWEEN_CASES, ids=str)
def test_table(case):
    inputs, options = case.inputs("cuda"), case.options("cuda")
    every = attend_by_each_plan(*inputs, **options)
    for results in every:
        check(*results, *inputs, **options)
    dlse = normal(case.batch, case.heads, case.seqlen_q, dtype=torch.float32) if case.dlse else None
    arguments, gradients = both_passes_and_check(*inputs, dlse=dlse, **options)
    assert_same(arguments[-2:], every[0], "in a second run")
    if case.deterministic:
        assert_same(differentiate(*arguments, dlse=dlse, **options), gradients, "in a second run")


@each_head_dim
@pytest.mark.parametrize("dtype, causal, kind", [("bf16", True, (6, 2)), ("fp16", False, (3, 3))], ids=["bf16", "fp16"])
def test_columns_around_change_nothing(head_dim, dtype, causal, kind):
    """A call's tensors are columns of wider ones, whose other columns are NaN: its bits are those of tensors alone."""
    options = {"causal": causal, "deterministic": True}
    rows = largest_q_block(limits.row_of(head_dim)) + 75
    case = Case(head_dim, dtype, rows, 149, causal, 2, *kind)  # where causal, rows see nothing
    (*tensors, lse), expected = both_passes_and_check(*case.inputs("cuda"), **options)
    dout, q, k, v, out = tensors
    for before, after in ((0, 8), (8, 64), (16, 24)):
        what = f"with {before} columns of NaN before and {after} after"
        wide = [among_nan(x, before, after) for x in tensors]
        assert_same(attend(*wide[1:4], **options), (out, lse), what)
        assert_same(differentiate(*wide, lse, **options), expected, what)
        # And one by one: NaN in all of them could hide behind a product that is not taken.
        for place, x in enumerate(wide):
            one = [*tensors[:place], x, *tensors[place + 1 :]]
            assert_same(differentiate(*one, lse, **options), expected, f"{what}, in tensor {place} alone")


@pytest.mark.parametrize("head_dim", BETWEEN[::2])
def test_only_the_needed_gradients(head_dim):
    """The forms of the backward without dq, and without dk and dv; with sums of dk and dv in memory, and without."""
    for kind in ((6, 6), (6, 2)):
        case = Case(head_dim, "bf16", 211, ONE_BLOCK - 3, True, 2, *kind)
        arguments, every = both_passes(*case.inputs("cuda"), causal=True, deterministic=True)
        for needs in itertools.product((False, True), repeat=3):
            gpu.poison(*(x for x, need in zip(every, needs, strict=True) if need), arguments[0])
            *results, _ = backward_operator(*arguments, causal=True, deterministic=True, needs=list(needs))
            chosen = [x for x, need in zip(results, needs, strict=True) if need]
            assert [x.numel() > 0 for x in results] == list(needs)
            assert_same(chosen, [x for x, need in zip(every, needs, strict=True) if need], f"with needs {needs}")


@each_head_dim
def test_packed_and_used_lengths(head_dim):
    """Ragged maps: the sequences of a packed call, some empty and some used in part, by themselves and by the rule."""
    lengths_q, lengths_k, used_k = [70, 1, 0, 200, 33], [70, 65, 9, 190, 129], [64, 65, 3, 131, 0]
    edges_q, edges_k = ([0, *itertools.accumulate(lengths)] for lengths in (lengths_q, lengths_k))
    dtype = DTYPES["fp16" if head_dim % 16 else "bf16"]
    q, k, v, dout = (
        among_nan(normal(total, heads, head_dim, dtype=dtype), 8, 16)
        for total, heads in ((edges_q[-1], 6), (edges_k[-1], 2), (edges_k[-1], 2), (edges_q[-1], 6))
    )
    by_name = {"cu_seqlens_q": edges_q, "cu_seqlens_k": edges_k}
    lengths = {name: torch.tensor(x, dtype=torch.int32, device="cuda") for name, x in by_name.items()}
    used = lengths | {"seqused_k": torch.tensor(used_k, dtype=torch.int32, device="cuda")}
    for options in (lengths, lengths | {"window_size": (40, 5)}, used | {"causal": True}):
        options = options | {"deterministic": True}
        (*_, out, lse), gradients = both_passes_and_check(q, k, v, dout=dout, **options)
        check(out, lse, q, k, v, **options)
        dense = {name: x for name, x in options.items() if not name.startswith(("cu_seqlens", "seqused"))}
        for i in range(len(lengths_q)):
            rows, size = slice(*edges_q[i : i + 2]), used_k[i] if "seqused_k" in options else lengths_k[i]
            keys = slice(edges_k[i], edges_k[i] + size)
            alone = [x[None, of_x] for x, of_x in ((q, rows), (k, keys), (v, keys))]
            results = attend(*alone, **dense)
            assert_same((out[None, rows], lse[None, :, rows]), results, f"from sequence {i} alone")
            assert all(x[edges_k[i] + size : edges_k[i + 1]].eq(0).all() for x in gradients[1:]), "keys not used"


def loses_scores(head_dim):
    """Whether a plan keeps its offset."""
    return any("keeps_offset" in plan for plan in forward_plans(limits.row_of(head_dim)))


@pytest.mark.parametrize("head_dim", [d for d in BETWEEN if loses_scores(d) and d % 16])  # products take 16 columns
@both_masks
@pytest.mark.parametrize("kind", ["growing by 130 a block", "one key of 100, the middle", "spikes"])
def test_scores_that_are_computed_again(head_dim, kind, causal):
    """Where the softmax keeps its offset it may lose a tile, whose item is then handed out again (docs/forward.md)."""
    row = limits.row_of(head_dim)
    rows = largest_q_block(row) + 45
    inputs = along_the_walk(kind, row | {"head_dim": head_dim}, rows, 1163, heads=4, kv_heads=2)
    wide = [among_nan(x, 8, 64) for x in inputs]
    every, every_among_nan = (attend_by_each_plan(*tensors, causal=causal) for tensors in (inputs, wide))
    for expected, results in zip(every, every_among_nan, strict=True):
        check(*expected, *inputs, causal=causal)
        assert_same(results, expected, "among NaN")


@pytest.mark.parametrize("head_dim", [24, 104, 200])
@pytest.mark.parametrize("view", VIEWS, ids=lambda view: view.__name__)
def test_any_strides(view, head_dim):
    """Whatever the strides: the results of the same values in fresh memory, bit for bit."""
    options = {"causal": True, "deterministic": True}
    tensors = [normal(2, length, 4, head_dim) for length in (150, 150, 170, 170)]  # dout, q, k, v
    if view is odd_strides_where_size_is_one:
        tensors = [x[:1, :, :1].contiguous() for x in tensors]
    strided = [view(x) for x in tensors]
    dout, *inputs = (x.clone(memory_format=torch.contiguous_format) for x in strided)
    (*_, out, lse), gradients = both_passes_and_check(*inputs, dout=dout, **options)
    assert_same(attend(*strided[1:], **options), (out, lse), "by the strides of q, k and v")
    results = differentiate(*strided, among_nan(out, 8, 8), lse, **options)
    assert_same(results, gradients, "by the strides of all arguments")
