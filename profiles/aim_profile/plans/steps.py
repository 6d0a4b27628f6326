"""From what runs to what is planned: ordered steps, and the loop that carries them out and checks each switch.

A node whose modes change goes: drain (cordon, taint, stop what is there) → switch (one Device Config Manager profile:
memory and compute mode together, so each node restarts its driver at most once) → verify by read-back → place →
undrain. Other nodes are only placed on. `amd-smi set` can exit 0 without switching: nothing is placed before the
read-back agrees.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field

from aim_profile.errors import AimProfileError
from aim_profile.nodes.facts import Node

from . import dcm
from .compare import Difference, plan_assert, where
from .plan import CardPlan, Placement, Plan

Action = Literal["stop", "drain", "switch", "verify", "place", "undrain"]


class StepError(AimProfileError):
    """A step that did not do what it said. `field` is the step's number; nothing after it was done."""

    def __init__(self, step: Step, differences: tuple[Difference, ...]) -> None:
        self.step, self.differences = step, differences
        super().__init__(
            f"step {step.number}: {step.node} is not as planned after the switch: "
            + "; ".join(difference.message for difference in differences),
            field=f"steps[{step.number}]",
            value=step.node,
            remedy="the node stays drained; look at the Device Config Manager's events, then plan again",
        )


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Step(_Frozen):
    """One thing to do. wave: nodes of one wave go together; replicas: what stops or starts; modes: by card.

    drains_memory: a switch of the memory mode (driver reload, all cards of the hive, up to 140 s). profile, taint,
    set_labels, await_labels: what the Device Config Manager reads and writes on the node.
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

    def place(self, step: Step) -> None:
        """Start step.replicas where the plan says."""

    def undrain(self, step: Step) -> None:
        """Remove step.taint and uncordon the node."""


def plan_steps(plan: Plan, current: Plan | None = None, *, max_parallel: int = 1, surge: int = 0) -> Steps:
    """The steps from `current` (None: nothing but what the plan calls running) to `plan`.

    max_parallel: nodes drained at once. surge: replicas that may run twice for a moment, so that one that moves starts
    anew before it stops; 0: it stops first. Raises AimProfileError for numbers out of range.
    """
    for field, value, least in (("max_parallel", max_parallel, 1), ("surge", surge, 0)):
        if value < least:
            raise AimProfileError(f"{field}: {value} is less than {least}", field=field, value=value)
    return _Route(plan, current, max_parallel, surge).steps()


def apply_steps(steps: Steps, plan: Plan, executor: Executor) -> tuple[Step, ...]:
    """Carry the steps out in order. Raises StepError when a node's read-back differs from the plan."""
    done = []
    for step in steps.steps:
        if step.action == "verify":
            if differences := plan_assert(executor.read(step.node), plan, step.node):
                raise StepError(step, differences)
        else:
            {
                "stop": executor.stop,
                "drain": executor.drain,
                "switch": executor.switch,
                "place": executor.place,
                "undrain": executor.undrain,
            }[step.action](step)
        done.append(step)
    return tuple(done)


