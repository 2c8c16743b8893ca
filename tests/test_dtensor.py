"""flash_attn_ext.adapters.dtensor: attention of DTensors on two processes is that of one process on the whole tensors.

Run as a script by torchrun, this file is one of the two processes: of CPU tensors, or with a GPU each.
"""

import copy
import os
import subprocess
import sys
import traceback
from functools import cache
from types import SimpleNamespace

import gpu
import pytest
import torch
import torch.distributed as dist

import flash_attn_ext

if not dist.is_available():
    pytest.skip("this torch has no torch.distributed", allow_module_level=True)

from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh  # noqa: E402
from torch.distributed.tensor.debug import CommDebugMode  # noqa: E402
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module  # noqa: E402

from flash_attn_ext.adapters import dtensor  # noqa: E402

HEADS, KV_HEADS, HEAD_DIM, WIDTH = 4, 2, 64, 128
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
DEVICE = "cpu"  # or "cuda", in processes of their own


def as_kernels_take_it(x):
    return x if DEVICE == "cpu" else x.to(torch.bfloat16)


def inputs(*rows, heads=HEADS, kv_heads=KV_HEADS):
    """q, k and v, the same in both processes."""
    return [as_kernels_take_it(torch.randn(*rows, n, HEAD_DIM, device=DEVICE)) for n in (heads, kv_heads, kv_heads)]


def logits():
    """Sinks."""
    return torch.randn(HEADS, device=DEVICE)


def lengths(*values):
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


@cache  # newer versions of torch trace equal meshes as different ones
def mesh():
    return init_device_mesh(DEVICE, (2,))


def assert_same(result, expected, name):
    """Within roundings: the kernels' sums may be taken in another order."""
    assert result.shape == expected.shape, name
    is_finite = expected.isfinite()  # the lse of rows that see no key is not
    assert torch.equal(result.isfinite(), is_finite), name
    result, expected = (x[is_finite].double() for x in (result, expected))
    distance = torch.linalg.vector_norm(result - expected) / torch.linalg.vector_norm(expected)
    assert distance < (1e-6 if DEVICE == "cpu" else 2**-7), f"{name}: {distance:.2e}"


def check(q, k, v, placement, *, becomes=None, silent=True, **options):
    """out, lse and all gradients of a call whose q, k, v and sinks are sharded so. placement: of q; k, v and sinks
    have its kind. becomes: out's placement; silent: nothing is sent."""
    becomes = placement if becomes is None else becomes
    of_heads = placement == Shard(q.dim() - 2)
    whole = {"q": q, "k": k, "v": v} | ({"sinks": options.pop("sinks")} if "sinks" in options else {})
    others = {name: value for name, value in options.items() if isinstance(value, torch.Tensor)}
    numbers = {name: value for name, value in options.items() if name not in others}
    douts = torch.randn_like(q), torch.randn(*q.shape[:-3], q.shape[-2], q.shape[-3], device=DEVICE)

    def attend(inputs, others):
        function = flash_attn_ext.flash_attn_varlen_func if others else flash_attn_ext.flash_attn_func
        return function(**inputs, **others, **numbers, return_lse=True)

    alone = {name: x.clone().requires_grad_() for name, x in whole.items()}
    expected = attend(alone, others)
    expected_gradients = torch.autograd.grad(expected, list(alone.values()), douts)

    def sharded(name, x):
        if name == "sinks":
            return distribute_tensor(x, mesh(), [Shard(0) if of_heads else Replicate()])
        return distribute_tensor(x, mesh(), [placement])

    spread = {name: sharded(name, x).requires_grad_() for name, x in whole.items()}
    of_batch = [placement if not of_heads and q.dim() == 4 else Replicate()]
    others = {name: distribute_tensor(x, mesh(), of_batch) for name, x in others.items()}
    with CommDebugMode() as sent:
        results = attend(spread, others)
    assert (sent.get_total_counts() == 0) == silent, sent.get_comm_counts()
    assert results[0].placements == (becomes,), results[0].placements
    shards_of_lse = {Shard(q.dim() - 2): Shard(q.dim() - 3)}.get(becomes, becomes)
    assert results[1].placements == (shards_of_lse,)
    of_results = [distribute_tensor(x, mesh(), y.placements) for x, y in zip(douts, results, strict=True)]
    with CommDebugMode() as sent:
        gradients = torch.autograd.grad(results, list(spread.values()), of_results)
    assert (sent.get_total_counts() == 0) == silent, sent.get_comm_counts()
    assert len(gradients) == len(expected_gradients) == len(whole)
    for name, result, right in zip(
        ("out", "lse", *whole), (*results, *gradients), (*expected, *expected_gradients), strict=True
    ):
        assert isinstance(result, DTensor), name
        assert_same(result.full_tensor(), right, name)


