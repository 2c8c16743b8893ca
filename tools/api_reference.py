"""The public functions' signatures and docstrings as Markdown: the reference part of docs/api.md."""

import inspect
import re
import textwrap
from collections.abc import Callable

COLUMNS = 120
SECTIONS = ("Args:", "Returns:", "Raises:")


def reference(functions: list[Callable]) -> str:
    return "\n\n".join(f"## {f.__name__}\n\n{signature(f)}\n\n{markdown(inspect.getdoc(f))}" for f in functions)


def signature(function: Callable) -> str:
    """A block of code; with a line for each argument where one line is too long."""
    names = inspect.signature(function)
    one_line = f"{function.__name__}{names}"
    if len(one_line) > COLUMNS:
        arguments, result = re.fullmatch(r"\((.*)\)( -> .*)", str(names)).groups()
        # Commas between arguments, not those within a type's brackets.
        lines = "".join(f"    {argument},\n" for argument in re.split(r", (?![^\[]*\])", arguments))
        one_line = f"{function.__name__}(\n{lines}){result}"
    return f"```python\n{one_line}\n```"


def markdown(docstring: str) -> str:
    """Paragraphs as they are; the entries of Args, Returns and Raises as a list."""
    blocks = []
    for paragraph in docstring.split("\n\n"):
        title, _, entries = paragraph.partition("\n")
        if title in SECTIONS:
            blocks += [f"**{title.rstrip(':')}**", items(textwrap.dedent(entries))]
        else:
            blocks.append(wrapped(paragraph))
    return "\n\n".join(blocks)


def items(entries: str) -> str:
    """Entries begin at the margin as "name, name: text"; what is indented goes on with the one before."""
    lines = []
    for entry in re.split(r"\n(?=\S)", entries):
        names, _, text = entry.partition(": ")
        name, comma, condition = names.partition(", if ")
        name = ", ".join(f"`{part}`" for part in name.split(", "))
        lines.append(wrapped(f"- {name}{comma}{condition}: {text}", "  "))
    return "\n".join(lines)


def wrapped(text: str, indent: str = "") -> str:
    return textwrap.fill(" ".join(text.split()), COLUMNS, subsequent_indent=indent, break_on_hyphens=False)
