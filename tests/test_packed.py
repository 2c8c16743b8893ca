"""Packed sequences, and sequences of which a part is used: a call gives what its sequences give alone.

On CPU tensors, and the same on a GPU at the head dims where the kernels have it (limits.OPTIONS).
"""

import inspect
import itertools
import math
from functools import partial

import gpu
import pytest
import torch
from cases import GQA, HEAD_DIMS, MHA, MQA, TRAINING_HEAD_DIMS
from conftest import SEED
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from oracle import check, check_gradients, same_bits, same_but_for_order
from torch import library
from torch._subclasses.fake_tensor import FakeTensorMode

import flash_attn_ext
from flash_attn_ext import (
    attention_reference,
    explain,
    flash_attn_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_qkvpacked_func,
    limits,
)

operator = torch.ops.flash_attn_ext.forward.default
backward_operator = torch.ops.flash_attn_ext.backward.default


def on_gpu(head_dim, *options):
    """A device and a head dim, with the marks of the GPU, where both kernels have packed sequences."""
    passes = ("forward", "backward") if head_dim in TRAINING_HEAD_DIMS else ("forward",)
    has = all(limits.has_option(option, which, head_dim) for option in options for which in passes)
    lacking = pytest.mark.skipif(not has, reason=f"no kernel has {' and '.join(options)} at head dim {head_dim}")
    return pytest.param("cuda", head_dim, marks=[*gpu.needs_hopper, lacking], id=f"cuda-d{head_dim}")


def each_device(*options):
    cpu = [pytest.param("cpu", 16, id="cpu")]
    return pytest.mark.parametrize("device, head_dim", cpu + [on_gpu(head_dim, *options) for head_dim in HEAD_DIMS])


packed = each_device("cu_seqlens")
packed_and_used = each_device("cu_seqlens", "seqused")

PACKINGS = {  # lengths of q, and of k
    "one": ([33], [33]),
    "equal": ([64, 64, 64], [64, 64, 64]),
    "ragged": ([1, 130, 5, 63, 257], [1, 130, 5, 63, 257]),
    "longer keys": ([1, 7, 130], [9, 300, 131]),
    "longer queries": ([9, 300, 131], [1, 7, 130]),
    "empty ones": ([0, 5, 0, 0, 70, 0], [0, 5, 3, 0, 0, 0]),
    "nothing but empty ones": ([0, 0], [0, 0]),
    "none": ([], []),
    "one among tiny ones": ([1] * 40 + [400] + [2] * 20, [2] * 40 + [400] + [1] * 20),
}
each_packing = pytest.mark.parametrize("lengths_q, lengths_k", PACKINGS.values(), ids=PACKINGS.keys())


def cumulated(lengths, device="cpu"):
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)


def inputs_of(lengths_q, lengths_k, heads, device, head_dim, dtype=torch.bfloat16, more=0):
    """q, k, v with `more` rows that belong to no sequence, as leaves, and the two cu_seqlens."""
    shapes = [(sum(lengths) + more, h, head_dim) for lengths, h in zip((lengths_q, lengths_k), heads, strict=True)]
    q, k, v = (torch.randn(shape, device=device).to(dtype).requires_grad_() for shape in (*shapes, shapes[1]))
    return (q, k, v), (cumulated(lengths_q, device), cumulated(lengths_k, device))


def rows_of(edges, sequence):
    return slice(*edges[sequence : sequence + 2].tolist())


def alone(q, k, v, cu_seqlens_q, cu_seqlens_k, i):
    rows, keys = rows_of(cu_seqlens_q, i), rows_of(cu_seqlens_k, i)
    return [x.detach()[None, of_x] for x, of_x in ((q, rows), (k, keys), (v, keys))]


OPTIONS = {
    "full": {},
    "causal": {"causal": True},
    "window": {"window_size": (20, 3)},
    "causal window": {"causal": True, "window_size": (9, -1)},
    "softcap": {"softcap": 2.0, "causal": True},
    "sinks": {"sinks": True, "causal": True},
    "all": {"causal": True, "window_size": (40, 0), "softcap": 5.0, "sinks": True, "softmax_scale": 0.2},
}
each_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())


