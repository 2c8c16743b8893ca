"""The backward pass on CPU tensors, and the rule that gradients are held to."""

import inspect
import itertools
from functools import partial

import pytest
import torch
from cases import DTYPES, LAYOUTS, Case, both_masks
from oracle import check_gradients, same_bits
from torch import library

import flash_attn_ext
from flash_attn_ext import attention_reference, flash_attn_func
from flash_attn_ext.options import Options

backward_operator = torch.ops.flash_attn_ext.backward.default

CASES = [
    Case(head_dim, dtype, seqlen_q, seqlen_k, causal, 2, heads, kv_heads)
    for head_dim, dtype in ((64, "bf16"), (80, "fp16"))
    for causal in (False, True)
    for seqlen_q, seqlen_k, heads, kv_heads in (
        *((1, 1, 3, 3), (1, 67, 4, 4), (67, 1, 6, 2), (5, 2, 3, 3)),
        *((65, 65, 5, 1), (33, 67, 6, 3), (67, 33, 4, 2)),
    )
]
CASES += [Case(16, "bf16", 33, 33, True, 2, 6, 2, layout) for layout in LAYOUTS]


def arguments_of(case, dtype=None):
    """(dout, q, k, v, out, lse)."""
    q, k, v = (x if dtype is None else x.to(dtype) for x in case.inputs("cpu"))
    return torch.randn_like(q), q, k, v, *flash_attn_ext.forward(q, k, v, **case.options())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_cpu_tensors_meet_the_rule_of_the_gpu(case):
    arguments = arguments_of(case)
    gradients = flash_attn_ext.backward(*arguments, **case.options())
    check_gradients(gradients, *arguments, **case.options())
    assert [x.stride() for x in gradients] == [torch.empty_like(x).stride() for x in arguments[1:4]]

    leaves = [x.detach().requires_grad_() for x in arguments[1:4]]
    out = flash_attn_func(*leaves, **case.options())
    by_autograd = torch.autograd.grad(out, leaves, arguments[0])
    assert all(same_bits(a, b) for a, b in zip(by_autograd, gradients, strict=True))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda dq, dk, dv: (dq * 1.02, dk, dv),
        lambda dq, dk, dv: (dq, dk * 1.02, dv),
        lambda dq, dk, dv: (dq, dk, dv * 1.02),
        lambda dq, dk, dv: (dq, dk, dv.roll(1, 1)),
        lambda dq, dk, dv: (dq, dk.index_fill(1, torch.tensor([1]), 0), dv),
        lambda dq, dk, dv: (torch.where(torch.arange(16) == 3, torch.nan, dq), dk, dv),
    ],
    ids=["2 % of dq", "2 % of dk", "2 % of dv", "keys displaced", "a key left out", "NaN"],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_rule_notices(spoil, dtype):
    """The test of the test."""
    arguments = arguments_of(Case(16, dtype, 33, 33, True))
    gradients = flash_attn_ext.backward(*arguments, causal=True)
    check_gradients(gradients, *arguments, causal=True)
    with pytest.raises(AssertionError, match=r"d[qkv]: max error"):
        check_gradients(spoil(*gradients), *arguments, causal=True)


@both_masks
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_low_level_backward_is_autograd_of_the_reference(dtype, causal):
    for seqlen_q, seqlen_k in ((17, 17), (9, 30), (30, 9), (1, 1)):
        case = Case(24, "bf16", seqlen_q, seqlen_k, causal, 2, 6, 2, softmax_scale=0.3)
        dout, q, k, v, _, _ = arguments_of(case, dtype)
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        out, lse = attention_reference(*leaves, 0.3, causal)
        expected = torch.autograd.grad(out, leaves, dout)
        results = flash_attn_ext.backward(dout, q, k, v, out.detach(), lse.detach().float(), 0.3, causal)
        torch.testing.assert_close(results, expected, rtol=1e-5, atol=1e-5)  # lse is float32


@pytest.mark.parametrize("needed", ["".join(x) for n in range(1, 4) for x in itertools.combinations("qkv", n)])
def test_only_the_needed_gradients(needed):
    arguments = arguments_of(Case(16, "bf16", 9, 13, True, heads=4, kv_heads=2))
    every = flash_attn_ext.backward(*arguments, causal=True)
    needs = [name in needed for name in "qkv"]
    *results, dsinks = backward_operator(*arguments, causal=True, needs=needs)
    assert dsinks.numel() == 0
    for x, expected, need in zip(results, every, needs, strict=True):
        assert same_bits(x, expected) if need else x.numel() == 0


def test_given_out_and_lse_are_used():
    """Two halves of the keys, each with the merged out and lse, make the gradients of the whole."""
    q, k, v, dout = (torch.randn(2, s, 4, 16, dtype=torch.float64) for s in (9, 20, 20, 9))
    parts = [(k[:, :11], v[:, :11], False), (k[:, 11:], v[:, 11:], True)]  # the mask is on the later keys
    out, lse = attention_reference(q, k, v, causal=True)
    backward = partial(flash_attn_ext.backward, dout, q)
    (dq_a, *first), (dq_b, *last) = (backward(*keys, out, lse.float(), causal=causal) for *keys, causal in parts)
    whole = backward(k, v, out, lse.float(), causal=True)
    torch.testing.assert_close((dq_a + dq_b, *(torch.cat(x, 1) for x in zip(first, last, strict=True))), whole)


