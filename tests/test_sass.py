"""The machine code in the binary: every kernel of the table is there, on wgmma, with nothing in local memory."""

import re
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest
from cases import needs_kernels

from flash_attn_ext.limits import TABLE

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))
import nvcc  # noqa: E402 (the build's own reader of ptxas output)

KERNEL = re.compile(
    r"(?P<direction>forward|backward)_kernel.*?(?:Forward|Backward)ConfigILi(?P<row>\d+)E"
    r"(?:13__nv_(?P<bf16>bfloat16)|6__half)E(?:EL\w*?9GradientsE(?P<gradients>\d))?"
)
GRADIENTS = ("all", "dq", "dkv")  # csrc/backward.cu's enum class Gradients
DTYPES = ("fp16", "bf16")
KERNELS = [("forward", index, dtype, "") for index, row in enumerate(TABLE) if row["forward"] for dtype in DTYPES]
KERNELS += [
    ("backward", index, dtype, gradients)
    for index, row in enumerate(TABLE)
    if row["backward"]
    for dtype in DTYPES
    for gradients in GRADIENTS
]


def kernel_id(kernel):
    direction, row, dtype, gradients = kernel
    return "-".join(filter(None, (direction, f"d{TABLE[row]['head_dim']}", dtype, gradients)))


each_kernel = pytest.mark.parametrize("kernel", KERNELS, ids=kernel_id)


def find_cuobjdump():
    """It comes with the toolkit, and with triton."""
    places = [shutil.which("cuobjdump"), *sorted(Path("/usr/local").glob("cuda*/bin/cuobjdump"))]
    places += [Path(folder) / "triton/backends/nvidia/bin/cuobjdump" for folder in sys.path]
    tool = next((place for place in places if place and Path(place).exists()), None)
    if tool is None:
        pytest.skip("no cuobjdump: neither in the CUDA toolkit nor in triton")
    return tool


def cuobjdump(*arguments):
    """Its output for the compiled module."""
    from flash_attn_ext import _C

    command = [find_cuobjdump(), *arguments, _C.__file__]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def by_kernel(output):
    """Splits what follows each function's name; keys are (direction, row of the table, dtype, gradients)."""
    parts = re.split(r"^\s*Function\s*:?\s*(\S+?):?$", output, flags=re.MULTILINE)
    found = {}
    for name, text in zip(parts[1::2], parts[2::2], strict=True):
        if match := KERNEL.search(name):
            gradients = GRADIENTS[int(match["gradients"])] if match["gradients"] else ""
            found[match["direction"], int(match["row"]), "bf16" if match["bf16"] else "fp16", gradients] = text
    return found


@pytest.fixture(scope="module")
def sass():
    return by_kernel(cuobjdump("-sass"))


@pytest.fixture(scope="module")
def usage():
    return by_kernel(cuobjdump("-res-usage"))


@needs_kernels
def test_every_kernel_of_the_table_is_there_and_no_other(sass, usage):
    assert sorted(sass) == sorted(usage) == sorted(KERNELS)


def products(kernel):
    """wgmma instructions of one step of the main loop, by their N: M is 64, K 16."""
    direction, index, _, gradients = kernel
    row = TABLE[index]
    head_dim, plan = row["head_dim"], row[direction]
    count = defaultdict(int)
    if direction == "forward":
        count[plan["block_kv"]] += head_dim // 16  # S = Q K^T
        count[head_dim] += plan["block_kv"] // 16  # O += P V
        return count
    count[plan["block_q"]] += 2 * head_dim // 16  # S^T = K Q^T and dP^T = V dO^T
    if gradients != "dq":
        count[head_dim] += 2 * plan["block_q"] // 16  # dV += P^T dO and dK += dS^T Q
    if gradients != "dkv":
        parts = plan["block_q"] // 64 * head_dim // 64  # of 64 x 64, shared out between the consumers
        count[64] += parts // (plan["block_kv"] // 64) * plan["block_kv"] // 16  # dQ = dS K
    return count


@needs_kernels
@each_kernel
def test_products_are_wgmma(sass, kernel):
    """At least the instructions of one step's products, in this dtype; no product the old way."""
    issued = re.findall(r"\bHGMMA\.64x(\d+)x16\.F32(\.BF16)?", sass[kernel])
    assert {suffix for _, suffix in issued} == {".BF16" if kernel[2] == "bf16" else ""}
    for columns, count in products(kernel).items():
        assert sum(int(n) == columns for n, _ in issued) >= count
    assert not re.search(r"\bHMMA\b", sass[kernel])


@needs_kernels
@each_kernel
def test_the_backward_multiplies_no_more_than_it_needs(sass, kernel):
    """The loop's step has two sides, masked and unmasked, each with its products: ptxas dropped and duplicated none."""
    if kernel[0] == "backward":
        assert len(re.findall(r"\bHGMMA\b", sass[kernel])) == 2 * sum(products(kernel).values())


