"""A judge behind an OpenAI-compatible server: a raw prompt to `/completions`, or messages to `/chat/completions`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from aim_guardrail.detectors.endpoint import Endpoint
from aim_guardrail.detectors.judge.backend import Question, Said, Token, Unreadable, spelt
from aim_guardrail.detectors.remote import Remote

Json = dict[str, Any]

_MOST_CHARS = 16384  # of a verdict on 64 rules with the longest ids


class Served:
    """Asks a server.

    Args:
        api: which of its two routes gets questions that have both forms.
        top_logprobs: how many of the likeliest tokens it lists with each; 0: none.

    Raises:
        ValueError: as `Remote`.
    """

    cost: Literal["remote"] = "remote"

    def __init__(self, endpoint: Endpoint, api: Literal["completions", "chat"], top_logprobs: int) -> None:
        self._remote = Remote(endpoint)
        self._model = endpoint.model
        self._is_chat = api == "chat"
        self._top_logprobs = top_logprobs

    async def ask(self, question: Question, deadline_s: float) -> Said:
        """As of `Backend`."""
        body: Json = {"model": self._model, "temperature": 0, "max_tokens": question.max_tokens}
        if question.prompt is None or self._is_chat:
            answer = await self._remote.post("/chat/completions", body | self._chat(question), deadline_s)
            return _said_in_chat(_choice(answer))
        body["prompt"] = spelt(question.prompt)
        if self._top_logprobs:
            body["logprobs"] = self._top_logprobs
        return _said(_choice(await self._remote.post("/completions", body, deadline_s)))

    def _chat(self, question: Question) -> Json:
        fields: Json = {"messages": [{"role": role, "content": spelt(content)} for role, content in question.messages]}
        if self._top_logprobs and question.schema is None:
            fields |= {"logprobs": True, "top_logprobs": self._top_logprobs}
        if question.variables:
            fields["chat_template_kwargs"] = dict(question.variables)
        if question.schema is not None:
            schema = {"name": "verdict", "strict": True, "schema": question.schema}
            fields["response_format"] = {"type": "json_schema", "json_schema": schema}
        return fields

    async def close(self) -> None:
        """Close all connections."""
        await self._remote.close()


def _choice(answer: Json) -> Mapping[str, Any]:
    choices = answer.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        raise Unreadable("it has no choices")
    return choices[0]


def _said(choice: Mapping[str, Any]) -> Said:
    """Of `/completions`: https://platform.openai.com/docs/api-reference/completions/object"""
    return Said(_text(choice.get("text")), _legacy_tokens(choice.get("logprobs")), _is_cut(choice))


def _said_in_chat(choice: Mapping[str, Any]) -> Said:
    """Of `/chat/completions`: https://platform.openai.com/docs/api-reference/chat/object"""
    message, logprobs = choice.get("message"), choice.get("logprobs")
    text = _text(message.get("content") if isinstance(message, dict) else None)
    listed = logprobs.get("content") if isinstance(logprobs, dict) else None
    return Said(text, tuple(map(_token, listed)) if isinstance(listed, list) else (), _is_cut(choice))


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise Unreadable("it has no text")
    if len(value) > _MOST_CHARS:
        raise Unreadable("it is longer than any verdict")
    return value


def _is_cut(choice: Mapping[str, Any]) -> bool:
    return choice.get("finish_reason") == "length"


def _token(entry: Any) -> Token:
    try:
        listed = entry.get("top_logprobs") or ()
        # The likeliest come first, and are what counts of those that are spelt alike.
        top = {str(item["token"]): _number(item["logprob"]) for item in reversed(listed)}
        return Token(str(entry["token"]), _number(entry["logprob"]), top)
    except (TypeError, KeyError, AttributeError):
        raise Unreadable("its logprobs are not in OpenAI's form") from None


def _legacy_tokens(logprobs: Any) -> tuple[Token, ...]:
    if not isinstance(logprobs, dict):
        return ()
    try:
        tokens, values = _list(logprobs["tokens"]), _list(logprobs["token_logprobs"])
        tops = _list(logprobs.get("top_logprobs") or [None] * len(tokens))
        return tuple(
            Token(str(token), _number(value), {str(text): _number(one) for text, one in (top or {}).items()})
            for token, value, top in zip(tokens, values, tops, strict=True)
        )
    except (TypeError, KeyError, AttributeError, ValueError):
        raise Unreadable("its logprobs are not in OpenAI's form") from None


def _list(value: Any) -> Sequence[Any]:
    if not isinstance(value, list):
        raise TypeError
    return value


def _number(value: Any) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise TypeError
    return float(value)
