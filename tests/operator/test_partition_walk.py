"""A PartitionPlan is brought to pass on nodes, whatever happens in between: crashes, other hands, nodes that lie."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from aim_operator.notes import NOTES
from aim_operator.partitions.hands import Place
from aim_operator.partitions.metrics import Switches
from aim_operator.partitions.reconcile import Reconciler
from gpu_nodes import NAMESPACE, GpuNodes
from kube_memory import Memory, MemoryCluster
from partition_plans import placement, plan_object

PLANS = "/apis/aim.amd.com/v1alpha1/partitionplans"
CPX = {"amd.com/cpx_nps4": "8"}
TAINT = {"key": "amd-dcm", "value": "up", "effect": "NoExecute"}


class Crash(BaseException):
    """The process is gone."""


class Mortal(MemoryCluster):
    """Dies at each write once, before it reached the server or after; then lets it pass."""

    dies: str | None = None

    def __init__(self, memory: Memory) -> None:
        super().__init__(memory)
        self.survived: set[str] = set()

    async def _dying(self, what: str, write: Callable[[], Awaitable[Any]]) -> Any:
        fatal = self.dies is not None and what not in self.survived
        self.survived.add(what)
        if fatal and self.dies == "before":
            raise Crash
        done = await write()
        if fatal:
            raise Crash
        return done

    async def create(self, *args: Any) -> Any:
        return await self._dying(f"create {args}", lambda: MemoryCluster.create(self, *args))

    async def patch(self, *args: Any, **more: Any) -> Any:
        return await self._dying(f"patch {args}", lambda: MemoryCluster.patch(self, *args, **more))

    async def delete(self, *args: Any) -> None:
        await self._dying(f"delete {args}", lambda: MemoryCluster.delete(self, *args))


class World:
    """One cluster, its nodes, a clock that a test moves, and the operator's reconciler over them."""

    def __init__(self, folder: Path) -> None:
        self.kubernetes = Memory()
        self.nodes = GpuNodes(self.kubernetes, folder)
        self.time = datetime(2026, 1, 1, tzinfo=UTC)
        self.cluster = Mortal(self.kubernetes)
        self.metrics = CollectorRegistry()
        place = Place("aim-system", "aim/operator")
        self.trail: list[str] = []
        audit: Any = lambda action, *_, **__: self.trail.append(action)  # noqa: E731
        self.reconciler = Reconciler(self.cluster, place, Switches(self.metrics), audit, lambda: self.time)

    def plan(self, **nodes: str) -> None:
        self.kubernetes.create(PLANS, plan_object(**nodes))

    def status(self) -> dict[str, Any]:
        found: dict[str, Any] = self.kubernetes.read(f"{PLANS}/fleet").get("status") or {}
        return found

    def node_status(self, name: str) -> dict[str, Any]:
        return next(each for each in self.status()["nodes"] if each["name"] == name)

    def once(self, name: str = "fleet") -> float | None:
        return asyncio.run(self.reconciler.once(name))

    def step(self) -> float | None:
        """One step of the operator, one look of everybody else; time passes as the operator asks."""
        waits_s = self.once()
        self.nodes.tick()
        self.time += timedelta(seconds=waits_s or 0.0)
        return waits_s

    def until(self, holds: Callable[[], bool], most: int = 120) -> None:
        for _ in range(most):
            if holds():
                return
            self.step()
        raise AssertionError(f"never: {self.status()}")

    def done(self) -> bool:
        return self.status().get("phase") == "Succeeded"

    def in_phase(self, node: str, phase: str) -> Callable[[], bool]:
        return lambda: any(each["name"] == node and each["phase"] == phase for each in self.status().get("nodes", []))

    def events(self) -> list[str]:
        return [
            each["reason"]
            for each in self.kubernetes.items("/api/v1/namespaces/default/events")
            if each["involvedObject"]["kind"] == "PartitionPlan"
        ]


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def free(node: dict[str, Any]) -> bool:
    """Nobody's: no cordon, no taint, no note of ours."""
    notes = [key for key in node["metadata"].get("annotations") or {} if "aim.amd.com" in key]
    return not node["spec"].get("unschedulable") and not node["spec"].get("taints") and not notes


