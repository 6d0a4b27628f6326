"""Servers within a test's process that end cleanly, whoever is connecting meanwhile."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from aiohttp import web
from aiohttp.typedefs import Handler

#: A handler that has not ended by then is cancelled; aiohttp takes 0 for ever.
_SHUTDOWN_S = 0.1
#: Turns of the event loop from an accepted connection to one that its server knows of, and some to spare.
_TURNS = 5


@asynccontextmanager
async def answering(handler: Handler, port: int, tls: ssl.SSLContext | None = None) -> AsyncIterator[None]:
    """``async with``: every request to 127.0.0.1:`port` goes to `handler`, cancelled when its client leaves."""
    app = web.Application(client_max_size=2**26)
    app.router.add_route("*", "/{path:.*}", handler)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=_SHUTDOWN_S, handler_cancellation=True)
    await runner.setup()
    listening = socket.create_server(("127.0.0.1", port), backlog=128)
    await web.SockSite(runner, listening, ssl_context=tls).start()
    try:
        yield
    finally:
        await stop_accepting(listening.fileno())
        await runner.cleanup()


async def stop_accepting(*listening: int) -> None:
    """To be awaited before a server is closed: file descriptors that it listens on are not listened on any more, and
    what it has accepted is a connection that it knows of.

    Python 3.11 loses, unclosed, what it has just accepted when its server closes: a ResourceWarning whenever that is
    collected, in whatever test it is then (https://github.com/python/cpython/issues/109564).
    """
    for descriptor in listening:
        asyncio.get_running_loop().remove_reader(descriptor)
    for _ in range(_TURNS):
        await asyncio.sleep(0)
