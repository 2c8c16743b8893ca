"""flash_attn_ext.sdpa and flash_attn_ext.adapters.sdpa: torch's own attention operators on the kernels of this package.

Torch has flash and cuDNN attention on GPUs only. Activated, its operators run on CPU tensors too, by this package's
operators: so everything but the choice of kernels is tested here without a GPU.
"""

import contextlib
import inspect
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from cases import TRAINING_HEAD_DIMS, both_dtypes, needs_kernels
from gpu import normal, on_hopper
from gradients import assert_same
from oracle import check, check_gradients, same_bits
from torch import library
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

import flash_attn_ext
from flash_attn_ext import refusals
from flash_attn_ext.options import Options

registry = pytest.importorskip("torch.nn.attention._registry", reason="this torch has no registry of implementations")
from torch.nn.attention import varlen  # noqa: E402

from flash_attn_ext.adapters import sdpa as adapter  # noqa: E402

pytestmark = needs_kernels
aten = torch.ops.aten
each = pytest.mark.parametrize


@pytest.fixture(autouse=True)
def nothing_stays_active():
    yield
    assert registry.current_flash_attention_impl() is None


@pytest.fixture
def activated():
    with flash_attn_ext.sdpa():
        yield


# Torch's operators, with the arguments that differ from call to call by one set of names


def flash(q, k, v, causal=False, scale=None, dropout=0.0, debug=False):
    return aten._scaled_dot_product_flash_attention(q, k, v, dropout, causal, debug, scale=scale)


def cudnn(q, k, v, causal=False, scale=None, dropout=0.0, debug=False, bias=None):
    return aten._scaled_dot_product_cudnn_attention(q, k, v, bias, True, dropout, causal, debug, scale=scale)


def plain(q, k, v, causal=False, scale=None, dropout=0.0, debug=False, cu_seqlens=(None, None), **others):
    """Of tensors as ours are."""
    longest = q.shape[-3], k.shape[-3]
    return aten._flash_attention_forward(q, k, v, *cu_seqlens, *longest, dropout, causal, debug, scale=scale, **others)


# The versions of torch that have the argument want it for fewer heads of k and v; the others take these anyway.
GROUPED = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen.varlen_attn).parameters else {}
varlen_attn = partial(varlen.varlen_attn, **GROUPED)

OPERATORS = {"flash": flash, "cudnn": cudnn, "plain": plain}
each_operator = each("operator", OPERATORS.values(), ids=OPERATORS.keys())
MEMORY = {
    "bshd": lambda b, s, h, d: torch.randn(b, s, h, d),
    "bhsd": lambda b, s, h, d: torch.randn(b, h, s, d).transpose(1, 2),
    "qkv": lambda b, s, h, d: torch.randn(b, s, 3, h, d)[:, :, 1],
}


def inputs(operator, heads=4, kv_heads=2, rows=16, keys=16, dtype=torch.float32, memory="bshd", head_dim=16):
    """q, k and v as the operator takes them."""
    sizes = (2, rows, heads, head_dim), (2, keys, kv_heads, head_dim), (2, keys, kv_heads, head_dim)
    return [swapped(operator, MEMORY[memory](*size).to(dtype)).detach().requires_grad_() for size in sizes]


def swapped(operator, x):
    """A tensor of ours as the operator's, and the other way round."""
    return x if operator is plain else x.transpose(1, 2)


def packed(dtype=torch.float32, device="cpu", kv_heads=2, head_dim=16, lengths=(0, 5, 5, 14)):
    """q, k and v of packed sequences, and two rows of none; cu_seqlens."""
    sizes = [(lengths[-1] + 2, heads, head_dim) for heads in (4, kv_heads, kv_heads)]
    tensors = [torch.randn(size, device=device).to(dtype).requires_grad_() for size in sizes]
    return tensors, torch.tensor(lengths, dtype=torch.int32, device=device)


def dout_of(out):
    """Another one in every element."""
    return torch.linspace(-1, 1, out.numel(), device=out.device).view_as(out).to(out.dtype)


def gradients_of(function, *tensors):
    leaves = [x.detach().requires_grad_() for x in tensors]
    out = function(*leaves)
    return torch.autograd.grad(out, leaves, dout_of(out))


