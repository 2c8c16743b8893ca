#!/usr/bin/env python3
"""What README.md and docs/ have from elsewhere: speed from the committed results, head dims from the compiled package,
the reference of functions from their docstrings.

    python benchmarks/tables.py            rewrites the blocks between the markers
    python benchmarks/tables.py --check    changes nothing; fails if a block is out of date

A document holds `<!-- NAME:begin -->` and `<!-- NAME:end -->` on lines of their own; what stands between them is ours.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import operator
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
CARDS = ("h200", "h100")  # whose results are published: of the first that has a file
GRID_NAMES = {
    "paper": "the papers' shapes",
    "models": "shapes of models",
    "packed": "packed sequences",
    "windows": "sliding windows",
    "options": "options of a call",
    "deterministic": "deterministic gradients",
    "dims": "other head dims",
}
# As many KV heads as heads: a row per head dim and mask, a column per length.
PAPER_GRIDS = ("paper", "deterministic", "dims")
DTYPES = ("bf16", "fp16")
TRAIN_STEP = RESULTS / "h200-train-step.json"
TRANSFORMERS_STEP = RESULTS / "h200-transformers-step.json"
PEER_NAMES = {
    "ours": "flash_attn_ext",
    "plain": "no option",  # this and the next two are ours on the grid of options, through autograd
    "dlse": "a loss that uses lse",
    "sinks": "sinks",
    "ours_deterministic": "flash_attn_ext deterministic",
    "fa3": "FA3",
    "fa3_deterministic": "FA3 deterministic",
    "cudnn": "cuDNN",
    "fa2": "FA2",
}
OPTIONS = ("dlse", "sinks")
OURS = {"ours", "plain", *OPTIONS, "ours_deterministic"}
MASK_NAMES = {False: "full", True: "causal"}
NOT_MEASURED = "No figures are published for this version yet."

# The package of this checkout goes first if `make build` has built it in place, as csrc/ describes it then; else last.
built_in_place = any((ROOT / "flash_attn_ext").glob("_C.*"))
sys.path.insert(0 if built_in_place else len(sys.path), str(ROOT))
sys.path.append(str(ROOT / "tools"))


def csrc_sha256(root: Path = ROOT) -> str:
    """The kernels' sources as one hash: `find csrc -type f | LC_ALL=C sort | xargs cat | sha256sum`."""
    files = [path for path in (root / "csrc").rglob("*") if path.is_file() and not path.is_symlink()]
    digest = hashlib.sha256()
    for path in sorted(files, key=lambda path: path.relative_to(root).as_posix().encode()):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def measured(grid: str, dtype: str) -> list[Path]:
    """The results files of all cards."""
    return [path for card in CARDS if (path := RESULTS / f"{card}-{grid}-{dtype}.json").exists()]


def published(grid: str, dtype: str) -> Path | None:
    """The results file whose cells the documents show, if there is one."""
    return next(iter(measured(grid, dtype)), None)


def all_published() -> list[Path]:
    return [path for grid in GRID_NAMES for dtype in DTYPES if (path := published(grid, dtype))]


