"""When requests come in an open loop, whether or not others were answered: seconds after the start, rising."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import NamedTuple


class OnOff(NamedTuple):
    """Bursts: Poisson arrivals for on_s, none for off_s, and again; the mean rate is the one asked for."""

    on_s: float
    off_s: float


def poisson(rate_per_s: float, duration_s: float, source: random.Random) -> Iterator[float]:
    """Independent arrivals: exponential gaps of mean 1/rate."""
    at = source.expovariate(rate_per_s)
    while at < duration_s:
        yield at
        at += source.expovariate(rate_per_s)


def on_off(rate_per_s: float, bursts: OnOff, duration_s: float, source: random.Random) -> Iterator[float]:
    """Poisson arrivals on a clock that stands still while it is off: `rate · (on + off) / on` while it is on."""
    period = bursts.on_s + bursts.off_s
    for at in poisson(rate_per_s * period / bursts.on_s, duration_s, source):
        rounds, rest = divmod(at, bursts.on_s)
        shifted = rounds * period + rest
        if shifted >= duration_s:
            return
        yield shifted
