"""The scripts of benchmarks/ as far as they go without a GPU: the grids, and what is written from a results file."""

import dataclasses
import itertools
import json
import subprocess
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from cases import needs_kernels
from torch.backends.cuda import cudnn_sdp_enabled
from torch.nn.attention import SDPBackend, current_flash_attention_impl, varlen  # noqa: F401 (varlen is replaced in a test)

import flash_attn_ext
from flash_attn_ext.limits import has_pass
from flash_attn_ext.options import Options
from flash_attn_ext.reference import visible

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks"))
import attention  # noqa: E402
import peers  # noqa: E402
import tables  # noqa: E402

PASSES = ("forward", "backward")
each_grid = pytest.mark.parametrize("grid", attention.GRIDS)


def cells_of(grid, **chosen):
    return [cell for name in PASSES for cell in attention.GRIDS[grid](name, "bf16", **chosen)]


def call_main(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["attention.py", *arguments])
    return attention.main()


# ---- the grids ----


@each_grid
def test_dry_run(grid, monkeypatch, capsys):
    assert call_main(monkeypatch, "--dry-run", "--grid", grid) == 0
    out, cells = capsys.readouterr().out, cells_of(grid)
    assert f"{len(cells)} cells" in out
    assert all(f"{cell.heads}/{cell.kv_heads}" in out for cell in cells)


def test_heads():
    """The papers' shapes have a KV head for every head, the others share them: tables.py tells them apart by that."""
    assert all(cell.heads == cell.kv_heads for grid in tables.PAPER_GRIDS for cell in cells_of(grid))
    assert {*tables.PAPER_GRIDS, *attention.LISTS} == set(attention.GRIDS)
    for grid in attention.LISTS:
        assert all(cell.heads % cell.kv_heads == 0 and cell.heads > cell.kv_heads for cell in cells_of(grid))


@each_grid
def test_cells_can_be_told_apart(grid):
    cells = cells_of(grid)
    assert len({attention.label(cell) for cell in cells}) == len(cells)


def test_deterministic_cells_are_the_papers_of_many_tokens():
    cells = cells_of("deterministic")
    assert set(cells) == {cell for cell in cells_of("paper") if cell.pass_name == "backward" and cell.seqlen_q >= 4096}
    assert cells_of("deterministic", seqlens=[512]) == [
        cell for cell in cells_of("paper", seqlens=[512]) if cell.pass_name == "backward"
    ]


@pytest.mark.parametrize("grid", ["paper", "models"])
@pytest.mark.parametrize("name", PASSES)
def test_a_pass_has_the_papers_head_dims(grid, name):
    assert {cell.head_dim for cell in attention.GRIDS[grid](name, "bf16")} == {64, 128, 256}


def test_options_select_cells_of_models():
    every = cells_of("models")
    assert cells_of("models", head_dims=[64], seqlens=[2048, 4096], masks=["causal"]) == [
        cell for cell in every if cell.head_dim == 64 and cell.seqlen_q in (2048, 4096)
    ]
    assert cells_of("models", head_dims=[96]) == cells_of("models", masks=["full"]) == []


def test_the_papers_grid_at_any_head_dim():
    """Heads are whole: as many as make the papers' hidden size, or nearly so."""
    cells = cells_of("paper", head_dims=[72, 80, 96, 128, 192, 4096], seqlens=[2048], masks=["full"])
    heads = {72: 28, 80: 26, 96: 21, 128: 16, 192: 11, 4096: 1}
    assert [(cell.head_dim, cell.heads, cell.batch) for cell in cells] == [(d, heads[d], 8) for d in heads] * len(
        PASSES
    )


@pytest.mark.parametrize("count", range(1, 7))
def test_each_peer_follows_each_other_one_equally_often(count):
    peers = "abcdef"[:count]
    rounds = [attention.in_turn(list(peers), done) for done in range(count * (1 + count % 2))]
    assert all(sorted(order) == list(peers) for order in rounds)
    followed = Counter(pair for order in rounds for pair in itertools.pairwise(order))
    assert set(followed) == set(itertools.permutations(peers, 2)) and len(set(followed.values())) <= 1


