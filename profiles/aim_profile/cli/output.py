"""What the command line prints: tables for people, JSON or YAML for machines, one line per error."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from aim_profile.errors import AimProfileError

Output = Literal["table", "json", "yaml"]

FITS = 0
DOES_NOT_FIT = 1
BAD_INPUT = 2


class Table(NamedTuple):
    """Rows under headings. Numbers and words alike are text here; `right` names the columns of numbers."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    right: Sequence[str] = ()
    title: str = ""


class Facts(NamedTuple):
    """Labelled facts, one a line. A fact whose text is empty is left out."""

    facts: Sequence[tuple[str, str]]
    title: str = ""


Block = Table | Facts | str


def show(output: Output, data: Any, *blocks: Block) -> None:
    """`data` as JSON or YAML, or the blocks for people; all on stdout, which holds nothing else."""
    if output == "json":
        print_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n")
    elif output == "yaml":
        from aim_profile.files.write import dump

        print_text(dump(data))
    else:
        _show_blocks(blocks)


def print_text(text: str) -> None:
    """Text as it is: no colour, no wrapping."""
    sys.stdout.write(text)


def write_out(text: str, file: Path | None, make_folder: bool = False) -> None:
    """`text` to the file, or to stdout. Raises AimProfileError where the file cannot be written."""
    if file is None or str(file) == "-":
        print_text(text)
        return
    try:
        if make_folder:
            file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    except OSError as problem:
        raise AimProfileError(
            f"{file}: {problem.strerror}", field="file", value=str(file), remedy="name a file in a folder that exists"
        ) from problem


def print_error(text: str) -> None:
    """One line on stderr."""
    sys.stderr.write("aim-profile: " + " ".join(text.split()) + "\n")


def print_note(text: str) -> None:
    """A remark on stderr, where it spoils no pipe."""
    sys.stderr.write(text.rstrip() + "\n")


def _show_blocks(blocks: Iterable[Block]) -> None:
    shown = [block for block in blocks if _says_something(block)]
    if not sys.stdout.isatty():
        print_text("\n".join(_plain(block) for block in shown))
        return
    from rich.console import Console

    console = Console(highlight=False)
    for block in shown:
        if isinstance(block, str) or (isinstance(block, Table) and _least_width(block) > console.width):
            # Lines too long for the terminal are for it to wrap: cells broken in their middle are worse.
            console.print(_plain(block), markup=False, soft_wrap=True)
        else:
            console.print(_rich(block))


def _says_something(block: Block) -> bool:
    if isinstance(block, str):
        return bool(block)
    return bool(block.rows) if isinstance(block, Table) else any(text for _, text in block.facts)


def _plain(block: Block) -> str:
    """Columns two spaces apart, nothing cut or wrapped, however long the line."""
    if isinstance(block, str):
        return block.rstrip() + "\n"
    title = f"{block.title}\n" if block.title else ""
    if isinstance(block, Facts):
        kept = [(label, text) for label, text in block.facts if text]
        width = max((len(label) for label, _ in kept), default=0)
        return title + "".join(f"{label.ljust(width)}  {text}\n" for label, text in kept)
    lines = [block.columns, *block.rows]
    widths = [max(len(line[at]) for line in lines) for at in range(len(block.columns))]
    return title + "".join(_line(line, widths, block) for line in lines)


def _line(line: Sequence[str], widths: Sequence[int], table: Table) -> str:
    cells = (
        text.rjust(width) if column in table.right else text.ljust(width)
        for text, width, column in zip(line, widths, table.columns, strict=True)
    )
    return "  ".join(cells).rstrip() + "\n"


def _least_width(table: Table) -> int:
    """Columns the table needs when only its columns of prose are wrapped."""
    wide = (max(len(line[at]) for line in (table.columns, *table.rows)) for at in range(len(table.columns)))
    return sum(min(w, _PROSE_WIDTH) if c in _PROSE else w for w, c in zip(wide, table.columns, strict=True)) + 2 * len(
        table.columns
    )


def _rich(block: Table | Facts) -> Any:
    from rich import box
    from rich.table import Table as RichTable
    from rich.text import Text

    is_table = isinstance(block, Table)
    title = Text(block.title) if block.title else None
    made = RichTable(title=title, title_justify="left", box=box.SIMPLE_HEAD if is_table else None, show_header=is_table)
    if isinstance(block, Facts):
        made.add_column(style="bold")
        made.add_column(overflow="fold")
        for label, text in block.facts:
            if text:
                made.add_row(label, Text(text))
        return made
    for column in block.columns:
        justify: Literal["left", "right"] = "right" if column in block.right else "left"
        made.add_column(column, justify=justify, overflow="fold", no_wrap=column not in _PROSE)
    for row in block.rows:
        made.add_row(*(Text(cell, style=_STYLES.get(cell, "")) for cell in row))
    return made


# Columns of sentences, which may be wrapped down to so many characters; the others never are.
_PROSE = {
    *("why", "why here", "note", "source", "what", "what would fit", "what would help", "finding", "status"),
    *("validated", "driver-legal"),
}
_PROSE_WIDTH = 24

# Words that carry a verdict; nothing is told by colour alone.
_STYLES = {
    "validated": "green",
    "chosen": "green",
    "fits": "green",
    "driver-legal": "yellow",
    "eligible": "yellow",
    "unsupported": "red",
    "refused": "red",
    "lost": "red",
}