def advertised(node: dict[str, Any]) -> dict[str, str]:
    return {name: count for name, count in node["status"]["allocatable"].items() if count != "0"}


def test_a_node_is_switched_and_everybody_sees_it(world: World) -> None:
    node = world.nodes.add("n0")
    world.plan(n0="CPX/NPS4")
    world.until(world.done)
    assert node.modes == ["CPX/NPS4"]
    assert node.switches == ["cpx-nps4-x1"]
    assert advertised(world.nodes.object("n0")) == CPX
    assert free(world.nodes.object("n0"))
    assert world.status()["progress"] == "1/1"
    assert {each["type"]: each["status"] for each in world.status()["conditions"]}["Ready"] == "True"
    assert "NodeSucceeded" in world.events()
    done = {"from": "SPX/NPS1", "to": "CPX/NPS4", "phase": "WaitingOperator"}
    assert world.metrics.get_sample_value("aim_partition_switch_seconds_count", done) == 1
    assert world.trail == ["partition_draining", "partition_applying", "partition_succeeded"]
    assert not [pod for pod in world.kubernetes.items("/api/v1/pods") if pod["metadata"]["name"].startswith("aim-read")]


def test_the_label_says_success_and_the_files_another_thing(world: World) -> None:
    node = world.nodes.add("n0", lies=True)
    world.plan(n0="CPX/NPS4")
    world.until(world.in_phase("n0", "Failed"))
    told = world.node_status("n0")
    assert told["reason"] == "ReadBackDiffers"
    assert "the label says success, but card 0 is in SPX/NPS1, planned is CPX/NPS4" in told["message"]
    assert "KFD counts 1 devices, planned are 8" in told["message"]
    assert world.status()["phase"] == "Failed"
    drained = world.nodes.object("n0")
    assert drained["spec"]["unschedulable"]
    assert TAINT in drained["spec"]["taints"], "nothing may start on it"
    assert "ReadBackDiffers" in world.events()
    node.lies = False
    world.until(world.done)
    assert free(world.nodes.object("n0"))


def test_a_failed_switch_is_tried_again_and_then_no_more(world: World) -> None:
    node = world.nodes.add("n0", fails=2)
    world.plan(n0="CPX/NPS4")
    world.until(world.done)
    assert len(node.switches) == 3
    node.fails = 99
    world.kubernetes.patch(f"{PLANS}/fleet", {"spec": {"backoffLimit": 1, **plan_object(n0="DPX/NPS2")["spec"]}})
    world.until(lambda: not world.done())
    world.until(lambda: "nextTryAt" not in world.node_status("n0") and world.node_status("n0")["phase"] == "Failed")
    assert world.node_status("n0")["attempts"] == 2
    assert "PartitionFailure" in world.node_status("n0")["message"], "what the manager said is passed on"
    world.step()
    assert world.status()["phase"] == "Failed"
    assert world.node_status("n0")["attempts"] == 2


def test_one_node_at_a_time_and_none_after_a_failure(world: World) -> None:
    first, second = world.nodes.add("n0", fails=99), world.nodes.add("n1")
    world.plan(n0="CPX/NPS4", n1="CPX/NPS4")
    world.until(world.in_phase("n0", "Failed"))
    world.step()
    assert second.switches == []
    assert free(world.nodes.object("n1"))
    first.fails = 0
    world.until(world.in_phase("n0", "WaitingOperator"))
    assert world.node_status("n1")["phase"] == "Pending"
    world.until(world.done)
    assert second.modes == ["CPX/NPS4"]


