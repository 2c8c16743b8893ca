"""The scripts of benchmarks/ as far as they go without a GPU: the grids, and what is written from a results file."""

import sys
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks"))
import attention  # noqa: E402
import peers  # noqa: E402

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
    """The papers' grid has a KV head for every head, models share them: tables.py tells the two apart by that."""
    assert all(cell.heads == cell.kv_heads for cell in cells_of("paper"))
    assert all(cell.heads % cell.kv_heads == 0 and cell.heads > cell.kv_heads for cell in cells_of("models"))


@each_grid
def test_cells_can_be_told_apart(grid):
    cells = cells_of(grid)
    assert len({attention.label(cell) for cell in cells}) == len(cells)


@each_grid
@pytest.mark.parametrize("name", PASSES)
def test_a_pass_has_the_head_dims_that_ours_has(grid, name):
    assert {cell.head_dim for cell in attention.GRIDS[grid](name, "bf16")} == set(attention.HEAD_DIMS[name])


def test_options_select_cells_of_models():
    every = cells_of("models")
    assert cells_of("models", head_dims=[64], seqlens=[2048, 4096], masks=["causal"]) == [
        cell for cell in every if cell.head_dim == 64 and cell.seqlen_q in (2048, 4096)
    ]
    assert cells_of("models", head_dims=[96]) == cells_of("models", masks=["full"]) == []


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


# ---- the judge ----


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("name", PASSES)
def test_the_judge_compares_grouped_heads(name, kv_heads):
    """On CPU tensors: ours is its reference there, and torch's own path stands in for the judge."""
    q, dout = (torch.randn(2, 96, 4, 16) for _ in range(2))
    k, v = (torch.randn(2, 96, kv_heads, 16) for _ in range(2))
    judge = peers.sdpa_binders(SDPBackend.MATH)
    with torch.no_grad():
        results = peers.BINDERS["ours"][name](q, k, v, dout, True)()
        expected = judge[name](q, k, v, dout, True)()
    assert [x.shape for x in expected] == [x.shape for x in ([q] if name == "forward" else [q, k, v])]
    rows = attention.COMPARED_ROWS[name]
    for result, right in zip(results, expected, strict=True):
        assert attention.worst_error(result, right, rows) < 1e-4
        wrong = result.clone()
        wrong[:, -rows:, -1] = 0
        assert attention.worst_error(wrong, right, rows) > attention.MAX_ERROR
        with pytest.raises(ArithmeticError, match="shape"):
            attention.worst_error(result.repeat(1, 1, 2, 1), right, rows)
