"""The exporter's HTTP server: `/metrics`, until SIGTERM."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable

from prometheus_client import CollectorRegistry, generate_latest, start_http_server

from aim_profile.errors import AimProfileError

from .families import NodeCollector
from .observe import Observer


def exposition(observer: Observer) -> str:
    """What one scrape answers."""
    return generate_latest(_registry(observer)).decode()


def serve(observer: Observer, host: str, port: int, started: Callable[[int], None]) -> None:
    """Answers scrapes until SIGTERM or SIGINT. started: told the port, once it listens.

    Raises AimProfileError where the address is not to be had.
    """
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    try:
        server, thread = start_http_server(port, host, _registry(observer))
    except OSError as problem:
        raise AimProfileError(
            f"--port {port}: {host} does not give it: {problem.strerror or problem}",
            field="port",
            value=port,
            remedy="name another port, or end what listens there",
        ) from problem
    started(int(server.server_port))
    stop.wait()
    server.shutdown()
    server.server_close()
    thread.join()


def _registry(observer: Observer) -> CollectorRegistry:
    registry = CollectorRegistry()
    registry.register(NodeCollector(observer))
    return registry
