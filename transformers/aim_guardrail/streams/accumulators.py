"""The texts of a streamed answer that come in pieces: one accumulator for each, told by its key."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from typing import Generic, TypeVar

from aim_guardrail.exact_json import paired
from aim_guardrail.metrics import Metrics
from aim_guardrail.pipeline.screening import Screening
from aim_guardrail.streams.text import UNSUPPORTED, StreamText
from aim_kserve.errors import UpstreamFailed

W = TypeVar("W")

_MOST_TEXTS = 512


class _Json:
    """Pieces of JSON, checked as one when they are complete."""

    __slots__ = ("chars", "pieces")

    def __init__(self) -> None:
        self.pieces: list[str] = []
        self.chars = 0


class Accumulators(Generic[W]):
    """All texts of an answer, or of a choice of it, that are open. With each goes `W`: where its text is put.

    Texts go out but for what is not proven yet; JSON is held until it is complete.
    """

    def __init__(self, screening: Screening, metrics: Metrics) -> None:
        self._screening = screening
        self._metrics = metrics
        self._texts: dict[Hashable, tuple[StreamText, W]] = {}
        self._json: dict[Hashable, tuple[_Json, W]] = {}

    def __contains__(self, key: Hashable) -> bool:
        return key in self._texts or key in self._json

    @property
    def held_chars(self) -> int:
        """How much is held back now."""
        held = sum(pieces.chars for pieces, _ in self._json.values()) if self._json else 0
        for text, _ in self._texts.values():
            held += text.held_chars
        return held

    def text(self, key: Hashable, where: W, piece: str) -> str:
        """What may be shown now that a piece of a text has come. Raises Blocked, DetectorFailed, UpstreamFailed."""
        known = self._texts.get(key)
        if known is None:
            known = self._texts[key] = StreamText(self._screening, self._metrics), where
            self._bound()
        elif known[1] != where:
            known = self._texts[key] = known[0], where
        return known[0].push(piece)

    def json(self, key: Hashable, where: W, piece: str) -> None:
        """Hold a piece of JSON. Raises UpstreamFailed."""
        known = self._json.get(key)
        if known is None:
            known = self._json[key] = _Json(), where
            self._bound()
        known[0].pieces.append(piece)
        known[0].chars += len(piece)

    def end(self, ends: Callable[[Hashable], bool] = lambda _: True) -> Iterator[tuple[W, str]]:
        """The texts whose keys are said to end: what was held of each, where it was any. Raises as :meth:`text`."""
        for key in [key for key in self._texts if ends(key)]:
            text, where = self._texts[key]
            rest = text.finish()
            del self._texts[key]
            if rest:
                yield where, rest
        for key in [key for key in self._json if ends(key)]:
            pieces, where = self._json.pop(key)
            yield where, self._screening.json_text("answer", paired("".join(pieces.pieces)))

    def last_words(self) -> Iterator[tuple[W, str]]:
        """What may still be said when a text was blocked."""
        for text, where in self._texts.values():
            if text.last_words:
                yield where, text.last_words

    def close(self) -> None:
        """Count what the texts came to."""
        for text, _ in self._texts.values():
            text.close()

    def _bound(self) -> None:
        """Raises UpstreamFailed: more texts are open than any answer has; each costs something with every piece."""
        if len(self._texts) + len(self._json) > _MOST_TEXTS:
            raise UpstreamFailed(
                f"a choice of the predictor's stream holds more than {_MOST_TEXTS} texts at once", code=UNSUPPORTED
            )
