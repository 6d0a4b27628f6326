"""Token bytes become text that may be shown: whole characters only, never a part of a stop string."""

from __future__ import annotations

import codecs
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple


class TokenLogprob(NamedTuple):
    """One token's log probability (None of a prompt's first) and its likeliest rivals', likeliest first."""

    token: bytes
    logprob: float | None
    top: list[tuple[bytes, float]]
    text_offset: int  # characters of the answer, or of the prompt, before this token


class StopStrings:
    """Stop strings as an automaton (Aho and Corasick 1975): a step a character, however many and long they are.

    A state is what the text's end has in common with the beginning of a stop string, as much of it as possible.
    State 0 is nothing.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._next: list[dict[str, int]] = [{}]
        self._fallback = [0]  # the longest shorter state that the same text may be in
        self.depth = [0]  # characters of the state
        self.complete = [0]  # characters of the longest stop string that the state ends in
        for stop in stops:
            self._add(stop)
        self._link()

    def step(self, state: int, character: str) -> int:
        while character not in self._next[state]:
            if not state:
                return 0
            state = self._fallback[state]
        return self._next[state][character]

    def _add(self, stop: str) -> None:
        state = 0
        for character in stop:
            if character not in self._next[state]:
                self._next[state][character] = len(self._next)
                self._next.append({})
                self._fallback.append(0)
                self.depth.append(self.depth[state] + 1)
                self.complete.append(0)
            state = self._next[state][character]
        self.complete[state] = len(stop)

    def _link(self) -> None:
        """Shorter states first: a state's fallback is shorter than the state."""
        states = deque(self._next[0].values())
        while states:
            state = states.popleft()
            self.complete[state] = self.complete[state] or self.complete[self._fallback[state]]
            for character, following in self._next[state].items():
                self._fallback[following] = self.step(self._fallback[state], character)
                states.append(following)


@lru_cache(maxsize=1)  # the choices of one request are made one after the other
def _stop_strings(stops: tuple[str, ...]) -> StopStrings:
    return StopStrings(stops)


class StopScanner:
    """Finds the first stop string to complete, whatever way the text is cut into pieces.

    Text that may yet become a stop string is held back; when two complete at the same character, the longer wins.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = _stop_strings(tuple(stops)) if stops else None
        self._state = 0
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """Text that may be shown now. Sets ``stopped`` when a stop string is complete."""
        if self._stops is None:
            return text
        begun = len(self._held)
        text = self._held + text
        for end in range(begun, len(text)):
            self._state = self._stops.step(self._state, text[end])
            if complete := self._stops.complete[self._state]:
                self.stopped, self._held = True, ""
                return text[: end + 1 - complete]
        shown = len(text) - self._stops.depth[self._state]
        self._held = text[shown:]
        return text[:shown]

    def finish(self) -> str:
        """What was held back, when no more text comes."""
        held, self._held = self._held, ""
        return held


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
