"""From what runs to what is planned: ordered steps, and the loop that carries them out and checks each switch.

A node whose modes change goes: drain (cordon, taint, stop what is there) → switch (one Device Config Manager profile:
memory and compute mode together, so each node restarts its driver at most once) → verify by read-back → refresh (take
the taint away, which AMD's device plugin and node labeller do not tolerate; restart both, for they look at the node
only when they start: ROCm/gpu-operator#420, #382) → await (the kubelet advertises what the plan says) → undrain
(uncordon) → place: no pod starts on a node that is cordoned. Other nodes are only placed on. `amd-smi set` can exit 0
without switching, and a plugin can miss partitions (ROCm/k8s-device-plugin#157): nothing is placed before both agree.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from typing import Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field

from aim_profile.errors import AimProfileError
from aim_profile.nodes.facts import Node

from . import dcm
from .compare import Difference, allocatable_difference, plan_assert, where
from .dcm import Strategy
from .plan import CardPlan, Placement, Plan, PlanError

Action = Literal["stop", "drain", "switch", "verify", "refresh", "await", "undrain", "place"]
_Device = tuple[str, int, int]


class StepError(AimProfileError):
    """A step that did not do what it said. `field` is the step's number; nothing after it was done."""

    def __init__(self, step: Step, differences: tuple[Difference, ...]) -> None:
        self.step, self.differences = step, differences
        look = "device plugin's log" if step.action == "await" else "Device Config Manager's events"
        super().__init__(
            f"step {step.number}: {step.node} is not as planned after the switch: "
            + "; ".join(difference.message for difference in differences),
            field=f"steps[{step.number}]",
            value=step.node,
            remedy=f"the node stays drained; look at the {look}, then plan again",
        )


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Step(_Frozen):
    """One thing to do. wave: nodes of one wave go together; replicas: what stops or starts; modes: by card.

    drains_memory: a switch of the memory mode (driver reload, all cards of the hive, up to 140 s). profile, taint,
    set_labels, await_labels: what the Device Config Manager reads and writes on the node; await_labels of an await:
    what the node labeller writes. restart: operands of the GPU operator whose pods on the node start anew.
    allocatable: what the node advertises of `amd.com/` resources, by name; nothing of any other.
    """

    number: int = Field(ge=1)
    wave: int = Field(ge=0)
    action: Action
    node: str
    text: str
    replicas: tuple[str, ...] = ()
    modes: Mapping[int, str] = Field(default_factory=dict)
    drains_memory: bool = False
    profile: str | None = None
    taint: str | None = None
    set_labels: Mapping[str, str] = Field(default_factory=dict)
    await_labels: Mapping[str, str] = Field(default_factory=dict)
    restart: tuple[str, ...] = ()
    allocatable: Mapping[str, int] = Field(default_factory=dict)


class Steps(_Frozen):
    """The whole way. config_json: the Device Config Manager's ConfigMap, to apply before the first step."""

    version: Literal[1] = 1
    max_parallel: int
    surge: int
    config_json: str
    steps: tuple[Step, ...]


class Executor(Protocol):
    """What carries steps out on real (or emulated) nodes. Each call returns when the step is done."""

    def stop(self, step: Step) -> None:
        """Stop step.replicas."""

    def drain(self, step: Step) -> None:
        """Cordon the node, set step.taint, wait until step.replicas have stopped."""

    def switch(self, step: Step) -> None:
        """Set step.set_labels and wait for step.await_labels."""

    def read(self, node: str) -> Node:
        """What the node's devices are now, read from the node."""

    def refresh(self, step: Step) -> None:
        """Remove step.taint, leave the node cordoned, restart the pods of step.restart there until they are ready."""

    def allocatable(self, step: Step) -> Mapping[str, int]:
        """Wait for step.allocatable and step.await_labels as long as is sensible; the `amd.com/` resources by then."""

    def undrain(self, step: Step) -> None:
        """Uncordon the node."""

    def place(self, step: Step) -> None:
        """Start step.replicas where the plan says."""


def plan_steps(
    plan: Plan,
    current: Plan | None = None,
    *,
    max_parallel: int = 1,
    surge: int = 0,
    strategy: Strategy = "mixed",
) -> Steps:
    """The steps from `current` (None: nothing but what the plan calls running) to `plan`.

    max_parallel: nodes drained at once. surge: replicas that may run twice for a moment, so that one that moves starts
    anew before it stops; 0: it stops first. strategy: the device plugin's resource naming. Raises AimProfileError for
    numbers out of range, PlanError where a node that cannot switch its modes would have to.
    """
    for field, value, least in (("max_parallel", max_parallel, 1), ("surge", surge, 0)):
        if value < least:
            raise AimProfileError(f"{field}: {value} is less than {least}", field=field, value=value)
    return _Route(plan, current, max_parallel, surge, strategy).steps()


