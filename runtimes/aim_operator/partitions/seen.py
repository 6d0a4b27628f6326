"""A node and its pods, as much of them as a switch needs to know."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from aim_profile.plans import dcm

Object = Mapping[str, Any]

#: On a node: the plan that holds it, by name; and whether it was cordoned before.
HELD_BY = "partition.aim.amd.com/plan"
WAS_CORDONED = "partition.aim.amd.com/was-cordoned"
_MANAGER = "device-config-manager"
_DEVICE_FILES = ("/dev/kfd", "/dev/dri")


class SeenNode(NamedTuple):
    """allocatable: its `amd.com/` resources of which there are any."""

    name: str
    labels: Mapping[str, str]
    annotations: Mapping[str, str]
    allocatable: Mapping[str, int]
    cordoned: bool
    tainted: bool

    @property
    def held_by(self) -> str | None:
        """The plan that is at it."""
        return self.annotations.get(HELD_BY)

    @property
    def profile(self) -> str | None:
        """What the Device Config Manager is asked for."""
        return self.labels.get(dcm.PROFILE_LABEL)

    @property
    def state(self) -> str | None:
        """What the Device Config Manager says: in-progress, success, failure."""
        return self.labels.get(dcm.STATE_LABEL)


class SeenPod(NamedTuple):
    """daemonset: the one that would make it anew at once; holds: why it has, or may have, the devices open; empty: it
    does not; stays: it tolerates the taint.
    """

    namespace: str
    name: str
    uid: str
    daemonset: str | None
    holds: str
    stays: bool
    ready: bool

    @property
    def id(self) -> str:
        """`namespace/name`."""
        return f"{self.namespace}/{self.name}"

    @property
    def is_manager(self) -> bool:
        """Whether it is the Device Config Manager itself, which works while all others are away."""
        return self.daemonset is not None and self.daemonset.endswith(_MANAGER)

    @property
    def operand(self) -> str | None:
        """Which of those that look at the devices only when they start."""
        owner = self.daemonset or ""
        return next((name for name in dcm.OPERANDS if owner.endswith(name)), None)


def seen_node(node: Object) -> SeenNode:
    """What a Node says."""
    metadata, spec = node["metadata"], node.get("spec", {})
    found = node.get("status", {}).get("allocatable", {})
    counts = {name: _count(amount) for name, amount in found.items() if name.startswith("amd.com/")}
    return SeenNode(
        name=metadata["name"],
        labels=metadata.get("labels") or {},
        annotations=metadata.get("annotations") or {},
        allocatable={name: count for name, count in counts.items() if count},
        cordoned=bool(spec.get("unschedulable")),
        tainted=any(is_ours(taint) for taint in spec.get("taints") or ()),
    )


def is_ours(taint: Mapping[str, Any]) -> bool:
    """Whether it is the Device Config Manager's taint."""
    found = (taint.get("key"), taint.get("value"), taint.get("effect"))
    return found == (dcm.TAINT_KEY, dcm.TAINT_VALUE, dcm.TAINT_EFFECT)


def _count(amount: object) -> int:
    """Device plugins count in whole devices."""
    text = str(amount)
    return int(text) if text.isdecimal() else 0


def seen_pod(pod: Object) -> SeenPod | None:
    """What a Pod says; None for one that has ended, or that is the kubelet's own."""
    metadata, spec, status = pod["metadata"], pod.get("spec", {}), pod.get("status", {})
    static = "kubernetes.io/config.mirror" in (metadata.get("annotations") or {})
    if static or status.get("phase") in ("Succeeded", "Failed"):
        return None
    owners = [owner for owner in metadata.get("ownerReferences") or () if owner.get("controller")]
    conditions = {each["type"]: each["status"] for each in status.get("conditions") or ()}
    return SeenPod(
        namespace=metadata["namespace"],
        name=metadata["name"],
        uid=metadata["uid"],
        daemonset=next((owner["name"] for owner in owners if owner["kind"] == "DaemonSet"), None),
        holds=_holds(spec),
        stays=any(_tolerates(each) for each in spec.get("tolerations") or ()),
        ready=conditions.get("Ready") == "True" and "deletionTimestamp" not in metadata,
    )


def _holds(spec: Object) -> str:
    """A device plugin's pods get /dev/kfd with their resource; others have it from the host; claims may give it."""
    for container in [*(spec.get("initContainers") or ()), *(spec.get("containers") or ())]:
        amounts = container.get("resources", {})
        asked = {**amounts.get("requests", {}), **amounts.get("limits", {})}
        if resource := next((name for name in asked if name.startswith("amd.com/")), None):
            return f"asks for {resource}"
    for volume in spec.get("volumes") or ():
        path = (volume.get("hostPath") or {}).get("path", "").rstrip("/")
        if path == "/dev" or path.startswith(_DEVICE_FILES):
            return f"mounts {path}"
    claims = spec.get("resourceClaims") or ()
    return f"has the claim {claims[0]['name']}" if claims else ""


def _tolerates(toleration: Object) -> bool:
    if toleration.get("effect") not in (None, "", dcm.TAINT_EFFECT):
        return False
    if toleration.get("operator") == "Exists":
        return toleration.get("key") in (None, "", dcm.TAINT_KEY)
    return (toleration.get("key"), toleration.get("value")) == (dcm.TAINT_KEY, dcm.TAINT_VALUE)