def test_other_head_dims():
    """Of language models on the papers' shapes, of vision towers over packed images that see all of themselves."""
    cells = cells_of("dims")
    assert {cell.head_dim for cell in cells} == {72, 80, 96, 192} and all(
        has_pass(c.pass_name, c.head_dim) for c in cells
    )
    papers = [cell for cell in cells if not cell.packing]
    assert papers == cells_of("dims", head_dims=[96, 192]) == cells_of("paper", head_dims=[96, 192])
    assert len(papers) == len(PASSES) * 2 * 2 * len(attention.SEQLENS)
    images = [cell for cell in cells if cell.packing]
    assert images == cells_of("dims", head_dims=[72, 80]) == cells_of("dims", head_dims=[72, 80], masks=["full"])
    assert {(c.head_dim, c.batch, c.seqlen_q) for c in images} == {
        (d, *x) for d in (72, 80) for x in ((16, 1024), (4, 4096))
    }
    assert {(c.heads, c.kv_heads, c.batch * c.seqlen_q, c.causal) for c in images} == {(16, 16, 16384, False)}
    assert [c.seqlen_q for c in cells_of("dims", seqlens=[1024], masks=["full"])] == [1024] * 4 * len(PASSES)


def test_no_cell_is_left(monkeypatch, capsys):
    assert call_main(monkeypatch, "--dry-run", "--grid", "models", "--masks", "full") == 2
    assert "--grid models" in capsys.readouterr().out


@each_grid
def test_a_part_is_not_written_over_the_whole(grid, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["attention.py", "--name", "h100", "--grid", grid])
    args = attention.parse_args()
    assert attention.results_path(args, cells_of(grid)).name == f"h100-{grid}-bf16.json"
    assert attention.results_path(args, cells_of(grid)[1:]).name == "h100-part-bf16.json"


def test_flops():
    """Of query heads: fewer KV heads are less memory, not fewer products."""
    cell = attention.Cell("forward", 128, False, 2, 1024, 1024, 32, 8, "bf16")
    assert cell.flops == 4 * 2 * 32 * 1024 * 1024 * 128
    causal = dataclasses.replace(cell, causal=True)
    assert causal.flops == cell.flops / 2, "as the papers count"
    assert dataclasses.replace(causal, pass_name="backward").flops == 2.5 * causal.flops


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 200])
@pytest.mark.parametrize("window", [None, 1, 2, 64, 199, 200, 1000])
def test_visible_pairs(length, window):
    size = peers.Pattern(True, window).window_size
    seen = visible(length, length, Options.of(causal=True, window_size=size))
    assert attention.visible_pairs(length, window) == seen.sum()


def test_flops_of_windows_and_packed_sequences():
    def pairs(**changes):
        cell = attention.Cell("forward", 128, True, 1, 32768, 32768, 32, 8, "bf16")
        cell = dataclasses.replace(cell, **changes)
        assert cell.flops == 4 * 32 * 128 * cell.pairs
        return cell.pairs

    assert pairs() == 32768**2 / 2
    assert pairs(window=1024) == 1024 * 1025 // 2 + (32768 - 1024) * 1024
    assert pairs(packing="8 of 2048") == 8 * 2048 * 2049 // 2
    assert pairs(packing="4 of 4096", causal=False) == 4 * 4096**2


def test_packings():
    """The same ones in every run, whatever Python draws them: figures of two runs are of the same lengths."""
    equal, tailed, short = attention.PACKINGS.values()
    assert equal == (2048,) * 8
    assert (len(tailed), sum(tailed), min(tailed), max(tailed)) == (24, 39577, 71, 8157)
    assert (len(short), sum(short), min(short), max(short)) == (1024, 65379, 48, 83)
    assert all(16384 <= sum(lengths) <= 65536 for lengths in attention.LENGTHS.values())


@pytest.mark.parametrize("grid", ["packed", "windows"])
def test_a_cell_says_what_it_has_beside_its_shape(grid):
    """So the files of the other grids have no new keys."""
    keys = set().union(*(cell.record() for cell in cells_of(grid)))
    assert keys - set(cells_of("models")[0].record()) == {{"packed": "packing", "windows": "window"}[grid]}


