"""How many requests a device serves within what was promised of its latency, and what stops it from serving more.

Three kinds of answer, never mixed:

measured   somebody ran this very model on this very device with such requests, and kept the figures
estimate   a range: by constants fitted on evidence of the same class of hardware (constants.py)
bound      what physics allows at most: bandwidth and peak. It says nothing of what will be reached.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Literal, NamedTuple

from .asked import Promise, RequestShape
from .constants import Constants, End, Part
from .work import Speeds, Work

Basis = Literal["measured", "estimate", "bound"]
#: As each is marked wherever it is shown.
MARKS: dict[Basis, str] = {
    "measured": "measured",
    "estimate": "estimate, not measured",
    "bound": "bound, not an estimate",
}


class Served(NamedTuple):
    """One engine on its devices: sequences at once, and what comes of that."""

    sequences: int
    itl_ms: float
    ttft_ms: float
    requests_per_s: float
    tokens_per_s: float


class Capacity(NamedTuple):
    """low: the cautious end, high: the other; equal where it was measured. low None: not even one request keeps the
    promise at that end; a bound has no low end at all.

    memory_sequences: as many fit into the device's memory; limits: what stops it (several: evidence cannot tell
    them apart); evidence: whose; notes: what must be said beside the figures.
    """

    basis: Basis
    low: Served | None
    high: Served | None
    memory_sequences: int
    limits: tuple[str, ...]
    evidence: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def ours(self) -> bool:
        """Whether it rests on figures of ours, not on a vendor's nor on physics alone."""
        return any(not label.startswith("published") for label in self.evidence)


class Engine(NamedTuple):
    """One engine's work on its devices, and how many sequences their memory holds."""

    work: Work
    speeds: Speeds
    shape: RequestShape
    memory_sequences: int


def cautious(engine: Engine, promise: Promise, constants: Constants, evidence: tuple[str, ...]) -> Capacity:
    """The cautious end of `estimated` alone, which is what is planned by."""
    low = most_within(lambda sequences: _estimate_at(engine, constants, sequences, "most"), promise, engine)
    return Capacity("estimate", low, low, engine.memory_sequences, (), evidence)


def estimated(engine: Engine, promise: Promise, constants: Constants, evidence: tuple[str, ...]) -> Capacity:
    """The range of what it serves within the promise, by constants fitted on that evidence."""

    def at(end: End) -> Callable[[int], Served]:
        return lambda sequences: _estimate_at(engine, constants, sequences, end)

    low, high = most_within(at("most"), promise, engine), most_within(at("least"), promise, engine)
    limits = _limits(engine, constants, low, high)
    beyond = high is not None and high.sequences > constants.sequences
    notes = (f"beyond the {constants.sequences:.0f} sequences at once of the evidence",) if beyond else ()
    return Capacity("estimate", low, high, engine.memory_sequences, limits, evidence, notes)


def bounded(engine: Engine, promise: Promise, why: tuple[str, ...] = ()) -> Capacity:
    """What no device of that kind can exceed. why: there is no estimate."""
    high = most_within(lambda sequences: bound_at(engine, sequences), promise, engine)
    return Capacity("bound", None, high, engine.memory_sequences, (_bound_limit(engine, high),), (), why)


def latency_range(engine: Engine, constants: Constants, sequences: float) -> tuple[Served, Served]:
    """What is expected of so many sequences at once: the slow end, and the quick one."""
    return _estimate_at(engine, constants, sequences, "most"), _estimate_at(engine, constants, sequences, "least")


def most_within(at: Callable[[int], Served], promise: Promise, engine: Engine) -> Served | None:
    """At the most sequences that keep the promise, None where one does not. Both latencies rise with sequences.

    Latencies are nearly straight lines: a few guesses along one find it, and every third halves what is left.
    """
    most, least = at(engine.memory_sequences), at(1)
    if promise.taken(most.ttft_ms, most.itl_ms) <= 1:
        return most
    if promise.taken(least.ttft_ms, least.itl_ms) > 1:
        return None
    (low, found), (high, beyond), turn = (1, least), (engine.memory_sequences, most), 0
    while high - low > 1:
        turn += 1
        under, over = (promise.taken(each.ttft_ms, each.itl_ms) for each in (found, beyond))
        share = 0.5 if turn % 3 == 0 else (1 - under) / (over - under)
        middle = min(high - 1, max(low + 1, low + int(share * (high - low))))
        tried = at(middle)
        if promise.taken(tried.ttft_ms, tried.itl_ms) <= 1:
            low, found = middle, tried
        else:
            high, beyond = middle, tried
    return found


def served(shape: RequestShape, sequences: float, itl_ms: float, ttft_ms: float) -> Served:
    """Little's law: each sequence makes a token a step, and an answer is so many tokens."""
    tokens_per_s = sequences / itl_ms * 1000
    return Served(round(sequences), itl_ms, ttft_ms, tokens_per_s / shape.answer_tokens, tokens_per_s)


def _estimate_at(engine: Engine, constants: Constants, sequences: float, end: End) -> Served:
    work, speeds, shape = engine.work, engine.speeds, engine.shape
    itl_ms = constants.step_ms(work, speeds, shape, sequences, end)
    return served(shape, sequences, itl_ms, constants.first_token_ms(work, speeds, shape, itl_ms, end))


def _limits(engine: Engine, constants: Constants, low: Served | None, high: Served | None) -> tuple[str, ...]:
    """Memory, where it ends a range; else what fills the step at its cautious end."""
    full = [each is not None and each.sequences == engine.memory_sequences for each in (low, high)]
    memory = ("memory",) if any(full) else ()
    if full[0]:
        return memory
    filling = constants.may_fill(engine.work, engine.speeds, engine.shape, low.sequences if low else 1)
    return (*filling, *memory)


def bound_at(engine: Engine, sequences: int) -> Served:
    """What so many sequences at once get at best: no device of that kind is quicker."""
    prefill_ms = engine.work.operations * engine.shape.prompt_tokens / _operations(engine) * 1000
    weights_ms = engine.work.weights_read(1)[0] / engine.speeds.bytes_per_s * 1000
    itl_ms = max(dict(_bound_parts(engine, sequences)).values())
    return served(engine.shape, sequences, itl_ms, max(prefill_ms, weights_ms))


def _bound_parts(engine: Engine, sequences: int) -> Iterable[tuple[Part, float]]:
    """Milliseconds of a step's reading, and of its computing with the prefills that fall on it."""
    work, shape = engine.work, engine.shape
    read = work.weights_read(sequences)[0] + work.cache_bytes * sequences
    yield "bandwidth", read / engine.speeds.bytes_per_s * 1000
    operations = work.operations * sequences * (1 + shape.prompt_tokens / shape.answer_tokens)
    yield "compute", operations / _operations(engine) * 1000


def _bound_limit(engine: Engine, found: Served | None) -> str:
    if found is not None and found.sequences == engine.memory_sequences:
        return "memory"
    return _largest(_bound_parts(engine, found.sequences if found else 1))


def _operations(engine: Engine) -> float:
    return engine.speeds.operations_per_s or float("inf")


def _largest(parts: Iterable[tuple[Part, float]]) -> str:
    return max(parts, key=lambda part: part[1])[0]
