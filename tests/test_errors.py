"""Refused calls: the type of the exception, and that its text has the argument, its value, what is accepted, a way out.

Each bad input is tried on CPU tensors, on fake CUDA tensors (which need no GPU), and on a GPU.
"""

import inspect
import math
import re
from fractions import Fraction
from functools import partial
from pathlib import Path

import numpy
import pytest
import torch
from conftest import SEED
from gpu import on_hopper
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from oracle import same_bits
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

import flash_attn_ext
from flash_attn_ext import explain, flash_attn_func, keywords, limits, refusals
from flash_attn_ext.limits import TABLE

README = Path(__file__).parents[1] / "README.md"
operator = torch.ops.flash_attn_ext.forward.default

RUNS = flash_attn_ext.supported()["forward"]
D = TABLE[0]["head_dim"] if TABLE else 64


def good(device, head_dim=D, dtype=torch.bfloat16):
    """The arguments of a call that nothing is wrong with."""
    q = torch.ones(2, 5, 4, head_dim, dtype=dtype, device=device)
    k, v = (torch.ones(2, 7, 2, head_dim, dtype=dtype, device=device) for _ in range(2))
    return {"q": q, "k": k, "v": v}


def nested(tensor, layout):
    """Sequences of two lengths."""
    return torch.nested.nested_tensor([tensor[0], tensor[1, 1:]], layout=layout)