def apply_steps(steps: Steps, plan: Plan, executor: Executor) -> tuple[Step, ...]:
    """Carry the steps out in order. Raises StepError when a node's read-back, or what it advertises, differs."""
    done = []
    cards = _by_node(plan.cards)
    for step in steps.steps:
        if step.action == "verify":
            _checked(step, plan_assert(executor.read(step.node), plan, step.node, cards[step.node]))
        elif step.action == "await":
            _checked(step, allocatable_difference(step.node, step.allocatable, executor.allocatable(step)))
        else:
            {
                "stop": executor.stop,
                "drain": executor.drain,
                "switch": executor.switch,
                "refresh": executor.refresh,
                "undrain": executor.undrain,
                "place": executor.place,
            }[step.action](step)
        done.append(step)
    return tuple(done)


def _checked(step: Step, differences: tuple[Difference, ...]) -> None:
    if differences:
        raise StepError(step, differences)


class _Running:
    """Which replicas run, on which node, and who holds each device."""

    def __init__(self, placements: Iterable[Placement]) -> None:
        self.by_name: dict[str, Placement] = {}
        self.on_node: dict[str, dict[str, Placement]] = {}
        self._holders: dict[_Device, dict[str, Placement]] = {}
        for placement in placements:
            self.add(placement)

    def add(self, placement: Placement) -> None:
        """It runs there (and nowhere else) now."""
        if placement.id in self.by_name:
            self.remove(placement.id)
        self.by_name[placement.id] = placement
        self.on_node.setdefault(placement.node, {})[placement.id] = placement
        for device in _devices(placement):
            self._holders.setdefault(device, {})[placement.id] = placement

    def remove(self, name: str) -> Placement:
        """It runs no more."""
        placement = self.by_name.pop(name)
        del self.on_node[placement.node][name]
        for device in _devices(placement):
            del self._holders[device][name]
        return placement

    def in_the_way(self, placement: Placement, *, itself: bool) -> tuple[_Device, str] | None:
        """A device it wants and who holds that; sharing replicas are in nobody's way. itself: in its old place."""
        sharing = placement.memory_limit_gib is not None
        for device in _devices(placement):
            for name, other in self._holders.get(device, {}).items():
                if (itself or name != placement.id) and not (sharing and other.memory_limit_gib is not None):
                    return device, name
        return None


class _Queue:
    """Replicas that are to start on some nodes. Whoever finds a device taken waits for that device, so that each is
    looked at again only when something changed for it.
    """

    def __init__(self, waiting: Iterable[Placement], running: _Running) -> None:
        self.running = running
        self.moving: dict[str, Placement] = {}  # those that still run elsewhere
        self.fresh: deque[Placement] = deque()
        for placement in waiting:
            if placement.id in running.by_name:
                self.moving[placement.id] = placement
            else:
                self.fresh.append(placement)
        self.surging = deque(self.moving.values())
        self.to_stop = deque(self.moving)
        self.blocked: dict[_Device, dict[str, Placement]] = {}
        self.waits_for: dict[str, _Device] = {}

    def __bool__(self) -> bool:
        return bool(self.fresh or self.moving or self.blocked)

    def ready(self, surge: int) -> list[Placement]:
        """Those that can start now, at most `surge` of them while they still run elsewhere; they wait no more."""
        found = []
        while self.fresh:
            placement = self.fresh.popleft()
            if not self._taken(placement, itself=False):
                found.append(placement)
        while self.surging and surge:
            placement = self.surging.popleft()
            if placement.id in self.moving and not self._taken(placement, itself=True):
                found.append(self.moving.pop(placement.id))
                surge -= 1
        return found

    def _taken(self, placement: Placement, *, itself: bool) -> bool:
        taken = self.running.in_the_way(placement, itself=itself)
        if taken is not None and taken[1] != placement.id:
            self.blocked.setdefault(taken[0], {})[placement.id] = placement
            self.waits_for[placement.id] = taken[0]
        return taken is not None

    def in_the_way(self) -> str:
        """Who must stop where nothing can start: who moves and still runs in its old place, else who holds a device."""
        while self.to_stop:
            name = self.to_stop.popleft()
            if name in self.moving:
                return name
        first = next(iter(next(iter(self.blocked.values())).values()))
        taken = self.running.in_the_way(first, itself=False)
        assert taken is not None
        return taken[1]

    def freed(self, left: Iterable[Placement]) -> None:
        """These have stopped in their old places: look again at them and at whoever waits for their devices."""
        for gone in left:
            if placement := self.moving.pop(gone.id, None):
                self._no_longer_waits(gone.id)
                self.fresh.append(placement)
            for device in _devices(gone):
                for name, placement in self.blocked.pop(device, {}).items():
                    del self.waits_for[name]
                    (self.surging if name in self.moving else self.fresh).append(placement)

    def _no_longer_waits(self, name: str) -> None:
        device = self.waits_for.pop(name, None)
        if device is not None:
            del self.blocked[device][name]
            if not self.blocked[device]:
                del self.blocked[device]


