"""The transformer as a ``kserve.Model``: its life, its readiness, and V2 inference.

HTTP is the proxy's, headers, statuses and all; KServe hands us what came over gRPC as an InferRequest. (V2 REST, too,
where the predictor speaks gRPC only.)
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Protocol

from aim_guardrail.in_force import Generation, Policies
from aim_guardrail.metrics import Metrics
from aim_guardrail.pipeline import DetectorFailed
from aim_guardrail.pipeline.cache import VerdictCache
from aim_guardrail.pipeline.context import RequestContext
from aim_guardrail.pipeline.course import Witness
from aim_guardrail.pipeline.screening import Screening
from aim_guardrail.pipeline.timed import Timed
from aim_guardrail.policy import Direction
from aim_guardrail.predictor import Predictor
from aim_guardrail.protocols.v2 import check_tensors, said_in
from aim_guardrail.settings import GuardrailSettings
from aim_guardrail.slots.slot import Json
from aim_guardrail.traffic.gate import Traffic
from aim_guardrail.traffic.tensors import asked_of, text_of
from aim_guardrail.traffic.visit import Visit
from aim_guardrail.upstream import PredictorSaid
from aim_kserve.access import current_log
from aim_kserve.errors import BadRequest, ServingError, StartupError, Unavailable
from aim_kserve.identity.permission import check_use
from aim_kserve.kserve import InferRequest, InferResponse, Model, to_http_parameters


class Sidecar(Protocol):
    """What else serves the same checks, on a port of its own."""

    async def start(self) -> None:
        """Raises StartupError: it cannot be served."""

    async def stop(self, grace_s: float) -> None:
        """Requests in flight have so many seconds."""


class GuardrailModel(Model):  # type: ignore[misc]  # KServe ships no types
    """Ready once its guard is loaded (and, where asked for, while the predictor is).

    Args:
        predictor: where requests go.
        loading: done once the first policies are in force.
        cache: remembers verdicts; closed with the model.

    Attributes:
        ext_proc: Envoy's external processing, where that is served; begins once the model is ready.
        witnesses: who looks on, of each request; the first may refuse it.
    """

    def __init__(
        self,
        settings: GuardrailSettings,
        predictor: Predictor,
        metrics: Metrics,
        policies: Policies,
        loading: Awaitable[None],
        traffic: Traffic | None = None,
        cache: VerdictCache | None = None,
        witnesses: Sequence[Callable[[RequestContext], Witness | None]] = (),
    ) -> None:
        super().__init__(settings.model_name)
        self.predictor = predictor
        self.cache = cache
        self._metrics = metrics
        self._policies = policies
        self._witnesses = witnesses
        self._loading = loading
        self._traffic = traffic or Traffic(metrics, settings.model_name)
        self._asks_predictor = settings.enable_predictor_health_check
        self._draining = False
        self.ext_proc: Sidecar | None = None

    # --- life ---------------------------------------------------------------------------------------------------

    async def load_async(self) -> None:
        await self.predictor.start()
        await asyncio.to_thread(self._traffic.open)
        try:
            await self._loading
        except DetectorFailed as error:
            raise StartupError(f"the guardrail cannot be loaded: {error}") from error
        self.ready = True
        if self.ext_proc is not None:
            await self.ext_proc.start()

    def generation(self) -> Generation:
        """``with``: the policies of a request, which stay its own, whatever comes into force meanwhile; to be opened
        before the body is read.

        Raises:
            Unavailable: the policies are still loading, or the process is ending.
        """
        if self._draining:
            raise Unavailable("the guardrail is shutting down: ask again, another replica will answer")
        return self._policies.generation()

    def screening(self, generation: Generation, context: RequestContext) -> Screening:
        """``async with``: the checks of a request, or of a part of it, by the guard of the caller's policy, whoever
        looks on.

        Raises:
            Unavailable: one who must be able to does not.
        """
        witnesses = [found for witness in self._witnesses if (found := witness(context)) is not None]
        guard = generation.guard_for(context.tenant)
        return Screening(guard, self._metrics, context, self.cache, witnesses)

    async def healthy(self) -> bool:
        if not self.ready or self._draining:
            return False
        return not self._asks_predictor or await self.predictor.healthy()

    def load(self) -> bool:
        """KServe's way to load a model that is not ready, per request: ours loads once, in the background."""
        return bool(self.ready)

    def start_draining(self) -> None:
        self._draining = True

    async def drain(self, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        if self.ext_proc is not None:
            await self.ext_proc.stop(timeout_s)
        while self._metrics.in_use and time.monotonic() < deadline:  # noqa: ASYNC110  a counter without an event
            await asyncio.sleep(0.02)

    async def close(self) -> None:
        await self.predictor.close()
        await self._policies.close()
        await self._traffic.close()
        if self.cache is not None:
            await self.cache.close()

    # --- V2 inference ---------------------------------------------------------------------------------------------

    async def predict(self, payload: Any, headers: Mapping[str, str] | None = None) -> InferResponse:
        """Every BYTES element checked on its way to the predictor and back.

        Raises:
            Blocked: a text may not pass.
            Forbidden: whoever asks may not use the model.
            ServingError: what the predictor, or the way to it, said.
        """
        if not isinstance(payload, InferRequest):
            raise BadRequest("only V2 inference requests are served here")
        self._check_caller(payload.model_name)
        context = RequestContext.of(f"/v2/models/{payload.model_name}/infer", (), current_log().client)
        with self.generation() as generation:
            async with self.screening(generation, context) as screening:
                return await self._visit(screening, payload, headers or {})

    async def _visit(self, screening: Screening, asked: InferRequest, headers: Mapping[str, str]) -> InferResponse:
        with Visit(self._traffic, screening, current_log()) as visit:
            try:
                answer = await self._infer(screening, visit, asked, headers)
            except ServingError:
                visit.failed()
                raise
            current_log().headers.update(screening.headers())
            return answer

    async def _infer(
        self, screening: Screening, visit: Visit, asked: InferRequest, headers: Mapping[str, str]
    ) -> InferResponse:
        await visit.arrive()
        await visit.weigh_asked(*asked_of(asked))
        asked.parameters = to_http_parameters(asked.parameters or {})
        if screening.watch.hears:
            await screening.watch.hear(said_in(asked.inputs))
        await self._check(screening, "prompt", asked)
        visit.sent()
        await screening.turn()
        try:
            answer = await self.predictor.infer(asked, headers)
        except PredictorSaid as error:
            error.message = screening.text("answer", error.message)
            raise
        visit.has_answered(200)
        visit.meter.raw(text_of(answer.outputs))
        answer.parameters = to_http_parameters(answer.parameters or {})
        if screening.watch.hears:
            await screening.watch.hear(said_in(answer.outputs))
        await self._check(screening, "answer", answer)
        return answer

    def _check_caller(self, model: str) -> None:
        if not self.predictor.knows_callers:
            check_use(model)

    async def _check(self, screening: Screening, direction: Direction, tensors: InferRequest | InferResponse) -> None:
        if not screening.guard.watches(direction):
            return
        with Timed(screening, self._metrics, direction):
            await check_tensors(screening, direction, tensors)

    async def get_input_types(self) -> list[Json]:
        self._check_caller(self.name)
        return await self.predictor.tensors("inputs")

    async def get_output_types(self) -> list[Json]:
        self._check_caller(self.name)
        return await self.predictor.tensors("outputs")
