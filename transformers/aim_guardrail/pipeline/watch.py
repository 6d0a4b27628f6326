"""Those who look on while a request is checked, told together."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from aim_guardrail.pipeline.course import Course, Outcome, Witness
from aim_guardrail.pipeline.ruling import Ruling
from aim_guardrail.policy import Direction
from aim_guardrail.slots.slot import Slots
from aim_kserve.errors import ContentBlocked, ServingError
from aim_kserve.http import ClientDisconnected

_OUTCOMES: dict[str, Outcome] = {"allow": "allowed", "flag": "flagged", "redact": "redacted", "block": "blocked"}
#: A body's digest takes a millisecond for so much.
_LARGE_BYTES = 256 * 1024


class Watch:
    """The witnesses of one request.

    Attributes:
        direction: the one that is being checked.
        hears: whether one of them wants bodies.
        keeps: whether one of them wants slots.
    """

    __slots__ = ("_hearers", "_keepers", "_witnesses", "direction", "hears", "keeps")

    def __init__(self, witnesses: Sequence[Witness] = ()) -> None:
        self.direction: Direction = "prompt"
        self._witnesses = witnesses
        self._hearers = [witness for witness in witnesses if witness.hears]
        self._keepers = [witness for witness in witnesses if witness.keeps]
        self.hears, self.keeps = bool(self._hearers), bool(self._keepers)

    async def hear(self, data: bytes) -> None:
        """A whole body as it came."""
        if len(data) > _LARGE_BYTES and self._hearers:
            await asyncio.to_thread(self.heard, data)
        else:
            self.heard(data)

    def heard(self, data: bytes) -> None:
        """The next part of one."""
        for witness in self._hearers:
            witness.content(self.direction, data)

    def keep(self, direction: Direction, slots: Slots, rulings: Sequence[Ruling]) -> None:
        """Texts that the inline stage has judged."""
        for witness in self._keepers:
            witness.slots(direction, slots, rulings)

    async def tell(self, course: Course) -> None:
        """A direction has come to its end."""
        for witness in self._witnesses:
            await witness.ended(course)

    def leave(self) -> None:
        """The request is over."""
        for witness in self._witnesses:
            witness.left()

    def __bool__(self) -> bool:
        return bool(self._witnesses)


def outcome_of(action: str, error: BaseException | None) -> tuple[Outcome, str | None]:
    """What became of a direction whose strictest action is that, and the code of what ended it."""
    if error is None or isinstance(error, ContentBlocked):
        return _OUTCOMES[action], None
    if isinstance(error, ClientDisconnected | asyncio.CancelledError):  # over HTTP, gRPC
        return "client_gone", None
    return "error", (error.code or f"status_{error.status}") if isinstance(error, ServingError) else "internal"
