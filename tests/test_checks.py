"""The fast yes of the compiled module (csrc/torch/checks.h) beside the refusals in Python: no call gets it that Python
refuses. On fake CUDA tensors, which need no GPU.
"""

import math
import warnings
from functools import partial

import pytest
import torch
from cases import DTYPES, HEAD_DIMS, TRAINING_HEAD_DIMS, needs_kernels
from conftest import SEED
from hypothesis import HealthCheck, event, given, seed, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

import flash_attn_ext
from flash_attn_ext import refusals
from flash_attn_ext.options import Options

pytestmark = needs_kernels

# The same for every option: right for some, for others out of range or of a wrong type.
VALUES = [True, False, None, 0.1, 1e38, 0.0, -0.1, math.nan, math.inf, 1e-46, 1e-40, 1e39, 0, 1, -1, (0, 1), "1"]
SIZES = [0, 1, 2, 3, 5, 7, 8, 63, 64, 72, 100, 128, 256, 264]
random_calls = settings(
    max_examples=1000, deadline=None, database=None, print_blob=True, suppress_health_check=list(HealthCheck)
)
rarely = st.integers(0, 24).map(lambda number: number == 7)


@pytest.fixture(autouse=True, scope="module")
def every_gpu_seems_to_be_a_hopper():
    flash_attn_ext._C.set_test_faults(compute_capability=90)
    yield
    flash_attn_ext._C.set_test_faults()


def is_plainly_fine(*call):
    return flash_attn_ext._C.is_plainly_fine(*call)


@st.composite
def forward_calls(draw):
    """q, k, v and options of a call that something may be wrong with."""
    sizes = {"batch": 2, "seqlen_q": 5, "seqlen_k": 7, "heads": 4, "kv_heads": 2, "head_dim": HEAD_DIMS[0]}
    for name in draw(st.lists(st.sampled_from(list(sizes)), max_size=2)):
        sizes[name] = draw(st.sampled_from(SIZES))
    if draw(rarely):
        sizes[draw(st.sampled_from(list(sizes)))] = 2**30
    q_shape = [sizes[name] for name in ("batch", "seqlen_q", "heads", "head_dim")]
    kv_shape = [sizes[name] for name in ("batch", "seqlen_k", "kv_heads", "head_dim")]
    dtype = draw(st.sampled_from([*DTYPES.values(), torch.float32]))
    device = draw(st.sampled_from(["cuda", "cuda", "cuda", "cpu"]))
    tensors = [draw(tensors_like(shape, dtype, device)) for shape in (q_shape, kv_shape, kv_shape)]
    values = (draw(st.sampled_from([default] * 4 * len(VALUES) + VALUES)) for default in Options())
    return *tensors, Options(*values)


@st.composite
def backward_calls(draw):
    """dout, q, k, v, out, lse and options."""
    q, k, v, options = draw(forward_calls())
    dout, out = (draw(tensors_like(q.shape, q.dtype, q.device)) for _ in range(2))
    lse_shape = [q.shape[0], q.shape[2], q.shape[1]] if q.dim() == 4 else q.shape
    return dout, q, k, v, out, draw(tensors_like(lse_shape, torch.float32, q.device)), options


@st.composite
def tensors_like(draw, shape, dtype, device):
    """Mostly as asked for; else of another shape or rank, dtype or device."""
    shape = list(shape)
    if shape and draw(rarely):
        shape[draw(st.integers(0, len(shape) - 1))] = draw(st.sampled_from(SIZES))
    if draw(rarely):
        shape = draw(st.sampled_from([shape[1:], [1, *shape]]))
    if draw(rarely):
        dtype = draw(st.sampled_from([torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int16]))
    if draw(rarely):
        device = draw(st.sampled_from(["cpu", "meta", "cuda:1"]))
    return torch.empty(shape, dtype=dtype, device=device)


def assert_yes_is_sound(call, refusal_of):
    yes, refusal = is_plainly_fine(*call), refusal_of(*call, on_device=False)
    assert not (yes and refusal), refusal
    on_gpu = all(tensor.is_cuda for tensor in call[:-1])
    event(
        "yes" if yes else "Python refuses" if refusal else f"Python lets pass, {'CUDA' if on_gpu else 'another device'}"
    )


@seed(SEED)
@random_calls
@given(data=st.data())
def test_no_forward_that_python_refuses_is_plainly_fine(data):
    with FakeTensorMode():
        assert_yes_is_sound(data.draw(forward_calls()), refusals.of_forward)


@seed(SEED)
@random_calls
@given(data=st.data())
def test_no_backward_that_python_refuses_is_plainly_fine(data):
    with FakeTensorMode():
        assert_yes_is_sound(data.draw(backward_calls()), refusals.of_backward)


