"""A condition of one of our objects, as Kubernetes' API conventions want it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

#: Of metav1.Condition: a server takes no longer message.
_MOST_MESSAGE = 32768


def condition(
    kind: str, status: str, reason: str, message: str, before: Sequence[Mapping[str, Any]], now: datetime
) -> dict[str, Any]:
    """before: the conditions until now. The time is that of the last change of its status, not of this look."""
    known = next((each for each in before if each["type"] == kind), {})
    since = known["lastTransitionTime"] if known.get("status") == status else None
    return {
        "type": kind,
        "status": status,
        "reason": reason,
        "message": message[:_MOST_MESSAGE],
        "lastTransitionTime": since or now.strftime("%Y-%m-%dT%H:%M:%SZ"),
    }
