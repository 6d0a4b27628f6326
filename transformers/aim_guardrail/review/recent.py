"""The verdicts of late, by request: what feedback is about. No texts, and bounded."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

from aim_guardrail.pipeline.context import RequestContext
from aim_guardrail.pipeline.course import Course
from aim_guardrail.pipeline.ruling import Ruling
from aim_guardrail.policy import Direction
from aim_guardrail.slots.slot import Slots

#: Some 300 bytes each.
MOST = 10_000


@dataclass(slots=True)
class Remembered:
    """What a request came to.

    Attributes:
        tenant: whose it was.
        families: what was found, logged findings too.
        told: feedback that was counted: a family and a label.
    """

    tenant: str | None
    policy: str = ""
    families: set[str] = field(default_factory=set)
    told: set[tuple[str, str]] = field(default_factory=set)


class Recent:
    """The last requests. All of it runs on the event loop."""

    def __init__(self, most: int = MOST) -> None:
        self._most = most
        self._requests: OrderedDict[str, Remembered] = OrderedDict()

    def __call__(self, context: RequestContext) -> Remembering:
        """The witness of a request."""
        return Remembering(self)

    def get(self, request_id: str) -> Remembered | None:
        """None: unknown, or forgotten."""
        return self._requests.get(request_id)

    def remember(self, course: Course) -> None:
        """A direction has come to its end. Of requests with one id, the last tenant's counts."""
        known = self._requests.get(course.context.request_id)
        if known is None or known.tenant != course.context.tenant:
            known = self._requests[course.context.request_id] = Remembered(course.context.tenant)
            if len(self._requests) > self._most:
                self._requests.popitem(last=False)
        known.policy = course.policy.label
        for verdict in course.verdicts:
            known.families.update(finding.family for finding in verdict.findings)


class Remembering:
    """One request's part of it."""

    hears = keeps = False

    def __init__(self, recent: Recent) -> None:
        self._recent = recent

    def content(self, direction: Direction, data: bytes) -> None:
        """Of no use here."""

    def slots(self, direction: Direction, slots: Slots, rulings: Sequence[Ruling]) -> None:
        """Of no use here."""

    async def ended(self, course: Course) -> None:
        """Remember it."""
        if course.context.request_id:
            self._recent.remember(course)

    def left(self) -> None:
        """The request is over."""
