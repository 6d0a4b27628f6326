"""How many tokens a request has, before its engine has counted them. Linear in the body, and bounded by it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import orjson

from aim_runtime.engines.base import Json

#: Fields whose text the engine computes.
_TEXTS = frozenset(
    {"messages", "prompt", "input", "instructions", "tools", "functions", "query", "documents", "text_1", "text_2"}
)
#: Fields of a part of a message that may hold an image or a sound, as a ``data:`` URL.
_MEDIA = frozenset({"url", "image_url", "audio_url", "video_url", "data", "file_data"})
#: What stands in a list where it has several prompts (one of numbers is one, as tokens) or conversations.
_SEVERAL: tuple[tuple[str, frozenset[type]], ...] = (
    ("prompt", frozenset({str, list})),
    ("messages", frozenset({list})),
)
_LIMITS = ("max_completion_tokens", "max_tokens", "max_output_tokens")
#: Of a text, before one of this model has been seen: English in vocabularies of 50,000 tokens and more.
BYTES_PER_TOKEN = 4.0
ANSWER_TOKENS = 256.0  # before one has been seen
_WEIGHT = 0.1  # of the last request in the average
_LOOKED_AT_MOST = 20_000
_DIGITS = 20  # of a number that is given as a text
_LEAST_BYTES = 64  # shorter prompts are mostly the chat template's own tokens


class Estimate:
    """Of one model, learned from the requests that it has counted: bytes of text per token, and how many tokens its
    answers have."""

    __slots__ = ("_answer", "_bytes", "_tokens")

    def __init__(self) -> None:
        self._bytes, self._tokens, self._answer = BYTES_PER_TOKEN * 100, 100.0, ANSWER_TOKENS

    @property
    def bytes_per_token(self) -> float:
        return self._bytes / self._tokens

    @property
    def answer_tokens(self) -> int:
        """Of an answer that names no limit."""
        return int(self._answer)

    def tokens(self, size_bytes: int, known: int = 0) -> int:
        """Of a text of that size, and ``known`` tokens beside it."""
        return known + int(size_bytes / (self._bytes / self._tokens)) + 1

    def learn(self, size_bytes: int, prompt_tokens: int, answer_tokens: int) -> None:
        """A request had so many. A ratio of averages, so that long prompts weigh more; what an image adds to the tokens
        is no text and does not count (a token of less than a byte is none)."""
        if size_bytes >= _LEAST_BYTES and 0 < prompt_tokens <= size_bytes:
            self._bytes += _WEIGHT * (size_bytes - self._bytes)
            self._tokens += _WEIGHT * (prompt_tokens - self._tokens)
        if answer_tokens:
            self._answer += _WEIGHT * (answer_tokens - self._answer)


def text_bytes(body: Json) -> tuple[int, int]:
    """UTF-8 bytes of the text in a body, and how many tokens it gives as numbers. Whatever the fields hold: they have
    not been validated. Beyond ``_LOOKED_AT_MOST`` values the rest counts as long as its JSON is."""
    size = tokens = seen = 0
    left: list[Any] = [body[name] for name in body if name in _TEXTS]
    while left and seen < _LOOKED_AT_MOST:
        value = left.pop()
        seen += 1
        kind = type(value)  # of JSON: no subclasses
        if kind is str:
            size += len(value) if value.isascii() else len(value.encode("utf-8", "surrogatepass"))
        elif kind is dict:
            seen += len(value)
            for part in value.values() if _MEDIA.isdisjoint(value) else _texts_of(value):
                if type(part) is str and part.isascii():
                    size += len(part)
                else:
                    left.append(part)
        elif kind is list:
            if value and type(value[0]) is int:
                tokens += len(value)
            else:
                left.extend(value)
    if left:
        with suppress(orjson.JSONEncodeError):  # nested deeper than its encoder goes
            size += len(orjson.dumps(left))
    return size, tokens


def _texts_of(part: Json) -> Iterator[Any]:
    """What an image or a sound has is counted when the engine has counted it."""
    for name, value in part.items():
        if not (name in _MEDIA and isinstance(value, str) and value.startswith("data:")):
            yield value


def max_tokens(body: Json) -> int | None:
    """The most that one answer may have; None: up to the model's limit. What is no number the engine refuses."""
    least: int | None = None
    for name in _LIMITS:
        if name in body:
            number = body[name] if type(body[name]) is int else _whole(body[name])
            if number is not None and (least is None or number < least):
                least = number
    return least if least is None or least > 0 else 1


def _whole(value: Any) -> int | None:
    """As pydantic reads it by its defaults, which the request models of some engines have: ``"128"`` and 128.0 are 128.
    None: no whole number."""
    if type(value) is int:
        return value
    if isinstance(value, float):
        return int(value) if value.is_integer() else None
    if isinstance(value, str) and len(value) <= _DIGITS:
        with suppress(ValueError):
            return int(value)
    return None


def choices(body: Json) -> int:
    """Answers computed side by side: ``n`` or ``best_of`` for each prompt of a list, each conversation of a batch."""
    each = 1
    for name in ("n", "best_of"):
        if name in body:
            each = max(each, _whole(body[name]) or 1)
    for name, several in _SEVERAL:
        if name in body:
            given = body[name]
            if type(given) is list and given and type(given[0]) in several:
                each *= len(given)
    return each
