"""What a stream sends: its events as objects, and what they say."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

from aim_guardrail.exact_json import written
from aim_guardrail.pipeline.vault import Vault
from aim_guardrail.slots.places import Place
from aim_guardrail.slots.slot import Json
from aim_kserve.http import DONE


@dataclass(slots=True)
class Frame:
    """One event to be sent.

    Attributes:
        payload: its data; empty where they say nothing.
        raw: how it is sent; None: its data are written anew.
        name: its `event:` line, "" where it has none.
        place: what its data are, where they come whole; None where they hold pieces of texts.
    """

    payload: Json
    raw: bytes | None = None
    name: str = ""
    place: Place | None = None

    def encoded(self) -> bytes:
        """The event as it is sent."""
        if self.raw is not None:
            return self.raw
        data = b"data: %s\n\n" % written(self.payload)
        return b"event: %s\n%s" % (self.name.encode(), data) if self.name else data

    def restore(self, vault: Vault) -> None:
        """Put back what placeholders stand for: the last that is done to it."""
        if vault and vault.restore_in(self.payload):
            self.raw = None


def done() -> Frame:
    """How OpenAI's streams end."""
    return Frame({}, DONE)


def joined(frames: list[Frame]) -> bytes:
    """The events as they are sent."""
    return frames[0].encoded() if len(frames) == 1 else b"".join([frame.encoded() for frame in frames])


@dataclass(slots=True)
class Piece:
    """A piece of a text that comes in several: where it stands in its frame, and whose it is.

    Attributes:
        key: tells texts apart; its first element is what ends them (a choice's index).
    """

    key: tuple[Hashable, ...]
    holder: Any
    name: str | int
    text: str


@dataclass(slots=True)
class Whole:
    """What comes whole in a frame: what stands in `holder` under `name`, or, where that is None, `holder` itself."""

    holder: Any
    name: str | int | None
    place: Place


@dataclass(slots=True)
class Said:
    """What a frame says.

    Attributes:
        ends: whose texts end with it (see `Piece.key`).
    """

    pieces: list[Piece] = field(default_factory=list)
    wholes: list[Whole] = field(default_factory=list)
    ends: list[Hashable] = field(default_factory=list)
