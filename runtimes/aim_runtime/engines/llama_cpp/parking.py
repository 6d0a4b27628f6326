"""What parked sequences had computed: copies of their cells in host memory, within a bound. Pure: the cache is a
protocol.

A sequence that makes way gives its slot and its cells away. Reading 1,000 tokens out and back takes 7 ms, into memory
never used before up to 57, computing them again 7 s (SmolLM2-135M, one thread: ``bench/parking.py``). A spare sequence
of the context would cost nothing, but keeps the cells, which whoever is more urgent may need; and where each slot has
cells of its own (see ``exact``) it would hold as much memory all the time.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from .sequence import Sequence

logger = logging.getLogger("aim.engine.llama_cpp")

#: A slot's cells as llama.cpp writes them.
State = NDArray[np.uint8]


class Cells(Protocol):
    """The part of LlamaContext that parking needs."""

    def state_bytes(self, slot: int) -> int: ...

    def save(self, slot: int) -> State: ...


@dataclass(frozen=True, eq=False, slots=True)
class Kept:
    """``state``: the first ``length`` tokens of a sequence, computed."""

    length: int
    state: State


class Parking:
    """Which sequences are parked, and what is kept of them.

    Args:
        cells: the context.
        most_bytes: what all states together may hold. Of a sequence that would go beyond it nothing is kept, and its
            tokens are computed again.
    """

    def __init__(self, cells: Cells, most_bytes: int) -> None:
        self._cells = cells
        self._most_bytes = most_bytes
        self._parked: dict[Sequence, Kept | None] = {}
        self.used_bytes = 0

    def __len__(self) -> int:
        return len(self._parked)

    def put(self, sequence: Sequence, slot: int, length: int) -> None:
        """Park ``sequence``, of which ``slot`` holds ``length`` tokens."""
        kept = self._parked[sequence] = self._copy(slot, length)
        self.used_bytes += kept.state.nbytes if kept is not None else 0

    def kept(self, sequence: Sequence) -> Kept | None:
        """What is kept of it; None where it is nothing."""
        return self._parked.get(sequence)

    def forget(self, sequence: Sequence) -> None:
        """It is not parked (any more)."""
        kept = self._parked.pop(sequence, None)
        self.used_bytes -= kept.state.nbytes if kept is not None else 0

    def _copy(self, slot: int, length: int) -> Kept | None:
        if not length or self.used_bytes + self._cells.state_bytes(slot) > self._most_bytes:
            return None
        try:
            return Kept(length, self._cells.save(slot))
        except MemoryError:  # this process may have less than the bound
            logger.warning("no memory to keep %d tokens of a parked request: they are computed again", length)
            return None