# What is wrong: (changes to the arguments of a good call, words of the text)
WRONG_VALUE = {
    "q of rank 3": (
        lambda q, k, v: {"q": q[0]},
        ["q has 3 dimensions", f"(5, 4, {D})", "must have 4", "(batch, seqlen, heads, head_dim)", "q.unsqueeze(0)"],
    ),
    "k of rank 3": (lambda q, k, v: {"k": k[0]}, ["k has 3 dimensions", "must have 4", "kv_heads", "k.unsqueeze(0)"]),
    "v of rank 5": (lambda q, k, v: {"v": v[None]}, ["v has 5 dimensions", f"(1, 2, 7, 2, {D})", "must have 4"]),
    "q a scalar": (lambda q, k, v: {"q": q.sum()}, ["q has 0 dimensions", "must have 4"]),
    "heads not a multiple": (
        lambda q, k, v: {"k": k[:, :, :1].expand(2, 7, 3, D), "v": v[:, :, :1].expand(2, 7, 3, D)},
        ["q has 4 heads", "k, v have 3", "multiple", "num_key_value_heads"],
    ),
    "no kv heads": (
        lambda q, k, v: {"k": k[:, :, :0], "v": v[:, :, :0]},
        ["k and v have 0 heads", f"(2, 7, 0, {D})", "at least 1"],
    ),
    "kv heads differ": (lambda q, k, v: {"v": v[:, :, :1]}, ["k has 2 heads but v has 1", "must be equal"]),
    "batch of k": (lambda q, k, v: {"k": k[:1]}, ["batch sizes 2, 1 and 2", "must be equal"]),
    "batch of v": (lambda q, k, v: {"v": v[:1]}, ["batch sizes 2, 2 and 1", "must be equal"]),
    "seqlen of v": (lambda q, k, v: {"v": v[:, :6]}, ["k has seqlen 7 but v has 6", "must be equal"]),
    "head_dim of k": (
        lambda q, k, v: {"k": k[..., :32]},
        [f"head_dim {D}, 32 and {D}", "must be equal", "split into heads"],
    ),
    "head_dim of v": (
        lambda q, k, v: {"v": v[..., :32]},
        [f"{D} and 32", "must be equal", f"functional.pad(v, (0, {D - 32})), and keep out[..., :32]."],
    ),
    "head_dim of q and k": (
        lambda q, k, v: {"q": q[..., :32], "k": k[..., :32]},
        [
            f"head_dim 32, 32 and {D}",
            "must be equal",
            f"functional.pad(q, (0, {D - 32})) and pass softmax_scale=32**-0.5.",
        ],
    ),
    "head_dim of q and k, with a scale": (
        lambda q, k, v: {"q": q[..., :32], "k": k[..., :32], "softmax_scale": 0.3},
        ["must be equal", f"as torch.nn.functional.pad(q, (0, {D - 32}))."],
    ),
    "head_dim 0": (lambda q, k, v: {"q": q[..., :0], "k": k[..., :0], "v": v[..., :0]}, ["head_dim 0", "at least 1"]),
    "dtypes differ": (
        lambda q, k, v: {"v": v.half()},
        ["q, k and v", "bfloat16, bfloat16 and float16", "must be equal", "Cast", "autocast"],
    ),
    "integers": (
        lambda q, k, v: {"q": q.int(), "k": k.int(), "v": v.int()},
        ["q, k and v are int32", "must be float16", "bfloat16", "q.to(torch.bfloat16)"],
    ),
    "softmax_scale 0": (lambda q, k, v: {"softmax_scale": 0.0}, ["softmax_scale is 0.0", "finite and greater than 0"]),
    "softmax_scale -1": (
        lambda q, k, v: {"softmax_scale": -1.0},
        ["softmax_scale is -1.0", "greater than 0", "1/sqrt"],
    ),
    "softmax_scale nan": (lambda q, k, v: {"softmax_scale": math.nan}, ["softmax_scale is nan", "finite"]),
    "softmax_scale inf": (lambda q, k, v: {"softmax_scale": math.inf}, ["softmax_scale is inf", "finite"]),
    "softmax_scale too large": (lambda q, k, v: {"softmax_scale": 1e39}, ["softmax_scale is 1e+39", "finite"]),
    "softmax_scale that overflows in bits": (
        lambda q, k, v: {"softmax_scale": 3e38},
        ["softmax_scale is 3e+38", "2.36e+38"],
    ),
    "softmax_scale too small": (lambda q, k, v: {"softmax_scale": 1e-46}, ["softmax_scale is 1e-46", "greater than 0"]),
    "window of -2": (
        lambda q, k, v: {"window_size": (-2, 0)},
        ["window_size is (-2, 0)", "at least 0", "-1: unbounded"],
    ),
    "softcap -1": (lambda q, k, v: {"softcap": -1.0}, ["softcap is -1.0", "greater than 0", "must be 0"]),
    "softcap nan": (lambda q, k, v: {"softcap": math.nan}, ["softcap is nan", "finite"]),
    "softcap too large": (lambda q, k, v: {"softcap": 1e39}, ["softcap is 1e+39", "finite"]),
    "sinks of too many heads": (
        lambda q, k, v: {"sinks": q.new_ones(8)},
        ["sinks has shape (8,)", "must be (4,)", "each head of q"],
    ),
    "one sink": (lambda q, k, v: {"sinks": q.new_ones(())}, ["sinks has shape ()", "sinks.expand(heads)"]),
    "sinks of integers": (
        lambda q, k, v: {"sinks": q.new_ones(4, dtype=torch.int32)},
        ["sinks is int32", "floating-point", "sinks.float()"],
    ),
    "softmax_scale subnormal": (lambda q, k, v: {"softmax_scale": 1e-40}, ["softmax_scale is 1e-40", "greater than 0"]),
}
WRONG_TYPE = {
    "an int for q": (lambda q, k, v: {"q": 3}, ["q must be a torch.Tensor", "int", "3"]),
    "None for k": (lambda q, k, v: {"k": None}, ["k must be a torch.Tensor", "NoneType"]),
    "a list for v": (lambda q, k, v: {"v": [1.0]}, ["v must be a torch.Tensor", "list", "[1.0]"]),
    "a string for softmax_scale": (lambda q, k, v: {"softmax_scale": "1"}, ["softmax_scale must be a float", "str"]),
    "a tensor for softmax_scale": (
        lambda q, k, v: {"softmax_scale": torch.tensor(0.5)},
        ["softmax_scale must be a float or None", "Tensor", "float(scale)"],
    ),
    "a bool for softmax_scale": (lambda q, k, v: {"softmax_scale": True}, ["softmax_scale must be a float", "bool"]),
    "a NumPy array for q": (lambda q, k, v: {"q": numpy.ones(q.shape)}, ["q must be a torch.Tensor", "from_numpy(q)"]),
    "a NumPy array for softmax_scale": (
        lambda q, k, v: {"softmax_scale": numpy.ones(())},
        ["softmax_scale must be a float", "ndarray", "float(scale)"],
    ),
    "an int for window_size": (lambda q, k, v: {"window_size": 128}, ["window_size is 128", "two ints, (left, right)"]),
    "an array for window_size": (
        lambda q, k, v: {"window_size": numpy.array([-1, -1])},
        ["window_size is array([-1, -1])", "two ints"],
    ),
    "floats for window_size": (lambda q, k, v: {"window_size": (1.0, 0)}, ["window_size is (1.0, 0)", "two ints"]),
    "three sizes for window_size": (lambda q, k, v: {"window_size": (1, 0, 0)}, ["window_size is (1, 0, 0)"]),
    "a tensor for softcap": (
        lambda q, k, v: {"softcap": torch.tensor(30.0)},
        ["softcap must be a float", "Tensor", "float(softcap)"],
    ),
    "a list for sinks": (lambda q, k, v: {"sinks": [0.0] * 4}, ["sinks must be a torch.Tensor", "list"]),
    "an int for causal": (lambda q, k, v: {"causal": 1}, ["causal must be True or False", "int", "1"]),
    "None for causal": (lambda q, k, v: {"causal": None}, ["causal must be True or False", "NoneType"]),
    "an int for deterministic": (
        lambda q, k, v: {"deterministic": 1},
        ["deterministic must be True or False", "int (1)", "the same in every run"],
    ),
    "None for deterministic": (
        lambda q, k, v: {"deterministic": None},
        ["deterministic must be True or False", "NoneType"],
    ),
    "a str for deterministic beside a wrong value": (
        lambda q, k, v: {"softmax_scale": -1.0, "deterministic": "yes"},
        ["deterministic must be True or False", "str ('yes')"],
    ),
    "FlashAttention-2's order": (
        lambda q, k, v: {"softmax_scale": 0.0, "causal": None},
        ["causal must be True or False", "fifth", "FlashAttention-2 has dropout_p"],
    ),
    "a str for causal beside a wrong value": (
        lambda q, k, v: {"softmax_scale": -1.0, "causal": "yes"},
        ["causal must be True or False", "str", "'yes'"],
    ),
}
WRONG_LAYOUT = {
    "sparse q": (lambda q, k, v: {"q": q.to_sparse()}, ["q has layout torch.sparse_coo", "dense", "q.to_dense()"]),
    "sparse v in rows": (
        lambda q, k, v: {"v": v.flatten(0, 2).to_sparse_csr()},
        ["v has layout torch.sparse_csr", "v.to_dense()"],
    ),
    "nested q": (lambda q, k, v: {"q": nested(q, torch.strided)}, ["q is a nested tensor", "q.unbind()"]),
    "nested q that requires grad": (
        lambda q, k, v: {"q": nested(q, torch.strided).requires_grad_()},
        ["q is a nested tensor", "scaled_dot_product_attention"],
    ),
    "jagged k": (lambda q, k, v: {"k": nested(k, torch.jagged)}, ["k is a nested tensor", "k.unbind()"]),
}
WRONG_ON_CUDA = {
    "float32": (lambda q, k, v: {"q": q.float(), "k": k.float(), "v": v.float()}, ["float32", "on cuda", "autocast"]),
    "float64": (
        lambda q, k, v: {"q": q.double(), "k": k.double(), "v": v.double()},
        ["float64", "float16", "bfloat16"],
    ),
    "k on the cpu": (
        lambda q, k, v: {"k": torch.ones(k.shape, dtype=k.dtype)},
        ["q, k and v are on cuda:0, cpu and cuda:0", "must be on one device"],
    ),
    "2^30 keys": (
        lambda q, k, v: {name: x[:, :1].expand(-1, 2**30, -1, -1) for name, x in (("k", k), ("v", v))},
        [f"k has shape (2, {2**30}, 2, {D})", f"sizes up to {2**30 - 1}", "Split the batch or the heads"],
    ),
}
ASKS = {"window_size": (128, 0), "softcap": 30.0, "sinks": torch.ones(4)}  # for an option that kernels may lack


