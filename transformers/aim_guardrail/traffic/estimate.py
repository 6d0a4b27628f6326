"""How many tokens a request will take, and what an answer took. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

#: UTF-8 bytes a token: four characters of English, one and a third of Chinese.
_BYTES_PER_TOKEN = 4
#: Fields by which requests bound their answers: OpenAI's, its older one, the Responses API's.
_BOUNDS = ("max_completion_tokens", "max_tokens", "max_output_tokens")
#: Routes whose answers hold no generated text.
_ANSWERLESS = ("embeddings", "score", "rerank", "pooling", "classify", "tokenize", "detokenize", "moderations")


def tokens_of(text_bytes: int) -> int:
    """The estimate for a text of so many UTF-8 bytes."""
    return -(-text_bytes // _BYTES_PER_TOKEN)


def text_bytes(value: Any, without: frozenset[str] = frozenset()) -> int:
    """UTF-8 bytes of all strings in a JSON value, those under the keys ``without`` left out; pictures and sound in
    ``data:`` URIs are none, a number in a list (a token id) is a token. Linear in the value."""
    total, stack = 0, [value]
    while stack:
        item = stack.pop()
        if isinstance(item, str):
            total += 0 if item.startswith("data:") else _bytes(item)
        elif isinstance(item, dict):
            stack += [each for key, each in item.items() if key not in without]
        elif isinstance(item, list):
            total += _BYTES_PER_TOKEN * sum(type(each) is int for each in item)
            stack += item
    return total


def _bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode(errors="replace"))


@dataclass(frozen=True, slots=True)
class Asked:
    """What of a request's body counts.

    Attributes:
        prompt: its tokens, estimated.
        answer: tokens its answers may have, all together; None where it does not say.
        model: the one it names.
    """

    prompt: int = 0
    answer: int | None = None
    model: str | None = None


def asked(body: Any) -> Asked:
    """By a parsed body, of any protocol."""
    if not isinstance(body, dict):
        return Asked(tokens_of(text_bytes(body)))
    model = body.get("model")
    parameters = body.get("parameters")
    bound = _bound(body) or (_bound(parameters) if isinstance(parameters, dict) else None)
    return Asked(tokens_of(text_bytes(body)), bound, model if isinstance(model, str) else None)


def _bound(fields: Mapping[str, Any]) -> int | None:
    given = next((fields[name] for name in _BOUNDS if type(fields.get(name)) is int), None)
    if given is None or given < 0:
        return None
    choices = fields.get("n")
    prompts = fields.get("prompt")
    several = len(prompts) if isinstance(prompts, list) and prompts and isinstance(prompts[0], str | list) else 1
    return int(given) * several * (choices if type(choices) is int and 1 <= choices <= 1024 else 1)


def answers_with_text(endpoint: str) -> bool:
    """Whether what comes back by a route is generated, and so has a length of its own."""
    return not endpoint.rstrip("/").endswith(_ANSWERLESS)


class AnswerLength:
    """How long answers were lately: what one without a bound is taken for. A mean that forgets."""

    def __init__(self, tokens: float = 256) -> None:
        self._mean = tokens

    @property
    def tokens(self) -> int:
        return max(1, round(self._mean))

    def learn(self, tokens: int) -> None:
        """One more answer is known."""
        self._mean += (tokens - self._mean) * 0.05
