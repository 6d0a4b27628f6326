"""From what became of each request to the figures of a level of load, and where the knee is."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise

from aim_profile.serving.evidence import Knee, Percentiles, Point, Slo
from aim_runtime.measure.client import Outcome

#: A client that sends or reads so late is no judge of a server, unless a first token takes ten times as long.
LAG_MS = 20.0
#: Below this share of what was added to the load, throughput no longer rises.
LEAST_GAIN = 0.1
#: More failures than this are no service.
MOST_FAILED = 0.05


def percentile(values: Sequence[float], share: float) -> float:
    """By the nearest rank: the smallest value that at least that share of all (sorted) values do not exceed."""
    return values[max(0, math.ceil(share * len(values)) - 1)]


def percentiles(values: Iterable[float]) -> Percentiles | None:
    """p50, p95 and p99 of seconds, in milliseconds; None of nothing."""
    ordered = sorted(values)
    if not ordered:
        return None
    p50, p95, p99 = (round(percentile(ordered, share) * 1e3, 3) for share in (0.50, 0.95, 0.99))
    return Percentiles(p50=p50, p95=p95, p99=p99)


def point(
    offered: float, outcomes: Sequence[Outcome], lags_s: Sequence[float], slo: Slo, *, began_s: float, least_s: float
) -> Point:
    """The figures of a level. lags_s: how late the client's own clock work was, beside its late sendings; began_s: when
    the level began; least_s: how long it sent."""
    answered = [each for each in outcomes if each.failed is None]
    duration = max([least_s, *(each.ended_s - began_s for each in outcomes)])
    first = percentiles(each.tokens_s[0] - each.due_s for each in answered)
    late = sorted([*lags_s, *(each.sent_s - each.due_s for each in outcomes)])
    lag_ms = round(percentile(late, 0.95) * 1e3, 3) if late else 0.0
    tokens = sum(each.output_tokens for each in answered)
    return Point(
        offered=offered,
        duration_s=round(duration, 3),
        answered=len(answered),
        failed=dict(sorted(Counter(each.failed for each in outcomes if each.failed).items())),
        requests_per_s=round(len(answered) / duration, 4),
        output_tokens_per_s=round(tokens / duration, 3),
        prompt_tokens=sum(each.prompt_tokens for each in answered),
        output_tokens=tokens,
        ttft_ms=first,
        itl_ms=percentiles(gap for each in answered for gap in _gaps(each)),
        e2e_ms=percentiles(each.ended_s - each.due_s for each in answered),
        goodput_per_s=round(sum(is_good(each, slo) for each in answered) / duration, 4) if _asks(slo) else None,
        client_lag_ms=max(0.0, lag_ms),
        valid=lag_ms <= max(LAG_MS, first.p50 / 10 if first else 0.0),
    )


def is_good(outcome: Outcome, slo: Slo) -> bool:
    """Whether an answered request kept to what was promised: its first token, and its tokens on average."""
    first_ms = (outcome.tokens_s[0] - outcome.due_s) * 1e3
    between = (outcome.tokens_s[-1] - outcome.tokens_s[0]) * 1e3 / max(1, outcome.output_tokens - 1)
    return (slo.ttft_ms is None or first_ms <= slo.ttft_ms) and (slo.itl_ms is None or between <= slo.itl_ms)


def knee(points: Sequence[Point], slo: Slo) -> Knee | None:
    """The last of the points (in rising order) before the first that shows too much load; None: none does, or the very
    first. A point whose client did not keep up tells nothing."""
    for before, after in pairwise(point for point in points if point.valid):
        if overload(before, slo):
            return None
        if why := overload(after, slo) or _flat(before, after):
            return Knee(offered=before.offered, because=f"{why} at {after.offered:g}")
    return None


def overload(found: Point, slo: Slo) -> str | None:
    """What shows that a level is more than the server holds, by itself; None: nothing does."""
    failed, asked = sum(found.failed.values()), found.answered + sum(found.failed.values())
    if failed > MOST_FAILED * asked:
        return f"{failed} of {asked} requests failed"
    for name, seen, limit in (("TTFT", found.ttft_ms, slo.ttft_ms), ("ITL", found.itl_ms, slo.itl_ms)):
        if limit is not None and seen is not None and seen.p95 > limit:
            return f"{name} p95 of {seen.p95:.4g} ms is over {limit:g} ms"
    return None


def _flat(before: Point, after: Point) -> str | None:
    """Throughput (goodput, where something was promised) rises by less than a tenth of what the load does."""
    good = before.goodput_per_s is not None and after.goodput_per_s is not None
    was = before.goodput_per_s if good else before.output_tokens_per_s
    now = after.goodput_per_s if good else after.output_tokens_per_s
    load = after.offered / before.offered - 1
    if was and now is not None and now / was - 1 < LEAST_GAIN * load:
        what = "goodput" if good else "throughput"
        return f"{what} no longer rises ({was:.4g} to {now:.4g} {'requests' if good else 'tokens'}/s)"
    return None


def _gaps(outcome: Outcome) -> Iterable[float]:
    return (after - before for before, after in pairwise(outcome.tokens_s))


def _asks(slo: Slo) -> bool:
    return slo.ttft_ms is not None or slo.itl_ms is not None
