"""What runs where while a fleet goes from one plan to another, and which replicas wait for a device to come free."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from .plan import Placement

# Node, card, partition.
Device = tuple[str, int, int]


class Running:
    """Which replicas run, on which node, and who holds each device."""

    def __init__(self, placements: Iterable[Placement]) -> None:
        self.by_name: dict[str, Placement] = {}
        self.on_node: dict[str, dict[str, Placement]] = {}
        self._holders: dict[Device, dict[str, Placement]] = {}
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

    def in_the_way(self, placement: Placement, *, itself: bool) -> tuple[Device, str] | None:
        """A device it wants and who holds that; sharing replicas are in nobody's way. itself: in its old place."""
        sharing = placement.memory_limit_gib is not None
        for device in _devices(placement):
            for name, other in self._holders.get(device, {}).items():
                if (itself or name != placement.id) and not (sharing and other.memory_limit_gib is not None):
                    return device, name
        return None


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


def _devices(placement: Placement) -> list[Device]:
    return [(placement.node, card, partition) for card, partition in placement.devices]