each = pytest.mark.parametrize
wrong_value = each("change, words", WRONG_VALUE.values(), ids=WRONG_VALUE.keys())
wrong_layout = each("change, words", WRONG_LAYOUT.values(), ids=WRONG_LAYOUT.keys())
wrong_type = each("change, words", WRONG_TYPE.values(), ids=WRONG_TYPE.keys())
wrong_on_cuda = each("change, words", WRONG_ON_CUDA.values(), ids=WRONG_ON_CUDA.keys())


def assert_refused(call, exception, words):
    with pytest.raises(exception) as caught:
        call()
    text = str(caught.value)
    assert type(caught.value) is exception
    assert [word for word in words if word not in text] == [], text
    return text


def assert_call_refused(arguments, exception, words):
    """By the public functions, by the operator, and by explain() without a call: all in the same words."""
    text = assert_refused(lambda: flash_attn_func(**arguments), exception, words)
    assert_refused(lambda: flash_attn_ext.forward(**arguments), exception, [text])
    if exception is not TypeError:  # the operator's types are the dispatcher's to check
        assert_refused(lambda: operator(**of_operator(arguments)), exception, [text])
    assert explain(**arguments) == text


def of_operator(arguments):
    """The arguments of a public function as the operator has them."""
    q, k, v, *options = arguments
    given = flash_attn_ext.options.Options.of(**{name: arguments[name] for name in options})._asdict()
    return {name: arguments[name] for name in (q, k, v)} | given


@wrong_value
def test_wrong_value_on_cpu(change, words):
    arguments = good("cpu")
    assert_call_refused(arguments | change(**arguments), ValueError, words)


