"""Packed sequences, and sequences of which a part is used: a call gives what its sequences give alone.

On CPU tensors, and the same on a GPU at the head dims where the kernels have it (limits.OPTIONS).
"""

import inspect
import itertools
import math
from functools import partial
from random import Random

import gpu
import pytest
import torch
from cases import DTYPES, GQA, HEAD_DIMS, MHA, MQA, ROWS, TRAINING_HEAD_DIMS, forward_as_packed
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

DIMS = {"forward": HEAD_DIMS, "backward": TRAINING_HEAD_DIMS}
operator = torch.ops.flash_attn_ext.forward.default
backward_operator = torch.ops.flash_attn_ext.backward.default


def has(device, head_dim, which, *options):
    """Whether a pass has these options there."""
    if device == "cpu":
        return True
    return head_dim in DIMS[which] and all(limits.has_option(option, which, head_dim) for option in options)


def on_gpu(head_dim, *options):
    """A device and a head dim, with the marks of the GPU, where the forward kernels have the options."""
    lacking = not has("cuda", head_dim, "forward", *options)
    mark = pytest.mark.skipif(lacking, reason=f"no kernel has {' and '.join(options)} at head dim {head_dim}")
    return pytest.param("cuda", head_dim, marks=[*gpu.needs_hopper, mark], id=f"cuda-d{head_dim}")


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
    "halves of blocks": ([1, 63, 64, 65, 2, 130], [65, 128, 64, 1, 129, 63]),
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


def by_lengths(lengths_q, lengths_k, device):
    """The sequences of the same two lengths make a dense call: its rows of q, (batch, seqlen_q), and of k and v."""
    firsts = [list(itertools.accumulate(lengths, initial=0)) for lengths in (lengths_q, lengths_k)]
    calls = {}
    for i, lengths in enumerate(zip(lengths_q, lengths_k, strict=True)):
        calls.setdefault(lengths, []).append(i)
    for lengths, sequences in calls.items():
        yield [
            torch.tensor([first[i] for i in sequences], device=device)[:, None] + torch.arange(length, device=device)
            for first, length in zip(firsts, lengths, strict=True)
        ]


def assert_is_its_sequences(inputs, packing, options, what=""):
    """out, lse and the gradients of a packed call, beside those of dense calls; returns out and lse."""
    (q, k, v), device = inputs, inputs[0].device.type
    by_name = {f"cu_seqlens_{name}": cumulated(lengths, device) for name, lengths in zip("qk", packing, strict=True)}
    out, lse = flash_attn_ext.forward(q, k, v, **by_name, **options)
    trains = has(device, q.shape[-1], "backward", "cu_seqlens", *(options.keys() & limits.OPTIONS))
    dout = torch.randn_like(out)
    gradients = flash_attn_ext.backward(dout, q, k, v, out, lse, **by_name, **options) if trains else ()
    # A matrix product on the CPU may depend on how many there are.
    same = same_bits if device == "cuda" else partial(torch.allclose, rtol=2.0**-7, atol=1e-5)
    for rows, keys in by_lengths(*packing, device):
        of_call = q[rows], k[keys], v[keys]
        expected = forward_as_packed(*of_call, **options)
        assert same(out[rows], expected[0]), what
        assert same(lse[:, rows].transpose(0, 1).contiguous(), expected[1]), what
        if trains:
            expected = flash_attn_ext.backward(dout[rows], *of_call, *expected, **options)
            for name, x, at, of_dense in zip("qkv", gradients, (rows, keys, keys), expected, strict=True):
                assert same_but_for_order(x[at], of_dense), f"d{name} {what}"
    return out, lse


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
    if not has(device, head_dim, "forward", *asked):
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
    trains = has(device, head_dim, "backward", "cu_seqlens", *(options.keys() & limits.OPTIONS))
    options = with_sinks(options, heads[0], head_dim, device)
    inputs, lengths = inputs_of(lengths_q, lengths_k, heads, device, head_dim)
    q, k, v = inputs
    with torch.set_grad_enabled(trains):
        out, lse = flash_attn_varlen_func(*inputs, *lengths, **options, return_lse=True)
    assert (out.shape, out.dtype, out.stride()) == (q.shape, q.dtype, torch.empty_like(q).stride())
    assert (lse.shape, lse.dtype) == ((q.shape[1], q.shape[0]), torch.float32)
    dout = torch.randn_like(out)
    gradients = torch.autograd.grad(out, inputs, dout) if trains else None

    for i in range(len(lengths_q)):
        rows, keys = (rows_of(edges, i) for edges in lengths)
        of_call = alone(*inputs, *lengths, i)
        expected = forward_as_packed(*of_call, **options)
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
    trains = has(device, head_dim, "backward", "cu_seqlens", *(options.keys() & limits.OPTIONS))
    options = with_sinks(options, 6, head_dim, device)
    inputs, lengths = inputs_of([70, 1, 200, 33], [70, 65, 200, 129], GQA, device, head_dim)
    inputs = [x.detach() for x in inputs]
    options |= dict(zip(("cu_seqlens_q", "cu_seqlens_k"), lengths, strict=True))
    out, lse = flash_attn_ext.forward(*inputs, **options)
    check(out, lse, *inputs, **options)
    if trains:
        dout = torch.randn_like(out)
        gradients = flash_attn_ext.backward(dout, *inputs, out, lse, **options)
        check_gradients(gradients, dout, *inputs, out, lse, **options)


