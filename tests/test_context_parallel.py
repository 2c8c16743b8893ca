"""Torch's context parallelism, ring attention over the processes of a group, on the kernels of flash_attn_ext.sdpa:
results and gradients are those of one process. On CPU tensors by gloo, on GPUs by NCCL.

Run as a script by torchrun, this file is one of the processes.
"""

import contextlib
import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from cases import needs_kernels
from gpu import on_hopper
from test_documents import TORCH_ABORTS, program
from torch.nn.attention import SDPBackend, sdpa_kernel

import flash_attn_ext

pytestmark = [
    needs_kernels,
    pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed"),
]

SEQLEN = {"cpu": 48, "cuda": 2048}
HEADS, HEAD_DIM = 4, 64
aten = torch.ops.aten


def flash(q, k, v, causal):
    return aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal)[0]


def cudnn(q, k, v, causal):
    return aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, causal)[0]


def on_cpu(operator):
    """On CPU tensors F.scaled_dot_product_attention calls an operator that has no ring: one that has is called here as
    it would be on a GPU, with the tensors that context_parallel makes."""

    def attend(mesh, q, k, v, causal):
        from torch.distributed.tensor import DTensor, Shard

        return operator(*(DTensor.from_local(x, mesh, [Shard(2)]) for x in (q, k, v)), causal).to_local()

    return attend


def on_gpu(backend):
    def attend(mesh, q, k, v, causal):
        with sdpa_kernel(backend) if backend else contextlib.nullcontext():
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=k.shape[1] < HEADS)

    return attend


WAYS = {
    "cpu": {"flash": on_cpu(flash), "cudnn": on_cpu(cudnn)},
    "cuda": {"torch's choice": on_gpu(None), "flash": on_gpu(SDPBackend.FLASH_ATTENTION)},
}


def in_a_ring(mesh, attend, q, k, v, dout, causal):
    """out and the gradients, whole; each process computes its part of the sequence."""
    from torch.distributed.tensor.experimental import context_parallel
    from torch.distributed.tensor.experimental._attention import context_parallel_unshard

    buffers = [x.clone() for x in (q, k, v, dout)]
    with context_parallel(mesh, buffers=buffers, buffer_seq_dims=[2] * 4):
        parts = [x.clone().requires_grad_() for x in buffers[:3]]
        out = attend(mesh, *parts, causal)
        gradients = torch.autograd.grad(out, parts, buffers[3])
        return context_parallel_unshard(mesh, [out.detach(), *gradients], [2] * 4)


def alone(q, k, v, dout, causal):
    q, k, v = (x.clone().requires_grad_() for x in (q, k, v))
    out = flash_attn_ext.flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v)), causal=causal).transpose(1, 2)
    return out.detach(), *torch.autograd.grad(out, (q, k, v), dout)


def compare(part, whole, what):
    if part.dtype == torch.float32:
        return torch.testing.assert_close(part, whole, msg=lambda text: f"{what}: {text}")
    difference = torch.linalg.vector_norm(part.float() - whole.float()) / torch.linalg.vector_norm(whole.float())
    assert difference < 2.0**-7, f"{what}: more than the roundings of bfloat16, {difference:.2%}"


def one_of_the_processes(device_type):
    from torch.distributed.tensor.experimental._attention import _cp_options, set_rotate_method

    torch.set_num_threads(1)
    if device_type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group({"cpu": "gloo", "cuda": "nccl"}[device_type])
    mesh = dist.init_device_mesh(device_type, (dist.get_world_size(),))
    dtype = {"cpu": torch.float32, "cuda": torch.bfloat16}[device_type]
    rings = itertools.product(
        WAYS[device_type], ("allgather", "alltoall"), ((True, True), (True, False), (False, False)), (HEADS, HEADS // 2)
    )
    count = 0
    with flash_attn_ext.sdpa():
        for name, method, (causal, balanced), kv_heads in rings:
            set_rotate_method(method)
            _cp_options.enable_load_balance = balanced
            torch.manual_seed(count)  # the same in all processes
            sizes = [(2, heads, SEQLEN[device_type], HEAD_DIM) for heads in (HEADS, kv_heads, kv_heads, HEADS)]
            tensors = [torch.randn(size).to(device_type, dtype) for size in sizes]
            results = in_a_ring(mesh, WAYS[device_type][name], *tensors, causal)
            for x, part, whole in zip(("out", "dq", "dk", "dv"), results, alone(*tensors, causal), strict=True):
                compare(part, whole, (x, name, method, causal, balanced, kv_heads))
            count += 1
    dist.barrier()
    dist.destroy_process_group()
    print(f"rank {os.environ['RANK']} agrees {count} times", flush=True)


BENCHMARK = Path(__file__).parents[1] / "benchmarks" / "context_parallel.py"


def run(processes, *arguments):
    """The output of all processes."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(sys.path),
        "NCCL_NVLS_ENABLE": "0",  # NVLink multicast is nothing that this needs, and not every machine has it
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [*launcher, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=140,
        env=environment,
    )
    # On a busy machine processes of torch.distributed now and then abort while they end, after their work is done.
    assert done.returncode == 0 or TORCH_ABORTS in done.stdout, done.stdout[-8000:]
    return done.stdout


def assert_agreement(device_type, processes):
    output = run(processes, __file__, device_type)
    assert all(f"rank {rank} agrees 24 times" in output for rank in range(processes)), output[-8000:]


def skip_without(gpus):
    if torch.cuda.device_count() < gpus:
        pytest.skip(f"needs {gpus} GPUs")


@pytest.mark.parametrize("processes", [2, 4])
def test_a_ring_of_processes_computes_what_one_does(processes):
    assert_agreement("cpu", processes)


def test_the_benchmark_on_processes():
    output = run(2, str(BENCHMARK), "--device", "cpu", "--seqlen", "64", "--head-dim", "32", "--rounds", "2")
    differences = re.findall(r"flash_attn_ext, all\w+ .* (\d\.\de-\d\d)", output)
    assert "2 processes, B 1, S 64, H 32/8, D 32" in output
    assert len(differences) == 2 and all(float(x) < 1e-6 for x in differences), output


@on_hopper
@pytest.mark.parametrize("processes", [2, 4])
def test_a_ring_of_gpus_computes_what_one_does(processes):
    skip_without(processes)
    assert_agreement("cuda", processes)


FLASH = """
import torch.nn.functional as F


def scaled_dot_product_attention(q, k, v, is_causal, enable_gqa):
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal)[0]

F.scaled_dot_product_attention = scaled_dot_product_attention
"""


def assert_small_difference(folder, text):
    (folder / "context_parallel.py").write_text(text)
    output = run(2, str(folder / "context_parallel.py"))
    (difference,) = re.findall(r"^largest difference to one GPU: (\S+)$", output, re.MULTILINE)
    assert 0 < float(difference) < 2.0**-4, "more than the roundings of bfloat16 near 4, of which there are four"


def test_the_documents_program_on_processes(tmp_path):
    """On CPU tensors, with F.scaled_dot_product_attention as it is on a GPU: as the operator that has a ring."""
    text = program("context_parallel.py").replace('"cuda"', '"cpu"').replace('"nccl"', '"gloo"')
    text = text.replace("import torch.nn.functional as F\n", FLASH).replace("32768", "256")
    assert_small_difference(tmp_path, re.sub(r"^torch.cuda.set_device.*", "", text, flags=re.MULTILINE))


@on_hopper
def test_the_documents_program(tmp_path):
    skip_without(2)
    assert_small_difference(tmp_path, program("context_parallel.py"))


if __name__ == "__main__":
    one_of_the_processes(sys.argv[1])
