"""What a choice says, piece by piece: an accumulator for every path that a text of its deltas has."""

from __future__ import annotations

from typing import Any

from aim_guardrail.metrics import Metrics
from aim_guardrail.pipeline.screening import Screening
from aim_guardrail.slots.places import Place
from aim_guardrail.slots.slot import Json
from aim_guardrail.streams.accumulators import Accumulators
from aim_guardrail.streams.walk import CHANGED, HELD, SAME, DeltaWalk, Key, Way


class Delta(DeltaWalk):
    """``take`` deltas, which are checked in place; ``finish``, then ``close``.

    Args:
        place: what a delta is.

    Attributes:
        earlier: what must be said before the delta just taken: the rest of texts that it is not about any more.
    """

    def __init__(self, screening: Screening, metrics: Metrics, place: Place) -> None:
        super().__init__(place)
        self._screening = screening
        self._texts = Accumulators[Way](screening, metrics)
        self._current: dict[str, Key] = {}  # of fields whose parts follow each other: the one that goes on
        self.earlier: list[Json] = []

    @property
    def held_chars(self) -> int:
        """How much is held back now."""
        return self._texts.held_chars

    def take(self, delta: Json) -> int:
        """Check a delta in place. Raises Blocked, DetectorFailed, ServingError."""
        if self.earlier:
            self.earlier = []
        return self.walk(delta)

    def finish(self) -> Json:
        """All that was held, as one more delta."""
        delta: Json = {}
        for way, text in self._texts.end():
            _put(delta, way, text)
        return delta

    def last_words(self) -> Json:
        """What may still be said when a text was blocked, as one more delta."""
        delta: Json = {}
        for way, text in self._texts.last_words():
            _put(delta, way, text)
        return delta

    def close(self) -> None:
        """Count what its texts came to."""
        self._texts.close()

    def text(self, holder: Any, name: Any, value: str, key: Key, way: Way) -> int:
        if self._current.get(key[0], key) != key:
            self._turn(key)
        elif key not in self._texts and self._place.get(key[0]).parts:
            self._current[key[0]] = key
        shown = self._texts.text(key, way, value)
        if shown == value:
            return SAME
        holder[name] = shown
        return CHANGED if shown else HELD

    def json(self, holder: Any, name: Any, value: str, key: Key, way: Way) -> int:
        self._texts.json(key, way, value)
        holder[name] = ""
        return HELD

    def whole(self, holder: Any, name: Any, place: Place) -> int:
        value = holder[name]
        box = {"": value}
        if type(value) is str:
            box[""] = self._screening.text("answer", value)
            changed = box[""] != value
        else:
            changed = self._screening.body("answer", box, place.under(""))
        if not changed:
            return SAME
        holder[name] = box[""]
        return CHANGED if box[""] else HELD

    def _turn(self, key: Key) -> None:
        """Parts follow each other: when the next begins, the one before is complete, and its rest goes before it."""
        before = self._current[key[0]]
        self._current[key[0]] = key
        delta: Json = {}
        for way, text in self._texts.end(lambda ended: ended == before):
            _put(delta, way, text)
        if delta:
            self.earlier.append(delta)


def _put(delta: Json, way: Way, text: str) -> None:
    """Put a text into a delta, behind what stands there."""
    if not text:
        return
    node: Any = delta
    for step, following in zip(way, (*way[1:], None), strict=True):
        new: Any = text if following is None else [] if isinstance(following, dict) else {}
        if isinstance(step, dict):
            last = node[-1] if node and following is not None else None
            if not isinstance(last, dict) or not step.items() <= last.items():
                last = new if following is None else {**step, **new}
                node.append(last)
            node = last
        elif following is None:
            node[step] = node.get(step, "") + text
        else:
            node = node.setdefault(step, new)
