#!/usr/bin/env python3
"""Plots of a results file of benchmarks/attention.py.

The papers' shapes: a figure per pass, with a panel per head dim and mask. Other grids: one figure, a panel per pass.
`python benchmarks/plot.py benchmarks/results/h200-paper-bf16.json` writes into docs/images/.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from tables import (
    GRID_NAMES,
    MASK_NAMES,
    PAPER_GRIDS,
    PEER_NAMES,
    ROOT,
    by_pass,
    by_shape,
    grid_of,
    peers_of,
    plots,
    size_title,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Of the bars and of the figures on them. The bars' stay apart for colour-blind readers (Okabe and Ito); ours is strong.
COLOURS = {
    "ours": ("#D55E00", "white"),
    "plain": ("#D55E00", "white"),
    "dlse": ("#E69F00", "black"),
    "sinks": ("#F0E442", "black"),
    "ours_deterministic": ("#E69F00", "black"),
    "fa3": ("#0072B2", "white"),
    "fa3_deterministic": ("#56B4E9", "black"),
    "cudnn": ("#56B4E9", "black"),
    "fa2": ("#BBBBBB", "black"),
}
CEILING = dict(color="#444444", linewidth=0.9, linestyle=(0, (4, 3)))


def seqlen_label(seqlen: int) -> str:
    return f"{seqlen // 1024}k" if seqlen % 1024 == 0 else str(seqlen)


def draw_panel(axis, tflops: list[dict], labels: list[str], peers: list[str], ceiling: float | None) -> None:
    """A group of bars for each label, a bar for each peer with its figure at the foot."""
    width = 0.84 / len(peers)
    for place, peer in enumerate(peers):
        middle = (place - (len(peers) - 1) / 2) * width
        speeds = [of_peer.get(peer) or 0 for of_peer in tflops]
        places = [i + middle for i in range(len(tflops))]
        bar_colour, colour = COLOURS[peer]
        axis.bar(places, speeds, width, color=bar_colour, zorder=2)
        for x, speed in zip(places, speeds, strict=True):
            if speed:
                style = dict(fontsize=8, color=colour, rotation=90, ha="center", va="bottom")
                axis.annotate(f"{speed:.0f}", (x, 0), (0, 3), textcoords="offset points", **style)
    if ceiling:
        axis.axhline(ceiling, **CEILING, zorder=1)
    axis.set_xticks(range(len(tflops)), labels)
    axis.grid(axis="y", color="#E6E6E6", zorder=0)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(length=0)


def panels(rows: int, columns: int, size: tuple[float, float], **shared: bool):
    """A new figure and its axes."""
    from matplotlib.figure import Figure  # so late that --help needs no matplotlib

    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **shared)


def finish(figure: Figure, title: str, peers: list[str], results: dict) -> None:
    """Title and legend."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    ceiling = results["ceiling_tflops"]
    marks = [Patch(color=COLOURS[peer][0]) for peer in peers]
    labels = [PEER_NAMES[peer] for peer in peers]
    if ceiling:
        marks.append(Line2D([], [], **CEILING))
        labels.append(f"cuBLAS 8192³ ({ceiling:.0f})")
    dtype, gpu = results["cells"][0]["dtype"], results["environment"]["gpu"]
    figure.suptitle(f"{title}, {dtype}, {gpu}", fontsize=12)
    figure.legend(marks, labels, loc="outside lower center", ncols=len(marks), frameon=False)


def draw_pass(results: dict, name: str) -> Figure:
    """The figure of one pass on the papers' shapes."""
    grid, cells = grid_of(results), by_pass(results["cells"])[name]
    peers = peers_of(cells)
    rows = sorted({cell["causal"] for cell in cells})
    columns = sorted({cell["head_dim"] for cell in cells})
    size = (1.2 + 4.4 * len(columns), 1.4 + 2.7 * len(rows))
    figure, axes = panels(len(rows), len(columns), size, sharey=True)
    for row, causal in zip(axes, rows, strict=True):
        for axis, head_dim in zip(row, columns, strict=True):
            panel = [cell for cell in cells if (cell["causal"], cell["head_dim"]) == (causal, head_dim)]
            if not panel:  # a head dim with one mask alone
                axis.set_axis_off()
                continue
            panel.sort(key=lambda cell: cell["seqlen_q"])
            labels = [seqlen_label(cell["seqlen_q"]) for cell in panel]
            draw_panel(axis, [cell["tflops"] for cell in panel], labels, peers, results["ceiling_tflops"])
            axis.set_title(f"head dim {head_dim}, {MASK_NAMES[causal]}", fontsize=10, loc="left")
        next(axis for axis in row if axis.axison).set_ylabel("TFLOP/s")
    for column in axes.T:
        [axis for axis in column if axis.axison][-1].set_xlabel("sequence length")
    finish(figure, f"Attention {name}" + ("" if grid == "paper" else f", {GRID_NAMES[grid]}"), peers, results)
    return figure


def draw_shapes(results: dict) -> Figure:
    """Both passes on a grid of shapes, one above the other. A pass that a shape does not have leaves a gap."""
    grid = grid_of(results)
    shapes, passes = by_shape(results["cells"]), list(by_pass(results["cells"]))
    peers = peers_of(results["cells"])
    size = (1.4 + 0.62 * len(shapes), 2.4 + 2.7 * len(passes))
    figure, axes = panels(len(passes), 1, size, sharex=True)
    for axis, name in zip(axes[:, 0], passes, strict=True):
        tflops = [of_pass[name]["tflops"] if name in of_pass else {} for of_pass in shapes.values()]
        draw_panel(axis, tflops, list(shapes), peers, results["ceiling_tflops"])
        axis.set_title(name, fontsize=10, loc="left")
        axis.set_ylabel("TFLOP/s")
    axes[-1, 0].tick_params(axis="x", rotation=40)
    for label in axes[-1, 0].get_xticklabels():
        label.set(ha="right", rotation_mode="anchor")
    axes[-1, 0].set_xlabel(f"heads/KV heads x head dim, {size_title(grid)}")
    finish(figure, f"Attention on {GRID_NAMES[grid]}, causal", peers, results)
    return figure


def plot(path: Path, folder: Path = ROOT / "docs" / "images") -> list[Path]:
    """Writes the figures of a results file; returns their paths."""
    results = json.loads(Path(path).read_text())
    folder.mkdir(parents=True, exist_ok=True)
    if grid_of(results) in PAPER_GRIDS:
        figures = [draw_pass(results, name) for name in by_pass(results["cells"])]
    else:
        figures = [draw_shapes(results)]
    images = [folder / name for name in plots(path, results)]
    for figure, image in zip(figures, images, strict=True):
        # Without the metadata, equal results give equal files whatever matplotlib drew them.
        figure.savefig(image, dpi=130, metadata={"Software": None})
    return images


def main() -> None:
    parser = argparse.ArgumentParser(description="PNG plots of a results file of benchmarks/attention.py.")
    parser.add_argument("results", type=Path, help="a file of benchmarks/results/")
    parser.add_argument("--folder", type=Path, default=ROOT / "docs" / "images", help="default: docs/images/")
    args = parser.parse_args()
    if not importlib.util.find_spec("matplotlib"):
        sys.exit("plot.py draws with matplotlib, which is not installed: pip install matplotlib")
    for image in plot(args.results, args.folder):
        print(f"wrote {image}")


if __name__ == "__main__":
    main()
