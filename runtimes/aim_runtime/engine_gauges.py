"""What the engines are doing, asked at the moment of a scrape."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from aim_runtime.engines.base import Engine, parks

EngineLabels = tuple[str, str, str, str]
ENGINE_LABELS = ("model_name", "engine", "variant", "replica")


@dataclass(frozen=True, slots=True)
class Device:
    """What an engine runs on, as texts for labels; empty where unknown. ``card`` and ``partition`` are indices as
    ``aim-profile show`` counts them, the modes are ``CPX``, ``NPS4`` …"""

    card: str = ""
    partition: str = ""
    compute_mode: str = ""
    memory_mode: str = ""


@dataclass(frozen=True, eq=False, slots=True)
class Watched:
    """One engine and the labels that its gauges carry."""

    labels: EngineLabels
    engine: Engine
    devices: tuple[Device, ...] = ()


class _Reading(NamedTuple):
    """One engine at one moment, None where it cannot tell. Also of several engines with equal labels."""

    running: int
    waiting: int
    parked: int | None
    slots: int
    kv_cache_usage: float | None
    stalled_s: float | None
    load_s: float | None
    restarts: int | None
    state: str | None

    @classmethod
    def of(cls, engine: Engine) -> _Reading:
        """``load_seconds`` has an engine in a process of its own only."""
        stats = engine.stats()
        return cls(
            *(stats.running, stats.waiting, stats.parked if parks(engine) else None),
            *(stats.slots_total, stats.kv_cache_usage, stats.stalled_s),
            load_s=getattr(engine, "load_seconds", None),
            restarts=stats.restarts,
            state=stats.state,
        )

    def beside(self, other: _Reading) -> _Reading:
        """Both as one: a model that migrates has two engines for a while, and no sample may stand twice."""
        return _Reading(
            running=self.running + other.running,
            waiting=self.waiting + other.waiting,
            parked=_sum(self.parked, other.parked),
            slots=self.slots + other.slots,
            kv_cache_usage=_largest(self.kv_cache_usage, other.kv_cache_usage),
            stalled_s=_largest(self.stalled_s, other.stalled_s),
            load_s=_largest(self.load_s, other.load_s),
            restarts=_sum(self.restarts, other.restarts),
            state=other.state or self.state,
        )


def _sum(one: int | None, other: int | None) -> int | None:
    return None if one is other is None else (one or 0) + (other or 0)


def _largest(*values: float | None) -> float | None:
    return max((value for value in values if value is not None), default=None)


_GAUGES: dict[str, tuple[str, Callable[[_Reading], float | None]]] = {
    "aim_requests_running": ("Requests the engine is computing", lambda now: now.running),
    "aim_requests_waiting": ("Requests waiting for a slot", lambda now: now.waiting),
    "aim_requests_parked": ("Requests that wait because a more urgent one took their slot", lambda now: now.parked),
    "aim_engine_slots": ("Requests the engine can compute at once", lambda now: now.slots),
    "aim_kv_cache_usage_ratio": ("Share of the KV cache in use, 0 to 1", lambda now: now.kv_cache_usage),
    "aim_engine_stalled_seconds": (
        "Time the engine has had work without getting on with it",
        lambda now: now.stalled_s,
    ),
    "aim_model_load_seconds": ("Time the engine took to load its model, at its last start", lambda now: now.load_s),
}
_RESTARTS = ("aim_engine_restarts", "Times the engine's process has been started again")
_STATE = ("aim_engine_state", "1 for the state that the engine's process is in")
_DEVICE = ("aim_model_device_info", "Devices an engine runs on: join by model_name, variant and replica")
_MODEL_STATE = ("aim_model_state", "1 for the state that the served model is in")


class EngineGauges(Collector):
    """The gauges of every engine of the process. Thread-safe: a scrape may meet a load or an unload."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._watched: list[Watched] = []
        self._model_states: Callable[[], Mapping[str, str]] = dict

    def add(self, watched: Watched) -> None:
        with self._lock:
            self._watched.append(watched)

    def discard(self, watched: Watched) -> None:
        with self._lock:
            self._watched.remove(watched)

    def show_models(self, states: Callable[[], Mapping[str, str]]) -> None:
        """``aim_model_state`` from now on: served name → state, asked at every scrape."""
        self._model_states = states

    def describe(self) -> Iterator[Metric]:
        """Names only: registering must not ask an engine that is not loaded."""
        for name, (text, _) in _GAUGES.items():
            yield GaugeMetricFamily(name, text)
        yield CounterMetricFamily(*_RESTARTS)
        for name, text in (_STATE, _DEVICE, _MODEL_STATE):
            yield GaugeMetricFamily(name, text)

    def collect(self) -> Iterator[Metric]:
        with self._lock:
            watched = list(self._watched)
        yield from _readings(_by_labels(watched))
        yield from _infos(_DEVICE, (*ENGINE_LABELS, *_DEVICE_LABELS), _device_rows(watched))
        yield from _infos(_MODEL_STATE, ("model_name", "state"), self._model_states().items())


_DEVICE_LABELS = ("card", "partition", "compute_mode", "memory_mode")


def _by_labels(watched: Iterable[Watched]) -> dict[EngineLabels, _Reading]:
    found: dict[EngineLabels, _Reading] = {}
    for item in watched:
        now = _Reading.of(item.engine)
        found[item.labels] = found[item.labels].beside(now) if item.labels in found else now
    return found


def _readings(engines: Mapping[EngineLabels, _Reading]) -> Iterator[Metric]:
    for name, (text, value_of) in _GAUGES.items():
        rows = [(labels, value) for labels, now in engines.items() if (value := value_of(now)) is not None]
        yield from _family(GaugeMetricFamily(name, text, labels=ENGINE_LABELS), rows)
    restarts = [(labels, float(now.restarts)) for labels, now in engines.items() if now.restarts is not None]
    yield from _family(CounterMetricFamily(*_RESTARTS, labels=ENGINE_LABELS), restarts)
    states = [(*labels, now.state) for labels, now in engines.items() if now.state]
    yield from _infos(_STATE, (*ENGINE_LABELS, "state"), states)


def _device_rows(watched: Iterable[Watched]) -> set[tuple[str, ...]]:
    return {
        (*item.labels, device.card, device.partition, device.compute_mode, device.memory_mode)
        for item in watched
        for device in item.devices
    }


def _infos(name: tuple[str, str], labels: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> Iterator[Metric]:
    return _family(GaugeMetricFamily(*name, labels=labels), [(row, 1.0) for row in rows])


def _family(
    family: GaugeMetricFamily | CounterMetricFamily, rows: Iterable[tuple[tuple[str, ...], float]]
) -> Iterator[Metric]:
    """The family, unless it has no row: then Prometheus is not told of it."""
    for labels, value in rows:
        family.add_metric(labels, value)
    if family.samples:
        yield family
