"""The guardrail's refusal of a text, and how the client is told a verdict."""

from __future__ import annotations

from aim_guardrail.pipeline.ruling import Ruling
from aim_guardrail.policy import Verdict
from aim_guardrail.slots.slot import Slots, spelt
from aim_kserve.errors import ContentBlocked


class Blocked(ContentBlocked):
    """The guardrail's refusal: 400, ``content_filter``, the families, never the value."""

    def __init__(self, where: str, verdict: Verdict, reason: str | None = None) -> None:
        self.families = verdict.families
        reason = reason or f"it contains {', '.join(verdict.families)}"
        super().__init__(
            f"{where or 'the text'} was blocked by the guardrail: {reason}",
            param=where or None,
            code="content_filter",
        )

    def headers(self) -> dict[str, str]:
        return {**super().headers(), **verdict_headers("block", self.families)}


def place_named(slots: Slots, ruling: Ruling, first: int) -> str:
    """What a refusal names: the place of the slot where the code point ``first`` is, or of the key that it is."""
    parts = [slots.items[at] for at in ruling.slots]
    slot = parts[0]
    for slot in parts:
        if first < len(slot.text):
            break
        first -= len(slot.text)
    return spelt(slot.path[:-1] if slot.kind == "name" else slot.path)


def verdict_headers(action: str, families: tuple[str, ...], degraded: tuple[str, ...] = ()) -> dict[str, str]:
    """``x-guardrail-*`` response headers."""
    headers = {"x-guardrail-verdict": action}
    if families:
        headers["x-guardrail-families"] = ",".join(families)
    if degraded:
        headers["x-guardrail-degraded"] = ",".join(degraded)
    return headers
