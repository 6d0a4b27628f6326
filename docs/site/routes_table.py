"""The table of routes in docs/api.md, out of the documents that the servers answer (docs/openapi/)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

FOLDER = Path(__file__).parent.parent / "openapi"


def table() -> str:
    """A row for each route; `/openai/v1/…`, which is `/v1/…`, is left out."""
    return "| route | process | says |\n|---|---|---|\n" + "".join((*_rows("runtime"), *_rows("guardrail")))


def _rows(process: str) -> Iterator[str]:
    document = json.loads((FOLDER / f"{process}.json").read_text(encoding="utf-8"))
    for path, item in document["paths"].items():
        for method, operation in item.items():
            if not path.startswith("/openai/"):
                says = operation["summary"].replace("``", "`")
                yield f"| `{method.upper()} {path}` | [{process}](openapi/{process}.json) | {says} |\n"
