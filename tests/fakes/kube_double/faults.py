"""What can be made to go wrong, from a test's thread."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from .refusal import Refusal, conflict


@dataclass
class _Refused:
    plural: str
    verbs: tuple[str, ...]
    times: int
    refusal: Refusal


class Faults:
    """Asked by the server at each request. A plural names the kind that a fault is for."""

    def __init__(self) -> None:
        self._refused: list[_Refused] = []
        self._after: list[tuple[str, str, Callable[[], object]]] = []

    def conflicts(self, plural: str, times: int) -> None:
        """The next so many updates and patches are refused with 409."""
        self._refused.append(_Refused(plural, ("PUT", "PATCH"), times, conflict(plural, "…")))

    def refuses(self, plural: str, verb: str, times: int, code: int, message: str = "injected") -> None:
        """The next so many requests of that verb (HTTP's) are answered with that code."""
        reasons = {429: "TooManyRequests", 500: "InternalError", 503: "ServiceUnavailable"}
        self._refused.append(_Refused(plural, (verb,), times, Refusal(code, reasons.get(code, "Unknown"), message)))

    def after_write(self, plural: str, verb: str, call: Callable[[], object]) -> None:
        """After the next write of that verb is stored, `call` runs (in a thread of its own) before anybody is told
        of it: neither the writer, nor a watch. Kill the operator in it."""
        self._after.append((plural, verb, call))

    @property
    def pending(self) -> int:
        """Refusals and calls that have not come about yet."""
        return sum(each.times for each in self._refused) + len(self._after)

    # --- the server's side

    def check(self, plural: str, verb: str) -> None:
        for each in self._refused:
            if each.plural == plural and verb in each.verbs and each.times > 0:
                each.times -= 1
                raise each.refusal

    def to_call(self, plural: str, verb: str) -> Callable[[], object] | None:
        for each in self._after:
            if each[:2] == (plural, verb):
                self._after.remove(each)
                return each[2]
        return None

    @staticmethod
    async def call(injected: Callable[[], object]) -> None:
        await asyncio.to_thread(injected)