def assert_as_ours(operator, tensors, causal=False, scale=None):
    """out, lse and the gradients: to the bit, and with torch's strides."""
    options = {"causal": causal, "scale": scale}
    out, lse = operator(*tensors, **options)[:2]
    ours = partial(flash_attn_ext.flash_attn_func, causal=causal, softmax_scale=scale)
    as_ours = [swapped(operator, x) for x in tensors]
    our_out, our_lse = ours(*as_ours, return_lse=True)
    dout = dout_of(out)
    gradients = torch.autograd.grad(out, tensors, dout)
    our_gradients = torch.autograd.grad(our_out, as_ours, swapped(operator, dout))
    assert same_bits(lse, our_lse.unsqueeze(-1) if operator is cudnn else our_lse) and lse.is_contiguous()
    results = (out, *gradients), (tensors[0], *tensors), (our_out, *our_gradients)
    for x, like, expected in zip(*results, strict=True):
        assert x.abs().max() > 0 and x.stride() == torch.empty_like(like).stride()
        assert same_bits(swapped(operator, x), expected)


# Results --------------------------------------------------------------------------------------------------------------


@each_operator
@each("kv_heads", [4, 2, 1])
@each("causal", [False, True])
@each("memory", MEMORY)
def test_dense(activated, operator, kv_heads, causal, memory):
    assert_as_ours(operator, inputs(operator, kv_heads=kv_heads, memory=memory), causal)


@each_operator
@each("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_dtypes_and_scale(activated, operator, dtype):
    assert_as_ours(operator, inputs(operator, dtype=dtype), True, 0.3)


@each("operator", [flash, plain], ids=["flash", "plain"])
@each("rows, keys", [(5, 16), (16, 5), (1, 16)])
def test_causal_of_other_lengths_ends_at_the_bottom_right(activated, operator, rows, keys):
    """As in torch's flash operators, which F.scaled_dot_product_attention calls for square causal masks only."""
    assert_as_ours(operator, inputs(operator, rows=rows, keys=keys), True)


@each_operator
@each("rows, keys", [(0, 16), (16, 0)])
def test_without_rows_or_keys(activated, operator, rows, keys):
    tensors = inputs(operator, rows=rows, keys=keys)
    out = operator(*tensors)[0]
    assert out.shape == tensors[0].shape and not out.any()


@each_operator
@each("memory", ["bshd", "bhsd"])
def test_results_are_as_torchs_fake_ones(activated, operator, memory):
    """torch.compile goes by sizes, strides and types of those."""
    tensors = inputs(operator, memory=memory)
    results = operator(*tensors)
    with FakeTensorMode() as mode:
        fake = operator(*(mode.from_tensor(x) for x in tensors))
    for x, expected in zip(results, fake, strict=True):
        if isinstance(expected, torch.Tensor):
            assert (x.shape, x.stride(), x.dtype) == (expected.shape, expected.stride(), expected.dtype)
        else:
            assert x == expected


def test_autocast_is_left_to_torch(activated):
    """It has cast already, or not, where these operators are called."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert flash(*inputs(flash))[0].dtype == torch.float32


@each("causal", [False, True])
@each("kv_heads", [4, 2])
def test_varlen_attn(activated, causal, kv_heads):
    tensors, lengths = packed(kv_heads=kv_heads)

    def attend(q, k, v, lse=False):
        window = (-1, 0) if causal else (-1, -1)
        aux = varlen.AuxRequest(lse=lse)
        return varlen_attn(q, k, v, lengths, lengths, 9, 9, window_size=window, return_aux=aux)

    ours = partial(flash_attn_ext.flash_attn_varlen_func, cu_seqlens_q=lengths, cu_seqlens_k=lengths, causal=causal)
    results = *attend(*tensors, lse=True), *gradients_of(attend, *tensors)
    expected = *ours(*tensors, return_lse=True), *gradients_of(ours, *tensors)
    for x, of_ours in zip(results, expected, strict=True):
        assert same_bits(x, of_ours)
    assert len(results) == 5 and all(x.abs().max() > 0 for x in results)


def test_lse_of_varlen_attn_has_no_gradient(activated):
    """In torch's own backward, which the documents say: whoever needs one calls flash_attn_varlen_func."""
    (q, k, v), lengths = packed(kv_heads=4)
    arguments = (q, k, v, lengths, lengths, 14, 14)
    _, lse = varlen.varlen_attn(*arguments, return_aux=varlen.AuxRequest(lse=True))
    (dq,) = torch.autograd.grad(lse.sum(), q)
    assert not dq.any()


def test_lengths_out_of_range_are_refused(activated):
    tensors, lengths = packed()
    with pytest.raises(ValueError, match="cu_seqlens_q"):
        varlen_attn(*tensors, lengths + 10, lengths, 9, 9)


@pytest.mark.filterwarnings("ignore:.*TF32")
def test_under_compile(activated):
    """Traced and compiled in one graph, forward and backward."""
    tensors, (packed_tensors, lengths) = inputs(flash), packed()

    def attend(q, k, v, a, b, c):
        out = flash(q, k, v, True)[0] + cudnn(q, k, v)[0] * 2
        return out, varlen_attn(a, b, c, lengths, lengths, 9, 9)

    def results(function):
        outs = function(*tensors, *packed_tensors)
        return *outs, *torch.autograd.grad(outs, [*tensors, *packed_tensors], [dout_of(x) for x in outs])

    torch._dynamo.reset()
    for x, expected in zip(results(torch.compile(attend, fullgraph=True)), results(attend), strict=True):
        torch.testing.assert_close(x, expected)


def test_a_traced_graph_follows_what_is_active():
    """A graph that was made outside of the context runs on these kernels inside."""
    tensors = inputs(flash)
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(x) for x in tensors]
        graph = torch.fx.experimental.proxy_tensor.make_fx(lambda q, k, v: flash(q, k, v)[0])(*fake)
    with pytest.raises(NotImplementedError):
        graph(*tensors)
    with flash_attn_ext.sdpa():
        assert same_bits(graph(*tensors), flash(*tensors)[0])


