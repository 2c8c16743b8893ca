"""deterministic=True on a GPU: the gradients of a call are the same in every run, bit for bit, and right.

A sum that depends on the order in which thread blocks come shows only where they race, and not in every run. So the
calls here have many items, run twenty times, and mostly beside work on another stream that takes a part of the
multiprocessors, another part each time: thread blocks then start at other places and times. Memory holds NaN before.
"""

import itertools
from collections import Counter
from dataclasses import replace
from functools import partial

import gpu
import pytest
import torch
from cases import (
    BACKWARD,
    BACKWARD_OPTIONS,
    BACKWARD_SMOKE,
    TRAINING_HEAD_DIMS,
    Case,
    both_dtypes,
    both_masks,
    random_cases,
)
from conftest import SEED
from gpu import normal
from gradients import both_passes_and_check, by_autograd, differentiate
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from oracle import same_bits, same_but_for_order
from torch import library

import flash_attn_ext
from flash_attn_ext import flash_attn_func

pytestmark = gpu.needs_hopper

RUNS = 20
POISONED = 2**29  # bytes: more than the results and the workspace of any call here
NAMES = ("dq", "dk", "dv", "dsinks")

backward_operator = torch.ops.flash_attn_ext.backward.default
each_head_dim = pytest.mark.parametrize("head_dim", TRAINING_HEAD_DIMS)


