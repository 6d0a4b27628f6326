"""What a policy says of a guard model. Cheap to import."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from pydantic import Field, model_validator

from aim_guardrail.detectors.judge.granite_guardian import GUARDIANS, GraniteGuardian
from aim_guardrail.detectors.judge.llama_guard import GUARDS, LlamaGuard
from aim_guardrail.detectors.judge.options import JudgeOptions

JudgeName = Literal[
    "llama-guard-2",
    "llama-guard-3",
    "llama-guard-3-1b",
    "granite-guardian-3.0",
    "granite-guardian-3.1",
    "granite-guardian-3.2",
    "granite-guardian-3.3",
]


class SafetyOptions(JudgeOptions):
    """Which guard model, and how it is asked.

    Attributes:
        judge: whose prompts and answers they are.
        risks: of Granite Guardian, one question to the model each.
        api: `completions`: the prompt as it is here, `chat`: the server's own chat template.
        logprobs: false: its word alone counts (0 or 1), for servers that list no probabilities.
        top_logprobs: how many tokens the server is asked to list.
    """

    judge: JudgeName
    risks: tuple[str, ...] = Field(default=(), max_length=16)
    api: Literal["completions", "chat"] = "completions"
    logprobs: bool = True
    top_logprobs: int = Field(default=20, ge=2, le=20)

    @model_validator(mode="after")
    def _known_risks(self) -> SafetyOptions:
        known = GUARDIANS[self.judge].bank if self.judge in GUARDIANS else {}
        for risk in self.risks:
            if not known:
                raise ValueError(
                    f"risks are Granite Guardian's, {self.judge} judges all of its own at once: remove them"
                )
            if risk not in known:
                raise ValueError(f"unknown risk {risk[:80]!r}: use some of {', '.join(known)}")
        if len(set(self.risks)) != len(self.risks):
            raise ValueError("a risk is listed twice: list each once")
        return self

    @property
    def guard(self) -> LlamaGuard | GraniteGuardian:
        """The prompts and the parser."""
        if self.judge in GUARDS:
            return replace(GUARDS[self.judge], reads_logprobs=self.logprobs)
        return replace(GUARDIANS[self.judge], risks=self.risks or ("harm",), reads_logprobs=self.logprobs)