@packed
@each_packing
def test_gradients_of_sinks_and_lse_are_sums_over_the_sequences(device, head_dim, lengths_q, lengths_k):
    if not has(device, head_dim, "backward", "cu_seqlens", "sinks", "dlse"):
        pytest.skip("the backward does not have them")
    options = with_sinks({"causal": True, "sinks": True}, 6, head_dim, device)
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


FORMS = ["dense", "dense-used", "packed", "packed-used"]


def call_of(form, lengths_q, lengths_k, device, head_dim):
    """q, k, v, and the lengths by their names: packed with rows of no sequence at the end, dense of as many rows each.
    Used are two thirds of each sequence's rows and keys, and nothing of the last one."""
    by_name = {}
    for name, lengths in zip("qk", (lengths_q, lengths_k), strict=True):
        if form.startswith("packed"):
            by_name[f"cu_seqlens_{name}"] = cumulated(lengths, device)
        if form.endswith("used"):
            used = [length - length // 3 for length in lengths[:-1]] + [0]
            by_name[f"seqused_{name}"] = torch.tensor(used, dtype=torch.int32, device=device)
    if form.startswith("packed"):
        q_rows, k_rows = (sum(lengths_q) + 3,), (sum(lengths_k),)
    else:
        q_rows, k_rows = ((len(lengths), max(lengths)) for lengths in (lengths_q, lengths_k))
    shapes = (*q_rows, GQA[0], head_dim), (*k_rows, GQA[1], head_dim), (*k_rows, GQA[1], head_dim)
    return [torch.randn(shape, device=device).bfloat16() for shape in shapes], by_name


@packed_and_used
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("keys", ["no", "fewer", "more"])
@pytest.mark.parametrize("with_dlse", [False, True], ids=["out", "out and lse"])
def test_gradient_of_sinks_is_its_definition(device, head_dim, form, keys, with_dlse):
    """The sum of exp(sink - lse) * (dlse - sum of dout * out) over the rows, in float64 from out and lse as they are;
    bitwise the same in every run, and where nothing else is needed. Under a causal mask rows may see no key. On a GPU a
    head has more rows than the threads of its block take at once."""
    if not has(device, head_dim, "backward", "cu_seqlens", "seqused", "sinks", "dlse"):
        pytest.skip("the backward does not have them")
    lengths_q = [9, 70, 0, 33] if device == "cpu" else [9, 5070, 0, 2033]
    lengths_k = [{"no": 0, "fewer": length // 2, "more": 2 * length}[keys] for length in lengths_q]
    (q, k, v), lengths = call_of(form, lengths_q, lengths_k, device, head_dim)
    sinks = torch.linspace(-2, 2, GQA[0], device=device)
    out, lse = flash_attn_ext.forward(q, k, v, causal=True, sinks=sinks, **lengths)
    dout, dlse = torch.randn_like(q), torch.randn_like(lse) if with_dlse else None

    def gradient(*needs):
        given = {"causal": True, "sinks": sinks, "dlse": dlse, "needs": needs, **lengths}
        return backward_operator(dout, q, k, v, out, lse, **given)[3]

    results = [gradient(*needs) for needs in [(False,) * 3] * 2 + [(True,) * 3, (False, True, False)]]
    assert all(same_bits(result, results[0]) for result in results[1:])

    delta = (dout.double() * out.double()).sum(-1).transpose(-1, -2)
    of_rows = (sinks.double()[:, None] - lse.double()).exp() * ((dlse.double() if with_dlse else 0) - delta)
    of_rows = of_rows.masked_fill(lse == -math.inf, 0).movedim(-2, 0).flatten(1)
    error, allowed = (results[0] - of_rows.sum(1)).abs(), 2.0**-18 * of_rows.abs().sum(1)
    assert results[0].dtype == sinks.dtype and (error <= allowed).all(), (error / allowed).max()


@packed_and_used
@pytest.mark.parametrize("form", FORMS)
def test_rows_without_keys_have_the_sink_as_lse_where_they_are_used(device, head_dim, form):
    """And rows that are not used, or of no sequence, -inf. The gradient of sinks is the sum of dlse over the former."""
    if not has(device, head_dim, "forward", "cu_seqlens", "seqused", "sinks"):
        pytest.skip("the kernels do not have them")
    trains = has(device, head_dim, "backward", "cu_seqlens", "seqused", "sinks", "dlse")
    lengths_q = [0, 9, 0, 0, 70, 33, 0]
    (q, k, v), lengths = call_of(form, lengths_q, [0] * 7, device, head_dim)
    sinks = torch.linspace(-2, 2, GQA[0], device=device).requires_grad_(trains)
    out, lse = flash_attn_varlen_func(q, k, v, **lengths, sinks=sinks, return_lse=True)
    assert (out == 0).all()
    rows = [70] * 7 if form.startswith("dense") else lengths_q
    used = lengths["seqused_q"].tolist() if form.endswith("used") else rows
    expected = [x for all_, part in zip(rows, used, strict=True) for x in [True] * part + [False] * (all_ - part)]
    expected = torch.tensor(expected + [False] * (q[..., 0, 0].numel() - len(expected)), device=device)
    if form.startswith("dense"):
        expected = expected.unflatten(0, (7, 70))
    expected = expected.unsqueeze(-2).expand_as(lse)
    assert same_bits(lse, torch.where(expected, sinks.detach()[:, None], -math.inf))
    if trains:
        dlse = torch.randint(-3, 4, lse.shape, device=device).float()  # all sums of them are exact
        (dsinks,) = torch.autograd.grad(lse, sinks, dlse)
        assert torch.equal(dsinks, (dlse * expected).movedim(-2, 0).flatten(1).sum(1))


@st.composite
def random_packings(draw, kind, many):
    """Lengths of q and k: of some sequences; of one that is huge among tiny ones; of so many tiny ones."""
    if kind == "some":
        count = draw(st.integers(0, 12))
        length = st.one_of(st.just(0), st.just(1), st.integers(0, 40), st.integers(0, 300))
        of_q, of_k = ([draw(length) for _ in range(count)] for _ in range(2))
    else:
        count = many if kind == "many" else draw(st.integers(1, 60))
        numbers = Random(draw(st.integers(0, 2**32 - 1)))
        of_q, of_k = (numbers.choices((0, 1, 1, 2, 3), k=count) for _ in range(2))
    if kind == "one huge":
        place = draw(st.integers(0, count - 1))
        of_q[place], of_k[place] = (draw(st.integers(1000, 3000)) for _ in range(2))
    return of_q, list(of_q) if draw(st.booleans()) else of_k


@packed
@pytest.mark.parametrize("kind", ["some", "one huge", "many"])
@seed(SEED)
@settings(max_examples=15, deadline=None, database=None, print_blob=True, suppress_health_check=list(HealthCheck))
@given(data=st.data(), causal=st.booleans(), more=st.integers(0, 70), values=st.integers(0, 2**32 - 1))
def test_random_packings(device, head_dim, kind, data, causal, more, values):
    packing = data.draw(random_packings(kind, many=4096 if device == "cuda" else 50), label="lengths of q and k")
    torch.manual_seed(values)
    inputs, _ = inputs_of(*packing, GQA, device, head_dim, more=more)
    out, lse = assert_is_its_sequences([x.detach() for x in inputs], packing, {"causal": causal})
    used = sum(packing[0])
    assert (out[used:] == 0).all() and (lse[:, used:] == -math.inf).all()


SIDES = {"left": (1, None), "right": (None, 1), "both": (1, 1)}


@packed
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("sides", SIDES.values(), ids=SIDES.keys())
def test_windows_at_the_edges_of_blocks(device, head_dim, sides, causal):
    if not has(device, head_dim, "forward", "window_size"):
        pytest.skip("the kernels have no windows")
    plan = {"block_q": 16, "block_kv": 24} if device == "cpu" else ROWS[HEAD_DIMS.index(head_dim)]["forward"]
    block_q, block_kv = plan["block_q"], plan["block_kv"]
    packing = [block_q - 1, block_q + 1, 1, 2 * block_kv + 1], [block_q - 1, 3 * block_kv + 1, block_kv, block_kv + 5]
    inputs, _ = inputs_of(*packing, GQA, device, head_dim)
    inputs = [x.detach() for x in inputs]
    for size in (0, 1, block_kv - 1, block_kv, block_kv + 1, block_q, 10**6):
        window = tuple(-1 if side is None else size for side in sides)
        options = {"causal": causal, "window_size": window}
        assert_is_its_sequences(inputs, packing, options, f"with a window of {window}")


# Every option with every other one ------------------------------------------------------------------------------------


FACTORS = {  # an option's values; and what it is called in limits.OPTIONS, where only some kernels have it
    "form": (["dense", "packed", "packed q", "packed k"], "cu_seqlens"),
    "used": (["all", "of q", "of k", "of both"], "seqused"),
    "window_size": ([(-1, -1), (40, -1), (-1, 9), (17, 33)], "window_size"),
    "softcap": ([0.0, 2.0], "softcap"),
    "sinks": ([False, True], "sinks"),
    "dlse": ([False, True], "dlse"),
    "causal": ([False, True], None),
    "deterministic": ([False, True], None),
    "dtype": (["bf16", "fp16"], None),
    "heads": ([GQA, MHA, MQA], None),
    "lengths": (["equal", "longer keys", "longer queries"], None),
}
LENGTHS = {  # of q, and of k
    "equal": ([70, 1, 200, 33], [70, 1, 200, 33]),
    "longer keys": ([70, 1, 130, 33], [190, 65, 131, 300]),
    "longer queries": ([190, 65, 131, 300], [70, 1, 130, 33]),
}


def pairwise(factors):
    """Few cases in which each value of a factor meets each value of every other one; the same in every run."""
    values = [(name, value) for name, values in factors.items() for value in values]
    pairs = [pair for pair in itertools.combinations(values, 2) if pair[0][0] != pair[1][0]]
    left = set(map(frozenset, pairs))
    for pair in pairs:
        if frozenset(pair) in left:
            case = dict(pair)
            for name in factors:
                if name not in case:  # the value that meets most that it has not met yet
                    met = [sum({(name, value), other} in left for other in case.items()) for value in factors[name]]
                    case[name] = factors[name][met.index(max(met))]
            left -= set(map(frozenset, itertools.combinations(case.items(), 2)))
            yield case


def pairs_of(device, head_dim, which):
    """The cases of a pass and those before it, as far as the kernels go."""
    passes = ("forward", "backward")[: 1 + (which == "backward")]
    factors = {}
    for name, (values, option) in FACTORS.items():
        lacks = option and not all(has(device, head_dim, each, option) for each in passes)
        factors[name] = values[:1] if lacks or (option == "dlse" and which == "forward") else values
    for case in pairwise(factors):
        words = [str(value) for name, value in case.items() if value != FACTORS[name][0][0]]
        name = "-".join([device, f"d{head_dim}", which, *words])
        marks = gpu.needs_hopper if device == "cuda" else []
        yield pytest.param(device, head_dim, which, case, id=name, marks=marks)


PAIRS = [*pairs_of("cpu", 16, "backward")]
PAIRS += [case for which, head_dims in DIMS.items() for d in head_dims for case in pairs_of("cuda", d, which)]


@pytest.mark.parametrize("device, head_dim, which, case", PAIRS)
def test_every_option_with_every_other(device, head_dim, which, case):
    heads, kv_heads = case["heads"]
    options = {name: case[name] for name in ("window_size", "softcap", "causal", "deterministic")}
    if case["sinks"]:
        options["sinks"] = torch.linspace(-2, 2, heads, device=device)
    shapes = {}
    for x, lengths, h in zip("qk", LENGTHS[case["lengths"]], (heads, kv_heads), strict=True):
        packs = case["form"] in ("packed", f"packed {x}")
        if packs:
            options[f"cu_seqlens_{x}"] = cumulated(lengths, device)
        if case["used"] in (f"of {x}", "of both"):
            used = [length - length // 3 for length in lengths[:-1]]
            options[f"seqused_{x}"] = torch.tensor([*used, 0], dtype=torch.int32, device=device)
        shapes[x] = (sum(lengths), h, head_dim) if packs else (len(lengths), max(lengths), h, head_dim)

    q, k, v, dout = (torch.randn(shapes[x], device=device).to(DTYPES[case["dtype"]]) for x in "qkkq")
    out, lse = flash_attn_ext.forward(q, k, v, **options)
    check(out, lse, q, k, v, **options)
    if which == "backward":
        options["dlse"] = torch.randn_like(lse) if case["dlse"] else None
        gradients = flash_attn_ext.backward(dout, q, k, v, out, lse, **options)
        check_gradients(gradients, dout, q, k, v, out, lse, **options)


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
    trains = has(device, head_dim, "backward", "cu_seqlens", "seqused")
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
        results = out, *(flash_attn_ext.backward(dout, *inputs, out, lse, **options) if trains else ())
        if form == "dense":
            results, lse = [x.flatten(0, 1) for x in results], lse.transpose(0, 1).flatten(1, 2)
        return lse, *results

    clean = both_passes(q, k, v, dout)
    spoilt = [x.clone() for x in (q, k, v, dout)]
    unused = {"q": torch.ones(shapes[0][0], dtype=torch.bool), "k": torch.ones(shapes[0][0], dtype=torch.bool)}
    for i, begin in enumerate(edges[:-1].tolist()):
        unused["q"][begin : begin + used_q[i]] = False
        unused["k"][begin : begin + used_k[i]] = False
    unused = {name: rows.to(device) for name, rows in unused.items()}
    for x, rows in zip(spoilt, "qkkq", strict=True):
        x[unused[rows]] = fill
    lse, out, *gradients = results = both_passes(*spoilt)
    assert all(same_bits(a, b) for a, b in zip(results, clean, strict=True))
    for x, rows in zip((out, *gradients), "qqkk", strict=False):
        assert (x[unused[rows]] == 0).all()
    assert (lse[:, unused["q"]] == -math.inf).all()

    for i, begin in enumerate(edges[:-1].tolist()):
        rows, keys = slice(begin, begin + used_q[i]), slice(begin, begin + used_k[i])
        expected_out, expected_lse = flash_attn_ext.forward(q[None, rows], k[None, keys], v[None, keys], causal=True)
        assert same_bits(out[None, rows], expected_out) and same_bits(lse[None, :, rows], expected_lse)


@packed
def test_neighbours_do_not_see_each_other(device, head_dim):
    """A sequence full of NaN between two others. Their keys fit into a block, so that dq has certain bits."""
    inputs, lengths = inputs_of([30, 70, 50], [30, 70, 50], GQA, device, head_dim)
    *inputs, dout = *(x.detach() for x in inputs), torch.randn_like(inputs[0])
    by_name = dict(zip(("cu_seqlens_q", "cu_seqlens_k"), lengths, strict=True))

    def both_passes():
        out, lse = flash_attn_ext.forward(*inputs, causal=True, **by_name)
        results = lse.T, out
        if has(device, head_dim, "backward", "cu_seqlens"):
            results += flash_attn_ext.backward(dout, *inputs, out, lse, causal=True, **by_name)
        return results

    clean = both_passes()
    for x in (*inputs, dout):
        x[30:100] = math.nan
    for a, b in zip(both_passes(), clean, strict=True):
        assert all(same_bits(a[rows], b[rows]) for rows in (slice(30), slice(100, None)))


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
    trains = has(device, head_dim, "backward", "cu_seqlens")
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


@pytest.mark.parametrize("device, head_dim", [on_gpu(head_dim, "cu_seqlens", "seqused") for head_dim in HEAD_DIMS])
def test_graph_replay_with_other_lengths(device, head_dim):
    """The lengths are on the device: captured calls follow them."""
    packings = [[64, 64, 72], [200, 0, 0], [1, 130, 69], [30, 30, 30], [0, 0, 0], [0, 100, 100]]
    (q, k, v), (edges, _) = inputs_of(packings[0], packings[0], GQA, device, head_dim)
    q, k, v, dout = (x.detach() for x in (q, k, v, torch.randn_like(q)))
    used = torch.tensor(packings[0], dtype=torch.int32, device=device)
    options = {"causal": True, "cu_seqlens_q": edges, "cu_seqlens_k": edges, "seqused_k": used}

    def both_passes():
        out, lse = flash_attn_ext.forward(q, k, v, **options)
        if not has(device, head_dim, "backward", "cu_seqlens", "seqused"):
            return lse, out
        dq, *of_keys = flash_attn_ext.backward(dout, q, k, v, out, lse, **options)
        return lse, out, *of_keys, dq

    both_passes()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = both_passes()
    for packing, unused in itertools.product(packings, (0, 5)):
        edges.copy_(cumulated(packing, device))
        used.copy_(torch.tensor(packing, dtype=torch.int32) - unused).clamp_(min=0)
        graph.replay()
        (*results, last), (*expected, last_expected) = captured, both_passes()
        assert all(same_bits(a, b) for a, b in zip(results, expected, strict=True))
        assert same_but_for_order(last, last_expected)  # dq, where there is one, whose bits are not certain
