"""Policy: what is looked for in prompts and answers, and what happens then. Pure but for reading YAML files.

A policy is versioned, frozen and strict: an unknown key, type or entity is refused with one line that names the
file, the line, the key and the remedy (`PolicyError`). `verdict.decide` turns findings into a `Verdict`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from functools import cached_property
from importlib import resources
from pathlib import Path
from reprlib import Repr
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    SerializeAsAny,
    Tag,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails, PydanticKnownError

from aim_guardrail.detectors.base import Finding, Label
from aim_guardrail.detectors.families import FAMILIES, UNUSABLE, Options, Wanted
from aim_guardrail.detectors.family import as_tuple
from aim_guardrail.detectors.traffic import TrafficOptions
from aim_guardrail.policy.source import MAX_CHARS, PolicyError, Source
from aim_kserve.identity.files import read_bounded

_SHIPPED = resources.files("aim_guardrail") / "policies"

Action = Literal["block", "redact", "flag", "log"]
OnFailure = Literal["closed", "open"]
Score = Annotated[float, Field(ge=0, le=1)]
NAME = r"^([a-z0-9]([a-z0-9-]*[a-z0-9])?)?$"
DEFAULT = "default"  # in a rule's actions: of all entities it does not name
Direction = Literal["prompt", "answer"]

#: A value in a message: enough to be known again, however large, deep or entangled it is.
_SHORT = Repr()
_SHORT.maxlevel, _SHORT.maxlist, _SHORT.maxdict, _SHORT.maxstring, _SHORT.maxother = 2, 4, 4, 80, 80


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Rule(_Strict):
    """For one family in one direction: which entities, from which score, and the action.

    Attributes:
        id: names the rule in verdicts, metrics and audits; by default its type.
        options: what its family takes (`families.Options`), e.g. the address of a judge.
        action: one for all its entities, or one for each; entities a mapping does not name are not looked for, unless
            it names `default`.
        entities: which labels are looked for; the usual ones of its family by default (`Family.usual`).
        threshold: the score from which a finding counts, or one for each entity; its label's own by default.
        regions: whose national telephone numbers are looked for (ISO 3166-1 codes), all by default.
        timeout_ms: how long a batch detector may take; no more than what is left of the policy's budget in any case.
        required: nothing passes without its answer, whatever `on_timeout` and `on_error` say.
        on_timeout, on_error: the policy's own by default.
        restore: of a prompt: the answer says what the rule's placeholders stand for.
    """

    type: str
    id: str = Field(default="", max_length=63, pattern=NAME)
    options: SerializeAsAny[Options] = Field(default=None, validate_default=True)
    action: Action | dict[str, Action]
    entities: tuple[str, ...] | None = Field(default=None, min_length=1)
    threshold: Score | dict[str, Score] | None = None
    regions: tuple[str, ...] | None = Field(default=None, min_length=1)
    timeout_ms: int | None = Field(default=None, ge=1, le=600_000)
    required: bool = False
    on_timeout: OnFailure | None = None
    on_error: OnFailure | None = None
    restore: bool = False

    @field_validator("type")
    @classmethod
    def _known_type(cls, value: str) -> str:
        if value in UNUSABLE:
            raise ValueError(f"type {_SHORT.repr(value)} cannot be used: {UNUSABLE[value]}")
        if value not in FAMILIES:
            near = _nearest(value, FAMILIES)
            raise ValueError(f"unknown type {_SHORT.repr(value)}: use one of {', '.join(FAMILIES)}{near}")
        return value

    @field_validator("options", mode="wrap")
    @classmethod
    def _of_its_family(cls, value: Any, _: Any, info: Any) -> Options:
        family = FAMILIES.get(info.data.get("type", ""))
        if family is None:  # said already
            return Options()
        if isinstance(value, family.options):
            return value
        try:
            return family.options.model_validate({} if value is None else value)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(map(str, first["loc"]))
            raise ValueError(
                f"{where + ': ' if where else ''}{_problem(first, _section(family.options, first['loc']))}"
            ) from None

    @field_validator("regions", mode="before")
    @classmethod
    def _no_norway(cls, value: Any) -> Any:
        if isinstance(value, list | tuple) and any(item is False for item in value):
            raise ValueError("YAML reads NO as false: put the code in quotes, 'NO'")
        return value

    @field_validator("entities", "regions", mode="before")
    @classmethod
    def _as_tuple(cls, value: Any) -> Any:
        return as_tuple(value)

    @field_validator("action", "entities")
    @classmethod
    def _known_entities(cls, value: Any, info: Any) -> Any:
        known = _known_labels(info)
        if value is None or isinstance(value, str) or not known:
            return value
        for entity in value:
            if entity not in known and not (entity == DEFAULT and isinstance(value, dict)):
                near = _nearest(entity, known)
                raise ValueError(f"unknown entity {_SHORT.repr(entity)}: use some of {', '.join(known)}{near}")
        if not value:
            raise ValueError("names no entity: name one, or give one action for all")
        if len(set(value)) != len(value):
            raise ValueError("an entity is listed twice: list each once")
        return value

    @field_validator("threshold")
    @classmethod
    def _reachable(cls, value: float | dict[str, float] | None, info: Any) -> float | dict[str, float] | None:
        known = _known_labels(info)
        named = info.data.get("entities")
        if isinstance(value, dict):
            for entity, score in value.items():
                if known and entity not in known:
                    near = _nearest(entity, known)
                    raise ValueError(f"unknown entity {_SHORT.repr(entity)}: use some of {', '.join(known)}{near}")
                if known and score > known[entity].top_score:
                    raise ValueError(_unreachable(score, entity, known[entity].top_score, "lower it"))
            return value
        usual = FAMILIES[info.data["type"]].usual_labels(info.data["options"]) if known else {}
        tops = {entity: known[entity].top_score for entity in named or usual if entity in known}
        if value is not None and tops and value > min(tops.values()):
            entity, top = min(tops.items(), key=lambda item: item[1])
            remedy = "lower it" if named or len(known) == 1 else "lower it, or list the entities it is meant for"
            raise ValueError(_unreachable(value, entity, top, remedy))
        return value

    @field_validator("regions")
    @classmethod
    def _known_regions(cls, value: tuple[str, ...] | None, info: Any) -> tuple[str, ...] | None:
        entities = info.data.get("entities") or _known_labels(info)
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

    @model_validator(mode="after")
    def _agrees(self) -> Rule:
        if not self.is_batch and (self.timeout_ms is not None or self.on_timeout is not None):
            raise ValueError(f"type {self.type!r} is checked inline and cannot time out: remove timeout_ms, on_timeout")
        if self.reads == "picture" and "redact" in self.actions:
            raise ValueError(f"type {self.type!r} judges pictures, which cannot be redacted: block, flag or log them")
        return self

    @model_validator(mode="after")
    def _limits(self) -> Rule:
        if not isinstance(self.options, TrafficOptions):
            return self
        if "redact" in self.actions:
            raise ValueError("type 'traffic' has nothing to redact: use block, flag or log")
        if self.threshold is not None:
            raise ValueError("type 'traffic' has no scores: remove threshold")
        named = {*(self.entities or ()), *(self.action if isinstance(self.action, dict) else ())} - {DEFAULT}
        if idle := sorted(named - self.options.limits.keys()):
            raise ValueError(f"names {idle[0]}, which its options do not limit: remove it, or give the limit")
        if unheeded := sorted(self.options.limits.keys() - self.labels):
            raise ValueError(f"limits {unheeded[0]}, which it does not name: name it, or remove the limit")
        return self

    @property
    def name(self) -> str:
        """What verdicts, metrics and audits call it."""
        return self.id or self.type

    @property
    def is_inline(self) -> bool:
        """Whether it is judged before anything is awaited, and of a stream with every piece."""
        return FAMILIES[self.type].kind == "inline"

    @property
    def is_batch(self) -> bool:
        """Whether it is awaited, in a stage behind those that are judged inline."""
        return FAMILIES[self.type].kind == "batch"

    @property
    def is_traffic(self) -> bool:
        """Whether it is judged by the request, not by what it says."""
        return FAMILIES[self.type].kind == "traffic"

    @property
    def reads(self) -> Literal["text", "picture"]:
        """What it judges."""
        return FAMILIES[self.type].reads

    @property
    def phone_regions(self) -> frozenset[str] | None:
        """Whose national telephone numbers are looked for; None: every region's."""
        return None if self.regions is None else frozenset(self.regions)

    @property
    def wanted(self) -> Wanted:
        """What its detector must be able to find."""
        return Wanted(self.labels, self.options, self.phone_regions)

    @cached_property
    def version_hash(self) -> str:
        """16 hex digits that change exactly when the rule does."""
        return hashlib.blake2b(self.model_dump_json().encode(), digest_size=8).hexdigest()

    @cached_property
    def known(self) -> Mapping[str, Label]:
        """All labels it could look for."""
        return FAMILIES[self.type].labels_of(self.options)

    @cached_property
    def labels(self) -> frozenset[str]:
        """The labels this rule applies to."""
        named = frozenset(self.entities if self.entities is not None else self._usual)
        if isinstance(self.action, str):
            return named
        by_name = frozenset(self.action) - {DEFAULT}
        if self.entities is not None:
            return named if DEFAULT in self.action else named & by_name
        return named | by_name if DEFAULT in self.action else by_name

    @property
    def _usual(self) -> Mapping[str, Label]:
        return FAMILIES[self.type].usual_labels(self.options)

    @property
    def actions(self) -> frozenset[Action]:
        """Every action it may come to."""
        return frozenset(map(self.action_on, self.labels))

    def action_on(self, label: str) -> Action:
        """What is done about a finding of this label, one of `labels`."""
        if isinstance(self.action, str):
            return self.action
        return self.action[label] if label in self.action else self.action[DEFAULT]

    def applies(self, finding: Finding) -> bool:
        """Whether the rule keeps this finding: its family, its label, a score at or above the threshold."""
        if finding.family != self.type:
            return False
        threshold = self._thresholds.get(finding.label)
        return threshold is not None and finding.score >= threshold

    @cached_property
    def _thresholds(self) -> Mapping[str, float]:
        """The score from which it keeps a finding, by label."""
        own = self.threshold if isinstance(self.threshold, dict) else dict.fromkeys(self.labels, self.threshold)
        given = {label: own.get(label) for label in self.labels}
        return {label: self.known[label].threshold if at is None else at for label, at in given.items()}


