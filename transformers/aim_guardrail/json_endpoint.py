"""A route of our own whose answers are JSON, errors too."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.types import Receive, Scope, Send

from aim_kserve.access import log_of
from aim_kserve.errors import ServingError, internal_error
from aim_kserve.http import ClientDisconnected, or_shutdown, send_json

logger = logging.getLogger("aim.server")


class JsonEndpoint:
    """One route, as plain ASGI: whatever goes wrong is answered in JSON.

    Args:
        serve: gives what is answered. Raises ServingError: what is answered instead.
    """

    def __init__(self, serve: Callable[[Scope, Receive], Awaitable[Any]]) -> None:
        self._serve = serve

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            with or_shutdown():
                answer = await self._serve(scope, receive)
        except ClientDisconnected:
            log_of(scope).client_left = True
        except ServingError as error:
            await send_json(send, error.body(), status=error.status, headers=error.headers())
        except Exception:  # process edge: uvicorn would answer in plain text and drop the connection
            logger.exception("%s %s failed", scope["method"], scope["path"])
            internal = internal_error()
            await send_json(send, internal.body(), status=internal.status)
        else:
            await send_json(send, answer)
