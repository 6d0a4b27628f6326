"""What a step computes: generating sequences always, prompts whole and in an order that starves none."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aim_runtime.engines.llama_cpp.batch_plan import (
    LONGEST_PIECE_S,
    LONGEST_STALL_S,
    LOW_STALL_S,
    MIN_PREFILL_TOKENS,
    ROOM_PER_SEQUENCE,
    BatchPlan,
    Entry,
)
from aim_runtime.engines.llama_cpp.exact import CHUNK_TOKENS
from aim_runtime.engines.llama_cpp.sequence import Delta, Generation, Sequence
from aim_runtime.engines.llama_cpp.slots import Slot

TOKEN_S = 0.005
_arrivals = itertools.count(1)


def ignore(delta: Delta) -> None:
    """A sink for sequences whose answers nobody reads."""


def slot(number: int, length: int, cached: int = 0) -> Slot:
    sequence = Sequence(Generation(np.zeros(length, np.int32), max_tokens=999), 0, ignore)
    sequence.arrival = next(_arrivals)
    return Slot(number, cached=cached, sequence=sequence)


def plan(token_s: float = TOKEN_S, *, deterministic: bool = False) -> BatchPlan:
    """One that knows the machine's speed."""
    made = BatchPlan(512, deterministic=deterministic)
    made.learn(100, 100 * token_s)
    return made


def compute(entry: Entry) -> None:
    """What a decode does, and the sampling after it."""
    completes = entry.completes
    entry.slot.cached += entry.count
    if completes:
        entry.slot.running.append(0)


def computed(batches: list[list[Entry]]) -> dict[int, list[int]]:
    """Slot → the sizes of its parts; as if they had been computed."""
    sizes: dict[int, list[int]] = {}
    for entry in itertools.chain(*batches):
        sizes.setdefault(entry.slot.number, []).append(entry.count)
        compute(entry)
    return sizes


async def test_who_generates_is_in_every_step():
    busy = [slot(0, 50, 49), slot(1, 90), slot(2, 80, 79)]
    (batch,) = plan().batches(busy)
    assert [(entry.slot.number, entry.count) for entry in batch] == [
        (0, 1),
        (2, 1),
        (1, 3 * ROOM_PER_SEQUENCE - 2),
    ]


async def test_the_first_prompt_that_is_done_waits_for_no_other():
    busy = [slot(number, 50) for number in range(8)]
    steps = plan()
    assert computed(steps.batches(busy)) == {0: [50]}
    assert computed(steps.batches(busy)) == {0: [1], 1: [50], 2: [50], 3: [50]}  # and then few stalls, not many


async def test_a_prompt_that_fits_into_the_next_step_is_not_cut():
    busy = [slot(0, 50, 49), slot(1, 60), slot(2, 40), slot(3, 50)]
    steps = plan()
    assert computed(steps.batches(busy)) == {0: [1], 1: [60]}  # 88 fit: not a piece of another, too
    assert computed(steps.batches(busy)) == {0: [1], 1: [1], 2: [40]}
    assert computed(steps.batches(busy)) == {0: [1], 1: [1], 2: [1], 3: [50]}


async def test_a_step_takes_no_longer_than_it_may():
    busy = [slot(0, 50, 49), *(slot(number, 400) for number in range(1, 16))]
    (batch,) = plan().batches(busy)
    assert sum(entry.count for entry in batch) == int(LONGEST_STALL_S / TOKEN_S)
    (batch,) = plan(token_s=1.0).batches(busy)
    assert sum(entry.count for entry in batch) <= MIN_PREFILL_TOKENS + len(busy)


async def test_steps_of_the_less_urgent_are_short_once_more_urgent_ones_have_come():
    steps, busy = plan(), [slot(number, 400) for number in range(8)]
    (batch,) = steps.batches(busy)
    assert sum(entry.count for entry in batch) == 8 * ROOM_PER_SEQUENCE  # all are alike
    urgent = slot(8, 50, 49)
    urgent.running.priority = -1
    steps.batches([*busy, urgent])
    (batch,) = steps.batches(busy)
    assert sum(entry.count for entry in batch) == int(LOW_STALL_S / TOKEN_S)
    busy[3].running.priority = -1
    (batch,) = steps.batches(busy)
    assert sum(entry.count for entry in batch) == 8 * ROOM_PER_SEQUENCE


async def test_a_long_prompt_gets_on_while_short_ones_keep_coming():
    long = slot(0, 2000)
    steps = plan()
    turns = 0
    while long.pending > 1:
        turns += 1
        computed(steps.batches([long, slot(1, 30), slot(2, 40), slot(3, 60, 59)]))
    assert turns <= 2000 / (ROOM_PER_SEQUENCE * 4 // 2 - 2)


@settings(max_examples=100)
@given(st.lists(st.integers(1, 400), min_size=1, max_size=8), st.floats(0.0005, 0.2))
async def test_exact_batches_have_shapes_of_their_sequences_own(lengths: list[int], token_s: float):
    """However many run and however fast: a prompt is cut every CHUNK_TOKENS, each chunk alone; and all get done."""
    busy = [slot(number, length) for number, length in enumerate(lengths)]
    steps = plan(token_s, deterministic=True)
    for _ in range(2000):
        prompts = [each for each in busy if each.pending > 1]
        if not prompts:
            break
        for batch in steps.batches(busy):
            (entry,) = batch
            if entry.slot.pending == 1:
                assert entry.count == 1
                continue
            assert entry.slot.cached % CHUNK_TOKENS == 0
            assert entry.count == min(CHUNK_TOKENS, entry.slot.pending)
            compute(entry)
    assert all(each.pending == 1 for each in busy)


@pytest.mark.parametrize(("tokens", "learnt"), [(MIN_PREFILL_TOKENS - 1, False), (MIN_PREFILL_TOKENS, True)])
async def test_only_batches_of_some_size_tell_the_speed(tokens: int, learnt: bool):
    made = BatchPlan(512)
    made.learn(tokens, tokens * TOKEN_S)
    (batch,) = made.batches([slot(0, 400), slot(1, 400)])
    assert (sum(entry.count for entry in batch) > MIN_PREFILL_TOKENS + 2) is learnt


@pytest.mark.parametrize(("token_s", "most"), [(0.1, 64), (0.5, 20), (2.0, 5), (60.0, 1)])
async def test_a_machine_that_is_very_slow_shows_that_it_goes_on(token_s: float, most: int) -> None:
    """A long prompt there takes many steps, not one that looks like standing still; the warm-up tells the speed."""
    made = BatchPlan(512)
    made.learn(20, 20 * token_s)
    long = slot(0, 2000)
    while long.pending > 1000:
        (part,) = computed(made.batches([long]))[0]
        assert part <= most + 1  # one of the sequence's own
        assert part * token_s <= LONGEST_PIECE_S + token_s or part == 2
        made.learn(part, part * token_s)
