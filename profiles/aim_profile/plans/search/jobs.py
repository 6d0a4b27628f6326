"""Workloads as jobs: how each runs on every kind of device, how urgent it is, beside whom it stands."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

from aim_profile.errors import AimProfileError, SizingError
from aim_profile.gpus.catalog import catalog
from aim_profile.models.facts import ModelFacts
from aim_profile.models.load import load_model
from aim_profile.plans.fleet import Fleet
from aim_profile.plans.plan import PRIORITIES, Placement
from aim_profile.plans.workload import Workload, WorkloadError, Workloads
from aim_profile.sizing.fit import DEFAULT_UTILIZATION, STEP_TOKENS, Engine, Request, budget_bytes, demand
from aim_profile.sizing.training import memory
from aim_profile.units import parse_memory

from .problem import DeviceKind, Form, Job, Option, PlanNode, least_share, selector


def need_bytes(workload: Workload, devices: int, facts: ModelFacts | None, on_cpu: bool = False) -> int | None:
    """Bytes a replica over that many devices needs on each; None where the model cannot be split so.

    on_cpu: the devices are CPU sets. Raises SizingError for unknown facts or an impossible request.
    """
    if workload.training is not None and facts is not None:
        return memory(facts, workload.training, on_cpu=on_cpu).total
    if workload.memory is not None or facts is None:
        return parse_memory(workload.memory or "")
    try:
        return demand(facts, request_of(workload, devices, engine_of(facts, on_cpu))).total
    except SizingError as problem:
        if problem.field == "tp" and devices > 1 and workload.tp is None:
            return None
        raise


def engine_of(facts: ModelFacts, on_cpu: bool) -> Engine:
    """Whose overhead counts: llama.cpp's for a GGUF file on CPUs."""
    return "llama_cpp" if on_cpu and facts.gguf else "vllm"


def request_of(workload: Workload, devices: int, engine: Engine = "vllm") -> Request:
    """What is asked of the model, over that many devices."""
    return Request(
        engine=engine,
        precision=workload.precision,
        context=workload.context,
        concurrency=workload.concurrency,
        tp=devices,
        kv_dtype=workload.kv_dtype,
        lora_slots=workload.lora_slots,
        lora_rank=workload.lora_rank,
        max_num_batched_tokens=STEP_TOKENS[workload.tuned_for],
    )


def most_whole_cards(fleet: Fleet) -> dict[str, int]:
    """For each accelerator the most cards of one hive of one node: what tensor parallelism may span."""
    most: dict[str, int] = {}
    for gpu, cards in {(node.gpu, id(node.cards)): (node.gpu, node.cards) for node in fleet.nodes}.values():
        hives = Counter(card.hive for card in cards)
        most[gpu] = max(most.get(gpu, 0), *hives.values())
    return most


def device_counts(workload: Workload, kind: DeviceKind, most_cards: int) -> tuple[int, ...]:
    """Devices a replica may span: siblings that divide a card evenly, or 1, 2, 4 … whole cards; one CPU set."""
    if kind.is_cpu:
        return (1,) if workload.tp in (None, 1) else ()
    if workload.tp is not None:
        most = most_cards if kind.whole else kind.partitions
        latency_over_siblings = workload.tuned_for == "latency" and not kind.whole and workload.tp > 1
        return (workload.tp,) if workload.tp <= most and not latency_over_siblings else ()
    pinned_device = workload.pinned is not None and workload.pinned.partition is not None
    pinned_card = workload.pinned is not None and workload.pinned.card is not None
    if workload.training is not None or workload.memory is not None or workload.memory_limit is not None:
        return (1,)
    if pinned_device:
        return (1,)
    if kind.whole:
        return (1,) if pinned_card else tuple(n for n in (1, 2, 4, 8, 16) if n <= most_cards)
    if workload.tuned_for == "latency":
        return (1,)
    return tuple(n for n in range(1, kind.partitions + 1) if kind.partitions % n == 0)


def cards_taken(option: Option, kind: DeviceKind) -> float:
    """The share of a card (or the number of cards) a replica takes."""
    return option.devices / kind.partitions


