"""What got no device as it was asked for gets one in another form, where its workload names some.

Only devices that nobody stands on are given, so no fallback takes one from a replica that is placed as asked.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from .bins import Bin, Found, Held
from .build import Builder, Strategy
from .problem import Job
from .state import State

_Standing = tuple[Bin, Held]


def fall_back(state: State, again: bool = False) -> State:
    """The same placement with more in it; in its problem each job is in the form that was taken.

    Urgent jobs first; each as it was asked for, should another's fallback have left it room, then in its fallbacks.
    Linear: a form for which there was no room is looked for again only after somebody gave a device back.
    again: look once more for whoever is short, whether or not anybody has a fallback.
    """
    short = [job for job in state.problem.jobs if state.count[job.index] < job.workload.replicas]
    if again or any(job.fallbacks for job in short):
        _Fallbacks(state, short).take()
    return state


class _Fallbacks:
    def __init__(self, state: State, short: list[Job]) -> None:
        self.state = state
        self.short = sorted(short, key=lambda job: (job.level, job.rank, job.index))
        self.standing = _standing(state, {job.index for job in short if job.fallbacks and state.count[job.index]})
        empty = any(node.labels and not state.touched[node.number] for node in state.problem.nodes)
        self.builder = Builder(state.problem, Strategy(), {}, may_switch=empty, onto=state)
        self.full: set[int] = set()

    def take(self) -> None:
        taken = {}
        for job in self.short:
            missing = job.workload.replicas - self.state.count[job.index]
            added = self._add(job, missing)
            if len(added) < missing and (form := self._fallen(job, added)):
                taken[job.index] = form
        problem = self.state.problem
        self.state.problem = replace(problem, jobs=tuple(taken.get(job.index, job) for job in problem.jobs))

    def _add(self, job: Job, replicas: int) -> list[_Standing]:
        """Place up to so many. A shape that found no room finds none until somebody gives some back."""
        if not job.options or (job.shape in self.full and not job.constrained):
            return []
        placed = self.builder.add(job, replicas)
        if len(placed) < replicas and not job.constrained:
            self.full.add(job.shape)
        return placed

    def _fallen(self, job: Job, added: list[_Standing]) -> Job | None:
        """The first form in which all its replicas have a device, else that in which most have, placed. None: it stays
        as it stands, for no form does better, it runs so, or others stand where they do because of it.
        """
        here = [*self.standing.get(job.index, ()), *added]
        if (
            not job.fallbacks
            or any(held.fixed and held.replica is not None for _, held in here)
            or (here and job.rank < 0)
        ):
            return None
        full, may_switch = self.full, self.builder.may_switch
        if here:
            self._take_away(here)
            self.full = set()
            self.builder.may_switch = False  # their nodes may have to take them back
        form, most = self._best_form(job, len(here))
        if form is not None:
            self._add(form, most)
        else:
            self.full = full
            self._put_back(job, here)
        self.builder.may_switch = may_switch
        return form

    def _best_form(self, job: Job, placed: int) -> tuple[Job | None, int]:
        """The form in which most replicas find a device, more than `placed`, and how many; the first of equals."""
        best: Job | None = None
        for form in _forms(job):
            found = self._add(form, job.workload.replicas)
            self._take_away(found)
            self.full.discard(form.shape)
            if len(found) > placed:
                best, placed = form, len(found)
            if placed == job.workload.replicas:
                break
        return best, placed

    def _take_away(self, placed: list[_Standing]) -> None:
        for bin_, held in placed:
            self.state.remove(bin_, held)

    def _put_back(self, job: Job, here: list[_Standing]) -> None:
        for bin_, held in here:
            shared = self.state.shared.at(bin_, held.slots[0]) if job.limit is not None else None
            self.state.place(job, Found(bin_, shared, self.state.pinned_slot(job, bin_)))


def _forms(job: Job) -> Iterator[Job]:
    """Its fallbacks in their order, each over several partitions of a card only where it finds no place else."""
    for form in job.fallbacks:
        yield form
        if form.avoided:
            yield replace(form, options=form.options | form.avoided)


def _standing(state: State, jobs: set[int]) -> dict[int, list[_Standing]]:
    """Where the replicas of these jobs stand."""
    found: dict[int, list[_Standing]] = {}
    for bin_ in state.bins if jobs else ():
        for held in bin_.held if bin_.alive else ():
            if held.job.index in jobs:
                found.setdefault(held.job.index, []).append((bin_, held))
    return found