def test_nothing_begins_while_a_node_is_missing(world: World) -> None:
    node = world.nodes.add("n0")
    world.plan(n0="CPX/NPS4", n7="CPX/NPS4")
    world.until(lambda: world.status().get("phase") == "Refused")
    assert "no such nodes: n7" in world.status()["message"]
    assert free(world.nodes.object("n0"))
    assert not node.switches
    assert "NodesMissing" in world.events()
    world.nodes.add("n7")
    world.until(world.done)


def test_a_mode_that_the_card_cannot_have_is_refused_before_anything_is_done(world: World) -> None:
    world.nodes.add("n0")
    world.plan(n0="QPX/NPS4")
    world.until(lambda: world.status().get("phase") == "Refused")
    assert "n0 card 0: mode QPX/NPS4" in world.status()["message"]
    assert "aim-profile plan" in world.status()["message"]
    assert free(world.nodes.object("n0"))


def test_services_that_share_a_device_are_refused(world: World) -> None:
    body = plan_object(n0="CPX/NPS4")
    body["spec"]["plan"]["placements"] = [placement(at, memory_limit_gib=1) for at in range(2)]
    world.nodes.add("n0")
    world.kubernetes.create(PLANS, body)
    world.step()
    assert world.status()["phase"] == "Refused"
    assert "the device plugin gives a device to one pod" in world.status()["message"]


def test_the_plugin_misses_a_partition(world: World) -> None:
    """The label says success and the files agree: what counts is what pods can ask for."""
    node = world.nodes.add("n0")
    node.misses = 1
    world.plan(n0="CPX/NPS4")
    world.until(world.in_phase("n0", "WaitingAllocatable"))
    world.step()
    assert world.node_status("n0")["message"] == "advertises amd.com/cpx_nps4: 7, planned is amd.com/cpx_nps4: 8"
    world.time += timedelta(hours=1)
    world.step()
    assert world.node_status("n0")["phase"] == "Failed"
    assert world.nodes.object("n0")["spec"]["unschedulable"]
    node.misses = 0
    world.until(world.done)


@pytest.mark.parametrize(
    ("phase", "body", "said"),
    [
        ("WaitingOperator", {"metadata": {"labels": {"dcm.amd.com/gpu-config-profile": "mine"}}}, "and is mine"),
        ("WaitingOperator", {"spec": {"taints": None}}, "the taint amd-dcm=up:NoExecute was taken"),
        ("Verifying", {"spec": {"unschedulable": None}}, "n0 was uncordoned by somebody else"),
        ("Refreshing", {"metadata": {"annotations": {"partition.aim.amd.com/plan": "other"}}}, "and is other"),
    ],
)
def test_another_hand_in_the_middle_is_named(world: World, phase: str, body: dict[str, Any], said: str) -> None:
    node = world.nodes.add("n0", silent=True)
    world.plan(n0="CPX/NPS4")
    world.until(world.in_phase("n0", "WaitingOperator"))
    node.silent = phase == "WaitingOperator"
    world.until(world.in_phase("n0", phase))
    world.kubernetes.patch("/api/v1/nodes/n0", body)
    world.once()
    told = world.node_status("n0")
    assert (told["phase"], told["reason"]) == ("Failed", "ForeignEdit")
    assert said in told["message"]
    assert "ForeignEdit" in world.events()


def test_a_node_that_another_plan_took_first_is_left_alone(world: World) -> None:
    world.nodes.add("n0")
    world.plan(n0="CPX/NPS4")
    world.until(world.in_phase("n0", "Draining"))
    held = {"metadata": {"annotations": {"partition.aim.amd.com/plan": "other"}}, "spec": {"unschedulable": True}}
    world.kubernetes.patch("/api/v1/nodes/n0", held)
    world.once()
    assert world.node_status("n0")["reason"] == "ForeignEdit"
    kept = world.nodes.object("n0")
    assert kept["metadata"]["annotations"]["partition.aim.amd.com/plan"] == "other"
    assert not kept["spec"].get("taints")
    assert kept["spec"]["unschedulable"]