def test_sdpa_of_cpu_tensors_stays_torchs(activated):
    """It has an operator of its own."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        F.scaled_dot_product_attention(*inputs(flash, kv_heads=4))
    names = {event.name for event in profile.events()}
    assert "aten::_scaled_dot_product_flash_attention_for_cpu" in names
    assert not [name for name in names if "flash_attn_ext" in name]


# What is not taken ----------------------------------------------------------------------------------------------------


class Reached(Exception):
    """A call came to the kernel that was there before, with these arguments."""


@pytest.fixture
def before_ours():
    """Kernels for CPU tensors stand where torch has its own for a GPU, and ours in front of them."""
    aten_on_cpu = library.Library("aten", "IMPL", "CPU")

    def kernel_of(name):
        def kernel(*arguments, **by_name):
            raise Reached(name, arguments, by_name)

        return kernel

    for name in NAMES:
        aten_on_cpu.impl(name, kernel_of(name))
    with flash_attn_ext.sdpa():
        yield
    aten_on_cpu._destroy()


NAMES = [
    f"{stem}{ending}"
    for stem, endings in {
        "_scaled_dot_product_flash_attention": ("", "_backward"),
        "_scaled_dot_product_cudnn_attention": ("", "_backward"),
        "_flash_attention": ("_forward", "_backward"),
    }.items()
    for ending in endings
]
OTHER_TENSORS = {
    "mixed dtypes": lambda q, k, v: (q, k.double(), v),
    "whole numbers": lambda *tensors: [x.detach().int() for x in tensors],
    "v of another head dim": lambda q, k, v: (q, k, v[..., :8]),
    "k of another batch": lambda q, k, v: (q, k[:1], v[:1]),
    "heads that do not divide": lambda q, k, v: (q[:, :3, :3], k, v),
}
ASKED = {
    "dropout": {"dropout": 0.1},
    "debug mask": {"dropout": 0.1, "debug": True},
    "negative scale": {"scale": -1.0},
    "no scale": {"scale": 0.0},
}
OF_PLAIN = {
    "left window": {"window_size_left": 3, "window_size_right": 0},
    "right window": {"window_size_right": 3},
    "a window without a mask": {"window_size_right": 0},
    "used lengths": {"seqused_k": torch.tensor([3, 4], dtype=torch.int32)},
    "biases": {"alibi_slopes": torch.ones(4)},
    "lengths of q alone": {"cu_seqlens": (torch.tensor([0, 16], dtype=torch.int32), None)},
}


def assert_reaches(operator, tensors, **options):
    with pytest.raises(Reached) as reached:
        operator(*tensors, **options)
    _, arguments, by_name = reached.value.args
    assert all(x is tensor or same_bits(x, tensor) for x, tensor in zip(arguments, tensors, strict=False))
    return arguments[3:], by_name


def test_what_is_taken_does_not_reach_torch(before_ours):
    for operator in OPERATORS.values():
        assert operator(*inputs(operator), scale=0.3, causal=True)[0].any()


@each_operator
@each("change", OTHER_TENSORS.values(), ids=OTHER_TENSORS.keys())
def test_tensors_that_do_not_fit(before_ours, operator, change):
    assert_reaches(operator, change(*inputs(operator)))


@each_operator
@each("options", ASKED.values(), ids=ASKED.keys())
def test_options_that_are_not_there(before_ours, operator, options):
    """They arrive as they were given."""
    others, by_name = assert_reaches(operator, inputs(operator), causal=True, **options)
    place = {flash: 0, cudnn: 2, plain: 4}[operator]
    assert others[place : place + 2] == (options.get("dropout", 0.0), True)
    assert not options.get("debug") or others[place + 2]
    assert by_name == {name: value for name, value in options.items() if name == "scale"}


@each("options", OF_PLAIN.values(), ids=OF_PLAIN.keys())
def test_windows_and_other_options_of_varlen_attn(before_ours, options):
    _, by_name = assert_reaches(plain, inputs(plain), **options)
    assert [name for name in by_name] == [name for name in options if name != "cu_seqlens"]


@each("options", [{"causal": True}, {"bias": torch.zeros(2, 4, 9, 16)}], ids=["causal", "bias"])
def test_cudnn_begins_a_causal_mask_at_the_top_left_and_has_biases(before_ours, options):
    assert_reaches(cudnn, inputs(cudnn, rows=9), **options)
    assert cudnn(*inputs(cudnn, rows=9))[0].any()


def test_cudnn_has_strides_of_its_own_for_expanded_tensors(before_ours):
    q, k, v = inputs(cudnn)
    assert_reaches(cudnn, (q, k[:, :1].expand(k.shape), v))
    assert flash(q, k[:, :1].expand(k.shape), v)[0].any()


@each("operator", [flash, cudnn], ids=["flash", "cudnn"])
def test_tensors_of_two_dimensions(before_ours, operator):
    assert_reaches(operator, [x[0, 0] for x in inputs(operator)])


@each("change", [lambda x: x.long(), lambda x: x[:0], lambda x: x[None], lambda x: x.repeat(2)[::2]])
def test_lengths_that_do_not_fit(before_ours, change):
    tensors, lengths = packed()
    assert_reaches(plain, tensors, cu_seqlens=(change(lengths), change(lengths)))
    assert_reaches(plain, tensors, cu_seqlens=(lengths, lengths[:-1]))
    assert_reaches(plain, inputs(plain), cu_seqlens=(lengths, lengths))
    assert plain(*tensors, cu_seqlens=(lengths, lengths))[0].any()


BACKWARDS = {
    "flash": lambda dout, q, k, v, out, lse, dropout, seed: aten._scaled_dot_product_flash_attention_backward(
        dout, q, k, v, out, lse, None, None, 0, 0, dropout, False, seed, seed
    ),
    "cudnn": lambda dout, q, k, v, out, lse, dropout, seed: aten._scaled_dot_product_cudnn_attention_backward(
        dout, q, k, v, out, lse, seed, seed, None, None, None, 0, 0, dropout, False
    ),
    "plain": lambda dout, q, k, v, out, lse, dropout, seed: aten._flash_attention_backward(
        dout, q, k, v, out, lse, None, None, 0, 0, dropout, False, seed, seed
    ),
}


@each("name", BACKWARDS)
def test_backwards(before_ours, name):
    """The largest lengths, here 0, do not count: torch's context parallelism passes wrong ones."""
    backward, operator = BACKWARDS[name], OPERATORS[name]
    q, k, v = (x.detach() for x in inputs(operator))
    out, lse = operator(q, k, v)[:2]
    dout, seed = torch.randn_like(out), torch.zeros(())
    gradients = backward(dout, q, k, v, out, lse, 0.0, seed)
    ours = flash_attn_ext.backward(
        *(swapped(operator, x) for x in (dout, q, k, v, out)), lse.squeeze(-1) if name == "cudnn" else lse
    )
    assert all(same_bits(swapped(operator, x), expected) for x, expected in zip(gradients, ours, strict=True))
    refused = {"dropout": (dout, lse, 0.1), "dout": (dout[..., :8], lse, 0.0), "lse": (dout, lse.double(), 0.0)}
    for dout, lse, dropout in refused.values():
        with pytest.raises(Reached):
            backward(dout, q, k, v, out, lse, dropout, seed)


