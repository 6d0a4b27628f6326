"""Which evidence there is of a model on a device, and so which kind of answer: measured, an estimate, or a bound."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable
from typing import NamedTuple

from aim_profile.errors import SizingError
from aim_profile.gpus.catalog import by_name
from aim_profile.gpus.modes import DeviceMode
from aim_profile.models.facts import ModelFacts, Precision
from aim_profile.sizing.asked import Promise, RequestShape
from aim_profile.sizing.capacity import Capacity, Engine, Served, bound_at, bounded, cautious, estimated, latency_range
from aim_profile.sizing.constants import Constants
from aim_profile.sizing.fit import STEP_TOKENS, fit, make_request
from aim_profile.sizing.kv_cache import KvDtype
from aim_profile.sizing.work import Speeds, speeds_of, work_of

from .evidence import Measurement, Point, Subject
from .observations import Observation, label_of, of_measurements, of_vendors, shape_of_point
from .profile import to_aim_precision

# Requests count as the same where their mean lengths differ by no more.
_ALIKE = 0.1


class Asked(NamedTuple):
    """An engine and what is asked of it. tp: devices it spans; context: tokens a sequence may have, None: those of the
    request; most_sequences: at once, however many memory holds."""

    model: ModelFacts
    precision: Precision
    mode: DeviceMode
    shape: RequestShape
    promise: Promise
    tp: int = 1
    kv_dtype: KvDtype = "auto"
    context: int | None = None
    most_sequences: int | None = None


class Evidenced:
    """Capacities by evidence of ours, and what vendors published. Constants are fitted once for each kind of device."""

    def __init__(self, measurements: Iterable[Measurement] = ()) -> None:
        self._measurements = tuple(measurements)
        self._fitted: dict[tuple[str, str, str, str], Constants | SizingError] = {}

    def capacity(self, asked: Asked, *, only_cautious: bool = False) -> Capacity | None:
        """How much it serves; None where it does not fit the device. only_cautious: of a range only that end, quicker.

        Raises SizingError for facts that are missing: of the model, or the bandwidth of the device.
        """
        sequences = min(_memory_sequences(asked), asked.most_sequences or sys.maxsize)
        if not sequences:
            return None
        return self._measured(asked, sequences) or self._calculated(asked, _engine(asked, sequences), only_cautious)

    def curve(self, asked: Asked, levels: int) -> list[tuple[Served | None, Served]]:
        """What it serves with more and more sequences at once, whatever was promised: cautious end and other end.

        A bound has only the other; of what was measured, each point. Raises as capacity does; empty: it does not fit.
        """
        most = _memory_sequences(asked)
        if not most:
            return []
        if points := [_served(point) for point, _ in self._points(asked)]:
            return [(point, point) for point in points]
        engine = _engine(asked, most)
        nearest = self._nearest(asked, engine.speeds)[0] if asked.tp == 1 else None
        steps = sorted({max(1, round(most ** (at / (levels - 1)))) for at in range(levels)})
        if nearest is None:
            return [(None, bound_at(engine, sequences)) for sequences in steps]
        return [latency_range(engine, nearest[1], sequences) for sequences in steps]

    def _calculated(self, asked: Asked, engine: Engine, only_cautious: bool) -> Capacity:
        if asked.tp > 1:
            return bounded(engine, asked.promise, ("what devices together say to each other was never measured",))
        nearest, passed_over = self._nearest(asked, engine.speeds)
        if nearest is None:
            gfx = by_name(asked.mode.accelerator).gfx
            missing = f"there is no evidence of {gfx}, the class of {asked.mode.accelerator}"
            return bounded(engine, asked.promise, passed_over or (missing,))
        observation, constants = nearest
        answer = cautious if only_cautious else estimated
        found = answer(engine, asked.promise, constants, (observation.label,))
        return found._replace(notes=(*found.notes, *passed_over))

    def _points(self, asked: Asked) -> list[tuple[Point, str]]:
        """What was measured of this very engine with such requests, by requests answered, and by whom."""
        subject = Subject(
            model=asked.model.id,
            engine="vllm",
            precision=to_aim_precision(asked.precision),
            gpu=asked.mode.accelerator,
            partition=asked.mode.label,
            alloc_mode="CAPPING",
            gpu_count=asked.tp,
        )
        ours = [each for each in self._measurements if each.mismatch(subject) is None]
        found = [(point, label_of(each)) for each in ours for point in each.points if _usable(point, asked.shape)]
        return sorted(found, key=lambda pair: pair[0].requests_per_s)

    def _measured(self, asked: Asked, memory_sequences: int) -> Capacity | None:
        points = self._points(asked)
        if not points:
            return None
        within = [pair for pair in points if _served(pair[0]).sequences <= memory_sequences]
        kept = [pair for pair in within if _kept(pair[0], asked.promise)]
        best = _served(kept[-1][0]) if kept else None
        more = best is not None and kept[-1] is points[-1]
        notes = ("no higher load was measured: it may serve more",) if more else ()
        evidence = tuple(dict.fromkeys(label for _, label in points))
        return Capacity("measured", best, best, memory_sequences, (), evidence, notes)

    def _nearest(self, asked: Asked, speeds: Speeds) -> tuple[tuple[Observation, Constants] | None, tuple[str, ...]]:
        """The evidence of the same class of hardware that differs least, and what was nearer and explains nothing."""
        gfx = by_name(asked.mode.accelerator).gfx
        found = [*of_measurements(self._measurements, asked.model), *of_vendors()]
        ranked = sorted(
            (_distance(each, asked, each.speeds, speeds), at)
            for at, each in enumerate(found)
            if each.accelerator.gfx == gfx and each.speeds is not None
        )
        passed_over: list[str] = []
        for _, at in ranked:
            constants = self._constants(found[at])
            if isinstance(constants, Constants):
                return (found[at], constants), tuple(passed_over)
            passed_over.append(f"passed over: {constants}: {found[at].label}")
        return None, tuple(passed_over)

    def _constants(self, observation: Observation) -> Constants | SizingError:
        """Of one kind of device, or why its rows say nothing."""
        key = (observation.label, observation.model.id, observation.mode.accelerator, observation.mode.label)
        if key not in self._fitted:
            assert observation.speeds is not None
            try:
                self._fitted[key] = Constants(observation.observed(), observation.speeds)
            except SizingError as problem:
                self._fitted[key] = problem
        return self._fitted[key]


def _distance(seen: Observation, asked: Asked, there: Speeds | None, here: Speeds) -> tuple[object, ...]:
    assert there is not None
    return (
        seen.model.id != asked.model.id,
        seen.precision != asked.precision,
        seen.accelerator.name != asked.mode.accelerator,
        round(abs(math.log(there.share / here.share)), 6),
        not seen.ours,
    )


def _engine(asked: Asked, sequences: int) -> Engine:
    """Its work and its device's peaks. Raises SizingError where those are not established."""
    accelerator = by_name(asked.mode.accelerator)
    speeds = speeds_of(accelerator, asked.mode, asked.precision)
    if speeds is None:
        raise SizingError(
            f"{accelerator.name}: its memory bandwidth is not established, so nothing bounds what it serves",
            field="gpu",
            value=accelerator.name,
            remedy="measure it (`aim-runtime measure`) and give --evidence",
        )
    work = work_of(asked.model, asked.precision, asked.shape, asked.tp, asked.kv_dtype)
    return Engine(work, speeds, asked.shape, sequences)


