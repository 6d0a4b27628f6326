"""A stream of a server's events as a stream of an engine's."""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator, Callable
from typing import Any

import orjson

from aim_kserve.errors import Unavailable
from aim_kserve.sse import Event
from aim_runtime.engines.base import Json, Usage

from .connection import Answer
from .errors import in_answer, malformed

_DONE = b"[DONE]"
#: The events after which the responses API's stream may end without ``[DONE]``.
_LAST_EVENTS = frozenset((b"response.completed", b"response.incomplete", b"response.failed"))


class Renaming:
    """The server's name of the model as the one that was asked for, in whatever it answers."""

    def __init__(self, theirs: str, ours: str) -> None:
        self._theirs, self._ours = theirs, ours
        # Inside a string the quotes would be escaped: this is a field.
        self._field = re.compile(rb'"model"\s*:\s*' + re.escape(orjson.dumps(theirs)))
        self._replacement = b'"model":' + orjson.dumps(ours)

    def whole(self, answer: Json) -> Json:
        return {**answer, "model": self._ours} if answer.get("model") == self._theirs else answer

    def chunk(self, data: bytes) -> bytes:
        return data if self._ours == self._theirs else self._field.sub(lambda _: self._replacement, data, count=1)


def note_usage(answer: Any, usage: Usage) -> None:
    """Tokens of an answer, or of a chunk that tells them; OpenAI's names and those of its responses API. What is no
    count is not noted: a server may say anything."""
    said = _object(_object(answer), "usage") or _object(_object(answer, "response"), "usage")
    usage.prompt_tokens = _count(said, "prompt_tokens", "input_tokens") or usage.prompt_tokens
    usage.completion_tokens = _count(said, "completion_tokens", "output_tokens") or usage.completion_tokens
    details = _object(said, "prompt_tokens_details") or _object(said, "input_tokens_details")
    usage.cached_tokens = _count(details, "cached_tokens") or usage.cached_tokens


def _object(value: Any, *names: str) -> Json:
    """The object there; an empty one where there is none."""
    for name in names:
        value = value.get(name) if isinstance(value, dict) else None
    return value if isinstance(value, dict) else {}


def _count(said: Json, *names: str) -> int:
    counts = (said.get(name) for name in names)
    return next((count for count in counts if type(count) is int and count >= 0), 0)


async def chunks(answer: Answer, renaming: Renaming, usage: Usage) -> AsyncGenerator[bytes, None]:
    """The events of ``answer`` until ``[DONE]``.

    Raises:
        ServingError: the server's own error event; an event that is no JSON; the end without ``[DONE]``.
    """
    last = b""
    while (events := await answer.next_events()) is not None:
        for event in events:
            if event.data is None:  # a comment, to keep the connection open
                continue
            if event.data.strip() == _DONE:
                await answer.finish()
                return
            yield _item(event, renaming, usage)
            last = event.name
    if last not in _LAST_EVENTS:
        raise Unavailable("the server ended its stream before the answer was complete", code="engine_broke_off")


def _item(event: Event, renaming: Renaming, usage: Usage) -> bytes:
    assert event.data is not None
    try:
        value = orjson.loads(event.data)
    except orjson.JSONDecodeError as error:
        raise malformed(f"an event of its stream is no JSON: {error}") from None
    failure = in_answer(value)
    if failure is not None:
        raise failure
    if not isinstance(value, dict):
        raise malformed(f"an event of its stream is no object but {type(value).__name__}")
    note_usage(value, usage)
    data = renaming.chunk(event.data.replace(b"\n", b" "))  # between tokens only: a string has no bare newline
    return b"event: " + event.name + b"\ndata: " + data if event.name else data


class Relay(AsyncGenerator[bytes, None]):
    """A stream whose first item is here already, and that gives its connection back however it ends.

    A plain async generator closed before its first item never enters its ``try``.
    """

    def __init__(self, first: bytes | None, rest: AsyncGenerator[bytes, None], release: Callable[[], None]) -> None:
        self._first = first
        self._rest = rest
        self._release = release

    async def asend(self, value: None) -> bytes:
        first, self._first = self._first, None
        if first is not None:
            return first
        try:
            return await self._rest.asend(value)
        except BaseException:  # its end, an error or a cancelled task: in each case it is over
            self._release()
            raise

    async def athrow(self, *error: Any) -> bytes:
        self._release()
        return await self._rest.athrow(*error)

    async def aclose(self) -> None:
        self._release()
        await self._rest.aclose()

    def __del__(self) -> None:
        self._release()