@wrong_type
def test_wrong_type_on_cpu(change, words):
    arguments = good("cpu")
    assert_call_refused(arguments | change(**arguments), TypeError, words)


@pytest.mark.filterwarnings("ignore:.*nested tensors:UserWarning", "ignore:Sparse CSR:UserWarning")
@wrong_layout
def test_wrong_layout_on_cpu(change, words):
    arguments = good("cpu", dtype=torch.float32)
    arguments |= change(**arguments)
    text = assert_refused(lambda: flash_attn_func(**arguments), TypeError, words)
    assert explain(**arguments) == text


@each("scale", [numpy.float32(0.25), numpy.float64(0.25), numpy.float16(0.25), Fraction(1, 4)], ids=repr)
def test_numbers_of_other_types_are_accepted(scale):
    arguments = good("cpu")
    out, lse = flash_attn_func(**arguments, softmax_scale=scale, return_lse=True)
    assert same_bits(lse, flash_attn_func(**arguments, softmax_scale=0.25, return_lse=True)[1])
    assert explain(**arguments, softmax_scale=scale) is None
    flash_attn_ext.backward(out, *arguments.values(), out, lse, scale)
    with pytest.raises(ValueError, match="softmax_scale is nan"):
        flash_attn_func(**arguments, softmax_scale=type(scale)(1) * numpy.float32("nan"))


@each("change, words", (WRONG_VALUE | WRONG_ON_CUDA).values(), ids=(WRONG_VALUE | WRONG_ON_CUDA).keys())
def test_explain_of_meta_tensors_for_a_hopper_gpu(change, words):
    """What it would say to CUDA tensors, on a laptop."""
    arguments = good("cpu")
    changed = arguments | change(**arguments)
    if any(word.startswith("q, k and v are on cuda:0") for word in words):
        pytest.skip("the devices are those of the tensors")
    for device in ("cpu", "meta"):
        moved = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in changed.items()}
        text = explain(**moved, target="hopper")
        assert text and [word for word in words if word not in text] == [], text


def test_explain_for_a_hopper_gpu():
    for device in ("cpu", "meta"):
        assert explain(**good(device), target="hopper") is None
        assert "head_dim is 127" in explain(**good(device, 127), target="hopper")
        assert explain(**good(device, 127)) is None
    with torch.autocast("cpu"):  # not that of the GPU
        assert "float32" in explain(**good("cpu", dtype=torch.float32), target="hopper")
    assert_refused(lambda: explain(**good("cpu"), target="h100"), ValueError, ["target is 'h100'", '"hopper"'])


@each("device", ["cpu", "meta"])
def test_explain_gradients_for_a_hopper_gpu(device, forward_only):
    arguments = good(device, forward_only)
    arguments["k"].requires_grad_()
    assert f"k requires grad, and head_dim {forward_only} has no backward" in explain(**arguments, target="hopper")
    with torch.no_grad():
        assert explain(**arguments, target="hopper") is None


# Keywords of other attention functions --------------------------------------------------------------------------------

ELSEWHERE = {
    "FlashAttention-2": "q k v dropout_p softmax_scale causal window_size softcap alibi_slopes deterministic "
    "return_attn_probs",
    "FlashAttention-3": "q k v softmax_scale causal qv q_descale k_descale v_descale window_size attention_chunk "
    "softcap num_splits pack_gqa deterministic sm_margin return_attn_probs",
    "FlashAttention-3 with sinks": "s_aux",
    "FlashAttention-4": "q k v softmax_scale causal window_size learnable_sink softcap num_splits pack_gqa "
    "deterministic",
    "FlashAttention-2's varlen": "cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k block_table",
    "FlashAttention-3's varlen": "cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k seqused_q seqused_k",
    "SDPA": "query key value attn_mask dropout_p is_causal scale enable_gqa",
}
NEUTRAL = [
    *(
        {"dropout_p": 0.0},
        {"dropout_p": 0},
        {"window_size": (-1, -1)},
        {"window_size": [-1, -1]},
        {"window_size": None},
    ),
    *(
        {"softcap": 0.0},
        {"softcap": None},
        {"alibi_slopes": None},
        {"deterministic": False},
        {"return_attn_probs": False},
    ),
    *({"qv": None}, {"q_descale": None, "k_descale": None, "v_descale": None}, {"attention_chunk": 0}),
    *({"num_splits": 0}, {"num_splits": 1}, {"pack_gqa": None}, {"pack_gqa": True}, {"pack_gqa": False}),
    *({"sm_margin": 0}, {"sm_margin": 8}, {"sinks": None}, {"attn_mask": None}, {"is_causal": False}, {"scale": None}),
    *({"enable_gqa": True}, {"enable_gqa": False}),
]
FOREIGN = {  # what is refused: (arguments, exception, words)
    "dropout": ({"dropout_p": 0.1}, ValueError, ["dropout_p is 0.1; only 0.0 is accepted", "scaled_dot_product"]),
    "ALiBi": ({"alibi_slopes": torch.ones(4)}, ValueError, ["alibi_slopes is Tensor", "only None", "flex_attention"]),
    "qv": ({"qv": torch.ones(4)}, ValueError, ["qv is Tensor", "FlashAttention-3"]),
    "FP8": ({"k_descale": torch.ones(4)}, ValueError, ["k_descale is Tensor", "FP8", "bfloat16"]),
    "chunks": ({"attention_chunk": 1024}, ValueError, ["attention_chunk is 1024", "only 0", "flex_attention"]),
    "splits": ({"num_splits": 4}, ValueError, ["num_splits is 4", "only 0 or 1", "leave it out"]),
    "sinks by another name": ({"s_aux": torch.ones(4)}, ValueError, ["s_aux is Tensor", "The name is sinks"]),
    "a mask": ({"attn_mask": torch.ones(5, 7)}, ValueError, ["attn_mask is Tensor", "causal=True", "flex_attention"]),
    "is_causal": ({"is_causal": True}, ValueError, ["is_causal is True", "The name is causal", "bottom right"]),
    "scale": ({"scale": 0.1}, ValueError, ["scale is 0.1", "The name is softmax_scale", "(batch, seqlen, heads"]),
    "another type": ({"return_attn_probs": "yes"}, ValueError, ["return_attn_probs is 'yes'", "any bool"]),
    "a typing error": ({"casual": True}, TypeError, ["no argument casual", "causal", "deterministic", "dropout_p"]),
}


