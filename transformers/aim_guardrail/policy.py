"""Policy: what is looked for in prompts and answers, and what happens then. Pure but for reading YAML files.

A policy is versioned, frozen and strict: an unknown key, type or entity is refused with one line that names the
file, the line, the key and the remedy (`PolicyError`). `decide` turns findings into a `Verdict`; it knows
nothing of detectors, servers or streams.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from aim_guardrail.detectors.base import FAMILIES, Finding

Action = Literal["block", "redact", "flag"]
Direction = Literal["prompt", "answer"]

_FAMILY_ORDER = {family: rank for rank, family in enumerate(FAMILIES)}
_ACTION_ORDER = {"block": 0, "redact": 1, "flag": 2}
_VERDICT_ORDER = {**_ACTION_ORDER, "allow": 3}


class PolicyError(ValueError):
    """A policy file cannot be used. The message is one line: file, line, key, what is wrong, the remedy."""


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
            raise ValueError(f"unknown type {value!r}: use one of {', '.join(FAMILIES)}")
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
                raise ValueError(f"unknown entity {entity!r}: use some of {', '.join(known)}")
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
                raise ValueError(f"unknown region {region!r}: use ISO 3166-1 codes, {nearest!r} is the nearest")
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

    max_hold_chars: int = Field(default=1024, ge=64, le=65536)
    on_overflow: Literal["block", "redact"] = "block"


class Policy(_Strict):
    """A whole policy. `version` is the version of this format, not of the policy: see `version_hash`."""

    version: Literal[1]
    name: str = Field(min_length=1, max_length=63, pattern=r"^[a-z0-9]([a-z0-9-]*[a-z0-9])?$")
    on_error: Literal["closed", "open"] = "closed"
    prompt: tuple[Rule, ...] = ()
    answer: tuple[Rule, ...] = ()
    stream: StreamRules = StreamRules()

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


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a check came to. `families` and `findings` are those that count; `degraded` names the detectors
    that failed under `on_error: open`.
    """

    action: Literal["allow", "flag", "redact", "block"] = "allow"
    families: tuple[str, ...] = ()
    findings: tuple[Finding, ...] = field(default=())
    degraded: tuple[str, ...] = ()

    @property
    def blocked(self) -> bool:
        """Whether the text must not pass at all."""
        return self.action == "block"

    def joined(self, later: Verdict) -> Verdict:
        """The verdict on this text and the one that follows it."""
        return Verdict(
            min(self.action, later.action, key=_VERDICT_ORDER.__getitem__),
            _ordered({*self.families, *later.families}),
            self.findings + later.findings,
            tuple(sorted({*self.degraded, *later.degraded})),
        )


def decide(findings: Iterable[Finding], rules: Sequence[Rule], degraded: tuple[str, ...] = ()) -> Verdict:
    """The verdict of `rules` on `findings`. Where findings overlap, one remains: the strictest action, then
    the family's precedence, then the score, then the length decide; it covers all that overlapped, so that
    no part of a weaker finding stays visible. A flag never widens what is redacted.
    """
    by_family = {rule.type: rule for rule in rules}
    kept = [f for f in findings if f.family in by_family and by_family[f.family].applies(f)]
    acts = {rule.type: rule.action for rule in rules}
    hard = _merge([f for f in kept if acts[f.family] != "flag"], acts)
    soft = _merge([f for f in kept if acts[f.family] == "flag"], acts)
    soft = [f for f in soft if not any(f.start < h.end and h.start < f.end for h in hard)]
    final = sorted(hard + soft, key=lambda f: f.start)
    if not final:
        return Verdict(degraded=degraded)
    action = min((acts[f.family] for f in final), key=_ACTION_ORDER.__getitem__)
    return Verdict(action, _ordered({f.family for f in final}), tuple(final), degraded)