def _known_labels(info: Any) -> Mapping[str, Label]:
    """Of a rule that is being validated; none where its type or its options were refused."""
    family, options = FAMILIES.get(info.data.get("type", "")), info.data.get("options")
    return {} if family is None or options is None else family.labels_of(options)


def _unreachable(score: float, entity: str, top: float, remedy: str) -> str:
    return f"{score} can never match {entity}, whose highest score is {top}: {remedy}"


class Stage(_Strict):
    """Rules of batch detectors that are asked at once (`parallel`), or one after another (`sequential`)."""

    parallel: tuple[Rule, ...] = ()
    sequential: tuple[Rule, ...] = ()

    @field_validator("parallel", "sequential", mode="before")
    @classmethod
    def _as_tuple(cls, value: Any) -> Any:
        return as_tuple(value)

    @model_validator(mode="after")
    def _is_one(self) -> Stage:
        if bool(self.parallel) == bool(self.sequential):
            raise ValueError("a stage has rules under parallel or under sequential: give one of them")
        return self

    @property
    def rules(self) -> tuple[Rule, ...]:
        """Its rules."""
        return self.parallel or self.sequential


def _is_stage(value: Any) -> str:
    is_stage = isinstance(value, Stage) or (isinstance(value, dict) and not value.keys().isdisjoint(Stage.model_fields))
    return "stage" if is_stage else "rule"