@each_grid
def test_every_grid_has_its_peers(grid, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["attention.py", "--grid", grid])
    named = attention.parse_args().chosen_peers
    assert named == [peer for peer in peers.BINDERS if peer in named], "in the order of the tables"
    assert ("cudnn" in named) == (grid in ("paper", "models", "dims"))
    first = ["ours", "ours_deterministic", "fa3"] if grid == "deterministic" else ["ours", "fa3"]
    assert set(named) <= tables.OURS if grid == "options" else named[: len(first)] == first


# ---- the peers and their judge ----

# On CPU tensors: ours is its reference there, and torch's own path stands in for the judge.
MATH = peers.autograd_binders(partial(peers.attend_torch, SDPBackend.MATH))


def worst_errors(results, expected, name):
    rows = attention.COMPARED_ROWS[name]
    return max(attention.worst_error(a, b, rows) for a, b in zip(results, expected, strict=True))


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("name", PASSES)
def test_the_judge_compares_grouped_heads(name, kv_heads):
    q, dout = (torch.randn(2, 96, 4, 16) for _ in range(2))
    k, v = (torch.randn(2, 96, kv_heads, 16) for _ in range(2))
    pattern = peers.Pattern(causal=True)
    with torch.no_grad():
        results = peers.BINDERS["ours"][name](q, k, v, dout, pattern)()
        expected = MATH[name](q, k, v, dout, pattern)()
    assert [x.shape for x in expected] == [x.shape for x in ([q] if name == "forward" else [q, k, v])]
    rows = attention.COMPARED_ROWS[name]
    for result, right in zip(results, expected, strict=True):
        assert attention.worst_error(result, right, rows) < 1e-4
        wrong = result.clone()
        wrong[:, -rows:, -1] = 0
        assert attention.worst_error(wrong, right, rows) > attention.MAX_ERROR
        with pytest.raises(ArithmeticError, match="shape"):
            attention.worst_error(result.repeat(1, 1, 2, 1), right, rows)


@pytest.fixture
def fa3(monkeypatch):
    """FA3's operators on CPU tensors, as far as they are called: with its names, and its own mask and packing."""

    def options(is_causal, window_size_left, window_size_right, cu_seqlens_q=None, cu_seqlens_k=None, **longest):
        if cu_seqlens_q is not None:
            assert longest == dict.fromkeys(("max_seqlen_q", "max_seqlen_k"), cu_seqlens_q.diff().max())
        window = window_size_left, window_size_right
        return dict(causal=is_causal, window_size=window, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)

    def fwd(q, k, v, num_splits=0, **asked):
        return *flash_attn_ext.forward(q, k, v, **options(**asked)), None, None

    def bwd(dout, q, k, v, out, lse, dq, dk, dv, deterministic=False, **asked):
        deterministic_calls.append(deterministic)
        gradients = flash_attn_ext.backward(dout, q, k, v, out, lse, **options(**asked))
        for place, gradient in zip((dq, dk, dv), gradients, strict=True):
            place.copy_(gradient)

    deterministic_calls = []
    monkeypatch.setattr(torch.ops, "flash_attn_3", SimpleNamespace(fwd=fwd, bwd=bwd), raising=False)
    return deterministic_calls


@pytest.fixture
def varlen_attn(monkeypatch):
    """torch's function on CPU tensors: a dense call for each sequence, of keys that a mask in the open hides."""

    def attend(q, k, v, cu_seqlens, cu_seqlens_k, longest, longest_k, window_size):
        assert cu_seqlens is cu_seqlens_k and longest == longest_k == cu_seqlens.diff().max()
        left, right = window_size
        outs = []
        for begin, end in itertools.pairwise(cu_seqlens.tolist()):
            alone = [x[begin:end].transpose(0, 1) for x in (q, k, v)]
            seen = torch.ones(end - begin, end - begin, dtype=torch.bool)
            seen = seen.tril(right) if right >= 0 else seen
            seen = seen.triu(-left) if left >= 0 else seen
            out = torch.nn.functional.scaled_dot_product_attention(*alone, seen, enable_gqa=True)
            outs.append(out.transpose(0, 1))
        return torch.cat(outs)

    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", attend)