def with_sinks(options, heads, head_dim, device):
    """The options with a tensor for sinks; skips where the kernels do not have one."""
    asked = [name for name in options if name in limits.OPTIONS]
    passes = ("forward", "backward") if head_dim in TRAINING_HEAD_DIMS else ("forward",)
    if device == "cuda" and not all(limits.has_option(name, which, head_dim) for name in asked for which in passes):
        pytest.skip(f"the kernels do not have {' and '.join(asked)} at head dim {head_dim}")
    return options | ({"sinks": torch.linspace(-2, 2, heads, device=device)} if "sinks" in options else {})


# A call is its sequences ----------------------------------------------------------------------------------------------


@packed
@each_packing
@pytest.mark.parametrize(
    "heads, options",
    [(MHA, OPTIONS["full"]), (MQA, OPTIONS["causal"]), *((GQA, options) for options in OPTIONS.values())],
    ids=["MHA-full", "MQA-causal", *(f"GQA-{name}" for name in OPTIONS)],
)
def test_a_packed_call_is_its_sequences(device, head_dim, lengths_q, lengths_k, heads, options):
    options = with_sinks(options, heads[0], head_dim, device)
    inputs, lengths = inputs_of(lengths_q, lengths_k, heads, device, head_dim)
    q, k, v = inputs
    trains = device == "cpu" or head_dim in TRAINING_HEAD_DIMS
    with torch.set_grad_enabled(trains):
        out, lse = flash_attn_varlen_func(*inputs, *lengths, **options, return_lse=True)
    assert (out.shape, out.dtype, out.stride()) == (q.shape, q.dtype, torch.empty_like(q).stride())
    assert (lse.shape, lse.dtype) == ((q.shape[1], q.shape[0]), torch.float32)
    dout = torch.randn_like(out)
    gradients = torch.autograd.grad(out, inputs, dout) if trains else None

    for i in range(len(lengths_q)):
        rows, keys = (rows_of(edges, i) for edges in lengths)
        of_call = alone(*inputs, *lengths, i)
        expected = flash_attn_ext.forward(*of_call, **options)
        assert same_bits(out[None, rows], expected[0]) and same_bits(lse[None, :, rows], expected[1]), i
        if not trains:
            continue
        without_sinks = options | {"sinks": None}
        expected = flash_attn_ext.backward(dout[None, rows], *of_call, *expected, **without_sinks)
        for name, x, of_x, alone_x in zip("qkv", gradients, (rows, keys, keys), expected, strict=True):
            assert same_but_for_order(x[None, of_x], alone_x), f"d{name} of sequence {i}"


@packed
@each_option
def test_the_rule(device, head_dim, options):
    options = with_sinks(options, 6, head_dim, device)
    inputs, lengths = inputs_of([70, 1, 200, 33], [70, 65, 200, 129], GQA, device, head_dim)
    inputs = [x.detach() for x in inputs]
    options |= dict(zip(("cu_seqlens_q", "cu_seqlens_k"), lengths, strict=True))
    out, lse = flash_attn_ext.forward(*inputs, **options)
    check(out, lse, *inputs, **options)
    if device == "cpu" or head_dim in TRAINING_HEAD_DIMS:
        dout = torch.randn_like(out)
        gradients = flash_attn_ext.backward(dout, *inputs, out, lse, **options)
        check_gradients(gradients, dout, *inputs, out, lse, **options)


@packed
@each_packing
def test_gradients_of_sinks_and_lse_are_sums_over_the_sequences(device, head_dim, lengths_q, lengths_k):
    options = with_sinks({"causal": True, "sinks": True}, 6, head_dim, device)
    if device == "cuda" and not limits.has_option("dlse", "backward", head_dim):
        pytest.skip("the backward has no gradient of lse")
    inputs, lengths = inputs_of(lengths_q, lengths_k, GQA, device, head_dim)
    leaves = [*inputs, options["sinks"].requires_grad_()]
    out, lse = flash_attn_varlen_func(*inputs, *lengths, **options, return_lse=True)
    dout, dlse = torch.randn_like(out), torch.randn_like(lse)
    *_, dsinks = torch.autograd.grad([out, lse], leaves, [dout, dlse])
    expected = torch.zeros_like(dsinks)
    for i in range(len(lengths_q)):
        rows = rows_of(lengths[0], i)
        of_call = alone(*inputs, *lengths, i)
        of_alone = flash_attn_ext.forward(*of_call, **options)
        given_dlse = dlse[None, :, rows].contiguous()
        expected += flash_attn_ext.backward(dout[None, rows], *of_call, *of_alone, **options, dlse=given_dlse)[3]
    torch.testing.assert_close(dsinks, expected, rtol=1e-4, atol=1e-4)