Item = Annotated[
    Annotated[Rule, Tag("rule")] | Annotated[Stage, Tag("stage")],
    Discriminator(_is_stage),
]


class StreamRules(_Strict):
    """How streamed answers are checked.

    Attributes:
        mode: `holdback`: text goes out once it is judged; `buffer`: none before the whole answer is; `observe`: at
            once, judged behind, and cut where a rule blocks: **what was shown by then has leaked**; `off`: not judged.
        max_hold_chars: how much of an unbroken run is held back before `on_overflow` decides.
        max_hold_ms: how long text waits for batch detectors before `on_timeout` decides; by default the budget.
    """

    mode: Literal["holdback", "buffer", "observe", "off"] = "holdback"
    max_hold_chars: int = Field(default=65536, ge=64, le=65536)
    max_hold_ms: int | None = Field(default=None, ge=1, le=600_000)
    on_overflow: Literal["block", "redact"] = "block"

    @field_validator("mode", mode="before")
    @classmethod
    def _no_switch(cls, value: Any) -> Any:
        return "off" if value is False else value  # YAML 1.1 reads off as false


#: Milliseconds a request's checks may take in one direction, by what it is for.
BUDGETS_MS = {"chat": 100, "rag": 150, "codegen": 200, "batch": 500}

#: What version 1 of the format does not have.
_NEW = {
    "policy": ("tenant", "shadow", "use_case", "budget_ms", "on_timeout", "images", "speculative"),
    "rule": ("id", "options", "timeout_ms", "required", "on_timeout", "on_error", "restore"),
    "stream": ("mode", "max_hold_ms"),
}


