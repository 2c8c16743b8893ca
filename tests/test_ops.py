"""The registered operator: what torch.compile, FakeTensor, autocast, checkpointing and dispatch modes see."""

import subprocess
import sys
from functools import partial

import pytest
import torch
from cases import HEAD_DIMS, LAYOUTS, Case, both_masks
from gpu import on_hopper
from oracle import same_bits
from torch import library
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from flash_attn_ext import (
    attention_reference,
    cpu,
    flash_attn_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_qkvpacked_func,
    forward,
)

operator = torch.ops.flash_attn_ext.forward.default
each_layout = pytest.mark.parametrize("layout", LAYOUTS)


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch._dynamo.reset()


def leaves(*shapes, dtype=torch.float32):
    return [torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes]


@both_masks
@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck_on_cpu(causal, requires_grad):
    q, k, v = leaves((2, 5, 4, 8), (2, 7, 2, 8), (2, 7, 2, 8))
    inputs = [x.detach().requires_grad_(requires_grad) for x in (q, k, v)]
    sinks = torch.randn(4).requires_grad_(requires_grad)
    library.opcheck(operator, (*inputs, 0.3, causal))
    library.opcheck(operator, (*inputs,), {"causal": causal})
    library.opcheck(operator, (*inputs, None, causal, 3, 1, 20.0, True, sinks))


@on_hopper
@both_masks
@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
def test_opcheck_on_gpu(causal, layout):
    inputs = Case(128, "bf16", 130, 140, causal, heads=6, kv_heads=2, layout=layout).inputs("cuda")
    library.opcheck(operator, (*inputs, None, causal))


# Fake tensors: shapes, dtypes and strides without data ----------------------------------------------------------------


@each_layout
@pytest.mark.parametrize("seqlen", [6, 1])
def test_fake_results_are_laid_out_as_real_ones(layout, seqlen):
    inputs = Case(64, "bf16", seqlen, seqlen, heads=4, kv_heads=2, layout=layout).inputs("cpu")
    real = flash_attn_func(*inputs, return_lse=True)
    with FakeTensorMode() as mode:
        fake = flash_attn_func(*(mode.from_tensor(x) for x in inputs), return_lse=True)
    for a, b in zip(fake, real, strict=True):
        assert (a.shape, a.stride(), a.dtype, a.device) == (b.shape, b.stride(), b.dtype, b.device)


