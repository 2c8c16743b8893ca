"""The CPU path: attention_reference against torch's own attention, and flash_attn_func on CPU tensors."""

import inspect
import itertools
import math

import pytest
import torch
from cases import CPU_OPTIONS, DTYPES, LAYOUTS, Case, both_masks
from oracle import check, check_gradients, same_bits
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import flash_attn_ext
from flash_attn_ext import attention_reference, cpu, flash_attn_func, reference
from flash_attn_ext.options import LENGTHS, Options

shapes = pytest.mark.parametrize(
    "seqlen_q, seqlen_k, heads, kv_heads, head_dim",
    [(1, 1, 1, 1, 1), (17, 17, 4, 4, 64), (23, 41, 6, 2, 40), (41, 23, 6, 2, 16), (1, 37, 5, 1, 128), (30, 1, 4, 2, 8)],
)


def normal(*shape, dtype=torch.float64):
    return torch.randn(shape, dtype=torch.float64).to(dtype)


def visible(seqlen_q, seqlen_k, causal):
    """(seqlen_q, seqlen_k): what the query sees. Row by row, from the definition."""
    last = [i + seqlen_k - seqlen_q if causal else seqlen_k - 1 for i in range(seqlen_q)]
    return torch.tensor([[j <= last[i] for j in range(seqlen_k)] for i in range(seqlen_q)])


def torchs_attention(q, k, v, softmax_scale, causal):
    """torch's own, with the bottom-right mask spelled out, and 0 for the rows that see nothing."""
    seen = visible(q.shape[1], k.shape[1], causal)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=seen | ~seen.any(-1, keepdim=True), scale=softmax_scale, enable_gqa=True
        )
    return out.masked_fill(~seen.any(-1, keepdim=True), 0).transpose(1, 2)


@shapes
@both_masks
@pytest.mark.parametrize("softmax_scale", [None, 0.3])
def test_out_and_gradients_are_torchs(seqlen_q, seqlen_k, heads, kv_heads, head_dim, causal, softmax_scale):
    inputs = [normal(2, s, h, head_dim) for s, h in ((seqlen_q, heads), (seqlen_k, kv_heads), (seqlen_k, kv_heads))]
    dout = normal(*inputs[0].shape)
    results = []
    for function in (torchs_attention, lambda *args: attention_reference(*args)[0], flash_attn_func):
        leaves = [x.clone().requires_grad_() for x in inputs]
        out = function(*leaves, softmax_scale, causal)
        results.append((out, *torch.autograd.grad(out, leaves, dout)))
    for ours in results[1:]:
        torch.testing.assert_close(ours, results[0])


