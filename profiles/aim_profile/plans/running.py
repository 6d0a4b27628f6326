"""What runs where while a fleet goes from one plan to another, and which replicas wait for a device to come free."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from itertools import islice

from aim_profile.sizing.fit import budget_bytes
from aim_profile.units import GIB, MIB

from .plan import CardPlan, Placement, changes_at_start

# Node, card, partition.
Device = tuple[str, int, int]


# Limits are rounded to a thousandth of a GiB each.
_ROUNDING_GIB = 0.01


class Running:
    """Which replicas run, on which node, and who holds each device.

    planned: by name, who will run where; cards: of the plan, for how much those who share a device may take of it.
    """

    def __init__(
        self, placements: Iterable[Placement], planned: Mapping[str, Placement], cards: Iterable[CardPlan]
    ) -> None:
        self._planned = planned
        self._room_gib = {
            (card.node, card.card): budget_bytes(card.device_memory_mib * MIB) / GIB + _ROUNDING_GIB for card in cards
        }
        self.by_name: dict[str, Placement] = {}
        self.on_node: dict[str, dict[str, Placement]] = {}
        self._holders: dict[Device, dict[str, Placement]] = {}
        self._shared_gib: dict[Device, float] = {}
        self._promised: set[str] = set()
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
        if placement.id in self._promised:
            self._promised.remove(placement.id)
        else:
            self._share(placement, 1)

    def remove(self, name: str) -> Placement:
        """It runs no more."""
        placement = self.by_name.pop(name)
        del self.on_node[placement.node][name]
        for device in _devices(placement):
            del self._holders[device][name]
        self._share(placement, -1)
        return placement

    def promise(self, placement: Placement) -> None:
        """It is about to be added: what it takes of a device that it shares counts already."""
        self._promised.add(placement.id)
        self._share(placement, 1)

    def _share(self, placement: Placement, change: int) -> None:
        for device in _devices(placement):
            now = self._shared_gib.get(device, 0.0)
            self._shared_gib[device] = now + change * (placement.memory_limit_gib or 0.0)

    def runs_on(self, name: str) -> bool:
        """Whether it runs already where and as it is planned."""
        now, planned = self.by_name.get(name), self._planned.get(name)
        if now is None or planned is None:
            return False
        return same_place(now, planned) and not changes_at_start(now, planned)

    def in_the_way(self, placement: Placement, *, itself: bool) -> tuple[Device, str] | None:
        """A device it wants and who holds that, or who shares it and must leave before its limit fits.

        itself: in its old place.
        """
        for device in _devices(placement):
            holders = self._holders.get(device, {})
            others = (name for name in holders if itself or name != placement.id)
            if placement.memory_limit_gib is not None and self._shares(holders):
                own = None if itself else holders.get(placement.id)
                wanted = self._shared_gib.get(device, 0.0) + placement.memory_limit_gib
                if wanted - ((own and own.memory_limit_gib) or 0.0) <= self._room_gib[device[:2]]:
                    continue
                others = (name for name in others if not self.runs_on(name))
            if (first := next(others, None)) is not None:
                return device, first
        return None

    @staticmethod
    def _shares(holders: Mapping[str, Placement]) -> bool:
        """Whether those who hold a device share it; one who does not holds it alone."""
        return all(holder.memory_limit_gib is not None for holder in islice(holders.values(), 1))


class Queue:
    """Replicas that are to start on some nodes. Whoever finds a device taken waits for that device, so that each is
    looked at again only when something changed for it.
    """

    def __init__(self, waiting: Iterable[Placement], running: Running) -> None:
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
        self.blocked: dict[Device, dict[str, Placement]] = {}
        self.waits_for: dict[str, Device] = {}

    def __bool__(self) -> bool:
        return bool(self.fresh or self.moving or self.blocked)

    def ready(self, surge: int) -> list[Placement]:
        """Those that can start now, at most `surge` of them while they still run elsewhere; they wait no more."""
        found: list[Placement] = []
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
        if taken is None:
            self.running.promise(placement)
        elif taken[1] != placement.id:
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


def same_place(one: Placement, other: Placement) -> bool:
    """Whether both are the same devices in the same mode."""
    if one.node != other.node or one.mode != other.mode:
        return False
    return (one.cards, one.partitions) == (other.cards, other.partitions) or one.devices == other.devices


def _devices(placement: Placement) -> list[Device]:
    return [(placement.node, card, partition) for card, partition in placement.devices]