@each("name", ELSEWHERE)
def test_every_keyword_of_other_functions_is_known_and_in_the_readme(name):
    functions = flash_attn_func, flash_attn_ext.flash_attn_varlen_func
    known = set(keywords.KEYWORDS).union(*(inspect.signature(function).parameters for function in functions))
    assert set(ELSEWHERE[name].split()) <= known
    section = README.read_text().split("## Coming from")[1].split("\n## ")[0]
    missing = [keyword for keyword in ELSEWHERE[name].split() if not re.search(rf"`[^`]*\b{keyword}\b", section)]
    assert missing == []


@each("arguments", NEUTRAL, ids=str)
def test_what_asks_for_nothing_passes(arguments):
    assert same_bits(flash_attn_func(**good("cpu"), **arguments), flash_attn_func(**good("cpu")))
    assert explain(**good("cpu"), **arguments) is None


def test_return_attn_probs_is_flashattention_3s():
    out, lse = flash_attn_func(**good("cpu"), return_attn_probs=True)
    expected_out, expected_lse = flash_attn_func(**good("cpu"), return_lse=True)
    assert same_bits(out, expected_out) and same_bits(lse, expected_lse)


@each("arguments, exception, words", FOREIGN.values(), ids=FOREIGN.keys())
def test_what_another_function_has_is_refused_by_name(arguments, exception, words):
    text = assert_refused(lambda: flash_attn_func(**good("cpu"), **arguments), exception, words)
    assert explain(**good("cpu"), **arguments) == text


def test_calls_written_for_other_functions():
    q, k, v = good("cpu").values()
    words = ["no argument query", "The name is q", "(batch, heads, seqlen, head_dim)", "query.transpose(1, 2)"]
    assert_refused(lambda: flash_attn_func(query=q, key=k, value=v, is_causal=True), TypeError, words)
    assert_refused(lambda: flash_attn_func(q, k), TypeError, ["v must be a torch.Tensor"])
    words = ["6 arguments by position", "takes 5", "FlashAttention-2 has dropout_p in the fourth place", "by name"]
    assert_refused(lambda: flash_attn_func(q, k, v, 0.0, None, True), TypeError, words)
    assert_refused(lambda: flash_attn_func(q, k, v, 0.0), ValueError, ["softmax_scale is 0.0", "dropout_p", "by name"])


@each("change, words", (WRONG_VALUE | WRONG_ON_CUDA).values(), ids=(WRONG_VALUE | WRONG_ON_CUDA).keys())
def test_wrong_value_of_fake_cuda_tensors(change, words):
    with FakeTensorMode():
        arguments = good("cuda")
        assert_refused(lambda: operator(**of_operator(arguments | change(**arguments))), ValueError, words)


def test_device_of_k_on_cpu():
    arguments = good("cpu")
    arguments["k"] = arguments["k"].to("meta")
    words = ["q, k and v are on cpu, meta and cpu", "must be on one device"]
    assert_refused(lambda: flash_attn_func(**arguments), ValueError, words)
    assert all(word in explain(**arguments) for word in words)


