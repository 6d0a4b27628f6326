"""The planner's objective, solved and proven by OR-Tools' CP-SAT. The only file that imports it (extra `exact`).

Each level of the objective is solved with the levels before it held at the best known, from the best solution so far:
at first the heuristic's. Counts, not single replicas: a
variable says how many replicas of a job stand in a card's (or hive's) mode, which is exact because the devices of a
card are alike. What CP-SAT finds is then placed by the same code as the heuristic's answer, so both are judged alike.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from aim_profile.plans.plan import PlanError
from aim_profile.sizing.fit import DEFAULT_UTILIZATION, budget_bytes
from aim_profile.units import MIB

from .bins import Bin, Found, slot_of, switching
from .heuristic import solve
from .problem import LEVELS, Job, Modes, PlanNode, Problem, with_avoided
from .state import State


def solve_exactly(problem: Problem, time_limit_s: float) -> tuple[State, bool]:
    """The best placement, and whether every level is proven. Starts from the heuristic's answer, and is never worse.

    time_limit_s: for each level. Raises PlanError without OR-Tools.
    """
    try:
        from ortools.sat.python import cp_model
    except ImportError as problem_:
        raise PlanError(
            "exact planning needs OR-Tools", field="exact", remedy="pip install 'aim-kserve[exact]', or leave exact out"
        ) from problem_
    start = solve(problem)
    model = _Model(cp_model, with_avoided(problem))
    known = model.solved_as(start, time_limit_s)
    proven = True
    for level in model.levels:
        solver, status = model.solve(level, time_limit_s, known)
        proven = proven and status == cp_model.OPTIMAL
        if status in (cp_model.OPTIMAL, cp_model.FEASIBLE) and (
            known is None or solver.value(level) <= known.value(level)
        ):
            known = solver
        if known is None:
            return start, False
        model.program.add(level <= known.value(level))
    state = model.state(known)
    return (state, proven) if state.score() <= start.score() else (start, False)


class _Model:
    """One CP-SAT model. A *site* is (node, card) for partitioned modes and (node, hive) for whole cards."""

    def __init__(self, cp: Any, problem: Problem) -> None:
        self.problem = problem
        self.program = cp.CpModel()
        self.cp = cp
        self.variables: list[Any] = []
        self.mode: dict[tuple[int, int, str | None], Any] = {}  # node, card position, label → bool
        self.count: dict[tuple[int, int, int, int], Any] = {}  # job, node, site, kind → replicas
        self.shared: dict[tuple[int, int, int, int, int], Any] = {}  # … with limit: + device of the site
        self.device: dict[tuple[int, int, int, int], Any] = {}  # node, site, kind, device → shared at all
        self.used: dict[tuple[int, int], Any] = {}
        self.stay: dict[int, Any] = {}
        self.sites: dict[tuple[int, int, int], list[int]] = {}  # node, site, kind → card positions
        for node in problem.nodes:
            self._modes(node)
            self._sites(node)
        for job in problem.jobs:
            self._job(job)
        for (number, site, kind), cards in self.sites.items():
            self._capacity(number, site, kind, cards)
        self._use()
        self._relations()
        self._running()
        self.levels = self._objective()

    # --- solving --------------------------------------------------------------------------------------------------

    def solve(self, level: Any, time_limit_s: float, known: Any) -> tuple[Any, Any]:
        """A solver that has minimised `level`, from the solution `known` holds if it is not None; and its status."""
        self.program.clear_hints()
        for variable in self.variables if known is not None else ():
            self.program.add_hint(variable, known.value(variable))
        return self._solver(level, time_limit_s)

    def solved_as(self, state: State, time_limit_s: float) -> Any:
        """A solver that holds `state` as its solution; None where that cannot be said in this model, or not in time."""
        self.program.clear_hints()
        for variable, value in self._values(state):
            self.program.add_hint(variable, value)
        # What follows from these (cards used, nodes drained …) is as little as it can be.
        solver, status = self._solver(sum(self.levels), time_limit_s, fixed=True)
        return solver if status in (self.cp.OPTIMAL, self.cp.FEASIBLE) else None

    def _solver(self, objective: Any, time_limit_s: float, *, fixed: bool = False) -> tuple[Any, Any]:
        solver = self.cp.CpSolver()
        solver.parameters.max_time_in_seconds = time_limit_s
        solver.parameters.num_workers = 1
        solver.parameters.random_seed = 1
        solver.parameters.fix_variables_to_their_hinted_value = fixed
        self.program.minimize(objective)
        return solver, solver.solve(self.program)

    def _values(self, state: State) -> Iterator[tuple[Any, int]]:
        """The variables that say which mode each card is in and who stands where, as in `state`."""
        counts: Counter[tuple[int, ...]] = Counter()
        for bin_ in state.bins:
            for held in bin_.held if bin_.alive else ():
                key = (held.job.index, bin_.node, self._site(bin_), bin_.kind.number)
                counts[key] += 1
                if held.shared is not None:
                    counts[*key, self._number(bin_, held.slots[0])] += 1
        yield from ((variable, counts[key]) for key, variable in (*self.count.items(), *self.shared.items()))
        opened = {key[1:] for key in counts if len(key) == 5}
        yield from ((variable, key in opened) for key, variable in self.device.items())
        for node in self.problem.nodes:
            labels = state.label[node.number]
            current = [card.current for card in node.cards]
            switched = state.touched[node.number] and labels != current
            for at, label in enumerate(labels):
                kept = not switched or (self.problem.mixed and label == current[at])
                yield self.mode[node.number, at, None if kept else label], 1

    def _number(self, bin_: Bin, slot: int) -> int:
        """Which device of its site a slot is."""
        if not bin_.kind.whole:
            return slot
        return self.sites[bin_.node, self._site(bin_), bin_.kind.number].index(bin_.cards[slot])

    def _new(self, most: int) -> Any:
        """A variable from 0 to `most`."""
        made = self.program.new_bool_var("") if most == 1 else self.program.new_int_var(0, most, "")
        self.variables.append(made)
        return made

    # --- variables ------------------------------------------------------------------------------------------------

    def _modes(self, node: PlanNode) -> None:
        """Each card one mode; one memory mode; one compute mode unless mixed. None: as found."""
        fixed = any(run.fixed and run.node == node.number for run in self.problem.running)
        labels = node.labels if not fixed or self.problem.mixed else ()
        for at in range(len(node.cards)):
            for label in (None, *labels):
                self.mode[node.number, at, label] = self._new(1)
            self.program.add_exactly_one(self.mode[node.number, at, label] for label in (None, *labels))
        for at in range(1, len(node.cards)):
            if not self.problem.mixed:
                for label in (None, *labels):
                    self.program.add(self.mode[node.number, at, label] == self.mode[node.number, 0, label])
        if self.problem.mixed:
            self._one_memory(node, labels)

    def _one_memory(self, node: PlanNode, labels: tuple[str, ...]) -> None:
        memories = sorted({_memory(label) for label in (*labels, *(c.current for c in node.cards)) if label})
        chosen = {memory: self._new(1) for memory in memories}
        self.program.add_exactly_one(chosen.values())
        for at, card in enumerate(node.cards):
            for label in (None, *labels):
                if memory := _memory(label or card.current):
                    self.program.add_implication(self.mode[node.number, at, label], chosen[memory])

    def _sites(self, node: PlanNode) -> None:
        for at, card in enumerate(node.cards):
            for kind in {*card.kinds.values(), card.as_found} - {-1}:
                whole = self.problem.kinds[kind].whole
                self.sites.setdefault((node.number, -1 - card.hive if whole else at, kind), []).append(at)

    def _in_kind(self, node: int, at: int, kind: int) -> Any:
        """How many (0 or 1) of the mode variables put that card into that kind."""
        card = self.problem.nodes[node].cards[at]
        labels = [label for label, number in card.kinds.items() if number == kind]
        found = [self.mode[node, at, label] for label in labels if (node, at, label) in self.mode]
        return sum(found) + (self.mode[node, at, None] if card.as_found == kind else 0)

    def _job(self, job: Job) -> None:
        replicas = job.workload.replicas
        for (node, site, kind), cards in self.sites.items():
            if kind not in job.options or not self._pinned_here(job, node, cards, kind):
                continue
            key = (job.index, node, site, kind)
            self.count[key] = self._new(replicas)
            if job.limit is not None:
                slot = self._pinned_slot(job, cards, kind)
                numbers = range(self._devices(kind, cards)) if slot is None else (slot,)
                for number in numbers:
                    self.shared[*key, number] = self._new(replicas)
                self.program.add(self.count[key] == sum(self.shared[*key, number] for number in numbers))
        self.program.add(sum(self._of(job)) <= replicas)

    def _pinned_here(self, job: Job, node: int, cards: list[int], kind: int) -> bool:
        if job.pin is None:
            return True
        pinned, card, partition = job.pin
        fits = partition is None or partition < self.problem.kinds[kind].partitions
        return pinned == node and (card is None or card in cards) and fits

    def _of(self, job: Job, node: int | None = None) -> list[Any]:
        return [count for (index, at, _, _), count in self.count.items() if index == job.index and node in (None, at)]

    def _devices(self, kind: int, cards: list[int]) -> int:
        return len(cards) if self.problem.kinds[kind].whole else self.problem.kinds[kind].partitions

    def _pinned_slot(self, job: Job, cards: list[int], kind: int) -> int | None:
        """The device of the site a pin names, None: any."""
        if job.pin is None or job.pin[1] is None:
            return None
        return cards.index(job.pin[1]) if self.problem.kinds[kind].whole else job.pin[2]

    # --- constraints ----------------------------------------------------------------------------------------------

    def _capacity(self, node: int, site: int, kind: int, cards: list[int]) -> None:
        per_card = self.problem.kinds[kind].partitions
        jobs = [job for job in self.problem.jobs if (job.index, node, site, kind) in self.count]
        alone = [job for job in jobs if job.limit is None]
        taken = sum(self.count[job.index, node, site, kind] * job.options[kind].devices for job in alone)
        for number in range(self._devices(kind, cards)):
            pinned = [
                self.count[j.index, node, site, kind] for j in alone if self._pinned_slot(j, cards, kind) == number
            ]
            sharing = [job for job in jobs if (job.index, node, site, kind, number) in self.shared]
            if sharing:
                open_ = self._shared_device(node, site, kind, number, sharing)
                taken += open_
                pinned.append(open_)
            if pinned:
                card = cards[number if self.problem.kinds[kind].whole else 0]
                self.program.add(sum(pinned) <= self._in_kind(node, card, kind))
        self.program.add(taken <= per_card * sum(self._in_kind(node, at, kind) for at in cards))

    def _shared_device(self, node: int, site: int, kind: int, number: int, sharing: list[Job]) -> Any:
        """Whether that device is shared: then the limits on it stay within its budget."""
        open_ = self.device[node, site, kind, number] = self._new(1)
        budget = budget_bytes(self.problem.kinds[kind].device_bytes, DEFAULT_UTILIZATION)
        limits = sum(self.shared[job.index, node, site, kind, number] * _mib(job.limit or 0) for job in sharing)
        self.program.add(limits <= (budget // MIB) * open_)
        for job in sharing:
            if job.workload.spread == "card" and self.problem.kinds[kind].whole:
                self.program.add(self.shared[job.index, node, site, kind, number] <= 1)
        return open_

    def _use(self) -> None:
        """Cards in use: whole cards by count, partitioned ones by a variable."""
        self.cards = []
        for node, site, kind in self.sites:
            whole = self.problem.kinds[kind].whole
            amounts = [
                (count, self.problem.jobs[index].options[kind].devices)
                for (index, at, where, what), count in self.count.items()
                if (at, where, what) == (node, site, kind) and self.problem.jobs[index].limit is None
            ]
            open_ = [v for (n, s, k, _), v in self.device.items() if (n, s, k) == (node, site, kind)]
            if whole:
                self.cards.append(sum(count * devices for count, devices in amounts) + sum(open_))
            elif amounts or open_:
                used = self._new(1)
                per_card = self.problem.kinds[kind].partitions
                total = sum(count * devices for count, devices in amounts) + sum(open_)
                self.program.add(total <= per_card * used)
                self.cards.append(used)

    def _relations(self) -> None:
        """Spread, affinity and anti-affinity, by presence on a node."""
        presence: dict[tuple[int, int], Any] = {}

        def present(job: Job, node: int) -> Any:
            if (job.index, node) not in presence:
                counts = self._of(job, node)
                here = presence[job.index, node] = self._new(1)
                self.program.add(sum(counts) >= here)
                self.program.add(sum(counts) <= job.workload.replicas * here)
            return presence[job.index, node]

        for job in self.problem.jobs:
            self._spread(job)
            for node in self.problem.nodes:
                for other in job.affinity:
                    self.program.add_implication(
                        present(job, node.number), present(self.problem.jobs[other], node.number)
                    )
                for other in job.anti_affinity:
                    if other < job.index:
                        self.program.add_at_most_one(
                            present(job, node.number), present(self.problem.jobs[other], node.number)
                        )
                if job.index in job.anti_affinity:
                    self.program.add(sum(self._of(job, node.number)) <= 1)

    def _spread(self, job: Job) -> None:
        if job.workload.spread == "node":
            for node in self.problem.nodes:
                self.program.add(sum(self._of(job, node.number)) <= 1)
        elif job.workload.spread == "card":
            for (index, _, _, kind), count in self.count.items():
                if index == job.index and not self.problem.kinds[kind].whole:
                    self.program.add(count <= 1)

    def _running(self) -> None:
        """A running replica stays, or (not fixed) may; several of a job at one site count together."""
        groups: dict[tuple[int, int, int], list[bool]] = {}
        for run in self.problem.running:
            groups.setdefault((run.job, run.node, run.devices[0][0]), []).append(run.fixed)
        for at, ((index, node, position), fixed) in enumerate(groups.items()):
            card = self.problem.nodes[node].cards[position]
            whole = self.problem.kinds[card.as_found].whole
            count = self.count.get((index, node, -1 - card.hive if whole else position, card.as_found), 0)
            staying = self.stay[at] = self._new(len(fixed))
            self.program.add(staying <= count)
            self.program.add(staying >= sum(fixed))

    # --- objective ------------------------------------------------------------------------------------------------

    def _objective(self) -> list[Any]:
        placed: list[list[Any]] = [[] for _ in range(LEVELS)]
        for job in self.problem.jobs:
            placed[job.own_level] += self._of(job)
        drains, switches = [], []
        for node in self.problem.nodes:
            moved = self._changes(node)
            drains.append(moved[0])
            switches.append(moved[1])
        levels = [-sum(counts) for counts in placed if counts]
        spanning = [
            count for (index, _, _, kind), count in self.count.items() if kind in self.problem.jobs[index].avoided
        ]
        return [*levels, sum(spanning), sum(drains), sum(switches), -sum(self.stay.values()), sum(self.cards)]

    def _changes(self, node: PlanNode) -> tuple[Any, Any]:
        switches: list[Any] = []
        drain = self._new(1)
        for at, card in enumerate(node.cards):
            for (number, position, label), chosen in self.mode.items():
                if number == node.number and position == at and label is not None:
                    memory, compute = switching([label], [card.current])
                    if memory:
                        self.program.add_implication(chosen, drain)
                    if compute:
                        switches.append(chosen)
        return drain, sum(switches)

    # --- the answer -----------------------------------------------------------------------------------------------

    def state(self, solver: Any) -> State:
        """The solver's counts as a placement."""
        state = State(self.problem, self._chosen_modes(solver))
        left = {key: solver.value(count) for key, count in self.count.items()}
        for run in self.problem.running:
            job = self.problem.jobs[run.job]
            for bin_ in state.of_node[run.node]:
                key = (job.index, run.node, self._site(bin_), bin_.kind.number)
                if left.get(key) and run.devices[0][0] in bin_.cards:
                    slots = [slot_of(bin_, device) for device in run.devices]
                    shared = state.shared.at(bin_, slots[0])
                    if shared is not None or not bin_.taken.intersection(slots):
                        state.place(job, Found(bin_, shared), run)
                        left[key] -= 1
        for job in sorted(self.problem.jobs, key=lambda job: (job.rank, job.pin is None, job.index)):
            for bin_ in [b for b in state.bins if b.alive]:
                key = (job.index, bin_.node, self._site(bin_), bin_.kind.number)
                for found in self._places(state, job, bin_, left.get(key, 0), solver):
                    state.place(job, found)
        return state

    def _places(self, state: State, job: Job, bin_: Bin, number: int, solver: Any) -> Iterator[Found]:
        for _ in range(number):
            if job.limit is None:
                slot = state.pinned_slot(job, bin_)
                if bin_.free >= job.options[bin_.kind.number].devices:
                    yield Found(bin_, slot=slot)
            elif found := state.find_in(job, bin_):
                yield found

    def _site(self, bin_: Bin) -> int:
        if not bin_.kind.whole:
            return bin_.cards[0]
        return -1 - self.problem.nodes[bin_.node].cards[bin_.cards[0]].hive

    def _chosen_modes(self, solver: Any) -> Modes:
        modes: Modes = {}
        for node in self.problem.nodes:
            labels = []
            for at, card in enumerate(node.cards):
                chosen = [
                    label for (n, p, label), v in self.mode.items() if (n, p) == (node.number, at) and solver.value(v)
                ]
                labels.append(chosen[0] or card.current)
            if any(label != card.current for label, card in zip(labels, node.cards, strict=True)):
                modes[node.number] = tuple(label or "" for label in labels)
        return modes


def _memory(label: str | None) -> str:
    return label.partition("/")[2] if label else ""


def _mib(limit_bytes: int) -> int:
    """Rounded up, so that whole MiB never promise more than there is."""
    return -(-limit_bytes // MIB)
