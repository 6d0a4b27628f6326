"""Plan: which mode each card is in, which device each replica gets, what is left over, and why.

`make_plan` (make.py) makes it; `plan_diff` and `plan_assert` (compare.py) compare it; `plan_steps` (steps.py) lays out
the way there, and `apply_steps` (walk.py) goes it.

A plan is judged by these figures, each only where the ones before are equal (the planner's objective):

1. replicas placed: high priority, then medium, then low; of one priority first those that serve, then the
   guardrails and fine-tuning jobs, which fill the gaps;
2. replicas over several partitions of a card (unproven) that one device of another mode or product holds;
3. nodes drained for another memory mode (NPS), then cards switched to another compute mode;
4. cards used;
5. balanced headroom: of equal devices the largest need gets the largest device.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from aim_profile.errors import AimProfileError
from aim_profile.files.place import MisplacedError
from aim_profile.files.read import Parsed, check_as, parsed, read_parsed
from aim_profile.files.write import dump
from aim_profile.gpus.catalog import Compute, Deployment, Memory, Tier, by_name, can_switch, parse_partition
from aim_profile.nodes.facts import CPU, CPU_MODE
from aim_profile.sizing.fit import CONTEXT_CEILING_TOKENS

from .workload import Kind, Priority, Slo

Gib = Annotated[float, Field(ge=0, allow_inf_nan=False)]
PRIORITIES: tuple[Priority, ...] = ("high", "medium", "low")


class PlanError(AimProfileError):
    """A plan file that cannot be used, or a request that no planner could answer."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class PlanOptions(_Frozen):
    """How to plan. tier: the least a mode must be; allow_mixed_compute: cards of one node in different compute modes;

    allow_eviction: running replicas that may be evicted (low priority unless they say otherwise) move or stop for
    others; without it every running replica stays where it is. exact: OR-Tools' CP-SAT instead of the heuristic;
    exact_time_limit_s: for each level of the objective. effort: how much the heuristic tries to improve on its
    first answer, in placements examined. accept_bound: derive replicas from a bound where there is nothing better.
    """

    tier: Tier = "validated"
    allow_mixed_compute: bool = False
    allow_eviction: bool = False
    exact: bool = False
    exact_time_limit_s: float = Field(default=10.0, gt=0)
    effort: int = Field(default=30_000, ge=0)
    accept_bound: bool = False


class CardPlan(_Frozen):
    """One card. mode: `CPX/NPS4` as planned, None where it is not known and nothing is placed; was: as found.

    partitions: devices it shows in `mode`; device_memory_mib: of the smallest of them.
    """

    node: str
    card: int = Field(ge=0)
    gpu: str
    deployment: Deployment | Literal["unknown"] = "unknown"
    mode: str | None
    was: str | None
    tier: Tier = "unsupported"
    partitions: int = Field(default=0, ge=0)
    device_memory_mib: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _cpus_have_their_own_mode(self) -> Self:
        if self.mode is not None and (self.gpu == CPU) != (self.mode == CPU_MODE):
            raise ValueError(f"mode {self.mode} is none of {self.gpu}: {CPU_MODE} is that of {CPU}, and its only one")
        return self

    @property
    def switchable(self) -> bool:
        """Whether its node can put it into another mode."""
        return self.gpu != CPU and can_switch(self.deployment) and by_name(self.gpu).partitionable

    @property
    def compute(self) -> Compute | None:
        """Compute mode as planned."""
        return None if self.mode in (None, CPU_MODE) else parse_partition(str(self.mode))[0]

    @property
    def memory(self) -> Memory | None:
        """Memory mode as planned."""
        return None if self.mode in (None, CPU_MODE) else parse_partition(str(self.mode))[1]

    @property
    def changes_memory(self) -> bool:
        """Whether the plan changes its memory mode, which drains the node."""
        return self.mode != self.was and (self.was is None or parse_partition(self.was)[1] != self.memory)