class Policy(_Strict):
    """A whole policy. `version` is the version of this format, not of the policy: see `version_hash`.

    Attributes:
        tenant: whose it is, None: everybody's who has none of their own.
        shadow: it is a candidate: judged beside the one in force, and nothing comes of it but counts.
        budget_ms: what all checks of one direction may take, by default its use case's (`BUDGETS_MS`).
        on_timeout, on_error: `closed`: what could not be judged does not pass; `open`: it does, and is marked degraded.
        images: what becomes of pictures in prompts: `pass`, `refuse`, or `classify`: judged by rules of a family that
            can; links to them are refused then.
        speculative: whether the model may start while batch detectors still judge the prompt; nothing it says is shown
            before their verdict.
        prompt, answer: rules, and stages of them. Rules of inline families are judged first, wherever they stand; other
            rules that stand next to each other outside a stage are asked at once.
    """

    version: Literal[1, 2]
    name: str = Field(min_length=1, max_length=63, pattern=NAME)
    tenant: str | None = Field(default=None, min_length=1, max_length=255)
    shadow: bool = False
    use_case: Literal["chat", "rag", "codegen", "batch"] = "chat"
    budget_ms: int | None = Field(default=None, ge=1, le=600_000)
    on_timeout: OnFailure = "closed"
    on_error: OnFailure = "closed"
    images: Literal["pass", "refuse", "classify"] = "pass"
    speculative: bool = False
    prompt: tuple[Item, ...] = ()
    answer: tuple[Item, ...] = ()
    stream: StreamRules = StreamRules()

    @field_validator("version", mode="before")
    @classmethod
    def _is_a_number(cls, value: Any) -> Any:
        if type(value) is not int:  # Python takes True and 1.0 for 1
            raise PydanticKnownError("literal_error", {"expected": "1 or 2"})
        return value

    @field_validator("prompt", "answer", mode="before")
    @classmethod
    def _as_tuple(cls, value: Any) -> Any:
        return as_tuple(value)

    @field_validator("prompt", "answer")
    @classmethod
    def _told_apart(cls, items: tuple[Item, ...]) -> tuple[Item, ...]:
        seen: set[str] = set()
        for rule in _flat(items):
            if rule.is_inline and rule.type in seen:
                raise ValueError(f"type {rule.type!r} appears twice: merge the two rules into one")
            if rule.name in seen:
                raise ValueError(f"{rule.name!r} appears twice: give each rule an id of its own")
            seen.add(rule.name)
            if not rule.is_batch and any(isinstance(item, Stage) and rule in item.rules for item in items):
                raise ValueError(f"type {rule.type!r} is checked inline, before any stage: put it outside the stage")
        return items

    @model_validator(mode="after")
    def _limits_what_comes(self) -> Policy:
        for rule in _flat(self.answer):  # one that stands under both means the prompt: an annotation's rules do
            if rule.is_traffic and rule not in _flat(self.prompt):
                raise ValueError("type 'traffic' is judged when a request comes: put it under prompt")
        return self

    @model_validator(mode="after")
    def _does_something(self) -> Policy:
        if not self.prompt and not self.answer and self.images != "refuse":
            raise ValueError("the policy checks nothing: give at least one rule under prompt or answer")
        return self

    @model_validator(mode="after")
    def _has_who_classifies(self) -> Policy:
        rules = [rule for rules in self._all.values() for rule in rules if rule.reads == "picture"]
        if self.images == "classify" and not any(rule in self._all["prompt"] for rule in rules):
            raise ValueError("images: classify needs a rule that judges pictures: add one of type nsfw_image to prompt")
        if self.images != "classify" and rules:
            raise ValueError(f"type {rules[0].type!r} judges pictures, and images is {self.images!r}: say classify")
        return self

    @model_validator(mode="after")
    def _keeps_to_its_version(self) -> Policy:
        if self.version == 1:
            items = (*self.prompt, *self.answer)
            used = [name for name in _NEW["policy"] if name in self.model_fields_set]
            used += [name for name in _NEW["stream"] if name in self.stream.model_fields_set]
            used += [n for rule in _flat(items) for n in _NEW["rule"] if n in rule.model_fields_set]
            used += ["stages"] if any(isinstance(item, Stage) for item in items) else []
            used += [f"type {rule.type}" for rule in _flat(items) if rule.type not in ("secrets", "pii")]
            if used:
                raise ValueError(f"{used[0]} is new in version 2: say 'version: 2'")
        return self

    @model_validator(mode="after")
    def _can_restore(self) -> Policy:
        if any(rule.restore for rule in _flat(self.answer)):
            raise ValueError("restore puts back what a rule for prompts has hidden: remove it from the answer's rules")
        for rule in (rule for rule in _flat(self.prompt) if rule.restore):
            if "redact" not in rule.actions:
                raise ValueError(f"rule {rule.name!r} hides nothing that could be restored: redact, or remove restore")
            if self.stream.mode in ("observe", "off"):
                raise ValueError(f"stream.mode {self.stream.mode!r} sends answers as they come: remove restore")
        return self

    @cached_property
    def restored(self) -> frozenset[str]:
        """The prompt's rules, and inline families, whose values answers say again."""
        rules = [rule for rule in self.rules("prompt") if rule.restore]
        return frozenset(rule.type if rule.is_inline else rule.name for rule in rules)

    @cached_property
    def traffic(self) -> tuple[Rule, ...]:
        """The rules that judge a request, not what it says."""
        return tuple(rule for rule in self.rules("prompt") if rule.is_traffic)

    def rules(self, direction: Direction) -> tuple[Rule, ...]:
        """The rules of one direction, in their order."""
        return self._all[direction]

    def stages(self, direction: Direction) -> list[tuple[Literal["parallel", "sequential"], tuple[Rule, ...]]]:
        """The stages behind the inline one, in their order."""
        stages: list[tuple[Literal["parallel", "sequential"], tuple[Rule, ...]]] = []
        loose: list[Rule] = []
        for item in (*(self.prompt if direction == "prompt" else self.answer), None):
            if isinstance(item, Rule):
                loose += [item] if item.is_batch else []
                continue
            if loose:
                stages.append(("parallel", tuple(loose)))
                loose = []
            if item is not None:
                stages.append(("parallel" if item.parallel else "sequential", item.rules))
        return stages

    @property
    def budget_s(self) -> float:
        """Seconds that all checks of one direction may take."""
        return (self.budget_ms or BUDGETS_MS[self.use_case]) / 1000

    @cached_property
    def _all(self) -> dict[Direction, tuple[Rule, ...]]:
        return {"prompt": tuple(_flat(self.prompt)), "answer": tuple(_flat(self.answer))}

    @cached_property
    def label(self) -> str:
        """Its name and version: `chat/0123456789ab`."""
        return f"{self.name}/{self.version_hash}"

    @cached_property
    def version_hash(self) -> str:
        """12 hex digits that change exactly when the meaning of the policy may (BLAKE2b of canonical JSON)."""
        canonical = json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
        return hashlib.blake2b(canonical.encode(), digest_size=6).hexdigest()