def geometric_mean(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def ratio(cell: dict, peer: str = "fa3", ours: str = "ours") -> float | None:
    """Our speed over the peer's in one cell; None where either did not run."""
    speed, theirs = cell["tflops"].get(ours), cell["tflops"].get(peer)
    return speed / theirs if speed and theirs else None


def grid_peers(grid: str) -> list[str]:
    """The peers that are measured on a grid: cuDNN has, through torch, neither windows nor packed sequences but of one
    length."""
    if grid == "options":
        return ["plain", *OPTIONS]
    if grid == "deterministic":
        return ["ours", "ours_deterministic", "fa3", "fa3_deterministic"]
    if grid == "dims":
        return ["ours", "fa3", "cudnn"]
    return ["ours", "fa3", *(["cudnn"] if grid in ("paper", "models") else []), "fa2"]


def size(cell: dict) -> str:
    """Batch x sequence length, with the window if there is one; or how many sequences of which lengths are packed."""
    if "packing" in cell:
        return cell["packing"]
    window = f", window {cell['window']}" if "window" in cell else ""
    return f"{cell['batch']} x {cell['seqlen_q']}{window}"


def size_title(grid: str) -> str:
    return "sequences" if grid == "packed" else "batch x seqlen"


def shape(cell: dict) -> str:
    """Heads/KV heads x head dim, size."""
    return f"{cell['heads']}/{cell['kv_heads']} x {cell['head_dim']}, {size(cell)}"


def is_grouped(cell: dict) -> bool:
    """Whether heads share KV heads: they do in no cell of the papers' shapes, and in every cell of the other grids."""
    return cell["heads"] != cell["kv_heads"]


def grid_of(results: dict) -> str:
    """The grid of a results file. Older ones, which do not name it, are of the first two."""
    return results.get("grid") or ("models" if any(map(is_grouped, results["cells"])) else "paper")


def describe(cell: dict) -> str:
    """A cell's place on its grid: the papers' batch and heads follow from the rest, and all models are causal."""
    if is_grouped(cell) or "packing" in cell:
        return shape(cell)
    return f"head dim {cell['head_dim']} {MASK_NAMES[cell['causal']]} {cell['seqlen_q']}"


def by_pass(cells: list[dict]) -> dict[str, list[dict]]:
    """The cells of each pass, in the order of the file."""
    return {
        name: [cell for cell in cells if cell["pass"] == name] for name in dict.fromkeys(cell["pass"] for cell in cells)
    }


def by_shape(cells: list[dict]) -> dict[str, dict[str, dict]]:
    """The cells of each shape, by their pass, in the order of the file."""
    shapes: dict[str, dict[str, dict]] = {}
    for cell in cells:
        shapes.setdefault(shape(cell), {})[cell["pass"]] = cell
    return shapes


def mean_and_worst(cells: list[dict], peer: str, ours: str = "ours") -> tuple[float, dict]:
    """The geometric mean of our speed over the peer's, and the cell where it is least."""
    ratios = [ratio(cell, peer, ours) for cell in cells]
    return geometric_mean(ratios), cells[ratios.index(min(ratios))]


def summary(cells: list[dict], peer: str = "fa3", ours: str = "ours") -> list[str]:
    """Sentences that sum up our speed beside one peer: over all cells, then per head dim."""
    known = [cell for cell in cells if ratio(cell, peer, ours)]
    if not known:
        return []

    def of(some: list[dict]) -> str:
        mean, worst = mean_and_worst(some, peer, ours)
        return f"geometric mean {mean:.3f}, least {ratio(worst, peer, ours):.3f} ({describe(worst)})"

    lines = [f"{PEER_NAMES[ours]} / {PEER_NAMES[peer]}, {len(known)} cells: {of(known)}"]
    for head_dim in sorted({cell["head_dim"] for cell in known}):
        lines.append(f"head dim {head_dim}: {of([cell for cell in known if cell['head_dim'] == head_dim])}")
    return lines


def window_times(cells: list[dict]) -> list[str]:
    """Whether our time falls with the visible pairs: TFLOP/s count those, so the time of one is 1 / speed."""
    heads_of = operator.itemgetter("heads", "kv_heads", "head_dim", "batch", "seqlen_q")
    whole = {heads_of(cell): cell["tflops"].get("ours") for cell in cells if "window" not in cell}
    times = [
        f"{whole[heads_of(cell)] / cell['tflops']['ours']:.2f} ({describe(cell)})"
        for cell in cells
        if "window" in cell and cell["tflops"].get("ours") and whole.get(heads_of(cell))
    ]
    return [f"time of a visible pair, with a window / without: {', '.join(times)}"] if times else []


def option_costs(cells: list[dict]) -> list[str]:
    """By how much an option of a call lengthens it."""
    lines = []
    for option in OPTIONS:
        costs = [
            f"{100 * (cell['tflops']['plain'] / cell['tflops'][option] - 1):+.1f} % ({describe(cell)})"
            for cell in cells
            if cell["tflops"].get(option) and cell["tflops"].get("plain")
        ]
        lines += [f"time with {PEER_NAMES[option]}: {', '.join(costs)}"] if costs else []
    return lines


def deterministic_speeds(cells: list[dict]) -> list[str]:
    """The deterministic ones beside each other, and each beside its own default."""
    lines = summary(cells, "fa3_deterministic", "ours_deterministic")
    for peer in ("ours", "fa3"):
        lines += summary(cells, peer, f"{peer}_deterministic")
    return lines


def remarks(cells: list[dict]) -> list[str]:
    """What is said below a table about the cells of one pass."""
    return [*summary(cells), *window_times(cells), *option_costs(cells), *deterministic_speeds(cells)]


def peers_of(cells: list[dict]) -> list[str]:
    """The peers that ran at least once, ours first."""
    return [peer for peer in PEER_NAMES if any(cell["tflops"].get(peer) for cell in cells)]


def figures(cell: dict | None, peers: list[str]) -> str:
    """`a / b / ...` in TFLOP/s; a dash for a peer that did not run, and for a cell that is not on the grid."""
    if cell is None:
        return "–"
    speeds = [cell["tflops"].get(peer) for peer in peers]
    return " / ".join(f"{speed:.0f}" if speed else "–" for speed in speeds)


def speed_grid(cells: list[dict], peers: list[str]) -> list[str]:
    """Markdown of one pass on the papers' shapes: a row per head dim and mask, a column per sequence length."""
    seqlens = sorted({cell["seqlen_q"] for cell in cells})
    by_place = {(cell["head_dim"], cell["causal"], cell["seqlen_q"]): cell for cell in cells}
    lines = [
        "| head dim | mask | " + " | ".join(map(str, seqlens)) + " |",
        "|---|---|" + "---|" * len(seqlens),
    ]
    for head_dim, causal in sorted({place[:2] for place in by_place}):
        row = [figures(by_place.get((head_dim, causal, seqlen)), peers) for seqlen in seqlens]
        lines.append(f"| {head_dim} | {MASK_NAMES[causal]} | " + " | ".join(row) + " |")
    return lines


def shape_table(cells: list[dict], peers: list[str], title: str) -> list[str]:
    """Markdown of a grid of shapes: a row per shape, a column per pass. title: of the column of sizes."""
    passes = list(by_pass(cells))
    lines = [
        f"| heads/KV heads | head dim | {title} | " + " | ".join(passes) + " |",
        "|---|---|---|" + "---|" * len(passes),
    ]
    for of_pass in by_shape(cells).values():
        cell = next(iter(of_pass.values()))
        row = [figures(of_pass.get(name), peers) for name in passes]
        lines.append(
            f"| {cell['heads']}/{cell['kv_heads']} | {cell['head_dim']} | {size(cell)} | " + " | ".join(row) + " |"
        )
    return lines


def paper_tables(results: dict, wanted: list[str], sentences: int | None) -> list[str]:
    """Of the papers' shapes."""
    lines, grid = [], grid_of(results)
    for name, cells in by_pass(results["cells"]).items():
        peers = [peer for peer in peers_of(cells) if peer in wanted]
        named = " / ".join(PEER_NAMES[peer] for peer in peers)
        title = (name if grid == "paper" else f"{GRID_NAMES[grid]}, {name}").capitalize()
        lines += [f"{title}, {cells[0]['dtype']}, TFLOP/s: {named}", "", *speed_grid(cells, peers), ""]
        lines += [f"- {line}" for line in remarks(cells)[:sentences]] + [""]
    return lines


def shapes_table(results: dict, wanted: list[str], sentences: int | None) -> list[str]:
    """Of a grid with grouped heads."""
    grid, cells = grid_of(results), results["cells"]
    peers = [peer for peer in peers_of(cells) if peer in wanted]
    named = " / ".join(PEER_NAMES[peer] for peer in peers)
    title = f"{GRID_NAMES[grid].capitalize()}, grouped-query and causal, {cells[0]['dtype']}, TFLOP/s: {named}"
    lines = [title, "", *shape_table(cells, peers, size_title(grid)), ""]
    for name, of_pass in by_pass(cells).items():
        lines += [f"- {name}, {line}" for line in remarks(of_pass)[:sentences]]
    return lines + [""]


def speed_tables(results: dict, wanted: list[str], sentences: int | None = None) -> list[str]:
    """The tables of one results file, restricted to the wanted peers, with so many sentences on each pass below."""
    write = paper_tables if grid_of(results) in PAPER_GRIDS else shapes_table
    return write(results, wanted, sentences)


def environment_line(results: dict) -> str:
    env, ceiling = results["environment"], results.get("ceiling_tflops")
    return (
        f"{env['gpu']}, driver {env['driver']}, CUDA {env['cuda']}, cuDNN {env['cudnn']}, torch {env['torch']}, "
        f"Python {env['python']}. "
        + (f"cuBLAS 8192³ in the same run: {ceiling:.0f} TFLOP/s. " if ceiling else "")
        + f"Sources: csrc sha256 `{results['csrc_sha256'][:12]}`."
    )


def overhead_lines(results: dict) -> list[str]:
    names = {
        "ours": "`flash_attn_func`, no grad",
        "ours_raw": "the bare binding under it",
        "fa3": "FA3's bare operator",
        "sdpa": "torch's SDPA, no grad",
        "ours_grad": "`flash_attn_func`, with grad",
        "sdpa_grad": "torch's SDPA, with grad",
        "sdpa_ours": "SDPA under `flash_attn_ext.sdpa`, no grad",
        "sdpa_flash": "SDPA on torch's flash backend, no grad",
        "sdpa_ours_grad": "SDPA under `flash_attn_ext.sdpa`, with grad",
        "sdpa_flash_grad": "SDPA on torch's flash backend, with grad",
    }
    times = results.get("overhead_us") or {}
    rows = [f"| {label} | {times[peer]:.1f} |" for peer, label in names.items() if times.get(peer)]
    sources = results.get("overhead_csrc_sha256", results["csrc_sha256"])
    of = "" if sources == results["csrc_sha256"] else f", of csrc sha256 `{sources[:12]}`"
    return [f"CPU time of one call, µs{of}:", "", "| call | µs |", "|---|---|", *rows, ""] if rows else []


def plots(path: Path, results: dict) -> dict[str, str]:
    """The names of the plots of a results file, without folder, and what each shows."""
    grid = grid_of(results)
    if grid in PAPER_GRIDS:
        shown = "speed" if grid == "paper" else f"speed, {GRID_NAMES[grid]}"
        return {f"{path.stem}-{name}.png": f"{name} {shown}" for name in by_pass(results["cells"])}
    return {f"{path.stem}.png": f"speed on {GRID_NAMES[grid]}"}


def standing_block() -> str:
    """Our speed over the peers' in a few figures: a row per grid and card, bf16."""
    peers, passes = ("fa3", "cudnn"), ("forward", "backward")

    def figure(cells: list[dict], peer: str, ours: str) -> str:
        known = [cell for cell in cells if ratio(cell, peer, ours)]
        if not known:
            return "–"
        mean, worst = mean_and_worst(known, peer, ours)
        return f"{mean:.2f} ({ratio(worst, peer, ours):.2f})"

    columns = [f"{PEER_NAMES[peer]} {name}" for peer in peers for name in passes]
    lines = [f"| speed, ours / theirs | {' | '.join(columns)} |", "|---" * (1 + len(columns)) + "|"]
    for grid, shapes in GRID_NAMES.items():
        if not set(peers) & set(grid_peers(grid)):
            continue
        for path in measured(grid, "bf16"):
            results = json.loads(path.read_text())
            cells = by_pass(results["cells"])
            kind = "_deterministic" if grid == "deterministic" else ""  # of ours and of theirs
            row = [figure(cells.get(name, []), peer + kind, "ours" + kind) for peer in peers for name in passes]
            lines.append(f"| {path.name.split('-')[0].upper()}, {shapes} | {' | '.join(row)} |")
    below = "bf16, geometric mean over all shapes, and in brackets the least: [Speed](#speed) has the figures."
    return "\n".join([*lines, "", below]) if len(lines) > 2 else NOT_MEASURED


def readme_block() -> str:
    """The short form: the papers' grid, bf16, ours beside FA3, with its plots."""
    path = published("paper", "bf16")
    if not path:
        return NOT_MEASURED
    results = json.loads(path.read_text())
    lines = [*speed_tables(results, ["ours", "fa3"], sentences=1), environment_line(results)]
    for image, shown in plots(path, results).items():
        lines += ["", f"![{shown}](docs/images/{image})"]
    return "\n".join(lines)


def full_block() -> str:
    """The long form: every published file, every peer, the CPU time of a call, and the plots."""
    parts = []
    for path in all_published():
        results = json.loads(path.read_text())
        parts += [*speed_tables(results, list(PEER_NAMES)), environment_line(results), "", *overhead_lines(results)]
        for image, shown in plots(path, results).items():
            parts += [f"![{shown}](images/{image})", ""]
    return "\n".join(parts).strip() or NOT_MEASURED


def step_table(path: Path, names: dict[str, str]) -> str:
    """A training step with each attention. The run without one is what attention's share is counted from."""
    if not path.exists():
        return NOT_MEASURED
    results = json.loads(path.read_text())
    lines = ["| attention | step, ms | tokens/s | attention's share | peak GiB |", "|---|---|---|---|---|"]
    for name, figures in results["attention"].items():
        if name in names:
            share = figures["attention_share"]
            lines.append(
                f"| {names[name]} | {figures['step_ms']:.1f} | {figures['tokens_per_second']:,} "
                f"| {'–' if share is None else f'{100 * share:.1f} %'} | {figures['peak_gib']:.2f} |"
            )
    return "\n".join([*lines, "", environment_line(results)])


def train_step_block() -> str:
    return step_table(TRAIN_STEP, PEER_NAMES)


def transformers_step_block() -> str:
    return step_table(TRANSFORMERS_STEP, {name: f'`"{name}"`' for name in ("fa_ext", "flash_attention_3", "sdpa")})


def support_block() -> str | None:
    """Which head dims run and which train, from csrc/limits.h, row by row; None where setup.py never ran."""
    from flash_attn_ext.limits import GPU_DTYPES, TABLE

    if not TABLE:
        return None
    dtypes = ", ".join(str(dtype).removeprefix("torch.") for dtype in GPU_DTYPES)
    lines = [f"| head dim, a multiple of {TABLE[0]['step']} | forward | backward |", "|---|---|---|"]
    for row in TABLE:
        forward, backward = (dtypes if row[name] else "–" for name in ("forward", "backward"))
        lines.append(f"| {row['smallest']} to {row['head_dim']} | {forward} | {backward} |")
    return "\n".join(lines)


def option_block() -> str | None:
    """The head dims at which the kernels have an option, from flash_attn_ext/limits.py."""
    from flash_attn_ext.limits import OPTIONS, TABLE, has_option, head_dims, stretches

    if not TABLE:
        return None
    names = {"dlse": "a loss that uses lse"}
    lines = ["| option | forward | backward |", "|---|---|---|"]
    for option in OPTIONS:
        cells = [names.get(option, f"`{option}`")]
        for which in ("forward", "backward"):
            have = head_dims(row for row in TABLE if row[which] and has_option(option, which, row["head_dim"]))
            cells.append(", ".join(f"{first} to {last}" for first, last in stretches(have)) or "–")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def reference_block() -> str:
    """The public functions, those that most need first."""
    import api_reference

    import flash_attn_ext

    first = ["flash_attn_func", "flash_attn_varlen_func", "forward", "backward", "supported", "is_available", "explain"]
    names = [name for name in flash_attn_ext.__all__ if callable(getattr(flash_attn_ext, name))]
    return api_reference.reference(
        [getattr(flash_attn_ext, name) for name in [*first, *(name for name in names if name not in first)]]
    )


# document -> marker -> the function that writes what stands between the markers, or None where it cannot know
BLOCKS = {
    ROOT / "README.md": {
        "standing": standing_block,
        "support-table": support_block,
        "option-table": option_block,
        "speed-table": readme_block,
    },
    ROOT / "docs" / "api.md": {"reference": reference_block},
    ROOT / "docs" / "head-dims.md": {"support-table": support_block},
    ROOT / "docs" / "performance.md": {"speed-table": full_block},
    ROOT / "docs" / "training.md": {
        "train-step-table": train_step_block,
        "transformers-step-table": transformers_step_block,
    },
}


def with_block(text: str, marker: str, block: str) -> str:
    """The text with the block between its markers replaced."""
    begin, end = f"<!-- {marker}:begin -->", f"<!-- {marker}:end -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"expected one {begin} and, after it, one {end}")
    return text[: text.index(begin) + len(begin)] + f"\n{block}\n" + text[text.index(end) :]


def rewritten(document: Path) -> str:
    text = document.read_text()
    for marker, write in BLOCKS[document].items():
        block = write()
        if block is not None:
            text = with_block(text, marker, block)
    return text


def check() -> list[str]:
    """The documents, relative to the repository, whose tables are out of date; [] is good."""
    return [str(path.relative_to(ROOT)) for path in BLOCKS if path.read_text() != rewritten(path)]


def main() -> int:
    parser = argparse.ArgumentParser(description="The tables of README.md and docs/.")
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if a document is out of date")
    args = parser.parse_args()

    stale = check()
    shown = [path for grid in GRID_NAMES for dtype in DTYPES for path in measured(grid, dtype)]
    for path in (*shown, TRAIN_STEP, TRANSFORMERS_STEP):
        if path.exists() and json.loads(path.read_text())["csrc_sha256"] != csrc_sha256():
            print(f"note: {path.relative_to(ROOT)} was measured on other sources than csrc/ holds now")
    if args.check:
        for name in stale:
            print(f"the tables of {name} are out of date; run: python benchmarks/tables.py")
        return 1 if stale else 0
    for name in stale:
        (ROOT / name).write_text(rewritten(ROOT / name))
        print(f"rewrote {name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