@pytest.mark.parametrize("name", PASSES)
@pytest.mark.parametrize("lengths, window", [((1, 64, 70, 200), None), ((1, 64, 70, 200), 16), (None, 3), (None, 50)])
def test_peers_see_the_same_keys(name, lengths, window, fa3, varlen_attn):
    """Packed sequences and windows: all peers say what a query sees in their own words, and agree."""
    rows = (2, 100) if lengths is None else (sum(lengths),)
    q, dout = (torch.randn(*rows, 4, 16) for _ in range(2))
    k, v = (torch.randn(*rows, 2, 16) for _ in range(2))
    pattern = peers.Pattern.packed(lengths, window, "cpu") if lengths else peers.Pattern(True, window)
    with torch.no_grad():
        expected = peers.BINDERS["fa2"][name](q, k, v, dout, pattern)()
        for peer in ("ours", "fa3"):
            assert worst_errors(peers.BINDERS[peer][name](q, k, v, dout, pattern)(), expected, name) < 1e-4
        other = peers.Pattern.packed(lengths[::-1], window, "cpu") if lengths else peers.Pattern(True, window + 1)
        results = peers.BINDERS["ours"][name](q, k, v, dout, other)()
        assert worst_errors(results, expected, name) > attention.MAX_ERROR
        with pytest.raises(NotImplementedError, match="neither windows nor packed"):
            peers.BINDERS["cudnn"][name](q, k, v, dout, pattern)()


@pytest.mark.parametrize("name", PASSES)
def test_peers_see_the_same_keys_of_images(name, fa3, varlen_attn, monkeypatch):
    """Packed sequences of one length, without a mask: cuDNN's are a dense batch, and nobody sees another image."""
    monkeypatch.setitem(peers.BINDERS, "cudnn", MATH)
    q, k, v, dout = (torch.randn(3 * 70, 4, 16) for _ in range(4))
    pattern = peers.Pattern.packed((70,) * 3, device="cpu", causal=False)
    with torch.no_grad():
        expected = peers.BINDERS["fa2"][name](q, k, v, dout, pattern)()
        for peer in tables.grid_peers("dims"):
            results = peers.BINDERS[peer][name](q, k, v, dout, pattern)()
            assert worst_errors(results, expected, name) < 1e-4
        for other in (
            peers.Pattern.packed((70,) * 3, device="cpu"),
            peers.Pattern.packed((105,) * 2, device="cpu", causal=False),
        ):
            results = peers.BINDERS["ours"][name](q, k, v, dout, other)()
            assert worst_errors(results, expected, name) > attention.MAX_ERROR


@pytest.mark.parametrize("name", PASSES)
@pytest.mark.parametrize("peer", tables.grid_peers("options"))
def test_options_are_asked_for_and_change_no_result(peer, name, monkeypatch):
    q, dout = (torch.randn(2, 96, 4, 16) for _ in range(2))
    k, v = (torch.randn(2, 96, 2, 16) for _ in range(2))
    pattern, asked = peers.Pattern(causal=True), []
    backward = flash_attn_ext.reference.backward

    def watched(dout, q, k, v, out, lse, options, dlse=None, *others):
        asked.append((options.sinks is not None, dlse is not None))
        return backward(dout, q, k, v, out, lse, options, dlse, *others)

    monkeypatch.setattr(flash_attn_ext.reference, "backward", watched)
    with torch.no_grad():
        results = peers.BINDERS[peer][name](q, k, v, dout, pattern)()
        assert worst_errors(results, MATH[name](q, k, v, dout, pattern)(), name) < 1e-4
    if name == "backward" and peer != "plain":
        assert set(asked) == {(peer == "sinks", peer == "dlse")}


@pytest.mark.parametrize("peer", tables.grid_peers("deterministic"))
def test_deterministic_peers_ask_for_it(peer, fa3, monkeypatch):
    q, k, v, dout = (torch.randn(2, 96, 4, 16) for _ in range(4))
    pattern, ours, backward = peers.Pattern(causal=True), [], flash_attn_ext.cpu.backward

    def watched(*arguments):
        ours.append(arguments[6].deterministic)
        return backward(*arguments)

    monkeypatch.setattr(flash_attn_ext.cpu, "backward", watched)
    with torch.no_grad():
        results = peers.BINDERS[peer]["backward"](q, k, v, dout, pattern)()
        assert worst_errors(results, MATH["backward"](q, k, v, dout, pattern)(), "backward") < 1e-4
    assert (ours if peer.startswith("ours") else fa3) == [peer.endswith("deterministic")]


