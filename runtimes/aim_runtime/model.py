"""A served model: one engine's life, and the one door through which every protocol reaches it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from copy import copy
from enum import StrEnum
from functools import partial
from typing import Any, Protocol

from aim_kserve.access import current_log
from aim_kserve.errors import BadRequest, NotFound, ServingError, StartupError, Unavailable, internal_error
from aim_kserve.http import ShutDown, is_shutdown
from aim_kserve.identity.permission import may_use, tellable
from aim_kserve.kserve import InferRequest, InferResponse, Model
from aim_runtime.engines.base import Engine, Json, ModelLoadError, Operation, RequestContext, Stream
from aim_runtime.fields import DECIDED, header_of, ignored_fields
from aim_runtime.in_flight import InFlight
from aim_runtime.kserve_api import INPUTS, OUTPUTS, Answer, Question, read_v1, read_v2, write_v1, write_v2
from aim_runtime.metrics import Meter, Metrics, RequestMetrics

logger = logging.getLogger("aim.server")

LOADING_RETRY_S = 5
MIN_AT_ONCE = 16  # questions of one request


class State(StrEnum):
    """Of a served name."""

    UNAVAILABLE = "unavailable"  #: known, and not loaded
    LOADING = "loading"
    READY = "ready"  #: loaded; whether its engine lives is another question
    UNLOADING = "unloading"
    FAILED = "failed"  #: could not be loaded
    EVICTED = "evicted"  #: unloaded to make room for another


class Admission(Protocol):
    """Asked before a request is admitted."""

    def refusal(self) -> Unavailable | None:
        """Why none may come in now; None if one may."""
        ...

    def close(self) -> None:
        """The model has left."""
        ...


class RuntimeModel(Model):  # type: ignore[misc]  # KServe ships no types
    """A ``kserve.Model`` (V1, V2 REST and gRPC) whose :meth:`call` also serves the OpenAI routes.

    It lives from one load to one unload; what is loaded again is a new one.

    Args:
        name: the name it is served under.
        engine: not loaded yet; ``load_async`` does.
        metrics: where requests are counted.
        aliases: further names for it; an engine knows the first name only.
        gate: asked before a request is admitted; full memory refuses it.
        strict_fields: refuse unknown fields of a body instead of ignoring them.
    """

    def __init__(
        self,
        name: str,
        engine: Engine,
        metrics: Metrics,
        *,
        aliases: Sequence[str] = (),
        gate: Admission | None = None,
        strict_fields: bool = False,
    ) -> None:
        super().__init__(name)
        self._strict_fields = strict_fields
        self.runs_on = engine  # `engine` is KServe's: a flag
        self.metrics = metrics
        self._gate = gate
        self.aliases = tuple(aliases)
        self.created = int(time.time())
        self.state = State.LOADING
        self.failure = ""  #: why it could not be loaded, one line
        self.in_flight = InFlight()
        self._was_loaded = self._closed = False
        self.last_used_s = time.monotonic()

    # --- life ---------------------------------------------------------------------------------------------------

    async def load_async(self) -> None:
        try:
            await self.runs_on.load()
        except ModelLoadError as error:
            self.state, self.failure = State.FAILED, str(error)
            raise StartupError(f"model {self.name}: {error}") from error
        if self.state is State.LOADING:
            self.state, self.ready = State.READY, True

    async def healthy(self) -> bool:
        return self.refusal() is None

    def alive(self) -> bool:
        """False once a loaded engine has died or stands still, and nobody starts it again."""
        return self.state is not State.READY or self.runs_on.healthy() or _may_come_back(self.runs_on)

    def refusal(self) -> Unavailable | None:
        """Why no request can be served now; None if one can."""
        if self.state is State.READY:
            if not self.runs_on.healthy():
                return self._engine_trouble()
            return None if self._gate is None else self._gate.refusal()
        if self.state is State.LOADING:
            return Unavailable(f"model {self.name} is still loading: ask again", retry_after_s=LOADING_RETRY_S)
        if self.state is State.FAILED:
            return Unavailable(f"model {self.name} could not be loaded: {self.failure}", code="model_load_failed")
        return Unavailable(f"model {self.name} is shutting down: ask again, another replica will answer")

    def _engine_trouble(self) -> Unavailable:
        stats = self.runs_on.stats()
        code = "engine_restarting" if stats.state == "restarting" else None
        if stats.state == "restarting":
            why = f", {stats.last_words}" if stats.last_words else ""
            what = f"is being started again{why}: ask again"
        elif stats.state == "unreachable":
            what = "cannot be reached: ask again"
        elif stats.stalled_s and stats.stalled_s >= 1:
            what = f"has not moved for {stats.stalled_s:.0f} s"
        else:
            what = "has died: its log has the cause"
        message = f"the {self.runs_on.name} engine of model {self.name} {what}"
        return Unavailable(message, code=code, retry_after_s=LOADING_RETRY_S)

    def load(self) -> bool:
        """KServe's way to load a model that is not ready, per request: ours loads once, in the background."""
        return self.refusal() is None

    def start_draining(self) -> None:
        self._was_loaded = self.state is State.READY
        self.state = State.UNLOADING

    async def drain(self, timeout_s: float) -> None:
        """Return when no request is in flight; after ``timeout_s`` the engine aborts the rest."""
        if self._was_loaded:
            deadline_s = time.monotonic() + timeout_s
            await self.in_flight.end(timeout_s)
            await self.runs_on.drain(max(0.0, deadline_s - time.monotonic()))

    async def close(self) -> None:
        """Free everything; a second call does nothing."""
        if not self._closed:
            self._closed = True
            if self._gate is not None:
                self._gate.close()
            await self.runs_on.close()

    # --- requests -----------------------------------------------------------------------------------------------

    async def call(
        self, operation: str, body: Json, context: RequestContext, *, counted_by: Metrics | None = None
    ) -> Json | Stream:
        """Run one operation of the engine, counted and timed; a Stream counts when it ends.

        Args:
            counted_by: instead of the model's own metrics, where it answers under another served name.

        Raises:
            Unavailable: loading, draining, dead or (from the engine) full.
            BadRequest: the model does not have this operation; ``body`` has a field that must not be ignored; or,
                from the engine, what is wrong with it.
            NotFound: ``body["model"]`` is another model.
            ServingError: 504, ``context.timeout_s`` is over.
        """
        return await self._call(operation, body, context, counted_by or self.metrics, self.refusal())

    async def _call(
        self, operation: str, body: Json, context: RequestContext, metrics: Metrics, refusal: Unavailable | None
    ) -> Json | Stream:
        meter = Meter(self._counts(body, metrics), operation, context.usage, body, context.moments)
        self.last_used_s = time.monotonic()
        with self.in_flight:
            try:
                if refusal is not None:
                    raise refusal
                run = self._operation(operation, body)
                self._judge_fields(operation, body, context, metrics)
                answer = await _in_time(run(self._for_engine(body), context), context.timeout_s)
            except BaseException as error:
                meter.end(_status_of(error))
                raise
            if isinstance(answer, dict):
                meter.end(200)
                return answer
            context.shortcut.tap = meter.tick
            return self._metered(answer, meter)

    def _counts(self, body: Json, metrics: Metrics) -> RequestMetrics:
        """An adapter's requests are counted under its own name."""
        adapters = self.runs_on.adapters
        return metrics.for_adapter(body["model"]) if adapters and body.get("model") in adapters else metrics

    def _for_engine(self, body: Json) -> Json:
        """Under the name that the engine knows, without what is not for the client to say."""
        body = {**body, "model": self.name} if body.get("model") in self.aliases else body
        if DECIDED.keys().isdisjoint(body):
            return body
        return {name: value for name, value in body.items() if name not in DECIDED}

    def _operation(self, name: str, body: Json) -> Operation:
        operation = self.runs_on.operations.get(name)
        if operation is None:
            raise BadRequest(
                f"model {self.name} does not support {name} (engine {self.runs_on.name}); "
                f"it supports: {', '.join(sorted(self.runs_on.operations))}",
                param="model",
                code="unsupported_endpoint",
            )
        asked = body.get("model")  # vLLM takes a body without it: so do we, where it is clear which model is meant
        if asked is not None and asked not in self.names:
            check_model_name(asked)
            raise unknown_model(asked, [name for name in self.names if self._permits(name)])
        return operation

    def _judge_fields(self, operation: str, body: Json, context: RequestContext, metrics: Metrics) -> None:
        ignored = ignored_fields(operation, body, self.runs_on.requests, strict=self._strict_fields)
        self._count_ignored(ignored, operation, context, metrics)

    def _count_ignored(self, ignored: Sequence[str], operation: str, context: RequestContext, metrics: Metrics) -> None:
        if ignored:
            context.ignored.extend(ignored)
            metrics.ignored(operation, len(ignored))
            current_log().fields["ignored_fields"] = header_of(context.ignored)

    @property
    def names(self) -> tuple[str, ...]:
        """What ``body["model"]`` may say: the served name first, then its aliases and the engine's adapters."""
        return (self.name, *self.aliases, *self.runs_on.adapters)

    def _permits(self, name: str) -> bool:
        """As :meth:`Models.permits`."""
        return may_use(name, self.name) if name in self.aliases else may_use(name)

    async def predict(self, payload: Any, headers: Mapping[str, str] | None = None) -> Json | InferResponse:
        """V1 (``payload``: the parsed JSON) and V2 (an InferRequest); see :mod:`aim_runtime.kserve_api`."""
        return await self.predict_as(self.name, payload, headers or {})

    async def predict_as(
        self, asked: str, payload: Any, headers: Mapping[str, str], *, counted_by: Metrics | None = None
    ) -> Json | InferResponse:
        """The same under another name of it: an alias, an adapter, or the name whose variant it is."""
        model = asked if asked in self.runs_on.adapters else self.name
        ask = partial(self._ask, model, headers, counted_by or self.metrics, self.refusal())
        with self.in_flight:  # whose last questions wait for their turn while the model is asked to leave
            if isinstance(payload, InferRequest):
                questions = read_v2(payload, self.runs_on.requests)
                return write_v2(payload, asked, await self._ask_all(questions, ask))
            return write_v1(await self._ask_all(read_v1(payload, self.runs_on.requests), ask))

    async def _ask_all(
        self, questions: list[Question], ask: Callable[[int, Question], Awaitable[Answer]]
    ) -> list[Answer]:
        """As many at once as the engine batches, twice, so that it never waits for us; the first that fails ends the
        others and is named by its index."""
        turn = asyncio.Semaphore(max(MIN_AT_ONCE, 2 * self.runs_on.stats().slots_total))

        async def in_turn(index: int, question: Question) -> Answer:
            async with turn:
                return await ask(index, question)

        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(in_turn(index, item)) for index, item in enumerate(questions)]
        except BaseExceptionGroup as failures:
            raise failures.exceptions[0] from None
        return [task.result() for task in tasks]

    async def _ask(
        self,
        model: str,
        headers: Mapping[str, str],
        metrics: Metrics,
        refusal: Unavailable | None,
        index: int,
        question: Question,
    ) -> Answer:
        context = RequestContext(f"{current_log().unique_id}-{index}", headers, timeout_s=question.timeout_s)
        body = {"model": model, **question.body}
        try:
            self._ignore(question, context, metrics)
            answer = await self._call(question.operation, body, context, metrics, refusal)
        except ServingError as error:
            named = copy(error)  # an engine that dies gives all its requests the same one
            named.message = f"{question.where}: {error.message}"
            raise named from error
        assert isinstance(answer, dict)  # stream is not among the parameters
        return Answer.of(question, answer)

    def _ignore(self, question: Question, context: RequestContext, metrics: Metrics) -> None:
        for name in question.ignored if self._strict_fields else ():
            raise BadRequest(f"parameters.{name}: {DECIDED[name]}; leave it out", param=name, code="unknown_field")
        self._count_ignored(question.ignored, question.operation, context, metrics)
        if context.ignored:
            current_log().headers["x-ignored-fields"] = header_of(context.ignored)

    async def _metered(self, chunks: Stream, meter: Meter) -> Stream:
        """``chunks`` timed and counted; closes them; every failure but the client's leaving is a ServingError."""
        status = 200
        with self.in_flight:
            try:
                async with aclosing(chunks):
                    async for chunk in chunks:
                        meter.tick(chunk)
                        yield chunk
            except BaseException as error:
                status = _status_of(error)
                if status != 500 or isinstance(error, ServingError):
                    raise
                logger.exception("stream failed")  # process edge: the answer has begun, an error event is all we have
                raise internal_error() from error
            finally:
                self.last_used_s = time.monotonic()
                meter.end(status)

    def get_input_types(self) -> list[Json]:
        return INPUTS

    def get_output_types(self) -> list[Json]:
        return OUTPUTS


