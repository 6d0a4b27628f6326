"""A judge as a `BatchDetector`: one verdict on a conversation's last turn, with what was said before as context."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol, TypeVar

from aim_guardrail.detectors.base import Asked, Finding, Passage
from aim_guardrail.detectors.judge.backend import Backend, Question, Said, ask_all, spelt
from aim_guardrail.detectors.judge.compliance import ComplianceOptions
from aim_guardrail.detectors.judge.conversation import Hearing, Turn, fitted, hearings
from aim_guardrail.detectors.judge.options import JudgeOptions
from aim_guardrail.detectors.judge.safety import SafetyOptions
from aim_guardrail.detectors.judge.written_rules import WrittenRules

T = TypeVar("T")

_SMALL_CHARS = 4096  # made into questions in a millisecond


class Examiner(Protocol):
    """What a model is asked, and what its answers mean."""

    def questions(self, turns: Sequence[Turn]) -> list[Question]:
        """About the last of the turns; at least one."""

    def read(self, question: Question, said: Said) -> dict[str, float]:
        """Label → score, 0..1. Raises Unreadable."""


class Judge:
    """The judged turn's passages all get its findings, whole: a verdict names no places.

    Args:
        most_chars: how much of a conversation one question may hold.
        named: whose findings they are, as their `rule_id`; "": each its label's.
    """

    cacheable = False  # a verdict depends on the conversation

    def __init__(
        self, family: str, examiner: Examiner, backend: Backend, most_chars: int, *, named: str = "", digest: str = ""
    ) -> None:
        self.family, self.digest = family, digest
        self._examiner, self._backend = examiner, backend
        self._most_chars, self._named = most_chars, named

    @classmethod
    def of_safety(cls, options: SafetyOptions) -> Judge:
        """Blocking. Raises ValueError: a file that cannot be used, or a context that holds no text."""
        guard = options.guard
        room = _room(options, guard)
        backend = _opened(options, options.api, options.top_logprobs if options.logprobs else 0)
        return cls("safety", guard, backend, room, named=options.judge, digest=options.digest)

    @classmethod
    def of_compliance(cls, options: ComplianceOptions) -> Judge:
        """Blocking. Raises ValueError: a file that cannot be used, or a context that the rules fill."""
        rules = WrittenRules(options.rules)
        room = _room(options, rules)
        return cls("compliance", rules, _opened(options, "chat", 0), room, digest=options.digest)

    @property
    def cost(self) -> Literal["model", "remote"]:
        """Whether it computes here or asks elsewhere."""
        return self._backend.cost

    async def scan_batch(self, passages: Sequence[Passage], asked: Asked) -> list[list[Finding]]:
        """As of `BatchDetector`.

        Raises:
            Unreadable, TooLong: no verdict can be had on this text; and what `Backend.ask` raises.
        """
        found: list[list[Finding]] = [[] for _ in passages]
        size = sum(len(passage.text) for passage in (*passages, *asked.prompt))
        for hearing, questions in await _by_size(size, self._questions, passages, asked.prompt):
            scores = await self._scores(questions, asked.deadline_s)
            for at in hearing.judged:
                end = len(passages[at].text)
                found[at] += [Finding(self.family, n, 0, end, s, self._named or n) for n, s in scores.items()]
        return found

    def _questions(
        self, passages: Sequence[Passage], prompt: Sequence[Passage]
    ) -> list[tuple[Hearing, list[Question]]]:
        return [
            (hearing, [q for turns in fitted(hearing.turns, self._most_chars) for q in self._examiner.questions(turns)])
            for hearing in hearings(passages, prompt)
        ]

    async def _scores(self, questions: Sequence[Question], deadline_s: float) -> dict[str, float]:
        """The highest score of each label, over all windows."""
        scores: dict[str, float] = {}
        for question, said in zip(questions, await ask_all(self._backend, questions, deadline_s), strict=True):
            for label, score in self._examiner.read(question, said).items():
                scores[label] = max(score, scores.get(label, 0.0))
        return scores

    async def close(self) -> None:
        """Give back the model's connections or memory."""
        await self._backend.close()


async def _by_size(size: int, make: Callable[..., T], *args: Any) -> T:
    """What is small is made at once, what is large in a thread."""
    return make(*args) if size <= _SMALL_CHARS else await asyncio.to_thread(make, *args)


def _room(options: JudgeOptions, examiner: Examiner) -> int:
    """Characters of a conversation that a question has room for. Raises ValueError."""
    sample = examiner.questions([Turn("user", ""), Turn("assistant", "")])[0]
    own = sample.prompt or tuple(part for _, content in sample.messages for part in content)
    return options.room(len(spelt(own)), sample.max_tokens)


def _opened(options: JudgeOptions, api: Literal["completions", "chat"], top_logprobs: int) -> Backend:
    """The back end that the options name; engines load here. Raises ValueError: a file it names cannot be used."""
    if options.path is not None:
        from aim_guardrail.detectors.judge.in_process import InProcess

        return InProcess(options.path, options.context_tokens, options.threads)
    from aim_guardrail.detectors.judge.served import Served

    return Served(options.server, api, top_logprobs)
