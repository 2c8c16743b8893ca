"""flash_attn_ext.adapters: signatures as theirs, results as ours, and refusals in our words."""

import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from gpu import normal, on_hopper
from oracle import same_bits

import flash_attn_ext
from flash_attn_ext import keywords
from flash_attn_ext.adapters import flash_attn_interface as theirs

# Of hopper/flash_attn_interface.py, and s_aux
SIGNATURES = {
    "flash_attn_func": "(q, k, v, softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, "
    "v_descale=None, window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, "
    "deterministic=False, sm_margin=0, return_attn_probs=False, *, s_aux=None)",
    "flash_attn_varlen_func": "(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None, "
    "seqused_k=None, softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None, "
    "window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False, "
    "sm_margin=0, return_attn_probs=False, *, s_aux=None)",
    "flash_attn_qkvpacked_func": "(qkv, softmax_scale=None, causal=False, q_descale=None, k_descale=None, "
    "v_descale=None, window_size=(-1, -1), attention_chunk=0, softcap=0.0, deterministic=False, num_heads_q=None, "
    "sm_margin=0, return_attn_probs=False, *, s_aux=None)",
    "flash_attn_with_kvcache": "(q, k_cache, v_cache, k=None, v=None, qv=None, rotary_cos=None, rotary_sin=None, "
    "cache_seqlens=None, cache_batch_idx=None, cache_leftpad=None, page_table=None, cu_seqlens_q=None, "
    "cu_seqlens_k_new=None, max_seqlen_q=None, rotary_seqlens=None, q_descale=None, k_descale=None, v_descale=None, "
    "softmax_scale=None, causal=False, window_size=(-1, -1), attention_chunk=0, softcap=0.0, rotary_interleaved=True, "
    "scheduler_metadata=None, num_splits=0, pack_gqa=None, sm_margin=0, return_softmax_lse=False)",
    "flash_attn_combine": "(out_partial, lse_partial, out=None, out_dtype=None)",
    "get_scheduler_metadata": "(batch_size, max_seqlen_q, max_seqlen_k, num_heads_q, num_heads_kv, headdim, "
    "cache_seqlens, qkv_dtype=torch.bfloat16, headdim_v=None, cu_seqlens_q=None, cu_seqlens_k_new=None, "
    "cache_leftpad=None, page_size=None, max_seqlen_k_new=0, causal=False, window_size=(-1, -1), attention_chunk=0, "
    "has_softcap=False, num_splits=0, pack_gqa=None, sm_margin=0)",
    "_flash_attn_forward": "(q, k, v, k_new=None, v_new=None, qv=None, out_=None, cu_seqlens_q=None, "
    "cu_seqlens_k=None, cu_seqlens_k_new=None, seqused_q=None, seqused_k=None, max_seqlen_q=None, max_seqlen_k=None, "
    "page_table=None, kv_batch_idx=None, leftpad_k=None, rotary_cos=None, rotary_sin=None, seqlens_rotary=None, "
    "q_descale=None, k_descale=None, v_descale=None, softmax_scale=None, causal=False, window_size_left=-1, "
    "window_size_right=-1, attention_chunk=0, softcap=0.0, rotary_interleaved=True, scheduler_metadata=None, "
    "num_splits=1, pack_gqa=None, sm_margin=0)",
    "_flash_attn_backward": "(dout, q, k, v, out, softmax_lse, cu_seqlens_q=None, cu_seqlens_k=None, sequed_q=None, "
    "sequed_k=None, max_seqlen_q=None, max_seqlen_k=None, dq=None, dk=None, dv=None, softmax_scale=None, "
    "is_causal=False, window_size_left=-1, window_size_right=-1, softcap=0.0, deterministic=False, sm_margin=0)",
}
OPTIONS = {  # of every function: what asks for something, and what asks for nothing here
    "none": {},
    "causal": {"causal": True},
    "scale": {"softmax_scale": 0.3},
    "window": {"window_size": (3, 1)},
    "causal window": {"causal": True, "window_size": (3, 0)},
    "softcap": {"softcap": 2.0},
    "deterministic": {"deterministic": True},
    "all": {"causal": True, "softmax_scale": 0.3, "window_size": (4, 0), "softcap": 2.0, "deterministic": True},
}
NEUTRAL = {
    "flash_attn_func": [{"num_splits": 0}, {"pack_gqa": True}, {"sm_margin": 8}, {"attention_chunk": 0}],
    "flash_attn_varlen_func": [{"num_splits": 0}, {"pack_gqa": False}, {"sm_margin": 8}, {"attention_chunk": 0}],
    "flash_attn_qkvpacked_func": [{"sm_margin": 8}, {"attention_chunk": 0}],
}
ASKS = {  # for what is not here: the value, as the text shows it
    "qv": (torch.ones(2), "Tensor"),
    "q_descale": (torch.ones(2), "Tensor"),
    "k_descale": (torch.ones(2), "Tensor"),
    "v_descale": (torch.ones(2), "Tensor"),
    "attention_chunk": (1024, "1024"),
    "num_splits": (4, "4"),
    "pack_gqa": ("yes", "'yes'"),
    "sm_margin": (0.5, "0.5"),
    "return_attn_probs": ("yes", "'yes'"),
}
FUNCTIONS = list(NEUTRAL)

