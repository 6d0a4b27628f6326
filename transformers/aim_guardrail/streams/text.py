"""One text of a streamed answer, with what every kind of stream needs around its StreamGuard; what stands beside."""

from __future__ import annotations

from collections.abc import Sequence

from aim_guardrail.exact_json import paired
from aim_guardrail.metrics import Metrics
from aim_guardrail.pipeline.blocked import Blocked
from aim_guardrail.pipeline.ruling import Ruling
from aim_guardrail.pipeline.screening import Screening
from aim_guardrail.pipeline.vault import open_placeholder
from aim_guardrail.slots.places import Place
from aim_guardrail.slots.slot import Json, Slot, Slots
from aim_guardrail.streams.held import Released, StreamGuard

UNSUPPORTED = "unsupported_stream"


class StreamText:
    """``push`` its pieces, ``finish`` it, or ``close`` it when the stream ends otherwise.

    A placeholder that may have to be restored comes out whole.

    Attributes:
        last_words: what may still be shown when a piece raised Blocked.
    """

    __slots__ = ("_guard", "_half", "_kept", "_metrics", "_open", "_screening", "_seen", "last_words")

    def __init__(self, screening: Screening, metrics: Metrics) -> None:
        self._guard = StreamGuard(screening.guard, screening.session)
        self._metrics = metrics
        self._screening = screening
        self._seen: Released | None = None
        self._half = ""  # of a character: a surrogate without its other
        self._open = ""  # the beginning of a placeholder
        self.last_words = ""
        self._kept: list[str] | None = [] if screening.watch.keeps else None

    @property
    def held_chars(self) -> int:
        """How much is held back now."""
        return self._guard.held_chars + len(self._open)

    def push(self, piece: str) -> str:
        """What may be shown now. Raises Blocked; DetectorFailed."""
        if self._half or not piece.isascii():
            piece = self._whole_characters(piece)
        if self._kept is not None:
            self._kept.append(piece)
        shown = self._take(self._guard.push(piece))
        self._metrics.held_chars.observe(self._guard.held_chars)
        return shown

    def finish(self) -> str:
        """What was still held. Raises as ``push``."""
        shown = self._take(self._guard.push("\N{REPLACEMENT CHARACTER}")) if self._half else ""
        shown += self._take(self._guard.finish()) + self._open
        self._open = ""
        self.close()
        return shown

    def close(self) -> None:
        """Count what the text came to, once."""
        if self._seen is None:
            return
        verdict, self._seen = self._seen.verdict, None
        self._screening.note("answer", verdict)
        if self._kept:
            slot, self._kept = Slot("".join(self._kept), ("the answer",), "", "assistant"), None
            self._screening.watch.keep("answer", Slots([slot]), [Ruling((0,), verdict)])

    def _whole_characters(self, piece: str) -> str:
        """The piece from the half of a character that came before it to the one that it may end with."""
        piece, self._half = self._half + piece, ""
        if "\ud800" <= piece[-1:] <= "\udbff":
            piece, self._half = piece[:-1], piece[-1]
        return paired(piece)

    def _take(self, released: Released) -> str:
        self._seen = released
        if released.verdict.blocked:
            self.close()
            self.last_words = self._open + released.text
            raise Blocked("the answer", released.verdict)
        return self._whole_placeholders(released.text) if self._screening.session.vault else released.text

    def _whole_placeholders(self, text: str) -> str:
        text = self._open + text
        end = open_placeholder(text)
        self._open = text[end:]
        return text[:end]


def beside(event: Json, text: str, place: Place) -> list[str]:
    """The fields of an event beside its `text` that are neither numbers nor of the form that their places ask for."""
    return [name for name, value in event.items() if name != text and not _is_plain(value, place.get(name))]


def check_whole(screening: Screening, holder: Json, names: Sequence[str], place: Place) -> bool:
    """Check fields, each of which comes whole; True if one is another now. `place`: the holder's."""
    others = {name: holder[name] for name in names}
    changed = screening.body("answer", others, place)
    if changed:
        for name in names:
            del holder[name]
        holder.update(others)
    return changed


def _is_plain(value: object, place: Place) -> bool:
    if type(value) is str:
        return place.is_no_text(value)
    return value is None or type(value) in (int, float, bool)
