"""What a recorded day asks for: the load that so many of a hundred windows of it do not exceed.

Read once, a number for each window that had requests: neither the order of the lines nor their number matters.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

from aim_profile.errors import SizingError
from aim_profile.files.trace import TracedRequest

from .asked import RequestShape

MOST_WINDOWS = 1_000_000


class RecordedLoad(NamedTuple):
    """requests_per_s: of the window at the percentile; shape: of the requests in windows that have as many or more;
    windows: of window_s each, from the first request to the last, empty ones too; peak_per_s: of the busiest.
    """

    shape: RequestShape
    requests_per_s: float
    percentile: float
    window_s: float
    requests: int
    windows: int
    peak_per_s: float


def recorded_load(requests: Iterable[TracedRequest], percentile: float, window_s: float) -> RecordedLoad:
    """The load at that percentile of the windows, by the nearest rank: it is one that was seen.

    Raises SizingError: no requests, or more windows than anybody reads.
    """
    seen: dict[int, list[int]] = {}
    for request in requests:
        window = seen.setdefault(int(request.at_s // window_s), [0, 0, 0])
        window[0] += 1
        window[1] += request.prompt_tokens
        window[2] += request.output_tokens
        if len(seen) > MOST_WINDOWS:
            raise SizingError(
                f"trace: more than {MOST_WINDOWS:,} windows of {window_s:g} s",
                field="window",
                value=window_s,
                remedy="take longer ones, or a part of the trace",
            )
    if not seen:
        raise SizingError("trace: no requests", field="trace", remedy="give a file with a line for each request")
    counts = sorted(window[0] for window in seen.values())
    windows = max(seen) - min(seen) + 1
    rank = math.ceil(percentile / 100 * windows) - (windows - len(counts))
    if rank < 1:
        quiet = f"trace: {percentile:g} of a hundred windows of {window_s:g} s have no request"
        raise SizingError(
            quiet, field="percentile", value=percentile, remedy="take a higher percentile or longer windows"
        )
    at = counts[rank - 1]
    busy = [window for window in seen.values() if window[0] >= at]
    total, prompt, answer = (sum(window[part] for window in busy) for part in range(3))
    shape = RequestShape(prompt_tokens=math.ceil(prompt / total), answer_tokens=math.ceil(answer / total))
    peak = counts[-1] / window_s
    return RecordedLoad(shape, at / window_s, percentile, window_s, sum(counts), windows, peak)