def test_where_torch_has_nothing(activated):
    with pytest.raises(NotImplementedError, match="_flash_attention_forward: torch has none for this device"):
        plain(*inputs(plain), window_size_left=3)


@each("head_dim", [d for d in range(8, 257, 8)])
def test_lengths_run_wherever_dense_calls_do(head_dim):
    """The choice of what is taken looks at packed sequences as at dense ones."""
    q = torch.empty(16, 4, head_dim, dtype=torch.bfloat16, device="meta", requires_grad=True)
    lengths = torch.empty(3, dtype=torch.int32, device="meta")
    options = Options(causal=True, cu_seqlens_q=lengths, cu_seqlens_k=lengths)
    dense = q[None]
    assert refusals.of_forward(dense, dense, dense, Options(causal=True), on_hopper=True) is None
    assert refusals.of_forward(q, q, q, options, on_hopper=True) is None
    assert refusals.of_gradients(q, q, q, options, on_hopper=True) is None


@pytest.fixture
def every_gpu_seems_to_be_a_hopper():
    flash_attn_ext._C.set_test_faults(compute_capability=90)
    yield
    flash_attn_ext._C.set_test_faults()


def who_takes(name, *arguments):
    """ "ours" or "torch's", of a call of fake tensors on a GPU that is not there. Ours fail at it at once; torch's
    flash attention goes on to operators that know fake tensors, and its cuDNN attention looks for a driver."""
    kernel = library.get_kernel(f"aten::{name}", "CUDA")
    try:
        kernel.call_boxed(torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA), *arguments)
    except RuntimeError as error:
        return "ours" if isinstance(error, torch.AcceleratorError) else "torch's"
    return "torch's"


