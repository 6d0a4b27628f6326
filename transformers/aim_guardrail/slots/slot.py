"""Slots: the texts of a body, each with where it stands, what names it, and who says it. Pure data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Json = dict[str, Any]

Path = tuple[str | int, ...]
"""Keys and indexes from a body's root; one that leads through a string that is JSON itself goes on in what it says."""


@dataclass(slots=True)
class Slot:
    """One text to be judged.

    Attributes:
        key: what names it, "" where nothing does that says anything of it: the key of a value that anybody put there
            (a tool's argument, metadata), the name of a tensor. Context for the text, judged in a slot of its own.
        role: who says it, as the message it stands in has it; "" outside messages.
        kind: `name` is a key itself, `number` an integer in its digits; `picture` is one, `link` the address of one.
    """

    text: str
    path: Path = ()
    key: str = ""
    role: str = ""
    kind: Literal["text", "name", "number", "picture", "link"] = "text"


@dataclass(slots=True)
class Inner:
    """A string that is JSON itself, and the value it says (in a box: under the key ""). `keys` were met in it."""

    text: str
    box: Json
    keys: int = 0


@dataclass(slots=True)
class Slots:
    """All slots of one body, in its order: what stands next to each other in it is next to each other here.

    Attributes:
        joined: neighbours (indexes of `items`) that whoever reads the body reads as one text: a message's text parts.
        inner: strings that are JSON, by their paths, outer ones first.
        keys: how many keys the body has, those within strings aside.
        pictures: pictures and links to them; those that may be text, too, stand in `items` as well.
    """

    items: list[Slot] = field(default_factory=list)
    joined: list[tuple[int, ...]] = field(default_factory=list)
    inner: dict[Path, Inner] = field(default_factory=dict)
    keys: int = 0
    pictures: list[Slot] = field(default_factory=list)


def spelt(path: Sequence[str | int]) -> str:
    """``messages[1].content``: a path as an error names it."""
    parts = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path if part != "")
    return parts.lstrip(".")
