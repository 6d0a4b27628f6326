"""A stream's way from whoever reads its chunks off a socket straight to the client's connection.

By the ordinary way each token wakes the task that sends the stream, which goes down through all that stands between
(the server's middlewares, meters, replicas) and up again. Here the same callback that has read a chunk writes it. It is
open only while that task waits for the next chunk, with nothing before it: so the order stays, and whatever the task
sees (the first chunk, errors, the end, a client that leaves or reads slowly) it sees as ever.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

from aim_kserve.sse import sse

#: Takes a piece of a body that has begun; False: not now, and nothing has been taken.
Write = Callable[[bytes], bool]

#: In an ASGI scope's ``extensions``: ``{"write": the response's Write, "leaving": its client's Leaving}``.
EXTENSION = "aim.client"


class Leaving:
    """One client's, told by the callback that learns of it: no task has to wait for it.

    has_left: before it was answered.
    tell: is called when it leaves; None: nobody wants to know.
    """

    __slots__ = ("has_left", "tell")

    def __init__(self) -> None:
        self.has_left = False
        self.tell: Callable[[], None] | None = None

    def left(self) -> None:
        """It has."""
        self.has_left = True
        if self.tell is not None:
            self.tell()


def _untapped(_: bytes) -> None:
    """Nobody looks at the chunks."""


class Shortcut:
    """One stream's.

    tap: told of every chunk that goes this way.
    write: of the response; None: it has none.
    is_open: set by whoever sends the stream, once the ordinary way has brought its first chunk.
    """

    __slots__ = ("is_open", "tap", "write")

    def __init__(self) -> None:
        self.tap: Callable[[bytes], None] = _untapped
        self.write: Write | None = None
        self.is_open = False

    def offer(self, chunks: Collection[bytes]) -> bool:
        """Whether they have been sent. Only for who knows that the stream's sender waits for the next chunk."""
        if not self.is_open or self.write is None or not self.write(b"".join(map(sse, chunks))):
            return False
        for chunk in chunks:
            self.tap(chunk)
        return True