@pytest.mark.skipif(torch.cuda.is_available(), reason="a kernel would read memory that fake tensors do not have")
def test_who_takes_what_on_a_gpu(activated, every_gpu_seems_to_be_a_hopper):
    mode = FakeTensorMode()

    def fake(*size, dtype=torch.bfloat16):
        with mode:
            return torch.empty(size, dtype=dtype, device="cuda")

    def of_flash(q, k=None, dropout=0.0, causal=True):
        k = q if k is None else k
        return who_takes("_scaled_dot_product_flash_attention", q, k, k, dropout, causal, False)

    def of_cudnn(q, k=None, bias=None, dropout=0.0, causal=True):
        k = q if k is None else k
        return who_takes("_scaled_dot_product_cudnn_attention", q, k, k, bias, True, dropout, causal, False)

    q, grouped, shorter = fake(2, 8, 128, 64), fake(2, 2, 128, 64), fake(2, 8, 100, 64)
    for of in (of_flash, of_cudnn):
        for call in ((q,), (q, grouped), (fake(2, 8, 128, 64, dtype=torch.float16),), (fake(1, 1, 7, 256),)):
            assert of(*call) == of(*call, causal=False) == "ours"
        assert of(q, shorter, causal=False) == "ours"
        others = fake(2, 8, 128, 264), fake(2, 8, 128, 20), fake(2, 8, 128, 64, dtype=torch.float32)
        assert {of(x) for x in others} == {of(q, dropout=0.1)} == {"torch's"}
    assert of_flash(q, shorter) == "ours" and of_cudnn(q, shorter) == "torch's"
    assert of_cudnn(q, bias=fake(2, 8, 128, 128)) == "torch's"

    def of_backward(lse, dropout=0.0):
        others = None, None, 0, 0, dropout, True, fake(2), fake()
        return who_takes("_scaled_dot_product_flash_attention_backward", q, q, q, q, q, lse, *others)

    lse = fake(2, 8, 128, dtype=torch.float32)
    assert of_backward(lse) == "ours"
    assert {of_backward(lse, dropout=0.1), of_backward(fake(2, 8, 128))} == {"torch's"}

    flash_attn_ext._C.set_test_faults(compute_capability=80)
    assert {of_flash(q), of_cudnn(q)} == {"torch's"}


# The registry ---------------------------------------------------------------------------------------------------------


def is_active():
    try:
        flash(*inputs(flash))
    except NotImplementedError:
        return False
    return True


