"""A KServe ModelServer that tells the truth: it listens first, loads behind, drains, and says so.

The order of a life, all in :meth:`Server.run`: bind the ports (a taken one is named) → serve, answering 503 → load in
the background → ready → SIGTERM → not ready, no new connections → requests in flight finish (at most until shortly
before the ``grace_period`` is over; the others are told) → exit 0. What cannot be loaded ends the process with exit 1
and one line; so does, after SIGTERM, what does not end.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

import uvicorn
import uvloop
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import BaseRoute
from starlette.types import ASGIApp

from aim_kserve.access import AccessLog
from aim_kserve.client_address import Proxies
from aim_kserve.dataplane import FixedRepository, TruthfulDataPlane
from aim_kserve.errors import ShutdownError, StartupError
from aim_kserve.grpc_server import GrpcServer
from aim_kserve.http import SHUTDOWN
from aim_kserve.identity.guard import Guard
from aim_kserve.kserve import (
    Model,
    ModelRepository,
    ModelRepositoryExtension,
    ModelServer,
    kserve_app,
)
from aim_kserve.protocol import patient
from aim_kserve.rest import Tolerant, install
from aim_kserve.settings import ServerSettings

if TYPE_CHECKING:
    from aim_kserve.identity.verify import Verifier

logger = logging.getLogger("aim.server")

ENDING_S = 3.0  # to cut off what is left, tell its clients, and wait for threads
LATE_S = 10.0  # freeing a large model takes seconds, and so does ending an engine's processes


class Served(Protocol):
    """What the server asks of what it serves: one ``kserve.Model``, or a directory of several."""

    async def load_async(self) -> None:
        """Get ready to answer. Raises StartupError with one line when that is impossible."""
        ...

    def start_draining(self) -> None:
        """From now on ``healthy()`` is False; requests in flight go on."""
        ...

    async def drain(self, timeout_s: float) -> None:
        """Return when no request is in flight; after ``timeout_s`` abort the rest."""
        ...

    async def close(self) -> None:
        """Free everything. Raises ShutdownError with one line when a part of it does not end."""
        ...


def _refuse(error: StartupError) -> int:
    for line in str(error).splitlines():
        print(f"error: {line}", file=sys.stderr)  # noqa: T201  the line a person or kubectl logs reads
    return 1


class Server(ModelServer):  # type: ignore[misc]  # KServe ships no types
    """Models behind KServe's V1/V2 REST and gRPC and our own ``routes``.

    Args:
        settings: ports, host, limits.
        routes: Starlette routes that take precedence over KServe's (the OpenAI surface).
        wrap: ASGI middlewares, innermost first, around the whole app. Outside them: who asks (``identity``), where that
            is asked at all; CORS, whose preflights browsers send without a credential; the access log.
        registry: where KServe's routes find models by name; by default, what :meth:`run` is given, by its name.
        repository: what loads and unloads at run time; by default, nothing does.
        describe: what ``/openapi.json`` answers, made of KServe's document and all routes; by default, the former.
    """

    def __init__(
        self,
        settings: ServerSettings,
        routes: Sequence[BaseRoute] = (),
        wrap: Sequence[Callable[[ASGIApp], ASGIApp]] = (),
        *,
        registry: ModelRepository | None = None,
        repository: ModelRepositoryExtension | None = None,
        describe: Callable[[dict[str, Any], Sequence[BaseRoute]], dict[str, Any]] | None = None,
    ) -> None:
        super().__init__(
            registered_models=registry,
            http_port=settings.http_port,
            grpc_port=settings.grpc_port,
            enable_grpc=settings.enable_grpc,
            enable_latency_logging=False,
            workers=1,
        )
        self.settings = settings
        self.dataplane = TruthfulDataPlane(model_registry=self.registered_models)
        self.model_repository_extension = repository or FixedRepository(model_registry=self.registered_models)
        max_body_bytes = int(settings.max_body_mib * 1024**2)
        if describe is not None:
            of_kserve = kserve_app.openapi
            kserve_app.openapi = lambda: describe(of_kserve(), kserve_app.router.routes)
        app: ASGIApp = Tolerant(
            install(kserve_app, self.dataplane, self.model_repository_extension, routes, max_body_bytes=max_body_bytes)
        )
        for middleware in wrap:
            app = middleware(app)
        self._verifier = _verifier_of(settings)
        self.app: ASGIApp = self.around(app)

    def around(self, app: ASGIApp) -> ASGIApp:
        """``app`` behind what every request passes first: who asks, CORS, the access log."""
        if self._verifier is not None:
            app = Guard(app, self._verifier)
        if self.settings.cors_origins:
            app = allow_origins(app, self.settings.cors_origins)
        return AccessLog(app, enabled=self.settings.access_log, proxies=Proxies(self.settings.trusted_proxies))

    def run(self, served: Served, refuse: Callable[[StartupError], int] = _refuse) -> int:
        """Serve until a signal or a failed load; returns the exit code. ``refuse`` says why it cannot serve."""
        if isinstance(served, Model):
            self.register_model(served)
        try:
            if self._verifier is not None:
                self._verifier.start()
            http_socket = bind(self.settings.host, self.settings.http_port, "--http_port")
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                return runner.run(self._run(served, http_socket))
        except StartupError as error:
            return refuse(error)
        finally:
            if self._verifier is not None:
                self._verifier.stop()

    async def _run(self, served: Served, http_socket: socket.socket) -> int:
        grpc = GrpcServer(self.settings, self.dataplane, self.model_repository_extension, self._verifier)
        host, port = http_socket.getsockname()[:2]
        logger.info("listening on %s:%d (HTTP)", host, port)
        if self.settings.enable_grpc:
            logger.info("listening on %s (gRPC)", await grpc.start())
        http = _Http(self._uvicorn_config())
        serving = asyncio.create_task(http.serve(sockets=[http_socket]))
        loading = asyncio.create_task(_load(served))
        stop = _stop_event()
        stopping = asyncio.create_task(stop.wait())
        try:
            await asyncio.wait({serving, loading, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if loading.done() and loading.exception() is None:
                await asyncio.wait({serving, stopping}, return_when=asyncio.FIRST_COMPLETED)
            return await self._shut_down(served, http, grpc, serving, loading)
        finally:
            stopping.cancel()

    async def _shut_down(
        self, served: Served, http: _Http, grpc: GrpcServer, serving: asyncio.Task[None], loading: asyncio.Task[None]
    ) -> int:
        drain_s = drain_time_s(self.settings.grace_period)
        logger.info("stopping: not ready, draining for at most %g s", drain_s)
        _end_at_last(self.settings.grace_period + LATE_S)
        served.start_draining()
        http.should_exit = True  # closes the listening socket and idle connections, waits for the rest
        ending = asyncio.get_running_loop().call_later(drain_s, http.end_requests)
        await asyncio.gather(served.drain(drain_s), grpc.stop(drain_s), serving)
        ending.cancel()
        failed = loading.exception() if loading.done() and not loading.cancelled() else None
        loading.cancel()
        await asyncio.gather(loading, return_exceptions=True)
        try:
            await served.close()
        except ShutdownError as error:
            _end_now(str(error))
        if failed is not None:
            raise failed
        logger.info("stopped")
        return 0

    def _uvicorn_config(self) -> uvicorn.Config:
        return uvicorn.Config(
            self.app,
            http=patient(self.settings.timeout_receive),
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,  # AccessLog reads them, of whom it may
            timeout_keep_alive=self.settings.timeout_keep_alive,
            timeout_graceful_shutdown=max(1, round(self.settings.grace_period)),
            ssl_certfile=self.settings.ssl_certfile,
            ssl_keyfile=self.settings.ssl_keyfile,
        )


def _verifier_of(settings: ServerSettings) -> Verifier | None:
    """None where every route is open. Nothing is read yet."""
    if not settings.asks_who:
        return None
    from aim_kserve.identity.verify import Verifier  # and what it needs; most starts do without

    return Verifier(settings)


def drain_time_s(grace_period_s: float) -> float:
    """Of the grace period, the time for requests in flight; the rest is for ending."""
    return max(grace_period_s - ENDING_S, grace_period_s / 2)


def _end_at_last(after_s: float) -> None:
    """Whatever hangs on the way out (a thread that the interpreter would wait for, a loop that stands): the process
    ends all the same."""
    timer = threading.Timer(after_s, _end_now, [f"shutting down took longer than {after_s:g} s"])
    timer.daemon = True
    timer.start()


def _end_now(reason: str) -> NoReturn:
    """End without the interpreter's own end, which waits for threads that may never come."""
    print(f"error: {reason}: the process ends all the same", file=sys.stderr, flush=True)  # noqa: T201  the one line
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
    os._exit(1)


