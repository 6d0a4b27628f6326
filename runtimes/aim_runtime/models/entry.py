"""What the directory is told of a model before it is loaded. Plain values."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from aim_runtime.engine_gauges import Device
from aim_runtime.engines.base import Engine, Prove

Priority = Literal["low", "medium", "high"]
RANK: Mapping[str, int] = {"low": 0, "medium": 1, "high": 2}


@dataclass(frozen=True, slots=True)
class Launch:
    """How one replica is made: ``create`` gives a new engine, not loaded yet, each time it is called.

    ``place``: where it will run, for people and for the label ``replica``: ``card 0 partition 3``; unique among a
    model's replicas, empty where there is one place only. ``devices``: the same for ``aim_model_device_info``.
    ``memory_bytes``: what its processes may hold of a CPU partition. ``prove``: what a loaded engine must show before
    it gets requests (``self_check.proof``).
    """

    create: Callable[[], Engine]
    place: str = ""
    devices: tuple[Device, ...] = ()
    memory_bytes: int | None = None
    prove: Prove | None = None


@dataclass(frozen=True, slots=True)
class ModelEntry:
    """One served name and how to serve it.

    ``launches``: one per replica. ``aliases``: further names for it. ``at_start`` False: known, and loaded when the
    repository API is asked to. ``priority``: who makes way for whom where eviction is allowed, and the class of
    requests whose caller has none. ``latency_slo_ms``: within which that class is promised its first token.
    """

    name: str
    launches: tuple[Launch, ...]
    aliases: tuple[str, ...] = ()
    priority: Priority = "medium"
    at_start: bool = True
    latency_slo_ms: float | None = None


@dataclass(frozen=True, slots=True)
class VariantEntry:
    """A served name whose requests are shared out among other entries: their names, with weights."""

    name: str
    weights: Mapping[str, float] = field(default_factory=dict)
    aliases: tuple[str, ...] = ()
