"""What the verb `capacity` does: every mode's capacity, beside each other, and which serves most."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from aim_profile.exporter.prices import Prices, load_prices
from aim_profile.gpus.catalog import Accelerator, Deployment, by_name
from aim_profile.serving.capacity import Evidenced
from aim_profile.serving.evidence import Measurement
from aim_profile.serving.evidence_files import read_evidence
from aim_profile.sizing.capacity import MARKS, Capacity, Served
from aim_profile.sizing.recorded import RecordedLoad

from .mode_capacity import ModeCapacity, Question, of_mode
from .output import DOES_NOT_FIT, FITS, Facts, Output, Table, print_note, show, write_out

_M = 1_000_000


def capacity(
    output: Output,
    question: Question,
    gpu: str,
    partition: str | None,
    every_mode: bool,
    deployment: Deployment,
    *,
    tp: int | None,
    evidence: Path | None,
    prices: Path | None,
    svg: Path | None,
) -> int:
    """Exit 1 where no mode serves a single request within the promise."""
    accelerator = by_name(gpu)
    modes = accelerator.modes(deployment) if every_mode else (accelerator.mode(partition or "SPX", deployment),)
    table = load_prices(prices) if prices else None
    known: Sequence[Measurement] = read_evidence(evidence).measurements if evidence else ()
    evidenced = Evidenced(known)
    found = [of_mode(question, accelerator, mode, tp, evidenced, table) for mode in modes]
    if evidence and not any(each.capacity and each.capacity.ours for each in found):
        print_note(f"{evidence}: nothing in it speaks for {accelerator.name}, nor for another {accelerator.gfx}")
    if svg is not None:
        from .capacity_picture import draw

        write_out(draw(question, accelerator.name, found, evidenced), svg)
    facts = _facts(question, accelerator, deployment, found)
    show(
        output,
        _data(question, accelerator, deployment, found, table),
        facts,
        _table(found, table, question.load.requests_per_s),
        _notes(found),
    )
    return FITS if any(each.order > (0.0, 0.0) for each in found) else DOES_NOT_FIT


def _facts(question: Question, accelerator: Accelerator, deployment: str, found: Sequence[ModeCapacity]) -> Facts:
    shape, promise = question.shape, question.promise
    promised = [
        f"{name} {value:g} ms"
        for name, value in (("TTFT", promise.ttft_ms), ("ITL", promise.itl_ms))
        if value is not None
    ]
    requests = f"prompts of {shape.prompt_tokens}, answers of {shape.answer_tokens} tokens"
    evidence = dict.fromkeys(label for each in found if each.capacity for label in each.capacity.evidence)
    last = "none of this class of hardware" if not evidence else "see below"
    return Facts(
        (
            ("model", f"{question.model.id} {question.precision}"),
            ("on", f"{accelerator.name}, {deployment}"),
            ("requests", requests),
            ("recorded", _recorded_in_words(question.load.recorded)),
            ("to plan for", _cards_in_words(question, found)),
            ("promise", ", ".join(promised) or "none: only memory ends it"),
            ("serves most", best_in_words(found)),
            ("evidence", last),
        )
    )


def _recorded_in_words(recorded: RecordedLoad | None) -> str:
    if recorded is None:
        return ""
    span = f"{recorded.requests} requests in {recorded.windows} windows of {recorded.window_s:g} s"
    rate = f"{recorded.requests_per_s:.4g} requests/s at p{recorded.percentile:g}, {recorded.peak_per_s:.4g} at most"
    return f"{span}, {rate}"


def _cards_in_words(question: Question, found: Sequence[ModeCapacity]) -> str:
    """The mode that carries the load with the fewest cards; a bound says how many it takes at least."""
    wanted = question.load.requests_per_s
    if wanted is None:
        return ""
    able = [(cards, each) for each in found if (cards := each.cards_for(wanted)) is not None]
    rate = f"{wanted:.4g} requests/s"
    if not able:
        return f"{rate}: no mode carries them within the promise"
    cards, each = min(able, key=lambda pair: (pair[0], pair[1].engines_for(wanted)))
    least = "at least " if each.capacity and each.capacity.basis == "bound" else ""
    many = f"{least}{cards} card{'s' if cards > 1 else ''} in {each.mode.label} ({each.engines_for(wanted)} engines)"
    mark = MARKS[each.capacity.basis] if each.capacity else ""
    return f"{rate}: {many}, {mark}"


def best_in_words(found: Sequence[ModeCapacity]) -> str:
    """The mode that serves most requests per card by the cautious end, and whether the others' ranges reach it."""
    best = max(found, key=lambda each: each.order)
    if best.capacity is None or best.order == (0.0, 0.0):
        return "none: no mode serves a request within the promise"
    if best.capacity.low is None:
        return f"{best.mode.label} by its bound, which says nothing of what is reached"
    above = (each.mode.compute for each in found if each is not best and each.order[1] > best.order[0])
    rivals = [compute for compute in dict.fromkeys(above) if compute != best.mode.compute]
    doubt = f"; not decided: the ranges of {', '.join(rivals)} reach above that" if rivals else ""
    what = f"{best.mode.label}, {best.order[0]:.3g} requests/s a card"
    if best.capacity.basis == "measured":
        return f"{what}, measured{doubt}"
    return f"{what} at the cautious end, {limits_in_words(best.capacity)}{doubt}"


def limits_in_words(capacity: Capacity) -> str:
    """`memory-bound`; `bandwidth- or launch-bound` where evidence cannot tell them apart."""
    return "- or ".join(capacity.limits) + "-bound"