@each_layout
def test_fake_cuda_tensors_need_no_gpu(layout):
    head_dim = HEAD_DIMS[0] if HEAD_DIMS else 64
    inputs = Case(head_dim, "bf16", 6, 6, heads=4, kv_heads=2, layout=layout).inputs("cpu")
    with FakeTensorMode():
        q, k, v = (torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda") for x in inputs)
        out, lse = operator(q, k, v, None, True)
        assert (out.shape, out.stride(), out.dtype) == (q.shape, torch.empty_like(q).stride(), q.dtype)
        assert (lse.shape, lse.dtype, lse.is_contiguous()) == ((2, 4, 6), torch.float32, True)
        assert out.device.type == lse.device.type == "cuda"


def test_meta_tensors():
    q, k, v = (torch.empty(2, s, 4, 64, device="meta", dtype=torch.bfloat16) for s in (6, 9, 9))
    out, lse = flash_attn_func(q, k, v, return_lse=True)
    assert out.is_meta and out.shape == q.shape and lse.is_meta and lse.shape == (2, 4, 6)


# torch.compile --------------------------------------------------------------------------------------------------------


def attention_layer(q, k, v):
    out, lse = flash_attn_func(q * 2, k, v, causal=True, return_lse=True)
    return out + 1, lse.detach()


def test_compile_fullgraph_with_dynamic_shapes():
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph

    for backend in (count, "aot_eager"):
        torch._dynamo.reset()
        compiled = torch.compile(attention_layer, fullgraph=True, dynamic=True, backend=backend)
        for batch, seqlen_q, seqlen_k in ((2, 17, 23), (3, 30, 9), (4, 8, 8)):
            inputs = [torch.randn(batch, s, 4, 16) for s in (seqlen_q, seqlen_k, seqlen_k)]
            for a, b in zip(compiled(*inputs), attention_layer(*inputs), strict=True):
                assert same_bits(a, b)
    assert len(graphs) == 1, "one graph serves all shapes"
    assert operator in [node.target for node in graphs[0].graph.nodes]


def test_compile_with_gradients():
    compiled = torch.compile(attention_layer, fullgraph=True, dynamic=True, backend="aot_eager")
    inputs = leaves((2, 9, 4, 8), (2, 13, 2, 8), (2, 13, 2, 8), dtype=torch.float64)
    gradients = [torch.autograd.grad(function(*inputs)[0].sum(), inputs) for function in (compiled, attention_layer)]
    torch.testing.assert_close(*gradients)


def test_compile_with_keywords_of_other_functions():
    attention = partial(flash_attn_func, dropout_p=0.0, window_size=(-1, -1), num_splits=1)
    q, k, v = (torch.randn(2, 5, 4, 8) for _ in range(3))
    compiled = torch.compile(attention, fullgraph=True, backend="eager")
    assert same_bits(compiled(q, k, v), flash_attn_func(q, k, v))


def test_export_keeps_the_operator():
    class Layer(torch.nn.Module):
        def forward(self, q, k, v):
            return flash_attn_func(q, k, v, causal=True)

    program = torch.export.export(Layer(), tuple(torch.randn(2, 5, 4, 8) for _ in range(3)))
    assert operator in [node.target for node in program.graph.nodes]


# Dispatch modes and subclasses ----------------------------------------------------------------------------------------


class Record(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.called = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.called.append(function)
        return function(*args, **(kwargs or {}))


def test_a_dispatch_mode_sees_the_operator():
    q, k, v = (torch.randn(2, 5, 4, 8) for _ in range(3))
    with Record() as mode:
        flash_attn_func(q, k, v)
    assert operator in mode.called


def test_selective_checkpoint_can_save_attention():
    def policy(context, function, *args, **kwargs):
        return CheckpointPolicy.MUST_SAVE if function is operator else CheckpointPolicy.PREFER_RECOMPUTE

    q, k, v = leaves((1, 5, 2, 8), (1, 5, 2, 8), (1, 5, 2, 8), dtype=torch.float64)
    contexts = partial(create_selective_checkpoint_contexts, policy)

    def layer(q, k, v):
        return flash_attn_func(q.sin(), k, v, causal=True).cos()

    out = checkpoint(layer, q, k, v, use_reentrant=False, context_fn=contexts)
    with Record() as recomputed:
        gradients = torch.autograd.grad(out.sum(), (q, k, v))
    assert torch.ops.aten.sin.default in recomputed.called and operator not in recomputed.called
    torch.testing.assert_close(gradients, torch.autograd.grad(layer(q, k, v).sum(), (q, k, v)))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint(use_reentrant):
    q, k, v = leaves((1, 5, 2, 8), (1, 5, 2, 8), (1, 5, 2, 8), dtype=torch.float64)
    out = checkpoint(flash_attn_func, q, k, v, use_reentrant=use_reentrant)
    gradients = torch.autograd.grad(out.sum(), (q, k, v)) if not use_reentrant else None
    if use_reentrant:
        out.sum().backward()
        gradients = (q.grad, k.grad, v.grad)
    torch.testing.assert_close(gradients, torch.autograd.grad(flash_attn_func(q, k, v).sum(), (q, k, v)))


class Subclass(torch.Tensor):
    called = []

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        cls.called.append(function)
        return super().__torch_function__(function, types, args, kwargs or {})


def test_a_tensor_subclass_sees_the_operator():
    q, k, v = (torch.randn(1, 5, 2, 8) for _ in range(3))
    Subclass.called.clear()
    out = flash_attn_func(q.as_subclass(Subclass), k, v)
    assert operator in Subclass.called and isinstance(out, Subclass)


# Autograd and autocast ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("needed", ["q", "k", "v", "qk", "kv", "qkv"])
def test_only_the_needed_gradients(needed):
    tensors = {name: torch.randn(1, 5, 2, 8, dtype=torch.float64, requires_grad=name in needed) for name in "qkv"}
    flash_attn_func(*tensors.values(), causal=True).sum().backward()
    assert {name for name, x in tensors.items() if x.grad is not None} == set(needed)


def test_expanded_and_strided_dout():
    q, k, v = leaves((2, 5, 4, 8), (2, 5, 4, 8), (2, 5, 4, 8), dtype=torch.float64)
    out = flash_attn_func(q, k, v)
    strided = torch.randn(8, 4, 5, 2, dtype=torch.float64).permute(3, 2, 1, 0)
    for dout in (torch.ones(1, 1, 1, 1, dtype=torch.float64).expand_as(out), strided):
        ours = torch.autograd.grad(out, (q, k, v), dout, retain_graph=True)
        torch.testing.assert_close(ours, torch.autograd.grad(out, (q, k, v), dout.contiguous(), retain_graph=True))


def attention_of_leaves():
    inputs = leaves((1, 5, 2, 8), (1, 5, 2, 8), (1, 5, 2, 8), dtype=torch.float64)
    return inputs, *flash_attn_func(*inputs, return_lse=True)


LOSSES = {
    "out": lambda out, lse: out.square().sum(),
    "lse": lambda out, lse: lse.square().sum(),
    "both": lambda out, lse: out.square().sum() + (lse * torch.arange(lse.shape[-1])).sum(),
    "gated": lambda out, lse: (out * torch.sigmoid(lse - 1).transpose(1, 2).unsqueeze(-1)).square().sum(),
}
each_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())


@each_loss
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_loss_may_use_lse(loss, compiled):
    def attend(q, k, v, sinks):
        return flash_attn_func(q, k, v, causal=True, sinks=sinks, return_lse=True)

    inputs = leaves((2, 7, 4, 8), (2, 9, 2, 8), (2, 9, 2, 8), (4,), dtype=torch.float64)
    if compiled:
        attend = torch.compile(attend, fullgraph=True, dynamic=True, backend="aot_eager")
    gradients = torch.autograd.grad(loss(*attend(*inputs)), inputs)
    q, k, v, sinks = inputs
    expected = torch.autograd.grad(
        loss(*attention_reference(q, k, v, causal=True, sinks=sinks)), inputs, materialize_grads=True
    )
    torch.testing.assert_close(gradients, expected, rtol=1e-5, atol=1e-6)  # lse and its gradient are float32


def test_a_loss_may_use_lse_without_its_gradient():
    inputs, out, lse = attention_of_leaves()
    gradients = torch.autograd.grad((out * lse.detach().mean()).sum(), inputs)
    dout = torch.full_like(out, lse.mean().item())
    torch.testing.assert_close(gradients, torch.autograd.grad(flash_attn_func(*inputs), inputs, dout))


@pytest.mark.parametrize("loss", [torch.sum, lambda out: out.square().sum()], ids=["sum", "square"])
def test_second_derivatives_are_refused_not_forgotten(loss):
    q, k, v = leaves((1, 5, 2, 8), (1, 5, 2, 8), (1, 5, 2, 8), dtype=torch.float64)
    for result in flash_attn_func(q, k, v, return_lse=True):
        (gradient,) = torch.autograd.grad(loss(result), q, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            gradient.sum().backward()


WAYS_TO_THE_BACKWARD = """
import sys
import torch
from torch._dynamo import compiled_autograd
if not {binary}:
    sys.modules["flash_attn_ext._C"] = None  # importing it fails, as where it was not built
from flash_attn_ext import backward, cpu, flash_attn_func, forward
from flash_attn_ext.ops import backward as operator

asked, of_cpu = [], cpu.backward


def watched(dout, q, k, v, out, lse, options, dlse=None):
    asked.append(options.deterministic)
    return of_cpu(dout, q, k, v, out, lse, options, dlse)


cpu.backward = watched
q, k, v = (torch.randn(1, 5, 2, 8).requires_grad_() for _ in range(3))


def attend(deterministic):
    return flash_attn_func(q * 2, k, v, causal=True, deterministic=deterministic)


def by_autograd(deterministic):
    attend(deterministic).sum().backward()


def by_compiled_code(deterministic):
    torch.compile(attend, fullgraph=True, backend="aot_eager")(deterministic).sum().backward()


def by_compiled_autograd(deterministic):
    loss = attend(deterministic).sum()
    with compiled_autograd._enable(torch.compile(fullgraph=True, backend="eager")):
        loss.backward()


@torch.no_grad()
def by_function(deterministic, of=backward):
    of(q, q, k, v, *forward(q, k, v), deterministic=deterministic)


ways = {{
    "autograd": by_autograd,
    "autograd under autocast": torch.autocast("cpu", torch.bfloat16)(by_autograd),
    "compiled code": by_compiled_code,
    "compiled autograd": by_compiled_autograd,
    "the function": by_function,
    "the operator": lambda deterministic: by_function(deterministic, operator),
}}
for name, way in ways.items():
    for deterministic in (True, False):
        way(deterministic)
        assert asked == [deterministic], (name, asked)
        asked.clear()
print(list(ways))
"""


@pytest.mark.parametrize("binary", [True, False], ids=["compiled", "python"])
def test_deterministic_gets_to_the_backward(binary):
    """However it is called, with autograd in C++ and in Python. In processes of their own: a module is loaded once."""
    code = WAYS_TO_THE_BACKWARD.format(binary=binary)
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "compiled autograd" in done.stdout, done.stderr


@pytest.mark.parametrize("deterministic", [True, False])
def test_every_public_function_hands_deterministic_on(deterministic, monkeypatch):
    asked, of_cpu = [], cpu.backward

    def watched(dout, q, k, v, out, lse, options, *others):
        asked.append(options.deterministic)
        return of_cpu(dout, q, k, v, out, lse, options, *others)

    monkeypatch.setattr(cpu, "backward", watched)
    qkv = torch.randn(9, 3, 2, 8, requires_grad=True)
    edges = torch.tensor([0, 4, 9], dtype=torch.int32)
    for attend, arguments in (
        (flash_attn_func, qkv[None].unbind(2)),
        (flash_attn_qkvpacked_func, [qkv[None]]),
        (flash_attn_varlen_func, [*qkv.unbind(1), edges, edges]),
        (flash_attn_varlen_qkvpacked_func, [qkv, edges]),
        (lambda *qkv, **options: forward(*qkv, **options)[0], qkv[None].unbind(2)),
    ):
        attend(*arguments, deterministic=deterministic).sum().backward()
        assert set(asked) == {deterministic}, attend
        asked.clear()


TRANSFORMS = """
import sys
import torch
from torch import func
from torch.autograd import forward_ad
if not {binary}:
    sys.modules["flash_attn_ext._C"] = None  # importing it fails, as where it was not built
from flash_attn_ext import attention_reference, flash_attn_func

q, k, v, tangent = (torch.randn(1, 4, 2, 8, dtype=torch.float64) for _ in range(4))


def loss(q, attention=flash_attn_func):
    return attention(q, k, v).square().sum()


def by_dual_tensor():
    with forward_ad.dual_level():
        loss(forward_ad.make_dual(q, tangent))


refused = {{
    "jvp": lambda: func.jvp(loss, (q,), (tangent,)),
    "dual tensor": by_dual_tensor,
    "grad": lambda: func.grad(loss)(q),
    "vjp": lambda: func.vjp(loss, q),
    "jacrev": lambda: func.jacrev(loss)(q),
    "vmap of grad": lambda: func.vmap(func.grad(loss))(q[None]),
    "grad of vmap": lambda: func.grad(lambda q: func.vmap(loss)(q[None]).sum())(q),
}}
for name, differentiate in refused.items():
    try:
        differentiate()
    except NotImplementedError as refusal:
        print(name, "-", refusal)

# What needs no derivative of attention runs, and so does the way out.
func.vmap(loss)(q[None])
func.grad(lambda x: (x * flash_attn_func(q, k, v)).sum())(q)
leaf = q.clone().requires_grad_()
loss(leaf).backward()
of_reference = func.vmap(func.grad(lambda q: loss(q, lambda *inputs: attention_reference(*inputs)[0])))(q[None])
torch.testing.assert_close(of_reference[0], leaf.grad)
"""


@pytest.mark.parametrize("binary", [True, False], ids=["compiled", "python"])
def test_transforms_are_refused(binary):
    """A derivative must not vanish silently. In processes of their own: a module is loaded once."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", TRANSFORMS.format(binary=binary)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    forward_mode, reverse_mode = ("no forward-mode derivative (jvp)", "cannot be differentiated by torch.func's")
    texts = [line.split(" - ") for line in done.stdout.splitlines()]
    assert [name for name, text in texts if forward_mode in text] == ["jvp", "dual tensor"]
    assert [name for name, text in texts if reverse_mode in text] == [
        *("grad", "vjp", "jacrev", "vmap of grad", "grad of vmap")
    ]
    assert all("attention_reference" in text for _, text in texts)


@pytest.mark.parametrize("given", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast_casts_what_it_may(given, dtype):
    inputs = [torch.randn(1, 5, 2, 8).to(given) for _ in range(3)]
    cast = [x if given == torch.float64 else x.to(dtype) for x in inputs]
    expected = flash_attn_func(*cast, causal=True, return_lse=True)
    with torch.autocast("cpu", dtype=dtype):
        for results in (flash_attn_func(*inputs, causal=True, return_lse=True), operator(*inputs, None, True)):
            assert all(same_bits(a, b) for a, b in zip(results, expected, strict=True))
    with torch.autocast("cpu", dtype=dtype, enabled=False):
        assert flash_attn_func(*inputs).dtype == given


def test_autocast_casts_gradients_back():
    inputs = leaves((1, 5, 2, 8), (1, 5, 2, 8), (1, 5, 2, 8))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = flash_attn_func(*inputs)
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert all(x.grad.dtype == torch.float32 for x in inputs)


def test_autocast_evens_out_mixed_dtypes():
    q, k, v = torch.randn(1, 5, 2, 8), torch.randn(1, 5, 2, 8).bfloat16(), torch.randn(1, 5, 2, 8).half()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert flash_attn_func(q, k, v).dtype == torch.bfloat16
