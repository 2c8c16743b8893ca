"""Text and tables on the terminal: in colour by rich where it is installed (pip install rich), else plain."""

import shutil
import sys
import textwrap

try:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text
except ImportError:
    Console = None

# A cell's colour follows from its first word.
COLORS = {"yes": "green", "ok": "green", "no": "red", "WRONG": "bold red", "–": "dim"}


def say(text: str = "", style: str = "") -> None:
    """Paragraphs, one a line. The style is rich's; plain text has none."""
    for line in text.split("\n"):
        lead = " " * (len(line) - len(line.lstrip()))
        _print(textwrap.fill(line, _width(), subsequent_indent=lead, break_on_hyphens=False), style)


def facts(named: dict[str, str]) -> None:
    """A line for each name and its value."""
    width = max(map(len, named)) + 2
    for name, value in named.items():
        lines = textwrap.wrap(value, max(20, _width() - width), break_on_hyphens=False)
        _print(name.ljust(width) + ("\n" + " " * width).join(lines), bold=len(name))


def table(header: list[str], rows: list[list[str]]) -> None:
    """A table; a column whose name begins with > is aligned to the right, and the last one takes the width left."""
    right = [name.startswith(">") for name in header]
    header = [name.removeprefix(">") for name in header]
    if Console:
        drawn = Table(box=SIMPLE_HEAD, pad_edge=False)
        for column, name in enumerate(header):
            is_last = column == len(header) - 1
            drawn.add_column(name, justify="right" if right[column] else "left", no_wrap=not is_last)
        for row in rows:
            drawn.add_row(*(Text(cell, COLORS.get(cell.split(" ")[0].rstrip(":"), "")) for cell in row))
        _console().print(drawn)
        return
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    indent = sum(widths[:-1]) + 2 * (len(widths) - 1)
    widths[-1] = min(widths[-1], max(20, _width() - indent))
    print()
    for row in [header, *rows]:
        last, *more = textwrap.wrap(row[-1], widths[-1]) or [""]
        cells = zip([*row[:-1], last], widths, right, strict=True)
        print(
            "  ".join(cell.rjust(width) if is_right else cell.ljust(width) for cell, width, is_right in cells).rstrip()
        )
        for line in more:
            print(" " * indent + line)
    print()


def _print(text: str, style: str = "", bold: int = 0) -> None:
    """One piece of text as it stands; `bold` characters at its beginning stand out."""
    if not Console:
        print(text)
        return
    styled = Text(text, style)
    styled.stylize("bold", 0, bold)
    _console().print(styled, soft_wrap=True)


def _console() -> "Console":
    return Console(width=_width(), highlight=False, markup=False, emoji=False)


def _width() -> int:
    """The terminal's; 120 into a file or a pipe, where rich would assume 80."""
    return shutil.get_terminal_size((120, 0)).columns if sys.stdout.isatty() else 120
