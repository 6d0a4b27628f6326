"""What a YAML text may look like before anything is built of it: one pass over the parser's events, linear in the text.

A parser builds what it is told to: a key given twice keeps its last value in silence, ten aliases of ten aliases
become gigabytes, and 100,000 brackets end the process (libyaml's composer recurses in C).
"""

from __future__ import annotations

from typing import Any

import yaml

from .values import Values

MAX_DEPTH = 64
#: Values a file may stand for once its aliases are followed.
MAX_VALUES = 20_000_000


class ShapeError(Exception):
    """line: counted from 1; field: the key, where it is one."""

    def __init__(self, line: int, field: str, problem: str) -> None:
        self.line, self.field = line, field
        super().__init__(problem)


class _Collection:
    """A collection that is open: its keys with their lines, and the values counted in it so far."""

    __slots__ = ("anchor", "keys", "turn", "values")

    def __init__(self, is_mapping: bool, anchor: str | None) -> None:
        self.anchor = anchor
        self.keys: dict[str, int] | None = {} if is_mapping else None
        self.turn = 0  # even: a key is next
        self.values = 1


def check_shape(text: str, loader: Any) -> Values:
    """The text's values, where they are common.

    Raises ShapeError for a key given twice, an alias of what holds it, or more depth or values than any file of ours
    has; yaml.YAMLError for what is not YAML.
    """
    open_: list[_Collection] = []
    sizes: dict[str, int] = {}
    values = Values()
    for event in yaml.parse(text, Loader=loader):
        values.take(event)
        line = event.start_mark.line + 1 if event.start_mark else 0
        if isinstance(event, yaml.CollectionStartEvent):
            if len(open_) == MAX_DEPTH:
                raise ShapeError(line, "file", f"nested more than {MAX_DEPTH} deep")
            open_.append(_Collection(isinstance(event, yaml.MappingStartEvent), event.anchor))
        elif isinstance(event, yaml.CollectionEndEvent):
            closed = open_.pop()
            if closed.anchor:
                sizes[closed.anchor] = closed.values
            _count(open_, line, closed.values)
        elif isinstance(event, yaml.ScalarEvent):
            if event.anchor:
                sizes[event.anchor] = 1
            _key(open_, event.value, line)
            _count(open_, line, 1)
        elif isinstance(event, yaml.AliasEvent):
            if any(item.anchor == event.anchor for item in open_):
                raise ShapeError(line, f"*{event.anchor}", f"*{event.anchor} stands inside what it names")
            _count(open_, line, sizes.get(str(event.anchor), 1))
    return values


def _key(open_: list[_Collection], value: str, line: int) -> None:
    inner = open_[-1] if open_ else None
    if inner is None or inner.keys is None or inner.turn % 2:
        return
    if value in inner.keys:
        raise ShapeError(line, value, f"{value}: given twice, first in line {inner.keys[value]}")
    inner.keys[value] = line


def _count(open_: list[_Collection], line: int, values: int) -> None:
    if not open_:
        return
    inner = open_[-1]
    inner.turn += 1
    inner.values += values
    if inner.values > MAX_VALUES:
        raise ShapeError(line, "file", f"stands for more than {MAX_VALUES:,} values once its aliases are followed")