class _Route:
    """Lays out the steps, with what runs where after each."""

    def __init__(self, plan: Plan, current: Plan | None, max_parallel: int, surge: int, strategy: Strategy) -> None:
        before = current.placements if current else tuple(p for p in plan.placements if p.running)
        self.plan, self.max_parallel, self.surge, self.strategy = plan, max_parallel, surge, strategy
        self.planned = {placement.id for placement in plan.placements}
        self.after = _grouped_in_order(plan.placements)
        self.running = _Running(before)
        self.cards = _by_node(plan.cards)
        self.switched = {node for node, cards in self.cards.items() if any(card.mode != card.was for card in cards)}
        self.found: list[Step] = []
        self.wave = 0
        for node in sorted(self.switched):
            _refuse_unswitchable(node, self.cards[node])
            dcm.refuse_mixed(node, _modes(self.cards[node]), strategy)

    def steps(self) -> Steps:
        self._stop_what_is_gone()
        self._move_and_place(node for node in self.cards if node not in self.switched)
        for nodes in self._waves():
            self.wave += 1
            for do in (self._drain, self._switch, self._verify, self._refresh, self._await, self._undrain):
                for node in nodes:
                    do(node)
            self._move_and_place(nodes)
        return Steps(
            max_parallel=self.max_parallel,
            surge=self.surge,
            config_json=dcm.config_json(_modes(self.cards[node]) for node in sorted(self.switched)),
            steps=tuple(self.found),
        )

    def _add(self, action: Action, node: str, text: str, **more: object) -> None:
        step = {"number": len(self.found) + 1, "wave": self.wave, "action": action, "node": node, "text": text}
        self.found.append(Step.model_validate({**step, **more}))

    def _waves(self) -> list[list[str]]:
        """Nodes nobody runs on first: what moves then finds its new place before it must leave the old."""
        order = sorted(self.switched, key=lambda node: (bool(self.running.on_node.get(node)), node))
        return [order[at : at + self.max_parallel] for at in range(0, len(order), self.max_parallel)]

    # --- replicas -------------------------------------------------------------------------------------------------

    def _stop_what_is_gone(self) -> None:
        """Replicas the plan no longer has; on nodes to be switched they stop with the drain."""
        gone = [p for name, p in self.running.by_name.items() if name not in self.planned]
        for node, placements in _grouped(p for p in gone if p.node not in self.switched).items():
            self._stop(node, [placement.id for placement in placements], "no longer planned")

    def _stop(self, node: str, names: list[str], why: str) -> list[Placement]:
        self._add("stop", node, f"stop {', '.join(names)}: {why}", replicas=names)
        return [self.running.remove(name) for name in names]

    def _move_and_place(self, nodes: Iterable[str]) -> None:
        """Start what belongs on these nodes: new replicas at once, those that move within the surge."""
        here = (placement for node in nodes for placement in self.after.get(node, ()))
        queue = _Queue((p for p in here if not _same(self.running.by_name.get(p.id), p)), self.running)
        while queue:
            ready = queue.ready(self.surge)
            queue.freed(self._start(ready) if ready else self._make_way(queue.in_the_way()))

    def _start(self, placements: list[Placement]) -> list[Placement]:
        """Start them; what ran elsewhere stops there then, and is returned."""
        old = [self.running.by_name[p.id] for p in placements if p.id in self.running.by_name]
        for node, here in _grouped(placements).items():
            names = [placement.id for placement in here]
            text = "start " + ", ".join(f"{placement.id} on {where(placement)}" for placement in here)
            self._add("place", node, text, replicas=names)
        for node, leaving in _grouped(old).items():
            self._stop(node, [placement.id for placement in leaving], "it runs in its new place")
        for placement in placements:
            self.running.add(placement)
        return old

    def _make_way(self, name: str) -> list[Placement]:
        node = self.running.by_name[name].node
        return self._stop(node, [name], "it moves, and its new place is not free beside it")

    # --- nodes ----------------------------------------------------------------------------------------------------

    def _drain(self, node: str) -> None:
        names = sorted(self.running.on_node.get(node, ()))
        stops = f", stop {', '.join(names)}" if names else ""
        self._add("drain", node, f"cordon {node}, taint it {dcm.TAINT}{stops}", replicas=names, taint=dcm.TAINT)
        for name in names:
            self.running.remove(name)

    def _switch(self, node: str) -> None:
        cards = self.cards[node]
        name = dcm.profile_name(_modes(cards))
        memory = any(card.changes_memory for card in cards)
        reload = "; the driver reloads, up to 140 s" if memory else ""
        self._add(
            "switch",
            node,
            f"label {node} {dcm.PROFILE_LABEL}={name}, wait for {dcm.STATE_LABEL}=success{reload}",
            modes=_mode_by_card(cards),
            drains_memory=memory,
            profile=name,
            set_labels={dcm.PROFILE_LABEL: name},
            await_labels={dcm.STATE_LABEL: "success"},
        )

    def _verify(self, node: str) -> None:
        modes = _mode_by_card(self.cards[node])
        text = f"read {node} back: {', '.join(sorted(set(modes.values())))} on {len(modes)} cards"
        self._add("verify", node, text, modes=modes)

    def _refresh(self, node: str) -> None:
        text = f"remove the taint {dcm.TAINT} from {node}, leave it cordoned, restart the pods of "
        self._add("refresh", node, text + " and ".join(dcm.OPERANDS), taint=dcm.TAINT, restart=dcm.OPERANDS)

    def _await(self, node: str) -> None:
        cards = self.cards[node]
        wanted = dcm.allocatable([(card.mode, card.partitions) for card in cards if card.mode], self.strategy)
        labels = {dcm.PARTITION_LABEL: dcm.mode_label(_modes(cards)[0])} if self.strategy == "single" else {}
        text = ", ".join(f"{name}: {count}" for name, count in wanted.items())
        text += "".join(f" and the label {key}={value}" for key, value in labels.items())
        self._add("await", node, f"wait until {node} advertises {text}", allocatable=wanted, await_labels=labels)

    def _undrain(self, node: str) -> None:
        self._add("undrain", node, f"uncordon {node}")