@shapes
@both_masks
def test_lse_is_the_logarithm_of_the_sum(seqlen_q, seqlen_k, heads, kv_heads, head_dim, causal):
    q = normal(2, seqlen_q, heads, head_dim)
    k, v = normal(2, seqlen_k, kv_heads, head_dim), normal(2, seqlen_k, kv_heads, head_dim)
    _, lse = attention_reference(q, k, v, 0.3, causal)
    seen = visible(seqlen_q, seqlen_k, causal)
    for b in range(2):
        for h in range(heads):
            scores = 0.3 * q[b, :, h] @ k[b, :, h // (heads // kv_heads)].T
            torch.testing.assert_close(lse[b, h], (scores.exp() * seen).sum(-1).log())


@both_masks
def test_gradcheck(causal):
    q, k, v = (normal(1, s, h, 3).requires_grad_() for s, h in ((5, 2), (4, 1), (4, 1)))
    assert torch.autograd.gradcheck(lambda *x: attention_reference(*x, 0.7, causal)[0], (q, k, v))
    assert torch.autograd.gradcheck(lambda *x: flash_attn_func(*x, 0.7, causal), (q, k, v))


@pytest.mark.parametrize("window_size", [(-1, -1), (2, 0), (0, -1)])
@pytest.mark.parametrize("softcap", [0.0, 0.8])
@pytest.mark.parametrize("result", [0, 1], ids=["out", "lse"])
def test_gradcheck_of_the_reference_with_options(window_size, softcap, result):
    q, k, v = (normal(1, s, h, 3).requires_grad_() for s, h in ((4, 2), (5, 1), (5, 1)))

    def attend(q, k, v, sinks):
        options = {"window_size": window_size, "softcap": softcap, "sinks": sinks}
        return attention_reference(q, k, v, 0.7, **options)[result]

    assert torch.autograd.gradcheck(attend, (q, k, v, normal(2).requires_grad_()))


# Options --------------------------------------------------------------------------------------------------------------


def test_every_mask_is_its_definition():
    sides = (-1, 0, 1, 2, 5, 9)
    for rows, keys, left, right, causal in itertools.product((1, 3, 6), (1, 4, 7), sides, sides, (False, True)):
        options = Options.of(causal=causal, window_size=(left, right))
        seen = reference.visible(rows, keys, options)
        to_the_right = 0 if causal else right
        for i, j in itertools.product(range(rows), range(keys)):
            place = i + keys - rows
            expected = (left == -1 or j >= place - left) and (to_the_right == -1 or j <= place + to_the_right)
            assert (seen is None or bool(seen[i, j])) == expected, (rows, keys, left, right, causal, i, j)


def attention_by_its_definition(q, k, v, softmax_scale, causal, window_size, softcap, sinks):
    """out and lse of one batch in float64, head by head and row by row."""
    out, lse = torch.zeros_like(q), q.new_full((q.shape[0], q.shape[2], q.shape[1]), -math.inf)
    seen = reference.visible(q.shape[1], k.shape[1], Options.of(causal=causal, window_size=window_size))
    for b, i, h in itertools.product(*map(range, q.shape[:3])):
        kv_head = h // (q.shape[2] // k.shape[2])
        scores = softmax_scale * k[b, :, kv_head] @ q[b, i, h]
        scores = softcap * (scores / softcap).tanh() if softcap else scores
        weights = scores.exp() if seen is None else scores.exp() * seen[i]
        total = weights.sum() + (0 if sinks is None else sinks[h].exp())
        if total > 0:
            out[b, i, h], lse[b, h, i] = weights @ v[b, :, kv_head] / total, total.log()
    return out, lse


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("window_size", [(-1, -1), (2, 1), (0, -1), (-1, 3), (100, 100)], ids=str)
@pytest.mark.parametrize("softcap", [0.0, 1.5])
@pytest.mark.parametrize("with_sinks", [False, True], ids=["no sinks", "sinks"])
@pytest.mark.parametrize("seqlen_q, seqlen_k", [(7, 7), (5, 9), (9, 5)])
def test_options_are_their_definitions(monkeypatch, seqlen_q, seqlen_k, causal, window_size, softcap, with_sinks):
    """Results of the reference and of the CPU path, whose lse is float32, and the gradients of everything."""
    monkeypatch.setattr(cpu, "SCORES", 64)  # several blocks of rows
    q, k, v = (normal(2, s, h, 8).requires_grad_() for s, h in ((seqlen_q, 4), (seqlen_k, 2), (seqlen_k, 2)))
    sinks = normal(4).requires_grad_() if with_sinks else None
    options = (0.4, causal), {"window_size": window_size, "softcap": softcap, "sinks": sinks}
    results = attention_by_its_definition(q, k, v, *options[0], **options[1])
    torch.testing.assert_close(attention_reference(q, k, v, *options[0], **options[1]), results)
    ours = flash_attn_func(q, k, v, *options[0], **options[1], return_lse=True)
    torch.testing.assert_close(ours, (results[0], results[1].float()))

    finite = results[1] > -math.inf
    weights = [normal(*x.shape) for x in results]
    inputs = (q, k, v, sinks) if with_sinks else (q, k, v)

    def gradients(out, lse):
        loss = (out * weights[0]).sum() + (lse[finite] * weights[1][finite]).sum()
        return torch.autograd.grad(loss, inputs, materialize_grads=True)

    torch.testing.assert_close(gradients(*ours), gradients(*results), rtol=1e-5, atol=1e-6)


def test_rows_that_see_nothing_have_the_sink_as_lse():
    q, k, v = (normal(1, s, 2, 8).requires_grad_() for s in (9, 4, 4))
    sinks = normal(2).requires_grad_()
    out, lse = flash_attn_func(q, k, v, causal=True, sinks=sinks, return_lse=True)
    assert (out[:, :5] == 0).all() and torch.equal(lse[0, :, :5], sinks.float()[:, None].expand(2, 5))
    dq, dk, dv, dsinks = torch.autograd.grad(lse[:, :, :5].sum(), (q, k, v, sinks))
    assert all((x == 0).all() for x in (dq, dk, dv)) and torch.equal(dsinks, torch.full_like(sinks, 5))
    out, lse = flash_attn_func(q, k[:, :0], v[:, :0], sinks=sinks, return_lse=True)
    assert (out == 0).all() and torch.equal(lse[0], sinks.float()[:, None].expand(2, 9))


def test_a_sink_of_minus_infinity_is_none():
    q, k, v = (normal(1, 9, 2, 8).requires_grad_() for _ in range(3))
    sinks = torch.full((2,), -math.inf).requires_grad_()
    with_it, without = (flash_attn_func(q, k, v, causal=True, sinks=x, return_lse=True) for x in (sinks, None))
    torch.testing.assert_close(with_it, without)
    assert (torch.autograd.grad(with_it[0].sum() + with_it[1].sum(), sinks)[0] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_sinks_are_of_any_dtype(dtype):
    q, k, v = Case(16, "bf16", 9, 9, heads=4, kv_heads=2).inputs("cpu")
    sinks = torch.tensor([0.5, -1, 2, 0], dtype=dtype, requires_grad=True)
    out, lse = flash_attn_func(q, k, v, sinks=sinks, return_lse=True)
    (gradient,) = torch.autograd.grad(out.float().sum() + lse.sum(), sinks)
    assert out.dtype == q.dtype and gradient.dtype == dtype
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert same_bits(flash_attn_func(q.float(), k.float(), v.float(), sinks=sinks), out)


@pytest.mark.parametrize("case", CPU_OPTIONS, ids=str)
def test_options_of_cpu_tensors_meet_the_rule_of_the_gpu(case):
    inputs, options = case.inputs("cpu"), case.options()
    out, lse = flash_attn_func(*inputs, **options, return_lse=True)
    check(out, lse, *inputs, **options)
    dout, dlse = torch.randn_like(out), torch.randn_like(lse) if case.dlse else None
    gradients = flash_attn_ext.backward(dout, *inputs, out, lse, **options, dlse=dlse)
    check_gradients(gradients, dout, *inputs, out, lse, **options, dlse=dlse)


def test_rows_that_see_nothing_have_no_nan_and_no_gradient():
    q, k, v = (normal(1, s, 2, 8).requires_grad_() for s in (9, 4, 4))
    out, lse = flash_attn_func(q, k, v, causal=True, return_lse=True)
    assert (out[:, :5] == 0).all() and (lse[:, :, :5] == -math.inf).all() and lse[:, :, 5:].isfinite().all()
    gradients = torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
    assert all(x.isfinite().all() for x in gradients)
    assert (gradients[0][:, :5] == 0).all()
    without = torch.autograd.grad(flash_attn_func(q[:, 5:], k, v, causal=True), (k, v), torch.ones_like(out[:, 5:]))
    torch.testing.assert_close(gradients[1:], without)


@both_masks
@pytest.mark.parametrize("batch, seqlen_q, seqlen_k", [(2, 5, 0), (2, 0, 5), (2, 0, 0), (0, 5, 5)])
def test_empty_inputs(batch, seqlen_q, seqlen_k, causal):
    q, k, v = (torch.randn(batch, s, h, 8).requires_grad_() for s, h in ((seqlen_q, 4), (seqlen_k, 2), (seqlen_k, 2)))
    out, lse = flash_attn_func(q, k, v, causal=causal, return_lse=True)
    assert out.shape == q.shape and (out == 0).all()
    assert lse.shape == (batch, 4, seqlen_q) and lse.dtype == torch.float32 and (lse == -math.inf).all()
    for x, gradient in zip((q, k, v), torch.autograd.grad(out, (q, k, v), torch.ones_like(out)), strict=True):
        assert gradient.shape == x.shape and (gradient == 0).all()


@pytest.mark.parametrize("where", ["q", "k", "v"])
def test_nan_reaches_what_sees_it(where):
    inputs = {name: normal(1, 6, 2, 8) for name in "qkv"}
    clean, clean_lse = attention_reference(*inputs.values(), causal=True)
    inputs[where][0, 3, 1, 2] = math.nan
    out, lse = attention_reference(*inputs.values(), causal=True)
    rows = slice(3, 4) if where == "q" else slice(3, None)
    columns = slice(2, 3) if where == "v" else slice(None)
    assert out[0, rows, 1, columns].isnan().all()
    assert torch.equal(lse, clean_lse) if where == "v" else lse[0, 1, rows].isnan().all()
    assert same_bits(out[:, :, 0], clean[:, :, 0]), "the other head"
    if where != "v":
        assert same_bits(out[:, :3], clean[:, :3]), "rows that do not see it"


def test_infinite_scores():
    q, k, v = (normal(1, 5, 1, 8) for _ in range(3))
    q[..., 0] = 1
    k[:, :2, :, 0] = -math.inf
    out, lse = attention_reference(q, k, v)
    torch.testing.assert_close((out, lse), attention_reference(q, k[:, 2:], v[:, 2:]))
    k[..., 0] = -math.inf
    out, lse = attention_reference(q, k, v)
    assert (out == 0).all() and (lse == -math.inf).all()
    k[:, 4, :, 0] = math.inf
    out, lse = attention_reference(q, k, v)
    assert out.isnan().all() and not lse.isfinite().any()


# flash_attn_func on CPU tensors ---------------------------------------------------------------------------------------

CPU_CASES = [
    Case(head_dim, dtype, seqlen_q, seqlen_k, causal, 2, heads, kv_heads)
    for head_dim in (64, 80)
    for dtype in DTYPES
    for causal in (False, True)
    for seqlen_q, seqlen_k, heads, kv_heads in ((1, 67, 4, 4), (67, 1, 6, 2), (129, 129, 5, 1), (65, 131, 6, 3))
]
CPU_CASES += [Case(128, "bf16", 70, 70, True, 2, 6, 2, layout) for layout in LAYOUTS]


@pytest.mark.parametrize("case", CPU_CASES, ids=str)
def test_cpu_tensors_meet_the_rule_of_the_gpu(case):
    q, k, v = case.inputs("cpu")
    out, lse = flash_attn_func(q, k, v, **case.options(), return_lse=True)
    check(out, lse, q, k, v, **case.options())
    assert out.stride() == torch.empty_like(q).stride() and lse.is_contiguous()


class LargestResult(TorchDispatchMode):
    """Of the operators called: their names, and the most elements that one of them has returned."""

    def __init__(self):
        super().__init__()
        self.called, self.elements = set(), 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **(kwargs or {}))
        self.called.add(function.overloadpacket)
        self.elements = max([self.elements, *(x.numel() for x in tree_leaves(results) if isinstance(x, torch.Tensor))])
        return results


TORCHS = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
TORCHS_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@both_masks
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("seqlen_q, seqlen_k", [(300, 300), (300, 411), (411, 300), (1, 411), (300, 1)])
@pytest.mark.parametrize("window_size, softcap, sinks", [((-1, -1), 0.0, None), ((30, 5), 1.0, normal(6))])
def test_cpu_path_is_the_reference_in_linear_memory(
    monkeypatch, dtype, seqlen_q, seqlen_k, causal, window_size, softcap, sinks
):
    monkeypatch.setattr(cpu, "SCORES", 2**15)
    given = {"causal": causal, "window_size": window_size, "softcap": softcap, "sinks": sinks}
    options = Options.of(0.3, **given)
    dout, q, k, v = (
        normal(2, s, h, 16, dtype=dtype) for s, h in ((seqlen_q, 6), (seqlen_q, 6), (seqlen_k, 2), (seqlen_k, 2))
    )
    with LargestResult() as largest:
        out, lse = cpu.forward(q, k, v, options)
        gradients = cpu.backward(dout, q, k, v, out, lse, options)
    assert largest.elements <= max(cpu.SCORES + cpu.SCORES // seqlen_k, 2 * q.numel(), 2 * k.numel())
    same_mask = sinks is None and (not causal or seqlen_q in (1, seqlen_k))
    assert (largest.called >= {TORCHS, TORCHS_BACKWARD}) == (same_mask and dtype != torch.float64)

    if dtype == torch.float64:
        torch.testing.assert_close((out, lse), reference.forward(q, k, v, options))
        torch.testing.assert_close(gradients, reference.backward(dout, q, k, v, out, lse, options))
    else:
        check(out, lse, q, k, v, 0.3, **given)
        check_gradients(gradients, dout, q, k, v, out, lse, 0.3, **given)


@both_masks
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 3e38], ids=str)
@pytest.mark.parametrize("where", ["q", "k"])
@pytest.mark.parametrize("seqlen", [1, 2, 7, 70, 600])
def test_cpu_path_keeps_the_contract_of_nan_and_infinity(where, value, seqlen, causal):
    """3e38: its scores overflow. Torch's kernel takes a row without a finite score for one that is masked."""
    for place in {0, seqlen // 2, seqlen - 1}:
        for columns in (slice(None), slice(1)):
            tensors = {name: normal(1, seqlen, 2, 8, dtype=torch.float32) for name in "qkv"}
            tensors[where][0, place, 0, columns] = value
            results = cpu.forward(*tensors.values(), Options(causal=causal))
            expected = reference.forward(*tensors.values(), Options(causal=causal))
            torch.testing.assert_close(results, expected, equal_nan=True)


def test_rows_of_a_given_lse_that_saw_nothing_contribute_nothing():
    q, k, v, dout = (normal(1, 9, 2, 8, dtype=torch.float32) for _ in range(4))
    out, lse = reference.forward(q, k, v, Options())
    lse[:, :, 2:5] = -math.inf
    expected = reference.backward(dout, q, k, v, out, lse, Options())
    torch.testing.assert_close(cpu.backward(dout, q, k, v, out, lse, Options()), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_wide_dtypes(dtype):
    q, k, v = (normal(2, 33, 3, 24, dtype=dtype) for _ in range(3))
    out, lse = flash_attn_func(q, k, v, causal=True, return_lse=True)
    assert out.dtype == dtype and lse.dtype == torch.float32
    torch.testing.assert_close(out, torchs_attention(q, k, v, None, True))


OPTIONS = {name: parameter.default for name, parameter in inspect.signature(Options.of).parameters.items()}


def test_signatures():
    """Positional order as FlashAttention-3's; what is ours is keyword-only."""
    by_name = inspect.signature(flash_attn_func).parameters
    positional = [p.name for p in by_name.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert positional == ["q", "k", "v", "softmax_scale", "causal"]
    assert by_name["return_lse"].kind is inspect.Parameter.KEYWORD_ONLY and by_name["return_lse"].default is False
    assert list(inspect.signature(flash_attn_ext.forward).parameters) == ["q", "k", "v", *OPTIONS]
    assert set(by_name) | {"target", *LENGTHS} == set(inspect.signature(flash_attn_ext.explain).parameters)


@pytest.mark.parametrize(
    "name",
    ["flash_attn_func", "forward", "backward", "explain", "attention_reference", "attention_reference_backward"],
)
def test_every_function_takes_every_option(name):
    parameters = inspect.signature(getattr(flash_attn_ext, name)).parameters
    options = {name: default for name, default in OPTIONS.items() if name not in LENGTHS or name in parameters}
    assert {name: parameters[name].default for name in options} == options
    assert set(LENGTHS) <= set(parameters) or name == "flash_attn_func"


def test_public_function_is_the_low_level_pair():
    q, k, v = Case(64, "bf16", 20, 30, heads=6, kv_heads=2).inputs("cpu")
    out, lse = flash_attn_ext.forward(q, k, v, 0.1, True)
    assert same_bits(flash_attn_func(q, k, v, 0.1, True), out)
    for pair in (
        flash_attn_func(q, k, v, softmax_scale=0.1, causal=True, return_lse=True),
        torch.ops.flash_attn_ext.forward(q, k, v, 0.1, True),
    ):
        assert same_bits(pair[0], out) and same_bits(pair[1], lse)


def test_default_scale_is_one_over_sqrt_head_dim():
    q, k, v = (normal(1, 9, 2, 24) for _ in range(3))
    assert same_bits(flash_attn_func(q, k, v), flash_attn_func(q, k, v, 24**-0.5))