class Jobs:
    """Workloads as jobs. Sizes are computed once for workloads that ask the same."""

    def __init__(
        self,
        kinds: tuple[DeviceKind, ...],
        nodes: tuple[PlanNode, ...],
        fleet: Fleet,
        current: tuple[Placement, ...] = (),
    ) -> None:
        self._spanning = {run.workload for run in current if run.tp > 1 and len(run.cards) == 1}
        self._kinds = kinds
        self._nodes = {node.name: node for node in nodes}
        self._set_aside = dict(fleet.set_aside)
        self._most_cards = most_whole_cards(fleet)
        self._only_cpus = all(node.is_cpu for node in fleet.nodes)
        self._cpu_nodes = {node.name for node in fleet.nodes if node.is_cpu}
        self._sizes: dict[tuple[object, ...], dict[int, Option]] = {}
        self._shapes: dict[object, int] = {}
        self._splits: dict[tuple[int, str | None], tuple[dict[int, Option], dict[int, Option]]] = {}
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
            self._with_fallbacks(
                Job(
                    index=at,
                    workload=workload,
                    options=(options := (split := self._split(workload))[0]),
                    avoided=split[1],
                    own_level=own_level(workload),
                    level=levels[at],
                    rank=ranks[at],
                    shape=self._shape(workload, *split),
                    pin=self._pin(workload),
                    affinity=tuple(sorted(index[name] for name in workload.affinity)),
                    anti_affinity=tuple(sorted(against.get(at, ()))),
                    limit=limit_bytes(workload),
                    size=least_share(options, self._kinds),
                )
            )
            for at, workload in enumerate(ordered)
        )

    def _with_fallbacks(self, job: Job) -> Job:
        if not job.workload.fallback:
            return job
        return replace(job, fallbacks=tuple(self._form(job, at, form) for at, form in enumerate(job.workload.forms)))

    def _form(self, job: Job, at: int, form: Workload) -> Job:
        """The job in the form of its fallback of that number. Raises WorkloadError naming the fallback."""
        try:
            options, avoided = self._split(form)
        except WorkloadError as problem:
            _, _, key = problem.field.rpartition(".")
            field = f"{form.name}.fallback[{at}].{key}"
            why = problem.problem.removeprefix(f"workload {form.name}: ")
            raise WorkloadError(
                f"workload {form.name}: fallback[{at}]: {why}", field=field, value=problem.value, remedy=problem.remedy
            ) from problem
        return replace(
            job,
            workload=form,
            options=options,
            avoided=avoided,
            shape=self._shape(form, options, avoided),
            limit=limit_bytes(form),
            size=least_share(options, self._kinds),
            form=Form(at + 1, str(job.workload.fallback[at])),
        )

    def _shape(self, workload: Workload, options: Mapping[int, Option], avoided: Mapping[int, Option]) -> int:
        limit = workload.memory_limit if workload.shares else None
        key = (*((k, o.devices) for each in (options, avoided) for k, o in each.items()), len(avoided), limit)
        return self._shapes.setdefault(key, len(self._shapes))

    def options(self, workload: Workload) -> dict[int, Option]:
        """How a replica runs on each kind of device that holds it, by the kind's number. Raises WorkloadError."""
        asked = workload
        key = (
            *(asked.model, asked.precision, asked.context, asked.concurrency, asked.kv_dtype, asked.lora_slots),
            *(
                asked.lora_rank,
                asked.memory,
                asked.memory_limit,
                asked.tp,
                asked.tuned_for,
                asked.devices,
                asked.shares,
            ),
            asked.training,
            *(
                bool(asked.pinned and asked.pinned.card is not None),
                bool(asked.pinned and asked.pinned.partition is not None),
            ),
            selector(workload),
            self._pinned_to_cpus(workload),
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
        needs: dict[tuple[int, bool], int | None] = {}
        found: dict[int, Option] = {}
        for kind in self._kinds:
            named = not workload.devices or f"{kind.gpu} {kind.mode.label}" in workload.devices
            if wanted in kind.selected and named and self._computes(workload, kind):
                option = self._option(workload, kind, needs)
                found |= {kind.number: option} if option else {}
        return found

    def _split(self, workload: Workload) -> tuple[dict[int, Option], dict[int, Option]]:
        """Its options, and those it should avoid: over several partitions of a card, where one device of another kind
        holds it and it neither asks for that (`tp`) nor runs so now.
        """
        options = self.options(workload)
        if workload.tp is not None or workload.name in self._spanning:
            return options, {}
        node = workload.pinned.node if workload.pinned else None
        # Workloads that ask the same share their options.
        key = (id(options), node)
        if key not in self._splits:
            spans = {at: option for at, option in options.items() if self._kinds[at].mode.unproven(option.devices)}
            here = options.keys() if node is None else options.keys() & self._kinds_on(node)
            if spans and any(options[kind].devices == 1 for kind in here):
                self._splits[key] = ({at: option for at, option in options.items() if at not in spans}, spans)
            else:
                self._splits[key] = (options, {})
        return self._splits[key]

    def _kinds_on(self, node: str) -> set[int]:
        cards = self._nodes[node].cards if node in self._nodes else ()
        return {kind for card in cards for kind in (*card.kinds.values(), card.as_found)}

    def _option(self, workload: Workload, kind: DeviceKind, needs: dict[tuple[int, bool], int | None]) -> Option | None:
        """The fewest devices of that kind that hold a replica, None where no number does."""
        budget = budget_bytes(kind.device_bytes, DEFAULT_UTILIZATION)
        if workload.memory_limit is not None:
            limit = parse_memory(workload.memory_limit)
            if limit > budget:
                return None
            budget = limit
        for devices in device_counts(workload, kind, self._most_cards[kind.gpu]):
            key = (devices, kind.is_cpu)
            if key not in needs:
                needs[key] = need_bytes(workload, devices, self._facts(workload), kind.is_cpu)
            need = needs[key]
            if need is not None and need <= budget:
                return Option(devices, need, budget)
        return None

    def _facts(self, workload: Workload) -> ModelFacts | None:
        return None if workload.sized_by is None else self._model(workload.sized_by)

    def _model(self, reference: str) -> ModelFacts:
        if reference not in self._models:
            self._models[reference] = load_model(reference)
        return self._models[reference]

    def _computes(self, workload: Workload, kind: DeviceKind) -> bool:
        """fp8 needs matrix units that know it; every other format is computed in 16 bit where it must be.

        CPUs are slow: beside GPUs they get GGUF files, and what is pinned to them.
        """
        if kind.is_cpu:
            return self._only_cpus or self._is_gguf(workload) or self._pinned_to_cpus(workload)
        if workload.model is None:
            return True
        precision = workload.precision or self._model(workload.model).native_precision
        formats = catalog()[kind.gpu].matrix_formats
        return precision != "fp8" or any(name.startswith("fp8") for name in formats)

    def _is_gguf(self, workload: Workload) -> bool:
        return workload.model is not None and self._model(workload.model).gguf

    def _pinned_to_cpus(self, workload: Workload) -> bool:
        return workload.pinned is not None and workload.pinned.node in self._cpu_nodes

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
                remedy=f"it was set aside: {self._set_aside[pin.node]}" if pin.node in self._set_aside else "",
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


def limit_bytes(workload: Workload) -> int | None:
    """Bytes it takes of a device that it shares; None where it has its devices alone."""
    return parse_memory(workload.memory_limit) if workload.shares and workload.memory_limit else None


def own_level(workload: Workload) -> int:
    """0 (high, serving) to 5 (low, filling gaps)."""
    return 2 * PRIORITIES.index(workload.priority) + (workload.kind != "serve")


def _urgency(workloads: list[Workload], index: Mapping[str, int]) -> tuple[list[int], list[int]]:
    """Level and rank of each: the target of an affinity is as urgent as who depends on it, and comes first."""
    levels = [own_level(workload) for workload in workloads]
    ranks = [0] * len(workloads)
    targets = [tuple({index[name] for name in workload.affinity}) for workload in workloads]
    dependents = Counter(target for each in targets for target in each)
    # Affinities make no circle: every workload's turn comes once all that depend on it had theirs.
    ready = [at for at in range(len(workloads)) if not dependents[at]]
    while ready:
        at = ready.pop()
        for target in targets[at]:
            levels[target], ranks[target] = min(levels[target], levels[at]), min(ranks[target], ranks[at] - 1)
            dependents[target] -= 1
            if not dependents[target]:
                ready.append(target)
    return levels, ranks
