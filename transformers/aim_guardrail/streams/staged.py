"""A streamed answer through both layers: the inline stage as its events come, the stages behind it side by side."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator

from aim_guardrail.metrics import Metrics
from aim_guardrail.pipeline.blocked import Blocked
from aim_guardrail.pipeline.screening import Screening
from aim_guardrail.streams.behind import Behind
from aim_guardrail.streams.events import StreamScreen
from aim_guardrail.streams.frame import Frame, Said, joined
from aim_guardrail.streams.inline import MOST_INLINE_BYTES, broken_off, shown_inline
from aim_kserve.sse import Event, EventReader


class Staged:
    """One streamed answer, by the policy's `stream.mode`, but `off`.

    Args:
        screen: the inline stage.
    """

    def __init__(self, screening: Screening, metrics: Metrics, screen: StreamScreen) -> None:
        self._screen = screen
        self._observes = screen.mode == "observe"
        self._behind = Behind(screening, metrics, screen.mode)

    async def shown(self, chunks: AsyncIterator[bytes], reader: EventReader) -> AsyncGenerator[bytes, None]:
        """What may be sent, its end included, of what comes in ``chunks``.

        Raises:
            ServingError: the stream cannot go on; see :meth:`StreamScreen.failure`.
            EventTooLarge: one of its events.
        """
        reading = asyncio.ensure_future(self._read(chunks, reader))
        reading.add_done_callback(lambda task: self._behind.end(None if task.cancelled() else task.exception()))
        try:
            async for shown in self._behind.shown():
                yield shown
        except Blocked as error:
            if self._observes and self._screen.ended:
                return  # all of it is out
            self._withdraw()
            yield joined(self._screen.blocked(error, last_words=False))  # which says nothing to be restored
        except BaseException:
            self._withdraw()
            raise
        finally:
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)
            await self._behind.close()

    def _withdraw(self) -> None:
        self._screen.withdraw(None if self._observes else self._behind.unsent)

    async def _read(self, chunks: AsyncIterator[bytes], reader: EventReader) -> None:
        """Take events in until the stream ends."""
        async for chunk in chunks:
            await self._take(reader.feed(chunk))
            if self._screen.ended:
                return
        await self._take(reader.rest())
        if not self._screen.ended:
            raise broken_off()

    async def _take(self, events: list[Event]) -> None:
        inline = 0
        for event in events:
            await self._behind.room()
            inline += len(event.raw)
            if self._observes:
                self._behind.put(Frame({}, event.raw), Said())
            large = self._screen.is_large(event)
            frames = await asyncio.to_thread(self._screen.frames, event) if large else self._screen.frames(event)
            cut = self._screen.ended and not self._screen.complete
            for frame in frames:
                self._behind.put(frame, self._screen.said(frame), is_sent=self._observes and not cut)
            if self._screen.ended:
                return
            if inline > MOST_INLINE_BYTES:
                inline = 0
                await asyncio.sleep(0)


def shown(
    screening: Screening, metrics: Metrics, screen: StreamScreen, chunks: AsyncIterator[bytes], reader: EventReader
) -> AsyncGenerator[bytes, None]:
    """What may be sent of a streamed answer, by whatever has a say in when it goes out. Raises as `Staged.shown`."""
    if screening.guard.stages.watches("answer") or screen.mode != "holdback":
        return Staged(screening, metrics, screen).shown(chunks, reader)
    return shown_inline(screen, chunks, reader)
