"""The scripts of benchmarks/ as far as they go without a GPU: the grids, and what is written from a results file."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend

from flash_attn_ext.limits import TABLE

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
    """The papers' grid has a KV head for every head, models share them: tables.py tells the two apart by that."""
    assert all(cell.heads == cell.kv_heads for cell in cells_of("paper"))
    assert all(cell.heads % cell.kv_heads == 0 and cell.heads > cell.kv_heads for cell in cells_of("models"))


@each_grid
def test_cells_can_be_told_apart(grid):
    cells = cells_of(grid)
    assert len({attention.label(cell) for cell in cells}) == len(cells)


@pytest.mark.parametrize("name", PASSES)
def test_head_dims_are_the_tables(name):
    assert attention.HEAD_DIMS[name] == tuple(row["head_dim"] for row in TABLE if row[name])


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


# ---- what is written from a results file ----


@pytest.fixture
def published(tmp_path, monkeypatch):
    """A function that publishes made-up results of a grid, in a folder of their own."""
    monkeypatch.setattr(tables, "RESULTS", tmp_path)

    def write(card, grid, dtype="bf16"):
        cells = [
            {**cell.record(), "tflops": {"ours": 500.0 + index, "fa3": 500.0, "cudnn": 400.0, "fa2": None}}
            for index, cell in enumerate(cells_of(grid))
        ]
        environment = {"gpu": card.upper(), **dict.fromkeys(("driver", "cuda", "cudnn", "torch", "python"), "1.0")}
        results = {"environment": environment, "csrc_sha256": tables.csrc_sha256(), "ceiling_tflops": 700.0}
        path = tmp_path / f"{card}-{grid}-{dtype}.json"
        path.write_text(json.dumps({**results, "cells": cells}))
        return path

    return write


def rows(block):
    return [line for line in block.splitlines() if line.startswith("| ")]


def test_nothing_is_published(published):
    assert tables.readme_block() == tables.full_block() == tables.standing_block() == tables.NOT_MEASURED


def test_the_table_of_models(published):
    published("h100", "models")
    full = tables.full_block()
    shapes = {tables.shape(cell.record()) for cell in cells_of("models")}
    assert len(rows(full)) == 1 + len(shapes)
    assert "| 32/8 | 128 | 1 x 512 | 500 / 500 / 400 | 520 / 500 / 400 |" in full
    assert "| 8/4 | 256 | 1 x 8192 | 516 / 500 / 400 | – |" in full, "no backward at this head dim"
    for text in ("forward, flash_attn_ext / FA3, 20 cells", "least 1.000 (32/8 x 128, 1 x 512)", "H100, driver"):
        assert text in full
    assert "h100-models-bf16.png" in full and tables.readme_block() == tables.NOT_MEASURED


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
    first = "| H100, the papers' shapes | 1.03 (1.00) | 1.09 (1.07) | 1.29 (1.25) | 1.37 (1.34) |"
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
    [("paper", ["h100-paper-bf16-forward.png", "h100-paper-bf16-backward.png"]), ("models", ["h100-models-bf16.png"])],
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

    for grid, draw in (("paper", lambda results: plot.draw_pass(results, "forward")), ("models", plot.draw_models)):
        results = json.loads(published("h100", grid).read_text())
        cells = [cell for cell in results["cells"] if grid == "models" or cell["pass"] == "forward"]
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
