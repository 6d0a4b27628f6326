"""The way from what runs to what is planned: ordered steps. walk.py carries them out.

A node whose modes change goes: drain (cordon, taint, stop what is there) → switch (one Device Config Manager profile:
memory and compute mode together, so each node restarts its driver at most once) → verify by read-back → refresh (take
the taint away, which AMD's device plugin and node labeller do not tolerate; restart both, for they look at the node
only when they start: ROCm/gpu-operator#420, #382) → await (the kubelet advertises what the plan says) → undrain
(uncordon) → place: no pod starts on a node that is cordoned. Other nodes are only placed on. `amd-smi set` can exit 0
without switching, and a plugin can miss partitions (ROCm/k8s-device-plugin#157): nothing is placed before both agree.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from aim_profile.errors import AimProfileError

from . import dcm
from .compare import where
from .dcm import Strategy
from .plan import CardPlan, Placement, Plan, PlanError, cards_by_node, changes_at_start
from .running import Queue, Running, same_place

Action = Literal["stop", "drain", "switch", "verify", "refresh", "await", "undrain", "place"]


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


class _Route:
    """Lays out the steps, with what runs where after each."""

    def __init__(self, plan: Plan, current: Plan | None, max_parallel: int, surge: int, strategy: Strategy) -> None:
        before = current.placements if current else tuple(p for p in plan.placements if p.running)
        self.plan, self.max_parallel, self.surge, self.strategy = plan, max_parallel, surge, strategy
        self.planned = {placement.id: placement for placement in plan.placements}
        self.after = _grouped_in_order(plan.placements)
        self.running = Running(before, self.planned, plan.cards)
        self.cards = cards_by_node(plan.cards)
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
        queue = Queue((p for p in here if not self.running.runs_on(p.id)), self.running)
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
        was = self.running.by_name[name]
        new = changes_at_start(was, self.planned[name])
        stays = same_place(was, self.planned[name])
        moves = "it moves, and its new place is not free beside it" if self.surge else "it moves"
        why = f"it starts anew: {', '.join(new)}" if stays else moves
        return self._stop(was.node, [name], why)

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


def _modes(cards: Iterable[CardPlan]) -> list[str]:
    return [card.mode for card in cards if card.mode is not None]


def _mode_by_card(cards: Iterable[CardPlan]) -> dict[int, str]:
    return {card.card: card.mode for card in cards if card.mode is not None}


def _grouped_in_order(placements: Iterable[Placement]) -> dict[str, list[Placement]]:
    found: dict[str, list[Placement]] = {}
    for placement in placements:
        found.setdefault(placement.node, []).append(placement)
    return found


def _grouped(placements: Iterable[Placement]) -> dict[str, list[Placement]]:
    return _grouped_in_order(sorted(placements, key=lambda placement: (placement.node, placement.id)))
