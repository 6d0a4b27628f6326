"""Deltas become OpenAI JSON: a whole answer, or a stream of chunks with their constant part built once."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import orjson

from aim_runtime.engines.base import Json, Usage

from .sequence import Delta
from .text import TokenLogprob


class Mailbox:
    """Where a request's deltas wait for the coroutine that answers it. Lives in the event loop.

    A consumer that is behind finds its deltas merged, one per choice, so a slow reader costs no more memory than
    its own answer's text and loses no token.
    """

    def __init__(self, choices: int, *, wake_at_end: bool) -> None:
        self._pending: dict[int, Delta] = {}
        self._open = choices
        self._wake_at_end = wake_at_end
        self._event = asyncio.Event()

    @property
    def open(self) -> bool:
        """Whether a choice is still being generated."""
        return self._open > 0

    @property
    def more(self) -> bool:
        """Whether ``take`` has or will have something."""
        return self._open > 0 or bool(self._pending)

    def put(self, delta: Delta) -> None:
        waiting = self._pending.get(delta.choice)
        if waiting is None:
            self._pending[delta.choice] = delta
        else:
            waiting.merge(delta)
        if delta.last:
            self._open -= 1
        if not self._wake_at_end or not self._open or delta.error:
            self._event.set()

    async def take(self) -> list[Delta]:
        """What arrived since the last call, one delta per choice. Raises the error of a failed sequence."""
        await self._event.wait()
        self._event.clear()
        deltas, self._pending = list(self._pending.values()), {}
        for delta in deltas:
            if delta.error is not None:
                raise delta.error
        return deltas


class Form(Protocol):
    """How one operation's answers look."""

    answer_object: str
    chunk_object: str
    id_prefix: str

    def choice(self, delta: Delta, head: str, logprobs: Json | None) -> Json:
        """One choice of a whole answer."""
        ...

    def opening(self, index: int) -> list[Json]:
        """What a choice's stream begins with."""
        ...

    def chunk_choice(self, delta: Delta, head: str, logprobs: Json | None) -> Json | None:
        """One choice of a chunk; None where there is nothing to show yet."""
        ...

    def logprobs(self, entries: list[TokenLogprob], top: int) -> Json: ...


class ChatForm:
    answer_object = "chat.completion"
    chunk_object = "chat.completion.chunk"
    id_prefix = "chatcmpl-"

    def choice(self, delta: Delta, head: str, logprobs: Json | None) -> Json:
        message = {"role": "assistant", "content": head + delta.text, "refusal": None}
        return {
            "index": delta.choice,
            "message": message,
            "logprobs": logprobs,
            "finish_reason": delta.finish_reason,
        }

    def opening(self, index: int) -> list[Json]:
        delta = {"role": "assistant", "content": ""}
        return [{"index": index, "delta": delta, "logprobs": None, "finish_reason": None}]

    def chunk_choice(self, delta: Delta, head: str, logprobs: Json | None) -> Json | None:
        content = {"content": head + delta.text} if head or delta.text or not delta.last else {}
        return {
            "index": delta.choice,
            "delta": content,
            "logprobs": logprobs,
            "finish_reason": delta.finish_reason,
        }

    def logprobs(self, entries: list[TokenLogprob], top: int) -> Json:
        content = [
            {
                **_named(entry.token, entry.logprob),
                "top_logprobs": [_named(token, value) for token, value in entry.top],
            }
            for entry in entries
        ]
        return {"content": content, "refusal": None}


class CompletionForm:
    answer_object = "text_completion"
    chunk_object = "text_completion"
    id_prefix = "cmpl-"

    def choice(self, delta: Delta, head: str, logprobs: Json | None) -> Json:
        return {
            "index": delta.choice,
            "text": head + delta.text,
            "logprobs": logprobs,
            "finish_reason": delta.finish_reason,
        }

    def opening(self, index: int) -> list[Json]:
        return []

    def chunk_choice(self, delta: Delta, head: str, logprobs: Json | None) -> Json:
        return self.choice(delta, head, logprobs)

    def logprobs(self, entries: list[TokenLogprob], top: int) -> Json:
        """The legacy shape; its ``top_logprobs`` also holds the chosen token, as OpenAI's does. A prompt's first token
        has none of either."""
        rivals = [
            None
            if entry.logprob is None
            else {
                token.decode("utf-8", "replace"): value for token, value in [(entry.token, entry.logprob), *entry.top]
            }
            for entry in entries
        ]
        return {
            "tokens": [entry.token.decode("utf-8", "replace") for entry in entries],
            "token_logprobs": [entry.logprob for entry in entries],
            "top_logprobs": rivals if top else None,
            "text_offset": [entry.text_offset for entry in entries],
        }


def _named(token: bytes, logprob: float | None) -> Json:
    return {"token": token.decode("utf-8", "replace"), "logprob": logprob, "bytes": list(token)}


CHAT: Form = ChatForm()
COMPLETION: Form = CompletionForm()


