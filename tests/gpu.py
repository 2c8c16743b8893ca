"""What tests on a GPU share."""

from contextlib import contextmanager

import pytest
import torch

import flash_attn_ext
from flash_attn_ext import limits
from flash_attn_ext.options import lse_shape

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)

needs_hopper = [pytest.mark.gpu, pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU (compute capability 9.0)")]


def on_hopper(test):
    """Decorates a single test with what needs_hopper does for a file."""
    for mark in needs_hopper:
        test = mark(test)
    return test


def needs_free(gigabytes):
    """Skips where another process, or a smaller GPU, leaves too little memory."""
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0] / 2**30
    if free < gigabytes:
        pytest.skip(f"needs {gigabytes} GiB of free GPU memory, {free:.0f} GiB are free")


def poison(*like):
    """Fills memory with NaN and frees it, so that the next tensors of these sizes are handed exactly that memory.

    What a kernel then leaves unwritten shows as NaN, where fresh memory would often be zero and look right.
    """
    sizes = [max(x.numel() * x.element_size(), 1) for x in like]
    blocks = [torch.full((size,), 0xFF, dtype=torch.uint8, device=like[0].device) for size in sizes]
    del blocks


def attend(q, k, v, *options, **options_by_name):
    """out and lse of the forward, in memory that held NaN before."""
    poison(q, q.new_empty(lse_shape(q), dtype=torch.float32))
    return flash_attn_ext.forward(q, k, v, *options, **options_by_name)


@contextmanager
def one_multiprocessor():
    """The order of work of a GPU with one, which any call fills: the forward takes the plan for few keys where lengths
    allow that and its Q blocks are not filled worse than the other plan's, and the backward's items are long and few.
    """
    flash_attn_ext._C.set_test_faults(multiprocessors=1)
    try:
        yield
    finally:
        flash_attn_ext._C.set_test_faults()


def attend_by_each_plan(q, k, v, *options, **options_by_name):
    """What `attend` returns, and behind it what it does by the plan for few keys, where lengths may allow that."""
    results = [attend(q, k, v, *options, **options_by_name)]
    short = limits.row_of(q.shape[-1])["short_forward"]
    if short and q.dim() == 4 and q.shape[1] >= short["block_q"]:
        with one_multiprocessor():
            results.append(attend(q, k, v, *options, **options_by_name))
    return results


def normal(*shape, dtype=torch.bfloat16):
    return torch.randn(shape, device="cuda", dtype=torch.float32).to(dtype)