def test_a_plan_edited_in_the_middle_waits_for_the_node_under_way(world: World) -> None:
    node = world.nodes.add("n0")
    world.plan(n0="CPX/NPS4")
    world.until(world.in_phase("n0", "Applying"))
    world.kubernetes.patch(f"{PLANS}/fleet", {"spec": plan_object(n0="DPX/NPS2")["spec"]})
    world.until(lambda: node.modes == ["CPX/NPS4"])
    world.until(lambda: node.modes == ["DPX/NPS2"])
    world.until(world.done)
    assert node.switches == ["cpx-nps4-x1", "dpx-nps2-x1"]
    assert "PlanEdited" in world.events()
    assert world.status()["observedGeneration"] == 2


def test_pods_are_evicted_and_a_budget_is_waited_for(world: World) -> None:
    world.nodes.add("n0")
    pod = {"nodeName": "n0", "containers": [{"name": "m", "image": "i", "resources": {"limits": {"amd.com/gpu": "1"}}}]}
    world.kubernetes.create("/api/v1/namespaces/default/pods", {"metadata": {"name": "chat"}, "spec": pod})
    world.kubernetes.evictions_refused = 2
    world.plan(n0="CPX/NPS4")
    world.until(world.in_phase("n0", "Draining"))
    world.step()
    world.step()
    assert "default/chat (asks for amd.com/gpu)" in world.node_status("n0")["message"]
    assert not world.nodes.object("n0")["spec"].get("taints"), "nothing is killed while it may still end by itself"
    world.until(world.done)


def test_a_budget_that_never_allows_it_gives_the_node_back(world: World) -> None:
    world.nodes.add("n0")
    pod = {"nodeName": "n0", "containers": [{"name": "m", "image": "i"}]}
    world.kubernetes.create("/api/v1/namespaces/default/pods", {"metadata": {"name": "chat"}, "spec": pod})
    world.kubernetes.evictions_refused = 99
    world.plan(n0="CPX/NPS4")
    world.until(world.in_phase("n0", "Draining"))
    world.step()
    world.time += timedelta(hours=1)
    world.step()
    assert world.node_status("n0")["phase"] == "Failed"
    assert free(world.nodes.object("n0"))


def test_who_holds_the_devices_and_stays_is_restarted_then_named(world: World) -> None:
    """gpu-operator#421: an exporter that tolerates the taint holds /dev/kfd, and the switch fails with Device busy."""
    world.nodes.exporter_stays = True
    world.nodes.add("n0")
    world.plan(n0="CPX/NPS4")
    world.until(world.in_phase("n0", "Failed"))
    told = world.node_status("n0")
    assert told["reason"] == "DeviceHeld"
    assert f"{NAMESPACE}/gpu-metrics-exporter-n0" in told["message"]
    assert "mounts /dev" in told["message"]
    assert free(world.nodes.object("n0")), "nothing was switched: it is given back"


def test_two_plans_take_turns(world: World) -> None:
    world.nodes.add("n0")
    world.nodes.add("n1", silent=True)
    world.kubernetes.create(PLANS, plan_object("other", n1="CPX/NPS4"))
    for _ in range(12):
        world.once("other")
        world.nodes.tick()
    world.plan(n0="CPX/NPS4")
    world.step()
    assert "plan other is at n1: one node at a time" in world.node_status("n0")["message"]
    world.nodes.nodes["n1"].silent = False

    def both() -> bool:
        world.once("other")
        return world.done()

    world.until(both)


