"""How many replicas carry a load: by what one serves on the devices the fleet has, at the cautious end of its range.

The devices chosen are those of which the load takes the smallest part of a card (of several, those with the fewest
replicas). Others that serve as much are as good, and are left to the planner. A bound is no evidence: replicas come
from it only where that is accepted.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from aim_profile.errors import AimProfileError, SizingError
from aim_profile.gpus.catalog import by_name
from aim_profile.gpus.modes import DeviceMode
from aim_profile.models.facts import ModelFacts, Precision
from aim_profile.models.load import load_model
from aim_profile.plans.search.jobs import most_whole_cards
from aim_profile.serving.capacity import Asked, Evidenced
from aim_profile.serving.derive import served_precision
from aim_profile.sizing.asked import Promise
from aim_profile.sizing.capacity import MARKS, Capacity, Served

from .fleet import Fleet
from .load import Latencies, Load
from .plan import DerivedReplicas, PlanOptions
from .workload import MOST_REPLICAS, Workload, WorkloadError, Workloads

_WHOLE_CARDS = (1, 2, 4, 8)


class _Candidate(NamedTuple):
    """One kind of device, and what an engine on `tp` of them serves."""

    mode: DeviceMode
    tp: int
    capacity: Capacity

    @property
    def served(self) -> Served | None:
        """What is counted on: the cautious end; a bound has only the other."""
        return self.capacity.high if self.capacity.basis == "bound" else self.capacity.low

    @property
    def per_replica(self) -> float:
        return self.served.requests_per_s if self.served else 0.0

    @property
    def device(self) -> str:
        """`MI355X DPX/NPS2`."""
        return f"{self.mode.accelerator} {self.mode.label}"

    @property
    def in_words(self) -> str:
        """What an engine serves, where, and how that is known."""
        mark = MARKS[self.capacity.basis]
        end = " at the cautious end" if self.capacity.basis == "estimate" else ""
        return f"{self.per_replica:.3g} requests/s a replica on {self.device}{end} ({mark})"

    def replicas(self, load: Load) -> int:
        """How many carry it. A hair less than a whole number is that number."""
        return max(1, math.ceil(load.requests_per_s / self.per_replica - 1e-9))

    def cost(self, load: Load) -> tuple[float, int, str]:
        """Cards it takes, then replicas, then its name, so that equal input has one answer."""
        replicas = self.replicas(load)
        return replicas * self.tp / self.mode.partitions, replicas, self.device


class _Wanted(NamedTuple):
    """A workload with a load, and what is known of its model."""

    workload: Workload
    load: Load
    model: ModelFacts
    precision: Precision

    @property
    def said_context(self) -> int | None:
        """Tokens a sequence may have, where the workload says so."""
        return self.workload.context if "context" in self.workload.model_fields_set else None

    def asked(self, mode: DeviceMode, tp: int) -> Asked:
        """Of an engine over so many devices of that mode."""
        promise = self.workload.slo if isinstance(self.workload.slo, Latencies) else Promise()
        kv_dtype = self.workload.kv_dtype
        return Asked(self.model, self.precision, mode, self.load, promise, tp, kv_dtype, self.said_context)


class Loads:
    """Derives replicas for the workloads of one fleet."""

    def __init__(self, fleet: Fleet, options: PlanOptions, evidenced: Evidenced) -> None:
        self._fleet, self._options = fleet, options
        self._evidenced = evidenced
        self._without = Evidenced()
        self._most_cards = most_whole_cards(fleet)
        self._held: dict[tuple[object, ...], list[_Candidate]] = {}
        self._good: dict[tuple[int, str], tuple[str, ...]] = {}
        self._selected: dict[tuple[tuple[str, str], ...], tuple[DeviceMode, ...]] = {}

    def resolve(self, workloads: Workloads) -> tuple[Workloads, tuple[DerivedReplicas, ...]]:
        """The workloads with replicas in place of loads, and how each came about.

        Raises WorkloadError naming the workload: nothing keeps its slo, or there is only a bound.
        """
        resolved, derived = [], []
        for workload in sorted(workloads.workloads, key=lambda each: each.name):
            if workload.load is None:
                resolved.append(workload)
                continue
            with_replicas, how = self._one(workload, workload.load)
            resolved.append(with_replicas)
            derived += [how] if how else []
        return workloads.model_copy(update={"workloads": tuple(resolved)}), tuple(derived)

    def _one(self, workload: Workload, load: Load) -> tuple[Workload, DerivedReplicas | None]:
        try:
            model = load_model(workload.model or "")
            wanted = _Wanted(workload, load, model, served_precision(model, workload.precision))
            holding = self._holding(wanted)
        except AimProfileError as problem:
            raise _of(workload, problem.field, problem.problem, problem.value, problem.remedy) from problem
        context = wanted.said_context or load.context
        if not holding:
            # Only the planner says that nothing holds it, and by how much: it is asked for one replica.
            return workload.model_copy(update={"context": context}), None
        chosen, as_good = self._chosen(wanted, holding)
        replicas, served = chosen.replicas(load), chosen.served
        assert served is not None
        if replicas > MOST_REPLICAS:
            many = f"{load.requests_per_s:g} are {replicas} replicas, more than {MOST_REPLICAS}"
            raise _of(workload, "load.requests_per_s", many, load.requests_per_s)
        update = {"replicas": replicas, "concurrency": served.sequences, "context": context, "devices": as_good}
        return workload.model_copy(update=update), self._derived(wanted, chosen, served)

    def _chosen(self, wanted: _Wanted, holding: Sequence[_Candidate]) -> tuple[_Candidate, tuple[str, ...]]:
        """Where the load takes the least, and every kind of device on which a replica serves as much.

        What is better than a bound goes before it: a bound always promises more.
        """
        evident = [each for each in holding if each.capacity.basis != "bound"]
        if not evident and not self._options.accept_bound:
            why = "; ".join(dict.fromkeys(note for each in holding for note in each.capacity.notes))
            remedy = "give --evidence of it, say replicas, or accept the bound (--accept-bound)"
            raise _of(wanted.workload, "load", f"replicas are not derived from a bound: {why}", remedy=remedy)
        kept = [each for each in evident or holding if each.served is not None]
        if not kept:
            remedy = f"`aim-profile capacity {wanted.model.id} --every-mode` says what each mode serves"
            raise _of(
                wanted.workload, "slo", "no device of the fleet keeps it, not for a single request", remedy=remedy
            )
        chosen = min(kept, key=lambda each: each.cost(wanted.load))
        # Workloads that ask the same share what holds them.
        key = (id(holding), chosen.device)
        if key not in self._good:
            good = (each.device for each in kept if each is chosen or self._as_good(wanted, each, chosen))
            self._good[key] = tuple(dict.fromkeys(good))
        return chosen, self._good[key]

    def _as_good(self, wanted: _Wanted, other: _Candidate, chosen: _Candidate) -> bool:
        """Whether it serves as much with no more sequences at once than the replicas will be given."""
        assert chosen.served is not None
        asked = wanted.asked(other.mode, other.tp)._replace(most_sequences=chosen.served.sequences)
        found = self._evidenced.capacity(asked, only_cautious=True)
        return found is not None and other._replace(capacity=found).per_replica >= chosen.per_replica

    def _holding(self, wanted: _Wanted) -> list[_Candidate]:
        """The candidates, computed once for workloads whose requests and promises are the same."""
        workload, load = wanted.workload, wanted.load
        key = (
            *(wanted.model, wanted.precision, load.prompt_tokens, load.answer_tokens, workload.slo, workload.tp),
            *(workload.kv_dtype, wanted.said_context, workload.devices, tuple(sorted(workload.node_selector.items()))),
        )
        if key not in self._held:
            self._held[key] = list(self._candidates(wanted, self._evidenced))
        return self._held[key]

    def _candidates(self, wanted: _Wanted, evidenced: Evidenced) -> Iterator[_Candidate]:
        """Every kind of device of the fleet that holds it: a partition by itself, the fewest whole cards together."""
        given = wanted.workload.tp
        for mode in self._modes(wanted):
            together = [n for n in _WHOLE_CARDS if n <= self._most_cards[mode.accelerator]]
            for tp in (given,) if given else together if mode.partitions == 1 else (1,):
                try:
                    found = evidenced.capacity(wanted.asked(mode, tp), only_cautious=True)
                except SizingError as problem:
                    if problem.field != "tp" or given is not None:
                        raise
                    continue
                if found is not None:
                    yield _Candidate(mode, tp, found)
                    break

    def _modes(self, wanted: _Wanted) -> Iterator[DeviceMode]:
        """Those it may run in."""
        workload = wanted.workload
        for mode in self._modes_of(tuple(sorted(workload.node_selector.items()))):
            named = not workload.devices or f"{mode.accelerator} {mode.label}" in workload.devices
            formats = by_name(mode.accelerator).matrix_formats
            if named and (wanted.precision != "fp8" or any(name.startswith("fp8") for name in formats)):
                yield mode

    def _modes_of(self, selector: tuple[tuple[str, str], ...]) -> tuple[DeviceMode, ...]:
        """Those of the nodes with these labels. Nodes that came from one entry share their cards."""
        if selector not in self._selected:
            nodes = [node for node in self._fleet.nodes if not node.is_cpu and set(selector) <= set(node.labels)]
            alike = {(id(node.cards), node.switchable): node for node in nodes}.values()
            cards = {card: node.switchable for node in alike for card in node.cards}
            allowed = (card.allowed(self._options.tier, switchable) for card, switchable in cards.items())
            self._selected[selector] = tuple(dict.fromkeys(mode for modes in allowed for mode in modes))
        return self._selected[selector]

    def _derived(self, wanted: _Wanted, chosen: _Candidate, served: Served) -> DerivedReplicas:
        return DerivedReplicas(
            workload=wanted.workload.name,
            requests_per_s=wanted.load.requests_per_s,
            replicas=chosen.replicas(wanted.load),
            requests_per_s_each=round(chosen.per_replica, 4),
            concurrency=served.sequences,
            device=chosen.device,
            tp=chosen.tp,
            basis=chosen.capacity.basis,
            evidence=chosen.capacity.evidence,
            reason=f"{chosen.in_words}{self._otherwise(wanted, chosen)}",
        )

    def _otherwise(self, wanted: _Wanted, chosen: _Candidate) -> str:
        """What it would be without evidence of ours, where that decided."""
        if not chosen.capacity.ours:
            return ""
        others = [each for each in self._candidates(wanted, self._without) if each.capacity.basis != "bound"]
        kept = [each for each in others if each.served is not None]
        if not kept:
            return "; without that evidence there is only a bound"
        other = min(kept, key=lambda each: each.cost(wanted.load))
        return f"; without that evidence {other.replicas(wanted.load)} replicas: {other.in_words}"


def _of(workload: Workload, field: str, problem: str, value: object = None, remedy: str = "") -> WorkloadError:
    return WorkloadError(
        f"workload {workload.name}: {field}: {problem}", field=f"{workload.name}.{field}", value=value, remedy=remedy
    )
