"""Where each InferenceService of a plan is: node, card and partition, and whether that is where it was planned.

A DRA claim names its device. A device plugin tells nobody which of equal devices it gave: then node and mode are seen,
card and partition are the plan's, and `source` says so.

The same stands on the InferenceService, under `status.aim.amd.com/`. KServe copies a service's annotations to its pods
and starts them anew where one changes, unless inferenceservice-config names it: without that nothing is annotated.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from aim_operator.cluster import CONFIG_MAPS, INFERENCE_SERVICES, PODS, Cluster
from aim_operator.notes import NOTES, PLACES
from aim_profile.kubernetes.plan_objects import service_names
from aim_profile.plans.plan import Placement, Plan

from .claims import device_of
from .status import NodeStatus, PlaceStatus

_KSERVE = ("kserve", "inferenceservice-config", "inferenceService", "serviceAnnotationDisallowedList")
_SERVICE = "serving.kserve.io/inferenceservice"
_LONGEST = 1024


async def find(cluster: Cluster, plan: Plan, nodes: Mapping[str, NodeStatus]) -> tuple[list[PlaceStatus], str]:
    """Every replica that serves, in the plan's order, and why the services are not annotated; empty: they are.

    Raises ApiError.
    """
    names = service_names(plan)
    services = {each["metadata"]["name"]: each for each in await cluster.list(INFERENCE_SERVICES)}
    found: list[PlaceStatus] = []
    for name in dict.fromkeys(names.values()):
        planned = [placement for placement in plan.placements if names.get(placement.id) == name]
        found += await _of_service(cluster, services.get(name), name, planned)
    why = await _not_annotated(cluster, any(place.service in services for place in found))
    if not why:
        for name, service in services.items():
            await _annotate(cluster, service, [place for place in found if place.service == name and place.pod])
    return found, why


async def _of_service(
    cluster: Cluster, service: Mapping[str, Any] | None, name: str, planned: Sequence[Placement]
) -> list[PlaceStatus]:
    if service is None:
        return [_place(each, name, drift="there is no InferenceService of that name") for each in planned]
    namespace = service["metadata"]["namespace"]
    pods = [pod for pod in await cluster.list(PODS, namespace, {_SERVICE: name}) if _is_placed(pod)]
    pods.sort(key=lambda pod: str(pod["metadata"]["name"]))
    found, left = [], list(pods)
    waiting = []
    for placement in planned:
        pod = next((each for each in left if each["spec"]["nodeName"] == placement.node), None)
        if pod is None:
            waiting.append(placement)
            continue
        left.remove(pod)
        found.append(await _seen(cluster, pod, placement, name))
    for placement in waiting:
        if left:
            pod = left.pop(0)
            drift = f"is on {pod['spec']['nodeName']}, planned is {placement.node}"
            found.append(_place(placement, name, pod, drift=drift, known=False))
        else:
            found.append(_place(placement, name, drift="no pod of it runs").model_copy(update={"namespace": namespace}))
    return sorted(found, key=lambda place: [each.id for each in planned].index(place.replica))


def _is_placed(pod: Mapping[str, Any]) -> bool:
    alive = pod.get("status", {}).get("phase") in ("Pending", "Running") and "deletionTimestamp" not in pod["metadata"]
    return alive and bool(pod["spec"].get("nodeName"))


async def _seen(cluster: Cluster, pod: Mapping[str, Any], planned: Placement, service: str) -> PlaceStatus:
    if (claimed := await device_of(cluster, pod)) is not None:
        card, partition = claimed
        as_planned = (card, partition) in {(str(card), str(part)) for card, part in planned.devices}
        drift = "" if as_planned else f"is on card {card} partition {partition}, planned is {_device(planned)}"
        place = _place(planned, service, pod, drift=drift)
        return place.model_copy(update={"card": card, "partition": partition, "source": "claim"})
    asked = _resources(pod)
    if planned.resource in asked or "amd.com/gpu" in asked:
        return _place(planned, service, pod)
    drift = f"asks for {', '.join(sorted(asked)) or 'no device'}, planned is {planned.resource}"
    return _place(planned, service, pod, drift=drift, known=False)


def _resources(pod: Mapping[str, Any]) -> set[str]:
    asked: set[str] = set()
    for container in pod["spec"].get("containers") or ():
        amounts = container.get("resources", {})
        asked |= {name for name in {**amounts.get("limits", {})} if name.startswith("amd.com/")}
    return asked


def _device(planned: Placement) -> str:
    return f"card {_words(planned.cards)} partition {_words(planned.partitions)}"


def _words(numbers: Iterable[int]) -> str:
    return ",".join(map(str, numbers))


def _place(
    planned: Placement, service: str, pod: Mapping[str, Any] | None = None, drift: str = "", known: bool = True
) -> PlaceStatus:
    """known: whether the device is the planned one, as far as anybody can tell."""
    where = {} if pod is None else {"namespace": pod["metadata"]["namespace"], "pod": pod["metadata"]["name"]}
    device = pod is not None and known
    return PlaceStatus(
        service=service,
        replica=planned.id,
        node="" if pod is None else pod["spec"]["nodeName"],
        card=_words(planned.cards) if device else "",
        partition=_words(planned.partitions) if device else "",
        mode=planned.mode,
        source="plan" if device else "",
        drift=drift,
        **where,
    )


def in_words(services: Iterable[Mapping[str, Any]]) -> str:
    """`chat=n0/3/5 chat=n1/0/0`, for a printer column."""
    told = [
        f"{each['service']}={each['node']}/{each.get('card') or '?'}/{each.get('partition') or '?'}"
        for each in services
        if each.get("node")
    ]
    text = " ".join(told)
    return text if len(text) <= _LONGEST else text[: _LONGEST - 2] + " …"


async def _not_annotated(cluster: Cluster, wanted: bool) -> str:
    """Why an annotation would do harm; empty where it does none."""
    if not wanted:
        return ""
    namespace, name, key, field = _KSERVE
    config = await cluster.get(CONFIG_MAPS, name, namespace)
    try:
        kept = set(json.loads(((config or {}).get("data") or {}).get(key) or "{}").get(field) or ())
    except (ValueError, AttributeError, TypeError):
        kept = set()
    missing = [each for each in NOTES if each not in kept]
    if not missing:
        return ""
    return (
        f"services are not annotated: KServe would start their pods anew; add {', '.join(missing)} to {field} in "
        f"{key} of ConfigMap {namespace}/{name}"
    )


async def _annotate(cluster: Cluster, service: Mapping[str, Any], places: Sequence[PlaceStatus]) -> None:
    values = [",".join(getattr(place, name) or "?" for place in places) for name in ("node", "card", "partition")]
    wanted = dict(zip(PLACES, values, strict=True))
    now = service["metadata"].get("annotations") or {}
    if places and any(now.get(key) != value for key, value in wanted.items()):
        metadata = service["metadata"]
        body = {"metadata": {"annotations": wanted}}
        await cluster.patch(INFERENCE_SERVICES, metadata["name"], body, metadata["namespace"])
