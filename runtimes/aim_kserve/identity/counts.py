"""Requests by credential: of keys that are in the file, and under names that nobody else chooses."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import REGISTRY
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

from aim_kserve.identity.identifiers import RESERVED


class Counts(Collector):
    """Counted in a dict, by the event loop's thread: prometheus_client's own counters take a lock for each."""

    def __init__(self) -> None:
        self._by: dict[tuple[str, str], int] = {}

    def add(self, at: tuple[str, str]) -> None:
        """One more; ``at``: the credential and what became of it."""
        self._by[at] = self._by.get(at, 0) + 1

    def keep(self, ids: frozenset[str]) -> None:
        """Keys that have left the file take their series along. From any thread."""
        for at in [at for at in list(self._by) if at[0] not in ids and at[0] not in RESERVED]:
            self._by.pop(at, None)

    def collect(self) -> Iterator[CounterMetricFamily]:
        family = CounterMetricFamily(
            "aim_identity_requests",
            "Requests by whose credential came with them and what became of it",
            labels=["credential", "outcome"],
        )
        for at, count in list(self._by.items()):
            family.add_metric(at, count)
        yield family


COUNTS = Counts()
REGISTRY.register(COUNTS)