def _ordered(families: Iterable[str]) -> tuple[str, ...]:
    return tuple(sorted(families, key=lambda family: (_FAMILY_ORDER.get(family, len(_FAMILY_ORDER)), family)))


def _merge(findings: list[Finding], acts: dict[str, Action]) -> list[Finding]:
    def precedence(f: Finding) -> tuple[int, int, float, int, str]:
        return (_ACTION_ORDER[acts[f.family]], _FAMILY_ORDER[f.family], -f.score, f.start - f.end, f.rule_id)

    merged: list[Finding] = []
    for finding in sorted(findings, key=lambda f: (f.start, f.end)):
        if merged and finding.start < merged[-1].end:
            last = merged[-1]
            winner = min(last, finding, key=precedence)
            merged[-1] = replace(winner, start=last.start, end=max(last.end, finding.end))
        else:
            merged.append(finding)
    return merged


def load_policy(path: str | Path) -> Policy:
    """The policy in a YAML file.

    Raises:
        PolicyError: unreadable file, not YAML, or not a valid policy.
    """
    path = Path(path)
    try:
        source = path.read_text(encoding="utf-8")
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
    try:
        root = yaml.compose(source, Loader=yaml.SafeLoader)
        _refuse_duplicate_keys(root, origin)
        data = yaml.safe_load(source)
    except yaml.YAMLError as error:
        raise PolicyError(_yaml_problem(error, origin)) from error
    if root is None or not isinstance(data, dict):
        raise PolicyError(f"{origin}:1: a policy is a mapping (version, name, prompt, answer, ...)")
    try:
        return Policy.model_validate(data)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        line, key = _locate(root, first["loc"])
        raise PolicyError(f"{origin}:{line}: {key}: {_problem(first)}") from error


def _reason(error: Exception) -> str:
    return error.strerror or str(error) if isinstance(error, OSError) else "not UTF-8"


def _yaml_problem(error: yaml.YAMLError, origin: str) -> str:
    mark = getattr(error, "problem_mark", None)
    where = f"{origin}:{mark.line + 1}" if mark is not None else origin
    what = getattr(error, "problem", None) or " ".join(str(error).split())
    return f"{where}: not valid YAML ({what}): fix the syntax"


def _refuse_duplicate_keys(node: yaml.Node | None, origin: str) -> None:
    if isinstance(node, yaml.MappingNode):
        seen: set[Hashable] = set()
        for key, value in node.value:
            if key.value in seen:
                raise PolicyError(f"{origin}:{key.start_mark.line + 1}: {key.value}: given twice: keep one")
            seen.add(key.value)
            _refuse_duplicate_keys(value, origin)
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _refuse_duplicate_keys(item, origin)


def _locate(root: yaml.Node, loc: tuple[int | str, ...]) -> tuple[int, str]:
    """The line (from 1) and the dotted key that a pydantic error location stands for in the YAML tree."""
    node, line, key = root, root.start_mark.line, ""
    for part in loc:
        if isinstance(node, yaml.MappingNode):
            pair = next((p for p in node.value if p[0].value == part), None)
            if pair is not None:
                node, line = pair[1], pair[0].start_mark.line
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            node = node.value[part]
            line = node.start_mark.line
        key += f"[{part}]" if isinstance(part, int) else f".{part}" if key else str(part)
    return line + 1, key or "policy"


def _problem(error: Any) -> str:
    kind, given, context = error["type"], error.get("input"), error.get("ctx", {})
    if kind == "extra_forbidden":
        return "unknown key: remove it or fix its spelling"
    if kind == "missing":
        return "missing: add it"
    if kind == "literal_error":
        return f"{given!r} is not allowed: use {context['expected']}"
    if kind == "value_error":
        return str(context["error"])
    message = str(error["msg"]).replace("a valid tuple", "a list")
    return f"{given!r} is refused: {message[0].lower()}{message[1:]}"


ACTIONS: tuple[Action, ...] = get_args(Action)