class Neighbour:
    """Forward passes of few thread blocks, each of which has a multiprocessor to itself, on another stream."""

    def __init__(self):
        self.stream = torch.cuda.Stream()
        self.q, self.k = normal(1, 64, 64, 128), normal(1, 16384, 1, 128)
        torch.cuda.synchronize()

    def begin(self, run):
        """As soon as the current stream is done with what it has; in every fourth run none."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            for _ in range(5 * (run % 4 > 0)):
                flash_attn_ext.forward(self.q[:, :, : 1 + 9 * run % 64], self.k, self.k)


@pytest.fixture
def neighbour():
    yield Neighbour()
    torch.cuda.synchronize()  # its memory is in use until then


def assert_bits(results, expected, what=""):
    for name, a, b in zip(NAMES, results, expected, strict=False):
        assert same_bits(a, b), f"{name} differs {what}"
    assert len(results) == len(expected)


def same_in_every_run(call, neighbour):
    """The gradients that the call returns, of the first of its runs."""

    def bits(x):
        return x.contiguous().view(torch.int16)

    first = [x.clone() for x in call()]
    torch.cuda.empty_cache()  # so that a run gets the memory that is poisoned before it
    different = torch.zeros(len(first), dtype=torch.int64, device="cuda")
    for run in range(1, RUNS):
        gpu.poison(first[0], torch.empty(POISONED, dtype=torch.uint8, device="meta"))
        neighbour.begin(run)
        different += torch.stack([(bits(a) != bits(b)).sum() for a, b in zip(call(), first, strict=True)])
    assert dict(zip(NAMES, different.tolist(), strict=False)) == dict.fromkeys(NAMES[: len(first)], 0)
    return first


def assert_deterministic(neighbour, q, k, v, dlse=None, **options):
    """Gradients of every run, and beside those of the default: another order of the same sums."""
    out, lse = flash_attn_ext.forward(q, k, v, **options)
    backward = partial(flash_attn_ext.backward, torch.randn_like(q), q, k, v, out, lse, **options)
    dlse = torch.randn_like(lse) if dlse else None
    gradients = same_in_every_run(lambda: backward(dlse=dlse, deterministic=True), neighbour)
    for name, a, b in zip(NAMES, gradients, backward(dlse=dlse), strict=False):
        assert same_but_for_order(a, b), f"{name} differs from the default's by more than the order of its sum"


# The rule for gradients ----------------------------------------------------------------------------------------------

TABLE = [
    replace(case, deterministic=True)
    for case in (*BACKWARD, *BACKWARD_OPTIONS)
    if case.dtype == "bf16" and case.layout == "bshd" and max(case.seqlen_q, case.seqlen_k) < 5000
]


@pytest.mark.quick
@pytest.mark.parametrize("case", [replace(case, deterministic=True) for case in BACKWARD_SMOKE], ids=str)
def test_smoke(case):
    both_passes_and_check(*case.inputs("cuda"), **case.options("cuda"))


@pytest.mark.parametrize("case", TABLE, ids=str)
def test_table(case):
    options = case.options("cuda")
    dlse = normal(case.batch, case.heads, case.seqlen_q, dtype=torch.float32) if case.dlse else None
    arguments, gradients = both_passes_and_check(*case.inputs("cuda"), dlse=dlse, **options)
    assert_bits(differentiate(*arguments, dlse=dlse, **options), gradients, "in a second run")


@seed(SEED)
@settings(max_examples=100, deadline=None, database=None, print_blob=True, suppress_health_check=list(HealthCheck))
@given(case=random_cases("backward"), values=st.integers(0, 2**32 - 1))
def test_random_shapes(case, values):
    torch.manual_seed(values)
    options = case.options("cuda") | {"deterministic": True}
    arguments, gradients = both_passes_and_check(*case.inputs("cuda", seed=values), **options)
    assert_bits(differentiate(*arguments, **options), gradients, "in a second run")


# Every run -----------------------------------------------------------------------------------------------------------

SHAPES = {  # batch, rows, keys, heads, KV heads
    "MHA": (2, 2048, 2048, 16, 16),
    "GQA": (2, 4096, 4096, 8, 2),
    "MQA": (2, 2048, 2048, 12, 1),
    "odd lengths": (3, 2039, 2039, 6, 3),
    "more keys": (2, 1000, 4099, 8, 8),
    "more queries": (2, 4099, 1000, 8, 2),
    "one query": (4, 1, 8191, 16, 4),
    "one key": (4, 8191, 1, 16, 4),
    "one head": (1, 8192, 8192, 1, 1),
}


def inputs_of(shape, head_dim, dtype=torch.bfloat16):
    batch, rows, keys, heads, kv_heads = shape
    kv_shape = batch, keys, kv_heads, head_dim
    return normal(batch, rows, heads, head_dim, dtype=dtype), *(normal(*kv_shape, dtype=dtype) for _ in range(2))


@each_head_dim
@both_masks
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_shapes(head_dim, causal, shape, neighbour):
    assert_deterministic(neighbour, *inputs_of(shape, head_dim), causal=causal)


OPTIONS = {
    "fp16": {"dtype": torch.float16, "causal": True},
    "window": {"window_size": (700, 300)},
    "causal window": {"causal": True, "window_size": (512, -1)},
    "window to the left": {"window_size": (900, -1)},
    "window to the right": {"window_size": (-1, 60)},
    "own key alone": {"window_size": (0, 0)},
    "softcap": {"softcap": 5.0},
    "causal softcap": {"causal": True, "softcap": 5.0},
    "sinks": {"causal": True, "sinks": True},
    "a loss that uses lse": {"dlse": True},
    "all": {"causal": True, "window_size": (1200, 0), "softcap": 20.0, "sinks": True, "dlse": True},
}
each_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())


def with_sinks(options, heads):
    return options | ({"sinks": torch.linspace(-2, 4, heads, device="cuda")} if "sinks" in options else {})


@each_head_dim
@each_option
@pytest.mark.parametrize("shape", [(2, 2048, 2048, 8, 2), (2, 2500, 1301, 8, 8)], ids=["square", "more queries"])
def test_options(head_dim, options, shape, neighbour):
    options = with_sinks(options, heads=8)
    assert_deterministic(neighbour, *inputs_of(shape, head_dim, options.pop("dtype", torch.bfloat16)), **options)


PACKINGS = {  # lengths of q, and of k
    "ragged": ([0, 1, 700, 2048, 1, 0, 3001, 64, 129, 1500],) * 2,
    "one huge among tiny ones": ([1] * 40 + [6000] + [2] * 20, [2] * 40 + [6000] + [1] * 20),
    "many short ones": ([1, 63, 64, 65, 130, 0] * 50,) * 2,
    "keys of other lengths": ([300, 1, 2000, 0, 33, 1200], [2500, 700, 1, 40, 0, 1500]),
    "nothing but empty ones": ([0, 0],) * 2,
}
USED = {"all": lambda length: length, "two thirds": lambda length: length - length // 3, "none": lambda length: 0}


def int32(numbers):
    return torch.tensor(list(numbers), dtype=torch.int32, device="cuda")


@each_head_dim
@both_masks
@pytest.mark.parametrize("packing", PACKINGS.values(), ids=PACKINGS.keys())
@pytest.mark.parametrize("kind", [(8, 8), (8, 2)], ids=["mha", "gqa"])
def test_packed(head_dim, causal, packing, kind, neighbour):
    """With rows and keys behind the last sequence."""
    q, k, v = (normal(sum(packing[i]) + 37, kind[i], head_dim) for i in (0, 1, 1))
    lengths = {f"cu_seqlens_{x}": int32(itertools.accumulate(packing[i], initial=0)) for i, x in enumerate("qk")}
    assert_deterministic(neighbour, q, k, v, causal=causal, **lengths)


@each_head_dim
@each_option
def test_options_of_packed_sequences(head_dim, options, neighbour):
    edges = int32(itertools.accumulate(PACKINGS["ragged"][0], initial=0))
    options, total = with_sinks(options, heads=8), int(edges[-1])
    dtype = options.pop("dtype", torch.bfloat16)
    q, k, v = (normal(total, heads, head_dim, dtype=dtype) for heads in (8, 2, 2))
    assert_deterministic(neighbour, q, k, v, cu_seqlens_q=edges, cu_seqlens_k=edges, **options)


@each_head_dim
@both_masks
@pytest.mark.parametrize("used_q, used_k", list(itertools.product(USED, repeat=2)))
@pytest.mark.parametrize("form", ["dense", "packed"])
def test_used_lengths(head_dim, causal, used_q, used_k, form, neighbour):
    lengths = [1800, 1, 65, 2500] if form == "packed" else [1900] * 3
    rows = (sum(lengths),) if form == "packed" else (len(lengths), lengths[0])
    q, k, v = (normal(*rows, heads, head_dim) for heads in (8, 2, 2))
    edges = int32(itertools.accumulate(lengths, initial=0)) if form == "packed" else None
    options = {"cu_seqlens_q": edges, "cu_seqlens_k": edges}
    options |= {f"seqused_{x}": int32(map(USED[used], lengths)) for x, used in (("q", used_q), ("k", used_k))}
    assert_deterministic(neighbour, q, k, v, causal=causal, **options)


@each_head_dim
@pytest.mark.parametrize("needed", ["q", "k", "v", "qk", "qv", "kv"])
def test_some_gradients(head_dim, needed, neighbour):
    q, k, v = inputs_of(SHAPES["GQA"], head_dim)
    arguments = torch.randn_like(q), q, k, v, *flash_attn_ext.forward(q, k, v, causal=True)
    options = {"causal": True, "deterministic": True, "needs": [name in needed for name in "qkv"]}
    results = same_in_every_run(lambda: backward_operator(*arguments, **options)[:3], neighbour)
    assert [x.numel() > 0 for x in results] == options["needs"]


@each_head_dim
@pytest.mark.parametrize("layout", ["bhsd", "qkvpacked"])
def test_layouts(head_dim, layout, neighbour):
    case = Case(head_dim, "bf16", 2048, 2048, batch=2, heads=8, kv_heads=2, layout=layout)
    assert_deterministic(neighbour, *case.inputs("cuda"), causal=True)


# However it is asked for ---------------------------------------------------------------------------------------------


def call_of(head_dim, causal=True):
    """(dout, q, k, v, out, lse), large enough that the default's dq would differ, and the gradients."""
    q, k, v = inputs_of(SHAPES["GQA"], head_dim)
    arguments = torch.randn_like(q), q, k, v, *flash_attn_ext.forward(q, k, v, causal=causal)
    return arguments, flash_attn_ext.backward(*arguments, causal=causal, deterministic=True)


