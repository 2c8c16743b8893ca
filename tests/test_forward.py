"""The forward pass on the GPU: the case table against the oracle, then what a table of shapes cannot show."""

import itertools
import math
import re
import threading
from contextlib import nullcontext

import gpu
import pytest
import torch
from cases import (
    DTYPES,
    FORWARD,
    FORWARD_OPTIONS,
    HEAD_DIMS,
    LAYOUTS,
    PLANS,
    ROWS,
    SMOKE,
    SPLIT_BLOCKS,
    WALKS,
    Case,
    along_the_walk,
    both_dtypes,
    both_masks,
    each_plan,
    extreme_logits,
    forward_as_packed,
    forward_plans,
    lengths_of_plan,
    random_cases,
)
from conftest import SEED
from gpu import attend, attend_by_each_plan, normal, one_multiprocessor
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from oracle import check, same_bits
from views import VIEWS, embed, misaligned_pointer, odd_strides_where_size_is_one

import flash_attn_ext
from flash_attn_ext import flash_attn_func

pytestmark = gpu.needs_hopper

each_head_dim = pytest.mark.parametrize("head_dim", HEAD_DIMS)
each_row = pytest.mark.parametrize("row", ROWS, ids=lambda row: f"d{row['head_dim']}")


def attend_and_check(q, k, v, *options, lse_slack=1.0, **options_by_name):
    out, lse = attend(q, k, v, *options, **options_by_name)
    check(out, lse, q, k, v, *options, lse_slack=lse_slack, **options_by_name)
    return out, lse


def check_each_plan(q, k, v, lse_slack=1.0, **options):
    for out, lse in attend_by_each_plan(q, k, v, **options):
        check(out, lse, q, k, v, lse_slack=lse_slack, **options)


@pytest.fixture(autouse=True)
def plan_is_taken(request):
    """By tests of one plan, whatever the number of their items."""
    which = request.node.callspec.params.get("which") if hasattr(request.node, "callspec") else None
    with one_multiprocessor() if which == "short_forward" else nullcontext():
        yield


def assert_same(results, expected, what=""):
    for name, a, b in zip(("out", "lse"), results, expected, strict=True):
        assert same_bits(a, b), f"{name} differs {what}"


# The table -----------------------------------------------------------------------------------------------------------


@pytest.mark.quick
@pytest.mark.parametrize("case", SMOKE, ids=str)
def test_smoke(case):
    attend_and_check(*case.inputs("cuda"), **case.options("cuda"))


@pytest.mark.parametrize("case", FORWARD, ids=str)
def test_table(case):
    check_each_plan(*case.inputs("cuda"), **case.options("cuda"))


@pytest.mark.parametrize("case", FORWARD_OPTIONS, ids=str)
def test_options(case):
    check_each_plan(*case.inputs("cuda"), **case.options("cuda"))


@seed(SEED)
@settings(max_examples=60, deadline=None, database=None, print_blob=True, suppress_health_check=list(HealthCheck))
@given(case=random_cases("forward"), values=st.integers(0, 2**32 - 1))
def test_random_shapes(case, values):
    check_each_plan(*case.inputs("cuda", seed=values), **case.options("cuda"))


# The public function -------------------------------------------------------------------------------------------------


@pytest.mark.quick
def test_public_function_is_the_low_level_pair():
    q, k, v = Case(128, "bf16", 200, 300, heads=6, kv_heads=2).inputs("cuda")
    out, lse = attend(q, k, v, 0.1, True)
    assert same_bits(flash_attn_func(q, k, v, 0.1, True), out)
    assert same_bits(flash_attn_func(q, k, v, softmax_scale=0.1, causal=True), out)
    assert_same(flash_attn_func(q, k, v, 0.1, True, return_lse=True), (out, lse))
    assert_same(torch.ops.flash_attn_ext.forward(q, k, v, 0.1, True), (out, lse), "through the operator")


@each_head_dim
@both_masks
def test_default_scale_is_one_over_sqrt_head_dim(head_dim, causal):
    q, k, v = Case(head_dim, "bf16", 130, 170).inputs("cuda")
    assert_same(attend(q, k, v, None, causal), attend(q, k, v, head_dim**-0.5, causal))


@each_head_dim
@both_dtypes
@pytest.mark.parametrize("softmax_scale", [1e-4, 0.03, 1.0, 2.5, 30.0])
def test_softmax_scale(head_dim, dtype, softmax_scale):
    q, k, v = (normal(2, 193, 3, head_dim, dtype=dtype) for _ in range(3))
    attend_and_check(q, k, v, softmax_scale, causal=True)


