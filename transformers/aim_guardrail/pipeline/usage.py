"""How many tokens a predictor says that a request has used, by the protocols that tell. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

_MOST = 2**53  # what every reader of JSON takes for the same number


class Usage(NamedTuple):
    """Tokens of the prompt and of the answer; None: not told."""

    prompt: int | None = None
    answer: int | None = None

    def then(self, later: Usage) -> Usage:
        """With what has been told since, which may be one of the two alone."""
        prompt, answer = later
        return Usage(self.prompt if prompt is None else prompt, self.answer if answer is None else answer)


NOT_TOLD = Usage()


def usages_in(payload: Any) -> Iterator[Usage]:
    """What a whole answer, or an event of a stream, says: in OpenAI's names, or in those of the Responses API and
    Anthropic, whose events may tell one of the two alone.
    """
    if not isinstance(payload, dict):
        return
    for holder in (payload, payload.get("response"), payload.get("message")):
        usage = holder.get("usage") if isinstance(holder, dict) else None
        if isinstance(usage, dict):
            yield _read(usage)


def _read(usage: dict[str, Any]) -> Usage:
    prompt = _count(usage, "prompt_tokens", "input_tokens")
    answer = _count(usage, "completion_tokens", "output_tokens")
    total = _count(usage, "total_tokens")
    if answer is None and total is not None and prompt is not None:
        answer = max(0, total - prompt)  # of embeddings
    return Usage(prompt, answer)


def _count(usage: dict[str, Any], *names: str) -> int | None:
    for name in names:
        count = usage.get(name)
        if type(count) is int and 0 <= count < _MOST:
            return count
    return None
