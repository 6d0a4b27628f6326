"""Somebody else's server as an engine: OpenAI's HTTP API in front, the Engine protocol behind.

The way of a request: this file maps the model's name and counts, ``connection`` carries it, ``relay`` makes the
server's events a stream, ``errors`` its refusals ours. ``discovery`` asks the server what it has, ``load`` how busy it
is, ``process`` runs it where it is ours to run.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import orjson

from aim_kserve.errors import BadRequest, ServingError, Unavailable
from aim_runtime.engines.base import EngineStats, Json, ModelLoadError, Operation, RequestContext, Stream
from aim_runtime.fields import Fields

from .connection import MAX_ERROR_BYTES, Answer, Connection
from .discovery import Found, discover
from .errors import from_answer, in_answer, malformed
from .load import Load, read_load
from .process import ServerProcess
from .relay import Relay, Renaming, chunks, note_usage

logger = logging.getLogger("aim.engine.openai_server")

MOST_CONNECTIONS = 256
START_POLL_S = 0.2
PROBE_S = 5.0
_PROBE_TIMEOUT_S = 5.0
#: Of a server that is there but does not answer in time: it may only be busy.
_SILENT_PROBES = 3
_DRAIN_POLL_S = 0.02
#: What a server's log and traces are joined to ours by.
_PASSED_ON = ("traceparent", "tracestate")


class OpenAIServerEngine:
    """A model on a server that speaks OpenAI's HTTP API.

    Args:
        url: of the server, without ``/v1``.
        served_model_name: the name clients ask for.
        model: the server's name of it; None takes the only one it has.
        operations: what the server has; none asks it.
        max_model_len: None takes what the server says.
        most: requests sent to it at once.
        max_waiting: requests that may wait here beyond those; one more is a 503.
        silence_timeout_s: longest wait for the next byte of an answer.
        start_timeout_s: how long the server may take until it answers.
        key_file: holds the server's API key.
        process: the server itself, where it is ours to start; ended by :meth:`close`.
        name: the ``engine`` label of metrics.
        probe_s: between two looks at its health and metrics.
    """

    def __init__(
        self,
        url: str,
        *,
        served_model_name: str,
        model: str | None = None,
        operations: Sequence[str] = (),
        max_model_len: int | None = None,
        most: int | None = None,
        max_waiting: int = 256,
        silence_timeout_s: float = 600,
        start_timeout_s: float = 60,
        key_file: Path | None = None,
        process: ServerProcess | None = None,
        name: str = "openai_server",
        probe_s: float = PROBE_S,
    ) -> None:
        self.name = name
        self._most = most or MOST_CONNECTIONS
        self._connection = Connection(url, most=self._most, silence_timeout_s=silence_timeout_s, key_file=key_file)
        self._served_name = served_model_name
        self._model = model
        self._wanted = tuple(operations)
        self._max_model_len = max_model_len
        self._max_waiting = max_waiting
        self._start_timeout_s = start_timeout_s
        self._process = process
        self._probe_s = probe_s
        self._found: Found | None = None
        self._operations: Mapping[str, Operation] = {}
        self._in_flight = 0
        self._health_path = "/health"
        self._metrics_path: str | None = "/metrics"
        self._silent = 0
        self._load: tuple[Load, int] | None = None  # and how many requests of ours were on their way then
        self._watch: asyncio.Task[None] | None = None

    # --- life ---------------------------------------------------------------------------------------------------

    @property
    def version(self) -> str:
        return self._found.version if self._found else ""

    @property
    def operations(self) -> Mapping[str, Operation]:
        return self._operations

    @property
    def requests(self) -> Mapping[str, Fields | None]:
        """None of them is known: every field passes, and the server judges it."""
        return dict.fromkeys(self._operations)

    @property
    def adapters(self) -> tuple[str, ...]:
        return self._found.adapters if self._found else ()

    @property
    def max_model_len(self) -> int:
        """0 where neither we were told nor the server tells."""
        return self._max_model_len or (self._found.max_model_len if self._found else 0)

    async def load(self) -> None:
        """Start the server if it is ours, wait until it answers, ask what it has.

        Raises:
            ModelLoadError: it ended, did not answer in time, or does not have the model.
        """
        try:
            await self._start()
            self._found = await discover(self._connection, model=self._model, operations=self._wanted)
        except BaseException:
            await self.close()
            raise
        self._operations = {name: functools.partial(self._ask, path) for name, path in self._found.paths.items()}
        await self._look()
        self._watch = asyncio.create_task(self._look_regularly())

    async def _start(self) -> None:
        deadline = time.monotonic() + self._start_timeout_s
        if self._process is not None:
            await self._process.start()
        while not await self._answers():
            if self._process is not None and self._process.exit_code is not None:
                code = await self._process.wait()
                raise ModelLoadError(f"the {self.name} server ended with {code}: {self._process.last_words()}")
            if time.monotonic() > deadline:
                words = f"; its last words: {self._process.last_words()}" if self._process is not None else ""
                raise ModelLoadError(
                    f"the {self.name} server {self._connection.base_url} did not become ready within "
                    f"{self._start_timeout_s:g} s (--server_start_timeout){words}"
                )
            await asyncio.sleep(START_POLL_S)

    async def drain(self, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while self._in_flight and time.monotonic() < deadline:  # noqa: ASYNC110  nobody else has to be woken
            await asyncio.sleep(_DRAIN_POLL_S)
        if self._in_flight:
            await self._connection.close()

    async def close(self) -> None:
        self._operations = {}
        if self._watch is not None:
            self._watch.cancel()
        await self._connection.close()
        if self._process is not None:
            await self._process.stop()

    # --- health -------------------------------------------------------------------------------------------------

    def healthy(self) -> bool:
        """Whether the server answered the last times it was asked."""
        ended = self._process is not None and self._process.exit_code is not None
        return self._found is not None and not ended and self._silent < _SILENT_PROBES

    def stats(self) -> EngineStats:
        """The server's own counts where it tells them: as old as the last probe, but for our own requests."""
        load, ours = self._load or (Load(0, 0, None), 0)
        everything = self._in_flight + max(0, load.running + load.waiting - ours)
        waiting = min(everything, max(load.waiting, everything - self._most))
        stats = EngineStats(everything - waiting, waiting, self._most, load.kv_cache_usage)
        elsewhere = self._process is None and self._found is not None
        return replace(stats, state="ready" if self.healthy() else "unreachable") if elsewhere else stats

    async def _answers(self) -> bool:
        """Whether the server says that it is ready. A server without ``/health`` is if it lists its models."""
        status, _ = await self._get(self._health_path)
        if status in (404, 405) and self._health_path != "/v1/models":
            self._health_path = "/v1/models"
            return await self._answers()
        return status == 200 or (status in (401, 403) and self._health_path == "/v1/models")

    async def _get(self, path: str) -> tuple[int, bytes]:
        """Status 0: no answer; -1: there is nobody."""
        try:
            return await self._connection.get(path, _PROBE_TIMEOUT_S)
        except Unavailable:
            return -1, b""
        except ServingError:
            return 0, b""

    async def _look_regularly(self) -> None:
        while True:
            await asyncio.sleep(self._probe_s)
            await self._look()

    async def _look(self) -> None:
        status, _ = await self._get(self._health_path)
        was = self.healthy()
        self._silent = self._silent + 1 if status == 0 else 0 if status in (200, 401, 403) else _SILENT_PROBES
        if was != self.healthy():
            told = "cannot be reached" if status < 0 else "does not answer in time" if status == 0 else f"says {status}"
            state = "answers again" if self.healthy() else told
            logger.warning("the %s server %s %s", self.name, self._connection.base_url, state)
        await self._read_metrics()

    async def _read_metrics(self) -> None:
        if self._metrics_path is None or not self.healthy():
            self._load = None
            return
        status, body = await self._get(self._metrics_path)
        if status in (404, 405, 501):  # llama-server without --metrics says 501
            self._metrics_path = None
        said = None
        if status == 200 and self._found is not None:
            with contextlib.suppress(ValueError):  # not Prometheus' text: it has no metrics
                said = read_load(body.decode(errors="replace"), self._found.model)
        self._load = (said, self._in_flight) if said is not None else None

    # --- requests -----------------------------------------------------------------------------------------------

    async def _ask(self, path: str, body: Json, context: RequestContext) -> Json | Stream:
        """One request. An error that comes instead of the first event is raised here, before anything is answered."""
        if self._in_flight >= self._most + self._max_waiting:
            raise Unavailable(f"{self._in_flight} requests are on their way already", code="engine_full")
        assert self._found is not None
        asked = body.get("model") or self._served_name
        theirs = self._found.model if asked == self._served_name else asked
        content = _encoded({**body, "model": theirs})
        release = self._taken()
        try:
            answer = await self._connection.post(path, content, _headers(context))
            release = _both(answer.release, release)
            if answer.status != 200:
                raise from_answer(answer.status, await answer.read(MAX_ERROR_BYTES), answer.retry_after)
            if body.get("stream") is True:
                return await _stream(answer, Renaming(theirs, asked), context, release)
            whole = await _whole(answer, context)
        except BaseException:
            release()
            raise
        release()
        return Renaming(theirs, asked).whole(whole)

    def _taken(self) -> Callable[[], None]:
        """Count a request; call what is returned when it has ended, as often as you like."""
        self._in_flight += 1
        counted = [True]

        def release() -> None:
            if counted:
                counted.clear()
                self._in_flight -= 1

        return release