each = pytest.mark.parametrize
each_function = each("name", FUNCTIONS)
each_option = each("options", OPTIONS.values(), ids=OPTIONS.keys())


def arguments_of(name, kv_heads=2, dtype=torch.float32, grad=False):
    """The positional arguments of a call, without options."""
    rows, keys = (11, 13) if name == "flash_attn_func" else (16, 16)
    if name == "flash_attn_qkvpacked_func":
        return [torch.randn(2, rows, 3, 4, 16, dtype=dtype).requires_grad_(grad)]
    shape_q, shape_k = (rows, 4, 16), (keys, kv_heads, 16)
    if name == "flash_attn_func":
        shape_q, shape_k = (2, *shape_q), (2, *shape_k)
    tensors = [torch.randn(shape, dtype=dtype).requires_grad_(grad) for shape in (shape_q, shape_k, shape_k)]
    lengths = [torch.tensor([0, 5, 5, 14], dtype=torch.int32)] * 2 + [9, 9]
    return tensors if name == "flash_attn_func" else tensors + lengths


def results_and_gradients(function, arguments, **options):
    """out, lse, and the gradients of a loss that uses both."""
    out, lse = function(*arguments, **options)
    inputs = [x for x in arguments if isinstance(x, torch.Tensor) and x.requires_grad]
    loss = (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum() + lse.masked_fill(lse.isinf(), 0).sum()
    return out, lse, *torch.autograd.grad(loss, inputs)


def assert_as_ours(name, arguments, options, **ours_alone):
    results = results_and_gradients(getattr(theirs, name), arguments, return_attn_probs=True, **options)
    ours = results_and_gradients(getattr(flash_attn_ext, name), arguments, return_lse=True, **options | ours_alone)
    assert len(results) > 2 and all(x.abs().max() > 0 for x in ours)
    for x, of_ours in zip(results, ours, strict=True):
        assert same_bits(x, of_ours)


@each("name", SIGNATURES)
def test_signatures(name):
    assert str(inspect.signature(getattr(theirs, name))) == SIGNATURES[name]


@each_option
@each("kv_heads", [4, 2, 1])
def test_dense(options, kv_heads):
    assert_as_ours("flash_attn_func", arguments_of("flash_attn_func", kv_heads, grad=True), options)


@each_option
@each("kv_heads", [4, 2])
def test_packed_sequences(options, kv_heads):
    assert_as_ours("flash_attn_varlen_func", arguments_of("flash_attn_varlen_func", kv_heads, grad=True), options)


def test_used_lengths():
    used = {
        f"seqused_{side}": torch.tensor(lengths, dtype=torch.int32)
        for side, lengths in (("q", [2, 0, 7]), ("k", [5, 0, 8]))
    }
    assert_as_ours("flash_attn_varlen_func", arguments_of("flash_attn_varlen_func", grad=True), used)


@each_option
def test_qkv_in_a_dimension_of_its_own(options):
    qkv = arguments_of("flash_attn_qkvpacked_func", grad=True)
    assert_as_ours("flash_attn_qkvpacked_func", qkv, options)


@each_option
def test_qkv_of_grouped_heads(options):
    qkv = [torch.randn(2, 11, 4 + 2 * 2, 16, requires_grad=True)]
    assert_as_ours("flash_attn_qkvpacked_func", qkv, options | {"num_heads_q": 4})


def test_qkv_is_of_self_attention():
    """What a packed call computes, by a call that is not packed."""
    (qkv,) = arguments_of("flash_attn_qkvpacked_func")
    out = theirs.flash_attn_qkvpacked_func(qkv, None, True)
    assert same_bits(out, theirs.flash_attn_func(*qkv.unbind(2), None, True))


@each_function
def test_by_position(name):
    """Every argument in FlashAttention-3's place, each with a value of its own where there is one."""
    values = {
        **{"softmax_scale": 0.3, "causal": True, "window_size": (4, 2), "softcap": 2.0, "deterministic": True},
        **{"num_splits": 0, "pack_gqa": True, "sm_margin": 3, "return_attn_probs": True},
    }
    arguments = arguments_of(name)
    rest = list(inspect.signature(getattr(theirs, name)).parameters.values())[len(arguments) : -1]  # without s_aux
    out, lse = getattr(theirs, name)(*arguments, *(values.get(x.name, x.default) for x in rest))
    options = {key: values[key] for key in ("softmax_scale", "causal", "window_size", "softcap", "deterministic")}
    expected = getattr(flash_attn_ext, name)(*arguments, **options, return_lse=True)
    assert same_bits(out, expected[0]) and same_bits(lse, expected[1])


@each_function
def test_one_result_unless_more_are_asked_for(name):
    out = getattr(theirs, name)(*arguments_of(name))
    assert isinstance(out, torch.Tensor) and out.shape[-2:] == (4, 16)


@each("name, arguments", [(name, x) for name, neutral in NEUTRAL.items() for x in neutral], ids=str)
def test_what_asks_for_nothing_passes(name, arguments):
    call = arguments_of(name)
    assert same_bits(getattr(theirs, name)(*call, **arguments), getattr(flash_attn_ext, name)(*call))


def test_too_many_arguments():
    (*_, last) = inspect.signature(theirs.flash_attn_func).parameters
    assert last == "s_aux"
    with pytest.raises(TypeError, match="flash_attn_func takes 17 arguments by position; 18 are given"):
        theirs.flash_attn_func(*[None] * 18)


@each_function
def test_sinks(name):
    """With their gradient, under the name that transformers looks for in a function's signature."""
    sinks = torch.randn(4, requires_grad=True)
    arguments = arguments_of(name, grad=True)
    inputs = [x for x in arguments if isinstance(x, torch.Tensor) and x.requires_grad] + [sinks]
    results, ours = (
        (out, *torch.autograd.grad(out.square().sum(), inputs))
        for out in (
            getattr(theirs, name)(*arguments, causal=True, s_aux=sinks),
            getattr(flash_attn_ext, name)(*arguments, causal=True, sinks=sinks),
        )
    )
    assert ours[-1].abs().max() > 0
    for x, of_ours in zip(results, ours, strict=True):
        assert same_bits(x, of_ours)


@each("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_dtypes(dtype):
    arguments = arguments_of("flash_attn_func", dtype=dtype)
    assert same_bits(theirs.flash_attn_func(*arguments), flash_attn_ext.flash_attn_func(*arguments))


@each_function
def test_under_compile(name):
    compiled = torch.compile(getattr(theirs, name), backend="eager", fullgraph=True)
    arguments = arguments_of(name)
    assert same_bits(compiled(*arguments, causal=True), getattr(theirs, name)(*arguments, causal=True))


# The pair -------------------------------------------------------------------------------------------------------------

PAIR_OPTIONS = {  # in the names of _flash_attn_forward, and in ours
    "none": ({}, {}),
    "causal": ({"causal": True}, {"causal": True}),
    "window": ({"window_size_left": 3, "window_size_right": 1}, {"window_size": (3, 1)}),
    "all": (
        {"softmax_scale": 0.3, "causal": True, "window_size_left": 4, "softcap": 2.0},
        {"softmax_scale": 0.3, "causal": True, "window_size": (4, -1), "softcap": 2.0},
    ),
}
LENGTHS = ("cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k")
each_pair_option = each("theirs_by_name, ours_by_name", PAIR_OPTIONS.values(), ids=PAIR_OPTIONS.keys())


def pair_inputs(lengths):
    """q, k, v and what they have of LENGTHS, as both sides take them."""
    q, k, v, *_ = arguments_of("flash_attn_varlen_func" if "cu_seqlens_q" in lengths else "flash_attn_func")
    values = ([0, 5, 5, 14], [0, 6, 6, 15], [2, 0, 7], [5, 0, 8])
    of_sequences = {x: torch.tensor(y, dtype=torch.int32) for x, y in zip(LENGTHS, values, strict=True)}
    return (q, k, v), {name: of_sequences[name] for name in lengths}


def their_backward(dout, q, k, v, out, lse, lengths, gradients, by_name):
    """As TransformerEngine and diffusers call it: lengths and gradients by position, in their places."""
    places = [lengths.get(name) for name in LENGTHS]
    by_name = {"is_causal" if name == "causal" else name: value for name, value in by_name.items()}
    return theirs._flash_attn_backward(dout, q, k, v, out, lse, *places, 9, 9, *gradients, **by_name)


each_lengths = each("lengths", [(), LENGTHS[:2], LENGTHS], ids=["dense", "packed", "used"])


@each_pair_option
@each_lengths
def test_the_pair(lengths, theirs_by_name, ours_by_name):
    """Bit for bit ours, into gradients of other strides than ours."""
    (q, k, v), lengths = pair_inputs(lengths)
    results = theirs._flash_attn_forward(q, k, v, **lengths, **theirs_by_name)
    out, lse = flash_attn_ext.forward(q, k, v, **lengths, **ours_by_name)
    assert same_bits(results[0], out) and same_bits(results[1], lse)
    assert [x.numel() for x in results[2:]] == [0, 0]

    dout = torch.randn_like(out)
    ours = flash_attn_ext.backward(dout, q, k, v, out, lse, **lengths, **ours_by_name)
    gradients = [torch.full_like(x, torch.nan).transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k, v)]
    returned = their_backward(dout, q, k, v, out, lse, lengths, gradients, theirs_by_name)
    assert isinstance(returned, torch.Tensor) and returned.numel() == 0
    for x, of_ours in zip(gradients, ours, strict=True):
        assert x.stride() != of_ours.stride() and of_ours.abs().max() > 0 and same_bits(x, of_ours)


def test_the_pair_by_position():
    """All arguments in FlashAttention-3's places, as diffusers passes them, and what asks for nothing."""
    (q, k, v), _ = pair_inputs(())
    out, lse, *_ = theirs._flash_attn_forward(q, k, v, *[None] * 20, 0.3, True, 4, 2, 0, 2.0, False, None, 0, True, 3)
    options = {"softmax_scale": 0.3, "causal": True, "window_size": (4, 2), "softcap": 2.0}
    expected = flash_attn_ext.forward(q, k, v, **options)
    assert same_bits(out, expected[0]) and same_bits(lse, expected[1])
    gradients = [torch.empty_like(x) for x in (q, k, v)]
    dout = torch.randn_like(out)
    theirs._flash_attn_backward(dout, q, k, v, out, lse, *[None] * 6, *gradients, 0.3, True, 4, 2, 2.0, True, 3)
    for x, of_ours in zip(gradients, flash_attn_ext.backward(dout, q, k, v, out, lse, **options), strict=True):
        assert same_bits(x, of_ours)


def test_the_pair_merges_parts_of_the_keys():
    """A step of ring attention: each part's backward with the out and lse of all keys."""
    q, k, v = (torch.randn(2, 12, 4, 16, dtype=torch.float64) for _ in range(3))
    out, lse, *_ = theirs._flash_attn_forward(q, k, v)
    dout, dq_sum = torch.randn_like(out), torch.zeros_like(q)
    for part in (slice(5), slice(5, 12)):
        gradients = [torch.empty_like(x) for x in (q, k[:, part], v[:, part])]
        theirs._flash_attn_backward(
            dout, q, k[:, part], v[:, part], out, lse, dq=gradients[0], dk=gradients[1], dv=gradients[2]
        )
        dq_sum += gradients[0]
    expected = flash_attn_ext.backward(dout, q, k, v, out, lse)
    torch.testing.assert_close(dq_sum, expected[0])
    torch.testing.assert_close(gradients[1], expected[1][:, 5:])


def test_the_pair_under_autograd_and_compile():
    (q, k, v), _ = pair_inputs(())
    leaf = q.clone().requires_grad_()
    compiled = torch.compile(theirs._flash_attn_forward, backend="eager", fullgraph=True)
    for function in (theirs._flash_attn_forward, compiled):
        out, lse, *_ = function(leaf, k, v, causal=True)
        (dq,) = torch.autograd.grad(out.sum(), leaf)
        expected = flash_attn_ext.backward(torch.ones_like(out), q, k, v, out.detach(), lse.detach(), causal=True)
        assert same_bits(dq, expected[0])


def test_gradients_that_are_not_asked_for():
    (q, k, v), _ = pair_inputs(())
    out, lse, *_ = theirs._flash_attn_forward(q, k, v)
    dk = torch.empty_like(k)
    theirs._flash_attn_backward(torch.ones_like(out), q, k, v, out, lse, dk=dk)
    assert same_bits(dk, flash_attn_ext.backward(torch.ones_like(out), q, k, v, out, lse)[1])


@each("name, of", [("dq", "q"), ("dk", "k"), ("dv", "v")])
def test_gradients_that_do_not_fit(name, of):
    inputs, _ = pair_inputs(())
    out, lse, *_ = theirs._flash_attn_forward(*inputs)
    x = dict(zip("qkv", inputs, strict=True))[of]
    for wrong in (x.new_empty(1, *x.shape), x.to(torch.float64), x.to("meta")):
        with pytest.raises(ValueError, match=rf"{name} is \(.*; it must be as {of}, \(2, .* torch.float32 on cpu, or"):
            theirs._flash_attn_backward(out, *inputs, out, lse, **{name: wrong})


PAIR_ASKS = {
    **dict.fromkeys(keywords.CACHE_ARGUMENTS, torch.ones(2)),
    **{name: ASKS[name][0] for name in ("qv", "q_descale", "k_descale", "v_descale", "attention_chunk", "num_splits")},
    **{"out_": torch.ones(2), "rotary_interleaved": "yes", "pack_gqa": "yes", "sm_margin": 0.5},
}


@each("name", PAIR_ASKS)
def test_what_the_pair_refuses(name):
    with pytest.raises(ValueError, match=rf"^{name} is .*; only .* is accepted\. {keywords.KEYWORDS[name].way_out}$"):
        theirs._flash_attn_forward(*pair_inputs(())[0], **{name: PAIR_ASKS[name]})


def test_every_argument_of_the_pair_is_ours_or_may_be_refused():
    """None is taken and forgotten, but the longest lengths: ours does not need them."""
    parameters = set(inspect.signature(theirs._flash_attn_forward).parameters)
    ours = {"q", "k", "v", *LENGTHS, "softmax_scale", "causal", "window_size_left", "window_size_right", "softcap"}
    assert parameters - ours - {"max_seqlen_q", "max_seqlen_k"} == set(PAIR_ASKS)


# Refused --------------------------------------------------------------------------------------------------------------


def refusals_of(name):
    known = inspect.signature(getattr(theirs, name)).parameters
    return [argument for argument in ASKS if argument in known]


@each("name, argument", [(name, argument) for name in FUNCTIONS for argument in refusals_of(name)])
def test_what_is_not_here_is_refused_by_name(name, argument):
    value, shown = ASKS[argument]
    keyword = keywords.KEYWORDS[argument]
    with pytest.raises(ValueError) as refusal:
        getattr(theirs, name)(*arguments_of(name), **{argument: value})
    text = str(refusal.value)
    assert text == f"{argument} is {shown}; only {keyword.accepted()} is accepted. {keyword.way_out}"


@each_function
def test_every_argument_of_theirs_is_ours_or_may_be_refused(name):
    """None is taken and forgotten."""
    ours = {
        "window_size",
        "softcap",
        "deterministic",
        "softmax_scale",
        "causal",
        "num_heads_q",
        "seqused_q",
        "seqused_k",
    }
    parameters = inspect.signature(getattr(theirs, name)).parameters.values()
    optional = {x.name for x in parameters if x.kind is x.POSITIONAL_OR_KEYWORD and x.default is not x.empty}
    assert optional - ours == set(refusals_of(name))


@each_function
def test_options_are_refused_in_our_words(name):
    """deterministic reaches our function too: on the CPU no result shows it."""
    for option in ({"deterministic": "yes"}, {"softcap": -1.0}, {"window_size": 128}, {"softmax_scale": 0.0}):
        with pytest.raises((TypeError, ValueError)) as refusal:
            getattr(theirs, name)(*arguments_of(name), **option)
        with pytest.raises(type(refusal.value)) as ours:
            getattr(flash_attn_ext, name)(*arguments_of(name), **option)
        assert str(refusal.value) == str(ours.value) and str(ours.value).startswith(*option)


def test_qkv_of_another_shape():
    with pytest.raises(ValueError, match=r"qkv has shape \(2, 5, 8, 16\); it must be .* or with num_heads_q"):
        theirs.flash_attn_qkvpacked_func(torch.ones(2, 5, 8, 16))


@each(
    "name, arguments, words",
    [
        ("flash_attn_with_kvcache", (1, 2, 3), ["KV cache", "pages", "FlashAttention-3", "flash_attn_varlen_func("]),
        ("flash_attn_combine", (1, 2), ["splits the keys", "FlashAttention-3", "torch.logsumexp"]),
        ("get_scheduler_metadata", range(7), ["scheduler_metadata", "leave it out", "FlashAttention-3"]),
    ],
)
def test_functions_that_are_not_here(name, arguments, words):
    with pytest.raises(NotImplementedError) as refusal:
        getattr(theirs, name)(*arguments)
    text = str(refusal.value)
    assert text.startswith(f"{name} is not there: ") and "Ways out: " in text
    assert [word for word in words if word not in text] == [], text


def way_out_of(name, arguments, begin, end):
    """An expression from the text of a refusal."""
    with pytest.raises(NotImplementedError) as refusal:
        getattr(theirs, name)(*arguments)
    text = str(refusal.value)
    return text[text.index(begin) : text.index(end) + len(end)]


def test_the_way_out_of_a_kv_cache():
    q, k_cache, v_cache = torch.randn(2, 3, 4, 16), torch.randn(2, 32, 2, 16), torch.randn(2, 32, 2, 16)
    scope = {"q": q, "k_cache": k_cache, "v_cache": v_cache, "cache_seqlens": torch.tensor([7, 30], dtype=torch.int32)}
    call = way_out_of("flash_attn_with_kvcache", (q, k_cache, v_cache), "flash_attn_varlen_func(", "causal=True)")
    out = eval(call, {"flash_attn_varlen_func": theirs.flash_attn_varlen_func}, scope)
    for i, length in enumerate((7, 30)):
        of_cache = (x[i : i + 1, :length] for x in (k_cache, v_cache))
        assert same_bits(out[i : i + 1], theirs.flash_attn_func(q[i : i + 1], *of_cache, causal=True))


def test_the_way_out_of_combining():
    q, k, v = (torch.randn(2, 12, 4, 16, dtype=torch.float64) for _ in range(3))
    parts = [theirs.flash_attn_func(q, k[:, x], v[:, x], return_attn_probs=True) for x in (slice(5), slice(5, 12))]
    scope = {
        "out_partial": torch.stack([out for out, _ in parts]),
        "lse_partial": torch.stack([lse.transpose(1, 2) for _, lse in parts]),  # (splits, batch, seqlen, heads)
    }
    lse = eval(way_out_of("flash_attn_combine", (1, 2), "torch.logsumexp(", ", 0)"), {"torch": torch}, scope)
    out = eval(way_out_of("flash_attn_combine", (1, 2), "(torch.softmax(", ".sum(0)"), {"torch": torch}, scope)
    expected_out, expected_lse = theirs.flash_attn_func(q, k, v, return_attn_probs=True)
    rounding = (
        8 * torch.finfo(lse.dtype).eps * expected_lse.abs().max().item()
    )  # lse is float32, and so are the weights
    torch.testing.assert_close(lse.transpose(1, 2), expected_lse, rtol=0, atol=rounding)
    torch.testing.assert_close(out, expected_out, rtol=0, atol=2 * rounding * v.abs().max().item())


# Imports --------------------------------------------------------------------------------------------------------------


def test_importing_the_package_does_not_import_them():
    look = "import sys, flash_attn_ext; print([name for name in sys.modules if name.startswith('flash_attn')])"
    environment = os.environ | {"PYTHONPATH": str(Path(flash_attn_ext.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", look], env=environment, capture_output=True, text=True, check=True)
    assert "'flash_attn_ext.interface'" in done.stdout
    assert "adapters" not in done.stdout and "flash_attn_interface" not in done.stdout


def test_both_ways_to_import():
    import flash_attn_ext.adapters.flash_attn_interface as by_path

    assert by_path is theirs and "flash_attn_interface" not in sys.modules


# On a GPU -------------------------------------------------------------------------------------------------------------


@on_hopper
@each("options", [{}, {"causal": True, "window_size": (100, 0), "softcap": 30.0}], ids=["none", "all"])
def test_on_a_gpu(options):
    q, k, v = normal(2, 333, 8, 128), normal(2, 401, 2, 128), normal(2, 401, 2, 128)
    arguments = [x.requires_grad_() for x in (q, k, v)]
    results, ours = [], []
    for function, lse, into in (
        (theirs.flash_attn_func, "return_attn_probs", results),
        (flash_attn_ext.flash_attn_func, "return_lse", ours),
    ):
        out, of_lse = function(*arguments, **options, deterministic=True, **{lse: True})
        into += [out, of_lse, *torch.autograd.grad(out.float().square().sum(), arguments)]
    for x, of_ours in zip(results, ours, strict=True):
        assert same_bits(x, of_ours)


@on_hopper
@each("packed", [False, True], ids=["dense", "packed"])
@each_pair_option
def test_the_pair_on_a_gpu(packed, theirs_by_name, ours_by_name):
    q, k, v = normal(2, 333, 8, 128), normal(2, 401, 2, 128), normal(2, 401, 2, 128)
    lengths = {}
    if packed:
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))
        ends = {"cu_seqlens_q": [0, 100, 100, 666], "cu_seqlens_k": [0, 200, 300, 802]}
        lengths = {name: torch.tensor(value, dtype=torch.int32, device="cuda") for name, value in ends.items()}
    out, lse = flash_attn_ext.forward(q, k, v, **lengths, **ours_by_name)
    results = theirs._flash_attn_forward(q, k, v, **lengths, **theirs_by_name)
    assert same_bits(results[0], out) and same_bits(results[1], lse)
    dout = torch.randn_like(out)
    ours = flash_attn_ext.backward(dout, q, k, v, out, lse, **lengths, **ours_by_name, deterministic=True)
    gradients = [torch.full_like(x, torch.nan) for x in (q, k, v)]
    their_backward(dout, q, k, v, out, lse, lengths, gradients, theirs_by_name | {"deterministic": True})
    for x, of_ours in zip(gradients, ours, strict=True):
        assert same_bits(x, of_ours)