def test_window_that_no_int_holds():
    """The dispatcher has words of its own for it."""
    words = [f"window_size is (0, {2**63})", "below 2^63"]
    assert_refused(lambda: flash_attn_func(**good("cpu"), window_size=(0, 2**63)), ValueError, words)


def test_under_compile():
    compiled = torch.compile(flash_attn_func, backend="eager", fullgraph=True)
    arguments = good("cpu")
    arguments["v"] = arguments["v"][:, :6]
    with pytest.raises(Exception, match="k has seqlen 7 but v has 6"):
        compiled(**arguments)


def test_nothing_wrong():
    assert explain(**good("cpu")) is None
    assert explain(**good("cpu"), softmax_scale=2, causal=True) is None
    assert flash_attn_func(**good("cpu"), softmax_scale=2, causal=True).shape == (2, 5, 4, D)


def outside_the_table():
    of_rows = {row["head_dim"] + more for row in TABLE for more in (-4, -1, 1, 4, 8)}
    return sorted({1, 2, 7, 100, 127, 260, 512, *of_rows} - set(RUNS))


@each("head_dim", outside_the_table())
def test_head_dim_outside_the_table(head_dim):
    with FakeTensorMode():
        arguments = good("cuda", head_dim)
        words = [f"head_dim is {head_dim}", limits.what_runs(), "hidden_size", "scaled_dot_product_attention"]
        text = assert_refused(lambda: operator(**arguments), ValueError, words)
    larger = [runs for runs in RUNS if runs > head_dim]
    if larger:
        assert f"pad q, k and v with zeros to {larger[0]}, as " in text
        assert f", pass softmax_scale={head_dim}**-0.5 and keep out[..., :{head_dim}]" in text
    else:
        assert "pad" not in text


def test_head_dim_that_is_a_symbol():
    """The texts have its number."""
    small, large = (torch.empty(2, 5, 4, head_dim, dtype=torch.bfloat16, device="meta") for head_dim in (100, 116))

    def texts_of(x, y):
        return [explain(*qkv, target="hopper") for qkv in ((x, x, x), (x, x, y), (y, y, x))]

    def trace(x, y):
        assert isinstance(x.shape[-1], torch.SymInt)
        symbolic.extend(texts_of(x, y))
        return x

    symbolic = []
    make_fx(trace, tracing_mode="symbolic")(small, large)
    assert symbolic == texts_of(small, large)


@each("scale", [{}, {"softmax_scale": 0.3}], ids=["default", "given"])
@each("head_dim", [1, 20, 71, 100, 127, 250])
def test_the_way_out_of_a_head_dim_is_exact(head_dim, scale):
    """What the text says, done on CPU tensors, where the head dim runs as it is too."""
    q, k, v = (torch.randn(2, 9, 3, head_dim, dtype=torch.float64) for _ in range(3))
    text = explain(**good("meta", head_dim), **scale, target="hopper")
    zeros, columns = re.search(r"functional\.pad\(q, \(0, (\d+)\)\).* and keep out\[\.\.\., :(\d+)\]", text).groups()
    padded = [torch.nn.functional.pad(x, (0, int(zeros))) for x in (q, k, v)]
    assert padded[0].shape[-1] in RUNS
    out = flash_attn_func(*padded, **scale | scale_in(text), causal=True)
    torch.testing.assert_close(out[..., : int(columns)], flash_attn_func(q, k, v, **scale, causal=True))


@each("scale", [{}, {"softmax_scale": 0.3}], ids=["default", "given"])
@each("of_q, of_v", [(24, 16), (16, 24)])
def test_the_way_out_of_two_head_dims_is_exact(of_q, of_v, scale):
    """Beside torch's own attention, which has two."""
    q, k, v = (torch.randn(2, 9, 3, head_dim, dtype=torch.float64) for head_dim in (of_q, of_q, of_v))
    text = explain(q, k, v, **scale)
    names, zeros = re.search(r"Pad (.*) with zeros.*, \(0, (\d+)\)\)", text).groups()
    assert names == ("v" if of_v < of_q else "q and k")
    inputs = {"q": q, "k": k, "v": v}
    inputs |= {name: torch.nn.functional.pad(inputs[name], (0, int(zeros))) for name in names.split(" and ")}
    out = flash_attn_func(**inputs, **scale | scale_in(text))
    if columns := re.search(r"keep out\[\.\.\., :(\d+)\]", text):
        out = out[..., : int(columns[1])]
    by_heads = [x.transpose(1, 2) for x in (q, k, v)]
    expected = torch.nn.functional.scaled_dot_product_attention(*by_heads, scale=scale.get("softmax_scale"))
    torch.testing.assert_close(out, expected.transpose(1, 2))