def test_a_peer_that_is_not_deterministic_is_found():
    """One that writes into the same memory in every run, as FA3's does."""
    gradient, last_bits = torch.ones(8), iter([0.0] * 5 + [1e-7] + [0.0] * 100)

    def call():
        gradient.fill_(1 + next(last_bits))
        return (gradient,)

    with pytest.raises(ArithmeticError, match="not the same in every run"):
        attention.check_every_run(call)
    assert 5 < attention.REPEATS
    attention.check_every_run(call)


@needs_kernels
def test_whose_time_is_taken(monkeypatch):
    """Each call of --overhead under what its name says, and nothing of that stays."""
    seen = {}

    def look(q, k, v):
        name = "sdpa_ours" if current_flash_attention_impl() else "sdpa_flash" if not cudnn_sdp_enabled() else "sdpa"
        seen.setdefault(name, set()).add((torch.is_grad_enabled(), q.requires_grad))

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(attention.Cell, "inputs", lambda cell: [torch.randn(1, 4, 2, 8) for _ in range(4)])
    monkeypatch.setattr(attention.F, "scaled_dot_product_attention", look)
    with torch.no_grad():
        times = attention.measure_overhead(["ours"], "bf16", calls=2, turn=1)
    ways = ("sdpa", "sdpa_flash", "sdpa_ours", "ours")
    assert set(times) == {"ours_raw", *ways, *(f"{name}_grad" for name in ways)}
    assert seen == dict.fromkeys(ways[:3], {(False, False), (True, True)})
    assert cudnn_sdp_enabled() and current_flash_attention_impl() is None


# ---- what is written from a results file ----


# TFLOP/s by the place of the cell in its file; FA2 ran nowhere.
SPEEDS = {
    "ours": lambda index: 500.0 + index,
    "plain": lambda index: 510.0,
    "dlse": lambda index: 500.0,
    "sinks": lambda index: 510.0 + index,
    "ours_deterministic": lambda index: 440.0,
    "fa3": lambda index: 500.0,
    "fa3_deterministic": lambda index: 400.0,
    "cudnn": lambda index: 400.0,
    "fa2": lambda index: None,
}


@pytest.fixture
def published(tmp_path, monkeypatch):
    """A function that publishes made-up results of a grid, in a folder of their own."""
    monkeypatch.setattr(tables, "RESULTS", tmp_path)

    def write(card, grid, dtype="bf16"):
        of_grid = tables.grid_peers(grid)
        cells = [
            {**cell.record(), "tflops": {peer: speed(index) for peer, speed in SPEEDS.items() if peer in of_grid}}
            for index, cell in enumerate(cells_of(grid))
        ]
        environment = {"gpu": card.upper(), **dict.fromkeys(("driver", "cuda", "cudnn", "torch", "python"), "1.0")}
        results = {"environment": environment, "csrc_sha256": tables.csrc_sha256(), "ceiling_tflops": 700.0}
        path = tmp_path / f"{card}-{grid}-{dtype}.json"
        path.write_text(json.dumps({"grid": grid, **results, "cells": cells}))
        return path

    return write


def rows(block):
    return [line for line in block.splitlines() if line.startswith("| ")]


def test_nothing_is_published(published):
    assert tables.readme_block() == tables.full_block() == tables.standing_block() == tables.NOT_MEASURED


def test_the_table_of_models(published, monkeypatch):
    monkeypatch.setattr(attention, "has_pass", lambda name, head_dim: name == "forward" or head_dim <= 128)
    published("h100", "models")
    full = tables.full_block()
    shapes = {tables.shape(cell.record()) for cell in cells_of("models")}
    assert len(rows(full)) == 1 + len(shapes)
    assert "| 32/8 | 128 | 1 x 512 | 500 / 500 / 400 | 520 / 500 / 400 |" in full
    assert "| 8/4 | 256 | 1 x 8192 | 516 / 500 / 400 | – |" in full, "no backward at this head dim"
    for text in ("forward, flash_attn_ext / FA3, 20 cells", "least 1.000 (32/8 x 128, 1 x 512)", "H100, driver"):
        assert text in full
    assert "h100-models-bf16.png" in full and tables.readme_block() == tables.NOT_MEASURED


