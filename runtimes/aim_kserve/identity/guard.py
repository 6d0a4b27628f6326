"""The door of a process, before any body is read: each request's credential is for its route, or it goes no further."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from starlette.types import ASGIApp, Receive, Scope, Send

from aim_kserve.access import RequestLog, log_of
from aim_kserve.errors import ServingError
from aim_kserve.http import send_json, speaks_openai
from aim_kserve.identity.caller import NOBODY, set_caller
from aim_kserve.identity.routes import OPEN, needed, needed_by_grpc

if TYPE_CHECKING:
    from aim_kserve.identity.verify import Verifier


class Guard:
    """ASGI middleware. A request that passes has its ``current_caller()``; of one on an open route nobody is asked."""

    def __init__(self, app: ASGIApp, verifier: Verifier) -> None:
        self.app = app
        self._verifier = verifier

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            raise RuntimeError(f"{scope['type']} is not served: nobody asks there who it is")
        scopes = needed(scope["method"], scope["path"])
        try:
            if scopes:
                headers, log, verifier = scope["headers"], log_of(scope), self._verifier
                set_caller(verifier.recall(headers, scopes, log) or await verifier.admit(headers, scopes, log))
            else:
                set_caller(NOBODY)
        except ServingError as error:
            body: dict[str, Any] = error.body() if speaks_openai(scope["path"]) else {"error": error.message}
            await send_json(send, body, status=error.status, headers=error.headers())
            return
        await self.app(scope, receive, send)


async def check_call(verifier: Verifier, method: str, metadata: Iterable[tuple[str, Any]], log: RequestLog) -> None:
    """The same of a gRPC call, whose credential is in its metadata.

    Raises:
        Unauthorized, Forbidden: as over HTTP.
    """
    scopes = needed_by_grpc(method)
    if scopes == OPEN:
        set_caller(NOBODY)
        return
    headers = [(key.lower().encode(), value.encode()) for key, value in metadata if isinstance(value, str)]
    set_caller(verifier.recall(headers, scopes, log) or await verifier.admit(headers, scopes, log))
