"""From a fleet, workloads and what runs now to the planner's problem."""

from __future__ import annotations

from aim_profile.gpus.catalog import Tier
from aim_profile.plans.fleet import Fleet, FleetCard, FleetNode
from aim_profile.plans.plan import Placement, PlanOptions
from aim_profile.plans.workload import WorkloadError, Workloads

from .jobs import Jobs
from .problem import DeviceKind, Job, PlanCard, PlanNode, Problem, Running, Selector, selector

_Kinds = dict[tuple[str, str, int, frozenset[Selector]], DeviceKind]


def make_problem(
    fleet: Fleet, workloads: Workloads, options: PlanOptions, current: tuple[Placement, ...] = ()
) -> Problem:
    """The problem of placing `workloads` on `fleet`, with what runs there now.

    Raises WorkloadError naming the workload whose model, node or numbers cannot be used, or that has a window: that is
    of a day, each part of which has its own problem.
    """
    if windowed := next((workload for workload in workloads.workloads if workload.window), None):
        raise WorkloadError(
            f"workload {windowed.name}: window {windowed.window}: one plan is of one part of the day",
            field=f"{windowed.name}.window",
            value=windowed.window,
            remedy="plan the day (plan_day), or leave window out",
        )
    selectors = {selector(w) for w in workloads.workloads}
    kinds, nodes = devices_of(fleet, options, selectors)
    jobs = Jobs(kinds, nodes, fleet, current).of(workloads)
    running, jobs = _running(current, jobs, nodes, kinds, options.allow_eviction)
    return Problem(kinds, nodes, jobs, running, options.allow_mixed_compute, options.effort)


def devices_of(
    fleet: Fleet, options: PlanOptions, selectors: set[Selector]
) -> tuple[tuple[DeviceKind, ...], tuple[PlanNode, ...]]:
    """The kinds of devices that the fleet's cards can be cut into, and its nodes."""
    kinds: _Kinds = {}
    built: dict[object, tuple[tuple[PlanCard, ...], tuple[str, ...]]] = {}
    alike: dict[object, int] = {}
    nodes: list[PlanNode] = []
    for index, node in enumerate(fleet.nodes):
        selected = frozenset(wanted for wanted in selectors if set(wanted) <= set(node.labels))
        form = (node.gpu, node.deployment, id(node.cards), selected)
        if form not in built:
            built[form] = _cards(node, kinds, options, selected)
        cards, labels = built[form]
        same = tuple((c.hive, c.current, c.as_found, tuple(c.kinds.items())) for c in cards)
        nodes.append(PlanNode(index, node.name, cards, labels, alike.setdefault((same, labels), len(alike))))
    return tuple(kinds.values()), tuple(nodes)


def _cards(
    node: FleetNode, kinds: _Kinds, options: PlanOptions, selected: frozenset[Selector]
) -> tuple[tuple[PlanCard, ...], tuple[str, ...]]:
    by_card = [_kinds_of(card, node, kinds, options.tier, selected) for card in node.cards]
    labels = tuple(label for label in by_card[0] if all(label in found for found in by_card))
    current = {card.current for card in node.cards}
    memories = {label.partition("/")[2] for label in current if label}
    usable = len(memories) == 1 and (options.allow_mixed_compute or len(current) == 1)
    cards = tuple(
        PlanCard(card.index, card.hive, card.current, found, found.get(card.current or "", -1) if usable else -1)
        for card, found in zip(node.cards, by_card, strict=True)
    )
    return cards, labels if node.switchable else ()


def _kinds_of(
    card: FleetCard, node: FleetNode, kinds: _Kinds, tier: Tier, selected: frozenset[Selector]
) -> dict[str, int]:
    found = {}
    for mode in card.allowed(tier, node.switchable):
        key = (node.gpu, mode.label, mode.memory_bytes, selected)
        kind = DeviceKind(len(kinds), node.gpu, mode, mode.partitions, mode.memory_bytes, selected)
        found[mode.label] = kinds.setdefault(key, kind).number
    return found


def _running(
    placements: tuple[Placement, ...],
    jobs: tuple[Job, ...],
    nodes: tuple[PlanNode, ...],
    kinds: tuple[DeviceKind, ...],
    eviction: bool,
) -> tuple[tuple[Running, ...], tuple[Job, ...]]:
    """Running replicas that may stay: their workload is still asked for and still fits where it is. With the jobs in
    the fallbacks in which they run: what runs is not started anew for another form.
    """
    by_name = {job.workload.name: job for job in jobs}
    forms: dict[int, Job] = {}
    by_node = {node.name: node for node in nodes}
    kept = []
    for placement in placements:
        job, node = by_name.get(placement.workload), by_node.get(placement.node)
        if job is None or node is None or placement.replica >= job.workload.replicas:
            continue
        job = _as_it_runs(job, placement)
        if forms.get(job.index, job) is not job:
            continue  # two forms of one workload: all take the first one's
        positions = {card.number: at for at, card in enumerate(node.cards)}
        if not all(card in positions for card in placement.cards):
            continue
        if all(_still_fits(job, placement, node.cards[positions[card]], kinds) for card in placement.cards):
            devices = tuple((positions[card], partition) for card, partition in placement.devices)
            fixed = not (eviction and job.workload.may_be_evicted)
            kept.append(Running(job.index, placement.replica, node.number, devices, fixed))
            forms[job.index] = job
    running = tuple(sorted(_held_by_dependents(kept, jobs)))
    return running, tuple(forms.get(job.index, job) for job in jobs)


def _as_it_runs(job: Job, placement: Placement) -> Job:
    """The job in the fallback that the placement is in, where the workload still names the same."""
    if not 0 < placement.fallback <= len(job.fallbacks):
        return job
    form = job.fallbacks[placement.fallback - 1]
    asked = form.workload
    same = (asked.precision, asked.context, asked.concurrency) == (
        placement.precision,
        placement.context,
        placement.concurrency,
    )
    return form if same else job


def _held_by_dependents(running: list[Running], jobs: tuple[Job, ...]) -> list[Running]:
    """What a replica that stays must stand beside stays too, even where it could be evicted by itself."""
    needed: set[tuple[int, int]] = set()
    found = []
    # A dependent's rank is above its targets': once through from the top settles whole chains.
    for run in sorted(running, key=lambda run: -jobs[run.job].rank):
        kept = run._replace(fixed=run.fixed or (run.job, run.node) in needed)
        if kept.fixed:
            needed.update((target, run.node) for target in jobs[run.job].affinity)
        found.append(kept)
    return found


def _still_fits(job: Job, placement: Placement, card: PlanCard, kinds: tuple[DeviceKind, ...]) -> bool:
    kind = card.kinds.get(placement.mode, -1)
    option = job.options.get(kind)
    if card.current != placement.mode or option is None or option.devices != placement.tp:
        return False
    return all(partition < kinds[kind].partitions for partition in placement.partitions)
