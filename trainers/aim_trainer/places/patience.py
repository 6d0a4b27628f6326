"""A place that is away is asked again, for so long and no longer."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable
from typing import TypeVar

from aim_trainer.errors import StoreError

#: How long a place may be away before a run gives up on it.
PATIENCE_S = 300.0
_FIRST_S, _LONGEST_S = 0.5, 15.0
_log = logging.getLogger(__name__)
Result = TypeVar("Result")


class Away(Exception):
    """The place did not answer, or broke off in the middle: worth another attempt. `str()`: what happened."""


def patiently(uri: str, patience_s: float, attempt: Callable[[], Result]) -> Result:
    """What `attempt` returns; called again while it raises Away and less than patience_s have passed.

    Waits twice as long after each attempt, up to 15 s, give or take a quarter: many workers do not come back at once.
    Raises StoreError.
    """
    until, wait_s = time.monotonic() + patience_s, _FIRST_S
    while True:
        try:
            return attempt()
        except Away as away:
            if time.monotonic() >= until:
                raise _given_up(uri, patience_s, away) from away
            _log.warning("%s: %s; tried again", uri, away)
        time.sleep(max(0.0, min(wait_s * random.uniform(0.75, 1.25), until - time.monotonic())))
        wait_s = min(2 * wait_s, _LONGEST_S)


def _given_up(uri: str, patience_s: float, away: Away) -> StoreError:
    return StoreError(
        f"{uri}: {away}, tried for {patience_s:.0f} s",
        field=uri,
        remedy="check the endpoint (AWS_ENDPOINT_URL of S3) and the network, then resume the run",
    )