class Placement(_Frozen):
    """One replica and its devices: partitions of one card (several: tensor parallel over siblings), or partition 0
    of each of several whole cards. GiB are per device: need of budget, headroom left. memory_limit_gib: set where
    the device is shared. running: it was there before; fallback: 0 as asked, else the number of the workload's fallback
    that it takes, counted from 1; reason: why here.
    """

    workload: str
    replica: int = Field(ge=0)
    kind: Kind = "serve"
    priority: Priority = "medium"
    slo: Slo = "throughput"
    model: str | None = None
    precision: str | None = None
    context: int = Field(ge=1, le=CONTEXT_CEILING_TOKENS)
    concurrency: int = Field(ge=1)
    node: str
    cards: tuple[int, ...] = Field(min_length=1)
    partitions: tuple[int, ...] = Field(min_length=1)
    mode: str
    tp: int = Field(ge=1)
    need_gib: Gib
    budget_gib: Gib
    headroom_gib: float = Field(allow_inf_nan=False)
    memory_limit_gib: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    running: bool = False
    fallback: int = Field(default=0, ge=0)
    reason: str = ""

    @model_validator(mode="after")
    def _each_device_once(self) -> Self:
        if len(set(self.devices)) < len(self.devices) or len(self.devices) != self.tp:
            raise ValueError(f"cards {self.cards}, partitions {self.partitions} are not {self.tp} devices, each once")
        return self

    @property
    def id(self) -> str:
        """`chat/0`: workload and replica."""
        return f"{self.workload}/{self.replica}"

    @property
    def resource(self) -> str:
        """The device plugin's resource name under the mixed strategy: `amd.com/cpx_nps4`; `cpu` for a CPU set."""
        return "cpu" if self.mode == CPU_MODE else "amd.com/" + self.mode.lower().replace("/", "_")

    @property
    def devices(self) -> tuple[tuple[int, int], ...]:
        """(card, partition) of each device."""
        if len(self.cards) > 1:
            return tuple((card, 0) for card in self.cards)
        return tuple((self.cards[0], partition) for partition in self.partitions)


# What a replica is started with: where one of these changes, it starts anew even where it stays.
_STARTED_WITH = ("model", "precision", "context", "concurrency", "slo", "memory_limit_gib")


def changes_at_start(was: Placement, now: Placement) -> tuple[str, ...]:
    """What the replica must start anew for: `context 8192 → 4096`; empty where it runs on as it is."""
    pairs = ((name, getattr(was, name), getattr(now, name)) for name in _STARTED_WITH)
    return tuple(f"{name} {before} → {after}" for name, before, after in pairs if before != after)


class Unplaced(_Frozen):
    """Replicas of one workload without a device. cause: too-large (no device of the fleet holds it), no-room (one
    would, all are taken), constraint (a pin, an affinity or a spread leaves nowhere).

    shortfall_gib: on the device that comes closest, per device; None where memory is not what is missing.
    evicted: how many of them were running.
    """

    workload: str
    replicas: tuple[int, ...] = Field(min_length=1)
    priority: Priority
    kind: Kind = "serve"
    cause: Literal["too-large", "no-room", "constraint"]
    reason: str
    shortfall_gib: float | None = None
    remedies: tuple[str, ...] = ()
    evicted: int = 0


class DerivedReplicas(_Frozen):
    """How a workload's replicas follow from its load. requests_per_s_each: what a replica serves on `device`, an engine
    over tp of them with `concurrency` sequences at once, at the cautious end of what is known; evidence: whose.
    """

    workload: str
    requests_per_s: float
    replicas: int
    requests_per_s_each: float
    concurrency: int
    device: str
    tp: int
    basis: Literal["measured", "estimate", "bound"]
    evidence: tuple[str, ...] = ()
    reason: str


class Totals(_Frozen):
    """The plan in figures. placed, asked: replicas by priority; nodes_drained: for another memory mode;

    cards_switched: to another compute mode; bound: no plan that places the same replicas with no more mode changes
    (and, where this one has none, without unproven replicas) uses fewer cards; gap: (cards_used - bound) / bound.
    proven: by the exact solver, all levels of the objective.
    moved, evicted: running replicas now elsewhere, or nowhere.
    """

    asked: Mapping[Priority, int]
    placed: Mapping[Priority, int]
    cards: int
    cards_used: int
    nodes_drained: int
    cards_switched: int
    moved: int = 0
    evicted: int = 0
    bound: int
    gap: float
    method: Literal["heuristic", "exact", "observed"]
    proven: bool = False


