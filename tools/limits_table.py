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
    """The rows as the compiled module gives them: plans with whole numbers by their names and the flags that are set,
    None for one that is not built."""
    source = re.sub(r"//[^\n]*", "", source)
    table = re.search(r"kLimits\[\]\s*=\s*\{(.*?)\n\};", source, re.DOTALL)
    body = table[1] if table else ""
    plans = ("forward", "short_forward", "backward")
    fields = (rf"(?:\.{name} =\s+\{{([^{{}}]*)\}},?\s*)?" for name in plans)
    row = rf"\{{\s*\.head_dim = (\d+),\s*{''.join(fields)}\}}"
    rows = re.findall(row, body)
    if not rows or len(rows) != body.count(".head_dim"):
        raise ValueError("the table kLimits in csrc/limits.h has a row that tools/limits_table.py cannot read")

    def plan(fields: str) -> dict[str, int | bool] | None:
        values = re.findall(r"\.(\w+) = (\d+|true)", fields)
        return {name: True if value == "true" else int(value) for name, value in values} or None

    step = re.search(r"kHeadDimStep = (\d+)", source)
    if not step:
        raise ValueError("csrc/limits.h does not say which head dims there are between two rows (kHeadDimStep)")
    table, smallest, step = [], int(step[1]), int(step[1])
    for head_dim, *found in rows:
        row = {"head_dim": int(head_dim), "smallest": smallest, "step": step}
        table.append(row | {name: plan(fields) for name, fields in zip(plans, found, strict=True)})
        smallest = int(head_dim) + step
    return table


def write() -> None:
    table = pprint.pformat(parse(HEADER.read_text()), sort_dicts=False, width=100)
    text = f'"""Written by tools/limits_table.py from csrc/limits.h."""\n\nTABLE = {table}\n'
    if not MODULE.exists() or MODULE.read_text() != text:
        MODULE.write_text(text)


if __name__ == "__main__":
    write()