def test_the_table_of_packed_sequences(published):
    published("h100", "packed")
    full = tables.full_block()
    assert "Packed sequences, grouped-query and causal, bf16, TFLOP/s: flash_attn_ext / FA3" in full
    assert "| heads/KV heads | head dim | sequences | forward | backward |" in full
    assert "| 64/8 | 64 | 1024 of about 64 | 505 / 500 | 511 / 500 |" in full
    assert "least 1.012 (32/8 x 128, 8 of 2048)" in full and "of a visible pair" not in full
    assert rows(tables.standing_block())[1:] == ["| H100, packed sequences | 1.00 (1.00) | 1.02 (1.01) | – | – |"]


def test_the_table_of_windows(published):
    """Speeds count visible pairs: ours goes from 500 to 501 and 502, and so takes less for each of them."""
    published("h100", "windows")
    full = tables.full_block()
    assert "| 32/8 | 128 | 1 x 32768, window 1024 | 502 / 500 | 508 / 500 |" in full
    assert (
        "- forward, time of a visible pair, with a window / without: 1.00 (32/8 x 128, 1 x 32768, window 4096), "
        in full
    )
    assert full.count("of a visible pair") == len(PASSES) and "H100, sliding windows" in tables.standing_block()


def test_the_table_of_options(published):
    published("h100", "options")
    full = tables.full_block()
    assert "TFLOP/s: no option / a loss that uses lse / sinks" in full
    assert "- backward, time with a loss that uses lse: +2.0 % (32/8 x 128, 2 x 4096), +2.0 % (64/8 x 64" in full
    assert "- backward, time with sinks: -0.4 % (32/8 x 128, 2 x 4096), -0.6 % (64/8 x 64, 2 x 4096)" in full
    assert tables.standing_block() == tables.NOT_MEASURED, "no peer but ours"


def test_the_table_of_deterministic_gradients(published):
    """Ours runs at 440 TFLOP/s there, FA3 at 400."""
    published("h100", "deterministic")
    full, every = tables.full_block(), len(cells_of("deterministic"))
    names = "flash_attn_ext / flash_attn_ext deterministic / FA3 / FA3 deterministic"
    assert f"Deterministic gradients, backward, bf16, TFLOP/s: {names}" in full
    assert "| head dim | mask | 4096 | 8192 | 16384 |" in full
    assert "| 64 | full | 500 / 440 / 500 / 400 | 501 / 440 / 500 / 400 | 502 / 440 / 500 / 400 |" in full
    for line in (
        f"- flash_attn_ext deterministic / FA3 deterministic, {every} cells: geometric mean 1.100, least 1.100 (head",
        f"- flash_attn_ext deterministic / flash_attn_ext, {every} cells: geometric mean 0.8",
        f"- FA3 deterministic / FA3, {every} cells: geometric mean 0.800, least 0.800 (head dim 64 full 4096)",
    ):
        assert line in full
    assert "![backward speed, deterministic gradients](images/h100-deterministic-bf16-backward.png)" in full
    assert rows(tables.standing_block())[1:] == ["| H100, deterministic gradients | – | 1.10 (1.10) | – | – |"]
    assert tables.readme_block() == tables.NOT_MEASURED


def test_the_table_of_other_head_dims(published):
    """Where a head dim has no such cell there is a dash."""
    published("h100", "dims")
    full = tables.full_block()
    assert "Other head dims, backward, bf16, TFLOP/s: flash_attn_ext / FA3 / cuDNN" in full
    dashes = {length: "–" for length in attention.SEQLENS}
    for head_dim, first in ((72, 524), (80, 526)):  # after the papers' shapes of the pass
        row = dashes | {1024: f"{first} / 500 / 400", 4096: f"{first + 1} / 500 / 400"}
        assert f"| {head_dim} | full | {' | '.join(row.values())} |" in full
    assert "| 96 | causal | 506 / 500 / 400 |" in full and "| 72 | causal |" not in full
    assert "least 1.000 (head dim 96 full 512)" in full and "least 1.048 (16/16 x 72, 16 of 1024)" in full
    assert rows(tables.standing_block())[1:] == [
        "| H100, other head dims | 1.03 (1.00) | 1.08 (1.06) | 1.28 (1.25) | 1.35 (1.32) |"
    ]


