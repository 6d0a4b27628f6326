"""What watches the process, started and stopped together: spans, the trail of admin actions, the memory watch."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from importlib.metadata import version
from typing import TYPE_CHECKING

from prometheus_client import REGISTRY, CollectorRegistry

from aim_kserve.errors import StartupError
from aim_kserve.otlp_endpoint import endpoint, not_installed
from aim_profile.errors import NodeError
from aim_profile.nodes.read import read_node
from aim_runtime.audit import Audit
from aim_runtime.engine_gauges import Device
from aim_runtime.engines.base import Engine
from aim_runtime.memory_pools import Pool, card_pools, cgroup_pool, machine_pool, process_pool
from aim_runtime.memory_watch import Gate, MemoryWatch
from aim_runtime.metrics import families
from aim_runtime.settings import RuntimeSettings

if TYPE_CHECKING:
    from aim_runtime.tracing import Tracer


class Telemetry:
    """``with Telemetry(settings) as telemetry``: everything runs inside.

    Args:
        settings: where spans and the trail go; whether the node is this machine.
        registry: where ``/metrics`` looks.

    Raises:
        StartupError: the trail's file cannot be written, spans are asked for without OpenTelemetry, or the container's
            memory limit is no number.
    """

    def __init__(self, settings: RuntimeSettings, registry: CollectorRegistry = REGISTRY) -> None:
        self._is_here = settings.node is None
        self._families = families(registry)
        self.audit = Audit.to(settings.audit_log, registry)
        self.memory = MemoryWatch(registry)
        try:
            shared = (cgroup_pool(), machine_pool())
        except NodeError as error:
            raise StartupError(str(error)) from error
        for pool in filter(None, shared):
            self.memory.add(pool)
        url = endpoint(settings.otlp_endpoint)
        self._tracer = None if url is None else _tracer(url, registry)

    def gate(self, engine: Engine, devices: Sequence[Device] = (), memory_bytes: int | None = None) -> Gate:
        """Admission to a model: stops where a card of its ``devices`` is full, or its processes hold ``memory_bytes``,
        or the container or the machine is full."""
        pools = [self._cards[device.card] for device in devices if device.card in self._cards]
        if memory_bytes is None:
            return self.memory.gate(pools)
        own = process_pool(
            lambda: getattr(engine, "pid", os.getpid()),
            memory_bytes,
            name=f"the {engine.name} engine's partition",
            card=devices[0].card if devices else "",
            partition=devices[0].partition if devices else "",
        )
        return self.memory.gate(pools, own)

    def show(self, states: Callable[[], Mapping[str, str]]) -> None:
        """``aim_model_state``: served name → state, asked at every scrape."""
        self._families.engines.show_models(states)

    @cached_property
    def _cards(self) -> dict[str, Pool]:
        """By index; none where the devices are an emulated node's."""
        found = card_pools(read_node()) if self._is_here else {}
        for pool in found.values():
            self.memory.add(pool)
        return {str(index): pool for index, pool in found.items()}

    def __enter__(self) -> Telemetry:
        self._families.spans = self._tracer
        self.memory.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.memory.stop()
        self._families.spans = None
        if self._tracer is not None:
            self._tracer.close()


def _tracer(url: str, registry: CollectorRegistry) -> Tracer:
    try:
        from aim_runtime.tracing import Tracer
    except ImportError as error:
        raise StartupError(not_installed(url, error.name)) from error
    return Tracer(url, version("aim-kserve"), registry)