@st.composite
def random_packings(draw):
    """Lengths of q and k: mostly short ones, some zero, sometimes a long one."""
    count = draw(st.integers(0, 12))
    lengths = st.one_of(st.just(0), st.just(1), st.integers(0, 40), st.integers(0, 300))
    of_q = [draw(lengths) for _ in range(count)]
    return of_q, list(of_q) if draw(st.booleans()) else [draw(lengths) for _ in range(count)]


@packed
@seed(SEED)
@settings(max_examples=40, deadline=None, database=None, print_blob=True, suppress_health_check=list(HealthCheck))
@given(packing=random_packings(), causal=st.booleans(), more=st.integers(0, 70), values=st.integers(0, 2**32 - 1))
def test_random_packings(device, head_dim, packing, causal, more, values):
    torch.manual_seed(values)
    inputs, lengths = inputs_of(*packing, GQA, device, head_dim, more=more)
    inputs = [x.detach() for x in inputs]
    results = flash_attn_varlen_func(*inputs, *lengths, causal=causal, return_lse=True)
    for i in range(len(packing[0])):
        rows = rows_of(lengths[0], i)
        expected = flash_attn_func(*alone(*inputs, *lengths, i), causal=causal, return_lse=True)
        assert same_bits(results[0][None, rows], expected[0]) and same_bits(results[1][None, :, rows], expected[1])
    assert_unused(*results, sum(packing[0]))


def assert_unused(out, lse, begin, end=None):
    assert (out[begin:end] == 0).all() and (lse[:, begin:end] == -math.inf).all()


@packed
def test_many_sequences(device, head_dim):
    lengths = [1 + i % 3 for i in range(4096 if device == "cuda" else 500)]
    inputs, edges = inputs_of(lengths, lengths, GQA, device, head_dim)
    inputs = [x.detach() for x in inputs]
    out = flash_attn_varlen_func(*inputs, *edges, causal=True)
    for i in (0, 1, 2, 77, len(lengths) - 1):
        assert same_bits(out[None, rows_of(edges[0], i)], flash_attn_func(*alone(*inputs, *edges, i), causal=True))


# One side packed, lengths that are used -------------------------------------------------------------------------------


@packed
@pytest.mark.parametrize("which", ["q", "k"])
def test_one_side_may_be_dense(device, head_dim, which):
    lengths = [9, 33, 0]
    dense_q, dense_k, dense_v = (torch.randn(3, 33, h, head_dim, device=device).bfloat16() for h in (6, 2, 2))
    edges = cumulated(lengths, device)

    def pack(x):
        return torch.cat([x[i, :length] for i, length in enumerate(lengths)])

    if which == "q":
        out, lse = flash_attn_varlen_func(pack(dense_q), dense_k, dense_v, edges, None, causal=True, return_lse=True)
    else:
        out, lse = flash_attn_varlen_func(
            dense_q, pack(dense_k), pack(dense_v), None, edges, causal=True, return_lse=True
        )
    for i, length in enumerate(lengths):
        rows, keys = (length, 33) if which == "q" else (33, length)
        of_call = dense_q[i : i + 1, :rows], dense_k[i : i + 1, :keys], dense_v[i : i + 1, :keys]
        expected_out, expected_lse = flash_attn_func(*of_call, causal=True, return_lse=True)
        of_out, of_lse = (out[None, rows_of(edges, i)], lse[None, :, rows_of(edges, i)])
        if which == "k":
            of_out, of_lse = out[i : i + 1], lse[i : i + 1]
        assert same_bits(of_out, expected_out) and same_bits(of_lse, expected_lse)