def test_by_torchs_own_functions():
    assert adapter.NAME in torch.nn.attention.list_flash_attention_impls() and not is_active()
    for _ in range(2):
        torch.nn.attention.activate_flash_attention_impl("flash_attn_ext")
        assert torch.nn.attention.current_flash_attention_impl() == "flash_attn_ext" and is_active()
        torch.nn.attention.activate_flash_attention_impl("flash_attn_ext")
        assert is_active()
        torch.nn.attention.restore_flash_attention_impl()
        assert not is_active()


def test_the_context_ends_with_its_block():
    with flash_attn_ext.sdpa():
        assert is_active()
        with flash_attn_ext.sdpa():
            assert is_active()
        assert is_active()
    assert not is_active()


def test_the_context_ends_with_an_exception():
    with pytest.raises(ZeroDivisionError), flash_attn_ext.sdpa(), flash_attn_ext.sdpa():
        raise ZeroDivisionError
    assert not is_active()


def test_as_a_decorator():
    assert flash_attn_ext.sdpa()(is_active)() and not is_active()


class Other:
    """Another implementation, of which so many are in force."""

    count = 0

    def __init__(self):
        Other.count += 1

    def remove(self):
        Other.count -= 1


@pytest.fixture
def another(monkeypatch):
    monkeypatch.setitem(registry._FLASH_ATTENTION_IMPLS, "another", Other)


def test_another_implementation_comes_back(another):
    torch.nn.attention.activate_flash_attention_impl("another")
    with flash_attn_ext.sdpa():
        assert is_active() and Other.count == 0
    assert torch.nn.attention.current_flash_attention_impl() == "another" and Other.count == 1 and not is_active()
    torch.nn.attention.restore_flash_attention_impl()
    assert Other.count == 0


@each("inside", [None, "another"])
def test_what_is_changed_inside_is_undone(another, inside):
    with flash_attn_ext.sdpa():
        with flash_attn_ext.sdpa():
            torch.nn.attention.restore_flash_attention_impl()
            if inside:
                torch.nn.attention.activate_flash_attention_impl(inside)
            assert not is_active()
        assert is_active() and Other.count == 0
    assert not is_active()


def test_contexts_may_overlap(another):
    """As those of two threads do."""
    torch.nn.attention.activate_flash_attention_impl("another")
    first, second = flash_attn_ext.sdpa(), flash_attn_ext.sdpa()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert is_active()
    second.__exit__(None, None, None)
    assert torch.nn.attention.current_flash_attention_impl() == "another" and not is_active()
    torch.nn.attention.restore_flash_attention_impl()


def test_an_activation_that_fails_changes_nothing(another, monkeypatch):
    monkeypatch.setattr(adapter, "_C", None)
    monkeypatch.setattr(adapter, "why_missing", "because.")
    torch.nn.attention.activate_flash_attention_impl("another")
    with pytest.raises(RuntimeError, match="flash_attn_ext cannot be activated: because."), flash_attn_ext.sdpa():
        pass
    assert torch.nn.attention.current_flash_attention_impl() == "another" and Other.count == 1
    torch.nn.attention.restore_flash_attention_impl()


def test_imports_change_nothing(tmp_path):
    """Importing the package does not register it, importing the adapter does not activate it; and nothing is said
    about kernels that are overridden."""
    program = """
import torch, flash_attn_ext
from torch.nn.attention import current_flash_attention_impl, list_flash_attention_impls

print("flash_attn_ext" in list_flash_attention_impls())
import flash_attn_ext.adapters.sdpa

print("flash_attn_ext" in list_flash_attention_impls(), current_flash_attention_impl())
with flash_attn_ext.sdpa():
    print(current_flash_attention_impl())
"""
    environment = os.environ | {"PYTHONPATH": str(Path(flash_attn_ext.__file__).parents[1])}
    command = [sys.executable, "-c", program]  # not run in a checkout: Python would import from there
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True", "None", "flash_attn_ext"] and done.stderr == ""


# On a GPU -------------------------------------------------------------------------------------------------------------

LENGTH = 300
BACKENDS = {  # on Hopper torch's choice is cuDNN, where it can
    "torch's choice": contextlib.nullcontext,
    "flash": partial(sdpa_kernel, SDPBackend.FLASH_ATTENTION),
    "cudnn": partial(sdpa_kernel, SDPBackend.CUDNN_ATTENTION),
}
each_backend = each("backend", BACKENDS)
ROUNDINGS = 2.0**-6  # what right results in bfloat16 differ by at most, as a share of their size


