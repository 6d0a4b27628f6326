"""Which rows share a sequence."""

from __future__ import annotations

from collections.abc import Sequence


def best_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Positions of `lengths`, in groups whose sum is at most `capacity`: the longest first, each into the fullest group
    that still has room (Johnson 1974: at most 11/9 of the fewest groups, and about 1 more). Equal lengths keep their
    order, so a shuffle before decides who sits beside whom. Raises ValueError for a length above capacity.
    """
    groups: list[list[int]] = []
    waiting: dict[int, list[list[int]]] = {}
    # Bit r is set where a group has room for r more: the tightest fit is the lowest set bit from `length` up.
    rooms = 0
    for position in sorted(range(len(lengths)), key=lambda position: -lengths[position]):
        length = lengths[position]
        fitting = rooms >> length
        room = (fitting & -fitting).bit_length() - 1 + length if fitting else capacity
        if length > room:
            raise ValueError(f"a row of {length} tokens does not fit into {capacity}")
        if fitting:
            group = waiting[room].pop()
            if not waiting[room]:
                rooms ^= 1 << room
        else:
            group = []
            groups.append(group)
        group.append(position)
        left = waiting.setdefault(room - length, [])
        left.append(group)
        rooms |= 1 << (room - length)
    return groups
