"""A PartitionPlan brought to pass: what is to be done is decided by what is seen, one node at a time.

Nothing is kept in memory. Before anything else the node that is under way goes to its end, by what the status says it
was begun for; then the plan as it is now is looked at whole, and no node is begun while one is missing, has failed, or
is in another plan's hands.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any

from aim_operator.audit import Audit
from aim_operator.cluster import NODES, PARTITION_PLANS, ApiError, Cluster
from aim_operator.events import tell
from aim_profile.errors import AimProfileError
from aim_profile.files.read import check
from aim_profile.plans import dcm
from aim_profile.plans.plan import Plan, PlanError

from . import places
from .conditions import conditions
from .hands import ForeignProfile, Hands, Place
from .metrics import Switches
from .node_walk import Do, Limits, Move, advance, is_as_planned
from .seen import Object, SeenNode, seen_node
from .status import RESTING, NodeStatus, PlaceStatus
from .target import Target, targets

_LOG = logging.getLogger(__name__)
#: Between two looks at a plan on which there is nothing to do.
REST_S = 30.0
_SOON_S = 0.5
_GIVES_BACK = (Do("unread"), Do("untaint"), Do("release"))


class Reconciler:
    """now: the time of day; every call raises ApiError, and may be made again from the beginning."""

    def __init__(
        self,
        cluster: Cluster,
        place: Place,
        switches: Switches,
        audit: Audit,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._cluster, self._place, self._switches, self._audit, self._now = cluster, place, switches, audit, now

    async def once(self, name: str) -> float | None:
        """One step. Returns the seconds until the next; None where there is no such plan, or it is going."""
        plan = await self._cluster.get(PARTITION_PLANS, name)
        if plan is None or "deletionTimestamp" in plan["metadata"]:
            return None
        try:
            return await (await self._pass(plan)).step()
        except ApiError as error:
            if error.status.code != 409:
                raise
            _LOG.debug("%s: %s; looked at anew", name, error)
            return _SOON_S

    async def release(self, name: str) -> float | None:
        """Give back what a plan that is deleted still holds. None: nothing is left; else seconds until to ask again.

        A node that the Device Config Manager is at is waited for; one that failed is given back as it is, and said.
        """
        plan = await self._cluster.get(PARTITION_PLANS, name)
        return None if plan is None else await (await self._pass(plan)).release()

    async def _pass(self, plan: Object) -> _Pass:
        nodes = {each["metadata"]["name"]: each for each in await self._cluster.list(NODES)}
        return _Pass(self._cluster, self._place, self._switches, self._audit, plan, nodes, self._now())


class _Pass:
    """One look at a plan, and one step."""

    def __init__(
        self,
        cluster: Cluster,
        place: Place,
        switches: Switches,
        audit: Audit,
        plan: Object,
        nodes: Mapping[str, Object],
        now: datetime,
    ) -> None:
        self._cluster, self._place, self._switches, self._plan, self._now = cluster, place, switches, plan, now
        self._audit, self._objects = audit, nodes
        self._name: str = plan["metadata"]["name"]
        self._generation: int = plan["metadata"].get("generation", 1)
        self._status: Mapping[str, Any] = plan.get("status") or {}
        self._strategy: dcm.Strategy = plan["spec"].get("strategy", "mixed")
        self._limits = Limits(plan["spec"].get("stepTimeoutSeconds", 1800.0), plan["spec"].get("backoffLimit", 3))
        listed = [NodeStatus.model_validate(each) for each in self._status.get("nodes") or ()]
        self._nodes = {each.name: each for each in listed}

    async def step(self) -> float:
        under_way = next((each for each in self._nodes.values() if each.phase not in RESTING), None)
        if under_way is not None:
            return await self._go_on(under_way)
        try:
            plan = check(Plan, self._plan["spec"]["plan"], "spec.plan", PlanError)
            wanted = targets(plan, self._strategy)
        except AimProfileError as problem:
            return await self._refuse("PlanRefused", str(problem))
        if missing := sorted(target.node for target in wanted if target.node not in self._objects):
            remedy = "add them to the cluster, or plan again for the nodes that are there"
            return await self._refuse(
                "NodesMissing", f"no such nodes: {', '.join(missing)}; {remedy}. No node was begun."
            )
        await self._taken_up(wanted)
        for target in wanted:
            if (waits_s := await self._look_at(target)) is not None:
                return waits_s
        return await self._settled(plan, wanted)

    # --- one node -----------------------------------------------------------------------------------------------------

    async def _go_on(self, status: NodeStatus) -> float:
        """By what it was begun for, whatever the plan says now."""
        if status.generation != self._generation:
            await self._tell(
                "Warning",
                "PlanEdited",
                f"{status.name} is being switched for generation {status.generation}; generation "
                f"{self._generation} is looked at once it is done",
            )
        node = self._objects.get(status.name)
        if node is None:
            gone = {"reason": "NodeMissing", "message": f"{status.phase}: the node is gone", "next_try_at": self._now}
            return await self._write(status.model_copy(update={"phase": "Failed", **gone}), status)
        target = Target(status.name, status.modes, status.devices, self._strategy)
        return await self._advance(status, target, node)

    async def _advance(self, status: NodeStatus, target: Target, node: Object) -> float:
        hands = Hands(self._cluster, self._place, self._name, node)
        move = advance(status, target, await hands.view(status), self._name, self._limits, self._now)
        try:
            for do in move.do:
                await hands.do(do, target, status)
        except ForeignProfile as foreign:
            move = Move(
                status.model_copy(update={"reason": "ForeignEdit", "message": f"{foreign}; take it out"}), (), 10.0
            )
        written = await self._write(move.status, status)
        return move.wait_s or written

    async def _look_at(self, target: Target) -> float | None:
        """None: nothing is to be done here, look at the next."""
        status, object_ = self._nodes[target.node], self._objects[target.node]
        node = seen_node(object_)
        if status.phase == "Failed":
            return await self._advance(status, target, object_)
        if status.phase == "Succeeded":
            return None
        if is_as_planned(node, target):
            done = {"phase": "Succeeded", "message": f"{target.text} already", "since": self._now}
            return await self._write(status.model_copy(update=done), status)
        if reason := self._may_not_begin(node):
            return await self._write(status.model_copy(update={"reason": "Waiting", "message": reason}), status) + 5.0
        return await self._advance(status, target, object_)

    def _may_not_begin(self, node: SeenNode) -> str:
        if self._plan["spec"].get("suspend"):
            return "the plan is suspended"
        held = [(name, seen_node(each).held_by) for name, each in self._objects.items()]
        other = next(((name, by) for name, by in held if by not in (None, self._name)), None)
        return f"plan {other[1]} is at {other[0]}: one node at a time" if other else ""

    async def _taken_up(self, wanted: tuple[Target, ...]) -> None:
        """This generation's nodes; those of before that are as they were keep what is known of them."""
        kept = {}
        for target in wanted:
            was = self._nodes.get(target.node)
            same = was is not None and (was.modes, was.devices) == (target.modes, target.devices)
            if was is not None and (was.generation == self._generation or (same and was.phase == "Succeeded")):
                kept[target.node] = was.model_copy(update={"generation": self._generation})
            else:
                kept[target.node] = self._fresh(target, touched=was is not None and was.touched)
        for name, was in self._nodes.items():
            if name not in kept and was.phase == "Failed" and name in self._objects:
                await self._give_back(was)
        self._nodes = kept

    def _fresh(self, target: Target, touched: bool) -> NodeStatus:
        labels = self._objects[target.node]["metadata"].get("labels") or {}
        known = {
            "name": target.node,
            "from": _as_mode(labels.get(dcm.PARTITION_LABEL)),
            "to": target.text,
            "profile": target.profile,
            "generation": self._generation,
            "modes": target.modes,
            "devices": target.devices,
            "touched": touched,
        }
        return NodeStatus.model_validate(known)

    # --- the end ------------------------------------------------------------------------------------------------------

    async def _settled(self, plan: Plan, wanted: tuple[Target, ...]) -> float:
        """All nodes are done: is all still as it was verified, and where is who?"""
        for target in wanted:
            status, node = self._nodes[target.node], seen_node(self._objects[target.node])
            text = "" if node.allocatable == target.allocatable else _drift(node, target)
            if text and text != status.drift:
                await self._tell("Warning", "Drift", f"{target.node}: {text}")
            self._nodes[target.node] = status.model_copy(update={"drift": text})
        found, said = await places.find(self._cluster, plan, self._nodes)
        if said:
            await self._tell("Warning", "NotAnnotated", said)
        await self._put("Succeeded", said, found)
        return REST_S

    async def release(self) -> float | None:
        for status in self._nodes.values():
            node = self._objects.get(status.name)
            if node is None or seen_node(node).held_by != self._name:
                continue
            works = status.phase == "WaitingOperator" and seen_node(node).state not in ("success", "failure")
            if works and (self._now - (status.since or self._now)).total_seconds() <= self._limits.step_s:
                return 2.0
            await self._give_back(status)
        return None

    async def _give_back(self, status: NodeStatus) -> None:
        target = Target(status.name, status.modes, status.devices, self._strategy)
        hands = Hands(self._cluster, self._place, self._name, self._objects[status.name])
        for what in _GIVES_BACK:
            await hands.do(what, target, status)
        await self._tell("Warning", "NodeReleased", f"{status.name} was given back in the middle of {status.phase}")

    # --- what is said -------------------------------------------------------------------------------------------------

    async def _refuse(self, reason: str, message: str) -> float:
        await self._tell("Warning", reason, message)
        await self._put("Refused", message, None, reason)
        return REST_S

    async def _write(self, status: NodeStatus, was: NodeStatus) -> float:
        if status.phase != was.phase:
            kind, reason = ("Warning", status.reason) if status.phase == "Failed" else ("Normal", f"Node{status.phase}")
            told = f"{status.name}: {status.message or f'{status.was} to {status.to}'}"
            await self._tell(kind, reason, told, str(status.attempts))
            self._audited(status)
        self._nodes[status.name] = status
        await self._put(self._phase())
        if status.phase != was.phase and was.since is not None and was.phase not in RESTING:
            self._switches.took(was.was, was.to, was.phase, (self._now - was.since).total_seconds())
        return 0.0

    def _audited(self, status: NodeStatus) -> None:
        """What changes a node, and how it ended."""
        outcome = {"Succeeded": "ok", "Failed": "failed"}.get(status.phase, "begun")
        if status.phase in ("Draining", "Applying", "Succeeded", "Failed"):
            self._audit(
                f"partition_{status.phase.lower()}",
                "Node",
                status.name,
                outcome=outcome,
                reason=status.message or None,
                plan=self._name,
                to=status.to,
            )

    def _phase(self) -> str:
        phases = {each.phase for each in self._nodes.values()}
        if "Failed" in phases:
            return "Failed"
        if phases <= {"Succeeded"}:
            return "Succeeded"
        waits = phases <= {"Succeeded", "Pending"}
        return "Suspended" if waits and self._plan["spec"].get("suspend") else "Running"

    @property
    def _observed(self) -> int:
        """The generation that the node under way was begun for, else the plan's."""
        under_way = (each.generation for each in self._nodes.values() if each.phase not in RESTING)
        return next(under_way, self._generation)

    async def _tell(self, kind: Any, reason: str, message: str, once: str = "") -> None:
        await tell(self._cluster, self._plan, kind, reason, message, f"{self._generation}/{once}")

    async def _put(
        self, phase: str, message: str = "", found: list[PlaceStatus] | None = None, reason: str = ""
    ) -> None:
        """The status as a whole, where it is another than before. Raises Conflict where somebody was faster."""
        nodes = [each.as_object() for each in self._nodes.values()]
        services = self._status.get("services") or [] if found is None else [each.as_object() for each in found]
        message = message or next((f"{each.name}: {each.message}" for each in self._nodes.values() if each.message), "")
        drift = [f"{each.name}: {each.drift}" for each in self._nodes.values() if each.drift]
        drift += [f"{each['service']}: {each['drift']}" for each in services if each.get("drift")]
        status = {
            "observedGeneration": self._observed,
            "phase": phase,
            "message": message,
            "progress": f"{sum(each.phase == 'Succeeded' for each in self._nodes.values())}/{len(nodes)}",
            "current": next((f"{n.name} {n.phase}" for n in self._nodes.values() if n.phase not in RESTING), ""),
            "places": places.in_words(services),
            "drift": "; ".join(drift) or "none",
            "nodes": nodes,
            "services": services,
        }
        told = conditions(phase, reason, message, drift, self._status.get("conditions") or [], self._now)
        status["conditions"] = [{**each, "observedGeneration": self._observed} for each in told]
        if status != self._status:
            body = {"metadata": {"resourceVersion": self._plan["metadata"]["resourceVersion"]}, "status": status}
            self._plan = await self._cluster.patch(PARTITION_PLANS, self._name, body, status=True) or self._plan


def _as_mode(label: str | None) -> str:
    """The node labeller's `cpx_nps4` as `CPX/NPS4`; empty where it does not say."""
    return (label or "").upper().replace("_", "/")


def _drift(node: SeenNode, target: Target) -> str:
    found = ", ".join(f"{name}: {count}" for name, count in sorted(node.allocatable.items())) or "nothing"
    wanted = ", ".join(f"{name}: {count}" for name, count in target.allocatable.items())
    return f"advertises {found}, planned is {wanted}"