def test_files_without_the_name_of_their_grid(published):
    """As they were written before there were more than two."""
    for grid in ("paper", "models"):
        results = json.loads(published("h100", grid).read_text())
        assert results.pop("grid") == tables.grid_of(results) == grid


def test_each_grid_has_its_card(published):
    """Of two cards the first is shown, for every grid and type by itself; a grid without results is left out."""
    paper = published("h200", "paper")
    readme, alone = tables.readme_block(), tables.full_block()
    for block in (readme, alone):
        assert "Shapes of models" not in block and "head dim 64 full 512" in block
        assert f"{paper.stem}-backward.png" in block
    published("h100", "models")
    published("h100", "models", "fp16")
    assert [path.name for path in tables.all_published()] == [
        "h200-paper-bf16.json",
        "h100-models-bf16.json",
        "h100-models-fp16.json",
    ]
    assert tables.full_block().startswith(alone) and tables.full_block().count("H100, driver") == 2
    published("h200", "models")
    assert tables.full_block().count("H100, driver") == 1 and tables.readme_block() == readme


def test_a_few_figures_of_every_card(published):
    """Ours runs at 500 TFLOP/s and one more in each cell, FA3 at 500 and cuDNN at 400."""
    published("h100", "paper")
    published("h200", "paper", "fp16")
    first = "| H100, the papers' shapes | 1.03 (1.00) | 1.11 (1.07) | 1.29 (1.25) | 1.38 (1.34) |"
    assert rows(tables.standing_block())[1:] == [first]
    published("h200", "paper")
    published("h100", "models")
    assert [row.split("|")[1] for row in rows(tables.standing_block())[1:]] == [
        " H200, the papers' shapes ",
        " H100, the papers' shapes ",
        " H100, shapes of models ",
    ]


def test_documents_are_rewritten_and_checked(published, tmp_path, monkeypatch, capsys):
    document = tmp_path / "README.md"
    document.write_text("before\n<!-- speed-table:begin -->\n<!-- speed-table:end -->\nafter\n")
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    monkeypatch.setattr(tables, "TRAIN_STEP", tmp_path / "h100-train-step.json")
    monkeypatch.setattr(tables, "TRANSFORMERS_STEP", tmp_path / "h100-transformers-step.json")
    monkeypatch.setattr(tables, "BLOCKS", {document: {"speed-table": tables.readme_block}})

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["tables.py", *arguments])
        return tables.main()

    for publish in (lambda: None, lambda: published("h100", "paper"), lambda: published("h200", "paper")):
        publish()
        assert run("--check") == 1
        assert run() == run("--check") == 0
    text = document.read_text()
    assert (
        text.startswith("before\n")
        and text.endswith("after\n")
        and "| 64 | causal | 5" in text
        and "H200, driver" in text
    )


@pytest.mark.parametrize(
    "grid, names",
    [
        ("paper", ["h100-paper-bf16-forward.png", "h100-paper-bf16-backward.png"]),
        ("deterministic", ["h100-deterministic-bf16-backward.png"]),
        ("dims", ["h100-dims-bf16-forward.png", "h100-dims-bf16-backward.png"]),
        *((grid, [f"h100-{grid}-bf16.png"]) for grid in attention.LISTS),
    ],
)
def test_plots(published, grid, names, tmp_path):
    pytest.importorskip("matplotlib")
    import plot

    images = plot.plot(published("h100", grid), tmp_path / "images")
    assert [image.name for image in images] == names
    assert all(image.read_bytes().startswith(b"\x89PNG") for image in images)
    assert all(f"(images/{name})" in tables.full_block() for name in names)


