"""Policy: what is looked for in prompts and answers, and what happens then. Pure but for reading YAML files.

A policy is versioned, frozen and strict: an unknown key, type or entity is refused with one line that names the
file, the line, the key and the remedy (`PolicyError`). `verdict.decide` turns findings into a `Verdict`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from difflib import get_close_matches
from functools import cached_property
from importlib import resources
from pathlib import Path
from reprlib import Repr
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import ErrorDetails, PydanticKnownError

from aim_guardrail.detectors.base import FAMILIES, Finding
from aim_guardrail.policy.source import MAX_CHARS, PolicyError, Source

Action = Literal["block", "redact", "flag"]
Direction = Literal["prompt", "answer"]

#: A value in a message: enough to be known again, however large, deep or entangled it is.
_SHORT = Repr()
_SHORT.maxlevel, _SHORT.maxlist, _SHORT.maxdict, _SHORT.maxstring, _SHORT.maxother = 2, 4, 4, 80, 80


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Rule(_Strict):
    """For one family in one direction: which entities, from which score, and the action.

    `regions`: whose national telephone numbers are looked for (ISO 3166-1 codes), all by default.
    """

    type: str
    action: Action
    entities: tuple[str, ...] | None = Field(default=None, min_length=1)
    threshold: float | None = Field(default=None, ge=0, le=1)
    regions: tuple[str, ...] | None = Field(default=None, min_length=1)

    @field_validator("type")
    @classmethod
    def _known_type(cls, value: str) -> str:
        if value not in FAMILIES:
            near = _nearest(value, FAMILIES)
            raise ValueError(f"unknown type {_SHORT.repr(value)}: use one of {', '.join(FAMILIES)}{near}")
        return value

    @field_validator("regions", mode="before")
    @classmethod
    def _no_norway(cls, value: Any) -> Any:
        if isinstance(value, list | tuple) and any(item is False for item in value):
            raise ValueError("YAML reads NO as false: put the code in quotes, 'NO'")
        return value

    @field_validator("entities", "regions", mode="before")
    @classmethod
    def _as_tuple(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    @field_validator("entities")
    @classmethod
    def _known_entities(cls, value: tuple[str, ...] | None, info: Any) -> tuple[str, ...] | None:
        known = FAMILIES.get(info.data.get("type", ""))
        if value is None or known is None:
            return value
        for entity in value:
            if entity not in known:
                near = _nearest(entity, known)
                raise ValueError(f"unknown entity {_SHORT.repr(entity)}: use some of {', '.join(known)}{near}")
        if len(set(value)) != len(value):
            raise ValueError("an entity is listed twice: list each once")
        return value

    @field_validator("threshold")
    @classmethod
    def _reachable(cls, value: float | None, info: Any) -> float | None:
        known = FAMILIES.get(info.data.get("type", ""), {})
        named = info.data.get("entities")
        tops = {entity: known[entity].top_score for entity in named or known if entity in known}
        if value is not None and tops and value > min(tops.values()):
            entity, top = min(tops.items(), key=lambda item: item[1])
            remedy = "lower it" if named or len(known) == 1 else "lower it, or list the entities it is meant for"
            raise ValueError(f"{value} can never match {entity}, whose highest score is {top}: {remedy}")
        return value

    @field_validator("regions")
    @classmethod
    def _known_regions(cls, value: tuple[str, ...] | None, info: Any) -> tuple[str, ...] | None:
        entities = info.data.get("entities") or FAMILIES.get(info.data.get("type", ""), {})
        if value is None or not entities:
            return value
        if "PHONE_NUMBER" not in entities:
            raise ValueError("only PHONE_NUMBER has regions, which this rule does not look for: remove them")
        # Imported here: whoever names no region loads no numbering plans.
        from aim_guardrail.detectors.numbering import REGIONS, nearest_region

        for region in value:
            if region not in REGIONS:
                nearest = nearest_region(region)
                given = _SHORT.repr(region)
                raise ValueError(f"unknown region {given}: use ISO 3166-1 codes, {nearest!r} is the nearest")
        if len(set(value)) != len(value):
            raise ValueError("a region is listed twice: list each once")
        return value

    @property
    def phone_regions(self) -> frozenset[str] | None:
        """Whose national telephone numbers are looked for; None: every region's."""
        return None if self.regions is None else frozenset(self.regions)

    @property
    def labels(self) -> frozenset[str]:
        """The labels this rule applies to."""
        return frozenset(self.entities if self.entities is not None else FAMILIES[self.type])

    def applies(self, finding: Finding) -> bool:
        """Whether the rule keeps this finding: its family, its label, a score at or above the threshold."""
        if finding.family != self.type or finding.label not in self.labels:
            return False
        default = FAMILIES[self.type][finding.label].threshold
        return finding.score >= (default if self.threshold is None else self.threshold)


class StreamRules(_Strict):
    """How much of an answer may be held back, and what happens to one unbroken run longer than that."""

    max_hold_chars: int = Field(default=65536, ge=64, le=65536)
    on_overflow: Literal["block", "redact"] = "block"