@packed_and_used
@pytest.mark.parametrize("form", ["packed", "dense"])
@pytest.mark.parametrize("fill", [1000.0, math.nan], ids=str)
def test_what_is_not_used_changes_nothing(device, head_dim, form, fill):
    """Rows beyond seqused, and beyond the last sequence, hold anything; their results are 0."""
    if device == "cuda" and head_dim not in TRAINING_HEAD_DIMS:
        pytest.skip("it does not train")
    lengths, used_q, used_k = [20, 70, 5, 0, 40], [20, 33, 0, 0, 7], [13, 70, 5, 0, 0]
    if form == "dense":
        lengths = [70] * 5
    edges = cumulated(lengths, device)
    shapes = [(sum(lengths) + 9 * (form == "packed"), h, head_dim) for h in (6, 2, 2, 6)]
    q, k, v, dout = (torch.randn(shape, device=device).bfloat16() for shape in shapes)
    options = {"causal": True}
    options |= {"seqused_q": torch.tensor(used_q, dtype=torch.int32, device=device)}
    options |= {"seqused_k": torch.tensor(used_k, dtype=torch.int32, device=device)}
    if form == "packed":
        options |= {"cu_seqlens_q": edges, "cu_seqlens_k": edges}

    def both_passes(*tensors):
        if form == "dense":
            tensors = [x.unflatten(0, (5, 70)) for x in tensors]
        *inputs, dout = tensors
        out, lse = flash_attn_ext.forward(*inputs, **options)
        results = out, *flash_attn_ext.backward(dout, *inputs, out, lse, **options)
        if form == "dense":
            return *(x.flatten(0, 1) for x in results), lse.transpose(0, 1).flatten(1, 2)
        return *results, lse

    clean = both_passes(q, k, v, dout)
    spoilt = [x.clone() for x in (q, k, v, dout)]
    unused = {"q": torch.ones(shapes[0][0], dtype=torch.bool), "k": torch.ones(shapes[0][0], dtype=torch.bool)}
    for i, begin in enumerate(edges[:-1].tolist()):
        unused["q"][begin : begin + used_q[i]] = False
        unused["k"][begin : begin + used_k[i]] = False
    unused = {name: rows.to(device) for name, rows in unused.items()}
    for x, rows in zip(spoilt, "qkkq", strict=True):
        x[unused[rows]] = fill
    out, dq, dk, dv, lse = results = both_passes(*spoilt)
    assert all(same_bits(a, b) for a, b in zip(results, clean, strict=True))
    for x, rows in ((out, "q"), (dq, "q"), (dk, "k"), (dv, "k")):
        assert (x[unused[rows]] == 0).all()
    assert (lse[:, unused["q"]] == -math.inf).all()

    for i, begin in enumerate(edges[:-1].tolist()):
        rows, keys = slice(begin, begin + used_q[i]), slice(begin, begin + used_k[i])
        expected_out, expected_lse = flash_attn_ext.forward(q[None, rows], k[None, keys], v[None, keys], causal=True)
        assert same_bits(out[None, rows], expected_out) and same_bits(lse[None, :, rows], expected_lse)


@packed
def test_neighbours_do_not_see_each_other(device, head_dim):
    """A sequence full of NaN between two others."""
    inputs, lengths = inputs_of([30, 70, 50], [30, 70, 50], GQA, device, head_dim)
    inputs = [x.detach() for x in inputs]
    clean = flash_attn_varlen_func(*inputs, *lengths, causal=True, return_lse=True)
    for x in inputs:
        x[30:100] = math.nan
    out, lse = flash_attn_varlen_func(*inputs, *lengths, causal=True, return_lse=True)
    for rows in (slice(30), slice(100, None)):
        assert same_bits(out[rows], clean[0][rows]) and same_bits(lse[:, rows], clean[1][:, rows])


