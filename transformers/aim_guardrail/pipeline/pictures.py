"""What a policy says of pictures without looking at them, and why one that was looked at could not be judged."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from aim_guardrail.detectors.base import Finding
from aim_guardrail.policy import Direction, Policy, Verdict
from aim_guardrail.slots.slot import Path, Slot

#: Of a finding's rule id, what the client is told.
UNREAD = {
    "nsfw_image.unreadable": "it is no picture that can be read: send PNG, JPEG, GIF, WebP, BMP, TIFF or AVIF",
    "nsfw_image.too_large": "the picture is larger than the policy allows: send a smaller one",
}
_REFUSED = "it is a picture, and the policy refuses pictures"
_NOT_FETCHED = "it is a link to a picture, which the guardrail does not fetch: send the picture as a data URI"


class Refusal(NamedTuple):
    """A picture that must not pass: where it stands, and why."""

    path: Path
    verdict: Verdict
    reason: str


def refusal(policy: Policy, direction: Direction, pictures: Sequence[Slot]) -> Refusal | None:
    """The first picture of a prompt that the policy refuses unseen: any, or a link where pictures are judged."""
    if direction == "answer" or policy.images == "pass":
        return None
    for slot in pictures:
        if policy.images == "refuse" or slot.kind == "link":
            found = Finding("images", slot.kind.upper(), 0, len(slot.text), 1, "images", action="block")
            reason = _REFUSED if policy.images == "refuse" else _NOT_FETCHED
            return Refusal(slot.path, Verdict("block", ("images",), (found,)), reason)
    return None
