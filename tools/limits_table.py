"""Reads the table of csrc/limits.h without a compiler, and writes it down as flash_attn_ext/_limits_table.py.

An installation with kernels asks its compiled module. The written table is for the others: a laptop can then tell which
head dims run on a Hopper GPU. setup.py writes it whenever it runs; a table that cannot be read fails the build.
"""

import pprint
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HEADER = ROOT / "csrc" / "limits.h"
MODULE = ROOT / "flash_attn_ext" / "_limits_table.py"


def parse(source: str) -> list[dict]:
    """The rows as the compiled module gives them: whole numbers by their names, None for a pass that is not built."""
    source = re.sub(r"//[^\n]*", "", source)
    table = re.search(r"kLimits\[\]\s*=\s*\{(.*?)\n\};", source, re.DOTALL)
    body = table[1] if table else ""
    row = r"\{\s*\.head_dim = (\d+),\s*\.forward = \{([^{}]*)\},\s*\.backward = \{([^{}]*)\},?\s*\}"
    rows = re.findall(row, body)
    if not rows or len(rows) != body.count(".head_dim"):
        raise ValueError("the table kLimits in csrc/limits.h has a row that tools/limits_table.py cannot read")

    def plan(fields: str) -> dict[str, int] | None:
        return {name: int(number) for name, number in re.findall(r"\.(\w+) = (\d+)", fields)} or None

    step = re.search(r"kHeadDimStep = (\d+)", source)
    if not step:
        raise ValueError("csrc/limits.h does not say which head dims there are between two rows (kHeadDimStep)")
    table, smallest, step = [], int(step[1]), int(step[1])
    for head_dim, forward, backward in rows:
        plans = {"forward": plan(forward), "backward": plan(backward)}
        table.append({"head_dim": int(head_dim), "smallest": smallest, "step": step, **plans})
        smallest = int(head_dim) + step
    return table


def write() -> None:
    table = pprint.pformat(parse(HEADER.read_text()), sort_dicts=False, width=100)
    text = f'"""Written by tools/limits_table.py from csrc/limits.h."""\n\nTABLE = {table}\n'
    if not MODULE.exists() or MODULE.read_text() != text:
        MODULE.write_text(text)


if __name__ == "__main__":
    write()
