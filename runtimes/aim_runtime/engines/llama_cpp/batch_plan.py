"""What the next step computes: the entries of a batch, and how many prompt tokens fit into a step's time. Pure.

First the next token of every sequence that is generating, so that a newcomer's prompt never delays an answer by more
than a step; then pieces of prompts. Prompts are finished one after the other (the shortest remainder first, half of the
room kept for the oldest), because computing eight together gives all eight their first token at the end. The room for
prompts follows the machine: as many tokens as fit into STEP_TARGET_S.
"""

from __future__ import annotations

from dataclasses import dataclass

from .scoring import ROWS_PER_STEP
from .slots import Slot

#: A step that carries prompt tokens should take no longer: it bounds inter-token latency and cancellation.
STEP_TARGET_S = 0.25
#: Smaller pieces of a prompt cost more per token than they save.
MIN_PREFILL_TOKENS = 32
#: llama.cpp's CPU flash attention computes 64 rows and more as tiles. That is faster the longer the context: per
#: token 7.0 against 8.3 ms in the first 512, 9 against 20 ms at 1600 (SmolLM2-135M, one thread).
TILE_TOKENS = 64
LONG_CONTEXT_TOKENS = 512


@dataclass(slots=True)
class Entry:
    """One sequence's part of a batch."""

    slot: Slot
    count: int
    index: int = -1

    @property
    def completes(self) -> bool:
        """Whether this part reaches the sequence's last token, so that the next can be sampled."""
        return self.count == self.slot.pending


class BatchPlan:
    """Plans one step after the other, by the speed of those before.

    Args:
        room: tokens of a batch.
    """

    def __init__(self, room: int) -> None:
        self._room = room
        self._token_s = 0.0  # a moving mean; 0: not known yet

    def entries(self, busy: list[Slot], groups: int = 1) -> list[Entry]:
        """The next batch: generating sequences first, then prompts as far as there is room.

        Args:
            groups: take turns with this one's steps; the others' sequences wait meanwhile, so a step takes less.
        """
        entries = [Entry(slot, 1) for slot in busy if slot.pending == 1]
        prompts = [slot for slot in busy if slot.pending > 1]
        if not prompts:
            return entries
        room = self._prefill_room(len(entries), max(slot.running.length for slot in prompts), groups)
        oldest = min(prompts, key=lambda slot: slot.running.order)
        shortest = sorted(prompts, key=lambda slot: (slot.running.priority, slot.pending, slot.running.arrival))
        parts: dict[Slot, int] = {}
        for slot, share in [(oldest, room // 2), *((slot, room) for slot in shortest)]:
            taken = parts.get(slot, 0)
            part = min(slot.pending - taken, share, room)
            if slot.running.scoring:
                part = min(part, ROWS_PER_STEP - taken)
            if part > 0:
                parts[slot] = taken + part
                room -= part
        return entries + [Entry(slot, part) for slot, part in parts.items()]

    def learn(self, tokens: int, elapsed_s: float) -> None:
        """Note how long a batch took, if it was big enough to tell."""
        if tokens >= MIN_PREFILL_TOKENS:
            now = elapsed_s / tokens
            self._token_s = now if not self._token_s else 0.8 * self._token_s + 0.2 * now

    def _prefill_room(self, generating: int, longest: int, groups: int) -> int:
        """Prompt tokens for the next step, which has ``generating`` others and a prompt of ``longest`` tokens."""
        least = TILE_TOKENS if longest > LONG_CONTEXT_TOKENS else MIN_PREFILL_TOKENS
        affordable = int(STEP_TARGET_S / groups / self._token_s) - generating if self._token_s else least
        return min(self._room - generating, max(least, affordable))
