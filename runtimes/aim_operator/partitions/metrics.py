"""How long switches take: a histogram for each phase of a node's way."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Histogram

#: From a label that changes to a driver that reloads (140 s) and a manager that tries for 30 minutes.
_BUCKETS_S = (1, 2, 5, 10, 20, 40, 80, 160, 320, 640, 1280, 2560)


class Switches:
    """The histogram, in a registry."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._seconds = Histogram(
            "aim_partition_switch_seconds",
            "Seconds a node was in a phase of its switch from one partition mode to another.",
            ("from", "to", "phase"),
            buckets=_BUCKETS_S,
            registry=registry,
        )

    def took(self, was: str, to: str, phase: str, seconds: float) -> None:
        """was, to: modes as `CPX/NPS4`; was is empty where it is not known."""
        self._seconds.labels(was or "unknown", to, phase).observe(seconds)
