"""The backward pass on the GPU: the case table against the oracle, then what a table of shapes cannot show.

Which bits are certain: gradients.py.
"""

import ctypes
import gc
import itertools
import math
import threading
from dataclasses import replace
from functools import partial

import gpu
import pytest
import torch
from cases import (
    BACKWARD,
    BACKWARD_OPTIONS,
    BACKWARD_SMOKE,
    DTYPES,
    LAYOUTS,
    TRAINING_HEAD_DIMS,
    TRAINING_ROWS,
    Case,
    both_dtypes,
    both_masks,
    extreme_logits,
    random_cases,
)
from conftest import SEED
from gpu import normal
from gradients import (
    ONE_BLOCK,
    assert_same,
    both_passes,
    both_passes_and_check,
    by_autograd,
    differentiate,
    workspace,
)
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from oracle import check_gradients, same_bits, same_but_for_order
from torch import library
from torch.utils.checkpoint import checkpoint
from views import VIEWS, embed, misaligned_pointer, odd_strides_where_size_is_one

import flash_attn_ext
from flash_attn_ext import flash_attn_func, limits

pytestmark = gpu.needs_hopper

forward_operator = torch.ops.flash_attn_ext.forward.default
backward_operator = torch.ops.flash_attn_ext.backward.default


def by_operator(*arguments, **options):
    """dq, dk and dv; dsinks, which nobody has asked for, are empty."""
    *gradients, dsinks = backward_operator(*arguments, **options)
    assert dsinks.numel() == 0
    return gradients


each_head_dim = pytest.mark.parametrize("head_dim", TRAINING_HEAD_DIMS)
each_row = pytest.mark.parametrize("row", TRAINING_ROWS, ids=lambda row: f"d{row['head_dim']}")
each_softcap = pytest.mark.parametrize("softcap", [0.0, 30.0], ids=["uncapped", "softcap"])


# The table -----------------------------------------------------------------------------------------------------------


@pytest.mark.quick
@pytest.mark.parametrize("case", BACKWARD_SMOKE, ids=str)
def test_smoke(case):
    both_passes_and_check(*case.inputs("cuda"), **case.options("cuda"))


@pytest.mark.parametrize("case", BACKWARD, ids=str)
def test_table(case):
    both_passes_and_check(*case.inputs("cuda"), **case.options("cuda"))


@pytest.mark.parametrize("case", BACKWARD_OPTIONS, ids=str)
def test_options(case):
    """Autograd's gradients are those of the low-level pair."""
    inputs, options = case.inputs("cuda"), case.options("cuda")
    dlse = normal(case.batch, case.heads, case.seqlen_q, dtype=torch.float32) if case.dlse else None
    (dout, *_), expected = both_passes_and_check(*inputs, dlse=dlse, **options)
    leaves = {name: x.detach().requires_grad_() for name, x in zip("qkv", inputs, strict=True)}
    if case.sinks:
        leaves["sinks"] = options["sinks"].requires_grad_()
    out, lse = flash_attn_func(**(options | leaves), return_lse=True)
    through = [out] if dlse is None else [out, lse]
    results = torch.autograd.grad(through, list(leaves.values()), [dout, dlse][: len(through)])
    assert_same(results[:3], expected[:3], "by autograd", case.seqlen_k)
    assert not case.sinks or same_bits(results[3], expected[3])


@seed(SEED)
@settings(max_examples=100, deadline=None, database=None, print_blob=True, suppress_health_check=list(HealthCheck))
@given(case=random_cases("backward"), values=st.integers(0, 2**32 - 1))
def test_random_shapes(case, values):
    torch.manual_seed(values)
    both_passes_and_check(*case.inputs("cuda", seed=values), **case.options("cuda"))


@each_row
@both_masks
@pytest.mark.parametrize("keys", [-127, -65, -64, -63, -1, 0, 1, 63, 64, 65, 127])
def test_halves_of_an_item(row, causal, keys):
    """An item's keys are two warpgroups' or two thread blocks', 64 each: one of them may have a single key, or none."""
    for seqlen_q in (1, 63, 64, 65, 130):
        seqlen_k = row["backward"]["block_kv"] + keys
        both_passes_and_check(*Case(row["head_dim"], "bf16", seqlen_q, seqlen_k, causal).inputs("cuda"), causal=causal)


@each_row
@pytest.mark.parametrize("window_size", [(0, 0), (5, 0), (0, 5), (63, 0), (64, 0), (3, 64)], ids=str)
def test_windows_that_show_half_of_an_item(row, window_size):
    """At some of the item's steps, or at all of them; or none of it."""
    for seqlen_q, more in [(1, 0), (64, 0), (64, 64), (65, 65), (192, 64), (70, 472)]:
        seqlen_k = row["backward"]["block_kv"] + more
        case = Case(row["head_dim"], "bf16", seqlen_q, seqlen_k, window_size=window_size)
        if case.runs("forward", "backward"):
            both_passes_and_check(*case.inputs("cuda"), **case.options("cuda"))