def scale_in(text):
    """The scale that a refusal says to pass, if it does, as an argument."""
    found = re.search(r"pass softmax_scale=(\d+)\*\*-0\.5", text)
    return {"softmax_scale": int(found[1]) ** -0.5} if found else {}


@each("wanted", ["q", "k", "v", "qkv"])
def test_gradient_without_a_backward_kernel(forward_only, wanted):
    trains = flash_attn_ext.supported()["backward"]
    with FakeTensorMode():
        arguments = good("cuda", forward_only)
        for name in wanted:
            arguments[name].requires_grad_()
        call = partial(operator, softcap=30.0)
        words = [f"head_dim {forward_only} has no backward", "torch.no_grad()", ", ".join(wanted[:-1]) or wanted]
        text = assert_refused(lambda: call(**arguments), ValueError, [*words, f"train: {limits.in_words(trains)}."])
        assert ("pad the head_dim with zeros" in text) == any(head_dim > forward_only for head_dim in trains)
        with torch.no_grad():
            assert not call(**arguments)[0].requires_grad
        assert not call(**{name: x.detach() for name, x in arguments.items()})[0].requires_grad


def test_gradient_where_no_head_dim_trains(monkeypatch):
    monkeypatch.setattr(limits, "TABLE", [row | {"backward": None} for row in TABLE])
    arguments = good("meta")
    arguments["v"].requires_grad_()
    text = explain(**arguments, target="hopper")
    assert "train: none in this version. Ways out: call under torch.no_grad() or detach the inputs, or train" in text


def assert_names_where_it_is_had(text, option, which):
    dims = limits.head_dims(map(limits.row_of, limits.OPTIONS[option][which]))
    assert (f"have it at {limits.in_words(dims)}, not at" if dims else "do not have that yet") in text


had_at = each("dims", [(), tuple(row["head_dim"] for row in TABLE[1:])], ids=["nowhere", "elsewhere"])


@had_at
@each("option", ASKS)
def test_option_that_the_forward_does_not_have(monkeypatch, option, dims):
    monkeypatch.setitem(limits.OPTIONS, option, {"forward": dims, "backward": dims})
    value = ASKS[option]
    words = [f"{option} is {'given' if option == 'sinks' else value}; the forward", "Ways out", "CPU tensors"]
    with FakeTensorMode() as mode:
        asked = {option: mode.from_tensor(value).to("cuda") if option == "sinks" else value}
        text = assert_refused(lambda: operator(**of_operator(good("cuda") | asked)), ValueError, words)
    assert_names_where_it_is_had(text, option, "forward")
    assert explain(**good("cpu"), **{option: value}, target="hopper") == text
    assert explain(**good("cpu"), **{option: value}) is None


@had_at
@each("option", ASKS)
def test_option_that_the_backward_does_not_have(monkeypatch, option, dims):
    monkeypatch.setitem(limits.OPTIONS, option, {"forward": limits.EVERY, "backward": dims})
    arguments = good("meta") | {option: ASKS[option].to("meta") if option == "sinks" else ASKS[option]}
    assert explain(**arguments, target="hopper") is None
    arguments["k"].requires_grad_()
    text = explain(**arguments, target="hopper")
    assert text.startswith(f"k requires grad, and {option} is") and "torch.no_grad()" in text
    assert_names_where_it_is_had(text, option, "backward")


def test_options_that_ask_for_nothing_are_had_by_every_kernel():
    nothing = {"window_size": (-1, -1)}, {"causal": True, "window_size": (-1, 0)}, {"softcap": 0.0}
    for asked in (*nothing, {"deterministic": True}):  # the last asks for something that every kernel has
        assert flash_attn_ext.options.Options.of(**asked).asked() == {}
        assert explain(**good("meta"), **asked, target="hopper") is None


def test_unavailable_devices():
    assert flash_attn_ext.is_available("cpu") is False
    if not torch.cuda.is_available():
        assert flash_attn_ext.is_available() is False and flash_attn_ext.is_available("cuda:0") is False


# On a GPU: the same, and what only a GPU can show ---------------------------------------------------------------------


@on_hopper
@each(
    "change, words",
    (WRONG_VALUE | WRONG_ON_CUDA).values(),
    ids=(WRONG_VALUE | WRONG_ON_CUDA).keys(),
)
def test_wrong_value_on_gpu(change, words):
    arguments = good("cuda")
    assert_call_refused(arguments | change(**arguments), ValueError, words)


@on_hopper
@wrong_type
def test_wrong_type_on_gpu(change, words):
    arguments = good("cuda")
    assert_call_refused(arguments | change(**arguments), TypeError, words)


