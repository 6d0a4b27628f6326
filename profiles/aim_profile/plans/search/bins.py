"""Bins and who stands in them: the partitions of one card, or the whole cards of one hive of a node."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from .problem import DeviceKind, Job


class Shared:
    """One device that several jobs share. left: bytes not promised yet."""

    __slots__ = ("bin", "jobs", "left", "slot")

    def __init__(self, bin_: Bin, slot: int, left: int) -> None:
        self.bin, self.slot, self.left = bin_, slot, left
        self.jobs: list[int] = []


class Held:
    """One replica in a bin: its slots. replica: its number where it ran before; fixed: it keeps its slots."""

    __slots__ = ("fixed", "job", "replica", "shared", "slots")

    def __init__(
        self, job: Job, slots: tuple[int, ...], shared: Shared | None, replica: int | None, fixed: bool
    ) -> None:
        self.job, self.slots, self.shared, self.replica, self.fixed = job, slots, shared, replica, fixed


class Bin:
    """Where replicas stand side by side: the partitions of one card, or the whole cards of one hive of a node.

    cards: positions in the node; free: slots nobody holds; taken: the others (a partition's index, or the position in
    `cards`).
    """

    __slots__ = ("alive", "capacity", "cards", "free", "held", "id", "kind", "node", "taken")

    def __init__(self, number: int, node: int, cards: list[int], kind: DeviceKind) -> None:
        self.id, self.node, self.cards, self.kind = number, node, cards, kind
        self.capacity = len(cards) if kind.whole else kind.partitions
        self.free = self.capacity
        self.taken: set[int] = set()
        self.held: list[Held] = []
        self.alive = True

    def take(self, slots: Iterable[int]) -> None:
        """Mark slots as held."""
        self.taken.update(slots)
        self.free = self.capacity - len(self.taken)

    def give_back(self, slots: Iterable[int]) -> None:
        """Mark slots as free."""
        self.taken.difference_update(slots)
        self.free = self.capacity - len(self.taken)

    def cards_for(self, devices: int) -> int:
        """Cards that come into use when `devices` slots are taken."""
        return devices if self.kind.whole else int(not self.taken)

    def device(self, slot: int) -> tuple[int, int]:
        """(card position, partition) of a slot."""
        return (self.cards[slot], 0) if self.kind.whole else (self.cards[0], slot)


class Found(NamedTuple):
    """A place for a replica: a bin, and the shared device in it where there is one already."""

    bin: Bin
    shared: Shared | None = None
    slot: int | None = None


class SharedDevices:
    """The devices that several jobs share; by kind, those with least room left first."""

    def __init__(self, kinds: int) -> None:
        self._at: dict[tuple[int, int], Shared] = {}
        self._waiting: list[list[tuple[int, int, int]]] = [[] for _ in range(kinds)]

    def at(self, bin_: Bin, slot: int) -> Shared | None:
        """The shared device in that slot, None where it is none."""
        return self._at.get((bin_.id, slot))

    def open(self, bin_: Bin, slot: int, left: int) -> Shared:
        """Make a free slot a shared device with `left` bytes to promise."""
        shared = self._at[bin_.id, slot] = Shared(bin_, slot, left)
        return shared

    def with_room(self, kind: int, limit: int) -> Iterator[Shared]:
        """Those of that kind with `limit` bytes left, the fullest first."""
        waiting = self._waiting[kind]
        for left, number, slot in waiting[bisect_left(waiting, (limit, -1, -1)) :]:
            if left >= limit:
                yield self._at[number, slot]

    def promise(self, shared: Shared, job: int, limit: int) -> None:
        """Give `limit` bytes of it to that job."""
        self._unlist(shared)
        shared.left -= limit
        shared.jobs.append(job)
        self._list(shared)

    def take_back(self, shared: Shared, job: int, limit: int) -> bool:
        """Undo a promise. True: nobody shares it any more, its slot is free."""
        self._unlist(shared)
        shared.jobs.remove(job)
        shared.left += limit
        if shared.jobs:
            self._list(shared)
            return False
        del self._at[shared.bin.id, shared.slot]
        return True

    def move(self, old: Bin, moved: dict[int, int], new: Bin) -> None:
        """The shared devices of `old` are in `new` now, in the slots that `moved` gives them."""
        for slot, at in moved.items():
            if shared := self._at.pop((old.id, slot), None):
                self._unlist(shared)
                shared.bin, shared.slot = new, at
                self._at[new.id, at] = shared
                self._list(shared)

    def _list(self, shared: Shared) -> None:
        insort(self._waiting[shared.bin.kind.number], (shared.left, shared.bin.id, shared.slot))

    def _unlist(self, shared: Shared) -> None:
        waiting = self._waiting[shared.bin.kind.number]
        entry = (shared.left, shared.bin.id, shared.slot)
        at = bisect_left(waiting, entry)
        if at < len(waiting) and waiting[at] == entry:
            del waiting[at]


def slot_of(bin_: Bin, device: tuple[int, int]) -> int:
    """The slot of (card position, partition)."""
    return bin_.cards.index(device[0]) if bin_.kind.whole else device[1]


def switching(labels: Iterable[str | None], current: Iterable[str | None]) -> tuple[int, int]:
    """(1 if the memory mode changes else 0, cards whose compute mode changes) for one node."""
    drained = switched = 0
    for new, old in zip(labels, current, strict=True):
        if new == old or new is None:
            continue
        compute, _, memory = new.partition("/")
        was, _, was_memory = (old or "").partition("/")
        drained = max(drained, int(memory != was_memory))
        switched += int(compute != was)
    return drained, switched