def _flat(items: Iterable[Rule | Stage]) -> list[Rule]:
    return [rule for item in items for rule in (item.rules if isinstance(item, Stage) else (item,))]


def load_policy(path: str | Path) -> Policy:
    """The policy in a YAML file.

    Raises:
        PolicyError: unreadable file, not YAML, or not a valid policy.
    """
    path = Path(path)
    try:
        source = read_bounded(path, 4 * MAX_CHARS).decode()  # no character has more than four bytes
    except UnicodeDecodeError as error:
        raise PolicyError(f"{path}: cannot be read (not UTF-8): give a readable UTF-8 file") from error
    except (OSError, ValueError) as error:
        what = error.strerror or str(error) if isinstance(error, OSError) else str(error)
        raise PolicyError(f"{path}: cannot be read ({what}): give a readable UTF-8 file") from error
    return parse_policy(source, origin=str(path))


def shipped_policy(name: str) -> Policy:
    """A policy that comes with the package, e.g. `chat`.

    Raises:
        PolicyError: there is none of that name.
    """
    names = shipped_names()
    if name not in names:
        raise PolicyError(f"no shipped policy is named {name!r}: use one of {', '.join(names)}, or a file path")
    return parse_policy((_SHIPPED / f"{name}.yaml").read_text(encoding="utf-8"), origin=f"{name}.yaml (shipped)")


