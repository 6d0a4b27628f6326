"""What the next step computes: the entries of its batches, and how many prompt tokens fit into a step's time. Pure.

First the next token of every sequence that is generating, so that a newcomer's prompt never delays an answer by more
than a step; then prompts, finished one after the other (the oldest as far as half of the room goes, or whole if it
fits; then the shortest remainder first), because computing eight together gives all eight their first token at the end.

A step with prompts stalls the answers that are being generated. Few long stalls serve them better than many short ones:
with eight streams, prompts of 48 words and answers of 64 tokens, pieces of a quarter of a second stalled more than one
token in twenty, whole prompts by twos and threes stall one in thirty (with prompts of 130 words one in twelve). So the
room for prompts grows with the number of sequences, within SHORTEST_STALL_S and LONGEST_STALL_S, and a prompt that fits
into the next step is not begun in this one. Prompts that are less urgent than others were get LOW_STALL_S only: whoever
comes meanwhile waits for the step's end. While nothing is generated a step ends with the first prompt that is done: its
first token waits for no other prompt.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from . import exact
from .scoring import ROWS_PER_STEP
from .slots import Slot

#: Room for prompts in a step, per sequence that runs: about fifteen times what its own next token costs.
ROOM_PER_SEQUENCE = 22
#: A step that carries prompt tokens should compute for no longer: it bounds inter-token latency and cancellation.
LONGEST_STALL_S = 1.0
#: ... and may compute for so long, however few sequences run.
SHORTEST_STALL_S = 0.25
#: ... where all its prompts are less urgent than others were: half of it is what a more urgent one waits on average.
LOW_STALL_S = 0.1
#: Smaller pieces of a prompt cost more per token than they save.
MIN_PREFILL_TOKENS = 32
#: llama.cpp's CPU flash attention computes 64 rows and more as tiles. That is faster the longer the context: per
#: token 7.0 against 8.3 ms in the first 512, 9 against 20 ms at 1600 (SmolLM2-135M, one thread).
TILE_TOKENS = 64
LONG_CONTEXT_TOKENS = 512
#: However slow the machine, a piece takes no longer: within a step nobody can tell slow work from a standstill.
LONGEST_PIECE_S = 10.0
#: So few tokens tell the machine's speed, too, if they take long.
FEW_TOKENS = 8


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
        deterministic: in batches of one sequence each (see ``exact``).
    """

    def __init__(self, room: int, *, deterministic: bool = False) -> None:
        self._room = room
        self._deterministic = deterministic
        self._token_s = 0.0  # a moving mean; 0: not known yet
        self._most_urgent = math.inf  # priority that was seen; where all are alike nobody has to make way

    def batches(self, busy: list[Slot], groups: int = 1) -> list[list[Entry]]:
        """The next step's batches: generating sequences first, then prompts as far as there is room.

        Args:
            groups: take turns with this one's steps; the others' sequences wait meanwhile, so a step takes less.
        """
        generating = [slot for slot in busy if slot.pending == 1]
        parts = self._parts(busy, len(generating), groups)
        entries = [Entry(slot, 1) for slot in generating]
        if self._deterministic:
            cuts = {slot: exact.cuts(part, slot.running.prompt_left(slot.cached)) for slot, part in parts.items()}
            entries += [Entry(slot, size) for slot, sizes in cuts.items() for size in sizes]
            return [[entry] for entry in entries]
        entries += [Entry(slot, part) for slot, part in parts.items()]
        return [entries] if entries else []

    def learn(self, tokens: int, computed_s: float) -> None:
        """Note how long a batch took to compute, if it was big enough to tell.

        Args:
            computed_s: the thread's own time: what others take from a busy machine is no reason for smaller batches.
        """
        if tokens >= MIN_PREFILL_TOKENS or (tokens >= FEW_TOKENS and computed_s >= LONGEST_STALL_S):
            now = computed_s / tokens
            self._token_s = now if not self._token_s else 0.8 * self._token_s + 0.2 * now

    def _parts(self, busy: list[Slot], generating: int, groups: int) -> dict[Slot, int]:
        """How many tokens of which prompts, in the order in which they are computed."""
        prompts = [slot for slot in busy if slot.pending > 1]
        if not prompts:
            return {}
        longest = max(slot.running.length for slot in prompts)
        self._most_urgent = min(self._most_urgent, *(slot.running.priority for slot in busy))
        lowest = min(slot.running.priority for slot in prompts) > self._most_urgent
        room = whole = (
            self._low_room(generating) if lowest else self._prefill_room(len(busy), longest, groups) - generating
        )
        oldest = min(prompts, key=lambda slot: slot.running.order)
        shortest = sorted(prompts, key=lambda slot: (slot.running.priority, slot.pending, slot.running.arrival))
        parts: dict[Slot, int] = {}
        done = False
        first = room if oldest.pending <= room else room // 2
        for slot, share in [(oldest, first), *((slot, room) for slot in shortest)]:
            taken = parts.get(slot, 0)
            wanted = _wanted(slot, taken)
            part = self._part(wanted, min(share, room))
            if part <= 0 or (done and part < wanted <= whole):
                continue
            parts[slot] = taken + part
            room -= part
            done = done or parts[slot] == slot.pending
            if done and not generating:
                break
        return parts

    def _part(self, wanted: int, affordable: int) -> int:
        """Tokens of a prompt for this step."""
        if self._deterministic and affordable > 0:
            return exact.part(wanted, affordable)
        return min(wanted, affordable)

    def _low_room(self, generating: int) -> int:
        """Tokens of prompts that are all less urgent than others: pieces that cost somewhat more, and hold up less."""
        tokens = MIN_PREFILL_TOKENS
        if self._token_s and not self._deterministic:  # whose pieces have sizes of their own
            few = max(1, min(FEW_TOKENS, int(LONGEST_PIECE_S / self._token_s)))
            tokens = max(few, int(LOW_STALL_S / self._token_s))
        return min(self._room - generating, tokens)

    def _prefill_room(self, sequences: int, longest: int, groups: int) -> int:
        """Tokens for the next step, of ``sequences`` among which is a prompt of ``longest`` tokens."""
        least = TILE_TOKENS if longest > LONG_CONTEXT_TOKENS else MIN_PREFILL_TOKENS
        if not self._token_s:
            return min(self._room, least + sequences)
        least = max(1, min(least, int(LONGEST_PIECE_S / self._token_s)))
        most, enough = (int(stall_s / self._token_s) for stall_s in (LONGEST_STALL_S, SHORTEST_STALL_S))
        tokens = max(enough, min(most, ROOM_PER_SEQUENCE * sequences)) // groups
        return min(self._room, max(least + sequences, tokens))


def _wanted(slot: Slot, taken: int) -> int:
    """Tokens that a prompt could use, of which it has ``taken`` already."""
    wanted = slot.pending - taken
    scored = slot.running.scores is not None and slot.running.prompt_left(slot.cached) > 0
    return min(wanted, ROWS_PER_STEP - taken) if scored else wanted
