"""What is asked about the modes of a GPU, and what each of them serves of it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

from aim_profile.errors import SizingError
from aim_profile.exporter.prices import Prices
from aim_profile.files.trace import read_requests
from aim_profile.gpus.catalog import Accelerator, PartitionMode
from aim_profile.models.facts import ModelFacts, Precision
from aim_profile.models.load import load_model
from aim_profile.serving.capacity import Asked, Evidenced
from aim_profile.serving.derive import served_precision
from aim_profile.serving.profile import devices_side_by_side
from aim_profile.sizing.asked import Promise, RequestShape
from aim_profile.sizing.capacity import Capacity, Served
from aim_profile.sizing.kv_cache import KvDtype
from aim_profile.sizing.recorded import RecordedLoad, recorded_load


class AskedLoad(NamedTuple):
    """The requests; requests_per_s: how many to plan for, None: as many as a card serves."""

    shape: RequestShape
    requests_per_s: float | None = None
    recorded: RecordedLoad | None = None


class Question(NamedTuple):
    """Of which model, in which requests, within which promise."""

    model: ModelFacts
    precision: Precision
    load: AskedLoad
    promise: Promise
    kv_dtype: KvDtype = "auto"

    @property
    def shape(self) -> RequestShape:
        """Tokens of a request."""
        return self.load.shape

    def asked(self, mode: PartitionMode, tp: int) -> Asked:
        """Of an engine over so many devices of that mode."""
        return Asked(self.model, self.precision, mode, self.shape, self.promise, tp, self.kv_dtype)


class ModeCapacity(NamedTuple):
    """One mode of the GPU: engines on a card of it (a fraction, where one needs several cards), devices of each."""

    mode: PartitionMode
    tp: int
    capacity: Capacity | None
    cost_per_hour: float | None = None

    @property
    def engines_per_card(self) -> float:
        """A fraction, where an engine takes several cards."""
        return self.mode.partitions / self.tp

    def requests_per_s(self, served: Served | None) -> float:
        """Of a whole card."""
        return 0.0 if served is None else served.requests_per_s * self.engines_per_card

    def tokens_per_s(self, served: Served | None) -> float:
        """Tokens of answers of a whole card."""
        return 0.0 if served is None else served.tokens_per_s * self.engines_per_card

    def engines_for(self, requests_per_s: float | None) -> int | None:
        """Engines that carry so many at the cautious end (a bound: at the least); None where nothing is served."""
        found = self.capacity
        served = (found.high if found.basis == "bound" else found.low) if found else None
        if served is None or requests_per_s is None:
            return None
        return max(1, math.ceil(requests_per_s / served.requests_per_s - 1e-9))

    def cards_for(self, requests_per_s: float | None) -> int | None:
        """Cards of those engines, whole ones."""
        engines = self.engines_for(requests_per_s)
        return None if engines is None else math.ceil(engines * self.tp / self.mode.partitions)

    @property
    def order(self) -> tuple[float, float]:
        """By the cautious end first; a bound has none."""
        found = self.capacity
        return (self.requests_per_s(found.low), self.requests_per_s(found.high)) if found else (0.0, 0.0)


def asked_load(
    trace: Path | None, percentile: float, window_s: float, prompt: int, answer: int, requests_per_s: float | None
) -> AskedLoad:
    """What the options say of the requests. Raises SizingError for a trace that cannot be used, with file and line."""
    if trace is None:
        return AskedLoad(RequestShape(prompt_tokens=prompt, answer_tokens=answer), requests_per_s)
    recorded = recorded_load(read_requests(trace, SizingError), percentile, window_s)
    return AskedLoad(recorded.shape, recorded.requests_per_s, recorded)


def question(
    model: str,
    precision: Precision | None,
    load: AskedLoad,
    ttft_ms: float | None,
    itl_ms: float | None,
    kv_dtype: KvDtype,
) -> Question:
    """What the options ask. Raises AimProfileError for a model that is not known, or a precision that nobody serves."""
    facts = load_model(model)
    return Question(facts, served_precision(facts, precision), load, Promise(ttft_ms=ttft_ms, itl_ms=itl_ms), kv_dtype)


def of_mode(
    question: Question,
    accelerator: Accelerator,
    mode: PartitionMode,
    tp: int | None,
    evidenced: Evidenced,
    prices: Prices | None,
) -> ModeCapacity:
    """With the fewest devices together that hold it; partitions only where that is asked for: it is unproven."""
    cost = prices.gpu_hour.get(accelerator.name) if prices else None
    beside = devices_side_by_side(accelerator, mode)
    counts = (tp,) if tp is not None else beside if mode.partitions == 1 else (1,)
    for count in counts:
        asked = question.asked(mode, count)
        found = _if_divisible(evidenced, asked, tp)
        if found is not None:
            return ModeCapacity(mode, count, found, cost)
    return ModeCapacity(mode, counts[0], None, cost)


def _if_divisible(evidenced: Evidenced, asked: Asked, tp: int | None) -> Capacity | None:
    try:
        return evidenced.capacity(asked)
    except SizingError as problem:
        if problem.field == "tp" and tp is None:
            return None
        raise