def shipped_names() -> list[str]:
    """What policies come with the package."""
    return sorted(entry.name.removesuffix(".yaml") for entry in _SHIPPED.iterdir() if entry.name.endswith(".yaml"))


def parse_policy(source: str, origin: str) -> Policy:
    """The policy in a YAML text; `origin` names it in errors.

    Raises:
        PolicyError: not YAML, or not a valid policy.
    """
    read = Source(source, origin)
    try:
        return Policy.model_validate(read.data)
    except ValidationError as error:
        errors = error.errors(include_url=False)
        place = _place(errors[0])
        within = [e for e in errors if _place(e)[: len(place)] == place]  # of a value that may have two forms
        first = max(within, key=lambda e: len(_place(e)))
        raise read.error(_place(first), _problem(first)) from error


def _place(error: ErrorDetails) -> tuple[int | str, ...]:
    """Where a refused value stands: never nowhere."""
    loc = error["loc"]
    keys = {0, len(loc) - 1} if error["type"] in _OF_KEYS else {0}  # as they were written, whatever they look like
    return tuple(part for at, part in enumerate(loc) if at in keys or (part not in _TAGS and "[" not in str(part)))


#: What a key stands in → the model whose fields are its known ones.
_SECTIONS: dict[str, type[BaseModel]] = {"stream": StreamRules, "prompt": Rule, "answer": Rule}
#: What pydantic calls the forms a value may have: no part of where it stands.
_TAGS = frozenset(["rule", "stage", "constrained-float", "float"])
_OF_KEYS = frozenset(["extra_forbidden", "missing"])
#: pydantic speaks Python.
_WORDS = re.compile(r"a valid dictionary( or instance of \w+)?")


def _section(model: type[BaseModel], loc: tuple[int | str, ...]) -> type[BaseModel]:
    """The model whose keys stand where ``loc`` ends, within a mapping of ``model``."""
    for part in loc[:-1]:
        field = model.model_fields.get(str(part))
        inner = [kind for kind in get_args(field.annotation) if isinstance(kind, type)] if field else []
        model = next((kind for kind in inner if issubclass(kind, BaseModel)), model)
    return model


def _problem(error: ErrorDetails, model: type[BaseModel] | None = None) -> str:
    """What is wrong, in one line; `model`: whose fields are the known ones, where it is not told by the place."""
    kind, given, context = error["type"], _SHORT.repr(error["input"]), error.get("ctx", {})
    if kind == "extra_forbidden":
        place = _place(error)
        key, section = str(place[-1]), str(place[0]) if len(place) > 1 else ""
        known = (model or _SECTIONS.get(section, Policy)).model_fields
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
