"""What the walk decides, done on the cluster: each thing may be done twice, and somebody else's is left alone."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, NamedTuple

from aim_operator.cluster import CONFIG_MAPS, EVENTS, NODES, PODS, Cluster
from aim_profile.kubernetes.serving_runtime import image_of
from aim_profile.plans import dcm

from .node_walk import Do, View
from .read_back import Reader, reader_of, reader_pod
from .seen import HELD_BY, WAS_CORDONED, Object, SeenNode, SeenPod, is_ours, seen_node, seen_pod
from .status import NodeStatus
from .target import Target

_FIELD = "gpu-config-profiles"
_LONGEST_WORD = 300


class Place(NamedTuple):
    """namespace: ours, where readers run; image: theirs, empty: that of `pod`, our own; gpu_namespace, config_map: of
    the Device Config Manager.
    """

    namespace: str
    image: str
    gpu_namespace: str = "kube-amd-gpu"
    config_map: str = "default-dcm-config"
    pod: str = ""


class ForeignProfile(Exception):
    """The ConfigMap holds another profile of that name, or cannot be read as one."""


class Hands:
    """On one node, for one plan. Raises ApiError."""

    def __init__(self, cluster: Cluster, place: Place, plan: str, node: Object) -> None:
        self._cluster, self._place, self._plan, self._node = cluster, place, plan, node
        self._name = node["metadata"]["name"]
        self._does: Mapping[str, Callable[[SeenPod, Target, NodeStatus], Awaitable[object]]] = {
            "claim": lambda pod, target, status: self._claim(),
            "evict": lambda pod, target, status: self._evict(pod),
            "delete": lambda pod, target, status: self._delete(pod),
            "taint": lambda pod, target, status: self._taint(True),
            "untaint": lambda pod, target, status: self._taint(False),
            "forget": lambda pod, target, status: self._label(None),
            "label": lambda pod, target, status: self._label(target.profile),
            "profile": lambda pod, target, status: self._profile(target),
            "read": lambda pod, target, status: self._read(status),
            "unread": lambda pod, target, status: self._unread(status),
            "release": lambda pod, target, status: self._release(),
        }

    async def view(self, status: NodeStatus) -> View:
        """What is there now."""
        pods = [pod for each in await self._pods() if (pod := seen_pod(each)) is not None]
        reader = await self._reader(status) if status.phase == "Verifying" else None
        said = await self._said() if status.phase == "WaitingOperator" else ""
        return View(seen_node(self._node), pods, reader, said)

    async def do(self, what: Do, target: Target, status: NodeStatus) -> None:
        """Done once this returns. Raises ForeignProfile, too."""
        nobody = SeenPod("", "", "", None, "", False, False)
        await self._does[what.what](what.pod or nobody, target, status)

    async def _pods(self) -> Sequence[Object]:
        return await self._cluster.list(PODS, fields={"spec.nodeName": self._name})

    async def _patch(self, body: dict[str, Any]) -> None:
        """Only what was seen is changed: somebody else's hand in between is a Conflict, and all is looked at anew."""
        version = self._node["metadata"]["resourceVersion"]
        metadata = {**body.get("metadata", {}), "resourceVersion": version}
        found = await self._cluster.patch(NODES, self._name, {**body, "metadata": metadata})
        self._node = found or self._node

    @property
    def _seen(self) -> SeenNode:
        return seen_node(self._node)

    async def _claim(self) -> None:
        if self._seen.held_by not in (None, self._plan):
            return
        notes = {HELD_BY: self._plan}
        if self._seen.held_by is None:
            notes[WAS_CORDONED] = str(self._seen.cordoned).lower()
        await self._patch({"metadata": {"annotations": notes}, "spec": {"unschedulable": True}})

    async def _release(self) -> None:
        if self._seen.held_by != self._plan:
            return
        stays = self._seen.annotations.get(WAS_CORDONED) == "true"
        notes = {HELD_BY: None, WAS_CORDONED: None}
        await self._patch({"metadata": {"annotations": notes}, "spec": {"unschedulable": True if stays else None}})

    async def _taint(self, wanted: bool) -> None:
        if self._seen.tainted == wanted or self._seen.held_by != self._plan:
            return
        taints = [taint for taint in self._node.get("spec", {}).get("taints") or () if not is_ours(taint)]
        ours = {"key": dcm.TAINT_KEY, "value": dcm.TAINT_VALUE, "effect": dcm.TAINT_EFFECT}
        await self._patch({"spec": {"taints": [*taints, ours] if wanted else taints or None}})

    async def _label(self, profile: str | None) -> None:
        if profile is None:
            await self._patch({"metadata": {"labels": {dcm.PROFILE_LABEL: None, dcm.STATE_LABEL: None}}})
        else:
            await self._patch({"metadata": {"labels": {dcm.PROFILE_LABEL: profile}}})

    async def _evict(self, pod: SeenPod) -> None:
        """A disruption budget that forbids it is waited for."""
        await self._cluster.evict(pod.name, pod.namespace)

    async def _delete(self, pod: SeenPod) -> None:
        await self._cluster.delete(PODS, pod.name, pod.namespace)

    # --- the Device Config Manager's profiles

    async def _profile(self, target: Target) -> None:
        """Added to those that are there; others' stay as they are."""
        name, namespace = self._place.config_map, self._place.gpu_namespace
        found = await self._cluster.get(CONFIG_MAPS, name, namespace)
        if found is None:
            data = {"config.json": dcm.config_json([target.modes])}
            body = {"metadata": {"name": name, "namespace": namespace}, "data": data}
            await self._cluster.create(CONFIG_MAPS, {"apiVersion": "v1", "kind": "ConfigMap", **body})
        elif (text := self._with_profile(found, target)) is not None:
            version = {"resourceVersion": found["metadata"]["resourceVersion"]}
            await self._cluster.patch(
                CONFIG_MAPS, name, {"metadata": version, "data": {"config.json": text}}, namespace
            )

    def _with_profile(self, config_map: Object, target: Target) -> str | None:
        """The new config.json; None where the profile is there."""
        where = f"{self._place.gpu_namespace}/{self._place.config_map}"
        try:
            config = json.loads((config_map.get("data") or {}).get("config.json") or "{}")
            known = dict(config.get(_FIELD) or {})
        except (ValueError, AttributeError, TypeError) as problem:
            raise ForeignProfile(f"ConfigMap {where}: config.json is not the Device Config Manager's JSON") from problem
        wanted = dcm.profile(target.modes)
        if known.get(target.profile) == wanted:
            return None
        if target.profile in known:
            raise ForeignProfile(f"ConfigMap {where}: profile {target.profile} is there and says something else")
        ours = json.loads(dcm.config_json([target.modes]))
        return json.dumps({**ours, **config, _FIELD: {**known, target.profile: wanted}}, indent=2) + "\n"

    async def _said(self) -> str:
        """The newest event of the Device Config Manager's pod on this node."""
        pods = {pod.name for each in await self._pods() if (pod := seen_pod(each)) is not None and pod.is_manager}
        events = await self._cluster.list(EVENTS, self._place.gpu_namespace)
        told = [each for each in events if each.get("involvedObject", {}).get("name") in pods]
        newest = max(told, key=lambda each: each.get("lastTimestamp") or "", default=None)
        return f"{newest.get('reason')}: {newest.get('message', '')}"[:_LONGEST_WORD] if newest else ""

    # --- the reader

    def _reader_name(self, status: NodeStatus) -> str:
        """Another for each attempt: an old answer is never taken for a new one."""
        what = f"{self._plan}\0{self._name}\0{status.generation}\0{status.attempts}"
        return f"aim-read-{hashlib.sha256(what.encode()).hexdigest()[:16]}"

    async def _reader(self, status: NodeStatus) -> Reader | None:
        pod = await self._cluster.get(PODS, self._reader_name(status), self._place.namespace)
        return None if pod is None else reader_of(pod)

    async def _read(self, status: NodeStatus) -> None:
        pod = reader_pod(self._reader_name(status), self._place.namespace, self._name, await self._image())
        await self._cluster.create(PODS, pod)

    async def _image(self) -> str:
        if self._place.image:
            return self._place.image
        own = await self._cluster.get(PODS, self._place.pod, self._place.namespace)
        return str(own["spec"]["containers"][0]["image"]) if own else image_of("aim-operator")

    async def _unread(self, status: NodeStatus) -> None:
        await self._cluster.delete(PODS, self._reader_name(status), self._place.namespace)
