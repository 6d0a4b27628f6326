"""KServe's gRPC service (Open Inference Protocol) with truthful ports and status codes."""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

import grpc
from google.protobuf.message import DecodeError
from google.protobuf.unknown_fields import UnknownFieldSet
from grpc import aio

from aim_kserve.access import access_line, open_log, write_line
from aim_kserve.client_address import Proxies, grpc_peer
from aim_kserve.errors import BadRequest, StartupError
from aim_kserve.grpc_parameters import decode, encode
from aim_kserve.identity.guard import check_call
from aim_kserve.kserve import (
    DataPlane,
    InferenceServicer,
    InferRequest,
    ModelRepositoryExtension,
    grpc_headers,
    pb_grpc,
)
from aim_kserve.rest import as_serving_error
from aim_kserve.settings import ServerSettings
from aim_kserve.v2_body import check_parts

if TYPE_CHECKING:
    from aim_kserve.identity.verify import Verifier

logger = logging.getLogger("aim.server")

#: grpc_service.proto of Triton: ``RepositoryModelLoadRequest.model_name``; field 1 is ``repository_name``.
_TRITONS_NAME = 2


class GrpcServer:
    """Start, stop; nothing else. ``start`` raises StartupError when the port is taken."""

    def __init__(
        self,
        settings: ServerSettings,
        dataplane: DataPlane,
        repository: ModelRepositoryExtension,
        verifier: Verifier | None = None,
    ) -> None:
        self._settings, self._verifier = settings, verifier
        self._servicer = _Servicer(dataplane, repository)
        self._server: Any = None

    async def start(self) -> str:
        """The address it listens on."""
        address = f"{self._settings.host}:{self._settings.grpc_port}"
        self._server = aio.server(
            interceptors=(
                _Edge(
                    self._verifier,
                    Proxies(self._settings.trusted_proxies),
                    access_log=self._settings.access_log,
                ),
            ),
            options=[
                ("grpc.max_send_message_length", self._settings.grpc_max_send_message_length),
                ("grpc.max_receive_message_length", self._settings.grpc_max_receive_message_length),
                ("grpc.so_reuseport", 0),  # else a second process on the same port goes unnoticed
            ],
        )
        pb_grpc.add_GRPCInferenceServiceServicer_to_server(self._servicer, self._server)
        try:
            port = self._server.add_insecure_port(address)
        except RuntimeError as error:
            raise StartupError(f"cannot listen on {address} (gRPC): choose another --grpc_port") from error
        await self._server.start()
        return f"{self._settings.host}:{port}"

    async def stop(self, grace_s: float) -> None:
        """Refuse new calls, let those in flight finish for at most ``grace_s`` seconds."""
        if self._server is not None:
            await self._server.stop(grace=grace_s)


class _Servicer(InferenceServicer):  # type: ignore[misc]  # KServe ships no types
    """KServe's, but for parameters: it drops in silence every one whose kind of value its protocol file lacks."""

    async def ModelInfer(self, request: Any, context: Any) -> Any:
        parts = (request.inputs, request.outputs, request.parameters)
        check_parts(sum(map(len, parts)))
        self.validate_grpc_request(request)
        inference = InferRequest.from_grpc(request)
        inference.parameters = decode(request.parameters, "parameters")
        asked = [*request.inputs, *request.outputs]
        for message, tensor in zip(asked, [*inference.inputs, *(inference.request_outputs or ())], strict=True):
            tensor.parameters = decode(message.parameters, f"{message.name}.parameters") or None
        answer, _ = await self._data_plane.infer(
            request=inference, headers=grpc_headers(context), model_name=request.model_name
        )
        for part in (answer, *answer.outputs):
            part.parameters = encode(part.parameters or {}) or None
        return answer.to_grpc()

    async def RepositoryModelLoad(self, request: Any, context: Any) -> Any:
        _name_the_model(request)
        return await super().RepositoryModelLoad(request, context)

    async def RepositoryModelUnload(self, request: Any, context: Any) -> Any:
        _name_the_model(request)
        return await super().RepositoryModelUnload(request, context)


def _name_the_model(request: Any) -> None:
    """Triton's protocol file has the model's name in field 2, KServe's in field 1: clients of both are understood."""
    for unknown in UnknownFieldSet(request):
        if unknown.field_number == _TRITONS_NAME and isinstance(unknown.data, bytes):
            request.model_name = unknown.data.decode(errors="replace")


class _Edge(aio.ServerInterceptor):  # type: ignore[misc]  # grpc ships no types
    """Every exception becomes the status code that says what it is (KServe's own interceptor crashes on some), every
    call an access line; calls that succeed and only ask whether we are well are not logged."""

    def __init__(self, verifier: Verifier | None, proxies: Proxies, *, access_log: bool) -> None:
        self._verifier, self._proxies, self._access_log = verifier, proxies, access_log

    async def intercept_service(self, continuation: Callable[[Any], Awaitable[Any]], details: Any) -> Any:
        handler = await continuation(details)
        if handler is None or handler.unary_unary is None:
            return handler if self._verifier is None else self._closed(details.method)
        return grpc.unary_unary_rpc_method_handler(
            self._guarded(_reading(handler, details.method), details.method),
            response_serializer=handler.response_serializer,
        )

    def _closed(self, method: str) -> Any:
        """What is not served is no more to be found out than what is, by those who may not ask."""

        async def refuse(_: Any, __: Any) -> Any:
            raise NotImplementedError(f"no such method: {method}")

        return grpc.unary_unary_rpc_method_handler(self._guarded(refuse, method))

    def _guarded(self, call: Callable[[Any, Any], Awaitable[Any]], method: str) -> Callable[[Any, Any], Awaitable[Any]]:
        async def guarded(request: Any, context: Any) -> Any:
            metadata = context.invocation_metadata() or ()
            headers = [(key.encode(), value.encode()) for key, value in metadata if isinstance(value, str)]
            log = open_log(headers)
            log.client = self._proxies.client(grpc_peer(context.peer()), headers)
            started, code = time.perf_counter(), "CANCELLED"
            try:
                if self._verifier is not None:
                    await check_call(self._verifier, method, metadata, log)
                answer = await call(request, context)
                context.set_trailing_metadata(tuple(log.headers.items()))
                code = "OK"
                return answer
            except aio.AbortError:
                code = context.code().name
                raise
            except Exception as error:  # process edge: gRPC would answer UNKNOWN with the exception's text
                refusal = as_serving_error(error)
                code = refusal.grpc_code
                if code == "INTERNAL":
                    logger.exception("%s failed", method)
                trailing = tuple({**log.headers, **refusal.headers()}.items())
                return await context.abort(grpc.StatusCode[code], refusal.message, trailing)
            finally:
                if self._access_log and not (code == "OK" and method.endswith(_PROBES)):
                    write_line(access_line(log, started, client=log.client, method="GRPC", path=method, status=code))

        return guarded


def _reading(handler: Any, method: str) -> Callable[[Any, Any], Awaitable[Any]]:
    """The method, given its message as it came: gRPC would read it before anybody is asked who sends it, and tell of
    what is no message with a trace."""

    async def read_and_call(raw: bytes, context: Any) -> Any:
        try:
            request = handler.request_deserializer(raw)
        except DecodeError:
            raise BadRequest(f"{method}: this is no message of that method: is your protocol file another?") from None
        return await handler.unary_unary(request, context)

    return read_and_call


_PROBES = ("/ServerLive", "/ServerReady", "/ModelReady")
