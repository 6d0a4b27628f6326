"""Slots: what they believe to be in the cache is there, whatever comes and goes."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from aim_runtime.engines.llama_cpp.sequence import Delta, Generation, Sequence
from aim_runtime.engines.llama_cpp.slots import Slot, Slots, common_prefix

CELLS = 200


class ListCache:
    """The cache's contract over plain lists: what each slot holds, token by token."""

    cells = CELLS

    def __init__(self, count: int, *, partial: bool = True) -> None:
        self.held: list[list[int]] = [[] for _ in range(count)]
        self._partial = partial

    def keep(self, slot: int, length: int) -> bool:
        if length and not self._partial and length < len(self.held[slot]):
            return False
        del self.held[slot][length:]
        return True

    def share(self, source: int, target: int, length: int) -> None:
        assert self.held[target] == []
        self.held[target] = self.held[source][:length]


def ignore(delta: Delta) -> None:
    """A sink for sequences whose answers nobody reads."""


async def sequence(tokens: list[int]) -> Sequence:
    return Sequence(Generation(np.array(tokens, np.int32), max_tokens=4), 0, ignore)


def compute(cache: ListCache, slot: Slot) -> None:
    """What a decode does: the pending tokens enter the cache."""
    cache.held[slot.number] += slot.running.tokens[slot.cached :].tolist()
    slot.cached = slot.running.length


@given(st.lists(st.integers(0, 3), max_size=9), st.lists(st.integers(0, 3), max_size=9))
def test_common_prefix_counts_equal_tokens(a: list[int], b: list[int]):
    expected = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        expected += 1
    assert common_prefix(np.array(a, np.int32), np.array(b, np.int32)) == expected


ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("seat"), st.lists(st.integers(0, 1), min_size=1, max_size=12)),
        st.tuples(st.just("leave"), st.integers(0, 2)),
        st.tuples(st.just("evict"), st.none()),
    ),
    max_size=30,
)


@settings(max_examples=200)
@given(ACTIONS, st.booleans())
async def test_slots_always_know_what_the_cache_holds(actions: list[tuple[str, object]], partial: bool):
    cache = ListCache(3, partial=partial)
    slots = Slots(3, cache, keeps_prefixes=partial)
    for action, value in actions:
        if action == "seat":
            assert isinstance(value, list)
            slot = slots.seat(await sequence(value))
            if slot is not None:
                assert slot.cached < len(value)  # the last token is always computed
                assert cache.held[slot.number] == value[: slot.cached]
                compute(cache, slot)
        elif action == "leave" and slots.busy:
            assert isinstance(value, int)
            slots.leave(slots.busy[value % len(slots.busy)])
        elif action == "evict":
            slots.evict()
        for slot in [*slots.busy, *slots.free]:
            assert slot.tokens[: slot.cached].tolist() == cache.held[slot.number]


async def test_a_prompt_takes_the_slot_that_begins_alike():
    cache = ListCache(2)
    slots = Slots(2, cache, keeps_prefixes=True)
    for tokens in ([1, 2, 3, 4], [9, 9]):
        slot = slots.seat(await sequence(tokens))
        assert slot is not None
        compute(cache, slot)
    for slot in slots.busy:
        slots.leave(slot)
    again = slots.seat(await sequence([1, 2, 3, 7]))
    assert again is not None
    assert (again.number, again.cached) == (0, 3)


async def test_a_short_common_beginning_is_shared_and_the_long_rest_kept():
    cache = ListCache(2)
    slots = Slots(2, cache, keeps_prefixes=True)
    first = slots.seat(await sequence([1, *range(50, 90)]))
    assert first is not None
    compute(cache, first)
    slots.leave(first)
    second = slots.seat(await sequence([1, 2, 3]))
    assert second is not None
    assert (second.number, second.cached) == (1, 1)
    assert len(cache.held[0]) == 41


async def test_a_running_sequence_shares_its_prompt():
    cache = ListCache(2)
    slots = Slots(2, cache, keeps_prefixes=True)
    first = slots.seat(await sequence([1, 2, 3, 4]))
    assert first is not None
    compute(cache, first)
    second = slots.seat(await sequence([1, 2, 3, 4]))
    assert second is not None
    assert second.cached == 3
    assert slots.cells_in_use == 5


async def test_no_seat_without_a_slot_or_without_cells():
    cache = ListCache(2)
    slots = Slots(2, cache, keeps_prefixes=True)
    big = slots.seat(await sequence(list(range(150))))
    assert big is not None
    compute(cache, big)
    assert slots.seat(await sequence(list(range(500, 560)))) is None
    assert slots.seat(await sequence([7])) is not None
    assert slots.seat(await sequence([8])) is None