def test_a_profile_of_that_name_that_says_another_thing_stays(world: World) -> None:
    node = world.nodes.add("n0")
    theirs = '{"gpu-config-profiles": {"cpx-nps4-x1": {"profiles": []}, "mine": {"profiles": []}}}'
    body = {"metadata": {"name": "default-dcm-config"}, "data": {"config.json": theirs}}
    path = f"/api/v1/namespaces/{NAMESPACE}/configmaps"
    world.kubernetes.create(path, body)
    world.plan(n0="CPX/NPS4")
    world.until(lambda: "says something else" in world.status().get("message", ""))
    assert world.kubernetes.read(f"{path}/default-dcm-config")["data"]["config.json"] == theirs
    kept = theirs.replace("cpx-nps4-x1", "theirs")
    world.kubernetes.patch(f"{path}/default-dcm-config", {"data": {"config.json": kept}})
    world.until(world.done)
    assert '"mine"' in world.kubernetes.read(f"{path}/default-dcm-config")["data"]["config.json"]
    assert node.modes == ["CPX/NPS4"]


def test_drift_is_named_and_not_mended_behind_anybodys_back(world: World) -> None:
    world.nodes.add("n0")
    world.plan(n0="CPX/NPS4")
    world.until(world.done)
    found = {"amd.com/cpx_nps4": "0", "amd.com/spx_nps1": "1"}
    world.kubernetes.patch("/api/v1/nodes/n0/status", {"status": {"allocatable": found}})
    world.step()
    assert world.status()["drift"] == "n0: advertises amd.com/spx_nps1: 1, planned is amd.com/cpx_nps4: 8"
    assert "Drift" in world.events()
    assert free(world.nodes.object("n0"))


def test_a_node_that_goes_in_the_middle_is_named(world: World) -> None:
    world.nodes.add("n0", silent=True)
    world.plan(n0="CPX/NPS4")
    world.until(world.in_phase("n0", "WaitingOperator"))
    world.kubernetes.delete("/api/v1/nodes/n0")
    world.nodes.nodes.clear()
    world.step()
    assert world.node_status("n0")["reason"] == "NodeMissing"


@pytest.mark.parametrize("phase", ["Draining", "WaitingOperator", "Refreshing"])
def test_a_deleted_plan_gives_the_node_back(world: World, phase: str) -> None:
    node = world.nodes.add("n0", silent=phase == "WaitingOperator")
    world.plan(n0="CPX/NPS4")
    world.until(world.in_phase("n0", phase))
    for _ in range(10):
        waits_s = asyncio.run(world.reconciler.release("fleet"))
        if waits_s is None:
            break
        assert phase == "WaitingOperator", "only the manager's answer is waited for"
        node.silent = False
        world.nodes.tick()
    assert waits_s is None
    assert free(world.nodes.object("n0"))


@pytest.mark.parametrize("dies", ["before", "after"])
def test_a_crash_at_every_write(world: World, dies: str) -> None:
    """The process dies at each of its writes once: the node gets there all the same, and each thing is told once."""
    node = world.nodes.add("n0")
    world.plan(n0="CPX/NPS4")
    world.cluster.dies = dies
    crashes = 0
    while not world.done() and crashes < 100:
        try:
            world.step()
        except Crash:
            crashes += 1
    assert world.done()
    assert crashes > 10
    assert node.modes == ["CPX/NPS4"]
    assert free(world.nodes.object("n0"))
    assert len(world.events()) == len(set(world.events()))


def test_conflicts_are_looked_at_anew(world: World) -> None:
    node = world.nodes.add("n0")
    world.plan(n0="CPX/NPS4")
    world.kubernetes.conflicts = 10
    world.until(world.done)
    assert node.switches == ["cpx-nps4-x1"]


KSERVE = "/apis/serving.kserve.io/v1beta1/namespaces/team/inferenceservices"
PODS = "/api/v1/namespaces/team/pods"
TEAM = ("node", "card", "partition")


def served(world: World, *nodes: str, resource: str = "amd.com/cpx_nps4", **spec: Any) -> None:
    """An InferenceService `chat`, and its pods."""
    world.kubernetes.create(KSERVE, {"metadata": {"name": "chat"}})
    for at, node in enumerate(nodes):
        labels = {"serving.kserve.io/inferenceservice": "chat"}
        container = {"name": "m", "resources": {"limits": {resource: "1"}}}
        pod = {"nodeName": node, "containers": [container], **spec}
        metadata = {"name": f"chat-{at}", "labels": labels}
        world.kubernetes.create(PODS, {"metadata": metadata, "spec": pod, "status": {"phase": "Running"}})


