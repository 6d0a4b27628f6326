"""What the audit says of one decision: who, by which policy, what was found where, and never what it was."""

from __future__ import annotations

import hmac
import time
from collections.abc import Callable, Sequence
from typing import Any

from aim_guardrail.audit.chain import digest_of
from aim_guardrail.audit.excerpt import Excerpts
from aim_guardrail.audit.trail import Trail
from aim_guardrail.pipeline.context import RequestContext
from aim_guardrail.pipeline.course import Course
from aim_guardrail.pipeline.ruling import Ruling
from aim_guardrail.policy import Direction
from aim_guardrail.slots.slot import Slots

#: Findings that an entry tells one by one; more are only counted.
MOST_FINDINGS = 100
#: Answers of batch detectors likewise: a long stream is judged window by window, by each rule.
MOST_DETECTORS = 100
_DIRECTIONS = 2


class Auditor:
    """Makes a witness of each request.

    Args:
        key: of the content's digest and the tenant's; without one there is no content's: a short text is soon guessed.
        plain_tenant: tenants are named, not digested.
        excerpt_chars: of each direction's text, masked, what an entry has; 0: none.
    """

    def __init__(self, trail: Trail, key: bytes | None, *, plain_tenant: bool, excerpt_chars: int = 0) -> None:
        self._trail, self._key, self._plain_tenant = trail, key, plain_tenant
        self._excerpt_chars = excerpt_chars

    def __call__(self, context: RequestContext) -> Auditing:
        """The witness of a request. Raises Unavailable: nothing passes unaudited, and this could not be."""
        self._trail.reserve(_DIRECTIONS)
        excerpts = Excerpts(self._excerpt_chars) if self._excerpt_chars else None
        return Auditing(self._trail, self._key, self._tenant, excerpts)

    async def fed_back(self, tenant: str | None, said: dict[str, Any]) -> None:
        """Have feedback on that tenant's request written."""
        await self._trail.put({"ts": time.time(), "feedback": said, "tenant": self._tenant(tenant)})

    def _tenant(self, tenant: str | None) -> str | None:
        if tenant is None or self._plain_tenant:
            return tenant
        return digest_of(b"tenant:" + tenant.encode(), self._key)[:32]


class Auditing:
    """One request's entries."""

    def __init__(
        self,
        trail: Trail,
        key: bytes | None,
        tenant: Callable[[str | None], str | None],
        excerpts: Excerpts | None,
    ) -> None:
        self.hears, self.keeps = key is not None, excerpts is not None
        self._trail, self._key, self._tenant, self._excerpts = trail, key, tenant, excerpts
        self._digests: dict[Direction, hmac.HMAC] = {}

    def content(self, direction: Direction, data: bytes) -> None:
        """A part of a body, as it came."""
        digest = self._digests.get(direction)
        if digest is None:
            assert self._key is not None
            digest = self._digests[direction] = hmac.new(self._key, digestmod="sha256")
        digest.update(data)

    def slots(self, direction: Direction, slots: Slots, rulings: Sequence[Ruling]) -> None:
        """Texts that were judged."""
        if self._excerpts is not None:
            self._excerpts.add(direction, slots, rulings)

    async def ended(self, course: Course) -> None:
        """Have it written."""
        digest = self._digests.get(course.direction)
        tenant = self._tenant(course.context.tenant)
        fields = entry(course, tenant, None if digest is None else digest.hexdigest())
        if self._excerpts is not None:
            fields["excerpt"] = self._excerpts.of(course)
        await self._trail.put(fields)

    def left(self) -> None:
        """The request is over."""
        self._trail.release(_DIRECTIONS)


def entry(course: Course, tenant: str | None, content: str | None) -> dict[str, Any]:
    """The fields of a decision's line."""
    findings = [finding for verdict in course.verdicts for finding in verdict.findings]
    return {
        "ts": time.time(),
        "request_id": course.context.request_id,
        "tenant": tenant,
        "direction": course.direction,
        "policy": course.policy.label,
        "outcome": course.outcome,
        "action": course.action,
        "error": course.error,
        "found": len(findings),
        "findings": [
            {
                "rule": finding.detector or finding.family,
                "family": finding.family,
                "label": finding.label,
                "by": finding.rule_id,
                "action": finding.action,
                "score": round(finding.score, 4),
                "start": finding.start,
                "end": finding.end,
            }
            for finding in findings[:MOST_FINDINGS]
        ],
        "asked": len(course.answered),
        "detectors": [
            {"rule": each.rule, "family": each.family, "result": each.result, "ms": _ms(each.seconds)}
            for each in course.answered[:MOST_DETECTORS]
        ],
        "degraded": list(course.degraded),
        "check_ms": _ms(course.check_s),
        "since_ms": _ms(course.since_s),
        "content_hmac": content,
    }


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 3)
