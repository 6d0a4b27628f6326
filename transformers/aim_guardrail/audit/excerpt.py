"""The beginning of what was judged, all that was found in it masked: for an audit that is asked for it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from aim_guardrail.pipeline import Session
from aim_guardrail.pipeline.course import Course
from aim_guardrail.pipeline.ruling import Ruling, redact_parts
from aim_guardrail.policy import Direction
from aim_guardrail.slots.slot import Slots


class Excerpts:
    """Of one request.

    Args:
        most: characters of each direction's.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._session = Session()
        self._texts: dict[Direction, str] = {"prompt": "", "answer": ""}

    def add(self, direction: Direction, slots: Slots, rulings: Sequence[Ruling]) -> None:
        """Texts, and what the inline stage found in them."""
        for text in self._masked(slots, rulings):
            if len(self._texts[direction]) >= self._most:
                return
            self._texts[direction] = f"{self._texts[direction]}\n{text}".lstrip("\n")[: self._most]

    def of(self, course: Course) -> str:
        """The excerpt. Where a detector that judges whole texts found something, its labels alone: its spans are not
        where the excerpt's are."""
        inline = {rule.name for rule in course.policy.rules(course.direction) if rule.is_inline}
        found = [finding for verdict in course.verdicts for finding in verdict.findings]
        whole = sorted({f.label for f in found if f.detector and f.detector not in inline})
        return " ".join(f"<{label}>" for label in whole) or self._texts[course.direction]

    def _masked(self, slots: Slots, rulings: Sequence[Ruling]) -> Iterator[str]:
        by_first = {ruling.slots[0]: ruling for ruling in rulings}
        inside = {at for ruling in rulings for at in ruling.slots[1:]}
        for at, slot in enumerate(slots.items):
            ruling = by_first.get(at)
            if ruling is None:
                if slot.kind == "text" and at not in inside:
                    yield slot.text[: self._most]
                continue
            findings = [finding._replace(action="redact") for finding in ruling.verdict.findings]
            parts = [slots.items[part].text for part in ruling.slots]
            yield from redact_parts(parts, findings, self._session)
            if ruling.verdict.blocked:
                return  # what follows has not been judged
