"""A verb's table for people: columns in line, nothing drawn, a pipe's as wide as it needs."""

from __future__ import annotations

import sys
from collections.abc import Iterable

from rich.console import Console
from rich.table import Table

#: A pipe has no width; a line is broken beyond this one.
_PIPE_COLUMNS = 250


def plain_table(left: Iterable[str], right: Iterable[str] = ()) -> Table:
    """Columns of text, then columns of figures."""
    made = Table(box=None, pad_edge=False)
    for name in left:
        made.add_column(name, overflow="fold")
    for name in right:
        made.add_column(name, justify="right")
    return made


def show(table: Table) -> None:
    """To stdout. What stands in it is text, never markup: names come from files and servers."""
    width = None if sys.stdout.isatty() else _PIPE_COLUMNS
    Console(width=width, highlight=False, markup=False).print(table)