async def _load(served: Served) -> None:
    logger.info("loading")
    await served.load_async()
    settle_heap()
    logger.info("ready")


def settle_heap(*, left: bool = False) -> None:
    """Everything alive now lives for long: keep it out of every later collection.

    Args:
        left: a model has left; what was kept for it is looked through once more.
    """
    if left:
        gc.unfreeze()
    gc.collect()
    gc.freeze()


class _Http(uvicorn.Server):
    """uvicorn without signal handlers of its own: the Server above owns SIGTERM."""

    def end_requests(self) -> None:
        """The time for requests is over: every request still in flight tells its client so and ends."""
        for task in self.server_state.tasks:
            task.cancel(SHUTDOWN)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _stop_event() -> asyncio.Event:
    """Set by the first SIGTERM or SIGINT; a second one ends the process at once."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()

    def on_signal(number: signal.Signals) -> None:
        if stop.is_set():
            loop.remove_signal_handler(number)
            signal.raise_signal(number)
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal, number)
    return stop


def allow_origins(app: ASGIApp, origins: tuple[str, ...]) -> ASGIApp:
    """Let pages of these origins call us from a browser and read every header we answer."""
    return CORSMiddleware(
        app, allow_origins=origins, allow_methods=["GET", "POST"], allow_headers=["*"], expose_headers=["*"]
    )


def bind(host: str, port: int, flag: str) -> socket.socket:
    """A bound, not yet listening TCP socket.

    Raises:
        StartupError: the port is taken or not allowed; names port, flag and remedy.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(2048)
    except OSError as error:
        listener.close()
        raise StartupError(f"cannot listen on {host}:{port} ({error.strerror}): choose another {flag}") from error
    return listener