def shortest_round(sass, count):
    """The instructions of the shortest way round a loop that issues so many wgmma; None if there is no such loop.

    That is the main loop without mask, without rescaling, and without a second look at a barrier.
    """
    instructions = re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;]+?)\s*;", sass)
    number = {int(address, 16): i for i, (address, _) in enumerate(instructions)}
    after = []  # of each instruction, those that may come next
    for i, (_, text) in enumerate(instructions):
        predicate, opcode, operands = re.fullmatch(r"(@!?U?P\w+ )?(\w+)\S*\s*(.*)", text).groups()
        may_go_on = predicate or opcode not in ("BRA", "EXIT", "BRX", "RET") or opcode == "BRA" and "," in operands
        after.append([i + 1] if may_go_on and i + 1 < len(instructions) else [])
        if opcode == "BRA":
            after[i].append(number[int(re.search(r"0x[0-9a-f]+", operands)[0], 16)])

    is_product = [bool(re.search(r"\bHGMMA\b", text)) for _, text in instructions]

    def round_from(start):
        before, queue = {}, [start]
        for i in queue:  # breadth first
            for following in after[i]:
                if following not in before:
                    before[following] = i
                    queue.append(following)
        way = []
        while start in before and (not way or way[-1] != start):
            way.append(before[way[-1] if way else start])
        return way

    rounds = [round_from(start) for start in range(len(instructions)) if is_product[start]]
    return min((len(way) for way in rounds if sum(is_product[i] for i in way) == count), default=None)


@needs_kernels
@each_kernel
def test_documents_count_the_instructions_of_the_main_loop(sass, kernel):
    """For one compiler: others may need more or fewer."""
    from flash_attn_ext._build_info import BUILD

    direction, index, _, gradients = kernel
    document = (ROOT / "docs" / f"{direction}.md").read_text()
    compiler = re.search(r"\bnvcc (\d+\.\d+)", document)[1]
    if BUILD["cuda"] != compiler:
        pytest.skip(f"docs/{direction}.md counts what nvcc {compiler} makes, and this binary is nvcc {BUILD['cuda']}'s")
    if gradients not in ("", "all"):
        pytest.skip("only the kernel of all gradients is in the table")
    row = TABLE[index]
    plan, counted = row[direction], shortest_round(sass[kernel], sum(products(kernel).values()))
    consumers = plan["block_q" if direction == "forward" else "block_kv"] // 64
    (cycles, a_thread) = re.search(rf"^\| {row['head_dim']} \(.* (\d+) \| (\d+) \|$", document, re.MULTILINE).groups()
    assert counted == int(a_thread), f"docs/{direction}.md, cycle budget of head dim {row['head_dim']}"
    assert int(cycles) == counted * consumers, "four warps a consumer, four instructions a cycle"


@needs_kernels
@each_kernel
def test_tiles_move_by_tma(sass, kernel):
    assert re.search(r"\bUTMALDG\b", sass[kernel])
    assert bool(re.search(r"\bUTMASTG\b", sass[kernel])) == (kernel[3] != "dq")  # dQ is added from registers
    assert bool(re.search(r"\bREDG\..*F32x4\b", sass[kernel])) == (kernel[3] in ("all", "dq"))


@needs_kernels
@each_kernel
def test_no_local_memory(sass, usage, kernel):
    assert not re.findall(r"\b(?:LDL|STL)\b.*", sass[kernel])
    assert re.search(r"\bSTACK:0\b", usage[kernel]) and re.search(r"\bLOCAL:0\b", usage[kernel])


@needs_kernels
def test_code_is_for_hopper_alone_and_small():
    from flash_attn_ext import _C

    assert set(re.findall(r"^arch = (\S+)", cuobjdump("-res-usage"), re.MULTILINE)) == {"sm_90a"}
    assert Path(_C.__file__).stat().st_size <= 20e6


def test_what_ptxas_said_of_the_last_build():
    logs = sorted((ROOT / "build").glob("temp*/**/*.ptxas"))  # setup.py's
    if not logs:
        pytest.skip("no build/temp*/**/*.ptxas: the binary was not built in this directory")
    for log in logs:
        text = log.read_text()
        assert "Compiling entry function" in text, f"{log}: ptxas was not asked to say anything"
        assert nvcc.faults(text) == []


CLEAN = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'kernel' for 'sm_90a'
ptxas info    : Function properties for kernel
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 168 registers, used 16 barriers
"""


@pytest.mark.parametrize(
    "good, bad",
    [
        ("0 bytes stack frame", "16 bytes stack frame"),
        ("0 bytes spill stores", "4 bytes spill stores"),
        ("0 bytes spill loads", "120 bytes spill loads"),
        (
            "ptxas info    : 0 bytes gmem",
            "ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized due to "
            "insufficient register resources for the wgmma pipeline in function 'kernel'",
        ),
    ],
)
def test_the_build_notices_slow_kernels(good, bad):
    assert nvcc.faults(CLEAN) == []
    (fault,) = nvcc.faults(CLEAN.replace(good, bad))
    assert bad.split(":")[-1].strip() in fault and "kernel" in fault
