"""The table of csrc/limits.h against everything that is derived from it."""

import re
import sys
from pathlib import Path

import pytest
from cases import (
    BACKWARD,
    BACKWARD_SMOKE,
    BETWEEN_CASES,
    DTYPES,
    FEW_KEYS,
    FORWARD,
    PLANS,
    ROWS,
    SMOKE,
    TRAINING_ROWS,
    backward_cases,
    each_plan,
    forward_cases,
    is_by_pairs,
    lengths_of_plan,
    needs_kernels,
    plan_taken,
)

import flash_attn_ext
from flash_attn_ext import limits

ROOT = Path(__file__).parents[1]
sys.path += [str(ROOT / "benchmarks"), str(ROOT / "tools")]
import limits_table  # noqa: E402 (the build's own reader of the table)
import tables  # noqa: E402 (what writes the tables of the documents)


def test_the_compiled_table_is_the_one_in_the_source():
    """Not that of a build from before the last edit."""
    assert limits_table.parse(limits_table.HEADER.read_text()) == limits.TABLE


def test_rows_are_sane():
    dims = limits.head_dims(limits.TABLE)
    assert list(dims) == sorted(set(dims)), "rows are in order, and no head dim is in two of them"
    assert limits.stretches(dims) == [(8, limits.TABLE[-1]["head_dim"])], "none is left out"
    assert not [row for row in limits.TABLE if row["backward"] and not row["forward"]]


def test_every_head_dim_has_its_row():
    """The first one, in order, that is as large; and what is no multiple of the step has none."""
    for head_dim in range(-8, limits.TABLE[-1]["head_dim"] + 20):
        row = next((row for row in limits.TABLE if row["head_dim"] >= head_dim > 0), None)
        assert limits.row_of(head_dim) is (row if row and head_dim % row["step"] == 0 else None)


def test_supported_is_the_table():
    for which in ("forward", "backward"):
        dims = flash_attn_ext.supported()[which]
        assert [d for d in range(1, 600) if d in dims] == [d for d in range(1, 600) if limits.has_pass(which, d)]
        assert set(dims) == {d for row in limits.TABLE if row[which] for d in limits.head_dims([row])}
        assert 72 in dims and 96 in dims and 100 not in dims


def test_an_option_is_had_by_whole_rows(monkeypatch):
    first, *others = limits.TABLE
    monkeypatch.setitem(limits.OPTIONS, "softcap", {"forward": (first["head_dim"],), "backward": ()})
    have = [d for d in range(600) if limits.has_option("softcap", "forward", d)]
    assert tuple(have) == limits.head_dims([first])
    assert not any(limits.has_option("softcap", "backward", d) for d in range(600))
    monkeypatch.undo()
    assert [d for d in range(600) if limits.has_option("softcap", "forward", d)] == [*have, *limits.head_dims(others)]


def without_backward(monkeypatch, *head_dims):
    rows = [row | {"backward": None} if row["head_dim"] in head_dims else row for row in limits.TABLE]
    monkeypatch.setattr(limits, "TABLE", rows)


def test_head_dims_in_words(monkeypatch):
    (small, *_), (middle, *_, large) = (limits.head_dims(limits.TABLE[:1]), limits.head_dims(limits.TABLE[1:]))
    (first, *_, last) = limits.TABLE
    every = f"every multiple of 8 from {small} to {large}"
    assert limits.what_runs() == f"{every} runs and trains"
    without_backward(monkeypatch, first["head_dim"])
    assert limits.what_runs() == f"{every} runs and every multiple of 8 from {middle} to {large} trains"
    monkeypatch.undo()
    between = [row["head_dim"] for row in limits.TABLE if row not in (first, last)]
    without_backward(monkeypatch, *between)
    trains = f"from {small} to {first['head_dim']} and from {last['smallest']} to {large}"
    assert limits.what_runs() == f"{every} runs and every multiple of 8 {trains} trains"
    without_backward(monkeypatch, *(row["head_dim"] for row in limits.TABLE))
    assert limits.what_runs() == f"{every} runs and none trains"
    assert limits.in_words([8]) == "every multiple of 8 from 8 to 8" and limits.in_words([]) == "none"