def test_inputs_stay_as_they_are():
    inputs = Case(128, "bf16", 200, 300, layout="bhsd").inputs("cuda")
    before = [x.clone() for x in inputs]
    attend(*inputs, causal=True)
    assert all(same_bits(x, y) for x, y in zip(inputs, before, strict=True))


# Memory --------------------------------------------------------------------------------------------------------------


def test_poison_reaches_what_is_allocated_next():
    """The test of the test: without this, attend() would prove nothing about unwritten memory."""
    q = normal(2, 200, 3, 128)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    gpu.poison(q, lse)
    empty = torch.empty_like(q), torch.empty_like(lse)
    assert all(x.isnan().all() for x in empty)


@each_row
@both_masks
def test_surroundings_change_nothing(row, causal):
    """q, k, v inside larger buffers: the fill around them, in every dimension, must not reach the result."""
    head_dim, rows = row["head_dim"], [1, *(plan["block_q"] + 5 for plan in forward_plans(row))]
    for seqlen_q, seqlen_k in itertools.product(rows, (3, row["forward"]["block_kv"] + 9)):
        inputs = [normal(2, s, h, head_dim) for s, h in ((seqlen_q, 6), (seqlen_k, 2), (seqlen_k, 2))]
        expected = attend(*inputs, causal=causal)
        for fill in (0.0, math.nan, math.inf, -math.inf):
            embedded = [embed(x, fill, margin=300) for x in inputs]
            assert_same(attend(*embedded, causal=causal), expected, f"with {fill} around q, k and v")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_out_has_the_strides_of_empty_like(layout):
    q, k, v = Case(128, "bf16", 200, 200, heads=6, kv_heads=2, layout=layout).inputs("cuda")
    out, lse = attend(q, k, v)
    assert out.stride() == torch.empty_like(q).stride()
    assert lse.is_contiguous()


@pytest.mark.parametrize("view", VIEWS, ids=lambda view: view.__name__)
@pytest.mark.parametrize("which", ["q", "k", "v", "qkv"])
def test_any_strides(view, which):
    """Whatever the strides: the result of the same values in fresh memory, bit for bit."""
    inputs = {"q": normal(2, 150, 4, 128), "k": normal(2, 170, 4, 128), "v": normal(2, 170, 4, 128)}
    if view is odd_strides_where_size_is_one:
        inputs = {name: x[:1, :, :1].contiguous() for name, x in inputs.items()}
    strided = {name: view(x) if name in which else x for name, x in inputs.items()}
    fresh = {name: x.clone(memory_format=torch.contiguous_format) for name, x in strided.items()}
    assert [x.stride() for x in strided.values()] != [x.stride() for x in fresh.values()] or view is misaligned_pointer
    expected = attend_and_check(*fresh.values(), causal=True)
    results = attend(*strided.values(), causal=True)
    assert_same(results, expected)
    assert results[0].stride() == torch.empty_like(strided["q"]).stride()


# Extreme logits ------------------------------------------------------------------------------------------------------


@each_row
@both_dtypes
@both_masks
@pytest.mark.parametrize(
    "kind",
    ["growing", "falling", "all equal", "all zero", "all very negative", "all very positive"]
    + ["huge first key", "huge last key", "huge v", "tiny v"],
)
def test_extreme_logits(kind, row, dtype, causal):
    # Tensor cores truncate the running sum of q k at every step. Where all of 256 products have one sign and fp16's
    # full precision, the truncations add up to 1.2 times lse's bound (docs/forward.md), and no schedule changes that.
    one_sign = kind in ("growing", "falling", "all very negative", "all very positive")
    lse_slack = max(1, row["head_dim"] / 128) if one_sign and dtype == torch.float16 else 1
    check_each_plan(*extreme_logits(kind, row, dtype), causal=causal, lse_slack=lse_slack)


# Where a plan keeps its offset, blocks without a mask take no maximum (docs/forward.md). With the window masked blocks
# follow them.
SEEN = {"full": {}, "causal": {"causal": True}, "window": {"window_size": (700, 40)}}
each_seen = pytest.mark.parametrize("seen", SEEN.values(), ids=SEEN.keys())
each_walk = pytest.mark.parametrize("kind", WALKS)
KEEPING_PLANS = [plan for plan in PLANS if "keeps_offset" in plan[0][plan[1]]]


@each_row
@both_dtypes
@each_seen
@each_walk
def test_scores_along_the_walk(kind, row, dtype, seen):
    check_each_plan(*along_the_walk(kind, row, 301, 1163, heads=4, kv_heads=2, dtype=dtype), **seen)


