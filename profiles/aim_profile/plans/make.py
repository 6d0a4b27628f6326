"""make_plan: a fleet and workloads become a Plan, with a reason for each device and for each refusal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from aim_profile.plans.search.bins import Bin, Held
from aim_profile.plans.search.bound import cards_bound
from aim_profile.plans.search.fallbacks import fall_back
from aim_profile.plans.search.heuristic import solve
from aim_profile.plans.search.intake import make_problem
from aim_profile.plans.search.problem import DeviceKind, Job, Option, Problem
from aim_profile.plans.search.state import State
from aim_profile.serving.evidence import Measurement
from aim_profile.units import GIB, gib

from .fleet import Fleet
from .plan import PRIORITIES, CardPlan, DerivedReplicas, Placement, Plan, PlanOptions, Totals
from .refusal import explain
from .workload import Workloads


def make_plan(
    fleet: Fleet,
    workloads: Workloads,
    options: PlanOptions | None = None,
    current: Plan | Sequence[Placement] = (),
    measurements: Sequence[Measurement] = (),
) -> Plan:
    """The best plan found (options.exact: proven best, needs the extra `exact`).

    current: what runs now, as a plan or its placements; running replicas stay where they are unless
    options.allow_eviction lets those that may be evicted go. measurements: by which replicas follow from loads. The
    order of nodes and workloads never matters.
    Raises WorkloadError naming the workload whose model, node or numbers cannot be used; replicas that do not fit
    are not an error but in Plan.unplaced.
    """
    options = options or PlanOptions()
    placements = tuple(current.placements if isinstance(current, Plan) else current)
    workloads, derived = without_loads(fleet, workloads, options, measurements)
    problem = make_problem(fleet, workloads, options, placements)
    proven = False
    if options.exact:
        from aim_profile.plans.search.exact import (
            solve_exactly,  # OR-Tools is an optional extra and takes long to import
        )

        state, proven = solve_exactly(problem, options.exact_time_limit_s)
    else:
        state = solve(problem)
    state = fall_back(state)
    proven = proven and not any(job.form for job in state.problem.jobs)  # no form but the first was looked at
    _balance(state)
    made = Writer(fleet, state.problem, state, options, placements).plan(proven)
    return made.model_copy(update={"derived": derived}) if derived else made


def without_loads(
    fleet: Fleet, workloads: Workloads, options: PlanOptions, measurements: Sequence[Measurement]
) -> tuple[Workloads, tuple[DerivedReplicas, ...]]:
    """Replicas in place of loads, and how each came about."""
    if all(workload.load is None for workload in workloads.workloads):
        return workloads, ()
    from aim_profile.serving.capacity import Evidenced  # they read catalogues that few plans need

    from .replicas import Loads

    return Loads(fleet, options, Evidenced(measurements)).resolve(workloads)


# One for all placements: a set of its own for each is a third of a large plan's memory.
_EVERY_FIELD = set(Placement.model_fields)


def _balance(state: State) -> None:
    """Of replicas that could swap places the one that needs most gets the largest device: the least headroom grows."""
    groups: dict[tuple[int, int, int], list[tuple[Bin, Held]]] = {}
    for bin_ in state.bins:
        for held in bin_.held if bin_.alive else ():
            job = held.job
            if not (job.constrained or job.rank or held.shared or held.replica is not None):
                key = (job.shape, len(held.slots), bin_.kind.partitions)
                groups.setdefault(key, []).append((bin_, held))
    for group in groups.values():
        if len({bin_.kind.device_bytes for bin_, _ in group}) > 1:
            jobs = sorted((held.job for _, held in group), key=_most_needed, reverse=True)
            places = sorted(group, key=lambda place: (-place[0].kind.device_bytes, place[0].id))
            for (_, held), job in zip(places, jobs, strict=True):
                held.job = job


def _most_needed(job: Job) -> tuple[int, int]:
    return max(option.need for option in job.options.values()), -job.index


class Writer:
    """Writes a state down as a Plan."""

    def __init__(
        self, fleet: Fleet, problem: Problem, state: State, options: PlanOptions, before: tuple[Placement, ...]
    ) -> None:
        self.fleet, self.problem, self.state, self.options = fleet, problem, state, options
        self.before = {placement.id: placement for placement in before}

    def plan(self, proven: bool) -> Plan:
        placements = self.placements()
        unplaced = explain(self.problem, self.state, self.fleet, placements, self.before)
        return Plan(
            tier=self.options.tier,
            allow_mixed_compute=self.options.allow_mixed_compute,
            cards=self.cards(),
            placements=tuple(placements),
            unplaced=unplaced,
            totals=self.totals(placements, proven),
            notes=self.notes(placements),
        )

    def cards(self) -> tuple[CardPlan, ...]:
        """Each card and its mode."""
        found = []
        for node, planned in zip(self.fleet.nodes, self.problem.nodes, strict=True):
            labels = self.state.label[planned.number] if self.state.touched[planned.number] else None
            for at, card in enumerate(node.cards):
                label = labels[at] if labels else card.current
                mode = card.mode(label)
                found.append(
                    CardPlan.model_construct(
                        node=node.name,
                        card=card.index,
                        gpu=node.gpu,
                        deployment=node.deployment,
                        mode=label,
                        was=card.current,
                        tier=mode.tier if mode else "unsupported",
                        partitions=mode.partitions if mode else 0,
                        device_memory_mib=mode.memory_mib if mode else 0,
                    )
                )
        return tuple(found)

    def placements(self) -> list[Placement]:
        """Each replica and its devices."""
        by_job: dict[int, list[tuple[int, tuple[tuple[int, int], ...], Bin, Held]]] = {}
        for bin_ in self.state.bins:
            for held in bin_.held if bin_.alive else ():
                devices = tuple(sorted(bin_.device(slot) for slot in held.slots))
                by_job.setdefault(held.job.index, []).append((bin_.node, devices, bin_, held))
        opened: set[tuple[int, int]] = set()
        written = []
        for index in sorted(by_job):
            places = sorted(by_job[index], key=lambda place: place[:2])
            for replica, (node, devices, bin_, held) in sorted(_numbered(places), key=lambda pair: pair[0]):
                written.append(self._placement(held, bin_, replica, node, devices, opened))
        return written

    def _placement(
        self,
        held: Held,
        bin_: Bin,
        replica: int,
        node: int,
        devices: tuple[tuple[int, int], ...],
        opened: set[tuple[int, int]],
    ) -> Placement:
        job, kind = held.job, bin_.kind
        workload, option = job.workload, job.options[kind.number]
        cards = self.problem.nodes[node].cards
        positions = tuple(dict.fromkeys(card for card, _ in devices))
        opened.update((node, card) for card in positions)
        return Placement.model_construct(
            _fields_set=_EVERY_FIELD,
            workload=workload.name,
            replica=replica,
            kind=workload.kind,
            priority=workload.priority,
            slo=workload.tuned_for,
            model=workload.sized_by,
            precision=workload.precision,
            context=workload.context,
            concurrency=workload.concurrency,
            node=self.problem.nodes[node].name,
            cards=tuple(cards[card].number for card in positions),
            partitions=tuple(partition for _, partition in devices) if len(positions) == 1 else (0,),
            mode=kind.mode.label,
            tp=option.devices,
            need_gib=gib(option.need),
            budget_gib=gib(option.budget),
            headroom_gib=gib(option.budget - option.need),
            memory_limit_gib=None if job.limit is None else gib(job.limit),
            running=held.replica is not None,
            fallback=job.form.number if job.form else 0,
            reason=_reason(job, option, bin_, held, self.state),
        )

    def totals(self, placements: list[Placement], proven: bool) -> Totals:
        """The plan in figures."""
        asked: Counter[str] = Counter()
        for job in self.problem.jobs:
            asked[job.workload.priority] += job.workload.replicas
        placed = Counter(placement.priority for placement in placements)
        drained, switched = self.state.changes()
        bound = cards_bound(self.state)
        now = {placement.id: placement for placement in placements}
        replicas = {job.workload.name: job.workload.replicas for job in self.problem.jobs}
        wanted = {name for name, run in self.before.items() if run.replica < replicas.get(run.workload, 0)}
        return Totals(
            asked={priority: asked[priority] for priority in PRIORITIES},
            placed={priority: placed[priority] for priority in PRIORITIES},
            cards=sum(len(node.cards) for node in self.problem.nodes),
            cards_used=self.state.cards_used,
            nodes_drained=drained,
            cards_switched=switched,
            moved=sum(1 for name in wanted if name in now and not _same_place(self.before[name], now[name])),
            evicted=sum(1 for name in wanted if name not in now),
            bound=bound,
            gap=round((self.state.cards_used - bound) / bound, 4) if bound else 0.0,
            method="exact" if self.options.exact else "heuristic",
            proven=proven,
        )

    def notes(self, placements: list[Placement]) -> tuple[str, ...]:
        """What people should know of the plan beside its figures."""
        notes = []
        if self.fleet.set_aside:
            notes.append(f"set aside: {_some([f'{name}: {reason}' for name, reason in self.fleet.set_aside], '; ')}")
        unknown = [node.name for node in self.fleet.nodes if node.deployment == "unknown" and not node.is_cpu]
        if unknown:
            notes.append(
                f"deployment unknown, modes used as found: {_some(unknown)}; say deployment: in the fleet file"
            )
        guests = [node.name for node in self.fleet.nodes if node.deployment == "sr-iov"]
        if guests:
            notes.append(f"SR-IOV guests, modes used as found, their hosts decide them: {_some(guests)}")
        if below := self._below_tier(placements):
            notes.append(
                f"running in modes below tier {self.options.tier}, so moved whatever their priority: {_some(below)}; "
                "plan with the tier of their modes to keep them"
            )
        fallen = [f"{job.workload.name} ({job.form.changes})" for job in self.problem.jobs if job.form]
        if fallen:
            notes.append(f"in a fallback, for as asked not all of it has a device: {_some(fallen)}")
        spanning = dict.fromkeys(run.workload for run in placements if run.tp > 1 and len(run.cards) == 1)
        if spanning:
            notes.append(
                f"tensor parallelism over partitions is unproven (vllm#20125), whatever the modes' tier: "
                f"{_some(list(spanning))}; read their answers before anybody relies on them"
            )
        if not self.options.allow_mixed_compute:
            mixed = [node.name for node in self.fleet.nodes if len({card.current for card in node.cards}) > 1]
            if mixed:
                notes.append(f"cards of one node in different modes: {_some(mixed)}; used only once made alike")
        return tuple(notes)

    def _below_tier(self, placements: list[Placement]) -> list[str]:
        """Running replicas that stay nowhere, because their cards' modes are not of the tier asked for."""
        cards = {(node.name, card.index): (node, card) for node in self.fleet.nodes for card in node.cards}
        kept = {placement.id for placement in placements if placement.running}
        found = []
        for run in self.before.values():
            node, card = cards.get((run.node, run.cards[0]), (None, None))
            if node is None or card is None or run.id in kept or card.current != run.mode:
                continue
            if all(mode.label != run.mode for mode in card.allowed(self.options.tier, node.switchable)):
                found.append(f"{run.id} in {run.mode}")
        return found


