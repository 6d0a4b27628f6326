"""Several models on one node: each replica gets the devices that the planner's own file gives it.

On bare metal by card and partition: the node must be as the plan has it. In a pod the device plugin has chosen: a
placement says mode, size and count, and takes what is here; where the pod's node is known, only its placements count.
Without a plan each model in turn takes the first devices that hold it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from aim_profile.nodes.devices import devices_of
from aim_profile.nodes.facts import CPU_MODE, Node
from aim_profile.plans.compare import plan_assert
from aim_profile.plans.plan import Placement, Plan, PlanError
from aim_profile.units import GIB, MIB

from .facts import Assignment, At, Case, Device, Refused, narrowed
from .make import assign

Held = dict[At, float]
#: A plan's figures are rounded to a thousandth each.
_ROUNDED_GIB = 0.01


def assignments(
    cases: Mapping[str, Case],
    plan: Plan | None,
    node: Node,
    *,
    node_name: str | None = None,
    notes: Sequence[str] = (),
    named: bool = False,
) -> list[Assignment]:
    """An assignment per replica: of each placement of the plan, in its order, or without a plan of each model.

    cases: model name → what is asked for it; node: this machine as it was read; node_name: its name in the plan, in a
    pod None where it is not known: then each model is placed once; named: refusals say which model they are of.

    Raises:
        Refused: a placement names a model that is not among them, the node is not as the plan has it, the plan is of
            another node, or a model does not fit what it is given.
    """
    if plan is None:
        return list(_in_turn(cases, notes, named=named or len(cases) > 1))
    in_pod = any(case.in_pod for case in cases.values())
    placements = _of_this_node(plan, node, node_name, in_pod=in_pod)
    _check_models(placements, cases)
    held: Held = {}
    return [_placed(cases[run.workload], run, held, notes) for run in placements]


def _in_turn(cases: Mapping[str, Case], notes: Sequence[str], *, named: bool) -> Iterator[Assignment]:
    taken: frozenset[At] = frozenset()
    for name, case in cases.items():
        try:
            found = assign(case._replace(taken=case.taken | taken), notes)
        except Refused as refused:
            raise refused.of(f"model {name}") if named else refused from None
        taken |= {device.at for device in found.devices}
        yield found


def _of_this_node(plan: Plan, node: Node, name: str | None, *, in_pod: bool) -> list[Placement]:
    """What the plan has for this node. Raises Refused where it knows it not, or has it otherwise."""
    serving = [run for run in plan.placements if run.kind == "serve"]
    if not in_pod:
        named = _as_planned(node, plan, name)
        return [run for run in serving if run.node == named]
    if name is None:
        return list({run.workload: run for run in reversed(serving)}.values())[::-1]
    if not plan.on_node(name):
        raise _another_node(name, plan)
    return [run for run in serving if run.node == name]


def _as_planned(node: Node, plan: Plan, name: str | None) -> str:
    names = list(dict.fromkeys(card.node for card in plan.cards))
    named = name or node.name
    if named not in names:
        raise _another_node(named, plan)
    try:
        differences = plan_assert(node, plan, named)
    except PlanError as error:
        raise Refused.because(error) from None
    if differences:
        first, more = differences[0], len(differences) - 1
        raise Refused(
            f"this node is not as planned: {first.message}{f', and {more} differences more' if more else ''}",
            field=first.what,
            value=first.found,
            remedy="`aim-profile steps` lays out the way there, or plan for the node as it is",
        )
    return named


def _another_node(name: str | None, plan: Plan) -> Refused:
    names = ", ".join(list(dict.fromkeys(card.node for card in plan.cards))[:5])
    return Refused(
        f"the plan is of another node: it has {names}, this is {name or 'without a name'}",
        field="node-name",
        value=name,
        remedy="give this node's plan, or its name there (--node_name)",
    )


def _check_models(placements: Sequence[Placement], cases: Mapping[str, Case]) -> None:
    for run in placements:
        if run.workload not in cases:
            raise Refused(
                f"placement {run.id}: no model {run.workload!r} is served here",
                field="placement",
                value=run.workload,
                remedy=f"the models are {', '.join(cases)}: name one of them, or leave the workload out of the plan",
            )


def _placed(case: Case, run: Placement, held: Held, notes: Sequence[str]) -> Assignment:
    settings = narrowed(case.settings, f"placement {run.id}", _said_by(run))
    bound = frozenset(run.devices) if not case.in_pod else _present(case, run, held)
    try:
        found = assign(case._replace(settings=settings, bound=bound), notes)
    except Refused as refused:
        raise refused.of(f"placement {run.id}") from None
    for device in found.devices:
        held[device.at] = held.get(device.at, 0) + (run.memory_limit_gib or float("inf"))
        if run.memory_limit_gib is not None:
            _check_shared(run, device, held[device.at])
    return found.model_copy(update={"replica": run.replica})


def _check_shared(run: Placement, device: Device, taken_gib: float) -> None:
    """Raises Refused where those that share a device are promised more than it has: no planner does that."""
    short_gib = taken_gib - (device.memory_mib or float("inf")) * MIB / GIB
    if short_gib > _ROUNDED_GIB:
        raise Refused(
            f"placement {run.id}: card {device.card} partition {device.partition} is shared up to {taken_gib:g} GiB, "
            f"{short_gib:.3f} GiB more than it has",
            field="memory-limit",
            value=run.memory_limit_gib,
            remedy="plan anew, or lower the limits of those that share it",
            shortfall_gib=round(short_gib, 3),
        )


def _said_by(run: Placement) -> dict[str, object]:
    """A placement in the words of the settings."""
    said: dict[str, object] = {"max_model_len": run.context, "max_concurrency": run.concurrency}
    if run.memory_limit_gib is not None:
        said["memory_limit"] = int(run.memory_limit_gib * GIB)
    if run.mode == CPU_MODE:
        return said
    compute, _, memory = run.mode.partition("/")
    said |= {"compute_partition": compute, "memory_partition": memory, "partition_count": run.tp}
    return (
        said if run.precision is None else {**said, "precision": "fp4" if run.precision == "mxfp4" else run.precision}
    )


def _present(case: Case, run: Placement, held: Held) -> frozenset[At]:
    """The pod's devices that are free for it: nobody's, or shared by limits that they still hold."""
    limit = run.memory_limit_gib
    free = []
    for device in devices_of(case.node):
        at, size_gib = (device.card, device.partition), (device.memory_mib or 0) * MIB / GIB
        used = held.get(at, 0)
        if not used or (limit is not None and used + limit <= size_gib):
            free.append(at)
    if not free:
        raise Refused(
            f"placement {run.id}: every device of this pod is taken",
            field="placement",
            value=run.id,
            remedy="request more of them, or serve less in this pod",
        )
    return frozenset(free)