def assert_edges_are_tested(cases, plan):
    for block, lengths in (
        (plan["block_q"], {case.seqlen_q for case in cases}),
        (plan["block_kv"], {case.seqlen_k for case in cases}),
    ):
        assert {1, block - 1, block, block + 1, 2 * block + 3} <= lengths
    seen = {(case.dtype, case.causal, case.seqlen_q > case.seqlen_k, case.seqlen_q < case.seqlen_k) for case in cases}
    for dtype in DTYPES:
        for causal in (False, True):
            assert {(dtype, causal, True, False), (dtype, causal, False, True), (dtype, causal, False, False)} <= seen


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"d{row['head_dim']}")
def test_every_row_is_tested_at_the_edges_of_its_blocks(row):
    cases = list(forward_cases(row))
    assert set(cases) <= set(FORWARD) and any(case.head_dim == row["head_dim"] for case in SMOKE)
    assert_edges_are_tested(cases, row["forward"])


@pytest.mark.parametrize("row", TRAINING_ROWS, ids=lambda row: f"d{row['head_dim']}")
def test_every_row_that_trains_is_tested_at_the_edges_of_both_plans(row):
    cases = list(backward_cases(row))
    assert set(cases) <= set(BACKWARD) and any(case.head_dim == row["head_dim"] for case in BACKWARD_SMOKE)
    assert_edges_are_tested(cases, row["forward"])
    assert_edges_are_tested(cases, row["backward"])


def test_few_keys_are_those_of_the_source():
    assert re.findall(r"kFewKeys = (\d+);", (ROOT / "csrc" / "work.h").read_text()) == [str(FEW_KEYS)]


@each_plan
def test_every_plan_has_lengths_that_take_it(row, which, dtype):
    assert plan_taken(row, *lengths_of_plan(row, which)) is row[which]


def plans_of(cases):
    """The plans that they take, by the largest head dim of the row and place in the row."""
    taken = set()
    for case in cases:
        row = limits.row_of(case.head_dim)
        plan = plan_taken(row, case.seqlen_q, case.seqlen_k, **case.options())
        taken |= {(row["head_dim"], which) for which in ("forward", "short_forward") if row[which] is plan}
    return taken


@pytest.mark.parametrize("cases", [FORWARD, BETWEEN_CASES], ids=["FORWARD", "BETWEEN_CASES"])
def test_every_plan_is_tested(cases):
    assert plans_of(cases) == {(row["head_dim"], which) for row, which, _ in PLANS}


@pytest.mark.parametrize("document", ["README.md", "docs/head-dims.md"])
def test_documents_have_the_table(document):
    """The generated block is up to date, and says of every head dim whether it runs and trains."""
    assert document not in tables.check(), "run: python benchmarks/tables.py"
    begin, end = "<!-- support-table:begin -->", "<!-- support-table:end -->"
    block = (ROOT / document).read_text().split(begin)[1].split(end)[0]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in block.strip().splitlines()[2:]]
    shown = [(head_dims, forward != "–", backward != "–") for head_dims, forward, backward in cells]
    assert shown == [
        (f"{row['smallest']} to {row['head_dim']}", bool(row["forward"]), bool(row["backward"])) for row in limits.TABLE
    ]


def test_the_table_of_options_has_the_head_dims_of_rows(monkeypatch):
    (first, *_, last) = limits.TABLE
    assert f"| `softcap` | 8 to {last['head_dim']} | 8 to {last['head_dim']} |" in tables.option_block()
    ends = first["head_dim"], last["head_dim"]
    monkeypatch.setitem(limits.OPTIONS, "softcap", {"forward": ends, "backward": ()})
    shown = f"8 to {first['head_dim']}, {last['smallest']} to {last['head_dim']}"
    assert f"| `softcap` | {shown} | – |" in tables.option_block()


def kilobytes(size):
    return f"{size / 1024:g} KB"


