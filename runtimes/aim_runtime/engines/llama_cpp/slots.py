"""Which sequence sits in which slot, and whose tokens it can take over. Pure: the cache itself is a protocol.

A finished sequence leaves its tokens in its slot. A new one takes the slot whose tokens begin like its prompt; where
that slot is busy, or taking it would forget more than it saves, it shares the common cells instead (in a unified
cache a cell may belong to several slots, so that costs nothing).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from .exact import whole_chunks
from .parking import Kept, State
from .sampling import TokenIds
from .sequence import Sequence


class Cache(Protocol):
    """The part of LlamaContext that slots need."""

    cells: int

    def keep(self, slot: int, length: int) -> bool: ...

    def share(self, source: int, target: int, length: int) -> None: ...

    def load(self, slot: int, state: State) -> bool: ...


def _no_tokens() -> TokenIds:
    return np.empty(0, dtype=np.int32)


@dataclass(slots=True, eq=False)
class Slot:
    """One sequence id of the context. ``tokens[:cached]`` are in the cache, computed with ``weights``."""

    number: int
    tokens: TokenIds = field(default_factory=_no_tokens)
    cached: int = 0
    shared: int = 0  # of those, taken over from another slot that may still hold them
    sequence: Sequence | None = None
    used_at: int = 0
    weights: str = ""  # as in Sequence

    @property
    def running(self) -> Sequence:
        assert self.sequence is not None
        return self.sequence

    @property
    def pending(self) -> int:
        """Tokens of the sequence that are not in the cache yet. 1 while decoding."""
        return self.running.length - self.cached


def common_prefix(a: TokenIds, b: TokenIds) -> int:
    """Number of equal tokens at the start."""
    size = min(a.size, b.size)
    differs = a[:size] != b[:size]
    first = int(differs.argmax()) if size else 0
    return first if size and differs[first] else size


class Slots:
    """All slots of one context.

    Args:
        count: slots.
        cache: the context.
        keeps_prefixes: whether a part of a slot's tokens can be kept or shared.
        exact: only whole chunks of prompts are kept and shared (see ``exact``), and a shared cell is a copy.
    """

    def __init__(self, count: int, cache: Cache, *, keeps_prefixes: bool, exact: bool = False) -> None:
        self._slots = [Slot(number) for number in range(count)]
        self._cache = cache
        self._keeps_prefixes = keeps_prefixes
        self._exact = exact
        self._clock = 0

    @property
    def busy(self) -> list[Slot]:
        return [slot for slot in self._slots if slot.sequence is not None]

    @property
    def free(self) -> list[Slot]:
        return [slot for slot in self._slots if slot.sequence is None]

    @property
    def cells_in_use(self) -> int:
        """Cells that running sequences hold or are about to fill; a shared cell counts once."""
        return _cells_of(self.busy)

    def seat(self, sequence: Sequence, kept: Kept | None = None) -> Slot | None:
        """Give ``sequence`` the best free slot. None when there is none, or no room for its tokens.

        Args:
            kept: what it had computed before it was parked; the slot then holds this again.
        """
        free = self.free
        if not free:
            return None
        source, length = self._best_prefix(sequence) if kept is None else (None, 0)
        wanted = self.cells_in_use + sequence.length - length + 1
        if len(free) < len(self._slots) and wanted > self._cache.cells:
            return None
        if source is not None and source.sequence is None and source.cached - length <= length:
            slot, slot.shared = source, min(source.shared, length)
            self._forget(slot, length)
        else:
            slot = min(free, key=lambda s: (s is source, s.used_at))
            self._share(source, slot, length)
        slot.sequence, slot.tokens, slot.weights = sequence, sequence.tokens, sequence.weights
        if kept is not None:
            self._put_back(slot, kept)
        self._touch(slot)
        return slot

    def fits(self, sequence: Sequence, *, without: list[Slot]) -> bool:
        """Whether ``sequence`` would get a seat if these busy slots were free."""
        others = len(self.busy) - len(without)
        wanted = self.cells_in_use - _cells_of(without) + sequence.length + 1
        return others == 0 or (others < len(self._slots) and wanted <= self._cache.cells)

    def leave(self, slot: Slot) -> None:
        """The sequence is done; its cached tokens stay, as far as others can use them."""
        useful = self._useful(slot)
        slot.tokens = slot.running.tokens[: slot.cached]
        slot.sequence = None
        if useful < slot.cached:
            self._forget(slot, useful)
        self._touch(slot)

    def empty(self, slot: Slot) -> None:
        """Forget everything a slot holds."""
        self._forget(slot, 0)

    def evict(self) -> bool:
        """Forget the idle slot that was used longest ago. False when no idle slot holds anything."""
        held = [slot for slot in self.free if slot.cached]
        if held:
            self._forget(min(held, key=lambda slot: slot.used_at), 0)
        return bool(held)

    def restore(self, slots: Iterable[Slot]) -> None:
        """After a failed decode: forget what it may have left beyond what we know to be cached."""
        for slot in slots:
            self._forget(slot, slot.cached)

    def _best_prefix(self, sequence: Sequence) -> tuple[Slot | None, int]:
        """The slot of the same weights that shares most with ``sequence``. At least its last token is always
        computed anew."""
        if not self._keeps_prefixes or sequence.scoring or (self._exact and sequence.scores is not None):
            return None, 0
        alike = [slot for slot in self._slots if slot.weights == sequence.weights]

        def measure(slot: Slot) -> tuple[int, bool]:
            length = common_prefix(slot.tokens[: self._useful(slot)], sequence.tokens[:-1])
            return whole_chunks(length) if self._exact else length, slot.sequence is None

        best = max(alike, key=measure, default=None)
        length = measure(best)[0] if best is not None else 0
        return (best, length) if length else (None, 0)

    def _useful(self, slot: Slot) -> int:
        """How many of a slot's tokens another sequence can take over."""
        if not self._exact or slot.sequence is None:
            return slot.cached
        if slot.running.scores is not None:  # cut differently
            return 0
        return min(slot.cached, whole_chunks(len(slot.running.generation.prompt)))

    def _put_back(self, slot: Slot, kept: Kept) -> None:
        """Where idle prefixes hold the cells, without them. If it cannot be, everything is computed again."""
        loaded = self._cache.load(slot.number, kept.state)
        while not loaded and self.evict():
            loaded = self._cache.load(slot.number, kept.state)
        slot.cached = kept.length if loaded else 0

    def _share(self, source: Slot | None, target: Slot, length: int) -> None:
        if source is target:
            self._forget(target, length)
            return
        self._forget(target, 0)
        if source is not None:
            self._cache.share(source.number, target.number, length)
            target.cached = length
            target.shared = 0 if self._exact else length

    def _forget(self, slot: Slot, length: int) -> None:
        if not self._cache.keep(slot.number, length):
            self._cache.keep(slot.number, 0)
            length = 0
        slot.cached, slot.shared = length, min(slot.shared, length)
        slot.tokens = slot.tokens[:length] if slot.sequence is None else slot.tokens

    def _touch(self, slot: Slot) -> None:
        self._clock += 1
        slot.used_at = self._clock


def _cells_of(busy: list[Slot]) -> int:
    return sum(max(slot.cached, slot.running.length) - slot.shared for slot in busy)
