"""The machine code in the binary: every kernel of the table is there, on wgmma, with nothing in local memory."""

import heapq
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from cases import is_by_pairs, needs_kernels

from flash_attn_ext.limits import TABLE

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))
import nvcc  # noqa: E402 (the build's own reader of ptxas output)

KERNEL = re.compile(
    r"(?P<direction>forward|backward)(?P<wide>_wide)?_kernel.*?(?:Forward|Backward)ConfigILi(?P<row>\d+)E"
    r"(?:13__nv_(?P<bf16>bfloat16)|6__half)Lb(?P<softcap>[01])E(?:Lb(?P<short>[01])ELb(?P<divided>[01])E)?E"
    r"(?:EL\w*?9GradientsE(?P<gradients>\d)|ELb(?P<persistent>[01])E)?"
)
GRADIENTS = ("all", "dq", "dkv")  # csrc/backward.cu's enum class Gradients
BY_PAIRS = ("wide", "persistent")  # the forms of csrc/backward_wide.cu: pairs have one item, or take item after item
DIVIDED = "divided"
DTYPES = ("fp16", "bf16")
SOFTCAP = ("", "softcap")  # kernels without and with it


def variants(direction, row, softcap):
    """Of the forward, the kernel of the row's plan, and that for rows that see few keys; and both for divided calls. Of
    the backward, what kernels compute, one after the other; the wide ones compute all, and write what is needed."""
    if direction == "forward":
        plans = ["", "short"] if row["short_forward"] and not softcap else [""]
        return plans if softcap else [*plans, *(plan + DIVIDED for plan in plans)]
    return BY_PAIRS if is_by_pairs(row) else GRADIENTS


KERNELS = [
    (direction, index, dtype, softcap, variant)
    for direction in ("forward", "backward")
    for index, row in enumerate(TABLE)
    if row[direction]
    for dtype in DTYPES
    for softcap in SOFTCAP
    for variant in variants(direction, row, softcap)
]


def plan_of(kernel):
    direction, index, *_, variant = kernel
    return TABLE[index]["short_forward" if variant.startswith("short") else direction]


def kernel_id(kernel):
    direction, row, dtype, *variant = kernel
    return "-".join(filter(None, (direction, f"d{TABLE[row]['head_dim']}", dtype, *variant)))


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
    """Splits what follows each function's name; keys are those of KERNELS."""
    parts = re.split(r"^\s*Function\s*:?\s*(\S+?):?$", output, flags=re.MULTILINE)
    found = {}
    for name, text in zip(parts[1::2], parts[2::2], strict=True):
        if match := KERNEL.search(name):
            dtype, softcap = "bf16" if match["bf16"] else "fp16", SOFTCAP[int(match["softcap"])]
            if match["direction"] == "forward":
                variant = "short" * (match["short"] == "1") + DIVIDED * (match["divided"] == "1")
            elif match["wide"]:
                variant = BY_PAIRS[int(match["persistent"])]
            else:
                variant = GRADIENTS[int(match["gradients"])]
            found[match["direction"], int(match["row"]), dtype, softcap, variant] = text
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


@needs_kernels
def test_gradients_out_of_float32_sums_are_stored_16_bytes_at_a_time():
    """The compiler can turn such a store into four of 4 bytes each, and has done so."""
    _, *parts = re.split(r"^\s*Function : (\S+)$", cuobjdump("-sass"), flags=re.MULTILINE)
    named = zip(parts[::2], parts[1::2], strict=True)
    stores = [re.findall(r"\bSTG\S*", text) for name, text in named if "convert_kernel" in name]
    assert len(stores) == sum(bool(row["backward"]) for row in TABLE) * len(DTYPES)
    assert all(set(found) == {"STG.E.128"} for found in stores)


def columns(kernel):
    """Those of dQ, dK and dV that a thread block sums. Its peer has the other half of the wide kernel's."""
    head_dim = TABLE[kernel[1]]["head_dim"]
    return head_dim // 2 if kernel[-1] in BY_PAIRS else head_dim


