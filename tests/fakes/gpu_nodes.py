"""Nodes with AMD GPUs, as far as an API server shows them: kubelet, DaemonSets and the GPU operator's operands.

    nodes = GpuNodes(kubernetes, tmp_path); nodes.add("n0", cards=2, mode="SPX/NPS1")
    nodes.tick()       # each looks once at what is there and reacts; `with nodes.alive():` does it all the time

The Device Config Manager (ROCm/device-config-manager 15cef25): acts where its profile label changes, to a value; says
in-progress, then success or failure; refuses an untainted node, a profile its ConfigMap does not have, cards that do
not add up, devices that somebody holds. The device plugin and the node labeller look at the devices when they start
and never again, and do not tolerate the taint (gpu-operator#420). A reader's pod runs the operator's own code over a
tree of files as the kernel writes them.
"""

from __future__ import annotations

import itertools
import json
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from lightkube import ApiError

from aim_operator.read_node import main as read_node
from aim_profile.gpus.catalog import by_name
from kube_double.cluster import Cluster
from kube_memory import Memory
from sysfs_tree import MI300X, write_kfd_node, write_sysfs_card

NAMESPACE = "kube-amd-gpu"
_PROFILE, _STATE = "dcm.amd.com/gpu-config-profile", "dcm.amd.com/gpu-config-profile-state"
_TAINT = {"key": "amd-dcm", "value": "up", "effect": "NoExecute"}
_PODS = f"/api/v1/namespaces/{NAMESPACE}/pods"
#: DaemonSets of the GPU operator, and whether they tolerate the taint and hold the devices.
_DAEMONS = {
    "gpu-device-plugin": (False, True),
    "gpu-node-labeller": (False, False),
    "gpu-metrics-exporter": (False, True),
    "gpu-device-config-manager": (True, True),
}


@dataclass
class GpuNode:
    """What the hardware is, and how it misbehaves. lies: a switch says success and changes nothing; fails: so many
    switches end in failure; misses: partitions that the device plugin does not see; silent: the manager is away.
    """

    name: str
    modes: list[str]
    lies: bool = False
    fails: int = 0
    misses: int = 0
    silent: bool = False
    asked: str | None = None
    switches: list[str] = field(default_factory=list)

    @property
    def devices(self) -> list[int]:
        return [by_name("MI300X").mode(mode).partitions for mode in self.modes]


