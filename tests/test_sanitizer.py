"""A smoke subset of both passes under compute-sanitizer: no access out of bounds, no barrier misused.

Run as a script, this file is the program that the sanitizer watches.
"""

import itertools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import gpu
import pytest

pytestmark = gpu.needs_hopper
TOOLS = ["memcheck", "synccheck"]


def sanitizer():
    places = [shutil.which("compute-sanitizer"), *sorted(Path("/usr/local").glob("cuda*/bin/compute-sanitizer"))]
    return next((place for place in places if place and Path(place).exists()), None)


def watched():
    """Per row, full and causal: ragged calls, and where causal, rows that see nothing; forth and back.

    With GQA dk and dv are summed in memory here, since so few blocks leave every query head to an item of its own. With
    a KV head for each head they are stored by TMA.

    Inputs come from the CPU, so that no kernel but ours runs and costs the sanitizer time.
    """
    import torch
    from cases import ROWS, Case

    import flash_attn_ext

    for row in ROWS:
        plan = row["backward"] or row["forward"]
        for (causal, dtype), heads in itertools.product(((False, "fp16"), (True, "bf16")), (4, 2)):
            seqlen_q, seqlen_k = 2 * row["forward"]["block_q"] + 3, plan["block_kv"] + 5
            inputs = Case(row["head_dim"], dtype, seqlen_q, seqlen_k, causal, 1, heads, 2).inputs("cpu")
            q, k, v, dout = (x.cuda() for x in (*inputs, torch.ones_like(inputs[0])))
            out, lse = flash_attn_ext.forward(q, k, v, causal=causal)
            results = [out]
            if row["backward"]:
                results += flash_attn_ext.backward(dout, q, k, v, out, lse, causal=causal)
                for needs in ([True, False, False], [False, True, True]):
                    torch.ops.flash_attn_ext.backward(dout, q, k, v, out, lse, causal=causal, needs=needs)
            assert all(x.cpu().isfinite().all() for x in results) and not lse.cpu().isnan().any()
    print("all calls made")


@pytest.fixture(scope="module")
def runs():
    """Both tools at once: most of their time is the start of Python and torch."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(sys.path),
        "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",  # so that a tensor's end is an allocation's end
    }
    command = [sanitizer(), "--error-exitcode", "86", "--tool"]
    runs = {
        tool: subprocess.Popen(
            [*command, tool, sys.executable, __file__],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
        )
        for tool in TOOLS
    }
    yield runs
    for run in runs.values():
        run.kill()


@pytest.mark.skipif(sanitizer() is None, reason="no compute-sanitizer: it comes with the CUDA toolkit")
@pytest.mark.parametrize("tool", TOOLS)
def test_clean(runs, tool):
    output, _ = runs[tool].communicate(timeout=120)
    if "Device not supported" in output:
        pytest.skip(f"compute-sanitizer says of this machine: Device not supported\n{output[-1000:]}")
    assert runs[tool].returncode == 0, output[-8000:]
    assert "all calls made" in output and "ERROR SUMMARY: 0 errors" in output, output[-8000:]


if __name__ == "__main__":
    watched()
