#!/usr/bin/env python3
"""Plots of a results file of benchmarks/attention.py: one figure per pass, a panel per head dim and mask.

`python benchmarks/plot.py benchmarks/results/h200-paper-bf16.json` writes into docs/images/.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib
from tables import MASK_NAMES, PEER_NAMES, ROOT, by_pass, peers_of

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

# Colours that stay apart for colour-blind readers (Okabe and Ito); ours is the strong one.
COLOURS = {"ours": "#D55E00", "fa3": "#0072B2", "cudnn": "#56B4E9", "fa2": "#BBBBBB"}


def seqlen_label(seqlen: int) -> str:
    return f"{seqlen // 1024}k" if seqlen % 1024 == 0 else str(seqlen)


def draw_panel(axis, cells: list[dict], peers: list[str], ceiling: float | None) -> None:
    """Bars of one head dim and mask, grouped by sequence length; our own carry their figure."""
    cells = sorted(cells, key=lambda cell: cell["seqlen_q"])
    width = 0.84 / len(peers)
    for place, peer in enumerate(peers):
        middle = (place - (len(peers) - 1) / 2) * width
        speeds = [cell["tflops"].get(peer) or 0 for cell in cells]
        bars = axis.bar([i + middle for i in range(len(cells))], speeds, width, color=COLOURS[peer], zorder=2)
        if peer == "ours":
            shown = [f"{speed:.0f}" if speed else "" for speed in speeds]
            axis.bar_label(bars, shown, fontsize=8, padding=-20, color="white", rotation=90)
    if ceiling:
        axis.axhline(ceiling, color="#444444", linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)
    axis.set_xticks(range(len(cells)), [seqlen_label(cell["seqlen_q"]) for cell in cells])
    axis.grid(axis="y", color="#E6E6E6", zorder=0)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(length=0)


def draw(results: dict, name: str) -> plt.Figure:
    """The figure of one pass."""
    cells = by_pass(results["cells"])[name]
    peers, ceiling = peers_of(cells), results["ceiling_tflops"]
    rows = sorted({cell["causal"] for cell in cells})
    columns = sorted({cell["head_dim"] for cell in cells})
    size = (1.2 + 4.4 * len(columns), 1.4 + 2.7 * len(rows))
    figure, axes = plt.subplots(len(rows), len(columns), figsize=size, sharey=True, squeeze=False, layout="constrained")
    for row, causal in zip(axes, rows, strict=True):
        for axis, head_dim in zip(row, columns, strict=True):
            panel = [cell for cell in cells if (cell["causal"], cell["head_dim"]) == (causal, head_dim)]
            draw_panel(axis, panel, peers, ceiling)
            axis.set_title(f"head dim {head_dim}, {MASK_NAMES[causal]}", fontsize=10, loc="left")
        row[0].set_ylabel("TFLOP/s")
    for axis in axes[-1]:
        axis.set_xlabel("sequence length")
    marks = [plt.Rectangle((0, 0), 1, 1, color=COLOURS[peer]) for peer in peers]
    labels = [PEER_NAMES[peer] for peer in peers]
    if ceiling:
        marks.append(plt.Line2D([], [], color="#444444", linewidth=0.9, linestyle=(0, (4, 3))))
        labels.append(f"cuBLAS 8192³ ({ceiling:.0f})")
    figure.suptitle(f"Attention {name}, {cells[0]['dtype']}, {results['environment']['gpu']}", fontsize=12)
    figure.legend(marks, labels, loc="outside lower center", ncols=len(marks), frameon=False)
    return figure


def plot(path: Path, folder: Path = ROOT / "docs" / "images") -> list[Path]:
    """Writes the figures of a results file as NAME-PASS.png; returns their paths."""
    results = json.loads(Path(path).read_text())
    folder.mkdir(parents=True, exist_ok=True)
    images = []
    for name in by_pass(results["cells"]):
        image = folder / f"{Path(path).stem}-{name}.png"
        figure = draw(results, name)
        # Without the metadata, equal results give equal files whatever matplotlib drew them.
        figure.savefig(image, dpi=130, metadata={"Software": None})
        plt.close(figure)
        images.append(image)
    return images


def main() -> None:
    parser = argparse.ArgumentParser(description="PNG plots of a results file of benchmarks/attention.py.")
    parser.add_argument("results", type=Path, help="a file of benchmarks/results/")
    parser.add_argument("--folder", type=Path, default=ROOT / "docs" / "images", help="default: docs/images/")
    args = parser.parse_args()
    for image in plot(args.results, args.folder):
        print(f"wrote {image}")


if __name__ == "__main__":
    main()
