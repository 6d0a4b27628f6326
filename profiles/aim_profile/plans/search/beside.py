"""Room beside others: replicas that must stand together move to a node that holds them and one more.

Targets of affinities are placed first, packed like any replica. Who must stand beside them may then find their nodes
full while other nodes stand empty.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from .bins import Bin, Held
from .problem import Job
from .state import State

# Replicas that move for one more, at most: more would cost more than the one is worth.
_MOST = 16
_Place = tuple[Bin, Held]


def move_together(state: State, job: Job, nodes: Iterable[int]) -> bool:
    """Move what `job` must stand beside to the first of `nodes` that holds it and one replica of `job`.

    False, and nothing moved, where none does, or where somebody of them runs there now or is pinned.
    """
    group = _group(state, job)
    return bool(group) and any(_move(state, job, group, node) for node in nodes)


def _group(state: State, job: Job) -> list[_Place]:
    """One replica of each target, and on their nodes whoever must stand beside these; empty where they cannot move."""
    wanted = [place for target in job.affinity if (place := _one_of(state, target)) is not None]
    if len(wanted) < len(job.affinity):
        return []
    found: dict[int, _Place] = {}
    leaving: Counter[tuple[int, int]] = Counter()
    while wanted:
        bin_, held = wanted.pop()
        if id(held) in found:
            continue
        if held.fixed or held.replica is not None or held.job.pin is not None or len(found) == _MOST:
            return []
        found[id(held)] = (bin_, held)
        leaving[held.job.index, bin_.node] += 1
        wanted += _bound_to(state, bin_.node, held.job, leaving[held.job.index, bin_.node])
    return sorted(found.values(), key=lambda place: (place[1].job.rank, place[1].job.index))


def _one_of(state: State, job: int) -> _Place | None:
    nodes = sorted(node for node, count in state.where.get(job, Counter()).items() if count)
    return next((place for node in nodes for place in _on_node(state, node) if place[1].job.index == job), None)


def _bound_to(state: State, node: int, job: Job, leaving: int) -> list[_Place]:
    """A replica of each of the job's targets on that node; and its dependents there, if no replica of it stays."""
    last = state.where[job.index][node] == leaving
    bound: dict[int, _Place] = {}
    dependents = []
    for place in _on_node(state, node):
        other = place[1].job
        if other.index in job.affinity:
            bound.setdefault(other.index, place)
        if last and job.index in other.affinity:
            dependents.append(place)
    return [*bound.values(), *dependents]


def _on_node(state: State, node: int) -> list[_Place]:
    return [(bin_, held) for bin_ in state.of_node[node] for held in bin_.held]


def _move(state: State, job: Job, group: list[_Place], node: int) -> bool:
    """Place copies on that node, and only if all fit (and `job` too) take the originals away."""
    copies: list[_Place] = []
    for moved in (*(held.job for _, held in group), job):
        found = state.find_on(moved, (node,))
        if found is None:
            break
        copies.append((found.bin, state.place(moved, found)))
    fits = len(copies) > len(group)
    # The place of `job` itself is found again by whoever asked.
    for bin_, held in [*group, copies[-1]] if fits else reversed(copies):
        state.remove(bin_, held)
    return fits