def test_both_sides_have_the_same_head_dims():
    """In calls that nothing else can be wrong with."""
    with FakeTensorMode():
        for head_dim in range(1, 300):
            q = torch.empty(2, 5, 4, head_dim, dtype=torch.bfloat16, device="cuda")
            forward, backward = (q, q, q, Options()), (q,) * 5 + (torch.empty(2, 4, 5, device="cuda"), Options())
            for which, call in (("forward", forward), ("backward", backward)):
                refusal = getattr(refusals, f"of_{which}")(*call, on_device=False)
                assert is_plainly_fine(*call) == (refusal is None) == (head_dim in flash_attn_ext.supported()[which])


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize(
    "options", [Options(), Options(softmax_scale=0.1), Options(causal=True), Options(deterministic=True)], ids=str
)
@pytest.mark.parametrize("seqlen_q, seqlen_k", [(5, 7), (7, 5), (1, 0), (0, 1), (4096, 4096)])
@pytest.mark.parametrize("heads, kv_heads", [(1, 1), (6, 2), (0, 1)])
def test_good_calls_are_plainly_fine(head_dim, dtype, options, seqlen_q, seqlen_k, heads, kv_heads):
    with FakeTensorMode():
        q = torch.empty(2, seqlen_q, heads, head_dim, dtype=dtype, device="cuda")
        k, v = (torch.empty(2, seqlen_k, kv_heads, head_dim, dtype=dtype, device="cuda") for _ in range(2))
        lse = torch.empty(2, heads, seqlen_q, device="cuda")
        assert is_plainly_fine(q, k, v, options)
        assert is_plainly_fine(q, q, k, v, q, lse, options) == (head_dim in TRAINING_HEAD_DIMS)


@pytest.mark.parametrize(
    "large", [["batch"], ["seqlen_q"], ["seqlen_k"], ["heads"], ["heads", "kv_heads"]], ids=",".join
)
def test_both_sides_have_one_largest_size(large):
    def forward_call(size):
        sizes = {"batch": 1, "seqlen_q": 1, "seqlen_k": 1, "heads": 1, "kv_heads": 1} | dict.fromkeys(large, size)
        batch, seqlen_q, seqlen_k, heads, kv_heads = sizes.values()
        q = torch.empty(batch, seqlen_q, heads, HEAD_DIMS[0], dtype=torch.bfloat16, device="cuda")
        k = torch.empty(batch, seqlen_k, kv_heads, HEAD_DIMS[0], dtype=torch.bfloat16, device="cuda")
        return q, k, k, Options()

    with FakeTensorMode():
        fits, too_large = forward_call(2**30 - 1), forward_call(2**30)
        assert is_plainly_fine(*fits) and refusals.of_forward(*fits, on_device=False) is None
        refusal = refusals.of_forward(*too_large, on_device=False)
        assert not is_plainly_fine(*too_large) and f"sizes up to {2**30 - 1}" in str(refusal)


@pytest.mark.parametrize("capability", [80, 89, 100, 120])
def test_no_call_on_another_gpu_is_plainly_fine(capability):
    with FakeTensorMode():
        q = torch.empty(2, 5, 4, HEAD_DIMS[0], dtype=torch.bfloat16, device="cuda")
        assert is_plainly_fine(q, q, q, Options())
        flash_attn_ext._C.set_test_faults(compute_capability=capability)
        try:
            assert not is_plainly_fine(q, q, q, Options())
        finally:
            flash_attn_ext._C.set_test_faults(compute_capability=90)


def test_what_python_lets_pass_goes_on(forward_only, monkeypatch):
    """Here a gradient that no kernel computes."""
    with FakeTensorMode():
        q, k, v = (torch.empty(2, 5, 4, forward_only, dtype=torch.bfloat16, device="cuda") for _ in range(3))
        k.requires_grad_()
        forward = partial(torch.ops.flash_attn_ext.forward.default, softcap=30.0)
        with pytest.raises(ValueError, match="has no backward kernel"):
            forward(q, k, v)
        monkeypatch.setattr(refusals, "of_gradients", lambda q, k, v, options: None)
        assert forward(q, k, v)[0].requires_grad


def test_the_backward_runs_under_torchs_switch_for_deterministic_algorithms():
    """Neither refused nor warned of. Its CUDA kernel, called with fake tensors: it gets as far as their memory."""
    cuda = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    backward = torch.ops.flash_attn_ext.backward.default
    with FakeTensorMode():
        q = torch.empty(2, 5, 4, TRAINING_HEAD_DIMS[0], dtype=torch.bfloat16, device="cuda")
        call = q, q, q, q, q, torch.empty(2, 4, 5, device="cuda")
        for warn_only in (False, True):
            torch.use_deterministic_algorithms(True, warn_only=warn_only)
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("error")
                    with pytest.raises(Exception) as caught:  # for want of a GPU, if of anything
                        backward.redispatch(cuda, *call)
                assert "deterministic" not in str(caught.value)
            finally:
                torch.use_deterministic_algorithms(False)
