"""What would fit instead: the nearest changes to a request that does not fit, truthfully sized.

In this order: the request itself made smaller (context, concurrency, precision), more devices of the same
kind, another partition mode of the same GPU (validated before driver-legal), whole cards together, another
GPU; of one GPU's, what needs tensor parallelism over partitions comes last, for it is unproven. Each option was
computed with the same formulas; none is a guess.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

from aim_profile.errors import SizingError
from aim_profile.gpus.catalog import TIERS, Accelerator, Deployment, PartitionMode, can_switch, catalog
from aim_profile.models.facts import ModelFacts, Precision
from aim_profile.units import MIB, gib

from .fit import DEFAULT_UTILIZATION, DoesNotFit, Fit, Option, Request, budget_bytes, demand, fit

_PRECISIONS: tuple[Precision, ...] = ("fp8", "int8", "int4")
_LEAST_USEFUL_CONTEXT = 2048
_MOST_CARDS = 16
_LIMIT = 16


class _Place(NamedTuple):
    """Devices of one kind: a partition mode of an accelerator, or any device of that many bytes."""

    memory_bytes: int
    mode: PartitionMode | None = None

    @property
    def named(self) -> dict[str, Any]:
        if self.mode is None:
            return {}
        return {"accelerator": self.mode.accelerator, "partition": self.mode.label, "tier": self.mode.tier}


def size_on(
    model: ModelFacts,
    mode: PartitionMode,
    accelerator: Accelerator,
    request: Request,
    device_memory_bytes: int | None = None,
) -> Fit | DoesNotFit:
    """Fit on one device of `mode` (its own reading where given), with alternatives where it does not.

    Raises SizingError for unknown facts or impossible requests.
    """
    place = _Place(device_memory_bytes or mode.memory_bytes, mode)
    return _with_alternatives(model, place, accelerator, mode.deployment, request)


def size_on_bytes(model: ModelFacts, device_memory_bytes: int, request: Request) -> Fit | DoesNotFit:
    """The same for a device of which only the memory is known; the alternatives name catalogue GPUs."""
    return _with_alternatives(model, _Place(device_memory_bytes), None, "bare-metal", request)


def size_on_cpus(model: ModelFacts, memory_bytes: int, request: Request, *, limited: bool = False) -> Fit | DoesNotFit:
    """The same for a set of CPUs with that much memory; the alternatives ask less of it, or say how much would do.

    limited: the request's utilization is a memory limit's.

    Raises SizingError for tensor parallelism too: a model runs on one set.
    """
    if request.tp > 1:
        raise SizingError(
            f"tensor parallel {request.tp}: a model runs on one CPU set",
            field="tp",
            value=request.tp,
            remedy="ask for tensor parallel 1, or give the set more cores and memory",
        )
    answer = fit(model, memory_bytes, request)
    if isinstance(answer, Fit):
        return answer
    place = _Place(memory_bytes)
    options = [o for o in _smaller_request(model, place, request) if o.kind != "precision"]
    return answer.model_copy(update={"alternatives": (*options, *_more_memory(model, memory_bytes, request, limited))})


def _more_memory(model: ModelFacts, memory_bytes: int, request: Request, limited: bool) -> Iterator[Option]:
    """The request as it is, where there is enough for it, in whole MiB: under a higher limit where the set itself has
    it, else of a larger set."""
    need = demand(model, request).total
    by_limit = limited and need <= memory_bytes * DEFAULT_UTILIZATION
    utilization = 1.0 if by_limit else DEFAULT_UTILIZATION if limited else request.utilization
    enough = -(-math.ceil(need / utilization) // MIB)
    place = _Place(enough * MIB)
    for option in _try("memory", model, place, request.model_copy(update={"utilization": utilization})):
        where = f"with a memory limit of {enough} MiB" if by_limit else f"in {enough} MiB of memory"
        yield option.model_copy(update={"description": f"{option.precision} {where}, {gib(place.memory_bytes)} GiB"})


def _with_alternatives(
    model: ModelFacts, place: _Place, accelerator: Accelerator | None, deployment: Deployment, request: Request
) -> Fit | DoesNotFit:
    answer = fit(model, place.memory_bytes, request)
    if isinstance(answer, Fit):
        return answer
    found: dict[str, Option] = {}
    for option in _options(model, place, accelerator, deployment, request):
        found.setdefault(option.description, option)
        if len(found) == _LIMIT:
            break
    return answer.model_copy(update={"alternatives": tuple(found.values())})


def _options(
    model: ModelFacts, place: _Place, accelerator: Accelerator | None, deployment: Deployment, request: Request
) -> Iterator[Option]:
    yield from _smaller_request(model, place, request)
    if accelerator is not None and place.mode is not None:
        yield from sorted(_of_this_gpu(model, place, place.mode, accelerator, request), key=lambda o: o.unproven)
    yield from _other_accelerators(model, accelerator, deployment, request)


def _of_this_gpu(
    model: ModelFacts, place: _Place, mode: PartitionMode, accelerator: Accelerator, request: Request
) -> Iterator[Option]:
    yield from _siblings(model, place, request)
    yield from _other_modes(model, mode, accelerator, mode.deployment, request)
    if mode.partitions == 1 or can_switch(mode.deployment):
        yield from _whole_cards(model, accelerator, mode.deployment, request)


def _smaller_request(model: ModelFacts, place: _Place, request: Request) -> Iterator[Option]:
    """The same device with a shorter context, fewer sequences, or fewer bits."""
    answer = fit(model, place.memory_bytes, request)
    if answer.max_context >= min(_LEAST_USEFUL_CONTEXT, request.context):
        yield from _try("context", model, place, request, context=answer.max_context)
    if 1 <= answer.max_concurrency < request.concurrency:
        yield from _try("concurrency", model, place, request, concurrency=answer.max_concurrency)
    for precision in _lower_precisions(model, place, request):
        yield from _try("precision", model, place, request, precision=precision)


def _siblings(model: ModelFacts, place: _Place, request: Request) -> Iterator[Option]:
    """Tensor parallel over the other partitions of the same card, fewest first."""
    if place.mode is None:
        return
    for ranks in _powers(request.tp, place.mode.partitions):
        if options := list(_try("tensor-parallel", model, place, request, tp=ranks)):
            yield from options
            return


def _other_modes(
    model: ModelFacts, current: PartitionMode, accelerator: Accelerator, deployment: Deployment, request: Request
) -> Iterator[Option]:
    """Each other compute mode of the same GPU, in its best tier: as asked, else over siblings, in fewer bits."""
    best_first = accelerator.modes(deployment) if can_switch(deployment) else ()
    best = {mode.compute: mode for mode in reversed(best_first)}
    for mode in best_first:
        if mode.compute == current.compute or mode != best[mode.compute]:
            continue
        place = _Place(mode.memory_bytes, mode)
        if options := list(_try("partition", model, place, request)):
            yield from options
            continue
        yield from _siblings(model, place, request)
        for precision in _lower_precisions(model, place, request):
            if options := list(_try("precision", model, place, request, precision=precision)):
                yield from options
                break


def _whole_cards(
    model: ModelFacts, accelerator: Accelerator, deployment: Deployment, request: Request
) -> Iterator[Option]:
    """Tensor parallel over whole cards, fewest first; nothing where one card is enough."""
    whole = accelerator.mode("SPX/NPS1", deployment)
    place = _Place(whole.memory_bytes, whole)
    if any(_try("partition", model, place, request)):
        return
    for cards in _powers(request.tp, _MOST_CARDS):
        if options := list(_try("tensor-parallel", model, place, request, tp=cards)):
            yield from options
            return


def _other_accelerators(
    model: ModelFacts, current: Accelerator | None, deployment: Deployment, request: Request
) -> Iterator[Option]:
    """For each other GPU its smallest validated partition that holds the request, else a driver-legal one,
    else the fewest whole cards together."""
    for accelerator in catalog().values():
        if current is not None and accelerator.name == current.name:
            continue
        modes = accelerator.modes(deployment)
        by_size = sorted(modes, key=lambda mode: (TIERS.index(mode.tier), mode.memory_mib))
        places = (_Place(mode.memory_bytes, mode) for mode in by_size)
        options = (option for place in places for option in _try("accelerator", model, place, request))
        if option := next(options, None):
            yield option
        elif modes:
            yield from _whole_cards(model, accelerator, deployment, request)


def _try(kind: Any, model: ModelFacts, place: _Place, request: Request, **changes: Any) -> Iterator[Option]:
    """The option if it fits; nothing where it does not or the shape forbids it."""
    changed = request.model_copy(update=changes)
    if not _computes(place, changed.precision or model.native_precision):
        return
    try:
        need = demand(model, changed)
    except SizingError:
        return
    spare = budget_bytes(place.memory_bytes, changed.utilization) - need.total
    if spare < 0:
        return
    yield Option(
        kind=kind,
        description=_describe(model, place, changed, changes),
        precision=changed.precision or model.native_precision or "unknown",
        context=changed.context,
        concurrency=changed.concurrency,
        tp=changed.tp,
        devices=changed.tp,
        headroom_gib=gib(spare),
        unproven=place.mode is not None and place.mode.unproven(changed.tp),
        **place.named,
    )


def _describe(model: ModelFacts, place: _Place, request: Request, changes: dict[str, Any]) -> str:
    mode = place.mode
    where = f"{mode.accelerator} {mode.label}" if mode else "this device"
    words = [f"{name} {value}" for name, value in changes.items() if name != "tp"]
    words.append(f"on {request.tp} devices of {where}" if request.tp > 1 else f"on one {where}" if mode else where)
    precision = request.precision or model.native_precision
    if "precision" not in changes:
        words.insert(0, str(precision))
    tier = f" ({mode.standing(request.tp)})" if mode else ""
    if request.tp > 1:
        words.append(f"with tensor parallel {request.tp}")
    return " ".join(words) + tier


def _lower_precisions(model: ModelFacts, place: _Place, request: Request) -> Iterator[Precision]:
    """Precisions of fewer bits than asked, widest first; fp8 only where the GPU computes in it."""
    asked = request.precision or model.native_precision
    order = ("bf16", *_PRECISIONS)
    at = 0 if asked in ("bf16", "fp16", "fp32") else order.index(asked) if asked in order else len(order)
    yield from (p for p in _PRECISIONS if order.index(p) > at and _computes(place, p))


def _computes(place: _Place, precision: str | None) -> bool:
    """Whether that place's GPU is worth naming for the precision: fp8 wants matrix units that know it."""
    if place.mode is None or precision != "fp8":
        return True
    return any(name.startswith("fp8") for name in catalog()[place.mode.accelerator].matrix_formats)


def _powers(above: int, most: int) -> Iterator[int]:
    """Powers of two above `above`, up to `most`."""
    ranks = 2
    while ranks <= most:
        if ranks > above:
            yield ranks
        ranks *= 2
