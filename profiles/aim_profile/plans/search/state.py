"""A placement in the making: which mode each card is in, what stands where, and what that is worth.

Placing, looking up the best bin and scoring cost the same whatever the size of the fleet: bins wait in heaps by device
kind and free devices, and entries that are out of date are dropped when they come up.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from heapq import heappop, heappush
from random import Random

from aim_profile.sizing.fit import DEFAULT_UTILIZATION, budget_bytes

from .bins import Bin, Found, Held, Shared, SharedDevices, slot_of, switching
from .problem import LEVELS, DeviceKind, Job, Occupied, Option, Problem, Running

# Less is better: placed by level (negated), replicas that span partitions they should avoid, nodes drained, cards
# switched, replicas that stay (negated), cards used.
Score = tuple[int, ...]


_NOWHERE: Counter[int] = Counter()


class State:
    """A partial placement. modes: per node the mode label of each card, None: as found.

    taste: each job likes one kind of device better than another, by chance; None: it takes what costs least.
    """

    def __init__(
        self,
        problem: Problem,
        modes: dict[int, tuple[str, ...]] | None = None,
        fraction_first: bool = False,
        taste: Random | None = None,
    ) -> None:
        self.problem = problem
        self.fraction_first = fraction_first
        self.taste = taste
        self._liking: dict[tuple[int, int], float] = {}
        self.placed = [0] * LEVELS
        self.count = [0] * len(problem.jobs)
        self.cards_used = 0
        self.stay = 0
        self.unproven = 0
        self.touched = [0] * len(problem.nodes)
        self.label: list[list[str | None]] = [[card.current for card in node.cards] for node in problem.nodes]
        self.where: dict[int, Counter[int]] = {}
        self._in_bin: Counter[tuple[int, int]] = Counter()
        self.bins: list[Bin] = []
        self.of_node: list[list[Bin]] = [[] for _ in problem.nodes]
        most = max((kind.partitions for kind in problem.kinds), default=1)
        width = 2 + 2 * max([most, *(len(node.cards) for node in problem.nodes)])
        self._heaps: list[list[list[int]]] = [[[] for _ in range(width)] for _ in problem.kinds]
        self.shared = SharedDevices(len(problem.kinds))
        for node in problem.nodes:
            labels = (modes or {}).get(node.number)
            if labels is None:
                self._add_bins(node.number, {at: card.as_found for at, card in enumerate(node.cards)})
            else:
                self.switch(node.number, labels)
        for taken in problem.occupied:
            self._occupy(taken)

    def _occupy(self, taken: Occupied) -> None:
        bin_ = next(bin_ for bin_ in self.of_node[taken.node] if taken.devices[0][0] in bin_.cards)
        slots = [slot_of(bin_, device) for device in taken.devices]
        self.cards_used += bin_.cards_for(len(slots))
        self.touched[taken.node] += 1
        bin_.take(slots)
        for other in self.of_node[taken.node] if self.touched[taken.node] == 1 else (bin_,):
            self._file(other)

    # --- modes ---------------------------------------------------------------------------------------------------

    def switch(self, node: int, labels: tuple[str, ...]) -> None:
        """Put the cards of a node nobody stands on into these modes."""
        for old in self.of_node[node]:
            old.alive = False
        self.of_node[node] = []
        cards = self.problem.nodes[node].cards
        self.label[node] = list(labels)
        self._add_bins(node, {at: cards[at].kinds[label] for at, label in enumerate(labels)})

    def switch_card(self, node: int, position: int, label: str) -> None:
        """Put one card nobody stands on into that mode; the others keep theirs."""
        kind = self.problem.nodes[node].cards[position].kinds[label]
        for old in self.of_node[node]:
            if position in old.cards:
                self._without(old, position)
        self.label[node][position] = label
        self._add_bins(node, {position: kind})

    def _without(self, old: Bin, position: int) -> None:
        """Replace a bin by one that lacks that card; what stands there keeps its cards."""
        old.alive = False
        self.of_node[old.node] = [b for b in self.of_node[old.node] if b is not old]
        rest = [card for card in old.cards if card != position]
        if not rest:
            return
        new = self._bin(old.node, rest, old.kind)
        moved = {slot: rest.index(card) for slot, card in enumerate(old.cards) if card != position}
        new.take(moved[slot] for slot in old.taken)
        new.held = old.held
        for held in new.held:
            held.slots = tuple(moved[slot] for slot in held.slots)
        self.shared.move(old, moved, new)
        for job in {held.job.index for held in new.held}:
            self._in_bin[job, new.id] = self._in_bin.pop((job, old.id), 0)
        self._file(new)

    def _add_bins(self, node: int, kind_of: dict[int, int]) -> None:
        """New bins for these card positions: one per partitioned card, one per hive of whole cards."""
        cards = self.problem.nodes[node].cards
        hives: dict[tuple[int, int], list[int]] = {}
        for position, kind in kind_of.items():
            if kind >= 0 and self.problem.kinds[kind].whole:
                hives.setdefault((kind, cards[position].hive), []).append(position)
            elif kind >= 0:
                self._file(self._bin(node, [position], self.problem.kinds[kind]))
        for (kind, _), positions in hives.items():
            self._file(self._bin(node, positions, self.problem.kinds[kind]))

    def _bin(self, node: int, cards: list[int], kind: DeviceKind) -> Bin:
        new = Bin(len(self.bins), node, cards, kind)
        self.bins.append(new)
        self.of_node[node].append(new)
        return new

    def _file(self, bin_: Bin) -> None:
        heappush(self._heaps[bin_.kind.number][2 * bin_.free + (not self.touched[bin_.node])], bin_.id)

    # --- looking up ----------------------------------------------------------------------------------------------

    def find(self, job: Job, options: Mapping[int, Option] | None = None) -> Found | None:
        """The best place for one more replica of `job`, None where there is none. options: of its own, only these."""
        options = job.options if options is None else options
        if job.pin is not None or job.affinity:
            return self.find_on(job, self._candidate_nodes(job), options)
        if job.limit is not None and (found := self._find_shared(job, options)):
            return found
        best: tuple[tuple[float, ...], Bin] | None = None
        for kind, option in options.items():
            bin_ = self._first(job, kind, option.devices)
            if bin_ is not None:
                rank = (self._likes(job, kind), *self._rank(bin_, option))
                best = (rank, bin_) if best is None or rank < best[0] else best
        return None if best is None else Found(best[1])

    def _likes(self, job: Job, kind: int) -> float:
        if self.taste is None:
            return 0.0
        key = (job.index, kind)
        if key not in self._liking:
            self._liking[key] = self.taste.choice((0.0, 0.0, self.taste.random()))
        return self._liking[key]

    def _rank(self, bin_: Bin, option: Option) -> tuple[float, ...]:
        """Less is better: no new card, a small share of a card, a node in use, little waste, little left over."""
        new = float(bin_.cards_for(option.devices))
        share = option.devices / bin_.kind.partitions
        order = (share, new) if self.fraction_first else (new, share)
        waste = option.devices * bin_.kind.device_bytes
        return (*order, not self.touched[bin_.node], waste, bin_.free - option.devices, bin_.id)

    def _first(self, job: Job, kind: int, devices: int) -> Bin | None:
        """The bin of that kind that `devices` fill best: least room left; of empty ones a node in use first."""
        heaps = self._heaps[kind]
        for first in (2 * devices, 2 * devices + 1):
            for at in range(first, len(heaps), 2):
                if heaps[at] and (bin_ := self._top(heaps[at], at, job)):
                    return bin_
        return None

    def _top(self, heap: list[int], at: int, job: Job) -> Bin | None:
        """The first bin of a heap that is up to date and allowed; those not allowed stay in the heap."""
        passed = []
        found = None
        last = -1
        while heap:
            bin_ = self.bins[heap[0]]
            if not bin_.alive or 2 * bin_.free + (not self.touched[bin_.node]) != at or bin_.id == last:
                heappop(heap)
                continue
            last = bin_.id
            if not job.constrained or self.allows(job, bin_):
                found = bin_
                break
            passed.append(heappop(heap))
        for number in passed:
            heappush(heap, number)
        return found

    def _find_shared(self, job: Job, kinds: Iterable[int]) -> Found | None:
        """The fullest shared device that still has room for the job's limit."""
        assert job.limit is not None
        for kind in kinds:
            for shared in self.shared.with_room(kind, job.limit):
                if self.allows(job, shared.bin, shared):
                    return Found(shared.bin, shared)
        return None

    def _candidate_nodes(self, job: Job) -> Iterable[int]:
        if job.pin is not None:
            return (job.pin[0],)
        fewest = min((self.where.get(target, Counter()) for target in job.affinity), key=len)
        return sorted(fewest)

    def find_on(self, job: Job, nodes: Iterable[int], options: Mapping[int, Option] | None = None) -> Found | None:
        """The best place on a few nodes, by looking at each. options: of its own, only these."""
        options = job.options if options is None else options
        places = [
            (self._rank(found.bin, options[found.bin.kind.number]), found)
            for found in self._places(job, nodes, options)
        ]
        return min(places, key=lambda place: (place[1].shared is None, place[0]))[1] if places else None

    def _places(self, job: Job, nodes: Iterable[int], options: Mapping[int, Option]) -> Iterator[Found]:
        for node in nodes:
            for bin_ in self.of_node[node]:
                option = options.get(bin_.kind.number)
                if option is not None and self.allows(job, bin_):
                    yield from self._places_in(job, bin_, option)

    def find_in(self, job: Job, bin_: Bin) -> Found | None:
        """The fullest place for `job` in that bin."""
        found = list(self._places_in(job, bin_, job.options[bin_.kind.number]))
        return min(found, key=lambda place: place.shared.left if place.shared else 1 << 62, default=None)

    def _places_in(self, job: Job, bin_: Bin, option: Option) -> Iterator[Found]:
        slot = self.pinned_slot(job, bin_)
        if slot == -1:
            return
        if job.limit is not None:
            for number in range(bin_.capacity) if slot is None else (slot,):
                shared = self.shared.at(bin_, number)
                if shared and shared.left >= job.limit and self.allows(job, bin_, shared):
                    yield Found(bin_, shared)
        if bin_.free >= option.devices and (slot is None or self._can_free(bin_, slot)):
            yield Found(bin_, slot=slot)

    def pinned_slot(self, job: Job, bin_: Bin) -> int | None:
        """The slot a pin names, None: any; -1: not in this bin."""
        if job.pin is None or job.pin[1] is None:
            return None
        _, card, partition = job.pin
        if card not in bin_.cards:
            return -1
        if bin_.kind.whole:
            return bin_.cards.index(card) if not partition else -1
        return partition if partition is None or partition < bin_.capacity else -1

    def _can_free(self, bin_: Bin, slot: int) -> bool:
        """Whether nobody is bound to that slot: who stands there can take another."""
        if slot not in bin_.taken:
            return True
        here = [held for held in bin_.held if slot in held.slots]  # none: it is occupied
        return bool(here) and not any(held.fixed or held.shared for held in here)

    def allows(self, job: Job, bin_: Bin, shared: Shared | None = None) -> bool:
        """Whether the job's affinities and spread allow one more replica there."""
        node = bin_.node
        mine = self.where.get(job.index)
        if mine and job.workload.spread == "node" and mine[node]:
            return False
        if mine and job.workload.spread == "card" and self._card_has(job, bin_, shared):
            return False
        if any(self.where.get(other, _NOWHERE)[node] for other in job.anti_affinity):
            return False
        return all(self.where.get(target, _NOWHERE)[node] for target in job.affinity)

    def _card_has(self, job: Job, bin_: Bin, shared: Shared | None) -> bool:
        if bin_.kind.whole:
            return shared is not None and job.index in shared.jobs
        return bool(self._in_bin[job.index, bin_.id])

    # --- placing -------------------------------------------------------------------------------------------------

    def place(self, job: Job, found: Found, running: Running | None = None) -> Held:
        """Put one replica of `job` there. running: the replica that stands there now, with its slots."""
        bin_, shared = found.bin, found.shared
        if shared is None:
            slots = self._take(bin_, job.options[bin_.kind.number].devices, found.slot, running)
            if job.limit is not None:
                room = budget_bytes(bin_.kind.device_bytes, DEFAULT_UTILIZATION)
                shared = self.shared.open(bin_, slots[0], room)
        slots = (shared.slot,) if shared is not None else slots
        if shared is not None:
            assert job.limit is not None
            self.shared.promise(shared, job.index, job.limit)
        pinned = found.slot is not None or self.pinned_slot(job, bin_) is not None
        fixed = pinned or (running is not None and running.fixed)
        held = Held(job, slots, shared, running.replica if running else None, fixed)
        bin_.held.append(held)
        self._count(job, bin_, 1)
        self.stay += int(running is not None)
        if self.touched[bin_.node] == 1:
            for other in self.of_node[bin_.node]:
                self._file(other)
        else:
            self._file(bin_)
        return held

    def _take(self, bin_: Bin, devices: int, slot: int | None, running: Running | None) -> tuple[int, ...]:
        self.cards_used += bin_.cards_for(devices)
        if running is not None:
            slots = tuple(slot_of(bin_, device) for device in running.devices)
        elif slot is not None:
            self._make_way(bin_, slot)
            slots = (slot, *[at for at in range(bin_.capacity) if at not in bin_.taken and at != slot])[:devices]
        else:
            slots = tuple([at for at in range(bin_.capacity) if at not in bin_.taken][:devices])
        bin_.take(slots)
        return slots

    def _make_way(self, bin_: Bin, slot: int) -> None:
        """Whoever stands on `slot` takes a free one instead."""
        for held in bin_.held:
            if slot in held.slots:
                other = next(at for at in range(bin_.capacity) if at not in bin_.taken)
                held.slots = tuple(sorted((*(at for at in held.slots if at != slot), other)))
                bin_.take((other,))
                bin_.give_back((slot,))
                self.stay -= int(held.replica is not None)
                held.replica = None  # it ran, and moves

    def remove(self, bin_: Bin, held: Held) -> None:
        """Take one replica away again."""
        bin_.held = [other for other in bin_.held if other is not held]
        shared = held.shared
        assert shared is None or held.job.limit is not None
        if shared is None or self.shared.take_back(shared, held.job.index, held.job.limit or 0):
            bin_.give_back(held.slots)
            self.cards_used -= bin_.cards_for(len(held.slots))
        self.stay -= int(held.replica is not None)
        self._count(held.job, bin_, -1)
        for other in self.of_node[bin_.node] if not self.touched[bin_.node] else (bin_,):
            self._file(other)

    def _count(self, job: Job, bin_: Bin, change: int) -> None:
        self.touched[bin_.node] += change
        self.placed[job.own_level] += change
        self.count[job.index] += change
        self.unproven += change if bin_.kind.number in job.avoided else 0
        if job.constrained or job.rank < 0 or job.anti_affinity:
            self.where.setdefault(job.index, Counter())[bin_.node] += change
            self._in_bin[job.index, bin_.id] += change
            if not self.where[job.index][bin_.node]:
                del self.where[job.index][bin_.node]

    # --- worth ---------------------------------------------------------------------------------------------------

    def changes(self) -> tuple[int, int]:
        """Nodes drained for another memory mode, cards switched to another compute mode; empty nodes stay as found."""
        drained = switched = 0
        for node in self.problem.nodes:
            if self.touched[node.number]:
                memory, compute = switching(self.label[node.number], [card.current for card in node.cards])
                drained += memory
                switched += compute
        return drained, switched

    def score(self) -> Score:
        """The objective: less is better."""
        drained, switched = self.changes()
        placed = (-count for count in self.placed)
        return (*placed, self.unproven, drained, switched, -self.stay, self.cards_used)