@pytest.fixture
def deterministic_algorithms():
    yield torch.use_deterministic_algorithms
    torch.use_deterministic_algorithms(False)


@each_head_dim
def test_autograd(head_dim, neighbour):
    (dout, *inputs, _, _), expected = call_of(head_dim)
    attend = partial(flash_attn_func, causal=True, deterministic=True)
    results = same_in_every_run(lambda: by_autograd(attend, dout, *inputs), neighbour)
    assert_bits(results, expected, "by autograd")
    torch._dynamo.reset()
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    assert_bits(by_autograd(compiled, dout, *inputs), expected, "compiled")


@each_head_dim
@both_masks
@pytest.mark.parametrize("warn_only", [False, True])
@pytest.mark.filterwarnings("error:.*deterministic")
def test_torchs_switch_gives_the_same_bits(head_dim, causal, warn_only, neighbour, deterministic_algorithms):
    """Without a warning. What counts is the time of the backward."""
    arguments, expected = call_of(head_dim, causal)
    dout, *inputs, _, _ = arguments
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = flash_attn_func(*leaves, causal=causal)
    deterministic_algorithms(True, warn_only=warn_only)
    results = same_in_every_run(lambda: flash_attn_ext.backward(*arguments, causal=causal), neighbour)
    assert_bits(results, expected, "by the low-level backward")
    assert_bits(torch.autograd.grad(out, leaves, dout), expected, "by autograd")
    attend = partial(flash_attn_func, causal=causal)
    assert_bits(by_autograd(attend, dout, *inputs), expected, "by autograd of a forward under it")


@each_head_dim
def test_torchs_switch_in_compiled_code(head_dim, deterministic_algorithms):
    (dout, *inputs, _, _), expected = call_of(head_dim)
    torch._dynamo.reset()
    compiled = torch.compile(partial(flash_attn_func, causal=True), fullgraph=True, backend="aot_eager")
    by_autograd(compiled, dout, *inputs)  # compiled without the switch, and called under it
    deterministic_algorithms(True)
    assert_bits(by_autograd(compiled, dout, *inputs), expected)


