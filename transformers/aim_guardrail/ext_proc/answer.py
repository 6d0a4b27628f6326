"""The answer as Envoy brings it, in the place of the one that our own connection to a predictor would give."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from types import TracebackType
from typing import Self

from aim_guardrail.upstream import brought_back
from aim_kserve.http import header


class EnvoyAnswer:
    """`upstream.Answer`, fed by whoever reads Envoy's messages.

    Attributes:
        status: HTTP status.
        headers: names in lower case, those of the connection and its framing left out.
        wanted: set while somebody waits for more of the body.
    """

    def __init__(self, headers: list[tuple[bytes, bytes]]) -> None:
        self.status = int(header(headers, b":status") or b"200")
        self.headers = brought_back([item for item in headers if not item[0].startswith(b":")])
        self.wanted = asyncio.Event()
        self._length = header(headers, b"content-length")
        self._pieces: asyncio.Queue[bytes | None] = asyncio.Queue()
        self._ended = False

    def feed(self, piece: bytes, *, end: bool) -> None:
        """The next of the body, and whether it is the last."""
        if piece:
            self._pieces.put_nowait(piece)
        if end and not self._ended:
            self._ended = True
            self._pieces.put_nowait(None)
        self.wanted.clear()

    def header(self, name: bytes) -> bytes:
        """The first header of that name, or nothing."""
        return header(self.headers, name)

    @property
    def length(self) -> int | None:
        """Bytes of the body, where its sender has said so."""
        return int(self._length) if self._length.isdigit() else None

    async def read(self) -> bytes:
        """The whole body."""
        return b"".join([piece async for piece in self.chunks()])

    async def chunks(self) -> AsyncIterator[bytes]:
        """The body as it arrives."""
        while True:
            if self._pieces.empty():
                self.wanted.set()
            piece = await self._pieces.get()
            if piece is None:
                return
            yield piece

    async def drain(self) -> None:
        """Envoy has the connection: nothing to do."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Envoy has the connection."""