@each_head_dim
@both_dtypes
@pytest.mark.parametrize("softmax_scale", [1e-4, 0.03, 1.0, 2.5, 30.0])
def test_softmax_scale(head_dim, dtype, softmax_scale):
    both_passes_and_check(*(normal(2, 193, 3, head_dim, dtype=dtype) for _ in range(3)), softmax_scale, causal=True)


CAPPED = [replace(case, softcap=2.0) for case in BACKWARD_SMOKE]
CAPPED += [
    replace(case, softcap=2.0)
    for case in BACKWARD
    if case.dtype == "bf16" and case.causal and case.layout == "bshd" and max(case.seqlen_q, case.seqlen_k) < 5000
]


@pytest.mark.parametrize("case", CAPPED, ids=str)
def test_table_with_softcap(case):
    """Its kernels are others, with another order of work at head dim 64."""
    both_passes_and_check(*case.inputs("cuda"), **case.options("cuda"))


@each_head_dim
@both_masks
@pytest.mark.parametrize(
    "dtype, softcap",  # in fp16 the yardstick overflows at 1e4
    [*itertools.product(DTYPES, (1e-2, 1.0, 30.0)), ("bf16", 1e4)],
)
def test_softcap(head_dim, causal, dtype, softcap):
    """From scores that are nearly all at the cap to scores that are far below it; and each gradient without others."""
    q, k, v = Case(head_dim, dtype, 193, 300, heads=6, kv_heads=2).inputs("cuda")
    options = {"causal": causal, "softcap": softcap}
    arguments, every = both_passes_and_check(q, k, v, **options)
    for needs in itertools.product((False, True), repeat=3):
        results = by_operator(*arguments, **options, needs=list(needs))
        chosen = [x if need else None for x, need in zip(results, needs, strict=True)]
        assert_same(chosen, [x if need else None for x, need in zip(every, needs, strict=True)], keys=300)


@each_row
@both_dtypes
@both_masks
@pytest.mark.parametrize(
    "kind",
    ["growing", "falling", "all equal", "all zero", "all very negative", "all very positive"]
    + ["huge first key", "huge last key", "tiny v"],
)
def test_extreme_logits(kind, row, dtype, causal):
    both_passes_and_check(*extreme_logits(kind, row, dtype), causal=causal)


@each_row
@both_dtypes
def test_v_far_from_zero(row, dtype):
    """dP and delta are large and nearly equal: what is left is as good as out's rounding lets it be."""
    q, k, v = Case(row["head_dim"], "bf16", 260, 390).inputs("cuda")
    both_passes_and_check(*(x.to(dtype) for x in (q, k, v + 20)))


# The public functions ------------------------------------------------------------------------------------------------


@pytest.mark.quick
@pytest.mark.parametrize("seqlen_k", [ONE_BLOCK, 300])
def test_autograd_is_the_low_level_pair(seqlen_k):
    inputs = Case(128, "bf16", 200, seqlen_k, heads=6, kv_heads=2).inputs("cuda")
    arguments, expected = both_passes(*inputs, 0.1, True)
    dout, q, k, v, out, lse = arguments
    calls = {
        "flash_attn_func": lambda q, k, v: flash_attn_func(q, k, v, 0.1, True),
        "flash_attn_func with lse": lambda q, k, v: flash_attn_func(q, k, v, 0.1, True, return_lse=True)[0],
        "forward": lambda q, k, v: flash_attn_ext.forward(q, k, v, softmax_scale=0.1, causal=True)[0],
        "the operator forward": lambda q, k, v: forward_operator(q, k, v, 0.1, True)[0],
    }
    for name, call in calls.items():
        assert_same(by_autograd(call, dout, *inputs), expected, f"through {name}", seqlen_k)
    results = by_operator(*arguments, 0.1, True)
    assert_same(results, expected, "through the operator backward", seqlen_k)
    with_names = flash_attn_ext.backward(dout, q, k, v, out, lse, softmax_scale=0.1, causal=True)
    assert_same(with_names, expected, "with named arguments", seqlen_k)


@each_head_dim
def test_default_scale_is_one_over_sqrt_head_dim(head_dim):
    arguments, expected = both_passes(*Case(head_dim, "bf16", 130, ONE_BLOCK).inputs("cuda"))
    assert_same(differentiate(*arguments, head_dim**-0.5), expected)


SUBSETS = ["".join(names) for n in range(4) for names in itertools.combinations("qkv", n)]


