"""Base and tuned model side by side: the same held-out rows, the same prompts, greedy answers, and the gates."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from aim_trainer.data.tokens import Tokens
from aim_trainer.errors import StoreError
from aim_trainer.files import write_whole
from aim_trainer.job.job import FineTuningJob
from aim_trainer.metrics.records import Note, Sink
from aim_trainer.recipe.evaluation import held_out
from aim_trainer.recipe.model import Loaded
from aim_trainer.run_directory import RunDirectory

from .answers import answers
from .gates import GateResult, held
from .guardrail import Asked, Ruling, rulings
from .questions import Question, held_out_questions, regression_questions
from .regressions import Regression, read_regressions
from .scores import exact_match, rouge_l
from .sides import sides

#: Answered in any case: a person wants to see some.
FEWEST_ANSWERS = 5
_MOST_SAMPLES, _MOST_REGRESSIONS, _LONGEST_TEXT = 20, 200, 4000
_OF_TEXT = ("exact_match", "rouge_l")


@dataclass(frozen=True, slots=True)
class Judgement:
    """What `evaluation.json` holds. base, tuned, delta (tuned − base): by metric; n: of how many rows, prompts or
    answers; samples and regressions: questions with both answers, some of them, cut; unmeasured: metric → why not.
    """

    base: dict[str, float]
    tuned: dict[str, float]
    delta: dict[str, float]
    n: dict[str, int]
    gates: list[GateResult]
    samples: list[dict[str, Any]]
    regressions: list[dict[str, Any]]
    unmeasured: dict[str, str]

    @property
    def failed_gates(self) -> list[GateResult]:
        """Those that stop the job: `gates.require` raises them."""
        return [gate for gate in self.gates if not gate.passed]


def judge(job: FineTuningJob, run: RunDirectory, rows: Path | None, device: str, sink: Sink) -> Judgement:
    """Measures both models and writes `run.evaluation`; does not raise for gates that failed.

    rows: the directory of the tokenised held-out rows, None: the job holds out none. device: `cpu`, `cuda:0`. A
    guardrail that is away leaves its metric unmeasured, and so its gates fail.

    Raises StoreError (no result of this job, a place that is away), DataError (regression prompts), JobError.
    """
    judged = _Judge(job, Tokens(rows) if rows else None, prompts_of(job))
    for side, loaded in sides(job, run.result, device):
        sink.tell(Note("judging", f"the {side} model: {judged.what(loaded)}"))
        judged.measure(side, loaded)
    judgement = judged.judgement()
    _write(judgement, run.evaluation)
    sink.tell(Note("judged", f"the base model, and tuned: {_changes(judgement)}"))
    return judgement


def _changes(judgement: Judgement) -> str:
    """`eval_loss 4.7219 → 0.1476, exact_match 0.0000 → 0.7500`."""
    both = ((name, judgement.base[name], tuned) for name, tuned in judgement.tuned.items() if name in judgement.base)
    return ", ".join(f"{name} {base:.4f} → {tuned:.4f}" for name, base, tuned in both)


def prompts_of(job: FineTuningJob) -> list[Regression]:
    """The job's regression prompts, none where it names none. Raises DataError, StoreError."""
    uri = job.spec.validation.regression_prompts
    return read_regressions(uri) if uri else []


@dataclass(slots=True)
class _Measured:
    """Of one of the two models."""

    metrics: dict[str, float] = field(default_factory=dict)
    answers: list[str] = field(default_factory=list)
    rulings: list[Ruling] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)


