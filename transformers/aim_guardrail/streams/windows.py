"""One text of a stream, cut into windows for detectors that judge whole passages, and redacted as they say. Pure.

A window has about `WINDOW_CHARS` characters, the last `OVERLAP_CHARS` of the one before among them, and ends where a
sentence does, or else between words. What lies in two windows is proven once both are: a value of up to `OVERLAP_CHARS`
characters that a border cuts is whole in the second, and nothing of it is out by then. Behind the end of a sentence, or
of the text, nothing is waited for.
"""

from __future__ import annotations

import re
from collections import deque
from dataclasses import dataclass

WINDOW_CHARS = 256
OVERLAP_CHARS = 64
_LEAST_CHARS = 64  # new ones in a window, before a sentence's end is taken for its end
_MOST_CHARS = WINDOW_CHARS - OVERLAP_CHARS  # new ones in a window

#: A sentence's end, with what follows it; not that of an initial or a title (`J. Doe`, `Dr. No`).
_END = re.compile(r"""(?:\w{3,}[.!?…]+|[!?…]+)["'”’)\]*_]*\s|[。！？]|\n""")
_SPACE = re.compile(r"\s(?=\S*\Z)")


@dataclass(slots=True)
class Window:
    """A passage of a text.

    Attributes:
        start, end: which of the text's code points.
        proven_to: up to where the text is proven once this window is, and all before it.
        since_s: when the first character of it that no earlier window proves had come.
    """

    start: int
    end: int
    text: str
    proven_to: int
    since_s: float


@dataclass(slots=True)
class _Hidden:
    start: int
    end: int
    placeholder: str


class Track:
    """One text.

    Args:
        is_whole: it is judged as one passage, when it ends.

    Attributes:
        end: how many characters have come.
        proven: up to where it is proven.
        turn: for whoever numbers what comes: when the last piece did.
    """

    __slots__ = (
        *("_arrivals", "_coming", "_counted", "_counted_to", "_cut", "_from", "_hidden", "_is_whole", "_sent"),
        *("_sure", "_text"),
        *("end", "proven", "turn"),
    )

    def __init__(self, *, is_whole: bool) -> None:
        self.end = self.proven = self.turn = 0
        self._is_whole = is_whole
        self._text = ""  # from `_from` on
        self._coming: list[str] = []  # what came behind it since it was looked at
        self._from = self._cut = self._sure = self._sent = (
            0  # `_cut`: where the last window ends; `_sure`: what it proves
        )
        self._arrivals: deque[tuple[int, float]] = deque()  # up to where the text had come, and when
        self._hidden: deque[_Hidden] = deque()  # apart, in their order
        self._counted: deque[tuple[str, int, int]] = deque()
        self._counted_to = 0  # behind it nothing has been counted

    def push(self, piece: str, now_s: float) -> tuple[int, int]:
        """Add a piece; where in the text it stands."""
        start = self.end
        self._coming.append(piece)
        self.end += len(piece)
        self._arrivals.append((self.end, now_s))
        return start, self.end

    @property
    def is_open(self) -> bool:
        """Whether there is text that no window, nor any that may still come without more text, proves."""
        return self._sure < self.end

    @property
    def since_s(self) -> float:
        """When the first character that no window proves yet had come; infinite where there is none."""
        return self._arrivals[0][1] if self._arrivals else float("inf")

    def cut(self, *, ends: bool) -> list[Window]:
        """The windows that are complete now; ``ends``: what there is is to be proven, whatever follows."""
        windows = list[Window]()
        if not ends and (self._is_whole or self.end - self._cut < _LEAST_CHARS):
            return windows
        self._text = "".join([self._text, *self._coming])
        self._coming.clear()
        while (edge := self._edge(ends)) > self._cut:
            start = max(self._from, self._cut - OVERLAP_CHARS) if self._cut else 0
            is_end = edge == self.end and ends
            sure = edge if is_end or self._is_sentence(edge) else max(self._sure, edge - OVERLAP_CHARS)
            text = self._text[start - self._from : edge - self._from]
            windows.append(Window(start, edge, text, sure, self.since_s))
            self._cut = edge
            self._prove_to(sure)
        if ends and self._sure < self.end:  # of what has a window already, nothing more is waited for
            windows.append(Window(self.end, self.end, "", self.end, self.since_s))
            self._prove_to(self.end)
        drop = max(0, self._cut - OVERLAP_CHARS - self._from)
        self._text, self._from = self._text[drop:], self._from + drop
        return windows

    def counts(self, name: str, start: int, end: int) -> bool:
        """Whether a finding of that name is a new one: not what the window before has shown already."""
        while self._counted and self._counted[0][2] <= self.proven - WINDOW_CHARS:
            self._counted.popleft()
        known = self._counted if start < self._counted_to else ()
        if any(other == name and first <= start and end <= last for other, first, last in known):
            return False
        self._counted.append((name, start, end))
        self._counted_to = max(self._counted_to, end)
        return True

    def hide(self, start: int, end: int, placeholder: str) -> None:
        """``placeholder`` stands for what is from ``start`` to ``end``, or for what of it has not been shown."""
        behind: list[_Hidden] = []
        while self._hidden and start < self._hidden[-1].end:
            known = self._hidden.pop()
            if known.start >= end:
                behind.append(known)
                continue
            if known.start <= start:
                start, placeholder = known.start, known.placeholder
            end = max(end, known.end)
        start = max(start, self._sent)
        if start < end:
            self._hidden.append(_Hidden(start, end, placeholder))
        self._hidden.extend(reversed(behind))

    def shown(self, start: int, text: str) -> str:
        """The piece that stands at ``start``, as it may be shown. In their order, each once it is proven."""
        end = start + len(text)
        self._sent = end
        pieces, done = [], start
        for hidden in self._hidden:
            if hidden.start >= end:
                break
            pieces.append(text[done - start : max(hidden.start, done) - start])
            if hidden.start >= start:
                pieces.append(hidden.placeholder)
            done = max(done, min(hidden.end, end))
        if not pieces:
            return text
        while self._hidden and self._hidden[0].end <= end:
            self._hidden.popleft()
        if self._hidden and self._hidden[0].start < end:  # goes on in the next piece, where nothing stands for it
            self._hidden[0].start, self._hidden[0].placeholder = end, ""
        return "".join([*pieces, text[done - start :]])

    def _edge(self, ends: bool) -> int:
        """Where the next window ends; where the last one does, if none is complete."""
        if self._is_whole:
            return self.end
        at = self._cut - self._from
        left = self.end - self._cut
        sentences = [m.end() for m in _END.finditer(self._text, at, at + _MOST_CHARS) if m.end() - at >= _LEAST_CHARS]
        if sentences:
            return self._from + sentences[-1]
        if left < _MOST_CHARS:
            return self.end if ends else self._cut
        space = _SPACE.search(self._text[at + _LEAST_CHARS : at + _MOST_CHARS])
        return self._cut + (_LEAST_CHARS + space.end() if space else _MOST_CHARS)

    def _is_sentence(self, edge: int) -> bool:
        """Whether a sentence ends there."""
        at = edge - self._from
        return any(m.end() == at for m in _END.finditer(self._text, max(0, at - 32), at))

    def _prove_to(self, sure: int) -> None:
        self._sure = sure
        while self._arrivals and self._arrivals[0][0] <= sure:
            self._arrivals.popleft()
