"""The parts of pages that are made of the code: between ``<!-- made: NAME -->`` and ``<!-- /made -->``.

``made_pages.py`` writes them, ``made_pages.py --check`` says which pages are not as they are made.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import annotations_page
import modes_table
import routes_table

DOCS = Path(__file__).parent.parent
PARTS: Mapping[str, Callable[[], str]] = {
    "annotations that are read": annotations_page.read_by_processes,
    "annotations that are written": annotations_page.written_by_the_operator,
    "modes": modes_table.table,
    "routes": routes_table.table,
}
_PART = re.compile(r"(<!-- made: (.+?) -->\n).*?(<!-- /made -->)", re.DOTALL)


def stale() -> dict[Path, str]:
    """Page → how it should read, of those that read otherwise. Raises KeyError: a part that nothing makes."""
    pages = {page: page.read_text(encoding="utf-8") for page in sorted(DOCS.rglob("*.md"))}
    made = {page: _PART.sub(lambda it: f"{it[1]}\n{PARTS[it[2]]()}\n{it[3]}", text) for page, text in pages.items()}
    return {page: text for page, text in made.items() if text != pages[page]}


def main(argv: list[str]) -> int:
    found = stale()
    if argv == ["--check"]:
        for page in found:
            print(f"{page.relative_to(DOCS.parent)} is not as it is made: make docs-pages")
        return 1 if found else 0
    for page, text in found.items():
        page.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