def test_the_reference_is_differentiable():
    inputs, lengths = inputs_of([3, 0, 5], [2, 4, 5], (4, 2), "cpu", 3, torch.float64, more=2)
    sinks = torch.randn(4, dtype=torch.float64).requires_grad_()
    by_name = dict(zip(("cu_seqlens_q", "cu_seqlens_k"), lengths, strict=True))

    def attend(q, k, v, sinks):
        out, lse = attention_reference(q, k, v, 0.7, True, sinks=sinks, **by_name)
        return out, lse.masked_fill(lse == -math.inf, 0)

    assert torch.autograd.gradcheck(attend, (*inputs, sinks))
    results = flash_attn_varlen_func(*inputs, *lengths, softmax_scale=0.7, causal=True, sinks=sinks, return_lse=True)
    expected = attend(*inputs, sinks)
    dout, dlse = torch.randn_like(results[0]), torch.randn_like(results[1])
    dlse[:, [0, 8, 9]] = 0  # -inf here, 0 there
    ours = torch.autograd.grad(results, (*inputs, sinks), [dout, dlse])
    torch.testing.assert_close(
        ours, torch.autograd.grad(expected, (*inputs, sinks), [dout, dlse.double()]), rtol=1e-5, atol=1e-6
    )


# Packed q, k and v ----------------------------------------------------------------------------------------------------


@packed
@pytest.mark.parametrize("num_heads_q", [None, 6])
def test_qkvpacked(device, head_dim, num_heads_q):
    heads = (3, 6) if num_heads_q is None else (10,)
    dense = torch.randn(2, 40, *heads, head_dim, device=device).bfloat16()
    q, k, v = dense.unbind(2) if num_heads_q is None else dense.split([6, 2, 2], 2)
    options = {"causal": True, "return_lse": True}
    if device == "cpu" or head_dim in TRAINING_HEAD_DIMS:
        dense.requires_grad_()
    results = flash_attn_qkvpacked_func(dense, causal=True, return_lse=True, num_heads_q=num_heads_q)
    for a, b in zip(results, flash_attn_func(q, k, v, **options), strict=True):
        assert same_bits(a, b)
    packed = dense.detach().flatten(0, 1)
    edges = cumulated([40, 40], device)
    results = flash_attn_varlen_qkvpacked_func(packed, edges, 40, num_heads_q=num_heads_q, **options)
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    for a, b in zip(results, flash_attn_varlen_func(q, k, v, edges, edges, 40, 40, **options), strict=True):
        assert same_bits(a, b)


@pytest.mark.parametrize("shape, num_heads_q", [((2, 5, 2, 4, 8), None), ((2, 5, 4, 8), None), ((2, 5, 4, 8), 3)])
def test_qkvpacked_of_another_shape(shape, num_heads_q):
    with pytest.raises(ValueError, match=r"qkv has shape \(2, 5, .*it must be \(batch, seqlen, "):
        flash_attn_qkvpacked_func(torch.ones(shape), num_heads_q=num_heads_q)
    with pytest.raises(ValueError, match=r"qkv has shape \(5, .*it must be \(total, "):
        flash_attn_varlen_qkvpacked_func(torch.ones(shape[1:]), cumulated([5]), num_heads_q=num_heads_q)