@on_hopper
@each("head_dim", outside_the_table())
def test_head_dim_outside_the_table_on_gpu(head_dim):
    words = [f"head_dim is {head_dim}", "hidden_size", limits.what_runs()]
    assert_call_refused(good("cuda", head_dim), ValueError, words)


@on_hopper
def test_gradient_without_a_backward_kernel_on_gpu(forward_only):
    arguments = good("cuda", forward_only)
    arguments["k"].requires_grad_()
    words = ["k requires grad", f"head_dim {forward_only} has no backward", "torch.no_grad()"]
    assert_call_refused(arguments | {"softcap": 30.0}, ValueError, words)
    with torch.no_grad():
        assert explain(**arguments, softcap=30.0) is None
        flash_attn_func(**arguments, softcap=30.0)

    # Reentrant checkpointing runs the forward without grad first: the refusal comes with the recomputation.
    out = checkpoint(partial(flash_attn_func, softcap=30.0), *arguments.values(), use_reentrant=True)
    assert_refused(lambda: out.sum().backward(), ValueError, words)


@pytest.fixture
def faults():
    """Sets the faults that the compiled module can pretend, and ends them."""
    from flash_attn_ext import _C

    yield _C.set_test_faults
    _C.set_test_faults()


@on_hopper
@each("capability", [80, 89, 100, 120])
def test_gpu_that_is_not_a_hopper(faults, capability):
    faults(compute_capability=capability)
    words = ["Hopper", "9.0", torch.cuda.get_device_name(), f"{capability // 10}.{capability % 10}"]
    assert_call_refused(good("cuda"), RuntimeError, [*words, "scaled_dot_product_attention"])
    assert not flash_attn_ext.is_available()
    faults()
    assert flash_attn_ext.is_available()
    flash_attn_func(**good("cuda"))


@on_hopper
def test_what_python_lets_pass_goes_on_to_the_kernel(monkeypatch):
    monkeypatch.setattr(refusals, "of_forward", lambda *call, **how: None)
    head_dim = outside_the_table()[-1]
    assert_refused(
        lambda: flash_attn_func(**good("cuda", head_dim)), RuntimeError, [f"no forward kernel for head_dim {head_dim}"]
    )


@on_hopper
def test_tensor_map_that_cannot_be_encoded(faults):
    faults(tensor_map_encode_fails=True)
    words = ["q", "batch 2", "seqlen 5", "heads 4", f"head_dim {D}", "strides", "contiguous"]
    assert_refused(lambda: flash_attn_func(**good("cuda")), RuntimeError, words)
    faults()
    torch.cuda.synchronize()  # nothing was launched that could fail later
    assert (flash_attn_func(**good("cuda")) == 1).all()


@on_hopper
@seed(SEED)
@settings(max_examples=200, deadline=None, database=None, print_blob=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_calls_run_or_say_what_explain_says(data):
    """The compiled module and Python decide together; what runs is what `explain` finds nothing against."""
    draw = data.draw
    sizes = {name: [2, 5, 4, D] for name in "qkv"}
    for _ in range(draw(st.integers(0, 3))):  # sizes to spoil, of one tensor or of all three
        dim, size = draw(st.integers(0, 3)), draw(st.sampled_from([0, 1, 2, 3, 8, 63, 64, 72, 96, 128, 256]))
        for name in draw(st.sampled_from(["q", "k", "v", "kv", "qkv"])):
            sizes[name][dim] = size
    dtypes = st.sampled_from([torch.bfloat16, torch.bfloat16, torch.float16, torch.float32])
    one_dtype, grad = draw(dtypes), draw(st.sampled_from(["", "", "", "q", "kv"]))
    arguments = {
        name: torch.ones(
            size[draw(st.sampled_from([0, 0, 0, 0, 0, 1])) :],
            dtype=one_dtype if draw(st.integers(0, 4)) else draw(dtypes),
            device="cuda" if draw(st.integers(0, 9)) else "cpu",
            requires_grad=name in grad,
        )
        for name, size in sizes.items()
    }
    scales = [None, 0.1, 3, 0.0, -1.0, math.nan, math.inf, 1e-46, 1e-40, 1e38, 1e39, True, "1"]
    arguments["softmax_scale"] = draw(st.sampled_from(scales))
    arguments["causal"] = draw(st.sampled_from([False, True, True, 0, None]))
    arguments["deterministic"] = draw(st.sampled_from([False, False, True, True, 1]))
    refusal = explain(**arguments)
    if refusal is None:
        flash_attn_ext.forward(**arguments)
    else:
        with pytest.raises((TypeError, ValueError)) as caught:
            flash_attn_ext.forward(**arguments)
        assert str(caught.value) == refusal
