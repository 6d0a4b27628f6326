"""The most a request may hold, told before anything is computed on it.

All bounds follow from the model: a token stands for so many bytes at most, so a text longer than that times the
context cannot be a prompt, whatever it says. Bodies are measured as received, by lengths alone: validating a list
of millions would already hold every other request up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from aim_kserve.errors import BadRequest
from aim_runtime.engines.base import Json

#: Stop strings are compiled into one automaton, a state a character. OpenAI takes four short ones.
MAX_STOP_CHARACTERS = 16_384


@dataclass(frozen=True, slots=True)
class Limits:
    """Args:
    max_model_len: longest prompt plus answer, tokens.
    token_bytes: most bytes of text a token of the model stands for.
    vocabulary_size: tokens the model knows.
    sequences: most sequences that run or wait.
    """

    max_model_len: int
    token_bytes: int
    vocabulary_size: int
    sequences: int

    @property
    def text_bytes(self) -> int:
        """No text of more bytes fits into the context."""
        return self.max_model_len * self.token_bytes

    def check(self, body: Json) -> None:
        """Refuse fields that are longer than any request needs.

        Raises:
            BadRequest: names the field, its length and what is allowed.
        """
        context, vocabulary = self.max_model_len, self.vocabulary_size
        self._check_prompt(body.get("prompt"))
        _check_count(body, "messages", context, "each takes a token at least", "context_length_exceeded")
        _check_count(body, "tokens", context, "the model's context holds no more", "context_length_exceeded")
        _check_count(body, "tools", context, "each takes a token at least", "context_length_exceeded")
        _check_count(body, "stop_token_ids", vocabulary, "the model knows no more tokens")
        _check_count(body, "logit_bias", vocabulary, "the model knows no more tokens")
        _check_count(body, "stop", MAX_STOP_CHARACTERS, "of all stop strings together")
        stop = body.get("stop")
        if isinstance(stop, list) and sum(len(item) for item in stop if isinstance(item, str)) > MAX_STOP_CHARACTERS:
            raise BadRequest(
                f"'stop' has more than {MAX_STOP_CHARACTERS} characters in all: give fewer or shorter ones",
                param="stop",
            )

    def check_text(self, characters: int, param: str) -> None:
        """Refuse a text (or texts that are to become one) of so many characters, each of one byte at least."""
        if characters > self.text_bytes:
            least = -(-characters // self.token_bytes)
            raise BadRequest(
                f"'{param}' has {characters} characters, and no token of this model stands for more than "
                f"{self.token_bytes} bytes: that is {least} tokens at least, and the model's context is "
                f"{self.max_model_len}: shorten '{param}'",
                param=param,
                code="context_length_exceeded",
            )

    def _check_prompt(self, prompt: Any) -> None:
        if isinstance(prompt, str):
            self.check_text(len(prompt), "prompt")
        if not isinstance(prompt, list) or not prompt:
            return
        if isinstance(prompt[0], int):
            self._check_ids(prompt)
            return
        if len(prompt) > self.sequences:
            raise BadRequest(
                f"'prompt' holds {len(prompt)} prompts; the engine takes {self.sequences}: send fewer", param="prompt"
            )
        for item in prompt:
            if isinstance(item, str):
                self.check_text(len(item), "prompt")
            elif isinstance(item, list):
                self._check_ids(item)

    def _check_ids(self, ids: Sequence[Any]) -> None:
        if len(ids) > self.max_model_len:
            raise BadRequest(
                f"the prompt has {len(ids)} tokens and the model's context is {self.max_model_len}, of which the "
                f"answer needs at least 1: shorten 'prompt' by {len(ids) - self.max_model_len + 1} tokens",
                param="prompt",
                code="context_length_exceeded",
            )


def _check_count(body: Json, field: str, most: int, why: str, code: str | None = None) -> None:
    value = body.get(field)
    if isinstance(value, (list, dict, str)) and len(value) > most:
        raise BadRequest(f"'{field}' has the length {len(value)}; {most} is the most: {why}", param=field, code=code)


def size_of_message(message: Json, param: str) -> int:
    """At least the characters that ``message`` brings into a prompt; a part of its content counts one more.

    Raises:
        BadRequest: it holds what JSON cannot say.
    """
    if message.keys() - {"role", "content"}:  # calls of tools and the like, of any shape
        return size_of(message, param)
    content = message.get("content")
    if isinstance(content, str):
        return len(content)
    if not isinstance(content, list):
        return 0
    texts = (part.get("text") if isinstance(part, dict) else part for part in content)
    return sum(1 + (len(text) if isinstance(text, str) else 0) for text in texts)


def size_of(value: object, param: str) -> int:
    """Bytes of ``value`` as JSON.

    Raises:
        BadRequest: JSON cannot say it.
    """
    try:
        return len(orjson.dumps(value))
    except orjson.JSONEncodeError as error:
        raise BadRequest(f"'{param}' cannot be written as JSON: {error}", param=param) from error
