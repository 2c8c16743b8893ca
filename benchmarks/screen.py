"""What the benchmarks print: text, tables and a progress bar, by rich where it is installed, else plain."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import TypeVar

try:
    from rich.console import Console
    from rich.progress import Progress
    from rich.table import Table

    terminal = sys.stdout.isatty()
    console = Console(width=None if terminal else 120, highlight=False, markup=False)
except ImportError:  # plain text then
    console = None

Item = TypeVar("Item")


def say(text: str) -> None:
    console.print(text, soft_wrap=True) if console else print(text, flush=True)


def reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else '(no text)'}"


def with_progress(items: list[Item], label: Callable[[Item], str]) -> Iterator[Item]:
    """The items, under a progress bar where there is a terminal to draw it on."""
    if console is None or not console.is_terminal:
        yield from items
        return
    with Progress(console=console, auto_refresh=False) as bar:  # no thread that draws while launches are timed
        task = bar.add_task("", total=len(items))
        for item in items:
            bar.update(task, description=label(item), refresh=True)
            yield item
            bar.advance(task)


def show(header: list[str], rows: list[list[str]]) -> None:
    if console is None:
        widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
        for row in [header, *rows]:
            print("  ".join(text.rjust(width) for text, width in zip(row, widths, strict=True)))
        return
    table = Table()
    for name in header:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*row)
    console.print(table)
