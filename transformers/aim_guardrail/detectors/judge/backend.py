"""What a judge is asked and what it says, whoever runs it: a server (`served`) or this process (`in_process`)."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from aim_guardrail.detectors.base import Unjudged

_MOST_AT_ONCE = 8


@dataclass(frozen=True, slots=True)
class Part:
    """A piece of a prompt: ours, or a text that is judged (`is_data`), `markers.inert` by now."""

    text: str
    is_data: bool = False


Prompt = tuple[Part, ...]


def spelt(prompt: Prompt) -> str:
    """A prompt as one text."""
    return "".join(part.text for part in prompt)


@dataclass(frozen=True, slots=True)
class Question:
    """One question to a model, in both forms a back end may take.

    Attributes:
        messages: role and content of each, for the model's own chat template.
        prompt: the whole prompt, special tokens spelt out, without that of the beginning; None where there is only the
            chat form.
        variables: what the chat template is given besides.
        schema: the JSON schema that the answer is held to.
        about: what is asked, where one text gets several questions.
    """

    messages: tuple[tuple[str, Prompt], ...]
    max_tokens: int
    prompt: Prompt | None = None
    variables: Mapping[str, Any] = field(default_factory=dict)
    schema: Mapping[str, Any] | None = None
    about: str = ""


@dataclass(frozen=True, slots=True)
class Token:
    """One token of an answer. `top`: the likeliest in its place, with their natural logarithms of probability."""

    text: str
    logprob: float
    top: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Said:
    """An answer. `tokens`: none where no probabilities were asked for. `is_cut`: it had more to say than it was let."""

    text: str
    tokens: tuple[Token, ...] = ()
    is_cut: bool = False


class Unreadable(Unjudged):
    """A judge's answer that says nothing we may rely on: never a pass. One line, without what was said."""


class TooLong(Unjudged):
    """A text that does not fit the judge's context, and is never cut short for it. One line."""


class Backend(Protocol):
    """Runs a model."""

    @property
    def cost(self) -> Literal["model", "remote"]:
        """As of `BatchDetector`."""

    async def ask(self, question: Question, deadline_s: float) -> Said:
        """The answer, at temperature 0; given up at once when the task is cancelled.

        Raises:
            TimeoutError: not by ``deadline_s`` (``time.monotonic``).
            Misconfigured: no text would get an answer.
            Unreadable, TooLong, RemoteFailed: this one got none.
        """

    async def close(self) -> None:
        """Give back what it holds."""


async def ask_all(backend: Backend, questions: Sequence[Question], deadline_s: float) -> list[Said]:
    """The answers to all, a few at once; the first that fails has the others given up."""
    turn = asyncio.Semaphore(_MOST_AT_ONCE)

    async def ask(question: Question) -> Said:
        async with turn:
            return await backend.ask(question, deadline_s)

    if len(questions) == 1:
        return [await ask(questions[0])]
    tasks = [asyncio.ensure_future(ask(question)) for question in questions]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
