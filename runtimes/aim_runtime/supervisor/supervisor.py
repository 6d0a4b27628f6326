"""The life of an engine's process: started in bounded time, watched, ended when it stands still, started again.

What ends it: its own end (a crash, a kill, no memory left), a socket that closes or speaks nonsense, an engine that
says that it is dead, that has work and makes no progress, or that is not heard of at all. Whoever waits for an answer
is told at once; then another process is started, and if that fails another one, later and later, for ever.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from aim_kserve.errors import Unavailable
from aim_runtime.engines.base import EngineDied, ModelLoadError, State

from .frames import Beat, Close, Loaded, LoadFailed
from .launch import Launch, Process
from .link import Link
from .words import Words

logger = logging.getLogger("aim.engine")

CLOSE_S = 5.0  #: for an engine to free everything; then the kernel does
_LAST_WORDS_S = 0.5  #: what a process that has ended printed is in the pipe already
_EXIT_AFTER_EOF_S = 0.5
_LOOKS = 8  #: at the silence, in the time that is allowed for it
_AGAIN_S = (0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0)  #: before the first, the second … start in a row
_LEAST_S = 1.0  #: before the start after an end that came at once
_STEADY_S = 60.0  #: served so long, and an end is a first one again
_REASON_CHARACTERS = 500
RETRY_S = 5

U = TypeVar("U", bound=Unavailable)


class _Child:
    """A process, its link and its words, on the running loop."""

    def __init__(self, process: Process, model: str, on_beat: Callable[[Beat], None]) -> None:
        loop = asyncio.get_running_loop()
        self.process = process
        self.words = Words(model)
        self.loaded: asyncio.Future[Loaded] = loop.create_future()
        self.over: asyncio.Future[str] = loop.create_future()  # why it has ended, or must be ended
        self.exited = asyncio.Event()
        self.link = Link(on_loaded=self._on_loaded, on_beat=on_beat, on_lost=self._on_lost, on_garbage=self.end)
        self._loop = loop
        self._output: asyncio.BaseTransport | None = None
        self._buried: str | None = None

    async def attach(self) -> None:
        self._loop.add_reader(self.process.exit_fd, self._on_exit)
        self._output, _ = await self._loop.connect_read_pipe(lambda: self.words, self.process.output)
        await self._loop.create_unix_connection(lambda: self.link, sock=self.process.socket)

    def end(self, reason: str) -> None:
        """It is over, if it was not already."""
        if not self.over.done():
            self.over.set_result(reason)

    def _on_loaded(self, message: Loaded | LoadFailed) -> None:
        if self.loaded.done():
            return
        if isinstance(message, Loaded):
            self.loaded.set_result(message)
        else:
            self.loaded.set_exception(ModelLoadError(message.message))

    def _on_exit(self) -> None:
        self._loop.remove_reader(self.process.exit_fd)
        self.exited.set()
        self.end("")  # how it ended is known when it is reaped

    def _on_lost(self, reason: str) -> None:
        """Mostly it has ended, and the kernel says so in a moment."""
        self._loop.call_later(_EXIT_AFTER_EOF_S, self.end, reason)

    async def bury(self) -> str:
        """End it if it has not ended, and say how it ended, in one line. Nothing that it printed is in it: that may
        be what somebody asked."""
        if self._buried is not None:
            return self._buried
        reason = self.over.result() if self.over.done() else ""
        self.process.kill()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.exited.wait(), CLOSE_S)  # a process in the kernel's hands may take its time
        if self.exited.is_set():
            how = self.process.reap()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.words.ended.wait(), _LAST_WORDS_S)
        else:
            self._loop.remove_reader(self.process.exit_fd)
            how = "does not end"
        self.link.close()
        if self._output is not None:
            self._output.close()
        self._buried = (reason or how)[:_REASON_CHARACTERS]
        return self._buried

    async def obituary(self) -> str:
        """The same with its last words, if it ended by itself: for the log, and for who starts it."""
        how = await self.bury()
        by_itself = not (self.over.done() and self.over.result())
        return f"{how}: {self.words.last}"[:_REASON_CHARACTERS] if by_itself and self.words.last else how


class Supervisor:
    """See the module.

    Args:
        launch: how the process is started.
        start_timeout_s: for the model to be loaded.
        stall_timeout_s: without progress while there is work, or without a sign of life.
        on_loaded: with what each new process has loaded, before it is said to be ready.
        on_ready: when it is.
    """

    def __init__(
        self,
        launch: Launch,
        *,
        start_timeout_s: float,
        stall_timeout_s: float,
        on_loaded: Callable[[Loaded, Link], Awaitable[None]],
        on_ready: Callable[[], None],
    ) -> None:
        self.launch = launch  #: of the next process
        self._model = launch.spec.served_model_name
        self._start_timeout_s = start_timeout_s
        self._stall_timeout_s = stall_timeout_s
        self._on_loaded = on_loaded
        self._on_ready = on_ready
        self._process: Process | None = None  # started, and not attached to a loop yet
        self._child: _Child | None = None
        self._watching: asyncio.Task[None] | None = None
        self._began = self._ready_at = time.monotonic()
        self._failures = 0
        self.state: State = "loading"
        self.restarts = 0
        self.load_seconds: float | None = None
        self.last_words: str | None = None
        self.beat: Beat | None = None
        self.beat_at = 0.0

    # --- life ---------------------------------------------------------------------------------------------------------

    def spawn(self) -> None:
        """Start the process now, before there is a loop.

        Raises:
            ModelLoadError: it cannot be started at all.
        """
        self._began = time.monotonic()
        try:
            self._process = Process(self.launch)
        except OSError as error:
            raise ModelLoadError(f"the engine's process cannot be started ({self.launch.python}): {error}") from error

    @property
    def pid(self) -> int | None:
        """Of the process that runs now; None while there is none."""
        return None if self._child is None else self._child.process.pid

    async def start(self) -> None:
        """Until the model is loaded.

        Raises:
            ModelLoadError: it was not, in time or at all: with the process's last words.
        """
        try:
            await self._load()
        except ModelLoadError:
            self.state = "failed"
            raise
        self._watching = asyncio.create_task(self._watch())

    async def close(self) -> None:
        """End the process, in an orderly way if there is one. Bounded."""
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.gather(self._watching, return_exceptions=True)
        if self._process is not None:
            process, self._process = self._process, None
            await asyncio.to_thread(process.discard)
        child, self._child = self._child, None
        if child is None:
            return
        if self.state == "ready" and not child.over.done():
            child.link.send(Close())
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(child.exited.wait(), CLOSE_S)
        if not child.exited.is_set():
            logger.warning("model %s: its process does not end by itself: it is killed", self._model)
        await child.bury()

    # --- what callers ask ---------------------------------------------------------------------------------------------

    def link(self) -> Link:
        """To a process that can be asked.

        Raises:
            Unavailable: there is none now.
        """
        if self.state != "ready" or self._child is None:
            raise self.unavailable()
        return self._child.link

    def unavailable(self, kind: type[U] = Unavailable) -> U:  # type: ignore[assignment]
        what = {
            "loading": "is still loading: ask again",
            "failed": f"could not be loaded, {self.last_words}",
        }.get(self.state, f"is being started again, {self.last_words}: ask again")
        return kind(f"the engine of model {self._model} {what}", code="engine_restarting", retry_after_s=RETRY_S)

    def stalled_s(self) -> float | None:
        """Seconds without progress while there is work, as of now; None where the engine cannot tell."""
        if self.state != "ready" or self._child is None or self.beat is None:
            return None
        now = time.monotonic()
        silence_s = now - self._child.link.heard_at
        stalled_s = self.beat.stats.stalled_s
        if silence_s > self._stall_timeout_s / _LOOKS and self._child.link.calls:
            return max(stalled_s or 0.0, silence_s)
        return stalled_s

    # --- the process --------------------------------------------------------------------------------------------------

    async def _load(self) -> None:
        if self._process is None:
            self.spawn()
        process, self._process = self._process, None
        assert process is not None
        child = self._child = _Child(process, self._model, self._on_beat)
        try:
            await child.attach()
            loaded = await self._until_loaded(child)
            await self._prepare(child, loaded)
        except BaseException as error:
            if isinstance(error, ModelLoadError):
                self.last_words = f"its last start failed: {error}"[:_REASON_CHARACTERS]
            self._child = None
            await child.bury()
            raise
        self.load_seconds = time.monotonic() - self._began
        self._ready_at = time.monotonic()
        self.state = "ready"
        self._on_ready()

    async def _prepare(self, child: _Child, loaded: Loaded) -> None:
        """Whatever is asked of the new process before it is ready ends with it, or when the time is over."""
        preparing = asyncio.ensure_future(self._on_loaded(loaded, child.link))
        left_s = max(1.0, self._start_timeout_s - (time.monotonic() - self._began))
        ends: set[asyncio.Future[Any]] = {preparing, child.over}
        try:
            await asyncio.wait(ends, timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            preparing.cancel()
            await asyncio.gather(preparing, return_exceptions=True)
        if not preparing.cancelled():
            preparing.result()
        elif child.over.done():
            raise ModelLoadError(f"the engine's process {await child.obituary()}")
        else:
            raise ModelLoadError("the engine's process has loaded the model, but is not ready for requests in time")

    async def _until_loaded(self, child: _Child) -> Loaded:
        timeout_s = max(0.0, self._start_timeout_s - (time.monotonic() - self._began))
        ends: set[asyncio.Future[Any]] = {child.loaded, child.over}
        await asyncio.wait(ends, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if child.loaded.done():
            return child.loaded.result()
        if not child.over.done():
            words = f": {child.words.last}" if child.words.last else ""
            raise ModelLoadError(
                f"the engine's process has not loaded it in {self._start_timeout_s:g} s (--start_timeout){words}"
            )
        raise ModelLoadError(f"the engine's process {await child.obituary()}")

    def _on_beat(self, beat: Beat) -> None:
        self.beat, self.beat_at = beat, time.monotonic()
        child = self._child
        if child is None or self.state != "ready":
            return
        stalled_s = beat.stats.stalled_s or 0.0
        if stalled_s >= self._stall_timeout_s:
            child.end(f"has not moved for {stalled_s:.0f} s")
        elif not beat.healthy:
            child.end("said that its engine is dead")

    async def _watch(self) -> None:
        while True:
            assert self._child is not None
            await self._until_over(self._child)
            await self._replace(self._child)

    async def _until_over(self, child: _Child) -> None:
        look_s = self._stall_timeout_s / _LOOKS
        while not child.over.done():
            looked_at = time.monotonic()
            await asyncio.wait({child.over}, timeout=look_s)
            overslept = time.monotonic() - looked_at > 2 * look_s  # we ourselves stood still: its beats are unread yet
            silence_s = time.monotonic() - child.link.heard_at
            if silence_s >= self._stall_timeout_s and not overslept:
                child.end(f"has not moved for {silence_s:.0f} s, nor given a sign of life")

    def _tell(self, link: Link) -> int:
        """Whoever waits for an answer that the process has died; returns how many that were."""
        alone = len(link.calls) == 1

        def death() -> EngineDied:
            error = self.unavailable(EngineDied)
            error.alone = alone
            return error

        return link.fail_all(death)

    async def _replace(self, child: _Child) -> None:
        """Tell everybody, and start another process."""
        self.state = "restarting"
        obituary = await child.obituary()
        self.last_words = f"its process {await child.bury()}"
        self._child = self.beat = None
        told = self._tell(child.link)
        logger.error("model %s: the engine's process %s; %d requests were told so", self._model, obituary, told)
        served_s = time.monotonic() - self._ready_at
        if served_s > _STEADY_S:
            self._failures = 0
        most_s = max(_LEAST_S, served_s)  # a request that ends it again and again takes half of the time at most
        while True:
            await asyncio.sleep(min(most_s, _AGAIN_S[min(self._failures, len(_AGAIN_S) - 1)]))
            most_s = _AGAIN_S[-1]
            self._failures += 1
            self.restarts += 1
            self._began = time.monotonic()
            try:
                await self._load()
            except (ModelLoadError, OSError) as error:
                logger.error("model %s: the engine does not start again: %s", self._model, error)
                continue
            except Exception:  # the edge of the watch: without it nobody would start the engine again
                logger.exception("model %s: the engine does not start again", self._model)
                continue
            logger.info("model %s: the engine is back after %.1f s", self._model, self.load_seconds)
            return
