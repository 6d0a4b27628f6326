"""An engine in another process, as an ``Engine``."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from contextvars import ContextVar
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from aim_kserve.errors import ServingError, Unavailable
from aim_runtime.engines.base import EngineStats, Json, Operation, Prove, RequestContext, State, Stream
from aim_runtime.fields import Fields

from .frames import LoadAdapter, Loaded, UnloadAdapter
from .launch import Launch
from .link import Link
from .supervisor import Supervisor

logger = logging.getLogger("aim.engine")

_DRAIN_POLL_S = 0.02
#: The engines' setting with the adapters of the start (``engines.adapters.AdapterPaths``).
ADAPTERS = "adapters"
#: Of the task that asks a new process for its proof, before it is ready for anybody else.
_proving: ContextVar[Link | None] = ContextVar("aim.proving", default=None)


class RemoteEngine:
    """``launch.spec``'s engine in a process of its own, under a supervisor.

    While its process is being started again, operations raise Unavailable with the reason, and ``healthy`` is False;
    ``operations``, ``requests`` and ``max_model_len`` stay what they were.

    Args:
        launch: how the process is started.
        start_timeout_s: for the model to be loaded; then ``load`` fails.
        stall_timeout_s: seconds without progress while there is work, or without a sign of life, after which the
            process is ended and started again.
    """

    #: Only there once a process has loaded an engine that has them (see ``engines.base``).
    load_adapter: Callable[[str, Path], Awaitable[None]]
    unload_adapter: Callable[[str], Awaitable[None]]

    def __init__(self, launch: Launch, *, start_timeout_s: float = 1800.0, stall_timeout_s: float = 60.0) -> None:
        self.name = launch.spec.engine
        self.prove: Prove | None = None  #: see ``engines.base.StartsAgain``
        self.on_ready: Callable[[], None] = _nobody  #: the same
        self._slots = launch.spec.max_concurrency or 0
        self._supervisor = Supervisor(
            launch,
            start_timeout_s=start_timeout_s,
            stall_timeout_s=stall_timeout_s,
            on_loaded=self._on_loaded,
            on_ready=lambda: self.on_ready(),
        )
        self._loaded: Loaded | None = None
        self._operations: Mapping[str, Operation] = {}
        self._adapters: tuple[str, ...] = ()
        at_start = launch.spec.options.get(ADAPTERS)
        #: What a new process must load: an adapter of the start may have been replaced or unloaded since.
        self._wanted: dict[str, Path] = dict(at_start) if isinstance(at_start, Mapping) else {}
        self._unwanted: set[str] = set()
        self._changing: set[asyncio.Task[None]] = set()
        self._closing = False

    # --- what it is ---------------------------------------------------------------------------------------------------

    @property
    def version(self) -> str:
        return self._loaded.version if self._loaded is not None else ""

    @property
    def operations(self) -> Mapping[str, Operation]:
        return self._operations

    @property
    def requests(self) -> Mapping[str, Fields | None]:
        return self._loaded.requests if self._loaded is not None else {}

    @property
    def adapters(self) -> tuple[str, ...]:
        return self._adapters

    @property
    def max_model_len(self) -> int:
        return self._loaded.max_model_len if self._loaded is not None else 0

    @property
    def parks(self) -> bool:
        """See ``engines.base.Parks``: as the loaded engine says."""
        return self._loaded is not None and self._loaded.parks

    @property
    def state(self) -> State:
        return self._supervisor.state

    @property
    def pid(self) -> int | None:
        """Of the process; None while there is none."""
        return self._supervisor.pid

    @property
    def restarts(self) -> int:
        """Processes started after the first."""
        return self._supervisor.restarts

    @property
    def load_seconds(self) -> float | None:
        """From the start of the present process to its model's being loaded; None before."""
        return self._supervisor.load_seconds

    # --- life ---------------------------------------------------------------------------------------------------------

    def spawn(self) -> None:
        """Start the process now: it loads while the caller does something else. ``load`` waits for it.

        Raises:
            ModelLoadError: there is no such interpreter.
        """
        self._supervisor.spawn()

    async def load(self) -> None:
        """As the protocol says. Raises ModelLoadError with the engine's own reason, or its process's last words."""
        await self._supervisor.start()

    async def _on_loaded(self, loaded: Loaded, link: Link) -> None:
        first = self._loaded is None
        self._loaded = loaded
        self.name = loaded.name
        self._operations = {name: partial(self._run, name) for name in loaded.operations}
        self._adapters = loaded.adapters
        if loaded.takes_adapters:
            self.load_adapter, self.unload_adapter = self._load_adapter, self._unload_adapter
        if first:
            self._supervisor.launch = _without_adapters(self._supervisor.launch, loaded)
            return
        await self._restore_adapters(link)
        if self.prove is not None:
            _proving.set(link)
            await self.prove(self)

    async def _restore_adapters(self, link: Link) -> None:
        """Those that were there before, and no others. One that cannot be loaded any more is left out: the model
        serves without it."""
        for name in self._unwanted.intersection(self._adapters):
            self._adapters = await link.change_adapters(partial(UnloadAdapter, name=name))
        for name, path in list(self._wanted.items()):
            if name in self._adapters:
                continue
            try:
                self._adapters = await link.change_adapters(partial(_loading, name=name, path=path))
            except ServingError as error:
                logger.error("the adapter %s is not loaded again: %s", name, error)
                del self._wanted[name]

    def healthy(self) -> bool:
        beat = self._supervisor.beat
        return self.state == "ready" and not self._closing and (beat is None or beat.healthy)

    def stats(self) -> EngineStats:
        """Of the last beat, set right by what we know ourselves: who waits for an answer."""
        supervisor = self._supervisor
        told = supervisor.beat.stats if supervisor.beat is not None else EngineStats(0, 0, self._slots)
        unanswered = self._unanswered
        running = told.running if unanswered else 0
        return replace(
            told,
            running=running,
            waiting=max(told.waiting, unanswered - running) if unanswered else 0,
            parked=told.parked if unanswered else 0,
            stalled_s=supervisor.stalled_s(),
            state=supervisor.state,
            restarts=supervisor.restarts,
            last_words=supervisor.last_words,
        )

    @property
    def _unanswered(self) -> int:
        try:
            return len(self._supervisor.link().calls)
        except Unavailable:
            return 0

    async def drain(self, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while self._unanswered and time.monotonic() < deadline:  # noqa: ASYNC110 (the last call's end is one of many)
            await asyncio.sleep(_DRAIN_POLL_S)
        self._closing = True
        if self._unanswered:
            self._supervisor.link().fail_all(lambda: Unavailable("the engine is shutting down", code="shutting_down"))

    async def close(self) -> None:
        self._closing = True
        self._operations = {}
        await self._supervisor.close()

    # --- requests -----------------------------------------------------------------------------------------------------

    async def _run(self, operation: str, body: Json, context: RequestContext) -> Json | Stream:
        link = _proving.get() or self._supervisor.link()
        return await link.ask(operation, body, context)

    async def _load_adapter(self, name: str, path: Path) -> None:
        async def load() -> None:
            self._adapters = await self._supervisor.link().change_adapters(partial(_loading, name=name, path=path))
            self._wanted[name] = path
            self._unwanted.discard(name)

        await self._to_its_end(load())

    async def _unload_adapter(self, name: str) -> None:
        async def unload() -> None:
            self._adapters = await self._supervisor.link().change_adapters(partial(UnloadAdapter, name=name))
            self._wanted.pop(name, None)
            self._unwanted.add(name)

        await self._to_its_end(unload())

    async def _to_its_end(self, work: Coroutine[Any, Any, None]) -> None:
        """Even if the caller leaves: the engine does it all the same."""
        task = asyncio.create_task(work)
        self._changing.add(task)
        task.add_done_callback(self._changing.discard)
        await asyncio.shield(task)


def _nobody() -> None:
    """Nobody waits for it."""


def _without_adapters(launch: Launch, loaded: Loaded) -> Launch:
    """How a later process is started, where adapters can be loaded one by one: a file that is gone since must not keep
    the model from being served. The setting stays, empty: the engine keeps room for them."""
    options = launch.spec.options
    if not (loaded.takes_adapters and isinstance(options.get(ADAPTERS), Mapping)):
        return launch
    return replace(launch, spec=replace(launch.spec, options={**options, ADAPTERS: {}}))


def _loading(call: int, *, name: str, path: Path) -> LoadAdapter:
    return LoadAdapter(call, name, str(path))
