"""The gRPC service that Envoy's ``ext_proc`` filter calls: one stream for each of its requests."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from typing import Any

import grpc
from starlette.types import ASGIApp

from aim_guardrail.credentials import Credentials
from aim_guardrail.ext_proc.exchange import Exchange, OutOfOrder
from aim_guardrail.ext_proc.messages import METHOD, ProcessingRequest, ProcessingResponse
from aim_kserve.errors import StartupError

logger = logging.getLogger("aim.server")


class ExtProc:
    """Serves on a port. ``start`` before, ``stop`` in the end.

    Args:
        app: the proxy, in what the server wraps around it.
        credentials: what of a client's goes on.
    """

    def __init__(self, app: ASGIApp, credentials: Credentials, host: str, port: int, max_body_bytes: int) -> None:
        self._app, self._credentials = app, credentials
        self._address = f"{host}:{port}"
        self._most_bytes = max_body_bytes + 2**20
        self._server: Any = None  # made in its event loop

    async def start(self) -> None:
        """Raises StartupError: the port is taken."""
        most = ("grpc.max_receive_message_length", self._most_bytes), ("grpc.max_send_message_length", -1)
        self._server = grpc.aio.server(options=[*most, ("grpc.so_reuseport", 0)])
        service, _, method = METHOD.strip("/").partition("/")
        handler = grpc.stream_stream_rpc_method_handler(
            self._process, ProcessingRequest.FromString, ProcessingResponse.SerializeToString
        )
        self._server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(service, {method: handler})])
        try:
            self._server.add_insecure_port(self._address)
            await self._server.start()
        except RuntimeError as error:
            raise StartupError(f"--ext_proc_port: {self._address} cannot be bound ({error}): give another") from error
        logger.info("listening on %s (Envoy's external processing)", self._address)

    async def stop(self, grace_s: float) -> None:
        """Requests in flight have so many seconds."""
        if self._server is not None:
            await self._server.stop(grace_s)

    async def _process(self, requests: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:
        try:
            async for told in Exchange(self._app, self._credentials).answers(requests):
                yield told
        except OutOfOrder as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"not what Envoy's ext_proc says: {error}")