class NamedModel(Model):  # type: ignore[misc]
    """One more name of a served model on KServe's routes: an alias or an adapter."""

    def __init__(self, name: str, model: RuntimeModel) -> None:
        super().__init__(name)
        self._model = model

    async def healthy(self) -> bool:
        return self._model.refusal() is None

    def alive(self) -> bool:
        return self._model.alive()

    def load(self) -> bool:
        return self._model.load()

    async def predict(self, payload: Any, headers: Mapping[str, str] | None = None) -> Json | InferResponse:
        return await self._model.predict_as(self.name, payload, headers or {})

    def get_input_types(self) -> list[Json]:
        return INPUTS

    def get_output_types(self) -> list[Json]:
        return OUTPUTS


def unknown_model(asked: str, served: Sequence[str]) -> NotFound:
    names = tellable(served)
    rest = f"; this server has: {names}" if names else ""
    return NotFound(f"model {asked!r} does not exist{rest}", param="model", code="model_not_found")


def check_model_name(asked: object) -> None:
    """Raises BadRequest where ``body["model"]`` is no text."""
    if not isinstance(asked, str):
        raise BadRequest(f"model: must be a string (got {asked!r})", param="model")


def _may_come_back(engine: Engine) -> bool:
    """Whether an engine that is down needs no new process of ours: its own is being started again, or is elsewhere."""
    return engine.stats().state in ("restarting", "unreachable")


def _status_of(error: BaseException) -> int:
    if isinstance(error, ServingError):
        return error.status
    if is_shutdown(error):
        return ShutDown.status
    return 499 if isinstance(error, (asyncio.CancelledError, GeneratorExit)) else 500


async def _in_time(answer: Awaitable[Json | Stream], timeout_s: float | None) -> Json | Stream:
    if timeout_s is None:
        return await answer
    try:
        async with asyncio.timeout(timeout_s) as deadline:
            return await answer
    except TimeoutError:
        if not deadline.expired():
            raise
    raise ServingError(
        f"timeout: no answer within {timeout_s:g} s, the request's own limit", status=504, code="timeout"
    )
