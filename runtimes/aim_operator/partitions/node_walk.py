"""One node's way to its modes, a step at a time: what is seen and where it stood → what to do, and where it is then.

Pure. Each step may be done twice: the state after it is written when it is done, and a crash between repeats it. What
the walk waits for it sees on the node, never in its own memory. A node on which something failed after the Device
Config Manager was asked stays cordoned and tainted; one that was not touched yet is given back as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
from typing import Any, Literal, NamedTuple

from aim_profile.plans import dcm

from .read_back import Reader
from .seen import SeenNode, SeenPod
from .status import NodeStatus, Phase
from .target import Target


class Limits(NamedTuple):
    """step_s: what a phase may take; the Device Config Manager itself tries for 30 minutes. tries: after the first."""

    step_s: float = 1800.0
    tries: int = 3
    first_pause_s: float = 30.0
    longest_pause_s: float = 600.0


class Do(NamedTuple):
    """Something to do on the node; pod: evict, delete."""

    what: Literal[
        "claim", "evict", "delete", "taint", "untaint", "forget", "profile", "label", "read", "unread", "release"
    ]
    pod: SeenPod | None = None


class View(NamedTuple):
    """What is seen now. reader: None: no reader's pod; said: by the Device Config Manager, of late."""

    node: SeenNode
    pods: Sequence[SeenPod] = ()
    reader: Reader | None = None
    said: str = ""


class Move(NamedTuple):
    """do: in this order, then `status` is written; wait_s: until the next look, 0: at once."""

    status: NodeStatus
    do: tuple[Do, ...] = ()
    wait_s: float = 0.0


_LOOK_S = 2.0
#: In these the node must still be as the walk left it.
_TAINTED: frozenset[Phase] = frozenset({"Applying", "WaitingOperator", "Verifying"})
_LABELLED: frozenset[Phase] = frozenset({"WaitingOperator", "Verifying", "Refreshing", "WaitingAllocatable"})
_HELD: frozenset[Phase] = _TAINTED | _LABELLED | {"Tainting"}


def is_as_planned(node: SeenNode, target: Target) -> bool:
    """Whether it advertises what the plan says, and is in nobody's hands."""
    label = node.labels.get(dcm.PARTITION_LABEL)
    named = label is None or target.label is None or label == target.label
    return named and not node.tainted and node.held_by is None and node.allocatable == target.allocatable


def advance(was: NodeStatus, target: Target, view: View, plan: str, limits: Limits, now: datetime) -> Move:
    """The next step of the node, of the plan called `plan`."""
    if was.phase == "Failed":
        return _failed(was, now)
    if foreign := _foreign_edit(was, target, view.node, plan):
        return _fail(was, "ForeignEdit", foreign, limits, now)
    late = was.since is not None and (now - was.since).total_seconds() > limits.step_s
    move = _STEPS[was.phase](was, target, view, now)
    if late and move.status.phase == was.phase:
        waited = move.status.message or f"still {was.phase}"
        return _fail(was, move.status.reason or "Timeout", f"{waited}, after {limits.step_s:.0f} s", limits, now)
    if move.status.phase == "Failed":
        return _fail(was, move.status.reason, move.status.message, limits, now)
    return move


# --- the steps, in their order ------------------------------------------------------------------------------------


def _pending(was: NodeStatus, target: Target, view: View, now: datetime) -> Move:
    return Move(_at(was, "Draining", now))


def _draining(was: NodeStatus, target: Target, view: View, now: datetime) -> Move:
    """Cordoned, and what would not stay anyway is evicted, so that its disruption budgets count."""
    if view.node.held_by is None or not view.node.cordoned:
        return Move(was, (Do("claim"),))
    leaving = [pod for pod in view.pods if pod.daemonset is None and (pod.holds or not pod.stays)]
    if not leaving:
        return Move(_at(was, "Tainting", now))
    return Move(
        _told(was, "Evicting", _named("waits until these pods are gone: ", leaving)),
        tuple(Do("evict", pod) for pod in leaving),
        _LOOK_S,
    )


