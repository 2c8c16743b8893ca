"""A smoke subset of both passes under compute-sanitizer: no access out of bounds, no barrier misused. It runs by itself
too, for machines where there is no sanitizer.

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
ALONE = "alone"


def sanitizer():
    places = [shutil.which("compute-sanitizer"), *sorted(Path("/usr/local").glob("cuda*/bin/compute-sanitizer"))]
    return next((place for place in places if place and Path(place).exists()), None)


def watched():
    """Per row, full and causal, with softcap and without: ragged calls, and where causal, rows that see nothing; forth
    and back.

    With GQA dk and dv are summed in memory here, since so few blocks leave every query head to an item of its own. With
    a KV head for each head they are stored by TMA. Both at the row's smallest head dim too, where tiles are filled up.

    Inputs come from the CPU, so that no kernel but ours runs and costs the sanitizer time.
    """
    import torch
    from cases import ROWS, Case

    import flash_attn_ext

    for row in ROWS:
        plan = row["backward"] or row["forward"]
        largest, smallest = row["head_dim"], row["smallest"]
        kinds = [*itertools.product([largest], ((False, "fp16"), (True, "bf16")), (4, 2), (0.0, 2.0))]
        kinds += itertools.product([smallest], [(True, "bf16")], (4, 2), [0.0])
        for head_dim, (causal, dtype), heads, softcap in kinds:
            options = {"causal": causal, "softcap": softcap}
            seqlen_q, seqlen_k = 2 * row["forward"]["block_q"] + 3, plan["block_kv"] + 5
            inputs = Case(head_dim, dtype, seqlen_q, seqlen_k, causal, 1, heads, 2).inputs("cpu")
            q, k, v, dout = (x.cuda() for x in (*inputs, torch.ones_like(inputs[0])))
            out, lse = flash_attn_ext.forward(q, k, v, **options)
            results = [out]
            if row["backward"]:
                results += flash_attn_ext.backward(dout, q, k, v, out, lse, **options)
                results += flash_attn_ext.backward(dout, q, k, v, out, lse, **options, deterministic=True)
                for needs in ([True, False, False], [False, True, True]):
                    torch.ops.flash_attn_ext.backward(dout, q, k, v, out, lse, **options, needs=needs)
            assert all(x.cpu().isfinite().all() for x in results) and not lse.cpu().isnan().any()
    lengths_that_make_no_sense()
    print("all calls made")


INT_MIN, INT_MAX = -(2**31), 2**31 - 1
# Of four packed sequences in 300 rows. No launch sees them, and no result is right or wrong: all has to stay in bounds.
EDGES = {
    "fall": (0, 200, 100, 250, 300),
    "fall to the end": (300, 200, 100, 50, 0),
    "beyond all rows": (0, 100, 301, 5000, INT_MAX),
    "below 0": (-5, 100, -1, INT_MIN, 300),
    "all beyond": (INT_MAX,) * 5,
    "from the least to the most": (INT_MIN, INT_MAX, INT_MIN, INT_MAX, INT_MIN),
    "over and over": (0, 300, 0, 300, 0),
}
USED = {"below 0": (-1, INT_MIN, -7, 0), "beyond": (301, INT_MAX, 5000, 1000)}


def lengths_that_make_no_sense():
    import torch
    from cases import ROWS

    import flash_attn_ext
    from flash_attn_ext import limits

    good, all_used = (0, 70, 70, 171, 300), (70, 0, 101, 129)
    calls = [(bad, good, {}) for bad in EDGES.values()] + [(good, bad, {}) for bad in EDGES.values()]
    calls += [(bad, bad, {}) for bad in EDGES.values()]
    calls += [(good, good, {"seqused_q": bad, "seqused_k": all_used}) for bad in USED.values()]
    calls += [(good, good, {"seqused_q": all_used, "seqused_k": bad}) for bad in USED.values()]
    calls += [(bad, bad, {"seqused_q": USED["beyond"]}) for bad in EDGES.values()]
    calls += [(None, None, {"seqused_q": bad, "seqused_k": bad}) for bad in USED.values()]

    def lengths_of(edges_q, edges_k, used):
        by_name = {"cu_seqlens_q": edges_q, "cu_seqlens_k": edges_k} | used
        return {name: torch.tensor(x, dtype=torch.int32).cuda() for name, x in by_name.items() if x is not None}

    for row, call in itertools.product(ROWS, calls):
        head_dim, lengths = row["head_dim"], lengths_of(*call)
        options = {name.rpartition("_")[0] for name in lengths}
        if not all(limits.has_option(option, "forward", head_dim) for option in options):
            continue
        shape = (300,) if "cu_seqlens_q" in lengths else (4, 75)
        q, k, v, dout = (torch.ones(*shape, h, head_dim, dtype=torch.bfloat16).cuda() for h in (4, 2, 2, 4))
        out, lse = flash_attn_ext.forward(q, k, v, causal=True, **lengths)
        if row["backward"] and all(limits.has_option(option, "backward", head_dim) for option in options):
            for deterministic in (False, True):  # there thread blocks wait for others, which has to end
                by_name = lengths | {"causal": True, "deterministic": deterministic}
                flash_attn_ext.backward(dout, q, k, v, out, lse, **by_name)
        torch.cuda.synchronize()


@pytest.fixture(scope="module")
def runs():
    """All at once: most of their time is the start of Python and torch."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(sys.path),
        "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",  # so that a tensor's end is an allocation's end
    }
    commands = {ALONE: []}
    if sanitizer():
        commands |= {tool: [sanitizer(), "--error-exitcode", "86", "--tool", tool] for tool in TOOLS}
    runs = {
        tool: subprocess.Popen(
            [*command, sys.executable, __file__],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
        )
        for tool, command in commands.items()
    }
    yield runs
    for run in runs.values():
        run.kill()


def test_alone(runs):
    output, _ = runs[ALONE].communicate(timeout=120)
    assert runs[ALONE].returncode == 0 and "all calls made" in output, output[-8000:]


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
