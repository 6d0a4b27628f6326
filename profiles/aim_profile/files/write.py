"""YAML as a person would write it: keys in the order given, no nulls, text of several lines as a block."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import yaml


class _Dumper(yaml.SafeDumper):
    """Lists stand two columns inside their key, and nothing becomes an `&anchor`."""

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    style = "|" if "\n" in value else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)


_Dumper.add_representer(str, _text)


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
    # Folding would break a flag or a note in two; a long line is read as it is meant.
    return head + yaml.dump(value, Dumper=_Dumper, sort_keys=False, width=2**31, allow_unicode=True)


def dump_all(documents: Iterable[tuple[str, Any]]) -> str:
    """Several documents, each with the comment to stand above it."""
    return "---\n".join(dump(value, comment) for comment, value in documents)