class GpuNodes:
    """All of them. Everything goes through the API server, as a kubelet's and an operand's doing does."""

    def __init__(self, kubernetes: Cluster | Memory, folder: Path) -> None:
        self.kubernetes, self.folder = kubernetes, folder
        self.nodes: dict[str, GpuNode] = {}
        self.exporter_stays = False
        self._started: set[str] = set()
        self._numbers = itertools.count(1)
        kubernetes.create("/api/v1/namespaces", {"metadata": {"name": NAMESPACE}})
        self._uids = {
            name: kubernetes.create(
                f"/apis/apps/v1/namespaces/{NAMESPACE}/daemonsets",
                {"metadata": {"name": name, "namespace": NAMESPACE}, "spec": _daemon_set(name)},
            )["metadata"]["uid"]
            for name in _DAEMONS
        }

    def add(self, name: str, cards: int = 1, mode: str = "SPX/NPS1", **more: Any) -> GpuNode:
        """A node whose operands run."""
        node = GpuNode(name, [mode] * cards, **more)
        self.nodes[name] = node
        self.kubernetes.create("/api/v1/nodes", {"metadata": {"name": name, "labels": {}}, "spec": {}})
        self.tick()
        self.tick()
        return node

    def object(self, name: str) -> dict[str, Any]:
        return self.kubernetes.read(f"/api/v1/nodes/{name}")

    def tick(self) -> None:
        """Everybody looks once."""
        for node in self.nodes.values():
            try:
                self._look(node)
            except (httpx.HTTPStatusError, ApiError) as refused:
                # Gone, or changed, since it was looked at; 500: kubectl's proxy, of a server that is started anew.
                if refused.response.status_code not in (404, 409, 500):
                    raise

    @contextmanager
    def alive(self, every_s: float = 0.2) -> Iterator[None]:
        """They look all the time, on a thread of their own."""
        stop = threading.Event()

        def look() -> None:
            while not stop.wait(every_s):
                self.tick()

        thread = threading.Thread(target=look)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()

    # --- what each does

    def _look(self, node: GpuNode) -> None:
        seen = self.object(node.name)
        tainted = _TAINT in [{key: taint.get(key) for key in _TAINT} for taint in seen["spec"].get("taints") or ()]
        pods = self._pods(node)
        for pod in [pod for pod in pods if "deletionTimestamp" in pod["metadata"]]:
            # Its kubelet has ended it: until then an API server keeps it.
            self._delete(pod)
            pods.remove(pod)
        if tainted:
            for pod in [pod for pod in pods if not _tolerates(pod)]:
                self._delete(pod)
            pods = [pod for pod in pods if _tolerates(pod)]
        for name, (stays, holds) in _DAEMONS.items():
            self._daemon(node, name, stays or (self.exporter_stays and "exporter" in name), holds, tainted, pods)
        for pod in pods:
            self._kubelet(node, pod)
        self._manager(node, seen, tainted)

    def _pods(self, node: GpuNode) -> list[dict[str, Any]]:
        return self.kubernetes.items("/api/v1/pods", fieldSelector=f"spec.nodeName={node.name}")

    def _delete(self, pod: dict[str, Any]) -> None:
        metadata = pod["metadata"]
        path = f"/api/v1/namespaces/{metadata['namespace']}/pods/{metadata['name']}"
        self.kubernetes.delete(f"{path}?gracePeriodSeconds=0")

    def _daemon(self, node: GpuNode, name: str, stays: bool, holds: bool, tainted: bool, pods: list[Any]) -> None:
        """One pod of the DaemonSet, where it may run."""
        here = [pod for pod in pods if pod["metadata"].get("ownerReferences", [{}])[0].get("name") == name]
        if here or (tainted and not stays):
            return
        owner = {"apiVersion": "apps/v1", "kind": "DaemonSet", "name": name, "uid": self._uids[name]}
        spec: dict[str, Any] = {"nodeName": node.name, "containers": [{"name": "c", "image": "i"}]}
        if holds:
            spec["volumes"] = [{"name": "dev", "hostPath": {"path": "/dev"}}]
        if stays:
            spec["tolerations"] = [{"key": "amd-dcm", "operator": "Exists"}]
        metadata = {
            "name": f"{name}-{node.name}-{next(self._numbers)}",
            "namespace": NAMESPACE,
            "ownerReferences": [{**owner, "controller": True}],
        }
        self.kubernetes.create(_PODS, {"metadata": metadata, "spec": spec})

    def _kubelet(self, node: GpuNode, pod: dict[str, Any]) -> None:
        """Starts what was put on its node; an operand that starts looks at the devices."""
        uid = pod["metadata"]["uid"]
        if uid in self._started or "deletionTimestamp" in pod["metadata"]:
            return
        self._started.add(uid)
        if pod["metadata"].get("labels", {}).get("app.kubernetes.io/component") == "node-reader":
            status = self._read(node)
        else:
            status = {"phase": "Running", "conditions": [{"type": "Ready", "status": "True"}]}
        owner = pod["metadata"].get("ownerReferences", [{"name": ""}])[0]["name"]
        if owner == "gpu-device-plugin":
            self._advertise(node)
        if owner == "gpu-node-labeller":
            modes = set(node.modes)
            label = modes.pop().lower().replace("/", "_") if len(modes) == 1 else None
            self._label(node, {"amd.com/gpu.compute-memory-partition": label})
        metadata = pod["metadata"]
        path = f"/api/v1/namespaces/{metadata['namespace']}/pods/{metadata['name']}/status"
        self.kubernetes.patch(path, {"status": status})

    def _read(self, node: GpuNode) -> dict[str, Any]:
        root, log = self.folder / f"tree-{node.name}", self.folder / f"log-{node.name}"
        shutil.rmtree(root, ignore_errors=True)
        _write_tree(root, node)
        code = read_node(log, root)
        ended = {"exitCode": code, "message": log.read_text()}
        phase = "Failed" if code else "Succeeded"
        return {"phase": phase, "containerStatuses": [{"name": "reader", "state": {"terminated": ended}}]}

    def _advertise(self, node: GpuNode) -> None:
        """Mixed naming: a resource for each mode; those of before are 0, as the kubelet leaves them."""
        seen = self.object(node.name).get("status", {}).get("allocatable", {})
        found = {name: "0" for name in seen if name.startswith("amd.com/")}
        for mode, devices in zip(node.modes, node.devices, strict=True):
            name = "amd.com/" + mode.lower().replace("/", "_")
            found[name] = str(int(found.get(name, "0")) + devices)
        if node.misses:
            name = "amd.com/" + node.modes[0].lower().replace("/", "_")
            found[name] = str(int(found[name]) - node.misses)
        self.kubernetes.patch(f"/api/v1/nodes/{node.name}/status", {"status": {"allocatable": found}})

    def _label(self, node: GpuNode, labels: dict[str, str | None]) -> None:
        self.kubernetes.patch(f"/api/v1/nodes/{node.name}", {"metadata": {"labels": labels}})

    def _manager(self, node: GpuNode, seen: dict[str, Any], tainted: bool) -> None:
        """The Device Config Manager's watch of its node's label, and its try at once."""
        wanted = seen["metadata"].get("labels", {}).get(_PROFILE)
        if node.silent or wanted == node.asked:
            return
        node.asked = wanted
        if wanted is None:
            return
        self._label(node, {_STATE: "in-progress"})
        why, modes = self._judged(node, wanted, tainted)
        if not why and not node.lies:
            node.modes = modes
        node.switches.append(wanted)
        self._event(node, why or "SuccessfullyPartitioned")
        self._label(node, {_STATE: "failure" if why else "success"})

    def _judged(self, node: GpuNode, wanted: str, tainted: bool) -> tuple[str, list[str]]:
        """The reason of a failure, or the new modes."""
        found = self.kubernetes.read(f"/api/v1/namespaces/{NAMESPACE}/configmaps/default-dcm-config")
        profile = json.loads(found["data"]["config.json"])["gpu-config-profiles"].get(wanted)
        if profile is None:
            return "NonExistentProfile", []
        modes = [
            f"{part['computePartition']}/{part['memoryPartition']}"
            for part in profile["profiles"]
            for _ in range(part["numGPUsAssigned"])
        ]
        held = [pod for pod in self._pods(node) if _holds(pod)]
        if not tainted:
            return "NodeNotTaintedBeforeParition", []
        if len(modes) != len(node.modes) or held or node.fails:
            node.fails = max(0, node.fails - 1)
            return "PartitionFailure", []
        return "", modes

    def _event(self, node: GpuNode, reason: str) -> None:
        pods = [pod for pod in self._pods(node) if "config-manager" in pod["metadata"]["name"]]
        body = {
            "metadata": {"name": f"{reason.lower()}-{next(self._numbers)}", "namespace": NAMESPACE},
            "involvedObject": {"kind": "Pod", "name": pods[0]["metadata"]["name"], "namespace": NAMESPACE},
            "reason": reason,
            "message": '{"FinalStatus": "…"}',
            "lastTimestamp": f"2026-01-01T00:00:{next(self._numbers) % 60:02}Z",
        }
        self.kubernetes.create(f"/api/v1/namespaces/{NAMESPACE}/events", body)


