"""KServe's gRPC service (Open Inference Protocol) with truthful ports and status codes."""

from __future__ import annotations

import logging
import os
from collections.abc import Awaitable, Callable
from typing import Any

os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # its C core prints to stderr what we report in one line

import grpc
from grpc import aio

from aim_kserve.errors import StartupError
from aim_kserve.kserve import DataPlane, InferenceServicer, ModelRepositoryExtension, pb_grpc
from aim_kserve.rest import as_serving_error
from aim_kserve.settings import ServerSettings

logger = logging.getLogger("aim.server")


class GrpcServer:
    """Start, stop; nothing else. ``start`` raises StartupError when the port is taken."""

    def __init__(self, settings: ServerSettings, dataplane: DataPlane, repository: ModelRepositoryExtension) -> None:
        self._settings = settings
        self._servicer = InferenceServicer(dataplane, repository)
        self._server: Any = None

    async def start(self) -> None:
        address = f"{self._settings.host}:{self._settings.grpc_port}"
        self._server = aio.server(
            interceptors=(_Errors(),),
            options=[
                ("grpc.max_send_message_length", self._settings.grpc_max_send_message_length),
                ("grpc.max_receive_message_length", self._settings.grpc_max_receive_message_length),
                ("grpc.so_reuseport", 0),  # else a second process on the same port goes unnoticed
            ],
        )
        pb_grpc.add_GRPCInferenceServiceServicer_to_server(self._servicer, self._server)
        try:
            self._server.add_insecure_port(address)
        except RuntimeError as error:
            raise StartupError(f"cannot listen on {address} (gRPC): choose another --grpc_port") from error
        await self._server.start()

    async def stop(self, grace_s: float) -> None:
        """Refuse new calls, let those in flight finish for at most ``grace_s`` seconds."""
        if self._server is not None:
            await self._server.stop(grace=grace_s)


class _Errors(aio.ServerInterceptor):  # type: ignore[misc]  # grpc ships no types
    """Every exception becomes the status code that says what it is; KServe's own interceptor crashes on some."""

    async def intercept_service(self, continuation: Callable[[Any], Awaitable[Any]], details: Any) -> Any:
        handler = await continuation(details)
        if handler is None or handler.unary_unary is None:
            return handler
        return grpc.unary_unary_rpc_method_handler(
            _guarded(handler.unary_unary, details.method),
            request_deserializer=handler.request_deserializer,
            response_serializer=handler.response_serializer,
        )


def _guarded(call: Callable[[Any, Any], Awaitable[Any]], method: str) -> Callable[[Any, Any], Awaitable[Any]]:
    async def guarded(request: Any, context: Any) -> Any:
        try:
            return await call(request, context)
        except aio.AbortError:
            raise
        except Exception as error:  # process edge: gRPC would answer UNKNOWN with the exception's text
            refusal = as_serving_error(error)
            if refusal.grpc_code == "INTERNAL":
                logger.exception("%s failed", method)
            return await context.abort(grpc.StatusCode[refusal.grpc_code], refusal.message)

    return guarded
