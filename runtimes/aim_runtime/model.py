"""The served model: one engine's life, and the one door through which every protocol reaches it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Mapping, Sequence
from contextlib import aclosing
from copy import copy
from typing import Any

from aim_kserve.access import current_log
from aim_kserve.errors import BadRequest, NotFound, ServingError, StartupError, Unavailable
from aim_kserve.http import ShutDown, is_shutdown
from aim_kserve.kserve import InferRequest, InferResponse, Model
from aim_runtime.engines.base import Engine, Json, ModelLoadError, Operation, RequestContext, Stream
from aim_runtime.fields import header_of, ignored_fields
from aim_runtime.kserve_api import INPUTS, OUTPUTS, Answer, Question, read_v1, read_v2, write_v1, write_v2
from aim_runtime.metrics import Meter, Metrics

logger = logging.getLogger("aim.server")

LOADING_RETRY_S = 5
MIN_AT_ONCE = 16  # questions of one request


class RuntimeModel(Model):  # type: ignore[misc]  # KServe ships no types
    """A ``kserve.Model`` (V1, V2 REST and gRPC) whose :meth:`call` also serves the OpenAI routes.

    Args:
        name: the name it is served under.
        engine: not loaded yet; ``load_async`` does.
        metrics: where requests are counted.
        strict_fields: refuse unknown fields of a body instead of ignoring them.
    """

    def __init__(self, name: str, engine: Engine, metrics: Metrics, *, strict_fields: bool = False) -> None:
        super().__init__(name)
        self._strict_fields = strict_fields
        self.runs_on = engine  # `engine` is KServe's: a flag
        self._metrics = metrics
        self.created = int(time.time())
        self._loaded = self._draining = False

    # --- life ---------------------------------------------------------------------------------------------------

    async def load_async(self) -> None:
        try:
            await self.runs_on.load()
        except ModelLoadError as error:
            raise StartupError(f"model {self.name}: {error}") from error
        self._loaded = self.ready = True

    async def healthy(self) -> bool:
        return self.refusal() is None

    def alive(self) -> bool:
        """False once a loaded engine has died or stands still: nothing but a new process helps."""
        return not self._loaded or self._draining or self.runs_on.healthy()

    def refusal(self) -> Unavailable | None:
        """Why no request can be served now; None if one can."""
        if self._draining:
            return Unavailable(f"model {self.name} is shutting down: ask again, another replica will answer")
        if not self._loaded:
            return Unavailable(f"model {self.name} is still loading: ask again", retry_after_s=LOADING_RETRY_S)
        if not self.runs_on.healthy():
            stalled_s = self.runs_on.stats().stalled_s
            moves = not stalled_s or stalled_s < 1
            what = "has died: its log has the cause" if moves else f"has not moved for {stalled_s:.0f} s"
            return Unavailable(
                f"the {self.runs_on.name} engine of model {self.name} {what}", retry_after_s=LOADING_RETRY_S
            )
        return None

    def load(self) -> bool:
        """KServe's way to load a model that is not ready, per request: ours loads once, in the background."""
        return self.refusal() is None

    def start_draining(self) -> None:
        self._draining = True

    async def drain(self, timeout_s: float) -> None:
        if self._loaded:
            await self.runs_on.drain(timeout_s)

    async def close(self) -> None:
        await self.runs_on.close()

    # --- requests -----------------------------------------------------------------------------------------------

    async def call(self, operation: str, body: Json, context: RequestContext) -> Json | Stream:
        """Run one operation of the engine, counted and timed; a Stream counts when it ends.

        Raises:
            Unavailable: loading, draining, dead or (from the engine) full.
            BadRequest: the model does not have this operation; ``body`` has a field that must not be ignored; or,
                from the engine, what is wrong with it.
            NotFound: ``body["model"]`` is another model.
            ServingError: 504, ``context.timeout_s`` is over.
        """
        meter = Meter(self._metrics, operation, context.usage)
        try:
            run = self._operation(operation, body)
            self._judge_fields(operation, body, context)
            answer = await _in_time(run(body, context), context.timeout_s)
        except BaseException as error:
            meter.end(_status_of(error))
            raise
        if isinstance(answer, dict):
            meter.end(200)
            return answer
        return _metered(answer, meter)

    def _operation(self, name: str, body: Json) -> Operation:
        refusal = self.refusal()
        if refusal is not None:
            raise refusal
        operation = self.runs_on.operations.get(name)
        if operation is None:
            raise BadRequest(
                f"model {self.name} does not support {name} (engine {self.runs_on.name}); "
                f"it supports: {', '.join(sorted(self.runs_on.operations))}",
                param="model",
                code="unsupported_endpoint",
            )
        asked = body.get("model")  # vLLM takes a body without it, and one process serves one model: so do we
        if asked is not None and asked not in self.names:
            if not isinstance(asked, str):
                raise BadRequest(f"model: must be a string (got {asked!r})", param="model")
            raise unknown_model(asked, self.names)
        return operation

    def _judge_fields(self, operation: str, body: Json, context: RequestContext) -> None:
        ignored = ignored_fields(operation, body, self.runs_on.requests, strict=self._strict_fields)
        if ignored:
            context.ignored.extend(ignored)
            self._metrics.ignored(operation, len(ignored))
            current_log().fields["ignored_fields"] = header_of(ignored)

    @property
    def names(self) -> tuple[str, ...]:
        """What ``body["model"]`` may say: the served name first, then the engine's adapters."""
        return (self.name, *self.runs_on.adapters)

    async def predict(self, payload: Any, headers: Mapping[str, str] | None = None) -> Json | InferResponse:
        """V1 (``payload``: the parsed JSON) and V2 (an InferRequest); see :mod:`aim_runtime.kserve_api`."""
        if isinstance(payload, InferRequest):
            questions = read_v2(payload, self.runs_on.requests)
            return write_v2(payload, self.name, await self._ask_all(questions, headers or {}))
        questions = read_v1(payload, self.runs_on.requests)
        return write_v1(await self._ask_all(questions, headers or {}))

    async def _ask_all(self, questions: list[Question], headers: Mapping[str, str]) -> list[Answer]:
        """As many at once as the engine batches, twice, so that it never waits for us; the first that fails ends the
        others and is named by its index."""
        turn = asyncio.Semaphore(max(MIN_AT_ONCE, 2 * self.runs_on.stats().slots_total))

        async def ask(index: int, question: Question) -> Answer:
            async with turn:
                return await self._ask(index, question, headers)

        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(ask(index, item)) for index, item in enumerate(questions)]
        except BaseExceptionGroup as failures:
            raise failures.exceptions[0] from None
        return [task.result() for task in tasks]

    async def _ask(self, index: int, question: Question, headers: Mapping[str, str]) -> Answer:
        context = RequestContext(
            f"{current_log().unique_id}-{index}", headers, question.priority, timeout_s=question.timeout_s
        )
        try:
            answer = await self.call(question.operation, {"model": self.name, **question.body}, context)
        except ServingError as error:
            named = copy(error)  # an engine that dies gives all its requests the same one
            named.message = f"{question.where}: {error.message}"
            raise named from error
        assert isinstance(answer, dict)  # stream is not among the parameters
        return Answer.of(question, answer)

    def get_input_types(self) -> list[Json]:
        return INPUTS

    def get_output_types(self) -> list[Json]:
        return OUTPUTS


def unknown_model(asked: str, served: Sequence[str]) -> NotFound:
    return NotFound(
        f"model {asked!r} does not exist; this server has: {', '.join(served)}", param="model", code="model_not_found"
    )


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


async def _metered(chunks: Stream, meter: Meter) -> Stream:
    """``chunks`` timed and counted; closes them; every failure but the client's leaving is a ServingError."""
    status = 200
    try:
        async with aclosing(chunks):
            async for chunk in chunks:
                meter.tick(chunk)
                yield chunk
    except BaseException as error:
        status = _status_of(error)
        if status != 500 or isinstance(error, ServingError):
            raise
        logger.exception("stream failed")  # process edge: the answer has begun, an error event is all we have left
        raise ServingError("internal error: the server's log has the cause, by x-request-id") from error
    finally:
        meter.end(status)
