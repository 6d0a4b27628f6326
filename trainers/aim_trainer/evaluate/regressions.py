"""Prompts whose answers must stay right: a JSONL file of {prompt, expected | contains | matches}."""

from __future__ import annotations

import json
from typing import Annotated, Self

import regex
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from aim_trainer.errors import DataError
from aim_trainer.places.open import open_file

MOST_PROMPTS, MOST_ERRORS = 10_000, 20
_FIELD = "spec.validation.regressionPrompts"
#: A pattern that backtracks without end is given up after so long, and its prompt counts as failed.
PATTERN_TIMEOUT_S = 1.0

_Text = Annotated[str, Field(min_length=1, max_length=100_000)]


class Regression(BaseModel):
    """One line. expected: the whole answer but for white space; contains: a part of it; matches: a regular expression
    that is found in it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    prompt: _Text
    expected: _Text | None = None
    contains: _Text | None = None
    matches: _Text | None = None

    @model_validator(mode="after")
    def _asks_for_one_thing(self) -> Self:
        if sum(wish is not None for wish in (self.expected, self.contains, self.matches)) != 1:
            raise ValueError("give one of expected, contains and matches")
        if self.matches is not None:
            try:
                regex.compile(self.matches)
            except regex.error as problem:
                raise ValueError(f"matches: no regular expression: {problem}") from None
        return self

    def wanted(self) -> str:
        """What is asked of the answer, for a person."""
        return self.expected or (f"contains {self.contains!r}" if self.contains else f"matches {self.matches!r}")

    def holds(self, answer: str) -> bool:
        """Whether the answer is right."""
        if self.expected is not None:
            return answer.split() == self.expected.split()
        if self.contains is not None:
            return self.contains in answer
        try:
            return regex.search(self.matches or "", answer, timeout=PATTERN_TIMEOUT_S) is not None
        except TimeoutError:
            return False


def read_regressions(uri: str) -> list[Regression]:
    """The prompts, in their order. Raises DataError: `prompts.jsonl:3: contains: …`, a line each; StoreError."""
    place, name = open_file(uri)
    try:
        text = place.read_bytes(name).decode("utf-8-sig")
    except UnicodeDecodeError as problem:
        raise _refused(uri, f"not UTF-8 (byte {problem.start})", "save the file as UTF-8") from None
    found: list[Regression] = []
    wrong: list[str] = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            _read_line(f"{uri}:{number}", line, found, wrong)
        if len(found) > MOST_PROMPTS:
            raise _refused(uri, f"more than {MOST_PROMPTS} prompts", "keep those that matter most")
    _refuse(uri, found, wrong)
    return found


def _read_line(where: str, line: str, found: list[Regression], wrong: list[str]) -> None:
    try:
        found.append(Regression.model_validate(json.loads(line)))
    except ValidationError as problem:
        for error in problem.errors(include_url=False, include_input=False):
            field = ".".join(str(part) for part in error["loc"])
            said = error["msg"].removeprefix("Value error, ")
            wrong.append(f"{where}: {field + ': ' if field else ''}{said}")
    except ValueError as problem:
        wrong.append(f"{where}: not JSON: {problem}")
    except RecursionError:
        wrong.append(f"{where}: not JSON: nested too deeply")


def _refuse(uri: str, found: list[Regression], wrong: list[str]) -> None:
    if wrong:
        more = f"\n… and {len(wrong) - MOST_ERRORS} more" if len(wrong) > MOST_ERRORS else ""
        raise DataError("\n".join(wrong[:MOST_ERRORS]) + more, field=_FIELD, value=uri)
    if not found:
        raise _refused(uri, "no prompts", 'a line for each: {"prompt": "…", "contains": "…"}')


def _refused(uri: str, what: str, remedy: str) -> DataError:
    return DataError(f"{uri}: {what}", field=_FIELD, value=uri, remedy=remedy)