def _tainting(was: NodeStatus, target: Target, view: View, now: datetime) -> Move:
    """With the taint go the daemons that do not tolerate it; who holds the devices and stays starts anew once."""
    if not view.node.tainted:
        return Move(was, (Do("taint"),))
    holders = [pod for pod in view.pods if pod.holds and not pod.is_manager]
    if not holders:
        return Move(_at(was, "Applying", now, cleared=False))
    told = _told(was, "DeviceHeld", _named("these pods hold the devices: ", holders))
    known = set(was.operands)
    again = [pod for pod in holders if pod.stays and pod.uid not in known]
    if again and known:
        return _failing(was, "DeviceHeld", _named("these pods come back and hold the devices: ", again))
    told = told.model_copy(update={"operands": tuple(sorted(known | {pod.uid for pod in again}))})
    return Move(told, tuple(Do("delete", pod) for pod in again), _LOOK_S)


def _applying(was: NodeStatus, target: Target, view: View, now: datetime) -> Move:
    """An old answer would be taken for the new one: it goes first. The manager acts where its label changes."""
    if not was.cleared:
        return Move(was.model_copy(update={"cleared": True}), (Do("unread"), Do("profile"), Do("forget")))
    return Move(_at(was, "WaitingOperator", now, touched=True), (Do("label"),))


def _waiting_operator(was: NodeStatus, target: Target, view: View, now: datetime) -> Move:
    said = f" ({view.said})" if view.said else ""
    if view.node.state == "success":
        return Move(_at(was, "Verifying", now))
    if view.node.state == "failure":
        return _failing(was, "DeviceConfigManagerFailed", f"the Device Config Manager says failure{said}")
    state = view.node.state or "nothing"
    told = _told(was, "NoAnswer", f"waits for the Device Config Manager, which says {state}{said}")
    return Move(told, (), _LOOK_S)


def _verifying(was: NodeStatus, target: Target, view: View, now: datetime) -> Move:
    """The label is what the manager thinks; the node's files say what is."""
    if view.reader is None:
        return Move(was, (Do("read"),), _LOOK_S)
    if not view.reader.ended:
        return Move(_told(was, "NotRead", f"waits for the node's read-back {view.reader.message}".strip()), (), _LOOK_S)
    if view.reader.answer is None:
        return _failing(was, "NotRead", f"the node could not be read: {view.reader.message}")
    if found := view.reader.answer.differences(target):
        return _failing(was, "ReadBackDiffers", "the label says success, but " + "; ".join(found))
    operands = tuple(sorted(pod.uid for pod in view.pods if pod.operand))
    return Move(_at(was, "Refreshing", now, operands=operands))


def _refreshing(was: NodeStatus, target: Target, view: View, now: datetime) -> Move:
    """Device plugin and labeller look at the devices only when they start: none of before the switch may be left."""
    if view.node.tainted:
        return Move(was, (Do("unread"), Do("untaint")))
    here = [pod for pod in view.pods if pod.operand]
    old = [pod for pod in here if pod.uid in was.operands]
    if not old and here and all(pod.ready for pod in here):
        return Move(_at(was, "WaitingAllocatable", now))
    missing = _named("waits for ", [pod for pod in here if not pod.ready]) if here else "waits for the device plugin"
    return Move(_told(was, "OperandsNotReady", missing), tuple(Do("delete", pod) for pod in old), _LOOK_S)


def _waiting_allocatable(was: NodeStatus, target: Target, view: View, now: datetime) -> Move:
    """What pods can ask for is what counts: a plugin can miss partitions that KFD has (ROCm/k8s-device-plugin#157)."""
    label = view.node.labels.get(dcm.PARTITION_LABEL)
    wrong_label = target.strategy == "single" and target.label is not None and label != target.label
    if view.node.allocatable == target.allocatable and not wrong_label:
        return Move(_at(was, "Uncordoning", now))
    found = f"label {label}" if wrong_label else _counts(view.node.allocatable)
    wanted = f"label {target.label}" if wrong_label else _counts(target.allocatable)
    return Move(_told(was, "AllocatableDiffers", f"advertises {found}, planned is {wanted}"), (), _LOOK_S)