@pytest.mark.parametrize("needed", SUBSETS, ids=lambda needed: needed or "none")
@pytest.mark.parametrize("heads, kv_heads", [(6, 6), (6, 2)])
@each_head_dim
def test_only_the_needed_gradients(head_dim, heads, kv_heads, needed):
    case = Case(head_dim, "bf16", 200, ONE_BLOCK - 3, heads=heads, kv_heads=kv_heads)
    arguments, every = both_passes(*case.inputs("cuda"), causal=True)
    expected = [x if name in needed else None for name, x in zip("qkv", every, strict=True)]
    dout, *inputs = arguments[:4]

    leaves = [x.detach().requires_grad_(name in needed) for name, x in zip("qkv", inputs, strict=True)]
    out = flash_attn_func(*leaves, causal=True)
    assert out.requires_grad == bool(needed)
    if needed:
        gpu.poison(*inputs, workspace(*inputs[:2]))
        out.backward(dout)
    assert_same([x.grad for x in leaves], expected)

    gpu.poison(*inputs, workspace(*inputs[:2]))
    needs = [name in needed for name in "qkv"]
    results = by_operator(*arguments, causal=True, needs=needs)
    assert [x.numel() > 0 for x in results] == needs
    assert_same([x if need else None for x, need in zip(results, needs, strict=True)], expected, "by the operator")


@each_head_dim
def test_gradients_not_asked_for_take_no_memory(head_dim):
    arguments, (dq, dk, dv) = both_passes(*(normal(1, 1024, 8, head_dim) for _ in range(3)))
    every = extra_memory(lambda: backward_operator(*arguments, needs=[True] * 3))
    for needs in ([True, False, False], [False, True, False], [False, False, True]):
        saved = sum(x.nbytes for x, need in zip((dq, dk, dv), needs, strict=True) if not need)
        assert extra_memory(lambda needs=needs: backward_operator(*arguments, needs=needs)) <= every - saved