def _refuse_unswitchable(node: str, cards: list[CardPlan]) -> None:
    for card in cards:
        if card.mode != card.was and not card.switchable:
            guest = card.deployment == "sr-iov"
            why = "an SR-IOV guest: its host decides its modes" if guest else "run nobody knows how: it may be a guest"
            raise PlanError(
                f"{node} card {card.card}: from {card.was or 'an unknown mode'} to {card.mode}, but {node} is {why}",
                field="cards",
                value=node,
                remedy="plan again from a fleet file that says how the node is run (deployment) and its modes as found",
            )


def _by_node(cards: Iterable[CardPlan]) -> dict[str, list[CardPlan]]:
    found: dict[str, list[CardPlan]] = {}
    for card in cards:
        found.setdefault(card.node, []).append(card)
    return found


def _modes(cards: Iterable[CardPlan]) -> list[str]:
    return [card.mode for card in cards if card.mode is not None]


def _mode_by_card(cards: Iterable[CardPlan]) -> dict[int, str]:
    return {card.card: card.mode for card in cards if card.mode is not None}


def _devices(placement: Placement) -> list[_Device]:
    return [(placement.node, card, partition) for card, partition in placement.devices]


def _grouped_in_order(placements: Iterable[Placement]) -> dict[str, list[Placement]]:
    found: dict[str, list[Placement]] = {}
    for placement in placements:
        found.setdefault(placement.node, []).append(placement)
    return found


def _grouped(placements: Iterable[Placement]) -> dict[str, list[Placement]]:
    return _grouped_in_order(sorted(placements, key=lambda placement: (placement.node, placement.id)))


def _same(one: Placement | None, other: Placement) -> bool:
    return one is not None and (one.node, one.devices, one.mode) == (other.node, other.devices, other.mode)