def placed(world: World, *placements: dict[str, Any]) -> None:
    """A node as planned already, and where the replicas are planned."""
    world.nodes.add("n0", mode="CPX/NPS4")
    body = plan_object(n0="CPX/NPS4")
    body["spec"]["plan"]["placements"] = list(placements)
    world.kubernetes.create(PLANS, body)


def test_where_each_service_is_stands_in_the_plan_and_on_the_service(world: World) -> None:
    placed(world, placement(0, 3), placement(1, 4))
    served(world, "n0", "n0")
    world.until(lambda: world.status().get("places") == "chat=n0/0/3 chat=n0/0/4")
    assert [each["source"] for each in world.status()["services"]] == ["plan", "plan"]
    assert world.status()["drift"] == "none"
    assert "annotations" not in world.kubernetes.read(f"{KSERVE}/chat")["metadata"], "KServe would restart its pods"
    assert "serviceAnnotationDisallowedList" in world.status()["message"]
    keys = [f"status.aim.amd.com/{name}" for name in TEAM]
    assert all(note in world.status()["message"] for note in NOTES)
    config = {"inferenceService": json.dumps({"serviceAnnotationDisallowedList": NOTES})}
    path = "/api/v1/namespaces/kserve/configmaps"
    world.kubernetes.create(path, {"metadata": {"name": "inferenceservice-config"}, "data": config})
    world.step()
    notes = world.kubernetes.read(f"{KSERVE}/chat")["metadata"]["annotations"]
    assert [notes[key] for key in keys] == ["n0,n0", "0,0", "3,4"]


def test_a_service_that_is_elsewhere_is_drift(world: World) -> None:
    placed(world, placement(0, 3), placement(1, 4), placement(2, 5))
    served(world, "n7", "n0")
    world.until(lambda: len(world.status().get("services", [])) == 3)
    first, second, third = world.status()["services"]
    assert "drift" not in first
    assert second["drift"] == "is on n7, planned is n0"
    assert third["drift"] == "no pod of it runs"
    assert "chat: is on n7, planned is n0" in world.status()["drift"]


def test_a_pod_of_another_mode_is_drift(world: World) -> None:
    placed(world, placement(0, 3))
    served(world, "n0", resource="amd.com/spx_nps1")
    world.until(lambda: bool(world.status().get("services")))
    assert world.status()["services"][0]["drift"] == "asks for amd.com/spx_nps1, planned is amd.com/cpx_nps4"


def test_a_claim_says_which_device_it_is(world: World) -> None:
    placed(world, placement(0, 3))
    served(world, "n0", resourceClaims=[{"name": "gpu", "resourceClaimName": "chat-gpu"}])
    results = [{"driver": "gpu.amd.com", "pool": "n0", "device": "gpu-2-130"}]
    claim = {"metadata": {"name": "chat-gpu"}, "status": {"allocation": {"devices": {"results": results}}}}
    world.kubernetes.create("/apis/resource.k8s.io/v1/namespaces/team/resourceclaims", claim)
    devices = [
        {
            "name": f"gpu-{at}-{128 + at}",
            "attributes": {"parentPciAddr": {"string": "0000:05:00.0"}, "renderIndex": {"int": 128 + at}},
        }
        for at in range(8)
    ]
    spec = {"driver": "gpu.amd.com", "nodeName": "n0", "devices": devices}
    world.kubernetes.create("/apis/resource.k8s.io/v1/resourceslices", {"metadata": {"name": "s"}, "spec": spec})
    world.until(lambda: bool(world.status().get("services")))
    (place,) = world.status()["services"]
    assert (place["card"], place["partition"], place["source"]) == ("0", "2", "claim")
    assert place["drift"] == "is on card 0 partition 2, planned is card 0 partition 3"
