"""What a checked delta says: for the stages behind, which judge what the inline one let pass."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from aim_guardrail.slots.places import JSON, Place
from aim_guardrail.slots.slot import Json
from aim_guardrail.streams.frame import Piece, Said, Whole
from aim_guardrail.streams.walk import SAME, DeltaWalk, Key, Way


class DeltaPieces(DeltaWalk):
    """Of deltas of one choice, every text by its path, and what comes whole."""

    def __init__(self, place: Place, group: Hashable) -> None:
        super().__init__(place)
        self._group = group
        self._said = Said()

    def read(self, delta: Json, said: Said) -> None:
        """Add what ``delta`` says to ``said``."""
        self._said = said
        self.walk(delta)

    def text(self, holder: Any, name: Any, value: str, key: Key, way: Way) -> int:
        self._said.pieces.append(Piece((self._group, *key), holder, name, value))
        return SAME

    def json(self, holder: Any, name: Any, value: str, key: Key, way: Way) -> int:
        return self.whole(holder, name, JSON)  # the inline stage sends it in one piece

    def whole(self, holder: Any, name: Any, place: Place) -> int:
        self._said.wholes.append(Whole(holder, name, place))
        return SAME