def _uncordoning(was: NodeStatus, target: Target, view: View, now: datetime) -> Move:
    if view.node.held_by is not None:
        return Move(was, (Do("release"),))
    done = _at(was, "Succeeded", now, operands=(), cleared=False, touched=False, attempts=0)
    return Move(_told(done, "", f"{target.text}, read back and advertised"))


_Step = Callable[[NodeStatus, Target, View, datetime], Move]
_STEPS: dict[str, _Step] = {
    "Pending": _pending,
    "Draining": _draining,
    "Tainting": _tainting,
    "Applying": _applying,
    "WaitingOperator": _waiting_operator,
    "Verifying": _verifying,
    "Refreshing": _refreshing,
    "WaitingAllocatable": _waiting_allocatable,
    "Uncordoning": _uncordoning,
}


# --- what goes wrong ----------------------------------------------------------------------------------------------


def _foreign_edit(was: NodeStatus, target: Target, node: SeenNode, plan: str) -> str:
    """What somebody else has changed under our hands; empty where nothing is."""
    if was.phase == "Draining" and node.held_by not in (None, plan):
        return f"plan {node.held_by} has taken {node.name} in hand"
    if was.phase not in _HELD:
        return ""
    if node.held_by != plan:
        return f"the annotation that says whose {node.name} is was {plan}, and is {node.held_by or 'gone'}"
    if not node.cordoned:
        return f"{node.name} was uncordoned by somebody else"
    if was.phase in _TAINTED and not node.tainted:
        return f"the taint {dcm.TAINT} was taken from {node.name} by somebody else"
    if was.phase in _LABELLED and node.profile != target.profile:
        return f"the label {dcm.PROFILE_LABEL} was {target.profile}, and is {node.profile or 'gone'}"
    return ""


def _failing(was: NodeStatus, reason: str, message: str) -> Move:
    return Move(was.model_copy(update={"phase": "Failed", "reason": reason, "message": message}))


def _fail(was: NodeStatus, reason: str, message: str, limits: Limits, now: datetime) -> Move:
    """Tried again after a pause that doubles; given back where the Device Config Manager was never asked."""
    pause_s = min(limits.longest_pause_s, limits.first_pause_s * 2**was.attempts)
    again = now + timedelta(seconds=pause_s) if was.attempts < limits.tries else None
    failed = _at(was, "Failed", now, attempts=was.attempts + 1, next_try_at=again, operands=(), cleared=False)
    stays = " The node stays drained." if was.touched else ""
    status = _told(failed, reason, f"{was.phase}: {message}.{stays}")
    do = (Do("unread"),) if was.touched else (Do("unread"), Do("untaint"), Do("release"))
    return Move(status, do, pause_s)


def _failed(was: NodeStatus, now: datetime) -> Move:
    if was.next_try_at is None:
        return Move(was, (), 60.0)
    if now < was.next_try_at:
        return Move(was, (), (was.next_try_at - now).total_seconds())
    return Move(_at(was, "Draining", now, next_try_at=None))


# --- words --------------------------------------------------------------------------------------------------------


def _at(was: NodeStatus, phase: Phase, now: datetime, **more: Any) -> NodeStatus:
    return was.model_copy(update={"phase": phase, "since": now, "reason": "", "message": "", **more})


def _told(was: NodeStatus, reason: str, message: str) -> NodeStatus:
    return was.model_copy(update={"reason": reason, "message": message})


def _named(what: str, pods: Sequence[SeenPod], most: int = 5) -> str:
    told = [f"{pod.id} ({pod.holds})" if pod.holds else pod.id for pod in pods[:most]]
    return what + ", ".join(told) + (f" and {len(pods) - most} more" if len(pods) > most else "")


def _counts(found: Any) -> str:
    return ", ".join(f"{name}: {count}" for name, count in sorted(found.items())) or "nothing"