def _both(first: Callable[[], None], second: Callable[[], None]) -> Callable[[], None]:
    def release() -> None:
        first()
        second()

    return release


def _encoded(body: Json) -> bytes:
    """Raises BadRequest: it nests deeper than its encoder goes."""
    try:
        return orjson.dumps(body)
    except orjson.JSONEncodeError as error:
        raise BadRequest(f"the body cannot be passed on to the server: {error}") from error


def _headers(context: RequestContext) -> dict[str, str]:
    passed = {name: context.headers[name] for name in _PASSED_ON if name in context.headers}
    return {**passed, "x-request-id": context.request_id}


async def _stream(answer: Answer, renaming: Renaming, context: RequestContext, release: Callable[[], None]) -> Relay:
    if answer.content_type != "text/event-stream":
        body = await answer.read(MAX_ERROR_BYTES)
        failure = None
        with contextlib.suppress(orjson.JSONDecodeError):
            failure = in_answer(orjson.loads(body))
        raise failure or malformed(f"{answer.content_type} where a stream of events was asked for")
    rest = chunks(answer, renaming, context.usage)
    first = await anext(rest, None)
    return Relay(first, rest, release)


async def _whole(answer: Answer, context: RequestContext) -> Json:
    body = await answer.read()
    try:
        whole = orjson.loads(body)
    except orjson.JSONDecodeError:
        raise malformed(f"{answer.content_type} that is no JSON") from None
    failure = in_answer(whole)
    if failure is not None:
        raise failure
    if not isinstance(whole, dict):
        raise malformed(f"no object but {type(whole).__name__}")
    note_usage(whole, context.usage)
    return whole
