"""The model starts while slow checks of its prompt still run; nothing of what it says is shown before their verdict."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Literal

from aim_guardrail.slots.apply import apply
from aim_guardrail.slots.collect import collect
from aim_guardrail.slots.places import Place
from aim_guardrail.slots.slot import Json
from aim_guardrail.upstream import Answer

Outcome = Literal["kept", "dropped", "repeated"]

#: Routes that only compute: asked twice, or in vain, they have done nothing but that.
_COMPUTES = frozenset(["chat/completions", "completions"])
#: Fields with which a predictor may do more than compute: call tools, search, keep what it is asked.
_ACTS = ("tools", "functions", "mcp_servers", "plugins", "web_search_options", "store")


def may_start(endpoint: str, body: Mapping[str, Any]) -> bool:
    """Whether a request may be sent before it is known that it passes: asking alone changes nothing."""
    return endpoint in _COMPUTES and all(body.get(field) in (None, False, []) for field in _ACTS)


def put(texts: Sequence[str], body: Json, place: Place) -> bool:
    """Put a prompt's texts, as the inline stage let them pass, into a parsing of its own: verdicts to come change the
    other one. True if it is another now."""
    return apply(body, collect("prompt", body, place), texts, False)


class Early:
    """A request to the predictor that is on its way before its verdict.

    Args:
        send: asks the predictor; its answer begins when that returns.
        count: is told what became of it.
    """

    def __init__(self, send: Callable[[bytes], Awaitable[Answer]], count: Callable[[Outcome], None]) -> None:
        self._send, self._count = send, count
        self._body = b""
        self._sending: asyncio.Future[Answer] | None = None

    def start(self, body: bytes) -> None:
        """Ask, as the inline stage lets it pass."""
        self._body, self._sending = body, asyncio.ensure_future(self._send(body))

    async def answer(self, body: bytes) -> Answer | None:
        """The answer to ``body``, which may pass; None where something else was asked, which is given up.

        Raises:
            ServingError: what the predictor, or the way to it, said.
        """
        if self._sending is None or body != self._body:
            await self._give_up("repeated")
            return None
        answer = await self._sending
        self._sending = None  # it is the caller's to close
        self._count("kept")
        return answer

    async def drop(self) -> None:
        """Give it up, if nobody has taken the answer: the connection is closed, whatever has come is thrown away."""
        await self._give_up("dropped")

    async def _give_up(self, outcome: Outcome) -> None:
        if (sending := self._sending) is None:
            return
        self._sending = None
        self._count(outcome)
        sending.cancel()
        for answer in await asyncio.gather(sending, return_exceptions=True):
            if isinstance(answer, Answer):
                async with answer:  # closes what has not been read to its end
                    pass