def launches(call):
    """The names of what the call launches on the GPU; those without a bracket are the profiler's own."""
    call()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    on_gpu = torch.autograd.DeviceType.CUDA
    return Counter(event.name for event in profile.events() if event.device_type == on_gpu and "(" in event.name)


def test_torchs_switch_launches_nothing_else(deterministic_algorithms):
    """Nor does it fill results and workspace first (torch.utils.deterministic.fill_uninitialized_memory)."""
    arguments, _ = call_of(TRAINING_HEAD_DIMS[0])
    backward = partial(flash_attn_ext.backward, *arguments, causal=True)
    expected = launches(lambda: backward(deterministic=True))
    if not expected:
        pytest.skip("the profiler sees no GPU")
    assert any("backward_kernel" in name for name in expected)
    deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert launches(backward) == expected


# Graphs, streams, operators ------------------------------------------------------------------------------------------


@each_head_dim
def test_graph_replays_to_the_same_bits(head_dim, neighbour):
    arguments, expected = call_of(head_dim)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = flash_attn_ext.backward(*arguments, causal=True, deterministic=True)
    for run in range(RUNS):
        for x in captured:
            x.fill_(torch.nan)
        neighbour.begin(run)
        graph.replay()
        assert_bits(captured, expected, f"in replay {run}")


def test_graph_captured_under_torchs_switch(deterministic_algorithms):
    """It stays deterministic when the switch is off again."""
    arguments, expected = call_of(TRAINING_HEAD_DIMS[-1])
    graph = torch.cuda.CUDAGraph()
    deterministic_algorithms(True)
    with torch.cuda.graph(graph):
        captured = flash_attn_ext.backward(*arguments, causal=True)
    deterministic_algorithms(False)
    for run in range(3):
        graph.replay()
        assert_bits(captured, expected, f"in replay {run}")


@each_head_dim
def test_two_streams_at_once(head_dim):
    """Two backward passes share the GPU: neither may wait for a thread block that the other one keeps from starting."""
    calls = [call_of(head_dim) for _ in range(2)]
    streams = [torch.cuda.Stream() for _ in calls]
    torch.cuda.synchronize()
    for run in range(RUNS):
        results = []
        for stream, (arguments, _) in zip(streams, calls, strict=True):
            with torch.cuda.stream(stream):
                results.append(flash_attn_ext.backward(*arguments, causal=True, deterministic=True))
        torch.cuda.synchronize()
        for gradients, (_, expected) in zip(results, calls, strict=True):
            assert_bits(gradients, expected, f"in run {run}")


@each_head_dim
@both_dtypes
def test_opcheck(head_dim, dtype):
    """It compares runs: of a dq that many blocks of keys add to."""
    q, k, v = inputs_of((2, 130, 1000, 6, 2), head_dim, dtype)
    arguments = torch.randn_like(q), q, k, v, *flash_attn_ext.forward(q, k, v, causal=True)
    library.opcheck(backward_operator, arguments, {"causal": True, "deterministic": True, "needs": [True] * 3})
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    tests = ["test_schema", "test_autograd_registration", "test_faketensor"]
    forward = torch.ops.flash_attn_ext.forward.default
    library.opcheck(forward, tuple(leaves), {"causal": True, "deterministic": True}, test_utils=tests)


@pytest.fixture
def twice_the_multiprocessors():
    """The backward orders its work, and launches thread blocks, for twice as many as there are."""
    device = torch.cuda.get_device_properties(torch.cuda.current_device())
    flash_attn_ext._C.set_test_faults(multiprocessors=2 * device.multi_processor_count)
    yield
    flash_attn_ext._C.set_test_faults()


@each_head_dim
@both_masks
def test_thread_blocks_that_cannot_begin_keep_nobody_waiting(causal, head_dim, twice_the_multiprocessors):
    """As where another process, or a partition of the device, leaves a launch less room than it counts on."""
    q, k, v = Case(head_dim, "bf16", 4096, 4096, causal, 2, 8, 8).inputs("cuda")
    dout = normal(*q.shape)
    out, lse = flash_attn_ext.forward(q, k, v, causal=causal)
    by_name = {"causal": causal, "deterministic": True}
    first = flash_attn_ext.backward(dout, q, k, v, out, lse, **by_name)
    again = flash_attn_ext.backward(dout, q, k, v, out, lse, **by_name)
    assert_bits(again, first)
    usual = flash_attn_ext.backward(dout, q, k, v, out, lse, causal=causal)
    for name, a, b in zip(NAMES, first, usual, strict=False):
        assert same_but_for_order(a, b), f"{name} is another sum"
