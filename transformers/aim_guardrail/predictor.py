"""The predictor: over HTTP for everything, over gRPC for V2 inference where it has been given an address for that."""

from __future__ import annotations

import asyncio
import struct
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import orjson

from aim_guardrail.credentials import Credentials
from aim_guardrail.protocols.v2 import from_rest, to_rest
from aim_guardrail.settings import GuardrailSettings
from aim_guardrail.upstream import Answer, PredictorSaid, Upstream, sent_on
from aim_kserve.access import current_log
from aim_kserve.errors import NotFound, ServingError, UpstreamFailed
from aim_kserve.http import JSON_LENGTH
from aim_kserve.kserve import InferenceError, InferRequest, InferResponse

if TYPE_CHECKING:
    from aim_guardrail.upstream_grpc import GrpcUpstream

#: The longest a readiness question may take: kubelet's own probes give up after a second by default.
_HEALTH_TIMEOUT_S = 1.0


class Predictor:
    """One predictor by its protocols, or (``upstream`` None) none. ``start`` before anything else.

    Attributes:
        only_grpc: it cannot be asked by HTTP.
        knows_callers: it gets the client's credential, and decides itself which models that is for.
    """

    def __init__(
        self, settings: GuardrailSettings, upstream: Upstream | None, credentials: Credentials | None = None
    ) -> None:
        self._settings = settings
        self.only_grpc = settings.speaks == "grpc-v2"
        self.knows_callers = settings.predictor_credentials == "forward"
        self._upstream = upstream
        self._credentials = credentials or Credentials()
        self._grpc: GrpcUpstream | None = None
        self._health = (float("-inf"), False)
        self._asking = asyncio.Lock()

    async def start(self) -> None:
        address = self._settings.predictor_grpc_host or (self._settings.predictor_host if self.only_grpc else None)
        if address is not None:
            from aim_guardrail.upstream_grpc import GrpcUpstream  # grpc's C core: only where it is needed

            self._grpc = GrpcUpstream(address, self._settings, self._credentials)

    async def close(self) -> None:
        if self._upstream is not None:
            self._upstream.close()
        if self._grpc is not None:
            await self._grpc.close()

    @property
    def http(self) -> Upstream:
        """The predictor over HTTP.

        Raises:
            ServingError: it speaks gRPC only (501).
            NotFound: there is none.
        """
        if self._upstream is None:
            raise NotFound("this guardrail has no predictor (--predictor_host): it serves /filter alone")
        if self.only_grpc:
            raise ServingError("the predictor speaks gRPC only (--predictor_protocol grpc-v2): use V2", status=501)
        return self._upstream

    # --- readiness --------------------------------------------------------------------------------------------------

    async def healthy(self) -> bool:
        """Whether the predictor's model is ready, asked at most once per ``predictor_health_cache_seconds``."""
        async with self._asking:
            asked_at, known = self._health
            if time.monotonic() - asked_at >= self._settings.predictor_health_cache_seconds:
                known = await self._ask()
                self._health = (time.monotonic(), known)
            return known

    async def _ask(self) -> bool:
        name = self._settings.model_name
        try:
            async with asyncio.timeout(_HEALTH_TIMEOUT_S):
                if self.only_grpc and self._grpc is not None:
                    return await self._grpc.is_ready(name)
                # A runtime of ours may be closed but for V2's readiness.
                by_v1 = self._settings.speaks == "v1" and not self.knows_callers
                path = f"/v1/models/{name}" if by_v1 else f"/v2/models/{name}/ready"
                async with await self.http.send("GET", path, self._credentials.own(), b"") as answer:
                    return answer.status == 200 and _says_ready(await answer.read())
        except (TimeoutError, ServingError):
            return False

    # --- V2 inference -----------------------------------------------------------------------------------------------

    async def infer(self, request: InferRequest, headers: Mapping[str, str]) -> InferResponse:
        """Over gRPC where there is an address for it, else as V2 REST.

        Raises:
            PredictorSaid: the predictor refused.
            ServingError: it could not be asked.
        """
        sent = [(key.lower().encode(), str(value).encode("latin-1", "replace")) for key, value in headers.items()]
        log = current_log()
        own = {"traceparent": log.traceparent, "x-request-id": log.request_id}
        if self._grpc is not None:
            return await self._grpc.infer(request, sent_on(sent, own))
        body, json_length = to_rest(request)
        own |= {"content-type": "application/json", "accept-encoding": "identity"}
        if json_length is not None:
            own |= {"content-type": "application/octet-stream", JSON_LENGTH.decode(): str(json_length)}
        target = f"/v2/models/{request.model_name}/infer"
        async with await self.http.send("POST", target, sent_on(_without_grpcs(sent), own), body) as answer:
            log.fields["upstream_status"] = answer.status
            return await self._read(answer, request)

    async def _read(self, answer: Answer, request: InferRequest) -> InferResponse:
        body = await answer.read()
        if answer.status != 200:
            raise PredictorSaid(error_text(body), status=answer.status)
        try:
            return from_rest(body, answer.header(JSON_LENGTH), request)
        except (ValueError, LookupError, TypeError, AttributeError, struct.error, InferenceError) as error:
            raise UpstreamFailed(f"the predictor's answer is not a V2 inference response: {error!r}") from error

    async def tensors(self, which: str) -> list[dict[str, Any]]:
        """``inputs`` or ``outputs`` of the predictor's model metadata; none where it does not tell."""
        name = self._settings.model_name
        try:
            if self._grpc is not None:
                return await self._grpc.tensors(name, which)
            async with await self.http.send("GET", f"/v2/models/{name}", self._credentials.own(), b"") as answer:
                tensors = orjson.loads(await answer.read()).get(which) if answer.status == 200 else None
        except (ServingError, orjson.JSONDecodeError, AttributeError):
            return []
        return tensors if isinstance(tensors, list) else []


def _says_ready(body: bytes) -> bool:
    """V1 answers ``{"name": …, "ready": bool}`` (or ``"True"``), V2 the status alone."""
    try:
        said = orjson.loads(body)
    except orjson.JSONDecodeError:
        return True
    return not isinstance(said, dict) or str(said.get("ready", True)).lower() == "true"


def _without_grpcs(headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """Metadata that belongs to the gRPC call itself stays there."""
    return [item for item in headers if not item[0].startswith((b":", b"grpc-")) and item[0] != b"content-type"]


def error_text(body: bytes) -> str:
    """What a predictor says in an error's body, whichever of the usual shapes it has."""
    try:
        said = orjson.loads(body)
        error = said.get("error", said.get("detail", said))
        return str(error.get("message", error)) if isinstance(error, dict) else str(error)
    except (orjson.JSONDecodeError, AttributeError):
        return body.decode("utf-8", "replace")[:2000] or "the predictor refused without a reason"
