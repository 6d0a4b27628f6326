"""A streamed answer through the inline stage alone: what each piece that comes lets out goes out with it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator

from aim_guardrail.pipeline import INLINE_CHARS
from aim_guardrail.streams.events import StreamScreen
from aim_kserve.errors import UpstreamFailed
from aim_kserve.sse import Event, EventReader

#: Of one read of a stream, before others have their turn.
MOST_INLINE_BYTES = 2 * INLINE_CHARS


async def shown_inline(
    screen: StreamScreen, chunks: AsyncIterator[bytes], reader: EventReader
) -> AsyncGenerator[bytes, None]:
    """What may be sent, its end included, of what comes in ``chunks``.

    Raises:
        ServingError: the stream cannot go on; see :meth:`StreamScreen.failure`.
        EventTooLarge: one of its events.
    """
    async for chunk in chunks:
        async for shown in _shown_of(screen, reader.feed(chunk)):
            yield shown
        if screen.ended:
            return
    async for shown in _shown_of(screen, reader.rest()):
        yield shown
    if not screen.ended:
        raise broken_off()


async def _shown_of(screen: StreamScreen, events: list[Event]) -> AsyncIterator[bytes]:
    """Large events are checked in a thread; of small ones, not more at once than others can wait for."""
    out, inline = list[bytes](), 0
    try:
        for event in events:
            inline += len(event.raw)
            large = screen.is_large(event)
            out.append(await asyncio.to_thread(screen.feed, event) if large else screen.feed(event))
            if screen.ended:
                break
            if inline > MOST_INLINE_BYTES:
                inline = 0
                await asyncio.sleep(0)
    except Exception:
        if shown := b"".join(out):
            yield shown  # what came before it
        raise
    if shown := b"".join(out):
        yield shown


def broken_off() -> UpstreamFailed:
    """A stream has ended without its end."""
    return UpstreamFailed("the predictor broke off in the middle of its answer", code="predictor_broken")