class _Route:
    """Lays out the steps, with what runs where after each."""

    def __init__(self, plan: Plan, current: Plan | None, max_parallel: int, surge: int) -> None:
        before = current.placements if current else tuple(p for p in plan.placements if p.running)
        self.plan, self.max_parallel, self.surge = plan, max_parallel, surge
        self.after = {placement.id: placement for placement in plan.placements}
        self.running = {placement.id: placement for placement in before}
        self.cards = _by_node(plan.cards)
        self.switched = {node for node, cards in self.cards.items() if any(card.mode != card.was for card in cards)}
        self.found: list[Step] = []
        self.wave = 0

    def steps(self) -> Steps:
        self._stop_what_is_gone()
        self._move_and_place(node for node in self.cards if node not in self.switched)
        for nodes in self._waves():
            self.wave += 1
            for node in nodes:
                self._drain(node)
            for node in nodes:
                self._switch(node)
            for node in nodes:
                self._verify(node)
            self._move_and_place(nodes)
            for node in nodes:
                self._undrain(node)
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
        busy = {placement.node for placement in self.running.values()}
        order = sorted(self.switched, key=lambda node: (node in busy, node))
        return [order[at : at + self.max_parallel] for at in range(0, len(order), self.max_parallel)]

    # --- replicas -------------------------------------------------------------------------------------------------

    def _stop_what_is_gone(self) -> None:
        """Replicas the plan no longer has; on nodes to be switched they stop with the drain."""
        gone = [p for name, p in self.running.items() if name not in self.after and p.node not in self.switched]
        for node, placements in _grouped(gone).items():
            self._stop(node, placements, "no longer planned")

    def _stop(self, node: str, placements: list[Placement], why: str) -> None:
        names = tuple(placement.id for placement in placements)
        self._add("stop", node, f"stop {', '.join(names)}: {why}", replicas=names)
        for name in names:
            del self.running[name]

    def _move_and_place(self, nodes: Iterable[str]) -> None:
        """Start what belongs on these nodes: new replicas at once, those that move within the surge."""
        here = set(nodes)
        waiting = [p for name, p in self.after.items() if p.node in here and not _same(self.running.get(name), p)]
        while waiting:
            ready = self._ready(waiting)
            if ready:
                self._start(ready)
            else:
                self._stop_one(waiting)
            waiting = [placement for placement in waiting if not _same(self.running.get(placement.id), placement)]

    def _ready(self, waiting: list[Placement]) -> list[Placement]:
        """Those whose devices are free, at most `surge` of them while they still run elsewhere."""
        taken = self._taken()
        ready, twice = [], 0
        for placement in waiting:
            moving = placement.id in self.running
            if any(holder != placement.id for holder in _holders(placement, taken)):
                continue
            if moving and (twice >= self.surge or _holders(placement, taken)):
                continue
            twice += moving
            ready.append(placement)
        return ready

    def _start(self, placements: list[Placement]) -> None:
        old = {placement.id: self.running[placement.id] for placement in placements if placement.id in self.running}
        for node, here in _grouped(placements).items():
            names = tuple(placement.id for placement in here)
            text = "start " + ", ".join(f"{placement.id} on {where(placement)}" for placement in here)
            self._add("place", node, text, replicas=names)
        for node, leaving in _grouped(old.values()).items():
            self._stop(node, leaving, "it runs in its new place")
        self.running.update({placement.id: placement for placement in placements})

    def _stop_one(self, waiting: list[Placement]) -> None:
        """Nothing can start: stop what moves and still runs in its old place, or what stands in the way."""
        taken = self._taken()
        name = next((p.id for p in waiting if p.id in self.running), None)
        name = name or next(holder for p in waiting for holder in _holders(p, taken))
        self._stop(self.running[name].node, [self.running[name]], "it moves, and its new place is not free beside it")

    def _taken(self) -> dict[tuple[str, int, int], list[Placement]]:
        """Who holds each device, of those that do not share it."""
        taken: dict[tuple[str, int, int], list[Placement]] = {}
        for placement in self.running.values():
            for card, partition in placement.devices:
                taken.setdefault((placement.node, card, partition), []).append(placement)
        return taken

    # --- nodes ----------------------------------------------------------------------------------------------------

    def _drain(self, node: str) -> None:
        names = tuple(sorted(name for name, placement in self.running.items() if placement.node == node))
        stops = f", stop {', '.join(names)}" if names else ""
        self._add("drain", node, f"cordon {node}, taint it {dcm.TAINT}{stops}", replicas=names, taint=dcm.TAINT)
        for name in names:
            del self.running[name]

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

    def _undrain(self, node: str) -> None:
        self._add("undrain", node, f"remove the taint {dcm.TAINT} from {node}, uncordon it", taint=dcm.TAINT)


def _by_node(cards: Iterable[CardPlan]) -> dict[str, list[CardPlan]]:
    found: dict[str, list[CardPlan]] = {}
    for card in cards:
        found.setdefault(card.node, []).append(card)
    return found


def _modes(cards: Iterable[CardPlan]) -> list[str]:
    return [card.mode for card in cards if card.mode is not None]


def _mode_by_card(cards: Iterable[CardPlan]) -> dict[int, str]:
    return {card.card: card.mode for card in cards if card.mode is not None}


def _grouped(placements: Iterable[Placement]) -> dict[str, list[Placement]]:
    found: dict[str, list[Placement]] = {}
    for placement in sorted(placements, key=lambda placement: (placement.node, placement.id)):
        found.setdefault(placement.node, []).append(placement)
    return found


def _same(one: Placement | None, other: Placement) -> bool:
    return one is not None and (one.node, one.devices, one.mode) == (other.node, other.devices, other.mode)


def _holders(placement: Placement, taken: Mapping[tuple[str, int, int], list[Placement]]) -> list[str]:
    """Who holds this placement's devices now; sharing replicas do not hold against one another."""
    sharing = placement.memory_limit_gib is not None
    return [
        other.id
        for card, partition in placement.devices
        for other in taken.get((placement.node, card, partition), ())
        if not (sharing and other.memory_limit_gib is not None)
    ]