def _memory_sequences(asked: Asked) -> int:
    request = make_request(
        precision=asked.precision,
        context=asked.context or asked.shape.context,
        tp=asked.tp,
        kv_dtype=asked.kv_dtype,
        max_num_batched_tokens=STEP_TOKENS["throughput"],
    )
    return fit(asked.model, asked.mode.memory_bytes, request).max_concurrency


def _usable(point: Point, shape: RequestShape) -> bool:
    """Whether everything was answered, and requests were such as are asked about."""
    seen = shape_of_point(point)
    if not point.valid or any(point.failed.values()) or seen is None or point.ttft_ms is None or point.itl_ms is None:
        return False
    pairs = ((seen.prompt_tokens, shape.prompt_tokens), (seen.answer_tokens, shape.answer_tokens))
    return all(abs(was - now) <= _ALIKE * now for was, now in pairs)


def _kept(point: Point, promise: Promise) -> bool:
    """By the 95th of a hundred requests: who measured has more than means."""
    assert point.ttft_ms is not None
    assert point.itl_ms is not None
    return promise.taken(point.ttft_ms.p95, point.itl_ms.p95) <= 1


def _served(point: Point) -> Served:
    assert point.ttft_ms is not None
    assert point.itl_ms is not None
    sequences = max(1, round(point.output_tokens_per_s * point.itl_ms.p50 / 1000))
    return Served(sequences, point.itl_ms.p95, point.ttft_ms.p95, point.requests_per_s, point.output_tokens_per_s)