def _some(names: list[str], between: str = ", ") -> str:
    return between.join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _numbered(
    places: list[tuple[int, tuple[tuple[int, int], ...], Bin, Held]],
) -> list[tuple[int, tuple[int, tuple[tuple[int, int], ...], Bin, Held]]]:
    """Running replicas keep their numbers; the others take the lowest free ones, in the order of their places."""
    kept = {place[3].replica for place in places if place[3].replica is not None}
    free = (number for number in range(2 * len(places) + len(kept)) if number not in kept)
    return [(next(free) if place[3].replica is None else place[3].replica, place) for place in places]


def _same_place(one: Placement, other: Placement) -> bool:
    return (one.node, one.devices, one.mode) == (other.node, other.devices, other.mode)


def _what_it_takes(option: Option, kind: DeviceKind) -> str:
    if kind.is_cpu:
        return "a CPU set"
    if kind.whole:
        return "a whole card" if option.devices == 1 else f"{option.devices} whole cards of one hive"
    return f"{option.devices} of the card's {kind.partitions} partitions"


def _reason(job: Job, option: Option, bin_: Bin, held: Held, state: State) -> str:
    """Why here, in one line: what it takes, why so many, and what bound it to this place."""
    kind, workload = bin_.kind, job.workload
    size = f"{kind.device_bytes / GIB:.1f} GiB"
    what = _what_it_takes(option, kind)
    parts = [f"{what} ({size} each)" if option.devices > 1 else f"{what} ({size})"]
    if option.devices > 1:
        given = workload.tp is not None
        parts.append("tensor parallel as asked" if given else "the fewest that hold it, by tensor parallelism")
        parts += ["which is unproven over partitions"] if kind.mode.unproven(option.devices) else []
    if job.form is not None:
        parts.append(f"in its fallback, {job.form.changes}")
    if held.replica is not None:
        parts.append("it runs here now")
    elif job.pin is not None:
        parts.append(f"pinned to {workload.pinned}")
    if workload.affinity:
        parts.append(f"beside {', '.join(workload.affinity)}")
    if workload.spread:
        parts.append(f"its replicas on different {workload.spread}s")
    if job.limit is not None:
        parts.append(f"shares the device within {workload.memory_limit}")
    elif workload.priority == "high":
        parts.append("the device is its own")
    cards = state.problem.nodes[bin_.node].cards
    was = cards[bin_.cards[0]].current
    if was != kind.mode.label:
        parts.append(f"after switching the card from {was or 'an unknown mode'}")
    return "; ".join(parts)
