"""What was said, by whom, and which of it is judged: passages as a conversation of two. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

from aim_guardrail.detectors.base import Passage
from aim_guardrail.detectors.judge.backend import TooLong
from aim_guardrail.detectors.judge.markers import inert

Side = Literal["user", "assistant"]

_OF_THE_MODEL = frozenset(["assistant", "model", "agent"])
#: Who frames a conversation, and what is said outside its messages (tools, documents, metadata).
_FRAMING = frozenset(["", "system", "developer"])
_BETWEEN = "\n\n"
_OVERLAP = 256
MOST_WINDOWS = 16


@dataclass(frozen=True, slots=True)
class Turn:
    """What one side said without the other between."""

    side: Side
    text: str


@dataclass(frozen=True, slots=True)
class Hearing:
    """A conversation whose last turn is judged, the turns before it being its context; `judged`: the passages that the
    last turn is made of."""

    turns: tuple[Turn, ...]
    judged: tuple[int, ...]


def hearings(passages: Sequence[Passage], prompt: Sequence[Passage]) -> list[Hearing]:
    """Of a prompt its last turn: all that has come since the model last spoke, tool results too. Where the client has
    begun the model's answer itself, that beginning as well. Of an answer the answer, behind its prompt.
    """
    if not passages:
        return []
    if passages[0].direction == "answer":
        answer = Turn("assistant", _BETWEEN.join(passage.text for passage in passages))
        before = [turn for turn, _ in _turns(prompt)]
        return [Hearing((*before, answer), tuple(range(len(passages))))]
    said = _turns(passages)
    ends = [len(said)] if said[-1][0].side == "user" or len(said) == 1 else [len(said) - 1, len(said)]
    return [Hearing(tuple(turn for turn, _ in said[:end]), said[end - 1][1]) for end in ends]


def _turns(passages: Sequence[Passage]) -> list[tuple[Turn, tuple[int, ...]]]:
    """Turns with the passages they are made of. What frames the conversation stands before all else: nobody's text
    escapes because of the role it is given."""
    order = sorted(range(len(passages)), key=lambda at: passages[at].role not in _FRAMING)
    turns = []
    for side, group in groupby(order, key=lambda at: _side(passages[at])):
        made_of = tuple(group)
        turns.append((Turn(side, _BETWEEN.join(passages[at].text for at in made_of)), made_of))
    return turns


def _side(passage: Passage) -> Side:
    return "assistant" if passage.role in _OF_THE_MODEL else "user"


def fitted(turns: Sequence[Turn], most_chars: int) -> Iterator[tuple[Turn, ...]]:
    """The conversation in pieces of at most `most_chars`, inert: of the context as many of its last turns as fit, and
    the judged turn, whole, or in windows that overlap, without context.

    Raises:
        TooLong: more than MOST_WINDOWS.
    """
    *context, judged = turns
    for text in windows(judged.text, most_chars):
        room = most_chars - len(text)
        kept = [Turn(judged.side, inert(text))]
        for turn in reversed(context):
            room -= len(turn.text)
            if room < 0:
                break
            kept.insert(0, Turn(turn.side, inert(turn.text)))
        yield tuple(kept)


def windows(text: str, most_chars: int) -> list[str]:
    """The text, whole or in windows of at most `most_chars` that overlap.

    Raises:
        TooLong: more than MOST_WINDOWS.
    """
    step = most_chars - _OVERLAP
    count = 1 if len(text) <= most_chars else -(-(len(text) - _OVERLAP) // step)
    if count > MOST_WINDOWS:
        most = MOST_WINDOWS * step + _OVERLAP
        raise TooLong(f"{len(text)} characters are more than the judge takes ({most}): raise context_tokens")
    return [text[at * step : at * step + most_chars] for at in range(count)]