def products(kernel):
    """The products of one step of the main loop: by name, how many wgmma of which form.

    A form is N and the wrapper's name in csrc/ptx/wgmma.cuh. M is 64, K 16.
    """
    direction, index, _, _, gradients = kernel
    head_dim, plan = TABLE[index]["head_dim"], plan_of(kernel)
    if direction == "forward":
        return {"S": {(plan["block_kv"], "ss"): head_dim // 16}, "O": {(head_dim, "rs_mn"): plan["block_kv"] // 16}}

    def over_columns(name):
        steps = head_dim // 16
        from_registers = steps if "kv_in_registers" in plan else 0
        if "v_in_registers" in plan and name == "dP":
            from_registers = steps
        if "own_in_registers" in plan:
            from_registers = steps // 2
        return +Counter({(plan["block_q"], "rs"): from_registers, (plan["block_q"], "ss"): steps - from_registers})

    keys = {(columns(kernel), "rs_mn"): plan["block_q"] // 16}
    parts = Counter(min(64, columns(kernel) - first) for first in range(0, columns(kernel), 64))  # of dQ's columns
    form_of_dq = "rs_mn" if "kv_in_registers" in plan else "ss_mn"
    queries = {(part, form_of_dq): count * plan["block_kv"] // 16 for part, count in parts.items()}
    peer_keys = {(columns(kernel), "ss_b_mn"): plan["block_q"] // 16}
    peer_p = keys if "own_in_registers" in plan else peer_keys  # the peer's P: as its registers had it, or as a tile
    dkv, dq = gradients != "dq", gradients != "dkv"
    return (
        {"S": over_columns("S"), "dP": over_columns("dP")}
        | ({"dV": keys, "dK": keys} if dkv else {})
        | ({"peer's dV": peer_p, "peer's dK": peer_keys} if gradients in BY_PAIRS else {})
        | ({"dQ": queries} if dq else {})
    )


def multipliers(kernel):
    """The names of the products of each kind of warpgroup that multiplies, and how many there are of it."""
    direction, *_, gradients = kernel
    names, plan = products(kernel), plan_of(kernel)
    if direction == "forward":
        return [(names, plan["block_q"] // 64)]
    own_keys = [name for name in names if name in ("S", "dP", "dV", "dK")]
    others = [name for name in names if name not in own_keys]
    return [(own_keys, 1 if gradients in BY_PAIRS else plan["block_kv"] // 64), (others, 1)]


ADDITION = "addition"  # of four elements of dQ to their sums in memory


def additions(kernel):
    """How many of them each of 128 threads makes in a step."""
    direction, index, *_, gradients = kernel
    if direction == "forward" or gradients == "dkv":
        return {}
    return {ADDITION: TABLE[index][direction]["block_q"] * columns(kernel) // (4 * 128)}


def added(products):
    return sum(map(Counter, products), Counter())


def form(instruction):
    """That of a wgmma, or ADDITION; None for any other instruction."""
    if re.match(r"REDG\.E\.ADD\.F32x4\b", instruction):
        return ADDITION
    if match := re.match(r"HGMMA\.64x(\d+)x16\.F32(?:\.BF16)? R\d+, (R\d+|gdesc)", instruction):
        source = "ss" if match[2] == "gdesc" else "rs"
        transposed = "_mn" if source == "rs" or ".tnspA" in instruction else "_b_mn"
        return int(match[1]), source + (transposed if ".tnspB" in instruction else "")
    return None


def instructions(sass):
    """Their addresses and texts."""
    return re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;]+?)\s*;", sass)


@needs_kernels
@each_kernel
def test_products_are_wgmma(sass, kernel):
    """At least the instructions of one step's products, in this dtype."""
    assert set(re.findall(r"\bHGMMA\.64x\d+x16\.F32(\.BF16)?", sass[kernel])) == {
        ".BF16" if kernel[2] == "bf16" else ""
    }
    assert added(products(kernel).values()) <= Counter(form(text) for _, text in instructions(sass[kernel]))


@needs_kernels
@each_kernel
def test_no_product_is_of_a_single_warp(sass, kernel):
    assert not re.findall(r"\bHMMA\b", sass[kernel])


@needs_kernels
@each_kernel
def test_offsets_are_raised_where_they_are_kept(sass, kernel):
    """Sums are compared with kLargeSum of csrc/tile/softmax.cuh, 2^10, where keeps_offset of csrc/limits.h says so and
    there is no softcap, and nowhere else."""
    direction, _, _, softcap, _ = kernel
    keeps_offset = direction == "forward" and "keeps_offset" in plan_of(kernel) and not softcap
    assert bool(re.search(r"\bFSETP\.GE\S* [^;]*\b1024\b", sass[kernel])) == keeps_offset


@needs_kernels
@each_kernel
def test_the_backward_multiplies_no_more_than_it_needs(sass, kernel):
    """ptxas dropped and duplicated no product, and no addition of dQ.

    What the source has twice: S, before the loop over steps and in it; dP too, where it is as far ahead, which it is
    not with softcap; and dQ, for steps that both consumers see, and for either of them alone. The wide kernel leaves
    nothing out of dQ.
    """
    direction, _, _, softcap, gradients = kernel
    if direction == "backward":
        step = products(kernel)
        twice = {"S"} | ({"dP"} if "kv_in_registers" in plan_of(kernel) and not softcap else set())
        twice |= {"dQ"} if gradients not in BY_PAIRS else set()
        issued = Counter(filter(None, (form(text) for _, text in instructions(sass[kernel]))))
        assert issued == added([*step.values(), *(step[name] for name in twice & step.keys()), additions(kernel)])


def successors(sass):
    """Of each instruction, the numbers of those that may come next."""
    listed, after = instructions(sass), []
    number = {int(address, 16): i for i, (address, _) in enumerate(listed)}
    for i, (_, text) in enumerate(listed):
        predicate, opcode, operands = re.fullmatch(r"(@!?U?P\w+ )?(\w+)\S*\s*(.*)", text).groups()
        may_go_on = predicate or opcode not in ("BRA", "EXIT", "BRX", "RET") or opcode == "BRA" and "," in operands
        after.append([i + 1] if may_go_on and i + 1 < len(listed) else [])
        if opcode == "BRA":
            after[i].append(number[int(re.search(r"0x[0-9a-f]+", operands)[0], 16)])
    return after


def loop_around(sass, start):
    """The instructions from which this one comes again and that come again after it."""

    def reached(ways):
        found, queue = {start}, [start]
        for i in queue:
            new = set(ways[i]) - found
            found |= new
            queue += new
        return found

    after = successors(sass)
    before = [[] for _ in after]
    for i, following in enumerate(after):
        for j in following:
            before[j].append(i)
    listed = instructions(sass)
    return [listed[i][1] for i in sorted(reached(after) & reached(before))]


def shortest_round(sass, products):
    """The instructions of the shortest way round a loop that issues exactly these wgmma and additions; None if there is
    none.

    That is the main loop without mask, without rescaling, and without a second look at a barrier.
    """
    listed, after = instructions(sass), successors(sass)
    forms = {i: found for i, (_, text) in enumerate(listed) if (found := form(text))}

    def next_products(start):
        """Those that may be issued next, and how many instructions further on they are."""
        distance, queue = {start: 0}, [start]
        for i in queue:  # breadth first
            for following in after[i] if i == start or i not in forms else ():
                if following not in distance:
                    distance[following] = distance[i] + 1
                    queue.append(following)
        return {i: steps for i, steps in distance.items() if i in forms and i != start}

    ways, order = {i: next_products(i) for i in forms}, list(products)

    def round_from(start):
        """Dijkstra's algorithm. A node is a product, and how many of each form are yet to be issued."""
        heap, done = [(0, start, tuple(products.values()))], set()
        while heap:
            length, at, left = heapq.heappop(heap)
            if at == start and not any(left):
                return length
            if (at, left) in done:
                continue
            done.add((at, left))
            for following, steps in ways[at].items():
                n = order.index(forms[following]) if forms[following] in order else None
                if n is not None and left[n] > 0:
                    heapq.heappush(heap, (length + steps, following, (*left[:n], left[n] - 1, *left[n + 1 :])))
        return None

    return min(filter(None, map(round_from, forms)), default=None)


@needs_kernels
@each_kernel
def test_documents_count_the_instructions_of_the_main_loop(sass, kernel):
    """For one compiler: others may need more or fewer. Of each kind of warpgroup that multiplies."""
    from flash_attn_ext._build_info import BUILD

    direction, index, _, softcap, gradients = kernel
    document = (ROOT / "docs" / f"{direction}.md").read_text()
    compiler = re.search(r"\bnvcc (\d+\.\d+)", document)[1]
    if BUILD["cuda"] != compiler:
        pytest.skip(f"docs/{direction}.md counts what nvcc {compiler} makes, and this binary is nvcc {BUILD['cuda']}'s")
    if softcap or gradients not in ("", "short", "all", *BY_PAIRS):
        pytest.skip("only kernels of all gradients, without softcap and of calls that are whole, are in the table")
    plan = plan_of(kernel)
    form_of_pair = {"wide": ", a pair", "persistent": ", a persistent pair"}.get(gradients, "[^|]*?")
    name = rf"{TABLE[index]['head_dim']} \({plan['block_q']} x {plan['block_kv']}{form_of_pair}\)"
    step, threads, cycles = products(kernel), [], 0
    for names, warpgroups in multipliers(kernel):
        issued = added([*(step[name] for name in names), additions(kernel) if "dQ" in names else {}])
        threads.append(shortest_round(sass[kernel], issued))
        cycles += warpgroups * threads[-1]  # four warps a warpgroup, four instructions a cycle
    end_of_line = " | ".join([str(cycles), " + ".join(map(str, threads))])
    lines = re.findall(rf"^\| {name} \|.* \| (\d+ \| [\d +]+) \|$", document, re.MULTILINE)
    assert lines == [end_of_line], f"docs/{direction}.md, cycle budget of {name}"


@needs_kernels
@each_kernel
def test_tiles_move_by_tma(sass, kernel):
    assert re.search(r"\bUTMALDG\b", sass[kernel])
    gradients = kernel[-1]
    assert bool(re.search(r"\bUTMASTG\b", sass[kernel])) == (gradients != "dq")  # dQ is added from registers
    assert bool(re.search(r"\bREDG\..*F32x4\b", sass[kernel])) == bool(additions(kernel))


@needs_kernels
@each_kernel
def test_nobody_waits_for_additions_under_way(sass, kernel):
    """A fence for all threads of the GPU would. Those that add to dQ have none in their loop, though the wide kernel's
    tell another thread block there what they have read."""
    if not additions(kernel):
        return
    first = next(i for i, (_, text) in enumerate(instructions(sass[kernel])) if form(text) == ADDITION)
    loop = loop_around(sass[kernel], first)
    assert Counter(map(form, loop))[ADDITION] == additions(kernel)[ADDITION]
    assert not [text for text in loop if re.search(r"\bMEMBAR\.\w+\.(GPU|SYS)\b", text)]


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
