"""What a policy says of its own written rules, and of the model that judges by them. Cheap to import."""

from __future__ import annotations

import re
from typing import Any

from pydantic import Field, field_validator, model_validator

from aim_guardrail.detectors.family import Options, as_tuple
from aim_guardrail.detectors.judge.options import JudgeOptions

_ID = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,62}")
_MOST_EXAMPLES, _MOST_CHARS = 16, 2000


class WrittenRule(Options):
    """One rule, as its author would tell a colleague.

    Attributes:
        id: its label in findings, and what a policy's `entities`, `action` and `threshold` call it.
        description: what is not allowed.
        violations: texts that break it.
        fine: texts that come near and do not.
    """

    id: str
    description: str = Field(min_length=1, max_length=_MOST_CHARS)
    violations: tuple[str, ...] = Field(default=(), max_length=_MOST_EXAMPLES)
    fine: tuple[str, ...] = Field(default=(), max_length=_MOST_EXAMPLES)

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, value: Any) -> Any:
        unknown = sorted(set(map(str, value)) - cls.model_fields.keys()) if isinstance(value, dict) else []
        if unknown:
            raise ValueError(f"unknown key {unknown[0][:80]!r} in a rule; known: {', '.join(cls.model_fields)}")
        return value

    @field_validator("id")
    @classmethod
    def _is_a_label(cls, value: str) -> str:
        if not _ID.fullmatch(value):
            raise ValueError(f"{value[:80]!r} is no id: use a letter, then letters, digits, '_' and '-', 63 at most")
        return value

    @field_validator("violations", "fine", mode="before")
    @classmethod
    def _as_tuple(cls, value: Any) -> Any:
        return as_tuple(value)

    @field_validator("violations", "fine")
    @classmethod
    def _are_short(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if any(not text.strip() or len(text) > _MOST_CHARS for text in value):
            raise ValueError(f"an example is a text of at most {_MOST_CHARS} characters: shorten it")
        return value


class ComplianceOptions(JudgeOptions):
    """The rules, and the model that judges by them."""

    rules: tuple[WrittenRule, ...] = Field(min_length=1, max_length=64)

    @field_validator("rules")
    @classmethod
    def _told_apart(cls, value: tuple[WrittenRule, ...]) -> tuple[WrittenRule, ...]:
        ids = [rule.id for rule in value]
        twice = next((rule_id for rule_id in ids if ids.count(rule_id) > 1), None)
        if twice is not None:
            raise ValueError(f"id {twice!r} is given twice: give each rule its own")
        return value