def _daemon_set(name: str) -> dict[str, Any]:
    labels = {"app": name}
    pod = {"metadata": {"labels": labels}, "spec": {"containers": [{"name": "c", "image": "i"}]}}
    return {"selector": {"matchLabels": labels}, "template": pod}


def _tolerates(pod: dict[str, Any]) -> bool:
    return any(each.get("key") in (None, "amd-dcm") for each in pod["spec"].get("tolerations") or ())


def _holds(pod: dict[str, Any]) -> bool:
    owner = pod["metadata"].get("ownerReferences", [{"name": ""}])[0]["name"]
    asked = [name for each in pod["spec"]["containers"] for name in each.get("resources", {}).get("limits", {})]
    mounts = [each for each in pod["spec"].get("volumes") or () if each.get("hostPath", {}).get("path") == "/dev"]
    return not owner.endswith("config-manager") and bool(mounts or [name for name in asked if "amd.com/" in name])


def _write_tree(root: Path, node: GpuNode) -> None:
    """sysfs and KFD's topology of its cards, as the kernel shows them."""
    nodes, pci = root / "sys/class/kfd/kfd/topology/nodes", root / "sys/bus/pci/drivers/amdgpu"
    write_kfd_node(nodes, 0)
    number = 1
    for card, mode in enumerate(node.modes):
        compute, _, memory = mode.partition("/")
        bus = 5 + 0x11 * card
        files = {"current_compute_partition": compute, "current_memory_partition": memory}
        caps = {"available_compute_partition": "SPX, DPX, QPX, CPX", "available_memory_partition": "NPS1, NPS4"}
        ids = {"vendor": "0x1002", "device": "0x74a1", "class": "0x120000"}
        write_sysfs_card(pci, f"0000:{bus:02x}:00.0", **ids, **files, **caps)
        for partition in range(node.devices[card]):
            write_kfd_node(
                nodes,
                number,
                location_id=(bus << 8) + partition,
                render_minor=127 + number,
                compute_units=38,
                unique_id=1000 + card,
                **MI300X,
            )
            number += 1
