"""YAML as a person would write it: keys in the order given, no nulls, text of several lines as a block.

Collections are written here, a line an item; only text that needs quoting is PyYAML's to write. Its own writer takes
longer over the plan of a large fleet than the planner does.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from typing import Any

import yaml

# Text that YAML reads back as itself, unless it is one of the words that mean something else.
_PLAIN = re.compile(r"[A-Za-z][\w./;()%+-]*", re.ASCII)
_WORDS = {"y", "n", "yes", "no", "on", "off", "true", "false", "null"}
# Longer keys must be announced by a question mark.
_LONGEST_KEY = 128
# Folding would break a flag or a note in two; a long line is read as it is meant.
_UNFOLDED = 2**31


def without_empty(value: Any, keep_empty: bool = False) -> Any:
    """`value` without nulls, and without empty mappings and lists unless keep_empty, at every depth."""
    if isinstance(value, Mapping):
        kept = {key: without_empty(item, keep_empty) for key, item in value.items()}
        return {key: item for key, item in kept.items() if _worth_writing(item, keep_empty)}
    if isinstance(value, list | tuple):
        return [without_empty(item, keep_empty) for item in value if item is not None]
    return value


def _worth_writing(value: Any, keep_empty: bool) -> bool:
    return value is not None and (keep_empty or not isinstance(value, dict | list) or bool(value))


def dump(value: Any, comment: str = "") -> str:
    """One document. comment: lines to stand above it."""
    head = "".join(f"# {line}".rstrip() + "\n" for line in comment.splitlines())
    return head + "".join(_block(value, 0) if _is_block(value) else f"{_scalar(value, 0)}\n")


def dump_all(documents: Iterable[tuple[str, Any]]) -> str:
    """Several documents, each with the comment to stand above it."""
    return "---\n".join(dump(value, comment) for comment, value in documents)


def _is_block(value: Any) -> bool:
    return isinstance(value, Mapping | list | tuple) and bool(value)


def _block(value: Any, indent: int) -> Iterator[str]:
    """A mapping or a list, not empty, in YAML's block style."""
    pad = " " * indent
    if isinstance(value, Mapping):
        for key, item in value.items():
            name = _key(key)
            head = f"{pad}{name}:" if len(name) < _LONGEST_KEY else f"{pad}? {name}\n{pad}:"
            if _is_block(item):
                yield f"{head}\n"
                yield from _block(item, indent + 2)
            else:
                yield f"{head} {_scalar(item, indent)}\n"
        return
    for item in value:
        if _is_block(item):
            lines = _block(item, indent + 2)
            yield f"{pad}- {next(lines)[indent + 2 :]}"
            yield from lines
        else:
            yield f"{pad}- {_scalar(item, indent)}\n"


def _key(value: Any) -> str:
    return _as_pyyaml(value, '"') if isinstance(value, str) and "\n" in value else _scalar(value, 0)


def _scalar(value: Any, indent: int) -> str:
    """A value on the line of its key, or as a block below it. indent: columns of the collection that holds it."""
    if isinstance(value, str):
        return _text(value).replace("\n", "\n" + " " * indent) if "\n" in value else _text(value)
    written = json.dumps(value) if value is None or isinstance(value, int | float) else _as_pyyaml(value, None)
    # YAML 1.1 reads 1e-05 as text, 1.0e-05 as a number.
    return written.replace("e", ".0e") if isinstance(value, float) and "." not in written else written


@lru_cache(maxsize=65_536)
def _text(value: str) -> str:
    if _PLAIN.fullmatch(value):
        return f"'{value}'" if value.lower() in _WORDS else value
    printable = value.replace("\n", "").isprintable()
    return _as_pyyaml(value, '"' if not printable else "|" if "\n" in value else None)


def _as_pyyaml(value: Any, style: str | None) -> str:
    written = yaml.safe_dump(value, width=_UNFOLDED, allow_unicode=True, default_style=style)
    return written.removesuffix("...\n").removesuffix("\n")
