"""What an assignment is: an engine, its model, its devices and how it is started there; or why there is none."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, JsonValue, TypeAdapter, ValidationError

from aim_kserve.errors import StartupError
from aim_profile.errors import AimProfileError
from aim_profile.models.facts import ModelFacts
from aim_profile.nodes.facts import Node
from aim_profile.serving.evidence_files import Evidence
from aim_profile.serving.profile import Profile
from aim_profile.serving.selection import Candidate
from aim_profile.sizing.fit import Sizing
from aim_runtime.settings import RuntimeSettings


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


#: (card, partition) of a device.
At = tuple[int, int]


class Device(_Frozen):
    """One device as the engine will see it. memory_mib: what it reports; None: not readable here."""

    card: int
    partition: int
    memory_mib: int | None = None
    compute_units: int | None = None
    render_minor: int | None = None

    @property
    def at(self) -> At:
        """(card, partition)."""
        return (self.card, self.partition)


class Basis(_Frozen):
    """What the figures rest on.

    gpu: its name in the catalogue; mode: `CPX/NPS4`, or `CPU`; tier: what AMD says of the mode; measured: somebody ran
    this profile and kept figures; unproven: it spans partitions by tensor parallelism (vllm#20125), so its text is
    looked at before it is ready: figures say how fast it answers, not what.
    """

    node: str
    gpu: str | None = None
    mode: str | None = None
    tier: str | None = None
    measured: bool = False
    unproven: bool = False
    notes: tuple[str, ...] = ()


class Assignment(_Frozen):
    """Everything an engine is started with.

    engine_args: the engine's own flags, by their dashed names; env: the child's environment beyond what it inherits;
    cpus, memory_bytes: what its process may use, None: all there is; fit: the sum that says it fits (aim_profile's
    Fit), empty where nothing could be sized.
    """

    engine: str
    model: str
    replica: int = 0
    model_dir: Path
    devices: tuple[Device, ...] = ()
    engine_args: Mapping[str, JsonValue] = Field(default_factory=dict)
    env: Mapping[str, str] = Field(default_factory=dict)
    cpus: tuple[int, ...] | None = None
    memory_bytes: int | None = None
    fit: Mapping[str, JsonValue] = Field(default_factory=dict)
    profile: str | None = None
    evidence: Basis


class Case(NamedTuple):
    """What is asked for and what is here.

    given: the profile that somebody named; stored: those to select from where none is named; taken: the devices that
    others have; bound: the only ones it may have, None: any; evidence: figures that a profile may turn out to have.
    """

    settings: RuntimeSettings
    engine: str
    node: Node
    model: ModelFacts
    given: Profile | None = None
    stored: Sequence[Candidate] = ()
    in_pod: bool = False
    taken: frozenset[At] = frozenset()
    bound: frozenset[At] | None = None
    evidence: Evidence | None = None

    def may_have(self, at: At) -> bool:
        """Whether that device is free for it."""
        return at not in self.taken and (self.bound is None or at in self.bound)


def narrowed(settings: RuntimeSettings, who: str, said: Mapping[str, object]) -> RuntimeSettings:
    """The settings with what `who` says, by the fields' names.

    Raises:
        Refused: they say something else, or it is nothing that a setting can be: somebody wrote it by hand.
    """
    for name, value in said.items():
        before = getattr(settings, name)
        if before not in (None, value):
            field = name.replace("_", "-")
            raise Refused(
                f"{who} says {field} {value}, the settings say {before}",
                field=field,
                value=before,
                remedy="set one of them",
            )
    checked = {name: _checked(settings, who, name, value) for name, value in said.items()}
    return settings.model_copy(update=checked)


def _checked(settings: RuntimeSettings, who: str, name: str, value: object) -> object:
    """The value as that setting has it. Raises Refused."""
    if value is None:
        return None
    field = type(settings).model_fields[name]
    kind: TypeAdapter[Any] = TypeAdapter(Annotated[field.annotation, *field.metadata])  # type: ignore[arg-type]
    try:
        return kind.validate_python(value)
    except ValidationError as error:
        why = error.errors()[0]["msg"].removeprefix("Value error, ")
        said = name.replace("_", "-")
        raise Refused(f"{who} says {said} {value}: {why}", field=said, value=value, remedy="correct it there") from None


#: What aim_profile calls a part of a request, and which setting asks for it.
_SETTINGS = {
    "context": "max-model-len",
    "concurrency": "max-concurrency",
    "tp": "partition-count",
    "memory_limit": "memory-limit",
}


class Refused(StartupError):
    """This model is not started here. One line: field, value and remedy; by how much it misses, and what would fit.

    field: the setting by its annotation's name, or what was read; shortfall_gib: per device, None where memory is not
    what is missing; would_fit: the nearest options, sized with the same formulas.
    """

    def __init__(
        self,
        problem: str,
        *,
        field: str,
        value: object = None,
        remedy: str = "",
        shortfall_gib: float | None = None,
        would_fit: Sequence[str] = (),
    ) -> None:
        self.problem, self.field, self.value, self.remedy = problem, field, value, remedy
        self.shortfall_gib, self.would_fit = shortfall_gib, tuple(would_fit)
        super().__init__(f"{problem}; {remedy}" if remedy else problem)

    @classmethod
    def because(cls, error: AimProfileError) -> Refused:
        """The same, of what aim_profile said, by the name of the setting that asks for it."""
        field = _SETTINGS.get(error.field, error.field)
        return cls(error.problem, field=field, value=error.value, remedy=error.remedy)

    def of(self, who: str) -> Refused:
        """The same, of one of several."""
        more = {"shortfall_gib": self.shortfall_gib, "would_fit": self.would_fit}
        said = f"{who}: {self.problem}"
        return Refused(said, field=self.field, value=self.value, remedy=self.remedy, **more)  # type: ignore[arg-type]

    def as_json(self) -> dict[str, Any]:
        """For ``--dry_run -o json``."""
        value = self.value if isinstance(self.value, str | int | float | bool | None) else str(self.value)
        return {
            "field": self.field,
            "value": value,
            "problem": self.problem,
            "remedy": self.remedy,
            "shortfall_gib": self.shortfall_gib,
            "would_fit": list(self.would_fit),
        }


_MOST_OPTIONS = 3


def does_not_fit(model: ModelFacts, reason: str, sized: Sizing, shortfall_gib: float | None = None) -> Refused:
    """The refusal of a model that is too large, with the nearest options of `sized`. shortfall_gib: `sized`'s."""
    options = tuple(option.description for option in sized.alternatives)
    would = f"what would fit: {'; '.join(options[:_MOST_OPTIONS])}" if options else "see `aim-profile fit`"
    return Refused(
        f"{model.id} does not fit: {reason}",
        field="model",
        value=model.id,
        remedy=would,
        shortfall_gib=sized.shortfall_gib if shortfall_gib is None else shortfall_gib,
        would_fit=options,
    )


def notes_of(notes: Iterable[str]) -> tuple[str, ...]:
    """Each note that says something, once."""
    return tuple(dict.fromkeys(note for note in notes if note))
