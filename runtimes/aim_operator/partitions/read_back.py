"""What a node's own files say after a switch: modes of its cards, devices that KFD counts.

A pod of ours reads them there: /sys is in every container, no device is opened and nothing of the host is mounted. KFD
hides from a container what it was not given, and still counts it. The answer is the container's termination message.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from aim_profile.errors import NodeError
from aim_profile.kubernetes.serving_runtime import RESTRICTED
from aim_profile.nodes.kfd import read_topology
from aim_profile.nodes.read import places
from aim_profile.nodes.sysfs import read_cards

from .target import Target

_MOST_CARDS = 64
_DEADLINE_S = 120


class ReadBack(NamedTuple):
    """modes: `CPX/NPS4` of each card in the order of their addresses, `?` where the driver does not say; devices: as
    KFD counts them.
    """

    modes: tuple[str, ...]
    devices: int

    def differences(self, target: Target) -> list[str]:
        """What is not as the plan says; empty where all is."""
        found = []
        if len(self.modes) != len(target.modes):
            found.append(f"{len(self.modes)} cards are there, planned are {len(target.modes)}")
        for card, (is_now, planned) in enumerate(zip(self.modes, target.modes, strict=False)):
            if is_now != planned:
                found.append(f"card {card} is in {is_now}, planned is {planned}")
        if self.devices != sum(target.devices):
            found.append(f"KFD counts {self.devices} devices, planned are {sum(target.devices)}")
        return found


def read_here(root: Path = Path("/")) -> ReadBack:
    """Of the machine whose files are under `root`. Raises NodeError naming the file."""
    kfd, pci = places(root)
    if kfd is None or pci is None:
        missing = "KFD's topology" if kfd is None else "the amdgpu driver's cards"
        raise NodeError(f"{root}: no {missing} here", field="root", remedy="see that the driver is loaded on the node")
    topology = read_topology(kfd)
    modes = tuple(f"{card.compute}/{card.memory}" if card.compute and card.memory else "?" for card in read_cards(pci))
    return ReadBack(modes, len(topology.gpus) + topology.hidden)


def as_message(found: ReadBack) -> str:
    """For the termination log, which holds 4096 bytes."""
    return json.dumps({"modes": found.modes[:_MOST_CARDS], "devices": found.devices})


def from_message(text: str) -> ReadBack | None:
    """None for what is no answer of ours."""
    try:
        found = json.loads(text)
        return ReadBack(tuple(str(mode) for mode in found["modes"]), int(found["devices"]))
    except (ValueError, KeyError, TypeError):
        return None


def reader_pod(name: str, namespace: str, node: str, image: str) -> dict[str, Any]:
    """The pod that reads `node`, put there past the scheduler: the node is cordoned and tainted."""
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": name,
            "namespace": namespace,
            "labels": {"app.kubernetes.io/name": "aim-operator", "app.kubernetes.io/component": "node-reader"},
        },
        "spec": {
            "nodeName": node,
            "restartPolicy": "Never",
            "activeDeadlineSeconds": _DEADLINE_S,
            "automountServiceAccountToken": False,
            "enableServiceLinks": False,
            "tolerations": [{"operator": "Exists"}],
            "securityContext": {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}},
            "containers": [
                {
                    "name": "reader",
                    "image": image,
                    "command": ["python", "-m", "aim_operator.read_node"],
                    "resources": {
                        "requests": {"cpu": "50m", "memory": "128Mi"},
                        "limits": {"cpu": "1", "memory": "256Mi"},
                    },
                    "securityContext": dict(RESTRICTED),
                    "terminationMessagePolicy": "FallbackToLogsOnError",
                }
            ],
        },
    }


class Reader(NamedTuple):
    """How far the pod is. ended: None: not yet; answer: None where it gave none, `message` then says why."""

    ended: bool
    answer: ReadBack | None = None
    message: str = ""


def reader_of(pod: Mapping[str, Any]) -> Reader:
    """What the reader's Pod says."""
    status = pod.get("status", {})
    phase = status.get("phase")
    if phase not in ("Succeeded", "Failed"):
        return Reader(ended=False, message=_waiting(status))
    ends = [each.get("state", {}).get("terminated") or {} for each in status.get("containerStatuses") or ()]
    text = next((str(end["message"]) for end in ends if end.get("message")), str(status.get("message", "")))
    answer = from_message(text) if phase == "Succeeded" else None
    return Reader(True, answer, "" if answer else text[:500] or f"the reader's pod has {phase.lower()} without a word")


def _waiting(status: Mapping[str, Any]) -> str:
    waits = [each.get("state", {}).get("waiting") or {} for each in status.get("containerStatuses") or ()]
    return next((f"{wait.get('reason')}: {wait.get('message', '')}"[:500] for wait in waits if wait.get("reason")), "")