def extra_memory(call):
    """The peak of the bytes that the call asks for beyond what was there before: its results and its workspace."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_stats()["requested_bytes.all.current"]
    results = call()
    peak = torch.cuda.memory_stats()["requested_bytes.all.peak"]
    del results
    return peak - before


@each_row
@both_masks
def test_extra_memory_is_linear_in_the_sequence_length(row, causal):
    """What is documented: beside the gradients, 4 bytes for each element of q and 8 for each of its rows."""
    for seqlen in (1, 2048, 8192):
        arguments, gradients = both_passes(*(normal(1, seqlen, 4, row["head_dim"]) for _ in range(3)), causal=causal)
        expected = sum(x.nbytes for x in (*gradients, workspace(*arguments[1:3])))
        extra = extra_memory(lambda arguments=arguments: flash_attn_ext.backward(*arguments, causal=causal))
        assert extra <= expected + 1024


def test_inputs_stay_as_they_are():
    arguments, _ = both_passes(*Case(128, "bf16", 200, 300, layout="bhsd").inputs("cuda"), causal=True)
    before = [x.clone() for x in arguments]
    differentiate(*arguments, causal=True)
    assert all(same_bits(x, y) for x, y in zip(arguments, before, strict=True))


# Memory --------------------------------------------------------------------------------------------------------------


def test_poison_reaches_what_is_allocated_next():
    """The test of the test: without this, differentiate() would prove nothing about unwritten memory."""
    q, k = normal(2, 200, 6, 128), normal(2, 300, 2, 128)
    like = [q, k, k, torch.empty_like(workspace(q, k), device="cuda")]
    gpu.poison(*like)
    empty = [torch.empty_like(x) for x in like]
    assert all(x.isnan().all() for x in empty)


@each_row
@both_masks
def test_surroundings_change_nothing(row, causal):
    """All arguments inside larger buffers: the fill around them, in every dimension, must not reach a gradient."""
    plan, head_dim = row["backward"], row["head_dim"]
    lengths = itertools.product((1, plan["block_q"] + 5), (3, plan["block_kv"], plan["block_kv"] + 9))
    for seqlen_q, seqlen_k in lengths:
        inputs = [normal(2, s, h, head_dim) for s, h in ((seqlen_q, 6), (seqlen_k, 2), (seqlen_k, 2))]
        (*tensors, lse), expected = both_passes(*inputs, causal=causal)
        for fill in (0.0, math.nan, math.inf, -math.inf):
            embedded = [embed(x, fill, margin=300) for x in tensors]
            around_lse = torch.nn.functional.pad(lse, (8, 8, 1, 1, 1, 1), value=fill)
            for given_lse in (lse, around_lse[1:-1, 1:-1, 8:-8]):
                results = differentiate(*embedded, given_lse, causal=causal)
                assert_same(results, expected, f"with {fill} around all arguments", seqlen_k)


@each_head_dim
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_have_the_strides_of_empty_like(head_dim, layout):
    inputs = Case(head_dim, "bf16", 200, 200, heads=6, kv_heads=2, layout=layout).inputs("cuda")
    _, gradients = both_passes(*inputs)
    assert [x.stride() for x in gradients] == [torch.empty_like(x).stride() for x in inputs]


@pytest.mark.parametrize("view", VIEWS, ids=lambda view: view.__name__)
@pytest.mark.parametrize("which", ["dout", "q", "k", "v", "out", "dout q k v out"])
def test_any_strides(view, which):
    """Whatever the strides: the gradients of the same values in fresh memory, bit for bit."""
    shapes = {"dout": (2, 150, 4, 128), "q": (2, 150, 4, 128), "k": (2, ONE_BLOCK, 4, 128), "v": (2, ONE_BLOCK, 4, 128)}
    tensors = {name: normal(*shape) for name, shape in shapes.items()}
    if view is odd_strides_where_size_is_one:
        tensors = {name: x[:1, :, :1].contiguous() for name, x in tensors.items()}
    tensors["out"], lse = flash_attn_ext.forward(tensors["q"], tensors["k"], tensors["v"], causal=True)
    strided = {name: view(x) if name in which.split() else x for name, x in tensors.items()}
    fresh = {name: x.clone(memory_format=torch.contiguous_format) for name, x in strided.items()}
    assert [x.stride() for x in strided.values()] != [x.stride() for x in fresh.values()] or view is misaligned_pointer
    expected = differentiate(*fresh.values(), lse, causal=True)
    results = differentiate(*strided.values(), lse, causal=True)
    assert_same(results, expected)
    assert [x.stride() for x in results] == [torch.empty_like(strided[name]).stride() for name in "qkv"]


@pytest.mark.parametrize("change", ["transposed", "misaligned", "expanded"])
def test_any_strides_of_lse(change):
    (*tensors, lse), expected = both_passes(*Case(128, "bf16", 200, ONE_BLOCK).inputs("cuda"))
    if change == "transposed":
        lse = lse.transpose(1, 2).contiguous().transpose(1, 2)
    elif change == "misaligned":
        lse = torch.cat([lse.new_zeros(1), lse.flatten()])[1:].view(lse.shape)
    else:
        lse = lse[:1, :1].expand_as(lse)
        expected = differentiate(*tensors, lse.contiguous())
    assert_same(differentiate(*tensors, lse), expected)


@both_masks
def test_out_sum_backward(causal):
    """The gradient of a sum is a single number, expanded."""
    inputs = Case(128, "bf16", 200, ONE_BLOCK, heads=6, kv_heads=2).inputs("cuda")
    _, expected = both_passes_and_check(*inputs, causal=causal, dout=torch.ones_like(inputs[0]))
    leaves = [x.detach().requires_grad_() for x in inputs]
    flash_attn_func(*leaves, causal=causal).sum().backward()
    assert_same([x.grad for x in leaves], expected)


# Rows that see nothing, NaN, and given out and lse --------------------------------------------------------------------


@each_row
@pytest.mark.parametrize("seqlens", [(300, 1), (300, 99), (193, 65), (65, 64)], ids=lambda s: f"q{s[0]}k{s[1]}")
@pytest.mark.parametrize("fill", [1000, math.nan])
def test_rows_that_see_nothing(row, seqlens, fill):
    seqlen_q, seqlen_k = seqlens
    q, k, v = (normal(2, s, 3, row["head_dim"]) for s in (seqlen_q, seqlen_k, seqlen_k))
    (dout, *_), (dq, dk, dv) = both_passes_and_check(q, k, v, causal=True)
    blind = seqlen_q - seqlen_k
    assert (dq[:, :blind] == 0).all()
    dout[:, :blind] = fill
    _, (other_dq, *others) = both_passes(q, k, v, causal=True, dout=dout)
    assert (other_dq[:, :blind] == 0).all()
    assert_same((other_dq[:, blind:], *others), (dq[:, blind:], dk, dv), "by dout of rows that see nothing")


@each_head_dim
@both_masks
@pytest.mark.parametrize(
    "batch, seqlen_q, seqlen_k", [(2, 5, 0), (2, 0, 5), (2, 0, 0), (0, 5, 5), (0, 0, 0), (2, 1000, 0)]
)
def test_empty_inputs(head_dim, batch, seqlen_q, seqlen_k, causal):
    inputs = [normal(batch, s, h, head_dim) for s, h in ((seqlen_q, 4), (seqlen_k, 2), (seqlen_k, 2))]
    _, gradients = both_passes(*inputs, causal=causal)
    dout = torch.randn_like(inputs[0])
    for results in (gradients, by_autograd(partial(flash_attn_func, causal=causal), dout, *inputs)):
        for x, gradient in zip(inputs, results, strict=True):
            assert (gradient.shape, gradient.dtype) == (x.shape, x.dtype) and (gradient == 0).all()
    torch.cuda.synchronize()


@each_row
@both_masks
@pytest.mark.parametrize("where", ["dout", "q", "k", "v", "out"])
@each_softcap
def test_nan_stays_in_its_head(row, causal, where, softcap):
    options = {"causal": causal, "softcap": softcap}
    arguments, expected = both_passes(*(normal(2, ONE_BLOCK, 4, row["head_dim"]) for _ in range(3)), **options)
    spoilt = dict(zip(("dout", "q", "k", "v", "out", "lse"), (x.clone() for x in arguments), strict=True))
    spoilt[where][1, 70, 2, 5] = math.nan
    results = differentiate(*spoilt.values(), **options)
    gradient_of_it = {"dout": 2, "q": 0, "k": 1, "v": 0, "out": 0}[where]
    assert results[gradient_of_it][1, 70, 2].isnan().any()
    for x, y in zip(results, expected, strict=True):
        x[1, :, 2] = y[1, :, 2]
    assert_same(results, expected, "in another head")


@each_row
@both_masks
@pytest.mark.parametrize("more", [1, 37, 63])
@each_softcap
def test_infinite_keys_and_rows_past_the_end(row, causal, more, softcap):
    """A key of the least weight, by a score of -inf or of -30000, gets the same gradients: rows past the end add no
    0 * inf. Without softcap the weight is 0."""
    q, k, v = (normal(2, row["backward"]["block_q"] + more, 3, row["head_dim"]) for _ in range(3))
    q[..., 5] = q[..., 5].abs() + 0.5
    dout = torch.randn_like(q)
    results = []
    for value in (-30000.0, -math.inf):
        k[:, 20, :, 5] = value
        _, (_, dk, dv) = both_passes(q, k, v, causal=causal, softcap=softcap, dout=dout)  # dq is 0 * inf
        results.append((dk, dv))
    for (name, a), b in zip(zip(("dk", "dv"), results[0], strict=True), results[1], strict=True):
        assert a.isfinite().all() and same_bits(a, b), f"{name} differs with a score of -inf"


@each_row
@both_masks
def test_given_lse_of_minus_infinity(row, causal):
    """Rows that saw nothing, as the caller says: no gradient for them, and none from them."""
    (dout, q, k, v, out, lse), _ = both_passes(*(normal(2, 150, 4, row["head_dim"]) for _ in range(3)), causal=causal)
    k, v = k[:, :ONE_BLOCK], v[:, :ONE_BLOCK]
    blind = torch.rand(2, 150, 4, device="cuda") < 0.3
    without = differentiate(dout.masked_fill(blind.unsqueeze(-1), 0), q, k, v, out, lse, causal=causal)
    lse = lse.masked_fill(blind.transpose(1, 2), -math.inf)
    dq, dk, dv = differentiate(dout, q, k, v, out.masked_fill(blind.unsqueeze(-1), 0), lse, causal=causal)
    assert (dq[blind] == 0).all()
    assert_same((dq[~blind], dk, dv), (without[0][~blind], *without[1:]))


@each_row
@both_dtypes
@pytest.mark.parametrize("kind", [(4, 4), (6, 2)], ids=["mha", "gqa"])
def test_gradients_of_keys_in_two_halves(row, dtype, kind):
    """Ring attention: each half of the keys gives its gradients from the merged out and lse."""
    (heads, kv_heads), head_dim, before, seqlen = kind, row["head_dim"], 230, 170
    q = normal(2, seqlen, heads, head_dim, dtype=dtype)
    k, v = (normal(2, before + seqlen, kv_heads, head_dim, dtype=dtype) for _ in range(2))
    dout = torch.randn_like(q)
    halves = [(k[:, :before], v[:, :before], False), (k[:, before:], v[:, before:], True)]  # the mask is on the later

    results = [flash_attn_ext.forward(q, *keys, causal=causal) for *keys, causal in halves]
    lse = torch.logaddexp(*(lse for _, lse in results))
    weights = [torch.exp(part - lse).transpose(1, 2).unsqueeze(-1) for _, part in results]
    out = sum(weight * part for weight, (part, _) in zip(weights, results, strict=True)).to(dtype)

    gradients = [differentiate(dout, q, *keys, out, lse, causal=causal) for *keys, causal in halves]
    (dq_a, dk_a, dv_a), (dq_b, dk_b, dv_b) = gradients
    whole = ((dq_a.float() + dq_b.float()).to(dtype), torch.cat([dk_a, dk_b], 1), torch.cat([dv_a, dv_b], 1))
    check_gradients(whole, dout, q, k, v, out, lse, causal=True)


# Refusals ------------------------------------------------------------------------------------------------------------


def test_second_derivatives_are_refused_not_forgotten():
    leaves = [normal(1, 50, 2, 64).requires_grad_() for _ in range(3)]
    for loss in (torch.sum, lambda out: out.square().sum()):
        (gradient,) = torch.autograd.grad(loss(flash_attn_func(*leaves)), leaves[0], create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            gradient.sum().backward()


@pytest.mark.parametrize("which", ["q", "k", "v", "out", "lse"])
def test_changes_in_place_are_noticed(which):
    leaves = [normal(1, 50, 2, 64).requires_grad_() for _ in range(3)]
    tensors = dict(zip("qkv", (x * 1 for x in leaves), strict=True))
    tensors["out"], tensors["lse"] = flash_attn_func(*tensors.values(), return_lse=True)
    loss = tensors["out"].sum()
    with torch.no_grad():
        tensors[which].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@each_head_dim
def test_a_loss_that_uses_lse_where_it_has_no_gradient_is_refused(head_dim):
    if limits.has_option("dlse", "backward", head_dim):
        pytest.skip("lse has a gradient here")
    out, lse = flash_attn_func(*(normal(1, 50, 2, head_dim).requires_grad_() for _ in range(3)), return_lse=True)
    with pytest.raises(ValueError, match=r"lse has a gradient; the backward kernels .*lse\.detach\(\)"):
        (out.sum() + lse.sum()).backward()


def test_head_dim_without_a_backward_kernel(forward_only):
    """Refused in the forward, wherever that runs with grad, and in the low-level backward. The text has what trains."""
    dout, q, k, v = (normal(1, 50, 2, forward_only) for _ in range(4))
    out, lse = flash_attn_ext.forward(q, k, v, softcap=30.0)
    leaf, attend = v.clone().requires_grad_(), partial(flash_attn_func, softcap=30.0)
    reentrant = checkpoint(attend, q, k, leaf, use_reentrant=True)
    calls = {
        "the forward": lambda: attend(q, k, leaf),
        "non-reentrant checkpoint": lambda: checkpoint(attend, q, k, leaf, use_reentrant=False),
        "reentrant checkpoint, in its recomputation": lambda: reentrant.backward(dout),
        "the low-level backward": lambda: flash_attn_ext.backward(dout, q, k, v, out, lse, softcap=30.0),
    }
    for name, call in calls.items():
        with pytest.raises(ValueError) as caught:
            call()
        text = str(caught.value)
        # A checkpoint that raises leaves its hooks installed as long as the traceback keeps it alive.
        del caught
        gc.collect()
        trains = limits.in_words(flash_attn_ext.supported()["backward"])
        words = [f"head_dim {forward_only} has no backward kernel", f"train: {trains}"]
        assert [word for word in words if word not in text] == [], f"{name}: {text}"


# Sizes ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape", [(8200, 128, 16, 128), (1, 800, 21000, 128), (4100, 128, 16, 256), (1, 800, 10500, 256)], ids=str
)
def test_more_than_2_to_the_31_elements(shape):
    gpu.needs_free(50)  # eight tensors of 4.3 GiB, and the sums of dq in float32
    dout, q, k, v = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(4))
    assert q.numel() > 2**31
    out, lse = flash_attn_ext.forward(q, k, v, causal=True)
    gradients = flash_attn_ext.backward(dout, q, k, v, out, lse, causal=True)
    last = [x[-1:, :, -1:].clone(memory_format=torch.contiguous_format) for x in (q, k, v, dout)]
    _, expected = both_passes_and_check(*last[:3], causal=True, dout=last[3])
    assert_same([x[-1:, :, -1:] for x in gradients], expected, "in the last head", keys=shape[1])
    del dout, q, k, v, out, lse, gradients
    torch.cuda.empty_cache()


BEYOND_A_GRID_DIMENSION = {
    "batch": (70001, 3, 1, 1, 5),
    "heads": (1, 3, 70001, 70001, 5),
    "heads of MQA": (1, 3, 70001, 1, 5),
    "blocks": (1, 70000 * 64 + 3, 1, 1, 5),
}


@pytest.mark.parametrize(
    "head_dim, what",  # the oracle of so many blocks takes too much memory at larger head dims
    [(d, what) for d in TRAINING_HEAD_DIMS for what in BEYOND_A_GRID_DIMENSION if what != "blocks" or d <= 64],
)
def test_sizes_beyond_a_grid_dimension(head_dim, what):
    batch, seqlen_q, heads, kv_heads, seqlen_k = BEYOND_A_GRID_DIMENSION[what]
    q = normal(batch, seqlen_q, heads, head_dim)
    both_passes_and_check(q, *(normal(batch, seqlen_k, kv_heads, head_dim) for _ in range(2)), causal=True)
    torch.cuda.empty_cache()


# Streams, graphs, devices, repeats -----------------------------------------------------------------------------------

SLEEP = 100_000_000  # cycles: some 50 ms, far longer than the host needs to come back


@each_head_dim
@both_masks
def test_other_stream_without_synchronising(head_dim, causal):
    """Work is ordered on the current stream, and the call returns before that stream gets to it."""
    arguments, expected = both_passes(*(normal(2, 500, 4, head_dim) for _ in range(3)), causal=causal)
    late = [torch.full_like(x, math.nan) for x in arguments]
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        differentiate(*arguments, causal=causal)  # so that memory for this stream is at hand
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(SLEEP)
        for x, y in zip(late, arguments, strict=True):
            x.copy_(y)
        results = flash_attn_ext.backward(*late, causal=causal)
        assert not stream.query(), "the call waited for the GPU"
    stream.synchronize()
    assert_same(results, expected, keys=500)


def test_streams_that_come_and_go_keep_no_memory():
    """A program may make streams for ever: only the first of them have a counter of their own."""
    runtime = ctypes.CDLL(f"libcudart.so.{torch.version.cuda.split('.')[0]}")  # torch's
    inputs = [normal(1, 70, 2, 64) for _ in range(3)]
    expected = flash_attn_ext.forward(*inputs)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for _ in range(1500):
        handle = ctypes.c_void_p()
        assert runtime.cudaStreamCreate(ctypes.byref(handle)) == 0
        with torch.cuda.stream(torch.cuda.ExternalStream(handle.value)):
            results = flash_attn_ext.forward(*inputs)
        torch.cuda.synchronize()
        assert runtime.cudaStreamDestroy(handle) == 0
        assert all(same_bits(x, y) for x, y in zip(results, expected, strict=True))
    del results
    assert torch.cuda.memory_allocated() - before <= 1024 * 512


def test_autograd_goes_back_on_the_stream_of_the_forward():
    arguments, expected = both_passes(*(normal(2, 500, 4, 128) for _ in range(3)), causal=True)
    dout, *inputs = arguments[:4]
    leaves = [torch.full_like(x, math.nan).requires_grad_() for x in inputs]
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(SLEEP)
        with torch.no_grad():
            for x, y in zip(leaves, inputs, strict=True):
                x.copy_(y)
        out = flash_attn_func(*leaves, causal=True)
    out.backward(dout)  # on this thread's default stream
    assert_same([x.grad for x in leaves], expected, keys=500)


@each_row
@both_masks
@pytest.mark.parametrize("kind", [(20, 20), (20, 4)], ids=["mha", "gqa"])
@each_softcap
def test_dk_and_dv_are_bitwise_reproducible(row, causal, kind, softcap):
    """The same bits 50 times over, with enough items that a race between producer and consumers would show."""
    (heads, kv_heads), plan = kind, row["backward"]
    q = normal(4, 9 * plan["block_q"] + 7, heads, row["head_dim"])
    k, v = (normal(4, 3 * plan["block_kv"] + 3, kv_heads, row["head_dim"]) for _ in range(2))
    options = {"causal": causal, "softcap": softcap}
    arguments, (first_dq, first_dk, first_dv) = both_passes_and_check(q, k, v, **options)
    different = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(50):
        dq, dk, dv = flash_attn_ext.backward(*arguments, **options)
        different += (dk != first_dk).sum() + (dv != first_dv).sum()
    assert different.item() == 0
    assert same_but_for_order(dq, first_dq)


@pytest.fixture
def one_multiprocessor():
    """Even the small cases have coarse items."""
    with gpu.one_multiprocessor():
        yield


GROUPED = [case for case in BACKWARD if case.heads != case.kv_heads and max(case.seqlen_q, case.seqlen_k) < 5000]
GROUPED += [
    Case(d, "bf16", 700, 700, True, 2, heads, kv_heads, softcap=softcap)
    for d in TRAINING_HEAD_DIMS
    for heads, kv_heads in ((10, 1), (13, 1), (64, 2))
    for softcap in (0.0, 30.0)
]


@pytest.mark.parametrize("case", GROUPED, ids=str)
def test_items_with_several_query_heads(case, one_multiprocessor):
    both_passes_and_check(*case.inputs("cuda"), **case.options("cuda"))


# Query heads, KV heads, batch and length, and what the order of work (csrc/tile/schedule.h) does with the query heads
# of a KV head on 132 multiprocessors, by themselves or as 66 pairs, full or causal.
SHARED = {
    "two items a KV head, the last in eight": (16, 2, 5, 1411),
    "two uneven items a KV head, the last in seven": (14, 2, 5, 1411),
    "an item a KV head, the last in four": (16, 4, 5, 1411),
    "every query head by itself": (32, 1, 1, 1411),
    "few items": (12, 3, 1, 300),
    "rows from the first and from the last on": (16, 2, 1, 2079),
}


@each_row
@both_masks
@pytest.mark.parametrize("shape", SHARED.values(), ids=SHARED.keys())
def test_kv_heads_that_several_blocks_share(row, causal, shape):
    """Their dk and dv meet in float32 memory, which held NaN before, and are the same in every run."""
    heads, kv_heads, batch, seqlen = shape
    q = normal(batch, seqlen, heads, row["head_dim"])
    k, v = (normal(batch, seqlen, kv_heads, row["head_dim"]) for _ in range(2))
    arguments, first = both_passes_and_check(q, k, v, causal=causal)
    taken = extra_memory(lambda: flash_attn_ext.backward(*arguments, causal=causal)) - sum(x.nbytes for x in first)
    for _ in range(3):
        gpu.poison(q, k, v, torch.empty(taken, dtype=torch.uint8, device="meta"))
        results = flash_attn_ext.backward(*arguments, causal=causal)
        assert_same(results, first, keys=seqlen)


@each_head_dim
def test_shared_kv_heads_without_some_gradients(head_dim):
    q, k, v = normal(2, 700, 16, head_dim), *(normal(2, 700, 2, head_dim) for _ in range(2))
    arguments, every = both_passes_and_check(q, k, v, causal=True)
    for needs in itertools.product((False, True), repeat=3):
        results = by_operator(*arguments, causal=True, needs=list(needs))
        chosen = [x if need else None for x, need in zip(results, needs, strict=True)]
        assert_same(chosen, [x if need else None for x, need in zip(every, needs, strict=True)], keys=700)


def test_threads():
    """Each on its own stream, all at once."""
    cases = [Case(d, "bf16", 300 + 10 * i, 400, True) for i, d in enumerate(TRAINING_HEAD_DIMS * 2)]
    passes = [both_passes(*case.inputs("cuda"), causal=True) for case in cases]
    torch.cuda.synchronize()
    failures = []

    def work(i):
        (dout, *inputs, _, _), expected = passes[i]
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                for _ in range(20):
                    results = by_autograd(partial(flash_attn_func, causal=True), dout, *inputs)
                    assert_same(results, expected, f"in thread {i}", keys=400)
        except (AssertionError, RuntimeError) as failure:
            failures.append(failure)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(cases))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures[0]


@each_head_dim
def test_first_call_of_a_thread(head_dim):
    """Autograd's thread may not have called CUDA before, and memory that torch has at hand takes no call either."""
    arguments, expected = both_passes(*Case(head_dim, "bf16", 65, 65, True).inputs("cuda"), causal=True)
    flash_attn_ext.backward(*arguments, causal=True)  # its memory is at hand now
    torch.cuda.synchronize()
    results, failures = [], []

    def work():
        try:
            results.extend(flash_attn_ext.backward(*arguments, causal=True))
        except RuntimeError as failure:
            failures.append(failure)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not failures, failures[0]
    assert_same(results, expected, keys=65)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_device_of_the_tensors_not_the_current_one():
    arguments, expected = both_passes(*Case(128, "bf16", 200, 300, True).inputs("cuda:0"), causal=True)
    with torch.cuda.device(0):
        results = flash_attn_ext.backward(*(x.to("cuda:1") for x in arguments), causal=True)
    assert results[0].device == torch.device("cuda:1")
    assert_same([x.to("cuda:0") for x in results], expected, keys=300)


# The operators -------------------------------------------------------------------------------------------------------


@both_masks
@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
def test_opcheck(causal, layout):
    """Keys fit into one block here: opcheck compares runs, and dq would differ by the order of its sum."""
    inputs = Case(128, "bf16", 130, ONE_BLOCK, causal, heads=6, kv_heads=2, layout=layout).inputs("cuda")
    arguments, _ = both_passes(*inputs, causal=causal)
    library.opcheck(backward_operator, arguments, {"causal": causal, "needs": [True] * 3})
    leaves = [x.detach().requires_grad_() for x in inputs]
    # Its last test differentiates every result, and lse refuses that.
    tests = ["test_schema", "test_autograd_registration", "test_faketensor"]
    library.opcheck(forward_operator, (*leaves, None, causal), test_utils=tests)
