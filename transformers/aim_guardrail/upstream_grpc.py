"""The predictor's V2 protocol over gRPC."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import grpc
from grpc import aio

from aim_guardrail.credentials import Credentials
from aim_guardrail.settings import GuardrailSettings
from aim_guardrail.upstream import PredictorSaid
from aim_kserve.errors import GRPC_CODE_BY_STATUS, BadRequest, UpstreamFailed
from aim_kserve.grpc_parameters import decode, encode
from aim_kserve.kserve import InferRequest, InferResponse, pb, pb_grpc

_STATUS_BY_CODE = {code: status for status, code in reversed(GRPC_CODE_BY_STATUS.items())}
#: Metadata that gRPC writes itself, or that describes an HTTP hop.
_RESERVED = (b":", b"grpc-", b"content-type", b"user-agent", b"accept-encoding", b"inference-header-content-length")
#: gRPC refuses a call whose metadata has other bytes: https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md
_VALUE = re.compile(rb"[ -~]*")


class GrpcUpstream:
    """One channel to ``address`` (HOST:PORT); ``credentials``: whose the predictor gets."""

    def __init__(self, address: str, settings: GuardrailSettings, credentials: Credentials) -> None:
        options = [
            ("grpc.max_send_message_length", settings.grpc_max_send_message_length),
            ("grpc.max_receive_message_length", settings.grpc_max_receive_message_length),
            # A predictor that comes back must be found within its first second, not after gRPC's two minutes.
            ("grpc.max_reconnect_backoff_ms", 1000),
        ]
        if settings.predictor_use_ssl:
            self._channel = aio.secure_channel(address, grpc.ssl_channel_credentials(), options)
        else:
            self._channel = aio.insecure_channel(address, options)
        self._stub = pb_grpc.GRPCInferenceServiceStub(self._channel)
        self._credentials = credentials
        self._timeout_s = settings.predictor_request_timeout_seconds

    async def close(self) -> None:
        await self._channel.close()

    async def infer(self, request: InferRequest, headers: list[tuple[bytes, bytes]]) -> InferResponse:
        """Raises PredictorSaid with the HTTP status that says the same as the gRPC code."""
        for asked in (request, *request.inputs, *(request.request_outputs or ())):
            asked.parameters = encode(asked.parameters or {}) or None
        message = await self._call(self._stub.ModelInfer, request.to_grpc(), headers)
        answer = InferResponse.from_grpc(message)
        try:
            for source, part in ((message, answer), *zip(message.outputs, answer.outputs, strict=True)):
                part.parameters = decode(source.parameters, "parameters")
        except BadRequest as error:
            raise UpstreamFailed(f"the predictor's answer: {error}") from error
        return answer

    async def is_ready(self, name: str) -> bool:
        """Raises PredictorSaid."""
        return bool(
            (await self._call(self._stub.ModelReady, pb.ModelReadyRequest(name=name), self._credentials.own())).ready
        )

    async def tensors(self, name: str, which: str) -> list[dict[str, Any]]:
        """Raises PredictorSaid."""
        asked = pb.ModelMetadataRequest(name=name)
        answer = await self._call(self._stub.ModelMetadata, asked, self._credentials.own())
        described = getattr(answer, which)
        return [{"name": item.name, "datatype": item.datatype, "shape": list(item.shape)} for item in described]

    async def _call(self, method: Any, message: Any, headers: Iterable[tuple[bytes, bytes]]) -> Any:
        metadata = [
            (key.decode(), value.decode())
            for key, value in self._credentials.sent(headers)
            if not key.startswith(_RESERVED) and _VALUE.fullmatch(value)
        ]
        try:
            return await method(message, metadata=metadata, timeout=self._timeout_s)
        except aio.AioRpcError as error:
            status = _STATUS_BY_CODE.get(error.code().name, 500)
            said = self._credentials.hidden().all((error.details() or error.code().name).encode())
            raise PredictorSaid(said.decode(errors="replace"), status=status) from error
