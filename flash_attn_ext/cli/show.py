"""Text and tables on the terminal: in colour by rich where it is installed (pip install rich), else plain."""

import itertools
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
COLORS = {"yes": "green", "yes,": "yellow", "ok": "green", "no": "red", "no:": "red", "WRONG": "bold red", "-": "dim"}
GAP = "  "  # between the columns of a table
NARROW = 16  # a column that is wrapped stays at least as wide as this


def say(text: str = "", style: str = "", hang: int = 0) -> None:
    """A paragraph, its further lines indented by `hang` more. The style is rich's; plain text has none."""
    text = _printable(text)
    lead = " " * (len(text) - len(text.lstrip()) + hang)
    _print((textwrap.fill(text, _width(), subsequent_indent=lead, break_on_hyphens=False), style))


def error(text: str) -> None:
    """A line on stderr: stdout may be read by a program."""
    print(_printable(text), file=sys.stderr)


def facts(named: dict[str, str]) -> None:
    """A line for each name and its value."""
    width = max(map(len, named)) + 2
    for name, value in named.items():
        lines = textwrap.wrap(_printable(value), max(20, _width() - width), break_on_hyphens=False)
        _print((name.ljust(width), "bold"), (("\n" + " " * width).join(lines), ""))


def table(header: list[str], rows: list[list[str]]) -> None:
    """A table; a column whose name begins with > is aligned to the right.

    Its widest columns are wrapped until it fits. Where it cannot fit, each row becomes a paragraph: nothing is cut off.
    """
    aligned = [str.rjust if name.startswith(">") else str.ljust for name in header]
    header = [name.removeprefix(">") for name in header]
    rows = [[_printable(cell) for cell in row] for row in rows]
    widths = _fitted([header, *rows])
    say()
    if widths is None:
        for row in rows:
            say("; ".join(f"{name} {cell}".strip() for name, cell in zip(header, row, strict=True) if cell), hang=2)
    elif Console:
        _draw(header, rows, widths, aligned)
    else:
        for row in [header, *rows]:
            _print_row(row, widths, aligned)
    say()


def _fitted(rows: list[list[str]]) -> list[int] | None:
    """Widths of the columns with which the rows fit, or None if that would cut words."""
    columns = list(zip(*rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    words = [max(len(word) for cell in column for word in ["", *cell.split()]) for column in columns]
    spare = [max(0, width - max(word, NARROW)) for width, word in zip(widths, words, strict=True)]
    excess = sum(widths) + len(GAP) * (len(widths) - 1) - _width()
    if excess > sum(spare):
        return None
    for _ in range(excess):
        widest = max((column for column in range(len(widths)) if spare[column]), key=widths.__getitem__)
        widths[widest] -= 1
        spare[widest] -= 1
    return widths


def _draw(header: list[str], rows: list[list[str]], widths: list[int], aligned: list) -> None:
    drawn = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    for name, width, align in zip(header, widths, aligned, strict=True):
        drawn.add_column(name, width=width, justify="right" if align is str.rjust else "left")
    for row in rows:
        drawn.add_row(*(Text(cell, COLORS.get(cell.split(" ")[0], "")) for cell in row))
    _console().print(drawn)


def _print_row(cells: list[str], widths: list[int], aligned: list) -> None:
    wrapped = [
        textwrap.wrap(cell, width, break_on_hyphens=False) if cell else [""]
        for cell, width in zip(cells, widths, strict=True)
    ]
    for line in itertools.zip_longest(*wrapped, fillvalue=""):
        columns = zip(aligned, line, widths, strict=True)
        print(GAP.join(align(text, width) for align, text, width in columns).rstrip())


def _printable(text: str) -> str:
    """The text in one line that the output can encode: escape codes in a model's name reach no terminal."""
    text = "".join(c if c.isprintable() else " " if c.isspace() else ascii(c)[1:-1] for c in text)
    encoding = sys.stdout.encoding or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def _print(*pieces: tuple[str, str]) -> None:
    """Pieces of text, each with its style."""
    if not Console:
        print("".join(text for text, _ in pieces).rstrip())
        return
    line = Text.assemble(*pieces)
    line.rstrip()
    _console().print(line, soft_wrap=True)


def _console() -> "Console":
    return Console(width=_width(), highlight=False, markup=False, emoji=False)


def _width() -> int:
    """The terminal's; 120 into a file or a pipe, where rich would assume 80."""
    return shutil.get_terminal_size((120, 0)).columns if sys.stdout.isatty() else 120