@dataclass(slots=True)
class Answer:
    """Puts one request's deltas into shape and keeps its usage.

    Args:
        form: chat or completion.
        request_id: becomes part of the answer's id.
        model: the served name.
        usage: filled in as tokens come.
        heads: text before each choice (``echo``), by choice.
        choices_per_prompt: the choices of one prompt share its cached tokens, counted once.
        logprobs: as in Generation.
        include_usage: end a stream with a usage chunk.
    """

    form: Form
    request_id: str
    model: str
    usage: Usage
    heads: list[str]
    choices_per_prompt: int = 1
    logprobs: int | None = None
    include_usage: bool = False
    continuous_usage: bool = False
    created: int = field(default_factory=lambda: int(time.time()))
    _generated: dict[int, int] = field(default_factory=dict)
    _cached: dict[int, int] = field(default_factory=dict)
    _opened: set[int] = field(default_factory=set)
    _prompt_logprobs: dict[int, list[TokenLogprob]] = field(default_factory=dict)

    async def whole(self, mailbox: Mailbox) -> Json:
        """The complete answer."""
        parts: dict[int, Delta] = {}
        while mailbox.more:
            for delta in await mailbox.take():
                self._count(delta)
                if delta.choice in parts:
                    parts[delta.choice].merge(delta)
                else:
                    parts[delta.choice] = delta
        choices = [
            self.form.choice(delta, self.heads[index], self._logprobs(delta, opens=True))
            for index, delta in sorted(parts.items())
        ]
        return {**self._envelope(self.form.answer_object), "choices": choices, "usage": usage_json(self.usage)}

    async def chunks(self, mailbox: Mailbox) -> AsyncGenerator[bytes, None]:
        """The chunks of a stream, as JSON."""
        envelope = orjson.dumps(self._envelope(self.form.chunk_object))[:-1] + b',"choices":'
        plain_end = b',"usage":null}' if self.include_usage else b"}"
        while mailbox.more:
            for delta in await mailbox.take():
                self._count(delta)
                end = b',"usage":' + orjson.dumps(usage_json(self.usage)) + b"}" if self.continuous_usage else plain_end
                for choice in self._stream_choices(delta):
                    yield envelope + orjson.dumps([choice]) + end
        if self.include_usage:
            yield envelope + b'[],"usage":' + orjson.dumps(usage_json(self.usage)) + b"}"

    def _stream_choices(self, delta: Delta) -> list[Json]:
        index, head, opening = delta.choice, "", []
        opens = index not in self._opened
        if opens:
            self._opened.add(index)
            head, opening = self.heads[index], self.form.opening(index)
        if not (head or delta.text or delta.logprobs or delta.last):
            return opening
        choice = self.form.chunk_choice(delta, head, self._logprobs(delta, opens=opens))
        return opening if choice is None else [*opening, choice]

    def _count(self, delta: Delta) -> None:
        if delta.prompt_logprobs:
            self._prompt_logprobs[delta.choice // self.choices_per_prompt] = delta.prompt_logprobs
        if delta.waited is not None and self.usage.queue_s is None:
            self.usage.queue_s, self.usage.prefill_s = delta.waited
        self._generated[delta.choice] = delta.generated
        self.usage.completion_tokens = sum(self._generated.values())
        if delta.choice % self.choices_per_prompt == 0:
            self._cached[delta.choice] = delta.cached
            self.usage.cached_tokens = sum(self._cached.values())

    def _logprobs(self, delta: Delta, *, opens: bool) -> Json | None:
        """``opens``: of a choice's first part, which tells of the echoed prompt's tokens, too."""
        if self.logprobs is None:
            return None
        head = len(self.heads[delta.choice])
        own = (
            [entry._replace(text_offset=entry.text_offset + head) for entry in delta.logprobs]
            if head
            else delta.logprobs
        )
        prompt = self._prompt_logprobs.get(delta.choice // self.choices_per_prompt, []) if opens else []
        return self.form.logprobs([*prompt, *own], self.logprobs)

    def _envelope(self, object_: str) -> dict[str, Any]:
        return {
            "id": self.form.id_prefix + self.request_id,
            "object": object_,
            "created": self.created,
            "model": self.model,
        }


def usage_json(usage: Usage) -> Json:
    """OpenAI's ``usage``."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }


class AnswerStream(AsyncGenerator[bytes, None]):
    """A stream that frees its slots however it ends.

    A plain async generator closed before its first item never enters its ``try``, and would leak its sequences.
    """

    def __init__(self, chunks: AsyncGenerator[bytes, None], release: Callable[[], None]) -> None:
        self._chunks = chunks
        self._release = release

    async def asend(self, value: None) -> bytes:
        try:
            return await self._chunks.asend(value)
        except BaseException:  # the end of the stream, an error or a cancelled task: in each case we are done
            self._release()
            raise

    async def athrow(self, *error: Any) -> bytes:
        self._release()
        return await self._chunks.athrow(*error)

    async def aclose(self) -> None:
        self._release()
        await self._chunks.aclose()

    def __del__(self) -> None:
        self._release()
