"""Runs nvcc and reads what ptxas says: python tools/nvcc.py <nvcc> <its arguments>.

A kernel that spills registers, needs a stack frame, or whose wgmma instructions ptxas had to serialise (messages C75xx,
some of which are mere info lines) compiles, gives right results and is slow. Here such a kernel is a warning, and with
FLASH_ATTN_EXT_STRICT=1 the compilation fails. What ptxas said is kept beside the object file, as <object>.ptxas.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

FAULTS = (
    (re.compile(r"\bC75\d\d\b"), "ptxas changed the kernel's wgmma pipeline"),
    (re.compile(r"\b[1-9]\d* bytes stack frame"), "stack frame"),
    (re.compile(r"\b[1-9]\d* bytes spill (stores|loads)"), "register spill"),
)


def faults(log: str) -> list[str]:
    """The lines of ptxas's output that no kernel of this project may have, each with the function it is about."""
    found, function = [], ""
    for line in log.splitlines():
        if match := re.search(r"(?:Compiling entry function|Function properties for) '?([\w$]+)'?", line):
            function = match[1]
        for pattern, meaning in FAULTS:
            if pattern.search(line):
                found.append(f"{meaning}: {line.strip()}" + (f" [{function}]" if function not in line else ""))
                break
    return found


def is_report(line: str) -> bool:
    """Whether a line tells only registers, sizes and times of a kernel: that is for the file, not for the screen."""
    return line.startswith("ptxas info") and not re.search(r"\bC\d+", line) or "bytes stack frame" in line


def main(command: list[str]) -> int:
    run = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    for line in run.stdout.splitlines():
        if not is_report(line):
            print(line)
    if run.returncode or "-o" not in command:
        return run.returncode
    target = Path(command[command.index("-o") + 1])
    target.with_name(target.name + ".ptxas").write_text(run.stdout)
    strict = os.environ.get("FLASH_ATTN_EXT_STRICT") == "1"
    found = faults(run.stdout)
    for fault in found:
        print(f"{'error' if strict else 'warning'}: {fault}")
    if found and strict:
        target.unlink(missing_ok=True)  # so that the next build compiles it again
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
