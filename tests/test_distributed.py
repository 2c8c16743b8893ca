"""Data parallel training on two GPUs: one step of DDP, and of FSDP2, is that of one GPU on the whole batch.

Run as a script by torchrun, this file is one of the two processes.
"""

import os
import subprocess
import sys

import gpu
import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from flash_attn_ext import flash_attn_func

pytestmark = [
    *gpu.needs_hopper,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
    pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed"),
]

HEADS, HEAD_DIM, WIDTH = 4, 64, 128


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = torch.nn.Linear(WIDTH, 3 * HEADS * HEAD_DIM)
        self.out = torch.nn.Linear(HEADS * HEAD_DIM, WIDTH)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, HEAD_DIM)).unbind(2)
        return x + self.out(flash_attn_func(q, k, v, causal=True).flatten(2))


def model():
    torch.manual_seed(0)
    return torch.nn.Sequential(Block(), Block()).cuda()


def train_a_step(module, x, wanted):
    """One step of SGD; returns the parameters after it, whole."""
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        out = module(x)
    (out.float() - wanted).square().mean().backward()
    optimizer.step()
    parameters = (x.detach() for x in module.parameters())
    return [x.full_tensor() if isinstance(x, DTensor) else x for x in parameters]


def ddp(rank):
    return DistributedDataParallel(model(), device_ids=[rank])


def fsdp2(rank):
    sharded = model()
    for block in sharded:
        fully_shard(block)
    return fully_shard(sharded)


WAYS = {"ddp": ddp, "fsdp2": fsdp2}


def one_of_two_processes(way):
    rank = int(os.environ["LOCAL_RANK"])
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)

    torch.manual_seed(1)
    batch = [torch.randn(8, 300, WIDTH, device="cuda") for _ in range(2)]  # the same in both processes
    before = [x.detach().clone() for x in model().parameters()]
    alone = train_a_step(model(), *batch)
    half = [x.chunk(2)[rank] for x in batch]
    together = train_a_step(WAYS[way](rank), *half)

    for first, a, b in zip(before, alone, together, strict=True):
        distance = (torch.linalg.vector_norm(a - b) / torch.linalg.vector_norm(a - first)).item()
        assert distance < 2**-7, f"{way}, rank {rank}: more than the roundings of bfloat16 sums, {distance:.2%}"
    dist.barrier()
    dist.destroy_process_group()
    print(f"rank {rank} agrees")


@pytest.mark.parametrize("way", WAYS)
def test_a_step_on_two_gpus_is_that_of_one(way):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(sys.path),
        "NCCL_NVLS_ENABLE": "0",  # NVLink multicast is nothing that two GPUs need, and not every machine has it
        "OMP_NUM_THREADS": "1",
    }
    run = subprocess.run(
        [*launcher, __file__, way],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
        env=environment,
    )
    assert run.returncode == 0, run.stdout[-8000:]
    assert "rank 0 agrees" in run.stdout and "rank 1 agrees" in run.stdout


if __name__ == "__main__":
    one_of_two_processes(sys.argv[1])