def heads():
    check(*inputs(2, 40), Shard(2), causal=True)


def heads_with_sinks_and_options():
    check(*inputs(2, 40), Shard(2), causal=True, sinks=logits(), window_size=(9, 0), softcap=5.0)


def batch():
    check(*inputs(2, 40), Shard(0), causal=True)


def batch_with_sinks():
    """Their gradient is a sum over both processes."""
    check(*inputs(2, 40), Shard(0), sinks=logits())


def batch_that_does_not_divide():
    check(*inputs(3, 40), Shard(0), causal=True)


def batch_with_used_lengths():
    check(*inputs(2, 40), Shard(0), seqused_q=lengths(40, 17), seqused_k=lengths(31, 17), causal=True)


def replicated():
    check(*inputs(2, 40), Replicate(), causal=True)


def heads_that_do_not_divide():
    """3 KV heads cannot be halved: everything is gathered, and the result is whole."""
    gathered = {"becomes": Replicate(), "silent": False}
    check(*inputs(1, 40, heads=6, kv_heads=3), Shard(2), **gathered, causal=True)


def queries_in_parts():
    """A sequence is not split."""
    check(*inputs(1, 40, kv_heads=1), Shard(1), becomes=Replicate(), silent=False, causal=True)


def packed():
    edges = lengths(0, 7, 7, 40)
    check(*inputs(40), Shard(1), cu_seqlens_q=edges, cu_seqlens_k=edges, causal=True)


def packed_with_sinks_and_used_lengths():
    edges = {"cu_seqlens_q": lengths(0, 9, 40), "cu_seqlens_k": lengths(0, 20, 40)}
    check(*inputs(40), Shard(1), **edges, seqused_k=lengths(15, 20), sinks=logits())


def packed_rows_in_parts():
    """Rows of packed sequences are no batch."""
    edges = lengths(0, 7, 40)
    gathered = {"becomes": Replicate(), "silent": False}
    check(*inputs(40, kv_heads=1), Shard(0), **gathered, cu_seqlens_q=edges, cu_seqlens_k=edges, causal=True)


def some_gradients():
    """Those that are not needed have no elements, and are asked for nowhere."""
    q, k, v = inputs(2, 40)
    dout = torch.ones_like(q)
    k.requires_grad_()
    (right,) = torch.autograd.grad(flash_attn_ext.flash_attn_func(q, k, v), k, dout)
    spread = [distribute_tensor(x.detach(), mesh(), [Shard(2)]) for x in (q, k, v)]
    spread[1].requires_grad_()
    out = flash_attn_ext.flash_attn_func(*spread)
    (gradient,) = torch.autograd.grad(out, spread[1], distribute_tensor(dout, mesh(), [Shard(2)]))
    assert_same(gradient.full_tensor(), right, "k")


def compiled():
    """One graph, with the operator in it."""
    q, k, v = inputs(2, 40)
    attend = torch.compile(
        lambda *x: flash_attn_ext.flash_attn_func(*x, causal=True), backend="aot_eager", fullgraph=True
    )
    spread = [distribute_tensor(x, mesh(), [Shard(2)]).requires_grad_() for x in (q, k, v)]
    out = attend(*spread)
    assert out.placements == (Shard(2),)
    alone = [x.requires_grad_() for x in (q, k, v)]
    expected = flash_attn_ext.flash_attn_func(*alone, causal=True)
    assert_same(out.full_tensor(), expected, "out")
    gradients = torch.autograd.grad(out.full_tensor().square().sum(), spread)
    expected = torch.autograd.grad(expected.square().sum(), alone)
    for name, result, right in zip("qkv", gradients, expected, strict=True):
        assert_same(result.full_tensor(), right, name)


def two_dimensions():
    """A mesh for batch and heads, of which only the second has two processes here."""
    both = init_device_mesh(DEVICE, (1, 2))
    q, k, v = inputs(2, 40)
    spread = [distribute_tensor(x, both, [Shard(0), Shard(2)]) for x in (q, k, v)]
    out = flash_attn_ext.flash_attn_func(*spread, causal=True)
    assert out.placements == (Shard(0), Shard(2))
    assert_same(out.full_tensor(), flash_attn_ext.flash_attn_func(q, k, v, causal=True), "out")


