"""The planner's problem in small numbers: kinds of devices, nodes, jobs, and how many devices each job takes where.

Sizes are exact bytes (sizing.demand); nothing here decides anything. A *bin* is where replicas stand side by side: a
partitioned card (capacity: its partitions), or the whole cards of one hive of a node (capacity: the cards).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

from aim_profile.gpus.modes import DeviceMode
from aim_profile.nodes.facts import CPU
from aim_profile.plans.plan import PRIORITIES
from aim_profile.plans.workload import Workload

# Objective levels of placing: each priority, first what serves, then what fills the gaps.
LEVELS = 2 * len(PRIORITIES)


Selector = tuple[tuple[str, str], ...]
# Nodes to switch: the mode of each card.
Modes = dict[int, tuple[str, ...]]


class DeviceKind(NamedTuple):
    """Devices that are alike: one mode of one accelerator with one size, on nodes that the same selectors choose.

    gpu: `cpu` for the CPU sets of nodes without one. partitions: devices per card; selected: the node selectors (sorted
    label pairs) that choose these nodes.
    """

    number: int
    gpu: str
    mode: DeviceMode
    partitions: int
    device_bytes: int
    selected: frozenset[Selector]

    @property
    def whole(self) -> bool:
        """Whether a device is a whole card."""
        return self.partitions == 1

    @property
    def is_cpu(self) -> bool:
        """Whether a device is a CPU set: one model runs on one."""
        return self.gpu == CPU


class Option(NamedTuple):
    """How a job runs on one kind: devices per replica, bytes needed and allowed on each."""

    devices: int
    need: int
    budget: int


class PlanCard(NamedTuple):
    """One card. number: its index on the node; kinds: by mode label; as_found: the kind it is in, -1: unusable so."""

    number: int
    hive: int
    current: str | None
    kinds: Mapping[str, int]
    as_found: int


class PlanNode(NamedTuple):
    """One node. labels: modes every card can take; alike: nodes of one number are interchangeable."""

    number: int
    name: str
    cards: tuple[PlanCard, ...]
    labels: tuple[str, ...]
    alike: int


class Form(NamedTuple):
    """Which of its fallbacks a job is in: the number, counted from 1, and what it changes: `precision fp8`."""

    number: int
    changes: str


@dataclass(frozen=True, eq=False)
class Job:
    """One workload. own_level: where it counts; level: when it is placed (that of its most urgent dependent).

    options: by kind index; avoided: more of them, which span several partitions of a card, though nobody proved that
    (PartitionMode.unproven), one device of another kind holds it, and nobody asked; shape: equal for jobs that take the
    same everywhere; rank: targets of an affinity before those who depend on them; limit: bytes it takes of a
    shared device, None: it has its devices alone; size: the least share of a card that a replica takes; fallbacks: the
    same job in the forms that the workload falls back to, in their order; form: None where it is as asked.
    """

    index: int
    workload: Workload
    options: dict[int, Option]
    avoided: dict[int, Option]
    own_level: int
    level: int
    rank: int
    shape: int
    pin: tuple[int, int | None, int | None] | None
    affinity: tuple[int, ...]
    anti_affinity: tuple[int, ...]
    limit: int | None
    size: float
    fallbacks: tuple[Job, ...] = ()
    form: Form | None = None

    @cached_property
    def constrained(self) -> bool:
        """Whether it matters which node or card it gets."""
        apart = self.workload.spread is not None and self.workload.replicas > 1
        return bool(self.pin or self.affinity or self.anti_affinity or apart)


class Running(NamedTuple):
    """A replica that runs now: its job, number, node and (card position, partition) devices."""

    job: int
    replica: int
    node: int
    devices: tuple[tuple[int, int], ...]
    fixed: bool


class Occupied(NamedTuple):
    """(card position, partition) devices of a node, in its mode as found, that are taken by what is no job here."""

    node: int
    devices: tuple[tuple[int, int], ...]


@dataclass(frozen=True, eq=False)
class Problem:
    """Everything a planner needs. jobs and nodes are in order of their names; occupied: what nobody gets."""

    kinds: tuple[DeviceKind, ...]
    nodes: tuple[PlanNode, ...]
    jobs: tuple[Job, ...]
    running: tuple[Running, ...]
    mixed: bool
    effort: int
    occupied: tuple[Occupied, ...] = ()

    @cached_property
    def replicas(self) -> int:
        """Replicas of all jobs."""
        return sum(job.workload.replicas for job in self.jobs)


def with_avoided(problem: Problem) -> Problem:
    """The problem in which replicas may also run as they should avoid."""
    wide: dict[tuple[int, int], tuple[dict[int, Option], float]] = {}
    jobs = []
    for job in problem.jobs:
        # Jobs that ask the same share their options.
        key = (id(job.options), id(job.avoided))
        if job.avoided and key not in wide:
            options = dict(sorted((job.options | job.avoided).items()))
            wide[key] = (options, least_share(options, problem.kinds))
        jobs.append(_wider(job, *wide[key]) if job.avoided else job)
    return replace(problem, jobs=tuple(jobs))


def _wider(job: Job, options: dict[int, Option], size: float) -> Job:
    return replace(job, options=options, size=size)


def least_share(options: Mapping[int, Option], kinds: Sequence[DeviceKind]) -> float:
    """The least share of a card (or number of cards) that a replica takes; 0 where nothing holds it."""
    return min((option.devices / kinds[at].partitions for at, option in options.items()), default=0.0)


def selector(workload: Workload) -> Selector:
    """The node labels a workload asks for, in order."""
    return tuple(sorted(workload.node_selector.items()))