def _table(found: Sequence[ModeCapacity], prices: Prices | None, wanted: float | None) -> Table:
    planned = () if wanted is None else ("engines", "cards")
    money = (f"{prices.currency}/M answer tokens",) if prices else ()
    columns = (
        *("mode", "tier", "engines a card", "requests/s a card", "tokens/s a card", "sequences", "memory holds"),
        *("ITL ms", "TTFT ms", *money, *planned, "limited by", "what this is"),
    )
    right = columns[2:-2]
    return Table(columns, [_row(each, bool(prices), wanted) for each in found], right=right)


def _row(each: ModeCapacity, priced: bool, wanted: float | None) -> tuple[str, ...]:
    found, engines = each.capacity, f"{each.engines_per_card:g}" + (f" (tp {each.tp})" if each.tp > 1 else "")
    if found is None:
        blank = ("-",) * (6 + priced + 2 * (wanted is not None))
        return (each.mode.label, each.mode.standing(each.tp), "0", *blank, "memory", "does not fit")
    spans = (
        _span(found, each.requests_per_s, "at most "),
        _span(found, each.tokens_per_s, "at most "),
        _span(found, lambda served: served.sequences if served else 0),
        str(found.memory_sequences),
        _span(found, lambda served: served.itl_ms if served else None),
        _span(found, lambda served: served.ttft_ms if served else None),
    )
    money = (_cost_words(each),) if priced else ()
    counts = (each.engines_for(wanted), each.cards_for(wanted)) if wanted is not None else ()
    planned = tuple("-" if count is None else str(count) for count in counts)
    limit = " or ".join(found.limits) or "-"
    return (each.mode.label, each.mode.standing(each.tp), engines, *spans, *money, *planned, limit, MARKS[found.basis])


def _span(found: Capacity, of: Callable[[Served | None], float | None], bound: str = "") -> str:
    """`3.1 to 7.9`, one figure where it was measured; `bound` stands before that of a bound."""
    low, high = of(found.low), of(found.high)
    if high is None:
        return "-"
    if found.basis == "bound":
        return f"{bound}{_figure(high)}"
    if low is None or low == high:
        return _figure(high) if low is not None else f"- to {_figure(high)}"
    return f"{_figure(low)} to {_figure(high)}"


def _figure(value: float) -> str:
    return f"{value:.0f}" if value >= 100 or value == int(value) else f"{value:.3g}"


def _costs(each: ModeCapacity) -> tuple[float | None, float | None]:
    """What a million tokens of answers cost at the cautious end and at the other, None where nothing is served."""
    if each.capacity is None or each.cost_per_hour is None:
        return None, None
    rates = (each.tokens_per_s(end) for end in (each.capacity.low, each.capacity.high))
    low, high = (each.cost_per_hour / (rate * 3600) * _M if rate else None for rate in rates)
    return low, high


def _cost_words(each: ModeCapacity) -> str:
    cautious, other = _costs(each)
    if other is None:
        return "-"
    if each.capacity is not None and each.capacity.basis == "bound":
        return f"at least {other:.3g}"
    return f"{other:.3g}" if cautious == other else f"{other:.3g} to {'-' if cautious is None else f'{cautious:.3g}'}"


def _notes(found: Sequence[ModeCapacity]) -> str:
    said = dict.fromkeys(_remarks(found))
    return "\n".join(f"- {note}" for note in said)


def _remarks(found: Sequence[ModeCapacity]) -> Iterator[str]:
    for each in found:
        yield from (f"evidence: {label}" for label in (each.capacity.evidence if each.capacity else ()))
    for each in found:
        for note in each.capacity.notes if each.capacity else ():
            yield f"{each.mode.label}: {note}" if each.capacity and each.capacity.basis != "bound" else note


def _data(
    question: Question, accelerator: Accelerator, deployment: str, found: Sequence[ModeCapacity], prices: Prices | None
) -> dict[str, Any]:
    return {
        "model": question.model.id,
        "precision": question.precision,
        "gpu": accelerator.name,
        "deployment": deployment,
        **question.shape.model_dump(),
        "slo": question.promise.model_dump(),
        "requests_per_s": question.load.requests_per_s,
        "recorded": _recorded_data(question.load.recorded),
        "currency": prices.currency if prices else None,
        "serves_most": best_in_words(found),
        "modes": [_mode_data(each, question.load.requests_per_s) for each in found],
    }


def _mode_data(each: ModeCapacity, wanted: float | None) -> dict[str, Any]:
    found = each.capacity
    cautious, other = _costs(each)
    return {
        "mode": each.mode.label,
        "tier": each.mode.tier,
        "tensor_parallel": each.tp,
        "engines_per_card": each.engines_per_card,
        "fits": found is not None,
        "basis": found.basis if found else None,
        "marked": MARKS[found.basis] if found else None,
        "low": _end_data(each, found.low if found else None),
        "high": _end_data(each, found.high if found else None),
        "memory_sequences": found.memory_sequences if found else 0,
        "limited_by": list(found.limits) if found else ["memory"],
        "cost_per_million_answer_tokens": {"low": other, "high": cautious},
        "engines": each.engines_for(wanted),
        "cards": each.cards_for(wanted),
        "evidence": list(found.evidence) if found else [],
        "notes": list(found.notes) if found else [],
    }


def _recorded_data(recorded: RecordedLoad | None) -> dict[str, Any] | None:
    return None if recorded is None else {**recorded._asdict(), "shape": recorded.shape.model_dump()}


def _end_data(each: ModeCapacity, end: Served | None) -> dict[str, Any] | None:
    """Of the whole card, but sequences and latencies, which are of one engine."""
    if end is None:
        return None
    return {
        "requests_per_s": round(each.requests_per_s(end), 4),
        "tokens_per_s": round(each.tokens_per_s(end), 2),
        "sequences": end.sequences,
        "itl_ms": round(end.itl_ms, 3),
        "ttft_ms": round(end.ttft_ms, 3),
    }
