"""A plan as Kubernetes objects: an InferenceService for each workload and mode, a ConfigMap for the switches.

What a device plugin cannot hand out is refused, not approximated: it gives a device to one pod, so replicas that
share a device have no such object.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import NamedTuple, get_args

from aim_profile.gpus.catalog import PartitionMode, by_name
from aim_profile.models.facts import Precision
from aim_profile.models.load import load_model
from aim_profile.nodes.facts import CPU, CPU_MODE
from aim_profile.plans import dcm
from aim_profile.plans.plan import CardPlan, Placement, Plan
from aim_profile.plans.workload import Workload, Workloads
from aim_profile.serving.derive import Refusal, Wanted, derive
from aim_profile.serving.profile import FineTuning, Profile
from aim_profile.sizing.kv_cache import KvDtype
from aim_profile.units import GIB

from .kserve import Document, Service
from .target import RenderError, Target

# The name that a DeviceConfig's spec.configManager.config.name points at by default.
_DCM_CONFIG_MAP = "default-dcm-config"


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
    _refuse_shared(plan)
    described = {workload.name: workload for workload in workloads.workloads} if workloads else {}
    groups: dict[_Group, list[Placement]] = {}
    cards = {(card.node, card.card): card for card in plan.cards}
    skipped: dict[str, str] = {}
    for placement in plan.placements:
        if not _is_service(placement):
            what = f"a {placement.kind} workload" if placement.kind != "serve" else "a workload without a model"
            skipped[placement.workload] = f"{placement.workload}: {what} is no InferenceService"
            continue
        gpu = _card(cards, placement).gpu
        if gpu == CPU:
            skipped[placement.workload] = f"{placement.workload}: on the CPU sets of {placement.node}, not on a GPU"
            continue
        groups.setdefault(_Group(placement.workload, gpu, placement.mode, placement.tp), []).append(placement)
    named = _names(groups)
    services = []
    derived: dict[tuple[str | None, PartitionMode, Wanted], Profile] = {}
    for group, placements in groups.items():
        first = placements[0]
        asked = (first.model, _mode(first, _card(cards, first)), _wanted(first, described.get(group.workload)))
        profile = derived.get(asked) or derived.setdefault(asked, _profile(first, *asked[1:]))
        uri = (storage_uris or {}).get(group.workload)
        services.append(_service(named[group], placements, profile, uri))
    return Rendered(tuple(services), tuple(skipped.values()))


def service_names(plan: Plan) -> Mapping[str, str]:
    """The InferenceService of each replica that `services_of` makes one of, by the replica's name (`chat/0`)."""
    cards = {(card.node, card.card): card for card in plan.cards}
    groups = {
        placement.id: _Group(placement.workload, gpu, placement.mode, placement.tp)
        for placement in plan.placements
        if _is_service(placement) and (gpu := _card(cards, placement).gpu) != CPU
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


def _card(cards: Mapping[tuple[str, int], CardPlan], placement: Placement) -> CardPlan:
    found = cards.get((placement.node, placement.cards[0]))
    if found is None:
        raise RenderError(
            f"{placement.id} stands on {placement.node} card {placement.cards[0]}, which the plan does not list",
            field="placements",
            value=placement.id,
            remedy="plan again",
        )
    return found


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
        "metadata": {"name": _DCM_CONFIG_MAP, "namespace": target.operator_namespace},
        "data": {"config.json": dcm.config_json(nodes.values())},
    }
    return [(_dcm_comment(nodes), body)]


def _dcm_comment(nodes: Mapping[str, list[str]]) -> str:
    lines = [
        "Partition modes, for the GPU operator's Device Config Manager. A drained and tainted node takes its own by:"
    ]
    for node, modes in nodes.items():
        lines.append(f"  kubectl label node {node} {dcm.PROFILE_LABEL}={dcm.profile_name(modes)} --overwrite")
    return "\n".join(lines)


def _is_service(placement: Placement) -> bool:
    return placement.kind == "serve" and placement.model is not None


def _refuse_shared(plan: Plan) -> None:
    holders: dict[tuple[str, int, int], list[Placement]] = {}
    for placement in plan.placements:
        for card, partition in placement.devices if placement.mode != CPU_MODE else ():
            holders.setdefault((placement.node, card, partition), []).append(placement)
    for (node, card, partition), sharing in holders.items():
        if len(sharing) > 1 and any(_is_service(placement) for placement in sharing):
            names = [placement.id for placement in sharing]
            raise RenderError(
                f"{' and '.join(names)} share partition {partition} of {node} card {card}, and the device plugin "
                "gives a device to one pod",
                field="memory_limit",
                value=names[0],
                remedy="leave memory_limit out of the workloads, so that each gets its own device",
            )


def _mode(placement: Placement, card: CardPlan) -> PartitionMode:
    """The mode of the very devices the plan gave it."""
    deployment = "bare-metal" if card.deployment == "unknown" else card.deployment
    mode = by_name(card.gpu).mode(placement.mode, deployment)
    return mode.model_copy(update={"memory_mib": card.device_memory_mib or mode.memory_mib, "tier": card.tier})


def _wanted(placement: Placement, workload: Workload | None) -> Wanted:
    kv_dtype: KvDtype = workload.kv_dtype if workload else "auto"
    slots = workload.lora_slots if workload else 0
    limit = placement.memory_limit_gib
    return Wanted(
        precision=_precision(placement),
        metric=placement.slo,
        context=placement.context,
        tensor_parallel=placement.tp,
        kv_dtype=kv_dtype,
        qos_priority=placement.priority,
        # A plan rounds to a thousandth of a GiB: what is less is too little, not no limit.
        memory_limit_bytes=None if limit is None else max(1, int(limit * GIB)),
        finetuning=FineTuning(lora_slots=slots, lora_rank=workload.lora_rank) if workload and slots else None,
    )


def _profile(placement: Placement, mode: PartitionMode, wanted: Wanted) -> Profile:
    """The profile of a replica on the very devices the plan gave it."""
    found = derive(load_model(placement.model or ""), mode, wanted)
    if isinstance(found, Refusal):
        raise RenderError(
            f"{placement.id}: {found.reason}",
            field="placements",
            value=placement.id,
            remedy="give the workloads file too, if it names a KV cache type; else plan again",
        )
    return found


def _precision(placement: Placement) -> Precision | None:
    found = next((known for known in get_args(Precision) if known == placement.precision), None)
    if found is None and placement.precision is not None:
        raise RenderError(
            f"{placement.id}: precision {placement.precision} is not served",
            field="precision",
            value=placement.precision,
            remedy=f"it is one of {', '.join(get_args(Precision))}",
        )
    return found


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