class _Judge:
    """The questions, asked of one model after the other."""

    def __init__(self, job: FineTuningJob, tokens: Tokens | None, regressions: list[Regression]) -> None:
        self._validation = job.spec.validation
        self._classifies = job.spec.template == "classification"
        self._tokens = tokens if tokens is not None and len(tokens) else None
        self._regressions = regressions
        self._questions: list[Question] | None = None
        self._prompts: list[Question] = []
        self._measured = {"base": _Measured(), "tuned": _Measured()}
        self._n: dict[str, int] = {}
        self._unmeasured: dict[str, str] = {}

    def what(self, loaded: Loaded) -> str:
        """What is asked of it, for a person. Chooses the questions, once."""
        if self._questions is None:
            self._questions = self._chosen(loaded)
            if not self._classifies:
                self._prompts = regression_questions(self._regressions, loaded.tokenizer)
        rows = len(self._tokens) if self._tokens else 0
        return f"{rows} held-out rows, {len(self._questions) + len(self._prompts)} answers"

    def measure(self, side: str, loaded: Loaded) -> None:
        found, most = self._measured[side], self._validation.max_new_tokens
        questions = self._questions or []
        if self._tokens is not None:
            found.metrics |= held_out(loaded, self._tokens)
            self._n |= dict.fromkeys(found.metrics, len(self._tokens))
        found.answers = answers(loaded, [question.tokens for question in questions], most)
        found.kept = answers(loaded, [question.tokens for question in self._prompts], most)
        self._score(found, questions[: self._scored()])
        self._keep(found)
        self._guard(found, questions)

    def judgement(self) -> Judgement:
        base, tuned = self._measured["base"].metrics, self._measured["tuned"].metrics
        for metric in self._wanted():
            if metric not in tuned:
                self._unmeasured.setdefault(metric, self._why_not(metric))
        delta = {metric: tuned[metric] - base[metric] for metric in tuned if metric in base}
        gates = held(self._validation.gates, base, tuned, self._unmeasured)
        return Judgement(base, tuned, delta, self._n, gates, self._samples(), self._kept(), self._unmeasured)

    def _wanted(self) -> list[str]:
        return list(dict.fromkeys([*self._validation.metrics, *(gate.metric for gate in self._validation.gates)]))

    def _scored(self) -> int:
        """Answers that are compared with the wanted ones."""
        return self._validation.samples if set(_OF_TEXT) & set(self._wanted()) else 0

    def _chosen(self, loaded: Loaded) -> list[Question]:
        if self._tokens is None or self._classifies:
            return []
        guardrail = self._validation.guardrail
        count = max(FEWEST_ANSWERS, self._scored(), guardrail.samples if guardrail else 0)
        return held_out_questions(self._tokens, loaded.tokenizer, count)

    def _score(self, found: _Measured, questions: Sequence[Question]) -> None:
        for name, score in zip(_OF_TEXT, (exact_match, rouge_l), strict=True):
            if questions and name in self._wanted():
                pairs = zip(found.answers, questions, strict=False)
                found.metrics[name] = sum(score(said, asked.wanted) for said, asked in pairs) / len(questions)
                self._n[name] = len(questions)

    def _keep(self, found: _Measured) -> None:
        if self._prompts:
            right = [each.holds(said) for each, said in zip(self._regressions, found.kept, strict=True)]
            found.metrics["regressions"] = sum(right) / len(right)
            self._n["regressions"] = len(right)

    def _guard(self, found: _Measured, questions: Sequence[Question]) -> None:
        check, metric = self._validation.guardrail, "guardrail_blocked"
        if check is None or not questions or metric in self._unmeasured:
            return
        pairs = zip(questions[: check.samples], found.answers, strict=False)
        asked = [Asked(question.prompt, said) for question, said in pairs]
        try:
            found.rulings = rulings(check.url, check.policy, asked)
        except StoreError as problem:
            self._unmeasured[metric] = str(problem)
            return
        found.metrics[metric] = sum(ruling.action == "block" for ruling in found.rulings) / len(asked)
        self._n[metric] = len(asked)

    def _why_not(self, metric: str) -> str:
        if metric == "regressions":
            return "spec.validation.regressionPrompts names no file"
        if metric == "guardrail_blocked" and self._validation.guardrail is None:
            return "spec.validation.guardrail names no guardrail"
        if self._tokens is None:
            return "the job holds out no rows: spec.dataset.validation"
        if self._classifies:
            return "it is of answers, and a classifier gives none"
        if metric in ("accuracy", "f1"):
            return "it is of template classification"
        return "no held-out row has anything before its answer"

    def _samples(self) -> list[dict[str, Any]]:
        base, tuned = self._measured["base"], self._measured["tuned"]
        shown = []
        for at, question in enumerate((self._questions or [])[:_MOST_SAMPLES]):
            blocked = {"blocked": tuned.rulings[at].action == "block"} if at < len(tuned.rulings) else {}
            shown.append(_texts(question, base.answers[at], tuned.answers[at]) | blocked)
        return shown

    def _kept(self) -> list[dict[str, Any]]:
        """Wrong ones first."""
        base, tuned = self._measured["base"].kept, self._measured["tuned"].kept
        every = [
            _texts(question, before, after)
            | {"base_holds": regression.holds(before), "tuned_holds": regression.holds(after)}
            for question, regression, before, after in zip(self._prompts, self._regressions, base, tuned, strict=False)
        ]
        return sorted(every, key=lambda each: bool(each["tuned_holds"]))[:_MOST_REGRESSIONS]


def _texts(question: Question, base: str, tuned: str) -> dict[str, Any]:
    said: Mapping[str, str] = {"prompt": question.prompt, "wanted": question.wanted, "base": base, "tuned": tuned}
    return {key: text[:_LONGEST_TEXT] for key, text in said.items()}


def _write(judgement: Judgement, file: Path) -> None:
    """Numbers that are none stand as null."""
    write_whole(file, orjson.dumps(dataclasses.asdict(judgement), option=orjson.OPT_INDENT_2))
