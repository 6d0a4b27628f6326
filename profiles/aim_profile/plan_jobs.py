"""Workloads as jobs: how each runs on every kind of device, how urgent it is, beside whom it stands."""

from __future__ import annotations

from collections.abc import Mapping

from .errors import AimProfileError
from .facts import ModelFacts
from .fleet import Fleet
from .gpu import catalog
from .model import load_model
from .plan import PRIORITIES
from .plan_need import cards_taken, device_counts, most_whole_cards, need_bytes
from .plan_problem import DeviceKind, Job, Option, PlanNode, selector
from .sizing import DEFAULT_UTILIZATION, budget_bytes
from .units import parse_memory
from .workload import Workload, WorkloadError, Workloads


class Jobs:
    """Workloads as jobs. Sizes are computed once for workloads that ask the same."""

    def __init__(self, kinds: tuple[DeviceKind, ...], nodes: tuple[PlanNode, ...], fleet: Fleet) -> None:
        self._kinds = kinds
        self._nodes = {node.name: node for node in nodes}
        self._most_cards = most_whole_cards(fleet)
        self._sizes: dict[tuple[object, ...], Mapping[int, Option]] = {}
        self._shapes: dict[object, int] = {}
        self._models: dict[str, ModelFacts] = {}

    def of(self, workloads: Workloads) -> tuple[Job, ...]:
        ordered = sorted(workloads.workloads, key=lambda w: w.name)
        index = {workload.name: at for at, workload in enumerate(ordered)}
        levels, ranks = _urgency(ordered, index)
        against: dict[int, set[int]] = {}
        for at, workload in enumerate(ordered):
            for other in workload.anti_affinity:
                against.setdefault(at, set()).add(index[other])
                against.setdefault(index[other], set()).add(at)
        return tuple(
            Job(
                index=at,
                workload=workload,
                options=(options := self._options(workload)),
                own_level=own_level(workload),
                level=levels[at],
                rank=ranks[at],
                shape=self._shape(workload, options),
                pin=self._pin(workload),
                affinity=tuple(sorted(index[name] for name in workload.affinity)),
                anti_affinity=tuple(sorted(against.get(at, ()))),
                limit=parse_memory(workload.memory_limit) if workload.shares and workload.memory_limit else None,
                size=min((cards_taken(o, self._kinds[k]) for k, o in options.items()), default=0.0),
            )
            for at, workload in enumerate(ordered)
        )

    def _shape(self, workload: Workload, options: Mapping[int, Option]) -> int:
        key = (*((k, o.devices) for k, o in options.items()), workload.memory_limit if workload.shares else None)
        return self._shapes.setdefault(key, len(self._shapes))

    def _options(self, workload: Workload) -> Mapping[int, Option]:
        asked = workload
        key = (
            *(asked.model, asked.precision, asked.context, asked.concurrency, asked.kv_dtype, asked.lora_slots),
            *(asked.lora_rank, asked.memory, asked.memory_limit, asked.tp, asked.slo, asked.shares),
            *(
                bool(asked.pinned and asked.pinned.card is not None),
                bool(asked.pinned and asked.pinned.partition is not None),
            ),
            selector(workload),
        )
        if key not in self._sizes:
            try:
                self._sizes[key] = self._size(workload)
            except AimProfileError as problem:
                raise WorkloadError(
                    f"workload {workload.name}: {problem.problem}",
                    field=f"{workload.name}.{problem.field}",
                    value=problem.value,
                    remedy=problem.remedy,
                ) from problem
        return self._sizes[key]

    def _size(self, workload: Workload) -> dict[int, Option]:
        wanted = selector(workload)
        needs: dict[int, int | None] = {}
        found: dict[int, Option] = {}
        for kind in self._kinds:
            if wanted in kind.selected and self._computes(workload, kind):
                option = self._option(workload, kind, needs)
                found |= {kind.number: option} if option else {}
        return found

    def _option(self, workload: Workload, kind: DeviceKind, needs: dict[int, int | None]) -> Option | None:
        """The fewest devices of that kind that hold a replica, None where no number does."""
        budget = budget_bytes(kind.device_bytes, DEFAULT_UTILIZATION)
        if workload.memory_limit is not None:
            limit = parse_memory(workload.memory_limit)
            if limit > budget:
                return None
            budget = limit
        for devices in device_counts(workload, kind, self._most_cards[kind.gpu]):
            if devices not in needs:
                needs[devices] = need_bytes(workload, devices, self._facts(workload))
            need = needs[devices]
            if need is not None and need <= budget:
                return Option(devices, need, budget)
        return None

    def _facts(self, workload: Workload) -> ModelFacts | None:
        return None if workload.model is None else self._model(workload.model)

    def _model(self, reference: str) -> ModelFacts:
        if reference not in self._models:
            self._models[reference] = load_model(reference)
        return self._models[reference]

    def _computes(self, workload: Workload, kind: DeviceKind) -> bool:
        """fp8 needs matrix units that know it; every other format is computed in 16 bit where it must be."""
        if workload.model is None:
            return True
        precision = workload.precision or self._model(workload.model).native_precision
        formats = catalog()[kind.gpu].matrix_formats
        return precision != "fp8" or any(name.startswith("fp8") for name in formats)

    def _pin(self, workload: Workload) -> tuple[int, int | None, int | None] | None:
        pin = workload.pinned
        if pin is None:
            return None
        node = self._nodes.get(pin.node)
        if node is None:
            raise WorkloadError(
                f"workload {workload.name}: pinned.node: the fleet has no node {pin.node!r}",
                field=f"{workload.name}.pinned.node",
                value=pin.node,
            )
        position = next((at for at, card in enumerate(node.cards) if card.number == pin.card), None)
        if pin.card is not None and position is None:
            raise WorkloadError(
                f"workload {workload.name}: pinned.card: node {pin.node} has no card {pin.card}",
                field=f"{workload.name}.pinned.card",
                value=pin.card,
                remedy=f"its cards are {node.cards[0].number} to {node.cards[-1].number}",
            )
        return node.number, position, pin.partition


def own_level(workload: Workload) -> int:
    """0 (high, serving) to 5 (low, filling gaps)."""
    return 2 * PRIORITIES.index(workload.priority) + (workload.kind != "serve")


def _urgency(workloads: list[Workload], index: Mapping[str, int]) -> tuple[list[int], list[int]]:
    """Level and rank of each: the target of an affinity is as urgent as who depends on it, and comes first."""
    levels = [own_level(workload) for workload in workloads]
    ranks = [0] * len(workloads)
    stack = [at for at, workload in enumerate(workloads) if workload.affinity]
    while stack:
        at = stack.pop()
        for target in (index[name] for name in workloads[at].affinity):
            level, rank = min(levels[target], levels[at]), min(ranks[target], ranks[at] - 1)
            if (level, rank) != (levels[target], ranks[target]):
                levels[target], ranks[target] = level, rank
                stack.append(target)
    return levels, ranks