class Policy(_Strict):
    """A whole policy. `version` is the version of this format, not of the policy: see `version_hash`."""

    version: Literal[1]
    name: str = Field(min_length=1, max_length=63, pattern=r"^[a-z0-9]([a-z0-9-]*[a-z0-9])?$")
    on_error: Literal["closed", "open"] = "closed"
    prompt: tuple[Rule, ...] = ()
    answer: tuple[Rule, ...] = ()
    stream: StreamRules = StreamRules()

    @field_validator("version", mode="before")
    @classmethod
    def _is_a_number(cls, value: Any) -> Any:
        if type(value) is not int:  # Python takes True and 1.0 for 1
            raise PydanticKnownError("literal_error", {"expected": "1"})
        return value

    @field_validator("prompt", "answer", mode="before")
    @classmethod
    def _as_tuple(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    @field_validator("prompt", "answer")
    @classmethod
    def _one_rule_per_type(cls, rules: tuple[Rule, ...]) -> tuple[Rule, ...]:
        seen: set[str] = set()
        for rule in rules:
            if rule.type in seen:
                raise ValueError(f"type {rule.type!r} appears twice: merge the two rules into one")
            seen.add(rule.type)
        return rules

    @model_validator(mode="after")
    def _does_something(self) -> Policy:
        if not self.prompt and not self.answer:
            raise ValueError("the policy checks nothing: give at least one rule under prompt or answer")
        return self

    def rules(self, direction: Direction) -> tuple[Rule, ...]:
        """The rules of one direction."""
        return self.prompt if direction == "prompt" else self.answer

    @cached_property
    def version_hash(self) -> str:
        """12 hex digits that change exactly when the meaning of the policy may (BLAKE2b of canonical JSON)."""
        canonical = json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
        return hashlib.blake2b(canonical.encode(), digest_size=6).hexdigest()


def load_policy(path: str | Path) -> Policy:
    """The policy in a YAML file.

    Raises:
        PolicyError: unreadable file, not YAML, or not a valid policy.
    """
    path = Path(path)
    try:
        with path.open(encoding="utf-8") as file:
            source = file.read(MAX_CHARS + 1)
    except (OSError, UnicodeDecodeError) as error:
        raise PolicyError(f"{path}: cannot be read ({_reason(error)}): give a readable UTF-8 file") from error
    return parse_policy(source, origin=str(path))


def shipped_policy(name: str) -> Policy:
    """A policy that comes with the package, e.g. `chat`.

    Raises:
        PolicyError: there is none of that name.
    """
    folder = resources.files("aim_guardrail") / "policies"
    names = sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))
    if name not in names:
        raise PolicyError(f"no shipped policy is named {name!r}: use one of {', '.join(names)}, or a file path")
    return parse_policy((folder / f"{name}.yaml").read_text(encoding="utf-8"), origin=f"{name}.yaml (shipped)")


def parse_policy(source: str, origin: str) -> Policy:
    """The policy in a YAML text; `origin` names it in errors.

    Raises:
        PolicyError: not YAML, or not a valid policy.
    """
    read = Source(source, origin)
    try:
        return Policy.model_validate(read.data)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise read.error(first["loc"], _problem(first)) from error


def _reason(error: Exception) -> str:
    return error.strerror or str(error) if isinstance(error, OSError) else "not UTF-8"


#: What a key stands in → the model whose fields are its known ones.
_SECTIONS: dict[str, type[BaseModel]] = {"stream": StreamRules, "prompt": Rule, "answer": Rule}
#: pydantic speaks Python.
_WORDS = re.compile(r"a valid dictionary( or instance of \w+)?")


def _problem(error: ErrorDetails) -> str:
    kind, given, context = error["type"], _SHORT.repr(error["input"]), error.get("ctx", {})
    if kind == "extra_forbidden":
        key, section = str(error["loc"][-1]), str(error["loc"][0]) if len(error["loc"]) > 1 else ""
        known = _SECTIONS.get(section, Policy).model_fields
        return f"unknown key{_nearest(key, known) or ': remove it'}; known: {', '.join(known)}"
    if kind == "missing":
        return "missing: add it"
    if kind == "literal_error":
        allowed = str(context["expected"])
        near = _nearest(error["input"], re.findall("'(.*?)'", allowed))
        return f"{given} is not allowed: use {allowed}{near}"
    if kind == "value_error":
        return str(context["error"])
    message = _WORDS.sub("a mapping", error["msg"]).replace("a valid tuple", "a list")
    return f"{given} is refused: {message[0].lower()}{message[1:]}"


def _nearest(given: object, known: Iterable[str]) -> str:
    """``: did you mean 'x'?``, or nothing where no known name is near."""
    names = {name.lower(): name for name in known}
    near = get_close_matches(given.lower(), names, 1) if isinstance(given, str) and len(given) < 64 else []
    return f": did you mean {names[near[0]]!r}?" if near else ""
