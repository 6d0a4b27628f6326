"""Emulated nodes that plan steps are carried out on: they keep to a node's rules, and can be told to lie."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from aim_profile.nodes.facts import Card
from aim_profile.nodes.read import Node, Partition
from aim_profile.plans.plan import Placement, Plan
from aim_profile.plans.steps import Step


class EmulatedNodes:
    """Nodes in memory. lies: nodes whose switch reports success and changes nothing; stuck: nodes whose device plugin
    never sees another mode. A plugin advertises what it found when it started, and does not run on a tainted node.
    """

    def __init__(
        self,
        nodes: list[Node],
        plan: Plan,
        running: list[Placement] | None = None,
        lies: set[str] | None = None,
        stuck: set[str] | None = None,
    ) -> None:
        self.nodes = {str(node.name): node for node in nodes}
        self.where = {placement.id: placement for placement in plan.placements}
        # By replica and node: one that moves may run twice for a moment.
        self.held = {(placement.id, placement.node): placement for placement in running or []}
        self.lies, self.stuck = lies or set(), stuck or set()
        self.drained: set[str] = set()
        self.tainted: set[str] = set()
        self.advertised = {name: self._found(name) for name in self.nodes}
        self.switches: list[str] = []
        self.most_drained = 0
        self.least_running = len(self.running)

    @property
    def running(self) -> dict[str, Placement]:
        """Replicas by name; one that runs twice counts once."""
        return {name: placement for (name, _), placement in self.held.items()}

    def stop(self, step: Step) -> None:
        for name in step.replicas:
            del self.held[name, step.node]
        self._count()

    def drain(self, step: Step) -> None:
        assert step.taint == "amd-dcm=up:NoExecute"
        self.stop(step)
        self.drained.add(step.node)
        self.tainted.add(step.node)
        self.most_drained = max(self.most_drained, len(self.drained))

    def switch(self, step: Step) -> None:
        assert step.node in self.tainted, "Device busy (30)"
        assert not [p for p in self.held.values() if p.node == step.node], "Device busy (30)"
        assert step.set_labels == {"dcm.amd.com/gpu-config-profile": step.profile}
        self.switches.append(step.node)
        if step.node not in self.lies:
            node = self.nodes[step.node]
            cards = tuple(switched(card, step.modes[card.index]) for card in node.cards)
            self.nodes[step.node] = node.model_copy(update={"cards": cards})

    def read(self, node: str) -> Node:
        return self.nodes[node]

    def refresh(self, step: Step) -> None:
        assert step.restart == ("device-plugin", "node-labeller")
        self.tainted.remove(step.node)
        if step.node not in self.stuck:
            self.advertised[step.node] = self._found(step.node)

    def allocatable(self, step: Step) -> Mapping[str, int]:
        assert step.node not in self.tainted, "no device plugin runs here"
        return self.advertised[step.node]

    def place(self, step: Step) -> None:
        assert step.node not in self.drained, "a cordoned node takes no pods"
        for name in step.replicas:
            placement = self.where[name]
            assert self.advertised[step.node].get(placement.resource), f"{placement.resource} is not advertised"
            for card in placement.cards:
                assert self.nodes[step.node].cards[card].mode_label == placement.mode
            busy = {device for p in self.held.values() if p.node == step.node for device in p.devices}
            assert placement.memory_limit_gib is not None or not busy & set(placement.devices), f"{name}: device taken"
            self.held[name, step.node] = placement
        self._count()

    def undrain(self, step: Step) -> None:
        assert step.node not in self.tainted
        self.drained.remove(step.node)

    def _found(self, node: str) -> dict[str, int]:
        found: Counter[str] = Counter()
        for card in self.nodes[node].cards:
            found[f"amd.com/{card.mode_label}".lower().replace("/nps", "_nps")] += len(card.partitions)
        return dict(found)

    def _count(self) -> None:
        self.least_running = min(self.least_running, len(self.running))


def switched(card: Card, label: str) -> Card:
    """The card as its driver shows it after a switch."""
    assert card.accelerator is not None
    mode = card.accelerator.mode(label)
    parts = tuple(
        Partition(index=at, compute_units=mode.cus, memory_mib=mode.memory_mib, memory_source="derived", xcds=mode.xcds)
        for at in range(mode.partitions)
    )
    return card.model_copy(
        update={"compute_partition": mode.compute, "memory_partition": mode.memory, "partitions": parts}
    )