def forward_shared_memory(row, which):
    """What the plan needs of it, in the columns of docs/forward.md: (text, bytes)."""
    plan, element = row[which], 2
    q, kv = (plan[block] * row["head_dim"] * element for block in ("block_q", "block_kv"))
    rings = 2 * plan["stages"] * kv
    has_out_buffer = 2 * q + rings + 4096 < 227 * 1024  # beside barriers and items, in what a thread block can have
    yield f"{plan['block_q']} x {plan['block_kv']}", 0
    yield kilobytes(q), q
    yield f"{plan['stages']} x 2 x {kilobytes(kv)}", rings
    yield (kilobytes(q), q) if has_out_buffer else ("in V's place", 0)


def backward_shared_memory(row, which):
    if is_by_pairs(row):
        return wide_shared_memory(row)
    plan, element = row[which], 2
    q, kv = (plan[block] * row["head_dim"] * element for block in ("block_q", "block_kv"))
    ds, stats = plan["block_q"] * plan["block_kv"] * element, 2 * plan["block_q"] * 4
    parts = [
        (f"{plan['block_q']} x {plan['block_kv']}", 0),
        (f"{kilobytes(kv)} + {kilobytes(kv)}", 2 * kv),
        *[(f"{plan['stages']} x {kilobytes(q)}", plan["stages"] * q)] * 2,
        (f"{plan['ds_stages']} x {kilobytes(ds)}", plan["ds_stages"] * ds),
        (kilobytes(kv), kv),
        (f"{plan['stages']} x {kilobytes(stats)}", plan["stages"] * stats),
    ]
    has_dv_buffer = sum(size for _, size in parts) + kv + 1024 <= 227 * 1024
    parts.insert(-1, (kilobytes(kv), kv) if has_dv_buffer else ("in V's place", 0))
    return parts


def wide_shared_memory(row):
    """Of one of the two thread blocks of a persistent pair: 64 keys are its own, and half of the columns."""
    plan, element = row["backward"], 2
    own_keys, half_tile = 64 * row["head_dim"] * element, 64 * row["head_dim"] // 2 * element
    ds, stats = plan["block_q"] * 64 * element, 2 * plan["block_q"] * 4
    assert plan["stages"] == plan["ds_stages"]
    parts = [
        (f"{plan['block_q']} x {plan['block_kv']}", 0),
        (f"{kilobytes(own_keys)} + {kilobytes(own_keys)}", 2 * own_keys),
        (kilobytes(half_tile), half_tile),
        *[(f"({plan['stages']} + 1) x {kilobytes(half_tile)}", (plan["stages"] + 1) * half_tile)] * 2,
        (f"{plan['stages']} x {kilobytes(ds)}", plan["stages"] * ds),
        (f"{plan['stages']} x {kilobytes(2 * ds)}", plan["stages"] * 2 * ds),
        (f"{plan['stages']} x {kilobytes(stats)}", plan["stages"] * stats),
    ]
    items_overlap = sum(size for _, size in parts) + 3 * half_tile + 4096 < 227 * 1024
    parts[-1:-1] = [
        (kilobytes(2 * half_tile), 2 * half_tile) if items_overlap else ("in V's place and K's", 0),
        (kilobytes(half_tile), half_tile) if items_overlap else ("K", 0),
    ]
    return parts


@needs_kernels
@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"d{row['head_dim']}")
def test_documents_have_the_shared_memory(row):
    """Part by part as the plan has it, and in all as the compiled kernels take it."""
    from flash_attn_ext import _C

    totals = _C.shared_memory(row["head_dim"])
    for which, total in zip(("forward", "short_forward", "backward"), totals, strict=True):
        document, parts = (
            ("backward", backward_shared_memory) if which == "backward" else ("forward", forward_shared_memory)
        )
        if not row[which]:
            assert total == 0
            continue
        texts, sizes = zip(*parts(row, which), strict=True)
        assert 0 < total - sum(sizes) <= 4096, "the barriers and records, up to the next whole KB"
        line = f"| {row['head_dim']} | {' | '.join(texts)} | {kilobytes(total - sum(sizes))} | {kilobytes(total)} |"
        assert line in (ROOT / "docs" / f"{document}.md").read_text()