def on_gpu(heads=4, kv_heads=4, rows=LENGTH, keys=LENGTH, head_dim=128, dtype=torch.bfloat16):
    """q, k and v, (batch, heads, seqlen, head_dim)."""
    sizes = (2, rows, heads, head_dim), (2, keys, kv_heads, head_dim), (2, keys, kv_heads, head_dim)
    return [normal(*size, dtype=dtype).transpose(1, 2).requires_grad_() for size in sizes]


def of_ours(tensors, **options):
    return flash_attn_ext.flash_attn_func(*(x.transpose(1, 2) for x in tensors), **options).transpose(1, 2)


def distance(a, b):
    a, b = a.float(), b.float()
    return (torch.linalg.vector_norm(a - b) / torch.linalg.vector_norm(b)).item()


def whose_kernels(call):
    """ "ours" and "torch's", as far as such run."""
    call()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    names = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert names, "the profiler sees no GPU"
    marks = {"ours": ("flash_attn_ext",), "torch's": ("cudnn", "pytorch_flash", "fmha", "softmax")}
    return {whose for whose, parts in marks.items() if any(part in name for part in parts for name in names)}


@on_hopper
@each_backend
@each("causal", [False, True])
@both_dtypes
def test_sdpa_on_a_gpu(backend, causal, dtype):
    for head_dim in {64, 128} | (set() if backend == "cudnn" else set(TRAINING_HEAD_DIMS)):
        tensors = on_gpu(kv_heads=4 if backend == "cudnn" else 2, head_dim=head_dim, dtype=dtype)
        with flash_attn_ext.sdpa(), BACKENDS[backend]():
            out = F.scaled_dot_product_attention(*tensors, is_causal=causal, enable_gqa=backend != "cudnn")
            gradients = torch.autograd.grad(out, tensors, dout_of(out))
        expected = of_ours(tensors, causal=causal)
        assert same_bits(out, expected)
        assert_same(gradients, torch.autograd.grad(expected, tensors, dout_of(out)), keys=LENGTH)


@on_hopper
@each("operator", [flash, cudnn], ids=["flash", "cudnn"])
@each("causal", [False, True])
def test_results_on_a_gpu_beside_torchs_own(operator, causal):
    """Within the rule for a result, and torch's own are the same but for roundings: lse too, which either's backward
    takes from the other's forward."""
    tensors = on_gpu()
    with flash_attn_ext.sdpa():
        out, lse = operator(*tensors, causal=causal)[:2]
        dout = torch.randn_like(out)
        gradients = torch.autograd.grad(out, tensors, dout, retain_graph=True)
    theirs, their_lse = operator(*tensors, causal=causal)[:2]
    assert lse.shape == their_lse.shape and out.stride() == theirs.stride()
    as_ours = [x.detach().transpose(1, 2) for x in (*tensors, out, dout, *gradients)]
    q, k, v, our_out, our_dout, *our_gradients = as_ours
    of_rows = lse.detach().view(lse.shape[:3])
    check(our_out, of_rows, q, k, v, causal=causal)
    check_gradients(our_gradients, our_dout, q, k, v, our_out, of_rows, causal=causal)

    their_gradients = torch.autograd.grad(theirs, tensors, dout, retain_graph=True)
    torch_from_ours = torch.autograd.grad(out, tensors, dout)
    with flash_attn_ext.sdpa():
        ours_from_torch = torch.autograd.grad(theirs, tensors, dout)
    assert distance(out, theirs) < ROUNDINGS and distance(lse, their_lse) < 2.0**-10
    for results in (gradients, torch_from_ours, ours_from_torch):
        assert all(distance(a, b) < ROUNDINGS for a, b in zip(results, their_gradients, strict=True))


@on_hopper
@each_backend
def test_whose_kernels_run(backend):
    """Both passes; all is torch's again after the context."""
    tensors = on_gpu()

    def both_passes():
        with BACKENDS[backend]():
            out = F.scaled_dot_product_attention(*tensors, is_causal=True)
            torch.autograd.grad(out, tensors, dout_of(out))

    assert whose_kernels(both_passes) == {"torch's"}
    with flash_attn_ext.sdpa():
        assert whose_kernels(both_passes) == {"ours"}
    assert whose_kernels(both_passes) == {"torch's"}