def test_signatures():
    """The first seven arguments are FlashAttention-3's; the options those of flash_attn_func."""
    by_name = inspect.signature(flash_attn_varlen_func).parameters
    positional = [p.name for p in by_name.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert positional == ["q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"]
    dense = inspect.signature(flash_attn_func).parameters
    assert {name: p.default for name, p in dense.items()}.items() <= {n: p.default for n, p in by_name.items()}.items()


def test_max_seqlen_is_not_read():
    inputs, lengths = inputs_of([3, 5], [3, 5], GQA, "cpu", 8)
    expected = flash_attn_varlen_func(*inputs, *lengths)
    for value in (5, 1, torch.tensor(5), torch.empty((), device="meta")):
        assert same_bits(flash_attn_varlen_func(*inputs, *lengths, value, value), expected)


# Operators ------------------------------------------------------------------------------------------------------------


@packed
def test_opcheck(device, head_dim):
    (q, k, v), lengths = inputs_of([3, 0, 6], [4, 2, 6], (4, 2), device, head_dim)
    trains = device == "cpu" or head_dim in TRAINING_HEAD_DIMS
    q, k, v = (x.detach().requires_grad_(trains) for x in (q, k, v))
    by_name = dict(zip(("cu_seqlens_q", "cu_seqlens_k"), lengths, strict=True))
    if device == "cpu":
        by_name |= {"seqused_k": torch.tensor([4, 1, 0], dtype=torch.int32)}
    tests = ["test_schema", "test_autograd_registration", "test_faketensor"]
    tests += ["test_aot_dispatch_dynamic"] if device == "cpu" else []
    library.opcheck(operator, (q, k, v, None, True), by_name, test_utils=tests)
    if trains:
        arguments = [x.detach() for x in (q, q, k, v, *operator(q, k, v, None, True, **by_name))]
        library.opcheck(backward_operator, arguments, {"causal": True} | by_name)


def test_compile_fullgraph_with_dynamic_shapes():
    torch._dynamo.reset()
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph

    attend = partial(flash_attn_varlen_func, causal=True, return_lse=True)
    compiled = torch.compile(attend, fullgraph=True, dynamic=True, backend=count)
    for packing in ([3, 9], [17, 0, 4], [5, 5, 5, 5]):
        inputs, lengths = inputs_of(packing, packing, (4, 2), "cpu", 8)
        inputs = [x.detach() for x in inputs]
        for a, b in zip(compiled(*inputs, *lengths), attend(*inputs, *lengths), strict=True):
            assert same_bits(a, b)
    assert len(graphs) == 1, "one graph serves all packings"


def test_autocast():
    inputs, lengths = inputs_of([3, 9], [3, 9], GQA, "cpu", 8, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = flash_attn_varlen_func(*inputs, *lengths)
    assert out.dtype == torch.bfloat16
    assert all(x.dtype == torch.float32 for x in torch.autograd.grad(out.float().sum(), inputs))


# Refusals -------------------------------------------------------------------------------------------------------------


def good(device="cpu", head_dim=HEAD_DIMS[0] if HEAD_DIMS else 64):
    (q, k, v), (edges_q, edges_k) = inputs_of([5, 0, 4], [6, 2, 4], (4, 2), device, head_dim)
    tensors = {"q": q.detach(), "k": k.detach(), "v": v.detach()}
    return tensors | {"cu_seqlens_q": edges_q, "cu_seqlens_k": edges_k}


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


WRONG = {  # seen on every device
    "int64": (lambda a: {"cu_seqlens_q": a["cu_seqlens_q"].long()}, ["cu_seqlens_q is int64", "must be int32"]),
    "two dimensions": (
        lambda a: {"cu_seqlens_k": a["cu_seqlens_k"][None]},
        ["cu_seqlens_k", "(1, 4)", "one dimension"],
    ),
    "not contiguous": (
        lambda a: {"cu_seqlens_q": torch.stack([a["cu_seqlens_q"]] * 2, 1)[:, 0]},
        ["cu_seqlens_q", "strides (2,)", "contiguous"],
    ),
    "empty": (lambda a: {"cu_seqlens_q": a["cu_seqlens_q"][:0]}, ["cu_seqlens_q is empty", "one element more"]),
    "another number": (
        lambda a: {"cu_seqlens_k": a["cu_seqlens_k"][:-1]},
        ["q has 3 sequences and k, v have 2", "as many"],
    ),
    "seqused of another number": (
        lambda a: {"seqused_k": a["cu_seqlens_k"]},
        ["seqused_k has 4 elements and there are 3 sequences"],
    ),
    "q dense": (lambda a: {"q": a["q"][None]}, ["q has 4 dimensions", "with cu_seqlens_q", "3", "q.flatten(0, 1)"]),
    "k dense": (lambda a: {"k": a["k"][None]}, ["k has 4 dimensions", "with cu_seqlens_k", "k.flatten(0, 1)"]),
    "no cu_seqlens_q": (
        lambda a: {"cu_seqlens_q": None},
        ["q has 3 dimensions", "must have 4", "flash_attn_varlen_func"],
    ),
    "v of another total": (lambda a: {"v": a["v"][1:]}, ["k has total_k 12 but v has 11"]),
    "heads": (lambda a: {"q": a["q"][:, :3]}, ["q has 3 heads and k, v have 2", "multiple"]),
    "sinks": (lambda a: {"sinks": a["q"].new_ones(3)}, ["sinks has shape (3,)", "(4,)"]),
}
WRONG_VALUES = {  # seen on the CPU
    "does not begin with 0": (lambda a: {"cu_seqlens_q": int32(1, 5, 5, 9)}, ["cu_seqlens_q begins with 1", "with 0"]),
    "falls": (lambda a: {"cu_seqlens_k": int32(0, 6, 4, 12)}, ["cu_seqlens_k falls from 6 to 4"]),
    "beyond total": (
        lambda a: {"cu_seqlens_q": int32(0, 5, 5, 10)},
        ["cu_seqlens_q ends with 10", "at most", "here 9"],
    ),
    "seqused negative": (lambda a: {"seqused_q": int32(1, -1, 0)}, ["seqused_q[1] is -1", "at least 0"]),
    "seqused too long": (lambda a: {"seqused_k": int32(6, 2, 5)}, ["seqused_k[2] is 5", "at most", "here 4"]),
}
each = pytest.mark.parametrize


@each("change, words", (WRONG | WRONG_VALUES).values(), ids=(WRONG | WRONG_VALUES).keys())
def test_wrong_lengths(change, words):
    arguments = good()
    arguments |= change(arguments)
    with pytest.raises(ValueError) as caught:
        flash_attn_varlen_func(**arguments)
    assert [word for word in words if word not in str(caught.value)] == [], str(caught.value)
    assert explain(**arguments) == str(caught.value)


@each("change, words", WRONG.values(), ids=WRONG.keys())
def test_wrong_lengths_of_fake_cuda_tensors(change, words):
    with FakeTensorMode():
        arguments = {name: torch.empty_like(x, device="cuda") for name, x in good().items()}
        arguments |= change(arguments)
        with pytest.raises(ValueError) as caught:
            flash_attn_varlen_func(**arguments)
        assert [word for word in words if word not in str(caught.value)] == [], str(caught.value)


def test_lengths_on_another_device():
    arguments = good() | {"cu_seqlens_q": torch.empty(4, dtype=torch.int32, device="meta")}
    with pytest.raises(ValueError, match="cu_seqlens_q is on meta and q on cpu; they must be on one device"):
        flash_attn_varlen_func(**arguments)


def test_lengths_that_are_no_tensor():
    with pytest.raises(TypeError, match=r"cu_seqlens_q must be a torch.Tensor, not list"):
        flash_attn_varlen_func(**(good() | {"cu_seqlens_q": [0, 5, 5, 9]}))


def test_more_arguments_by_position():
    arguments = good().values()
    with pytest.raises(TypeError, match=r"8 arguments by position; flash_attn_varlen_func takes 7: .*eighth place"):
        flash_attn_varlen_func(*arguments, 6, 6, 0.0)
    with pytest.raises(TypeError, match="flash_attn_varlen_func has no argument casual"):
        flash_attn_varlen_func(*arguments, casual=True)
    assert flash_attn_varlen_func(*arguments, 6, 6, dropout_p=0.0, block_table=None, deterministic=False).dim() == 3


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_gpus_without_it_refuse_it(head_dim):
    if limits.has_option("cu_seqlens", "forward", head_dim):
        pytest.skip("the forward has it")
    text = explain(**good(head_dim=head_dim), target="hopper")
    assert text.startswith("cu_seqlens is given; the forward kernels on the GPU") and "a call for each sequence" in text
    with FakeTensorMode():
        arguments = {name: torch.empty_like(x, device="cuda") for name, x in good(head_dim=head_dim).items()}
        with pytest.raises(ValueError, match="cu_seqlens is given"):
            flash_attn_varlen_func(**arguments)


# CUDA graphs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device, head_dim", [on_gpu(head_dim, "cu_seqlens") for head_dim in HEAD_DIMS])
def test_graph_replay_with_other_lengths(device, head_dim):
    """The lengths are on the device: a captured call follows them."""
    packings = [[64, 64, 72], [200, 0, 0], [1, 130, 69], [30, 30, 30]]
    (q, k, v), (edges, _) = inputs_of(packings[0], packings[0], GQA, device, head_dim)
    q, k, v = (x.detach() for x in (q, k, v))
    attend = partial(flash_attn_varlen_func, q, k, v, edges, edges, causal=True, return_lse=True)
    attend()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = attend()
    for packing in packings:
        edges.copy_(cumulated(packing, device))
        graph.replay()
        used = sum(packing)
        for a, b in zip((captured[0][:used], captured[1][:, :used]), attend(), strict=True):
            assert same_bits(a, b[:used] if b.dim() == 3 else b[:, :used])
