"""Why a replica has no device: what is missing, by how much, and what would make it fit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from math import ceil
from typing import Literal

from aim_profile.errors import SizingError
from aim_profile.gpus.catalog import TIERS, PartitionMode, by_name
from aim_profile.models.load import load_model
from aim_profile.plans.search.jobs import (
    cards_taken,
    device_counts,
    engine_of,
    most_whole_cards,
    need_bytes,
    request_of,
)
from aim_profile.plans.search.problem import DeviceKind, Form, Job, Problem, Selector
from aim_profile.plans.search.state import State
from aim_profile.sizing.alternatives import size_on, size_on_cpus
from aim_profile.sizing.fit import DEFAULT_UTILIZATION, DoesNotFit, budget_bytes
from aim_profile.units import GIB, MIB, parse_memory

from .fleet import Fleet
from .plan import Placement, Unplaced
from .workload import Workload

_MOST_REMEDIES = 4
_MOST_NAMES = 3
# Replicas placed, by device kind, level and priority.
Standing = Counter[tuple[int, int, str]]
Cause = Literal["too-large", "no-room", "constraint"]
# Cause, reason, GiB short on each device, remedies.
_Why = tuple[Cause, str, float | None, tuple[str, ...]]


def explain(
    problem: Problem,
    state: State,
    fleet: Fleet,
    placements: list[Placement],
    before: Mapping[str, Placement],
    beside: Standing | None = None,
) -> tuple[Unplaced, ...]:
    """One entry per workload with replicas left over, in order of priority and name.

    beside: replicas that stand on the fleet and are no jobs of the problem.
    """
    numbers: dict[str, set[int]] = {}
    for placement in placements:
        numbers.setdefault(placement.workload, set()).add(placement.replica)
    short = [job for job in problem.jobs if state.count[job.index] < job.workload.replicas]
    cache: dict[object, _Why] = {}
    standing = _standing(state) + (beside or Counter())

    def why(job: Job, missing: int) -> _Why:
        # Jobs that ask the same share their options.
        key = (id(job.options), job.own_level, missing)
        if job.constrained or key not in cache:
            cache[key] = _why(job, missing, problem, state, fleet, standing)
        return cache[key]

    found = []
    for job in sorted(short, key=lambda job: (job.own_level, job.workload.name)):
        placed = numbers.get(job.workload.name, set())
        missing = tuple(number for number in range(job.workload.replicas) if number not in placed)
        cause, reason, shortfall, remedies = why(job, len(missing))
        forms = {form.form: why(form, job.workload.replicas) for form in job.fallbacks if form.form}
        found.append(
            Unplaced(
                workload=job.workload.name,
                replicas=missing,
                priority=job.workload.priority,
                kind=job.workload.kind,
                cause=cause,
                reason=reason + "".join(_neither(form, found) for form, found in forms.items()),
                shortfall_gib=shortfall,
                remedies=remedies,
                evicted=sum(1 for number in missing if f"{job.workload.name}/{number}" in before),
            )
        )
    return tuple(found)


def _neither(form: Form, why: _Why) -> str:
    """That a fallback did not help either, and why, in few words."""
    cause, reason, shortfall, _ = why
    short = {"too-large": f"lacks {shortfall} GiB on each device", "no-room": "no room either", "constraint": reason}
    return f"; fallback {form.number}, {form.changes}: {short[cause]}"


def _standing(state: State) -> Standing:
    return Counter(
        (bin_.kind.number, held.job.own_level, held.job.workload.priority)
        for bin_ in state.bins
        if bin_.alive
        for held in bin_.held
    )


def _why(job: Job, missing: int, problem: Problem, state: State, fleet: Fleet, standing: Standing) -> _Why:
    if not job.options:
        return _too_large(job.workload, problem, fleet)
    if job.constrained and (blocked := _blocked(job, state)):
        return "constraint", blocked, None, _loosen(job.workload)
    return _no_room(job, missing, problem, standing)


def _too_large(workload: Workload, problem: Problem, fleet: Fleet) -> _Why:
    wanted = tuple(sorted(workload.node_selector.items()))
    kinds = [kind for kind in problem.kinds if wanted in kind.selected]
    if not kinds:
        reason, remedy = _unusable(fleet, wanted)
        return "constraint", reason, None, (remedy,)
    closest: tuple[int, str] | None = None
    most = most_whole_cards(fleet)
    for kind in kinds:
        for devices in device_counts(workload, kind, most[kind.gpu]):
            short = _shortfall(workload, devices, kind)
            if short is not None and (closest is None or short < closest[0]):
                closest = (short, f"{devices} x {kind.gpu} {kind.mode.label}")
    if closest is None:
        return "constraint", f"tensor parallel {workload.tp} is possible on no card of the fleet", None, ()
    if closest[0] <= 0:
        precision = workload.precision or "its own"
        return "constraint", f"no accelerator of the fleet computes in {precision} precision", None, ()
    shortfall = ceil(closest[0] / GIB * 1000) / 1000
    reason = f"no device of the fleet holds it: {closest[1]} comes closest and lacks {shortfall} GiB on each"
    return "too-large", reason, shortfall, _alternatives(workload, problem)


def _unusable(fleet: Fleet, wanted: Selector) -> tuple[str, str]:
    """Why no card of the nodes so labelled gives a device, and what would help."""
    nodes = [node for node in fleet.nodes if set(wanted) <= set(node.labels)]
    if not nodes:
        text = ", ".join(f"{key}={value}" for key, value in wanted)
        return f"no node has the labels {text}", "other labels in node_selector, or such a node"
    if any(node.switchable for node in nodes):
        products = ", ".join(sorted({node.gpu for node in nodes}))
        tiers = {mode.tier for node in nodes for card in node.cards for mode in card.modes}
        best = min(tiers, key=TIERS.index, default="unsupported")
        return f"no mode of {products} is validated", f"allow its modes that are {best}: --tier {best}"
    names = ", ".join(node.name for node in nodes[:_MOST_NAMES]) + ("…" if len(nodes) > _MOST_NAMES else "")
    guests = all(node.deployment == "sr-iov" for node in nodes)
    why = "an SR-IOV guest cannot set it" if guests else "how the node is run is not known"
    return (
        f"the mode of {names}'s cards is not wholly readable, and {why}",
        "describe the node in a fleet file: gpu, cards, deployment, compute_partition and memory_partition",
    )


def _shortfall(workload: Workload, devices: int, kind: DeviceKind) -> int | None:
    """Bytes missing on each of that many devices; None where it cannot be split so."""
    facts = None if workload.sized_by is None else load_model(workload.sized_by)
    need = need_bytes(workload, devices, facts, kind.is_cpu)
    if need is None:
        return None
    budget = budget_bytes(kind.device_bytes, DEFAULT_UTILIZATION)
    if workload.memory_limit is not None:
        limit = parse_memory(workload.memory_limit)
        return max(need - limit, limit - budget)
    return need - budget


def _alternatives(workload: Workload, problem: Problem) -> tuple[str, ...]:
    """The nearest requests and devices that would fit, sized."""
    if workload.training is not None:
        return ("a smaller batch or context, qlora, more workers that shard it (fsdp2), or a device with more memory:",)
    if workload.model is None or workload.memory is not None:
        return ("a device with more memory, or a smaller memory:",)
    largest = max(problem.kinds, key=lambda kind: (not kind.is_cpu, kind.device_bytes))
    model, devices = load_model(workload.model), workload.tp or 1
    try:
        if isinstance(largest.mode, PartitionMode):
            answer = size_on(model, largest.mode, by_name(largest.gpu), request_of(workload, devices))
        else:
            request = request_of(workload, devices, engine_of(model, on_cpu=True))
            answer = size_on_cpus(model, largest.device_bytes, request)
    except SizingError:
        return ()
    if isinstance(answer, DoesNotFit):
        return tuple(option.description for option in answer.alternatives[:_MOST_REMEDIES])
    return ()


def _blocked(job: Job, state: State) -> str:
    """What keeps it from devices that are free, empty where none is free anyway."""
    freed = replace(
        job, pin=None, affinity=(), anti_affinity=(), workload=job.workload.model_copy(update={"spread": None})
    )
    if state.find(freed) is None and job.pin is None:
        return ""
    workload = job.workload
    if workload.pinned is not None:
        return f"pinned to {workload.pinned}, where nothing that holds it is free"
    named = [
        *(f"affinity to {', '.join(workload.affinity)}" for _ in workload.affinity[:1]),
        *(f"anti_affinity to {', '.join(workload.anti_affinity)}" for _ in workload.anti_affinity[:1]),
        *(f"spread over {workload.spread}s" for _ in range(workload.spread is not None)),
    ]
    others = "" if named else "the anti_affinity of another workload"
    return f"{' and '.join(named) or others}: devices that would hold it are free, none where it may stand"


def _loosen(workload: Workload) -> tuple[str, ...]:
    if workload.pinned is not None:
        return ("pin it elsewhere, or leave pinned out",)
    if workload.spread is not None:
        return (f"fewer replicas, more {workload.spread}s, or leave spread out",)
    return ("leave the affinity out, or make room on the nodes it names",)


def _no_room(job: Job, missing: int, problem: Problem, standing: Standing) -> _Why:
    kind_number, option = min(
        job.options.items(), key=lambda item: (cards_taken(item[1], problem.kinds[item[0]]), item[0])
    )
    kind = problem.kinds[kind_number]
    cards = ceil(missing * cards_taken(option, kind) - 1e-9)
    devices = f"{option.devices} devices" if option.devices > 1 else "one device"
    where = "of the CPU sets" if kind.is_cpu else f"of {kind.gpu} {kind.mode.label}"
    reason = f"every device that holds it is taken: a replica takes {devices} {where}"
    added = f"{cards} {kind.gpu} card{'s' if cards > 1 else ''} in {kind.mode.label}"
    if kind.is_cpu:
        added = f"{missing} CPU set{'s' if missing > 1 else ''} of {ceil(kind.device_bytes / MIB)} MiB"
    remedies = [f"add {added}"]
    below: Counter[str] = Counter()
    for (number, level, priority), count in standing.items():
        if number in job.options and level > job.own_level:
            below[priority] += count
    if below:
        text = ", ".join(f"{count} {priority}" for priority, count in sorted(below.items()))
        remedies.append(f"give up replicas that matter less on such devices ({text} priority)")
    short = missing * option.devices * option.need
    return "no-room", reason, ceil(short / GIB * 1000) / 1000, tuple(remedies)