def test_changes_in_place_are_noticed():
    for which in ("q", "out"):
        leaves = [torch.randn(1, 5, 2, 8).requires_grad_() for _ in range(3)]
        q = leaves[0] * 1
        out = flash_attn_func(q, *leaves[1:])
        loss = out.sum()
        with torch.no_grad():
            {"q": q, "out": out}[which].add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@both_masks
def test_opcheck(causal):
    arguments = arguments_of(Case(16, "bf16", 9, 13, causal, heads=4, kv_heads=2), torch.float32)
    library.opcheck(backward_operator, (*arguments, 0.3), {"causal": causal, "needs": [True] * 3})
    options = {"window_left": 3, "softcap": 5.0, "sinks": torch.randn(4), "dlse": torch.randn(2, 4, 9)}
    library.opcheck(backward_operator, arguments, {"causal": causal} | options)


def test_signature():
    """The forward's arguments after dout, then its results, then its options, then what flows into lse."""
    parameters = inspect.signature(flash_attn_ext.backward).parameters
    options = inspect.signature(Options.of).parameters
    assert list(parameters) == ["dout", "q", "k", "v", "out", "lse", *options, "dlse"]


SAME_BITS = {
    "torch's kernel": {},
    "torch's kernel, causal": {"causal": True},
    "blocks": {"causal": True, "window_size": (40, 3), "softcap": 5.0, "sinks": True},
    "packed": {"cu_seqlens": [0, 1, 1, 200, 300]},
    "packed, of which a part is used": {"cu_seqlens": [0, 1, 1, 200, 300], "seqused": [1, 0, 133, 70]},
}


@pytest.mark.parametrize("options", SAME_BITS.values(), ids=SAME_BITS.keys())
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("heads, kv_heads", [(6, 6), (6, 2), (6, 1)])
def test_every_run_has_the_same_bits(options, dtype, heads, kv_heads):
    """On CPU tensors by itself, so that deterministic=True has nothing to do there."""
    options = dict(options)
    if "sinks" in options:
        options["sinks"] = torch.randn(heads)
    for name in ("cu_seqlens", "seqused"):
        if lengths := options.pop(name, None):
            options |= dict.fromkeys((f"{name}_q", f"{name}_k"), torch.tensor(lengths, dtype=torch.int32))
    rows = (300,) if "cu_seqlens_q" in options else (2, 300)
    q, k, v, dout = (torch.randn(*rows, h, 32).to(dtype) for h in (heads, kv_heads, kv_heads, heads))
    out, lse = flash_attn_ext.forward(q, k, v, **options)
    first = flash_attn_ext.backward(dout, q, k, v, out, lse, **options)
    for _ in range(5):
        gradients = flash_attn_ext.backward(dout, q, k, v, out, lse, deterministic=True, **options)
        assert all(same_bits(a, b) for a, b in zip(gradients, first, strict=True))


WRONG = {
    "dout of another shape": (lambda a: {"dout": a["dout"][:, :4]}, ["dout has shape (2, 4, 4, 16)", "(2, 9, 4, 16)"]),
    "out of another shape": (lambda a: {"out": a["out"][:1]}, ["out has shape (1, 9, 4, 16)", "must be equal"]),
    "dout of another dtype": (lambda a: {"dout": a["dout"].float()}, ["dout is float32", "q bfloat16", "dout.to("]),
    "dlse transposed": (lambda a: {"dlse": a["lse"].mT}, ["dlse has shape (2, 9, 4)", "like lse, (2, 4, 9)"]),
    "dlse in float64": (lambda a: {"dlse": a["lse"].double()}, ["dlse has shape", "float64", "like lse"]),
    "lse transposed": (lambda a: {"lse": a["lse"].mT}, ["lse has shape (2, 9, 4)", "(2, 4, 9)", "forward returns"]),
    "lse of another dtype": (lambda a: {"lse": a["lse"].double()}, ["lse is float64", "float32", "lse.float()"]),
    "k and v differ": (lambda a: {"v": a["v"][:, 1:]}, ["k has seqlen 13 but v has 12"]),
    "softmax_scale 0": (lambda a: {"softmax_scale": 0.0}, ["softmax_scale is 0.0", "greater than 0"]),
}


@pytest.mark.parametrize("change, words", WRONG.values(), ids=WRONG.keys())
def test_wrong_arguments(change, words):
    names = ("dout", "q", "k", "v", "out", "lse")
    arguments = dict(zip(names, arguments_of(Case(16, "bf16", 9, 13, heads=4, kv_heads=2)), strict=True))
    for call in (flash_attn_ext.backward, backward_operator):
        with pytest.raises(ValueError) as caught:
            call(**(arguments | change(arguments)))
        assert [word for word in words if word not in str(caught.value)] == [], str(caught.value)
    with pytest.raises(TypeError, match="lse must be a torch.Tensor, not NoneType"):
        flash_attn_ext.backward(**(arguments | {"lse": None}))
    with pytest.raises(TypeError, match=r"deterministic must be True or False, not int \(1\)"):
        flash_attn_ext.backward(**arguments, deterministic=1)