@each_row
@each_seen
@each_walk
def test_scores_along_the_walk_of_packed_sequences(kind, row, seen):
    both_lengths = (301, 1163), (177, 521)
    sequences = [along_the_walk(kind, row, *lengths, heads=2, kv_heads=1, packed=True) for lengths in both_lengths]
    edges = [torch.tensor(x, dtype=torch.int32, device="cuda") for x in ([0, 301, 478], [0, 1163, 1684])]
    packed = [torch.cat(x, dim=1)[0] for x in zip(*sequences, strict=True)]
    out, lse = attend_and_check(*packed, cu_seqlens_q=edges[0], cu_seqlens_k=edges[1], **seen)
    for i, inputs in enumerate(sequences):
        rows = slice(*edges[0][i : i + 2].tolist())
        expected = forward_as_packed(*inputs, **seen)
        assert_same((out[None, rows], lse[None, :, rows]), expected, f"from sequence {i} alone")


@each_row
@both_dtypes
@each_seen
def test_growing_scores_and_huge_v(row, dtype, seen):
    q, k, v = along_the_walk("steps of 20 a block", row, 301, 1163, heads=4, kv_heads=2, dtype=dtype)
    check_each_plan(q, k, v * (1e4 if dtype == torch.float16 else 1e20), **seen)


@each_row
@both_dtypes
@both_masks
@pytest.mark.parametrize("kind", [kind for kind in WALKS if "late step" in kind])
def test_a_late_step_up_from_many_equal_scores(kind, row, dtype, causal):
    """Sums of many keys, and then a block that is large: P must stay in the range of the dtype, fp16's too."""
    check_each_plan(*along_the_walk(kind, row, 301, 20011, heads=2, kv_heads=1, dtype=dtype), causal=causal)


@each_row
@both_masks
@pytest.mark.parametrize("kind", ["growing by 40 a block", "growing by 130 a block", "one key of 100, the middle"])
def test_repeats_of_scores_along_the_walk_are_bitwise_equal(kind, row, causal):
    inputs = along_the_walk(kind, row, 3 * row["forward"]["block_q"] + 7, 1163, heads=80, kv_heads=20)
    expected = attend(*inputs, causal=causal)
    for _ in range(50):
        assert_same(attend(*inputs, causal=causal), expected, "from the first time")


