"""What a rule of personal data may ask for beside the labels we know: patterns of the user's own. Read without engines.

A pattern is RE2's (linear in the text, whatever it is; back references and lookaround are refused) and is matched
within one run of text without whitespace, quotes, brackets, commas and semicolons, so that a stream comes out as the
whole text does. `\\b` is an edge; `^` and `$` would mean the run's and are refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from aim_guardrail.detectors.base import Label
from aim_guardrail.detectors.family import Options, as_tuple
from aim_guardrail.detectors.pii_labels import IDENTIFIER_LABELS, PII_LABELS
from aim_guardrail.text import Text

MAX_PATTERNS, MAX_PATTERN_CHARS, MAX_WORDS = 32, 500, 32

_WORD = re.compile("[a-z]{2,40}")
# What stands for itself, so that what is left is syntax.
_LITERAL = re.compile(r"\\[^AzZBsG]|\[\^?\]?(?:\\.|\[:\w+:\]|[^\]\\])*\]", re.DOTALL)


class CustomPattern(BaseModel):
    """One kind of value of the user's own.

    Attributes:
        label: what it is called, as in `EMPLOYEE_ID`.
        pattern: of RE2; over text folded to ASCII (`aim_guardrail.text`).
        context: words of which one must stand shortly before the value; none: it counts anywhere.
        score: what a match scores.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    label: str = Field(pattern="^[A-Z][A-Z0-9_]{0,39}$")
    pattern: str = Field(min_length=1, max_length=MAX_PATTERN_CHARS)
    context: tuple[str, ...] = Field(default=(), max_length=MAX_WORDS)
    score: float = Field(default=0.9, gt=0, le=1)

    @field_validator("context", mode="before")
    @classmethod
    def _as_tuple(cls, value: Any) -> Any:
        return as_tuple(value)

    @field_validator("label")
    @classmethod
    def _new(cls, value: str) -> str:
        if value in PII_LABELS or value in IDENTIFIER_LABELS:
            raise ValueError(f"{value} is a label of ours: choose another, or name it under entities")
        return value

    @field_validator("pattern")
    @classmethod
    def _usable(cls, value: str) -> str:
        # Imported here: who has no patterns of their own loads no engine to read a policy.
        from aim_guardrail.detectors.linear_patterns import LinearPattern, Refused

        if not value.isascii():
            raise ValueError("text is folded to ASCII before it is searched: write the pattern in ASCII")
        syntax = _LITERAL.sub("", value)
        if re.search(r"\\[AzZ]|[\^$]", syntax):
            raise ValueError(r"a value may stand anywhere in a text: use \b in place of ^ and $")
        if re.search(r"\s|\\s", syntax):
            raise ValueError("a value is one run of text, without spaces: match its parts by patterns of their own")
        try:
            pattern = LinearPattern(value)
        except Refused as error:
            raise ValueError(f"RE2 refuses it ({error}): write it without lookaround and back references") from None
        if pattern.search(""):
            raise ValueError("it matches the empty text: have it match at least one character")
        return value

    @field_validator("context")
    @classmethod
    def _words(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        folded = tuple(Text(word).scan.lower() for word in value)
        for word, plain in zip(value, folded, strict=True):
            if not _WORD.fullmatch(plain):
                raise ValueError(f"{word[:40]!r} is no single word of two letters or more: give words")
        return folded

    @property
    def as_label(self) -> Label:
        """Counts by default."""
        return Label(threshold=min(0.5, self.score), top_score=self.score)


class PiiOptions(Options):
    """`custom`: patterns of the user's own, each with a label of its own."""

    custom: tuple[CustomPattern, ...] = Field(default=(), max_length=MAX_PATTERNS)

    @model_validator(mode="after")
    def _told_apart(self) -> PiiOptions:
        labels = [each.label for each in self.custom]
        if len(set(labels)) != len(labels):
            raise ValueError("custom: a label is given twice: join the patterns by |")
        return self

    @property
    def labels(self) -> Mapping[str, Label]:
        """The labels of the patterns."""
        return {each.label: each.as_label for each in self.custom}