def test_every_bar_has_its_figure(published):
    pytest.importorskip("matplotlib")
    import plot

    for grid in attention.GRIDS:
        results = json.loads(published("h100", grid).read_text())
        of_pass = grid in tables.PAPER_GRIDS
        draw = partial(plot.draw_pass, name="backward") if of_pass else plot.draw_shapes
        cells = [cell for cell in results["cells"] if not of_pass or cell["pass"] == "backward"]
        figures = [f"{speed:.0f}" for cell in cells for speed in cell["tflops"].values() if speed]
        assert sorted(text.get_text() for axis in draw(results).axes for text in axis.texts) == sorted(figures)


@pytest.mark.parametrize(
    ("argument", "code", "words"), [("--help", 0, "usage: plot.py"), ("results.json", 1, "pip install matplotlib")]
)
def test_plot_without_matplotlib(argument, code, words):
    script = str(ROOT / "benchmarks" / "plot.py")
    start = f"import runpy, sys; sys.modules['matplotlib'] = None; sys.argv = [{script!r}, {argument!r}]; "
    start += f"sys.path.insert(0, {str(ROOT / 'benchmarks')!r}); runpy.run_path({script!r}, run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", start], capture_output=True, text=True)
    assert done.returncode == code and words in done.stdout + done.stderr and "Traceback" not in done.stderr


# ---- a step in transformers ----


@pytest.fixture
def transformers_step(monkeypatch, tmp_path):
    """Runs the script at its tiny size; returns its exit status and what it has written."""
    pytest.importorskip("transformers", minversion="5.24", reason="transformers 5.24 is not installed")
    import transformers_step as script

    for functions in (script.ALL_ATTENTION_FUNCTIONS, script.ALL_MASK_ATTENTION_FUNCTIONS):
        monkeypatch.setattr(type(functions), "_global_mapping", dict(functions))

    def run(*arguments):
        path = tmp_path / "results.json"
        options = ["--tiny", "--rounds", "2", "--output", str(path), *arguments]
        monkeypatch.setattr(sys, "argv", ["transformers_step.py", *options])
        status = script.main()
        return status, json.loads(path.read_text()) if path.exists() else None

    return run


def test_attentions_in_transformers_compute_the_same(transformers_step, capsys):
    status, results = transformers_step("--attentions", "fa_ext", "sdpa", "none")
    assert status == 0 and results["equal"] == ["fa_ext", "sdpa"]
    assert list(results["attention"]) == ["fa_ext", "sdpa", "none"]
    assert sum(results["documents"]) == 128 and min(results["documents"]) >= 2
    bf16, joined = (results["errors"][name] for name in ("yardstick", "joined"))
    assert all(joined[what] > 10 * bf16[what] for what in ("logits", "gradients")), "else nothing would be told apart"
    assert "The same, to 2 times the errors of bf16: fa_ext, sdpa." in capsys.readouterr().out.replace("\n", " ")


def test_a_wrong_attention_in_transformers_is_not_timed(transformers_step, monkeypatch, capsys):
    """One in which documents see each other."""
    from transformers_step import adapter

    right = adapter.attention
    monkeypatch.setattr(adapter, "attention", lambda module, q, k, v, mask, **others: right(module, q, k, v, None))
    status, results = transformers_step("--attentions", "fa_ext", "sdpa")
    assert status == 0 and list(results["attention"]) == results["equal"] == ["sdpa"]
    assert "fa_ext is left out: ArithmeticError: wrong logits" in capsys.readouterr().out


def test_the_table_of_a_step_in_transformers(tmp_path, monkeypatch):
    assert tables.step_table(tmp_path / "nothing.json", {}) == tables.NOT_MEASURED
    figures = {"step_ms": 91.84, "tokens_per_second": 44599, "attention_share": None, "peak_gib": 21.4}
    environment = dict.fromkeys(("gpu", "driver", "cuda", "cudnn", "torch", "python"), "1.0")
    results = {"environment": environment, "csrc_sha256": "0" * 64, "attention": {"fa_ext": figures, "none": figures}}
    monkeypatch.setattr(tables, "TRANSFORMERS_STEP", tmp_path / "results.json")
    tables.TRANSFORMERS_STEP.write_text(json.dumps(results))
    text = tables.transformers_step_block()
    assert '| `"fa_ext"` | 91.8 | 44,599 | – | 21.40 |' in text and "none" not in text