class Attention(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.q = torch.nn.Linear(WIDTH, HEADS * HEAD_DIM)
        self.k, self.v = (torch.nn.Linear(WIDTH, KV_HEADS * HEAD_DIM) for _ in range(2))
        self.out = torch.nn.Linear(HEADS * HEAD_DIM, WIDTH)

    def forward(self, x):
        q, k, v = (as_kernels_take_it(layer(x)).unflatten(-1, (-1, HEAD_DIM)) for layer in (self.q, self.k, self.v))
        return self.out(flash_attn_ext.flash_attn_func(q, k, v, causal=True).flatten(2).to(x.dtype))


def of_a_model(use_local_output):
    """Split by columns and rows, with the heads of a process as plain tensors, or as DTensors."""
    x, module = torch.randn(2, 40, WIDTH, device=DEVICE), Attention().to(DEVICE)
    modules = [module, copy.deepcopy(module)]
    plan = {name: ColwiseParallel(use_local_output=use_local_output) for name in "qkv"} | {"out": RowwiseParallel()}
    spread = parallelize_module(modules[1], mesh(), plan)
    outs = [module(x) for module in modules]
    assert_same(outs[1], outs[0], "out")
    for out in outs:
        out.square().sum().backward()
    for (name, right), result in zip(modules[0].named_parameters(), spread.parameters(), strict=True):
        if name != "k.bias":  # 0, but for roundings: it moves all scores of a query alike
            assert_same(result.grad.full_tensor(), right.grad, name)


def local_heads_of_a_model():
    of_a_model(use_local_output=True)


def dtensors_of_a_model():
    of_a_model(use_local_output=False)


CASES = {
    case.__name__: case
    for case in (
        *(heads, heads_with_sinks_and_options, batch, batch_with_sinks, batch_that_does_not_divide),
        *(batch_with_used_lengths, replicated, heads_that_do_not_divide, queries_in_parts),
        *(packed, packed_with_sinks_and_used_lengths, packed_rows_in_parts, some_gradients, compiled, two_dimensions),
        *(local_heads_of_a_model, dtensors_of_a_model),
    )
}


def one_of_two_processes():
    if DEVICE == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if DEVICE == "cuda" else "gloo")
    dtensor.register()
    dtensor.register()
    for name, case in CASES.items():
        torch.manual_seed(0)  # both draw the same
        try:
            case()
            print(f"{name}: rank {dist.get_rank()} agrees", flush=True)
        except Exception:  # the others still run
            print(f"{name}: rank {dist.get_rank()}\n{traceback.format_exc()}", flush=True)
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(
    scope="module",
    params=[
        "cpu",
        pytest.param(
            "cuda",
            marks=[*gpu.needs_hopper, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")],
        ),
    ],
)
def printed(request):
    """What two processes print, which take all cases one after the other: they start for longer than they run."""
    environment = ENVIRONMENT | {
        "NCCL_NVLS_ENABLE": "0",  # NVLink multicast is nothing that two GPUs need, and not every machine has it
        "OMP_NUM_THREADS": "1",
    }
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    run = subprocess.run(
        [*launcher, __file__, request.param],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
        env=environment,
    )
    return run.stdout


@pytest.mark.parametrize("case", CASES)
def test_two_processes_are_one(printed, case):
    assert all(f"{case}: rank {rank} agrees" in printed for rank in (0, 1)), printed[-20000:]


@pytest.mark.parametrize(
    ("mesh", "kv_heads", "divides"),
    [
        ((2,), 2, True),
        ((2,), 3, False),
        ((4,), 2, False),
        ((8, 4), 8, True),  # over one of its dimensions; over both, DTensor makes no more shards than there are heads
        ((2, 4), 8, True),
        ((3, 4), 8, False),
        ((2, 3), 6, True),
        ((2, 2), 6, False),
    ],
)
def test_heads_are_split_where_each_shard_has_as_many(mesh, kv_heads, divides):
    assert dtensor._divides(SimpleNamespace(shape=mesh, ndim=len(mesh)), kv_heads) == divides


def test_importing_the_package_or_the_adapter_imports_no_dtensor():
    program = """
import sys, torch, flash_attn_ext.adapters.dtensor
assert "torch.distributed.tensor" not in sys.modules
"""
    subprocess.run(
        [sys.executable, "-c", program], check=True, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    )


if __name__ == "__main__":
    DEVICE = sys.argv[1]
    one_of_two_processes()