@on_hopper
def test_a_head_dim_that_torch_pads():
    tensors = on_gpu(head_dim=100)
    with flash_attn_ext.sdpa(), sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        out = F.scaled_dot_product_attention(*tensors)
    padded = [F.pad(x, (0, 4)) for x in tensors]
    assert same_bits(out, of_ours(padded, softmax_scale=100**-0.5)[..., :100])


@on_hopper
def test_a_causal_mask_at_the_bottom_right():
    q, k, v = on_gpu(rows=200)
    with flash_attn_ext.sdpa():
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=causal_lower_right(200, LENGTH))
    assert same_bits(out, of_ours((q, k, v), causal=True))


NOT_OURS = {
    "dropout": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, dropout_p=0.3),
    "mask": lambda q, k, v: F.scaled_dot_product_attention(
        q, k, v, attn_mask=(torch.arange(LENGTH, device="cuda") < 200).expand(LENGTH, LENGTH)
    ),
    "causal, not square": lambda q, k, v: F.scaled_dot_product_attention(q[:, :, :200], k, v, is_causal=True),
    "float32": lambda *tensors: F.scaled_dot_product_attention(*(x.float() for x in tensors)),
    "head dim 264": lambda *tensors: F.scaled_dot_product_attention(*(F.pad(x, (0, 136)) for x in tensors)),
    "another head dim of v": lambda q, k, v: F.scaled_dot_product_attention(q, k, v[..., :64]),
}


@on_hopper
@each("call", NOT_OURS.values(), ids=NOT_OURS.keys())
def test_other_calls_go_where_they_went(call):
    tensors = on_gpu()

    def results():
        torch.manual_seed(1)
        out = call(*tensors)
        return out, torch.autograd.grad(out, tensors, dout_of(out))

    out, gradients = results()
    with flash_attn_ext.sdpa():
        inside, gradients_inside = results()
        assert "ours" not in whose_kernels(results)
    assert same_bits(inside, out)
    assert all(distance(a, b) < ROUNDINGS for a, b in zip(gradients_inside, gradients, strict=True))


@on_hopper
def test_other_gpus_keep_torchs_kernels():
    tensors = on_gpu()
    out = F.scaled_dot_product_attention(*tensors)
    flash_attn_ext._C.set_test_faults(compute_capability=80)
    try:
        with flash_attn_ext.sdpa():
            assert same_bits(F.scaled_dot_product_attention(*tensors), out)
            assert whose_kernels(lambda: F.scaled_dot_product_attention(*tensors)) == {"torch's"}
    finally:
        flash_attn_ext._C.set_test_faults()


@on_hopper
@each("causal", [False, True])
@each("kv_heads", [4, 2])
def test_varlen_attn_on_a_gpu(causal, kv_heads):
    tensors, lengths = packed(torch.bfloat16, "cuda", kv_heads, 128, (0, 70, 70, 333, 620))

    def attend(q, k, v):
        return varlen_attn(q, k, v, lengths, lengths, 287, 287, window_size=(-1, 0) if causal else (-1, -1))

    ours = partial(flash_attn_ext.flash_attn_varlen_func, cu_seqlens_q=lengths, cu_seqlens_k=lengths, causal=causal)
    with flash_attn_ext.sdpa():
        assert same_bits(attend(*tensors), ours(*tensors))
        assert_same(gradients_of(attend, *tensors), gradients_of(ours, *tensors), keys=LENGTH)


@on_hopper
def test_varlen_attn_with_a_window_stays_torchs():
    tensors, lengths = packed(torch.bfloat16, "cuda", 4, 128, (0, 70, 70, 333, 620))
    attend = partial(varlen_attn, *tensors, lengths, lengths, 287, 287, window_size=(100, 0))
    out = attend()
    with flash_attn_ext.sdpa():
        assert same_bits(attend()[:620], out[:620])


@on_hopper
def test_compiled_code_on_a_gpu():
    """Compiled outside of the context, it runs on these kernels inside, whichever of torch's operators it has."""
    tensors = on_gpu()
    torch._dynamo.reset()
    compiled = torch.compile(partial(F.scaled_dot_product_attention, is_causal=True), fullgraph=True)
    compiled(*tensors)
    with flash_attn_ext.sdpa():
        out = compiled(*tensors)
        gradients = torch.autograd.grad(out, tensors, dout_of(out))
    expected = of_ours(tensors, causal=True)
    assert same_bits(out, expected)
    assert_same(gradients, torch.autograd.grad(expected, tensors, dout_of(out)), keys=LENGTH)