@each_plan
@both_masks
def test_items_are_computed_twice_where_a_row_grows_too_far_and_nowhere_else(row, which, dtype, causal):
    """Some rows see their first key, the last of the walk, so many nats above all others."""
    block_q, keeps_offset = row[which]["block_q"], "keeps_offset" in row[which]
    seqlen_q, seqlen_k = lengths_of_plan(row, which)
    q, k, v = (normal(2, s, 2, row["head_dim"], dtype=DTYPES[dtype]) for s in (seqlen_q, seqlen_k, seqlen_k))
    q[..., 0], k[..., 0] = 0, 0
    places = [(0, 0, 0), (0, 1, 5), (0, 1, 70), (1, 0, block_q), (1, 1, 2 * block_q + 1), (1, 1, seqlen_q - 1)]
    for batch, head, place in places:
        q[batch, place, head, 0] = 8
    for nats, lost in ((0, False), (40, False), (75, False), (95, keeps_offset), (300, keeps_offset)):
        k[:, 0, :, 0] = nats / 8 * row["head_dim"] ** 0.5
        before = flash_attn_ext._C.items_again(q)
        attend_and_check(q, k, v, causal=causal)
        items = {(batch, head, place // block_q) for batch, head, place in places}
        assert flash_attn_ext._C.items_again(q) - before == (len(items) if lost else 0), f"{nats} nats"


@pytest.mark.parametrize(
    "row, which, dtype",
    KEEPING_PLANS,
    ids=[f"d{row['head_dim']}-{which}-{dtype}" for row, which, dtype in KEEPING_PLANS],
)
@both_masks
def test_no_item_is_computed_twice_for_usual_scores(row, which, dtype, causal):
    """Nor for a mask that ends with a block, or a NaN that a row meets in its first block."""
    seqlen_q, seqlen_k = lengths_of_plan(row, which)
    before = flash_attn_ext._C.items_again(torch.empty(0, device="cuda"))
    for more_keys in range(65):
        lengths = (seqlen_q, seqlen_k + more_keys, seqlen_k + more_keys)
        q, k, v = (normal(1, seqlen, 1, row["head_dim"], dtype=DTYPES[dtype]) for seqlen in lengths)
        q[0, 3, 0, 1] = math.nan
        attend(q, k, v, causal=causal)
    if not causal:
        k[0, -1, 0, 1] = math.nan
        out, _ = attend(q, k, v)
        assert out.isnan().all()
    assert flash_attn_ext._C.items_again(q) == before


@each_row
def test_lost_items_of_short_packed_sequences(row):
    """Items have tiles of several sequences."""
    sequences, rows, keys = 150, 41, 500
    inputs = along_the_walk("growing by 90 a block", row, rows, keys, heads=2, kv_heads=1, packed=True)
    q, k, v = (x[0].repeat(sequences, 1, 1) for x in inputs)
    edges = [torch.arange(sequences + 1, dtype=torch.int32, device="cuda") * n for n in (rows, keys)]
    before = flash_attn_ext._C.items_again(q)
    for _ in range(3):
        attend_and_check(q, k, v, cu_seqlens_q=edges[0], cu_seqlens_k=edges[1])
    assert (flash_attn_ext._C.items_again(q) > before) == ("keeps_offset" in row["forward"])


@each_row
@pytest.mark.parametrize("nats", [(40, 60), (80, 80), (85, 90), (87.5, 87.5), (90, 20), (100, 100)], ids=str)
def test_large_sums_ahead_of_the_edge_of_a_window(row, nats):
    """A key that is far above all before it, in a block without a mask, and one in the block that the window cuts."""
    seqlen, left = 1163, 700
    q, k, v = (normal(1, seqlen, 2, row["head_dim"]) for _ in range(3))
    q[..., 0], k[..., 0] = 0, 0
    q[:, -1, :, 0] = 8
    for key, size in zip((seqlen - left // 2, seqlen - 1 - left), nats, strict=True):
        k[:, key, :, 0] = size / 8 * row["head_dim"] ** 0.5
    attend_and_check(q, k, v, window_size=(left, 0))


# Rows that see nothing, NaN and Inf ----------------------------------------------------------------------------------


@each_row
@pytest.mark.parametrize("seqlens", [(300, 1), (300, 99), (193, 65), (65, 64)], ids=lambda s: f"q{s[0]}k{s[1]}")
def test_rows_that_see_nothing(row, seqlens):
    seqlen_q, seqlen_k = seqlens
    q, k, v = (normal(2, s, 3, row["head_dim"]) for s in (seqlen_q, seqlen_k, seqlen_k))
    out, lse = attend_and_check(q, k, v, causal=True)
    blind = seqlen_q - seqlen_k
    assert (out[:, :blind] == 0).all() and (lse[:, :, :blind] == -math.inf).all()
    assert lse[:, :, blind:].isfinite().all()


@both_masks
@pytest.mark.parametrize(
    "batch, seqlen_q, seqlen_k", [(2, 5, 0), (2, 0, 5), (2, 0, 0), (0, 5, 5), (0, 0, 0), (2, 1000, 0)]
)
def test_empty_inputs(batch, seqlen_q, seqlen_k, causal):
    q = normal(batch, seqlen_q, 4, 128)
    k, v = normal(batch, seqlen_k, 2, 128), normal(batch, seqlen_k, 2, 128)
    out, lse = attend(q, k, v, causal=causal)
    assert out.shape == q.shape and out.dtype == q.dtype and (out == 0).all()
    assert lse.shape == (batch, 4, seqlen_q) and lse.dtype == torch.float32 and (lse == -math.inf).all()
    torch.cuda.synchronize()


@each_row
@both_masks
@pytest.mark.parametrize("place", [70, -30])
def test_nan_in_q_reaches_its_row_only(row, causal, place):
    seqlen = 3 * max(row["forward"]["block_q"], row["forward"]["block_kv"]) + 21
    q, k, v = (normal(2, seqlen, 2, row["head_dim"]) for _ in range(3))
    out, lse = attend(q, k, v, causal=causal)
    q[1, place, 0, 5] = math.nan
    nan_out, nan_lse = attend(q, k, v, causal=causal)
    assert nan_out[1, place, 0].isnan().all() and not nan_lse[1, 0, place].isfinite()
    nan_out[1, place, 0], nan_lse[1, 0, place] = out[1, place, 0], lse[1, 0, place]
    assert_same((nan_out, nan_lse), (out, lse), "in rows without NaN")


@each_row
@both_masks
@pytest.mark.parametrize("block", [0, 1, 3])  # of keys; the last one is masked
@pytest.mark.parametrize("what", ["nan", "score of +inf"])
def test_nan_score_reaches_the_rows_that_see_it(row, causal, what, block):
    block_kv = row["forward"]["block_kv"]
    seqlen, key = 3 * block_kv + 21, block * block_kv + 2
    q, k, v = (normal(2, seqlen, 4, row["head_dim"]) for _ in range(3))
    k, v = k[:, :, :2], v[:, :, :2]
    q[..., 5] = 1
    out, lse = attend(q, k, v, causal=causal)
    k = k.clone()
    k[0, key, 1, 5] = math.nan if what == "nan" else math.inf
    nan_out, nan_lse = attend(q, k, v, causal=causal)
    first = key if causal else 0
    assert nan_out[0, first:, 2:].isnan().all() and not nan_lse[0, 2:, first:].isfinite().any()
    nan_out[0, first:, 2:], nan_lse[0, 2:, first:] = out[0, first:, 2:], lse[0, 2:, first:]
    assert_same((nan_out, nan_lse), (out, lse), "in rows that do not see the key")


@each_row
@both_masks
@pytest.mark.parametrize("value", [math.nan, math.inf], ids=str)
def test_nan_in_v_reaches_out_only(row, causal, value):
    block_kv = row["forward"]["block_kv"]
    seqlen, key = 3 * block_kv + 21, 2 * block_kv + 2
    q, k, v = (normal(2, seqlen, 2, row["head_dim"]) for _ in range(3))
    out, lse = attend(q, k, v, causal=causal)
    v[0, key, 1, 5] = value
    nan_out, nan_lse = attend(q, k, v, causal=causal)
    assert same_bits(nan_lse, lse), "lse does not depend on v"
    first = key if causal else 0
    assert not nan_out[0, first:, 1, 5].isfinite().any()
    # Rows that mask the key may or may not have its block multiplied by probabilities of 0: unspecified.
    nan_out[0, :, 1, 5] = out[0, :, 1, 5]
    assert same_bits(nan_out, out), "only the element's own column may change"


@each_row
@both_dtypes
@both_masks
@pytest.mark.parametrize("where", ["all", "first block", "last block", "all but one"])
def test_scores_of_minus_inf(row, dtype, causal, where):
    block_kv = row["forward"]["block_kv"]
    seqlen = 3 * block_kv + 11
    q, k, v = (normal(1, seqlen, 2, row["head_dim"], dtype=dtype) for _ in range(3))
    q[..., 3] = 1
    keys = {
        "all": slice(None),
        "first block": slice(0, block_kv),
        "last block": slice(2 * block_kv, None),
        "all but one": [j for j in range(seqlen) if j != block_kv + 1],
    }[where]
    k[:, keys, :, 3] = -math.inf
    out, lse = attend_and_check(q, k, v, causal=causal)
    if where == "all":
        assert (out == 0).all() and (lse == -math.inf).all()


# Divided calls (docs/forward.md) ------------------------------------------------------------------------------------

SHARED_TILES = {"seqlen_q": 131, "batch": 40, "heads": 16, "kv_heads": 2}  # in more items than multiprocessors
SHARED_KEYS = {"seqlen_q": 75, "batch": 1, "heads": 4, "kv_heads": 2}  # few items, of many keys
each_division = pytest.mark.parametrize("division", [SHARED_TILES, SHARED_KEYS], ids=["tiles", "keys"])


def divided_inputs(row, division, dtype=torch.bfloat16):
    is_split, block_kv = division is SHARED_KEYS, row["forward"]["block_kv"]
    seqlen_k = SPLIT_BLOCKS * block_kv + 5 if is_split else 2 * block_kv + 5
    batch, heads, kv_heads = division["batch"], division["heads"], division["kv_heads"]
    shapes = (division["seqlen_q"], heads), (seqlen_k, kv_heads), (seqlen_k, kv_heads)
    return [normal(batch, *shape, row["head_dim"], dtype=dtype) for shape in shapes]


def kernels_of(*inputs, **options):
    """Names of the forward's kernels that a call launches."""
    flash_attn_ext.forward(*inputs, **options)  # makes the stream's counters
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        flash_attn_ext.forward(*inputs, **options)
        torch.cuda.synchronize()
    return [event.name for event in profile.events() if re.search("forward_kernel|combine_kernel", event.name)]


def test_which_calls_are_divided():
    """By the names of kernels, and the last argument of their configs: this section's other tests would not notice that
    none is."""
    tiles, keys = (divided_inputs(ROWS[HEAD_DIMS.index(128)], division) for division in (SHARED_TILES, SHARED_KEYS))
    calls = {
        "tiles": (kernels_of(*tiles), ["true"]),
        "keys": (kernels_of(*keys), ["true", "combine"]),
        **{
            f"{name}, {options}": (kernels_of(*inputs, **options), ["false"])
            for name, inputs in (("tiles", tiles), ("keys", keys))
            for options in ({"causal": True}, {"softcap": 30.0}, {"window_size": (9, 9)})
        },
    }
    for name, (kernels, expected) in calls.items():
        found = [re.search(r"ForwardConfig<[^>]*\b(true|false)>|(combine)_kernel", kernel) for kernel in kernels]
        assert [match and (match[1] or match[2]) for match in found] == expected, f"{name}: {kernels}"


@each_row
@both_dtypes
@each_division
def test_surroundings_change_nothing_in_divided_calls(row, dtype, division):
    inputs = divided_inputs(row, division, dtype)
    expected = attend_and_check(*inputs)
    for fill in (math.nan, math.inf):
        embedded = [embed(x, fill, margin=70) for x in inputs]
        assert_same(attend(*embedded), expected, f"with {fill} around q, k, v")


@each_row
@both_dtypes
def test_heads_that_share_a_tile_have_the_bits_of_heads_alone(row, dtype):
    """Also where other rows of the tile see scores that grow."""
    q, k, v = divided_inputs(row, SHARED_TILES, dtype)
    q[:, ::2, ::3] *= 5
    expected = attend(q, k, v)
    group = q.shape[2] // k.shape[2]
    for head in range(q.shape[2]):
        out, lse = attend(q[:, :, head : head + 1], *(x[:, :, head // group : head // group + 1] for x in (k, v)))
        assert_same((out, lse), (expected[0][:, :, head : head + 1], expected[1][:, head : head + 1]), f"head {head}")


@each_row
@both_dtypes
@each_division
@pytest.mark.parametrize("kind", ["growing by 90 a block", "steps of 60 a block", "one key of 3000, the first"])
def test_scores_along_the_walk_of_divided_calls(row, dtype, division, kind):
    _, seqlen_k, *_ = divided_inputs(row, division)[1].shape
    heads, kv_heads = division["heads"], division["kv_heads"]
    q, k, v = along_the_walk(kind, row, division["seqlen_q"], seqlen_k, heads, kv_heads, dtype)
    inputs = [x.expand(division["batch"], -1, -1, -1).contiguous() for x in (q, k, v)]
    before = flash_attn_ext._C.items_again(q)
    expected = attend_and_check(*inputs)
    assert_same(attend(*inputs), expected, "in another run")
    if kind == "growing by 90 a block":  # too much for any offset that is kept
        assert (flash_attn_ext._C.items_again(q) > before) == ("keeps_offset" in row["forward"])


@each_row
@each_division
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nan_and_inf_in_divided_calls(row, division, value):
    """A row of q has it, of one head; then a key, which all rows of its KV head's query heads see."""
    q, k, v = divided_inputs(row, division)
    out, lse = attend(q, k, v)
    bad_q = q.clone()
    bad_q[-1, 40, 1, 3] = value
    bad_out, bad_lse = attend(bad_q, k, v)
    assert bad_out[-1, 40, 1].isnan().all() and bad_lse[-1, 1, 40].isnan()
    rest = torch.ones_like(lse, dtype=torch.bool)
    rest[-1, 1, 40] = False
    assert same_bits(bad_lse[rest], lse[rest])
    assert same_bits(bad_out.transpose(1, 2)[rest], out.transpose(1, 2)[rest])

    bad_v = v.clone()
    bad_v[0, 7, 0, 5] = value
    bad_out, bad_lse = attend(q, k, bad_v)
    group = q.shape[2] // k.shape[2]
    assert same_bits(bad_lse, lse)
    expected = out[0, :, :group, 5].float() * 0 + value
    assert torch.equal(bad_out[0, :, :group, 5].float().nan_to_num(nan=7.0), expected.nan_to_num(nan=7.0))
    bad_out[0, :, :group, 5] = out[0, :, :group, 5]
    assert same_bits(bad_out, out)


@each_row
@both_dtypes
@each_division
def test_graph_of_divided_calls(row, dtype, division):
    """A chain of launches that overlap, on a workspace that each of them allocates."""
    inputs = divided_inputs(row, division, dtype)
    expected = attend(*inputs)
    results = []
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results += [flash_attn_ext.forward(*inputs) for _ in range(3)]
    for _ in range(3):
        for x in itertools.chain(*results):
            x.fill_(math.nan)
        graph.replay()
        for result in results:
            assert_same(result, expected, "in a replay")


# Sizes ---------------------------------------------------------------------------------------------------------------


@both_masks
@pytest.mark.parametrize("shape", [(8200, 128, 16, 128), (1, 1100, 16384, 128)], ids=str)
def test_more_than_2_to_the_31_elements(shape, causal):
    gpu.needs_free(24)
    q, k, v = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    assert q.numel() > 2**31
    out, lse = flash_attn_ext.forward(q, k, v, None, causal)
    last = [x[-1:, :, -1:].clone(memory_format=torch.contiguous_format) for x in (q, k, v)]
    attend_and_check(*last, causal=causal)  # alone it is divided
    expected = forward_as_packed(*last, causal=causal)
    assert_same((out[-1:, :, -1:], lse[-1:, -1:]), expected, "in the last head")
    del q, k, v, out, lse
    torch.cuda.empty_cache()


@both_masks
@pytest.mark.parametrize(
    "batch, seqlen_q, heads, kv_heads, seqlen_k",
    [(70001, 3, 1, 1, 5), (1, 3, 70001, 70001, 5), (1, 3, 70001, 1, 5), (1, 70000 * 64 + 3, 1, 1, 5)],
    ids=["batch", "heads", "heads of MQA", "blocks"],
)
def test_sizes_beyond_a_grid_dimension(batch, seqlen_q, heads, kv_heads, seqlen_k, causal):
    q = normal(batch, seqlen_q, heads, 64)
    k, v = (normal(batch, seqlen_k, kv_heads, 64) for _ in range(2))
    attend_and_check(q, k, v, causal=causal)
    torch.cuda.empty_cache()


# Streams, graphs, devices, repeats -----------------------------------------------------------------------------------

SLEEP = 100_000_000  # cycles: some 50 ms, far longer than the host needs to come back


@both_masks
def test_other_stream_without_synchronising(causal):
    """Work is ordered on the current stream, and the call returns before that stream gets to it."""
    inputs = [normal(2, 500, 4, 128) for _ in range(3)]
    expected = attend(*inputs, causal=causal)
    late = [torch.full_like(x, math.nan) for x in inputs]
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        attend(*inputs, causal=causal)  # so that memory for this stream is at hand
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(SLEEP)
        for x, y in zip(late, inputs, strict=True):
            x.copy_(y)
        results = flash_attn_ext.forward(*late, None, causal)
        assert not stream.query(), "the call waited for the GPU"
    stream.synchronize()
    assert_same(results, expected)


@both_masks
def test_cuda_graph_replays(causal):
    inputs = [normal(3, 700, 8, 128) for _ in range(3)]
    attend(*inputs, causal=causal)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = flash_attn_ext.forward(*inputs, None, causal)
    different = torch.zeros((), dtype=torch.int64, device="cuda")
    for values in (1, 2):  # the graph reads what lies in its inputs at replay
        torch.manual_seed(values)
        for x in inputs:
            x.normal_()
        expected_out, expected_lse = attend_and_check(*inputs, causal=causal)
        for _ in range(50):
            out.fill_(math.nan), lse.fill_(math.nan)
            graph.replay()
            different += (out != expected_out).sum() + (lse != expected_lse).sum()
    assert different.item() == 0


def inputs_of_plan(row, which, dtype, batch, heads, kv_heads):
    """q, k and v of a call that takes the plan."""
    seqlen_q, seqlen_k = lengths_of_plan(row, which)
    shapes = (seqlen_q, heads), (seqlen_k, kv_heads), (seqlen_k, kv_heads)
    return [normal(batch, *shape, row["head_dim"], dtype=DTYPES[dtype]) for shape in shapes]


@each_plan
@both_masks
def test_repeats_are_bitwise_equal(row, which, dtype, causal):
    """The same bits 200 times over, with enough items that a race between producer and consumers would show."""
    q, k, v = inputs_of_plan(row, which, dtype, 4, 20, 20)
    first_out, first_lse = attend_and_check(q, k, v, causal=causal)
    different = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(200):
        out, lse = flash_attn_ext.forward(q, k, v, None, causal)
        different += (out != first_out).sum() + (lse != first_lse).sum()
    assert different.item() == 0


# Launches of a stream overlap (docs/forward.md): what one writes the next must not read too early, and what one reads
# the next must not overwrite too early. Each call of a chain has a result of the one before as its q, and writes where
# that had its own q, whose memory is handed out again. The scales keep chains from coming to rest, where early reads
# would not show: each out is nearly the value of a single key, and no dq stays small.

each_size = pytest.mark.parametrize("heads, kv_heads", [(6, 2), (40, 40)], ids=["few items", "many items"])


def synchronize_never():
    pass


def chain(q, k, v, synchronize=synchronize_never):
    """The last out of 50 forward passes, and every lse."""
    lses = []
    for _ in range(50):
        q, lse = flash_attn_ext.forward(q, k, v, 16 * q.shape[-1] ** -0.5)
        synchronize()
        lses.append(lse)
    return q, torch.stack(lses)


def chain_of_both_passes(q, k, v, synchronize=synchronize_never):
    """The last dq of 20 passes forward and back, and every lse."""
    dout, options = q, {"softmax_scale": 8 * q.shape[-1] ** -0.5, "deterministic": True}
    lses = []
    for _ in range(20):
        out, lse = flash_attn_ext.forward(q, k, v, **options)
        synchronize()
        q, _, _ = flash_attn_ext.backward(dout, q, k, v, out, lse, **options)
        synchronize()
        lses.append(lse)
    return q, torch.stack(lses)


def one_by_one(chain_of, inputs):
    """The results of the chain where no launches overlap."""
    results = chain_of(*inputs, synchronize=torch.cuda.synchronize)
    lses = results[1]
    assert all(x.isfinite().all() for x in results)
    assert (lses[-1] != lses[-3]).float().mean() > 0.25, "the chain has come to rest"
    return results


@each_plan
@each_size
@pytest.mark.parametrize("chain_of", [chain, chain_of_both_passes], ids=["forward", "both passes"])
def test_chain_of_launches_that_overlap(row, which, dtype, heads, kv_heads, chain_of):
    if chain_of is chain_of_both_passes and not row["backward"]:
        pytest.skip("the head dim does not train")
    inputs = inputs_of_plan(row, which, dtype, 2, heads, kv_heads)
    expected = one_by_one(chain_of, inputs)
    for _ in range(2):
        torch.cuda._sleep(SLEEP)  # the host launches all of the chain meanwhile
        assert_same(chain_of(*inputs), expected, "from launches one by one")


@each_plan
def test_graph_of_a_chain(row, which, dtype):
    inputs = inputs_of_plan(row, which, dtype, 2, 6, 2)
    expected = one_by_one(chain, inputs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = chain(*inputs)
    for replay in range(2):
        for x in captured:
            x.fill_(math.nan)
        graph.replay()
        assert_same(captured, expected, f"in replay {replay}")


def test_threads():
    """Each on its own stream, all at once."""
    cases = [Case(d, "bf16", 300 + 10 * i, 400, True) for i, d in enumerate(HEAD_DIMS * 2)]
    inputs = [case.inputs("cuda") for case in cases]
    expected = [attend(*x, causal=True) for x in inputs]
    torch.cuda.synchronize()
    failures = []

    def work(i):
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                for _ in range(20):
                    assert_same(flash_attn_ext.forward(*inputs[i], None, True), expected[i], f"in thread {i}")
        except (AssertionError, RuntimeError) as failure:
            failures.append(failure)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(cases))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures[0]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_device_of_the_tensors_not_the_current_one():
    inputs = Case(128, "bf16", 200, 300, True).inputs("cuda:0")
    expected = attend(*inputs, causal=True)
    with torch.cuda.device(0):
        results = flash_attn_ext.forward(*(x.to("cuda:1") for x in inputs), None, True)
    assert results[0].device == torch.device("cuda:1")
    assert_same([x.to("cuda:0") for x in results], expected)


# torch around it -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@both_dtypes
def test_autocast(given, dtype):
    inputs = [normal(2, 130, 3, 64, dtype=given) for _ in range(3)]
    expected = attend(*(x.to(dtype) for x in inputs), causal=True)
    with torch.autocast("cuda", dtype=dtype):
        assert_same(flash_attn_func(*inputs, causal=True, return_lse=True), expected)
        assert_same(torch.ops.flash_attn_ext.forward(*inputs, None, True), expected, "through the operator")


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_fullgraph(backend):
    torch._dynamo.reset()

    def layer(q, k, v):
        out, lse = flash_attn_func(q * 2, k, v, causal=True, return_lse=True)
        return out + 1, lse

    compiled = torch.compile(layer, fullgraph=True, backend=backend, dynamic=True)
    with torch.no_grad():
        for seqlen in (130, 257):
            inputs = [normal(2, seqlen, 3, 128) for _ in range(3)]
            assert_same(compiled(*inputs), layer(*inputs), "under torch.compile")
