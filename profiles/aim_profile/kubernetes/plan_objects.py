"""A plan as Kubernetes objects: an InferenceService for each workload and mode, a ConfigMap for the switches.

What a device plugin cannot hand out is refused, not approximated: it gives a device to one pod, so replicas that
share a device have no such object.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from aim_profile.gpus.catalog import PartitionMode
from aim_profile.nodes.facts import CPU, CPU_MODE
from aim_profile.plans import dcm
from aim_profile.plans.plan import Placement, Plan
from aim_profile.plans.workload import Workloads
from aim_profile.serving.derive import Wanted
from aim_profile.serving.profile import Profile

from .kserve import Document, Service
from .replicas import card_of, is_service, mode_of, profile_of, wanted_of
from .target import RenderError, Target

# The name that a DeviceConfig's spec.configManager.config.name points at by default.
DCM_CONFIG_MAP = "default-dcm-config"


class Rendered(NamedTuple):
    """services: what serves; skipped: one line for each workload that no InferenceService is made of."""

    services: tuple[Service, ...]
    skipped: tuple[str, ...]


class _Group(NamedTuple):
    """Replicas of one workload on devices of one kind."""

    workload: str
    gpu: str
    mode: str
    tp: int


def services_of(
    plan: Plan, workloads: Workloads | None = None, storage_uris: Mapping[str, str] | None = None
) -> Rendered:
    """The plan's replicas as services. workloads: for what a plan does not repeat (KV cache type, LoRA slots);
    storage_uris: by workload, for models that are not on the hub.

    Raises RenderError where replicas share a device, or a model has no address.
    """
    refuse_shared(plan)
    described = {workload.name: workload for workload in workloads.workloads} if workloads else {}
    groups: dict[_Group, list[Placement]] = {}
    cards = {(card.node, card.card): card for card in plan.cards}
    skipped: dict[str, str] = {}
    for placement in plan.placements:
        if not is_service(placement):
            what = f"a {placement.kind} workload" if placement.kind != "serve" else "a workload without a model"
            skipped[placement.workload] = f"{placement.workload}: {what} is no InferenceService"
            continue
        gpu = card_of(cards, placement).gpu
        if gpu == CPU:
            skipped[placement.workload] = f"{placement.workload}: on the CPU sets of {placement.node}, not on a GPU"
            continue
        groups.setdefault(_Group(placement.workload, gpu, placement.mode, placement.tp), []).append(placement)
    named = _names(groups)
    services = []
    derived: dict[tuple[str | None, PartitionMode, Wanted], Profile] = {}
    for group, placements in groups.items():
        first = placements[0]
        asked = (first.model, mode_of(first, card_of(cards, first)), wanted_of(first, described.get(group.workload)))
        profile = derived.get(asked) or derived.setdefault(asked, profile_of(first, *asked[1:]))
        uri = (storage_uris or {}).get(group.workload)
        services.append(_service(named[group], placements, profile, uri))
    return Rendered(tuple(services), tuple(skipped.values()))


def service_names(plan: Plan) -> Mapping[str, str]:
    """The InferenceService of each replica that `services_of` makes one of, by the replica's name (`chat/0`)."""
    cards = {(card.node, card.card): card for card in plan.cards}
    groups = {
        placement.id: _Group(placement.workload, gpu, placement.mode, placement.tp)
        for placement in plan.placements
        if is_service(placement) and (gpu := card_of(cards, placement).gpu) != CPU
    }
    named = _names(groups.values())
    return {replica: named[group] for replica, group in groups.items()}


def _names(groups: Iterable[_Group]) -> Mapping[_Group, str]:
    """Of their workload, with the mode where it has several."""
    each = dict.fromkeys(groups)
    kinds = Counter(group.workload for group in each)
    return {
        group: group.workload
        if kinds[group.workload] == 1
        else f"{group.workload}-{group.mode.lower().replace('/', '-')}-tp{group.tp}"
        for group in each
    }


def config_map_of(plan: Plan, target: Target) -> list[Document]:
    """The Device Config Manager's ConfigMap for the nodes whose mode can be switched; none where no card has one.

    Above it stand the commands that make a node take its profile; `aim-profile steps` says when.
    Raises PlanError where the device plugin's single strategy cannot advertise a node.
    """
    nodes: dict[str, list[str]] = {}
    for card in plan.cards:
        if card.mode is not None and card.switchable:
            nodes.setdefault(card.node, []).append(card.mode)
    if not nodes:
        return []
    for node, modes in nodes.items():
        dcm.refuse_mixed(node, modes, target.strategy)
    body = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": DCM_CONFIG_MAP, "namespace": target.operator_namespace},
        "data": {"config.json": dcm.config_json(nodes.values())},
    }
    return [(_dcm_comment(nodes), body)]


def partition_plan_of(plan: Plan, name: str, target: Target) -> list[Document]:
    """The plan as the object by which aim-operator switches nodes."""
    body = {
        "apiVersion": "aim.amd.com/v1alpha1",
        "kind": "PartitionPlan",
        "metadata": {"name": name},
        "spec": {"strategy": target.strategy, "plan": plan.model_dump(mode="json", exclude_defaults=True)},
    }
    return [("Nodes are switched by aim-operator, one at a time.", body)]


def _dcm_comment(nodes: Mapping[str, list[str]]) -> str:
    lines = [
        "Partition modes, for the GPU operator's Device Config Manager. A drained and tainted node takes its own by:"
    ]
    for node, modes in nodes.items():
        lines.append(f"  kubectl label node {node} {dcm.PROFILE_LABEL}={dcm.profile_name(modes)} --overwrite")
    return "\n".join(lines)


def refuse_shared(plan: Plan) -> None:
    """Raises RenderError where a service shares a device: the device plugin gives a device to one pod."""
    holders: dict[tuple[str, int, int], list[Placement]] = {}
    for placement in plan.placements:
        for card, partition in placement.devices if placement.mode != CPU_MODE else ():
            holders.setdefault((placement.node, card, partition), []).append(placement)
    for (node, card, partition), sharing in holders.items():
        if len(sharing) > 1 and any(is_service(placement) for placement in sharing):
            names = [placement.id for placement in sharing]
            raise RenderError(
                f"{' and '.join(names)} share partition {partition} of {node} card {card}, and the device plugin "
                "gives a device to one pod",
                field="memory_limit",
                value=names[0],
                remedy="leave memory_limit out of the workloads, so that each gets its own device",
            )


def _service(name: str, placements: list[Placement], profile: Profile, uri: str | None) -> Service:
    nodes = Counter(placement.node for placement in placements)
    return Service(
        name=name,
        profile=profile,
        replicas=len(placements),
        nodes=tuple(sorted(nodes)),
        spread=len(nodes) > 1 and max(nodes.values()) == 1,
        storage_uri=uri,
    )
