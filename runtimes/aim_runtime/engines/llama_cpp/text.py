"""Token bytes become text that may be shown: whole characters only, never a part of a stop string."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple


class TokenLogprob(NamedTuple):
    """One token's log probability (None of a prompt's first) and its likeliest rivals', likeliest first."""

    token: bytes
    logprob: float | None
    top: list[tuple[bytes, float]]
    text_offset: int  # characters of the answer, or of the prompt, before this token


class StopScanner:
    """Finds the first stop string to complete, whatever way the text is cut into pieces.

    Text that may yet become a stop string is held back; when two complete at the same character, the longer wins.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """Text that may be shown now. Sets ``stopped`` when a stop string is complete."""
        if not self._stops:
            return text
        text = self._held + text
        matches = [(start + len(stop), start) for stop in self._stops if (start := text.find(stop)) >= 0]
        if matches:
            self.stopped, self._held = True, ""
            return text[: min(matches)[1]]
        keep = self._undecided(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """What was held back, when no more text comes."""
        held, self._held = self._held, ""
        return held

    def _undecided(self, text: str) -> int:
        """Length of the longest end of ``text`` that begins a stop string."""
        longest = min(len(text), max(map(len, self._stops)) - 1)
        for length in range(longest, 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stops if len(stop) > length):
                return length
        return 0


@dataclass(slots=True)
class Shown:
    """What one more token lets us show."""

    text: str = ""
    logprobs: list[TokenLogprob] = field(default_factory=list)


class AnswerText:
    """One choice's text and log probabilities as they may be shown."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._scanner = StopScanner(stops)
        self._decoded = 0
        self._shown = 0
        self._held_logprobs: list[TokenLogprob] = []

    @property
    def stopped(self) -> bool:
        return self._scanner.stopped

    def push(self, piece: bytes, logprob: tuple[bytes, float, list[tuple[bytes, float]]] | None = None) -> Shown:
        """Add one token's bytes and, when asked for, its name, log probability and rivals."""
        if logprob is not None:
            self._held_logprobs.append(TokenLogprob(*logprob, self._decoded))
        text = self._decoder.decode(piece)
        self._decoded += len(text)
        shown = self._scanner.push(text)
        self._shown += len(shown)
        return Shown(shown, self._release_logprobs() if self._held_logprobs else [])

    def finish(self) -> Shown:
        """The rest. Bytes of an unfinished character are dropped: half a character is no text."""
        rest = "" if self.stopped else self._scanner.finish()
        held = [] if self.stopped else self._held_logprobs
        self._held_logprobs = []
        return Shown(rest, held)

    def _release_logprobs(self) -> list[TokenLogprob]:
        """Those of tokens whose text has begun to show; a token of a stop string never shows."""
        ready = [entry for entry in self._held_logprobs if entry.text_offset < self._shown]
        self._held_logprobs = self._held_logprobs[len(ready) :]
        return ready