class Plan(_Frozen):
    """A plan, in the order of nodes, cards, workloads and replicas. Two plans of the same input are equal.

    One that was read does not contradict itself: cards and replicas are named once, and each replica stands on devices
    that its cards have in their mode, alone or with others that have a limit too.
    """

    version: Literal[1] = 1
    tier: Tier = "validated"
    allow_mixed_compute: bool = False
    cards: tuple[CardPlan, ...]
    placements: tuple[Placement, ...]
    unplaced: tuple[Unplaced, ...] = ()
    totals: Totals
    derived: tuple[DerivedReplicas, ...] = ()
    notes: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> Self:
        cards: dict[tuple[str, int], CardPlan] = {}
        for at, card in enumerate(self.cards):
            if cards.setdefault((card.node, card.card), card) is not card:
                raise MisplacedError(("cards", at), f"{card.node} card {card.card} is listed twice")
        holders: dict[tuple[str, int, int], Placement] = {}
        names: set[str] = set()
        for at, run in enumerate(self.placements):
            if problem := _contradiction(run, cards, holders, names):
                raise MisplacedError(("placements", at), f"{run.id}: {problem}")
        return self

    @cached_property
    def by_device(self) -> Mapping[tuple[str, int, int], tuple[Placement, ...]]:
        """Who stands on each (node, card, partition); several where they share it."""
        found: dict[tuple[str, int, int], tuple[Placement, ...]] = {}
        for placement in self.placements:
            for device in placement.devices:
                key = (placement.node, *device)
                found[key] = (*found.get(key, ()), placement)
        return found

    @property
    def complete(self) -> bool:
        """Whether every replica has its device."""
        return not self.unplaced

    def on_node(self, node: str) -> tuple[CardPlan, ...]:
        """The cards of that node, empty where the plan does not know it."""
        return tuple(card for card in self.cards if card.node == node)


def _contradiction(
    run: Placement,
    cards: Mapping[tuple[str, int], CardPlan],
    holders: dict[tuple[str, int, int], Placement],
    names: set[str],
) -> str:
    """What is wrong with the next placement; empty where nothing is, and then it counts among holders and names."""
    if run.id in names:
        return "is placed twice"
    names.add(run.id)
    for card, partition in run.devices:
        there = cards.get((run.node, card))
        if there is None:
            return f"stands on {run.node} card {card}, which the plan does not list"
        if there.mode != run.mode or partition >= there.partitions:
            return f"{run.node} card {card} is in {there.mode}, with {there.partitions} devices"
        other = holders.setdefault((run.node, card, partition), run)
        if other is not run and (other.memory_limit_gib is None or run.memory_limit_gib is None):
            return f"{run.node} card {card} partition {partition} is {other.id}'s"
    return ""


def cards_by_node(cards: Iterable[CardPlan]) -> dict[str, list[CardPlan]]:
    """The cards of each node, in their order."""
    found: dict[str, list[CardPlan]] = {}
    for card in cards:
        found.setdefault(card.node, []).append(card)
    return found


def dump_plan(plan: Plan, form: Literal["yaml", "json"] = "yaml") -> str:
    """The plan as a file; `load_plan` gives back an equal one."""
    if form == "json":
        return plan.model_dump_json(indent=2) + "\n"
    return dump(plan.model_dump(mode="json"))


def load_plan(file: Path) -> Plan:
    """A plan from YAML or JSON. Raises PlanError naming the file, the key and the value."""
    return plan_of(read_parsed(file, PlanError))


def parse_plan(text: str, named: str = "plan") -> Plan:
    """The same from text; `named` stands in errors for the file."""
    return plan_of(parsed(text, named, PlanError))


def plan_of(file: Parsed) -> Plan:
    """The same from a file that was parsed to see what it is."""
    return check_as(Plan, file, PlanError, "plan")
